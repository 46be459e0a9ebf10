// SPDX-License-Identifier: GPL-2.0-only
//! Changelist and delta files: as they come, and the same bytes as records behind right checksums.

use ddsnap::delta::changelist::{self, ChangelistReader, ChangelistWriter};
use ddsnap::delta::file::DeltaReader;
use ddsnap::delta::record::RecordWriter;
use ddsnap::delta::{Header, Side, stream};
use ddsnap::units::{ChunkShift, Sectors, SnapTag};

use super::input::Input;

/// Runs and extents looked at: more are more of the same.
const MOST: usize = 2000;

pub fn run(data: &[u8]) {
    read_list(data);
    read_delta(data);
    read_connection(data);
    let mut input = Input(data);
    let Some(chunk) = ChunkShift::new(9 + input.u8() % 12) else {
        return;
    };
    let incremental = input.u8() % 2 == 0;
    let header = Header {
        chunk,
        from: incremental.then_some(Side {
            tag: SnapTag(1),
            length: Sectors(input.edge()),
        }),
        to: Side {
            tag: SnapTag(2),
            length: Sectors(input.edge()),
        },
    };
    for magic in [b"ddsnapCL", b"ddsnapDF"] {
        let mut input = input;
        let mut records = RecordWriter::new(Vec::new(), &header, magic).unwrap();
        while !input.is_empty() {
            let (kind, length) = (input.u8() % 4, usize::from(input.u16()));
            records.put(kind.into(), &[input.bytes(length)]).unwrap();
        }
        let file = records.into_inner();
        read_list(&file);
        read_delta(&file);
    }
}

/// What comes over a connection before a delta, and back.
fn read_connection(data: &[u8]) {
    if let Ok(preface) = stream::read_preface(&mut &data[..]) {
        assert!(data.starts_with(&preface.encode()));
    }
    if let Ok(text) = stream::hear(&mut &data[..], "done") {
        assert!(text.len() < 3 * stream::MAX_LINE);
    }
}

fn read_list(file: &[u8]) {
    let Ok(mut list) = ChangelistReader::new(file) else {
        return;
    };
    let header = *list.header();
    let (mut runs, mut end) = (Vec::new(), 0);
    let whole = loop {
        match list.next_run() {
            Ok(Some(run)) => {
                assert!(run.chunks > 0 && run.first.0 >= end);
                end = run.first.0 + run.chunks;
                assert!(end <= header.to_chunks());
                runs.push(run);
                if runs.len() == MOST {
                    return;
                }
            }
            Ok(None) => break true,
            Err(_) => break false,
        }
    };
    // A list that was read can be written, and is the same one then.
    let mut writer = ChangelistWriter::new(Vec::new(), &header).unwrap();
    for &run in &runs {
        writer.push(run).unwrap();
    }
    let (again, chunks) = writer.finish().unwrap();
    assert_eq!(chunks, runs.iter().map(|run| run.chunks).sum::<u64>());
    let read = changelist::verify(&again[..]).unwrap();
    assert!(!whole || read == changelist::verify(file).unwrap());
}

fn read_delta(file: &[u8]) {
    let Ok(mut delta) = DeltaReader::new(file) else {
        return;
    };
    let header = *delta.header();
    let (old, mut new) = (vec![7; 1 << 20], Vec::new());
    let mut end = 0;
    for _ in 0..MOST {
        let Ok(Some(extent)) = delta.next_extent() else {
            return;
        };
        assert!(extent.run.chunks > 0 && extent.run.first.0 >= end);
        end = extent.run.first.0 + extent.run.chunks;
        assert!(end <= header.to_chunks());
        let bytes = extent.bytes(&header);
        for base in [&old[..bytes.min(old.len())], &[]] {
            if extent.decode(base, bytes, &mut new).is_ok() {
                assert_eq!(new.len(), bytes);
            }
        }
    }
}
