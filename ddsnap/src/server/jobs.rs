// SPDX-License-Identifier: GPL-2.0-only
//! Commands that take long: they are carried out in small steps between requests, and their clients
//! hear now and then how far they are.

use std::time::Duration;

use nix::errno::Errno;
use tracing::{info, warn};

use super::core::{ClientId, Core, Now, Output};
use super::engine::Engine;
use super::refusal;
use super::revert::Revert;
use super::scrub::ScrubJob;
use crate::protocol::control::Reply;
use crate::store::{ResizeError, ResizeRequest, Sizes};
use crate::units::SnapTag;

/// How often a client is told that its command is still under way.
pub(super) const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// The long commands under way.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    resize: Option<Waiter>,
    pub revert: Revert,
    pub scrub: Option<ScrubJob>,
}

/// A client that waits for a long command.
#[derive(Clone, Copy, Debug)]
pub(super) struct Waiter {
    pub client: ClientId,
    /// When it is to hear the next time.
    pub tell_at: Duration,
}

impl Waiter {
    pub fn new(now: Now, client: ClientId) -> Waiter {
        let tell_at = now.monotonic + PROGRESS_EVERY;
        Waiter { client, tell_at }
    }

    /// Tells how far the command is, if it is time.
    pub fn tell(&mut self, now: Now, progress: (u64, u64), out: &mut Output) {
        if now.monotonic >= self.tell_at {
            self.tell_at = now.monotonic + PROGRESS_EVERY;
            let (done, total) = progress;
            out.client(self.client, Reply::Progress { done, total });
        }
    }
}

impl Jobs {
    /// None but a revert found when the store was opened.
    pub fn new(reverting: Option<SnapTag>) -> Jobs {
        Jobs {
            revert: Revert::found(reverting),
            ..Jobs::default()
        }
    }

    pub fn is_resizing(&self) -> bool {
        self.resize.is_some()
    }

    /// When [`Core::jobs_tick`] is due.
    pub fn deadlines(&self) -> impl Iterator<Item = Duration> + '_ {
        let resize = self.resize.iter().map(|waiter| waiter.tell_at);
        let scrub = self.scrub.iter().flat_map(ScrubJob::deadlines);
        resize.chain(self.revert.deadlines()).chain(scrub)
    }
}

impl<E: Engine> Core<E> {
    /// Whether a long command can go on now.
    pub(super) fn jobs_want_steps(&self) -> bool {
        self.jobs.resize.is_some()
            || self.revert_wants_step()
            || self.jobs.scrub.as_ref().is_some_and(ScrubJob::wants_step)
    }

    /// Does a step of each long command that can go on.
    pub(super) fn jobs_step(&mut self, now: Now, out: &mut Output) {
        self.resize_step(now, out);
        self.revert_step(now, out);
        self.scrub_step(now, out);
    }

    /// Tells those who wait how far their commands are.
    pub(super) fn jobs_tick(&mut self, now: Now, out: &mut Output) {
        if let Some(waiter) = &mut self.jobs.resize {
            waiter.tell(now, self.engine.resize_progress(), out);
        }
        self.revert_tick(now, out);
        if let Some(job) = &mut self.jobs.scrub {
            job.tick(now, out);
        }
    }

    /// A client has gone.
    pub(super) fn jobs_client_gone(&mut self, client: ClientId) {
        self.revert_client_gone(client);
        // Nobody would hear what a scrub finds.
        self.jobs.scrub.take_if(|job| job.is_of(client));
    }

    /// A client has taken all that was sent to it.
    pub(super) fn jobs_client_took(&mut self, client: ClientId) {
        if let Some(job) = self.jobs.scrub.as_mut().filter(|job| job.is_of(client)) {
            job.taken();
        }
    }

    pub(super) fn start_resize(
        &mut self,
        now: Now,
        client: ClientId,
        request: &ResizeRequest,
        out: &mut Output,
    ) {
        if self.fault.is_some() {
            return out.client(client, self.fault_reply());
        }
        if self.jobs.resize.is_some() {
            let reason = "another resize is under way".to_owned();
            return out.client(client, refusal::with_errno(Errno::EBUSY, reason));
        }
        match self.engine.resize_begin(request) {
            Ok(Ok(())) => self.jobs.resize = Some(Waiter::new(now, client)),
            Ok(Err(refused @ ResizeError::TwoValues)) => {
                let reply = refusal::with_errno(Errno::EINVAL, refused.to_string());
                out.client(client, reply);
            }
            Ok(Err(refused)) => {
                let reply = resized(self.engine.sizes(), refused.to_string());
                out.client(client, reply);
            }
            Err(broken) => {
                let reply = self.failed(&broken);
                out.client(client, reply);
            }
        }
    }

    fn resize_step(&mut self, now: Now, out: &mut Output) {
        let Some(waiter) = self.jobs.resize.take() else {
            return;
        };
        let reply = match self.engine.resize_step() {
            Ok(Ok(None)) => {
                self.jobs.resize = Some(waiter);
                return;
            }
            Ok(Ok(Some(sizes))) => {
                info!(
                    "sizes in bytes are now: origin {}, store {}, metadata {}",
                    sizes.origin, sizes.store, sizes.meta
                );
                self.more_room(now, out);
                resized(sizes, String::new())
            }
            Ok(Err(refused)) => {
                warn!("no resize: {refused}");
                resized(self.engine.sizes(), refused.to_string())
            }
            Err(broken) => self.failed(&broken),
        };
        out.client(waiter.client, reply);
    }
}

fn resized(sizes: Sizes, refused: String) -> Reply {
    let Sizes {
        origin,
        store,
        meta,
    } = sizes;
    Reply::Resized {
        origin,
        store,
        meta,
        refused,
    }
}
