// SPDX-License-Identifier: GPL-2.0-only
//! The label of a data device whose metadata lies elsewhere, so that a device of another store, or
//! of none, is refused before anything is written to it.

use super::{BLOCK_LEN, FormatError, VERSION, Version, expect, get_u32, get_u64, put_u32, put_u64};
use crate::buffer::AlignedBuf;
use crate::units::ChunkShift;

const MAGIC_AT: usize = 0;
const VERSION_AT: usize = MAGIC_AT + 8;
const CRC_AT: usize = VERSION_AT + 4;
const UUID_AT: usize = CRC_AT + 4;
const CHUNK_SHIFT_AT: usize = UUID_AT + 16;

/// Opens a label: "ddsnapDL".
pub const MAGIC: u64 = u64::from_le_bytes(*b"ddsnapDL");
const WHAT: &str = "label of the data device";

/// A checked label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Label {
    /// The store the device belongs to.
    pub uuid: [u8; 16],
    /// The store's chunk size.
    pub chunk: ChunkShift,
}

impl Label {
    /// The label's block.
    #[must_use]
    pub fn encode(&self) -> AlignedBuf {
        let mut bytes = AlignedBuf::zeroed(BLOCK_LEN);
        put_u64(&mut bytes, MAGIC_AT, MAGIC);
        put_u32(&mut bytes, VERSION_AT, VERSION);
        bytes[UUID_AT..UUID_AT + 16].copy_from_slice(&self.uuid);
        bytes[CHUNK_SHIFT_AT] = self.chunk.get();
        let crc = checksum(&bytes);
        put_u32(&mut bytes, CRC_AT, crc);
        bytes
    }

    /// Checks the first block of a data device.
    ///
    /// # Errors
    /// Magic, checksum, version or chunk size is wrong.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        expect(WHAT, "length", bytes.len() as u64, BLOCK_LEN as u64)?;
        expect(WHAT, "magic", get_u64(bytes, MAGIC_AT), MAGIC)?;
        expect(
            WHAT,
            "checksum",
            checksum(bytes).into(),
            get_u32(bytes, CRC_AT).into(),
        )?;
        // It is the same in all versions known.
        Version::new(WHAT, get_u32(bytes, VERSION_AT))?;
        let shift = bytes[CHUNK_SHIFT_AT];
        let chunk = ChunkShift::new(shift).ok_or(FormatError::Range {
            what: WHAT,
            field: "chunk size (log2)",
            found: shift.into(),
            least: ChunkShift::MIN.get().into(),
            most: ChunkShift::MAX.get().into(),
        })?;
        let mut uuid = [0; 16];
        uuid.copy_from_slice(&bytes[UUID_AT..UUID_AT + 16]);
        Ok(Label { uuid, chunk })
    }
}

/// Over the whole block but for the checksum itself.
fn checksum(bytes: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&bytes[..CRC_AT]), &bytes[UUID_AT..])
}
