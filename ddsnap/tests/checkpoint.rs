// SPDX-License-Identifier: GPL-2.0-only
//! Checkpoints of many slices between requests: whatever moment the power is cut, every copy-out that
//! was acknowledged is found.

mod harness;

use ddsnap::device::memory::{Event, Machine, Moment, Rng, Survival};
use ddsnap::store::{Done, Location, Op, Store};
use ddsnap::units::{Chunk, SnapTag};
use harness::volume::{META, Shape, Volume};
use harness::{number_from_env, seed};

/// Enough that a checkpoint has a few thousand changes, several branches of the tree and many slices;
/// and room for metadata, so that none has to be done in one go.
const SHAPE: Shape = Shape {
    chunk_bytes: 512,
    origin_chunks: 60_000,
    lacking_sectors: 0,
    data_bytes: 40 << 20,
    meta_bytes: 8 << 20,
    snapshots: 4,
};

/// What must be found: the snapshots, and of each chunk the newest one that has it saved.
#[derive(Clone, Default)]
struct Acknowledged {
    tags: Vec<SnapTag>,
    saved: Vec<(SnapTag, Chunk)>,
}

impl Acknowledged {
    fn check(&self, store: &mut Store) -> Result<(), String> {
        let tags: Vec<_> = store.snapshots().iter().map(|s| s.tag).collect();
        if tags != self.tags {
            return Err(format!("snapshots are {tags:?}, not {:?}", self.tags));
        }
        for &(tag, chunk) in &self.saved {
            match store.locate(tag, chunk) {
                Ok(Ok(Location::Store(_))) => {}
                other => return Err(format!("snapshot {tag} chunk {chunk}: {other:?}")),
            }
        }
        store.audit(true).map_err(|error| error.to_string())
    }
}

#[test]
fn a_checkpoint_between_requests_loses_nothing() {
    let mut rng = Rng::new(seed());
    let mut volume = Volume::new(SHAPE);
    let mut known = Acknowledged::default();
    let mut crashes = [0, 0];
    for round in 0..number_from_env("DDSNAP_CHECKPOINT_ROUNDS", 800) {
        if round % 150 == 0 {
            let tag = SnapTag(known.tags.len() as u32);
            volume.store.create(tag, 1).unwrap().unwrap();
            known.tags.push(tag);
        }
        // Dense and scattered groups: slices of one branch, and of many.
        let start = rng.below(SHAPE.origin_chunks - 100);
        let scattered = rng.chance(70);
        let chunks: Vec<Chunk> = (0..100)
            .map(|i| {
                Chunk(if scattered {
                    rng.below(SHAPE.origin_chunks)
                } else {
                    start + i
                })
            })
            .collect();
        let ops: Vec<Op> = chunks.iter().map(|&chunk| Op::OriginWrite(chunk)).collect();
        let answers = volume.store.commit(&ops).unwrap();
        assert!(answers.iter().all(|answer| *answer == Ok(Done::Unique)));
        let newest = *known.tags.last().unwrap();
        known
            .saved
            .extend(chunks.iter().map(|&chunk| (newest, chunk)));
        if rng.chance(20) {
            volume.store.background_step(64).unwrap();
        }
        let under_way = volume.store.is_checkpoint_under_way();
        if rng.chance(if under_way { 30 } else { 2 }) {
            crashes[usize::from(under_way)] += 1;
            let survival = match rng.below(3) {
                0 => Survival::None,
                1 => Survival::ProcessKilled,
                _ => Survival::Sectors(50),
            };
            let machine = volume.machine.moment().cut(survival, &mut rng);
            let (mut store, _) = SHAPE.open(&machine).unwrap();
            known
                .check(&mut store)
                .unwrap_or_else(|problem| panic!("seed {} round {round}: {problem}", seed()));
            if rng.chance(20) {
                (volume.machine, volume.store) = (machine, store);
            }
        }
    }
    known.check(&mut volume.store).unwrap();
    println!("crashes between checkpoints and within one: {crashes:?}");
    assert!(crashes.iter().all(|&count| count > 5), "{crashes:?}");
}

/// A volume whose ring is large, and its copy-outs, each of another chunk.
struct Copier {
    store: Store,
    known: Acknowledged,
    next: u64,
}

const BIG: Shape = Shape {
    chunk_bytes: 512,
    origin_chunks: 160_000,
    lacking_sectors: 0,
    data_bytes: 100 << 20,
    meta_bytes: 1 << 30,
    snapshots: 1,
};

impl Copier {
    fn new() -> (Copier, Machine) {
        let Volume {
            mut store, machine, ..
        } = Volume::new(BIG);
        let tag = SnapTag(1);
        store.create(tag, 1).expect("create").expect("a free tag");
        let known = Acknowledged {
            tags: vec![tag],
            saved: Vec::new(),
        };
        let copier = Copier {
            store,
            known,
            next: 0,
        };
        (copier, machine)
    }

    /// Copies out a group of so many chunks.
    fn group(&mut self, chunks: u64) {
        let group = self.next..self.next + chunks;
        self.next = group.end;
        let chunks = group.map(|index| Chunk(index * 7 % BIG.origin_chunks));
        let ops: Vec<Op> = chunks.clone().map(Op::OriginWrite).collect();
        let answers = self.store.commit(&ops).expect("commit");
        assert!(answers.iter().all(|answer| *answer == Ok(Done::Unique)));
        let saved = chunks.map(|chunk| (SnapTag(1), chunk));
        self.known.saved.extend(saved);
    }

    /// The power goes, and what was there at `moment` comes back. What the first group of `chunks` writes
    /// to the metadata device must be its record, and of a checkpoint no more than the snapshot table.
    fn crash(mut self, moment: &Moment, chunks: u64) {
        let mut rng = Rng::new(seed());
        let machine = moment.cut(Survival::None, &mut rng);
        self.store = BIG.open(&machine).expect("open").0;
        machine.record();
        self.group(chunks);
        let events = machine.recorded();
        let to_meta = |event: &&Event| matches!(event, Event::Write { disk: META, .. });
        assert!(self.store.is_checkpoint_under_way());
        assert!(events.iter().filter(to_meta).count() <= 2);
        (0..20).for_each(|_| self.group(chunks));
        let machine = machine.moment().cut(Survival::None, &mut rng);
        let (mut store, _) = BIG.open(&machine).expect("open again");
        self.known.check(&mut store).expect("nothing is lost");
    }
}

/// A crash can leave as many changes as two checkpoints had to merge: more than memory is to hold. The
/// first request then waited for a whole checkpoint, over a second at ten million exceptions.
#[test]
fn with_memory_full_the_first_request_after_a_crash_waits_for_no_checkpoint() {
    /// The most that memory is to hold with the cache of these tests.
    const MOST: u64 = 65_536 / 3 * 5;
    let (mut copier, machine) = Copier::new();
    while copier.next < MOST + 20_000 {
        copier.group(128);
    }
    assert!(copier.store.is_checkpoint_under_way());
    copier.crash(&machine.moment(), 128);
}

/// Just before a checkpoint is complete the ring is at its fullest. After a crash it begins anew, and the
/// first request waited until it had caught up with what was left of the ring.
#[test]
fn with_the_ring_full_the_first_request_after_a_crash_waits_for_no_checkpoint() {
    let (mut copier, machine) = Copier::new();
    while !copier.store.is_checkpoint_under_way() {
        copier.group(1);
    }
    let mut moment = machine.moment();
    let mut acknowledged = copier.next;
    loop {
        copier.group(1);
        if !copier.store.is_checkpoint_under_way() {
            break;
        }
        moment = machine.moment();
        acknowledged = copier.next;
    }
    copier.next = acknowledged;
    copier.known.saved.truncate(acknowledged as usize);
    copier.crash(&moment, 1);
}

/// The copy of the superblock that recovery read was the only good one of its generation, when the
/// next checkpoint overwrote it first: torn there, the store was left with the older copy, whose
/// blocks had been used again.
#[test]
fn a_crash_between_the_superblock_copies_and_one_in_the_checkpoint_after_it() {
    let shape = Shape {
        chunk_bytes: 4096,
        origin_chunks: 400,
        lacking_sectors: 0,
        data_bytes: 4 << 20,
        meta_bytes: 0,
        snapshots: 2,
    };
    let mut rng = Rng::new(seed());
    let mut volume = Volume::new(shape);
    let mut known = Acknowledged::default();
    volume.store.create(SnapTag(1), 1).unwrap().unwrap();
    known.tags.push(SnapTag(1));
    let mut chunk = 0;
    let mut save = |store: &mut Store, known: &mut Acknowledged| {
        let answers = store
            .commit(&[Op::OriginWrite(Chunk(chunk % 400))])
            .unwrap();
        assert_eq!(answers, [Ok(Done::Unique)]);
        known.saved.push((SnapTag(1), Chunk(chunk % 400)));
        chunk += 7;
    };
    // Up to the end of a second checkpoint, so that there are replaced blocks.
    let mut ends = 0;
    let mut before = volume.machine.moment();
    volume.machine.record();
    while ends < 2 {
        save(&mut volume.store, &mut known);
        while volume.store.background_step(64).unwrap() {}
        let events = volume.machine.recorded();
        let flushes = |event: &&Event| matches!(event, Event::Flush { .. });
        // A record takes one flush, a checkpoint three more.
        if events.iter().filter(flushes).count() < 4 {
            before = volume.machine.moment();
            volume.machine.record();
            continue;
        }
        ends += 1;
        // The last copy-out is acknowledged only behind the flush of its record.
        let mut known = known.clone();
        known.saved.pop();
        let mut moment = before.clone();
        for event in &events {
            moment.advance(event);
            // The copies may also be read from a cache that lost them when a flush failed.
            for survival in [Survival::All, Survival::FlushFailed] {
                let machine = moment.cut(survival, &mut rng);
                again_in_the_next_checkpoint(&shape, &machine, &known, &mut rng);
            }
        }
        before = volume.machine.moment();
        volume.machine.record();
    }
}

fn again_in_the_next_checkpoint(
    shape: &Shape,
    machine: &Machine,
    known: &Acknowledged,
    rng: &mut Rng,
) {
    let before = machine.moment();
    machine.record();
    let (mut store, _) = shape.open(machine).expect("open");
    // A change to the snapshot makes each checkpoint write blocks, as does this one on closing.
    store
        .set_priority(SnapTag(1), 1)
        .expect("priority")
        .expect("known");
    store.close().expect("close");
    let mut moment = before;
    for event in &machine.recorded() {
        moment.advance(event);
        for survival in [Survival::None, Survival::All, Survival::Sectors(50)] {
            let machine = moment.cut(survival, rng);
            let (mut store, _) = shape.open(&machine).expect("open again");
            known
                .check(&mut store)
                .unwrap_or_else(|problem| panic!("seed {}: {problem}", seed()));
        }
    }
}
