// SPDX-License-Identifier: GPL-2.0-only
//! `define volume`: check everything, then do everything or nothing.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use super::{Note, Out, Volume};
use crate::config::{self, Devices, Filesystem, VolumeConfig};
use crate::host::Host;
use crate::layout::Layout;
use crate::machine::Dev;
use crate::names;
use crate::plan::{self, Action, Level};

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
    /// Defines a volume and brings it up to its devices. `others` are the volumes there are.
    pub fn define(
        host: Arc<dyn Host>,
        layout: &Layout,
        request: &DefineVolume,
        others: &[(String, VolumeConfig)],
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
        let device = check_devices(host.as_ref(), request, others)?;
        host.ensure_target()?;
        if host.dm_find(name)?.is_some() {
            bail!("a device-mapper device called '{name}' exists already: choose another name");
        }
        let config = VolumeConfig {
            version: config::SCHEMA_VERSION,
            uuid: uuid::Uuid::new_v4(),
            device,
            cachesize: request.cachesize.clone(),
            filesystem: Filesystem {
                mountpoint: request.mountpoint.clone(),
                mountopts: request.mountopts.clone(),
                snappath: request.snappath.clone(),
                ..Filesystem::default()
            },
            master: None,
        };
        let mut volume = Volume::new(host, layout, name, config)?;
        volume.chunksize = request.chunksize.clone();
        if volume.agent_is_up() || volume.server_runs() {
            bail!("an agent or server of an earlier volume '{name}' still runs: stop it first");
        }
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
        plan::run_or_undo(&steps, |action| volume.perform(action, out))?;
        volume.level = Level::Devices;
        volume.log("defined");
        if volume.origin_filesystem().as_deref() == Some("LVM2_member") {
            out(Note::Line(lvm_warning(name, &volume.config.device.origin)));
        }
        volume.announce();
        Ok(volume)
    }
}

/// What to do where LVM would find a physical volume twice.
fn lvm_warning(volume: &str, origin: &Path) -> String {
    format!(
        "WARNING: /dev/mapper/{volume} is a physical volume of LVM, which also reads the raw device: in \
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
}

/// Checks that all devices are there, different and unused; returns them under lasting names.
fn check_devices(
    host: &dyn Host,
    request: &DefineVolume,
    others: &[(String, VolumeConfig)],
) -> Result<Devices> {
    let mut seen: Vec<(&str, Dev)> = Vec::new();
    let mut check = |what: &'static str, path: &Path| -> Result<PathBuf> {
        if !path.is_absolute() {
            bail!("the {what} '{}' must start with '/'", path.display());
        }
        let dev = host
            .block_device(path)
            .with_context(|| format!("the {what} cannot be used"))?;
        if let Some((other, _)) = seen.iter().find(|(_, d)| *d == dev) {
            bail!(
                "the {what} '{}' is the same device as the {other}",
                path.display()
            );
        }
        seen.push((what, dev));
        if let Some(user) = used_by(host, dev, others) {
            bail!("the {what} '{}' belongs to volume '{user}'", path.display());
        }
        host.check_unused(path)?;
        host.stable_path(path)
    };
    Ok(Devices {
        origin: check("origin", &request.origin)?,
        snapstore: check("snapshot store", &request.snapstore)?,
        meta: request
            .meta
            .as_ref()
            .map(|p| check("metadata device", p))
            .transpose()?,
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
