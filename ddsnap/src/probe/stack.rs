// SPDX-License-Identifier: GPL-2.0-only
//! Which devices share blocks: a partition and its disk, a logical volume and its physical volume, a
//! loop device and what it shows. By sysfs alone, so nothing is opened.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use nix::sys::stat::{major, minor};

/// Where the kernel shows its devices.
pub const SYSFS: &str = "/sys";
/// Levels followed before a stack is given up as endless.
const DEPTH_MAX: usize = 64;

/// How the device-mapper UUIDs of volumes and snapshots begin.
const OUR_UUID: &str = "DDSNAP-";

/// Something that has blocks: a device or a file under a loop device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Base {
    /// A block device, by major and minor number.
    Device(u32, u32),
    /// A file, by the device number of its file system and its inode.
    File(u64, u64),
}

impl Base {
    /// What `path` leads to; none if nothing is there.
    #[must_use]
    pub fn of(path: &Path) -> Option<Base> {
        let meta = fs::metadata(path).ok()?;
        Some(if meta.file_type().is_block_device() {
            Base::Device(major(meta.rdev()) as u32, minor(meta.rdev()) as u32)
        } else {
            Base::File(meta.dev(), meta.ino())
        })
    }

    fn dir(self, sysfs: &Path) -> Option<PathBuf> {
        let Base::Device(major, minor) = self else {
            return None;
        };
        fs::canonicalize(sysfs.join(format!("dev/block/{major}:{minor}"))).ok()
    }
}

/// All that `base` lies on, itself included: the disk of a partition, the devices a mapped one maps to,
/// what a loop device shows. A volume of ours is where it ends: its content is its own.
#[must_use]
pub fn below(sysfs: &Path, base: Base) -> BTreeSet<Base> {
    closure(base, |base| directly_below(sysfs, base))
}

fn directly_below(sysfs: &Path, base: Base) -> Vec<Base> {
    let Some(dir) = base.dir(sysfs) else {
        return Vec::new();
    };
    let uuid = fs::read_to_string(dir.join("dm/uuid")).unwrap_or_default();
    if uuid.starts_with(OUR_UUID) {
        return Vec::new();
    }
    let mut found = children(&dir.join("slaves"));
    if dir.join("partition").exists() {
        found.extend(dir.parent().and_then(number));
    }
    found.extend(shown(&dir));
    found
}

/// What the loop device at `dir` shows.
fn shown(dir: &Path) -> Option<Base> {
    let file = fs::read_to_string(dir.join("loop/backing_file")).ok()?;
    Base::of(Path::new(file.trim_end()))
}

/// All that lies on `base`, itself included: partitions, mapped devices, loop devices.
#[must_use]
pub fn above(sysfs: &Path, base: Base) -> BTreeSet<Base> {
    let is_loop = |dir: &PathBuf| {
        let name = dir.file_name().unwrap_or_default();
        name.to_string_lossy().starts_with("loop")
    };
    let loops: Vec<(Base, Base)> = entries(&sysfs.join("block"))
        .filter(is_loop)
        .filter_map(|dir| Some((shown(&dir)?, number(&dir)?)))
        .collect();
    closure(base, |base| {
        let mut found: Vec<Base> = loops.iter().filter(|l| l.0 == base).map(|l| l.1).collect();
        if let Some(dir) = base.dir(sysfs) {
            found.extend(children(&dir.join("holders")));
            let partitions = entries(&dir).filter(|d| d.join("partition").exists());
            found.extend(partitions.filter_map(|d| number(&d)));
        }
        found
    })
}

/// Whether two share blocks: one lies on the other, or they lie on one thing and a loop device shows it to
/// one of them alone. Two partitions of a disk, or two logical volumes of a group, do not, whether the disk
/// is a loop device or not.
#[must_use]
pub fn overlap(sysfs: &Path, a: Base, b: Base) -> bool {
    let (under_a, under_b) = (below(sysfs, a), below(sysfs, b));
    // By what each reaches `base`.
    let ways = |under: &BTreeSet<Base>, base: Base| -> BTreeSet<Base> {
        let lies = |on: &&Base| directly_below(sysfs, **on).contains(&base);
        under.iter().filter(lies).copied().collect()
    };
    let is_loop = |base: &Base| base.dir(sysfs).is_some_and(|dir| shown(&dir).is_some());
    let seen_twice = |base: &Base| {
        let (by_a, by_b) = (ways(&under_a, *base), ways(&under_b, *base));
        by_a != by_b && by_a.union(&by_b).any(is_loop)
    };
    under_a.contains(&b) || under_b.contains(&a) || under_a.intersection(&under_b).any(seen_twice)
}

/// The device's logical sector size in bytes; none if it is no block device.
#[must_use]
pub fn sector_bytes(sysfs: &Path, base: Base) -> Option<u32> {
    queue_bytes(sysfs, base, "logical_block_size")
}

/// Size in bytes of what the device writes as one, so that a torn write may take all of it along; none if it is
/// no block device.
#[must_use]
pub fn physical_bytes(sysfs: &Path, base: Base) -> Option<u32> {
    queue_bytes(sysfs, base, "physical_block_size")
}

fn queue_bytes(sysfs: &Path, base: Base, attribute: &str) -> Option<u32> {
    let dir = base.dir(sysfs)?;
    let disk = if dir.join("partition").exists() {
        dir.parent()?
    } else {
        &dir
    };
    let text = fs::read_to_string(disk.join("queue").join(attribute)).ok()?;
    text.trim_end().parse().ok()
}

/// Whether it is a partition of a disk.
#[must_use]
pub fn is_partition(sysfs: &Path, base: Base) -> bool {
    base.dir(sysfs)
        .is_some_and(|dir| dir.join("partition").exists())
}

/// The name people know a device by: the device-mapper's, or the kernel's.
#[must_use]
pub fn name(sysfs: &Path, base: Base) -> Option<String> {
    let dir = base.dir(sysfs)?;
    match fs::read_to_string(dir.join("dm/name")) {
        Ok(name) => Some(format!("/dev/mapper/{}", name.trim_end())),
        Err(_) => Some(format!("/dev/{}", dir.file_name()?.to_string_lossy())),
    }
}

fn closure(start: Base, next: impl Fn(Base) -> Vec<Base>) -> BTreeSet<Base> {
    let mut all = BTreeSet::from([start]);
    let mut edge = vec![start];
    for _ in 0..DEPTH_MAX {
        let found: Vec<Base> = edge.into_iter().flat_map(&next).collect();
        edge = found.into_iter().filter(|base| all.insert(*base)).collect();
        if edge.is_empty() {
            break;
        }
    }
    all
}

fn entries(dir: &Path) -> impl Iterator<Item = PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.path())
}

/// The devices a directory of links leads to.
fn children(dir: &Path) -> Vec<Base> {
    entries(dir).filter_map(|link| number(&link)).collect()
}

fn number(dir: &Path) -> Option<Base> {
    let text = fs::read_to_string(dir.join("dev")).ok()?;
    let (major, minor) = text.trim_end().split_once(':')?;
    Some(Base::Device(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A disk sda with partitions sda1 and sda2; on sda1 the mapped devices dm-0 and dm-1; loop devices 0
    /// and 1 that show one file, and on loop0 the mapped devices dm-2 and dm-3, on loop1 dm-4.
    fn sysfs() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        let make = |dir: &str, dev: &str, link: &str| {
            fs::create_dir_all(at(dir)).unwrap();
            fs::write(at(dir).join("dev"), format!("{dev}\n")).unwrap();
            fs::create_dir_all(at("dev/block")).unwrap();
            symlink(at(dir), at("dev/block").join(dev)).unwrap();
            if !link.is_empty() {
                fs::create_dir_all(at("block")).unwrap();
                symlink(at(dir), at("block").join(link)).unwrap();
            }
        };
        make("devices/sda", "8:0", "sda");
        fs::create_dir_all(at("devices/sda/queue")).unwrap();
        fs::write(at("devices/sda/queue/logical_block_size"), "4096\n").unwrap();
        fs::write(at("devices/sda/queue/physical_block_size"), "16384\n").unwrap();
        for (number, part) in ["sda1", "sda2"].iter().enumerate() {
            let dir = format!("devices/sda/{part}");
            make(&dir, &format!("8:{}", number + 1), "");
            fs::write(at(&dir).join("partition"), "1\n").unwrap();
        }
        for number in 0..2 {
            let dir = format!("devices/dm-{number}");
            make(&dir, &format!("253:{number}"), &format!("dm-{number}"));
            fs::create_dir_all(at(&dir).join("slaves")).unwrap();
            symlink(at("devices/sda/sda1"), at(&dir).join("slaves/sda1")).unwrap();
            let holders = at("devices/sda/sda1/holders");
            fs::create_dir_all(&holders).unwrap();
            symlink(at(&dir), holders.join(format!("dm-{number}"))).unwrap();
        }
        fs::create_dir_all(at("devices/dm-0/dm")).unwrap();
        fs::write(at("devices/dm-0/dm/name"), "vg-lv\n").unwrap();
        fs::write(at("image"), "").unwrap();
        for number in 0..2 {
            let dir = format!("devices/loop{number}");
            make(&dir, &format!("7:{number}"), &format!("loop{number}"));
            fs::create_dir_all(at(&dir).join("loop")).unwrap();
            let backing = format!("{}\n", at("image").display());
            fs::write(at(&dir).join("loop/backing_file"), backing).unwrap();
        }
        for (number, on) in [(2, "loop0"), (3, "loop0"), (4, "loop1")] {
            let dir = format!("devices/dm-{number}");
            make(&dir, &format!("253:{number}"), &format!("dm-{number}"));
            fs::create_dir_all(at(&dir).join("slaves")).unwrap();
            symlink(at("devices").join(on), at(&dir).join("slaves").join(on)).unwrap();
        }
        root
    }

    const SDA: Base = Base::Device(8, 0);
    const SDA1: Base = Base::Device(8, 1);
    const SDA2: Base = Base::Device(8, 2);
    const LV: Base = Base::Device(253, 0);
    const OTHER_LV: Base = Base::Device(253, 1);

    /// A store was made on a disk whose partition was the origin, and the other way round.
    #[test]
    fn what_shares_blocks_overlaps_and_neighbours_do_not() {
        let root = sysfs();
        let overlap = |a, b| {
            let found = super::overlap(root.path(), a, b);
            assert_eq!(found, super::overlap(root.path(), b, a));
            found
        };
        assert!(overlap(SDA, SDA) && overlap(SDA, SDA1) && overlap(SDA, LV) && overlap(SDA1, LV));
        assert!(!overlap(SDA1, SDA2) && !overlap(LV, OTHER_LV) && !overlap(SDA2, LV));
        assert!(overlap(Base::Device(7, 0), Base::Device(7, 1)), "one file");
        assert!(!overlap(SDA, Base::Device(7, 0)));
    }

    /// Two logical volumes of a group on a loop device were taken for one, because both lie on one file.
    #[test]
    fn neighbours_on_a_loop_device_do_not_overlap() {
        let root = sysfs();
        let overlap = |a, b| {
            let found = super::overlap(root.path(), a, b);
            assert_eq!(found, super::overlap(root.path(), b, a));
            found
        };
        let [one, other, elsewhere] = [2, 3, 4].map(|number| Base::Device(253, number));
        assert!(!overlap(one, other) && !overlap(one, SDA));
        // Through another loop device the file is seen once more.
        assert!(
            overlap(one, elsewhere)
                && overlap(one, Base::Device(7, 1))
                && overlap(one, Base::Device(7, 0))
        );
        let image = Base::of(&root.path().join("image")).unwrap();
        assert!(overlap(one, image));
    }

    #[test]
    fn all_that_stands_on_a_disk_is_found() {
        let root = sysfs();
        let all = BTreeSet::from([SDA, SDA1, SDA2, LV, OTHER_LV]);
        assert_eq!(above(root.path(), SDA), all);
        assert_eq!(above(root.path(), SDA2), BTreeSet::from([SDA2]));
        let image = Base::of(&root.path().join("image")).unwrap();
        assert_eq!(above(root.path(), image).len(), 3);
        assert_eq!(name(root.path(), LV).as_deref(), Some("/dev/mapper/vg-lv"));
        assert_eq!(name(root.path(), SDA2).as_deref(), Some("/dev/sda2"));
        assert_eq!(sector_bytes(root.path(), SDA1), Some(4096));
        assert_eq!(sector_bytes(root.path(), image), None);
        assert_eq!(physical_bytes(root.path(), SDA1), Some(16384));
        assert_eq!(physical_bytes(root.path(), image), None);
    }
}
