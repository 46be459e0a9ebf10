// SPDX-License-Identifier: GPL-2.0-only
//! A revert as the server carries it out: when it may begin, what is kept away from it, and who hears of
//! it. What it does to the store is [`crate::store`]'s matter.
//!
//! A step writes to the origin behind the kernel's back. So no device may be up when a revert begins, and
//! none comes up before it has ended: IDENTIFY is not answered until then.
//!
//! - One of a *snapshot* would read from the origin what a step overwrites: the target keeps its own writes
//!   away from such reads, not the server's.
//! - That of the *origin* would show half a revert to who mounts it, and a write through it would be
//!   undone.
//!
//! There may be an origin's device all the same, from before the server was started anew, if an older
//! one began the revert beside it. A step therefore runs inside a barrier, which ends with `CREATED`: the
//! target forgets what is unique and asks before each write, and the engine refuses those that the
//! revert would undo.
//!
//! A revert found when the store was opened goes on at once, before devices are identified. It does not
//! end because its client goes away; only one that still checks the snapshot is given up then. What
//! hinders it (a full store, an origin that fails) is told once, and it is tried again.

use std::time::Duration;

use nix::errno::Errno;
use tracing::{error, info, warn};

use super::core::{ClientId, Core, Now, Output};
use super::engine::{Engine, EngineError};
use super::jobs::Waiter;
use super::refusal;
use crate::protocol::channel::{self, Ask};
use crate::protocol::control::{ChannelState, Reply};
use crate::store::{RevertError, Reverting};
use crate::units::SnapTag;

/// How long a step is to hold others up at most, and half of it.
const STEP_MOST: Duration = Duration::from_millis(60);
const STEP_LEAST: Duration = Duration::from_millis(20);
/// The most chunks of a step, and bytes if they are large.
const MOST_CHUNKS: usize = 256;
const MOST_BYTES: u64 = 1 << 20;
const FIRST_CHUNKS: usize = 8;
/// What hindered a revert may have gone after so long.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// A revert, if there is one.
#[derive(Debug, Default)]
pub(super) struct Revert {
    under_way: Option<(SnapTag, Phase)>,
    waiters: Vec<Waiter>,
    /// Devices that wait to be identified.
    held: Vec<channel::Request>,
    /// Those that need not wait any longer.
    released: Vec<channel::Request>,
    /// Something hinders it; when to try again.
    retry_at: Option<Duration>,
    /// Chunks of a step: as many as keep it short on this machine.
    chunks: usize,
    /// When the last step began.
    stepped_at: Option<Duration>,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// Nothing has been changed; it may still be refused.
    Checking,
    /// It goes on to the end, whatever happens.
    Writing,
}

impl Revert {
    /// What was found when the store was opened.
    pub fn found(tag: Option<SnapTag>) -> Revert {
        if let Some(tag) = tag {
            info!("the revert to snapshot {tag} goes on");
        }
        Revert {
            under_way: tag.map(|tag| (tag, Phase::Writing)),
            ..Revert::default()
        }
    }

    /// The snapshot that the origin is becoming.
    pub fn writing(&self) -> Option<SnapTag> {
        match self.under_way {
            Some((tag, Phase::Writing)) => Some(tag),
            _ => None,
        }
    }

    /// When the next of those who wait is to hear, or what hinders it may have gone.
    pub fn deadlines(&self) -> impl Iterator<Item = Duration> + '_ {
        let tell = self.waiters.iter().map(|waiter| waiter.tell_at);
        tell.chain(self.retry_at)
    }

    /// A step may begin; gives how many chunks it is to have.
    fn begin_step(&mut self, now: Now, chunk_bytes: u64) -> usize {
        let most = MOST_CHUNKS.min((MOST_BYTES / chunk_bytes) as usize).max(1);
        let chunks = match self.stepped_at.replace(now.monotonic) {
            None => FIRST_CHUNKS,
            Some(at) => match now.monotonic.saturating_sub(at) {
                took if took > STEP_MOST => self.chunks / 2,
                took if took < STEP_LEAST => self.chunks * 2,
                _ => self.chunks,
            },
        };
        self.chunks = chunks.clamp(1, most);
        self.chunks
    }
}

impl<E: Engine> Core<E> {
    /// A client wants a revert. All devices are known.
    pub(super) fn start_revert(
        &mut self,
        now: Now,
        client: ClientId,
        tag: SnapTag,
        out: &mut Output,
    ) {
        match self.jobs.revert.under_way {
            // Who asks for what is under way waits for its end.
            Some((other, _)) if other == tag => {}
            Some((other, _)) => {
                return out.client(client, refused(&RevertError::UnderWay(other)));
            }
            None => {
                if let Some(reply) = self.begin_revert(tag) {
                    return out.client(client, reply);
                }
            }
        }
        self.jobs.revert.waiters.push(Waiter::new(now, client));
    }

    /// Begins to check the snapshot; gives back why not, if it does not.
    fn begin_revert(&mut self, tag: SnapTag) -> Option<Reply> {
        if let Some(reply) = self.devices_in_the_way() {
            return Some(reply);
        }
        if self.jobs.is_resizing() {
            let reason = "a resize is under way".to_owned();
            return Some(refusal::with_errno(Errno::EBUSY, reason));
        }
        match self.engine.revert_begin(tag) {
            Ok(Ok(())) => {
                self.jobs.revert.under_way = Some((tag, Phase::Checking));
                None
            }
            Ok(Err(why)) => Some(refused(&why)),
            Err(broken) => Some(self.failed(&broken)),
        }
    }

    /// Nobody may use the origin, nor read a snapshot, while the server writes to the origin.
    fn devices_in_the_way(&self) -> Option<Reply> {
        if self.origin_is_shown() {
            let reason = "the device of the origin exists; unmount and remove it first".to_owned();
            return Some(refusal::with_errno(Errno::EBUSY, reason));
        }
        let shown = self.shown_snapshots();
        let shown: Vec<String> = shown.iter().map(ToString::to_string).collect();
        let reason = match &shown[..] {
            [] => return None,
            [one] => format!("the device of snapshot {one} exists; remove it first"),
            all => format!(
                "devices of the snapshots {} exist; remove them first",
                all.join(", ")
            ),
        };
        Some(refusal::with_errno(Errno::EBUSY, reason))
    }

    /// Whether a step can be done, or begun, now.
    pub(super) fn revert_wants_step(&self) -> bool {
        let revert = &self.jobs.revert;
        let Some((_, phase)) = revert.under_way else {
            return false;
        };
        if self.fault.is_some() {
            return !revert.waiters.is_empty();
        }
        let quiet = self.channel == ChannelState::Absent
            || self.channel == ChannelState::Attached && !self.in_barrier();
        revert.retry_at.is_none() && (phase == Phase::Checking || quiet)
    }

    /// Does a step, or begins the barrier for one.
    pub(super) fn revert_step(&mut self, now: Now, out: &mut Output) {
        if !self.revert_wants_step() {
            return;
        }
        if self.fault.is_some() {
            let reply = self.fault_reply();
            return self.tell_waiters(&reply, out);
        }
        match self.jobs.revert.under_way {
            Some((tag, Phase::Checking)) => self.check_step(now, tag, out),
            _ if self.channel == ChannelState::Attached => self.begin_step_barrier(now, out),
            _ => self.revert_write_step(now, out),
        }
    }

    fn engine_step(&mut self, now: Now) -> Result<Result<Reverting, RevertError>, EngineError> {
        let chunk_bytes = self.engine.status().chunk.bytes();
        let chunks = self.jobs.revert.begin_step(now, chunk_bytes);
        self.engine.revert_step(chunks)
    }

    fn check_step(&mut self, now: Now, tag: SnapTag, out: &mut Output) {
        let why = match self.engine_step(now) {
            Ok(Ok(Reverting::Checked)) => {
                // Devices may have come up while the snapshot was checked.
                match self.devices_in_the_way().or_else(|| self.start_writing()) {
                    None => {
                        info!("the origin is being reverted to snapshot {tag}");
                        self.jobs.revert.under_way = Some((tag, Phase::Writing));
                        // Writing is slower than checking: how slow has to be found out.
                        self.jobs.revert.stepped_at = None;
                        return;
                    }
                    Some(reply) => reply,
                }
            }
            Ok(Ok(_)) => return,
            Ok(Err(why)) => refused(&why),
            Err(broken) => self.failed(&broken),
        };
        self.engine.revert_cancel();
        self.end_revert(now, &why, out);
    }

    fn start_writing(&mut self) -> Option<Reply> {
        match self.engine.revert_start() {
            Ok(Ok(())) => None,
            Ok(Err(why)) => Some(refused(&why)),
            Err(broken) => Some(self.failed(&broken)),
        }
    }

    /// A step of the second phase. No origin write is in flight, and no snapshot is read.
    pub(super) fn revert_write_step(&mut self, now: Now, out: &mut Output) {
        let Some(tag) = self.jobs.revert.writing() else {
            return;
        };
        let hindered = match self.engine_step(now) {
            Ok(Ok(Reverting::Done { skipped })) => {
                match skipped {
                    0 => info!("the origin has the content of snapshot {tag}"),
                    _ => error!(
                        "the origin has the content of snapshot {tag} but for {skipped} chunks"
                    ),
                }
                return self.end_revert(now, &Reply::Reverted { skipped }, out);
            }
            Ok(Ok(_)) => return,
            Ok(Err(why)) => {
                warn!("the revert to snapshot {tag} waits: {why}");
                refused(&why)
            }
            Err(broken) => {
                // The reply says what failed; `broken` has logged it.
                match self.failed(&broken) {
                    Reply::Error { errno, .. } if !broken.latched => {
                        let reason = format!("{broken}; it is tried again every second");
                        Reply::Error { errno, reason }
                    }
                    reply => reply,
                }
            }
        };
        self.jobs.revert.retry_at = Some(now.monotonic + RETRY_AFTER);
        self.tell_waiters(&hindered, out);
    }

    fn end_revert(&mut self, now: Now, reply: &Reply, out: &mut Output) {
        self.tell_waiters(reply, out);
        let released = std::mem::take(&mut self.jobs.revert.held);
        self.jobs.revert = Revert {
            released,
            ..Revert::default()
        };
        if !self.in_barrier() {
            self.release_devices(now, out);
        }
    }

    /// Identifies the devices that waited for a revert which has ended.
    pub(super) fn release_devices(&mut self, now: Now, out: &mut Output) {
        let released = std::mem::take(&mut self.jobs.revert.released);
        if !released.is_empty() {
            self.requests(now, &released, out);
        }
    }

    fn tell_waiters(&mut self, reply: &Reply, out: &mut Output) {
        for waiter in std::mem::take(&mut self.jobs.revert.waiters) {
            out.client(waiter.client, reply.clone());
        }
    }

    /// Keeps a device waiting until the revert has ended, if there is one.
    ///
    /// Not the device of a snapshot that was identified before: there was none when the revert began, and were
    /// there one all the same, a squashed snapshot's chunks must not be taken for quiet.
    pub(super) fn hold_identify(&mut self, request: channel::Request) -> bool {
        let known = matches!(
            request.ask,
            Ask::Identify {
                snapshot: Some(_),
                returning: true,
                ..
            }
        );
        let hold = self.jobs.revert.writing().is_some() && !known;
        if hold {
            self.jobs.revert.held.push(request);
        }
        hold
    }

    /// The channel is gone, and with it the devices' requests: they are made again.
    pub(super) fn revert_lost(&mut self) {
        self.jobs.revert.held.clear();
        self.jobs.revert.released.clear();
    }

    /// Time has passed.
    pub(super) fn revert_tick(&mut self, now: Now, out: &mut Output) {
        let revert = &mut self.jobs.revert;
        revert.retry_at = revert.retry_at.filter(|&at| at > now.monotonic);
        let progress = self.engine.revert_progress();
        for waiter in &mut revert.waiters {
            waiter.tell(now, progress, out);
        }
    }

    /// A client has gone. Nobody waits for a revert that was not begun: then it is not.
    pub(super) fn revert_client_gone(&mut self, client: ClientId) {
        let revert = &mut self.jobs.revert;
        revert.waiters.retain(|waiter| waiter.client != client);
        let checking = matches!(revert.under_way, Some((_, Phase::Checking)));
        if checking && revert.waiters.is_empty() {
            revert.under_way = None;
            self.engine.revert_cancel();
        }
    }
}

fn refused(why: &RevertError) -> Reply {
    let errno = match why {
        RevertError::NoSuchSnapshot(_) => {
            return refusal::with_errno(Errno::ENOENT, "snapshot doesn't exist".to_owned());
        }
        RevertError::Squashed(_) | RevertError::Damaged { .. } => Errno::EIO,
        RevertError::Longer { .. } | RevertError::Bookmark(_) | RevertError::NotBegun => {
            Errno::EINVAL
        }
        RevertError::UnderWay(_) => Errno::EBUSY,
        RevertError::NoRoom { .. } | RevertError::StoreFull => Errno::ENOSPC,
    };
    refusal::with_errno(errno, why.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_as_long_as_the_machine_is_fast() {
        let mut revert = Revert::default();
        let mut at = Duration::ZERO;
        let mut after = |ms: u64, revert: &mut Revert| {
            at += Duration::from_millis(ms);
            let now = Now {
                monotonic: at,
                unix: 0,
            };
            revert.begin_step(now, 4096)
        };
        let found = [0, 5, 10, 40, 100, 19, 200, 200, 200, 200, 200, 200, 1]
            .map(|ms| after(ms, &mut revert));
        assert_eq!(found, [8, 16, 32, 32, 16, 32, 16, 8, 4, 2, 1, 1, 2]);
        for _ in 0..20 {
            assert!(after(1, &mut revert) <= MOST_CHUNKS);
        }
        // One chunk is the least, however large it is.
        let now = Now {
            monotonic: at,
            unix: 0,
        };
        assert_eq!(revert.begin_step(now, 1 << 20), 1);
    }
}
