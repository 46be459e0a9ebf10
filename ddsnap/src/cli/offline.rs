// SPDX-License-Identifier: GPL-2.0-only
//! What the commands that read a store without its server share.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::device::lock::{Mode, StoreLock, share_store};
use crate::device::uring::{Access, UringDevice};
use crate::server::start::open_device;
use crate::store::{Devices, OpenOptions, StoreError, View};

/// Memory for index nodes.
pub const CACHE_BYTES: u64 = 64 << 20;

/// There is no sound store: exit code 99.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Unsound(#[from] pub StoreError);

/// Opens a device to write to it and takes it for itself, as a server would.
///
/// # Errors
/// Somebody holds or reads it, or it cannot be opened for writing.
pub fn hold(path: &Path) -> Result<UringDevice> {
    let mut device = open_device(path, Access::ReadWrite)?;
    device
        .lock(Mode::Exclusive)
        .with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(device)
}

/// Keeps servers off a store that is read; others may read it too.
///
/// # Errors
/// A server holds it, or it cannot be opened.
pub fn share(snapstore: &Path, meta: Option<&Path>) -> Result<Vec<StoreLock>> {
    let paths = meta.into_iter().chain([snapstore]);
    paths
        .map(|path| share_store(path).with_context(|| format!("cannot lock {}", path.display())))
        .collect()
}

/// The store on devices opened for reading.
///
/// # Errors
/// A device cannot be opened, or ([`Unsound`]) there is no sound store.
pub fn view(snapstore: &Path, origin: &Path, meta: Option<&PathBuf>) -> Result<View> {
    let devices = Devices {
        origin: Box::new(open_device(origin, Access::Read)?),
        data: Box::new(open_device(snapstore, Access::Read)?),
        meta: match meta {
            Some(meta) => Some(Box::new(open_device(meta, Access::Read)?)),
            None => None,
        },
    };
    let options = OpenOptions {
        cache_bytes: CACHE_BYTES,
    };
    let (view, _) = View::open(devices, &options).map_err(Unsound)?;
    Ok(view)
}
