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
use crate::device::uring::Access;
use crate::probe::contents::{self, Contents, Usage};
use crate::probe::stack::{self, Base, SYSFS};
use crate::probe::users::{Claim, ClaimError, claim};
use crate::server::start::open_device;
use crate::stdio::{complain, print};
use crate::store::{Devices, InitOptions, OpenOptions, Store, View};
use crate::units::ChunkShift;

/// Chunk and block size if neither is given, in bytes.
const DEFAULT_BYTES: u64 = 4096;
/// The smallest journal the store takes; smaller wishes are rounded up, in bytes.
const LEAST_JOURNAL_BYTES: u64 = 64 << 10;

/// Make an empty snapshot store. What the origin holds is not touched.
///
/// Refused are devices that a server holds or that share blocks with each other, a store's device that is
/// in use (mounted, swap, a part of another device), an origin that holds a store itself, and, without
/// --force, a store's device that holds a file system or anything else with a signature. All is checked
/// before the first write.
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
    /// Overwrite a file system, a partition table or whatever else the store's device holds.
    #[arg(long)]
    force: bool,
    /// Check everything and write nothing. A store with snapshots is refused too, without --yes or
    /// --force.
    #[arg(short = 'n', long)]
    dry_run: bool,
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
        share_no_blocks(&paths)?;
        same_sectors(&self.snapstore, &self.origin)?;
        let held_meta = meta.map(offline::hold).transpose()?;
        let data = offline::hold(&self.snapstore)?;
        // A store, or the origin of another server, is given in its place by mistake.
        let _origin = offline::share_one(&self.origin)
            .with_context(|| format!("cannot use {} as origin", self.origin.display()))?;
        let written: Vec<&Path> = [&*self.snapstore].into_iter().chain(meta).collect();
        let mut claims = claim_all(&written)?;
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
        let mut recognised = Vec::new();
        for &path in &written {
            recognised.extend(self.overwritten(path)?.then_some(path));
        }
        if self.dry_run {
            if !self.yes && !self.force {
                self.refuse_snapshots(&mut devices)?;
            }
        } else if !self.yes && !self.force && !self.may_overwrite(&mut devices)? {
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
        Store::check_layout(&devices, &options)?;
        let store = Base::of(&self.snapstore);
        let physical = store.and_then(|base| stack::physical_bytes(Path::new(SYSFS), base));
        if let Some(warning) = shares_sectors(&self.snapstore, chunk, physical) {
            complain(format_args!("ddsnap: {warning}"));
        }
        if self.dry_run {
            return Ok(0);
        }
        for path in recognised {
            // The kernel forgets the partitions of a table that is erased only while nobody has claimed the disk.
            claims.clear();
            contents::erase(path)?;
        }
        if claims.is_empty() {
            claims = claim_all(&written)?;
        }
        Store::initialize(&mut devices, &options)?;
        drop(claims);
        Ok(0)
    }

    /// Whether what a device of the store holds has to be erased. A store is overwritten as it is.
    fn overwritten(&self, path: &Path) -> Result<bool> {
        let found = contents::look(path)?;
        let is_store = matches!(&found, Contents::Known(known) if known.usage == Usage::Store);
        if is_store || !found.is_recognised() {
            return Ok(false);
        }
        if !self.force {
            bail!(
                "{} holds {found}; nothing was changed (--force overwrites it)",
                path.display()
            );
        }
        Ok(true)
    }

    /// Nobody can be asked, so a store is only overwritten if nothing would be missed.
    fn refuse_snapshots(&self, devices: &mut Devices) -> Result<()> {
        if !Store::probe(&mut *devices.data)? {
            return Ok(());
        }
        let meta = match &self.meta {
            Some(meta) => Some(Box::new(open_device(meta, Access::Read)?) as Box<dyn BlockDevice>),
            None => None,
        };
        let data = Box::new(open_device(&self.snapstore, Access::Read)?);
        let options = OpenOptions {
            cache_bytes: offline::CACHE_BYTES,
        };
        let what = match View::without_origin(data, meta, &options) {
            Ok((view, ..)) => match view.snapshots().len() {
                0 => return Ok(()),
                1 => "a snapshot store with one snapshot".to_string(),
                many => format!("a snapshot store with {many} snapshots"),
            },
            Err(_) => "a snapshot store that cannot be read, or a part of one".to_string(),
        };
        let store = self.snapstore.display();
        bail!("{store} holds {what}; nothing was changed (--force overwrites it)")
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

fn claim_all(paths: &[&Path]) -> Result<Vec<Claim>, ClaimError> {
    paths.iter().map(|path| claim(path)).collect()
}

/// Devices that are not the same may still share blocks: a disk and its partition, a logical volume and
/// its physical volume, two loop devices of one file.
fn share_no_blocks(paths: &[&Path]) -> Result<()> {
    for (index, a) in paths.iter().enumerate() {
        for b in &paths[..index] {
            let (Some(base_a), Some(base_b)) = (Base::of(a), Base::of(b)) else {
                continue;
            };
            if stack::overlap(Path::new(SYSFS), base_a, base_b) {
                bail!(
                    "{} and {} share blocks: one lies on the other, or both on one file",
                    b.display(),
                    a.display()
                );
            }
        }
    }
    Ok(())
}

/// A snapshot's device has the larger of both sector sizes, and a file system that was made for smaller
/// ones does not mount there.
fn same_sectors(snapstore: &Path, origin: &Path) -> Result<()> {
    let sectors = |path| stack::sector_bytes(Path::new(SYSFS), Base::of(path)?);
    match (sectors(snapstore), sectors(origin)) {
        (Some(store), Some(own)) if store > own => bail!(
            "{} has sectors of {store} bytes and {} of {own}: snapshots would not mount; use a store \
             with sectors of {own} bytes",
            snapstore.display(),
            origin.display()
        ),
        _ => Ok(()),
    }
}

/// What to know before chunks get shorter than what the store's disk writes as one.
fn shares_sectors(snapstore: &Path, chunk: ChunkShift, physical: Option<u32>) -> Option<String> {
    let physical = physical.filter(|&physical| u64::from(physical) > chunk.bytes())?;
    Some(format!(
        "warning: {} has physical sectors of {physical} bytes, and chunks are to have {}: a power cut while \
         one is written can damage its neighbours in the same sector, which their checksums will tell; chunks \
         of {physical} bytes or more do not share sectors",
        snapstore.display(),
        chunk.bytes()
    ))
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

    /// Nothing said that a torn write can take a saved chunk of other snapshots along.
    #[test]
    fn chunks_shorter_than_a_physical_sector_are_warned_of() {
        let warning = |chunk, physical| {
            let chunk = ChunkShift::from_bytes(chunk).unwrap();
            shares_sectors(Path::new("/dev/x"), chunk, physical)
        };
        assert_eq!(warning(4096, Some(4096)), None);
        assert_eq!(warning(4096, Some(512)), None);
        assert_eq!(warning(512, None), None);
        let text = warning(512, Some(4096)).unwrap();
        assert!(text.starts_with(
            "warning: /dev/x has physical sectors of 4096 bytes, and chunks are to have 512:"
        ));
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
