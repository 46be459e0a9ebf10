// SPDX-License-Identifier: GPL-2.0-only
//! The snapshot store's engine: one owner, synchronous; it opens no socket, reads no clock and starts
//! no thread, so tests can drive all of it. ARCHITECTURE.md has the crash argument.
//!
//! What changes goes through [`State`](state::State) as journal entries: durable first, then applied.
//! A failed write or flush latches the store: nothing more is changed until it is opened again.

mod alloc;
pub mod api;
mod behind;
mod bookmark;
mod budget;
mod cache;
pub mod check;
mod checkpoint;
mod commands;
mod commit;
mod contents;
mod counting;
pub mod diff;
pub mod dump;
mod error;
mod foreign;
mod frozen;
mod full;
mod index;
mod init;
mod journal;
mod lookup;
mod media;
mod metaalloc;
mod no_origin;
mod open;
mod recover;
mod resize;
mod resize_end;
mod revert;
mod scrub;
mod snapshot;
mod state;
mod status;
mod sweep;
mod victims;
mod view;

pub use api::{
    Counts, Done, Fate, Location, MANY, Op, OpError, Part, ResizeError, ResizeRequest, RevertError,
    Reverting, Sharing, Sizes, SnapState, SnapshotInfo, StoreStatus,
};
pub use budget::Budget;
pub use counting::Counting;
pub use diff::Changes;
pub use error::StoreError;
pub use foreign::{OriginUse, Surroundings};
pub use media::Devices;
pub use scrub::{BadChunk, Fault, Scrub, Scrubbed};
pub use view::View;

use crate::format::superblock::Superblock;
use crate::units::{ChunkShift, Sectors, SnapTag};

/// How to make a store.
#[derive(Clone, Copy, Debug)]
pub struct InitOptions {
    /// Chunk size.
    pub chunk: ChunkShift,
    /// Length of the journal in bytes, 64 KiB to 1 GiB, rounded up; none for the default, a 64th of
    /// the device, or a 16th of a metadata device, up to 64 MiB.
    pub journal_bytes: Option<u64>,
    /// Seconds since 1970-01-01 UTC.
    pub now: i64,
    /// A new random UUID.
    pub uuid: [u8; 16],
}

/// How to open a store.
#[derive(Clone, Copy, Debug)]
pub struct OpenOptions {
    /// The most memory for cached index nodes.
    pub cache_bytes: u64,
}

/// What opening a store found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Opened {
    /// It had been closed in order.
    pub clean: bool,
    /// Records of the journal that were applied.
    pub replayed_records: u64,
    /// Of these, records of which a part was left out because its data was never written: they were
    /// not acknowledged. 0 or 1.
    pub dropped_records: u64,
    /// Length of the origin when the store was last in use.
    pub origin: Sectors,
    /// What tells that the origin was written without this store, in half a sentence.
    pub foreign: Option<String>,
}

/// An open store.
pub struct Store {
    media: media::Media,
    /// The superblock as both copies on disk have it, unless one is stale.
    superblock: Superblock,
    /// The copy that opening found older or damaged: the next write goes there first.
    stale_copy: Option<usize>,
    state: state::State,
    meta: metaalloc::MetaAlloc,
    ring: journal::Ring,
    sweep: sweep::Sweep,
    /// Memory for the chunks of a commit group.
    copies: crate::buffer::AlignedBuf,
    /// The checkpoint under way.
    checkpoint: Option<checkpoint::Checkpoint>,
    /// The store was recovered from its ring, and no checkpoint has been completed since.
    recovered: bool,
    /// Why the store takes no more changes.
    failed: Option<String>,
    /// Snapshots and bookmarks given up for lack of room, and what became of them.
    given_up: Vec<(SnapTag, Fate)>,
    /// No snapshot is given up for what is being done now.
    sparing: bool,
    /// What has to happen before a request that was answered with [`OpError::Wait`] is made again.
    need: Option<full::Need>,
    /// What failed in passing and is tried again.
    troubles: Vec<String>,
    /// Records until a checkpoint that failed is tried again in passing, and how many it was the last time.
    hindered: (u32, u32),
    resizing: Option<resize::Resize>,
    /// What may be done while a request waits.
    budget: Budget,
    revert: revert::Revert,
    /// The origin had a fingerprint when the store was opened, and still fitted it.
    opened_untouched: bool,
}

impl Store {
    /// Closes the store in order, so that the next open need not replay, with nothing left that writes to the
    /// origin.
    ///
    /// # Errors
    /// A device failed; the next open recovers.
    pub fn close(self) -> Result<(), StoreError> {
        self.close_with(OriginUse::Unused, 0)
    }

    /// Closes the store in order. `now` is in seconds since 1970-01-01 UTC; 0: not known.
    ///
    /// # Errors
    /// A device failed; the next open recovers.
    pub fn close_with(mut self, origin: OriginUse, now: i64) -> Result<(), StoreError> {
        self.check_latch()?;
        let record = self.closing_record(origin, now);
        self.checkpoint_with(|next| {
            next.clean = true;
            next.origin_record = Some(record);
        })
    }

    /// Why the store takes no more changes; none while all is well.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    fn check_latch(&self) -> Result<(), StoreError> {
        self.failed
            .as_ref()
            .map_or(Ok(()), |text| Err(StoreError::Latched(text.clone())))
    }

    /// Passes a result on; an error after which the disk's content is not known latches the store.
    fn latch<T>(&mut self, result: Result<T, StoreError>) -> Result<T, StoreError> {
        if let Err(error) = &result {
            let harmless = matches!(
                error,
                StoreError::Read { .. }
                    | StoreError::Damaged { .. }
                    | StoreError::BadData { .. }
                    | StoreError::Measure { .. }
                    | StoreError::WriteOrigin { .. }
            );
            let latches = crate::promise::kept!(
                "store-latches",
                "after a failed write or flush further changes would rest on what is not on disk"
            );
            if !harmless && latches {
                self.latch_now(error);
            }
        }
        result
    }

    fn latch_now(&mut self, error: &StoreError) {
        if self.failed.is_none() {
            let mut text = error.to_string();
            let mut cause = std::error::Error::source(error);
            while let Some(error) = cause {
                text = format!("{text}: {error}");
                cause = error.source();
            }
            self.failed = Some(text);
        }
    }
}
