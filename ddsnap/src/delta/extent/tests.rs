// SPDX-License-Identifier: GPL-2.0-only
//! Extents there and back.

use super::*;
use crate::units::Chunk;

/// Bytes that do not compress.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

fn run(chunks: u64) -> ChunkRun {
    ChunkRun {
        first: Chunk(3),
        chunks,
    }
}

fn decode(extent: &Extent<'_>, old: &[u8], bytes: usize) -> Result<Vec<u8>, ExtentError> {
    let mut new = Vec::new();
    extent.decode(old, bytes, &mut new).map(|()| new)
}

#[test]
fn every_mode_and_level_comes_back() {
    let old = noise(1, MAX_EXTENT_BYTES);
    let mut edited = old.clone();
    edited[700_000..700_100].fill(7);
    let moved = [&old[4096..], &old[..4096]].concat();
    let news = [
        old.clone(),
        edited,
        moved,
        noise(2, MAX_EXTENT_BYTES),
        vec![0; MAX_EXTENT_BYTES],
    ];
    for mode in [Mode::Difference, Mode::Raw, Mode::Best] {
        for level in [0, 1, 5, 9] {
            let mut encoder = Encoder::new(mode, level);
            for (index, new) in news.iter().enumerate() {
                for old in [&old[..], &old[..4096], &[]] {
                    let extent = encoder.encode(run(256), old, new);
                    let context = format!("{mode:?} {level} {index} {}", old.len());
                    assert_eq!(
                        decode(&extent, old, new.len()).as_ref(),
                        Ok(new),
                        "{context}"
                    );
                    assert!(extent.data.len() <= new.len(), "{context}");
                    assert!(
                        extent.coding == Coding::Raw || mode != Mode::Raw,
                        "{context}"
                    );
                    assert!(
                        level > 0 || mode != Mode::Raw || extent.data == new,
                        "{context}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_difference_is_as_long_as_what_differs() {
    let old = noise(1, MAX_EXTENT_BYTES);
    let mut new = old.clone();
    for at in (0..MAX_EXTENT_BYTES).step_by(100_000) {
        new[at..at + 16].copy_from_slice(&noise(at as u64, 16));
    }
    for mode in [Mode::Difference, Mode::Best] {
        let mut encoder = Encoder::new(mode, 0);
        let extent = encoder.encode(run(256), &old, &new);
        assert_eq!(extent.coding, Coding::Difference);
        assert!(
            extent.data.len() < 1500,
            "{mode:?}: {} bytes",
            extent.data.len()
        );
    }
    let mut encoder = Encoder::new(Mode::Difference, 0);
    let other = noise(9, MAX_EXTENT_BYTES);
    assert_eq!(encoder.encode(run(256), &old, &other).coding, Coding::Raw);
}

#[test]
fn the_best_is_the_shorter() {
    let (old, new) = (noise(1, 65536), vec![0; 65536]);
    let length = |mode| Encoder::new(mode, 9).encode(run(16), &old, &new).data.len();
    let best = length(Mode::Best);
    assert_eq!(best, length(Mode::Difference).min(length(Mode::Raw)));
}

#[test]
fn another_base_and_bent_data_are_refused() {
    let old = noise(1, 8192);
    let mut new = old.clone();
    new[..20].copy_from_slice(&noise(3, 20));
    let mut encoder = Encoder::new(Mode::Difference, 3);
    let extent = encoder.encode(run(2), &old, &new);
    assert_eq!(decode(&extent, &new, 8192), Err(ExtentError::Base));
    assert_eq!(decode(&extent, &old[..4096], 8192), Err(ExtentError::Base));
    // Swapped bytes: the byte sums of old could not tell.
    let mut swapped = old.clone();
    swapped.swap(0, 1);
    assert_ne!(old, swapped);
    assert_eq!(decode(&extent, &swapped, 8192), Err(ExtentError::Base));

    let data = extent.data.to_vec();
    for bit in 0..data.len() * 8 {
        let mut bent = data.clone();
        bent[bit / 8] ^= 1 << (bit % 8);
        let bent = Extent {
            data: &bent,
            ..extent
        };
        // A bit that does not matter may be flipped; another result may not come of it.
        if let Ok(decoded) = decode(&bent, &old, 8192) {
            assert_eq!(decoded, new, "bit {bit}");
        }
    }
    for length in 0..data.len() {
        let short = Extent {
            data: &data[..length],
            ..extent
        };
        assert!(decode(&short, &old, 8192).is_err(), "{length} bytes");
    }
    // Data that unpacks to more than the extent.
    let (zeros, mut packed) = (vec![0; 1 << 20], Vec::new());
    compress(&zeros, &[], 3, &mut packed);
    let bomb = Extent {
        coding: Coding::Raw,
        data: &packed,
        ..extent
    };
    assert_eq!(decode(&bomb, &old, 8192), Err(ExtentError::Coding));
}

/// What an earlier version wrote must be read for ever.
#[test]
fn a_difference_of_an_earlier_version_is_read() {
    let old: Vec<u8> = (0..4096_u32).map(|n| ((n * n) >> 4) as u8).collect();
    let mut new = old.clone();
    new[1000..1008].copy_from_slice(b"changed!");
    let golden = include_bytes!("difference.zst");
    let extent = Extent {
        run: run(1),
        coding: Coding::Difference,
        level: 1,
        base: hash(&old),
        result: hash(&new),
        data: golden,
    };
    assert_eq!(decode(&extent, &old, 4096), Ok(new));
}
