// SPDX-License-Identifier: GPL-2.0-only
//! The agent of a volume: where its servers stand in line.
//!
//! The first server in line is told to start and is active until its connection closes or its process
//! ends; further ones are told to wait. So a new server (an upgrade, or a supervisor's restart) takes over
//! when the old one has gone, and never touches the store beside it.
//!
//! The original agent also handed each device a socket to the server, and ended when the server died,
//! which failed all I/O. Here devices ask through the kernel's channel under the agent socket's
//! *name*, and the kernel holds their I/O while there is no server. So the agent has no reason to die
//! with the server: it stays for the next one. When the agent ends, the active server shuts down. Scripts
//! that start both again after a crash go on working: an agent without a server makes room for the next.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;
use nix::sys::socket::{SockFlag, accept4, getsockopt, sockopt};
use tracing::{debug, info, warn};

use crate::daemon::pidfd;
use crate::protocol::address::{SocketFile, SocketName, peer_is_trusted};
use crate::protocol::codec::{CodecError, FrameReader};
use crate::protocol::line::{FromAgent, ToAgent};

/// Connections at a time; more wait in the socket's backlog.
const MAX_SERVERS: usize = 32;

struct Server {
    stream: UnixStream,
    reader: FrameReader,
    /// None until it has said who it is.
    pid: Option<u32>,
    /// Polls readable at the end of its process. The connection may last longer: the kernel closes what
    /// requests under way in an io_uring hold when it gets to it.
    process: Option<OwnedFd>,
    /// Its place in line, from the moment it has said who it is.
    place: Option<u64>,
    /// What it was told last.
    told: Option<FromAgent>,
    /// It is no server but an agent that wants our place: its process.
    successor: Option<u32>,
    gone: bool,
}

/// The agent's state: the line, first come first served.
pub struct Agent {
    listener: OwnedFd,
    signals: OwnedFd,
    /// Those in line, the active one first, and then those that have not said who they are.
    servers: Vec<Server>,
    /// The next one's place in line.
    next_place: u64,
    on_hangup: Box<dyn FnMut()>,
}

/// Why an agent ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// SIGTERM or SIGINT.
    Signal(Signal),
    /// It had no server, and another agent, this process, takes the name over.
    Successor(u32),
}

/// An agent that has ended, and its connections. A successor waits for their end: close them when the
/// socket's file is gone.
pub struct Ended {
    /// Why.
    pub end: End,
    _connections: Vec<Server>,
}

/// How long the end of the other agent's server is waited for: one that was killed just before needs a
/// moment to be gone.
const SERVER_END: Duration = Duration::from_secs(1);

/// Takes the name of an agent: listens on it. One that listens there already and has no server is asked to
/// make room, and waited for up to `patience`.
///
/// # Errors
/// It has a server, which the text names; or as for [`SocketName::listen`].
pub fn listen(name: &SocketName, patience: Duration) -> io::Result<(OwnedFd, SocketFile)> {
    match name.listen() {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        other => return other,
    }
    let deadline = Instant::now() + patience;
    let mut active = ask_for_room(name, deadline)?;
    if let Some(pid) = active
        && has_ended(pid)?
    {
        active = ask_for_room(name, deadline)?;
    }
    match active {
        None => name.listen(),
        Some(pid) => Err(in_use(format!(
            "an agent with server {pid} listens on it; stop that server first"
        ))),
    }
}

/// Whether process `pid` is gone, or is within [`SERVER_END`].
fn has_ended(pid: u32) -> io::Result<bool> {
    match pidfd::open(pid) {
        Ok(fd) => pidfd::wait_gone(&fd, SERVER_END),
        Err(error) if error.raw_os_error() == Some(Errno::ESRCH as i32) => Ok(true),
        Err(error) => Err(error),
    }
}

fn in_use(text: String) -> io::Error {
    io::Error::new(io::ErrorKind::AddrInUse, text)
}

/// Asks the agent that listens on `name` to end, and waits for that until `deadline`; the process of its
/// server if it has one, for whose sake it stays.
fn ask_for_room(name: &SocketName, deadline: Instant) -> io::Result<Option<u32>> {
    let left = || deadline.saturating_duration_since(Instant::now());
    let mut other = match name.connect(left()) {
        // It has gone meanwhile.
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::ConnectionRefused | io::ErrorKind::NotFound
            ) =>
        {
            return Ok(None);
        }
        other => other?,
    };
    let ready = ToAgent::AgentReady {
        pid: std::process::id(),
    };
    other.write_all(&ready.to_frame().encode())?;
    let mut reader = FrameReader::default();
    loop {
        let left = left();
        if left.is_zero() {
            return Err(in_use(
                "another process listens on it and does not make room".into(),
            ));
        }
        other.set_read_timeout(Some(left))?;
        let mut bytes = [0; 256];
        match other.read(&mut bytes) {
            // It has gone, and its listener and socket file before this connection.
            Ok(0) => return Ok(None),
            Ok(count) => reader.extend(&bytes[..count]),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                io::ErrorKind::ConnectionReset => return Ok(None),
                _ => return Err(error),
            },
        }
        let frame = reader
            .next_frame()
            .map_err(|error| in_use(error.to_string()))?;
        match frame.map(|frame| FromAgent::from_frame(&frame)) {
            None => {}
            Some(Ok(FromAgent::InUse { active_pid })) => return Ok(Some(active_pid)),
            Some(other) => {
                let text = format!("another process listens on it and says {other:?}");
                return Err(in_use(text));
            }
        }
    }
}

impl Agent {
    /// An agent that accepts servers on `listener`, which is non-blocking, and ends on a signal.
    #[must_use]
    pub fn new(listener: OwnedFd, signals: OwnedFd, on_hangup: Box<dyn FnMut()>) -> Agent {
        Agent {
            listener,
            signals,
            servers: Vec::new(),
            next_place: 0,
            on_hangup,
        }
    }

    /// Runs until it is told to end.
    ///
    /// # Errors
    /// The system refuses to wait or to give signals.
    pub fn run(mut self) -> io::Result<Ended> {
        loop {
            let [signalled, knocked, ready @ ..] = &self.wait()?[..] else {
                unreachable!("two descriptors are always waited for")
            };
            if *signalled {
                match self.take_signal()? {
                    Some(Signal::SIGHUP) => (self.on_hangup)(),
                    Some(other) => return Ok(self.ended(End::Signal(other))),
                    None => {}
                }
            }
            let (spoken, ended) = ready.split_at(self.servers.len());
            let watched = self.servers.iter_mut().filter(|s| s.process.is_some());
            for (server, _) in watched.zip(ended).filter(|(_, ended)| **ended) {
                server.gone = true;
            }
            let servers = self.servers.iter_mut().zip(spoken);
            for (server, _) in servers.filter(|(_, spoken)| **spoken) {
                server.listen();
            }
            if *knocked {
                self.accept();
            }
            self.line_up();
            if let Some(pid) = self.make_room() {
                return Ok(self.ended(End::Successor(pid)));
            }
        }
    }

    /// Nobody is let in any more.
    fn ended(self, end: End) -> Ended {
        Ended {
            end,
            _connections: self.servers,
        }
    }

    /// The agent that takes over, if one has asked and there is no server. If there is one, whoever has
    /// asked hears that.
    fn make_room(&mut self) -> Option<u32> {
        let active_pid = self.servers.iter().find_map(|server| server.pid);
        for server in &mut self.servers {
            let Some(pid) = server.successor.take() else {
                continue;
            };
            let Some(active_pid) = active_pid else {
                return Some(pid);
            };
            info!("agent {pid} wants to take over; refused, server {active_pid} is active");
            server.tell(FromAgent::InUse { active_pid });
        }
        None
    }

    /// What is ready: signals, the listener, the connections, and the processes that are watched.
    fn wait(&self) -> io::Result<Vec<bool>> {
        let full = self.servers.len() >= MAX_SERVERS;
        let knocks = if full {
            PollFlags::empty()
        } else {
            PollFlags::POLLIN
        };
        let mut fds = vec![
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.listener.as_fd(), knocks),
        ];
        let streams = self.servers.iter().map(|server| server.stream.as_fd());
        fds.extend(streams.map(|stream| PollFd::new(stream, PollFlags::POLLIN)));
        let processes = self.servers.iter().filter_map(|s| s.process.as_ref());
        fds.extend(processes.map(|process| PollFd::new(process.as_fd(), PollFlags::POLLIN)));
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => return Err(errno.into()),
        }
        Ok(fds.iter().map(|fd| fd.any().unwrap_or(true)).collect())
    }

    fn take_signal(&self) -> io::Result<Option<Signal>> {
        let mut info = [0; 128];
        let count = nix::unistd::read(&self.signals, &mut info)?;
        let number = info[..count]
            .first_chunk::<4>()
            .map(|bytes| i32::from_ne_bytes(*bytes));
        Ok(number.and_then(|number| Signal::try_from(number).ok()))
    }

    fn accept(&mut self) {
        let accepted = accept4(
            std::os::fd::AsRawFd::as_raw_fd(&self.listener),
            SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK,
        );
        let stream = match accepted {
            Ok(fd) => {
                // SAFETY: accept4 has just made this descriptor; nobody else knows it.
                let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
                UnixStream::from(fd)
            }
            Err(Errno::EAGAIN | Errno::EINTR | Errno::ECONNABORTED) => return,
            Err(errno) => return warn!("cannot accept a connection: {errno}"),
        };
        match peer_is_trusted(&stream) {
            Ok(true) => self.servers.push(Server {
                stream,
                reader: FrameReader::default(),
                pid: None,
                process: None,
                place: None,
                told: None,
                successor: None,
                gone: false,
            }),
            Ok(false) => warn!("refused a connection from another user"),
            Err(error) => warn!("refused a connection: cannot tell whose it is: {error}"),
        }
    }

    /// Tells each server in line what has changed for it.
    fn line_up(&mut self) {
        for server in self
            .servers
            .iter_mut()
            .filter(|server| server.pid.is_some())
        {
            if server.place.is_none() {
                server.place = Some(self.next_place);
                self.next_place += 1;
            }
        }
        self.servers
            .sort_by_key(|server| server.place.unwrap_or(u64::MAX));
        // Telling one can find that it has gone, which changes the line: until nothing changes.
        loop {
            for server in self.servers.iter().filter(|server| server.gone) {
                match (server.pid, &server.told) {
                    (Some(pid), Some(FromAgent::StartServer)) => info!("server {pid} has gone"),
                    (Some(pid), _) => info!("server {pid} does not wait any more"),
                    (None, _) => debug!("a connection that said nothing has gone"),
                }
            }
            self.servers.retain(|server| !server.gone);
            let mut active = None;
            let mut ahead = 0;
            for server in self.servers.iter_mut() {
                let Some(pid) = server.pid else { continue };
                match active {
                    None => {
                        active = Some(pid);
                        server.tell(FromAgent::StartServer);
                    }
                    Some(active_pid) => server.tell(FromAgent::Wait { active_pid, ahead }),
                }
                ahead += 1;
            }
            if self.servers.iter().all(|server| !server.gone) {
                return;
            }
        }
    }
}

impl Server {
    /// Takes what it says.
    fn listen(&mut self) {
        let mut bytes = [0; 4096];
        match self.stream.read(&mut bytes) {
            Ok(0) => self.gone = true,
            Ok(count) => {
                self.reader.extend(&bytes[..count]);
                if let Err(error) = self.take_messages() {
                    warn!("closing a connection that sent nonsense: {error}");
                    self.gone = true;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => self.gone = true,
        }
    }

    /// Watches process `pid`, which it says it is, if that is so here too: in another namespace the
    /// number is another process's.
    fn watch(&self, pid: u32) -> Option<OwnedFd> {
        let peer = getsockopt(&self.stream, sockopt::PeerCredentials).ok()?;
        (u32::try_from(peer.pid()) == Ok(pid)).then(|| pidfd::open(pid).ok())?
    }

    fn take_messages(&mut self) -> Result<(), CodecError> {
        while let Some(frame) = self.reader.next_frame()? {
            match ToAgent::from_frame(&frame)? {
                ToAgent::ServerReady { pid, socket } => {
                    info!("server {pid} is ready to serve on {socket}");
                    self.pid = Some(pid);
                    self.process = self.watch(pid);
                }
                ToAgent::AgentReady { pid } => self.successor = Some(pid),
            }
        }
        Ok(())
    }

    fn tell(&mut self, message: FromAgent) {
        if self.told.as_ref() == Some(&message) || self.gone {
            return;
        }
        let pid = self.pid.unwrap_or_default();
        match &message {
            FromAgent::StartServer => info!("server {pid} is active"),
            FromAgent::Wait { active_pid, .. } => info!("server {pid} waits for {active_pid}"),
            FromAgent::InUse { .. } => {}
        }
        // A few bytes on a connection on which hardly anything was sent: they fit its buffer. If not,
        // the other side does not read, and is of no use.
        if self.stream.write_all(&message.to_frame().encode()).is_err() {
            self.gone = true;
        }
        self.told = Some(message);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use std::process::{Command, Stdio};
    use std::thread;

    /// An agent was started behind a `kill -9` of the server. The other agent had not yet seen that
    /// server's end, for the kernel takes a process apart in its own time, and the new one gave up.
    #[test]
    fn a_server_that_is_just_ending_is_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let name: SocketName = dir.path().join("agent").to_str().unwrap().parse().unwrap();
        let (listener, file) = name.listen().unwrap();
        let mut server = Command::new("cat").stdin(Stdio::piped()).spawn().unwrap();
        let active_pid = server.id();
        let other = thread::spawn(move || {
            let (mut asked, mut connections) = (0, Vec::new());
            while asked < 2 {
                poll(
                    &mut [PollFd::new(listener.as_fd(), PollFlags::POLLIN)],
                    PollTimeout::NONE,
                )
                .unwrap();
                let fd = std::os::fd::AsRawFd::as_raw_fd(&listener);
                let fd = accept4(fd, SockFlag::SOCK_CLOEXEC).unwrap();
                // SAFETY: accept4 has just made this descriptor; nobody else knows it.
                let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(fd) };
                let mut stream = UnixStream::from(fd);
                // A connection that says nothing only looks whether somebody answers.
                if stream.read(&mut [0; 256]).unwrap() == 0 {
                    continue;
                }
                asked += 1;
                if asked == 1 {
                    let refusal = FromAgent::InUse { active_pid };
                    stream.write_all(&refusal.to_frame().encode()).unwrap();
                    server.kill().unwrap();
                }
                connections.push(stream);
            }
            server.wait().unwrap();
            drop((listener, file));
        });
        let taken = listen(&name, Duration::from_secs(60));
        assert!(taken.is_ok(), "{:?}", taken.err());
        other.join().unwrap();
    }
}
