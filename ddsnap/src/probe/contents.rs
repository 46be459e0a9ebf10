// SPDX-License-Identifier: GPL-2.0-only
//! What a device holds: a file system, swap space, a partition table, a snapshot store, nothing...
//!
//! Signatures are the business of `blkid` (util-linux, on every Debian system), which knows hundreds;
//! our own stores it does not know, and three things it does not tell are read here: whether a file
//! system needs other devices too, whether its journal is in use, and whether a device without any
//! signature is blank. The start and the end of the device are read first: blkid takes a device that it
//! cannot read for one that holds nothing.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use thiserror::Error;

use crate::format::{label, superblock};
use crate::units::META_BLOCK_BYTES;

/// How much of the start and of the end is read: the signatures lie there.
const ENDS_BYTES: u64 = 256 << 10;
/// Longest wait for blkid.
const DEADLINE: Duration = Duration::from_secs(60);
/// How often to look whether blkid has ended: it takes a few milliseconds.
const POLL: Duration = Duration::from_millis(5);
/// Most output taken of blkid, in bytes.
const OUTPUT_MAX_BYTES: u64 = 64 << 10;

/// What a device holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contents {
    /// Start and end are zeroes.
    Blank,
    /// Something without a known signature: a database's raw volume, a guest's disk, noise.
    Unknown,
    /// One thing.
    Known(Known),
    /// Signatures that contradict each other, of these types.
    Several(Vec<String>),
}

/// Something with a signature.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// What it is for.
    pub usage: Usage,
    /// Its type as blkid has it, like `ext4` or `crypto_LUKS`.
    pub kind: String,
    /// Its label, if it has one.
    pub label: Option<String>,
    /// What it needs beside this device.
    pub elsewhere: Option<Elsewhere>,
}

/// What something is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// A file system that can be mounted.
    Filesystem,
    /// A snapshot store of ours, or a part of one.
    Store,
    /// A partition table.
    Partitions,
    /// Swap, encryption, a part of a volume group or RAID, a journal: nothing to mount.
    Other,
}

/// A part of a file system that lies on another device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Elsewhere {
    /// The journal of ext3 or ext4; `in_use`: it holds what is not yet in its place.
    ExtJournal {
        /// Needs recovery.
        in_use: bool,
    },
    /// The log of XFS.
    XfsLog,
    /// The data of XFS' realtime section.
    XfsRealtime,
    /// Other devices of a btrfs.
    Btrfs,
}

/// Why it cannot be told what a device holds.
#[derive(Debug, Error)]
pub enum ProbeError {
    /// The device cannot be opened or read.
    #[error("could not read '{path}' at byte {offset}")]
    Read {
        /// The device.
        path: PathBuf,
        /// Where.
        offset: u64,
        /// Why not.
        source: io::Error,
    },
    /// blkid cannot be run.
    #[error("could not run 'blkid', which tells what '{path}' holds")]
    Blkid {
        /// The device.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// blkid does not end, or says something that makes no sense.
    #[error("blkid could not examine '{path}': {what}")]
    Examine {
        /// The device.
        path: PathBuf,
        /// What went wrong.
        what: String,
    },
}

impl Contents {
    /// The type of the file system, if it holds one that can be mounted.
    #[must_use]
    pub fn filesystem(&self) -> Option<&Known> {
        match self {
            Contents::Known(known) if known.usage == Usage::Filesystem => Some(known),
            _ => None,
        }
    }

    /// Whether somebody may miss what is there: everything with a signature.
    #[must_use]
    pub fn is_recognised(&self) -> bool {
        matches!(self, Contents::Known(_) | Contents::Several(_))
    }
}

impl fmt::Display for Contents {
    /// What a device "holds", to follow that verb.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Contents::Blank => f.write_str("nothing but zeroes"),
            Contents::Unknown => f.write_str("data of a kind that is not known"),
            Contents::Several(kinds) => {
                write!(f, "the signatures of several things ({})", kinds.join(", "))
            }
            Contents::Known(known) => known.fmt(f),
        }
    }
}

impl fmt::Display for Known {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = &self.kind;
        match (self.usage, kind.as_str()) {
            (Usage::Filesystem, _) => write!(f, "a file system ({kind})")?,
            (Usage::Store, _) => f.write_str("a snapshot store")?,
            (Usage::Partitions, _) => write!(f, "a partition table ({kind})")?,
            (Usage::Other, "swap") => f.write_str("swap space")?,
            (Usage::Other, "crypto_LUKS") => f.write_str("an encrypted volume (LUKS)")?,
            (Usage::Other, "LVM2_member") => f.write_str("an LVM physical volume")?,
            (Usage::Other, "jbd") => f.write_str("the journal of a file system (jbd)")?,
            (Usage::Other, _) => write!(f, "a signature ({kind})")?,
        }
        match &self.label {
            Some(label) => write!(f, " labelled '{label}'"),
            None => Ok(()),
        }
    }
}

/// Looks at the device or file at `path`.
///
/// # Errors
/// It cannot be read, or blkid cannot be asked.
pub fn look(path: &Path) -> Result<Contents, ProbeError> {
    let (head, blank) = ends(path)?;
    if is_store(&head) {
        return Ok(Contents::Known(Known {
            usage: Usage::Store,
            kind: "ddsnap".into(),
            label: None,
            elsewhere: None,
        }));
    }
    let (code, text) = blkid(path, &["-p", "-o", "export"])?;
    let nothing = if blank {
        Contents::Blank
    } else {
        Contents::Unknown
    };
    match code {
        Some(0) if is_of_partition_only(&text) => Ok(nothing),
        Some(0) => {
            let mut known = parse(&text).ok_or_else(|| ProbeError::Examine {
                path: path.to_path_buf(),
                what: format!("it says {text:?}"),
            })?;
            known.elsewhere = elsewhere(&head, &known.kind);
            Ok(Contents::Known(known))
        }
        Some(2) => Ok(nothing),
        Some(8) => Ok(Contents::Several(several(path)?)),
        code => Err(ProbeError::Examine {
            path: path.to_path_buf(),
            what: code.map_or("killed by a signal".into(), |code| {
                format!("exit code {code}")
            }),
        }),
    }
}

/// The start of the device, and whether start and end are zeroes. A device that cannot be read says so.
fn ends(path: &Path) -> Result<(Vec<u8>, bool), ProbeError> {
    let failed = |offset| {
        move |source| ProbeError::Read {
            path: path.to_path_buf(),
            offset,
            source,
        }
    };
    let mut file = File::open(path).map_err(failed(0))?;
    let length = file.seek(SeekFrom::End(0)).map_err(failed(0))?;
    let read = |from: u64| -> Result<Vec<u8>, ProbeError> {
        let mut bytes = vec![0; ENDS_BYTES.min(length - from) as usize];
        let step = META_BLOCK_BYTES as usize;
        for (index, block) in bytes.chunks_mut(step).enumerate() {
            let offset = from + (index * step) as u64;
            file.read_exact_at(block, offset).map_err(failed(offset))?;
        }
        Ok(bytes)
    };
    let head = read(0)?;
    let tail = read(length.saturating_sub(ENDS_BYTES))?;
    let blank = head.iter().chain(&tail).all(|byte| *byte == 0);
    Ok((head, blank))
}

fn is_store(head: &[u8]) -> bool {
    superblock::COPIES.iter().any(|at| {
        let magic = bytes_at(head, at.to_offset() as usize).map(u64::from_le_bytes);
        magic.is_some_and(|found| [superblock::MAGIC, label::MAGIC].contains(&found))
    })
}

fn bytes_at<const N: usize>(head: &[u8], at: usize) -> Option<[u8; N]> {
    head.get(at..at + N)?.try_into().ok()
}

/// What of a file system of type `kind` lies on other devices, by its superblock.
fn elsewhere(head: &[u8], kind: &str) -> Option<Elsewhere> {
    let le32 = |at| bytes_at(head, at).map_or(0, u32::from_le_bytes);
    let be64 = |at| bytes_at(head, at).map_or(0, u64::from_be_bytes);
    match kind {
        "ext2" | "ext3" | "ext4" => {
            // linux: fs/ext4/ext4.h, struct ext4_super_block, 1024 bytes from the start.
            let has_journal = le32(1024 + 0x5c) & 0x4 != 0;
            let inode = le32(1024 + 0xe0);
            let in_use = le32(1024 + 0x60) & 0x4 != 0;
            (has_journal && inode == 0).then_some(Elsewhere::ExtJournal { in_use })
        }
        // linux: fs/xfs/libxfs/xfs_format.h, struct xfs_dsb: sb_rblocks and sb_logstart.
        "xfs" if be64(48) == 0 => Some(Elsewhere::XfsLog),
        "xfs" if be64(16) != 0 => Some(Elsewhere::XfsRealtime),
        "btrfs" => {
            // linux: fs/btrfs/accessors.h, struct btrfs_super_block, 64 KiB from the start: num_devices.
            let devices = bytes_at(head, (64 << 10) + 0x88).map_or(1, u64::from_le_bytes);
            (devices > 1).then_some(Elsewhere::Btrfs)
        }
        _ => None,
    }
}

/// What `blkid -o export` says of one device.
fn parse(text: &str) -> Option<Known> {
    let value = |key: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once('='));
        let found = lines.find(|(name, _)| *name == key);
        found.map(|(_, value)| value.to_string())
    };
    let label = value("LABEL").filter(|label| !label.is_empty());
    let known = |usage, kind, label| Known {
        usage,
        kind,
        label,
        elsewhere: None,
    };
    match (value("TYPE"), value("PTTYPE")) {
        (Some(kind), _) => {
            // A pool's member is no file system that can be mounted by its device.
            let mountable =
                value("USAGE").as_deref() == Some("filesystem") && !kind.ends_with("_member");
            let usage = if mountable {
                Usage::Filesystem
            } else {
                Usage::Other
            };
            Some(known(usage, kind, label))
        }
        (None, Some(table)) => Some(known(Usage::Partitions, table, None)),
        (None, None) => None,
    }
}

/// Whether blkid tells of a partition where it lies on its disk, and of nothing in it.
fn is_of_partition_only(text: &str) -> bool {
    let mut lines = text.lines().filter(|line| !line.starts_with("DEVNAME="));
    lines.clone().count() > 0 && lines.all(|line| line.starts_with("PART_ENTRY_"))
}

/// The types of all signatures of a device on which blkid finds too many.
fn several(path: &Path) -> Result<Vec<String>, ProbeError> {
    let output = run(
        Command::new("wipefs")
            .args(["--noheadings", "--output", "TYPE", "--"])
            .arg(path),
        path,
    )?;
    let mut kinds: Vec<String> = output.1.lines().map(|line| line.trim().into()).collect();
    kinds.retain(|kind| !kind.is_empty());
    kinds.dedup();
    Ok(kinds)
}

/// Erases the signatures at `path`: what is left of them behind the new contents would mislead whoever
/// asks blkid, a RAID's last of all, which lies at the end.
///
/// # Errors
/// wipefs says why.
pub fn erase(path: &Path) -> Result<(), ProbeError> {
    let mut wipefs = Command::new("wipefs");
    let (code, text) = run(
        wipefs.args(["--all", "--force", "--quiet", "--"]).arg(path),
        path,
    )?;
    if code == Some(0) {
        return Ok(());
    }
    Err(ProbeError::Examine {
        path: path.to_path_buf(),
        what: format!("its signatures could not be erased: {}", text.trim()),
    })
}

fn blkid(path: &Path, args: &[&str]) -> Result<(Option<i32>, String), ProbeError> {
    run(Command::new("blkid").args(args).arg("--").arg(path), path)
}

/// Runs a command to its end, or kills it at the deadline: exit code and output.
fn run(command: &mut Command, path: &Path) -> Result<(Option<i32>, String), ProbeError> {
    let failed = |source| ProbeError::Blkid {
        path: path.to_path_buf(),
        source,
    };
    // Memory and not a pipe: there is nobody to empty it meanwhile. No disk may be in the way either.
    let output = memfd_create(c"output", MFdFlags::MFD_CLOEXEC).map_err(|e| failed(e.into()))?;
    let mut output = File::from(output);
    let child = command
        .stdin(Stdio::null())
        .stdout(output.try_clone().map_err(failed)?)
        .stderr(output.try_clone().map_err(failed)?)
        .env("LC_ALL", "C.UTF-8")
        .spawn();
    let mut child = child.map_err(failed)?;
    let code = wait(&mut child).map_err(failed)?;
    let Some(code) = code else {
        return Err(ProbeError::Examine {
            path: path.to_path_buf(),
            what: format!("no answer in {} s", DEADLINE.as_secs()),
        });
    };
    let mut bytes = Vec::new();
    output.seek(SeekFrom::Start(0)).map_err(failed)?;
    output
        .take(OUTPUT_MAX_BYTES)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    Ok((code, String::from_utf8_lossy(&bytes).into_owned()))
}

/// The exit code (none after a signal); none at all if the deadline came first.
fn wait(child: &mut Child) -> io::Result<Option<Option<i32>>> {
    let end = Instant::now() + DEADLINE;
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.code()));
        }
        if Instant::now() > end {
            child.kill()?;
            child.wait()?;
            return Ok(None);
        }
        std::thread::sleep(POLL);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(bytes: u64) -> tempfile::NamedTempFile {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        file
    }

    fn put(file: &tempfile::NamedTempFile, at: u64, bytes: &[u8]) {
        file.as_file().write_all_at(bytes, at).unwrap();
    }

    #[test]
    fn blank_unknown_and_swap_are_told_apart() {
        let image = file(1 << 20);
        assert_eq!(look(image.path()).unwrap(), Contents::Blank);
        put(&image, (1 << 20) - 1, b"x");
        assert_eq!(look(image.path()).unwrap(), Contents::Unknown);
        // Page size 4096: linux include/linux/swap.h.
        put(&image, 1024, &[1, 0, 0, 0, 255, 0, 0, 0, 0, 0, 0, 0]);
        put(&image, 1036, &[7; 16]);
        put(&image, 4086, b"SWAPSPACE2");
        let found = look(image.path()).unwrap();
        assert_eq!(found.to_string(), "swap space");
        assert!(found.is_recognised() && found.filesystem().is_none());
    }

    #[test]
    fn a_store_of_ours_is_told_before_anything_else() {
        let image = file(1 << 20);
        put(&image, 64 << 10, b"ddsnapSB");
        assert_eq!(look(image.path()).unwrap().to_string(), "a snapshot store");
        let small = file(512);
        assert_eq!(look(small.path()).unwrap(), Contents::Blank);
    }

    #[test]
    fn what_blkid_says() {
        let ext =
            parse("DEVNAME=/dev/x\nLABEL=home\nUUID=1\nTYPE=ext4\nUSAGE=filesystem\n").unwrap();
        assert_eq!(ext.to_string(), "a file system (ext4) labelled 'home'");
        assert_eq!(ext.usage, Usage::Filesystem);
        let pv = parse("TYPE=LVM2_member\nUSAGE=raid\n").unwrap();
        assert_eq!(
            (pv.usage, pv.to_string()),
            (Usage::Other, "an LVM physical volume".into())
        );
        let pool = parse("TYPE=zfs_member\nUSAGE=filesystem\n").unwrap();
        assert_eq!(pool.usage, Usage::Other);
        let table = parse("PTUUID=1\nPTTYPE=dos\n").unwrap();
        assert_eq!(table.to_string(), "a partition table (dos)");
        assert_eq!(parse(""), None);
    }

    /// No volume could be defined on a partition without contents: what blkid says of each partition was taken
    /// for an answer that makes no sense.
    #[test]
    fn a_partition_entry_is_no_contents() {
        let entry =
            "DEVNAME=/dev/x2\nPART_ENTRY_SCHEME=gpt\nPART_ENTRY_NUMBER=2\nPART_ENTRY_NAME=a\\ b\n";
        assert!(is_of_partition_only(entry));
        assert!(!is_of_partition_only(&format!("{entry}PTTYPE=dos\n")));
        assert!(!is_of_partition_only(&format!("{entry}TYPE=ext4\n")));
        assert!(!is_of_partition_only("DEVNAME=/dev/x2\n"));
    }

    /// A snapshot of a file system with a journal elsewhere was mounted with the origin's live journal.
    #[test]
    fn parts_on_other_devices_are_seen() {
        let mut head = vec![0; 128 << 10];
        head[1024 + 0x5c] = 0x4;
        let clean = Some(Elsewhere::ExtJournal { in_use: false });
        assert_eq!(elsewhere(&head, "ext4"), clean);
        head[1024 + 0x60] = 0x4;
        assert_eq!(
            elsewhere(&head, "ext3"),
            Some(Elsewhere::ExtJournal { in_use: true })
        );
        head[1024 + 0xe0] = 8;
        assert_eq!(elsewhere(&head, "ext4"), None);
        assert_eq!(elsewhere(&head, "xfs"), Some(Elsewhere::XfsLog));
        head[55] = 1;
        assert_eq!(elsewhere(&head, "xfs"), None);
        head[(64 << 10) + 0x88] = 2;
        assert_eq!(elsewhere(&head, "btrfs"), Some(Elsewhere::Btrfs));
    }

    #[test]
    fn what_cannot_be_read_is_not_blank() {
        let error = look(Path::new("/none/such")).unwrap_err();
        assert_eq!(error.to_string(), "could not read '/none/such' at byte 0");
    }
}
