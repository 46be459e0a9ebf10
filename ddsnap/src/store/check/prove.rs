// SPDX-License-Identifier: GPL-2.0-only
//! Proves the parts of a store against each other: every block and every chunk has one owner, the space map
//! says the same, the counts are right, saved data has its checksum.
//!
//! Works on a store in memory, open or recovered, and goes on behind damage. Memory: a bit for each used
//! chunk and block, in pages that exist where something is used.

use std::collections::{BTreeMap, BTreeSet};

use super::problem::{Place, Problem, Severity};
use super::walk::{Met, name_of, sentence, walk};
use crate::buffer::AlignedBuf;
use crate::format::bitmap::{BITS, Bitmap, place_of};
use crate::format::block::{Kind, Pointer};
use crate::format::node::{Key, Value};
use crate::format::superblock::{MAX_CHUNK, Superblock, TreeRoot};
use crate::store::error::StoreError;
use crate::store::index::Index;
use crate::store::media::{Media, Source};
use crate::store::metaalloc::MetaAlloc;
use crate::store::snapshot::Snapshots;
use crate::store::state::State;
use crate::units::{Chunk, MetaBlock, SnapSeq, SnapTag, StoreChunk};

/// Data read at a time, unless a chunk is longer, in bytes.
const BATCH_BYTES: u64 = 1 << 20;
/// Chunks of data read at a time.
const BATCH_CHUNKS: u64 = 256;

/// What a check tells while it runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Something is wrong.
    Problem(Problem),
    /// A repair is about to write: these snapshots are squashed by it. Comes once, after all problems.
    GivesUp(Vec<SnapTag>),
    /// So many of so many index entries have been proven.
    Progress(u64, u64),
}

/// Who is told. An error ends the check.
pub(crate) type Report<'r> = dyn FnMut(Event) -> Result<(), StoreError> + 'r;

/// What a check learned.
pub(crate) struct Proof {
    /// Blocks with an owner.
    pub blocks: MetaAlloc,
    /// Chunks with an owner.
    pub owned: Owned,
    /// Chunks that several entries lead to, or whose data is damaged: entries that lead there go.
    pub bad: BTreeSet<u64>,
    /// Whether the trees of exceptions, overlays have to be made anew.
    pub rebuild: [bool; 2],
}

/// A set of chunks.
#[derive(Default)]
pub(crate) struct Owned {
    pub maps: BTreeMap<u64, Box<Bitmap>>,
    pub count: u64,
}

impl Owned {
    /// False if it was there already.
    pub fn insert(&mut self, chunk: StoreChunk) -> bool {
        let (index, bit) = place_of(chunk);
        let map = self.maps.entry(index).or_default();
        let new = !map.get(bit);
        map.set(bit, true);
        self.count += u64::from(new);
        new
    }
}

/// An entry whose data waits to be read.
type Waiting = (Key, Value);

struct Prover<'a, 'r> {
    snapshots: &'a Snapshots,
    next_seq: u64,
    superblock: &'a Superblock,
    contains: &'a dyn Fn(StoreChunk) -> bool,
    exceptions: &'a Index,
    overlays: &'a Index,
    /// Whether data is read.
    data: bool,
    waiting: Vec<Waiting>,
    owned: Owned,
    /// Chunks with several owners: none of the entries that lead there can be trusted.
    doubles: BTreeSet<u64>,
    /// Chunks with damaged data.
    damaged: BTreeSet<u64>,
    /// The tree at hand has to be made anew.
    rebuild: bool,
    done: u64,
    report: &'a mut Report<'r>,
}

/// Proves all of a store. `superblock` is the durable one that `state` came from.
///
/// # Errors
/// Those of `report`; damage is reported.
pub(crate) fn prove(
    media: &mut Media,
    superblock: &Superblock,
    state: &mut State,
    data: bool,
    report: &mut Report<'_>,
) -> Result<Proof, StoreError> {
    let mut blocks = MetaAlloc::new(&superblock.extents);
    prove_table(media, superblock, &mut blocks, report)?;
    let space = &state.space;
    let mut prover = Prover {
        snapshots: &state.snapshots,
        next_seq: state.next_seq.0,
        superblock,
        contains: &|chunk| space.contains(chunk),
        exceptions: &state.exceptions,
        overlays: &state.overlays,
        data,
        waiting: Vec::new(),
        owned: Owned::default(),
        doubles: BTreeSet::new(),
        damaged: BTreeSet::new(),
        rebuild: false,
        done: 0,
        report,
    };
    let mut whole = [true; 2];
    let mut rebuild = [false; 2];
    for (at, index) in [&state.exceptions, &state.overlays].into_iter().enumerate() {
        prover.rebuild = false;
        whole[at] = prover.index(media, &mut blocks, index)?;
        prover.read_waiting(media)?;
        rebuild[at] = prover.rebuild || !whole[at];
    }
    prover.name_doubles(media)?;
    let Prover {
        owned,
        doubles: mut bad,
        mut damaged,
        ..
    } = prover;
    bad.append(&mut damaged);
    if !bad.is_empty() {
        rebuild = [true; 2];
    }
    let stored = prove_bitmaps(media, &mut blocks, &state.space.root, report)?;
    let all = whole == [true; 2];
    compare(media, state, &owned, &stored, all, report)?;
    if all && owned.count != state.space.used {
        let what = format!(
            "{} store chunks have owners, {} count as used",
            owned.count, state.space.used
        );
        report(mendable(media.meta_name(), Place::Store, what))?;
    }
    Ok(Proof {
        blocks,
        owned,
        bad,
        rebuild,
    })
}

pub(super) fn mendable(device: String, place: Place, what: String) -> Event {
    Event::Problem(Problem {
        device,
        place,
        what,
        severity: Severity::Mendable,
        snapshots: Vec::new(),
    })
}

/// The chain of the snapshot table on disk. What is wrong in it was reported when it was loaded.
fn prove_table(
    media: &mut Media,
    superblock: &Superblock,
    blocks: &mut MetaAlloc,
    report: &mut Report<'_>,
) -> Result<(), StoreError> {
    let table = Snapshots::load(media, superblock, &mut |_| Ok(()))?;
    for &block in table.blocks() {
        if !blocks.take(block) {
            let what =
                "a part of the snapshot table lies here, where another block lies or none may";
            report(mendable(
                media.meta_name(),
                Place::Block(block),
                what.into(),
            ))?;
        }
    }
    Ok(())
}

/// The tree of bitmaps; gives the numbers of those that are there.
fn prove_bitmaps(
    media: &mut Media,
    blocks: &mut MetaAlloc,
    root: &TreeRoot,
    report: &mut Report<'_>,
) -> Result<BTreeSet<u64>, StoreError> {
    let mut stored = BTreeSet::new();
    let mut bad = BTreeSet::new();
    walk(media, blocks, Kind::Space, root, &mut |walk, met| {
        let device = walk.media.meta_name();
        let (place, what) = match met {
            Met::Lost(from, to, place, what) => {
                let to = to.map_or("the last".to_owned(), |to| to.0.to_string());
                let what = format!("{what}; bitmaps {} to {to} cannot be found", from.0);
                (place, what)
            }
            Met::Odd(place, what) => (place, what),
            Met::Entry((index, rest), value) => {
                stored.insert(index);
                let pointer = Pointer {
                    block: MetaBlock(value.place),
                    crc: value.crc,
                };
                let problem = if rest != 0 {
                    Some("its key is none of a bitmap".to_owned())
                } else if !walk.blocks.take(pointer.block) {
                    Some("a bitmap lies here, where another block lies or none may".to_owned())
                } else {
                    let block = walk.media.block(pointer, Kind::Bitmap, 0);
                    let map = block.and_then(|block| {
                        let map = Bitmap::decode(&block, index);
                        map.map_err(|source| walk.media.damaged(pointer, source))
                    });
                    map.err().map(|error| sentence(&error))
                };
                let Some(what) = problem else { return Ok(()) };
                bad.insert(index);
                let (first, last) = (index * BITS, (index + 1) * BITS - 1);
                let what =
                    format!("{what}; it says which of store chunks {first} to {last} are used");
                (Place::Block(pointer.block), what)
            }
        };
        report(mendable(device, place, what))
    })?;
    // What cannot be read is not compared: one report is enough.
    Ok(stored.difference(&bad).copied().collect())
}

/// Compares the space map with who owns what.
fn compare(
    media: &mut Media,
    state: &mut State,
    owned: &Owned,
    stored: &BTreeSet<u64>,
    all: bool,
    report: &mut Report<'_>,
) -> Result<(), StoreError> {
    let indexes: BTreeSet<u64> = stored.iter().chain(owned.maps.keys()).copied().collect();
    let none = Bitmap::default();
    let mut orphans = 0;
    for index in indexes {
        // An error is damage that was reported where it lies.
        let Ok(marked) = state.space.bitmap(media, index).cloned() else {
            continue;
        };
        let has = owned.maps.get(&index).map_or(&none, |map| map);
        if marked == *has {
            continue;
        }
        let differs = |bit| {
            let chunk = StoreChunk(index * BITS + bit);
            match (marked.get(bit), has.get(bit)) {
                (true, false) if state.space.contains(chunk) => Some(true),
                (false, true) => Some(false),
                _ => None,
            }
        };
        let mut at = 0;
        while at < BITS {
            let first = at;
            at += 1;
            let Some(orphan) = differs(first) else {
                continue;
            };
            while at < BITS && differs(at) == Some(orphan) {
                at += 1;
            }
            let (from, to) = (index * BITS + first, index * BITS + at - 1);
            if orphan && !all {
                orphans += at - first; // most likely those that the lost entries own
                continue;
            }
            let what = match orphan {
                true => {
                    format!("store chunks {from} to {to} are marked used, but nothing owns them")
                }
                false => format!("store chunks {from} to {to} are in use, but marked free"),
            };
            let place = Place::Chunk(StoreChunk(from));
            report(mendable(media.data_name(), place, what))?;
        }
    }
    if orphans > 0 {
        let what =
            format!("{orphans} store chunks are marked used that only entries not found can own");
        report(mendable(media.meta_name(), Place::Store, what))?;
    }
    Ok(())
}

impl Prover<'_, '_> {
    /// Proves all entries of an index: those of the tree that memory does not hide, and those of memory.
    fn index(
        &mut self,
        media: &mut Media,
        blocks: &mut MetaAlloc,
        index: &Index,
    ) -> Result<bool, StoreError> {
        let kind = index.kind;
        let whole = walk(
            media,
            blocks,
            kind,
            &index.root,
            &mut |walk, met| match met {
                Met::Entry(key, value) => match index.changed(key) {
                    None => self.entry(walk.media, kind, key, value),
                    Some(_) => Ok(()),
                },
                Met::Odd(place, what) => {
                    self.rebuild = true;
                    (self.report)(mendable(walk.media.meta_name(), place, what))
                }
                Met::Lost(from, to, place, what) => {
                    self.lost(walk.media, kind, from, to, place, what)
                }
            },
        )?;
        for (key, value) in index.changes() {
            if let Some(value) = value {
                self.entry(media, kind, key, value)?;
            }
        }
        Ok(whole)
    }

    fn lost(
        &mut self,
        media: &mut Media,
        kind: Kind,
        from: Key,
        to: Option<Key>,
        place: Place,
        what: String,
    ) -> Result<(), StoreError> {
        let (live, bookmarks) = (self.snapshots.live(), self.snapshots.bookmarks());
        let (what, hurt): (String, Vec<u64>) = match kind {
            Kind::Overlays => {
                let last = to.map_or(u64::MAX, |to| to.0.saturating_sub(u64::from(to.1 == 0)));
                let what = format!("{what}; chunks that snapshots got of their own are lost");
                let keepers = live.keys().chain(bookmarks.keys()).copied();
                let mut hurt: Vec<u64> = keepers
                    .filter(|&seq| from.0 <= seq && seq <= last)
                    .collect();
                hurt.sort_unstable();
                (what, hurt)
            }
            _ => {
                let end = to.map_or("the end".to_owned(), |to| to.0.to_string());
                let what = format!(
                    "{what}; what was saved of origin chunks {} to {end} is lost",
                    from.0
                );
                let hurt = served_keepers(self.snapshots, 0, u64::MAX, Chunk(from.0));
                (what, hurt)
            }
        };
        self.loss(media.meta_name(), place, what, &hurt)
    }

    fn loss(
        &mut self,
        device: String,
        place: Place,
        what: String,
        hurt: &[u64],
    ) -> Result<(), StoreError> {
        (self.report)(Event::Problem(Problem {
            device,
            place,
            what,
            severity: Severity::Loss,
            snapshots: tags(self.snapshots, hurt),
        }))
    }

    fn entry(
        &mut self,
        media: &mut Media,
        kind: Kind,
        key: Key,
        value: Value,
    ) -> Result<(), StoreError> {
        self.done += 1;
        if self.done % 4096 == 0 {
            let all = self.superblock.exceptions.entries + self.superblock.overlays.entries;
            (self.report)(Event::Progress(self.done, all.max(self.done)))?;
        }
        if let Some(wrong) = self.wrong(kind, key, value) {
            self.rebuild = true;
            // One whose key is possible becomes a mark, and no bookmark loses it.
            let keys = wrong_key(self.snapshots, self.next_seq, kind, key).is_some();
            let hurt = match keys {
                true => self.hurt_keepers(media, kind, key),
                false => self.hurt(media, kind, key),
            };
            let what = format!("{} {wrong}", describe(kind, key, value));
            return self.loss(media.meta_name(), Place::Store, what, &hurt);
        }
        if value.is_mark() {
            let hurt = self.hurt(media, kind, key);
            if hurt.is_empty() {
                return Ok(());
            }
            let what = format!("{} has no data", describe(kind, key, value));
            return self.loss(media.meta_name(), Place::Store, what, &hurt);
        }
        let place = StoreChunk(value.place);
        if !self.owned.insert(place) {
            self.doubles.insert(place.0);
        }
        if self.data && kind == Kind::Exceptions {
            self.waiting.push((key, value));
            if self.waiting.len() as u64 >= self.batch() {
                self.read_waiting(media)?;
            }
        }
        Ok(())
    }

    /// Why an entry cannot be used.
    fn wrong(&self, kind: Kind, key: Key, value: Value) -> Option<&'static str> {
        let contained = (self.contains)(StoreChunk(value.place));
        unusable(self.snapshots, self.next_seq, contained, kind, key, value)
    }

    /// Live snapshots that an entry serves, as far as is known.
    fn hurt(&self, media: &mut Media, kind: Kind, (a, b): Key) -> Vec<u64> {
        let live = self.snapshots.live();
        if kind == Kind::Overlays {
            return live.contains_key(&a).then_some(a).into_iter().collect();
        }
        // Of most marks that is all there is to know.
        if served(self.snapshots, 0, b, Chunk(a)).is_empty() {
            return Vec::new();
        }
        let before = previous(media, self.exceptions, (a, b));
        served(self.snapshots, before, b, Chunk(a))
    }

    /// As [`hurt`](Self::hurt), with the bookmarks that lose the key.
    fn hurt_keepers(&self, media: &mut Media, kind: Kind, (a, b): Key) -> Vec<u64> {
        if kind == Kind::Overlays {
            return self
                .snapshots
                .is_keeper(a)
                .then_some(a)
                .into_iter()
                .collect();
        }
        let before = previous(media, self.exceptions, (a, b));
        served_keepers(self.snapshots, before, b, Chunk(a))
    }

    fn batch(&self) -> u64 {
        (BATCH_BYTES / self.superblock.chunk.bytes()).clamp(1, BATCH_CHUNKS)
    }

    /// Reads the data of entries and compares it with their checksums.
    fn read_waiting(&mut self, media: &mut Media) -> Result<(), StoreError> {
        let waiting = std::mem::take(&mut self.waiting);
        let chunk_bytes = self.superblock.chunk.bytes() as usize;
        let mut buffer = AlignedBuf::zeroed(waiting.len() * chunk_bytes);
        let sources: Vec<_> = waiting
            .iter()
            .map(|(_, value)| Source::Store(StoreChunk(value.place)))
            .collect();
        // Of a batch that fails each chunk is read alone, to know which.
        let together = media.read_chunks(&sources, &mut buffer).is_ok();
        for ((&(key, value), source), data) in waiting
            .iter()
            .zip(&sources)
            .zip(buffer.chunks_exact_mut(chunk_bytes))
        {
            let read = match together {
                true => Ok(()),
                false => media.read_chunks(&[*source], data),
            };
            let place = StoreChunk(value.place);
            let what = match read {
                Ok(()) => {
                    let found = crc32c::crc32c(data);
                    if found == value.crc {
                        continue;
                    }
                    format!(
                        "its checksum is {found:#010x}, expected {:#010x}",
                        value.crc
                    )
                }
                Err(error) => sentence(&error),
            };
            let what = format!("it holds origin chunk {}, but {what}", key.0);
            self.damaged.insert(place.0);
            let hurt = self.hurt(media, Kind::Exceptions, key);
            self.loss(media.data_name(), Place::Chunk(place), what, &hurt)?;
        }
        Ok(())
    }

    /// Says which entries lead to chunks with several owners. The first owner is not known any more
    /// when the second is met, so this goes over everything again.
    fn name_doubles(&mut self, media: &mut Media) -> Result<(), StoreError> {
        if self.doubles.is_empty() {
            return Ok(());
        }
        for index in [self.exceptions, self.overlays] {
            let mut found = Vec::new();
            each_entry(media, self.superblock, index, &mut |_, key, value| {
                if self.doubles.contains(&value.place) {
                    found.push((key, value));
                }
                Ok(())
            })?;
            for (key, value) in found {
                let hurt = self.hurt(media, index.kind, key);
                let what = format!(
                    "it has several owners, one is {}",
                    describe(index.kind, key, value)
                );
                let place = Place::Chunk(StoreChunk(value.place));
                self.loss(media.meta_name(), place, what, &hurt)?;
            }
        }
        Ok(())
    }
}

/// Why an entry cannot be used; `contained`: its place lies in the data region. A mark has no place.
pub(crate) fn unusable(
    snapshots: &Snapshots,
    next_seq: u64,
    contained: bool,
    kind: Kind,
    key: Key,
    value: Value,
) -> Option<&'static str> {
    if !contained && value != Value::MARK {
        return Some("lies outside the data region");
    }
    if let Some(wrong) = wrong_key(snapshots, next_seq, kind, key) {
        return Some(wrong);
    }
    (kind == Kind::Overlays && value.crc != 0)
        .then_some("has a checksum, which its changing data cannot have")
}

/// Why there can be no such key.
pub(crate) fn wrong_key(
    snapshots: &Snapshots,
    next_seq: u64,
    kind: Kind,
    (a, b): Key,
) -> Option<&'static str> {
    if kind == Kind::Exceptions {
        return if b == 0 || b >= next_seq {
            Some("is of no snapshot sequence given so far")
        } else if a >= MAX_CHUNK {
            Some("is of a chunk that no origin has")
        } else {
            None
        };
    }
    let live = snapshots.live().contains_key(&a);
    match snapshots.get(SnapSeq(a)) {
        None => Some("is of a snapshot that is not there"),
        // A bookmark is cut with the origin.
        Some(snapshot) if live && !snapshots.has(snapshot, Chunk(b)) => {
            Some("is beyond the end of its snapshot")
        }
        Some(_) => None,
    }
}

fn describe(kind: Kind, (a, b): Key, value: Value) -> String {
    let place = value.place;
    match kind {
        Kind::Overlays => {
            format!("chunk {b} of the snapshot of sequence {a}, in store chunk {place},")
        }
        Kind::Exceptions => {
            format!("origin chunk {a} as saved for sequence {b}, in store chunk {place},")
        }
        _ => format!("an entry of the tree of {}", name_of(kind)),
    }
}

/// Calls `visit` with every entry that can be read, not in order.
pub(crate) fn each_entry(
    media: &mut Media,
    superblock: &Superblock,
    index: &Index,
    visit: &mut dyn FnMut(&mut Media, Key, Value) -> Result<(), StoreError>,
) -> Result<(), StoreError> {
    let mut spare = MetaAlloc::new(&superblock.extents);
    walk(
        media,
        &mut spare,
        index.kind,
        &index.root,
        &mut |walk, met| match met {
            Met::Entry(key, value) if index.changed(key).is_none() => visit(walk.media, key, value),
            _ => Ok(()),
        },
    )?;
    for (key, value) in index.changes() {
        if let Some(value) = value {
            visit(media, key, value)?;
        }
    }
    Ok(())
}

/// The sequence of the exception before this one of the same chunk, 0 if there is none or it cannot
/// be read: then more snapshots count as hurt than may be.
pub(super) fn previous(media: &mut Media, exceptions: &Index, (chunk, seq): Key) -> u64 {
    let Some(last) = seq.checked_sub(1) else {
        return 0;
    };
    let Ok(mut entries) = exceptions.entries(media, (chunk, 0), (chunk, last)) else {
        return 0;
    };
    let mut before = 0;
    loop {
        match entries.next(media) {
            Ok(Some(((_, found), _))) => before = found,
            Ok(None) => return before,
            Err(_) => return 0,
        }
    }
}

/// The tags of sequences, in their order.
pub(super) fn tags(snapshots: &Snapshots, sequences: &[u64]) -> Vec<SnapTag> {
    sequences
        .iter()
        .filter_map(|&seq| snapshots.get(SnapSeq(seq)))
        .map(|snapshot| snapshot.tag)
        .collect()
}

/// The live snapshots and bookmarks in (`before`, `upto`] that are long enough to have a chunk of the origin.
pub(super) fn served_keepers(
    snapshots: &Snapshots,
    before: u64,
    upto: u64,
    chunk: Chunk,
) -> Vec<u64> {
    let mut found = served(snapshots, before, upto, chunk);
    let bookmarks = snapshots.bookmarks().iter();
    found.extend(
        bookmarks
            .filter(|&(&seq, &chunks)| before < seq && seq <= upto && chunk.0 < chunks)
            .map(|(&seq, _)| seq),
    );
    found.sort_unstable();
    found
}

/// The live snapshots in (`before`, `upto`] that are long enough to have a chunk of the origin.
pub(super) fn served(snapshots: &Snapshots, before: u64, upto: u64, chunk: Chunk) -> Vec<u64> {
    let live = snapshots.live().iter();
    live.filter(|&(&seq, _)| before < seq && seq <= upto)
        .filter(|&(_, &chunks)| chunk.0 < chunks)
        .map(|(&seq, _)| seq)
        .collect()
}
