// SPDX-License-Identifier: GPL-2.0-only
//! A machine in memory: remembers what was done to it and fails where it is told to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};

use anyhow::{Context, Result, anyhow, bail};

use super::Host;
use crate::config::Devices;
use crate::machine::{Busy, Dev, DmDevice, Kind, Mount, ProcessSpec, TableLine};

/// What the machine looks like.
#[derive(Debug, Default)]
pub struct State {
    /// Everything that was done, one line each.
    pub log: Vec<String>,
    /// The call that fails: a line as in `log`.
    pub fail: Option<String>,
    /// Whether the kernel has the target.
    pub no_target: bool,
    /// Block devices.
    pub devices: BTreeMap<PathBuf, Dev>,
    /// Paths of devices somebody holds.
    pub held: BTreeSet<PathBuf>,
    /// Type of the file system on origin and snapshots.
    pub filesystem: Option<String>,
    /// Running processes and their numbers.
    pub processes: BTreeMap<&'static str, u32>,
    /// Writing ends whose closing is the end of a process.
    pub alive: BTreeMap<u32, OwnedFd>,
    /// What the store has.
    pub snapshots: BTreeSet<u32>,
    /// Device-mapper devices.
    pub dm: BTreeMap<String, (Dev, String, TableLine)>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// Mount points in use.
    pub busy: BTreeSet<PathBuf>,
    /// Frozen mount points.
    pub frozen: BTreeSet<PathBuf>,
    /// Snapshots taken while something was frozen.
    pub taken_frozen: BTreeSet<u32>,
    next: u32,
}

/// The fake.
#[derive(Debug, Default)]
pub struct Fake {
    state: Mutex<State>,
}

fn key(kind: Kind) -> &'static str {
    match kind {
        Kind::Agent => "agent",
        Kind::Server => "server",
    }
}

impl Fake {
    /// The state, to look at and to change.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state
            .lock()
            .expect("no test panics while it holds the state")
    }

    /// Ends a process from outside.
    pub fn kill(&self, kind: Kind) {
        let mut state = self.state();
        if let Some(pid) = state.processes.remove(key(kind)) {
            state.alive.remove(&pid);
        }
    }

    /// What a reboot leaves: nothing but disks.
    pub fn reboot(&self) {
        let mut state = self.state();
        state.processes.clear();
        state.alive.clear();
        state.dm.clear();
        state.mounts.clear();
        state.busy.clear();
        state.frozen.clear();
    }

    /// Notes a call; fails it if it is the one to fail.
    fn call(&self, line: String) -> Result<MutexGuard<'_, State>> {
        let mut state = self.state();
        let fails = state.fail.as_ref() == Some(&line);
        state.log.push(line.clone());
        if fails {
            Err(anyhow!("{line} failed"))
        } else {
            Ok(state)
        }
    }
}

impl Host for Fake {
    fn ensure_target(&self) -> Result<()> {
        if self.state().no_target {
            bail!("{}", crate::dm::missing_target("1.2.3"));
        }
        Ok(())
    }

    fn block_device(&self, path: &Path) -> Result<Dev> {
        let found = self.state().devices.get(path).copied();
        found.with_context(|| format!("device '{}' does not exist", path.display()))
    }

    fn settle(&self) {}

    fn announce(&self, _path: &Path) {}

    fn stable_path(&self, path: &Path) -> Result<PathBuf> {
        Ok(path.to_path_buf())
    }

    fn check_unused(&self, path: &Path) -> Result<()> {
        if self.state().held.contains(path) {
            let holders = vec!["a mount on /srv".to_string()];
            return Err(Busy {
                device: path.display().to_string(),
                holders,
            }
            .into());
        }
        Ok(())
    }

    fn zero(&self, path: &Path, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        drop(self.call(format!("zero {}", path.display()))?);
        progress(1, 1);
        Ok(())
    }

    fn filesystem(&self, _node: &Path) -> Result<Option<String>> {
        Ok(self.state().filesystem.clone())
    }

    fn flush(&self, _node: &Path) -> Result<()> {
        self.call("flush".to_string()).map(|_| ())
    }

    fn format(&self, devices: &Devices, chunksize: &str) -> Result<()> {
        self.call(format!(
            "format {} {chunksize}",
            devices.snapstore.display()
        ))
        .map(|_| ())
    }

    fn find_process(&self, spec: &ProcessSpec) -> Result<Option<u32>> {
        Ok(self.state().processes.get(key(spec.kind)).copied())
    }

    fn start_process(&self, spec: &ProcessSpec) -> Result<u32> {
        let mut state = self.call(format!("start {}", key(spec.kind)))?;
        state.next += 1;
        let pid = state.next;
        state.processes.insert(key(spec.kind), pid);
        Ok(pid)
    }

    fn reopen_log(&self, _spec: &ProcessSpec) -> Result<()> {
        Ok(())
    }

    fn stop_process(&self, spec: &ProcessSpec) -> Result<()> {
        let mut state = self.call(format!("stop {}", key(spec.kind)))?;
        state.processes.remove(key(spec.kind));
        Ok(())
    }

    fn exit_fd(&self, pid: u32) -> Result<OwnedFd> {
        // A pipe polls readable (hung up) when its writing end is closed.
        let (reader, writer) = nix::unistd::pipe()?;
        let mut state = self.state();
        if state.processes.values().any(|p| *p == pid) {
            state.alive.insert(pid, writer);
        }
        Ok(File::from(reader).into())
    }

    fn create_snapshot(&self, _server: &Path, tag: u32) -> Result<()> {
        let mut state = self.call(format!("create {tag}"))?;
        if !state.frozen.is_empty() {
            state.taken_frozen.insert(tag);
        }
        state.snapshots.insert(tag);
        Ok(())
    }

    fn delete_snapshot(&self, _server: &Path, tag: u32) -> Result<()> {
        self.call(format!("delete {tag}"))?.snapshots.remove(&tag);
        Ok(())
    }

    fn snapshots(&self, _server: &Path) -> Result<Vec<u32>> {
        Ok(self.state().snapshots.iter().copied().collect())
    }

    fn size_sectors(&self, _server: &Path, _tag: Option<u32>) -> Result<u64> {
        Ok(204_800)
    }

    fn dm_find(&self, name: &str) -> Result<Option<DmDevice>> {
        let found = self.state().dm.get(name).cloned();
        Ok(found.map(|(dev, uuid, table)| DmDevice {
            dev,
            uuid: Some(uuid),
            table: Some(table),
        }))
    }

    fn dm_names(&self) -> Result<Vec<String>> {
        Ok(self.state().dm.keys().cloned().collect())
    }

    fn dm_create(&self, name: &str, uuid: &str, table: &TableLine) -> Result<Dev> {
        let mut state = self.call(format!("dm create {name}"))?;
        state.next += 1;
        let dev = Dev {
            major: 253,
            minor: state.next,
        };
        let old = state
            .dm
            .insert(name.to_string(), (dev, uuid.to_string(), table.clone()));
        assert!(old.is_none(), "{name} existed already");
        Ok(dev)
    }

    fn dm_remove(&self, name: &str) -> Result<()> {
        let mut state = self.call(format!("dm remove {name}"))?;
        let Some((dev, ..)) = state.dm.get(name).cloned() else {
            return Ok(());
        };
        if state.mounts.iter().any(|m| m.dev == dev) {
            let device = format!("/dev/mapper/{name}");
            return Err(Busy {
                device,
                holders: Vec::new(),
            }
            .into());
        }
        state.dm.remove(name);
        Ok(())
    }

    fn dm_node(&self, name: &str, _dev: Dev) -> PathBuf {
        Path::new("/dev/mapper").join(name)
    }

    fn mounts(&self) -> Result<Vec<Mount>> {
        Ok(self.state().mounts.clone())
    }

    fn mount(&self, node: &Path, dir: &Path, fstype: &str, options: &[String]) -> Result<()> {
        let name = node
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let mut state = self.call(
            format!("mount {name} {}", options.join(","))
                .trim()
                .to_string(),
        )?;
        let dev = state.dm.get(&name).context("no such device")?.0;
        let (dir, source) = (dir.to_path_buf(), node.to_path_buf());
        state.mounts.push(Mount {
            dev,
            dir,
            source,
            fstype: fstype.to_string(),
        });
        Ok(())
    }

    fn unmount(&self, dir: &Path) -> Result<()> {
        let name = dir
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let mut state = self.call(format!("unmount {name}"))?;
        if state.busy.contains(dir) {
            let device = format!("/dev/mapper/{name}");
            return Err(Busy {
                device,
                holders: vec!["bash[4711]".to_string()],
            }
            .into());
        }
        state.mounts.retain(|m| m.dir != dir);
        Ok(())
    }

    fn freeze(&self, dir: &Path) -> Result<bool> {
        self.call("freeze".to_string())?
            .frozen
            .insert(dir.to_path_buf());
        Ok(true)
    }

    fn thaw(&self, dir: &Path) -> Result<()> {
        self.call("thaw".to_string())?.frozen.remove(dir);
        Ok(())
    }

    fn now(&self) -> String {
        "2026.11.22-03.04.05".to_string()
    }
}
