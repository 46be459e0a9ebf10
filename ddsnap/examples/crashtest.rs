// SPDX-License-Identifier: GPL-2.0-only
//! The crash and model tests on all cores, for as long as wanted: what `cargo xtask crashtest` runs.
//!
//! The work is cut into jobs. Which shape and which seed a job has follows from the run's seed and
//! the job's number alone, so a loss can be repeated by itself, on any machine.

#[path = "../tests/harness/mod.rs"]
mod harness;

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use clap::Parser;
use ddsnap::device::memory::Rng;
use harness::crash::CrashRun;
use harness::operations::OperationsRun;
use harness::shape::{SHAPES, Shape};
use indicatif::{ProgressBar, ProgressStyle};

/// Points of a job, but for the last one.
const JOB_POINTS: u64 = 500;
/// Operations without a crash that a job does besides, for each of its points.
const OPERATIONS_PER_POINT: u64 = 3;
/// Between two lines of progress where there is no terminal.
const REPORT: Duration = Duration::from_secs(30);

/// Cuts the power at random points and does random operations.
#[derive(Parser)]
struct Flags {
    /// Power cuts to try.
    #[arg(long, default_value_t = 100_000)]
    points: u64,
    /// Seed of the run; another one each time if it is not given.
    #[arg(long)]
    seed: Option<u64>,
    /// Only this job of the run, as a loss names it.
    #[arg(long, value_name = "N")]
    job: Option<u64>,
    /// Print every step.
    #[arg(long)]
    trace: bool,
    /// Begin no further job after a loss.
    #[arg(long)]
    first: bool,
    /// Write the result as JSON.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

struct Job {
    number: u64,
    name: &'static str,
    shape: Shape,
    seed: u64,
    points: u64,
    trace: bool,
}

impl Job {
    fn of(flags: &Flags, seed: u64, number: u64) -> Self {
        let mut rng = Rng::new(seed ^ number.wrapping_mul(0xd6e8_feb8_6659_fd93));
        let total: u64 = SHAPES.iter().map(|(_, share, _)| share).sum();
        let mut at = rng.below(total);
        let chosen = SHAPES.iter().find(|(_, share, _)| {
            let here = at < *share;
            at = at.saturating_sub(*share);
            here
        });
        let &(name, _, shape) = chosen.unwrap_or(&SHAPES[0]);
        Job {
            number,
            name,
            shape,
            seed: rng.next_u64(),
            points: JOB_POINTS.min(flags.points - number * JOB_POINTS),
            trace: flags.trace,
        }
    }
}

thread_local! {
    /// What the last panic of this thread said, and where.
    static PANIC: RefCell<String> = const { RefCell::new(String::new()) };
}

/// What all workers together have done.
#[derive(Default)]
struct Done {
    points: AtomicU64,
    recovery_points: AtomicU64,
    repair_points: AtomicU64,
    operations: AtomicU64,
    losses: Mutex<Vec<String>>,
    /// By the shape's name: points, operations, time.
    shapes: Mutex<BTreeMap<&'static str, (u64, u64, Duration)>>,
}

impl Done {
    fn losses(&self) -> Vec<String> {
        let losses = self.losses.lock();
        losses.map_or_else(|poisoned| poisoned.into_inner().clone(), |all| all.clone())
    }

    fn run(&self, job: &Job) {
        let started = Instant::now();
        let mut crash = CrashRun::new(job.shape, job.seed, job.points);
        crash.trace = job.trace;
        let result = caught(|| crash.run());
        let totals = crash.totals();
        self.points.fetch_add(totals.points, Ordering::Relaxed);
        self.recovery_points
            .fetch_add(totals.recovery_points, Ordering::Relaxed);
        self.repair_points
            .fetch_add(totals.repair_points, Ordering::Relaxed);
        self.operations
            .fetch_add(totals.operations, Ordering::Relaxed);
        if let Err(problem) = result {
            self.lost(job, &crash.place(), &problem);
        }
        let mut plain = OperationsRun::new(job.shape, job.seed);
        plain.trace = job.trace;
        let result = caught(|| plain.run(job.points * OPERATIONS_PER_POINT));
        self.operations
            .fetch_add(plain.operations, Ordering::Relaxed);
        if let Err(problem) = result {
            self.lost(
                job,
                &format!("without a crash, {}", plain.place()),
                &problem,
            );
        }
        if let Ok(mut shapes) = self.shapes.lock() {
            let (points, operations, time) = shapes.entry(job.name).or_default();
            *points += totals.points;
            *operations += totals.operations + plain.operations;
            *time += started.elapsed();
        }
    }

    fn lost(&self, job: &Job, place: &str, problem: &str) {
        let Job {
            number, name, seed, ..
        } = job;
        let text = format!("job {number}, shape {name}, seed {seed}, {place}: {problem}");
        // At once: the run may take hours, and be ended before it has.
        eprintln!("LOST: {text}");
        if let Ok(mut losses) = self.losses.lock() {
            losses.push(text);
        }
    }
}

/// What `run` gives; a panic of it is an error too.
fn caught(run: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
    catch_unwind(AssertUnwindSafe(run)).unwrap_or_else(|_| Err(PANIC.take()))
}

fn main() -> anyhow::Result<ExitCode> {
    let flags = Flags::parse();
    let seed = flags.seed.unwrap_or_else(|| {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        Rng::new(now.as_nanos() as u64).next_u64() >> 32
    });
    std::panic::set_hook(Box::new(|info| PANIC.set(info.to_string())));
    let jobs = flags.points.div_ceil(JOB_POINTS);
    let wanted = match flags.job {
        Some(job) if job >= jobs => anyhow::bail!("there are only {jobs} jobs"),
        Some(job) => job..job + 1,
        None => 0..jobs,
    };
    let threads = std::thread::available_parallelism()?
        .get()
        .min((wanted.end - wanted.start) as usize);
    eprintln!(
        "{} points with seed {seed}, on {threads} cores ...",
        flags.points
    );
    let (done, next, started) = (
        Done::default(),
        AtomicU64::new(wanted.start),
        Instant::now(),
    );
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads)
            .map(|_| {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        if number >= wanted.end || flags.first && !done.losses().is_empty() {
                            return;
                        }
                        done.run(&Job::of(&flags, seed, number));
                    }
                })
            })
            .collect();
        show_progress(&flags, &done, started, || {
            workers.iter().all(|worker| worker.is_finished())
        });
    });
    report(&flags, seed, &done, started.elapsed())
}

fn show_progress(flags: &Flags, done: &Done, started: Instant, finished: impl Fn() -> bool) {
    let terminal = std::io::stderr().is_terminal();
    let bar = if terminal {
        ProgressBar::new(flags.points)
    } else {
        ProgressBar::hidden()
    };
    if let Ok(style) = ProgressStyle::with_template("{wide_bar} {pos}/{len} {per_sec} {eta} {msg}")
    {
        bar.set_style(style);
    }
    let mut last = started;
    while !finished() {
        std::thread::park_timeout(Duration::from_millis(200));
        let (points, losses) = (done.points.load(Ordering::Relaxed), done.losses().len());
        bar.set_position(points);
        bar.set_message(format!("losses={losses}"));
        if !terminal && last.elapsed() >= REPORT {
            last = Instant::now();
            let operations = done.operations.load(Ordering::Relaxed);
            eprintln!(
                "{points} points, {operations} operations, {losses} losses in {} s",
                started.elapsed().as_secs()
            );
        }
    }
    bar.finish_and_clear();
}

fn report(flags: &Flags, seed: u64, done: &Done, took: Duration) -> anyhow::Result<ExitCode> {
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let (points, operations) = (count(&done.points), count(&done.operations));
    let losses = done.losses();
    for loss in &losses {
        let job = loss.split([' ', ',']).nth(1).unwrap_or_default();
        eprintln!(
            "job {job} again: cargo xtask crashtest --points {} --seed {seed} --job {job}",
            flags.points
        );
    }
    let shapes = done.shapes.lock();
    let shapes = shapes.map_or_else(|_| BTreeMap::new(), |shapes| shapes.clone());
    for (name, (points, operations, time)) in &shapes {
        eprintln!(
            "  {name:12} {points:8} points {operations:9} operations {:7.0} points/s a core",
            *points as f64 / time.as_secs_f64()
        );
    }
    eprintln!(
        "{} of the points in a recovery, {} in a repair; {operations} operations; {:.1} s, {:.0} points/s",
        count(&done.recovery_points),
        count(&done.repair_points),
        took.as_secs_f64(),
        points as f64 / took.as_secs_f64()
    );
    if let Some(path) = &flags.json {
        let result = serde_json::json!({
            "points": points,
            "recovery_points": count(&done.recovery_points),
            "repair_points": count(&done.repair_points),
            "operations": operations,
            "losses": losses,
            "seed": seed,
            "seconds": took.as_secs_f64(),
        });
        std::fs::write(path, format!("{result:#}\n"))?;
    }
    println!("points={points} losses={} seed={seed}", losses.len());
    Ok(if losses.is_empty() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
