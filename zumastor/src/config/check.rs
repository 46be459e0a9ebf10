// SPDX-License-Identifier: GPL-2.0-only
//! From text to a document that makes sense.

use std::collections::BTreeSet;
use std::path::Path;

use jiff::tz::TimeZone;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{ConfigError, SCHEMA_VERSION, Snapshot, VolumeConfig, v1};
use crate::names;

/// The version alone: what else there is need not fit our types.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Parses and checks a document of this or an earlier version; `path` is for messages.
///
/// # Errors
/// It is no document, one of a later version, or has a value that makes no sense.
pub fn parse(path: &Path, text: &str) -> Result<VolumeConfig, ConfigError> {
    let Version { version } = read(path, text)?;
    let config = match version {
        v1::VERSION => v1::upgrade(read(path, text)?, &TimeZone::system()),
        SCHEMA_VERSION => read(path, text)?,
        newer if newer > SCHEMA_VERSION => {
            let message = format!(
                "found {newer}: it was written by a later zumastor; this one reads versions up to {SCHEMA_VERSION}"
            );
            return Err(value(path, text, "version", message));
        }
        other => {
            let message = format!("found {other}, but there never was such a version");
            return Err(value(path, text, "version", message));
        }
    };
    check(&config).map_err(|(field, message)| value(path, text, field, message))?;
    Ok(config)
}

fn read<T: DeserializeOwned>(path: &Path, text: &str) -> Result<T, ConfigError> {
    serde_yaml::from_str(text).map_err(|e| ConfigError::Syntax {
        path: path.to_path_buf(),
        message: e.to_string(),
    })
}

fn value(path: &Path, text: &str, field: &'static str, message: String) -> ConfigError {
    ConfigError::Value {
        path: path.to_path_buf(),
        line: line_of(text, field),
        field,
        message,
    }
}

/// The first field with a value that makes no sense, and what is wrong with it.
fn check(config: &VolumeConfig) -> Result<(), (&'static str, String)> {
    let paths = [
        ("origin", Some(&config.device.origin)),
        ("snapstore", Some(&config.device.snapstore)),
        ("meta", config.device.meta.as_ref()),
        ("mountpoint", config.filesystem.mountpoint.as_ref()),
        ("snappath", config.filesystem.snappath.as_ref()),
    ];
    for (field, path) in paths {
        if let Some(path) = path.filter(|d| !d.is_absolute()) {
            return Err((field, format!("'{}' must start with '/'", path.display())));
        }
    }
    if config.lineage.epoch == 0 {
        return Err(("epoch", "found 0, must be 1 or more".into()));
    }
    if config.master.is_some() && config.source.is_some() {
        let message = "a volume is either a master or a replica with a source";
        return Err(("source", message.into()));
    }
    let mut kinds = BTreeSet::new();
    for rotation in &config.schedule {
        names::check_kind(&rotation.kind).map_err(|e| ("kind", e.to_string()))?;
        if !kinds.insert(&rotation.kind) {
            return Err(("kind", format!("'{}' is there twice", rotation.kind)));
        }
        if rotation.keep == 0 {
            return Err(("keep", "found 0, must be 1 or more".into()));
        }
        if rotation.every == Some(0) {
            return Err(("every", "found 0, must be 1 or more seconds".into()));
        }
    }
    let snapshots = &config.snapshots;
    if snapshots.next % 2 != 0 {
        return Err(("next", format!("found {}, must be even", snapshots.next)));
    }
    let known = || snapshots.list.iter().chain(&snapshots.pending);
    let newest = |s: &Snapshot| s.id.max(s.twin.unwrap_or(0));
    if let Some(snapshot) = known().find(|s| newest(s) >= snapshots.next) {
        let (next, newest) = (snapshots.next, newest(snapshot));
        return Err((
            "next",
            format!("found {next}, but snapshot {newest} exists"),
        ));
    }
    // A time becomes the name of a link.
    let bad = |s: &&Snapshot| s.time.is_empty() || s.time.starts_with('.') || s.time.contains('/');
    if let Some(snapshot) = known().find(bad) {
        let message = format!("'{}' is not a time like 2026.01.31-23.59.59", snapshot.time);
        return Err(("time", message));
    }
    for kind in known().flat_map(|s| &s.kinds) {
        // So does a kind.
        names::check_kind(kind).map_err(|e| ("kinds", e.to_string()))?;
    }
    Ok(())
}

/// The line on which `field:` first occurs, from 1; 1 if it does not.
fn line_of(text: &str, field: &str) -> usize {
    let is_field = |line: &str| {
        let line = line.trim_start().trim_start_matches("- ");
        line.strip_prefix(field)
            .is_some_and(|rest| rest.starts_with(':'))
    };
    text.lines().position(is_field).map_or(1, |index| index + 1)
}
