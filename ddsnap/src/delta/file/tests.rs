// SPDX-License-Identifier: GPL-2.0-only
//! The bytes of a delta, and what happens to bytes that are none.

use super::*;
use crate::delta::extent::{Encoder, Mode, hash};
use crate::delta::record::{HEADER_BYTES, Side};
use crate::units::{ChunkShift, Sectors, SnapTag};

fn header() -> Header {
    Header {
        chunk: ChunkShift::MIN,
        from: Some(Side {
            tag: SnapTag(4),
            length: Sectors(6),
        }),
        to: Side {
            tag: SnapTag(6),
            length: Sectors(9),
        },
    }
}

fn extent(first: u64, data: &[u8]) -> Extent<'_> {
    Extent {
        run: ChunkRun {
            first: Chunk(first),
            chunks: data.len() as u64 / 512,
        },
        coding: Coding::Raw,
        level: 0,
        base: [3; 32],
        result: [4; 32],
        data,
    }
}

fn file(header: &Header, extents: &[Extent<'_>]) -> Vec<u8> {
    let mut writer = DeltaWriter::new(Vec::new(), header).unwrap();
    for extent in extents {
        writer.push(extent).unwrap();
    }
    writer.finish().unwrap()
}

/// Reads all; gives the number of extents.
fn read(bytes: &[u8]) -> Result<usize, FileError> {
    let mut reader = DeltaReader::new(bytes)?;
    let mut count = 0;
    while reader.next_extent()?.is_some() {
        count += 1;
    }
    assert!(reader.next_extent().unwrap().is_none());
    Ok(count)
}

#[test]
fn a_delta_is_these_bytes() {
    let data = [9; 512];
    let golden = |version, header_crc: [u8; 4], crcs: [[u8; 4]; 2]| {
        [
            b"ddsnapDF".as_slice(),
            &[version, 0, 0, 0],
            &header_crc,               // crc32c of the header
            &[9, 0, 0, 0],             // chunk size
            &[1, 0, 0, 0],             // there is a first snapshot
            &[4, 0, 0, 0],             // its tag
            &[6, 0, 0, 0],             // tag of the second
            &[6, 0, 0, 0, 0, 0, 0, 0], // sectors of the first; chunks in version 1
            &[9, 0, 0, 0, 0, 0, 0, 0], // of the second
            &[0; 16],                  // reserved
            &[1, 0, 0, 0],             // an extent
            &[0x50, 2, 0, 0],          // bytes
            &[0; 8],                   // number
            &crcs[0],                  // crc32c
            &[0; 4],                   // reserved
            &[8, 0, 0, 0, 0, 0, 0, 0], // first chunk
            &[1, 0, 0, 0],             // chunks
            &[2, 0],                   // raw, not compressed
            &[0; 2],                   // reserved
            &[3; 32],                  // SHA-256 of the base
            &[4; 32],                  // SHA-256 of the result
            &data,
            &[2, 0, 0, 0],             // the end
            &[16, 0, 0, 0],            // bytes
            &[1, 0, 0, 0, 0, 0, 0, 0], // number
            &crcs[1],                  // crc32c
            &[0; 4],                   // reserved
            &[1, 0, 0, 0, 0, 0, 0, 0], // extents
            &[1, 0, 0, 0, 0, 0, 0, 0], // chunks
        ]
        .concat()
    };
    let first = golden(
        1,
        [0xc1, 0xa9, 0xe8, 0x46],
        [[0xa5, 0xc9, 0x7f, 0xe2], [0x3a, 0x10, 0xe1, 0xb7]],
    );
    let second = golden(
        2,
        [0xce, 0xc2, 0xb7, 0xaf],
        [[0x36, 0xf8, 0x6b, 0x5b], [0xff, 0x7e, 0x26, 0x93]],
    );
    assert_eq!(file(&header(), &[extent(8, &data)]), second);
    for bytes in [first, second] {
        let mut reader = DeltaReader::new(&bytes[..]).unwrap();
        assert_eq!(*reader.header(), header());
        assert_eq!(reader.next_extent().unwrap(), Some(extent(8, &data)));
        assert_eq!(reader.chunks(), 1);
        assert_eq!(reader.next_extent().unwrap(), None);
    }
}

/// The last chunk of a snapshot is short: an extent has as many bytes as there are of it.
#[test]
fn the_last_extent_may_be_short() {
    let header = Header {
        chunk: ChunkShift::new(12).unwrap(),
        from: None,
        to: Side {
            tag: SnapTag(6),
            length: Sectors(17),
        },
    };
    let last = |data| Extent {
        run: ChunkRun {
            first: Chunk(1),
            chunks: 2,
        },
        ..extent(1, data)
    };
    assert_eq!(read(&file(&header, &[last(&[1; 4608])])).unwrap(), 1);
    let data = [1; 8192];
    for wrong in [4096, 5120, 8192] {
        let bytes = file(&header, &[last(&data[..wrong])]);
        assert!(read(&bytes).is_err(), "{wrong}");
    }
}

#[test]
fn every_flipped_bit_and_every_missing_byte_is_noticed() {
    let (old, new) = ([1; 1024], [2; 1024]);
    let mut encoder = Encoder::new(Mode::Best, 1);
    let part = ChunkRun {
        first: Chunk(2),
        chunks: 2,
    };
    let small = encoder.encode(part, &old, &new);
    let bytes = file(&header(), &[small, extent(8, &[7; 512])]);
    assert_eq!(read(&bytes).unwrap(), 2);
    for bit in 0..bytes.len() * 8 {
        let mut bent = bytes.clone();
        bent[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&bent).is_err(), "bit {bit}");
    }
    for length in 0..bytes.len() {
        assert!(
            matches!(read(&bytes[..length]), Err(FileError::Truncated { .. })),
            "{length} bytes"
        );
    }
    assert!(read(&[&bytes[..], &[0]].concat()).is_err());
    assert_eq!(read(&file(&header(), &[])).unwrap(), 0);
    assert!(bytes.len() > HEADER_BYTES);
}

#[test]
fn extents_that_make_no_sense_are_refused() {
    let data: &'static [u8] = &[0; 1024];
    let good = extent(2, data);
    let change = |change: &dyn Fn(&mut Extent<'_>)| {
        let mut bad = good;
        change(&mut bad);
        file(&header(), &[bad])
    };
    let full = Header {
        from: None,
        ..header()
    };
    let difference = Extent {
        coding: Coding::Difference,
        level: 1,
        data: &data[..9],
        ..good
    };
    let wide = Header {
        to: Side {
            tag: SnapTag(6),
            length: Sectors(9000),
        },
        ..header()
    };
    let mib = vec![0; MAX_EXTENT_BYTES + 512];
    let files = [
        ("beyond the end", change(&|e| e.run.first = Chunk(8))),
        (
            "at the end of numbers",
            change(&|e| e.run.first = Chunk(u64::MAX)),
        ),
        ("no chunk", change(&|e| e.run.chunks = 0)),
        ("too much data", change(&|e| e.run.chunks = 1)),
        ("too little data", change(&|e| e.run.chunks = 3)),
        (
            "level 10",
            change(&|e| (e.level, e.data) = (10, &data[..9])),
        ),
        ("compressed to no less", change(&|e| e.level = 1)),
        ("no data", change(&|e| (e.level, e.data) = (1, &[]))),
        (
            "difference as it is",
            change(&|e| e.coding = Coding::Difference),
        ),
        ("difference to nothing", file(&full, &[difference])),
        (
            "difference behind the end",
            change(&|e| {
                *e = Extent {
                    run: ChunkRun {
                        first: Chunk(6),
                        chunks: 2,
                    },
                    ..difference
                }
            }),
        ),
        ("twice", file(&header(), &[good, extent(3, data)])),
        ("backwards", file(&header(), &[extent(4, data), good])),
        ("longer than a MiB", file(&wide, &[extent(0, &mib)])),
    ];
    for (name, bytes) in files {
        assert!(
            matches!(read(&bytes), Err(FileError::Malformed { .. })),
            "{name}"
        );
    }
    assert_eq!(read(&file(&header(), &[difference])).unwrap(), 1);
    assert_eq!(read(&file(&wide, &[extent(0, &mib[512..])])).unwrap(), 1);
    assert_ne!(hash(data), hash(&data[1..]));
}

#[test]
fn unknown_codings_records_and_totals_are_refused() {
    let data = [0; 512];
    let good = file(&header(), &[extent(2, &data)]);
    let payload = good[HEADER_BYTES + 24..][..EXTENT_BYTES + 512].to_vec();
    let end = |extents: u64, chunks: u64| [extents.to_le_bytes(), chunks.to_le_bytes()].concat();
    let bend = |at: usize, value: u8| {
        let mut bent = payload.clone();
        bent[at] = value;
        bent
    };
    let files: &[(&str, u32, Vec<u8>, Vec<u8>)] = &[
        ("coding", EXTENT, bend(CODING_AT, 3), end(1, 1)),
        ("reserved", EXTENT, bend(RESERVED_AT, 1), end(1, 1)),
        ("kind", 9, payload.clone(), end(1, 1)),
        (
            "only a head",
            EXTENT,
            payload[..EXTENT_BYTES].to_vec(),
            end(1, 1),
        ),
        ("extents", EXTENT, payload.clone(), end(2, 1)),
        ("chunks", EXTENT, payload.clone(), end(1, 2)),
        ("end", EXTENT, payload.clone(), vec![0; 17]),
    ];
    for (name, kind, payload, end) in files {
        let mut writer = RecordWriter::new(Vec::new(), &header(), MAGIC).unwrap();
        writer.put(*kind, &[payload]).unwrap();
        writer.put(END, &[end]).unwrap();
        let bytes = writer.into_inner();
        assert!(
            matches!(read(&bytes), Err(FileError::Malformed { .. })),
            "{name}"
        );
    }
}

/// A length is not believed before the bytes are there.
#[test]
fn a_record_longer_than_any_may_be_is_refused() {
    let mut bytes = file(&header(), &[]);
    bytes[HEADER_BYTES + 4..HEADER_BYTES + 8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(matches!(read(&bytes), Err(FileError::Malformed { .. })));
}
