// SPDX-License-Identifier: GPL-2.0-only
//! The list of chunks that differ between two snapshots, against a plain map: where the store says
//! that each chunk of either is to be read.

mod harness;

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use ddsnap::device::memory::{Machine, Rng};
use ddsnap::device::{BlockDevice, Read, Write};
use ddsnap::store::{Changes, Devices, Location, Op, OpError, OpenOptions, SnapState, Store};
use ddsnap::units::{Chunk, ChunkRun, SnapTag};
use harness::seed;
use harness::volume::{DATA, META, ORIGIN, Shape, Volume, choose};

/// Goes on with a list to its end.
fn finish(store: &mut Store, mut changes: Changes, most: usize) -> Vec<u64> {
    let mut all: Vec<ChunkRun> = Vec::new();
    loop {
        let mut runs = Vec::new();
        let more = store.changes_step(&mut changes, &mut runs, most);
        assert!(runs.len() <= most);
        all.extend(runs);
        if !more.expect("the index is whole").expect("both are live") {
            break;
        }
    }
    let mut chunks: Vec<u64> = Vec::new();
    for run in all {
        assert!(run.chunks > 0);
        assert!(chunks.last().is_none_or(|&last| last < run.first.0));
        chunks.extend(run.first.0..run.first.0 + run.chunks);
    }
    chunks
}

fn changed(store: &mut Store, from: Option<u32>, to: u32, most: usize) -> Vec<u64> {
    let changes = store
        .changes(from.map(SnapTag), SnapTag(to))
        .expect("both are live");
    finish(store, changes, most)
}

/// Where each chunk of a snapshot lies.
fn places(store: &mut Store, tag: u32) -> Vec<Location> {
    let shift = store.status().chunk;
    let snapshot = store.snapshot(SnapTag(tag)).expect("known");
    let chunks = snapshot.length.to_chunks(shift);
    let place = |chunk| store.locate(SnapTag(tag), Chunk(chunk)).expect("readable");
    (0..chunks)
        .map(place)
        .map(|place| place.expect("live"))
        .collect()
}

fn differing(from: &[Location], to: &[Location]) -> Vec<u64> {
    let differs = |chunk: &u64| from.get(*chunk as usize) != to.get(*chunk as usize);
    (0..to.len() as u64).filter(differs).collect()
}

fn live_tags(store: &Store) -> Vec<u32> {
    let all = store.snapshots();
    let live = all.iter().filter(|info| info.state == SnapState::Live);
    live.map(|info| info.tag.0).collect()
}

fn random_volumes(shape: Shape, steps: u64) {
    let mut rng = Rng::new(seed());
    let mut volume = Volume::new(shape);
    let (mut pairs, mut listed) = (0, 0);
    for number in 0..steps {
        let step = choose(&mut rng, &shape, &volume.model, &mut volume.next_tag);
        volume.apply(&step);
        if number % 16 != 0 {
            continue;
        }
        let tags = live_tags(&volume.store);
        let all: Vec<_> = tags
            .iter()
            .map(|&tag| places(&mut volume.store, tag))
            .collect();
        for (from, from_places) in tags.iter().zip(&all) {
            for (to, to_places) in tags.iter().zip(&all) {
                let most = 1 + rng.below(8) as usize;
                let found = changed(&mut volume.store, Some(*from), *to, most);
                let context = || format!("seed {} step {number}: {from} to {to}", seed());
                assert_eq!(found, differing(from_places, to_places), "{}", context());
                let (old, new) = (&volume.model.snapshots[from], &volume.model.snapshots[to]);
                for chunk in 0..shape.origin_chunks {
                    let same = old.chunks[chunk as usize].now == new.chunks[chunk as usize].now;
                    assert!(same || found.contains(&chunk), "{} {chunk}", context());
                }
                pairs += 1;
                listed += found.len();
            }
        }
        for &tag in &tags {
            let whole: Vec<u64> = (0..shape.origin_chunks).collect();
            assert_eq!(changed(&mut volume.store, None, tag, 1), whole);
        }
    }
    println!("seed={} {shape:?} pairs={pairs} listed={listed}", seed());
    assert!(
        pairs > 100 && listed > 1000,
        "{pairs} pairs, {listed} chunks"
    );
}

#[test]
fn random_snapshots_differ_where_their_chunks_lie_elsewhere() {
    random_volumes(
        Shape {
            chunk_bytes: 4096,
            origin_chunks: 96,
            lacking_sectors: 0,
            data_bytes: 8 << 20,
            meta_bytes: 0,
            snapshots: 8,
        },
        700,
    );
}

#[test]
fn small_chunks_and_a_full_store() {
    random_volumes(
        Shape {
            chunk_bytes: 512,
            origin_chunks: 400,
            lacking_sectors: 0,
            data_bytes: 400 << 10,
            meta_bytes: 2 << 20,
            snapshots: 12,
        },
        500,
    );
}

/// A device that counts what is read from it.
struct Counting<D> {
    device: D,
    bytes: Rc<Cell<u64>>,
}

impl<D: BlockDevice> BlockDevice for Counting<D> {
    fn len_bytes(&self) -> u64 {
        self.device.len_bytes()
    }

    fn alignment(&self) -> usize {
        self.device.alignment()
    }

    fn name(&self) -> &str {
        self.device.name()
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> io::Result<()> {
        let bytes: usize = batch.iter().map(|read| read.into.len()).sum();
        self.bytes.set(self.bytes.get() + bytes as u64);
        self.device.read(batch)
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        self.device.write(batch)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.device.flush()
    }
}

const BIG: Shape = Shape {
    chunk_bytes: 512,
    origin_chunks: 100_000,
    lacking_sectors: 0,
    data_bytes: 80 << 20,
    meta_bytes: 32 << 20,
    snapshots: 8,
};

/// Asks for origin chunks in groups.
fn write_origin(store: &mut Store, chunks: &[u64]) {
    for group in chunks.chunks(256) {
        let ops: Vec<Op> = group
            .iter()
            .map(|&chunk| Op::OriginWrite(Chunk(chunk)))
            .collect();
        let results = store.commit(&ops).expect("commit");
        assert!(results.iter().all(Result::is_ok));
    }
}

fn create(store: &mut Store, tag: u32) {
    store
        .create(SnapTag(tag), 0)
        .expect("create")
        .expect("room");
}

#[test]
fn what_did_not_change_is_not_read() {
    let machine = BIG.machine();
    BIG.initialize(&machine);
    let (mut store, _) = BIG.open(&machine).expect("open");
    create(&mut store, 1);
    let all: Vec<u64> = (0..BIG.origin_chunks).step_by(2).collect();
    write_origin(&mut store, &all);
    create(&mut store, 2);
    let few = [5, 70_001, 70_002, 99_999];
    write_origin(&mut store, &few);
    create(&mut store, 3);
    store.close().expect("close");

    let bytes = Rc::new(Cell::new(0));
    let meta = Counting {
        device: machine.device(META),
        bytes: Rc::clone(&bytes),
    };
    let devices = Devices {
        origin: Box::new(machine.device(ORIGIN)),
        data: Box::new(machine.device(DATA)),
        meta: Some(Box::new(meta)),
    };
    let options = OpenOptions {
        cache_bytes: 64 * 4096,
    };
    let (mut store, _) = Store::open(devices, &options).expect("open");
    let mut cost = |from, to| {
        bytes.set(0);
        let found = changed(&mut store, Some(from), to, 1000);
        (found, bytes.get() / 4096)
    };
    let (found, whole) = cost(1, 2);
    assert_eq!(found, all);
    assert!(
        whole > 80,
        "the tree is too small for this test: {whole} blocks"
    );
    let (found, blocks) = cost(2, 3);
    assert_eq!(found, few);
    assert!(
        blocks <= 10,
        "{blocks} blocks read for {few:?}, {whole} for all"
    );
    let (found, blocks) = cost(3, 3);
    assert_eq!((found, blocks), (vec![], 0));
}

#[test]
fn recent_changes_beyond_one_step_are_all_listed() {
    let machine = BIG.machine();
    BIG.initialize(&machine);
    let (mut store, _) = BIG.open(&machine).expect("open");
    create(&mut store, 1);
    let all: Vec<u64> = (0..BIG.origin_chunks).rev().step_by(2).collect();
    write_origin(&mut store, &all);
    create(&mut store, 2);
    let mut expected = all;
    expected.reverse();
    assert_eq!(changed(&mut store, Some(1), 2, 4000), expected);
    assert_eq!(changed(&mut store, Some(2), 1, 1), expected);
}

/// The list is made while the store goes on: what comes and goes meanwhile is not in it.
#[test]
fn a_list_in_the_making_stands_still() {
    let machine = BIG.machine();
    BIG.initialize(&machine);
    let (mut store, _) = BIG.open(&machine).expect("open");
    let mut rng = Rng::new(seed());
    for tag in 1..=4 {
        create(&mut store, tag);
        let chunks: Vec<u64> = (0..20_000).map(|_| rng.below(BIG.origin_chunks)).collect();
        write_origin(&mut store, &chunks);
    }
    let mut expected = changed(&mut store, Some(1), 3, 4000);
    let mut changes = store.changes(Some(SnapTag(1)), SnapTag(3)).expect("both");
    let (mut found, mut steps) = (Vec::new(), 0);
    loop {
        let mut runs = Vec::new();
        let more = store.changes_step(&mut changes, &mut runs, 500);
        found.extend(
            runs.iter()
                .flat_map(|run| run.first.0..run.first.0 + run.chunks),
        );
        if !more.expect("whole").expect("live") {
            break;
        }
        steps += 1;
        match steps {
            2 => store.delete(SnapTag(2)).expect("delete").expect("unused"),
            3 => create(&mut store, 5),
            _ => {}
        }
        // Sweeps what served only snapshot 2, merges trees, and saves chunks for the others.
        let chunks: Vec<u64> = (0..2000).map(|_| rng.below(BIG.origin_chunks)).collect();
        write_origin(&mut store, &chunks);
        store.background_step(4096).expect("background");
    }
    assert!(steps > 5, "{steps} steps");
    expected.dedup();
    assert_eq!(found, expected);
}

#[test]
fn a_snapshot_that_goes_ends_its_lists() {
    let machine = BIG.machine();
    BIG.initialize(&machine);
    let (mut store, _) = BIG.open(&machine).expect("open");
    create(&mut store, 1);
    create(&mut store, 2);
    let step = |store: &mut Store, changes: &mut Changes| {
        store
            .changes_step(changes, &mut Vec::new(), 1)
            .expect("whole")
    };
    let absent = OpError::NoSuchSnapshot(SnapTag(7));
    assert_eq!(
        store.changes(Some(SnapTag(1)), SnapTag(7)).err(),
        Some(absent)
    );
    assert_eq!(
        store.changes(Some(SnapTag(7)), SnapTag(1)).err(),
        Some(absent)
    );
    assert_eq!(store.changes(None, SnapTag(7)).err(), Some(absent));

    let mut changes = store.changes(Some(SnapTag(1)), SnapTag(2)).expect("both");
    store.delete(SnapTag(1)).expect("delete").expect("unused");
    let gone = Err(OpError::NoSuchSnapshot(SnapTag(1)));
    assert_eq!(step(&mut store, &mut changes), gone);
    // Another of the same number is not the one that was asked for.
    create(&mut store, 1);
    assert_eq!(step(&mut store, &mut changes), gone);
}

/// After the origin grew or shrank: what only the second has is listed, what only the first has not.
#[test]
fn snapshots_of_different_length() {
    let shape = Shape {
        chunk_bytes: 4096,
        origin_chunks: 40,
        lacking_sectors: 0,
        data_bytes: 4 << 20,
        meta_bytes: 0,
        snapshots: 8,
    };
    let machine = shape.machine();
    shape.initialize(&machine);
    let open = |chunks: u64| {
        let origin = Machine::new(&[("origin", chunks * shape.chunk_bytes)]);
        let devices = Devices {
            origin: Box::new(origin.device(0)),
            data: Box::new(machine.device(DATA)),
            meta: None,
        };
        let options = OpenOptions {
            cache_bytes: 1 << 20,
        };
        Store::open(devices, &options).expect("open").0
    };
    let mut store = open(40);
    create(&mut store, 1);
    write_origin(&mut store, &[3, 39]);
    store.close().expect("close");
    let mut store = open(60);
    create(&mut store, 2);
    write_origin(&mut store, &[3, 7, 45, 59]);
    create(&mut store, 3);
    store.close().expect("close");
    let mut store = open(40);
    create(&mut store, 4);

    let grown = |changed: &[u64]| -> Vec<u64> { changed.iter().copied().chain(40..60).collect() };
    assert_eq!(changed(&mut store, Some(1), 2, 100), grown(&[3, 39]));
    assert_eq!(changed(&mut store, Some(1), 3, 100), grown(&[3, 7, 39]));
    assert_eq!(changed(&mut store, Some(2), 1, 100), [3, 39]);
    assert_eq!(changed(&mut store, Some(2), 3, 100), [3, 7, 45, 59]);
    assert_eq!(changed(&mut store, Some(3), 4, 100), [0_u64; 0]);
    assert_eq!(changed(&mut store, Some(4), 3, 100), grown(&[]));
    assert_eq!(
        changed(&mut store, None, 2, 100),
        (0..60).collect::<Vec<_>>()
    );
}
