// SPDX-License-Identifier: GPL-2.0-only
//! What `list` and `status` show.

use super::Store;
use super::api::{SnapshotInfo, StoreStatus};
use super::snapshot::info;
use crate::format::snaptable::State;
use crate::units::{Chunk, SnapTag};

impl Store {
    /// All snapshots that are not deleted, oldest first.
    #[must_use]
    pub fn snapshots(&self) -> Vec<SnapshotInfo> {
        self.state
            .snapshots
            .iter()
            .filter(|s| s.state != State::Deleted)
            .map(info)
            .collect()
    }

    /// The snapshot of this tag.
    #[must_use]
    pub fn snapshot(&self, tag: SnapTag) -> Option<SnapshotInfo> {
        self.state.snapshots.by_tag(tag).map(info)
    }

    /// Whether there is no live snapshot and no bookmark, so that no write to the origin needs to be asked about.
    #[must_use]
    pub fn origin_is_unique(&self) -> bool {
        // A snapshot has its first chunk if it has any.
        self.state.snapshots.newest_keeper_with(Chunk(0)).is_none()
    }

    /// The store as a whole.
    #[must_use]
    pub fn status(&self) -> StoreStatus {
        let space = &self.state.space;
        StoreStatus {
            chunk: self.superblock.chunk,
            data_chunks: space.total() + space.resting(),
            free_chunks: space.free() + space.resting(),
            meta_blocks: self.meta.total(),
            free_meta_blocks: self.meta.free(),
            reserved_meta_blocks: self.meta_reserve(),
            separate_meta: self.media.separate_meta(),
            origin: self.media.origin_length,
            created: self.superblock.created,
            deleting: (self.state.snapshots.len() - self.state.snapshots.visible()) as u64,
        }
    }

    /// The store's identity.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        self.superblock.uuid
    }
}
