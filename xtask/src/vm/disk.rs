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

/// Copies a disk with its internal snapshots, sharing blocks where the file
/// system of the host can.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let sh = Shell::new()?;
    cmd!(sh, "cp --reflink=auto --sparse=always -- {from} {to}")
        .quiet()
        .run()?;
    Ok(())
}
