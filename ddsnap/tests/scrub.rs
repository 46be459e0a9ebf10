// SPDX-License-Identifier: GPL-2.0-only
//! A scrub finds every chunk that went bad, names whom it hurts, and never cries wolf.

mod harness;

use std::collections::BTreeSet;
use std::io;

use ddsnap::device::memory::{MemoryDevice, Rng};
use ddsnap::device::{BlockDevice, Read, Write};
use ddsnap::store::{
    BadChunk, Devices, Fault, Location, Op, OpenOptions, Scrubbed, SnapState, Store,
};
use ddsnap::units::{Chunk, SnapTag, StoreChunk};
use harness::seed;
use harness::volume::{self, DATA, ORIGIN, Shape, Step, Volume};

fn scrub(store: &mut Store, chunks: usize) -> Scrubbed {
    let mut scrub = store.scrub_begin();
    let mut all = Scrubbed::default();
    while !scrub.is_finished() {
        let Scrubbed { bytes, bad } = store.scrub_step(&mut scrub, chunks).expect("scrub");
        assert!(bytes <= chunks as u64 * 4096);
        all.bytes += bytes;
        all.bad.extend(bad);
    }
    let (done, total) = scrub.progress();
    assert_eq!(done, total);
    all
}

fn shape() -> Shape {
    Shape {
        chunk_bytes: 4096,
        origin_chunks: 48,
        lacking_sectors: 0,
        data_bytes: 1200 << 10,
        meta_bytes: 0,
        snapshots: 6,
    }
}

fn write(volume: &mut Volume, chunks: impl Iterator<Item = u64>) {
    let ops = chunks.map(|chunk| Op::OriginWrite(Chunk(chunk))).collect();
    volume.apply(&Step::Group { ops, write: true });
}

fn place(store: &mut Store, tag: u32, chunk: u64) -> StoreChunk {
    match store.locate(SnapTag(tag), Chunk(chunk)).expect("locate") {
        Ok(Location::Store(place)) => place,
        other => panic!("{other:?}"),
    }
}

/// Snapshots 1, 2 and 3: chunks 0 to 9 are shared by 1 and 2, chunk 5 has another copy for 3, and 2 has a
/// chunk 4 of its own.
fn volume() -> Volume {
    let mut volume = Volume::new(shape());
    write(&mut volume, 0..48);
    volume.apply(&Step::Create(1));
    volume.apply(&Step::Create(2));
    write(&mut volume, 0..10);
    volume.apply(&Step::Create(3));
    write(&mut volume, 5..6);
    let ops = vec![Op::SnapshotWrite(SnapTag(2), Chunk(4))];
    volume.apply(&Step::Group { ops, write: true });
    volume
}

#[test]
fn a_sound_store_is_read_once_and_found_sound() {
    let mut volume = volume();
    for chunks in [1, 3, 1000] {
        let found = scrub(&mut volume.store, chunks);
        assert_eq!(found.bytes, 12 * 4096);
        assert_eq!(found.bad, []);
    }
}

#[test]
fn each_bad_chunk_is_found_with_the_snapshots_that_lost_it() {
    let mut volume = volume();
    let shift = volume.shape.shift();
    let places = [(1, 3), (1, 4), (3, 5)].map(|(tag, chunk)| place(&mut volume.store, tag, chunk));
    for place in places {
        volume
            .machine
            .corrupt(DATA, place.to_offset(shift) + 512, &[0xee]);
    }
    // A change of a snapshot's own chunk is none: it may be written to at any time.
    let own = place(&mut volume.store, 2, 4);
    volume.machine.corrupt(DATA, own.to_offset(shift), &[0xee]);
    let found: Vec<_> = scrub(&mut volume.store, 4)
        .bad
        .into_iter()
        .map(|bad| {
            assert!(matches!(bad.fault, Fault::Checksum { found, wanted } if found != wanted));
            let tags: Vec<u32> = bad.snapshots.iter().map(|tag| tag.0).collect();
            (bad.chunk.0, bad.place, tags)
        })
        .collect();
    assert_eq!(
        found,
        [
            (3, places[0], vec![1, 2]),
            (4, places[1], vec![1]),
            (5, places[2], vec![3]),
        ]
    );
    // A snapshot that is gone lost nothing.
    volume.apply(&Step::Delete(3));
    assert_eq!(scrub(&mut volume.store, 4).bad.len(), 2);
}

/// A disk that cannot read some places.
struct BadSectors(MemoryDevice, BTreeSet<u64>);

impl BlockDevice for BadSectors {
    fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }

    fn alignment(&self) -> usize {
        self.0.alignment()
    }

    fn name(&self) -> &str {
        self.0.name()
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> io::Result<()> {
        let hit = |read: &Read<'_>| {
            let end = read.offset + read.into.len() as u64;
            self.1.range(read.offset..end).next().is_some()
        };
        if batch.iter().any(hit) {
            return Err(io::Error::other("a bad sector"));
        }
        self.0.read(batch)
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        self.0.write(batch)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[test]
fn sectors_that_cannot_be_read_show_in_saved_and_in_own_chunks() {
    let mut volume = volume();
    let shift = volume.shape.shift();
    let (saved, own) = (
        place(&mut volume.store, 1, 8),
        place(&mut volume.store, 2, 4),
    );
    let bad = [saved, own].map(|place| place.to_offset(shift) + 1024);
    let devices = Devices {
        origin: Box::new(volume.machine.device(ORIGIN)),
        data: Box::new(BadSectors(volume.machine.device(DATA), bad.into())),
        meta: None,
    };
    let options = OpenOptions {
        cache_bytes: 1 << 20,
    };
    let (mut store, _) = Store::open(devices, &options).expect("open");
    let found = scrub(&mut store, 16).bad;
    let unreadable = |place, chunk, tags: &[u32]| BadChunk {
        place,
        chunk: Chunk(chunk),
        fault: Fault::Unreadable,
        snapshots: tags.iter().copied().map(SnapTag).collect(),
    };
    assert_eq!(
        found,
        [unreadable(saved, 8, &[1, 2]), unreadable(own, 4, &[2])]
    );
    assert_eq!(store.failure(), None, "the store goes on");
}

/// Everything changes between the steps of scrubs; nothing of it looks like damage.
#[test]
fn a_store_in_use_has_no_false_alarms() {
    let mut volume = Volume::new(shape());
    let mut rng = Rng::new(seed());
    let live = |s: &&ddsnap::store::SnapshotInfo| s.state == SnapState::Live;
    let (mut scrubs, mut read, mut lived) = (0, 0, 0);
    let mut now = volume.store.scrub_begin();
    for _ in 0..3000 {
        let shape = volume.shape;
        let step = volume::choose(&mut rng, &shape, &volume.model, &mut volume.next_tag);
        let reopened = matches!(step, Step::Reopen);
        volume.apply(&step);
        if now.is_finished() || reopened {
            scrubs += 1;
            now = volume.store.scrub_begin();
        }
        let chunks = 1 + rng.below(4) as usize;
        let found = volume.store.scrub_step(&mut now, chunks).expect("scrub");
        assert_eq!(found.bad, [], "DDSNAP_CRASH_SEED={}", seed());
        read += found.bytes;
        lived += volume.store.snapshots().iter().filter(live).count();
    }
    assert!(
        scrubs > 10 && read > 1000 * 4096,
        "{scrubs} scrubs, {read} bytes"
    );
    assert!(lived > 1000, "{lived}");
}
