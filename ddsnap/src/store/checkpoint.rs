// SPDX-License-Identifier: GPL-2.0-only
//! Checkpoints: the changes in memory become the trees on disk, and the journal is free again.
//!
//! A checkpoint goes on in bounded steps between requests ([`Store::checkpoint_step`]):
//! 1. It begins by freezing the changes made until now, and notes where in the ring the records of
//!    later ones begin. Requests go on; their changes form a younger layer, which lookups see first.
//! 2. Each step merges a slice of the frozen changes into new nodes in free blocks. Nothing refers
//!    to those yet: lookups use the old trees and the frozen layer. Crash here, and the old
//!    superblock with the whole ring is the store.
//! 3. The last step flushes the new blocks, so that before anything refers to them they are durable;
//!    then superblock copy A; flush; copy B; flush: at any moment one of the copies is whole, and the
//!    valid one of the higher generation is complete.
//! 4. Only now the replaced blocks and the journal's records up to the noted place are free: the
//!    older superblock, which needs them, can no longer be the newest valid copy.
//!
//! A node that one step wrote and a later one replaces is free at once: no superblock ever leads to
//! it. It is released only after the step's writes have ended, so that no two writes to one block
//! are under way. For the same reason what a step wrote before it failed to read something is free.

use std::collections::HashSet;

use super::Store;
use super::alloc::Space;
use super::budget::Budget;
use super::error::StoreError;
use super::full::Need;
use super::index::merge::{Change, Writer, merge};
use super::index::tree::end_of_branch;
use super::index::{self, Index};
use super::media::Media;
use super::metaalloc::MetaAlloc;
use crate::device::Write;
use crate::format::Version;
use crate::format::block::{Kind, PAYLOAD_LEN};
use crate::format::superblock::{COPIES, Superblock, TreeRoot};
use crate::promise::kept;
use crate::units::MetaBlock;

/// A checkpoint begins when an index has so many changes in memory for each block of the cache, in
/// the bounds that follow. A change takes about 60 bytes, so this is a quarter of the cache.
///
/// The more there are, the fewer bytes each costs: at ten million exceptions a checkpoint of random
/// changes writes nearly every leaf.
const CHANGES_PER_CACHED_BLOCK: usize = 16;
const FEWEST_TO_BEGIN: usize = 1 << 16;
const MOST_TO_BEGIN: usize = 6 << 16;
/// A slice takes in further branches of the tree until it has so many changes.
const SLICE_CHANGES: usize = 512;
/// The most changes of a slice: they may all fall to one branch.
const MAX_SLICE_CHANGES: usize = 4096;
/// One block of the ring in so many is used only after a crash: then the checkpoint that was nearly
/// complete begins anew, and requests need not wait for all of it.
const KEPT_FOR_RECOVERY: u64 = 8;
/// And one in so many only by commands, which wait for nothing.
const KEPT_FOR_COMMANDS: u64 = 64;
/// Steps that read ahead for one slice, at most: what they have read may be gone from the cache.
const MOST_READING_STEPS: usize = 80;
/// Of a checkpoint the budget is done in passing, after a record, and one operation more for so many copies, each
/// of which is a read and a write. One more step may have begun.
const COPIES_FOR_WORK: u64 = 4;
/// Records that pass by, at least and at most, until a checkpoint that failed in passing is tried again.
const FEWEST_HINDERED: u32 = 8;
const MOST_HINDERED: u32 = 1024;

/// A checkpoint under way.
pub(crate) struct Checkpoint {
    /// The superblock it will write: the roots are those of the trees as far as they are merged.
    next: Superblock,
    stage: Stage,
    /// Blocks written so far that `next` leads to.
    fresh: HashSet<u64>,
    /// Blocks to free when `next` is durable.
    replaced: Vec<MetaBlock>,
    /// Blocks of the snapshot table in `next`, if it was written anew.
    table: Option<Vec<MetaBlock>>,
    /// Blocks of the metadata region that were free when it began.
    free_before: u64,
    /// The most of them it may take.
    promised: u64,
    /// Blocks of the ring that are free when it is durable.
    ring_blocks: u64,
    /// Steps that have read ahead for the next slice.
    read_ahead: usize,
}

/// What a step merges next: a place in the frozen changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Exceptions(usize),
    Overlays(usize),
    Bitmaps(usize),
    Complete,
}

/// Writes both copies of a superblock, each durable before the next is touched; first the stale one,
/// if there is one, so that the newest whole copy is never the one being written.
pub(super) fn write_superblock(
    media: &mut Media,
    superblock: &Superblock,
    stale: Option<usize>,
) -> Result<(), StoreError> {
    let mut first = stale.unwrap_or(0);
    if !kept!(
        "stale-copy-first",
        "the only good superblock copy would be torn while the other is older or damaged"
    ) {
        first = 1 - first;
    }
    put_copy(media, superblock, first)?;
    if kept!(
        "first-copy-durable",
        "both superblock copies could be torn by one power cut"
    ) {
        media.flush_meta()?;
    }
    put_copy(media, superblock, 1 - first)?;
    if kept!(
        "second-copy-durable",
        "a bad sector in the other superblock copy would cost the store"
    ) {
        media.flush_meta()?;
    }
    Ok(())
}

/// Writes one copy of a superblock and makes it durable.
pub(crate) fn write_copy(
    media: &mut Media,
    superblock: &Superblock,
    copy: usize,
) -> Result<(), StoreError> {
    put_copy(media, superblock, copy)?;
    if kept!(
        "mended-copy-durable",
        "a bad sector in the good superblock copy would cost the store, as if nothing had been mended"
    ) {
        media.flush_meta()?;
    }
    Ok(())
}

fn put_copy(media: &mut Media, superblock: &Superblock, copy: usize) -> Result<(), StoreError> {
    let bytes = superblock.encode(copy as u32);
    media.write_meta(&[Write {
        offset: COPIES[copy].to_offset(),
        from: &bytes,
    }])
}

impl Store {
    /// Makes everything in memory durable in the trees and empties the journal.
    pub(crate) fn checkpoint(&mut self) -> Result<(), StoreError> {
        self.checkpoint_with(|_| {})
    }

    /// A whole checkpoint, in one go, whose superblock is also changed by `change`.
    ///
    /// If something cannot be read, it is under way afterwards, without that change.
    pub(crate) fn checkpoint_with(
        &mut self,
        change: impl FnOnce(&mut Superblock),
    ) -> Result<(), StoreError> {
        self.check_latch()?;
        let result = self.try_whole(change);
        self.latch(result)
    }

    fn try_whole(&mut self, change: impl FnOnce(&mut Superblock)) -> Result<(), StoreError> {
        self.finish_checkpoint()?;
        self.begin_checkpoint()?;
        while !self.is_merged() {
            self.merge_slice(false)?;
        }
        self.seal_checkpoint(change)
    }

    fn finish_checkpoint(&mut self) -> Result<(), StoreError> {
        while self.checkpoint.is_some() {
            self.try_step()?;
        }
        Ok(())
    }

    /// Whether a checkpoint should begin, or one is under way.
    pub(crate) fn checkpoint_wanted(&self) -> bool {
        self.checkpoint.is_some()
            || self.need == Some(Need::Checkpoint)
            || self.sweep.starved
            || self.ring.used > self.ring.blocks / 4 * 3
            || self.most_recent() >= self.changes_to_begin()
    }

    /// Changes of an index in memory at which a checkpoint begins.
    fn changes_to_begin(&self) -> usize {
        self.media
            .cache_blocks()
            .saturating_mul(CHANGES_PER_CACHED_BLOCK)
            .clamp(FEWEST_TO_BEGIN, MOST_TO_BEGIN)
    }

    /// The most changes in memory that no checkpoint has begun to merge, for each index.
    pub(crate) fn max_recent(&self) -> usize {
        self.changes_to_begin() / 3 * 5
    }

    /// Whether the store is between two steps of a checkpoint.
    #[must_use]
    pub fn is_checkpoint_under_way(&self) -> bool {
        self.checkpoint.is_some()
    }

    /// A bounded part of a checkpoint: begins one, reads ahead, merges a slice, or completes it. If
    /// something cannot be read, the slice is tried again by the next step.
    pub(crate) fn checkpoint_step(&mut self) -> Result<(), StoreError> {
        self.check_latch()?;
        let result = self.try_step();
        self.latch(result)
    }

    /// Keeps a checkpoint ahead of the changes: called after each record, it does as many steps as
    /// the checkpoint needs in order to be complete before the ring or the memory is full, but no more
    /// than a small part of what a group of so many copies took. If that is too little, requests wait for
    /// background steps.
    ///
    /// What cannot be read hinders the checkpoint and not the request, which is done.
    pub(crate) fn pace_checkpoint(&mut self, copies: usize) -> Result<(), StoreError> {
        if self.hindered.0 > 0 {
            self.hindered.0 -= 1;
            return Ok(());
        }
        let end =
            self.media.work + self.budget.operations() as u64 + copies as u64 / COPIES_FOR_WORK;
        while self.checkpoint_wanted() && self.is_behind() && self.media.work < end {
            match self.checkpoint_step() {
                Ok(()) => self.hindered = (0, 0),
                Err(error) if self.failed.is_some() => return Err(error),
                Err(error) => {
                    let records = (self.hindered.1 * 2).clamp(FEWEST_HINDERED, MOST_HINDERED);
                    self.hindered = (records, records);
                    self.troubles
                        .push(format!("a checkpoint waits: {}", error.with_cause()));
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// Blocks of the ring that copies and the sweep leave to recovery and to commands.
    pub(crate) fn ring_kept(&self) -> u64 {
        let recovery = match self.recovered {
            true => 0,
            false => self.ring.blocks / KEPT_FOR_RECOVERY,
        };
        recovery + (self.ring.blocks / KEPT_FOR_COMMANDS).clamp(1, 64)
    }

    fn is_behind(&self) -> bool {
        let Some(checkpoint) = &self.checkpoint else {
            return true;
        };
        let state = &self.state;
        let mut steps = checkpoint.steps_left(
            &state.exceptions,
            &state.overlays,
            &state.space,
            self.budget,
        );
        let nodes = state.exceptions.root.nodes + state.overlays.root.nodes;
        if nodes > self.media.cache_blocks() as u64 {
            steps += checkpoint.reading_steps(&state.exceptions, &state.overlays, self.budget);
        }
        // Each record takes a block at least; one that fills it has about 128 entries.
        let room = self.max_recent().saturating_sub(self.most_recent()) / 128;
        let left = (self.ring.blocks - self.ring_kept()).saturating_sub(self.ring.used);
        steps >= left.min(room as u64)
    }

    /// Changes in memory of the index that has more of them.
    pub(crate) fn most_recent(&self) -> usize {
        let state = &self.state;
        state
            .exceptions
            .recent_len()
            .max(state.overlays.recent_len())
    }

    fn try_step(&mut self) -> Result<(), StoreError> {
        if self.checkpoint.is_none() {
            self.begin_checkpoint()
        } else if self.is_merged() {
            self.seal_checkpoint(|_| {})
        } else {
            self.merge_slice(true)
        }
    }

    /// The generation of the superblock that the checkpoint under way will write.
    pub(super) fn checkpoint_generation(&self) -> Option<u64> {
        let checkpoint = self.checkpoint.as_ref();
        checkpoint.map(|checkpoint| checkpoint.next.generation)
    }

    pub(super) fn is_merged(&self) -> bool {
        let stage = self.checkpoint.as_ref().map(|checkpoint| checkpoint.stage);
        stage == Some(Stage::Complete)
    }

    /// Freezes what the checkpoint is to make durable.
    fn begin_checkpoint(&mut self) -> Result<(), StoreError> {
        let (free_before, promised) = (self.meta.free(), self.checkpoint_cost(0, 0));
        self.note_identity();
        let mut next = self.superblock.clone();
        next.generation = self.superblock.generation + 1;
        next.clean = false;
        next.version = Version::V2;
        next.origin = self.media.origin_length;
        next.next_seq = self.state.next_seq;
        next.revert = self.state.revert;
        next.origin_record = Some(self.state.origin_record.clone());
        next.data_used = self.state.space.used;
        next.epoch = self.ring.epoch;
        next.tail = self.ring.head;
        next.tail_sequence = self.ring.sequence;
        // Blocks of this checkpoint may be read back from the device before it is complete.
        self.media.generation = next.generation;
        let mut checkpoint = Checkpoint {
            next,
            stage: Stage::Exceptions(0),
            fresh: HashSet::new(),
            replaced: Vec::new(),
            table: None,
            free_before,
            promised,
            ring_blocks: self.ring.used,
            read_ahead: 0,
        };
        if !kept!(
            "ring-waits-for-superblock",
            "records that the durable superblock needs would be overwritten"
        ) {
            (self.ring.used, checkpoint.ring_blocks) = (0, 0);
        }
        let state = &mut self.state;
        state.exceptions.freeze();
        state.overlays.freeze();
        state.space.freeze();
        if state.snapshots.dirty || self.superblock.version != Version::V2 {
            let (media, meta) = (&mut self.media, &mut self.meta);
            let table = &state.snapshots;
            let (first, blocks) =
                in_step(media, meta, &mut checkpoint, |writer| table.write(writer))?;
            checkpoint.next.snapshots = first;
            checkpoint.next.snapshot_count = state.snapshots.len() as u32; // at most MAX_ENTRIES
            checkpoint.table = Some(blocks);
            state.snapshots.dirty = false;
        }
        self.checkpoint = Some(checkpoint);
        Ok(())
    }

    /// Merges a slice. If it reads ahead, some of what that needs is read, and merged is only when all of
    /// it is there.
    fn merge_slice(&mut self, read_ahead: bool) -> Result<(), StoreError> {
        let Some(checkpoint) = &mut self.checkpoint else {
            return Ok(());
        };
        let (state, media) = (&mut self.state, &mut self.media);
        let bitmaps = self.budget.operations();
        match checkpoint.stage {
            Stage::Exceptions(from) | Stage::Overlays(from) => {
                let exceptions = matches!(checkpoint.stage, Stage::Exceptions(_));
                let (index, root) = if exceptions {
                    (&mut state.exceptions, checkpoint.next.exceptions)
                } else {
                    (&mut state.overlays, checkpoint.next.overlays)
                };
                let (kind, frozen) = (index.kind, index.frozen_len());
                let slice = index.frozen_slice(from, MAX_SLICE_CHANGES);
                let slice = &slice[..slice_len(media, kind, &root, slice)?];
                if read_ahead && checkpoint.read_ahead < MOST_READING_STEPS {
                    checkpoint.read_ahead += 1;
                    if index::read_ahead(media, kind, &root, slice, self.budget.operations())? {
                        return Ok(());
                    }
                }
                let root = in_step(media, &mut self.meta, checkpoint, |writer| {
                    merge(writer, kind, &root, slice)
                })?;
                checkpoint.read_ahead = 0;
                let end = from + slice.len();
                let more = end < frozen;
                (checkpoint.stage, *checkpoint.root(exceptions)) = match (exceptions, more) {
                    (true, true) => (Stage::Exceptions(end), root),
                    (true, false) => (Stage::Overlays(0), root),
                    (false, true) => (Stage::Overlays(end), root),
                    (false, false) => (Stage::Bitmaps(0), root),
                };
            }
            Stage::Bitmaps(from) => {
                let old = checkpoint.next.space;
                let (root, end) = in_step(media, &mut self.meta, checkpoint, |writer| {
                    state.space.write(writer, &old, from, bitmaps)
                })?;
                checkpoint.next.space = root;
                checkpoint.stage = if end < state.space.frozen_len() {
                    Stage::Bitmaps(end)
                } else {
                    Stage::Complete
                };
            }
            Stage::Complete => {}
        }
        self.check_promise();
        Ok(())
    }

    /// Makes the superblock durable that leads to the new trees, and frees what it replaces.
    pub(super) fn seal_checkpoint(
        &mut self,
        change: impl FnOnce(&mut Superblock),
    ) -> Result<(), StoreError> {
        let Some(checkpoint) = &mut self.checkpoint else {
            return Ok(());
        };
        change(&mut checkpoint.next);
        if kept!(
            "blocks-before-superblock",
            "the newest superblock would lead to blocks that a power cut took"
        ) {
            self.media.flush_meta()?;
        }
        write_superblock(&mut self.media, &checkpoint.next, self.stale_copy)?;
        self.stale_copy = None;

        let Some(Checkpoint {
            next,
            replaced,
            table,
            ring_blocks,
            ..
        }) = self.checkpoint.take()
        else {
            return Ok(());
        };
        for block in replaced {
            self.meta.release(block);
        }
        if let Some(blocks) = table {
            self.state.snapshots.set_written(blocks);
        }
        self.state.exceptions.thaw(next.exceptions);
        self.state.overlays.thaw(next.overlays);
        self.state.space.thaw(next.space);
        if next.epoch != self.ring.epoch {
            // A new epoch begins with an empty ring: a whole checkpoint, no record came meanwhile.
            self.ring.epoch = next.epoch;
            self.ring.head = next.tail;
            self.ring.sequence = next.tail_sequence;
        }
        self.ring.used -= ring_blocks;
        self.recovered = false;
        self.superblock = next;
        self.sweep.starved = false;
        self.need = self.need.filter(|&need| need != Need::Checkpoint);
        Ok(())
    }

    fn check_promise(&self) {
        if let Some(checkpoint) = &self.checkpoint {
            let taken = checkpoint.free_before.saturating_sub(self.meta.free());
            debug_assert!(
                taken <= checkpoint.promised,
                "a checkpoint took {taken} blocks, at most {} were foreseen",
                checkpoint.promised
            );
        }
    }

    /// Free metadata blocks that the checkpoint under way does not need.
    pub(crate) fn free_meta_blocks(&self) -> u64 {
        let free = self.meta.free();
        match &self.checkpoint {
            None => free,
            Some(checkpoint) => {
                let taken = checkpoint.free_before.saturating_sub(free);
                free.saturating_sub(checkpoint.promised.saturating_sub(taken))
            }
        }
    }

    /// The most metadata blocks the next checkpoint could need after so many more changes: the
    /// promise that it never runs out of them rests on asking this before each change.
    pub(crate) fn checkpoint_cost(&self, exceptions: usize, overlays: usize) -> u64 {
        let state = &self.state;
        let of_index = |index: &Index, more: usize| {
            let tree = grown(&index.root, index.frozen_len() as u64);
            merge_cost(&tree, (index.recent_len() + more) as u64)
        };
        let bitmaps = state.space.dirty_bitmaps((exceptions + overlays) as u64);
        let frozen = state.space.frozen_bitmaps();
        of_index(&state.exceptions, exceptions)
            + of_index(&state.overlays, overlays)
            + bitmaps
            + merge_cost(&grown(&state.space.root, frozen), bitmaps)
            + state.snapshots.blocks_with(1)
    }

    /// Blocks kept for deleting and sweeping on a store whose metadata region is full.
    pub(crate) fn meta_reserve(&self) -> u64 {
        40 + self.state.snapshots.blocks_with(1)
    }
}

impl Checkpoint {
    /// Has the superblock that it will write say that there are bookmarks; its generation is at least this one.
    /// Gives that.
    pub(super) fn announce_bookmarks(&mut self, generation: u64) -> u64 {
        self.next.bookmarks = true;
        self.next.generation = self.next.generation.max(generation);
        self.next.generation
    }

    fn root(&mut self, exceptions: bool) -> &mut TreeRoot {
        if exceptions {
            &mut self.next.exceptions
        } else {
            &mut self.next.overlays
        }
    }

    /// Writes what a step has collected, and sorts the blocks it replaced: those of an earlier step
    /// are free now, those of the durable trees when the checkpoint is complete.
    fn end_step(&mut self, mut writer: Writer<'_>) -> Result<(), StoreError> {
        writer.write_out()?;
        let Writer {
            alloc,
            written,
            replaced,
            ..
        } = writer;
        self.fresh.extend(written.iter().map(|block| block.0));
        for block in replaced {
            let old_need_it = kept!(
                "replaced-blocks-wait",
                "a block of the durable trees would be used anew before others are durable"
            );
            if self.fresh.remove(&block.0) || !old_need_it {
                alloc.release(block);
            } else {
                self.replaced.push(block);
            }
        }
        Ok(())
    }

    /// About how many more steps read ahead, rather too many.
    fn reading_steps(&self, exceptions: &Index, overlays: &Index, budget: Budget) -> u64 {
        let left = |index: &Index, from: usize| {
            let changes = (index.frozen_len() - from) as u64;
            changes.min(index.root.nodes) / budget.operations() as u64
        };
        match self.stage {
            Stage::Exceptions(from) => left(exceptions, from) + left(overlays, 0),
            Stage::Overlays(from) => left(overlays, from),
            Stage::Bitmaps(_) | Stage::Complete => 0,
        }
    }

    /// About how many more steps it takes, rather too many.
    fn steps_left(
        &self,
        exceptions: &Index,
        overlays: &Index,
        space: &Space,
        budget: Budget,
    ) -> u64 {
        let (exceptions, overlays) = (exceptions.frozen_len(), overlays.frozen_len());
        let bitmaps = space.write_steps(budget.operations());
        let slices = |changes: usize| changes.div_ceil(SLICE_CHANGES / 2) as u64;
        match self.stage {
            Stage::Exceptions(from) => slices(exceptions - from) + slices(overlays) + bitmaps + 4,
            Stage::Overlays(from) => slices(overlays - from) + bitmaps + 3,
            Stage::Bitmaps(_) => bitmaps + 2,
            Stage::Complete => 1,
        }
    }
}

/// Has `write` write what one step adds to a checkpoint. If that fails, the blocks taken for it are free
/// again, for nothing leads to them: what was written before has ended.
fn in_step<T>(
    media: &mut Media,
    meta: &mut MetaAlloc,
    checkpoint: &mut Checkpoint,
    write: impl FnOnce(&mut Writer<'_>) -> Result<T, StoreError>,
) -> Result<T, StoreError> {
    let mut writer = Writer::new(media, meta, checkpoint.next.generation);
    match write(&mut writer) {
        Ok(written) => checkpoint.end_step(writer).map(|()| written),
        Err(error) => {
            let Writer { alloc, written, .. } = writer;
            written.iter().for_each(|&block| alloc.release(block));
            Err(error)
        }
    }
}

/// How many of `changes`, the first of those that are left, are merged as one slice.
///
/// It ends with a branch (a node of level 1 and its leaves), so that the next slice touches other
/// leaves; and branches with few changes go together.
fn slice_len(
    media: &mut Media,
    kind: Kind,
    root: &TreeRoot,
    changes: &[Change],
) -> Result<usize, StoreError> {
    let mut end = 0;
    while end < changes.len() {
        let behind = match end_of_branch(media, kind, root, changes[end].0)? {
            Some(key) => end + changes[end..].partition_point(|&(changed, _)| changed < key),
            None => changes.len(),
        };
        // A branch covers the key it was looked up by.
        let behind = behind.max(end + 1);
        if end > 0 && behind > SLICE_CHANGES {
            break;
        }
        end = behind;
    }
    Ok(end)
}

/// A tree after so many changes more, as large as it could become.
fn grown(tree: &TreeRoot, changes: u64) -> TreeRoot {
    let mut tree = *tree;
    if changes > 0 {
        tree.nodes += new_nodes(changes) + 8;
        tree.root = tree
            .root
            .map(|(pointer, level, newest)| (pointer, level + 1, newest));
    }
    tree
}

/// The most blocks that merging `changes` into a tree can write.
///
/// Each change writes its leaf and the way to it, or there are no more nodes than that; any of them
/// may split in two. A new entry takes at most 34 bytes and lengthens its neighbour by at most 20.
fn merge_cost(tree: &TreeRoot, changes: u64) -> u64 {
    if changes == 0 {
        return 0;
    }
    let levels = tree.root.map_or(1, |(_, level, _)| u64::from(level) + 1);
    let touched = tree.nodes.min(changes * levels);
    2 * touched + new_nodes(changes) + 2 * levels + 2
}

/// Nodes that so many new entries need, beyond what splitting those that exist gives. At the end of
/// each slice there may be some that are not full, and the way to them is there twice for a moment.
fn new_nodes(changes: u64) -> u64 {
    changes * 54 / (PAYLOAD_LEN as u64 - 34) + changes / (SLICE_CHANGES as u64 / 2) * 3
}
