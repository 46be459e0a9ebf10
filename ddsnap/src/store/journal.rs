// SPDX-License-Identifier: GPL-2.0-only
//! The journal as a ring of blocks: where the next record goes.
//!
//! A record lies in one piece. One that does not fit before the ring's end goes to its start
//! instead, with the same sequence number: a reader that finds no record where the next one could be
//! looks at the start too. (A record of padding would be a second thing to lose: of an
//! unacknowledged group, the padding could vanish and the record stay, which would look like damage.)

use crate::buffer::AlignedBuf;
use crate::format::BLOCK_LEN;
use crate::format::journal::{
    Entry, MAX_RECORD_BLOCKS, MAX_RECORD_ENTRIES, RecordId, blocks_for, encode, entries_in,
};
use crate::format::superblock::Superblock;
use crate::units::MetaBlock;

/// Position of the writer in the ring.
#[derive(Debug)]
pub(crate) struct Ring {
    pub first: MetaBlock,
    pub blocks: u64,
    pub epoch: u64,
    /// Sequence of the next record.
    pub sequence: u64,
    /// Where the next record begins if it fits; less than `blocks`.
    pub head: u64,
    /// Blocks behind `head` that a checkpoint has yet to free.
    pub used: u64,
    uuid_part: u64,
}

/// A record placed in the ring but not written yet.
pub(crate) struct Placed {
    pub at: MetaBlock,
    pub bytes: AlignedBuf,
    end: u64,
    used: u64,
}

impl Ring {
    /// An empty ring that begins where the superblock says.
    pub fn new(superblock: &Superblock) -> Self {
        Ring {
            first: superblock.journal_first,
            blocks: superblock.journal_blocks,
            epoch: superblock.epoch,
            sequence: superblock.tail_sequence,
            head: superblock.tail,
            used: 0,
            uuid_part: superblock.uuid_part(),
        }
    }

    /// The most entries a record may have: at most a quarter of the ring, so that any record fits
    /// into an empty one wherever its head is. One less, so that opening after a crash can write it again.
    pub fn max_entries(&self) -> usize {
        entries_in(self.most_blocks() as usize).min(MAX_RECORD_ENTRIES) - 1
    }

    /// The most blocks a record has.
    pub fn most_blocks(&self) -> u64 {
        (self.blocks / 4).clamp(1, u64::from(MAX_RECORD_BLOCKS))
    }

    /// Whether a record of so many entries would leave `kept` blocks free.
    pub fn has_room(&self, entries: usize, kept: u64) -> bool {
        let blocks = blocks_for(entries) as u64;
        let skipped = match self.head + blocks <= self.blocks {
            true => 0,
            false => self.blocks - self.head,
        };
        self.used + skipped + blocks + kept <= self.blocks
    }

    /// Encodes a record for the next free place; none if a checkpoint must make room first.
    pub fn place(&self, entries: &[Entry]) -> Option<Placed> {
        let blocks = blocks_for(entries.len()) as u64;
        let (position, skipped) = if self.head + blocks <= self.blocks {
            (self.head, 0)
        } else {
            (0, self.blocks - self.head)
        };
        let used = self.used + skipped + blocks;
        if used > self.blocks {
            return None;
        }
        let id = RecordId {
            epoch: self.epoch,
            sequence: self.sequence,
            uuid_part: self.uuid_part,
            position,
        };
        let bytes = encode(&id, entries);
        debug_assert_eq!(bytes.len() as u64, blocks * BLOCK_LEN as u64);
        let end = (position + blocks) % self.blocks;
        Some(Placed {
            at: MetaBlock(self.first.0 + position),
            bytes,
            end,
            used,
        })
    }

    /// Goes on behind record `sequence` of so many entries, which was found at `position`: at the head, or at
    /// the start because it did not fit there, or further on because it stands for others.
    pub fn pass(&mut self, position: u64, sequence: u64, entries: usize) {
        let blocks = blocks_for(entries) as u64;
        let skipped = (position + self.blocks - self.head) % self.blocks;
        self.used += skipped + blocks;
        self.head = (position + blocks) % self.blocks;
        self.sequence = sequence + 1;
    }

    /// The placed record is durable.
    pub fn advance(&mut self, placed: &Placed) {
        self.head = placed.end;
        self.used = placed.used;
        self.sequence += 1;
    }
}
