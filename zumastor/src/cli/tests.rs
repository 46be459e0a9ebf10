// SPDX-License-Identifier: GPL-2.0-only
//! The order of the checks, their messages and exit codes.

use std::ffi::OsString;
use std::fs;

use super::*;

struct Machine {
    root: tempfile::TempDir,
    is_root: bool,
}

impl Machine {
    fn new() -> Machine {
        Machine {
            root: tempfile::tempdir().expect("a directory"),
            is_root: true,
        }
    }

    fn layout(&self) -> Layout {
        Layout::below(self.root.path())
    }

    fn with_database(self) -> Machine {
        fs::create_dir_all(self.layout().volumes()).expect("made");
        self
    }

    fn with_file(self, path: std::path::PathBuf) -> Machine {
        fs::create_dir_all(path.parent().expect("a parent")).expect("made");
        fs::write(path, "").expect("written");
        self
    }

    fn running(self) -> Machine {
        let path = self.layout().running();
        self.with_database().with_file(path)
    }

    fn run(&self, words: &[&str]) -> (u8, String) {
        let argv: Vec<OsString> = std::iter::once(&"zumastor")
            .chain(words)
            .map(OsString::from)
            .collect();
        let mut out = Vec::new();
        let mut context = Context {
            layout: self.layout(),
            is_root: self.is_root,
            verbose: false,
            out: &mut out,
        };
        let code = run(&argv, &mut context);
        (code, String::from_utf8(out).expect("text"))
    }
}

#[test]
fn version_and_help_come_before_everything() {
    let machine = Machine::new();
    let path = machine.layout().version();
    let machine = machine.with_file(path.clone());
    fs::write(path, "0.11.0-1\n").expect("written");
    assert_eq!(machine.run(&["--version"]), (0, "0.11.0-1\n".to_string()));
    assert_eq!(machine.run(&["-V"]).0, 0);
    let (code, text) = machine.run(&["--help"]);
    assert_eq!(code, 0);
    assert!(text.starts_with(USAGE), "{text}");
    let (code, text) = machine.run(&["define", "volume", "--help"]);
    assert_eq!(code, 0);
    assert!(text.contains("--initialize"), "{text}");
}

#[test]
fn the_order_of_the_checks() {
    // Each machine fails one check later than the one before.
    let nobody = Machine {
        is_root: false,
        ..Machine::new()
    };
    let (code, text) = nobody.run(&["snapshot", "v"]);
    assert_eq!(code, 1);
    assert!(
        text.starts_with("zumastor: the database directory"),
        "{text}"
    );

    let nobody = Machine {
        is_root: false,
        ..Machine::new()
    }
    .with_database();
    let (code, text) = nobody.run(&["snapshot", "v"]);
    assert_eq!(code, 1);
    assert!(
        text.starts_with("zumastor: zumastor is not running"),
        "{text}"
    );

    let nobody = Machine {
        is_root: false,
        ..Machine::new()
    }
    .running();
    let locking = nobody.layout().locking();
    let nobody = nobody.with_file(locking.clone());
    let (code, text) = nobody.run(&["snapshot", "v"]);
    assert_eq!(code, 1);
    assert!(
        text.starts_with("zumastor: zumastor is starting or stopping"),
        "{text}"
    );

    fs::remove_file(locking).expect("removed");
    let (code, text) = nobody.run(&["snapshot", "v"]);
    assert_eq!(
        (code, text.as_str()),
        (1, "zumastor: you must be root to run `zumastor snapshot`\n")
    );

    let machine = Machine::new().running();
    let (code, text) = machine.run(&["snapshot"]);
    assert_eq!(code, 2);
    assert!(text.contains("Usage: zumastor snapshot"), "{text}");
}

/// It is for the night in which nothing runs.
#[test]
fn the_doctor_needs_no_daemon_and_fails_when_it_finds_something() {
    let machine = Machine::new().with_database();
    let fstab = machine.layout().at("/etc/fstab");
    let machine = machine.with_file(fstab.clone());
    let line = "/dev/mapper/v /srv ext4 x-systemd.requires=zumastor.service 0 2\n";
    fs::write(fstab, line).expect("written");
    let (code, text) = machine.run(&["doctor"]);
    assert_eq!(code, 1);
    assert!(
        text.starts_with("zumastor is not running: start it"),
        "{text}"
    );
    assert!(
        text.contains("\n/etc/fstab, line 1: with x-systemd.requires"),
        "{text}"
    );
    // A daemon that does not answer is a finding: nothing else may be wrong.
    let running = Machine::new().running();
    let (code, text) = running.run(&["doctor"]);
    assert_eq!(code, 1);
    assert!(text.starts_with("the daemon does not answer at"), "{text}");
    let nobody = Machine {
        is_root: false,
        ..machine
    };
    let (code, text) = nobody.run(&["doctor"]);
    assert_eq!(
        (code, text.as_str()),
        (1, "zumastor: you must be root to run `zumastor doctor`\n")
    );
}

#[test]
fn stop_and_status_need_no_running_daemon_and_start_passes_the_lock() {
    let machine = Machine::new().with_database();
    let (code, text) = machine.run(&["status"]);
    assert!(
        code == 0 && text.starts_with("No volume is defined"),
        "{text}"
    );
    let full = machine.run(&["status", "--full"]);
    assert_eq!(full, (0, "RUN STATUS:\n".to_string()));
    let (code, text) = machine.run(&["status", "--json"]);
    let parsed: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(
        (code, parsed["schema"].as_str()),
        (0, Some("zumastor-status-1"))
    );
    let (code, text) = machine.run(&["stop", "volume", "v"]);
    assert_eq!(code, 1);
    assert!(
        text.starts_with("zumastor: the daemon does not answer at"),
        "{text}"
    );
    let machine = Machine::new().running();
    let locking = machine.layout().locking();
    let machine = machine.with_file(locking);
    let (_, text) = machine.run(&["start", "volume", "v"]);
    assert!(
        text.starts_with("zumastor: the daemon does not answer at"),
        "{text}"
    );
}

#[test]
fn usage_errors_are_2_and_say_what_is_wrong() {
    let machine = Machine::new().running();
    for words in [
        &[][..],
        &["frobnicate"],
        &["replicate"],
        &["define"],
        &["define", "volume", "v", "/dev/a"],
        &["define", "volume", "v", "/dev/a", "/dev/b", "/dev/c"],
        &["define", "volume", "v", "/dev/a", "/dev/b", "--wrong"],
        &["define", "volume", "v", "/dev/a", "/dev/b", "-k", "many"],
        &["define", "schedule", "v"],
        &["define", "schedule", "v", "-h", "many"],
        &["define", "schedule", "v", "-c", "x"],
        &["revert", "v"],
        &["resize", "v"],
        &["resize", "v", "-o", "big"],
        &["delete", "v", "all"],
        &["remount", "v"],
        &["status", "v", "--json", "--full"],
        &["forget", "volume"],
        &["start", "target", "v"],
        &["define", "target", "v"],
        &["define", "target", "v", "h", "--window", "22-6"],
        &["replicate", "v", "-s", "4"],
        &["replicate", "v", "h", "-w", "-n"],
        &["failover"],
        &["authorize", "v"],
        &["authorize", "v", "key", "key"],
        &["failover", "v", "h"],
        &["failback", "v"],
        &["failback", "v", "h", "-p", "0"],
        &["status", "v", "snap"],
    ] {
        let (code, text) = machine.run(words);
        assert_eq!(code, 2, "{words:?}: {text}");
        assert!(text.to_lowercase().contains("usage"), "{words:?}: {text}");
    }
    let (_, text) = machine.run(&[]);
    assert_eq!(text, format!("{USAGE}\n"));
    let (_, text) = machine.run(&["frobnicate"]);
    assert_eq!(
        text,
        format!("zumastor: this version has no verb 'frobnicate'\n{USAGE}\n")
    );
}

/// Scripts tell the mistakes of `define source` apart by its exit codes; they were all 2.
#[test]
fn mistakes_of_define_source_have_codes() {
    let machine = Machine::new().running();
    for (words, expected) in [
        (&["v", "h", "-p", "0"][..], 3),
        (&["v", "h", "--period=x"], 3),
        (&["v", "h", "--window", "25:00-06:00"], 6),
        (&["v"], 6),
        (&["v", "h", "-Q"], 6),
    ] {
        let all = [&["define", "source"], words].concat();
        let (code, text) = machine.run(&all);
        assert_eq!(code, expected, "{words:?}: {text}");
        assert!(text.to_lowercase().contains("usage"), "{words:?}: {text}");
    }
}

#[test]
fn options_may_follow_operands() {
    let words = [
        "zumastor", "define", "volume", "v", "/dev/a", "/dev/b", "-i", "-k", "64M",
    ];
    let matches = command().try_get_matches_from(words).expect("parsed");
    let (_, define) = matches.subcommand().expect("define");
    let (_, volume) = define.subcommand().expect("volume");
    assert!(volume.get_flag("initialize"));
    assert_eq!(string(volume, "cachesize").as_deref(), Some("64m"));
}

#[test]
fn the_command_is_consistent() {
    command().debug_assert();
}

#[test]
fn an_unusable_document_shows_in_the_status() {
    let machine = Machine::new().with_database();
    let layout = machine.layout();
    let machine = machine.with_file(layout.config("v"));
    fs::write(layout.config("v"), "version: 1\n").expect("written");
    let (code, text) = machine.run(&["status", "v"]);
    assert_eq!(code, 0);
    assert!(
        text.starts_with("VOLUME v:\nStatus: failed\nReason: "),
        "{text}"
    );
    assert!(text.contains("volume.yaml"), "{text}");
    let (code, text) = machine.run(&["status", "w"]);
    assert_eq!(
        (code, text.as_str()),
        (1, "zumastor: 'w' is not a managed volume\n")
    );
    let (code, text) = machine.run(&["status"]);
    assert_eq!(code, 0);
    assert!(text.starts_with("v: FAILED: "), "{text}");
    let (_, text) = machine.run(&["status", "--json"]);
    let parsed: serde_json::Value = serde_json::from_str(&text).expect("JSON");
    assert_eq!(parsed["volumes"][0]["state"], "failed");
    let (code, text) = machine.run(&["list"]);
    assert!(code == 0 && text.contains("/dev/mapper/v"), "{text}");
}
