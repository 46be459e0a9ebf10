// SPDX-License-Identifier: GPL-2.0-only
//! Operations on a volume against the fake machine, with real files below a temporary root.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use ddsnap::probe::contents::{Elsewhere, Known, Usage};

use super::*;
use crate::config::MANUAL;
use crate::host::fake::Fake;
use crate::machine::Dev;
use crate::uevents::Occasion;

fn known(usage: Usage, kind: &str, elsewhere: Option<Elsewhere>) -> Contents {
    Contents::Known(Known {
        usage,
        kind: kind.into(),
        label: None,
        elsewhere,
    })
}

fn filesystem(kind: &str) -> Contents {
    known(Usage::Filesystem, kind, None)
}

struct Bench {
    root: tempfile::TempDir,
    layout: Layout,
    fake: Arc<Fake>,
}

impl Bench {
    fn new() -> Bench {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        fs::create_dir_all(layout.volumes()).expect("made");
        let fake = Arc::new(Fake::default());
        for (minor, path) in ["/dev/sysvg/test", "/dev/sysvg/test_snap"]
            .iter()
            .enumerate()
        {
            let dev = Dev {
                major: 8,
                minor: minor as u32,
            };
            fake.state().devices.insert(path.into(), dev);
        }
        fake.state().contents = Some(filesystem("ext4"));
        Bench { root, layout, fake }
    }

    fn request() -> DefineVolume {
        DefineVolume {
            volume: "v".into(),
            origin: "/dev/sysvg/test".into(),
            snapstore: "/dev/sysvg/test_snap".into(),
            initialize: true,
            zero: true,
            ..DefineVolume::default()
        }
    }

    fn try_define(&self, request: &DefineVolume) -> Result<Volume> {
        Volume::define(
            self.fake.clone(),
            &self.layout,
            request,
            &[],
            never(),
            &mut |_| (),
        )
    }

    fn refusal(&self, request: &DefineVolume) -> String {
        match self.try_define(request) {
            Ok(_) => panic!("was not refused"),
            Err(error) => format!("{error:#}"),
        }
    }

    /// A master, mounted.
    fn master(&self) -> Volume {
        let mut volume = self.try_define(&Bench::request()).expect("defined");
        volume
            .define_master(MasterFlags::default(), &mut |_| ())
            .expect("a master");
        assert_eq!(volume.failure, None);
        volume
    }

    fn reload(&self) -> Volume {
        load(self.fake.clone(), &self.layout, "v").expect("loaded")
    }

    fn mounted(&self) -> Vec<String> {
        let name =
            |m: &crate::machine::Mount| m.dir.file_name().expect("a name").to_string_lossy().into();
        self.fake.state().mounts.iter().map(name).collect()
    }

    fn devices(&self) -> Vec<String> {
        self.fake.state().dm.keys().cloned().collect()
    }

    /// Nothing of a volume is left, but its logs.
    fn assert_clean(&self, context: &str) {
        let state = self.fake.state();
        assert!(
            state.processes.is_empty(),
            "{context}: {:?}",
            state.processes
        );
        assert!(state.dm.is_empty(), "{context}: {:?}", state.dm);
        assert!(state.mounts.is_empty(), "{context}: {:?}", state.mounts);
        assert!(
            !self.layout.volume("v").exists(),
            "{context}: the database has it"
        );
        assert!(!self.layout.cron("v").exists(), "{context}: cron left");
        assert!(
            !self.layout.mount_link("v").is_symlink(),
            "{context}: link left"
        );
        assert!(
            !self.layout.snapshot_links("v").exists(),
            "{context}: links left"
        );
        assert!(
            !self.layout.mountpoint("v").exists(),
            "{context}: mount point left"
        );
    }
}

mod by_hand;
mod definition;
mod dry_run;
mod failover;
mod holds;
mod replica;
mod stores;
mod verbs;

/// Nothing is to end early.
fn never() -> Check {
    Arc::new(|| Ok(()))
}

fn take(volume: &mut Volume) -> u32 {
    let taken = volume.snapshot(None, &mut |_| ()).expect("a snapshot");
    taken.expect("a master takes it at once")
}

#[test]
fn define_prints_the_numbers_of_what_it_started() {
    let bench = Bench::new();
    let mut lines = Vec::new();
    let mut out = |event| {
        if let Note::Detail(line) = event {
            lines.push(line);
        }
    };
    let request = Bench::request();
    let made = Volume::define(
        bench.fake.clone(),
        &bench.layout,
        &request,
        &[],
        never(),
        &mut out,
    );
    made.expect("defined");
    assert_eq!(lines, ["pid = 1", "pid = 2"]);
    let expected = [
        "zero /dev/sysvg/test",
        "format /dev/sysvg/test_snap 16k",
        "start agent",
        "start server",
        "dm create v",
    ];
    assert_eq!(bench.fake.state().log, expected);
    let table = bench.fake.state().dm["v"].2.to_string();
    let agent = bench.layout.agent_socket("v");
    assert_eq!(
        table,
        format!("0 204800 ddsnap 8:1 8:0 {} -1", agent.display())
    );
}

#[test]
fn each_failing_step_of_define_leaves_nothing() {
    for step in [
        "zero /dev/sysvg/test",
        "format /dev/sysvg/test_snap 16k",
        "start agent",
        "start server",
        "dm create v",
    ] {
        let bench = Bench::new();
        bench.fake.state().fail = Some(step.to_string());
        assert_eq!(bench.refusal(&Bench::request()), format!("{step} failed"));
        bench.assert_clean(step);
        // And nothing stands in the way of trying again.
        bench.fake.state().fail = None;
        bench
            .try_define(&Bench::request())
            .expect("defined at last");
    }
}

#[test]
fn a_failing_undo_keeps_the_first_cause() {
    let bench = Bench::new();
    // A directory that is not ours keeps the volume's own from being removed.
    bench.fake.state().fail = Some("start server".to_string());
    fs::create_dir_all(bench.layout.volume("v").join("foreign/file")).expect("made");
    let text = bench.refusal(&Bench::request());
    let expected =
        "start server failed; then taking back the work failed (delete the volume's document: ";
    assert!(text.starts_with(expected), "{text}");
}

#[test]
fn without_the_target_nothing_is_touched() {
    let bench = Bench::new();
    bench.fake.state().no_dm_target = true;
    let text = bench.refusal(&Bench::request());
    assert!(
        text.contains("dm-ddsnap-dkms") && text.contains("(1.2.3)"),
        "{text}"
    );
    assert!(
        bench.fake.state().log.is_empty(),
        "not even the store is formatted"
    );
    bench.assert_clean("no target");
}

#[test]
fn define_names_what_is_wrong_with_devices() {
    let bench = Bench::new();
    let with = |change: &dyn Fn(&mut DefineVolume)| {
        let mut request = Bench::request();
        change(&mut request);
        bench.refusal(&request)
    };
    assert_eq!(
        with(&|r| r.origin = "/dev/none".into()),
        "the origin cannot be used: device '/dev/none' does not exist"
    );
    assert_eq!(
        with(&|r| r.snapstore = r.origin.clone()),
        "the snapshot store '/dev/sysvg/test' is the same device as the origin"
    );
    assert_eq!(
        with(&|r| r.origin = "sysvg/test".into()),
        "the origin 'sysvg/test' must start with '/'"
    );
    assert_eq!(
        with(&|r| r.volume = "a/b".into()),
        "the volume name 'a/b' must not contain '/'"
    );
    bench
        .fake
        .state()
        .held
        .insert("/dev/sysvg/test_snap".into());
    assert_eq!(
        with(&|_| ()),
        "Device '/dev/sysvg/test_snap' still in use by a mount on /srv"
    );
    assert!(bench.fake.state().log.is_empty());
}

#[test]
fn devices_of_another_volume_and_its_name_are_refused() {
    let bench = Bench::new();
    let volume = bench.try_define(&Bench::request()).expect("defined");
    let others = [("v".to_string(), volume.config.clone())];
    let mut request = Bench::request();
    let define = |request: &DefineVolume| {
        let made = Volume::define(
            bench.fake.clone(),
            &bench.layout,
            request,
            &others,
            never(),
            &mut |_| (),
        );
        made.err().map(|e| format!("{e:#}"))
    };
    assert_eq!(
        define(&request).as_deref(),
        Some("volume 'v' is defined already")
    );
    request.volume = "w".into();
    let expected = "the origin '/dev/sysvg/test' belongs to volume 'v'";
    assert_eq!(define(&request).as_deref(), Some(expected));
}

#[test]
fn snapshots_are_frozen_numbered_even_mounted_and_linked() {
    let bench = Bench::new();
    let mut volume = bench.master();
    assert_eq!((take(&mut volume), take(&mut volume)), (0, 2));
    assert_eq!(bench.mounted(), ["v", "v(0)", "v(2)"]);
    let state = bench.fake.state();
    assert!(state.frozen.is_empty(), "thawed");
    assert_eq!(state.taken_frozen.len(), 2);
    assert!(
        state
            .log
            .contains(&"mount v(2) ro,errors=continue".to_string())
    );
    drop(state);
    assert!(bench.layout.cron("v").exists());
    let links = bench.layout.snapshot_links("v");
    let target = |name: &str| fs::read_link(links.join(name)).expect("a link");
    assert_eq!(target("manual.0"), Path::new("2026.11.22-03.04.05.1"));
    assert_eq!(target("manual.1"), Path::new("2026.11.22-03.04.05"));
    assert_eq!(
        target("2026.11.22-03.04.05"),
        bench.layout.mountpoint("v(0)")
    );
    let link = fs::read_link(bench.layout.mount_link("v")).expect("a link");
    assert_eq!(link, bench.layout.mountpoint("v"));
}

#[test]
fn a_failed_snapshot_thaws_and_its_number_is_not_used_again() {
    let bench = Bench::new();
    let mut volume = bench.master();
    bench.fake.state().fail = Some("create 0".to_string());
    let error = volume.snapshot(None, &mut |_| ()).expect_err("it fails");
    assert_eq!(format!("{error:#}"), "create 0 failed");
    let log = bench.fake.state().log.clone();
    let tail = &log[log.len() - 4..];
    assert_eq!(tail, ["flush", "freeze", "create 0", "thaw"]);
    assert!(bench.fake.state().frozen.is_empty());
    assert_eq!(take(&mut volume), 2);
    assert_eq!(
        bench.reload().config,
        volume.config,
        "and all of it is on disk"
    );
}

#[test]
fn a_snapshot_cut_short_by_a_crash_is_deleted() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    // The daemon dies between creating snapshot 2 and recording it.
    let snapshots = &mut volume.config.snapshots;
    snapshots.next = 4;
    snapshots.pending = Some(Snapshot {
        id: 2,
        time: "t".into(),
        ..snapshots.list[0].clone()
    });
    snapshots.pending_after = 1;
    volume.save().expect("saved");
    bench.fake.state().snapshots.insert(2, 2);
    let dir = bench.layout.mountpoint("v");
    bench.fake.state().frozen.insert(dir);

    let mut volume = bench.reload();
    volume.thaw_leftovers().expect("thawed");
    volume.up(Level::Mounted, &mut |_| ()).expect("up");
    assert!(
        bench.fake.state().frozen.is_empty(),
        "the leftover freeze is gone"
    );
    assert!(!bench.fake.state().snapshots.contains_key(&2));
    assert_eq!(take(&mut volume), 4);
}

#[test]
fn after_a_reboot_everything_comes_back() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    take(&mut volume);
    let before = (bench.mounted(), bench.devices());
    bench.fake.reboot();
    fs::remove_dir_all(bench.layout.run()).expect("a tmpfs is empty after a reboot");
    let mut volume = bench.reload();
    let level = volume.full_level();
    assert!(volume.up(level, &mut |_| ()).expect("up").is_clean());
    assert_eq!((bench.mounted(), bench.devices()), before);
    assert!(
        bench
            .layout
            .snapshot_links("v")
            .join("manual.1")
            .is_symlink()
    );
}

#[test]
fn a_new_daemon_adopts_what_runs() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    drop(volume);
    bench.fake.state().log.clear();
    let mut volume = bench.reload();
    assert!(
        volume
            .up(Level::Mounted, &mut |_| ())
            .expect("up")
            .is_clean()
    );
    assert!(
        bench.fake.state().log.is_empty(),
        "{:?}",
        bench.fake.state().log
    );
}

#[test]
fn a_missing_device_is_waited_for() {
    let bench = Bench::new();
    bench.master();
    bench.fake.reboot();
    let dev = bench
        .fake
        .state()
        .devices
        .remove(Path::new("/dev/sysvg/test"))
        .expect("was there");
    let mut volume = bench.reload();
    let error = volume
        .up(Level::Mounted, &mut |_| ())
        .expect_err("no device");
    assert_eq!(
        format!("{error:#}"),
        "device '/dev/sysvg/test' does not exist"
    );
    assert!(
        !volume.worth_retrying(Occasion::Device),
        "nothing has changed"
    );
    bench
        .fake
        .state()
        .devices
        .insert("/dev/sysvg/test".into(), dev);
    assert!(volume.worth_retrying(Occasion::Device));
    volume.up(volume.level, &mut |_| ()).expect("up");
    assert!(!volume.worth_retrying(Occasion::Device) && volume.failure.is_none());
}

/// The store was on a loop device that had no file yet when the daemon started: its node was there, so the server was
/// started on it, failed, and nothing was tried again when it had its file.
#[test]
fn a_device_with_nothing_in_it_is_waited_for() {
    let bench = Bench::new();
    bench.master();
    bench.fake.reboot();
    let store = bench.fake.state().devices[Path::new("/dev/sysvg/test_snap")];
    bench.fake.state().empty.insert(store);
    let mut volume = bench.reload();
    let error = volume
        .up(Level::Mounted, &mut |_| ())
        .expect_err("nothing in it");
    assert_eq!(
        format!("{error:#}"),
        "device '/dev/sysvg/test_snap' is empty, its size is 0: nothing is connected to it"
    );
    assert!(volume.waits() && !volume.worth_retrying(Occasion::Device));
    bench.fake.state().empty.clear();
    assert!(volume.worth_retrying(Occasion::Device));
    volume.up(volume.level, &mut |_| ()).expect("up");
    assert!(!volume.waits() && volume.failure.is_none());
}

#[test]
fn define_master_succeeds_without_a_file_system_and_is_retried_when_there_is_one() {
    let bench = Bench::new();
    bench.fake.state().contents = None;
    let mut volume = bench.try_define(&Bench::request()).expect("defined");
    let mut lines = Vec::new();
    let flags = MasterFlags {
        export: true,
        ..MasterFlags::default()
    };
    let result = volume.define_master(flags, &mut |event| lines.push(event));
    result.expect("succeeds all the same");
    let expected = [
        Note::Warning("--export stored, but without effect in this version".into()),
        Note::Line(
            "/dev/mapper/v holds nothing but zeroes; once it has a file system it is mounted"
                .into(),
        ),
    ];
    assert_eq!(lines, expected);
    assert!(
        !volume.worth_retrying(Occasion::Device),
        "as long as nothing changes"
    );
    bench.fake.state().contents = Some(filesystem("xfs"));
    assert!(volume.worth_retrying(Occasion::Device));
    volume.up(volume.level, &mut |_| ()).expect("up");
    take(&mut volume);
    assert!(
        bench
            .fake
            .state()
            .log
            .contains(&"mount v(0) ro,nouuid".to_string())
    );
}

#[test]
fn forget_leaves_nothing() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    volume.forget(&mut |_| ()).expect("forgotten");
    bench.assert_clean("forgotten");
    assert!(!bench.layout.mountpoint("v(0)").exists());
    assert!(
        bench
            .root
            .path()
            .join("var/log/zumastor/v/master.log")
            .exists(),
        "logs stay"
    );
}

#[test]
fn forget_of_a_busy_volume_says_who_and_keeps_it_whole() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    take(&mut volume);
    let before = bench.devices();
    bench
        .fake
        .state()
        .busy
        .insert(bench.layout.mountpoint("v(0)"));
    let error = volume.forget(&mut |_| ()).expect_err("busy");
    assert_eq!(
        format!("{error:#}"),
        "Device '/dev/mapper/v(0)' still in use by bash[4711]"
    );
    assert_eq!(bench.devices(), before);
    let mut mounted = bench.mounted();
    mounted.sort();
    assert_eq!(mounted, ["v", "v(0)", "v(2)"]);
    assert!(bench.layout.config("v").exists());
    assert!(bench.layout.mount_link("v").is_symlink());
    assert_eq!(volume.failure, None);
}

#[test]
fn forget_snapshot_takes_one_and_keeps_the_others() {
    let bench = Bench::new();
    let mut volume = bench.master();
    assert_eq!((take(&mut volume), take(&mut volume)), (0, 2));
    volume.forget_snapshot(0, &mut |_| ()).expect("forgotten");
    assert_eq!(bench.mounted(), ["v", "v(2)"]);
    assert_eq!(bench.devices(), ["v", "v(2)"]);
    let refused = volume.forget_snapshot(0, &mut |_| ()).unwrap_err();
    assert_eq!(refused.to_string(), "volume 'v' has no snapshot 0");
    // Its number is not used again, now or after a restart.
    assert_eq!(take(&mut volume), 4);
    assert_eq!(bench.reload().snapshots().len(), 2);
}

#[test]
fn forget_of_a_busy_snapshot_keeps_it_whole() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    bench.fake.state().busy.insert(volume.mountpoint(Some(0)));
    volume.forget_snapshot(0, &mut |_| ()).unwrap_err();
    assert_eq!(bench.mounted(), ["v", "v(0)"]);
    assert_eq!(bench.reload().snapshots().len(), 1);
}

#[test]
fn stop_master_unmounts_and_keeps_devices_and_processes() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    volume.stop_master(&mut |_| ()).expect("stopped");
    assert!(bench.mounted().is_empty());
    assert_eq!(bench.devices(), ["v", "v(0)"]);
    assert_eq!(bench.fake.state().processes.len(), 2);
    assert!(
        volume.snapshot(None, &mut |_| ()).is_err(),
        "not while the master is stopped"
    );
    volume.start_master(&mut |_| ()).expect("started");
    assert_eq!(bench.mounted(), ["v", "v(0)"]);
    volume.down(Level::Down, &mut |_| ()).expect("stopped");
    assert!(bench.devices().is_empty() && bench.fake.state().processes.is_empty());
    assert!(bench.layout.config("v").exists());
}

#[test]
fn no_snapmount_keeps_devices_without_mounts_or_links() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    let flags = MasterFlags {
        no_snapmount: true,
        ..MasterFlags::default()
    };
    volume.define_master(flags, &mut |_| ()).expect("a master");
    take(&mut volume);
    assert_eq!(bench.mounted(), ["v"]);
    assert_eq!(bench.devices(), ["v", "v(0)", "v(2)"]);
    let left = fs::read_dir(bench.layout.snapshot_links("v"))
        .expect("a directory")
        .count();
    assert_eq!(left, 0);
}

#[test]
fn a_foreign_device_of_our_name_is_left_alone() {
    let bench = Bench::new();
    bench.master();
    bench.fake.reboot();
    let table = TableLine {
        sectors: 8,
        snapstore: Dev { major: 9, minor: 9 },
        origin: Dev { major: 9, minor: 8 },
        agent: "/elsewhere".into(),
        id: None,
    };
    let device = (
        Dev {
            major: 253,
            minor: 77,
        },
        "LVM-x".to_string(),
        table,
    );
    bench.fake.state().dm.insert("v".to_string(), device);
    let mut volume = bench.reload();
    let error = volume.up(Level::Mounted, &mut |_| ()).expect_err("refused");
    let expected = "the device-mapper device 'v' exists and belongs to somebody else";
    assert_eq!(format!("{error:#}"), expected);
    assert!(bench.devices().contains(&"v".to_string()));
}
