// SPDX-License-Identifier: GPL-2.0-only
//! Counting for status: who waits, who gets which count, and that nobody else waits with them.

use std::time::Duration;

use super::*;
use crate::protocol::channel::{Ask, Request as Asked};
use crate::protocol::control::Request;
use crate::server::fake::Fake;
use crate::units::{Chunk, SnapTag};

const ANN: ClientId = ClientId(1);
const BOB: ClientId = ClientId(2);

fn at(millis: u64) -> Now {
    Now {
        monotonic: Duration::from_millis(millis),
        unix: 0,
    }
}

/// A core without background work of its own.
fn quiet(fake: &Fake) -> Core<Fake> {
    let mut core = Core::new(fake.clone());
    core.background(at(0), &mut Output::default());
    assert!(!core.wants_background());
    fake.take_calls();
    core
}

fn ask(core: &mut Core<Fake>, client: ClientId) {
    let mut out = Output::default();
    core.command(at(0), client, Request::Usage, &mut out);
    assert_eq!(out, Output::default(), "the answer follows");
    assert!(core.wants_background());
}

fn step(core: &mut Core<Fake>, millis: u64) -> Vec<(ClientId, Vec<Reply>)> {
    let mut out = Output::default();
    core.background(at(millis), &mut out);
    out.clients
}

fn is_table(replies: &[Reply], rows_wanted: usize) -> bool {
    match replies {
        [
            Reply::Usage { totals, .. },
            Reply::Rows { last: true, rows },
        ] => {
            assert_eq!(rows.len(), rows_wanted);
            let own = |row: &Row| row.shared_with == [(0, 1)];
            rows.iter().all(own) && totals == &[(0, rows_wanted as u64)]
        }
        _ => false,
    }
}

#[test]
fn a_count_goes_on_between_requests_and_is_answered_at_its_end() {
    let fake = Fake::with_snapshots(&[4, 6]);
    let mut core = quiet(&fake);
    fake.0.borrow_mut().count_steps = 2;
    ask(&mut core, ANN);
    assert_eq!(step(&mut core, 1), []);
    let mut out = Output::default();
    let write = Asked {
        id: 9,
        ask: Ask::OriginWrite(Chunk(1).into()),
    };
    core.requests(at(2), &[write], &mut out);
    assert_eq!(out.channel.len(), 1, "a write need not wait for a count");
    assert_eq!(step(&mut core, 2), [], "what the write left to do");
    assert_eq!(fake.0.borrow().background_steps, 2);
    assert_eq!(step(&mut core, 3), []);
    let answered = step(&mut core, 4);
    assert_eq!(answered.len(), 1);
    assert_eq!(answered[0].0, ANN);
    assert!(is_table(&answered[0].1, 2), "{answered:?}");
    assert!(!core.wants_background());
}

/// What a client did before it asked must be in what it sees: a count under way may have passed it.
#[test]
fn who_asks_during_a_count_gets_the_next_one() {
    let fake = Fake::with_snapshots(&[4]);
    let mut core = quiet(&fake);
    fake.0.borrow_mut().count_steps = 1;
    ask(&mut core, ANN);
    assert_eq!(step(&mut core, 1), []);
    ask(&mut core, BOB);
    ask(&mut core, ClientId(3));
    let first = step(&mut core, 2);
    assert_eq!(first.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [ANN]);
    let second = step(&mut core, 3);
    let clients: Vec<_> = second.iter().map(|(id, _)| *id).collect();
    assert_eq!(clients, [BOB, ClientId(3)]);
    assert_eq!(fake.take_calls(), ["count"; 3]);
}

#[test]
fn who_waits_long_hears_every_second_that_it_goes_on() {
    let fake = Fake::with_snapshots(&[4]);
    let mut core = quiet(&fake);
    fake.0.borrow_mut().count_steps = 9;
    ask(&mut core, ANN);
    assert_eq!(step(&mut core, 0), []);
    assert_eq!(step(&mut core, 999), []);
    let word = (ANN, vec![Reply::Progress { done: 0, total: 7 }]);
    assert_eq!(step(&mut core, 1000), [word]);
    assert_eq!(step(&mut core, 1001), []);
}

#[test]
fn upkeep_and_counting_take_turns() {
    let fake = Fake::with_snapshots(&[4]);
    let mut core = Core::new(fake.clone());
    fake.take_calls();
    let steps = fake.0.borrow().background_steps;
    fake.0.borrow_mut().count_steps = 100;
    fake.0.borrow_mut().has_background = true;
    ask(&mut core, ANN);
    for millis in 0..6 {
        step(&mut core, millis);
    }
    assert_eq!(fake.0.borrow().background_steps - steps, 3);
    assert_eq!(fake.take_calls(), ["count"; 3]);
}

#[test]
fn nothing_is_counted_for_a_client_that_has_gone() {
    let fake = Fake::with_snapshots(&[4]);
    let mut core = quiet(&fake);
    fake.0.borrow_mut().count_steps = 5;
    ask(&mut core, ANN);
    step(&mut core, 1);
    core.client_gone(ANN);
    assert!(!core.wants_background());
    ask(&mut core, BOB);
    core.client_gone(BOB);
    assert!(!core.wants_background());
}

#[test]
fn a_count_that_fails_says_so_and_a_broken_store_shows_what_it_is() {
    let fake = Fake::with_snapshots(&[4]);
    let mut core = quiet(&fake);
    ask(&mut core, ANN);
    fake.fail(false);
    match &step(&mut core, 1)[0].1[..] {
        [Reply::Error { errno, reason }] => {
            assert_eq!(*errno, Errno::EIO as i32);
            assert!(reason.contains("disk on fire"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    ask(&mut core, ANN);
    fake.fail(true);
    match &step(&mut core, 1)[0].1[..] {
        [Reply::Usage { status, totals }, Reply::Rows { rows, .. }] => {
            assert_eq!((status.fault.as_str(), totals.len()), ("disk on fire", 0));
            assert_eq!(rows.len(), 1);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_numbers_alone_are_answered_at_once() {
    let fake = Fake::with_snapshots(&[4]);
    let mut core = quiet(&fake);
    let mut out = Output::default();
    core.command(at(0), ANN, Request::Status, &mut out);
    match &out.clients[0].1[..] {
        [Reply::Status(status)] => assert_eq!(status.free_chunks, 40),
        other => panic!("{other:?}"),
    }
    assert!(fake.take_calls().is_empty());
}

#[test]
fn a_level_of_fullness_is_entered_and_left_once() {
    let fake = Fake::with_snapshots(&[4]);
    let mut core = quiet(&fake);
    let mut level_at = |free_chunks| {
        fake.0.borrow_mut().free_chunks = Some(free_chunks);
        core.watch_space();
        core.level
    };
    // Of 50 chunks: low below 5, left at 6.
    for (free_chunks, level) in [
        (5, Level::Plenty),
        (4, Level::Low),
        (5, Level::Low),
        (0, Level::Reserve),
        (1, Level::Low),
        (6, Level::Plenty),
    ] {
        assert_eq!(level_at(free_chunks), level, "{free_chunks}");
    }
    // A write that was refused for want of room counts, whatever the numbers say.
    core.refusing = true;
    core.watch_space();
    assert_eq!(core.level, Level::Reserve);
    let mut out = Output::default();
    core.command(at(0), ANN, Request::Delete(SnapTag(4)), &mut out);
    assert!(!core.status().refusing);
}
