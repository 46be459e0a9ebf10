// SPDX-License-Identifier: GPL-2.0-only
//! Disks and caches that behave badly in one way each: sectors that a power cut left unreadable, a cache that
//! shows what a failed flush lost, writes of a killed server that land late.

mod harness;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::ops::Range;
use std::rc::Rc;

use ddsnap::device::memory::{Event, Machine, Moment, Rng, Survival};
use ddsnap::device::{BlockDevice, Read, Write};
use ddsnap::store::{Devices, Done, InitOptions, Location, Op, OpenOptions, Store, StoreError};
use ddsnap::units::{Chunk, SnapTag};
use harness::check::read_snapshot;
use harness::shape::{DATA, ORIGIN, Shape};
use harness::volume::Volume;

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
/// Where its ring begins, of 16 blocks.
const RING: u64 = 128 << 10;
const BLOCK: u64 = 4096;

fn commit(store: &mut Store, chunk: u64) {
    let answers = store.commit(&[Op::OriginWrite(Chunk(chunk))]);
    assert_eq!(answers.expect("commit"), [Ok(Done::Unique)]);
}

fn fill(machine: &Machine, chunk: u64, byte: u8) {
    let mut origin = machine.device(ORIGIN);
    let (offset, from) = (chunk * SHAPE.chunk_bytes, &[byte; 4096][..]);
    origin.write(&[Write { offset, from }]).expect("write");
    origin.flush().expect("flush");
}

fn assert_reads(machine: &Machine, store: &mut Store, tag: u32, chunk: u64, byte: u8) {
    let mut found = vec![0; SHAPE.chunk_bytes as usize];
    read_snapshot(&SHAPE, machine, store, tag, Chunk(chunk), &mut found).expect("read");
    assert!(
        found == [byte; 4096],
        "snapshot {tag} chunk {chunk}: {}",
        found[0]
    );
}

/// Four snapshots with a saved chunk each, in the trees; then three records of a block in the ring.
fn history() -> Volume {
    let mut volume = Volume::new(SHAPE);
    for tag in 1..=4 {
        let created = volume.store.create(SnapTag(tag), 1);
        created.expect("create").expect("a free tag");
        commit(&mut volume.store, tag.into());
    }
    volume.store.close().expect("close");
    volume.store = SHAPE.open(&volume.machine).expect("open").0;
    (10..13).for_each(|chunk| commit(&mut volume.store, chunk));
    volume
}

/// The store is opened as if nothing were wrong, and everything that was acknowledged is there.
fn assert_nothing_is_lost(machine: &Machine, context: &str) {
    let (mut store, _) = SHAPE
        .open(machine)
        .unwrap_or_else(|error| panic!("{context}: {error}"));
    let tags: Vec<_> = store.snapshots().iter().map(|s| s.tag.0).collect();
    assert_eq!(tags, [1, 2, 3, 4], "{context}");
    for chunk in 10..13 {
        let found = store
            .locate(SnapTag(4), Chunk(chunk))
            .expect("locate")
            .expect("live");
        assert!(matches!(found, Location::Store(_)), "{context}: {chunk}");
    }
    store.audit(true).expect("sound");
    // It goes on, over the bad place too.
    (13..40).for_each(|chunk| commit(&mut store, chunk));
    store.close().expect("close");
    SHAPE
        .open(machine)
        .expect("open")
        .0
        .audit(true)
        .expect("sound");
}

/// What is on the disks of a history after so many events of a further copy-out, of chunk 20.
fn in_a_copy_out(events: impl Fn(&[Event]) -> usize) -> (Moment, Vec<Event>) {
    let mut volume = history();
    let mut moment = volume.machine.moment();
    volume.machine.record();
    commit(&mut volume.store, 20);
    let recorded = volume.machine.recorded();
    let upto = events(&recorded);
    recorded[..upto]
        .iter()
        .for_each(|event| moment.advance(event));
    (moment, recorded)
}

fn before_the_flush(events: &[Event]) -> usize {
    let flush = |event: &Event| matches!(event, Event::Flush { .. });
    events.iter().position(flush).expect("a flush")
}

fn all_of(moment: &Moment) -> Machine {
    moment.cut(Survival::All, &mut Rng::new(1))
}

/// The whole store was refused, and a repair squashed every snapshot.
#[test]
fn an_unreadable_copy_that_was_never_acknowledged_is_dropped() {
    // All is written, not flushed: nobody was answered.
    let (moment, events) = in_a_copy_out(before_the_flush);
    let copy = events.iter().find_map(|event| match event {
        Event::Write {
            disk: DATA, offset, ..
        } if *offset >= META_END => Some(*offset),
        _ => None,
    });
    let copy = copy.expect("a copy");
    for len in [512, BLOCK] {
        let machine = all_of(&moment);
        machine.make_unreadable(DATA, copy..copy + len);
        assert_nothing_is_lost(&machine, &format!("{len} bytes"));
    }
}

/// The copy of a group that was acknowledged cannot be read and the origin has other data by now: that is lost,
/// and nothing else may be made of it.
#[test]
fn an_unreadable_copy_that_the_origin_no_longer_has_is_refused() {
    let (moment, events) = in_a_copy_out(<[Event]>::len);
    let copy = events.iter().find_map(|event| match event {
        Event::Write {
            disk: DATA, offset, ..
        } if *offset >= META_END => Some(*offset),
        _ => None,
    });
    let copy = copy.expect("a copy");
    let machine = all_of(&moment);
    fill(&machine, 20, 0xee);
    machine.make_unreadable(DATA, copy..copy + 512);
    let error = SHAPE.open(&machine).err().expect("opened");
    assert!(
        matches!(&error, StoreError::Journal { problem, .. } if problem.contains("chunk 20")),
        "{error}"
    );
}

fn ring_block(number: u64) -> Range<u64> {
    RING + number * BLOCK..RING + (number + 1) * BLOCK
}

/// The whole store was refused, and a repair squashed every snapshot.
#[test]
fn an_unreadable_block_at_the_rings_head_is_its_end() {
    let machine = all_of(&history().machine.moment());
    machine.make_unreadable(DATA, ring_block(3));
    assert_nothing_is_lost(&machine, "the head");
}

/// The whole store was refused, and a repair squashed every snapshot.
#[test]
fn an_unreadable_block_of_the_ring_that_was_never_written_costs_no_snapshot() {
    let machine = all_of(&history().machine.moment());
    machine.make_unreadable(DATA, ring_block(15));
    assert_nothing_is_lost(&machine, "the last block");
}

/// A record has what it says in its first sectors, the rest of its block is zero.
#[test]
fn an_unreadable_sector_without_entries_costs_nothing() {
    for sector in 1..8 {
        for record in 0..3 {
            let machine = all_of(&history().machine.moment());
            let at = ring_block(record).start + sector * 512;
            machine.make_unreadable(DATA, at..at + 512);
            assert_nothing_is_lost(&machine, &format!("record {record} sector {sector}"));
        }
    }
}

/// The flush of a group failed that took the last free chunk. The next server had no room to write that copy
/// again elsewhere, took a flush that did nothing for proof of it, and after a power cut the snapshot read what
/// had been there before.
#[test]
fn a_copy_that_a_failed_flush_lost_is_written_again_on_a_full_store() {
    let mut volume = history();
    let free = volume.store.status().free_chunks;
    for tag in 5.. {
        if volume.store.status().free_chunks == 0 {
            break;
        }
        volume.store.create(SnapTag(tag), 1).unwrap().unwrap();
        volume
            .store
            .set_priority(SnapTag(tag), 127)
            .unwrap()
            .unwrap();
        let left = volume.store.status().free_chunks.min(40);
        let last = left < 40;
        for chunk in 0..left {
            fill(&volume.machine, chunk, 100 + tag as u8);
        }
        (0..left - u64::from(last)).for_each(|chunk| commit(&mut volume.store, chunk));
        if last {
            break;
        }
    }
    let tag = volume.store.snapshots().last().unwrap().tag;
    let left = volume.store.status().free_chunks;
    assert_eq!(left, 1, "of {free}");
    let chunk = 47;
    fill(&volume.machine, chunk, 77);
    volume.store.create(SnapTag(99), 1).unwrap().unwrap();
    let mut moment = volume.machine.moment();
    volume.machine.record();
    commit(&mut volume.store, chunk);
    let recorded = volume.machine.recorded();
    let upto = before_the_flush(&recorded);
    recorded[..upto]
        .iter()
        .for_each(|event| moment.advance(event));
    let machine = moment.cut(Survival::FlushFailed, &mut Rng::new(1));
    let (mut store, _) = SHAPE.open(&machine).unwrap();
    assert_eq!(store.status().free_chunks, 0);
    // Another record, so that the copy is not compared with the origin any more.
    store.set_priority(tag, 126).unwrap().unwrap();
    commit(&mut store, chunk);
    fill(&machine, chunk, 78);
    let machine = machine.moment().cut(Survival::None, &mut Rng::new(1));
    let (mut store, _) = SHAPE.open(&machine).unwrap();
    assert_reads(&machine, &mut store, 99, chunk, 77);
    store.audit(true).unwrap();
}

/// Never guess: a record that was acknowledged cannot be read, or more than one may be gone.
#[test]
fn unreadable_blocks_that_may_hide_acknowledged_records_are_refused() {
    for blocks in [&[0][..], &[1], &[1, 2], &[3, 4], &[3, 5], &[2, 3]] {
        let machine = all_of(&history().machine.moment());
        for &block in blocks {
            machine.make_unreadable(DATA, ring_block(block));
        }
        let error = SHAPE.open(&machine).err();
        let error = error.unwrap_or_else(|| panic!("opened without {blocks:?}"));
        assert!(matches!(error, StoreError::Journal { .. }), "{error}");
    }
    // A device that fails to read for a while is none with bad sectors.
    let machine = all_of(&history().machine.moment());
    machine.make_unreadable(DATA, RING..RING + 16 * BLOCK);
    let error = SHAPE.open(&machine).err().expect("opened");
    assert!(matches!(error, StoreError::Read { .. }), "{error}");
}

/// Each power cut left a block of the ring unreadable, far apart: one of the first and one of the second together looked
/// as if they hid records, and the store was refused.
#[test]
fn unreadable_blocks_of_several_power_cuts_do_not_add_up() {
    let machine = all_of(&history().machine.moment());
    // Behind the end of the ring, where nothing was.
    machine.make_unreadable(DATA, ring_block(5));
    drop(SHAPE.open(&machine).expect("opened"));
    // The last record was written again, into block 3: the next one was under way when the power went.
    machine.make_unreadable(DATA, ring_block(4));
    assert_nothing_is_lost(&machine, "the second cut");
}

/// A disk whose first so many reads of a sector fail, as where a path to it is being changed.
struct Recovering<D> {
    inner: D,
    sector: u64,
    failures: u32,
}

impl<D: BlockDevice> BlockDevice for Recovering<D> {
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
        let meets = |read: &Read<'_>| {
            (read.offset..read.offset + read.into.len() as u64).contains(&self.sector)
        };
        if self.failures > 0 && batch.iter().any(meets) {
            self.failures -= 1;
            return Err(io::Error::from_raw_os_error(5));
        }
        self.inner.read(batch)
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        self.inner.write(batch)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// The block of the last record could not be read for a moment. It counted as the ring's end, and what had been
/// acknowledged was forgotten.
#[test]
fn a_block_that_can_be_read_again_is_no_end_of_the_ring() {
    let options = OpenOptions {
        cache_bytes: 1 << 20,
    };
    let mut refused = 0;
    // All at once, the block, its sector; what fails once more, when it is looked at again, is a bad sector.
    for failures in 0..=3 {
        let machine = all_of(&history().machine.moment());
        let devices = Devices {
            origin: Box::new(machine.device(ORIGIN)),
            data: Box::new(Recovering {
                inner: machine.device(DATA),
                sector: ring_block(2).start,
                failures,
            }),
            meta: None,
        };
        match Store::open(devices, &options) {
            Ok(_) => assert_nothing_is_lost(&machine, &format!("{failures} failures")),
            Err(error) => refused += u32::from(error.to_string().contains("open it again")),
        }
        // Nothing was written over it, whatever was said.
        assert_nothing_is_lost(&machine, &format!("after {failures} failures"));
    }
    assert!(refused > 0, "it was never noticed");
}

/// A killed server's writes landed when its successor served, over the successor's record and copies. Now they
/// have landed, all or some, before the successor has the lock; whatever they left there, it goes on from.
#[test]
fn writes_of_a_killed_server_that_land_late_destroy_nothing() {
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let mut volume = Volume::new(SHAPE);
        volume.store.create(SnapTag(1), 1).unwrap().unwrap();
        fill(&volume.machine, 5, 5);
        fill(&volume.machine, 6, 6);
        volume.store.create(SnapTag(2), 1).unwrap().unwrap();
        // Server A has handed the kernel its writes for chunk 5 and is killed; they are on their way.
        let mut killed = volume.machine.moment();
        volume.machine.record();
        commit(&mut volume.store, 5);
        killed.land(&volume.machine.recorded(), &mut rng);
        // Server B has the lock, recovers, and serves chunk 6.
        let machine = killed.cut(Survival::ProcessKilled, &mut rng);
        let (mut b, _) = SHAPE.open(&machine).unwrap();
        commit(&mut b, 6);
        fill(&machine, 6, 0xee);
        drop(b);
        for survival in [Survival::None, Survival::All, Survival::Sectors(50)] {
            let machine = machine.moment().cut(survival, &mut rng);
            let (mut store, _) = SHAPE.open(&machine).unwrap();
            store.audit(true).unwrap();
            assert_reads(&machine, &mut store, 2, 6, 6);
            assert_reads(&machine, &mut store, 2, 5, 5);
        }
    }
}

/// A file in the page cache: after a failed flush what was to be written counts as clean and is still read.
#[derive(Clone)]
struct PageCache(Rc<RefCell<Cached>>);

struct Cached {
    disk: Vec<u8>,
    cache: Vec<u8>,
    dirty: BTreeSet<usize>,
    fail: bool,
}

impl PageCache {
    fn new(len: usize) -> Self {
        PageCache(Rc::new(RefCell::new(Cached {
            disk: vec![0; len],
            cache: vec![0; len],
            dirty: BTreeSet::new(),
            fail: false,
        })))
    }

    fn power_cut(&self) {
        let mut cached = self.0.borrow_mut();
        cached.cache = cached.disk.clone();
        cached.dirty.clear();
    }
}

impl BlockDevice for PageCache {
    fn len_bytes(&self) -> u64 {
        self.0.borrow().disk.len() as u64
    }

    fn alignment(&self) -> usize {
        512
    }

    fn name(&self) -> &str {
        "file"
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> io::Result<()> {
        let cached = self.0.borrow();
        for read in batch {
            let (at, len) = (read.offset as usize, read.into.len());
            read.into.copy_from_slice(&cached.cache[at..at + len]);
        }
        Ok(())
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        let mut cached = self.0.borrow_mut();
        for write in batch {
            let at = write.offset as usize;
            let bytes = at..at + write.from.len();
            cached.cache[bytes.clone()].copy_from_slice(write.from);
            cached.dirty.extend(bytes.step_by(512));
        }
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        let cached = &mut *self.0.borrow_mut();
        let dirty = std::mem::take(&mut cached.dirty);
        if std::mem::take(&mut cached.fail) {
            return Err(io::Error::from_raw_os_error(5));
        }
        for at in dirty {
            cached.disk[at..at + 512].copy_from_slice(&cached.cache[at..at + 512]);
        }
        Ok(())
    }
}

/// A flush failed and lost a record, the server was started again, read the record from the page cache and was
/// writing it again when the power went: of the repetition the header was there, and the store was refused for
/// good, as if the record had been acknowledged and damaged since.
#[test]
fn a_torn_repetition_of_a_record_that_a_failed_flush_lost_is_no_gap() {
    let mut volume = history();
    let mut moment = volume.machine.moment();
    volume.machine.record();
    // A record of several sectors: what the power leaves of it differs from none of it.
    let group: Vec<_> = (20..44)
        .map(|chunk| Op::OriginWrite(Chunk(chunk)))
        .collect();
    volume.store.commit(&group).expect("commit");
    let recorded = volume.machine.recorded();
    let written = &recorded[..before_the_flush(&recorded)];
    written.iter().for_each(|event| moment.advance(event));
    let mut rng = Rng::new(1);
    let machine = moment.cut(Survival::FlushFailed, &mut rng);
    let mut moment = machine.moment();
    machine.record();
    drop(SHAPE.open(&machine).expect("open"));
    let events = machine.recorded();
    // Each event of opening, and a cut behind it.
    for (number, event) in events.iter().enumerate() {
        moment.advance(event);
        for _ in 0..50 {
            let machine = moment.cut(Survival::Sectors(50), &mut rng);
            assert_nothing_is_lost(&machine, &format!("event {number} of {}", events.len()));
        }
    }
}

/// A flush failed, the server was started again, and recovery believed the page cache: the next flush reported
/// success without writing what the first one had lost, so a copy that was acknowledged then was not there after
/// a power cut.
#[test]
fn what_a_failed_flush_lost_is_not_believed_after_a_restart() {
    let (origin, data) = (PageCache::new(48 * 4096), PageCache::new(1200 << 10));
    let devices = || Devices {
        origin: Box::new(origin.clone()),
        data: Box::new(data.clone()),
        meta: None,
    };
    let options = OpenOptions {
        cache_bytes: 1 << 20,
    };
    let init = InitOptions {
        chunk: SHAPE.shift(),
        journal_bytes: None,
        now: 1,
        uuid: [3; 16],
    };
    Store::initialize(&mut devices(), &init).unwrap();
    let mut store = Store::open(devices(), &options).unwrap().0;
    store.create(SnapTag(1), 1).unwrap().unwrap();
    data.0.borrow_mut().fail = true;
    assert!(store.commit(&[Op::OriginWrite(Chunk(7))]).is_err());
    assert!(store.failure().is_some());
    drop(store);
    // It may fail in opening again, more than once.
    for _ in 0..3 {
        data.0.borrow_mut().fail = true;
        assert!(Store::open(devices(), &options).is_err());
    }
    let (mut store, opened) = Store::open(devices(), &options).unwrap();
    assert!(opened.replayed_records > 0);
    commit(&mut store, 7);
    let from = &[0xee; 4096][..];
    let offset = 7 * 4096;
    origin.clone().write(&[Write { offset, from }]).unwrap();
    origin.clone().flush().unwrap();
    drop(store);
    data.power_cut();
    origin.power_cut();
    let mut store = Store::open(devices(), &options).unwrap().0;
    store.audit(true).unwrap();
    let found = store.locate(SnapTag(1), Chunk(7)).unwrap().unwrap();
    assert!(
        matches!(found, Location::Store(_)),
        "the snapshot reads {found:?}: what was written after it"
    );
}

/// Each chunk of a run was a read and a write of its own: of the disk's time a large overwrite lost most.
#[test]
fn a_run_is_copied_by_one_write_beside_its_record() {
    let mut volume = history();
    volume.machine.record();
    let group: Vec<_> = (20..44)
        .map(|chunk| Op::OriginWrite(Chunk(chunk)))
        .collect();
    let answers = volume.store.commit(&group).expect("commit");
    assert_eq!(answers, vec![Ok(Done::Unique); 24]);
    let recorded = volume.machine.recorded();
    let lengths: Vec<_> = recorded[..before_the_flush(&recorded)]
        .iter()
        .map(|event| match event {
            Event::Write { bytes, .. } => bytes.len() as u64,
            Event::Flush { .. } => 0,
        })
        .collect();
    assert_eq!(lengths, [24 * SHAPE.chunk_bytes, BLOCK]);
    for chunk in [20, 21, 43] {
        let bytes = volume.store.locate(SnapTag(4), Chunk(chunk));
        assert!(matches!(bytes, Ok(Ok(Location::Store(_)))), "{chunk}");
    }
}
