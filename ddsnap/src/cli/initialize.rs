// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap initialize`.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context, Error, Result, bail};
use clap::Args;

use super::numbers::bytes;
use super::offline;
use crate::device::BlockDevice;
use crate::device::identity::distinct;
use crate::device::lock::share_store;
use crate::device::uring::Access;
use crate::server::start::open_device;
use crate::stdio::{complain, print};
use crate::store::{Devices, InitOptions, Store};
use crate::units::ChunkShift;

/// Chunk and block size if neither is given, in bytes.
const DEFAULT_BYTES: u64 = 4096;
/// The smallest journal the store takes; smaller wishes are rounded up, in bytes.
const LEAST_JOURNAL_BYTES: u64 = 64 << 10;

/// Make an empty snapshot store. What the origin holds is not touched.
///
/// Devices that a server holds are refused, and so is an origin that holds a store itself.
#[derive(Debug, Args)]
pub struct Initialize {
    /// Device or file that is to keep the snapshots; everything on it is lost.
    #[arg(value_name = "SNAPSTORE")]
    snapstore: PathBuf,
    /// The volume whose snapshots it will keep.
    #[arg(value_name = "ORIGIN")]
    origin: PathBuf,
    /// Device or file for metadata, if it is to have one of its own; everything on it is lost.
    #[arg(value_name = "METADEV")]
    meta: Option<PathBuf>,
    /// Do not ask before a store is overwritten.
    #[arg(short, long)]
    yes: bool,
    /// Size of the journal: bytes, or with k, m or g; rounded up. Default: a 64th of the
    /// device, or a 16th of METADEV, at most 64m.
    #[arg(short, long, value_name = "SIZE", value_parser = bytes, allow_negative_numbers = true)]
    journalsize: Option<u64>,
    /// Block size, for old scripts: checked as ever, but metadata blocks always have 4096 bytes.
    #[arg(short, long, value_name = "SIZE", value_parser = bytes, allow_negative_numbers = true)]
    blocksize: Option<u64>,
    /// Chunk size, 512 to 1m, a power of two: what is copied when the origin changes. Default: 4k.
    #[arg(short, long, value_name = "SIZE", value_parser = bytes, allow_negative_numbers = true)]
    chunksize: Option<u64>,
}

impl Initialize {
    pub fn run(&self) -> Result<u8> {
        let chunk = chunk_size(self.chunksize, self.blocksize, self.meta.is_some())?;
        let meta = self.meta.as_deref();
        let paths: Vec<&Path> = [&*self.snapstore, &*self.origin]
            .into_iter()
            .chain(meta)
            .collect();
        distinct(&paths).map_err(Error::msg)?;
        let held_meta = meta.map(offline::hold).transpose()?;
        let data = offline::hold(&self.snapstore)?;
        // A store, or the origin of another server, is given in its place by mistake.
        let _origin = share_store(&self.origin)
            .with_context(|| format!("cannot use {} as origin", self.origin.display()))?;
        let mut devices = Devices {
            origin: Box::new(open_device(&self.origin, Access::Read)?),
            data: Box::new(data),
            meta: held_meta.map(|meta| Box::new(meta) as Box<dyn BlockDevice>),
        };
        if Store::probe(&mut *devices.origin)? {
            bail!(
                "{} holds a snapshot store and cannot be an origin; the order is SNAPSTORE ORIGIN (if it is the origin, clear its first 128 KiB)",
                self.origin.display()
            );
        }
        if !self.yes && !self.may_overwrite(&mut devices)? {
            complain("ddsnap: nothing was changed");
            return Ok(1);
        }
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let options = InitOptions {
            chunk,
            journal_bytes: self.journalsize.map(|size| size.max(LEAST_JOURNAL_BYTES)),
            now: now.map_or(0, |since| since.as_secs() as i64),
            uuid: uuid::Uuid::new_v4().into_bytes(),
        };
        Store::initialize(&mut devices, &options)?;
        Ok(0)
    }

    /// Asks about each device that holds a store.
    fn may_overwrite(&self, devices: &mut Devices) -> Result<bool> {
        let mut found: Vec<&Path> = Vec::new();
        if Store::probe(&mut *devices.data)? {
            found.push(&self.snapstore);
        }
        if let (Some(device), Some(path)) = (&mut devices.meta, &self.meta) {
            if Store::probe(&mut **device)? {
                found.push(path);
            }
        }
        found
            .iter()
            .try_fold(true, |yes, path| Ok(yes && ask(path)?))
    }
}

fn ask(path: &Path) -> Result<bool> {
    print(&format!(
        "{} holds a snapshot store; overwrite it? (y/N) ",
        path.display()
    ))?;
    let mut answer = String::new();
    io::stdin()
        .read_line(&mut answer)
        .context("cannot read the answer")?;
    Ok(answer.trim() == "y")
}

/// The chunk size, once both sizes are in order. One that is not given follows the other.
fn chunk_size(chunk: Option<u64>, block: Option<u64>, separate_meta: bool) -> Result<ChunkShift> {
    let (chunk, block) = match separate_meta {
        true => (
            chunk.unwrap_or(DEFAULT_BYTES),
            block.unwrap_or(DEFAULT_BYTES),
        ),
        false => (
            chunk.or(block).unwrap_or(DEFAULT_BYTES),
            block.or(chunk).unwrap_or(DEFAULT_BYTES),
        ),
    };
    for (name, size) in [("chunk", chunk), ("block", block)] {
        if ChunkShift::from_bytes(size).is_none() {
            bail!("a {name} size of {size} bytes is not a power of two from 512 to 1048576");
        }
    }
    if chunk != block && !separate_meta {
        bail!(
            "chunk size {chunk} and block size {block} differ, which needs a metadata device of its \
             own; give METADEV, or only one of the sizes"
        );
    }
    ChunkShift::from_bytes(chunk).context("checked above")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(chunk: Option<u64>, block: Option<u64>, meta: bool) -> Option<u64> {
        chunk_size(chunk, block, meta).ok().map(ChunkShift::bytes)
    }

    #[test]
    fn sizes_are_checked_as_ever() {
        assert_eq!(bytes_of(None, None, false), Some(4096));
        assert_eq!(bytes_of(Some(16384), None, false), Some(16384));
        assert_eq!(bytes_of(None, Some(8192), false), Some(8192));
        assert_eq!(bytes_of(None, Some(8192), true), Some(4096));
        assert_eq!(bytes_of(Some(512), Some(4096), true), Some(512));
        assert_eq!(bytes_of(Some(512), Some(4096), false), None);
        assert_eq!(bytes_of(Some(256), None, false), None);
        assert_eq!(bytes_of(Some(3000), None, true), None);
        assert_eq!(bytes_of(Some(2 << 20), None, true), None);
    }
}
