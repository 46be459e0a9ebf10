// SPDX-License-Identifier: GPL-2.0-only
//! fio, for what the disk does without us.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};
use serde_json::Value;

/// What a job does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// 16 KiB reads.
    Read,
    /// 16 KiB writes.
    Write,
}

/// A job of 16 KiB requests on a file.
#[derive(Clone, Copy, Debug)]
pub struct Job<'a> {
    /// The file.
    pub file: &'a Path,
    /// Reads or writes.
    pub access: Access,
    /// At random places, or one after the other.
    pub random: bool,
    /// Requests under way at a time.
    pub depth: u64,
    /// An fdatasync after so many writes; 0 for none.
    pub fdatasync: u64,
    /// How long, in seconds.
    pub seconds: f64,
}

/// What fio measured.
#[derive(Clone, Copy, Debug)]
pub struct Measured {
    /// Requests a second.
    pub iops: f64,
    /// Mean time of one fdatasync in seconds; 0 if there was none.
    pub fdatasync_seconds: f64,
}

/// Makes a file of this length, allocated and written once, so that no later write has to allocate
/// blocks or turn unwritten extents into written ones.
pub fn lay_out(file: &Path, bytes: u64) -> Result<()> {
    run(&[
        format!("--filename={}", file.display()),
        format!("--size={bytes}"),
        "--rw=write".into(),
        "--bs=1M".into(),
        "--iodepth=4".into(),
        "--fallocate=native".into(),
        "--refill_buffers".into(),
        "--end_fsync=1".into(),
    ])?;
    Ok(())
}

/// Runs a job.
pub fn measure(job: &Job<'_>) -> Result<Measured> {
    let rw = match (job.access, job.random) {
        (Access::Read, true) => "randread",
        (Access::Read, false) => "read",
        (Access::Write, true) => "randwrite",
        (Access::Write, false) => "write",
    };
    let bytes = std::fs::metadata(job.file)
        .with_context(|| format!("cannot look at {}", job.file.display()))?
        .len();
    let report = run(&[
        format!("--filename={}", job.file.display()),
        format!("--size={bytes}"),
        format!("--rw={rw}"),
        "--bs=16k".into(),
        format!("--iodepth={}", job.depth),
        format!("--fdatasync={}", job.fdatasync),
        format!("--runtime={}ms", (job.seconds * 1e3) as u64),
        "--time_based".into(),
        "--norandommap".into(),
        "--randrepeat=0".into(),
    ])?;
    parse(&report, job.access).context("fio's report lacks a number")
}

fn run(args: &[String]) -> Result<Value> {
    let out = Command::new("fio")
        .args([
            "--name=bound",
            "--ioengine=io_uring",
            "--direct=1",
            "--output-format=json",
        ])
        .args(args)
        .output()
        .context("cannot run fio")?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        bail!("fio {} failed: {}", args.join(" "), said.trim());
    }
    serde_json::from_slice(&out.stdout).context("fio's report is not JSON")
}

fn parse(report: &Value, access: Access) -> Option<Measured> {
    let job = report.get("jobs")?.get(0)?;
    let side = match access {
        Access::Read => "read",
        Access::Write => "write",
    };
    let nanoseconds = job.get("sync")?.get("lat_ns")?.get("mean")?.as_f64()?;
    Some(Measured {
        iops: job.get(side)?.get("iops")?.as_f64()?,
        fdatasync_seconds: nanoseconds / 1e9,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_side_asked_for_is_read_from_the_report() {
        let report = serde_json::json!({"jobs": [{
            "read": {"iops": 0.0},
            "write": {"iops": 500.5},
            "sync": {"lat_ns": {"mean": 1_500_000.0}},
        }]});
        let measured = parse(&report, Access::Write).unwrap();
        assert!((measured.iops - 500.5).abs() < 1e-9);
        assert!((measured.fdatasync_seconds - 0.0015).abs() < 1e-9);
        assert!(parse(&serde_json::json!({"jobs": []}), Access::Read).is_none());
    }
}
