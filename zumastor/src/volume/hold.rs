// SPDX-License-Identifier: GPL-2.0-only
//! What a full store does with the snapshots that replications need: the store knows it before anybody relies on it.
//!
//! The document says who holds what, and it comes first. What the store is told follows from it, and each
//! settling of the two makes good what a crash left out: a snapshot that is held and not yet marked, or marked
//! and not held any more.

use anyhow::{Context, Result};

use super::Volume;
use super::snapshot::PROTECTED;
use crate::config::{HoldPolicy, Target};
use crate::machine::{SnapshotState, Stored};

impl Volume {
    /// The targets that need a snapshot.
    fn holders(&self, id: u32) -> impl Iterator<Item = &Target> {
        let holds = move |target: &&Target| {
            let held = [target.hold, target.sending];
            held.iter().flatten().any(|held| held.id == id)
        };
        self.config.targets.values().filter(holds)
    }

    /// Whether a snapshot is needed so much that writes to the origin fail rather: a target says so, or this is a
    /// replica, of whose origin all writers are replications. What they would gain by giving it up is a copy of everything, and
    /// nothing whole to be master of meanwhile.
    pub(super) fn is_held_fast(&self, id: u32) -> bool {
        let of_source = self.config.source.as_ref().is_some_and(|source| {
            let held = [source.hold, source.old_hold];
            held.iter().flatten().any(|held| held.id == id)
        });
        of_source || self.holders(id).any(|t| t.on_full == HoldPolicy::Protect)
    }

    /// Tells the store what to do with a listed snapshot when there is no room, if it knows it otherwise.
    pub(super) fn keep_when_full(&self, found: &Stored) -> Result<()> {
        let (id, is) = (found.tag.0, found.priority);
        let Some(listed) = self.config.snapshots.find(id) else {
            return Ok(());
        };
        let server = self.layout.server_socket(&self.name);
        let protected = listed.protected || self.is_held_fast(id);
        let wanted = if protected { PROTECTED } else { 0 };
        // Others than these two were set by hand.
        if wanted != is && [wanted, is].contains(&PROTECTED) {
            self.host.set_priority(&server, id, wanted)?;
        }
        let to_bookmark = self.holders(id).next().is_some();
        if found.state == SnapshotState::Live && found.to_bookmark != to_bookmark {
            self.host.set_to_bookmark(&server, id, to_bookmark)?;
        }
        Ok(())
    }

    /// Sees to it that a snapshot that a replication needs is not given up as others are.
    pub(super) fn hold_when_full(&self, id: u32) -> Result<()> {
        let server = self.layout.server_socket(&self.name);
        let stored = self.patiently(|| self.host.snapshots(&server))?;
        let found = stored.iter().find(|s| s.tag.0 == id);
        let found = found.with_context(|| format!("snapshot {id} is not in the store any more"))?;
        self.keep_when_full(found)
    }

    /// After holds have changed: what is not held any more is given up as others are, and
    /// bookmarks that no target needs are deleted. What fails is done with the next snapshot.
    pub(super) fn holds_moved(&mut self) {
        let stored = match self.settle_snapshots() {
            Ok(stored) => stored,
            Err(error) => return self.log(&format!("WARNING: holds: {error:#}")),
        };
        let bookmarks = stored.iter().filter(|s| s.state == SnapshotState::Bookmark);
        for id in bookmarks.map(|s| s.tag.0) {
            if self.config.snapshots.find(id).is_none() || self.held_by(id).is_some() {
                continue;
            }
            if let Err(error) = self.forget_snapshot(id, &mut |_| ()) {
                self.log(&format!("WARNING: bookmark {id} stays: {error:#}"));
            }
        }
    }
}
