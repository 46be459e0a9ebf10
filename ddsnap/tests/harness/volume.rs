// SPDX-License-Identifier: GPL-2.0-only
//! A store on disks in memory, driven the way the kernel target and the server drive it.

use ddsnap::device::memory::{Machine, Rng};
use ddsnap::device::{BlockDevice, Read, Write};
use ddsnap::store::{
    Devices, Done, InitOptions, Location, Op, OpError, OpenOptions, Opened, SnapState, Store,
    StoreError,
};
use ddsnap::units::{Chunk, ChunkShift, SnapTag, StoreChunk};

use super::model::{Model, content};

pub const ORIGIN: usize = 0;
pub const DATA: usize = 1;
pub const META: usize = 2;

/// Shape of a volume.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub chunk_bytes: u64,
    pub origin_chunks: u64,
    /// Length of the device that holds the data.
    pub data_bytes: u64,
    /// Length of the device for metadata; 0 for none.
    pub meta_bytes: u64,
    /// The most snapshots the workload keeps.
    pub snapshots: u64,
}

impl Shape {
    pub fn shift(&self) -> ChunkShift {
        ChunkShift::from_bytes(self.chunk_bytes).expect("a chunk size")
    }

    pub fn machine(&self) -> Machine {
        let origin = self.origin_chunks * self.chunk_bytes;
        Machine::new(&[
            ("origin", origin),
            ("data", self.data_bytes),
            ("meta", self.meta_bytes),
        ])
    }

    pub fn devices(&self, machine: &Machine) -> Devices {
        Devices {
            origin: Box::new(machine.device(ORIGIN)),
            data: Box::new(machine.device(DATA)),
            meta: (self.meta_bytes > 0)
                .then(|| Box::new(machine.device(META)) as Box<dyn BlockDevice>),
        }
    }

    pub fn initialize(&self, machine: &Machine) {
        let options = InitOptions {
            chunk: self.shift(),
            journal_bytes: None,
            now: 1,
            uuid: [9; 16],
        };
        Store::initialize(&mut self.devices(machine), &options).expect("initialise");
    }

    pub fn open(&self, machine: &Machine) -> Result<(Store, Opened), StoreError> {
        // A small cache, so that blocks are read back from the device.
        Store::open(
            self.devices(machine),
            &OpenOptions {
                cache_bytes: 16 * 4096,
            },
        )
    }
}

/// One step of the workload.
#[derive(Clone, Debug)]
pub enum Step {
    /// Ask for these ops as one group, then write the granted chunks if `write` is set.
    Group {
        ops: Vec<Op>,
        write: bool,
    },
    Create(u32),
    Delete(u32),
    Priority(u32, i8),
    Usecount(u32, i32),
    Background(usize),
    FlushOrigin,
    Reopen,
}

/// Chooses a step that the shape and the model make sense of.
pub fn choose(rng: &mut Rng, shape: &Shape, model: &Model, next_tag: &mut u32) -> Step {
    let tags: Vec<u32> = model.snapshots.keys().copied().collect();
    let tag = |rng: &mut Rng| {
        if tags.is_empty() {
            0
        } else {
            tags[rng.below(tags.len() as u64) as usize]
        }
    };
    match rng.below(100) {
        0..=59 => {
            let count = if rng.chance(20) {
                1 + rng.below(40)
            } else {
                1 + rng.below(4)
            };
            let ops = (0..count)
                .map(|_| {
                    let chunk = Chunk(rng.below(shape.origin_chunks));
                    if rng.chance(25) {
                        Op::SnapshotWrite(SnapTag(tag(rng)), chunk)
                    } else {
                        Op::OriginWrite(chunk)
                    }
                })
                .collect();
            Step::Group {
                ops,
                write: !rng.chance(10),
            }
        }
        60..=71 => {
            if tags.len() as u64 >= shape.snapshots {
                return Step::Delete(tag(rng));
            }
            // Now and then a tag that was used before.
            let tag = if rng.chance(20) {
                rng.below(u64::from(*next_tag) + 1) as u32
            } else {
                *next_tag
            };
            *next_tag = (*next_tag).max(tag + 1);
            Step::Create(tag)
        }
        72..=77 => Step::Delete(tag(rng)),
        78..=81 => Step::Priority(tag(rng), rng.below(256) as u8 as i8),
        82..=85 => Step::Usecount(tag(rng), rng.below(4) as i32 - 2),
        86..=95 => Step::Background(1 + rng.below(64) as usize),
        96..=98 => Step::FlushOrigin,
        _ => Step::Reopen,
    }
}

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

/// Content of a chunk of the origin.
pub fn read_origin(shape: &Shape, machine: &Machine, chunk: Chunk, into: &mut [u8]) {
    let offset = chunk.to_offset(shape.shift());
    machine
        .device(ORIGIN)
        .read(&mut [Read { offset, into }])
        .expect("read");
}

/// Content of a chunk of a live snapshot, found the way the kernel target finds it.
pub fn read_snapshot(
    shape: &Shape,
    machine: &Machine,
    store: &mut Store,
    tag: u32,
    chunk: Chunk,
    into: &mut [u8],
) -> Result<(), String> {
    match store
        .locate(SnapTag(tag), chunk)
        .map_err(|error| error.to_string())?
    {
        Ok(Location::Origin) => read_origin(shape, machine, chunk, into),
        Ok(Location::Store(place)) => {
            let offset = place.to_offset(shape.shift());
            machine
                .device(DATA)
                .read(&mut [Read { offset, into }])
                .expect("read");
        }
        Err(refused) => return Err(refused.to_string()),
    }
    Ok(())
}

/// Compares a store with what two models allow: the one before and the one after a step. `given_up`
/// snapshots may be live still.
pub fn check(
    shape: &Shape,
    machine: &Machine,
    store: &mut Store,
    before: &Model,
    after: &Model,
) -> Result<(), String> {
    let mut buffer = vec![0; shape.chunk_bytes as usize];
    let found: std::collections::BTreeMap<u32, _> = store
        .snapshots()
        .into_iter()
        .map(|s| (s.tag.0, s))
        .collect();
    for tag in before
        .snapshots
        .keys()
        .chain(after.snapshots.keys())
        .chain(found.keys())
    {
        let candidates = [before.snapshots.get(tag), after.snapshots.get(tag)];
        let Some(info) = found.get(tag) else {
            if candidates.iter().all(Option::is_some)
                && candidates[0].map(|s| s.created) == candidates[1].map(|s| s.created)
            {
                return Err(format!("snapshot {tag} is lost"));
            }
            continue;
        };
        let fits = candidates.into_iter().flatten().find(|snapshot| {
            (
                snapshot.state,
                snapshot.priority,
                snapshot.usecount,
                snapshot.created,
            ) == (info.state, info.priority, info.usecount, info.created)
        });
        let Some(snapshot) = fits else {
            return Err(format!(
                "snapshot {tag} is {info:?}, neither of what it was nor what it becomes"
            ));
        };
        if info.state != SnapState::Live {
            continue;
        }
        for (index, chunk) in snapshot.chunks.iter().enumerate() {
            read_snapshot(
                shape,
                machine,
                store,
                *tag,
                Chunk(index as u64),
                &mut buffer,
            )
            .map_err(|error| format!("snapshot {tag} chunk {index}: {error}"))?;
            // A write of the interrupted step may be there in part.
            let next = after
                .snapshots
                .get(tag)
                .filter(|next| next.created == snapshot.created);
            let may = next.is_some_and(|next| next.chunks[index].allows(&buffer));
            if !may && !chunk.allows(&buffer) {
                let (found, wanted) = (stamp(&buffer), stamp(&chunk.now));
                return Err(format!(
                    "snapshot {tag} chunk {index} has content {found}, expected {wanted}"
                ));
            }
        }
    }
    for (index, chunk) in after.origin.iter().enumerate() {
        read_origin(shape, machine, Chunk(index as u64), &mut buffer);
        if !chunk.allows(&buffer) && !before.origin[index].allows(&buffer) {
            return Err(format!(
                "origin chunk {index} has content {}",
                stamp(&buffer)
            ));
        }
    }
    Ok(())
}

fn stamp(bytes: &[u8]) -> u64 {
    let mut stamp = [0; 8];
    stamp.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(stamp)
}
