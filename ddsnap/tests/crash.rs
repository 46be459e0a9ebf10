// SPDX-License-Identifier: GPL-2.0-only
//! The power goes off after every single write and flush of a random workload; the store is opened
//! again; every snapshot must read what the model says.
//!
//! Guards against: an origin write released before its old data is durable, records replayed that
//! were never whole or left out that were acknowledged, blocks or chunks used again too early,
//! superblocks torn between their copies.
//!
//! `DDSNAP_CRASH_SEED=n` repeats a run, `DDSNAP_CRASH_POINTS=n` asks for more points in each shape;
//! `cargo xtask crashtest` runs millions.

mod harness;

use harness::crash::CrashRun;
use harness::shape::shape;
use harness::{number_from_env, seed};

fn run(name: &str, points: u64) {
    let points = number_from_env("DDSNAP_CRASH_POINTS", points);
    let start = std::time::Instant::now();
    let mut run = CrashRun::new(shape(name), seed(), points);
    if let Err(problem) = run.run() {
        let place = run.place();
        panic!("DDSNAP_CRASH_SEED={} {name}: {place}: {problem}", seed());
    }
    let totals = run.totals();
    println!(
        "seed={} {name} {totals:?} losses=0 in {:?}",
        seed(),
        start.elapsed()
    );
    assert!(totals.continued > 0 && totals.recovery_points > 0 && totals.repair_points > 0);
}

#[test]
fn chunks_of_512_bytes() {
    run("512", 2500);
}

#[test]
fn chunks_of_512_bytes_in_many_snapshots() {
    run("512-many", 1500);
}

#[test]
fn chunks_of_512_bytes_in_a_deep_index() {
    run("512-deep", 300);
}

#[test]
fn chunks_of_4_kib() {
    run("4k", 2500);
}

#[test]
fn chunks_of_4_kib_with_a_metadata_device() {
    run("4k-meta", 2500);
}

#[test]
fn chunks_of_16_kib() {
    run("16k", 1500);
}

#[test]
fn chunks_of_64_kib_with_a_metadata_device() {
    run("64k-meta", 800);
}

#[test]
fn chunks_of_1_mib() {
    run("1m", 300);
}

#[test]
fn an_origin_of_one_sector_more_than_whole_chunks() {
    run("4k-more", 1500);
}

#[test]
fn an_origin_of_one_sector_less_than_whole_chunks() {
    run("4k-less-meta", 1500);
}

#[test]
fn an_origin_of_one_sector() {
    run("64k-sector", 400);
}
