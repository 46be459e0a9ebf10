// SPDX-License-Identifier: GPL-2.0-only
//! The way to another machine: one ssh command, whose standard streams carry the stream.
//!
//! What the command starts may outlive it and keep its streams open, as an ssh does that shares its connection: so
//! nobody here waits for the end of a stream alone.

use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::layout::Layout;
use crate::replication::link::Link;

/// What reaches another machine if nobody says otherwise.
const DEFAULT: &str = "ssh -T -o BatchMode=yes";
/// A pipe holds so much.
const PIPE_BYTES: usize = 64 << 10;
/// So much is kept of what the other machine complains.
const COMPLAINT_MAX_BYTES: usize = 2000;

/// A running command.
pub struct Remote {
    process: Arc<Mutex<Process>>,
    /// No more complaints are waited for.
    quiet: Arc<EventFd>,
    complaints: Option<JoinHandle<String>>,
}

/// The command's process, with those it has started in a group.
struct Process {
    child: Child,
    /// Its number may be another's.
    reaped: bool,
}

impl Process {
    /// Ends all of the group.
    fn kill(&self) {
        if let Some(group) = i32::try_from(self.child.id()).ok().filter(|_| !self.reaped) {
            // They may be gone already.
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
    }
}

fn lock(process: &Mutex<Process>) -> MutexGuard<'_, Process> {
    process.lock().unwrap_or_else(PoisonError::into_inner)
}

/// This end of one of the command's streams.
struct Stream {
    pipe: fs::File,
    /// Readable when the stream is of no more use.
    end: Arc<EventFd>,
}

impl Stream {
    fn new(pipe: OwnedFd, end: &Arc<EventFd>) -> Result<Stream> {
        let flags = OFlag::from_bits_retain(fcntl(&pipe, FcntlArg::F_GETFL)?);
        fcntl(&pipe, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        let (pipe, end) = (pipe.into(), end.clone());
        Ok(Stream { pipe, end })
    }

    /// Waits until the pipe is ready, unless the stream is of no more use.
    fn wait(&self, ready: PollFlags) -> io::Result<()> {
        let mut polled = [
            PollFd::new(self.end.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.pipe.as_fd(), ready),
        ];
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        match polled[0].any() {
            Some(false) => Ok(()),
            _ => Err(io::ErrorKind::ConnectionAborted.into()),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.pipe.read(into) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::POLLIN)?;
                }
                read => return read,
            }
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.pipe.write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(PollFlags::POLLOUT)?;
                }
                written => return written,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn event() -> Result<Arc<EventFd>> {
    let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
    Ok(Arc::new(EventFd::from_flags(flags)?))
}

/// Fails only when the counter is full, and then it is readable anyway.
fn tell(event: &EventFd) {
    let _ = event.write(1);
}

/// The command that reaches other machines: `own`, or what /etc/zumastor/ssh_command has.
#[must_use]
pub fn command(layout: &Layout, own: Option<&str>) -> String {
    let file = || fs::read_to_string(layout.at("/etc/zumastor/ssh_command")).ok();
    let given = own.map(str::to_owned).or_else(file);
    let given = given.map(|text| text.trim().to_owned());
    given
        .filter(|text| !text.is_empty())
        .unwrap_or_else(|| DEFAULT.to_owned())
}

/// Runs `zumastor WORDS` on `host`.
///
/// # Errors
/// The command cannot be run.
pub fn connect(command: &str, host: &str, words: &[&str]) -> Result<(Link, Remote)> {
    let mut parts = command.split_whitespace();
    let program = parts.next().unwrap_or("ssh");
    let mut remote = String::from("zumastor");
    for word in words {
        remote.push(' ');
        remote.push_str(&quoted(word));
    }
    let (end, quiet) = (event()?, event()?);
    let mut child = Command::new(program)
        .args(parts)
        .arg(host)
        .arg(remote)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .with_context(|| format!("could not run '{command}'"))?;
    let reader = child.stdout.take().context("no way from the command")?;
    let writer = child.stdin.take().context("no way to the command")?;
    let stderr = child.stderr.take().context("no complaints")?;
    let stderr = Stream::new(stderr.into(), &quiet)?;
    let complaints = thread::Builder::new()
        .name("replication-ssh".into())
        .spawn(move || last_of(stderr))?;
    let reaped = false;
    let process = Arc::new(Mutex::new(Process { child, reaped }));
    let (reader, writer) = (
        Stream::new(reader.into(), &end)?,
        Stream::new(writer.into(), &end)?,
    );
    let cut = process.clone();
    let link = Link {
        reader: Box::new(reader),
        writer: Box::new(writer),
        cut: Arc::new(move || {
            lock(&cut).kill();
            tell(&end);
        }),
        greeted: false,
    };
    let complaints = Some(complaints);
    let remote = Remote {
        process,
        quiet,
        complaints,
    };
    Ok((link, remote))
}

impl Remote {
    /// Waits for the command's end; gives what it complained of.
    pub fn finish(mut self) -> String {
        self.end()
    }

    fn end(&mut self) -> String {
        let mut process = lock(&self.process);
        if !process.reaped {
            // The line was closed, which cuts what still runs.
            process.kill();
            let _ = process.child.wait();
            process.reaped = true;
        }
        drop(process);
        // What was said is there.
        tell(&self.quiet);
        let said = self.complaints.take().map(JoinHandle::join);
        said.and_then(Result::ok).unwrap_or_default()
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // However the line was left, no process and no thread stays.
        self.end();
    }
}

/// The last line or so of what is said.
fn last_of(mut from: Stream) -> String {
    let mut kept: Vec<u8> = Vec::new();
    let mut buffer = [0; 512];
    let mut keep = |said: &[u8]| {
        kept.extend_from_slice(said);
        let much = kept.len().saturating_sub(COMPLAINT_MAX_BYTES);
        kept.drain(..much);
    };
    let ended = loop {
        match from.read(&mut buffer) {
            Ok(0) => break true,
            Ok(count) => keep(&buffer[..count]),
            Err(_) => break false,
        }
    };
    if !ended {
        // What was said before is still in the pipe; what is left behind may say more for ever.
        for _ in 0..PIPE_BYTES / buffer.len() {
            match from.pipe.read(&mut buffer) {
                Ok(count @ 1..) => keep(&buffer[..count]),
                _ => break,
            }
        }
    }
    let text = String::from_utf8_lossy(&kept);
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    let line = line.unwrap_or_default().trim();
    line.chars().filter(|c| !c.is_control()).collect()
}

/// A word as a shell takes it.
#[must_use]
pub fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// A volume's name may hold what a shell would run.
    #[test]
    fn words_are_quoted() {
        assert_eq!(quoted("a;b"), "'a;b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }

    fn fake(dir: &tempfile::TempDir, script: &str) -> String {
        let path = dir.path().join("fake-ssh");
        fs::write(&path, script).expect("written");
        let mut mode = fs::metadata(&path).expect("there").permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o755);
        fs::set_permissions(&path, mode).expect("set");
        path.to_string_lossy().into_owned()
    }

    /// Why ssh failed was lost: only that the stream ended was told.
    #[test]
    fn streams_pass_and_complaints_are_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let script = "#!/bin/sh\nread line; echo \"got $line\"; echo \"$1 $2 failed\" >&2\n";
        let command = fake(&dir, script);
        let (mut link, remote) = connect(&command, "beta", &["receive", "v"]).expect("runs");
        link.writer.write_all(b"hello\n").expect("written");
        drop(link.writer);
        let mut said = String::new();
        link.reader.read_to_string(&mut said).expect("read");
        assert_eq!(said, "got hello\n");
        assert_eq!(remote.finish(), "beta zumastor 'receive' 'v' failed");
    }

    /// An ssh that shares its connection leaves a process behind, which keeps its standard error; a script around
    /// ssh one that keeps all three. The job did not end before it.
    #[test]
    fn what_a_command_leaves_behind_holds_up_nobody() {
        let dir = tempfile::tempdir().expect("a directory");
        let script = "#!/bin/sh\necho failed >&2; setsid sleep 20 & sleep 20 & echo; wait $!\n";
        let command = fake(&dir, script);
        let begin = Instant::now();
        let (mut link, remote) = connect(&command, "beta", &["receive", "v"]).expect("runs");
        link.reader.read_exact(&mut [0]).expect("it has begun");
        let mut reader = link.reader;
        let reads = thread::spawn(move || reader.read(&mut [0]));
        (link.cut)();
        // Cut is cut, however that is told.
        let _ = reads.join().expect("it ends");
        drop(link.writer);
        assert_eq!(remote.finish(), "failed");
        assert!(begin.elapsed() < Duration::from_secs(15));
    }
}
