// SPDX-License-Identifier: GPL-2.0-only
//! The mount table, mounting, and the links that lead to mounts.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::config::Snapshot;
use crate::machine::{Busy, Dev, Mount};
use crate::process;

/// Longest wait for mount: a journal may have to be replayed.
const MOUNT_DEADLINE: Duration = Duration::from_secs(300);

/// The mount table of this process.
pub fn table() -> Result<Vec<Mount>> {
    let text = fs::read("/proc/self/mountinfo").context("could not read the mount table")?;
    Ok(text.split(|b| *b == b'\n').filter_map(parse_line).collect())
}

/// `36 35 98:0 /root /dir opts [fields] - type source options`; `None` for what is no such line.
fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|b| *b == b' ');
    let number = std::str::from_utf8(words.nth(2)?).ok()?;
    let (major, minor) = number.split_once(':')?;
    let dev = Dev {
        major: major.parse().ok()?,
        minor: minor.parse().ok()?,
    };
    let dir = unescape(words.nth(1)?);
    words.find(|w| *w == b"-")?;
    let fstype = String::from_utf8_lossy(words.next()?).into_owned();
    Some(Mount {
        dev,
        dir,
        source: unescape(words.next()?),
        fstype,
    })
}

/// Undoes the table's `\040` for blanks and the like.
fn unescape(word: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&first, tail)) = rest.split_first() {
        let digits = tail
            .get(..3)
            .filter(|d| d.iter().all(|b| (b'0'..=b'7').contains(b)));
        match (first, digits) {
            (b'\\', Some(d)) => {
                let value = d.iter().fold(0_u32, |v, b| v * 8 + u32::from(b - b'0'));
                bytes.push((value & 0xff) as u8);
                rest = &tail[3..];
            }
            _ => {
                bytes.push(first);
                rest = tail;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

/// Options for mounting a device: the administrator's, plus what a snapshot needs.
///
/// A snapshot is read-only for its users; its device stays writable so that a journal can be
/// replayed. XFS refuses a second file system with the same UUID unless told otherwise.
#[must_use]
pub fn options(stored: Option<&str>, fstype: &str, snapshot: bool) -> Vec<String> {
    let stored = stored
        .unwrap_or_default()
        .split(',')
        .filter(|o| !o.is_empty());
    // A read-only origin's option may stay, a stored `rw` may not.
    let mut options: Vec<String> = stored
        .filter(|o| !(snapshot && *o == "rw"))
        .map(str::to_string)
        .collect();
    let mut add = |option: &str| {
        if !options.iter().any(|o| o == option) {
            options.push(option.to_string());
        }
    };
    if snapshot {
        add("ro");
        if fstype == "xfs" {
            add("nouuid");
        }
    }
    options
}

/// Mounts `node` on `dir`.
pub fn mount(node: &Path, dir: &Path, fstype: &str, options: &[String]) -> Result<()> {
    let mut argv: Vec<OsString> = vec!["mount".into(), "-t".into(), fstype.into()];
    if !options.is_empty() {
        argv.extend(["-o".into(), options.join(",").into()]);
    }
    argv.extend(["--".into(), node.into(), dir.into()]);
    let output = process::run(&argv, MOUNT_DEADLINE)?;
    if output.code != Some(0) {
        bail!("{}", output.complaint());
    }
    Ok(())
}

/// Unmounts `dir`.
pub fn unmount(dir: &Path) -> Result<()> {
    match umount2(dir, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::EBUSY) => {
            let mounts = table()?;
            let device = mounts
                .iter()
                .rev()
                .find(|m| m.dir == dir)
                .map(|m| m.source.clone());
            let device = device
                .unwrap_or_else(|| dir.to_path_buf())
                .display()
                .to_string();
            let below = mounts
                .iter()
                .filter(|m| m.dir != dir && m.dir.starts_with(dir));
            let mut holders: Vec<String> = below
                .map(|m| format!("a mount on {}", m.dir.display()))
                .collect();
            // Links of /proc show the text of a path; following them could block on a dead mount.
            let inside = |link: &Path| fs::read_link(link).is_ok_and(|p| p.starts_with(dir));
            holders.extend(process::users(inside));
            Err(Busy { device, holders }.into())
        }
        Err(e) => Err(e).with_context(|| format!("could not unmount {}", dir.display())),
    }
}

/// The snapshot directory's links: by time to the mount, and `KIND.n`, newest 0, to the time.
///
/// `mounted` gives the mount point of a snapshot that is mounted.
#[must_use]
pub fn snapshot_links(
    snapshots: &[Snapshot],
    mounted: impl Fn(u32) -> Option<PathBuf>,
) -> BTreeMap<String, PathBuf> {
    let mut links = BTreeMap::new();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for snapshot in snapshots.iter().rev() {
        let Some(dir) = mounted(snapshot.id) else {
            continue;
        };
        let count = counts.entry(&snapshot.kind).or_default();
        links.insert(
            format!("{}.{count}", snapshot.kind),
            PathBuf::from(&snapshot.time),
        );
        links.insert(snapshot.time.clone(), dir);
        *count += 1;
    }
    links
}

/// `time`, or `time.1`, `time.2`… if snapshots of the same second exist.
#[must_use]
pub fn unique_time(time: &str, snapshots: &[Snapshot]) -> String {
    let taken = |name: &str| snapshots.iter().any(|s| s.time == name);
    let mut name = time.to_string();
    let mut number = 0;
    while taken(&name) {
        number += 1;
        name = format!("{time}.{number}");
    }
    name
}

/// Makes the links in `dir` exactly `wanted`; what is no link is left alone.
pub fn sync_links(dir: &Path, wanted: &BTreeMap<String, PathBuf>) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("could not create {}", dir.display()))?;
    let entries = fs::read_dir(dir).with_context(|| format!("could not read {}", dir.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_symlink() && !wanted.contains_key(&name) {
            fs::remove_file(&path)
                .with_context(|| format!("could not remove {}", path.display()))?;
        }
    }
    for (name, target) in wanted {
        set_link(&dir.join(name), target)?;
    }
    Ok(())
}

/// Makes `path` a link to `target`, replacing another link or an empty directory.
pub fn set_link(path: &Path, target: &Path) -> Result<()> {
    if fs::read_link(path).is_ok_and(|found| found == target) {
        return Ok(());
    }
    let failed = || format!("could not create the link {}", path.display());
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(failed)?;
    }
    if path.is_dir() && !path.is_symlink() {
        fs::remove_dir(path).with_context(failed)?;
    }
    // Renaming replaces a link at once: nobody sees the path missing.
    let mut temporary = path.as_os_str().to_os_string();
    temporary.push(".new");
    remove_link(Path::new(&temporary))?;
    symlink(target, &temporary).with_context(failed)?;
    fs::rename(&temporary, path).with_context(failed)
}

/// Removes the link at `path`, if there is one.
pub fn remove_link(path: &Path) -> Result<()> {
    if !path.is_symlink() {
        return Ok(());
    }
    fs::remove_file(path).with_context(|| format!("could not remove {}", path.display()))
}

/// Removes `dir` if it is there and empty.
pub fn remove_empty_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir(dir) {
        Ok(()) => Ok(()),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound) => Ok(()),
        Err(e) if e.raw_os_error() == Some(nix::libc::ENOTEMPTY) => Ok(()),
        Err(e) => Err(e).with_context(|| format!("could not remove {}", dir.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MANUAL;

    #[test]
    fn mount_table_lines() {
        let line =
            b"98 28 253:2 / /var/mount/a\\040b rw,relatime shared:1 - ext4 /dev/mapper/v(0) ro";
        let mount = parse_line(line).expect("a line");
        assert_eq!(
            mount.dev,
            Dev {
                major: 253,
                minor: 2
            }
        );
        assert_eq!(mount.dir, Path::new("/var/mount/a b"));
        assert_eq!(mount.source, Path::new("/dev/mapper/v(0)"));
        assert_eq!(mount.fstype, "ext4");
        assert_eq!(parse_line(b""), None);
        assert_eq!(parse_line(b"1 2 x:y / / rw - t s"), None);
    }

    #[test]
    fn snapshots_are_read_only_and_xfs_gets_nouuid() {
        assert_eq!(options(None, "ext4", false), Vec::<String>::new());
        assert_eq!(options(Some("noatime"), "xfs", false), ["noatime"]);
        assert_eq!(options(Some("rw,noatime"), "ext4", true), ["noatime", "ro"]);
        assert_eq!(options(None, "xfs", true), ["ro", "nouuid"]);
        assert_eq!(options(Some("nouuid,ro"), "xfs", true), ["nouuid", "ro"]);
    }

    fn snapshot(id: u32, time: &str) -> Snapshot {
        Snapshot {
            id,
            kind: MANUAL.to_string(),
            time: time.to_string(),
        }
    }

    #[test]
    fn links_lead_from_kind_to_time_to_mount() {
        let all = [snapshot(0, "t0"), snapshot(2, "t2"), snapshot(4, "t4")];
        let links = snapshot_links(&all, |id| (id != 2).then(|| format!("/m({id})").into()));
        let found: Vec<String> = links
            .iter()
            .map(|(name, to)| format!("{name} -> {}", to.display()))
            .collect();
        let expected = [
            "manual.0 -> t4",
            "manual.1 -> t0",
            "t0 -> /m(0)",
            "t4 -> /m(4)",
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn two_snapshots_in_a_second_get_different_names() {
        let all = [
            snapshot(0, "2026.01.02-03.04.05"),
            snapshot(2, "2026.01.02-03.04.05.1"),
        ];
        assert_eq!(
            unique_time("2026.01.02-03.04.05", &all),
            "2026.01.02-03.04.05.2"
        );
        assert_eq!(
            unique_time("2026.01.02-03.04.06", &all),
            "2026.01.02-03.04.06"
        );
    }

    #[test]
    fn link_directories_follow_what_is_wanted() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("snapshot/v");
        let mut wanted = BTreeMap::from([("manual.0".to_string(), PathBuf::from("t0"))]);
        sync_links(&dir, &wanted).expect("made");
        fs::write(dir.join("a file"), "").expect("written");
        wanted = BTreeMap::from([("t2".to_string(), PathBuf::from("/m(2)"))]);
        sync_links(&dir, &wanted).expect("changed");
        sync_links(&dir, &wanted).expect("the same again");
        assert!(!dir.join("manual.0").is_symlink());
        assert!(dir.join("a file").exists(), "only links are ours");
        assert_eq!(
            fs::read_link(dir.join("t2")).expect("a link"),
            Path::new("/m(2)")
        );
    }

    #[test]
    fn a_directory_with_contents_is_not_replaced_by_a_link() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("v");
        fs::create_dir_all(path.join("data")).expect("made");
        assert!(set_link(&path, Path::new("/elsewhere")).is_err());
        assert!(path.join("data").exists());
    }
}
