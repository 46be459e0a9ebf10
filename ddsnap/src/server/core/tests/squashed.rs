// SPDX-License-Identifier: GPL-2.0-only
//! A full store: devices of squashed snapshots are stopped, and writes wait for that.

use super::*;

const NO_SPACE: i32 = Errno::ENOSPC as i32;
const ACCEPTED: Answer = Answer::Identify {
    status: 0,
    sectors: 0,
};

fn stop(device: u32) -> channel::Reply {
    reply(0, Answer::DeviceStop { device })
}

fn stopped(device: u32) -> Asked {
    ask(0, Ask::DeviceStopped { device })
}

fn fails(id: u64, status: i32) -> channel::Reply {
    reply(id, Answer::OriginWrite { status })
}

fn returning(id: u64, device: u32, tag: u32) -> Asked {
    ask(
        id,
        Ask::Identify {
            device,
            snapshot: Some(SnapTag(tag)),
            sectors: ORIGIN_SECTORS,
            returning: true,
        },
    )
}

/// A full store whose snapshots 4 and 5 are shown by the devices 50 and 51. Squashing one gives room
/// for so many copies.
fn full(room_of_squashed: u64) -> (Fake, Core<Fake>) {
    let fake = Fake::with_snapshots(&[4, 5]);
    let mut core = attached(&fake);
    let devices = [
        identify(1, 50, Some(4), ORIGIN_SECTORS),
        identify(2, 51, Some(5), ORIGIN_SECTORS),
    ];
    send(&mut core, &devices);
    {
        let mut inside = fake.0.borrow_mut();
        inside.room = Some(0);
        inside.room_of_squashed = room_of_squashed;
    }
    (fake, core)
}

fn tick(core: &mut Core<Fake>, seconds: u64) -> Output {
    let mut out = Output::default();
    core.tick(at(seconds), &mut out);
    out
}

#[test]
fn a_write_waits_until_the_squashed_snapshots_device_has_stopped() {
    let (fake, mut core) = full(2);
    let out = send(&mut core, &[write(10, 5), write(11, 6)]);
    assert_eq!(out.channel, [stop(50)], "no write is answered");
    // Told once, however much is asked meanwhile; the squashed snapshot is not read any more.
    let out = send(&mut core, &[read(12, 4, 5), read(13, 5, 5), write(14, 5)]);
    let eio = Place::Fails(Errno::EIO as i32);
    assert_eq!(
        out.channel,
        [
            reply(12, Answer::SnapshotRead(eio)),
            reply(13, Answer::SnapshotRead(Place::Origin)),
        ]
    );
    fake.take_calls();
    let out = send(&mut core, &[stopped(50)]);
    assert_eq!(out.channel, [may_write(10), may_write(11), may_write(14)]);
    assert_eq!(
        fake.take_calls(),
        [
            "quiet 4",
            "commit [OriginWrite(Chunk(5)), OriginWrite(Chunk(6)), OriginWrite(Chunk(5))]"
        ]
    );
    assert_eq!(core.next_deadline(), None);

    // The device is still there, and no other may come up.
    assert_eq!(core.devices_of(SnapTag(4)), 1);
    let out = command(&mut core, Request::Delete(SnapTag(4)));
    assert_eq!(errno_of(&out), Errno::EBUSY as i32);
    let out = send(&mut core, &[identify(20, 60, Some(4), ORIGIN_SECTORS)]);
    let refused = Answer::Identify {
        status: Errno::EIO as i32,
        sectors: 0,
    };
    assert_eq!(out.channel, [reply(20, refused)]);
}

#[test]
fn snapshot_writes_wait_too() {
    let (fake, mut core) = full(1);
    let out = send(
        &mut core,
        &[ask(10, Ask::SnapshotWrite(SnapTag(5), Chunk(3)))],
    );
    assert_eq!(out.channel, [stop(50)]);
    let out = send(&mut core, &[stopped(50)]);
    assert!(
        matches!(
            out.channel[..],
            [channel::Reply {
                id: 10,
                answer: Answer::SnapshotWrite(Place::Store(_))
            }]
        ),
        "{out:?}"
    );
    assert_eq!(fake.0.borrow().room, Some(0));
}

#[test]
fn a_device_that_does_not_stop_delays_a_write_for_a_bounded_time() {
    let (_fake, mut core) = full(1);
    send(&mut core, &[write(10, 5)]);
    assert_eq!(core.next_deadline(), Some(ROOM_DEADLINE));
    let seconds = ROOM_DEADLINE.as_secs();
    assert_eq!(tick(&mut core, seconds - 1), Output::default());
    assert_eq!(tick(&mut core, seconds).channel, [fails(10, NO_SPACE)]);
    assert_eq!(core.next_deadline(), None);
    // It stops in the end: then there is room.
    assert_eq!(send(&mut core, &[stopped(50)]), Output::default());
    assert_eq!(send(&mut core, &[write(11, 5)]).channel, [may_write(11)]);
}

#[test]
fn a_snapshot_that_is_never_given_up_fails_the_write_at_once() {
    let (fake, mut core) = full(9);
    for info in &mut fake.0.borrow_mut().snapshots {
        info.priority = i8::MAX;
    }
    let out = send(&mut core, &[write(10, 5)]);
    assert_eq!(out.channel, [fails(10, NO_SPACE)]);
    assert_eq!(core.next_deadline(), None);
}

#[test]
fn one_snapshot_after_the_other_is_squashed_and_then_nothing_is_left() {
    let (fake, mut core) = full(0);
    fake.0.borrow_mut().snapshots[0].priority = 9;
    let out = send(&mut core, &[write(10, 5)]);
    assert_eq!(out.channel, [stop(51)], "the lower priority goes first");
    let out = send(&mut core, &[stopped(51)]);
    assert_eq!(out.channel, [stop(50)]);
    // With no live snapshot nothing needs copying.
    let out = send(&mut core, &[stopped(50)]);
    assert_eq!(out.channel, [may_write(10)]);
}

#[test]
fn all_devices_of_a_snapshot_must_be_quiet_and_gone_is_quiet() {
    let (fake, mut core) = full(1);
    send(
        &mut core,
        &[
            identify(3, 52, Some(4), ORIGIN_SECTORS),
            identify(4, 53, Some(4), ORIGIN_SECTORS),
        ],
    );
    let out = send(&mut core, &[write(10, 5)]);
    assert_eq!(out.channel, [stop(50), stop(52), stop(53)]);
    let out = send(&mut core, &[stopped(52), stopped(52)]);
    assert_eq!(out, Output::default());
    let out = send(&mut core, &[ask(5, Ask::Gone { device: 53 })]);
    assert_eq!(out.channel, [reply(5, Answer::Gone)]);
    assert_eq!(fake.draining(), [SnapTag(4)]);
    let out = send(&mut core, &[ask(6, Ask::Gone { device: 50 })]);
    assert_eq!(out.channel, [reply(6, Answer::Gone), may_write(10)]);
    assert_eq!(core.devices_of(SnapTag(4)), 1);
}

/// I/O that the old server sent on its way may still be under way when the new one has read the store.
#[test]
fn a_new_server_stops_what_returns_before_chunks_are_freed() {
    let (fake, mut core) = full(1);
    send(&mut core, &[write(10, 5)]);
    let mut core = Core::new(fake.reopened());
    let mut out = Output::default();
    core.attached(at(0), true, &mut out);
    fake.take_calls();
    let out = send(
        &mut core,
        &[returning(1, 50, 4), returning(2, 51, 5), write(3, 5)],
    );
    assert_eq!(
        out.channel,
        [reply(1, ACCEPTED), stop(50), reply(2, ACCEPTED)]
    );
    let mut out = Output::default();
    core.greeted(at(0), &mut out);
    assert_eq!(out, Output::default());
    assert_eq!(fake.draining(), [SnapTag(4)]);
    let out = send(&mut core, &[stopped(50)]);
    assert_eq!(out.channel, [may_write(3)]);
    assert_eq!(core.devices_of(SnapTag(4)), 1);
}

#[test]
fn squashed_snapshots_without_devices_are_quiet_when_all_devices_are_known() {
    let (fake, mut core) = full(1);
    send(&mut core, &[write(10, 5)]);
    let mut core = Core::new(fake.reopened());
    core.attached(at(0), true, &mut Output::default());
    let out = send(&mut core, &[returning(2, 51, 5), write(3, 5)]);
    assert_eq!(out.channel, [reply(2, ACCEPTED)]);
    assert_eq!(fake.draining(), [SnapTag(4)], "another may follow");
    let mut out = Output::default();
    core.greeted(at(0), &mut out);
    assert_eq!(out.channel, [may_write(3)]);

    // Without the module there are no devices.
    let mut core = Core::new(fake.reopened());
    assert_eq!(fake.draining(), [SnapTag(4)]);
    core.absent(at(0), &mut Output::default());
    assert!(fake.draining().is_empty());
}

#[test]
fn a_lost_channel_begins_the_stopping_again() {
    let (fake, mut core) = full(1);
    send(&mut core, &[write(10, 5)]);
    core.lost();
    assert_eq!(core.next_deadline(), None, "the kernel asks again");
    core.attached(at(1), true, &mut Output::default());
    let out = send(
        &mut core,
        &[returning(1, 50, 4), returning(2, 51, 5), write(10, 5)],
    );
    assert_eq!(
        out.channel,
        [reply(1, ACCEPTED), stop(50), reply(2, ACCEPTED)]
    );
    core.greeted(at(1), &mut Output::default());
    assert_eq!(fake.draining(), [SnapTag(4)]);
    let out = send(&mut core, &[stopped(50)]);
    assert_eq!(out.channel, [may_write(10)]);
}

#[test]
fn room_that_comes_in_a_barrier_is_used_after_it() {
    let (fake, mut core) = full(1);
    send(&mut core, &[write(10, 5)]);
    let begun = command(&mut core, Request::Create(SnapTag(6)));
    assert_eq!(begun.channel, [reply(1, Answer::BarrierBegin)]);
    fake.take_calls();
    let out = send(&mut core, &[stopped(50)]);
    assert_eq!(out, Output::default(), "no origin write is answered");
    let out = send(&mut core, &[ask(1, Ask::BarrierReached)]);
    assert_eq!(
        out.channel,
        [
            reply(1, Answer::BarrierEnd { created: true }),
            may_write(10)
        ]
    );
    // Committed after the snapshot exists: copied for it.
    assert_eq!(
        fake.take_calls(),
        ["quiet 4", "create 6", "commit [OriginWrite(Chunk(5))]"]
    );
}

#[test]
fn deleting_a_snapshot_makes_room_for_those_that_wait() {
    let (fake, mut core) = full(0);
    send(&mut core, &[write(10, 5)]);
    send(&mut core, &[ask(3, Ask::Gone { device: 51 })]);
    fake.0.borrow_mut().room = Some(1);
    let out = command(&mut core, Request::Delete(SnapTag(5)));
    assert_eq!(told(&out), &Reply::Deleted);
    assert_eq!(out.channel, [may_write(10)]);
}

#[test]
fn a_store_that_fails_fails_what_waits_for_room() {
    let (fake, mut core) = full(1);
    send(&mut core, &[write(10, 5)]);
    fake.fail(true);
    let out = send(&mut core, &[read(11, 5, 1)]);
    let eio = Errno::EIO as i32;
    assert_eq!(
        out.channel,
        [
            reply(11, Answer::SnapshotRead(Place::Fails(eio))),
            fails(10, eio)
        ]
    );
}

/// A list of changes needs the snapshot as a device does, but has no I/O to its chunks.
#[test]
fn a_squashed_snapshot_without_a_device_is_quiet_at_once() {
    let (fake, mut core) = full(1);
    core.now_shown(SnapTag(4));
    send(&mut core, &[ask(3, Ask::Gone { device: 50 })]);
    fake.take_calls();
    let out = send(&mut core, &[write(10, 5)]);
    assert_eq!(out.channel, [may_write(10)]);
    assert_eq!(
        fake.take_calls(),
        [
            "commit [OriginWrite(Chunk(5))]",
            "quiet 4",
            "commit [OriginWrite(Chunk(5))]"
        ]
    );
    assert_eq!(core.devices_of(SnapTag(4)), 1);
}
