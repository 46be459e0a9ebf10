// SPDX-License-Identifier: GPL-2.0-only
//! Replication: one side's newest snapshot to another machine, by changed chunks.
//!
//! A library without I/O of its own: what touches disks, documents and links is behind traits. The way
//! in is `zumastor/REPLICATION.md`. The parts, in the order in which they import each other:
//!
//! - [`send`], [`receive`]: the two ends of a stream, which carry out what the machines ask for;
//!   [`verify`]: those of a stream that compares.
//! - [`volume`]: what the ends need of a volume, as traits; [`link`]: of a connection.
//! - [`sender`], [`receiver`]: the two state machines, pure functions from (state, event) to (state, actions).
//! - [`decide`]: what a cycle sends, and what is refused: a pure function of both greetings.
//! - [`extent`]: changed chunks as they are on the wire; [`progress`]: how far a copy has come, durably.
//! - [`message`], [`frame`]: what is said, and the frames that carry it.
//! - [`sums`]: sums of a snapshot's regions, which prove two sites equal.
//! - [`standing`]: who somebody is and what he holds; [`wire`]: bounded reading of bytes.

pub mod decide;
pub mod extent;
pub mod frame;
pub mod link;
pub mod message;
pub mod progress;
pub mod receive;
pub mod receiver;
pub mod send;
pub mod sender;
pub mod standing;
pub mod sums;
pub mod verify;
pub mod volume;
pub mod wire;

#[cfg(test)]
#[allow(clippy::print_stdout, reason = "a test's output")]
mod model;
#[cfg(test)]
#[allow(clippy::print_stdout, reason = "a test's output")]
mod simulation;
