// SPDX-License-Identifier: GPL-2.0-only
//! What the commands that read a store without its server share.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::device::lock::{LockError, Mode, StoreLock, name_of, share_store_within};
use crate::device::uring::{Access, UringDevice};
use crate::server::start::open_device;
use crate::stdio::complain;
use crate::store::{Devices, OpenOptions, StoreError, View};

/// Memory for index nodes.
pub const CACHE_BYTES: u64 = 64 << 20;

/// How long a server that is ending may take to close its store. One that goes on is refused after that.
const PATIENCE: Duration = Duration::from_secs(5);
/// After so long it is said who is waited for.
const QUIET: Duration = Duration::from_secs(1);

/// There is no sound store: exit code 99.
#[derive(Debug, thiserror::Error)]
#[error(transparent)]
pub struct Unsound(#[from] pub StoreError);

/// Opens a device to write to it and takes it for itself, as a server would.
///
/// # Errors
/// Somebody holds or reads it and goes on to, or it cannot be opened for writing.
pub fn hold(path: &Path) -> Result<UringDevice> {
    let mut device = open_device(path, Access::ReadWrite)?;
    device
        .lock_within(Mode::Exclusive, PATIENCE, QUIET, |holder| {
            tell(path, holder)
        })
        .with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(device)
}

/// Keeps servers off one device; others may read it too.
///
/// # Errors
/// A server holds it and goes on to, or it cannot be opened.
pub fn share_one(path: &Path) -> Result<StoreLock, LockError> {
    share_store_within(path, PATIENCE, QUIET, |holder| tell(path, holder))
}

fn tell(path: &Path, holder: Option<u32>) {
    complain(format_args!(
        "ddsnap: {} holds {}; waiting up to {} s for it to let go",
        name_of(holder),
        path.display(),
        PATIENCE.as_secs()
    ));
}

/// Keeps servers off a store that is read; others may read it too.
///
/// # Errors
/// A server holds it and goes on to, or it cannot be opened.
pub fn share(snapstore: &Path, meta: Option<&Path>) -> Result<Vec<StoreLock>> {
    let paths = meta.into_iter().chain([snapstore]);
    paths
        .map(|path| share_one(path).with_context(|| format!("cannot lock {}", path.display())))
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
