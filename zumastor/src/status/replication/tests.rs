// SPDX-License-Identifier: GPL-2.0-only
use std::collections::BTreeMap;

use super::*;
use crate::config::{Source, Target};
use crate::note::Progress;

const NOW: i64 = 1_000_000;

fn target() -> Target {
    serde_yaml::from_str("{}").expect("all has a default")
}

fn view(targets: &[(&str, Target)]) -> View {
    let mut view = super::super::tests::view();
    let config = view.config.as_mut().expect("a document");
    config.snapshots.list[1].created = NOW - 90;
    config.targets = BTreeMap::from_iter(targets.iter().map(|(n, t)| ((*n).to_owned(), t.clone())));
    view
}

fn job(name: &str, state: JobState, result: Option<&str>, refused: Option<u16>) -> JobView {
    JobView {
        id: 1,
        volume: "zumatest".into(),
        name: name.into(),
        state,
        progress: Progress {
            subject: "sending".into(),
            done: 1 << 20,
            total: 3 << 20,
        },
        rate: Some(1 << 20),
        started: NOW - 5,
        ended: None,
        result: result.map(str::to_owned),
        refused,
    }
}

fn due(target: Option<&str>, failures: u32) -> NextCycle {
    NextCycle {
        target: target.map(str::to_owned),
        at: NOW + 30,
        failures,
        error: None,
    }
}

fn only(view: &View) -> Replication {
    let all = of(view, NOW);
    assert_eq!(all.len(), 1);
    all[0].clone()
}

/// A replication that had not gone on for days was not to be seen in the status.
#[test]
fn each_state_is_told_with_what_to_do() {
    let hold = Snapref {
        uuid: uuid::Uuid::nil(),
        id: 2,
    };
    let mut of_beta = target();
    of_beta.hold = Some(hold);
    of_beta.proven = Some(NOW - 60);
    let mut view = view(&[("beta", of_beta)]);
    let idle = only(&view);
    assert_eq!(
        (idle.state, idle.lag, idle.help),
        (State::Idle, Some(90), None)
    );

    view.due = vec![due(None, 7), due(Some("beta"), 0)];
    let waits = only(&view);
    assert_eq!((waits.state, waits.next), (State::Waiting, Some(NOW + 30)));

    view.jobs = vec![job("replicate beta", JobState::Running, None, None)];
    let runs = only(&view);
    assert_eq!((runs.state, runs.next), (State::Running, None));
    assert_eq!((runs.rate, runs.seconds_left), (Some(1 << 20), Some(2)));

    view.jobs = vec![job(
        "replicate beta",
        JobState::Failed,
        Some("no route"),
        None,
    )];
    view.due = vec![due(Some("beta"), 3)];
    let backs_off = only(&view);
    assert_eq!(backs_off.state, State::BackingOff);
    assert_eq!(backs_off.last_error.as_deref(), Some("no route"));
    let text = table(std::slice::from_ref(&view), NOW);
    let expected = "\
REPLICATION       STATE                                     HAS WHAT WAS    RATE  LEFT  PROVEN EQUAL
zumatest -> beta  backing off after 3 failures, next in 30 s  1 min 30 s ago  -     -     1 min ago
";
    let words = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(words(&text), words(expected), "{text}");
    // It stood below the table, where nobody looks for what is wrong.
    let line = "WARNING: replication to beta: no route; it is tried again by itself; at once with `zumastor replicate \
                zumatest beta`";
    let all = super::super::table::volumes(std::slice::from_ref(&view), NOW);
    assert!(
        all.starts_with(&format!("zumatest: {line}\n\nVOLUME ")),
        "{all}"
    );
    let head = view.head();
    let expected = format!("VOLUME zumatest:\nStatus: running\n{line}\n");
    assert_eq!(head, expected);

    view.due.clear();
    assert_eq!(only(&view).state, State::Failed);
    view.jobs[0].refused = Some(7);
    assert_eq!(only(&view).state, State::Refused);
    view.jobs[0].refused = Some(SUPERSEDED);
    let superseded = only(&view);
    assert_eq!(superseded.state, State::Superseded);
    assert!(
        superseded
            .help
            .is_some_and(|help| help.contains("failback"))
    );

    view.jobs[0].refused = None;
    let config = view.config.as_mut().expect("a document");
    config.targets.get_mut("beta").expect("there").stopped = true;
    let stopped = only(&view);
    assert_eq!(stopped.state, State::Stopped);
    assert_eq!(
        stopped.help.as_deref(),
        Some("`zumastor start target zumatest beta`")
    );
}

#[test]
fn a_replica_tells_of_its_source() {
    let mut view = view(&[]);
    let source: Source = serde_yaml::from_str("host: alpha").expect("the rest has defaults");
    view.config.as_mut().expect("a document").source = Some(source);
    view.jobs = vec![job("receive", JobState::Failed, Some("cut"), None)];
    let one = only(&view);
    assert_eq!((one.sends, one.state), (false, State::Failed));
    assert_eq!(one.json()["direction"], "from");
    assert_eq!(one.json()["lag_seconds"], Value::Null);
    let head = view.head();
    let line = "WARNING: replication from alpha: cut; nothing tries again by itself: `zumastor replicate zumatest`\n";
    assert!(head.ends_with(line), "{head}");
    assert!(table(&[view], NOW).contains("zumatest <- alpha"));
}
