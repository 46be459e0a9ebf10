// SPDX-License-Identifier: GPL-2.0-only
//! What arrives at a replica: the copy under way, the snapshot it becomes, and the twin of it that is shown. Each is one
//! durable step.

use anyhow::{Context, Result};
use uuid::Uuid;

use super::Volume;
use super::replica::{REPLICA, lineage_of, seconds};
use super::show::Hidden;
use crate::config::{Incoming, Snapref, Snapshot};
use crate::machine::{Busy, SnapshotState, Stored};
use crate::names;
use crate::plan::{Action, Level};
use crate::replication::message::Begin;
use crate::replication::standing::Epoch;

/// What is said of a twin that another one was to take the place of.
const STILL_USED: &str = "is still in use";

/// A snapshot that the origin has the content of, and that is none yet.
pub(super) struct Arrived {
    pub(super) uuid: Uuid,
    /// When, on the other side, in seconds since 1970-01-01 UTC.
    pub(super) taken: i64,
    /// What it was made from.
    pub(super) base: Option<Uuid>,
}

impl Volume {
    /// Records that the origin's content is no snapshot's and no copy's.
    ///
    /// # Errors
    /// The document cannot be written.
    pub fn unsettle(&mut self) -> Result<()> {
        self.change(|config| {
            if let Some(source) = &mut config.source {
                source.origin = None;
                source.incoming = None;
                source.by_hand = None;
            }
            Ok(())
        })
    }

    /// Records that the origin has the content of this snapshot, and of no copy.
    ///
    /// # Errors
    /// The document cannot be written.
    pub fn settle(&mut self, snapshot: Uuid) -> Result<()> {
        self.change(|config| {
            if let Some(source) = &mut config.source {
                source.origin = Some(snapshot);
                source.incoming = None;
                source.by_hand = None;
            }
            Ok(())
        })
    }

    /// Records a copy that begins.
    ///
    /// # Errors
    /// The document cannot be written.
    pub fn start_incoming(
        &mut self,
        incoming: Incoming,
        lineage: Uuid,
        epoch: Epoch,
    ) -> Result<()> {
        self.source()?;
        self.change(|config| {
            config.lineage = lineage_of(lineage, epoch);
            if let Some(source) = &mut config.source {
                source.origin = None;
                source.incoming = Some(incoming);
                source.by_hand = None;
            }
            Ok(())
        })
    }

    /// Makes what has arrived a snapshot with a twin to mount, and the hold; then shows it. Gives its
    /// number.
    ///
    /// # Errors
    /// It cannot be made; what has arrived is still there.
    pub fn finish_incoming(&mut self, begin: &Begin, proven: Option<i64>) -> Result<u32> {
        let arrived = Arrived {
            uuid: begin.snapshot.id,
            taken: seconds(begin.snapshot.taken),
            base: begin.base,
        };
        self.finish(&arrived, proven)
    }

    /// As [`finish_incoming`](Self::finish_incoming), however it came.
    ///
    /// # Errors
    /// It cannot be made; what has arrived is still there.
    pub(super) fn finish(&mut self, arrived: &Arrived, proven: Option<i64>) -> Result<u32> {
        self.source()?;
        let uuid = arrived.uuid;
        let stored = self.settle_snapshots()?;
        let live = |s: &Stored| s.state == SnapshotState::Live;
        let is_live = |id: &u32| stored.iter().any(|s| s.tag.0 == *id && live(s));
        let listed = self.number_of(uuid).ok();
        let known = listed.filter(is_live);
        if let (Some(old), None) = (listed, known) {
            // It was received before, and has lost its data to a full store.
            self.unlist(old)?;
        }
        let made = match known {
            Some(_) => None,
            None => Some(self.make_received(arrived, &stored)?),
        };
        let id = known.or(made.as_ref().map(|made| made.id));
        let id = id.context("a snapshot without a number")?;
        let is_new = made.is_some();
        let kinds = made
            .as_ref()
            .map_or_else(Vec::new, |made| made.kinds.clone());
        let before = self.mounted_tags();
        let hidden = self.hide_twin(id);
        let old = arrived.base.and_then(|base| self.snapref(base).ok());
        let changed = self.change(|config| {
            let snapshots = &mut config.snapshots;
            if let Some(made) = made {
                snapshots.pending = None;
                snapshots.list.push(made);
            }
            if let Some(source) = &mut config.source {
                let before = old.or(source.hold);
                source.old_hold = before.filter(|before| before.uuid != uuid);
                source.hold = Some(Snapref { uuid, id });
                source.hold_by_hand = source.by_hand.take().is_some();
                source.origin = Some(uuid);
                source.incoming = None;
                source.proven = proven.or(source.proven);
                if is_new {
                    source.pending.clear();
                }
            }
            Ok(())
        });
        if let Err(error) = changed {
            if let Some((twin, Hidden::Gone | Hidden::Detached)) = hidden {
                self.do_or_warn(&[Action::Mount(Some(twin))], &mut |_| ());
            }
            return Err(error);
        }
        self.log(&format!("snapshot {id} has arrived"));
        self.holds_moved();
        self.rotate(&kinds, &mut |_| ());
        let full = self.full_level();
        let shown = if self.level < full {
            self.up(full, &mut |_| ()).map(|_| ())
        } else {
            self.show_arrived(id, &before, hidden)
        };
        if let Err(error) = shown {
            self.warn(format!("snapshot {id} is not shown: {error:#}"));
        }
        Ok(id)
    }

    fn make_received(&mut self, arrived: &Arrived, stored: &[Stored]) -> Result<Snapshot> {
        let mut kinds = vec![REPLICA.to_owned()];
        kinds.extend(self.source()?.pending.iter().cloned());
        let mut snapshot = self.begin_snapshot(&kinds, stored)?;
        snapshot.uuid = arrived.uuid;
        snapshot.created = arrived.taken;
        let time = names::local_time_of(arrived.taken);
        snapshot.time = self.config.snapshots.unique_time(&time);
        snapshot.twin = Some(snapshot.id + 1);
        self.change(|config| {
            config.snapshots.pending = Some(snapshot.clone());
            Ok(())
        })?;
        let server = self.layout.server_socket(&self.name);
        self.host.create_snapshot(&server, snapshot.id)?;
        self.host.create_snapshot(&server, snapshot.id + 1)?;
        Ok(snapshot)
    }

    /// Unmounts the twin that is shown, now that snapshot `next` takes its place. Gives it back, with what became of
    /// it; none if there is nothing to hide.
    ///
    /// Processes that use it keep it, and whoever comes anew sees the next one. What else uses it, as the server of
    /// NFS or a mount inside, would show it to those too, or be torn off: for that it stays.
    fn hide_twin(&mut self, next: u32) -> Option<(u32, Hidden)> {
        self.warnings.retain(|w| !w.contains(STILL_USED));
        if self.level < Level::Mounted {
            return None;
        }
        let (twin, shown) = (self.twin()?, self.source().ok()?.hold?.id);
        if shown == next {
            return None;
        }
        let Err(error) = self.perform(Action::Unmount(Some(twin)), &mut |_| ()) else {
            return Some((twin, Hidden::Gone));
        };
        let busy = error.downcast_ref::<Busy>();
        let processes = busy.filter(|busy| !busy.lasting && !busy.holders.is_empty());
        let detached = processes.map(|busy| {
            let dir = self.mountpoint(Some(twin));
            (busy.holders.join(", "), self.host.detach(&dir))
        });
        if let Some((holders, Ok(()))) = detached {
            self.warn(format!(
                "snapshot {shown} is not shown any more, but {STILL_USED} by {holders}, who see nothing newer until they \
                 open it anew"
            ));
            return Some((twin, Hidden::Detached));
        }
        let name = &self.name;
        self.warn(format!(
            "snapshot {shown} is shown instead of snapshot {next}, as it {STILL_USED}: {error:#}; end that, then run \
             `zumastor start volume {name}`"
        ));
        Some((twin, Hidden::Stays))
    }

    /// The snapshot that a replica shows at its mount point.
    pub(super) fn twin(&self) -> Option<u32> {
        let source = self.config.source.as_ref().filter(|source| source.mount)?;
        self.config.snapshots.find(source.hold?.id)?.twin
    }
}
