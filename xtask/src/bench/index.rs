// SPDX-License-Identifier: GPL-2.0-only
//! A store with ten million exceptions: what its metadata takes on disk, in memory and in writing, and
//! how long it takes to open after a crash, and to list changes.

use anyhow::{Result, ensure};

use super::figure::{Figure, Goal};
use super::program::Program;
use super::{Files, Scale, fio, thin};
use crate::ui::Step;

/// The server's most.
const CACHE_BYTES: u64 = 128 << 20;
/// Less than the index of ten million has, to see that it is kept to.
const SMALL_BYTES: u64 = 32 << 20;
/// What the process may take besides: code, stack, lists of free blocks.
const BESIDE_CACHE_BYTES: u64 = 8 << 20;
/// More than the index of ten million has.
const ALL_BYTES: u64 = 4 << 30;
const FILE: &str = "index";

/// Builds the index once and measures on it.
pub fn measure(
    program: &Program,
    files: &Files,
    scale: &Scale,
    figures: &mut Vec<Figure>,
) -> Result<()> {
    let step = Step::start(format!("an index of {} exceptions", scale.exceptions));
    let args = |what: &str, cache: u64| {
        vec![
            what.to_owned(),
            format!("--meta={}", files.path(FILE).display()),
            format!("--exceptions={}", scale.exceptions),
            format!("--cache={cache}"),
        ]
    };
    // Room for the index, its copies on write and what a checkpoint asks for.
    let bytes = (256 << 20) + scale.exceptions * 256;
    fio::lay_out(&files.path(FILE), bytes.next_multiple_of(1 << 20))?;
    let built = program.run(&args("build", CACHE_BYTES))?;
    // The first opening finds what the crash left, the second a store that was closed.
    let crashed = program.run(&args("open", CACHE_BYTES))?;
    let bounded = program.run(&args("open", SMALL_BYTES))?;
    let whole = program.run(&args("open", ALL_BYTES))?;
    step.done(&format!("built in {:.0} s", built.get("build_seconds")?));

    let step = Step::start("a list of changes, against thin_delta");
    program.run(&args("change", CACHE_BYTES))?;
    let changes = program
        .run(&args("changes", CACHE_BYTES))?
        .get("changes_ms")?;
    let swept = program.run(&args("sweep", CACHE_BYTES))?;
    let dense = |what| {
        let mut args = args(what, CACHE_BYTES);
        args.push("--dense".to_owned());
        program.run(&args)
    };
    dense("build")?;
    dense("change")?;
    let dense = dense("sweep")?;
    let marks = |what| {
        let mut args = args(what, CACHE_BYTES);
        args.push("--marks".to_owned());
        program.run(&args)
    };
    let marks_built = marks("build")?.get("exceptions")?;
    let marks = marks("open")?;
    files.remove(FILE)?;
    for swept in [&swept, &dense] {
        ensure!(
            swept.get("sweep_freed_chunks")? > scale.exceptions as f64 / 2.0,
            "the sweep has freed next to nothing"
        );
    }
    let thin = thin::delta_ms(files, scale.exceptions)?;
    step.done(&format!("{changes:.0} ms, thin_delta {thin:.0} ms"));
    ensure!(
        crashed.get("clean")? < 1.0 && crashed.get("replayed_records")? > 0.0,
        "the store had nothing to recover"
    );
    let exceptions = built.get("exceptions")?;
    figures.extend([
        Figure::limited(
            "written/random/qd32",
            built.get("qd32/beyond_bytes")?,
            "B/copy-out",
            512.0,
        ),
        // What the request waits for; its share of later checkpoints is in the amortised figure.
        Figure::limited(
            "written/random/qd1",
            built.get("qd1/group_bytes")?,
            "B/copy-out",
            4096.0,
        ),
        Figure::new(
            "written/random/qd1/amortised",
            built.get("qd1/beyond_bytes")?,
            "B/copy-out",
            (4096.0, "a journal block"),
            Goal::None,
        ),
        Figure::limited(
            "disk/exception",
            bounded.get("disk_bytes")? / exceptions,
            "B",
            16.0,
        ),
        Figure::limited(
            "disk/mark",
            marks.get("disk_bytes")? / marks_built,
            "B",
            12.0,
        ),
        Figure::limited(
            "memory/exception",
            whole.get("resident_bytes")? / exceptions,
            "B",
            24.0,
        ),
        Figure::limited(
            "memory/cache-limit",
            bounded.get("resident_bytes")? / f64::from(1 << 20),
            "MiB",
            ((SMALL_BYTES + BESIDE_CACHE_BYTES) >> 20) as f64,
        ),
        Figure::limited("open/crashed", crashed.get("open_ms")?, "ms", 2000.0),
        Figure::limited(
            "pause/after-crash",
            crashed.get("first_group_ms")?,
            "ms",
            100.0,
        ),
        Figure::limited("pause/qd32", built.get("qd32/longest_ms")?, "ms", 100.0),
        // A snapshot that nearly all of the index serves is deleted: the longest that a request waits.
        Figure::limited(
            "pause/sweep",
            swept.get("sweep_step_longest_ms")?,
            "ms",
            100.0,
        ),
        Figure::limited(
            "pause/sweep/qd32",
            swept.get("sweep_group_longest_ms")?,
            "ms",
            100.0,
        ),
        // And of groups where the sweep has been; then the same with an index without gaps.
        Figure::limited(
            "pause/sweep/sequential/qd32",
            swept.get("sweep_first_longest_ms")?,
            "ms",
            100.0,
        ),
        Figure::limited(
            "pause/sweep/dense",
            dense.get("sweep_step_longest_ms")?,
            "ms",
            100.0,
        ),
        Figure::limited(
            "pause/sweep/dense/qd32",
            dense.get("sweep_group_longest_ms")?,
            "ms",
            100.0,
        ),
        Figure::limited(
            "pause/sweep/dense/sequential/qd32",
            dense.get("sweep_first_longest_ms")?,
            "ms",
            100.0,
        ),
        Figure::new(
            "changelist/one-in-100",
            changes,
            "ms",
            (thin, "thin_delta's"),
            Goal::AtMost(0.1),
        ),
    ]);
    Ok(())
}
