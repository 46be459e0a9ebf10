// SPDX-License-Identifier: GPL-2.0-only
//! Writes: committing them in groups, and holding those that cannot be answered yet.
//!
//! A write may be held for a barrier or because the store is full and room is on its way. Nothing of
//! a held write has been looked up or committed, so it does not matter to the order of replies when
//! it goes into a group.

use std::time::Duration;

use nix::errno::Errno;
use tracing::error;

use super::{Core, Now, Output, ROOM_DEADLINE};
use crate::protocol::channel::{Answer, Place};
use crate::server::engine::Engine;
use crate::server::refusal;
use crate::store::{Done, Op, OpError};

/// A write that the kernel has asked about.
#[derive(Clone, Copy, Debug)]
pub(super) struct Write {
    /// The request's number.
    pub id: u64,
    pub op: Op,
    /// If there is no room by then, it fails.
    pub deadline: Duration,
}

impl<E: Engine> Core<E> {
    /// Commits `group` and those held writes that need not be held any longer.
    pub(super) fn commit_with_held(&mut self, now: Now, mut group: Vec<Write>, out: &mut Output) {
        loop {
            if std::mem::take(&mut self.room_changed) {
                for write in std::mem::take(&mut self.no_room) {
                    match write.op {
                        Op::OriginWrite(_) => self.held_writes.push(write),
                        Op::SnapshotWrite(..) => group.push(write),
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
        if group.is_empty() {
            return;
        }
        self.background = true;
        let ops: Vec<Op> = group.iter().map(|write| write.op).collect();
        let free = self.engine.status().free_chunks;
        match self.try_commit(&ops) {
            Some(results) => {
                let mut refused = false;
                for (&write, result) in group.iter().zip(results) {
                    let full = matches!(result, Err(OpError::StoreFull | OpError::Wait));
                    let until = self.may_get_room(write, result.err());
                    if until.is_some_and(|until| until > now.monotonic) {
                        let deadline = until.unwrap_or_default();
                        self.writes_wait |= result == Err(OpError::Wait);
                        self.no_room.push(Write { deadline, ..write });
                        continue;
                    }
                    refused |= full;
                    out.channel(write.id, self.outcome(write.op, Some(result)));
                }
                self.note_refusal(refused, free);
            }
            // One unreadable sector fails a whole group: let it fail only those that need it.
            None if self.fault.is_none() && group.len() > 1 => {
                group
                    .iter()
                    .for_each(|one| self.commit(now, std::slice::from_ref(one), out));
            }
            None => {
                for write in group {
                    let answer = self.outcome(write.op, None);
                    out.channel(write.id, answer);
                }
            }
        }
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
    fn may_get_room(&self, write: Write, refused: Option<OpError>) -> Option<Duration> {
        match refused? {
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

    fn outcome(&self, op: Op, result: Option<Result<Done, OpError>>) -> Answer {
        let failed = match (op, result) {
            (Op::OriginWrite(_), Some(Ok(Done::Unique))) => {
                return Answer::OriginWrite { status: 0 };
            }
            (Op::SnapshotWrite(..), Some(Ok(Done::Private(chunk)))) => {
                return Answer::SnapshotWrite(Place::Store(chunk.0));
            }
            (_, Some(Err(refused))) => refusal::io_errno(&refused),
            (_, Some(Ok(done))) => panic!("the engine answered {done:?} to {op:?}"),
            (_, None) => Errno::EIO as i32,
        };
        match op {
            Op::OriginWrite(_) => Answer::OriginWrite { status: failed },
            Op::SnapshotWrite(..) => Answer::SnapshotWrite(Place::Fails(failed)),
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
