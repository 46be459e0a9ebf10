// SPDX-License-Identifier: GPL-2.0-only
use super::*;

const CHUNK: usize = 4096;

fn shape() -> Shape {
    Shape {
        chunk: ChunkShift::new(12).unwrap(),
        length: Sectors(1000 * 8 + 1),
        base_length: Sectors(1000 * 8 + 1),
    }
}

fn run(first: u64, chunks: u64) -> ChunkRun {
    ChunkRun {
        first: Chunk(first),
        chunks,
    }
}

fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut data = vec![0; bytes];
    let mut reader = blake3::Hasher::new_derive_key("test noise");
    reader.update(&seed.to_le_bytes());
    reader.finalize_xof().fill(&mut data);
    data
}

fn packed(level: u8, runs: &[ChunkRun], old: Option<&[u8]>, new: &[u8]) -> Vec<u8> {
    let mut encoder = Encoder::new(level);
    let (old_digests, digests) = (digests(runs, old.unwrap_or_default()), digests(runs, new));
    let old = old.map(|old| (old, &old_digests));
    let (mut payload, data) = encoder.encode(runs, old, (new, &digests));
    payload.extend_from_slice(data);
    payload
}

fn digests(runs: &[ChunkRun], data: &[u8]) -> Digests {
    let mut digests = Digests::default();
    // What tests make up needs not be a volume's.
    if runs
        .iter()
        .all(|run| run.chunks < 3000 && run.first.0 < 3000)
    {
        digests.fill(shape().chunk, shape().length, runs, data);
    }
    digests
}

fn unpack(extent: &Extent<'_>, old: &[u8], new: &mut Vec<u8>) -> Result<(), ExtentError> {
    let base = digests(&extent.runs, old);
    extent.unpack(&shape(), (old, &base), (new, &mut Digests::default()))
}

fn coding(payload: &[u8]) -> Coding {
    Extent::decode(payload, &shape(), 0).unwrap().coding
}

#[test]
fn each_coding_gives_back_what_was_put_in() {
    let runs = [run(3, 2), run(9, 1), run(1000, 1)];
    let bytes = shape().bytes(&runs) as usize;
    assert_eq!(bytes, 3 * CHUNK + 512, "the last chunk is a short one");
    let old = noise(1, bytes);
    let mut changed = old.clone();
    changed[5000..5100].fill(7);
    let text: Vec<u8> = b"all work and no play "
        .iter()
        .copied()
        .cycle()
        .take(bytes)
        .collect();
    for (level, old, new, expected) in [
        (0, Some(&old), &text, Coding::Raw),
        (3, Some(&old), &noise(2, bytes), Coding::Raw),
        (3, None, &text, Coding::Zstd),
        (3, Some(&old), &changed, Coding::Difference),
    ] {
        let old = old.map(Vec::as_slice);
        let payload = packed(level, &runs, old, new);
        let extent = Extent::decode(&payload, &shape(), 3).unwrap();
        assert_eq!(extent.coding, expected);
        assert_eq!(extent.runs, runs);
        let mut unpacked = Vec::new();
        unpack(&extent, old.unwrap_or_default(), &mut unpacked).unwrap();
        assert_eq!(unpacked, *new);
        assert!(payload.len() <= super::super::frame::MAX_EXTENT_PAYLOAD);
    }
    let payload = packed(3, &runs, Some(&old), &changed);
    assert!(payload.len() < 400, "{}", payload.len());
}

#[test]
fn zeros_need_no_data() {
    let runs = [run(0, 1001)];
    let payload = zeros(&runs, shape().bytes(&runs));
    assert_eq!(payload.len(), 72 + 12);
    let extent = Extent::decode(&payload, &shape(), 0).unwrap();
    assert_eq!(extent.coding, Coding::Zero);
    assert_eq!(extent.bytes, 1000 * 4096 + 512);
}

/// Applied to another base a difference would give garbage that looks like data.
#[test]
fn another_base_is_refused() {
    let (old, mut other) = (noise(1, CHUNK), noise(1, CHUNK));
    other[77] ^= 1;
    let mut new = old.clone();
    new[0] ^= 1;
    for level in [0, 3] {
        let payload = packed(level, &[run(5, 1)], Some(&old), &new);
        let extent = Extent::decode(&payload, &shape(), 0).unwrap();
        let mut into = Vec::new();
        for wrong in [&other[..], &old[1..], &[]] {
            let refused = unpack(&extent, wrong, &mut into);
            assert_eq!(refused, Err(ExtentError::Base { chunk: 5 }));
        }
        assert_eq!(unpack(&extent, &old, &mut into), Ok(()));
    }
}

#[test]
fn damaged_data_is_never_a_result() {
    let runs = [run(5, 2)];
    let old = noise(1, 2 * CHUNK);
    let mut new = old.clone();
    new[100..4200].fill(3);
    for old in [None, Some(old.as_slice())] {
        let payload = packed(3, &runs, old, &new);
        for at in 72 + 12..payload.len() {
            let mut bad = payload.clone();
            bad[at] ^= 0x10;
            let extent = Extent::decode(&bad, &shape(), 0).unwrap();
            let mut into = Vec::new();
            // A flipped bit that zstd does not mind gives the right data or none.
            if unpack(&extent, old.unwrap_or_default(), &mut into).is_ok() {
                assert_eq!(into, new, "byte {at}");
            }
        }
    }
}

/// A hostile extent must not reach chunks it may not.
#[test]
fn runs_are_in_order_and_within_bounds() {
    let data = noise(1, 2 * CHUNK);
    for (runs, from) in [
        (vec![run(5, 1), run(5, 1)], 0),
        (vec![run(6, 1), run(5, 1)], 0),
        (vec![run(5, 2)], 6),
        (vec![run(999, 3)], 0),
        (vec![run(u64::MAX, 2)], 0),
        (vec![run(5, 0), run(6, 2)], 0),
        (vec![run(5, 3)], 0),
        (vec![], 0),
    ] {
        let payload = packed(0, &runs, None, &data);
        let refused = Extent::decode(&payload, &shape(), from);
        assert!(
            matches!(refused, Err(ExtentError::Runs(_))),
            "{runs:?} {refused:?}"
        );
    }
    let good = packed(0, &[run(5, 2)], None, &data);
    assert_eq!(coding(&good), Coding::Raw);
    for length in 0..72 + 12 {
        assert!(Extent::decode(&good[..length], &shape(), 0).is_err());
    }
    let mut unbased = good;
    unbased[0] = Coding::Difference as u8;
    assert!(Extent::decode(&unbased, &shape(), 0).is_err());
}

/// Two programs of one version must agree on the bytes.
#[test]
fn the_bytes_of_an_extent_are_pinned() {
    let payload = packed(0, &[run(5, 1), run(7, 1)], Some(&[1; 8192]), &[2; 8192]);
    assert_eq!(payload[..8], [2, 1, 2, 0, 0, 0x20, 0, 0]);
    for (at, byte) in [(8, 1), (40, 2)] {
        let mut all = blake3::Hasher::new();
        for number in [5u64, 7] {
            let mut one = blake3::Hasher::new();
            one.update(&number.to_le_bytes()).update(&[byte; 4096]);
            all.update(&number.to_le_bytes());
            all.update(one.finalize().as_bytes());
        }
        assert_eq!(payload[at..at + 32], *all.finalize().as_bytes());
    }
    let runs = [
        5, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0,
    ];
    assert_eq!(payload[72..96], runs);
    assert_eq!(payload[96..], [2; 8192]);
}
