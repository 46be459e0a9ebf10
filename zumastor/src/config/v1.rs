// SPDX-License-Identifier: GPL-2.0-only
//! Version 1 of the document, as the first zumastor wrote it, and the way from it to the present one.
//!
//! The types here never change. Upgrading is pure and gives the same result each time, so a document that
//! could not be written anew is read the same way at the next start.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use serde::Deserialize;
use uuid::Uuid;

use super::{Devices, Doomed, Filesystem, Lineage, SCHEMA_VERSION, Snapshots, VolumeConfig};

/// This version.
pub const VERSION: u32 = 1;

/// The volume.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Document {
    /// [`VERSION`].
    pub version: u32,
    /// Of the volume.
    pub uuid: Uuid,
    /// As today.
    pub device: Devices,
    /// As today.
    #[serde(default)]
    pub cachesize: Option<String>,
    /// As today.
    #[serde(default)]
    pub filesystem: Filesystem,
    /// The only role.
    #[serde(default)]
    pub master: Option<Master>,
}

/// The role, which had the snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Master {
    /// As today.
    pub next: u32,
    /// As today.
    #[serde(default)]
    pub pending: Option<Snapshot>,
    /// As today.
    #[serde(default)]
    pub pending_after: u64,
    /// As today.
    #[serde(default)]
    pub deleting: Vec<Doomed>,
    /// Oldest first.
    #[serde(default)]
    pub snapshots: Vec<Snapshot>,
}

/// A snapshot, which had a local time only, and no identity.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// The snaptag.
    pub id: u32,
    /// Its rotation.
    pub kind: String,
    /// `YYYY.MM.DD-HH.MM.SS`, and `.n` where there were several.
    pub time: String,
}

/// The document as the present version has it; `zone` is where the local times are from.
#[must_use]
pub fn upgrade(old: Document, zone: &TimeZone) -> VolumeConfig {
    let volume = old.uuid;
    let is_master = old.master.is_some();
    let snapshots = old.master.map_or_else(Snapshots::default, |master| {
        let mut newest = 0;
        let mut convert = |old: Snapshot| {
            newest = moment(&old.time, newest, zone);
            super::Snapshot {
                id: old.id,
                uuid: Uuid::new_v5(&volume, format!("snapshot {}", old.id).as_bytes()),
                kinds: vec![old.kind],
                time: old.time,
                created: newest,
                sequence: None,
                protected: false,
                twin: None,
            }
        };
        Snapshots {
            next: master.next,
            list: master.snapshots.into_iter().map(&mut convert).collect(),
            pending: master.pending.map(&mut convert),
            pending_after: master.pending_after,
            deleting: master.deleting,
        }
    });
    VolumeConfig {
        version: SCHEMA_VERSION,
        uuid: volume,
        lineage: Lineage::first(volume),
        device: old.device,
        store: None,
        cachesize: old.cachesize,
        filesystem: old.filesystem,
        master: is_master.then(super::Master::default),
        source: None,
        targets: Default::default(),
        schedule: Vec::new(),
        snapshots,
        upgraded_from: Some(VERSION),
    }
}

/// The moment that a local time means, in seconds since 1970-01-01 UTC.
///
/// An hour that the clocks went through twice: the second time if the first would be before `at_least`, the
/// snapshot before. What is no time is taken to be of that moment.
fn moment(name: &str, at_least: i64, zone: &TimeZone) -> i64 {
    let text = name.get(..19).unwrap_or(name);
    let Ok(local) = DateTime::strptime("%Y.%m.%d-%H.%M.%S", text) else {
        return at_least;
    };
    let ambiguous = zone.to_ambiguous_timestamp(local);
    let first = ambiguous.earlier().map_or(at_least, |t| t.as_second());
    if first >= at_least {
        return first;
    }
    let second = ambiguous.later().map_or(first, |t| t.as_second());
    if second >= at_least { second } else { first }
}
