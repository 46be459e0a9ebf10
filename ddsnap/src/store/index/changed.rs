// SPDX-License-Identifier: GPL-2.0-only
//! Looking for entries of some snapshot sequences, skipping what has none.
//!
//! Each interior node knows the newest sequence below each of its children, so a subtree older than
//! the first sequence looked for is not read. The others' leaves are read in batches and only their
//! keys decoded. A scan goes in steps of a bounded number of nodes. Between two steps the tree may
//! be replaced, so a step keeps no place in it but the key to go on from.

use super::Index;
use crate::format::block::{Kind, Pointer};
use crate::format::node::{self, Interior, Key};
use crate::store::error::StoreError;
use crate::store::media::Media;

/// Entries in memory looked at in one step.
const MAX_RECENT_ENTRIES: usize = 1 << 14;

/// What a scan looks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wanted {
    /// The first sequence.
    pub first_seq: u64,
    /// The first sequence behind.
    pub end_seq: u64,
    /// The first key behind.
    pub end: Key,
}

impl Wanted {
    fn has(&self, kind: Kind, key: Key) -> bool {
        (self.first_seq..self.end_seq).contains(&node::seq_of(kind, key)) && key < self.end
    }
}

/// Appends the wanted keys at or after `from`, in order, from about `nodes` nodes of the tree. Gives
/// the key to go on from; none at the end.
pub(crate) fn step(
    index: &Index,
    media: &mut Media,
    wanted: &Wanted,
    from: Key,
    nodes: usize,
    found: &mut Vec<Key>,
) -> Result<Option<Key>, StoreError> {
    if from >= wanted.end || wanted.first_seq >= wanted.end_seq {
        return Ok(None);
    }
    let mut gather = Gather {
        media,
        kind: index.kind,
        wanted,
        from,
        left: nodes.max(1),
        leaves: Vec::new(),
        next: None,
    };
    if let Some((pointer, level, newest)) = index.root.root {
        if newest >= wanted.first_seq {
            gather.node(pointer, level, from)?;
        }
    }
    let Gather { leaves, next, .. } = gather;
    if next.is_some_and(|next| next <= from) {
        // What no checksum shows; going on from there would not end.
        return Err(media.inconsistent("the keys of an index are out of order"));
    }
    let start = found.len();
    let blocks = media.blocks_once(&leaves, index.kind, 0)?;
    for (&pointer, block) in leaves.iter().zip(&blocks) {
        node::leaf_keys(block, |key| {
            if key >= from && wanted.has(index.kind, key) {
                found.push(key);
            }
        })
        .map_err(|source| media.damaged(pointer, source))?;
    }
    Ok(put_recent_over(index, wanted, from, next, start, found))
}

/// Puts what lies in memory over the keys found in the tree from `from` to `next`. Gives the key to
/// go on from: less than `next` if there is much in memory.
fn put_recent_over(
    index: &Index,
    wanted: &Wanted,
    from: Key,
    next: Option<Key>,
    start: usize,
    found: &mut Vec<Key>,
) -> Option<Key> {
    let mut end = next.unwrap_or(wanted.end).min(wanted.end);
    let mut changes = Vec::new();
    for (seen, (key, exists)) in index.over_tree(from..end).enumerate() {
        if seen == MAX_RECENT_ENTRIES {
            end = key;
            break;
        }
        if wanted.has(index.kind, key) {
            changes.push((key, exists));
        }
    }
    let kept = start + found[start..].partition_point(|&key| key < end);
    found.truncate(kept);
    if !changes.is_empty() {
        let old = found.split_off(start);
        let mut changes = changes.into_iter().peekable();
        for key in old {
            while let Some((new, exists)) = changes.next_if(|&(new, _)| new < key) {
                found.extend(exists.then_some(new));
            }
            match changes.next_if(|&(new, _)| new == key) {
                Some((_, false)) => {}
                _ => found.push(key),
            }
        }
        found.extend(changes.filter_map(|(new, exists)| exists.then_some(new)));
    }
    (end < wanted.end).then_some(end)
}

/// Finds the leaves that can have wanted keys.
struct Gather<'a> {
    media: &'a mut Media,
    kind: Kind,
    wanted: &'a Wanted,
    from: Key,
    /// Nodes that may still be looked at.
    left: usize,
    leaves: Vec<Pointer>,
    /// Where the next step begins.
    next: Option<Key>,
}

impl Gather<'_> {
    /// Looks below a node that has no key less than `lower`.
    fn node(&mut self, pointer: Pointer, level: u8, lower: Key) -> Result<(), StoreError> {
        if level == 0 {
            self.leaves.push(pointer);
            self.left -= 1;
            return Ok(());
        }
        let block = self.media.block(pointer, self.kind, level)?;
        let node = Interior::new(block).map_err(|source| self.media.damaged(pointer, source))?;
        let wanted = self.wanted;
        let first = node.find(self.from);
        let children = (first..node.len())
            .map(|index| (index, node.child(index)))
            .take_while(|&(index, child)| index == first || child.key < wanted.end)
            .filter(|(_, child)| child.newest >= wanted.first_seq);
        if level > 1 {
            let soon = children.clone().take(self.left);
            self.media
                .prefetch(soon.map(|(_, child)| child.pointer), self.kind, level - 1);
        }
        for (index, child) in children {
            let lower = if index == first { lower } else { child.key };
            if self.left == 0 {
                self.next = Some(lower);
                return Ok(());
            }
            self.node(child.pointer, level - 1, lower)?;
            if self.next.is_some() {
                return Ok(());
            }
        }
        // Not before its end, so that each step gets further than the one before.
        self.left = self.left.saturating_sub(1);
        Ok(())
    }
}
