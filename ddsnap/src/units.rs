// SPDX-License-Identifier: GPL-2.0-only
//! Quantities as types, so that no sector lands in a chunk field.
//!
//! A conversion is a method named for the change of unit. Nothing here does I/O.

use std::fmt;

/// Bytes in a sector, the unit of block device lengths and device-mapper tables.
pub const SECTOR_BYTES: u64 = 512;

macro_rules! quantity {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

quantity! {
    /// A chunk of the origin (and so of each snapshot), counted from 0.
    Chunk(u64)
}
quantity! {
    /// A chunk of the snapshot store device, counted from its first sector: chunk 0 holds metadata.
    StoreChunk(u64)
}
quantity! {
    /// A block of the metadata device (or region), counted from the device's first sector in units
    /// of [`META_BLOCK_BYTES`].
    MetaBlock(u64)
}
quantity! {
    /// A length of the origin or of a snapshot, in sectors of [`SECTOR_BYTES`]. Its last chunk may be a
    /// short one.
    Sectors(u64)
}
quantity! {
    /// The number an administrator gives a snapshot.
    SnapTag(u32)
}
quantity! {
    /// A snapshot's place in the order of creation. Grows from 1, never used again; 0 is "none".
    SnapSeq(u64)
}

/// Size of every metadata block: index node, journal block, superblock copy.
///
/// One size whatever the chunk size is: it is what disks write whole, and the index's density
/// does not depend on how much data a chunk holds.
pub const META_BLOCK_BYTES: u64 = 4096;

/// The chunk size as its base-2 logarithm in bytes: 9 (512 bytes) to 20 (1 MiB).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkShift(u8);

impl ChunkShift {
    /// 512 bytes.
    pub const MIN: ChunkShift = ChunkShift(9);
    /// 1 MiB.
    pub const MAX: ChunkShift = ChunkShift(20);

    /// The shift itself, if it is in range.
    #[must_use]
    pub fn new(shift: u8) -> Option<ChunkShift> {
        (Self::MIN.0..=Self::MAX.0)
            .contains(&shift)
            .then_some(ChunkShift(shift))
    }

    /// The shift of a chunk of `bytes`, if that is a power of two in range.
    #[must_use]
    pub fn from_bytes(bytes: u64) -> Option<ChunkShift> {
        bytes
            .is_power_of_two()
            .then(|| bytes.trailing_zeros() as u8)
            .and_then(Self::new)
    }

    /// log2 of the chunk size in bytes.
    #[must_use]
    pub fn get(self) -> u8 {
        self.0
    }

    /// Chunk size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        1 << self.0
    }

    /// Chunk size in sectors.
    #[must_use]
    pub fn sectors(self) -> u64 {
        self.bytes() / SECTOR_BYTES
    }
}

/// Neighbouring chunks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ChunkRun {
    /// The first of them.
    pub first: Chunk,
    /// How many, at least 1.
    pub chunks: u64,
}

impl Sectors {
    /// The longest device there can be: 2^63 bytes.
    pub const MAX: Sectors = Sectors(1 << 54);

    /// The whole sectors of so many bytes.
    #[must_use]
    pub fn in_bytes(bytes: u64) -> Sectors {
        Sectors(bytes / SECTOR_BYTES)
    }

    /// So many whole chunks, if that is not longer than [`MAX`](Self::MAX).
    #[must_use]
    pub fn of_chunks(chunks: u64, shift: ChunkShift) -> Option<Sectors> {
        let sectors = chunks.checked_mul(shift.sectors()).map(Sectors);
        sectors.filter(|&sectors| sectors <= Sectors::MAX)
    }

    /// The length in bytes, of one that is at most [`MAX`](Self::MAX).
    #[must_use]
    pub fn to_bytes(self) -> u64 {
        self.0 * SECTOR_BYTES
    }

    /// How many chunks it takes; the last may be short.
    #[must_use]
    pub fn to_chunks(self, shift: ChunkShift) -> u64 {
        self.0.div_ceil(shift.sectors())
    }

    /// How many whole chunks it has: the number of the short one, if there is a short one.
    #[must_use]
    pub fn to_whole_chunks(self, shift: ChunkShift) -> u64 {
        self.0 / shift.sectors()
    }

    /// How many sectors of this chunk it has: 0 behind the end, fewer than the others for the last.
    #[must_use]
    pub fn in_chunk(self, chunk: Chunk, shift: ChunkShift) -> Sectors {
        let before = chunk.0.saturating_mul(shift.sectors());
        Sectors(self.0.saturating_sub(before).min(shift.sectors()))
    }
}

impl From<Chunk> for ChunkRun {
    /// A single chunk.
    fn from(first: Chunk) -> ChunkRun {
        ChunkRun { first, chunks: 1 }
    }
}

impl ChunkRun {
    /// Its chunks, ascending. They have numbers: a run does not reach beyond the last that there is.
    pub fn iter(self) -> impl Iterator<Item = Chunk> {
        (0..self.chunks).map(move |index| Chunk(self.first.0 + index))
    }

    /// How many bytes of it a device of this length has.
    #[must_use]
    pub fn bytes_within(self, length: Sectors, shift: ChunkShift) -> u64 {
        let first = length.to_bytes().min(self.first.to_offset(shift));
        let bytes = length.to_bytes() - first;
        bytes.min(self.chunks << shift.get())
    }
}

impl Chunk {
    /// Byte offset of this chunk on the origin.
    #[must_use]
    pub fn to_offset(self, shift: ChunkShift) -> u64 {
        self.0 << shift.get()
    }
}

impl StoreChunk {
    /// Byte offset of this chunk on the snapshot store device.
    #[must_use]
    pub fn to_offset(self, shift: ChunkShift) -> u64 {
        self.0 << shift.get()
    }
}

impl MetaBlock {
    /// Byte offset of this block on the metadata device.
    #[must_use]
    pub fn to_offset(self) -> u64 {
        self.0 * META_BLOCK_BYTES
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_chunk_of_a_length_may_be_short() {
        let shift = ChunkShift::new(12).unwrap();
        let chunks = |sectors| {
            let length = Sectors(sectors);
            (length.to_chunks(shift), length.to_whole_chunks(shift))
        };
        assert_eq!(
            [0, 1, 7, 8, 9].map(chunks),
            [(0, 0), (1, 0), (1, 0), (1, 1), (2, 1)]
        );
        let of_nine = [0, 1, 2, u64::MAX].map(|at| Sectors(9).in_chunk(Chunk(at), shift).0);
        assert_eq!(of_nine, [8, 1, 0, 0]);
        assert_eq!(Sectors::of_chunks(2, shift), Some(Sectors(16)));
        assert_eq!(Sectors::of_chunks(1 << 54, shift), None);
        assert_eq!(Sectors::in_bytes(1535), Sectors(2));
        let within = |first, chunks| {
            let first = Chunk(first);
            ChunkRun { first, chunks }.bytes_within(Sectors(9), shift)
        };
        assert_eq!(
            [within(0, 1), within(0, 2), within(1, 5), within(2, 1)],
            [4096, 4608, 512, 0]
        );
    }

    #[test]
    fn chunk_sizes_are_powers_of_two_from_512_to_1_mib() {
        assert_eq!(ChunkShift::from_bytes(512), Some(ChunkShift::MIN));
        assert_eq!(ChunkShift::from_bytes(1 << 20), Some(ChunkShift::MAX));
        for bad in [0, 1, 256, 513, 3 << 12, 1 << 21] {
            assert_eq!(ChunkShift::from_bytes(bad), None, "{bad}");
        }
    }
}
