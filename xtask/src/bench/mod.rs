// SPDX-License-Identifier: GPL-2.0-only
//! `cargo xtask bench`: `replication`, which has a module of its own, and `engine`: how fast and how small the snapshot store's engine is.
//!
//! Speeds are given against what the same disk does in the same minute, measured by fio on the same
//! files (`bound`), because absolute numbers tell more about the disk. The engine runs as a program of
//! its own, `ddsnap/benches/engine`, which only measures; what is asked of the numbers is said here.

mod bound;
mod chart;
mod copyout;
mod figure;
mod fio;
mod index;
mod program;
mod replication;
mod snapshots;
mod table;
mod thin;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::ValueEnum;

use crate::flags::{BenchEngine, EnginePart};
use crate::{packages, paths};
use program::Program;

pub use replication::replication;

const CHART_TITLE: &str = "ddsnap engine: measured value to its bound";

/// Sizes and times of a run.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Bytes of the origin's file.
    origin_bytes: u64,
    /// Bytes of the store's file.
    store_bytes: u64,
    /// Seconds of each measurement, of fio's and of ours.
    seconds: f64,
    /// The most copy-outs of one measurement.
    most: u64,
    /// Times that bound and engine are measured in turn.
    rounds: usize,
    /// Chunks copied out before the number of snapshots is compared.
    preload: u64,
    /// Exceptions of the large index.
    exceptions: u64,
}

const FULL: Scale = Scale {
    origin_bytes: 2 << 30,
    store_bytes: 4 << 30,
    seconds: 2.5,
    most: 1 << 16,
    rounds: 3,
    preload: 1 << 16,
    exceptions: 10_000_000,
};

/// To try the program; its numbers say little.
const QUICK: Scale = Scale {
    origin_bytes: 128 << 20,
    store_bytes: 384 << 20,
    seconds: 0.3,
    most: 1 << 12,
    rounds: 1,
    preload: 1 << 13,
    exceptions: 300_000,
};

/// Measures, prints the table and writes JSON and chart.
pub fn engine(flags: &BenchEngine) -> Result<()> {
    packages::require(&["fio", "thin-provisioning-tools"])?;
    let program = Program::build("ddsnap", "engine")?;
    let parent = flags
        .dir
        .clone()
        .unwrap_or_else(|| paths::target().join("bench"));
    let files = Files::new(&parent)?;
    let scale = if flags.quick { QUICK } else { FULL };
    let mut figures = Vec::new();
    // What was measured before something failed took minutes: it is shown.
    let measured = EnginePart::value_variants()
        .iter()
        .filter(|part| flags.parts.is_empty() || flags.parts.contains(part))
        .try_for_each(|part| {
            let measure = match part {
                EnginePart::Copyouts => copyout::measure,
                EnginePart::Snapshots => snapshots::measure,
                EnginePart::Index => index::measure,
            };
            measure(&program, &files, &scale, &mut figures)
        });
    print!("{}", table::render(&figures, Some(bound::FORMULA)));
    let json = flags
        .json
        .clone()
        .unwrap_or_else(|| parent.join("engine.json"));
    write(&json, &figure::json(&figures)?)?;
    write(
        &json.with_extension("svg"),
        &chart::render(&figures, CHART_TITLE),
    )?;
    measured
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))?;
    eprintln!("written: {}", paths::shown(path));
    Ok(())
}

/// The directory of the big files; they are gone when it is dropped.
pub struct Files {
    dir: tempfile::TempDir,
}

impl Files {
    fn new(parent: &Path) -> Result<Self> {
        paths::make_dir(parent)?;
        let dir = tempfile::Builder::new()
            .prefix("files-")
            .tempdir_in(parent)
            .with_context(|| format!("cannot make a directory in {}", parent.display()))?;
        Ok(Files { dir })
    }

    /// A file of this name, there or not.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Removes a file that is needed no more.
    pub fn remove(&self, name: &str) -> Result<()> {
        let path = self.path(name);
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }
}
