// SPDX-License-Identifier: GPL-2.0-only
//! Stores of format version 1, as the last program that wrote it left them: one closed in order, one whose
//! server was killed, one in the middle of a revert. Their lengths are in chunks; opening for writing makes
//! sectors of them, reading changes nothing.
//!
//! `tests/golden/store-1-*.zst` hold the three disks, each behind its length, and what each snapshot must
//! read: a count, then tag, length and content. Numbers have eight bytes.

mod harness;

use ddsnap::device::memory::{Event, Machine, Rng, Survival};
use ddsnap::device::{BlockDevice, Read, Write};
use ddsnap::format::Version;
use ddsnap::store::check::{CheckDevices, CheckOptions, check};
use ddsnap::store::{Devices, Done, Location, Op, OpenOptions, Store, View};
use ddsnap::units::{Chunk, ChunkShift, Sectors, SnapTag};
use harness::shape::{DATA, META, ORIGIN};

const OPTIONS: OpenOptions = OpenOptions {
    cache_bytes: 64 * 4096,
};
const NAMES: [&str; 3] = ["clean", "killed", "revert"];

/// A snapshot made here.
const NEW: u32 = 77_777;

struct Image {
    machine: Machine,
    separate_meta: bool,
    /// Sectors of the origin.
    origin: u64,
    /// Tag and content; none of a squashed one.
    snapshots: Vec<(u32, Vec<u8>)>,
}

impl Image {
    fn load(name: &str) -> Image {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden")
            .join(format!("store-1-{name}.zst"));
        let packed = std::fs::read(&path).expect("a golden store");
        let bytes = zstd::decode_all(&packed[..]).expect("whole");
        let mut rest = &bytes[..];
        let mut take = |len: usize| {
            let (part, behind) = rest.split_at(len);
            rest = behind;
            part
        };
        let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("eight bytes"));
        let disks = [(); 3].map(|()| {
            let len = number(take(8));
            take(len as usize)
        });
        let lens = disks.map(|disk| disk.len() as u64);
        let machine = Machine::new(&[("origin", lens[0]), ("data", lens[1]), ("meta", lens[2])]);
        for (disk, bytes) in disks.into_iter().enumerate().filter(|(_, b)| !b.is_empty()) {
            let mut device = machine.device(disk);
            let write = Write {
                offset: 0,
                from: bytes,
            };
            device.write(&[write]).expect("write");
            device.flush().expect("flush");
        }
        let count = number(take(8));
        let snapshots = (0..count).map(|_| {
            let tag = number(take(8)) as u32;
            let len = number(take(8));
            (tag, take(len as usize).to_vec())
        });
        let snapshots = snapshots.collect();
        Image {
            machine,
            separate_meta: lens[2] > 0,
            origin: lens[0] / 512,
            snapshots,
        }
    }

    fn devices(&self, machine: &Machine) -> Devices {
        let meta = self.separate_meta.then(|| machine.device(META));
        Devices {
            origin: Box::new(machine.device(ORIGIN)),
            data: Box::new(machine.device(DATA)),
            meta: meta.map(|meta| Box::new(meta) as Box<dyn BlockDevice>),
        }
    }

    /// Every snapshot of an open store reads what it did.
    fn compare(&self, machine: &Machine, store: &mut Store) {
        let tags = store.snapshots().into_iter().map(|info| info.tag.0);
        let tags: Vec<u32> = tags.filter(|tag| *tag != NEW).collect();
        let mut known: Vec<u32> = self.snapshots.iter().map(|(tag, _)| *tag).collect();
        known.sort_by_key(|tag| store.snapshot(SnapTag(*tag)).map(|info| info.seq));
        assert_eq!(tags, known);
        let shift = store.status().chunk;
        for (tag, content) in self.snapshots.iter().filter(|(_, c)| !c.is_empty()) {
            let tag = SnapTag(*tag);
            let length = store.snapshot(tag).expect("there").length;
            assert_eq!(length.to_bytes(), content.len() as u64);
            for (chunk, wanted) in (0..).zip(content.chunks(shift.bytes() as usize)) {
                let found = store.locate(tag, Chunk(chunk)).expect("readable");
                let (disk, offset) = match found.expect("live") {
                    Location::Origin => (ORIGIN, Chunk(chunk).to_offset(shift)),
                    Location::Store(place) => (DATA, place.to_offset(shift)),
                };
                assert!(
                    machine.holds(disk, offset, wanted),
                    "snapshot {tag}, chunk {chunk}"
                );
            }
        }
    }

    /// The version of both copies of the superblock, if they are whole.
    fn versions(&self, machine: &Machine) -> [u32; 2] {
        let mut device = machine.device(if self.separate_meta { META } else { DATA });
        [0, 65536].map(|offset| {
            let mut bytes = vec![0; 4096];
            let into = &mut bytes;
            device.read(&mut [Read { offset, into }]).expect("read");
            u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]])
        })
    }
}

#[test]
fn reading_a_store_of_version_1_does_not_change_it() {
    for name in NAMES {
        let image = Image::load(name);
        image.machine.record();
        let (mut view, _) = View::open(image.devices(&image.machine), &OPTIONS).expect(name);
        assert_eq!(view.superblock().version, Version::V1);
        for (tag, content) in image.snapshots.iter().filter(|(_, c)| !c.is_empty()) {
            let mut found = vec![0; content.len()];
            let read = view.read(SnapTag(*tag), Chunk(0), &mut found);
            read.expect("readable").expect("live");
            assert!(found == *content, "{name}: snapshot {tag}");
        }
        let Devices { origin, data, meta } = image.devices(&image.machine);
        let options = CheckOptions {
            cache_bytes: 64 * 4096,
            data: true,
        };
        let origin = Some(origin);
        let checked = check(CheckDevices { data, meta, origin }, &options, &mut |_| {
            Ok(())
        });
        assert_eq!(checked.expect(name).problems, 0);
        assert!(image.machine.recorded().is_empty(), "{name} was written to");
        assert_eq!(image.versions(&image.machine), [1, 1]);
    }
}

#[test]
fn opening_a_store_of_version_1_makes_one_of_version_2() {
    for name in NAMES {
        let image = Image::load(name);
        let machine = &image.machine;
        let (mut store, opened) = Store::open(image.devices(machine), &OPTIONS).expect(name);
        assert_eq!(opened.clean, name == "clean");
        assert_eq!(image.versions(machine), [2, 2]);
        image.compare(machine, &mut store);
        store.audit(true).expect(name);
        assert_eq!(store.status().origin, Sectors(image.origin));
        assert_eq!(store.reverting().is_some(), name == "revert");
        // It goes on as it is, and is what it was when it is opened again.
        store.close().expect("close");
        let (mut store, opened) = Store::open(image.devices(machine), &OPTIONS).expect(name);
        assert!(opened.clean);
        image.compare(machine, &mut store);
        // The sectors behind the last whole chunk belong to the origin now, and to new snapshots.
        if name == "revert" {
            continue;
        }
        let shift = store.status().chunk;
        store
            .create(SnapTag(NEW), 5)
            .expect("create")
            .expect("there is room");
        let last = Chunk(image.origin / shift.sectors());
        let answer = store.commit(&[Op::OriginWrite(last)]).expect("commit");
        assert_eq!(answer, [Ok(Done::Unique)]);
        let place = store.locate(SnapTag(NEW), last).expect("readable");
        assert!(matches!(place, Ok(Location::Store(_))), "{place:?}");
        image.compare(machine, &mut store);
        store.audit(true).expect(name);
    }
}

/// Until the new superblock is durable the store is the old one: its ring and its table are not touched.
#[test]
fn a_power_cut_in_the_upgrade_loses_nothing() {
    let mut rng = Rng::new(2);
    for name in NAMES {
        let image = Image::load(name);
        let mut moment = image.machine.moment();
        image.machine.record();
        Store::open(image.devices(&image.machine), &OPTIONS).expect(name);
        let events = image.machine.recorded();
        assert!(
            events
                .iter()
                .any(|event| matches!(event, Event::Flush { .. }))
        );
        for event in &events {
            moment.advance(event);
            for survival in [Survival::None, Survival::All, Survival::Sectors(50)] {
                let machine = moment.cut(survival, &mut rng);
                let (mut store, _) = Store::open(image.devices(&machine), &OPTIONS).expect(name);
                image.compare(&machine, &mut store);
                store.audit(true).expect(name);
                assert_eq!(image.versions(&machine), [2, 2]);
            }
        }
    }
}

#[test]
fn chunks_of_the_golden_stores() {
    let image = Image::load("clean");
    let (view, _) = View::open(image.devices(&image.machine), &OPTIONS).expect("readable");
    assert_eq!(Some(view.status().chunk), ChunkShift::from_bytes(4096));
    assert_eq!(
        image.origin,
        24 * 8 + 3,
        "a short last chunk, which version 1 does not see"
    );
    assert_eq!(view.superblock().origin, Sectors(24 * 8));
}
