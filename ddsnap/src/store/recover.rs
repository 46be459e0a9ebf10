// SPDX-License-Identifier: GPL-2.0-only
//! Replaying the journal: every acknowledged record, none that is not whole.
//!
//! Only one group is ever under way, so a power cut can leave at most one record that is not whole,
//! the last. Two things follow. A record missing while a later one of the same epoch is there is
//! damage to what was acknowledged: refuse, never guess. And only the last record can be there
//! without the data it speaks of: its copies are compared with their checksums.
//!
//! A copy that does not fit its checksum is either unwritten, of a group never acknowledged, or
//! damaged since. The origin decides: of a group never acknowledged it still holds the old data,
//! whose checksum the record has. Then the entry can go, for the snapshot reads the same from the
//! origin. Otherwise the copy was acknowledged and is lost: refuse.

use super::Opened;
use super::error::StoreError;
use super::journal::Ring;
use super::media::{Media, Source};
use super::state::State;
use crate::buffer::AlignedBuf;
use crate::format::BLOCK_LEN;
use crate::format::journal::{Entry, RecordId, UncheckedHeader, decode};
use crate::format::superblock::Superblock;
use crate::units::{Chunk, MetaBlock, StoreChunk};

/// Blocks read at once.
const WINDOW: u64 = 256;

/// A part of the ring in memory.
struct RingReader {
    first: MetaBlock,
    blocks: u64,
    start: u64,
    window: AlignedBuf,
}

impl RingReader {
    fn new(superblock: &Superblock) -> Self {
        let (first, blocks) = (superblock.journal_first, superblock.journal_blocks);
        RingReader {
            first,
            blocks,
            start: 0,
            window: AlignedBuf::zeroed(0),
        }
    }

    /// `count` blocks from `position` on, all before the ring's end.
    fn read(&mut self, media: &mut Media, position: u64, count: u64) -> Result<&[u8], StoreError> {
        let held = self.window.len() as u64 / BLOCK_LEN as u64;
        if position < self.start || position + count > self.start + held {
            let take = WINDOW.max(count).min(self.blocks - position);
            let mut window = AlignedBuf::zeroed((take as usize) * BLOCK_LEN);
            media.read_meta(MetaBlock(self.first.0 + position), &mut window)?;
            (self.start, self.window) = (position, window);
        }
        let at = (position - self.start) as usize * BLOCK_LEN;
        Ok(&self.window[at..at + count as usize * BLOCK_LEN])
    }

    /// The header at `position`, if one of this store and epoch is there.
    fn header(
        &mut self,
        media: &mut Media,
        position: u64,
        epoch: u64,
    ) -> Result<Option<UncheckedHeader>, StoreError> {
        let uuid_part = media.uuid_part;
        let header = UncheckedHeader::decode(self.read(media, position, 1)?).ok();
        Ok(header.filter(|header| {
            let id = header.id;
            id.epoch == epoch && id.uuid_part == uuid_part && id.position == position
        }))
    }

    /// The whole record `sequence` at `position`.
    fn record(
        &mut self,
        media: &mut Media,
        position: u64,
        epoch: u64,
        sequence: u64,
    ) -> Result<Option<Vec<Entry>>, StoreError> {
        let Some(header) = self.header(media, position, epoch)? else {
            return Ok(None);
        };
        let blocks = u64::from(header.blocks);
        if header.id.sequence != sequence || position + blocks > self.blocks {
            return Ok(None);
        }
        let id = RecordId {
            epoch,
            sequence,
            uuid_part: media.uuid_part,
            position,
        };
        let whole = decode(self.read(media, position, blocks)?)
            .ok()
            .filter(|(found, _)| *found == id);
        Ok(whole.map(|(_, entries)| entries))
    }

    /// The record that follows what `ring` knows, if it is whole: at the ring's head or, if it did
    /// not fit there, at its start. With its entries, where it begins.
    fn find(
        &mut self,
        media: &mut Media,
        ring: &Ring,
    ) -> Result<Option<(u64, Vec<Entry>)>, StoreError> {
        for position in [ring.head, 0] {
            if let Some(entries) = self.record(media, position, ring.epoch, ring.sequence)? {
                return Ok(Some((position, entries)));
            }
        }
        Ok(None)
    }
}

/// Decides about an exception of the last record whose copy does not have its checksum: `Ok`, it goes.
pub(crate) type Unwritten<'u> = dyn FnMut(&mut Media, &Entry) -> Result<(), StoreError> + 'u;

/// What becomes of an entry when what it changes cannot be read to compare it with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unreadable {
    /// The replay ends.
    Refuse,
    /// It is applied: who asks looks for damage himself.
    Apply,
}

/// What replaying found besides the state.
pub(crate) struct Replayed {
    /// The ring behind the last whole record.
    pub ring: Ring,
    /// Takes those exceptions of the last record back whose copies were never written: they are not
    /// in the state, but the record is in the ring.
    pub dropped: Vec<Entry>,
}

/// Applies all whole records of the superblock's epoch to `state`. After an error it is what the records
/// before the damage say.
pub(crate) fn replay(
    media: &mut Media,
    superblock: &Superblock,
    state: &mut State,
    opened: &mut Opened,
    unreadable: Unreadable,
    unwritten: &mut Unwritten<'_>,
) -> Result<Replayed, StoreError> {
    let mut ring = Ring::new(superblock);
    let mut dropped = Vec::new();
    let mut reader = RingReader::new(superblock);
    let mut next = reader.find(media, &ring)?;
    while let Some((position, mut entries)) = next {
        ring.pass(position, entries.len());
        next = reader.find(media, &ring)?;
        let mut gap = Ok(());
        if next.is_none() {
            gap = check_nothing_follows(media, &mut reader, ring.epoch, ring.sequence);
        }
        if next.is_none() && gap.is_ok() {
            dropped = drop_unwritten(media, state, &mut entries, unwritten)?;
            opened.dropped_records += u64::from(!dropped.is_empty());
        }
        for entry in &entries {
            match state.check(media, entry) {
                Err(StoreError::Damaged { .. } | StoreError::Read { .. })
                    if unreadable == Unreadable::Apply => {}
                checked => checked?,
            }
            state.apply(entry);
        }
        opened.replayed_records += 1;
        gap?;
    }
    if opened.replayed_records == 0 {
        check_nothing_follows(media, &mut reader, ring.epoch, ring.sequence)?;
    }
    Ok(Replayed { ring, dropped })
}

/// Makes sure that no record after the missing one, `sequence`, is anywhere in the ring.
fn check_nothing_follows(
    media: &mut Media,
    ring: &mut RingReader,
    epoch: u64,
    sequence: u64,
) -> Result<(), StoreError> {
    for position in 0..ring.blocks {
        let Some(header) = ring.header(media, position, epoch)? else {
            continue;
        };
        if header.id.sequence > sequence {
            return Err(StoreError::Journal {
                device: media.meta_name(),
                problem: format!(
                    "record {sequence} is damaged, but record {} is there at block {}",
                    header.id.sequence,
                    ring.first.0 + position
                ),
            });
        }
    }
    Ok(())
}

/// Takes those exceptions out of the last record whose copies were never written; gives the entries
/// that say so.
fn drop_unwritten(
    media: &mut Media,
    state: &State,
    entries: &mut Vec<Entry>,
    unwritten: &mut Unwritten<'_>,
) -> Result<Vec<Entry>, StoreError> {
    let mut dropped = Vec::new();
    let mut buffer = AlignedBuf::zeroed(media.chunk.bytes() as usize);
    let mut kept = Vec::with_capacity(entries.len());
    for &entry in entries.iter() {
        if let Entry::Exception {
            chunk,
            seq,
            place,
            crc,
        } = entry
        {
            if !state.space.contains(place) {
                return Err(lost(media, chunk, place));
            }
            if checksum(media, Source::Store(place), &mut buffer)? != crc {
                unwritten(media, &entry)?;
                dropped.push(Entry::RemoveException { chunk, seq, place });
                continue;
            }
        }
        kept.push(entry);
    }
    *entries = kept;
    Ok(dropped)
}

/// Whether the origin still holds what an exception of the last record was to save.
///
/// # Errors
/// It does not: the copy was acknowledged and is lost. Or the origin cannot be read.
pub(crate) fn ask_origin(media: &mut Media, entry: &Entry) -> Result<(), StoreError> {
    let Entry::Exception {
        chunk, place, crc, ..
    } = *entry
    else {
        return Ok(());
    };
    let mut buffer = AlignedBuf::zeroed(media.chunk.bytes() as usize);
    if checksum(media, Source::Origin(chunk), &mut buffer)? == crc {
        Ok(())
    } else {
        Err(lost(media, chunk, place))
    }
}

fn checksum(media: &mut Media, source: Source, buffer: &mut [u8]) -> Result<u32, StoreError> {
    media.read_chunks(&[source], buffer)?;
    Ok(crc32c::crc32c(buffer))
}

fn lost(media: &Media, chunk: Chunk, place: StoreChunk) -> StoreError {
    StoreError::Journal {
        device: media.data_name(),
        problem: format!(
            "the last record saved origin chunk {chunk} in store chunk {place}, but that data is damaged and the origin has changed"
        ),
    }
}
