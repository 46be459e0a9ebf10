// SPDX-License-Identifier: GPL-2.0-only
//! A store on disks in memory, driven the way the kernel target and the server drive it.

use ddsnap::device::memory::Machine;
use ddsnap::device::{BlockDevice, Write};
use ddsnap::store::{Done, Op, OpError, SnapState, Store};
use ddsnap::units::{Chunk, SnapTag, StoreChunk};

pub use super::check::{check, read_origin, read_snapshot};
use super::model::{Model, content};
pub use super::shape::{DATA, META, ORIGIN, Shape};
pub use super::workload::{Step, choose};

/// A volume with its model.
pub struct Volume {
    pub shape: Shape,
    pub machine: Machine,
    pub store: Store,
    pub model: Model,
    pub next_tag: u32,
    pub next_stamp: u64,
    /// Chunks that may be written without asking: what the kernel target's bitmap knows.
    pub unique: Vec<bool>,
    /// Groups refused for lack of room.
    pub refused_full: u64,
    /// Snapshots given up for lack of room.
    pub given_up: u64,
}

impl Volume {
    pub fn new(shape: Shape) -> Self {
        let machine = shape.machine();
        shape.initialize(&machine);
        let (store, _) = shape.open(&machine).expect("open a new store");
        let model = Model::new(shape.origin_chunks, shape.chunk_bytes as usize);
        let unique = vec![false; shape.origin_chunks as usize];
        Volume {
            shape,
            machine,
            store,
            model,
            next_tag: 0,
            next_stamp: 1,
            unique,
            refused_full: 0,
            given_up: 0,
        }
    }

    /// Does a step on the store and, as far as it is acknowledged, on the model.
    pub fn apply(&mut self, step: &Step) {
        match step {
            Step::Group { ops, write } => self.group(ops, *write),
            Step::Create(tag) => {
                let created = 1000 + self.next_stamp as i64;
                self.next_stamp += 1;
                let result = self.store.create(SnapTag(*tag), created).expect("create");
                match result {
                    Ok(()) => {
                        self.unique.fill(false);
                        self.model.create(*tag, created);
                    }
                    Err(OpError::SnapshotExists(_)) => {
                        assert!(self.model.snapshots.contains_key(tag))
                    }
                    Err(OpError::StoreFull) => self.refused_full += 1,
                    Err(other) => panic!("create {tag}: {other}"),
                }
            }
            Step::Delete(tag) => match self.store.delete(SnapTag(*tag)).expect("delete") {
                Ok(()) => {
                    let old = self
                        .model
                        .snapshots
                        .remove(tag)
                        .expect("deleted what the model does not have");
                    assert_eq!(old.usecount, 0);
                }
                Err(OpError::InUse(_)) => assert!(self.model.snapshots[tag].usecount > 0),
                Err(OpError::NoSuchSnapshot(_)) => assert!(!self.model.snapshots.contains_key(tag)),
                Err(other) => panic!("delete {tag}: {other}"),
            },
            Step::Priority(tag, priority) => {
                match self
                    .store
                    .set_priority(SnapTag(*tag), *priority)
                    .expect("priority")
                {
                    Ok(()) => {
                        self.model.snapshots.get_mut(tag).expect("known").priority = *priority
                    }
                    Err(_) => assert!(!self.model.snapshots.contains_key(tag)),
                }
            }
            Step::Usecount(tag, delta) => {
                match self
                    .store
                    .adjust_usecount(SnapTag(*tag), *delta)
                    .expect("usecount")
                {
                    Ok(count) => self.model.snapshots.get_mut(tag).expect("known").usecount = count,
                    Err(OpError::UsecountUnderflow) => {
                        assert!(i32::from(self.model.snapshots[tag].usecount) + delta < 0);
                    }
                    Err(_) => assert!(!self.model.snapshots.contains_key(tag)),
                }
            }
            Step::Background(budget) => {
                self.store.background_step(*budget).expect("background");
            }
            Step::FlushOrigin => {
                self.machine.device(ORIGIN).flush().expect("flush");
                self.model.settle_origin();
            }
            Step::Reopen => {
                let (store, _) = self.shape.open(&self.machine).expect("reopen");
                self.store = store;
                self.unique.fill(false);
            }
        }
        for (tag, squashed) in self.store.take_given_up() {
            self.given_up += 1;
            if squashed {
                self.model.snapshots.get_mut(&tag.0).expect("known").state = SnapState::Squashed;
            } else {
                self.model.snapshots.remove(&tag.0);
            }
        }
    }

    fn group(&mut self, ops: &[Op], write: bool) {
        let answers = self.store.commit(ops).expect("commit");
        assert_eq!(answers.len(), ops.len());
        for (op, answer) in ops.iter().zip(answers) {
            match (*op, answer) {
                (Op::OriginWrite(chunk), Ok(Done::Unique)) => {
                    self.unique[chunk.0 as usize] = true;
                    if write {
                        self.write_origin(chunk);
                    }
                }
                (Op::SnapshotWrite(tag, chunk), Ok(Done::Private(place))) => {
                    if write {
                        self.write_overlay(tag, chunk, place);
                    }
                }
                (_, Err(OpError::StoreFull)) => self.refused_full += 1,
                (Op::SnapshotWrite(tag, _), Err(OpError::NoSuchSnapshot(_))) => {
                    let given_up = self.model.snapshots.contains_key(&tag.0);
                    assert!(!given_up || self.store.snapshot(tag).is_none());
                }
                (Op::SnapshotWrite(tag, _), Err(OpError::Squashed(_))) => {
                    assert_eq!(
                        self.store.snapshot(tag).expect("known").state,
                        SnapState::Squashed
                    );
                }
                (op, answer) => panic!("{op:?}: {answer:?}"),
            }
        }
    }

    fn write_origin(&mut self, chunk: Chunk) {
        let content = content(self.next_stamp, self.shape.chunk_bytes as usize);
        self.next_stamp += 1;
        let offset = chunk.to_offset(self.shape.shift());
        self.machine
            .device(ORIGIN)
            .write(&[Write {
                offset,
                from: &content,
            }])
            .expect("write");
        self.model.origin[chunk.0 as usize].write(content);
    }

    fn write_overlay(&mut self, tag: SnapTag, chunk: Chunk, place: StoreChunk) {
        // A later op of the group may have cost the snapshot its life.
        let alive = self
            .store
            .snapshot(tag)
            .is_some_and(|snapshot| snapshot.state == SnapState::Live);
        let Some(snapshot) = self.model.snapshots.get_mut(&tag.0).filter(|_| alive) else {
            return;
        };
        let content = content(self.next_stamp, self.shape.chunk_bytes as usize);
        self.next_stamp += 1;
        let offset = place.to_offset(self.shape.shift());
        self.machine
            .device(DATA)
            .write(&[Write {
                offset,
                from: &content,
            }])
            .expect("write");
        snapshot.chunks[chunk.0 as usize].write(content);
    }
}
