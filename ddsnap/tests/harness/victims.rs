// SPDX-License-Identifier: GPL-2.0-only
//! Committing as a server does, and which snapshots may be given up for it.

use std::collections::BTreeSet;

use ddsnap::store::dump::{DumpEntry, DumpPlace};
use ddsnap::store::{Done, Op, OpError, SnapState, SnapshotInfo, Store};
use ddsnap::units::SnapTag;

use super::model::Model;

/// Background steps until a group must have got on: more than any of these stores has work for.
const MOST_STEPS: usize = 1_000_000;

/// Does background steps until what was told to wait may be asked for again.
pub fn make_room(store: &mut Store) {
    let mut steps = 0;
    while store.is_making_room() {
        store.background_step(64).expect("background");
        steps += 1;
        assert!(steps < MOST_STEPS, "no room, and no end to making some");
    }
}

/// Commits as a server does: what is told to wait is asked for again after background steps.
pub fn commit(store: &mut Store, ops: &[Op]) -> Vec<Result<Done, OpError>> {
    let mut answers = store.commit(ops).expect("commit");
    for _ in 0..MOST_STEPS {
        let waits = |answer: &Result<Done, OpError>| *answer == Err(OpError::Wait);
        let waiting: Vec<usize> = (0..ops.len()).filter(|&at| waits(&answers[at])).collect();
        if waiting.is_empty() {
            return answers;
        }
        assert!(store.is_making_room(), "told to wait for nothing");
        make_room(store);
        let again: Vec<Op> = waiting.iter().map(|&at| ops[at]).collect();
        let answered = store.commit(&again).expect("commit");
        waiting
            .into_iter()
            .zip(answered)
            .for_each(|(at, answer)| answers[at] = answer);
    }
    panic!("no answer to {ops:?}");
}

/// All sets of live snapshots that need an entry of the index together, and squashed ones whose devices
/// may still use it: found by looking at every entry.
fn users(store: &mut Store) -> Vec<BTreeSet<u32>> {
    let mut entries = Vec::new();
    let mut place = Some(DumpPlace::START);
    while let Some(at) = place {
        let (some, next) = store.dump_step(at, 0..=u64::MAX, 1000).expect("dump");
        entries.extend(some);
        place = next;
    }
    let (draining, shift) = (store.draining(), store.status().chunk);
    let mut snapshots = store.snapshots();
    snapshots.retain(|s| s.state == SnapState::Live || draining.contains(&s.tag));
    let mut sets = Vec::new();
    let mut last = None;
    for entry in entries {
        let needs: Vec<&SnapshotInfo> = match entry {
            DumpEntry::Mark { chunk, seq } => {
                last = Some((chunk, seq.0));
                continue;
            }
            DumpEntry::Overlay { place: None, .. } => continue,
            DumpEntry::Exception { chunk, seq, .. } => {
                let before = last.filter(|&(c, _)| c == chunk).map_or(0, |(_, s)| s);
                last = Some((chunk, seq.0));
                let of_seq = snapshots
                    .iter()
                    .filter(|s| before < s.seq.0 && s.seq <= seq);
                of_seq
                    .filter(|s| s.length.to_chunks(shift) > chunk.0)
                    .collect()
            }
            DumpEntry::Overlay { seq, .. } => snapshots.iter().filter(|s| s.seq == seq).collect(),
        };
        sets.push(needs.iter().map(|s| s.tag.0).collect());
    }
    sets
}

/// What may be given up when the next copy finds no room.
#[derive(Debug)]
pub struct Allowed {
    /// Any of these sets; the best for each of its members and as small as can be.
    best: Vec<BTreeSet<u32>>,
    /// One of them has a member in use, and a squashed snapshot's chunks are about to come free.
    waits: bool,
    /// The bookmark that goes before any of these if it is metadata that is short, which it may be.
    bookmark: Option<u32>,
}

/// From all sets whose loss frees an entry those whose most wanted member is wanted least, and of these
/// the smallest. Unused before used, least priority first, oldest first; never 127, nor the one that
/// the origin is reverted to.
pub fn allowed(store: &mut Store, model: &Model) -> Allowed {
    let sets = users(store);
    let seqs = store.snapshots();
    let rank = |tag: &u32| {
        let snapshot = &model.snapshots[tag];
        let seq = seqs.iter().find(|s| s.tag == SnapTag(*tag)).map(|s| s.seq);
        (snapshot.in_use(), snapshot.priority, seq)
    };
    let stays = |tag: &u32| {
        let snapshot = &model.snapshots[tag];
        snapshot.priority == 127 || model.reverting == Some(*tag) || snapshot.draining
    };
    let free = |set: &&BTreeSet<u32>| !set.is_empty() && !set.iter().any(stays);
    let measure = |set: &BTreeSet<u32>| (set.iter().map(rank).max(), set.len());
    let least = sets.iter().filter(free).map(measure).min();
    let best = sets
        .iter()
        .filter(free)
        .filter(|set| Some(measure(set)) == least);
    let best: Vec<BTreeSet<u32>> = best.cloned().collect();
    let used = best
        .iter()
        .flatten()
        .any(|tag| model.snapshots[tag].in_use());
    let bookmarks = model.snapshots.iter().filter(|(_, s)| s.is_bookmark());
    let bookmark = bookmarks
        .filter(|(_, s)| s.priority < 127)
        .map(|(&tag, _)| tag)
        .min_by_key(rank);
    let status = store.status();
    let meta = status
        .free_meta_blocks
        .saturating_sub(status.reserved_meta_blocks);
    Allowed {
        waits: used && !store.draining().is_empty(),
        bookmark: bookmark.filter(|_| meta < 250),
        best,
    }
}

impl Allowed {
    /// Whether what a commit of one op did is what it had to do.
    pub fn check(&self, given_up: &[SnapTag], answer: Result<Done, OpError>) -> Result<(), String> {
        let given_up: BTreeSet<u32> = given_up.iter().map(|tag| tag.0).collect();
        if self
            .bookmark
            .is_some_and(|tag| given_up == BTreeSet::from([tag]))
        {
            return Ok(());
        }
        if !given_up.is_empty() && (self.waits || !self.best.contains(&given_up)) {
            return Err(format!("gave up {given_up:?}, not one of {self:?}"));
        }
        if answer == Err(OpError::StoreFull) && !self.waits && !self.best.is_empty() {
            return Err(format!("refused while one of {self:?} could be given up"));
        }
        Ok(())
    }
}
