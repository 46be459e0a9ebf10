// SPDX-License-Identifier: GPL-2.0-only
//! Who uses a block device: asked before it is overwritten.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::libc;
use thiserror::Error;

use super::stack::{self, Base, SYSFS};

/// A block device that nobody else can mount, map or claim in another way before this is dropped. Of a plain file
/// nothing is claimed.
#[derive(Debug)]
pub struct Claim {
    _file: Option<File>,
}

/// Why a device cannot be claimed.
#[derive(Debug, Error)]
pub enum ClaimError {
    /// It is mounted, swap space, or a part of another device.
    #[error("{} is in use{}; nothing was changed (--force does not overwrite what is in use)", .path.display(), by(.users))]
    InUse {
        /// The device.
        path: PathBuf,
        /// Who uses it, as far as the kernel tells.
        users: Vec<String>,
    },
    /// It cannot be opened.
    #[error("cannot open {}", .path.display())]
    Open {
        /// The device.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

fn by(users: &[String]) -> String {
    match users {
        [] => String::new(),
        _ => format!(" by {}", users.join(", ")),
    }
}

/// Claims the device at `path`, which is not written by that.
///
/// # Errors
/// Somebody uses it, or it cannot be opened.
pub fn claim(path: &Path) -> Result<Claim, ClaimError> {
    let failed = |source| ClaimError::Open {
        path: path.to_path_buf(),
        source,
    };
    let kind = fs::metadata(path).map_err(failed)?.file_type();
    if !kind.is_block_device() {
        return Ok(Claim { _file: None });
    }
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(path);
    let read = |file| String::from_utf8_lossy(&fs::read(file).unwrap_or_default()).into_owned();
    let (mounts, swaps) = (read("/proc/self/mountinfo"), read("/proc/swaps"));
    let found = Base::of(path).map(|base| users(Path::new(SYSFS), base, &mounts, &swaps));
    let users = found.unwrap_or_default();
    match opened {
        // A loop device claims nothing of what it shows.
        Ok(file) if users.is_empty() => Ok(Claim { _file: Some(file) }),
        Err(error) if error.raw_os_error() != Some(libc::EBUSY) => Err(failed(error)),
        _ => Err(ClaimError::InUse {
            path: path.to_path_buf(),
            users,
        }),
    }
}

/// Mounts, swap space and devices that stand on `base`, by the texts of /proc/self/mountinfo and /proc/swaps.
fn users(sysfs: &Path, base: Base, mounts: &str, swaps: &str) -> Vec<String> {
    let above = stack::above(sysfs, base);
    let on = |path: &str| Base::of(Path::new(path)).is_some_and(|base| above.contains(&base));
    let mut found: Vec<String> = mounts
        .lines()
        .filter_map(|line| mount_on(line, &above))
        .map(|dir| format!("a mount on {dir}"))
        .collect();
    let swaps = swaps.lines().skip(1);
    found.extend(
        swaps
            .filter_map(|line| line.split_whitespace().next())
            .filter(|path| on(&unescaped(path)))
            .map(|path| format!("swap ({path})")),
    );
    // A partition is there whether it is used or not.
    let standing = above
        .iter()
        .filter(|&&other| other != base && !stack::is_partition(sysfs, other));
    found.extend(
        standing
            .filter_map(|&other| stack::name(sysfs, other))
            .map(|name| format!("device {name}")),
    );
    found.dedup();
    found
}

/// Where one of these devices is mounted, by a line of the mount table:
/// `36 35 98:0 /root /dir opts [fields] - type source options`.
fn mount_on(line: &str, devices: &BTreeSet<Base>) -> Option<String> {
    let mut words = line.split(' ');
    let (major, minor) = words.nth(2)?.split_once(':')?;
    let number = Base::Device(major.parse().ok()?, minor.parse().ok()?);
    let dir = unescaped(words.nth(1)?);
    words.find(|word| *word == "-")?;
    // btrfs numbers its mounts by itself: of it the source tells.
    let source = unescaped(words.nth(1)?);
    let source = Some(source).filter(|source| source.starts_with('/'));
    let is_on = devices.contains(&number)
        || source
            .and_then(|source| Base::of(Path::new(&source)))
            .is_some_and(|base| matches!(base, Base::Device(..)) && devices.contains(&base));
    is_on.then_some(dir)
}

/// Undoes the kernel's `\040` for blanks and the like.
fn unescaped(word: &str) -> String {
    let escapes = [("\\040", " "), ("\\011", "\t"), ("\\012", "\n")];
    let text = escapes
        .iter()
        .fold(word.to_owned(), |text, (from, to)| text.replace(from, to));
    text.replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A disk 8:0 with a partition 8:1, and on that the mapped device 253:0.
    fn sysfs() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        fs::create_dir_all(at("dev/block")).unwrap();
        fs::create_dir_all(at("block")).unwrap();
        for (dir, dev) in [("sda", "8:0"), ("sda/sda1", "8:1"), ("dm-0", "253:0")] {
            fs::create_dir_all(at(dir)).unwrap();
            fs::write(at(dir).join("dev"), format!("{dev}\n")).unwrap();
            symlink(at(dir), at("dev/block").join(dev)).unwrap();
        }
        fs::write(at("sda/sda1/partition"), "1\n").unwrap();
        fs::create_dir_all(at("sda/sda1/holders")).unwrap();
        symlink(at("dm-0"), at("sda/sda1/holders/dm-0")).unwrap();
        fs::create_dir_all(at("dm-0/dm")).unwrap();
        fs::write(at("dm-0/dm/name"), "lin\n").unwrap();
        root
    }

    /// `ddsnap initialize` overwrote a device below a linear map, and with --force a mounted file system.
    #[test]
    fn who_uses_a_device_is_named() {
        let root = sysfs();
        let users = |base, mounts: &str| super::users(root.path(), base, mounts, "");
        let mounts = "98 28 253:0 / /srv/a\\040b rw shared:1 - ext4 /dev/mapper/lin rw\n\
                      99 28 0:30 / /proc rw - proc proc rw\n\
                      97 28 8:16 / /other rw - ext4 /dev/none rw\n";
        let both = ["a mount on /srv/a b", "device /dev/mapper/lin"];
        assert_eq!(users(Base::Device(8, 0), mounts), both, "of its partition");
        assert_eq!(users(Base::Device(8, 1), mounts), both);
        assert_eq!(users(Base::Device(253, 0), mounts), both[..1]);
        assert_eq!(users(Base::Device(8, 1), ""), both[1..]);
        assert_eq!(users(Base::Device(8, 32), mounts), [""; 0]);
        let error = ClaimError::InUse {
            path: "/dev/sda".into(),
            users: both.map(String::from).to_vec(),
        };
        let text = "/dev/sda is in use by a mount on /srv/a b, device /dev/mapper/lin; nothing was changed \
                    (--force does not overwrite what is in use)";
        assert_eq!(error.to_string(), text);
    }

    #[test]
    fn swap_is_named_and_a_plain_file_is_not_claimed() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let swaps =
            format!("Filename\tType\tSize\n{path} file 4 0 -2\n/dev/none partition 4 0 -3\n");
        let base = Base::of(file.path()).unwrap();
        let users = users(Path::new("/none"), base, "", &swaps);
        assert_eq!(users, [format!("swap ({path})")]);
        let first = claim(file.path()).unwrap();
        claim(file.path()).unwrap();
        drop(first);
        let error = claim(Path::new("/none/such")).unwrap_err();
        assert_eq!(error.to_string(), "cannot open /none/such");
    }
}
