// SPDX-License-Identifier: GPL-2.0-only
//! The connections of clients: bytes in, requests out; replies in, bytes out.
//!
//! Each client has at most one request under way and one frame encoded, so what a client can make the
//! server hold is bounded, and a slow one holds up nobody but itself.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{Shutdown, shutdown};
use tracing::{debug, warn};

use super::core::ClientId;
use super::refusal;
use super::ring::Token;
use crate::protocol::address::peer_is_trusted;
use crate::protocol::codec::{CodecError, FrameReader};
use crate::protocol::control::{Reply, Request};

type Io = super::io::Io<Token>;

/// Connections at a time. One more, and the one that has been idle longest is closed.
pub const MAX_CLIENTS: usize = 64;
/// A client that takes nothing of its answer for so long is closed.
pub const STALLED: Duration = Duration::from_secs(60);
/// Bytes read from a client at a time.
const READ_BYTES: usize = 4096;

struct Client {
    file: Rc<OwnedFd>,
    reader: FrameReader,
    /// Its request is being carried out, or its answer is not all sent.
    busy: bool,
    outgoing: VecDeque<Reply>,
    /// More of the answer is still to come.
    unfinished: bool,
    /// A frame is being written.
    sending: bool,
    /// Closed when what is outgoing has been sent.
    closing: bool,
    /// When something last happened.
    active: Duration,
}

/// All connections.
#[derive(Default)]
pub struct Clients {
    open: BTreeMap<ClientId, Client>,
    next: u64,
}

impl Clients {
    /// Takes a new connection. Gives back the client that had to go for it, if any.
    pub fn accept(&mut self, io: &mut Io, file: OwnedFd, now: Duration) -> Option<ClientId> {
        match peer_is_trusted(&file) {
            Ok(true) => {}
            Ok(false) => {
                warn!("refused a connection from another user");
                return None;
            }
            Err(error) => {
                warn!("refused a connection: cannot tell whose it is: {error}");
                return None;
            }
        }
        let evicted = if self.open.len() >= MAX_CLIENTS {
            self.evict()
        } else {
            None
        };
        if self.open.len() >= MAX_CLIENTS {
            warn!("refused a connection: all {MAX_CLIENTS} are busy");
            return None;
        }
        let id = ClientId(self.next);
        self.next += 1;
        let client = Client {
            file: Rc::new(file),
            reader: FrameReader::default(),
            busy: false,
            outgoing: VecDeque::new(),
            unfinished: false,
            sending: false,
            closing: false,
            active: now,
        };
        self.open.insert(id, client);
        self.read_more(io, id);
        evicted
    }

    fn evict(&mut self) -> Option<ClientId> {
        let idle = self.open.iter().filter(|(_, client)| !client.busy);
        let (&id, _) = idle.min_by_key(|(_, client)| client.active)?;
        debug!("closing the connection that was idle longest");
        self.close(id);
        Some(id)
    }

    /// A read ended. Gives back whether the client is still there.
    pub fn has_read(
        &mut self,
        id: ClientId,
        result: &io::Result<u32>,
        bytes: &[u8],
        now: Duration,
    ) -> bool {
        let Some(client) = self.open.get_mut(&id) else {
            return false;
        };
        match result {
            Ok(0) | Err(_) => {
                self.close(id);
                false
            }
            Ok(_) => {
                client.active = now;
                client.reader.extend(bytes);
                true
            }
        }
    }

    /// The client's next request, if it is complete and its turn. It is busy until it is answered.
    pub fn next_request(&mut self, io: &mut Io, id: ClientId) -> Option<Request> {
        let client = self.open.get_mut(&id)?;
        if client.busy || client.closing {
            return None;
        }
        match client.reader.next_frame() {
            Ok(Some(frame)) => {
                client.busy = true;
                self.read_more(io, id);
                match Request::from_frame(&frame) {
                    Ok(request) => return Some(request),
                    Err(error) => self.complain(io, id, &error, false),
                }
            }
            Ok(None) => self.read_more(io, id),
            Err(error) => self.complain(io, id, &error, true),
        }
        None
    }

    /// Tells the client what is wrong with its message, and closes if the next one cannot be found.
    fn complain(&mut self, io: &mut Io, id: ClientId, error: &CodecError, close: bool) {
        debug!("a client sent nonsense: {error}");
        if let Some(client) = self.open.get_mut(&id) {
            client.busy = true;
            client.closing = close;
        }
        let active = self
            .open
            .get(&id)
            .map_or(Duration::ZERO, |client| client.active);
        let reply = refusal::with_errno(Errno::EPROTO, error.to_string());
        self.answer(io, id, vec![reply], active);
    }

    /// Sends an answer, or the next part of one. A client that has gone is of no matter; one that has
    /// not taken the last part yet is not told of mere progress.
    pub fn answer(&mut self, io: &mut Io, id: ClientId, replies: Vec<Reply>, now: Duration) {
        let Some(client) = self.open.get_mut(&id) else {
            return;
        };
        let slow = client.sending || !client.outgoing.is_empty();
        if slow && matches!(replies[..], [Reply::Progress { .. }]) {
            return;
        }
        client.unfinished = !replies.last().is_none_or(Reply::is_last);
        client.outgoing.extend(replies);
        if !client.sending {
            client.active = now;
            self.send_more(io, id);
        }
    }

    /// A write ended. Gives back whether the whole answer has been sent and the client may ask again.
    pub fn has_written(
        &mut self,
        io: &mut Io,
        id: ClientId,
        result: &io::Result<u32>,
        buffer: Vec<u8>,
        sent_before: usize,
        now: Duration,
    ) -> bool {
        let Some(client) = self.open.get_mut(&id) else {
            return false;
        };
        let count = match result {
            Ok(count) if *count > 0 => *count as usize,
            _ => {
                self.close(id);
                return false;
            }
        };
        client.active = now;
        client.sending = false;
        let sent = sent_before + count;
        if sent < buffer.len() {
            self.send(io, id, buffer, sent);
            return false;
        }
        if client.outgoing.is_empty() {
            if client.unfinished {
                return false;
            }
            client.busy = false;
            if client.closing {
                self.close(id);
                return false;
            }
            return true;
        }
        self.send_more(io, id);
        false
    }

    /// Whether the client has taken all that was given it of an answer of which more is to come; none
    /// if there is no such client.
    #[must_use]
    pub fn takes_more(&self, id: ClientId) -> Option<bool> {
        let client = self.open.get(&id)?;
        Some(client.unfinished && !client.sending && client.outgoing.is_empty())
    }

    /// When [`close_stalled`](Self::close_stalled) is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        self.sending()
            .map(|(_, client)| client.active + STALLED)
            .min()
    }

    /// Closes clients that do not take their answer. Their numbers are given back.
    pub fn close_stalled(&mut self, now: Duration) -> Vec<ClientId> {
        let stalled: Vec<ClientId> = self
            .sending()
            .filter(|(_, client)| client.active + STALLED <= now)
            .map(|(&id, _)| id)
            .collect();
        for id in &stalled {
            warn!(
                "closing a connection that took no answer for {} s",
                STALLED.as_secs()
            );
            self.close(*id);
        }
        stalled
    }

    /// Closes one connection.
    pub fn close(&mut self, id: ClientId) {
        if let Some(client) = self.open.remove(&id) {
            // A read or write under way keeps the file open until it ends, which this makes it do.
            let _ = shutdown(client.file.as_raw_fd(), Shutdown::Both);
        }
    }

    fn sending(&self) -> impl Iterator<Item = (&ClientId, &Client)> {
        self.open.iter().filter(|(_, client)| client.sending)
    }

    /// A read is always under way while nothing of the client's waits to be looked at, so that its
    /// going away is noticed even while it waits for an answer.
    pub fn read_more(&mut self, io: &mut Io, id: ClientId) {
        let Some(client) = self.open.get(&id) else {
            return;
        };
        if client.busy && client.reader.is_midway()
            || io.is_flying(|token| token == Token::ClientRead(id))
        {
            return;
        }
        let file = Rc::clone(&client.file);
        self.check(
            id,
            io.read(Token::ClientRead(id), &file, Vec::with_capacity(READ_BYTES)),
        );
    }

    fn send_more(&mut self, io: &mut Io, id: ClientId) {
        let reply = self
            .open
            .get_mut(&id)
            .and_then(|client| client.outgoing.pop_front());
        if let Some(reply) = reply {
            self.send(io, id, reply.to_frame().encode(), 0);
        }
    }

    fn send(&mut self, io: &mut Io, id: ClientId, bytes: Vec<u8>, from: usize) {
        let Some(client) = self.open.get_mut(&id) else {
            return;
        };
        client.sending = true;
        let file = Rc::clone(&client.file);
        self.check(
            id,
            io.write(Token::ClientWrite(id, from), &file, bytes, from),
        );
    }

    fn check(&mut self, id: ClientId, started: io::Result<()>) {
        if let Err(error) = started {
            warn!("closing a connection: {error}");
            self.close(id);
        }
    }
}
