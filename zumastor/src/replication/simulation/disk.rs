// SPDX-License-Identifier: GPL-2.0-only
//! A machine in memory: an origin with a cache that a power cut empties, snapshots, what is durable.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ddsnap::units::{Chunk, ChunkRun, ChunkShift, Sectors};
use uuid::Uuid;

use super::super::message::{Begin, FEATURES, Hello, Wishes};
use super::super::progress::Progress;
use super::super::standing::{Epoch, Held, Partial, Role, Standing};
use super::super::sums::Sums;
use super::super::volume::{Downstream, Upstream, Watch};
use super::{Random, count};

const CHUNK_BYTES: usize = 512;

type Disk = Vec<u8>;

pub(super) struct Node {
    standing: Standing,
    origin: Disk,
    /// What the origin has durably: what a power cut may go back to, chunk by chunk.
    durable: Disk,
    content: BTreeMap<Uuid, Disk>,
    /// Chunks written between a snapshot or bookmark and each later one.
    changed: BTreeMap<Uuid, Vec<bool>>,
    sums: BTreeMap<Uuid, Sums>,
    progress: Option<Progress>,
    runs: Vec<ChunkRun>,
    base: Option<Uuid>,
    snapshot: Option<Uuid>,
    pinned: Option<Uuid>,
    next_number: u32,
    resumed: u64,
    restored: u64,
    /// Snapshots that were noted as proven equal.
    proven: u32,
    /// The sums of the snapshot of which all was sent last.
    end: Option<(Uuid, Sums)>,
    /// How long it looks at its origin before it greets.
    look: Duration,
}

/// A machine that a cycle's thread and the history share.
#[derive(Clone)]
pub(super) struct Shared(Arc<Mutex<Node>>);

fn new_id(random: &mut Random) -> Uuid {
    let (high, low) = (random.next(), random.next());
    Uuid::from_u128((u128::from(high) << 64) | u128::from(low) | 1)
}

impl Node {
    pub(super) fn shared(number: u128, role: Role, chunks: usize, random: &mut Random) -> Shared {
        // The last chunk may be a short one in sectors of larger chunks; here a chunk is a sector.
        let chunk = ChunkShift::MIN;
        let volume = Uuid::from_u128(number);
        let mut origin = vec![0; chunks * CHUNK_BYTES];
        if role == Role::Replica {
            // A target is not always empty.
            origin
                .iter_mut()
                .for_each(|byte| *byte = random.next() as u8);
        }
        Shared(Arc::new(Mutex::new(Node {
            standing: Standing {
                lineage: (role == Role::Master).then_some(Uuid::from_u128(77)),
                epoch: Epoch {
                    number: u64::from(role == Role::Master),
                    owner: volume,
                    since: 0,
                },
                chunk,
                length: Sectors(chunks as u64),
                ..Standing::blank(volume, role)
            },
            durable: origin.clone(),
            origin,
            content: BTreeMap::new(),
            changed: BTreeMap::new(),
            sums: BTreeMap::new(),
            progress: None,
            runs: Vec::new(),
            base: None,
            snapshot: None,
            pinned: None,
            next_number: 0,
            resumed: 0,
            restored: 0,
            proven: 0,
            end: None,
            look: Duration::ZERO,
        })))
    }

    /// A master of another lineage.
    pub(super) fn stranger(number: u128, chunks: usize, random: &mut Random) -> Shared {
        let node = Node::shared(number, Role::Master, chunks, random);
        node.node().standing.lineage = Some(Uuid::from_u128(number));
        node
    }

    fn put(&mut self, chunk: usize, data: &[u8]) {
        let at = chunk * CHUNK_BYTES;
        self.origin[at..at + data.len()].copy_from_slice(data);
        for changed in self.changed.values_mut() {
            changed[chunk] = true;
        }
    }

    fn chunks(&self) -> usize {
        self.origin.len() / CHUNK_BYTES
    }

    fn take(&mut self, id: Uuid, length: Sectors) -> u32 {
        let number = self.next_number;
        self.next_number += 2;
        // As the engine does: first the origin is flushed.
        self.durable.clone_from(&self.origin);
        self.content.insert(id, self.origin.clone());
        let chunks = self.chunks();
        self.changed.insert(id, vec![false; chunks]);
        self.standing.held.push(Held {
            id,
            number,
            taken: u64::from(number),
            length,
            data: true,
        });
        number
    }

    fn forget(&mut self, id: Uuid) {
        self.standing.held.retain(|held| held.id != id);
        self.content.remove(&id);
        self.changed.remove(&id);
    }

    /// Chunks that may differ between `base` and `snapshot`, as runs: everything the engine recorded, and
    /// so more than what really differs.
    fn list(&self, base: Option<Uuid>, snapshot: Uuid) -> Vec<ChunkRun> {
        let all = vec![true; self.chunks()];
        let since = base.map_or(Some(&all), |base| self.changed.get(&base));
        let since = since.unwrap_or(&all);
        // What changed only after the snapshot is not listed, if the contents tell.
        let differs = |chunk: usize| {
            let (Some(base), Some(is)) = (base, self.content.get(&snapshot)) else {
                return true;
            };
            let range = chunk * CHUNK_BYTES..(chunk + 1) * CHUNK_BYTES;
            self.content
                .get(&base)
                .is_none_or(|was| was[range.clone()] != is[range])
        };
        let mut runs: Vec<ChunkRun> = Vec::new();
        for chunk in (0..self.chunks()).filter(|&c| since[c] && differs(c)) {
            match runs.last_mut() {
                Some(run) if run.first.0 + run.chunks == chunk as u64 => run.chunks += 1,
                _ => runs.push(ChunkRun {
                    first: Chunk(chunk as u64),
                    chunks: 1,
                }),
            }
        }
        runs
    }

    fn read_from(&self, id: Option<Uuid>, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        into.clear();
        let Some(id) = id else { return Ok(()) };
        let content = self.content.get(&id).context("the snapshot was given up")?;
        let start = (run.first.0 as usize * CHUNK_BYTES).min(content.len());
        let end = ((run.first.0 + run.chunks) as usize * CHUNK_BYTES).min(content.len());
        into.extend_from_slice(&content[start..end]);
        Ok(())
    }
}

impl Shared {
    /// How many snapshots this side has noted as proven equal.
    pub(super) fn proven(&self) -> u32 {
        self.node().proven
    }

    fn node(&self) -> MutexGuard<'_, Node> {
        self.0.lock().unwrap()
    }

    pub(super) fn hello(&self, wishes: Wishes, random: &mut Random) -> Hello {
        let mut nonce = [0; 16];
        nonce[..8].copy_from_slice(&random.next().to_le_bytes());
        Hello {
            nonce,
            features: FEATURES,
            standing: self.node().standing.clone(),
            wishes,
        }
    }

    pub(super) fn write_some(&self, random: &mut Random) {
        let mut node = self.node();
        let chunks = node.chunks() as u64;
        for _ in 0..1 + random.below(chunks) {
            let chunk = random.below(chunks) as usize;
            let mut data = [0; CHUNK_BYTES];
            match random.below(4) {
                0 => {}
                1 => data.fill(random.next() as u8),
                2 => data.iter_mut().for_each(|byte| *byte = random.next() as u8),
                _ => {
                    let at = chunk * CHUNK_BYTES;
                    data.copy_from_slice(&node.origin[at..at + CHUNK_BYTES]);
                    data[random.below(CHUNK_BYTES as u64) as usize] ^= 1;
                }
            }
            node.put(chunk, &data);
        }
    }

    /// Gives each chunk as many random bytes as `bytes` says, and zeros behind.
    pub(super) fn fill(&self, random: &mut Random, bytes: fn(usize) -> usize) {
        let mut node = self.node();
        for chunk in 0..node.chunks() {
            let mut data = [0; CHUNK_BYTES];
            data[..bytes(chunk)].fill_with(|| random.next() as u8);
            node.put(chunk, &data);
        }
    }

    pub(super) fn snapshot(&self, random: &mut Random) {
        let id = new_id(random);
        let mut node = self.node();
        let length = node.standing.length;
        node.take(id, length);
        node.standing.origin = Some(id);
    }

    /// A full store, or an administrator: a snapshot goes; a hold becomes a bookmark.
    pub(super) fn give_up_some(&self, random: &mut Random, bookmarks: &AtomicU64) {
        let mut node = self.node();
        let count_held = node.standing.held.len() as u64;
        if count_held < 2 {
            return;
        }
        // Never the newest: there is always something to send.
        let at = random.below(count_held - 1) as usize;
        let Held { id, data, .. } = node.standing.held[at];
        let newest_data = node.standing.newest().map(|held| held.id);
        if Some(id) == newest_data {
            return;
        }
        if [node.standing.hold, node.standing.old_hold, node.pinned].contains(&Some(id)) {
            if data {
                node.standing.held[at].data = false;
                node.content.remove(&id);
                count(bookmarks);
            }
        } else {
            node.forget(id);
        }
    }

    /// Somebody mounts the replica and writes; noticed, as foreign writes are.
    pub(super) fn write_behind_its_back(&self, random: &mut Random) {
        {
            let mut node = self.node();
            if node.standing.held.is_empty() || node.standing.partial.is_some() {
                return;
            }
            node.standing.written = true;
        }
        self.write_some(random);
    }

    /// From now on its disk is a slow one.
    pub(super) fn looks_for(&self, time: Duration) {
        self.node().look = time;
    }

    /// The sums noted of the hold are not those of its data: a bug, or a file from elsewhere.
    pub(super) fn spoil_sums(&self) {
        let node = &mut *self.node();
        if let Some(sums) = node.standing.hold.and_then(|hold| node.sums.get_mut(&hold)) {
            sums.replace(0, &[], &[9; CHUNK_BYTES]);
        }
    }

    /// A chunk of the hold is not what it was: a disk that lies.
    pub(super) fn spoil_hold(&self, chunk: usize) {
        let node = &mut *self.node();
        let content = node
            .standing
            .hold
            .and_then(|hold| node.content.get_mut(&hold));
        content.unwrap()[chunk * CHUNK_BYTES] ^= 1;
    }

    /// Writes one chunk and takes a snapshot.
    pub(super) fn change(&self, chunk: usize, random: &mut Random) {
        self.node().put(chunk, &[77; CHUNK_BYTES]);
        self.snapshot(random);
    }

    pub(super) fn has_received(&self) -> bool {
        let node = self.node();
        node.standing.hold.is_some() && node.standing.partial.is_none() && !node.standing.written
    }

    /// What the new master starts from is a snapshot at once: else the newest might be an older one.
    pub(super) fn fail_over(&self, random: &mut Random) {
        self.snapshot(random);
        let mut node = self.node();
        let number = node.standing.epoch.number + 1;
        let owner = node.standing.volume;
        node.standing.role = Role::Master;
        node.standing.epoch = Epoch {
            number,
            owner,
            since: number,
        };
    }

    pub(super) fn fail_back(&self, reign: Epoch, random: &mut Random) {
        self.write_some(random);
        self.snapshot(random);
        let mut node = self.node();
        node.standing.role = Role::Replica;
        node.standing.epoch = reign;
    }

    /// Loses some of what was not flushed.
    pub(super) fn power_cut(&self, random: &mut Random) {
        let node = &mut *self.node();
        for chunk in 0..node.chunks() {
            let range = chunk * CHUNK_BYTES..(chunk + 1) * CHUNK_BYTES;
            if random.one_in(2) {
                node.origin[range.clone()].copy_from_slice(&node.durable[range]);
            }
        }
        node.durable.clone_from(&node.origin);
        // The sender's note need not be durable.
        if node.standing.role == Role::Master && random.one_in(2) {
            node.progress = None;
        }
    }

    /// Whatever snapshot both have is the same byte by byte.
    pub(super) fn compare_with(&self, up: &Shared, seed: u64) {
        let (down, up) = (self.node(), up.node());
        for (id, content) in &down.content {
            if let Some(original) = up.content.get(id) {
                assert!(content == original, "seed {seed}: snapshot {id} differs");
            }
        }
        let hold = down.standing.hold;
        if let Some(hold) = hold.filter(|hold| down.standing.origin == Some(*hold)) {
            let found = down.standing.has_data(hold);
            assert!(found, "seed {seed}: the replica gave up its hold");
        }
    }

    /// Whether the two have nothing in common though the replica has something: only a full copy helps.
    pub(super) fn lost_all_common(&self, up: &Shared) -> bool {
        let (down, up) = (self.node(), up.node());
        !up.standing
            .held
            .iter()
            .any(|held| down.standing.has_data(held.id))
    }

    pub(super) fn newest(&self) -> Uuid {
        self.node().standing.newest().unwrap().id
    }

    pub(super) fn has(&self, id: Uuid) -> bool {
        self.node().standing.has_data(id)
    }

    pub(super) fn origin_is(&self, id: Uuid) -> bool {
        let node = self.node();
        node.content[&id] == node.origin
    }

    pub(super) fn reign(&self) -> Epoch {
        self.node().standing.epoch
    }

    pub(super) fn resumed(&self) -> u64 {
        self.node().resumed
    }

    pub(super) fn restored(&self) -> u64 {
        self.node().restored
    }
}

impl Upstream for Shared {
    fn open(&mut self, begin: &Begin) -> Result<bool> {
        let node = &mut *self.node();
        node.runs = node.list(begin.base, begin.snapshot.id);
        node.runs.reverse();
        (node.base, node.snapshot) = (begin.base, Some(begin.snapshot.id));
        node.resumed += u64::from(begin.position > 0);
        Ok(begin.base.is_some_and(|base| node.standing.has_data(base)))
    }

    fn next_run(&mut self, _: &dyn Watch) -> Result<Option<ChunkRun>> {
        Ok(self.node().runs.pop())
    }

    fn read_base(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        let node = self.node();
        node.read_from(node.base, run, into)
    }

    fn read(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        let node = self.node();
        node.read_from(node.snapshot, run, into)
    }

    fn sums(&mut self, snapshot: Uuid) -> Result<Option<Sums>> {
        Ok(self.node().sums.get(&snapshot).cloned())
    }

    fn progress(&mut self) -> Result<Option<Progress>> {
        Ok(self.node().progress.clone())
    }

    fn save_progress(&mut self, progress: &Progress) -> Result<()> {
        self.node().progress = Some(progress.clone());
        Ok(())
    }

    fn note_end(&mut self, snapshot: Uuid, sums: Option<&Sums>) -> Result<()> {
        self.node().end = sums.map(|sums| (snapshot, sums.clone()));
        Ok(())
    }

    fn pin(&mut self, snapshot: Uuid) -> Result<()> {
        self.node().pinned = Some(snapshot);
        Ok(())
    }

    fn move_hold(&mut self, snapshot: Uuid, sums: Option<&Sums>, proven: bool) -> Result<()> {
        let node = &mut *self.node();
        node.proven += u32::from(proven);
        if node.standing.find(snapshot).is_none() {
            bail!("the snapshot was given up");
        }
        let noted = node.end.as_ref().filter(|(sent, _)| *sent == snapshot);
        if let Some(sums) = sums.or(noted.map(|(_, sums)| sums)).cloned() {
            node.sums.insert(snapshot, sums);
        }
        node.standing.old_hold = None;
        node.standing.hold = Some(snapshot);
        node.pinned = node.pinned.filter(|pinned| *pinned != snapshot);
        Ok(())
    }

    fn superseded(&mut self, _: Epoch) -> Result<()> {
        Ok(())
    }
}

impl Downstream for Shared {
    fn take_stock(&mut self, watch: &dyn Watch) -> Result<Standing> {
        let end = Instant::now() + self.node().look;
        while Instant::now() < end {
            if watch.cancelled() {
                bail!("it was cancelled");
            }
            thread::sleep(Duration::from_millis(5));
        }
        Ok(self.node().standing.clone())
    }

    fn adopt(&mut self, epoch: Epoch) -> Result<()> {
        self.node().standing.epoch = epoch;
        Ok(())
    }

    fn superseded(&mut self, _: Epoch) -> Result<()> {
        Ok(())
    }

    fn release_old(&mut self) -> Result<()> {
        let node = &mut *self.node();
        if let Some(old) = node.standing.old_hold.take() {
            if node.standing.hold != Some(old) {
                node.forget(old);
            }
        }
        Ok(())
    }

    fn safety_snapshot(&mut self) -> Result<()> {
        let node = &mut *self.node();
        let volume = node.standing.volume.as_u128();
        let id = Uuid::from_u128((volume << 96) | (u128::from(node.next_number) << 64) | 1);
        let length = node.standing.length;
        node.take(id, length);
        Ok(())
    }

    fn unsettle(&mut self) -> Result<()> {
        let node = &mut *self.node();
        node.standing.origin = None;
        node.standing.partial = None;
        node.standing.written = false;
        Ok(())
    }

    fn restore(&mut self, base: Uuid, _: &dyn Watch) -> Result<()> {
        let node = &mut *self.node();
        let content = node.content.get(&base).context("no base")?.clone();
        for (chunk, data) in content.chunks(CHUNK_BYTES).enumerate() {
            node.put(chunk, data);
        }
        node.durable.clone_from(&node.origin);
        node.restored += 1;
        Ok(())
    }

    fn start_partial(&mut self, partial: Partial, lineage: Uuid, epoch: Epoch) -> Result<()> {
        let node = &mut *self.node();
        node.standing.partial = Some(partial);
        node.standing.origin = None;
        node.standing.lineage = Some(lineage);
        node.standing.epoch = epoch;
        node.standing.written = false;
        node.progress = None;
        Ok(())
    }

    fn open(&mut self, begin: &Begin, _: ChunkShift) -> Result<()> {
        let node = &mut *self.node();
        node.base = begin.base;
        node.resumed += u64::from(begin.position > 0);
        Ok(())
    }

    fn read_base(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        let node = self.node();
        node.read_from(node.base, run, into)
    }

    fn write(&mut self, run: ChunkRun, data: &[u8]) -> Result<()> {
        let node = &mut *self.node();
        for (i, part) in data.chunks(CHUNK_BYTES).enumerate() {
            node.put(run.first.0 as usize + i, part);
        }
        Ok(())
    }

    fn write_zeros(&mut self, run: ChunkRun, bytes: u64) -> Result<()> {
        Downstream::write(self, run, &vec![0; bytes as usize])
    }

    fn flush(&mut self) -> Result<()> {
        let node = &mut *self.node();
        node.durable.clone_from(&node.origin);
        Ok(())
    }

    fn sums(&mut self, snapshot: Uuid) -> Result<Option<Sums>> {
        Ok(self.node().sums.get(&snapshot).cloned())
    }

    fn progress(&mut self) -> Result<Option<Progress>> {
        Ok(self.node().progress.clone())
    }

    fn save_progress(&mut self, progress: &Progress) -> Result<()> {
        let node = &mut *self.node();
        if let Some(partial) = &mut node.standing.partial {
            partial.position = progress.position;
        }
        node.progress = Some(progress.clone());
        Ok(())
    }

    fn finish(&mut self, begin: &Begin, sums: Option<&Sums>, proven: bool) -> Result<u32> {
        let node = &mut *self.node();
        node.proven += u32::from(proven);
        let id = begin.snapshot.id;
        let number = match node.standing.find(id) {
            Some(held) => held.number,
            None => node.take(id, begin.snapshot.length),
        };
        if let Some(sums) = sums {
            node.sums.insert(id, sums.clone());
        }
        node.standing.old_hold = begin.base.or(node.standing.hold).filter(|old| *old != id);
        node.standing.hold = Some(id);
        node.standing.origin = Some(id);
        node.standing.partial = None;
        node.progress = None;
        Ok(number)
    }
}
