// SPDX-License-Identifier: GPL-2.0-only
//! The core against a fake engine: order of replies, barriers, losses, refusals.

mod jobs;
mod origin;
mod room;
mod runs;
mod squashed;

use super::*;
use crate::protocol::channel::Request as Asked;
use crate::server::fake::{Fake, ORIGIN_SECTORS};
use crate::store::SnapState;
use crate::units::ChunkRun;

const CLIENT: ClientId = ClientId(1);

fn at(seconds: u64) -> Now {
    Now {
        monotonic: Duration::from_secs(seconds),
        unix: 1000,
    }
}

fn ask(id: u64, ask: Ask) -> Asked {
    Asked { id, ask }
}

fn write(id: u64, chunk: u64) -> Asked {
    ask(id, Ask::OriginWrite(Chunk(chunk).into()))
}

fn write_run(id: u64, first: u64, chunks: u64) -> Asked {
    let first = Chunk(first);
    ask(id, Ask::OriginWrite(ChunkRun { first, chunks }))
}

fn read(id: u64, tag: u32, chunk: u64) -> Asked {
    ask(id, Ask::SnapshotRead(SnapTag(tag), Chunk(chunk)))
}

fn identify(id: u64, device: u32, snapshot: Option<u32>, sectors: u64) -> Asked {
    ask(
        id,
        Ask::Identify {
            device,
            snapshot: snapshot.map(SnapTag),
            sectors,
            returning: false,
        },
    )
}

fn reply(id: u64, answer: Answer) -> channel::Reply {
    channel::Reply { id, answer }
}

fn may_write(id: u64) -> channel::Reply {
    reply(id, Answer::OriginWrite { status: 0 })
}

/// A core whose channel is attached, with no device.
fn attached(fake: &Fake) -> Core<Fake> {
    let mut core = Core::new(fake.clone());
    let mut out = Output::default();
    core.attached(at(0), false, &mut out);
    assert_eq!(out, Output::default());
    core
}

fn send(core: &mut Core<Fake>, batch: &[Asked]) -> Output {
    let mut out = Output::default();
    core.requests(at(0), batch, &mut out);
    out
}

fn command(core: &mut Core<Fake>, request: Request) -> Output {
    let mut out = Output::default();
    core.command(at(0), CLIENT, request, &mut out);
    out
}

fn told(out: &Output) -> &Reply {
    assert_eq!(out.clients.len(), 1, "{out:?}");
    assert_eq!(out.clients[0].0, CLIENT);
    &out.clients[0].1[0]
}

fn errno_of(out: &Output) -> i32 {
    match told(out) {
        Reply::Error { errno, .. } => *errno,
        other => panic!("not an error: {other:?}"),
    }
}

/// Were the read looked up and answered the other way round, the write could overwrite the origin
/// before the read gets there, and the snapshot would show new data.
#[test]
fn a_read_from_the_origin_is_answered_before_the_write_of_its_chunk() {
    let fake = Fake::with_snapshots(&[7]);
    let mut core = attached(&fake);
    let out = send(&mut core, &[write(1, 5), read(2, 7, 5), write(3, 6)]);
    assert_eq!(
        out.channel,
        [
            reply(2, Answer::SnapshotRead(Place::Origin)),
            may_write(1),
            may_write(3)
        ]
    );
    assert_eq!(
        fake.take_calls(),
        [
            "locate 7 5",
            "commit [OriginWrite(Chunk(5)), OriginWrite(Chunk(6))]"
        ]
    );
    // A lookup after the commit sees the copy.
    let out = send(&mut core, &[read(4, 7, 5)]);
    assert_eq!(
        out.channel,
        [reply(4, Answer::SnapshotRead(Place::Store(1)))]
    );
}

/// The same as a property: random batches, creations in between. The test follows the stream of
/// replies as the kernel does: once a write of a chunk was allowed, no read of a snapshot that
/// existed at that time may be sent to the origin.
#[test]
fn no_read_goes_to_the_origin_after_its_chunk_was_released() {
    let seed = 0x00dd_54a9_u64;
    let mut state = seed;
    let mut random = move |below: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    };
    let fake = Fake::with_snapshots(&[0]);
    let mut core = attached(&fake);
    let mut snapshots = 1_u32;
    // As the kernel sees it: a snapshot exists from the end of its barrier on.
    let mut created = 1_u32;
    let mut released: Vec<(u64, u32)> = Vec::new(); // chunk, snapshots that existed
    let mut asked: HashMap<u64, Ask> = HashMap::new();
    let mut next_id = 0;
    let mut reads_from_origin = 0;
    for _ in 0..3000 {
        let mut batch = Vec::new();
        for _ in 0..random(8) {
            next_id += 1;
            let chunk = random(60);
            batch.push(match random(2) {
                0 => write_run(next_id, chunk, 1 + random(3)),
                _ => read(next_id, random(snapshots.into()) as u32, chunk),
            });
        }
        asked.extend(batch.iter().map(|request| (request.id, request.ask)));
        let mut out = send(&mut core, &batch);
        if random(50) == 0 {
            let begun = command(&mut core, Request::Create(SnapTag(snapshots)));
            let barrier = begun.channel[0].id;
            out.channel.extend(begun.channel);
            let ended = send(&mut core, &[ask(barrier, Ask::BarrierReached)]);
            assert_eq!(told(&ended), &Reply::Created);
            out.channel.extend(ended.channel);
            snapshots += 1;
        }
        for reply in out.channel {
            match (reply.answer, asked.get(&reply.id)) {
                (Answer::OriginWrite { status: 0 }, Some(Ask::OriginWrite(run))) => {
                    released.extend(run.iter().map(|chunk| (chunk.0, created)));
                }
                (Answer::SnapshotRead(Place::Origin), Some(Ask::SnapshotRead(tag, chunk))) => {
                    reads_from_origin += 1;
                    let late = released.iter().any(|&(c, n)| c == chunk.0 && tag.0 < n);
                    assert!(
                        !late,
                        "seed {seed:#x}: snapshot {tag} chunk {chunk} id {}",
                        reply.id
                    );
                }
                (Answer::BarrierEnd { created: true }, _) => created += 1,
                _ => {}
            }
        }
    }
    assert!(
        reads_from_origin > 100,
        "only {reads_from_origin} reads tried the rule"
    );
}

#[test]
fn a_snapshot_is_made_between_the_ends_of_a_barrier() {
    let fake = Fake::with_snapshots(&[1]);
    let mut core = attached(&fake);
    let out = command(&mut core, Request::Create(SnapTag(2)));
    assert_eq!(out.channel, [reply(1, Answer::BarrierBegin)]);
    assert_eq!(out.clients, []);

    // Meanwhile no origin write is answered, all else is.
    let busy = [
        write(10, 5),
        read(11, 1, 5),
        ask(12, Ask::SnapshotWrite(SnapTag(1), Chunk(3))),
    ];
    let out = send(&mut core, &busy);
    assert_eq!(
        out.channel,
        [
            reply(11, Answer::SnapshotRead(Place::Origin)),
            reply(12, Answer::SnapshotWrite(Place::Store(1))),
        ]
    );
    fake.take_calls();

    // The held write is committed after the snapshot exists, and released after the barrier's end.
    let out = send(&mut core, &[ask(1, Ask::BarrierReached), write(13, 6)]);
    assert_eq!(
        out.channel,
        [
            reply(1, Answer::BarrierEnd { created: true }),
            may_write(10),
            may_write(13)
        ]
    );
    assert_eq!(told(&out), &Reply::Created);
    assert_eq!(
        fake.take_calls(),
        [
            "create 2",
            "commit [OriginWrite(Chunk(5)), OriginWrite(Chunk(6))]"
        ]
    );
}

/// A bookmark was made without a barrier: devices went on writing to chunks that they knew to be unique, and the
/// list of what changed since lacked these.
#[test]
fn a_bookmark_is_made_as_a_snapshot_is_and_what_becomes_one_needs_no_barrier() {
    let fake = Fake::with_snapshots(&[1]);
    let mut core = attached(&fake);
    let out = command(&mut core, Request::CreateBookmark(SnapTag(2)));
    assert_eq!(out.channel, [reply(1, Answer::BarrierBegin)]);
    assert_eq!(out.clients, []);
    assert_eq!(send(&mut core, &[write(10, 5)]).channel, []);
    let out = send(&mut core, &[ask(1, Ask::BarrierReached)]);
    let ended = reply(1, Answer::BarrierEnd { created: true });
    assert_eq!(out.channel, [ended, may_write(10)]);
    assert_eq!(told(&out), &Reply::BookmarkCreated);
    let out = command(&mut core, Request::CreateBookmark(SnapTag(1)));
    assert_eq!(errno_of(&out), Errno::EEXIST as i32);

    // One that a device shows is kept as it is; one without becomes a bookmark at once.
    let identified = [identify(20, 7, Some(1), ORIGIN_SECTORS)];
    assert_eq!(send(&mut core, &identified).channel.len(), 1);
    let out = command(&mut core, Request::ToBookmark(SnapTag(1)));
    assert_eq!(errno_of(&out), Errno::EBUSY as i32);
    send(&mut core, &[ask(21, Ask::Gone { device: 7 })]);
    let out = command(&mut core, Request::ToBookmark(SnapTag(1)));
    assert_eq!(
        (told(&out), &out.channel[..]),
        (&Reply::IsBookmark, &[][..])
    );
    // And no device of it comes up any more.
    let out = send(&mut core, &[identify(22, 7, Some(1), ORIGIN_SECTORS)]);
    let status = Errno::EIO as i32;
    let refused = Answer::Identify { status, sectors: 0 };
    assert_eq!(out.channel, [reply(22, refused)]);
    let out = command(&mut core, Request::WhenFull(SnapTag(1), true));
    assert_eq!(told(&out), &Reply::WhenFull(true));
}

#[test]
fn without_the_module_there_is_no_barrier() {
    let fake = Fake::default();
    let mut core = Core::new(fake.clone());
    assert_eq!(
        told(&command(&mut core, Request::Create(SnapTag(1)))),
        &Reply::Created
    );
    assert_eq!(
        errno_of(&command(&mut core, Request::Create(SnapTag(1)))),
        Errno::EEXIST as i32
    );
}

/// A server whose node of the channel was gone made a snapshot without a barrier: it showed what was
/// written after it.
#[test]
fn a_kernel_that_cannot_be_reached_is_not_absent() {
    let fake = Fake::default();
    let mut core = Core::new(fake.clone());
    core.lost_sight();
    assert_eq!(
        command(&mut core, Request::Create(SnapTag(9))),
        Output::default()
    );
    let mut out = Output::default();
    core.tick(at(31), &mut out);
    assert_eq!(errno_of(&out), Errno::ETIMEDOUT as i32);
    assert!(fake.take_calls().is_empty());
    // Later the kernel says that it has none.
    let mut out = Output::default();
    core.absent(at(40), &mut out);
    assert_eq!(
        told(&command(&mut core, Request::Create(SnapTag(9)))),
        &Reply::Created
    );
}

/// Without it, mkfs of a new volume asked about each chunk of the device: 23 minutes for 2 TB.
#[test]
fn a_kernel_that_asks_is_told_when_no_snapshot_needs_the_origin() {
    let fake = Fake::with_snapshots(&[4]);
    fake.0.borrow_mut().tells_unique = true;
    let all_unique = reply(0, Answer::AllUnique);
    let accepted = |id| {
        reply(
            id,
            Answer::Identify {
                status: 0,
                sectors: 0,
            },
        )
    };
    let mut core = attached(&fake);
    let origin = |id| identify(id, 50, None, ORIGIN_SECTORS);
    assert_eq!(send(&mut core, &[origin(1)]).channel, [accepted(1)]);
    assert_eq!(send(&mut core, &[write(2, 5)]).channel, [may_write(2)]);
    let out = command(&mut core, Request::Delete(SnapTag(4)));
    assert_eq!(out.channel, [all_unique]);
    let out = send(&mut core, &[write(3, 5)]);
    assert_eq!(out.channel, [may_write(3), all_unique]);
    let out = send(&mut core, &[origin(4)]);
    assert_eq!(out.channel, [accepted(4), all_unique]);

    // Not while a snapshot is being made, and not when there is one.
    command(&mut core, Request::Create(SnapTag(5)));
    assert_eq!(send(&mut core, &[origin(5)]).channel, [accepted(5)]);
    let out = send(&mut core, &[write(6, 7), ask(1, Ask::BarrierReached)]);
    assert_eq!(
        out.channel,
        [reply(1, Answer::BarrierEnd { created: true }), may_write(6)]
    );

    // Nor by a store that has failed: what it holds is not known.
    let fake = Fake::default();
    fake.0.borrow_mut().tells_unique = true;
    let mut core = attached(&fake);
    core.fault = Some("a test".to_owned());
    let eio = Errno::EIO as i32;
    let out = send(&mut core, &[write(1, 5)]);
    assert_eq!(out.channel, [reply(1, Answer::OriginWrite { status: eio })]);
}

#[test]
fn a_barrier_that_is_not_reached_is_given_up() {
    let fake = Fake::default();
    let mut core = attached(&fake);
    command(&mut core, Request::Create(SnapTag(2)));
    send(&mut core, &[write(10, 5)]);
    let deadline = core.next_deadline().unwrap();
    assert_eq!(deadline, COMMAND_DEADLINE);
    let mut out = Output::default();
    core.tick(at(COMMAND_DEADLINE.as_secs() - 1), &mut out);
    assert_eq!(out, Output::default());
    core.tick(at(COMMAND_DEADLINE.as_secs()), &mut out);
    assert_eq!(
        out.channel,
        [
            reply(1, Answer::BarrierEnd { created: false }),
            may_write(10)
        ]
    );
    assert_eq!(errno_of(&out), Errno::ETIMEDOUT as i32);
    assert_eq!(fake.snapshots(), []);
    // The answer that comes all the same means nothing any more.
    let out = send(&mut core, &[ask(1, Ask::BarrierReached)]);
    assert_eq!(out, Output::default());
    assert_eq!(fake.snapshots(), []);
    assert_eq!(core.next_deadline(), None);
}

#[test]
fn a_client_that_goes_away_leaves_a_whole_snapshot_or_none() {
    let fake = Fake::default();
    let mut core = attached(&fake);
    command(&mut core, Request::Create(SnapTag(1)));
    let mut out = Output::default();
    core.command(at(0), ClientId(2), Request::Create(SnapTag(2)), &mut out);
    assert_eq!(out, Output::default(), "one barrier at a time");
    core.client_gone(CLIENT);
    core.client_gone(ClientId(2));
    let out = send(&mut core, &[ask(1, Ask::BarrierReached)]);
    // Begun: finished. Not begun: not made.
    assert_eq!(
        out.channel,
        [reply(1, Answer::BarrierEnd { created: true })]
    );
    assert_eq!(fake.take_calls(), ["create 1"]);
}

#[test]
fn two_creations_have_a_barrier_each() {
    let fake = Fake::default();
    let mut core = attached(&fake);
    command(&mut core, Request::Create(SnapTag(1)));
    let mut out = Output::default();
    core.command(at(0), ClientId(2), Request::Create(SnapTag(2)), &mut out);
    let out = send(&mut core, &[ask(1, Ask::BarrierReached), write(9, 0)]);
    assert_eq!(
        out.channel,
        [
            reply(1, Answer::BarrierEnd { created: true }),
            may_write(9),
            reply(2, Answer::BarrierBegin)
        ]
    );
    let out = send(&mut core, &[ask(2, Ask::BarrierReached)]);
    assert_eq!(out.clients, [(ClientId(2), vec![Reply::Created])]);
}

#[test]
fn the_loss_of_the_channel_in_a_barrier_starts_it_again() {
    let fake = Fake::default();
    let mut core = attached(&fake);
    command(&mut core, Request::Create(SnapTag(1)));
    send(&mut core, &[write(10, 5)]);
    core.lost();
    assert!(fake.take_calls().is_empty());
    // The kernel asks everything again of the next channel.
    let mut out = Output::default();
    core.attached(at(1), true, &mut out);
    assert_eq!(out.channel, [reply(2, Answer::BarrierBegin)]);
    let out = send(&mut core, &[ask(2, Ask::BarrierReached), write(10, 5)]);
    assert_eq!(
        out.channel,
        [
            reply(2, Answer::BarrierEnd { created: true }),
            may_write(10)
        ]
    );
    assert_eq!(told(&out), &Reply::Created);
}

#[test]
fn nothing_is_created_while_devices_may_write_unasked() {
    let fake = Fake::default();
    let mut core = attached(&fake);
    core.lost();
    let out = command(&mut core, Request::Create(SnapTag(1)));
    assert_eq!(out, Output::default());
    let mut out = Output::default();
    core.tick(at(COMMAND_DEADLINE.as_secs()), &mut out);
    assert_eq!(errno_of(&out), Errno::ETIMEDOUT as i32);
    assert!(fake.take_calls().is_empty());
}

#[test]
fn devices_count_as_use_until_they_are_gone() {
    let fake = Fake::with_snapshots(&[4]);
    let mut core = attached(&fake);
    let accepted = Answer::Identify {
        status: 0,
        sectors: 0,
    };
    let out = send(&mut core, &[identify(1, 50, Some(4), ORIGIN_SECTORS)]);
    assert_eq!(out.channel, [reply(1, accepted)]);
    assert_eq!(fake.0.borrow().in_use, [SnapTag(4)]);
    command(&mut core, Request::UseCount(SnapTag(4), 2));
    let out = command(&mut core, Request::UseCount(SnapTag(4), 0));
    assert_eq!(told(&out), &Reply::UseCount(3));
    command(&mut core, Request::UseCount(SnapTag(4), -2));
    let out = command(&mut core, Request::Delete(SnapTag(4)));
    assert_eq!(
        told(&out),
        &Reply::Error {
            errno: Errno::EBUSY as i32,
            reason: "snapshot has non-zero usecount".to_owned()
        }
    );
    let out = send(&mut core, &[ask(2, Ask::Gone { device: 50 })]);
    assert_eq!(out.channel, [reply(2, Answer::Gone)]);
    assert!(fake.0.borrow().in_use.is_empty());
    assert_eq!(
        told(&command(&mut core, Request::Delete(SnapTag(4)))),
        &Reply::Deleted
    );
}

#[test]
fn devices_that_do_not_fit_are_refused() {
    let fake = Fake::with_snapshots(&[4, 5]);
    fake.0.borrow_mut().snapshots[1].state = SnapState::Squashed;
    let mut core = attached(&fake);
    let refused = |errno: Errno, sectors| Answer::Identify {
        status: errno as i32,
        sectors,
    };
    let batch = [
        identify(1, 50, None, ORIGIN_SECTORS + 1),
        identify(2, 51, Some(4), 8),
        identify(3, 52, Some(9), ORIGIN_SECTORS),
        identify(4, 53, Some(5), ORIGIN_SECTORS),
        identify(5, 54, None, ORIGIN_SECTORS),
    ];
    let out = send(&mut core, &batch);
    assert_eq!(
        out.channel,
        [
            reply(1, refused(Errno::EINVAL, ORIGIN_SECTORS)),
            reply(2, refused(Errno::EINVAL, ORIGIN_SECTORS)),
            reply(3, refused(Errno::ENOENT, 0)),
            reply(4, refused(Errno::EIO, 0)),
            reply(
                5,
                Answer::Identify {
                    status: 0,
                    sectors: 0
                }
            ),
        ]
    );
    assert!(fake.0.borrow().in_use.is_empty());
}

/// A delete between attaching and the first IDENTIFY would take the data from under a device.
#[test]
fn after_attaching_deletion_waits_until_all_devices_are_known() {
    let fake = Fake::with_snapshots(&[4, 5]);
    let mut core = Core::new(fake.clone());
    let mut out = Output::default();
    core.attached(at(0), true, &mut out);
    assert!(core.is_greeting());
    assert_eq!(
        command(&mut core, Request::Delete(SnapTag(4))),
        Output::default()
    );
    let mut out = Output::default();
    core.command(at(0), ClientId(2), Request::Delete(SnapTag(5)), &mut out);
    send(&mut core, &[identify(1, 50, Some(4), ORIGIN_SECTORS)]);
    let mut out = Output::default();
    core.greeted(at(0), &mut out);
    assert_eq!(out.clients, [(ClientId(2), vec![Reply::Deleted])]);
    assert!(fake.snapshot(SnapTag(4)).is_some());
}

#[test]
fn a_device_that_does_not_come_back_is_forgotten() {
    let fake = Fake::with_snapshots(&[4, 5]);
    let mut core = attached(&fake);
    let batch = [
        identify(1, 50, Some(4), ORIGIN_SECTORS),
        identify(2, 51, Some(5), ORIGIN_SECTORS),
    ];
    send(&mut core, &batch);
    core.lost();
    core.attached(at(0), true, &mut Output::default());
    send(&mut core, &[identify(3, 51, Some(5), ORIGIN_SECTORS)]);
    assert_eq!(core.devices_of(SnapTag(4)), 1, "not before all are known");
    core.greeted(at(0), &mut Output::default());
    assert_eq!(core.devices_of(SnapTag(4)), 0);
    assert_eq!(core.devices_of(SnapTag(5)), 1);
    assert_eq!(fake.0.borrow().in_use, [SnapTag(5)]);
}

#[test]
fn a_store_that_failed_fails_io_and_still_tells_how_it_is() {
    let fake = Fake::with_snapshots(&[4]);
    let mut core = attached(&fake);
    fake.fail(true);
    let out = send(
        &mut core,
        &[
            write(1, 5),
            ask(2, Ask::SnapshotWrite(SnapTag(4), Chunk(1))),
        ],
    );
    let eio = Errno::EIO as i32;
    // In the group snapshot writes come first.
    assert_eq!(
        out.channel,
        [
            reply(2, Answer::SnapshotWrite(Place::Fails(eio))),
            reply(1, Answer::OriginWrite { status: eio }),
        ]
    );
    fake.take_calls();
    let out = send(&mut core, &[read(3, 4, 1), write(4, 1)]);
    assert_eq!(
        out.channel[0].answer,
        Answer::SnapshotRead(Place::Fails(eio))
    );
    assert_eq!(out.channel[1].answer, Answer::OriginWrite { status: eio });
    for request in [
        Request::Create(SnapTag(9)),
        Request::Delete(SnapTag(4)),
        Request::Priority(SnapTag(4), 1),
    ] {
        assert_eq!(errno_of(&command(&mut core, request)), eio);
    }
    assert!(
        fake.take_calls().is_empty(),
        "a latched store is asked nothing"
    );
    assert!(!core.wants_background());
    match &command(&mut core, Request::Usage).clients[0].1[..] {
        [
            Reply::Usage { status, .. },
            Reply::Rows { last: true, rows },
        ] => {
            assert_eq!(status.fault, "disk on fire");
            assert_eq!(rows.len(), 1);
        }
        other => panic!("{other:?}"),
    }
    match told(&command(&mut core, Request::List)) {
        Reply::Snapshots { snapshots, .. } => assert_eq!(snapshots.len(), 1),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_store_that_fails_in_a_barrier_opens_the_gate() {
    let fake = Fake::default();
    let mut core = attached(&fake);
    command(&mut core, Request::Create(SnapTag(1)));
    fake.fail(true);
    let out = send(&mut core, &[ask(1, Ask::BarrierReached)]);
    assert_eq!(
        out.channel,
        [reply(1, Answer::BarrierEnd { created: true })]
    );
    assert_eq!(errno_of(&out), Errno::EIO as i32);
}

#[test]
fn one_unreadable_sector_fails_only_the_write_that_needs_it() {
    let fake = Fake::with_snapshots(&[4]);
    let mut core = attached(&fake);
    fake.0.borrow_mut().bad_chunk = Some(Chunk(6));
    let out = send(&mut core, &[write(1, 5), write(2, 6), write(3, 7)]);
    let failed = reply(
        2,
        Answer::OriginWrite {
            status: Errno::EIO as i32,
        },
    );
    assert_eq!(out.channel, [may_write(1), failed, may_write(3)]);
    assert!(core.fault.is_none());
}

#[test]
fn refusals_have_the_words_that_scripts_know() {
    let fake = Fake::with_snapshots(&[4]);
    let mut core = attached(&fake);
    for (request, errno, words) in [
        (
            Request::Create(SnapTag(4)),
            Errno::EEXIST,
            "snapshot already exists",
        ),
        (
            Request::Delete(SnapTag(9)),
            Errno::ENOENT,
            "snapshot doesn't exist",
        ),
        (
            Request::State(SnapTag(9)),
            Errno::ENOENT,
            "snapshot doesn't exist",
        ),
        (
            Request::Sectors(Some(SnapTag(9))),
            Errno::ENOENT,
            "snapshot doesn't exist",
        ),
        (
            Request::UseCount(SnapTag(4), -1),
            Errno::EINVAL,
            "Usecount underflow.",
        ),
    ] {
        let out = command(&mut core, request);
        let expected = Reply::Error {
            errno: errno as i32,
            reason: words.to_owned(),
        };
        assert_eq!(told(&out), &expected, "{request:?}");
    }
    let out = command(&mut core, Request::Sectors(None));
    assert_eq!(told(&out), &Reply::Sectors(ORIGIN_SECTORS));
}

#[test]
fn a_write_beyond_the_end_fails_alone() {
    let fake = Fake::with_snapshots(&[4]);
    let mut core = attached(&fake);
    let out = send(&mut core, &[write(1, 1000), write(2, 5)]);
    let failed = reply(
        1,
        Answer::OriginWrite {
            status: Errno::EIO as i32,
        },
    );
    assert_eq!(out.channel, [failed, may_write(2)]);
}
