// SPDX-License-Identifier: GPL-2.0-only
//! Long work on one machine, as [jobs](crate::jobs).
//!
//! The server of a volume does the work; these wait for it without the volume's lock, which they take at the
//! beginning and at the end. A call to the server cannot be broken off, so it has a thread of its own; a job that
//! is interrupted leaves it behind, and it ends when the server does.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ddsnap::client::{ClientError, NewSizes};

use crate::host::Host;
use crate::human;
use crate::jobs::{Ended, Ending, Job, Running};
use crate::layout::Layout;
use crate::names;
use crate::note::Note;
use crate::plan::Level;
use crate::volume::Volumes;

/// How often a job that waits for a server looks whether it is to end.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// How long a job waits for a server that is being started again.
const SERVER_DEADLINE: Duration = Duration::from_secs(180);

/// A call that tells bytes done of all.
type Call<T> = Box<dyn FnOnce(&mut dyn FnMut(u64, u64)) -> Result<T> + Send>;

/// Waits for `call`, telling how far `subject` is, or until the job is interrupted. What was cancelled is waited
/// for: the server goes on with it in any case.
fn await_server<T: Send + 'static>(running: &Running, subject: &str, call: Call<T>) -> Result<T> {
    enum News<T> {
        Progress(u64, u64),
        Done(Result<T>),
    }
    let (sender, receiver) = mpsc::channel();
    let work = move || {
        let mut tell = |done, total| {
            let _ = sender.send(News::Progress(done, total));
        };
        let result = call(&mut tell);
        let _ = sender.send(News::Done(result));
    };
    thread::Builder::new()
        .name("server call".into())
        .spawn(work)
        .context("could not start a thread")?;
    running.progress(subject, 0, 0);
    loop {
        if running.ending() == Some(Ending::Interrupted) {
            return Err(Ended(Ending::Interrupted).into());
        }
        match receiver.recv_timeout(LOOK_EVERY) {
            Ok(News::Progress(done, total)) => running.progress(subject, done, total),
            Ok(News::Done(result)) => return result,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => bail!("an internal error; see the journal"),
        }
    }
}

/// What jobs need of the daemon.
#[derive(Clone)]
pub struct Tools {
    /// Its volumes.
    pub volumes: Arc<dyn Volumes>,
    /// The machine.
    pub host: Arc<dyn Host>,
    /// Where things are.
    pub layout: Layout,
}

/// `revert`: the origin takes the content of a snapshot.
pub struct Revert {
    /// As everywhere.
    pub tools: Tools,
    /// The volume.
    pub volume: String,
    /// Back to this one.
    pub snapshot: u32,
    /// The server is at it already; the volume then comes up to this level.
    pub resumed: Option<Level>,
}

impl Job for Revert {
    fn name(&self) -> String {
        "revert".into()
    }

    fn is_alone(&self) -> bool {
        true
    }

    /// The server goes on with it in any case.
    fn is_cancellable(&self) -> bool {
        false
    }

    fn run(&mut self, running: &Arc<Running>) -> Result<String> {
        let (name, id) = (self.volume.clone(), self.snapshot);
        let out = &mut |note: Note| running.note(note);
        let mut level = self.resumed;
        let mut time = String::new();
        self.tools.volumes.with(&name, &mut |volume| {
            let created = volume.config.snapshots.find(id).map_or(0, |s| s.created);
            time = names::local_time_of(created);
            if level.is_none() {
                level = Some(volume.begin_revert(id, out)?);
            }
            Ok(())
        })?;
        let level = level.context("the volume was just begun with")?;
        let mut tries = 0;
        let done = loop {
            let (host, server) = (self.tools.host.clone(), self.server());
            let call: Call<u64> = Box::new(move |progress| host.revert(&server, id, progress));
            let done = await_server(running, "writing the snapshot to the origin", call);
            // The next server goes on by itself, and tells who asks again how far it is. If the last one was
            // gone before it began, or had just ended, to ask again is right too: nobody writes meanwhile.
            tries += 1;
            if !done.as_ref().is_err_and(is_lost) || tries == MOST_TRIES {
                break done;
            }
            self.await_next_server(running)?;
        };
        if done.as_ref().is_err_and(|e| e.is::<Ended>()) {
            // The volume goes down, with the server, which goes on at its next start.
            return done.map(|_| String::new());
        }
        let result = match &done {
            Ok(0) => format!("volume '{name}' has the content of snapshot {id}, of {time}"),
            Ok(bad) => format!(
                "volume '{name}' has the content of snapshot {id}, of {time}, but for {bad} chunks that could not be \
                 read and are as they were"
            ),
            Err(error) => format!("revert to snapshot {id} failed: {error:#}"),
        };
        self.tools
            .volumes
            .with(&name, &mut |volume| volume.end_revert(level, &result, out))?;
        match done {
            Ok(0) => Ok(result),
            Ok(_) => bail!("{result}"),
            Err(error) => Err(error),
        }
    }
}

/// Servers that may be lost one after another before a revert is given up.
const MOST_TRIES: u32 = 5;

/// Whether the server has gone away, before a call or in the middle of it.
fn is_lost(error: &anyhow::Error) -> bool {
    let error = error.downcast_ref::<ClientError>();
    error.is_some_and(|e| matches!(e, ClientError::Lost { .. } | ClientError::Connect { .. }))
}

impl Revert {
    /// Waits until the next server answers.
    fn await_next_server(&self, running: &Running) -> Result<()> {
        let until = Instant::now() + SERVER_DEADLINE;
        loop {
            // What was cancelled goes on all the same, in the server.
            if running.ending() == Some(Ending::Interrupted) {
                return Err(Ended(Ending::Interrupted).into());
            }
            self.tools.host.pause(LOOK_EVERY);
            match self.tools.host.reverting(&self.server()) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() >= until => return Err(error),
                Err(_) => {}
            }
        }
    }

    fn server(&self) -> PathBuf {
        self.tools.layout.server_socket(&self.volume)
    }
}

/// `resize`: other sizes of origin, store and metadata, in use.
pub struct Resize {
    /// As everywhere.
    pub tools: Tools,
    /// The volume.
    pub volume: String,
    /// In bytes.
    pub sizes: NewSizes,
}

impl Job for Resize {
    fn name(&self) -> String {
        "resize".into()
    }

    fn is_alone(&self) -> bool {
        true
    }

    /// The server goes on with it in any case.
    fn is_cancellable(&self) -> bool {
        false
    }

    fn run(&mut self, running: &Arc<Running>) -> Result<String> {
        let (name, sizes) = (self.volume.clone(), self.sizes);
        let mut server = PathBuf::new();
        let volumes = &self.tools.volumes;
        volumes.with(&name, &mut |volume| {
            server = volume.begin_resize(&sizes)?;
            Ok(())
        })?;
        let host = self.tools.host.clone();
        let call = Box::new(move |progress: &mut dyn FnMut(u64, u64)| {
            host.resize(&server, &sizes, progress)
        });
        let resized = await_server(running, "changing the sizes", call)?;
        // Also after a refusal: an earlier attempt may have been cut short in between.
        volumes.with(&name, &mut |volume| volume.fit_origin().map(|_| ()))?;
        if let Some(why) = resized.refused {
            bail!("the sizes stay as they were: {why}");
        }
        Ok(format!(
            "volume '{name}': origin {}, snapshot store {}, metadata {}",
            human::bytes(resized.origin),
            human::bytes(resized.store),
            human::bytes(resized.meta)
        ))
    }
}
