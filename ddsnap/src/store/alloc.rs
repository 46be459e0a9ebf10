// SPDX-License-Identifier: GPL-2.0-only
//! Which chunks of the data region are in use.
//!
//! The bitmaps on disk are as old as the last checkpoint. What changed since is kept as two sets of
//! chunks, the older of which the checkpoint under way writes; they are rebuilt from the journal
//! after a crash, so memory follows the changes and not the size of the volume.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use super::budget::Budget;
use super::error::StoreError;
use super::frozen::Frozen;
use super::index::merge::{Change, Writer, merge};
use super::index::tree::Cursor;
use super::media::Media;
use crate::format::bitmap::{BITS, Bitmap, place_of};
use crate::format::block::{Kind, Pointer};
use crate::format::node::Value;
use crate::format::superblock::TreeRoot;
use crate::units::{MetaBlock, StoreChunk};

/// When a step of a checkpoint has looked at so many changed bits, it is the last bitmap's turn.
const STEP_CHANGES: usize = BITS as usize;

/// See the module.
#[derive(Debug)]
pub(crate) struct Space {
    pub root: TreeRoot,
    pub first: u64,
    pub end: u64,
    /// Chunks in use.
    pub used: u64,
    /// Chunks whose bit on disk may be old, with what the checkpoint under way writes.
    frozen: Frozen<u64, bool>,
    /// Chunks changed since that checkpoint began.
    recent: BTreeMap<u64, bool>,
    /// The bitmap looked at last, up to date.
    current: Option<(u64, Bitmap)>,
    /// Where the search for a free chunk begins.
    cursor: u64,
    /// The chunk behind the last that was taken since somebody began to watch.
    taken_end: u64,
    /// Chunks looked at since one was found free.
    barren: u64,
    /// A bit for each bitmap that was looked at from end to end and had no free chunk, and has got none
    /// since. It grows as the search gets on: 4 KiB for each 17 TiB of 16 KiB chunks that are in use.
    full: Vec<u64>,
    /// Chunks of the region that hold metadata: neither used nor free. They are set in `current`,
    /// so that they are not found free, and never in what is written.
    holes: Vec<Range<u64>>,
    /// Free chunks that are not to be taken before the store is opened again, those of a record at most; the same holds
    /// for them.
    resting: BTreeSet<u64>,
}

impl Space {
    pub fn new(root: TreeRoot, first: StoreChunk, end: StoreChunk, used: u64) -> Self {
        let (first, end) = (first.0, end.0);
        Space {
            root,
            first,
            end,
            used,
            frozen: Frozen::new(),
            recent: BTreeMap::new(),
            current: None,
            cursor: first,
            taken_end: 0,
            barren: 0,
            full: Vec::new(),
            holes: Vec::new(),
            resting: BTreeSet::new(),
        }
    }

    /// Keeps a chunk that is free from being taken before the store is opened again.
    pub fn rest(&mut self, chunk: StoreChunk) {
        self.resting.insert(chunk.0);
        self.current = None;
    }

    /// Changes where the region ends and which of its chunks hold metadata. What is beyond the new
    /// end is free.
    pub fn set_region(&mut self, end: StoreChunk, holes: impl Iterator<Item = Range<u64>>) {
        self.end = end.0;
        self.holes = holes.collect();
        self.resting.retain(|chunk| *chunk < end.0);
        self.current = None;
        self.cursor = self.first;
        self.barren = 0;
        self.full.clear();
    }

    /// Chunks that can hold data now.
    pub fn total(&self) -> u64 {
        let holes: u64 = self.holes.iter().map(|hole| hole.end - hole.start).sum();
        (self.end - self.first).saturating_sub(holes + self.resting())
    }

    /// Free chunks that may be taken.
    pub fn free(&self) -> u64 {
        self.total().saturating_sub(self.used)
    }

    /// How many free chunks are not to be taken before the store is opened again.
    pub fn resting(&self) -> u64 {
        self.resting.len() as u64
    }

    /// Bitmaps that the region has when each of them exists.
    pub fn bitmaps(&self) -> u64 {
        self.end.div_ceil(BITS) - self.first / BITS
    }

    /// Whether a chunk lies in the region and can hold data.
    pub fn contains(&self, chunk: StoreChunk) -> bool {
        (self.first..self.end).contains(&chunk.0)
            && !self.holes.iter().any(|hole| hole.contains(&chunk.0))
            && !self.resting.contains(&chunk.0)
    }

    /// How many chunks from `from` on are in use, as far as the budget's number of bitmaps say; the last of them, and where to
    /// look on.
    pub fn used_step(
        &mut self,
        media: &mut Media,
        from: StoreChunk,
        budget: Budget,
    ) -> Result<(u64, Option<StoreChunk>, Option<StoreChunk>), StoreError> {
        let (mut count, mut last, mut at) = (0, None, from.0);
        for _ in 0..budget.operations() {
            let Some(index) = self.bitmap_from(media, at)? else {
                return Ok((count, last, None));
            };
            let end = ((index + 1) * BITS).min(self.end);
            for chunk in ((index * BITS).max(at)..end).map(StoreChunk) {
                if self.contains(chunk) && self.is_used(media, chunk)? {
                    count += 1;
                    last = Some(chunk);
                }
            }
            at = (index + 1) * BITS;
        }
        Ok((count, last, Some(StoreChunk(at))))
    }

    /// The first bitmap that may have a used chunk at or behind `from`.
    fn bitmap_from(&self, media: &mut Media, from: u64) -> Result<Option<u64>, StoreError> {
        let recent = self.recent.range(from..).next();
        let recent = recent.map(|(chunk, _)| chunk / BITS);
        let frozen = self.frozen.from(from).next();
        let frozen = frozen.map(|(chunk, _)| chunk / BITS);
        let stored = self.blocks(media, from / BITS, 1)?;
        let stored = stored.first().map(|&(index, _)| index);
        let first = [recent, frozen, stored].into_iter().flatten().min();
        Ok(first.filter(|index| index * BITS < self.end))
    }

    /// Notes from now on whether a chunk at or behind `end` is taken, and looks for free ones before it first.
    pub fn watch_from(&mut self, end: StoreChunk) {
        self.taken_end = 0;
        if self.cursor >= end.0 {
            self.cursor = self.first;
        }
    }

    /// Whether a chunk at or behind `end` was taken since [`watch_from`](Self::watch_from).
    pub fn taken_behind(&self, end: StoreChunk) -> bool {
        end.0 < self.end && self.taken_end > end.0
    }

    /// Has the next checkpoint write bitmap `index` anew, though nothing in it changed. No checkpoint
    /// is under way.
    pub fn touch(&mut self, media: &mut Media, index: u64) -> Result<(), StoreError> {
        if let Some((_, map)) = self.stored(media, &self.root, index)? {
            self.recent.entry(index * BITS).or_insert(map.get(0));
        }
        Ok(())
    }

    /// The bitmaps on disk from number `from` on, at most `limit`: number and block.
    pub fn blocks(
        &self,
        media: &mut Media,
        from: u64,
        limit: usize,
    ) -> Result<Vec<(u64, MetaBlock)>, StoreError> {
        let mut cursor = Cursor::seek(media, Kind::Space, &self.root, (from, 0))?;
        let mut found = Vec::new();
        while found.len() < limit {
            let Some((key, value)) = cursor.next(media)? else {
                break;
            };
            found.push((key.0, MetaBlock(value.place)));
        }
        Ok(found)
    }

    /// Whether a chunk of the region is in use.
    pub fn is_used(&mut self, media: &mut Media, chunk: StoreChunk) -> Result<bool, StoreError> {
        let (index, bit) = place_of(chunk);
        Ok(self.bitmap(media, index)?.get(bit))
    }

    /// Marks a chunk used or free; the caller knows that it was the opposite.
    pub fn mark(&mut self, chunk: StoreChunk, used: bool) {
        self.recent.insert(chunk.0, used);
        if used {
            self.used += 1;
            self.taken_end = self.taken_end.max(chunk.0 + 1);
        } else {
            self.used = self.used.saturating_sub(1);
        }
        let (index, bit) = place_of(chunk);
        if !used {
            self.set_full(index, false);
        }
        if let Some((current, map)) = &mut self.current {
            if *current == index {
                map.set(bit, used);
            }
        }
    }

    /// Finds `count` free chunks; fewer if they are rare, and then the next call looks on. They stay free
    /// until marked.
    ///
    /// # Errors
    /// The space map cannot be read, or it has no free chunk at all though there should be some.
    pub fn find_free(
        &mut self,
        media: &mut Media,
        count: usize,
        budget: Budget,
    ) -> Result<Vec<StoreChunk>, StoreError> {
        let mut found = Vec::with_capacity(count);
        let mut at = self.cursor;
        let mut left = self.end - self.first;
        // One bitmap for each chunk that is asked for, and some that have none.
        let mut bitmaps = count + budget.operations();
        while found.len() < count && left > 0 {
            let (index, bit) = place_of(StoreChunk(at));
            let whole = at == (index * BITS).max(self.first);
            let end = ((index + 1) * BITS).min(self.end);
            let stop = end.min(at + left);
            let free = if self.is_full(index) {
                None
            } else {
                let is_read = |(current, _): &(u64, Bitmap)| *current == index;
                if !self.current.as_ref().is_some_and(is_read) {
                    if bitmaps == 0 {
                        break;
                    }
                    bitmaps -= 1;
                }
                let bit = self.bitmap(media, index)?.next_clear(bit);
                bit.map(|bit| index * BITS + bit)
            };
            let next = match free.filter(|&chunk| chunk < stop) {
                Some(chunk) => {
                    found.push(StoreChunk(chunk));
                    self.barren = 0;
                    chunk + 1
                }
                None => {
                    if whole && free.is_none_or(|chunk| chunk >= end) {
                        self.set_full(index, true);
                    }
                    self.barren += stop - at;
                    stop
                }
            };
            left -= next - at;
            at = if next == self.end { self.first } else { next };
            self.cursor = at;
        }
        if found.is_empty() && count > 0 && self.barren >= 2 * (self.end - self.first) {
            let problem = "fewer chunks are free than the count of free chunks says";
            return Err(media.inconsistent(problem));
        }
        Ok(found)
    }

    /// A bounded part of the way to the next free chunk; true if the search is there.
    pub fn seek_free(&mut self, media: &mut Media, budget: Budget) -> Result<bool, StoreError> {
        let found = self.find_free(media, 1, budget)?;
        if let Some(chunk) = found.first() {
            self.cursor = chunk.0;
        }
        Ok(!found.is_empty())
    }

    fn is_full(&self, index: u64) -> bool {
        let word = self.full.get((index / 64) as usize);
        word.is_some_and(|word| word >> (index % 64) & 1 == 1)
    }

    fn set_full(&mut self, index: u64, full: bool) {
        let (word, bit) = ((index / 64) as usize, 1 << (index % 64));
        if full && self.full.len() <= word {
            self.full.resize(word + 1, 0);
        }
        match self.full.get_mut(word) {
            Some(word) if full => *word |= bit,
            Some(word) => *word &= !bit,
            None => {}
        }
    }

    /// Bitmap `index`, up to date; holes are set in it.
    pub fn bitmap(&mut self, media: &mut Media, index: u64) -> Result<&Bitmap, StoreError> {
        if self
            .current
            .as_ref()
            .is_none_or(|(current, _)| *current != index)
        {
            let mut map = self
                .stored(media, &self.root, index)?
                .map(|(_, map)| map)
                .unwrap_or_default();
            let chunks = index * BITS..(index + 1) * BITS;
            let frozen = self.frozen.from(chunks.start);
            for (chunk, used) in frozen.take_while(|(chunk, _)| chunks.contains(chunk)) {
                map.set(chunk % BITS, used);
            }
            for (&chunk, &used) in self.recent.range(chunks) {
                map.set(chunk % BITS, used);
            }
            let (from, to) = (index * BITS, (index + 1) * BITS);
            for hole in &self.holes {
                (hole.start.max(from)..hole.end.min(to)).for_each(|at| map.set(at % BITS, true));
            }
            for at in self.resting.range(from..to) {
                map.set(at % BITS, true);
            }
            self.current = Some((index, map));
        }
        // Set just above if it was not.
        self.current
            .as_ref()
            .map(|(_, map)| map)
            .ok_or_else(|| media.inconsistent("no bitmap"))
    }

    fn stored(
        &self,
        media: &mut Media,
        root: &TreeRoot,
        index: u64,
    ) -> Result<Option<(Pointer, Bitmap)>, StoreError> {
        let mut cursor = Cursor::seek(media, Kind::Space, root, (index, 0))?;
        let Some((_, value)) = cursor.next(media)?.filter(|&(key, _)| key == (index, 0)) else {
            return Ok(None);
        };
        let pointer = Pointer {
            block: MetaBlock(value.place),
            crc: value.crc,
        };
        let block = media.block(pointer, Kind::Bitmap, 0)?;
        let map = Bitmap::decode(&block, index).map_err(|source| media.damaged(pointer, source))?;
        Ok(Some((pointer, map)))
    }

    /// Whether chunks changed that no checkpoint has begun to write.
    pub fn has_recent(&self) -> bool {
        !self.recent.is_empty()
    }

    /// A checkpoint begins: what changed until now is what it writes.
    pub fn freeze(&mut self) {
        debug_assert!(self.frozen.is_empty(), "one checkpoint at a time");
        self.frozen = Frozen::of(std::mem::take(&mut self.recent));
    }

    /// The checkpoint is durable: its bitmaps have what was frozen.
    pub fn thaw(&mut self, root: TreeRoot) {
        self.root = root;
        self.frozen = Frozen::new();
    }

    /// Bits that the checkpoint under way writes.
    pub fn frozen_len(&self) -> usize {
        self.frozen.len()
    }

    /// The most calls of [`write`](Self::write) that they take.
    pub fn write_steps(&self, most: usize) -> u64 {
        // Each ends with `most` bitmaps, or with so many changes, or is the last.
        let by_changes = self.frozen.len() / STEP_CHANGES;
        self.frozen_bitmaps().div_ceil(most as u64) + by_changes as u64
    }

    /// The most bitmaps that the checkpoint under way writes.
    pub fn frozen_bitmaps(&self) -> u64 {
        (self.frozen.len() as u64).min(self.bitmaps())
    }

    /// The most bitmaps that the next checkpoint would write after so many more changes.
    pub fn dirty_bitmaps(&self, more: u64) -> u64 {
        (self.recent.len() as u64 + more).min(self.bitmaps())
    }

    /// Writes the bitmaps of up to `most` runs of frozen changes from the place `from` on, as many as are laid out
    /// in a few milliseconds, and the tree `old` with them; gives the new root and the first place that is left.
    pub fn write(
        &mut self,
        writer: &mut Writer<'_>,
        old: &TreeRoot,
        from: usize,
        most: usize,
    ) -> Result<(TreeRoot, usize), StoreError> {
        let mut changes: Vec<Change> = Vec::new();
        let mut at = from;
        while changes.len() < most && at - from < STEP_CHANGES {
            let Some(&(chunk, _)) = self.frozen.slice(at, 1).first() else {
                break;
            };
            let index = chunk / BITS;
            let stored = self.stored(writer.media, old, index)?;
            let mut map = Bitmap::default();
            if let Some((pointer, old)) = stored {
                writer.replaced.push(pointer.block);
                map = old;
            }
            let of_bitmap = self.frozen.run(at, |chunk| chunk / BITS == index);
            for &(chunk, used) in of_bitmap {
                map.set(chunk % BITS, used);
            }
            at += of_bitmap.len();
            if map.count() == 0 {
                changes.push(((index, 0), None));
            } else {
                let pointer = writer.put(map.encode(), Kind::Bitmap, 0, index)?;
                changes.push((
                    (index, 0),
                    Some(Value {
                        place: pointer.block.0,
                        crc: pointer.crc,
                    }),
                ));
            }
        }
        let root = merge(writer, Kind::Space, old, &changes)?;
        Ok((root, at))
    }
}
