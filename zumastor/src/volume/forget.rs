// SPDX-License-Identifier: GPL-2.0-only
//! `forget volume` and `forget snapshot`: all of it goes, or, if it is in use, all of it stays.

use anyhow::{Result, bail};

use super::{Note, Out, Volume};
use crate::boot;
use crate::config::{self, Doomed};
use crate::links;
use crate::plan::{Action, Level};

impl Volume {
    /// Stops the volume and deletes what is known of it. The devices keep their contents.
    pub fn forget(&mut self, out: Out) -> Result<()> {
        self.down(Level::Down, out)?;
        self.perform(Action::RemoveLinks, out)?;
        // Only if empty: what somebody put below a mount point is his.
        links::remove_empty_dir(&self.layout.mountpoint(&self.name))?;
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

    /// Deletes one snapshot: its mount, its device, its entry, its data.
    ///
    /// What can be taken back comes first. The document then no longer lists the snapshot and says that
    /// its data is to go, and only when that is durable the data goes: so a document that cannot be
    /// written leaves all as it was, and whatever fails later is done by the next start.
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
        if let Err(error) = self.unlist_snapshot(id, out) {
            if let Err(again) = self.up(self.level, out) {
                let text = format!("and it could not be brought back: {again:#}");
                out(Note::Warning(text));
            }
            return Err(error);
        }
        self.plain.remove(&id);
        self.log(&format!("snapshot {id} forgotten"));
        // Deletes the data; the links follow what is left; trouble with others is in the status.
        self.up(self.level, out)?;
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

    fn unlist_snapshot(&mut self, id: u32, out: Out) -> Result<()> {
        self.check_unheld(&[Action::RemoveDevice(Some(id))])?;
        self.perform(Action::Unmount(Some(id)), out)?;
        self.perform(Action::RemoveDevice(Some(id)), out)?;
        let stored = self
            .host
            .snapshots(&self.layout.server_socket(&self.name))?;
        let before = self.config.clone();
        let snapshots = &mut self.config.snapshots;
        snapshots.list.retain(|s| s.id != id);
        let same = stored.iter().filter(|s| s.tag.0 == id);
        snapshots.deleting.extend(same.map(|s| Doomed {
            id,
            sequence: s.seq.0,
        }));
        self.save().map_err(|error| {
            self.config = before;
            error.context(format!("snapshot {id} is not deleted"))
        })
    }
}
