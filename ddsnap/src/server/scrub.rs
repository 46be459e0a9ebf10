// SPDX-License-Identifier: GPL-2.0-only
//! A scrub as the server carries it out: no faster than its client asks for, one step between two
//! looks at what others want, and not ahead of what the client takes of the findings.

use std::time::Duration;

use nix::errno::Errno;
use tracing::{info, warn};

use super::core::{ClientId, Core, Now, Output};
use super::engine::Engine;
use super::jobs::Waiter;
use super::refusal;
use crate::protocol::control::{BadChunk, Reply};
use crate::store::{Fault, Scrub};
use crate::units::ChunkShift;

/// The most bytes read in a step: a disk reads that in far less than 100 ms.
const STEP_BYTES: u64 = 1 << 20;
/// The most chunks read in a step, wherever they lie.
const STEP_CHUNKS: u64 = 16;

/// A scrub under way.
#[derive(Debug)]
pub(super) struct ScrubJob {
    scrub: Scrub,
    waiter: Waiter,
    /// Bytes a second; 0: as fast as it goes.
    rate: u64,
    /// When the next step may begin, if not at once.
    next_at: Option<Duration>,
    /// The client has not taken yet what was found.
    ahead: bool,
    bytes: u64,
    bad: u64,
}

impl ScrubJob {
    /// When it is to go on, or its client is to hear.
    pub fn deadlines(&self) -> impl Iterator<Item = Duration> {
        [self.waiter.tell_at].into_iter().chain(self.next_at)
    }

    pub fn wants_step(&self) -> bool {
        self.next_at.is_none() && !self.ahead
    }

    pub fn is_of(&self, client: ClientId) -> bool {
        self.waiter.client == client
    }

    /// The client has taken all that was sent to it.
    pub fn taken(&mut self) {
        self.ahead = false;
    }

    /// Time has passed.
    pub fn tick(&mut self, now: Now, out: &mut Output) {
        self.next_at = self.next_at.filter(|&at| at > now.monotonic);
        self.waiter.tell(now, self.scrub.progress(), out);
    }
}

impl<E: Engine> Core<E> {
    pub(super) fn start_scrub(&mut self, now: Now, client: ClientId, rate: u64, out: &mut Output) {
        if self.fault.is_some() {
            return out.client(client, self.fault_reply());
        }
        if self.jobs.scrub.is_some() {
            let reason = "another scrub is under way".to_owned();
            return out.client(client, refusal::with_errno(Errno::EBUSY, reason));
        }
        self.jobs.scrub = Some(ScrubJob {
            scrub: self.engine.scrub_begin(),
            waiter: Waiter::new(now, client),
            rate,
            next_at: None,
            ahead: false,
            bytes: 0,
            bad: 0,
        });
    }

    pub(super) fn scrub_step(&mut self, now: Now, out: &mut Output) {
        let Some(mut job) = self.jobs.scrub.take_if(|job| job.wants_step()) else {
            return;
        };
        let client = job.waiter.client;
        let chunk = self.engine.status().chunk;
        let found = match self.engine.scrub_step(&mut job.scrub, step_chunks(chunk)) {
            Ok(found) => found,
            Err(broken) => {
                let reply = self.failed(&broken);
                return out.client(client, reply);
            }
        };
        job.bytes += found.bytes;
        job.bad += found.bad.len() as u64;
        if !found.bad.is_empty() {
            let bad: Vec<BadChunk> = found.bad.iter().map(wire).collect();
            bad.iter().for_each(|bad| warn!("scrub: {bad}"));
            job.ahead = true;
            out.clients.push((client, Reply::bad_pages(bad)));
        }
        if job.scrub.is_finished() {
            let (bytes, bad) = (job.bytes, job.bad);
            info!("scrub: {bytes} bytes read, {bad} bad chunks");
            return out.client(client, Reply::Scrubbed { bytes, bad });
        }
        if job.rate > 0 {
            let pause = found.bytes as f64 / job.rate as f64;
            let pause = Duration::try_from_secs_f64(pause).unwrap_or(Duration::MAX / 2);
            job.next_at = Some(now.monotonic.saturating_add(pause)).filter(|_| !pause.is_zero());
        }
        self.jobs.scrub = Some(job);
    }
}

fn step_chunks(chunk: ChunkShift) -> usize {
    (STEP_BYTES / chunk.bytes()).clamp(1, STEP_CHUNKS) as usize
}

fn wire(bad: &crate::store::BadChunk) -> BadChunk {
    BadChunk {
        place: bad.place,
        chunk: bad.chunk,
        checksums: match bad.fault {
            Fault::Unreadable => None,
            Fault::Checksum { found, wanted } => Some((found, wanted)),
        },
        snapshots: bad.snapshots.clone(),
    }
}
