// SPDX-License-Identifier: GPL-2.0-only
//! Quantities as people write them.

use crate::note::Progress;

/// A number of bytes with a binary unit: `512 B`, `1.5 GiB`.
#[must_use]
pub fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut unit = 0;
    // In tenths, so that no quantity is too large for the arithmetic.
    let mut tenths = u128::from(count) * 10 / 1024;
    while tenths >= 10_240 && unit + 1 < UNITS.len() {
        tenths /= 1024;
        unit += 1;
    }
    format!("{}.{} {}", tenths / 10, tenths % 10, UNITS[unit])
}

/// A length of time in its two largest units: `45 s`, `3 min 20 s`, `2 d 3 h`.
#[must_use]
pub fn seconds(count: u64) -> String {
    const UNITS: [(u64, &str); 4] = [(86_400, "d"), (3600, "h"), (60, "min"), (1, "s")];
    let at = UNITS.iter().position(|(size, _)| count >= *size);
    let at = at.unwrap_or(UNITS.len() - 1);
    let (size, name) = UNITS[at];
    let whole = format!("{} {name}", count / size);
    match UNITS.get(at + 1) {
        Some((next, name)) if count % size / next > 0 => {
            format!("{whole} {} {name}", count % size / next)
        }
        _ => whole,
    }
}

/// A moment in seconds since 1970-01-01 UTC, as ISO 8601 has it.
#[must_use]
pub fn utc(moment: i64) -> String {
    jiff::Timestamp::from_second(moment)
        .unwrap_or_default()
        .to_string()
}

/// How far something is, how fast it goes, and how long it will take.
#[must_use]
pub fn progress(progress: &Progress, rate: Option<u64>, left: Option<u64>) -> String {
    let Progress {
        subject,
        done,
        total,
    } = progress;
    let mut text = if subject.is_empty() {
        "has begun".to_string()
    } else {
        subject.clone()
    };
    if *total > 0 {
        let percent = u128::from(*done) * 100 / u128::from(*total);
        text += &format!(", {} of {} ({percent} %)", bytes(*done), bytes(*total));
    } else if *done > 0 {
        text += &format!(", {}", bytes(*done));
    }
    if let Some(rate) = rate.filter(|r| *r > 0) {
        text += &format!(", {}/s", bytes(rate));
    }
    if let Some(left) = left {
        text += &format!(", {} left", seconds(left));
    }
    text
}

/// The bytes that a size with an optional k, m or g says; none if it is no size, or more than there can be.
#[must_use]
pub fn size(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_as_people_write_them() {
        for (count, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.0 KiB"),
            (1_572_864, "1.5 MiB"),
            (1_048_575, "1023.9 KiB"),
            (u64::MAX, "15.9 EiB"),
        ] {
            assert_eq!(bytes(count), text);
        }
        for (count, text) in [
            (0, "0 s"),
            (59, "59 s"),
            (200, "3 min 20 s"),
            (3600, "1 h"),
            (90_061, "1 d 1 h"),
        ] {
            assert_eq!(seconds(count), text);
        }
        assert_eq!(utc(1_767_323_045), "2026-01-02T03:04:05Z");
    }

    #[test]
    fn progress_says_what_is_known() {
        let mut at = Progress::default();
        assert_eq!(progress(&at, None, None), "has begun");
        at.subject = "copying".into();
        (at.done, at.total) = (512, 2048);
        let text = progress(&at, Some(1024), Some(2));
        assert_eq!(
            text,
            "copying, 512 B of 2.0 KiB (25 %), 1.0 KiB/s, 2 s left"
        );
        at.total = 0;
        assert_eq!(progress(&at, None, None), "copying, 512 B");
    }

    /// A size of more than 64 bits was taken for none given, and nothing was done with exit code 0.
    #[test]
    fn sizes_are_bytes_or_nothing() {
        assert_eq!(
            (size("512"), size("2k"), size("3G")),
            (Some(512), Some(2048), Some(3 << 30))
        );
        for bad in [
            "",
            "k",
            "1x",
            "1kk",
            "-1",
            "17179869184g",
            "99999999999999999999",
        ] {
            assert_eq!(size(bad), None, "{bad}");
        }
    }
}
