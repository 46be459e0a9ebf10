// SPDX-License-Identifier: GPL-2.0-only
//! `forget volume` and `forget snapshot`: all of it goes, or, if it is in use, all of it stays.

use anyhow::{Result, bail};

use super::{Note, Out, Volume};
use crate::boot;
use crate::config;
use crate::mounts;
use crate::plan::{Action, Level};

impl Volume {
    /// Stops the volume and deletes what is known of it. The devices keep their contents.
    pub fn forget(&mut self, out: Out) -> Result<()> {
        let before = self.level;
        if let Err(error) = self.down(Level::Down) {
            // What did go comes back. The cause of the refusal matters more than trouble with that.
            if let Err(again) = self.start(before, out) {
                let text = format!("WARNING: and it could not be brought back: {again:#}");
                out(Note::Line(text));
            }
            return Err(error);
        }
        self.perform(Action::RemoveLinks, out)?;
        // Only if empty: what somebody put below a mount point is his.
        mounts::remove_empty_dir(&self.layout.mountpoint(&self.name))?;
        // First: what has a record comes up at boot.
        boot::forget(&self.layout, &self.name)?;
        config::remove(&self.layout, &self.name)?;
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

    /// Deletes one snapshot: its mount, its device, its data, its entry.
    ///
    /// The entry goes last. If the daemon dies before, the next start finds that the store no longer
    /// has the snapshot, or mounts it again: in no order of events does an entry name another's data.
    pub fn forget_snapshot(&mut self, id: u32, out: Out) -> Result<()> {
        if !self.snapshots().iter().any(|s| s.id == id) {
            bail!("volume '{}' has no snapshot {id}", self.name);
        }
        if self.level == Level::Down {
            bail!(
                "volume '{0}' is stopped: run `zumastor start volume {0}`",
                self.name
            );
        }
        if let Err(error) = self.delete_snapshot(id, out) {
            if let Err(again) = self.up(self.level, out) {
                let text = format!("WARNING: and it could not be brought back: {again:#}");
                out(Note::Line(text));
            }
            return Err(error);
        }
        let before = self.config.clone();
        if let Some(master) = self.config.master.as_mut() {
            master.snapshots.retain(|s| s.id != id);
        }
        self.save().inspect_err(|_| self.config = before)?;
        self.log(&format!("snapshot {id} forgotten"));
        // The links follow what is left; trouble with other snapshots is in the status.
        self.up(self.level, out).map(|_| ())
    }

    fn delete_snapshot(&self, id: u32, out: Out) -> Result<()> {
        self.perform(Action::Unmount(Some(id)), out)?;
        self.perform(Action::RemoveDevice(Some(id)), out)?;
        self.host
            .delete_snapshot(&self.layout.server_socket(&self.name), id)
    }
}
