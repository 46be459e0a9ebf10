// SPDX-License-Identifier: GPL-2.0-only
//! The master role: the origin mounted, snapshots taken and mounted.

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Note, Out, Volume, describe};
use crate::config::{MANUAL, Master, Snapshot};
use crate::mounts;
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
            format!("WARNING: --no-snapmount makes {names} ineffective")
        } else {
            format!("WARNING: {names} stored, but without effect in this version")
        })
    }
}

impl Volume {
    /// Makes the volume a master, or changes the flags of one. Succeeds even if mounting fails: the
    /// file system may be made later.
    pub fn define_master(&mut self, flags: MasterFlags, out: Out) -> Result<()> {
        if let Some(warning) = flags.warning() {
            out(Note::Line(warning));
        }
        let adopted = match self.config.master {
            Some(_) => None,
            None => Some(self.adopt(out)?),
        };
        let before = self.config.clone();
        let filesystem = &mut self.config.filesystem;
        filesystem.mountsnap = !flags.no_snapmount;
        filesystem.export = flags.export && !flags.no_snapmount;
        filesystem.dotsnapshot = flags.dotsnapshot && !flags.no_snapmount;
        filesystem.samba = flags.samba && !flags.no_snapmount;
        let listed = adopted.as_ref().map_or(0, |m| m.snapshots.len());
        self.config.master = adopted.or(self.config.master.take());
        if let Err(error) = self.save() {
            self.config = before;
            return Err(error);
        }
        if listed > 0 {
            let line = format!("{listed} snapshots that the store had are listed and kept");
            self.log(&line);
            out(Note::Line(line));
        }
        let report = self.up(Level::Mounted, out)?;
        for (scope, _, error) in &report.failures {
            out(Note::Line(format!("WARNING: {}", describe(*scope, error))));
        }
        for note in &self.notes {
            out(Note::Line(note.clone()));
        }
        Ok(())
    }

    /// A master role that lists what the store has already, as one of an earlier volume does. Numbers go
    /// on above it.
    fn adopt(&mut self, out: Out) -> Result<Master> {
        let before = self.level;
        self.up(Level::Devices.max(before), out)?;
        let server = self.layout.server_socket(&self.name);
        let mut master = Master::default();
        for stored in self.host.snapshots(&server)? {
            let time = mounts::local_time(stored.created);
            let snapshot = Snapshot {
                id: stored.tag.0,
                kind: MANUAL.to_string(),
                time: mounts::unique_time(&time, &master.snapshots),
            };
            let next = snapshot.id.checked_add(2).map(|above| above & !1);
            let next = next.context("all snapshot numbers are used up")?;
            master.next = master.next.max(next);
            master.snapshots.push(snapshot);
        }
        Ok(master)
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
