// SPDX-License-Identifier: GPL-2.0-only
//! Going back to a snapshot, as far as it concerns a volume's devices. The work itself is a job
//! ([`crate::work`]) and takes as long as it takes.
//!
//! The server writes to the origin behind the kernel's back, so no device of the volume may be there
//! meanwhile. It also goes on with a revert by itself after a restart; a volume is then brought up only as far
//! as its processes, and the job is taken up again.

use anyhow::{Context, Result, bail};

use super::{Note, Out, Volume};
use crate::human;
use crate::plan::{self, Level};

impl Volume {
    /// Fails while the volume is being reverted.
    pub fn check_not_reverting(&self) -> Result<()> {
        if let Some(id) = self.reverting {
            bail!(
                "volume '{}' is being reverted to snapshot {id}: wait until that is done",
                self.name
            );
        }
        Ok(())
    }

    /// Fails if the volume cannot be reverted to snapshot `id` now.
    pub fn check_revert(&self, id: u32) -> Result<()> {
        let name = &self.name;
        self.check_not_reverting()?;
        if self.config.snapshots.find(id).is_none() {
            bail!("volume '{name}' has no snapshot {id}");
        }
        if self.level < Level::Devices {
            bail!("volume '{name}' is stopped: run `zumastor start volume {name}`");
        }
        let source = self.config.source.as_ref();
        if source.is_some_and(|s| s.incoming.is_some() || s.by_hand.is_some()) {
            bail!(
                "the origin has a part of a copy, which would go on over what it is given back: `zumastor replicate \
                 {name}` completes the copy, or `zumastor receive done {name}` one that scripts send"
            );
        }
        let origin = self.host.dm_find(name)?;
        let origin = origin.with_context(|| format!("device /dev/mapper/{name} does not exist"))?;
        if let Some(dir) = self.mounts_on(origin.dev)?.first() {
            bail!(
                "the origin is mounted on {}: unmount it first, with `zumastor stop master {name}` if it is the \
                 volume's own mount",
                dir.display()
            );
        }
        let steps = plan::down(&self.wanted(Level::Processes), &self.observe()?);
        self.check_unheld(&steps)
    }

    /// Says what a revert would do.
    pub fn would_revert(&self, id: u32, out: Out) -> Result<()> {
        self.check_revert(id)?;
        let created = self.config.snapshots.find(id).map_or(0, |s| s.created);
        out(Note::Line(format!(
            "would give {} the content of snapshot {id}, taken {}; what was written since is lost unless a later \
             snapshot has it",
            self.config.device.origin.display(),
            human::utc(created)
        )));
        Ok(())
    }

    /// Removes the devices, so that the server can write to the origin. Gives back how far the volume was up.
    pub fn begin_revert(&mut self, id: u32, out: Out) -> Result<Level> {
        self.check_revert(id)?;
        let before = self.level;
        self.down(Level::Processes, out)?;
        self.reverting = Some(id);
        self.log(&format!("revert to snapshot {id} begins"));
        Ok(before)
    }

    /// Brings the devices back.
    pub fn end_revert(&mut self, level: Level, result: &str, out: Out) -> Result<()> {
        self.reverting = None;
        self.log(result);
        self.start(level, out)
    }
}
