// SPDX-License-Identifier: GPL-2.0-only
//! The index as a list, in bounded steps: what `ddsnap dump` shows.

use std::fmt;
use std::ops::RangeInclusive;

use super::Store;
use super::error::StoreError;
use crate::format::journal::Entry;
use crate::format::node::{Key, Value};
use crate::units::{Chunk, SnapSeq, SnapTag, StoreChunk};

/// An entry of the index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DumpEntry {
    /// A chunk of the origin that was written, and nothing saved: for bookmarks.
    Mark {
        /// Which chunk of the origin.
        chunk: Chunk,
        /// The newest bookmark it serves.
        seq: SnapSeq,
    },
    /// A chunk of the origin, saved.
    Exception {
        /// Which chunk of the origin.
        chunk: Chunk,
        /// The newest snapshot it serves.
        seq: SnapSeq,
        /// Where it lies.
        place: StoreChunk,
        /// crc32c of the data there.
        crc: u32,
    },
    /// A chunk of a snapshot's own.
    Overlay {
        /// Which snapshot.
        seq: SnapSeq,
        /// Its tag, unless it is being deleted.
        tag: Option<SnapTag>,
        /// Which chunk of it.
        chunk: Chunk,
        /// Where it lies; none if it is a bookmark, which keeps no data.
        place: Option<StoreChunk>,
    },
}

/// How far a dump is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DumpPlace {
    /// The first exception not listed yet.
    Exceptions(Chunk, SnapSeq),
    /// The first overlay not listed yet.
    Overlays(SnapSeq, Chunk),
}

impl DumpPlace {
    /// Before everything.
    pub const START: DumpPlace = DumpPlace::Exceptions(Chunk(0), SnapSeq(0));
}

impl DumpEntry {
    /// The exception that a journal entry makes.
    pub(crate) fn of(entry: &Entry) -> Option<DumpEntry> {
        match *entry {
            Entry::Exception {
                chunk,
                seq,
                place,
                crc,
            } => Some(DumpEntry::Exception {
                chunk,
                seq,
                place,
                crc,
            }),
            _ => None,
        }
    }
}

fn exception(chunk: Chunk, seq: SnapSeq, value: Value) -> DumpEntry {
    if value.is_mark() {
        return DumpEntry::Mark { chunk, seq };
    }
    DumpEntry::Exception {
        chunk,
        seq,
        place: StoreChunk(value.place),
        crc: value.crc,
    }
}

impl fmt::Display for DumpEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            DumpEntry::Mark { chunk, seq } => {
                write!(f, "origin chunk {chunk}, up to sequence {seq}: changed")
            }
            DumpEntry::Exception {
                chunk,
                seq,
                place,
                crc,
            } => write!(
                f,
                "origin chunk {chunk}, up to sequence {seq}: store chunk {place}, checksum {crc:#010x}"
            ),
            DumpEntry::Overlay {
                seq,
                tag,
                chunk,
                place,
            } => {
                match tag {
                    Some(tag) => write!(f, "snapshot {tag}")?,
                    None => f.write_str("deleted snapshot")?,
                }
                write!(f, " (sequence {seq}), chunk {chunk}: ")?;
                match place {
                    Some(place) => write!(f, "store chunk {place}"),
                    None => f.write_str("changed"),
                }
            }
        }
    }
}

impl Store {
    /// Lists entries of the index about chunks of `chunks`, from `at` on: exceptions by chunk, then
    /// overlays by snapshot. Looks at up to `limit` entries, at least one, and gives the place to go on
    /// from, none at the end. What changes between two steps is listed or not.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn dump_step(
        &mut self,
        at: DumpPlace,
        chunks: RangeInclusive<u64>,
        limit: usize,
    ) -> Result<(Vec<DumpEntry>, Option<DumpPlace>), StoreError> {
        let (first, last) = (*chunks.start(), *chunks.end());
        match at {
            DumpPlace::Exceptions(chunk, seq) => {
                let from = (chunk.0, seq.0).max((first, 0));
                let exceptions = &self.state.exceptions;
                let scan = exceptions.scan(&mut self.media, from, limit.max(1))?;
                let entries: Vec<_> = scan
                    .found
                    .iter()
                    .filter(|(key, _)| key.0 <= last)
                    .map(|&((chunk, seq), value)| exception(Chunk(chunk), SnapSeq(seq), value))
                    .collect();
                let place = match scan.next.filter(|&(chunk, _)| chunk <= last) {
                    Some((chunk, seq)) => DumpPlace::Exceptions(Chunk(chunk), SnapSeq(seq)),
                    None => DumpPlace::Overlays(SnapSeq(0), Chunk(0)),
                };
                Ok((entries, Some(place)))
            }
            DumpPlace::Overlays(seq, chunk) => self.dump_overlays((seq.0, chunk.0), chunks, limit),
        }
    }

    fn dump_overlays(
        &mut self,
        from: Key,
        chunks: RangeInclusive<u64>,
        limit: usize,
    ) -> Result<(Vec<DumpEntry>, Option<DumpPlace>), StoreError> {
        let (first, last) = (*chunks.start(), *chunks.end());
        let from = from.max((from.0, first));
        let overlays = &self.state.overlays;
        let scan = overlays.scan(&mut self.media, from, limit.max(1))?;
        let mut entries = Vec::new();
        let mut next = scan.next;
        for ((seq, chunk), value) in scan.found {
            // Behind the range: go on at its start in the next snapshot.
            if chunk > last {
                next = seq.checked_add(1).map(|seq| (seq, first));
                break;
            }
            if chunk >= first {
                let tag = self.state.snapshots.get(SnapSeq(seq)).and_then(|snapshot| {
                    let named = self.state.snapshots.by_tag(snapshot.tag);
                    named
                        .is_some_and(|named| named.seq.0 == seq)
                        .then_some(snapshot.tag)
                });
                entries.push(DumpEntry::Overlay {
                    seq: SnapSeq(seq),
                    tag,
                    chunk: Chunk(chunk),
                    place: (!value.is_mark()).then_some(StoreChunk(value.place)),
                });
            }
        }
        let place = next.map(|(seq, chunk)| DumpPlace::Overlays(SnapSeq(seq), Chunk(chunk)));
        Ok((entries, place))
    }
}
