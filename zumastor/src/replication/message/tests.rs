// SPDX-License-Identifier: GPL-2.0-only
use ddsnap::units::{ChunkShift, Sectors};

use super::super::standing::{Epoch, Partial, Role};
use super::*;

fn held(n: u128) -> Held {
    Held {
        id: Uuid::from_u128(n),
        number: n as u32,
        taken: 1_800_000_000 + n as u64,
        length: Sectors(2048),
        data: n % 2 == 0,
    }
}

fn messages() -> Vec<Message> {
    let standing = Standing {
        volume: Uuid::from_u128(1),
        lineage: Some(Uuid::from_u128(2)),
        epoch: Epoch {
            number: 3,
            owner: Uuid::from_u128(1),
            since: 1_800_000_000,
        },
        role: Role::Master,
        chunk: ChunkShift::new(14).unwrap(),
        length: Sectors(4096),
        held: vec![held(4), held(5)],
        hold: Some(Uuid::from_u128(4)),
        old_hold: None,
        origin: Some(Uuid::from_u128(5)),
        partial: Some(Partial {
            snapshot: Uuid::from_u128(4),
            base: None,
            position: 77,
            plain: true,
        }),
        written: false,
    };
    vec![
        Message::Hello(Box::new(Hello {
            nonce: [9; 16],
            features: 0,
            standing,
            wishes: Wishes {
                full: true,
                force_base: false,
            },
        })),
        Message::Refuse {
            code: 3,
            sentence: "no".into(),
        },
        Message::Begin(Begin {
            nonce: [8; 16],
            snapshot: held(4),
            base: Some(Uuid::from_u128(2)),
            base_length: Sectors(2047),
            position: 1,
            plain: false,
        }),
        Message::Ready {
            nonce: [7; 16],
            position: 1,
        },
        Message::Batch { position: 12 },
        Message::Ack { position: 12 },
        Message::End {
            root: Some(Root([5; 32])),
        },
        Message::Complete {
            root: None,
            number: 6,
        },
        Message::Current {
            snapshot: Uuid::from_u128(4),
        },
        Message::Alive,
        Message::Fail {
            sentence: "cannot read".into(),
        },
        Message::Compare {
            nonce: [6; 16],
            snapshot: held(4),
        },
        Message::Region {
            region: 3,
            sum: Root([4; 32]),
        },
        Message::Chunks {
            first: 9,
            hashes: vec![[1; 32], [0; 32]],
        },
        Message::Compared {
            region: 3,
            same: true,
        },
        Message::Verdict {
            chunks: 5,
            runs: vec![run(1, 2), run(7, 1)],
        },
    ]
}

fn run(first: u64, chunks: u64) -> ChunkRun {
    ChunkRun {
        first: Chunk(first),
        chunks,
    }
}

/// A field that moves makes two programs of one version misread each other.
#[test]
fn the_bytes_of_messages_are_pinned() {
    let mut all = blake3::Hasher::new();
    for (i, message) in messages().iter().enumerate() {
        if i == 11 {
            assert_eq!(&all.finalize().to_hex()[..16], "331756e91846b551");
        }
        all.update(&message.encode());
    }
    assert_eq!(&all.finalize().to_hex()[..16], "f02aae26a7b69dbb");
    let verdict = [
        &5u64.to_le_bytes()[..],
        &[2, 0],
        &1u64.to_le_bytes(),
        &2u64.to_le_bytes(),
        &7u64.to_le_bytes(),
        &1u64.to_le_bytes(),
    ];
    assert_eq!(messages()[15].encode(), verdict.concat());
    let begin = messages()[2].encode();
    assert_eq!(begin.len(), 16 + 37 + 16 + 8 + 8 + 1);
    assert_eq!(begin[16..32], *Uuid::from_u128(4).as_bytes());
    assert_eq!(begin[32..36], 4u32.to_le_bytes());
}

#[test]
fn messages_are_read_as_they_were_written() {
    for message in messages() {
        let bytes = message.encode();
        assert_eq!(Message::decode(message.kind(), &bytes), Ok(message));
    }
}

/// Cut or lengthened, a message is an error and never a shorter message.
#[test]
fn every_length_but_the_right_one_is_refused() {
    for message in messages() {
        let mut bytes = message.encode();
        for length in 0..bytes.len() {
            assert!(Message::decode(message.kind(), &bytes[..length]).is_err());
        }
        bytes.push(0);
        assert!(Message::decode(message.kind(), &bytes).is_err());
    }
}

/// Each message at its longest fits its frame.
#[test]
fn the_longest_messages_fit_their_frames() {
    let mut messages = messages();
    if let Message::Hello(hello) = &mut messages[0] {
        hello.standing.held = vec![held(4); super::super::standing::MAX_HELD + 5];
    }
    let sentence = "ü".repeat(100_000);
    messages.push(Message::Fail {
        sentence: sentence.clone(),
    });
    messages.push(Message::Refuse { code: 1, sentence });
    messages.push(Message::Chunks {
        first: u64::MAX,
        hashes: vec![[1; 32]; MAX_HASHES + 5],
    });
    messages.push(Message::Verdict {
        chunks: u64::MAX,
        runs: (0..MAX_SHOWN as u64 + 5).map(|n| run(n * 2, 1)).collect(),
    });
    for message in messages {
        let length = message.encode().len();
        assert!(length + 32 <= message.kind().longest(), "{length}");
        let read = Message::decode(message.kind(), &message.encode());
        assert!(read.is_ok(), "{read:?}");
    }
}

/// Counts are not believed before the bytes are there.
#[test]
fn hostile_counts_take_no_memory() {
    let mut hello = messages()[0].encode();
    let at = hello.len() - 2 * 37 - 4;
    hello[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(Message::decode(Kind::Hello, &hello).is_err());
}

/// Of the last epoch there is a replica could never be made a master again: the number did not grow.
#[test]
fn an_epoch_that_has_no_next_is_refused() {
    let mut messages = messages();
    let Message::Hello(hello) = &mut messages[0] else {
        panic!("the first is a greeting")
    };
    hello.standing.epoch.number = u64::MAX;
    let bytes = messages[0].encode();
    let text = Message::decode(Kind::Hello, &bytes).expect_err("refused");
    assert!(text.to_string().contains("the epoch"), "{text}");
}

/// Runs that overlap, or that are more than what differs, would be shown as a difference that is none.
#[test]
fn a_verdict_that_contradicts_itself_is_refused() {
    for (chunks, runs) in [
        (0, vec![run(1, 1)]),
        (1, vec![]),
        (2, vec![run(1, 3)]),
        (5, vec![run(1, 0)]),
        (5, vec![run(4, 2), run(5, 1)]),
        (u64::MAX, vec![run(u64::MAX, 2)]),
    ] {
        let bytes = Message::Verdict { chunks, runs }.encode();
        assert!(Message::decode(Kind::Verdict, &bytes).is_err());
    }
}
