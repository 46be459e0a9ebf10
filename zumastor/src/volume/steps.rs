// SPDX-License-Identifier: GPL-2.0-only
//! How each [`Action`] is carried out. All of them may be repeated.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use anyhow::{Context, Result, bail};
use ddsnap::probe::contents::Contents;

use super::doubt::sync_doubts;
use super::{Note, Out, Volume, Waiting, agent_spec};
use crate::boot_record;
use crate::config;
use crate::links;
use crate::machine::{Dev, Kind, Mount};
use crate::mount_options::{self, Complaint};
use crate::names;
use crate::plan::{Action, Device};
use crate::process::ACCEPT_ORIGIN;

/// Chunk size of a store that is formatted without being asked about it.
pub(super) const DEFAULT_CHUNK: &str = "16k";

/// What came of mounting a device.
pub(super) enum Mounted {
    /// It was mounted already.
    Before,
    /// It holds no file system but this.
    Nothing(Contents),
    /// It is mounted.
    Now {
        /// The type of its file system.
        kind: String,
        /// Options that this does not know.
        dropped: Vec<String>,
    },
}

impl Volume {
    /// Carries out one step.
    pub(super) fn perform(&mut self, action: Action, out: Out) -> Result<()> {
        match action {
            Action::ZeroOrigin => {
                let check = self.check.clone();
                let report = &mut |done, total| {
                    out(Note::progress("zeroing the origin", done, total));
                    check()
                };
                self.host.zero(&self.config.device.origin, report)
            }
            Action::Format => {
                let chunk = self.chunksize.as_deref().unwrap_or(DEFAULT_CHUNK);
                self.host.format(&self.config.device, chunk, self.force)
            }
            Action::SaveConfig => {
                config::make_private_dir(&self.layout.logs(&self.name))?;
                self.learn_store()?;
                self.save()?;
                self.store_learned = false;
                Ok(())
            }
            Action::RemoveConfig => {
                boot_record::forget(&self.layout, &self.name)?;
                Ok(config::remove(&self.layout, &self.name)?)
            }
            Action::StartAgent => self.start_process(Kind::Agent, out),
            Action::StartServer => {
                self.start_process(Kind::Server, out)?;
                // It has opened the store, so it can be read: with the next start, at the latest.
                if let Err(error) = self.learn_store() {
                    self.log(&format!("{error:#}"));
                }
                Ok(())
            }
            Action::CreateDevice(which) => self.create_device(which),
            Action::Mount(which) => {
                let mounted = self.mount_device(which, &self.host.mounts()?)?;
                self.note_mounted(which, mounted, out);
                Ok(())
            }
            Action::WriteLinks => self.write_links(),
            Action::RemoveLinks => self.remove_links(),
            Action::Unmount(which) => self.unmount_device(which, &self.host.mounts()?),
            Action::RemoveDevice(which) => self.remove_device(which),
            Action::Unlist(id) => self.unlist(id),
            Action::DeleteData => self.settle_snapshots().map(|_| ()),
            // Only if empty: what somebody put below a mount point is his.
            Action::RemoveMountPoint => {
                links::remove_empty_dir(&self.layout.mountpoint(&self.name))
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
        let accept = self.accept_origin && kind == Kind::Server;
        let option = accept.then_some(ACCEPT_ORIGIN);
        if let Some(pid) = self.supervisor.start_with(kind, option)? {
            out(Note::Detail(format!("pid = {pid}")));
        }
        Ok(())
    }

    /// The number of a device that must exist.
    fn device_number(&self, which: Device) -> Result<Dev> {
        let name = names::device_name(&self.name, which);
        let found = self.host.dm_find(&name)?;
        Ok(found
            .with_context(|| format!("device /dev/mapper/{name} does not exist"))?
            .dev)
    }

    pub(super) fn create_device(&self, which: Device) -> Result<()> {
        let server = self.layout.server_socket(&self.name);
        let sectors = self.host.size_sectors(&server, which)?;
        let name = names::device_name(&self.name, which);
        let table = self.table(which, sectors)?;
        let made = self.host.dm_create(&name, &self.dm_uuid(which), &table);
        made.map(|_| ())
    }

    pub(super) fn remove_device(&self, which: Device) -> Result<()> {
        let name = names::device_name(&self.name, which);
        self.patiently(|| self.host.dm_remove(&name))
    }

    /// Mounts a device, if it holds a file system; what else it may hold is no failure. `mounts` is the mount table.
    pub(super) fn mount_device(&self, which: Device, mounts: &[Mount]) -> Result<Mounted> {
        let name = names::device_name(&self.name, which);
        let dev = self.device_number(which)?;
        let node = self.host.dm_node(&name, dev);
        let dir = self.mountpoint(which);
        if let Some(other) = mounts.iter().rev().find(|m| m.dir == dir) {
            if other.dev == dev {
                return Ok(Mounted::Before);
            }
            bail!(
                "{} is mounted on {} already",
                other.source.display(),
                dir.display()
            );
        }
        let contents = self.host.contents(&node)?;
        let Some(found) = contents.filesystem() else {
            return Ok(Mounted::Nothing(contents));
        };
        if let Some(reason) = mount_options::refusal(found).filter(|_| which.is_some()) {
            let kind = &found.kind;
            bail!("its file system ({kind}) is not mounted: {reason}");
        }
        make_mountpoint(&dir)?;
        let stored = self.config.filesystem.mountopts.as_deref();
        let options = mount_options::options(stored, found, which.is_some());
        let dropped = self.mount_with(&node, &dir, &found.kind, options)?;
        Ok(Mounted::Now {
            kind: found.kind.clone(),
            dropped,
        })
    }

    /// Keeps in mind, and tells, what came of mounting a device.
    pub(super) fn note_mounted(&mut self, which: Device, mounted: Mounted, out: Out) {
        match mounted {
            Mounted::Before => {}
            Mounted::Nothing(contents) => self.nothing_to_mount(which, contents),
            Mounted::Now { dropped, .. } if dropped.is_empty() => {}
            Mounted::Now { kind, dropped } => {
                let name = names::device_name(&self.name, which);
                let options = dropped.join(",");
                let warning = format!(
                    "/dev/mapper/{name} is mounted without the options {options}, which {kind} does not know"
                );
                out(Note::Warning(warning.clone()));
                self.warnings.push(warning);
            }
        }
    }

    fn nothing_to_mount(&mut self, which: Device, contents: Contents) {
        let holds = contents.to_string();
        if let Some(tag) = which {
            self.plain.insert(tag, holds);
            return;
        }
        self.notes.push(match contents {
            Contents::Blank => format!(
                "/dev/mapper/{} holds {holds}; once it has a file system it is mounted",
                self.name
            ),
            _ => format!(
                "/dev/mapper/{} holds {holds}, nothing to mount; snapshots are of the device",
                self.name
            ),
        });
        self.waiting = Waiting::Contents(Some(contents));
    }

    /// Mounts with as many of the administrator's options as the file system knows; returns the others.
    fn mount_with(
        &self,
        node: &Path,
        dir: &Path,
        fstype: &str,
        options: mount_options::Options,
    ) -> Result<Vec<String>> {
        let mount_options::Options {
            required,
            mut optional,
            mut dropped,
        } = options;
        let attempt = |optional: &[String]| {
            let all = [&required[..], optional].concat();
            self.patiently(|| self.host.mount(node, dir, fstype, &all))
        };
        let mut error = match attempt(&optional) {
            Ok(()) => return Ok(dropped),
            Err(error) => error,
        };
        // Each turn takes one option away.
        while let Complaint::Option(name) = mount_options::complaint(&format!("{error:#}")) {
            let is_it = |o: &String| o.split('=').next() == Some(name.as_str());
            let Some(at) = optional.iter().position(is_it) else {
                break;
            };
            dropped.push(optional.remove(at));
            match attempt(&optional) {
                Ok(()) => return Ok(dropped),
                Err(next) => error = next,
            }
        }
        let unnamed = mount_options::complaint(&format!("{error:#}")) == Complaint::SomeOption;
        if optional.is_empty() || !unnamed || attempt(&[]).is_err() {
            return Err(error);
        }
        // It does mount without: one after the other is tried beside those that were taken.
        let mut taken = Vec::new();
        for option in optional {
            taken.push(option);
            self.patiently(|| self.host.unmount(dir))?;
            if attempt(&taken).is_err() {
                dropped.extend(taken.pop());
                attempt(&taken)?;
            }
        }
        Ok(dropped)
    }

    pub(super) fn unmount_device(&self, which: Device, mounts: &[Mount]) -> Result<()> {
        let dir = self.mountpoint(which);
        if mounts.iter().any(|m| m.dir == dir) {
            self.patiently(|| self.host.unmount(&dir))?;
        }
        // A mount point the administrator named is his; ours go with the mount of a snapshot.
        if which.is_some() && dir != self.mountpoint(None) {
            links::remove_empty_dir(&dir)
        } else {
            Ok(())
        }
    }

    fn write_links(&self) -> Result<()> {
        let origin = self.device_number(None)?;
        let table = self.host.mounts()?;
        let table: BTreeMap<&Path, Dev> = table.iter().map(|m| (m.dir.as_path(), m.dev)).collect();
        let dir = self.mountpoint(None);
        let shown = self.twin();
        // Without a device it is not mounted either.
        let shown_dev = shown.and_then(|twin| self.device_number(Some(twin)).ok());
        let there = table.get(dir.as_path()).copied();
        let is_shown = there.is_some() && there == shown_dev;
        let is_mounted = there == Some(origin) || is_shown;
        match is_mounted.then_some(dir) {
            Some(dir) => links::set_link(&self.layout.mount_link(&self.name), &dir)?,
            None => links::remove_link(&self.layout.mount_link(&self.name))?,
        }
        links::set_flag(&self.layout.cron(&self.name))?;
        // Nobody else mounts there, so the devices need not be looked at one by one.
        let snapshot = |tag| {
            let dir = self.mountpoint(Some(tag));
            let is_mounted = match shown == Some(tag) {
                true => is_shown,
                false => table.contains_key(dir.as_path()),
            };
            is_mounted.then_some(dir)
        };
        let links = links::snapshot_links(self.snapshots(), snapshot);
        let dir = self.links_dir();
        links::sync_links(&dir, &links)?;
        self.write_doubts(&dir)?;
        let standard = self.layout.snapshot_links(&self.name);
        if dir == standard {
            Ok(())
        } else {
            links::set_link(&standard, &dir)
        }
    }

    /// Removes the standard paths, and of a directory the administrator named only our links.
    fn remove_links(&self) -> Result<()> {
        links::remove_link(&self.layout.mount_link(&self.name))?;
        links::remove_flag(&self.layout.cron(&self.name))?;
        let dir = self.links_dir();
        if dir.is_dir() {
            links::sync_links(&dir, &Default::default())?;
            sync_doubts(&dir, &Default::default())?;
        }
        let standard = self.layout.snapshot_links(&self.name);
        if dir == standard {
            links::remove_empty_dir(&dir)
        } else {
            links::remove_link(&standard)
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
