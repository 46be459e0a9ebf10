// SPDX-License-Identifier: GPL-2.0-only
//! Takes connections and carries out requests.

use std::io::BufReader;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;

use anyhow::{Context, Result, bail};
use ddsnap::stdio::complain;

use super::{Daemon, Handle, lock};
use crate::config::{self, VolumeConfig};
use crate::control::{self, ALIVE_PERIOD, Event, PEER_DEADLINE, Request, Role};
use crate::plan::Level;
use crate::status::View;
use crate::volume::{DefineVolume, Out, Volume};

/// Most requests at a time. Each holds a thread; more than this is a script gone wild.
const CONNECTIONS_MAX: usize = 256;

static CONNECTIONS: AtomicUsize = AtomicUsize::new(0);

impl Daemon {
    /// Serves the control socket for ever.
    pub(super) fn serve(self: &Arc<Self>, listener: &UnixListener) {
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
            if CONNECTIONS.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
                CONNECTIONS.fetch_sub(1, Ordering::SeqCst);
                let error = Some("too many requests at a time: try again later".to_string());
                let _ = control::send(&stream, Event::Done { error });
                continue;
            }
            let this = self.clone();
            thread::spawn(move || {
                if let Err(error) = this.answer(&stream) {
                    complain(format_args!("control connection: {error:#}"));
                }
                CONNECTIONS.fetch_sub(1, Ordering::SeqCst);
            });
        }
    }

    /// Reads one request and answers it to the end.
    fn answer(self: &Arc<Self>, stream: &UnixStream) -> Result<()> {
        stream.set_read_timeout(Some(PEER_DEADLINE))?;
        stream.set_write_timeout(Some(PEER_DEADLINE))?;
        let mut reader = BufReader::new(stream);
        let request = match control::receive(&mut reader) {
            Ok(Some(request)) => request,
            Ok(None) => return Ok(()),
            Err(error) => {
                let error = Some(format!("the daemon did not understand: {error:#}"));
                return control::send(stream, Event::Done { error });
            }
        };
        let detached = matches!(request, Request::Snapshot { nowait: true, .. });
        if detached {
            // What can be said at once is said at once.
            let known = request
                .volume()
                .map_or(Ok(()), |name| self.handle(name).map(|_| ()));
            let error = known.err().map(|e| format!("{e:#}"));
            let refused = error.is_some();
            control::send(stream, Event::Done { error })?;
            if refused {
                return Ok(());
            }
        }
        let (sender, receiver) = mpsc::channel();
        let this = self.clone();
        thread::spawn(move || {
            let result = this.execute(&request, &mut |event| {
                // Nobody listens any more: the operation goes on all the same.
                let _ = sender.send(event);
            });
            if let (Err(error), Some(name)) = (&result, request.volume()) {
                complain(format_args!("{name}: {error:#}"));
            }
            let _ = sender.send(Event::Done {
                error: result.err().map(|e| format!("{e:#}")),
            });
        });
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
                },
            };
            let last = matches!(event, Event::Done { .. });
            control::send(stream, event)?;
            if last {
                return Ok(());
            }
        }
    }

    /// Carries out one request; waits for others on the same volume.
    fn execute(self: &Arc<Self>, request: &Request, on_event: &mut dyn FnMut(Event)) -> Result<()> {
        let out: Out = &mut |note| on_event(Event::Note(note));
        match request {
            Request::Status => {
                on_event(Event::Status(self.views()));
                Ok(())
            }
            Request::DefineVolume(define) => self.define(define, out),
            Request::DefineMaster { volume, flags } => {
                self.with(volume, |v| v.define_master(*flags, out))
            }
            Request::Forget { volume } => self.forget(volume, out),
            Request::ForgetSnapshot { volume, snapshot } => {
                self.with(volume, |v| v.forget_snapshot(*snapshot, out))
            }
            Request::Start {
                role: Role::Volume,
                volume,
                accept_origin,
            } => self.with(volume, |v| {
                v.accepting(*accept_origin, |v| v.start(v.full_level(), out))
            }),
            Request::Start {
                role: Role::Master,
                volume,
                ..
            } => self.with(volume, |v| v.start_master(out)),
            Request::Stop {
                role: Role::Volume,
                volume,
            } => self.with(volume, |v| v.down(Level::Down, out)),
            Request::Stop {
                role: Role::Master,
                volume,
            } => self.with(volume, |v| v.stop_master(out)),
            Request::Snapshot { volume, kind, .. } => {
                self.with(volume, |v| v.snapshot(kind.as_deref(), out).map(|_| ()))
            }
        }
    }

    /// What is known of all volumes, without waiting for any.
    pub(super) fn views(&self) -> Vec<View> {
        let of = |(_, handle): (String, Arc<Handle>)| {
            let mut view = handle.view();
            // Why it is so, rather than only that it is.
            if view.up && view.failure.is_none() {
                view.failure = handle.trouble();
            }
            view
        };
        let mut views: Vec<View> = self.handles().into_iter().map(of).collect();
        // All at once: a server that does not answer costs some seconds.
        thread::scope(|scope| {
            for view in &mut views {
                scope.spawn(|| view.check_server(self.host.as_ref(), &self.layout));
            }
        });
        views
    }

    /// Runs `operation` on a volume and publishes what came of it.
    fn with(&self, name: &str, operation: impl FnOnce(&mut Volume) -> Result<()>) -> Result<()> {
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
        result
    }

    fn define(self: &Arc<Self>, request: &DefineVolume, out: Out) -> Result<()> {
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
        let made = Volume::define(self.host.clone(), &self.layout, request, &others, out);
        let kept = made.and_then(|volume| {
            volume.supervisor.watch()?;
            handle.publish(&volume);
            *slot = Some(volume);
            Ok(())
        });
        // If taking back failed as well, the document may still be there: then so is the volume.
        if kept.is_err() && !matches!(config::load(&self.layout, name), Ok(Some(_))) {
            lock(&self.volumes).remove(name);
        }
        kept
    }

    fn forget(&self, name: &str, out: Out) -> Result<()> {
        self.with(name, |volume| {
            volume.forget(out)?;
            // While the volume is locked: nobody may find it and write its document again.
            lock(&self.volumes).remove(name);
            volume.supervisor.release();
            Ok(())
        })
    }
}
