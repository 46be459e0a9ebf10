// SPDX-License-Identifier: GPL-2.0-only
//! The store's state and the one way it changes: by journal entries.
//!
//! The running store and recovery apply the same entries with the same code, so what is replayed is
//! what was acknowledged.

use super::alloc::Space;
use super::error::StoreError;
use super::index::Index;
use super::media::Media;
use super::snapshot::Snapshots;
use crate::format::journal::Entry;
use crate::format::node::Value;
use crate::format::origin::{Guard, MAX_GUARDS, OriginRecord};
use crate::format::snaptable::{MAX_ENTRIES, Snapshot, State as SnapshotState};
use crate::format::superblock::Revert;
use crate::units::{Chunk, Sectors, SnapSeq, SnapTag, StoreChunk};

/// Everything a checkpoint makes durable.
#[derive(Debug)]
pub(crate) struct State {
    pub next_seq: SnapSeq,
    pub revert: Option<Revert>,
    pub origin_record: OriginRecord,
    pub snapshots: Snapshots,
    /// (chunk, seq)
    pub exceptions: Index,
    /// (seq, chunk)
    pub overlays: Index,
    pub space: Space,
}

impl State {
    /// Applies an entry that is durable in the journal.
    pub fn apply(&mut self, entry: &Entry) {
        match *entry {
            Entry::Exception {
                chunk,
                seq,
                place,
                crc,
            } => {
                self.exceptions.insert(
                    (chunk.0, seq.0),
                    Value {
                        place: place.0,
                        crc,
                    },
                );
                self.space.mark(place, true);
            }
            Entry::Overlay { seq, chunk, place } => {
                self.overlays.insert(
                    (seq.0, chunk.0),
                    Value {
                        place: place.0,
                        crc: 0,
                    },
                );
                self.space.mark(place, true);
            }
            Entry::RemoveException { chunk, seq, place } => {
                self.exceptions.remove((chunk.0, seq.0));
                self.free(place);
            }
            Entry::RemoveOverlay { seq, chunk, place } => {
                self.overlays.remove((seq.0, chunk.0));
                self.free(place);
            }
            Entry::Create {
                seq,
                tag,
                created,
                length,
            } => self.create(SnapshotState::Live, seq, tag, created, length),
            Entry::Bookmark {
                seq,
                tag,
                created,
                length,
            } => self.create(SnapshotState::Bookmark, seq, tag, created, length),
            Entry::Mark { chunk, seq } => self.exceptions.insert((chunk.0, seq.0), Value::MARK),
            Entry::ExceptionToMark { chunk, seq, place } => {
                self.exceptions.insert((chunk.0, seq.0), Value::MARK);
                self.free(place);
            }
            Entry::OverlayToMark { seq, chunk, place } => {
                self.overlays.insert((seq.0, chunk.0), Value::MARK);
                self.free(place);
            }
            Entry::ToBookmark(seq) => self.snapshots.set_state(seq, SnapshotState::Bookmark),
            Entry::WhenFull(seq, to_bookmark) => {
                self.snapshots.set_to_bookmark(seq, to_bookmark);
            }
            Entry::CutBookmarks(length) => self.snapshots.cut_bookmarks(length),
            Entry::Delete(seq) => self.snapshots.set_state(seq, SnapshotState::Deleted),
            Entry::Squash(seq) => self.snapshots.set_state(seq, SnapshotState::Squashed),
            Entry::Priority(seq, priority) => self.snapshots.set_priority(seq, priority),
            Entry::Usecount(seq, usecount) => self.snapshots.set_usecount(seq, usecount),
            Entry::Forget(seq) => self.snapshots.forget(seq),
            Entry::RevertBegin(seq) => {
                let next = Chunk(0);
                self.revert = Some(Revert { seq, next });
            }
            Entry::RevertProgress { seq, next } => self.revert = Some(Revert { seq, next }),
            Entry::RevertEnd(_) => self.revert = None,
            Entry::Doubtful(seq) => self.snapshots.set_doubtful(seq),
            Entry::Opened { boot, seen } => {
                let record = &mut self.origin_record;
                (record.boot, record.seen) = (boot, seen);
                record.areas.clear();
                record.guards.clear();
            }
            Entry::Guard { seq, chunk, digest } => {
                let record = &mut self.origin_record;
                if record.guard_seq != seq {
                    record.guards.clear();
                }
                record.guard_seq = seq;
                record.guards.truncate(MAX_GUARDS - 1);
                record.guards.push(Guard { chunk, digest });
            }
            Entry::Again { .. } => {} // which records count was seen before
        }
    }

    fn create(
        &mut self,
        state: SnapshotState,
        seq: SnapSeq,
        tag: SnapTag,
        created: i64,
        length: Sectors,
    ) {
        self.snapshots.insert(Snapshot {
            seq,
            tag,
            state,
            priority: 0,
            usecount: 0,
            created,
            length,
            doubtful: false,
            to_bookmark: false,
        });
        self.next_seq = SnapSeq(seq.0 + 1);
    }

    /// A removed entry's chunk is free; a mark had none.
    fn free(&mut self, place: StoreChunk) {
        if place.0 != Value::MARK.place {
            self.space.mark(place, false);
        }
    }

    /// Checks an entry read from the journal against the state it is to change.
    ///
    /// Its checksum holds, so a contradiction means that something else is damaged or that a
    /// program had a bug: either way replaying on would make it worse. The trees are not asked, only
    /// the space map, which is small: opening must not take a read for each entry.
    pub fn check(&mut self, media: &mut Media, entry: &Entry) -> Result<(), StoreError> {
        let problem = match *entry {
            Entry::Again { .. } => None,
            Entry::Exception {
                chunk, seq, place, ..
            } => {
                if self.exceptions.has_recent((chunk.0, seq.0)) {
                    Some("an exception is recorded twice")
                } else {
                    self.check_new(media, chunk, seq, place)?
                }
            }
            Entry::Overlay { seq, chunk, place } => {
                if self.overlays.has_recent((seq.0, chunk.0)) {
                    Some("an overlay is recorded twice")
                } else {
                    self.check_new(media, chunk, seq, place)?
                }
            }
            Entry::RemoveException { place, .. } | Entry::RemoveOverlay { place, .. }
                if place.0 == Value::MARK.place =>
            {
                None
            }
            Entry::RemoveException { place, .. }
            | Entry::RemoveOverlay { place, .. }
            | Entry::ExceptionToMark { place, .. }
            | Entry::OverlayToMark { place, .. } => {
                let free = !self.space.contains(place) || !self.space.is_used(media, place)?;
                free.then_some("a store chunk is freed that is not in use")
            }
            Entry::Mark { chunk, seq } => {
                if self.exceptions.has_recent((chunk.0, seq.0)) {
                    Some("a change is recorded twice")
                } else {
                    self.lacks(seq, chunk)
                }
            }
            Entry::Create { seq, tag, .. } | Entry::Bookmark { seq, tag, .. } => {
                if seq != self.next_seq || seq.0 >= u64::MAX - 1 {
                    Some("a snapshot is created out of sequence")
                } else if self.snapshots.by_tag(tag).is_some()
                    || self.snapshots.len() >= MAX_ENTRIES
                {
                    Some("a snapshot is created whose tag is taken")
                } else {
                    None
                }
            }
            Entry::RevertBegin(seq) => {
                let live = |s: &Snapshot| s.state == SnapshotState::Live;
                (self.revert.is_some() || !self.snapshots.get(seq).is_some_and(live))
                    .then_some("a revert begins that cannot")
            }
            Entry::RevertProgress { seq, .. } | Entry::RevertEnd(seq) => self
                .revert
                .is_none_or(|revert| revert.seq != seq)
                .then_some("a revert goes on that did not begin"),
            Entry::Doubtful(_) | Entry::Opened { .. } | Entry::CutBookmarks(_) => None,
            Entry::Guard { seq, .. } => self
                .snapshots
                .get(seq)
                .is_none()
                .then_some("a chunk is guarded for a snapshot that is not there"),
            Entry::Delete(seq) | Entry::Squash(seq) | Entry::ToBookmark(seq)
                if self.revert.is_some_and(|revert| revert.seq == seq) =>
            {
                Some("the snapshot of a revert is taken away")
            }
            Entry::Delete(seq)
            | Entry::Squash(seq)
            | Entry::Priority(seq, _)
            | Entry::Usecount(seq, _)
            | Entry::ToBookmark(seq)
            | Entry::WhenFull(seq, _)
            | Entry::Forget(seq) => match (entry, self.snapshots.get(seq).map(|s| s.state)) {
                (_, None) => Some("a snapshot that is not there is changed"),
                (Entry::Forget(_), Some(state)) if state != SnapshotState::Deleted => {
                    Some("a snapshot is forgotten that was not deleted")
                }
                (Entry::Forget(_), _) => None,
                (_, Some(SnapshotState::Deleted)) => Some("a deleted snapshot is changed"),
                (Entry::Squash(_), Some(SnapshotState::Squashed)) => {
                    Some("a snapshot is squashed twice")
                }
                (Entry::ToBookmark(_), Some(state)) if state != SnapshotState::Live => {
                    Some("what becomes a bookmark is no live snapshot")
                }
                _ => None,
            },
        };
        match problem {
            Some(problem) => Err(StoreError::Journal {
                device: media.meta_name(),
                problem: format!("{problem} ({entry:?})"),
            }),
            None => Ok(()),
        }
    }

    /// What is wrong if the snapshot or bookmark of this sequence has no such chunk.
    fn lacks(&self, seq: SnapSeq, chunk: Chunk) -> Option<&'static str> {
        let has = |snapshot| self.snapshots.has(snapshot, chunk);
        let has = self.snapshots.get(seq).is_some_and(has);
        (!has).then_some("a chunk is recorded for a snapshot that does not have it")
    }

    fn check_new(
        &mut self,
        media: &mut Media,
        chunk: Chunk,
        seq: SnapSeq,
        place: StoreChunk,
    ) -> Result<Option<&'static str>, StoreError> {
        Ok(if let Some(problem) = self.lacks(seq, chunk) {
            Some(problem)
        } else if !self.space.contains(place) {
            Some("a store chunk lies outside the data region")
        } else if self.space.is_used(media, place)? {
            Some("a store chunk in use is taken again")
        } else {
            None
        })
    }
}
