// SPDX-License-Identifier: GPL-2.0-only
//! The two ends of a stream that compares: both read one snapshot that both have, and nothing is written.
//!
//! The sender says the sum of each region, in order, a few ahead of the answers; so both sides read at the
//! same time. The receiver says whether its own is the same. Where it is not, it first says the hashes of
//! the region's chunks, in pieces, and the sender reads them again and knows which chunks differ. A region
//! costs 32 bytes on the way, and one that differs 32 for each chunk.

use std::time::Duration;

use anyhow::{Result, anyhow};
use ddsnap::units::{Chunk, ChunkRun, ChunkShift, Sectors};

use super::decide::{Refusal, comparable};
use super::extent::EXTENT_BYTES;
use super::link::{Incoming, Line, Link, LinkError, Timing, room_of};
use super::message::{Hello, MAX_HASHES, MAX_SHOWN, Message, SEND_AGAIN};
use super::send::sentence;
use super::standing::Held;
use super::sums::{Root, Sums, chunk_hash, region_chunks};
use super::volume::Watch;

/// Regions that may be without an answer.
pub const WINDOW: u64 = 4;
/// The most differing runs that are kept. Where there are more, the last one covers what lies between.
pub const MAX_KEPT: usize = 65_536;
/// The most bytes of hashes under way: those of so many regions, in the smallest chunks.
const WINDOW_BYTES: usize = WINDOW as usize * ((32 << 17) + 8 * HASHES_HEAD);
/// What a message of hashes has before them.
const HASHES_HEAD: usize = 12;

/// A volume whose snapshots can be read. Reads give what there is: fewer bytes at the end.
pub trait Readable {
    /// Gets ready to read a snapshot, in chunks of the sender, from the disk and not from a cache.
    ///
    /// # Errors
    /// It is gone, or cannot be read.
    fn open(&mut self, snapshot: &Held, chunk: ChunkShift) -> Result<()>;
    /// What it has of `run`.
    ///
    /// # Errors
    /// It cannot be read.
    fn read(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()>;
    /// Notes durably that these runs of chunks are to be sent again. Nobody was told yet.
    ///
    /// # Errors
    /// It cannot be written.
    fn note_again(&mut self, chunk: ChunkShift, runs: &[ChunkRun]) -> Result<()>;
}

/// What came of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Both sides have the same bytes.
    Equal {
        /// Of this snapshot, as the sender has it.
        snapshot: Held,
        /// Its sums, as they were read.
        sums: Sums,
    },
    /// They do not.
    Differs {
        /// Of this snapshot, as the sender has it.
        snapshot: Held,
        /// In so many chunks.
        chunks: u64,
        /// The runs, ascending: all of them on the sending side, the first [`MAX_SHOWN`] on the other.
        runs: Vec<ChunkRun>,
        /// The sender's chunks, in which all this is counted.
        chunk: ChunkShift,
        /// Whoever began wants them sent again.
        send_again: bool,
    },
    /// This side or the other said no.
    Refused {
        /// The refusal's number.
        code: u16,
        /// Its sentence.
        sentence: String,
    },
    /// Something failed, here or there.
    Failed(String),
}

/// Why it ends early.
enum Stop {
    /// Here; the other side is told.
    Here(anyhow::Error),
    /// The other side has said it.
    There(String),
    /// One of them said no; it is known on both sides.
    Refused(u16, String),
}

impl From<anyhow::Error> for Stop {
    fn from(error: anyhow::Error) -> Stop {
        Stop::Here(error)
    }
}

impl From<LinkError> for Stop {
    fn from(error: LinkError) -> Stop {
        Stop::Here(error.into())
    }
}

fn out_of_turn() -> Stop {
    Stop::Here(anyhow!("the other side said something out of turn"))
}

/// The sending side's end.
pub fn verify_up(
    volume: &mut dyn Readable,
    link: Link,
    own: Hello,
    timing: Timing,
    watch: &dyn Watch,
) -> Verdict {
    run(volume, link, own, timing, watch, true)
}

/// The receiving side's end.
pub fn verify_down(
    volume: &mut dyn Readable,
    link: Link,
    own: Hello,
    timing: Timing,
    watch: &dyn Watch,
) -> Verdict {
    run(volume, link, own, timing, watch, false)
}

fn run(
    volume: &mut dyn Readable,
    link: Link,
    own: Hello,
    timing: Timing,
    watch: &dyn Watch,
    sends: bool,
) -> Verdict {
    let line = match Line::open(link, timing, WINDOW_BYTES) {
        Ok(line) => line,
        Err(error) => return Verdict::Failed(format!("no thread can be started: {error}")),
    };
    let mut end = End {
        volume,
        line,
        own,
        watch,
        wire: 0,
        data: Vec::new(),
    };
    let verdict = if sends { end.up() } else { end.down() };
    let verdict = verdict.unwrap_or_else(|stop| end.stopped(stop));
    if watch.cancelled() {
        end.line.hurry();
    }
    end.line.close();
    verdict
}

/// A snapshot in the sender's chunks.
#[derive(Clone, Copy, Debug)]
struct Shape {
    chunk: ChunkShift,
    length: Sectors,
}

impl Shape {
    fn chunks(self) -> u64 {
        self.length.to_chunks(self.chunk)
    }

    fn regions(self) -> u64 {
        self.chunks().div_ceil(region_chunks(self.chunk))
    }

    /// The chunks of a region: the first, and the one behind the last.
    fn region(self, region: u64) -> (u64, u64) {
        let count = region_chunks(self.chunk);
        let first = region.saturating_mul(count);
        (first, first.saturating_add(count).min(self.chunks()))
    }
}

/// Differing chunks, as runs of a bounded number.
#[derive(Clone, Debug, Default)]
struct Runs {
    chunks: u64,
    runs: Vec<ChunkRun>,
}

impl Runs {
    /// Takes in a chunk behind all that were.
    fn push(&mut self, number: u64) {
        self.chunks += 1;
        let full = self.runs.len() >= MAX_KEPT;
        match self.runs.last_mut() {
            Some(run) if full || run.first.0 + run.chunks == number => {
                run.chunks = number + 1 - run.first.0;
            }
            _ => self.runs.push(ChunkRun {
                first: Chunk(number),
                chunks: 1,
            }),
        }
    }
}

/// What the sender is to do after the receiver said something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Compare these hashes, of chunks from this one on.
    Compare(u64, Vec<[u8; 32]>),
    /// A region is done with.
    Done {
        /// It is the same there.
        same: bool,
    },
}

/// Which answers are due: a pure function of what was said.
#[derive(Clone, Debug)]
pub struct Answers {
    shape: Shape,
    /// Regions whose sums were said.
    asked: u64,
    /// Regions done with.
    answered: u64,
    /// The next chunk of the region in turn whose hash is to come.
    next: u64,
}

impl Answers {
    /// Of a snapshot of this length in chunks of this size.
    #[must_use]
    pub fn new(chunk: ChunkShift, length: Sectors) -> Answers {
        Answers {
            shape: Shape { chunk, length },
            asked: 0,
            answered: 0,
            next: 0,
        }
    }

    /// The next region to ask for, if it may be now.
    pub fn ask(&mut self) -> Option<u64> {
        let may = self.asked < self.shape.regions() && self.asked - self.answered < WINDOW;
        may.then(|| {
            self.asked += 1;
            self.asked - 1
        })
    }

    /// Whether all is answered.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.answered == self.shape.regions()
    }

    /// Takes in what the receiver said; none if it may not have.
    pub fn take(&mut self, message: Message) -> Option<Answer> {
        if self.answered == self.asked {
            return None;
        }
        let (first, end) = self.shape.region(self.answered);
        let whole = self.next == end;
        match message {
            Message::Chunks { first, hashes } => {
                let next = first.checked_add(hashes.len() as u64)?;
                if first != self.next || next > end || hashes.is_empty() {
                    return None;
                }
                self.next = next;
                Some(Answer::Compare(first, hashes))
            }
            Message::Compared { region, same } if region == self.answered => {
                if (same && self.next != first) || (!same && !whole) {
                    return None;
                }
                self.answered += 1;
                self.next = end;
                Some(Answer::Done { same })
            }
            _ => None,
        }
    }
}

struct End<'a> {
    volume: &'a mut dyn Readable,
    line: Line,
    own: Hello,
    watch: &'a dyn Watch,
    wire: u64,
    /// What is read, to be used again.
    data: Vec<u8>,
}

impl End<'_> {
    fn stopped(&mut self, stop: Stop) -> Verdict {
        match stop {
            Stop::Refused(code, sentence) => Verdict::Refused { code, sentence },
            Stop::There(sentence) => Verdict::Failed(sentence),
            Stop::Here(error) => {
                let text = sentence(&error);
                if self.watch.cancelled() {
                    self.line.hurry();
                }
                let told = self.line.say(&Message::Fail {
                    sentence: text.clone(),
                });
                let link = error.downcast_ref::<LinkError>();
                let broken = link.is_some_and(|error| !matches!(error, LinkError::Cancelled));
                if told.is_err() || broken {
                    return self.reason().unwrap_or(Verdict::Failed(text));
                }
                Verdict::Failed(text)
            }
        }
    }

    /// What the other side said before the link broke.
    fn reason(&mut self) -> Option<Verdict> {
        while let Some(came) = self.line.last_words() {
            match self.heard(came) {
                Err(Stop::There(sentence)) => return Some(Verdict::Failed(sentence)),
                Err(Stop::Refused(code, sentence)) => {
                    return Some(Verdict::Refused { code, sentence });
                }
                Err(Stop::Here(_)) | Ok(_) => {}
            }
        }
        None
    }

    fn say(&mut self, message: &Message) -> Result<(), Stop> {
        self.wire = self.line.say(message)?;
        Ok(())
    }

    fn refuse(&mut self, refusal: &Refusal) -> Stop {
        let (code, sentence) = (refusal.code(), refusal.to_string());
        let said = Message::Refuse {
            code,
            sentence: sentence.clone(),
        };
        // If it is not heard, the link's end is.
        let _ = self.line.say(&said);
        Stop::Refused(code, sentence)
    }

    fn hear(&mut self) -> Result<Message, Stop> {
        let watch = self.watch;
        let came = self.line.hear(&|| watch.cancelled())?;
        self.heard(came)
    }

    fn heard(&mut self, came: Incoming) -> Result<Message, Stop> {
        match came {
            Incoming::Extent(bytes) => {
                self.line.dealt_with(room_of(bytes.len()));
                Err(out_of_turn())
            }
            Incoming::Said(Message::Refuse { code, sentence }) => {
                Err(Stop::Refused(code, sentence))
            }
            Incoming::Said(Message::Fail { sentence }) => {
                Err(Stop::There(format!("the other side failed: {sentence}")))
            }
            Incoming::Said(message) => Ok(message),
        }
    }

    fn greet(&mut self) -> Result<Hello, Stop> {
        let own = Message::Hello(Box::new(self.own.clone()));
        self.say(&own)?;
        match self.hear()? {
            Message::Hello(peer) => Ok(*peer),
            _ => Err(out_of_turn()),
        }
    }

    /// The hashes of some chunks, one after the other.
    fn hash(
        &mut self,
        shape: Shape,
        (first, end): (u64, u64),
        each: &mut dyn FnMut(u64, Option<[u8; 32]>),
    ) -> Result<(), Stop> {
        let most = (EXTENT_BYTES as u64 >> shape.chunk.get()).max(1);
        let bytes = shape.chunk.bytes() as usize;
        let mut at = first;
        while at < end {
            if self.watch.cancelled() {
                return Err(LinkError::Cancelled.into());
            }
            let run = ChunkRun {
                first: Chunk(at),
                chunks: most.min(end - at),
            };
            self.volume.read(run, &mut self.data)?;
            if self.data.len() as u64 != run.bytes_within(shape.length, shape.chunk) {
                return Err(anyhow!("the snapshot is shorter than it should be").into());
            }
            for (number, data) in (at..).zip(self.data.chunks(bytes)) {
                each(number, chunk_hash(shape.chunk, number, data));
            }
            at += run.chunks;
        }
        Ok(())
    }

    fn progress(&self, shape: Shape, chunks: u64) {
        let bytes = |chunks: u64| {
            (chunks.saturating_mul(shape.chunk.bytes())).min(shape.length.0.saturating_mul(512))
        };
        let total = Some(bytes(shape.chunks()));
        self.watch.progress(bytes(chunks), total, self.wire);
    }

    fn up(&mut self) -> Result<Verdict, Stop> {
        let peer = self.greet()?;
        let snapshot = comparable(&self.own, &peer).map_err(|refusal| self.refuse(&refusal))?;
        let (nonce, chunk) = (peer.nonce, self.own.standing.chunk);
        self.say(&Message::Compare { nonce, snapshot })?;
        match self.hear()? {
            Message::Ready { nonce, position: 0 } if nonce == self.own.nonce => {}
            _ => return Err(out_of_turn()),
        }
        self.volume.open(&snapshot, chunk)?;
        let length = snapshot.length;
        let shape = Shape { chunk, length };
        let mut answers = Answers::new(chunk, length);
        let mut sums = Sums::new(chunk);
        let (mut found, mut before) = (Runs::default(), 0);
        while !answers.is_over() {
            let message = match answers.ask() {
                Some(region) => {
                    let chunks = shape.region(region);
                    self.hash(shape, chunks, &mut |number, hash| {
                        sums.replace_hash(number, None, hash);
                    })?;
                    let sum = sums.region(region);
                    self.say(&Message::Region { region, sum })?;
                    self.progress(shape, chunks.1);
                    match self.line.poll(Duration::ZERO)? {
                        Some(came) => self.heard(came)?,
                        None => continue,
                    }
                }
                None => self.hear()?,
            };
            match answers.take(message).ok_or_else(out_of_turn)? {
                Answer::Compare(first, theirs) => {
                    self.line.dealt_with(HASHES_HEAD + theirs.len() * 32);
                    let chunks = (first, first + theirs.len() as u64);
                    self.hash(shape, chunks, &mut |number, hash| {
                        if theirs.get((number - first) as usize) != Some(&hash.unwrap_or([0; 32])) {
                            found.push(number);
                        }
                    })?;
                }
                Answer::Done { same } => {
                    if !same && found.chunks == before {
                        let what = "a region is said to differ, and none of its chunks does";
                        return Err(anyhow!(what).into());
                    }
                    before = found.chunks;
                }
            }
        }
        let runs = found.runs.iter().take(MAX_SHOWN).copied().collect();
        let chunks = found.chunks;
        let send_again = (self.own.features | peer.features) & SEND_AGAIN != 0;
        if chunks > 0 && send_again {
            self.volume.note_again(chunk, &found.runs)?;
        }
        self.say(&Message::Verdict { chunks, runs })?;
        if chunks == 0 {
            return Ok(Verdict::Equal { snapshot, sums });
        }
        Ok(Verdict::Differs {
            snapshot,
            chunks,
            runs: found.runs,
            chunk,
            send_again,
        })
    }

    fn down(&mut self) -> Result<Verdict, Stop> {
        let peer = self.greet()?;
        let ours = comparable(&peer, &self.own).map_err(|refusal| self.refuse(&refusal))?;
        let snapshot = match self.hear()? {
            Message::Compare { nonce, snapshot } if nonce == self.own.nonce => snapshot,
            _ => return Err(out_of_turn()),
        };
        if snapshot != ours {
            return Err(out_of_turn());
        }
        let (chunk, length) = (peer.standing.chunk, snapshot.length);
        self.volume.open(&snapshot, chunk)?;
        let ready = Message::Ready {
            nonce: peer.nonce,
            position: 0,
        };
        self.say(&ready)?;
        let shape = Shape { chunk, length };
        let mut sums = Sums::new(chunk);
        let mut differing = 0u64;
        for region in 0..shape.regions() {
            let theirs = match self.hear()? {
                Message::Region { region: r, sum } if r == region => sum,
                _ => return Err(out_of_turn()),
            };
            let same = self.region(shape, region, theirs, &mut sums)?;
            differing += u64::from(!same);
            self.say(&Message::Compared { region, same })?;
            self.progress(shape, shape.region(region).1);
        }
        let Message::Verdict { chunks, runs } = self.hear()? else {
            return Err(out_of_turn());
        };
        let last = runs.last().map_or(0, |run| run.first.0 + run.chunks);
        // Each region that differs has a chunk that does.
        if chunks < differing || (chunks == 0) != (differing == 0) || last > shape.chunks() {
            return Err(out_of_turn());
        }
        if chunks == 0 {
            return Ok(Verdict::Equal { snapshot, sums });
        }
        let send_again = (self.own.features | peer.features) & SEND_AGAIN != 0;
        Ok(Verdict::Differs {
            snapshot,
            chunks,
            runs,
            chunk,
            send_again,
        })
    }

    /// Compares a region; says its hashes if it differs.
    fn region(
        &mut self,
        shape: Shape,
        region: u64,
        theirs: Root,
        sums: &mut Sums,
    ) -> Result<bool, Stop> {
        let chunks = shape.region(region);
        let mut hashes = Vec::with_capacity((chunks.1 - chunks.0) as usize);
        self.hash(shape, chunks, &mut |number, hash| {
            sums.replace_hash(number, None, hash);
            hashes.push(hash.unwrap_or([0; 32]));
        })?;
        if sums.region(region) == theirs {
            return Ok(true);
        }
        let mut first = chunks.0;
        for piece in hashes.chunks(MAX_HASHES) {
            let hashes = piece.to_vec();
            self.say(&Message::Chunks { first, hashes })?;
            first += piece.len() as u64;
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests;
