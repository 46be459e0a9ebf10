// SPDX-License-Identifier: GPL-2.0-only
//! The durable state of a volume: one YAML document, replaced as a whole.
//!
//! Invariant: at every moment, also after a power cut, `volume.yaml` is either the old document or
//! the new one. [`save`] writes a temporary file, flushes it, renames it over the old one and flushes
//! the directory; it has returned before anything that relies on the new state is done. In
//! particular `next` is advanced and saved *before* the snapshot with that number is created, so a
//! number is never given twice, whatever fails afterwards.
//!
//! A document of an earlier version is upgraded as it is read ([`v1`]); the first save writes the new one
//! and keeps the old one beside it. One of a later version is refused.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

use crate::machine::Stored;
use crate::names;

mod check;
mod file;
mod roles;
pub mod v1;

pub use check::parse;
pub use file::{check_room, list, load, make_private_dir, remove, save};
pub use roles::{
    Asked, ByHand, HoldPolicy, Incoming, Master, Period, Rotation, Snapref, Source, Target,
    WayBack, Window, WindowError,
};

/// The schema written by this program.
///
/// 1: the first. 2: snapshots belong to the volume and not to its master role, and have a UUID, a time in
/// UTC and any number of rotations; lineage; schedule, source and targets.
pub const SCHEMA_VERSION: u32 = 2;

/// The kind of a snapshot taken by hand.
pub const MANUAL: &str = "manual";

/// A volume as its document has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeConfig {
    /// [`SCHEMA_VERSION`].
    pub version: u32,
    /// The identity of the volume on this machine, the same as long as it exists.
    pub uuid: Uuid,
    /// Whose data it holds.
    pub lineage: Lineage,
    /// The block devices.
    pub device: Devices,
    /// The identity of the snapshot store, from its superblock. Absent until the first start: documents of earlier builds
    /// do not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub store: Option<Uuid>,
    /// The server's cache size as given, bytes with optional k, m or g; the server's default if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cachesize: Option<String>,
    /// Where and how to mount.
    #[serde(default, skip_serializing_if = "Filesystem::is_default")]
    pub filesystem: Filesystem,
    /// Present once `define master` was run; never beside a source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub master: Option<Master>,
    /// Present once `define source` was run; never beside a master.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// Where it is replicated to, by the name given to `define target`.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub targets: BTreeMap<String, Target>,
    /// Rotations, in the order in which they were defined.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub schedule: Vec<Rotation>,
    /// Its snapshots.
    #[serde(default, skip_serializing_if = "Snapshots::is_default")]
    pub snapshots: Snapshots,
    /// The version of the document it was read from, if that was an earlier one.
    #[serde(skip)]
    pub upgraded_from: Option<u32>,
}

/// Whose data a volume holds: a volume and its replicas have the same lineage, whatever they are called.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lineage {
    /// The volume where the data came from: for one that was never a replica its own UUID.
    pub uuid: Uuid,
    /// Raised by each failover: of two masters the one with the lower epoch is superseded. From 1.
    pub epoch: u64,
    /// The volume that is master in this epoch: of two that fail over at a time the one with the greater
    /// UUID supersedes the other. Absent: the one whose UUID the lineage has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owner: Option<Uuid>,
    /// When the epoch began, in seconds since 1970-01-01 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<i64>,
    /// Of a master: a newer epoch that it has met, which it is not part of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub superseded: Option<Superseded>,
}

/// Who became master of a lineage while this volume was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Superseded {
    /// The newer epoch.
    pub epoch: u64,
    /// The volume that is master in it.
    pub owner: Uuid,
    /// When it began, in seconds since 1970-01-01 UTC.
    pub since: i64,
    /// The target that has it, if it was met there; else it came by itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
}

impl Lineage {
    /// Of a volume that was never a replica.
    #[must_use]
    pub fn first(uuid: Uuid) -> Lineage {
        Lineage {
            uuid,
            epoch: 1,
            owner: None,
            since: None,
            superseded: None,
        }
    }
}

/// Paths of the block devices, in a form that survives a reboot (see [`crate::blockdev`]).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Devices {
    /// Holds the user's data.
    pub origin: PathBuf,
    /// Holds what snapshots need.
    pub snapstore: PathBuf,
    /// Holds the metadata, if that has a device of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub meta: Option<PathBuf>,
}

impl Devices {
    /// The device that has the store's superblock.
    #[must_use]
    pub fn superblock(&self) -> &Path {
        self.meta.as_ref().unwrap_or(&self.snapstore)
    }
}

/// Mount settings and the flags of `define master`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Filesystem {
    /// Mount point of the origin, if not the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mountpoint: Option<PathBuf>,
    /// Options for origin and snapshots, separated by commas.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mountopts: Option<String>,
    /// Directory for the snapshot links, if not the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snappath: Option<PathBuf>,
    /// Mount snapshots; `--no-snapmount` clears it.
    #[serde(default = "yes")]
    pub mountsnap: bool,
    /// Export snapshots over NFS.
    #[serde(default)]
    pub export: bool,
    /// Show the snapshots below MOUNT/.snapshot.
    #[serde(default)]
    pub dotsnapshot: bool,
    /// Show the snapshots to Samba.
    #[serde(default)]
    pub samba: bool,
}

fn yes() -> bool {
    true
}

impl Default for Filesystem {
    /// Settings of a volume for which nothing was given: snapshots are mounted.
    fn default() -> Filesystem {
        Filesystem {
            mountpoint: None,
            mountopts: None,
            snappath: None,
            mountsnap: true,
            export: false,
            dotsnapshot: false,
            samba: false,
        }
    }
}

impl Filesystem {
    fn is_default(&self) -> bool {
        *self == Filesystem::default()
    }
}

/// What is known of a volume's snapshots. They are the volume's and not its role's: a master that becomes a
/// replica keeps them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshots {
    /// The number of the next snapshot: even, growing, never given twice.
    pub next: u32,
    /// A snapshot whose creation was begun and not yet recorded: after a crash it may exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending: Option<Snapshot>,
    /// The newest sequence in the store when that was begun: what has this or an older one is not ours.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub pending_after: u64,
    /// Forgotten snapshots whose data may still be in the store, where it is to be deleted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub deleting: Vec<Doomed>,
    /// The snapshots, oldest first.
    #[serde(default)]
    pub list: Vec<Snapshot>,
}

impl Snapshots {
    fn is_default(&self) -> bool {
        *self == Snapshots::default()
    }

    /// The snapshot of this number.
    #[must_use]
    pub fn find(&self, id: u32) -> Option<&Snapshot> {
        self.list.iter().find(|s| s.id == id)
    }

    /// `time`, or `time.1`, `time.2`... if there are snapshots of the same second.
    #[must_use]
    pub fn unique_time(&self, time: &str) -> String {
        names::unique_time(time, |name| self.list.iter().any(|s| s.time == name))
    }

    /// The snapshots of a rotation, oldest first.
    pub fn of_kind<'a>(&'a self, kind: &'a str) -> impl Iterator<Item = &'a Snapshot> + 'a {
        self.list.iter().filter(move |s| s.is_of(kind))
    }
}

fn is_zero(value: &u64) -> bool {
    *value == 0
}

fn is_false(value: &bool) -> bool {
    !*value
}

/// A snapshot to be deleted. The sequence proves that the one of this number is still the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Doomed {
    /// The snaptag.
    pub id: u32,
    /// Its place in the store's order of creation, never used again.
    pub sequence: u64,
}

/// One snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// The snaptag given to ddsnap.
    pub id: u32,
    /// Its identity, the same on every machine that has a copy of it.
    pub uuid: Uuid,
    /// The rotations it belongs to, or [`MANUAL`]. One that falls out of the last is deleted.
    pub kinds: Vec<String>,
    /// Local time of creation, `YYYY.MM.DD-HH.MM.SS`: the name of its link.
    pub time: String,
    /// The same moment in seconds since 1970-01-01 UTC: ages are reckoned by it.
    pub created: i64,
    /// Its place in the store's order of creation, never used again: tells it from another one that got its number.
    /// Absent until the store was asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sequence: Option<u64>,
    /// No rotation deletes it, nor a full store.
    #[serde(default, skip_serializing_if = "is_false")]
    pub protected: bool,
    /// The snaptag of a copy that was made to be mounted: what arrives from an upstream is itself never
    /// written, not even by a file system's journal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub twin: Option<u32>,
}

impl Snapshot {
    /// Whether it belongs to rotation `kind`.
    #[must_use]
    pub fn is_of(&self, kind: &str) -> bool {
        self.kinds.iter().any(|k| k == kind)
    }

    /// Whether this is it in the store, and not another one that got its number.
    #[must_use]
    pub fn is(&self, stored: &Stored) -> bool {
        stored.tag.0 == self.id && self.sequence.is_none_or(|own| own == stored.seq.0)
    }
}

/// A document that cannot be read, used or written.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file system refused.
    #[error("could not {what} {path}")]
    Io {
        /// The attempted action.
        what: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Not YAML, or fields missing, unknown or of the wrong type.
    #[error("{path}: {message}")]
    Syntax {
        /// The document.
        path: PathBuf,
        /// Field, complaint, line and column.
        message: String,
    },
    /// Well-formed, with a value that makes no sense.
    #[error("{path}: line {line}: {field}: {message}")]
    Value {
        /// The document.
        path: PathBuf,
        /// Line of the field, from 1.
        line: usize,
        /// Its name.
        field: &'static str,
        /// What is wrong and what is allowed.
        message: String,
    },
}

#[cfg(test)]
mod tests;
