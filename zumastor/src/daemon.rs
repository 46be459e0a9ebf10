// SPDX-License-Identifier: GPL-2.0-only
//! The daemon: the one owner of every change of state.
//!
//! One lock per volume serialises changes of its state, so different volumes never wait for each
//! other. It is held for seconds; what takes longer is a [job](crate::jobs). `status` takes no such lock: it reads the [`View`] that each operation publishes when it
//! ends. Agents, servers, mounts and devices outlive the daemon; a new one observes and adopts them.
//!
//! Life: directories, lock, socket, then all volumes at once, each in a thread of its own, then
//! READY. SIGTERM takes all volumes down; SIGUSR2 ends the daemon alone, for upgrades. Either interrupts jobs
//! first.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions, Permissions};
use std::os::fd::AsFd;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ddsnap::stdio::complain;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::mman::{MlockAllFlags, mlockall};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use crate::boot;
use crate::config;
use crate::host::Host;
use crate::jobs::{Ending, Jobs};
use crate::layout::Layout;
use crate::machine::{DM_UUID_PREFIX, DmDevice};
use crate::names;
use crate::replicate::by_hand::NAME as RECEIVE_BY_HAND;
use crate::shutdown;
use crate::status::View;
use crate::status::replication::NextCycle;
use crate::supervise::Supervisor;
use crate::uevents::{self, Occasion};
use crate::volume::{self, Volume};

mod by_hand;
mod clock;
mod failover;
mod notify;
mod periods;
mod requests;
mod streams;
mod verify;

/// Time given to volumes to come up or go down before systemd hears that it takes longer.
const PATIENCE: Duration = Duration::from_secs(20);

/// Time given to jobs to end when they are interrupted or cancelled.
const JOB_PATIENCE: Duration = Duration::from_secs(30);

/// A volume and what is known of it without waiting.
pub struct Handle {
    volume: Mutex<Option<Volume>>,
    view: Mutex<View>,
    /// Of the volume, to be asked while an operation has it.
    supervisor: Mutex<Option<Arc<Supervisor>>>,
    /// An event may help it up.
    waits: AtomicBool,
    retry_queued: AtomicBool,
    /// Snapshots by schedule are being taken.
    taking: AtomicBool,
    /// They failed; when to try again.
    retry_at: Mutex<Option<Instant>>,
}

impl Handle {
    fn new(view: View) -> Arc<Handle> {
        Arc::new(Handle {
            volume: Mutex::new(None),
            view: Mutex::new(view),
            supervisor: Mutex::default(),
            waits: AtomicBool::new(false),
            retry_queued: AtomicBool::new(false),
            taking: AtomicBool::new(false),
            retry_at: Mutex::default(),
        })
    }

    fn view(&self) -> View {
        lock(&self.view).clone()
    }

    /// What the supervisor of agent and server has to say.
    fn trouble(&self) -> Option<String> {
        lock(&self.supervisor).as_ref()?.trouble()
    }

    fn publish(&self, volume: &Volume) {
        *lock(&self.supervisor) = Some(volume.supervisor.clone());
        *lock(&self.view) = View::of(volume);
        self.waits.store(volume.waits(), Ordering::SeqCst);
    }
}

/// A lock whose holder panicked is still good: views are replaced whole, and a volume observes the
/// machine before each operation.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The daemon's state.
pub struct Daemon {
    host: Arc<dyn Host>,
    layout: Layout,
    volumes: Mutex<BTreeMap<String, Arc<Handle>>>,
    jobs: Arc<Jobs>,
    /// Wakes the clock.
    clock: EventFd,
    /// Which cycles come by themselves, and when: by volume.
    due: Mutex<Vec<(String, NextCycle)>>,
}

impl Daemon {
    /// A daemon without volumes.
    ///
    /// # Errors
    /// There are no descriptors left.
    pub fn new(host: Arc<dyn Host>, layout: Layout) -> Result<Arc<Daemon>> {
        Ok(Arc::new(Daemon {
            host,
            layout,
            volumes: Mutex::default(),
            jobs: Jobs::new(),
            due: Mutex::default(),
            clock: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        }))
    }

    fn handles(&self) -> Vec<(String, Arc<Handle>)> {
        lock(&self.volumes)
            .iter()
            .map(|(n, h)| (n.clone(), h.clone()))
            .collect()
    }

    /// Has all jobs of a volume end.
    fn end_jobs(&self, volume: &str, why: Ending) -> Result<()> {
        self.jobs.end_and_wait(volume, None, why, JOB_PATIENCE)
    }

    /// Ends the cycle of a replication, if one runs, and waits for it: what it does to the volume ends with it. What
    /// scripts send comes from the source too.
    fn end_cycle(&self, volume: &str, target: Option<&str>, why: Ending) -> Result<()> {
        let cycle = names::cycle_job(target);
        let listener = target.is_none().then_some(RECEIVE_BY_HAND);
        for name in [Some(cycle.as_str()), listener].into_iter().flatten() {
            self.jobs
                .end_and_wait(volume, Some(name), why, JOB_PATIENCE)?;
        }
        Ok(())
    }

    /// The handle of a defined volume.
    fn handle(&self, name: &str) -> Result<Arc<Handle>> {
        let found = lock(&self.volumes).get(name).cloned();
        found.with_context(|| format!("'{name}' is not a managed volume"))
    }

    /// Loads a volume that is not loaded yet.
    fn load(&self, name: &str) -> Result<Volume> {
        let volume = volume::load(self.host.clone(), &self.layout, name)?;
        volume.supervisor.watch()?;
        Ok(volume)
    }

    /// Takes up every volume in the database, each on its own, and waits until all were tried.
    pub fn start_all(self: &Arc<Self>) -> Result<()> {
        let mut threads = Vec::new();
        for name in config::list(&self.layout)? {
            let handle = Handle::new(View::starting(&name));
            lock(&self.volumes).insert(name.clone(), handle.clone());
            let this = self.clone();
            threads.push(thread::spawn(move || this.start_one(&name, &handle)));
        }
        wait_for(threads);
        Ok(())
    }

    fn start_one(self: &Arc<Self>, name: &str, handle: &Handle) {
        let mut slot = lock(&handle.volume);
        // It may be on its way up since boot; then what runs is adopted. Without the lock two attempts at
        // a time are the worst, and agent and server see to that by themselves.
        let first = boot::first_start(&self.layout, name);
        if let Err(error) = &first {
            complain(format_args!("{name}: {error:#}"));
        }
        let mut volume = match self.load(name) {
            Ok(volume) => volume,
            Err(error) => {
                complain(format_args!("{name}: {error:#}"));
                *lock(&handle.view) = View::broken(name, &format!("{error:#}"));
                return;
            }
        };
        volume.await_devices();
        let level = volume.full_level();
        let result = volume.up(level, &mut |_| ());
        let text = if result.is_ok() && volume.failure.is_none() {
            "is up"
        } else {
            "is NOT up"
        };
        complain(format_args!("{name}: {text}"));
        drop(first);
        volume.refresh();
        handle.publish(&volume);
        let reverting = volume.reverting.map(|id| (id, level));
        *slot = Some(volume);
        drop(slot);
        self.resume_revert(name, reverting);
    }

    /// Takes every volume down. What is in use stays up; returned is a line for each that does.
    fn stop_all(self: &Arc<Self>) -> Vec<String> {
        let busy: Arc<Mutex<Vec<String>>> = Arc::default();
        let stop_one = |name: String, handle: Arc<Handle>, busy: Arc<Mutex<Vec<String>>>| {
            let mut slot = lock(&handle.volume);
            let Some(volume) = slot.as_mut() else { return };
            match volume.down(crate::plan::Level::Down, &mut |_| ()) {
                Ok(()) => complain(format_args!("{name}: is down")),
                Err(error) => {
                    let line = format!("{name}: stays up: {error:#}");
                    complain(format_args!("{line}"));
                    lock(&busy).push(line);
                }
            }
            handle.publish(volume);
        };
        let handles = self.handles();
        let threads = handles.into_iter().map(|(n, h)| {
            let busy = busy.clone();
            thread::spawn(move || stop_one(n, h, busy))
        });
        wait_for(threads.collect());
        std::mem::take(&mut *lock(&busy))
    }

    /// Tries volumes again that wait for a device or for somebody who has one, because one appeared or changed, or some time
    /// has gone by.
    fn retry(self: &Arc<Self>, occasion: Occasion) {
        for (name, handle) in self.handles() {
            let waits = handle.waits.load(Ordering::SeqCst);
            // One attempt in the queue is enough: it looks at the machine when it runs.
            if !waits || handle.retry_queued.swap(true, Ordering::SeqCst) {
                continue;
            }
            thread::spawn(move || {
                let mut slot = lock(&handle.volume);
                handle.retry_queued.store(false, Ordering::SeqCst);
                let Some(volume) = slot.as_mut().filter(|v| v.worth_retrying(occasion)) else {
                    return;
                };
                complain(format_args!(
                    "{name}: its devices may be used now; trying again"
                ));
                lock(&handle.view).notes = vec!["it is being started".into()];
                let level = volume.level;
                if volume.up(level, &mut |_| ()).is_ok() && volume.failure.is_none() {
                    complain(format_args!("{name}: is up"));
                }
                handle.publish(volume);
            });
        }
    }
}

/// Joins `threads`, asking systemd for more time as long as it takes.
fn wait_for(threads: Vec<thread::JoinHandle<()>>) {
    let done = Arc::new(AtomicBool::new(false));
    let flag = done.clone();
    let pleader = thread::spawn(move || {
        while !flag.load(Ordering::SeqCst) {
            notify::send(&format!("EXTEND_TIMEOUT_USEC={}", 3 * PATIENCE.as_micros()));
            thread::park_timeout(PATIENCE);
        }
    });
    for thread in threads {
        // A panic has been reported on stderr; the other volumes go on.
        let _ = thread.join();
    }
    done.store(true, Ordering::SeqCst);
    pleader.thread().unpark();
    let _ = pleader.join();
}

/// What ended the daemon.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// Take all down.
    Stop,
    /// Leave all up for the next daemon.
    HandOver,
}

/// Runs the daemon until a signal ends it.
pub fn run(host: Arc<dyn Host>, layout: Layout) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("the daemon must run as root");
    }
    let signals = block_signals()?;
    hold_memory();
    fs::create_dir_all(layout.run())
        .with_context(|| format!("could not create {}", layout.run().display()))?;
    let _lock = take_lock(&layout)?;
    // Before anything is read or written: /var may be what is held back.
    resume_leftovers(host.as_ref());
    thaw_leftovers(&host, &layout);
    make_directories(&layout)?;
    let touch = |path: &std::path::Path| {
        fs::write(path, "").with_context(|| format!("could not create {}", path.display()))
    };
    touch(&layout.locking())?;
    touch(&layout.running())?;
    remove(&layout.busy());
    let listener = listen(&layout)?;
    let daemon = Daemon::new(host, layout.clone())?;
    let server = daemon.clone();
    thread::Builder::new()
        .name("accept".into())
        .spawn(move || server.serve(&listener))?;
    let streams = Daemon::listen_for_streams(&layout)?;
    let server = daemon.clone();
    thread::Builder::new()
        .name("streams".into())
        .spawn(move || server.serve_streams(&streams))?;
    // Before the volumes are tried: a device that appears meanwhile must not be missed.
    let watching = daemon.clone();
    uevents::watch(move |occasion| watching.retry(occasion))?;
    daemon.start_all()?;
    clock::watch(&daemon)?;
    remove(&layout.locking());
    let periods = daemon.clone();
    thread::Builder::new()
        .name("periods".into())
        .spawn(move || periods.run_periods())?;
    notify::send("READY=1");

    let end = wait_for_signal(&signals)?;
    notify::send("STOPPING=1");
    let mut busy = Vec::new();
    for job in daemon.jobs.close(JOB_PATIENCE) {
        complain(format_args!("{}: '{}' does not end", job.volume, job.name));
    }
    if end == End::Stop {
        touch(&layout.locking())?;
        busy = daemon.stop_all();
        remove(&layout.running());
    }
    remove(&layout.control());
    remove(&layout.replication_socket());
    remove(&layout.locking());
    if !busy.is_empty() {
        // Who asked for the stop may not see how this process ends: the init script reads it there.
        let text = busy.iter().map(|line| format!("{line}\n"));
        fs::write(layout.busy(), text.collect::<String>())
            .with_context(|| format!("could not write {}", layout.busy().display()))?;
        // At a shutdown that is no failure: what fstab has mounted is unmounted after this service has
        // ended, and zumastor-shutdown.service takes down the rest.
        if !shutdown::is_under_way() {
            bail!("not all volumes could be stopped");
        }
    }
    Ok(())
}

/// Resumes devices of ours that are suspended: their I/O waits, also that of whoever reads a volume's document. Nothing of ours
/// leaves one so but a change of its table that failed in the kernel, and could not be undone.
fn resume_leftovers(host: &dyn Host) {
    let mut told = Vec::new();
    // A machine without device-mapper has none.
    for name in host.dm_names().unwrap_or_default() {
        let ours = |device: &DmDevice| {
            let uuid = device.uuid.as_deref().unwrap_or_default();
            // One that has no table yet is just being made.
            uuid.starts_with(DM_UUID_PREFIX) && device.table.is_some()
        };
        if !matches!(host.dm_find(&name), Ok(Some(device)) if ours(&device)) {
            continue;
        }
        match host.dm_resume(&name) {
            Ok(false) => {}
            Ok(true) => told.push(format!("/dev/mapper/{name} was suspended; it is resumed")),
            Err(error) => told.push(format!("{error:#}")),
        }
    }
    // A line may need the file system on one of them.
    for line in told {
        complain(format_args!("{line}"));
    }
}

/// Thaws what a daemon that was killed while taking a snapshot left frozen.
fn thaw_leftovers(host: &Arc<dyn Host>, layout: &Layout) {
    // On a new machine there is none.
    if !layout.volumes().is_dir() {
        return;
    }
    let names = config::list(layout).unwrap_or_else(|error| {
        complain(format_args!("{error:#}"));
        Vec::new()
    });
    for name in names {
        let thawed = volume::load(host.clone(), layout, &name).and_then(|v| v.thaw_leftovers());
        if let Err(error) = thawed {
            complain(format_args!("{name}: {error:#}"));
        }
    }
}

/// Keeps the memory that is in use: a page that must be read in, or swapped out to make room, may need a file
/// system that this daemon has frozen.
fn hold_memory() {
    let flags = MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE;
    // Pages that were never touched stay unallocated: threads' stacks are mostly that.
    let on_fault = MlockAllFlags::from_bits_retain(nix::libc::MCL_ONFAULT);
    if let Err(error) = mlockall(flags | on_fault) {
        complain(format_args!("cannot lock memory: {error}"));
    }
}

fn remove(path: &std::path::Path) {
    let gone = fs::remove_file(path);
    if let Err(error) = gone.or_else(|e| match e.kind() {
        std::io::ErrorKind::NotFound => Ok(()),
        _ => Err(e),
    }) {
        complain(format_args!("could not remove {}: {error}", path.display()));
    }
}

fn block_signals() -> Result<SignalFd> {
    let mut set = SigSet::empty();
    for signal in [
        Signal::SIGTERM,
        Signal::SIGINT,
        Signal::SIGUSR2,
        Signal::SIGHUP,
    ] {
        set.add(signal);
    }
    // Before any thread starts, so that all inherit the mask. Children get an empty one from std.
    set.thread_block().context("could not block signals")?;
    SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC).context("could not wait for signals")
}

fn wait_for_signal(signals: &SignalFd) -> Result<End> {
    loop {
        let mut polled = [PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        match poll(&mut polled, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            result => result.context("could not wait for signals")?,
        };
        let number = signals.read_signal()?.map(|info| info.ssi_signo as i32);
        match number.and_then(|n| Signal::try_from(n).ok()) {
            Some(Signal::SIGTERM | Signal::SIGINT) => return Ok(End::Stop),
            Some(Signal::SIGUSR2) => return Ok(End::HandOver),
            _ => {}
        }
    }
}

fn make_directories(layout: &Layout) -> Result<()> {
    config::make_private_dir(&layout.volumes())?;
    for name in ["agents", "servers"] {
        let dir = layout.run().join(name);
        config::make_private_dir(&dir)?;
        fs::set_permissions(&dir, Permissions::from_mode(0o700))
            .with_context(|| format!("could not protect {}", dir.display()))?;
    }
    for dir in [
        layout.run().join("mount"),
        layout.run().join("snapshot"),
        layout.mount_root(),
    ] {
        fs::create_dir_all(&dir).with_context(|| format!("could not create {}", dir.display()))?;
    }
    // Users of a mounted volume pass through here, whichever call made the directory.
    fs::set_permissions(layout.run(), Permissions::from_mode(0o755))?;
    Ok(())
}

/// Only one daemon: a file lock, which ends with the process that holds it.
fn take_lock(layout: &Layout) -> Result<Flock<fs::File>> {
    let path = layout.daemon_lock();
    let file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&path)
        .with_context(|| format!("could not open {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, e)| anyhow::anyhow!("another zumastor daemon runs already ({e})"))
}

fn listen(layout: &Layout) -> Result<UnixListener> {
    let path = layout.control();
    let failed = || format!("could not listen on {}", path.display());
    // We hold the daemon's lock, so a socket that is there belongs to nobody.
    if path.exists() {
        fs::remove_file(&path).with_context(failed)?;
    }
    // Connecting needs write permission, so there must be no moment at which others have it.
    let old = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(&path);
    nix::sys::stat::umask(old);
    listener.with_context(failed)
}
