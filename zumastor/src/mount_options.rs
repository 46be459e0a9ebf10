// SPDX-License-Identifier: GPL-2.0-only
//! How a device is mounted: options, refusals, and what mount(8) says. Pure: no I/O.

use ddsnap::probe::contents::{Elsewhere, Known};

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
        "ext2" | "ext3" | "ext4" | "vfat" | "msdos" | "exfat" | "jfs" | "nilfs2" | "ocfs2"
        | "bcachefs" => Some("errors=continue"),
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

#[cfg(test)]
mod tests {
    use super::*;
    use ddsnap::probe::contents::Usage;

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
        assert_eq!(all("errors=panic", "bcachefs", true), "ro,errors=continue");
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
}
