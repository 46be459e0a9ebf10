// SPDX-License-Identifier: GPL-2.0-only
//! Integers in as few bytes as they need: seven bits a byte, lowest first, the top bit says "more".

use super::FormatError;

/// The longest encoding of a `u64`.
pub const MAX_LEN: usize = 10;

/// Appends `value` at `*at` and moves `*at` behind it. The caller made sure of [`MAX_LEN`] bytes.
pub fn put(bytes: &mut [u8], at: &mut usize, mut value: u64) {
    while value >= 0x80 {
        bytes[*at] = value as u8 | 0x80;
        *at += 1;
        value >>= 7;
    }
    bytes[*at] = value as u8;
    *at += 1;
}

/// Bytes that [`put`] would need.
#[must_use]
pub fn len(value: u64) -> usize {
    (64 - (value | 1).leading_zeros() as usize).div_ceil(7)
}

/// Reads the integer at `*at` and moves `*at` behind it.
///
/// # Errors
/// The bytes end too early, or encode more than 64 bits.
#[inline]
pub fn get(bytes: &[u8], at: &mut usize) -> Result<u64, FormatError> {
    let bytes = match bytes.get(*at..) {
        // Most differences are small.
        Some([byte, ..]) if *byte < 0x80 => {
            *at += 1;
            return Ok((*byte).into());
        }
        Some(bytes) => bytes,
        None => &[],
    };
    if let Some((word, length)) = bytes.first_chunk().copied().and_then(short) {
        *at += length;
        return Ok(word);
    }
    get_long(bytes, at)
}

/// The integer at the beginning of these bytes and its length, if it ends within them: without a loop over them, for a
/// leaf has hundreds of integers whose lengths nobody can predict.
#[inline]
fn short(bytes: [u8; 8]) -> Option<(u64, usize)> {
    let word = u64::from_le_bytes(bytes);
    let ends = !word & 0x8080_8080_8080_8080;
    if ends == 0 {
        return None;
    }
    // The lowest of the clear top bits, and all bits below.
    let word = word & (ends ^ ends.wrapping_sub(1)) & 0x7f7f_7f7f_7f7f_7f7f;
    // Closes the gaps between groups of 7, then of 14, then of 28 bits.
    let word = (word & 0x007f_007f_007f_007f) | ((word & 0x7f00_7f00_7f00_7f00) >> 1);
    let word = (word & 0x0000_3fff_0000_3fff) | ((word & 0x3fff_0000_3fff_0000) >> 2);
    let word = (word & 0x0fff_ffff) | ((word & 0x0fff_ffff_0000_0000) >> 4);
    Some((word, ends.trailing_zeros() as usize / 8 + 1))
}

/// Any of them, from the beginning of `bytes`.
#[cold]
fn get_long(bytes: &[u8], at: &mut usize) -> Result<u64, FormatError> {
    const BAD: FormatError = FormatError::Malformed {
        what: "index leaf",
        problem: "an integer is cut short or too long",
    };
    let mut value = 0u64;
    for (shift, &byte) in (0..64).step_by(7).zip(bytes) {
        *at += 1;
        let low = u64::from(byte & 0x7f);
        if shift == 63 && low > 1 {
            return Err(BAD);
        }
        value |= low << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(BAD)
}

/// Maps a difference to an integer that is small when the difference is small in either direction.
#[must_use]
pub fn zigzag(difference: i64) -> u64 {
    ((difference << 1) ^ (difference >> 63)) as u64
}

/// Undoes [`zigzag`].
#[must_use]
pub fn unzigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_comes_back() {
        let mut values = vec![0, u64::MAX, u64::MAX - 1];
        for bit in 0..64 {
            values.extend([1u64 << bit, (1u64 << bit) - 1, (1u64 << bit) + 1]);
        }
        for value in values {
            let mut bytes = [0; MAX_LEN];
            let mut end = 0;
            put(&mut bytes, &mut end, value);
            assert_eq!(end, len(value), "{value}");
            // With bytes behind it, whatever they are, and at the end of the block.
            let mut followed = bytes.to_vec();
            followed.resize(end, 0);
            let alone = followed.clone();
            followed.extend([0xff; 8]);
            for bytes in [&bytes[..], &alone, &followed] {
                let mut at = 0;
                assert_eq!(get(bytes, &mut at), Ok(value));
                assert_eq!(at, end);
            }
            assert_eq!(zigzag(unzigzag(value)), value);
        }
    }

    #[test]
    fn cut_short_and_overlong_integers_are_refused() {
        assert!(get(&[], &mut 0).is_err());
        assert!(get(&[1], &mut 2).is_err());
        assert!(get(&[0x80], &mut 0).is_err());
        assert!(get(&[0x80; 8], &mut 0).is_err());
        assert!(get(&[0x80; 10], &mut 0).is_err());
        assert!(
            get(
                &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 2],
                &mut 0
            )
            .is_err()
        );
    }
}
