// SPDX-License-Identifier: GPL-2.0-only
//! The server's loop over a real store on files, with a fake kernel at the other end of the channel.
//!
//! Guards the meaning of what goes over the channel: that the store chunk in a reply is where the old
//! data really lies, counted from the store's first byte, before the origin may be overwritten.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use ddsnap::client::Client;
use ddsnap::device::uring::Access;
use ddsnap::protocol::channel::{Ask, Request};
use ddsnap::server::engine::Engine;
use ddsnap::server::faults::Faults;
use ddsnap::server::link::{Connect, LinkError};
use ddsnap::server::ring::{Parts, Ring};
use ddsnap::server::start::open_device;
use ddsnap::server::store_engine::StoreEngine;
use ddsnap::store::{Devices, InitOptions, OpenOptions, Store};
use ddsnap::units::{Chunk, ChunkRun, ChunkShift, SnapTag};

const CHUNK: usize = 8192;
const CHUNKS: u64 = 64;
const SECTORS: u64 = CHUNKS * CHUNK as u64 / 512;
const PATIENCE: Duration = Duration::from_secs(30);

struct NoMore;

impl Connect for NoMore {
    fn connect(&mut self) -> Result<OwnedFd, LinkError> {
        Err(LinkError::Absent)
    }
}

struct Files(tempfile::TempDir);

impl Files {
    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn devices(&self) -> Devices {
        Devices {
            origin: Box::new(open_device(&self.path("origin"), Access::ReadWrite).unwrap()),
            data: Box::new(open_device(&self.path("store"), Access::ReadWrite).unwrap()),
            meta: None,
        }
    }

    fn new() -> Files {
        let files = Files(tempfile::tempdir().unwrap());
        let origin = File::create(files.path("origin")).unwrap();
        for chunk in 0..CHUNKS {
            origin
                .write_all_at(&pattern(chunk, 0), chunk * CHUNK as u64)
                .unwrap();
        }
        File::create(files.path("store"))
            .unwrap()
            .set_len(8 << 20)
            .unwrap();
        let options = InitOptions {
            chunk: ChunkShift::from_bytes(CHUNK as u64).unwrap(),
            journal_bytes: None,
            now: 0,
            uuid: [7; 16],
        };
        Store::initialize(&mut files.devices(), &options).unwrap();
        files
    }

    fn chunk_of(&self, name: &str, chunk: u64) -> Vec<u8> {
        let mut bytes = vec![0; CHUNK];
        let file = File::open(self.path(name)).unwrap();
        file.read_exact_at(&mut bytes, chunk * CHUNK as u64)
            .unwrap();
        bytes
    }
}

/// What chunk `chunk` holds after its `version`th writing.
fn pattern(chunk: u64, version: u8) -> Vec<u8> {
    let mut bytes = vec![version; CHUNK];
    bytes[..8].copy_from_slice(&chunk.to_le_bytes());
    bytes
}

/// A server, and the kernel's end of its channel.
struct Server {
    kernel: UnixStream,
    socket: String,
    agent: UnixStream,
    thread: JoinHandle<()>,
    next_id: u64,
}

impl Server {
    fn start(files: &Files) -> Server {
        let path = files.path("socket");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        let (agent, far_agent) = UnixStream::pair().unwrap();
        let (signals, keep) = UnixStream::pair().unwrap();
        let (kernel, near) = UnixStream::pair().unwrap();
        kernel.set_read_timeout(Some(PATIENCE)).unwrap();
        let paths = Files(tempfile::tempdir().unwrap());
        for name in ["origin", "store"] {
            std::os::unix::fs::symlink(files.path(name), paths.path(name)).unwrap();
        }
        let thread = std::thread::spawn(move || {
            let _keep = keep;
            let options = OpenOptions {
                cache_bytes: 1 << 20,
            };
            let (store, _) = Store::open(paths.devices(), &options).unwrap();
            let parts = Parts {
                listener: listener.into(),
                agent: far_agent.into(),
                signals: signals.into(),
                connect: NoMore,
                channel: Some(near.into()),
                faults: Faults::default(),
                on_hangup: Box::new(|| {}),
            };
            let (engine, origin, _, fault) = Ring::new(StoreEngine::new(store), parts)
                .unwrap()
                .run()
                .unwrap();
            assert_eq!(fault, None);
            engine.close(origin).unwrap();
        });
        let socket = path.to_str().unwrap().to_owned();
        Server {
            kernel,
            socket,
            agent,
            thread,
            next_id: 1000,
        }
    }

    fn stop(self) {
        drop(self.agent);
        self.thread.join().unwrap();
    }

    fn client(&self) -> Client {
        Client::connect_within(&self.socket, PATIENCE).unwrap()
    }

    /// The next answer; this kernel asks before each write, whatever is unique.
    fn read(&mut self) -> (u64, u32, u32, u32, u64) {
        const ALL_UNIQUE: u32 = 0x103;
        loop {
            let mut record = [0; 32];
            self.kernel.read_exact(&mut record).unwrap();
            let word = |at: usize| u32::from_le_bytes(record[at..at + 4].try_into().unwrap());
            let long = |at: usize| u64::from_le_bytes(record[at..at + 8].try_into().unwrap());
            if word(8) != ALL_UNIQUE {
                return (long(0), word(8), word(12), word(16), long(24));
            }
        }
    }

    /// Asks one thing; gives flags and value of an answer without error.
    fn ask(&mut self, ask: Ask) -> (u32, u64) {
        self.next_id += 1;
        let id = self.next_id;
        self.kernel
            .write_all(&Request { id, ask }.encode())
            .unwrap();
        let (found, _, status, flags, value) = self.read();
        assert_eq!((found, status), (id, 0), "{ask:?}");
        (flags, value)
    }

    /// Makes a snapshot, playing the kernel's part of the barrier.
    fn create(&mut self, tag: u32) {
        let mut client = self.client();
        let creating = std::thread::spawn(move || client.create(SnapTag(tag)).unwrap());
        let (mut barrier, mut op, ..) = self.read();
        // Told as long as there is no snapshot; it wants no answer.
        while op == 0x103 {
            (barrier, op, ..) = self.read();
        }
        assert_eq!(op, 0x100);
        let reached = Request {
            id: barrier,
            ask: Ask::BarrierReached,
        };
        self.kernel.write_all(&reached.encode()).unwrap();
        assert_eq!(self.read(), (barrier, 0x101, 0, 2, 0));
        creating.join().unwrap();
    }

    /// Writes a chunk of the origin as the kernel does: asks, then writes.
    fn write_origin(&mut self, files: &Files, chunk: u64, version: u8) {
        self.ask(Ask::OriginWrite(Chunk(chunk).into()));
        let origin = File::options()
            .write(true)
            .open(files.path("origin"))
            .unwrap();
        origin
            .write_all_at(&pattern(chunk, version), chunk * CHUNK as u64)
            .unwrap();
    }

    /// Reads a chunk of a snapshot as the kernel does: asks where it lies, then reads there.
    fn read_snapshot(&mut self, files: &Files, tag: u32, chunk: u64) -> Vec<u8> {
        match self.ask(Ask::SnapshotRead(SnapTag(tag), Chunk(chunk))) {
            (1, _) => files.chunk_of("origin", chunk),
            (_, place) => files.chunk_of("store", place),
        }
    }
}

#[test]
fn snapshots_read_what_was_there_when_they_were_made() {
    let files = Files::new();
    let mut server = Server::start(&files);
    let identify = |snapshot| Ask::Identify {
        device: 1,
        snapshot,
        sectors: SECTORS,
        returning: false,
    };
    server.ask(identify(None));
    server.create(10);
    for chunk in [3, 4, 9] {
        server.write_origin(&files, chunk, 1);
    }
    server.create(11);
    for chunk in [4, 9, 20] {
        server.write_origin(&files, chunk, 2);
    }
    let check = |server: &mut Server| {
        for chunk in 0..CHUNKS {
            assert_eq!(
                server.read_snapshot(&files, 10, chunk),
                pattern(chunk, 0),
                "10, {chunk}"
            );
            let version = u8::from([3, 4, 9].contains(&chunk));
            assert_eq!(
                server.read_snapshot(&files, 11, chunk),
                pattern(chunk, version),
                "11, {chunk}"
            );
        }
    };
    check(&mut server);
    // Chunk 3 is shared by none but 10; 4 and 9 have a copy for each; 20 is shared by both.
    let rows = server.client().usage(&mut |_, _| {}).unwrap().rows;
    assert_eq!(rows[0].shared_with, [(0, 3), (1, 1)]);
    assert_eq!(rows[1].shared_with, [(0, 2), (1, 1)]);

    // A write to a snapshot goes to a place of its own, which holds the old data before.
    let (_, place) = server.ask(Ask::SnapshotWrite(SnapTag(10), Chunk(20)));
    assert_eq!(files.chunk_of("store", place), pattern(20, 0));
    let store = File::options()
        .write(true)
        .open(files.path("store"))
        .unwrap();
    store
        .write_all_at(&pattern(20, 99), place * CHUNK as u64)
        .unwrap();
    assert_eq!(server.read_snapshot(&files, 10, 20), pattern(20, 99));
    assert_eq!(server.read_snapshot(&files, 11, 20), pattern(20, 0));
    store
        .write_all_at(&pattern(20, 0), place * CHUNK as u64)
        .unwrap();

    server.stop();
    let mut server = Server::start(&files);
    check(&mut server);
    server.stop();
}

#[test]
fn a_burst_of_writes_is_answered_whole_and_in_groups() {
    let files = Files::new();
    let mut server = Server::start(&files);
    server.create(1);
    // Single chunks and runs, which overlap.
    let run = |id: u64| {
        let first = id % CHUNKS;
        ChunkRun {
            first: Chunk(first),
            chunks: (1 + id % 5).min(CHUNKS - first),
        }
    };
    let requests: Vec<u8> = (0..2000_u64)
        .flat_map(|id| {
            Request {
                id,
                ask: Ask::OriginWrite(run(id)),
            }
            .encode()
        })
        .collect();
    let mut kernel = server.kernel.try_clone().unwrap();
    // A stream keeps no records apart, but a write of a page arrives as one.
    let writing = std::thread::spawn(move || {
        requests
            .chunks(4096)
            .for_each(|page| kernel.write_all(page).unwrap());
    });
    let mut answered: Vec<u64> = (0..2000).map(|_| server.read().0).collect();
    writing.join().unwrap();
    answered.sort_unstable();
    assert!(answered.iter().copied().eq(0..2000));
    // Whatever was asked how often, each chunk was copied once.
    let rows = server.client().usage(&mut |_, _| {}).unwrap().rows;
    assert_eq!(rows[0].shared_with, [(0, CHUNKS)]);
    server.stop();
}

/// Every snapshot has a device, so the store fills up; then the oldest is squashed, and its chunks go
/// to others only when its device has stopped.
#[test]
fn a_full_store_stops_a_device_and_the_write_succeeds() {
    const ORIGIN_WRITE: u32 = 3;
    const DEVICE_STOP: u32 = 0x102;
    let files = Files::new();
    let mut server = Server::start(&files);
    // Which version of all chunks each snapshot shows.
    let mut versions = 0;
    'filling: loop {
        versions += 1;
        let tag = u32::from(versions);
        server.create(tag);
        server.ask(Ask::Identify {
            device: 100 + tag,
            snapshot: Some(SnapTag(tag)),
            sectors: SECTORS,
            returning: false,
        });
        for chunk in 0..CHUNKS {
            server.next_id += 1;
            let id = server.next_id;
            let ask = Ask::OriginWrite(Chunk(chunk).into());
            let request = Request { id, ask }.encode();
            server.kernel.write_all(&request).unwrap();
            match server.read() {
                (found, ORIGIN_WRITE, 0, ..) => assert_eq!(found, id),
                (0, DEVICE_STOP, 0, 0, 101) => break 'filling,
                other => panic!("{other:?} to a write of chunk {chunk} after snapshot {tag}"),
            }
            let origin = File::options()
                .write(true)
                .open(files.path("origin"))
                .unwrap();
            origin
                .write_all_at(&pattern(chunk, versions), chunk * CHUNK as u64)
                .unwrap();
        }
    }
    assert!(
        versions > 3,
        "the store was full after {versions} snapshots"
    );
    // The device may still be reading and writing there.
    let place =
        |server: &mut Server, tag: u32| server.ask(Ask::SnapshotRead(SnapTag(tag), Chunk(0)));
    let status = server.client().status().unwrap();
    assert_eq!(status.free_chunks, 0);
    let stopped = Request {
        id: 0,
        ask: Ask::DeviceStopped { device: 101 },
    };
    server.kernel.write_all(&stopped.encode()).unwrap();
    let (id, op, status, ..) = server.read();
    assert_eq!((id, op, status), (server.next_id, ORIGIN_WRITE, 0));

    for tag in 2..u32::from(versions) {
        let (_, store) = place(&mut server, tag);
        let shown = u8::try_from(tag - 1).unwrap();
        assert_eq!(files.chunk_of("store", store), pattern(0, shown), "{tag}");
    }
    let state = server.client().list().unwrap();
    let squashed = state
        .iter()
        .filter(|snapshot| snapshot.state == ddsnap::protocol::control::SnapshotState::Squashed);
    let tags: Vec<SnapTag> = squashed.map(|snapshot| snapshot.tag).collect();
    assert_eq!(tags, [SnapTag(1)]);
    server.stop();
}

/// The origin goes back to a snapshot step by step, each in a barrier, and no chunk is lost to the other; not while
/// its device exists.
#[test]
fn a_revert_goes_through_barriers() {
    let files = Files::new();
    let mut server = Server::start(&files);
    let origin = Ask::Identify {
        device: 1,
        snapshot: None,
        sectors: SECTORS,
        returning: false,
    };
    server.ask(origin);
    server.create(10);
    for chunk in 0..40 {
        server.write_origin(&files, chunk, 1);
    }
    server.create(11);
    server.write_origin(&files, 3, 2);
    let mut client = server.client();
    let refused = client.revert(SnapTag(10), &mut |_, _| {}).unwrap_err();
    let why = "the device of the origin exists";
    assert!(refused.to_string().contains(why), "{refused}");
    server.ask(Ask::Gone { device: 1 });
    let reverting = std::thread::spawn(move || client.revert(SnapTag(10), &mut |_, _| {}).unwrap());
    let mut barriers = 0;
    while !reverting.is_finished() {
        // Past the last barrier nothing comes any more.
        server
            .kernel
            .set_read_timeout(Some(Duration::from_millis(200)))
            .unwrap();
        let mut record = [0; 32];
        if server.kernel.read_exact(&mut record).is_err() {
            continue;
        }
        let id = u64::from_le_bytes(record[..8].try_into().unwrap());
        match u32::from_le_bytes(record[8..12].try_into().unwrap()) {
            0x100 => {
                let ask = Ask::BarrierReached;
                server
                    .kernel
                    .write_all(&Request { id, ask }.encode())
                    .unwrap();
                barriers += 1;
            }
            0x101 => assert_eq!(record[16..20], [2, 0, 0, 0], "unique bits stay"),
            other => panic!("{other:#x}"),
        }
    }
    assert_eq!(reverting.join().unwrap(), 0);
    assert!(barriers > 1, "one step for all");
    let mut rest = [0; 32];
    while server.kernel.read_exact(&mut rest).is_ok() {}
    server.kernel.set_read_timeout(Some(PATIENCE)).unwrap();
    for chunk in 0..CHUNKS {
        assert_eq!(
            files.chunk_of("origin", chunk),
            pattern(chunk, 0),
            "{chunk}"
        );
        assert_eq!(
            server.read_snapshot(&files, 10, chunk),
            pattern(chunk, 0),
            "10, {chunk}"
        );
        let version = u8::from(chunk < 40);
        assert_eq!(
            server.read_snapshot(&files, 11, chunk),
            pattern(chunk, version),
            "11, {chunk}"
        );
    }
    server.stop();
}
