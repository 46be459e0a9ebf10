// SPDX-License-Identifier: GPL-2.0-only
//! What copy-outs cost at least on a disk.
//!
//! A group of N must read N chunks, then write N chunks, then make them durable, in this order. So
//! its time is at least N/r + N/w + s, and N divided by that is the bound, where fio measures
//! - r, w: 16 KiB reads and writes a second with N under way all the time. That favours the bound: a
//!   group has fewer under way at its ends;
//! - s: the mean time of an fdatasync after N written chunks, in a job that writes one at a time: with
//!   more, fio lets writes run on beside the fdatasync, and the time would not be that of one alone.
//!
//! The journal record is not in the bound; it is the engine's own cost.

use std::path::Path;

use anyhow::Result;

use super::fio::{Access, Job, measure};

/// The formula in a few words, for the output.
pub const FORMULA: &str = "N / (N/r + N/w + s) for groups of N: r, w = fio's 16 KiB reads, writes a second \
                           at depth N; s = seconds of one fdatasync after N writes";

/// What fio found for one depth.
#[derive(Clone, Copy, Debug)]
pub struct Bound {
    depth: f64,
    reads: f64,
    writes: f64,
    fdatasync_seconds: f64,
}

impl Bound {
    /// Measures on the files that the engine then uses.
    pub fn measure(
        origin: &Path,
        store: &Path,
        random: bool,
        depth: u64,
        seconds: f64,
    ) -> Result<Self> {
        let job = Job {
            file: origin,
            access: Access::Read,
            random,
            depth,
            fdatasync: 0,
            seconds,
        };
        let reads = measure(&job)?;
        let write = Job {
            file: store,
            access: Access::Write,
            ..job
        };
        let writes = measure(&write)?;
        let synced = measure(&Job {
            depth: 1,
            fdatasync: depth,
            ..write
        })?;
        Ok(Bound {
            depth: depth as f64,
            reads: reads.iops,
            writes: writes.iops,
            fdatasync_seconds: synced.fdatasync_seconds,
        })
    }

    /// Copy-outs a second.
    pub fn rate(&self) -> f64 {
        let group = self.depth / self.reads + self.depth / self.writes + self.fdatasync_seconds;
        self.depth / group
    }
}

impl std::fmt::Display for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "reads {:.0}/s, writes {:.0}/s, fdatasync {:.2} ms",
            self.reads,
            self.writes,
            self.fdatasync_seconds * 1e3
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bound_is_the_time_of_its_three_parts() {
        let bound = Bound {
            depth: 32.0,
            reads: 32_000.0,
            writes: 16_000.0,
            fdatasync_seconds: 0.001,
        };
        // 1 ms of reading, 2 ms of writing, 1 ms of flushing for 32.
        assert!((bound.rate() - 8000.0).abs() < 1e-6);
    }
}
