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
//!
//! A torn write can leave sectors that cannot be read: those are no more than not whole, in the ring and
//! in a copy. ARCHITECTURE.md says how far that can hide a record that was acknowledged, and what is refused.
//!
//! What opening finds of the last record it writes again ([`Entry::Again`]): it may have been read from a
//! cache that had lost it. Such a record stands for those before it, whether or not they can be read.

use std::collections::BTreeSet;

use super::Opened;
use super::behind::Behind;
use super::error::StoreError;
use super::journal::Ring;
use super::media::{Media, Source};
use super::state::State;
use crate::buffer::AlignedBuf;
use crate::format::journal::{Entry, RecordId, UncheckedHeader, decode};
use crate::format::superblock::Superblock;
use crate::format::{BLOCK_LEN, Lengths};
use crate::promise::kept;
use crate::units::{Chunk, MetaBlock, StoreChunk};

/// Blocks read at once.
const WINDOW: u64 = 256;

/// A part of the ring in memory.
struct RingReader {
    lengths: Lengths,
    first: MetaBlock,
    blocks: u64,
    start: u64,
    window: AlignedBuf,
    /// Sectors that could not be read, by byte offset.
    unreadable: BTreeSet<u64>,
    /// The most blocks of a record.
    most_blocks: u64,
}

/// A whole record.
struct Found {
    position: u64,
    sequence: u64,
    entries: Vec<Entry>,
}

impl Found {
    /// The first record that this one stands for.
    fn stands_for(&self) -> u64 {
        match self.entries.first() {
            Some(Entry::Again { first }) => (*first).min(self.sequence),
            _ => self.sequence,
        }
    }
}

/// What comes behind a record.
enum Next {
    Record(Found),
    End,
    /// A record is missing that was acknowledged.
    Gap(StoreError),
}

impl RingReader {
    fn new(superblock: &Superblock) -> Self {
        let (first, blocks) = (superblock.journal_first, superblock.journal_blocks);
        RingReader {
            lengths: superblock.lengths(),
            first,
            blocks,
            start: 0,
            window: AlignedBuf::zeroed(0),
            unreadable: BTreeSet::new(),
            most_blocks: Ring::new(superblock).most_blocks(),
        }
    }

    /// `count` blocks from `position` on, all before the ring's end.
    fn read(&mut self, media: &mut Media, position: u64, count: u64) -> Result<&[u8], StoreError> {
        let held = self.window.len() as u64 / BLOCK_LEN as u64;
        if position < self.start || position + count > self.start + held {
            let take = WINDOW.max(count).min(self.blocks - position);
            let mut window = AlignedBuf::zeroed((take as usize) * BLOCK_LEN);
            let at = MetaBlock(self.first.0 + position);
            let bad = media.read_meta_in_part(at, &mut window);
            self.unreadable.extend(bad.iter().map(|(offset, _)| offset));
            // More than one write can tear: it is not single sectors that fail.
            let bounded = kept!(
                "unreadable-ring-is-refused",
                "a failing disk's acknowledged records would be taken for a write that the power tore"
            );
            if bounded && self.unreadable_blocks() > self.most_blocks {
                if let Some((_, error)) = bad.into_iter().next() {
                    return Err(error);
                }
            }
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
        let lengths = self.lengths;
        let whole = decode(self.read(media, position, blocks)?, lengths)
            .ok()
            .filter(|(found, _)| *found == id);
        Ok(whole.map(|(_, entries)| entries))
    }

    /// The record that follows what `ring` knows, if it is whole: at the ring's head or, if it did
    /// not fit there, at its start.
    fn find(&mut self, media: &mut Media, ring: &Ring) -> Result<Option<Found>, StoreError> {
        let sequence = ring.sequence;
        for position in [ring.head, 0] {
            if let Some(entries) = self.record(media, position, ring.epoch, sequence)? {
                return Ok(Some(Found {
                    position,
                    sequence,
                    entries,
                }));
            }
        }
        Ok(None)
    }

    /// What follows what `ring` knows. `before`: the record before it is whole.
    fn next(
        &mut self,
        media: &mut Media,
        state: &State,
        ring: &Ring,
        before: bool,
    ) -> Result<Next, StoreError> {
        if let Some(found) = self.find(media, ring)? {
            // Written again, but not to the end: then what it was to stand for still counts.
            let undone = before
                && found.stands_for() < found.sequence
                && !has_copies(media, state, &found.entries)
                && self.behind(media, ring.epoch, found.sequence)?.is_none();
            return Ok(match undone {
                true => Next::End,
                false => Next::Record(found),
            });
        }
        let missing = ring.sequence;
        let Some((position, sequence)) = self.behind(media, ring.epoch, missing)? else {
            return Ok(match self.hidden(ring) {
                Some(problem) => Next::Gap(StoreError::Journal {
                    device: media.meta_name(),
                    problem,
                }),
                None => Next::End,
            });
        };
        match self.resume(media, ring.epoch, missing)? {
            Some(found) if found.stands_for() <= missing => return Ok(Next::Record(found)),
            None if self.only_repetitions(media, ring.epoch, missing)? => return Ok(Next::End),
            _ => {}
        }
        Ok(Next::Gap(StoreError::Journal {
            device: media.meta_name(),
            problem: format!(
                "record {missing} is damaged, but record {sequence} is there at block {}",
                self.first.0 + position
            ),
        }))
    }

    /// The first whole record behind `sequence`.
    fn resume(
        &mut self,
        media: &mut Media,
        epoch: u64,
        mut sequence: u64,
    ) -> Result<Option<Found>, StoreError> {
        while let Some((position, behind)) = self.behind(media, epoch, sequence)? {
            if let Some(entries) = self.record(media, position, epoch, behind)? {
                return Ok(Some(Found {
                    position,
                    sequence: behind,
                    entries,
                }));
            }
            sequence = behind;
        }
        Ok(None)
    }

    /// Whether all headers behind the record `missing` are of repetitions of it. If none of these is whole, each was
    /// under way when the power went, and nothing was acknowledged since the last one began; and the record itself
    /// was read from a cache, for otherwise it were durable: nobody was told of it either.
    fn only_repetitions(
        &mut self,
        media: &mut Media,
        epoch: u64,
        missing: u64,
    ) -> Result<bool, StoreError> {
        for position in 0..self.blocks {
            let Some(header) = self.header(media, position, epoch)? else {
                continue;
            };
            let repeats = header.again.is_some_and(|first| first <= missing);
            if header.id.sequence > missing && !repeats {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Where in the ring the first record behind `sequence` begins, and its sequence.
    fn behind(
        &mut self,
        media: &mut Media,
        epoch: u64,
        sequence: u64,
    ) -> Result<Option<(u64, u64)>, StoreError> {
        let mut first: Option<(u64, u64)> = None;
        for position in 0..self.blocks {
            let Some(header) = self.header(media, position, epoch)? else {
                continue;
            };
            let found = header.id.sequence;
            let looks = kept!(
                "gap-refused",
                "acknowledged records behind a damaged one would be forgotten silently"
            );
            if looks && found > sequence && first.is_none_or(|(_, least)| found < least) {
                first = Some((position, found));
            }
        }
        Ok(first)
    }

    /// Blocks with sectors that could not be read.
    fn unreadable_blocks(&self) -> u64 {
        let blocks = self.unreadable.iter().map(|at| at / BLOCK_LEN as u64);
        blocks.collect::<BTreeSet<_>>().len() as u64
    }

    /// Whether acknowledged records may lie where nothing can be read, behind the end that was found. One
    /// block can hide one record: it is the one that was under way, or the price of a flush for each group.
    /// Each record behind it would need a block of its own for its header.
    fn hidden(&self, ring: &Ring) -> Option<String> {
        let at = |position: u64| MetaBlock(self.first.0 + position % self.blocks).to_offset();
        let unreadable = |position: u64| self.unreadable.contains(&at(position));
        let wraps = ring.head + self.most_blocks > self.blocks;
        if !(unreadable(ring.head) || wraps && unreadable(0)) {
            return None; // no record began to be written
        }
        let near = ring.head..ring.head + 2 * self.most_blocks;
        let hiding: Vec<u64> = near.filter(|&position| unreadable(position)).collect();
        let refuses = kept!(
            "hidden-records-refused",
            "acknowledged records that nothing can read would be forgotten silently"
        );
        (refuses && hiding.len() > 1).then(|| {
            format!(
                "blocks {} and {} cannot be read; acknowledged records may lie there",
                self.first.0 + hiding[0] % self.blocks,
                self.first.0 + hiding[1] % self.blocks
            )
        })
    }

    /// Blocks with sectors that could not be read and no record of those from `tail` to what `ring` knows.
    fn unreadable_and_free(&self, tail: u64, ring: &Ring) -> Vec<MetaBlock> {
        let blocks = self.unreadable.iter().map(|at| at / BLOCK_LEN as u64);
        let free =
            |block: &u64| (block - self.first.0 + self.blocks - tail) % self.blocks >= ring.used;
        let blocks: BTreeSet<u64> = blocks.filter(free).collect();
        blocks.into_iter().map(MetaBlock).collect()
    }

    /// Makes sure that what could not be read still cannot: else the device failed for a while, and what it
    /// holds is not known.
    fn confirm(&self, media: &mut Media) -> Result<(), StoreError> {
        for &offset in &self.unreadable {
            let asks = kept!(
                "unreadable-confirmed",
                "a device that failed for a while would lose the records that were read meanwhile as nothing"
            );
            if asks && media.can_read_meta(offset) {
                return Err(StoreError::Journal {
                    device: media.meta_name(),
                    problem: format!(
                        "byte {offset} could not be read at first and then could; open it again"
                    ),
                });
            }
        }
        Ok(())
    }
}

/// Whether all copies of a record are whole.
fn has_copies(media: &mut Media, state: &State, entries: &[Entry]) -> bool {
    let mut buffer = AlignedBuf::zeroed(media.chunk.bytes() as usize);
    entries.iter().all(|entry| match *entry {
        Entry::Exception { place, crc, .. } => {
            state.space.contains(place)
                && checksum(media, Source::Store(place), &mut buffer)
                    .is_ok_and(|found| found == crc)
        }
        _ => true,
    })
}

/// Decides about an exception of the last record whose copy does not have its checksum: `Ok`, it goes.
pub(crate) type Unwritten<'u> = dyn FnMut(&mut Media, &Entry) -> Result<(), StoreError> + 'u;

/// What becomes of a journal that is damaged, or whose entries change what cannot be read.
pub(crate) enum Damage<'d> {
    /// The replay ends.
    Refuse,
    /// All that can be read is applied: who asks looks for damage himself.
    GoOn(&'d mut Behind),
}

/// What replaying found besides the state.
pub(crate) struct Replayed {
    /// The ring behind the last whole record.
    pub ring: Ring,
    /// The last record, if there is one.
    pub last: Option<Last>,
    /// Blocks of the ring that hold no record and cannot be read.
    pub unreadable: Vec<MetaBlock>,
}

/// The last record, as far as it counts.
pub(crate) struct Last {
    /// Sequence of the first record that one must name that is to stand for it.
    pub first: u64,
    /// Without those exceptions whose copies were never written.
    pub entries: Vec<Entry>,
}

/// Applies all whole records of the superblock's epoch to `state`. After an error it is what the records
/// before the damage say; who goes on gets those behind it too.
pub(crate) fn replay(
    media: &mut Media,
    superblock: &Superblock,
    state: &mut State,
    opened: &mut Opened,
    damage: &mut Damage<'_>,
    unwritten: &mut Unwritten<'_>,
) -> Result<Replayed, StoreError> {
    let mut ring = Ring::new(superblock);
    let mut last = None;
    let mut reader = RingReader::new(superblock);
    let mut next = reader.next(media, state, &ring, false)?;
    loop {
        if let (Next::Gap(_), Damage::GoOn(behind)) = (&next, &mut *damage) {
            if let Some(found) = reader.resume(media, ring.epoch, ring.sequence)? {
                let lacks = found.stands_for() > ring.sequence;
                if let (Next::Gap(what), true) =
                    (std::mem::replace(&mut next, Next::Record(found)), lacks)
                {
                    behind.note(what, state);
                }
            }
        }
        let found = match next {
            Next::Record(found) => found,
            end => {
                next = end;
                break;
            }
        };
        let first = found.stands_for();
        let (sequence, mut entries) = (found.sequence, found.entries);
        ring.pass(found.position, sequence, entries.len());
        next = reader.next(media, state, &ring, true)?;
        opened.replayed_records += 1;
        if matches!(&next, Next::Record(behind) if behind.stands_for() <= sequence) {
            continue;
        }
        if matches!(next, Next::End) {
            let whole = entries.len();
            drop_unwritten(media, state, &mut entries, unwritten)?;
            opened.dropped_records += u64::from(entries.len() < whole);
        }
        for entry in &entries {
            let checked = match damage {
                Damage::GoOn(behind) if !behind.is_empty() => {
                    behind.apply(media, state, entry)?;
                    continue;
                }
                _ => state.check(media, entry),
            };
            match (checked, &damage) {
                (Err(StoreError::Damaged { .. } | StoreError::Read { .. }), Damage::GoOn(_)) => {}
                (checked, _) => checked?,
            }
            state.apply(entry);
        }
        entries.retain(|entry| !matches!(entry, Entry::Again { .. }));
        last = Some(Last { first, entries });
    }
    if let Next::Gap(error) = next {
        return Err(error);
    }
    reader.confirm(media)?;
    let unreadable = reader.unreadable_and_free(superblock.tail, &ring);
    Ok(Replayed {
        ring,
        last,
        unreadable,
    })
}

/// Takes those exceptions out of the last record whose copies were never written.
fn drop_unwritten(
    media: &mut Media,
    state: &State,
    entries: &mut Vec<Entry>,
    unwritten: &mut Unwritten<'_>,
) -> Result<(), StoreError> {
    let mut buffer = AlignedBuf::zeroed(media.chunk.bytes() as usize);
    let mut kept = Vec::with_capacity(entries.len());
    for &entry in entries.iter() {
        if let Entry::Exception {
            chunk, place, crc, ..
        } = entry
        {
            if !state.space.contains(place) {
                return Err(lost(media, chunk, place));
            }
            // One that cannot be read is not whole, and no more is known of it.
            let found = checksum(media, Source::Store(place), &mut buffer);
            let compares = kept!(
                "last-copies-compared",
                "an entry of the last record would count though its copy was never written"
            );
            if compares && !found.is_ok_and(|found| found == crc) {
                unwritten(media, &entry)?;
                continue;
            }
        }
        kept.push(entry);
    }
    *entries = kept;
    Ok(())
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
    let asks = kept!(
        "origin-asked",
        "an acknowledged copy that is damaged would be dropped, and the snapshot show newer data"
    );
    if !asks || checksum(media, Source::Origin(chunk), &mut buffer)? == crc {
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
