// SPDX-License-Identifier: GPL-2.0-only
//! An origin that is written without its store: it is told, nothing is changed, and what is accepted stays
//! doubtful. And whatever goes through the target, or changes lengths, is no reason to tell anything.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod harness;

use ddsnap::device::fault::{Call, Faults, FaultyDevice};
use ddsnap::device::memory::{Machine, Rng, Survival};
use ddsnap::device::{BlockDevice, Write};
use ddsnap::store::{
    Devices, Op, OpenOptions, Opened, OriginUse, ResizeRequest, Reverting, Store, StoreError,
    Surroundings,
};
use ddsnap::units::{Chunk, SnapTag};
use harness::shape::{ORIGIN, Shape};

const SHAPE: Shape = Shape {
    chunk_bytes: 4096,
    origin_chunks: 1024,
    lacking_sectors: 0,
    data_bytes: 3 << 20,
    meta_bytes: 0,
    snapshots: 8,
};
const NONE: [u32; 0] = [];
const NOON: i64 = 1_795_000_000;

fn machine() -> Machine {
    let machine = SHAPE.machine();
    SHAPE.initialize(&machine);
    machine
}

fn options() -> OpenOptions {
    OpenOptions {
        cache_bytes: 64 * 4096,
    }
}

fn open_in(machine: &Machine, now: &Surroundings) -> Result<(Store, Opened), StoreError> {
    Store::open_in(SHAPE.devices(machine), &options(), now)
}

fn open(machine: &Machine) -> Store {
    SHAPE.open(machine).expect("it opens").0
}

fn accepting() -> Surroundings {
    Surroundings {
        accept: true,
        ..Surroundings::default()
    }
}

fn put(machine: &Machine, offset: u64, bytes: &[u8]) {
    let mut buffer = ddsnap::buffer::AlignedBuf::zeroed(bytes.len());
    buffer.copy_from_slice(bytes);
    let mut origin = machine.device(ORIGIN);
    let from = &buffer;
    origin.write(&[Write { offset, from }]).unwrap();
    origin.flush().unwrap();
}

/// A write through the target: asked for, then done.
fn write(store: &mut Store, machine: &Machine, chunk: u64, byte: u8) {
    store.commit(&[Op::OriginWrite(Chunk(chunk))]).unwrap()[0].unwrap();
    put(machine, chunk * 4096, &[byte; 4096]);
}

fn create(store: &mut Store, tag: u32) {
    store.create(SnapTag(tag), NOON).unwrap().unwrap();
}

fn doubtful(store: &Store) -> Vec<u32> {
    let all = store.snapshots();
    let doubtful = all.iter().filter(|info| info.doubtful);
    doubtful.map(|info| info.tag.0).collect()
}

fn refusal(machine: &Machine, now: &Surroundings) -> String {
    match open_in(machine, now) {
        Ok(_) => panic!("it was not noticed"),
        Err(error @ StoreError::Foreign { .. }) => error.to_string(),
        Err(other) => panic!("{other}"),
    }
}

/// A superblock of ext4, as far as it is looked at.
fn ext(written: i64, id: u8) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    bytes[1024 + 0x38..1024 + 0x3a].copy_from_slice(&[0x53, 0xef]);
    bytes[1024 + 0x68..1024 + 0x78].fill(id);
    for at in [0x2c, 0x30] {
        bytes[1024 + at..1024 + at + 4].copy_from_slice(&(written as u32).to_le_bytes());
    }
    bytes
}

/// Writes that no flush follows.
fn put_in_cache(machine: &Machine, offset: u64, bytes: &[u8]) {
    let mut origin = machine.device(ORIGIN);
    origin
        .write(&[Write {
            offset,
            from: bytes,
        }])
        .unwrap();
}

/// The raw disk was mounted and written after an orderly stop: the snapshot showed the new data as if it were
/// old, and nothing said so.
#[test]
fn a_write_after_an_orderly_end_is_told_and_stays_told() {
    let machine = machine();
    put(&machine, 0, &ext(NOON, 7));
    let mut store = open(&machine);
    create(&mut store, 0);
    create(&mut store, 2);
    store.close_with(OriginUse::Unused, NOON + 10).unwrap();
    put(&machine, 0, &ext(NOON + 60, 7));

    for _ in 0..2 {
        let text = refusal(&machine, &Surroundings::default());
        let told = "its ext file system was mounted or written at 2026-11-18T11:07:40Z";
        assert!(text.contains(told), "{text}");
        assert!(
            text.contains("its 2 snapshots may show newer data"),
            "{text}"
        );
    }
    let (mut store, opened) = open_in(&machine, &accepting()).unwrap();
    assert!(opened.foreign.is_some());
    assert_eq!(doubtful(&store), [0, 2]);
    create(&mut store, 4);
    assert_eq!(doubtful(&store), [0, 2], "what is taken now is right");
    store.close().unwrap();
    let (store, opened) = open_in(&machine, &Surroundings::default()).unwrap();
    assert_eq!((opened.foreign, doubtful(&store)), (None, vec![0, 2]));
    drop(store);
    // After a crash too, from the superblock and from the journal.
    assert_eq!(doubtful(&open(&machine)), [0, 2]);
}

/// Another disk came up under the origin's name.
#[test]
fn another_disk_is_told() {
    let machine = machine();
    put(&machine, 0, &ext(NOON, 7));
    let (mut store, _) = open_in(&machine, &disk("disk A")).unwrap();
    create(&mut store, 0);
    store.close().unwrap();
    put(&machine, 0, &ext(NOON, 8));
    let text = refusal(&machine, &disk("disk B"));
    assert!(text.contains("it is 'disk B' and was 'disk A'"), "{text}");
    assert!(
        text.contains("it has the ext file system 08080808-"),
        "{text}"
    );
    // The right one again: nothing happened. A copy of it on another disk is as right.
    put(&machine, 0, &ext(NOON, 7));
    let (store, opened) = open_in(&machine, &disk("disk C")).unwrap();
    assert_eq!((opened.foreign, doubtful(&store)), (None, NONE.to_vec()));
}

fn disk(name: &str) -> Surroundings {
    Surroundings {
        device: name.to_owned(),
        ..Surroundings::default()
    }
}

/// As a mount through the target writes the superblock, or mkfs another one.
fn write_ext(store: &mut Store, machine: &Machine, id: u8) {
    store.commit(&[Op::OriginWrite(Chunk(0))]).unwrap()[0].unwrap();
    put(machine, 0, &ext(NOON + 30, id));
}

/// After a power cut another disk with an ext file system of the same geometry was taken for the origin, and nothing
/// was doubtful: the superblock had been copied out, and the guards that were left were the same on both.
#[test]
fn another_disk_after_a_power_cut_is_told() {
    let machine = machine();
    put(&machine, 0, &ext(NOON, 7));
    let (mut store, _) = open_in(&machine, &disk("disk A")).unwrap();
    create(&mut store, 0);
    write_ext(&mut store, &machine, 7);
    drop(store);
    for (name, bytes, found) in [
        ("disk B", ext(NOON, 8), "the ext file system 08080808-"),
        ("disk B", vec![0; 4096], "nothing that is known"),
        ("", ext(NOON, 8), "the ext file system 08080808-"),
    ] {
        put(&machine, 0, &bytes);
        let text = refusal(&machine, &disk(name));
        assert!(text.contains(&format!("it has {found}")), "{text}");
        let wanted = "where the newest snapshot has the ext file system 07070707-";
        assert!(text.contains(wanted), "{text}");
        let is_named = text.contains("it is 'disk B' and was 'disk A'");
        assert_eq!(is_named, !name.is_empty(), "{text}");
    }
    // The right one, and a copy of it.
    for name in ["disk A", "disk C"] {
        put(&machine, 0, &ext(NOON + 40, 7));
        let (store, opened) = open_in(&machine, &disk(name)).unwrap();
        assert_eq!((opened.foreign, doubtful(&store)), (None, NONE.to_vec()));
    }
    put(&machine, 0, &ext(NOON, 8));
    let accepted = Surroundings {
        accept: true,
        ..disk("disk B")
    };
    let (mut store, opened) = open_in(&machine, &accepted).unwrap();
    assert!(opened.foreign.is_some());
    assert_eq!(doubtful(&store), [0]);
    create(&mut store, 1);
    drop(store);
    let (store, opened) = open_in(&machine, &disk("disk B")).unwrap();
    assert_eq!((opened.foreign, doubtful(&store)), (None, vec![0]));
    drop(store);
    put(&machine, 0, &ext(NOON, 7));
    refusal(&machine, &disk("disk A"));
}

/// With bookmarks alone there is no copy to compare with: then what was noted counts, if the disk has another name.
#[test]
fn another_disk_is_told_by_what_was_noted() {
    let machine = machine();
    put(&machine, 0, &ext(NOON, 7));
    let (mut store, _) = open_in(&machine, &disk("disk A")).unwrap();
    store.create_bookmark(SnapTag(0), NOON).unwrap().unwrap();
    write_ext(&mut store, &machine, 7);
    store.close_with(OriginUse::InUse, NOON).unwrap();
    put(&machine, 0, &ext(NOON, 8));
    let text = refusal(&machine, &disk("disk B"));
    assert!(
        text.contains("where it had the ext file system 07070707-"),
        "{text}"
    );
    // A copy of it, and then mkfs on that.
    put(&machine, 0, &ext(NOON, 7));
    let (store, _) = open_in(&machine, &disk("disk B")).unwrap();
    store.close_with(OriginUse::InUse, NOON).unwrap();
    put(&machine, 0, &ext(NOON, 8));
    assert_eq!(
        doubtful(&open_in(&machine, &disk("disk B")).unwrap().0),
        NONE
    );
}

/// mkfs and `tune2fs -U` on the target are no other disk, as soon as the store has seen what they left.
#[test]
fn a_file_system_made_through_the_target_is_no_foreign_write() {
    let boot = |id: u8| Surroundings {
        boot: [id; 16],
        ..disk("disk A")
    };
    let other_machine = || {
        let machine = machine();
        put(&machine, 0, &ext(NOON, 7));
        let (mut store, _) = open_in(&machine, &boot(1)).unwrap();
        create(&mut store, 0);
        write_ext(&mut store, &machine, 8);
        (machine, store)
    };
    // A snapshot shows it.
    let (machine, mut store) = other_machine();
    create(&mut store, 1);
    drop(store);
    assert_eq!(doubtful(&open_in(&machine, &boot(2)).unwrap().0), NONE);
    // It was noted, with devices left that go on writing.
    let (machine, store) = other_machine();
    store.close_with(OriginUse::InUse, NOON).unwrap();
    assert_eq!(doubtful(&open_in(&machine, &boot(2)).unwrap().0), NONE);
    let (machine, store) = other_machine();
    drop(store);
    // A server that was killed: its devices would wait for it for ever.
    assert_eq!(doubtful(&open_in(&machine, &boot(1)).unwrap().0), NONE);
    // It was neither, and the power went: nothing tells it from another disk.
    let (machine, store) = other_machine();
    drop(store);
    refusal(&machine, &boot(2));
    // By a revert to an older snapshot, in the end.
    let (machine, mut store) = other_machine();
    create(&mut store, 1);
    store.revert_begin(SnapTag(0)).unwrap().unwrap();
    while matches!(store.revert_step(64).unwrap(), Ok(Reverting::More)) {}
    store.revert_start().unwrap().unwrap();
    while matches!(store.revert_step(64).unwrap(), Ok(Reverting::More)) {}
    drop(store);
    assert_eq!(doubtful(&open_in(&machine, &boot(2)).unwrap().0), NONE);
}

#[test]
fn the_end_of_the_origin_is_looked_at() {
    let machine = machine();
    let mut store = open(&machine);
    create(&mut store, 0);
    store.close().unwrap();
    put(&machine, 1023 * 4096, &[1; 4096]);
    let text = refusal(&machine, &Surroundings::default());
    assert!(text.contains("bytes 3145728 to 4194303 are not"), "{text}");
}

/// Without a fingerprint, after a crash: chunks that were not written since the newest snapshot.
#[test]
fn a_write_after_a_crash_is_told_where_nobody_wrote_since_the_snapshot() {
    let machine = machine();
    let mut store = open(&machine);
    create(&mut store, 0);
    write(&mut store, &machine, 0, 1);
    drop(store);
    put(&machine, 0, &[2; 4096]);
    assert_eq!(
        doubtful(&open(&machine)),
        NONE,
        "that may have been the target"
    );
    put(&machine, 4096, &[2; 4096]);
    let text = refusal(&machine, &Surroundings::default());
    assert!(text.contains("bytes 4096 to 8191 are not"), "{text}");
    let (mut store, _) = open_in(&machine, &accepting()).unwrap();
    assert_eq!(doubtful(&store), [0]);
    create(&mut store, 1);
    drop(store);
    assert_eq!(doubtful(&open(&machine)), [0]);
}

/// Guards of a snapshot that is gone say nothing: writes since then left no exception for it.
#[test]
fn guards_end_with_their_snapshot() {
    let machine = machine();
    let mut store = open(&machine);
    create(&mut store, 0);
    create(&mut store, 1);
    store.delete(SnapTag(1)).unwrap().unwrap();
    write(&mut store, &machine, 1, 1);
    drop(store);
    assert_eq!(doubtful(&open(&machine)), NONE);
}

/// After a crash and a boot the fstab mounted the raw disk before the server was there.
#[test]
fn a_mount_in_a_boot_without_the_server_is_told() {
    let boot = |id: u8, up: i64, now: i64| Surroundings {
        boot: [id; 16],
        up_since: Some(up),
        now,
        ..Surroundings::default()
    };
    let machine = machine();
    put(&machine, 0, &ext(NOON + 10, 7));
    let (mut store, _) = open_in(&machine, &boot(1, NOON, NOON + 20)).unwrap();
    create(&mut store, 0);
    write(&mut store, &machine, 0, 1);
    drop(store);
    // Written in the same boot, which may have been the target.
    put(&machine, 0, &ext(NOON + 100, 7));
    drop(open_in(&machine, &boot(1, NOON, NOON + 200)).unwrap());
    // The next boot: what was written before it is no news, nor what the clock cannot have shown yet.
    for odd in [NOON + 300, NOON + 1000] {
        put(&machine, 0, &ext(odd, 7));
        let before = machine.moment();
        drop(
            open_in(
                &before.cut(Survival::All, &mut Rng::new(1)),
                &boot(2, NOON + 400, NOON + 500),
            )
            .unwrap(),
        );
    }
    // Nor what was mounted in the boot before and written until the power went, by a clock that ran ahead.
    let mut written = ext(NOON + 300, 7);
    written[1024 + 0x30..1024 + 0x34].copy_from_slice(&(NOON as u32 + 450).to_le_bytes());
    put(&machine, 0, &written);
    let before = machine.moment();
    drop(
        open_in(
            &before.cut(Survival::All, &mut Rng::new(1)),
            &boot(2, NOON + 400, NOON + 500),
        )
        .unwrap(),
    );
    put(&machine, 0, &ext(NOON + 450, 7));
    let text = refusal(&machine, &boot(2, NOON + 400, NOON + 500));
    assert!(
        text.contains("after the machine came up and before"),
        "{text}"
    );
    // A clock that does not go on while the machine is down says nothing.
    let lost = Surroundings {
        up_since: None,
        ..boot(2, 0, NOON + 500)
    };
    drop(open_in(&machine, &lost).unwrap());
}

/// Restarted with the origin mounted, as a package upgrade does: what is written meanwhile goes through the
/// target and needs no server where a chunk is unique.
#[test]
fn an_origin_in_use_is_not_judged() {
    let machine = machine();
    let mut store = open(&machine);
    create(&mut store, 0);
    write(&mut store, &machine, 0, 1);
    write(&mut store, &machine, 1, 1);
    store.close_with(OriginUse::InUse, NOON).unwrap();
    put(&machine, 0, &[3; 8192]);
    let store = open(&machine);
    assert_eq!(doubtful(&store), NONE);
    // A server that ended before it served anybody knows no more than the one before.
    store.close_with(OriginUse::Untouched, NOON).unwrap();
    put(&machine, 0, &[4; 8192]);
    open(&machine).close_with(OriginUse::Unused, NOON).unwrap();
    open(&machine)
        .close_with(OriginUse::Untouched, NOON)
        .unwrap();
    put(&machine, 0, &[5; 8192]);
    refusal(&machine, &Surroundings::default());
}

/// Without a snapshot there is nothing to lose.
#[test]
fn without_snapshots_the_origin_may_be_anything() {
    let machine = machine();
    open(&machine).close().unwrap();
    put(&machine, 0, &[3; 8192]);
    let (mut store, opened) = open_in(&machine, &Surroundings::default()).unwrap();
    assert!(opened.foreign.is_some());
    create(&mut store, 0);
    assert_eq!(doubtful(&store), NONE);
    store.close().unwrap();
    drop(open(&machine));
}

/// lvextend and lvreduce while the server was down.
#[test]
fn another_length_is_no_foreign_write() {
    for chunks in [2048, 1023, 700, 10] {
        let machine = machine();
        let mut store = open(&machine);
        create(&mut store, 0);
        store.close().unwrap();
        machine.set_len(ORIGIN, chunks * 4096);
        let store = open(&machine);
        assert_eq!(doubtful(&store), NONE, "{chunks}");
        store.close().unwrap();
        assert_eq!(doubtful(&open(&machine)), NONE);
    }
}

#[test]
fn a_resize_is_no_foreign_write() {
    let machine = machine();
    let mut store = open(&machine);
    create(&mut store, 0);
    let request = ResizeRequest {
        origin: Some(900 * 4096),
        ..ResizeRequest::default()
    };
    store.resize_begin(&request).unwrap().unwrap();
    while store.resize_step().unwrap().unwrap().is_none() {}
    machine.set_len(ORIGIN, 900 * 4096);
    create(&mut store, 1);
    store.close().unwrap();
    assert_eq!(doubtful(&open(&machine)), NONE);
}

/// A power cut at every moment of an opening that accepts: before and after, it is told or it is recorded.
#[test]
fn doubt_survives_every_cut_of_the_opening_that_accepts_it() {
    for clean in [true, false] {
        let machine = machine();
        let mut store = open(&machine);
        create(&mut store, 0);
        match clean {
            true => store.close().unwrap(),
            false => drop(store),
        }
        put(&machine, 4096, &[9; 4096]);
        let mut moment = machine.moment();
        machine.record();
        drop(open_in(&machine, &accepting()).unwrap());
        let events = machine.recorded();
        assert!(events.len() > 2);
        let mut rng = Rng::new(7);
        for event in std::iter::once(None).chain(events.iter().map(Some)) {
            event.into_iter().for_each(|event| moment.advance(event));
            for survival in [Survival::None, Survival::All] {
                let wreck = moment.cut(survival, &mut rng);
                match open_in(&wreck, &Surroundings::default()) {
                    Err(StoreError::Foreign { .. }) => {}
                    Err(other) => panic!("{other}"),
                    Ok((store, _)) => assert_eq!(doubtful(&store), [0]),
                }
            }
        }
    }
}

/// What was still in the disk's cache at an orderly end was in the fingerprint, and a power cut after it would
/// have been told as a foreign write.
#[test]
fn a_power_cut_after_an_orderly_end_is_no_foreign_write() {
    let machine = machine();
    let mut store = open(&machine);
    create(&mut store, 0);
    store
        .commit(&[Op::OriginWrite(Chunk(0)), Op::OriginWrite(Chunk(1023))])
        .unwrap();
    put_in_cache(&machine, 0, &[7; 4096]);
    put_in_cache(&machine, 1023 * 4096, &[7; 4096]);
    store.close().unwrap();
    let cut = machine.moment().cut(Survival::None, &mut Rng::new(1));
    assert_eq!(doubtful(&open(&cut)), NONE);
}

/// Nor must what was accepted be told again because a power cut took it back.
#[test]
fn a_power_cut_after_an_origin_was_accepted_is_no_foreign_write() {
    let machine = machine();
    let mut store = open(&machine);
    create(&mut store, 0);
    drop(store);
    put_in_cache(&machine, 4096, &[9; 4096]);
    drop(open_in(&machine, &accepting()).unwrap());
    let cut = machine.moment().cut(Survival::None, &mut Rng::new(1));
    let (store, opened) = SHAPE.open(&cut).unwrap();
    assert_eq!(opened.foreign, None);
    assert_eq!(doubtful(&store), [0]);
}

/// The kernel reports a failed flush once and the next one as done: a snapshot after it would be guarded by what
/// was lost, and the next start would tell of a foreign write.
#[test]
fn after_a_failed_flush_of_the_origin_nothing_is_noted_of_it() {
    let machine = machine();
    let faults = Faults::default();
    let devices = Devices {
        origin: Box::new(FaultyDevice::new(machine.device(ORIGIN), faults.clone())),
        ..SHAPE.devices(&machine)
    };
    let (mut store, _) = Store::open(devices, &options()).unwrap();
    create(&mut store, 0);
    faults.fail(Call::Flush, 0);
    for tag in [1, 2] {
        let failed = store.create(SnapTag(tag), NOON).unwrap_err();
        assert!(matches!(failed, StoreError::FlushOrigin { .. }), "{failed}");
    }
    assert_eq!(faults.met(), 1);
    assert_eq!(store.snapshots().len(), 1);
    store.close().unwrap();
    put(&machine, 1023 * 4096, &[7; 4096]);
    assert_eq!(doubtful(&open(&machine)), NONE, "it has no fingerprint");
    assert_eq!(open(&machine).snapshots().len(), 1);
}
