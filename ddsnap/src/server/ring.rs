// SPDX-License-Identifier: GPL-2.0-only
//! The loop that moves bytes between the kernel's channel, the clients and the [`Core`].
//!
//! One thread, one io_uring. What one read of the channel returns is one batch and so one commit
//! group; while the engine commits it, the next requests gather in the kernel. Nothing waits for a
//! client.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant, SystemTime};

use nix::errno::Errno;
use nix::sys::signal::Signal;
use tracing::{debug, error, info, warn};

use super::clients::Clients;
use super::core::{ClientId, Core, Now, Output};
use super::engine::Engine;
use super::faults::{Faults, channel_name, control_name};
use super::io::{Done, Io};
use super::link::{ABSENT_RETRY, Backoff, Connect, LinkError, has_requests};
use crate::protocol::channel::{Ask, REQUEST_BYTES, Request};
use crate::store::OriginUse;

/// Requests read at a time, and so the size of a commit group but for writes held by a barrier.
pub const BATCH: usize = 256;
/// Bytes of what a signalfd gives.
const SIGNAL_BYTES: usize = 128;
/// A channel that lived so long is tried again at once when it breaks.
const STEADY: Duration = Duration::from_secs(10);

/// The operations in flight.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// Accepting a client.
    Accept,
    /// Waiting for the agent's end.
    Agent,
    /// Waiting for a signal.
    Signal,
    /// Reading requests from the kernel.
    ChannelRead,
    /// Writing replies to the kernel, from this byte of the buffer on.
    ChannelWrite(usize),
    /// Reading from a client.
    ClientRead(ClientId),
    /// Writing to a client, from this byte of the buffer on.
    ClientWrite(ClientId, usize),
}

/// What the loop is given.
pub struct Parts<C> {
    /// The control socket, listening.
    pub listener: OwnedFd,
    /// The connection to the agent; its end ends the server.
    pub agent: OwnedFd,
    /// A signalfd of SIGTERM, SIGINT and SIGHUP.
    pub signals: OwnedFd,
    /// Attaches to the kernel.
    pub connect: C,
    /// The channel, if it is attached already.
    pub channel: Option<OwnedFd>,
    /// Faults to inject.
    pub faults: Faults,
    /// Called on SIGHUP.
    pub on_hangup: Box<dyn FnMut()>,
}

enum Link {
    Up {
        file: Rc<OwnedFd>,
        /// Replies not handed to the kernel yet, in order.
        queued: Vec<u8>,
        writing: bool,
        since: Duration,
    },
    Down {
        retry_at: Duration,
    },
}

/// The loop's state.
pub struct Ring<E, C> {
    io: Io<Token>,
    core: Core<E>,
    clients: Clients,
    link: Link,
    backoff: Backoff,
    /// The reason the channel is down has been logged.
    down_logged: bool,
    listener: Rc<OwnedFd>,
    agent: Rc<OwnedFd>,
    signals: Rc<OwnedFd>,
    connect: C,
    faults: Faults,
    on_hangup: Box<dyn FnMut()>,
    started: Instant,
    stop: Option<&'static str>,
}

impl<E: Engine, C: Connect> Ring<E, C> {
    /// Prepares the loop.
    ///
    /// # Errors
    /// There is no io_uring.
    pub fn new(engine: E, parts: Parts<C>) -> io::Result<Self> {
        let mut ring = Ring {
            io: Io::new()?,
            core: Core::new(engine),
            clients: Clients::default(),
            link: Link::Down {
                retry_at: Duration::ZERO,
            },
            backoff: Backoff::default(),
            down_logged: false,
            listener: Rc::new(parts.listener),
            agent: Rc::new(parts.agent),
            signals: Rc::new(parts.signals),
            connect: parts.connect,
            faults: parts.faults,
            on_hangup: parts.on_hangup,
            started: Instant::now(),
            stop: None,
        };
        match parts.channel {
            Some(channel) => ring.link_up(channel)?,
            None => ring.link_absent()?,
        }
        ring.io.accept(Token::Accept, &ring.listener)?;
        ring.io
            .read(Token::Agent, &ring.agent, Vec::with_capacity(64))?;
        ring.io.read(
            Token::Signal,
            &ring.signals,
            Vec::with_capacity(SIGNAL_BYTES),
        )?;
        Ok(ring)
    }

    /// Serves until a signal or the agent's end. Gives back the engine, to be closed, who may write to the
    /// origin now, why it ended, and whether the store had failed.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn run(mut self) -> io::Result<(E, OriginUse, &'static str, Option<String>)> {
        loop {
            self.io.wait(self.limit())?;
            while let Some(done) = self.io.next_done() {
                self.handle(done)?;
            }
            if let Some(reason) = self.stop {
                let origin = self.core.origin_use();
                let (engine, fault) = self.core.into_engine();
                return Ok((engine, origin, reason, fault));
            }
            self.tick()?;
            // One small step, then look again whether somebody asks for something.
            if self.core.wants_background() {
                let mut out = Output::default();
                self.core.background(self.now(), &mut out);
                self.deliver(out)?;
            }
        }
    }

    fn now(&self) -> Now {
        let unix = match SystemTime::now().duration_since(SystemTime::UNIX_EPOCH) {
            Ok(since) => since.as_secs() as i64,
            Err(before) => -(before.duration().as_secs() as i64),
        };
        Now {
            monotonic: self.started.elapsed(),
            unix,
        }
    }

    /// How long to wait for something to happen.
    fn limit(&self) -> Option<Duration> {
        if self.core.wants_background() {
            return Some(Duration::ZERO);
        }
        let retry = match self.link {
            Link::Down { retry_at } if !self.is_closing() => Some(retry_at),
            _ => None,
        };
        let deadlines = [
            self.core.next_deadline(),
            self.clients.next_deadline(),
            retry,
        ];
        let next = deadlines.into_iter().flatten().min()?;
        // Never 0: that would poll where it must sleep.
        Some(
            next.saturating_sub(self.started.elapsed())
                .max(Duration::from_millis(1)),
        )
    }

    fn tick(&mut self) -> io::Result<()> {
        let now = self.now();
        if self
            .core
            .next_deadline()
            .is_some_and(|deadline| deadline <= now.monotonic)
        {
            let mut out = Output::default();
            self.core.tick(now, &mut out);
            self.deliver(out)?;
        }
        for id in self.clients.close_stalled(now.monotonic) {
            self.core.client_gone(id);
        }
        match self.link {
            Link::Down { retry_at } if retry_at <= now.monotonic && !self.is_closing() => {
                self.reconnect()
            }
            _ => Ok(()),
        }
    }

    fn handle(&mut self, done: Done<Token>) -> io::Result<()> {
        match done.token {
            Token::Accept => self.accepted(done.result),
            Token::Agent => self.agent_spoke(&done.result),
            Token::Signal => self.signalled(&done),
            Token::ChannelRead => self.channel_read(done),
            Token::ChannelWrite(from) => self.channel_written(from, done),
            Token::ClientRead(id) => {
                let now = self.now().monotonic;
                if self.clients.has_read(id, &done.result, &done.buffer, now) {
                    self.serve(id)
                } else {
                    self.core.client_gone(id);
                    Ok(())
                }
            }
            Token::ClientWrite(id, from) => {
                let now = self.now().monotonic;
                let Done { result, buffer, .. } = done;
                if self
                    .clients
                    .has_written(&mut self.io, id, &result, buffer, from, now)
                {
                    return self.serve(id);
                }
                match self.clients.takes_more(id) {
                    Some(true) => self.core.client_took(id),
                    Some(false) => {}
                    None => self.core.client_gone(id),
                }
                Ok(())
            }
        }
    }

    fn accepted(&mut self, result: io::Result<u32>) -> io::Result<()> {
        match result {
            Ok(fd) => {
                // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
                let file = unsafe { OwnedFd::from_raw_fd(fd as i32) };
                let now = self.now().monotonic;
                if let Some(evicted) = self.clients.accept(&mut self.io, file, now) {
                    self.core.client_gone(evicted);
                }
            }
            Err(error) => warn!("cannot accept a connection: {error}"),
        }
        self.io.accept(Token::Accept, &self.listener)
    }

    fn agent_spoke(&mut self, result: &io::Result<u32>) -> io::Result<()> {
        match result {
            Ok(1..) => self
                .io
                .read(Token::Agent, &self.agent, Vec::with_capacity(64)),
            _ => {
                self.stop = Some("the agent is gone");
                Ok(())
            }
        }
    }

    fn signalled(&mut self, done: &Done<Token>) -> io::Result<()> {
        let number = done
            .buffer
            .first_chunk::<4>()
            .map(|bytes| i32::from_ne_bytes(*bytes));
        match number.and_then(|number| Signal::try_from(number).ok()) {
            Some(Signal::SIGHUP) => (self.on_hangup)(),
            Some(Signal::SIGINT) => self.stop = Some("SIGINT"),
            Some(Signal::SIGTERM) => self.stop = Some("SIGTERM"),
            other => debug!("signal {other:?} ({:?})", done.result),
        }
        self.io.read(
            Token::Signal,
            &self.signals,
            Vec::with_capacity(SIGNAL_BYTES),
        )
    }

    /// Takes what the client has sent, as far as it is its turn.
    fn serve(&mut self, id: ClientId) -> io::Result<()> {
        let Some(request) = self.clients.next_request(&mut self.io, id) else {
            return Ok(());
        };
        if self.faults.strike(control_name(&request)) {
            self.clients.close(id);
            return Ok(());
        }
        let mut out = Output::default();
        self.core.command(self.now(), id, request, &mut out);
        self.deliver(out)
    }

    fn deliver(&mut self, out: Output) -> io::Result<()> {
        if let Link::Up { queued, .. } = &mut self.link {
            out.channel
                .iter()
                .for_each(|reply| queued.extend_from_slice(&reply.encode()));
        }
        self.write_channel()?;
        let now = self.now().monotonic;
        for (id, replies) in out.clients {
            self.clients.answer(&mut self.io, id, replies, now);
            if self.clients.takes_more(id).is_none() {
                self.core.client_gone(id);
            }
        }
        Ok(())
    }

    fn channel_read(&mut self, done: Done<Token>) -> io::Result<()> {
        let Link::Up { file, .. } = &self.link else {
            return Ok(());
        };
        let file = Rc::clone(file);
        match done.result {
            Ok(1..) => {}
            Ok(0) => return self.link_lost("it ended"),
            Err(error) if is_temporary(&error) => return self.read_channel(&file, done.buffer),
            Err(error) => return self.link_lost(&format!("cannot read from it: {error}")),
        }
        let batch = match Request::decode_all(&done.buffer) {
            Ok(batch) => batch,
            Err(error) => return self.link_lost(&error.to_string()),
        };
        for request in &batch {
            if self.faults.strike(channel_name(&request.ask)) {
                return self.link_lost("as DDSNAP_ACTION asks");
            }
        }
        let mut out = Output::default();
        let now = self.now();
        self.core.requests(now, &batch, &mut out);
        if self.core.is_greeting() {
            let is_greeting =
                |request: &Request| matches!(request.ask, Ask::Identify { .. } | Ask::Gone { .. });
            if !batch.iter().all(is_greeting) || !has_requests(&file) {
                self.core.greeted(now, &mut out);
            }
        }
        self.deliver(out)?;
        self.read_channel(&file, done.buffer)
    }

    fn read_channel(&mut self, file: &Rc<OwnedFd>, mut buffer: Vec<u8>) -> io::Result<()> {
        if matches!(self.link, Link::Down { .. }) {
            return Ok(());
        }
        buffer.clear();
        buffer.reserve_exact(BATCH * REQUEST_BYTES);
        buffer.shrink_to(BATCH * REQUEST_BYTES);
        self.io.read(Token::ChannelRead, file, buffer)
    }

    /// Hands queued replies to the kernel, one write at a time so that their order stays.
    fn write_channel(&mut self) -> io::Result<()> {
        if let Link::Up {
            file,
            queued,
            writing,
            ..
        } = &mut self.link
        {
            if !*writing && !queued.is_empty() {
                *writing = true;
                let bytes = std::mem::take(queued);
                return self
                    .io
                    .write(Token::ChannelWrite(0), &Rc::clone(file), bytes, 0);
            }
        }
        Ok(())
    }

    fn channel_written(&mut self, from: usize, done: Done<Token>) -> io::Result<()> {
        let Link::Up { file, writing, .. } = &mut self.link else {
            return Ok(());
        };
        let file = Rc::clone(file);
        *writing = false;
        let written = match done.result {
            Ok(count) => count as usize,
            Err(error) if is_temporary(&error) => 0,
            Err(error) => return self.link_lost(&format!("cannot write to it: {error}")),
        };
        let from = from + written;
        if from < done.buffer.len() {
            *writing = true;
            return self
                .io
                .write(Token::ChannelWrite(from), &file, done.buffer, from);
        }
        self.write_channel()
    }

    /// Whether operations on the last channel's file still keep it open.
    fn is_closing(&self) -> bool {
        let on_channel = |token| matches!(token, Token::ChannelRead | Token::ChannelWrite(_));
        matches!(self.link, Link::Down { .. }) && self.io.is_flying(on_channel)
    }

    fn link_up(&mut self, channel: OwnedFd) -> io::Result<()> {
        let greeting = has_requests(&channel);
        let file = Rc::new(channel);
        let since = self.started.elapsed();
        self.link = Link::Up {
            file: Rc::clone(&file),
            queued: Vec::new(),
            writing: false,
            since,
        };
        self.down_logged = false;
        info!("attached to the kernel");
        let mut out = Output::default();
        self.core.attached(self.now(), greeting, &mut out);
        self.deliver(out)?;
        self.read_channel(&file, Vec::new())
    }

    fn link_absent(&mut self) -> io::Result<()> {
        if !self.down_logged {
            self.down_logged = true;
            warn!("{}; serving commands only until it is", LinkError::Absent);
        }
        self.link = Link::Down {
            retry_at: self.started.elapsed() + ABSENT_RETRY,
        };
        let mut out = Output::default();
        self.core.absent(self.now(), &mut out);
        self.deliver(out)
    }

    fn link_lost(&mut self, why: &str) -> io::Result<()> {
        let now = self.started.elapsed();
        if let Link::Up { since, .. } = self.link {
            if now.saturating_sub(since) >= STEADY {
                self.backoff = Backoff::default();
            }
        }
        error!("the kernel channel broke: {why}; attaching again");
        // The file is closed when the last operation on it has ended.
        self.link = Link::Down {
            retry_at: now + self.backoff.pause(),
        };
        self.core.lost();
        self.io.cancel(Token::ChannelRead)
    }

    fn reconnect(&mut self) -> io::Result<()> {
        match self.connect.connect() {
            Ok(channel) => self.link_up(channel),
            Err(LinkError::Absent) => self.link_absent(),
            Err(error) => {
                if !self.down_logged {
                    self.down_logged = true;
                    error!("{:#}; trying again", anyhow::Error::from(error));
                }
                // It is there, then: devices may be too.
                self.core.lost_sight();
                let retry_at = self.started.elapsed() + self.backoff.pause();
                self.link = Link::Down { retry_at };
                Ok(())
            }
        }
    }
}

fn is_temporary(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EINTR | Errno::EAGAIN))
}

#[cfg(test)]
mod tests;
