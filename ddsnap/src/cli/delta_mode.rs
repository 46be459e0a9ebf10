// SPDX-License-Identifier: GPL-2.0-only
//! The options that say how the chunks of a delta are written, of all commands that write one.

use clap::Args;

use crate::delta::extent::{Encoder, MAX_LEVEL, Mode};

/// How chunks are written.
#[derive(Debug, Args)]
pub struct DeltaMode {
    /// Send differences to what was there, where they are shorter than the data.
    #[arg(short, long, group = "mode")]
    xdelta: bool,
    /// Send the data itself.
    #[arg(short, long, group = "mode")]
    raw: bool,
    /// Send whatever is shorter, as without option, and compress at level 9.
    #[arg(short, long, group = "mode")]
    best: bool,
    /// Compress the data with zstd: 1 (fast) to 9 (small), 0 not at all. Differences are always zstd, at
    /// level 1 at least.
    #[arg(short, long, value_name = "N", default_value_t = 0)]
    #[arg(value_parser = clap::value_parser!(u8).range(0..=i64::from(MAX_LEVEL)))]
    gzip: u8,
}

impl DeltaMode {
    /// What writes them so.
    pub fn encoder(&self) -> Encoder {
        let (mode, level) = match (self.xdelta, self.raw, self.best) {
            (true, _, _) => (Mode::Difference, self.gzip),
            (_, true, _) => (Mode::Raw, self.gzip),
            (_, _, true) => (Mode::Best, MAX_LEVEL),
            _ => (Mode::Best, self.gzip),
        };
        Encoder::new(mode, level)
    }
}
