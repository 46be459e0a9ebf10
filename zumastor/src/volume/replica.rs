// SPDX-License-Identifier: GPL-2.0-only
//! What replication changes of a volume: roles and holds. Each is one durable step. What arrives: `arrival`.

use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use ddsnap::units::Sectors;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Note, Out, Volume};
use crate::config::{
    Asked, Doomed, HoldPolicy, Incoming, Lineage, MANUAL, Snapref, Source, Target, Window,
};
use crate::machine::{Busy, SnapshotState, Stored};
use crate::names;
use crate::plan::Level;
use crate::replication::standing::{Epoch, Held, Partial, Role, Standing};

/// The kind of snapshots that replication takes and receives; they go when it no longer needs them.
pub const REPLICA: &str = "replica";

/// Of the snapshot that a volume leaves behind when it becomes a replica.
pub(super) const WHY_KEPT: &str = "keeps what the volume held before it became a replica";

/// `define source`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DefineSource {
    /// The volume here.
    pub volume: String,
    /// The machine that has the upstream volume.
    pub host: String,
    /// Kept for scripts; ssh does not use it.
    pub port: Option<u16>,
    /// The volume's name there.
    pub name: Option<String>,
    /// Seconds from the start of one cycle to that of the next.
    pub period: Option<u64>,
    /// The time of day in which cycles may run that come by themselves.
    pub window: Option<Window>,
    /// Mount the newest complete snapshot.
    pub mount: bool,
}

/// `define target`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DefineTarget {
    /// The volume here.
    pub volume: String,
    /// The machine that gets the copies.
    pub host: String,
    /// The volume's name there.
    pub name: Option<String>,
    /// Seconds from the start of one cycle to that of the next.
    pub period: Option<u64>,
    /// The time of day in which cycles may run that come by themselves.
    pub window: Option<Window>,
    /// Most bytes a second.
    pub ratelimit: Option<u64>,
    /// Send as it is.
    pub uncompressed: bool,
    /// Compare everything on both sides after each cycle.
    #[serde(default)]
    pub test_fullvolume: bool,
    /// What becomes of the hold when the store is full.
    #[serde(default)]
    pub on_full: HoldPolicy,
}

/// Which replication of a volume is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Peer {
    /// The one to this target.
    Target(String),
    /// The one from its source.
    Source,
}

impl Volume {
    /// Makes the volume a replica. A master role goes: nobody but replication writes to the origin then. What it holds
    /// stays as a snapshot, unless nobody ever used it.
    ///
    /// # Errors
    /// The origin is in use, that snapshot cannot be taken, or the document cannot be written.
    pub fn define_source(&mut self, request: &DefineSource, out: Out) -> Result<()> {
        let before = self.level;
        let keep = self.has_content_of_its_own();
        if keep {
            self.check_up()?;
        }
        if self.config.master.is_some() && self.level == Level::Mounted {
            self.down(Level::Devices, out)?;
        }
        let made = self.follow(request, keep);
        self.back_up_unless(made, before, out)?;
        self.log(&format!("is a replica of what {} has", request.host));
        let level = self.full_level();
        self.up(level, out).map(|_| ())
    }

    /// Whether a replica made of it could have something written over that is nowhere else: its users wrote to it,
    /// or may have since it was a replica.
    pub(super) fn has_content_of_its_own(&self) -> bool {
        let config = &self.config;
        config.master.is_some() || config.source.is_none() && !config.snapshots.list.is_empty()
    }

    fn follow(&mut self, request: &DefineSource, keep: bool) -> Result<()> {
        let mut origin = None;
        if keep {
            // As with `failback`.
            let kept = self.safety_snapshot(WHY_KEPT)?;
            origin = self.config.snapshots.find(kept).map(|s| s.uuid);
        }
        self.change(|config| {
            config.master = None;
            config.lineage.superseded = None;
            let source = config.source.get_or_insert_with(|| Source {
                origin,
                ..Source::at(&request.host)
            });
            source.host.clone_from(&request.host);
            source.name.clone_from(&request.name);
            source.port = request.port.or(source.port);
            source.period = request.period;
            source.window = request.window;
            source.mount = request.mount;
            Ok(())
        })
    }

    /// Defines a target, or changes one.
    ///
    /// # Errors
    /// The document cannot be written.
    pub fn define_target(&mut self, request: &DefineTarget) -> Result<()> {
        check_host(&request.host)?;
        if self.config.master.is_none() && self.config.source.is_none() {
            bail!(
                "volume '{0}' has neither a master nor a source: run `zumastor define master {0}`",
                self.name
            );
        }
        self.change(|config| {
            let target = config.targets.entry(request.host.clone());
            let target = target.or_default();
            target.name.clone_from(&request.name);
            target.period = request.period;
            target.window = request.window;
            target.ratelimit = request.ratelimit;
            target.uncompressed = request.uncompressed;
            target.test_fullvolume = request.test_fullvolume;
            target.on_full = request.on_full;
            Ok(())
        })?;
        self.log(&format!("has the target {}", request.host));
        self.holds_moved();
        Ok(())
    }

    /// Forgets a target and lets go of what it held.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn forget_target(&mut self, host: &str, out: Out) -> Result<()> {
        let target = self.target(host)?.clone();
        self.change(|config| {
            config.targets.remove(host);
            Ok(())
        })?;
        self.unpinned.remove(host);
        self.log(&format!("target {host} forgotten"));
        for held in [target.hold, target.sending].into_iter().flatten() {
            self.let_go(held.id, out);
        }
        self.holds_moved();
        Ok(())
    }

    /// Whether the role of a replica can be ended.
    ///
    /// # Errors
    /// It has no source, or its origin has a part of a copy, which nobody would know any more: it would be mounted for
    /// a file system.
    pub fn check_forget_source(&self) -> Result<()> {
        let source = self.source()?;
        let copied = source.incoming.is_some() || source.by_hand.is_some();
        if !copied && (source.origin.is_some() || source.hold.is_none()) {
            return Ok(());
        }
        let name = &self.name;
        bail!(
            "/dev/mapper/{name} has a part of a copy and is no file system: `zumastor replicate {name}` completes it{}, \
             `zumastor forget volume {name}` gives it up",
            match source.hold {
                Some(_) => format!(
                    ", `zumastor failover {name}` goes back to the last whole one and makes it master"
                ),
                None => String::new(),
            }
        )
    }

    /// Ends the role of a replica. Its snapshots stay, as snapshots.
    ///
    /// # Errors
    /// As of [`check_forget_source`](Self::check_forget_source).
    pub fn forget_source(&mut self, out: Out) -> Result<()> {
        self.check_forget_source()?;
        self.down(Level::Devices.min(self.level), out)?;
        self.change(|config| {
            config.source = None;
            Ok(())
        })?;
        self.log("source forgotten");
        self.holds_moved();
        Ok(())
    }

    /// What the snapshot store says is wrong with it, or that it is short of room; none if it says nothing.
    #[must_use]
    pub fn store_trouble(&self) -> Option<String> {
        let state = self
            .host
            .store_state(&self.layout.server_socket(&self.name));
        let state = state.ok()?;
        let failed = |fault| format!("the snapshot store has failed: {fault}");
        state.fault.map(failed).or(state.space)
    }

    /// Notes a cycle that somebody asks for, or with none that it has ended: the next daemon begins again what has not.
    ///
    /// # Errors
    /// There is no such replication, or the document cannot be written.
    pub fn note_asked(&mut self, peer: &Peer, asked: Option<Asked>) -> Result<()> {
        let noted = match peer {
            Peer::Target(host) => self.target(host)?.asked,
            Peer::Source => self.source()?.asked,
        };
        if noted == asked {
            return Ok(());
        }
        self.change(|config| {
            match peer {
                Peer::Target(host) => {
                    if let Some(target) = config.targets.get_mut(host) {
                        target.asked = asked;
                    }
                }
                Peer::Source => {
                    if let Some(source) = &mut config.source {
                        source.asked = asked;
                    }
                }
            }
            Ok(())
        })
    }

    /// Fails if there is no such replication, or it is stopped.
    ///
    /// # Errors
    /// So it is.
    pub fn check_replicates(&self, peer: &Peer) -> Result<()> {
        let name = &self.name;
        match peer {
            Peer::Target(host) if self.target(host)?.stopped => {
                bail!("the target {host} is stopped: run `zumastor start target {name} {host}`")
            }
            Peer::Source if self.source()?.stopped => {
                bail!("the source is stopped: run `zumastor start source {name}`")
            }
            _ => Ok(()),
        }
    }

    /// Starts or stops a replication's cycles.
    ///
    /// # Errors
    /// There is no such replication.
    pub fn set_stopped(&mut self, peer: &Peer, stopped: bool) -> Result<()> {
        match peer {
            Peer::Target(host) => self.target(host).map(|_| ())?,
            Peer::Source => self.source().map(|_| ())?,
        }
        self.change(|config| {
            match peer {
                Peer::Target(host) => {
                    if let Some(target) = config.targets.get_mut(host) {
                        target.stopped = stopped;
                    }
                }
                Peer::Source => {
                    if let Some(source) = &mut config.source {
                        source.stopped = stopped;
                    }
                }
            }
            Ok(())
        })
    }

    /// The target of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn target(&self, host: &str) -> Result<&Target> {
        let found = self.config.targets.get(host);
        found.with_context(|| format!("volume '{}' has no target {host}", self.name))
    }

    /// The source.
    ///
    /// # Errors
    /// There is none.
    pub fn source(&self) -> Result<&Source> {
        let found = self.config.source.as_ref();
        found.with_context(|| {
            format!(
                "volume '{0}' is no replica: run `zumastor define source {0} HOST`",
                self.name
            )
        })
    }

    /// Changes the document as a whole, durably, or not at all.
    pub(super) fn change(
        &mut self,
        change: impl FnOnce(&mut crate::config::VolumeConfig) -> Result<()>,
    ) -> Result<()> {
        let before = self.config.clone();
        let changed = change(&mut self.config).and_then(|()| self.save());
        changed.inspect_err(|_| self.config = before)
    }

    /// Where a replication of this volume stands, but for how far a copy under way is, which `position`
    /// knows, in chunks.
    ///
    /// # Errors
    /// The volume is not up, or its server does not answer.
    pub fn standing(
        &mut self,
        peer: &Peer,
        position: &dyn Fn(&Incoming) -> u64,
    ) -> Result<Standing> {
        if self.level < Level::Devices {
            bail!(
                "volume '{0}' is stopped: run `zumastor start volume {0}`",
                self.name
            );
        }
        let stored = self.settle_snapshots()?;
        let socket = self.layout.server_socket(&self.name);
        let geometry = self.host.geometry(&socket)?;
        let held = self.snapshots().iter().filter_map(|snapshot| {
            let found = stored.iter().find(|s| s.tag.0 == snapshot.id)?;
            // A doubtful one does not know all that was written since: what starts from it would lack that.
            if found.doubtful {
                return None;
            }
            let data = match found.state {
                SnapshotState::Live => true,
                SnapshotState::Bookmark => false,
                SnapshotState::Squashed => return None,
            };
            Some(Held {
                id: snapshot.uuid,
                number: snapshot.id,
                taken: snapshot.created.unsigned_abs(),
                length: Sectors(found.sectors),
                data,
            })
        });
        let config = &self.config;
        let source = config.source.as_ref().filter(|_| *peer == Peer::Source);
        let uuid = |held: Option<Snapref>| held.map(|held| held.uuid);
        // What never received or took anything has no lineage yet, and may be overwritten. An origin that has a
        // snapshot's content has something, even if that snapshot was deleted since.
        let blank = config.source.as_ref().is_some_and(|s| s.origin.is_none())
            && config.lineage.uuid == config.uuid
            && config.snapshots.list.is_empty();
        let hold = match peer {
            Peer::Source => source.and_then(|source| source.hold),
            Peer::Target(host) => self.target(host)?.hold,
        };
        Ok(Standing {
            volume: config.uuid,
            lineage: (!blank).then_some(config.lineage.uuid),
            epoch: epoch(&config.lineage),
            role: match (peer, &config.source) {
                (Peer::Source, Some(_)) => Role::Replica,
                _ => Role::Master,
            },
            chunk: geometry.chunk,
            length: geometry.origin,
            held: held.collect(),
            hold: uuid(hold),
            old_hold: source.and_then(|source| uuid(source.old_hold)),
            origin: source.and_then(|source| source.origin),
            partial: source
                .and_then(|source| source.incoming.as_ref())
                .map(|incoming| Partial {
                    snapshot: incoming.uuid,
                    base: incoming.base,
                    position: position(incoming),
                    plain: incoming.plain,
                }),
            written: false,
        })
    }

    /// Whether the origin is mounted for writing, and where.
    ///
    /// # Errors
    /// The mount table cannot be read.
    pub fn origin_mounts(&self) -> Result<Vec<PathBuf>> {
        match self.host.dm_find(&self.name)? {
            Some(device) => self.mounts_on(device.dev),
            None => Ok(Vec::new()),
        }
    }

    /// The node of the origin, or of the snapshot with this UUID.
    ///
    /// # Errors
    /// There is no such snapshot or device.
    pub fn node(&self, snapshot: Option<Uuid>) -> Result<PathBuf> {
        let which = match snapshot {
            None => None,
            Some(uuid) => Some(self.number_of(uuid)?),
        };
        let name = names::device_name(&self.name, which);
        let device = self.host.dm_find(&name)?;
        let device = device.with_context(|| format!("device /dev/mapper/{name} does not exist"))?;
        Ok(self.host.dm_node(&name, device.dev))
    }

    /// The node of the origin, and what keeps everybody else from mounting it and the like; none if somebody does that.
    ///
    /// # Errors
    /// There is no such device, or it cannot be opened.
    pub fn claim_origin(&self) -> Result<(PathBuf, Option<File>)> {
        let node = self.node(None)?;
        let device = self.host.dm_find(&self.name)?;
        // Who only looks at what was just written, as udev and LVM do, has it for a moment.
        let claimed = self.patiently(|| match (self.host.claim(&node)?, &device) {
            (Some(file), _) => Ok(Some(file)),
            (None, Some(device)) => {
                let users = self.host.users(device.dev);
                Err(users.busy(node.display().to_string()).into())
            }
            (None, None) => Ok(None),
        });
        match claimed {
            Err(error) if error.is::<Busy>() => Ok((node, None)),
            claimed => Ok((node, claimed?)),
        }
    }

    /// The number of the snapshot with this UUID.
    ///
    /// # Errors
    /// There is none.
    pub fn number_of(&self, uuid: Uuid) -> Result<u32> {
        let list = &self.config.snapshots.list;
        let found = list.iter().find(|snapshot| snapshot.uuid == uuid);
        let found = found.with_context(|| format!("snapshot {uuid} is not here any more"))?;
        Ok(found.id)
    }

    /// The UUIDs of all snapshots.
    #[must_use]
    pub fn snapshot_uuids(&self) -> Vec<Uuid> {
        self.snapshots().iter().map(|s| s.uuid).collect()
    }

    pub(super) fn snapref(&self, uuid: Uuid) -> Result<Snapref> {
        let id = self.number_of(uuid)?;
        Ok(Snapref { uuid, id })
    }

    /// Takes a snapshot to send, unless the last one has not arrived yet: says whether that one comes first.
    ///
    /// # Errors
    /// It cannot be taken.
    pub fn snapshot_to_send(&mut self, host: &str) -> Result<bool> {
        let sending = self.target(host)?.sending;
        if self.config.master.is_none() {
            return Ok(false);
        }
        let stored = self.settle_snapshots()?;
        // One that was given up meanwhile has nothing to send.
        let live = |s: &Stored| s.state == SnapshotState::Live;
        let is_there = |id| stored.iter().any(|s| s.tag.0 == id && live(s));
        if sending.is_some_and(|s| self.number_of(s.uuid).is_ok() && is_there(s.id)) {
            return Ok(true);
        }
        // Taken before, for a machine that could not be reached: nobody has begun to receive it.
        self.unpinned.remove(host);
        self.let_all_go();
        let stored = self.settle_snapshots()?;
        let snapshot = self.begin_snapshot(&[REPLICA.to_owned()], &stored)?;
        let id = snapshot.id;
        if let Err(error) = self.create_frozen(id).and_then(|()| self.record(snapshot)) {
            return match self.settle_snapshots() {
                Ok(_) => Err(error),
                Err(undo) => Err(error.context(format!("and it could not be undone: {undo:#}"))),
            };
        }
        self.unpinned.insert(host.to_owned(), id);
        self.log(&format!("snapshot {id} created for {host}"));
        self.show(id, &mut |_| ());
        Ok(false)
    }

    /// Keeps a snapshot for a target, whatever is tidied up.
    ///
    /// # Errors
    /// It is gone.
    pub fn pin(&mut self, host: &str, uuid: Uuid) -> Result<()> {
        let pinned = self.snapref(uuid)?;
        let before = self.target(host)?.sending;
        if before != Some(pinned) {
            self.change(|config| {
                if let Some(target) = config.targets.get_mut(host) {
                    target.sending = Some(pinned);
                }
                Ok(())
            })?;
        }
        self.unpinned.remove(host);
        // Before anything is offered, or a full store could still give it up as any other.
        self.hold_when_full(pinned.id)?;
        if let Some(before) = before.filter(|before| *before != pinned) {
            self.let_go(before.id, &mut |_| ());
            self.holds_moved();
        }
        Ok(())
    }

    /// Makes a snapshot the hold of a target, then lets go of the one before.
    ///
    /// # Errors
    /// It is gone; the hold stays.
    pub fn move_hold(&mut self, host: &str, uuid: Uuid, proven: Option<i64>) -> Result<()> {
        let hold = self.snapref(uuid)?;
        let before = self.target(host)?.hold.filter(|before| *before != hold);
        self.change(|config| {
            if let Some(target) = config.targets.get_mut(host) {
                target.hold = Some(hold);
                target.sending = target.sending.filter(|sending| *sending != hold);
                target.proven = proven.or(target.proven);
            }
            Ok(())
        })?;
        if let Some(before) = before {
            self.let_go(before.id, &mut |_| ());
        }
        self.holds_moved();
        Ok(())
    }

    /// Both sides of a replication were compared, and were equal at this time; none: they were not.
    ///
    /// # Errors
    /// There is no such replication, or the document cannot be written.
    pub fn set_proven(&mut self, peer: &Peer, at: Option<i64>) -> Result<()> {
        match peer {
            Peer::Target(host) => self.target(host).map(|_| ())?,
            Peer::Source => self.source().map(|_| ())?,
        }
        self.change(|config| {
            let proven = match peer {
                Peer::Target(host) => config.targets.get_mut(host).map(|t| &mut t.proven),
                Peer::Source => config.source.as_mut().map(|s| &mut s.proven),
            };
            if let Some(proven) = proven {
                *proven = at;
            }
            Ok(())
        })
    }

    /// Deletes all snapshots that only replication had a use for, as one that fell out of its rotation.
    fn let_all_go(&mut self) {
        let of_replication = self.snapshots().iter().filter(|s| s.kinds == [REPLICA]);
        let left: Vec<u32> = of_replication.map(|s| s.id).collect();
        for id in left {
            self.let_go(id, &mut |_| ());
        }
    }

    /// Whether a snapshot is there for replication alone, and for none but that to this target.
    pub(super) fn is_let_go(&self, id: u32, host: Option<&str>) -> bool {
        let snapshot = self.config.snapshots.find(id);
        snapshot.is_some_and(|s| s.kinds == [REPLICA] && !s.protected)
            && self.held_but_by(id, host).is_none()
            && !self.unpinned.values().any(|unpinned| *unpinned == id)
    }

    /// Deletes a snapshot that only replication had a use for.
    fn let_go(&mut self, id: u32, out: Out) {
        if !self.is_let_go(id, None) {
            return;
        }
        // It is tried again when the next hold moves; meanwhile it only takes room.
        if let Err(error) = self.forget_snapshot(id, out) {
            self.log(&format!("WARNING: snapshot {id} stays: {error:#}"));
        }
    }

    /// Knows of a newer epoch.
    ///
    /// # Errors
    /// The document cannot be written.
    pub fn adopt_epoch(&mut self, epoch: Epoch) -> Result<()> {
        self.change(|config| {
            config.lineage = lineage_of(config.lineage.uuid, epoch);
            Ok(())
        })
    }

    /// Lets go of the hold before the present one.
    ///
    /// # Errors
    /// The document cannot be written.
    pub fn release_old_hold(&mut self) -> Result<()> {
        let old = self.source()?.old_hold;
        self.change(|config| {
            if let Some(source) = &mut config.source {
                source.old_hold = None;
            }
            Ok(())
        })?;
        if let Some(old) = old {
            self.let_go(old.id, &mut |_| ());
        }
        self.let_all_go();
        self.holds_moved();
        Ok(())
    }

    /// Keeps what the origin holds as a snapshot, whatever the volume's role is.
    ///
    /// # Errors
    /// It cannot be taken.
    pub fn safety_snapshot(&mut self, why: &str) -> Result<u32> {
        let stored = self.settle_snapshots()?;
        let snapshot = self.begin_snapshot(&[MANUAL.to_owned()], &stored)?;
        let id = snapshot.id;
        self.create_frozen(id)?;
        self.record(snapshot)?;
        self.log(&format!("snapshot {id} {why}"));
        Ok(id)
    }

    /// Makes a snapshot for a moment, to list what changed.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn momentary_snapshot(&mut self) -> Result<u32> {
        let stored = self.settle_snapshots()?;
        let snapshot = self.begin_momentary(&stored)?;
        let server = self.layout.server_socket(&self.name);
        self.host.create_snapshot(&server, snapshot.id)?;
        let stored = self.patiently(|| self.host.snapshots(&server))?;
        let made = stored.iter().find(|s| s.tag.0 == snapshot.id);
        let sequence = made.context("the snapshot is gone")?.seq.0;
        let doomed = Doomed {
            id: snapshot.id,
            sequence,
        };
        // Whatever happens, it is deleted; but not by who looks after the snapshots meanwhile.
        self.change(|config| {
            config.snapshots.pending = None;
            config.snapshots.deleting.push(doomed);
            Ok(())
        })?;
        self.momentary = Some(snapshot.id);
        Ok(snapshot.id)
    }

    /// Deletes it again.
    ///
    /// # Errors
    /// The server cannot be asked; it is deleted later.
    pub fn end_momentary(&mut self) -> Result<()> {
        self.momentary = None;
        self.settle_snapshots().map(|_| ())
    }

    /// Tells the log something of replication.
    pub fn tell(&self, text: &str, out: Out) {
        self.log(text);
        out(Note::Line(text.to_owned()));
    }
}

/// The epoch that a document has.
pub(super) fn epoch(lineage: &Lineage) -> Epoch {
    Epoch {
        number: lineage.epoch,
        owner: lineage.owner.unwrap_or(lineage.uuid),
        since: lineage.since.unwrap_or(0).unsigned_abs(),
    }
}

/// A lineage in an epoch, as a document has it.
pub(super) fn lineage_of(uuid: Uuid, epoch: Epoch) -> Lineage {
    Lineage {
        uuid,
        epoch: epoch.number,
        owner: Some(epoch.owner),
        since: Some(seconds(epoch.since)),
        superseded: None,
    }
}

/// Seconds as the document has them.
pub(super) fn seconds(since: u64) -> i64 {
    i64::try_from(since).unwrap_or(i64::MAX)
}

/// A host's name goes into the command line of ssh, and into names of files.
///
/// # Errors
/// It is none.
pub fn check_host(host: &str) -> Result<()> {
    let fine = |c: char| c.is_ascii_alphanumeric() || "-_.@:".contains(c);
    if host.is_empty() || host.starts_with(['-', '.']) || !host.chars().all(fine) {
        bail!("'{host}' is not a host as ssh takes it: letters, digits and -_.@: only");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A host that begins with a dash would be an option of ssh, and could run any command.
    #[test]
    fn hosts_are_no_options_and_no_paths() {
        for good in ["beta", "root@10.0.0.1", "fe80::1", "a-b.example"] {
            check_host(good).expect(good);
        }
        for bad in [
            "",
            "-oProxyCommand=x",
            ".",
            "../x",
            "a b",
            "a/b",
            "a;b",
            "a\n",
        ] {
            check_host(bad).expect_err(bad);
        }
    }
}
