// SPDX-License-Identifier: GPL-2.0-only
//! Bitmaps of used data chunks, one block each; a set bit is a used chunk.
//!
//! Bitmap `i` covers store chunks `i * BITS .. (i + 1) * BITS`. A bitmap that does not exist means
//! "all free", so a new store of any size needs none. The block's `aux` field is `i`.

use super::block::{Block, BlockBuilder, PAYLOAD_LEN};
use super::{FormatError, expect, get_u64};
use crate::units::StoreChunk;

/// Chunks one bitmap covers.
pub const BITS: u64 = PAYLOAD_LEN as u64 * 8;
const WORDS: usize = PAYLOAD_LEN / 8;
const WHAT: &str = "bitmap";

/// Index of the bitmap that covers a chunk, and the bit in it.
#[must_use]
pub fn place_of(chunk: StoreChunk) -> (u64, u64) {
    (chunk.0 / BITS, chunk.0 % BITS)
}

/// A bitmap in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Bitmap([u64; WORDS]);

impl Default for Bitmap {
    fn default() -> Self {
        Bitmap([0; WORDS])
    }
}

impl Bitmap {
    /// Reads bitmap number `index`.
    ///
    /// # Errors
    /// The block is another bitmap, or its length or count of set bits is wrong.
    pub fn decode(block: &Block, index: u64) -> Result<Self, FormatError> {
        expect(WHAT, "index", block.aux(), index)?;
        expect(
            WHAT,
            "used bytes",
            block.payload().len() as u64,
            PAYLOAD_LEN as u64,
        )?;
        let mut map = Bitmap::default();
        for (i, word) in map.0.iter_mut().enumerate() {
            *word = get_u64(block.payload(), i * 8);
        }
        expect(WHAT, "count", block.count() as u64, map.count().into())?;
        Ok(map)
    }

    /// The payload, with its count and length for the header.
    #[must_use]
    pub fn encode(&self) -> (BlockBuilder, u16, u16) {
        let mut block = BlockBuilder::new();
        for (word, at) in self.0.iter().zip(block.payload_mut().chunks_exact_mut(8)) {
            at.copy_from_slice(&word.to_le_bytes());
        }
        (block, self.count(), PAYLOAD_LEN as u16)
    }

    /// Number of set bits.
    #[must_use]
    pub fn count(&self) -> u16 {
        // At most BITS = 32256, which fits.
        self.0.iter().map(|word| word.count_ones() as u16).sum()
    }

    /// Whether `bit` (less than [`BITS`]) is set.
    #[must_use]
    pub fn get(&self, bit: u64) -> bool {
        self.0[(bit / 64) as usize] & (1 << (bit % 64)) != 0
    }

    /// Sets or clears `bit`.
    pub fn set(&mut self, bit: u64, used: bool) {
        let word = &mut self.0[(bit / 64) as usize];
        if used {
            *word |= 1 << (bit % 64);
        } else {
            *word &= !(1 << (bit % 64));
        }
    }

    /// The first clear bit at or after `bit`.
    #[must_use]
    pub fn next_clear(&self, bit: u64) -> Option<u64> {
        let first = (bit / 64) as usize;
        for (i, &word) in self.0.iter().enumerate().skip(first) {
            let below = if i == first {
                (1u64 << (bit % 64)) - 1
            } else {
                0
            };
            let clear = !(word | below);
            if clear != 0 {
                return Some(i as u64 * 64 + u64::from(clear.trailing_zeros()));
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn next_clear_skips_what_is_used_and_ends() {
        let mut map = Bitmap::default();
        (0..130).for_each(|bit| map.set(bit, true));
        assert_eq!(map.next_clear(0), Some(130));
        assert_eq!(map.next_clear(131), Some(131));
        (130..BITS).for_each(|bit| map.set(bit, true));
        assert_eq!(map.next_clear(0), None);
        map.set(BITS - 1, false);
        assert_eq!(map.next_clear(64), Some(BITS - 1));
        assert_eq!(u64::from(map.count()), BITS - 1);
    }
}
