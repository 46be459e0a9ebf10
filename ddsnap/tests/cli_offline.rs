// SPDX-License-Identifier: GPL-2.0-only
//! Commands that read a store without its server, on plain files: `extract`, `export`, `check` and
//! `dump`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use ddsnap::device::BlockDevice;
use ddsnap::device::lock::lock_store;
use ddsnap::device::uring::{Access, UringDevice};
use ddsnap::store::{Devices, Done, InitOptions, Location, Op, OpenOptions, Store};
use ddsnap::units::{Chunk, ChunkShift, SnapTag};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const CHUNK: u64 = 8192;
const CHUNKS: u64 = 512;
/// The last chunk is a short one.
const ORIGIN_BYTES: u64 = CHUNKS * CHUNK - 3 * 512;
const STORE_BYTES: u64 = 8 << 20;

/// A volume on plain files, and what its snapshots contain.
struct Files {
    dir: tempfile::TempDir,
    meta: bool,
    snapshots: Vec<(u32, Vec<u8>)>,
    /// Where the store keeps chunk 3 of snapshot 2.
    saved: u64,
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

/// Content number `stamp` of a chunk; 0 is all zeros.
fn content(stamp: u8) -> Vec<u8> {
    (0..CHUNK)
        .map(|at| stamp.wrapping_mul(at as u8 | 1))
        .collect()
}

impl Files {
    /// Snapshots 2 and 4 of an origin that changed before, between and after; a chunk of snapshot 2
    /// was written to. `closed`: the store was closed in order, else its server was killed.
    fn new(meta: bool, closed: bool) -> Files {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str, len| File::create(dir.path().join(name)).unwrap().set_len(len);
        make("origin", ORIGIN_BYTES).unwrap();
        make("store", STORE_BYTES).unwrap();
        if meta {
            make("meta", 2 << 20).unwrap();
        }
        let mut files = Files {
            dir,
            meta,
            snapshots: Vec::new(),
            saved: 0,
        };
        let options = InitOptions {
            chunk: ChunkShift::from_bytes(CHUNK).unwrap(),
            journal_bytes: None,
            now: 1_795_311_879,
            uuid: *b"0123456789abcdef",
        };
        Store::initialize(&mut files.devices(), &options).unwrap();
        let origin = File::options()
            .write(true)
            .open(files.path("origin"))
            .unwrap();
        let put = |chunk: u64, stamp| {
            let at = chunk * CHUNK;
            let bytes = (ORIGIN_BYTES - at).min(CHUNK) as usize;
            origin.write_all_at(&content(stamp)[..bytes], at).unwrap();
        };
        (0..40).for_each(|chunk| put(chunk, 1 + chunk as u8));
        let mut store = files.open();
        for (tag, chunks, stamp) in [(2, [3, 10, 511], 100), (4, [3, 11, 501], 200)] {
            store.create(SnapTag(tag), 1_795_311_880).unwrap().unwrap();
            let whole = fs::read(files.path("origin")).unwrap();
            files.snapshots.push((tag, whole));
            for chunk in chunks {
                let done = store.commit(&[Op::OriginWrite(Chunk(chunk))]).unwrap();
                assert_eq!(done, [Ok(Done::Unique)]);
                put(chunk, stamp);
            }
        }
        let done = store
            .commit(&[Op::SnapshotWrite(SnapTag(2), Chunk(20))])
            .unwrap();
        let Ok(Done::Private(place)) = done[0] else {
            panic!("{done:?}");
        };
        let device = File::options()
            .write(true)
            .open(files.path("store"))
            .unwrap();
        device.write_all_at(&content(77), place.0 * CHUNK).unwrap();
        let at = 20 * CHUNK as usize;
        files.snapshots[0].1[at..at + CHUNK as usize].copy_from_slice(&content(77));
        let Ok(Location::Store(place)) = store.locate(SnapTag(2), Chunk(3)).unwrap() else {
            panic!("chunk 3 was not saved");
        };
        files.saved = place.0;
        match closed {
            true => store.close().unwrap(),
            false => drop(store),
        }
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn devices(&self) -> Devices {
        let open = |name, access| -> Box<dyn BlockDevice> {
            Box::new(UringDevice::open(&self.path(name), access).unwrap())
        };
        Devices {
            origin: open("origin", Access::Read),
            data: open("store", Access::ReadWrite),
            meta: self.meta.then(|| open("meta", Access::ReadWrite)),
        }
    }

    fn open(&self) -> Store {
        let options = OpenOptions {
            cache_bytes: 1 << 20,
        };
        Store::open(self.devices(), &options).unwrap().0
    }

    /// The operands STORE ORIGIN [META].
    fn operands(&self) -> Vec<String> {
        let names = ["store", "origin", "meta"];
        let count = if self.meta { 3 } else { 2 };
        names[..count].iter().map(|name| self.name(name)).collect()
    }

    fn extract(&self, tag: &str, out: &str, more: &[&str]) -> Ran {
        let operands = self.operands();
        let mut args = vec!["extract"];
        args.extend(operands.iter().map(String::as_str));
        let out = self.name(out);
        args.extend([tag, &out]);
        args.extend(more);
        ddsnap(&args)
    }

    /// Every byte of every device.
    fn bytes(&self) -> Vec<Vec<u8>> {
        self.operands()
            .iter()
            .map(|path| fs::read(path).unwrap())
            .collect()
    }

    /// Names of all files here.
    fn listing(&self) -> Vec<String> {
        let entries = fs::read_dir(self.dir.path()).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    fn flip(&self, name: &str, offset: u64) {
        let file = File::options()
            .read(true)
            .write(true)
            .open(self.path(name))
            .unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset).unwrap();
        byte[0] ^= 0x10;
        file.write_all_at(&byte, offset).unwrap();
    }
}

/// A running `ddsnap export`.
struct Export {
    child: Child,
    socket: PathBuf,
}

impl Export {
    fn start(files: &Files, tag: &str) -> Export {
        let socket = files.path("a socket");
        let mut child = Command::new(env!("CARGO_BIN_EXE_ddsnap"))
            .arg("export")
            .args(files.operands())
            .args([tag, "--socket", socket.to_str().unwrap()])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // It prints the URI when it listens.
        let mut uri = String::new();
        let stdout = child.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut uri).unwrap();
        let path = socket.to_str().unwrap().replace(' ', "%20");
        assert_eq!(uri, format!("nbd+unix:///?socket={path}\n"));
        Export { child, socket }
    }

    fn connect(&self) -> (UnixStream, u64) {
        let mut stream = UnixStream::connect(&self.socket).unwrap();
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        // Fixed newstyle without zeros, then the default export in the old way.
        stream
            .write_all(&[&[0, 0, 0, 3][..], b"IHAVEOPT", &[0, 0, 0, 1, 0, 0, 0, 0]].concat())
            .unwrap();
        let mut description = [0; 10];
        stream.read_exact(&mut description).unwrap();
        assert_eq!(description[8..], [1, 3], "read-only, many connections");
        let len = u64::from_be_bytes(description[..8].try_into().unwrap());
        (stream, len)
    }

    fn read(stream: &mut UnixStream, offset: u64, len: usize) -> Result<Vec<u8>, u32> {
        let head = [0x25, 0x60, 0x95, 0x13, 0, 0, 0, 0];
        let cookie = 77u64.to_be_bytes();
        let range = [&offset.to_be_bytes()[..], &(len as u32).to_be_bytes()].concat();
        stream
            .write_all(&[&head[..], &cookie, &range].concat())
            .unwrap();
        let mut answer = [0; 16];
        stream.read_exact(&mut answer).unwrap();
        assert_eq!(answer[..4], [0x67, 0x44, 0x66, 0x98]);
        assert_eq!(answer[8..], cookie);
        match u32::from_be_bytes(answer[4..8].try_into().unwrap()) {
            0 => {
                let mut data = vec![0; len];
                stream.read_exact(&mut data).unwrap();
                Ok(data)
            }
            error => Err(error),
        }
    }

    /// Ends it as an administrator does, and gives what it said on standard error.
    fn end(mut self) -> String {
        kill(Pid::from_raw(self.child.id() as i32), Signal::SIGTERM).unwrap();
        assert!(self.child.wait().unwrap().success());
        assert!(!self.socket.exists(), "the socket stayed");
        let mut said = String::new();
        let stderr = self.child.stderr.as_mut().unwrap();
        stderr.read_to_string(&mut said).unwrap();
        said
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_snapshot_is_served_over_nbd_whatever_the_ranges() {
    for (meta, closed) in [(false, true), (true, false)] {
        let files = Files::new(meta, closed);
        for (tag, expected) in &files.snapshots {
            let export = Export::start(&files, &tag.to_string());
            let (mut one, len) = export.connect();
            let (mut other, _) = export.connect();
            assert_eq!(len, expected.len() as u64);
            let whole = Export::read(&mut one, 0, expected.len()).unwrap();
            assert!(whole == *expected, "meta={meta} closed={closed} {tag}");
            // Neither begins nor ends with a chunk, and crosses a window of reading.
            for (offset, len) in [(1, 1), (CHUNK - 1, 2), (3 * CHUNK + 5, 2 << 20), (11, 9000)] {
                let found = Export::read(&mut other, offset, len).unwrap();
                assert!(
                    found == expected[offset as usize..][..len],
                    "{offset} {len}"
                );
            }
            assert_eq!(
                Export::read(&mut one, expected.len() as u64 - 1, 2),
                Err(22)
            );
            drop((one, other));
            assert_eq!(export.end(), "");
        }
    }
}

#[test]
fn a_damaged_chunk_is_an_error_for_its_reader_and_the_rest_is_served() {
    let files = Files::new(false, true);
    files.flip("store", files.saved * CHUNK + 100);
    let export = Export::start(&files, "2");
    let (mut stream, _) = export.connect();
    assert_eq!(Export::read(&mut stream, 3 * CHUNK, 512), Err(5));
    let expected = &files.snapshots[0].1;
    let chunk = 10 * CHUNK;
    let found = Export::read(&mut stream, chunk, 512).unwrap();
    assert!(found == expected[chunk as usize..][..512]);
    drop(stream);
    let said = export.end();
    assert!(said.contains("cannot read snapshot 2: "), "{said}");
}

#[test]
fn what_cannot_be_exported_is_refused() {
    let files = Files::new(false, true);
    let operands = files.operands();
    let export = |tag: &str| {
        let mut args = vec!["export"];
        args.extend(operands.iter().map(String::as_str));
        args.push(tag);
        ddsnap(&args)
    };
    let missing = export("3");
    assert_eq!(missing.code, 1, "{missing:?}");
    let text = "ddsnap: could not export snapshot 3 because snapshot doesn't exist\n";
    assert_eq!(missing.stderr, text);
    let held = lock_store(&files.path("store")).unwrap();
    let refused = export("2");
    assert_eq!(refused.code, 1, "{refused:?}");
    drop(held);
    fs::write(files.path("store"), vec![0; STORE_BYTES as usize]).unwrap();
    assert_eq!(export("2").code, 99);
}

#[test]
fn a_snapshot_comes_out_of_the_raw_devices() {
    for (meta, closed) in [(false, true), (false, false), (true, true), (true, false)] {
        let files = Files::new(meta, closed);
        let before = files.bytes();
        for (tag, content) in &files.snapshots {
            let out = format!("out{tag}");
            let ran = files.extract(&tag.to_string(), &out, &[]);
            assert_eq!(
                (ran.code, ran.stdout.as_str(), ran.stderr.as_str()),
                (0, "", ""),
                "{ran:?}"
            );
            assert!(
                fs::read(files.path(&out)).unwrap() == *content,
                "snapshot {tag}"
            );
            let on_disk = fs::metadata(files.path(&out)).unwrap().blocks() * 512;
            assert!(on_disk <= 60 * CHUNK, "{on_disk} bytes for about 42 chunks");
        }
        assert!(files.bytes() == before, "a device was written to");
        let names = files.listing();
        assert!(
            !names.iter().any(|name| name.contains("partial")),
            "{names:?}"
        );
    }
}

#[test]
fn what_is_there_is_replaced_only_by_force_and_devices_never() {
    let files = Files::new(false, true);
    fs::write(files.path("out"), "precious").unwrap();
    let ran = files.extract("2", "out", &[]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("--force replaces it"), "{ran:?}");
    assert_eq!(fs::read(files.path("out")).unwrap(), b"precious");
    let ran = files.extract("2", "out", &["--force"]);
    assert_eq!(ran.code, 0, "{ran:?}");
    assert!(fs::read(files.path("out")).unwrap() == files.snapshots[0].1);

    let before = files.bytes();
    std::os::unix::fs::symlink(files.path("store"), files.path("link")).unwrap();
    for out in ["origin", "store", "link"] {
        let ran = files.extract("2", out, &["--force"]);
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(
            ran.stderr.contains("cannot be written to as well"),
            "{ran:?}"
        );
    }
    assert!(files.bytes() == before);
    fs::create_dir(files.path("dir")).unwrap();
    for (out, words) in [
        ("dir", "neither a plain file nor a block device"),
        ("no/where", "cannot create"),
    ] {
        let ran = files.extract("2", out, &["--force"]);
        assert_eq!(ran.code, 1, "{ran:?}");
        assert!(ran.stderr.contains(words), "{ran:?}");
    }
}

#[test]
fn what_cannot_be_extracted_is_refused_with_a_sentence() {
    let files = Files::new(false, true);
    let names = files.listing();
    for (tag, words) in [
        (
            "7",
            "could not extract snapshot 7 because snapshot doesn't exist",
        ),
        ("-1", "a snapshot's number is 0 to"),
        ("x", "a snapshot's number is 0 to"),
    ] {
        let operands = files.operands();
        let out = files.name("out");
        let ran = ddsnap(&["extract", "--", &operands[0], &operands[1], tag, &out]);
        assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{ran:?}");
        assert!(ran.stderr.contains(words), "{ran:?}");
    }
    // A server has the store.
    let lock = lock_store(&files.path("store")).unwrap();
    let ran = files.extract("2", "out", &[]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("; stop that first"), "{ran:?}");
    drop(lock);
    // An origin that is too short, as another volume's would be.
    let origin = File::options()
        .write(true)
        .open(files.path("origin"))
        .unwrap();
    origin.set_len(100 * CHUNK).unwrap();
    let ran = files.extract("2", "out", &[]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(
        ran.stderr.contains("chunk 100 is beyond the end"),
        "{ran:?}"
    );
    assert_eq!(files.listing(), names);
}

#[test]
fn a_damaged_chunk_ends_the_copy_and_leaves_no_file() {
    let files = Files::new(false, true);
    files.flip("store", files.saved * CHUNK + 4000);
    let (before, names) = (files.bytes(), files.listing());
    let ran = files.extract("2", "out", &[]);
    assert_eq!((ran.code, ran.stderr.lines().count()), (1, 1), "{ran:?}");
    let place = format!(
        "store chunk {}, which holds chunk 3 of the origin, is damaged",
        files.saved
    );
    assert!(ran.stderr.contains(&place), "{ran:?}");
    assert_eq!(files.listing(), names);
    assert!(files.bytes() == before);
    // The other snapshot has chunk 3 from later on, from elsewhere.
    assert_eq!(files.extract("4", "out", &[]).code, 0);
}

/// The commands that read a store, each with the operands it takes.
fn commands(files: &Files) -> Vec<Vec<String>> {
    let operands = files.operands();
    let mut extract = vec!["extract".to_owned()];
    extract.extend(operands);
    extract.extend(["2".to_owned(), files.name("out")]);
    let mut check = vec!["check".to_owned()];
    check.extend(
        files
            .operands()
            .into_iter()
            .enumerate()
            .filter_map(|(at, name)| (at != 1).then_some(name)),
    );
    let mut dump = check.clone();
    dump[0] = "dump".to_owned();
    dump.push("--offline".to_owned());
    let mut repair = check.clone();
    repair.push("--repair".to_owned());
    vec![extract, check, dump, repair]
}

/// Each command says one sentence with `words`, ends with exit code 99, and changes nothing.
fn all_refuse(files: &Files, words: &str) {
    let (before, names) = (files.bytes(), files.listing());
    for args in commands(files) {
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let ran = ddsnap(&args);
        assert_eq!(
            (ran.code, ran.stdout.as_str()),
            (99, ""),
            "{args:?}: {ran:?}"
        );
        assert_eq!(ran.stderr.lines().count(), 1, "{args:?}: {ran:?}");
        assert!(ran.stderr.contains(words), "{args:?}: {ran:?}");
        assert_eq!(files.listing(), names, "{args:?}");
        assert!(files.bytes() == before, "{args:?}");
    }
}

#[test]
fn no_sound_store_is_exit_code_99_and_nothing_is_touched() {
    let store = |files: &Files| {
        File::options()
            .write(true)
            .open(files.path("store"))
            .unwrap()
    };
    // Never initialised.
    let files = Files::new(false, true);
    store(&files).write_all_at(&[0; 128 << 10], 0).unwrap();
    all_refuse(&files, "no snapshot store here");
    // Cut off, at the end and within the superblocks.
    let files = Files::new(false, true);
    store(&files).set_len(STORE_BYTES - CHUNK).unwrap();
    all_refuse(&files, "bytes, the store on it");
    store(&files).set_len(1024).unwrap();
    all_refuse(&files, "the device ends before it");
    // Written by a program to come.
    let files = Files::new(false, true);
    let mut block = [0; 4096];
    File::open(files.path("store"))
        .unwrap()
        .read_exact_at(&mut block, 0)
        .unwrap();
    block[8] = 3;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&block[..12]), &block[16..]);
    block[12..16].copy_from_slice(&crc.to_le_bytes());
    store(&files).write_all_at(&block, 0).unwrap();
    all_refuse(&files, "format version 3");
    // One bit in each copy.
    let files = Files::new(false, true);
    files.flip("store", 200);
    files.flip("store", 65536 + 200);
    all_refuse(&files, "checksum");
    // Devices of two stores, and a part of a store alone.
    let (files, other) = (Files::new(true, true), Files::new(false, true));
    fs::copy(other.path("store"), files.path("store")).unwrap();
    all_refuse(&files, "it belongs to no store");
    let mut files = Files::new(true, true);
    fs::rename(files.path("meta"), files.path("store")).unwrap();
    files.meta = false;
    all_refuse(&files, "name the data device");
}

fn check(files: &Files, more: &[&str]) -> Ran {
    let mut args = commands(files).remove(1);
    args.extend(more.iter().map(|&arg| arg.to_owned()));
    ddsnap(&args.iter().map(String::as_str).collect::<Vec<_>>())
}

#[test]
fn a_check_writes_nothing_and_says_everything() {
    for (meta, closed) in [(false, true), (true, false)] {
        let files = Files::new(meta, closed);
        let before = files.bytes();
        let origin = files.name("origin");
        for more in [&[][..], &["--no-data"], &["--origin", &origin]] {
            let ran = check(&files, more);
            assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{ran:?}");
            assert!(
                ran.stdout
                    .starts_with("sound: 2 snapshots, 7 store chunks and "),
                "{ran:?}"
            );
            let records = if closed { " 0 journal" } else { " 9 journal" };
            assert!(ran.stdout.contains(records), "{ran:?}");
        }
        assert!(files.bytes() == before);
    }
    let files = Files::new(false, true);
    files.flip("store", files.saved * CHUNK + 4000);
    files.flip("store", 65536 + 200);
    let before = files.bytes();
    let ran = check(&files, &[]);
    assert_eq!((ran.code, ran.stderr.as_str()), (1, ""), "{ran:?}");
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(lines.len(), 3, "{ran:?}");
    let store = files.name("store");
    assert!(
        lines[0].starts_with(&format!("{store}: superblock copy 1: ")),
        "{ran:?}"
    );
    let place = format!(
        "{store}: store chunk {}: it holds origin chunk 3, but",
        files.saved
    );
    assert!(lines[1].starts_with(&place), "{ran:?}");
    assert!(lines[1].ends_with("; affects snapshot 2"), "{ran:?}");
    assert!(
        lines[2].starts_with("2 problems, 1 of them lost something, 0 "),
        "{ran:?}"
    );
    let ran = check(&files, &["--json"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (1, ""), "{ran:?}");
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(json["schema"], "ddsnap-check-1");
    assert_eq!(json["sound"], false);
    let problem = &json["problems"][1];
    assert_eq!(problem["text"], lines[1]);
    assert_eq!(problem["severity"], "loss");
    assert_eq!(problem["snapshots"], serde_json::json!([2]));
    assert_eq!(
        problem["place"],
        serde_json::json!({"kind": "store chunk", "number": files.saved})
    );
    assert_eq!(json["counts"]["problems"], 2);
    // Without data the damaged chunk is not seen; with a server the store is left alone.
    let ran = check(&files, &["--no-data", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(json["problems"].as_array().map(Vec::len), Some(1));
    let lock = lock_store(&files.path("store")).unwrap();
    let ran = check(&files, &[]);
    assert_eq!((ran.code, ran.stdout.as_str()), (1, ""), "{ran:?}");
    assert!(ran.stderr.contains("; stop that first"), "{ran:?}");
    drop(lock);
    assert!(files.bytes() == before);
    // JSON of a sound store.
    let ran = check(&Files::new(true, true), &["--json"]);
    let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
    assert_eq!(
        (&json["sound"], &json["problems"]),
        (&true.into(), &serde_json::json!([]))
    );
}

#[test]
fn a_repair_says_what_it_gives_up_and_makes_the_store_sound() {
    // Nothing lost: a copy of the superblock.
    let files = Files::new(false, true);
    let before = files.bytes();
    let ran = check(&files, &["--repair"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{ran:?}");
    assert!(ran.stdout.starts_with("sound: "), "{ran:?}");
    assert!(files.bytes() == before, "there was nothing to repair");
    files.flip("store", 65536 + 200);
    let ran = check(&files, &["--repair"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{ran:?}");
    assert!(
        ran.stdout
            .contains("\nrepairing: no snapshot is squashed\n"),
        "{ran:?}"
    );
    assert!(
        ran.stdout.ends_with("\nrepaired: nothing was lost\n"),
        "{ran:?}"
    );
    assert_eq!(check(&files, &[]).code, 0);
    // Snapshot 2 loses a chunk: it is squashed, the other stays.
    for json in [false, true] {
        let files = Files::new(json, false);
        files.flip("store", files.saved * CHUNK + 4000);
        let lock = lock_store(&files.path(if json { "meta" } else { "store" })).unwrap();
        let (held, before) = (check(&files, &["--repair"]), files.bytes());
        assert_eq!((held.code, held.stdout.as_str()), (1, ""), "{held:?}");
        assert!(held.stderr.contains("; stop that first"), "{held:?}");
        assert!(files.bytes() == before);
        drop(lock);
        let origin = files.bytes().swap_remove(1);
        let ran = match json {
            false => check(&files, &["--repair"]),
            true => check(
                &files,
                &["--repair", "--json", "--origin", &files.name("origin")],
            ),
        };
        assert_eq!((ran.code, ran.stderr.as_str()), (2, ""), "{ran:?}");
        if json {
            let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
            let wanted = serde_json::json!({"result": "repaired with loss", "squashed": [2]});
            assert_eq!(json["repair"], wanted);
        } else {
            let lines: Vec<&str> = ran.stdout.lines().collect();
            assert!(lines[0].ends_with("; affects snapshot 2"), "{ran:?}");
            assert_eq!(lines[1], "repairing: snapshot 2 is squashed");
            assert_eq!(lines[3], "repaired: what is named above was lost");
        }
        let ran = check(&files, &[]);
        assert_eq!(ran.code, 0, "{ran:?}");
        let ran = files.extract("2", "two", &[]);
        assert!(
            ran.code == 1 && ran.stderr.contains("snapshot is squashed"),
            "{ran:?}"
        );
        let ran = files.extract("4", "four", &[]);
        assert_eq!(ran.code, 0, "{ran:?}");
        assert!(fs::read(files.path("four")).unwrap() == files.snapshots[1].1);
        assert!(files.bytes()[1] == origin, "the origin is only read");
    }
}

#[test]
fn a_dump_shows_the_store_to_people_and_programs() {
    for (meta, closed) in [(false, true), (true, false)] {
        let files = Files::new(meta, closed);
        let before = files.bytes();
        let args = commands(&files).remove(2);
        let mut args: Vec<&str> = args.iter().map(String::as_str).collect();
        let ran = ddsnap(&args);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{ran:?}");
        let saved = format!(
            "origin chunk 3, up to sequence 1: store chunk {}, checksum 0x",
            files.saved
        );
        let ended = match closed {
            true => "closed in order",
            false => "not closed in order: 9 journal records replayed",
        };
        for words in [
            "store 30313233-3435-3637-3839-616263646566, format version 2, created Sun Nov 22 01:44:39 2026",
            ended,
            "chunk size 8192; origin 8189 sectors; ",
            "snapshot 2: sequence 1, live, priority 0, use count 0, 8189 sectors, created Sun Nov 22 01:44:40 2026",
            &saved,
            "snapshot 2 (sequence 1), chunk 20: store chunk ",
        ] {
            assert_eq!(
                ran.stdout.matches(words).count(),
                1,
                "{words}: {}",
                ran.stdout
            );
        }
        args.push("--json");
        let ran = ddsnap(&args);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{ran:?}");
        let json: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        assert_eq!(json["schema"], "ddsnap-dump-1");
        assert_eq!(json["store"]["clean"], closed);
        assert_eq!(json["store"]["chunk_bytes"], CHUNK);
        assert_eq!(json["store"]["metadata_device"], meta);
        assert_eq!(json["store"]["origin_chunks"], 512);
        assert_eq!(json["store"]["origin_sectors"], 8189);
        assert_eq!(json["snapshots"][1]["tag"], 4);
        assert_eq!(json["snapshots"][1]["origin_sectors"], 8189);
        let keys: Vec<_> = json["exceptions"]
            .as_array()
            .unwrap()
            .iter()
            .map(|e| (e[0].as_u64(), e[1].as_u64()))
            .collect();
        let wanted = [(3, 1), (3, 2), (10, 1), (11, 2), (501, 2), (511, 1)];
        assert_eq!(keys, wanted.map(|(chunk, seq)| (Some(chunk), Some(seq))));
        let content = crc32c::crc32c(&files.snapshots[0].1[3 * CHUNK as usize..][..CHUNK as usize]);
        assert_eq!(
            json["exceptions"][0],
            serde_json::json!([3, 1, files.saved, content])
        );
        assert_eq!(json["overlays"].as_array().map(Vec::len), Some(1));
        assert_eq!(json["overlays"][0][1], 20);
        assert_eq!(json["undecided"], serde_json::json!([]));
        assert!(files.bytes() == before);
    }
}
