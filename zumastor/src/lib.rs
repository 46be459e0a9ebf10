// SPDX-License-Identifier: GPL-2.0-only
//! The administrator's tool: volumes with snapshots on any block device.
//!
//! One daemon ([`daemon`]) owns every change of state; the command line ([`cli`]) asks it over a
//! unix socket ([`control`]), waits, and reports what happened. The parts, in the order in which
//! they import each other:
//!
//! - [`layout`]: every path the tool uses; [`names`]: what a volume may be called.
//! - [`config`]: the durable state of a volume, one YAML document.
//! - [`plan`]: wanted against observed state, giving a list of steps. No I/O.
//! - [`host`]: everything that touches the machine, as a trait, so that tests can fake it.
//! - [`dm`], [`mounts`], [`freeze`], [`blockdev`], [`process`]: the real machine, one subject each.
//! - [`supervise`]: keeps a volume's agent and server running.
//! - [`volume`]: the operations on one volume, written against [`host`].
//! - [`status`]: what `zumastor status` prints.
//!
//! A snapshot store's formats are the business of the `ddsnap` crate alone.

pub mod blockdev;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod dm;
pub mod freeze;
pub mod host;
pub mod layout;
pub mod mounts;
pub mod names;
pub mod plan;
pub mod process;
pub mod status;
pub mod supervise;
pub mod volume;
