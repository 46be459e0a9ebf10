// SPDX-License-Identifier: GPL-2.0-only
//! A store with millions of exceptions at random places: what its metadata takes and how it opens.
//!
//! The exceptions are made by commit groups like any others, with journal and checkpoints; only the
//! data goes nowhere ([`Null`]) and has 512 bytes a chunk, because none of it is measured. Flushes of
//! the metadata do nothing while building ([`Unflushed`]), but work where something is timed.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use ddsnap::device::BlockDevice;
use ddsnap::device::uring::Access;
use ddsnap::format::label::Label;
use ddsnap::store::{Devices, Location, OpenOptions, Store};
use ddsnap::units::{Chunk, ChunkShift, META_BLOCK_BYTES, SnapTag};

use crate::counted::{Counted, Counter};
use crate::null::{Flushing, Null, Unflushed};
use crate::random::Permutation;
use crate::volume;

/// Origin chunks for each exception: a volume of which a seventh has changed.
const SPREAD: u64 = 7;
/// Copy-outs in a group while building.
const GROUP: u64 = 1024;
/// The depths at which the bytes written are counted.
const DEPTHS: [u64; 2] = [1, 32];
/// Checkpoints before the counting begins, and while it lasts.
const CYCLES: usize = 3;
const TAG: u32 = 0;

/// Where the index lies and how large it is.
#[derive(Args)]
pub struct Options {
    /// File of the metadata, there and large enough: 256 MiB and 256 bytes an exception.
    #[arg(long)]
    meta: PathBuf,
    /// Exceptions.
    #[arg(long, default_value_t = 10_000_000)]
    exceptions: u64,
    /// Bytes of memory for index nodes.
    #[arg(long, default_value_t = volume::CACHE_BYTES)]
    cache: u64,
    /// Chunks change from the first on, and not at random places.
    #[arg(long)]
    dense: bool,
    /// A bookmark in place of the snapshot: no exceptions but marks.
    #[arg(long)]
    marks: bool,
}

/// The chunks in the order in which they change.
#[derive(Clone, Copy)]
enum Order {
    Random(Permutation),
    Dense,
}

impl Order {
    fn at(&self, index: u64) -> u64 {
        match self {
            Order::Random(permutation) => permutation.at(index),
            Order::Dense => index,
        }
    }
}

impl Options {
    fn origin_chunks(&self) -> u64 {
        self.exceptions * SPREAD
    }

    /// The chunks in the order in which they change.
    fn order(&self) -> Order {
        match self.dense {
            true => Order::Dense,
            false => Order::Random(Permutation::new(self.origin_chunks(), 3)),
        }
    }

    fn devices(&self, meta: Box<dyn BlockDevice>) -> Devices {
        let bytes = ChunkShift::MIN.bytes();
        // By it the store knows its data device.
        let label = Label {
            uuid: volume::UUID,
            chunk: ChunkShift::MIN,
        };
        let len_bytes = self.origin_chunks() * bytes;
        Devices {
            origin: Box::new(Null::new(len_bytes, &[])),
            data: Box::new(Null::new(len_bytes, &label.encode())),
            meta: Some(meta),
        }
    }

    fn open(&self) -> Result<(Store, ddsnap::store::Opened)> {
        let meta = volume::device(&self.meta, Access::ReadWrite)?;
        let options = OpenOptions {
            cache_bytes: self.cache,
        };
        Ok(Store::open(self.devices(Box::new(meta)), &options)?)
    }
}

/// Builds the index, counts what copy-outs write, and ends with a full journal, as if killed.
pub fn build(options: &Options) -> Result<()> {
    let (counter, flushing) = (Counter::default(), Flushing::default());
    let meta = volume::device(&options.meta, Access::ReadWrite)?;
    let meta = Unflushed::new(Counted::new(meta, &counter, true), &flushing);
    let mut devices = options.devices(Box::new(meta));
    volume::initialize(&mut devices, ChunkShift::MIN)?;
    let mut store = volume::open(devices)?;
    match options.marks {
        true => volume::create_bookmark(&mut store, TAG)?,
        false => volume::create(&mut store, TAG)?,
    }
    let mut writer = Writer {
        store,
        order: options.order(),
        next: 0,
        groups: Vec::new(),
        counter,
    };
    let started = Instant::now();
    while writer.next < options.exceptions {
        writer.group(GROUP.min(options.exceptions - writer.next))?;
    }
    println!("build_seconds {:.3}", started.elapsed().as_secs_f64());
    flushing.set(true);
    let mut cycle = 0;
    for depth in DEPTHS {
        // A checkpoint writes what was changed before the last: the first ones are of another depth.
        for _ in 0..CYCLES {
            writer.until_checkpoint(depth)?;
        }
        writer.groups.clear();
        for _ in 0..CYCLES {
            let before = writer.groups.len();
            writer.until_checkpoint(depth)?;
            cycle = writer.groups.len() - before;
        }
        print_groups(&mut writer.groups, depth);
    }
    // As many groups again, but for the ones that would end a checkpoint.
    let depth = DEPTHS[DEPTHS.len() - 1];
    for _ in 0..cycle.saturating_sub(2) {
        writer.group(depth)?;
    }
    println!("exceptions {}", writer.next);
    drop(writer);
    // So that nothing is on its way to the disk when the opening is timed.
    volume::device(&options.meta, Access::ReadWrite)?.flush()?;
    Ok(())
}

/// One commit group.
#[derive(Clone, Copy, Debug)]
struct Group {
    time: Duration,
    written_bytes: u64,
}

fn print_groups(groups: &mut [Group], depth: u64) {
    let copyouts = groups.len() as f64 * depth as f64;
    let written: u64 = groups.iter().map(|group| group.written_bytes).sum();
    groups.sort_by_key(|group| group.written_bytes);
    let middle = groups[groups.len() / 2].written_bytes;
    let longest = groups
        .iter()
        .map(|group| group.time)
        .max()
        .unwrap_or_default();
    for (name, value) in [
        ("beyond_bytes", written as f64 / copyouts),
        ("group_bytes", middle as f64),
        ("copyouts_per_checkpoint", copyouts / CYCLES as f64),
        ("longest_ms", millis(longest)),
    ] {
        println!("qd{depth}/{name} {value:.3}");
    }
}

struct Writer {
    store: Store,
    order: Order,
    next: u64,
    groups: Vec<Group>,
    counter: Counter,
}

impl Writer {
    fn group(&mut self, depth: u64) -> Result<()> {
        let order = self.order;
        let chunks = self.next..self.next + depth;
        self.next = chunks.end;
        let (before, started) = (self.counter.now(), Instant::now());
        volume::copy_out(&mut self.store, chunks.map(|index| order.at(index)))?;
        self.groups.push(Group {
            time: started.elapsed(),
            written_bytes: self.counter.now().written_bytes - before.written_bytes,
        });
        Ok(())
    }

    /// Runs groups until a checkpoint has been made.
    fn until_checkpoint(&mut self, depth: u64) -> Result<()> {
        let before = self.counter.now().checkpoints;
        while self.counter.now().checkpoints == before {
            self.group(depth)?;
        }
        Ok(())
    }
}

/// Copy-outs of the first group after a crash.
const FIRST_GROUP: u64 = 32;

/// Times the opening of what `build` left, then looks up exceptions and watches the memory.
pub fn open(options: &Options) -> Result<()> {
    let before = resident_bytes()?;
    let started = Instant::now();
    let (mut store, opened) = options.open()?;
    println!("open_ms {:.3}", millis(started.elapsed()));
    println!("replayed_records {}", opened.replayed_records);
    println!("clean {}", u8::from(opened.clean));
    if !opened.clean {
        let last = options.origin_chunks() - FIRST_GROUP;
        let chunks = (last..last + FIRST_GROUP).map(|index| options.order().at(index));
        let started = Instant::now();
        volume::copy_out(&mut store, chunks)?;
        println!("first_group_ms {:.3}", millis(started.elapsed()));
    }
    let status = store.status();
    let used_blocks = status.meta_blocks - status.free_meta_blocks;
    println!("disk_bytes {}", used_blocks * META_BLOCK_BYTES);
    println!(
        "open_resident_bytes {}",
        resident_bytes()?.saturating_sub(before)
    );
    // A bookmark's chunks are nowhere to be looked up.
    if options.marks {
        store.close()?;
        return Ok(());
    }
    let order = options.order();
    let started = Instant::now();
    // One in eight: every leaf is met, as a leaf holds hundreds.
    let looked_up = options.exceptions / 8;
    for index in 0..looked_up {
        let chunk = Chunk(order.at(index * 8));
        match store.locate(SnapTag(TAG), chunk)? {
            Ok(Location::Store(_)) => {}
            other => bail!("chunk {chunk} is at {other:?}, not in the store"),
        }
    }
    let each = started.elapsed().as_secs_f64() / looked_up as f64;
    println!("lookup_us {:.3}", each * 1e6);
    println!(
        "resident_bytes {}",
        resident_bytes()?.saturating_sub(before)
    );
    store.close()?;
    Ok(())
}

/// One chunk in so many changes between the snapshots whose difference is timed.
const CHANGED_ONE_IN: u64 = 100;
/// Tags of these snapshots.
const FROM: u32 = 1;
const TO: u32 = 2;
/// Runs of chunks asked for at a time.
const RUNS: usize = 4096;

/// Changes one exception's chunk in a hundred between two new snapshots.
pub fn change(options: &Options) -> Result<()> {
    let meta = volume::device(&options.meta, Access::ReadWrite)?;
    let meta = Unflushed::new(meta, &Flushing::default());
    let mut store = volume::open(options.devices(Box::new(meta)))?;
    volume::create(&mut store, FROM)?;
    let order = options.order();
    let changed = options.exceptions / CHANGED_ONE_IN;
    let mut next = 0;
    while next < changed {
        let group = next..changed.min(next + GROUP);
        next = group.end;
        volume::copy_out(&mut store, group.map(|index| order.at(index)))?;
    }
    volume::create(&mut store, TO)?;
    store.close()?;
    volume::device(&options.meta, Access::ReadWrite)?.flush()?;
    Ok(())
}

/// Times the list of chunks that differ between these snapshots, with nothing in the cache.
pub fn changes(options: &Options) -> Result<()> {
    let (mut store, _) = options.open()?;
    let started = Instant::now();
    let mut changes = store.changes(Some(SnapTag(FROM)), SnapTag(TO))?;
    let (mut found, mut more) = (0, true);
    while more {
        let mut runs = Vec::new();
        more = store.changes_step(&mut changes, &mut runs, RUNS)??;
        found += runs.iter().map(|run| run.chunks).sum::<u64>();
    }
    println!("changes_ms {:.3}", millis(started.elapsed()));
    let expected = options.exceptions / CHANGED_ONE_IN;
    ensure!(found == expected, "{found} chunks differ, not {expected}");
    store.close()?;
    Ok(())
}

/// Copy-outs of the group between two steps.
const SWEEP_DEPTH: u64 = 32;
/// Steps for each of these groups.
const STEPS_PER_GROUP: u64 = 16;

/// Deletes the snapshot that nearly all exceptions serve while chunks go on being copied out, and times
/// each of the sweep's steps, checkpoints included, and of the groups: by turns of chunks that were not
/// copied out before, and of the volume's first ones, where the sweep has been.
pub fn sweep(options: &Options) -> Result<()> {
    let (mut store, _) = options.open()?;
    let order = options.order();
    let mut next = options.exceptions + options.exceptions / CHANGED_ONE_IN;
    let status = store.status();
    let used = status.data_chunks - status.free_chunks;
    let started = Instant::now();
    store.delete(SnapTag(TAG))??;
    println!("delete_ms {:.3}", millis(started.elapsed()));
    let (mut steps, mut longest_step) = (0, Duration::ZERO);
    let (mut longest_group, mut longest_first, mut first) = (Duration::ZERO, Duration::ZERO, 0);
    let started = Instant::now();
    let mut more = true;
    while more {
        let step = Instant::now();
        more = store.background_step(volume::STEP)?;
        longest_step = longest_step.max(step.elapsed());
        steps += 1;
        if steps % STEPS_PER_GROUP == 0 {
            let group = Instant::now();
            let chunks = (next..next + SWEEP_DEPTH).map(|index| order.at(index));
            volume::copy_out(&mut store, chunks)?;
            next += SWEEP_DEPTH;
            longest_group = longest_group.max(group.elapsed());
            let group = Instant::now();
            volume::copy_out(&mut store, first..first + SWEEP_DEPTH)?;
            first += SWEEP_DEPTH;
            longest_first = longest_first.max(group.elapsed());
        }
    }
    println!("sweep_seconds {:.3}", started.elapsed().as_secs_f64());
    println!("sweep_step_longest_ms {:.3}", millis(longest_step));
    println!("sweep_group_longest_ms {:.3}", millis(longest_group));
    println!("sweep_first_longest_ms {:.3}", millis(longest_first));
    let status = store.status();
    let left = status.data_chunks - status.free_chunks;
    println!("sweep_freed_chunks {}", used.saturating_sub(left));
    store.close()?;
    Ok(())
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Memory of this process that is in RAM.
fn resident_bytes() -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    Ok(kib
        .context("/proc/self/status has no VmRSS")?
        .parse::<u64>()?
        * 1024)
}
