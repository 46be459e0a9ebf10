// SPDX-License-Identifier: GPL-2.0-only
//! The agent of a volume: where its servers stand in line.
//!
//! The first server in line is told to start and is active until its connection closes; further ones
//! are told to wait. So a new server (an upgrade, or a supervisor's restart) takes over when the old
//! one has gone, and never touches the store beside it.
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
use nix::sys::socket::{SockFlag, accept4};
use tracing::{debug, info, warn};

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
    let mut other = name.connect(patience)?;
    let ready = ToAgent::AgentReady {
        pid: std::process::id(),
    };
    other.write_all(&ready.to_frame().encode())?;
    let in_use = |text: String| io::Error::new(io::ErrorKind::AddrInUse, text);
    let mut reader = FrameReader::default();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(in_use(
                "another process listens on it and does not make room".into(),
            ));
        }
        other.set_read_timeout(Some(left))?;
        let mut bytes = [0; 256];
        match other.read(&mut bytes) {
            // It has gone, and its listener and socket file before this connection.
            Ok(0) => return name.listen(),
            Ok(count) => reader.extend(&bytes[..count]),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                io::ErrorKind::ConnectionReset => return name.listen(),
                _ => return Err(error),
            },
        }
        let frame = reader
            .next_frame()
            .map_err(|error| in_use(error.to_string()))?;
        match frame.map(|frame| FromAgent::from_frame(&frame)) {
            None => {}
            Some(Ok(FromAgent::InUse { active_pid })) => {
                let text = format!(
                    "an agent with server {active_pid} listens on it; stop that server first"
                );
                return Err(in_use(text));
            }
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
            for (server, _) in self
                .servers
                .iter_mut()
                .zip(ready)
                .filter(|(_, ready)| **ready)
            {
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

    fn take_messages(&mut self) -> Result<(), CodecError> {
        while let Some(frame) = self.reader.next_frame()? {
            match ToAgent::from_frame(&frame)? {
                ToAgent::ServerReady { pid, socket } => {
                    info!("server {pid} is ready to serve on {socket}");
                    self.pid = Some(pid);
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
