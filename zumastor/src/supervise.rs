// SPDX-License-Identifier: GPL-2.0-only
//! Keeps the agent and the server of one volume running.
//!
//! Independent of the operations on the volume on purpose: a mount that waits for I/O must not keep
//! a dead server from being restarted, or the two would wait for each other until the kernel gives
//! up. So there is one lock for the processes, held only while one is started or stopped, and a
//! thread that waits for the end of either through pidfds.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ddsnap::stdio::complain;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use crate::host::Host;
use crate::machine::{Kind, ProcessSpec};

const FIRST_DELAY: Duration = Duration::from_secs(1);
const LONGEST_DELAY: Duration = Duration::from_secs(30);
/// A process that lived this long starts with the first delay again.
const GOOD_LIFE: Duration = Duration::from_secs(60);

/// How long to wait before the next start: 1 s, doubling to 30 s.
#[derive(Clone, Copy, Debug, Default)]
pub struct Backoff {
    last: Option<Duration>,
}

impl Backoff {
    /// The delay after a process that lived for `lived` (zero if it did not start at all).
    pub fn next(&mut self, lived: Duration) -> Duration {
        let delay = match self.last {
            Some(last) if lived < GOOD_LIFE => (last * 2).min(LONGEST_DELAY),
            _ => FIRST_DELAY,
        };
        self.last = Some(delay);
        delay
    }
}

/// One of the two processes.
struct Charge {
    spec: ProcessSpec,
    wanted: bool,
    /// Since when it runs, as far as we know.
    since: Option<Instant>,
    /// When to try again.
    due: Option<Instant>,
    backoff: Backoff,
    /// Why the last start failed.
    trouble: Option<String>,
}

impl Charge {
    fn new(spec: ProcessSpec) -> Charge {
        let backoff = Backoff::default();
        Charge {
            spec,
            wanted: false,
            since: None,
            due: None,
            backoff,
            trouble: None,
        }
    }
}

/// The agent and the server of a volume.
pub struct Supervisor {
    host: Arc<dyn Host>,
    volume: String,
    charges: Mutex<[Charge; 2]>,
    wake: EventFd,
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.wake();
    }
}

impl Supervisor {
    /// Nothing is started and nobody watches yet.
    pub fn new(
        host: Arc<dyn Host>,
        volume: &str,
        agent: ProcessSpec,
        server: ProcessSpec,
    ) -> Result<Arc<Supervisor>> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let charges = Mutex::new([Charge::new(agent), Charge::new(server)]);
        Ok(Arc::new(Supervisor {
            host,
            volume: volume.to_string(),
            charges,
            wake,
        }))
    }

    fn lock(&self) -> MutexGuard<'_, [Charge; 2]> {
        // Each change of the state is a single assignment: a panic elsewhere leaves it usable.
        self.charges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process if it does not run, and watches it from now on. Returns the number of a
    /// process that was started, `None` for one that was adopted.
    pub fn start(&self, kind: Kind) -> Result<Option<u32>> {
        let mut charges = self.lock();
        let charge = &mut charges[kind as usize];
        let started = match self.host.find_process(&charge.spec)? {
            Some(_) => None,
            None => Some(self.host.start_process(&charge.spec)?),
        };
        charge.wanted = true;
        charge.since = Some(Instant::now());
        charge.due = None;
        charge.trouble = None;
        self.wake();
        Ok(started)
    }

    /// Stops a process and waits until it is gone.
    pub fn stop(&self, kind: Kind) -> Result<()> {
        let mut charges = self.lock();
        let charge = &mut charges[kind as usize];
        charge.wanted = false;
        charge.trouble = None;
        self.wake();
        self.host.stop_process(&charge.spec)
    }

    /// Whether the process runs now. Does not wait for one that is being started.
    pub fn is_running(&self, spec: &ProcessSpec) -> bool {
        matches!(self.host.find_process(spec), Ok(Some(_)))
    }

    /// Why a process could not be restarted, if one is down that should be up; does not wait.
    pub fn trouble(&self) -> Option<String> {
        let charges = self.charges.try_lock().ok()?;
        charges
            .iter()
            .filter(|c| c.wanted)
            .find_map(|c| c.trouble.clone())
    }

    fn wake(&self) {
        // Fails only when the counter is full, and then the other side wakes anyway.
        let _ = self.wake.write(1);
    }

    /// Nothing is wanted any more. The watching thread ends once the volume itself is gone.
    pub fn release(&self) {
        for charge in self.lock().iter_mut() {
            charge.wanted = false;
        }
        self.wake();
    }

    /// Starts the thread that restarts what dies.
    pub fn watch(self: &Arc<Self>) -> Result<()> {
        let weak = Arc::downgrade(self);
        let wake = self.wake.as_fd().try_clone_to_owned()?;
        let name = format!("watch {}", self.volume);
        let run = move || {
            while let Some(this) = weak.upgrade() {
                let (fds, timeout) = this.tend();
                // Not held while waiting, so that the volume can go.
                drop(this);
                wait(&wake, &fds, timeout);
            }
        };
        thread::Builder::new()
            .name(name)
            .spawn(run)
            .context("could not start a thread")?;
        Ok(())
    }

    /// Restarts what is due. Returns what to wait for and for how long.
    fn tend(&self) -> (Vec<OwnedFd>, Option<Duration>) {
        let _ = self.wake.read();
        let mut fds = Vec::new();
        let mut timeout: Option<Duration> = None;
        for charge in self.lock().iter_mut().filter(|c| c.wanted) {
            match self.tend_one(charge) {
                Ok(fd) => fds.push(fd),
                Err(delay) => timeout = Some(timeout.map_or(delay, |t| t.min(delay))),
            }
        }
        (fds, timeout)
    }

    /// A descriptor for the end of the process, or the time until it should be looked at again.
    fn tend_one(&self, charge: &mut Charge) -> Result<OwnedFd, Duration> {
        if let Ok(Some(pid)) = self.host.find_process(&charge.spec) {
            if let Ok(fd) = self.host.exit_fd(pid) {
                charge.due = None;
                charge.trouble = None;
                return Ok(fd);
            }
        }
        let now = Instant::now();
        let what = match charge.spec.kind {
            Kind::Agent => "agent",
            Kind::Server => "server",
        };
        let due = *charge.due.get_or_insert_with(|| {
            let lived = charge.since.map_or(Duration::ZERO, |since| now - since);
            let delay = charge.backoff.next(lived);
            let text = format!("the {what} is gone; restarting it in {} s", delay.as_secs());
            complain(format_args!("{}: {text}", self.volume));
            charge.trouble = Some(text);
            now + delay
        });
        if now < due {
            return Err(due - now);
        }
        charge.since = Some(now);
        charge.due = None;
        match self.host.start_process(&charge.spec) {
            Ok(pid) => {
                complain(format_args!(
                    "{}: restarted the {what}, pid = {pid}",
                    self.volume
                ));
                charge.trouble = None;
                self.host.exit_fd(pid).map_err(|_| FIRST_DELAY)
            }
            Err(error) => {
                let delay = charge.backoff.next(Duration::ZERO);
                let text = format!("could not restart the {what}: {error:#}");
                complain(format_args!(
                    "{}: {text}; trying again in {} s",
                    self.volume,
                    delay.as_secs()
                ));
                charge.trouble = Some(text);
                charge.due = Some(now + delay);
                Err(delay)
            }
        }
    }
}

/// Waits until one of the descriptors is readable or the time is over.
fn wait(wake: &OwnedFd, fds: &[OwnedFd], timeout: Option<Duration>) {
    let all = std::iter::once(wake).chain(fds);
    let mut polled: Vec<_> = all
        .map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN))
        .collect();
    let timeout = timeout.map_or(PollTimeout::NONE, |t| {
        PollTimeout::try_from(t.as_millis().max(1)).unwrap_or(PollTimeout::MAX)
    });
    if let Err(error) = poll(&mut polled, timeout) {
        // Interrupted: look again, as after any event.
        if error != Errno::EINTR {
            complain(format_args!("waiting for processes failed: {error}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::fake::Fake;
    use std::path::PathBuf;

    #[test]
    fn the_back_off_doubles_to_a_bound_and_resets() {
        let mut backoff = Backoff::default();
        let seconds = |b: &mut Backoff, lived| b.next(Duration::from_secs(lived)).as_secs();
        let row: Vec<u64> = (0..7).map(|_| seconds(&mut backoff, 5)).collect();
        assert_eq!(row, [1, 2, 4, 8, 16, 30, 30]);
        assert_eq!(seconds(&mut backoff, 60), 1);
    }

    fn spec(kind: Kind) -> ProcessSpec {
        let argv = vec!["ddsnap".into(), format!("{kind:?}").into()];
        ProcessSpec {
            kind,
            argv,
            pidfile: PathBuf::from(format!("/{kind:?}.pid")),
        }
    }

    #[test]
    fn a_dead_server_is_restarted_and_a_stopped_one_is_not() {
        let fake = Arc::new(Fake::default());
        let supervisor =
            Supervisor::new(fake.clone(), "v", spec(Kind::Agent), spec(Kind::Server)).expect("new");
        assert!(supervisor.start(Kind::Server).expect("started").is_some());
        assert!(supervisor.start(Kind::Server).expect("adopted").is_none());
        supervisor.watch().expect("a thread");
        fake.kill(Kind::Server);
        let end = Instant::now() + Duration::from_secs(10);
        while !supervisor.is_running(&spec(Kind::Server)) {
            assert!(Instant::now() < end, "not restarted");
            thread::sleep(Duration::from_millis(20));
        }
        supervisor.stop(Kind::Server).expect("stopped");
        let (fds, timeout) = supervisor.tend();
        assert!(fds.is_empty() && timeout.is_none(), "nothing more to watch");
        assert!(!supervisor.is_running(&spec(Kind::Server)));
    }
}
