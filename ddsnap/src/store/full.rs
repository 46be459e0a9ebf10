// SPDX-License-Identifier: GPL-2.0-only
//! What to do when data or metadata space runs out: sweep what is dead, then give up the snapshot
//! that is wanted least. The origin's data is never at risk: a copy-out with no room is refused.

use super::Store;
use super::api::OpError;
use super::error::StoreError;
use crate::format::journal::Entry;
use crate::format::snaptable::{Snapshot, State};
use crate::units::SnapTag;

/// A snapshot of this priority is never given up.
const NEVER: i8 = i8::MAX;

/// Entries a synchronous sweep looks at between two looks at the free space.
const SWEEP_BUDGET: usize = 4096;

/// What [`Store::make_room`] found.
pub(crate) struct Room {
    /// Copies that have room now: 0 means that nothing more can be done.
    pub copies: usize,
    /// A snapshot was given up: what the group needs has to be found out again.
    pub changed: bool,
}

impl Store {
    /// Finds room for copies: in the data region, in memory, and for the next checkpoint's blocks.
    pub(crate) fn make_room(
        &mut self,
        exceptions: usize,
        overlays: usize,
    ) -> Result<Room, StoreError> {
        let wanted = exceptions + overlays;
        loop {
            let recent = self.most_recent();
            if recent > 0 && recent + wanted > self.max_recent() {
                self.freeze_recent()?;
                continue;
            }
            let data = usize::try_from(self.state.space.free()).unwrap_or(usize::MAX);
            let copies = self.meta_room(exceptions, overlays).min(data);
            if copies >= wanted {
                return Ok(Room {
                    copies: wanted,
                    changed: false,
                });
            }
            if data >= wanted && self.has_recent() {
                self.checkpoint()?; // It frees what it replaces, and then less is needed for the next.
                continue;
            }
            if data >= wanted && copies > 0 {
                return Ok(Room {
                    copies,
                    changed: false,
                }); // A part now, the rest after a checkpoint.
            }
            if self.sweep.pending() {
                self.sweep_step(SWEEP_BUDGET)?;
                if self.has_recent() && !self.sweep.pending() {
                    self.checkpoint()?;
                }
                continue;
            }
            let Some(victim) = self.victim() else {
                return Ok(Room {
                    copies,
                    changed: false,
                });
            };
            // One squashed snapshot's chunks come free as soon as its device is quiet: to squash
            // another meanwhile would cost one snapshot after the other for the same need.
            let snapshots = &self.state.snapshots;
            if snapshots.in_use(&victim) && snapshots.draining().next().is_some() {
                return Ok(Room {
                    copies,
                    changed: false,
                });
            }
            self.give_up(&victim)?;
            return Ok(Room {
                copies: 0,
                changed: true,
            });
        }
    }

    /// Makes sure that the next checkpoint has room for one more entry of the snapshot table.
    pub(crate) fn make_table_room(&mut self) -> Result<Result<(), OpError>, StoreError> {
        let fits = |store: &Store| {
            store.checkpoint_cost(0, 0) + store.meta_reserve() <= store.free_meta_blocks()
        };
        if !fits(self) && self.has_recent() {
            self.checkpoint()?;
        }
        while !fits(self) && self.sweep.pending() {
            self.sweep_step(SWEEP_BUDGET)?;
            if !self.sweep.pending() {
                self.checkpoint()?;
            }
        }
        Ok(if fits(self) {
            Ok(())
        } else {
            Err(OpError::StoreFull)
        })
    }

    /// Whether a checkpoint would free anything.
    fn has_recent(&self) -> bool {
        self.checkpoint.is_some() || self.most_recent() > 0 || self.state.space.has_recent()
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

    /// The snapshot to give up: unused before used, then of least priority, then oldest.
    fn victim(&self) -> Option<Snapshot> {
        if self.sparing {
            return None;
        }
        let snapshots = &self.state.snapshots;
        let candidates = snapshots
            .iter()
            .filter(|s| s.state == State::Live && s.priority < NEVER)
            .filter(|s| !self.is_reverting_to(s.seq));
        candidates
            .min_by_key(|s| (snapshots.in_use(s), s.priority, s.seq))
            .copied()
    }

    /// Deletes a snapshot nobody uses; squashes one in use, whose entry stays.
    fn give_up(&mut self, victim: &Snapshot) -> Result<(), StoreError> {
        let used = self.state.snapshots.in_use(victim);
        let entry = if used {
            Entry::Squash(victim.seq)
        } else {
            Entry::Delete(victim.seq)
        };
        self.record(&[entry])?;
        self.given_up.push((victim.tag, used));
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
        self.give_up(&victim)?;
        Ok(true)
    }

    /// Snapshots given up since the last call, for the log: their tags, and whether they were
    /// squashed (in use) or deleted.
    pub fn take_given_up(&mut self) -> Vec<(SnapTag, bool)> {
        std::mem::take(&mut self.given_up)
    }
}
