// SPDX-License-Identifier: GPL-2.0-only
//! How each [`Action`] is carried out. All of them may be repeated.

use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use anyhow::{Context, Result, bail};

use super::{Note, Out, Volume, agent_spec};
use crate::boot;
use crate::config;
use crate::machine::{Dev, Kind};
use crate::mounts;
use crate::names;
use crate::plan::{Action, Target};

/// Chunk size of a store that is formatted without being asked about it.
const DEFAULT_CHUNK: &str = "16k";

impl Volume {
    /// Carries out one step.
    pub(super) fn perform(&self, action: Action, out: Out) -> Result<()> {
        let server = self.layout.server_socket(&self.name);
        match action {
            Action::ZeroOrigin => {
                let report = &mut |done, total| out(Note::Progress { done, total });
                self.host.zero(&self.config.device.origin, report)
            }
            Action::Format => {
                let chunk = self.chunksize.as_deref().unwrap_or(DEFAULT_CHUNK);
                self.host.format(&self.config.device, chunk)
            }
            Action::SaveConfig => {
                config::make_private_dir(&self.layout.logs(&self.name))?;
                self.save()
            }
            Action::RemoveConfig => {
                boot::forget(&self.layout, &self.name)?;
                Ok(config::remove(&self.layout, &self.name)?)
            }
            Action::StartAgent => self.start_process(Kind::Agent, out),
            Action::StartServer => self.start_process(Kind::Server, out),
            Action::CreateDevice(target) => {
                let sectors = self.host.size_sectors(&server, target)?;
                let name = names::device_name(&self.name, target);
                let table = self.table(target, sectors)?;
                self.host
                    .dm_create(&name, &self.dm_uuid(target), &table)
                    .map(|_| ())
            }
            Action::Mount(target) => self.mount(target),
            Action::WriteLinks => self.write_links(),
            Action::RemoveLinks => self.remove_links(),
            Action::Unmount(target) => self.unmount(target),
            Action::RemoveDevice(target) => {
                self.host.dm_remove(&names::device_name(&self.name, target))
            }
            Action::StopServer => self.supervisor.stop(Kind::Server),
            Action::StopAgent => self.supervisor.stop(Kind::Agent),
        }
    }

    fn start_process(&self, kind: Kind, out: Out) -> Result<()> {
        // The logs' directory may have been cleaned up since the volume was defined.
        config::make_private_dir(&self.layout.logs(&self.name))?;
        for socket in [
            self.layout.agent_socket(&self.name),
            self.layout.server_socket(&self.name),
        ] {
            socket.parent().map_or(Ok(()), config::make_private_dir)?;
        }
        if let Some(pid) = self.supervisor.start(kind)? {
            out(Note::Line(format!("pid = {pid}")));
        }
        Ok(())
    }

    /// The number of a device that must exist.
    fn device_number(&self, target: Target) -> Result<Dev> {
        let name = names::device_name(&self.name, target);
        let found = self.host.dm_find(&name)?;
        Ok(found
            .with_context(|| format!("device /dev/mapper/{name} does not exist"))?
            .dev)
    }

    fn mount(&self, target: Target) -> Result<()> {
        let name = names::device_name(&self.name, target);
        let dev = self.device_number(target)?;
        let node = self.host.dm_node(&name, dev);
        let dir = self.mountpoint(target);
        let mounts = self.host.mounts()?;
        if let Some(other) = mounts.iter().rev().find(|m| m.dir == dir) {
            if other.dev == dev {
                return Ok(());
            }
            bail!(
                "{} is mounted on {} already",
                other.source.display(),
                dir.display()
            );
        }
        let Some(fstype) = self.host.filesystem(&node)? else {
            bail!("there is no file system on /dev/mapper/{name} yet: make one with mkfs");
        };
        make_mountpoint(&dir)?;
        let stored = self.config.filesystem.mountopts.as_deref();
        let options = mounts::options(stored, &fstype, target.is_some());
        self.host.mount(&node, &dir, &fstype, &options)
    }

    fn unmount(&self, target: Target) -> Result<()> {
        let dir = self.mountpoint(target);
        if self.host.mounts()?.iter().any(|m| m.dir == dir) {
            self.host.unmount(&dir)?;
        }
        // A mount point the administrator named is his; ours go with the mount of a snapshot.
        if target.is_some() {
            mounts::remove_empty_dir(&dir)
        } else {
            Ok(())
        }
    }

    fn write_links(&self) -> Result<()> {
        let origin = self.device_number(None)?;
        let table = self.host.mounts()?;
        let mounted = |target: Target, dev: Option<Dev>| {
            let dir = self.mountpoint(target);
            table
                .iter()
                .any(|m| m.dir == dir && Some(m.dev) == dev)
                .then_some(dir)
        };
        match mounted(None, Some(origin)) {
            Some(dir) => mounts::set_link(&self.layout.mount_link(&self.name), &dir)?,
            None => mounts::remove_link(&self.layout.mount_link(&self.name))?,
        }
        let snapshot = |tag| {
            let name = names::device_name(&self.name, Some(tag));
            let dev = self.host.dm_find(&name).ok()?.map(|d| d.dev);
            mounted(Some(tag), dev)
        };
        let links = mounts::snapshot_links(self.snapshots(), snapshot);
        let dir = self.links_dir();
        mounts::sync_links(&dir, &links)?;
        let standard = self.layout.snapshot_links(&self.name);
        if dir == standard {
            Ok(())
        } else {
            mounts::set_link(&standard, &dir)
        }
    }

    /// Removes the standard paths, and of a directory the administrator named only our links.
    fn remove_links(&self) -> Result<()> {
        mounts::remove_link(&self.layout.mount_link(&self.name))?;
        let dir = self.links_dir();
        if dir.is_dir() {
            mounts::sync_links(&dir, &Default::default())?;
        }
        let standard = self.layout.snapshot_links(&self.name);
        if dir == standard {
            mounts::remove_empty_dir(&dir)
        } else {
            mounts::remove_link(&standard)
        }
    }

    /// Stops what a failed definition may have started, also what supervision knows nothing of.
    pub(super) fn agent_is_up(&self) -> bool {
        self.supervisor
            .is_running(&agent_spec(&self.layout, &self.name))
    }
}

/// Makes a mount point. Nobody but root can enter it while nothing is mounted there, so no file
/// lands below a mount by mistake.
fn make_mountpoint(dir: &Path) -> Result<()> {
    let failed = || format!("could not create the mount point {}", dir.display());
    if dir.is_dir() {
        return Ok(());
    }
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent).with_context(failed)?;
    }
    fs::DirBuilder::new()
        .mode(0o700)
        .create(dir)
        .with_context(failed)
}
