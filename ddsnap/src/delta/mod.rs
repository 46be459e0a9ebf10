// SPDX-License-Identifier: GPL-2.0-only
//! Changelists and deltas: what differs between two snapshots, as files, and how a copy of the first
//! becomes one of the second.
//!
//! The decoders ([`changelist`], [`file`], [`extent`]) take any reader, hold a bounded piece of it and
//! believe nothing before its checksum. [`create`] and [`apply`] do the work on devices or plain files
//! named STEM and STEM(TAG); [`stream`] has a delta go over a connection, [`listen`] is the end that takes it. FORMAT.md has the bytes.

pub mod apply;
pub mod changelist;
pub mod create;
pub mod extent;
pub mod file;
pub mod listen;
pub mod record;
pub mod stream;
pub mod volume;

pub use record::{FileError, Header, Side};
