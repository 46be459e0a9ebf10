// SPDX-License-Identifier: GPL-2.0-only
//! What `--dry-run` says of replication and sizes is what happens then, and saying it changes nothing.

use ddsnap::client::NewSizes;

use super::replica::{arrive, begin, source, target};
use super::*;
use crate::config::Asked;

/// What `say` says; nothing of the machine or the document may change.
fn said(bench: &Bench, say: impl FnOnce(Out) -> Result<()>) -> Result<Vec<String>> {
    let before = bench.reload().config;
    bench.fake.state().log.clear();
    let mut lines = Vec::new();
    let result = say(&mut |note| {
        if let Note::Line(line) = note {
            lines.push(line);
        }
    });
    let log = bench.fake.state().log.clone();
    assert!(log.is_empty(), "{log:?}");
    assert_eq!(bench.reload().config, before);
    result.map(|()| lines)
}

#[test]
fn what_becoming_a_replica_takes_away_is_said_before() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.snapshot(None, &mut |_| ()).expect("taken");
    let lines = said(&bench, |out| {
        volume.would_define_source(&source(false), out)
    });
    let lines = lines.expect("possible");
    for line in [
        "would unmount /dev/mapper/v",
        "would unmount /dev/mapper/v(0)",
        "would keep what volume 'v' holds now as a snapshot",
    ] {
        assert!(lines.contains(&line.into()), "{lines:?}");
    }
    let last = lines.last().expect("a line");
    assert!(
        last.starts_with(
            "would make volume 'v' a replica of what alpha has: each cycle overwrites "
        ),
        "{last}"
    );
    let bad = DefineSource {
        host: "-oProxyCommand=x".into(),
        ..source(false)
    };
    said(&bench, |out| volume.would_define_source(&bad, out)).expect_err("no host");

    let kept = bench.stored();
    volume
        .define_source(&source(false), &mut |_| ())
        .expect("a replica");
    assert!(bench.mounted().is_empty());
    assert!(bench.stored().len() > kept.len(), "a snapshot keeps it");
}

#[test]
fn what_forgetting_a_source_leaves_is_said_before() {
    let bench = Bench::new();
    let mut volume = bench.replica(true);
    arrive(&mut volume, &begin(1, None));
    let lines = said(&bench, |out| volume.would_forget_source(out)).expect("possible");
    assert!(
        lines.contains(&"would unmount /dev/mapper/v(1)".into()),
        "{lines:?}"
    );
    assert_eq!(
        lines.last().map(String::as_str),
        Some(
            "would end the role of volume 'v' as a replica of what alpha has; its content and snapshots stay"
        )
    );
    volume.forget_source(&mut |_| ()).expect("forgotten");
    assert!(bench.mounted().is_empty());
    said(&bench, |out| volume.would_forget_source(out)).expect_err("no source");
}

/// What another target, or somebody's rotation, needs is not let go of.
#[test]
fn which_snapshots_go_with_a_target_is_said_before() {
    let bench = Bench::new();
    let mut volume = bench.master();
    for host in ["beta", "gamma"] {
        volume.define_target(&target(host)).expect("defined");
        volume.snapshot_to_send(host).expect("taken");
        let newest = *volume.snapshot_uuids().last().expect("one");
        volume.pin(host, newest).expect("pinned");
        volume.move_hold(host, newest, None).expect("moved");
    }
    let before = bench.stored();
    let lines = said(&bench, |out| volume.would_forget_target("beta", out)).expect("possible");
    let promised: Vec<String> = before
        .iter()
        .map(|id| format!("would delete snapshot {id}, which is kept for beta alone"))
        .filter(|line| lines.contains(line))
        .collect();
    volume
        .forget_target("beta", &mut |_| ())
        .expect("forgotten");
    let gone: Vec<String> = before
        .iter()
        .filter(|id| !bench.stored().contains(id))
        .map(|id| format!("would delete snapshot {id}, which is kept for beta alone"))
        .collect();
    assert_eq!(promised, gone);
    assert_eq!(gone.len(), 1, "{before:?}");
    assert_eq!(
        lines[0],
        "would forget that volume 'v' is sent to beta; what is there stays there"
    );
    said(&bench, |out| volume.would_forget_target("beta", out)).expect_err("it is gone");
}

#[test]
fn what_a_cycle_would_send_and_overwrite_is_said_before() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.define_target(&target("beta")).expect("defined");
    let beta = Peer::Target("beta".into());
    let would =
        |volume: &Volume, asked| said(&bench, |out| volume.would_replicate(&beta, asked, out));
    let lines = would(&volume, Asked::default()).expect("possible");
    assert_eq!(
        lines,
        [
            "would take a snapshot of volume 'v' and send it to beta",
            "all of it is copied, if the two have no snapshot in common",
            "beta was not asked: it may refuse",
        ]
    );
    let named = Asked {
        snapshot: Some(7),
        ..Asked::default()
    };
    let error = would(&volume, named).expect_err("not there").to_string();
    assert_eq!(error, "there is no snapshot 7 to send");

    volume.snapshot_to_send("beta").expect("taken");
    let first = volume.snapshot_uuids()[0];
    volume.pin("beta", first).expect("pinned");
    volume.move_hold("beta", first, None).expect("moved");
    let forced = Asked {
        full: true,
        force_base: true,
        ..Asked::default()
    };
    let lines = would(&volume, forced).expect("possible");
    for line in [
        "what changed since snapshot 0 is copied, if both still know it",
        "if they have none, what beta holds is overwritten, whatever it is",
        "if what beta holds was written to, that is kept in a snapshot there and taken back",
    ] {
        assert!(lines.contains(&line.into()), "{lines:?}");
    }
    let nobody = Peer::Target("delta".into());
    said(&bench, |out| volume.would_replicate(&nobody, forced, out)).expect_err("no target");
}

#[test]
fn what_a_resize_would_use_is_said_before() {
    let bench = Bench::new();
    let volume = bench.master();
    let would = |sizes: NewSizes| said(&bench, |out| volume.would_resize(&sizes, out));
    let lines = would(NewSizes {
        origin: Some(200 << 20),
        ..NewSizes::default()
    });
    let lines = lines.expect("possible");
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(
        lines[0].starts_with("would use 200.0 MiB (209715200 bytes) of the origin '"),
        "{lines:?}"
    );
    // Metadata without a device of its own is part of the store.
    let lines = would(NewSizes {
        meta: Some(4 << 20),
        ..NewSizes::default()
    });
    let lines = lines.expect("possible");
    assert!(lines[0].contains("of the snapshot store '"), "{lines:?}");
    let error = would(NewSizes {
        store: Some(1 << 50),
        ..NewSizes::default()
    });
    let error = error.expect_err("the device is smaller").to_string();
    assert!(error.contains("make the device larger first"), "{error}");
}
