// SPDX-License-Identifier: GPL-2.0-only
//! Running the `ddsnap` command with real daemons on plain files.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use ddsnap::daemon::pidfd;
use ddsnap::device::uring::{Access, UringDevice};
use ddsnap::store::{Devices, OpenOptions, Store};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long anything here may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A volume of plain files with its sockets and logs. Its daemons end with it.
pub struct Volume {
    pub dir: tempfile::TempDir,
    pub daemons: Vec<Pid>,
}

/// What a command did.
#[derive(Debug, PartialEq, Eq)]
pub struct Ran {
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

pub fn ran(output: Output) -> Ran {
    Ran {
        code: output.status.code().expect("ended by itself"),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

pub fn ddsnap() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ddsnap"));
    for variable in ["DDSNAP_TRIGGER", "DDSNAP_COUNT", "DDSNAP_ACTION"] {
        command.env_remove(variable);
    }
    command.env("TZ", "UTC").stdin(Stdio::null());
    command
}

pub fn ddsnap_with(args: &[&str]) -> Ran {
    ran(ddsnap().args(args).output().unwrap())
}

/// Runs a command that must succeed in silence on standard error.
pub fn good(args: &[&str]) -> String {
    let ran = ddsnap_with(args);
    assert_eq!(
        (ran.code, ran.stderr.as_str()),
        (0, ""),
        "ddsnap {args:?}: {ran:?}"
    );
    ran.stdout
}

pub fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Whether a thread of the process lives: until the last has ended, it may hold sockets and locks.
pub fn is_alive(pid: Pid) -> bool {
    pidfd::open(pid.as_raw().try_into().unwrap())
        .is_ok_and(|fd| !pidfd::wait_gone(&fd, Duration::ZERO).unwrap())
}

impl Volume {
    pub fn new() -> Volume {
        let volume = Volume {
            dir: tempfile::tempdir().unwrap(),
            daemons: Vec::new(),
        };
        File::create(volume.file("origin"))
            .unwrap()
            .set_len(8 << 20)
            .unwrap();
        File::create(volume.file("store"))
            .unwrap()
            .set_len(16 << 20)
            .unwrap();
        volume
    }

    /// One whose store is initialised and whose agent runs.
    pub fn with_agent() -> Volume {
        let mut volume = Volume::new();
        volume.initialize();
        volume.start_agent();
        volume
    }

    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn name(&self, name: &str) -> String {
        self.file(name).to_str().unwrap().to_owned()
    }

    pub fn initialize(&self) {
        good(&[
            "initialize",
            "-y",
            "-c",
            "8k",
            &self.name("store"),
            &self.name("origin"),
        ]);
    }

    /// The store itself, while no server runs. Without a kernel nobody asks a server for copies: what is
    /// to be in the store is put there through this.
    pub fn open_store(&self) -> Store {
        let open = |name, access| Box::new(UringDevice::open(&self.file(name), access).unwrap());
        let devices = Devices {
            origin: open("origin", Access::Read),
            data: open("store", Access::ReadWrite),
            meta: None,
        };
        let options = OpenOptions {
            cache_bytes: 1 << 20,
        };
        Store::open(devices, &options).unwrap().0
    }

    pub fn start_agent(&mut self) -> Pid {
        let (agent, log, pidfile) = (
            self.name("agent"),
            self.name("agent.log"),
            self.name("agent.pid"),
        );
        let printed = good(&["agent", &agent, "-l", &log, "--pidfile", &pidfile]);
        assert_eq!(printed, "");
        self.remember(&pidfile)
    }

    pub fn server_args(&self) -> Vec<String> {
        let mut args = vec!["server".to_owned()];
        args.extend(["store", "origin", "agent", "server"].map(|name| self.name(name)));
        args.extend(["-k".to_owned(), "2m".to_owned()]);
        args.extend(["-l".to_owned(), self.name("server.log")]);
        args.extend(["-p".to_owned(), self.name("server.pid")]);
        args
    }

    pub fn start_server(&mut self) -> Pid {
        let args = self.server_args();
        let ran = ran(ddsnap().args(args).output().unwrap());
        assert_eq!(
            (ran.code, ran.stderr.as_str()),
            (0, ""),
            "{ran:?}\n{}",
            self.log()
        );
        let pid = self.remember(&self.name("server.pid"));
        assert_eq!(ran.stdout, format!("pid = {pid}\n"));
        pid
    }

    pub fn remember(&mut self, pidfile: &str) -> Pid {
        let pid = fs::read_to_string(pidfile).unwrap();
        let pid = Pid::from_raw(pid.trim().parse().unwrap());
        self.daemons.push(pid);
        pid
    }

    pub fn log(&self) -> String {
        fs::read_to_string(self.file("server.log")).unwrap_or_default()
    }

    /// Waits until the server's log has `words`: lines are written a moment after what they tell of.
    pub fn await_log(&self, words: &str) {
        wait_until(words, || self.log().contains(words));
    }

    pub fn socket(&self) -> String {
        self.name("server")
    }

    pub fn stop(&self, pid: Pid, signal: Signal) {
        kill(pid, signal).unwrap();
        wait_until("the daemon's end", || !is_alive(pid));
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        for pid in self.daemons.iter().filter(|pid| is_alive(**pid)) {
            let _ = kill(*pid, Signal::SIGKILL);
        }
    }
}

/// Replaces times, which nobody can foretell, so that the rest can be compared to the letter.
pub fn without_times(text: &str) -> String {
    let is_day = |word: &str| ["Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"].contains(&word);
    let mut lines = Vec::new();
    for line in text.lines() {
        let at = line
            .char_indices()
            .map(|(at, _)| at)
            .find(|&at| line.get(at..at + 3).is_some_and(is_day) && line.len() >= at + 24);
        lines.push(match at {
            Some(at) => format!(
                "{}DAY MON DD HH:MM:SS YEAR{}\n",
                &line[..at],
                &line[at + 24..]
            ),
            None => format!("{line}\n"),
        });
    }
    lines.concat()
}
