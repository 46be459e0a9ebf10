// SPDX-License-Identifier: GPL-2.0-only
//! A long random workload with restarts, no crashes: contents, answers and the choice of victims must
//! be what a plain map says.

mod harness;

use ddsnap::device::memory::Rng;
use ddsnap::store::{OpError, SnapState};
use ddsnap::units::{Chunk, SnapTag};
use harness::model::Model;
use harness::volume::{Shape, Step, Volume, check, choose};
use harness::{number_from_env, seed};

/// The snapshot to give up, by compat.md §5: unused before used, least priority, oldest; never 127.
fn victim(model: &Model) -> Option<u32> {
    let live = model
        .snapshots
        .iter()
        .filter(|(_, s)| s.state == SnapState::Live && s.priority < 127);
    live.min_by_key(|(_, s)| (s.usecount > 0, s.priority, s.created))
        .map(|(&tag, _)| tag)
}

fn run(shape: Shape, steps: u64) {
    let steps = number_from_env("DDSNAP_MODEL_STEPS", steps);
    let mut rng = Rng::new(seed());
    let mut volume = Volume::new(shape);
    for number in 0..steps {
        let step = choose(&mut rng, &shape, &volume.model, &mut volume.next_tag);
        let before = volume.model.clone();
        let (given_up, refused) = (volume.given_up, volume.refused_full);
        volume.apply(&step);
        let context = || {
            format!(
                "DDSNAP_CRASH_SEED={} {shape:?} step {number} {step:?}",
                seed()
            )
        };
        if volume.given_up > given_up {
            let first = victim(&before)
                .unwrap_or_else(|| panic!("{}: gave up a snapshot in vain", context()));
            let old = &before.snapshots[&first];
            match volume.model.snapshots.get(&first) {
                Some(now) if now.created == old.created => {
                    assert!(
                        old.usecount > 0 && now.state == SnapState::Squashed,
                        "{}: spared {first}",
                        context()
                    );
                }
                _ => assert_eq!(
                    old.usecount,
                    0,
                    "{}: deleted {first}, which is in use",
                    context()
                ),
            }
        }
        if volume.refused_full > refused && matches!(step, Step::Group { .. }) {
            assert_eq!(
                victim(&volume.model),
                None,
                "{}: refused while there is a victim",
                context()
            );
        }
        if number % 64 == 0 || number + 1 == steps {
            let model = volume.model.clone();
            check(&shape, &volume.machine, &mut volume.store, &model, &model)
                .unwrap_or_else(|problem| panic!("{}: {problem}", context()));
            volume
                .store
                .audit(true)
                .unwrap_or_else(|error| panic!("{}: {error}", context()));
            sharing_is_right(&mut volume, &shape);
        }
    }
    println!(
        "seed={} {shape:?} steps={steps} given_up={} refused={}",
        seed(),
        volume.given_up,
        volume.refused_full
    );
    assert!(volume.given_up > 0, "the workload never filled the store");
}

/// `sharing` counts each exception for every live snapshot that it serves: compare with asking for
/// each chunk of each snapshot where it lies.
fn sharing_is_right(volume: &mut Volume, shape: &Shape) {
    use std::collections::{BTreeMap, BTreeSet};
    let live: Vec<u32> = volume
        .store
        .snapshots()
        .iter()
        .filter(|s| s.state == SnapState::Live)
        .map(|s| s.tag.0)
        .collect();
    let mut users: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
    for &tag in &live {
        for chunk in 0..shape.origin_chunks {
            let location = volume
                .store
                .locate(SnapTag(tag), Chunk(chunk))
                .expect("locate")
                .expect("live");
            if let ddsnap::store::Location::Store(place) = location {
                users.entry(place.0).or_default().insert(tag);
            }
        }
    }
    let sharing: BTreeMap<_, _> = volume
        .store
        .sharing()
        .expect("sharing")
        .into_iter()
        .collect();
    for &tag in &live {
        let seen = users.values().filter(|tags| tags.contains(&tag)).count() as u64;
        let counted: u64 = sharing[&SnapTag(tag)].shared_by.iter().sum();
        // An exception hidden by an overlay is counted too: its chunk is in use.
        assert!(
            counted >= seen,
            "snapshot {tag} uses {seen} chunks, {counted} were counted"
        );
        let overlaid = counted - seen;
        assert!(
            overlaid <= shape.origin_chunks,
            "snapshot {tag}: {overlaid} chunks too many"
        );
    }
}

#[test]
fn small_chunks() {
    run(
        Shape {
            chunk_bytes: 512,
            origin_chunks: 96,
            data_bytes: 700 << 10,
            meta_bytes: 0,
            snapshots: 12,
        },
        6000,
    );
}

#[test]
fn a_metadata_device() {
    run(
        Shape {
            chunk_bytes: 4096,
            origin_chunks: 64,
            data_bytes: 1 << 20,
            meta_bytes: 600 << 10,
            snapshots: 10,
        },
        3000,
    );
}

#[test]
fn one_shared_chunk_takes_one_chunk() {
    let shape = Shape {
        chunk_bytes: 4096,
        origin_chunks: 16,
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
    let sharing = volume.store.sharing().unwrap();
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
fn a_snapshot_in_use_is_not_deleted_and_its_chunks_stay_until_it_is_not() {
    let shape = Shape {
        chunk_bytes: 4096,
        origin_chunks: 200,
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
        let answer = volume
            .store
            .commit(&[ddsnap::store::Op::OriginWrite(Chunk(chunk))])
            .unwrap()[0];
        refused |= answer == Err(OpError::StoreFull);
    }
    assert_eq!(volume.store.waiting_for_disconnect(), [SnapTag(1)]);
    assert!(
        !refused,
        "with the only snapshot squashed every chunk is unique"
    );
    while volume.store.background_step(100).unwrap() {}
    assert!(
        all(&volume) > 0,
        "chunks were freed under a connected device"
    );
    volume.store.set_in_use(SnapTag(1), false);
    while volume.store.background_step(100).unwrap() {}
    assert_eq!(all(&volume), 0);
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
    let sharing = volume.store.sharing().unwrap();
    assert_eq!((sharing.len(), sharing[0].1.shared_by.len()), (4096, 4096));
    let (store, _) = shape.open(&volume.machine).unwrap();
    assert_eq!(store.snapshots().len(), 4096);
}

#[test]
fn a_full_store_can_still_delete_and_recovers_its_room() {
    for meta_bytes in [0, 600 << 10] {
        let shape = Shape {
            chunk_bytes: 512,
            origin_chunks: 4000,
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
            let answer = volume
                .store
                .commit(&[ddsnap::store::Op::OriginWrite(chunk)])
                .unwrap()[0];
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
