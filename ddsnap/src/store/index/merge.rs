// SPDX-License-Identifier: GPL-2.0-only
//! Merging sorted changes into a tree, in one pass, without touching a block in use.
//!
//! Every node on the way to a change is written anew elsewhere. Neighbouring leaves that change are
//! read as one stream and packed full again, so dense changes keep the tree dense; where a lone leaf
//! grows over a block it splits in equal halves, and where one shrinks below a quarter it takes in
//! its neighbour.

use crate::buffer::AlignedBuf;
use crate::device::Write;
use crate::format::BLOCK_LEN;
use crate::format::block::{BlockBuilder, Kind, PAYLOAD_LEN, Pointer, Seal};
use crate::format::node::{self, Child, FANOUT, Interior, Key, LeafBuilder, LeafReader, Value};
use crate::format::superblock::TreeRoot;
use crate::store::error::StoreError;
use crate::store::media::Media;
use crate::store::metaalloc::MetaAlloc;
use crate::units::MetaBlock;

/// A change to an index: a key's new value, or none if it goes.
pub(crate) type Change = (Key, Option<Value>);

/// Blocks collected before they are written.
const BATCH: usize = 256;
/// A leaf of fewer bytes takes in its neighbour.
const FEW_BYTES: usize = PAYLOAD_LEN / 4;
/// An interior node of fewer children takes in its neighbour.
const FEW_CHILDREN: usize = FANOUT / 4;

/// Writes the blocks of a checkpoint's step to places that nothing durable refers to.
pub(crate) struct Writer<'a> {
    pub media: &'a mut Media,
    pub alloc: &'a mut MetaAlloc,
    /// Generation of the superblock that will refer to the blocks.
    pub generation: u64,
    waiting: Vec<(MetaBlock, crate::format::block::Block)>,
    /// Blocks taken for what was put.
    pub written: Vec<MetaBlock>,
    /// Blocks that the new ones replace; none of them is free yet.
    pub replaced: Vec<MetaBlock>,
}

impl<'a> Writer<'a> {
    pub fn new(media: &'a mut Media, alloc: &'a mut MetaAlloc, generation: u64) -> Self {
        Writer {
            media,
            alloc,
            generation,
            waiting: Vec::new(),
            written: Vec::new(),
            replaced: Vec::new(),
        }
    }

    /// Seals a payload and writes it to a free block.
    pub fn put(
        &mut self,
        (payload, count, used): (BlockBuilder, u16, u16),
        kind: Kind,
        level: u8,
        aux: u64,
    ) -> Result<Pointer, StoreError> {
        let block = self
            .alloc
            .allocate()
            .ok_or_else(|| StoreError::MetaExhausted {
                device: self.media.meta_name(),
            })?;
        let seal = Seal {
            block,
            generation: self.generation,
            uuid_part: self.media.uuid_part,
            kind,
            level,
            count,
            used,
            aux,
        };
        let (pointer, sealed) = payload.seal(&seal);
        self.media.remember(pointer, sealed.clone());
        self.written.push(block);
        self.waiting.push((block, sealed));
        if self.waiting.len() >= BATCH {
            self.write_out()?;
        }
        Ok(pointer)
    }

    /// Writes what was collected; the caller flushes.
    pub fn write_out(&mut self) -> Result<(), StoreError> {
        let mut bytes = AlignedBuf::zeroed(self.waiting.len() * BLOCK_LEN);
        for (into, (_, block)) in bytes.chunks_exact_mut(BLOCK_LEN).zip(&self.waiting) {
            into.copy_from_slice(block.bytes());
        }
        let parts = self.waiting.iter().zip(bytes.chunks_exact(BLOCK_LEN));
        let batch: Vec<_> = parts
            .map(|((at, _), from)| Write {
                offset: at.to_offset(),
                from,
            })
            .collect();
        self.media.write_meta(&batch)?;
        self.waiting.clear();
        Ok(())
    }
}

/// Merges `changes`, sorted by key, into the tree at `old` and gives the new root.
pub(crate) fn merge(
    writer: &mut Writer<'_>,
    kind: Kind,
    old: &TreeRoot,
    changes: &[Change],
) -> Result<TreeRoot, StoreError> {
    if changes.is_empty() {
        return Ok(*old);
    }
    let mut merge = Merge {
        writer,
        kind,
        entries: old.entries,
        nodes: old.nodes,
    };
    let mut level = 0;
    let mut children = match old.root {
        Some((pointer, top, _)) if top > 0 => {
            level = top - 1;
            merge.interior(pointer, top, changes)?
        }
        other => {
            let mut leaves = Leaves::default();
            merge.leaf(other.map(|(pointer, _, _)| pointer), changes, &mut leaves)?;
            merge.finish_leaves(leaves)?
        }
    };
    let packed = children.len() > 1;
    while children.len() > 1 {
        level += 1;
        children = merge.pack(&children, level)?;
    }
    let Some(mut top) = children.pop() else {
        return Ok(TreeRoot {
            root: None,
            entries: merge.entries,
            nodes: merge.nodes,
        });
    };
    if !packed {
        // The node read next may wait to be written, and the cache may have dropped it.
        merge.writer.write_out()?;
    }
    // A root with one child is only a longer way to that child.
    while level > 0 && !packed {
        let node = merge.read(top.pointer, level)?;
        if node.len() > 1 {
            break;
        }
        merge.replace(top.pointer);
        top = node.child(0);
        level -= 1;
    }
    let root = Some((top.pointer, level, top.newest));
    Ok(TreeRoot {
        root,
        entries: merge.entries,
        nodes: merge.nodes,
    })
}

struct Merge<'a, 'b> {
    writer: &'a mut Writer<'b>,
    kind: Kind,
    entries: u64,
    nodes: u64,
}

/// Entries of changed leaves on their way into new ones.
#[derive(Default)]
struct Leaves {
    done: Vec<Child>,
    entries: Vec<(Key, Value)>,
    /// About as many bytes as `entries` take.
    bytes: usize,
}

impl Leaves {
    fn push(&mut self, key: Key, value: Value) {
        let last = self
            .entries
            .last()
            .map_or_else(Default::default, |&(key, value)| (key, value.place));
        self.bytes += node::entry_len(last, key, value.place);
        self.entries.push((key, value));
    }
}

impl Merge<'_, '_> {
    fn read(&mut self, pointer: Pointer, level: u8) -> Result<Interior, StoreError> {
        let block = self.writer.media.block(pointer, self.kind, level)?;
        Interior::new(block).map_err(|source| self.writer.media.damaged(pointer, source))
    }

    fn replace(&mut self, pointer: Pointer) {
        self.writer.replaced.push(pointer.block);
        self.nodes = self.nodes.saturating_sub(1);
    }

    /// The children of an interior node as they are after the changes.
    fn interior(
        &mut self,
        pointer: Pointer,
        level: u8,
        changes: &[Change],
    ) -> Result<Vec<Child>, StoreError> {
        let node = self.read(pointer, level)?;
        self.replace(pointer);
        let parts = split_changes(&node, changes);
        let touched = node
            .children()
            .zip(&parts)
            .filter(|(_, part)| !part.is_empty());
        self.writer.media.prefetch(
            touched.map(|(child, _)| child.pointer),
            self.kind,
            level - 1,
        );
        if level == 1 {
            self.over_leaves(&node, &parts)
        } else {
            self.over_interiors(&node, &parts, level)
        }
    }

    fn over_leaves(
        &mut self,
        node: &Interior,
        parts: &[&[Change]],
    ) -> Result<Vec<Child>, StoreError> {
        let mut leaves = Leaves::default();
        for (child, part) in node.children().zip(parts) {
            let absorb = !leaves.entries.is_empty() && leaves.bytes < FEW_BYTES;
            if part.is_empty() && !absorb {
                self.end_run(&mut leaves)?;
                leaves.done.push(child);
            } else {
                self.leaf(Some(child.pointer), part, &mut leaves)?;
            }
        }
        self.finish_leaves(leaves)
    }

    fn over_interiors(
        &mut self,
        node: &Interior,
        parts: &[&[Change]],
        level: u8,
    ) -> Result<Vec<Child>, StoreError> {
        let mut done = Vec::new();
        let mut run: Vec<Child> = Vec::new();
        for (child, part) in node.children().zip(parts) {
            if !part.is_empty() {
                run.extend(self.interior(child.pointer, level - 1, part)?);
            } else if !run.is_empty() && run.len() < FEW_CHILDREN {
                let node = self.read(child.pointer, level - 1)?;
                self.replace(child.pointer);
                run.extend(node.children());
            } else {
                done.extend(self.pack(&std::mem::take(&mut run), level - 1)?);
                done.push(child);
            }
        }
        done.extend(self.pack(&run, level - 1)?);
        Ok(done)
    }

    /// Appends the entries of a leaf (none: of an empty tree) with its changes to the stream.
    fn leaf(
        &mut self,
        pointer: Option<Pointer>,
        changes: &[Change],
        leaves: &mut Leaves,
    ) -> Result<(), StoreError> {
        let mut changes = changes.iter().copied().peekable();
        if let Some(pointer) = pointer {
            self.replace(pointer);
            let block = self.writer.media.block(pointer, self.kind, 0)?;
            let damaged = |media: &Media, source| media.damaged(pointer, source);
            let mut reader = LeafReader::new(block).map_err(|e| damaged(self.writer.media, e))?;
            while let Some((key, value)) = reader
                .next_entry()
                .map_err(|e| damaged(self.writer.media, e))?
            {
                while let Some((new, change)) = changes.next_if(|&(new, _)| new < key) {
                    self.new_entry(new, change, leaves)?;
                }
                match changes.next_if(|&(new, _)| new == key) {
                    None => leaves.push(key, value),
                    Some((_, Some(value))) => leaves.push(key, value),
                    Some((_, None)) => self.entries = self.entries.saturating_sub(1),
                }
                self.emit_full(leaves)?;
            }
        }
        for (new, change) in changes {
            self.new_entry(new, change, leaves)?;
        }
        Ok(())
    }

    fn new_entry(
        &mut self,
        key: Key,
        change: Option<Value>,
        leaves: &mut Leaves,
    ) -> Result<(), StoreError> {
        // An entry that came and went between two checkpoints never was in the tree.
        if let Some(value) = change {
            self.entries += 1;
            leaves.push(key, value);
            self.emit_full(leaves)?;
        }
        Ok(())
    }

    /// Writes a full leaf once there is enough for two: so the last two can be made equal.
    fn emit_full(&mut self, leaves: &mut Leaves) -> Result<(), StoreError> {
        if leaves.bytes < 2 * PAYLOAD_LEN + 2 * node::MAX_LEAF_ENTRY {
            return Ok(());
        }
        let taken = self.write_leaf(leaves, usize::MAX)?;
        leaves.entries.drain(..taken);
        leaves.bytes = measure(&leaves.entries);
        Ok(())
    }

    /// Writes all of a run of changed leaves.
    fn end_run(&mut self, leaves: &mut Leaves) -> Result<(), StoreError> {
        leaves.bytes = measure(&leaves.entries);
        while !leaves.entries.is_empty() {
            let share = if leaves.bytes <= PAYLOAD_LEN {
                usize::MAX
            } else {
                leaves.bytes.div_ceil(2)
            };
            let taken = self.write_leaf(leaves, share)?;
            leaves.entries.drain(..taken);
            leaves.bytes = measure(&leaves.entries);
        }
        Ok(())
    }

    fn finish_leaves(&mut self, mut leaves: Leaves) -> Result<Vec<Child>, StoreError> {
        self.end_run(&mut leaves)?;
        Ok(leaves.done)
    }

    /// Writes a leaf of the first entries, of about `share` bytes at most, and says how many.
    fn write_leaf(&mut self, leaves: &mut Leaves, share: usize) -> Result<usize, StoreError> {
        let mut builder = LeafBuilder::default();
        let mut taken = 0;
        let mut newest = 0;
        for &(key, value) in &leaves.entries {
            if builder.used() >= share || !builder.push(key, value) {
                break;
            }
            newest = newest.max(node::seq_of(self.kind, key));
            taken += 1;
        }
        let pointer = self.writer.put(builder.finish(), self.kind, 0, 0)?;
        self.nodes += 1;
        leaves.done.push(Child {
            key: leaves.entries[0].0,
            pointer,
            newest,
        });
        Ok(taken)
    }

    /// Writes interior nodes of `level` over `children`, as few as possible and equally full.
    fn pack(&mut self, children: &[Child], level: u8) -> Result<Vec<Child>, StoreError> {
        let mut nodes = Vec::new();
        let mut rest = children;
        while !rest.is_empty() {
            let count = rest.len().div_ceil(rest.len().div_ceil(FANOUT));
            let (part, behind) = rest.split_at(count);
            let pointer = self
                .writer
                .put(node::encode_interior(part), self.kind, level, 0)?;
            self.nodes += 1;
            let newest = part.iter().map(|child| child.newest).max().unwrap_or(0);
            nodes.push(Child {
                key: part[0].key,
                pointer,
                newest,
            });
            rest = behind;
        }
        Ok(nodes)
    }
}

fn measure(entries: &[(Key, Value)]) -> usize {
    let mut last = Default::default();
    let mut bytes = 0;
    for &(key, value) in entries {
        bytes += node::entry_len(last, key, value.place);
        last = (key, value.place);
    }
    bytes
}

/// The changes that fall to each child.
fn split_changes<'c>(node: &Interior, mut changes: &'c [Change]) -> Vec<&'c [Change]> {
    let mut parts = Vec::with_capacity(node.len());
    for index in 0..node.len() {
        let end = if index + 1 < node.len() {
            let next = node.child(index + 1).key;
            changes.partition_point(|&(key, _)| key < next)
        } else {
            changes.len()
        };
        let (part, rest) = changes.split_at(end);
        parts.push(part);
        changes = rest;
    }
    parts
}
