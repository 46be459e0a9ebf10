// SPDX-License-Identifier: GPL-2.0-only
use ddsnap::units::{ChunkShift, Sectors};

use super::super::message::Wishes;
use super::super::standing::Partial;
use super::*;

fn id(n: u128) -> Uuid {
    Uuid::from_u128(n)
}

fn held(n: u128, data: bool) -> Held {
    Held {
        id: id(n),
        number: n as u32,
        taken: 1_800_000_000,
        length: Sectors(100),
        data,
    }
}

fn hello(role: Role, held: &[Held]) -> Hello {
    let (volume, nonce) = match role {
        Role::Master => (id(1000), [1; 16]),
        Role::Replica => (id(2000), [2; 16]),
    };
    Hello {
        nonce,
        features: 0,
        wishes: Wishes::default(),
        standing: Standing {
            volume,
            lineage: Some(id(7777)),
            epoch: Epoch {
                number: 1,
                owner: id(1000),
                since: 1_800_000_000,
            },
            role,
            chunk: ChunkShift::new(12).unwrap(),
            length: Sectors(100),
            held: held.to_vec(),
            hold: None,
            old_hold: None,
            origin: held.last().map(|held| held.id),
            partial: None,
            written: false,
        },
    }
}

fn sides(up: &[Held], down: &[Held]) -> (Hello, Hello) {
    (hello(Role::Master, up), hello(Role::Replica, down))
}

fn copy(up: &Hello, down: &Hello) -> Begin {
    match decide(up, down) {
        Ok(Plan::Copy(begin)) => {
            assert_eq!(check(&begin, up, down), Ok(()));
            begin
        }
        other => panic!("{other:?}"),
    }
}

fn partial(snapshot: u128, base: Option<u128>, position: u64) -> Option<Partial> {
    Some(Partial {
        snapshot: id(snapshot),
        base: base.map(id),
        position,
        plain: false,
    })
}

/// The newest goes, from the newest that both have: a backlog is skipped.
#[test]
fn an_increment_from_the_newest_common_to_the_newest() {
    let all: Vec<_> = (1..=9).map(|n| held(n, true)).collect();
    let (up, down) = sides(&all, &[held(2, true), held(5, true), held(77, true)]);
    let begin = copy(&up, &down);
    assert_eq!(
        (begin.snapshot.id, begin.base, begin.position),
        (id(9), Some(id(5)), 0)
    );
    assert!(!begin.plain);
    assert!(must_restore(&begin, &down.standing), "77 is newer");
}

/// After a failover the old master has the newest snapshot, and another content in its origin.
#[test]
fn who_has_the_newest_and_another_origin_goes_back_to_it() {
    let (up, down) = sides(&[held(2, true)], &[held(2, true), held(78, true)]);
    let begin = copy(&up, &down);
    assert_eq!((begin.snapshot.id, begin.base), (id(2), Some(id(2))));
    assert!(must_restore(&begin, &down.standing));
}

/// A hold that became a bookmark still makes an increment, of whole chunks.
#[test]
fn a_bookmark_is_a_base_for_whole_chunks() {
    let (up, down) = sides(&[held(2, false), held(4, true)], &[held(2, true)]);
    let begin = copy(&up, &down);
    assert_eq!((begin.base, begin.plain), (Some(id(2)), true));
    assert!(!must_restore(&begin, &down.standing));
    // A bookmark on the receiving side has no data to start from.
    let (up, down) = sides(&[held(2, true), held(4, true)], &[held(2, false)]);
    assert_eq!(decide(&up, &down).unwrap_err().code(), 5);
}

#[test]
fn nothing_is_sent_to_who_has_it() {
    let (up, down) = sides(&[held(2, true)], &[held(2, true)]);
    assert_eq!(decide(&up, &down), Ok(Plan::Current(id(2))));
    let (up, down) = sides(&[held(2, false)], &[held(2, true)]);
    assert_eq!(decide(&up, &down), Err(Refusal::NothingToSend));
}

/// Interrupted copies must not begin again, and must not go on with what is gone.
#[test]
fn a_copy_is_resumed_as_long_as_it_can_be_finished() {
    let (up, mut down) = sides(
        &[held(2, true), held(4, true), held(6, true)],
        &[held(2, true)],
    );
    down.standing.partial = partial(4, Some(2), 50);
    let begin = copy(&up, &down);
    assert_eq!((begin.snapshot.id, begin.position), (id(4), 50));
    assert!(!must_restore(&begin, &down.standing));

    let (up, _) = sides(&[held(2, true), held(6, true)], &[]);
    let begin = copy(&up, &down);
    assert_eq!(
        (begin.snapshot.id, begin.base, begin.position),
        (id(6), Some(id(2)), 0)
    );
    // The origin has parts of snapshot 4.
    assert!(must_restore(&begin, &down.standing));
}

/// A full copy is never a surprise, and never starts over because a position got lost.
#[test]
fn a_full_copy_needs_an_empty_target_or_the_word() {
    let (mut up, mut down) = sides(&[held(2, true)], &[held(8, true)]);
    let refusal = decide(&up, &down).unwrap_err();
    assert_eq!(refusal.code(), 5);
    let text = refusal.to_string();
    assert!(
        text.contains("--full") && text.contains("snapshot 8 of 2027-"),
        "{text}"
    );
    up.wishes.full = true;
    assert_eq!(copy(&up, &down).base, None);

    up.wishes.full = false;
    down.standing.held.clear();
    down.standing.lineage = None;
    assert_eq!(copy(&up, &down).base, None);

    down.standing.lineage = up.standing.lineage;
    down.standing.partial = partial(2, None, 30);
    assert_eq!(copy(&up, &down).position, 30);
    // What was under way is gone: another full copy, still without a word.
    down.standing.partial = partial(1, None, 30);
    assert_eq!(copy(&up, &down).position, 0);
}

/// Split brain: the old master's stream would overwrite the new one's data.
#[test]
fn a_superseded_master_is_refused_and_told_so() {
    let (up, mut down) = sides(&[held(2, true), held(4, true)], &[held(2, true)]);
    down.standing.epoch = Epoch {
        number: 2,
        owner: id(2000),
        since: 1_800_000_000,
    };
    for role in [Role::Master, Role::Replica] {
        down.standing.role = role;
        let text = decide(&up, &down).unwrap_err().to_string();
        assert!(
            text.contains("superseded") && text.contains("2027-01-15T08:00:00Z"),
            "{text}"
        );
    }
    // Two that failed over without knowing of each other: one order for all.
    let mut other = down.standing.epoch;
    other.owner = id(3000);
    assert!(other > down.standing.epoch);
}

#[test]
fn masters_strangers_and_short_targets_are_refused() {
    let (up, mut down) = sides(&[held(2, true), held(4, true)], &[held(2, true)]);
    down.standing.role = Role::Master;
    assert_eq!(decide(&up, &down).unwrap_err().code(), 3);
    down.standing.role = Role::Replica;
    down.standing.length = Sectors(99);
    assert_eq!(decide(&up, &down).unwrap_err().code(), 8);
    down.standing.length = Sectors(100);
    down.standing.lineage = Some(id(1));
    // Numbers of epochs are not compared between lineages.
    down.standing.epoch.number = 50;
    assert_eq!(decide(&up, &down).unwrap_err().code(), 4);
    down.wishes.full = true;
    assert_eq!(copy(&up, &down).base, None);
}

/// What somebody wrote to a replica must not vanish without a word.
#[test]
fn a_replica_that_was_written_to_is_refused_unless_forced() {
    let (up, mut down) = sides(&[held(2, true), held(4, true)], &[held(2, true)]);
    down.standing.written = true;
    assert_eq!(decide(&up, &down).unwrap_err().code(), 7);
    down.wishes.force_base = true;
    let begin = copy(&up, &down);
    assert!(must_restore(&begin, &down.standing));
    // Nor does what was under way count.
    down.standing.partial = partial(4, Some(2), 9);
    assert_eq!(copy(&up, &down).position, 0);
    let (up, mut down) = sides(&[held(2, true)], &[held(2, true)]);
    down.standing.written = true;
    down.wishes.force_base = true;
    assert_eq!(copy(&up, &down).base, Some(id(2)));
}

/// The receiver does not rely on the sender's honesty.
#[test]
fn the_receiver_checks_what_is_offered() {
    let (up, down) = sides(&[held(2, true), held(4, true)], &[held(2, true)]);
    let good = copy(&up, &down);
    let code = |begin: Begin| check(&begin, &up, &down).unwrap_err().code();
    assert_eq!(
        code(Begin {
            nonce: [9; 16],
            ..good
        }),
        9
    );
    assert_eq!(
        code(Begin {
            base: Some(id(4)),
            ..good
        }),
        6
    );
    assert_eq!(code(Begin { base: None, ..good }), 5);
    assert_eq!(
        code(Begin {
            position: 5,
            ..good
        }),
        9
    );
    let mut doubtful = down.clone();
    doubtful.standing.partial = partial(4, Some(2), 0).map(|p| Partial { plain: true, ..p });
    assert!(copy(&up, &doubtful).plain);
    assert_eq!(check(&good, &up, &doubtful).unwrap_err().code(), 9);
}
