// SPDX-License-Identifier: GPL-2.0-only
//! Has snapshots taken when they are due by schedule.
//!
//! One thread, which sleeps until the next slot of any rotation, until somebody sets the clock, or until a
//! volume has changed. What is due is found out by the volume itself ([`crate::schedule`]): that this thread
//! wakes too often or too late does no harm.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ddsnap::stdio::complain;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};

use super::{Daemon, Handle, lock};
use crate::schedule::{self, Verdict};

/// What failed is tried again after so long.
const RETRY_AFTER: Duration = Duration::from_secs(60);
/// The time zone may change without anybody telling.
const LONGEST_SLEEP: Duration = Duration::from_secs(600);

/// Starts the thread.
pub fn watch(daemon: &Arc<Daemon>) -> Result<()> {
    let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
    let timer = TimerFd::new(ClockId::CLOCK_REALTIME, flags).context("could not make a timer")?;
    let daemon = daemon.clone();
    let run = move || {
        loop {
            let next = daemon.tick();
            if let Err(error) = sleep(&daemon, &timer, next) {
                complain(format_args!("the clock fails: {error:#}"));
                thread::park_timeout(RETRY_AFTER);
            }
        }
    };
    thread::Builder::new()
        .name("clock".into())
        .spawn(run)
        .context("could not start a thread")?;
    Ok(())
}

/// Waits until `next`, in seconds since 1970-01-01 UTC, or until there is a reason to look earlier.
fn sleep(daemon: &Daemon, timer: &TimerFd, next: Option<i64>) -> Result<()> {
    let cancel = TimerSetTimeFlags::TFD_TIMER_ABSTIME | TimerSetTimeFlags::TFD_TIMER_CANCEL_ON_SET;
    // Without a slot the timer still tells that the clock was set.
    let at = TimeSpec::seconds(next.unwrap_or(i64::from(u32::MAX)));
    match timer.set(Expiration::OneShot(at), cancel) {
        // Of the one before, when the clock was set since it was read: this one is set all the same, see
        // timerfd_settime(2).
        Ok(()) | Err(Errno::ECANCELED) => {}
        Err(error) => return Err(error).context("could not set a timer"),
    }
    let mut polled = [
        PollFd::new(timer.as_fd(), PollFlags::POLLIN),
        PollFd::new(daemon.clock.as_fd(), PollFlags::POLLIN),
    ];
    let retry = if daemon.awaits_retry() {
        RETRY_AFTER
    } else {
        LONGEST_SLEEP
    };
    let timeout = PollTimeout::try_from(retry.as_millis()).unwrap_or(PollTimeout::MAX);
    match poll(&mut polled, timeout) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => return Err(error).context("could not wait for a timer"),
    }
    // What woke us: all are answered by looking again. Neither blocks.
    let _ = daemon.clock.read();
    let _ = timer.wait();
    Ok(())
}

impl Daemon {
    /// Has the clock look again.
    pub(super) fn wake_clock(&self) {
        // Fails only when the counter is full, and then it is awake anyway.
        let _ = self.clock.write(1);
    }

    fn awaits_retry(&self) -> bool {
        let mut handles = self.handles().into_iter();
        handles.any(|(_, handle)| lock(&handle.retry_at).is_some())
    }

    /// Has all that is due be taken, each volume in a thread of its own. Gives back when to look again, in seconds
    /// since 1970-01-01 UTC.
    pub(super) fn tick(self: &Arc<Self>) -> Option<i64> {
        let now = self.host.now();
        let mut next: Option<i64> = None;
        for (name, handle) in self.handles() {
            let view = handle.view();
            let Some(config) = view
                .config
                .filter(|c| view.up && (c.master.is_some() || c.source.is_some()))
            else {
                continue;
            };
            let slot = schedule::next_wake(&config.schedule, &now);
            next = next.into_iter().chain(slot).min();
            let waits = |r| schedule::verdict(r, &now) == Verdict::Wait;
            if config.schedule.iter().all(waits) {
                continue;
            }
            let early = lock(&handle.retry_at).is_some_and(|at| Instant::now() < at);
            if early || handle.taking.swap(true, Ordering::SeqCst) {
                continue;
            }
            // Let go also if there is no thread, or if it panics.
            let taking = Taking(handle.clone());
            let this = self.clone();
            let thread = thread::Builder::new().name("due".into());
            let take = move || {
                this.take_due(&name, &taking.0);
                drop(taking);
                this.wake_clock();
            };
            if let Err(error) = thread.spawn(take) {
                complain(format_args!("no thread to take what is due: {error}"));
                *lock(&handle.retry_at) = Some(Instant::now() + RETRY_AFTER);
            }
        }
        next
    }

    fn take_due(&self, name: &str, handle: &Handle) {
        let result = self.with(name, |volume| {
            let now = self.host.now();
            volume.take_due(&now, &mut |_| ()).map(|_| ())
        });
        *lock(&handle.retry_at) = match result {
            Ok(()) => None,
            Err(error) => {
                complain(format_args!("{name}: {error:#}"));
                Some(Instant::now() + RETRY_AFTER)
            }
        };
    }
}

/// What is due on a volume is being taken, and not by two at a time.
struct Taking(Arc<Handle>);

impl Drop for Taking {
    fn drop(&mut self) {
        self.0.taking.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fake::Fake;
    use crate::layout::Layout;

    /// A timer that was not read woke the clock again and again.
    #[test]
    fn the_clock_wakes_at_its_time_or_when_it_is_told_to() {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        let daemon = Daemon::new(Arc::new(Fake::default()), layout).expect("new");
        let flags = TimerFlags::TFD_CLOEXEC | TimerFlags::TFD_NONBLOCK;
        let timer = TimerFd::new(ClockId::CLOCK_REALTIME, flags).expect("a timer");
        let readable = |timer: &TimerFd| {
            let mut polled = [PollFd::new(timer.as_fd(), PollFlags::POLLIN)];
            poll(&mut polled, PollTimeout::ZERO) == Ok(1)
        };
        let begin = Instant::now();
        // In the past, and told to.
        sleep(&daemon, &timer, Some(1)).expect("slept");
        assert!(!readable(&timer), "it has been read");
        daemon.wake_clock();
        sleep(&daemon, &timer, None).expect("slept");
        let soon = jiff::Timestamp::now().as_second() + 2;
        sleep(&daemon, &timer, Some(soon)).expect("slept");
        assert!(jiff::Timestamp::now().as_second() >= soon);
        assert!(begin.elapsed() < LONGEST_SLEEP / 2);
    }
}
