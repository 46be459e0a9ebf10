// SPDX-License-Identifier: GPL-2.0-only
//! Taking a snapshot.
//!
//! In this order, so that a crash at any point loses nothing and never mixes snapshots up: advance
//! the counter and note the snapshot as pending (durable); freeze, create, thaw; record the
//! snapshot (durable); make its device, mount and links. A pending snapshot that was not recorded
//! was never reported as taken, and may have been taken after a thaw: it is deleted.

use anyhow::{Context, Result, bail};

use super::{Note, Out, Volume, describe};
use crate::config::{MANUAL, Snapshot};
use crate::freeze::{self, Frozen};
use crate::machine::Dev;
use crate::mounts;
use crate::names;
use crate::plan::{Level, Scope};

impl Volume {
    /// Takes a snapshot of `kind` ([`MANUAL`] if none is given) and mounts it.
    pub fn snapshot(&mut self, kind: Option<&str>, out: Out) -> Result<u32> {
        if let Some(kind) = kind.filter(|k| *k != MANUAL) {
            bail!(
                "volume '{}' has no schedule for '{kind}' snapshots",
                self.name
            );
        }
        if self.config.master.is_none() {
            bail!(
                "volume '{0}' has no master: run `zumastor define master {0}`",
                self.name
            );
        }
        if self.level != Level::Mounted {
            bail!(
                "the master of '{0}' is stopped: run `zumastor start master {0}`",
                self.name
            );
        }
        self.settle_snapshots()?;
        let snapshot = self.begin_snapshot(kind.unwrap_or(MANUAL))?;
        let id = snapshot.id;
        if let Err(error) = self.create_frozen(id).and_then(|()| self.record(snapshot)) {
            self.log(&format!("snapshot {id} failed: {error:#}"));
            return match self.settle_snapshots() {
                Ok(()) => Err(error),
                Err(undo) => Err(error.context(format!("and it could not be undone: {undo:#}"))),
            };
        }
        self.log(&format!("snapshot {id} created"));
        let report = self.up(Level::Mounted, out)?;
        match report
            .failure(Scope::Snapshot(id))
            .or(report.failure(Scope::Master))
        {
            Some(error) => {
                bail!(
                    "snapshot {id} exists, but {}",
                    describe(Scope::Master, error)
                )
            }
            None => {
                let name = names::device_name(&self.name, Some(id));
                let place = if self.config.filesystem.mountsnap {
                    self.mountpoint(Some(id))
                } else {
                    std::path::Path::new("/dev/mapper").join(name)
                };
                out(Note::Line(format!("snapshot {id}: {}", place.display())));
                Ok(id)
            }
        }
    }

    /// Takes the next number, durably, before anything is created with it.
    fn begin_snapshot(&mut self, kind: &str) -> Result<Snapshot> {
        let time = mounts::unique_time(&self.host.now(), self.snapshots());
        let master = self.config.master.as_mut().context("no master")?;
        let id = master.next;
        let next = id
            .checked_add(2)
            .context("all snapshot numbers are used up")?;
        let snapshot = Snapshot {
            id,
            kind: kind.to_string(),
            time,
        };
        master.next = next;
        master.pending = Some(snapshot.clone());
        self.save()?;
        Ok(snapshot)
    }

    /// Freezes what is mounted from the origin, creates the snapshot, thaws.
    fn create_frozen(&self, id: u32) -> Result<()> {
        let server = self.layout.server_socket(&self.name);
        let device = self.host.dm_find(&self.name)?;
        let device =
            device.with_context(|| format!("device /dev/mapper/{} does not exist", self.name))?;
        let node = self.host.dm_node(&self.name, device.dev);
        let dirs = self.mounts_on(device.dev)?;
        // For those who use the device without a file system; what is mounted is synced by freezing.
        self.host.flush(&node)?;
        // From here to the thaw nothing is written anywhere, see `freeze`.
        let frozen = Frozen::new(self.host.as_ref(), &dirs)?;
        let created = self.host.create_snapshot(&server, id);
        let thawed = frozen.thaw();
        created?;
        thawed
    }

    /// Mount points to freeze: one for each file system on device `dev`.
    pub(super) fn mounts_on(&self, dev: Dev) -> Result<Vec<std::path::PathBuf>> {
        let mut mounts = self.host.mounts()?;
        for mount in &mut mounts {
            // btrfs numbers its mounts by itself; its source tells the device.
            if mount.fstype == "btrfs" && self.host.block_device(&mount.source).ok() == Some(dev) {
                mount.dev = dev;
            }
        }
        Ok(freeze::mounts_of(&mounts, dev))
    }

    /// Makes the snapshot one of the volume's, durably.
    fn record(&mut self, snapshot: Snapshot) -> Result<()> {
        let before = self.config.clone();
        let master = self.config.master.as_mut().context("no master")?;
        master.pending = None;
        master.snapshots.push(snapshot);
        self.save().inspect_err(|_| self.config = before)
    }

    /// Makes the list and the server agree: deletes a pending snapshot, drops entries that the
    /// server has given up.
    pub(super) fn settle_snapshots(&mut self) -> Result<()> {
        let Some(master) = &self.config.master else {
            return Ok(());
        };
        if master.pending.is_none() && master.snapshots.is_empty() {
            return Ok(());
        }
        let server = self.layout.server_socket(&self.name);
        let existing = self.host.snapshots(&server)?;
        if let Some(pending) = master.pending.as_ref().filter(|p| existing.contains(&p.id)) {
            self.host.delete_snapshot(&server, pending.id)?;
            self.log(&format!(
                "deleted snapshot {}, whose creation was cut short",
                pending.id
            ));
        }
        let gone = |s: &&Snapshot| !existing.contains(&s.id);
        let lost: Vec<u32> = master.snapshots.iter().filter(gone).map(|s| s.id).collect();
        if lost.is_empty() && master.pending.is_none() {
            return Ok(());
        }
        let before = self.config.clone();
        if let Some(master) = self.config.master.as_mut() {
            master.pending = None;
            master.snapshots.retain(|s| existing.contains(&s.id));
        }
        self.save().inspect_err(|_| self.config = before)?;
        for id in lost {
            self.log(&format!(
                "WARNING: the snapshot store no longer has snapshot {id}"
            ));
        }
        Ok(())
    }
}
