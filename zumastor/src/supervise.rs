// SPDX-License-Identifier: GPL-2.0-only
//! Keeps the agent and the server of one volume running.
//!
//! Independent of the operations on the volume on purpose: a mount that waits for I/O must not keep
//! a dead server from being restarted, or the two would wait for each other until the kernel gives
//! up. So there is one lock for the processes, held only while one is started or stopped, and a
//! thread that waits for the end of either through pidfds. Another thread asks the server now and then
//! whether it still answers: one that was stopped or runs in a circle is ended, so that the next one gets
//! what waits for it before the kernel gives it up. An agent that was stopped is let go on: the next server
//! would wait for its word.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use ddsnap::stdio::complain;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use uuid::Uuid;

use crate::host::{Host, PROBE_DEADLINE, Probe};
use crate::machine::{Kind, ProcessSpec};
use crate::refusal::{OTHER_STORE, Refusal};

const FIRST_DELAY: Duration = Duration::from_secs(1);
const LONGEST_DELAY: Duration = Duration::from_secs(30);
/// A process that lived this long starts with the first delay again.
const GOOD_LIFE: Duration = Duration::from_secs(60);

/// How often a server is asked whether it answers.
const PROBE_EVERY: Duration = Duration::from_secs(5);
/// So many times in a row without an answer, and a server is ended: half a minute, half of what the kernel waits.
const SILENT_MOST: u32 = 2;

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
        }
    }
}

/// The agent and the server of a volume.
pub struct Supervisor {
    host: Arc<dyn Host>,
    volume: String,
    /// Where the server takes commands.
    socket: PathBuf,
    charges: Mutex<[Charge; 2]>,
    /// That of the agent's charge, for who must not wait for the lock.
    agent: ProcessSpec,
    /// The device that has the store's superblock.
    store: PathBuf,
    /// Which store it should be, once that is known.
    expected: Mutex<Option<Uuid>>,
    /// What is wrong with each, for who asks while one is being started, which may take minutes.
    troubles: Mutex<[Option<String>; 2]>,
    /// The server runs and does not answer.
    silence: Mutex<Option<String>>,
    wake: EventFd,
}

impl Drop for Supervisor {
    fn drop(&mut self) {
        self.wake();
    }
}

impl Supervisor {
    /// Nothing is started and nobody watches yet. `store`: the device with the store's superblock, and which store that
    /// should be, if it is known.
    pub fn new(
        host: Arc<dyn Host>,
        volume: &str,
        agent: ProcessSpec,
        server: ProcessSpec,
        socket: &Path,
        store: (&Path, Option<Uuid>),
    ) -> Result<Arc<Supervisor>> {
        let wake = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        let charges = Mutex::new([Charge::new(agent.clone()), Charge::new(server)]);
        Ok(Arc::new(Supervisor {
            host,
            volume: volume.to_string(),
            socket: socket.to_path_buf(),
            charges,
            agent,
            store: store.0.to_path_buf(),
            expected: Mutex::new(store.1),
            troubles: Mutex::default(),
            silence: Mutex::default(),
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
        self.start_with(kind, None)
    }

    /// As [`start`](Self::start), with an option for this one start.
    pub fn start_with(&self, kind: Kind, option: Option<&str>) -> Result<Option<u32>> {
        let mut charges = self.lock();
        let charge = &mut charges[kind as usize];
        let mut spec = charge.spec.clone();
        if let Some(option) = option {
            spec.argv.insert(2, option.into());
        }
        self.check_store(kind)?;
        let started = match self.host.find_process(&charge.spec)? {
            Some(_) => None,
            None => Some(self.host.start_process(&spec)?),
        };
        charge.wanted = true;
        charge.since = Some(Instant::now());
        charge.due = None;
        self.set_trouble(kind, None);
        self.wake();
        Ok(started)
    }

    /// From now on the server is let at this store only.
    pub fn expect_store(&self, uuid: Uuid) {
        *self.expected.lock().unwrap_or_else(PoisonError::into_inner) = Some(uuid);
    }

    /// Whether nothing of the store under the store's name speaks against starting a server.
    #[must_use]
    pub fn has_its_store(&self) -> bool {
        self.check_store(Kind::Server).is_ok()
    }

    /// Before a server may write to it: whether it is the volume's own store that lies under the store's name. What is no
    /// store at all the server itself refuses.
    fn check_store(&self, kind: Kind) -> Result<()> {
        let expected = *self.expected.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(expected) = expected.filter(|_| kind == Kind::Server) else {
            return Ok(());
        };
        match self.host.store_uuid(&self.store)? {
            Some(found) if found != expected => Err(Refusal {
                code: OTHER_STORE,
                text: format!(
                    "'{}' holds the snapshot store {found}, and that of volume '{1}' is {expected}; nothing was changed: \
                     give it back the device it had, then run `zumastor start volume {1}`, or run `zumastor forget volume \
                     {1}` and define it anew over this store",
                    self.store.display(),
                    self.volume
                ),
            }
            .into()),
            _ => Ok(()),
        }
    }

    /// Ends the server at once and starts the next, which recovers from what is on the disk. The kernel keeps the volume's questions
    /// waiting meanwhile. If the next one does not start it is tried again, as always.
    pub fn replace_server(&self) -> Result<()> {
        let spec = self.lock()[Kind::Server as usize].spec.clone();
        self.host.kill_process(&spec)?;
        self.start(Kind::Server).map(|_| ())
    }

    /// Stops a process and waits until it is gone.
    pub fn stop(&self, kind: Kind) -> Result<()> {
        let mut charges = self.lock();
        let charge = &mut charges[kind as usize];
        charge.wanted = false;
        self.set_trouble(kind, None);
        self.wake();
        self.host.stop_process(&charge.spec)
    }

    /// Whether the process runs now. Does not wait for one that is being started.
    pub fn is_running(&self, spec: &ProcessSpec) -> bool {
        matches!(self.host.find_process(spec), Ok(Some(_)))
    }

    /// Why a process could not be restarted, if one is down that should be up, or that it does not answer;
    /// does not wait.
    pub fn trouble(&self) -> Option<String> {
        let silence = self.silence.lock().unwrap_or_else(PoisonError::into_inner);
        if silence.is_some() {
            return silence.clone();
        }
        drop(silence);
        let troubles = self.troubles.lock();
        let troubles = troubles.unwrap_or_else(PoisonError::into_inner);
        troubles.iter().flatten().next().cloned()
    }

    fn set_trouble(&self, kind: Kind, text: Option<String>) {
        let troubles = self.troubles.lock();
        troubles.unwrap_or_else(PoisonError::into_inner)[kind as usize] = text;
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
        let weak = Arc::downgrade(self);
        let ask = move || {
            let mut silent = 0;
            while let Some(this) = weak.upgrade() {
                this.ask(&mut silent);
                drop(this);
                thread::park_timeout(PROBE_EVERY);
            }
        };
        thread::Builder::new()
            .name(format!("ask {}", self.volume))
            .spawn(ask)
            .context("could not start a thread")?;
        Ok(())
    }

    /// Asks the server whether it answers, and ends one that has not for too long. `silent`: how often in
    /// a row it has not.
    fn ask(&self, silent: &mut u32) {
        match self.host.resume_process(&self.agent) {
            Ok(None) => {}
            Ok(Some(pid)) => complain(format_args!(
                "{}: the agent (process {pid}) had been stopped; it goes on",
                self.volume
            )),
            Err(error) => complain(format_args!("{}: the agent: {error:#}", self.volume)),
        }
        // One is being started or stopped, perhaps in vain because of that agent.
        let charges = match self.charges.try_lock() {
            Ok(charges) => charges,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let charge = &charges[Kind::Server as usize];
        let spec = charge.wanted.then(|| charge.spec.clone());
        drop(charges);
        let probe = spec
            .as_ref()
            .map(|spec| self.host.probe_server(spec, &self.socket));
        let (
            Some(spec),
            Some(Probe::Silent {
                pid,
                uninterruptible,
            }),
        ) = (spec, probe)
        else {
            *silent = 0;
            self.set_silence(None);
            return;
        };
        *silent += 1;
        let seconds = PROBE_DEADLINE.as_secs();
        let mut text = format!("the server (process {pid}) has not answered for {seconds} s");
        if uninterruptible {
            // No signal ends it, and another server would wait for the same disk.
            text.push_str(": it waits for a disk that does not answer; see the kernel's log");
        }
        if *silent == 1 || uninterruptible {
            self.set_silence(Some(text));
            return;
        }
        if *silent >= SILENT_MOST {
            *silent = 0;
            // Not the lock of the processes: nothing waits for this, and a stop may be under way.
            let ended = self.host.kill_process(&spec);
            self.set_silence(Some(match ended {
                Ok(()) => format!("{text} and was ended; it is started again"),
                Err(error) => format!("{text} and could not be ended: {error:#}"),
            }));
        }
    }

    fn set_silence(&self, text: Option<String>) {
        let mut silence = self.silence.lock().unwrap_or_else(PoisonError::into_inner);
        if let (Some(text), true) = (&text, *silence != text) {
            complain(format_args!("{}: {text}", self.volume));
        }
        *silence = text;
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
                self.set_trouble(charge.spec.kind, None);
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
            self.set_trouble(charge.spec.kind, Some(text));
            now + delay
        });
        if now < due {
            return Err(due - now);
        }
        charge.since = Some(now);
        charge.due = None;
        let started = self.check_store(charge.spec.kind);
        match started.and_then(|()| self.host.start_process(&charge.spec)) {
            Ok(pid) => {
                complain(format_args!(
                    "{}: restarted the {what}, pid = {pid}",
                    self.volume
                ));
                self.set_trouble(charge.spec.kind, None);
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
                self.set_trouble(charge.spec.kind, Some(text));
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

    const SOCKET: &str = "/run/v";

    fn supervisor_on(fake: &Arc<Fake>) -> Arc<Supervisor> {
        Supervisor::new(
            fake.clone(),
            "v",
            spec(Kind::Agent),
            spec(Kind::Server),
            SOCKET.as_ref(),
            ("/store".as_ref(), None),
        )
        .expect("new")
    }

    /// A stopped server was never noticed: status said "running", and writes waited without limit.
    #[test]
    fn a_server_that_does_not_answer_is_told_and_ended() {
        let fake = Arc::new(Fake::default());
        let supervisor = supervisor_on(&fake);
        let mut silent = 0;
        let ask = |silent: &mut u32, probe| {
            fake.state().probe = Some(probe);
            supervisor.ask(silent);
            supervisor.trouble().unwrap_or_default()
        };
        let stopped = Probe::Silent {
            pid: 7,
            uninterruptible: false,
        };
        let waiting = Probe::Silent {
            pid: 7,
            uninterruptible: true,
        };
        assert_eq!(ask(&mut silent, stopped), "", "not wanted, so not asked");
        supervisor.start(Kind::Server).expect("started");
        assert_eq!(ask(&mut silent, Probe::Answers), "");
        assert!(ask(&mut silent, waiting).contains("waits for a disk"));
        assert!(ask(&mut silent, waiting).contains("waits for a disk"));
        assert!(
            supervisor.is_running(&spec(Kind::Server)),
            "no signal would end it"
        );
        assert_eq!(ask(&mut silent, Probe::Answers), "");
        let text = ask(&mut silent, stopped);
        assert_eq!(text, "the server (process 7) has not answered for 10 s");
        assert!(
            supervisor.is_running(&spec(Kind::Server)),
            "once is not enough"
        );
        assert!(ask(&mut silent, stopped).ends_with("and was ended; it is started again"));
        assert!(!supervisor.is_running(&spec(Kind::Server)));
        assert_eq!(ask(&mut silent, Probe::Absent), "");
    }

    /// With its agent stopped, no server that was started after a crash got its turn, and the start held the lock.
    #[test]
    fn a_stopped_agent_goes_on_though_a_server_is_being_started() {
        let fake = Arc::new(Fake::default());
        let supervisor = supervisor_on(&fake);
        supervisor.start(Kind::Agent).expect("started");
        fake.state().stopped = Some(Kind::Agent);
        let starting = supervisor.lock();
        let mut silent = 1;
        supervisor.ask(&mut silent);
        assert_eq!(fake.state().stopped, None);
        assert_eq!(silent, 1, "nothing was found out about the server");
        drop(starting);
        supervisor.ask(&mut silent);
        assert_eq!(silent, 0);
    }

    /// Status said that a server was being restarted, and never why that failed.
    #[test]
    fn why_a_restart_failed_is_known_also_during_the_next_one() {
        let fake = Arc::new(Fake::default());
        let (agent, server) = (spec(Kind::Agent), spec(Kind::Server));
        let supervisor = Supervisor::new(
            fake.clone(),
            "v",
            agent,
            server,
            SOCKET.as_ref(),
            ("/store".as_ref(), None),
        );
        let supervisor = supervisor.expect("new");
        supervisor.start(Kind::Server).expect("started");
        assert_eq!(supervisor.trouble(), None);
        fake.kill(Kind::Server);
        fake.state().fail = Some("start server".into());
        supervisor.tend();
        let text = supervisor.trouble().expect("it is gone");
        assert_eq!(text, "the server is gone; restarting it in 1 s");
        supervisor.lock()[Kind::Server as usize].due = Some(Instant::now());
        supervisor.tend();
        let starting = supervisor.lock();
        let text = supervisor.trouble().expect("known");
        assert_eq!(text, "could not restart the server: start server failed");
        drop(starting);
        supervisor.stop(Kind::Server).expect("stopped");
        assert_eq!(supervisor.trouble(), None);
    }

    /// The disk under the store's name was another one when the server was started again.
    #[test]
    fn a_restart_is_not_let_at_another_store() {
        let fake = Arc::new(Fake::default());
        let dev = crate::machine::Dev { major: 8, minor: 1 };
        fake.state().devices.insert("/store".into(), dev);
        let (agent, server) = (spec(Kind::Agent), spec(Kind::Server));
        let known = ("/store".as_ref(), Some(crate::host::fake::STORE));
        let supervisor = Supervisor::new(fake.clone(), "v", agent, server, SOCKET.as_ref(), known);
        let supervisor = supervisor.expect("new");
        supervisor.start(Kind::Server).expect("started");
        fake.kill(Kind::Server);
        fake.state().store = Some(Uuid::from_u128(0xbad));
        supervisor.tend();
        supervisor.lock()[Kind::Server as usize].due = Some(Instant::now());
        supervisor.tend();
        assert!(!supervisor.is_running(&spec(Kind::Server)));
        let text = supervisor.trouble().expect("known");
        assert!(text.contains("holds the snapshot store"), "{text}");
    }

    #[test]
    fn a_dead_server_is_restarted_and_a_stopped_one_is_not() {
        let fake = Arc::new(Fake::default());
        let supervisor = supervisor_on(&fake);
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
