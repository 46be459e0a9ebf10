// SPDX-License-Identifier: GPL-2.0-only
//! The document as a file: read whole, replaced whole.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use super::{ConfigError, VolumeConfig, parse, v1};
use crate::layout::Layout;
use crate::names;

/// Largest document accepted, in bytes. A snapshot takes less than 200.
const DOCUMENT_MAX_BYTES: u64 = 16 << 20;

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

/// Makes `config` the document of `volume`, durably, or leaves the old one. One of an earlier version is kept
/// beside it.
pub fn save(layout: &Layout, volume: &str, config: &VolumeConfig) -> Result<(), ConfigError> {
    let path = layout.config(volume);
    if let Some(version) = config.upgraded_from {
        let old = layout.old_config(volume, version);
        match fs::hard_link(&path, &old) {
            // From an earlier save; and what is upgraded as it is defined has no document yet.
            Err(e)
                if [io::ErrorKind::AlreadyExists, io::ErrorKind::NotFound].contains(&e.kind()) => {}
            result => result.map_err(io_error("keep", &old))?,
        }
    }
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
    let old = layout.old_config(volume, v1::VERSION);
    for path in [layout.config(volume), dir.join("volume.yaml.new"), old] {
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
