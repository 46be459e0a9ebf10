// SPDX-License-Identifier: GPL-2.0-only
//! Numbers and times as people write and read them.

/// Bytes from a number with an optional k, m or g (powers of 1024; upper case too).
///
/// # Errors
/// A sentence that says what is allowed.
pub fn bytes(text: &str) -> Result<u64, String> {
    let (digits, factor) = match text.char_indices().last() {
        Some((at, 'k' | 'K')) => (&text[..at], 1 << 10),
        Some((at, 'm' | 'M')) => (&text[..at], 1 << 20),
        Some((at, 'g' | 'G')) => (&text[..at], 1 << 30),
        _ => (text, 1),
    };
    digits
        .parse::<u64>()
        .ok()
        .filter(|_| !digits.starts_with('+'))
        .and_then(|number| number.checked_mul(factor))
        .ok_or_else(|| "a size is a number of bytes, or one with k, m or g".to_owned())
}

/// The number with a comma after each three digits.
#[must_use]
pub fn thousands(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at) % 3 == 0 {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Local time as ctime(3) writes it, without its newline: `Sun Nov 22 01:44:39 2026`.
#[must_use]
pub fn ctime(seconds: i64) -> String {
    ctime_in(seconds, jiff::tz::TimeZone::system())
}

/// UTC as RFC 3339 has it: `2026-11-22T01:44:39Z`; none outside the years -9999 to 9999.
#[must_use]
pub fn rfc3339(seconds: i64) -> Option<String> {
    Some(jiff::Timestamp::from_second(seconds).ok()?.to_string())
}

fn ctime_in(seconds: i64, zone: jiff::tz::TimeZone) -> String {
    match jiff::Timestamp::from_second(seconds) {
        Ok(time) => time
            .to_zoned(zone)
            .strftime("%a %b %e %H:%M:%S %Y")
            .to_string(),
        Err(_) => format!("{seconds} s after 1970"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        assert_eq!(bytes("512"), Ok(512));
        assert_eq!(bytes("4k"), Ok(4096));
        assert_eq!(bytes("4K"), Ok(4096));
        assert_eq!(bytes("3m"), Ok(3 << 20));
        assert_eq!(bytes("2g"), Ok(2 << 30));
        for bad in [
            "",
            "k",
            "-1",
            "+1",
            "1t",
            "1.5k",
            "18446744073709551615k",
            "4ä",
        ] {
            assert!(bytes(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn thousands_are_separated() {
        for (number, text) in [
            (0, "0"),
            (999, "999"),
            (1000, "1,000"),
            (8_388_608, "8,388,608"),
            (123_456, "123,456"),
        ] {
            assert_eq!(thousands(number), text);
        }
    }

    #[test]
    fn times_look_like_ctime() {
        let utc = jiff::tz::TimeZone::UTC;
        assert_eq!(
            ctime_in(1_795_311_879, utc.clone()),
            "Sun Nov 22 01:44:39 2026"
        );
        assert_eq!(ctime_in(1, utc), "Thu Jan  1 00:00:01 1970");
        assert_eq!(rfc3339(1).unwrap(), "1970-01-01T00:00:01Z");
        assert_eq!(rfc3339(i64::MIN), None);
    }
}
