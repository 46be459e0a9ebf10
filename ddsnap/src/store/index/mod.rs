// SPDX-License-Identifier: GPL-2.0-only
//! An index: a copy-on-write tree on disk, and in memory the changes since the last checkpoint.
//!
//! Changes are durable as journal records before they come here, so losing the memory loses
//! nothing. A checkpoint merges them into the tree ([`merge`]).

pub(crate) mod changed;
pub(crate) mod merge;
pub(crate) mod tree;

use std::collections::BTreeMap;
use std::ops::Range;

use super::error::StoreError;
use super::media::Media;
use crate::format::block::Kind;
use crate::format::node::{Key, Value};
use crate::format::superblock::TreeRoot;

/// The key that follows `key`, if there is one.
pub(crate) fn after(key: Key) -> Option<Key> {
    match key.1.checked_add(1) {
        Some(next) => Some((key.0, next)),
        None => key.0.checked_add(1).map(|next| (next, 0)),
    }
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Index {
    pub kind: Kind,
    pub root: TreeRoot,
    /// Entries set (some) and taken away (none) since the last checkpoint.
    pub recent: BTreeMap<Key, Option<Value>>,
}

impl Index {
    pub fn new(kind: Kind, root: TreeRoot) -> Self {
        Index {
            kind,
            root,
            recent: BTreeMap::new(),
        }
    }

    pub fn insert(&mut self, key: Key, value: Value) {
        self.recent.insert(key, Some(value));
    }

    pub fn remove(&mut self, key: Key) {
        self.recent.insert(key, None);
    }

    /// What memory says of `key`: set to a value, taken away, or nothing.
    pub fn changed(&self, key: Key) -> Option<Option<Value>> {
        self.recent.get(&key).copied()
    }

    /// Everything in memory, in order.
    pub fn changes(&self) -> impl Iterator<Item = (Key, Option<Value>)> + '_ {
        self.recent.iter().map(|(&key, &value)| (key, value))
    }

    /// What lies in memory over the tree: keys in order, and whether each exists.
    pub fn over_tree(&self, keys: Range<Key>) -> impl Iterator<Item = (Key, bool)> {
        let recent = self.recent.range(keys);
        recent.map(|(&key, value)| (key, value.is_some()))
    }

    /// The value of `key`.
    pub fn get(&self, media: &mut Media, key: Key) -> Result<Option<Value>, StoreError> {
        if let Some(&value) = self.recent.get(&key) {
            return Ok(value);
        }
        let mut cursor = tree::Cursor::seek(media, self.kind, &self.root, key)?;
        Ok(cursor
            .next(media)?
            .filter(|&(found, _)| found == key)
            .map(|(_, value)| value))
    }

    /// The first entry at or after `from`.
    pub fn first_from(
        &self,
        media: &mut Media,
        from: Key,
    ) -> Result<Option<(Key, Value)>, StoreError> {
        Ok(self.scan(media, from, 1)?.pop())
    }

    /// Up to `limit` entries at or after `from`, in order.
    pub fn scan(
        &self,
        media: &mut Media,
        from: Key,
        limit: usize,
    ) -> Result<Vec<(Key, Value)>, StoreError> {
        let mut found = Vec::new();
        let mut recent = self.recent.range(from..).peekable();
        let mut cursor = tree::Cursor::seek(media, self.kind, &self.root, from)?;
        let mut old = cursor.next(media)?;
        while found.len() < limit {
            match (old, recent.peek()) {
                (Some((key, value)), None) => {
                    found.push((key, value));
                    old = cursor.next(media)?;
                }
                (Some((key, value)), Some(&(&new, _))) if key < new => {
                    found.push((key, value));
                    old = cursor.next(media)?;
                }
                (_, Some(&(&new, &value))) => {
                    if old.is_some_and(|(key, _)| key == new) {
                        old = cursor.next(media)?;
                    }
                    found.extend(value.map(|value| (new, value)));
                    recent.next();
                }
                (None, None) => break,
            }
        }
        Ok(found)
    }
}
