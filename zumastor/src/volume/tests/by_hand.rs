// SPDX-License-Identifier: GPL-2.0-only
//! What `receive start` and `receive done` make of a replica.

use ddsnap::delta::listen::Told;
use ddsnap::delta::stream::{Opening, Preface};
use ddsnap::delta::{Header, Side};
use ddsnap::units::{ChunkShift, Sectors, SnapTag};

use super::replica::{arrive, begin, source};
use super::*;
use crate::refusal::{self, INCOMPLETE, WRONG_STATE};

fn opening(base: Option<u32>, tag: u32, resumed: bool) -> Opening {
    let side = |tag| Side {
        tag: SnapTag(tag),
        length: Sectors(80),
    };
    Opening {
        header: Header {
            chunk: ChunkShift::from_bytes(4096).expect("a chunk size"),
            from: base.map(side),
            to: side(tag),
        },
        preface: Preface { total: 10, resumed },
    }
}

fn told(tag: u32, whole: bool) -> Option<Told> {
    Some(Told {
        tag,
        whole,
        at: 8192,
    })
}

fn said(volume: &mut Volume, told: Option<Told>) -> String {
    volume.wanted_by_hand(told).expect("an answer").to_string()
}

fn admit(volume: &mut Volume, opening: &Opening, told: Option<Told>) -> Result<(), u8> {
    let admitted = volume.admit_by_hand(opening, told, &|| Ok(()));
    admitted.map_err(|error| refusal::code(&error))
}

/// Scripts of 2008 had no way to bring a replica up to date.
#[test]
fn a_script_sends_all_and_then_what_changed() {
    let bench = Bench::new();
    let mut volume = bench.replica(true);
    assert_eq!(said(&mut volume, None), "-1");
    admit(&mut volume, &opening(None, 6, false), None).expect("all of it");
    // In part: by the same number it goes on, and nothing else does.
    assert_eq!(said(&mut volume, told(6, false)), "-1 6 8192");
    assert_eq!(said(&mut volume, told(8, false)), "-1");
    let early = volume.finish_by_hand(told(6, false)).expect_err("not all");
    assert_eq!(refusal::code(&early), INCOMPLETE);
    assert_eq!(volume.finish_by_hand(told(6, true)).expect("there"), 6);
    assert_eq!(bench.stored(), [6, 7]);
    assert_eq!(bench.mounted(), ["v"]);
    assert_eq!(said(&mut volume, None), "6");

    admit(&mut volume, &opening(Some(6), 10, false), None).expect("what changed");
    let mut volume = bench.reload();
    volume.up(Level::Mounted, &mut |_| ()).expect("up");
    assert_eq!(said(&mut volume, told(10, false)), "6 10 8192");
    admit(&mut volume, &opening(Some(6), 10, true), told(10, false)).expect("the rest");
    // It is made a snapshot by the next start as well: `done` may have been lost.
    assert_eq!(said(&mut volume, told(10, true)), "10");
    assert_eq!(bench.stored(), [10, 11]);
    let again = volume
        .finish_by_hand(told(10, true))
        .expect_err("done already");
    assert_eq!(refusal::code(&again), WRONG_STATE);
}

/// A part of one snapshot below a part of another is no snapshot's content.
#[test]
fn what_does_not_fit_the_origin_is_refused() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    let refused = |volume: &mut Volume, opening: &Opening, told| {
        assert_eq!(admit(volume, opening, told), Err(WRONG_STATE));
    };
    refused(&mut volume, &opening(Some(4), 6, false), None);
    refused(&mut volume, &opening(None, 6, true), None);
    let mut part = opening(None, 6, false);
    part.preface.total = 3;
    refused(&mut volume, &part, None);

    admit(&mut volume, &opening(None, 6, false), None).expect("all of it");
    volume.finish_by_hand(told(6, true)).expect("there");
    admit(&mut volume, &opening(Some(6), 8, false), None).expect("what changed");
    // Another one over a part of that, and the rest of what nobody knows the beginning of.
    refused(&mut volume, &opening(Some(6), 10, false), told(8, false));
    refused(&mut volume, &opening(Some(6), 8, true), None);
    assert_eq!(said(&mut volume, None), "-1");
    // A cycle in between leaves an origin with a snapshot that the scripts' numbers do not name.
    arrive(&mut volume, &begin(1, None));
    assert_eq!(said(&mut volume, told(8, false)), "-1");
    refused(&mut volume, &opening(Some(6), 8, true), told(8, false));
    let source = volume.source().expect("a replica");
    assert!(source.by_hand.is_none() && !source.hold_by_hand);
}

/// Two snapshots of one number, on one machine and on the other, that are not the same.
#[test]
fn a_number_that_is_taken_is_not_given_again() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    arrive(&mut volume, &begin(1, None));
    let next = volume.config.snapshots.next;
    for tag in [0, 1, next + 1] {
        admit(&mut volume, &opening(None, tag, false), None).expect("all of it");
        let taken = volume.finish_by_hand(told(tag, true)).expect_err("taken");
        assert_eq!(refusal::code(&taken), WRONG_STATE);
    }
    // What fails on the way can be tried again.
    let tag = next + 8;
    admit(&mut volume, &opening(None, tag, false), None).expect("all of it");
    bench.fake.state().fail = Some(format!("create {tag}"));
    volume
        .finish_by_hand(told(tag, true))
        .expect_err("no snapshot");
    bench.fake.state().fail = None;
    assert_eq!(volume.finish_by_hand(told(tag, true)).expect("made"), tag);
    assert_eq!(volume.config.snapshots.next, tag + 2);
}

/// Each look whether somebody had written to the replica used a number up, until the upstream's were behind.
#[test]
fn a_look_at_the_origin_uses_no_number_up() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    let next = volume.config.snapshots.next;
    for _ in 0..3 {
        assert_eq!(volume.momentary_snapshot().expect("made"), next + 1);
        volume.end_momentary().expect("deleted");
    }
    assert_eq!(bench.stored(), [] as [u32; 0]);
    // One that cannot be deleted is nobody's twin.
    let left = volume.momentary_snapshot().expect("made");
    bench.fake.state().fail = Some(format!("delete {left}"));
    admit(&mut volume, &opening(None, next, false), None).expect("all of it");
    let taken = volume.finish_by_hand(told(next, true)).expect_err("taken");
    assert_eq!(refusal::code(&taken), WRONG_STATE);
    assert_eq!(arrive(&mut volume, &begin(1, None)), next + 2);
    assert_eq!(bench.stored(), [left, next + 2, next + 3]);
}

/// A comparison that began meanwhile deleted the snapshot that a look at the origin had just made, or said that it could
/// not.
#[test]
fn nobody_else_deletes_the_snapshot_of_a_look() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    let made = volume.momentary_snapshot().expect("made");
    volume.settle_snapshots().expect("looked after");
    assert_eq!(bench.stored(), [made]);
    assert_eq!(volume.warnings, [""; 0]);
    let arrived = arrive(&mut volume, &begin(1, None));
    assert_eq!(bench.stored(), [made, arrived, arrived + 1]);
    volume.end_momentary().expect("deleted");
    assert_eq!(bench.stored(), [arrived, arrived + 1]);
    // The daemon was killed meanwhile.
    let left = volume.momentary_snapshot().expect("made");
    assert!(bench.stored().contains(&left));
    let mut volume = bench.reload();
    volume.up(Level::Mounted, &mut |_| ()).expect("up");
    volume.settle_snapshots().expect("looked after");
    assert_eq!(bench.stored(), [arrived, arrived + 1]);
}

/// A master's origin was overwritten by whoever reached its port.
#[test]
fn only_a_replica_that_nobody_uses_listens() {
    let bench = Bench::new();
    let mut volume = bench.master();
    let refused = |volume: &mut Volume| {
        let error = volume.wanted_by_hand(None).expect_err("refused");
        assert_eq!(refusal::code(&error), WRONG_STATE);
        format!("{error:#}")
    };
    assert!(refused(&mut volume).contains("is no replica"));
    let made = volume.define_source(&source(false), &mut |_| ());
    made.expect("a replica");
    volume.set_stopped(&Peer::Source, true).expect("stopped");
    assert!(refused(&mut volume).contains("the source is stopped"));
}
