// SPDX-License-Identifier: GPL-2.0-only
//! Commands on snapshots: each is one journal record, durable when the method returns.

use super::Store;
use super::api::OpError;
use super::error::StoreError;
use super::full::Need;
use crate::format::journal::Entry;
use crate::format::snaptable::{MAX_ENTRIES, MAX_SNAPSHOTS, Snapshot};
use crate::promise::kept;
use crate::units::{Sectors, SnapSeq, SnapTag};

impl Store {
    /// Creates a snapshot of the origin as it is now. The caller holds back origin writes meanwhile.
    ///
    /// `now` is in seconds since 1970-01-01 UTC. If the table is full, the unused snapshot of the
    /// least priority, the oldest of these, is deleted.
    ///
    /// # Errors
    /// The store cannot go on. Inner: the tag is taken, or there is no room, or it is being made
    /// ([`OpError::Wait`]).
    pub fn create(&mut self, tag: SnapTag, now: i64) -> Result<Result<(), OpError>, StoreError> {
        self.create_keeper(tag, |seq, length| Entry::Create {
            seq,
            tag,
            created: now,
            length,
        })
    }

    /// Creates a snapshot or a bookmark by the entry that is made for its sequence and length.
    pub(super) fn create_keeper(
        &mut self,
        tag: SnapTag,
        entry: impl FnOnce(SnapSeq, Sectors) -> Entry,
    ) -> Result<Result<(), OpError>, StoreError> {
        self.check_latch()?;
        if self.state.snapshots.by_tag(tag).is_some() {
            return Ok(Err(OpError::SnapshotExists(tag)));
        }
        if let Some(tag) = self.reverting() {
            return Ok(Err(OpError::Reverting(tag)));
        }
        if self.state.snapshots.visible() >= MAX_SNAPSHOTS && !self.make_entry_room()? {
            return Ok(Err(OpError::TooManySnapshots));
        }
        if self.state.snapshots.len() >= MAX_ENTRIES && self.sweep.pending() {
            self.need = Some(Need::WholeSweep); // It forgets the deleted ones.
            return Ok(Err(OpError::Wait));
        }
        if let Err(refused) = self.make_table_room() {
            return Ok(Err(refused));
        }
        // What the snapshot is going to show must not be lost to a power cut that the snapshot survives.
        if kept!(
            "create-flushes-origin",
            "a snapshot would survive a power cut that takes back what it showed of the origin"
        ) {
            let flushed = self.media.flush_origin();
            flushed.map_err(|source| StoreError::FlushOrigin {
                device: self.media.origin_name(),
                source,
            })?;
        }
        let (seq, length) = (self.state.next_seq, self.media.origin_length);
        let entry = entry(seq, length);
        if matches!(entry, Entry::Bookmark { .. }) {
            self.announce_bookmarks()?;
        }
        let mut entries = vec![entry];
        entries.extend(self.guards(seq, true)?);
        self.record(&entries)?;
        Ok(Ok(()))
    }

    /// Deletes a snapshot or bookmark: marks it, in constant time; the sweep frees its chunks and keys later.
    ///
    /// # Errors
    /// The store cannot go on. Inner: there is no such snapshot, or it is in use.
    pub fn delete(&mut self, tag: SnapTag) -> Result<Result<(), OpError>, StoreError> {
        self.check_latch()?;
        let snapshot = match self.snapshot_of(tag) {
            Ok(snapshot) => snapshot,
            Err(refused) => return Ok(Err(refused)),
        };
        if self.is_reverting_to(snapshot.seq) {
            return Ok(Err(OpError::Reverting(tag)));
        }
        if self.state.snapshots.in_use(&snapshot) {
            return Ok(Err(OpError::InUse(tag)));
        }
        self.record(&[Entry::Delete(snapshot.seq)])?;
        self.sweep.want();
        Ok(Ok(()))
    }

    /// Sets a snapshot's priority: -128 (given up first) to 127 (never given up).
    ///
    /// # Errors
    /// The store cannot go on. Inner: there is no such snapshot.
    pub fn set_priority(
        &mut self,
        tag: SnapTag,
        priority: i8,
    ) -> Result<Result<(), OpError>, StoreError> {
        self.check_latch()?;
        match self.snapshot_of(tag) {
            Ok(snapshot) => self
                .record(&[Entry::Priority(snapshot.seq, priority)])
                .map(Ok),
            Err(refused) => Ok(Err(refused)),
        }
    }

    /// Adds `delta` to a snapshot's persistent use count and gives the new one.
    ///
    /// # Errors
    /// The store cannot go on. Inner: there is no such snapshot, or the count would leave 0..=65535.
    pub fn adjust_usecount(
        &mut self,
        tag: SnapTag,
        delta: i32,
    ) -> Result<Result<u16, OpError>, StoreError> {
        self.check_latch()?;
        let snapshot = match self.snapshot_of(tag) {
            Ok(snapshot) => snapshot,
            Err(refused) => return Ok(Err(refused)),
        };
        let count = i64::from(snapshot.usecount) + i64::from(delta);
        let Ok(count) = u16::try_from(count) else {
            let refused = if count < 0 {
                OpError::UsecountUnderflow
            } else {
                OpError::UsecountOverflow
            };
            return Ok(Err(refused));
        };
        if delta != 0 {
            self.record(&[Entry::Usecount(snapshot.seq, count)])?;
        }
        Ok(Ok(count))
    }

    /// Says whether a device of the snapshot is connected. Lasts until the store is closed.
    ///
    /// A connected snapshot is not deleted. When room is needed it may be squashed, after all that are not
    /// in use; its chunks then stay until [`set_quiet`](Self::set_quiet).
    pub fn set_in_use(&mut self, tag: SnapTag, connected: bool) {
        if let Ok(snapshot) = self.snapshot_of(tag) {
            self.state.snapshots.set_connected(snapshot.seq, connected);
        }
    }

    /// Squashed snapshots whose chunks stay because I/O of a device may be under way into them: those
    /// that were connected when they were squashed, and after opening all.
    ///
    /// Ops refused with [`OpError::StoreFull`] while there are any are to be tried again when there
    /// is one less.
    #[must_use]
    pub fn draining(&self) -> Vec<SnapTag> {
        let snapshots = &self.state.snapshots;
        snapshots
            .draining()
            .filter_map(|seq| Some(snapshots.get(seq)?.tag))
            .collect()
    }

    /// Says that no I/O of any device is under way into the chunks of a squashed snapshot, and none
    /// will be: they may be freed. The device may still be connected.
    pub fn set_quiet(&mut self, tag: SnapTag) {
        if let Ok(snapshot) = self.snapshot_of(tag) {
            self.state.snapshots.set_quiet(snapshot.seq);
            self.sweep.want();
        }
    }

    fn snapshot_of(&self, tag: SnapTag) -> Result<Snapshot, OpError> {
        self.state
            .snapshots
            .by_tag(tag)
            .copied()
            .ok_or(OpError::NoSuchSnapshot(tag))
    }
}
