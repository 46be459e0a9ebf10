// SPDX-License-Identifier: GPL-2.0-only
//! What of a snapshot is mounted, and showing one without a look at the others.

use std::collections::BTreeSet;

use anyhow::Result;

use super::replica::REPLICA;
use super::{Out, Volume, describe};
use crate::config::Snapshot;
use crate::names;
use crate::plan::{self, Action, Level};

impl Volume {
    /// The devices of snapshots that are to be mounted now.
    pub(super) fn mounted_tags(&self) -> BTreeSet<u32> {
        match self.level {
            Level::Mounted => self.mountable_tags(),
            Level::Down | Level::Processes | Level::Devices => BTreeSet::new(),
        }
    }

    /// The devices of snapshots that are mounted when all of the volume is.
    ///
    /// Of what was received that is the twin, if a rotation has the snapshot or a replica shows it. What was
    /// received itself is not mounted, by a master either: a journal that is replayed would make it another than
    /// the one on the other side, which increments start from.
    pub(super) fn mountable_tags(&self) -> BTreeSet<u32> {
        let shown = self.twin();
        let tags = self.snapshots().iter();
        tags.filter_map(|s| self.mounted_as(s, shown)).collect()
    }

    fn mounted_as(&self, snapshot: &Snapshot, shown: Option<u32>) -> Option<u32> {
        let mountsnap = self.config.filesystem.mountsnap;
        let Some(twin) = snapshot.twin else {
            let own = mountsnap && self.config.source.is_none();
            return own.then_some(snapshot.id);
        };
        let is_rotated = snapshot.kinds.iter().any(|kind| kind != REPLICA);
        (mountsnap && is_rotated || shown == Some(twin)).then_some(twin)
    }

    /// The device of a snapshot that is mounted when all of the volume is.
    pub(super) fn mounted_tag(&self, id: u32) -> Option<u32> {
        let snapshot = self.config.snapshots.find(id)?;
        self.mounted_as(snapshot, self.twin())
    }

    /// The steps that show a snapshot as far as the volume is up, but for devices that are there.
    pub(super) fn steps_to_show(&self, id: u32) -> Result<Vec<Action>> {
        let mut steps = Vec::new();
        for action in plan::show(id, self.mounted_tag(id), self.level) {
            match action {
                Action::CreateDevice(which) if self.has_device(which)? => {}
                other => steps.push(other),
            }
        }
        Ok(steps)
    }

    pub(super) fn has_device(&self, which: plan::Device) -> Result<bool> {
        let name = names::device_name(&self.name, which);
        Ok(self.host.dm_find(&name)?.is_some())
    }

    /// Shows a snapshot; what fails is a warning.
    pub(super) fn show(&mut self, id: u32, out: Out) {
        match self.steps_to_show(id) {
            Ok(steps) => self.do_or_warn(&steps, out),
            Err(error) => self.warn(format!("snapshot {id} is not shown: {error:#}")),
        }
    }

    /// Carries out `steps`; what fails is a warning.
    pub(super) fn do_or_warn(&mut self, steps: &[Action], out: Out) {
        let report = self.carry_out(steps, out);
        for (scope, _, error) in &report.failures {
            self.warn(describe(*scope, error));
        }
    }

    pub(super) fn warn(&mut self, text: String) {
        self.log(&format!("WARNING: {text}"));
        if !self.warnings.contains(&text) {
            self.warnings.push(text);
        }
    }

    /// Unmounts what is still shown in the place of the newest snapshot, as it was in use when that arrived.
    pub(super) fn unmount_old_twin(&self) -> Result<()> {
        let Some(twin) = self.twin() else {
            return Ok(());
        };
        let dir = self.mountpoint(Some(twin));
        let mounts = self.host.mounts()?;
        let Some(there) = mounts.iter().rev().find(|m| m.dir == dir) else {
            return Ok(());
        };
        let mut devices = self.devices()?.into_iter();
        let is_old =
            devices.any(|(which, d)| which.is_some() && which != Some(twin) && d.dev == there.dev);
        if is_old {
            self.patiently(|| self.host.unmount(&dir))?;
        }
        Ok(())
    }

    /// After a replica has something new to show: mounts what was mounted by nobody so far, and takes away what
    /// belongs to no rotation any more. `before` are the devices that were mounted, `old` the one that was shown
    /// at the volume's own place, and whether it has gone from there.
    pub(super) fn show_arrived(
        &mut self,
        id: u32,
        before: &BTreeSet<u32>,
        old: Option<(u32, Hidden)>,
    ) -> Result<()> {
        let after = self.mounted_tags();
        let hidden = old.map_or(Hidden::Gone, |(_, hidden)| hidden);
        let old = old.map(|(tag, _)| tag);
        let mut steps = Vec::new();
        for &tag in before.difference(&after) {
            // With its snapshot it has gone already; whoever still uses it keeps its device.
            let listed = self.snapshots().iter().any(|s| s.twin == Some(tag));
            let used = old == Some(tag) && hidden != Hidden::Gone;
            if listed && !used {
                steps.push(Action::Unmount(Some(tag)));
                steps.push(Action::RemoveDevice(Some(tag)));
            }
        }
        if !self.has_device(Some(id))? {
            steps.push(Action::CreateDevice(Some(id)));
        }
        for &tag in &after {
            if before.contains(&tag) && old != Some(tag) {
                continue;
            }
            if !self.has_device(Some(tag))? {
                steps.push(Action::CreateDevice(Some(tag)));
            }
            // Where the old one stays there is no place for it.
            if hidden != Hidden::Stays || self.twin() != Some(tag) {
                steps.push(Action::Mount(Some(tag)));
            }
        }
        if self.level == Level::Mounted {
            steps.push(Action::WriteLinks);
        }
        self.do_or_warn(&steps, &mut |_| ());
        Ok(())
    }
}

/// What became of the mount of a twin that another one takes the place of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hidden {
    /// It is no more.
    Gone,
    /// Those who were in it keep it, and nobody else sees it.
    Detached,
    /// It is still there.
    Stays,
}
