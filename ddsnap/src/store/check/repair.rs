// SPDX-License-Identifier: GPL-2.0-only
//! Making a damaged store sound: what is lost is given up, the rest is kept.
//!
//! A snapshot that lost a saved chunk would read what the origin holds there now. So every snapshot that
//! a problem may have hurt is squashed, and no other is touched; which those are says the check, by the
//! table in ARCHITECTURE.md. Entries that cannot be trusted go, trees that lost nodes are made anew of what
//! can be read, the space map is made anew of who owns what, counts follow.
//!
//! All of it is written to free blocks beside the old state; one checkpoint under a new epoch switches. A
//! power cut before that leaves the damaged store as it was, to be repaired again. The switch writes a bad or
//! older copy of the superblock first, so that it cannot tear the only whole one.

use std::collections::BTreeSet;

use super::prove::{Owned, Report, each_entry, unusable, wrong_key};
use super::{CheckDevices, CheckOptions, Checked, Event, Examined, Severity, examine};
use crate::format::block::Kind;
use crate::format::node::Value;
use crate::format::snaptable::State as SnapshotState;
use crate::format::superblock::TreeRoot;
use crate::promise::kept;
use crate::store::Store;
use crate::store::alloc::Space;
use crate::store::error::StoreError;
use crate::store::index::Index;
use crate::store::index::merge::{Change, Writer, merge};
use crate::store::journal::Ring;
use crate::store::media::Media;
use crate::store::metaalloc::MetaAlloc;
use crate::store::state::State;
use crate::units::{SnapSeq, SnapTag, StoreChunk};

/// Changes merged into a new tree at a time.
const BATCH: usize = 1 << 16;

/// What a repair did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repaired {
    /// There was nothing to do.
    Sound,
    /// Nothing was lost.
    Whole,
    /// Snapshots were squashed, or are not there any more.
    WithLoss,
    /// Only the origin can tell what is lost, and it was not given. Nothing was written.
    Undecided,
}

/// Checks a store and makes it sound. The problems are reported first, then [`Event::GivesUp`], and only
/// then anything is written. An origin that is given is only read.
///
/// # Errors
/// There is no store; or a device fails, or the metadata region has no room for the new state beside the
/// old: then the store is as it was. Or those of `report`.
pub fn repair(
    devices: CheckDevices,
    options: &CheckOptions,
    report: &mut dyn FnMut(Event) -> Result<(), StoreError>,
) -> Result<(Checked, Repaired), StoreError> {
    let mut checked = Checked::default();
    let mut hurt: BTreeSet<SnapTag> = BTreeSet::new();
    let examined = examine(devices, options, &mut |event| {
        checked.count(&event);
        if let Event::Problem(problem) = &event {
            if problem.severity == Severity::Loss {
                hurt.extend(&problem.snapshots);
            }
        }
        report(event)
    })?;
    checked.note(&examined);
    let repaired = if checked.problems == 0 {
        Repaired::Sound
    } else if checked.undecided > 0 {
        Repaired::Undecided
    } else {
        make_sound(examined, hurt, report)?;
        match checked.losses {
            0 => Repaired::Whole,
            _ => Repaired::WithLoss,
        }
    };
    Ok((checked, repaired))
}

fn make_sound(
    examined: Examined,
    hurt: BTreeSet<SnapTag>,
    report: &mut Report<'_>,
) -> Result<(), StoreError> {
    let Examined {
        mut media,
        mut superblock,
        stale_copy,
        mut state,
        proof,
        ..
    } = examined;
    give_up(&mut state, &hurt);
    report(Event::GivesUp(hurt.into_iter().collect()))?;
    if kept!(
        "repair-flushes-data",
        "what the journal led to may be in a cache only, and the journal goes"
    ) {
        media.flush_data()?;
    }

    let generation = superblock.generation + 1;
    media.generation = generation;
    let mut blocks = proof.blocks;
    for (at, _) in proof.rebuild.iter().enumerate().filter(|(_, anew)| **anew) {
        let old = [&state.exceptions, &state.overlays][at];
        let mut tree = Tree::new(old.kind, generation);
        each_entry(&mut media, &superblock, old, &mut |media, key, value| {
            let place = StoreChunk(value.place);
            let inside = state.space.contains(place);
            let (snapshots, next) = (&state.snapshots, state.next_seq.0);
            let kept = !proof.bad.contains(&place.0)
                && unusable(snapshots, next, inside, old.kind, key, value).is_none();
            // What was lost is the data. The key says to bookmarks that the chunk changed, and no snapshot that
            // needs the data lives.
            let marks = !snapshots.bookmarks().is_empty()
                && wrong_key(snapshots, next, old.kind, key).is_none()
                && (old.kind == Kind::Exceptions || snapshots.bookmarks().contains_key(&key.0));
            match (kept, marks) {
                (true, _) => tree.put(media, &mut blocks, (key, Some(value))),
                (false, true) => tree.put(media, &mut blocks, (key, Some(Value::MARK))),
                (false, false) => Ok(()),
            }
        })?;
        let new = Index::new(old.kind, tree.finish(&mut media, &mut blocks)?);
        match new.kind {
            Kind::Overlays => state.overlays = new,
            _ => state.exceptions = new,
        }
    }
    let mut owned = Owned::default();
    for index in [&state.exceptions, &state.overlays] {
        each_entry(&mut media, &superblock, index, &mut |_, _, value| {
            if !value.is_mark() {
                owned.insert(StoreChunk(value.place));
            }
            Ok(())
        })?;
    }
    let root = write_maps(&mut media, &mut blocks, generation, &owned)?;
    let (first, end) = (superblock.data_first, superblock.data_end);
    state.space = Space::new(root, first, end, owned.count);
    state.space.set_region(end, superblock.holes());

    // The checkpoint goes on from the trees that the superblock leads to.
    superblock.exceptions = state.exceptions.root;
    superblock.overlays = state.overlays.root;
    superblock.space = state.space.root;
    let ring = Ring::new(&superblock);
    let mut store = Store::from_parts(media, superblock, stale_copy, state, blocks, ring);
    store.checkpoint_with(|next| {
        next.epoch += 1;
        next.tail = 0;
        next.tail_sequence = 1;
        next.clean = true;
    })
}

/// Squashes snapshots and bookmarks, and gives up a revert to one of them: the origin stays half of each.
fn give_up(state: &mut State, hurt: &BTreeSet<SnapTag>) {
    let squashed: Vec<SnapSeq> = hurt
        .iter()
        .filter_map(|&tag| state.snapshots.by_tag(tag))
        .filter(|snapshot| state.snapshots.is_keeper(snapshot.seq.0))
        .map(|snapshot| snapshot.seq)
        .collect();
    squashed
        .iter()
        .for_each(|&seq| state.snapshots.set_state(seq, SnapshotState::Squashed));
    // Written anew in any case: the old one may be what is damaged.
    state.snapshots.dirty = true;
    let snapshots = &state.snapshots;
    state.revert = state.revert.filter(|revert| {
        let snapshot = snapshots.get(revert.seq);
        snapshot.is_some_and(|snapshot| snapshot.state == SnapshotState::Live)
    });
}

/// The space map of these chunks, in a tree of its own.
fn write_maps(
    media: &mut Media,
    blocks: &mut MetaAlloc,
    generation: u64,
    owned: &Owned,
) -> Result<TreeRoot, StoreError> {
    let mut tree = Tree::new(Kind::Space, generation);
    for (&index, map) in &owned.maps {
        let mut writer = Writer::new(media, blocks, generation);
        let pointer = writer.put(map.encode(), Kind::Bitmap, 0, index)?;
        writer.write_out()?;
        let value = Value {
            place: pointer.block.0,
            crc: pointer.crc,
        };
        tree.put(media, blocks, ((index, 0), Some(value)))?;
    }
    tree.finish(media, blocks)
}

/// A tree that grows beside the old ones. Nothing durable refers to it, so blocks that it replaces are free
/// at once.
struct Tree {
    kind: Kind,
    generation: u64,
    root: TreeRoot,
    waiting: Vec<Change>,
}

impl Tree {
    fn new(kind: Kind, generation: u64) -> Tree {
        Tree {
            kind,
            generation,
            root: TreeRoot::default(),
            waiting: Vec::new(),
        }
    }

    fn put(
        &mut self,
        media: &mut Media,
        blocks: &mut MetaAlloc,
        change: Change,
    ) -> Result<(), StoreError> {
        self.waiting.push(change);
        match self.waiting.len() < BATCH {
            true => Ok(()),
            false => self.merge(media, blocks),
        }
    }

    fn merge(&mut self, media: &mut Media, blocks: &mut MetaAlloc) -> Result<(), StoreError> {
        let mut changes = std::mem::take(&mut self.waiting);
        changes.sort_unstable_by_key(|&(key, _)| key);
        let mut writer = Writer::new(media, blocks, self.generation);
        self.root = merge(&mut writer, self.kind, &self.root, &changes)?;
        writer.write_out()?;
        let replaced = std::mem::take(&mut writer.replaced);
        replaced.into_iter().for_each(|block| blocks.release(block));
        Ok(())
    }

    fn finish(mut self, media: &mut Media, blocks: &mut MetaAlloc) -> Result<TreeRoot, StoreError> {
        self.merge(media, blocks)?;
        Ok(self.root)
    }
}
