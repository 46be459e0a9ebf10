// SPDX-License-Identifier: GPL-2.0-only
//! What is checked before anything is written, and what becomes of snapshots a store has already.

use super::*;

fn untouched(bench: &Bench) {
    let log = bench.fake.state().log.clone();
    assert!(log.is_empty(), "{log:?}");
    bench.assert_clean("refused");
}

/// The store was formatted on the disk whose partition was the origin, and refused later.
#[test]
fn devices_that_share_blocks_are_refused() {
    let bench = Bench::new();
    let pair = |a: &str, b: &str| (a.into(), b.into());
    let both = pair("/dev/sysvg/test", "/dev/sysvg/test_snap");
    bench.fake.state().overlaps.insert(both);
    let text = bench.refusal(&Bench::request());
    let expected = "the snapshot store '/dev/sysvg/test_snap' shares blocks with the origin \
                    '/dev/sysvg/test': one lies on the other, or both on one file";
    assert_eq!(text, expected);
    untouched(&bench);
}

#[test]
fn a_partition_of_another_volumes_disk_is_refused() {
    let bench = Bench::new();
    let first = bench.try_define(&Bench::request()).expect("defined");
    let others = [("v".to_string(), first.config.clone())];
    for (minor, path) in [(5, "/dev/part"), (6, "/dev/other")] {
        let dev = Dev { major: 8, minor };
        bench.fake.state().devices.insert(path.into(), dev);
    }
    let both = ("/dev/part".into(), "/dev/sysvg/test".into());
    bench.fake.state().overlaps.insert(both);
    let request = DefineVolume {
        volume: "w".into(),
        origin: "/dev/other".into(),
        snapstore: "/dev/part".into(),
        ..Bench::request()
    };
    let host = bench.fake.clone();
    let made = Volume::define(host, &bench.layout, &request, &others, never(), &mut |_| ());
    let text = made.err().map(|e| e.to_string()).expect("refused");
    let expected = "the snapshot store '/dev/part' shares blocks with '/dev/sysvg/test', which belongs \
                    to volume 'v'";
    assert_eq!(text, expected);
}

/// A file system on the store's device was overwritten without a word.
#[test]
fn what_somebody_may_miss_is_not_overwritten_without_force() {
    for (device, words) in [
        (
            "/dev/sysvg/test",
            "the origin '/dev/sysvg/test' holds a file system (ext4); nothing was changed",
        ),
        (
            "/dev/sysvg/test_snap",
            "/dev/sysvg/test_snap holds a file system (ext4)",
        ),
    ] {
        let bench = Bench::new();
        let own = (device.into(), filesystem("ext4"));
        bench.fake.state().node_contents.extend([own]);
        let text = bench.refusal(&Bench::request());
        assert!(text.starts_with(words), "{text}");
        untouched(&bench);
        let forced = DefineVolume {
            force: true,
            ..Bench::request()
        };
        bench.try_define(&forced).expect("defined");
    }
}

/// Snapshots of an origin with small sectors did not mount from a store with large ones.
#[test]
fn a_store_with_larger_sectors_than_the_origin_is_refused() {
    let bench = Bench::new();
    let sizes = [("/dev/sysvg/test", 512), ("/dev/sysvg/test_snap", 4096)];
    let sizes = sizes.map(|(path, size)| (path.into(), size));
    bench.fake.state().sectors.extend(sizes);
    let text = bench.refusal(&Bench::request());
    assert!(text.contains("has sectors of 4096 bytes"), "{text}");
    untouched(&bench);
    bench
        .fake
        .state()
        .sectors
        .insert("/dev/sysvg/test".into(), 4096);
    bench.try_define(&Bench::request()).expect("defined");
}

/// The origin was zeroed and the store formatted before a limit was found to be broken.
#[test]
fn limits_are_checked_before_anything_is_written() {
    for (change, words) in [
        (("volume", "n".repeat(83)), "has more than 81 bytes"),
        (("volume", "control".into()), "device-mapper's own"),
        (
            ("chunk", "3000".into()),
            "a chunk size of 3000 is not a power of two",
        ),
        (
            ("chunk", "2m".into()),
            "a chunk size of 2m is not a power of two",
        ),
    ] {
        let bench = Bench::new();
        let mut request = Bench::request();
        match change {
            ("volume", name) => request.volume = name,
            (_, size) => request.chunksize = Some(size),
        }
        let text = bench.refusal(&request);
        assert!(text.contains(words), "{text}");
        untouched(&bench);
    }
}

#[test]
fn a_document_that_cannot_be_written_comes_before_the_first_write() {
    let bench = Bench::new();
    fs::write(bench.layout.volume("v"), "in the way").expect("written");
    let text = bench.refusal(&Bench::request());
    assert!(text.contains("volumes/v"), "{text}");
    assert!(bench.fake.state().log.is_empty());
}

/// "snapshot already exists", and the old snapshot of that number was deleted.
#[test]
fn a_store_with_snapshots_is_adopted() {
    let bench = Bench::new();
    bench.fake.state().contents = Some(filesystem("ext4"));
    bench.fake.state().snapshots.extend([(0, 4), (7, 9)]);
    let request = DefineVolume {
        initialize: false,
        zero: false,
        ..Bench::request()
    };
    let mut lines = Vec::new();
    let mut out = |note| lines.push(note);
    let host = bench.fake.clone();
    let made = Volume::define(host, &bench.layout, &request, &[], never(), &mut out);
    let mut volume = made.expect("defined");
    let told = Note::Line(
        "the snapshot store has snapshots 0 7: `zumastor define master v` lists and mounts them"
            .into(),
    );
    assert_eq!(lines.last(), Some(&told));
    let flags = MasterFlags::default();
    volume.define_master(flags, &mut |_| ()).expect("a master");
    assert_eq!(bench.mounted(), ["v", "v(0)", "v(7)"]);
    assert_eq!(take(&mut volume), 8);
    let listed: Vec<u32> = bench.reload().snapshots().iter().map(|s| s.id).collect();
    assert_eq!(listed, [0, 7, 8]);
    assert!(
        !bench
            .fake
            .state()
            .log
            .iter()
            .any(|l| l.starts_with("delete"))
    );
}

#[test]
fn numbers_that_somebody_else_has_used_are_passed_over_and_kept() {
    let bench = Bench::new();
    let mut volume = bench.master();
    bench.fake.state().snapshots.extend([(0, 1), (2, 2)]);
    assert_eq!(take(&mut volume), 4);
    assert_eq!(bench.fake.state().snapshots.len(), 3);
    // One that came after the look and before the creation is somebody else's as well.
    let stored = volume.settle_snapshots().expect("settled");
    volume
        .begin_snapshot(&[MANUAL.to_string()], &stored)
        .expect("begun");
    bench.fake.state().snapshots.insert(6, 1);
    volume.settle_snapshots().expect("settled");
    assert!(bench.fake.state().snapshots.contains_key(&6));
    assert!(
        !bench
            .fake
            .state()
            .log
            .iter()
            .any(|l| l.starts_with("delete"))
    );
}
