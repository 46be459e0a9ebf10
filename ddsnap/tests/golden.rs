// SPDX-License-Identifier: GPL-2.0-only
//! The bytes of everything on disk, pinned: a change of format shows here before it eats a store.
//!
//! The expected bytes are in `tests/golden/`: rows of 16 bytes, rows of zeros left out.
//! `DDSNAP_BLESS=1` writes them anew; FORMAT.md and its version must change with them.

use ddsnap::buffer::AlignedBuf;
use ddsnap::device::memory::Rng;
use ddsnap::format::bitmap::Bitmap;
use ddsnap::format::block::{Block, BlockBuilder, Expected, Kind, PAYLOAD_LEN, Pointer, Seal};
use ddsnap::format::journal::{self, Entry, RecordId};
use ddsnap::format::label::Label;
use ddsnap::format::node::{Child, Interior, LeafBuilder, LeafReader, Value, encode_interior};
use ddsnap::format::origin::{Area, Content, Guard, OriginRecord};
use ddsnap::format::snaptable::{self, Snapshot, State};
use ddsnap::format::superblock::{Extent, Revert, Superblock, TreeRoot};
use ddsnap::format::{Lengths, Version};
use ddsnap::units::{Chunk, ChunkShift, MetaBlock, Sectors, SnapSeq, SnapTag, StoreChunk};

fn rows(bytes: &[u8]) -> String {
    let mut text = String::new();
    for (index, row) in bytes.chunks(16).enumerate() {
        if row.iter().any(|&byte| byte != 0) {
            text.push_str(&format!("{:04x}:", index * 16));
            row.iter()
                .for_each(|byte| text.push_str(&format!(" {byte:02x}")));
            text.push('\n');
        }
    }
    text
}

fn golden(name: &str, bytes: &[u8]) {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    let found = rows(bytes);
    if std::env::var_os("DDSNAP_BLESS").is_some() {
        std::fs::write(&path, &found).expect("write the golden file");
    }
    let wanted = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(
        found, wanted,
        "{name} has changed: that is a change of the format"
    );
}

/// Bytes of an older version, which nothing writes any more.
fn read_golden(name: &str, len: usize) -> AlignedBuf {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden")
        .join(name);
    let text = std::fs::read_to_string(&path)
        .unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut bytes = AlignedBuf::zeroed(len);
    for line in text.lines() {
        let (at, row) = line.split_once(':').expect("a row");
        let at = usize::from_str_radix(at, 16).expect("an offset");
        for (index, byte) in row.split_whitespace().enumerate() {
            bytes[at + index] = u8::from_str_radix(byte, 16).expect("a byte");
        }
    }
    bytes
}

fn uuid() -> [u8; 16] {
    std::array::from_fn(|i| 0xa0 + i as u8)
}

fn seal(
    kind: Kind,
    level: u8,
    (builder, count, used): (BlockBuilder, u16, u16),
    aux: u64,
) -> (Pointer, Block) {
    let part = ddsnap::format::uuid_part(&uuid());
    let block = MetaBlock(0x1234);
    builder.seal(&Seal {
        block,
        generation: 7,
        uuid_part: part,
        kind,
        level,
        count,
        used,
        aux,
    })
}

/// 32 sectors.
fn chunk_16k() -> ChunkShift {
    ChunkShift::new(14).expect("in range")
}

/// How lengths are written in a version.
fn lengths(version: Version) -> Lengths {
    let chunk = chunk_16k();
    Lengths { version, chunk }
}

fn superblock() -> Superblock {
    let tree = |n: u64| TreeRoot {
        root: Some((
            Pointer {
                block: MetaBlock(100 + n),
                crc: 0xc0 + n as u32,
            },
            n as u8,
            9 + n,
        )),
        entries: 1000 + n,
        nodes: 10 + n,
    };
    Superblock {
        version: Version::V2,
        uuid: uuid(),
        chunk: chunk_16k(),
        clean: true,
        separate_meta: false,
        bookmarks: false,
        generation: 42,
        created: 1_763_000_000,
        origin: Sectors(0x20_0000_0000),
        data_first: StoreChunk(64),
        data_end: StoreChunk(0x2_0000_0000),
        data_used: 0x77,
        journal_first: MetaBlock(32),
        journal_blocks: 16,
        epoch: 3,
        tail: 5,
        tail_sequence: 99,
        next_seq: SnapSeq(12),
        revert: Some(Revert {
            seq: SnapSeq(11),
            next: Chunk(0x0102_0304),
        }),
        snapshots: Some(Pointer {
            block: MetaBlock(60),
            crc: 0xdead_beef,
        }),
        snapshot_count: 2,
        exceptions: tree(0),
        overlays: tree(1),
        space: tree(2),
        extents: vec![Extent {
            first: MetaBlock(48),
            blocks: 208,
        }],
        origin_record: Some(origin_record()),
    }
}

fn origin_record() -> OriginRecord {
    let guard = |chunk| Guard {
        chunk: Chunk(chunk),
        digest: 0x1122_3344_5566_7700 + chunk,
    };
    let area = |n: u64| Area {
        sector: n << 40,
        sectors: 2048 - n as u32,
        digest: [0xd0 + n as u8; 32],
    };
    OriginRecord {
        device: "disk naa.5000c500".to_owned(),
        sectors: 0x1_2345_6789,
        content: Content::Ext,
        uuid: [0xee; 16],
        boot: [0xbb; 16],
        seen: -3,
        guard_seq: SnapSeq(11),
        guards: (0..8).map(guard).collect(),
        areas: (0..14).map(area).collect(),
    }
}

#[test]
fn superblock_bytes() {
    let superblock = superblock();
    let bytes = superblock.encode(1);
    golden("superblock.txt", &bytes);
    assert_eq!(Superblock::decode(&bytes, 1).as_ref(), Ok(&superblock));
    let first = Superblock {
        version: Version::V1,
        origin_record: None,
        ..superblock.clone()
    };
    let bytes = read_golden("superblock-1.txt", 4096);
    assert_eq!(Superblock::decode(&bytes, 1), Ok(first));
    assert!(
        Superblock::decode(&bytes, 0).is_err(),
        "a copy in the other one's place"
    );
    let empty = Superblock {
        revert: None,
        origin_record: None,
        snapshots: None,
        snapshot_count: 0,
        exceptions: TreeRoot::default(),
        overlays: TreeRoot::default(),
        space: TreeRoot::default(),
        ..superblock
    };
    assert_eq!(Superblock::decode(&empty.encode(0), 0).as_ref(), Ok(&empty));
}

#[test]
fn label_bytes() {
    let label = Label {
        uuid: uuid(),
        chunk: ChunkShift::new(12).unwrap(),
    };
    golden("label.txt", &label.encode());
    assert_eq!(Label::decode(&read_golden("label-1.txt", 4096)), Ok(label));
    assert_eq!(Label::decode(&label.encode()), Ok(label));
}

#[test]
fn journal_bytes() {
    let (seq, chunk, place) = (SnapSeq(3), Chunk(0x0102_0304), StoreChunk(0x0a0b));
    let entries = [
        Entry::Exception {
            chunk,
            seq,
            place,
            crc: 0xfeed_f00d,
        },
        Entry::Overlay { seq, chunk, place },
        Entry::RemoveException { chunk, seq, place },
        Entry::RemoveOverlay { seq, chunk, place },
        Entry::Create {
            seq,
            tag: SnapTag(0x55),
            created: 1_763_000_000,
            length: Sectors(9 * 32),
        },
        Entry::Delete(seq),
        Entry::Squash(seq),
        Entry::Priority(seq, -2),
        Entry::Usecount(seq, 0x1234),
        Entry::Forget(seq),
        Entry::RevertBegin(seq),
        Entry::RevertProgress { seq, next: chunk },
        Entry::RevertEnd(seq),
        Entry::Doubtful(seq),
        Entry::Opened {
            boot: *b"0123456789abcdef",
            seen: 1_763_000_001,
        },
        Entry::Guard {
            seq,
            chunk,
            digest: 0x0807_0605_0403_0201,
        },
    ];
    let id = RecordId {
        epoch: 4,
        sequence: 5,
        uuid_part: ddsnap::format::uuid_part(&uuid()),
        position: 6,
    };
    let bytes = journal::encode(&id, &entries);
    golden("journal.txt", &bytes);
    let first = read_golden("journal-1.txt", 4096);
    let old = &entries[..13];
    for (bytes, version, entries) in [
        (&bytes, Version::V2, &entries[..]),
        (&first, Version::V1, old),
    ] {
        let decoded = journal::decode(bytes, lengths(version));
        assert_eq!(decoded, Ok((id, entries.to_vec())));
    }
}

#[test]
fn leaf_bytes() {
    let entries = [
        (
            (5, 1),
            Value {
                place: 900,
                crc: 0x1111_1111,
            },
        ),
        (
            (5, 4),
            Value {
                place: 901,
                crc: 0x2222_2222,
            },
        ),
        (
            (6, 2),
            Value {
                place: 850,
                crc: 0x3333_3333,
            },
        ),
        (
            (0x1_0000, 9),
            Value {
                place: 0x10_0000,
                crc: 0x4444_4444,
            },
        ),
    ];
    let mut leaf = LeafBuilder::default();
    entries
        .iter()
        .for_each(|&(key, value)| assert!(leaf.push(key, value)));
    let (_, block) = seal(Kind::Exceptions, 0, leaf.finish(), 0);
    golden("leaf.txt", block.bytes());
    let mut reader = LeafReader::new(block).unwrap();
    let found: Vec<_> = std::iter::from_fn(|| reader.next_entry().unwrap()).collect();
    assert_eq!(found, entries);
}

#[test]
fn interior_bytes() {
    let child = |n: u64| Child {
        key: (n * 100, n),
        pointer: Pointer {
            block: MetaBlock(200 + n),
            crc: 0xb0 + n as u32,
        },
        newest: 40 + n,
    };
    let children = [child(1), child(2), child(3)];
    let (_, block) = seal(Kind::Overlays, 1, encode_interior(&children), 0);
    golden("interior.txt", block.bytes());
    assert!(Interior::new(block).unwrap().children().eq(children));
}

#[test]
fn bitmap_bytes() {
    let mut map = Bitmap::default();
    [0, 1, 9, 64, 32_255]
        .into_iter()
        .for_each(|bit| map.set(bit, true));
    let (_, block) = seal(Kind::Bitmap, 0, map.encode(), 17);
    golden("bitmap.txt", block.bytes());
    assert_eq!(Bitmap::decode(&block, 17), Ok(map));
    assert!(Bitmap::decode(&block, 18).is_err());
}

#[test]
fn snapshot_table_bytes() {
    let snapshot = |n: u64, state| Snapshot {
        seq: SnapSeq(n),
        tag: SnapTag(n as u32 + 0x70),
        state,
        priority: -(n as i8),
        usecount: n as u16 + 0x100,
        created: 1_763_000_000 + n as i64,
        length: Sectors(77 * 32),
        doubtful: n == 1,
        to_bookmark: false,
    };
    let all = [
        snapshot(1, State::Live),
        snapshot(2, State::Squashed),
        snapshot(5, State::Deleted),
    ];
    let next = Some(Pointer {
        block: MetaBlock(0x99),
        crc: 0x0bad_cafe,
    });
    let (_, block) = seal(Kind::Snapshots, 0, snaptable::encode(&all, next), 0);
    golden("snapshots.txt", block.bytes());
    let decoded = snaptable::decode(&block, lengths(Version::V2));
    assert_eq!(decoded, Ok((all.to_vec(), next)));
    let bytes = read_golden("snapshots-1.txt", 4096);
    let expected = Expected {
        pointer: Pointer {
            block: MetaBlock(0x1234),
            crc: u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]),
        },
        newest_generation: 7,
        uuid_part: ddsnap::format::uuid_part(&uuid()),
        kind: Kind::Snapshots,
        level: 0,
    };
    let block = Block::check(&bytes, &expected).expect("whole");
    let decoded = snaptable::decode(&block, lengths(Version::V1));
    let all = all.map(|snapshot| Snapshot {
        doubtful: false,
        to_bookmark: false,
        ..snapshot
    });
    assert_eq!(decoded, Ok((all.to_vec(), next)));
}

/// What is on disk of bookmarks: flag 16, state 4 and flag 2 of the table, journal entries from 18 on, marks.
#[test]
fn bytes_of_bookmarks() {
    let superblock = Superblock {
        bookmarks: true,
        revert: None,
        origin_record: None,
        ..superblock()
    };
    let bytes = superblock.encode(1);
    golden("superblock-bookmarks.txt", &bytes);
    assert_eq!(Superblock::decode(&bytes, 1), Ok(superblock));

    let snapshot = |n: u64, state, to_bookmark| Snapshot {
        seq: SnapSeq(n),
        tag: SnapTag(n as u32 + 0x70),
        state,
        priority: 0,
        usecount: 0,
        created: 1_763_000_000 + n as i64,
        length: Sectors(77 * 32),
        doubtful: n == 2,
        to_bookmark,
    };
    let all = [
        snapshot(1, State::Bookmark, false),
        snapshot(2, State::Bookmark, true),
        snapshot(3, State::Live, true),
    ];
    let (_, block) = seal(Kind::Snapshots, 0, snaptable::encode(&all, None), 0);
    golden("snapshots-bookmarks.txt", block.bytes());
    let decoded = snaptable::decode(&block, lengths(Version::V2));
    assert_eq!(decoded, Ok((all.to_vec(), None)));

    let (seq, chunk, place) = (SnapSeq(3), Chunk(0x0102_0304), StoreChunk(0x0a0b));
    let none = StoreChunk(0);
    let entries = [
        Entry::Mark { chunk, seq },
        Entry::ExceptionToMark { chunk, seq, place },
        Entry::OverlayToMark { seq, chunk, place },
        Entry::Bookmark {
            seq,
            tag: SnapTag(0x55),
            created: 1_763_000_000,
            length: Sectors(9 * 32),
        },
        Entry::ToBookmark(seq),
        Entry::WhenFull(seq, true),
        Entry::WhenFull(seq, false),
        Entry::CutBookmarks(Sectors(0x0506)),
        Entry::RemoveException {
            chunk,
            seq,
            place: none,
        },
        Entry::RemoveOverlay {
            seq,
            chunk,
            place: none,
        },
    ];
    let id = RecordId {
        epoch: 4,
        sequence: 5,
        uuid_part: ddsnap::format::uuid_part(&uuid()),
        position: 6,
    };
    let bytes = journal::encode(&id, &entries);
    golden("journal-bookmarks.txt", &bytes);
    let decoded = journal::decode(&bytes, lengths(Version::V2));
    assert_eq!(decoded, Ok((id, entries.to_vec())));

    let crc = 0x1111_1111;
    let entries = [
        ((5, 1), Value::MARK),
        ((5, 4), Value { place: 901, crc }),
        ((6, 4), Value::MARK),
        ((7, 4), Value::MARK),
    ];
    let mut leaf = LeafBuilder::default();
    entries
        .iter()
        .for_each(|&(key, value)| assert!(leaf.push(key, value)));
    let (_, block) = seal(Kind::Exceptions, 0, leaf.finish(), 0);
    golden("leaf-marks.txt", block.bytes());
    let mut reader = LeafReader::new(block).unwrap();
    let found: Vec<_> = std::iter::from_fn(|| reader.next_entry().unwrap()).collect();
    assert_eq!(found, entries);
}

/// Hostile bytes behind correct checksums: decoders may refuse or accept, never panic.
#[test]
fn decoders_never_panic() {
    let mut rng = Rng::new(20_261_122);
    let part = ddsnap::format::uuid_part(&uuid());
    for round in 0..20_000u64 {
        let mut bytes = match round % 4 {
            0 => AlignedBuf::zeroed(4096),
            1 => superblock().encode(0),
            2 => Label {
                uuid: uuid(),
                chunk: ChunkShift::MIN,
            }
            .encode(),
            _ => journal::encode(
                &RecordId {
                    epoch: 1,
                    sequence: 1,
                    uuid_part: part,
                    position: 0,
                },
                &[Entry::Delete(SnapSeq(1))],
            ),
        };
        for _ in 0..1 + rng.below(40) {
            let end = if rng.chance(80) { 700 } else { 4096 };
            let at = rng.below(end) as usize;
            bytes[at] = if rng.chance(30) {
                0xff
            } else {
                rng.next_u64() as u8
            };
        }
        // With checksums that fit, of superblock and label, then of the journal.
        let mut fixed = AlignedBuf::copy_of(&bytes);
        fixed[..8].copy_from_slice(if round % 4 == 2 {
            b"ddsnapDL"
        } else {
            b"ddsnapSB"
        });
        let version = 1 + (round / 4 % 2) as u32;
        fixed[8..12].copy_from_slice(&version.to_le_bytes());
        let crc = crc32c::crc32c_append(crc32c::crc32c(&fixed[..12]), &fixed[16..]);
        fixed[12..16].copy_from_slice(&crc.to_le_bytes());
        let _ = (
            Superblock::decode(&fixed, 0),
            Label::decode(&fixed),
            Superblock::decode(&bytes, 0),
        );
        bytes[..4].copy_from_slice(b"dsJr");
        let crc = crc32c::crc32c(&bytes[8..]);
        bytes[4..8].copy_from_slice(&crc.to_le_bytes());
        let lengths = lengths([Version::V1, Version::V2][rng.below(2) as usize]);
        let _ = journal::decode(&bytes, lengths);
        let _ = journal::decode(&bytes[..rng.below(4097) as usize], lengths);

        let mut builder = BlockBuilder::new();
        let few = rng.chance(50);
        for byte in builder.payload_mut().iter_mut() {
            *byte = if few {
                rng.below(3) as u8
            } else {
                rng.next_u64() as u8
            };
        }
        let kind = [
            Kind::Exceptions,
            Kind::Overlays,
            Kind::Space,
            Kind::Bitmap,
            Kind::Snapshots,
        ][round as usize % 5];
        let (count, used) = (
            rng.below(600) as u16,
            rng.below(PAYLOAD_LEN as u64 + 1) as u16,
        );
        let level = rng.below(3) as u8;
        let (pointer, block) = seal(kind, level, (builder, count, used), rng.below(2));
        let expected = Expected {
            pointer,
            newest_generation: 7,
            uuid_part: part,
            kind,
            level,
        };
        assert!(Block::check(block.bytes(), &expected).is_ok());
        let _ = (
            Interior::new(block.clone()),
            Bitmap::decode(&block, 0),
            snaptable::decode(&block, lengths),
        );
        if let Ok(mut reader) = LeafReader::new(block) {
            while let Ok(Some(_)) = reader.next_entry() {}
        }
    }
}
