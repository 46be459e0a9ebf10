// SPDX-License-Identifier: GPL-2.0-only
//! How far a copy has come, or what a complete snapshot's sums are: a small file on either side.
//!
//! The sums go with the position, so that a copy that is resumed need not read again what it has.

use thiserror::Error;
use uuid::Uuid;

use super::sums::Sums;
use super::wire::{Put, Take, WireError};

const MAGIC: [u8; 8] = *b"zumaProg";
/// 1: the first.
const VERSION: u16 = 1;

/// A position in a copy and the sums of what is below it; behind it they are the base's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The snapshot.
    pub snapshot: Uuid,
    /// What it is made from.
    pub base: Option<Uuid>,
    /// All below is accounted for; [`u64::MAX`]: all.
    pub position: u64,
    /// Whether the base's data is not relied on.
    pub plain: bool,
    /// None if they are not known: the base's were not, or its data is missing.
    pub sums: Option<Sums>,
}

/// Why a file is not used.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ProgressError {
    /// Damaged or cut.
    #[error("the record of a copy is damaged: its checksum is wrong")]
    Checksum,
    /// Another file, or of another version.
    #[error("the record of a copy is of version {found}, which this zumastor does not read")]
    Version {
        /// The version found; 0 for no such file.
        found: u16,
    },
    /// Malformed behind a right checksum.
    #[error("the record of a copy is malformed")]
    Wire(#[from] WireError),
}

impl Progress {
    /// As bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut put = Put::default();
        put.raw(&MAGIC).u16(VERSION);
        put.uuid(Some(self.snapshot)).uuid(self.base);
        put.u64(self.position).u8(self.plain.into());
        match &self.sums {
            None => {
                put.u8(0);
            }
            Some(sums) => {
                put.u8(1);
                sums.encode(&mut put);
            }
        }
        let crc = crc32c::crc32c(&put.0);
        put.u32(crc);
        put.0
    }

    /// Back from bytes.
    ///
    /// # Errors
    /// They are damaged, or of another version.
    pub fn decode(bytes: &[u8]) -> Result<Progress, ProgressError> {
        let Some((body, crc)) = bytes.split_last_chunk::<4>() else {
            return Err(ProgressError::Checksum);
        };
        if crc32c::crc32c(body) != u32::from_le_bytes(*crc) {
            return Err(ProgressError::Checksum);
        }
        let mut take = Take::new("the record of a copy", body);
        if take.raw(8)? != MAGIC {
            return Err(ProgressError::Version { found: 0 });
        }
        let found = take.u16()?;
        if found != VERSION {
            return Err(ProgressError::Version { found });
        }
        let progress = Progress {
            snapshot: take.some_uuid("the snapshot")?,
            base: take.uuid()?,
            position: take.u64()?,
            plain: take.flag("the mark of whole chunks")?,
            sums: match take.flag("the mark of sums")? {
                false => None,
                true => Some(Sums::decode(&mut take)?),
            },
        };
        take.end()?;
        Ok(progress)
    }
}

#[cfg(test)]
mod tests {
    use ddsnap::units::ChunkShift;

    use super::*;

    fn progress() -> Progress {
        let mut sums = Sums::new(ChunkShift::MIN);
        sums.replace(3, &[], &[1; 512]);
        Progress {
            snapshot: Uuid::from_u128(1),
            base: Some(Uuid::from_u128(2)),
            position: 99,
            plain: true,
            sums: Some(sums),
        }
    }

    #[test]
    fn records_are_read_as_they_were_written() {
        let mut without = progress();
        without.sums = None;
        without.base = None;
        for progress in [progress(), without] {
            assert_eq!(Progress::decode(&progress.encode()), Ok(progress));
        }
    }

    /// A record damaged on disk would resume at a wrong place, or prove what is not so.
    #[test]
    fn a_damaged_record_is_not_used() {
        let good = progress().encode();
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 4;
            assert!(Progress::decode(&bad).is_err(), "{at}");
            assert!(Progress::decode(&good[..at]).is_err(), "{at}");
        }
    }

    #[test]
    fn the_bytes_of_a_record_are_pinned() {
        assert_eq!(
            &blake3::hash(&progress().encode()).to_hex()[..16],
            "712982f77e55af3c"
        );
    }
}
