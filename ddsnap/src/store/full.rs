// SPDX-License-Identifier: GPL-2.0-only
//! What to do when data or metadata space runs out: sweep what is dead, then give up the snapshots
//! that are wanted least of those whose loss frees anything. The origin's data is never at risk: a
//! copy-out with no room is refused.
//!
//! Nothing of that takes long inside a request. What needs more than a step is noted as a [`Need`] and
//! answered with [`OpError::Wait`]; background steps see to it, and the request is made again.

use super::Store;
use super::api::{Fate, OpError};
use super::error::StoreError;
use super::victims::{Choice, NEVER, Survey, choose};
use crate::format::journal::Entry;
use crate::format::snaptable::{Snapshot, State};
use crate::promise::kept;
use crate::units::SnapTag;

/// What has to happen in the background before a request that found no room is made again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Need {
    /// A checkpoint is completed.
    Checkpoint,
    /// The sweep frees something, or comes to its end.
    Sweep,
    /// The sweep comes to its end.
    WholeSweep,
    /// It is found out who needs what.
    Survey,
    /// A free chunk is found.
    Search,
}

/// What [`Store::make_room`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Room {
    /// There is room for so many entries, one at least; for the copies that belong to them as far as chunks are
    /// free.
    Entries(usize),
    /// Snapshots were given up: what the group needs has to be found out again.
    Changed,
    /// Room is being made.
    Wait,
    /// There is none, and there will be none.
    Full,
}

/// What a group wants room for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// Entries of the tree of exceptions, marks among them.
    pub exceptions: usize,
    /// Entries of the tree of overlays.
    pub overlays: usize,
    /// Marks before the first entry that needs a chunk.
    pub leading_marks: usize,
}

/// What becomes of a snapshot that is given up, if it is set so.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Instead {
    Bookmark,
    /// Only a whole one gone helps.
    Nothing,
}

/// What there is too little of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Short {
    Data,
    Metadata,
}

impl Store {
    /// Finds room for entries, one at least: for their copies in the data region, in memory, in the ring, and
    /// for the next checkpoint's blocks.
    pub(crate) fn make_room(&mut self, wanted: &Wanted) -> Result<Room, StoreError> {
        let Wanted {
            exceptions,
            overlays,
            leading_marks,
        } = *wanted;
        let wanted = exceptions + overlays;
        if self.memory() < wanted && self.checkpoint.is_none() {
            // What is recent becomes what a checkpoint merges; that need not be complete for it.
            self.checkpoint_step()?;
        }
        let mut entries = wanted.min(self.memory());
        while entries > 0 && !self.ring.has_room(entries, self.ring_kept()) {
            entries /= 2;
        }
        if entries == 0 {
            return Ok(self.wait_for(Need::Checkpoint));
        }
        let data = self.state.space.free() > 0 || leading_marks > 0;
        entries = entries.min(self.meta_room(exceptions, overlays));
        if entries > 0 && data {
            return Ok(Room::Entries(entries)); // A part now, the rest in a further round.
        }
        if self.sweep.pending() {
            return Ok(self.wait_for(Need::Sweep));
        }
        if data && self.has_recent() {
            // It frees what it replaces, and then less is needed for the next.
            return Ok(self.wait_for(Need::Checkpoint));
        }
        self.make_victims_room(match entries {
            0 => Short::Metadata,
            _ => Short::Data,
        })
    }

    /// Nothing is dead: gives up what frees something.
    fn make_victims_room(&mut self, short: Short) -> Result<Room, StoreError> {
        if self.sparing {
            return Ok(Room::Full);
        }
        if self.resize_gives_way() {
            return Ok(Room::Changed);
        }
        if short == Short::Metadata {
            // Marks are what takes it.
            if let Some(bookmark) = self.bookmark_to_give_up() {
                if self.has_recent() {
                    return Ok(self.wait_for(Need::Checkpoint));
                }
                if self.must_wait_for_quiet(&[bookmark]) {
                    return Ok(Room::Full);
                }
                self.give_up(&[bookmark], Instead::Nothing)?;
                return Ok(Room::Changed);
            }
        }
        let stays = |snapshot: &Snapshot| self.must_stay(snapshot);
        let snapshots = &self.state.snapshots;
        let choice = match self.sweep.survey_made() {
            Some(survey) => choose(survey, snapshots, stays),
            None => Choice::Unknown,
        };
        let victims = match choice {
            Choice::Victims(victims) => victims,
            Choice::Nothing => return Ok(Room::Full),
            Choice::Unknown => {
                if self.sweep.survey_made().is_none_or(Survey::is_current) {
                    self.sweep.survey_again();
                }
                return Ok(self.wait_for(Need::Survey));
            }
        };
        if self.must_wait_for_quiet(&victims) {
            return Ok(Room::Full);
        }
        self.give_up(&victims, Instead::Bookmark)?;
        Ok(Room::Changed)
    }

    /// What a squashed snapshot has comes free as soon as its device is quiet: to squash others meanwhile would
    /// cost one after the other for the same need.
    fn must_wait_for_quiet(&self, victims: &[Snapshot]) -> bool {
        let snapshots = &self.state.snapshots;
        let used = victims.iter().any(|victim| snapshots.in_use(victim));
        let waits = kept!(
            "one-squash-at-a-time",
            "snapshots would be given up one after the other for the same need"
        );
        used && waits && snapshots.draining().next().is_some()
    }

    fn wait_for(&mut self, need: Need) -> Room {
        self.need = Some(need);
        Room::Wait
    }

    /// Whether what was answered with [`OpError::Wait`] would be answered so again: background steps
    /// are to be done first.
    #[must_use]
    pub fn is_making_room(&self) -> bool {
        self.need.is_some()
    }

    /// A background step was done: is what was needed there?
    pub(super) fn look_at_need(&mut self) {
        let still = |store: &Store, need: Need| match need {
            Need::Checkpoint | Need::Search => true, // Their ends clear it.
            Need::Sweep => {
                let room = store.state.space.free() > 0 && store.meta_room(1, 0) > 0;
                store.sweep.pending() && !room
            }
            Need::WholeSweep => store.sweep.pending(),
            Need::Survey => {
                let survey = store.sweep.survey_made();
                let known = survey.is_some_and(Survey::is_current);
                store.sweep.pending() || !known
            }
        };
        if let Some(need) = self.need {
            if !still(self, need) {
                self.need = None;
            }
        }
    }

    /// Makes sure that the next checkpoint has room for one more entry of the snapshot table.
    pub(crate) fn make_table_room(&mut self) -> Result<(), OpError> {
        if self.checkpoint_cost(0, 0) + self.meta_reserve() <= self.free_meta_blocks() {
            return Ok(());
        }
        let need = if self.sweep.pending() {
            Need::WholeSweep
        } else if self.has_recent() {
            Need::Checkpoint
        } else {
            return Err(OpError::StoreFull);
        };
        self.need = Some(need);
        Err(OpError::Wait)
    }

    /// Whether a checkpoint would free anything.
    pub(super) fn has_recent(&self) -> bool {
        self.checkpoint.is_some() || self.most_recent() > 0 || self.state.space.has_recent()
    }

    /// Changes that memory has room for, of one index.
    pub(super) fn memory(&self) -> usize {
        self.max_recent().saturating_sub(self.most_recent())
    }

    /// How many of the copies a checkpoint would have metadata blocks for.
    fn meta_room(&self, exceptions: usize, overlays: usize) -> usize {
        let free = self.free_meta_blocks().saturating_sub(self.meta_reserve());
        if self.checkpoint_cost(exceptions, overlays) <= free {
            return exceptions + overlays;
        }
        // Which of them come first is not known here, so count each as either.
        let mut copies = exceptions + overlays;
        while copies > 0 && self.checkpoint_cost(copies, copies) > free {
            copies /= 2;
        }
        copies
    }

    /// Deletes snapshots nobody uses; squashes those in use, whose entry stays. Or makes bookmarks of those that
    /// are to become such.
    fn give_up(&mut self, victims: &[Snapshot], instead: Instead) -> Result<(), StoreError> {
        let snapshots = &self.state.snapshots;
        let fate = |victim: &Snapshot| match instead {
            Instead::Bookmark if victim.to_bookmark => Fate::Bookmark,
            _ if snapshots.in_use(victim) => Fate::Squashed,
            _ => Fate::Deleted,
        };
        let victims: Vec<_> = victims.iter().map(|v| (fate(v), v)).collect();
        if victims.iter().any(|&(fate, _)| fate == Fate::Bookmark) {
            self.announce_bookmarks()?;
        }
        // One entry more for the end of bookmarks.
        let most = self.ring.max_entries().saturating_sub(1).max(1);
        for part in victims.chunks(most) {
            let entry = |&(fate, victim): &(Fate, &Snapshot)| match fate {
                Fate::Bookmark => Entry::ToBookmark(victim.seq),
                Fate::Squashed => Entry::Squash(victim.seq),
                Fate::Deleted => Entry::Delete(victim.seq),
            };
            let becoming = part.iter().filter(|(fate, _)| *fate == Fate::Bookmark);
            let becoming: Vec<Snapshot> = becoming.map(|(_, victim)| **victim).collect();
            let mut entries: Vec<Entry> = part.iter().map(entry).collect();
            entries.extend(self.bookmark_cut(self.media.origin_length, &becoming));
            self.record(&entries)?;
            let given_up = part.iter().map(|&(fate, victim)| (victim.tag, fate));
            self.given_up.extend(given_up);
        }
        self.sweep.want();
        Ok(())
    }

    /// The snapshot to delete when the table is full: unused, of least priority, oldest.
    pub(crate) fn make_entry_room(&mut self) -> Result<bool, StoreError> {
        let snapshots = &self.state.snapshots;
        let candidates = snapshots
            .iter()
            .filter(|s| s.state != State::Deleted && s.priority < NEVER);
        let unused = candidates.filter(|s| !snapshots.in_use(s));
        let Some(victim) = unused.min_by_key(|s| (s.priority, s.seq)).copied() else {
            return Ok(false);
        };
        self.give_up(&[victim], Instead::Nothing)?;
        Ok(true)
    }

    /// Snapshots and bookmarks given up since the last call, for the log: their tags, and what became of them.
    pub fn take_given_up(&mut self) -> Vec<(SnapTag, Fate)> {
        std::mem::take(&mut self.given_up)
    }

    /// What could not be done in passing since the last call, for the log. It is tried again.
    pub fn take_troubles(&mut self) -> Vec<String> {
        std::mem::take(&mut self.troubles)
    }
}
