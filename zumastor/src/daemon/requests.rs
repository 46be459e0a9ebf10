// SPDX-License-Identifier: GPL-2.0-only
//! Takes connections and carries out requests.
//!
//! Each request has a [`Permit`], from its connection to the end of the operation: so their number is bounded
//! also where clients do not wait for the end, or go away.

use std::io::BufReader;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;

use anyhow::{Context, Result, bail};
use ddsnap::client::NewSizes;
use ddsnap::stdio::complain;

use super::{Daemon, Handle, lock};
use crate::config::{self, Asked, VolumeConfig};
use crate::control::{self, ALIVE_PERIOD, Event, PEER_DEADLINE, Request, Role, Within};
use crate::jobs::{Ended, Ending, Job, Jobs, Running};
use crate::names;
use crate::note::{Note, Out};
use crate::plan::Level;
use crate::refusal::{self, BAD_HOST, UNMANAGED};
use crate::replicate::cycle::Way;
use crate::replicate::files::Files;
use crate::status::View;
use crate::volume::{DefineSource, DefineVolume, Peer, Volume, Volumes, check_host};
use crate::work::{Resize, Revert, Tools};

/// Most requests at a time. Each holds a thread or two; more than this is a script gone wild.
const REQUESTS_MAX: usize = 256;

/// The right to carry out one request.
struct Permit(Arc<AtomicUsize>);

impl Permit {
    /// One of `count`, unless all are taken.
    fn take(count: &Arc<AtomicUsize>) -> Option<Arc<Permit>> {
        let permit = Arc::new(Permit(count.clone()));
        // Dropped at once if it is one too many.
        (count.fetch_add(1, Ordering::SeqCst) < REQUESTS_MAX).then_some(permit)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Daemon {
    /// Serves the control socket for ever.
    pub(super) fn serve(self: &Arc<Self>, listener: &UnixListener) {
        let requests = Arc::default();
        for stream in listener.incoming() {
            let stream = match stream {
                Ok(stream) => stream,
                Err(error) => {
                    complain(format_args!("could not take a connection: {error}"));
                    // Out of descriptors, most likely: the others have to end first.
                    thread::park_timeout(PEER_DEADLINE / 10);
                    continue;
                }
            };
            if !control::peer_is_root(&stream) {
                continue;
            }
            let Some(permit) = Permit::take(&requests) else {
                let error = Some("too many requests at a time: try again later".to_string());
                let code = refusal::FAILED;
                let _ = control::send(&stream, Event::Done { error, code });
                continue;
            };
            let this = self.clone();
            let spawned = thread::Builder::new()
                .name("request".into())
                .spawn(move || {
                    if let Err(error) = this.answer(&stream, permit) {
                        complain(format_args!("control connection: {error:#}"));
                    }
                });
            if let Err(error) = spawned {
                // The connection is closed with what would have answered it.
                complain(format_args!("no thread for a request: {error}"));
            }
        }
    }

    /// Reads one request and answers it to the end.
    fn answer(self: &Arc<Self>, stream: &UnixStream, permit: Arc<Permit>) -> Result<()> {
        stream.set_write_timeout(Some(PEER_DEADLINE))?;
        let mut reader = BufReader::new(Within::new(stream, PEER_DEADLINE));
        let request = match control::receive(&mut reader) {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(error) => {
                let error = Some(format!("the daemon did not understand: {error:#}"));
                let code = refusal::FAILED;
                return control::send(stream, Event::Done { error, code });
            }
        };
        let detached = matches!(
            request,
            Request::Snapshot { nowait: true, .. } | Request::Replicate { nowait: true, .. }
        );
        if detached {
            // What can be said at once is said at once.
            let known = self.check_known(&request);
            let error = known.err().map(|e| format!("{e:#}"));
            let refused = error.is_some();
            let code = u8::from(refused);
            control::send(stream, Event::Done { error, code })?;
            if refused {
                return Ok(());
            }
        }
        let (sender, receiver) = mpsc::channel();
        let this = self.clone();
        let operation = thread::Builder::new().name("operation".into());
        let spawned = operation.spawn(move || {
            let _permit = permit;
            // Nobody may listen any more: an operation goes on all the same.
            // One that nobody was to listen to is not taken for one whose client has gone.
            let mut told = |event| sender.send(event).is_ok() || detached;
            let result = this.execute(&request, &mut told);
            if let (Err(error), Some(name)) = (&result, request.volume()) {
                complain(format_args!("{name}: {error:#}"));
            }
            let _ = sender.send(Event::Done {
                code: result.as_ref().err().map_or(0, refusal::code),
                error: result.err().map(|e| format!("{e:#}")),
            });
        });
        if let Err(error) = spawned {
            let error = format!("nothing was done, as there is no thread for it: {error}");
            if detached {
                bail!(error);
            }
            let (error, code) = (Some(error), refusal::FAILED);
            return control::send(stream, Event::Done { error, code });
        }
        if detached {
            return Ok(());
        }
        loop {
            let event = match receiver.recv_timeout(ALIVE_PERIOD) {
                Ok(event) => event,
                Err(RecvTimeoutError::Timeout) => Event::Alive,
                // Only a panic drops the sender without a Done.
                Err(RecvTimeoutError::Disconnected) => Event::Done {
                    error: Some("an internal error; see the journal".to_string()),
                    code: refusal::FAILED,
                },
            };
            let last = matches!(event, Event::Done { .. });
            control::send(stream, event)?;
            if last {
                return Ok(());
            }
        }
    }

    /// Carries out one request; waits for changes that others make to the same volume. `on_event` says whether
    /// anybody listens.
    pub(super) fn execute(
        self: &Arc<Self>,
        request: &Request,
        on_event: &mut dyn FnMut(Event) -> bool,
    ) -> Result<()> {
        match request {
            Request::Status => {
                on_event(Event::Status(self.views()));
                Ok(())
            }
            Request::DefineVolume(define) => {
                if self.handle(&define.volume).is_ok() {
                    bail!("volume '{}' is defined already", define.volume);
                }
                let (daemon, request) = (self.clone(), define.clone());
                let job = Box::new(Definition { daemon, request });
                follow(&*self.jobs.start(&define.volume, job)?, on_event)
            }
            Request::Cancel { volume, job } => {
                self.handle(volume)?;
                self.jobs.cancel(volume, job)
            }
            Request::DefineSource {
                source: define,
                dry_run,
            } => {
                let known = self.handle(&define.volume);
                known.map_err(|error| refusal::with(&error, UNMANAGED))?;
                check_host(&define.host).map_err(|error| refusal::with(&error, BAD_HOST))?;
                let port = Some(self.port_for(&define.volume, define.port)?);
                let define = &DefineSource {
                    port,
                    ..define.clone()
                };
                if *dry_run {
                    return self.with(&define.volume, |v| {
                        v.would_define_source(define, &mut noting(on_event))
                    });
                }
                self.end_cycle(&define.volume, None, Ending::Interrupted)?;
                self.with(&define.volume, |v| {
                    v.define_source(define, &mut noting(on_event))
                })?;
                let (volume, host) = (&define.volume, &define.host);
                say(
                    on_event,
                    format!("volume '{volume}' is a replica of what {host} has"),
                );
                Ok(())
            }
            Request::Failover { volume, dry_run } => self.failover(volume, *dry_run, on_event),
            Request::Failback { source, dry_run } => self.failback(source, *dry_run, on_event),
            Request::DefineTarget(define) => {
                self.with(&define.volume, |v| v.define_target(define))?;
                let (volume, host) = (&define.volume, &define.host);
                say(on_event, format!("volume '{volume}' has the target {host}"));
                Ok(())
            }
            Request::ForgetReplication {
                volume,
                target,
                dry_run,
            } => {
                if *dry_run {
                    return self.with(volume, |v| {
                        let out = &mut noting(on_event);
                        match target {
                            Some(host) => v.would_forget_target(host, out),
                            None => v.would_forget_source(out),
                        }
                    });
                }
                // What is refused interrupts nothing.
                self.with(volume, |v| match target {
                    Some(host) => v.target(host).map(|_| ()),
                    None => v.check_forget_source(),
                })?;
                self.end_cycle(volume, target.as_deref(), Ending::Cancelled)?;
                self.with(volume, |v| match target {
                    Some(host) => {
                        v.forget_target(host, &mut noting(on_event))?;
                        Files::of(&self.layout, volume).forget_target(host)
                    }
                    None => v.forget_source(&mut noting(on_event)),
                })?;
                say(
                    on_event,
                    format!("{} of volume '{volume}' is forgotten", role_of(target)),
                );
                Ok(())
            }
            Request::SetReplication {
                volume,
                target,
                stopped,
            } => {
                let peer = target.clone().map_or(Peer::Source, Peer::Target);
                // First, or the next cycle begins in between.
                self.with(volume, |v| v.set_stopped(&peer, *stopped))?;
                if *stopped {
                    self.end_cycle(volume, target.as_deref(), Ending::Interrupted)?;
                }
                let now = if *stopped { "stopped" } else { "started" };
                say(
                    on_event,
                    format!("{} of volume '{volume}' is {now}", role_of(target)),
                );
                Ok(())
            }
            Request::Replicate {
                volume,
                target,
                snapshot,
                full,
                force_base,
                dry_run,
                ..
            } => {
                let way = self.way(volume, target.as_deref())?;
                let asked = Asked {
                    full: *full,
                    force_base: *force_base,
                    snapshot: *snapshot,
                };
                if *dry_run {
                    let peer = way.peer();
                    return self.with(volume, |v| {
                        v.would_replicate(&peer, asked, &mut noting(on_event))
                    });
                }
                let tested = match &way {
                    Way::Push(host) => Some(host.clone()),
                    _ => None,
                };
                let running = self.begin_after(volume, way, asked, on_event)?;
                follow(&running, on_event)?;
                match tested.filter(|host| self.is_tested(volume, host)) {
                    Some(host) => self.verify(volume, Some(&host), false, on_event),
                    None => Ok(()),
                }
            }
            Request::Verify {
                volume,
                target,
                repair,
            } => self.verify(volume, target.as_deref(), *repair, on_event),
            Request::ReceiveByHand { volume, done } => match done {
                false => self.receive_start(volume, on_event),
                true => self.receive_done(volume, on_event),
            },
            Request::DefineMaster { volume, flags } => {
                self.with(volume, |v| v.define_master(*flags, &mut noting(on_event)))
            }
            Request::Forget { volume, dry_run } => {
                let out = &mut noting(on_event);
                if *dry_run {
                    self.with(volume, |v| v.would_forget(out))
                } else {
                    self.forget(volume, out)
                }
            }
            Request::ForgetSnapshot {
                volume,
                snapshot,
                dry_run,
            } => self.with(volume, |v| {
                let out = &mut noting(on_event);
                if *dry_run {
                    v.would_forget_snapshot(*snapshot, out)
                } else {
                    v.check_not_reverting()?;
                    v.forget_snapshot(*snapshot, out)
                }
            }),
            Request::Protect {
                volume,
                snapshot,
                protect,
            } => self.with(volume, |v| {
                v.protect(*snapshot, *protect, &mut noting(on_event))
            }),
            Request::DefineSchedule { volume, rotations } => self.with(volume, |v| {
                v.define_schedule(rotations, &mut noting(on_event))
            }),
            Request::ForgetSchedule { volume, kind } => self.with(volume, |v| {
                v.forget_schedule(kind.as_deref(), &mut noting(on_event))
            }),
            Request::Remount {
                volume,
                mountpoint,
                mountopts,
            } => self.with(volume, |v| {
                let mountopts = mountopts
                    .as_ref()
                    .map(|o| Some(o.clone()).filter(|o| !o.is_empty()));
                v.remount(mountpoint.clone(), mountopts, &mut noting(on_event))
            }),
            Request::Revert {
                volume,
                snapshot,
                dry_run,
            } => {
                if *dry_run {
                    return self.with(volume, |v| v.would_revert(*snapshot, &mut noting(on_event)));
                }
                self.handle(volume)?;
                let job = Box::new(Revert {
                    tools: self.tools(),
                    volume: volume.clone(),
                    snapshot: *snapshot,
                    resumed: None,
                });
                follow(&*self.jobs.start(volume, job)?, on_event)
            }
            Request::Resize {
                volume,
                origin,
                store,
                meta,
                dry_run,
            } => {
                let sizes = NewSizes {
                    origin: *origin,
                    store: *store,
                    meta: *meta,
                };
                if *dry_run {
                    return self.with(volume, |v| v.would_resize(&sizes, &mut noting(on_event)));
                }
                self.handle(volume)?;
                let job = Box::new(Resize {
                    tools: self.tools(),
                    volume: volume.clone(),
                    sizes,
                });
                follow(&*self.jobs.start(volume, job)?, on_event)
            }
            Request::Start {
                role: Role::Volume,
                volume,
                accept_origin,
            } => {
                let mut reverting = None;
                let started = self.with(volume, |v| {
                    v.replace_failed_server(&mut noting(on_event))?;
                    let started = v.accepting(*accept_origin, |v| {
                        v.start(v.full_level(), &mut noting(on_event))
                    });
                    reverting = v.reverting.map(|id| (id, v.full_level()));
                    v.warn_of_exports(&mut noting(on_event));
                    started
                });
                self.resume_revert(volume, reverting);
                started
            }
            Request::Start {
                role: Role::Master,
                volume,
                ..
            } => self.with(volume, |v| {
                let started = v.start_master(&mut noting(on_event));
                v.warn_of_exports(&mut noting(on_event));
                started
            }),
            Request::Stop {
                role: Role::Volume,
                volume,
            } => self.without_jobs(volume, Ending::Interrupted, |v| {
                v.down(Level::Down, &mut noting(on_event))
            }),
            Request::Stop {
                role: Role::Master,
                volume,
            } => self.with(volume, |v| v.stop_master(&mut noting(on_event))),
            Request::Snapshot { volume, kind, .. } => self.with(volume, |v| {
                v.snapshot(kind.as_deref(), &mut noting(on_event))
                    .map(|_| ())
            }),
        }
    }

    /// What is known of all volumes, without waiting for any.
    pub(super) fn views(&self) -> Vec<View> {
        let of = |(name, handle): (String, Arc<Handle>)| {
            let mut view = handle.view();
            // Why it is so, rather than only that it is.
            if view.up && view.failure.is_none() {
                view.failure = handle.trouble();
            }
            view.jobs = self.jobs.views(&name);
            let due = lock(&self.due);
            let due = due.iter().filter(|(volume, _)| *volume == name);
            view.due = due.map(|(_, next)| next.clone()).collect();
            view
        };
        let mut views: Vec<View> = self.handles().into_iter().map(of).collect();
        // All at once: a server that does not answer costs some seconds.
        thread::scope(|scope| {
            for view in &mut views {
                view.check_exports(&self.layout);
                scope.spawn(|| view.check_server(self.host.as_ref(), &self.layout));
            }
        });
        views
    }

    /// Runs `operation` on a volume and publishes what came of it.
    pub(super) fn with(
        &self,
        name: &str,
        operation: impl FnOnce(&mut Volume) -> Result<()>,
    ) -> Result<()> {
        let handle = self.handle(name)?;
        let mut slot = lock(&handle.volume);
        // Forgotten, or replaced by a new volume of the same name, while we waited?
        if !self
            .handle(name)
            .is_ok_and(|now| Arc::ptr_eq(&now, &handle))
        {
            bail!("'{name}' is not a managed volume");
        }
        if slot.is_none() {
            // Its document was unusable at the last attempt; it may have been repaired.
            *slot = Some(self.load(name)?);
        }
        let volume = slot.as_mut().context("the volume was just loaded")?;
        let result = operation(volume);
        handle.publish(volume);
        self.wake_clock();
        result
    }

    /// Takes up a revert that a server goes on with after its restart; the volume then comes up to the level.
    pub(super) fn resume_revert(self: &Arc<Self>, name: &str, reverting: Option<(u32, Level)>) {
        let Some((snapshot, level)) = reverting else {
            return;
        };
        let job = Box::new(Revert {
            tools: self.tools(),
            volume: name.to_string(),
            snapshot,
            resumed: Some(level),
        });
        // Refused while it is under way: then there is nothing to take up.
        if let Err(error) = self.jobs.start(name, job) {
            complain(format_args!("{name}: {error:#}"));
        }
    }

    fn tools(self: &Arc<Self>) -> Tools {
        Tools {
            volumes: self.clone(),
            host: self.host.clone(),
            layout: self.layout.clone(),
        }
    }

    /// As [`with`](Self::with), after all jobs of the volume have been ended.
    pub(super) fn without_jobs(
        &self,
        name: &str,
        why: Ending,
        operation: impl FnOnce(&mut Volume) -> Result<()>,
    ) -> Result<()> {
        self.handle(name)?;
        self.end_jobs(name, why)?;
        self.with(name, operation)
    }

    /// Whether there is what a request names: all that can be said of it without waiting.
    fn check_known(&self, request: &Request) -> Result<()> {
        let Some(name) = request.volume() else {
            return Ok(());
        };
        let Some(config) = self.handle(name)?.view().config else {
            return Ok(());
        };
        match request {
            Request::Replicate {
                target: Some(host), ..
            } if !config.targets.contains_key(host) => {
                bail!("volume '{name}' has no target {host}")
            }
            Request::Replicate { target: None, .. } => self.way(name, None).map(|_| ()),
            Request::Snapshot {
                kind: Some(kind), ..
            } if config.schedule.iter().all(|r| r.kind != *kind) => {
                bail!("volume '{name}' has no schedule for '{kind}'")
            }
            _ => Ok(()),
        }
    }

    /// Which way a cycle goes that somebody asks for: to the target, or from the source; without a name to the only target
    /// of a master.
    fn way(&self, volume: &str, target: Option<&str>) -> Result<Way> {
        if let Some(host) = target {
            return Ok(Way::Push(host.to_owned()));
        }
        let config = self.handle(volume)?.view().config;
        let Some(config) = config.filter(|c| c.source.is_none() && !c.targets.is_empty()) else {
            return Ok(Way::Pull);
        };
        let names: Vec<&str> = config.targets.keys().map(String::as_str).collect();
        match names[..] {
            [only] => Ok(Way::Push(only.to_owned())),
            _ => bail!(
                "volume '{volume}' has several targets ({}): name the one that is meant",
                names.join(", ")
            ),
        }
    }

    /// Starts a cycle once that of the same replication has ended which is under way, as one that comes by itself: it may
    /// have begun before what is to be sent was written.
    pub(super) fn begin_after(
        self: &Arc<Self>,
        volume: &str,
        way: Way,
        asked: Asked,
        on_event: &mut dyn FnMut(Event) -> bool,
    ) -> Result<Arc<Running>> {
        let name = match &way {
            Way::Push(host) => names::cycle_job(Some(host)),
            _ => names::cycle_job(None),
        };
        while let Some(other) = self.jobs.find(volume, &name) {
            say(on_event, "waiting for the cycle that is under way".into());
            // How it ends is told to who asked for it, and in the status.
            let mut listens = true;
            let ended = Jobs::wait(&other, &mut |_| {
                listens = on_event(Event::Alive);
                listens
            });
            if !listens {
                ended?;
            }
        }
        self.begin(volume, way, Some(asked), false)
    }

    fn define(&self, request: &DefineVolume, running: &Arc<Running>) -> Result<String> {
        let name = &request.volume;
        let handle = Handle::new(View::defining(request));
        // Held from the start, so that requests for the new volume wait for the end.
        let mut slot = lock(&handle.volume);
        let others: Vec<(String, VolumeConfig)> = {
            let mut volumes = lock(&self.volumes);
            if volumes.contains_key(name) {
                bail!("volume '{name}' is defined already");
            }
            let known = |(n, h): (&String, &Arc<Handle>)| Some((n.clone(), h.view().config?));
            let others = volumes.iter().filter_map(known).collect();
            // From now on other definitions see our devices as taken.
            volumes.insert(name.clone(), handle.clone());
            others
        };
        let checked = running.clone();
        let check = Arc::new(move || checked.check());
        let out: Out = &mut |note| running.note(note);
        let made = Volume::define(
            self.host.clone(),
            &self.layout,
            request,
            &others,
            check,
            out,
        );
        let kept = made.and_then(|volume| {
            volume.supervisor.watch()?;
            handle.publish(&volume);
            let made = volume.what_was_made();
            *slot = Some(volume);
            Ok(made)
        });
        // If taking back failed as well, the document may still be there: then so is the volume.
        if kept.is_err() && !matches!(config::load(&self.layout, name), Ok(Some(_))) {
            lock(&self.volumes).remove(name);
        }
        kept
    }

    fn forget(&self, name: &str, out: Out) -> Result<()> {
        self.without_jobs(name, Ending::Cancelled, |volume| {
            volume.forget(out)?;
            Files::of(&self.layout, name).remove();
            // While the volume is locked: nobody may find it and write its document again.
            lock(&self.volumes).remove(name);
            volume.supervisor.release();
            self.jobs.forget(name);
            Ok(())
        })
    }
}

/// Hands notes on as events.
pub(super) fn noting(on_event: &mut dyn FnMut(Event) -> bool) -> impl FnMut(Note) {
    move |note| {
        on_event(Event::Note(note));
    }
}

/// Says what was done.
fn say(on_event: &mut dyn FnMut(Event) -> bool, text: String) {
    on_event(Event::Note(Note::Line(text)));
}

/// A replication as it is spoken of.
fn role_of(target: &Option<String>) -> String {
    target
        .as_ref()
        .map_or("the source".to_owned(), |host| format!("the target {host}"))
}

/// Waits for a job on behalf of a client, as long as there is one.
pub(super) fn follow(running: &Running, on_event: &mut dyn FnMut(Event) -> bool) -> Result<()> {
    let done = Jobs::wait(running, &mut |note| on_event(Event::Note(note)))?;
    on_event(Event::Note(Note::Line(done)));
    Ok(())
}

/// `define volume`: zeroing an origin may take hours.
struct Definition {
    daemon: Arc<Daemon>,
    request: DefineVolume,
}

impl Job for Definition {
    fn name(&self) -> String {
        "define".into()
    }

    fn is_alone(&self) -> bool {
        true
    }

    fn run(&mut self, running: &Arc<Running>) -> Result<String> {
        let made = self.daemon.define(&self.request, running);
        // All was taken back: there is nothing to take up again.
        made.map_err(|error| match error.downcast_ref::<Ended>() {
            Some(_) => Ended(Ending::Cancelled).into(),
            None => error,
        })
    }
}

impl Volumes for Daemon {
    fn with(&self, name: &str, change: &mut dyn FnMut(&mut Volume) -> Result<()>) -> Result<()> {
        Daemon::with(self, name, change)
    }
}

#[cfg(test)]
pub(super) mod tests;
