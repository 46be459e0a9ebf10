// SPDX-License-Identifier: GPL-2.0-only
//! Rotations: defined, served when they are due, and trimmed.

use anyhow::{Result, bail};
use jiff::Zoned;
use serde::{Deserialize, Serialize};

use super::replica::REPLICA;
use super::{Note, Out, Volume};
use crate::config::{MANUAL, Rotation};
use crate::human;
use crate::names;
use crate::plan::Level;
use crate::refusal::{BUDGET, Refusal};
use crate::schedule::{self, Verdict};

/// Rotations that have their slots by the calendar.
const BUILT_IN: [&str; 4] = ["hourly", "daily", "weekly", "monthly"];

/// Most snapshots that the rotations of a volume may keep, what replication needs among them.
pub const BUDGET_MAX: u64 = 4000;

/// A rotation as `define schedule` gives it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WantedRotation {
    /// Its name.
    pub kind: String,
    /// How many are kept; 0 ends the rotation.
    pub keep: u32,
    /// One of the administrator's own, and the seconds between two of its snapshots, if it has a period.
    pub custom: Option<Option<u64>>,
}

impl Volume {
    /// The rotation called `kind`.
    #[must_use]
    pub fn rotation(&self, kind: &str) -> Option<&Rotation> {
        self.config.schedule.iter().find(|r| r.kind == kind)
    }

    /// Adds, changes and ends rotations; the others stay. Nothing is deleted before the next snapshot.
    pub fn define_schedule(&mut self, wanted: &[WantedRotation], out: Out) -> Result<()> {
        if self.config.master.is_none() && self.config.source.is_none() {
            bail!(
                "volume '{0}' has neither a master nor a source: run `zumastor define master {0}`",
                self.name
            );
        }
        let mut schedule = self.config.schedule.clone();
        let now = self.host.now();
        for (index, rotation) in wanted.iter().enumerate() {
            let kind = &rotation.kind;
            let custom = rotation.custom.is_some();
            if custom
                && (BUILT_IN.contains(&kind.as_str()) || [MANUAL, REPLICA].contains(&kind.as_str()))
            {
                bail!("'{kind}' is the name of a rotation that is built in");
            }
            names::check_kind(kind)?;
            if wanted[..index].iter().any(|r| r.kind == *kind) {
                bail!("rotation '{kind}' is given twice");
            }
            let every = rotation.custom.flatten();
            let at = schedule.iter().position(|r| r.kind == *kind);
            match (at, rotation.keep) {
                (Some(at), 0) => {
                    schedule.remove(at);
                }
                (None, 0) => {}
                (Some(at), keep) => {
                    let changed = schedule[at].every != every;
                    schedule[at].keep = keep;
                    schedule[at].every = every;
                    if changed {
                        schedule[at].served = None;
                    }
                }
                (None, keep) => schedule.push(Rotation {
                    kind: kind.clone(),
                    keep,
                    every,
                    served: None,
                }),
            }
        }
        for rotation in &mut schedule {
            // A new one begins with its next slot.
            if let Verdict::Rebase(slot) = schedule::verdict(rotation, &now) {
                rotation.served = Some(slot);
            }
        }
        let (targets, has_source) = (self.config.targets.len(), self.config.source.is_some());
        let sum = schedule::budget(&schedule, targets, has_source);
        if sum > BUDGET_MAX {
            let text = format!(
                "the rotations of '{}' would keep {sum} snapshots with those that replication needs, and \
                 {BUDGET_MAX} are possible",
                self.name
            );
            return Err(Refusal { code: BUDGET, text }.into());
        }
        self.set_schedule(schedule, out)
    }

    /// Ends the rotation called `kind`, or all of them. Their snapshots stay.
    pub fn forget_schedule(&mut self, kind: Option<&str>, out: Out) -> Result<()> {
        let mut schedule = self.config.schedule.clone();
        schedule.retain(|r| kind.is_some_and(|k| r.kind != k));
        if schedule.len() == self.config.schedule.len() {
            let what = kind.map_or_else(String::new, |k| format!(" for '{k}' snapshots"));
            bail!("volume '{}' has no schedule{what}", self.name);
        }
        self.set_schedule(schedule, out)
    }

    fn set_schedule(&mut self, schedule: Vec<Rotation>, out: Out) -> Result<()> {
        let before = std::mem::replace(&mut self.config.schedule, schedule);
        if let Err(error) = self.save() {
            self.config.schedule = before;
            return Err(error);
        }
        let now = self.host.now();
        for rotation in &self.config.schedule {
            let next = schedule::next_slot(rotation.period(), &now);
            let next = next.map_or_else(
                || format!("by `zumastor snapshot {} {}`", self.name, rotation.kind),
                |at| format!("next {}", names::local_time_of(at)),
            );
            let every = rotation.every;
            let every = every.map_or_else(String::new, |s| format!(" every {}", human::seconds(s)));
            let line = format!("{}{every}: {} kept, {next}", rotation.kind, rotation.keep);
            self.log(&line);
            out(Note::Line(line));
        }
        for ended in before.iter().filter(|b| self.rotation(&b.kind).is_none()) {
            let left = self.config.snapshots.of_kind(&ended.kind).count();
            let line = format!("{}: ended, {left} snapshots stay", ended.kind);
            self.log(&line);
            out(Note::Line(line));
        }
        Ok(())
    }

    /// Takes one snapshot for all rotations that are due at `now`, if any is, and gives back its number. Those of a
    /// replica get the next snapshot that arrives.
    pub fn take_due(&mut self, now: &Zoned, out: Out) -> Result<Option<u32>> {
        let is_replica = self.config.source.is_some();
        let takes = self.config.master.is_some() && self.level == Level::Mounted;
        if self.reverting.is_some() || !(takes || is_replica) {
            return Ok(None);
        }
        let mut due = Vec::new();
        let mut rebased = false;
        let before = self.config.clone();
        for rotation in &mut self.config.schedule {
            match schedule::verdict(rotation, now) {
                Verdict::Wait => {}
                Verdict::Rebase(slot) => {
                    rotation.served = Some(slot);
                    rebased = true;
                }
                Verdict::Due(slot) => {
                    due.push(rotation.kind.clone());
                    if is_replica {
                        rotation.served = Some(slot);
                    }
                }
            }
        }
        if is_replica && !due.is_empty() {
            // Not served, if that cannot be written down.
            self.await_arrival(&due)
                .inspect_err(|_| self.config = before)?;
            return Ok(None);
        }
        if rebased {
            self.save()?;
        }
        if due.is_empty() {
            return Ok(None);
        }
        let what = format!("the snapshot that is due ({})", due.join(", "));
        self.warnings.retain(|w| !w.starts_with(DUE));
        match self.take(&due, out) {
            Ok(id) => Ok(Some(id)),
            Err(error) => {
                self.warnings
                    .push(format!("{DUE} ({}) failed: {error:#}", due.join(", ")));
                Err(error.context(format!("{what} could not be taken")))
            }
        }
    }

    /// Has the next snapshot that arrives from upstream belong to these rotations.
    pub(super) fn await_arrival(&mut self, kinds: &[String]) -> Result<()> {
        let before = self.config.clone();
        if let Some(source) = &mut self.config.source {
            for kind in kinds {
                if !source.pending.contains(kind) {
                    source.pending.push(kind.clone());
                }
            }
        }
        self.save().inspect_err(|_| self.config = before)
    }

    /// Deletes what leaves rotations now that a snapshot was taken for them. What cannot go is tried again with
    /// the next snapshot.
    pub(super) fn rotate(&mut self, kinds: &[String], out: Out) {
        self.warnings.retain(|w| !w.starts_with(LEFT));
        let mut leaving = Vec::new();
        let schedule = self.config.schedule.clone();
        for rotation in schedule.iter().filter(|r| kinds.contains(&r.kind)) {
            for id in schedule::leaving(rotation, &self.config.snapshots.list) {
                let list = &mut self.config.snapshots.list;
                let Some(snapshot) = list.iter_mut().find(|s| s.id == id) else {
                    continue;
                };
                // The document is written with what is deleted, or with the next snapshot.
                if snapshot.kinds.len() > 1 {
                    snapshot.kinds.retain(|k| *k != rotation.kind);
                } else {
                    leaving.push((id, &rotation.kind));
                }
            }
        }
        for (id, kind) in leaving {
            if self.held_by(id).is_some() {
                continue;
            }
            if let Err(error) = self.forget_snapshot(id, out) {
                let text = format!("{LEFT} rotation '{kind}', but snapshot {id} stays: {error:#}");
                self.log(&text);
                self.warnings.push(text);
            }
        }
    }
}

/// What warnings begin with that the next snapshot may make obsolete.
const DUE: &str = "the last snapshot by schedule";
const LEFT: &str = "the oldest leaves";
