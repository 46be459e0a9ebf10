// SPDX-License-Identifier: GPL-2.0-only
//! Why the engine cannot go on, with the place.

use std::io;

use crate::format::FormatError;
use crate::units::{Chunk, StoreChunk};

/// A failure of the store as a whole; what a single request may meet is [`super::OpError`].
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A device failed to read.
    #[error("{device}: cannot read {len} bytes at byte {offset}")]
    Read {
        /// The device.
        device: String,
        /// Where the batch begins, in bytes.
        offset: u64,
        /// Bytes of the batch.
        len: u64,
        /// What the device said.
        source: io::Error,
    },
    /// A device failed to write; the store takes no more changes until it is opened again.
    #[error(
        "{device}: cannot write {len} bytes at byte {offset}; the store is read-only until the server is restarted"
    )]
    Write {
        /// The device.
        device: String,
        /// Where the batch begins, in bytes.
        offset: u64,
        /// Bytes of the batch.
        len: u64,
        /// What the device said.
        source: io::Error,
    },
    /// A device failed to make writes durable; the store takes no more changes.
    #[error("{device}: cannot flush; the store is read-only until the server is restarted")]
    Flush {
        /// The device.
        device: String,
        /// What the device said.
        source: io::Error,
    },
    /// The origin failed to make writes durable, so no snapshot was created. The store goes on.
    #[error("{device}: cannot flush the origin; no snapshot was created")]
    FlushOrigin {
        /// The device.
        device: String,
        /// What the device said.
        source: io::Error,
    },
    /// The origin failed in the middle of a revert, which may be tried again. The store goes on.
    #[error("{device}: cannot write to the origin; the revert is not complete")]
    WriteOrigin {
        /// The device.
        device: String,
        /// What the device said.
        source: io::Error,
    },
    /// The origin was written without this store's server. Nothing was changed.
    #[error(
        "{device}: the origin was written without this store's server: {what}; {} may show newer data as if it were old. If this is the right device, start with --accept-origin (`zumastor start volume NAME --accept-origin`): they are marked as doubtful then, for good",
        count(*.snapshots)
    )]
    Foreign {
        /// The origin.
        device: String,
        /// What tells it.
        what: String,
        /// Live snapshots that were not doubtful before.
        snapshots: usize,
    },
    /// A device does not say how long it is.
    #[error("{device}: cannot find out its length")]
    Measure {
        /// The device.
        device: String,
        /// What the device said.
        source: io::Error,
    },
    /// An earlier failure made the store read-only.
    #[error("the snapshot store is read-only after an error: {0}")]
    Latched(String),
    /// A metadata block is not what it must be.
    #[error("{device}: metadata block {block} is damaged")]
    Damaged {
        /// The device.
        device: String,
        /// The block, of 4096 bytes.
        block: u64,
        /// What is wrong with it.
        source: FormatError,
    },
    /// Valid blocks contradict each other.
    #[error("{device}: the store's metadata is damaged: {problem}")]
    Inconsistent {
        /// The device.
        device: String,
        /// What is wrong.
        problem: String,
    },
    /// A saved chunk is not what was saved.
    #[error(
        "{device}: store chunk {place}, which holds chunk {chunk} of the origin, is damaged: its checksum is {found:#010x}, expected {wanted:#010x}"
    )]
    BadData {
        /// The device.
        device: String,
        /// Which chunk of the origin was saved there.
        chunk: Chunk,
        /// Where it lies.
        place: StoreChunk,
        /// crc32c of what is there.
        found: u32,
        /// crc32c of what was saved.
        wanted: u32,
    },
    /// There is no store here.
    #[error(
        "{device}: no snapshot store here: {problem}; is it the right device? (initialize makes an empty store and destroys what is there)"
    )]
    NoStore {
        /// The device.
        device: String,
        /// What is wrong with either copy of the superblock.
        problem: String,
    },
    /// The devices given do not belong together or to this store.
    #[error("{device}: {problem}")]
    WrongDevice {
        /// The device.
        device: String,
        /// What does not fit, and what to do.
        problem: String,
    },
    /// The journal holds damage where no power cut can leave any.
    #[error("{device}: Journal recovery failed: {problem}")]
    Journal {
        /// The device.
        device: String,
        /// What is wrong, and where.
        problem: String,
    },
    /// The devices are too small, or an option does not fit them.
    #[error("{device}: {problem}")]
    CannotInitialize {
        /// The device.
        device: String,
        /// What does not fit, and what to do.
        problem: String,
    },
    /// What was found could not be reported, so nothing was done about it.
    #[error("a problem could not be reported")]
    Untold,
    /// The metadata region has no free block where the engine had kept some: a bug or damage.
    #[error("{device}: no free metadata block")]
    MetaExhausted {
        /// The device.
        device: String,
    },
}

impl StoreError {
    /// The error and its cause in one sentence, for the log.
    pub(crate) fn with_cause(&self) -> String {
        match std::error::Error::source(self) {
            Some(source) => format!("{self}: {source}"),
            None => self.to_string(),
        }
    }
}

fn count(snapshots: usize) -> String {
    match snapshots {
        1 => "its snapshot".to_owned(),
        more => format!("its {more} snapshots"),
    }
}
