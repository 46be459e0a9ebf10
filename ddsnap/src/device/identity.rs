// SPDX-License-Identifier: GPL-2.0-only
//! Whether two paths lead to one device or file.

use std::fs::{self, Metadata};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use nix::libc;

/// Whether `a` and `b` lead to the same file, or to nodes of the same block device. False if one of them
/// cannot be looked at: opening it says why.
#[must_use]
pub fn same(a: &Path, b: &Path) -> bool {
    match (fs::metadata(a), fs::metadata(b)) {
        (Ok(a), Ok(b)) => same_file(&a, &b),
        _ => false,
    }
}

fn same_file(a: &Metadata, b: &Metadata) -> bool {
    let devices = a.file_type().is_block_device() && b.file_type().is_block_device();
    (a.dev(), a.ino()) == (b.dev(), b.ino()) || devices && a.rdev() == b.rdev()
}

/// Store, origin and metadata device must be different ones.
///
/// # Errors
/// A sentence that names two that are not.
pub fn distinct(paths: &[&Path]) -> Result<(), String> {
    for (index, a) in paths.iter().enumerate() {
        if let Some(b) = paths[..index].iter().find(|b| same(a, b)) {
            return Err(format!(
                "{} and {} are the same device; snapshot store, origin and metadata device must be different",
                b.display(),
                a.display()
            ));
        }
    }
    Ok(())
}

/// A name of a block device that stays with it: of a device of device-mapper its UUID, of a loop device its file,
/// of a disk what its hardware says, of a partition its disk's and its number. None: there is none, as of a
/// virtual disk without a serial number, or it is no device.
#[must_use]
pub fn lasting_name(path: &Path) -> Option<String> {
    let meta = fs::metadata(path).ok()?;
    if !meta.file_type().is_block_device() {
        return None;
    }
    let (major, minor) = (libc::major(meta.rdev()), libc::minor(meta.rdev()));
    let entry = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    name_in(&entry)
}

/// Whether this is a block device without any [`lasting_name`].
#[must_use]
pub fn is_nameless(path: &Path) -> bool {
    let device = fs::metadata(path).is_ok_and(|meta| meta.file_type().is_block_device());
    device && lasting_name(path).is_none()
}

/// The name of the device whose directory in sysfs this is.
fn name_in(entry: &Path) -> Option<String> {
    let text = |file: &str| {
        let text = fs::read_to_string(entry.join(file)).ok()?;
        // Hardware pads its names.
        let words: Vec<&str> = text.split_whitespace().collect();
        (!words.is_empty()).then(|| words.join(" "))
    };
    if let Some(number) = text("partition") {
        let disk = name_in(entry.parent()?)?;
        return Some(format!("{disk}, partition {number}"));
    }
    let kinds = [
        ("dm/uuid", "device-mapper"),
        ("loop/backing_file", "loop over"),
        ("md/uuid", "md"),
        ("wwid", "disk"),
        ("device/wwid", "disk"),
        ("serial", "disk"),
        ("device/serial", "disk"),
    ];
    kinds
        .iter()
        .find_map(|(file, kind)| text(file).map(|name| format!("{kind} {name}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_named_by_its_disk() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("sda");
        fs::create_dir_all(disk.join("sda2")).unwrap();
        fs::create_dir_all(disk.join("device")).unwrap();
        fs::write(disk.join("sda2/partition"), "2\n").unwrap();
        assert_eq!(name_in(&disk.join("sda2")), None, "its disk has no name");
        fs::write(disk.join("device/wwid"), "t10.ATA     X  1 \n").unwrap();
        assert_eq!(name_in(&disk).unwrap(), "disk t10.ATA X 1");
        let name = name_in(&disk.join("sda2")).unwrap();
        assert_eq!(name, "disk t10.ATA X 1, partition 2");
    }

    #[test]
    fn links_lead_to_the_same_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("a"), "").unwrap();
        fs::write(path("b"), "").unwrap();
        fs::hard_link(path("a"), path("hard")).unwrap();
        std::os::unix::fs::symlink(path("a"), path("soft")).unwrap();
        assert!(same(&path("a"), &path("hard")) && same(&path("soft"), &path("hard")));
        assert!(!same(&path("a"), &path("b")) && !same(&path("a"), &path("none")));
        assert!(distinct(&[&path("a"), &path("b"), &path("none")]).is_ok());
        let error = distinct(&[&path("a"), &path("b"), &path("soft")]).unwrap_err();
        assert!(
            error.contains("/a and ") && error.contains("/soft are the same"),
            "{error}"
        );
    }
}
