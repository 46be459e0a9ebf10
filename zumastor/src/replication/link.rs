// SPDX-License-Identifier: GPL-2.0-only
//! A connection between the two sides: frames in both directions, keep-alives, deadlines.
//!
//! Three threads go with each. One reads frames, so that what the other side says is heard while this one
//! is busy; extents wait for the batch that seals them, and their memory is bounded: who sends more than
//! was agreed on breaks the rules. One says "still there" when nothing else was said for a while. One cuts
//! the link when no byte came for too long, or when the other side takes none of what is said; it never
//! writes, so it is never held up. Bytes count and not frames: of a slow line a frame takes minutes.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use thiserror::Error;

use super::frame::{FrameError, FrameReader, FrameWriter, Kind};
use super::message::Message;
use super::wire::WireError;

/// Messages that may wait to be looked at.
const MOST_WAITING: usize = 1000;
/// How often who waits looks whether he still should.
pub const LOOK: Duration = Duration::from_millis(500);
/// How often who watches over the line looks, at least.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Bytes handed over at a time: a pipe takes all that it is given before it says so.
const PIECE: usize = 16 << 10;
/// How long who has cancelled waits for the other side: what it says makes no difference any more.
const CANCELLED_PATIENCE: Duration = Duration::from_secs(10);
/// What an extent takes beside its bytes, for whoever sends millions of short ones.
const EXTENT_ROOM: usize = 256;
/// No piece is being written.
const IDLE: u64 = u64::MAX;

/// How much of the room for extents one takes, in bytes.
#[must_use]
pub fn room_of(extent_bytes: usize) -> usize {
    extent_bytes + EXTENT_ROOM
}

/// The two directions of a connection.
pub struct Link {
    /// From the other side.
    pub reader: Box<dyn Read + Send>,
    /// To the other side; dropping it says that nothing more comes.
    pub writer: Box<dyn Write + Send>,
    /// Ends both at once, whatever is under way in them.
    pub cut: Arc<dyn Fn() + Send + Sync>,
    /// The other side has greeted. Who has not yet wants to hear a greeting first, and nothing else.
    pub greeted: bool,
}

/// How long silence may last.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// After so long without a word, say that one is still there.
    pub alive: Duration,
    /// After so long without a word from the other side it counts as gone.
    pub deadline: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Timing {
            alive: Duration::from_secs(10),
            deadline: Duration::from_secs(60),
        }
    }
}

/// Why a connection is of no more use.
#[derive(Debug, Error)]
pub enum LinkError {
    /// What came cannot be read.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// What came makes no sense.
    #[error("the other side said something that makes no sense: {0}")]
    Message(#[from] WireError),
    /// More came than was agreed on.
    #[error("the other side sends more than it may before it is acknowledged")]
    TooMuch,
    /// Nothing came.
    #[error("the other side was silent for {0} s")]
    Silent(u64),
    /// Nothing was taken.
    #[error("the other side took nothing of what it was sent for {0} s")]
    Stuck(u64),
    /// Nobody waits any more.
    #[error("it was cancelled")]
    Cancelled,
    /// It cannot be written to.
    #[error("the link failed")]
    Write(#[source] io::Error),
}

/// What came.
#[derive(Debug)]
pub enum Incoming {
    /// A message.
    Said(Message),
    /// An extent, as it is on the wire.
    Extent(Vec<u8>),
}

type Writer = FrameWriter<Speaking>;

/// When what happened last, in milliseconds since `start`.
struct Times {
    start: Instant,
    heard: AtomicU64,
    said: AtomicU64,
    /// When the piece that is being written was begun, or [`IDLE`].
    writing: AtomicU64,
}

impl Times {
    fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }

    fn note(&self, what: &AtomicU64) {
        what.store(self.now(), Ordering::Relaxed);
    }

    fn since(&self, then: &AtomicU64) -> Duration {
        match then.load(Ordering::Relaxed) {
            IDLE => Duration::ZERO,
            then => Duration::from_millis(self.now().saturating_sub(then)),
        }
    }
}

/// The way from the other side.
struct Hearing {
    reader: Box<dyn Read + Send>,
    times: Arc<Times>,
}

impl Read for Hearing {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.reader.read(into)?;
        self.times.note(&self.times.heard);
        Ok(count)
    }
}

/// The way to it.
struct Speaking {
    writer: Box<dyn Write + Send>,
    times: Arc<Times>,
}

impl Write for Speaking {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.times.note(&self.times.writing);
        let written = self.writer.write(&bytes[..bytes.len().min(PIECE)]);
        self.times.writing.store(IDLE, Ordering::Relaxed);
        self.times.note(&self.times.said);
        written
    }

    fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }
}

struct Shared {
    writer: Mutex<Option<Writer>>,
    times: Arc<Times>,
    /// Why the link was cut, in seconds: 0 if it was not for that.
    silent: AtomicU64,
    stuck: AtomicU64,
    /// Room that extents take which wait, and messages.
    waiting_bytes: AtomicUsize,
    waiting: AtomicUsize,
    /// How long the other side may be silent or take nothing, in milliseconds.
    deadline: AtomicU64,
    /// Nothing more will be heard.
    ended: AtomicBool,
    closing: Mutex<bool>,
    close: Condvar,
    cut: Arc<dyn Fn() + Send + Sync>,
}

impl Shared {
    fn deadline(&self) -> Duration {
        Duration::from_millis(self.deadline.load(Ordering::Relaxed))
    }

    /// Why the link was cut, if it was.
    fn why_cut(&self) -> Option<LinkError> {
        let silent = self.silent.load(Ordering::Relaxed);
        let stuck = self.stuck.load(Ordering::Relaxed);
        match (silent, stuck) {
            (0, 0) => None,
            (0, stuck) => Some(LinkError::Stuck(stuck)),
            (silent, _) => Some(LinkError::Silent(silent)),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An open connection.
pub struct Line {
    shared: Arc<Shared>,
    inbox: mpsc::Receiver<Result<Incoming, LinkError>>,
    threads: Vec<JoinHandle<()>>,
    /// When the last words have been waited for long enough.
    patience: Option<Instant>,
}

impl Line {
    /// Takes up a link on which extents may wait that take `most` bytes of room ([`room_of`]).
    ///
    /// # Errors
    /// No thread can be started.
    pub fn open(link: Link, timing: Timing, most: usize) -> io::Result<Line> {
        let times = Arc::new(Times {
            start: Instant::now(),
            heard: AtomicU64::new(0),
            said: AtomicU64::new(0),
            writing: AtomicU64::new(IDLE),
        });
        let writer = FrameWriter::new(Speaking {
            writer: link.writer,
            times: times.clone(),
        });
        let reader = Hearing {
            reader: link.reader,
            times: times.clone(),
        };
        let shared = Arc::new(Shared {
            writer: Mutex::new(Some(writer)),
            times,
            silent: AtomicU64::new(0),
            stuck: AtomicU64::new(0),
            waiting_bytes: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            deadline: AtomicU64::new(timing.deadline.as_millis() as u64),
            ended: AtomicBool::new(false),
            closing: Mutex::new(false),
            close: Condvar::new(),
            cut: link.cut,
        });
        let (sender, inbox) = mpsc::channel();
        let mut line = Line {
            shared: shared.clone(),
            inbox,
            threads: Vec::new(),
            patience: None,
        };
        let hears = shared.clone();
        let thread = thread::Builder::new().name("replication-in".into());
        line.threads.push(thread.spawn(move || {
            listen(&hears, reader, most, &sender);
            hears.ended.store(true, Ordering::Relaxed);
        })?);
        let (speaks, greeted) = (shared.clone(), link.greeted);
        let thread = thread::Builder::new().name("replication-alive".into());
        line.threads
            .push(thread.spawn(move || keep_alive(&speaks, timing, greeted))?);
        let thread = thread::Builder::new().name("replication-watch".into());
        line.threads
            .push(thread.spawn(move || keep_watch(&shared))?);
        Ok(line)
    }

    /// Says something; gives the bytes sent so far.
    ///
    /// # Errors
    /// The link failed.
    pub fn say(&self, message: &Message) -> Result<u64, LinkError> {
        self.send(message.kind(), &[&message.encode()])
    }

    /// Sends a frame; gives the bytes sent so far.
    ///
    /// # Errors
    /// The link failed.
    pub fn send(&self, kind: Kind, parts: &[&[u8]]) -> Result<u64, LinkError> {
        let mut writer = lock(&self.shared.writer);
        let writer = writer
            .as_mut()
            .ok_or_else(|| LinkError::Write(io::ErrorKind::BrokenPipe.into()))?;
        let sent = writer.send(kind, parts);
        sent.map_err(|error| {
            let cut = self.shared.why_cut();
            cut.unwrap_or(LinkError::Write(error))
        })?;
        Ok(writer.bytes())
    }

    /// The next thing that comes, unless it is `cancelled`.
    ///
    /// # Errors
    /// Nothing will.
    pub fn hear(&mut self, cancelled: &dyn Fn() -> bool) -> Result<Incoming, LinkError> {
        // The other thread cuts the link at the deadline, which ends the reading one.
        loop {
            match self.inbox.recv_timeout(LOOK) {
                Ok(came) => return self.taken(came),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(LinkError::Frame(FrameError::Ended));
                }
                Err(RecvTimeoutError::Timeout) if cancelled() => return Err(LinkError::Cancelled),
                // Heard of, but nothing for this side: still there.
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// What comes within `time`, if anything does.
    ///
    /// # Errors
    /// Nothing will.
    pub fn poll(&mut self, time: Duration) -> Result<Option<Incoming>, LinkError> {
        match self.inbox.recv_timeout(time) {
            Ok(came) => self.taken(came).map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(LinkError::Frame(FrameError::Ended)),
        }
    }

    /// Whether the other side has ended, or the line broke: for who is busy with something else. What was heard
    /// before waits.
    #[must_use]
    pub fn ended(&self) -> &AtomicBool {
        &self.shared.ended
    }

    /// From now on the other side has [`CANCELLED_PATIENCE`], if it had more.
    pub fn hurry(&self) {
        let patience = CANCELLED_PATIENCE.as_millis() as u64;
        self.shared.deadline.fetch_min(patience, Ordering::Relaxed);
    }

    /// What the other side says when the link is of no more use, until it has ended; for the deadline at most.
    pub fn last_words(&mut self) -> Option<Incoming> {
        let deadline = self.shared.deadline();
        let end = *self
            .patience
            .get_or_insert_with(|| Instant::now() + deadline);
        let left = end.checked_duration_since(Instant::now())?;
        self.poll(left).ok().flatten()
    }

    fn taken(&self, came: Result<Incoming, LinkError>) -> Result<Incoming, LinkError> {
        self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
        came.map_err(|error| self.shared.why_cut().unwrap_or(error))
    }

    /// Extents that took so much room need none any more.
    pub fn dealt_with(&self, room: usize) {
        self.shared.waiting_bytes.fetch_sub(room, Ordering::Relaxed);
    }

    /// Says that nothing more comes, and waits until the other side does, for the deadline at most: what
    /// was said last must arrive. What was waited for last words counts.
    pub fn close(self) {
        drop(lock(&self.shared.writer).take());
        let deadline = self.shared.deadline();
        let end = self.patience.unwrap_or_else(|| Instant::now() + deadline);
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            match self.inbox.recv_timeout(left) {
                Ok(Ok(Incoming::Extent(bytes))) => self.dealt_with(room_of(bytes.len())),
                Ok(Ok(Incoming::Said(_))) => {}
                Ok(Err(_)) | Err(_) => break,
            }
            self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        *lock(&self.shared.closing) = true;
        self.shared.close.notify_all();
        // Who is held up in writing has the writer until the link is cut.
        (self.shared.cut)();
        drop(lock(&self.shared.writer).take());
        for thread in self.threads.drain(..) {
            // A panic there has been reported.
            let _ = thread.join();
        }
    }
}

fn listen(
    shared: &Shared,
    reader: Hearing,
    most: usize,
    sender: &mpsc::Sender<Result<Incoming, LinkError>>,
) {
    let mut reader = FrameReader::new(reader);
    let mut payload = Vec::new();
    loop {
        let came = match reader.next(&mut payload) {
            Err(error) => Err(error.into()),
            Ok(Kind::Alive) => continue,
            Ok(Kind::Extent) => {
                let bytes = std::mem::take(&mut payload);
                let room = room_of(bytes.len());
                let before = shared.waiting_bytes.fetch_add(room, Ordering::Relaxed);
                if before + room > most {
                    Err(LinkError::TooMuch)
                } else {
                    Ok(Incoming::Extent(bytes))
                }
            }
            // Hashes are bounded as extents are: they are as long.
            Ok(Kind::Chunks)
                if shared
                    .waiting_bytes
                    .fetch_add(payload.len(), Ordering::Relaxed)
                    + payload.len()
                    > most =>
            {
                Err(LinkError::TooMuch)
            }
            Ok(kind) => Message::decode(kind, &payload)
                .map(Incoming::Said)
                .map_err(LinkError::Message),
        };
        let extent = matches!(came, Ok(Incoming::Extent(_)));
        let before = shared.waiting.fetch_add(1, Ordering::Relaxed);
        let came = match came {
            // Extents are bounded by their bytes.
            Ok(_) if before > MOST_WAITING && !extent => Err(LinkError::TooMuch),
            came => came,
        };
        let ended = came.is_err();
        if sender.send(came).is_err() || ended {
            return;
        }
    }
}

/// Waits for a part of `time`, of [`LONGEST_PAUSE`] at most; whether the line is closing.
fn pause(shared: &Shared, time: Duration) -> bool {
    let closing = lock(&shared.closing);
    let waited =
        shared
            .close
            .wait_timeout_while(closing, (time / 4).min(LONGEST_PAUSE), |closing| !*closing);
    *waited.unwrap_or_else(PoisonError::into_inner).0
}

fn keep_alive(shared: &Shared, timing: Timing, greeted: bool) {
    let times = &shared.times;
    while !pause(shared, timing.alive) {
        if times.since(&times.said) < timing.alive {
            continue;
        }
        // Who is writing says something anyway.
        if let Ok(mut writer) = shared.writer.try_lock() {
            // If the other side waits for it, the greeting comes first, however long it takes.
            let may = |writer: &&mut Writer| greeted || writer.bytes() > 0;
            if let Some(writer) = writer.as_mut().filter(may) {
                // If it fails, the others will notice.
                let _ = writer.send(Kind::Alive, &[]);
            }
            times.note(&times.said);
        }
    }
}

fn keep_watch(shared: &Shared) {
    let times = &shared.times;
    while !pause(shared, shared.deadline()) {
        let deadline = shared.deadline();
        for (last, why) in [
            (&times.heard, &shared.silent),
            (&times.writing, &shared.stuck),
        ] {
            let waited = times.since(last);
            if waited > deadline {
                why.store(waited.as_secs().max(1), Ordering::Relaxed);
                (shared.cut)();
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests;
