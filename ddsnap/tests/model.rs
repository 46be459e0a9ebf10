// SPDX-License-Identifier: GPL-2.0-only
//! A long random workload with restarts, no crashes: contents, answers and the choice of victims must
//! be what a plain map says.

mod harness;

use ddsnap::device::memory::{Rng, Survival};
use ddsnap::store::{OpError, OpenOptions, SnapState, Store};
use ddsnap::units::{Chunk, SnapTag};
use harness::check::check;
use harness::operations::OperationsRun;
use harness::shape::{Shape, shape};
use harness::victims::commit;
use harness::volume::Volume;
use harness::workload::Step;
use harness::{number_from_env, seed};

/// Gives how many snapshots were given up.
fn run(shape: Shape, operations: u64) -> u64 {
    let operations = number_from_env("DDSNAP_MODEL_OPERATIONS", operations);
    let mut run = OperationsRun::new(shape, seed());
    if let Err(problem) = run.run(operations) {
        let place = run.place();
        panic!("DDSNAP_CRASH_SEED={} {shape:?}: {place}: {problem}", seed());
    }
    let (given_up, refused) = (run.volume.given_up, run.volume.refused_full);
    println!(
        "seed={} {shape:?} operations={} given_up={given_up} refused={refused}",
        seed(),
        run.operations
    );
    given_up
}

#[test]
fn small_chunks() {
    let given_up = run(
        Shape {
            chunk_bytes: 512,
            origin_chunks: 96,
            lacking_sectors: 0,
            data_bytes: 700 << 10,
            meta_bytes: 0,
            snapshots: 12,
        },
        30_000,
    );
    assert!(given_up > 0, "the workload never filled the store");
}

#[test]
fn a_metadata_device() {
    let given_up = run(
        Shape {
            chunk_bytes: 4096,
            origin_chunks: 64,
            lacking_sectors: 7,
            data_bytes: 1 << 20,
            meta_bytes: 600 << 10,
            snapshots: 10,
        },
        25_000,
    );
    assert!(given_up > 0, "the workload never filled the store");
}

#[test]
fn a_small_volume() {
    let given_up = run(shape("4k"), 25_000);
    assert!(given_up > 0, "the workload never filled the store");
}

#[test]
fn an_index_of_several_levels() {
    run(shape("512-deep"), 20_000);
}

#[test]
fn one_shared_chunk_takes_one_chunk() {
    let shape = Shape {
        chunk_bytes: 4096,
        origin_chunks: 16,
        lacking_sectors: 0,
        data_bytes: 2 << 20,
        meta_bytes: 0,
        snapshots: 16,
    };
    let mut volume = Volume::new(shape);
    (0..16).for_each(|tag| volume.apply(&Step::Create(tag)));
    let free = volume.store.status().free_chunks;
    volume.apply(&Step::Group {
        ops: vec![ddsnap::store::Op::OriginWrite(Chunk(3))],
        write: true,
    });
    assert_eq!(volume.store.status().free_chunks, free - 1);
    let sharing = volume.store.count().unwrap().snapshots;
    assert!(
        sharing
            .iter()
            .all(|(_, sharing)| sharing.shared_by.iter().sum::<u64>() == 1)
    );
    assert!(
        sharing
            .iter()
            .all(|(_, sharing)| sharing.shared_by[15] == 1)
    );
    // A write to one snapshot touches no other.
    volume.apply(&Step::Group {
        ops: vec![ddsnap::store::Op::SnapshotWrite(SnapTag(5), Chunk(3))],
        write: true,
    });
    let model = volume.model.clone();
    check(&shape, &volume.machine, &mut volume.store, &model, &model).unwrap();
}

#[test]
fn a_snapshot_in_use_is_not_deleted_and_its_chunks_stay_until_it_is_quiet() {
    let shape = Shape {
        chunk_bytes: 4096,
        origin_chunks: 200,
        lacking_sectors: 0,
        data_bytes: 1 << 20,
        meta_bytes: 0,
        snapshots: 4,
    };
    let mut volume = Volume::new(shape);
    volume.apply(&Step::Create(1));
    volume.store.set_in_use(SnapTag(1), true);
    assert_eq!(
        volume.store.delete(SnapTag(1)).unwrap(),
        Err(OpError::InUse(SnapTag(1)))
    );
    let all =
        |volume: &Volume| volume.store.status().data_chunks - volume.store.status().free_chunks;
    let mut refused = false;
    for chunk in 0..200 {
        let op = ddsnap::store::Op::OriginWrite(Chunk(chunk));
        let answer = commit(&mut volume.store, &[op])[0];
        refused |= answer == Err(OpError::StoreFull);
    }
    assert_eq!(volume.store.draining(), [SnapTag(1)]);
    assert!(
        !refused,
        "with the only snapshot squashed every chunk is unique"
    );
    while volume.store.background_step(100).unwrap() {}
    assert!(
        all(&volume) > 0,
        "chunks were freed under a connected device"
    );
    // Another server does not know whether the device has I/O under way.
    let killed = volume
        .machine
        .moment()
        .cut(Survival::ProcessKilled, &mut Rng::new(1));
    let options = OpenOptions {
        cache_bytes: 1 << 16,
    };
    let (mut next, _) = Store::open(shape.devices(&killed), &options).unwrap();
    assert_eq!(next.draining(), [SnapTag(1)]);
    while next.background_step(100).unwrap() {}
    assert_eq!(
        next.delete(SnapTag(1)).unwrap(),
        Err(OpError::InUse(SnapTag(1)))
    );
    let used = |store: &Store| store.status().data_chunks - store.status().free_chunks;
    assert!(
        used(&next) > 0,
        "chunks were freed before devices are known"
    );
    next.set_quiet(SnapTag(1));
    while next.background_step(100).unwrap() {}
    assert_eq!(used(&next), 0);
    assert_eq!(next.delete(SnapTag(1)).unwrap(), Ok(()));
    drop(next);

    volume.store.set_quiet(SnapTag(1));
    while volume.store.background_step(100).unwrap() {}
    assert_eq!(all(&volume), 0);
    assert_eq!(
        volume.store.delete(SnapTag(1)).unwrap(),
        Err(OpError::InUse(SnapTag(1))),
        "quiet is not gone"
    );
    assert_eq!(
        volume.store.snapshot(SnapTag(1)).unwrap().state,
        SnapState::Squashed
    );
}

#[test]
fn four_thousand_snapshots_and_no_more() {
    let shape = Shape {
        chunk_bytes: 4096,
        origin_chunks: 8,
        lacking_sectors: 0,
        data_bytes: 64 << 20,
        meta_bytes: 0,
        snapshots: 4096,
    };
    let mut volume = Volume::new(shape);
    for tag in 0..4096 {
        volume
            .store
            .create(SnapTag(tag), i64::from(tag))
            .unwrap()
            .unwrap();
        volume
            .store
            .adjust_usecount(SnapTag(tag), 1)
            .unwrap()
            .unwrap();
    }
    assert_eq!(
        volume.store.create(SnapTag(9999), 0).unwrap(),
        Err(OpError::TooManySnapshots)
    );
    assert_eq!(volume.store.adjust_usecount(SnapTag(7), -1).unwrap(), Ok(0));
    assert_eq!(volume.store.create(SnapTag(9999), 0).unwrap(), Ok(()));
    assert_eq!(volume.store.snapshot(SnapTag(7)), None);
    let answer = volume
        .store
        .commit(&[ddsnap::store::Op::OriginWrite(Chunk(0))])
        .unwrap();
    assert_eq!(answer, [Ok(ddsnap::store::Done::Unique)]);
    let sharing = volume.store.count().unwrap().snapshots;
    assert_eq!(sharing.len(), 4096);
    assert_eq!(sharing[0].1.shared_by.len(), ddsnap::store::MANY + 1);
    let (store, _) = shape.open(&volume.machine).unwrap();
    assert_eq!(store.snapshots().len(), 4096);
}

#[test]
fn a_full_store_can_still_delete_and_recovers_its_room() {
    for meta_bytes in [0, 600 << 10] {
        let shape = Shape {
            chunk_bytes: 512,
            origin_chunks: 4000,
            lacking_sectors: 0,
            data_bytes: 1 << 20,
            meta_bytes,
            snapshots: 4,
        };
        let mut volume = Volume::new(shape);
        volume.store.create(SnapTag(1), 1).unwrap().unwrap();
        volume.store.set_priority(SnapTag(1), 127).unwrap().unwrap();
        let mut full = 0;
        for chunk in 0..4000 {
            // Scattered, so that the index grows as fast as it can.
            let chunk = Chunk(chunk * 1237 % 4000);
            let op = ddsnap::store::Op::OriginWrite(chunk);
            let answer = commit(&mut volume.store, &[op])[0];
            full += u64::from(answer == Err(OpError::StoreFull));
        }
        assert!(full > 0);
        volume.store.audit(true).unwrap();
        assert_eq!(volume.store.delete(SnapTag(1)).unwrap(), Ok(()));
        while volume.store.background_step(100).unwrap() {}
        let status = volume.store.status();
        assert_eq!(
            (status.free_chunks, status.deleting),
            (status.data_chunks, 0)
        );
    }
}
