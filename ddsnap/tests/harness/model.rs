// SPDX-License-Identifier: GPL-2.0-only
//! What a volume and its snapshots must contain, as plain maps of chunk contents.

use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

use ddsnap::store::{Sizes, SnapState};

/// The content of a chunk.
pub type Content = Rc<[u8]>;

pub const SECTOR: usize = 512;

/// A chunk, with all contents its sectors may have after a power cut: the one it has now, and what
/// it had at and since the last flush.
#[derive(Clone, Debug)]
pub struct Chunk {
    pub now: Content,
    pub earlier: Vec<Content>,
}

impl Chunk {
    pub fn new(now: Content) -> Self {
        Chunk {
            now,
            earlier: Vec::new(),
        }
    }

    /// It is cut, or gets zeros behind it.
    fn set_len(&mut self, len: usize) {
        for content in self.earlier.iter_mut().chain([&mut self.now]) {
            if content.len() != len {
                let mut bytes = content.to_vec();
                bytes.resize(len, 0);
                *content = bytes.into();
            }
        }
    }

    /// It is given another chunk's content, as far as that is as long.
    fn give(&mut self, given: &Chunk) {
        let behind = self.now.clone();
        let longer = |content: &Content| -> Content {
            let mut bytes = content.to_vec();
            bytes.extend_from_slice(&behind[content.len()..]);
            bytes.into()
        };
        self.earlier.extend(given.earlier.iter().map(longer));
        self.write(longer(&given.now));
    }

    pub fn write(&mut self, content: Content) {
        self.earlier.push(std::mem::replace(&mut self.now, content));
    }

    /// After a cut this is what is there, as far as the chunk goes: one of the contents allowed.
    pub fn found(&mut self, bytes: &[u8]) {
        let bytes = &bytes[..self.now.len()];
        if *bytes != *self.now {
            self.now = bytes.into();
        }
    }

    /// Everything written is durable.
    pub fn settle(&mut self) {
        self.earlier.clear();
    }

    /// Whether every sector of `found`, as far as the chunk goes, is one this chunk may have.
    pub fn allows(&self, found: &[u8]) -> bool {
        let found = &found[..self.now.len()];
        found == &*self.now
            || !self.earlier.is_empty()
                && found.chunks(SECTOR).enumerate().all(|(index, sector)| {
                    let at = index * SECTOR..index * SECTOR + sector.len();
                    self.now[at.clone()] == *sector
                        || self.earlier.iter().any(|old| old[at.clone()] == *sector)
                })
    }
}

#[derive(Clone, Debug)]
pub struct Snapshot {
    pub state: SnapState,
    pub priority: i8,
    pub usecount: u16,
    /// It becomes a bookmark when it is given up.
    pub to_bookmark: bool,
    pub created: i64,
    /// A device of it is connected, which nobody remembers when the store is opened again.
    pub connected: bool,
    /// It was squashed or became a bookmark, and I/O of a device may still be under way into its chunks.
    pub draining: bool,
    /// Of a bookmark what it would show, had it kept that.
    pub chunks: Vec<Chunk>,
}

impl Snapshot {
    pub fn is_live(&self) -> bool {
        self.state == SnapState::Live
    }

    pub fn is_bookmark(&self) -> bool {
        self.state == SnapState::Bookmark
    }

    pub fn in_use(&self) -> bool {
        self.usecount > 0 || self.connected || self.draining
    }

    /// It loses its data for lack of room.
    pub fn squash(&mut self) {
        self.state = SnapState::Squashed;
        self.draining |= self.connected;
    }

    /// It keeps no data from now on.
    pub fn become_bookmark(&mut self) {
        self.state = SnapState::Bookmark;
        self.draining |= self.connected;
    }

    /// Whether the two are the same but for their contents.
    pub fn same_entry(&self, other: &Snapshot) -> bool {
        let entry = |s: &Snapshot| (s.state, s.priority, s.usecount, s.to_bookmark, s.created);
        entry(self) == entry(other)
    }
}

/// Everything that was acknowledged.
#[derive(Clone, Debug)]
pub struct Model {
    pub origin: Vec<Chunk>,
    pub snapshots: BTreeMap<u32, Snapshot>,
    /// What the store uses of its devices.
    pub sizes: Sizes,
    /// The snapshot whose content the origin is being given.
    pub reverting: Option<u32>,
    /// Chunks of the origin that others have written since that began: it keeps off them.
    pub kept: BTreeSet<u64>,
}

impl Model {
    /// An origin of zeros, as long as `sizes` says.
    pub fn new(chunk_bytes: usize, sizes: Sizes) -> Self {
        let mut model = Model {
            origin: Vec::new(),
            snapshots: BTreeMap::new(),
            sizes,
            reverting: None,
            kept: BTreeSet::new(),
        };
        model.set_origin_bytes(sizes.origin, chunk_bytes);
        model
    }

    /// The origin becomes longer by zeros, or is cut.
    pub fn set_origin_bytes(&mut self, bytes: u64, chunk_bytes: usize) {
        let (whole, short) = (bytes as usize / chunk_bytes, bytes as usize % chunk_bytes);
        let last = whole + usize::from(short > 0);
        self.origin
            .resize_with(last, || Chunk::new(Rc::from([].as_slice())));
        for (index, chunk) in self.origin.iter_mut().enumerate() {
            chunk.set_len(if index < whole { chunk_bytes } else { short });
        }
    }

    /// The origin is given a snapshot's content: each chunk may have it from now on, whichever the
    /// snapshot's may be.
    pub fn revert_to(&mut self, tag: u32) {
        let snapshot = &self.snapshots[&tag];
        let chunks = (0..).zip(self.origin.iter_mut().zip(&snapshot.chunks));
        for (_, (chunk, given)) in chunks.filter(|(index, _)| !self.kept.contains(index)) {
            chunk.give(given);
        }
    }

    pub fn create(&mut self, tag: u32, created: i64, state: SnapState) {
        // The store flushes the origin before it creates a snapshot.
        self.settle_origin();
        let chunks = self.origin.clone();
        let snapshot = Snapshot {
            state,
            priority: 0,
            usecount: 0,
            to_bookmark: false,
            created,
            connected: false,
            draining: false,
            chunks,
        };
        self.snapshots.insert(tag, snapshot);
    }

    /// The store was opened again: nobody is connected that it knows of, so that I/O may be under way
    /// into whatever was squashed.
    pub fn forget_devices(&mut self) {
        for snapshot in self.snapshots.values_mut() {
            snapshot.connected = false;
            snapshot.draining = !snapshot.is_live();
        }
    }

    /// Squashed snapshots that must keep their chunks.
    pub fn draining(&self) -> BTreeSet<u32> {
        let draining = self.snapshots.iter().filter(|(_, s)| s.draining);
        draining.map(|(&tag, _)| tag).collect()
    }

    /// The origin's writes are durable. In a revert nobody knows how far it has got, but what others
    /// wrote is theirs.
    pub fn settle_origin(&mut self) {
        let all = self.reverting.is_none();
        let chunks = (0..).zip(&mut self.origin);
        chunks
            .filter(|(index, _)| all || self.kept.contains(index))
            .for_each(|(_, chunk)| chunk.settle());
    }

    /// A revert to this snapshot has begun.
    pub fn begin_revert(&mut self, tag: u32) {
        self.kept.clear();
        self.reverting = Some(tag);
        self.revert_to(tag);
    }

    pub fn settle_store(&mut self) {
        self.snapshots
            .values_mut()
            .flat_map(|snapshot| &mut snapshot.chunks)
            .for_each(Chunk::settle);
    }
}

/// Content number `stamp`: differs from every other in each of its sectors.
pub fn content(stamp: u64, len: usize) -> Content {
    let mut bytes = vec![stamp as u8; len];
    for (index, sector) in bytes.chunks_mut(SECTOR).enumerate() {
        sector[..8].copy_from_slice(&stamp.to_le_bytes());
        sector[8..16].copy_from_slice(&(index as u64).to_le_bytes());
    }
    bytes.into()
}
