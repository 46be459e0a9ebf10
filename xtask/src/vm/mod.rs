// SPDX-License-Identifier: GPL-2.0-only
//! A guest under QEMU: its command line, its two control sockets, its console
//! and its disks. Nothing here knows about scenarios or images' contents.

pub mod accel;
pub mod agent;
pub mod args;
pub mod console;
pub mod disk;
pub mod lossy;
pub mod machine;
pub mod network;
pub mod qmp;
