// SPDX-License-Identifier: GPL-2.0-only
//! Mistakes an administrator makes, and outputs that cannot be written: nothing is lost by them, and the
//! exit code is the documented one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod commands;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use commands::{Ran, Volume, ddsnap, ddsnap_with, good, is_alive, ran, wait_until};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// Asserts a refusal of one sentence that has `words`.
fn refused(args: &[&str], code: i32, words: &str) {
    let ran = ddsnap_with(args);
    assert_eq!(
        (ran.code, ran.stdout.as_str()),
        (code, ""),
        "{args:?}: {ran:?}"
    );
    assert!(ran.stderr.contains(words), "{args:?}: {ran:?}");
}

fn filled(volume: &Volume, name: &str, byte: u8) -> String {
    fs::write(volume.file(name), vec![byte; 8 << 20]).unwrap();
    volume.name(name)
}

/// `initialize o o` wrote a store over the origin, as did a store and an origin in each other's place.
#[test]
fn initialize_takes_no_device_for_another() {
    let mut volume = Volume::with_agent();
    let (store, origin) = (volume.name("store"), volume.name("origin"));
    let own = filled(&volume, "own", 7);
    let untouched = |path: &str| fs::read(path).unwrap() == vec![7; 8 << 20];
    fs::hard_link(&own, volume.file("link")).unwrap();
    let link = volume.name("link");
    refused(&["initialize", &own, &link], 1, "are the same device");
    refused(
        &["initialize", &store, &own, &link],
        1,
        "are the same device",
    );
    refused(
        &["initialize", &store, &own, &store],
        1,
        "are the same device",
    );
    refused(
        &["initialize", "-y", &own, &store],
        1,
        "the order is SNAPSTORE ORIGIN",
    );
    assert!(untouched(&own));
    fs::copy(&own, &origin).unwrap();
    volume.start_server();
    refused(&["initialize", &own, &store], 1, "held by process");
    refused(&["initialize", "-y", &origin, &own], 1, "held by process");
    assert!(untouched(&origin) && untouched(&own));
}

/// A store was made over a file system without a word, and a store with snapshots by a tool that had not
/// looked.
#[test]
fn initialize_overwrites_nothing_that_somebody_may_miss() {
    let mut volume = Volume::new();
    let (store, origin) = (volume.name("store"), volume.name("origin"));
    let swap = filled(&volume, "swap", 0);
    // linux: include/linux/swap.h; version 1, last page 255.
    let file = File::options().write(true).open(&swap).unwrap();
    file.write_all_at(&[1, 0, 0, 0, 255, 0, 0, 0], 1024)
        .unwrap();
    file.write_all_at(b"SWAPSPACE2", 4086).unwrap();
    let before = fs::read(&swap).unwrap();
    let words = "holds swap space; nothing was changed (--force overwrites it)";
    refused(&["initialize", "-y", &swap, &origin], 1, words);
    refused(&["initialize", "-y", &store, &origin, &swap], 1, words);
    refused(&["initialize", "-n", &swap, &origin], 1, words);
    good(&["initialize", "-n", "--force", &swap, &origin]);
    assert!(fs::read(&swap).unwrap() == before);
    good(&["initialize", "--force", &swap, &origin]);
    assert!(
        !fs::read(&swap)
            .unwrap()
            .windows(10)
            .any(|w| w == b"SWAPSPACE2")
    );

    good(&["initialize", "-n", &store, &origin]);
    volume.initialize();
    volume.start_agent();
    let server = volume.start_server();
    good(&["create", &volume.socket(), "3"]);
    volume.stop(server, Signal::SIGTERM);
    refused(
        &["initialize", "-n", &store, &origin],
        1,
        "a snapshot store with one snapshot; nothing was changed",
    );
}

/// Only the metadata device was locked: the store's data could be wiped under its server, or two servers
/// write to it.
#[test]
fn the_data_of_a_store_with_a_metadata_device_is_held_too() {
    let mut volume = Volume::new();
    let [store, origin, meta, other] = ["store", "origin", "meta", "meta2"].map(|n| volume.name(n));
    for name in ["meta", "meta2"] {
        let file = File::create(volume.file(name)).unwrap();
        file.set_len(4 << 20).unwrap();
    }
    good(&["initialize", "-y", &store, &origin, &other]);
    good(&["initialize", "-y", &store, &origin, &meta]);
    volume.start_agent();
    let [agent, socket, log, pid] =
        ["agent", "server", "server.log", "server.pid"].map(|name| volume.name(name));
    good(&[
        "server", &store, &origin, &meta, &agent, &socket, "-l", &log, "-p", &pid,
    ]);
    volume.remember(&pid);
    let before = fs::read(&store).unwrap();
    refused(&["initialize", "-y", &store, &origin], 1, "held by process");
    refused(
        &["initialize", "-y", &store, &origin, &other],
        1,
        "held by process",
    );
    refused(&["check", &store, &other], 1, "held by process");
    refused(&["check", &store], 1, "held by process");
    assert!(fs::read(&store).unwrap() == before);
}

/// A server took its own store, or a file without a single chunk, as origin.
#[test]
fn a_server_refuses_what_cannot_be_its_origin() {
    let volume = Volume::with_agent();
    let [store, agent, log, pid] = ["store", "agent", "log", "pid"].map(|name| volume.name(name));
    File::create(volume.file("empty")).unwrap();
    let with = |origin: &str| {
        ddsnap_with(&[
            "server",
            &store,
            origin,
            &agent,
            &volume.name("s"),
            "-l",
            &log,
            "-p",
            &pid,
        ])
    };
    let same = with(&store);
    assert_eq!(same.code, 1, "{same:?}");
    assert!(same.stderr.contains("are the same device"), "{same:?}");
    let empty = with(&volume.name("empty"));
    assert_eq!(empty.code, 99, "{empty:?}");
    assert!(empty.stderr.contains("is it the origin?"), "{empty:?}");
}

/// It panicked at the next line of its log: a dead logger stopped the volume.
#[test]
fn a_server_outlives_the_reader_of_its_log() {
    let mut volume = Volume::with_agent();
    let mut args = volume.server_args();
    args.retain(|arg| arg != "-l" && *arg != volume.name("server.log"));
    args.push("-f".to_owned());
    let mut server = ddsnap()
        .args(args)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap())
        .read_line(&mut line)
        .unwrap();
    let pid = Pid::from_raw(line.trim().strip_prefix("pid = ").unwrap().parse().unwrap());
    volume.daemons.push(pid);
    wait_until("the socket", || volume.file("server").exists());
    drop(server.stderr.take());
    good(&["create", &volume.socket(), "3"]);
    good(&["delete", &volume.socket(), "3"]);
    assert!(is_alive(pid));
    nix::sys::signal::kill(pid, Signal::SIGTERM).unwrap();
    assert_eq!(server.wait().unwrap().code(), Some(0));
}

/// What cannot be said made a panic, exit code 101, of every refusal.
#[test]
fn exit_codes_do_not_depend_on_who_listens() {
    let volume = Volume::new();
    let socket = volume.socket();
    let unheard = |args: &[&str]| {
        let full = || File::options().write(true).open("/dev/full").unwrap();
        let mut command = ddsnap();
        let status = command.args(args).stdout(full()).stderr(full()).status();
        status.unwrap().code()
    };
    assert_eq!(unheard(&["list", &socket]), Some(99));
    assert_eq!(unheard(&["status", "--state", &socket]), Some(9));
    assert_eq!(unheard(&["check", &volume.name("none")]), Some(1));
    assert_eq!(unheard(&["--usage"]), Some(0));
}

/// 1 says that there is no such snapshot; a script that goes on from there would do harm.
#[test]
fn a_misused_state_is_not_an_absent_snapshot() {
    let mut volume = Volume::with_agent();
    volume.start_server();
    let socket = volume.socket();
    let too_long = "x".repeat(200);
    for args in [
        &["status", "--state", &socket, "abc"][..],
        &["status", "--state", &socket, "-1"],
        &["status", "--state", &socket, "0", "1"],
        &["status", "--state", "--json", &socket, "0"],
        &["status", "--state", "", "0"],
        &["status", "--state", &too_long, "0"],
        &["status", "--state", &socket],
        &["status", "--state=0", &socket],
    ] {
        assert_eq!(ddsnap_with(args).code, 9, "{args:?}");
    }
    assert_eq!(ddsnap_with(&["status", "--state", &socket, "0"]).code, 1);
}

/// A snapshot was squashed although nobody could read that it would be.
#[test]
fn a_repair_that_cannot_name_what_is_lost_gives_nothing_up() {
    let volume = Volume::new();
    volume.initialize();
    let store = volume.name("store");
    // The first block of the journal, with a record behind it, and nobody can tell what it said.
    let mut opened = volume.open_store();
    for tag in 1..4 {
        let tag = ddsnap::units::SnapTag(tag);
        opened.create(tag, 1).unwrap().unwrap();
    }
    drop(opened);
    let mut bytes = fs::read(&store).unwrap();
    bytes[(128 << 10) + 4096 + 100] ^= 1;
    fs::write(&store, &bytes).unwrap();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut command = ddsnap();
    let repair = ran(command
        .args(["check", &store, "--repair"])
        .stdout(full)
        .output()
        .unwrap());
    assert_eq!(repair.code, 1, "{repair:?}");
    assert!(
        repair.stderr.contains("nothing was written to the store"),
        "{repair:?}"
    );
    assert!(fs::read(&store).unwrap() == bytes);
    // As with `| head`: the reader is gone.
    let (reader, writer) = nix::unistd::pipe().unwrap();
    drop(reader);
    let mut command = ddsnap();
    let repair = ran(command
        .args(["check", &store, "--repair"])
        .stdout(writer)
        .output()
        .unwrap());
    assert_eq!(repair.code, 1, "{repair:?}");
    assert!(fs::read(&store).unwrap() == bytes);
    assert_eq!(ddsnap_with(&["check", &store, "--repair"]).code, 2);
}

/// It opened the store, found that it could not serve, and left it to be recovered.
#[test]
fn a_start_that_fails_leaves_nothing_to_recover() {
    let mut volume = Volume::with_agent();
    let mut args = volume.server_args();
    *args.last_mut().unwrap() = volume.name("none/pid");
    let failed = ran(ddsnap().args(&args).output().unwrap());
    assert_eq!(failed.code, 1, "{failed:?}");
    assert!(
        failed.stderr.contains("cannot write the pid file"),
        "{failed:?}"
    );
    volume.start_server();
    volume.await_log("serving ");
    assert!(
        !volume.log().contains("not shut down properly"),
        "{}",
        volume.log()
    );
}

#[test]
fn an_output_is_not_an_input() {
    let mut volume = Volume::with_agent();
    volume.start_server();
    let socket = volume.socket();
    good(&["create", &socket, "3"]);
    good(&["create", &socket, "4"]);
    let (list, stem) = (volume.name("list"), volume.name("vol"));
    good(&["delta", "changelist", &socket, &list, "3", "4"]);
    let before = fs::read(&list).unwrap();
    refused(
        &["delta", "create", &list, &list, &stem],
        1,
        "cannot be written to as well",
    );
    assert_eq!(fs::read(&list).unwrap(), before);
    let snapshot = filled(&volume, "vol(3)", 1);
    refused(
        &["delta", "create", &list, &snapshot, &stem],
        1,
        "cannot be written to as well",
    );
    let store = volume.name("store");
    refused(
        &["delta", "changelist", &socket, &store, "3", "4"],
        1,
        "held by process",
    );
    let (delta, origin) = (volume.name("delta"), volume.name("origin"));
    filled(&volume, "vol(4)", 2);
    good(&["delta", "create", &list, &delta, &stem]);
    refused(&["delta", "apply", &delta, &origin], 1, "held by process");
    refused(
        &["delta", "changelist", &socket, &list, "3", "99"],
        1,
        "could not list the changes of snapshot 99 because snapshot doesn't exist",
    );
}

#[test]
fn numbers_that_are_none_get_a_sentence() {
    let mut volume = Volume::with_agent();
    volume.start_server();
    let socket = volume.socket();
    let (store, origin) = (volume.name("store"), volume.name("origin"));
    for args in [
        &["create", &socket, "-1"][..],
        &["delete", &socket, "-1"],
        &["status", &socket, "-1"],
        &["extract", &store, &origin, "-1", "out"],
    ] {
        refused(args, 1, "a snapshot's number is 0 to 4294967294");
    }
    for args in [
        &["resize", &socket, "-o", "-1"][..],
        &["initialize", "-y", "-c", "-1", &store, &origin],
    ] {
        refused(args, 1, "a size is a number of bytes");
    }
    refused(
        &["resize", &socket],
        1,
        "use --origin, --snapshot or --metadata",
    );
    let rounded: Ran = ddsnap_with(&["resize", &socket, "-o", "4200000"]);
    assert_eq!(rounded.code, 255, "{rounded:?}");
    assert!(
        rounded.stderr.contains("4200000 bytes were asked for"),
        "{rounded:?}"
    );
}

/// "No space left on device" at the question made the reader think of the store.
#[test]
fn a_question_that_cannot_be_asked_names_the_output() {
    let volume = Volume::new();
    volume.initialize();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let mut command = ddsnap();
    let (store, origin) = (volume.name("store"), volume.name("origin"));
    let mut child = command
        .args(["initialize", &store, &origin])
        .stdout(full)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut text = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut text)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(text.contains("cannot write to standard output"), "{text}");
}
