// SPDX-License-Identifier: GPL-2.0-only
//! What the fuzz targets run, as plain functions of bytes: libFuzzer calls them with what it thinks up, and
//! `tests/fuzz_regressions.rs` with what is in `regressions/`.
//!
//! As in `ddsnap/fuzz` bytes are put behind right checksums, so that they get to the code that must not
//! trust what they say. A finding is a panic, an overflow, or memory or time without bound.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    missing_docs,
    reason = "these are tests"
)]

pub mod replication;

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 1] = [("replication", replication::run)];
