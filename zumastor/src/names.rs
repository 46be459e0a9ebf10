// SPDX-License-Identifier: GPL-2.0-only
//! What volumes and their devices are called.

use thiserror::Error;

/// Longest volume name in bytes: the address of a socket holds 107, the longest of a volume's is its
/// server's.
pub const VOLUME_NAME_MAX: usize = 107 - "/var/run/zumastor/servers/".len();

/// Longest volume name in bytes, as [`kernel_device_name`] writes it.
///
/// The kernel's device-mapper names hold 127 bytes, and a snapshot's name adds a number of up to ten
/// digits in parentheses.
pub const DEVICE_NAME_MAX: usize = 127 - r"\x284294967295\x29".len();

/// Why a name cannot be a volume's name.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum NameError {
    /// The empty string.
    #[error("a volume name must not be empty")]
    Empty,
    /// Longer than [`VOLUME_NAME_MAX`].
    #[error("the volume name '{0}' has more than {VOLUME_NAME_MAX} bytes")]
    TooLong(String),
    /// Longer than [`DEVICE_NAME_MAX`] for device-mapper.
    #[error(
        "the volume name '{0}' has more than {DEVICE_NAME_MAX} bytes, where each character but \
         letters, digits and #+-.:=@_ counts as four"
    )]
    TooLongDevice(String),
    /// `control`, which in /dev/mapper is device-mapper's own.
    #[error("a volume cannot be called '{0}': /dev/mapper/{0} is device-mapper's own")]
    Reserved(String),
    /// `.`, `..`, or a leading dot or dash, which paths and options give another meaning.
    #[error("the volume name '{0}' must not begin with '.' or '-'")]
    Leading(String),
    /// A character that is not printable ASCII, or is `/`, a blank, a parenthesis or a backslash.
    #[error("the volume name '{name}' must not contain {what}")]
    Character {
        /// The name as given.
        name: String,
        /// The offending character, described.
        what: String,
    },
}

/// Checks `name` as the name of a volume.
///
/// Parentheses are refused because `VOL(N)` is a snapshot's device, backslashes because device-mapper
/// uses them for its own escapes.
pub fn check_volume_name(name: &str) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    if name.len() > VOLUME_NAME_MAX {
        return Err(NameError::TooLong(name.to_string()));
    }
    if kernel_device_name(name).len() > DEVICE_NAME_MAX {
        return Err(NameError::TooLongDevice(name.to_string()));
    }
    if name == "control" {
        return Err(NameError::Reserved(name.to_string()));
    }
    if name.starts_with(['.', '-']) {
        return Err(NameError::Leading(name.to_string()));
    }
    let bad = |c: &char| !c.is_ascii_graphic() || matches!(c, '/' | '(' | ')' | '\\' | '"' | '\'');
    match name.chars().find(bad) {
        None => Ok(()),
        Some(c) => Err(NameError::Character {
            name: name.escape_default().to_string(),
            what: if c == ' ' || c == '\t' {
                "a blank".into()
            } else {
                format!("'{}'", c.escape_default())
            },
        }),
    }
}

/// Why a name cannot be that of a rotation.
#[derive(Debug, Error, PartialEq, Eq)]
#[error(
    "'{0}' is no name for a rotation: 1 to {KIND_MAX} letters, digits, - and _, not beginning with -"
)]
pub struct KindError(String);

/// Longest name of a rotation in bytes: with a number it is that of a link.
pub const KIND_MAX: usize = 64;

/// Checks `kind` as the name of a rotation. Links are called `KIND.n` after it.
pub fn check_kind(kind: &str) -> Result<(), KindError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    let fits = (1..=KIND_MAX).contains(&kind.len());
    if fits && !kind.starts_with('-') && kind.bytes().all(plain) {
        Ok(())
    } else {
        Err(KindError(kind.escape_default().to_string()))
    }
}

/// A snapshot's time, which is the name of its link.
const TIME_FORMAT: &str = "%Y.%m.%d-%H.%M.%S";

/// A moment as the name of a snapshot.
#[must_use]
pub fn local_time(moment: &jiff::Zoned) -> String {
    moment.strftime(TIME_FORMAT).to_string()
}

/// The same of a moment in seconds since 1970-01-01 UTC, in this machine's time zone.
#[must_use]
pub fn local_time_of(unix: i64) -> String {
    let moment = jiff::Timestamp::from_second(unix).unwrap_or_default();
    local_time(&moment.to_zoned(jiff::tz::TimeZone::system()))
}

/// `time`, or `time.1`, `time.2`... if snapshots of the same second exist, as `taken` says.
#[must_use]
pub fn unique_time(time: &str, taken: impl Fn(&str) -> bool) -> String {
    let mut name = time.to_string();
    let mut number = 0;
    while taken(&name) {
        number += 1;
        name = format!("{time}.{number}");
    }
    name
}

/// The name of a volume's device: `VOL` for the origin, `VOL(N)` for snapshot N.
#[must_use]
pub fn device_name(volume: &str, snapshot: Option<u32>) -> String {
    match snapshot {
        None => volume.to_string(),
        Some(tag) => format!("{volume}({tag})"),
    }
}

/// The name the kernel knows a device by: characters libdevmapper does not let stand are `\xHH`.
///
/// One device with a plain parenthesis in its kernel name makes every `dmsetup ls` and `dmsetup table`
/// fail, for all devices of the machine. With the name written as libdevmapper itself would write it,
/// `dmsetup info 'VOL(N)'` finds the device too (source: its documented name mangling, mode `auto`).
#[must_use]
pub fn kernel_device_name(name: &str) -> String {
    let stands = |b: u8| b.is_ascii_alphanumeric() || b"#+-.:=@_".contains(&b);
    name.bytes().fold(String::new(), |mut out, b| {
        if stands(b) {
            out.push(char::from(b));
        } else {
            out.push_str(&format!("\\x{b:02x}"));
        }
        out
    })
}

/// The reverse of [`kernel_device_name`]; what is no escape stays as it is.
#[must_use]
pub fn readable_device_name(kernel_name: &str) -> String {
    let mut parts = kernel_name.split("\\x");
    let mut out = parts.next().unwrap_or_default().to_string();
    for part in parts {
        let escaped = part
            .get(..2)
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        match escaped.filter(u8::is_ascii) {
            Some(byte) => {
                out.push(char::from(byte));
                out.push_str(&part[2..]);
            }
            None => {
                out.push_str("\\x");
                out.push_str(part);
            }
        }
    }
    out
}

/// Splits a snapshot's device name `VOL(N)` into volume and number; `None` for any other name.
#[must_use]
pub fn parse_snapshot_device(name: &str) -> Option<(&str, u32)> {
    let (volume, rest) = name.split_once('(')?;
    let digits = rest.strip_suffix(')')?;
    let canonical = digits == "0" || !digits.starts_with('0');
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if !plain || !canonical || check_volume_name(volume).is_err() {
        return None;
    }
    Some((volume, digits.parse().ok()?))
}

/// The `KEY=value` line that the udev rule imports for a device-mapper device called `name`.
///
/// Only names made of characters that need no quoting anywhere are printed: udev puts the value into
/// a path below /dev.
#[must_use]
pub fn udev_import_line(name: &str) -> Option<String> {
    let (volume, tag) = parse_snapshot_device(name)?;
    let safe = |b: u8| b.is_ascii_alphanumeric() || b"._+-".contains(&b);
    volume
        .bytes()
        .all(safe)
        .then(|| format!("DDSNAP_NAME={volume}({tag})"))
}

/// What the job of a replication's cycles is called: of the one to a target, or from the source.
#[must_use]
pub fn cycle_job(target: Option<&str>) -> String {
    target.map_or("receive".to_owned(), |host| format!("replicate {host}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_an_administrator_would_use_pass() {
        for name in [
            "zumatest",
            "a",
            "home-2",
            "sql_data.v1",
            "x@y",
            &"n".repeat(VOLUME_NAME_MAX),
        ] {
            assert_eq!(check_volume_name(name), Ok(()), "{name}");
        }
    }

    #[test]
    fn names_that_break_paths_or_devices_are_refused() {
        for name in [
            "", ".", "..", ".x", "-i", "a/b", "a b", "a\tb", "a\n", "v(0)", "a\\b", "ä", "'",
            "control",
        ] {
            assert!(check_volume_name(name).is_err(), "{name:?}");
        }
        // With 83 to 109 characters the store was formatted, and then its server had no socket.
        assert!(check_volume_name(&"n".repeat(VOLUME_NAME_MAX + 1)).is_err());
        assert!(check_volume_name(&"~".repeat(DEVICE_NAME_MAX / 4 + 1)).is_err());
        let text = check_volume_name("a b").unwrap_err().to_string();
        assert_eq!(text, "the volume name 'a b' must not contain a blank");
    }

    #[test]
    fn two_snapshots_in_a_second_get_different_names() {
        let all = ["2026.01.02-03.04.05", "2026.01.02-03.04.05.1"];
        let unique = |time| unique_time(time, |name| all.contains(&name));
        assert_eq!(unique("2026.01.02-03.04.05"), "2026.01.02-03.04.05.2");
        assert_eq!(unique("2026.01.02-03.04.06"), "2026.01.02-03.04.06");
    }

    #[test]
    fn kinds_are_names_for_links() {
        for good in ["hourly", "a", "every_15-m", &"k".repeat(KIND_MAX)] {
            assert_eq!(check_kind(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "-x",
            "a.b",
            "a/b",
            "a b",
            "\u{e4}",
            &"k".repeat(KIND_MAX + 1),
        ] {
            assert!(check_kind(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn snapshot_device_names_round_trip() {
        assert_eq!(device_name("v", None), "v");
        assert_eq!(
            parse_snapshot_device(&device_name("v", Some(14))),
            Some(("v", 14))
        );
        for other in [
            "v",
            "v()",
            "v(x)",
            "v(1",
            "v(01)",
            "(1)",
            "v(1)x",
            "v(-1)",
            "v(99999999999)",
        ] {
            assert_eq!(parse_snapshot_device(other), None, "{other}");
        }
    }

    /// Snapshot devices called `VOL(N)` in the kernel made `dmsetup table` fail for every device:
    /// "should be mangled but it contains blacklisted characters".
    #[test]
    fn kernel_names_are_written_as_libdevmapper_writes_them() {
        assert_eq!(kernel_device_name("zumatest"), "zumatest");
        assert_eq!(kernel_device_name("v.1:x(0)"), r"v.1:x\x280\x29");
        assert_eq!(kernel_device_name("a,b"), r"a\x2cb");
        for name in ["zumatest(0)", "a,b(12)", "x@y", "v"] {
            assert_eq!(readable_device_name(&kernel_device_name(name)), name);
        }
        for odd in [r"\x", r"\x2", r"\xzz", r"a\xff", "\\x\u{e9}"] {
            assert_eq!(readable_device_name(odd), odd);
        }
    }

    #[test]
    fn udev_line_only_for_plain_snapshot_names() {
        assert_eq!(
            udev_import_line("zumatest(0)").as_deref(),
            Some("DDSNAP_NAME=zumatest(0)")
        );
        for other in [
            "zumatest",
            "sysvg-test",
            "a$b(0)",
            "a%k(0)",
            "a;b(0)",
            "../x(0)",
            "a b(0)",
        ] {
            assert_eq!(udev_import_line(other), None, "{other}");
        }
    }
}
