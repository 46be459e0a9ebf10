// SPDX-License-Identifier: GPL-2.0-only
//! How each replication fares, with what to do: from the document, the jobs, and what is due.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::View;
use super::json::time;
use crate::config::Snapref;
use crate::human;
use crate::jobs::{JobState, JobView};
use crate::names;
use crate::volume::superseded_line;

/// The refusal of a sender whose epoch is older.
const SUPERSEDED: u16 = 2;

/// A cycle that comes by itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NextCycle {
    /// The target; none: the source.
    pub target: Option<String>,
    /// When, in seconds since 1970-01-01 UTC.
    pub at: i64,
    /// Failures in a row before.
    pub failures: u32,
    /// Why the last one could not even be begun.
    pub error: Option<String>,
}

/// What a replication does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// A cycle runs.
    Running,
    /// The next one comes by itself.
    Waiting,
    /// The last one failed, and the next one comes by itself, later than it would.
    BackingOff,
    /// The last one failed, and none comes by itself.
    Failed,
    /// The last one was refused: a person must decide.
    Refused,
    /// Another machine has become the master.
    Superseded,
    /// It was stopped.
    Stopped,
    /// None comes by itself.
    Idle,
}

impl State {
    /// In a word, as programs know it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            State::Running => "running",
            State::Waiting => "waiting",
            State::BackingOff => "backing-off",
            State::Failed => "failed",
            State::Refused => "refused",
            State::Superseded => "superseded",
            State::Stopped => "stopped",
            State::Idle => "idle",
        }
    }
}

/// A replication of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replication {
    /// The other machine.
    pub host: String,
    /// Data goes there; else it comes from there.
    pub sends: bool,
    /// What it does.
    pub state: State,
    /// When the next cycle comes by itself, in seconds since 1970-01-01 UTC.
    pub next: Option<i64>,
    /// Failures in a row.
    pub failures: u32,
    /// The newest snapshot that is known to be on both sides.
    pub hold: Option<u32>,
    /// Seconds since that was taken.
    pub lag: Option<i64>,
    /// Bytes done of the cycle that runs.
    pub done: Option<u64>,
    /// Bytes a second of it.
    pub rate: Option<u64>,
    /// Seconds left of it.
    pub seconds_left: Option<u64>,
    /// Why the last cycle failed, if it did.
    pub last_error: Option<String>,
    /// When both sides were last proven equal.
    pub proven: Option<i64>,
    /// What to do, if there is something.
    pub help: Option<String>,
}

/// All replications of a volume at `now`, in seconds since 1970-01-01 UTC.
#[must_use]
pub fn of(view: &View, now: i64) -> Vec<Replication> {
    let Some(config) = &view.config else {
        return Vec::new();
    };
    let mut all: Vec<Replication> = Vec::new();
    for (host, target) in &config.targets {
        let facts = (target.stopped, target.hold, target.proven);
        all.push(one(view, (host, true), facts, now));
    }
    if let Some(source) = &config.source {
        let facts = (source.stopped, source.hold, source.proven);
        all.push(one(view, (&source.host, false), facts, now));
    }
    all
}

fn one(
    view: &View,
    (host, sends): (&str, bool),
    (stopped, hold, proven): (bool, Option<Snapref>, Option<i64>),
    now: i64,
) -> Replication {
    let name = names::cycle_job(sends.then_some(host));
    let job = view.jobs.iter().rev().find(|job| job.name == name);
    let running = job.filter(|job| !job.state.is_over());
    let failed = job.filter(|job| job.state == JobState::Failed);
    let target = sends.then(|| host.to_owned());
    let due = view.due.iter().find(|due| due.target == target);
    let refused = failed.and_then(|job| job.refused);
    let lineage = view.config.as_ref().map(|config| &config.lineage);
    let superseded = lineage.and_then(|lineage| superseded_line(&view.name, lineage));
    let superseded = superseded.filter(|_| sends);
    let state = match (running, due) {
        (Some(_), _) => State::Running,
        _ if superseded.is_some() || refused == Some(SUPERSEDED) => State::Superseded,
        _ if stopped => State::Stopped,
        _ if refused.is_some() => State::Refused,
        (None, Some(due)) if due.failures > 0 => State::BackingOff,
        (None, Some(_)) => State::Waiting,
        (None, None) if failed.is_some() => State::Failed,
        (None, None) => State::Idle,
    };
    let told = |job: &JobView| job.result.clone();
    let error = failed.and_then(told).or_else(|| due?.error.clone());
    let list = view.config.iter().flat_map(|c| &c.snapshots.list);
    let held = hold.and_then(|hold| list.into_iter().find(|s| s.id == hold.id));
    Replication {
        host: host.to_owned(),
        sends,
        state,
        next: due
            .filter(|_| !stopped && running.is_none())
            .map(|due| due.at),
        failures: due.map_or(0, |due| due.failures),
        hold: hold.map(|hold| hold.id),
        lag: held.map(|held| now.saturating_sub(held.created)),
        done: running.map(|job| job.progress.done),
        rate: running.and_then(|job| job.rate),
        seconds_left: running.and_then(JobView::seconds_left),
        last_error: error,
        proven,
        help: superseded.or_else(|| help(&view.name, host, sends, state)),
    }
}

/// What is wrong with the replications of a volume.
#[derive(Debug, Default)]
pub struct Problems {
    /// A sentence for each, with what to do.
    pub lines: Vec<String>,
    /// Jobs that failed and are told of by these.
    jobs: Vec<String>,
}

impl Problems {
    /// Whether all there is to say of a job is said here.
    #[must_use]
    pub fn tells(&self, job: &JobView) -> bool {
        job.state == JobState::Failed && self.jobs.contains(&job.name)
    }
}

/// What is wrong with the replications of a volume, to be told before anything else.
#[must_use]
pub fn problems(view: &View) -> Problems {
    let mut problems = Problems::default();
    // No error depends on the time.
    for one in of(view, 0) {
        let Some(error) = &one.last_error else {
            continue;
        };
        let way = if one.sends { "to" } else { "from" };
        let mut line = format!("replication {way} {}: {error}", one.host);
        // A superseded volume has a warning of its own.
        if let Some(help) = one.help.filter(|help| !view.warnings.contains(help)) {
            line += &format!("; {help}");
        }
        problems.lines.push(line);
        problems
            .jobs
            .push(names::cycle_job(one.sends.then_some(&one.host)));
    }
    problems
}

fn help(volume: &str, host: &str, sends: bool, state: State) -> Option<String> {
    let (role, operands) = if sends {
        ("target", format!("{volume} {host}"))
    } else {
        ("source", volume.to_owned())
    };
    let again = if sends {
        format!("`zumastor replicate {volume} {host}`")
    } else {
        format!("`zumastor replicate {volume}`")
    };
    match state {
        State::Running | State::Waiting | State::Idle => None,
        State::BackingOff => Some(format!("it is tried again by itself; at once with {again}")),
        State::Failed => Some(format!("nothing tries again by itself: {again}")),
        State::Refused => Some("the last error says what a person must decide".into()),
        State::Superseded => Some(format!(
            "another machine is master of this volume now: `zumastor failback {volume} {host}` makes this one its \
             replica"
        )),
        State::Stopped => Some(format!("`zumastor start {role} {operands}`")),
    }
}

impl Replication {
    /// As programs get it.
    #[must_use]
    pub fn json(&self) -> Value {
        json!({
            "host": self.host,
            "direction": if self.sends { "to" } else { "from" },
            "state": self.state.name(),
            "next": self.next.map(time),
            "failures": self.failures,
            "hold": self.hold,
            "lag_seconds": self.lag,
            "done": self.done,
            "rate": self.rate,
            "seconds_left": self.seconds_left,
            "last_error": self.last_error,
            "proven": self.proven.map(time),
            "help": self.help,
        })
    }

    /// What it does, for people.
    fn words(&self, now: i64) -> String {
        let next = |before: &str| match self.next {
            Some(at) if at > now => {
                let left = u64::try_from(at - now).unwrap_or(0);
                format!("{before}, next in {}", human::seconds(left))
            }
            _ => before.to_owned(),
        };
        match self.state {
            State::BackingOff => next(&format!("backing off after {} failures", self.failures)),
            State::Waiting | State::Refused | State::Superseded => next(self.state.name()),
            State::Idle => "when asked".into(),
            State::Running | State::Failed | State::Stopped => self.state.name().to_owned(),
        }
    }
}

/// A line for each replication of `views`, and what to do; nothing if there is none.
#[must_use]
pub fn table(views: &[View], now: i64) -> String {
    let mut rows = Vec::new();
    let mut rest = String::new();
    for view in views {
        for one in of(view, now) {
            let way = if one.sends { "->" } else { "<-" };
            let name = format!("{} {way} {}", view.name, one.host);
            let dash = || "-".to_owned();
            let ago = |seconds: i64| {
                let seconds = u64::try_from(seconds).unwrap_or(0);
                format!("{} ago", human::seconds(seconds))
            };
            rows.push(vec![
                name.clone(),
                one.words(now),
                one.lag.map_or_else(dash, ago),
                one.rate
                    .map_or_else(dash, |r| format!("{}/s", human::bytes(r))),
                one.seconds_left.map_or_else(dash, human::seconds),
                one.proven.map_or_else(dash, |at| ago(now - at)),
            ]);
            // What failed is among the problems, with what to do.
            if let Some(help) = one.help.as_ref().filter(|_| one.last_error.is_none()) {
                rest += &format!("{name}: {help}\n");
            }
        }
    }
    if rows.is_empty() {
        return String::new();
    }
    let head = [
        "REPLICATION",
        "STATE",
        "HAS WHAT WAS",
        "RATE",
        "LEFT",
        "PROVEN EQUAL",
    ];
    rows.insert(0, head.map(str::to_owned).to_vec());
    super::table::columns(&rows) + &rest
}

#[cfg(test)]
mod tests;
