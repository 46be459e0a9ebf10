// SPDX-License-Identifier: GPL-2.0-only
//! A store read without a server: recovered in memory, nothing written.
//!
//! It is the store as opening would find it, without the checkpoint that opening ends with; so the
//! same code answers, and a read-only device is enough. The caller holds the store's lock: beside a
//! server, what is read would change underneath.

use std::ops::RangeInclusive;

use super::api::{Counts, OpError, SnapshotInfo, StoreStatus};
use super::dump::{DumpEntry, DumpPlace};
use super::error::StoreError;
use super::lookup::Found;
use super::media::Devices;
use super::no_origin::NoOrigin;
use super::open::Recovered;
use super::{OpenOptions, Opened, Store, recover};
use crate::device::BlockDevice;
use crate::format::superblock::Superblock;
use crate::units::{Chunk, Sectors, SnapTag};

/// See the module.
pub struct View(Store);

impl View {
    /// Reads the store on `devices`, which are never written to.
    ///
    /// # Errors
    /// There is no store, the devices do not belong to it, or it is damaged.
    pub fn open(devices: Devices, options: &OpenOptions) -> Result<(View, Opened), StoreError> {
        let Recovered { store, opened, .. } =
            Store::recover(devices, options, &mut recover::ask_origin)?;
        Ok((View::latched(store), opened))
    }

    /// Reads a store whose origin is not known. Copies of the last record that do not have their
    /// checksums are left out and given back: only the origin can tell whether they are lost.
    ///
    /// # Errors
    /// As of [`open`](Self::open).
    pub fn without_origin(
        data: Box<dyn BlockDevice>,
        meta: Option<Box<dyn BlockDevice>>,
        options: &OpenOptions,
    ) -> Result<(View, Opened, Vec<DumpEntry>), StoreError> {
        let devices = Devices {
            origin: Box::new(NoOrigin),
            data,
            meta,
        };
        let mut undecided = Vec::new();
        let Recovered {
            mut store, opened, ..
        } = Store::recover(devices, options, &mut |_, entry| {
            undecided.extend(DumpEntry::of(entry));
            Ok(())
        })?;
        store.media.origin_length = store.superblock.origin;
        Ok((View::latched(store), opened, undecided))
    }

    /// Whatever would change it is refused like a change to a store that failed.
    fn latched(mut store: Store) -> View {
        store.failed = Some("it is open for reading only".to_owned());
        View(store)
    }

    /// The superblock that counts.
    #[must_use]
    pub fn superblock(&self) -> &Superblock {
        &self.0.superblock
    }

    /// A part of the index; see [`Store::dump_step`].
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn dump_step(
        &mut self,
        at: DumpPlace,
        chunks: RangeInclusive<u64>,
        limit: usize,
    ) -> Result<(Vec<DumpEntry>, Option<DumpPlace>), StoreError> {
        self.0.dump_step(at, chunks, limit)
    }

    /// All snapshots that are not deleted, oldest first.
    #[must_use]
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.0.snapshots()
    }

    /// The snapshot of this tag.
    #[must_use]
    pub fn snapshot(&self, tag: SnapTag) -> Option<SnapshotInfo> {
        self.0.snapshot(tag)
    }

    /// The store as a whole.
    #[must_use]
    pub fn status(&self) -> StoreStatus {
        self.0.status()
    }

    /// The store's identity.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        self.0.uuid()
    }

    /// How many chunks each snapshot uses and with how many others it shares them.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn count(&mut self) -> Result<Counts, StoreError> {
        self.0.count()
    }

    /// Reads as many of a snapshot's chunks as `into` has room for, from `first` on, in one batch, and
    /// proves what has a checksum.
    ///
    /// # Errors
    /// A device failed, the index is damaged, or data does not have its checksum: what `into` then
    /// holds means nothing. Inside: the snapshot has no such data.
    pub fn read(
        &mut self,
        tag: SnapTag,
        first: Chunk,
        into: &mut [u8],
    ) -> Result<Result<(), OpError>, StoreError> {
        let chunk_bytes = self.0.superblock.chunk.bytes() as usize;
        let mut found = Vec::with_capacity(into.len() / chunk_bytes);
        for chunk in (first.0..).map(Chunk).take(into.len() / chunk_bytes) {
            match self.0.find(tag, chunk)? {
                Ok(place) => found.push((chunk, place)),
                Err(refused) => return Ok(Err(refused)),
            }
        }
        let length = self.0.snapshot(tag).map_or(Sectors(0), |s| s.length);
        let shift = self.0.superblock.chunk;
        let sources: Vec<_> = found
            .iter()
            .map(|&(chunk, place)| place.source(chunk, length, shift))
            .collect();
        self.0.media.read_chunks(&sources, into)?;
        for (&(chunk, place), data) in found.iter().zip(into.chunks_exact(chunk_bytes)) {
            if let Found::Exception(place, crc) = place {
                self.0.media.prove(chunk, place, crc, data)?;
            }
        }
        Ok(Ok(()))
    }
}
