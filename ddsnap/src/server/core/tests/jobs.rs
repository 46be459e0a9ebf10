// SPDX-License-Identifier: GPL-2.0-only
//! Jobs that go on in steps between requests: resize, revert, scrub.

use super::*;
use crate::store::{BadChunk, Fault, ResizeError, RevertError, Reverting, Scrubbed, Sizes};
use crate::units::StoreChunk;

fn background(core: &mut Core<Fake>, seconds: u64) -> Output {
    let mut out = Output::default();
    core.background(at(seconds), &mut out);
    out
}

const RESIZE: Request = Request::Resize {
    origin: Some(4096),
    store: None,
    meta: None,
};

#[test]
fn a_resize_goes_on_in_steps_between_requests() {
    let fake = Fake::with_snapshots(&[1]);
    let mut core = attached(&fake);
    let sizes = Sizes {
        origin: 4096,
        store: 7,
        meta: 7,
    };
    fake.0.borrow_mut().resize_steps = [Ok(None), Ok(None), Ok(Some(sizes))].into();
    assert_eq!(command(&mut core, RESIZE), Output::default());
    assert!(core.wants_background());
    assert_eq!(background(&mut core, 0), Output::default());
    let mut out = Output::default();
    core.command(at(0), ClientId(2), RESIZE, &mut out);
    assert_eq!(out.clients[0].0, ClientId(2));
    assert!(
        matches!(out.clients[0].1[0], Reply::Error { errno, .. } if errno == Errno::EBUSY as i32)
    );
    // Requests are served meanwhile, and the client hears that it is under way.
    assert_eq!(send(&mut core, &[write(1, 5)]).channel, [may_write(1)]);
    let mut out = Output::default();
    core.tick(at(1), &mut out);
    assert_eq!(told(&out), &Reply::Progress { done: 1, total: 2 });
    assert_eq!(background(&mut core, 1), Output::default());
    assert_eq!(
        told(&background(&mut core, 1)),
        &Reply::Resized {
            origin: 4096,
            store: 7,
            meta: 7,
            refused: String::new()
        }
    );
}

#[test]
fn a_refused_resize_says_why_and_how_large_things_are() {
    let fake = Fake::default();
    let mut core = attached(&fake);
    let refused = ResizeError::ChunksInUse {
        count: 3,
        least: 4096,
    };
    fake.0.borrow_mut().resize_steps = [Err(refused)].into();
    command(&mut core, RESIZE);
    match told(&background(&mut core, 0)) {
        Reply::Resized {
            origin, refused, ..
        } => {
            assert_eq!(*origin, ORIGIN_SECTORS * 512);
            assert!(refused.starts_with("3 chunks"), "{refused}");
        }
        other => panic!("{other:?}"),
    }
    let two = Request::Resize {
        origin: None,
        store: Some(1),
        meta: Some(2),
    };
    assert_eq!(errno_of(&command(&mut core, two)), Errno::EINVAL as i32);
}

#[test]
fn a_store_that_fails_ends_a_resize() {
    let fake = Fake::default();
    let mut core = attached(&fake);
    command(&mut core, RESIZE);
    fake.fail(true);
    send(&mut core, &[write(1, 1)]);
    assert!(core.wants_background(), "the client still waits");
    assert_eq!(errno_of(&background(&mut core, 0)), Errno::EIO as i32);
    assert!(!core.wants_background());
}

/// Of origin and its device one may have been resized when the server was restarted: the device must not
/// fail for that. A new device has to have the right length.
#[test]
fn a_device_of_the_origin_keeps_its_length_over_a_restart() {
    let fake = Fake::default();
    let mut core = Core::new(fake.clone());
    let mut out = Output::default();
    core.attached(at(0), true, &mut out);
    let short = |returning| {
        ask(
            1,
            Ask::Identify {
                device: 1,
                snapshot: None,
                sectors: ORIGIN_SECTORS - 8,
                returning,
            },
        )
    };
    assert_eq!(
        send(&mut core, &[short(true)]).channel,
        [reply(
            1,
            Answer::Identify {
                status: 0,
                sectors: 0
            }
        )]
    );
    assert_eq!(
        send(&mut core, &[short(false)]).channel,
        [reply(
            1,
            Answer::Identify {
                status: Errno::EINVAL as i32,
                sectors: ORIGIN_SECTORS
            }
        )]
    );
}

const REVERT: Request = Request::Revert(SnapTag(1));

/// Steps of a revert: `checks` of the first phase, then `writes` of the second.
fn revert_steps(fake: &Fake, checks: usize, writes: usize) {
    let mut steps = vec![Ok(Reverting::More); checks];
    steps.push(Ok(Reverting::Checked));
    steps.extend(vec![Ok(Reverting::More); writes]);
    steps.push(Ok(Reverting::Done { skipped: 0 }));
    fake.0.borrow_mut().revert_steps = steps.into();
}

/// Goes on until the first barrier of a revert has begun; gives its number.
fn until_barrier(core: &mut Core<Fake>) -> u64 {
    for _ in 0..10 {
        assert!(core.wants_background());
        let out = background(core, 0);
        if let [
            channel::Reply {
                id,
                answer: Answer::BarrierBegin,
            },
        ] = out.channel[..]
        {
            return id;
        }
    }
    panic!("no barrier");
}

/// Each step has a barrier of its own, in which no origin write is answered, and which leaves the unique
/// chunks alone; devices are not identified before the end.
#[test]
fn a_revert_writes_inside_barriers_and_keeps_devices_waiting() {
    let fake = Fake::with_snapshots(&[1, 2]);
    let mut core = attached(&fake);
    revert_steps(&fake, 1, 1);
    assert_eq!(command(&mut core, REVERT), Output::default());
    let barrier = until_barrier(&mut core);
    assert_eq!(
        fake.take_calls(),
        ["revert 1", "revert step", "revert step", "revert start"]
    );
    assert!(!core.jobs_want_steps(), "the barrier is waited for");
    match told(&command(&mut core, Request::Status)) {
        Reply::Status(status) => assert_eq!(status.reverting, Some(SnapTag(1))),
        other => panic!("{other:?}"),
    }
    let waiting = [
        write(10, 5),
        identify(11, 1, Some(2), ORIGIN_SECTORS),
        identify(12, 2, None, ORIGIN_SECTORS),
    ];
    assert_eq!(send(&mut core, &waiting), Output::default());
    let out = send(&mut core, &[ask(barrier, Ask::BarrierReached)]);
    assert_eq!(
        out.channel,
        [
            reply(barrier, Answer::BarrierEnd { created: true }),
            may_write(10)
        ]
    );
    assert_eq!(fake.take_calls()[0], "revert step");
    assert_eq!(
        errno_of(&command(&mut core, Request::Create(SnapTag(3)))),
        Errno::EBUSY as i32
    );
    let barrier = until_barrier(&mut core);
    let out = send(&mut core, &[ask(barrier, Ask::BarrierReached)]);
    assert_eq!(told(&out), &Reply::Reverted { skipped: 0 });
    let good = Answer::Identify {
        status: 0,
        sectors: 0,
    };
    assert_eq!(
        out.channel,
        [
            reply(barrier, Answer::BarrierEnd { created: true }),
            reply(11, good),
            reply(12, good)
        ]
    );
    assert_eq!(fake.0.borrow().in_use, [SnapTag(2)]);
}

#[test]
fn a_revert_is_refused_while_there_is_a_device() {
    let fake = Fake::with_snapshots(&[1, 2, 3]);
    let mut core = attached(&fake);
    let devices = [
        identify(1, 1, Some(3), ORIGIN_SECTORS),
        identify(2, 2, Some(2), ORIGIN_SECTORS),
        identify(3, 3, None, ORIGIN_SECTORS),
    ];
    send(&mut core, &devices);
    let refused = |core: &mut Core<Fake>, why: &str| match told(&command(core, REVERT)) {
        Reply::Error { errno, reason } => {
            assert_eq!((*errno, &reason[..]), (Errno::EBUSY as i32, why));
        }
        other => panic!("{other:?}"),
    };
    let origin = "the device of the origin exists; unmount and remove it first";
    refused(&mut core, origin);
    send(&mut core, &[ask(3, Ask::Gone { device: 3 })]);
    let snapshots = "devices of the snapshots 2, 3 exist; remove them first";
    refused(&mut core, snapshots);
    // One that comes up while the snapshot is checked ends it before anything is written.
    let gone = [1, 2].map(|device| ask(3 + u64::from(device), Ask::Gone { device }));
    send(&mut core, &gone);
    for snapshot in [Some(2), None] {
        revert_steps(&fake, 1, 0);
        assert_eq!(command(&mut core, REVERT), Output::default());
        background(&mut core, 0);
        send(&mut core, &[identify(9, 9, snapshot, ORIGIN_SECTORS)]);
        fake.take_calls();
        assert_eq!(errno_of(&background(&mut core, 0)), Errno::EBUSY as i32);
        assert_eq!(fake.take_calls(), ["revert step", "revert cancel"]);
        assert!(!core.jobs_want_steps());
        send(&mut core, &[ask(10, Ask::Gone { device: 9 })]);
    }
}

#[test]
fn a_revert_found_at_the_start_goes_on_before_devices_are_identified() {
    let fake = Fake::with_snapshots(&[1]);
    fake.0.borrow_mut().reverting = Some(SnapTag(1));
    fake.0.borrow_mut().revert_steps = [Ok(Reverting::Done { skipped: 0 })].into();
    let mut core = Core::new(fake.clone());
    let mut out = Output::default();
    core.attached(at(0), true, &mut out);
    let origin = identify(1, 1, None, ORIGIN_SECTORS);
    assert_eq!(send(&mut core, &[origin]), Output::default());
    core.greeted(at(0), &mut out);
    assert_eq!(out, Output::default());
    let barrier = until_barrier(&mut core);
    let out = send(&mut core, &[ask(barrier, Ask::BarrierReached)]);
    let good = Answer::Identify {
        status: 0,
        sectors: 0,
    };
    assert_eq!(
        out.channel,
        [
            reply(barrier, Answer::BarrierEnd { created: true }),
            reply(1, good)
        ]
    );
    assert_eq!(out.clients, []);
}

#[test]
fn a_revert_survives_its_client_and_the_channel() {
    let fake = Fake::with_snapshots(&[1]);
    let mut core = attached(&fake);
    revert_steps(&fake, 0, 0);
    command(&mut core, REVERT);
    until_barrier(&mut core);
    core.client_gone(CLIENT);
    core.lost();
    assert!(
        !core.jobs_want_steps(),
        "nothing is done while devices are unknown"
    );
    let mut out = Output::default();
    core.attached(at(0), false, &mut out);
    let barrier = until_barrier(&mut core);
    // Who asks for the same waits for its end.
    assert_eq!(command(&mut core, REVERT), Output::default());
    let mut out = Output::default();
    let other = Request::Revert(SnapTag(2));
    core.command(at(0), ClientId(2), other, &mut out);
    assert!(
        matches!(out.clients[0].1[0], Reply::Error { errno, .. } if errno == Errno::EBUSY as i32)
    );
    let mut out = Output::default();
    core.tick(at(1), &mut out);
    assert_eq!(told(&out), &Reply::Progress { done: 3, total: 4 });
    let out = send(&mut core, &[ask(barrier, Ask::BarrierReached)]);
    assert_eq!(told(&out), &Reply::Reverted { skipped: 0 });
}

/// What was not begun is not done.
#[test]
fn a_revert_that_is_still_checked_ends_with_its_client() {
    let fake = Fake::with_snapshots(&[1]);
    let mut core = attached(&fake);
    revert_steps(&fake, 5, 0);
    command(&mut core, REVERT);
    background(&mut core, 0);
    core.client_gone(CLIENT);
    assert!(!core.jobs_want_steps());
    assert_eq!(fake.take_calls().last().unwrap(), "revert cancel");
}

#[test]
fn a_revert_that_is_hindered_says_so_and_is_tried_again() {
    let fake = Fake::with_snapshots(&[1]);
    let mut core = Core::new(fake.clone());
    fake.0.borrow_mut().revert_steps = [
        Ok(Reverting::Checked),
        Err(RevertError::StoreFull),
        Ok(Reverting::Done { skipped: 2 }),
    ]
    .into();
    command(&mut core, REVERT);
    background(&mut core, 0);
    assert_eq!(errno_of(&background(&mut core, 0)), Errno::ENOSPC as i32);
    assert!(!core.jobs_want_steps());
    assert_eq!(core.next_deadline(), Some(Duration::from_secs(1)));
    assert_eq!(command(&mut core, REVERT), Output::default());
    let mut out = Output::default();
    core.tick(at(1), &mut out);
    assert_eq!(
        told(&background(&mut core, 1)),
        &Reply::Reverted { skipped: 2 }
    );
}

#[test]
fn a_scrub_keeps_its_rate_and_does_not_run_ahead_of_its_client() {
    let fake = Fake::with_snapshots(&[1]);
    let mut core = attached(&fake);
    let bad = BadChunk {
        place: StoreChunk(7),
        chunk: Chunk(3),
        fault: Fault::Unreadable,
        snapshots: vec![SnapTag(1)],
    };
    let step = |bytes, bad: &[BadChunk]| Scrubbed {
        bytes,
        bad: bad.to_vec(),
    };
    fake.0.borrow_mut().scrub_steps = [step(4096, &[]), step(0, &[bad]), step(4096, &[])].into();
    assert_eq!(command(&mut core, Request::Scrub(1024)), Output::default());
    let mut out = Output::default();
    core.command(at(0), ClientId(2), Request::Scrub(0), &mut out);
    assert!(
        matches!(out.clients[0].1[0], Reply::Error { errno, .. } if errno == Errno::EBUSY as i32)
    );
    assert_eq!(background(&mut core, 0), Output::default());
    assert!(
        !core.jobs_want_steps(),
        "4096 bytes are the share of four seconds"
    );
    let mut out = Output::default();
    core.tick(at(3), &mut out);
    assert!(matches!(told(&out), Reply::Progress { .. }));
    assert!(!core.jobs_want_steps());
    core.tick(at(4), &mut out);
    let out = background(&mut core, 4);
    match told(&out) {
        Reply::BadChunks(bad) => assert_eq!(
            bad[0].to_string(),
            "store chunk 7, chunk 3 of snapshot 1: cannot be read"
        ),
        other => panic!("{other:?}"),
    }
    assert!(!core.jobs_want_steps(), "the client has not taken it");
    core.client_took(CLIENT);
    assert_eq!(
        told(&background(&mut core, 4)),
        &Reply::Scrubbed {
            bytes: 8192,
            bad: 1
        }
    );
    assert!(!core.jobs_want_steps());
}

#[test]
fn a_scrub_ends_with_its_client() {
    let fake = Fake::with_snapshots(&[1]);
    let mut core = attached(&fake);
    command(&mut core, Request::Scrub(0));
    assert!(core.jobs_want_steps());
    core.client_gone(CLIENT);
    assert!(!core.jobs_want_steps());
}
