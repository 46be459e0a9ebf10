// SPDX-License-Identifier: GPL-2.0-only
//! Taking a snapshot.
//!
//! In this order, so that a crash at any point loses nothing and never mixes snapshots up: advance
//! the counter and note the snapshot as pending (durable); freeze, create, thaw; record the
//! snapshot (durable); make its device, mount and links. A pending snapshot that was not recorded
//! was never reported as taken, and may have been taken after a thaw: it is deleted. Deleted is only what
//! is newer than all that was in the store when it was begun.

use anyhow::{Context, Result, bail};
use ddsnap::client::ClientError;
use nix::errno::Errno;

use super::replica::REPLICA;
use super::{Note, Out, Volume, describe};
use crate::config::{Doomed, MANUAL, Snapshot};
use crate::freeze::{self, Frozen};
use crate::machine::{Dev, Stored};
use crate::names;
use crate::plan::{self, Level, Scope};
use crate::schedule;

impl Volume {
    /// Takes a snapshot for `kind` ([`MANUAL`] if none is given) and mounts it.
    /// Gives back its number. On a replica the next snapshot that arrives is of that kind, and has no number yet.
    pub fn snapshot(&mut self, kind: Option<&str>, out: Out) -> Result<Option<u32>> {
        let kind = kind.unwrap_or(MANUAL);
        if kind != MANUAL && self.rotation(kind).is_none() {
            bail!(
                "volume '{0}' has no schedule for '{kind}' snapshots: run `zumastor define schedule {0}`",
                self.name
            );
        }
        let kinds = [kind.to_string()];
        if kind != MANUAL && self.config.source.is_some() {
            self.await_arrival(&kinds)?;
            out(Note::Line(format!(
                "the next snapshot that arrives is '{kind}'"
            )));
            return Ok(None);
        }
        self.take(&kinds, out).map(Some)
    }

    /// Takes a snapshot that belongs to all of `kinds`, mounts it, and deletes what leaves these rotations.
    ///
    /// What it costs does not grow with the number of snapshots, but for the links: the others are not looked at.
    pub(super) fn take(&mut self, kinds: &[String], out: Out) -> Result<u32> {
        self.check_not_reverting()?;
        if let Some(source) = &self.config.source {
            bail!(
                "volume '{}' is a replica of what {} has: its snapshots come from there",
                self.name,
                source.host
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
        let stored = self.settle_snapshots()?;
        let snapshot = self.begin_snapshot(kinds, &stored)?;
        let id = snapshot.id;
        if let Err(error) = self.create_frozen(id).and_then(|()| self.record(snapshot)) {
            self.log(&format!("snapshot {id} failed: {error:#}"));
            // One made meanwhile by somebody else is his.
            if is_taken(&error) {
                self.config.snapshots.pending = None;
            }
            return match self.settle_snapshots() {
                Ok(_) => Err(error),
                Err(undo) => Err(error.context(format!("and it could not be undone: {undo:#}"))),
            };
        }
        self.log(&format!("snapshot {id} created ({})", kinds.join(", ")));
        let steps = plan::show(id, self.mounted_tag(id), self.level);
        let mut report = self.carry_out(&steps, out);
        self.rotate(kinds, out);
        if !report.failures.is_empty() {
            let error = report.failures.swap_remove(0).2;
            let text = format!(
                "snapshot {id} exists, but {}",
                describe(Scope::Master, &error)
            );
            self.warnings.push(text.clone());
            bail!("{text}");
        }
        let name = names::device_name(&self.name, Some(id));
        let mounted = self.config.filesystem.mountsnap && !self.plain.contains_key(&id);
        let place = if mounted {
            self.mountpoint(Some(id))
        } else {
            std::path::Path::new("/dev/mapper").join(name)
        };
        out(Note::Line(format!("snapshot {id}: {}", place.display())));
        Ok(id)
    }

    /// Takes the next number that the store does not have, durably, before anything is created with it.
    pub(super) fn begin_snapshot(
        &mut self,
        kinds: &[String],
        stored: &[Stored],
    ) -> Result<Snapshot> {
        let there = |id| stored.iter().any(|s| s.tag.0 == id);
        let mut id = self.config.snapshots.next;
        // It may get a twin.
        while there(id) || there(id.saturating_add(1)) {
            id = id
                .checked_add(2)
                .context("all snapshot numbers are used up")?;
        }
        let next = id
            .checked_add(2)
            .context("all snapshot numbers are used up")?;
        self.begin_as(id, next, kinds, stored)
    }

    /// Takes a number for a snapshot that is deleted again before anybody hears of it, durably: a twin's, so that none is
    /// used up. Scripts whose replica has the upstream's numbers would find them taken.
    pub(super) fn begin_momentary(&mut self, stored: &[Stored]) -> Result<Snapshot> {
        let next = self.config.snapshots.next;
        let mut id = next.saturating_add(1);
        while stored.iter().any(|s| s.tag.0 == id) {
            id = id
                .checked_add(2)
                .context("all snapshot numbers are used up")?;
        }
        self.begin_as(id, next, &[REPLICA.to_owned()], stored)
    }

    fn begin_as(
        &mut self,
        id: u32,
        next: u32,
        kinds: &[String],
        stored: &[Stored],
    ) -> Result<Snapshot> {
        let now = self.host.now();
        let time = self.config.snapshots.unique_time(&names::local_time(&now));
        let before = self.config.clone();
        let snapshots = &mut self.config.snapshots;
        let snapshot = Snapshot {
            id,
            uuid: uuid::Uuid::new_v4(),
            kinds: kinds.to_vec(),
            time,
            created: now.timestamp().as_second(),
            sequence: None,
            protected: false,
            twin: None,
        };
        snapshots.next = next;
        snapshots.pending = Some(snapshot.clone());
        snapshots.pending_after = stored.iter().map(|s| s.seq.0).max().unwrap_or(0);
        self.save().inspect_err(|_| self.config = before)?;
        Ok(snapshot)
    }

    /// Freezes what is mounted from the origin, creates the snapshot, thaws.
    pub(super) fn create_frozen(&self, id: u32) -> Result<()> {
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

    /// Mount points to freeze: one for each file system on device `dev`, or on what stands on it, like
    /// the file system in an encrypted volume.
    pub(super) fn mounts_on(&self, dev: Dev) -> Result<Vec<std::path::PathBuf>> {
        let mounts = self.host.mounts()?;
        let devices = self.host.stacked_on(dev);
        let dirs = devices
            .into_iter()
            .flat_map(|d| freeze::mounts_of(&mounts, d));
        Ok(dirs.collect())
    }

    /// Makes the snapshot one of the volume's, durably.
    pub(super) fn record(&mut self, snapshot: Snapshot) -> Result<()> {
        let before = self.config.clone();
        // If it is not to be had now, the next look at the store tells.
        let server = self.layout.server_socket(&self.name);
        let stored = self.host.snapshots(&server).unwrap_or_default();
        let found = stored.iter().find(|s| s.tag.0 == snapshot.id);
        let sequence = found.map(|s| s.seq.0);
        let snapshot = Snapshot {
            sequence,
            ..snapshot
        };
        // It serves the slots before its creation, not one that began while it was made.
        let created = jiff::Timestamp::from_second(snapshot.created)
            .context("the clock is out of range")?
            .to_zoned(self.host.now().time_zone().clone());
        for rotation in &mut self.config.schedule {
            if snapshot.is_of(&rotation.kind) {
                rotation.served = schedule::latest_slot(rotation.period(), &created);
            }
        }
        let snapshots = &mut self.config.snapshots;
        snapshots.pending = None;
        snapshots.list.push(snapshot);
        self.save().inspect_err(|_| self.config = before)
    }

    /// Makes the list and the server agree: deletes what is to be deleted, drops entries that the server
    /// has given up. Returns what the server has.
    ///
    /// Only what this daemon made is deleted: a snapshot whose creation was begun here, and is newer than
    /// all that was there then, or one that was listed and forgotten. A document that cannot be written
    /// now is written with the next change: what it says too much is found out again.
    pub(super) fn settle_snapshots(&mut self) -> Result<Vec<Stored>> {
        let server = self.layout.server_socket(&self.name);
        // One that is just being started again is waited for.
        let mut stored = self.patiently(|| self.host.snapshots(&server))?;
        let snapshots = &mut self.config.snapshots;
        let before = snapshots.clone();
        if let Some(pending) = snapshots.pending.take() {
            let both = [Some(pending.id), pending.twin];
            let ours =
                |s: &&Stored| both.contains(&Some(s.tag.0)) && s.seq.0 > snapshots.pending_after;
            snapshots
                .deleting
                .extend(stored.iter().filter(ours).map(|s| Doomed {
                    id: s.tag.0,
                    sequence: s.seq.0,
                }));
        }
        let mut lines = Vec::new();
        let mut warnings = Vec::new();
        let same = |d: &Doomed, s: &Stored| s.tag.0 == d.id && s.seq.0 == d.sequence;
        let (host, cut_short) = (&self.host, before.pending.as_ref().map(|p| p.id));
        let momentary = self.momentary;
        snapshots.deleting.retain(|doomed| {
            if !stored.iter().any(|s| same(doomed, s)) {
                return false;
            }
            if momentary == Some(doomed.id) {
                return true;
            }
            match host.delete_snapshot(&server, doomed.id) {
                Ok(()) => {
                    stored.retain(|s| !same(doomed, s));
                    if cut_short == Some(doomed.id) {
                        lines.push(format!(
                            "deleted snapshot {}, whose creation was cut short",
                            doomed.id
                        ));
                    }
                    false
                }
                Err(error) => {
                    warnings.push(format!(
                        "forgotten snapshot {}: its data is still in the store: {error:#}",
                        doomed.id
                    ));
                    true
                }
            }
        });
        let (gone, others) = drop_missing(&mut snapshots.list, &stored);
        if let Some(which) = named(&gone) {
            warnings.push(format!(
                "the snapshot store no longer has {which}: taken out of the list"
            ));
        }
        if let Some(which) = named(&others) {
            warnings.push(format!(
                "the snapshot store no longer has {which}, but others of the same number, which are not this volume's: \
                 taken out of the list"
            ));
        }
        for found in &stored {
            if let Err(error) = self.keep_when_full(found) {
                warnings.push(format!("{error:#}"));
            }
        }
        if self.config.snapshots != before {
            if let Err(error) = self.save() {
                warnings.push(format!("{error:#}"));
            }
        }
        for line in lines.iter().chain(&warnings) {
            self.log(line);
        }
        for warning in warnings {
            if !self.warnings.contains(&warning) {
                self.warnings.push(warning);
            }
        }
        Ok(stored)
    }
}

/// Takes out of the list what the store does not have, or has another snapshot of the same number of, and gives back the
/// numbers of both. What is not known yet of the others is noted.
fn drop_missing(list: &mut Vec<Snapshot>, stored: &[Stored]) -> (Vec<u32>, Vec<u32>) {
    let (mut gone, mut others) = (Vec::new(), Vec::new());
    list.retain_mut(|listed| {
        let found = stored.iter().find(|s| s.tag.0 == listed.id);
        match found {
            Some(found) if listed.is(found) => listed.sequence = Some(found.seq.0),
            Some(_) => others.push(listed.id),
            None => gone.push(listed.id),
        }
        found.is_some_and(|found| listed.is(found))
    });
    (gone, others)
}

/// `snapshot 4` or `snapshots 4 6`; nothing of none.
fn named(ids: &[u32]) -> Option<String> {
    let numbers: Vec<String> = ids.iter().map(u32::to_string).collect();
    let what = match ids {
        [] => return None,
        [_] => "snapshot",
        _ => "snapshots",
    };
    Some(format!("{what} {}", numbers.join(" ")))
}

/// The priority of a snapshot that a full store does not give up.
pub const PROTECTED: i8 = 127;

/// Whether a snapshot could not be created because there is one of that number.
fn is_taken(error: &anyhow::Error) -> bool {
    let refusal = error.downcast_ref::<ClientError>();
    matches!(refusal, Some(ClientError::Refused { errno, .. }) if *errno == Errno::EEXIST as i32)
}
