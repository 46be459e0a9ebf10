// SPDX-License-Identifier: GPL-2.0-only
//! What the `ddsnap` command prints and returns, to the letter: scripts know it.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod commands;

use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use commands::{Volume, ddsnap, ddsnap_with, good, ran, wait_until, without_times};
use ddsnap::store::{Op, OpError, Store};
use ddsnap::units::{Chunk, SnapTag};
use nix::sys::signal::Signal;

#[test]
fn list_and_status_speak_json() {
    let mut volume = Volume::with_agent();
    volume.start_server();
    let socket = volume.socket();
    good(&["create", &socket, "4"]);
    good(&["usecount", &socket, "4", "2"]);
    good(&["create", &socket, "2"]);
    let parse = |args: &[&str]| -> serde_json::Value { serde_json::from_str(&good(args)).unwrap() };
    let list = parse(&["list", "--json", &socket]);
    assert_eq!(list["schema"], "ddsnap-list-1");
    let tags: Vec<_> = list["snapshots"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| &s["tag"])
        .collect();
    assert_eq!(tags, [4, 2]);
    assert_eq!(list["snapshots"][0]["usecount"]["persistent"], 2);
    let status = parse(&["status", &socket, "--json"]);
    assert_eq!(status["schema"], "ddsnap-status-1");
    assert_eq!(status["store"]["origin_bytes"], 8 << 20);
    assert_eq!(status["store"]["channel"], "absent");
    assert_eq!(status["warning"], serde_json::Value::Null);
    assert_eq!(status["snapshots"].as_array().unwrap().len(), 2);
    assert_eq!(
        status["snapshots"][1]["created"],
        list["snapshots"][1]["created"]
    );
    assert_eq!(status["totals"]["bytes"], 0);
    let one = parse(&["status", "--json", &socket, "2"]);
    assert_eq!(one["snapshots"].as_array().unwrap().len(), 1);
    let none = ddsnap_with(&["status", "--json", &socket, "7"]);
    assert_eq!(none.code, 1);
    let document: serde_json::Value = serde_json::from_str(&none.stdout).unwrap();
    assert_eq!(document["absent"], 7);
    assert!(
        none.stderr.contains("because snapshot doesn't exist"),
        "{none:?}"
    );
    assert_eq!(
        ddsnap_with(&["status", "--json", "--list", &socket]).code,
        1
    );
}

/// Two agents know nothing of each other: only the store's lock keeps their servers apart.
#[test]
fn a_server_of_another_agent_waits_for_the_store_and_then_says_who_holds_it() {
    let mut volume = Volume::with_agent();
    let holder = volume.start_server();
    good(&["create", &volume.socket(), "4"]);
    let (agent, pidfile) = (volume.name("agent2"), volume.name("agent2.pid"));
    let log = volume.name("agent2.log");
    good(&["agent", &agent, "-l", &log, "-p", &pidfile]);
    volume.remember(&pidfile);
    let second = |wait: &str| -> Vec<String> {
        let mut args = vec!["server".to_owned()];
        args.extend(["store", "origin", "agent2", "server2"].map(|name| volume.name(name)));
        args.extend([
            "-k".to_owned(),
            "2m".to_owned(),
            "--wait".to_owned(),
            wait.to_owned(),
        ]);
        args.extend(["-l".to_owned(), volume.name("server2.log")]);
        args.extend(["-p".to_owned(), volume.name("server2.pid")]);
        args
    };
    let refused = ran(ddsnap().args(second("0")).output().unwrap());
    let store = volume.name("store");
    let sentence =
        format!("ddsnap: cannot lock {store}: it is held by process {holder}; stop that first\n");
    assert_eq!(
        (
            refused.code,
            refused.stdout.as_str(),
            refused.stderr.as_str()
        ),
        (1, "", sentence.as_str())
    );
    assert!(!volume.file("server2").exists() && !volume.file("server2.pid").exists());

    let mut waiting = ddsnap()
        .args(second("60"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(waiting.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert_eq!(
        line,
        format!(
            "ddsnap server: process {holder} holds {store}; waiting up to 60 s for it to let go\n"
        )
    );
    assert_eq!(good(&["status", "--list", &volume.socket()]), "4\n");
    volume.stop(holder, Signal::SIGTERM);
    let ran = ran(waiting.wait_with_output().unwrap());
    assert_eq!(ran.code, 0, "{ran:?}");
    let pidfile = volume.name("server2.pid");
    volume.remember(&pidfile);
    assert_eq!(good(&["status", "--list", &volume.name("server2")]), "4\n");
}

/// A command, its exit code, standard output and standard error. SOCK stands for the server's socket.
type Said = (&'static str, i32, &'static str, &'static str);

fn all_say(socket: &str, table: &[Said]) {
    for &(line, code, stdout, stderr) in table {
        let line = line.replace("SOCK", socket);
        let args: Vec<&str> = line.split(' ').collect();
        let ran = ddsnap_with(&args);
        assert_eq!(
            (ran.code, ran.stdout.as_str(), ran.stderr.as_str()),
            (code, stdout, stderr),
            "{line}"
        );
    }
}

#[test]
fn commands_say_what_scripts_expect() {
    const ABSENT: &str = "because snapshot doesn't exist (No such file or directory)\n";
    let mut volume = Volume::with_agent();
    volume.start_server();
    let absent = |verb: &str| -> &'static str { format!("could not {verb} {ABSENT}").leak() };
    let table = [
        ("create SOCK 4", 0, "", ""),
        (
            "create SOCK 4",
            1,
            "",
            "could not create snapshot 4 because snapshot already exists (File exists)\n",
        ),
        ("create SOCK 4294967294", 0, "", ""),
        ("delete SOCK 9", 1, "", absent("delete snapshot 9")),
        ("priority SOCK 4 -1", 0, "255\n", ""),
        ("priority SOCK 4 -128", 0, "128\n", ""),
        ("priority SOCK 4 127", 0, "127\n", ""),
        (
            "priority SOCK 9 1",
            1,
            "",
            "could not set priority because Snapshot tag 9 is not valid (No such file or directory)\n",
        ),
        ("usecount SOCK 4", 0, "0\n", ""),
        (
            "usecount SOCK 4 -1",
            1,
            "",
            "could not set usecount because Usecount underflow. (Invalid argument)\n",
        ),
        ("usecount SOCK 4 65535", 0, "65535\n", ""),
        (
            "usecount SOCK 4 1",
            1,
            "",
            "could not set usecount because Usecount overflow. (Invalid argument)\n",
        ),
        (
            "delete SOCK 4",
            1,
            "",
            "could not delete snapshot 4 because snapshot has non-zero usecount (Device or resource busy)\n",
        ),
        ("usecount SOCK 4 -65534", 0, "1\n", ""),
        ("usecount SOCK 9", 1, "", absent("set usecount")),
        ("usecount SOCK 9 1", 1, "", absent("set usecount")),
        ("status --list SOCK", 0, "4 4294967294\n", ""),
        ("status --last SOCK", 0, "4294967294\n", ""),
        ("status --size SOCK", 0, "16384\n", ""),
        ("status --size SOCK 4", 0, "16384\n", ""),
        (
            "status --size SOCK 9",
            0,
            "0\n",
            "Snapshot 9 is not valid\n",
        ),
        ("status --state SOCK 4", 0, "", ""),
        ("status --state SOCK 9", 1, "", ""),
        (
            "status --state SOCK",
            9,
            "",
            "ddsnap: --state needs the number of a snapshot\n",
        ),
        ("status SOCK 9", 1, "", absent("show snapshot 9")),
        ("delete SOCK 4294967294", 0, "", ""),
        ("usecount SOCK 4 -1", 0, "0\n", ""),
        ("delete SOCK 4", 0, "", ""),
        ("status --list SOCK", 0, "\n", ""),
        ("status --last SOCK", 0, "\n", ""),
        ("list SOCK", 0, "Snapshot list:\n", ""),
    ];
    all_say(&volume.socket(), &table);
}

#[test]
fn options_may_stand_anywhere_and_names_may_be_abstract() {
    let mut volume = Volume::new();
    let unique = format!("ddsnap-words-{}", std::process::id());
    let (agent, server) = (format!("@{unique}-agent"), format!("@{unique}-server"));
    let (store, origin) = (volume.name("store"), volume.name("origin"));
    let (log, pidfile) = (volume.name("log"), volume.name("pid"));
    good(&[
        "initialize",
        &store,
        "-c",
        "8k",
        &origin,
        "-y",
        "-j",
        "100k",
    ]);
    good(&[
        "agent",
        "-D",
        &agent,
        "-p",
        &pidfile,
        "-X",
        "--logfile",
        &log,
    ]);
    volume.remember(&pidfile);
    let started = good(&[
        "server", "-X", &store, "-k", "2m", &origin, "--debug", &agent, "-l", &log, &server, "-p",
        &pidfile,
    ]);
    let pid = volume.remember(&pidfile);
    assert_eq!(started, format!("pid = {pid}\n"));
    let table = [
        ("create SOCK 1", 0, "", ""),
        ("status SOCK --list", 0, "1\n", ""),
        ("status SOCK 1 --size", 0, "16384\n", ""),
        ("priority -- SOCK 1 -1", 0, "255\n", ""),
        ("usecount SOCK 1 -0", 0, "0\n", ""),
    ];
    all_say(&server, &table);
    let verbose = good(&["status", &server, "-v"]);
    assert!(
        verbose.contains("   Chunks Unshared       1X\n"),
        "{verbose}"
    );
    assert_eq!(good(&["status", "--verbose", &server, "1"]), verbose);
    for missing in [
        vec!["server", &store, &origin, &agent],
        vec!["server"],
        vec!["create", &server],
    ] {
        let ran = ddsnap_with(&missing);
        assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{ran:?}");
        assert!(!ran.stderr.is_empty(), "{missing:?}");
    }
}

#[test]
fn every_command_to_a_server_that_is_not_there_is_exit_code_99() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nobody").to_str().unwrap().to_owned();
    let unique = format!("@ddsnap-nobody-{}", std::process::id());
    let output = dir.path().join("out").to_str().unwrap().to_owned();
    for line in [
        "create SOCK 1",
        "delete SOCK 1",
        "list SOCK",
        "list SOCK --json",
        "priority SOCK 1 1",
        "usecount SOCK 1",
        "status SOCK",
        "status SOCK --list",
        "status SOCK --last",
        "status SOCK --size",
        "status SOCK --state 1",
        "resize SOCK -o 1m",
        "revert SOCK 1",
        "scrub SOCK",
        "dump SOCK",
        "delta changelist SOCK OUT 1 2",
    ] {
        for (name, why) in [
            (&socket, "No such file or directory"),
            (&unique, "Connection refused"),
        ] {
            let line = line.replace("SOCK", name).replace("OUT", &output);
            let args: Vec<&str> = line.split(' ').collect();
            let ran = ddsnap_with(&args);
            assert_eq!((ran.code, ran.stdout.as_str()), (99, ""), "{line}: {ran:?}");
            assert!(
                ran.stderr.starts_with(&format!(
                    "ddsnap: cannot connect to the server at {name}: {why}"
                )),
                "{ran:?}"
            );
            assert_eq!(ran.stderr.lines().count(), 1, "{ran:?}");
        }
    }
    assert!(!fs::exists(&output).unwrap());
}

/// Fills a store under two snapshots of which one is in use: it is squashed, the other deleted.
#[test]
fn a_full_store_shows_squashed_snapshots_and_warns() {
    let mut volume = Volume::new();
    let file = File::options().write(true).open(volume.file("store"));
    file.unwrap().set_len(2 << 20).unwrap();
    volume.initialize();
    volume.start_agent();
    let mut store = volume.open_store();
    for tag in [2, 4] {
        store.create(SnapTag(tag), 1).unwrap().unwrap();
    }
    store.adjust_usecount(SnapTag(4), 1).unwrap().unwrap();
    let write = |store: &mut Store, chunks: std::ops::Range<u64>| -> usize {
        let mut refused = 0;
        for chunk in chunks {
            let ops = [Op::OriginWrite(Chunk(chunk))];
            let mut answer = store.commit(&ops).unwrap()[0];
            while answer == Err(OpError::Wait) {
                store.background_step(64).unwrap();
                if !store.is_making_room() {
                    answer = store.commit(&ops).unwrap()[0];
                }
            }
            refused += usize::from(answer.is_err());
        }
        refused
    };
    // 8 MiB of origin do not fit 2 MiB of store.
    assert_eq!(write(&mut store, 0..1024), 0);
    store.create(SnapTag(6), 1).unwrap().unwrap();
    store.set_priority(SnapTag(6), 127).unwrap().unwrap();
    assert!(
        write(&mut store, 0..1024) > 0,
        "nothing may be given up any more"
    );
    store.close().unwrap();

    volume.start_server();
    let socket = volume.socket();
    let status = without_times(&good(&["status", &socket]));
    let lines: Vec<&str> = status.lines().collect();
    let squashed = "     4 DAY MON DD HH:MM:SS YEAR      1    0        !        !        !";
    assert_eq!(lines[5], squashed, "{status}");
    let warning = lines.last().unwrap();
    assert!(
        warning.starts_with("Warning: the snapshot store is full: "),
        "{status}"
    );
    assert_eq!(good(&["status", "--list", &socket]), "4 6\n");
    assert_eq!(ddsnap_with(&["status", "--state", &socket, "4"]).code, 2);
    let json: serde_json::Value =
        serde_json::from_str(&good(&["status", "--json", &socket])).unwrap();
    assert_eq!(json["snapshots"][0]["state"], "squashed");
    assert_eq!(json["snapshots"][0]["data"], serde_json::Value::Null);
    assert_eq!(json["warning"]["level"], "full");
    volume.await_log("the snapshot store is full: ");

    // Deleting works on a full store, and the warning goes: in the log, once.
    good(&["delete", &socket, "6"]);
    wait_until("room", || !good(&["status", &socket]).contains("Warning: "));
    wait_until("word of it", || volume.log().contains("are free again"));
    assert_eq!(
        volume.log().matches("the snapshot store is full: ").count(),
        1
    );
}

#[test]
fn injected_faults_close_and_delay() {
    for (action, code) in [("close", 1), ("delay_ms 300", 0)] {
        let mut volume = Volume::with_agent();
        let started = ddsnap()
            .args(volume.server_args())
            .envs([
                ("DDSNAP_TRIGGER", "any"),
                ("DDSNAP_COUNT", "2"),
                ("DDSNAP_ACTION", action),
            ])
            .output()
            .unwrap();
        assert_eq!(ran(started).code, 0);
        volume.remember(&volume.name("server.pid"));
        let socket = volume.socket();
        // START_SERVER was the first message.
        let begin = Instant::now();
        let hit = ddsnap_with(&["list", &socket]);
        assert_eq!(hit.code, code, "{action}: {hit:?}");
        if code == 0 {
            assert!(begin.elapsed() >= Duration::from_millis(300));
        } else {
            assert!(
                hit.stderr.contains("went away before it answered"),
                "{hit:?}"
            );
        }
        good(&["list", &socket]);
    }
    let volume = Volume::with_agent();
    let bad = ddsnap()
        .args(volume.server_args())
        .envs([("DDSNAP_TRIGGER", "NONSENSE"), ("DDSNAP_ACTION", "abort")])
        .output()
        .unwrap();
    let bad = ran(bad);
    assert_eq!(bad.code, 1, "{bad:?}");
    assert!(
        bad.stderr
            .contains("DDSNAP_TRIGGER=NONSENSE: no such message"),
        "{bad:?}"
    );
}
