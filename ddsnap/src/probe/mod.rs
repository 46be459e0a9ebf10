// SPDX-License-Identifier: GPL-2.0-only
//! What lies on a device, and what the device lies on: asked before anything is written to it.
//!
//! [`contents`] tells what a device holds, [`stack`] which devices share its blocks. Both only read.

pub mod contents;
pub mod stack;
