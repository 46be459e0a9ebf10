// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap delta` from end to end: a server's changelist, snapshots extracted to files, a delta, and a
//! copy that becomes the other snapshot.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use ddsnap::client::Client;
use ddsnap::delta::changelist::ChangelistReader;
use ddsnap::device::uring::Access;
use ddsnap::server::start::open_device;
use ddsnap::store::{Devices, Op, OpenOptions, Store};
use ddsnap::units::{Chunk, SnapTag};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const CHUNK: u64 = 4096;
const CHUNKS: u64 = 1024;
/// How long anything here may take on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, PartialEq, Eq)]
struct Ran {
    code: i32,
    stdout: String,
    stderr: String,
}

fn ddsnap(args: &[&str]) -> Ran {
    let output = Command::new(env!("CARGO_BIN_EXE_ddsnap"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    Ran {
        code: output.status.code().expect("ended by itself"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn good(args: &[&str]) -> String {
    let ran = ddsnap(args);
    assert_eq!(
        (ran.code, ran.stderr.as_str()),
        (0, ""),
        "{args:?}: {ran:?}"
    );
    ran.stdout
}

/// A volume of plain files. Its daemons end with it.
struct Volume {
    dir: tempfile::TempDir,
    daemons: Vec<Pid>,
}

impl Volume {
    /// Snapshots 0 and 2, and the chunks that were written between them.
    fn new() -> (Volume, Vec<u64>) {
        let volume = Volume {
            dir: tempfile::tempdir().unwrap(),
            daemons: Vec::new(),
        };
        let make = |name: &str, len| File::create(volume.path(name)).unwrap().set_len(len);
        make("origin", CHUNKS * CHUNK).unwrap();
        make("store", 16 << 20).unwrap();
        let (store, origin) = (volume.name("store"), volume.name("origin"));
        good(&["initialize", "-y", "-c", "4k", &store, &origin]);
        let open =
            |name: &str| Box::new(open_device(&volume.path(name), Access::ReadWrite).unwrap());
        let devices = Devices {
            origin: open("origin"),
            data: open("store"),
            meta: None,
        };
        let options = OpenOptions {
            cache_bytes: 1 << 20,
        };
        let (mut store, _) = Store::open(devices, &options).unwrap();
        store.create(SnapTag(0), 0).unwrap().unwrap();
        let changed: Vec<u64> = (0..CHUNKS).step_by(7).chain([1023]).collect();
        let origin = File::options()
            .write(true)
            .open(volume.path("origin"))
            .unwrap();
        for &chunk in &changed {
            store.commit(&[Op::OriginWrite(Chunk(chunk))]).unwrap()[0].unwrap();
            let data = vec![chunk as u8 | 1; CHUNK as usize];
            origin.write_all_at(&data, chunk * CHUNK).unwrap();
        }
        store.create(SnapTag(2), 0).unwrap().unwrap();
        store.commit(&[Op::OriginWrite(Chunk(3))]).unwrap()[0].unwrap();
        origin
            .write_all_at(&[9; CHUNK as usize], 3 * CHUNK)
            .unwrap();
        store.close().unwrap();
        (volume, changed)
    }

    fn start(&mut self) {
        let [agent, agent_pid, server_pid] =
            ["agent", "agent.pid", "server.pid"].map(|n| self.name(n));
        let [agent_log, server_log] = ["agent.log", "server.log"].map(|name| self.name(name));
        good(&["agent", &agent, "-l", &agent_log, "-p", &agent_pid]);
        self.remember(&agent_pid);
        let [store, origin, socket] = ["store", "origin", "server"].map(|name| self.name(name));
        let server = [
            "server",
            &store,
            &origin,
            &agent,
            &socket,
            "-k",
            "2m",
            "-l",
            &server_log,
        ];
        good(&[&server[..], &["-p", &server_pid]].concat());
        self.remember(&server_pid);
    }

    fn remember(&mut self, pidfile: &str) {
        let pid = fs::read_to_string(pidfile).unwrap();
        self.daemons
            .push(Pid::from_raw(pid.trim().parse().unwrap()));
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn name(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// The chunks in a changelist file.
    fn listed(&self, name: &str) -> Vec<u64> {
        let file = fs::read(self.path(name)).unwrap();
        let mut list = ChangelistReader::new(&file[..]).unwrap();
        let mut chunks = Vec::new();
        while let Some(run) = list.next_run().unwrap() {
            chunks.extend(run.first.0..run.first.0 + run.chunks);
        }
        chunks
    }

    fn leftovers(&self) -> Vec<String> {
        let all = fs::read_dir(self.dir.path()).unwrap();
        let names = all.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name.contains("partial")).collect()
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        for pid in &self.daemons {
            let _ = kill(*pid, Signal::SIGKILL);
        }
    }
}

#[test]
fn a_copy_of_one_snapshot_becomes_the_other() {
    let (mut volume, changed) = Volume::new();
    let [store, origin] = ["store", "origin"].map(|name| volume.name(name));
    for tag in ["0", "2"] {
        good(&[
            "extract",
            &store,
            &origin,
            tag,
            &volume.name(&format!("a({tag})")),
        ]);
    }
    volume.start();
    let [socket, list, delta, a, b] = ["server", "list", "delta", "a", "b"].map(|n| volume.name(n));
    assert_eq!(good(&["delta", "changelist", &socket, &list, "0", "2"]), "");
    assert_eq!(volume.listed("list"), changed);
    good(&["delta", "changelist", &socket, &list, "2", "0"]);
    assert_eq!(volume.listed("list"), changed);
    good(&["delta", "changelist", &socket, &list, "2", "2"]);
    assert_eq!(volume.listed("list"), [0_u64; 0]);
    good(&["delta", "changelist", &socket, &list, "2"]);
    assert_eq!(volume.listed("list"), (0..CHUNKS).collect::<Vec<_>>());
    // A list that was made lets go of its snapshots, and one that is there is replaced.
    good(&["usecount", &socket, "2"]);
    assert_eq!(good(&["usecount", &socket, "0"]), "0\n");
    good(&["delta", "changelist", &socket, &list, "0", "2"]);

    let (from, to) = (
        fs::read(volume.path("a(0)")).unwrap(),
        fs::read(volume.path("a(2)")).unwrap(),
    );
    assert_ne!(from, to);
    let options: &[&[&str]] = &[
        &[],
        &["-x"],
        &["-r"],
        &["-b"],
        &["-g", "6"],
        &["-r", "-g", "9"],
    ];
    for options in options {
        assert_eq!(
            good(&[&["delta", "create"], *options, &[&list, &delta, &a]].concat()),
            ""
        );
        fs::write(volume.path("b(0)"), &from).unwrap();
        fs::write(volume.path("b"), &from).unwrap();
        assert_eq!(good(&["delta", "apply", &delta, &b]), "");
        assert!(fs::read(volume.path("b")).unwrap() == to, "{options:?}");
    }

    fs::write(volume.path("b(0)"), &to).unwrap();
    fs::write(volume.path("b"), vec![5; from.len()]).unwrap();
    let refused = ddsnap(&["delta", "apply", &delta, &b]);
    assert_eq!(refused.code, 1);
    assert_eq!(
        refused.stderr,
        format!(
            "ddsnap: cannot apply {delta} to {b}: chunk 0 does not fit {b}(0), or the 0 behind it; nothing \
             was written: the base has other data than the delta was made from\n"
        )
    );
    assert!(fs::read(volume.path("b")).unwrap() == vec![5; from.len()]);
    assert_eq!(volume.leftovers(), [""; 0]);
}

#[test]
fn refusals_say_why_and_write_nothing() {
    let (mut volume, _) = Volume::new();
    let [socket, list, delta, a] = ["server", "list", "delta", "a"].map(|name| volume.name(name));
    let nobody = ddsnap(&["delta", "changelist", &socket, &list, "0", "2"]);
    assert_eq!(nobody.code, 99, "{nobody:?}");
    volume.start();
    for tags in [&["0", "7"][..], &["7", "0"], &["7"]] {
        let ran = ddsnap(&[&["delta", "changelist", &socket, &list], tags].concat());
        let why = "could not list the changes of snapshot 7 because snapshot doesn't exist (No such file or directory)\n";
        assert_eq!((ran.code, ran.stderr.as_str()), (1, why), "{tags:?}");
    }
    assert!(!volume.path("list").exists());
    let ran = ddsnap(&["delta", "changelist", &socket, "/dev/null", "0", "2"]);
    assert_eq!(ran.code, 1);
    assert_eq!(
        ran.stderr,
        "ddsnap: /dev/null is there and is no plain file\n"
    );

    fs::write(
        volume.path("list"),
        b"not a changelist, but long enough to have a header of its own........",
    )
    .unwrap();
    fs::write(volume.path("delta"), b"kept").unwrap();
    let ran = ddsnap(&["delta", "create", &list, &delta, &a]);
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr.contains("cannot use") && ran.stderr.contains("no changelist"),
        "{ran:?}"
    );
    good(&["delta", "changelist", &socket, &list, "0", "2"]);
    let ran = ddsnap(&["delta", "create", &list, &delta, &a]);
    assert_eq!(ran.code, 1);
    assert!(
        ran.stderr
            .contains(&format!("cannot open {a}(0): No such file")),
        "{ran:?}"
    );
    assert_eq!(fs::read(volume.path("delta")).unwrap(), b"kept");
    let ran = ddsnap(&["delta", "apply", &list, &a]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("no delta of ddsnap"), "{ran:?}");
    for wrong in [
        &["delta"][..],
        &["delta", "create", "-x", "-r", &list, &delta, &a],
        &["delta", "create", "-g", "10", &list, &delta, &a],
    ] {
        let ran = ddsnap(wrong);
        assert_eq!(ran.code, 1, "{wrong:?}");
        assert!(!ran.stderr.is_empty(), "{wrong:?}");
    }
    assert_eq!(volume.leftovers(), [""; 0]);
}

/// A client that begins a list and goes away must not keep the snapshots.
#[test]
fn a_list_keeps_its_snapshots_and_a_lost_client_does_not() {
    let (mut volume, changed) = Volume::new();
    volume.start();
    let socket = volume.name("server");
    let mut client = Client::connect(&socket).unwrap();
    let mut list = client.changelist(Some(SnapTag(0)), SnapTag(2)).unwrap();
    let mut runs = Vec::new();
    while let Some(page) = list.next_runs(&mut |_, _| {}).unwrap() {
        runs.extend(page);
    }
    assert_eq!(
        runs.iter().map(|run| run.chunks).sum::<u64>(),
        changed.len() as u64
    );
    assert_eq!(client.list().unwrap().len(), 2, "the connection goes on");

    let mut lost = Client::connect(&socket).unwrap();
    lost.changelist(None, SnapTag(2)).unwrap();
    drop(lost);
    let end = Instant::now() + PATIENCE;
    while client.delete(SnapTag(2)).is_err() {
        assert!(Instant::now() < end, "the snapshot is still in use");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// `ddsnap delta listen` on a port of its own. It ends with this.
struct Listener {
    child: Child,
    address: String,
}

impl Listener {
    fn start(stem: &str, progress: &str) -> Listener {
        let mut child = Command::new(env!("CARGO_BIN_EXE_ddsnap"))
            .args(["delta", "listen", "-o", progress, stem, "127.0.0.1:0"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = child.stdout.as_mut().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let address = line
            .trim()
            .strip_prefix("listening on ")
            .unwrap()
            .to_owned();
        Listener { child, address }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_snapshot_is_transmitted_to_a_listener() {
    let (mut volume, changed) = Volume::new();
    let [store, origin] = ["store", "origin"].map(|name| volume.name(name));
    for tag in ["0", "2"] {
        let file = volume.name(&format!("a({tag})"));
        good(&["extract", &store, &origin, tag, &file]);
    }
    volume.start();
    let [socket, a, b, sent, applied] =
        ["server", "a", "b", "sent", "applied"].map(|name| volume.name(name));
    let (from, to) = (
        fs::read(volume.path("a(0)")).unwrap(),
        fs::read(volume.path("a(2)")).unwrap(),
    );
    fs::write(volume.path("b"), "").unwrap();
    let listener = Listener::start(&b, &applied);
    let send = |options: &[&str], tags: &[&str]| {
        let begin = ["transmit", "--stem", &a, "-p", &sent];
        ddsnap(&[&begin[..], options, &[&socket, &listener.address], tags].concat())
    };
    // All of it, to a file that has nothing.
    let ran = send(&["-l", "100000000"], &["0"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    assert!(fs::read(volume.path("b")).unwrap() == from);
    let whole = format!("0 {CHUNKS}/{CHUNKS} {}\n", CHUNKS * CHUNK);
    for file in [&sent, &applied] {
        assert_eq!(fs::read_to_string(file).unwrap(), whole);
    }
    for options in [&[][..], &["-x"], &["-r", "-g", "6"], &["-b"]] {
        fs::write(volume.path("b(0)"), &from).unwrap();
        fs::write(volume.path("b"), &from).unwrap();
        let ran = send(options, &["0", "2"]);
        assert_eq!((ran.code, ran.stderr.as_str()), (0, ""), "{options:?}");
        assert!(fs::read(volume.path("b")).unwrap() == to, "{options:?}");
    }
    // The rest of a copy that got as far as that.
    let half = CHUNKS / 2 * CHUNK;
    let mut started = from.clone();
    started[..half as usize].copy_from_slice(&to[..half as usize]);
    fs::write(volume.path("b"), started).unwrap();
    let ran = send(&["--resume", &half.to_string()], &["0", "2"]);
    assert_eq!((ran.code, ran.stderr.as_str()), (0, ""));
    assert!(fs::read(volume.path("b")).unwrap() == to);
    let left = changed.iter().filter(|chunk| **chunk >= CHUNKS / 2).count();
    let rest = format!("2 {left}/{left} {}\n", CHUNKS * CHUNK);
    assert_eq!(fs::read_to_string(&applied).unwrap(), rest);

    // Another base is refused, with the reason, and whoever sends noise does not end the listener.
    fs::write(volume.path("b(0)"), &to).unwrap();
    fs::write(volume.path("b"), vec![5; from.len()]).unwrap();
    let ran = send(&[], &["0", "2"]);
    assert_eq!(ran.code, 1, "{ran:?}");
    assert!(ran.stderr.contains("the base has other data"), "{ran:?}");
    assert!(fs::read(volume.path("b")).unwrap() == vec![5; from.len()]);
    let mut noise = TcpStream::connect(&listener.address).unwrap();
    noise
        .write_all(b"GET / HTTP/1.1\r\nHost: whoever\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    noise.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("error "), "{answer}");
    fs::write(volume.path("b(0)"), &from).unwrap();
    fs::write(volume.path("b"), &from).unwrap();
    assert_eq!(send(&[], &["0", "2"]).code, 0);

    let ran = send(&[], &["7"]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("snapshot doesn't exist"), "{ran:?}");
    let address = listener.address.clone();
    drop(listener);
    let ran = ddsnap(&["transmit", "--stem", &a, &socket, &address, "0"]);
    assert_eq!(ran.code, 1);
    assert!(ran.stderr.contains("nobody listens at"), "{ran:?}");
}

/// A port that anybody may write to was open to the network unasked.
#[test]
fn a_listener_is_on_loopback_and_warns() {
    let dir = tempfile::tempdir().unwrap();
    let stem = dir.path().join("v");
    fs::write(&stem, "").unwrap();
    let mut child = Command::new(env!("CARGO_BIN_EXE_ddsnap"))
        .args(["delta", "listen"])
        .args([stem.as_os_str(), "127.0.0.1:0".as_ref()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut warning = String::new();
    let stderr = child.stderr.as_mut().unwrap();
    BufReader::new(stderr).read_line(&mut warning).unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(warning.contains("nobody is asked who he is"), "{warning}");
    let help = good(&["delta", "listen", "--help"]);
    assert!(help.contains("[default: 127.0.0.1]"), "{help}");
}
