// SPDX-License-Identifier: GPL-2.0-only
//! Freezing file systems around the creation of a snapshot.
//!
//! A frozen file system has written out everything and starts no new write, so the snapshot needs no
//! recovery. Three things keep a freeze from becoming a hang: between freeze and thaw nothing happens
//! but the bounded call to the server (no log line, no configuration: /var may be on that file
//! system); [`Frozen`] thaws however that call ends; and a process of its own, the [`thaw_guard`](crate::thaw_guard),
//! thaws when the daemon dies in between, or hangs for longer than any call may take. Should all of them be
//! killed, the next daemon thaws before it writes anything.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use ddsnap::stdio::complain;
use nix::errno::Errno;
use nix::libc::c_int;

use crate::host::{FreezeGuard, Host};
use crate::machine::{Dev, Mount};

nix::ioctl_readwrite!(
    /// FIFREEZE; the argument is ignored.
    fifreeze,
    b'X',
    119,
    c_int
);
nix::ioctl_readwrite!(
    /// FITHAW; the argument is ignored.
    fithaw,
    b'X',
    120,
    c_int
);

/// Freezes the file system mounted on `dir`; false if there is nothing to thaw afterwards, because
/// somebody else froze it or it cannot be frozen (vfat: its device is flushed all the same).
pub fn freeze(dir: &Path) -> Result<bool> {
    let file = File::open(dir).with_context(|| format!("could not open {}", dir.display()))?;
    let mut argument = 0;
    // SAFETY: the ioctl takes an int argument, which is valid for the call, and ignores it.
    match unsafe { fifreeze(file.as_raw_fd(), &raw mut argument) } {
        Ok(_) => Ok(true),
        Err(Errno::EBUSY | Errno::EOPNOTSUPP) => Ok(false),
        Err(e) => Err(e).with_context(|| format!("could not freeze {}", dir.display())),
    }
}

/// Thaws the file system mounted on `dir`; succeeds if it was not frozen.
pub fn thaw(dir: &Path) -> Result<()> {
    let file = File::open(dir).with_context(|| format!("could not open {}", dir.display()))?;
    thaw_open(&file).with_context(|| format!("could not thaw {}", dir.display()))
}

/// Thaws the file system of an open directory; succeeds if it was not frozen.
pub fn thaw_open(dir: &File) -> nix::Result<()> {
    let mut argument = 0;
    // SAFETY: as above.
    match unsafe { fithaw(dir.as_raw_fd(), &raw mut argument) } {
        Ok(_) | Err(Errno::EINVAL | Errno::EOPNOTSUPP) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// One mount point for each file system that lives on device `origin`.
#[must_use]
pub fn mounts_of(mounts: &[Mount], origin: Dev) -> Vec<PathBuf> {
    let first = mounts.iter().find(|m| m.dev == origin);
    first.map(|m| m.dir.clone()).into_iter().collect()
}

/// Frozen file systems; thawed when this goes away.
pub struct Frozen<'a> {
    host: &'a dyn Host,
    guard: Box<dyn FreezeGuard>,
    /// With the number each has for the guard.
    dirs: Vec<(usize, PathBuf)>,
}

impl<'a> Frozen<'a> {
    /// Freezes the file systems mounted on `dirs`; if one fails, none stays frozen.
    pub fn new(host: &'a dyn Host, dirs: &[PathBuf]) -> Result<Frozen<'a>> {
        let mut frozen = Frozen {
            host,
            guard: host.freeze_guard(dirs)?,
            dirs: Vec::new(),
        };
        for (number, dir) in dirs.iter().enumerate() {
            // Told before: what the guard does not know of stays frozen if this process dies now.
            frozen.guard.arm(number)?;
            if host.freeze(dir)? {
                frozen.dirs.push((number, dir.clone()));
            } else {
                frozen.guard.disarm(number)?;
            }
        }
        Ok(frozen)
    }

    /// Thaws all; on failure goes on with the others and returns the first error.
    pub fn thaw(mut self) -> Result<()> {
        self.thaw_all()
    }

    fn thaw_all(&mut self) -> Result<()> {
        let mut first = Ok(());
        for (number, dir) in std::mem::take(&mut self.dirs).iter().rev() {
            let thawed = self.host.thaw(dir);
            // What could not be thawed here is left to the guard.
            first = first.and(thawed.and_then(|()| self.guard.disarm(*number)));
        }
        first
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        // Only reached with something frozen when the caller is failing already.
        if let Err(error) = self.thaw_all() {
            complain(format_args!("{error:#}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_mounted_twice_is_frozen_once() {
        let mount = |dir: &str, minor| Mount {
            dev: Dev { major: 253, minor },
            dir: dir.into(),
            source: "/dev/mapper/v".into(),
            fstype: "ext4".into(),
        };
        let mounts = [
            mount("/", 1),
            mount("/var/mount/zumastor/v", 2),
            mount("/srv", 2),
        ];
        let dirs = mounts_of(
            &mounts,
            Dev {
                major: 253,
                minor: 2,
            },
        );
        assert_eq!(dirs, [PathBuf::from("/var/mount/zumastor/v")]);
        assert!(
            mounts_of(
                &mounts,
                Dev {
                    major: 253,
                    minor: 9
                }
            )
            .is_empty()
        );
    }

    #[test]
    fn thawing_what_is_not_frozen_succeeds() {
        let dir = tempfile::tempdir().expect("a directory");
        // Without the right to freeze (no root in a container) the answer is EPERM, an error.
        if nix::unistd::geteuid().is_root() {
            let result = thaw(dir.path());
            assert!(result.is_ok() || result.is_err_and(|e| format!("{e:#}").contains("EPERM")));
        }
    }
}
