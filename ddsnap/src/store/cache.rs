// SPDX-License-Identifier: GPL-2.0-only
//! A bounded cache of checked metadata blocks, with the clock rule: a block that was used since the
//! hand last passed gets one more round.

use std::collections::HashMap;

use crate::format::BLOCK_LEN;
use crate::format::block::{Block, Pointer};

#[derive(Debug)]
struct Slot {
    pointer: Pointer,
    block: Block,
    used: bool,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Cache {
    slots: Vec<Slot>,
    by_block: HashMap<u64, usize>,
    capacity: usize,
    hand: usize,
}

impl Cache {
    /// Holds up to `bytes`, at least 16 blocks.
    pub fn new(bytes: u64) -> Self {
        let capacity = usize::try_from(bytes / BLOCK_LEN as u64)
            .unwrap_or(usize::MAX)
            .max(16);
        Cache {
            slots: Vec::new(),
            by_block: HashMap::new(),
            capacity,
            hand: 0,
        }
    }

    /// The most blocks it holds.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The block, if the version that `pointer` means is here: a freed block's number is used again
    /// for other content.
    pub fn get(&mut self, pointer: Pointer) -> Option<Block> {
        let slot = &mut self.slots[*self.by_block.get(&pointer.block.0)?];
        if slot.pointer != pointer {
            return None;
        }
        slot.used = true;
        Some(slot.block.clone())
    }

    /// Remembers a checked block.
    pub fn put(&mut self, pointer: Pointer, block: Block) {
        let slot = Slot {
            pointer,
            block,
            used: false,
        };
        if let Some(&index) = self.by_block.get(&pointer.block.0) {
            self.slots[index] = slot;
            return;
        }
        if self.slots.len() < self.capacity {
            self.by_block.insert(pointer.block.0, self.slots.len());
            self.slots.push(slot);
            return;
        }
        while std::mem::take(&mut self.slots[self.hand].used) {
            self.hand = (self.hand + 1) % self.capacity;
        }
        self.by_block.remove(&self.slots[self.hand].pointer.block.0);
        self.by_block.insert(pointer.block.0, self.hand);
        self.slots[self.hand] = slot;
        self.hand = (self.hand + 1) % self.capacity;
    }
}
