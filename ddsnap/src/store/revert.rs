// SPDX-License-Identifier: GPL-2.0-only
//! Giving the origin back the content it had when a snapshot was taken.
//!
//! For the store a revert is what a user would do who copied the snapshot over the origin: each chunk is
//! saved for the snapshots that need it before it is overwritten, so every snapshot keeps its
//! content. Only chunks that an exception or an overlay serves are written; the others are the same.
//!
//! It goes in two phases. The first only reads: is all of the snapshot's data sound, and is there room
//! for what has to be saved? So a revert that cannot succeed is refused while the origin is untouched.
//! The second makes durable what was written to the snapshot, begins with a durable record, and works
//! through the chunks in ascending order, in bounded steps: save, read, write to the origin. Now and then
//! the origin is flushed and the place reached becomes durable. After a crash it goes on from there: doing
//! a chunk twice is doing it once, for what was saved is not saved again, and the snapshot still has what
//! is written.
//!
//! Until the end its snapshot may neither be deleted, given up nor written to, and no snapshot is created:
//! it would show an origin that is half one thing and half another.
//!
//! A write of somebody else to a chunk that the revert has yet to deal with would be overwritten by it, and
//! so would one to a chunk dealt with since the place reached was made durable, after a crash. So the
//! first is refused, and before the second is let through the place is made durable. What lies behind the
//! end of the snapshot is nothing to the revert. The caller keeps reads of snapshots from the origin away
//! during a step, and writes that need not ask.

use std::collections::BTreeSet;

use super::Store;
use super::api::{Done, Op, OpError, RevertError, Reverting};
use super::error::StoreError;
use super::index::changed::{self, Wanted};
use super::lookup::{BeforeWrite, Found};
use crate::buffer::AlignedBuf;
use crate::device::Write;
use crate::format::journal::Entry;
use crate::format::snaptable::{Snapshot, State};
use crate::promise::kept;
use crate::units::{Chunk, Sectors, SnapSeq, SnapTag};

/// Nodes of an index looked at in a step.
const STEP_NODES: usize = 4;
/// Entries a sweep looks at in a step.
const SWEEP_ENTRIES: usize = 256;
/// Bytes written to the origin before the place reached is made durable.
const SAVE_EVERY: u64 = 4 << 20;

/// The part of a revert that lasts in memory only.
#[derive(Debug, Default)]
pub(crate) struct Revert {
    check: Option<Check>,
    /// The next chunk, which the flushed part of the origin may not have reached: 0 if it has.
    next: u64,
    /// Bytes written since the origin was flushed.
    unsaved: u64,
    /// What is committed now is for the revert itself.
    saving: bool,
    /// Chunks left as they were, since the store was opened.
    skipped: u64,
    /// Those not told of yet, and why.
    untold: Vec<(Chunk, String)>,
}

/// The first phase.
#[derive(Clone, Copy, Debug)]
struct Check {
    tag: SnapTag,
    seq: SnapSeq,
    next: u64,
    /// Chunks of the origin that have to be saved.
    copies: u64,
}

impl Store {
    /// Begins the first phase of a revert to the snapshot `tag`. Nothing of it is durable.
    ///
    /// # Errors
    /// The store has failed. Inner: there is no such snapshot, it is squashed or longer than the origin, or
    /// a revert is under way.
    pub fn revert_begin(&mut self, tag: SnapTag) -> Result<Result<(), RevertError>, StoreError> {
        self.check_latch()?;
        if let Some(tag) = self.reverting() {
            return Ok(Err(RevertError::UnderWay(tag)));
        }
        Ok(self.revertible(tag).map(|snapshot| {
            self.revert.check = Some(Check {
                tag,
                seq: snapshot.seq,
                next: 0,
                copies: 0,
            });
        }))
    }

    /// Gives up the first phase.
    pub fn revert_cancel(&mut self) {
        self.revert.check = None;
    }

    /// Begins the second phase, once a step has given [`Reverting::Checked`]; durable on return.
    ///
    /// # Errors
    /// The store cannot go on. Inner: the snapshot has gone meanwhile, or nothing was checked.
    pub fn revert_start(&mut self) -> Result<Result<(), RevertError>, StoreError> {
        self.check_latch()?;
        let Some(check) = self.revert.check.take() else {
            return Ok(Err(RevertError::NotBegun));
        };
        let snapshot = match self.revertible(check.tag) {
            Ok(snapshot) if snapshot.seq == check.seq => snapshot,
            Ok(_) => return Ok(Err(RevertError::NoSuchSnapshot(check.tag))),
            Err(refused) => return Ok(Err(refused)),
        };
        if kept!(
            "reverted-from-durable",
            "the origin would keep what was written to the snapshot and a power cut took from it: the two would differ"
        ) {
            let flushed = self.media.flush_data();
            self.latch(flushed)?;
        }
        self.record(&[Entry::RevertBegin(snapshot.seq)])?;
        self.revert = Revert::default();
        Ok(Ok(()))
    }

    /// Does a bounded part of whichever phase is under way: looks at up to `chunks` chunks of the snapshot.
    ///
    /// # Errors
    /// The store cannot go on, or the origin fails ([`StoreError::WriteOrigin`]); the second phase
    /// may be tried again. Inner: the first phase found that the revert cannot be done, and is over; or
    /// the second phase lacks room and may be tried again ([`RevertError::StoreFull`]).
    pub fn revert_step(
        &mut self,
        chunks: usize,
    ) -> Result<Result<Reverting, RevertError>, StoreError> {
        self.check_latch()?;
        if self.state.revert.is_some() {
            return self.write_step(chunks.max(1));
        }
        let Some(mut check) = self.revert.check.take() else {
            return Ok(Err(RevertError::NotBegun));
        };
        let result = self.check_step(&mut check, chunks.max(1))?;
        if result.is_ok() {
            self.revert.check = Some(check);
        }
        Ok(result)
    }

    /// The snapshot of a revert whose second phase is under way.
    #[must_use]
    pub fn reverting(&self) -> Option<SnapTag> {
        let revert = self.state.revert?;
        self.state.snapshots.get(revert.seq).map(|s| s.tag)
    }

    /// How many bytes of how many a revert has dealt with, its two phases together; zeros if there is
    /// none.
    #[must_use]
    pub fn revert_progress(&self) -> (u64, u64) {
        let shift = self.superblock.chunk;
        let bytes = |chunks| Chunk(chunks).to_offset(shift);
        let length = |seq| {
            let snapshot = self.state.snapshots.get(seq);
            snapshot.map_or(0, |snapshot| snapshot.length.to_chunks(shift))
        };
        match (self.state.revert, &self.revert.check) {
            (Some(revert), _) => {
                let length = length(revert.seq);
                let next = revert.next.0.max(self.revert.next);
                (bytes(length + next), bytes(2 * length))
            }
            (None, Some(check)) => (bytes(check.next), bytes(2 * length(check.seq))),
            (None, None) => (0, 0),
        }
    }

    /// Chunks of the origin that could not be given back since the last call, and why: their data or what
    /// other snapshots need of the origin cannot be read.
    pub fn take_revert_skipped(&mut self) -> Vec<(Chunk, String)> {
        std::mem::take(&mut self.revert.untold)
    }

    /// The snapshot of a revert under way that has yet to overwrite this chunk of the origin, or may have to
    /// do it again.
    pub(super) fn reverts_later(&self, chunk: Chunk) -> Option<SnapTag> {
        let revert = self.state.revert.filter(|_| !self.revert.saving)?;
        let snapshot = self.state.snapshots.get(revert.seq)?;
        let refuses = kept!(
            "revert-refuses-writes-ahead",
            "a write would be answered and then overwritten when the revert comes to its chunk"
        );
        let ahead = revert.next <= chunk && self.state.snapshots.has(snapshot, chunk);
        (refuses && ahead).then_some(snapshot.tag)
    }

    /// Makes the place that a revert has reached durable if one of these writes is to a chunk that would
    /// otherwise be overwritten again after a crash.
    pub(super) fn mark_revert_for(&mut self, ops: &[Op]) -> Result<(), StoreError> {
        let Some(revert) = self.state.revert.filter(|_| !self.revert.saving) else {
            return Ok(());
        };
        let since = revert.next..Chunk(self.revert.next);
        let dealt_with = |op: &Op| matches!(op, Op::OriginWrite(chunk) if since.contains(chunk));
        if ops.iter().any(dealt_with)
            && kept!(
                "revert-marks-before-writes-behind",
                "after a crash the revert would overwrite a write that was answered"
            )
        {
            self.mark_revert(revert.seq)?;
        }
        Ok(())
    }

    /// Makes the place reached durable, and before it all that was written.
    fn mark_revert(&mut self, seq: SnapSeq) -> Result<(), StoreError> {
        let next = Chunk(self.revert.next);
        self.flush_reverted()?;
        self.record(&[Entry::RevertProgress { seq, next }])
    }

    /// Whether this is the snapshot of a revert under way, which must stay.
    pub(super) fn is_reverting_to(&self, seq: SnapSeq) -> bool {
        self.state.revert.is_some_and(|revert| revert.seq == seq)
    }

    fn revertible(&self, tag: SnapTag) -> Result<Snapshot, RevertError> {
        let snapshot = *self
            .state
            .snapshots
            .by_tag(tag)
            .ok_or(RevertError::NoSuchSnapshot(tag))?;
        match snapshot.state {
            State::Live => {}
            State::Bookmark => return Err(RevertError::Bookmark(tag)),
            State::Squashed | State::Deleted => return Err(RevertError::Squashed(tag)),
        }
        if snapshot.length > self.media.origin_length {
            return Err(RevertError::Longer {
                tag,
                snapshot: snapshot.length.to_bytes(),
                origin: self.media.origin_length.to_bytes(),
            });
        }
        Ok(snapshot)
    }

    fn check_step(
        &mut self,
        check: &mut Check,
        chunks: usize,
    ) -> Result<Result<Reverting, RevertError>, StoreError> {
        let snapshot = match self.revertible(check.tag) {
            Ok(snapshot) if snapshot.seq == check.seq => snapshot,
            Ok(_) => return Ok(Err(RevertError::NoSuchSnapshot(check.tag))),
            Err(refused) => return Ok(Err(refused)),
        };
        if check.next < snapshot.length.to_chunks(self.superblock.chunk) {
            let (mut batch, next) = self.differing(&snapshot, check.next, chunks)?;
            if !kept!(
                "revert-reads-before-it-writes",
                "an unreadable chunk would be met when a part of the origin is overwritten already"
            ) {
                batch.clear();
            }
            let (_, problems) = self.read_snapshot(&batch, snapshot.length)?;
            for ((chunk, _), problem) in batch.into_iter().zip(problems) {
                if let Some(problem) = problem {
                    return Ok(Err(RevertError::Damaged {
                        tag: check.tag,
                        chunk,
                        problem,
                    }));
                }
                let copies = matches!(self.before_write(chunk)?, BeforeWrite::Copy(_));
                check.copies += u64::from(copies);
            }
            check.next = next;
            return Ok(Ok(Reverting::More));
        }
        let free = self.state.space.free();
        if check.copies <= free {
            return Ok(Ok(Reverting::Checked));
        }
        if self.sweep.pending() {
            self.background_step(SWEEP_ENTRIES)?;
            return Ok(Ok(Reverting::More));
        }
        Ok(Err(RevertError::NoRoom {
            needed: check.copies,
            free,
        }))
    }

    fn write_step(&mut self, chunks: usize) -> Result<Result<Reverting, RevertError>, StoreError> {
        let revert = self.state.revert;
        let found = revert.and_then(|r| Some((r, *self.state.snapshots.get(r.seq)?)));
        let Some((revert, mut snapshot)) = found else {
            return Err(self
                .media
                .inconsistent("a revert to a snapshot that is not there"));
        };
        // The device may have been cut since: what it has is given back.
        snapshot.length = snapshot.length.min(self.media.origin_length);
        let from = self.revert.next.max(revert.next.0);
        let (mut batch, mut next) = self.differing(&snapshot, from, chunks)?;
        if !batch.is_empty() {
            if let Some(refused) = self.save_for_others(&mut batch)? {
                if batch.is_empty() && self.is_making_room() {
                    self.background_step(SWEEP_ENTRIES)?;
                    return Ok(Ok(Reverting::More));
                }
                if batch.is_empty() {
                    return Ok(Err(RevertError::StoreFull));
                }
                next = refused.0;
            }
            self.write_to_origin(&batch, snapshot.length)?;
        }
        self.revert.next = next;
        if next >= snapshot.length.to_chunks(self.superblock.chunk) {
            self.flush_reverted()?;
            self.record(&[Entry::RevertEnd(revert.seq)])?;
            let Revert {
                skipped, untold, ..
            } = std::mem::take(&mut self.revert);
            self.revert.untold = untold;
            return Ok(Ok(Reverting::Done { skipped }));
        }
        if self.revert.unsaved >= SAVE_EVERY {
            self.mark_revert(revert.seq)?;
        }
        Ok(Ok(Reverting::More))
    }

    /// Chunks of the snapshot, at most `most` and from `from` on, that may differ from the origin, with
    /// where they are; and the first chunk not looked at.
    fn differing(
        &mut self,
        snapshot: &Snapshot,
        from: u64,
        most: usize,
    ) -> Result<(Vec<(Chunk, Found)>, u64), StoreError> {
        let (seq, end) = (
            snapshot.seq,
            snapshot.length.to_chunks(self.superblock.chunk),
        );
        let exceptions = Wanted {
            first_seq: seq.0,
            end_seq: u64::MAX,
            end: (end, 0),
        };
        let overlays = Wanted {
            first_seq: seq.0,
            end_seq: seq.0 + 1,
            end: (seq.0, end),
        };
        let (mut saved, mut own) = (Vec::new(), Vec::new());
        let mut at = (from, 0);
        // A chunk may have more exceptions than a step looks at, all of them older.
        let behind_saved = loop {
            let (index, media) = (&self.state.exceptions, &mut self.media);
            let next = changed::step(index, media, &exceptions, at, STEP_NODES, &mut saved)?;
            match next {
                None => break end,
                Some(next) if saved.last().is_some_and(|last| last.0 == next.0) => {
                    break next.0 + 1;
                }
                Some(next) if next.0 > from => break next.0,
                Some(next) => at = next,
            }
        };
        let (index, media) = (&self.state.overlays, &mut self.media);
        let at = (seq.0, from);
        let behind_own = changed::step(index, media, &overlays, at, STEP_NODES, &mut own)?
            .map_or(end, |next| next.1);
        let mut behind = behind_saved.min(behind_own);
        let saved = saved.iter().map(|key| key.0);
        let chunks: BTreeSet<u64> = saved
            .chain(own.iter().map(|key| key.1))
            .filter(|&chunk| chunk < behind)
            .collect();
        if let Some(&first_left) = chunks.iter().nth(most) {
            behind = first_left;
        }
        let mut batch = Vec::new();
        for chunk in chunks.into_iter().take(most).map(Chunk) {
            if let Some(place) = self.overlay(seq, chunk)? {
                batch.push((chunk, Found::Overlay(place)));
            } else if let Some((place, crc)) = self.exception(seq, chunk)? {
                batch.push((chunk, Found::Exception(place, crc)));
            }
        }
        Ok((batch, behind))
    }

    /// Reads the data of a batch of a snapshot that has `length`; for each chunk what is wrong with it, if
    /// anything is.
    fn read_snapshot(
        &mut self,
        batch: &[(Chunk, Found)],
        length: Sectors,
    ) -> Result<(AlignedBuf, Vec<Option<String>>), StoreError> {
        let chunk_bytes = self.superblock.chunk.bytes() as usize;
        let mut buffer = AlignedBuf::zeroed(batch.len() * chunk_bytes);
        let shift = self.superblock.chunk;
        let source = |&(chunk, found): &(Chunk, Found)| found.source(chunk, length, shift);
        let sources: Vec<_> = batch.iter().map(source).collect();
        let whole = self.media.read_chunks(&sources, &mut buffer);
        let mut problems = Vec::with_capacity(batch.len());
        for ((&(chunk, found), source), data) in batch
            .iter()
            .zip(&sources)
            .zip(buffer.chunks_exact_mut(chunk_bytes))
        {
            let read = match &whole {
                Ok(()) => Ok(()),
                // One sector fails all of a batch: which?
                Err(_) => self.media.read_chunks(&[*source], data),
            };
            let proven = read.and_then(|()| match found {
                Found::Exception(place, crc) => self.media.prove(chunk, place, crc, data),
                Found::Origin | Found::Overlay(_) => Ok(()),
            });
            problems.push(proven.err().map(|error| error.with_cause()));
        }
        Ok((buffer, problems))
    }

    /// Saves the origin's chunks for the snapshots that need them. What cannot be read is taken out
    /// of the batch; what has no room is too, with all behind it, and the first of these is given back.
    fn save_for_others(
        &mut self,
        batch: &mut Vec<(Chunk, Found)>,
    ) -> Result<Option<Chunk>, StoreError> {
        self.revert.saving = true;
        let saved = self.try_save_for_others(batch);
        self.revert.saving = false;
        saved
    }

    fn try_save_for_others(
        &mut self,
        batch: &mut Vec<(Chunk, Found)>,
    ) -> Result<Option<Chunk>, StoreError> {
        let ops: Vec<Op> = batch
            .iter()
            .map(|&(chunk, _)| Op::OriginWrite(chunk))
            .collect();
        let mut answers = Vec::with_capacity(ops.len());
        match self.commit(&ops) {
            Ok(all) => answers.extend(all.into_iter().map(Some)),
            Err(StoreError::Read { .. }) => {
                for (op, &(chunk, _)) in ops.iter().zip(batch.iter()) {
                    match self.commit(std::slice::from_ref(op)) {
                        Ok(one) => answers.extend(one.into_iter().map(Some)),
                        Err(error @ StoreError::Read { .. }) => {
                            self.skip(chunk, error.with_cause());
                            answers.push(None);
                        }
                        Err(error) => return Err(error),
                    }
                }
            }
            Err(error) => return Err(error),
        }
        let mut granted = Vec::with_capacity(batch.len());
        let mut refused = None;
        for (one, answer) in std::mem::take(batch).into_iter().zip(answers) {
            match answer {
                Some(Ok(Done::Unique)) => granted.push(one),
                None => {}
                Some(Err(OpError::StoreFull | OpError::Wait)) => {
                    refused = Some(one.0);
                    break;
                }
                Some(other) => {
                    let problem = format!("saving chunk {} came to {other:?}", one.0);
                    return Err(self.media.inconsistent(problem));
                }
            }
        }
        *batch = granted;
        Ok(refused)
    }

    /// Gives the origin the chunks of a snapshot that has `length`: of the last one what there is of it.
    fn write_to_origin(
        &mut self,
        batch: &[(Chunk, Found)],
        length: Sectors,
    ) -> Result<(), StoreError> {
        let (buffer, problems) = self.read_snapshot(batch, length)?;
        let shift = self.superblock.chunk;
        let mut writes = Vec::with_capacity(batch.len());
        for ((&(chunk, _), problem), from) in batch
            .iter()
            .zip(problems)
            .zip(buffer.chunks_exact(shift.bytes() as usize))
        {
            match problem {
                Some(problem) => self.skip(chunk, problem),
                None => writes.push(Write {
                    offset: chunk.to_offset(shift),
                    from: &from[..length.in_chunk(chunk, shift).to_bytes() as usize],
                }),
            }
        }
        self.revert.unsaved += writes.len() as u64 * shift.bytes();
        let origin = &mut self.media.origin;
        origin
            .write(&writes)
            .map_err(|source| StoreError::WriteOrigin {
                device: origin.name().to_owned(),
                source,
            })
    }

    fn flush_reverted(&mut self) -> Result<(), StoreError> {
        if !kept!(
            "reverted-durable-before-mark",
            "after a crash the revert would go on behind chunks that were not given back"
        ) {
            self.revert.unsaved = 0;
            return Ok(());
        }
        let flushed = self.media.flush_origin_again();
        let flushed = flushed.map_err(|source| StoreError::WriteOrigin {
            device: self.media.origin_name(),
            source,
        });
        let starts_anew = kept!(
            "revert-redoes-after-failed-flush",
            "what a failed flush lost of the origin would never be written again"
        );
        if flushed.is_err() && starts_anew {
            // Nobody knows what of it is there: go on from what was flushed before.
            self.revert.next = 0;
        }
        self.revert.unsaved = 0;
        flushed
    }

    fn skip(&mut self, chunk: Chunk, problem: String) {
        self.revert.skipped += 1;
        self.revert.untold.push((chunk, problem));
    }
}
