// SPDX-License-Identifier: GPL-2.0-only
//! The real engine: [`Store`] behind the core's trait.

use std::ops::RangeInclusive;
use std::time::{Duration, Instant};

use tracing::{error, warn};

use super::engine::{Answer, Engine, EngineError};
use super::surroundings::unix_now;
use crate::store::dump::{DumpEntry, DumpPlace};
use crate::store::{
    Budget, Changes, Counting, Counts, Done, Fate, Location, Op, OpError, OriginUse, ResizeError,
    ResizeRequest, RevertError, Reverting, Scrub, Scrubbed, Sizes, SnapshotInfo, Store, StoreError,
    StoreStatus,
};
use crate::units::{Chunk, ChunkRun, SnapTag};

/// Index entries looked at in one step of background work: well under a millisecond.
const BACKGROUND_BUDGET: usize = 256;

/// Index entries counted between two looks at the clock: a page or two of the tree.
const COUNT_BUDGET: usize = 512;
/// How long a step of counting takes, and about the longest that it holds up a request.
const COUNT_TIME: Duration = Duration::from_millis(4);

/// The longest that work for others is to hold up a request, but for a step that has begun.
const HOLD_UP: Duration = Duration::from_millis(60);

/// A store that logs what it gave up, and does as much at a time as its device is fast.
pub struct StoreEngine {
    store: Store,
    /// How long an operation of the metadata's device takes in background steps, averaged.
    each: Duration,
}

impl StoreEngine {
    /// Serves a store.
    #[must_use]
    pub fn new(store: Store) -> StoreEngine {
        let each = Duration::ZERO;
        StoreEngine { store, each }
    }

    /// Gives the store back.
    #[must_use]
    pub fn into_store(self) -> Store {
        self.store
    }

    /// A step began then, at so many operations: fits the budget to how long they took.
    fn measure(&mut self, started: Instant, operations: u64) {
        let done = self.store.operations() - operations;
        if let Some(done) = u32::try_from(done).ok().filter(|&done| done > 0) {
            self.each = (self.each * 7 + started.elapsed() / done) / 8;
            self.store.set_budget(Budget::within(HOLD_UP, self.each));
        }
    }

    fn answer<T>(&mut self, result: Result<T, StoreError>) -> Result<T, EngineError> {
        for (tag, fate) in self.store.take_given_up() {
            let what = match fate {
                Fate::Deleted => "was deleted",
                Fate::Squashed => "was squashed",
                Fate::Bookmark => "became a bookmark",
            };
            warn!("the snapshot store is full: snapshot {tag} {what} to make room");
        }
        for trouble in self.store.take_troubles() {
            error!("{trouble}");
        }
        for (chunk, problem) in self.store.take_revert_skipped() {
            error!("chunk {chunk} of the origin is not reverted: {problem}");
        }
        result.map_err(|error| EngineError {
            latched: self.store.failure().is_some(),
            message: format!("{:#}", anyhow::Error::from(error)),
        })
    }
}

impl Engine for StoreEngine {
    fn commit(&mut self, group: &[Op]) -> Result<Vec<Result<Done, OpError>>, EngineError> {
        let result = self.store.commit(group);
        self.answer(result)
    }

    fn locate(&mut self, tag: SnapTag, chunk: Chunk) -> Answer<Location> {
        let result = self.store.locate(tag, chunk);
        self.answer(result)
    }

    fn create(&mut self, tag: SnapTag, now: i64) -> Answer<()> {
        let result = self.store.create(tag, now);
        self.answer(result)
    }

    fn create_bookmark(&mut self, tag: SnapTag, now: i64) -> Answer<()> {
        let result = self.store.create_bookmark(tag, now);
        self.answer(result)
    }

    fn turn_to_bookmark(&mut self, tag: SnapTag) -> Answer<()> {
        let result = self.store.turn_to_bookmark(tag);
        self.answer(result)
    }

    fn set_to_bookmark(&mut self, tag: SnapTag, to_bookmark: bool) -> Answer<()> {
        let result = self.store.set_to_bookmark(tag, to_bookmark);
        self.answer(result)
    }

    fn delete(&mut self, tag: SnapTag) -> Answer<()> {
        let result = self.store.delete(tag);
        self.answer(result)
    }

    fn set_priority(&mut self, tag: SnapTag, priority: i8) -> Answer<()> {
        let result = self.store.set_priority(tag, priority);
        self.answer(result)
    }

    fn adjust_usecount(&mut self, tag: SnapTag, delta: i32) -> Answer<u16> {
        let result = self.store.adjust_usecount(tag, delta);
        self.answer(result)
    }

    fn set_in_use(&mut self, tag: SnapTag, in_use: bool) {
        self.store.set_in_use(tag, in_use);
    }

    fn draining(&self) -> Vec<SnapTag> {
        self.store.draining()
    }

    fn is_making_room(&self) -> bool {
        self.store.is_making_room()
    }

    fn set_quiet(&mut self, tag: SnapTag) {
        self.store.set_quiet(tag);
    }

    fn origin_is_unique(&self) -> bool {
        self.store.origin_is_unique()
    }

    fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.store.snapshots()
    }

    fn snapshot(&self, tag: SnapTag) -> Option<SnapshotInfo> {
        self.store.snapshot(tag)
    }

    fn status(&self) -> StoreStatus {
        self.store.status()
    }

    fn count_step(&mut self, counting: &mut Counting) -> Result<bool, EngineError> {
        let end = Instant::now() + COUNT_TIME;
        let result = loop {
            match self.store.count_step(counting, COUNT_BUDGET) {
                Ok(true) if Instant::now() < end => {}
                other => break other,
            }
        };
        self.answer(result)
    }

    fn entries_to_count(&self) -> u64 {
        self.store.entries_to_count()
    }

    fn counted(&self, counting: &Counting) -> Counts {
        self.store.counted(counting)
    }

    fn changes(&self, from: Option<SnapTag>, to: SnapTag) -> Result<Changes, OpError> {
        self.store.changes(from, to)
    }

    fn changes_step(
        &mut self,
        changes: &mut Changes,
        runs: &mut Vec<ChunkRun>,
        most: usize,
    ) -> Answer<bool> {
        let result = self.store.changes_step(changes, runs, most);
        self.answer(result)
    }

    fn dump_step(
        &mut self,
        place: DumpPlace,
        chunks: RangeInclusive<u64>,
        limit: usize,
    ) -> Result<(Vec<DumpEntry>, Option<DumpPlace>), EngineError> {
        let result = self.store.dump_step(place, chunks, limit);
        self.answer(result)
    }

    fn resize_begin(
        &mut self,
        request: &ResizeRequest,
    ) -> Result<Result<(), ResizeError>, EngineError> {
        let result = self.store.resize_begin(request);
        self.answer(result)
    }

    fn resize_step(&mut self) -> Result<Result<Option<Sizes>, ResizeError>, EngineError> {
        let result = self.store.resize_step();
        self.answer(result)
    }

    fn resize_progress(&self) -> (u64, u64) {
        self.store.resize_progress()
    }

    fn sizes(&self) -> Sizes {
        self.store.sizes()
    }

    fn revert_begin(&mut self, tag: SnapTag) -> Result<Result<(), RevertError>, EngineError> {
        let result = self.store.revert_begin(tag);
        self.answer(result)
    }

    fn revert_step(
        &mut self,
        chunks: usize,
    ) -> Result<Result<Reverting, RevertError>, EngineError> {
        let result = self.store.revert_step(chunks);
        self.answer(result)
    }

    fn revert_start(&mut self) -> Result<Result<(), RevertError>, EngineError> {
        let result = self.store.revert_start();
        self.answer(result)
    }

    fn revert_cancel(&mut self) {
        self.store.revert_cancel();
    }

    fn reverting(&self) -> Option<SnapTag> {
        self.store.reverting()
    }

    fn revert_progress(&self) -> (u64, u64) {
        self.store.revert_progress()
    }

    fn scrub_begin(&self) -> Scrub {
        self.store.scrub_begin()
    }

    fn scrub_step(&mut self, scrub: &mut Scrub, chunks: usize) -> Result<Scrubbed, EngineError> {
        let result = self.store.scrub_step(scrub, chunks);
        self.answer(result)
    }

    fn background_step(&mut self) -> Result<bool, EngineError> {
        let (started, operations) = (Instant::now(), self.store.operations());
        let result = self.store.background_step(BACKGROUND_BUDGET);
        self.measure(started, operations);
        self.answer(result)
    }

    fn close(self, origin: OriginUse) -> Result<(), EngineError> {
        self.store
            .close_with(origin, unix_now())
            .map_err(|error| EngineError {
                latched: true,
                message: format!("{:#}", anyhow::Error::from(error)),
            })
    }
}
