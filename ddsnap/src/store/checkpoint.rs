// SPDX-License-Identifier: GPL-2.0-only
//! Checkpoints: the changes in memory become the tree on disk, and the journal is free again.
//!
//! Order, and what each step is for:
//! 1. new nodes, bitmaps and the snapshot table go to free blocks; flush: before anything refers to
//!    them they are durable;
//! 2. superblock copy A; flush; copy B; flush: at any moment one of the copies is whole, and the
//!    valid one of the higher generation is complete;
//! 3. only now the replaced blocks and the journal's records are free: the older superblock, which
//!    needs them, can no longer be the newest valid copy.

use super::Store;
use super::error::StoreError;
use super::index::merge::{Change, Writer, merge};
use super::media::Media;
use crate::device::Write;
use crate::format::block::PAYLOAD_LEN;
use crate::format::superblock::{COPIES, Superblock, TreeRoot};

/// The most changes kept in memory between checkpoints, for each index.
pub(crate) const MAX_RECENT: usize = 1 << 18;

/// Writes both copies of a superblock, each durable before the next is touched.
pub(crate) fn write_superblock(
    media: &mut Media,
    superblock: &Superblock,
) -> Result<(), StoreError> {
    for (copy, at) in COPIES.into_iter().enumerate() {
        let bytes = superblock.encode(copy as u32);
        media.write_meta(&[Write {
            offset: at.to_offset(),
            from: &bytes,
        }])?;
        media.flush_meta()?;
    }
    Ok(())
}

impl Store {
    /// Makes everything in memory durable in the trees and empties the journal.
    pub(crate) fn checkpoint(&mut self) -> Result<(), StoreError> {
        self.checkpoint_with(|_| {})
    }

    /// A checkpoint whose superblock is also changed by `change`.
    ///
    /// Any failure latches the store: blocks may have been written that memory does not know.
    pub(crate) fn checkpoint_with(
        &mut self,
        change: impl FnOnce(&mut Superblock),
    ) -> Result<(), StoreError> {
        self.check_latch()?;
        let result = self.try_checkpoint(change);
        if let Err(error) = &result {
            self.latch_now(error);
        }
        result
    }

    fn try_checkpoint(&mut self, change: impl FnOnce(&mut Superblock)) -> Result<(), StoreError> {
        let generation = self.superblock.generation + 1;
        let (free, promised) = (self.meta.free(), self.checkpoint_cost(0, 0));
        // Blocks of this checkpoint may be read back from the device before it is complete.
        self.media.generation = generation;
        let state = &mut self.state;
        let mut writer = Writer::new(&mut self.media, &mut self.meta, generation);
        let mut next = self.superblock.clone();
        for (index, root) in [
            (&state.exceptions, &mut next.exceptions),
            (&state.overlays, &mut next.overlays),
        ] {
            let changes: Vec<Change> = index
                .recent
                .iter()
                .map(|(&key, &value)| (key, value))
                .collect();
            *root = merge(&mut writer, index.kind, &index.root, &changes)?;
        }
        next.space = state.space.write(&mut writer)?;
        let mut table = None;
        if state.snapshots.dirty {
            let (first, blocks) = state.snapshots.write(&mut writer)?;
            next.snapshots = first;
            next.snapshot_count = state.snapshots.len() as u32; // at most MAX_ENTRIES
            table = Some(blocks);
        }
        writer.write_out()?;
        let taken = free - writer.alloc.free();
        debug_assert!(
            taken <= promised,
            "a checkpoint took {taken} blocks, at most {promised} were foreseen"
        );
        let replaced = std::mem::take(&mut writer.replaced);
        next.generation = generation;
        next.clean = false;
        next.origin_chunks = state.origin_chunks;
        next.next_seq = state.next_seq;
        next.revert = state.revert;
        next.data_used = state.space.used;
        next.epoch = self.ring.epoch;
        next.tail = self.ring.head;
        next.tail_sequence = self.ring.sequence;
        change(&mut next);
        self.media.flush_meta()?;
        write_superblock(&mut self.media, &next)?;

        for block in replaced {
            self.meta.release(block);
        }
        if let Some(blocks) = table {
            state.snapshots.set_written(blocks);
        }
        for (index, root) in [
            (&mut state.exceptions, next.exceptions),
            (&mut state.overlays, next.overlays),
        ] {
            index.root = root;
            index.recent.clear();
        }
        state.space.root = next.space;
        state.space.changed.clear();
        self.ring.epoch = next.epoch;
        self.ring.head = next.tail;
        self.ring.sequence = next.tail_sequence;
        self.ring.used = 0;
        self.superblock = next;
        Ok(())
    }

    /// The most metadata blocks a checkpoint could need after so many more changes: the promise
    /// that it never runs out of them rests on asking this before each change.
    pub(crate) fn checkpoint_cost(&self, exceptions: usize, overlays: usize) -> u64 {
        let state = &self.state;
        let exception_changes = (state.exceptions.recent.len() + exceptions) as u64;
        let overlay_changes = (state.overlays.recent.len() + overlays) as u64;
        let bitmaps = state.space.dirty_bitmaps((exceptions + overlays) as u64);
        merge_cost(&state.exceptions.root, exception_changes)
            + merge_cost(&state.overlays.root, overlay_changes)
            + bitmaps
            + merge_cost(&state.space.root, bitmaps)
            + state.snapshots.blocks_with(1)
    }

    /// Blocks kept for deleting and sweeping on a store whose metadata region is full.
    pub(crate) fn meta_reserve(&self) -> u64 {
        40 + self.state.snapshots.blocks_with(1)
    }
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
    2 * touched + changes * 54 / (PAYLOAD_LEN as u64 - 34) + 2 * levels + 2
}
