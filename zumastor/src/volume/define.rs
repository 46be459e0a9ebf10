// SPDX-License-Identifier: GPL-2.0-only
//! `define volume`: check everything, then do everything or nothing.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use ddsnap::device::identity;
use ddsnap::units::ChunkShift;
use serde::{Deserialize, Serialize};

use super::steps::DEFAULT_CHUNK;
use super::{Check, Note, Out, Volume, retry};
use crate::config::{self, Devices, Filesystem, Lineage, Snapshots, VolumeConfig};
use crate::host::{Host, filled_device};
use crate::human;
use crate::layout::Layout;
use crate::machine::Dev;
use crate::names;
use crate::plan::{self, Action, Level, RollbackError};

/// The arguments of `define volume`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DefineVolume {
    /// Name of the volume.
    pub volume: String,
    /// Holds the data.
    pub origin: PathBuf,
    /// Holds the snapshots.
    pub snapstore: PathBuf,
    /// Holds the metadata, if it has a device of its own.
    pub meta: Option<PathBuf>,
    /// Format the snapshot store.
    pub initialize: bool,
    /// Chunk size of a formatted store: bytes with optional k, m or g; 16k if not given.
    pub chunksize: Option<String>,
    /// Zero the origin.
    pub zero: bool,
    /// Overwrite what origin or store are seen to hold.
    #[serde(default)]
    pub force: bool,
    /// Cache of the server: bytes with optional k, m or g.
    pub cachesize: Option<String>,
    /// Mount point of the origin.
    pub mountpoint: Option<PathBuf>,
    /// Mount options, separated by commas.
    pub mountopts: Option<String>,
    /// Directory of the snapshot links.
    pub snappath: Option<PathBuf>,
}

impl Volume {
    /// Defines a volume and brings it up to its devices. `others` are the volumes there are. What takes long
    /// ends when `check` fails, and then all that was done is taken back.
    pub fn define(
        host: Arc<dyn Host>,
        layout: &Layout,
        request: &DefineVolume,
        others: &[(String, VolumeConfig)],
        check: Check,
        out: Out,
    ) -> Result<Volume> {
        let name = &request.volume;
        names::check_volume_name(name)?;
        if layout.config(name).exists() || others.iter().any(|(other, _)| other == name) {
            bail!("volume '{name}' is defined already");
        }
        let directories = [
            ("mount point", &request.mountpoint),
            ("snapshot path", &request.snappath),
        ];
        for (what, dir) in directories {
            if let Some(dir) = dir.as_ref().filter(|d| !d.is_absolute()) {
                bail!("the {what} '{}' must start with '/'", dir.display());
            }
        }
        check_chunk_size(request)?;
        let device = check_devices(host.as_ref(), request, others)?;
        host.ensure_dm_target()?;
        if host.dm_find(name)?.is_some() {
            bail!("a device-mapper device called '{name}' exists already: choose another name");
        }
        let uuid = uuid::Uuid::new_v4();
        let config = VolumeConfig {
            version: config::SCHEMA_VERSION,
            uuid,
            lineage: Lineage::first(uuid),
            device,
            store: None,
            cachesize: request.cachesize.clone(),
            filesystem: Filesystem {
                mountpoint: request.mountpoint.clone(),
                mountopts: request.mountopts.clone(),
                snappath: request.snappath.clone(),
                ..Filesystem::default()
            },
            master: None,
            source: None,
            targets: BTreeMap::new(),
            schedule: Vec::new(),
            snapshots: Snapshots::default(),
            upgraded_from: None,
        };
        let mut volume = Volume::new(host, layout, name, config)?;
        volume.chunksize = request.chunksize.clone();
        volume.force = request.force;
        volume.check = check;
        if volume.agent_is_up() || volume.server_runs() {
            bail!("an agent or server of an earlier volume '{name}' still runs: stop it first");
        }
        volume.check_contents(request)?;
        config::check_room(layout, name, &volume.config)?;
        let mut steps = Vec::new();
        steps.extend(request.zero.then_some(Action::ZeroOrigin));
        steps.extend(request.initialize.then_some(Action::Format));
        // Registered before anything runs: should the daemon be killed, the next one finds it all.
        steps.extend([
            Action::SaveConfig,
            Action::StartAgent,
            Action::StartServer,
            Action::CreateDevice(None),
        ]);
        plan::run_or_undo(name, &steps, |action| volume.perform(action, out))
            .map_err(RollbackError::into_error)?;
        volume.check = Arc::new(|| Ok(()));
        volume.level = Level::Devices;
        volume.log("defined");
        if !request.initialize {
            volume.tell_of_snapshots(out);
        }
        if volume.origin_is("LVM2_member") {
            out(Note::Warning(lvm_warning(
                name,
                &volume.config.device.origin,
            )));
        }
        volume.warn_of_names(out);
        volume.announce();
        Ok(volume)
    }

    /// What `define volume` has made, as a sentence without a full stop.
    #[must_use]
    pub fn what_was_made(&self) -> String {
        let devices = &self.config.device;
        let size = self
            .host
            .size_sectors(&self.layout.server_socket(&self.name), None);
        let size = size.map_or_else(
            |_| String::new(),
            |s| format!(" of {}", human::bytes(s * 512)),
        );
        let meta = devices.meta.as_ref();
        let meta = meta.map_or_else(String::new, |m| format!(", metadata on {}", m.display()));
        format!(
            "volume '{0}' is defined: /dev/mapper/{0}{size} with its data on {1}, snapshots on {2}{meta}",
            self.name,
            devices.origin.display(),
            devices.snapstore.display()
        )
    }

    /// Checks that nothing is overwritten that somebody may miss, and that snapshots will be of use.
    fn check_contents(&self, request: &DefineVolume) -> Result<()> {
        let devices = &self.config.device;
        let sectors = |path| self.host.sector_bytes(path);
        if let (Some(store), Some(own)) = (sectors(&devices.snapstore), sectors(&devices.origin)) {
            if store > own {
                bail!(
                    "the snapshot store '{}' has sectors of {store} bytes and the origin '{}' of {own}: \
                     snapshots would not mount; use a store with sectors of {own} bytes",
                    devices.snapstore.display(),
                    devices.origin.display()
                );
            }
        }
        if request.zero && !request.force {
            let found = self.host.contents(&devices.origin)?;
            if found.is_recognised() {
                bail!(
                    "the origin '{}' holds {found}; nothing was changed (--force zeroes it all the same)",
                    devices.origin.display()
                );
            }
        }
        if request.initialize {
            let chunk = request.chunksize.as_deref().unwrap_or(DEFAULT_CHUNK);
            self.host.check_format(devices, chunk, request.force)?;
        }
        Ok(())
    }

    /// Lists what a store that was not formatted brings along.
    fn tell_of_snapshots(&self, out: Out) {
        let server = self.layout.server_socket(&self.name);
        out(match self.host.snapshots(&server) {
            Ok(stored) if stored.is_empty() => return,
            Ok(stored) => {
                let tags: Vec<String> = stored.iter().map(|s| s.tag.to_string()).collect();
                Note::Line(format!(
                    "the snapshot store has snapshots {}: `zumastor define master {}` lists and mounts them",
                    tags.join(" "),
                    self.name
                ))
            }
            Err(error) => Note::Warning(format!("{error:#}")),
        });
    }
}

/// What to do where LVM would find a physical volume twice.
fn lvm_warning(volume: &str, origin: &Path) -> String {
    format!(
        "/dev/mapper/{volume} is a physical volume of LVM, which also reads the raw device: in \
         /etc/lvm/lvmlocal.conf set devices/global_filter to [ \"r|^{}$|\" ], see README.Debian",
        origin.display()
    )
}

impl Volume {
    /// Has udev name the devices anew: a raw origin is not found by what is on it, and one that is no
    /// longer an origin is.
    pub(super) fn announce(&self) {
        let devices = &self.config.device;
        for path in [&devices.origin, &devices.snapstore] {
            self.host.announce(path);
        }
        self.host.settle();
    }

    /// Says which devices have no name that stays with them.
    fn warn_of_names(&self, out: Out) {
        let devices = &self.config.device;
        let all = [Some(&devices.origin), Some(&devices.snapstore)];
        for path in all.into_iter().chain([devices.meta.as_ref()]).flatten() {
            if identity::is_nameless(path) {
                out(Note::Warning(format!(
                    "'{}' has no serial number or other name of its own: after a reboot another disk may \
                     come up under this name. The volume would not start over it",
                    path.display()
                )));
            }
        }
    }
}

/// A chunk size that `ddsnap initialize` would refuse, after the origin had been zeroed.
fn check_chunk_size(request: &DefineVolume) -> Result<()> {
    let Some(text) = &request.chunksize else {
        return Ok(());
    };
    if human::size(text).and_then(ChunkShift::from_bytes).is_none() {
        bail!("a chunk size of {text} is not a power of two from 512 to 1048576");
    }
    Ok(())
}

/// Checks that all devices are there, share no blocks, and are unused; returns them under lasting names.
fn check_devices(
    host: &dyn Host,
    request: &DefineVolume,
    others: &[(String, VolumeConfig)],
) -> Result<Devices> {
    let mut seen: Vec<(&str, &Path, Dev)> = Vec::new();
    let wanted = [
        ("origin", Some(&request.origin)),
        ("snapshot store", Some(&request.snapstore)),
        ("metadata device", request.meta.as_ref()),
    ];
    for (what, path) in wanted {
        let Some(path) = path else { continue };
        let shown = path.display();
        if !path.is_absolute() {
            bail!("the {what} '{shown}' must start with '/'");
        }
        let dev =
            filled_device(host, path).with_context(|| format!("the {what} cannot be used"))?;
        for (other, other_path, other_dev) in &seen {
            if dev == *other_dev {
                bail!("the {what} '{shown}' is the same device as the {other}");
            }
            if host.overlap(path, other_path) {
                bail!(
                    "the {what} '{shown}' shares blocks with the {other} '{}': one lies on the other, or \
                     both on one file",
                    other_path.display()
                );
            }
        }
        seen.push((what, path, dev));
        if let Some(user) = used_by(host, dev, others) {
            bail!("the {what} '{shown}' belongs to volume '{user}'");
        }
        if let Some((user, device)) = overlapped(host, path, others) {
            let device = device.display();
            bail!(
                "the {what} '{shown}' shares blocks with '{device}', which belongs to volume '{user}'"
            );
        }
    }
    let check = |path: &PathBuf| -> Result<PathBuf> {
        retry(host, || host.check_unused(path))?;
        host.stable_path(path)
    };
    Ok(Devices {
        origin: check(&request.origin)?,
        snapstore: check(&request.snapstore)?,
        meta: request.meta.as_ref().map(check).transpose()?,
    })
}

/// The volume on whose device `path` lies, or the other way round, and that device.
fn overlapped<'a>(
    host: &dyn Host,
    path: &Path,
    others: &'a [(String, VolumeConfig)],
) -> Option<(&'a str, &'a Path)> {
    others.iter().find_map(|(name, config)| {
        let d = &config.device;
        let mut all = [Some(&d.origin), Some(&d.snapstore), d.meta.as_ref()]
            .into_iter()
            .flatten();
        let found = all.find(|other| host.overlap(path, other))?;
        Some((name.as_str(), found.as_path()))
    })
}

/// The volume to which device `dev` belongs.
fn used_by<'a>(host: &dyn Host, dev: Dev, others: &'a [(String, VolumeConfig)]) -> Option<&'a str> {
    let uses = |config: &VolumeConfig| {
        let d = &config.device;
        let all = [Some(&d.origin), Some(&d.snapstore), d.meta.as_ref()];
        all.into_iter()
            .flatten()
            .any(|p| host.block_device(p).is_ok_and(|found| found == dev))
    };
    others
        .iter()
        .find(|(_, config)| uses(config))
        .map(|(name, _)| name.as_str())
}
