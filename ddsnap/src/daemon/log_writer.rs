// SPDX-License-Identifier: GPL-2.0-only
//! The process that touches a log's file, so that the daemon does not.
//!
//! A write may wait for a hung or a frozen disk where no signal reaches it. If a thread of the daemon waited there, a
//! daemon that is killed would not be gone: its memory stays as long as one thread has it, with that the mapped
//! rings of io_uring, and with these the descriptors that they were asked to watch and to write to. The store's
//! lock and the agent's connection are among them, so no other server could take over.
//!
//! Messages over a socket that keeps their bounds: a byte that says what to do and the bytes for it, answered by an errno,
//! 0 if it is done. The process ends when the daemon's end of the socket does.

use std::ffi::OsStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::libc;
use nix::sys::prctl;
use nix::sys::signal::SigSet;
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockType, recv, send, socketpair};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::{ForkResult, Pid, fork};

use super::{memory, pidfd};

/// The most bytes of a line; the rest is cut off.
const LINE_MOST: usize = 64 << 10;
/// How long the end of a writer is waited for that has nothing to write any more.
const END: Duration = Duration::from_secs(1);
/// Append these bytes.
const APPEND: u8 = b'a';
/// Open the file of this name instead of what is open.
const OPEN: u8 = b'o';

/// The process, from the daemon's side.
#[derive(Debug)]
pub(super) struct LogWriter {
    /// None once it is to end.
    socket: Option<OwnedFd>,
    process: Pid,
}

impl LogWriter {
    /// Splits off the process, which writes to the file `path`, made if missing with mode 0600, or to standard error.
    ///
    /// # Errors
    /// The file cannot be opened, or what the system says.
    pub(super) fn start(path: Option<&Path>) -> io::Result<LogWriter> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let (ours, theirs) = socketpair(AddressFamily::Unix, SockType::SeqPacket, None, flags)?;
        let stderr = match path {
            Some(_) => None,
            None => Some(io::stderr().as_fd().try_clone_to_owned()?),
        };
        // SAFETY: a daemon has one thread when it starts its log, so the child may do whatever it may. Where a test
        // has more, the child uses nothing that another thread could hold but the allocator, which glibc puts in
        // order for a fork.
        match unsafe { fork() }? {
            ForkResult::Child => {
                // Whatever happens, this process must not go on as a second daemon.
                let _ = catch_unwind(AssertUnwindSafe(|| serve(&theirs, stderr)));
                // SAFETY: it ends the process and touches no memory.
                unsafe { libc::_exit(0) }
            }
            ForkResult::Parent { child } => {
                let writer = LogWriter {
                    socket: Some(ours),
                    process: child,
                };
                drop(theirs);
                if let Some(path) = path {
                    writer.open(path)?;
                }
                Ok(writer)
            }
        }
    }

    /// Writes to the file `path` from now on. If that fails the old one stays. Waits for as long as it takes.
    ///
    /// # Errors
    /// The file cannot be opened, or the process has gone.
    pub(super) fn open(&self, path: &Path) -> io::Result<()> {
        self.ask(OPEN, path.as_os_str().as_bytes())
    }

    /// Appends a line. Waits for as long as it takes.
    ///
    /// # Errors
    /// It cannot be written, or the process has gone.
    pub(super) fn append(&self, line: &[u8]) -> io::Result<()> {
        if line.len() <= LINE_MOST {
            return self.ask(APPEND, line);
        }
        self.ask(APPEND, &[&line[..LINE_MOST - 1], b"\n"].concat())
    }

    fn ask(&self, what: u8, bytes: &[u8]) -> io::Result<()> {
        let Some(socket) = &self.socket else {
            return Err(Errno::EPIPE.into());
        };
        let message = [&[what], bytes].concat();
        uninterrupted(|| send(socket.as_raw_fd(), &message, MsgFlags::MSG_NOSIGNAL))?;
        let mut answer = [0; 4];
        let count = uninterrupted(|| recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty()))?;
        match (count, i32::from_le_bytes(answer)) {
            (4, 0) => Ok(()),
            (4, errno) => Err(io::Error::from_raw_os_error(errno)),
            _ => Err(Errno::EPIPE.into()),
        }
    }
}

impl Drop for LogWriter {
    fn drop(&mut self) {
        self.socket = None;
        // Who unmounts the log's file system once the daemon has ended is not to find it in use. One that waits for
        // its disk is let be.
        if let Ok(process) = pidfd::open(self.process.as_raw().unsigned_abs()) {
            let _ = pidfd::wait_gone(&process, END);
        }
        let _ = waitpid(self.process, Some(WaitPidFlag::WNOHANG));
    }
}

fn uninterrupted<T>(mut call: impl FnMut() -> nix::Result<T>) -> nix::Result<T> {
    loop {
        match call() {
            Err(Errno::EINTR) => {}
            other => return other,
        }
    }
}

/// The process.
fn serve(socket: &OwnedFd, stderr: Option<OwnedFd>) {
    // What ends the daemon is not for this process, which has its last lines to write.
    let _ = SigSet::all().thread_block();
    let _ = prctl::set_name(c"ddsnap-log");
    let _ = memory::forbid_killing();
    close_all_but(socket.as_raw_fd(), stderr.as_ref().map(AsRawFd::as_raw_fd));
    let mut file = stderr.map(File::from);
    let mut message = vec![0; 1 + LINE_MOST];
    loop {
        let heard = uninterrupted(|| recv(socket.as_raw_fd(), &mut message, MsgFlags::empty()));
        let Some((what, bytes)) = heard.ok().and_then(|len| message[..len].split_first()) else {
            return;
        };
        let done = match (*what, &mut file) {
            (OPEN, _) => {
                open(Path::new(OsStr::from_bytes(bytes))).map(|opened| file = Some(opened))
            }
            (_, Some(file)) => file.write_all(bytes),
            (_, None) => Err(Errno::EBADF.into()),
        };
        let errno = done.map_or_else(|error| error.raw_os_error().unwrap_or(libc::EIO), |()| 0);
        let answer = errno.to_le_bytes();
        if uninterrupted(|| send(socket.as_raw_fd(), &answer, MsgFlags::MSG_NOSIGNAL)).is_err() {
            return;
        }
    }
}

/// Closes all descriptors but these: what the daemon holds must not outlive it here, and who started it waits for the
/// end of its output.
fn close_all_but(one: RawFd, other: Option<RawFd>) {
    let mut kept = vec![one];
    kept.extend(other);
    kept.sort_unstable();
    let number = |fd: RawFd| fd.unsigned_abs();
    let mut first = 0;
    for fd in kept {
        if number(fd) > first {
            close_range(first, number(fd) - 1);
        }
        first = number(fd) + 1;
    }
    close_range(first, u32::MAX);
}

fn close_range(first: u32, last: u32) {
    // SAFETY: this process is to use no descriptor in that range any more; what owned them is never dropped, as the
    // process ends by _exit.
    unsafe { libc::close_range(first, last, 0) };
}

/// Opens a log. First without O_CREAT: with it the kernel waits while the file system is frozen, even if the
/// file is there.
fn open(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options
        .append(true)
        .mode(0o600)
        .custom_flags(libc::O_NOCTTY);
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => options.create(true).open(path),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use nix::sys::signal::{Signal, kill};
    use nix::sys::stat::Mode;

    use super::*;

    /// A thread of the server wrote the log. While that waited for a hung disk, a server that was killed kept the store's
    /// lock and its place at the agent, and its successor was refused until somebody mended the disk.
    #[test]
    fn it_is_another_process_and_holds_its_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let ours = File::open("/dev/null").unwrap();
        let writer = LogWriter::start(Some(&path)).unwrap();
        writer.append(b"line\n").unwrap();
        assert_ne!(writer.process, Pid::this());
        let held = std::fs::read_dir(format!("/proc/{}/fd", writer.process)).unwrap();
        let held: Vec<PathBuf> = held
            .map(|fd| std::fs::read_link(fd.unwrap().path()).unwrap())
            .filter(|held| !held.to_string_lossy().starts_with("socket:"))
            .collect();
        assert_eq!(held, std::slice::from_ref(&path));
        assert!(ours.metadata().is_ok(), "ours was closed");
        assert_eq!(std::fs::read(&path).unwrap(), b"line\n");
    }

    #[test]
    fn what_fails_is_told_and_the_old_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let missing = dir.path().join("none/log");
        let error = LogWriter::start(Some(&missing)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        let writer = LogWriter::start(Some(&path)).unwrap();
        let error = writer.open(&missing).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        writer.append(&vec![b'x'; LINE_MOST + 1]).unwrap();
        let cut = std::fs::read(&path).unwrap();
        assert_eq!((cut.len(), cut.last()), (LINE_MOST, Some(&b'\n')));
        writer.open(Path::new("/dev/full")).unwrap();
        let error = writer.append(b"line\n").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        kill(writer.process, Signal::SIGKILL).unwrap();
        waitpid(writer.process, None).unwrap();
        assert!(writer.append(b"line\n").is_err(), "nobody is there");
    }

    /// It ends with the daemon, and not by what ends the daemon: the last lines would be lost.
    #[test]
    fn it_ends_with_the_daemon_and_by_no_signal() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let reader = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        let writer = LogWriter::start(Some(&path)).unwrap();
        kill(writer.process, Signal::SIGTERM).unwrap();
        writer.append(b"line\n").unwrap();
        let process = pidfd::open(writer.process.as_raw().unsigned_abs()).unwrap();
        drop(writer);
        assert!(pidfd::wait_gone(&process, Duration::ZERO).unwrap());
        drop(reader);
    }
}
