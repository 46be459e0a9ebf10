// SPDX-License-Identifier: GPL-2.0-only
//! The program behind `cargo xtask bench engine`: drives the real store on files and prints what it
//! measured, one `NAME VALUE` a line. It judges nothing; the bounds are measured by its caller.
//!
//! A subcommand is one measurement in one process, so that none finds another's memory or cache.

mod copyout;
mod counted;
mod index;
mod null;
mod random;
mod volume;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Measures the snapshot store's engine.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Copy-outs a second at one queue depth after another, on a new store.
    Copyout(copyout::Options),
    /// The same reads, writes and flushes without a store: what the engine could reach.
    Raw(copyout::RawOptions),
    /// Builds an index of millions of exceptions, counts what that writes, and leaves it as a crash would.
    Build(index::Options),
    /// Times the opening of what `build` left, and its memory.
    Open(index::Options),
    /// Changes a hundredth of the chunks in the index between two snapshots.
    Change(index::Options),
    /// Times the list of these.
    Changes(index::Options),
    /// Deletes the snapshot that most of the index serves, and times what happens between the sweep's steps.
    Sweep(index::Options),
}

fn main() -> ExitCode {
    // `cargo test --benches` and `cargo bench` call with arguments of their own.
    if std::env::args()
        .nth(1)
        .is_none_or(|first| first.starts_with("--bench") || first == "--test")
    {
        println!("run by `cargo xtask bench engine`");
        return ExitCode::SUCCESS;
    }
    match run(Cli::parse().what) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(what: What) -> Result<()> {
    match what {
        What::Copyout(options) => copyout::run(&options),
        What::Raw(options) => copyout::raw(&options),
        What::Build(options) => index::build(&options),
        What::Open(options) => index::open(&options),
        What::Change(options) => index::change(&options),
        What::Changes(options) => index::changes(&options),
        What::Sweep(options) => index::sweep(&options),
    }
}
