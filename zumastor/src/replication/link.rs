// SPDX-License-Identifier: GPL-2.0-only
//! A connection between the two sides: frames in both directions, keep-alives, deadlines.
//!
//! Three threads go with each. One reads frames, so that what the other side says is heard while this one
//! is busy; extents wait for the batch that seals them, and their memory is bounded: who sends more than
//! was agreed on breaks the rules. One says "still there" when nothing else was said for a while. One cuts
//! the link when the other side is silent for too long; it never writes, so it is never held up.

use std::io::{self, Read, Write};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
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
const LOOK: Duration = Duration::from_millis(500);

/// The two directions of a connection.
pub struct Link {
    /// From the other side.
    pub reader: Box<dyn Read + Send>,
    /// To the other side; dropping it says that nothing more comes.
    pub writer: Box<dyn Write + Send>,
    /// Ends both at once, whatever is under way in them.
    pub cut: Arc<dyn Fn() + Send + Sync>,
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

type Writer = FrameWriter<Box<dyn Write + Send>>;

struct Shared {
    writer: Mutex<Option<Writer>>,
    start: Instant,
    /// Milliseconds since `start`.
    heard: AtomicU64,
    said: AtomicU64,
    silent: AtomicU64,
    /// Bytes of extents that wait, and messages.
    waiting_bytes: AtomicUsize,
    waiting: AtomicUsize,
    closing: Mutex<bool>,
    close: Condvar,
    cut: Arc<dyn Fn() + Send + Sync>,
}

impl Shared {
    fn now(&self) -> u64 {
        self.start.elapsed().as_millis() as u64
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// An open connection.
pub struct Line {
    shared: Arc<Shared>,
    inbox: mpsc::Receiver<Result<Incoming, LinkError>>,
    timing: Timing,
    threads: Vec<JoinHandle<()>>,
}

impl Line {
    /// Takes up a link on which `most` bytes of extents may wait.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn open(link: Link, timing: Timing, most: usize) -> io::Result<Line> {
        let shared = Arc::new(Shared {
            writer: Mutex::new(Some(FrameWriter::new(link.writer))),
            start: Instant::now(),
            heard: AtomicU64::new(0),
            said: AtomicU64::new(0),
            silent: AtomicU64::new(0),
            waiting_bytes: AtomicUsize::new(0),
            waiting: AtomicUsize::new(0),
            closing: Mutex::new(false),
            close: Condvar::new(),
            cut: link.cut,
        });
        let (sender, inbox) = mpsc::channel();
        let mut line = Line {
            shared: shared.clone(),
            inbox,
            timing,
            threads: Vec::new(),
        };
        let reader = link.reader;
        let hears = shared.clone();
        let thread = thread::Builder::new().name("replication-in".into());
        line.threads
            .push(thread.spawn(move || listen(&hears, reader, most, &sender))?);
        let speaks = shared.clone();
        let thread = thread::Builder::new().name("replication-alive".into());
        line.threads
            .push(thread.spawn(move || keep_alive(&speaks, timing))?);
        let thread = thread::Builder::new().name("replication-watch".into());
        line.threads
            .push(thread.spawn(move || keep_watch(&shared, timing))?);
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
        writer.send(kind, parts).map_err(LinkError::Write)?;
        self.shared.said.store(self.shared.now(), Ordering::Relaxed);
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

    /// What came already, if anything did.
    ///
    /// # Errors
    /// Nothing will.
    pub fn poll(&mut self) -> Result<Option<Incoming>, LinkError> {
        match self.inbox.try_recv() {
            Ok(came) => self.taken(came).map(Some),
            Err(_) => Ok(None),
        }
    }

    fn taken(&self, came: Result<Incoming, LinkError>) -> Result<Incoming, LinkError> {
        self.shared.waiting.fetch_sub(1, Ordering::Relaxed);
        let silent = self.shared.silent.load(Ordering::Relaxed);
        match came {
            Err(_) if silent > 0 => Err(LinkError::Silent(silent)),
            came => came,
        }
    }

    /// Extents of so many bytes need no room any more.
    pub fn dealt_with(&self, bytes: usize) {
        self.shared
            .waiting_bytes
            .fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Says that nothing more comes, and waits until the other side does, for the deadline at most: what
    /// was said last must arrive.
    pub fn close(self) {
        drop(lock(&self.shared.writer).take());
        let end = Instant::now() + self.timing.deadline;
        while let Some(left) = end.checked_duration_since(Instant::now()) {
            match self.inbox.recv_timeout(left) {
                Ok(Ok(Incoming::Extent(bytes))) => self.dealt_with(bytes.len()),
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
    reader: Box<dyn Read + Send>,
    most: usize,
    sender: &mpsc::Sender<Result<Incoming, LinkError>>,
) {
    let mut reader = FrameReader::new(reader);
    let mut payload = Vec::new();
    loop {
        let came = match reader.next(&mut payload) {
            Err(error) => Err(error.into()),
            Ok(kind) => {
                shared.heard.store(shared.now(), Ordering::Relaxed);
                match kind {
                    Kind::Alive => continue,
                    Kind::Extent => {
                        let bytes = std::mem::take(&mut payload);
                        let before = shared
                            .waiting_bytes
                            .fetch_add(bytes.len(), Ordering::Relaxed);
                        if before + bytes.len() > most {
                            Err(LinkError::TooMuch)
                        } else {
                            Ok(Incoming::Extent(bytes))
                        }
                    }
                    kind => Message::decode(kind, &payload)
                        .map(Incoming::Said)
                        .map_err(LinkError::Message),
                }
            }
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

/// Waits for a part of `time`; whether the line is closing.
fn pause(shared: &Shared, time: Duration) -> bool {
    let closing = lock(&shared.closing);
    let waited = shared
        .close
        .wait_timeout_while(closing, time / 4, |closing| !*closing);
    *waited.unwrap_or_else(PoisonError::into_inner).0
}

fn since(shared: &Shared, then: &AtomicU64) -> Duration {
    let then = then.load(Ordering::Relaxed);
    Duration::from_millis(shared.now().saturating_sub(then))
}

fn keep_alive(shared: &Shared, timing: Timing) {
    while !pause(shared, timing.alive) {
        if since(shared, &shared.said) < timing.alive {
            continue;
        }
        // Who is writing says something anyway.
        if let Ok(mut writer) = shared.writer.try_lock() {
            // The greeting comes first, however long it takes.
            if let Some(writer) = writer.as_mut().filter(|writer| writer.bytes() > 0) {
                // If it fails, the others will notice.
                let _ = writer.send(Kind::Alive, &[]);
            }
            shared.said.store(shared.now(), Ordering::Relaxed);
        }
    }
}

fn keep_watch(shared: &Shared, timing: Timing) {
    while !pause(shared, timing.deadline) {
        let silence = since(shared, &shared.heard);
        if silence > timing.deadline {
            let seconds = silence.as_secs().max(1);
            shared.silent.store(seconds, Ordering::Relaxed);
            (shared.cut)();
            return;
        }
    }
}
