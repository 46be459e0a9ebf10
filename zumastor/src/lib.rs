// SPDX-License-Identifier: GPL-2.0-only
//! The administrator's tool: volumes with snapshots on any block device.
//!
//! One daemon ([`daemon`]) owns every change of state; the command line ([`cli`]) asks it over a
//! unix socket ([`control`]), waits, and reports what happened. The parts, in the order in which
//! they import each other:
//!
//! - [`cli`], [`daemon`]: the two ends of [`control`], the protocol between them.
//! - [`doctor`]: what around the volumes will go wrong one day.
//! - [`status`]: what `zumastor status` prints.
//! - [`boot`]: bringing volumes up before the daemon, by its [`boot_record`]s, and [`shutdown`], ending what
//!   is left after it. [`uevents`]: what udev says.
//! - [`work`]: long work on one machine, as [`jobs`], which hold up nobody.
//! - [`system`]: the real machine, handed on to [`dm`], [`mounts`], [`mount_table`], [`freeze`], [`thaw_guard`],
//!   [`blockdev`], [`device_number`], [`server`] and [`process`], one subject each.
//! - [`volume`]: the operations on one volume, written against [`host`], and [`supervise`], which keeps
//!   its agent and server running.
//! - [`host`]: everything that touches the machine, as a trait, so that tests can fake it.
//! - [`links`]: plain files that lead to mounts, [`mount_options`], how to mount what, and [`exports`], what NFS clients
//!   cannot tell apart.
//! - [`schedule`]: when rotations take snapshots, and which they give up. Pure.
//! - [`plan`]: wanted against observed state, giving a list of steps. No I/O.
//! - [`config`]: the durable state of a volume, one YAML document.
//! - [`layout`], [`names`], [`machine`], [`note`], [`human`]: paths, names, plain data and how it is written for people;
//!   [`refusal`]: exit codes.
//!
//! - [`replicate`]: replication of volumes, by [`replication`], which knows traits alone.
//!
//! A snapshot store's formats are the business of the `ddsnap` crate alone.

// They panic when nobody can read: a daemon must outlive its log, above all while it holds a volume frozen.
#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod blockdev;
pub mod boot;
pub mod boot_record;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod device_number;
pub mod dm;
pub mod doctor;
pub mod exports;
pub mod freeze;
pub mod host;
pub mod human;
pub mod jobs;
pub mod layout;
pub mod links;
pub mod machine;
pub mod mount_options;
pub mod mount_table;
pub mod mounts;
pub mod names;
pub mod note;
pub mod plan;
pub mod process;
pub mod refusal;
pub mod replicate;
pub mod replication;
pub mod schedule;
pub mod server;
pub mod shutdown;
pub mod status;
pub mod supervise;
pub mod system;
pub mod thaw_guard;
pub mod uevents;
pub mod volume;
pub mod work;
