// SPDX-License-Identifier: GPL-2.0-only
//! Which blocks of the metadata region are in use.
//!
//! Nothing on disk says so: at open, everything the superblock leads to is walked down to the level
//! above the leaves (whose places are known from there). That reads one block in about a hundred,
//! and the answer cannot contradict the trees, as a stored bitmap could; a block met twice is
//! damage, found at once. A stored bitmap would also have to describe the blocks it lies in itself.

use std::collections::BTreeMap;

use crate::format::superblock::Extent;
use crate::units::MetaBlock;

const PAGE_WORDS: usize = 512;
const PAGE_BITS: u64 = PAGE_WORDS as u64 * 64;

/// One bit a block, in pages that exist only where a block is in use.
#[derive(Debug)]
pub(crate) struct MetaAlloc {
    extents: Vec<Extent>,
    pages: BTreeMap<u64, Box<[u64; PAGE_WORDS]>>,
    used: u64,
    total: u64,
    /// Where the search for the next free block begins: an extent and an offset in it.
    cursor: (usize, u64),
}

impl MetaAlloc {
    /// All of the region is free.
    pub fn new(extents: &[Extent]) -> Self {
        let total = extents.iter().map(|extent| extent.blocks).sum();
        MetaAlloc {
            extents: extents.to_vec(),
            pages: BTreeMap::new(),
            used: 0,
            total,
            cursor: (0, 0),
        }
    }

    /// Blocks of the region.
    pub fn total(&self) -> u64 {
        self.total
    }

    /// Blocks free now.
    pub fn free(&self) -> u64 {
        self.total - self.used
    }

    /// Marks a block used; false if it lies outside the region or is used already.
    #[must_use]
    pub fn take(&mut self, block: MetaBlock) -> bool {
        if !self.contains(block) {
            return false;
        }
        let page = self
            .pages
            .entry(block.0 / PAGE_BITS)
            .or_insert_with(|| Box::new([0; PAGE_WORDS]));
        let (word, bit) = (
            &mut page[(block.0 % PAGE_BITS / 64) as usize],
            1 << (block.0 % 64),
        );
        if *word & bit != 0 {
            return false;
        }
        *word |= bit;
        self.used += 1;
        true
    }

    /// Marks a used block free.
    pub fn release(&mut self, block: MetaBlock) {
        if let Some(page) = self.pages.get_mut(&(block.0 / PAGE_BITS)) {
            let (word, bit) = (
                &mut page[(block.0 % PAGE_BITS / 64) as usize],
                1 << (block.0 % 64),
            );
            if *word & bit != 0 {
                *word &= !bit;
                self.used -= u64::from(self.contains(block));
            }
        }
    }

    /// Whether a block lies in the region.
    pub fn contains(&self, block: MetaBlock) -> bool {
        self.extents.iter().any(|extent| extent.contains(block))
    }

    /// Changes what the region is. Used blocks outside stay marked until they are released, but count
    /// for nothing.
    pub fn set_extents(&mut self, extents: &[Extent]) {
        self.extents = extents.to_vec();
        self.total = extents.iter().map(|extent| extent.blocks).sum();
        self.cursor = (0, 0);
        let used = |extent: &Extent| {
            let pages = extent.first.0 / PAGE_BITS..extent.end().0.div_ceil(PAGE_BITS);
            self.pages
                .range(pages)
                .flat_map(|(page, words)| (page * PAGE_WORDS as u64..).zip(words.iter()))
                .map(|(word, &bits)| {
                    let first = extent.first.0.clamp(word * 64, word * 64 + 64) - word * 64;
                    let end = extent.end().0.clamp(word * 64, word * 64 + 64) - word * 64;
                    let upto = |bit: u64| if bit == 64 { u64::MAX } else { (1 << bit) - 1 };
                    u64::from((bits & upto(end) & !upto(first)).count_ones())
                })
                .sum::<u64>()
        };
        self.used = extents.iter().map(used).sum();
    }

    /// Takes a free block; none if all are used.
    pub fn allocate(&mut self) -> Option<MetaBlock> {
        if self.free() == 0 {
            return None;
        }
        let (mut index, mut offset) = self.cursor;
        // Every extent once, and the first one again from its start.
        for _ in 0..=self.extents.len() {
            let extent = self.extents[index];
            if let Some(block) =
                self.next_free(extent.first.0 + offset, extent.first.0 + extent.blocks)
            {
                self.cursor = (index, block.0 + 1 - extent.first.0);
                return self.take(block).then_some(block);
            }
            (index, offset) = ((index + 1) % self.extents.len(), 0);
        }
        None
    }

    fn next_free(&self, from: u64, end: u64) -> Option<MetaBlock> {
        let mut at = from;
        while at < end {
            let Some(page) = self.pages.get(&(at / PAGE_BITS)) else {
                return Some(MetaBlock(at));
            };
            let word = page[(at % PAGE_BITS / 64) as usize] | ((1 << (at % 64)) - 1);
            if word != u64::MAX {
                at = at / 64 * 64 + u64::from(word.trailing_ones());
                return (at < end).then_some(MetaBlock(at));
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_of_every_extent_is_given_once() {
        let extents = [
            Extent {
                first: MetaBlock(40),
                blocks: 100,
            },
            Extent {
                first: MetaBlock(100_000),
                blocks: 3,
            },
        ];
        let mut alloc = MetaAlloc::new(&extents);
        assert!(!alloc.take(MetaBlock(39)) && !alloc.take(MetaBlock(140)));
        assert!(alloc.take(MetaBlock(41)));
        let mut all: Vec<_> = std::iter::from_fn(|| alloc.allocate())
            .map(|block| block.0)
            .collect();
        assert_eq!(alloc.free(), 0);
        all.sort_unstable();
        let wanted: Vec<_> = (40..140)
            .filter(|&b| b != 41)
            .chain(100_000..100_003)
            .collect();
        assert_eq!(all, wanted);
        alloc.release(MetaBlock(77));
        assert_eq!((alloc.free(), alloc.allocate()), (1, Some(MetaBlock(77))));
    }

    #[test]
    fn a_smaller_region_counts_what_lies_in_it_and_forgets_nothing() {
        let whole = Extent {
            first: MetaBlock(40),
            blocks: 70_000,
        };
        let mut alloc = MetaAlloc::new(&[whole]);
        for block in [40, 63, 64, 100, 139, 140, 33_000, 70_039] {
            assert!(alloc.take(MetaBlock(block)));
        }
        let part = Extent {
            first: MetaBlock(40),
            blocks: 100,
        };
        alloc.set_extents(&[part]);
        assert_eq!((alloc.total(), alloc.free()), (100, 95));
        assert!(!alloc.contains(MetaBlock(140)));
        alloc.release(MetaBlock(140));
        alloc.release(MetaBlock(64));
        assert_eq!(alloc.free(), 96);
        let all: Vec<_> = std::iter::from_fn(|| alloc.allocate()).collect();
        assert!(all.len() == 96 && all.iter().all(|&block| part.contains(block)));
        alloc.set_extents(&[whole]);
        assert_eq!(alloc.free(), 70_000 - 102);
        assert!(!alloc.take(MetaBlock(33_000)) && alloc.take(MetaBlock(140)));
    }
}
