// SPDX-License-Identifier: GPL-2.0-only
//! The header every metadata block opens with, and the check that makes bytes a [`Block`].

use std::rc::Rc;

use super::{
    BLOCK_LEN, FormatError, bound, expect, get_u16, get_u32, get_u64, put_u16, put_u32, put_u64,
};
use crate::units::MetaBlock;

const MAGIC_AT: usize = 0;
const CRC_AT: usize = MAGIC_AT + 4;
const BLOCK_AT: usize = CRC_AT + 4;
const GENERATION_AT: usize = BLOCK_AT + 8;
const UUID_AT: usize = GENERATION_AT + 8;
const KIND_AT: usize = UUID_AT + 8;
const LEVEL_AT: usize = KIND_AT + 1;
const COUNT_AT: usize = LEVEL_AT + 1;
const USED_AT: usize = COUNT_AT + 2;
const ZERO_AT: usize = USED_AT + 2;
const AUX_AT: usize = ZERO_AT + 2;
const RESERVED_AT: usize = AUX_AT + 8;

/// Bytes of the header; the payload follows.
pub const HEADER_LEN: usize = 64;
/// Bytes a block has for its payload.
pub const PAYLOAD_LEN: usize = BLOCK_LEN - HEADER_LEN;
/// The highest level of an index node: a leaf is 0. Ten levels of 100 hold more than 2^64 entries.
pub const MAX_LEVEL: u8 = 10;

const MAGIC: u32 = u32::from_le_bytes(*b"dsBk");
const WHAT: &str = "metadata block";

/// What a metadata block holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A node of the tree of exceptions.
    Exceptions = 1,
    /// A node of the tree of overlays.
    Overlays = 2,
    /// A node of the tree of bitmap blocks.
    Space = 3,
    /// A bitmap of used data chunks.
    Bitmap = 4,
    /// A part of the snapshot table.
    Snapshots = 5,
}

/// Where a block lies and the checksum its content has: a block that was never written, or is an
/// older version of itself, does not fit its pointer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pointer {
    /// Its place on the metadata device.
    pub block: MetaBlock,
    /// The checksum in its header.
    pub crc: u32,
}

/// What the reader of a block already knows about it.
#[derive(Clone, Copy, Debug)]
pub struct Expected {
    /// From the block that refers to it.
    pub pointer: Pointer,
    /// Generation of the superblock: no block is newer.
    pub newest_generation: u64,
    /// See [`super::uuid_part`].
    pub uuid_part: u64,
    /// From the block that refers to it.
    pub kind: Kind,
    /// From the block that refers to it.
    pub level: u8,
}

/// A block that passed its check: cheap to clone, never changed.
///
/// Its bytes are not aligned for direct I/O: many blocks stay in the cache, and the allocator would give
/// each aligned one twice its size.
#[derive(Clone, Debug)]
pub struct Block(Rc<[u8]>);

impl Block {
    /// Checks the header of 4096 bytes read from a device against what their reader expects.
    ///
    /// # Errors
    /// The first field that does not fit, in the order in which a doubt about an earlier one makes
    /// the later ones meaningless.
    pub fn check(bytes: &[u8], expected: &Expected) -> Result<Block, FormatError> {
        expect(WHAT, "length", bytes.len() as u64, BLOCK_LEN as u64)?;
        expect(WHAT, "magic", get_u32(bytes, MAGIC_AT).into(), MAGIC.into())?;
        expect(
            WHAT,
            "checksum of the content",
            checksum(bytes).into(),
            get_u32(bytes, CRC_AT).into(),
        )?;
        expect(
            WHAT,
            "block number",
            get_u64(bytes, BLOCK_AT),
            expected.pointer.block.0,
        )?;
        expect(
            WHAT,
            "store uuid",
            get_u64(bytes, UUID_AT),
            expected.uuid_part,
        )?;
        expect(
            WHAT,
            "checksum",
            get_u32(bytes, CRC_AT).into(),
            expected.pointer.crc.into(),
        )?;
        bound(
            WHAT,
            "generation",
            get_u64(bytes, GENERATION_AT),
            1,
            expected.newest_generation,
        )?;
        expect(WHAT, "kind", bytes[KIND_AT].into(), expected.kind as u64)?;
        expect(WHAT, "level", bytes[LEVEL_AT].into(), expected.level.into())?;
        bound(WHAT, "level", bytes[LEVEL_AT].into(), 0, MAX_LEVEL.into())?;
        bound(
            WHAT,
            "used bytes",
            get_u16(bytes, USED_AT).into(),
            0,
            PAYLOAD_LEN as u64,
        )?;
        Ok(Block(bytes.into()))
    }

    /// Entries in the payload; their bound depends on the kind.
    #[must_use]
    pub fn count(&self) -> usize {
        get_u16(&self.0, COUNT_AT).into()
    }

    /// 0 for a leaf.
    #[must_use]
    pub fn level(&self) -> u8 {
        self.0[LEVEL_AT]
    }

    /// A number whose meaning depends on the kind.
    #[must_use]
    pub fn aux(&self) -> u64 {
        get_u64(&self.0, AUX_AT)
    }

    /// Generation of the checkpoint that wrote the block.
    #[must_use]
    pub fn generation(&self) -> u64 {
        get_u64(&self.0, GENERATION_AT)
    }

    /// The used part of the payload.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        let used = usize::from(get_u16(&self.0, USED_AT));
        &self.0[HEADER_LEN..HEADER_LEN + used]
    }

    /// The whole block, as it lies on the device; not aligned.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// A block being built: the payload is filled in first, [`seal`](Self::seal) makes it a [`Block`].
#[derive(Debug)]
pub struct BlockBuilder(Vec<u8>);

/// What [`BlockBuilder::seal`] writes into the header.
#[derive(Clone, Copy, Debug)]
pub struct Seal {
    /// Where the block will be written.
    pub block: MetaBlock,
    /// Generation of the superblock that will refer to it.
    pub generation: u64,
    /// See [`super::uuid_part`].
    pub uuid_part: u64,
    /// What it holds.
    pub kind: Kind,
    /// 0 for leaves and for all that is no index node.
    pub level: u8,
    /// Entries in the payload.
    pub count: u16,
    /// Bytes of the payload in use.
    pub used: u16,
    /// See [`Block::aux`].
    pub aux: u64,
}

impl Default for BlockBuilder {
    fn default() -> Self {
        Self::new()
    }
}

impl BlockBuilder {
    /// A block of zeros.
    #[must_use]
    pub fn new() -> Self {
        BlockBuilder(vec![0; BLOCK_LEN])
    }

    /// All of the payload.
    pub fn payload_mut(&mut self) -> &mut [u8] {
        &mut self.0[HEADER_LEN..]
    }

    /// Fills in the header. The checksum covers all that follows it.
    #[must_use]
    pub fn seal(mut self, seal: &Seal) -> (Pointer, Block) {
        let bytes = &mut self.0;
        put_u32(bytes, MAGIC_AT, MAGIC);
        put_u64(bytes, BLOCK_AT, seal.block.0);
        put_u64(bytes, GENERATION_AT, seal.generation);
        put_u64(bytes, UUID_AT, seal.uuid_part);
        bytes[KIND_AT] = seal.kind as u8;
        bytes[LEVEL_AT] = seal.level;
        put_u16(bytes, COUNT_AT, seal.count);
        put_u16(bytes, USED_AT, seal.used);
        put_u16(bytes, ZERO_AT, 0);
        put_u64(bytes, AUX_AT, seal.aux);
        bytes[RESERVED_AT..HEADER_LEN].fill(0);
        let crc = checksum(bytes);
        put_u32(bytes, CRC_AT, crc);
        (
            Pointer {
                block: seal.block,
                crc,
            },
            Block(self.0.into()),
        )
    }
}

fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c(&bytes[BLOCK_AT..])
}
