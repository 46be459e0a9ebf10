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
use ddsnap::probe::contents::{Elsewhere, Known};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::config::Snapshot;
use crate::machine::{Busy, Dev, Mount};
use crate::{blockdev, process};

/// Longest wait for mount: a journal may have to be replayed.
const MOUNT_DEADLINE: Duration = Duration::from_secs(300);

/// A snapshot's time, which is the name of its link.
pub const TIME_FORMAT: &str = "%Y.%m.%d-%H.%M.%S";

/// The mount table of this process.
///
/// A btrfs numbers its mounts by itself; here, too, `dev` is the device it lies on, as its source says.
pub fn table() -> Result<Vec<Mount>> {
    let text = fs::read("/proc/self/mountinfo").context("could not read the mount table")?;
    let mut mounts: Vec<Mount> = text.split(|b| *b == b'\n').filter_map(parse_line).collect();
    for mount in mounts.iter_mut().filter(|m| m.fstype == "btrfs") {
        if let Ok(dev) = blockdev::number(&mount.source) {
            mount.dev = dev;
        }
    }
    Ok(mounts)
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

/// How to mount a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// What must be: without them it is not mounted.
    pub required: Vec<String>,
    /// The administrator's own for this type of file system: one that it does not know is left out.
    pub optional: Vec<String>,
    /// Left out from the start.
    pub dropped: Vec<String>,
}

/// Options that every file system has, since the kernel deals with them, and those that decide who sees
/// what: never left out.
const KEPT: &[&str] = &[
    "ro",
    "rw",
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "noexec",
    "exec",
    "sync",
    "async",
    "dirsync",
    "noatime",
    "atime",
    "nodiratime",
    "diratime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "lazytime",
    "nolazytime",
    "nosymfollow",
    "symfollow",
    "silent",
    "loud",
    "iversion",
    "noiversion",
    "defaults",
    "uid",
    "gid",
    "umask",
    "fmask",
    "dmask",
    "mode",
    "dmode",
    "context",
    "fscontext",
    "defcontext",
    "rootcontext",
    "user",
    "users",
    "nouser",
    "owner",
    "group",
];

/// Options that say what happens on an error: a snapshot's own go before the administrator's.
const ON_ERROR: &[&str] = &["errors", "onerror", "fatal_errors"];
/// Options that name another device, which a snapshot would share with its live origin.
const OTHER_DEVICE: &[&str] = &["logdev", "rtdev", "journal_dev", "journal_path", "device"];

/// What a file system is told to do on an error of a snapshot: go on. Else one set to panic takes the
/// machine with it when a snapshot loses its data to a full store. XFS, btrfs and others never do.
fn on_error(fstype: &str) -> Option<&'static str> {
    match fstype {
        "ext2" | "ext3" | "ext4" | "vfat" | "msdos" | "exfat" | "jfs" | "nilfs2" | "ocfs2" => {
            Some("errors=continue")
        }
        _ => None,
    }
}

/// Options for mounting a device: the administrator's, plus what a snapshot needs.
///
/// A snapshot is read-only for its users; its device stays writable so that a journal can be
/// replayed, unless the journal is another device's. XFS refuses a second file system with the same
/// UUID unless told otherwise.
#[must_use]
pub fn options(stored: Option<&str>, found: &Known, snapshot: bool) -> Options {
    let mut options = Options::default();
    let stored = stored.unwrap_or_default().split(',');
    for option in stored.filter(|o| !o.is_empty()) {
        let key = option.split('=').next().unwrap_or(option);
        // A read-only origin's option may stay, a stored `rw` may not.
        let voided = option == "rw" || ON_ERROR.contains(&key) || OTHER_DEVICE.contains(&key);
        if snapshot && voided {
            continue;
        }
        if key == "nouuid" && found.kind != "xfs" {
            options.dropped.push(option.to_string());
        } else if KEPT.contains(&key) {
            options.required.push(option.to_string());
        } else {
            options.optional.push(option.to_string());
        }
    }
    if snapshot {
        let journal = matches!(found.elsewhere, Some(Elsewhere::ExtJournal { .. }));
        let needed = [
            Some("ro"),
            (found.kind == "xfs").then_some("nouuid"),
            journal.then_some("noload"),
            on_error(&found.kind),
        ];
        for option in needed.into_iter().flatten() {
            options.optional.retain(|o| o != option);
            if !options.required.iter().any(|o| o == option) {
                options.required.push(option.to_string());
            }
        }
    }
    options
}

/// Why a snapshot of what was found must not be mounted, if so.
#[must_use]
pub fn refusal(found: &Known) -> Option<&'static str> {
    match found.elsewhere? {
        Elsewhere::ExtJournal { in_use: false } => None,
        Elsewhere::ExtJournal { in_use: true } => Some(
            "its journal is on another device, which goes on living with the origin, and was in use when \
             the snapshot was taken",
        ),
        Elsewhere::XfsLog => {
            Some("its log is on another device, which goes on living with the origin")
        }
        Elsewhere::XfsRealtime => {
            Some("a part of its data is on another device, of which there is no snapshot")
        }
        Elsewhere::Btrfs => {
            Some("it spans several devices, and there is a snapshot of this one only")
        }
    }
}

/// What a failed mount was told about an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Complaint {
    /// This one is not known.
    Option(String),
    /// Perhaps one of them is not.
    SomeOption,
    /// It was something else.
    Other,
}

/// Reads what mount(8) said. Newer ones say which option; older ones name options among other things.
#[must_use]
pub fn complaint(text: &str) -> Complaint {
    let named = text.split_once("Unknown parameter '");
    match named.and_then(|(_, rest)| rest.split_once('\'')) {
        Some((option, _)) => Complaint::Option(option.to_string()),
        None if text.contains("bad option") => Complaint::SomeOption,
        None => Complaint::Other,
    }
}

/// Mounts `node` on `dir`; fails with [`Busy`] while somebody else has the device for himself.
pub fn mount(node: &Path, dir: &Path, fstype: &str, options: &[String]) -> Result<()> {
    let mut argv: Vec<OsString> = vec!["mount".into(), "-t".into(), fstype.into()];
    if !options.is_empty() {
        argv.extend(["-o".into(), options.join(",").into()]);
    }
    argv.extend(["--".into(), node.into(), dir.into()]);
    let output = process::run(&argv, MOUNT_DEADLINE)?;
    if output.code == Some(0) {
        return Ok(());
    }
    let text = output.complaint();
    if text.contains("already mounted or mount point busy") || text.contains("resource busy") {
        let users = blockdev::number(node).map(blockdev::all_users);
        let device = node.display().to_string();
        return Err(users.unwrap_or_default().busy(device).into());
    }
    if fstype == "btrfs" && text.contains("File exists") {
        bail!(
            "this kernel cannot mount a second btrfs with the UUID of one that is mounted (since 6.7 it \
             can): {text}"
        );
    }
    bail!("{text}");
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
            let lasting = !holders.is_empty();
            holders.extend(process::users(inside));
            Err(Busy {
                device,
                holders,
                lasting,
            }
            .into())
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

/// Local time of a moment in seconds since 1970, in [`TIME_FORMAT`].
#[must_use]
pub fn local_time(unix: i64) -> String {
    let moment = jiff::Timestamp::from_second(unix).unwrap_or_default();
    let zoned = moment.to_zoned(jiff::tz::TimeZone::system());
    zoned.strftime(TIME_FORMAT).to_string()
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
    use ddsnap::probe::contents::Usage;

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

    fn known(kind: &str, elsewhere: Option<Elsewhere>) -> Known {
        Known {
            usage: Usage::Filesystem,
            kind: kind.into(),
            label: None,
            elsewhere,
        }
    }

    fn all(stored: &str, kind: &str, snapshot: bool) -> String {
        let found = options(Some(stored), &known(kind, None), snapshot);
        [found.required, found.optional].concat().join(",")
    }

    #[test]
    fn snapshots_are_read_only_and_xfs_gets_nouuid() {
        assert_eq!(all("", "ext4", false), "");
        assert_eq!(all("noatime", "xfs", false), "noatime");
        assert_eq!(all("", "xfs", true), "ro,nouuid");
        assert_eq!(all("nouuid,ro", "xfs", true), "ro,nouuid");
    }

    /// A snapshot of a file system set to panic on errors was squashed, and the next `ls` ended the
    /// machine.
    #[test]
    fn a_snapshot_goes_on_after_an_error_whatever_is_stored() {
        assert_eq!(
            all("rw,noatime", "ext4", true),
            "noatime,ro,errors=continue"
        );
        assert_eq!(all("errors=panic", "ext3", true), "ro,errors=continue");
        assert_eq!(all("errors=panic", "ext3", false), "errors=panic");
        assert_eq!(all("fatal_errors=panic", "btrfs", true), "ro");
    }

    /// `--mountopts nouuid` on ext3 made every snapshot fail.
    #[test]
    fn options_of_another_file_system_are_dropped() {
        let found = options(Some("nouuid,acl"), &known("ext3", None), true);
        assert_eq!(found.dropped, ["nouuid"]);
        assert_eq!(found.optional, ["acl"]);
    }

    /// A snapshot was mounted with its live origin's journal or log.
    #[test]
    fn a_snapshot_never_touches_the_journal_of_its_origin() {
        assert_eq!(all("logdev=/dev/x", "xfs", true), "ro,nouuid");
        let clean = known("ext4", Some(Elsewhere::ExtJournal { in_use: false }));
        assert_eq!(refusal(&clean), None);
        let required = options(None, &clean, true).required;
        assert_eq!(required, ["ro", "noload", "errors=continue"]);
        for elsewhere in [
            Elsewhere::ExtJournal { in_use: true },
            Elsewhere::XfsLog,
            Elsewhere::Btrfs,
        ] {
            assert!(refusal(&known("x", Some(elsewhere))).is_some());
        }
    }

    #[test]
    fn what_mount_says_about_options() {
        let new = "mount: /m: fsconfig() failed: ext3: Unknown parameter 'nouuid'.";
        assert_eq!(complaint(new), Complaint::Option("nouuid".into()));
        let old = "mount: /m: wrong fs type, bad option, bad superblock on /dev/x.";
        assert_eq!(complaint(old), Complaint::SomeOption);
        assert_eq!(complaint("mount: /m: no space"), Complaint::Other);
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
