// SPDX-License-Identifier: GPL-2.0-only
//! Requests that are told to wait while background steps make room.

use super::*;

fn step(core: &mut Core<Fake>, seconds: u64) -> Output {
    let mut out = Output::default();
    assert!(core.wants_background());
    core.background(at(seconds), &mut out);
    out
}

fn tick(core: &mut Core<Fake>, seconds: u64) -> Output {
    let mut out = Output::default();
    core.tick(at(seconds), &mut out);
    out
}

/// A full store that makes room.
fn full() -> (Fake, Core<Fake>) {
    let fake = Fake::with_snapshots(&[4]);
    let core = attached(&fake);
    {
        let mut inside = fake.0.borrow_mut();
        inside.room = Some(0);
        inside.making_room = true;
    }
    (fake, core)
}

fn failed(id: u64) -> channel::Reply {
    let status = Errno::EIO as i32;
    reply(id, Answer::OriginWrite { status })
}

#[test]
fn a_write_waits_for_as_many_steps_as_it_takes() {
    let (fake, mut core) = full();
    assert_eq!(send(&mut core, &[write(1, 5)]).channel, []);
    // Longer than anything else waits: the steps get on.
    for seconds in (0..300).step_by(10) {
        assert_eq!(step(&mut core, seconds).channel, []);
        assert_eq!(tick(&mut core, seconds + 5).channel, []);
        // Others are answered.
        let read = send(&mut core, &[read(seconds + 10, 4, 7)]);
        let origin = Answer::SnapshotRead(Place::Origin);
        assert_eq!(read.channel, [reply(seconds + 10, origin)]);
    }
    {
        let mut inside = fake.0.borrow_mut();
        inside.making_room = false;
        inside.room = Some(1);
    }
    assert_eq!(step(&mut core, 300).channel, [may_write(1)]);
}

/// A step that failed was tried again by the next write and by none else: a full store without writes but
/// those that wait would have waited for good. And with a pause of up to a minute, a write that waited for a
/// checkpoint failed because a leaf that the sweep needs could not be read.
#[test]
fn steps_that_fail_are_tried_each_second_while_a_write_waits_and_it_fails_in_the_end() {
    let (fake, mut core) = full();
    fake.0.borrow_mut().background_fails = true;
    assert_eq!(send(&mut core, &[write(1, 5)]).channel, []);
    let mut tried = Vec::new();
    let mut answered = None;
    for seconds in 0..40 {
        if core.wants_background() {
            tried.push(seconds);
            assert_eq!(step(&mut core, seconds).channel, []);
            assert!(!core.wants_background(), "it would fail again at once");
        }
        // A write does not make it try at once.
        if seconds == 20 {
            assert_eq!(send(&mut core, &[write(2, 6)]).channel, []);
            assert!(!core.wants_background());
        }
        assert!(core.next_deadline().is_some());
        let out = tick(&mut core, seconds + 1);
        if !out.channel.is_empty() {
            assert_eq!(out.channel, [failed(1), failed(2)]);
            assert_eq!(answered, None);
            answered = Some(seconds + 1);
        }
    }
    let waited: Vec<_> = (0..31).collect();
    assert_eq!(tried, waited);
    assert_eq!(answered, Some(30));
    // The disk is well again.
    fake.0.borrow_mut().background_fails = false;
    tick(&mut core, 100);
    step(&mut core, 100);
    assert!(core.wants_background());
}

#[test]
fn a_snapshot_is_created_when_there_is_room_for_it() {
    let (fake, mut core) = full();
    fake.0.borrow_mut().no_table_room = true;
    command(&mut core, Request::Create(SnapTag(5)));
    let reached = ask(2, Ask::BarrierReached);
    let barrier = Asked { id: 1, ..reached };
    let out = send(&mut core, &[barrier]);
    // The barrier does not last until then.
    let end = Answer::BarrierEnd { created: false };
    assert_eq!((out.channel, out.clients), (vec![reply(1, end)], vec![]));
    assert_eq!(step(&mut core, 1), Output::default());
    {
        let mut inside = fake.0.borrow_mut();
        inside.making_room = false;
        inside.no_table_room = false;
    }
    assert_eq!(step(&mut core, 2).channel, [reply(2, Answer::BarrierBegin)]);
    let out = send(&mut core, &[reached]);
    assert_eq!(told(&out), &Reply::Created);
}

/// Steps that had failed were tried again after up to a minute while a bookmark waited for them, which is given up
/// after half of that.
#[test]
fn steps_that_fail_are_tried_each_second_while_a_bookmark_is_to_be_created() {
    for request in [
        Request::Create(SnapTag(5)),
        Request::CreateBookmark(SnapTag(5)),
    ] {
        let (fake, mut core) = full();
        fake.0.borrow_mut().no_table_room = true;
        fake.0.borrow_mut().background_fails = true;
        command(&mut core, request);
        let reached = ask(2, Ask::BarrierReached);
        send(&mut core, &[Asked { id: 1, ..reached }]);
        for seconds in 0..10 {
            step(&mut core, seconds);
            tick(&mut core, seconds + 1);
        }
    }
}
