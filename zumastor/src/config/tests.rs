// SPDX-License-Identifier: GPL-2.0-only
//! The document: its form, its replacement, its errors.

use super::*;

fn sample() -> VolumeConfig {
    let snapshot = Snapshot {
        id: 0,
        kind: MANUAL.into(),
        time: "2026.01.02-03.04.05".into(),
    };
    VolumeConfig {
        version: 1,
        uuid: uuid::Uuid::from_u128(0x1234_5678),
        device: Devices {
            origin: "/dev/sysvg/test".into(),
            snapstore: "/dev/sysvg/test_snap".into(),
            meta: None,
        },
        cachesize: Some("64m".into()),
        filesystem: Filesystem {
            mountopts: Some("noatime".into()),
            ..Filesystem::default()
        },
        master: Some(Master {
            next: 2,
            pending: None,
            pending_after: 0,
            deleting: Vec::new(),
            snapshots: vec![snapshot],
        }),
    }
}

/// The document as version 1 writes it: change this only together with the version.
const GOLDEN: &str = "\
version: 1
uuid: 00000000-0000-0000-0000-000012345678
device:
  origin: /dev/sysvg/test
  snapstore: /dev/sysvg/test_snap
cachesize: 64m
filesystem:
  mountopts: noatime
  mountsnap: true
  export: false
  dotsnapshot: false
  samba: false
master:
  next: 2
  snapshots:
  - id: 0
    kind: manual
    time: 2026.01.02-03.04.05
";

#[test]
fn the_document_is_pinned() {
    assert_eq!(serde_yaml::to_string(&sample()).expect("written"), GOLDEN);
    assert_eq!(parse(Path::new("/x"), GOLDEN).expect("read"), sample());
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
        text.contains("unknown field `cachesise`") && text.contains("line 6"),
        "{text}"
    );

    let version = GOLDEN.replace("version: 1", "version: 7");
    let expected = "/v/volume.yaml: line 1: version: found 7, but this zumastor reads version \
                    1 only";
    assert_eq!(complaint(&version), expected);

    let odd = GOLDEN.replace("next: 2", "next: 3");
    assert_eq!(
        complaint(&odd),
        "/v/volume.yaml: line 14: next: found 3, must be even"
    );

    let used = GOLDEN.replace("next: 2", "next: 0");
    let expected = "/v/volume.yaml: line 14: next: found 0, but snapshot 0 exists";
    assert_eq!(complaint(&used), expected);

    let relative = GOLDEN.replace("/dev/sysvg/test_snap", "sysvg/test_snap");
    let expected = "/v/volume.yaml: line 5: snapstore: 'sysvg/test_snap' must start with '/'";
    assert_eq!(complaint(&relative), expected);

    let outside = GOLDEN.replace("2026.01.02-03.04.05", "../../etc");
    assert!(
        complaint(&outside).contains("line 18: time: "),
        "{}",
        complaint(&outside)
    );

    assert!(complaint("version: 1\n").contains("missing field `uuid`"));
}
