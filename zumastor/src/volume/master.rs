// SPDX-License-Identifier: GPL-2.0-only
//! The master role: the origin mounted, snapshots taken and mounted.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Note, Out, Volume, describe};
use crate::config::{Lineage, MANUAL, Snapshot};
use crate::machine::{SnapshotState, Stored};
use crate::names;
use crate::plan::Level;

/// The flags of `define master`, rewritten by every call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MasterFlags {
    /// Export snapshots over NFS.
    pub export: bool,
    /// Show snapshots below MOUNT/.snapshot.
    pub dotsnapshot: bool,
    /// Do not mount snapshots.
    pub no_snapmount: bool,
    /// Show snapshots to Samba.
    pub samba: bool,
}

impl MasterFlags {
    /// What to tell the administrator about these flags.
    fn warning(self) -> Option<String> {
        let given = [
            (self.export, "--export"),
            (self.dotsnapshot, "--dotsnapshot"),
            (self.samba, "--samba"),
        ];
        let names: Vec<&str> = given.into_iter().filter(|g| g.0).map(|g| g.1).collect();
        if names.is_empty() {
            return None;
        }
        let names = names.join(" ");
        Some(if self.no_snapmount {
            format!("--no-snapmount makes {names} ineffective")
        } else {
            format!("{names} stored, but without effect in this version")
        })
    }
}

impl Volume {
    /// Makes the volume a master, or changes the flags of one. Succeeds even if mounting fails: the
    /// file system may be made later.
    pub fn define_master(&mut self, flags: MasterFlags, out: Out) -> Result<()> {
        if let Some(source) = &self.config.source {
            // Half a copy is no file system, and two masters of one epoch would not know of each other.
            if source.hold.is_some() || source.incoming.is_some() || source.by_hand.is_some() {
                bail!(
                    "volume '{0}' is a replica of what {1} has: `zumastor failover {0}` makes it master, `zumastor \
                     forget source {0}` ends that it is one",
                    self.name,
                    source.host
                );
            }
        }
        if let Some(warning) = flags.warning() {
            out(Note::Warning(warning));
        }
        let adopted = match self.config.master {
            Some(_) => Vec::new(),
            None => self.adoptable(out)?,
        };
        let before = self.config.clone();
        let listed = adopted.len();
        if let Err(error) = self.adopt(adopted) {
            self.config = before;
            return Err(error);
        }
        let filesystem = &mut self.config.filesystem;
        filesystem.mountsnap = !flags.no_snapmount;
        filesystem.export = flags.export && !flags.no_snapmount;
        filesystem.dotsnapshot = flags.dotsnapshot && !flags.no_snapmount;
        filesystem.samba = flags.samba && !flags.no_snapmount;
        if self.config.master.is_none() && !self.is_own_epoch() {
            // The upstream is master of what was received, and goes on: this is another volume from now on, or a third
            // machine would take increments from both.
            self.config.lineage = Lineage::first(self.config.uuid);
        }
        self.config.master.get_or_insert_default();
        let source = self.config.source.take();
        if let Err(error) = self.save() {
            self.config = before;
            return Err(error);
        }
        if let Some(source) = source {
            out(Note::Warning(format!(
                "volume '{}' is no longer a replica of '{}' on {}",
                self.name,
                source.name.as_deref().unwrap_or(&self.name),
                source.host
            )));
        }
        if listed > 0 {
            let line = format!("{listed} snapshots that the store had are listed and kept");
            self.log(&line);
            out(Note::Line(line));
        }
        let report = self.up(Level::Mounted, out)?;
        for (scope, _, error) in &report.failures {
            out(Note::Warning(describe(*scope, error)));
        }
        for note in &self.notes {
            out(Note::Line(note.clone()));
        }
        Ok(())
    }

    /// What the store has and the volume does not list, as that of an earlier volume does.
    fn adoptable(&mut self, out: Out) -> Result<Vec<Stored>> {
        self.up(Level::Devices.max(self.level), out)?;
        let server = self.layout.server_socket(&self.name);
        let mut stored = self.host.snapshots(&server)?;
        let snapshots = &self.config.snapshots;
        let known = |tag| {
            let mut listed = snapshots.list.iter();
            listed.any(|s| s.id == tag || s.twin == Some(tag))
                || snapshots.deleting.iter().any(|d| d.id == tag)
        };
        stored.retain(|s| !known(s.tag.0) && s.state != SnapshotState::Bookmark);
        Ok(stored)
    }

    /// Lists what was found in the store. Numbers go on above it.
    fn adopt(&mut self, found: Vec<Stored>) -> Result<()> {
        let snapshots = &mut self.config.snapshots;
        for stored in found {
            let time = names::local_time_of(stored.created);
            let id = stored.tag.0;
            let next = id.checked_add(2).map(|above| above & !1);
            let next = next.context("all snapshot numbers are used up")?;
            snapshots.next = snapshots.next.max(next);
            snapshots.list.push(Snapshot {
                id,
                uuid: uuid::Uuid::new_v4(),
                kinds: vec![MANUAL.to_string()],
                time: snapshots.unique_time(&time),
                created: stored.created,
                sequence: Some(stored.seq.0),
                protected: false,
                twin: None,
            });
        }
        snapshots.list.sort_by_key(|s| s.created);
        Ok(())
    }

    /// Mounts everything; an error if something could not be mounted.
    pub fn start_master(&mut self, out: Out) -> Result<()> {
        if self.config.master.is_none() {
            bail!(
                "volume '{0}' has no master: run `zumastor define master {0}`",
                self.name
            );
        }
        self.start(Level::Mounted, out)
    }

    /// Unmounts everything; devices, agent and server stay.
    pub fn stop_master(&mut self, out: Out) -> Result<()> {
        if self.config.master.is_none() {
            bail!(
                "volume '{0}' has no master: run `zumastor define master {0}`",
                self.name
            );
        }
        self.down(Level::Devices.min(self.level), out)
    }

    /// Brings the volume up to `level`; an error if anything failed.
    pub fn start(&mut self, level: Level, out: Out) -> Result<()> {
        let report = self.up(level, out)?;
        match report.failures.into_iter().next() {
            None => Ok(()),
            Some((scope, _, error)) => bail!("{}", describe(scope, &error)),
        }
    }
}
