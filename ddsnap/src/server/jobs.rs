// SPDX-License-Identifier: GPL-2.0-only
//! Commands that take long: they are carried out in small steps between requests, and their clients
//! hear now and then how far they are.

use std::time::Duration;

use nix::errno::Errno;
use tracing::{info, warn};

use super::core::{ClientId, Core, Now, Output};
use super::engine::Engine;
use super::refusal;
use crate::protocol::control::Reply;
use crate::store::{ResizeError, ResizeRequest, Sizes};

/// How often a client is told that its command is still under way.
pub(super) const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// The long commands under way.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    resize: Option<Waiter>,
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
    /// Whether any of them can go on now.
    pub fn want_steps(&self) -> bool {
        self.resize.is_some()
    }
}

impl<E: Engine> Core<E> {
    /// Does a step of a long command, if there is one; says whether it did.
    pub(super) fn job_step(&mut self, now: Now, out: &mut Output) -> bool {
        self.resize_step(now, out)
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

    fn resize_step(&mut self, now: Now, out: &mut Output) -> bool {
        let Some(mut waiter) = self.jobs.resize.take() else {
            return false;
        };
        let reply = match self.engine.resize_step() {
            Ok(Ok(None)) => {
                waiter.tell(now, self.engine.resize_progress(), out);
                self.jobs.resize = Some(waiter);
                return true;
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
        true
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
