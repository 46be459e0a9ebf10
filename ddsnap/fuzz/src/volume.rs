// SPDX-License-Identifier: GPL-2.0-only
//! Small valid stores to start from, on disks in memory.

use std::cell::OnceCell;

use ddsnap::device::memory::{Machine, Moment, Rng, Survival};
use ddsnap::device::{BlockDevice, Read};
use ddsnap::store::check::CheckDevices;
use ddsnap::store::{Devices, InitOptions, Op, OpenOptions, Store, StoreError};
use ddsnap::units::{Chunk, ChunkShift, SnapTag};

use super::image::Image;

const ORIGIN: usize = 0;
const DATA: usize = 1;
const META: usize = 2;

/// Number of different stores.
const BASES: u8 = 6;
/// Numbers of them in an input.
pub const NUMBERS: u8 = 16;
/// The number of a store with bookmarks that crashed.
pub const BOOKMARKS: u8 = 13;

/// A store as it lies on its disks.
pub struct Base {
    pub separate_meta: bool,
    pub origin_chunks: u64,
    moment: Moment,
    image: OnceCell<Image>,
}

thread_local! {
    static BASES_HERE: [Base; BASES as usize] = std::array::from_fn(|number| make(number as u8));
}

/// Calls `f` with the base of a number, modulo [`NUMBERS`]: those without bookmarks came first, and inputs that
/// found something name them so.
pub fn with_base<T>(number: u8, f: impl FnOnce(&Base) -> T) -> T {
    let base = match number % NUMBERS {
        12 => 4,
        BOOKMARKS => 5,
        number => number % 4,
    };
    BASES_HERE.with(|bases| f(&bases[usize::from(base)]))
}

/// 0: closed. 1: crashed, with a journal to replay. 2: the same with metadata on its own device. 3:
/// closed, with trees of two levels. 4: closed, with bookmarks. 5: the same, crashed.
fn make(number: u8) -> Base {
    let (chunk, origin_chunks, meta_bytes) = match number {
        0 => (512, 24, 0),
        1 | 4 | 5 => (4096, 24, 0),
        2 => (4096, 24, 600 << 10),
        _ => (512, 700, 0),
    };
    // Two of the origins end in a short chunk.
    let lacking = match number {
        1 => chunk - 512,
        2 => 512,
        _ => 0,
    };
    let machine = Machine::new(&[
        ("origin", origin_chunks * chunk - lacking),
        ("data", 1200 << 10),
        ("meta", meta_bytes),
    ]);
    let separate_meta = meta_bytes > 0;
    let options = InitOptions {
        chunk: ChunkShift::from_bytes(chunk).unwrap(),
        journal_bytes: None,
        now: 1,
        uuid: [9; 16],
    };
    Store::initialize(&mut devices(&machine, separate_meta), &options).unwrap();
    let mut store = open(&machine, separate_meta).unwrap();
    for round in 0..4 {
        let tag = SnapTag(round);
        let bookmark = number > 3 && round % 2 == 1;
        let created = match bookmark {
            true => store.create_bookmark(tag, i64::from(round)),
            false => store.create(tag, i64::from(round)),
        };
        created.unwrap().unwrap();
        let written = |n: u64| (n * 7 + u64::from(round) * 5) % origin_chunks;
        let count = origin_chunks / if number == 3 { 2 } else { 3 };
        let mut ops: Vec<Op> = (0..count)
            .map(|n| Op::OriginWrite(Chunk(written(n))))
            .collect();
        let own = (0..3).map(|n| Op::SnapshotWrite(tag, Chunk(n * 3)));
        ops.extend(own.filter(|_| !bookmark));
        for group in ops.chunks(40) {
            assert!(store.commit(group).unwrap().iter().all(Result::is_ok));
        }
        if round == 1 && number != 0 {
            // Half of what there is lies in trees, half in the journal.
            store.close().unwrap();
            store = open(&machine, separate_meta).unwrap();
        }
    }
    store.set_priority(SnapTag(2), -3).unwrap().unwrap();
    store.adjust_usecount(SnapTag(2), 2).unwrap().unwrap();
    if number > 3 {
        store.turn_to_bookmark(SnapTag(0)).unwrap().unwrap();
        store.set_to_bookmark(SnapTag(2), true).unwrap().unwrap();
        while store.background_step(50).unwrap() {}
    } else {
        store.delete(SnapTag(1)).unwrap().unwrap();
    }
    if matches!(number, 0 | 3 | 4) {
        while store.background_step(50).unwrap() {}
        store.delete(SnapTag(0)).unwrap().unwrap();
        store.close().unwrap();
    } else {
        drop(store);
    }
    Base {
        separate_meta,
        origin_chunks,
        moment: machine.moment(),
        image: OnceCell::new(),
    }
}

fn devices(machine: &Machine, separate_meta: bool) -> Devices {
    Devices {
        origin: Box::new(machine.device(ORIGIN)),
        data: Box::new(machine.device(DATA)),
        meta: separate_meta.then(|| Box::new(machine.device(META)) as Box<dyn BlockDevice>),
    }
}

fn open(machine: &Machine, separate_meta: bool) -> Result<Store, StoreError> {
    // Small, so that blocks are read back.
    let options = OpenOptions {
        cache_bytes: 16 * 4096,
    };
    let (mut store, _) = Store::open(devices(machine, separate_meta), &options)?;
    for tag in store.draining() {
        store.set_quiet(tag);
    }
    Ok(store)
}

/// A machine of its own with a base's disks.
pub struct Volume<'a> {
    pub base: &'a Base,
    machine: Machine,
}

impl Base {
    /// Its metadata, to be edited.
    pub fn image(&self) -> Image {
        self.image.get_or_init(|| Image::of(&self.volume())).clone()
    }

    pub fn volume(&self) -> Volume<'_> {
        Volume {
            base: self,
            machine: self.moment.cut(Survival::ProcessKilled, &mut Rng::new(0)),
        }
    }
}

impl Volume<'_> {
    fn meta_disk(&self) -> usize {
        if self.base.separate_meta { META } else { DATA }
    }

    /// A block of the disk that metadata is on; none behind its end.
    pub fn read_meta(&self, offset: u64) -> Option<Vec<u8>> {
        let mut bytes = vec![0; 4096];
        let mut batch = [Read {
            offset,
            into: &mut bytes,
        }];
        self.machine
            .device(self.meta_disk())
            .read(&mut batch)
            .ok()?;
        Some(bytes)
    }

    pub fn write_meta(&self, offset: u64, bytes: &[u8]) {
        self.machine.corrupt(self.meta_disk(), offset, bytes);
    }

    pub fn devices(&self) -> Devices {
        devices(&self.machine, self.base.separate_meta)
    }

    pub fn check_devices(&self) -> CheckDevices {
        let Devices { origin, data, meta } = self.devices();
        CheckDevices {
            data,
            meta,
            origin: Some(origin),
        }
    }

    pub fn open(&self) -> Result<Store, StoreError> {
        open(&self.machine, self.base.separate_meta)
    }
}

/// Uses a store for a while; none if it stopped early. Any call may fail, none may panic.
pub fn exercise(store: &mut Store, origin_chunks: u64) -> Option<()> {
    let _ = store.status();
    let tags: Vec<SnapTag> = store.snapshots().iter().map(|s| s.tag).take(4).collect();
    let _ = store.count();
    for &tag in &tags {
        for chunk in [0, 3, origin_chunks - 1, origin_chunks, u64::MAX] {
            let _ = store.locate(tag, Chunk(chunk)).ok()?;
        }
    }
    let new = SnapTag(77);
    let created = store.create(new, 5).ok()?.is_ok();
    let mut ops: Vec<Op> = (0..origin_chunks.min(30))
        .map(|n| Op::OriginWrite(Chunk(n)))
        .collect();
    ops.extend(tags.iter().map(|&tag| Op::SnapshotWrite(tag, Chunk(1))));
    if created {
        ops.push(Op::SnapshotWrite(new, Chunk(2)));
    }
    store.commit(&ops).ok()?;
    let _ = store.create_bookmark(SnapTag(78), 6).ok()?;
    store.commit(&ops).ok()?;
    let _ = store.turn_to_bookmark(new).ok()?;
    for pair in tags.windows(2) {
        let mut runs = Vec::new();
        if let Ok(mut changes) = store.changes(Some(pair[0]), pair[1]) {
            for _ in 0..40 {
                if !matches!(
                    store.changes_step(&mut changes, &mut runs, 100).ok()?,
                    Ok(true)
                ) {
                    break;
                }
            }
        }
    }
    if let Some(&tag) = tags.first() {
        let _ = store.delete(tag).ok()?;
    }
    for _ in 0..40 {
        if !store.background_step(100).ok()? {
            break;
        }
    }
    Some(())
}
