// SPDX-License-Identifier: GPL-2.0-only
//! Reading a tree: a cursor that walks entries in order, and a walk over the nodes themselves.

use crate::format::block::{Block, Kind, Pointer};
use crate::format::node::{Interior, Key, LeafReader, Value, leaf_first_from};
use crate::format::superblock::TreeRoot;
use crate::store::error::StoreError;
use crate::store::media::Media;
use crate::units::MetaBlock;

/// Walks the entries of a tree from a key on.
pub(crate) struct Cursor {
    kind: Kind,
    /// Interior nodes from the root down, each with the index of the next child to visit.
    path: Vec<(Interior, usize)>,
    leaf: Option<(LeafReader, Pointer)>,
    /// The entry `next` gives, found by `seek`.
    ahead: Option<(Key, Value)>,
}

impl Cursor {
    /// A cursor before the first entry at or after `from`.
    pub fn seek(
        media: &mut Media,
        kind: Kind,
        root: &TreeRoot,
        from: Key,
    ) -> Result<Cursor, StoreError> {
        let mut cursor = Cursor {
            kind,
            path: Vec::new(),
            leaf: None,
            ahead: None,
        };
        let Some((pointer, level, _)) = root.root else {
            return Ok(cursor);
        };
        cursor.descend(media, pointer, level, from)?;
        cursor.ahead = loop {
            match cursor.step(media)? {
                Some((key, _)) if key < from => {}
                entry => break entry,
            }
        };
        Ok(cursor)
    }

    /// The next entry; none at the end.
    pub fn next(&mut self, media: &mut Media) -> Result<Option<(Key, Value)>, StoreError> {
        match self.ahead.take() {
            Some(entry) => Ok(Some(entry)),
            None => self.step(media),
        }
    }

    fn step(&mut self, media: &mut Media) -> Result<Option<(Key, Value)>, StoreError> {
        loop {
            let Some((leaf, pointer)) = &mut self.leaf else {
                return Ok(None);
            };
            let entry = leaf.next_entry();
            if let Some(entry) = entry.map_err(|source| media.damaged(*pointer, source))? {
                return Ok(Some(entry));
            }
            self.leaf = None;
            while let Some((node, next)) = self.path.last_mut() {
                if *next < node.len() {
                    let child = node.child(*next);
                    *next += 1;
                    // Every node of the path has a level of at least 1 (checked by Interior).
                    let level = node.level() - 1;
                    self.descend(media, child.pointer, level, (0, 0))?;
                    break;
                }
                self.path.pop();
            }
        }
    }

    /// Goes down from a node to the leaf that covers `key`.
    fn descend(
        &mut self,
        media: &mut Media,
        mut pointer: Pointer,
        mut level: u8,
        key: Key,
    ) -> Result<(), StoreError> {
        loop {
            let block = media.block(pointer, self.kind, level)?;
            if level == 0 {
                let leaf =
                    LeafReader::new(block).map_err(|source| media.damaged(pointer, source))?;
                self.leaf = Some((leaf, pointer));
                return Ok(());
            }
            let node = Interior::new(block).map_err(|source| media.damaged(pointer, source))?;
            let index = node.find(key);
            pointer = node.child(index).pointer;
            self.path.push((node, index + 1));
            level -= 1;
        }
    }
}

/// The first entry from `from` to `last`: what [`Cursor`] finds, without the means to go on.
pub(crate) fn first_in(
    media: &mut Media,
    kind: Kind,
    root: &TreeRoot,
    from: Key,
    last: Key,
) -> Result<Option<(Key, Value)>, StoreError> {
    let Some((mut pointer, level, _)) = root.root else {
        return Ok(None);
    };
    // The first key of the leaf behind.
    let mut behind = None;
    for level in (1..=level).rev() {
        let block = media.block(pointer, kind, level)?;
        let node = Interior::new(block).map_err(|source| media.damaged(pointer, source))?;
        let index = node.find(from);
        if index + 1 < node.len() {
            behind = Some(node.child(index + 1).key);
        }
        pointer = node.child(index).pointer;
    }
    let block = media.block(pointer, kind, 0)?;
    let found = leaf_first_from(&block, from).map_err(|source| media.damaged(pointer, source))?;
    let found = match (found, behind) {
        (None, Some(behind)) if behind <= last => {
            Cursor::seek(media, kind, root, from)?.next(media)?
        }
        (found, _) => found,
    };
    Ok(found.filter(|&(key, _)| key <= last))
}

/// Calls `visit` with the place of every node; leaves are named by their parents, not read.
pub(crate) fn walk(
    media: &mut Media,
    kind: Kind,
    root: &TreeRoot,
    visit: &mut dyn FnMut(Pointer) -> Result<(), String>,
) -> Result<u64, StoreError> {
    let Some((pointer, level, _)) = root.root else {
        return Ok(0);
    };
    let mut nodes = 0;
    let mut waiting = vec![(pointer, level)];
    while let Some((pointer, level)) = waiting.pop() {
        // A pointer back to a node already met would make the walk endless: `visit` refuses it.
        visit(pointer).map_err(|problem| media.inconsistent(problem))?;
        nodes += 1;
        if level > 0 {
            let block: Block = media.block(pointer, kind, level)?;
            let node = Interior::new(block).map_err(|source| media.damaged(pointer, source))?;
            if level > 1 {
                media.prefetch(node.children().map(|child| child.pointer), kind, level - 1);
            }
            waiting.extend(node.children().map(|child| (child.pointer, level - 1)));
        }
    }
    Ok(nodes)
}

/// The children, of nodes of one level, that cover `keys`; each once.
pub(crate) fn children_covering(
    media: &mut Media,
    kind: Kind,
    level: u8,
    nodes: &[Pointer],
    keys: &[Key],
) -> Result<Vec<Pointer>, StoreError> {
    let mut parents = Vec::with_capacity(nodes.len());
    for &pointer in nodes {
        let block = media.block(pointer, kind, level)?;
        parents.push(Interior::new(block).map_err(|source| media.damaged(pointer, source))?);
    }
    parents.sort_by_key(|node| node.child(0).key);
    let mut children = Vec::with_capacity(keys.len());
    for &key in keys {
        let index = parents.partition_point(|node| node.child(0).key <= key);
        let node = &parents[index.saturating_sub(1)];
        children.push(node.child(node.find(key)).pointer);
    }
    children.sort_by_key(|pointer| pointer.block.0);
    children.dedup();
    Ok(children)
}

/// The first key behind the node of level 1 that covers `key`; none if it is the last.
pub(crate) fn end_of_branch(
    media: &mut Media,
    kind: Kind,
    root: &TreeRoot,
    key: Key,
) -> Result<Option<Key>, StoreError> {
    let mut end = None;
    let Some((mut pointer, mut level, _)) = root.root else {
        return Ok(None);
    };
    while level > 1 {
        let block = media.block(pointer, kind, level)?;
        let node = Interior::new(block).map_err(|source| media.damaged(pointer, source))?;
        let index = node.find(key);
        if index + 1 < node.len() {
            end = Some(node.child(index + 1).key);
        }
        pointer = node.child(index).pointer;
        level -= 1;
    }
    Ok(end)
}

/// The first key behind the first node that cannot be read among those that cover the keys from `from` on,
/// in the leaf that covers `from` and in the one behind it. None if they can be read; none inside if nothing
/// lies behind the node.
pub(crate) fn end_of_unreadable(
    media: &mut Media,
    kind: Kind,
    root: &TreeRoot,
    from: Key,
) -> Option<Option<Key>> {
    let (root, levels, _) = root.root?;
    let mut at = from;
    for _ in 0..2 {
        let (mut pointer, mut level, mut end) = (root, levels, None);
        loop {
            let Ok(block) = media.block(pointer, kind, level) else {
                return Some(end);
            };
            if level == 0 {
                let mut leaf = LeafReader::new(block).ok();
                let whole = loop {
                    match leaf.as_mut().map(LeafReader::next_entry) {
                        Some(Ok(Some(_))) => {}
                        Some(Ok(None)) => break true,
                        Some(Err(_)) | None => break false,
                    }
                };
                if !whole {
                    return Some(end);
                }
                break;
            }
            let Ok(node) = Interior::new(block) else {
                return Some(end);
            };
            let index = node.find(at);
            if index + 1 < node.len() {
                end = Some(node.child(index + 1).key);
            }
            pointer = node.child(index).pointer;
            level -= 1;
        }
        at = end?;
    }
    None
}

/// Nodes, each with a key below it, and the first key behind them.
pub(crate) type Branch = (Vec<(MetaBlock, Key)>, Option<Key>);

/// The nodes on the way to the branch (a node of level 1 and its leaves) that covers `from`, that branch, and its
/// leaves from there on, each with a key below it; and the first key behind the branch. Leaves are not
/// read.
pub(crate) fn branch(
    media: &mut Media,
    kind: Kind,
    root: &TreeRoot,
    from: Key,
) -> Result<Branch, StoreError> {
    let (mut nodes, mut end) = (Vec::new(), None);
    let Some((mut pointer, mut level, _)) = root.root else {
        return Ok((nodes, end));
    };
    loop {
        nodes.push((pointer.block, from));
        if level == 0 {
            return Ok((nodes, end));
        }
        let block = media.block(pointer, kind, level)?;
        let node = Interior::new(block).map_err(|source| media.damaged(pointer, source))?;
        let index = node.find(from);
        if level == 1 {
            let leaves = (index..node.len()).map(|at| node.child(at));
            nodes.extend(leaves.map(|leaf| (leaf.pointer.block, leaf.key.max(from))));
            return Ok((nodes, end));
        }
        if index + 1 < node.len() {
            end = Some(node.child(index + 1).key);
        }
        pointer = node.child(index).pointer;
        level -= 1;
    }
}
