// SPDX-License-Identifier: GPL-2.0-only
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use uuid::Uuid;

use super::super::frame::{FrameReader, FrameWriter, Kind};
use super::super::message::{COMPARE, COMPARES, Wishes};
use super::super::simulation::Random;
use super::super::simulation::pipe::{Fault, pipe};
use super::super::standing::{Epoch, Role, Standing};
use super::*;

const TIMING: Timing = Timing {
    alive: Duration::from_millis(400),
    deadline: Duration::from_secs(20),
};
/// One region and a bit, in the largest chunks, the last one short.
const LENGTH: Sectors = Sectors(66 * 2048 - 8);
const FEATURES: u64 = COMPARES | COMPARE;

struct Quiet;

impl Watch for Quiet {
    fn progress(&self, _: u64, _: Option<u64>, _: u64) {}
    fn cancelled(&self) -> bool {
        false
    }
}

/// A snapshot of zeros but for some chunks.
#[derive(Clone, Default)]
struct Memory {
    chunk: Option<ChunkShift>,
    length: Sectors,
    chunks: BTreeMap<u64, u8>,
    broken: Option<u64>,
    /// Nothing can be noted beside it.
    full: bool,
}

impl Memory {
    fn of(chunks: &[(u64, u8)]) -> Memory {
        Memory {
            chunks: chunks.iter().copied().collect(),
            ..Memory::default()
        }
    }

    fn sums(&self) -> Sums {
        let chunk = ChunkShift::MAX;
        let mut sums = Sums::new(chunk);
        for (number, byte) in &self.chunks {
            let run = ChunkRun {
                first: Chunk(*number),
                chunks: 1,
            };
            let bytes = run.bytes_within(LENGTH, chunk) as usize;
            sums.replace(*number, &[], &vec![*byte; bytes]);
        }
        sums
    }
}

impl Readable for Memory {
    fn open(&mut self, snapshot: &Held, chunk: ChunkShift) -> Result<()> {
        self.chunk = Some(chunk);
        self.length = snapshot.length;
        Ok(())
    }

    fn read(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        let chunk = self.chunk.expect("open");
        into.clear();
        into.resize(run.bytes_within(self.length, chunk) as usize, 0);
        let end = run.first.0 + run.chunks;
        if self.broken.is_some_and(|b| (run.first.0..end).contains(&b)) {
            return Err(anyhow!("could not read the disk"));
        }
        for (number, byte) in self.chunks.range(run.first.0..end) {
            let at = (number - run.first.0) as usize * chunk.bytes() as usize;
            let next = (at + chunk.bytes() as usize).min(into.len());
            into[at..next].fill(*byte);
        }
        Ok(())
    }

    fn note_again(&mut self, _: ChunkShift, runs: &[ChunkRun]) -> Result<()> {
        assert!(!runs.is_empty());
        match self.full {
            true => Err(anyhow!("could not write the note")),
            false => Ok(()),
        }
    }
}

fn hello(role: Role, features: u64) -> Hello {
    let held = |n: u128, data| Held {
        id: Uuid::from_u128(n),
        number: n as u32,
        taken: 0,
        length: LENGTH,
        data,
    };
    let up = role == Role::Master;
    Hello {
        nonce: [if up { 1 } else { 2 }; 16],
        features,
        standing: Standing {
            volume: Uuid::from_u128(if up { 100 } else { 200 }),
            lineage: Some(Uuid::from_u128(100)),
            epoch: Epoch {
                number: 1,
                owner: Uuid::from_u128(100),
                since: 0,
            },
            role,
            chunk: if up { ChunkShift::MAX } else { ChunkShift::MIN },
            length: LENGTH,
            // The newest with data on both sides is 3.
            held: vec![held(2, true), held(3, true), held(4, !up), held(5, up)],
            hold: None,
            old_hold: None,
            origin: None,
            partial: None,
            written: false,
        },
        wishes: Wishes::default(),
    }
}

fn compare(up: &Memory, down: &Memory, faults: [Fault; 2], seed: u64) -> [Verdict; 2] {
    let (near, far) = pipe(faults, seed);
    let (mut up, mut down) = (up.clone(), down.clone());
    let own = hello(Role::Master, FEATURES | SEND_AGAIN);
    let peer = hello(Role::Replica, COMPARES);
    thread::scope(|scope| {
        let up = scope.spawn(move || verify_up(&mut up, near, own, TIMING, &Quiet));
        let down = scope.spawn(move || verify_down(&mut down, far, peer, TIMING, &Quiet));
        [up.join().unwrap(), down.join().unwrap()]
    })
}

fn run_of(first: u64, chunks: u64) -> ChunkRun {
    ChunkRun {
        first: Chunk(first),
        chunks,
    }
}

/// Equal sites were called different, or their sums not known afterwards.
#[test]
fn equal_snapshots_are_equal_and_their_sums_known() {
    let disk = Memory::of(&[(0, 1), (7, 2), (65, 3)]);
    for verdict in compare(&disk, &disk, [Fault::None; 2], 1) {
        let Verdict::Equal { snapshot, sums } = verdict else {
            panic!("{verdict:?}")
        };
        assert_eq!(snapshot.id, Uuid::from_u128(3));
        assert_eq!(sums, disk.sums());
    }
}

/// What had changed on one disk by itself was proven equal by every cycle.
#[test]
fn what_differs_is_named_chunk_by_chunk() {
    let up = Memory::of(&[(0, 1), (7, 2), (8, 2), (9, 2), (65, 3)]);
    let down = Memory::of(&[(0, 1), (7, 2), (8, 9), (10, 2), (63, 1), (65, 4)]);
    let verdicts = compare(&up, &down, [Fault::None; 2], 2);
    for verdict in &verdicts {
        let Verdict::Differs {
            chunks,
            runs,
            send_again,
            chunk,
            ..
        } = verdict
        else {
            panic!("{verdict:?}")
        };
        assert_eq!((*chunks, *send_again), (5, true));
        assert_eq!(*chunk, ChunkShift::MAX);
        let expected = [run_of(8, 3), run_of(63, 1), run_of(65, 1)];
        assert_eq!(runs.as_slice(), expected);
    }
}

/// The other side was told that all would be sent again before that was written down, and then it was not.
#[test]
fn what_cannot_be_noted_is_not_promised() {
    let up = Memory {
        full: true,
        ..Memory::of(&[(3, 1)])
    };
    for verdict in compare(&up, &Memory::of(&[(3, 2)]), [Fault::None; 2], 5) {
        let Verdict::Failed(sentence) = &verdict else {
            panic!("{verdict:?}")
        };
        assert!(sentence.contains("could not write the note"), "{sentence}");
    }
}

/// A disk that cannot be read must not end in silence, nor as a difference.
#[test]
fn a_failed_read_is_told_on_both_sides() {
    let whole = Memory::of(&[(3, 1)]);
    let broken = Memory {
        broken: Some(40),
        ..whole.clone()
    };
    for (up, down) in [(&whole, &broken), (&broken, &whole)] {
        for verdict in compare(up, down, [Fault::None; 2], 3) {
            let Verdict::Failed(sentence) = &verdict else {
                panic!("{verdict:?}")
            };
            assert!(sentence.contains("could not read the disk"), "{sentence}");
        }
    }
}

/// An older program would take the first message for damage.
#[test]
fn who_cannot_compare_is_refused() {
    let (near, far) = pipe([Fault::None; 2], 4);
    let (own, peer) = (hello(Role::Master, FEATURES), hello(Role::Replica, 0));
    let (mut up, mut down) = (Memory::default(), Memory::default());
    let verdicts = thread::scope(|scope| {
        let up = scope.spawn(move || verify_up(&mut up, near, own, TIMING, &Quiet));
        let down = scope.spawn(move || verify_down(&mut down, far, peer, TIMING, &Quiet));
        [up.join().unwrap(), down.join().unwrap()]
    });
    for verdict in verdicts {
        assert!(
            matches!(verdict, Verdict::Refused { code: 11, .. }),
            "{verdict:?}"
        );
    }
}

/// Nothing in common is a refusal with what either side holds.
#[test]
fn nothing_in_common_is_refused() {
    let up = hello(Role::Master, FEATURES);
    let mut down = hello(Role::Replica, FEATURES);
    assert_eq!(
        comparable(&up, &down).map(|held| held.id),
        Ok(Uuid::from_u128(3))
    );
    for held in &mut down.standing.held {
        held.length = Sectors(LENGTH.0 - 1);
    }
    let refusal = comparable(&up, &down).expect_err("too short");
    assert_eq!(refusal.code(), 10);
    assert!(refusal.to_string().contains("receiving side holds 4"));
}

/// Whatever happens to the bytes on the way, nobody is told what is not so.
#[test]
fn damage_on_the_way_is_no_verdict() {
    let up = Memory::of(&[(0, 1), (65, 3)]);
    let other = Memory::of(&[(0, 1), (65, 4)]);
    let random = &mut Random(6);
    let (mut whole, mut ended) = (0, 0);
    for seed in 0..24 {
        let down = if seed % 2 == 0 { &up } else { &other };
        // Behind the greetings, or within.
        let mut fault = || match random.below(3) {
            0 => Fault::Cut(random.below(1200)),
            1 => Fault::Corrupt(random.below(1200)),
            _ => Fault::None,
        };
        for verdict in compare(&up, down, [fault(), fault()], seed) {
            match verdict {
                Verdict::Equal { .. } => assert_eq!(seed % 2, 0, "seed {seed}"),
                Verdict::Differs { chunks, .. } => assert_eq!((seed % 2, chunks), (1, 1)),
                Verdict::Failed(_) => ended += 1,
                Verdict::Refused { .. } => panic!("seed {seed}: {verdict:?}"),
            }
            whole += 1;
        }
    }
    assert!(ended > 0 && ended < whole, "{ended} of {whole} ended early");
}

/// A job that was cancelled went on reading for hours.
#[test]
fn it_ends_when_it_is_cancelled() {
    struct Ends(AtomicBool);
    impl Watch for Ends {
        fn progress(&self, _: u64, _: Option<u64>, _: u64) {
            self.0.store(true, Ordering::Relaxed);
        }
        fn cancelled(&self) -> bool {
            self.0.load(Ordering::Relaxed)
        }
    }
    let (near, far) = pipe([Fault::None; 2], 7);
    let own = hello(Role::Master, FEATURES);
    let peer = hello(Role::Replica, FEATURES);
    let (mut up, mut down) = (Memory::default(), Memory::default());
    let verdicts = thread::scope(|scope| {
        let ends = Ends(AtomicBool::new(false));
        let up = scope.spawn(move || verify_up(&mut up, near, own, TIMING, &ends));
        let down = scope.spawn(move || verify_down(&mut down, far, peer, TIMING, &Quiet));
        [up.join().unwrap(), down.join().unwrap()]
    });
    for verdict in verdicts {
        let Verdict::Failed(sentence) = &verdict else {
            panic!("{verdict:?}")
        };
        assert!(sentence.contains("cancelled"), "{sentence}");
    }
}

/// A peer that says what it likes.
fn hostile(said: &[Message]) -> Verdict {
    let (near, far) = pipe([Fault::None; 2], 8);
    let own = hello(Role::Master, FEATURES);
    let said = said.to_vec();
    thread::scope(|scope| {
        scope.spawn(move || {
            let mut writer = FrameWriter::new(far.writer);
            let greeting = Message::Hello(Box::new(hello(Role::Replica, COMPARES)));
            for message in [greeting].iter().chain(&said) {
                // It hangs up when it has heard enough.
                if writer.send(message.kind(), &[&message.encode()]).is_err() {
                    return;
                }
            }
            let (mut reader, mut payload) = (FrameReader::new(far.reader), Vec::new());
            while reader
                .next(&mut payload)
                .is_ok_and(|kind| kind != Kind::Fail)
            {}
        });
        let mut up = Memory::of(&[(1, 1)]);
        verify_up(&mut up, near, own, TIMING, &Quiet)
    })
}

/// A peer that lies about its answers was believed, or filled the memory.
#[test]
fn hostile_peers_are_bounded_and_believed_nothing() {
    let ready = Message::Ready {
        nonce: [1; 16],
        position: 0,
    };
    let hashes = |first, count| Message::Chunks {
        first,
        hashes: vec![[5; 32]; count],
    };
    let same = |region| Message::Compared { region, same: true };
    let differs = |region| Message::Compared {
        region,
        same: false,
    };
    let cases: Vec<(&str, Vec<Message>)> = vec![
        (
            "another stream",
            vec![Message::Ready {
                nonce: [9; 16],
                position: 0,
            }],
        ),
        ("an answer to nothing", vec![same(0)]),
        ("the wrong region", vec![ready.clone(), same(1)]),
        (
            "a difference without hashes",
            vec![ready.clone(), differs(0)],
        ),
        (
            "hashes of a region that is the same",
            vec![ready.clone(), hashes(0, 64), same(0)],
        ),
        (
            "hashes beyond the region",
            vec![ready.clone(), hashes(0, 65)],
        ),
        ("hashes out of order", vec![ready.clone(), hashes(1, 1)]),
        (
            "more answers than regions",
            vec![ready.clone(), same(0), same(1), same(2)],
        ),
        ("more than was agreed on", vec![hashes(0, 16_384); 40]),
    ];
    for (what, said) in cases {
        match hostile(&said) {
            Verdict::Failed(_) => {}
            // All regions were answered: what follows is not heard any more.
            Verdict::Equal { .. } if what == "more answers than regions" => {}
            verdict => panic!("{what}: {verdict:?}"),
        }
    }
    // It says that something differs and gives our own hashes.
    let mut own = vec![[0; 32]; 64];
    let data = vec![1; ChunkShift::MAX.bytes() as usize];
    own[1] = chunk_hash(ChunkShift::MAX, 1, &data).expect("not zero");
    let lie = Message::Chunks {
        first: 0,
        hashes: own,
    };
    let Verdict::Failed(sentence) = hostile(&[ready, lie, differs(0)]) else {
        panic!("believed")
    };
    assert!(sentence.contains("none of its chunks"), "{sentence}");
}

/// A disk that differs everywhere must not take memory without bound.
#[test]
fn the_list_of_differences_is_bounded_and_covers_them_all() {
    let mut runs = Runs::default();
    let count = MAX_KEPT as u64 + 100;
    for number in 0..count {
        runs.push(number * 2);
    }
    assert_eq!((runs.runs.len(), runs.chunks), (MAX_KEPT, count));
    let last = runs.runs.last().expect("some");
    assert_eq!(last.first.0 + last.chunks, (count - 1) * 2 + 1);
}
