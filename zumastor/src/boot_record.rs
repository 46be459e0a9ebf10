// SPDX-License-Identifier: GPL-2.0-only
//! What [`boot`](crate::boot) knows of volumes: a small document for each, in /etc.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;

use anyhow::{Context, Result};

use crate::config::{self, Filesystem, VolumeConfig};
use crate::layout::Layout;
use crate::names;

/// The ending of a record's name.
const ENDING: &str = ".yaml";
/// Makes the boot record of `volume` what `config` asks for, durably. Writes only if that is a change, and
/// says whether it was one.
///
/// # Errors
/// The record cannot be written; an earlier one stays.
pub fn record(layout: &Layout, volume: &str, config: &VolumeConfig) -> Result<bool> {
    let wanted = VolumeConfig {
        filesystem: Filesystem::default(),
        master: None,
        source: None,
        targets: Default::default(),
        schedule: Vec::new(),
        snapshots: config::Snapshots::default(),
        ..config.clone()
    };
    let path = layout.boot_record(volume);
    let heading = "# Written by zumastor: what brings the volume up before /var is mounted.\n";
    let text = format!("{heading}{}", serde_yaml::to_string(&wanted)?);
    if fs::read_to_string(&path).is_ok_and(|found| found == text) {
        return Ok(false);
    }
    let failed = || format!("could not write {}", path.display());
    config::make_private_dir(&layout.boot_records())?;
    let temporary = path.with_extension("new");
    let write = || -> io::Result<()> {
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&temporary)?;
        file.write_all(text.as_bytes())?;
        file.sync_all()?;
        fs::rename(&temporary, &path)?;
        fs::File::open(layout.boot_records())?.sync_all()
    };
    write().with_context(failed)?;
    Ok(true)
}

/// Deletes the boot record of `volume`, durably. Succeeds if there is none.
///
/// # Errors
/// It is still there.
pub fn forget(layout: &Layout, volume: &str) -> Result<()> {
    let path = layout.boot_record(volume);
    match fs::remove_file(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result
            .and_then(|()| fs::File::open(layout.boot_records())?.sync_all())
            .with_context(|| format!("could not remove {}", path.display())),
    }
}

/// Reads all boot records. One that cannot be used is passed over: it must not keep the others down.
pub fn records(layout: &Layout) -> Vec<(String, VolumeConfig)> {
    let mut found = Vec::new();
    for entry in fs::read_dir(layout.boot_records())
        .into_iter()
        .flatten()
        .flatten()
    {
        let name = entry.file_name();
        let Some(volume) = name.to_str().and_then(|n| n.strip_suffix(ENDING)) else {
            continue;
        };
        let text = fs::read_to_string(entry.path()).unwrap_or_default();
        let config = config::parse(&entry.path(), &text);
        if let (Ok(()), Ok(config)) = (names::check_volume_name(volume), config) {
            found.push((volume.to_string(), config));
        }
    }
    found.sort_by(|a, b| a.0.cmp(&b.0));
    found
}
