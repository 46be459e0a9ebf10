// SPDX-License-Identifier: GPL-2.0-only
//! An engine in memory that tells what was asked of it and fails on command.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;
use std::rc::Rc;

use super::engine::{Answer, Engine, EngineError};
use crate::store::dump::{DumpEntry, DumpPlace};
use crate::store::{
    Changes, Counting, Counts, Done, Location, Op, OpError, OriginUse, ResizeError, ResizeRequest,
    RevertError, Reverting, Scrub, Scrubbed, Sharing, Sizes, SnapState, SnapshotInfo, StoreStatus,
};
use crate::units::{Chunk, ChunkRun, ChunkShift, Sectors, SnapSeq, SnapTag, StoreChunk};

/// Length of the fake origin in chunks of 4 KiB.
pub const ORIGIN_CHUNKS: u64 = 100;
/// The same in sectors.
pub const ORIGIN_SECTORS: u64 = ORIGIN_CHUNKS * 8;

/// What a test can see and set while a core owns the engine.
#[derive(Debug, Default)]
pub struct Inside {
    pub calls: Vec<String>,
    /// Returned by every call that changes or reads something, until taken away.
    pub failure: Option<EngineError>,
    /// A commit of this chunk of the origin fails alone, without latching.
    pub bad_chunk: Option<Chunk>,
    pub snapshots: Vec<SnapshotInfo>,
    /// Whether it says that no snapshot needs the origin, as soon as there is none.
    pub tells_unique: bool,
    pub in_use: Vec<SnapTag>,
    /// Copies there is room for; `None`: as many as you like.
    pub room: Option<u64>,
    /// Copies there is room for in the place of a squashed snapshot.
    pub room_of_squashed: u64,
    pub draining: Vec<SnapTag>,
    /// What finds no room is to wait for background steps, until there is some.
    pub making_room: bool,
    /// A snapshot to be created is to wait for background steps.
    pub no_table_room: bool,
    /// Background steps fail without latching.
    pub background_fails: bool,
    /// Exceptions: chunk and sequence.
    exceptions: BTreeMap<(u64, u64), StoreChunk>,
    next_seq: u64,
    next_place: u64,
    pub background_steps: u32,
    /// Whether every step of background work leaves more.
    pub has_background: bool,
    /// Steps until a count has ended, less one.
    pub count_steps: u32,
    /// Data chunks that are free, if not 40.
    pub free_chunks: Option<u64>,
    /// What steps of a list of changes find, in order.
    pub changes: VecDeque<Result<Vec<ChunkRun>, OpError>>,
    /// What steps of a resize give, in order.
    pub resize_steps: VecDeque<Result<Option<Sizes>, ResizeError>>,
    /// What steps of a dump give, in order.
    pub dump: VecDeque<Vec<DumpEntry>>,
    /// What steps of a revert give, in order.
    pub revert_steps: VecDeque<Result<Reverting, RevertError>>,
    /// The revert that was started.
    pub reverting: Option<SnapTag>,
    pub checking: Option<SnapTag>,
    /// What steps of a scrub give, in order; it is finished when there are no more.
    pub scrub_steps: VecDeque<Scrubbed>,
    pub closed: bool,
}

/// The engine; its clones are the same one.
#[derive(Clone, Debug, Default)]
pub struct Fake(pub Rc<RefCell<Inside>>);

impl Fake {
    pub fn with_snapshots(tags: &[u32]) -> Fake {
        let mut fake = Fake::default();
        for &tag in tags {
            fake.create(SnapTag(tag), 0).unwrap().unwrap();
        }
        fake.take_calls();
        fake
    }

    pub fn take_calls(&self) -> Vec<String> {
        std::mem::take(&mut self.0.borrow_mut().calls)
    }

    pub fn fail(&self, latched: bool) {
        let message = "disk on fire".to_owned();
        self.0.borrow_mut().failure = Some(EngineError { latched, message });
    }

    fn call(&self, text: String) -> Result<(), EngineError> {
        let mut inside = self.0.borrow_mut();
        inside.calls.push(text);
        inside.failure.clone().map_or(Ok(()), Err)
    }

    /// A server that was started over the same store: nothing is known of devices.
    pub fn reopened(&self) -> Fake {
        let mut inside = self.0.borrow_mut();
        inside.in_use.clear();
        inside.draining = inside
            .snapshots
            .iter()
            .filter(|info| info.state != SnapState::Live)
            .map(|info| info.tag)
            .collect();
        self.clone()
    }

    fn find(&self, tag: SnapTag) -> Result<SnapshotInfo, OpError> {
        self.snapshot(tag).ok_or(OpError::NoSuchSnapshot(tag))
    }

    fn change<T>(
        &self,
        tag: SnapTag,
        change: impl FnOnce(&mut SnapshotInfo) -> Result<T, OpError>,
    ) -> Result<T, OpError> {
        let mut inside = self.0.borrow_mut();
        let found = inside.snapshots.iter_mut().find(|info| info.tag == tag);
        change(found.ok_or(OpError::NoSuchSnapshot(tag))?)
    }
}

impl Inside {
    /// Takes room for a copy. If there is none, squashes the snapshot in use that is wanted least,
    /// one at a time, as the engine does.
    fn take_room(&mut self) -> Result<(), OpError> {
        match &mut self.room {
            None => return Ok(()),
            Some(0) if self.making_room => return Err(OpError::Wait),
            Some(0) => {}
            Some(room) => {
                *room -= 1;
                return Ok(());
            }
        }
        if self.draining.is_empty() {
            let in_use = &self.in_use;
            let victim = self
                .snapshots
                .iter_mut()
                .filter(|info| info.state == SnapState::Live && info.priority < i8::MAX)
                .filter(|info| in_use.contains(&info.tag))
                .min_by_key(|info| (info.priority, info.seq));
            if let Some(victim) = victim {
                victim.state = SnapState::Squashed;
                self.draining.push(victim.tag);
            }
        }
        Err(OpError::StoreFull)
    }
}

impl Engine for Fake {
    fn commit(&mut self, group: &[Op]) -> Result<Vec<Result<Done, OpError>>, EngineError> {
        self.call(format!("commit {group:?}"))?;
        let mut inside = self.0.borrow_mut();
        let bad = inside.bad_chunk;
        if group
            .iter()
            .any(|op| matches!(op, Op::OriginWrite(chunk) if Some(*chunk) == bad))
        {
            return Err(EngineError {
                latched: false,
                message: "unreadable".to_owned(),
            });
        }
        let live = |info: &&SnapshotInfo| info.state == SnapState::Live;
        let newest = inside.snapshots.iter().rev().find(live);
        let newest = newest.map(|info| info.seq.0);
        let mut results = Vec::new();
        for &op in group {
            inside.next_place += 1;
            let place = StoreChunk(inside.next_place);
            results.push(match op {
                Op::OriginWrite(chunk) if chunk.0 >= ORIGIN_CHUNKS => {
                    Err(OpError::OutOfRange(chunk))
                }
                Op::OriginWrite(chunk) => {
                    let taken = match newest {
                        Some(seq) if !inside.exceptions.contains_key(&(chunk.0, seq)) => {
                            inside.take_room().map(|()| {
                                inside.exceptions.insert((chunk.0, seq), place);
                            })
                        }
                        _ => Ok(()),
                    };
                    taken.map(|()| Done::Unique)
                }
                Op::SnapshotWrite(..) => inside.take_room().map(|()| Done::Private(place)),
            });
        }
        Ok(results)
    }

    fn locate(&mut self, tag: SnapTag, chunk: Chunk) -> Answer<Location> {
        self.call(format!("locate {tag} {chunk}"))?;
        let seq = match self.find(tag) {
            Ok(info) if info.state == SnapState::Squashed => {
                return Ok(Err(OpError::Squashed(tag)));
            }
            Ok(info) => info.seq.0,
            Err(refused) => return Ok(Err(refused)),
        };
        let inside = self.0.borrow();
        let found = inside
            .exceptions
            .range((chunk.0, seq)..=(chunk.0, u64::MAX))
            .next();
        Ok(Ok(found.map_or(Location::Origin, |(_, &place)| {
            Location::Store(place)
        })))
    }

    fn create(&mut self, tag: SnapTag, now: i64) -> Answer<()> {
        self.call(format!("create {tag}"))?;
        if self.snapshot(tag).is_some() {
            return Ok(Err(OpError::SnapshotExists(tag)));
        }
        let mut inside = self.0.borrow_mut();
        if inside.no_table_room {
            return Ok(Err(OpError::Wait));
        }
        inside.next_seq += 1;
        let seq = SnapSeq(inside.next_seq);
        inside.snapshots.push(SnapshotInfo {
            tag,
            seq,
            created: now,
            priority: 0,
            usecount: 0,
            state: SnapState::Live,
            doubtful: false,
            to_bookmark: false,
            length: Sectors(ORIGIN_SECTORS),
        });
        Ok(Ok(()))
    }

    fn create_bookmark(&mut self, tag: SnapTag, now: i64) -> Answer<()> {
        let created = self.create(tag, now);
        if let Ok(Ok(())) = created {
            self.turn_to_bookmark(tag)?.expect("it was just created");
        }
        created
    }

    fn turn_to_bookmark(&mut self, tag: SnapTag) -> Answer<()> {
        self.call(format!("to bookmark {tag}"))?;
        Ok(self.change(tag, |info| {
            info.state = SnapState::Bookmark;
            Ok(())
        }))
    }

    fn set_to_bookmark(&mut self, tag: SnapTag, to_bookmark: bool) -> Answer<()> {
        self.call(format!("to bookmark when full {tag} {to_bookmark}"))?;
        Ok(self.change(tag, |info| {
            info.to_bookmark = to_bookmark;
            Ok(())
        }))
    }

    fn delete(&mut self, tag: SnapTag) -> Answer<()> {
        self.call(format!("delete {tag}"))?;
        Ok(self.find(tag).and_then(|info| {
            if info.usecount > 0 {
                return Err(OpError::InUse(tag));
            }
            self.0.borrow_mut().snapshots.retain(|info| info.tag != tag);
            Ok(())
        }))
    }

    fn set_priority(&mut self, tag: SnapTag, priority: i8) -> Answer<()> {
        self.call(format!("priority {tag} {priority}"))?;
        Ok(self.change(tag, |info| {
            info.priority = priority;
            Ok(())
        }))
    }

    fn adjust_usecount(&mut self, tag: SnapTag, delta: i32) -> Answer<u16> {
        self.call(format!("usecount {tag} {delta}"))?;
        Ok(self.change(tag, |info| {
            let count = i32::from(info.usecount) + delta;
            info.usecount = u16::try_from(count).map_err(|_| OpError::UsecountUnderflow)?;
            Ok(info.usecount)
        }))
    }

    fn set_in_use(&mut self, tag: SnapTag, in_use: bool) {
        let mut inside = self.0.borrow_mut();
        inside.in_use.retain(|&other| other != tag);
        if in_use {
            inside.in_use.push(tag);
        }
    }

    fn draining(&self) -> Vec<SnapTag> {
        self.0.borrow().draining.clone()
    }

    fn is_making_room(&self) -> bool {
        self.0.borrow().making_room
    }

    fn set_quiet(&mut self, tag: SnapTag) {
        let mut inside = self.0.borrow_mut();
        inside.calls.push(format!("quiet {tag}"));
        inside.draining.retain(|&other| other != tag);
        let more = inside.room_of_squashed;
        inside.room = inside.room.map(|room| room + more);
    }

    fn origin_is_unique(&self) -> bool {
        let inside = self.0.borrow();
        inside.tells_unique && inside.snapshots.is_empty()
    }

    fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.0.borrow().snapshots.clone()
    }

    fn snapshot(&self, tag: SnapTag) -> Option<SnapshotInfo> {
        self.0
            .borrow()
            .snapshots
            .iter()
            .find(|info| info.tag == tag)
            .copied()
    }

    fn status(&self) -> StoreStatus {
        StoreStatus {
            chunk: ChunkShift::from_bytes(4096).unwrap(),
            data_chunks: 50,
            free_chunks: self.0.borrow().free_chunks.unwrap_or(40),
            meta_blocks: 30,
            free_meta_blocks: 20,
            reserved_meta_blocks: 5,
            separate_meta: false,
            origin: Sectors(ORIGIN_SECTORS),
            created: 0,
            deleting: 0,
        }
    }

    fn count_step(&mut self, _counting: &mut Counting) -> Result<bool, EngineError> {
        self.call("count".to_owned())?;
        let mut inside = self.0.borrow_mut();
        let more = inside.count_steps > 0;
        inside.count_steps = inside.count_steps.saturating_sub(1);
        Ok(more)
    }

    fn entries_to_count(&self) -> u64 {
        7
    }

    /// Each snapshot has one chunk of its own.
    fn counted(&self, _counting: &Counting) -> Counts {
        let own = |chunks| Sharing {
            shared_by: vec![chunks],
        };
        let snapshots = &self.0.borrow().snapshots;
        Counts {
            snapshots: snapshots.iter().map(|info| (info.tag, own(1))).collect(),
            totals: own(snapshots.len() as u64),
        }
    }

    fn changes(&self, from: Option<SnapTag>, to: SnapTag) -> Result<Changes, OpError> {
        let from = from.map(|tag| self.find(tag)).transpose();
        from.and(self.find(to)).map(|_| Changes::default())
    }

    fn changes_step(
        &mut self,
        _: &mut Changes,
        runs: &mut Vec<ChunkRun>,
        _: usize,
    ) -> Answer<bool> {
        self.call("changes".to_owned())?;
        let mut inside = self.0.borrow_mut();
        match inside.changes.pop_front() {
            Some(Ok(found)) => runs.extend(found),
            Some(Err(refused)) => return Ok(Err(refused)),
            None => {}
        }
        Ok(Ok(!inside.changes.is_empty()))
    }

    fn dump_step(
        &mut self,
        place: DumpPlace,
        chunks: RangeInclusive<u64>,
        _: usize,
    ) -> Result<(Vec<DumpEntry>, Option<DumpPlace>), EngineError> {
        self.call(format!("dump {chunks:?}"))?;
        let mut inside = self.0.borrow_mut();
        let entries = inside.dump.pop_front().unwrap_or_default();
        Ok((entries, (!inside.dump.is_empty()).then_some(place)))
    }

    fn resize_begin(
        &mut self,
        request: &ResizeRequest,
    ) -> Result<Result<(), ResizeError>, EngineError> {
        self.call(format!("resize {request:?}"))?;
        let same = request.store == request.meta || request.store.is_none();
        Ok(match same || request.meta.is_none() {
            true => Ok(()),
            false => Err(ResizeError::TwoValues),
        })
    }

    fn resize_step(&mut self) -> Result<Result<Option<Sizes>, ResizeError>, EngineError> {
        self.call("resize step".to_owned())?;
        let step = self.0.borrow_mut().resize_steps.pop_front();
        Ok(step.expect("no step was foreseen"))
    }

    fn resize_progress(&self) -> (u64, u64) {
        (1, 2)
    }

    fn sizes(&self) -> Sizes {
        Sizes {
            origin: ORIGIN_CHUNKS << 12,
            store: 1 << 20,
            meta: 1 << 20,
        }
    }

    fn revert_begin(&mut self, tag: SnapTag) -> Result<Result<(), RevertError>, EngineError> {
        self.call(format!("revert {tag}"))?;
        self.0.borrow_mut().checking = Some(tag);
        Ok(self
            .find(tag)
            .map(|_| ())
            .map_err(|_| RevertError::NoSuchSnapshot(tag)))
    }

    fn revert_step(
        &mut self,
        _chunks: usize,
    ) -> Result<Result<Reverting, RevertError>, EngineError> {
        self.call("revert step".to_owned())?;
        let step = self.0.borrow_mut().revert_steps.pop_front();
        let step = step.expect("no step was foreseen");
        if matches!(step, Ok(Reverting::Done { .. })) {
            self.0.borrow_mut().reverting = None;
        }
        Ok(step)
    }

    fn revert_start(&mut self) -> Result<Result<(), RevertError>, EngineError> {
        self.call("revert start".to_owned())?;
        let mut inside = self.0.borrow_mut();
        inside.reverting = inside.checking.take();
        Ok(Ok(()))
    }

    fn revert_cancel(&mut self) {
        let mut inside = self.0.borrow_mut();
        if inside.checking.take().is_some() {
            inside.calls.push("revert cancel".to_owned());
        }
    }

    fn reverting(&self) -> Option<SnapTag> {
        self.0.borrow().reverting
    }

    fn revert_progress(&self) -> (u64, u64) {
        (3, 4)
    }

    fn scrub_begin(&self) -> Scrub {
        Scrub::of_bytes(1 << 20)
    }

    fn scrub_step(&mut self, scrub: &mut Scrub, _chunks: usize) -> Result<Scrubbed, EngineError> {
        self.call("scrub step".to_owned())?;
        let mut inside = self.0.borrow_mut();
        let found = inside.scrub_steps.pop_front().expect("a step was foreseen");
        if inside.scrub_steps.is_empty() {
            scrub.finish();
        }
        Ok(found)
    }

    fn background_step(&mut self) -> Result<bool, EngineError> {
        let mut inside = self.0.borrow_mut();
        inside.background_steps += 1;
        match inside.background_fails {
            true => Err(EngineError {
                latched: false,
                message: "unreadable".to_owned(),
            }),
            false => Ok(inside.has_background),
        }
    }

    fn close(self, _origin: OriginUse) -> Result<(), EngineError> {
        self.0.borrow_mut().closed = true;
        Ok(())
    }
}
