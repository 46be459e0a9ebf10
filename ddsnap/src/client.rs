// SPDX-License-Identifier: GPL-2.0-only
//! A connection to a volume's server: what the command line and `zumastor` command it with.
//!
//! Every call waits for the answer, but no longer than the connection's time limit.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use thiserror::Error;

use crate::protocol::address::{SocketName, SocketNameError};
use crate::protocol::codec::{CodecError, FrameReader};
use crate::protocol::control::{Reply, Request};
use crate::units::{ChunkRun, ChunkShift, Sectors, SnapTag};

pub use crate::protocol::control::{
    BadChunk, ChannelState, MANY, Row, Snapshot, SnapshotState, Status,
};
pub use crate::protocol::space::Level;

/// How long a call waits if nobody says otherwise: longer than the server's own limit for making a
/// snapshot, so that its reason is seen and not this one.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(60);

/// Why a call did not succeed.
#[derive(Debug, Error)]
pub enum ClientError {
    /// The socket's name is none.
    #[error("{socket:?} is not a socket name")]
    Name {
        /// As given.
        socket: String,
        /// What is wrong with it.
        source: SocketNameError,
    },
    /// Nobody answers there.
    #[error("cannot connect to the server at {socket}")]
    Connect {
        /// The server's control socket.
        socket: String,
        /// What the system says.
        source: io::Error,
    },
    /// The server understood and said no. Nothing was changed.
    #[error("{reason} ({})", Errno::from_raw(*errno).desc())]
    Refused {
        /// A positive errno.
        errno: i32,
        /// Half a sentence: what follows "because".
        reason: String,
    },
    /// The answer makes no sense.
    #[error("the server at {socket} sent an answer that makes no sense: {what}")]
    Protocol {
        /// The server's control socket.
        socket: String,
        /// What is wrong with it.
        what: String,
    },
    /// No answer in time. Whether the command was carried out is not known.
    #[error("the server at {socket} did not answer within {seconds} s")]
    Timeout {
        /// The server's control socket.
        socket: String,
        /// The time limit in seconds.
        seconds: u64,
    },
    /// The connection broke before the answer. Whether the command was carried out is not known.
    #[error("the server at {socket} went away before it answered")]
    Lost {
        /// The server's control socket.
        socket: String,
        /// What the system says.
        source: io::Error,
    },
}

impl ClientError {
    /// The errno of a refusal.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        match self {
            ClientError::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }

    /// Whether nobody listens on the socket.
    #[must_use]
    pub fn is_connect(&self) -> bool {
        matches!(self, ClientError::Connect { .. })
    }
}

/// What the status table shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// The store as a whole.
    pub status: Status,
    /// Each chunk once, by how many others share it: as [`Row::shared_with`].
    pub totals: Vec<(u32, u64)>,
    /// Oldest snapshot first.
    pub rows: Vec<Row>,
}

/// Sizes asked for, in bytes; none: as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NewSizes {
    /// Of the origin.
    pub origin: Option<u64>,
    /// Of the snapshot store's device.
    pub store: Option<u64>,
    /// Of the metadata's device.
    pub meta: Option<u64>,
}

/// Sizes in bytes after a resize.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resized {
    /// Of the origin.
    pub origin: u64,
    /// Of the snapshot store's device.
    pub store: u64,
    /// Of the metadata's device; the store's, if it is that.
    pub meta: u64,
    /// Why nothing was changed; none if it was.
    pub refused: Option<String>,
}

/// A list of changed chunks that a server is making. Not read to its end it spoils the connection.
#[derive(Debug)]
pub struct Changelist<'a> {
    client: &'a mut Client,
    /// Chunk size.
    pub chunk: ChunkShift,
    /// Length of the first snapshot; 0 if there is none.
    pub from: Sectors,
    /// Length of the second.
    pub to: Sectors,
    ended: bool,
}

impl Changelist<'_> {
    /// The next chunks, in growing order; none at the end. `progress` hears now and then how many bytes
    /// of how many the server has looked at.
    ///
    /// # Errors
    /// Refused with `EIO`: a snapshot was squashed meanwhile, or the store is broken; or the connection's
    /// errors.
    pub fn next_runs(
        &mut self,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Option<Vec<ChunkRun>>> {
        while !self.ended {
            match self.client.receive()? {
                Reply::Progress { done, total } => progress(done, total),
                Reply::Changes { last, runs } => {
                    self.ended = last;
                    return Ok(Some(runs));
                }
                other => return Err(self.client.unexpected(&other)),
            }
        }
        Ok(None)
    }
}

/// The result of a call.
pub type Result<T> = std::result::Result<T, ClientError>;

/// A connection to the server of one volume.
///
/// After an error other than [`ClientError::Refused`] make a new one.
#[derive(Debug)]
pub struct Client {
    socket: String,
    stream: UnixStream,
    reader: FrameReader,
    timeout: Duration,
}

impl Client {
    /// Connects to the control socket `socket`: a path, or `@name` for an abstract one.
    ///
    /// # Errors
    /// [`ClientError::Name`] or [`ClientError::Connect`].
    pub fn connect(socket: &str) -> Result<Client> {
        Self::connect_within(socket, DEFAULT_TIMEOUT)
    }

    /// As [`connect`](Self::connect), with a time limit for it and each later call.
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    pub fn connect_within(socket: &str, timeout: Duration) -> Result<Client> {
        let name: SocketName = socket.parse().map_err(|source| ClientError::Name {
            socket: socket.to_owned(),
            source,
        })?;
        let stream = name
            .connect(timeout)
            .map_err(|source| ClientError::Connect {
                socket: socket.to_owned(),
                source,
            })?;
        let reader = FrameReader::default();
        Ok(Client {
            socket: socket.to_owned(),
            stream,
            reader,
            timeout,
        })
    }

    /// Changes the time limit of each later call.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Client {
        self.timeout = timeout;
        self
    }

    /// Makes a snapshot of the origin as it is now; durable on return.
    ///
    /// # Errors
    /// Refused with `EEXIST` (the tag is taken), `ENOSPC` (too many snapshots), `ETIMEDOUT` (writes
    /// in flight did not end) or `EIO` (the store is broken); or the connection's errors.
    pub fn create(&mut self, tag: SnapTag) -> Result<()> {
        match self.call(Request::Create(tag))? {
            Reply::Created => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Makes a bookmark of the origin as it is now; durable on return.
    ///
    /// # Errors
    /// As of [`create`](Self::create).
    pub fn create_bookmark(&mut self, tag: SnapTag) -> Result<()> {
        match self.call(Request::CreateBookmark(tag))? {
            Reply::BookmarkCreated => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Has a snapshot become a bookmark; durable on return. Its space becomes free by and by. One that is a
    /// bookmark already stays one.
    ///
    /// # Errors
    /// Refused with `ENOENT`, `EBUSY` (its use count is not 0) or `EIO` (it is squashed, or the store is broken);
    /// or the connection's errors.
    pub fn turn_to_bookmark(&mut self, tag: SnapTag) -> Result<()> {
        match self.call(Request::ToBookmark(tag))? {
            Reply::IsBookmark => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Sets whether a snapshot becomes a bookmark when it is given up for room, instead of vanishing; durable on
    /// return.
    ///
    /// # Errors
    /// Refused with `ENOENT`, `EINVAL` (it is a bookmark) or `EIO` (it is squashed, or the store is broken); or
    /// the connection's errors.
    pub fn set_to_bookmark(&mut self, tag: SnapTag, to_bookmark: bool) -> Result<()> {
        match self.call(Request::WhenFull(tag, to_bookmark))? {
            Reply::WhenFull(set) if set == to_bookmark => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Deletes a snapshot or bookmark; durable on return. Its space becomes free by and by.
    ///
    /// # Errors
    /// Refused with `ENOENT` or `EBUSY` (its use count is not 0); or the connection's errors.
    pub fn delete(&mut self, tag: SnapTag) -> Result<()> {
        match self.call(Request::Delete(tag))? {
            Reply::Deleted => Ok(()),
            other => Err(self.unexpected(&other)),
        }
    }

    /// All snapshots, oldest first.
    ///
    /// # Errors
    /// The connection's errors.
    pub fn list(&mut self) -> Result<Vec<Snapshot>> {
        let mut all = Vec::new();
        self.send(Request::List)?;
        loop {
            match self.receive()? {
                Reply::Snapshots { last, snapshots } => {
                    all.extend(snapshots);
                    if last {
                        return Ok(all);
                    }
                }
                other => return Err(self.unexpected(&other)),
            }
        }
    }

    /// The store's state, as far as it need not be counted.
    ///
    /// # Errors
    /// The connection's errors.
    pub fn status(&mut self) -> Result<Status> {
        match self.call(Request::Status)? {
            Reply::Status(status) => Ok(status),
            other => Err(self.unexpected(&other)),
        }
    }

    /// The store's state and what each snapshot uses of it. The server counts that, which takes seconds
    /// for tens of millions of chunks; `progress` is told every second how many index entries were looked
    /// at, and of about how many. The time limit is for each such word of the server.
    ///
    /// # Errors
    /// Refused with `EIO` (the index cannot be read); or the connection's errors.
    pub fn usage(&mut self, progress: &mut dyn FnMut(u64, u64)) -> Result<Usage> {
        let mut usage = match self.call_long(Request::Usage, progress)? {
            Reply::Usage { status, totals } => Usage {
                status,
                totals,
                rows: Vec::new(),
            },
            other => return Err(self.unexpected(&other)),
        };
        loop {
            match self.receive()? {
                Reply::Rows { last, rows } => {
                    usage.rows.extend(rows);
                    if last {
                        return Ok(usage);
                    }
                }
                other => return Err(self.unexpected(&other)),
            }
        }
    }

    /// Length in sectors of the origin (`None`) or of a snapshot: what its table line must say.
    ///
    /// # Errors
    /// Refused with `ENOENT`; or the connection's errors.
    pub fn size(&mut self, tag: Option<SnapTag>) -> Result<u64> {
        match self.call(Request::Sectors(tag))? {
            Reply::Sectors(sectors) => Ok(sectors),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Whether a snapshot's data is there; `None` if there is no such snapshot.
    ///
    /// # Errors
    /// The connection's errors.
    pub fn state(&mut self, tag: SnapTag) -> Result<Option<SnapshotState>> {
        match self.call(Request::State(tag)) {
            Ok(Reply::State(state)) => Ok(Some(state)),
            Ok(other) => Err(self.unexpected(&other)),
            Err(ClientError::Refused { errno, .. }) if errno == Errno::ENOENT as i32 => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// Sets how dearly a snapshot is kept when the store is full; gives back what was set.
    ///
    /// # Errors
    /// Refused with `ENOENT`; or the connection's errors.
    pub fn set_priority(&mut self, tag: SnapTag, priority: i8) -> Result<i8> {
        match self.call(Request::Priority(tag, priority))? {
            Reply::Priority(priority) => Ok(priority),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Adds `delta` to a snapshot's persistent use count and gives back the whole count: persistent
    /// and devices. A `delta` of 0 only asks.
    ///
    /// # Errors
    /// Refused with `ENOENT` or `EINVAL` (the count would leave 0 to 65,535); or the connection's
    /// errors.
    pub fn adjust_usecount(&mut self, tag: SnapTag, delta: i32) -> Result<u32> {
        match self.call(Request::UseCount(tag, delta))? {
            Reply::UseCount(count) => Ok(count),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Changes sizes; durable on return. `progress` hears now and then how many bytes of how many have
    /// been dealt with. There is no limit to the time it takes, but the server must go on telling.
    ///
    /// # Errors
    /// Refused with `EINVAL` (store and metadata share a device and are to have two sizes), `EBUSY` or
    /// `EIO`; or the connection's errors.
    pub fn resize(
        &mut self,
        request: &NewSizes,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Resized> {
        let NewSizes {
            origin,
            store,
            meta,
        } = *request;
        let reply = self.call_long(
            Request::Resize {
                origin,
                store,
                meta,
            },
            progress,
        )?;
        match reply {
            Reply::Resized {
                origin,
                store,
                meta,
                refused,
            } => Ok(Resized {
                origin,
                store,
                meta,
                refused: Some(refused).filter(|refused| !refused.is_empty()),
            }),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Begins the list of the chunks that differ between two snapshots; without `from`, of all chunks of
    /// `to`. `from` may be a bookmark. Neither can be deleted before the list has ended or this connection is
    /// closed.
    ///
    /// # Errors
    /// Refused with `ENOENT`, `EINVAL` (`to` is a bookmark) or `EIO` (squashed, a doubtful `from`, or the store is
    /// broken); or the connection's errors.
    pub fn changelist(&mut self, from: Option<SnapTag>, to: SnapTag) -> Result<Changelist<'_>> {
        match self.call(Request::Changelist { from, to })? {
            Reply::Changelist { chunk, from, to } => Ok(Changelist {
                client: self,
                chunk,
                from,
                to,
                ended: false,
            }),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Has the server write the index of origin chunks `first` to `last` to its log; gives the number of
    /// entries.
    ///
    /// # Errors
    /// Refused with `EBUSY` (another dump is under way) or `EIO`; or the connection's errors.
    pub fn dump(&mut self, first: u64, last: u64) -> Result<u64> {
        match self.call_long(Request::DumpTree { first, last }, &mut |_, _| {})? {
            Reply::Dumped { entries } => Ok(entries),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Gives the origin the content of a snapshot; durable on return. Gives back how many chunks could not
    /// be read and are as they were. `progress` as in [`resize`](Self::resize). If the connection ends
    /// before, the revert goes on, unless the snapshot was still being checked.
    ///
    /// # Errors
    /// Refused with `ENOENT`, `EBUSY` (a snapshot has a device, another long command is under way),
    /// `EINVAL` (the snapshot is longer than the origin), `ENOSPC` or `EIO`; or the connection's errors.
    pub fn revert(&mut self, tag: SnapTag, progress: &mut dyn FnMut(u64, u64)) -> Result<u64> {
        match self.call_long(Request::Revert(tag), progress)? {
            Reply::Reverted { skipped } => Ok(skipped),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Has the server read all that snapshots have in the store, at `rate` bytes a second (0: as fast as it
    /// goes). Gives back how many bytes it read and how many bad chunks it found. Ends if the
    /// connection does.
    ///
    /// # Errors
    /// Refused with `EBUSY` (another scrub is under way) or `EIO` (the index cannot be read); or the
    /// connection's errors.
    pub fn scrub(
        &mut self,
        rate: u64,
        progress: &mut dyn FnMut(u64, u64),
        found: &mut dyn FnMut(BadChunk),
    ) -> Result<(u64, u64)> {
        self.send(Request::Scrub(rate))?;
        loop {
            match self.receive()? {
                Reply::Progress { done, total } => progress(done, total),
                Reply::BadChunks(chunks) => chunks.into_iter().for_each(&mut *found),
                Reply::Scrubbed { bytes, bad } => return Ok((bytes, bad)),
                other => return Err(self.unexpected(&other)),
            }
        }
    }

    /// A call whose answer may be long in coming.
    fn call_long(&mut self, request: Request, progress: &mut dyn FnMut(u64, u64)) -> Result<Reply> {
        self.send(request)?;
        loop {
            match self.receive()? {
                Reply::Progress { done, total } => progress(done, total),
                reply => return Ok(reply),
            }
        }
    }

    fn call(&mut self, request: Request) -> Result<Reply> {
        self.send(request)?;
        self.receive()
    }

    fn send(&mut self, request: Request) -> Result<()> {
        let sent = self
            .stream
            .set_write_timeout(Some(self.timeout))
            .and_then(|()| self.stream.write_all(&request.to_frame().encode()));
        sent.map_err(|source| self.broken(source))
    }

    /// One message; a refusal becomes an error. The time limit is for the whole of it.
    fn receive(&mut self) -> Result<Reply> {
        let deadline = Instant::now() + self.timeout;
        let frame = loop {
            if let Some(frame) = self
                .reader
                .next_frame()
                .map_err(|error| self.nonsense(&error))?
            {
                break frame;
            }
            let mut part = [0; 8192];
            match self.read_before(deadline, &mut part) {
                Ok(0) => return Err(self.broken(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => self.reader.extend(&part[..count]),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(error)),
            }
        };
        match Reply::from_frame(&frame).map_err(|error| self.nonsense(&error))? {
            Reply::Error { errno, reason } => Err(ClientError::Refused { errno, reason }),
            reply => Ok(reply),
        }
    }

    fn read_before(&mut self, deadline: Instant, part: &mut [u8]) -> io::Result<usize> {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(part)
    }

    fn broken(&self, source: io::Error) -> ClientError {
        let socket = self.socket.clone();
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => ClientError::Timeout {
                socket,
                seconds: self.timeout.as_secs(),
            },
            _ => ClientError::Lost { socket, source },
        }
    }

    fn nonsense(&self, error: &CodecError) -> ClientError {
        ClientError::Protocol {
            socket: self.socket.clone(),
            what: error.to_string(),
        }
    }

    fn unexpected(&self, reply: &Reply) -> ClientError {
        let what = format!(
            "an answer to another question (code {:#06x})",
            reply.to_frame().code
        );
        ClientError::Protocol {
            socket: self.socket.clone(),
            what,
        }
    }
}
