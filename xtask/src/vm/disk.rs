// SPDX-License-Identifier: GPL-2.0-only
//! Disk images, by qemu-img.

use std::ffi::OsStr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

/// A blank disk of `size` (`2G`, `300M`), sparse.
pub fn create_blank(path: &Path, size: &str) -> Result<()> {
    qemu_img(&[
        "create".as_ref(),
        "-q".as_ref(),
        "-f".as_ref(),
        "qcow2".as_ref(),
        path.as_ref(),
        size.as_ref(),
    ])
}

/// A disk that starts with the content of the raw image `base` and leaves it untouched.
pub fn create_overlay(path: &Path, base: &Path) -> Result<()> {
    qemu_img(&[
        "create".as_ref(),
        "-q".as_ref(),
        "-f".as_ref(),
        "qcow2".as_ref(),
        "-F".as_ref(),
        "raw".as_ref(),
        "-b".as_ref(),
        base.as_ref(),
        path.as_ref(),
    ])
}

/// Copies a disk with its internal snapshots, sharing blocks where the file
/// system of the host can.
pub fn copy(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp")
        .args(["--reflink=auto", "--sparse=always", "--"])
        .args([from, to])
        .status()
        .context("cannot run cp")?;
    if !status.success() {
        bail!("cannot copy {} to {}", from.display(), to.display());
    }
    Ok(())
}

fn qemu_img(args: &[&OsStr]) -> Result<()> {
    let out = Command::new("qemu-img")
        .args(args)
        .output()
        .context("cannot run qemu-img")?;
    if !out.status.success() {
        bail!(
            "qemu-img failed: {}",
            String::from_utf8_lossy(&out.stderr).trim()
        );
    }
    Ok(())
}
