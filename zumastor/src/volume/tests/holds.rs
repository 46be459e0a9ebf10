// SPDX-License-Identifier: GPL-2.0-only
//! Whatever a volume holds, and whoever has it open.

use super::*;

fn master_of(bench: &Bench, contents: Contents) -> (Volume, Vec<Note>) {
    let mut volume = bench.try_define(&Bench::request()).expect("defined");
    bench.fake.state().contents = Some(contents);
    let mut lines = Vec::new();
    let flags = MasterFlags::default();
    let made = volume.define_master(flags, &mut |note| lines.push(note));
    made.expect("a master");
    (volume, lines)
}

/// Swap, LUKS, a database's raw volume: "failed" for ever, and each snapshot exited with 1.
#[test]
fn a_volume_without_a_file_system_is_a_volume() {
    for (contents, holds) in [
        (known(Usage::Other, "swap", None), "swap space"),
        (
            known(Usage::Other, "crypto_LUKS", None),
            "an encrypted volume (LUKS)",
        ),
        (
            known(Usage::Partitions, "gpt", None),
            "a partition table (gpt)",
        ),
        (Contents::Unknown, "data of a kind that is not known"),
    ] {
        let bench = Bench::new();
        let (mut volume, lines) = master_of(&bench, contents);
        let note =
            format!("/dev/mapper/v holds {holds}, nothing to mount; snapshots are of the device");
        assert_eq!(lines, [Note::Line(note.clone())]);
        let mut lines = Vec::new();
        let taken = volume.snapshot(None, &mut |note| lines.push(note));
        assert_eq!(taken.expect("a snapshot"), Some(0));
        assert_eq!(lines, [Note::Line("snapshot 0: /dev/mapper/v(0)".into())]);
        assert_eq!(bench.devices(), ["v", "v(0)"]);
        assert!(bench.mounted().is_empty());
        assert_eq!(
            (volume.failure.as_deref(), &volume.warnings),
            (None, &vec![])
        );
        assert_eq!(volume.notes, [note]);
        assert!(volume.waits(), "it may get a file system");
        volume
            .start(Level::Mounted, &mut |_| ())
            .expect("all is up");
    }
}

/// The live journal of the origin was opened for a snapshot, or the answer was "already mounted".
#[test]
fn a_snapshot_with_a_journal_elsewhere_leaves_that_alone() {
    let bench = Bench::new();
    let journal = |in_use| {
        let elsewhere = Some(Elsewhere::ExtJournal { in_use });
        known(Usage::Filesystem, "ext4", elsewhere)
    };
    let (mut volume, _) = master_of(&bench, journal(false));
    take(&mut volume);
    let mounted = "mount v(0) ro,noload,errors=continue".to_string();
    assert!(bench.fake.state().log.contains(&mounted));
    bench.fake.state().contents = Some(journal(true));
    let error = volume.snapshot(None, &mut |_| ()).expect_err("not mounted");
    let text = error.to_string();
    assert!(
        text.starts_with("snapshot 2 exists, but ") && text.contains("journal"),
        "{text}"
    );
    assert_eq!(bench.mounted(), ["v", "v(0)"]);
}

/// ext3 with `--mountopts nouuid`: each snapshot exited with 1, and the link to the mount was missing.
#[test]
fn options_that_a_file_system_does_not_know_are_left_out() {
    for old_mount in [false, true] {
        let bench = Bench::new();
        let request = DefineVolume {
            mountopts: Some("noatime,nouuid,acl,odd".into()),
            ..Bench::request()
        };
        let mut volume = bench.try_define(&request).expect("defined");
        bench.fake.state().contents = Some(filesystem("ext3"));
        bench.fake.state().unknown_options.insert("odd".into());
        bench.fake.state().old_mount = old_mount;
        let mut lines = Vec::new();
        let flags = MasterFlags::default();
        let made = volume.define_master(flags, &mut |note| lines.push(note));
        made.expect("a master");
        let warning =
            "/dev/mapper/v is mounted without the options nouuid,odd, which ext3 does not know";
        assert_eq!(volume.warnings, [warning]);
        assert_eq!(lines, [Note::Warning(warning.into())]);
        let log = bench.fake.state().log.clone();
        let last = log
            .iter()
            .rfind(|l| l.starts_with("mount"))
            .expect("mounted");
        assert_eq!(last, "mount v noatime,acl");
        take(&mut volume);
        assert_eq!(bench.mounted(), ["v", "v(0)"]);
        assert!(bench.layout.mount_link("v").is_symlink());
    }
}

/// Half of the volume was taken down before the mount of somebody else was found.
#[test]
fn a_stop_is_refused_as_a_whole_and_the_holder_named() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    let dev = bench.fake.state().dm["v"].0;
    bench
        .fake
        .state()
        .users
        .insert(dev, vec!["swap (/dev/dm-0)".into()]);
    bench.fake.state().log.clear();
    let error = volume.down(Level::Down, &mut |_| ()).expect_err("used");
    let text = "Device '/dev/mapper/v' still in use by swap (/dev/dm-0)";
    assert_eq!(error.to_string(), text);
    bench.fake.state().users.clear();
    let by_hand = crate::machine::Mount {
        dev,
        dir: "/srv".into(),
        source: "/dev/mapper/v".into(),
        fstype: "ext4".into(),
    };
    bench.fake.state().mounts.push(by_hand);
    let error = volume.down(Level::Down, &mut |_| ()).expect_err("used");
    let text = "Device '/dev/mapper/v' still in use by a mount on /srv";
    assert_eq!(error.to_string(), text);
    let log = bench.fake.state().log.clone();
    assert!(log.is_empty(), "{log:?}");
    assert_eq!(volume.level, Level::Mounted);
}

#[test]
fn what_a_refused_stop_took_down_comes_back() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    bench.fake.state().busy.insert(bench.layout.mountpoint("v"));
    let error = volume.down(Level::Down, &mut |_| ()).expect_err("busy");
    assert!(error.to_string().contains("bash[4711]"), "{error}");
    let mut mounted = bench.mounted();
    mounted.sort();
    assert_eq!(mounted, ["v", "v(0)"]);
    assert!(bench.layout.mount_link("v").is_symlink());
    assert_eq!((volume.level, volume.failure), (Level::Mounted, None));
}

/// A blkid in a loop made one `forget` in ten fail, and a mount at boot was not tried again.
#[test]
fn who_only_looks_for_a_moment_is_waited_for() {
    let bench = Bench::new();
    let options = "mount v(0) ro,errors=continue";
    for call in [
        "dm remove v",
        "dm remove v(0)",
        "unmount v",
        "mount v",
        options,
    ] {
        bench.fake.state().briefly_busy.insert(call.into(), 5);
    }
    let mut volume = bench.master();
    take(&mut volume);
    assert_eq!(bench.mounted(), ["v", "v(0)"]);
    volume.down(Level::Down, &mut |_| ()).expect("down");
    assert_eq!(bench.fake.state().pauses, 25);
    assert!(bench.devices().is_empty());
}

/// A full disk: the snapshot was gone, and listed with a link to nowhere.
#[test]
fn a_document_that_cannot_be_written_keeps_the_snapshot_it_lists() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    let in_the_way = bench.layout.volume("v").join("volume.yaml.new");
    fs::create_dir(&in_the_way).expect("made");
    let error = volume.forget_snapshot(0, &mut |_| ()).expect_err("no room");
    let text = format!("{error:#}");
    assert!(
        text.starts_with("snapshot 0 is not deleted: could not write"),
        "{text}"
    );
    assert!(bench.fake.state().snapshots.contains_key(&0));
    assert_eq!(bench.mounted(), ["v", "v(0)"]);
    assert!(volume.snapshot(None, &mut |_| ()).is_err());
    assert_eq!(bench.fake.state().snapshots.len(), 1, "none was made");
    // What needs no new document goes on: a volume comes up on a full disk, too.
    bench.fake.state().snapshots.clear();
    volume.start(Level::Mounted, &mut |_| ()).expect("up");
    assert!(volume.snapshots().is_empty());
    let told = |start: &str| volume.warnings.iter().any(|w| w.starts_with(start));
    assert!(
        told("the snapshot store no longer has snapshot 0") && told("could not write"),
        "{:?}",
        volume.warnings
    );
    fs::remove_dir(in_the_way).expect("removed");
    assert_eq!(take(&mut volume), 2);
}

#[test]
fn forgotten_data_that_cannot_be_deleted_now_is_deleted_later() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    bench.fake.state().fail = Some("delete 0".to_string());
    let mut lines = Vec::new();
    let done = volume.forget_snapshot(0, &mut |note| lines.push(note));
    done.expect("it is not listed any more");
    let Some(Note::Warning(line)) = lines.last() else {
        panic!("nothing was said");
    };
    assert!(
        line.starts_with("snapshot 0 is no longer listed, but"),
        "{line}"
    );
    bench.fake.state().fail = None;
    let mut volume = bench.reload();
    volume.start(Level::Mounted, &mut |_| ()).expect("up");
    assert!(bench.fake.state().snapshots.is_empty());
    assert!(volume.config.snapshots.deleting.is_empty());
}

/// After a restart: "the kernel refused the table", of the first one alone.
#[test]
fn each_squashed_snapshot_is_told_with_its_reason() {
    let bench = Bench::new();
    let mut volume = bench.master();
    for _ in 0..3 {
        take(&mut volume);
    }
    bench.fake.reboot();
    bench.fake.state().squashed.extend([0, 4]);
    let mut volume = bench.reload();
    let report = volume.up(Level::Mounted, &mut |_| ()).expect("up");
    assert!(report.is_clean());
    assert_eq!(
        volume.warnings,
        [squashed_line("v", 0), squashed_line("v", 4)]
    );
    assert_eq!(bench.mounted(), ["v", "v(2)"]);
    assert_eq!(volume.failure, None);
    volume.forget_snapshot(0, &mut |_| ()).expect("forgotten");
    assert_eq!(volume.warnings, [squashed_line("v", 4)]);
}

/// The origin was mounted by its UUID, or a device stood on it: "cannot lock", or nothing at all, and both wrote
/// to one disk.
#[test]
fn a_start_beside_somebody_else_is_refused_before_anything_runs() {
    let bench = Bench::new();
    let mut volume = bench.master();
    for (what, path) in [
        ("origin", "/dev/sysvg/test"),
        ("snapshot store", "/dev/sysvg/test_snap"),
    ] {
        volume.down(Level::Down, &mut |_| ()).expect("down");
        bench.fake.state().held.insert(path.into());
        bench.fake.state().log.clear();
        let error = volume.start(Level::Mounted, &mut |_| ());
        let text = format!("{:#}", error.expect_err("it is used"));
        assert!(
            text.contains(&format!("the {what} of volume 'v' is used without it"))
                && text.contains("a mount on /srv"),
            "{text}"
        );
        let log = bench.fake.state().log.clone();
        assert!(!log.iter().any(|l| l.starts_with("start ")), "{log:?}");
        bench.fake.state().held.clear();
        volume.start(Level::Mounted, &mut |_| ()).expect("up");
    }
    // What is up holds its devices itself.
    bench.fake.state().held.insert("/dev/sysvg/test".into());
    volume.start(Level::Mounted, &mut |_| ()).expect("up");
}

/// Multipath or fsck still had a disk when the volume was started at boot: it stayed down, although they let go a second later.
#[test]
fn whoever_has_a_device_is_waited_for() {
    let bench = Bench::new();
    bench.master();
    bench.fake.reboot();
    bench.fake.state().held.insert("/dev/sysvg/test".into());
    let mut volume = bench.reload();
    volume
        .start(Level::Mounted, &mut |_| ())
        .expect_err("it is used");
    let reason = volume.failure.clone().expect("said in status");
    assert!(reason.contains("comes up within 30 s"), "{reason}");
    for occasion in [Occasion::Device, Occasion::Time] {
        assert!(volume.waits() && !volume.worth_retrying(occasion));
    }
    bench.fake.state().held.clear();
    assert!(volume.worth_retrying(Occasion::Time));
    assert!(volume.worth_retrying(Occasion::Device));
    volume.up(volume.level, &mut |_| ()).expect("up");
    assert!(!volume.waits() && volume.failure.is_none());
    // An administrator's stop ends it.
    volume.down(Level::Down, &mut |_| ()).expect("down");
    bench.fake.state().held.insert("/dev/sysvg/test".into());
    volume
        .start(Level::Mounted, &mut |_| ())
        .expect_err("it is used");
    volume.down(Level::Down, &mut |_| ()).expect("down");
    assert!(!volume.waits());
}

#[test]
fn an_origin_is_accepted_for_one_start_of_the_server() {
    let bench = Bench::new();
    let mut volume = bench.master();
    let started = |bench: &Bench| -> Vec<String> {
        let log = std::mem::take(&mut bench.fake.state().log);
        log.into_iter()
            .filter(|l| l.starts_with("start "))
            .collect()
    };
    volume.down(Level::Down, &mut |_| ()).expect("down");
    started(&bench);
    volume
        .accepting(true, |v| v.start(Level::Mounted, &mut |_| ()))
        .expect("up");
    assert_eq!(
        started(&bench),
        ["start agent", "start server --accept-origin"]
    );
    volume.down(Level::Down, &mut |_| ()).expect("down");
    volume.start(Level::Mounted, &mut |_| ()).expect("up");
    assert_eq!(started(&bench), ["start agent", "start server"]);
}
