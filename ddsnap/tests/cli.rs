// SPDX-License-Identifier: GPL-2.0-only
//! The `ddsnap` command from end to end: real daemons on plain files, no kernel module, no root.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod commands;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Instant;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use commands::{
    PATIENCE, Ran, Volume, ddsnap, ddsnap_with, good, is_alive, ran, wait_until, without_times,
};
use ddsnap::store::Op;
use ddsnap::units::{Chunk, SnapTag};

#[test]
fn help_and_wrong_use_have_the_exit_codes_they_always_had() {
    let none = ddsnap_with(&[]);
    assert_eq!(none.code, 1);
    assert!(none.stderr.contains("Usage: ddsnap"), "{none:?}");
    for args in [
        &["--help"][..],
        &["-?"],
        &["--usage"],
        &["-V"],
        &["create", "-?"],
    ] {
        let ran = ddsnap_with(args);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{args:?}");
        assert!(!ran.stdout.is_empty(), "{args:?}");
    }
    assert!(good(&["--usage"]).starts_with("Usage: ddsnap"));
    assert!(good(&["server", "--usage"]).contains("AGENTSOCK"));
    for args in [
        &["no-such-command"][..],
        &["create"],
        &["create", "sock"],
        &["create", "sock", "-1"],
        &["create", "sock", "1", "2"],
        &["server", "a", "b", "c"],
        &["status", "--list", "--last", "sock"],
    ] {
        let ran = ddsnap_with(args);
        assert_eq!(ran.code, 1, "{args:?}");
        assert!(
            !ran.stderr.is_empty() && ran.stdout.is_empty(),
            "{args:?}: {ran:?}"
        );
    }
}

#[test]
fn a_socket_nobody_answers_on_is_exit_code_99() {
    let volume = Volume::new();
    for args in [
        &["create", "1"][..],
        &["bookmark", "1"],
        &["delete", "1"],
        &["list"],
        &["status"],
        &["priority", "1", "0"],
        &["usecount", "1"],
        &["dump"],
    ] {
        let socket = volume.socket();
        let all: Vec<&str> = [args[0], &socket]
            .into_iter()
            .chain(args[1..].iter().copied())
            .collect();
        let ran = ddsnap_with(&all);
        assert_eq!(ran.code, 99, "{all:?}: {ran:?}");
        assert!(ran.stderr.contains(&socket), "{ran:?}");
    }
    let state = ["status", "--state", &volume.socket(), "1"];
    assert_eq!(ddsnap_with(&state).code, 99);
    assert_eq!(ddsnap_with(&state[..3]).code, 9);
    let args = volume.server_args();
    let ran = ran(ddsnap().args(args).output().unwrap());
    assert_eq!((ran.code, ran.stdout.as_str()), (99, ""), "{ran:?}");
    assert!(
        ran.stderr.contains("cannot connect to the agent"),
        "{ran:?}"
    );
}

#[test]
fn a_formatted_store_is_overwritten_only_after_y() {
    let volume = Volume::new();
    volume.initialize();
    let before = fs::read(volume.file("store")).unwrap();
    let (store, origin) = (volume.name("store"), volume.name("origin"));
    for (answer, code) in [("n\n", 1), ("", 1), ("yes\n", 1), ("y\n", 0)] {
        let mut child = ddsnap()
            .args(["initialize", &store, &origin])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(answer.as_bytes())
            .unwrap();
        let ran = ran(child.wait_with_output().unwrap());
        assert_eq!(ran.code, code, "{answer:?}: {ran:?}");
        assert!(
            ran.stdout.contains(&store) && ran.stdout.contains("(y/N)"),
            "{ran:?}"
        );
        let now = fs::read(volume.file("store")).unwrap();
        assert_eq!(now == before, code != 0, "{answer:?}");
    }
}

#[test]
fn initialize_says_what_is_wrong_and_where() {
    let volume = Volume::new();
    let (store, origin) = (volume.name("store"), volume.name("origin"));
    for (options, words) in [
        (&["-c", "3000"][..], "power of two"),
        (&["-c", "256"], "power of two"),
        (&["-b", "4k", "-c", "8k"], "metadata device"),
        (&["-c", "1x"], "a size is a number of bytes"),
    ] {
        let args: Vec<&str> = ["initialize", &store, &origin]
            .into_iter()
            .chain(options.iter().copied())
            .collect();
        let ran = ddsnap_with(&args);
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.stderr.contains(words), "{ran:?}");
    }
    let missing = volume.name("missing");
    let ran = ddsnap_with(&["initialize", &missing, &origin]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains(&missing), "{ran:?}");
    assert!(
        fs::read(volume.file("store"))
            .unwrap()
            .iter()
            .all(|&byte| byte == 0)
    );
}

/// A bookmark through its commands: made, listed, the first of a changelist, and in the way of nothing that takes
/// numbers for those of devices.
#[test]
fn bookmarks_are_made_listed_compared_and_deleted() {
    let mut volume = Volume::with_agent();
    volume.start_server();
    let socket = volume.socket();
    assert_eq!(good(&["create", &socket, "0"]), "");
    assert_eq!(good(&["bookmark", &socket, "3"]), "");
    assert_eq!(good(&["create", &socket, "4"]), "");
    assert_eq!(good(&["bookmark", "--when-full", &socket, "4"]), "");
    let refused = ddsnap_with(&["bookmark", &socket, "4"]);
    let words = "could not create bookmark 4 because snapshot already exists (File exists)\n";
    assert_eq!((refused.code, refused.stderr.as_str()), (1, words));
    let list = good(&["list", &socket]);
    let bookmarks: Vec<&str> = list.lines().filter(|l| l.ends_with("  bookmark")).collect();
    assert_eq!(bookmarks.len(), 1, "{list}");
    assert!(bookmarks[0].starts_with("\ttag= 3 "), "{list}");
    let json = good(&["list", &socket, "--json"]);
    assert!(json.contains("\"state\": \"bookmark\""), "{json}");
    assert_eq!(
        json.matches("\"becomes_bookmark\": true").count(),
        1,
        "{json}"
    );
    assert_eq!(good(&["status", "--list", &socket]), "0 4\n");
    assert_eq!(ddsnap_with(&["status", "--state", &socket, "3"]).code, 2);
    let file = volume.name("changes");
    good(&["delta", "changelist", &socket, &file, "3", "4"]);
    let refused = ddsnap_with(&["delta", "changelist", &socket, &file, "4", "3"]);
    assert_eq!(refused.code, 1, "{refused:?}");
    assert!(
        refused
            .stderr
            .contains("it is a bookmark, which keeps no data"),
        "{refused:?}"
    );
    assert_eq!(good(&["bookmark", "--convert", &socket, "0"]), "");
    assert_eq!(good(&["bookmark", "--when-full=no", &socket, "4"]), "");
    good(&["delta", "changelist", &socket, &file, "0", "4"]);
    assert_eq!(good(&["delete", &socket, "3"]), "");
    assert_eq!(good(&["status", "--list", &socket]), "4\n");
    let status = good(&["status", &socket]);
    let row = status.lines().find(|line| line.starts_with("     0 "));
    assert!(
        row.is_some_and(|row| row.ends_with("       -        -        -")),
        "{status}"
    );
}

#[test]
fn a_server_without_a_store_says_so_with_exit_code_99() {
    let mut volume = Volume::new();
    volume.start_agent();
    let args = volume.server_args();
    let ran = ran(ddsnap().args(args).output().unwrap());
    assert_eq!((ran.code, ran.stdout.as_str()), (99, ""), "{ran:?}");
    assert!(ran.stderr.contains(&volume.name("store")), "{ran:?}");
    assert_eq!(ran.stderr.lines().count(), 1, "{ran:?}");
    assert!(!volume.file("server").exists() && !volume.file("server.pid").exists());
}

#[test]
fn snapshots_live_through_commands_and_a_killed_server() {
    let mut volume = Volume::with_agent();
    let pid = volume.start_server();
    let socket = volume.socket();
    assert_eq!(good(&["status", "--list", &socket]), "\n");
    assert_eq!(good(&["create", &socket, "0"]), "");
    assert_eq!(good(&["create", &socket, "2"]), "");
    assert_eq!(
        ddsnap_with(&["create", &socket, "2"]),
        Ran {
            code: 1,
            stdout: String::new(),
            stderr: "could not create snapshot 2 because snapshot already exists (File exists)\n"
                .to_owned(),
        }
    );
    assert_eq!(good(&["priority", &socket, "0", "-1"]), "255\n");
    assert_eq!(good(&["usecount", &socket, "2", "3"]), "3\n");
    assert_eq!(good(&["usecount", &socket, "2", "-2"]), "1\n");
    assert_eq!(good(&["usecount", &socket, "2"]), "1\n");

    let expected = "\
Snapshot list:
Snapshot 0:
\ttag= 0  priority= -1  use count= 0  creation time= DAY MON DD HH:MM:SS YEAR
Snapshot 1:
\ttag= 2  priority= 0  use count= 1  creation time= DAY MON DD HH:MM:SS YEAR
";
    assert_eq!(without_times(&good(&["list", &socket])), expected);
    let status = good(&["status", &socket]);
    let table: Vec<String> = without_times(&status)
        .lines()
        .skip(1)
        .map(str::to_owned)
        .collect();
    assert!(
        status.starts_with("Snapshot store block size = 8192; "),
        "{status}"
    );
    assert_eq!(
        table[..7],
        [
            "Origin size: 8,388,608 bytes",
            "Write density: 0",
            "Creation time: DAY MON DD HH:MM:SS YEAR",
            "  Snap            Creation time Usecnt Prio   Chunks Unshared   Shared",
            "     0 DAY MON DD HH:MM:SS YEAR      0   -1        0        0        0",
            "     2 DAY MON DD HH:MM:SS YEAR      1    0        0        0        0",
            "totals                                             0        0        0",
        ]
    );
    assert_eq!(good(&["status", "--list", &socket]), "0 2\n");
    assert_eq!(good(&["status", &socket, "--last"]), "2\n");
    assert_eq!(good(&["status", "--size", &socket]), "16384\n");
    assert_eq!(good(&["status", "--size", &socket, "2"]), "16384\n");
    let none = ddsnap_with(&["status", "--size", &socket, "7"]);
    assert_eq!((none.code, none.stdout.as_str()), (0, "0\n"));
    assert_eq!(none.stderr, "Snapshot 7 is not valid\n");
    assert_eq!(good(&["status", "--state", &socket, "2"]), "");
    assert_eq!(ddsnap_with(&["status", "--state", &socket, "7"]).code, 1);
    assert_eq!(
        ddsnap_with(&["delete", &socket, "2"]).stderr,
        "could not delete snapshot 2 because snapshot has non-zero usecount (Device or resource busy)\n"
    );
    assert_eq!(
        ddsnap_with(&["priority", &socket, "7", "0"]).stderr,
        "could not set priority because Snapshot tag 7 is not valid (No such file or directory)\n"
    );

    // Everything acknowledged is there after the server's sudden death; the agent survives it.
    let list = good(&["list", &socket]);
    let rows =
        |text: &str| -> Vec<String> { text.lines().skip(1).take(7).map(str::to_owned).collect() };
    volume.stop(pid, Signal::SIGKILL);
    // The kernel lets go of a dead process's sockets a moment after its end.
    wait_until("nobody to answer", || {
        ddsnap_with(&["list", &socket]).code == 99
    });
    let pid = volume.start_server();
    volume.await_log("Server was not shut down properly");
    volume.await_log("Replaying journal");
    assert_eq!(good(&["list", &socket]), list);
    assert_eq!(rows(&good(&["status", &socket])), rows(&status));

    // After an orderly end nothing is left behind and nothing is replayed.
    volume.stop(pid, Signal::SIGTERM);
    assert!(!volume.file("server").exists() && !volume.file("server.pid").exists());
    fs::remove_file(volume.file("server.log")).unwrap();
    volume.start_server();
    volume.await_log("serving ");
    assert!(
        !volume.log().contains("not shut down properly"),
        "{}",
        volume.log()
    );
    assert_eq!(good(&["list", &socket]), list);
    assert_eq!(good(&["delete", &socket, "0"]), "");
    assert_eq!(good(&["status", "--list", &socket]), "2\n");
}

#[test]
fn a_new_server_waits_for_the_old_and_takes_over() {
    let mut volume = Volume::with_agent();
    let old = volume.start_server();
    good(&["create", &volume.socket(), "4"]);
    let mut new = ddsnap()
        .args(volume.server_args())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stderr = BufReader::new(new.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    let waits =
        format!("ddsnap server: server {old} is active; waiting up to 30 s for it to end\n");
    assert_eq!(line, waits);
    assert!(new.try_wait().unwrap().is_none(), "it waits");
    assert_eq!(good(&["status", "--list", &volume.socket()]), "4\n");
    volume.stop(old, Signal::SIGTERM);
    let ran = ran(new.wait_with_output().unwrap());
    assert_eq!(ran.code, 0, "{ran:?}");
    let pid = volume.remember(&volume.name("server.pid"));
    assert_eq!(ran.stdout, format!("pid = {pid}\n"));
    assert_eq!(good(&["status", "--list", &volume.socket()]), "4\n");
}

#[test]
fn the_server_ends_in_order_when_its_agent_does() {
    let mut volume = Volume::with_agent();
    let agent = volume.daemons[0];
    let server = volume.start_server();
    volume.stop(agent, Signal::SIGTERM);
    wait_until("the server's end", || !is_alive(server));
    volume.await_log("the agent is gone");
    volume.await_log("the store is closed");
    assert!(!volume.file("agent").exists() && !volume.file("server").exists());
}

/// `pkill -f 'ddsnap agent'; ddsnap initialize -y ...` was refused three times of four: the server was still closing its
/// store.
#[test]
fn a_server_that_is_ending_is_waited_for() {
    let mut volume = Volume::with_agent();
    let agent = volume.daemons[0];
    let server = volume.start_server();
    kill(server, Signal::SIGSTOP).expect("a server");
    volume.stop(agent, Signal::SIGTERM);
    let (store, origin) = (volume.name("store"), volume.name("origin"));
    let mut waiting = ddsnap()
        .args(["initialize", "-y", &store, &origin])
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut said = String::new();
    let stderr = waiting.stderr.take().expect("piped");
    BufReader::new(stderr).read_line(&mut said).expect("a line");
    kill(server, Signal::SIGCONT).expect("a server");
    assert!(said.contains("waiting up to 5 s"), "{said}");
    let code = waiting.wait().expect("it ends").code();
    assert_eq!(code, Some(0));
}

#[test]
fn a_store_in_use_is_not_overwritten() {
    let mut volume = Volume::with_agent();
    volume.start_server();
    good(&["create", &volume.socket(), "4"]);
    let (store, origin) = (volume.name("store"), volume.name("origin"));
    let ran = ddsnap_with(&["initialize", "-y", &store, &origin]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("; stop that first"), "{ran:?}");
    assert_eq!(good(&["status", "--list", &volume.socket()]), "4\n");
}

#[test]
fn sockets_and_files_are_private_and_the_log_can_be_rotated() {
    let mut volume = Volume::with_agent();
    let server = volume.start_server();
    for name in [
        "agent",
        "server",
        "agent.log",
        "server.log",
        "server.pid",
        "agent.pid",
    ] {
        let mode = fs::metadata(volume.file(name))
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{name}");
    }
    fs::rename(volume.file("server.log"), volume.file("server.log.1")).unwrap();
    kill(server, Signal::SIGHUP).unwrap();
    wait_until("a new log", || volume.file("server.log").exists());
    good(&["create", &volume.socket(), "1"]);
    volume.await_log(&format!("ddsnap server[{server}]: snapshot 1 created"));
    let line = volume.log();
    assert!(
        without_times(&line).starts_with("DAY MON DD HH:MM:SS YEAR ddsnap server["),
        "{line}"
    );
}

#[test]
fn the_socket_of_a_killed_agent_is_replaced() {
    let mut volume = Volume::new();
    let first = volume.start_agent();
    volume.stop(first, Signal::SIGKILL);
    assert!(
        volume.file("agent").exists(),
        "a killed agent leaves its socket"
    );
    volume.start_agent();
}

#[test]
fn abstract_sockets_work() {
    let mut volume = Volume::new();
    volume.initialize();
    let unique = format!("ddsnap-test-{}", std::process::id());
    let (agent, server) = (format!("@{unique}-agent"), format!("@{unique}-server"));
    let (log, pidfile) = (volume.name("log"), volume.name("pid"));
    good(&["agent", &agent, "-l", &log, "-p", &pidfile]);
    volume.remember(&pidfile);
    let (store, origin) = (volume.name("store"), volume.name("origin"));
    good(&[
        "server", &store, &origin, &agent, &server, "-l", &log, "-p", &pidfile,
    ]);
    volume.remember(&pidfile);
    good(&["create", &server, "1"]);
    assert_eq!(good(&["status", "--list", &server]), "1\n");
    assert!(!Path::new(&server).exists());
}

#[test]
fn relative_names_work_although_daemons_leave_the_directory() {
    let mut volume = Volume::new();
    volume.initialize();
    let here = |args: &[&str]| {
        let ran = ran(ddsnap()
            .current_dir(volume.dir.path())
            .args(args)
            .output()
            .unwrap());
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{ran:?}");
    };
    here(&["agent", "agent", "-l", "agent.log", "-p", "agent.pid"]);
    here(&[
        "server",
        "store",
        "origin",
        "agent",
        "server",
        "-l",
        "server.log",
        "-p",
        "server.pid",
    ]);
    let (agent_pid, server_pid) = (volume.name("agent.pid"), volume.name("server.pid"));
    volume.remember(&agent_pid);
    let server = volume.remember(&server_pid);
    assert_eq!(
        fs::read_link(format!("/proc/{server}/cwd")).unwrap(),
        Path::new("/")
    );
    volume.stop(server, Signal::SIGTERM);
    assert!(!volume.file("server").exists() && !volume.file("server.pid").exists());
}

#[test]
fn metadata_may_have_a_device_of_its_own() {
    let mut volume = Volume::new();
    File::create(volume.file("meta"))
        .unwrap()
        .set_len(16 << 20)
        .unwrap();
    let (store, origin, meta) = (
        volume.name("store"),
        volume.name("origin"),
        volume.name("meta"),
    );
    good(&[
        "initialize",
        "-y",
        "-b",
        "4k",
        "-c",
        "16k",
        &store,
        &origin,
        &meta,
    ]);
    volume.start_agent();
    let (agent, server, pidfile) = (
        volume.name("agent"),
        volume.socket(),
        volume.name("server.pid"),
    );
    let log = volume.name("server.log");
    good(&[
        "server", &store, &origin, &meta, &agent, &server, "-l", &log, "-p", &pidfile,
    ]);
    volume.remember(&pidfile);
    let status = good(&["status", &server]);
    let lines: Vec<&str> = status.lines().collect();
    assert!(
        lines[0].starts_with("Snapshot metadata block size = 4096; "),
        "{status}"
    );
    assert!(
        lines[1].starts_with("Snapshot data store chunk size = 16384; "),
        "{status}"
    );
}

#[test]
fn an_injected_fault_kills_the_server_and_nothing_acknowledged_is_lost() {
    let mut volume = Volume::with_agent();
    let ran = ran(ddsnap()
        .args(volume.server_args())
        .envs([
            ("DDSNAP_TRIGGER", "CREATE_SNAPSHOT"),
            ("DDSNAP_COUNT", "3"),
            ("DDSNAP_ACTION", "abort"),
        ])
        .output()
        .unwrap());
    assert_eq!(ran.code, 0, "{ran:?}");
    let pid = volume.remember(&volume.name("server.pid"));
    let socket = volume.socket();
    good(&["create", &socket, "1"]);
    good(&["create", &socket, "2"]);
    let third = ddsnap_with(&["create", &socket, "3"]);
    assert_eq!(third.code, 1);
    assert!(
        third.stderr.contains("went away before it answered"),
        "{third:?}"
    );
    wait_until("the server's end", || !is_alive(pid));
    volume.start_server();
    assert_eq!(good(&["status", "--list", &socket]), "1 2\n");
}

#[test]
fn in_the_foreground_the_log_goes_to_standard_error() {
    let volume = Volume::with_agent();
    let mut args = volume.server_args();
    let log_at = args.iter().position(|arg| arg == "-l").unwrap();
    args.drain(log_at..log_at + 2);
    args.push("-f".to_owned());
    let server = ddsnap()
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    wait_until("the server", || {
        ddsnap_with(&["list", &volume.socket()]).code == 0
    });
    kill(Pid::from_raw(server.id() as i32), Signal::SIGINT).unwrap();
    let ran = ran(server.wait_with_output().unwrap());
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(ran.stdout.starts_with("pid = "), "{ran:?}");
    assert!(ran.stderr.contains("shutting down: SIGINT"), "{ran:?}");
}

#[test]
fn a_dump_is_in_the_log() {
    let mut volume = Volume::with_agent();
    let mut store = volume.open_store();
    store.create(SnapTag(2), 1).unwrap().unwrap();
    let ops: Vec<Op> = (0..300)
        .map(|chunk| Op::OriginWrite(Chunk(chunk)))
        .collect();
    assert!(store.commit(&ops).unwrap().iter().all(Result::is_ok));
    store.close().unwrap();

    volume.start_server();
    let socket = volume.socket();
    let lines = |volume: &Volume, words: &str| volume.log().matches(words).count();
    assert_eq!(good(&["dump", &socket, "3", "9"]), "");
    assert_eq!(lines(&volume, "dump of origin chunks 3 to 9"), 1);
    assert_eq!(lines(&volume, ", up to sequence 1: store chunk "), 7);
    assert_eq!(good(&["dump", &socket]), "");
    assert_eq!(lines(&volume, "end of the dump: 300 entries"), 1);
    assert_eq!(
        lines(
            &volume,
            ": origin chunk 299, up to sequence 1: store chunk "
        ),
        1
    );
    for (more, words) in [
        (&["9", "3"][..], "lies behind the last"),
        (&["x", "3"], "x is not the number of a chunk"),
        (&["1"], "dump takes SOCK, or SOCK A B"),
        (&["--json"], "--offline"),
    ] {
        let args: Vec<&str> = ["dump", &socket]
            .into_iter()
            .chain(more.iter().copied())
            .collect();
        let ran = ddsnap_with(&args);
        assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{ran:?}");
        assert!(ran.stderr.contains(words), "{ran:?}");
    }
}

/// A script that starts agent and server again after a crash of the server failed at the agent, which was
/// still there; the original's ended with its server.
#[test]
fn an_agent_without_a_server_makes_room_for_the_next() {
    let mut volume = Volume::with_agent();
    let first = volume.daemons[0];
    let second = volume.start_agent();
    wait_until("the end of the first agent", || !is_alive(first));
    let server = volume.start_server();
    let refused = ddsnap_with(&[
        "agent",
        &volume.name("agent"),
        "-l",
        &volume.name("other.log"),
    ]);
    assert_eq!(refused.code, 1, "{refused:?}");
    let text = format!("an agent with server {server} listens on it; stop that server first");
    assert!(refused.stderr.contains(&text), "{refused:?}");
    assert!(is_alive(second) && is_alive(server));
    volume.stop(server, Signal::SIGKILL);
    volume.start_agent();
    wait_until("the end of the second agent", || !is_alive(second));
    volume.start_server();
}

/// An empty variable was an unknown message, and the server did not start.
#[test]
fn an_empty_trigger_is_none() {
    let mut volume = Volume::with_agent();
    let args = volume.server_args();
    let output = ddsnap()
        .args(args)
        .env("DDSNAP_TRIGGER", "")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    volume.remember(&volume.name("server.pid"));
}

/// Scripts wait for a server's end by its pid file. It went while the store was still being closed, so
/// that a check right behind it found the store held.
#[test]
fn when_the_pid_file_is_gone_so_is_the_hold_of_the_store() {
    let mut volume = Volume::with_agent();
    for round in 0..5 {
        let pid = volume.start_server();
        kill(pid, Signal::SIGTERM).unwrap();
        let end = Instant::now() + PATIENCE;
        while volume.file("server.pid").exists() {
            assert!(Instant::now() < end, "the server does not end");
            std::hint::spin_loop();
        }
        let held = ddsnap::device::lock::share_store(&volume.file("store"));
        assert!(held.is_ok(), "round {round}: {held:?}");
        drop(held);
        wait_until("the server's end", || !is_alive(pid));
    }
}
