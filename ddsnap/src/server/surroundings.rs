// SPDX-License-Identifier: GPL-2.0-only
//! What the machine tells of this boot and of the origin's device.

use std::fs;
use std::path::Path;
use std::time::SystemTime;

use crate::device::identity::lasting_name;
use crate::store::Surroundings;

/// For opening a store of this origin. What cannot be found out is left unknown.
pub(super) fn surroundings(origin: &Path) -> Surroundings {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let boot = uuid::Uuid::parse_str(boot.trim()).map(|id| *id.as_bytes());
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    Surroundings {
        device: lasting_name(origin).unwrap_or_default(),
        boot: boot.unwrap_or_default(),
        up_since: up_since(&stat).filter(|_| clock_was_kept()),
        now: unix_now(),
        accept: false,
    }
}

/// Seconds since 1970-01-01 UTC.
pub(super) fn unix_now() -> i64 {
    SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs() as i64)
}

/// When the machine came up, as /proc/stat has it.
fn up_since(stat: &str) -> Option<i64> {
    let line = stat.lines().find_map(|line| line.strip_prefix("btime "))?;
    line.trim().parse().ok()
}

/// Whether the clock went on while the machine was down. Without a clock of its own a machine comes up with the
/// time at which it last wrote it down, and what it wrote before it crashed seems to be later.
fn clock_was_kept() -> bool {
    let clocks = fs::read_dir("/sys/class/rtc")
        .into_iter()
        .flatten()
        .flatten();
    clocks
        .filter_map(|clock| fs::read_to_string(clock.path().join("hctosys")).ok())
        .any(|set| set.trim() == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_boot_time_is_read_from_stat() {
        let stat = "cpu  1 2 3\nintr 5\nbtime 1795311879\nprocesses 9\n";
        assert_eq!(up_since(stat), Some(1_795_311_879));
        assert_eq!(up_since("cpu 1\n"), None);
    }
}
