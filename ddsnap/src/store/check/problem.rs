// SPDX-License-Identifier: GPL-2.0-only
//! What a check finds: one sentence for each thing that is wrong, with its place and whom it hurts.

use std::fmt;

use crate::units::{MetaBlock, SnapTag, StoreChunk};

/// Where something is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A copy of the superblock, 0 or 1.
    Superblock(u32),
    /// The journal.
    Journal,
    /// A metadata block.
    Block(MetaBlock),
    /// A chunk of the data region.
    Chunk(StoreChunk),
    /// The store as a whole: its parts contradict each other.
    Store,
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// It is wrong; all of it can be made right again from the rest.
    Mendable,
    /// Data of the named snapshots, or entries of the snapshot table, are lost.
    Loss,
    /// Only the origin can tell, which was not given.
    Undecided,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// The device it is on.
    pub device: String,
    /// Where on it.
    pub place: Place,
    /// What is wrong, without device and place.
    pub what: String,
    /// How bad it is.
    pub severity: Severity,
    /// The snapshots whose data may be affected, oldest first: those that a repair gives up.
    pub snapshots: Vec<SnapTag>,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Superblock(copy) => write!(f, "superblock copy {copy}"),
            Place::Journal => f.write_str("journal"),
            Place::Block(block) => write!(f, "metadata block {block}"),
            Place::Chunk(chunk) => write!(f, "store chunk {chunk}"),
            Place::Store => f.write_str("store"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}: {}", self.device, self.place, self.what)?;
        match &self.snapshots[..] {
            [] => Ok(()),
            [tag] => write!(f, "; affects snapshot {tag}"),
            [first, rest @ ..] => {
                write!(f, "; affects snapshots {first}")?;
                rest.iter().try_for_each(|tag| write!(f, ", {tag}"))
            }
        }
    }
}
