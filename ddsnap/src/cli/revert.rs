// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap revert`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;
use nix::libc;

use super::progress::bar;
use super::{Target, refused};
use crate::stdio::complain;

/// Give the volume the content it had when a snapshot was taken.
///
/// Every snapshot keeps its content. The volume must not be mounted, and no snapshot may have a device.
/// The server does it: interrupting this command does not end the revert, and a server that is restarted
/// goes on with it before any device comes up.
#[derive(Debug, Args)]
pub struct Revert {
    #[command(flatten)]
    target: Target,
}

impl Revert {
    pub fn run(&self) -> Result<u8> {
        let (tag, socket) = (self.target.tag, &self.target.socket);
        let mut client = self.target.connect()?;
        let origin = match volume_of(socket) {
            Some(name) => hold(&Path::new("/dev/mapper").join(name))?,
            None => None,
        };
        let verb = format!("revert to snapshot {tag}");
        let origin = match origin {
            Some(Held::Free(file, path)) => Some((file, path)),
            Some(Held::InUse(path)) => {
                let path = path.display();
                complain(format_args!(
                    "could not {verb} because {path} is in use; unmount it first"
                ));
                return Ok(1);
            }
            None => None,
        };
        let bar = bar()?;
        bar.println("the revert goes on in the server if this command is interrupted");
        let result = client.revert(tag, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        if let Some((file, path)) = &origin {
            // Whether it is done or not: what the kernel remembers of the volume may be old now.
            forget_cached(file)
                .with_context(|| format!("{}: cannot drop old cached data", path.display()))?;
        }
        match result {
            Ok(0) => Ok(0),
            Ok(skipped) => {
                complain(format_args!(
                    "{skipped} chunks could not be read and are as they were; the server's log names them"
                ));
                Ok(1)
            }
            Err(error) => refused(&verb, Err(error)),
        }
    }
}

/// The volume that a server's socket is named after.
fn volume_of(socket: &str) -> Option<&str> {
    let name = socket.strip_prefix('@').unwrap_or(socket);
    Path::new(name).file_name()?.to_str()
}

/// The volume's device, if it exists.
enum Held {
    /// Nobody uses it, and nobody can mount it while it is open.
    Free(File, PathBuf),
    /// It is mounted, or a part of something else.
    InUse(PathBuf),
}

fn hold(path: &Path) -> Result<Option<Held>> {
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_EXCL)
        .open(path);
    match opened {
        Ok(file) => Ok(Some(Held::Free(file, path.to_owned()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
            Ok(Some(Held::InUse(path.to_owned())))
        }
        Err(error) => Err(error).with_context(|| format!("cannot open {}", path.display())),
    }
}

mod ioctl {
    #![allow(missing_docs, reason = "the macro makes public functions")]
    // _IO(0x12, 97) of linux/fs.h
    nix::ioctl_none!(blkflsbuf, 0x12, 97);
}

fn forget_cached(file: &File) -> io::Result<()> {
    // SAFETY: BLKFLSBUF takes no argument and writes to no memory of ours.
    unsafe { ioctl::blkflsbuf(file.as_raw_fd()) }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_has_the_name_of_its_socket() {
        for (socket, name) in [
            ("/var/run/zumastor/servers/home", Some("home")),
            ("@home", Some("home")),
            ("@run/home", Some("home")),
            ("home", Some("home")),
            ("/", None),
        ] {
            assert_eq!(volume_of(socket), name, "{socket}");
        }
    }

    #[test]
    fn a_device_that_is_not_there_needs_no_holding() {
        let dir = tempfile::tempdir().expect("a directory");
        assert!(hold(&dir.path().join("none")).expect("fine").is_none());
        let file = dir.path().join("file");
        File::create(&file).expect("a file");
        assert!(matches!(hold(&file), Ok(Some(Held::Free(..)))));
    }
}
