// SPDX-License-Identifier: GPL-2.0-only
//! A part of the index cannot be read, for a while or for good: what the sweep frees all the same, and what
//! it must not forget.

mod harness;

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use ddsnap::device::{BlockDevice, Read, Write};
use ddsnap::store::{Devices, Done, Op, OpenOptions, Store};
use ddsnap::units::{Chunk, SnapTag};
use harness::shape::{DATA, META, ORIGIN, Shape};

const SHAPE: Shape = Shape {
    chunk_bytes: 512,
    origin_chunks: 20_000,
    lacking_sectors: 0,
    data_bytes: 24 << 20,
    meta_bytes: 64 << 20,
    snapshots: 6,
};

/// Which blocks cannot be read, and which were read last.
#[derive(Default)]
struct Blocks {
    bad: Vec<u64>,
    read: Vec<u64>,
}

/// A metadata device some of whose blocks cannot be read.
struct Failing(Box<dyn BlockDevice>, Rc<RefCell<Blocks>>);

impl BlockDevice for Failing {
    fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }

    fn alignment(&self) -> usize {
        self.0.alignment()
    }

    fn name(&self) -> &str {
        self.0.name()
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> io::Result<()> {
        for read in &*batch {
            let end = read.offset + read.into.len() as u64;
            let blocks = (read.offset / 4096)..end.div_ceil(4096);
            let mut known = self.1.borrow_mut();
            if blocks.clone().any(|block| known.bad.contains(&block)) {
                return Err(io::Error::from_raw_os_error(nix::libc::EIO));
            }
            known.read.extend(blocks);
        }
        self.0.read(batch)
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        self.0.write(batch)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

fn copy_out(store: &mut Store, chunks: impl Iterator<Item = u64>) {
    let ops: Vec<Op> = chunks.map(|c| Op::OriginWrite(Chunk(c))).collect();
    for group in ops.chunks(100) {
        let answers = store.commit(group).expect("commit");
        assert!(answers.iter().all(|answer| *answer == Ok(Done::Unique)));
    }
}

/// A store whose index has some dozens of leaves, of snapshot 1, and nothing in the cache; and its blocks.
fn store() -> (Store, Rc<RefCell<Blocks>>) {
    let machine = SHAPE.machine();
    SHAPE.initialize(&machine);
    let blocks = Rc::new(RefCell::new(Blocks::default()));
    let open = || {
        let meta = Failing(Box::new(machine.device(META)), blocks.clone());
        let devices = Devices {
            origin: Box::new(machine.device(ORIGIN)),
            data: Box::new(machine.device(DATA)),
            meta: Some(Box::new(meta)),
        };
        let options = OpenOptions { cache_bytes: 0 };
        Store::open(devices, &options).expect("open").0
    };
    let mut store = open();
    store.create(SnapTag(1), 1).expect("create").expect("free");
    // Every second one, so that others have leaves of their own between them.
    copy_out(&mut store, (0..20_000).step_by(2));
    store.close().expect("close");
    (open(), blocks)
}

/// Does background steps to the end, or until so many have failed one after the other; how many failed.
fn work(store: &mut Store) -> u64 {
    let (mut failed, mut in_a_row) = (0, 0);
    while in_a_row < 5 {
        match store.background_step(64) {
            Ok(true) => in_a_row = 0,
            Ok(false) => break,
            Err(_) => {
                failed += 1;
                in_a_row += 1;
            }
        }
    }
    failed
}

/// The leaves of the index in the order of their keys, as a sweep that finds nothing reads them.
fn leaves(store: &mut Store, blocks: &Rc<RefCell<Blocks>>) -> Vec<u64> {
    let mut place = ddsnap::store::dump::DumpPlace::START;
    let mut leaves = Vec::new();
    loop {
        blocks.borrow_mut().read.clear();
        let (_, next) = store.dump_step(place, 0..=u64::MAX, 1).expect("dump");
        if let Some(&last) = blocks.borrow().read.last() {
            if leaves.last() != Some(&last) {
                leaves.push(last);
            }
        }
        match next {
            Some(next) => place = next,
            None => return leaves,
        }
    }
}

/// The sweep came to a leaf that could not be read and stayed there: nothing behind it was ever freed, of
/// any snapshot.
#[test]
fn a_leaf_that_cannot_be_read_does_not_stop_the_sweep() {
    let (mut store, blocks) = store();
    let leaves = leaves(&mut store, &blocks);
    assert!(leaves.len() > 15, "{} leaves", leaves.len());
    let (near, far) = (leaves[5], leaves[leaves.len() / 2]);
    blocks.borrow_mut().bad = vec![near, far];
    store.delete(SnapTag(1)).expect("delete").expect("there");
    let failed = work(&mut store);
    assert!(failed > 0, "the leaves were not met");
    let free = |store: &Store| {
        let status = store.status();
        (status.data_chunks - status.free_chunks, status.deleting)
    };
    let (left, deleting) = free(&store);
    println!("{left} chunks are left of 10000, {failed} steps failed");
    assert!((1..1500).contains(&left), "{left} chunks are not freed");
    assert_eq!(
        deleting, 1,
        "its entries in the bad leaves are not forgotten"
    );
    let told = store.take_troubles();
    assert_eq!(told.len(), 2, "{told:?}");
    assert!(told[0].contains("cannot read"), "{told:?}");
    // Another snapshot comes and goes, with chunks that the bad leaves do not have.
    store.create(SnapTag(2), 2).expect("create").expect("free");
    copy_out(&mut store, (18_000..20_000).step_by(2));
    store.delete(SnapTag(2)).expect("delete").expect("there");
    work(&mut store);
    assert_eq!(free(&store), (left, 2));
    // The disk can be read again: all of it is freed.
    blocks.borrow_mut().bad.clear();
    work(&mut store);
    assert_eq!(free(&store), (0, 0));
    store.audit(true).expect("sound");
}

/// What could not be read once was passed by, or the pass began anew.
#[test]
fn a_leaf_that_cannot_be_read_once_is_read_in_its_place() {
    let (mut store, blocks) = store();
    let leaves = leaves(&mut store, &blocks);
    store.delete(SnapTag(1)).expect("delete").expect("there");
    blocks.borrow_mut().bad = vec![leaves[5]];
    while store.background_step(64).is_ok() {}
    blocks.borrow_mut().bad.clear();
    assert_eq!(work(&mut store), 0);
    assert_eq!(store.take_troubles(), Vec::<String>::new());
    assert_eq!(store.status().deleting, 0);
    store.audit(true).expect("sound");
}
