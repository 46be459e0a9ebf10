// SPDX-License-Identifier: GPL-2.0-only
//! The durable state of a volume: one YAML document, replaced as a whole.
//!
//! Invariant: at every moment, also after a power cut, `volume.yaml` is either the old document or
//! the new one. [`save`] writes a temporary file, flushes it, renames it over the old one and flushes
//! the directory; it has returned before anything that relies on the new state is done. In
//! particular `next` is advanced and saved *before* the snapshot with that number is created, so a
//! number is never given twice, whatever fails afterwards.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::layout::Layout;
use crate::names;

/// The schema written by this program. 1: the first.
pub const SCHEMA_VERSION: u32 = 1;

/// The kind of a snapshot taken by hand.
pub const MANUAL: &str = "manual";

/// Largest document accepted, in bytes. A snapshot takes less than 100.
const DOCUMENT_MAX_BYTES: u64 = 16 << 20;

/// A volume as its document has it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeConfig {
    /// [`SCHEMA_VERSION`].
    pub version: u32,
    /// The volume's identity, the same as long as it exists.
    pub uuid: uuid::Uuid,
    /// The block devices.
    pub device: Devices,
    /// The server's cache size as given, bytes with optional k, m or g; the server's default if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cachesize: Option<String>,
    /// Where and how to mount.
    #[serde(default, skip_serializing_if = "Filesystem::is_default")]
    pub filesystem: Filesystem,
    /// Present once `define master` was run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub master: Option<Master>,
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

/// The upstream role: mounts the origin and takes snapshots.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Master {
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
    pub snapshots: Vec<Snapshot>,
}

fn is_zero(value: &u64) -> bool {
    *value == 0
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
    /// The rotation it belongs to, or [`MANUAL`].
    pub kind: String,
    /// Local time of creation, `YYYY.MM.DD-HH.MM.SS`: the name of its link.
    pub time: String,
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

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ConfigError {
    let path = path.to_path_buf();
    move |source| ConfigError::Io { what, path, source }
}

/// Reads and checks the document of `volume`; `None` if there is none.
pub fn load(layout: &Layout, volume: &str) -> Result<Option<VolumeConfig>, ConfigError> {
    let path = layout.config(volume);
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(io_error("open", &path)(e)),
    };
    let mut text = String::new();
    file.take(DOCUMENT_MAX_BYTES)
        .read_to_string(&mut text)
        .map_err(io_error("read", &path))?;
    parse(&path, &text).map(Some)
}

/// Parses and checks a document; `path` is for messages.
pub fn parse(path: &Path, text: &str) -> Result<VolumeConfig, ConfigError> {
    let config: VolumeConfig = serde_yaml::from_str(text).map_err(|e| ConfigError::Syntax {
        path: path.to_path_buf(),
        message: e.to_string(),
    })?;
    let value = |field: &'static str, message: String| ConfigError::Value {
        path: path.to_path_buf(),
        line: line_of(text, field),
        field,
        message,
    };
    if config.version != SCHEMA_VERSION {
        let message = format!(
            "found {}, but this zumastor reads version {SCHEMA_VERSION} only",
            config.version
        );
        return Err(value("version", message));
    }
    let devices = [
        ("origin", Some(&config.device.origin)),
        ("snapstore", Some(&config.device.snapstore)),
        ("meta", config.device.meta.as_ref()),
    ];
    for (field, device) in devices {
        if let Some(device) = device.filter(|d| !d.is_absolute()) {
            return Err(value(
                field,
                format!("'{}' must start with '/'", device.display()),
            ));
        }
    }
    let directories = [
        ("mountpoint", config.filesystem.mountpoint.as_ref()),
        ("snappath", config.filesystem.snappath.as_ref()),
    ];
    for (field, dir) in directories {
        if let Some(dir) = dir.filter(|d| !d.is_absolute()) {
            return Err(value(
                field,
                format!("'{}' must start with '/'", dir.display()),
            ));
        }
    }
    if let Some(master) = &config.master {
        if master.next % 2 != 0 {
            return Err(value(
                "next",
                format!("found {}, must be even", master.next),
            ));
        }
        let known = master.snapshots.iter().chain(&master.pending);
        if let Some(snapshot) = known.into_iter().find(|s| s.id >= master.next) {
            let message = format!("found {}, but snapshot {} exists", master.next, snapshot.id);
            return Err(value("next", message));
        }
        // A time becomes the name of a link.
        let bad =
            |s: &&Snapshot| s.time.is_empty() || s.time.starts_with('.') || s.time.contains('/');
        if let Some(snapshot) = master.snapshots.iter().chain(&master.pending).find(bad) {
            let message = format!("'{}' is not a time like 2026.01.31-23.59.59", snapshot.time);
            return Err(value("time", message));
        }
    }
    Ok(config)
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

/// Makes `config` the document of `volume`, durably, or leaves the old one.
pub fn save(layout: &Layout, volume: &str, config: &VolumeConfig) -> Result<(), ConfigError> {
    let path = layout.config(volume);
    let temporary = write_beside(layout, volume, config)?;
    fs::rename(&temporary, &path).map_err(io_error("replace", &path))?;
    sync_dir(&layout.volume(volume))
}

/// Writes the document durably under another name.
fn write_beside(
    layout: &Layout,
    volume: &str,
    config: &VolumeConfig,
) -> Result<PathBuf, ConfigError> {
    let dir = layout.volume(volume);
    let temporary = dir.join("volume.yaml.new");
    let text = serde_yaml::to_string(config).map_err(|e| ConfigError::Syntax {
        path: layout.config(volume),
        message: e.to_string(),
    })?;
    make_private_dir(&dir)?;
    let write = || {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()
    };
    write().map_err(io_error("write", &temporary))?;
    Ok(temporary)
}

/// Proves that the document of a new volume could be saved now, and leaves nothing.
pub fn check_room(layout: &Layout, volume: &str, config: &VolumeConfig) -> Result<(), ConfigError> {
    let written = write_beside(layout, volume, config).map(|_| ());
    // What somebody else keeps there stays; it is no hindrance.
    let _ = fs::remove_file(layout.volume(volume).join("volume.yaml.new"));
    let _ = fs::remove_dir(layout.volume(volume));
    written
}

/// Deletes the document of `volume` and its directory. Succeeds if they are gone already.
pub fn remove(layout: &Layout, volume: &str) -> Result<(), ConfigError> {
    let dir = layout.volume(volume);
    // The document first: without it the volume does not exist, whatever else is left.
    for path in [layout.config(volume), dir.join("volume.yaml.new")] {
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove", &path)(e));
            }
            _ => {}
        }
    }
    match fs::remove_dir(&dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(io_error("remove", &dir)(e)),
        Ok(()) => sync_dir(&layout.volumes()),
    }
}

/// Makes `dir` and its parents, readable by root only; the parents durably too.
pub fn make_private_dir(dir: &Path) -> Result<(), ConfigError> {
    if dir.is_dir() {
        return Ok(());
    }
    let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
    made.map_err(io_error("create", dir))?;
    dir.parent().map_or(Ok(()), sync_dir)
}

fn sync_dir(dir: &Path) -> Result<(), ConfigError> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(io_error("flush", dir))
}

/// The names of all defined volumes, sorted. Directories that cannot be volumes are passed over.
pub fn list(layout: &Layout) -> Result<Vec<String>, ConfigError> {
    let dir = layout.volumes();
    let entries = fs::read_dir(&dir).map_err(io_error("read", &dir))?;
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry.map_err(io_error("read", &dir))?;
        let name = entry.file_name();
        let is_volume =
            |name: &&str| names::check_volume_name(name).is_ok() && layout.config(name).exists();
        found.extend(name.to_str().filter(is_volume).map(str::to_string));
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests;
