// SPDX-License-Identifier: GPL-2.0-only
//! How long a request waits at most: what one group or one lookup does must follow what was asked, not
//! how large the index is or how much of it was deleted.

mod harness;

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use ddsnap::device::{BlockDevice, Read, Write};
use ddsnap::store::{
    Budget, Devices, Done, Location, Op, OpError, OpenOptions, ResizeRequest, Store,
};
use ddsnap::units::{Chunk, SnapTag};
use harness::shape::{DATA, META, ORIGIN, Shape};

/// Processor time of this thread: what the disks of these tests take, however busy the machine is.
fn processor() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    let first = text
        .split(' ')
        .next()
        .and_then(|number| number.parse().ok());
    Duration::from_nanos(first.expect("a number"))
}

/// As dense as can be: all of the first chunks have an exception.
const DENSE: Shape = Shape {
    chunk_bytes: 512,
    origin_chunks: 420_000,
    lacking_sectors: 0,
    data_bytes: 260 << 20,
    meta_bytes: 1 << 30,
    snapshots: 2,
};

/// A lookup walked over all entries that a sweep had removed since the last checkpoint, up to the next
/// one that was still there: a group of 256 took 4.5 s instead of 3 ms.
#[test]
fn a_group_during_a_sweep_takes_less_than_100_ms() {
    let machine = DENSE.machine();
    DENSE.initialize(&machine);
    let options = OpenOptions {
        cache_bytes: 128 << 20,
    };
    let mut store = Store::open(DENSE.devices(&machine), &options).unwrap().0;
    store.create(SnapTag(1), 1).unwrap().unwrap();
    let chunks: Vec<Op> = (0..390_000).map(|c| Op::OriginWrite(Chunk(c))).collect();
    for group in chunks.chunks(4096) {
        let answers = store.commit(group).unwrap();
        assert!(answers.iter().all(|answer| *answer == Ok(Done::Unique)));
    }
    store.create(SnapTag(2), 2).unwrap().unwrap();
    store.close().unwrap();
    let mut store = Store::open(DENSE.devices(&machine), &options).unwrap().0;
    store
        .delete(SnapTag(1))
        .expect("the store works")
        .expect("it is there");
    let (mut steps, mut next) = (0u64, 0);
    let (mut worst, mut worst_reads) = (Duration::ZERO, Duration::ZERO);
    let mut more = true;
    while more {
        more = store.background_step(256).unwrap();
        steps += 1;
        if steps % 300 != 0 && more {
            continue;
        }
        // A group of 256 sequential writes at the start of the volume, now and then, and as many reads.
        let chunks = next..next + 256;
        let ops: Vec<Op> = chunks.map(|c| Op::OriginWrite(Chunk(c))).collect();
        next += 256;
        let started = processor();
        store.commit(&ops).unwrap();
        worst = worst.max(processor() - started);
        let started = processor();
        for chunk in (100_000..100_256).map(Chunk) {
            let location = store.locate(SnapTag(2), chunk).unwrap();
            assert_eq!(location, Ok(Location::Origin));
        }
        worst_reads = worst_reads.max(processor() - started);
    }
    println!("a group of 256: {worst:?}, 256 reads: {worst_reads:?}");
    assert!(
        worst.max(worst_reads).as_millis() < 100,
        "{worst:?}, {worst_reads:?}"
    );
}

/// After a crash it is looked for free chunks from the beginning on, and there is much for a checkpoint to do. The first
/// group, which needed but a free chunk, waited until all of the checkpoint was done: 3.3 s at ten million exceptions.
#[test]
fn who_looks_for_a_free_chunk_does_not_wait_for_a_checkpoint() {
    let shape = Shape {
        origin_chunks: 700_000,
        data_bytes: 400 << 20,
        ..DENSE
    };
    let machine = shape.machine();
    shape.initialize(&machine);
    let options = OpenOptions {
        cache_bytes: 1 << 20,
    };
    let open = || Store::open(shape.devices(&machine), &options).expect("it opens");
    let mut store = open().0;
    store
        .create(SnapTag(1), 1)
        .expect("the store works")
        .expect("created");
    let mut next = 0;
    while next < 500_000 || !store.is_checkpoint_under_way() {
        let ops: Vec<Op> = (next..next + 256)
            .map(|chunk| Op::OriginWrite(Chunk(chunk)))
            .collect();
        next += 256;
        let answers = store.commit(&ops).expect("the store works");
        assert!(answers.iter().all(|answer| *answer == Ok(Done::Unique)));
    }
    // Opening looks for places for the copies of the last record: of one.
    let answers = store.commit(&[Op::OriginWrite(Chunk(next))]);
    assert_eq!(answers.expect("the store works"), [Ok(Done::Unique)]);
    drop(store);
    let (mut store, opened) = open();
    assert!(!opened.clean);
    store.set_budget(Budget::LEAST);
    let op = [Op::OriginWrite(Chunk(next + 1))];
    let answers = store.commit(&op).expect("the store works");
    assert_eq!(answers, [Err(OpError::Wait)]);
    let mut steps = 0;
    while store.is_making_room() {
        store.background_step(256).expect("the store works");
        steps += 1;
    }
    assert!(steps < 10, "{steps} steps");
    let answers = store.commit(&op).expect("the store works");
    assert_eq!(answers, [Ok(Done::Unique)]);
}

/// Counts what is asked of a device.
struct Counted {
    inner: Box<dyn BlockDevice>,
    /// Reads of single places.
    reads: Rc<Cell<u64>>,
}

impl BlockDevice for Counted {
    fn len_bytes(&self) -> u64 {
        self.inner.len_bytes()
    }

    fn alignment(&self) -> usize {
        self.inner.alignment()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> io::Result<()> {
        self.reads.set(self.reads.get() + batch.len() as u64);
        self.inner.read(batch)
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        self.inner.write(batch)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// A store whose reads of metadata are counted, with one snapshot that has so many exceptions and fills
/// it but for 2,000 chunks, and its shape.
fn filled(old: u64, cache_bytes: u64) -> (Store, Rc<Cell<u64>>) {
    let shape = Shape {
        chunk_bytes: 512,
        origin_chunks: old + 10_000,
        lacking_sectors: 0,
        data_bytes: (old + 2000) * 512,
        meta_bytes: 64 << 20,
        snapshots: 3,
    };
    let machine = shape.machine();
    shape.initialize(&machine);
    let reads = Rc::new(Cell::new(0));
    let meta = Counted {
        inner: Box::new(machine.device(META)),
        reads: reads.clone(),
    };
    let devices = Devices {
        origin: Box::new(machine.device(ORIGIN)),
        data: Box::new(machine.device(DATA)),
        meta: Some(Box::new(meta)),
    };
    let mut store = Store::open(devices, &OpenOptions { cache_bytes })
        .expect("the store works")
        .0;
    store
        .create(SnapTag(1), 1)
        .expect("the store works")
        .expect("the store works");
    store
        .set_priority(SnapTag(1), 127)
        .expect("the store works")
        .expect("the store works");
    let chunks: Vec<Op> = (0..old).map(|c| Op::OriginWrite(Chunk(c))).collect();
    for group in chunks.chunks(4096) {
        let answers = store.commit(group).expect("the store works");
        assert!(answers.iter().all(|answer| *answer == Ok(Done::Unique)));
    }
    store
        .create(SnapTag(2), 2)
        .expect("the store works")
        .expect("the store works");
    (store, reads)
}

/// Reads of metadata by the worst of 4,000 commits of a chunk, half of which find the store full, with
/// background steps after each one.
fn reads_of_the_worst_commit(old: u64) -> u64 {
    let (mut store, reads) = filled(old, 1 << 20);
    let (mut worst, mut worst_step) = (0, 0);
    let mut refused = 0;
    for chunk in old..old + 4000 {
        let before = reads.get();
        let answers = store
            .commit(&[Op::OriginWrite(Chunk(chunk))])
            .expect("the store works");
        refused += u64::from(answers == [Err(OpError::StoreFull)]);
        worst = worst.max(reads.get() - before);
        let before = reads.get();
        let _ = store.background_step(256).expect("the store works");
        worst_step = worst_step.max(reads.get() - before);
    }
    println!("{old} exceptions: {worst} reads of a commit, {worst_step} of a step");
    assert!(worst_step <= 40, "{worst_step} reads of a background step");
    // It was full, and neither snapshot can be given up: one is protected, and the other has nothing of its own.
    assert!(refused > 1000, "{refused}");
    worst
}

/// To make room a commit swept the whole index: what it read grew with that, 368 blocks at 200,000
/// exceptions.
#[test]
fn a_commit_on_a_full_store_does_bounded_work() {
    let small = reads_of_the_worst_commit(20_000);
    let large = reads_of_the_worst_commit(200_000);
    assert!(
        large <= 40,
        "{small} reads, and {large} of ten times as many"
    );
}

/// A full store whose snapshot with so many exceptions was deleted, with an index much larger than the cache.
fn sweeping(old: u64, budget: Budget) -> Store {
    let (mut store, _) = filled(old, 1 << 20);
    store
        .delete(SnapTag(1))
        .expect("the store works")
        .expect("it is there");
    store.set_budget(budget);
    store
}

/// Operations of the metadata's device by the worst of 60,000 commits of a chunk each, all over the
/// volume, with an index much larger than the cache, a sweep and checkpoints, and a background step after
/// each one.
fn operations_of_the_worst_commit(budget: Budget) -> u64 {
    let old = 200_000;
    let mut store = sweeping(old, budget);
    let mut worst = 0;
    for turn in 0..60_000 {
        let chunk = turn * 7919 % old;
        let before = store.operations();
        store
            .commit(&[Op::OriginWrite(Chunk(chunk))])
            .expect("the store works");
        worst = worst.max(store.operations() - before);
        let _ = store.background_step(256).expect("the store works");
    }
    println!("{budget:?}: {worst} operations");
    worst
}

/// A disk that takes 8 ms to seek made a request wait for what a fast one does in passing.
#[test]
fn a_commit_on_a_slow_disk_does_less_for_others() {
    let fast = operations_of_the_worst_commit(Budget::MOST);
    let slow = operations_of_the_worst_commit(Budget::LEAST);
    assert!(slow < fast, "{slow} operations, {fast} on a fast disk");
    assert!(slow <= 4, "{slow} operations");
}

/// Operations of the metadata's device by the worst step of a resize that takes half of a full store and the end of the
/// origin, and by the worst background step meanwhile.
fn operations_of_the_worst_resize_step(budget: Budget) -> (u64, u64) {
    let old = 200_000;
    let mut store = sweeping(old, budget);
    let (mut worst, mut background) = (0, 0);
    let half_of_the_store = ResizeRequest {
        store: Some((old / 2 + 2000) * 512),
        ..ResizeRequest::default()
    };
    let end_of_the_origin = ResizeRequest {
        origin: Some((old + 5000) * 512),
        ..ResizeRequest::default()
    };
    for request in [half_of_the_store, end_of_the_origin] {
        store
            .resize_begin(&request)
            .expect("the store works")
            .expect("it is possible");
        loop {
            let before = store.operations();
            let step = store.resize_step().expect("the store works");
            worst = worst.max(store.operations() - before);
            if step.expect("there is room").is_some() {
                break;
            }
            let before = store.operations();
            let _ = store.background_step(256).expect("the store works");
            background = background.max(store.operations() - before);
        }
    }
    println!("{budget:?}: {worst} operations of a step, {background} of a background step");
    (worst, background)
}

/// What a resize looks at, copies and moves out of the way grows with the volume: a step of it must not.
#[test]
fn a_step_of_a_resize_does_bounded_work() {
    let (fast, fast_background) = operations_of_the_worst_resize_step(Budget::MOST);
    let (slow, slow_background) = operations_of_the_worst_resize_step(Budget::LEAST);
    assert!(
        fast <= 40 && fast_background <= 40,
        "{fast}, {fast_background}"
    );
    assert!(slow <= fast && slow_background <= fast_background);
    assert!(
        slow <= 16 && slow_background <= 16,
        "{slow}, {slow_background}"
    );
}

/// Nobody does background steps here: even so nothing is done in a request that would take long.
#[test]
fn without_background_steps_a_commit_waits_and_does_nothing() {
    let old = 200_000;
    let (mut store, reads) = filled(old, 1 << 20);
    for chunk in old..old + 4000 {
        let before = reads.get();
        store
            .commit(&[Op::OriginWrite(Chunk(chunk))])
            .expect("the store works");
        assert!(reads.get() - before < 50, "{} reads", reads.get() - before);
    }
    assert!(store.is_making_room());
    assert_eq!(store.take_given_up(), []);
}
