// SPDX-License-Identifier: GPL-2.0-only
//! Replication of real volumes: [`crate::replication`] on devices, documents, sockets and ssh.
//!
//! - [`verify`]: a comparison as a job; [`again`]: what it found, to be sent again.
//! - [`cycle`]: a cycle as a job, whichever side begins it.
//! - [`by_hand`]: what scripts send with `ddsnap transmit`, as a job.
//! - `written`: whether somebody but replication wrote to a replica.
//! - [`failover`]: a replica becomes the master.
//! - [`upstream`], [`downstream`]: a volume as the two ends see it; [`device`]: its devices.
//! - [`ssh`]: the way to another machine; [`socket`]: the way in from there.
//! - [`files`]: sums and positions, beside the document.

pub mod again;
pub mod by_hand;
pub mod cycle;
pub mod device;
pub mod downstream;
pub mod failover;
pub mod files;
pub mod socket;
pub mod ssh;
pub mod upstream;
pub mod verify;
mod written;
