// SPDX-License-Identifier: GPL-2.0-only
//! A full store: which snapshots are given up for room, which are not, and that making room ends.

mod harness;

use ddsnap::device::BlockDevice;
use ddsnap::device::fault::{Call, Faults, FaultyDevice};
use ddsnap::store::{Devices, Done, Fate, Op, OpError, OpenOptions, Store, StoreError};
use ddsnap::units::{Chunk, SnapTag};
use harness::shape::{DATA, META, ORIGIN, Shape};
use harness::victims::{commit, make_room};
use harness::volume::Volume;
use harness::workload::Step;

const SHAPE: Shape = Shape {
    chunk_bytes: 4096,
    origin_chunks: 400,
    lacking_sectors: 0,
    data_bytes: 1 << 20,
    meta_bytes: 0,
    snapshots: 6,
};

fn write(store: &mut Store, chunk: u64) -> Result<Done, OpError> {
    commit(store, &[Op::OriginWrite(Chunk(chunk))])[0]
}

/// Writes to chunks until there is no room for one more copy, and gives the first that was not
/// written.
fn fill(store: &mut Store, from: u64) -> u64 {
    let mut chunk = from;
    while store.status().free_chunks > 0 {
        assert_eq!(write(store, chunk), Ok(Done::Unique));
        chunk += 1;
    }
    assert_eq!(store.take_given_up(), []);
    chunk
}

fn tags(store: &Store) -> Vec<u32> {
    store.snapshots().iter().map(|s| s.tag.0).collect()
}

fn create(store: &mut Store, tag: u32) {
    store
        .create(SnapTag(tag), 1)
        .expect("the store works")
        .expect("the store works");
}

/// With a snapshot of priority 127 whose chunks were what filled the store, all others were deleted one
/// after another, and the write failed all the same.
#[test]
fn what_frees_nothing_is_not_given_up() {
    let mut volume = Volume::new(SHAPE);
    let store = &mut volume.store;
    create(store, 1);
    store.set_priority(SnapTag(1), 127).unwrap().unwrap();
    let next = fill(store, 0);
    (2..6).for_each(|tag| create(store, tag));
    store.set_in_use(SnapTag(5), true);
    for chunk in next..next + 5 {
        assert_eq!(write(store, chunk), Err(OpError::StoreFull));
    }
    assert_eq!(store.take_given_up(), []);
    assert_eq!(tags(store), [1, 2, 3, 4, 5]);
    store.audit(true).unwrap();
    // When it may be given up it is, and nothing else.
    store.set_priority(SnapTag(1), 126).unwrap().unwrap();
    assert_eq!(write(store, next), Ok(Done::Unique));
    assert_eq!(store.take_given_up(), [(SnapTag(1), Fate::Deleted)]);
    store.audit(true).unwrap();
}

/// Chunks that two snapshots share come free when both are gone. The first was given up, which freed
/// nothing, then the next one by age, whatever it freed.
#[test]
fn snapshots_that_share_all_they_have_go_together_and_no_other() {
    let mut volume = Volume::new(SHAPE);
    let store = &mut volume.store;
    // The first is wanted least, but it shares all it has with one that must stay.
    create(store, 1);
    create(store, 2);
    store.set_priority(SnapTag(1), -5).unwrap().unwrap();
    store.set_priority(SnapTag(2), 127).unwrap().unwrap();
    assert_eq!(write(store, 0), Ok(Done::Unique));
    create(store, 3);
    create(store, 4);
    // The first of these copies is for the two youngest alone, the others are for all.
    for chunk in 0..10 {
        assert_eq!(write(store, chunk), Ok(Done::Unique));
    }
    create(store, 5);
    create(store, 6);
    // And so again: ten for the two youngest alone.
    let next = fill(store, 0);
    assert_eq!(tags(store), [1, 2, 3, 4, 5, 6]);
    create(store, 7);
    assert_eq!(write(store, next), Ok(Done::Unique));
    assert_eq!(
        store.take_given_up(),
        [(SnapTag(3), Fate::Deleted), (SnapTag(4), Fate::Deleted)]
    );
    store.audit(true).unwrap();
    assert_eq!(write(store, next + 1), Ok(Done::Unique));
    assert_eq!(
        store.take_given_up(),
        [(SnapTag(5), Fate::Deleted), (SnapTag(6), Fate::Deleted)]
    );
    assert_eq!(tags(store), [1, 2, 7]);
    store.audit(true).unwrap();
}

/// Whatever is dead is freed before a snapshot is given up, in steps between which other requests are
/// answered; and not more of it in one request than in another, however much there is.
#[test]
fn nothing_is_given_up_while_the_sweep_has_something_to_free() {
    let mut volume = Volume::new(SHAPE);
    let store = &mut volume.store;
    create(store, 1);
    let next = fill(store, 0);
    create(store, 2);
    store.delete(SnapTag(1)).unwrap().unwrap();
    let answers = store.commit(&[Op::OriginWrite(Chunk(next))]).unwrap();
    assert_eq!(answers, [Err(OpError::Wait)]);
    assert!(store.is_making_room());
    make_room(store);
    assert_eq!(write(store, next), Ok(Done::Unique));
    assert_eq!(store.take_given_up(), []);
    assert_eq!(tags(store), [2]);
}

/// A sector that could not be read ended the sweep's pass: what it had not freed was lost until a
/// restart, and a full store gave up a live snapshot instead.
#[test]
fn a_sweep_that_cannot_read_goes_on_when_it_can() {
    let shape = Shape {
        chunk_bytes: 512,
        origin_chunks: 40_000,
        lacking_sectors: 0,
        data_bytes: 8 << 20,
        meta_bytes: 4 << 20,
        snapshots: 3,
    };
    let machine = shape.machine();
    shape.initialize(&machine);
    let faults = Faults::default();
    let meta = FaultyDevice::new(machine.device(META), faults.clone());
    let devices = Devices {
        origin: Box::new(machine.device(ORIGIN)),
        data: Box::new(machine.device(DATA)),
        meta: Some(Box::new(meta) as Box<dyn BlockDevice>),
    };
    let (mut store, _) = Store::open(devices, &OpenOptions { cache_bytes: 0 }).unwrap();
    create(&mut store, 1);
    let next = fill(&mut store, 0);
    create(&mut store, 2);
    store.delete(SnapTag(1)).unwrap().unwrap();
    faults.fail_from(Call::Read, 2);
    let mut failed = 0;
    for _ in 0..200 {
        let answer = store.commit(&[Op::OriginWrite(Chunk(next))]);
        match answer {
            Ok(answers) => {
                assert!(answers[0] == Err(OpError::Wait) || answers[0] == Ok(Done::Unique));
            }
            Err(error) => assert!(matches!(error, StoreError::Read { .. }), "{error}"),
        }
        failed += u32::from(store.background_step(16).is_err());
        assert_eq!(store.failure(), None);
        assert_eq!(store.take_given_up(), []);
    }
    assert!(failed > 100, "{failed}");
    faults.mend();
    assert_eq!(write(&mut store, next), Ok(Done::Unique));
    while store.background_step(64).unwrap() {}
    let status = store.status();
    assert!(status.data_chunks - status.free_chunks <= 1, "all is freed");
    assert_eq!(tags(&store), [2]);
    store.audit(true).unwrap();
}

/// A store without room answers each request in finite time, whichever snapshots it may give up.
#[test]
fn making_room_comes_to_an_end_for_metadata_too() {
    for (priority, meta_bytes) in [(0, 0), (127, 0), (0, 600 << 10), (127, 600 << 10)] {
        let shape = Shape {
            chunk_bytes: 512,
            origin_chunks: 6000,
            lacking_sectors: 0,
            data_bytes: 3 << 20,
            meta_bytes,
            snapshots: 3,
        };
        let mut volume = Volume::new(shape);
        for round in 0..3u64 {
            let tag = round as u32;
            volume.apply(&Step::Create(tag));
            volume.apply(&Step::Priority(tag, priority));
            for chunk in 0..2500 {
                // Scattered, so that the index grows as fast as it can.
                let chunk = (chunk * 1237 + round) % 6000;
                match write(&mut volume.store, chunk) {
                    Ok(Done::Unique) | Err(OpError::StoreFull) => {}
                    other => panic!("{other:?}"),
                }
            }
        }
        let given_up = volume.store.take_given_up().len();
        assert_eq!(given_up > 0, priority == 0);
        volume.store.audit(true).unwrap();
    }
}
