// SPDX-License-Identifier: GPL-2.0-only
//! Proves the parts of an open store against each other: index, allocation, counts, checksums.

use std::collections::BTreeSet;

use super::Store;
use super::error::StoreError;
use super::index::{Index, after};
use super::media::{Media, Source};
use crate::buffer::AlignedBuf;
use crate::format::node::{Key, Value};
use crate::units::StoreChunk;

/// Entries read at a time.
const PAGE: usize = 1024;

impl Store {
    /// Reads the whole index and, if `data` is set, the data of every exception.
    ///
    /// Proves that each used chunk has exactly one owner and is marked used, that no other is, that the
    /// counts are right, and that each exception's data has its checksum. Needs a few dozen bytes of
    /// memory for each used chunk.
    ///
    /// # Errors
    /// [`StoreError::Inconsistent`] for the first contradiction; or a device fails.
    pub fn audit(&mut self, data: bool) -> Result<(), StoreError> {
        let exceptions = all(&mut self.media, &self.state.exceptions)?;
        let overlays = all(&mut self.media, &self.state.overlays)?;
        let mut owned = BTreeSet::new();
        for (key, value) in exceptions.iter().chain(&overlays) {
            let place = StoreChunk(value.place);
            let problem = if !self.state.space.contains(place) {
                "lies outside the data region"
            } else if !owned.insert(value.place) {
                "has two owners"
            } else if !self.state.space.is_used(&mut self.media, place)? {
                "is marked free"
            } else {
                continue;
            };
            return Err(self
                .media
                .inconsistent(format!("store chunk {place} of entry {key:?} {problem}")));
        }
        if owned.len() as u64 != self.state.space.used {
            let problem = format!(
                "{} store chunks have owners, {} count as used",
                owned.len(),
                self.state.space.used
            );
            return Err(self.media.inconsistent(problem));
        }
        // As many marks as owners, and each owner's chunk is marked: no other is.
        let mut marked = 0;
        for chunk in self.state.space.first..self.state.space.end {
            if !self.state.space.contains(StoreChunk(chunk)) {
                continue;
            }
            marked += u64::from(
                self.state
                    .space
                    .is_used(&mut self.media, StoreChunk(chunk))?,
            );
        }
        if marked != self.state.space.used {
            let problem = format!(
                "{marked} store chunks are marked used, {} count as used",
                self.state.space.used
            );
            return Err(self.media.inconsistent(problem));
        }
        if data {
            self.audit_data(&exceptions)?;
        }
        Ok(())
    }

    fn audit_data(&mut self, exceptions: &[(Key, Value)]) -> Result<(), StoreError> {
        let mut buffer = AlignedBuf::zeroed(self.superblock.chunk.bytes() as usize);
        for &((chunk, seq), value) in exceptions {
            self.media
                .read_chunks(&[Source::Store(StoreChunk(value.place))], &mut buffer)?;
            let found = crc32c::crc32c(&buffer);
            if found != value.crc {
                let problem = format!(
                    "store chunk {}, saved for origin chunk {chunk} and snapshot sequence {seq}, has checksum {found:#x}, expected {:#x}",
                    value.place, value.crc
                );
                return Err(self.media.inconsistent(problem));
            }
        }
        Ok(())
    }
}

fn all(media: &mut Media, index: &Index) -> Result<Vec<(Key, Value)>, StoreError> {
    let mut all = Vec::new();
    let mut from = Some((0, 0));
    while let Some(key) = from {
        let found = index.scan(media, key, PAGE)?;
        from = found.last().and_then(|&(key, _)| after(key));
        all.extend(found);
    }
    Ok(all)
}
