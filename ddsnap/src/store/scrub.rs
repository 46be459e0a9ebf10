// SPDX-License-Identifier: GPL-2.0-only
//! Reading all that snapshots have in the store, to find what went bad while it can still be helped.
//!
//! Each saved chunk is compared with its checksum. A snapshot's own chunks change after they were
//! made and have none; they are read, so that sectors show that cannot be. A scrub goes in bounded
//! steps while the store is in use. Each step reads the index anew, so what comes and goes between
//! two steps is no contradiction.

use super::Store;
use super::error::StoreError;
use super::index::Scan;
use super::media::Source;
use crate::buffer::AlignedBuf;
use crate::format::node::Key;
use crate::units::{Chunk, SnapSeq, SnapTag, StoreChunk};

/// How far a scrub is.
#[derive(Clone, Debug)]
pub struct Scrub {
    place: Place,
    done: u64,
    total: u64,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// The first exception not looked at, and the one before it.
    Exceptions(Key, Option<Key>),
    /// The first overlay not looked at.
    Overlays(Key),
    Finished,
}

impl Scrub {
    /// One at its beginning, over a store that has so many bytes of data.
    #[must_use]
    pub(crate) fn of_bytes(total: u64) -> Scrub {
        Scrub {
            place: Place::Exceptions((0, 0), None),
            done: 0,
            total,
        }
    }

    /// There is nothing more to read.
    #[cfg(test)]
    pub(crate) fn finish(&mut self) {
        self.place = Place::Finished;
    }

    /// Whether all was read.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        matches!(self.place, Place::Finished)
    }

    /// Bytes dealt with, and to deal with in all: about, while the store is in use.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.done, self.total.max(self.done))
    }
}

/// What a step of a scrub found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scrubbed {
    /// Bytes it read.
    pub bytes: u64,
    /// Chunks that are bad.
    pub bad: Vec<BadChunk>,
}

/// A chunk of the store whose data is not what it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadChunk {
    /// Where it lies.
    pub place: StoreChunk,
    /// Which chunk of the volume it holds.
    pub chunk: Chunk,
    /// What is wrong with it.
    pub fault: Fault,
    /// The snapshots that lost it, oldest first. None: each of them has a chunk of its own instead.
    pub snapshots: Vec<SnapTag>,
}

/// What is wrong with a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The device cannot read it.
    Unreadable,
    /// It has another checksum than what was saved there.
    Checksum {
        /// crc32c of what is there.
        found: u32,
        /// crc32c of what was saved.
        wanted: u32,
    },
}

/// How many of the entries looked at have a chunk.
fn with_data(scan: &Scan) -> u64 {
    let entries = scan.found.iter();
    entries.filter(|(_, value)| !value.is_mark()).count() as u64
}

/// An entry to be proven.
struct Entry {
    place: StoreChunk,
    chunk: Chunk,
    /// Of an exception: its sequence, that of the one before (or 0), and its checksum.
    saved: Option<(u64, u64, u32)>,
    /// Of an overlay: its snapshot.
    owner: SnapSeq,
}

impl Store {
    /// A scrub at its beginning.
    #[must_use]
    pub fn scrub_begin(&self) -> Scrub {
        Scrub::of_bytes(self.state.space.used << self.superblock.chunk.get())
    }

    /// Proves up to `chunks` further chunks.
    ///
    /// # Errors
    /// The index cannot be read; the scrub stays where it was.
    pub fn scrub_step(&mut self, scrub: &mut Scrub, chunks: usize) -> Result<Scrubbed, StoreError> {
        let limit = chunks.max(1);
        let (entries, place, looked_at) = match scrub.place {
            Place::Exceptions(from, last) => self.exceptions_to_prove(from, last, limit)?,
            Place::Overlays(from) => self.overlays_to_prove(from, limit)?,
            Place::Finished => return Ok(Scrubbed::default()),
        };
        let bad = self.prove(&entries)?;
        let shift = self.superblock.chunk.get();
        scrub.place = place;
        scrub.done += looked_at << shift;
        Ok(Scrubbed {
            bytes: (entries.len() as u64) << shift,
            bad,
        })
    }

    fn exceptions_to_prove(
        &mut self,
        from: Key,
        mut last: Option<Key>,
        limit: usize,
    ) -> Result<(Vec<Entry>, Place, u64), StoreError> {
        let exceptions = &self.state.exceptions;
        let scan = exceptions.scan(&mut self.media, from, limit)?;
        let mut entries = Vec::with_capacity(scan.found.len());
        for &((chunk, seq), value) in &scan.found {
            let before = last.filter(|last| last.0 == chunk).map_or(0, |last| last.1);
            last = Some((chunk, seq));
            // What serves nobody waits for the sweep, and a mark has no data.
            let needed = !value.is_mark();
            if needed && self.state.snapshots.any_needs(Chunk(chunk), before, seq) {
                entries.push(Entry {
                    place: StoreChunk(value.place),
                    chunk: Chunk(chunk),
                    saved: Some((seq, before, value.crc)),
                    owner: SnapSeq(seq),
                });
            }
        }
        let place = match scan.next {
            Some(next) => Place::Exceptions(next, last),
            None => Place::Overlays((0, 0)),
        };
        Ok((entries, place, with_data(&scan)))
    }

    fn overlays_to_prove(
        &mut self,
        from: Key,
        limit: usize,
    ) -> Result<(Vec<Entry>, Place, u64), StoreError> {
        let scan = self.state.overlays.scan(&mut self.media, from, limit)?;
        let needed = scan
            .found
            .iter()
            .filter(|((seq, _), value)| !value.is_mark() && self.state.snapshots.needs_data(*seq));
        let entries = needed
            .map(|&((seq, chunk), value)| Entry {
                place: StoreChunk(value.place),
                chunk: Chunk(chunk),
                saved: None,
                owner: SnapSeq(seq),
            })
            .collect();
        let place = match scan.next {
            Some(next) => Place::Overlays(next),
            None => Place::Finished,
        };
        Ok((entries, place, with_data(&scan)))
    }

    fn prove(&mut self, entries: &[Entry]) -> Result<Vec<BadChunk>, StoreError> {
        let chunk_bytes = self.superblock.chunk.bytes() as usize;
        let mut buffer = AlignedBuf::zeroed(entries.len() * chunk_bytes);
        if let Some(outside) = entries.iter().find(|e| !self.state.space.contains(e.place)) {
            let problem = format!("store chunk {} lies outside the data region", outside.place);
            return Err(self.media.inconsistent(problem));
        }
        let sources: Vec<_> = entries.iter().map(|entry| self.source(entry)).collect();
        let whole = self.media.read_chunks(&sources, &mut buffer);
        let mut bad = Vec::new();
        for ((entry, source), data) in entries
            .iter()
            .zip(&sources)
            .zip(buffer.chunks_exact_mut(chunk_bytes))
        {
            // One sector fails all of a batch: which?
            let readable = whole.is_ok() || self.media.read_chunks(&[*source], data).is_ok();
            let fault = match entry.saved {
                _ if !readable => Fault::Unreadable,
                Some((_, _, wanted)) if crc32c::crc32c(data) != wanted => Fault::Checksum {
                    found: crc32c::crc32c(data),
                    wanted,
                },
                _ => continue,
            };
            bad.push(BadChunk {
                place: entry.place,
                chunk: entry.chunk,
                fault,
                snapshots: self.readers(entry)?,
            });
        }
        Ok(bad)
    }

    fn source(&self, entry: &Entry) -> Source {
        let owner = match entry.saved {
            None => self.state.snapshots.get(entry.owner),
            Some(_) => None,
        };
        let shift = self.superblock.chunk;
        owner.map_or(Source::Store(entry.place), |owner| {
            Source::Own(entry.place, owner.length.in_chunk(entry.chunk, shift))
        })
    }

    /// The snapshots that read this entry's chunk.
    fn readers(&mut self, entry: &Entry) -> Result<Vec<SnapTag>, StoreError> {
        let Some((seq, before, _)) = entry.saved else {
            let owner = self.state.snapshots.get(entry.owner);
            return Ok(owner.map(|owner| owner.tag).into_iter().collect());
        };
        let served: Vec<u64> = self
            .state
            .snapshots
            .live()
            .range(before + 1..=seq)
            .filter(|&(_, &chunks)| chunks > entry.chunk.0)
            .map(|(&seq, _)| seq)
            .collect();
        let mut tags = Vec::new();
        for seq in served.into_iter().map(SnapSeq) {
            if self.overlay(seq, entry.chunk)?.is_none() {
                tags.extend(self.state.snapshots.get(seq).map(|snapshot| snapshot.tag));
            }
        }
        Ok(tags)
    }
}
