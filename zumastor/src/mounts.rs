// SPDX-License-Identifier: GPL-2.0-only
//! The mount table, mounting and unmounting.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::machine::{Busy, Dev, Mount};
use crate::{blockdev, process};

/// Longest wait for mount: a journal may have to be replayed.
const MOUNT_DEADLINE: Duration = Duration::from_secs(300);

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
