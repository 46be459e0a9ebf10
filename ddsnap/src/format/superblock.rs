// SPDX-License-Identifier: GPL-2.0-only
//! The superblock, in two copies: all that must be known to find everything else.
//!
//! The copy with the higher generation that passes its check is the store. Both are written, one
//! after the other with a flush behind each, whenever the store's roots change.

use std::ops::Range;

use super::block::{MAX_LEVEL, Pointer};
use super::origin::{self, OriginRecord};
use super::{
    BLOCK_LEN, FormatError, Lengths, VERSION, Version, bound, expect, get_u32, get_u64, put_u32,
    put_u64, snaptable, uuid_part,
};
use crate::buffer::AlignedBuf;
use crate::units::{Chunk, ChunkShift, MetaBlock, Sectors, SnapSeq, StoreChunk};

/// Where the two copies lie on the metadata device, in blocks: bytes 0 and 65536.
pub const COPIES: [MetaBlock; 2] = [MetaBlock(0), MetaBlock(16)];
/// The first block behind both copies: byte 131072.
pub const FIRST_FREE: MetaBlock = MetaBlock(32);
/// The most pieces the metadata region may have after it was resized.
pub const MAX_EXTENTS: usize = 32;
/// The least journal: 64 KiB.
pub const MIN_JOURNAL_BLOCKS: u64 = 16;
/// The most journal: 1 GiB.
pub const MAX_JOURNAL_BLOCKS: u64 = 1 << 18;
/// No device is longer than 2^63 bytes, so no block number is greater.
pub const MAX_BLOCK: u64 = 1 << 51;
/// No chunk number is greater than a device of 2^63 bytes has at 512 bytes a chunk.
pub const MAX_CHUNK: u64 = 1 << 54;

const MAGIC_AT: usize = 0;
const VERSION_AT: usize = MAGIC_AT + 8;
const CRC_AT: usize = VERSION_AT + 4;
const UUID_AT: usize = CRC_AT + 4;
const COPY_AT: usize = UUID_AT + 16;
const CHUNK_SHIFT_AT: usize = COPY_AT + 4;
const FLAGS_AT: usize = CHUNK_SHIFT_AT + 4;
const GENERATION_AT: usize = FLAGS_AT + 8;
const CREATED_AT: usize = GENERATION_AT + 8;
const ORIGIN_AT: usize = CREATED_AT + 8;
const DATA_FIRST_AT: usize = ORIGIN_AT + 8;
const DATA_END_AT: usize = DATA_FIRST_AT + 8;
const DATA_USED_AT: usize = DATA_END_AT + 8;
const JOURNAL_FIRST_AT: usize = DATA_USED_AT + 8;
const JOURNAL_BLOCKS_AT: usize = JOURNAL_FIRST_AT + 8;
const EPOCH_AT: usize = JOURNAL_BLOCKS_AT + 8;
const TAIL_AT: usize = EPOCH_AT + 8;
const TAIL_SEQUENCE_AT: usize = TAIL_AT + 8;
const NEXT_SEQ_AT: usize = TAIL_SEQUENCE_AT + 8;
const SNAPSHOTS_AT: usize = NEXT_SEQ_AT + 8; // block, crc, count
const TREES_AT: usize = SNAPSHOTS_AT + 16;
const TREE_LEN: usize = 40; // block, crc, level, newest, entries, nodes
const EXTENT_COUNT_AT: usize = TREES_AT + 3 * TREE_LEN;
const EXTENTS_AT: usize = EXTENT_COUNT_AT + 8;
const END: usize = EXTENTS_AT + MAX_EXTENTS * 16;
const REVERT_SEQ_AT: usize = END; // the rest of this only with its flag
const REVERT_NEXT_AT: usize = REVERT_SEQ_AT + 8;
const RECORD_AT: usize = 1024; // with its flag
const RECORD_END: usize = RECORD_AT + origin::LEN;

const FLAG_CLEAN: u64 = 1;
const FLAG_SEPARATE_META: u64 = 2;
const FLAG_REVERT: u64 = 4;
const FLAG_ORIGIN: u64 = 8;
const FLAG_BOOKMARKS: u64 = 16;
const FLAGS_KNOWN: u64 =
    FLAG_CLEAN | FLAG_SEPARATE_META | FLAG_REVERT | FLAG_ORIGIN | FLAG_BOOKMARKS;

/// Opens a superblock: "ddsnapSB".
pub const MAGIC: u64 = u64::from_le_bytes(*b"ddsnapSB");
const WHAT: &str = "superblock";

/// The root of one of the trees.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TreeRoot {
    /// The root node with its level and the newest sequence below; none if the tree is empty.
    pub root: Option<(Pointer, u8, u64)>,
    /// Entries in all leaves.
    pub entries: u64,
    /// Nodes of all levels.
    pub nodes: u64,
}

/// A piece of the metadata region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Its first block.
    pub first: MetaBlock,
    /// Its length in blocks, not 0.
    pub blocks: u64,
}

impl Extent {
    /// The first block behind it.
    #[must_use]
    pub fn end(&self) -> MetaBlock {
        MetaBlock(self.first.0 + self.blocks)
    }

    /// Whether a block lies in it.
    #[must_use]
    pub fn contains(&self, block: MetaBlock) -> bool {
        (self.first..self.end()).contains(&block)
    }
}

/// A revert of the origin under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Revert {
    /// The snapshot whose content the origin takes.
    pub seq: SnapSeq,
    /// The first chunk that may not have been dealt with.
    pub next: Chunk,
}

/// A checked superblock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Superblock {
    /// As it was read: it says how snapshot table and journal are to be read. The newest is written.
    pub version: Version,
    /// Made at initialise; every block of the store carries a part of it.
    pub uuid: [u8; 16],
    /// Chunk size.
    pub chunk: ChunkShift,
    /// Whether the store was closed in order.
    pub clean: bool,
    /// Whether metadata has a device of its own.
    pub separate_meta: bool,
    /// Whether there are, or were, bookmarks: a program that knows none must not open it.
    pub bookmarks: bool,
    /// Grows with every write of the superblock.
    pub generation: u64,
    /// Seconds since 1970-01-01 UTC at initialise.
    pub created: i64,
    /// Length of the origin.
    pub origin: Sectors,
    /// First chunk of the data region.
    pub data_first: StoreChunk,
    /// First chunk behind the data region.
    pub data_end: StoreChunk,
    /// Used chunks of the data region.
    pub data_used: u64,
    /// First block of the journal ring.
    pub journal_first: MetaBlock,
    /// Length of the ring in blocks.
    pub journal_blocks: u64,
    /// Epoch of the records to replay.
    pub epoch: u64,
    /// Where the first record to replay begins, in blocks from the start of the ring.
    pub tail: u64,
    /// Its sequence.
    pub tail_sequence: u64,
    /// The sequence number the next snapshot gets.
    pub next_seq: SnapSeq,
    /// A revert under way.
    pub revert: Option<Revert>,
    /// First block of the snapshot table.
    pub snapshots: Option<Pointer>,
    /// Entries in the snapshot table.
    pub snapshot_count: u32,
    /// Root of the exceptions.
    pub exceptions: TreeRoot,
    /// Root of the overlays.
    pub overlays: TreeRoot,
    /// Root of the bitmap blocks.
    pub space: TreeRoot,
    /// The metadata region: 1 to [`MAX_EXTENTS`] pieces, in order, apart.
    pub extents: Vec<Extent>,
    /// What is known of the origin; none before the store was first opened.
    pub origin_record: Option<OriginRecord>,
}

impl Superblock {
    /// The block of copy `copy` (0 or 1), in the newest version.
    #[must_use]
    pub fn encode(&self, copy: u32) -> AlignedBuf {
        let mut bytes = AlignedBuf::zeroed(BLOCK_LEN);
        let b = &mut bytes[..];
        put_u64(b, MAGIC_AT, MAGIC);
        put_u32(b, VERSION_AT, VERSION);
        b[UUID_AT..UUID_AT + 16].copy_from_slice(&self.uuid);
        put_u32(b, COPY_AT, copy);
        put_u32(b, CHUNK_SHIFT_AT, self.chunk.get().into());
        let clean = if self.clean { FLAG_CLEAN } else { 0 };
        let separate = if self.separate_meta {
            FLAG_SEPARATE_META
        } else {
            0
        };
        let reverting = if self.revert.is_some() {
            FLAG_REVERT
        } else {
            0
        };
        let known = if self.origin_record.is_some() {
            FLAG_ORIGIN
        } else {
            0
        };
        let bookmarks = if self.bookmarks { FLAG_BOOKMARKS } else { 0 };
        let flags = clean | separate | reverting | known | bookmarks;
        put_u64(b, FLAGS_AT, flags);
        if let Some(record) = &self.origin_record {
            record.encode(&mut b[RECORD_AT..RECORD_END]);
        }
        if let Some(revert) = self.revert {
            put_u64(b, REVERT_SEQ_AT, revert.seq.0);
            put_u64(b, REVERT_NEXT_AT, revert.next.0);
        }
        put_u64(b, GENERATION_AT, self.generation);
        put_u64(b, CREATED_AT, self.created as u64);
        put_u64(b, ORIGIN_AT, self.origin.0);
        put_u64(b, DATA_FIRST_AT, self.data_first.0);
        put_u64(b, DATA_END_AT, self.data_end.0);
        put_u64(b, DATA_USED_AT, self.data_used);
        put_u64(b, JOURNAL_FIRST_AT, self.journal_first.0);
        put_u64(b, JOURNAL_BLOCKS_AT, self.journal_blocks);
        put_u64(b, EPOCH_AT, self.epoch);
        put_u64(b, TAIL_AT, self.tail);
        put_u64(b, TAIL_SEQUENCE_AT, self.tail_sequence);
        put_u64(b, NEXT_SEQ_AT, self.next_seq.0);
        if let Some(pointer) = self.snapshots {
            put_u64(b, SNAPSHOTS_AT, pointer.block.0);
            put_u32(b, SNAPSHOTS_AT + 8, pointer.crc);
            put_u32(b, SNAPSHOTS_AT + 12, self.snapshot_count);
        }
        for (i, tree) in [&self.exceptions, &self.overlays, &self.space]
            .into_iter()
            .enumerate()
        {
            encode_tree(tree, &mut b[TREES_AT + i * TREE_LEN..][..TREE_LEN]);
        }
        put_u64(b, EXTENT_COUNT_AT, self.extents.len() as u64);
        for (extent, at) in self
            .extents
            .iter()
            .zip(b[EXTENTS_AT..END].chunks_exact_mut(16))
        {
            put_u64(at, 0, extent.first.0);
            put_u64(at, 8, extent.blocks);
        }
        let crc = checksum(b);
        put_u32(b, CRC_AT, crc);
        bytes
    }

    /// Checks the bytes read from the place of copy `copy`.
    ///
    /// # Errors
    /// The first of magic, checksum, version, copy number, flags and bounds that is wrong.
    pub fn decode(b: &[u8], copy: u32) -> Result<Self, FormatError> {
        expect(WHAT, "length", b.len() as u64, BLOCK_LEN as u64)?;
        expect(WHAT, "magic", get_u64(b, MAGIC_AT), MAGIC)?;
        expect(
            WHAT,
            "checksum",
            checksum(b).into(),
            get_u32(b, CRC_AT).into(),
        )?;
        let version = Version::new(WHAT, get_u32(b, VERSION_AT))?;
        expect(WHAT, "copy number", get_u32(b, COPY_AT).into(), copy.into())?;
        let flags = get_u64(b, FLAGS_AT);
        expect(WHAT, "unknown flags", flags & !FLAGS_KNOWN, 0)?;
        let shift = get_u32(b, CHUNK_SHIFT_AT);
        bound(
            WHAT,
            "chunk size (log2)",
            shift.into(),
            ChunkShift::MIN.get().into(),
            ChunkShift::MAX.get().into(),
        )?;
        let chunk = ChunkShift::new(shift as u8).ok_or(FormatError::Malformed {
            what: WHAT,
            problem: "the chunk size is out of range",
        })?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&b[UUID_AT..UUID_AT + 16]);
        let snapshot_count = get_u32(b, SNAPSHOTS_AT + 12);
        bound(
            WHAT,
            "snapshot count",
            snapshot_count.into(),
            0,
            snaptable::MAX_ENTRIES as u64,
        )?;
        let snapshots = (snapshot_count > 0).then(|| Pointer {
            block: MetaBlock(get_u64(b, SNAPSHOTS_AT)),
            crc: get_u32(b, SNAPSHOTS_AT + 8),
        });
        let lengths = Lengths { version, chunk };
        let tree = |i: usize| decode_tree(&b[TREES_AT + i * TREE_LEN..][..TREE_LEN]);
        let superblock = Superblock {
            version,
            uuid,
            chunk,
            clean: flags & FLAG_CLEAN != 0,
            separate_meta: flags & FLAG_SEPARATE_META != 0,
            bookmarks: flags & FLAG_BOOKMARKS != 0,
            generation: get_u64(b, GENERATION_AT),
            created: get_u64(b, CREATED_AT) as i64,
            origin: lengths.decode(WHAT, get_u64(b, ORIGIN_AT))?,
            data_first: StoreChunk(get_u64(b, DATA_FIRST_AT)),
            data_end: StoreChunk(get_u64(b, DATA_END_AT)),
            data_used: get_u64(b, DATA_USED_AT),
            journal_first: MetaBlock(get_u64(b, JOURNAL_FIRST_AT)),
            journal_blocks: get_u64(b, JOURNAL_BLOCKS_AT),
            epoch: get_u64(b, EPOCH_AT),
            tail: get_u64(b, TAIL_AT),
            tail_sequence: get_u64(b, TAIL_SEQUENCE_AT),
            next_seq: SnapSeq(get_u64(b, NEXT_SEQ_AT)),
            revert: (flags & FLAG_REVERT != 0).then(|| Revert {
                seq: SnapSeq(get_u64(b, REVERT_SEQ_AT)),
                next: Chunk(get_u64(b, REVERT_NEXT_AT)),
            }),
            snapshots,
            snapshot_count,
            exceptions: tree(0)?,
            overlays: tree(1)?,
            space: tree(2)?,
            extents: decode_extents(b)?,
            origin_record: (flags & FLAG_ORIGIN != 0)
                .then(|| OriginRecord::decode(&b[RECORD_AT..RECORD_END]))
                .transpose()?,
        };
        superblock.check_bounds()?;
        Ok(superblock)
    }

    fn check_bounds(&self) -> Result<(), FormatError> {
        bound(WHAT, "generation", self.generation, 1, u64::MAX - 1)?;
        bound(
            WHAT,
            "end of the data region",
            self.data_end.0,
            1,
            MAX_CHUNK,
        )?;
        bound(
            WHAT,
            "start of the data region",
            self.data_first.0,
            1,
            self.data_end.0,
        )?;
        bound(
            WHAT,
            "journal length",
            self.journal_blocks,
            MIN_JOURNAL_BLOCKS,
            MAX_JOURNAL_BLOCKS,
        )?;
        bound(
            WHAT,
            "journal start",
            self.journal_first.0,
            FIRST_FREE.0,
            MAX_BLOCK,
        )?;
        bound(WHAT, "journal tail", self.tail, 0, self.journal_blocks - 1)?;
        bound(WHAT, "journal epoch", self.epoch, 1, u64::MAX - 1)?;
        bound(
            WHAT,
            "journal sequence",
            self.tail_sequence,
            1,
            u64::MAX - 1,
        )?;
        bound(
            WHAT,
            "next snapshot sequence",
            self.next_seq.0,
            1,
            u64::MAX - 1,
        )?;
        let journal = Extent {
            first: self.journal_first,
            blocks: self.journal_blocks,
        };
        let overlaps = |a: &Extent, b: &Extent| {
            a.first.0 < b.first.0 + b.blocks && b.first.0 < a.first.0 + a.blocks
        };
        if self.extents.iter().any(|extent| overlaps(extent, &journal)) {
            return Err(FormatError::Malformed {
                what: WHAT,
                problem: "journal and metadata region overlap",
            });
        }
        let before_data = |e: &Extent| e.end().to_offset() <= self.data_first.to_offset(self.chunk);
        // A combined store grows by further extents, which take whole chunks of the data region.
        let hole = |e: &Extent| {
            let (start, end) = (e.first.to_offset(), e.end().to_offset());
            start >= self.data_first.to_offset(self.chunk)
                && end <= self.data_end.to_offset(self.chunk)
                && [start, end].iter().all(|at| at % self.chunk.bytes() == 0)
        };
        let apart = self.extents.iter().all(|e| before_data(e) || hole(e)) && before_data(&journal);
        if !self.separate_meta && !apart {
            return Err(FormatError::Malformed {
                what: WHAT,
                problem: "metadata and data region overlap",
            });
        }
        let holes: u64 = self.holes().map(|hole| hole.end - hole.start).sum();
        let data_chunks = self.data_end.0 - self.data_first.0 - holes;
        bound(WHAT, "used chunks", self.data_used, 0, data_chunks)
    }

    /// Chunks of the data region that hold metadata instead: those of extents that a combined store
    /// got when it grew. Ascending, apart.
    pub fn holes(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let shift = self.chunk.get();
        let inside = |extent: &&Extent| {
            !self.separate_meta && extent.first.to_offset() >= self.data_first.to_offset(self.chunk)
        };
        self.extents
            .iter()
            .filter(inside)
            .map(move |e| e.first.to_offset() >> shift..e.end().to_offset() >> shift)
    }

    /// How the store's other lengths are written.
    #[must_use]
    pub fn lengths(&self) -> Lengths {
        Lengths {
            version: self.version,
            chunk: self.chunk,
        }
    }

    /// See [`super::uuid_part`].
    #[must_use]
    pub fn uuid_part(&self) -> u64 {
        uuid_part(&self.uuid)
    }
}

fn encode_tree(tree: &TreeRoot, at: &mut [u8]) {
    if let Some((pointer, level, newest)) = tree.root {
        put_u64(at, 0, pointer.block.0);
        put_u32(at, 8, pointer.crc);
        put_u32(at, 12, level.into());
        put_u64(at, 16, newest);
        put_u64(at, 24, tree.entries);
        put_u64(at, 32, tree.nodes);
    }
}

fn decode_tree(at: &[u8]) -> Result<TreeRoot, FormatError> {
    let block = get_u64(at, 0);
    if block == 0 {
        expect(WHAT, "entries of an empty tree", get_u64(at, 24), 0)?;
        return Ok(TreeRoot::default());
    }
    bound(WHAT, "tree root", block, FIRST_FREE.0, MAX_BLOCK)?;
    bound(
        WHAT,
        "tree level",
        get_u32(at, 12).into(),
        0,
        MAX_LEVEL.into(),
    )?;
    let pointer = Pointer {
        block: MetaBlock(block),
        crc: get_u32(at, 8),
    };
    let root = Some((pointer, get_u32(at, 12) as u8, get_u64(at, 16)));
    Ok(TreeRoot {
        root,
        entries: get_u64(at, 24),
        nodes: get_u64(at, 32),
    })
}

fn decode_extents(b: &[u8]) -> Result<Vec<Extent>, FormatError> {
    let count = get_u64(b, EXTENT_COUNT_AT);
    bound(WHAT, "metadata extents", count, 1, MAX_EXTENTS as u64)?;
    let mut end = FIRST_FREE.0;
    let mut extents = Vec::with_capacity(count as usize);
    for at in b[EXTENTS_AT..END].chunks_exact(16).take(count as usize) {
        let extent = Extent {
            first: MetaBlock(get_u64(at, 0)),
            blocks: get_u64(at, 8),
        };
        bound(
            WHAT,
            "start of a metadata extent",
            extent.first.0,
            end,
            MAX_BLOCK,
        )?;
        bound(
            WHAT,
            "length of a metadata extent",
            extent.blocks,
            1,
            MAX_BLOCK,
        )?;
        end = extent.first.0 + extent.blocks;
        extents.push(extent);
    }
    Ok(extents)
}

/// Over the whole block but for the checksum itself.
fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&bytes[..CRC_AT]), &bytes[UUID_AT..])
}
