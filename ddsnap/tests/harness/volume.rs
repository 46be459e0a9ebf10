// SPDX-License-Identifier: GPL-2.0-only
//! A store on disks in memory, driven the way the kernel target and the server drive it.

use std::collections::BTreeSet;

use ddsnap::device::memory::Machine;
use ddsnap::device::{BlockDevice, Write};
use ddsnap::store::{Done, Fate, Op, OpError, SnapState, Store};
use ddsnap::units::{Chunk, SnapTag, StoreChunk};

pub use super::check::{check, read_origin, read_snapshot};
use super::jobs::Job;
use super::model::{Model, content};
pub use super::shape::{DATA, META, ORIGIN, Shape};
use super::victims::{allowed, commit, make_room};
pub use super::workload::{Step, choose};

/// A volume with its model.
pub struct Volume {
    /// As long as origin and store are now.
    pub shape: Shape,
    /// As long as they were at first.
    pub first_shape: Shape,
    pub machine: Machine,
    pub store: Store,
    pub model: Model,
    pub next_tag: u32,
    pub next_stamp: u64,
    /// Chunks that may be written without asking: what the kernel target's bitmap knows.
    pub unique: Vec<bool>,
    /// A resize or a revert under way.
    pub job: Option<Job>,
    /// Resizes that came to their end.
    pub resizes: u64,
    /// Reverts that came to their second phase.
    pub reverts: u64,
    /// Groups refused for lack of room.
    pub refused_full: u64,
    /// Snapshots given up for lack of room.
    pub given_up: u64,
    /// Whether it is checked which, which takes long.
    pub checks_victims: bool,
    /// What was wrong with the choice.
    pub problem: Option<String>,
}

impl Volume {
    pub fn new(shape: Shape) -> Self {
        let machine = shape.machine();
        shape.initialize(&machine);
        shape.set_checked(&machine);
        let (store, _) = shape.open(&machine).expect("open a new store");
        let model = Model::new(shape.chunk_bytes as usize, store.sizes());
        let unique = vec![false; shape.origin_chunks as usize];
        Volume {
            shape,
            first_shape: shape,
            machine,
            store,
            model,
            next_tag: 0,
            next_stamp: 1,
            unique,
            job: None,
            resizes: 0,
            reverts: 0,
            refused_full: 0,
            given_up: 0,
            checks_victims: false,
            problem: None,
        }
    }

    /// Does a step on the store and, as far as it is acknowledged, on the model.
    pub fn apply(&mut self, step: &Step) {
        self.prepare(step);
        match step {
            Step::Group { ops, write } => self.group(ops, *write),
            Step::Create(tag) | Step::CreateBookmark(tag) => {
                let bookmark = matches!(step, Step::CreateBookmark(_));
                let create = |store: &mut Store, created| match bookmark {
                    true => store.create_bookmark(SnapTag(*tag), created),
                    false => store.create(SnapTag(*tag), created),
                };
                let created = 1000 + self.next_stamp as i64;
                self.next_stamp += 1;
                let mut result = create(&mut self.store, created).expect("create");
                while result == Err(OpError::Wait) {
                    make_room(&mut self.store);
                    result = create(&mut self.store, created).expect("create");
                }
                match result {
                    Ok(()) => {
                        self.unique.fill(false);
                        let state = match bookmark {
                            true => SnapState::Bookmark,
                            false => SnapState::Live,
                        };
                        self.model.create(*tag, created, state);
                    }
                    Err(OpError::SnapshotExists(_)) => {
                        assert!(self.model.snapshots.contains_key(tag))
                    }
                    Err(OpError::StoreFull) => self.refused_full += 1,
                    Err(OpError::Reverting(to)) => assert_eq!(Some(to.0), self.model.reverting),
                    Err(other) => panic!("create {tag}: {other}"),
                }
            }
            Step::ToBookmark(tag) => {
                let known = self.model.snapshots.get_mut(tag);
                match self
                    .store
                    .turn_to_bookmark(SnapTag(*tag))
                    .expect("to bookmark")
                {
                    Ok(()) => {
                        let snapshot = known.expect("known");
                        if snapshot.is_live() {
                            assert!(!snapshot.in_use());
                            snapshot.become_bookmark();
                        }
                    }
                    Err(OpError::InUse(_)) => assert!(known.expect("known").in_use()),
                    Err(OpError::Squashed(_)) => {
                        assert_eq!(known.expect("known").state, SnapState::Squashed);
                    }
                    Err(OpError::Reverting(_)) => assert_eq!(Some(*tag), self.model.reverting),
                    Err(OpError::NoSuchSnapshot(_)) => assert!(known.is_none()),
                    Err(other) => panic!("{step:?}: {other}"),
                }
            }
            Step::WhenFull(tag, to_bookmark) => {
                let known = self.model.snapshots.get_mut(tag);
                let set = self.store.set_to_bookmark(SnapTag(*tag), *to_bookmark);
                match set.expect("when full") {
                    Ok(()) => known.expect("known").to_bookmark = *to_bookmark,
                    Err(OpError::Squashed(_) | OpError::Bookmark(_)) => {
                        assert!(!known.expect("known").is_live());
                    }
                    Err(OpError::NoSuchSnapshot(_)) => assert!(known.is_none()),
                    Err(other) => panic!("{step:?}: {other}"),
                }
            }
            Step::Delete(tag) => match self.store.delete(SnapTag(*tag)).expect("delete") {
                Ok(()) => {
                    let old = self
                        .model
                        .snapshots
                        .remove(tag)
                        .expect("deleted what the model does not have");
                    assert!(!old.in_use() && self.model.reverting != Some(*tag));
                }
                Err(OpError::InUse(_)) => assert!(self.model.snapshots[tag].in_use()),
                Err(OpError::Reverting(_)) => assert_eq!(Some(*tag), self.model.reverting),
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
            Step::Unasked(from, count) => self.write_unasked(*from, *count),
            Step::Connect(tag, connected) => {
                self.store.set_in_use(SnapTag(*tag), *connected);
                if let Some(snapshot) = self.model.snapshots.get_mut(tag) {
                    snapshot.connected = *connected;
                }
            }
            Step::Quiet(tag) => {
                self.store.set_quiet(SnapTag(*tag));
                if let Some(snapshot) = self.model.snapshots.get_mut(tag) {
                    snapshot.draining = false;
                }
            }
            Step::Resize(request) => self.begin_resize(request),
            Step::Revert(tag) => self.begin_revert(*tag),
            Step::Work(chunks) => self.work(*chunks),
            Step::Reopen => {
                // A resize that was under way is forgotten, and its longer devices are shortened again.
                self.fit_disks();
                let (store, _) = self.shape.open(&self.machine).expect("reopen");
                self.store = store;
                self.model.forget_devices();
                self.after_reopen();
            }
        }
        self.note_given_up();
        let draining: BTreeSet<u32> = self.store.draining().iter().map(|tag| tag.0).collect();
        assert_eq!(draining, self.model.draining(), "after {step:?}");
    }

    /// Takes over into the model what the store has given up, and says what that was.
    fn note_given_up(&mut self) -> Vec<SnapTag> {
        let mut tags = Vec::new();
        for (tag, fate) in self.store.take_given_up() {
            self.given_up += 1;
            tags.push(tag);
            let snapshot = self.model.snapshots.get_mut(&tag.0).expect("known");
            match fate {
                Fate::Squashed => snapshot.squash(),
                Fate::Bookmark => {
                    assert!(snapshot.to_bookmark && snapshot.is_live());
                    snapshot.become_bookmark();
                }
                Fate::Deleted => {
                    assert!(!snapshot.in_use());
                    self.model.snapshots.remove(&tag.0);
                }
            }
        }
        tags
    }

    /// Whether a group could find no room.
    fn is_scarce(&self) -> bool {
        let status = self.store.status();
        let meta = status
            .free_meta_blocks
            .saturating_sub(status.reserved_meta_blocks);
        status.free_chunks < 50 || meta < 250
    }

    fn commit(&mut self, ops: &[Op]) -> Vec<Result<Done, OpError>> {
        if !self.checks_victims || !self.is_scarce() {
            let answers = commit(&mut self.store, ops);
            let given_up = self.note_given_up();
            if self.checks_victims && !given_up.is_empty() {
                self.problem = Some(format!("gave up {given_up:?} while there was room"));
            }
            return answers;
        }
        // One by one, so that it is known what the choice was made of.
        let mut answers = Vec::new();
        for &op in ops {
            let answer = loop {
                make_room(&mut self.store);
                let allowed = allowed(&mut self.store, &self.model);
                let answer = self.store.commit(&[op]).expect("commit")[0];
                let given_up = self.note_given_up();
                if let Err(problem) = allowed.check(&given_up, answer) {
                    self.problem = Some(format!("{op:?}: {problem}"));
                }
                if answer != Err(OpError::Wait) {
                    break answer;
                }
            };
            answers.push(answer);
        }
        answers
    }

    fn group(&mut self, ops: &[Op], write: bool) {
        let answers = self.commit(ops);
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
                (Op::OriginWrite(chunk), Err(OpError::Reverting(to))) => {
                    assert_eq!(Some(to.0), self.model.reverting);
                    let end = self.model.snapshots[&to.0].chunks.len() as u64;
                    assert!(chunk.0 < end && !self.model.kept.contains(&chunk.0));
                }
                (Op::SnapshotWrite(tag, _), Err(OpError::Reverting(to))) => {
                    assert_eq!((Some(to.0), to), (self.model.reverting, tag));
                }
                (Op::SnapshotWrite(tag, _), Err(OpError::NoSuchSnapshot(_))) => {
                    let given_up = self.model.snapshots.contains_key(&tag.0);
                    assert!(!given_up || self.store.snapshot(tag).is_none());
                }
                (Op::SnapshotWrite(tag, _), Err(OpError::Bookmark(_))) => {
                    let info = self.store.snapshot(tag).expect("known");
                    assert_eq!(info.state, SnapState::Bookmark);
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

    /// Writes where the store has said that nobody needs the old data until the next snapshot.
    fn write_unasked(&mut self, from: Chunk, count: usize) {
        let unique = (from.0..).zip(&self.unique[from.0 as usize..]);
        let chunks: Vec<u64> = unique
            .filter(|(_, unique)| **unique)
            .map(|(chunk, _)| chunk)
            .take(count)
            .collect();
        chunks
            .into_iter()
            .for_each(|chunk| self.write_origin(Chunk(chunk)));
    }

    fn write_origin(&mut self, chunk: Chunk) {
        if self.model.reverting.is_some() {
            self.model.kept.insert(chunk.0);
        }
        let len = self.model.origin[chunk.0 as usize].now.len();
        let content = content(self.next_stamp, len);
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
        let snapshot = self.model.snapshots.get_mut(&tag.0);
        let Some(snapshot) = snapshot.filter(|_| alive) else {
            return;
        };
        let len = snapshot.chunks[chunk.0 as usize].now.len();
        let content = content(self.next_stamp, len);
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
