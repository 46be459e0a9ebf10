// SPDX-License-Identifier: GPL-2.0-only
//! Rotations, protection, other mounts and sizes.

use jiff::{Span, Zoned};

use super::*;
use crate::config::{Snapref, Source, Target};
use crate::refusal::{self, BUDGET};

fn rotation(kind: &str, keep: u32) -> WantedRotation {
    WantedRotation {
        kind: kind.into(),
        keep,
        custom: None,
    }
}

fn custom(kind: &str, keep: u32, every: Option<u64>) -> WantedRotation {
    WantedRotation {
        custom: Some(every),
        ..rotation(kind, keep)
    }
}

fn schedule(volume: &mut Volume, wanted: &[WantedRotation]) {
    volume
        .define_schedule(wanted, &mut |_| ())
        .expect("defined");
}

fn set_clock(bench: &Bench, text: &str) -> Zoned {
    let now: Zoned = text.parse().expect("a time with its zone");
    bench.fake.state().now = Some(now.clone());
    now
}

fn ids(volume: &Volume) -> Vec<u32> {
    volume.snapshots().iter().map(|s| s.id).collect()
}

#[test]
fn rotations_are_served_trimmed_and_linked() {
    let bench = Bench::new();
    let mut volume = bench.master();
    let mut now = set_clock(&bench, "2026-06-01T22:20[Europe/Berlin]");
    schedule(&mut volume, &[rotation("hourly", 3), rotation("daily", 2)]);
    assert_eq!(
        volume.take_due(&now, &mut |_| ()).expect("nothing is due"),
        None
    );
    for _ in 0..6 {
        now = now.checked_add(Span::new().hours(1)).expect("in range");
        bench.fake.state().now = Some(now.clone());
        volume.take_due(&now, &mut |_| ()).expect("taken");
        let again = volume.take_due(&now, &mut |_| ()).expect("not twice");
        assert_eq!(again, None);
    }
    // 23:20, 0:20 for both rotations, 1:20 to 4:20.
    assert_eq!(ids(&volume), [2, 6, 8, 10]);
    assert_eq!(volume.snapshots()[0].kinds, ["daily"], "no longer hourly");
    assert_eq!(bench.mounted(), ["v", "v(2)", "v(6)", "v(8)", "v(10)"]);
    let stored: Vec<u32> = bench.fake.state().snapshots.keys().copied().collect();
    assert_eq!(stored, [2, 6, 8, 10], "the data is gone too");
    let links = bench.layout.snapshot_links("v");
    let target = |name: &str| fs::read_link(links.join(name)).expect("a link");
    assert_eq!(target("hourly.0"), Path::new("2026.06.02-04.20.00"));
    assert_eq!(target("hourly.2"), Path::new("2026.06.02-02.20.00"));
    assert_eq!(target("daily.0"), Path::new("2026.06.02-00.20.00"));
    assert!(!links.join("hourly.3").is_symlink());
    assert_eq!(bench.reload().config, volume.config);
}

#[test]
fn a_stopped_master_catches_up_once_when_it_is_started() {
    let bench = Bench::new();
    let mut volume = bench.master();
    set_clock(&bench, "2026-06-01T10:20[UTC]");
    schedule(&mut volume, &[rotation("hourly", 24)]);
    volume.stop_master(&mut |_| ()).expect("stopped");
    let now = set_clock(&bench, "2026-06-03T17:20[UTC]");
    assert_eq!(volume.take_due(&now, &mut |_| ()).expect("not now"), None);
    volume.start_master(&mut |_| ()).expect("started");
    assert_eq!(volume.take_due(&now, &mut |_| ()).expect("due"), Some(0));
    assert_eq!(volume.take_due(&now, &mut |_| ()).expect("once"), None);
}

/// One snapshot caught up with what was missed, a second before midnight; making it took longer than that, and the
/// midnight's counted as taken.
#[test]
fn a_slot_that_begins_while_a_snapshot_is_made_is_not_served_by_it() {
    let bench = Bench::new();
    let mut volume = bench.master();
    set_clock(&bench, "2026-06-01T10:20[UTC]");
    schedule(&mut volume, &[rotation("daily", 5)]);
    let now = set_clock(&bench, "2026-06-03T23:59:59[UTC]");
    bench.fake.state().creating_takes = 3;
    assert_eq!(volume.take_due(&now, &mut |_| ()).expect("due"), Some(0));
    let midnight = volume.host.now();
    assert_eq!(midnight.day(), 4, "made meanwhile");
    let next = volume.take_due(&midnight, &mut |_| ());
    assert_eq!(next.expect("due"), Some(2));
}

/// What is due on a replica has to wait for what arrives from upstream.
#[test]
fn rotations_of_a_replica_wait_for_the_next_arrival() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.config.master = None;
    volume.config.source = Some(Source::at("alpha"));
    set_clock(&bench, "2026-06-01T10:20[UTC]");
    schedule(&mut volume, &[rotation("hourly", 2), custom("x", 2, None)]);
    let now = set_clock(&bench, "2026-06-01T11:20[UTC]");
    for _ in 0..2 {
        assert_eq!(volume.take_due(&now, &mut |_| ()).expect("noted"), None);
    }
    let taken = volume.snapshot(Some("x"), &mut |_| ()).expect("noted");
    assert_eq!(taken, None);
    let source = bench.reload().config.source.expect("a source");
    assert_eq!(source.pending, ["hourly", "x"]);
    assert!(bench.fake.state().snapshots.is_empty());
    // It becomes a master, and says what it no longer is.
    let mut warnings = Vec::new();
    let flags = MasterFlags::default();
    let made = volume.define_master(flags, &mut |note| {
        if let Note::Warning(text) = note {
            warnings.push(text);
        }
    });
    made.expect("a master");
    assert_eq!(
        warnings,
        ["volume 'v' is no longer a replica of 'v' on alpha"]
    );
    assert_eq!(bench.reload().config.source, None);
}

#[test]
fn what_cannot_be_taken_stays_due_and_is_told() {
    let bench = Bench::new();
    let mut volume = bench.master();
    set_clock(&bench, "2026-06-01T10:20[UTC]");
    schedule(&mut volume, &[rotation("hourly", 24)]);
    let now = set_clock(&bench, "2026-06-01T11:00[UTC]");
    bench.fake.state().fail = Some("create 0".into());
    volume.take_due(&now, &mut |_| ()).expect_err("it fails");
    let told = |volume: &Volume| {
        volume
            .warnings
            .iter()
            .any(|w| w.contains("(hourly) failed: create 0"))
    };
    assert!(told(&volume), "{:?}", volume.warnings);
    assert_eq!(volume.take_due(&now, &mut |_| ()).expect("taken"), Some(2));
    assert!(!told(&volume), "{:?}", volume.warnings);
}

#[test]
fn a_snapshot_in_use_leaves_its_rotation_later() {
    let bench = Bench::new();
    let mut volume = bench.master();
    schedule(&mut volume, &[custom("x", 1, None)]);
    let take = |volume: &mut Volume| {
        volume.snapshot(Some("x"), &mut |_| ()).expect("taken");
    };
    take(&mut volume);
    let dir = volume.mountpoint(Some(0));
    bench.fake.state().busy.insert(dir);
    take(&mut volume);
    assert_eq!(ids(&volume), [0, 2]);
    let told = &volume.warnings[..];
    assert!(
        told.len() == 1 && told[0].contains("snapshot 0 stays"),
        "{told:?}"
    );
    assert_eq!(
        bench.mounted().len(),
        3,
        "it is whole: {:?}",
        bench.mounted()
    );
    bench.fake.state().busy.clear();
    take(&mut volume);
    assert_eq!(ids(&volume), [4]);
    assert!(volume.warnings.is_empty(), "{:?}", volume.warnings);
}

#[test]
fn rotations_that_make_no_sense_are_refused() {
    let bench = Bench::new();
    let mut volume = bench.try_define(&Bench::request()).expect("defined");
    let refusal = |volume: &mut Volume, wanted: &[WantedRotation]| {
        let error = volume.define_schedule(wanted, &mut |_| ());
        let error = error.expect_err("refused");
        (refusal::code(&error), format!("{error:#}"))
    };
    let (code, text) = refusal(&mut volume, &[rotation("hourly", 1)]);
    assert!(
        code == 1 && text.contains("neither a master nor a source"),
        "{text}"
    );
    let mut volume = {
        let flags = MasterFlags::default();
        volume.define_master(flags, &mut |_| ()).expect("a master");
        volume
    };
    for (wanted, expected) in [
        (vec![custom("daily", 1, None)], "built in"),
        (vec![custom("manual", 1, None)], "built in"),
        // All its snapshots went with the next cycle.
        (vec![custom("replica", 1, None)], "built in"),
        (vec![custom("x", 1, None), custom("x", 2, None)], "twice"),
        (vec![custom("a/b", 1, None)], "no name"),
    ] {
        let (code, text) = refusal(&mut volume, &wanted);
        assert!(code == 1 && text.contains(expected), "{text}");
    }
    let most = u32::try_from(BUDGET_MAX).expect("small");
    schedule(&mut volume, &[rotation("hourly", most - 10)]);
    let (code, text) = refusal(&mut volume, &[rotation("daily", 11)]);
    assert_eq!(code, BUDGET, "{text}");
    assert!(text.contains("4001 snapshots"), "{text}");
    schedule(&mut volume, &[rotation("hourly", 0), rotation("daily", 11)]);
    let kinds: Vec<&str> = volume
        .config
        .schedule
        .iter()
        .map(|r| r.kind.as_str())
        .collect();
    assert_eq!(kinds, ["daily"]);
    let error = volume
        .snapshot(Some("hourly"), &mut |_| ())
        .expect_err("ended");
    assert!(
        error.to_string().contains("no schedule for 'hourly'"),
        "{error}"
    );
    volume
        .forget_schedule(None, &mut |_| ())
        .expect("forgotten");
    volume
        .forget_schedule(None, &mut |_| ())
        .expect_err("there is none");
}

/// The 300th snapshot took many times what the 10th took: each one looked at all others.
#[test]
fn a_snapshot_costs_the_same_however_many_there_are() {
    let bench = Bench::new();
    let mut volume = bench.master();
    schedule(&mut volume, &[custom("x", 30, None)]);
    let mut cost = Vec::new();
    for _ in 0..40 {
        let before = bench.fake.state().lookups;
        volume.snapshot(Some("x"), &mut |_| ()).expect("taken");
        cost.push(bench.fake.state().lookups - before);
    }
    assert_eq!(cost[5], cost[28], "{cost:?}");
    // And one that another one leaves for.
    assert_eq!(cost[31], cost[39], "{cost:?}");
    assert!(cost[39] < 40, "{cost:?}");
}

/// `zumastor snapshot` failed at once when a server was just being started again.
#[test]
fn a_server_that_is_being_restarted_is_waited_for() {
    let bench = Bench::new();
    let mut volume = bench.master();
    bench.fake.state().absent_server = 3;
    take(&mut volume);
    assert_eq!(bench.fake.state().pauses, 3);
    bench.fake.state().absent_server = u32::MAX;
    let error = volume
        .snapshot(None, &mut |_| ())
        .expect_err("not for ever");
    assert!(error.to_string().contains("cannot connect"), "{error:#}");
}

#[test]
fn protected_and_held_snapshots_stay() {
    let bench = Bench::new();
    let mut volume = bench.master();
    schedule(&mut volume, &[custom("x", 1, None)]);
    for _ in 0..2 {
        volume.snapshot(Some("x"), &mut |_| ()).expect("taken");
        let id = volume.snapshots().last().expect("taken").id;
        volume.protect(id, true, &mut |_| ()).expect("protected");
    }
    assert_eq!(ids(&volume), [0, 2]);
    assert_eq!(bench.fake.state().priorities[&0], 127);
    let error = volume.forget_snapshot(0, &mut |_| ()).expect_err("refused");
    assert!(
        error.to_string().contains("`zumastor unprotect v 0`"),
        "{error}"
    );
    volume.protect(0, false, &mut |_| ()).expect("unprotected");
    assert_eq!(bench.fake.state().priorities[&0], 0);
    // Somebody changed it behind the document's back.
    bench.fake.state().priorities.insert(2, 5);
    volume.snapshot(Some("x"), &mut |_| ()).expect("taken");
    assert_eq!(bench.fake.state().priorities[&2], 127);
    assert_eq!(ids(&volume), [2, 4], "0 has left");
    let uuid = volume.snapshots()[1].uuid;
    let target = Target {
        name: None,
        port: None,
        ssh_command: None,
        period: None,
        ratelimit: None,
        window: None,
        on_full: Default::default(),
        uncompressed: false,
        test_fullvolume: false,
        full: false,
        stopped: false,
        hold: Some(Snapref { uuid, id: 4 }),
        sending: None,
        asked: None,
        proven: None,
    };
    volume.config.targets.insert("beta".into(), target);
    volume.snapshot(Some("x"), &mut |_| ()).expect("taken");
    assert_eq!(ids(&volume), [2, 4, 6], "the next increment needs 4");
    let error = volume.forget_snapshot(4, &mut |_| ()).expect_err("refused");
    assert!(error.to_string().contains("replication to beta"), "{error}");
}

#[test]
fn a_dry_run_says_the_steps_and_changes_nothing() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    bench.fake.state().log.clear();
    let mut lines = Vec::new();
    let mut out = |note| {
        if let Note::Line(line) = note {
            lines.push(line);
        }
    };
    volume.would_forget_snapshot(0, &mut out).expect("possible");
    volume.would_forget(&mut out).expect("possible");
    assert!(volume.would_revert(0, &mut out).is_err(), "it is mounted");
    assert!(
        lines.contains(&"would unmount /dev/mapper/v(0)".into()),
        "{lines:?}"
    );
    assert!(
        lines.contains(&"would delete the volume's document".into()),
        "{lines:?}"
    );
    assert!(
        bench.fake.state().log.is_empty(),
        "{:?}",
        bench.fake.state().log
    );
    let error = volume
        .would_forget_snapshot(2, &mut |_| ())
        .expect_err("none");
    assert_eq!(error.to_string(), "volume 'v' has no snapshot 2");
}

#[test]
fn remount_changes_place_and_options_or_nothing() {
    let bench = Bench::new();
    let mut volume = bench.master();
    let dir = bench.root.path().join("srv");
    let options = Some(Some("noatime".to_string()));
    volume
        .remount(Some(dir.clone()), options, &mut |_| ())
        .expect("remounted");
    assert_eq!(bench.mounted(), ["srv"]);
    let log = bench.fake.state().log.clone();
    assert_eq!(log[log.len() - 2..], ["unmount v", "mount v noatime"]);
    let link = fs::read_link(bench.layout.mount_link("v")).expect("a link");
    assert_eq!(link, dir);
    // Options alone.
    volume
        .remount(None, Some(None), &mut |_| ())
        .expect("remounted");
    let log = bench.fake.state().log.clone();
    assert_eq!(log.last().map(String::as_str), Some("mount v"));
    // It is in use: nothing changes.
    let before = volume.config.clone();
    bench.fake.state().busy.insert(dir.clone());
    let elsewhere = Some(bench.root.path().join("elsewhere"));
    volume
        .remount(elsewhere.clone(), None, &mut |_| ())
        .expect_err("busy");
    assert_eq!(
        (&volume.config, bench.mounted()),
        (&before, vec!["srv".to_string()])
    );
    // The new mount fails: the old one is back.
    bench.fake.state().busy.clear();
    bench.fake.state().fail = Some("mount v noexec".into());
    let options = Some(Some("noexec".to_string()));
    volume
        .remount(elsewhere, options, &mut |_| ())
        .expect_err("it fails");
    assert_eq!(
        (&volume.config, bench.mounted()),
        (&before, vec!["srv".to_string()])
    );
    assert_eq!(bench.reload().config, before);
    let relative = Some("srv".into());
    volume
        .remount(relative, None, &mut |_| ())
        .expect_err("must start with /");
    // One that is not mounted is only written down.
    volume.down(Level::Down, &mut |_| ()).expect("down");
    volume
        .remount(Some("/data".into()), None, &mut |_| ())
        .expect("noted");
    assert!(bench.mounted().is_empty());
}

/// `zumastor start` took a minute and more with 300 snapshots, one after the other.
#[test]
fn many_snapshots_come_and_go_several_at_a_time() {
    let bench = Bench::new();
    let mut volume = bench.master();
    for _ in 0..30 {
        take(&mut volume);
    }
    let up = (bench.devices(), bench.mounted().len());
    assert_eq!(up, (up.0.clone(), 31));
    bench.fake.reboot();
    let mut volume = bench.reload();
    let (reached, go) = bench.fake.stall("dm create v(0)");
    let started = std::thread::spawn(move || {
        let result = volume.up(Level::Mounted, &mut |_| ());
        (volume, result.expect("up").is_clean())
    });
    let limit = std::time::Duration::from_secs(30);
    reached.recv_timeout(limit).expect("it creates devices");
    let end = std::time::Instant::now() + limit;
    while bench.devices().len() < 30 {
        assert!(std::time::Instant::now() < end, "the others wait for v(0)");
        std::thread::yield_now();
    }
    drop(go);
    let (mut volume, clean) = started.join().expect("no panic");
    assert!(clean && (bench.devices(), bench.mounted().len()) == up);
    // One in use: it stays, and all others come back.
    let dir = volume.mountpoint(Some(20));
    bench.fake.state().busy.insert(dir);
    volume.down(Level::Down, &mut |_| ()).expect_err("in use");
    assert_eq!((bench.devices(), bench.mounted().len()), up);
    bench.fake.state().busy.clear();
    volume.down(Level::Down, &mut |_| ()).expect("down");
    assert!(bench.devices().is_empty() && bench.mounted().is_empty());
    // One that cannot be had does not keep the others away.
    bench.fake.state().fail = Some("dm create v(8)".into());
    let report = volume.up(Level::Mounted, &mut |_| ()).expect("up");
    assert_eq!(report.failures.len(), 1);
    assert_eq!(bench.mounted().len(), 30);
    assert!(
        volume.warnings[0].starts_with("snapshot 8: "),
        "{:?}",
        volume.warnings
    );
}
