// SPDX-License-Identifier: GPL-2.0-only
//! What brings volumes up early in the boot, when only the root file system is there.
//!
//! A volume may hold /var, and with it the volume's own document. Therefore what the agent, the server
//! and the origin's device need is also in a small *boot record*, `/etc/zumastor/boot/VOL.yaml`: the
//! document without master and mounts. It changes only when the volume's devices do, so no snapshot
//! writes to /etc.
//!
//! The udev rule asks [`member`] whose device a device is. A volume's devices start
//! `zumastor-volume@VOL.service`, which runs [`activate`]; and the raw origin loses the names that are
//! made from its contents, for `/dev/mapper/VOL` has the same contents and must be the one that is
//! found by UUID or label. The daemon comes later and adopts what runs.

use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ddsnap::stdio::complain;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::boot_record;
use crate::config::{self, Devices, VolumeConfig};
use crate::host::{Host, filled_device};
use crate::layout::Layout;
use crate::machine::Busy;
use crate::plan::Level;
use crate::uevents;
use crate::volume::Volume;

/// How long [`activate`] waits for the other devices of a volume: as long as systemd for one in fstab.
const DEVICES_DEADLINE: Duration = Duration::from_secs(90);
/// How often it is looked meanwhile whether somebody has let go of one, which need not cause an event.
const LOOK_EVERY: Duration = Duration::from_secs(2);
/// Parts of links that say what is on a device. The others say which device it is.
const BY_CONTENTS: [&str; 5] = [
    "/by-uuid/",
    "/by-label/",
    "/by-partuuid/",
    "/by-partlabel/",
    "/by-id/lvm-pv-uuid-",
];
/// Longest value that udev takes for links, in bytes, with room for the terminating zero.
const LINKS_MAX_BYTES: usize = 1000;

/// The instance of `zumastor-volume@.service` for a volume: its name, or its UUID where systemd does not
/// take the name as it is.
fn instance(volume: &str, config: &VolumeConfig) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b":_.-".contains(&b);
    if volume.bytes().all(plain) {
        volume.to_string()
    } else {
        config.uuid.simple().to_string()
    }
}

/// What the udev rule imports for a block device with these names: `KEY=value` lines, none for a device
/// of no volume. `own` begins with the node's name; `whole` has the names of the disk if the device is a
/// partition.
///
/// - `DDSNAP_UNIT`: the unit that brings the volume up.
/// - `DDSNAP_ROLE`: `origin`, for the raw origin and for what the kernel finds inside it; or `store`.
/// - `DDSNAP_LINKS`, `DDSNAP_LINKS2`, ...: all links but those by contents, below /dev.
#[must_use]
pub fn member(layout: &Layout, own: &[String], whole: &[String]) -> Vec<String> {
    let named = |path: &Path, names: &[String]| names.iter().any(|n| Path::new(n) == path);
    for (volume, config) in boot_record::records(layout) {
        let Devices {
            origin,
            snapstore,
            meta,
        } = &config.device;
        let store = [Some(snapstore), meta.as_ref()];
        let role = if named(origin, own) || named(origin, whole) {
            "origin"
        } else if store.into_iter().flatten().any(|p| named(p, own)) {
            "store"
        } else {
            continue;
        };
        let mut lines = vec![format!("DDSNAP_ROLE={role}")];
        if !named(origin, whole) {
            let instance = instance(&volume, &config);
            lines.push(format!("DDSNAP_UNIT=zumastor-volume@{instance}.service"));
        }
        if role == "origin" {
            // The first name is the kernel's, a node and no link.
            lines.extend(link_lines(own.get(1..).unwrap_or_default()));
        }
        return lines;
    }
    Vec::new()
}

/// The lines with the links among `names`, but for those by contents.
#[must_use]
pub fn link_lines(names: &[String]) -> Vec<String> {
    let mut groups = vec![String::new()];
    let links = names
        .iter()
        .filter(|n| !BY_CONTENTS.iter().any(|part| n.contains(part)))
        .filter_map(|n| n.strip_prefix("/dev/"));
    for link in links {
        if groups
            .last()
            .is_some_and(|g| g.len() + link.len() + 1 > LINKS_MAX_BYTES)
        {
            groups.push(String::new());
        }
        if let Some(group) = groups.last_mut() {
            if !group.is_empty() {
                group.push(' ');
            }
            group.push_str(link);
        }
    }
    let key = |index: usize| match index {
        0 => "DDSNAP_LINKS".to_string(),
        n => format!("DDSNAP_LINKS{}", n + 1),
    };
    let line = |(index, group): (usize, String)| format!("{}={group}", key(index));
    groups.into_iter().enumerate().map(line).collect()
}

/// Held while a volume is brought up for the first time since boot: by [`activate`] or by the daemon.
///
/// # Errors
/// The lock's file cannot be made.
pub fn first_start(layout: &Layout, volume: &str) -> Result<Flock<fs::File>> {
    let path = layout.first_start(volume);
    path.parent().map_or(Ok(()), config::make_private_dir)?;
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("could not open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, e)| anyhow::anyhow!("could not lock {}: {e}", path.display()))
}

/// Brings up agent, server and origin of the volume whose unit has this `instance`, as soon as all its
/// devices are there and nobody else has them. Once the daemon has been up since boot, that is the daemon's business: then this
/// does nothing.
///
/// # Errors
/// A device did not appear in 90 s, or was not let go of, or the volume could not be brought up.
pub fn activate(host: Arc<dyn Host>, layout: &Layout, instance: &str) -> Result<()> {
    let known = boot_record::records(layout);
    let found = known
        .into_iter()
        .find(|(volume, config)| self::instance(volume, config) == instance);
    let Some((name, config)) = found else {
        bail!(
            "there is no volume '{instance}' in {}",
            layout.boot_records().display()
        );
    };
    // Before the first look: what appears after it is announced.
    let events = uevents::subscribe()?;
    let mounts = fs::File::open("/proc/self/mountinfo").context("could not watch the mounts")?;
    let end = Instant::now() + DEVICES_DEADLINE;
    let mut volume = Volume::new(host.clone(), layout, &name, config)?;
    loop {
        if daemon_was_up(layout) {
            return Ok(());
        }
        let missing = match prepare(host.as_ref(), layout, &name, &volume.config) {
            Ok(()) => match volume.check_claims() {
                // Multipath, LVM or fsck may be at it still.
                Err(error) if error.is::<Busy>() => error,
                // What else there is to say, the start says.
                _ => break,
            },
            Err(error) => error,
        };
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(missing.context(format!("volume '{name}' is not up")));
        }
        let changed = PollFlags::POLLPRI;
        let mut polled = [
            PollFd::new(events.as_fd(), PollFlags::POLLIN),
            PollFd::new(mounts.as_fd(), changed),
        ];
        let timeout = left.min(LOOK_EVERY).as_millis().max(1);
        let timeout = PollTimeout::try_from(timeout).unwrap_or(PollTimeout::MAX);
        match poll(&mut polled, timeout) {
            Ok(_) | Err(Errno::EINTR) => uevents::drain(&events),
            Err(error) => return Err(error).context("could not wait for devices"),
        }
    }
    let _lock = first_start(layout, &name)?;
    if daemon_was_up(layout) {
        return Ok(());
    }
    volume.up(Level::Devices, &mut |_| ())?;
    complain(format_args!("{name}: is up"));
    Ok(())
}

/// The daemon makes its lock before anything else, and /run is empty after a boot.
fn daemon_was_up(layout: &Layout) -> bool {
    layout.daemon_lock().exists()
}

/// Whether all is there that a volume needs, but for what can be made.
fn prepare(host: &dyn Host, layout: &Layout, volume: &str, config: &VolumeConfig) -> Result<()> {
    let devices = &config.device;
    let all = [
        Some(&devices.origin),
        Some(&devices.snapstore),
        devices.meta.as_ref(),
    ];
    for path in all.into_iter().flatten() {
        filled_device(host, path)?;
    }
    // Where /var is a file system of its own that is not mounted yet, the root file system may have
    // nothing below it. What is made here is hidden later, and the logs are opened again then.
    let run = layout.run();
    if let Some(parent) = run.parent().filter(|p| !p.exists()) {
        let failed = || format!("could not create {}", parent.display());
        parent
            .parent()
            .map_or(Ok(()), fs::create_dir_all)
            .with_context(failed)?;
        symlink("/run", parent).with_context(failed)?;
    }
    fs::create_dir_all(&run).with_context(|| format!("could not create {}", run.display()))?;
    Ok(config::make_private_dir(&layout.logs(volume))?)
}

/// The names of the device that udev asks about, from the environment it gives to its helpers; and those
/// of its disk, from udev's database, if it is a partition.
#[must_use]
pub fn names_from_udev(
    layout: &Layout,
    variable: impl Fn(&str) -> Option<String>,
) -> (Vec<String>, Vec<String>) {
    let own = variable("DEVNAME").into_iter();
    let links = variable("DEVLINKS").unwrap_or_default();
    let own = own
        .chain(links.split_ascii_whitespace().map(String::from))
        .collect();
    let partition = variable("DEVTYPE").is_some_and(|t| t == "partition");
    let disk = variable("DEVPATH").filter(|_| partition).and_then(|p| {
        Some(
            layout
                .at("/sys")
                .join(Path::new(&p).parent()?.strip_prefix("/").ok()?),
        )
    });
    (
        own,
        disk.map(|d| disk_names(layout, &d)).unwrap_or_default(),
    )
}

/// `/dev/NAME` and the links of the disk at `path` in sysfs.
fn disk_names(layout: &Layout, path: &Path) -> Vec<String> {
    let kernel_name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
    let mut names = vec![format!("/dev/{kernel_name}")];
    let number = fs::read_to_string(path.join("dev")).unwrap_or_default();
    let database = layout
        .at("/run/udev/data")
        .join(format!("b{}", number.trim_end()));
    let text = fs::read_to_string(database).unwrap_or_default();
    let links = text.lines().filter_map(|line| line.strip_prefix("S:"));
    names.extend(links.map(|link| format!("/dev/{link}")));
    names
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot_record::{forget, record};
    use crate::config::Filesystem;
    use crate::host::fake::Fake;

    fn config(origin: &str, store: &str) -> VolumeConfig {
        VolumeConfig {
            version: config::SCHEMA_VERSION,
            uuid: uuid::Uuid::from_u128(7),
            lineage: config::Lineage::first(uuid::Uuid::from_u128(7)),
            device: Devices {
                origin: origin.into(),
                snapstore: store.into(),
                meta: None,
            },
            store: None,
            cachesize: None,
            filesystem: Filesystem {
                mountpoint: Some("/srv".into()),
                ..Filesystem::default()
            },
            master: Some(config::Master::default()),
            source: None,
            targets: Default::default(),
            schedule: Vec::new(),
            snapshots: config::Snapshots::default(),
            upgraded_from: None,
        }
    }

    fn strings(words: &[&str]) -> Vec<String> {
        words.iter().map(ToString::to_string).collect()
    }

    /// With `UUID=` in fstab the raw disk was mounted at boot, its volume came up over it later, and the
    /// snapshots showed what was written meanwhile as if it were old.
    #[test]
    fn the_raw_origin_has_no_names_by_contents() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(dir.path());
        record(&layout, "v", &config("/dev/disk/by-id/x", "/dev/vdc")).expect("written");
        let own = strings(&[
            "/dev/vdb",
            "/dev/disk/by-uuid/1",
            "/dev/disk/by-id/x",
            "/dev/disk/by-label/l",
            "/dev/disk/by-path/p",
        ]);
        let expected = [
            "DDSNAP_ROLE=origin",
            "DDSNAP_UNIT=zumastor-volume@v.service",
            "DDSNAP_LINKS=disk/by-id/x disk/by-path/p",
        ];
        assert_eq!(member(&layout, &own, &[]), expected);
        let partition = strings(&["/dev/vdb1", "/dev/disk/by-uuid/2"]);
        let partition = member(&layout, &partition, &own);
        assert_eq!(partition, ["DDSNAP_ROLE=origin", "DDSNAP_LINKS="]);
        let store = member(&layout, &strings(&["/dev/vdc"]), &[]);
        assert_eq!(store, ["DDSNAP_ROLE=store", expected[1]]);
        assert!(member(&layout, &strings(&["/dev/vdd"]), &[]).is_empty());
    }

    #[test]
    fn a_record_has_only_what_the_boot_needs_and_goes() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(dir.path());
        forget(&layout, "v").expect("nothing there");
        record(&layout, "v+1", &config("/dev/a", "/dev/b")).expect("written");
        fs::write(layout.boot_record("broken"), "version: 99").expect("written");
        let found = boot_record::records(&layout);
        let [(name, config)] = &found[..] else {
            panic!("{found:?}")
        };
        assert_eq!(name, "v+1");
        assert_eq!(
            (&config.master, &config.filesystem),
            (&None, &Filesystem::default())
        );
        // systemd has no '+' in names of units.
        assert_eq!(instance(name, config), "00000000000000000000000000000007");
        forget(&layout, "v+1").expect("removed");
        assert!(boot_record::records(&layout).is_empty());
    }

    #[test]
    fn many_links_are_given_in_parts_that_udev_takes() {
        let names: Vec<String> = (0..40)
            .map(|n| format!("/dev/disk/by-id/{n:0>60}"))
            .collect();
        let lines = link_lines(&names);
        assert!(lines.iter().all(|l| l.len() < 1024), "{lines:?}");
        assert!(
            lines[1].starts_with("DDSNAP_LINKS2=disk/by-id/"),
            "{lines:?}"
        );
        let count: usize = lines.iter().map(|l| l.matches("by-id").count()).sum();
        assert_eq!(count, 40);
    }

    #[test]
    fn a_partition_knows_its_disk_by_all_names() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(dir.path());
        let disk = layout.at("/sys/devices/x/block/vdb");
        fs::create_dir_all(&disk).expect("made");
        fs::write(disk.join("dev"), "254:16\n").expect("written");
        fs::create_dir_all(layout.at("/run/udev/data")).expect("made");
        let database = "S:disk/by-id/x\nI:12\nE:ID_SERIAL=x\n";
        fs::write(layout.at("/run/udev/data/b254:16"), database).expect("written");
        let variable = |name: &str| {
            let value = match name {
                "DEVNAME" => "/dev/vdb1",
                "DEVLINKS" => "/dev/disk/by-uuid/1 /dev/disk/by-id/x-part1",
                "DEVTYPE" => "partition",
                "DEVPATH" => "/devices/x/block/vdb/vdb1",
                _ => return None,
            };
            Some(value.to_string())
        };
        let (own, whole) = names_from_udev(&layout, variable);
        let expected = [
            "/dev/vdb1",
            "/dev/disk/by-uuid/1",
            "/dev/disk/by-id/x-part1",
        ];
        assert_eq!(own, expected);
        assert_eq!(whole, ["/dev/vdb", "/dev/disk/by-id/x"]);
    }

    /// fsck had the disk for a second more: the volume's unit failed, and with it what fstab mounts from the volume.
    #[test]
    fn whoever_has_a_device_at_boot_is_waited_for() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(dir.path());
        record(&layout, "v", &config("/dev/a", "/dev/b")).expect("written");
        let fake = Arc::new(Fake::default());
        {
            let mut state = fake.state();
            for (minor, path) in [(1, "/dev/a"), (2, "/dev/b")] {
                let dev = crate::machine::Dev { major: 8, minor };
                state.devices.insert(path.into(), dev);
            }
            state.held.insert("/dev/a".into());
        }
        let (host, there) = (fake.clone(), layout.clone());
        let starting = std::thread::spawn(move || activate(host, &there, "v"));
        let end = Instant::now() + Duration::from_secs(60);
        // Its first look is over when it has looked for the device-mapper devices.
        while fake.state().lookups < 3 {
            assert!(Instant::now() < end, "not looked");
            std::thread::yield_now();
        }
        fake.state().held.clear();
        let result = starting.join().expect("no panic");
        result.expect("up");
        assert!(fake.state().dm.contains_key("v"));
    }

    #[test]
    fn after_the_daemon_nothing_is_activated() {
        let dir = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(dir.path());
        record(&layout, "v", &config("/dev/a", "/dev/b")).expect("written");
        fs::create_dir_all(layout.run()).expect("made");
        fs::write(layout.daemon_lock(), "").expect("written");
        let fake = Arc::new(Fake::default());
        activate(fake.clone(), &layout, "v").expect("nothing to do");
        assert!(activate(fake, &layout, "w").is_err(), "no such volume");
    }
}
