// SPDX-License-Identifier: GPL-2.0-only
//! From the path of a block device to its number.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use anyhow::{Context, Result, bail};
use nix::libc;

use crate::machine::Dev;

/// The number of the block device at `path`.
pub fn number(path: &Path) -> Result<Dev> {
    let meta = match fs::metadata(path) {
        Ok(meta) => meta,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            bail!("device '{}' does not exist", path.display())
        }
        Err(e) => return Err(e).with_context(|| format!("could not look at '{}'", path.display())),
    };
    if !meta.file_type().is_block_device() {
        bail!("'{}' is not a block device", path.display());
    }
    Ok(from_raw(meta.rdev()))
}

/// The number as the kernel has it in a `stat`.
#[must_use]
pub fn from_raw(dev: u64) -> Dev {
    Dev {
        major: libc::major(dev),
        minor: libc::minor(dev),
    }
}
