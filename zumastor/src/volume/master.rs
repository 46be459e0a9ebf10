// SPDX-License-Identifier: GPL-2.0-only
//! The master role: the origin mounted, snapshots taken and mounted.

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use super::{Note, Out, Volume, describe};
use crate::config::Master;
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
        let filesystem = &mut self.config.filesystem;
        filesystem.mountsnap = !flags.no_snapmount;
        filesystem.export = flags.export && !flags.no_snapmount;
        filesystem.dotsnapshot = flags.dotsnapshot && !flags.no_snapmount;
        filesystem.samba = flags.samba && !flags.no_snapmount;
        self.config.master.get_or_insert_with(Master::default);
        self.save()?;
        let report = self.up(Level::Mounted, out)?;
        for (scope, _, error) in &report.failures {
            out(Note::Line(format!("WARNING: {}", describe(*scope, error))));
        }
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
    pub fn stop_master(&mut self) -> Result<()> {
        if self.config.master.is_none() {
            bail!(
                "volume '{0}' has no master: run `zumastor define master {0}`",
                self.name
            );
        }
        self.down(Level::Devices.min(self.level))
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
