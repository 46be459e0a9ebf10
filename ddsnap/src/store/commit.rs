// SPDX-License-Identifier: GPL-2.0-only
//! Commit groups: old data is saved and recorded before anything overwrites it.
//!
//! The order of a group of copy-outs: read all old chunks; write all copies and one journal record;
//! flush once; then apply the record to memory and answer. Chunks that follow one another are one read, and copies in
//! places that do are one write: what is durable when is a matter of the flush, not of how many writes it follows. If the power goes before the flush ends,
//! no answer was given, so the origin still holds the old data, and recovery may drop the record:
//! it does so entry by entry, by the checksums of the copies (see `recover`).
//!
//! Overlays need a flush more. Their data changes in place once they are answered, so later nobody
//! can tell by a checksum whether the first copy ever became durable. A group that makes overlays
//! flushes the data before it writes the record: then the record's presence proves the data.
//!
//! What only bookmarks need to know costs an entry of the record: a mark, with nothing read or copied.

use std::collections::HashMap;

use super::Store;
use super::api::{Done, Op, OpError};
use super::error::StoreError;
use super::full::{Need, Room, Wanted};
use super::lookup::BeforeWrite;
use super::media::{Source, chunk_writes};
use crate::buffer::AlignedBuf;
use crate::device::Write;
use crate::format::journal::Entry;
use crate::promise::kept;
use crate::units::{Chunk, SnapSeq, SnapTag, StoreChunk};

/// The most bytes of data a group holds in memory.
const MAX_GROUP_BYTES: u64 = 16 << 20;

/// An entry to be made; for all but marks a chunk is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Target {
    Exception(Chunk, SnapSeq),
    Overlay(SnapSeq, Chunk),
    Mark(Chunk, SnapSeq),
}

impl Target {
    fn is_copy(&self) -> bool {
        !matches!(self, Target::Mark(..))
    }
}

/// What one op of a group comes to.
enum Slot {
    Known(Result<Done, OpError>),
    /// That of a target.
    Entry(usize),
}

/// What a group is going to do.
#[derive(Default)]
struct Plan {
    slots: Vec<Slot>,
    targets: Vec<Target>,
    /// Of each target, how many before it are copies.
    copies_before: Vec<usize>,
    /// Of those targets that are copies, in their order.
    sources: Vec<Source>,
    known: HashMap<Target, usize>,
}

impl Plan {
    /// Adds a target, with the source of what is copied for it.
    fn add(&mut self, target: Target, source: Option<Source>) -> Slot {
        let index = *self.known.entry(target).or_insert_with(|| {
            self.targets.push(target);
            self.copies_before.push(self.sources.len());
            self.sources.extend(source);
            self.targets.len() - 1
        });
        Slot::Entry(index)
    }

    fn wanted(&self) -> Wanted {
        let overlay = |target: &&Target| matches!(target, Target::Overlay(..));
        let overlays = self.targets.iter().filter(overlay).count();
        let marks = self.targets.iter().take_while(|target| !target.is_copy());
        Wanted {
            exceptions: self.targets.len() - overlays,
            overlays,
            leading_marks: marks.count(),
        }
    }

    /// Copies among the first `entries` targets.
    fn copies_in(&self, entries: usize) -> usize {
        let before = self.copies_before.get(entries);
        before.map_or(self.sources.len(), |&before| before)
    }

    /// The most targets from the first on that have no more than so many copies.
    fn targets_with(&self, copies: usize) -> usize {
        match copies < self.sources.len() {
            true => {
                self.copies_before
                    .partition_point(|&before| before <= copies)
                    - 1
            }
            false => self.targets.len(),
        }
    }
}

impl Store {
    /// Does what a group of requests asks for; all of it is durable when this returns.
    ///
    /// The answers are in the order of `ops`. The caller may write the chunks then and not before. What is
    /// answered with [`OpError::Wait`] is asked for again after background steps.
    ///
    /// # Errors
    /// The store cannot go on: nothing of the group may be taken as done.
    pub fn commit(&mut self, ops: &[Op]) -> Result<Vec<Result<Done, OpError>>, StoreError> {
        self.check_latch()?;
        self.mark_revert_for(ops)?;
        let chunks = (MAX_GROUP_BYTES >> self.superblock.chunk.get()).max(1) as usize;
        let most = chunks.min(self.ring.max_entries());
        let mut answers = Vec::with_capacity(ops.len());
        for group in ops.chunks(most) {
            let result = self.commit_group(group, &mut answers);
            self.latch(result)?;
        }
        Ok(answers)
    }

    fn commit_group(
        &mut self,
        ops: &[Op],
        answers: &mut Vec<Result<Done, OpError>>,
    ) -> Result<(), StoreError> {
        let mut rest = ops;
        while !rest.is_empty() {
            let plan = self.plan(rest)?;
            let (mut places, mut granted, mut wanted) = (Vec::new(), 0, 0);
            if !plan.targets.is_empty() {
                let refused = match self.make_room(&plan.wanted())? {
                    // Snapshots were given up: who needs what has to be found out again.
                    Room::Changed => continue,
                    Room::Entries(entries) => {
                        let free = usize::try_from(self.state.space.free()).unwrap_or(usize::MAX);
                        wanted = plan.copies_in(entries).min(free);
                        places = self.find_places(wanted)?;
                        granted = plan.targets_with(places.len()).min(entries);
                        OpError::Wait
                    }
                    Room::Wait => OpError::Wait,
                    Room::Full => OpError::StoreFull,
                };
                if granted == 0 {
                    answers.extend(plan.slots.iter().map(|slot| match slot {
                        Slot::Known(answer) => *answer,
                        Slot::Entry(_) => Err(refused),
                    }));
                    return Ok(());
                }
                self.make_entries(&plan, granted, &places)?;
            }
            // The ops up to the first whose entry was not made now; the others have a further round.
            let beyond = |slot: &Slot| matches!(slot, Slot::Entry(index) if *index >= granted);
            let end = plan.slots.iter().position(beyond).unwrap_or(rest.len());
            answers.extend(plan.slots[..end].iter().map(|slot| match slot {
                Slot::Known(answer) => *answer,
                Slot::Entry(index) => Ok(match plan.targets[*index] {
                    Target::Exception(..) | Target::Mark(..) => Done::Unique,
                    Target::Overlay(..) => Done::Private(places[plan.copies_in(*index)]),
                }),
            }));
            rest = &rest[end..];
            if places.len() < wanted {
                // Free chunks are rare: the next ones are looked for in the background.
                answers.extend(rest.iter().map(|_| Err(OpError::Wait)));
                return Ok(());
            }
        }
        Ok(())
    }

    fn plan(&mut self, ops: &[Op]) -> Result<Plan, StoreError> {
        self.prefetch(ops);
        let mut plan = Plan::default();
        for op in ops {
            let slot = match *op {
                Op::OriginWrite(chunk) => self.plan_origin(&mut plan, chunk)?,
                Op::SnapshotWrite(tag, chunk) => self.plan_snapshot(&mut plan, tag, chunk)?,
            };
            plan.slots.push(slot);
        }
        Ok(plan)
    }

    /// Brings the leaves that the ops of a group need into the cache, in parallel.
    fn prefetch(&mut self, ops: &[Op]) {
        let (mut exceptions, mut overlays) = (Vec::new(), Vec::new());
        for op in ops {
            let (newest, chunk) = match *op {
                Op::OriginWrite(chunk) => (self.state.snapshots.newest_keeper_with(chunk), chunk),
                Op::SnapshotWrite(tag, chunk) => {
                    let seq = self.state.snapshots.by_tag(tag).map(|s| s.seq);
                    overlays.extend(seq.map(|seq| (seq.0, chunk.0)));
                    (seq, chunk)
                }
            };
            exceptions.extend(newest.map(|seq| (chunk.0, seq.0)));
        }
        for (index, keys) in [
            (&self.state.exceptions, exceptions),
            (&self.state.overlays, overlays),
        ] {
            if keys.len() > 1 {
                index.prefetch(&mut self.media, &keys);
            }
        }
    }

    fn plan_origin(&mut self, plan: &mut Plan, chunk: Chunk) -> Result<Slot, StoreError> {
        if self.media.origin_length.to_chunks(self.superblock.chunk) <= chunk.0 {
            return Ok(Slot::Known(Err(OpError::OutOfRange(chunk))));
        }
        if let Some(tag) = self.reverts_later(chunk) {
            return Ok(Slot::Known(Err(OpError::Reverting(tag))));
        }
        Ok(match self.before_write(chunk)? {
            BeforeWrite::Nothing => Slot::Known(Ok(Done::Unique)),
            BeforeWrite::Mark(seq) => plan.add(Target::Mark(chunk, seq), None),
            BeforeWrite::Copy(seq) => {
                plan.add(Target::Exception(chunk, seq), Some(Source::Origin(chunk)))
            }
        })
    }

    fn plan_snapshot(
        &mut self,
        plan: &mut Plan,
        tag: SnapTag,
        chunk: Chunk,
    ) -> Result<Slot, StoreError> {
        let snapshot = match self.live_snapshot(tag, chunk) {
            Ok(snapshot) => snapshot,
            Err(refused) => return Ok(Slot::Known(Err(refused))),
        };
        if self.is_reverting_to(snapshot.seq)
            && kept!(
                "reverted-snapshot-not-written",
                "the origin would be given some chunks as they were and some as they are"
            )
        {
            return Ok(Slot::Known(Err(OpError::Reverting(tag))));
        }
        if let Some(place) = self.overlay(snapshot.seq, chunk)? {
            return Ok(Slot::Known(Ok(Done::Private(place))));
        }
        let source = match self.present(snapshot.seq, chunk)? {
            Some(place) => Source::Store(place),
            None if !self.origin_reaches(&snapshot, chunk) => {
                return Ok(Slot::Known(Err(OpError::OutOfRange(chunk))));
            }
            None => Source::Origin(chunk),
        };
        Ok(plan.add(Target::Overlay(snapshot.seq, chunk), Some(source)))
    }

    /// Finds free chunks for so many copies, or fewer: then more are looked for in the background.
    fn find_places(&mut self, copies: usize) -> Result<Vec<StoreChunk>, StoreError> {
        let places = self
            .state
            .space
            .find_free(&mut self.media, copies, self.budget)?;
        if places.len() < copies {
            self.need = Some(Need::Search);
        }
        Ok(places)
    }

    /// Makes the first `count` entries of a plan durable, with the copies that belong to them in `places`.
    fn make_entries(
        &mut self,
        plan: &Plan,
        count: usize,
        places: &[StoreChunk],
    ) -> Result<(), StoreError> {
        let targets = &plan.targets[..count];
        if !targets.iter().any(Target::is_copy) {
            return self.make_marks(targets);
        }
        let copied = plan.copies_in(count);
        let places = &places[..copied];
        let chunk_bytes = self.superblock.chunk.bytes() as usize;
        // Kept from group to group: to map and zero new memory costs as much as copying.
        let mut copies = std::mem::take(&mut self.copies);
        if copies.len() < copied * chunk_bytes {
            copies = AlignedBuf::zeroed(copied * chunk_bytes);
        }
        let buffer = &mut copies[..copied * chunk_bytes];
        self.media.read_chunks(&plan.sources[..copied], buffer)?;
        let mut data = places.iter().zip(buffer.chunks_exact(chunk_bytes));
        let mut entries = Vec::with_capacity(count);
        for target in targets {
            entries.push(match *target {
                Target::Mark(chunk, seq) => Entry::Mark { chunk, seq },
                Target::Exception(chunk, seq) => {
                    let Some((&place, data)) = data.next() else {
                        break;
                    };
                    Entry::Exception {
                        chunk,
                        seq,
                        place,
                        crc: crc32c::crc32c(data),
                    }
                }
                Target::Overlay(seq, chunk) => {
                    let Some((&place, _)) = data.next() else {
                        break;
                    };
                    Entry::Overlay { seq, chunk, place }
                }
            });
        }
        let writes = chunk_writes(places, buffer, self.superblock.chunk);
        let overlays = targets
            .iter()
            .any(|target| matches!(target, Target::Overlay(..)));
        let placed = self.place_record(&entries)?;
        let record = Write {
            offset: placed.at.to_offset(),
            from: &placed.bytes,
        };
        if overlays {
            self.media.write_data(&writes)?;
            if kept!(
                "overlay-data-first",
                "the record of an overlay is the proof of its data, which no checksum can give later"
            ) {
                self.media.flush_data()?;
            }
            self.media.write_meta(&[record])?;
            if kept!(
                "overlay-record-durable",
                "a write into a snapshot is answered with a place that a power cut would take away"
            ) {
                self.media.flush_meta()?;
            }
        } else {
            self.media.write_both(writes, record)?;
            if kept!(
                "copies-durable",
                "the origin is overwritten after the answer, and the copy would be lost"
            ) {
                self.media.flush_both()?;
            }
        }
        self.copies = copies;
        self.ring.advance(&placed);
        entries.iter().for_each(|entry| self.apply(entry));
        self.pace_checkpoint(count)
    }

    /// Makes marks durable: no data belongs to them.
    fn make_marks(&mut self, targets: &[Target]) -> Result<(), StoreError> {
        let entries: Vec<Entry> = targets
            .iter()
            .filter_map(|target| match *target {
                Target::Mark(chunk, seq) => Some(Entry::Mark { chunk, seq }),
                Target::Exception(..) | Target::Overlay(..) => None,
            })
            .collect();
        let placed = self.place_record(&entries)?;
        self.media.write_meta(&[Write {
            offset: placed.at.to_offset(),
            from: &placed.bytes,
        }])?;
        if kept!(
            "marks-durable",
            "the origin is overwritten after the answer, and a list would lack the chunk"
        ) {
            self.media.flush_meta()?;
        }
        self.ring.advance(&placed);
        entries.iter().for_each(|entry| self.apply(entry));
        self.pace_checkpoint(targets.len())
    }

    /// Applies an entry that is durable.
    fn apply(&mut self, entry: &Entry) {
        self.state.apply(entry);
        self.sweep.note(entry);
    }

    /// Places a record, after a checkpoint if the ring is full. For copies and the sweep there is room, by
    /// what was asked before; and some of the ring is kept for commands.
    fn place_record(&mut self, entries: &[Entry]) -> Result<super::journal::Placed, StoreError> {
        if let Some(placed) = self.ring.place(entries) {
            return Ok(placed);
        }
        self.checkpoint()?;
        self.ring.place(entries).ok_or_else(|| {
            self.media
                .inconsistent("a record does not fit into the empty journal")
        })
    }

    /// Makes entries without data durable and applies them.
    pub(crate) fn record(&mut self, entries: &[Entry]) -> Result<(), StoreError> {
        let result = self.try_record(entries);
        self.latch(result)
    }

    fn try_record(&mut self, entries: &[Entry]) -> Result<(), StoreError> {
        let placed = self.place_record(entries)?;
        self.media.write_meta(&[Write {
            offset: placed.at.to_offset(),
            from: &placed.bytes,
        }])?;
        let frees = |entry: &Entry| {
            matches!(
                entry,
                Entry::RemoveException { .. }
                    | Entry::RemoveOverlay { .. }
                    | Entry::ExceptionToMark { .. }
                    | Entry::OverlayToMark { .. }
            )
        };
        if !(entries.iter().all(frees)) {
            if kept!(
                "command-durable",
                "an acknowledged command would be undone by a power cut"
            ) {
                self.media.flush_meta()?;
            }
        } else if kept!(
            "freed-durable",
            "a freed chunk is used again while the durable index still leads to it"
        ) {
            self.media.flush_meta()?;
        }
        self.ring.advance(&placed);
        entries.iter().for_each(|entry| self.apply(entry));
        self.pace_checkpoint(0)
    }
}
