// SPDX-License-Identifier: GPL-2.0-only
//! What is printed, to the letter.

use super::*;
use crate::config::Snapshot;
use crate::machine::Stored;
use ddsnap::units::{SnapSeq, SnapTag};

pub(super) fn view() -> View {
    let snapshot = |id| Snapshot {
        id,
        uuid: uuid::Uuid::nil(),
        kinds: vec!["manual".into()],
        time: format!("t{id}"),
        created: 0,
        sequence: None,
        protected: false,
        twin: None,
    };
    let snapshots = Snapshots {
        next: 4,
        list: vec![snapshot(0), snapshot(2)],
        ..Snapshots::default()
    };
    View {
        name: "zumatest".into(),
        up: true,
        failure: None,
        warnings: Vec::new(),
        notes: Vec::new(),
        store: None,
        jobs: Vec::new(),
        due: Vec::new(),
        config: Some(VolumeConfig {
            version: config::SCHEMA_VERSION,
            uuid: uuid::Uuid::nil(),
            lineage: Lineage::first(uuid::Uuid::nil()),
            device: Devices {
                origin: "/dev/sysvg/test".into(),
                snapstore: "/dev/sysvg/test_snap".into(),
                meta: None,
            },
            store: None,
            cachesize: Some("64m".into()),
            filesystem: Filesystem {
                mountopts: Some("noatime".into()),
                ..Filesystem::default()
            },
            master: Some(config::Master::default()),
            source: None,
            targets: Default::default(),
            schedule: Vec::new(),
            snapshots,
            upgraded_from: None,
        }),
    }
}

#[test]
fn a_running_volume() {
    let expected = "\
VOLUME zumatest:
Status: running
Configuration:
   cachesize: 64m
   device/
      origin -> /dev/sysvg/test
      snapstore -> /dev/sysvg/test_snap
   filesystem/
      mountopts: noatime
      mountsnap: yes
   master/
      next: 4
      schedule/
      snapshots/
         manual: 0 2
";
    assert_eq!(view().render(None), expected);
}

#[test]
fn a_failed_volume_says_why_and_the_table_comes_before_the_tree() {
    let mut view = view();
    view.failure = Some("device '/dev/sysvg/test' does not exist".into());
    let text = view.render(Some("TABLE\n"));
    let expected = "VOLUME zumatest:\nStatus: failed\nReason: device '/dev/sysvg/test' does not \
                    exist\nTABLE\nConfiguration:\n";
    assert!(text.starts_with(expected), "{text}");
}

/// A squashed snapshot and a store that had failed were "running", without a word.
#[test]
fn what_the_server_knows_is_told() {
    let stored = |tag, state| Stored {
        tag: SnapTag(tag),
        seq: SnapSeq(u64::from(tag)),
        created: 0,
        priority: 0,
        state,
        doubtful: false,
        to_bookmark: false,
        persistent_usecount: 0,
        devices: 1,
        sectors: 8,
    };
    let mut state = StoreState {
        space: Some("the snapshot store is nearly full".into()),
        snapshots: vec![stored(2, SnapshotState::Squashed)],
        ..StoreState::default()
    };
    let mut view = view();
    view.add_state(&state);
    assert_eq!(view.status(), "running");
    view.add_state(&state);
    let text = view.render(None);
    assert_eq!(text.matches("WARNING: ").count(), 3, "{text}");
    for words in [
        "WARNING: the snapshot store is nearly full\n",
        "no longer has snapshot 0: `zumastor forget snapshot zumatest 0`",
        "snapshot 2 is squashed",
    ] {
        assert!(text.contains(words), "{text}");
    }
    state.fault = Some("write error".into());
    view.add_state(&state);
    assert_eq!(view.status(), "failed");
    assert!(
        view.render(None)
            .contains("Reason: the snapshot store has failed: write error; ")
    );
}

#[test]
fn a_stopped_volume_without_a_master() {
    let mut view = view();
    view.up = false;
    if let Some(config) = &mut view.config {
        config.master = None;
        config.cachesize = None;
        config.filesystem = Filesystem::default();
    }
    let expected = "\
VOLUME zumatest:
Status: not running
Configuration:
   device/
      origin -> /dev/sysvg/test
      snapstore -> /dev/sysvg/test_snap
";
    assert_eq!(view.render(None), expected);
}

/// Of a replica the tree had no word, not even the next number; nor had that of a master of its targets.
#[test]
fn roles_of_replication_are_in_the_tree() {
    let mut view = view();
    let config = view.config.as_mut().expect("a document");
    config.cachesize = None;
    config.filesystem.mountopts = None;
    config.master = None;
    let source = "{host: alpha, name: data, mount: true, port: 4321, period: 60, pending: [hourly], hold: {uuid: \
                  00000000-0000-0000-0000-000000000000, id: 2}, incoming: {uuid: \
                  00000000-0000-0000-0000-000000000001, id: 8, created: 0, position: 4096, size: 8192}}";
    config.source = Some(serde_yaml::from_str(source).expect("a source"));
    config.schedule.push(config::Rotation {
        kind: "hourly".into(),
        keep: 4,
        every: None,
        served: None,
    });
    let target = "{name: copy, period: 300, ratelimit: 1000000, hold: {uuid: \
                  00000000-0000-0000-0000-000000000000, id: 0}, sending: {uuid: \
                  00000000-0000-0000-0000-000000000000, id: 2}}";
    let far = serde_yaml::from_str(target).expect("a target");
    config.targets.insert("far".into(), far);
    let plain = serde_yaml::from_str("{uncompressed: true}").expect("a target");
    config.targets.insert("near".into(), plain);
    let expected = "\
   filesystem/
      mountsnap: yes
   source/
      apply: 8 4096/8192 4096
      hold: 2
      hostname: alpha
      name: data
      next: 4
      pending/
         hourly
      period: 60
      port: 4321
      schedule/
         hourly: 4
      snapshots/
         manual: 0 2
   targets/
      far/
         compress: 1
         hold: 0
         name: copy
         period: 300
         ratelimit: 1000000
         send: 2
      near/
         compress: 0
";
    let text = view.render(None);
    assert!(text.ends_with(expected), "{text}");
}

#[test]
fn the_run_tree_shows_files_links_and_sockets() {
    let root = tempfile::tempdir().expect("a directory");
    let layout = Layout::below(root.path());
    let run = layout.run();
    fs::create_dir_all(run.join("agents")).expect("made");
    fs::create_dir_all(run.join("snapshot/v")).expect("made");
    fs::write(layout.running(), "").expect("written");
    fs::write(run.join("v-server.pid"), "12\n").expect("written");
    fs::write(run.join("trigger"), "hidden").expect("written");
    let link = run.join("snapshot/v/manual.0");
    std::os::unix::fs::symlink("2026.01.02-03.04.05", link).expect("linked");
    let _socket = std::os::unix::net::UnixListener::bind(run.join("agents/v")).expect("a socket");
    let expected = "\
RUN STATUS:
agents/
   v=
running
snapshot/
   v/
      manual.0 -> 2026.01.02-03.04.05
v-server.pid: 12
";
    assert_eq!(run_status(&layout), expected);
}

#[test]
fn the_table_has_problems_first_and_a_line_a_volume() {
    let mut one = view();
    one.store = Some(StoreView {
        origin_bytes: 100 << 20,
        data_bytes: 64 << 20,
        used_bytes: 16 << 20,
        unwell: vec![(2, SnapshotHealth::Squashed)],
    });
    let broken = View::broken("a", "device '/dev/x' does not exist");
    let text = table::volumes(&[broken, one.clone()], 90);
    let expected = "\
a: FAILED: device '/dev/x' does not exist

VOLUME    STATE    ROLE    SIZE       SNAPSHOTS  STORE USED       LAST SNAPSHOT   TARGETS  ORIGIN
a         failed   none    -          -          -                -               -        -
zumatest  running  master  100.0 MiB  2          16.0 MiB (25 %)  1 min 30 s ago  -        /dev/sysvg/test
";
    assert_eq!(text, expected);
    let text = table::snapshots(&one, 90);
    assert!(
        text.contains("zumatest(2)  t2     1 min 30 s ago  manual     squashed"),
        "{text}"
    );
    let json = json::document(&[one], 0);
    let snapshots = &json["volumes"][0]["snapshots"];
    assert_eq!(
        (&snapshots[0]["state"], &snapshots[1]["state"]),
        (&"ok".into(), &"squashed".into())
    );
}

/// The example of JSON.md is what is printed, to the letter.
#[test]
fn the_document_of_the_json_is_true() {
    let mut view = view();
    view.store = Some(StoreView {
        origin_bytes: 100 << 20,
        data_bytes: 64 << 20,
        used_bytes: 16 << 20,
        unwell: vec![(2, SnapshotHealth::Squashed)],
    });
    view.warnings.push("snapshot 2 is squashed".into());
    let config = view.config.as_mut().expect("a document");
    config.schedule.push(config::Rotation {
        kind: "quarter".into(),
        keep: 4,
        every: Some(900),
        served: Some(1_767_323_700),
    });
    let mut backup: config::Target = serde_yaml::from_str("{}").expect("all has a default");
    backup.hold = Some(config::Snapref {
        uuid: uuid::Uuid::nil(),
        id: 2,
    });
    backup.proven = Some(1_767_323_405);
    config.snapshots.list[1].created = 1_767_323_400;
    config.targets.insert("backup".into(), backup);
    view.due.push(NextCycle {
        target: Some("backup".into()),
        at: 1_767_323_830,
        failures: 2,
        error: Some("could not run 'ssh'".into()),
    });
    view.jobs.push(JobView {
        id: 7,
        volume: "zumatest".into(),
        name: "resize".into(),
        state: JobState::Running,
        progress: crate::note::Progress {
            subject: "changing the sizes".into(),
            done: 1 << 20,
            total: 3 << 20,
        },
        rate: Some(1 << 20),
        started: 1_767_323_705,
        ended: None,
        result: None,
        refused: None,
    });
    let printed = format!("{:#}", json::document(&[view], 1_767_323_800));
    let document = include_str!("../../JSON.md");
    let example = document
        .split("```json\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next());
    assert_eq!(
        example.map(str::trim_end),
        Some(printed.as_str()),
        "{printed}"
    );
}
