// SPDX-License-Identifier: GPL-2.0-only
//! Writes about several chunks of the origin, with one answer.

use super::*;
use crate::server::core::writes::MOST_CHUNKS;
use crate::server::fake::ORIGIN_CHUNKS;

fn step(core: &mut Core<Fake>, seconds: u64) -> Output {
    let mut out = Output::default();
    core.background(at(seconds), &mut out);
    out
}

fn fails(id: u64, errno: Errno) -> channel::Reply {
    let status = errno as i32;
    reply(id, Answer::OriginWrite { status })
}

/// How many chunks each commit was about.
fn commits(fake: &Fake) -> Vec<usize> {
    let calls = fake.take_calls().into_iter();
    let commits = calls.filter(|call| call.starts_with("commit"));
    commits.map(|call| call.matches("Chunk(").count()).collect()
}

#[test]
fn a_run_is_one_group_and_one_answer() {
    let fake = Fake::with_snapshots(&[7]);
    let mut core = attached(&fake);
    let out = send(&mut core, &[write_run(1, 5, 3), read(2, 7, 6), write(3, 9)]);
    let origin = Answer::SnapshotRead(Place::Origin);
    assert_eq!(out.channel, [reply(2, origin), may_write(1), may_write(3)]);
    assert_eq!(
        fake.take_calls(),
        [
            "locate 7 6",
            "commit [OriginWrite(Chunk(5)), OriginWrite(Chunk(6)), OriginWrite(Chunk(7)), \
             OriginWrite(Chunk(9))]"
        ]
    );
    // Each of its chunks has been copied out.
    for chunk in 5..8 {
        let out = send(&mut core, &[read(4, 7, chunk)]);
        let copied = matches!(out.channel[0].answer, Answer::SnapshotRead(Place::Store(_)));
        assert!(copied, "{chunk}: {out:?}");
    }
}

#[test]
fn a_chunk_that_cannot_be_read_fails_the_runs_that_have_it_and_no_others() {
    let fake = Fake::with_snapshots(&[7]);
    fake.0.borrow_mut().bad_chunk = Some(Chunk(6));
    let mut core = attached(&fake);
    let group = [
        write_run(1, 4, 3),
        write_run(2, 7, 3),
        write(3, 5),
        write(4, 6),
    ];
    let eio = Errno::EIO;
    let answers = [fails(1, eio), may_write(2), may_write(3), fails(4, eio)];
    assert_eq!(send(&mut core, &group).channel, answers);
    // It has latched nothing: a sector may be readable again.
    fake.0.borrow_mut().bad_chunk = None;
    assert_eq!(
        send(&mut core, &[write_run(5, 4, 3)]).channel,
        [may_write(5)]
    );
}

#[test]
fn a_run_that_reaches_beyond_the_end_fails() {
    let fake = Fake::with_snapshots(&[7]);
    let mut core = attached(&fake);
    let last = ORIGIN_CHUNKS - 1;
    let group = [
        write_run(1, last - 3, 4),
        write_run(2, last, 2),
        write_run(3, u64::MAX - 3, 4),
    ];
    let answers = [may_write(1), fails(2, Errno::EIO), fails(3, Errno::EIO)];
    assert_eq!(send(&mut core, &group).channel, answers);
}

/// A run needs not all of its room at once: what was copied out stays, or it would never come to an end in a
/// store that frees chunk after chunk.
#[test]
fn a_run_gets_on_as_devices_of_squashed_snapshots_stop() {
    let fake = Fake::with_snapshots(&[4, 5, 6]);
    let mut core = attached(&fake);
    let devices = [
        identify(1, 50, Some(4), ORIGIN_SECTORS),
        identify(2, 51, Some(5), ORIGIN_SECTORS),
    ];
    send(&mut core, &devices);
    fake.0.borrow_mut().room = Some(2);
    fake.0.borrow_mut().room_of_squashed = 1;
    let stop = |device| [reply(0, Answer::DeviceStop { device })];
    let stopped = |device| [ask(0, Ask::DeviceStopped { device })];
    let out = send(&mut core, &[write_run(10, 20, 4)]);
    assert_eq!(out.channel, stop(50));
    assert_eq!(send(&mut core, &stopped(50)).channel, stop(51));
    assert_eq!(send(&mut core, &stopped(51)).channel, [may_write(10)]);
    // Each chunk was copied out once.
    assert_eq!(fake.0.borrow().room, Some(0));
    assert_eq!(
        send(&mut core, &[write_run(11, 20, 4)]).channel,
        [may_write(11)]
    );
}

#[test]
fn a_run_waits_for_background_steps_with_what_it_still_needs() {
    let fake = Fake::with_snapshots(&[4]);
    let mut core = attached(&fake);
    fake.0.borrow_mut().room = Some(2);
    fake.0.borrow_mut().making_room = true;
    assert_eq!(send(&mut core, &[write_run(1, 10, 5)]).channel, []);
    assert_eq!(step(&mut core, 1).channel, []);
    fake.0.borrow_mut().room = Some(3);
    fake.0.borrow_mut().making_room = false;
    assert_eq!(step(&mut core, 2).channel, [may_write(1)]);
    assert_eq!(fake.0.borrow().room, Some(0));
}

#[test]
fn a_run_that_finds_no_room_in_time_fails_as_a_whole() {
    let fake = Fake::with_snapshots(&[4, 5]);
    let mut core = attached(&fake);
    send(&mut core, &[identify(1, 50, Some(4), ORIGIN_SECTORS)]);
    fake.0.borrow_mut().room = Some(1);
    let stop = reply(0, Answer::DeviceStop { device: 50 });
    assert_eq!(send(&mut core, &[write_run(10, 5, 3)]).channel, [stop]);
    let seconds = ROOM_DEADLINE.as_secs();
    let mut out = Output::default();
    core.tick(at(seconds - 1), &mut out);
    assert_eq!(out, Output::default());
    core.tick(at(seconds), &mut out);
    assert_eq!(out.channel, [fails(10, Errno::ENOSPC)]);
    assert_eq!(core.next_deadline(), None);
    // One without any hope fails at once, also if another of its chunks could wait.
    let out = send(&mut core, &[write_run(11, ORIGIN_CHUNKS - 1, 2)]);
    assert_eq!(out.channel, [fails(11, Errno::EIO)]);
}

/// Of 256 requests each may be about 256 chunks.
#[test]
fn what_is_handed_to_the_engine_at_a_time_is_bounded_in_chunks() {
    let fake = Fake::with_snapshots(&[7]);
    let mut core = attached(&fake);
    let group: Vec<_> = (0..100).map(|id| write_run(id, 0, 100)).collect();
    let answers: Vec<_> = (0..100).map(may_write).collect();
    assert_eq!(send(&mut core, &group).channel, answers);
    let most = MOST_CHUNKS as usize / 100 * 100;
    assert_eq!(commits(&fake), [most, most, 10_000 - 2 * most]);
}

#[test]
fn a_run_is_held_by_a_barrier() {
    let fake = Fake::with_snapshots(&[1]);
    let mut core = attached(&fake);
    command(&mut core, Request::Create(SnapTag(2)));
    assert_eq!(send(&mut core, &[write_run(10, 5, 4)]).channel, []);
    fake.take_calls();
    let out = send(&mut core, &[ask(1, Ask::BarrierReached)]);
    let end = reply(1, Answer::BarrierEnd { created: true });
    assert_eq!(out.channel, [end, may_write(10)]);
    assert_eq!(commits(&fake), [4]);
}
