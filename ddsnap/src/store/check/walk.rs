// SPDX-License-Identifier: GPL-2.0-only
//! A walk over a tree that goes on behind damage: every node is proven against its parent, what can be
//! read is handed out in the order of keys, and what cannot is named by the range of keys it held.

use super::problem::Place;
use crate::format::block::{Block, Kind, Pointer};
use crate::format::node::{self, Interior, Key, LeafReader, Value};
use crate::format::superblock::TreeRoot;
use crate::store::error::StoreError;
use crate::store::media::Media;
use crate::store::metaalloc::MetaAlloc;

/// What the walk meets.
pub(crate) enum Met {
    Entry(Key, Value),
    /// The keys from the first on, up to the second or the end, cannot be read.
    Lost(Key, Option<Key>, Place, String),
    /// A node can be used but is not as it must be.
    Odd(Place, String),
}

/// Where the walk is, and what it has counted.
pub(crate) struct Walk<'a> {
    pub media: &'a mut Media,
    /// Blocks that have an owner so far.
    pub blocks: &'a mut MetaAlloc,
    kind: Kind,
    nodes: u64,
    entries: u64,
    lost: bool,
}

/// What is done with what is met. An error ends the walk.
pub(crate) type Sink<'s> = dyn FnMut(&mut Walk<'_>, Met) -> Result<(), StoreError> + 's;

/// Walks the tree at `root`. `Ok(true)`: all of it could be read.
///
/// # Errors
/// Those of the sink.
pub(crate) fn walk(
    media: &mut Media,
    blocks: &mut MetaAlloc,
    kind: Kind,
    root: &TreeRoot,
    sink: &mut Sink<'_>,
) -> Result<bool, StoreError> {
    let mut walk = Walk {
        media,
        blocks,
        kind,
        nodes: 0,
        entries: 0,
        lost: false,
    };
    let mut found_newest = Some(0);
    let mut newest = 0;
    if let Some((pointer, level, root_newest)) = root.root {
        newest = root_newest;
        found_newest = walk.node(pointer, level, ((0, 0), None), sink)?;
    }
    if walk.lost {
        return Ok(false);
    }
    for (what, found, wanted) in [
        ("entries", walk.entries, root.entries),
        ("nodes", walk.nodes, root.nodes),
        ("as newest sequence", found_newest.unwrap_or(newest), newest),
    ] {
        if found != wanted {
            let what = format!(
                "the tree of {} has {found} {what}, the superblock says {wanted}",
                name_of(kind)
            );
            sink(&mut walk, Met::Odd(Place::Store, what))?;
        }
    }
    Ok(true)
}

/// What a tree holds, for people.
pub(crate) fn name_of(kind: Kind) -> &'static str {
    match kind {
        Kind::Exceptions => "exceptions",
        Kind::Overlays => "overlays",
        Kind::Space | Kind::Bitmap => "bitmaps",
        Kind::Snapshots => "snapshots",
    }
}

/// Keys from the first on, up to the second or the end.
type Range = (Key, Option<Key>);

fn within((from, to): Range, key: Key) -> bool {
    from <= key && to.is_none_or(|to| key < to)
}

impl Walk<'_> {
    /// Walks a node and what is below; gives the newest sequence there if all could be read.
    fn node(
        &mut self,
        pointer: Pointer,
        level: u8,
        range: Range,
        sink: &mut Sink<'_>,
    ) -> Result<Option<u64>, StoreError> {
        self.nodes += 1;
        let place = Place::Block(pointer.block);
        if !self.blocks.take(pointer.block) {
            let what = format!(
                "a node of the tree of {} lies here, where another block lies or none may",
                name_of(self.kind)
            );
            return self.lose(range, place, what, sink);
        }
        let block = match self.media.block(pointer, self.kind, level) {
            Ok(block) => block,
            Err(error) => return self.lose(range, place, sentence(&error), sink),
        };
        if level == 0 {
            self.leaf(pointer, block, range, sink)
        } else {
            self.interior(pointer, block, range, sink)
        }
    }

    fn interior(
        &mut self,
        pointer: Pointer,
        block: Block,
        range: Range,
        sink: &mut Sink<'_>,
    ) -> Result<Option<u64>, StoreError> {
        let place = Place::Block(pointer.block);
        let node = match Interior::new(block) {
            Ok(node) => node,
            Err(error) => return self.lose(range, place, error.to_string(), sink),
        };
        // The first child also holds the keys below its own.
        if node
            .children()
            .skip(1)
            .any(|child| !within(range, child.key))
        {
            let what = "its children hold keys that belong elsewhere".to_owned();
            return self.lose(range, place, what, sink);
        }
        let level = node.level() - 1;
        let children = node.children().map(|child| child.pointer);
        self.media.prefetch(children, self.kind, level);
        let mut newest = Some(0);
        for index in 0..node.len() {
            let child = node.child(index);
            let from = if index == 0 { range.0 } else { child.key };
            let to = match index + 1 < node.len() {
                true => Some(node.child(index + 1).key),
                false => range.1,
            };
            let found = self.node(child.pointer, level, (from, to), sink)?;
            if found.is_some_and(|found| found != child.newest) {
                let what = format!(
                    "it says that the newest snapshot sequence in block {} is {}, but it is {}",
                    child.pointer.block,
                    child.newest,
                    found.unwrap_or_default()
                );
                sink(self, Met::Odd(place, what))?;
            }
            newest = newest.zip(found).map(|(a, b)| a.max(b));
        }
        Ok(newest)
    }

    fn leaf(
        &mut self,
        pointer: Pointer,
        block: Block,
        range: Range,
        sink: &mut Sink<'_>,
    ) -> Result<Option<u64>, StoreError> {
        let place = Place::Block(pointer.block);
        let entries = match entries(block) {
            Ok(entries) => entries,
            Err(error) => return self.lose(range, place, error.to_string(), sink),
        };
        if entries.iter().any(|&(key, _)| !within(range, key)) {
            let what = "it holds keys that belong elsewhere".to_owned();
            return self.lose(range, place, what, sink);
        }
        let mut newest = 0;
        for (key, value) in entries {
            newest = newest.max(node::seq_of(self.kind, key));
            self.entries += 1;
            sink(self, Met::Entry(key, value))?;
        }
        Ok(Some(newest))
    }

    fn lose(
        &mut self,
        (from, to): Range,
        place: Place,
        what: String,
        sink: &mut Sink<'_>,
    ) -> Result<Option<u64>, StoreError> {
        self.lost = true;
        sink(self, Met::Lost(from, to, place, what))?;
        Ok(None)
    }
}

fn entries(block: Block) -> Result<Vec<(Key, Value)>, crate::format::FormatError> {
    let mut reader = LeafReader::new(block)?;
    let mut entries = Vec::new();
    while let Some(entry) = reader.next_entry()? {
        entries.push(entry);
    }
    Ok(entries)
}

/// What an error says, with its cause but without the device and the place, which the problem has.
pub(crate) fn sentence(error: &StoreError) -> String {
    match error {
        StoreError::Damaged { source, .. } => source.to_string(),
        StoreError::Read { source, .. } => format!("it cannot be read: {source}"),
        StoreError::Inconsistent { problem, .. }
        | StoreError::Journal { problem, .. }
        | StoreError::WrongDevice { problem, .. } => problem.clone(),
        other => other.to_string(),
    }
}
