// SPDX-License-Identifier: GPL-2.0-only
//! Deltas made from files and applied to files: all modes, all chunk sizes, wrong bases, interruptions.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::io::Cursor;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use ddsnap::delta::apply::{ApplyError, apply};
use ddsnap::delta::changelist::ChangelistWriter;
use ddsnap::delta::create::{CreateError, create};
use ddsnap::delta::extent::{Encoder, ExtentError, Mode};
use ddsnap::delta::volume::snapshot_path;
use ddsnap::delta::{FileError, Header, Side};
use ddsnap::device::memory::Rng;
use ddsnap::units::{Chunk, ChunkRun, ChunkShift, Sectors, SnapTag};

const FROM: SnapTag = SnapTag(4);
const TO: SnapTag = SnapTag(6);

/// A directory with a volume of files: `a(4)` and `a(6)` to make deltas from, `b(4)` and `b` to apply
/// them to.
struct Place {
    dir: tempfile::TempDir,
    chunk: ChunkShift,
    changed: Vec<ChunkRun>,
    from_length: Sectors,
    to: Vec<u8>,
}

fn noise(rng: &mut Rng, bytes: &mut [u8]) {
    for word in bytes.chunks_mut(8) {
        let random = rng.next_u64().to_le_bytes();
        word.copy_from_slice(&random[..word.len()]);
    }
}

impl Place {
    fn new(seed: u64, chunk_bytes: u64, from_chunks: u64, to_chunks: u64) -> Place {
        Place::of_sectors(
            seed,
            chunk_bytes,
            [from_chunks, to_chunks].map(|n| n * chunk_bytes / 512),
        )
    }

    /// The two snapshots have so many sectors each.
    fn of_sectors(seed: u64, chunk_bytes: u64, lengths: [u64; 2]) -> Place {
        let mut rng = Rng::new(seed);
        let chunk = ChunkShift::from_bytes(chunk_bytes).unwrap();
        let [from_length, to_length] = lengths.map(Sectors);
        let mut from = vec![0; from_length.to_bytes() as usize];
        // Half of it compresses.
        let half = from.len() / 2;
        noise(&mut rng, &mut from[..half]);
        let mut to = from.clone();
        to.resize(to_length.to_bytes() as usize, 0);
        let mut changed = Vec::new();
        for number in 0..to_length.to_chunks(chunk) {
            let in_chunk = |length: Sectors| length.in_chunk(Chunk(number), chunk);
            let is_new = in_chunk(from_length) < in_chunk(to_length);
            if !is_new && !rng.chance(30) {
                continue;
            }
            let start = (number * chunk_bytes) as usize;
            let data = &mut to[start..][..in_chunk(to_length).to_bytes() as usize];
            match rng.below(4) {
                0 => noise(&mut rng, data),
                1 => data.fill(0),
                2 => data[..16].copy_from_slice(b"a few bytes more"),
                _ => {} // listed, as a chunk that was written with what it had
            }
            changed.push(ChunkRun {
                first: Chunk(number),
                chunks: 1,
            });
        }
        let dir = tempfile::tempdir().unwrap();
        let place = Place {
            dir,
            chunk,
            changed,
            from_length,
            to,
        };
        for name in ["a(4)", "b(4)", "b"] {
            fs::write(place.path(name), &from).unwrap();
        }
        fs::write(place.path("a(6)"), &place.to).unwrap();
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn header(&self) -> Header {
        Header {
            chunk: self.chunk,
            from: Some(Side {
                tag: FROM,
                length: self.from_length,
            }),
            to: Side {
                tag: TO,
                length: Sectors::in_bytes(self.to.len() as u64),
            },
        }
    }

    fn changelist(&self, header: &Header, runs: &[ChunkRun]) -> Vec<u8> {
        let mut list = ChangelistWriter::new(Vec::new(), header).unwrap();
        runs.iter().for_each(|&run| list.push(run).unwrap());
        list.finish().unwrap().0
    }

    fn delta(&self, mode: Mode, level: u8) -> Vec<u8> {
        let list = self.changelist(&self.header(), &self.changed);
        let mut delta = Vec::new();
        let (mut encoder, mut done) = (Encoder::new(mode, level), 0);
        create(
            &list[..],
            &self.path("a"),
            &mut encoder,
            &mut delta,
            &mut |bytes, _| done = bytes,
        )
        .unwrap();
        let length = self.header().to.length;
        let changed = self.changed.iter();
        let listed: u64 = changed
            .map(|run| run.bytes_within(length, self.chunk))
            .sum();
        assert_eq!(done, listed);
        delta
    }

    fn apply(&self, delta: &[u8]) -> Result<(), ApplyError> {
        apply(Cursor::new(delta), &self.path("b"), &mut |_, _| {})
    }

    fn content(&self) -> Vec<u8> {
        fs::read(self.path("b")).unwrap()
    }
}

#[test]
fn every_mode_and_chunk_size_comes_over() {
    let sizes = [
        (512, 5000),
        (4096, 700),
        (16384, 200),
        (65536, 60),
        (1 << 20, 5),
    ];
    for (seed, (chunk_bytes, chunks)) in (1..).zip(sizes) {
        let whole = chunks * chunk_bytes / 512;
        let fewer = (chunks - 2) * chunk_bytes / 512;
        for (from, to) in [
            (whole, whole),
            (whole, fewer),
            (fewer, whole),
            (whole - 1, whole - 1),
            (fewer + 1, whole - 1),
            (whole - 1, fewer + 1),
            (fewer + 1, fewer + 2),
        ] {
            let place = Place::of_sectors(seed, chunk_bytes, [from, to]);
            let old = fs::read(place.path("b")).unwrap();
            let mut lengths = Vec::new();
            for (mode, level) in [
                (Mode::Best, 0),
                (Mode::Best, 9),
                (Mode::Difference, 3),
                (Mode::Raw, 0),
                (Mode::Raw, 6),
            ] {
                fs::write(place.path("b"), &old).unwrap();
                let delta = place.delta(mode, level);
                place.apply(&delta).unwrap();
                let context = format!("{mode:?} {level} {chunk_bytes} {from} {to}");
                assert!(place.content() == place.to, "{context}");
                // Once more is no harm.
                place.apply(&delta).unwrap();
                assert!(place.content() == place.to, "{context}");
                lengths.push(delta.len());
            }
            assert!(
                lengths[1] <= lengths[0] && lengths[0] <= lengths[3],
                "{lengths:?}"
            );
            // Of few chunks all may be noise, or none changed.
            assert!(lengths[4] <= lengths[3], "{lengths:?}");
            assert!(chunks < 60 || lengths[4] < lengths[3], "{lengths:?}");
        }
    }
}

#[test]
fn a_whole_snapshot_needs_no_base() {
    let place = Place::new(7, 4096, 100, 100);
    let header = Header {
        from: None,
        ..place.header()
    };
    let all = ChunkRun {
        first: Chunk(0),
        chunks: 100,
    };
    fs::remove_file(place.path("a(4)")).unwrap();
    fs::remove_file(place.path("b(4)")).unwrap();
    fs::write(place.path("b"), b"something else, of another length").unwrap();
    let list = place.changelist(&header, &[all]);
    let mut delta = Vec::new();
    let mut encoder = Encoder::new(Mode::Best, 9);
    create(
        &list[..],
        &place.path("a"),
        &mut encoder,
        &mut delta,
        &mut |_, _| {},
    )
    .unwrap();
    place.apply(&delta).unwrap();
    assert!(place.content() == place.to);
}

/// One byte of the base is another, in the last extent: nothing at all may be written.
#[test]
fn a_wrong_base_is_refused_before_anything_is_written() {
    let place = Place::new(8, 4096, 300, 300);
    let delta = place.delta(Mode::Best, 0);
    let before = place.content();
    let mut base = before.clone();
    let last = place.changed.last().unwrap().first.to_offset(place.chunk) as usize;
    // The byte sums of the original could not tell.
    base[last + 8..last + 4096].rotate_left(1);
    if base == before {
        base[last] ^= 1;
    }
    fs::write(place.path("b(4)"), &base).unwrap();
    match place.apply(&delta) {
        Err(ApplyError::Refused { chunk, source, .. }) => {
            assert_eq!(source, ExtentError::Base);
            assert!(chunk <= place.changed.last().unwrap().first.0);
        }
        other => panic!("{other:?}"),
    }
    assert!(place.content() == before);

    fs::write(place.path("b(4)"), &before[..before.len() - 1]).unwrap();
    assert!(matches!(place.apply(&delta), Err(ApplyError::Volume(_))));
    fs::remove_file(place.path("b(4)")).unwrap();
    assert!(matches!(place.apply(&delta), Err(ApplyError::Volume(_))));
    assert!(place.content() == before);
}

#[test]
fn a_damaged_delta_is_refused_before_anything_is_written() {
    let place = Place::new(9, 512, 60, 60);
    let delta = place.delta(Mode::Best, 0);
    let before = place.content();
    let mut rng = Rng::new(9);
    for _ in 0..300 {
        let mut bent = delta.clone();
        bent[rng.below(delta.len() as u64) as usize] ^= 1 << rng.below(8);
        assert!(place.apply(&bent).is_err());
        let length = rng.below(delta.len() as u64) as usize;
        assert!(matches!(
            place.apply(&delta[..length]),
            Err(ApplyError::File(FileError::Truncated { .. }))
        ));
    }
    assert!(place.content() == before);
}

/// The base may be the volume itself: then an extent that is done no longer has the base's data.
#[test]
fn an_interrupted_apply_is_finished_by_another() {
    for own_base in [false, true] {
        let place = Place::new(10, 4096, 800, 800);
        if own_base {
            fs::remove_file(place.path("b(4)")).unwrap();
            symlink("b", place.path("b(4)")).unwrap();
        }
        let delta = place.delta(Mode::Difference, 0);
        let mut half = place.content();
        let middle = half.len() / 2;
        half[..middle].copy_from_slice(&place.to[..middle]);
        fs::write(place.path("b"), &half).unwrap();
        if !own_base {
            place.apply(&delta).unwrap();
        } else {
            // An extent that was written in part is neither old nor new: of a power cut in the
            // middle of its write. Only another base can help.
            place.apply(&delta).unwrap_or_else(|error| match error {
                ApplyError::Refused { .. } => {
                    let mut clean = half.clone();
                    let end = middle.next_multiple_of(1 << 20).min(clean.len());
                    clean[middle..end].copy_from_slice(&place.to[middle..end]);
                    fs::write(place.path("b"), &clean).unwrap();
                    place.apply(&delta).unwrap();
                }
                other => panic!("{other}"),
            });
        }
        assert!(place.content() == place.to, "own base: {own_base}");
    }
}

#[test]
fn create_refuses_what_does_not_fit() {
    let place = Place::new(11, 4096, 50, 50);
    let list = place.changelist(&place.header(), &place.changed);
    let make = |list: &[u8]| {
        let mut encoder = Encoder::new(Mode::Best, 0);
        create(
            list,
            &place.path("a"),
            &mut encoder,
            Vec::new(),
            &mut |_, _| {},
        )
        .unwrap_err()
    };
    let mut bent = list.clone();
    *bent.last_mut().unwrap() ^= 1;
    assert!(matches!(make(&bent), CreateError::Changelist(_)));
    File::options()
        .write(true)
        .open(place.path("a(6)"))
        .unwrap()
        .set_len(50 * 4096 - 1)
        .unwrap();
    let error = make(&list);
    let CreateError::Volume(short) = error else {
        panic!("{error:?}")
    };
    assert!(
        short
            .to_string()
            .ends_with("a(6) has 204799 bytes, but 204800 are needed")
    );
    fs::remove_file(place.path("a(6)")).unwrap();
    assert!(make(&list).to_string().starts_with("cannot open "));
    assert_eq!(
        snapshot_path(Path::new("/dev/mapper/v"), TO),
        Path::new("/dev/mapper/v(6)")
    );
}
