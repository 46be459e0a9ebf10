// SPDX-License-Identifier: GPL-2.0-only
//! Copy-outs a second. As many requests as the queue is deep are one commit group, as in the server
//! when that many wait; the next group begins when the last is durable.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use ddsnap::buffer::AlignedBuf;
use ddsnap::device::uring::Access;
use ddsnap::device::{BlockDevice, Read, Write};
use ddsnap::store::Store;
use ddsnap::units::{Chunk, ChunkShift, SnapTag};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use crate::counted::{Counter, Counts};
use crate::random::Permutation;
use crate::volume;

/// Chunks the first snapshots need, before anything is timed, are copied in groups of at most this.
const PRELOAD_GROUP: u64 = 256;

/// Snapshots deleted and created with the time taken.
const COMMANDS: u32 = 32;

/// Which chunks follow one another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pattern {
    Random,
    Sequential,
    /// Each group is a run of neighbours at a random place.
    Runs,
}

/// One queue depth with one pattern, as `random:32`.
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pattern: Pattern,
    depth: u64,
}

impl FromStr for Load {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (pattern, depth) = text.split_once(':').context("wanted as random:32")?;
        let pattern = match pattern {
            "random" => Pattern::Random,
            "sequential" => Pattern::Sequential,
            "runs" => Pattern::Runs,
            other => bail!("no pattern {other:?}"),
        };
        let depth = depth.parse()?;
        ensure!((1..=4096).contains(&depth), "a depth is 1 to 4096");
        Ok(Load { pattern, depth })
    }
}

impl std::fmt::Display for Load {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let name = match self.pattern {
            Pattern::Random => "random",
            Pattern::Sequential => "sequential",
            Pattern::Runs => "runs",
        };
        write!(f, "{name}/qd{}", self.depth)
    }
}

impl Load {
    /// Places among `len` chunks, in a random order if the load wants one: of chunks, or of runs.
    fn order(&self, len: u64, seed: u64) -> Permutation {
        match self.pattern {
            Pattern::Random | Pattern::Sequential => Permutation::new(len, seed),
            Pattern::Runs => Permutation::new((len / self.depth).max(1), seed),
        }
    }

    /// The place of number `index` of the load.
    fn place(&self, order: &Permutation, index: u64) -> u64 {
        match self.pattern {
            Pattern::Random => order.at(index),
            Pattern::Sequential => index,
            Pattern::Runs => order.at(index / self.depth) * self.depth + index % self.depth,
        }
    }
}

/// The files and how long to run.
#[derive(Args)]
pub struct Files {
    /// The origin: a file, all of it allocated and written.
    #[arg(long)]
    origin: PathBuf,
    /// The snapshot store: another.
    #[arg(long)]
    store: PathBuf,
    /// Bytes in a chunk.
    #[arg(long, default_value_t = 16 << 10)]
    chunk: u64,
    /// The longest time for a load, in seconds.
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    /// The most copy-outs of a load.
    #[arg(long, default_value_t = 1 << 16)]
    most: u64,
}

impl Files {
    fn shift(&self) -> Result<ChunkShift> {
        ChunkShift::from_bytes(self.chunk).context("not a chunk size")
    }
}

/// Options of `copyout`.
#[derive(Args)]
pub struct Options {
    #[command(flatten)]
    files: Files,
    /// Loads, one after another.
    #[arg(long, value_delimiter = ',', required = true)]
    loads: Vec<Load>,
    /// Live snapshots.
    #[arg(long, default_value_t = 1)]
    snapshots: u32,
    /// Chunks copied out before, as many for each snapshot.
    #[arg(long, default_value_t = 0)]
    preload: u64,
    /// Bookmarks in place of snapshots: changes are noted and nothing is copied.
    #[arg(long)]
    bookmarks: bool,
}

impl Options {
    fn create(&self, store: &mut Store, tag: u32) -> Result<()> {
        match self.bookmarks {
            true => volume::create_bookmark(store, tag),
            false => volume::create(store, tag),
        }
    }
}

/// Runs all loads on a new store.
pub fn run(options: &Options) -> Result<()> {
    let files = &options.files;
    let shift = files.shift()?;
    let counter = Counter::default();
    let mut devices = volume::on_files(&files.origin, &files.store, &counter)?;
    let origin_chunks = volume::chunks(&*devices.origin, shift);
    volume::initialize(&mut devices, shift)?;
    let mut store = volume::open(devices)?;
    preload(&mut store, options, origin_chunks)?;
    // Whatever the number of snapshots left in the journal: all of it is in the tree now.
    store.close()?;
    store = volume::open(volume::on_files(&files.origin, &files.store, &counter)?)?;
    for (number, load) in (0u32..).zip(&options.loads) {
        // A new snapshot for the oldest: each chunk is needed again, and as many snapshots live.
        store
            .delete(SnapTag(number))?
            .context("cannot delete the oldest snapshot")?;
        options.create(&mut store, options.snapshots + number)?;
        // What setting up left to do is not part of the load.
        while store.background_step(4096)? {}
        counter.take();
        let measured = measure(&mut store, files, *load, origin_chunks, u64::from(number))?;
        measured.print(*load, &counter.take(), files.chunk);
    }
    let first = u32::try_from(options.loads.len())?;
    commands(&mut store, first, options)?;
    store.close()?;
    Ok(())
}

/// Times of deleting the oldest snapshot and creating one, as many as there were before.
fn commands(store: &mut Store, first: u32, options: &Options) -> Result<()> {
    let (mut deleting, mut creating) = (Vec::new(), Vec::new());
    for number in first..first + COMMANDS {
        let started = Instant::now();
        store
            .delete(SnapTag(number))?
            .context("cannot delete the oldest snapshot")?;
        deleting.push(started.elapsed());
        let started = Instant::now();
        options.create(store, options.snapshots + number)?;
        creating.push(started.elapsed());
    }
    for (name, mut times) in [("delete", deleting), ("create", creating)] {
        times.sort();
        let millis = |time: Duration| time.as_secs_f64() * 1e3;
        println!("{name}/median_ms {:.3}", millis(times[times.len() / 2]));
        println!("{name}/longest_ms {:.3}", millis(times[times.len() - 1]));
    }
    Ok(())
}

/// Gives each snapshot its share of the chunks that were copied out earlier.
fn preload(store: &mut Store, options: &Options, origin_chunks: u64) -> Result<()> {
    let share = options.preload / u64::from(options.snapshots);
    let order = Permutation::new(origin_chunks, 7);
    let mut next = 0;
    for tag in 0..options.snapshots {
        options.create(store, tag)?;
        let end = next + share;
        while next < end {
            let group = next..end.min(next + PRELOAD_GROUP);
            next = group.end;
            volume::copy_out(store, group.map(|index| order.at(index % origin_chunks)))?;
        }
    }
    Ok(())
}

#[derive(Default)]
struct Measured {
    copyouts: u64,
    groups: u64,
    elapsed: Duration,
    longest: Duration,
    /// Processor time, the kernel's for our I/O included.
    processor: Duration,
}

fn measure(
    store: &mut Store,
    files: &Files,
    load: Load,
    origin_chunks: u64,
    seed: u64,
) -> Result<Measured> {
    let order = load.order(origin_chunks, 1000 + seed);
    let most = files.most.min(origin_chunks / load.depth * load.depth);
    let limit = Duration::from_secs_f64(files.seconds);
    let mut measured = Measured::default();
    let before = processor_time()?;
    let started = Instant::now();
    let mut last = started;
    while measured.copyouts + load.depth <= most && measured.elapsed < limit {
        let group = measured.copyouts..measured.copyouts + load.depth;
        volume::copy_out(store, group.map(|index| load.place(&order, index)))?;
        measured.copyouts += load.depth;
        measured.groups += 1;
        let now = Instant::now();
        measured.longest = measured.longest.max(now - last);
        measured.elapsed = now - started;
        last = now;
    }
    measured.processor = processor_time()?.saturating_sub(before);
    Ok(measured)
}

/// Processor time of this process so far.
fn processor_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = |time: nix::sys::time::TimeVal| time.num_microseconds();
    let all = micros(usage.user_time()) + micros(usage.system_time());
    Ok(Duration::from_micros(u64::try_from(all)?))
}

impl Measured {
    fn print(&self, load: Load, counts: &Counts, chunk_bytes: u64) {
        let per_group = |time: Duration| time.as_secs_f64() * 1e6 / self.groups as f64;
        let beyond = counts.written_bytes as f64 / self.copyouts as f64 - chunk_bytes as f64;
        let own = self
            .elapsed
            .saturating_sub(counts.reading + counts.writing + counts.flushing);
        for (name, value) in [
            ("rate", self.copyouts as f64 / self.elapsed.as_secs_f64()),
            ("beyond_bytes", beyond),
            ("longest_ms", self.longest.as_secs_f64() * 1e3),
            ("checkpoints", counts.checkpoints as f64),
            ("flushes", counts.flushes as f64 / self.groups as f64),
            ("read_us", per_group(counts.reading)),
            ("write_us", per_group(counts.writing)),
            ("flush_us", per_group(counts.flushing)),
            ("own_us", per_group(own)),
            ("processor_us", per_group(self.processor)),
        ] {
            println!("{load}/{name} {value:.3}");
        }
    }
}

/// Options of `raw`.
#[derive(Args)]
pub struct RawOptions {
    #[command(flatten)]
    files: Files,
    /// Loads, one after another.
    #[arg(long, value_delimiter = ',', required = true)]
    loads: Vec<Load>,
}

/// Reads groups of chunks, writes each to the store's file and flushes, and does nothing else.
pub fn raw(options: &RawOptions) -> Result<()> {
    let files = &options.files;
    let shift = files.shift()?;
    let mut origin = volume::device(&files.origin, Access::Read)?;
    let mut data = volume::device(&files.store, Access::ReadWrite)?;
    let (from, to) = (volume::chunks(&origin, shift), volume::chunks(&data, shift));
    let limit = Duration::from_secs_f64(files.seconds);
    for load in &options.loads {
        let order = load.order(from, 5);
        let mut buffer = AlignedBuf::zeroed((load.depth * files.chunk) as usize);
        let mut measured = Measured::default();
        let started = Instant::now();
        while measured.elapsed < limit && measured.copyouts < files.most {
            let first = measured.copyouts;
            let places = (first..).map(|index| load.place(&order, index % from));
            let mut reads: Vec<_> = buffer
                .chunks_exact_mut(files.chunk as usize)
                .zip(places)
                .map(|(into, place)| Read {
                    offset: Chunk(place).to_offset(shift),
                    into,
                })
                .collect();
            origin.read(&mut reads)?;
            let writes: Vec<_> = buffer
                .chunks_exact(files.chunk as usize)
                .zip(first..)
                .map(|(from, index)| Write {
                    offset: Chunk(index % to).to_offset(shift),
                    from,
                })
                .collect();
            data.write(&writes)?;
            data.flush()?;
            measured.copyouts += load.depth;
            measured.elapsed = started.elapsed();
        }
        let rate = measured.copyouts as f64 / measured.elapsed.as_secs_f64();
        println!("{load}/rate {rate:.3}");
    }
    Ok(())
}
