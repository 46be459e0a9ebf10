// SPDX-License-Identifier: GPL-2.0-only
//! `forget volume`, `forget snapshot` and `protect`: all of it goes, or, if it is in use, all of it stays.

use anyhow::{Context, Result, bail};

use super::snapshot::PROTECTED;
use super::{Note, Out, Volume};
use crate::config::Doomed;
use crate::human;
use crate::plan::{self, Action, Level};

impl Volume {
    /// Stops the volume and deletes what is known of it. The devices keep their contents.
    pub fn forget(&mut self, out: Out) -> Result<()> {
        self.down(Level::Down, out)?;
        for action in plan::forget() {
            self.perform(action, out)?;
        }
        self.announce();
        for file in [
            self.layout.agent_pid(&self.name),
            self.layout.server_pid(&self.name),
            self.layout.agent_socket(&self.name),
            self.layout.server_socket(&self.name),
        ] {
            // Left by processes that were killed; nobody listens there any more.
            let _ = std::fs::remove_file(file);
        }
        self.log("forgotten");
        Ok(())
    }

    /// Says what [`forget`](Self::forget) would do, after its checks.
    pub fn would_forget(&self, out: Out) -> Result<()> {
        let mut steps = plan::down(&self.wanted(Level::Down), &self.observe()?);
        self.check_unheld(&steps)?;
        steps.extend(plan::forget());
        self.tell_steps(&steps, out);
        Ok(())
    }

    pub(super) fn tell_steps(&self, steps: &[Action], out: Out) {
        for step in steps {
            out(Note::Line(format!("would {}", step.describe(&self.name))));
        }
    }

    /// Deletes one snapshot: its mount, its device, its entry, its data.
    ///
    /// What can be taken back comes first. The document then no longer lists the snapshot and says that
    /// its data is to go, and only when that is durable the data goes: so a document that cannot be
    /// written leaves all as it was, and whatever fails later is done by the next start.
    pub fn forget_snapshot(&mut self, id: u32, out: Out) -> Result<()> {
        self.check_deletable(id)?;
        let mut unlisted = false;
        let twin = self.twin_of(id);
        let mut there = Vec::new();
        for tag in [Some(id), twin].into_iter().flatten() {
            if self.has_device(Some(tag))? {
                there.push(tag);
            }
        }
        for action in plan::delete(id, twin) {
            match self.perform(action, out) {
                Ok(()) => unlisted |= action == Action::Unlist(id),
                // The rest is in the status, and done by the next start.
                Err(error) if unlisted => self.log(&format!("{error:#}")),
                Err(error) => {
                    if let Err(again) = self.bring_back(id, &there, out) {
                        let text = format!("and it could not be brought back: {again:#}");
                        out(Note::Warning(text));
                    }
                    return Err(error);
                }
            }
        }
        self.log(&format!("snapshot {id} forgotten"));
        let deleting = &self.config.snapshots.deleting;
        if deleting.iter().any(|d| d.id == id) {
            out(Note::Warning(format!(
                "snapshot {id} is no longer listed, but its data is still in the store: see \
                 `zumastor status {}`",
                self.name
            )));
        }
        Ok(())
    }

    /// Shows again what of a snapshot was there.
    fn bring_back(&mut self, id: u32, there: &[u32], out: Out) -> Result<()> {
        let mut steps = self.steps_to_show(id)?;
        steps.retain(|action| match action {
            Action::CreateDevice(Some(tag)) | Action::Mount(Some(tag)) => there.contains(tag),
            _ => true,
        });
        let failures = self.carry_out(&steps, out).failures;
        failures.into_iter().next().map_or(Ok(()), |f| Err(f.2))
    }

    fn twin_of(&self, id: u32) -> Option<u32> {
        self.config.snapshots.find(id)?.twin
    }

    /// Says what [`forget_snapshot`](Self::forget_snapshot) would do, after its checks.
    pub fn would_forget_snapshot(&self, id: u32, out: Out) -> Result<()> {
        self.check_deletable(id)?;
        if let Some(snapshot) = self.config.snapshots.find(id) {
            out(Note::Line(format!(
                "snapshot {id}, {}, taken {}",
                snapshot.kinds.join(" "),
                human::utc(snapshot.created)
            )));
        }
        self.tell_steps(&plan::delete(id, self.twin_of(id)), out);
        Ok(())
    }

    fn check_deletable(&self, id: u32) -> Result<()> {
        let found = self.config.snapshots.find(id);
        let snapshot =
            found.with_context(|| format!("volume '{}' has no snapshot {id}", self.name))?;
        if self.level < Level::Devices {
            bail!(
                "volume '{0}' is stopped: run `zumastor start volume {0}`",
                self.name
            );
        }
        if snapshot.protected {
            bail!(
                "snapshot {id} is protected: run `zumastor unprotect {} {id}` first",
                self.name
            );
        }
        if let Some(holder) = self.held_by(id) {
            bail!("snapshot {id} is held by the replication {holder}: the next increment needs it");
        }
        let both = [Some(id), snapshot.twin].into_iter().flatten();
        let removals: Vec<Action> = both.map(|tag| Action::RemoveDevice(Some(tag))).collect();
        self.check_unheld(&removals)
    }

    /// The replication that needs a snapshot.
    pub(super) fn held_by(&self, id: u32) -> Option<String> {
        self.held_but_by(id, None)
    }

    /// The replication that needs a snapshot, the one to this target aside.
    pub(super) fn held_but_by(&self, id: u32, host: Option<&str>) -> Option<String> {
        let config = &self.config;
        for (name, target) in &config.targets {
            if host == Some(name.as_str()) {
                continue;
            }
            if [target.hold, target.sending]
                .iter()
                .flatten()
                .any(|s| s.id == id)
            {
                return Some(format!("to {name}"));
            }
        }
        let source = config.source.as_ref()?;
        let held = [source.hold, source.old_hold];
        let is_it = held.iter().flatten().any(|hold| hold.id == id);
        // What the origin has can be proven by that snapshot alone.
        let found = config.snapshots.find(id);
        let is_it = is_it || found.is_some_and(|s| Some(s.uuid) == source.origin);
        is_it.then(|| format!("from {}", source.host))
    }

    /// Takes a snapshot out of the document.
    pub(super) fn unlist(&mut self, id: u32) -> Result<()> {
        let stored = self
            .host
            .snapshots(&self.layout.server_socket(&self.name))?;
        let listed = self.config.snapshots.find(id).cloned();
        let twin = listed.as_ref().and_then(|s| s.twin);
        let before = self.config.clone();
        let snapshots = &mut self.config.snapshots;
        snapshots.list.retain(|s| s.id != id);
        let same = stored
            .iter()
            .filter(|s| listed.as_ref().is_some_and(|l| l.is(s)) || Some(s.tag.0) == twin);
        snapshots.deleting.extend(same.map(|s| Doomed {
            id: s.tag.0,
            sequence: s.seq.0,
        }));
        self.save().map_err(|error| {
            self.config = before;
            error.context(format!("snapshot {id} is not deleted"))
        })?;
        for tag in [Some(id), twin].into_iter().flatten() {
            self.plain.remove(&tag);
            let of_it = [format!("snapshot {tag} "), format!("snapshot {tag}:")];
            self.warnings
                .retain(|w| !of_it.iter().any(|start| w.starts_with(start)));
        }
        Ok(())
    }

    /// Keeps a snapshot from being deleted by rotations or given up by a full store, or no longer does.
    pub fn protect(&mut self, id: u32, protect: bool, out: Out) -> Result<()> {
        let found = self.config.snapshots.find(id).cloned();
        let snapshot =
            found.with_context(|| format!("volume '{}' has no snapshot {id}", self.name))?;
        if self.level == Level::Down {
            bail!(
                "volume '{0}' is stopped: run `zumastor start volume {0}`",
                self.name
            );
        }
        let server = self.layout.server_socket(&self.name);
        let held = self.is_held_fast(id);
        let priority = |protect| if protect || held { PROTECTED } else { 0 };
        self.patiently(|| self.host.set_priority(&server, id, priority(protect)))?;
        let before = self.config.clone();
        for listed in &mut self.config.snapshots.list {
            if listed.id == id {
                listed.protected = protect;
            }
        }
        if let Err(error) = self.save() {
            self.config = before;
            // What the document says counts, and the next start sees to that.
            let old = priority(snapshot.protected);
            let _ = self.host.set_priority(&server, id, old);
            return Err(error);
        }
        let line = if protect {
            format!(
                "snapshot {id} is protected: no rotation deletes it, and a full store fails writes to the origin \
                 rather than giving it up"
            )
        } else {
            format!("snapshot {id} is no longer protected")
        };
        self.log(&line);
        out(Note::Line(line));
        Ok(())
    }
}
