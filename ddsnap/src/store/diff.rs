// SPDX-License-Identifier: GPL-2.0-only
//! Which chunks differ between two snapshots, or changed since a bookmark.
//!
//! A chunk differs when the two do not share its exception or overlay: it has an exception of a
//! sequence s with a <= s < b, a being the older and b the younger, or an overlay of either. Such an
//! exception exists exactly if the least one >= a, which a reads, is not the one that b reads. And if
//! the snapshots differ in length, what only the second has differs too, with the chunk in which the first
//! ends.
//!
//! For a bookmark the index has the same keys, some of them marks without data: so it can stand in for the first.
//!
//! The exceptions in question cannot change while both snapshots live: new ones belong to the newest
//! snapshot, and the first one >= a is never swept. So the list may be made in steps while the store
//! goes on. Overlays made meanwhile, by writing to one of the two, may or may not be in it.

use std::collections::VecDeque;

use super::Store;
use super::api::OpError;
use super::error::StoreError;
use super::index::Index;
use super::index::changed::{self, Wanted};
use super::media::Media;
use crate::format::block::Kind;
use crate::format::node::Key;
use crate::format::snaptable::{Snapshot, State};
use crate::units::{Chunk, ChunkRun, ChunkShift, SnapSeq, SnapTag};

/// Nodes of an index looked at in a step: some 10,000 entries, and a few milliseconds on a slow disk.
const STEP_NODES: usize = 32;

/// How far the list of chunks that differ between two snapshots is.
#[derive(Debug, Default)]
pub struct Changes {
    /// The snapshots, which must stay live or become bookmarks.
    snapshots: Vec<(SnapTag, SnapSeq)>,
    sources: Vec<Entries>,
    /// Chunks that differ because only the second snapshot has them, or all of them, behind all others.
    tail: Option<ChunkRun>,
    /// Chunks below this one need not be looked at again.
    listed: u64,
    /// Chunks of the second snapshot that the first has as long.
    common: u64,
}

/// Entries of one index that make chunks differ.
#[derive(Debug)]
struct Entries {
    kind: Kind,
    wanted: Wanted,
    /// Where to look on; none when all was looked at.
    next: Option<Key>,
    /// Chunks found and not listed yet.
    found: VecDeque<u64>,
}

impl Entries {
    fn exceptions(from: SnapSeq, to: SnapSeq, chunks: u64) -> Self {
        let wanted = Wanted {
            first_seq: from.0,
            end_seq: to.0,
            end: (chunks, 0),
        };
        Entries {
            kind: Kind::Exceptions,
            wanted,
            next: Some((0, 0)),
            found: VecDeque::new(),
        }
    }

    fn overlays(seq: SnapSeq, chunks: u64) -> Self {
        let wanted = Wanted {
            first_seq: seq.0,
            end_seq: seq.0.saturating_add(1),
            end: (seq.0, chunks),
        };
        Entries {
            kind: Kind::Overlays,
            wanted,
            next: Some((seq.0, 0)),
            found: VecDeque::new(),
        }
    }

    /// Whether more may be found than is.
    fn is_waiting(&self) -> bool {
        self.found.is_empty() && self.next.is_some()
    }

    fn look(&mut self, index: &Index, media: &mut Media) -> Result<(), StoreError> {
        let Some(from) = self.next else {
            return Ok(());
        };
        let mut keys = Vec::new();
        self.next = changed::step(index, media, &self.wanted, from, STEP_NODES, &mut keys)?;
        let kind = self.kind;
        self.found
            .extend(keys.iter().map(|&key| chunk_in(kind, key)));
        Ok(())
    }
}

impl Store {
    /// Begins the list of chunks that differ between `from` and `to`, whichever is older; if there is
    /// no `from`, of all chunks of `to`.
    ///
    /// `from` may be a bookmark. The caller keeps both from being deleted until the list is at its end.
    ///
    /// # Errors
    /// There is no such snapshot, or it is squashed, or `to` is a bookmark, or `from` is doubtful.
    pub fn changes(&self, from: Option<SnapTag>, to: SnapTag) -> Result<Changes, OpError> {
        let to = self.of_tag(to, State::Live)?;
        let from = from.map(|tag| self.comparable(tag)).transpose()?;
        // Who has what a doubtful one showed before would be left without what was written behind its back.
        if let Some(from) = from.filter(|from| from.doubtful) {
            return Err(OpError::Doubtful(from.tag));
        }
        let mut changes = Changes {
            snapshots: vec![(to.tag, to.seq)],
            sources: Vec::new(),
            tail: None,
            listed: 0,
            common: from.map_or(0, |from| common(&from, &to, self.superblock.chunk)),
        };
        let common = changes.common;
        if let Some(from) = from.filter(|from| from.seq != to.seq) {
            changes.snapshots.push((from.tag, from.seq));
            let (old, new) = (from.seq.min(to.seq), from.seq.max(to.seq));
            changes.sources = vec![
                Entries::exceptions(old, new, common),
                Entries::overlays(old, common),
                Entries::overlays(new, common),
            ];
        }
        let end = to.length.to_chunks(self.superblock.chunk);
        changes.tail = (common < end).then(|| ChunkRun {
            first: Chunk(common),
            chunks: end - common,
        });
        Ok(changes)
    }

    /// Does a bounded part of the work: appends to `runs`, up to `most` in it, the next chunks that
    /// differ, in growing order. True if there is more to do, even if nothing was appended.
    ///
    /// # Errors
    /// The index cannot be read. Inner: a snapshot is gone or squashed by now.
    pub fn changes_step(
        &mut self,
        changes: &mut Changes,
        runs: &mut Vec<ChunkRun>,
        most: usize,
    ) -> Result<Result<bool, OpError>, StoreError> {
        for &(tag, seq) in &changes.snapshots {
            match self.comparable(tag) {
                Ok(snapshot) if snapshot.seq == seq => {}
                Ok(_) => return Ok(Err(OpError::NoSuchSnapshot(tag))),
                Err(refused) => return Ok(Err(refused)),
            }
        }
        for source in changes.sources.iter_mut().filter(|s| s.is_waiting()) {
            let index = match source.kind {
                Kind::Overlays => &self.state.overlays,
                _ => &self.state.exceptions,
            };
            source.look(index, &mut self.media)?;
        }
        Ok(Ok(changes.list(runs, most)))
    }

    /// A live snapshot or a bookmark.
    fn comparable(&self, tag: SnapTag) -> Result<Snapshot, OpError> {
        match self.of_tag(tag, State::Live) {
            Err(OpError::Bookmark(_)) => self.of_tag(tag, State::Bookmark),
            live => live,
        }
    }
}

/// How many chunks of `to`, from the first on, `from` has as long as it does. Only of its last chunk it may
/// have less.
fn common(from: &Snapshot, to: &Snapshot, chunk: ChunkShift) -> u64 {
    match from.length < to.length {
        true => from.length.to_whole_chunks(chunk),
        false => to.length.to_chunks(chunk),
    }
}

impl Changes {
    /// Chunks looked at, of how many.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        let places = self.sources.iter().map(|source| match source.next {
            Some(key) => chunk_in(source.kind, key).min(self.common),
            None => self.common,
        });
        (places.min().unwrap_or(self.common), self.common)
    }

    /// Lists what was found, as far as its order is known. True if there is more to do.
    fn list(&mut self, runs: &mut Vec<ChunkRun>, most: usize) -> bool {
        while !self.sources.iter().any(Entries::is_waiting) {
            let fronts = self.sources.iter().filter_map(|s| s.found.front());
            let Some(&chunk) = fronts.min() else {
                let Some(tail) = self.tail else {
                    return false;
                };
                if !append(runs, tail, most) {
                    return true;
                }
                self.tail = None;
                continue;
            };
            // A chunk has many exceptions, and may have overlays too.
            if chunk >= self.listed {
                let run = ChunkRun {
                    first: Chunk(chunk),
                    chunks: 1,
                };
                if !append(runs, run, most) {
                    return true;
                }
                self.listed = chunk + 1;
            }
            for source in &mut self.sources {
                if source.found.front() == Some(&chunk) {
                    source.found.pop_front();
                }
            }
        }
        true
    }
}

fn chunk_in(kind: Kind, key: Key) -> u64 {
    match kind {
        Kind::Overlays => key.1,
        _ => key.0,
    }
}

/// Appends a run that lies behind the last; false if there is no room.
fn append(runs: &mut Vec<ChunkRun>, run: ChunkRun, most: usize) -> bool {
    if let Some(last) = runs.last_mut() {
        if last.first.0 + last.chunks == run.first.0 {
            last.chunks += run.chunks;
            return true;
        }
    }
    let room = runs.len() < most;
    if room {
        runs.push(run);
    }
    room
}
