// SPDX-License-Identifier: GPL-2.0-only
//! Sizes change under load, and the power goes off after every write and flush of it.
//!
//! Guards against: a size half changed, snapshots that lose the end of an origin that was cut, data or
//! metadata left on a part of a device that is going to be cut off, metadata and data on top of
//! each other after the store grew.
//!
//! `DDSNAP_CRASH_SEED=n` repeats a run, `DDSNAP_RESIZE_ROUNDS=n` makes it longer.

mod harness;

use ddsnap::device::memory::{Event, Moment, Rng, Survival};
use ddsnap::store::{Op, ResizeError, ResizeRequest, Sizes, Store, StoreError};
use ddsnap::units::{Chunk, SECTOR_BYTES, SnapTag};
use harness::model::Model;
use harness::volume::{self, DATA, META, ORIGIN, Shape, Step, Volume, check, read_snapshot};
use harness::{number_from_env, seed};

fn survival(rng: &mut Rng) -> Survival {
    match rng.below(5) {
        0 => Survival::None,
        1 => Survival::All,
        2 => Survival::ProcessKilled,
        3 => Survival::Writes(50),
        _ => Survival::Sectors(50),
    }
}

/// Resizes to the end.
fn resize(
    store: &mut Store,
    request: &ResizeRequest,
) -> Result<Result<Sizes, ResizeError>, StoreError> {
    if let Err(refused) = store.resize_begin(request)? {
        return Ok(Err(refused));
    }
    loop {
        match store.resize_step()? {
            Ok(None) => assert!(store.is_resizing()),
            Ok(Some(sizes)) => return Ok(Ok(sizes)),
            Err(refused) => return Ok(Err(refused)),
        }
    }
}

fn origin(bytes: u64) -> ResizeRequest {
    ResizeRequest {
        origin: Some(bytes),
        ..Default::default()
    }
}

fn store_to(bytes: u64) -> ResizeRequest {
    ResizeRequest {
        store: Some(bytes),
        ..Default::default()
    }
}

fn meta_to(bytes: u64) -> ResizeRequest {
    ResizeRequest {
        meta: Some(bytes),
        ..Default::default()
    }
}

struct Run {
    rng: Rng,
    volume: Volume,
    points: u64,
    resized: u64,
    refused: u64,
}

impl Run {
    fn new(shape: Shape) -> Run {
        Run {
            rng: Rng::new(seed() ^ shape.chunk_bytes),
            volume: Volume::new(shape),
            points: 0,
            resized: 0,
            refused: 0,
        }
    }

    fn shape(&self) -> Shape {
        self.volume.shape
    }

    /// Some steps of the ordinary workload.
    fn load(&mut self, steps: u64) {
        for _ in 0..steps {
            let shape = self.shape();
            let volume = &mut self.volume;
            let mut step =
                volume::choose(&mut self.rng, &shape, &volume.model, &mut volume.next_tag);
            if let Step::Group { ops, .. } = &mut step {
                // Snapshots keep their size, which may be less than the origin's.
                let has = |tag: &SnapTag, chunk: &Chunk| {
                    let snapshot = volume.model.snapshots.get(&tag.0);
                    snapshot.is_none_or(|s| chunk.0 < s.chunks.len() as u64)
                };
                ops.retain(|op| match op {
                    Op::SnapshotWrite(tag, chunk) => has(tag, chunk),
                    Op::OriginWrite(_) => true,
                });
            }
            volume.apply(&step);
        }
    }

    /// Resizes with the power going off after every event: of each wreck the sizes are old or new and the
    /// contents are what they were.
    fn resize(&mut self, request: &ResizeRequest) -> Result<Sizes, ResizeError> {
        let before = self.volume.store.sizes();
        let mut moment = self.volume.machine.moment();
        self.volume.machine.record();
        let outcome = resize(&mut self.volume.store, request).expect("resize");
        let events = self.volume.machine.recorded();
        let after = self.volume.store.sizes();
        match outcome {
            Ok(sizes) => {
                assert_eq!(sizes, after);
                self.resized += 1;
            }
            Err(_) => {
                assert_eq!(before, after, "refused, but changed");
                self.refused += 1;
            }
        }
        for event in std::iter::once(None).chain(events.iter().map(Some)) {
            if let Some(event) = event {
                moment.advance(event);
            }
            self.point(&moment, before, after, &format!("{request:?}"));
        }
        settle(&mut self.volume.model, &events);
        let model = self.volume.model.clone();
        let shape = self.shape();
        check(
            &shape,
            &self.volume.machine,
            &mut self.volume.store,
            &model,
            &model,
        )
        .unwrap_or_else(|problem| panic!("{request:?}: {problem}"));
        self.volume.store.audit(true).expect("audit");
        outcome
    }

    fn point(&mut self, moment: &Moment, before: Sizes, after: Sizes, what: &str) {
        self.points += 1;
        let machine = moment.cut(survival(&mut self.rng), &mut self.rng);
        let shape = self.shape();
        let context = format!(
            "DDSNAP_CRASH_SEED={} {shape:?} {what} point {}",
            seed(),
            self.points
        );
        let (mut store, _) = shape
            .open(&machine)
            .unwrap_or_else(|error| panic!("{context}: {error}"));
        let sizes = store.sizes();
        assert!(
            [before, after]
                .iter()
                .any(|s| (s.store, s.meta) == (sizes.store, sizes.meta)),
            "{context}: {sizes:?} is neither {before:?} nor {after:?}"
        );
        let model = &self.volume.model;
        check(&shape, &machine, &mut store, model, model)
            .unwrap_or_else(|problem| panic!("{context}: {problem}"));
        store
            .audit(true)
            .unwrap_or_else(|error| panic!("{context}: {error}"));
    }

    fn set_len(&mut self, disk: usize, bytes: u64) {
        self.volume.machine.set_len(disk, bytes);
    }

    fn origin_to(&mut self, bytes: u64) -> Result<(), ResizeError> {
        if bytes > self.shape().origin_bytes() {
            self.set_len(ORIGIN, bytes);
        }
        let sizes = self.resize(&origin(bytes))?;
        assert_eq!(sizes.origin, bytes);
        self.set_len(ORIGIN, bytes);
        self.volume.set_origin_bytes(bytes);
        Ok(())
    }

    fn store_to(&mut self, bytes: u64) -> Result<(), ResizeError> {
        if bytes > self.shape().data_bytes {
            self.set_len(DATA, bytes);
        }
        let sizes = self.resize(&store_to(bytes))?;
        assert_eq!(sizes.store, bytes);
        self.set_len(DATA, bytes);
        self.volume.shape.data_bytes = bytes;
        Ok(())
    }

    fn meta_to(&mut self, bytes: u64) -> Result<(), ResizeError> {
        if bytes > self.shape().meta_bytes {
            self.set_len(META, bytes);
        }
        let sizes = self.resize(&meta_to(bytes))?;
        assert_eq!(sizes.meta, bytes);
        self.set_len(META, bytes);
        self.volume.shape.meta_bytes = bytes;
        Ok(())
    }
}

/// Tells the model what the flushes among the events made durable for sure.
fn settle(model: &mut Model, events: &[Event]) {
    let last = |want_flush: bool| {
        events.iter().rposition(|event| match event {
            Event::Write { disk, .. } => !want_flush && *disk == DATA,
            Event::Flush { disk } => want_flush && *disk == DATA,
        })
    };
    if last(true) > last(false) {
        model.settle_store();
    }
}

fn rounds() -> u64 {
    number_from_env("DDSNAP_RESIZE_ROUNDS", 12)
}

/// Load and resizes by turns, on a store whose metadata lies on the same device.
fn combined(shape: Shape, step: u64) {
    let mut run = Run::new(shape);
    for _ in 0..rounds() {
        run.load(40);
        let now = run.shape();
        let chunks = match run.rng.below(3) {
            0 => 1 + run.rng.below(2 * now.origin_chunks),
            1 => (now.origin_chunks / 2).max(1),
            _ => now.origin_chunks + 8,
        };
        // Two of three times the last chunk is a short one.
        let sectors = now.chunk_bytes / SECTOR_BYTES;
        let lacking = [0, sectors - 1, run.rng.below(sectors)][run.rng.below(3) as usize];
        match run.origin_to(chunks * now.chunk_bytes - lacking * SECTOR_BYTES) {
            Ok(()) => {}
            Err(ResizeError::NoRoomForEnd { needed, .. }) => assert!(needed > 0),
            Err(other) => panic!("{other}"),
        }
        run.load(10);
        let now = run.shape();
        let bytes = match run.rng.below(3) {
            0 => now.data_bytes.saturating_sub(step).max(1),
            _ => now.data_bytes + step,
        };
        match run.store_to(bytes) {
            Ok(()) => {}
            Err(ResizeError::ChunksInUse { count, least }) => {
                // What is said to be possible is possible.
                assert!(count > 0 && least > bytes, "{least} {bytes}");
                match run.store_to(least) {
                    Ok(()) | Err(ResizeError::MetadataInUse { .. }) => {}
                    Err(other) => panic!("{other}"),
                }
            }
            Err(ResizeError::TooShort { least, .. }) => assert!(least > bytes),
            Err(ResizeError::MetadataInUse { needed, free }) => assert!(needed > free),
            Err(other) => panic!("{other}"),
        }
    }
    println!(
        "seed={} {shape:?} points={} resized={} refused={}",
        seed(),
        run.points,
        run.resized,
        run.refused
    );
    assert!(run.points > 200 && run.resized > rounds() / 2);
}

#[test]
fn chunks_of_512_bytes_under_load() {
    combined(
        Shape {
            chunk_bytes: 512,
            origin_chunks: 64,
            lacking_sectors: 0,
            data_bytes: 700 << 10,
            meta_bytes: 0,
            snapshots: 6,
        },
        400 << 10,
    );
}

#[test]
fn chunks_of_16_kib_under_load() {
    combined(
        Shape {
            chunk_bytes: 16 << 10,
            origin_chunks: 24,
            lacking_sectors: 0,
            data_bytes: 3 << 20,
            meta_bytes: 0,
            snapshots: 5,
        },
        1 << 20,
    );
}

#[test]
fn a_metadata_device_under_load() {
    let shape = Shape {
        chunk_bytes: 4096,
        origin_chunks: 48,
        lacking_sectors: 0,
        data_bytes: 600 << 10,
        meta_bytes: 700 << 10,
        snapshots: 6,
    };
    let mut run = Run::new(shape);
    for _ in 0..rounds() {
        run.load(40);
        let now = run.shape();
        let bytes = match run.rng.below(2) {
            0 => now.meta_bytes + (100 << 10),
            _ => now.meta_bytes - (100 << 10),
        };
        match run.meta_to(bytes) {
            Ok(()) => {}
            Err(ResizeError::MetadataInUse { needed, free }) => assert!(needed > free),
            Err(ResizeError::TooShort { least, .. }) => assert!(least > bytes),
            Err(other) => panic!("{other}"),
        }
        let now = run.shape();
        run.store_to(now.data_bytes + 4096).expect("grow");
    }
    println!(
        "points={} resized={} refused={}",
        run.points, run.resized, run.refused
    );
    assert!(run.points > 200 && run.resized > rounds());
}

fn quiet_shape() -> Shape {
    Shape {
        chunk_bytes: 4096,
        origin_chunks: 40,
        lacking_sectors: 0,
        data_bytes: 1200 << 10,
        meta_bytes: 0,
        snapshots: 6,
    }
}

fn write_all(volume: &mut Volume) {
    let ops = (0..volume.shape.origin_chunks)
        .map(|chunk| Op::OriginWrite(Chunk(chunk)))
        .collect();
    volume.apply(&Step::Group { ops, write: true });
}

/// The end of an origin that is cut off stays readable in every snapshot that had it, and a snapshot
/// taken while it is being copied out is not forgotten.
#[test]
fn snapshots_keep_the_end_of_an_origin_that_is_cut() {
    let mut run = Run::new(quiet_shape());
    write_all(&mut run.volume);
    run.volume.apply(&Step::Create(1));
    write_all(&mut run.volume);
    run.volume.apply(&Step::Create(2));
    run.volume
        .store
        .resize_begin(&origin(10 * 4096))
        .expect("begin")
        .expect("possible");
    assert_eq!(run.volume.store.resize_step().expect("step"), Ok(None));
    run.volume.apply(&Step::Group {
        ops: vec![Op::OriginWrite(Chunk(30))],
        write: true,
    });
    run.volume.apply(&Step::Create(3));
    let mut end = None;
    while end.is_none() {
        end = run
            .volume
            .store
            .resize_step()
            .expect("step")
            .expect("possible");
    }
    assert_eq!(run.volume.store.sizes().origin, 10 * 4096);
    // The origin is really gone from there on.
    run.set_len(ORIGIN, 10 * 4096);
    run.volume.shape.origin_chunks = 10;
    run.volume.model.origin.truncate(10);
    run.volume.apply(&Step::Create(4));
    run.volume.apply(&Step::Reopen);
    let shape = run.shape();
    let model = run.volume.model.clone();
    assert_eq!(model.snapshots[&3].chunks.len(), 40);
    assert_eq!(model.snapshots[&4].chunks.len(), 10);
    check(
        &shape,
        &run.volume.machine,
        &mut run.volume.store,
        &model,
        &model,
    )
    .expect("as it was");
    let sizes: Vec<u64> = run
        .volume
        .store
        .snapshots()
        .iter()
        .map(|s| s.length.to_chunks(shape.shift()))
        .collect();
    assert_eq!(sizes, [40, 40, 40, 10]);
    // A write to a snapshot beyond the origin's end starts from what it had there.
    let before = model.snapshots[&3].chunks[35].now.clone();
    run.volume.apply(&Step::Group {
        ops: vec![Op::SnapshotWrite(SnapTag(3), Chunk(35))],
        write: false,
    });
    let mut found = vec![0; 4096];
    read_snapshot(
        &shape,
        &run.volume.machine,
        &mut run.volume.store,
        3,
        Chunk(35),
        &mut found,
    )
    .expect("there");
    assert_eq!(found, *before);
}

#[test]
fn an_end_that_does_not_fit_the_store_stays_where_it_is() {
    let mut run = Run::new(Shape {
        origin_chunks: 400,
        ..quiet_shape()
    });
    run.volume.apply(&Step::Create(1));
    let free = run.volume.store.status().free_chunks;
    let refused = run
        .resize(&origin(4096))
        .expect_err("399 chunks do not fit");
    assert_eq!(refused, ResizeError::NoRoomForEnd { needed: 399, free });
    assert_eq!(
        run.volume.store.status().free_chunks,
        free,
        "nothing was copied for nothing"
    );
    assert!(run.volume.store.snapshot(SnapTag(1)).is_some());
}

#[test]
fn what_cannot_be_done_is_refused_and_changes_nothing() {
    let mut run = Run::new(quiet_shape());
    let before = run.volume.store.sizes();
    let both = ResizeRequest {
        store: Some(1 << 20),
        meta: Some(2 << 20),
        ..Default::default()
    };
    let cases = [
        (
            both,
            "snapshot device and metadata device are the same, can't resize them to two values",
        ),
        (
            origin(1 << 30),
            "the origin device has only 163840 bytes; extend it first",
        ),
        (
            origin(u64::MAX),
            "the origin device has only 163840 bytes; extend it first",
        ),
        (
            store_to(u64::MAX),
            "the snapshot store device has only 1228800 bytes; extend it first",
        ),
        (
            origin(100),
            "the origin device cannot be used with less than 512 bytes",
        ),
    ];
    for (request, text) in cases {
        let refused = run.resize(&request).expect_err("impossible");
        assert_eq!(refused.to_string(), text);
    }
    let refused = run
        .resize(&store_to(4096))
        .expect_err("no room for the metadata");
    assert!(
        matches!(refused, ResizeError::TooShort { .. }),
        "{refused:?}"
    );
    assert_eq!(run.volume.store.sizes(), before);
    // Sizes that are no multiple of a chunk are rounded down.
    let sizes = run.resize(&origin(5 * 4096 + 100)).expect("possible");
    assert_eq!(sizes.origin, 5 * 4096);
}

/// A combined store that grows much gets metadata for what is new, inside the data region, more
/// than once; cut again, it gives that back.
#[test]
fn a_combined_store_grows_its_metadata_and_gives_it_back() {
    let shape = Shape {
        chunk_bytes: 4096,
        origin_chunks: 64,
        lacking_sectors: 0,
        data_bytes: 1200 << 10,
        meta_bytes: 0,
        snapshots: 4,
    };
    let mut run = Run::new(shape);
    let start = run.volume.store.status();
    run.store_to(64 << 20).expect("grow");
    let grown = run.volume.store.status();
    assert!(grown.meta_blocks > start.meta_blocks, "{grown:?}");
    assert!(grown.data_chunks > start.data_chunks);
    run.load(60);
    run.store_to(256 << 20).expect("grow again");
    let more = run.volume.store.status();
    assert!(more.meta_blocks > grown.meta_blocks);
    let (all, meta) = (256 << 8, more.meta_blocks - start.meta_blocks);
    assert!(
        more.data_chunks < all - meta,
        "metadata takes its chunks from the data"
    );
    // Enough load for nodes in the new extents.
    run.load(100);
    let tags: Vec<u32> = run.volume.model.snapshots.keys().copied().collect();
    for tag in tags {
        let count = i32::from(run.volume.model.snapshots[&tag].usecount);
        run.volume.apply(&Step::Usecount(tag, -count));
        run.volume.apply(&Step::Quiet(tag));
        run.volume.apply(&Step::Delete(tag));
    }
    run.store_to(shape.data_bytes).expect("all of it is free");
    let end = run.volume.store.status();
    assert_eq!(
        (end.data_chunks, end.meta_blocks),
        (start.data_chunks, start.meta_blocks)
    );
    run.load(60);
    run.volume.store.audit(true).expect("sound");
}

/// A chunk was taken behind the store's new end after that had been looked at: it would have been cut off.
#[test]
fn what_is_taken_behind_the_new_end_meanwhile_is_not_cut_off() {
    let (mut cut, mut refused) = (0, 0);
    for slack in 0..24 {
        let mut volume = Volume::new(quiet_shape());
        volume.store.create(SnapTag(1), 1).unwrap().unwrap();
        let status = volume.store.status();
        let metadata = volume.shape.data_bytes - status.data_chunks * 4096;
        volume
            .store
            .resize_begin(&store_to(metadata + slack * 4096 + 4096))
            .unwrap()
            .unwrap();
        let mut next = 0;
        loop {
            match volume.store.resize_step().unwrap() {
                Ok(None) => {}
                Ok(Some(_)) => {
                    cut += 1;
                    break;
                }
                Err(ResizeError::ChunksInUse { count, .. }) => {
                    assert!(count > 0);
                    refused += 1;
                    break;
                }
                Err(other) => panic!("{other}"),
            }
            let ops = [
                Op::OriginWrite(Chunk(next)),
                Op::OriginWrite(Chunk(next + 1)),
            ];
            assert!(volume.store.commit(&ops).unwrap().iter().all(Result::is_ok));
            next += 2;
        }
        volume
            .store
            .audit(true)
            .unwrap_or_else(|error| panic!("{slack}: {error}"));
    }
    assert!(cut > 3 && refused > 3, "{cut} cut, {refused} refused");
}
