// SPDX-License-Identifier: GPL-2.0-only
//! The table of snapshots and bookmarks in memory, and which of them keep something.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use super::api::{SnapState, SnapshotInfo};
use super::error::StoreError;
use super::index::merge::Writer;
use super::media::Media;
use crate::format::block::{Kind, Pointer};
use crate::format::snaptable::{self, MAX_ENTRIES, PER_BLOCK, Snapshot, State};
use crate::format::superblock::Superblock;
use crate::units::{Chunk, ChunkShift, MetaBlock, Sectors, SnapSeq, SnapTag};

/// All snapshots: live, squashed, bookmarks, and deleted ones that wait for the sweep.
#[derive(Debug)]
pub(crate) struct Snapshots {
    /// Chunk size.
    chunk: ChunkShift,
    by_seq: BTreeMap<u64, Snapshot>,
    /// Not the deleted ones: their tags may be used again.
    by_tag: HashMap<u32, u64>,
    /// Live snapshots: sequence, and length in chunks.
    live: BTreeMap<u64, u64>,
    /// Bookmarks: sequence, and length in chunks.
    bookmarks: BTreeMap<u64, u64>,
    /// Of the live ones, and of these and the bookmarks. Every copy-out asks them.
    longest_live: Longest,
    longest_keepers: Longest,
    /// Snapshots with a connected device; lasts as long as the server.
    connected: BTreeSet<u64>,
    /// Squashed snapshots, and bookmarks that were snapshots, whose data stays: I/O of their devices may be
    /// under way into it.
    draining: BTreeSet<u64>,
    /// Blocks of the table on disk.
    blocks: Vec<MetaBlock>,
    /// Whether anything changed since the table was last written.
    pub dirty: bool,
}

/// Those of a kind that are longer than every newer one, oldest first: sequence, and length in chunks. Only the
/// newest, unless the origin has shrunk.
#[derive(Debug, Default)]
struct Longest(Vec<(u64, u64)>);

impl Longest {
    /// Of all of the kind, oldest first.
    fn of(all: impl Iterator<Item = (u64, u64)>) -> Self {
        let mut longest = Longest::default();
        all.for_each(|(seq, chunks)| longest.note(seq, chunks));
        longest
    }

    /// Takes up one that is newer than all so far.
    fn note(&mut self, seq: u64, chunks: u64) {
        while self.0.last().is_some_and(|&(_, last)| last <= chunks) {
            self.0.pop();
        }
        self.0.push((seq, chunks));
    }

    fn contains(&self, seq: SnapSeq) -> bool {
        self.0.iter().any(|&(longest, _)| longest == seq.0)
    }

    fn newest_with(&self, chunk: Chunk) -> Option<SnapSeq> {
        let long = self.0.partition_point(|&(_, chunks)| chunks > chunk.0);
        self.0[..long].last().map(|&(seq, _)| SnapSeq(seq))
    }
}

impl Snapshots {
    /// An empty table.
    pub fn new(chunk: ChunkShift) -> Self {
        Snapshots {
            chunk,
            by_seq: BTreeMap::new(),
            by_tag: HashMap::new(),
            live: BTreeMap::new(),
            bookmarks: BTreeMap::new(),
            longest_live: Longest::default(),
            longest_keepers: Longest::default(),
            connected: BTreeSet::new(),
            draining: BTreeSet::new(),
            blocks: Vec::new(),
            dirty: false,
        }
    }

    /// Whether a snapshot has this chunk, or a part of it.
    pub fn has(&self, snapshot: &Snapshot, chunk: Chunk) -> bool {
        snapshot.length.to_chunks(self.chunk) > chunk.0
    }

    pub fn insert(&mut self, snapshot: Snapshot) {
        if snapshot.state != State::Deleted {
            self.by_tag.insert(snapshot.tag.0, snapshot.seq.0);
        }
        let chunks = snapshot.length.to_chunks(self.chunk);
        match snapshot.state {
            State::Live => {
                self.live.insert(snapshot.seq.0, chunks);
                self.longest_live.note(snapshot.seq.0, chunks);
                self.longest_keepers.note(snapshot.seq.0, chunks);
            }
            State::Bookmark => {
                self.bookmarks.insert(snapshot.seq.0, chunks);
                self.longest_keepers.note(snapshot.seq.0, chunks);
            }
            State::Squashed | State::Deleted => {}
        }
        self.by_seq.insert(snapshot.seq.0, snapshot);
        self.dirty = true;
    }

    pub fn get(&self, seq: SnapSeq) -> Option<&Snapshot> {
        self.by_seq.get(&seq.0)
    }

    /// The snapshot that has this tag, unless it is deleted.
    pub fn by_tag(&self, tag: SnapTag) -> Option<&Snapshot> {
        self.by_seq.get(self.by_tag.get(&tag.0)?)
    }

    pub fn set_state(&mut self, seq: SnapSeq, state: State) {
        if let Some(snapshot) = self.by_seq.get_mut(&seq.0) {
            snapshot.state = state;
            let chunks = snapshot.length.to_chunks(self.chunk);
            self.live.remove(&seq.0);
            self.bookmarks.remove(&seq.0);
            if state == State::Bookmark {
                self.bookmarks.insert(seq.0, chunks);
            }
            let loses_data = matches!(state, State::Squashed | State::Bookmark);
            if loses_data && self.connected.contains(&seq.0) {
                self.draining.insert(seq.0);
            }
            if state == State::Deleted && self.by_tag.get(&snapshot.tag.0) == Some(&seq.0) {
                self.by_tag.remove(&snapshot.tag.0);
            }
            self.dirty = true;
        }
        self.find_longest(seq);
    }

    pub fn set_to_bookmark(&mut self, seq: SnapSeq, to_bookmark: bool) {
        if let Some(snapshot) = self.by_seq.get_mut(&seq.0) {
            snapshot.to_bookmark = to_bookmark;
            self.dirty = true;
        }
    }

    /// Whether there is a bookmark that is longer.
    pub fn has_longer_bookmark(&self, length: Sectors) -> bool {
        let mut bookmarks = self.bookmarks.keys().filter_map(|seq| self.by_seq.get(seq));
        bookmarks.any(|bookmark| bookmark.length > length)
    }

    /// No bookmark is longer from now on.
    pub fn cut_bookmarks(&mut self, length: Sectors) {
        for (seq, chunks) in &mut self.bookmarks {
            let Some(bookmark) = self.by_seq.get_mut(seq).filter(|b| b.length > length) else {
                continue;
            };
            bookmark.length = length;
            *chunks = length.to_chunks(self.chunk);
            self.dirty = true;
        }
        self.longest_keepers = Longest::of(self.keepers());
    }

    pub fn set_priority(&mut self, seq: SnapSeq, priority: i8) {
        if let Some(snapshot) = self.by_seq.get_mut(&seq.0) {
            snapshot.priority = priority;
            self.dirty = true;
        }
    }

    pub fn set_usecount(&mut self, seq: SnapSeq, usecount: u16) {
        if let Some(snapshot) = self.by_seq.get_mut(&seq.0) {
            snapshot.usecount = usecount;
            self.dirty = true;
        }
    }

    /// All up to this one are doubtful from now on; those too that are squashed or deleted.
    pub fn set_doubtful(&mut self, upto: SnapSeq) {
        for snapshot in self.by_seq.range_mut(..=upto.0).map(|(_, s)| s) {
            snapshot.doubtful = true;
            self.dirty = true;
        }
    }

    pub fn forget(&mut self, seq: SnapSeq) {
        self.by_seq.remove(&seq.0);
        self.connected.remove(&seq.0);
        self.draining.remove(&seq.0);
        self.dirty = true;
    }

    pub fn set_connected(&mut self, seq: SnapSeq, connected: bool) {
        if connected {
            self.connected.insert(seq.0);
        } else {
            self.connected.remove(&seq.0);
        }
    }

    pub fn is_connected(&self, seq: SnapSeq) -> bool {
        self.connected.contains(&seq.0)
    }

    /// After opening nobody knows what devices there are: all squashed snapshots, and bookmarks, which may have been
    /// snapshots, keep what they have.
    pub fn drain_all_squashed(&mut self) {
        let squashed = self
            .by_seq
            .values()
            .filter(|s| matches!(s.state, State::Squashed | State::Bookmark))
            .map(|s| s.seq.0);
        self.draining.extend(squashed);
    }

    /// No I/O is under way into the snapshot's data.
    pub fn set_quiet(&mut self, seq: SnapSeq) {
        self.draining.remove(&seq.0);
    }

    /// Whether the data of a squashed snapshot or bookmark stays.
    pub fn is_draining(&self, seq: SnapSeq) -> bool {
        self.draining.contains(&seq.0)
    }

    /// Squashed snapshots and bookmarks whose data stays, ascending.
    pub fn draining(&self) -> impl Iterator<Item = SnapSeq> + '_ {
        self.draining.iter().map(|&seq| SnapSeq(seq))
    }

    /// Persistent use count, a connected device, or one that may have I/O under way.
    pub fn in_use(&self, snapshot: &Snapshot) -> bool {
        snapshot.usecount > 0
            || self.is_connected(snapshot.seq)
            || self.draining.contains(&snapshot.seq.0)
    }

    /// All entries, oldest first.
    pub fn iter(&self) -> impl DoubleEndedIterator<Item = &Snapshot> {
        self.by_seq.values()
    }

    /// Entries of the table.
    pub fn len(&self) -> usize {
        self.by_seq.len()
    }

    /// Entries that are not deleted.
    pub fn visible(&self) -> usize {
        self.by_tag.len()
    }

    /// The newest live snapshot that has this chunk: the one an exception must serve.
    ///
    /// Snapshots taken when the origin was shorter have nothing to lose beyond their end.
    pub fn newest_with(&self, chunk: Chunk) -> Option<SnapSeq> {
        self.longest_live.newest_with(chunk)
    }

    /// The newest live snapshot or bookmark that has this chunk: the one that an entry is made for.
    pub fn newest_keeper_with(&self, chunk: Chunk) -> Option<SnapSeq> {
        self.longest_keepers.newest_with(chunk)
    }

    /// What this snapshot or bookmark has become may concern who is the longest.
    fn find_longest(&mut self, seq: SnapSeq) {
        if self.longest_live.contains(seq) {
            let live = self.live.iter().map(|(&seq, &chunks)| (seq, chunks));
            self.longest_live = Longest::of(live);
        }
        // One that became a bookmark is where it was.
        if self.longest_keepers.contains(seq) && !self.is_keeper(seq.0) {
            self.longest_keepers = Longest::of(self.keepers());
        }
    }

    /// Live snapshots and bookmarks, oldest first: sequence, and length in chunks.
    pub fn keepers(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let all = self.by_seq.keys();
        all.filter_map(|seq| {
            let chunks = self.live.get(seq).or_else(|| self.bookmarks.get(seq));
            chunks.map(|&chunks| (*seq, chunks))
        })
    }

    /// Whether this is a live snapshot or a bookmark.
    pub fn is_keeper(&self, seq: u64) -> bool {
        self.live.contains_key(&seq) || self.bookmarks.contains_key(&seq)
    }

    /// Bookmarks, oldest first: sequence, and length in chunks.
    pub fn bookmarks(&self) -> &BTreeMap<u64, u64> {
        &self.bookmarks
    }

    /// Whether any bookmark of a sequence in `(after, upto]` has this chunk.
    pub fn any_bookmark(&self, chunk: Chunk, after: u64, upto: u64) -> bool {
        use std::ops::Bound::{Excluded, Included};
        after < upto
            && self
                .bookmarks
                .range((Excluded(after), Included(upto)))
                .any(|(_, &chunks)| chunks > chunk.0)
    }

    /// Live snapshots, oldest first: sequence, and length in chunks.
    pub fn live(&self) -> &BTreeMap<u64, u64> {
        &self.live
    }

    /// Whether data of this sequence must stay: it is live, or its device may still be using it.
    pub fn needs_data(&self, seq: u64) -> bool {
        self.live.contains_key(&seq) || self.draining.contains(&seq)
    }

    /// Whether any snapshot of a sequence in `(after, upto]` has this chunk and needs its data.
    pub fn any_needs(&self, chunk: Chunk, after: u64, upto: u64) -> bool {
        use std::ops::Bound::{Excluded, Included};
        if after >= upto {
            return false;
        }
        let range = (Excluded(after), Included(upto));
        // The newest first: what is beyond the end of older ones was saved for it.
        let mut live = self.live.range(range).rev();
        let mut draining = self.draining.range(range);
        let has = |seq: &u64| {
            let snapshot = self.by_seq.get(seq);
            snapshot.is_some_and(|snapshot| self.has(snapshot, chunk))
        };
        live.any(|(_, &chunks)| chunks > chunk.0) || draining.any(has)
    }

    /// Blocks the table takes with `more` further entries.
    pub fn blocks_with(&self, more: usize) -> u64 {
        (self.len() + more).div_ceil(PER_BLOCK) as u64
    }

    /// Reads the table. `wrong` is told what is wrong with it; if it lets that pass, the entry or what
    /// follows the block is left out.
    pub fn load(
        media: &mut Media,
        superblock: &Superblock,
        wrong: &mut dyn FnMut(StoreError) -> Result<(), StoreError>,
    ) -> Result<Self, StoreError> {
        let mut table = Snapshots::new(superblock.chunk);
        let (mut next, count) = (superblock.snapshots, superblock.snapshot_count);
        while let Some(pointer) = next {
            if table.blocks.len() > MAX_ENTRIES {
                wrong(media.inconsistent("the snapshot table has no end"))?;
                break;
            }
            let block = media.block(pointer, Kind::Snapshots, 0);
            let decoded = block.and_then(|block| {
                let decoded = snaptable::decode(&block, superblock.lengths());
                decoded.map_err(|source| media.damaged(pointer, source))
            });
            let (snapshots, behind) = match decoded {
                Ok(decoded) => decoded,
                Err(error) => {
                    wrong(error)?;
                    break;
                }
            };
            table.blocks.push(pointer.block);
            for snapshot in snapshots {
                let last = table.by_seq.last_key_value().map_or(0, |(&seq, _)| seq);
                let problem = if snapshot.seq.0 <= last {
                    format!("snapshot sequence {} follows {last}", snapshot.seq)
                } else if snapshot.state != State::Deleted
                    && table.by_tag.contains_key(&snapshot.tag.0)
                {
                    format!("two snapshots have the tag {}", snapshot.tag)
                } else {
                    table.insert(snapshot);
                    continue;
                };
                wrong(media.inconsistent(problem))?;
            }
            next = behind;
        }
        if table.len() != count as usize {
            let problem = format!(
                "the snapshot table has {} entries, the superblock says {count}",
                table.len()
            );
            wrong(media.inconsistent(problem))?;
        }
        table.dirty = false;
        Ok(table)
    }

    /// Blocks of the table on disk.
    pub fn blocks(&self) -> &[MetaBlock] {
        &self.blocks
    }

    /// Writes the table anew: its first block, and all of them for [`set_written`](Self::set_written).
    pub fn write(
        &self,
        writer: &mut Writer<'_>,
    ) -> Result<(Option<Pointer>, Vec<MetaBlock>), StoreError> {
        writer.replaced.extend(&self.blocks);
        let all: Vec<_> = self.by_seq.values().copied().collect();
        let mut next = None;
        let mut blocks = Vec::new();
        // The last block first: each holds the place of the one behind it.
        for part in all.chunks(PER_BLOCK).rev() {
            let pointer = writer.put(snaptable::encode(part, next), Kind::Snapshots, 0, 0)?;
            blocks.push(pointer.block);
            next = Some(pointer);
        }
        Ok((next, blocks))
    }

    /// The table of the durable superblock lies in `blocks`.
    pub fn set_written(&mut self, blocks: Vec<MetaBlock>) {
        self.blocks = blocks;
    }
}

/// What the outside sees of a snapshot that is not deleted.
pub(crate) fn info(snapshot: &Snapshot) -> SnapshotInfo {
    SnapshotInfo {
        tag: snapshot.tag,
        seq: snapshot.seq,
        created: snapshot.created,
        priority: snapshot.priority,
        usecount: snapshot.usecount,
        state: match snapshot.state {
            State::Live => SnapState::Live,
            State::Bookmark => SnapState::Bookmark,
            State::Squashed | State::Deleted => SnapState::Squashed,
        },
        doubtful: snapshot.doubtful,
        to_bookmark: snapshot.to_bookmark,
        length: snapshot.length,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHIFT: ChunkShift = ChunkShift::MIN;

    fn snapshot(seq: u64, chunks: u64) -> Snapshot {
        Snapshot {
            seq: SnapSeq(seq),
            tag: SnapTag(seq as u32),
            state: State::Live,
            priority: 0,
            usecount: 0,
            created: 0,
            length: Sectors::of_chunks(chunks, SHIFT).unwrap(),
            doubtful: false,
            to_bookmark: false,
        }
    }

    /// The origin grows and shrinks while snapshots come and go: compare with looking at all of them.
    #[test]
    fn the_newest_snapshot_long_enough_is_found() {
        let mut table = Snapshots::new(SHIFT);
        let mut seed = 3_u64;
        let mut random = |below: u64| {
            seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
            (seed >> 33) % below
        };
        for seq in 1..400 {
            table.insert(snapshot(seq, 1 + random(20)));
            if random(2) == 0 {
                let state = [State::Deleted, State::Squashed, State::Bookmark][random(3) as usize];
                let of = SnapSeq(1 + random(seq));
                // A snapshot can become a bookmark, nothing else can.
                let live = table.get(of).unwrap().state == State::Live;
                if live || state != State::Bookmark {
                    table.set_state(of, state);
                }
            }
            if random(40) == 0 {
                table.cut_bookmarks(Sectors(1 + random(20)));
            }
            for chunk in 0..22 {
                let live = table.live().iter().rev();
                let mut live = live.map(|(&seq, _)| table.get(SnapSeq(seq)).unwrap());
                let found = live.find(|s| s.length.0 > chunk).map(|s| s.seq);
                assert_eq!(table.newest_with(Chunk(chunk)), found, "{seq}, {chunk}");
                let keeps = |s: &&Snapshot| matches!(s.state, State::Live | State::Bookmark);
                let mut keepers = table.iter().rev().filter(keeps);
                let found = keepers.find(|s| s.length.0 > chunk).map(|s| s.seq);
                let keeper = table.newest_keeper_with(Chunk(chunk));
                assert_eq!(keeper, found, "{seq}, {chunk}");
            }
        }
    }

    /// After the origin grew, snapshots that end before a chunk counted as its users: what was saved
    /// of it stayed until the last of these was deleted.
    #[test]
    fn a_snapshot_needs_nothing_beyond_its_end() {
        let mut table = Snapshots::new(SHIFT);
        table.insert(snapshot(1, 10));
        table.insert(snapshot(2, 20));
        table.insert(snapshot(3, 20));
        let needed = |table: &Snapshots| [9, 10, 20].map(|at| table.any_needs(Chunk(at), 0, 3));
        assert_eq!(needed(&table), [true, true, false]);
        table.set_state(SnapSeq(3), State::Deleted);
        table.set_connected(SnapSeq(2), true);
        table.set_state(SnapSeq(2), State::Squashed);
        assert_eq!(needed(&table), [true, true, false], "while it drains");
        table.set_quiet(SnapSeq(2));
        assert_eq!(needed(&table), [true, false, false]);
        assert!(!table.any_needs(Chunk(9), 1, 3), "only a later exception");
    }
}
