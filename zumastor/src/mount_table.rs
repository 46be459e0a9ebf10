// SPDX-License-Identifier: GPL-2.0-only
//! What is mounted where.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use anyhow::{Context, Result};

use crate::device_number;
use crate::machine::{Dev, Mount};

/// The mount table of this process.
///
/// A btrfs numbers its mounts by itself; here, too, `dev` is the device it lies on, as its source says.
pub fn table() -> Result<Vec<Mount>> {
    let text = fs::read("/proc/self/mountinfo").context("could not read the mount table")?;
    let mut mounts: Vec<Mount> = text.split(|b| *b == b'\n').filter_map(parse_line).collect();
    for mount in mounts.iter_mut().filter(|m| m.fstype == "btrfs") {
        if let Ok(dev) = device_number::number(&mount.source) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

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
