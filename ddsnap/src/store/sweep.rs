// SPDX-License-Identifier: GPL-2.0-only
//! The sweep frees what serves no snapshot any more, in bounded steps.
//!
//! A pass looks at every overlay and every exception once. It keeps its place in memory only: after
//! a restart a new pass begins, which finds nothing at what the last one had freed. A snapshot that
//! was deleted before the pass began is forgotten when the pass ends; one that died meanwhile waits
//! for the next pass.

use super::Store;
use super::error::StoreError;
use super::index::after;
use crate::format::journal::Entry;
use crate::format::node::Key;
use crate::format::snaptable::State;
use crate::units::{Chunk, SnapSeq, StoreChunk};

/// How far the sweep is.
#[derive(Debug, Default)]
pub(crate) struct Sweep {
    wanted: bool,
    pass: Option<Pass>,
}

#[derive(Debug)]
struct Pass {
    /// Snapshots deleted before the pass began.
    deleted: Vec<SnapSeq>,
    place: Place,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// The first overlay not looked at.
    Overlays(Key),
    /// The first exception not looked at, and the one before it.
    Exceptions(Key, Option<Key>),
    Finished,
}

impl Sweep {
    /// Something died: another pass is needed.
    pub fn want(&mut self) {
        self.wanted = true;
    }

    /// Whether there is anything to do.
    pub fn pending(&self) -> bool {
        self.wanted || self.pass.is_some()
    }
}

impl Store {
    /// Looks at up to `budget` entries and frees the dead ones among them, in one journal record.
    pub(crate) fn sweep_step(&mut self, budget: usize) -> Result<(), StoreError> {
        let pass = match self.sweep.pass.take() {
            Some(pass) => pass,
            None => {
                self.sweep.wanted = false;
                let deleted = self
                    .state
                    .snapshots
                    .iter()
                    .filter(|s| s.state == State::Deleted);
                Pass {
                    deleted: deleted.map(|s| s.seq).collect(),
                    place: Place::Overlays((0, 0)),
                }
            }
        };
        let place = match pass.place {
            Place::Overlays(from) => self.sweep_overlays(from, budget)?,
            Place::Exceptions(from, last) => self.sweep_exceptions(from, last, budget)?,
            Place::Finished => {
                let forget: Vec<_> = pass.deleted.iter().map(|&seq| Entry::Forget(seq)).collect();
                for part in forget.chunks(self.ring.max_entries()) {
                    self.record(part)?;
                }
                return Ok(());
            }
        };
        self.sweep.pass = Some(Pass { place, ..pass });
        Ok(())
    }

    fn sweep_overlays(&mut self, from: Key, budget: usize) -> Result<Place, StoreError> {
        let most = self.removals_possible(budget)?;
        let mut removals = Vec::new();
        let mut next = Some(from);
        let found = self.state.overlays.scan(&mut self.media, from, budget)?;
        let ended = found.len() < budget;
        let mut stopped = false;
        for ((seq, chunk), value) in found {
            if self.state.snapshots.needs_data(seq) {
                // All its overlays stay: go on behind them.
                next = seq.checked_add(1).map(|next| (next, 0));
                stopped = true;
                break;
            }
            if removals.len() == most {
                stopped = true;
                break;
            }
            let place = StoreChunk(value.place);
            removals.push(Entry::RemoveOverlay {
                seq: SnapSeq(seq),
                chunk: Chunk(chunk),
                place,
            });
            next = after((seq, chunk));
        }
        self.remove(&removals)?;
        Ok(match next {
            Some(next) if stopped || !ended => Place::Overlays(next),
            _ => Place::Exceptions((0, 0), None),
        })
    }

    fn sweep_exceptions(
        &mut self,
        from: Key,
        last: Option<Key>,
        budget: usize,
    ) -> Result<Place, StoreError> {
        let most = self.removals_possible(budget)?;
        let mut removals = Vec::new();
        let (mut next, mut last) = (Some(from), last);
        let found = self.state.exceptions.scan(&mut self.media, from, budget)?;
        let ended = found.len() < budget;
        let mut stopped = false;
        for ((chunk, seq), value) in found {
            if removals.len() == most {
                stopped = true;
                break;
            }
            let before = last.filter(|last| last.0 == chunk).map_or(0, |last| last.1);
            if !self.state.snapshots.any_needs(Chunk(chunk), before, seq) {
                let place = StoreChunk(value.place);
                removals.push(Entry::RemoveException {
                    chunk: Chunk(chunk),
                    seq: SnapSeq(seq),
                    place,
                });
            }
            last = Some((chunk, seq));
            next = after((chunk, seq));
        }
        self.remove(&removals)?;
        Ok(match next {
            Some(next) if stopped || !ended => Place::Exceptions(next, last),
            _ => Place::Finished,
        })
    }

    fn remove(&mut self, removals: &[Entry]) -> Result<(), StoreError> {
        if removals.is_empty() {
            Ok(())
        } else {
            self.record(removals)
        }
    }

    /// How many removals fit into a record and leave the next checkpoint enough blocks, at least 1.
    fn removals_possible(&mut self, budget: usize) -> Result<usize, StoreError> {
        let most = budget.clamp(1, self.ring.max_entries());
        let fitting = |store: &Store| {
            let mut count = most;
            while count > 0 && store.checkpoint_cost(count, count) > store.free_meta_blocks() {
                count /= 2;
            }
            count
        };
        let count = fitting(self);
        if count > 0 {
            return Ok(count);
        }
        self.checkpoint()?;
        match fitting(self) {
            0 => Err(StoreError::MetaExhausted {
                device: self.media.meta_name(),
            }),
            count => Ok(count),
        }
    }

    /// Does a bounded part of the work that waits in the background: sweep, then checkpoint.
    /// `budget` is the number of index entries to look at.
    ///
    /// True if there is more to do.
    ///
    /// # Errors
    /// The store cannot go on.
    pub fn background_step(&mut self, budget: usize) -> Result<bool, StoreError> {
        self.check_latch()?;
        if self.checkpoint_wanted() {
            self.checkpoint_step()?;
        } else if self.sweep.pending() {
            self.sweep_step(budget.max(1))?;
        }
        Ok(self.sweep.pending() || self.checkpoint_wanted())
    }
}
