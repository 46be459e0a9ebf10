// SPDX-License-Identifier: GPL-2.0-only
//! Promises of the engine that random power cuts seldom or never put to the test: each test makes the one
//! case in which breaking the promise shows. `cargo xtask mutants` breaks them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod harness;

use std::cell::Cell;
use std::rc::Rc;

use ddsnap::device::fault::{Call, Faults, FaultyDevice};
use ddsnap::device::latched::Latched;
use ddsnap::device::memory::{Event, Machine, MemoryDevice, Moment, Rng, Survival};
use ddsnap::device::{BlockDevice, Read, Write};
use ddsnap::format::superblock::COPIES;
use ddsnap::store::check::{CheckDevices, CheckOptions, Repaired, repair};
use ddsnap::store::{
    Devices, Done, InitOptions, Location, Op, OpenOptions, Reverting, Store, StoreError,
};
use ddsnap::units::{Chunk, SnapTag};
use harness::check::read_snapshot;
use harness::shape::{DATA, META, ORIGIN, Shape};

const COMBINED: Shape = Shape {
    chunk_bytes: 4096,
    origin_chunks: 48,
    lacking_sectors: 0,
    data_bytes: 1200 << 10,
    meta_bytes: 0,
    snapshots: 6,
};
const SEPARATE: Shape = Shape {
    meta_bytes: 1200 << 10,
    ..COMBINED
};
const TAG: SnapTag = SnapTag(1);

fn write_origin(machine: &Machine, chunk: u64, byte: u8) {
    let mut origin = machine.device(ORIGIN);
    let from = vec![byte; COMBINED.chunk_bytes as usize];
    let offset = chunk * COMBINED.chunk_bytes;
    origin
        .write(&[Write {
            offset,
            from: &from,
        }])
        .unwrap();
    origin.flush().unwrap();
}

/// The byte of the snapshot's chunk.
fn snapshot_byte(shape: &Shape, machine: &Machine, store: &mut Store, chunk: u64) -> u8 {
    let mut buffer = vec![0; shape.chunk_bytes as usize];
    read_snapshot(shape, machine, store, TAG.0, Chunk(chunk), &mut buffer).unwrap();
    assert!(buffer.iter().all(|&byte| byte == buffer[0]));
    buffer[0]
}

/// A new store, chunks 0 to 9 of whose origin hold 1 to 10, with a snapshot of that.
fn with_snapshot(shape: &Shape) -> (Machine, Store) {
    let machine = shape.machine();
    shape.initialize(&machine);
    (0..10).for_each(|chunk| write_origin(&machine, chunk, chunk as u8 + 1));
    let (mut store, _) = shape.open(&machine).unwrap();
    store.create(TAG, 5).unwrap().unwrap();
    (machine, store)
}

fn copy_out(store: &mut Store, chunk: u64) {
    let answers = store.commit(&[Op::OriginWrite(Chunk(chunk))]).unwrap();
    assert_eq!(answers, [Ok(Done::Unique)]);
}

/// A server copied chunk 0 out and was killed between its writes and its flush.
fn killed_before_the_flush(machine: &Machine, store: &mut Store) -> Machine {
    let mut moment = machine.moment();
    machine.record();
    copy_out(store, 0);
    let events = machine.recorded();
    let written = events
        .iter()
        .take_while(|event| matches!(event, Event::Write { .. }));
    written.for_each(|event| moment.advance(event));
    moment.cut(Survival::ProcessKilled, &mut Rng::new(1))
}

/// A server was killed between its writes and its flush. Its successor found the record and the copy in
/// the disks' caches, went on, and only the record became durable: the snapshot read what had never
/// been written.
#[test]
fn opening_makes_durable_what_recovery_has_read() {
    let (machine, mut store) = with_snapshot(&SEPARATE);
    let machine = killed_before_the_flush(&machine, &mut store);
    let (mut store, opened) = SEPARATE.open(&machine).unwrap();
    assert_eq!(opened.dropped_records, 0);
    store.set_priority(TAG, 3).unwrap().unwrap();
    copy_out(&mut store, 0);
    write_origin(&machine, 0, 99);
    let machine = machine.moment().cut(Survival::None, &mut Rng::new(1));
    let (mut store, _) = SEPARATE.open(&machine).unwrap();
    assert_eq!(snapshot_byte(&SEPARATE, &machine, &mut store, 0), 1);
}

/// As above, but the store was repaired. That leaves no record by which the missing copy could be told, and the
/// tree leads to it.
#[test]
fn a_repair_makes_durable_what_recovery_has_read() {
    let (machine, mut store) = with_snapshot(&SEPARATE);
    let machine = killed_before_the_flush(&machine, &mut store);
    machine.corrupt(META, COPIES[0].to_offset(), &[0x5a; 4096]);
    let devices = CheckDevices {
        data: Box::new(machine.device(DATA)),
        meta: Some(Box::new(machine.device(META))),
        origin: Some(Box::new(machine.device(ORIGIN))),
    };
    let options = CheckOptions {
        cache_bytes: 16 * 4096,
        data: true,
    };
    let (_, repaired) = repair(devices, &options, &mut |_| Ok(())).unwrap();
    assert_eq!(repaired, Repaired::Whole);
    let machine = machine.moment().cut(Survival::None, &mut Rng::new(1));
    write_origin(&machine, 0, 99);
    let (mut store, _) = SEPARATE.open(&machine).unwrap();
    assert_eq!(snapshot_byte(&SEPARATE, &machine, &mut store, 0), 1);
}

/// Cuts the power after each of the events; a superblock copy that was written and not flushed then is
/// garbage, as a torn write leaves it on a disk of large sectors. So are the copies `in_flight` until the first
/// flush. The store must open and be sound.
fn cut_with_garbage(start: &Moment, events: &[Event], mut in_flight: Vec<u64>) -> u32 {
    let mut moment = start.clone();
    let mut garbage = 0;
    for event in events {
        moment.advance(event);
        match event {
            Event::Flush { disk: DATA } => in_flight.clear(),
            Event::Write {
                disk: DATA, offset, ..
            } if COPIES.iter().any(|at| at.to_offset() == *offset) => {
                in_flight.push(*offset);
            }
            _ => {}
        }
        let machine = moment.cut(Survival::All, &mut Rng::new(1));
        for &offset in &in_flight {
            machine.corrupt(DATA, offset, &[0xa5; 4096]);
            garbage += 1;
        }
        let (mut store, _) = COMBINED.open(&machine).unwrap();
        store.audit(true).unwrap();
        for chunk in 0..10 {
            let found = snapshot_byte(&COMBINED, &machine, &mut store, chunk);
            assert_eq!(u64::from(found), chunk + 1);
        }
    }
    garbage
}

/// Of a superblock all that changes lies in its first sector, so a cut never tore one in a test, and
/// whatever was said about the only good copy went unproven.
#[test]
fn one_superblock_copy_is_good_whatever_becomes_of_the_one_being_written() {
    for (clean, damaged) in [(true, 0), (true, 1), (false, 0), (false, 1)] {
        let (machine, mut store) = with_snapshot(&COMBINED);
        copy_out(&mut store, 0);
        write_origin(&machine, 0, 99);
        if clean {
            store.close().unwrap();
        } else {
            drop(store);
        }
        machine.corrupt(DATA, COPIES[damaged].to_offset(), &[0x5a; 4096]);
        let machine = machine.moment().cut(Survival::All, &mut Rng::new(1));
        let start = machine.moment();
        machine.record();
        let (mut store, _) = COMBINED.open(&machine).unwrap();
        for chunk in 1..10 {
            copy_out(&mut store, chunk);
            write_origin(&machine, chunk, 99);
        }
        store.close().unwrap();
        assert!(cut_with_garbage(&start, &machine.recorded(), Vec::new()) >= 3);
    }
}

/// The moment in a checkpoint of a store in use when the first superblock copy was written, and which copy.
fn in_a_checkpoint() -> (Moment, u64) {
    let (machine, mut store) = with_snapshot(&COMBINED);
    let mut moment = machine.moment();
    machine.record();
    (0..10).for_each(|chunk| copy_out(&mut store, chunk));
    (0..40).for_each(|n| store.set_priority(TAG, n).unwrap().unwrap());
    let events = machine.recorded();
    for event in &events {
        moment.advance(event);
        match event {
            Event::Write {
                disk: DATA, offset, ..
            } if COPIES.iter().any(|at| at.to_offset() == *offset) => {
                return (moment, *offset);
            }
            _ => {}
        }
    }
    panic!("no checkpoint");
}

/// A server was killed in a checkpoint, and its newest superblock copy was in the disk's cache only when its
/// successor wrote the other one: a power cut tore both.
#[test]
fn opening_does_not_write_one_superblock_copy_while_the_other_is_in_a_cache() {
    let (moment, copy) = in_a_checkpoint();
    let machine = moment.cut(Survival::ProcessKilled, &mut Rng::new(1));
    let start = machine.moment();
    machine.record();
    let (mut store, opened) = COMBINED.open(&machine).unwrap();
    assert!(!opened.clean);
    store.set_priority(TAG, 1).unwrap().unwrap();
    cut_with_garbage(&start, &machine.recorded(), vec![copy]);
}

/// The flush of the newest superblock copy failed, and the successor read it from the cache that had lost it.
/// What only the older copy leads to counted as free and was used again, so nothing was whole after a
/// power cut.
#[test]
fn a_superblock_that_a_failed_flush_lost_is_written_before_anything_rests_on_it() {
    let (moment, _) = in_a_checkpoint();
    let machine = moment.cut(Survival::ProcessKilled, &mut Rng::new(1));
    machine.lose_unflushed(DATA);
    let mut moment = machine.moment();
    machine.record();
    let (mut store, opened) = COMBINED.open(&machine).unwrap();
    assert!(!opened.clean);
    (10..40).for_each(|chunk| copy_out(&mut store, chunk));
    for event in machine.recorded() {
        moment.advance(&event);
        let machine = moment.cut(Survival::None, &mut Rng::new(1));
        let (mut store, _) = COMBINED.open(&machine).unwrap();
        store.audit(true).unwrap();
        for chunk in 0..10 {
            let found = snapshot_byte(&COMBINED, &machine, &mut store, chunk);
            assert_eq!(u64::from(found), chunk + 1);
        }
    }
}

/// A disk whose next flush, if it is told so, fails and loses what it was to write.
struct Losing(MemoryDevice, Machine, Rc<Cell<bool>>);

impl BlockDevice for Losing {
    fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }

    fn alignment(&self) -> usize {
        self.0.alignment()
    }

    fn name(&self) -> &str {
        self.0.name()
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> std::io::Result<()> {
        self.0.read(batch)
    }

    fn write(&mut self, batch: &[Write<'_>]) -> std::io::Result<()> {
        self.0.write(batch)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        if self.2.take() {
            self.1.lose_unflushed(ORIGIN);
            return Err(std::io::ErrorKind::Other.into());
        }
        self.0.flush()
    }
}

/// A flush of the origin failed in a revert, the next one reported success, and the revert ended with what the
/// first one had lost not there.
#[test]
fn a_revert_does_again_what_a_failed_flush_may_have_lost() {
    let (machine, mut store) = with_snapshot(&COMBINED);
    for chunk in 0..10 {
        copy_out(&mut store, chunk);
        write_origin(&machine, chunk, 99);
    }
    store.close().unwrap();
    let fails = Rc::new(Cell::new(false));
    let devices = Devices {
        origin: Box::new(Losing(
            machine.device(ORIGIN),
            machine.clone(),
            fails.clone(),
        )),
        ..COMBINED.devices(&machine)
    };
    let cache_bytes = 16 * 4096;
    let (mut store, _) = Store::open(devices, &OpenOptions { cache_bytes }).unwrap();
    store.revert_begin(TAG).unwrap().unwrap();
    while store.revert_step(3).unwrap().unwrap() != Reverting::Checked {}
    store.revert_start().unwrap().unwrap();
    fails.set(true);
    let failed = loop {
        match store.revert_step(3) {
            Ok(step) => assert_eq!(step, Ok(Reverting::More)),
            Err(error) => break error,
        }
    };
    assert!(matches!(failed, StoreError::WriteOrigin { .. }), "{failed}");
    while store.revert_step(3).unwrap().unwrap() == Reverting::More {}
    assert_eq!(store.reverting(), None);
    // What others wrote before that flush nobody writes again: it would be missing from a snapshot that survives.
    let refused = store.create(SnapTag(2), 5).expect_err("a flush failed");
    assert!(
        matches!(refused, StoreError::FlushOrigin { .. }),
        "{refused}"
    );
    let machine = machine.moment().cut(Survival::None, &mut Rng::new(1));
    for chunk in 0..10 {
        assert!(
            machine.holds(ORIGIN, chunk * 4096, &[chunk as u8 + 1; 4096]),
            "{chunk}"
        );
    }
}

/// A snapshot's read that a server had answered waited at a slow disk when the server was killed. The next one moved the
/// chunk and gave its place to another: the read got that one's data.
#[test]
fn what_opening_has_moved_nobody_gets_the_place_of() {
    let (machine, mut store) = with_snapshot(&COMBINED);
    let place = |store: &mut Store, chunk| {
        let found = store.locate(TAG, Chunk(chunk)).unwrap().unwrap();
        let Location::Store(place) = found else {
            panic!("{found:?}")
        };
        place
    };
    copy_out(&mut store, 0);
    let old = place(&mut store, 0);
    drop(store);
    let machine = machine.moment().cut(Survival::All, &mut Rng::new(1));
    let (mut store, _) = COMBINED.open(&machine).unwrap();
    assert_ne!(place(&mut store, 0), old, "nothing was moved");
    // Until everything else is taken.
    let mut last = 0;
    'full: for tag in 2..50 {
        store.create(SnapTag(tag), 5).unwrap().unwrap();
        for chunk in 0..10 {
            let is_last = store.status().free_chunks <= 1;
            let answers = store.commit(&[Op::OriginWrite(Chunk(chunk))]).unwrap();
            let found = store.locate(SnapTag(tag), Chunk(chunk)).unwrap();
            assert_ne!(
                found,
                Ok(Location::Store(old)),
                "{chunk} of {tag}: {answers:?}"
            );
            if is_last {
                break 'full;
            }
            last = tag;
        }
    }
    for tag in 2..=last {
        store.delete(SnapTag(tag)).unwrap().unwrap();
    }
    while store.background_step(64).unwrap() {}
    // Who asks later is told the new place.
    store.close().unwrap();
    let (mut store, _) = COMBINED.open(&machine).unwrap();
    store.create(SnapTag(2), 5).unwrap().unwrap();
    let mut taken = false;
    for chunk in 0..10 {
        copy_out(&mut store, chunk);
        let found = store.locate(SnapTag(2), Chunk(chunk)).unwrap().unwrap();
        taken |= found == Location::Store(old);
    }
    assert!(taken, "the place is lost");
}

/// After a checkpoint either copy alone is the store: a bad sector in one costs nothing.
#[test]
fn either_superblock_copy_is_enough_after_a_checkpoint() {
    for damaged in COPIES {
        let (machine, mut store) = with_snapshot(&COMBINED);
        copy_out(&mut store, 0);
        write_origin(&machine, 0, 99);
        store.close().unwrap();
        let machine = machine.moment().cut(Survival::None, &mut Rng::new(1));
        machine.corrupt(DATA, damaged.to_offset(), &[0x5a; 4096]);
        let (mut store, opened) = COMBINED.open(&machine).unwrap();
        assert!(opened.clean, "the older superblock counts");
        assert_eq!(snapshot_byte(&COMBINED, &machine, &mut store, 0), 1);
    }
}

/// So is the copy that opening has mended.
#[test]
fn the_mended_superblock_copy_is_enough_after_opening() {
    for (damaged, records) in [(0, true), (1, true), (0, false), (1, false)] {
        let (machine, mut store) = with_snapshot(&COMBINED);
        copy_out(&mut store, 0);
        if records {
            drop(store);
        } else {
            // None to be written again, whose flush would do for the copy too.
            store.close().unwrap();
            drop(COMBINED.open(&machine).unwrap());
        }
        machine.corrupt(DATA, COPIES[damaged].to_offset(), &[0x5a; 4096]);
        COMBINED.open(&machine).unwrap();
        let machine = machine.moment().cut(Survival::None, &mut Rng::new(1));
        machine.corrupt(DATA, COPIES[1 - damaged].to_offset(), &[0x5a; 4096]);
        let (mut store, _) = COMBINED.open(&machine).unwrap();
        assert_eq!(snapshot_byte(&COMBINED, &machine, &mut store, 0), 1);
    }
}

/// The kernel reports a failed flush once, and the next one as done.
#[test]
fn a_device_stays_failed() {
    for call in [Call::Write, Call::Flush] {
        let machine = COMBINED.machine();
        let faults = Faults::default();
        let inner = FaultyDevice::new(machine.device(DATA), faults.clone());
        let mut device = Latched::new(Box::new(inner));
        faults.fail(call, 0);
        let write = Write {
            offset: 0,
            from: &[1; 512],
        };
        let first = device.write(&[write]).and_then(|()| device.flush());
        assert!(first.is_err() && faults.met() == 1);
        assert!(device.flush().is_err());
        let write = Write {
            offset: 0,
            from: &[1; 512],
        };
        assert!(device.write(&[write]).is_err());
    }
}

/// What `initialize` has answered is there, label and both copies, and before that there is no store
/// without its label.
#[test]
fn a_new_store_is_durable_and_never_there_without_its_label() {
    let machine = SEPARATE.machine();
    let start = machine.moment();
    machine.record();
    SEPARATE.initialize(&machine);
    let events = machine.recorded();
    let last = machine.moment();
    for seed in 0..40 {
        let mut rng = Rng::new(seed);
        let mut moment = start.clone();
        for event in &events {
            moment.advance(event);
            match SEPARATE.open(&moment.cut(Survival::Sectors(50), &mut rng)) {
                Ok((mut store, _)) => store.audit(true).unwrap(),
                Err(error) => assert!(matches!(error, StoreError::NoStore { .. }), "{error}"),
            }
        }
    }
    for damaged in COPIES {
        let machine = last.cut(Survival::None, &mut Rng::new(1));
        machine.corrupt(META, damaged.to_offset(), &[0x5a; 4096]);
        SEPARATE.open(&machine).unwrap();
    }
}

/// A copy of the old store's superblock that outlived the first of the new store's was the newer one, and
/// counted.
#[test]
fn an_old_store_does_not_come_back_over_a_new_one() {
    let (machine, mut store) = with_snapshot(&COMBINED);
    copy_out(&mut store, 0);
    store.close().unwrap();
    let mut moment = machine.moment();
    machine.record();
    let options = InitOptions {
        chunk: COMBINED.shift(),
        journal_bytes: None,
        now: 2,
        uuid: [4; 16],
    };
    Store::initialize(&mut COMBINED.devices(&machine), &options).unwrap();
    let events = machine.recorded();
    let is_new = |event: &Event| matches!(event, Event::Write { bytes, .. } if bytes.iter().any(|&b| b != 0));
    let first_new = events.iter().position(is_new).unwrap();
    for (index, event) in events.iter().enumerate() {
        moment.advance(event);
        for seed in 0..20 {
            if index < first_new {
                continue;
            }
            let machine = moment.cut(Survival::Writes(50), &mut Rng::new(seed));
            match COMBINED.open(&machine) {
                Ok((store, _)) => assert_eq!(store.uuid(), [4; 16]),
                Err(error) => assert!(matches!(error, StoreError::NoStore { .. }), "{error}"),
            }
        }
    }
}

/// A disk that says how long its sectors are.
struct WithSectors(MemoryDevice, Option<u64>);

impl BlockDevice for WithSectors {
    fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }

    fn alignment(&self) -> usize {
        self.0.alignment()
    }

    fn sector_bytes(&self) -> Option<u64> {
        self.1
    }

    fn name(&self) -> &str {
        self.0.name()
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> std::io::Result<()> {
        self.0.read(batch)
    }

    fn write(&mut self, batch: &[Write<'_>]) -> std::io::Result<()> {
        self.0.write(batch)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// An origin with sectors of 512 bytes and a store with sectors of 4096 were accepted, and its snapshots could not
/// be mounted: a file system reads and writes single sectors of 512 bytes. Stores with smaller sectors, and files,
/// serve any origin.
#[test]
fn a_store_with_larger_sectors_than_the_origin_is_refused() {
    let machine = COMBINED.machine();
    let devices = |origin, data| Devices {
        origin: Box::new(WithSectors(machine.device(ORIGIN), origin)),
        data: Box::new(WithSectors(machine.device(DATA), data)),
        meta: None,
    };
    let options = InitOptions {
        chunk: COMBINED.shift(),
        journal_bytes: None,
        now: 1,
        uuid: [9; 16],
    };
    let initialize = |origin, data| Store::initialize(&mut devices(origin, data), &options);
    let open = |origin, data| {
        let cache_bytes = 16 * 4096;
        Store::open(devices(origin, data), &OpenOptions { cache_bytes })
    };
    let told = "its sectors have 4096 bytes and those of the origin, origin, have 512: put the snapshot store on \
                a device with sectors of 512 bytes";
    machine.record();
    match initialize(Some(512), Some(4096)) {
        Err(StoreError::CannotInitialize { device, problem }) => {
            assert_eq!((&device[..], &problem[..]), ("data", told));
        }
        other => panic!("{other:?}"),
    }
    assert!(machine.recorded().is_empty());
    for (origin, data) in [
        (Some(512), Some(512)),
        (Some(4096), Some(4096)),
        (Some(4096), Some(512)),
        (None, Some(4096)),
        (Some(512), None),
    ] {
        initialize(origin, data).unwrap();
        let (store, _) = open(origin, data).unwrap();
        store.close().unwrap();
        // It was copied to another disk, say.
        machine.record();
        match open(Some(512), Some(4096)).map(drop) {
            Err(StoreError::WrongDevice { device, problem }) => {
                assert_eq!((&device[..], &problem[..]), ("data", told));
            }
            other => panic!("{other:?}"),
        }
        assert!(machine.recorded().is_empty());
    }
}
