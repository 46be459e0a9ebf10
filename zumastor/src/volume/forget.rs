// SPDX-License-Identifier: GPL-2.0-only
//! `forget volume`: all of it goes, or, if it is in use, all of it stays.

use anyhow::Result;

use super::{Note, Out, Volume};
use crate::config;
use crate::mounts;
use crate::plan::Level;

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
        self.perform(crate::plan::Action::RemoveLinks, out)?;
        // Only if empty: what somebody put below a mount point is his.
        mounts::remove_empty_dir(&self.layout.mountpoint(&self.name))?;
        config::remove(&self.layout, &self.name)?;
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
}
