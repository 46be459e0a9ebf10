// SPDX-License-Identifier: GPL-2.0-only
//! Commands that change or prove a whole volume while its server runs, on plain files: `resize`, `revert`,
//! `scrub`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use ddsnap::daemon::pidfd;
use ddsnap::device::BlockDevice;
use ddsnap::device::uring::Access;
use ddsnap::server::start::open_device;
use ddsnap::store::{Devices, InitOptions, Location, Op, OpenOptions, Reverting, Store};
use ddsnap::units::{Chunk, ChunkShift, SnapTag};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const CHUNK: u64 = 8192;
const CHUNKS: u64 = 256;
const STORE_BYTES: u64 = 8 << 20;
const META_BYTES: u64 = 2 << 20;
/// How long anything here may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A volume of plain files. Its daemons end with it.
struct Volume {
    dir: tempfile::TempDir,
    meta: bool,
    daemons: Vec<Pid>,
}

#[derive(Debug, PartialEq, Eq)]
struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

fn ddsnap(args: &[&str]) -> Ran {
    let output = Command::new(env!("CARGO_BIN_EXE_ddsnap"))
        .args(args)
        .env("TZ", "UTC")
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Ran {
        code: output.status.code().expect("ended by itself"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Whether a thread of the process lives: until the last has ended, it may hold the store.
fn is_alive(pid: Pid) -> bool {
    pidfd::open(pid.as_raw().try_into().unwrap())
        .is_ok_and(|fd| !pidfd::wait_gone(&fd, Duration::ZERO).unwrap())
}

/// What chunk `chunk` holds after its `version`th writing.
fn content(chunk: u64, version: u8) -> Vec<u8> {
    let mut bytes = vec![version; CHUNK as usize];
    bytes[..8].copy_from_slice(&chunk.to_le_bytes());
    bytes
}

impl Volume {
    /// An origin at version 0, and an empty store.
    fn new(meta: bool) -> Volume {
        let volume = Volume {
            dir: tempfile::tempdir().unwrap(),
            meta,
            daemons: Vec::new(),
        };
        let make = |name: &str, len| File::create(volume.path(name)).unwrap().set_len(len);
        make("origin", CHUNKS * CHUNK).unwrap();
        make("store", STORE_BYTES).unwrap();
        if meta {
            make("meta", META_BYTES).unwrap();
        }
        (0..CHUNKS).for_each(|chunk| volume.write_origin(chunk, 0));
        let options = InitOptions {
            chunk: ChunkShift::from_bytes(CHUNK).unwrap(),
            journal_bytes: None,
            now: 0,
            uuid: [3; 16],
        };
        Store::initialize(&mut volume.devices(), &options).unwrap();
        volume
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn devices(&self) -> Devices {
        let open = |name: &str| -> Box<dyn BlockDevice> {
            Box::new(open_device(&self.path(name), Access::ReadWrite).unwrap())
        };
        Devices {
            origin: open("origin"),
            data: open("store"),
            meta: self.meta.then(|| open("meta")),
        }
    }

    fn write_origin(&self, chunk: u64, version: u8) {
        let origin = File::options()
            .write(true)
            .open(self.path("origin"))
            .unwrap();
        origin
            .write_all_at(&content(chunk, version), chunk * CHUNK)
            .unwrap();
    }

    /// Snapshots of these tags; after the nth of them these chunks are written with version n. Then
    /// the server is started.
    fn with_snapshots(meta: bool, snapshots: &[(u32, &[u64])]) -> Volume {
        let mut volume = Volume::new(meta);
        let options = OpenOptions {
            cache_bytes: 1 << 20,
        };
        let (mut store, _) = Store::open(volume.devices(), &options).unwrap();
        for (version, (tag, chunks)) in (1..).zip(snapshots) {
            store.create(SnapTag(*tag), 1000).unwrap().unwrap();
            for &chunk in *chunks {
                store.commit(&[Op::OriginWrite(Chunk(chunk))]).unwrap()[0].unwrap();
                volume.write_origin(chunk, version);
            }
        }
        store.close().unwrap();
        volume.start();
        volume
    }

    /// Destroys what the store has saved of a chunk; no server runs. Gives the chunk of the store.
    fn damage(&self, tag: u32, chunk: u64) -> u64 {
        let options = OpenOptions {
            cache_bytes: 1 << 20,
        };
        let (mut store, _) = Store::open(self.devices(), &options).unwrap();
        let place = match store.locate(SnapTag(tag), Chunk(chunk)).unwrap() {
            Ok(Location::Store(place)) => place.0,
            other => panic!("{other:?}"),
        };
        store.close().unwrap();
        let file = File::options()
            .write(true)
            .open(self.path("store"))
            .unwrap();
        file.write_all_at(&[0xee; 100], place * CHUNK).unwrap();
        place
    }

    fn start(&mut self) {
        let names = ["agent", "agent.log", "agent.pid"].map(|name| self.name(name));
        let ran = ddsnap(&["agent", &names[0], "-l", &names[1], "-p", &names[2]]);
        assert_eq!(ran.code, 0, "{ran:?}");
        self.remember("agent.pid");
        self.start_server();
    }

    fn start_server(&mut self) {
        let mut args = vec!["server".to_owned(), self.name("store"), self.name("origin")];
        if self.meta {
            args.push(self.name("meta"));
        }
        args.extend(["agent", "sock"].map(|name| self.name(name)));
        args.extend(["-k".to_owned(), "2m".to_owned()]);
        args.extend(["-l".to_owned(), self.name("log")]);
        args.extend(["-p".to_owned(), self.name("server.pid")]);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let ran = ddsnap(&args);
        assert_eq!(ran.code, 0, "{ran:?}\n{}", self.log());
        self.remember("server.pid");
    }

    fn remember(&mut self, pidfile: &str) {
        let text = fs::read_to_string(self.path(pidfile)).unwrap();
        self.daemons
            .push(Pid::from_raw(text.trim().parse().unwrap()));
    }

    /// Ends the server, in order or not.
    fn stop_server(&mut self, signal: Signal) {
        let pid = self.daemons.pop().unwrap();
        kill(pid, signal).unwrap();
        let end = Instant::now() + PATIENCE;
        while is_alive(pid) {
            assert!(Instant::now() < end, "the server does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn sock(&self) -> String {
        self.name("sock")
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn set_len(&self, name: &str, len: u64) {
        let file = File::options().write(true).open(self.path(name)).unwrap();
        file.set_len(len).unwrap();
    }

    fn sectors(&self, tag: &str) -> String {
        let ran = ddsnap(&["status", "--size", &self.sock(), tag]);
        assert_eq!(ran.code, 0, "{ran:?}");
        ran.stdout.trim().to_owned()
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        for pid in self.daemons.iter().filter(|pid| is_alive(**pid)) {
            let _ = kill(*pid, Signal::SIGKILL);
        }
    }
}

fn sizes(origin: u64, store: u64, meta: u64) -> String {
    format!(
        "origin size: {origin} bytes\nsnapshot store size: {store} bytes\nmetadata size: {meta} bytes\n"
    )
}

#[test]
fn a_volume_grows_while_it_is_served() {
    let mut volume = Volume::with_snapshots(false, &[(1, &[3])]);
    let sock = volume.sock();
    let (origin, store) = (2 * CHUNKS * CHUNK, 2 * STORE_BYTES);
    // Extended while the server has them open, as lvextend does.
    volume.set_len("origin", origin);
    volume.set_len("store", store);
    let ran = ddsnap(&["resize", &sock, "-o", "4m", "-s", "16m", "-m", "16m"]);
    assert_eq!(ran.stdout, sizes(origin, store, store), "{ran:?}");
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    assert_eq!(volume.sectors("1"), (CHUNKS * CHUNK / 512).to_string());
    let ran = ddsnap(&["create", &sock, "2"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(volume.sectors("2"), (origin / 512).to_string());
    volume.stop_server(Signal::SIGKILL);
    volume.start_server();
    let ran = ddsnap(&["resize", &sock, "-s", "16m"]);
    assert_eq!((ran.code, ran.stdout), (0, sizes(origin, store, store)));
}

#[test]
fn an_origin_is_cut_and_its_snapshots_stay_whole() {
    let mut volume = Volume::with_snapshots(false, &[(1, &[3, 200]), (2, &[201])]);
    let sock = volume.sock();
    let ran = ddsnap(&["resize", &sock, "--origin", "800k"]);
    assert_eq!(
        (ran.code, ran.stdout),
        (0, sizes(800 << 10, STORE_BYTES, STORE_BYTES))
    );
    volume.set_len("origin", 800 << 10);
    volume.stop_server(Signal::SIGTERM);
    let out = volume.name("out");
    let (store, origin) = (volume.name("store"), volume.name("origin"));
    for (tag, versions) in [("1", [0, 0, 0]), ("2", [1, 1, 0])] {
        let ran = ddsnap(&["extract", &store, &origin, tag, &out]);
        assert_eq!(ran.code, 0, "{ran:?}");
        let found = fs::read(&out).unwrap();
        assert_eq!(found.len() as u64, CHUNKS * CHUNK);
        for chunk in 0..CHUNKS {
            let version = match chunk {
                3 => versions[0],
                200 => versions[1],
                201 => versions[2],
                _ => 0,
            };
            let at = (chunk * CHUNK) as usize;
            assert_eq!(
                found[at..at + CHUNK as usize],
                content(chunk, version),
                "{tag} {chunk}"
            );
        }
        fs::remove_file(&out).unwrap();
    }
}

#[test]
fn metadata_of_its_own_has_a_size_of_its_own() {
    let volume = Volume::with_snapshots(true, &[(1, &[3])]);
    let sock = volume.sock();
    volume.set_len("meta", 3 << 20);
    let ran = ddsnap(&["resize", &sock, "-m", "3m", "-s", "8m"]);
    assert_eq!(
        (ran.code, ran.stdout),
        (0, sizes(CHUNKS * CHUNK, STORE_BYTES, 3 << 20))
    );
    let ran = ddsnap(&["resize", &sock, "-m", "1m"]);
    assert_eq!(
        (ran.code, ran.stdout),
        (0, sizes(CHUNKS * CHUNK, STORE_BYTES, 1 << 20))
    );
}

#[test]
fn sizes_that_cannot_be_had_give_a_sentence_and_255() {
    let volume = Volume::with_snapshots(false, &[(1, &[3])]);
    let sock = volume.sock();
    let same = sizes(CHUNKS * CHUNK, STORE_BYTES, STORE_BYTES);
    let ran = ddsnap(&["resize", &sock, "-o", "1g"]);
    let why =
        "could not resize because the origin device has only 2097152 bytes; extend it first\n";
    assert_eq!(
        (ran.code, ran.stdout.as_str(), ran.stderr.as_str()),
        (255, same.as_str(), why)
    );
    // A size between two sectors is rounded, which is not what was asked for.
    let ran = ddsnap(&["resize", &sock, "-o", "100000"]);
    assert_eq!(
        (ran.code, ran.stdout),
        (255, sizes(99_840, STORE_BYTES, STORE_BYTES))
    );
    let ran = ddsnap(&["resize", &sock, "-s", "6m", "-m", "7m"]);
    let why = "could not resize because snapshot device and metadata device are the same, can't resize them to two values (Invalid argument)\n";
    assert_eq!(
        (ran.code, ran.stdout.as_str(), ran.stderr.as_str()),
        (1, "", why)
    );
    for args in [
        &["resize", &sock][..],
        &["resize", &sock, "-o", "x"],
        &["resize"],
    ] {
        assert_eq!(ddsnap(args).code, 1, "{args:?}");
    }
    assert_eq!(ddsnap(&["resize", "@no-such-server", "-o", "1m"]).code, 99);
}

/// The origin's chunks, as versions.
fn versions(volume: &Volume) -> Vec<u8> {
    let bytes = fs::read(volume.path("origin")).unwrap();
    let chunks = (0..).zip(bytes.chunks(CHUNK as usize));
    chunks
        .map(|(chunk, bytes)| {
            let version = bytes[8];
            assert_eq!(bytes, content(chunk, version), "chunk {chunk}");
            version
        })
        .collect()
}

/// All at version 0 but these.
fn all_but(other: &[(u64, u8)]) -> Vec<u8> {
    let mut versions = vec![0; CHUNKS as usize];
    other
        .iter()
        .for_each(|&(chunk, version)| versions[chunk as usize] = version);
    versions
}

#[test]
fn a_volume_goes_back_and_forth_between_its_snapshots() {
    let mut volume = Volume::with_snapshots(false, &[(1, &[3, 4, 200]), (2, &[4, 5])]);
    let sock = volume.sock();
    let present = all_but(&[(3, 1), (4, 2), (5, 2), (200, 1)]);
    assert_eq!(versions(&volume), present);
    let ran = ddsnap(&["create", &sock, "9"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    for (tag, wanted) in [
        ("1", all_but(&[])),
        ("2", all_but(&[(3, 1), (4, 1), (200, 1)])),
        ("9", present.clone()),
        ("1", all_but(&[])),
    ] {
        let ran = ddsnap(&["revert", &sock, tag]);
        assert_eq!(
            (ran.code, ran.stdout.as_str(), ran.stderr.as_str()),
            (0, "", ""),
            "{tag}"
        );
        assert_eq!(versions(&volume), wanted, "{tag}");
    }
    // It lasts, and so do all of the snapshots.
    volume.stop_server(Signal::SIGKILL);
    volume.start_server();
    assert_eq!(versions(&volume), all_but(&[]));
    let ran = ddsnap(&["revert", &sock, "9"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert_eq!(versions(&volume), present);
}

#[test]
fn a_revert_that_was_begun_goes_on_when_the_server_starts() {
    let mut volume = Volume::with_snapshots(false, &[(1, &[3, 4, 200]), (2, &[4, 5])]);
    volume.stop_server(Signal::SIGTERM);
    let options = OpenOptions {
        cache_bytes: 1 << 20,
    };
    let (mut store, _) = Store::open(volume.devices(), &options).unwrap();
    store.revert_begin(SnapTag(1)).unwrap().unwrap();
    while store.revert_step(1).unwrap().unwrap() != Reverting::Checked {}
    store.revert_start().unwrap().unwrap();
    assert_eq!(store.revert_step(1).unwrap(), Ok(Reverting::More));
    // The power goes.
    drop(store);
    assert_ne!(versions(&volume), all_but(&[]));
    volume.start_server();
    let end = Instant::now() + PATIENCE;
    while !volume
        .log()
        .contains("the origin has the content of snapshot 1")
    {
        assert!(Instant::now() < end, "{}", volume.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(volume.log().contains("the revert to snapshot 1 goes on"));
    assert_eq!(versions(&volume), all_but(&[]));
}

#[test]
fn a_revert_that_cannot_be_done_is_refused() {
    let mut volume = Volume::with_snapshots(false, &[(1, &[3, 200]), (2, &[4])]);
    let sock = volume.sock();
    let before = versions(&volume);
    let ran = ddsnap(&["revert", &sock, "7"]);
    let why = "could not revert to snapshot 7 because snapshot doesn't exist (No such file or directory)\n";
    assert_eq!(
        (ran.code, ran.stdout.as_str(), ran.stderr.as_str()),
        (1, "", why)
    );
    assert_eq!(ddsnap(&["revert", "@no-such-server", "1"]).code, 99);
    // Of the snapshot something is lost: nothing is written.
    volume.stop_server(Signal::SIGTERM);
    volume.damage(1, 200);
    volume.start_server();
    let ran = ddsnap(&["revert", &sock, "1"]);
    assert_eq!(ran.code, 1);
    let why = "could not revert to snapshot 1 because chunk 200 of snapshot 1 cannot be read: ";
    assert!(ran.stderr.starts_with(why), "{ran:?}");
    assert_eq!(versions(&volume), before);
    // The other snapshot is sound.
    assert_eq!(ddsnap(&["revert", &sock, "2"]).code, 0);
    assert_eq!(versions(&volume), all_but(&[(3, 1), (200, 1)]));
}

#[test]
fn a_scrub_names_what_is_bad() {
    let mut volume = Volume::with_snapshots(false, &[(1, &[3]), (2, &[3, 4]), (5, &[])]);
    let sock = volume.sock();
    let ran = ddsnap(&["scrub", &sock]);
    let sound = format!("{} bytes read, 0 bad chunks\n", 3 * CHUNK);
    assert_eq!((ran.code, ran.stdout, ran.stderr.as_str()), (0, sound, ""));
    volume.stop_server(Signal::SIGTERM);
    let place = volume.damage(1, 4);
    volume.start_server();
    let ran = ddsnap(&["scrub", &sock, "--rate", "0"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    let lines: Vec<&str> = ran.stdout.lines().collect();
    let named = format!("store chunk {place}, chunk 4 of snapshots 1 2: has checksum 0x");
    assert!(lines[0].starts_with(&named), "{ran:?}");
    assert_eq!(
        lines[1..],
        [format!("{} bytes read, 1 bad chunks", 3 * CHUNK)]
    );
    let end = Instant::now() + PATIENCE;
    while !volume.log().contains(lines[0]) {
        assert!(Instant::now() < end, "{}", volume.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    let ran = ddsnap(&["scrub", &sock, "--json"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (1, ""));
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(json["schema"], "ddsnap-scrub-1");
    assert_eq!(json["bytes_read"], 3 * CHUNK);
    let bad = &json["bad"][0];
    assert_eq!(bad["store_chunk"], place);
    assert_eq!(bad["origin_chunk"], 4);
    assert_eq!(bad["snapshots"], serde_json::json!([1, 2]));
    assert_eq!(bad["fault"], "checksum");
    assert_ne!(bad["checksum_found"], bad["checksum_expected"]);
}

#[test]
fn a_scrub_is_no_faster_than_asked_for() {
    let volume = Volume::with_snapshots(
        false,
        &[(
            1,
            &[
                0, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140, 150, 160,
            ],
        )],
    );
    let start = Instant::now();
    // A step of 16 chunks, a pause of a second for them, and the last chunk.
    let ran = ddsnap(&["scrub", &volume.sock(), "--rate", "128k"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(
        start.elapsed() >= Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
}
