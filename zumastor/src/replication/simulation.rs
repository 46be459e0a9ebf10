// SPDX-License-Identifier: GPL-2.0-only
//! The real two ends over disks in memory and a pipe that cuts, delays and corrupts.
//!
//! Each seed is a history: writes, snapshots, deletions, bookmarks, power cuts that lose what was not
//! flushed, a failover with failback now and then. After every cycle whatever is complete is compared byte
//! by byte with what the sender had. At the end no more faults come, and the newest snapshot must arrive.
//!
//! `REPLICATION_SEEDS=20000 cargo nextest run -p zumastor simulation` runs more of them.

mod disk;
pub(super) mod pipe;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use disk::{Node, Shared};
use pipe::{Fault, deaf, pipe, silent};

use super::frame::{FrameReader, Kind};
use super::link::{Timing, room_of};
use super::message::{Hello, Wishes};
use super::receive::receive;
use super::send::{BATCH_TIME, Options, WINDOW_BYTES, send};
use super::sender::{IN_FLIGHT, Outcome};
use super::standing::{Role, Standing};
use super::volume::Watch;

/// Numbers that a seed makes; SplitMix64 of Steele, Lea and Flood (2014).
pub(super) struct Random(pub u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, most: u64) -> u64 {
        self.next() % most
    }

    fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

struct Quiet;

impl Watch for Quiet {
    fn progress(&self, _: u64, _: Option<u64>, _: u64) {}
    fn cancelled(&self) -> bool {
        false
    }
}

const TIMING: Timing = Timing {
    alive: Duration::from_millis(400),
    deadline: Duration::from_secs(20),
};

/// One cycle from `up` to `down`.
fn cycle(
    up: &Shared,
    down: &Shared,
    faults: [Fault; 2],
    wishes: Wishes,
    random: &mut Random,
) -> [Outcome; 2] {
    let (near, far) = pipe(faults, random.next());
    let own = up.hello(wishes, random);
    let peer = answering(down, random);
    let options = Options {
        level: random.below(4) as u8,
        // As if each piece took long, which makes the most batches of what there is.
        batch_time: match random.below(2) {
            0 => Duration::ZERO,
            _ => BATCH_TIME,
        },
        timing: TIMING,
        ..Options::default()
    };
    let (mut source, mut target) = (up.clone(), down.clone());
    thread::scope(|scope| {
        let sends = scope.spawn(move || send(&mut source, near, own, &options, &Quiet));
        let receives = scope.spawn(move || receive(&mut target, far, peer, TIMING, &Quiet));
        [sends.join().unwrap(), receives.join().unwrap()]
    })
}

/// The greeting of a node that receives.
fn answering(node: &Shared, random: &mut Random) -> impl FnOnce(Standing) -> Hello + use<> {
    let hello = node.hello(Wishes::default(), random);
    move |standing| Hello { standing, ..hello }
}

/// What happened over all seeds, so that a simulation that tests nothing is seen.
#[derive(Default)]
struct Tally {
    cycles: AtomicU64,
    done: AtomicU64,
    proven: AtomicU64,
    resumed: AtomicU64,
    restored: AtomicU64,
    bookmarks: AtomicU64,
    failed: AtomicU64,
    failbacks: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn history(seed: u64, tally: &Tally) {
    let random = &mut Random(seed);
    let chunks = 1 + random.below(40) as usize;
    let mut up = Node::shared(1, Role::Master, chunks, random);
    let mut down = Node::shared(2, Role::Replica, chunks, random);
    up.write_some(random);
    up.snapshot(random);
    let mut reigns = 1;
    for _ in 0..2 + random.below(12) {
        if random.one_in(8) && down.has_received() {
            // The old master's later changes are kept; then it follows the new one.
            down.fail_over(random);
            reigns += 1;
            if random.one_in(2) {
                let outcomes = cycle(&up, &down, [Fault::None; 2], Wishes::default(), random);
                let refused = |o: &Outcome| matches!(o, Outcome::Refused { code: 2, .. });
                assert!(outcomes.iter().all(refused), "seed {seed}: {outcomes:?}");
            }
            up.fail_back(down.reign(), random);
            std::mem::swap(&mut up, &mut down);
            count(&tally.failbacks);
        }
        for _ in 0..random.below(3) {
            up.write_some(random);
            up.snapshot(random);
        }
        if random.one_in(3) {
            up.give_up_some(random, &tally.bookmarks);
        }
        if random.one_in(6) {
            down.write_behind_its_back(random);
        }
        if random.one_in(8) {
            down.spoil_sums();
        }
        let faults = [Fault::some(random), Fault::some(random)];
        let wishes = Wishes {
            full: false,
            force_base: random.one_in(2),
        };
        let [sent, received] = cycle(&up, &down, faults, wishes, random);
        count(&tally.cycles);
        for outcome in [&sent, &received] {
            match outcome {
                Outcome::Done { proven, .. } => {
                    count(&tally.done);
                    if *proven {
                        count(&tally.proven);
                    }
                }
                Outcome::Failed(_) => count(&tally.failed),
                _ => {}
            }
        }
        if random.one_in(3) {
            up.power_cut(random);
        }
        if random.one_in(3) {
            down.power_cut(random);
        }
        down.compare_with(&up, seed);
    }
    // No more faults: what is newest arrives, in a bounded number of cycles.
    let wishes = Wishes {
        full: down.lost_all_common(&up),
        force_base: true,
    };
    let mut said = Vec::new();
    for _ in 0..6 {
        let outcomes = cycle(&up, &down, [Fault::None; 2], wishes, random);
        down.compare_with(&up, seed);
        if matches!(outcomes[0], Outcome::Current(_)) {
            let newest = up.newest();
            assert!(down.has(newest), "seed {seed}: the newest did not arrive");
            assert!(down.origin_is(newest), "seed {seed}: the origin differs");
            assert_eq!(down.reign(), up.reign(), "seed {seed}");
            assert!(down.reign().number <= reigns, "seed {seed}");
            tally
                .resumed
                .fetch_add(down.resumed() + up.resumed(), Ordering::Relaxed);
            tally
                .restored
                .fetch_add(down.restored() + up.restored(), Ordering::Relaxed);
            return;
        }
        said.push(outcomes);
    }
    panic!("seed {seed}: stuck: {said:#?}");
}

fn quiet_cycle(up: &Shared, down: &Shared, random: &mut Random) -> [Outcome; 2] {
    cycle(up, down, [Fault::None; 2], Wishes::default(), random)
}

/// A base that differs must neither be built upon nor stop replication for good.
#[test]
fn a_base_that_differs_is_not_built_upon() {
    let random = &mut Random(5);
    let mut up = Node::shared(1, Role::Master, 20, random);
    let down = Node::shared(2, Role::Replica, 20, random);
    up.write_some(random);
    up.snapshot(random);
    for outcome in quiet_cycle(&up, &down, random) {
        let done = matches!(outcome, Outcome::Done { proven: true, .. });
        assert!(done, "{outcome:?}");
    }
    down.spoil_hold(3);
    up.change(3, random);
    for outcome in quiet_cycle(&up, &down, random) {
        let Outcome::Failed(sentence) = &outcome else {
            panic!("{outcome:?}")
        };
        assert!(sentence.contains("base differs"), "{sentence}");
    }
    for outcome in quiet_cycle(&up, &down, random) {
        let done = matches!(outcome, Outcome::Done { proven: false, .. });
        assert!(done, "{outcome:?}");
    }
    // The sender had sums and the receiver none: the status called that proven ever after.
    assert_eq!((up.proven(), down.proven()), (1, 1));
    assert!(down.origin_is(up.newest()));
    // A stranger is refused by both, and nothing of the replica changes.
    up = Node::stranger(3, 20, random);
    up.write_some(random);
    up.snapshot(random);
    let before = down.hello(Wishes::default(), random).standing;
    for outcome in quiet_cycle(&up, &down, random) {
        assert!(
            matches!(outcome, Outcome::Refused { code: 4, .. }),
            "{outcome:?}"
        );
    }
    assert_eq!(down.hello(Wishes::default(), random).standing, before);
}

/// What is under way without an acknowledgement is bounded, and the receiver leaves who sends more. Chunks that
/// were left over from an extent came on top of a full batch: of data that hardly compresses a cycle failed where the
/// other side's disk was slow.
#[test]
fn no_more_is_sent_than_the_receiver_has_room_for() {
    let random = &mut Random(7);
    let up = Node::shared(1, Role::Master, 65_536, random);
    up.fill(random, |chunk| match chunk % 32 {
        0 => 0,
        _ => 496,
    });
    up.snapshot(random);
    let down = Node::shared(2, Role::Replica, 65_536, random);
    let own = up.hello(Wishes::default(), random);
    let (link, sent) = silent(down.hello(Wishes::default(), random), own.nonce);
    let options = Options {
        timing: Timing {
            alive: TIMING.deadline,
            deadline: Duration::from_secs(5),
        },
        ..Options::default()
    };
    send(&mut up.clone(), link, own, &options, &Quiet);
    let sent = sent.lock().unwrap();
    let (mut reader, mut payload) = (FrameReader::new(&sent[..]), Vec::new());
    let (mut room, mut batches) = (0, 0);
    while let Ok(kind) = reader.next(&mut payload) {
        match kind {
            Kind::Extent => room += room_of(payload.len()),
            Kind::Batch => batches += 1,
            _ => {}
        }
    }
    assert_eq!(batches, IN_FLIGHT);
    assert!(room <= WINDOW_BYTES, "{room} of {WINDOW_BYTES}");
}

/// A line that was cut when all had been sent, and before the sender had heard so, ended all proofs until somebody compared
/// everything: the sender had no sums of what had arrived.
#[test]
fn wherever_a_line_is_cut_the_next_snapshot_is_proven() {
    let mut completed = 0;
    for at in 0..700 {
        let random = &mut Random(at);
        let (up, down) = (
            Node::shared(1, Role::Master, 20, random),
            Node::shared(2, Role::Replica, 20, random),
        );
        let next = |random: &mut Random| {
            up.write_some(random);
            up.snapshot(random);
        };
        next(random);
        quiet_cycle(&up, &down, random);
        next(random);
        // The way back is cut: what says that it has arrived.
        let faults = [Fault::None, Fault::Cut(at)];
        let [sent, received] = cycle(&up, &down, faults, Wishes::default(), random);
        let is_done = |outcome: &Outcome| matches!(outcome, Outcome::Done { .. });
        completed += u32::from(is_done(&received) && !is_done(&sent));
        next(random);
        for outcome in quiet_cycle(&up, &down, random) {
            let done = matches!(outcome, Outcome::Done { proven: true, .. });
            assert!(
                done,
                "cut at {at}: {sent:?}, {received:?}, then {outcome:?}"
            );
        }
    }
    assert!(completed > 0, "no cut was where it matters");
}

/// Three megabytes by a line of 60 kB a second were one batch: for its minute nothing told how far it was, and a line
/// that was cut within it had brought nothing.
#[test]
fn a_slow_line_has_batches_too() {
    let random = &mut Random(9);
    let up = Node::shared(1, Role::Master, 8192, random);
    up.fill(random, |_| 512);
    up.snapshot(random);
    let down = Node::shared(2, Role::Replica, 8192, random);
    let own = up.hello(Wishes::default(), random);
    let (link, sent) = silent(down.hello(Wishes::default(), random), own.nonce);
    let options = Options {
        level: 0,
        rate: Some(20 << 20),
        batch_time: Duration::from_millis(40),
        timing: Timing {
            alive: TIMING.deadline,
            deadline: Duration::from_secs(2),
        },
    };
    send(&mut up.clone(), link, own, &options, &Quiet);
    let sent = sent.lock().unwrap();
    let (mut reader, mut payload) = (FrameReader::new(&sent[..]), Vec::new());
    let mut kinds = Vec::new();
    while let Ok(kind) = reader.next(&mut payload) {
        kinds.push(kind);
    }
    let batches = kinds.iter().filter(|kind| **kind == Kind::Batch).count();
    assert_eq!(batches as u64, IN_FLIGHT, "{kinds:?}");
}

/// Neither end left an other side that could not be written to and only said, again and again, that it was there.
#[test]
fn an_end_leaves_who_hears_nothing_and_only_says_that_he_is_there() {
    let random = &mut Random(6);
    let node = |role, random: &mut Random| Node::shared(1, role, 20, random);
    let timing = Timing {
        alive: Duration::from_secs(20),
        deadline: Duration::from_millis(300),
    };
    let options = Options {
        timing,
        ..Options::default()
    };
    let (mut up, mut down) = (node(Role::Master, random), node(Role::Replica, random));
    up.write_some(random);
    up.snapshot(random);
    let (own, peer) = (
        up.hello(Wishes::default(), random),
        down.hello(Wishes::default(), random),
    );
    let (near, far) = (deaf(peer), deaf(own.clone()));
    let peer = answering(&down, random);
    let (sender, ended) = mpsc::channel();
    let other = sender.clone();
    thread::spawn(move || sender.send(send(&mut up, near, own, &options, &Quiet)));
    thread::spawn(move || other.send(receive(&mut down, far, peer, timing, &Quiet)));
    for _ in 0..2 {
        let outcome = ended.recv_timeout(TIMING.deadline).expect("it ends");
        assert!(matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
    }
}

/// A replica on a slow disk, with much to look at before it could greet, was given up: no cycle ever came to its end.
#[test]
fn who_looks_for_long_before_it_greets_is_waited_for() {
    let random = &mut Random(8);
    let (up, down) = (
        Node::shared(1, Role::Master, 20, random),
        Node::shared(2, Role::Replica, 20, random),
    );
    up.write_some(random);
    up.snapshot(random);
    let timing = Timing {
        alive: Duration::from_millis(100),
        deadline: Duration::from_secs(1),
    };
    down.looks_for(timing.deadline * 2);
    let (near, mut far) = pipe([Fault::None; 2], 1);
    // Whoever is sent to has read the sender's greeting when it looks.
    far.greeted = true;
    let (own, peer) = (
        up.hello(Wishes::default(), random),
        answering(&down, random),
    );
    let options = Options {
        timing,
        ..Options::default()
    };
    let (mut source, mut target) = (up.clone(), down.clone());
    let receives = thread::spawn(move || receive(&mut target, far, peer, timing, &Quiet));
    let outcome = send(&mut source, near, own, &options, &Quiet);
    let done = matches!(outcome, Outcome::Done { proven: true, .. });
    assert!(done, "{outcome:?}, {:?}", receives.join());
    assert!(down.origin_is(up.newest()));
}

/// The daemon went on looking for a sender that had gone, and refused the next one: "'receive' runs already".
#[test]
fn nobody_looks_for_who_has_gone() {
    let random = &mut Random(10);
    let down = Node::shared(2, Role::Replica, 20, random);
    down.looks_for(TIMING.deadline * 100);
    let (near, mut far) = pipe([Fault::None; 2], 1);
    far.greeted = true;
    let (mut target, peer) = (down.clone(), answering(&down, random));
    let (sender, ended) = mpsc::channel();
    thread::spawn(move || sender.send(receive(&mut target, far, peer, TIMING, &Quiet)));
    drop(near);
    let outcome = ended.recv_timeout(TIMING.deadline).expect("it ends");
    let gone = matches!(&outcome, Outcome::Failed(why) if why.contains("closed the stream"));
    assert!(gone, "{outcome:?}");
}

/// A replica that is wrong, or a replication that no longer goes on, is found by some history.
#[test]
fn histories_end_with_equal_disks() {
    let seeds = std::env::var("REPLICATION_SEEDS");
    let seeds: u64 = seeds.map_or(300, |seeds| seeds.parse().unwrap());
    let first = std::env::var("REPLICATION_SEED").map_or(0, |seed| seed.parse().unwrap());
    let tally = Arc::new(Tally::default());
    let next = AtomicU64::new(first);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= first + seeds {
                        return;
                    }
                    history(seed, &tally);
                }
            });
        }
    });
    let shown = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "{seeds} seeds: {} cycles, {} ends complete ({} proven equal), {} failed, {} copies resumed, \
         {} origins taken back, {} holds became bookmarks, {} failbacks",
        shown(&tally.cycles),
        shown(&tally.done),
        shown(&tally.proven),
        shown(&tally.failed),
        shown(&tally.resumed),
        shown(&tally.restored),
        shown(&tally.bookmarks),
        shown(&tally.failbacks),
    );
    if seeds >= 300 {
        for counter in [
            &tally.done,
            &tally.proven,
            &tally.failed,
            &tally.resumed,
            &tally.restored,
            &tally.bookmarks,
            &tally.failbacks,
        ] {
            assert!(shown(counter) > 0, "something never happened");
        }
    }
}
