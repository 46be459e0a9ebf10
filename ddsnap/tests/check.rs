// SPDX-License-Identifier: GPL-2.0-only
//! `check` finds what is wrong with a store, all of it, and finds nothing wrong with a sound one.
//!
//! Each kind of structure is damaged: by flipped bits, which checksums show, and by contents that
//! contradict each other behind right checksums.

mod harness;

use ddsnap::buffer::AlignedBuf;
use ddsnap::device::memory::{Machine, Rng, Survival};
use ddsnap::device::{BlockDevice, Read};
use ddsnap::format::BLOCK_LEN;
use ddsnap::format::bitmap::Bitmap;
use ddsnap::format::block::{Block, BlockBuilder, Expected, Kind, Pointer, Seal};
use ddsnap::format::node::{Key, LeafBuilder, LeafReader, Value};
use ddsnap::format::superblock::{COPIES, Superblock, TreeRoot};
use ddsnap::store::check::{
    CheckDevices, CheckOptions, Checked, Event, Place, Problem, Severity, check,
};
use ddsnap::store::{Op, StoreError};
use ddsnap::units::{Chunk, MetaBlock, SnapTag, StoreChunk};
use harness::seed;
use harness::volume::{DATA, META, ORIGIN, Shape, Step, Volume, choose};

const SHAPE: Shape = Shape {
    chunk_bytes: 4096,
    origin_chunks: 48,
    lacking_sectors: 0,
    data_bytes: 1200 << 10,
    meta_bytes: 0,
    snapshots: 6,
};
/// Enough entries for trees of two levels.
const DEEP: Shape = Shape {
    chunk_bytes: 512,
    origin_chunks: 3000,
    lacking_sectors: 0,
    data_bytes: 3 << 20,
    meta_bytes: 0,
    snapshots: 6,
};

fn examine(
    shape: &Shape,
    machine: &Machine,
    origin: bool,
) -> Result<(Checked, Vec<Problem>), StoreError> {
    let devices = CheckDevices {
        data: Box::new(machine.device(DATA)),
        meta: (shape.meta_bytes > 0)
            .then(|| Box::new(machine.device(META)) as Box<dyn BlockDevice>),
        origin: origin.then(|| Box::new(machine.device(ORIGIN)) as Box<dyn BlockDevice>),
    };
    let options = CheckOptions {
        cache_bytes: 16 * 4096,
        data: true,
    };
    let mut problems = Vec::new();
    machine.record();
    let checked = check(devices, &options, &mut |event| {
        if let Event::Problem(problem) = event {
            problems.push(problem);
        }
        Ok(())
    });
    assert!(machine.recorded().is_empty(), "check wrote or flushed");
    let checked = checked?;
    assert_eq!(checked.problems, problems.len() as u64);
    Ok((checked, problems))
}

fn problems(shape: &Shape, machine: &Machine) -> Vec<Problem> {
    examine(shape, machine, true).expect("a store").1
}

fn copy_of(machine: &Machine) -> Machine {
    machine.moment().cut(Survival::All, &mut Rng::new(0))
}

/// A volume with some history, closed in order.
fn closed(shape: Shape, steps: u64) -> Machine {
    let mut rng = Rng::new(seed());
    let mut volume = Volume::new(shape);
    for _ in 0..steps {
        let step = choose(&mut rng, &shape, &volume.model, &mut volume.next_tag);
        volume.apply(&step);
    }
    volume.store.close().expect("close");
    volume.machine
}

/// Two snapshots (tags 1 and 2) with many chunks saved between and after them, and two overlays;
/// closed in order.
fn simple(shape: Shape, chunks: u64) -> Machine {
    let mut volume = Volume::new(shape);
    for tag in [1, 2] {
        volume.apply(&Step::Create(tag));
        // Every other chunk, so that entries do not shrink to runs.
        for first in (0..chunks).step_by(64) {
            let ops = (first..chunks.min(first + 64))
                .map(|chunk| Op::OriginWrite(Chunk(chunk * 2 % shape.origin_chunks)))
                .collect();
            volume.apply(&Step::Group { ops, write: true });
        }
    }
    let ops = vec![
        Op::SnapshotWrite(SnapTag(1), Chunk(1)),
        Op::SnapshotWrite(SnapTag(2), Chunk(3)),
    ];
    volume.apply(&Step::Group { ops, write: true });
    volume.store.close().expect("close");
    volume.machine
}

/// Changes metadata behind right checksums. Trees must be of one leaf.
struct Surgeon<'m> {
    machine: &'m Machine,
    superblock: Superblock,
}

impl<'m> Surgeon<'m> {
    fn new(machine: &'m Machine) -> Self {
        let superblock = Superblock::decode(&read(machine, COPIES[0]), 0).expect("copy 0");
        Surgeon {
            machine,
            superblock,
        }
    }

    fn block(&self, pointer: Pointer, kind: Kind) -> Block {
        let expected = Expected {
            pointer,
            newest_generation: self.superblock.generation,
            uuid_part: self.superblock.uuid_part(),
            kind,
            level: 0,
        };
        Block::check(&read(self.machine, pointer.block), &expected).expect("a block")
    }

    fn put(
        &self,
        at: MetaBlock,
        kind: Kind,
        aux: u64,
        (payload, count, used): (BlockBuilder, u16, u16),
    ) -> Pointer {
        let seal = Seal {
            block: at,
            generation: self.superblock.generation,
            uuid_part: self.superblock.uuid_part(),
            kind,
            level: 0,
            count,
            used,
            aux,
        };
        let (pointer, block) = payload.seal(&seal);
        self.machine.corrupt(DATA, at.to_offset(), block.bytes());
        pointer
    }

    fn root(&mut self, kind: Kind) -> &mut TreeRoot {
        match kind {
            Kind::Exceptions => &mut self.superblock.exceptions,
            Kind::Overlays => &mut self.superblock.overlays,
            _ => &mut self.superblock.space,
        }
    }

    fn entries(&mut self, kind: Kind) -> Vec<(Key, Value)> {
        let (pointer, level, _) = self.root(kind).root.expect("a tree");
        assert_eq!(level, 0);
        let mut reader = LeafReader::new(self.block(pointer, kind)).expect("a leaf");
        std::iter::from_fn(|| reader.next_entry().expect("an entry")).collect()
    }

    /// Rewrites the only leaf of a tree in place.
    fn set_entries(&mut self, kind: Kind, entries: &[(Key, Value)]) {
        let (old, _, newest) = self.root(kind).root.expect("a tree");
        let mut leaf = LeafBuilder::default();
        entries
            .iter()
            .for_each(|&(key, value)| assert!(leaf.push(key, value)));
        let pointer = self.put(old.block, kind, 0, leaf.finish());
        *self.root(kind) = TreeRoot {
            root: Some((pointer, 0, newest)),
            entries: entries.len() as u64,
            nodes: 1,
        };
    }

    fn bitmap(&mut self) -> Bitmap {
        let (key, value) = self.entries(Kind::Space)[0];
        let pointer = Pointer {
            block: MetaBlock(value.place),
            crc: value.crc,
        };
        Bitmap::decode(&self.block(pointer, Kind::Bitmap), key.0).expect("a bitmap")
    }

    fn set_bitmap(&mut self, map: &Bitmap) {
        let mut entries = self.entries(Kind::Space);
        let at = MetaBlock(entries[0].1.place);
        entries[0].1.crc = self.put(at, Kind::Bitmap, entries[0].0.0, map.encode()).crc;
        self.set_entries(Kind::Space, &entries);
    }

    fn finish(self) {
        for (copy, at) in (0..).zip(COPIES) {
            let bytes = self.superblock.encode(copy);
            self.machine.corrupt(DATA, at.to_offset(), &bytes);
        }
    }
}

fn read(machine: &Machine, at: MetaBlock) -> AlignedBuf {
    let mut into = AlignedBuf::zeroed(BLOCK_LEN);
    let offset = at.to_offset();
    let mut device = machine.device(DATA);
    device
        .read(&mut [Read {
            offset,
            into: &mut into,
        }])
        .expect("read");
    into
}

fn flip(machine: &Machine, offset: u64, bit: u8) {
    let block = MetaBlock(offset / 4096);
    let mut bytes = read(machine, block);
    bytes[(offset % 4096) as usize] ^= 1 << bit;
    machine.corrupt(DATA, block.to_offset(), &bytes);
}

/// What a surgeon's operation on [`simple`] leads to.
fn after(operation: impl FnOnce(&mut Surgeon<'_>)) -> Vec<Problem> {
    let machine = simple(SHAPE, 10);
    let mut surgeon = Surgeon::new(&machine);
    operation(&mut surgeon);
    surgeon.finish();
    problems(&SHAPE, &machine)
}

#[track_caller]
fn found(problems: &[Problem], severity: Severity, words: &str) -> Problem {
    problems
        .iter()
        .find(|problem| problem.severity == severity && problem.to_string().contains(words))
        .unwrap_or_else(|| panic!("no {words:?} in {problems:#?}"))
        .clone()
}

#[test]
fn a_sound_store_has_no_problems_whenever_the_power_went() {
    let separate = Shape {
        chunk_bytes: 512,
        meta_bytes: 600 << 10,
        ..SHAPE
    };
    for shape in [SHAPE, separate] {
        let mut rng = Rng::new(seed());
        let mut volume = Volume::new(shape);
        let (mut undecided, mut torn, mut replayed) = (0, 0, 0);
        for round in 0..400 {
            let step = choose(&mut rng, &shape, &volume.model, &mut volume.next_tag);
            let mut moment = volume.machine.moment();
            volume.machine.record();
            volume.apply(&step);
            let events = volume.machine.recorded();
            let upto = rng.below(events.len() as u64 + 1) as usize;
            events[..upto]
                .iter()
                .for_each(|event| moment.advance(event));
            let survival = match round % 4 {
                0 => Survival::Sectors(60),
                _ => Survival::Writes(60),
            };
            let machine = moment.cut(survival, &mut rng);
            let (checked, problems) = examine(&shape, &machine, true).expect("a store");
            replayed += checked.replayed_records;
            for problem in &problems {
                // A superblock that was being written when the power went.
                assert!(
                    matches!(problem.place, Place::Superblock(_)) && problems.len() == 1,
                    "seed {} round {round}: {problem}",
                    seed()
                );
                torn += 1;
            }
            let (checked, problems) = examine(&shape, &machine, false).expect("a store");
            undecided += checked.undecided;
            for problem in problems {
                let fine = problem.severity == Severity::Undecided
                    || matches!(problem.place, Place::Superblock(_));
                assert!(fine, "seed {} round {round}: {problem}", seed());
            }
        }
        assert!(
            undecided > 0 && replayed > 0,
            "{undecided} {torn} {replayed}"
        );
    }
}

#[test]
fn a_flipped_bit_in_any_block_in_use_is_found_and_named() {
    for (shape, machine) in [(SHAPE, closed(SHAPE, 60)), (DEEP, simple(DEEP, 1400))] {
        let (checked, none) = examine(&shape, &machine, true).expect("a store");
        assert_eq!(none, []);
        let superblock = Surgeon::new(&machine).superblock;
        if shape.origin_chunks == DEEP.origin_chunks {
            let root = superblock.exceptions.root.expect("a tree");
            assert_eq!(root.1, 1, "an interior node is to be damaged too");
        }
        let mut rng = Rng::new(seed());
        let mut hit = 0;
        for extent in &superblock.extents {
            for block in extent.first.0..extent.end().0 {
                let machine = copy_of(&machine);
                let offset = block * 4096 + rng.below(4096);
                flip(&machine, offset, rng.below(8) as u8);
                let problems = problems(&shape, &machine);
                if problems.is_empty() {
                    continue; // a free block
                }
                hit += 1;
                let place = Place::Block(MetaBlock(block));
                assert!(
                    problems.iter().any(|problem| problem.place == place),
                    "block {block}: {problems:#?}"
                );
            }
        }
        assert_eq!(hit, checked.used_blocks);
    }
}

#[test]
fn each_copy_of_the_superblock_is_proven() {
    let machine = simple(SHAPE, 10);
    for copy in [0, 1] {
        let machine = copy_of(&machine);
        flip(&machine, COPIES[copy].to_offset() + 300, 2);
        let problems = problems(&SHAPE, &machine);
        assert_eq!(problems.len(), 1, "{problems:#?}");
        assert_eq!(
            (problems[0].place, problems[0].severity),
            (Place::Superblock(copy as u32), Severity::Mendable)
        );
        flip(&machine, COPIES[1 - copy].to_offset() + 300, 2);
        let error = examine(&SHAPE, &machine, true).expect_err("no copy is left");
        assert!(matches!(error, StoreError::NoStore { .. }), "{error}");
    }
    // A copy that a lost write left behind, and one of other content.
    for (generations, words) in [(2, "it is of generation"), (0, "but not its content")] {
        let machine = copy_of(&machine);
        let mut surgeon = Surgeon::new(&machine);
        surgeon.superblock.generation -= generations;
        surgeon.superblock.created += 1;
        let bytes = surgeon.superblock.encode(1);
        machine.corrupt(DATA, COPIES[1].to_offset(), &bytes);
        let problems = problems(&SHAPE, &machine);
        assert_eq!(problems.len(), 1, "{problems:#?}");
        found(&problems, Severity::Mendable, words);
    }
}

#[test]
fn a_damaged_journal_record_may_have_hurt_every_snapshot_of_its_time() {
    let mut volume = Volume::new(SHAPE);
    (0..4).for_each(|tag| volume.apply(&Step::Create(tag)));
    // The journal begins at 128 KiB, a block for each record: damage the third of four.
    flip(&volume.machine, (128 << 10) + 2 * 4096 + 70, 1);
    let problems = problems(&SHAPE, &volume.machine);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    let problem = found(&problems, Severity::Loss, "record 3 is damaged");
    assert_eq!(problem.place, Place::Journal);
    assert_eq!(problem.snapshots, [SnapTag(0), SnapTag(1)]);
}

#[test]
fn damaged_data_is_found_with_the_snapshots_that_read_it() {
    let machine = simple(SHAPE, 10);
    // Chunk 4 was saved for snapshot 1 when 2 did not exist, and again for 2.
    let entries = Surgeon::new(&machine).entries(Kind::Exceptions);
    let of_chunk: Vec<_> = entries.iter().filter(|(key, _)| key.0 == 4).collect();
    assert_eq!(of_chunk.len(), 2);
    for (&&(_, value), tag) in of_chunk.iter().zip([1, 2]) {
        let machine = copy_of(&machine);
        flip(&machine, value.place * 4096 + 17, 7);
        let problems = problems(&SHAPE, &machine);
        assert_eq!(problems.len(), 1, "{problems:#?}");
        let problem = found(&problems, Severity::Loss, "it holds origin chunk 4");
        assert_eq!(problem.place, Place::Chunk(StoreChunk(value.place)));
        assert_eq!(problem.snapshots, [SnapTag(tag)]);
    }
}

#[test]
fn counts_and_marks_are_compared_with_what_is_there() {
    let problems = after(|surgeon| surgeon.superblock.data_used += 1);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    found(&problems, Severity::Mendable, "count as used");
    for (change, words) in [
        (
            (|root| root.entries += 1) as fn(&mut TreeRoot),
            "entries, the superblock says",
        ),
        (|root| root.nodes += 1, "nodes, the superblock says"),
        (
            |root| root.root.as_mut().expect("a tree").2 += 1,
            "as newest sequence",
        ),
    ] {
        let problems = after(|surgeon| change(surgeon.root(Kind::Exceptions)));
        assert_eq!(problems.len(), 1, "{problems:#?}");
        found(&problems, Severity::Mendable, words);
    }
    let problems = after(|surgeon| surgeon.superblock.snapshot_count = 3);
    assert_eq!(problems.len(), 1, "{problems:#?}");
    found(
        &problems,
        Severity::Loss,
        "the snapshot table has 2 entries",
    );

    let problems = after(|surgeon| {
        let used = surgeon.entries(Kind::Overlays)[0].1.place;
        let mut map = surgeon.bitmap();
        map.set(used, false);
        surgeon.set_bitmap(&map);
    });
    assert_eq!(problems.len(), 1, "{problems:#?}");
    found(&problems, Severity::Mendable, "are in use, but marked free");

    let problems = after(|surgeon| {
        let end = surgeon.superblock.data_end.0;
        let mut map = surgeon.bitmap();
        (end - 3..end).for_each(|chunk| map.set(chunk, true));
        surgeon.set_bitmap(&map);
    });
    assert_eq!(problems.len(), 1, "one for the run: {problems:#?}");
    let words = "297 to 299 are marked used, but nothing owns them";
    found(&problems, Severity::Mendable, words);
}

#[test]
fn entries_that_contradict_each_other_are_all_named() {
    // Two entries for one store chunk.
    let problems = after(|surgeon| {
        let mut entries = surgeon.entries(Kind::Exceptions);
        entries[1].1 = entries[0].1;
        surgeon.set_entries(Kind::Exceptions, &entries);
    });
    let several: Vec<_> = problems
        .iter()
        .filter(|problem| problem.what.contains("it has several owners"))
        .collect();
    assert_eq!(several.len(), 2, "{problems:#?}");
    assert_eq!(several[0].snapshots, [SnapTag(1)]);
    assert_eq!(several[1].snapshots, [SnapTag(2)]);
    // An overlay over an exception's chunk.
    let problems = after(|surgeon| {
        let place = surgeon.entries(Kind::Exceptions)[0].1.place;
        let mut entries = surgeon.entries(Kind::Overlays);
        entries[1].1.place = place;
        surgeon.set_entries(Kind::Overlays, &entries);
    });
    let problem = found(
        &problems,
        Severity::Loss,
        "chunk 3 of the snapshot of sequence 2",
    );
    assert_eq!(problem.snapshots, [SnapTag(2)]);
    // A chunk outside the data region: where the metadata lies.
    let problems = after(|surgeon| {
        let mut entries = surgeon.entries(Kind::Exceptions);
        entries[3].1.place = 40;
        surgeon.set_entries(Kind::Exceptions, &entries);
    });
    found(&problems, Severity::Loss, "lies outside the data region");
    // Keys that cannot be.
    for (kind, key, words) in [
        (
            Kind::Exceptions,
            (90, 7),
            "is of no snapshot sequence given",
        ),
        (Kind::Overlays, (2, 48), "is beyond the end of its snapshot"),
        (Kind::Overlays, (3, 1), "is of a snapshot that is not there"),
    ] {
        let problems = after(|surgeon| {
            let mut entries = surgeon.entries(kind);
            let last = entries.len() - 1;
            entries[last].0 = key;
            surgeon.set_entries(kind, &entries);
        });
        found(&problems, Severity::Loss, words);
    }
    // Two pointers to one block: bitmaps, and trees.
    let problems = after(|surgeon| {
        let mut entries = surgeon.entries(Kind::Space);
        entries.push(((1, 0), entries[0].1));
        surgeon.set_entries(Kind::Space, &entries);
    });
    found(&problems, Severity::Mendable, "where another block lies");
    let problems = after(|surgeon| surgeon.superblock.overlays = surgeon.superblock.exceptions);
    let problem = found(&problems, Severity::Loss, "where another block lies");
    assert_eq!(problem.snapshots, [SnapTag(1), SnapTag(2)]);
}

#[test]
fn one_damage_does_not_hide_another() {
    let machine = simple(SHAPE, 10);
    let mut surgeon = Surgeon::new(&machine);
    let exception = surgeon.entries(Kind::Exceptions)[5].1.place;
    let (overlays, _, _) = surgeon.superblock.overlays.root.expect("a tree");
    let mut map = surgeon.bitmap();
    map.set(298, true);
    surgeon.set_bitmap(&map);
    surgeon.finish();
    flip(&machine, COPIES[1].to_offset() + 99, 0);
    flip(&machine, overlays.block.to_offset() + 80, 0);
    flip(&machine, exception * 4096, 0);
    let problems = problems(&SHAPE, &machine);
    let places: Vec<_> = problems.iter().map(|problem| problem.place).collect();
    for place in [
        Place::Superblock(1),
        Place::Block(overlays.block),
        Place::Chunk(StoreChunk(exception)),
    ] {
        assert!(places.contains(&place), "{place}: {problems:#?}");
    }
    // The mark without an owner may be that of a lost overlay: a sum tells of all three.
    found(
        &problems,
        Severity::Mendable,
        "3 store chunks are marked used",
    );
}
