// SPDX-License-Identifier: GPL-2.0-only
//! A store with ten million exceptions: what its metadata takes on disk, in memory and in writing, and
//! how long it takes to open after a crash.

use anyhow::{Result, ensure};

use super::figure::Figure;
use super::program::Program;
use super::{Files, Scale};
use crate::ui::Step;

/// The server's most.
const CACHE_BYTES: u64 = 128 << 20;
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
    let built = program.run(&args("build", CACHE_BYTES))?;
    // The first opening finds what the crash left, the second a store that was closed.
    let crashed = program.run(&args("open", CACHE_BYTES))?;
    let whole = program.run(&args("open", ALL_BYTES))?;
    files.remove(FILE)?;
    ensure!(
        crashed.get("clean")? < 1.0 && crashed.get("replayed_records")? > 0.0,
        "the store had nothing to recover"
    );
    let exceptions = scale.exceptions as f64;
    figures.extend([
        Figure::limited(
            "written/random/qd32",
            built.get("qd32/beyond_bytes")?,
            "B/copy-out",
            512.0,
        ),
        Figure::limited(
            "written/random/qd1",
            built.get("qd1/beyond_bytes")?,
            "B/copy-out",
            4096.0,
        ),
        Figure::limited(
            "disk/exception",
            built.get("disk_bytes_per_exception")?,
            "B",
            16.0,
        ),
        Figure::limited(
            "memory/exception",
            whole.get("resident_bytes")? / exceptions,
            "B",
            24.0,
        ),
        Figure::limited(
            "memory/cache-limit",
            crashed.get("resident_bytes")? / f64::from(1 << 20),
            "MiB",
            (CACHE_BYTES >> 20) as f64,
        ),
        Figure::limited("open/crashed", crashed.get("open_ms")?, "ms", 2000.0),
    ]);
    step.done(&format!("built in {:.0} s", built.get("build_seconds")?));
    Ok(())
}
