// SPDX-License-Identifier: GPL-2.0-only
//! The snapshot store, its server and its tools.
//!
//! Imports point one way: `cli` uses `server`, `agent`, `client` and `store`; `server` uses `store`,
//! `device` and `protocol`; `delta` uses `client`, `device` and `format`; `client` and `agent` use `protocol`; `probe` uses `format`; `store` uses `format` and `device`;
//! `nbd` uses none;
//! all may use `units`, `buffer`, `promise` and `stdio`. ARCHITECTURE.md has the argument.

#![deny(clippy::print_stdout, clippy::print_stderr)]

pub mod agent;
pub mod buffer;
pub mod cli;
pub mod client;
pub mod daemon;
pub mod delta;
pub mod device;
pub mod format;
pub mod nbd;
pub mod probe;
pub(crate) mod promise;
pub mod protocol;
pub mod server;
pub mod stdio;
pub mod store;
pub mod units;
