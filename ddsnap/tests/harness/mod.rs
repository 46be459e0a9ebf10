// SPDX-License-Identifier: GPL-2.0-only
//! A volume in memory, a model of what its snapshots must contain, and a random workload on both.

#![allow(
    dead_code,
    unused_imports,
    reason = "each test uses its part of the harness"
)]

pub mod check;
pub mod crash;
pub mod jobs;
pub mod model;
pub mod operations;
pub mod repair;
pub mod shape;
pub mod victims;
pub mod volume;
pub mod workload;

/// The number in an environment variable, or `default`.
pub fn number_from_env(name: &str, default: u64) -> u64 {
    match std::env::var(name) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{name}={text}: expected a number")),
        Err(_) => default,
    }
}

/// The seed of this run: `DDSNAP_CRASH_SEED`, or the one fixed for everyday runs.
pub fn seed() -> u64 {
    number_from_env("DDSNAP_CRASH_SEED", 20_261_122)
}
