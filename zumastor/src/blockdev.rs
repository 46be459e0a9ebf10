// SPDX-License-Identifier: GPL-2.0-only
//! Block devices: numbers, lasting names, users, contents.
//!
//! Which path is stored for a device. The kernel hands out `/dev/dm-3`, `/dev/loop0` and `/dev/sdb`
//! in the order of discovery, so after a reboot they may name another disk, and a snapshot store
//! would be applied to the wrong data. Therefore [`stable_path`] keeps the name the administrator
//! gave where it lasts (`/dev/VG/LV`, `/dev/mapper/…`, `/dev/disk/by-*/…`), follows links that lie
//! outside /dev down to the first name inside it, and replaces a kernel name by the device-mapper
//! name or the hardware's name below `/dev/disk/by-id` where there is one. Names that describe
//! contents (by-uuid, by-label, lvm-pv-uuid) are never chosen: contents change.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use ddsnap::probe::stack::{self, Base};
use ddsnap::probe::store;
use ddsnap::stdio::complain;
use nix::errno::Errno;
use nix::libc;
use uuid::Uuid;

use crate::device_number::from_raw;
pub use crate::device_number::number;
use crate::machine::{Dev, Users};
use crate::{mount_table, process};

nix::ioctl_read!(
    /// BLKGETSIZE64: a block device's size in bytes.
    blkgetsize64,
    0x12,
    114,
    u64
);
nix::ioctl_write_ptr_bad!(
    /// BLKZEROOUT: zeroes a range, start and length in bytes.
    blkzeroout,
    0x127f,
    [u64; 2]
);

/// Longest wait for the first blocks of a snapshot store.
const STORE_DEADLINE: Duration = Duration::from_secs(15);
/// Zeroes written between two progress reports.
const ZERO_STEP_BYTES: u64 = 64 << 20;
/// Longest wait for udev.
const SETTLE_DEADLINE: Duration = Duration::from_secs(60);
/// Links followed before a path is called a loop.
const LINKS_MAX: usize = 16;

/// A path for the device at `path` that is still right after a reboot; see the module's comment.
pub fn stable_path(path: &Path) -> Result<PathBuf> {
    let dev = number(path)?;
    let inside = first_name_in_dev(path)?;
    if !is_kernel_name(&inside) {
        return Ok(inside);
    }
    if let Ok(name) = fs::read_to_string(format!("/sys/dev/block/{dev}/dm/name")) {
        let mapper = Path::new("/dev/mapper").join(name.trim_end());
        if number(&mapper).is_ok_and(|d| d == dev) {
            return Ok(mapper);
        }
    }
    Ok(hardware_name(dev).unwrap_or(inside))
}

/// Follows links until the path lies in /dev, or is no link.
fn first_name_in_dev(path: &Path) -> Result<PathBuf> {
    let mut current = normalise(path);
    for _ in 0..LINKS_MAX {
        if current.starts_with("/dev") {
            return Ok(current);
        }
        match fs::read_link(&current) {
            Ok(target) => {
                let parent = current.parent().unwrap_or(Path::new("/"));
                current = normalise(&parent.join(target));
            }
            // A directory on the way may be a link: let the system resolve the whole.
            Err(_) => return fs::canonicalize(&current).context("could not resolve the device"),
        }
    }
    bail!("'{}' leads through too many links", path.display())
}

/// `path` without `.` and `..`, by its text alone.
fn normalise(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            other => plain.push(other),
        }
    }
    plain
}

/// Whether `path` is the kernel's own name: directly in /dev and no link.
fn is_kernel_name(path: &Path) -> bool {
    path.parent() == Some(Path::new("/dev")) && !path.is_symlink()
}

/// A name below /dev/disk/by-id that comes from the hardware.
fn hardware_name(dev: Dev) -> Option<PathBuf> {
    let entries = fs::read_dir("/dev/disk/by-id").ok()?;
    let mut names: Vec<PathBuf> = entries
        .filter_map(|e| Some(e.ok()?.path()))
        .filter(|p| {
            let name = p.file_name().unwrap_or_default().to_string_lossy();
            !name.starts_with("lvm-pv-") && !name.starts_with("md-") && !name.starts_with("dm-")
        })
        .filter(|p| number(p).is_ok_and(|d| d == dev))
        .collect();
    names.sort();
    names.into_iter().next()
}

/// Claims the device for as long as the file is open; none if somebody else has.
///
/// Not for writing: the end of that would be an event of the device, and who waits for it to be free would look again at
/// once, for ever.
pub fn claim(path: &Path) -> Result<Option<File>> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(path);
    match opened {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.raw_os_error() == Some(libc::EBUSY) => Ok(None),
        Err(e) => Err(e).with_context(|| format!("could not open '{}'", path.display())),
    }
}

/// Fails, naming the user, if the device is mounted, written to or held by another part of the system.
pub fn check_unused(path: &Path) -> Result<()> {
    let dev = number(path)?;
    let claimed = claim(path)?.is_some();
    let busy = |users: Users| Err(users.busy(path.display().to_string()).into());
    match claimed {
        // What claims nothing uses the device too: a loop device, a program that writes to it.
        true => {
            let users = Users {
                lasting: holders(dev),
                processes: process::writers(|link| opens(link, dev)),
            };
            if users == Users::default() {
                Ok(())
            } else {
                busy(users)
            }
        }
        false => {
            let mut all = users(dev);
            all.lasting
                .extend(mounted(&stack::above(sysfs(), base(dev))));
            busy(all)
        }
    }
}

/// The UUID of the snapshot store at `path`; none if no store is recognised there. A disk that does not answer is not waited for
/// longer than [`STORE_DEADLINE`]: who asks keeps a server from being stopped meanwhile.
pub fn store_uuid(path: &Path) -> Result<Option<Uuid>> {
    let failed = || format!("could not read the snapshot store '{}'", path.display());
    let (sender, receiver) = mpsc::channel();
    let device = path.to_path_buf();
    thread::spawn(move || sender.send(store::uuid(&device)));
    match receiver.recv_timeout(STORE_DEADLINE) {
        Ok(found) => found.with_context(failed),
        Err(_) => Err(anyhow!("no answer in {} s", STORE_DEADLINE.as_secs())).with_context(failed),
    }
}

/// All devices that stand on `dev`, itself first.
#[must_use]
pub fn stacked_on(dev: Dev) -> Vec<Dev> {
    let above = stack::above(sysfs(), base(dev)).into_iter();
    let others = above.filter(|b| *b != base(dev)).filter_map(|b| match b {
        Base::Device(major, minor) => Some(Dev { major, minor }),
        Base::File(..) => None,
    });
    std::iter::once(dev).chain(others).collect()
}

/// Whether two devices share blocks.
#[must_use]
pub fn overlap(one: &Path, other: &Path) -> bool {
    match (Base::of(one), Base::of(other)) {
        (Some(one), Some(other)) => stack::overlap(sysfs(), one, other),
        _ => false,
    }
}

/// Logical sector size of the device in bytes.
#[must_use]
pub fn sector_bytes(path: &Path) -> Option<u32> {
    stack::sector_bytes(sysfs(), Base::of(path)?)
}

/// Whether the kernel says that the device's size is 0. Nothing is opened, so a device that hangs holds up nobody.
pub fn is_empty(dev: Dev) -> bool {
    is_empty_in(sysfs(), dev)
}

fn is_empty_in(sysfs: &Path, dev: Dev) -> bool {
    let size = sysfs.join(format!("dev/block/{dev}/size"));
    fs::read_to_string(size).is_ok_and(|sectors| sectors.trim_end() == "0")
}

fn sysfs() -> &'static Path {
    Path::new(stack::SYSFS)
}

fn base(dev: Dev) -> Base {
    Base::Device(dev.major, dev.minor)
}

fn opens(link: &Path, dev: Dev) -> bool {
    fs::metadata(link).is_ok_and(|m| m.file_type().is_block_device() && from_raw(m.rdev()) == dev)
}

/// Who uses a block device, but for mounts of the device itself: as [`holders`], and processes that
/// have it open.
#[must_use]
pub fn users(dev: Dev) -> Users {
    Users {
        lasting: holders(dev),
        processes: process::users(|link| opens(link, dev)),
    }
}

/// Who uses a block device lastingly, but for mounts of the device itself: swap, devices that stand on
/// it and what is mounted from those.
#[must_use]
pub fn holders(dev: Dev) -> Vec<String> {
    let above = stack::above(sysfs(), base(dev));
    let swaps = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let mut lasting = swaps_on(&swaps, &above);
    let standing: BTreeSet<Base> = above.into_iter().filter(|b| *b != base(dev)).collect();
    let names = standing.iter().filter(|b| in_use(**b));
    let names = names.filter_map(|b| stack::name(sysfs(), *b));
    lasting.extend(names.map(|name| format!("device {name}")));
    lasting.extend(mounted(&standing));
    lasting
}

/// A partition is there whether it is used or not; every other device that stands on one uses it.
fn in_use(base: Base) -> bool {
    let Base::Device(major, minor) = base else {
        return false;
    };
    !sysfs()
        .join(format!("dev/block/{major}:{minor}/partition"))
        .exists()
}

/// The mounts of these devices, described.
fn mounted(devices: &BTreeSet<Base>) -> Vec<String> {
    let table = mount_table::table().unwrap_or_default();
    let ours = table.iter().filter(|m| devices.contains(&base(m.dev)));
    ours.map(|m| format!("a mount on {}", m.dir.display()))
        .collect()
}

/// Swap in use on these devices, by the text of /proc/swaps.
fn swaps_on(text: &str, devices: &BTreeSet<Base>) -> Vec<String> {
    let paths = text
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().next());
    paths
        .filter(|path| Base::of(Path::new(path)).is_some_and(|base| devices.contains(&base)))
        .map(|path| format!("swap ({path})"))
        .collect()
}

/// Who uses a block device, mounts included.
#[must_use]
pub fn all_users(dev: Dev) -> Users {
    let mut users = users(dev);
    let own = mounted(&BTreeSet::from([base(dev)]));
    users.lasting.splice(0..0, own);
    users
}

/// Waits until udev's queue is empty, but not for ever.
pub fn settle() {
    let timeout = format!("--timeout={}", SETTLE_DEADLINE.as_secs() / 2);
    let argv = ["udevadm".into(), "settle".into(), timeout.into()];
    // Without udev, or when time is up: the volume is tried all the same.
    if let Err(error) = process::run(&argv, SETTLE_DEADLINE) {
        complain(format_args!("{error:#}"));
    }
}

/// Has udev look at the device at `path` again.
pub fn announce(path: &Path) {
    // Without sysfs or udev there is nobody to tell.
    if let Ok(dev) = number(path) {
        let _ = fs::write(format!("/sys/dev/block/{dev}/uevent"), "change");
    }
}

/// The size of an open block device in bytes.
fn size_bytes(file: &File, path: &Path) -> Result<u64> {
    let mut bytes = 0;
    // SAFETY: the ioctl writes one u64 to the pointer, which is valid for the call.
    unsafe { blkgetsize64(file.as_raw_fd(), &raw mut bytes) }
        .with_context(|| format!("could not read the size of '{}'", path.display()))?;
    Ok(bytes)
}

/// The size of the block device at `path` in bytes.
pub fn size_of(path: &Path) -> Result<u64> {
    let file = File::open(path).with_context(|| format!("could not open '{}'", path.display()))?;
    size_bytes(&file, path)
}

/// Overwrites the device with zeroes, reporting bytes done and bytes in all; ends with an error of `progress`.
pub fn zero(path: &Path, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<()> {
    let file = OpenOptions::new()
        .write(true)
        .custom_flags(libc::O_EXCL)
        .open(path)
        .with_context(|| format!("could not open '{}'", path.display()))?;
    let total = size_bytes(&file, path)?;
    let mut done = 0;
    while done < total {
        let range = [done, ZERO_STEP_BYTES.min(total - done)];
        // SAFETY: the ioctl reads two u64, start and length in bytes, from a valid pointer.
        match unsafe { blkzeroout(file.as_raw_fd(), &raw const range) } {
            Err(Errno::EINTR) => continue,
            result => result.with_context(|| format!("could not zero '{}'", path.display()))?,
        };
        done += range[1];
        progress(done, total)?;
    }
    file.sync_all()
        .with_context(|| format!("could not flush '{}'", path.display()))
}

/// Writes out what the page cache holds for a device node.
pub fn flush(node: &Path) -> Result<()> {
    File::open(node)
        .and_then(|f| f.sync_all())
        .with_context(|| format!("could not flush '{}'", node.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn messages_for_what_is_no_device() {
        let dir = tempfile::tempdir().expect("a directory");
        let missing = number(&dir.path().join("none")).expect_err("there is nothing");
        assert!(
            missing.to_string().ends_with("/none' does not exist"),
            "{missing}"
        );
        let file = dir.path().join("file");
        fs::write(&file, "x").expect("written");
        let wrong = number(&file).expect_err("a plain file");
        assert!(
            wrong.to_string().ends_with("/file' is not a block device"),
            "{wrong}"
        );
    }

    #[test]
    fn a_device_is_empty_when_the_kernel_says_so() {
        let sysfs = tempfile::tempdir().expect("a directory");
        let dev = Dev { major: 7, minor: 2 };
        assert!(!is_empty_in(sysfs.path(), dev), "nothing is known of it");
        let dir = sysfs.path().join("dev/block/7:2");
        fs::create_dir_all(&dir).expect("made");
        fs::write(dir.join("size"), "0\n").expect("written");
        assert!(is_empty_in(sysfs.path(), dev));
        fs::write(dir.join("size"), "2048\n").expect("written");
        assert!(!is_empty_in(sysfs.path(), dev));
    }

    #[test]
    fn links_outside_dev_are_followed_to_the_first_name_inside() {
        let dir = tempfile::tempdir().expect("a directory");
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        symlink("two", &one).expect("linked");
        symlink("/dev/sysvg/../sysvg/test", &two).expect("linked");
        assert_eq!(
            first_name_in_dev(&one).expect("found"),
            Path::new("/dev/sysvg/test")
        );
        let by_id = Path::new("/dev/disk/by-id/x");
        assert_eq!(first_name_in_dev(by_id).expect("found"), by_id);
        symlink("loop", dir.path().join("loop")).expect("linked");
        assert!(first_name_in_dev(&dir.path().join("loop")).is_err());
    }
}
