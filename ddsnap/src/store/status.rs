// SPDX-License-Identifier: GPL-2.0-only
//! What `list` and `status` show.

use std::collections::HashMap;

use super::Store;
use super::api::{Sharing, SnapshotInfo, StoreStatus};
use super::error::StoreError;
use super::index::{Index, after};
use super::media::Media;
use super::snapshot::info;
use crate::format::node::Key;
use crate::format::snaptable::State;
use crate::units::SnapTag;

/// Entries read at a time.
const PAGE: usize = 4096;

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

    /// The store as a whole.
    #[must_use]
    pub fn status(&self) -> StoreStatus {
        let space = &self.state.space;
        StoreStatus {
            chunk: self.superblock.chunk,
            data_chunks: space.total(),
            free_chunks: space.free(),
            meta_blocks: self.meta.total(),
            free_meta_blocks: self.meta.free(),
            separate_meta: self.media.separate_meta(),
            origin_chunks: self.state.origin_chunks,
            created: self.superblock.created,
            deleting: self
                .state
                .snapshots
                .iter()
                .filter(|s| s.state == State::Deleted)
                .count() as u64,
        }
    }

    /// The store's identity.
    #[must_use]
    pub fn uuid(&self) -> [u8; 16] {
        self.superblock.uuid
    }

    /// How many chunks each snapshot uses and with how many others it shares them, oldest first.
    ///
    /// Reads the whole index. The chunks of squashed snapshots are gone: their counts are empty.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn sharing(&mut self) -> Result<Vec<(SnapTag, Sharing)>, StoreError> {
        let live: Vec<u64> = self.state.snapshots.live().iter().copied().collect();
        // Exceptions by the range of live snapshots they serve: far fewer than exceptions.
        let mut ranges: HashMap<(usize, usize), u64> = HashMap::new();
        let mut last: Option<Key> = None;
        each(&self.state.exceptions, &mut self.media, |key| {
            let before = last.filter(|last| last.0 == key.0).map_or(0, |last| last.1);
            let from = live.partition_point(|&seq| seq <= before);
            let to = live.partition_point(|&seq| seq <= key.1);
            if from < to {
                *ranges.entry((from, to)).or_default() += 1;
            }
            last = Some(key);
        })?;
        let mut counts = vec![Sharing::default(); live.len()];
        for ((from, to), count) in ranges {
            counts[from..to]
                .iter_mut()
                .for_each(|sharing| add(sharing, to - from - 1, count));
        }
        each(&self.state.overlays, &mut self.media, |(seq, _)| {
            if let Ok(index) = live.binary_search(&seq) {
                add(&mut counts[index], 0, 1);
            }
        })?;
        let mut counts = counts.into_iter();
        let visible = self
            .state
            .snapshots
            .iter()
            .filter(|s| s.state != State::Deleted);
        let counted = visible.map(|s| {
            let sharing = if s.state == State::Live {
                counts.next()
            } else {
                None
            };
            (s.tag, sharing.unwrap_or_default())
        });
        Ok(counted.collect())
    }
}

fn add(sharing: &mut Sharing, others: usize, count: u64) {
    if sharing.shared_by.len() <= others {
        sharing.shared_by.resize(others + 1, 0);
    }
    sharing.shared_by[others] += count;
}

fn each(index: &Index, media: &mut Media, mut visit: impl FnMut(Key)) -> Result<(), StoreError> {
    let mut from = Some((0, 0));
    while let Some(key) = from {
        let found = index.scan(media, key, PAGE)?;
        found.iter().for_each(|&(key, _)| visit(key));
        from = if found.len() < PAGE {
            None
        } else {
            found.last().and_then(|&(key, _)| after(key))
        };
    }
    Ok(())
}
