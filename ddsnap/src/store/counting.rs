// SPDX-License-Identifier: GPL-2.0-only
//! Counting what each snapshot uses, in bounded steps, while the store goes on.
//!
//! A count looks at every exception and every overlay once. Its memory is bounded by the number of
//! snapshots, not by the number of exceptions. What changes behind its place while it goes on is not in
//! it: the sums are those of a store at rest, and else of no single moment.

use super::Store;
use super::api::{Counts, MANY, Sharing};
use super::error::StoreError;
use super::index::Scan;
use crate::format::node::Key;
use crate::format::snaptable::State;

/// How far a count is, and what it has found.
#[derive(Debug, Default)]
pub struct Counting {
    place: Place,
    /// The exception before the place.
    last: Option<Key>,
    /// Snapshots that were live when the count began or were made since, oldest first: sequence, and
    /// length in chunks.
    live: Vec<(u64, u64)>,
    having: Having,
    /// `changes[n][i]`: how many more chunks snapshot `i` of `live` shares with `n` others than snapshot
    /// `i - 1` does. So a chunk costs two additions, however many snapshots share it.
    changes: Vec<Vec<i64>>,
    /// `totals[n]`: chunks that a snapshot shares with `n` others.
    totals: Vec<u64>,
    seen: u64,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    Exceptions(Key),
    Overlays(Key),
    Finished,
}

impl Default for Place {
    fn default() -> Place {
        Place::Exceptions((0, 0))
    }
}

/// The snapshots long enough to have a chunk, as spans of places in `live`; usually one of all.
#[derive(Debug, Default)]
struct Having {
    spans: Vec<(usize, usize)>,
    /// The spans hold for chunks from here...
    from: u64,
    /// ...to before here.
    to: u64,
}

impl Having {
    fn find(&mut self, live: &[(u64, u64)], chunk: u64) {
        if (self.from..self.to).contains(&chunk) {
            return;
        }
        self.spans.clear();
        (self.from, self.to) = (0, u64::MAX);
        for (at, &(_, chunks)) in live.iter().enumerate() {
            if chunks <= chunk {
                self.from = self.from.max(chunks);
                continue;
            }
            self.to = self.to.min(chunks);
            match self.spans.last_mut() {
                Some((_, end)) if *end == at => *end = at + 1,
                _ => self.spans.push((at, at + 1)),
            }
        }
    }
}

impl Counting {
    /// Entries looked at so far.
    #[must_use]
    pub fn seen(&self) -> u64 {
        self.seen
    }

    fn exception(&mut self, key: Key) {
        let (chunk, seq) = key;
        let before = self
            .last
            .filter(|last| last.0 == chunk)
            .map_or(0, |last| last.1);
        self.last = Some(key);
        let from = self.live.partition_point(|&(live, _)| live <= before);
        let to = self.live.partition_point(|&(live, _)| live <= seq);
        self.having.find(&self.live, chunk);
        let users = |&(start, end): &(usize, usize)| (start.max(from), end.min(to));
        let spans = std::mem::take(&mut self.having.spans);
        let users = || spans.iter().map(users).filter(|(start, end)| start < end);
        let count: usize = users().map(|(start, end)| end - start).sum();
        if count > 0 {
            users().for_each(|span| self.add(span, count - 1));
            self.total(count - 1);
        }
        self.having.spans = spans;
    }

    fn overlay(&mut self, seq: u64) {
        if let Ok(at) = self.live.binary_search_by_key(&seq, |&(live, _)| live) {
            self.add((at, at + 1), 0);
            self.total(0);
        }
    }

    fn add(&mut self, (start, end): (usize, usize), others: usize) {
        let others = others.min(MANY);
        if self.changes.len() <= others {
            self.changes.resize_with(others + 1, Vec::new);
        }
        let changes = &mut self.changes[others];
        if changes.len() <= end {
            changes.resize(end + 1, 0);
        }
        changes[start] += 1;
        changes[end] -= 1;
    }

    fn total(&mut self, others: usize) {
        let others = others.min(MANY);
        if self.totals.len() <= others {
            self.totals.resize(others + 1, 0);
        }
        self.totals[others] += 1;
    }

    /// One entry for each of `live`.
    fn sharings(&self) -> Vec<Sharing> {
        let mut found = vec![Sharing::default(); self.live.len()];
        for (others, changes) in self.changes.iter().enumerate() {
            let mut chunks = 0;
            for (sharing, change) in found.iter_mut().zip(changes) {
                chunks += change;
                if chunks > 0 {
                    sharing.shared_by.resize(others + 1, 0);
                    sharing.shared_by[others] = chunks as u64; // positive
                }
            }
        }
        found
    }
}

impl Store {
    /// Looks at up to `budget` more entries. True if there are more.
    ///
    /// # Errors
    /// The index cannot be read. The store goes on; the count cannot.
    pub fn count_step(
        &mut self,
        counting: &mut Counting,
        budget: usize,
    ) -> Result<bool, StoreError> {
        let budget = budget.max(1);
        self.note_new_snapshots(counting);
        let (index, from) = match counting.place {
            Place::Exceptions(from) => (&self.state.exceptions, from),
            Place::Overlays(from) => (&self.state.overlays, from),
            Place::Finished => return Ok(false),
        };
        let Scan { found, next } = index.scan(&mut self.media, from, budget)?;
        counting.seen += found.len() as u64;
        counting.place = match counting.place {
            Place::Exceptions(_) => {
                found.iter().for_each(|&(key, _)| counting.exception(key));
                next.map_or(Place::Overlays((0, 0)), Place::Exceptions)
            }
            _ => {
                found
                    .iter()
                    .for_each(|&((seq, _), _)| counting.overlay(seq));
                next.map_or(Place::Finished, Place::Overlays)
            }
        };
        Ok(!matches!(counting.place, Place::Finished))
    }

    fn note_new_snapshots(&self, counting: &mut Counting) {
        let snapshots = &self.state.snapshots;
        let known = counting.live.last().map_or(0, |&(seq, _)| seq);
        let new = snapshots.live().range(known + 1..);
        let before = counting.live.len();
        counting
            .live
            .extend(new.map(|(&seq, &chunks)| (seq, chunks)));
        if counting.live.len() > before {
            counting.having = Having::default();
        }
    }

    /// About how many entries a count has to look at: those the trees had at the last checkpoint.
    #[must_use]
    pub fn entries_to_count(&self) -> u64 {
        self.state.exceptions.root.entries + self.state.overlays.root.entries
    }

    /// What a count has found: snapshots that are not deleted, oldest first.
    ///
    /// The chunks of squashed snapshots are gone: their counts are empty.
    #[must_use]
    pub fn counted(&self, counting: &Counting) -> Counts {
        let sharings = counting.sharings();
        let snapshots = self
            .state
            .snapshots
            .iter()
            .filter(|s| s.state != State::Deleted)
            .map(|s| {
                let found = counting
                    .live
                    .binary_search_by_key(&s.seq.0, |&(live, _)| live);
                let sharing = match found {
                    Ok(at) if s.state == State::Live => sharings[at].clone(),
                    _ => Sharing::default(),
                };
                (s.tag, sharing)
            })
            .collect();
        Counts {
            snapshots,
            totals: Sharing {
                shared_by: counting.totals.clone(),
            },
        }
    }

    /// A whole count at once.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn count(&mut self) -> Result<Counts, StoreError> {
        const BUDGET: usize = 4096;
        let mut counting = Counting::default();
        while self.count_step(&mut counting, BUDGET)? {}
        Ok(self.counted(&counting))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Exceptions of 40 chunks under 100 snapshots of three lengths, counted one by one for each
    /// snapshot, as the rule in ARCHITECTURE.md has it.
    #[test]
    fn sums_are_those_of_counting_for_each_snapshot() {
        let lengths = [40, 40, 12, 40, 25];
        let live: Vec<(u64, u64)> = (0..100)
            .map(|n| (3 * n + 1, if n < 50 { 40 } else { lengths[n as usize % 5] }))
            .collect();
        let mut counting = Counting {
            live: live.clone(),
            ..Counting::default()
        };
        let mut wanted = vec![Sharing::default(); live.len()];
        let mut totals = vec![0; MANY + 1];
        let mut seed = 7_u64;
        for chunk in 0..40 {
            let mut before = 0;
            loop {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                let seq = before + 1 + (seed >> 33) % 150;
                if seq > 310 {
                    break;
                }
                counting.exception((chunk, seq));
                let serves =
                    |&(live, chunks): &(u64, u64)| before < live && live <= seq && chunk < chunks;
                let users: Vec<usize> = (0..live.len()).filter(|&at| serves(&live[at])).collect();
                if let Some(others) = users.len().checked_sub(1) {
                    let others = others.min(MANY);
                    totals[others] += 1;
                    for &user in &users {
                        let shared_by = &mut wanted[user].shared_by;
                        shared_by.resize(shared_by.len().max(others + 1), 0);
                        shared_by[others] += 1;
                    }
                }
                before = seq;
            }
        }
        assert!(totals[0] > 0 && totals[3..MANY].iter().sum::<u64>() > 0);
        assert_eq!(counting.sharings(), wanted);
        counting.totals.resize(MANY + 1, 0);
        assert_eq!(counting.totals, totals);
        assert!(
            counting
                .changes
                .iter()
                .all(|changes| changes.len() <= live.len() + 1)
        );
    }
}
