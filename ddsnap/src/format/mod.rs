// SPDX-License-Identifier: GPL-2.0-only
//! Disk bytes to values and back. FORMAT.md has the byte tables; golden tests pin them.
//!
//! Nothing here does I/O and nothing here trusts its input: every length, count and depth is
//! bounded before it is used, so bytes from a foreign or damaged device end in a [`FormatError`],
//! never in a panic. Bytes that passed the checks have types of their own ([`block::Block`],
//! [`superblock::Superblock`], ...), so unchecked bytes cannot be used by mistake.

pub mod bitmap;
pub mod block;
pub mod journal;
pub mod label;
pub mod node;
pub mod origin;
pub mod snaptable;
pub mod superblock;
pub mod varint;

use crate::units::{ChunkShift, META_BLOCK_BYTES, Sectors};

/// The version that is written: 2.
pub const VERSION: u32 = 2;

/// A version that is read.
///
/// The two differ in the unit of lengths of the origin, in superblock, snapshot table and journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// Whole chunks.
    V1,
    /// Sectors.
    V2,
}

impl Version {
    /// The version of this number, of a structure that `what` names.
    ///
    /// # Errors
    /// It is not known here.
    pub fn new(what: &'static str, found: u32) -> Result<Version, FormatError> {
        match found {
            1 => Ok(Version::V1),
            VERSION => Ok(Version::V2),
            _ => Err(FormatError::Version { what, found }),
        }
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u32 {
        match self {
            Version::V1 => 1,
            Version::V2 => VERSION,
        }
    }
}

/// How a store's lengths of the origin are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// Which decides about the unit.
    pub version: Version,
    /// The store's chunk size.
    pub chunk: ChunkShift,
}

impl Lengths {
    /// The length in a field of the structure that `what` names.
    ///
    /// # Errors
    /// No device is that long.
    fn decode(self, what: &'static str, found: u64) -> Result<Sectors, FormatError> {
        let unit = match self.version {
            Version::V1 => self.chunk.sectors(),
            Version::V2 => 1,
        };
        bound(
            what,
            "length of the origin",
            found,
            0,
            Sectors::MAX.0 / unit,
        )?;
        Ok(Sectors(found * unit))
    }
}

/// [`META_BLOCK_BYTES`] as a length in memory.
pub const BLOCK_LEN: usize = META_BLOCK_BYTES as usize;

/// What makes bytes from a device unusable, with what was found and what was wanted.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// A field has not the one value it must have.
    #[error("{what}: {field} is {found:#x}, expected {wanted:#x}")]
    Field {
        /// Which structure.
        what: &'static str,
        /// Which field of it.
        field: &'static str,
        /// Its value.
        found: u64,
        /// The value it must have.
        wanted: u64,
    },
    /// A field is beyond its bound.
    #[error("{what}: {field} is {found}, expected {least} to {most}")]
    Range {
        /// Which structure.
        what: &'static str,
        /// Which field of it.
        field: &'static str,
        /// Its value.
        found: u64,
        /// The least it can be.
        least: u64,
        /// The most it can be.
        most: u64,
    },
    /// The bytes contradict each other.
    #[error("{what}: {problem}")]
    Malformed {
        /// Which structure.
        what: &'static str,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Written by a newer program.
    #[error("{what} has format version {found}, this program knows versions 1 to {VERSION}")]
    Version {
        /// Which structure.
        what: &'static str,
        /// Its version.
        found: u32,
    },
}

/// Errors unless `found` is `wanted`.
pub(crate) fn expect(
    what: &'static str,
    field: &'static str,
    found: u64,
    wanted: u64,
) -> Result<(), FormatError> {
    if found == wanted {
        Ok(())
    } else {
        Err(FormatError::Field {
            what,
            field,
            found,
            wanted,
        })
    }
}

/// Errors unless `found` is in `least..=most`.
pub(crate) fn bound(
    what: &'static str,
    field: &'static str,
    found: u64,
    least: u64,
    most: u64,
) -> Result<(), FormatError> {
    if (least..=most).contains(&found) {
        Ok(())
    } else {
        Err(FormatError::Range {
            what,
            field,
            found,
            least,
            most,
        })
    }
}

/// A field of the on-disk bytes; the offset is a constant of the structure, so a slice that is too
/// short is our own mistake.
pub(crate) fn get_u16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(crate) fn get_u32(bytes: &[u8], at: usize) -> u32 {
    let mut field = [0; 4];
    field.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(field)
}

pub(crate) fn get_u64(bytes: &[u8], at: usize) -> u64 {
    let mut field = [0; 8];
    field.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(field)
}

pub(crate) fn put_u16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

pub(crate) fn put_u64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
}

/// The first half of a store's UUID, which every block carries so that a block of another store,
/// left on a reused device, is not taken for ours.
#[must_use]
pub fn uuid_part(uuid: &[u8; 16]) -> u64 {
    get_u64(uuid, 0)
}
