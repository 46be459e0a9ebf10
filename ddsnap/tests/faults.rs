// SPDX-License-Identifier: GPL-2.0-only
//! Damaged, foreign and failing devices: an error that names the place, never a panic, never wrong
//! data, never a change to what was not understood.

mod harness;

use ddsnap::device::fault::{Call, Faults, FaultyDevice};
use ddsnap::device::memory::{Machine, Moment, Rng, Survival};
use ddsnap::device::{BlockDevice, Read, Write};
use ddsnap::store::{Devices, Done, InitOptions, Op, OpenOptions, SnapState, Store, StoreError};
use ddsnap::units::{Chunk, ChunkShift, SnapTag};
use harness::check::{check, read_snapshot};
use harness::seed;
use harness::shape::{DATA, META, ORIGIN, Shape};
use harness::victims::commit;
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
const OPTIONS: OpenOptions = OpenOptions {
    cache_bytes: 1 << 20,
};

/// A volume with some history.
fn used_volume(shape: Shape, steps: u64) -> Volume {
    let mut rng = Rng::new(seed());
    let mut volume = Volume::new(shape);
    for _ in 0..steps {
        let step = choose(&mut rng, &shape, &volume.model, &mut volume.next_tag);
        volume.apply(&step);
    }
    volume
}

/// The data device fails as `faults` says, the origin as `origin` says.
fn faulty(machine: &Machine, faults: &Faults, origin: &Faults) -> Devices {
    Devices {
        origin: Box::new(FaultyDevice::new(machine.device(ORIGIN), origin.clone())),
        data: Box::new(FaultyDevice::new(machine.device(DATA), faults.clone())),
        meta: None,
    }
}

/// All devices of the shape fail together as `faults` says.
fn all_faulty(shape: &Shape, machine: &Machine, faults: &Faults) -> Devices {
    let device = |disk| Box::new(FaultyDevice::new(machine.device(disk), faults.clone()));
    Devices {
        meta: (shape.meta_bytes > 0).then(|| device(META) as Box<dyn BlockDevice>),
        ..faulty(machine, faults, faults)
    }
}

/// Of opening after a crash, and of closing, every call fails in turn, with an error and short, also where the metadata
/// have a device of their own: only the first six reads of opening were tried, and nothing else.
#[test]
fn whatever_call_of_opening_or_closing_fails_nothing_is_lost() {
    let apart = Shape {
        data_bytes: 700 << 10,
        meta_bytes: 1200 << 10,
        ..SHAPE
    };
    for shape in [SHAPE, apart] {
        let volume = used_volume(shape, 60);
        let (history, model) = (volume.machine.moment(), volume.model.clone());
        let kinds = [
            (Call::Read, false),
            (Call::Read, true),
            (Call::Write, false),
            (Call::Write, true),
            (Call::Flush, false),
        ];
        for (call, short) in kinds {
            let mut tried = 0;
            loop {
                let machine = history.clone().cut(Survival::All, &mut Rng::new(1));
                let faults = Faults::default();
                faults.set_short(short);
                faults.fail(call, tried);
                let opened = Store::open(all_faulty(&shape, &machine, &faults), &OPTIONS);
                // Refused or not: what counts is what is there.
                let _ = opened.and_then(|(store, _)| store.close());
                let met = faults.met() > 0;
                let (mut store, _) = shape.open(&machine).expect("it works again");
                let checked = check(&shape, &machine, &mut store, &model, &model);
                assert!(
                    checked.is_ok(),
                    "{call:?} {tried} short {short}: {checked:?}"
                );
                if !met {
                    break;
                }
                tried += 1;
            }
            assert!(tried > 1, "{call:?} failed {tried} times");
        }
    }
}

/// An index that the smallest cache does not hold.
const LARGE: Shape = Shape {
    chunk_bytes: 512,
    origin_chunks: 6000,
    lacking_sectors: 0,
    data_bytes: 12 << 20,
    meta_bytes: 0,
    snapshots: 6,
};

/// What is asked of a store while its devices fail: copies for the snapshots there are, snapshots that come
/// and go, overlays, and background steps. The origin is never written, so all snapshots keep their
/// content. Answers and errors are as they may be.
fn busy(store: &mut Store, steps: u64) {
    let mut rng = Rng::new(seed());
    for step in 0..steps {
        let tag = SnapTag(1000 + (step % 5) as u32);
        let chunk = Chunk(rng.below(LARGE.origin_chunks));
        match rng.below(10) {
            0 => {
                if let Err(StoreError::FlushOrigin { .. }) = store.create(tag, 5) {
                    assert!(store.snapshot(tag).is_none());
                }
            }
            1 => drop(store.delete(tag)),
            2..=3 => drop(store.commit(&[Op::SnapshotWrite(tag, chunk)])),
            4..=5 => drop(store.background_step(16)),
            _ => {
                let chunks = chunk.0..LARGE.origin_chunks.min(chunk.0 + 8);
                let ops: Vec<Op> = chunks.map(|c| Op::OriginWrite(Chunk(c))).collect();
                let _ = store.commit(&ops);
            }
        }
        store.take_given_up();
        if store.failure().is_some() {
            return;
        }
    }
}

/// Every snapshot of the model that still lives reads what it must. Nothing was written to the origin.
fn check_living(volume: &Volume, store: &mut Store) {
    store.audit(true).expect("the store works");
    let mut buffer = vec![0; LARGE.chunk_bytes as usize];
    for info in store.snapshots() {
        let Some(known) = volume.model.snapshots.get(&info.tag.0) else {
            continue;
        };
        if info.state != SnapState::Live || info.created != known.created {
            continue;
        }
        for (at, chunk) in known.chunks.iter().enumerate().step_by(7) {
            let (tag, at) = (info.tag.0, Chunk(at as u64));
            read_snapshot(&LARGE, &volume.machine, store, tag, at, &mut buffer)
                .expect("the store works");
            assert!(chunk.allows(&buffer), "snapshot {tag} chunk {at}");
        }
    }
}

/// How a call fails, on one of the two devices.
#[derive(Clone, Copy, Debug)]
struct Failure {
    of_origin: bool,
    call: Call,
    count: u64,
    lasting: bool,
    short: bool,
}

const BUSY_STEPS: u64 = 40;

/// One call fails, and all that follow if it lasts: of reads, and of flushes of the origin, only what asked
/// for them fails; a write or flush of the store latches it. In either case nothing is lost, and a store
/// opened again is sound.
fn fail(history: &Moment, model: &Volume, failure: Failure) {
    let machine = history.clone().cut(Survival::All, &mut Rng::new(1));
    let (faults, others) = (Faults::default(), Faults::default());
    let options = OpenOptions { cache_bytes: 0 };
    let devices = match failure.of_origin {
        true => faulty(&machine, &others, &faults),
        false => faulty(&machine, &faults, &others),
    };
    let (mut store, _) = Store::open(devices, &options).expect("the store works");
    faults.set_short(failure.short);
    match failure.lasting {
        true => faults.fail_from(failure.call, failure.count),
        false => faults.fail(failure.call, failure.count),
    }
    busy(&mut store, BUSY_STEPS);
    faults.mend();
    let volume = Volume {
        machine: machine.clone(),
        model: model.model.clone(),
        ..Volume::new(LARGE)
    };
    assert!(faults.met() > 0, "{failure:?}");
    if failure.call != Call::Read && !failure.of_origin {
        assert!(store.failure().is_some(), "{failure:?}");
        let error = store
            .commit(&[Op::OriginWrite(Chunk(0))])
            .expect_err("it has latched");
        assert!(matches!(error, StoreError::Latched(_)), "{error}");
        let error = store.create(SnapTag(77), 5).expect_err("it has latched");
        assert!(error.to_string().contains("data"), "{error}: which device?");
        // Reading goes on.
        for snapshot in store.snapshots() {
            let _ = store
                .locate(snapshot.tag, Chunk(0))
                .expect("the store works");
        }
    } else {
        assert_eq!(store.failure(), None, "{failure:?}");
        // All that failed is made up for.
        while store.background_step(64).expect("the store works") {}
        check_living(&volume, &mut store);
        busy(&mut store, BUSY_STEPS);
        store.close().expect("the store works");
    }
    let (mut store, _) = LARGE.open(&machine).expect("the store works");
    check_living(&volume, &mut store);
}

/// Of a workload every read, every write and every flush fails in turn: once and for good, with an error
/// and short. Only the first twelve were tried, and a read that failed in a checkpoint latched the store.
#[test]
fn whatever_call_fails_nothing_is_lost() {
    let mut volume = Volume::new(LARGE);
    for tag in 1..=3 {
        volume.apply(&Step::Create(tag));
        let chunks = (0..LARGE.origin_chunks).step_by(tag as usize);
        let ops: Vec<Op> = chunks.map(|c| Op::OriginWrite(Chunk(c))).collect();
        for group in ops.chunks(500) {
            let ops = group.to_vec();
            volume.apply(&Step::Group { ops, write: true });
        }
    }
    // Copies are needed again, and some of the index is dead.
    volume.apply(&Step::Create(4));
    volume.apply(&Step::Delete(2));
    let history = volume.machine.moment();
    let (faults, of_origin) = (Faults::default(), Faults::default());
    let machine = history.clone().cut(Survival::All, &mut Rng::new(1));
    let devices = faulty(&machine, &faults, &of_origin);
    let options = OpenOptions { cache_bytes: 0 };
    let (mut store, _) = Store::open(devices, &options).unwrap();
    let calls = [
        (false, Call::Read, 20),
        (false, Call::Write, 20),
        (false, Call::Flush, 20),
        (true, Call::Read, 10),
        (true, Call::Flush, 2),
    ];
    let count = |(origin, call, _): (bool, Call, u64)| match origin {
        true => of_origin.calls(call),
        false => faults.calls(call),
    };
    let before = calls.map(count);
    busy(&mut store, BUSY_STEPS);
    drop(store);
    assert_eq!(of_origin.calls(Call::Write), 0);
    let mut tried = 0;
    for (calls, before) in calls.into_iter().zip(before) {
        let of_kind = count(calls) - before;
        let (of_origin, call, least) = calls;
        assert!(of_kind >= least, "{calls:?}: {of_kind}");
        for count in 0..of_kind {
            for lasting in [false, true] {
                let failure = Failure {
                    of_origin,
                    call,
                    count,
                    lasting,
                    short: (count + u64::from(lasting)) % 2 == 1,
                };
                fail(&history, &volume, failure);
                tried += 1;
            }
        }
    }
    println!("{tried} failures");
}

/// A read that failed in a checkpoint latched the store: all writes failed until a restart.
#[test]
fn a_failed_read_fails_the_request_and_nothing_else() {
    let shape = Shape {
        chunk_bytes: 512,
        origin_chunks: 20_000,
        data_bytes: 24 << 20,
        ..SHAPE
    };
    let machine = shape.machine();
    shape.initialize(&machine);
    let mut store = shape.open(&machine).unwrap().0;
    store.create(SnapTag(1), 1).unwrap().unwrap();
    let ops: Vec<Op> = (0..20_000).map(|c| Op::OriginWrite(Chunk(c))).collect();
    for group in ops.chunks(100) {
        commit(&mut store, group);
    }
    store.create(SnapTag(2), 1).unwrap().unwrap();
    store.close().unwrap();
    let faults = Faults::default();
    let devices = faulty(&machine, &faults, &Faults::default());
    let mut store = Store::open(devices, &OpenOptions { cache_bytes: 0 })
        .unwrap()
        .0;
    // One read that fails once, at any of many moments: a path that was gone for a second.
    let mut in_checkpoint = 0;
    for at in 0..2000 {
        faults.fail(Call::Read, at % 3);
        let _ = store.commit(&[Op::OriginWrite(Chunk(at * 7919 % 20_000))]);
        let under_way = store.is_checkpoint_under_way();
        let failed = store.background_step(16).is_err();
        in_checkpoint += store.take_troubles().len() + usize::from(under_way && failed);
        assert_eq!(store.failure(), None, "after {} failed reads", faults.met());
    }
    println!(
        "{} reads failed, {in_checkpoint} in a checkpoint",
        faults.met()
    );
    assert!(faults.met() > 400 && in_checkpoint > 10);
    faults.mend();
    for group in ops.chunks(100) {
        let answers = commit(&mut store, group);
        assert!(answers.iter().all(|answer| *answer == Ok(Done::Unique)));
    }
    while store.background_step(64).unwrap() {}
    store.audit(true).unwrap();
}

#[test]
fn a_failed_read_harms_nothing() {
    let mut volume = used_volume(SHAPE, 60);
    let faults = Faults::default();
    let (store, _) = Store::open(
        faulty(&volume.machine, &faults, &faults),
        &OpenOptions { cache_bytes: 0 },
    )
    .unwrap();
    volume.store = store;
    // For a bookmark alone nothing is read.
    let create = Step::Create(u32::MAX - 1);
    volume.prepare(&create);
    volume.apply(&create);
    let mut failed = 0;
    for chunk in 0..SHAPE.origin_chunks {
        faults.fail(Call::Read, 0);
        failed += u64::from(
            volume
                .store
                .commit(&[Op::OriginWrite(Chunk(chunk))])
                .is_err(),
        );
    }
    assert!(failed > 0);
    faults.fail(Call::Read, u64::MAX);
    assert_eq!(volume.store.failure(), None);
    let model = volume.model.clone();
    check(&SHAPE, &volume.machine, &mut volume.store, &model, &model).unwrap();
    // A failing read while opening refuses; nothing is half opened.
    for count in 0..6 {
        let faults = Faults::default();
        faults.fail(Call::Read, count);
        if let Ok((mut store, _)) = Store::open(faulty(&volume.machine, &faults, &faults), &OPTIONS)
        {
            faults.fail(Call::Read, u64::MAX);
            check(&SHAPE, &volume.machine, &mut store, &model, &model).unwrap();
        }
    }
}

#[test]
fn damaged_metadata_is_an_error_and_never_wrong_data() {
    let mut rng = Rng::new(seed());
    let mut opened = 0;
    for round in 0..300 {
        let volume = used_volume(SHAPE, 30 + round % 40);
        let Volume {
            store,
            machine,
            model,
            ..
        } = volume;
        store.close().unwrap();
        // All metadata lies in the first 576 KiB of this shape.
        let offset = rng.below(576 * 2) * 512;
        let mut sector = [0; 512];
        machine
            .device(DATA)
            .read(&mut [Read {
                offset,
                into: &mut sector,
            }])
            .unwrap();
        match rng.below(3) {
            0 => sector[rng.below(512) as usize] ^= 1 << rng.below(8),
            1 => sector.fill(0),
            _ => sector
                .iter_mut()
                .for_each(|byte| *byte = rng.next_u64() as u8),
        }
        machine.corrupt(DATA, offset, &sector);
        let Ok((mut store, _)) = SHAPE.open(&machine) else {
            continue;
        };
        opened += 1;
        if let Err(problem) = check(&SHAPE, &machine, &mut store, &model, &model) {
            assert!(
                problem.contains("is damaged") || problem.contains("Damaged"),
                "{problem}"
            );
        }
    }
    assert!(opened > 0);
}

#[test]
fn a_hole_in_the_journal_is_refused() {
    let mut volume = Volume::new(SHAPE);
    for tag in 0..4 {
        volume.apply(&Step::Create(tag));
    }
    // The journal begins at 128 KiB, a block for each record: damage the second of four.
    let at = (128 << 10) + 4096;
    volume.machine.corrupt(DATA, at + 100, &[0x55; 8]);
    let before = volume.machine.moment();
    let error = SHAPE
        .open(&volume.machine)
        .err()
        .expect("opened a store with a hole in its journal");
    assert!(
        error.to_string().contains("Journal recovery failed"),
        "{error}"
    );
    let again = before.cut(Survival::All, &mut Rng::new(1));
    let error = SHAPE.open(&again).err().expect("opened");
    assert!(error.to_string().contains("record 2 is damaged"), "{error}");
}

#[test]
fn devices_that_do_not_belong_together_are_refused() {
    let shape = Shape {
        meta_bytes: 600 << 10,
        data_bytes: 1 << 20,
        ..SHAPE
    };
    let (one, two) = (shape.machine(), shape.machine());
    shape.initialize(&one);
    let options = InitOptions {
        chunk: shape.shift(),
        journal_bytes: None,
        now: 2,
        uuid: [8; 16],
    };
    Store::initialize(&mut shape.devices(&two), &options).unwrap();
    let open = |data: &Machine, meta: Option<&Machine>| {
        let devices = Devices {
            origin: Box::new(one.device(ORIGIN)),
            data: Box::new(data.device(DATA)),
            meta: meta.map(|meta| Box::new(meta.device(META)) as Box<dyn BlockDevice>),
        };
        Store::open(devices, &OPTIONS).map(|_| ())
    };
    open(&one, Some(&one)).unwrap();
    let text = |result: Result<(), StoreError>| result.unwrap_err().to_string();
    assert!(text(open(&two, Some(&one))).contains("another store"));
    assert!(text(open(&one, None)).contains("no snapshot store"));
    let combined = Volume::new(SHAPE);
    assert!(text(open(&combined.machine, Some(&one))).contains("belongs to no store"));
    let swapped = Devices {
        origin: Box::new(one.device(ORIGIN)),
        data: Box::new(one.device(META)),
        meta: None,
    };
    assert!(text(Store::open(swapped, &OPTIONS).map(|_| ())).contains("name the data device"));
    assert!(
        Store::probe(&mut one.device(DATA)).unwrap()
            && Store::probe(&mut one.device(META)).unwrap()
    );
    assert!(!Store::probe(&mut one.device(ORIGIN)).unwrap());
}

#[test]
fn initialise_over_an_old_store_leaves_nothing_of_it() {
    let mut volume = used_volume(SHAPE, 50);
    volume.apply(&Step::Create(60_000));
    let machine = volume.machine.clone();
    drop(volume.store);
    let start = machine.moment();
    machine.record();
    let options = InitOptions {
        chunk: SHAPE.shift(),
        journal_bytes: None,
        now: 2,
        uuid: [4; 16],
    };
    Store::initialize(&mut SHAPE.devices(&machine), &options).unwrap();
    let events = machine.recorded();
    // Whole, a power cut leaves the old store, none, or the new one: never a mixture.
    for upto in 0..=events.len() {
        let mut moment = start.clone();
        events[..upto]
            .iter()
            .for_each(|event| moment.advance(event));
        for seed in 0..8 {
            let machine = moment.cut(Survival::Sectors(50), &mut Rng::new(seed));
            match SHAPE.open(&machine) {
                Ok((mut store, _)) if store.uuid() == [4; 16] => {
                    assert!(store.snapshots().is_empty());
                    store.audit(true).unwrap();
                }
                Ok((mut store, _)) => {
                    assert!(store.snapshot(SnapTag(60_000)).is_some());
                    store.audit(true).unwrap();
                }
                Err(error) => assert!(matches!(error, StoreError::NoStore { .. }), "{error}"),
            }
        }
    }
    assert!(SHAPE.open(&machine).unwrap().0.snapshots().is_empty());
}

#[test]
fn sizes_from_tiny_to_17_tib() {
    let sizes = [
        (512, 4 << 20),
        (4096, 4 << 20),
        (65536, 4 << 20),
        (1 << 20, 20 << 20),
        (16384, 17 << 40),
        (512, 17 << 40),
    ];
    for (chunk_bytes, data_bytes) in sizes {
        let origin_chunks = data_bytes / chunk_bytes;
        let shape = Shape {
            chunk_bytes,
            origin_chunks,
            lacking_sectors: 0,
            data_bytes,
            meta_bytes: 0,
            snapshots: 1,
        };
        let machine = shape.machine();
        let start = std::time::Instant::now();
        machine.record();
        shape.initialize(&machine);
        let (mut store, opened) = shape.open(&machine).unwrap();
        let written: usize = machine
            .recorded()
            .iter()
            .map(|event| match event {
                ddsnap::device::memory::Event::Write { bytes, .. } => bytes.len(),
                ddsnap::device::memory::Event::Flush { .. } => 0,
            })
            .sum();
        assert!(
            opened.clean && written < 1 << 20,
            "{shape:?} wrote {written} bytes"
        );
        let last = Chunk(origin_chunks - 1);
        machine
            .device(ORIGIN)
            .write(&[Write {
                offset: last.to_offset(shape.shift()),
                from: &[5; 512],
            }])
            .unwrap();
        store.create(SnapTag(3), 1).unwrap().unwrap();
        assert!(store.commit(&[Op::OriginWrite(last)]).unwrap()[0].is_ok());
        assert!(
            store
                .commit(&[Op::OriginWrite(Chunk(origin_chunks))])
                .unwrap()[0]
                .is_err()
        );
        store.close().unwrap();
        let (mut store, opened) = shape.open(&machine).unwrap();
        assert!(opened.clean);
        let mut buffer = vec![0; chunk_bytes as usize];
        read_snapshot(&shape, &machine, &mut store, 3, last, &mut buffer).unwrap();
        assert_eq!(
            (
                buffer[0],
                store.status().data_chunks - store.status().free_chunks
            ),
            (5, 1)
        );
        assert!(start.elapsed().as_secs() < 20);
    }
    let shape = Shape {
        data_bytes: 500 << 10,
        ..SHAPE
    };
    let options = InitOptions {
        chunk: ChunkShift::MIN,
        journal_bytes: None,
        now: 1,
        uuid: [1; 16],
    };
    let error = Store::initialize(&mut shape.devices(&shape.machine()), &options).unwrap_err();
    assert!(error.to_string().contains("needs at least"), "{error}");
}
