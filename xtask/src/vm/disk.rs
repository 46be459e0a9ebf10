// SPDX-License-Identifier: GPL-2.0-only
//! Disk images, by qemu-img.

use std::path::Path;

use anyhow::Result;
use xshell::{Shell, cmd};

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

/// Copies a disk with its internal snapshots, sharing blocks where the file
/// system of the host can.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let sh = Shell::new()?;
    cmd!(sh, "cp --reflink=auto --sparse=always -- {from} {to}")
        .quiet()
        .run()?;
    Ok(())
}
