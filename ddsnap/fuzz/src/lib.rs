// SPDX-License-Identifier: GPL-2.0-only
//! What the fuzz targets run, as plain functions of bytes: libFuzzer calls them with what it thinks up, and
//! `tests/fuzz_regressions.rs` with what is in `regressions/`.
//!
//! Every target builds what it tests behind right checksums, so that bytes get past them to the code that
//! must not trust what they say. A finding is a panic, an overflow, an assertion, or memory or time
//! without bound.

#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    missing_docs,
    reason = "these are tests"
)]

pub mod control_messages;
pub mod delta_files;
pub mod image;
pub mod input;
pub mod journal_replay;
pub mod kernel_channel;
pub mod repair;
pub mod store_open;
pub mod volume;

/// A target: its name, and what it does with an input.
pub type Target = (&'static str, fn(&[u8]));

/// All of them.
pub const TARGETS: [Target; 6] = [
    ("store_open", store_open::run),
    ("journal_replay", journal_replay::run),
    ("repair", repair::run),
    ("control_messages", control_messages::run),
    ("kernel_channel", kernel_channel::run),
    ("delta_files", delta_files::run),
];
