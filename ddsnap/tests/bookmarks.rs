// SPDX-License-Identifier: GPL-2.0-only
//! Bookmarks: what changed since is known, with no data kept.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod harness;

use std::collections::BTreeSet;

use ddsnap::device::memory::{Event, Machine, Rng, Survival};
use ddsnap::device::{BlockDevice, Read, Write};
use ddsnap::format::BLOCK_LEN;
use ddsnap::format::superblock::{COPIES, Superblock};
use ddsnap::store::check::{CheckDevices, CheckOptions, Repaired, repair};
use ddsnap::store::dump::{DumpEntry, DumpPlace};
use ddsnap::store::{
    Done, Fate, Op, OpError, OpenOptions, OriginUse, ResizeRequest, RevertError, SnapState, Store,
    StoreError, Surroundings,
};
use ddsnap::units::{Chunk, SnapTag};
use harness::shape::{DATA, META, ORIGIN, Shape};
use harness::victims::commit;

const SHAPE: Shape = Shape {
    chunk_bytes: 4096,
    origin_chunks: 200,
    lacking_sectors: 0,
    data_bytes: 2 << 20,
    meta_bytes: 0,
    snapshots: 8,
};

fn volume(shape: &Shape) -> (Machine, Store) {
    let machine = shape.machine();
    shape.initialize(&machine);
    let (store, _) = shape.open(&machine).unwrap();
    (machine, store)
}

fn snapshot(store: &mut Store, tag: u32) {
    store.create(SnapTag(tag), 5).unwrap().unwrap();
}

fn bookmark(store: &mut Store, tag: u32) {
    store.create_bookmark(SnapTag(tag), 5).unwrap().unwrap();
}

fn write(store: &mut Store, chunks: impl IntoIterator<Item = u64>) {
    let ops: Vec<Op> = chunks
        .into_iter()
        .map(|chunk| Op::OriginWrite(Chunk(chunk)))
        .collect();
    let answers = commit(store, &ops);
    assert!(answers.iter().all(|answer| *answer == Ok(Done::Unique)));
}

/// All background work.
fn settle(store: &mut Store) {
    while store.background_step(64).unwrap() {}
}

fn listed(store: &mut Store, from: u32, to: u32) -> Vec<u64> {
    let mut changes = store.changes(Some(SnapTag(from)), SnapTag(to)).unwrap();
    let mut runs = Vec::new();
    while store
        .changes_step(&mut changes, &mut runs, usize::MAX)
        .unwrap()
        .unwrap()
    {}
    runs.iter()
        .flat_map(|run| run.first.0..run.first.0 + run.chunks)
        .collect()
}

fn entries(store: &mut Store) -> Vec<DumpEntry> {
    let mut all = Vec::new();
    let mut place = Some(DumpPlace::START);
    while let Some(at) = place {
        let (some, next) = store.dump_step(at, 0..=u64::MAX, 1000).unwrap();
        all.extend(some);
        place = next;
    }
    all
}

fn superblocks(machine: &Machine, disk: usize) -> [Superblock; 2] {
    [0, 1].map(|copy| {
        let mut bytes = vec![0; BLOCK_LEN];
        let (offset, into) = (COPIES[copy].to_offset(), &mut bytes[..]);
        machine
            .device(disk)
            .read(&mut [Read { offset, into }])
            .unwrap();
        Superblock::decode(&bytes, copy as u32).unwrap()
    })
}

/// The promise of bookmarks: a first write that only a bookmark needs to know of is one write to the journal and
/// one flush. Nothing is read from the origin, no chunk is taken; and the second time nothing is done.
#[test]
fn a_first_write_that_only_a_bookmark_needs_copies_nothing() {
    let (machine, mut store) = volume(&SHAPE);
    snapshot(&mut store, 1);
    write(&mut store, 0..40);
    bookmark(&mut store, 2);
    // Saved for the snapshot already: only the bookmark lacks to know.
    let free = store.status().free_chunks;
    machine.record();
    write(&mut store, 0..40);
    let events = machine.recorded();
    let writes = |event: &&Event| matches!(event, Event::Write { .. });
    assert_eq!(events.iter().filter(writes).count(), 1);
    assert_eq!(events.len(), 2, "a record and a flush");
    assert_eq!(store.status().free_chunks, free);
    machine.record();
    write(&mut store, 0..40);
    assert_eq!(machine.recorded().len(), 0, "all is known");
    // Not saved yet: one exception serves both.
    write(&mut store, 40..50);
    assert_eq!(store.status().free_chunks, free - 10);
    assert_eq!(entries(&mut store).len(), 40 + 40 + 10);
    store.audit(true).unwrap();
}

/// A list from a bookmark is the one that the snapshot in its place would have given, whatever came and went
/// between.
#[test]
fn a_list_from_a_bookmark_is_that_of_a_snapshot_in_its_place() {
    let mut rng = Rng::new(harness::seed());
    for round in 0..40 {
        let (machine, mut kept) = volume(&SHAPE);
        let (_machine, mut marked) = volume(&SHAPE);
        let mut tags = Vec::new();
        for tag in 1..12 {
            let chunks: BTreeSet<u64> = (0..rng.below(30)).map(|_| rng.below(200)).collect();
            // In one store all are snapshots, in the other some are bookmarks, from the start or later.
            snapshot(&mut kept, tag);
            match rng.below(3) {
                0 => bookmark(&mut marked, tag),
                _ => snapshot(&mut marked, tag),
            }
            tags.push(tag);
            for store in [&mut kept, &mut marked] {
                write(store, chunks.iter().copied());
            }
            if rng.chance(40) {
                let tag = tags[rng.below(tags.len() as u64) as usize];
                marked.turn_to_bookmark(SnapTag(tag)).unwrap().unwrap();
            }
            if rng.chance(20) {
                let gone = tags.swap_remove(rng.below(tags.len() as u64) as usize);
                for store in [&mut kept, &mut marked] {
                    store.delete(SnapTag(gone)).unwrap().unwrap();
                }
            }
            if rng.chance(30) {
                settle(&mut marked);
            }
            if rng.chance(10) {
                drop(kept);
                (kept, _) = SHAPE.open(&machine).unwrap();
            }
        }
        for tag in [20, 21] {
            snapshot(&mut kept, tag);
            snapshot(&mut marked, tag);
        }
        for step in 0..2 {
            for &from in &tags {
                for to in [20, 21].into_iter().chain(tags.iter().copied()) {
                    let live = marked.snapshot(SnapTag(to)).unwrap().state == SnapState::Live;
                    if live {
                        let wanted = listed(&mut kept, from, to);
                        let context = format!("round {round} step {step}: {from} to {to}");
                        assert_eq!(listed(&mut marked, from, to), wanted, "{context}");
                    }
                }
            }
            marked.audit(true).unwrap();
            settle(&mut marked);
        }
    }
}

/// A snapshot that became a bookmark held on to its data, or forgot with it what had changed; chunks that were
/// written to the snapshot itself differ too.
#[test]
fn a_snapshot_that_becomes_a_bookmark_gives_its_data_back_and_keeps_its_changes() {
    let (machine, mut store) = volume(&SHAPE);
    let free = store.status().free_chunks;
    snapshot(&mut store, 1);
    let answers = commit(&mut store, &[Op::SnapshotWrite(SnapTag(1), Chunk(150))]);
    assert!(matches!(answers[0], Ok(Done::Private(_))));
    write(&mut store, 10..30);
    snapshot(&mut store, 2);
    write(&mut store, 20..35);
    let wanted: Vec<u64> = (10..30).chain([150]).collect();
    assert_eq!(listed(&mut store, 1, 2), wanted);
    store.turn_to_bookmark(SnapTag(1)).unwrap().unwrap();
    assert_eq!(listed(&mut store, 1, 2), wanted);
    settle(&mut store);
    // 15 chunks are the second snapshot's.
    assert_eq!(store.status().free_chunks, free - 15);
    assert_eq!(listed(&mut store, 1, 2), wanted);
    store.audit(true).unwrap();
    // Once more, and after a restart: nothing changes. It is read neither as a snapshot nor as a revert's.
    store.turn_to_bookmark(SnapTag(1)).unwrap().unwrap();
    drop(store);
    let (mut store, _) = SHAPE.open(&machine).unwrap();
    assert_eq!(listed(&mut store, 1, 2), wanted);
    let tag = SnapTag(1);
    assert_eq!(
        store.locate(tag, Chunk(10)).unwrap(),
        Err(OpError::Bookmark(tag))
    );
    assert_eq!(
        store.revert_begin(tag).unwrap(),
        Err(RevertError::Bookmark(tag))
    );
    assert_eq!(
        store.changes(Some(SnapTag(2)), tag).err(),
        Some(OpError::Bookmark(tag))
    );
    // Its keys go with it, and nothing else does. Before a server knows all devices none is deleted.
    assert_eq!(store.delete(tag).unwrap(), Err(OpError::InUse(tag)));
    store.set_quiet(tag);
    store.delete(tag).unwrap().unwrap();
    settle(&mut store);
    assert_eq!(entries(&mut store).len(), 15);
    store.audit(true).unwrap();
}

/// With nothing but bookmarks the server said that all of the origin is unique: no write was asked about, and the
/// list was empty.
#[test]
fn nothing_is_unique_while_there_is_a_bookmark() {
    let (_machine, mut store) = volume(&SHAPE);
    assert!(store.origin_is_unique());
    bookmark(&mut store, 1);
    assert!(!store.origin_is_unique());
    store.delete(SnapTag(1)).unwrap().unwrap();
    assert!(store.origin_is_unique());
}

/// A hold that a full store gave up vanished, and the next cycle of a replication was a full copy.
#[test]
fn a_full_store_makes_a_bookmark_of_what_is_set_so() {
    let (_machine, mut store) = volume(&SHAPE);
    snapshot(&mut store, 1);
    store.set_to_bookmark(SnapTag(1), true).unwrap().unwrap();
    write(&mut store, 0..100);
    snapshot(&mut store, 2);
    store.set_priority(SnapTag(2), 127).unwrap().unwrap();
    let mut chunk = 100;
    while store.snapshot(SnapTag(1)).unwrap().state == SnapState::Live {
        write(&mut store, [chunk]);
        chunk += 1;
        if chunk == 200 {
            break;
        }
    }
    // It has 100 chunks that nobody shares.
    let more = store.status().free_chunks;
    if store.snapshot(SnapTag(1)).unwrap().state == SnapState::Live {
        snapshot(&mut store, 3);
        store.set_priority(SnapTag(3), 127).unwrap().unwrap();
        write(&mut store, 0..more + 1);
    }
    assert_eq!(store.take_given_up(), [(SnapTag(1), Fate::Bookmark)]);
    settle(&mut store);
    store.audit(true).unwrap();
    let wanted: Vec<u64> = (0..100).collect();
    assert_eq!(listed(&mut store, 1, 2), wanted);
}

const SMALL_META: Shape = Shape {
    chunk_bytes: 512,
    origin_chunks: 120_000,
    lacking_sectors: 0,
    data_bytes: 1 << 20,
    meta_bytes: 600 << 10,
    snapshots: 4,
};

/// Marks take metadata. When it was full, writes to the origin failed for the sake of a bookmark.
#[test]
fn a_bookmark_goes_before_a_write_fails_for_want_of_metadata() {
    let (_machine, mut store) = volume(&SMALL_META);
    bookmark(&mut store, 1);
    bookmark(&mut store, 2);
    store.set_priority(SnapTag(2), -1).unwrap().unwrap();
    // Every fifth, so that an entry takes as much as it can.
    let groups = || {
        (0..120_000)
            .step_by(500)
            .map(|first| (first..first + 500).step_by(5))
    };
    groups().for_each(|chunks| write(&mut store, chunks));
    let gone = |tag| (SnapTag(tag), Fate::Deleted);
    assert_eq!(store.take_given_up(), [gone(2), gone(1)]);
    store.audit(true).unwrap();
    // One of priority 127 stays, whatever it costs.
    bookmark(&mut store, 3);
    store.set_priority(SnapTag(3), 127).unwrap().unwrap();
    let refused = groups().find_map(|chunks| {
        let ops: Vec<Op> = chunks.map(|chunk| Op::OriginWrite(Chunk(chunk))).collect();
        let answers = commit(&mut store, &ops);
        let full = answers.contains(&Err(OpError::StoreFull));
        full.then_some(ops)
    });
    let refused = refused.expect("there are more chunks than room for marks");
    assert_eq!(store.take_given_up(), []);
    store.set_priority(SnapTag(3), 0).unwrap().unwrap();
    let answers = commit(&mut store, &refused);
    assert!(answers.iter().all(|answer| *answer == Ok(Done::Unique)));
    assert_eq!(store.take_given_up(), [gone(3)]);
    store.audit(true).unwrap();
}

/// The marks of a bookmark in use come free when its user has stopped. Until then one bookmark after the other was
/// squashed for the same need.
#[test]
fn no_bookmark_in_use_is_squashed_while_the_keys_of_another_are_about_to_come_free() {
    let (_machine, mut store) = volume(&SMALL_META);
    for tag in [1, 2] {
        bookmark(&mut store, tag);
        store.set_in_use(SnapTag(tag), true);
    }
    let refused = (0..120_000).step_by(500).find_map(|first| {
        let chunks = (first..first + 500).step_by(5);
        let ops: Vec<Op> = chunks.map(|chunk| Op::OriginWrite(Chunk(chunk))).collect();
        let answers = commit(&mut store, &ops);
        answers.contains(&Err(OpError::StoreFull)).then_some(ops)
    });
    assert_eq!(store.take_given_up(), [(SnapTag(1), Fate::Squashed)]);
    assert_eq!(store.draining(), [SnapTag(1)]);
    let refused = refused.expect("there are more chunks than room for marks");
    // Its keys are those of the other one too.
    store.set_quiet(SnapTag(1));
    commit(&mut store, &refused);
    assert_eq!(store.take_given_up(), [(SnapTag(2), Fate::Squashed)]);
    store.set_quiet(SnapTag(2));
    let answers = commit(&mut store, &refused);
    assert!(answers.iter().all(|answer| *answer == Ok(Done::Unique)));
    store.audit(true).unwrap();
}

/// A write that a list had to have was answered before its mark was durable: after a power cut the list lacked it.
#[test]
fn a_mark_is_durable_before_the_write_is_answered() {
    let separate = Shape {
        meta_bytes: 1200 << 10,
        ..SHAPE
    };
    for shape in [SHAPE, separate] {
        let (machine, mut store) = volume(&shape);
        bookmark(&mut store, 1);
        write(&mut store, [3, 77]);
        let machine = machine.moment().cut(Survival::None, &mut Rng::new(1));
        let (mut store, _) = shape.open(&machine).unwrap();
        snapshot(&mut store, 2);
        assert_eq!(listed(&mut store, 1, 2), [3, 77]);
    }
}

/// A program that knows no bookmarks took a last record of them for one that is not whole, and forgot it. So
/// the superblock says that there are some before anything else does, at each moment of whatever makes the first.
#[test]
fn the_superblock_tells_of_bookmarks_before_a_record_does() {
    type Make = fn(&mut Store);
    let ways: [Make; 3] = [
        |store| bookmark(store, 2),
        |store| store.turn_to_bookmark(SnapTag(1)).unwrap().unwrap(),
        |store| store.set_to_bookmark(SnapTag(1), true).unwrap().unwrap(),
    ];
    for make in ways {
        for under_way in [false, true] {
            // With a journal so long that a checkpoint begins in the background.
            let shape = Shape {
                data_bytes: 32 << 20,
                ..SHAPE
            };
            let (machine, mut store) = volume(&shape);
            snapshot(&mut store, 1);
            write(&mut store, 0..50);
            if under_way {
                // A checkpoint has begun, whose superblock must say so too.
                for _ in 0..200 {
                    if !store.is_checkpoint_under_way() {
                        store.set_priority(SnapTag(1), 1).unwrap().unwrap();
                        store.background_step(1).unwrap();
                    }
                }
                assert!(store.is_checkpoint_under_way());
            }
            assert!(superblocks(&machine, DATA).iter().all(|s| !s.bookmarks));
            let before = store.snapshots();
            let mut moment = machine.moment();
            machine.record();
            make(&mut store);
            for event in machine.recorded() {
                moment.advance(&event);
                let cut = moment.cut(Survival::All, &mut Rng::new(1));
                let told = superblocks(&cut, DATA).iter().all(|s| s.bookmarks);
                let (mut store, _) = shape.open(&cut).unwrap();
                assert!(told || store.snapshots() == before);
                store.audit(true).unwrap();
            }
            settle(&mut store);
            store.close().unwrap();
            assert!(superblocks(&machine, DATA).iter().all(|s| s.bookmarks));
            shape.open(&machine).unwrap().0.audit(true).unwrap();
        }
    }
}

/// What an origin lost when it was cut was not listed after it had grown again, with a resize or while no server ran.
#[test]
fn what_lay_behind_the_end_counts_as_changed_when_the_origin_grows_again() {
    let bytes = |chunks: u64| chunks * SHAPE.chunk_bytes;
    let resize = |store: &mut Store, origin: u64| {
        let origin = Some(origin);
        let request = ResizeRequest {
            origin,
            ..ResizeRequest::default()
        };
        store.resize_begin(&request).unwrap().unwrap();
        while store.resize_step().unwrap().unwrap().is_none() {}
    };
    let wanted: Vec<u64> = [3].into_iter().chain(99..200).collect();
    for with_server in [true, false] {
        let (machine, mut store) = volume(&SHAPE);
        bookmark(&mut store, 1);
        write(&mut store, [3]);
        // In the middle of chunk 99.
        let short = bytes(99) + 1024;
        if with_server {
            resize(&mut store, short);
            machine.set_len(ORIGIN, short);
            machine.set_len(ORIGIN, bytes(200));
            resize(&mut store, bytes(200));
        } else {
            drop(store);
            machine.set_len(ORIGIN, short);
            drop(SHAPE.open(&machine).unwrap());
            machine.set_len(ORIGIN, bytes(200));
            (store, _) = SHAPE.open(&machine).unwrap();
        }
        snapshot(&mut store, 2);
        assert_eq!(listed(&mut store, 1, 2), wanted, "{with_server}");
        store.audit(true).unwrap();
    }
}

/// A snapshot keeps its length when the origin is cut. As a bookmark of that length it did not list what the origin
/// had lost, nor did one that a full store made of it.
#[test]
fn a_snapshot_longer_than_the_origin_becomes_a_bookmark_that_ends_with_it() {
    let bytes = |chunks: u64| chunks * SHAPE.chunk_bytes;
    for full in [false, true] {
        let (machine, mut store) = volume(&SHAPE);
        snapshot(&mut store, 1);
        write(&mut store, [3]);
        drop(store);
        machine.set_len(ORIGIN, bytes(99) + 1024);
        let (mut store, _) = SHAPE.open(&machine).unwrap();
        if full {
            store.set_to_bookmark(SnapTag(1), true).unwrap().unwrap();
            let mut tag = 3;
            while store.take_given_up().is_empty() {
                write(&mut store, 0..99);
                snapshot(&mut store, tag);
                store.set_priority(SnapTag(tag), 127).unwrap().unwrap();
                tag += 1;
            }
        } else {
            store.turn_to_bookmark(SnapTag(1)).unwrap().unwrap();
        }
        settle(&mut store);
        machine.set_len(ORIGIN, bytes(200));
        let request = ResizeRequest {
            origin: Some(bytes(200)),
            ..ResizeRequest::default()
        };
        store.resize_begin(&request).unwrap().unwrap();
        while store.resize_step().unwrap().unwrap().is_none() {}
        snapshot(&mut store, 2);
        let all: Vec<u64> = match full {
            true => (0..200).collect(),
            false => [3].into_iter().chain(99..200).collect(),
        };
        assert_eq!(listed(&mut store, 1, 2), all, "{full}");
        store.audit(true).unwrap();
    }
}

fn put(machine: &Machine, offset: u64, from: &[u8]) {
    let mut origin = machine.device(ORIGIN);
    origin.write(&[Write { offset, from }]).unwrap();
    origin.flush().unwrap();
}

/// An origin was written without its server while only a bookmark was kept: nobody said so, and the next list
/// lacked what had been written. So did a list from a snapshot that was kept, as scripts ask for them.
#[test]
fn after_a_foreign_write_a_list_from_what_was_there_before_is_refused() {
    let (machine, mut store) = volume(&SHAPE);
    bookmark(&mut store, 1);
    snapshot(&mut store, 3);
    store.close_with(OriginUse::Unused, 10).unwrap();
    put(&machine, 4096, &[7; 4096]);
    let open = |accept| {
        let options = OpenOptions {
            cache_bytes: 64 * 4096,
        };
        let now = Surroundings {
            accept,
            ..Surroundings::default()
        };
        Store::open_in(SHAPE.devices(&machine), &options, &now)
    };
    assert!(matches!(open(false), Err(StoreError::Foreign { .. })));
    let (mut store, _) = open(true).unwrap();
    snapshot(&mut store, 2);
    for tag in [SnapTag(1), SnapTag(3)] {
        let refused = store.changes(Some(tag), SnapTag(2)).err();
        assert_eq!(refused, Some(OpError::Doubtful(tag)));
    }
    assert!(store.changes(None, SnapTag(3)).is_ok());
}

/// After a crash too, as long as the first chunks were not written since the bookmark.
#[test]
fn guards_hold_for_bookmarks() {
    let (machine, mut store) = volume(&SHAPE);
    bookmark(&mut store, 1);
    write(&mut store, [0]);
    drop(store);
    put(&machine, 0, &[7; 4096]);
    drop(SHAPE.open(&machine).expect("chunk 0 was asked for"));
    put(&machine, 4096, &[7; 4096]);
    let opened = SHAPE.open(&machine).map(drop);
    assert!(matches!(opened, Err(StoreError::Foreign { .. })));
}

fn mend(machine: &Machine) -> (Repaired, Vec<u32>) {
    let devices = CheckDevices {
        data: Box::new(machine.device(DATA)),
        meta: Some(Box::new(machine.device(META))),
        origin: Some(Box::new(machine.device(ORIGIN))),
    };
    let options = CheckOptions {
        cache_bytes: 16 * 4096,
        data: true,
    };
    let mut squashed = Vec::new();
    let (_, repaired) = repair(devices, &options, &mut |event| {
        if let ddsnap::store::check::Event::GivesUp(tags) = event {
            squashed.extend(tags.iter().map(|tag| tag.0));
        }
        Ok(())
    })
    .unwrap();
    (repaired, squashed)
}

/// A repair took away the key with the data: the list from the bookmark lacked a chunk that had changed. And one
/// that lost keys went on as if it knew all.
#[test]
fn a_repair_keeps_the_keys_that_bookmarks_need_or_gives_them_up() {
    let shape = Shape {
        meta_bytes: 1200 << 10,
        ..SHAPE
    };
    let made = || {
        let (machine, mut store) = volume(&shape);
        bookmark(&mut store, 1);
        write(&mut store, 50..55);
        snapshot(&mut store, 2);
        bookmark(&mut store, 3);
        write(&mut store, 10..20);
        snapshot(&mut store, 4);
        (machine, store)
    };
    let wanted: Vec<u64> = (10..20).chain(50..55).collect();

    let (machine, mut store) = made();
    let place = entries(&mut store)
        .iter()
        .find_map(|entry| match *entry {
            DumpEntry::Exception { chunk, place, .. } if chunk.0 == 13 => Some(place),
            _ => None,
        })
        .unwrap();
    store.close().unwrap();
    machine.corrupt(DATA, place.to_offset(shape.shift()), &[9; 512]);
    assert_eq!(mend(&machine), (Repaired::WithLoss, vec![2]));
    let (mut store, _) = shape.open(&machine).unwrap();
    store.audit(true).unwrap();
    assert_eq!(listed(&mut store, 1, 4), wanted);
    assert_eq!(listed(&mut store, 3, 4), wanted[..10]);

    let (machine, store) = made();
    store.close().unwrap();
    let newest = superblocks(&machine, META).into_iter().next().unwrap();
    let leaf = newest.exceptions.root.unwrap().0.block;
    machine.corrupt(META, leaf.to_offset() + 512, &[9; 512]);
    machine.corrupt(META, leaf.to_offset(), &[9; 512]);
    assert_eq!(mend(&machine), (Repaired::WithLoss, vec![1, 2, 3, 4]));
    let (mut store, _) = shape.open(&machine).unwrap();
    store.audit(true).unwrap();
    let states: Vec<_> = store.snapshots().iter().map(|info| info.state).collect();
    assert_eq!(states, [SnapState::Squashed; 4]);
}

/// A scrub read store chunk 0 for each mark, and told of data that nobody has.
#[test]
fn a_scrub_and_a_count_pass_marks_by() {
    let (_machine, mut store) = volume(&SHAPE);
    bookmark(&mut store, 1);
    write(&mut store, 0..30);
    snapshot(&mut store, 2);
    write(&mut store, 30..40);
    let mut scrub = store.scrub_begin();
    let mut bytes = 0;
    while !scrub.is_finished() {
        let found = store.scrub_step(&mut scrub, 7).unwrap();
        assert!(found.bad.is_empty());
        bytes += found.bytes;
    }
    assert_eq!(bytes, 10 * SHAPE.chunk_bytes);
    assert_eq!(scrub.progress(), (bytes, bytes));
    let counts = store.count().unwrap();
    assert_eq!(counts.totals.shared_by, [10]);
    assert_eq!(counts.snapshots[0].1.shared_by, [0_u64; 0]);
}
