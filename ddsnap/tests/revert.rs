// SPDX-License-Identifier: GPL-2.0-only
//! The origin takes a snapshot's content, and the power goes off after every write and flush of it.
//!
//! Guards against: snapshots that lose what the origin had when it is overwritten, a revert that is
//! forgotten half-way, or goes on behind what is durable, and damaged data written to the origin.
//!
//! `DDSNAP_CRASH_SEED=n` repeats a run, `DDSNAP_REVERT_ROUNDS=n` makes it longer.

mod harness;

use ddsnap::device::fault::{Call, Faults, FaultyDevice};
use ddsnap::device::memory::{Event, Machine, MemoryDevice, Rng, Survival};
use ddsnap::device::{BlockDevice, Read, Write};
use ddsnap::store::{
    Devices, Done, Location, Op, OpError, OpenOptions, ResizeError, ResizeRequest, RevertError,
    Reverting, SnapState, Store, StoreError,
};
use ddsnap::units::{Chunk, SnapTag};
use harness::model::Model;
use harness::victims::commit;
use harness::volume::{self, DATA, ORIGIN, Shape, Step, Volume, check, read_origin, read_snapshot};
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

/// Goes through the first phase.
fn checked(store: &mut Store, tag: u32) -> Result<(), RevertError> {
    store.revert_begin(SnapTag(tag)).expect("begin")?;
    loop {
        match store.revert_step(3).expect("step")? {
            Reverting::More => {}
            Reverting::Checked => return Ok(()),
            Reverting::Done { .. } => panic!("done before it began"),
        }
    }
}

/// Goes through the second phase, from wherever it is.
fn finish(store: &mut Store) -> u64 {
    loop {
        match store.revert_step(3).expect("step").expect("goes on") {
            Reverting::More => {}
            Reverting::Done { skipped } => return skipped,
            Reverting::Checked => panic!("back in the first phase"),
        }
    }
}

fn revert(store: &mut Store, tag: u32) -> Result<u64, RevertError> {
    checked(store, tag)?;
    store.revert_start().expect("start")?;
    Ok(finish(store))
}

/// A write that was let through between two durable marks was overwritten when the revert went on from the
/// older one after a crash; one to a chunk that it had yet to reach, when it reached that.
#[test]
fn a_write_that_is_let_through_is_not_undone() {
    let shape = Shape {
        origin_chunks: 24,
        lacking_sectors: 0,
        ..quiet_shape()
    };
    let machine = shape.machine();
    shape.initialize(&machine);
    let (mut store, _) = shape.open(&machine).expect("open");
    let all: Vec<Op> = (0..20).map(|chunk| Op::OriginWrite(Chunk(chunk))).collect();
    store.create(SnapTag(1), 1).expect("create").expect("room");
    store.commit(&all).expect("commit");
    store.create(SnapTag(2), 2).expect("create").expect("room");
    checked(&mut store, 1).expect("sound");
    store.revert_start().expect("start").expect("checked");
    // Ten chunks are dealt with, and no mark is durable yet.
    for _ in 0..5 {
        assert_eq!(store.revert_step(2).expect("step"), Ok(Reverting::More));
    }
    let ask = |store: &mut Store, chunk| {
        let answers = store.commit(&[Op::OriginWrite(Chunk(chunk))]);
        answers.expect("commit").remove(0)
    };
    let refused = Err(OpError::Reverting(SnapTag(1)));
    assert_eq!(
        [10, 15, 23].map(|chunk| ask(&mut store, chunk)),
        [refused; 3]
    );
    let into_snapshot = store.commit(&[Op::SnapshotWrite(SnapTag(1), Chunk(0))]);
    assert_eq!(
        into_snapshot.expect("commit"),
        [refused.map(|_: Done| Done::Unique)]
    );
    assert_eq!(ask(&mut store, 4), Ok(Done::Unique));
    let theirs = [7; 4096];
    let mut origin = machine.device(ORIGIN);
    let write = Write {
        offset: 4 * 4096,
        from: &theirs,
    };
    origin.write(&[write]).expect("write");
    origin.flush().expect("flush");
    drop(store);
    let machine = machine.moment().cut(Survival::None, &mut Rng::new(1));
    let (mut store, _) = shape.open(&machine).expect("open");
    assert_eq!(store.reverting(), Some(SnapTag(1)));
    assert_eq!(finish(&mut store), 0);
    assert!(machine.holds(ORIGIN, 4 * 4096, &theirs));
    assert!(machine.holds(ORIGIN, 5 * 4096, &[0; 4096]));
    assert_eq!(ask(&mut store, 23), Ok(Done::Unique));
}

/// What had been written to the snapshot was given to the origin, which was flushed, and never to the snapshot's disk: after a
/// power cut the finished revert had left an origin that was not what the snapshot showed.
#[test]
fn what_the_origin_is_given_the_snapshot_keeps() {
    // On one device the journal's flushes would do it.
    let shape = Shape {
        meta_bytes: 1 << 20,
        ..quiet_shape()
    };
    let mut volume = Volume::new(shape);
    write_chunks(&mut volume, 0..8);
    volume.apply(&Step::Create(1));
    write_chunks(&mut volume, 0..8);
    let own = vec![Op::SnapshotWrite(SnapTag(1), Chunk(0))];
    volume.apply(&Step::Group {
        ops: own,
        write: true,
    });
    let Volume { machine, store, .. } = &mut volume;
    checked(store, 1).expect("sound");
    store.revert_start().expect("start").expect("checked");
    assert_eq!(store.revert_step(2).expect("step"), Ok(Reverting::More));
    // Somebody writes behind the place reached, which becomes durable before that.
    let answers = store.commit(&[Op::OriginWrite(Chunk(1))]);
    assert_eq!(answers.expect("commit"), [Ok(Done::Unique)]);
    let machine = machine.moment().cut(Survival::None, &mut Rng::new(1));
    let (mut store, _) = shape.open(&machine).expect("open");
    assert_eq!(finish(&mut store), 0);
    assert_eq!(origin_is(&shape, &machine, &mut store, 1), Ok(()));
}

/// Says to the model what a revert does.
fn revert_model(model: &mut Model, tag: u32) {
    let contents: Vec<_> = model.snapshots[&tag]
        .chunks
        .iter()
        .map(|chunk| chunk.now.clone())
        .collect();
    for (chunk, content) in model.origin.iter_mut().zip(contents) {
        chunk.write(content);
    }
}

fn origin_is(shape: &Shape, machine: &Machine, store: &mut Store, tag: u32) -> Result<(), String> {
    let bytes = shape.chunk_bytes as usize;
    let (mut found, mut wanted) = (vec![0; bytes], vec![0; bytes]);
    let chunks = store
        .snapshot(SnapTag(tag))
        .expect("there")
        .length
        .to_chunks(shape.shift());
    for chunk in (0..chunks.min(shape.origin_chunks)).map(Chunk) {
        read_origin(shape, machine, chunk, &mut found);
        read_snapshot(shape, machine, store, tag, chunk, &mut wanted)?;
        if found != wanted {
            return Err(format!(
                "origin chunk {chunk} is not that of snapshot {tag}"
            ));
        }
    }
    Ok(())
}

struct Run {
    rng: Rng,
    volume: Volume,
    points: u64,
    resumed: u64,
}

impl Run {
    fn load(&mut self, steps: u64) {
        for _ in 0..steps {
            let shape = self.volume.shape;
            let (rng, volume) = (&mut self.rng, &mut self.volume);
            let step = volume::choose(rng, &shape, &volume.model, &mut volume.next_tag);
            volume.apply(&step);
        }
    }

    fn live(&self) -> Vec<u32> {
        let snapshots = self.volume.model.snapshots.iter();
        snapshots
            .filter(|(_, s)| s.state == SnapState::Live)
            .map(|(&tag, _)| tag)
            .collect()
    }

    /// Reverts with the power going off at every event of it.
    fn revert(&mut self, tag: u32) {
        let shape = self.volume.shape;
        // What was written and not flushed could be lost with or without a revert: not asked here.
        self.volume.machine.device(ORIGIN).flush().expect("flush");
        self.volume.machine.device(DATA).flush().expect("flush");
        self.volume.model.settle_origin();
        self.volume.model.settle_store();
        let before = self.volume.model.clone();
        let mut moment = self.volume.machine.moment();
        self.volume.machine.record();
        match revert(&mut self.volume.store, tag) {
            Ok(skipped) => assert_eq!(skipped, 0),
            Err(RevertError::NoRoom { needed, free }) => {
                assert!(needed > free);
                let _ = self.volume.machine.recorded();
                return;
            }
            Err(other) => panic!("{other}"),
        }
        let events = self.volume.machine.recorded();
        assert_eq!(self.volume.store.take_given_up(), [], "there was room");
        revert_model(&mut self.volume.model, tag);
        for event in std::iter::once(None).chain(events.iter().map(Some)) {
            if let Some(event) = event {
                moment.advance(event);
            }
            self.points += 1;
            let context = format!(
                "DDSNAP_CRASH_SEED={} {shape:?} revert to {tag}, point {}",
                seed(),
                self.points
            );
            let machine = moment.cut(survival(&mut self.rng), &mut self.rng);
            self.resumed += u64::from(self.wreck(&machine, &before, tag, true, &context));
        }
        let machine = self.volume.machine.clone();
        origin_is(&shape, &machine, &mut self.volume.store, tag).expect("reverted");
        self.volume.model.settle_origin();
        self.volume.unique.fill(false);
        let model = self.volume.model.clone();
        check(&shape, &machine, &mut self.volume.store, &model, &model).expect("as it should be");
        self.volume.store.audit(true).expect("audit");
    }

    /// Opens what a power cut left. If a revert is under way it is finished, and if `again` is set the power
    /// goes off in that too.
    fn wreck(
        &mut self,
        machine: &Machine,
        before: &Model,
        tag: u32,
        again: bool,
        context: &str,
    ) -> bool {
        let shape = self.volume.shape;
        let after = self.volume.model.clone();
        let (mut store, _) = shape
            .open(machine)
            .unwrap_or_else(|error| panic!("{context}: {error}"));
        let verify = |store: &mut Store| {
            check(&shape, machine, store, before, &after)
                .unwrap_or_else(|problem| panic!("{context}: {problem}"));
            if again {
                store
                    .audit(true)
                    .unwrap_or_else(|error| panic!("{context}: {error}"));
            }
        };
        verify(&mut store);
        let Some(found) = store.reverting() else {
            // Not begun, or at its end: the origin is one or the other.
            let whole = |model: &Model| {
                let mut buffer = vec![0; shape.chunk_bytes as usize];
                model.origin.iter().zip(0..).all(|(chunk, index)| {
                    read_origin(&shape, machine, Chunk(index), &mut buffer);
                    *chunk.now == *buffer
                })
            };
            assert!(whole(before) || whole(&after), "{context}: half reverted");
            return false;
        };
        assert_eq!(found, SnapTag(tag), "{context}");
        let mut moment = machine.moment();
        machine.record();
        assert_eq!(finish(&mut store), 0, "{context}");
        let events = machine.recorded();
        origin_is(&shape, machine, &mut store, tag)
            .unwrap_or_else(|problem| panic!("{context}: {problem}"));
        verify(&mut store);
        if again {
            let upto = self.rng.below(events.len() as u64 + 1) as usize;
            events[..upto]
                .iter()
                .for_each(|event| moment.advance(event));
            let machine = moment.cut(survival(&mut self.rng), &mut self.rng);
            self.wreck(
                &machine,
                before,
                tag,
                false,
                &format!("{context}, cut again"),
            );
        }
        true
    }
}

fn run(shape: Shape) {
    let mut run = Run {
        rng: Rng::new(seed() ^ shape.chunk_bytes),
        volume: Volume::new(shape),
        points: 0,
        resumed: 0,
    };
    let rounds = number_from_env("DDSNAP_REVERT_ROUNDS", 6);
    for _ in 0..rounds {
        run.load(30);
        let live = run.live();
        if let Some(&tag) = live.get(run.rng.below(live.len().max(1) as u64) as usize) {
            run.revert(tag);
        }
    }
    println!(
        "seed={} {shape:?} points={} resumed={}",
        seed(),
        run.points,
        run.resumed
    );
    assert!(
        run.points > 50 * rounds / 4 && run.resumed > rounds,
        "too little was tried"
    );
}

#[test]
fn chunks_of_512_bytes() {
    run(Shape {
        chunk_bytes: 512,
        origin_chunks: 64,
        lacking_sectors: 0,
        data_bytes: 900 << 10,
        meta_bytes: 0,
        snapshots: 6,
    });
}

#[test]
fn chunks_of_4_kib_with_a_metadata_device() {
    run(Shape {
        chunk_bytes: 4096,
        origin_chunks: 40,
        lacking_sectors: 0,
        data_bytes: 2 << 20,
        meta_bytes: 700 << 10,
        snapshots: 6,
    });
}

#[test]
fn chunks_of_1_mib() {
    run(Shape {
        chunk_bytes: 1 << 20,
        origin_chunks: 9,
        lacking_sectors: 0,
        data_bytes: 60 << 20,
        meta_bytes: 0,
        snapshots: 4,
    });
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

fn write_chunks(volume: &mut Volume, chunks: std::ops::Range<u64>) {
    let ops = chunks.map(|chunk| Op::OriginWrite(Chunk(chunk))).collect();
    volume.apply(&Step::Group { ops, write: true });
}

/// A volume with snapshot 1, of which chunks 0 to 9 and, by a write to it, 20 differ from the origin.
fn with_snapshot() -> Volume {
    let mut volume = Volume::new(quiet_shape());
    write_chunks(&mut volume, 0..40);
    volume.apply(&Step::Create(1));
    write_chunks(&mut volume, 0..10);
    volume.apply(&Step::Group {
        ops: vec![Op::SnapshotWrite(SnapTag(1), Chunk(20))],
        write: true,
    });
    volume
}

#[test]
fn only_what_differs_is_written_and_the_present_is_saved_for_others() {
    let mut volume = with_snapshot();
    volume.apply(&Step::Create(2));
    volume.machine.record();
    assert_eq!(revert(&mut volume.store, 1), Ok(0));
    let events = volume.machine.recorded();
    let written = events
        .iter()
        .filter(|event| matches!(event, Event::Write { disk: ORIGIN, .. }));
    assert_eq!(written.count(), 11);
    revert_model(&mut volume.model, 1);
    let model = volume.model.clone();
    check(
        &volume.shape,
        &volume.machine,
        &mut volume.store,
        &model,
        &model,
    )
    .expect("all kept");
    assert_eq!(volume.store.reverting(), None);
    // Once more: the same chunks are written, and nothing more is saved.
    let free = volume.store.status().free_chunks;
    assert_eq!(revert(&mut volume.store, 1), Ok(0));
    assert_eq!(volume.store.status().free_chunks, free);
}

#[test]
fn meanwhile_its_snapshot_stays_and_none_is_made() {
    let mut volume = with_snapshot();
    volume.apply(&Step::Create(2));
    checked(&mut volume.store, 1).expect("possible");
    volume
        .store
        .revert_start()
        .expect("start")
        .expect("possible");
    assert_eq!(
        volume.store.revert_step(2).expect("step"),
        Ok(Reverting::More)
    );
    let busy = OpError::Reverting(SnapTag(1));
    assert_eq!(
        volume.store.create(SnapTag(3), 0).expect("create"),
        Err(busy)
    );
    assert_eq!(volume.store.delete(SnapTag(1)).expect("delete"), Err(busy));
    let request = ResizeRequest {
        origin: Some(4096),
        ..Default::default()
    };
    assert_eq!(
        volume.store.resize_begin(&request).expect("resize"),
        Err(ResizeError::Reverting(SnapTag(1)))
    );
    assert_eq!(
        volume.store.revert_begin(SnapTag(2)).expect("revert"),
        Err(RevertError::UnderWay(SnapTag(1)))
    );
    // Another snapshot may go.
    assert_eq!(volume.store.delete(SnapTag(2)).expect("delete"), Ok(()));
    let (done, total) = volume.store.revert_progress();
    assert!(done > total / 2 && done < total, "{done} of {total}");
    finish(&mut volume.store);
    assert_eq!(volume.store.create(SnapTag(3), 0).expect("create"), Ok(()));
}

#[test]
fn it_is_never_given_up_for_room() {
    let shape = Shape {
        origin_chunks: 400,
        ..quiet_shape()
    };
    let mut volume = Volume::new(shape);
    volume.apply(&Step::Create(1));
    volume.apply(&Step::Create(2));
    write_chunks(&mut volume, 0..10);
    let stays = volume.store.set_priority(SnapTag(2), 127);
    stays.expect("set").expect("there");
    checked(&mut volume.store, 1).expect("possible");
    volume
        .store
        .revert_start()
        .expect("start")
        .expect("possible");
    let ops: Vec<Op> = (10..400)
        .map(|chunk| Op::SnapshotWrite(SnapTag(2), Chunk(chunk)))
        .collect();
    let answers = commit(&mut volume.store, &ops);
    assert!(answers.contains(&Err(OpError::StoreFull)));
    assert_eq!(
        volume.store.snapshot(SnapTag(1)).expect("kept").state,
        SnapState::Live
    );
    assert_eq!(volume.store.take_given_up(), []);
    finish(&mut volume.store);
}

#[test]
fn what_cannot_be_done_is_refused_before_anything_is_written() {
    let mut volume = with_snapshot();
    assert_eq!(
        volume.store.revert_begin(SnapTag(9)).expect("begin"),
        Err(RevertError::NoSuchSnapshot(SnapTag(9)))
    );
    assert_eq!(
        volume.store.revert_start().expect("start"),
        Err(RevertError::NotBegun)
    );
    // A saved chunk that is damaged.
    let place = match volume.store.locate(SnapTag(1), Chunk(7)).expect("locate") {
        Ok(Location::Store(place)) => place,
        other => panic!("{other:?}"),
    };
    let offset = place.to_offset(volume.shape.shift());
    volume.machine.corrupt(DATA, offset, &[0xee; 512]);
    volume.machine.record();
    match checked(&mut volume.store, 1) {
        Err(RevertError::Damaged {
            tag,
            chunk,
            problem,
        }) => {
            assert_eq!((tag, chunk), (SnapTag(1), Chunk(7)));
            assert!(problem.contains("checksum"), "{problem}");
        }
        other => panic!("{other:?}"),
    }
    assert!(volume.machine.recorded().is_empty());
    assert_eq!(
        volume.store.revert_start().expect("start"),
        Err(RevertError::NotBegun)
    );
}

#[test]
fn a_snapshot_of_another_length_than_the_origin() {
    let mut volume = with_snapshot();
    let resize = |volume: &mut Volume, chunks: u64| {
        volume.machine.set_len(ORIGIN, chunks.max(40) * 4096);
        let request = ResizeRequest {
            origin: Some(chunks * 4096),
            ..Default::default()
        };
        volume
            .store
            .resize_begin(&request)
            .expect("resize")
            .expect("possible");
        let mut end = None;
        while end.is_none() {
            end = volume.store.resize_step().expect("step").expect("possible");
        }
    };
    // Shorter than the origin: what lies behind its end stays.
    resize(&mut volume, 60);
    volume
        .machine
        .device(ORIGIN)
        .write(&[Write {
            offset: 50 * 4096,
            from: &[7; 4096],
        }])
        .expect("write");
    assert_eq!(revert(&mut volume.store, 1), Ok(0));
    let (shape, machine) = (volume.shape, volume.machine.clone());
    origin_is(&shape, &machine, &mut volume.store, 1).expect("reverted");
    let mut behind = vec![0; 4096];
    read_origin(&shape, &machine, Chunk(50), &mut behind);
    assert_eq!(behind, [7; 4096]);
    // Longer: there is no place for it.
    resize(&mut volume, 30);
    let refused = volume
        .store
        .revert_begin(SnapTag(1))
        .expect("begin")
        .expect_err("longer");
    assert_eq!(
        refused.to_string(),
        "snapshot 1 has 163840 bytes and the origin only 122880; extend the origin first"
    );
}

/// Of the last chunk the snapshot has one sector. A torn write into it left the next sector of its own chunk
/// unreadable (both lie in one physical sector): the revert was refused, and a scrub told of damage.
#[test]
fn what_lies_behind_a_snapshots_end_is_not_read() {
    let shape = Shape {
        lacking_sectors: 7,
        ..quiet_shape()
    };
    let mut volume = Volume::new(shape);
    write_chunks(&mut volume, 0..40);
    volume.apply(&Step::Create(1));
    volume.apply(&Step::Group {
        ops: vec![Op::SnapshotWrite(SnapTag(1), Chunk(39))],
        write: true,
    });
    write_chunks(&mut volume, 39..40);
    let place = match volume.store.locate(SnapTag(1), Chunk(39)).expect("locate") {
        Ok(Location::Store(place)) => place.to_offset(shape.shift()),
        other => panic!("{other:?}"),
    };
    volume
        .machine
        .make_unreadable(DATA, place + 512..place + 4096);
    let mut scrub = volume.store.scrub_begin();
    while !scrub.is_finished() {
        let found = volume.store.scrub_step(&mut scrub, 8).expect("scrub");
        assert_eq!(found.bad, []);
    }
    assert_eq!(revert(&mut volume.store, 1), Ok(0));
    let (mut found, mut wanted) = ([0; 512], [0; 512]);
    let (machine, store) = (&volume.machine, &mut volume.store);
    read_origin(&shape, machine, Chunk(39), &mut found);
    read_snapshot(&shape, machine, store, 1, Chunk(39), &mut wanted).expect("read");
    assert_eq!(found, wanted);
}

/// A store whose origin fails when it is told to.
fn with_faults(volume: &Volume) -> (Store, Faults) {
    let faults = Faults::default();
    let devices = Devices {
        origin: Box::new(FaultyDevice::new(
            volume.machine.device(ORIGIN),
            faults.clone(),
        )),
        data: Box::new(volume.machine.device(DATA)),
        meta: None,
    };
    let options = OpenOptions {
        cache_bytes: 1 << 20,
    };
    (Store::open(devices, &options).expect("open").0, faults)
}

#[test]
fn an_origin_that_fails_does_not_end_it() {
    for call in [Call::Write, Call::Flush] {
        let volume = with_snapshot();
        let (mut store, faults) = with_faults(&volume);
        checked(&mut store, 1).expect("possible");
        store.revert_start().expect("start").expect("possible");
        faults.fail(call, 0);
        let error = loop {
            match store.revert_step(3) {
                Ok(step) => assert_eq!(step, Ok(Reverting::More)),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, StoreError::WriteOrigin { .. }), "{error}");
        assert_eq!(store.failure(), None, "the store itself is sound");
        assert_eq!(store.reverting(), Some(SnapTag(1)));
        assert_eq!(finish(&mut store), 0);
        origin_is(&volume.shape, &volume.machine, &mut store, 1).expect("reverted");
    }
}

/// A disk one of whose chunks cannot be read.
struct BadChunk(MemoryDevice, u64);

impl BlockDevice for BadChunk {
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
        let (bad, end) = (self.1 * 4096, (self.1 + 1) * 4096);
        let touches =
            |read: &Read<'_>| read.offset < end && bad < read.offset + read.into.len() as u64;
        if batch.iter().any(touches) {
            return Err(std::io::Error::other("a bad sector"));
        }
        self.0.read(batch)
    }

    fn write(&mut self, batch: &[Write<'_>]) -> std::io::Result<()> {
        self.0.write(batch)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}

/// A chunk of the origin that another snapshot needs cannot be read, and one of the snapshot's went bad after
/// it was checked: both stay as they are, the rest is given back.
#[test]
fn what_cannot_be_read_is_left_as_it_is_and_told() {
    let mut volume = with_snapshot();
    volume.apply(&Step::Create(2));
    let devices = Devices {
        origin: Box::new(BadChunk(volume.machine.device(ORIGIN), 4)),
        data: Box::new(volume.machine.device(DATA)),
        meta: None,
    };
    let options = OpenOptions {
        cache_bytes: 1 << 20,
    };
    let mut store = Store::open(devices, &options).expect("open").0;
    checked(&mut store, 1).expect("possible");
    store.revert_start().expect("start").expect("possible");
    let place = match store.locate(SnapTag(1), Chunk(7)).expect("locate") {
        Ok(Location::Store(place)) => place,
        other => panic!("{other:?}"),
    };
    let offset = place.to_offset(volume.shape.shift());
    volume.machine.corrupt(DATA, offset, &[0xee; 512]);
    assert_eq!(finish(&mut store), 2);
    let mut told: Vec<u64> = store
        .take_revert_skipped()
        .iter()
        .map(|(chunk, _)| chunk.0)
        .collect();
    told.sort_unstable();
    assert_eq!(told, [4, 7]);
    let mut found = vec![0; 4096];
    let snapshot = &volume.model.snapshots[&1];
    for (chunk, now) in (0..).map(Chunk).zip(&volume.model.origin) {
        read_origin(&volume.shape, &volume.machine, chunk, &mut found);
        let wanted = match chunk.0 {
            4 | 7 => &now.now,
            other => &snapshot.chunks[other as usize].now,
        };
        assert_eq!(found, **wanted, "chunk {chunk}");
    }
}
