// SPDX-License-Identifier: GPL-2.0-only
//! Disk images, by qemu-img.

use std::path::Path;

use anyhow::{Context, Result};
use xshell::{Shell, cmd};

use super::lossy::Lossy;
use crate::paths;

/// A blank disk of `size` (`2G`, `300M`), sparse.
pub fn create_blank(path: &Path, size: &str) -> Result<()> {
    let sh = Shell::new()?;
    cmd!(sh, "qemu-img create -q -f qcow2 {path} {size}")
        .quiet()
        .run()?;
    Ok(())
}

/// A disk that starts with the content of the raw image `base` and leaves it untouched.
pub fn create_overlay(path: &Path, base: &Path) -> Result<()> {
    let sh = Shell::new()?;
    cmd!(sh, "qemu-img create -q -f qcow2 -F raw -b {base} {path}")
        .quiet()
        .run()?;
    Ok(())
}

/// The length of a disk in bytes, as the guest sees it.
pub fn bytes(path: &Path) -> Result<u64> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "kebab-case")]
    struct Info {
        virtual_size: u64,
    }
    let sh = Shell::new()?;
    let json = cmd!(sh, "qemu-img info --force-share --output=json {path}")
        .quiet()
        .read()?;
    let info: Info = serde_json::from_str(&json)?;
    Ok(info.virtual_size)
}

/// Writes what the internal snapshot `name` of a disk holds to a raw, sparse file.
pub fn extract(path: &Path, name: &str, to: &Path) -> Result<()> {
    let sh = Shell::new()?;
    let snapshot = format!("snapshot.name={name}");
    cmd!(
        sh,
        "qemu-img convert -f qcow2 -l {snapshot} -O raw {path} {to}"
    )
    .quiet()
    .run()?;
    Ok(())
}

/// Where the content of a disk is that no guest uses now.
pub enum Source<'a> {
    /// In a qcow2 file.
    File(&'a Path),
    /// Disk `.1` of these.
    Lossy(&'a Lossy, usize),
}

/// Copies the last of the files in `/boot` of the ext4 file system on a disk whose names begin with `prefix` to
/// `to`; works in a directory beside that. The disk itself is left as it is.
pub fn copy_from_boot(disk: Source, prefix: &str, to: &Path) -> Result<()> {
    let work = to.with_extension("work");
    paths::fresh_dir(&work)?;
    let raw = work.join("disk.raw");
    let sh = Shell::new()?;
    match disk {
        Source::File(path) => cmd!(sh, "qemu-img convert -f qcow2 -O raw {path} {raw}"),
        Source::Lossy(lossy, index) => {
            let socket = lossy.socket();
            let socket = socket.display();
            let export = format!("nbd+unix:///disk{index}?socket={socket}");
            cmd!(sh, "qemu-img convert -f raw -O raw {export} {raw}")
        }
    }
    .quiet()
    .run()?;
    // After a power cut the newest of it is in the file system's journal; 1 says that there was something to do.
    let checked = cmd!(sh, "e2fsck -p {raw}")
        .quiet()
        .ignore_status()
        .output()?;
    if !matches!(checked.status.code(), Some(0 | 1)) {
        anyhow::bail!(
            "the guest's root file system is damaged: {}{}",
            String::from_utf8_lossy(&checked.stdout),
            String::from_utf8_lossy(&checked.stderr)
        );
    }
    // /inode/mode/uid/gid/name/size/
    let list = "ls -p /boot";
    let listing = cmd!(sh, "debugfs -R {list} {raw}")
        .quiet()
        .ignore_stderr()
        .read()?;
    let names = listing.lines().filter_map(|line| line.split('/').nth(5));
    let name = names.filter(|name| name.starts_with(prefix)).max();
    let name = name.with_context(|| format!("the guest has no /boot/{prefix}*"))?;
    let found = work.join("found");
    let dump = format!("dump /boot/{name} {}", found.display());
    cmd!(sh, "debugfs -R {dump} {raw}")
        .quiet()
        .ignore_stderr()
        .run()?;
    std::fs::rename(&found, to)
        .with_context(|| format!("cannot read /boot/{name} of the guest"))?;
    paths::remove_dir(&work)
}

/// Copies a disk with its internal snapshots, sharing blocks where the file
/// system of the host can.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let sh = Shell::new()?;
    cmd!(sh, "cp --reflink=auto --sparse=always -- {from} {to}")
        .quiet()
        .run()?;
    Ok(())
}
