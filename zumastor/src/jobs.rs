// SPDX-License-Identifier: GPL-2.0-only
//! Long work on volumes: what runs, how far it is, and how it is ended.
//!
//! The lock of a volume is for changes of its state, which take seconds. What may take hours, as a revert or
//! a replication, is a [`Job`]: it runs in a thread of its own without that lock, takes it for single changes,
//! and tells a [`Running`] how far it is. Anybody may wait for a job and go away again; the job goes on.
//!
//! A job ends by itself, or because it is asked to ([`Ending`]). What it needs in order to be taken up again is
//! in the volume's document or in its store, not here: the next daemon finds it there.
//!
//! Bounded: [`RUNNING_MAX`] jobs at a time, one of a name for a volume, and [`FINISHED_MAX`] results. There
//! is no queue. Who wants a job that finds no place tries again later: two jobs that need each other, as both
//! ends of a replication within one machine do, would wait for each other in one.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use jiff::Timestamp;
use nix::sys::eventfd::{EfdFlags, EventFd};
use serde::{Deserialize, Serialize};

use crate::note::{Note, Progress};

/// Most jobs at a time. Each holds a thread.
pub const RUNNING_MAX: usize = 64;
/// Most finished jobs whose result is kept, the latest of each name and volume.
pub const FINISHED_MAX: usize = 64;
/// Most notes kept of a job for those who wait for it; the oldest go.
const NOTES_MAX: usize = 64;
/// The rate is that of the last so many seconds.
const RATE_OVER: Duration = Duration::from_secs(15);
/// Samples for the rate are so far apart.
const SAMPLE_EVERY: Duration = Duration::from_millis(500);

/// Long work on a volume.
pub trait Job: Send {
    /// What it is called, for commands too: `revert`, `replicate beta`. A volume has one job of a name at a
    /// time.
    fn name(&self) -> String;

    /// Whether no other job may run on the volume meanwhile.
    fn is_alone(&self) -> bool {
        false
    }

    /// Whether it can be ended for good before it is done.
    fn is_cancellable(&self) -> bool {
        true
    }

    /// Does the work, looking now and then whether it is to end ([`Running::check`]). Gives back what was
    /// done, as a sentence without a full stop.
    ///
    /// # Errors
    /// Why it was not done; that of [`Running::check`] if it was asked to end.
    fn run(&mut self, running: &Arc<Running>) -> Result<String>;
}

/// Why a job is to end before it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Somebody does not want it any more: it is not taken up again.
    Cancelled,
    /// The volume or the daemon stops: it is taken up again afterwards.
    Interrupted,
    /// The time of day in which it may run is over: it is taken up again when that comes.
    Window,
}

/// The error of a job that was asked to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", match .0 {
    Ending::Cancelled => "cancelled",
    Ending::Interrupted => "interrupted before its end; what it has done is kept",
    Ending::Window => "interrupted at the end of its window; it goes on in the next one",
})]
pub struct Ended(pub Ending);

/// The error of a job that this machine or another one said no to: to try again does not help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("refused: {sentence}")]
pub struct Declined {
    /// Its number, as zumastor/REPLICATION.md has them.
    pub code: u16,
    /// Why, and what helps.
    pub sentence: String,
}

/// How a job fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum JobState {
    /// It runs.
    Running,
    /// It was asked to end and has not yet.
    Ending,
    /// It has done what it was for.
    Done,
    /// It has not.
    Failed,
    /// It was asked to end for good.
    Cancelled,
    /// It was asked to end and goes on later.
    Interrupted,
}

impl JobState {
    /// Whether it has ended.
    #[must_use]
    pub fn is_over(self) -> bool {
        !matches!(self, JobState::Running | JobState::Ending)
    }
}

/// A job as others see it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobView {
    /// Its number, from 1, never used again by this daemon.
    pub id: u64,
    /// The volume.
    pub volume: String,
    /// What it is called.
    pub name: String,
    /// How it fares.
    pub state: JobState,
    /// How far it is.
    pub progress: Progress,
    /// Bytes a second lately, if they are known.
    pub rate: Option<u64>,
    /// When it began, in seconds since 1970-01-01 UTC.
    pub started: i64,
    /// When it ended, likewise.
    pub ended: Option<i64>,
    /// What came of it.
    pub result: Option<String>,
    /// The number of the refusal, if it failed because this machine or another one said no.
    #[serde(default)]
    pub refused: Option<u16>,
}

impl JobView {
    /// Seconds left at the present rate, if they are known.
    #[must_use]
    pub fn seconds_left(&self) -> Option<u64> {
        let left = self.progress.total.checked_sub(self.progress.done)?;
        left.checked_div(self.rate?)
            .filter(|_| self.progress.total > 0)
    }
}

/// What changes of a job while it runs.
struct Inner {
    ending: Option<Ending>,
    progress: Progress,
    /// When so many bytes were done.
    samples: VecDeque<(Instant, u64)>,
    /// The latest notes; the first has this number.
    notes: VecDeque<Note>,
    first_note: u64,
    /// Counts changes of the progress.
    changes: u64,
    /// The number of a refusal.
    refused: Option<u16>,
    /// When and how it ended.
    over: Option<(i64, JobState, Result<String, String>)>,
}

/// A job that runs: what it is told through, and what it tells.
pub struct Running {
    id: u64,
    volume: String,
    name: String,
    is_alone: bool,
    is_cancellable: bool,
    started: i64,
    inner: Mutex<Inner>,
    changed: Condvar,
    end: EventFd,
}

impl Running {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Each change is whole before the lock is let go, also if its maker panics elsewhere.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The volume.
    #[must_use]
    pub fn volume(&self) -> &str {
        &self.volume
    }

    /// Tells how far the job is: bytes of `subject`, a participle, done of so many, 0 if that is not known.
    pub fn progress(&self, subject: &str, done: u64, total: u64) {
        let now = Instant::now();
        let mut inner = self.lock();
        let same = inner.progress.subject == subject && done >= inner.progress.done;
        if !same {
            inner.samples.clear();
        }
        let due = inner
            .samples
            .back()
            .is_none_or(|(at, _)| now - *at >= SAMPLE_EVERY);
        if due {
            inner.samples.push_back((now, done));
            while inner.samples.len() > 2 && now - inner.samples[0].0 > RATE_OVER {
                inner.samples.pop_front();
            }
        }
        inner.progress = Progress {
            subject: subject.to_string(),
            done,
            total,
        };
        inner.changes += 1;
        drop(inner);
        self.changed.notify_all();
    }

    /// Tells those who wait something.
    pub fn note(&self, note: Note) {
        if let Note::Progress(p) = note {
            return self.progress(&p.subject, p.done, p.total);
        }
        let mut inner = self.lock();
        inner.notes.push_back(note);
        if inner.notes.len() > NOTES_MAX {
            inner.notes.pop_front();
            inner.first_note += 1;
        }
        drop(inner);
        self.changed.notify_all();
    }

    /// Whether the job is to end, and why.
    #[must_use]
    pub fn ending(&self) -> Option<Ending> {
        self.lock().ending
    }

    /// Fails if the job is to end.
    ///
    /// # Errors
    /// [`Ended`].
    pub fn check(&self) -> Result<()> {
        self.ending().map_or(Ok(()), |why| Err(Ended(why).into()))
    }

    /// Polls readable once the job is to end: for a job that waits for a descriptor.
    #[must_use]
    pub fn end_fd(&self) -> BorrowedFd<'_> {
        self.end.as_fd()
    }

    /// Waits for `time`, or less if the job is to end.
    ///
    /// # Errors
    /// [`Ended`].
    pub fn pause(&self, time: Duration) -> Result<()> {
        let until = Instant::now() + time;
        let mut inner = self.lock();
        while inner.ending.is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            let waited = self.changed.wait_timeout(inner, left);
            inner = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(inner);
        self.check()
    }

    fn end(&self, why: Ending) {
        let mut inner = self.lock();
        // What was cancelled stays cancelled.
        if inner.ending != Some(Ending::Cancelled) {
            inner.ending = Some(why);
        }
        drop(inner);
        // Fails only when the counter is full, and then it is readable anyway.
        let _ = self.end.write(1);
        self.changed.notify_all();
    }

    fn finish(&self, result: Result<String>) {
        let mut inner = self.lock();
        let asked = |error: &anyhow::Error| error.downcast_ref::<Ended>().map(|e| e.0);
        let state = match &result {
            Ok(_) => JobState::Done,
            Err(error) => match asked(error) {
                Some(Ending::Cancelled) => JobState::Cancelled,
                Some(Ending::Interrupted | Ending::Window) => JobState::Interrupted,
                None => JobState::Failed,
            },
        };
        let declined = result.as_ref().err();
        let declined = declined.and_then(|error| error.downcast_ref::<Declined>());
        inner.refused = declined.map(|declined| declined.code);
        let now = Timestamp::now().as_second();
        inner.over = Some((now, state, result.map_err(|e| format!("{e:#}"))));
        drop(inner);
        self.changed.notify_all();
    }

    /// The job as others see it.
    #[must_use]
    pub fn view(&self) -> JobView {
        let inner = self.lock();
        let state = match (&inner.over, inner.ending) {
            (Some((_, state, _)), _) => *state,
            (None, Some(_)) => JobState::Ending,
            (None, None) => JobState::Running,
        };
        let text = |result: &Result<String, String>| match result {
            Ok(text) | Err(text) => text.clone(),
        };
        JobView {
            id: self.id,
            volume: self.volume.clone(),
            name: self.name.clone(),
            state,
            progress: inner.progress.clone(),
            rate: rate(&inner.samples),
            started: self.started,
            ended: inner.over.as_ref().map(|o| o.0),
            refused: inner.refused,
            result: inner.over.as_ref().map(|o| text(&o.2)),
        }
    }

    /// Waits for the end, handing on what happens from now on; gives up when `on_note` says no.
    fn wait(&self, on_note: &mut dyn FnMut(Note) -> bool) -> Result<String> {
        let mut inner = self.lock();
        let mut seen = inner.first_note;
        let mut changes = 0;
        loop {
            let mut news: Vec<Note> = Vec::new();
            let skip = usize::try_from(seen.saturating_sub(inner.first_note)).unwrap_or(usize::MAX);
            news.extend(inner.notes.iter().skip(skip).cloned());
            seen = inner.first_note + inner.notes.len() as u64;
            if inner.changes != changes {
                changes = inner.changes;
                news.push(Note::Progress(inner.progress.clone()));
            }
            if news.is_empty() {
                match &inner.over {
                    Some((_, _, Ok(text))) => return Ok(text.clone()),
                    Some((_, _, Err(text))) => return Err(anyhow!("{text}")),
                    None => {}
                }
                let waited = self.changed.wait(inner);
                inner = waited.unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            drop(inner);
            if !news.into_iter().all(&mut *on_note) {
                bail!("nobody waits for it any more; it goes on");
            }
            inner = self.lock();
        }
    }
}

fn rate(samples: &VecDeque<(Instant, u64)>) -> Option<u64> {
    let (first, last) = (samples.front()?, samples.back()?);
    let micros = u64::try_from((last.0 - first.0).as_micros()).ok()?;
    let bytes = u128::from(last.1 - first.1) * 1_000_000;
    u64::try_from(bytes.checked_div(u128::from(micros))?).ok()
}

#[derive(Default)]
struct State {
    next: u64,
    running: Vec<Arc<Running>>,
    finished: VecDeque<JobView>,
    closed: bool,
}

/// All jobs of a daemon.
#[derive(Default)]
pub struct Jobs {
    state: Mutex<State>,
    /// A job has ended.
    ended: Condvar,
}

impl Jobs {
    /// None yet.
    #[must_use]
    pub fn new() -> Arc<Jobs> {
        Arc::default()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts `job` on `volume` and gives back what to wait for it by.
    ///
    /// # Errors
    /// A job of that name runs already, one must be alone, there are too many, or the daemon ends.
    pub fn start(self: &Arc<Self>, volume: &str, mut job: Box<dyn Job>) -> Result<Arc<Running>> {
        let mut state = self.lock();
        if state.closed {
            bail!("the daemon is ending");
        }
        let name = job.name();
        for other in state.running.iter().filter(|r| r.volume == volume) {
            if other.name == name {
                bail!("'{name}' runs already on volume '{volume}'");
            }
            if other.is_alone || job.is_alone() {
                bail!(
                    "'{name}' cannot run on volume '{volume}' while '{0}' does: wait for it, or end it with \
                     `zumastor cancel {volume} {0}`",
                    other.name
                );
            }
        }
        if state.running.len() >= RUNNING_MAX {
            bail!("{RUNNING_MAX} jobs run already, as many as there may be: try again later");
        }
        state.next += 1;
        let running = Arc::new(Running {
            id: state.next,
            volume: volume.to_string(),
            name,
            is_alone: job.is_alone(),
            is_cancellable: job.is_cancellable(),
            started: Timestamp::now().as_second(),
            inner: Mutex::new(Inner {
                ending: None,
                progress: Progress::default(),
                samples: VecDeque::new(),
                notes: VecDeque::new(),
                first_note: 0,
                changes: 0,
                refused: None,
                over: None,
            }),
            changed: Condvar::new(),
            end: EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?,
        });
        let (this, handle) = (self.clone(), running.clone());
        let work = move || {
            // The other jobs go on, and who waits for this one is told.
            let result = catch_unwind(AssertUnwindSafe(|| job.run(&handle)));
            drop(job);
            let result = result.unwrap_or_else(|_| bail!("an internal error; see the journal"));
            this.retire(&handle, result);
        };
        thread::Builder::new()
            .name(format!("job {}", running.id))
            .spawn(work)
            .context("could not start a thread")?;
        state.running.push(running.clone());
        Ok(running)
    }

    fn retire(&self, running: &Arc<Running>, result: Result<String>) {
        let mut state = self.lock();
        // With the lock: who has waited for the end may start the next one of that name.
        running.finish(result);
        state.running.retain(|r| !Arc::ptr_eq(r, running));
        let (volume, name) = (&running.volume, &running.name);
        let same = |v: &JobView| v.volume == *volume && v.name == *name;
        state.finished.retain(|v| !same(v));
        state.finished.push_back(running.view());
        if state.finished.len() > FINISHED_MAX {
            state.finished.pop_front();
        }
        drop(state);
        self.ended.notify_all();
    }

    /// Waits for the end of a job, handing on what happens from now on; gives back what the job did. Gives up
    /// when `on_note` says no.
    ///
    /// # Errors
    /// The job's own.
    pub fn wait(running: &Running, on_note: &mut dyn FnMut(Note) -> bool) -> Result<String> {
        running.wait(on_note)
    }

    /// The job called `name` of `volume`, if it runs.
    #[must_use]
    pub fn find(&self, volume: &str, name: &str) -> Option<Arc<Running>> {
        let state = self.lock();
        let mut running = state.running.iter();
        running
            .find(|r| r.volume == volume && r.name == name)
            .cloned()
    }

    /// Asks the job called `name` of `volume` to end for good; does not wait.
    ///
    /// # Errors
    /// There is none, or it cannot be cancelled.
    pub fn cancel(&self, volume: &str, name: &str) -> Result<()> {
        let state = self.lock();
        let mut running = state.running.iter();
        let job = running.find(|r| r.volume == volume && r.name == name);
        let Some(job) = job else {
            bail!("no job '{name}' runs on volume '{volume}'");
        };
        if !job.is_cancellable {
            bail!(
                "'{name}' cannot be cancelled once it has begun; `zumastor stop volume {volume}` interrupts it"
            );
        }
        job.end(Ending::Cancelled);
        Ok(())
    }

    /// Asks the job called `name` of `volume`, or all of them, to end; does not wait. Gives back their names.
    pub fn end(&self, volume: &str, name: Option<&str>, why: Ending) -> Vec<String> {
        let state = self.lock();
        let meant = |r: &&Arc<Running>| r.volume == volume && name.is_none_or(|n| r.name == n);
        let meant: Vec<&Arc<Running>> = state.running.iter().filter(meant).collect();
        meant.iter().for_each(|r| r.end(why));
        meant.iter().map(|r| r.name.clone()).collect()
    }

    /// Asks the job called `name` of `volume`, or all of them, to end, and waits until they have, for a limited time.
    ///
    /// # Errors
    /// One does not end.
    pub fn end_and_wait(
        &self,
        volume: &str,
        name: Option<&str>,
        why: Ending,
        limit: Duration,
    ) -> Result<()> {
        self.end(volume, name, why);
        let until = Instant::now() + limit;
        let mut state = self.lock();
        let meant = |r: &&Arc<Running>| r.volume == volume && name.is_none_or(|n| r.name == n);
        while let Some(job) = state.running.iter().find(meant) {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!(
                    "'{}' was asked to end and has not in {} s",
                    job.name,
                    limit.as_secs()
                );
            }
            let waited = self.ended.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Starts no more jobs, interrupts those that run and waits for them, for a limited time. Gives back the
    /// jobs that have not ended.
    pub fn close(&self, limit: Duration) -> Vec<JobView> {
        let until = Instant::now() + limit;
        let mut state = self.lock();
        state.closed = true;
        state
            .running
            .iter()
            .for_each(|r| r.end(Ending::Interrupted));
        while !state.running.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            let waited = self.ended.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.running.iter().map(|r| r.view()).collect()
    }

    /// The jobs of `volume` that run, and how the last one of each name ended.
    #[must_use]
    pub fn views(&self, volume: &str) -> Vec<JobView> {
        let state = self.lock();
        let running: Vec<JobView> = state.running.iter().map(|r| r.view()).collect();
        let again = |v: &JobView| {
            running
                .iter()
                .any(|r| r.volume == v.volume && r.name == v.name)
        };
        let finished = state.finished.iter().filter(|v| !again(v)).cloned();
        let mut all: Vec<JobView> = finished.chain(running.iter().cloned()).collect();
        all.retain(|v| v.volume == volume);
        all
    }

    /// Forgets how jobs of `volume` ended, as the volume is forgotten.
    pub fn forget(&self, volume: &str) {
        self.lock().finished.retain(|v| v.volume != volume);
    }
}

#[cfg(test)]
mod tests;
