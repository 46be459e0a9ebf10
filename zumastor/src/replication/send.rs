// SPDX-License-Identifier: GPL-2.0-only
//! The sending end: carries out what the [`Sender`] wants, on a volume and a line.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use ddsnap::units::{Chunk, ChunkRun};

use super::extent::{
    Digests, EXTENT_BYTES, Encoder, MAX_RUNS, Shape, ZERO_BYTES, head_bytes, zeros,
};
use super::frame::Kind;
use super::link::{Incoming, LOOK, Line, Link, LinkError, Timing, room_of};
use super::message::{Begin, Hello, Message};
use super::progress::Progress;
use super::sender::{Action, Event, IN_FLIGHT, Outcome, Sender};
use super::sums::{Root, Sums};
use super::volume::{Upstream, Watch, expected};

/// Room of extents, as the receiver counts it, after which a batch ends; one more may come. With [`IN_FLIGHT`] of
/// them waiting the receiver takes 27 MiB.
pub const BATCH_BYTES: usize = 8 << 20;
/// Bytes of data after which a batch ends, however well they compress.
pub const BATCH_DATA: u64 = 64 << 20;
/// How long a batch is being sent before it ends, however little it has: what no batch has sealed shows as no progress,
/// and is lost with the line.
pub const BATCH_TIME: Duration = Duration::from_secs(5);
/// The most bytes of extents under way: the receiver's bound.
pub const WINDOW_BYTES: usize =
    IN_FLIGHT as usize * (BATCH_BYTES + super::frame::MAX_EXTENT_PAYLOAD);

/// How to send.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// zstd level, 0 for none.
    pub level: u8,
    /// The most bytes a second on the wire.
    pub rate: Option<u64>,
    /// After so long a batch ends with the extent that is being sent.
    pub batch_time: Duration,
    /// Keep-alives and deadlines.
    pub timing: Timing,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            level: 3,
            rate: None,
            batch_time: BATCH_TIME,
            timing: Timing::default(),
        }
    }
}

/// Sends one cycle over `link`; `own` is the greeting.
pub fn send(
    volume: &mut dyn Upstream,
    link: Link,
    own: Hello,
    options: &Options,
    watch: &dyn Watch,
) -> Outcome {
    let line = match Line::open(link, options.timing, 0) {
        Ok(line) => line,
        Err(error) => return Outcome::Failed(format!("no thread can be started: {error}")),
    };
    let mut end = End {
        volume,
        line,
        options,
        watch,
        chunk: own.standing.chunk,
        copy: None,
        root: None,
        proven: false,
        wire: 0,
        before: 0,
        began: Instant::now(),
        events: VecDeque::new(),
        broken: None,
    };
    let outcome = end.run(Sender::new(own));
    if watch.cancelled() {
        end.line.hurry();
    }
    end.line.close();
    outcome
}

struct End<'a> {
    volume: &'a mut dyn Upstream,
    line: Line,
    options: &'a Options,
    watch: &'a dyn Watch,
    chunk: ddsnap::units::ChunkShift,
    copy: Option<Copy>,
    /// What the end said.
    root: Option<Root>,
    /// Both sides had a root, and they were equal.
    proven: bool,
    wire: u64,
    /// What of it was said before the copy began. While the other side gets ready no bytes are saved up.
    before: u64,
    began: Instant,
    events: VecDeque<Event>,
    /// How the line broke, once what was said before is dealt with.
    broken: Option<Outcome>,
}

/// A copy under way.
struct Copy {
    begin: Begin,
    shape: Shape,
    based: bool,
    /// What is left of the run that was begun.
    rest: Option<ChunkRun>,
    /// All below is in a batch.
    position: u64,
    /// Of what is acknowledged; none if they cannot be known.
    sums: Option<Sums>,
    /// What each batch under way changes in them.
    changes: VecDeque<Sums>,
    done: u64,
    encoder: Encoder,
    old: Vec<u8>,
    new: Vec<u8>,
    old_digests: Digests,
    new_digests: Digests,
}

impl End<'_> {
    fn run(&mut self, mut machine: Sender) -> Outcome {
        self.events.push_back(Event::Start);
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                // What was said before the line broke comes first.
                None => match self.broken.take().map_or_else(|| self.hear(), Err) {
                    Ok(event) => event,
                    Err(outcome) => return outcome,
                },
            };
            let (next, actions) = machine.step(event);
            machine = next;
            for action in actions {
                match self.carry_out(action) {
                    Ok(None) => {}
                    Ok(Some(Step::Event(event))) => {
                        // Before what came: its acknowledgement may be there already.
                        self.events.push_back(event);
                        self.collect();
                    }
                    Ok(Some(Step::Stop(outcome))) => return outcome,
                    Err(error) => return self.failed(&error),
                }
            }
        }
    }

    fn hear(&mut self) -> Result<Event, Outcome> {
        let watch = self.watch;
        match self.line.hear(&|| watch.cancelled()) {
            Ok(Incoming::Said(message)) => Ok(Event::Received(message)),
            Ok(Incoming::Extent(_)) => Err(self.fail("the receiving side sends data")),
            Err(error) => Err(Outcome::Failed(sentence(&error.into()))),
        }
    }

    /// Takes up what came while a batch was being made.
    fn collect(&mut self) {
        while self.broken.is_none() && self.collect_one(Duration::ZERO) {}
    }

    /// Takes up one thing that comes within `time`; whether one did.
    fn collect_one(&mut self, time: Duration) -> bool {
        match self.line.poll(time) {
            Ok(None) => return false,
            Ok(Some(Incoming::Said(message))) => self.events.push_back(Event::Received(message)),
            Ok(Some(Incoming::Extent(_))) => {
                self.broken = Some(self.fail("the receiving side sends data"));
            }
            Err(error) => self.broken = Some(Outcome::Failed(sentence(&error.into()))),
        }
        true
    }

    fn fail(&mut self, what: &str) -> Outcome {
        self.failed(&anyhow!(what.to_owned()))
    }

    /// Tells the other side, unless it is gone; then it may have said why.
    fn failed(&mut self, error: &anyhow::Error) -> Outcome {
        let text = sentence(error);
        if self.watch.cancelled() {
            self.line.hurry();
        }
        let told = self.line.say(&Message::Fail {
            sentence: text.clone(),
        });
        if told.is_err() || error.is::<LinkError>() {
            loop {
                let event = match self.events.pop_front() {
                    Some(event) => event,
                    None if self.broken.is_some() => break,
                    None => match self.hear_reason() {
                        Some(event) => event,
                        None => break,
                    },
                };
                match event {
                    Event::Received(Message::Fail { sentence }) => {
                        return Outcome::Failed(format!("the receiving side failed: {sentence}"));
                    }
                    Event::Received(Message::Refuse { code, sentence }) => {
                        return Outcome::Refused { code, sentence };
                    }
                    _ => {}
                }
            }
        }
        Outcome::Failed(text)
    }

    fn hear_reason(&mut self) -> Option<Event> {
        match self.line.last_words() {
            Some(Incoming::Said(message)) => Some(Event::Received(message)),
            Some(Incoming::Extent(_)) | None => None,
        }
    }

    fn carry_out(&mut self, action: Action) -> Result<Option<Step>> {
        match action {
            Action::Send(message) => {
                self.wire = self.line.say(&message)?;
            }
            Action::Open(begin) => self.open(begin)?,
            Action::SendBatch => {
                let (position, last) = self.batch()?;
                return Ok(Some(Step::Event(Event::BatchSent { position, last })));
            }
            Action::SendEnd => {
                let copy = self.copy()?;
                let mut sums = copy.sums.clone();
                if let Some(sums) = &mut sums {
                    copy.changes.iter().for_each(|change| sums.merge(change));
                }
                let root = sums.as_ref().map(Sums::root);
                let snapshot = copy.begin.snapshot.id;
                self.root = root;
                self.volume.note_end(snapshot, sums.as_ref())?;
                self.wire = self.line.say(&Message::End { root })?;
            }
            Action::SaveProgress { position } => self.acknowledged(position)?,
            Action::CompareRoot(root) => {
                // The receiver has compared already.
                if let (Some(theirs), Some(ours)) = (root, self.root) {
                    if theirs != ours {
                        bail!("the receiving side completed a snapshot with other sums than ours");
                    }
                    self.proven = true;
                }
            }
            Action::Pin(snapshot) => self.volume.pin(snapshot)?,
            Action::Superseded(epoch) => self.volume.superseded(epoch)?,
            Action::MoveHold(snapshot) => {
                // Of an earlier cycle's snapshot they were noted at its end, if they are known.
                let sums = self.copy.as_ref().and_then(|copy| copy.sums.as_ref());
                self.volume.move_hold(snapshot, sums, self.proven)?;
            }
            Action::Stop(outcome) => {
                return Ok(Some(Step::Stop(match outcome {
                    Outcome::Done { snapshot, .. } => Outcome::Done {
                        snapshot,
                        proven: self.proven,
                    },
                    other => other,
                })));
            }
        }
        Ok(None)
    }

    fn copy(&mut self) -> Result<&mut Copy> {
        self.copy.as_mut().context("nothing is being sent")
    }

    fn check_cancel(&self) -> Result<()> {
        if self.watch.cancelled() {
            bail!("it was cancelled");
        }
        Ok(())
    }

    fn open(&mut self, begin: Begin) -> Result<()> {
        (self.before, self.began) = (self.wire, Instant::now());
        let based = self.volume.open(&begin)?;
        let known = |sums: &Sums| sums.chunk() == self.chunk;
        let mut sums = match begin.base {
            None => Some(Sums::new(self.chunk)),
            Some(base) if based => self.volume.sums(base)?.filter(known),
            // Of a bookmark the old data is missing, so its hashes cannot be taken away.
            Some(_) => None,
        };
        let mut from = 0;
        if begin.position > 0 && (sums.is_some() || begin.base.is_some() && based) {
            let noted = self.volume.progress()?.filter(|progress| {
                progress.snapshot == begin.snapshot.id
                    && progress.base == begin.base
                    && progress.position <= begin.position
                    && progress.sums.as_ref().is_some_and(known)
            });
            if let Some(progress) = noted {
                from = progress.position;
                sums = progress.sums;
            }
        }
        self.copy = Some(Copy {
            begin,
            shape: Shape {
                chunk: self.chunk,
                length: begin.snapshot.length,
                base_length: begin.base_length,
            },
            based,
            rest: None,
            position: begin.position,
            sums,
            changes: VecDeque::new(),
            done: 0,
            encoder: Encoder::new(self.options.level),
            old: Vec::new(),
            new: Vec::new(),
            old_digests: Digests::default(),
            new_digests: Digests::default(),
        });
        self.skim(from, begin.position)
    }

    /// Passes over what was sent before; sums that were not noted are made up for by reading.
    fn skim(&mut self, from: u64, to: u64) -> Result<()> {
        let most = (EXTENT_BYTES as u64 >> self.chunk.get()).max(1);
        if to == 0 {
            return Ok(());
        }
        loop {
            self.check_cancel()?;
            let Some(run) = self.next_piece(most)? else {
                break;
            };
            let copy = self.copy.as_mut().context("nothing is being sent")?;
            let end = run.first.0 + run.chunks;
            if end > to {
                // What is behind is to be sent.
                let first = run.first.0.max(to);
                let back = ChunkRun {
                    first: Chunk(first),
                    chunks: end - first,
                };
                copy.give_back(back);
            }
            let (first, end) = (run.first.0.max(from), end.min(to));
            if let (true, Some(sums)) = (first < end, &mut copy.sums) {
                let part = ChunkRun {
                    first: Chunk(first),
                    chunks: end - first,
                };
                copy.old.clear();
                if copy.based {
                    self.volume.read_base(part, &mut copy.old)?;
                }
                self.volume.read(part, &mut copy.new)?;
                sums.replace_run(first, &copy.old, &copy.new);
            }
            if copy.rest.is_some_and(|rest| rest.first.0 >= to) {
                break;
            }
        }
        Ok(())
    }

    /// The next chunks to deal with, `most` of them at a time.
    fn next_piece(&mut self, most: u64) -> Result<Option<ChunkRun>> {
        let copy = self.copy.as_mut().context("nothing is being sent")?;
        let run = match copy.rest.take() {
            Some(run) => Some(run),
            None => self.volume.next_run(self.watch)?,
        };
        let Some(run) = run else { return Ok(None) };
        // At multiples, so that the same chunks go together whatever is before them.
        let first = run.first.0;
        let chunks = run.chunks.min(most - first % most);
        if chunks < run.chunks {
            copy.rest = Some(ChunkRun {
                first: Chunk(first + chunks),
                chunks: run.chunks - chunks,
            });
        }
        Ok(Some(ChunkRun {
            first: run.first,
            chunks,
        }))
    }

    /// Sends extents and the batch that seals them; gives where it ends, and whether nothing follows.
    fn batch(&mut self) -> Result<(u64, bool)> {
        let most = (EXTENT_BYTES as u64 >> self.chunk.get()).max(1);
        let mut batch = Batch::default();
        let mut change = Sums::new(self.chunk);
        let mut last = false;
        let mut position = self.copy()?.position;
        let began = Instant::now();
        loop {
            self.check_cancel()?;
            let Some(piece) = self.next_piece(most)? else {
                last = true;
                break;
            };
            position = piece.first.0 + piece.chunks;
            self.take_in(piece, &mut batch, &mut change)?;
            let full = batch.room() >= BATCH_BYTES || batch.data >= BATCH_DATA;
            if full || began.elapsed() >= self.options.batch_time {
                break;
            }
        }
        self.flush_group(&mut batch)?;
        self.flush_zeros(&mut batch)?;
        let copy = self.copy()?;
        if last {
            position = copy.shape.length.to_chunks(copy.shape.chunk);
        }
        copy.position = position;
        copy.changes.push_back(change);
        copy.done += batch.data;
        let (done, first) = (copy.done, copy.begin.position);
        let end = copy.shape.length.to_chunks(copy.shape.chunk);
        self.wire = self.line.say(&Message::Batch { position })?;
        let total = expected(done, first, position, end);
        self.watch.progress(done, total, self.wire);
        Ok((position, last))
    }

    /// Reads a piece and puts its chunks where they belong: nowhere, to the zeros, or to the data.
    fn take_in(&mut self, piece: ChunkRun, batch: &mut Batch, change: &mut Sums) -> Result<()> {
        let copy = self.copy.as_mut().context("nothing is being sent")?;
        let pieces = [piece];
        let (mut old, mut new) = (std::mem::take(&mut copy.old), std::mem::take(&mut copy.new));
        old.clear();
        if copy.based {
            self.volume.read_base(piece, &mut old)?;
        }
        self.volume.read(piece, &mut new)?;
        let shape = copy.shape;
        let (chunk, plain) = (shape.chunk, copy.begin.plain);
        copy.old_digests
            .fill(chunk, shape.base_length, &pieces, &old);
        copy.new_digests.fill(chunk, shape.length, &pieces, &new);
        if !copy.based {
            copy.old_digests
                .0
                .iter_mut()
                .for_each(|(_, hash)| *hash = None);
        }
        let olds = std::mem::take(&mut copy.old_digests);
        let news = std::mem::take(&mut copy.new_digests);
        let compare = copy.based && !plain;
        let bytes = chunk.bytes() as usize;
        for (i, (was, is)) in olds.0.iter().zip(&news.0).enumerate() {
            change.replace_hash(is.0, was.1, is.1);
            if compare && was.1 == is.1 {
                continue;
            }
            let part = |data: &[u8]| (i * bytes).min(data.len())..((i + 1) * bytes).min(data.len());
            let is_data = part(&new);
            batch.data += is_data.len() as u64;
            if is.1.is_none() {
                if batch.zero_bytes + bytes as u64 > ZERO_BYTES || batch.zeros.len() == MAX_RUNS {
                    self.flush_zeros(batch)?;
                }
                batch.zero_bytes += is_data.len() as u64;
                append(&mut batch.zeros, is.0);
                continue;
            }
            if batch.new.len() + bytes > EXTENT_BYTES || batch.runs.len() == MAX_RUNS {
                self.flush_group(batch)?;
            }
            append(&mut batch.runs, is.0);
            batch.new.extend_from_slice(&new[is_data]);
            batch.news.0.push(*is);
            if compare {
                batch.old.extend_from_slice(&old[part(&old)]);
                batch.olds.0.push(*was);
            }
        }
        let copy = self.copy()?;
        (copy.old, copy.new) = (old, new);
        (copy.old_digests, copy.new_digests) = (olds, news);
        Ok(())
    }

    fn flush_group(&mut self, batch: &mut Batch) -> Result<()> {
        if batch.runs.is_empty() {
            return Ok(());
        }
        let copy = self.copy.as_mut().context("nothing is being sent")?;
        let compare = copy.based && !copy.begin.plain;
        let old = compare.then_some((batch.old.as_slice(), &batch.olds));
        let (head, data) = copy
            .encoder
            .encode(&batch.runs, old, (&batch.new, &batch.news));
        batch.sent += room_of(head.len() + data.len());
        self.wire = self.line.send(Kind::Extent, &[&head, data])?;
        batch.clear();
        self.brake();
        Ok(())
    }

    fn flush_zeros(&mut self, batch: &mut Batch) -> Result<()> {
        if batch.zeros.is_empty() {
            return Ok(());
        }
        let head = zeros(&batch.zeros, batch.zero_bytes);
        batch.sent += room_of(head.len());
        self.wire = self.line.send(Kind::Extent, &[&head])?;
        batch.zeros.clear();
        batch.zero_bytes = 0;
        self.brake();
        Ok(())
    }

    /// Waits until so many bytes are allowed, unless the line breaks.
    fn brake(&mut self) {
        let Some(rate) = self.options.rate.filter(|rate| *rate > 0) else {
            return;
        };
        let sent = self.wire.saturating_sub(self.before);
        let due = Duration::from_secs_f64(sent as f64 / rate as f64);
        while let Some(left) = due.checked_sub(self.began.elapsed()) {
            if left.is_zero() || self.watch.cancelled() || self.broken.is_some() {
                return;
            }
            self.collect_one(left.min(LOOK));
        }
    }

    fn acknowledged(&mut self, position: u64) -> Result<()> {
        let copy = self.copy.as_mut().context("nothing is being sent")?;
        let change = copy.changes.pop_front();
        if let (Some(sums), Some(change)) = (&mut copy.sums, change) {
            sums.merge(&change);
        }
        let progress = Progress {
            snapshot: copy.begin.snapshot.id,
            base: copy.begin.base,
            position,
            plain: copy.begin.plain,
            sums: copy.sums.clone(),
        };
        self.volume.save_progress(&progress)
    }
}

impl Copy {
    /// What was taken too much of a run.
    fn give_back(&mut self, back: ChunkRun) {
        let chunks = self.rest.map_or(0, |rest| rest.chunks);
        self.rest = Some(ChunkRun {
            first: back.first,
            chunks: back.chunks + chunks,
        });
    }
}

enum Step {
    Event(Event),
    Stop(Outcome),
}

/// A batch in the making.
#[derive(Default)]
struct Batch {
    /// Room that its extents take so far.
    sent: usize,
    /// Bytes of data.
    data: u64,
    runs: Vec<ChunkRun>,
    old: Vec<u8>,
    new: Vec<u8>,
    olds: Digests,
    news: Digests,
    zeros: Vec<ChunkRun>,
    zero_bytes: u64,
}

impl Batch {
    /// Room that it takes at most, with the extents that are yet to be sent.
    fn room(&self) -> usize {
        let data = room_of(head_bytes(self.runs.len()) + self.new.len());
        self.sent + data + room_of(head_bytes(self.zeros.len()))
    }

    fn clear(&mut self) {
        self.runs.clear();
        self.old.clear();
        self.new.clear();
        self.olds.0.clear();
        self.news.0.clear();
    }
}

/// Puts a chunk behind the others.
fn append(runs: &mut Vec<ChunkRun>, number: u64) {
    match runs.last_mut() {
        Some(run) if run.first.0 + run.chunks == number => run.chunks += 1,
        _ => runs.push(ChunkRun {
            first: Chunk(number),
            chunks: 1,
        }),
    }
}

/// An error with its causes, in one line.
pub(super) fn sentence(error: &anyhow::Error) -> String {
    format!("{error:#}").replace('\n', " ")
}
