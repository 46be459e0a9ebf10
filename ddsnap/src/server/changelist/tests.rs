// SPDX-License-Identifier: GPL-2.0-only
//! Lists over an engine that finds what it is told to.

use std::time::Duration;

use nix::errno::Errno;

use super::*;
use crate::protocol::control::Request;
use crate::server::fake::{Fake, ORIGIN_SECTORS};
use crate::units::Chunk;

const LIST: Request = Request::Changelist {
    from: Some(SnapTag(1)),
    to: SnapTag(2),
};
const ONE: ClientId = ClientId(1);
const TWO: ClientId = ClientId(2);

fn at(seconds: u64) -> Now {
    Now {
        monotonic: Duration::from_secs(seconds),
        unix: 0,
    }
}

fn command(core: &mut Core<Fake>, client: ClientId, request: Request) -> Vec<Reply> {
    let mut out = Output::default();
    core.command(at(0), client, request, &mut out);
    told(out, client)
}

fn told(out: Output, client: ClientId) -> Vec<Reply> {
    let all = out.clients.into_iter();
    all.flat_map(|(to, replies)| {
        assert_eq!(to, client);
        replies
    })
    .collect()
}

fn step(core: &mut Core<Fake>, client: ClientId, seconds: u64) -> Vec<Reply> {
    assert!(core.wants_background());
    let mut out = Output::default();
    core.background(at(seconds), &mut out);
    told(out, client)
}

fn run(first: u64) -> ChunkRun {
    ChunkRun {
        first: Chunk(first),
        chunks: 1,
    }
}

fn errno_of(replies: &[Reply]) -> i32 {
    match replies {
        [Reply::Error { errno, .. }] => *errno,
        other => panic!("{other:?}"),
    }
}

fn new_core(fake: &Fake) -> Core<Fake> {
    let mut core = Core::new(fake.clone());
    let mut out = Output::default();
    core.absent(at(0), &mut out);
    core.background(at(0), &mut out);
    assert_eq!(out, Output::default());
    assert!(!core.wants_background());
    core
}

#[test]
fn a_page_follows_when_the_last_was_taken() {
    let fake = Fake::with_snapshots(&[1, 2]);
    let full: Vec<ChunkRun> = (0..MAX_RUNS as u64).map(|n| run(2 * n)).collect();
    fake.0.borrow_mut().changes = [Ok(full.clone()), Ok(vec![]), Ok(vec![run(90_000)])].into();
    let mut core = new_core(&fake);
    let head = Reply::Changelist {
        chunk: ChunkShift::from_bytes(4096).unwrap(),
        from: Sectors(ORIGIN_SECTORS),
        to: Sectors(ORIGIN_SECTORS),
    };
    assert_eq!(command(&mut core, ONE, LIST), [head]);
    assert!(!core.wants_background(), "the head has not been taken");
    core.client_took(ONE);
    let page = Reply::Changes {
        last: false,
        runs: full,
    };
    assert_eq!(step(&mut core, ONE, 0), [page]);
    assert!(!core.wants_background(), "the page has not been taken");
    core.client_took(ONE);
    // Where nothing is found for long, the client hears that it goes on.
    assert!(matches!(
        step(&mut core, ONE, 1)[..],
        [Reply::Progress { .. }]
    ));
    let end = Reply::Changes {
        last: true,
        runs: vec![run(90_000)],
    };
    assert_eq!(step(&mut core, ONE, 1), [end]);
    assert!(!core.wants_background());
}

#[test]
fn both_snapshots_stay_until_the_end() {
    let fake = Fake::with_snapshots(&[1, 2]);
    let mut core = new_core(&fake);
    command(&mut core, ONE, LIST);
    for tag in [SnapTag(1), SnapTag(2)] {
        let refused = command(&mut core, TWO, Request::Delete(tag));
        assert_eq!(errno_of(&refused), Errno::EBUSY as i32);
    }
    assert_eq!(fake.0.borrow().in_use, [SnapTag(1), SnapTag(2)]);
    core.client_took(ONE);
    step(&mut core, ONE, 0);
    assert_eq!(fake.0.borrow().in_use, []);
    assert_eq!(
        command(&mut core, TWO, Request::Delete(SnapTag(1))),
        [Reply::Deleted]
    );
}

#[test]
fn a_client_that_goes_lets_go() {
    let fake = Fake::with_snapshots(&[1, 2]);
    let mut core = new_core(&fake);
    command(&mut core, ONE, LIST);
    core.client_took(ONE);
    core.client_gone(ONE);
    assert!(!core.wants_background());
    assert_eq!(fake.0.borrow().in_use, []);
}

#[test]
fn refusals_are_told_and_leave_nothing_behind() {
    let fake = Fake::with_snapshots(&[1]);
    let mut core = new_core(&fake);
    assert_eq!(
        errno_of(&command(&mut core, ONE, LIST)),
        Errno::ENOENT as i32
    );
    assert_eq!(fake.0.borrow().in_use, []);

    let whole = Request::Changelist {
        from: None,
        to: SnapTag(1),
    };
    fake.0.borrow_mut().changes = [Err(OpError::Squashed(SnapTag(1)))].into();
    assert!(matches!(
        command(&mut core, ONE, whole)[..],
        [Reply::Changelist {
            from: Sectors(0),
            ..
        }]
    ));
    core.client_took(ONE);
    assert_eq!(errno_of(&step(&mut core, ONE, 0)), Errno::EIO as i32);
    assert_eq!(fake.0.borrow().in_use, []);
    assert!(!core.wants_background());

    command(&mut core, ONE, whole);
    core.client_took(ONE);
    fake.fail(true);
    assert_eq!(errno_of(&step(&mut core, ONE, 0)), Errno::EIO as i32);
    assert_eq!(fake.0.borrow().in_use, []);
    assert_eq!(errno_of(&command(&mut core, ONE, whole)), Errno::EIO as i32);
}

#[test]
fn lists_take_turns() {
    let fake = Fake::with_snapshots(&[1, 2]);
    fake.0.borrow_mut().changes = vec![Ok(vec![]); 6].into();
    let mut core = new_core(&fake);
    for client in [ONE, TWO] {
        command(&mut core, client, LIST);
        core.client_took(client);
    }
    // After a second each step says so to its own client.
    for client in [ONE, TWO, ONE, TWO] {
        assert!(step(&mut core, client, 10 * client.0).len() <= 1);
    }
    assert!(matches!(
        step(&mut core, ONE, 60)[..],
        [Reply::Progress { .. }]
    ));
    assert!(matches!(
        step(&mut core, TWO, 60)[..],
        [Reply::Changes { last: true, .. }]
    ));
}
