// SPDX-License-Identifier: GPL-2.0-only
//! The document: its form, its replacement, its errors, its upgrade.

use std::fs;
use std::path::Path;

use jiff::tz::TimeZone;

use super::*;
use crate::layout::Layout;

/// Documents as version 2 writes them: change these only together with the version.
const GOLDEN: &str = include_str!("golden/v2.yaml");
const REPLICA: &str = include_str!("golden/v2-replica.yaml");
/// As builds wrote it that did not know which store is the volume's. It never changes.
const WITHOUT_STORE: &str = include_str!("golden/v2-without-store.yaml");
/// As version 1 wrote it. It never changes.
const V1: &str = include_str!("golden/v1.yaml");
/// What becomes of that in Berlin.
const V1_UPGRADED: &str = include_str!("golden/v1-upgraded.yaml");

fn sample() -> VolumeConfig {
    let uuid = Uuid::from_u128(0x1234_5678);
    let snapshot = Snapshot {
        id: 0,
        uuid: Uuid::from_u128(0xaa),
        kinds: vec![MANUAL.into()],
        time: "2026.01.02-03.04.05".into(),
        created: 1_767_323_045,
        sequence: Some(7),
        protected: true,
        twin: None,
    };
    let target = Target {
        name: Some("copy".into()),
        port: None,
        ssh_command: None,
        period: Some(60),
        ratelimit: Some(1_000_000),
        window: Some("22:00-06:00".parse().expect("a window")),
        on_full: HoldPolicy::Protect,
        uncompressed: false,
        test_fullvolume: false,
        full: false,
        stopped: false,
        hold: Some(Snapref {
            uuid: Uuid::from_u128(0xaa),
            id: 0,
        }),
        sending: None,
        asked: None,
        proven: Some(1_767_323_046),
    };
    VolumeConfig {
        version: 2,
        uuid,
        lineage: Lineage::first(uuid),
        device: Devices {
            origin: "/dev/sysvg/test".into(),
            snapstore: "/dev/sysvg/test_snap".into(),
            meta: None,
        },
        store: Some(Uuid::from_u128(0x570e)),
        cachesize: Some("64m".into()),
        filesystem: Filesystem {
            mountopts: Some("noatime".into()),
            ..Filesystem::default()
        },
        master: Some(Master::default()),
        source: None,
        targets: BTreeMap::from([("beta".to_string(), target)]),
        schedule: vec![
            Rotation {
                kind: "hourly".into(),
                keep: 24,
                every: None,
                served: Some(1_767_322_800),
            },
            Rotation {
                kind: "quarter".into(),
                keep: 4,
                every: Some(900),
                served: None,
            },
        ],
        snapshots: Snapshots {
            next: 2,
            list: vec![snapshot],
            ..Snapshots::default()
        },
        upgraded_from: None,
    }
}

fn read(text: &str) -> VolumeConfig {
    parse(Path::new("/x"), text).expect("read")
}

#[test]
fn the_document_is_pinned() {
    assert_eq!(serde_yaml::to_string(&sample()).expect("written"), GOLDEN);
    assert_eq!(read(GOLDEN), sample());
    let replica = read(REPLICA);
    assert_eq!(serde_yaml::to_string(&replica).expect("written"), REPLICA);
    let incoming = replica.source.and_then(|s| s.incoming).expect("in part");
    assert_eq!(incoming.base, Some(Uuid::from_u128(0xaa)));
}

/// An upgrade refused every volume with a target: it took the field for a mistake.
#[test]
fn what_earlier_builds_wrote_is_read() {
    let old = GOLDEN.replace(
        "    uncompressed: false\n",
        "    uncompressed: false\n    full: false\n",
    );
    assert_ne!(old, GOLDEN);
    assert_eq!(read(&old), read(GOLDEN));
    let mut expected = sample();
    expected.store = None;
    expected.snapshots.list[0].sequence = None;
    assert_eq!(read(WITHOUT_STORE), expected);
    let again = serde_yaml::to_string(&expected).expect("written");
    assert_eq!(again, WITHOUT_STORE, "nothing is made up");
}

/// A document of an earlier version was refused: an upgrade of the package would have lost the volume.
#[test]
fn version_1_is_upgraded_the_same_way_each_time() {
    let old: v1::Document = serde_yaml::from_str(V1).expect("version 1");
    let berlin = TimeZone::get("Europe/Berlin").expect("known");
    let new = v1::upgrade(old.clone(), &berlin);
    let text = serde_yaml::to_string(&new).expect("written");
    assert_eq!(text, V1_UPGRADED);
    assert_eq!(v1::upgrade(old, &berlin), new);
    // On the night of the change 02:30 came after 02:45: ages still grow with the numbers.
    let created: Vec<i64> = new.snapshots.list.iter().map(|s| s.created).collect();
    assert!(created.is_sorted(), "{created:?}");
    assert_eq!(created[2] - created[1], 45 * 60);
    assert_eq!(read(V1).upgraded_from, Some(1));
    let again = read(V1_UPGRADED);
    assert_eq!(again.upgraded_from, None);
    assert_eq!(again.snapshots, new.snapshots);
}

#[test]
fn the_old_document_is_kept_when_the_new_one_is_written() {
    let root = tempfile::tempdir().expect("a directory");
    let layout = Layout::below(root.path());
    fs::create_dir_all(layout.volume("v")).expect("made");
    fs::write(layout.config("v"), V1).expect("written");
    let config = load(&layout, "v").expect("read").expect("there");
    for _ in 0..2 {
        save(&layout, "v", &config).expect("saved");
    }
    let kept = fs::read_to_string(layout.old_config("v", 1)).expect("kept");
    assert_eq!(kept, V1);
    let found = load(&layout, "v").expect("read").expect("there");
    assert_eq!(found.upgraded_from, None);
    remove(&layout, "v").expect("removed, all of it");
    assert!(!layout.volume("v").exists());
}

#[test]
fn save_replaces_and_load_reads_back() {
    let root = tempfile::tempdir().expect("a directory");
    let layout = Layout::below(root.path());
    assert!(load(&layout, "v").expect("nothing there").is_none());
    let mut config = sample();
    save(&layout, "v", &config).expect("saved");
    config.cachesize = None;
    save(&layout, "v", &config).expect("replaced");
    assert_eq!(load(&layout, "v").expect("read"), Some(config));
    assert_eq!(list(&layout).expect("listed"), ["v"]);
    assert!(!layout.volume("v").join("volume.yaml.new").exists());
    remove(&layout, "v").expect("removed");
    remove(&layout, "v").expect("again");
    assert!(list(&layout).expect("listed").is_empty());
}

fn complaint(text: &str) -> String {
    parse(Path::new("/v/volume.yaml"), text)
        .expect_err("refused")
        .to_string()
}

#[test]
fn errors_name_file_line_and_field() {
    let unknown = GOLDEN.replace("cachesize: 64m", "cachesise: 64m");
    let text = complaint(&unknown);
    assert!(text.starts_with("/v/volume.yaml: "), "{text}");
    assert!(
        text.contains("unknown field `cachesise`") && text.contains("line 10"),
        "{text}"
    );

    let later = "version: 7\nnew_in_7: true\n";
    let expected = "/v/volume.yaml: line 1: version: found 7: it was written by a later zumastor; this one \
                    reads versions up to 2";
    assert_eq!(complaint(later), expected);
    assert!(complaint("version: 0\n").contains("there never was such a version"));

    // What is wrong, what to put in its place, and what is said of it.
    for (from, to, expected) in [
        ("next: 2", "next: 3", "next: found 3, must be even"),
        ("next: 2", "next: 0", "next: found 0, but snapshot 0 exists"),
        (
            "/dev/sysvg/test_snap",
            "sysvg/test_snap",
            "snapstore: 'sysvg/test_snap' must start with '/'",
        ),
        (
            "2026.01.02-03.04.05",
            "../../etc",
            "time: '../../etc' is not",
        ),
        ("kind: quarter", "kind: a/b", "kind: 'a/b' is no name"),
        ("kind: quarter", "kind: hourly", "'hourly' is there twice"),
        ("keep: 4", "keep: 0", "keep: found 0"),
        ("every: 900", "every: 0", "every: found 0"),
        ("epoch: 1", "epoch: 0", "epoch: found 0"),
        (
            "22:00-06:00",
            "22:00-26:00",
            "'22:00-26:00' is not a time of day",
        ),
        ("- manual", "- ../x", "'../x' is no name"),
    ] {
        let text = complaint(&GOLDEN.replace(from, to));
        assert!(text.contains(expected), "{to}: {text}");
    }
    let both = REPLICA.replace("source:\n", "master: {}\nsource:\n");
    assert!(complaint(&both).contains("either a master or a replica"));
    let twin = REPLICA.replace("twin: 1", "twin: 3");
    assert!(complaint(&twin).contains("snapshot 3 exists"));
    assert!(complaint("version: 1\n").contains("missing field `uuid`"));
}

#[test]
fn windows_may_go_over_midnight() {
    let night: Window = "22:00-06:00".parse().expect("a window");
    let day: Window = "06:00-22:00".parse().expect("a window");
    for (minute, is_night) in [
        (0, true),
        (359, true),
        (360, false),
        (1319, false),
        (1320, true),
    ] {
        assert_eq!(night.contains(minute), is_night, "{minute}");
        assert_eq!(day.contains(minute), !is_night, "{minute}");
    }
    for bad in ["", "1-2", "06:00", "06:00-06:00", "24:00-01:00", "x:y-z:w"] {
        assert!(bad.parse::<Window>().is_err(), "{bad}");
    }
}
