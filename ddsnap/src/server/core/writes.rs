// SPDX-License-Identifier: GPL-2.0-only
//! Writes: committing them in groups, and holding those that cannot be answered yet.
//!
//! A write may be held for a barrier or because the store is full and room is on its way. Nothing of
//! a held write has been looked up and kept, so it does not matter to the order of replies when it goes
//! into a group.
//!
//! A write of the origin is about a run of chunks, which is answered as a whole: when each of its chunks may
//! be written, or when one of them will not be. Until then it may go into several groups, as its chunks find
//! room; those that were copied out in an earlier one need nothing more. Nor does it matter to anybody if the
//! run fails in the end: a copy of what the origin still has is true.

use std::time::Duration;

use nix::errno::Errno;
use tracing::error;

use super::{Core, Now, Output, ROOM_DEADLINE};
use crate::protocol::channel::{Answer, Place};
use crate::server::engine::Engine;
use crate::server::refusal;
use crate::store::{Done, Op, OpError};
use crate::units::{Chunk, ChunkRun, SnapTag};

/// The most chunks that are handed to the engine at a time, unless a single write has more. The kernel keeps a
/// batch smaller; what a barrier held may come together.
pub(super) const MOST_CHUNKS: u64 = 4096;

/// What the kernel wants to write.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wanted {
    /// Chunks of the origin.
    Origin(ChunkRun),
    /// A snapshot's chunk.
    Snapshot(SnapTag, Chunk),
}

impl Wanted {
    fn run(self) -> ChunkRun {
        match self {
            Wanted::Origin(run) => run,
            Wanted::Snapshot(_, chunk) => chunk.into(),
        }
    }

    /// What is asked of the engine for each chunk.
    fn ops(self) -> impl Iterator<Item = Op> {
        self.run().iter().map(move |chunk| match self {
            Wanted::Origin(_) => Op::OriginWrite(chunk),
            Wanted::Snapshot(tag, _) => Op::SnapshotWrite(tag, chunk),
        })
    }
}

/// A write that the kernel has asked about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Write {
    /// The request's number.
    pub id: u64,
    pub wanted: Wanted,
    /// If there is no room by then, it fails.
    pub deadline: Duration,
}

/// What the results for a write's chunks come to.
enum Fate {
    /// To its answer: all are done, or one will not be.
    Over(Option<Result<Done, OpError>>),
    /// To another try, as room for those that found none may come until then.
    Held(Duration),
}

impl<E: Engine> Core<E> {
    /// Commits `group` and those held writes that need not be held any longer.
    pub(super) fn commit_with_held(&mut self, now: Now, mut group: Vec<Write>, out: &mut Output) {
        loop {
            if std::mem::take(&mut self.room_changed) {
                for write in std::mem::take(&mut self.no_room) {
                    match write.wanted {
                        Wanted::Origin(_) => self.held_writes.push(write),
                        Wanted::Snapshot(..) => group.push(write),
                    }
                }
            }
            if self.barrier.is_none() {
                group.append(&mut self.held_writes);
            }
            self.commit(now, &group, out);
            self.stop_squashed(out);
            // Again if room has come already: for that a squashed snapshot has become quiet, so this
            // ends. Room that is being made comes by background steps and not in here.
            if !self.room_changed || self.no_room.is_empty() {
                return;
            }
            group.clear();
        }
    }

    /// Something has been done that may have made room.
    pub(in crate::server) fn more_room(&mut self, now: Now, out: &mut Output) {
        self.refusing = false;
        self.room_changed = true;
        self.commit_with_held(now, Vec::new(), out);
    }

    fn commit(&mut self, now: Now, group: &[Write], out: &mut Output) {
        let mut rest = group;
        while !rest.is_empty() {
            let mut chunks = 0;
            let fits = |write: &&Write| {
                chunks += write.wanted.run().chunks;
                chunks <= MOST_CHUNKS
            };
            let count = rest.iter().take_while(fits).count().max(1);
            let (part, others) = rest.split_at(count);
            rest = others;
            self.commit_part(now, part, out);
        }
    }

    fn commit_part(&mut self, now: Now, group: &[Write], out: &mut Output) {
        self.background = true;
        let ops: Vec<Op> = group.iter().flat_map(|write| write.wanted.ops()).collect();
        let free = self.engine.status().free_chunks;
        match self.try_commit(&ops) {
            Some(results) => {
                let mut refused = false;
                let mut rest = &results[..];
                for &write in group {
                    let (results, others) = rest.split_at(write.wanted.ops().count());
                    rest = others;
                    match self.fate(now, write, results) {
                        Fate::Held(deadline) => {
                            self.writes_wait |= results.contains(&Err(OpError::Wait));
                            self.no_room.push(Write { deadline, ..write });
                        }
                        Fate::Over(result) => {
                            refused |=
                                matches!(result, Some(Err(OpError::StoreFull | OpError::Wait)));
                            out.channel(write.id, self.outcome(write.wanted, result));
                        }
                    }
                }
                self.note_refusal(refused, free);
            }
            // One unreadable sector fails a whole group: let it fail only those that need it.
            None if self.fault.is_none() && group.len() > 1 => {
                group
                    .iter()
                    .for_each(|one| self.commit_part(now, std::slice::from_ref(one), out));
            }
            None => {
                for write in group {
                    let answer = self.outcome(write.wanted, None);
                    out.channel(write.id, answer);
                }
            }
        }
    }

    fn fate(&self, now: Now, write: Write, results: &[Result<Done, OpError>]) -> Fate {
        let mut held = None;
        for &refused in results.iter().filter_map(|result| result.as_ref().err()) {
            let until = self.may_get_room(write, refused);
            let Some(until) = until.filter(|&until| until > now.monotonic) else {
                return Fate::Over(Some(Err(refused)));
            };
            held = held.max(Some(until));
        }
        held.map_or(Fate::Over(results.first().copied()), Fate::Held)
    }

    fn try_commit(&mut self, ops: &[Op]) -> Option<Vec<Result<Done, OpError>>> {
        if self.fault.is_some() {
            return None;
        }
        match self.engine.commit(ops) {
            Ok(results) => Some(results),
            Err(broken) => {
                self.broken(&broken);
                None
            }
        }
    }

    /// Until when chunks may come free for a write that found none. While background steps make room it
    /// waits as long as they get on.
    fn may_get_room(&self, write: Write, refused: OpError) -> Option<Duration> {
        match refused {
            OpError::StoreFull if !self.engine.draining().is_empty() => Some(write.deadline),
            OpError::Wait => Some(write.deadline.max(self.upkeep.stepped_at + ROOM_DEADLINE)),
            _ => None,
        }
    }

    /// Makes the requests again that wait for the room which background steps make, when they have.
    pub(super) fn ask_again(&mut self, now: Now, out: &mut Output) {
        if self.engine.is_making_room() {
            return;
        }
        let create = std::mem::take(&mut self.create_waits);
        if std::mem::take(&mut self.writes_wait) {
            self.room_changed = true;
            self.commit_with_held(now, Vec::new(), out);
        }
        if create {
            self.start_waiting(now, out);
        }
    }

    fn outcome(&self, wanted: Wanted, result: Option<Result<Done, OpError>>) -> Answer {
        let failed = match (wanted, result) {
            (Wanted::Origin(_), Some(Ok(Done::Unique))) => {
                return Answer::OriginWrite { status: 0 };
            }
            (Wanted::Snapshot(..), Some(Ok(Done::Private(chunk)))) => {
                return Answer::SnapshotWrite(Place::Store(chunk.0));
            }
            (_, Some(Err(refused))) => refusal::io_errno(&refused),
            (_, Some(Ok(done))) => panic!("the engine answered {done:?} to {wanted:?}"),
            (_, None) => Errno::EIO as i32,
        };
        match wanted {
            Wanted::Origin(_) => Answer::OriginWrite { status: failed },
            Wanted::Snapshot(..) => Answer::SnapshotWrite(Place::Fails(failed)),
        }
    }

    /// `refused`: a write has failed for want of room. `free`: the chunks that were free before.
    fn note_refusal(&mut self, refused: bool, free: u64) {
        if refused && !self.refusing && !self.engine.draining().is_empty() {
            error!(
                "writes fail: the I/O of squashed snapshots did not end within {} s",
                ROOM_DEADLINE.as_secs()
            );
        }
        if refused || self.engine.status().free_chunks < free {
            self.refusing = refused;
        }
        self.watch_space();
    }
}
