// SPDX-License-Identifier: GPL-2.0-only
//! What around the volumes is set up so that it will go wrong one day: `zumastor doctor`.
//!
//! A volume can be in order while the machine is not: the kernel of the next boot has no module, a line in fstab mounts
//! the raw disk, LVM takes it, NFS cannot tell a snapshot from its origin. Here that is looked for, and nothing is changed. Each finding is
//! one sentence: what, where, what to do. A disk is read by nobody but LVM, which has a deadline: this is run when disks hang.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use crate::blockdev;
use crate::config::VolumeConfig;
use crate::dm;
use crate::layout::Layout;
use crate::machine::Dev;
use crate::process;

/// Longest wait for a command that is asked.
const DEADLINE: Duration = Duration::from_secs(30);
/// Links that are made from what a device holds, and mounted by.
const BY_CONTENTS: [&str; 4] = [
    "/dev/disk/by-uuid",
    "/dev/disk/by-label",
    "/dev/disk/by-partuuid",
    "/dev/disk/by-partlabel",
];
/// An option of fstab that makes a mount wait for a service which waits for all mounts.
const WAITS_FOR_ITSELF: [&str; 2] = [
    "x-systemd.requires=zumastor.service",
    "x-systemd.after=zumastor.service",
];

/// What LVM is told by; an initial RAM disk has copies.
const LVM_CONFIG: [&str; 3] = [
    "/etc/lvm/lvmlocal.conf",
    "/etc/lvm/lvm.conf",
    "/etc/lvm/devices/system.devices",
];

/// A device of a volume.
#[derive(Clone, Debug)]
struct Owned {
    volume: String,
    /// By the name in the volume's document.
    path: PathBuf,
    /// If it is there.
    dev: Option<Dev>,
    is_origin: bool,
}

impl Owned {
    fn what(&self) -> String {
        let role = if self.is_origin {
            "raw origin"
        } else {
            "snapshot store"
        };
        format!("the {role} of volume '{}'", self.volume)
    }
}

/// What is wrong around these volumes, a sentence each.
#[must_use]
pub fn look(layout: &Layout, volumes: &[(String, VolumeConfig)]) -> Vec<String> {
    let owned = owned(volumes);
    let number = |path: &Path| blockdev::number(path).ok();
    let mut found = kernels(layout);
    let links = BY_CONTENTS.iter().flat_map(|dir| entries(&layout.at(dir)));
    found.extend(names_of_raw(&owned, links, &number));
    let table = fs::read_to_string(layout.at("/etc/fstab")).unwrap_or_default();
    found.extend(fstab(&owned, &table, &number));
    found.extend(lvm(layout, &owned, &number));
    found
}

fn owned(volumes: &[(String, VolumeConfig)]) -> Vec<Owned> {
    let of = |(volume, config): &(String, VolumeConfig)| {
        let devices = &config.device;
        let all = [
            Some(&devices.origin),
            Some(&devices.snapstore),
            devices.meta.as_ref(),
        ];
        let one = |(at, path): (usize, &PathBuf)| Owned {
            volume: volume.clone(),
            path: path.clone(),
            dev: blockdev::number(path).ok(),
            is_origin: at == 0,
        };
        let all = all.into_iter().flatten().enumerate();
        all.map(one).collect::<Vec<_>>()
    };
    volumes.iter().flat_map(of).collect()
}

/// What is in a directory, sorted; nothing if it is not there.
fn entries(dir: &Path) -> Vec<PathBuf> {
    let found = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = found.map(|entry| entry.path()).collect();
    found.sort();
    found
}

/// What a command prints, if it ends well.
fn ask(argv: &[&str]) -> Option<String> {
    let argv: Vec<OsString> = argv.iter().map(OsString::from).collect();
    let output = process::run(&argv, DEADLINE).ok()?;
    (output.code == Some(0)).then(|| output.stdout.trim().to_string())
}

/// Kernels without our module, or with another one than is installed: the one that runs, and those that can be booted.
fn kernels(layout: &Layout) -> Vec<String> {
    let running = dm::release();
    let read = |path| {
        fs::read_to_string(layout.at(path))
            .ok()
            .map(|text| text.trim().to_string())
    };
    let installed =
        |release: &str| ask(&["modinfo", "-k", release, "-F", "srcversion", dm::MODULE]);
    let own = Kernel {
        release: running.clone(),
        installed: installed(&running),
        loaded: read("/sys/module/dm_ddsnap/srcversion"),
    };
    let mut found: Vec<String> = own.trouble().into_iter().collect();
    for path in entries(&layout.at("/lib/modules")) {
        let release = path.file_name().unwrap_or_default().to_string_lossy();
        // What is left of a kernel that was removed cannot be booted.
        let can_boot = layout.at(&format!("/boot/vmlinuz-{release}")).exists();
        if release != running.as_str() && can_boot && installed(&release).is_none() {
            found.push(format!(
                "the installed kernel {release} has no module {}: if it is booted, no volume comes up; install its headers \
                 (package linux-headers-{release}), for which DKMS then builds the module, or remove that kernel",
                dm::MODULE
            ));
        }
    }
    found
}

/// The module in and for the kernel that runs, by the checksum of its source, which is empty where the kernel's build left it out.
struct Kernel {
    release: String,
    installed: Option<String>,
    loaded: Option<String>,
}

impl Kernel {
    fn trouble(&self) -> Option<String> {
        match (&self.loaded, &self.installed) {
            (None, None) => Some(dm::missing_target(&self.release)),
            (Some(loaded), Some(installed)) if !installed.is_empty() && loaded != installed => {
                Some(format!(
                    "the kernel uses another build of the module {module} than the one that is installed: the next boot brings \
                     that; to have it now, unmount what is on volumes, then `systemctl stop zumastor; modprobe -r {module}; \
                     systemctl start zumastor`",
                    module = dm::MODULE
                ))
            }
            _ => None,
        }
    }
}

/// Names that are made from contents and lead to a raw origin: who mounts by one goes round the volume.
fn names_of_raw(
    owned: &[Owned],
    links: impl Iterator<Item = PathBuf>,
    number: &dyn Fn(&Path) -> Option<Dev>,
) -> Vec<String> {
    let wrong = |link: PathBuf| {
        let dev = number(&link)?;
        let raw = owned.iter().find(|o| o.is_origin && o.dev == Some(dev))?;
        Some(format!(
            "{} leads to {}, {}, and not to /dev/mapper/{volume}: what is mounted by it is written round the snapshots; \
             `udevadm control --reload` and `udevadm trigger --settle {}` should give the name back",
            link.display(),
            raw.path.display(),
            raw.what(),
            raw.path.display(),
            volume = raw.volume,
        ))
    };
    links.filter_map(wrong).collect()
}

/// Lines of fstab that use a volume's devices themselves, or wait for the daemon.
fn fstab(owned: &[Owned], table: &str, number: &dyn Fn(&Path) -> Option<Dev>) -> Vec<String> {
    let mut found = Vec::new();
    for (at, line) in table.lines().enumerate() {
        let mut fields = line.split_ascii_whitespace();
        let Some(source) = fields.next().filter(|s| !s.starts_with('#')) else {
            continue;
        };
        let place = format!("/etc/fstab, line {}", at + 1);
        let path = Path::new(source);
        // Elsewhere may be what hangs, a bind mount of NFS for one.
        let dev = path.starts_with("/dev").then(|| number(path)).flatten();
        let is_same = |o: &&Owned| o.path == path || dev.is_some() && o.dev == dev;
        if let Some(raw) = owned.iter().find(is_same) {
            let instead = if raw.is_origin {
                format!("write /dev/mapper/{} instead", raw.volume)
            } else {
                "take that line out".to_string()
            };
            found.push(format!("{place}: {source} is {}: {instead}", raw.what()));
        }
        let options = fields.nth(2).unwrap_or_default();
        for option in options.split(',').filter(|o| WAITS_FOR_ITSELF.contains(o)) {
            found.push(format!(
                "{place}: with {option} the mount waits for a service that waits for all mounts, and one of them fails at boot: \
                 leave it out, volumes are up before local file systems are mounted"
            ));
        }
    }
    found
}

/// Volumes that are physical volumes, where LVM looks at the raw disk or at snapshots too, now or at the next boot.
fn lvm(layout: &Layout, owned: &[Owned], number: &dyn Fn(&Path) -> Option<Dev>) -> Vec<String> {
    let is_member = |o: &&Owned| {
        let node = PathBuf::from(format!("/dev/mapper/{}", o.volume));
        let of_volume = number(&node).is_some_and(|dev| holds_lvm(layout, dev));
        o.is_origin && (of_volume || o.dev.is_some_and(|dev| is_taken_by_lvm(layout, dev)))
    };
    let volumes: Vec<&Owned> = owned.iter().filter(is_member).collect();
    if volumes.is_empty() {
        return Vec::new();
    }
    // Without the second column it leaves out what it takes for another path to the same.
    let columns = "pv_name,pv_duplicate";
    let seen = ask(&["lvm", "pvs", "--all", "--noheadings", "-o", columns]);
    let Some(seen) = seen else {
        return vec![format!(
            "LVM was asked which devices it reads, and failed or did not answer in {} s: see what `pvs --all` says",
            DEADLINE.as_secs()
        )];
    };
    let seen: Vec<PathBuf> = seen
        .lines()
        .filter_map(|line| line.split_ascii_whitespace().next())
        .map(PathBuf::from)
        .collect();
    let wrong = |raw: &&Owned| {
        let snapshots = format!("/dev/mapper/{}(", raw.volume);
        let is_raw = |path: &&PathBuf| {
            number(path).is_some_and(|dev| Some(dev) == raw.dev)
                || path.to_string_lossy().starts_with(&snapshots)
        };
        let taken = seen.iter().find(is_raw)?;
        Some(format!(
            "there is a physical volume on /dev/mapper/{volume}, and LVM also finds it on {}: it refuses changes, and may use that in place of \
             the volume; tell it to leave the raw disk and the snapshots alone, then run `update-initramfs -u` if there is an initial RAM \
             disk, and reboot if LVM has the raw disk in use; in /etc/lvm/lvmlocal.conf: devices {{ global_filter = [ \"r|^{}$|\", \
             \"r|^/dev/mapper/{volume}[(]|\" ] }}",
            taken.display(),
            raw.path.display(),
            volume = raw.volume,
        ))
    };
    let mut found: Vec<String> = volumes.iter().filter_map(wrong).collect();
    if found.is_empty() {
        let release = dm::release();
        let disk = format!("/boot/initrd.img-{release}");
        let old = LVM_CONFIG.into_iter().find(|config| {
            let (of_disk, of_config) = (changed(layout, &disk), changed(layout, config));
            of_disk
                .zip(of_config)
                .is_some_and(|(disk, config)| disk < config)
        });
        found.extend(old.map(|config| {
            let names: Vec<&str> = volumes.iter().map(|o| o.volume.as_str()).collect();
            format!(
                "the initial RAM disk {disk} is older than {config}, of which it has a copy: at the next boot LVM may take the raw disk in place \
                 of the volume ({}): run `update-initramfs -u`",
                names.join(", ")
            )
        }));
    }
    found
}

/// When a file was changed last, if it is there.
fn changed(layout: &Layout, path: &str) -> Option<SystemTime> {
    fs::metadata(layout.at(path)).ok()?.modified().ok()
}

/// Whether a logical volume stands on a device itself.
fn is_taken_by_lvm(layout: &Layout, dev: Dev) -> bool {
    let holders = layout.at(&format!("/sys/dev/block/{dev}/holders"));
    let uuid = |holder: PathBuf| fs::read_to_string(holder.join("dm/uuid")).unwrap_or_default();
    entries(&holders)
        .into_iter()
        .any(|holder| uuid(holder).starts_with("LVM-"))
}

/// Whether udev has found a physical volume on a device. Its database is asked, and not the device.
fn holds_lvm(layout: &Layout, dev: Dev) -> bool {
    let path = layout.at(&format!("/run/udev/data/b{dev}"));
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().any(|line| line == "E:ID_FS_TYPE=LVM2_member")
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAW: Dev = Dev {
        major: 254,
        minor: 16,
    };
    const STORE: Dev = Dev {
        major: 254,
        minor: 32,
    };

    fn devices() -> Vec<Owned> {
        let one = |path: &str, dev, is_origin| Owned {
            volume: "v".into(),
            path: path.into(),
            dev: Some(dev),
            is_origin,
        };
        vec![
            one("/dev/disk/by-id/x", RAW, true),
            one("/dev/vdc", STORE, false),
        ]
    }

    fn number(path: &Path) -> Option<Dev> {
        match path.to_str() {
            Some("/dev/vdb" | "/dev/disk/by-id/x" | "/dev/disk/by-uuid/raw") => Some(RAW),
            Some("/dev/vdc") => Some(STORE),
            _ => None,
        }
    }

    fn table(text: &str) -> Vec<String> {
        fstab(&devices(), text, &number)
    }

    /// A line with the raw disk was mounted at boot, before the volume was up, and its snapshots showed what was written.
    #[test]
    fn a_line_of_fstab_with_a_raw_device_is_found() {
        let found = table("# /dev/vdb\n\n/dev/vdb /srv ext4 defaults 0 2\n/dev/vdc none swap sw\n");
        assert_eq!(
            found,
            [
                "/etc/fstab, line 3: /dev/vdb is the raw origin of volume 'v': write /dev/mapper/v instead",
                "/etc/fstab, line 4: /dev/vdc is the snapshot store of volume 'v': take that line out",
            ]
        );
        assert!(table("UUID=1 / ext4\n/dev/mapper/v /srv ext4\ntmpfs /tmp tmpfs\n").is_empty());
    }

    /// The name that the document has counts also while the disk is away.
    #[test]
    fn a_raw_device_that_is_not_there_is_found_by_its_name() {
        let mut away = devices();
        away[0].dev = None;
        let found = fstab(&away, "/dev/disk/by-id/x /srv ext4", &|_| None);
        assert!(
            found[0].contains("line 1: /dev/disk/by-id/x is the raw origin"),
            "{found:?}"
        );
    }

    /// Such a line made an ordering cycle, and a volume that stayed failed.
    #[test]
    fn a_mount_that_waits_for_itself_is_found() {
        let line = "/dev/mapper/v /srv ext4 noatime,x-systemd.requires=zumastor.service 0 2\n";
        assert!(table(line)[0].starts_with("/etc/fstab, line 1: with x-systemd.requires="));
        assert!(table("/dev/mapper/v /srv ext4 x-systemd.requires=other.service 0 2").is_empty());
        assert!(table("broken\nbroken again\n x y\n").is_empty());
    }

    #[test]
    fn names_by_contents_lead_to_the_volume_and_not_to_its_raw_disk() {
        let links = |name: &str| [PathBuf::from(format!("/dev/disk/by-uuid/{name}"))].into_iter();
        let found = names_of_raw(&devices(), links("raw"), &number);
        assert!(
            found[0].starts_with(
                "/dev/disk/by-uuid/raw leads to /dev/disk/by-id/x, the raw origin of volume 'v',"
            ),
            "{found:?}"
        );
        assert!(names_of_raw(&devices(), links("other"), &number).is_empty());
    }

    #[test]
    fn the_module_of_the_kernel_that_runs() {
        let kernel = |loaded: Option<&str>, installed: Option<&str>| {
            let own = Kernel {
                release: "6.12".into(),
                installed: installed.map(String::from),
                loaded: loaded.map(String::from),
            };
            own.trouble()
        };
        assert!(kernel(None, None).is_some_and(|text| text.contains("dm-ddsnap-dkms")));
        assert!(kernel(Some("A"), Some("B")).is_some_and(|text| text.contains("next boot")));
        assert_eq!(kernel(Some("A"), Some("A")), None);
        assert_eq!(
            kernel(None, Some("A")),
            None,
            "it is loaded when it is needed"
        );
        assert_eq!(kernel(Some("A"), None), None, "it is a part of the kernel");
        assert_eq!(kernel(Some("A"), Some("")), None, "nothing is known");
    }

    /// LVM activated the raw disk in the initial RAM disk, and the volume, which was down for that, was passed over.
    #[test]
    fn a_disk_that_lvm_has_taken_is_known_from_sysfs() {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        assert!(!is_taken_by_lvm(&layout, RAW));
        let holder = |name: &str, uuid: &str| {
            let dm = layout.at(&format!("/sys/dev/block/254:16/holders/{name}/dm"));
            fs::create_dir_all(&dm).expect("made");
            fs::write(dm.join("uuid"), uuid).expect("written");
        };
        holder("dm-0", "DDSNAP-1-origin\n");
        assert!(!is_taken_by_lvm(&layout, RAW));
        holder("dm-1", "LVM-abc\n");
        assert!(is_taken_by_lvm(&layout, RAW));
    }

    #[test]
    fn a_physical_volume_is_known_from_udev() {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        let path = layout.at("/run/udev/data/b254:16");
        assert!(!holds_lvm(&layout, RAW));
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(&path, "S:x\nE:ID_FS_TYPE=LVM2_member\n").expect("written");
        assert!(holds_lvm(&layout, RAW));
    }
}
