// SPDX-License-Identifier: GPL-2.0-only
//! What lies on a device, and what the device lies on: asked before anything is written to it.
//!
//! [`contents`] tells what a device holds, [`store`] which snapshot store, [`stack`] which devices share its blocks,
//! [`users`] who uses it. All only read.

pub mod contents;
pub mod stack;
pub mod store;
pub mod users;
