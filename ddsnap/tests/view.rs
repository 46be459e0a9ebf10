// SPDX-License-Identifier: GPL-2.0-only
//! Reading a store without opening it: after a crash at any moment the view shows what a server would
//! find, and not one byte is written for it.

mod harness;

use ddsnap::device::memory::{Event, Rng, Survival};
use ddsnap::device::{BlockDevice, Read};
use ddsnap::store::dump::{DumpEntry, DumpPlace};
use ddsnap::store::{Location, OpError, OpenOptions, SnapState, Store, StoreError, View};
use ddsnap::units::{Chunk, SnapTag};
use harness::seed;
use harness::volume::{DATA, Shape, Step, Volume, choose, read_snapshot};

const SHAPE: Shape = Shape {
    chunk_bytes: 4096,
    origin_chunks: 48,
    lacking_sectors: 0,
    data_bytes: 1200 << 10,
    meta_bytes: 0,
    snapshots: 6,
};
const OPTIONS: OpenOptions = OpenOptions {
    cache_bytes: 1 << 20,
};

fn tags(store: &Store) -> Vec<(u32, u64)> {
    let live = store.snapshots().into_iter();
    live.filter(|info| info.state == SnapState::Live)
        .map(|info| (info.tag.0, info.length.0))
        .collect()
}

#[test]
fn a_view_shows_what_opening_would_and_writes_nothing() {
    let separate = Shape {
        chunk_bytes: 512,
        meta_bytes: 600 << 10,
        ..SHAPE
    };
    for shape in [SHAPE, separate] {
        let mut rng = Rng::new(seed());
        let mut volume = Volume::new(shape);
        let (mut read, mut replayed, mut dropped) = (0, 0, 0);
        for round in 0..1000 {
            let step = choose(&mut rng, &shape, &volume.model, &mut volume.next_tag);
            let mut moment = volume.machine.moment();
            volume.machine.record();
            volume.apply(&step);
            let events = volume.machine.recorded();
            // Mostly in front of a flush: all before it is written then, and a record may be there without its copies.
            let flushes: Vec<usize> = (0..events.len())
                .filter(|&at| matches!(events[at], Event::Flush { .. }))
                .collect();
            let upto = match flushes.len() {
                0 => events.len(),
                _ if round % 4 == 0 => rng.below(events.len() as u64 + 1) as usize,
                count => flushes[rng.below(count as u64) as usize],
            };
            events[..upto]
                .iter()
                .for_each(|event| moment.advance(event));
            let machine = moment.cut(Survival::Writes(60), &mut rng);

            machine.record();
            let (mut view, opened) = View::open(shape.devices(&machine), &OPTIONS)
                .unwrap_or_else(|error| panic!("seed {} round {round}: {error}", seed()));
            let chunk_bytes = shape.chunk_bytes as usize;
            let mut seen = Vec::new();
            for info in view.snapshots() {
                let mut bytes = vec![0; info.length.to_bytes() as usize];
                let result = view.read(info.tag, Chunk(0), &mut bytes).unwrap();
                match info.state {
                    SnapState::Live => result.unwrap(),
                    SnapState::Squashed => {
                        assert_eq!(result, Err(OpError::Squashed(info.tag)));
                        continue;
                    }
                    SnapState::Bookmark => {
                        assert_eq!(result, Err(OpError::Bookmark(info.tag)));
                        continue;
                    }
                }
                seen.push((info.tag.0, info.length.0, bytes));
            }
            let (status, counts) = (view.status(), view.count().unwrap());
            assert!(machine.recorded().is_empty(), "the view wrote or flushed");

            let (mut store, truth) = shape.open(&machine).unwrap();
            assert_eq!(opened, truth);
            replayed += opened.replayed_records;
            dropped += opened.dropped_records;
            assert_eq!(
                tags(&store),
                seen.iter()
                    .map(|(tag, n, _)| (*tag, *n))
                    .collect::<Vec<_>>()
            );
            assert_eq!(counts, store.count().unwrap());
            assert_eq!(
                (status.free_chunks, status.origin),
                (store.status().free_chunks, store.status().origin)
            );
            let mut chunk = vec![0; chunk_bytes];
            for (tag, _, bytes) in seen {
                for (index, part) in bytes.chunks_exact(chunk_bytes).enumerate() {
                    let at = Chunk(index as u64);
                    read_snapshot(&shape, &machine, &mut store, tag, at, &mut chunk).unwrap();
                    assert!(part == chunk, "snapshot {tag} chunk {index}");
                    read += 1;
                }
            }
        }
        assert!(
            read > 1000 && replayed > 0 && dropped > 0,
            "{read} {replayed} {dropped}"
        );
    }
}

#[test]
fn damaged_data_is_named_and_not_handed_out() {
    let mut volume = Volume::new(SHAPE);
    volume.apply(&Step::Create(7));
    let step = |chunk| Step::Group {
        ops: vec![ddsnap::store::Op::OriginWrite(Chunk(chunk))],
        write: true,
    };
    volume.apply(&step(3));
    volume.apply(&step(5));
    let Some(Location::Store(place)) = volume.store.locate(SnapTag(7), Chunk(3)).unwrap().ok()
    else {
        panic!("chunk 3 was not saved");
    };
    let offset = place.to_offset(SHAPE.shift());
    let mut sector = [0; 512];
    volume
        .machine
        .device(DATA)
        .read(&mut [Read {
            offset,
            into: &mut sector,
        }])
        .unwrap();
    sector[100] ^= 4;
    volume.machine.corrupt(DATA, offset, &sector);
    let (mut view, _) = View::open(SHAPE.devices(&volume.machine), &OPTIONS).unwrap();
    let mut bytes = vec![0; 2 * 4096];
    let error = view.read(SnapTag(7), Chunk(2), &mut bytes).unwrap_err();
    assert!(
        matches!(error, StoreError::BadData { chunk: Chunk(3), place: found, .. } if found == place),
        "{error}"
    );
    view.read(SnapTag(7), Chunk(4), &mut bytes)
        .unwrap()
        .unwrap();
    let beyond = view.read(SnapTag(7), Chunk(SHAPE.origin_chunks - 1), &mut bytes);
    assert_eq!(
        beyond.unwrap(),
        Err(OpError::OutOfRange(Chunk(SHAPE.origin_chunks)))
    );
}

#[test]
fn a_dump_in_steps_lists_the_entries_of_its_range_once() {
    let mut rng = Rng::new(seed());
    let mut volume = Volume::new(SHAPE);
    for _ in 0..200 {
        let step = choose(&mut rng, &SHAPE, &volume.model, &mut volume.next_tag);
        volume.apply(&step);
    }
    let mut dump = |chunks: std::ops::RangeInclusive<u64>, limit| {
        let mut all = Vec::new();
        let mut at = Some(DumpPlace::START);
        while let Some(place) = at {
            let (entries, next) = volume
                .store
                .dump_step(place, chunks.clone(), limit)
                .unwrap();
            assert!(entries.len() <= limit && next != at);
            all.extend(entries);
            at = next;
        }
        all
    };
    let all = dump(0..=u64::MAX, 1000);
    let chunk_of = |entry: &DumpEntry| match *entry {
        DumpEntry::Exception { chunk, .. }
        | DumpEntry::Mark { chunk, .. }
        | DumpEntry::Overlay { chunk, .. } => chunk.0,
    };
    let overlays = all
        .iter()
        .filter(|entry| matches!(entry, DumpEntry::Overlay { .. }));
    assert!(overlays.count() > 3 && all.len() > 30, "{}", all.len());
    for range in [0..=u64::MAX, 5..=20, 7..=7, 40..=u64::MAX, 0..=0, 90..=99] {
        let mut wanted = all.clone();
        wanted.retain(|entry| range.contains(&chunk_of(entry)));
        for limit in [1, 3, 1000] {
            assert_eq!(dump(range.clone(), limit), wanted, "{range:?} {limit}");
        }
    }
}
