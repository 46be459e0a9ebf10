// SPDX-License-Identifier: GPL-2.0-only
//! A comparison as a job of the daemon: what a snapshot holds here and on the other machine, read anew.
//!
//! It reads only. What differs is noted where it is sent from, if that is wanted, and goes with the next cycle:
//! so what it changes of a replica is what any cycle does, whatever is cut short. Cycles go on meanwhile.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use ddsnap::units::{ChunkRun, ChunkShift};
use jiff::Timestamp;
use uuid::Uuid;

use super::again::Again;
use super::cycle::{Way, link};
use super::device::Device;
use super::files::Files;
use super::ssh::Remote;
use super::upstream::with;
use crate::jobs::{Declined, Ended, Job, Running};
use crate::layout::Layout;
use crate::note::Note;
use crate::replication::link::Timing;
use crate::replication::message::{COMPARE, FEATURES, Hello, SEND_AGAIN, Wishes};
use crate::replication::standing::Held;
use crate::replication::verify::{Readable, Verdict, verify_down, verify_up};
use crate::replication::volume::Watch;
use crate::volume::{Peer, Volumes};

/// The most ranges that are told.
const TOLD: usize = 20;

/// Whether a comparison found a difference, for whoever waits for it.
#[derive(Debug, Default)]
pub struct Found(Mutex<Option<bool>>);

impl Found {
    /// Whether there is a difference; none if it was not compared to the end.
    #[must_use]
    pub fn differs(&self) -> Option<bool> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, differs: bool) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(differs);
    }
}

/// The job.
pub struct Verify {
    /// The daemon's volumes.
    pub volumes: Arc<dyn Volumes>,
    /// Where things are.
    pub layout: Layout,
    /// The volume here.
    pub volume: String,
    /// Which replication, and who begins.
    pub way: Way,
    /// What differs is to be sent again.
    pub send_again: bool,
    /// What this machine is called.
    pub node: String,
    /// What comes of it.
    pub found: Arc<Found>,
}

struct Eye<'a>(&'a Running);

impl Watch for Eye<'_> {
    fn progress(&self, done: u64, total: Option<u64>, _: u64) {
        self.0.progress("comparing", done, total.unwrap_or(0));
    }

    fn cancelled(&self) -> bool {
        self.0.ending().is_some()
    }
}

/// Snapshots of a volume, to be read.
struct Reading {
    volumes: Arc<dyn Volumes>,
    volume: String,
    peer: Peer,
    files: Files,
    device: Option<Device>,
}

impl Readable for Reading {
    fn open(&mut self, snapshot: &Held, chunk: ChunkShift) -> Result<()> {
        let path = with(self.volumes.as_ref(), &self.volume, |v| {
            v.node(Some(snapshot.id))
        })?;
        let device = Device::open(&path, false, chunk, snapshot.length)?;
        device.forget_cache();
        self.device = Some(device);
        Ok(())
    }

    fn read(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        let device = self.device.as_ref().context("nothing is open")?;
        device.read(run, into)
    }

    fn note_again(&mut self, chunk: ChunkShift, runs: &[ChunkRun]) -> Result<()> {
        let Peer::Target(host) = &self.peer else {
            return Ok(());
        };
        let runs = runs.to_vec();
        with(self.volumes.as_ref(), &self.volume, |_| {
            self.files.save_again(host, &Again { chunk, runs })
        })
    }
}

impl Job for Verify {
    fn name(&self) -> String {
        match &self.way {
            Way::Push(host) | Way::ServeSend(host, _) => format!("verify {host}"),
            Way::Pull | Way::ServeReceive(_) => "verify".into(),
        }
    }

    fn run(&mut self, running: &Arc<Running>) -> Result<String> {
        let compared = self.compare(running).inspect_err(|error| {
            if let Way::ServeSend(_, stream) | Way::ServeReceive(stream) = &self.way {
                // Nothing was answered yet, or the stream is of no use any more.
                let _ = super::socket::answer(&stream.socket, Some(format!("{error:#}")));
            }
        });
        let (verdict, complaint) = compared?;
        if let Some(ending) = running.ending() {
            if matches!(verdict, Verdict::Failed(_)) {
                return Err(Ended(ending).into());
            }
        }
        self.conclude(verdict, &complaint, running)
    }
}

impl Verify {
    fn compare(&mut self, running: &Running) -> Result<(Verdict, String)> {
        let peer = self.way.peer();
        let volumes = self.volumes.clone();
        let standing = with(volumes.as_ref(), &self.volume, |v| {
            v.standing(&peer, &|_| 0)
        })?;
        let begins = matches!(self.way, Way::Push(_) | Way::Pull);
        let wish = if self.send_again { SEND_AGAIN } else { 0 };
        let own = Hello {
            nonce: uuid::Uuid::new_v4().into_bytes(),
            features: FEATURES | wish | if begins { COMPARE } else { 0 },
            standing,
            wishes: Wishes::default(),
        };
        let mut reading = Reading {
            volumes: volumes.clone(),
            volume: self.volume.clone(),
            peer: peer.clone(),
            files: Files::of(&self.layout, &self.volume),
            device: None,
        };
        let (layout, name) = (&self.layout, &self.volume);
        let (link, remote) = link(volumes.as_ref(), layout, name, &self.way, &self.node)?;
        let (timing, eye) = (Timing::default(), Eye(running));
        let verdict = match peer {
            Peer::Target(_) => verify_up(&mut reading, link, own, timing, &eye),
            Peer::Source => verify_down(&mut reading, link, own, timing, &eye),
        };
        Ok((verdict, remote.map(Remote::finish).unwrap_or_default()))
    }

    /// Nothing that is made from a snapshot is proven by its sums, until a comparison finds both sides equal.
    fn take_back(&self, files: &Files, snapshot: Uuid) -> Result<()> {
        let forgotten = with(self.volumes.as_ref(), &self.volume, |v| {
            v.set_proven(&self.way.peer(), None)
        });
        // Each of the two is tried, whatever becomes of the other.
        let dropped = files.drop(&snapshot.to_string());
        forgotten.and(dropped)
    }

    fn conclude(&self, verdict: Verdict, complaint: &str, running: &Running) -> Result<String> {
        let number = |held: &Held| {
            let found = with(self.volumes.as_ref(), &self.volume, |v| {
                v.number_of(held.id)
            });
            // It may have gone since.
            found.unwrap_or(held.number)
        };
        let files = Files::of(&self.layout, &self.volume);
        match verdict {
            Verdict::Equal { snapshot, sums } => {
                let now = Timestamp::now().as_second();
                let known = with(self.volumes.as_ref(), &self.volume, |v| {
                    v.set_proven(&self.way.peer(), Some(now))?;
                    Ok(v.snapshot_uuids().contains(&snapshot.id))
                })?;
                if known {
                    files.save_sums(snapshot.id, &sums)?;
                }
                self.found.set(false);
                let size = crate::human::bytes(snapshot.length.to_bytes());
                Ok(format!(
                    "snapshot {} holds the same on both sides, all {size} of it",
                    number(&snapshot)
                ))
            }
            Verdict::Differs {
                snapshot,
                chunks,
                runs,
                chunk,
                send_again,
            } => {
                for line in ranges(&runs, chunks, chunk, snapshot.length.to_bytes()) {
                    running.note(Note::Line(line));
                }
                let noted = match self.way.peer() {
                    Peer::Target(_) if send_again => "; the next cycle sends them again",
                    _ => "",
                };
                self.found.set(true);
                let differ = format!(
                    "{chunks} chunks of snapshot {} differ between the two sides{noted}",
                    number(&snapshot)
                );
                match self.take_back(&files, snapshot.id) {
                    Ok(()) => bail!("{differ}"),
                    Err(error) => {
                        bail!("{differ}; that nothing is proven could not be noted: {error:#}")
                    }
                }
            }
            Verdict::Refused { code, sentence } => Err(Declined { code, sentence }.into()),
            Verdict::Failed(sentence) if complaint.is_empty() => bail!("{sentence}"),
            Verdict::Failed(sentence) => {
                bail!("{sentence} (the other machine says: {complaint})")
            }
        }
    }
}

/// What differs, for people: a line for each range of bytes, the first of them. `chunks` of `chunk` bytes differ in
/// all, in a snapshot of `length` bytes.
fn ranges(runs: &[ChunkRun], chunks: u64, chunk: ChunkShift, length: u64) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut told = 0;
    for run in runs.iter().take(TOLD) {
        let first = run.first.0 << chunk.get();
        let end = ((run.first.0 + run.chunks) << chunk.get()).min(length);
        told += run.chunks;
        lines.push(format!("bytes {first} to {} differ", end.saturating_sub(1)));
    }
    if told < chunks {
        lines.push(format!("and {} chunks more", chunks - told));
    }
    lines
}

#[cfg(test)]
mod tests {
    use ddsnap::units::Chunk;

    use super::super::one;
    use super::*;
    use crate::host::fake::Fake;
    use crate::replication::sums::Sums;

    /// Where the document could not be changed the sums stayed too, and the next cycle proved by them what differs.
    #[test]
    fn a_proof_is_taken_back_on_file_though_the_document_cannot_be_changed() {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        let volumes = one::replica(Arc::new(Fake::default()), &layout);
        let files = Files::of(&layout, "v");
        let snapshot = Uuid::from_u128(0xaa);
        let verify = |way| Verify {
            volumes: volumes.clone(),
            layout: layout.clone(),
            volume: "v".into(),
            way,
            send_again: false,
            node: "here".into(),
            found: Arc::default(),
        };
        for (way, noted) in [(Way::Push("elsewhere".into()), false), (Way::Pull, true)] {
            let sums = Sums::new(ChunkShift::MIN);
            files.save_sums(snapshot, &sums).expect("noted");
            let taken_back = verify(way).take_back(&files, snapshot);
            assert_eq!(taken_back.is_ok(), noted, "{taken_back:?}");
            assert_eq!(files.sums(snapshot).expect("read"), None);
        }
    }

    #[test]
    fn ranges_are_bytes_and_not_endless() {
        let run = |first, chunks| ChunkRun {
            first: Chunk(first),
            chunks,
        };
        let chunk = ChunkShift::new(12).expect("a size");
        assert_eq!(
            ranges(&[run(1, 2), run(4, 1)], 3, chunk, 18_000),
            ["bytes 4096 to 12287 differ", "bytes 16384 to 17999 differ"]
        );
        let many: Vec<ChunkRun> = (0..30).map(|n| run(n * 2, 1)).collect();
        let lines = ranges(&many, 5000, chunk, 1 << 30);
        assert_eq!(lines.len(), TOLD + 1);
        assert_eq!(lines[TOLD], "and 4980 chunks more");
    }
}
