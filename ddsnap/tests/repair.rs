// SPDX-License-Identifier: GPL-2.0-only
//! A repair makes any damaged store sound, and no snapshot that lives on reads a byte that is not its own.
//!
//! Random damage to metadata and saved data; then every live snapshot must read what the model says, and
//! only those that the check named may be gone. The power goes after every write of a repair: repairing
//! again must come to the same.

mod harness;

use std::collections::{BTreeMap, BTreeSet};

use ddsnap::device::memory::{Event as DiskEvent, Machine, Rng, Survival};
use ddsnap::device::{BlockDevice, Read};
use ddsnap::format::superblock::COPIES;
use ddsnap::store::check::{
    CheckDevices, CheckOptions, Checked, Event, Repaired, Severity, check, repair,
};
use ddsnap::store::dump::{DumpEntry, DumpPlace};
use ddsnap::store::{Op, SnapState, StoreError};
use ddsnap::units::Chunk;
use harness::check::{check_bookmark, read_snapshot};
use harness::model::Model;
use harness::seed;
use harness::shape::{DATA, META, ORIGIN, Shape};
use harness::volume::Volume;
use harness::workload::{Step, choose};

const SHAPE: Shape = Shape {
    chunk_bytes: 4096,
    origin_chunks: 48,
    lacking_sectors: 0,
    data_bytes: 1200 << 10,
    meta_bytes: 0,
    snapshots: 6,
};
/// All metadata of it lies in front of this byte.
const META_END: u64 = 576 << 10;
/// Enough entries for trees of two levels.
const DEEP: Shape = Shape {
    chunk_bytes: 512,
    origin_chunks: 1500,
    lacking_sectors: 0,
    data_bytes: 3 << 20,
    ..SHAPE
};
const OPTIONS: CheckOptions = CheckOptions {
    cache_bytes: 16 * 4096,
    data: true,
};

fn devices(shape: &Shape, machine: &Machine, origin: bool) -> CheckDevices {
    CheckDevices {
        data: Box::new(machine.device(DATA)),
        meta: (shape.meta_bytes > 0)
            .then(|| Box::new(machine.device(META)) as Box<dyn BlockDevice>),
        origin: origin.then(|| Box::new(machine.device(ORIGIN)) as Box<dyn BlockDevice>),
    }
}

/// Repairs, and gives what was squashed.
fn mend(
    shape: &Shape,
    machine: &Machine,
) -> Result<(Checked, Repaired, BTreeSet<u32>), StoreError> {
    let mut squashed = BTreeSet::new();
    let mut told = false;
    let mut named = BTreeSet::new();
    let (checked, repaired) = repair(devices(shape, machine, true), &OPTIONS, &mut |event| {
        match event {
            Event::Problem(problem) => {
                assert!(!told, "a problem after the repair began: {problem}");
                if problem.severity == Severity::Loss {
                    named.extend(problem.snapshots.iter().map(|tag| tag.0));
                }
            }
            Event::GivesUp(tags) => {
                told = true;
                squashed.extend(tags.iter().map(|tag| tag.0));
            }
            Event::Progress(..) => {}
        }
        Ok(())
    })?;
    assert_eq!(squashed, named, "only what problems name is given up");
    Ok((checked, repaired, squashed))
}

fn assert_sound(shape: &Shape, machine: &Machine) {
    let mut all = Vec::new();
    check(devices(shape, machine, true), &OPTIONS, &mut |event| {
        all.extend(match event {
            Event::Problem(problem) => Some(problem),
            _ => None,
        });
        Ok(())
    })
    .expect("a store");
    assert!(all.is_empty(), "{all:#?}");
}

/// States of the snapshots, once all live ones were compared with the model.
fn compare(
    shape: &Shape,
    machine: &Machine,
    model: &Model,
    context: &str,
) -> BTreeMap<u32, SnapState> {
    let (mut store, _) = shape
        .open(machine)
        .unwrap_or_else(|error| panic!("{context}: {error}"));
    store
        .audit(true)
        .unwrap_or_else(|error| panic!("{context}: {error}"));
    let mut states = BTreeMap::new();
    let mut buffer = vec![0; shape.chunk_bytes as usize];
    for info in store.snapshots() {
        let tag = info.tag.0;
        let Some(snapshot) = model.snapshots.get(&tag) else {
            panic!("{context}: snapshot {tag} came from nowhere");
        };
        assert_eq!(info.created, snapshot.created, "{context}: snapshot {tag}");
        states.insert(tag, info.state);
        if info.state == SnapState::Bookmark {
            assert_eq!(snapshot.state, info.state, "{context}: {tag} rose");
            check_bookmark(shape, machine, &mut store, &info, snapshot)
                .unwrap_or_else(|problem| panic!("{context}: {problem}"));
        }
        if info.state != SnapState::Live {
            continue;
        }
        assert_eq!(snapshot.state, SnapState::Live, "{context}: {tag} rose");
        for (index, chunk) in snapshot.chunks.iter().enumerate() {
            let at = Chunk(index as u64);
            read_snapshot(shape, machine, &mut store, tag, at, &mut buffer)
                .unwrap_or_else(|error| panic!("{context}: snapshot {tag}: {error}"));
            assert!(
                *buffer == *chunk.now,
                "{context}: snapshot {tag} chunk {index} reads what is not its own"
            );
        }
    }
    states
}

/// A volume with some history, closed in order.
fn closed(shape: Shape, seed: u64, steps: u64) -> (Machine, Model) {
    let mut rng = Rng::new(seed);
    let mut volume = Volume::new(shape);
    for _ in 0..steps {
        let step = choose(&mut rng, &shape, &volume.model, &mut volume.next_tag);
        volume.apply(&step);
    }
    let Volume {
        store,
        machine,
        model,
        ..
    } = volume;
    store.close().expect("close");
    (machine, model)
}

/// Three snapshots and two levels of index, closed in order.
fn deep() -> (Machine, Model) {
    let mut volume = Volume::new(DEEP);
    for tag in 1..=3 {
        volume.apply(&Step::Create(tag));
        for first in (0..DEEP.origin_chunks / 2).step_by(50) {
            let ops = (first..first + 50)
                .map(|chunk| Op::OriginWrite(Chunk(chunk * 7 % DEEP.origin_chunks)))
                .collect();
            volume.apply(&Step::Group { ops, write: true });
        }
    }
    let Volume {
        store,
        machine,
        model,
        ..
    } = volume;
    store.close().expect("close");
    (machine, model)
}

fn copy_of(machine: &Machine) -> Machine {
    machine.moment().cut(Survival::All, &mut Rng::new(0))
}

/// Damages a sector the way a disk might.
fn damage(machine: &Machine, sector: u64, rng: &mut Rng) {
    let offset = sector * 512;
    let mut bytes = [0; 512];
    let into = &mut bytes;
    let read = machine.device(DATA).read(&mut [Read { offset, into }]);
    if read.is_err() {
        return; // It is hurt already.
    }
    match rng.below(4) {
        3 => return machine.make_unreadable(DATA, offset..offset + 512),
        0 => bytes[rng.below(512) as usize] ^= 1 << rng.below(8),
        1 => bytes.fill(0),
        _ => bytes
            .iter_mut()
            .for_each(|byte| *byte = rng.next_u64() as u8),
    }
    machine.corrupt(DATA, offset, &bytes);
}

/// Sectors of saved chunks.
fn saved(shape: &Shape, machine: &Machine) -> Vec<u64> {
    let (mut store, _) = shape.open(&copy_of(machine)).expect("open");
    let (entries, _) = store
        .dump_step(DumpPlace::START, 0..=u64::MAX, 10_000)
        .expect("dump");
    let exceptions = entries.into_iter().filter_map(|entry| match entry {
        DumpEntry::Exception { place, .. } => Some(place.0 * shape.chunk_bytes / 512),
        DumpEntry::Mark { .. } | DumpEntry::Overlay { .. } => None,
    });
    exceptions.collect()
}

/// Whether `states` is what the model says, less what was squashed; all of it unless the table was hurt.
fn only_named_are_gone(
    model: &Model,
    states: &BTreeMap<u32, SnapState>,
    squashed: &BTreeSet<u32>,
    context: &str,
) -> u64 {
    let mut missing = 0;
    for (tag, snapshot) in &model.snapshots {
        match states.get(tag) {
            None => missing += 1,
            Some(SnapState::Live | SnapState::Bookmark) => {
                assert!(!squashed.contains(tag), "{context}: {tag}");
            }
            Some(SnapState::Squashed) => assert!(
                squashed.contains(tag) || snapshot.state == SnapState::Squashed,
                "{context}: {tag} was squashed, but not named"
            ),
        }
    }
    missing
}

#[test]
fn whatever_is_damaged_no_live_snapshot_reads_what_is_not_its_own() {
    let mut rng = Rng::new(seed());
    let (mut whole, mut lossy, mut lived, mut died, mut vanished) = (0, 0, 0, 0, 0);
    for round in 0..600 {
        let context = format!("seed {} round {round}", seed());
        let (machine, model) = closed(SHAPE, seed() ^ round, 30 + round % 60);
        let data = saved(&SHAPE, &machine);
        for _ in 0..1 + rng.below(3) {
            let sector = match rng.below(4) {
                0 if !data.is_empty() => data[rng.below(data.len() as u64) as usize] + rng.below(8),
                1 => rng.below(2) * 128 + rng.below(2), // the superblock's copies
                _ => rng.below(META_END / 512),
            };
            damage(&machine, sector, &mut rng);
        }
        let (checked, repaired, squashed) = match mend(&SHAPE, &machine) {
            Ok(mended) => mended,
            Err(StoreError::NoStore { .. }) => continue,
            Err(error) => panic!("{context}: {error}"),
        };
        assert_sound(&SHAPE, &machine);
        let states = compare(&SHAPE, &machine, &model, &context);
        let missing = only_named_are_gone(&model, &states, &squashed, &context);
        match repaired {
            Repaired::Sound => assert_eq!(checked.problems, 0),
            Repaired::Whole => {
                whole += 1;
                assert!(squashed.is_empty() && missing == 0, "{context}");
            }
            Repaired::WithLoss => {
                lossy += 1;
                let live = |state: &&SnapState| **state == SnapState::Live;
                lived += states.values().filter(live).count();
                died += squashed.len();
                vanished += missing;
            }
            Repaired::Undecided => panic!("{context}: the origin was given"),
        }
    }
    println!("whole {whole} lossy {lossy} lived {lived} died {died} vanished {vanished}");
    assert!(whole > 20 && lossy > 20 && lived > 0 && died > 20 && vanished > 0);
}

#[test]
fn the_power_may_go_during_a_repair() {
    let mut rng = Rng::new(seed());
    let (machine, model) = deep();
    let superblocks = [0, 128];
    let saved = saved(&DEEP, &machine);
    let in_use: Vec<u64> = (256..META_END / 512)
        .filter(|&sector| {
            let copy = copy_of(&machine);
            damage(&copy, sector, &mut Rng::new(5));
            let found = check(devices(&DEEP, &copy, true), &OPTIONS, &mut |_| Ok(()));
            found.expect("a store").problems > 0
        })
        .collect();
    let mut points = 0;
    for round in 0..12 {
        let machine = copy_of(&machine);
        if round % 3 != 0 {
            damage(
                &machine,
                in_use[rng.below(in_use.len() as u64) as usize],
                &mut rng,
            );
        }
        if round % 3 == 1 {
            damage(
                &machine,
                saved[rng.below(saved.len() as u64) as usize],
                &mut rng,
            );
        }
        if round % 2 == 0 {
            damage(&machine, superblocks[(round / 2) % 2], &mut rng);
        }
        let mut moment = machine.moment();
        machine.record();
        let (_, _, squashed) = mend(&DEEP, &machine).expect("repair");
        let events = machine.recorded();
        let wanted = compare(&DEEP, &machine, &model, "uncut");
        only_named_are_gone(&model, &wanted, &squashed, "uncut");
        for event in std::iter::once(None).chain(events.iter().map(Some)) {
            if let Some(event) = event {
                moment.advance(event);
            }
            for survival in [
                Survival::None,
                Survival::All,
                Survival::Writes(50),
                Survival::Sectors(50),
            ] {
                points += 1;
                let context = format!("seed {} round {round} {survival:?}", seed());
                let machine = moment.cut(survival, &mut rng);
                mend(&DEEP, &machine).unwrap_or_else(|error| panic!("{context}: {error}"));
                assert_sound(&DEEP, &machine);
                let states = compare(&DEEP, &machine, &model, &context);
                assert_eq!(states, wanted, "{context}");
            }
        }
    }
    println!("{points} points");
    assert!(points > 400);
}

/// A superblock may be torn while it is written: so there must be a whole copy all the time. It never is in
/// these tests, whose superblocks say all in their first sector.
#[test]
fn a_bad_copy_of_the_superblock_is_durable_before_the_good_one_is_touched() {
    let (machine, model) = closed(SHAPE, seed(), 40);
    let all = compare(&SHAPE, &copy_of(&machine), &model, "before");
    for (copy, at) in COPIES.into_iter().enumerate() {
        let machine = copy_of(&machine);
        machine.corrupt(DATA, at.to_offset(), &[0; 512]);
        machine.record();
        let (_, repaired, squashed) = mend(&SHAPE, &machine).expect("repair");
        assert_eq!((repaired, squashed.len()), (Repaired::Whole, 0));
        let superblocks = COPIES.map(|at| at.to_offset());
        let order: Vec<_> = machine
            .recorded()
            .into_iter()
            .filter_map(|event| match event {
                DiskEvent::Write { offset, .. } if superblocks.contains(&offset) => Some(offset),
                DiskEvent::Write { .. } => None,
                DiskEvent::Flush { .. } => Some(u64::MAX),
            })
            .skip_while(|&at| at == u64::MAX)
            .collect();
        let other = superblocks[1 - copy];
        assert_eq!(order, [at.to_offset(), u64::MAX, other, u64::MAX]);
        assert_sound(&SHAPE, &machine);
        assert_eq!(compare(&SHAPE, &machine, &model, "after"), all);
    }
}

/// The journal begins at 128 KiB, a block for each record here.
fn damage_record(volume: &Volume, record: u64) {
    let mut rng = Rng::new(seed());
    damage(&volume.machine, 256 + (record - 1) * 8, &mut rng);
}

/// Asks for the first `chunks` chunks and writes them.
fn write(volume: &mut Volume, chunks: u64) {
    let ops = (0..chunks).map(|chunk| Op::OriginWrite(Chunk(chunk)));
    let ops = ops.collect();
    volume.apply(&Step::Group { ops, write: true });
}

/// Live snapshots, each of which reads what the model says.
fn living(volume: &Volume) -> Vec<u32> {
    let states = compare(&SHAPE, &copy_of(&volume.machine), &volume.model, "after");
    let live = states
        .into_iter()
        .filter(|(_, state)| *state == SnapState::Live);
    live.map(|(tag, _)| tag).collect()
}

/// A record that is lost cost every snapshot and all that was recorded behind it, though it can be read: of
/// what was lost only those snapshots can need anything that were there.
#[test]
fn a_gap_in_the_journal_costs_the_snapshots_it_may_have_served() {
    let mut volume = Volume::new(SHAPE);
    (0..4).for_each(|tag| volume.apply(&Step::Create(tag)));
    write(&mut volume, 6);
    volume.apply(&Step::Delete(0));
    damage_record(&volume, 3);
    let (_, repaired, squashed) = mend(&SHAPE, &volume.machine).expect("repair");
    assert_eq!(repaired, Repaired::WithLoss);
    assert_eq!(squashed, [1].into());
    assert_sound(&SHAPE, &volume.machine);
    assert_eq!(living(&volume), [3]);
    let (mut store, opened) = SHAPE.open(&volume.machine).expect("open");
    assert!(opened.clean);
    let states: Vec<_> = store
        .snapshots()
        .iter()
        .map(|s| (s.tag.0, s.state))
        .collect();
    assert_eq!(states, [(1, SnapState::Squashed), (3, SnapState::Live)]);
    // It is a store like any other: new snapshots, and room again.
    while store.background_step(100).expect("sweep") {}
    assert_eq!(
        store.status().free_chunks + 6,
        store.status().data_chunks,
        "what snapshot 3 has"
    );
    store
        .create(ddsnap::units::SnapTag(9), 5)
        .expect("create")
        .expect("a free tag");
}

/// The lost record freed chunks that a later copy-out took again. In the index two entries led to each, which
/// cost the snapshot that has them now.
#[test]
fn chunks_that_a_lost_record_freed_belong_to_who_took_them() {
    let mut volume = Volume::new(SHAPE);
    for tag in 1..=3 {
        volume.apply(&Step::Create(tag));
        write(&mut volume, 48);
    }
    volume.apply(&Step::Delete(1));
    // The sweep removes 48 entries by record 8, and forgets the snapshot by record 9.
    while volume.store.background_step(256).expect("sweep") {}
    volume.apply(&Step::Create(4));
    write(&mut volume, 48);
    assert!(!volume.store.is_checkpoint_under_way());
    let places = |volume: &mut Volume| {
        let dumped = volume.store.dump_step(DumpPlace::START, 0..=u64::MAX, 1000);
        let places = dumped
            .expect("dump")
            .0
            .into_iter()
            .map(|entry| match entry {
                DumpEntry::Exception { place, .. } => place.0,
                other => panic!("{other:?}"),
            });
        places.collect::<BTreeSet<_>>()
    };
    assert_eq!(places(&mut volume).len(), 3 * 48);
    damage_record(&volume, 8);
    let (_, repaired, squashed) = mend(&SHAPE, &volume.machine).expect("repair");
    assert_eq!((repaired, squashed), (Repaired::WithLoss, [2, 3].into()));
    assert_sound(&SHAPE, &volume.machine);
    assert_eq!(living(&volume), [4]);
}

/// The record that made a snapshot is lost, or the one that deleted it, and its tag was given anew.
#[test]
fn what_a_lost_record_made_or_deleted_does_not_confuse_what_follows() {
    for lost in 2..=6 {
        let mut volume = Volume::new(SHAPE);
        volume.apply(&Step::Create(1)); // 1
        write(&mut volume, 3); // 2
        volume.apply(&Step::Create(2)); // 3
        volume.apply(&Step::Group {
            ops: vec![Op::SnapshotWrite(ddsnap::units::SnapTag(2), Chunk(7))],
            write: true,
        }); // 4
        write(&mut volume, 5); // 5
        volume.apply(&Step::Delete(2)); // 6
        volume.apply(&Step::Create(2)); // 7
        write(&mut volume, 9); // 8
        volume.apply(&Step::Priority(2, 5)); // 9
        damage_record(&volume, lost);
        let (_, repaired, squashed) = mend(&SHAPE, &volume.machine).expect("repair");
        assert_eq!(repaired, Repaired::WithLoss, "record {lost}");
        assert_eq!(squashed, [1].into(), "record {lost}");
        assert_sound(&SHAPE, &volume.machine);
        assert_eq!(living(&volume), [2], "record {lost}");
    }
}

#[test]
fn what_only_the_origin_can_decide_is_not_touched_without_it() {
    let mut volume = Volume::new(SHAPE);
    volume.apply(&Step::Create(3));
    let ops = vec![Op::OriginWrite(Chunk(5))];
    volume.apply(&Step::Group { ops, write: false });
    let place = saved_last(&mut volume);
    volume.machine.corrupt(DATA, place * 4096, &[1; 512]);
    let machine = volume.machine;
    machine.record();
    let (checked, repaired) =
        repair(devices(&SHAPE, &machine, false), &OPTIONS, &mut |_| Ok(())).expect("a store");
    assert_eq!((checked.undecided, repaired), (1, Repaired::Undecided));
    assert!(machine.recorded().is_empty());
    // The origin still has that chunk: nothing is lost. Once it was written, something is.
    let (_, repaired, _) = mend(&SHAPE, &copy_of(&machine)).expect("a store");
    assert_eq!(repaired, Repaired::Sound);
    machine.corrupt(ORIGIN, 5 * 4096, &[2; 512]);
    let (_, repaired, squashed) = mend(&SHAPE, &machine).expect("a store");
    assert_eq!((repaired, squashed), (Repaired::WithLoss, [3].into()));
    assert_sound(&SHAPE, &machine);
}

fn saved_last(volume: &mut Volume) -> u64 {
    let (entries, _) = volume
        .store
        .dump_step(DumpPlace::START, 0..=u64::MAX, 10)
        .expect("dump");
    match entries[..] {
        [DumpEntry::Exception { place, .. }] => place.0,
        _ => panic!("{entries:?}"),
    }
}

/// The new state is written beside the old one. Without room for it nothing may have changed.
#[test]
fn a_repair_without_room_leaves_the_store_as_it_was() {
    const SMALL: Shape = Shape {
        chunk_bytes: 512,
        origin_chunks: 4000,
        lacking_sectors: 0,
        data_bytes: 64 << 20,
        meta_bytes: 1200 << 10,
        snapshots: 60,
    };
    let mut volume = Volume::new(SMALL);
    for tag in 1.. {
        volume.apply(&Step::Create(tag));
        if volume.refused_full > 0 {
            break;
        }
        // None is given up for room.
        volume.apply(&Step::Priority(tag, 127));
        for first in (0..SMALL.origin_chunks).step_by(100) {
            let ops = (first..first + 100)
                .map(|chunk| Op::OriginWrite(Chunk(chunk * 7 % SMALL.origin_chunks)))
                .collect();
            volume.apply(&Step::Group { ops, write: false });
        }
    }
    let Volume {
        store,
        machine,
        model,
        ..
    } = volume;
    let free = store.status().free_meta_blocks;
    store.close().expect("close");
    let before = compare(&SMALL, &copy_of(&machine), &model, "before");
    // A node of an index, so that the index has to be made anew.
    let mut refused = 0;
    for sector in (256..SMALL.meta_bytes / 512).step_by(8) {
        let copy = copy_of(&machine);
        let offset = sector * 512;
        let mut old = [0; 512];
        let into = &mut old[..];
        copy.device(META)
            .read(&mut [Read { offset, into }])
            .expect("read");
        copy.corrupt(META, offset, &[0x55; 512]);
        let mended = repair(devices(&SMALL, &copy, true), &OPTIONS, &mut |_| Ok(()));
        let Err(error) = mended else { continue };
        assert!(matches!(error, StoreError::MetaExhausted { .. }), "{error}");
        refused += 1;
        copy.corrupt(META, offset, &old);
        assert_sound(&SMALL, &copy);
        assert_eq!(compare(&SMALL, &copy, &model, "after"), before);
        if refused == 3 {
            break;
        }
    }
    println!("{free} free blocks, {refused} repairs refused");
    assert_eq!(refused, 3);
}
