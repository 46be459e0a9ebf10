// SPDX-License-Identifier: GPL-2.0-only
//! Bookmarks: places in the order of snapshots that keep no data. What changed since is known.
//!
//! ARCHITECTURE.md has the argument. A bookmark's keys are those that a snapshot's would be, as marks where no
//! snapshot needs the data; so `diff` answers for both.

use super::Store;
use super::api::OpError;
use super::checkpoint::write_superblock;
use super::error::StoreError;
use crate::format::journal::Entry;
use crate::format::snaptable::{Snapshot, State};
use crate::promise::kept;
use crate::units::{Sectors, SnapTag};

impl Store {
    /// Creates a bookmark of the origin as it is now. The caller holds back origin writes meanwhile, and forgets
    /// which chunks are unique.
    ///
    /// `now` is in seconds since 1970-01-01 UTC.
    ///
    /// # Errors
    /// As [`create`](Self::create).
    pub fn create_bookmark(
        &mut self,
        tag: SnapTag,
        now: i64,
    ) -> Result<Result<(), OpError>, StoreError> {
        self.create_keeper(tag, |seq, length| Entry::Bookmark {
            seq,
            tag,
            created: now,
            length,
        })
    }

    /// Has a snapshot become a bookmark: its data comes free by and by, what changed since stays known. One that
    /// is a bookmark already stays one.
    ///
    /// # Errors
    /// The store cannot go on. Inner: there is no such snapshot, or it is squashed, in use, or the origin is
    /// being reverted to it.
    pub fn turn_to_bookmark(&mut self, tag: SnapTag) -> Result<Result<(), OpError>, StoreError> {
        self.check_latch()?;
        let snapshot = match self.of_tag(tag, State::Live) {
            Ok(snapshot) => snapshot,
            Err(OpError::Bookmark(_)) => return Ok(Ok(())),
            Err(refused) => return Ok(Err(refused)),
        };
        if self.is_reverting_to(snapshot.seq) {
            return Ok(Err(OpError::Reverting(tag)));
        }
        if self.state.snapshots.in_use(&snapshot) {
            return Ok(Err(OpError::InUse(tag)));
        }
        self.announce_bookmarks()?;
        let mut entries = vec![Entry::ToBookmark(snapshot.seq)];
        entries.extend(self.bookmark_cut(self.media.origin_length, &[snapshot]));
        self.record(&entries)?;
        self.sweep.want();
        Ok(Ok(()))
    }

    /// Sets whether a snapshot becomes a bookmark when it is given up for room, instead of vanishing.
    ///
    /// # Errors
    /// The store cannot go on. Inner: there is no such snapshot, or it has no data.
    pub fn set_to_bookmark(
        &mut self,
        tag: SnapTag,
        to_bookmark: bool,
    ) -> Result<Result<(), OpError>, StoreError> {
        self.check_latch()?;
        let snapshot = match self.of_tag(tag, State::Live) {
            Ok(snapshot) => snapshot,
            Err(refused) => return Ok(Err(refused)),
        };
        if snapshot.to_bookmark != to_bookmark {
            self.announce_bookmarks()?;
            self.record(&[Entry::WhenFull(snapshot.seq, to_bookmark)])?;
        }
        Ok(Ok(()))
    }

    /// The snapshot of this tag, if it is in the state wanted.
    pub(super) fn of_tag(&self, tag: SnapTag, wanted: State) -> Result<Snapshot, OpError> {
        let snapshot = self.state.snapshots.by_tag(tag);
        let snapshot = snapshot.ok_or(OpError::NoSuchSnapshot(tag))?;
        match snapshot.state {
            state if state == wanted => Ok(*snapshot),
            State::Bookmark => Err(OpError::Bookmark(tag)),
            _ => Err(OpError::Squashed(tag)),
        }
    }

    /// Has the superblock say that there are bookmarks, before anything else does.
    pub(super) fn announce_bookmarks(&mut self) -> Result<(), StoreError> {
        let announces = kept!(
            "bookmarks-announced",
            "a program that knows no bookmarks would take a record of them for one that is not whole"
        );
        if self.superblock.bookmarks || !announces {
            return Ok(());
        }
        let mut next = self.superblock.clone();
        next.generation = next.generation.saturating_add(1);
        next.bookmarks = true;
        let written = write_superblock(&mut self.media, &next, self.stale_copy);
        self.latch(written)?;
        self.stale_copy = None;
        self.media.generation = self.media.generation.max(next.generation);
        if let Some(checkpoint) = &mut self.checkpoint {
            self.media.generation =
                checkpoint.announce_bookmarks(next.generation.saturating_add(1));
        }
        self.superblock = next;
        Ok(())
    }

    /// The origin is about to have this length: what lies behind counts as changed, should it grow again.
    pub(super) fn cut_bookmarks(&mut self, length: Sectors) -> Result<(), StoreError> {
        match self.bookmark_cut(length, &[]) {
            Some(cut) => self.record(&[cut]),
            None => Ok(()),
        }
    }

    /// What has bookmarks end with an origin of this length, if any is longer, or of the snapshots that become one.
    pub(super) fn bookmark_cut(&self, length: Sectors, becoming: &[Snapshot]) -> Option<Entry> {
        let cuts = kept!(
            "bookmarks-cut",
            "what the origin lost with its end would not be listed after it grew again"
        );
        let longer = self.state.snapshots.has_longer_bookmark(length)
            || becoming.iter().any(|snapshot| snapshot.length > length);
        (cuts && longer).then_some(Entry::CutBookmarks(length))
    }

    /// The bookmark to give up when metadata is short: unused before used, of least priority, oldest. Never one
    /// of priority 127.
    pub(super) fn bookmark_to_give_up(&self) -> Option<Snapshot> {
        let snapshots = &self.state.snapshots;
        let bookmarks = snapshots.iter().filter(|s| s.state == State::Bookmark);
        let candidates = bookmarks.filter(|s| s.priority < super::victims::NEVER);
        candidates
            .min_by_key(|s| (snapshots.in_use(s), s.priority, s.seq))
            .copied()
    }
}
