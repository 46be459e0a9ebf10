// SPDX-License-Identifier: GPL-2.0-only
//! Whether the kernel has the target at all.
//!
//! A server without the channel makes snapshots without a barrier: there are no devices, so nothing is
//! written. Were that wrong, a device would go on writing to chunks it knows to be unique, and the new
//! snapshot would show newer data without any error. So a `/dev/ddsnap` that is not there proves
//! nothing: it may have been deleted, or the server may run in a chroot, in a container or with
//! `PrivateDevices=`. Absent is only what the kernel itself calls absent: `/proc/misc` has no such
//! device, the module is not loaded, and device-mapper, where it can be asked, has no such target.
//! Everything else is a refusal with a sentence.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use nix::errno::Errno;
use nix::sys::statfs::{FsType, PROC_SUPER_MAGIC, fstatfs};

use super::link::LinkError;
use crate::protocol::channel;

/// Where the channel and what the kernel says about it are looked for.
#[derive(Clone, Copy, Debug)]
pub struct Place<'a> {
    root: &'a Path,
    /// The file system of `/proc`: an empty file mounted over one of its files says nothing.
    proc_type: FsType,
}

/// What the kernel says of the channel.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    /// There is none, and no target.
    Absent,
    /// There is one.
    Listed {
        minor: u32,
    },
    Unclear(String),
}

impl Place<'_> {
    /// Where the running system has them.
    #[must_use]
    pub fn system() -> Place<'static> {
        Place {
            root: Path::new("/"),
            proc_type: PROC_SUPER_MAGIC,
        }
    }

    /// Opens the channel.
    ///
    /// # Errors
    /// [`LinkError::Absent`] if the kernel has none; [`LinkError::Hidden`] if it has one that is not to
    /// be seen or opened here; [`LinkError::Unclear`] if that cannot be told.
    pub fn open(self) -> Result<File, LinkError> {
        match self.try_open()? {
            Some(file) => Ok(file),
            None => match self.look() {
                Seen::Absent => Err(LinkError::Absent),
                Seen::Unclear(why) => Err(LinkError::Unclear { why }),
                // The module may have come up since: the node is made before it is listed.
                Seen::Listed { minor } => match self.try_open()? {
                    Some(file) => Ok(file),
                    None => Err(LinkError::Hidden { minor }),
                },
            },
        }
    }

    fn try_open(self) -> Result<Option<File>, LinkError> {
        let path = self.file(channel::DEVICE);
        match OpenOptions::new().read(true).write(true).open(path) {
            Ok(file) => Ok(Some(file)),
            Err(source) => match source.raw_os_error().map(Errno::from_raw) {
                // A node without a driver is as good as none.
                Some(Errno::ENOENT | Errno::ENOTDIR | Errno::ENXIO | Errno::ENODEV) => Ok(None),
                Some(Errno::EPERM | Errno::EACCES) => Err(LinkError::Forbidden { source }),
                _ => Err(LinkError::System {
                    doing: "open it",
                    source,
                }),
            },
        }
    }

    fn look(self) -> Seen {
        let misc = match self.read_proc("/proc/misc") {
            Ok(Some(misc)) => misc,
            Ok(None) => return Seen::Unclear("there is no /proc/misc".to_owned()),
            Err(error) => return Seen::Unclear(format!("cannot read /proc/misc: {error}")),
        };
        if let Some(minor) = misc.lines().find_map(minor_in) {
            return Seen::Listed { minor };
        }
        // A kernel without modules has no such file.
        let modules = match self.read_proc("/proc/modules") {
            Ok(modules) => modules.unwrap_or_default(),
            Err(error) => return Seen::Unclear(format!("cannot read /proc/modules: {error}")),
        };
        let loaded = |line: &str| line.split(' ').next() == Some("dm_ddsnap");
        if modules.lines().any(loaded) || self.file("/sys/module/dm_ddsnap").exists() {
            return Seen::Unclear(
                "the module dm-ddsnap is there without its channel: it is just being loaded or removed"
                    .to_owned(),
            );
        }
        match self.has_target() {
            Some(true) => Seen::Unclear(
                "device-mapper has the target ddsnap, but there is no channel".to_owned(),
            ),
            _ => Seen::Absent,
        }
    }

    fn file(self, path: &str) -> std::path::PathBuf {
        self.root.join(path.trim_start_matches('/'))
    }

    /// The text of a file of `/proc`, which must be the kernel's own.
    fn read_proc(self, path: &str) -> io::Result<Option<String>> {
        let file = match File::open(self.file(path)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        if fstatfs(&file)?.filesystem_type() != self.proc_type {
            return Err(io::Error::other("something else is mounted over it"));
        }
        io::read_to_string(file).map(Some)
    }

    /// Whether device-mapper has the target; `None` if it cannot be asked.
    fn has_target(self) -> Option<bool> {
        let path = self.file("/dev/mapper/control");
        if !fs::metadata(&path).ok()?.file_type().is_char_device() {
            return None;
        }
        let control = OpenOptions::new().read(true).write(true).open(path).ok()?;
        let mut buffer = vec![0; TARGETS_BYTES];
        for (at, field) in [(0, 4_u32), (12, TARGETS_BYTES as u32), (16, HEADER_BYTES)] {
            buffer[at..at + 4].copy_from_slice(&field.to_ne_bytes());
        }
        // SAFETY: the descriptor is open, and the buffer is as long as its data_size field says, which is
        // as much as the kernel reads and writes.
        let result = unsafe {
            nix::libc::ioctl(control.as_raw_fd(), LIST_VERSIONS as _, buffer.as_mut_ptr())
        };
        (result == 0).then(|| targets(&buffer).any(|name| name == b"ddsnap"))
    }
}

/// `struct dm_ioctl` and room for more targets than there are.
const TARGETS_BYTES: usize = 64 << 10;
/// Bytes of `struct dm_ioctl`.
const HEADER_BYTES: u32 = 312;
/// `DM_LIST_VERSIONS`.
const LIST_VERSIONS: u32 = 3 << 30 | HEADER_BYTES << 16 | 0xfd << 8 | 13;

/// The names in an answer to `DM_LIST_VERSIONS`: from data_start on, each with the distance to the next
/// one, three numbers, and a text with a NUL.
fn targets(answer: &[u8]) -> impl Iterator<Item = &[u8]> {
    let number = |at: usize| {
        let bytes = answer.get(at..at.checked_add(4)?)?;
        Some(u32::from_ne_bytes(bytes.try_into().ok()?) as usize)
    };
    let mut next = number(16);
    std::iter::from_fn(move || {
        let at = next?;
        let name = answer.get(at.checked_add(16)?..)?;
        next = number(at).filter(|&far| far > 0).map(|far| at + far);
        name.split(|&byte| byte == 0).next()
    })
}

/// The minor number in a line of `/proc/misc`, if it is the channel's.
fn minor_in(line: &str) -> Option<u32> {
    let (minor, name) = line.trim_start().split_once(' ')?;
    (name == "ddsnap").then(|| minor.parse().ok())?
}

#[cfg(test)]
mod tests {
    use nix::sys::statfs::statfs;

    use super::*;

    /// A root directory with these files.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    fn open(root: &tempfile::TempDir) -> Result<File, LinkError> {
        let root = root.path();
        let proc_type = statfs(root).unwrap().filesystem_type();
        Place { root, proc_type }.open()
    }

    const NO_MISC: (&str, &str) = ("proc/misc", "237 loop-control\n236 device-mapper\n");
    const MISC: (&str, &str) = ("proc/misc", "236 device-mapper\n 59 ddsnap\n");
    const NO_MODULE: (&str, &str) = ("proc/modules", "dm_mod 1 0 - Live 0x0\n");
    const MODULE: (&str, &str) = ("proc/modules", "dm_ddsnap 1 0 - Loading 0x0\n");

    #[test]
    fn absent_is_what_the_kernel_calls_absent() {
        for files in [&[NO_MISC, NO_MODULE][..], &[NO_MISC]] {
            assert!(matches!(open(&root(files)), Err(LinkError::Absent)));
        }
    }

    /// A server with /dev/ddsnap deleted took the kernel for one without devices and made a snapshot
    /// without a barrier: it showed what was written after it.
    #[test]
    fn a_node_that_is_missing_proves_nothing() {
        let error = open(&root(&[MISC, MODULE])).unwrap_err();
        assert!(
            matches!(error, LinkError::Hidden { minor: 59 }),
            "{error:?}"
        );
        assert!(
            error
                .to_string()
                .contains("mknod -m 600 /dev/ddsnap c 10 59")
        );
    }

    #[test]
    fn what_cannot_be_told_is_refused() {
        for files in [
            // No /proc, or one of processes alone.
            &[][..],
            &[NO_MODULE],
            // The module is being loaded, or removed.
            &[NO_MISC, MODULE],
            &[NO_MISC, NO_MODULE, ("sys/module/dm_ddsnap/refcnt", "0\n")],
        ] {
            let error = open(&root(files)).unwrap_err();
            assert!(matches!(error, LinkError::Unclear { .. }), "{error:?}");
        }
        // Something mounted over the file: its file system is not the one of /proc.
        let root = root(&[NO_MISC, NO_MODULE]);
        let place = Place {
            root: root.path(),
            proc_type: PROC_SUPER_MAGIC,
        };
        let error = place.open().unwrap_err();
        assert!(matches!(error, LinkError::Unclear { .. }), "{error:?}");
    }

    #[test]
    fn the_channel_is_opened_if_it_is_there() {
        open(&root(&[("dev/ddsnap", "")])).unwrap();
    }

    #[test]
    fn one_that_must_not_be_opened_is_not_absent() {
        let root = root(&[NO_MISC, NO_MODULE]);
        fs::create_dir_all(root.path().join("dev/ddsnap")).unwrap();
        // EISDIR here; EPERM is what a container's device rules give.
        let error = open(&root).unwrap_err();
        assert!(matches!(error, LinkError::System { .. }), "{error:?}");
    }

    #[test]
    fn targets_are_found_in_device_mapper_s_answer() {
        let mut answer = vec![0; 312];
        answer[16..20].copy_from_slice(&312_u32.to_ne_bytes());
        for (next, name) in [(32_u32, &b"striped\0"[..]), (0, b"ddsnap\0")] {
            answer.extend(next.to_ne_bytes());
            answer.extend([0; 12]);
            answer.extend(name);
            answer.resize(answer.len().next_multiple_of(8), 0);
            let end = answer.len();
            answer.resize(end.max(312 + next as usize), 0);
        }
        let found: Vec<&[u8]> = targets(&answer).collect();
        assert_eq!(found, [&b"striped"[..], b"ddsnap"]);
        // Distances that lead nowhere end it.
        answer[312..316].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert_eq!(targets(&answer).count(), 1);
        assert_eq!(targets(&answer[..100]).count(), 0);
        assert_eq!(LIST_VERSIONS, 0xc138_fd0d);
    }
}
