// SPDX-License-Identifier: GPL-2.0-only
//! Reading the guest's kernel messages for reports that mean it is broken.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Text that opens a kernel report. Each is fatal to a scenario.
///
/// Substrings of what the kernel prints at the head of panics, oopses, `BUG`,
/// `WARN`, lockdep, KASAN, UBSAN, hung tasks and stalls.
const REPORTS: &[&str] = &[
    "Kernel panic - not syncing",
    "Oops:",
    "BUG: ",
    "kernel BUG at ",
    "WARNING: CPU:",
    "WARNING: possible ",
    "WARNING: inconsistent lock state",
    "WARNING: bad unlock balance",
    "WARNING: held lock freed",
    "WARNING: suspicious RCU usage",
    "WARNING: Nested lock was not taken",
    "WARNING: lock held when returning to user space",
    "general protection fault",
    "Unable to handle kernel",
    "INFO: task ",
    "INFO: possible recursive locking",
    "INFO: trying to register non-static key",
    "self-detected stall",
    "detected stalls on CPUs",
    "KASAN: ",
    "KFENCE: ",
    "UBSAN: ",
    "Internal error: ",
];

/// Lines of one report that are shown; the rest is in the console log.
const SHOWN_LINES: usize = 60;

/// The first report in kernel messages, from its head to its end trace, or
/// `None` when the kernel is content.
pub fn find_report(text: &str) -> Option<String> {
    let lines: Vec<&str> = text.lines().collect();
    let head = lines.iter().position(|line| is_report_head(line))?;
    // The line above often opens the report ("------------[ cut here ]").
    let from = if head > 0 && lines[head - 1].contains("[ cut here ]") {
        head - 1
    } else {
        head
    };
    let mut report = String::new();
    for line in lines[from..].iter().take(SHOWN_LINES) {
        report.push_str(line.trim_end());
        report.push('\n');
        if line.contains("---[ end ") {
            break;
        }
    }
    Some(report)
}

fn is_report_head(line: &str) -> bool {
    REPORTS.iter().any(|head| {
        line.find(head).is_some_and(|at| {
            // "DEBUG: " is no "BUG: ".
            let word_begins = !line[..at].ends_with(|c: char| c.is_alphanumeric());
            word_begins && (*head != "INFO: task " || line.contains("blocked for more than"))
        })
    })
}

/// Follows a console log that QEMU writes.
pub struct Console {
    path: PathBuf,
    /// Bytes of the log that belong to the past (an earlier boot or another run).
    from: u64,
}

impl Console {
    /// Watches `path` from its present end on.
    pub fn from_end(path: &Path) -> Self {
        let from = std::fs::metadata(path).map_or(0, |m| m.len());
        Console {
            path: path.to_path_buf(),
            from,
        }
    }

    /// Everything since the watch began. Undecodable bytes are replaced.
    pub fn text(&self) -> String {
        let mut bytes = Vec::new();
        if let Ok(mut file) = File::open(&self.path) {
            let read = file
                .seek(SeekFrom::Start(self.from))
                .and_then(|_| file.read_to_end(&mut bytes));
            if read.is_err() {
                return String::new();
            }
        }
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The first kernel report since the watch began.
    pub fn report(&self) -> Option<String> {
        find_report(&self.text())
    }

    /// The log file.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OOPS: &str = "\
[   12.000000] device-mapper: ddsnap: attached
[   12.345678] BUG: kernel NULL pointer dereference, address: 0000000000000008
[   12.345679] #PF: supervisor read access in kernel mode
[   12.345680] Oops: Oops: 0000 [#1] PREEMPT SMP
[   12.345681] RIP: 0010:ddsnap_map+0x1c/0x80 [dm_ddsnap]
[   12.345682] ---[ end trace 0000000000000000 ]---
[   12.345683] later
";

    #[test]
    fn an_oops_is_found_and_shown_to_its_end() {
        let report = find_report(OOPS).unwrap();
        assert!(
            report.starts_with("[   12.345678] BUG: kernel NULL pointer"),
            "{report}"
        );
        assert!(report.contains("ddsnap_map"));
        assert!(report.trim_end().ends_with("]---"), "{report}");
    }

    #[test]
    fn each_kind_of_report_is_found() {
        for line in [
            "[ 1.0] Kernel panic - not syncing: VFS: Unable to mount root fs",
            "[ 1.0] WARNING: CPU: 0 PID: 7 at drivers/md/dm.c:1 f+0x1/0x2",
            "[ 1.0] WARNING: possible circular locking dependency detected",
            "[ 1.0] WARNING: possible irq lock inversion dependency detected",
            "[ 1.0] INFO: task ddsnap:77 blocked for more than 120 seconds.",
            "[ 1.0] BUG: KASAN: slab-use-after-free in ddsnap_ctr+0x10/0x20",
            "[ 1.0] BUG: sleeping function called from invalid context at mm/util.c:1",
            "[ 1.0] rcu: INFO: rcu_preempt self-detected stall on CPU",
        ] {
            assert!(find_report(&format!("fine\n{line}\n")).is_some(), "{line}");
        }
    }

    #[test]
    fn ordinary_messages_are_no_report() {
        let fine = "\
[    0.000000] DEBUG: nothing
[    0.100000] Warning: unable to open an initial console.
[    0.200000] INFO: task scheduling ready
[    1.000000] EXT4-fs (vda): mounted filesystem with ordered data mode
[    1.100000] WARNING: Spectre is old news
";
        assert_eq!(find_report(fine), None);
    }

    #[test]
    fn the_line_that_opens_a_warning_belongs_to_it() {
        let text =
            "a\n[ 1.0] ------------[ cut here ]------------\n[ 1.0] WARNING: CPU: 1 PID: 1 at x\n";
        assert!(find_report(text).unwrap().contains("cut here"));
    }

    #[test]
    fn the_watch_starts_where_it_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("console.log");
        std::fs::write(&log, OOPS).unwrap();
        let console = Console::from_end(&log);
        assert_eq!(console.report(), None);
        let mut file = File::options().append(true).open(&log).unwrap();
        std::io::Write::write_all(&mut file, OOPS.as_bytes()).unwrap();
        assert!(console.report().is_some());
    }
}
