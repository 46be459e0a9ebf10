// SPDX-License-Identifier: GPL-2.0-only
//! The server of one volume: the store's owner, between the kernel's devices and people's commands.
//!
//! [`core`] holds all state and decides, [`engine`] is what it asks of the store; [`ring`] moves
//! bytes for it.

pub mod changelist;
pub mod clients;
pub mod commands;
pub mod core;
mod dump;
pub mod engine;
#[cfg(test)]
mod fake;
pub mod faults;
pub mod io;
pub mod jobs;
pub mod link;
pub mod presence;
pub mod refusal;
pub mod revert;
pub mod ring;
pub mod scrub;
pub mod start;
pub mod store_engine;
mod surroundings;
pub mod usage;
