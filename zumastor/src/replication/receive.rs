// SPDX-License-Identifier: GPL-2.0-only
//! The receiving end: carries out what the [`Receiver`] wants, on a volume and a line.
//!
//! Extents wait, as they came, until the batch that seals them: nothing is written of which it is not
//! certain that the sender sent it.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, anyhow, bail};
use ddsnap::units::{Chunk, ChunkRun};

use super::extent::{Coding, Digests, EXTENT_BYTES, Extent, ExtentError, Shape};
use super::frame::FrameError;
use super::link::{Incoming, Line, Link, LinkError, Timing, room_of};
use super::message::{Begin, Hello, Message};
use super::progress::Progress;
use super::receiver::{Action, Event, Receiver};
use super::send::{WINDOW_BYTES, sentence};
use super::sender::Outcome;
use super::standing::Standing;
use super::sums::Sums;
use super::volume::{Downstream, Watch, expected};

/// Receives one cycle over `link`; `greeting` is that of who stands so.
pub fn receive(
    volume: &mut dyn Downstream,
    link: Link,
    greeting: impl FnOnce(Standing) -> Hello,
    timing: Timing,
    watch: &dyn Watch,
) -> Outcome {
    // First, so that who has greeted hears that somebody is there however long the look takes.
    let line = match Line::open(link, timing, WINDOW_BYTES) {
        Ok(line) => line,
        Err(error) => return Outcome::Failed(format!("no thread can be started: {error}")),
    };
    let mut end = End {
        volume,
        line,
        watch,
        chunk: None,
        extents: Vec::new(),
        upto: 0,
        copy: None,
        number: 0,
        proven: false,
        wire: 0,
    };
    let ended = end.line.ended();
    let outcome = match end.volume.take_stock(&While { watch, ended }) {
        Ok(standing) => end.run(Receiver::new(greeting(standing))),
        // For nobody.
        Err(_) if ended.load(Ordering::Relaxed) && !watch.cancelled() => {
            end.failed(&LinkError::Frame(FrameError::Ended).into())
        }
        Err(error) => end.failed(&error),
    };
    if watch.cancelled() {
        end.line.hurry();
    }
    end.line.close();
    outcome
}

/// Looks on as long as the other side is there.
struct While<'a> {
    watch: &'a dyn Watch,
    ended: &'a AtomicBool,
}

impl Watch for While<'_> {
    fn progress(&self, done: u64, total: Option<u64>, wire: u64) {
        self.watch.progress(done, total, wire);
    }

    fn cancelled(&self) -> bool {
        self.watch.cancelled() || self.ended.load(Ordering::Relaxed)
    }
}

struct End<'a> {
    volume: &'a mut dyn Downstream,
    line: Line,
    watch: &'a dyn Watch,
    /// The sender's.
    chunk: Option<ddsnap::units::ChunkShift>,
    /// Those of the batch to come.
    extents: Vec<Vec<u8>>,
    /// Where the batch that came ends.
    upto: u64,
    copy: Option<Copy>,
    /// Of the snapshot that was made.
    number: u32,
    /// Both sides had a root, and they were equal.
    proven: bool,
    wire: u64,
}

struct Copy {
    begin: Begin,
    shape: Shape,
    based: bool,
    position: u64,
    /// Of what is below the position; none if they are not known.
    sums: Option<Sums>,
    done: u64,
    old: Vec<u8>,
    new: Vec<u8>,
    old_digests: Digests,
    new_digests: Digests,
}

enum Step {
    /// This comes instead of the actions that follow.
    Instead(Event),
    Stop(Outcome),
}

impl End<'_> {
    fn run(&mut self, mut machine: Receiver) -> Outcome {
        let mut event = Some(Event::Start);
        loop {
            let now = match event.take() {
                Some(event) => event,
                None => match self.line.hear(&|| self.watch.cancelled()) {
                    Ok(Incoming::Extent(bytes)) => {
                        self.extents.push(bytes);
                        continue;
                    }
                    Ok(Incoming::Said(message)) => {
                        match &message {
                            Message::Batch { position } => self.upto = *position,
                            Message::Hello(peer) => self.chunk = Some(peer.standing.chunk),
                            _ => {}
                        }
                        Event::Received(message)
                    }
                    Err(error) => return Outcome::Failed(sentence(&error.into())),
                },
            };
            let (next, actions) = machine.step(now);
            machine = next;
            for action in actions {
                match self.carry_out(action) {
                    Ok(None) => {}
                    Ok(Some(Step::Instead(instead))) => {
                        event = Some(instead);
                        break;
                    }
                    Ok(Some(Step::Stop(outcome))) => return outcome,
                    Err(error) => return self.failed(&error),
                }
            }
        }
    }

    /// Tells the other side, unless it is gone; then it may have said why.
    fn failed(&mut self, error: &anyhow::Error) -> Outcome {
        let text = sentence(error);
        if self.watch.cancelled() {
            self.line.hurry();
        }
        if error.is::<LinkError>() {
            while let Some(came) = self.line.last_words() {
                match came {
                    Incoming::Said(Message::Fail { sentence }) => {
                        return Outcome::Failed(format!("the sending side failed: {sentence}"));
                    }
                    Incoming::Said(Message::Refuse { code, sentence }) => {
                        return Outcome::Refused { code, sentence };
                    }
                    _ => {}
                }
            }
        } else {
            let sentence = text.clone();
            // If it is not heard, the link's end is.
            let _ = self.line.say(&Message::Fail { sentence });
        }
        Outcome::Failed(text)
    }

    fn carry_out(&mut self, action: Action) -> Result<Option<Step>> {
        if self.watch.cancelled() {
            bail!("it was cancelled");
        }
        match action {
            Action::Send(message) => {
                self.line.say(&message)?;
            }
            Action::Adopt(epoch) => self.volume.adopt(epoch)?,
            Action::Superseded(epoch) => self.volume.superseded(epoch)?,
            Action::ReleaseOld => self.volume.release_old()?,
            Action::SafetySnapshot => self.volume.safety_snapshot()?,
            Action::Unsettle => self.volume.unsettle()?,
            Action::Restore(base) => self.volume.restore(base, self.watch)?,
            Action::StartPartial {
                partial,
                lineage,
                epoch,
            } => self.volume.start_partial(partial, lineage, epoch)?,
            Action::Open(begin) => self.open(begin)?,
            Action::Apply => {
                if let Some(event) = self.apply()? {
                    return Ok(Some(Step::Instead(event)));
                }
            }
            Action::Flush => self.volume.flush()?,
            Action::SavePartial { position } => self.save(position)?,
            Action::CompareRoot(theirs) => {
                let ours = self.copy()?.sums.as_ref().map(Sums::root);
                if let (Some(ours), Some(theirs)) = (ours, theirs) {
                    if ours != theirs {
                        return Ok(Some(Step::Instead(Event::RootDiffers)));
                    }
                    self.proven = true;
                }
            }
            Action::Finish { begin } => {
                let sums = self.copy.as_ref().and_then(|copy| copy.sums.as_ref());
                self.number = self.volume.finish(&begin, sums, self.proven)?;
            }
            Action::SendComplete => {
                let root = self.copy()?.sums.as_ref().map(Sums::root);
                let number = self.number;
                self.line.say(&Message::Complete { root, number })?;
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
        self.copy.as_mut().context("nothing is being received")
    }

    fn open(&mut self, begin: Begin) -> Result<()> {
        let chunk = self.chunk.context("nobody greeted")?;
        self.volume.open(&begin, chunk)?;
        let known = |sums: &Sums| sums.chunk() == chunk;
        let sums = if begin.position > 0 {
            let progress = self.volume.progress()?;
            let of_this = progress.filter(|progress| {
                progress.snapshot == begin.snapshot.id
                    && progress.base == begin.base
                    && progress.position == begin.position
            });
            of_this.and_then(|progress| progress.sums).filter(known)
        } else {
            match begin.base {
                None => Some(Sums::new(chunk)),
                // Old data that is doubted does not prove anything.
                Some(_) if begin.plain => None,
                Some(base) => self.volume.sums(base)?.filter(known),
            }
        };
        self.copy = Some(Copy {
            begin,
            shape: Shape {
                chunk,
                length: begin.snapshot.length,
                base_length: begin.base_length,
            },
            based: begin.base.is_some(),
            position: begin.position,
            sums,
            done: 0,
            old: Vec::new(),
            new: Vec::new(),
            old_digests: Digests::default(),
            new_digests: Digests::default(),
        });
        Ok(())
    }

    fn apply(&mut self) -> Result<Option<Event>> {
        let extents = std::mem::take(&mut self.extents);
        let all: usize = extents.iter().map(Vec::len).sum();
        let room = extents.iter().map(|extent| room_of(extent.len())).sum();
        let applied = self.apply_all(&extents);
        drop(extents);
        self.line.dealt_with(room);
        self.wire += all as u64;
        match applied {
            Err(error) => match error.downcast_ref::<ExtentError>() {
                Some(ExtentError::Base { .. }) => Ok(Some(Event::BaseDiffers)),
                _ => Err(error),
            },
            Ok(()) => {
                let (upto, wire) = (self.upto, self.wire);
                let copy = self.copy()?;
                let (done, first) = (copy.done, copy.begin.position);
                let end = copy.shape.length.to_chunks(copy.shape.chunk);
                self.watch
                    .progress(done, expected(done, first, upto, end), wire);
                Ok(None)
            }
        }
    }

    fn apply_all(&mut self, extents: &[Vec<u8>]) -> Result<()> {
        let (upto, volume) = (self.upto, &mut *self.volume);
        let copy = self.copy.as_mut().context("nothing is being received")?;
        if upto > copy.shape.length.to_chunks(copy.shape.chunk) {
            bail!("a batch ends behind the snapshot");
        }
        for payload in extents {
            if self.watch.cancelled() {
                bail!("it was cancelled");
            }
            let extent = Extent::decode(payload, &copy.shape, copy.position)?;
            let end = extent.runs.last().map_or(0, |run| run.first.0 + run.chunks);
            if end > upto {
                bail!("an extent is not within its batch");
            }
            match extent.coding {
                Coding::Zero => copy.apply_zeros(volume, &extent.runs)?,
                _ => copy.apply_data(volume, &extent)?,
            }
            copy.done += extent.bytes;
        }
        Ok(())
    }

    fn save(&mut self, position: u64) -> Result<()> {
        let copy = self.copy.as_mut().context("nothing is being received")?;
        copy.position = position;
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
    /// What the base has of some runs, with digests; nothing if it does not matter.
    fn read_base(
        &mut self,
        volume: &mut dyn Downstream,
        runs: &[ChunkRun],
        wanted: bool,
    ) -> Result<()> {
        self.old.clear();
        self.old_digests.0.clear();
        if !self.based || !wanted {
            return Ok(());
        }
        let mut part = Vec::new();
        for run in runs {
            volume.read_base(*run, &mut part)?;
            self.old.extend_from_slice(&part);
        }
        let Shape {
            chunk, base_length, ..
        } = self.shape;
        self.old_digests.fill(chunk, base_length, runs, &self.old);
        Ok(())
    }

    fn apply_data(&mut self, volume: &mut dyn Downstream, extent: &Extent<'_>) -> Result<()> {
        let wanted = extent.has_base() || self.sums.is_some();
        self.read_base(volume, &extent.runs, wanted)?;
        extent.unpack(
            &self.shape,
            (&self.old, &self.old_digests),
            (&mut self.new, &mut self.new_digests),
        )?;
        if let Some(sums) = &mut self.sums {
            for (i, (number, new)) in self.new_digests.0.iter().enumerate() {
                let old = self.old_digests.0.get(i).and_then(|(_, old)| *old);
                sums.replace_hash(*number, old, *new);
            }
        }
        let mut at = 0;
        for run in &extent.runs {
            let bytes = run.bytes_within(self.shape.length, self.shape.chunk) as usize;
            let data = self.new.get(at..at + bytes);
            let data = data.ok_or_else(|| anyhow!("an extent is shorter than its chunks"))?;
            volume.write(*run, data)?;
            at += bytes;
        }
        Ok(())
    }

    fn apply_zeros(&mut self, volume: &mut dyn Downstream, runs: &[ChunkRun]) -> Result<()> {
        let most = (EXTENT_BYTES as u64 >> self.shape.chunk.get()).max(1);
        for run in runs {
            let (mut first, end) = (run.first.0, run.first.0 + run.chunks);
            while first < end {
                let part = ChunkRun {
                    first: Chunk(first),
                    chunks: most.min(end - first),
                };
                self.read_base(volume, &[part], self.sums.is_some())?;
                if let Some(sums) = &mut self.sums {
                    for (number, old) in &self.old_digests.0 {
                        sums.replace_hash(*number, *old, None);
                    }
                }
                let bytes = part.bytes_within(self.shape.length, self.shape.chunk);
                volume.write_zeros(part, bytes)?;
                first += part.chunks;
            }
        }
        Ok(())
    }
}
