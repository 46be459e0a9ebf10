// SPDX-License-Identifier: GPL-2.0-only
//! An index: a copy-on-write tree on disk, and in memory the changes that are not in it yet.
//!
//! The changes are two sorted layers over the tree. What was changed since the checkpoint under way
//! began is `recent`; what that checkpoint is merging into the tree is `frozen`, and stays until the
//! new tree is durable. A younger layer hides an older one, so a lookup is right at any moment of a
//! checkpoint. Changes are durable as journal records before they come here: losing the memory
//! loses nothing.

pub(crate) mod changed;
pub(crate) mod merge;
pub(crate) mod tree;

use std::collections::{BTreeMap, btree_map};
use std::iter::{self, Peekable};
use std::ops::Range;

use super::error::StoreError;
use super::frozen::{self, Frozen};
use super::media::Media;
use crate::format::block::Kind;
use crate::format::node::{Key, Value};
use crate::format::superblock::TreeRoot;
use merge::Change;

/// The key that follows `key`, if there is one.
pub(crate) fn after(key: Key) -> Option<Key> {
    match key.1.checked_add(1) {
        Some(next) => Some((key.0, next)),
        None => key.0.checked_add(1).map(|next| (next, 0)),
    }
}

/// No key is greater.
const LAST: Key = (u64::MAX, u64::MAX);

/// What [`Index::scan`] found.
#[derive(Debug)]
pub(crate) struct Scan {
    /// Entries, in order.
    pub found: Vec<(Key, Value)>,
    /// Where to go on; none at the end of the index.
    pub next: Option<Key>,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Index {
    pub kind: Kind,
    /// The tree of the newest durable superblock.
    pub root: TreeRoot,
    /// Changes that the checkpoint under way merges; empty if there is none.
    frozen: Frozen<Key, Option<Value>>,
    /// Entries set (some) and taken away (none) since then.
    recent: BTreeMap<Key, Option<Value>>,
}

impl Index {
    pub fn new(kind: Kind, root: TreeRoot) -> Self {
        Index {
            kind,
            root,
            frozen: Frozen::new(),
            recent: BTreeMap::new(),
        }
    }

    pub fn insert(&mut self, key: Key, value: Value) {
        self.recent.insert(key, Some(value));
    }

    pub fn remove(&mut self, key: Key) {
        self.recent.insert(key, None);
    }

    /// Everything in memory, in order.
    pub fn changes(&self) -> impl Iterator<Item = Change> + '_ {
        layers(self.recent.iter(), self.frozen.from((0, 0)))
    }

    /// What lies in memory over the tree: keys in order, and whether each exists.
    pub fn over_tree(&self, keys: Range<Key>) -> impl Iterator<Item = (Key, bool)> + '_ {
        let (from, end) = (keys.start, keys.end);
        let frozen = self
            .frozen
            .from(from)
            .take_while(move |&(key, _)| key < end);
        layers(self.recent.range(keys), frozen).map(|(key, value)| (key, value.is_some()))
    }

    /// Changes that no checkpoint has begun to merge.
    pub fn recent_len(&self) -> usize {
        self.recent.len()
    }

    /// How many changes the checkpoint under way merges.
    pub fn frozen_len(&self) -> usize {
        self.frozen.len()
    }

    /// Up to `most` of them from the place `first` on, sorted by key.
    pub fn frozen_slice(&mut self, first: usize, most: usize) -> &[Change] {
        self.frozen.slice(first, most)
    }

    /// A checkpoint begins: what changed until now is what it merges.
    pub fn freeze(&mut self) {
        debug_assert!(self.frozen.is_empty(), "one checkpoint at a time");
        self.frozen = Frozen::of(std::mem::take(&mut self.recent));
    }

    /// The checkpoint is durable: its tree has what was frozen.
    pub fn thaw(&mut self, root: TreeRoot) {
        self.root = root;
        self.frozen = Frozen::new();
    }

    /// What the layers in memory say of `key`: changed to a value, taken away, or nothing.
    pub fn changed(&self, key: Key) -> Option<Option<Value>> {
        if let Some(&value) = self.recent.get(&key) {
            return Some(value);
        }
        self.frozen.get(key)
    }

    /// Whether `key` was given a value since the last checkpoint.
    pub fn has_recent(&self, key: Key) -> bool {
        self.changed(key).flatten().is_some()
    }

    /// The value of `key`.
    pub fn get(&self, media: &mut Media, key: Key) -> Result<Option<Value>, StoreError> {
        if let Some(value) = self.changed(key) {
            return Ok(value);
        }
        let found = tree::first_in(media, self.kind, &self.root, key, key)?;
        Ok(found.map(|(_, value)| value))
    }

    /// The first entry from `from` to `last`. What was taken away behind `last` is not looked at: while
    /// a sweep goes on, hundreds of thousands of such entries may follow one another.
    pub fn first_in(
        &self,
        media: &mut Media,
        from: Key,
        last: Key,
    ) -> Result<Option<(Key, Value)>, StoreError> {
        if from > last {
            return Ok(None);
        }
        let recent = self.recent.range(from..=last).next();
        let recent = recent.map(|(&key, &value)| (key, value));
        let frozen = self.frozen.from(from).next();
        let frozen = frozen.filter(|&(key, _)| key <= last);
        let stored = tree::first_in(media, self.kind, &self.root, from, last)?;
        let stored = stored.map(|(key, value)| (key, Some(value)));
        // Of equal keys the first, and that is the youngest layer's.
        let heads = [recent, frozen, stored].into_iter().flatten();
        match heads.min_by_key(|&(key, _)| key) {
            Some((key, Some(value))) => Ok(Some((key, value))),
            Some((_, None)) => self.entries(media, from, last)?.next(media),
            None => Ok(None),
        }
    }

    /// Looks at up to `limit` entries at or after `from`, in order; those that were taken away since
    /// the last checkpoint count too, though they are not among what is found.
    pub fn scan(&self, media: &mut Media, from: Key, limit: usize) -> Result<Scan, StoreError> {
        let mut entries = self.entries(media, from, LAST)?;
        let (mut found, mut next) = (Vec::new(), Some(from));
        for _ in 0..limit {
            let Some((key, value)) = entries.step(media)? else {
                next = None;
                break;
            };
            found.extend(value.map(|value| (key, value)));
            next = after(key);
        }
        Ok(Scan { found, next })
    }

    /// As [`scan`](Self::scan), as far as the index can be read: an error is that of what lies at `from`.
    pub fn scan_in_part(
        &self,
        media: &mut Media,
        from: Key,
        limit: usize,
    ) -> Result<Scan, StoreError> {
        let mut entries = self.entries(media, from, LAST)?;
        let (mut found, mut next) = (Vec::new(), Some(from));
        for looked_at in 0..limit {
            match entries.step(media) {
                Ok(Some((key, value))) => {
                    found.extend(value.map(|value| (key, value)));
                    next = after(key);
                }
                Ok(None) => {
                    next = None;
                    break;
                }
                Err(error) if looked_at == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(Scan { found, next })
    }

    /// Walks the entries from `from` to `last`, in order.
    pub fn entries(
        &self,
        media: &mut Media,
        from: Key,
        last: Key,
    ) -> Result<Entries<'_>, StoreError> {
        let mut tree = tree::Cursor::seek(media, self.kind, &self.root, from)?;
        let stored = tree.next(media)?;
        Ok(Entries {
            recent: self.recent.range(from..=last.max(from)).peekable(),
            frozen: self.frozen.from(from).peekable(),
            tree,
            stored,
            last,
        })
    }

    /// Has the next checkpoint write the node anew that has the first entry at or after `from`, by
    /// setting that entry to what it is. No checkpoint is under way.
    pub fn touch(&mut self, media: &mut Media, from: Key) -> Result<(), StoreError> {
        let stored = tree::first_in(media, self.kind, &self.root, from, LAST)?;
        if let Some((key, value)) = stored {
            // One that was changed is written anew without that.
            if self.changed(key).is_none() {
                self.insert(key, value);
            }
        }
        Ok(())
    }

    /// Reads the leaves that cover `keys` into the cache, those that are missing in parallel.
    /// Errors are left to who looks a key up.
    pub fn prefetch(&self, media: &mut Media, keys: &[Key]) {
        let Some((pointer, mut level, _)) = self.root.root else {
            return;
        };
        let mut nodes = vec![pointer];
        while level > 0 {
            let Ok(children) = tree::children_covering(media, self.kind, level, &nodes, keys)
            else {
                return;
            };
            level -= 1;
            media.prefetch(children.iter().copied(), self.kind, level);
            nodes = children;
        }
    }
}

/// Reads up to `most` of the nodes that merging `changes` into a tree needs and that are not in the cache.
/// True if there are more. Errors of nodes are left to who merges.
pub(crate) fn read_ahead(
    media: &mut Media,
    kind: Kind,
    root: &TreeRoot,
    changes: &[Change],
    most: usize,
) -> Result<bool, StoreError> {
    let Some((pointer, mut level, _)) = root.root else {
        return Ok(false);
    };
    let keys: Vec<Key> = changes.iter().map(|&(key, _)| key).collect();
    let (mut nodes, mut left) = (vec![pointer], most);
    while level > 0 {
        nodes = tree::children_covering(media, kind, level, &nodes, &keys)?;
        level -= 1;
        // Too many to stay in the cache until they are used.
        if nodes.len() > media.cache_blocks() / 2 {
            return Ok(false);
        }
        let missing: Vec<_> = nodes
            .iter()
            .filter(|&&node| !media.is_cached(node))
            .collect();
        media.prefetch(missing.iter().take(left).map(|&&node| node), kind, level);
        if missing.len() > left {
            return Ok(true);
        }
        left -= missing.len();
    }
    Ok(false)
}

/// Two sorted layers as one: of equal keys the younger layer's.
fn layers<'a>(
    young: impl Iterator<Item = (&'a Key, &'a Option<Value>)> + 'a,
    old: impl Iterator<Item = Change> + 'a,
) -> impl Iterator<Item = Change> + 'a {
    let mut young = young.map(|(&key, &value)| (key, value)).peekable();
    let mut old = old.peekable();
    iter::from_fn(move || match (young.peek(), old.peek()) {
        (Some(&(younger, _)), Some(&(older, _))) if older < younger => old.next(),
        (Some(&(younger, _)), Some(&(older, _))) => {
            if older == younger {
                old.next();
            }
            young.next()
        }
        (None, _) => old.next(),
        (_, None) => young.next(),
    })
}

/// A walk over the entries of an [`Index`]: three sorted layers as one.
pub(crate) struct Entries<'a> {
    recent: Peekable<btree_map::Range<'a, Key, Option<Value>>>,
    frozen: Peekable<frozen::Ascending<'a, Key, Option<Value>>>,
    tree: tree::Cursor,
    /// The tree's entry that is next.
    stored: Option<(Key, Value)>,
    /// The greatest key that is walked to.
    last: Key,
}

impl Entries<'_> {
    /// The next entry; none at the end.
    pub fn next(&mut self, media: &mut Media) -> Result<Option<(Key, Value)>, StoreError> {
        while let Some((key, value)) = self.step(media)? {
            if let Some(value) = value {
                return Ok(Some((key, value)));
            }
        }
        Ok(None)
    }

    /// The next key, and its value if it was not taken away.
    fn step(&mut self, media: &mut Media) -> Result<Option<Change>, StoreError> {
        let recent = self.recent.peek().map(|&(&key, &value)| (key, value));
        let frozen = self.frozen.peek().copied();
        let stored = self.stored.map(|(key, value)| (key, Some(value)));
        let heads = [recent, frozen, stored];
        let key = heads.iter().flatten().map(|&(key, _)| key).min();
        let Some(key) = key.filter(|&key| key <= self.last) else {
            return Ok(None);
        };
        let of_key = |head: &Option<Change>| head.is_some_and(|(found, _)| found == key);
        // The youngest layer that knows the key decides.
        let value = heads
            .iter()
            .find(|head| of_key(head))
            .and_then(|head| head.and_then(|(_, value)| value));
        if of_key(&heads[0]) {
            self.recent.next();
        }
        if of_key(&heads[1]) {
            self.frozen.next();
        }
        if of_key(&heads[2]) {
            self.stored = self.tree.next(media)?;
        }
        Ok(Some((key, value)))
    }
}
