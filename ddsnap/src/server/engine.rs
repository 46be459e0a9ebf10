// SPDX-License-Identifier: GPL-2.0-only
//! What the server's core needs of a snapshot store.
//!
//! A trait, so that the core is tested against an engine that lives in memory and fails on command.
//! Every call blocks, and what it says is durable when it returns.

use std::ops::RangeInclusive;

use thiserror::Error;

use crate::store::dump::{DumpEntry, DumpPlace};
use crate::store::{
    Changes, Counting, Counts, Done, Location, Op, OpError, OriginUse, ResizeError, ResizeRequest,
    RevertError, Reverting, Scrub, Scrubbed, Sizes, SnapshotInfo, StoreStatus,
};
use crate::units::{Chunk, ChunkRun, SnapTag};

/// A device or the store's metadata failed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{message}")]
pub struct EngineError {
    /// The store takes no more changes until it is opened again. If not, only this call failed: a
    /// sector could not be read, say.
    pub latched: bool,
    /// What failed, where, and why.
    pub message: String,
}

/// A call that can be refused, or fail.
pub type Answer<T> = Result<Result<T, OpError>, EngineError>;

/// A snapshot store; the engine's own documentation has the details.
pub trait Engine {
    /// Carries out one commit group; one result for each operation, in order.
    ///
    /// # Errors
    /// None of the group may be taken as done.
    fn commit(&mut self, group: &[Op]) -> Result<Vec<Result<Done, OpError>>, EngineError>;

    /// Where a snapshot's chunk is to be read from.
    ///
    /// # Errors
    /// A device failed.
    fn locate(&mut self, tag: SnapTag, chunk: Chunk) -> Answer<Location>;

    /// Makes a snapshot; `now` in seconds since 1970-01-01 UTC.
    ///
    /// # Errors
    /// A device failed; if the store has latched, whether the snapshot exists is not known.
    fn create(&mut self, tag: SnapTag, now: i64) -> Answer<()>;

    /// Makes a bookmark; `now` in seconds since 1970-01-01 UTC.
    ///
    /// # Errors
    /// A device failed; if the store has latched, whether the bookmark exists is not known.
    fn create_bookmark(&mut self, tag: SnapTag, now: i64) -> Answer<()>;

    /// Has a snapshot become a bookmark.
    ///
    /// # Errors
    /// A device failed; if the store has latched, whether it is one is not known.
    fn turn_to_bookmark(&mut self, tag: SnapTag) -> Answer<()>;

    /// Sets whether a snapshot becomes a bookmark when it is given up.
    ///
    /// # Errors
    /// A device failed.
    fn set_to_bookmark(&mut self, tag: SnapTag, to_bookmark: bool) -> Answer<()>;

    /// Deletes a snapshot or bookmark.
    ///
    /// # Errors
    /// A device failed; if the store has latched, whether the snapshot exists is not known.
    fn delete(&mut self, tag: SnapTag) -> Answer<()>;

    /// Sets a snapshot's priority.
    ///
    /// # Errors
    /// A device failed.
    fn set_priority(&mut self, tag: SnapTag, priority: i8) -> Answer<()>;

    /// Adds to the persistent use count and gives back the new one.
    ///
    /// # Errors
    /// A device failed.
    fn adjust_usecount(&mut self, tag: SnapTag, delta: i32) -> Answer<u16>;

    /// Says whether a device shows the snapshot, which decides what happens to it when the store is
    /// full. Not durable: devices come back with their server.
    fn set_in_use(&mut self, tag: SnapTag, in_use: bool);

    /// Squashed snapshots, and such as became bookmarks, whose chunks stay until [`set_quiet`](Self::set_quiet), because I/O of a
    /// device may be under way into them. An operation that finds the store full while there are any
    /// is worth another try when there is one less.
    fn draining(&self) -> Vec<SnapTag>;

    /// Whether operations that were answered with [`OpError::Wait`] would be answered so again: background
    /// steps are to be done first.
    fn is_making_room(&self) -> bool;

    /// Says that no I/O is under way into a squashed snapshot's chunks, and none will be.
    fn set_quiet(&mut self, tag: SnapTag);

    /// Whether no snapshot and no bookmark needs to know of anything that is written to the origin.
    fn origin_is_unique(&self) -> bool;

    /// All snapshots, oldest first.
    fn snapshots(&self) -> Vec<SnapshotInfo>;

    /// One snapshot.
    fn snapshot(&self, tag: SnapTag) -> Option<SnapshotInfo>;

    /// The store as a whole.
    fn status(&self) -> StoreStatus;

    /// Counts for a few milliseconds what snapshots use, and says whether more is left.
    ///
    /// # Errors
    /// A device failed: the count cannot go on.
    fn count_step(&mut self, counting: &mut Counting) -> Result<bool, EngineError>;

    /// About how many entries a count looks at.
    fn entries_to_count(&self) -> u64;

    /// What a count has found.
    fn counted(&self, counting: &Counting) -> Counts;

    /// Begins the list of chunks that differ between two snapshots; without the first, of all chunks of
    /// the second.
    ///
    /// # Errors
    /// There is no such snapshot, or it is squashed.
    fn changes(&self, from: Option<SnapTag>, to: SnapTag) -> Result<Changes, OpError>;

    /// Goes on with such a list: appends to `runs`, up to `most` in it, and says whether more is left.
    ///
    /// # Errors
    /// A device failed.
    fn changes_step(
        &mut self,
        changes: &mut Changes,
        runs: &mut Vec<ChunkRun>,
        most: usize,
    ) -> Answer<bool>;

    /// Lists entries of the index about some chunks, a bounded number from a place on, and gives the
    /// place to go on from.
    ///
    /// # Errors
    /// A device failed.
    fn dump_step(
        &mut self,
        place: DumpPlace,
        chunks: RangeInclusive<u64>,
        limit: usize,
    ) -> Result<(Vec<DumpEntry>, Option<DumpPlace>), EngineError>;

    /// Begins to change sizes.
    ///
    /// # Errors
    /// A device failed.
    fn resize_begin(
        &mut self,
        request: &ResizeRequest,
    ) -> Result<Result<(), ResizeError>, EngineError>;

    /// Does a little of it; the sizes at the end. Refused or failed, nothing has changed.
    ///
    /// # Errors
    /// A device failed.
    fn resize_step(&mut self) -> Result<Result<Option<Sizes>, ResizeError>, EngineError>;

    /// Of a resize under way: bytes done, and to do in all as far as is known.
    fn resize_progress(&self) -> (u64, u64);

    /// The sizes as they are, in bytes.
    fn sizes(&self) -> Sizes;

    /// Begins to check whether the origin can be reverted to a snapshot.
    ///
    /// # Errors
    /// A device failed.
    fn revert_begin(&mut self, tag: SnapTag) -> Result<Result<(), RevertError>, EngineError>;

    /// Does a step of it, on so many chunks: of the check, or of the revert once it was started.
    ///
    /// # Errors
    /// A device failed.
    fn revert_step(&mut self, chunks: usize)
    -> Result<Result<Reverting, RevertError>, EngineError>;

    /// Starts the revert that was checked: from now on it goes on to its end.
    ///
    /// # Errors
    /// A device failed.
    fn revert_start(&mut self) -> Result<Result<(), RevertError>, EngineError>;

    /// Gives up a check.
    fn revert_cancel(&mut self);

    /// The snapshot of a revert that was started.
    fn reverting(&self) -> Option<SnapTag>;

    /// Bytes of a check or revert that are done, and of how many.
    fn revert_progress(&self) -> (u64, u64);

    /// A scrub at its beginning.
    fn scrub_begin(&self) -> Scrub;

    /// Proves so many further chunks.
    ///
    /// # Errors
    /// The index cannot be read.
    fn scrub_step(&mut self, scrub: &mut Scrub, chunks: usize) -> Result<Scrubbed, EngineError>;

    /// Does a little of the work that can wait, and says whether more is left.
    ///
    /// # Errors
    /// A device failed.
    fn background_step(&mut self) -> Result<bool, EngineError>;

    /// Marks the store as shut down properly; `origin` is who may have written to the origin.
    ///
    /// # Errors
    /// A device failed; the store will be recovered when it is opened.
    fn close(self, origin: OriginUse) -> Result<(), EngineError>;
}
