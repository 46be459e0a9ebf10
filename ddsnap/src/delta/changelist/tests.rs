// SPDX-License-Identifier: GPL-2.0-only
//! The bytes of a changelist, and what happens to bytes that are none.

use super::*;
use crate::delta::record::{HEADER_BYTES, RECORD_BYTES, Side};
use crate::units::{ChunkShift, Sectors, SnapTag};

fn header() -> Header {
    Header {
        chunk: ChunkShift::new(12).unwrap(),
        from: Some(Side {
            tag: SnapTag(0x0403_0201),
            length: Sectors(300 * 8),
        }),
        to: Side {
            tag: SnapTag(6),
            length: Sectors(0x0102_0304 * 8),
        },
    }
}

fn run(first: u64, chunks: u64) -> ChunkRun {
    ChunkRun {
        first: Chunk(first),
        chunks,
    }
}

fn file(runs: &[ChunkRun]) -> Vec<u8> {
    let mut writer = ChangelistWriter::new(Vec::new(), &header()).unwrap();
    for &run in runs {
        writer.push(run).unwrap();
    }
    let (bytes, chunks) = writer.finish().unwrap();
    assert_eq!(chunks, runs.iter().map(|run| run.chunks).sum::<u64>());
    bytes
}

fn read(bytes: &[u8]) -> Result<Vec<ChunkRun>, FileError> {
    let mut reader = ChangelistReader::new(bytes)?;
    let mut runs = Vec::new();
    while let Some(run) = reader.next_run()? {
        runs.push(run);
    }
    assert!(reader.next_run().unwrap().is_none());
    Ok(runs)
}

#[test]
fn a_changelist_is_these_bytes() {
    let golden = |version, header_crc: [u8; 4], lengths: [[u8; 8]; 2], crcs: [[u8; 4]; 2]| {
        [
            b"ddsnapCL".as_slice(),
            &[version, 0, 0, 0],
            &header_crc,               // crc32c of the header
            &[12, 0, 0, 0],            // chunk size
            &[1, 0, 0, 0],             // there is a first snapshot
            &[1, 2, 3, 4],             // its tag
            &[6, 0, 0, 0],             // tag of the second
            &lengths[0],               // sectors of the first; chunks in version 1
            &lengths[1],               // of the second
            &[0; 16],                  // reserved
            &[1, 0, 0, 0],             // runs
            &[5, 0, 0, 0],             // bytes
            &[0; 8],                   // number
            &crcs[0],                  // crc32c
            &[0; 4],                   // reserved
            &[2, 0],                   // chunk 2
            &[0xc8, 1, 2],             // 200 further on, chunks 203 to 205
            &[2, 0, 0, 0],             // the end
            &[16, 0, 0, 0],            // bytes
            &[1, 0, 0, 0, 0, 0, 0, 0], // number
            &crcs[1],                  // crc32c
            &[0; 4],                   // reserved
            &[4, 0, 0, 0, 0, 0, 0, 0], // chunks
            &[2, 0, 0, 0, 0, 0, 0, 0], // runs
        ]
        .concat()
    };
    let first = golden(
        1,
        [0x93, 0xdd, 0x9c, 0xfa],
        [[44, 1, 0, 0, 0, 0, 0, 0], [4, 3, 2, 1, 0, 0, 0, 0]],
        [[0x53, 0xc6, 0x34, 0x53], [0x2e, 0xb7, 0x1a, 0x88]],
    );
    let second = golden(
        2,
        [0x74, 0x86, 0x96, 0x01],
        [
            [0x60, 9, 0, 0, 0, 0, 0, 0],
            [0x20, 0x18, 0x10, 8, 0, 0, 0, 0],
        ],
        [[0x26, 0xfd, 0x61, 0xd1], [0x21, 0xf9, 0xd4, 0x79]],
    );
    let bytes = file(&[run(2, 1), run(203, 1), run(204, 2)]);
    assert_eq!(bytes, second);
    for golden in [first, second] {
        assert_eq!(read(&golden).unwrap(), [run(2, 1), run(203, 3)]);
        let list = ChangelistReader::new(&golden[..]).unwrap();
        assert_eq!(*list.header(), header());
    }
}

#[test]
fn no_change_is_a_whole_file_too() {
    let bytes = file(&[]);
    assert_eq!(bytes.len(), HEADER_BYTES + RECORD_BYTES + END_BYTES);
    assert_eq!(read(&bytes).unwrap(), []);
    assert_eq!(verify(&bytes[..]).unwrap(), (header(), 0));
}

#[test]
fn many_runs_come_back_from_many_records() {
    let runs: Vec<ChunkRun> = (0..20_000)
        .map(|n| run(n * n / 50 + 3 * n, 1 + n % 2))
        .collect();
    let bytes = file(&runs);
    assert!(bytes.len() > 8 * RUNS_BYTES, "{} bytes", bytes.len());
    assert_eq!(read(&bytes).unwrap(), runs);
    let whole = [run(0, header().to_chunks())];
    assert_eq!(read(&file(&whole)).unwrap(), whole);
}

#[test]
fn every_flipped_bit_and_every_missing_byte_is_noticed() {
    let bytes = file(&[run(2, 1), run(203, 3)]);
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
    let longer = [&bytes[..], &[0]].concat();
    assert!(matches!(read(&longer), Err(FileError::Malformed { .. })));
}

/// Bytes behind right checksums that cannot be: made by a writer with a bug, or by an enemy.
#[test]
fn nonsense_behind_right_checksums_is_refused() {
    let end = |chunks: u64, runs: u64| [chunks.to_le_bytes(), runs.to_le_bytes()].concat();
    type Records<'a> = &'a [(u32, Vec<u8>)];
    let files: &[(&str, Records<'_>)] = &[
        (
            "beyond the end",
            &[(RUNS, vec![0x84, 0x86, 0x88, 8, 0]), (END, end(1, 1))],
        ),
        (
            "neighbours apart",
            &[(RUNS, vec![2, 0, 0, 0]), (END, end(2, 2))],
        ),
        ("cut short", &[(RUNS, vec![2]), (END, end(0, 0))]),
        ("no bytes", &[(RUNS, vec![]), (END, end(0, 0))]),
        ("wrong totals", &[(RUNS, vec![2, 0]), (END, end(2, 1))]),
        ("wrong number", &[(RUNS, vec![2, 0]), (END, end(1, 2))]),
        ("short end", &[(RUNS, vec![2, 0]), (END, vec![0; 15])]),
        ("unknown", &[(3, vec![2, 0]), (END, end(1, 1))]),
        (
            "2^64 chunks",
            &[
                (RUNS, [vec![1], vec![0xff; 9], vec![1]].concat()),
                (END, end(1, 1)),
            ],
        ),
    ];
    for (name, records) in files {
        let mut writer = RecordWriter::new(Vec::new(), &header(), MAGIC).unwrap();
        for (kind, payload) in *records {
            writer.put(*kind, &[payload]).unwrap();
        }
        let bytes = writer.into_inner();
        assert!(
            matches!(read(&bytes), Err(FileError::Malformed { .. })),
            "{name}"
        );
    }
}

#[test]
fn records_of_another_file_or_place_are_refused() {
    let runs = |from: u64| -> Vec<ChunkRun> { (0..3000).map(|n| run(from + 2 * n, 1)).collect() };
    let one = file(&runs(0));
    let record = HEADER_BYTES..HEADER_BYTES + RECORD_BYTES;
    let length = get_u64(&one[record.clone()], 0) >> 32;
    let second = record.end + length as usize;
    // Without its first record of runs.
    let cut = [&one[..HEADER_BYTES], &one[second..]].concat();
    assert!(matches!(
        read(&cut),
        Err(FileError::Damaged {
            what: "the number of a record",
            ..
        })
    ));
    // The header of another file.
    let mut other = header();
    other.to.tag = SnapTag(7);
    let mixed = [&other.encode(MAGIC)[..], &one[HEADER_BYTES..]].concat();
    assert!(matches!(read(&mixed), Err(FileError::Damaged { .. })));
}

#[test]
fn headers_that_make_no_sense_are_refused() {
    let refused = |change: &dyn Fn(&mut [u8])| {
        let mut bytes = header().encode(MAGIC);
        change(&mut bytes);
        let crc = crc32c::crc32c(&bytes[..12]);
        let crc = crc32c::crc32c_append(crc, &bytes[16..]);
        bytes[12..16].copy_from_slice(&crc.to_le_bytes());
        Header::decode(&bytes, MAGIC, WHAT).unwrap_err()
    };
    assert!(matches!(
        refused(&|bytes| bytes[0] = b'x'),
        FileError::Magic { .. }
    ));
    assert!(matches!(
        refused(&|bytes| bytes[8] = 3),
        FileError::Version { found: 3 }
    ));
    type Change<'a> = &'a dyn Fn(&mut [u8]);
    let makes_no_sense: [Change<'_>; 6] = [
        &|bytes| bytes[16] = 8,
        &|bytes| bytes[17] = 1,
        &|bytes| bytes[20] = 3,
        &|bytes| bytes[20] = 0,
        &|bytes| bytes[47] = 1,
        &|bytes| bytes[63] = 1,
    ];
    for (index, change) in makes_no_sense.iter().enumerate() {
        let error = refused(change);
        assert!(
            matches!(error, FileError::Malformed { .. }),
            "{index}: {error}"
        );
    }
}

#[test]
fn a_writer_refuses_runs_out_of_order() {
    for runs in [
        [run(5, 1), run(4, 1)],
        [run(5, 2), run(6, 1)],
        [run(5, 0), run(9, 1)],
    ] {
        let mut writer = ChangelistWriter::new(Vec::new(), &header()).unwrap();
        let pushed = runs.iter().try_for_each(|&run| writer.push(run));
        assert!(pushed.is_err() || writer.finish().is_err(), "{runs:?}");
    }
}
