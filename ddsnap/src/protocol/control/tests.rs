// SPDX-License-Identifier: GPL-2.0-only
//! The bytes of every message, and what happens to bytes that are none.

use super::*;

fn snapshot() -> Snapshot {
    Snapshot {
        tag: SnapTag(0x0403_0201),
        seq: SnapSeq(9),
        created: -2,
        priority: -128,
        state: SnapshotState::Squashed,
        doubtful: true,
        to_bookmark: true,
        persistent_usecount: 5,
        devices: 6,
        sectors: 0x0100,
    }
}

const SNAPSHOT: [u8; SNAPSHOT_BYTES] = [
    1, 2, 3, 4, // tag
    9, 0, 0, 0, 0, 0, 0, 0, // sequence
    0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, // created
    0x80, // priority
    11,   // squashed, doubtful, becomes a bookmark
    5, 0, 0, 0, // persistent use count
    6, 0, 0, 0, // devices
    0, 1, 0, 0, 0, 0, 0, 0, // sectors
];

fn status() -> Status {
    Status {
        chunk: ChunkShift::new(14).unwrap(),
        data_chunks: 1,
        free_chunks: 2,
        meta_blocks: 3,
        free_meta_blocks: 4,
        reserved_meta_blocks: 5,
        separate_meta: true,
        origin_sectors: 6,
        created: 7,
        deleting: 8,
        channel: ChannelState::Attached,
        refusing: true,
        reverting: Some(SnapTag(0x0403_0201)),
        fault: "x".into(),
    }
}

fn bad_chunk() -> BadChunk {
    BadChunk {
        place: StoreChunk(5),
        chunk: Chunk(6),
        checksums: Some((7, 8)),
        snapshots: vec![SnapTag(9), SnapTag(10)],
    }
}

const BAD_CHUNK: [u8; BAD_CHUNK_BYTES + 8] = [
    5, 0, 0, 0, 0, 0, 0, 0, // place
    6, 0, 0, 0, 0, 0, 0, 0, // chunk
    1, // readable
    7, 0, 0, 0, 8, 0, 0, 0, // checksums
    2, 0, 0, 0, 9, 0, 0, 0, 10, 0, 0, 0, // snapshots
];

#[test]
fn bad_chunks_are_told_in_words() {
    let mut bad = bad_chunk();
    assert_eq!(
        bad.to_string(),
        "store chunk 5, chunk 6 of snapshots 9 10: has checksum 0x00000007, expected 0x00000008"
    );
    bad.snapshots.pop();
    bad.checksums = None;
    assert_eq!(
        bad.to_string(),
        "store chunk 5, chunk 6 of snapshot 9: cannot be read"
    );
}

#[test]
fn requests_are_these_bytes() {
    let tag = SnapTag(0x0403_0201);
    let golden: &[(Request, u16, &[u8])] = &[
        (Request::Create(tag), 0x10, &[1, 2, 3, 4]),
        (Request::CreateBookmark(tag), 0x19, &[1, 2, 3, 4]),
        (Request::ToBookmark(tag), 0x1a, &[1, 2, 3, 4]),
        (Request::WhenFull(tag, true), 0x1b, &[1, 2, 3, 4, 1]),
        (Request::Delete(tag), 0x11, &[1, 2, 3, 4]),
        (Request::List, 0x12, &[]),
        (Request::Status, 0x20, &[]),
        (Request::Usage, 0x21, &[]),
        (Request::State(tag), 0x14, &[1, 2, 3, 4]),
        (Request::Sectors(None), 0x15, &[0, 0, 0, 0, 0]),
        (Request::Sectors(Some(tag)), 0x15, &[1, 1, 2, 3, 4]),
        (Request::Priority(tag, -2), 0x16, &[1, 2, 3, 4, 0xfe]),
        (
            Request::UseCount(tag, -2),
            0x17,
            &[1, 2, 3, 4, 0xfe, 0xff, 0xff, 0xff],
        ),
        (
            Request::Changelist {
                from: Some(tag),
                to: SnapTag(5),
            },
            0x40,
            &[1, 1, 2, 3, 4, 5, 0, 0, 0],
        ),
        (
            Request::Changelist {
                from: None,
                to: tag,
            },
            0x40,
            &[0, 0, 0, 0, 0, 1, 2, 3, 4],
        ),
        (
            Request::Resize {
                origin: Some(258),
                store: None,
                meta: Some(3),
            },
            0x30,
            &[
                2, 1, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 255, 3, 0, 0, 0, 0, 0,
                0, 0,
            ],
        ),
        (
            Request::DumpTree {
                first: 1,
                last: 258,
            },
            0x0050,
            &[1, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0],
        ),
        (Request::Revert(tag), 0x31, &[1, 2, 3, 4]),
        (Request::Scrub(258), 0x32, &[2, 1, 0, 0, 0, 0, 0, 0]),
    ];
    for (request, code, body) in golden {
        let frame = Frame {
            code: *code,
            body: body.to_vec(),
        };
        assert_eq!(request.to_frame(), frame);
        assert_eq!(Request::from_frame(&frame).as_ref(), Ok(request));
    }
}

#[test]
fn replies_are_these_bytes() {
    let refused = Reply::Error {
        errno: 17,
        reason: "no".into(),
    };
    let list = Reply::Snapshots {
        last: true,
        snapshots: vec![snapshot()],
    };
    let rows = vec![Row {
        snapshot: snapshot(),
        shared_with: vec![(0, 3), (2, 1)],
    }];
    let mut list_body = vec![1, 1, 0, 0, 0];
    list_body.extend_from_slice(&SNAPSHOT);
    let mut rows_body = vec![0, 1, 0, 0, 0];
    rows_body.extend_from_slice(&SNAPSHOT);
    rows_body.extend_from_slice(&[2, 0, 0, 0]);
    rows_body.extend_from_slice(&[0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    rows_body.extend_from_slice(&[2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    let mut status_body = vec![14, 1, 2];
    for number in 1..=8_u64 {
        status_body.extend_from_slice(&number.to_le_bytes());
    }
    status_body.extend_from_slice(&[1, 1, 1, 2, 3, 4, 1, 0, b'x']);
    let mut usage_body = status_body.clone();
    usage_body.extend_from_slice(&[1, 0, 0, 0, 64, 0, 0, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    let usage = Reply::Usage {
        status: status(),
        totals: vec![(64, 9)],
    };

    let golden: &[(Reply, u16, Vec<u8>)] = &[
        (refused, 0x8000, vec![17, 0, 0, 0, 2, 0, b'n', b'o']),
        (Reply::Created, 0x8010, vec![]),
        (Reply::BookmarkCreated, 0x8019, vec![]),
        (Reply::IsBookmark, 0x801a, vec![]),
        (Reply::WhenFull(true), 0x801b, vec![1]),
        (Reply::State(SnapshotState::Bookmark), 0x8014, vec![4]),
        (Reply::Deleted, 0x8011, vec![]),
        (list, 0x8012, list_body),
        (Reply::Status(status()), 0x8020, status_body),
        (usage, 0x8021, usage_body),
        (Reply::Rows { last: false, rows }, 0x8022, rows_body),
        (Reply::State(SnapshotState::Squashed), 0x8014, vec![1]),
        (Reply::Sectors(258), 0x8015, vec![2, 1, 0, 0, 0, 0, 0, 0]),
        (Reply::Priority(-1), 0x8016, vec![0xff]),
        (Reply::UseCount(258), 0x8017, vec![2, 1, 0, 0]),
        (
            Reply::Dumped { entries: 258 },
            0x8050,
            vec![2, 1, 0, 0, 0, 0, 0, 0],
        ),
        (
            Reply::Changelist {
                chunk: ChunkShift::MAX,
                from: Sectors(1),
                to: Sectors(258),
            },
            0x8042,
            vec![20, 1, 0, 0, 0, 0, 0, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0],
        ),
        (
            Reply::Changes {
                last: true,
                runs: vec![ChunkRun {
                    first: Chunk(3),
                    chunks: 4,
                }],
            },
            0x8041,
            vec![
                1, 1, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0,
            ],
        ),
        (
            Reply::Progress { done: 1, total: 2 },
            0x803f,
            vec![1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            Reply::Resized {
                origin: 1,
                store: 2,
                meta: 3,
                refused: "x".into(),
            },
            0x8030,
            [1_u64, 2, 3]
                .iter()
                .flat_map(|size| size.to_le_bytes())
                .chain([1, 0, b'x'])
                .collect(),
        ),
        (
            Reply::Reverted { skipped: 3 },
            0x8031,
            vec![3, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            Reply::Scrubbed { bytes: 1, bad: 2 },
            0x8032,
            vec![1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
        ),
        (
            Reply::BadChunks(vec![bad_chunk()]),
            0x8033,
            [&[1, 0, 0, 0][..], &BAD_CHUNK].concat(),
        ),
    ];
    for (reply, code, body) in golden {
        let frame = Frame {
            code: *code,
            body: body.clone(),
        };
        assert_eq!(reply.to_frame(), frame);
        assert_eq!(Reply::from_frame(&frame).as_ref(), Ok(reply));
    }
}

#[test]
fn a_body_cut_short_or_too_long_is_refused() {
    let request = Request::UseCount(SnapTag(1), 1).to_frame();
    for length in (0..request.body.len()).chain([request.body.len() + 1]) {
        let mut bad = request.clone();
        bad.body.resize(length, 0);
        assert_eq!(
            Request::from_frame(&bad),
            Err(CodecError::Length {
                code: USECOUNT,
                length
            }),
            "{length} bytes"
        );
    }
}

#[test]
fn thousands_of_snapshots_come_in_pages_and_in_order() {
    let all: Vec<Snapshot> = (0..4096)
        .map(|n| Snapshot {
            tag: SnapTag(n),
            ..snapshot()
        })
        .collect();
    let pages = Reply::snapshot_pages(all.clone());
    let mut found = Vec::new();
    for (n, page) in pages.iter().enumerate() {
        let frame = page.to_frame();
        assert!(frame.body.len() <= MAX_BODY_BYTES);
        match Reply::from_frame(&frame).unwrap() {
            Reply::Snapshots { last, snapshots } => {
                assert_eq!(last, n + 1 == pages.len());
                found.extend(snapshots);
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(pages.len() > 1);
    assert_eq!(found, all);
}

#[test]
fn the_widest_rows_fit_their_pages() {
    let shared_with: Vec<(u32, u64)> = (0..=MANY).map(|n| (n, 1)).collect();
    let row = Row {
        snapshot: snapshot(),
        shared_with,
    };
    let pages = Reply::row_pages(vec![row.clone(); 1000]);
    let mut found = Vec::new();
    for page in &pages {
        let frame = page.to_frame();
        assert!(frame.body.len() <= MAX_BODY_BYTES);
        match Reply::from_frame(&frame).unwrap() {
            Reply::Rows { rows, .. } => found.extend(rows),
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(found, vec![row; 1000]);
}

#[test]
fn sharing_with_more_than_the_most_is_refused() {
    let reply = Reply::Usage {
        status: status(),
        totals: vec![(MANY + 1, 1)],
    };
    assert!(matches!(
        Reply::from_frame(&reply.to_frame()),
        Err(CodecError::Field { value: 65, .. })
    ));
}

#[test]
fn the_longest_page_of_changes_fits_a_frame() {
    let run = ChunkRun {
        first: Chunk(u64::MAX),
        chunks: u64::MAX,
    };
    let page = |count| Reply::Changes {
        last: false,
        runs: vec![run; count],
    };
    assert!(page(MAX_RUNS).to_frame().body.len() <= MAX_BODY_BYTES);
    assert!(page(MAX_RUNS + 1).to_frame().body.len() > MAX_BODY_BYTES);
}

#[test]
fn no_snapshot_is_one_empty_last_page() {
    assert_eq!(
        Reply::snapshot_pages(vec![]),
        [Reply::Snapshots {
            last: true,
            snapshots: vec![]
        }]
    );
}

/// A decoder that indexed, reserved or multiplied by what it read would panic here.
#[test]
fn random_bodies_never_panic() {
    let mut seed = 0x5eed_u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let codes: Vec<u16> = (0x10..0x1c)
        .chain(0x20..0x22)
        .chain(0x8000..0x8001)
        .chain(0x8010..0x801c)
        .chain(0x8020..0x8023)
        .collect();
    for _ in 0..200_000 {
        let code = codes[next() as usize % codes.len()];
        let length = next() as usize % 96;
        // Small numbers reach further into the decoders than random ones.
        let small = next() % 2 == 0;
        let body = (0..length)
            .map(|_| (next() % if small { 3 } else { 256 }) as u8)
            .collect();
        let frame = Frame { code, body };
        let _ =
            Request::from_frame(&frame).map(|request| assert_eq!(request.to_frame().code, code));
        let _ = Reply::from_frame(&frame).map(|reply| assert_eq!(reply.to_frame(), frame));
    }
}
