// SPDX-License-Identifier: GPL-2.0-only
//! A machine in memory: remembers what was done to it and fails where it is told to.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use ddsnap::client::{NewSizes, Resized};
use ddsnap::probe::contents::Contents;
use ddsnap::units::{SnapSeq, SnapTag};
use jiff::Zoned;
use uuid::Uuid;

use super::{FreezeGuard, Host, Probe};
use crate::config::Devices;
use crate::machine::{
    Dev, DmDevice, Geometry, Kind, Mount, ProcessSpec, SnapshotState, StoreState, Stored,
    TableLine, Users,
};
use crate::process::ACCEPT_ORIGIN;

/// What the machine looks like.
#[derive(Debug, Default)]
pub struct State {
    /// Everything that was done, one line each.
    pub log: Vec<String>,
    /// The call that fails: a line as in `log`.
    pub fail: Option<String>,
    /// Whether the kernel has the target.
    pub no_dm_target: bool,
    /// Block devices.
    pub devices: BTreeMap<PathBuf, Dev>,
    /// Those of them that have nothing in them.
    pub empty: BTreeSet<Dev>,
    /// Paths of devices somebody holds.
    pub held: BTreeSet<PathBuf>,
    /// What the devices of the volume and its snapshots hold.
    pub contents: Option<Contents>,
    /// What single nodes hold.
    pub node_contents: BTreeMap<PathBuf, Contents>,
    /// Pairs of devices that share blocks.
    pub overlaps: BTreeSet<(PathBuf, PathBuf)>,
    /// Sector sizes that are known, in bytes.
    pub sectors: BTreeMap<PathBuf, u32>,
    /// Who uses a device lastingly.
    pub users: BTreeMap<Dev, Vec<String>>,
    /// Calls that are refused as busy so many times: lines as in `log`.
    pub briefly_busy: BTreeMap<String, u32>,
    /// Mount options that no file system knows, and whether mount(8) is so old that it does not say which.
    pub unknown_options: BTreeSet<String>,
    /// See `unknown_options`.
    pub old_mount: bool,
    /// Snapshots that lost their data.
    pub squashed: BTreeSet<u32>,
    /// Snapshots of an origin that was written without the server.
    pub doubtful: BTreeSet<u32>,
    /// Bookmarks.
    pub bookmarks: BTreeSet<u32>,
    /// Snapshots that become bookmarks when they are given up.
    pub to_bookmark: BTreeSet<u32>,
    /// Pauses made.
    pub pauses: u32,
    /// Running processes by their pid files, with their numbers.
    pub processes: BTreeMap<PathBuf, (&'static str, u32)>,
    /// Writing ends whose closing is the end of a process.
    pub alive: BTreeMap<u32, OwnedFd>,
    /// Which store lies under the store's name, if not [`STORE`].
    pub store: Option<Uuid>,
    /// What the store has: tag and sequence.
    pub snapshots: BTreeMap<u32, u64>,
    /// Device-mapper devices.
    pub dm: BTreeMap<String, (Dev, String, TableLine)>,
    /// Those of them that are suspended.
    pub suspended: BTreeSet<String>,
    /// Mounts.
    pub mounts: Vec<Mount>,
    /// Mount points in use.
    pub busy: BTreeSet<PathBuf>,
    /// Devices of which somebody still has a mount that was detached.
    pub detached: BTreeSet<Dev>,
    /// Frozen mount points.
    pub frozen: BTreeSet<PathBuf>,
    /// Snapshots taken while something was frozen.
    pub taken_frozen: BTreeSet<u32>,
    /// Why the running server's store has failed.
    pub fault: Option<String>,
    /// What a server says to a probe.
    pub probe: Option<Probe>,
    /// A process that a signal has stopped.
    pub stopped: Option<Kind>,
    /// Priorities of snapshots, if not 0.
    pub priorities: BTreeMap<u32, i8>,
    /// The server dies in the next revert, which it has begun or not.
    pub lose_revert: Option<bool>,
    /// What the server is reverting to.
    pub reverting: Option<u32>,
    /// Length of the origin, if not [`ORIGIN_SECTORS`].
    pub origin_sectors: Option<u64>,
    /// So many times nobody listens at the server's socket.
    pub absent_server: u32,
    /// How often something was looked up.
    pub lookups: u32,
    /// What the clock says, if not 2026-11-22 03:04:05.
    pub now: Option<Zoned>,
    /// So much later it is when a snapshot has been created, in seconds.
    pub creating_takes: i64,
    next: u32,
}

/// Length of origin and snapshots.
pub const ORIGIN_SECTORS: u64 = 204_800;

/// The store that a volume is defined with.
pub const STORE: Uuid = Uuid::from_u128(0x0570_4e00);

/// A call that waits, and what it waits for.
#[derive(Debug)]
struct Stall {
    line: String,
    reached: mpsc::Sender<()>,
    go: mpsc::Receiver<()>,
}

/// The fake.
#[derive(Debug, Default)]
pub struct Fake {
    state: Mutex<State>,
    stall: Mutex<Option<Stall>>,
    /// What the guard of a freeze would thaw.
    armed: Arc<Mutex<BTreeSet<usize>>>,
}

struct Guard(Arc<Mutex<BTreeSet<usize>>>);

impl FreezeGuard for Guard {
    fn arm(&mut self, number: usize) -> Result<()> {
        let mut armed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        armed.insert(number);
        Ok(())
    }

    fn disarm(&mut self, number: usize) -> Result<()> {
        let mut armed = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        armed.remove(&number);
        Ok(())
    }
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

    fn lookup(&self) {
        self.state().lookups += 1;
    }

    /// Ends a process from outside.
    pub fn kill(&self, kind: Kind) {
        let mut state = self.state();
        let state = &mut *state;
        state.processes.retain(|_, (running, pid)| {
            let goes = *running == key(kind);
            if goes {
                state.alive.remove(pid);
            }
            !goes
        });
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

    /// Makes the next call that is `line`, as in the log, wait. The receiver hears when it is reached; it goes
    /// on when the sender is used or gone.
    pub fn stall(&self, line: &str) -> (mpsc::Receiver<()>, mpsc::Sender<()>) {
        let (reached, hears) = mpsc::channel();
        let (sender, go) = mpsc::channel();
        let line = line.to_string();
        let mut stall = self.stall.lock().expect("no test panics here");
        *stall = Some(Stall { line, reached, go });
        (hears, sender)
    }

    /// What a full store does to a snapshot; true if it may.
    pub fn give_up(&self, tag: u32) -> bool {
        let mut state = self.state();
        if state.priorities.get(&tag) == Some(&127) {
            return false;
        }
        if state.to_bookmark.remove(&tag) {
            state.bookmarks.insert(tag);
        } else {
            state.snapshots.remove(&tag);
        }
        true
    }

    /// Notes a call; fails it if it is the one to fail.
    fn call(&self, line: String) -> Result<MutexGuard<'_, State>> {
        let mut stall = self.stall.lock().expect("no test panics here");
        let stalled = stall.take_if(|s| s.line == line);
        drop(stall);
        if let Some(stalled) = stalled {
            let _ = stalled.reached.send(());
            // A test that fails must end all the same.
            let _ = stalled.go.recv_timeout(Duration::from_secs(60));
        }
        let mut state = self.state();
        let fails = state.fail.as_ref() == Some(&line);
        state.log.push(line.clone());
        if let Some(left) = state.briefly_busy.get_mut(&line).filter(|left| **left > 0) {
            *left -= 1;
            let mut users = Users::default();
            users.processes.push("blkid[4712]".to_string());
            return Err(users.busy(line).into());
        }
        if fails {
            Err(anyhow!("{line} failed"))
        } else {
            Ok(state)
        }
    }
}

impl Host for Fake {
    fn ensure_dm_target(&self) -> Result<()> {
        if self.state().no_dm_target {
            bail!("{}", crate::dm::missing_target("1.2.3"));
        }
        Ok(())
    }

    fn block_device(&self, path: &Path) -> Result<Dev> {
        self.lookup();
        let found = self.state().devices.get(path).copied();
        found.with_context(|| format!("device '{}' does not exist", path.display()))
    }

    fn is_empty(&self, dev: Dev) -> bool {
        self.state().empty.contains(&dev)
    }

    fn settle(&self) {}

    fn announce(&self, _path: &Path) {}

    fn stable_path(&self, path: &Path) -> Result<PathBuf> {
        Ok(path.to_path_buf())
    }

    fn check_unused(&self, path: &Path) -> Result<()> {
        if self.state().held.contains(path) {
            let mut users = Users::default();
            users.lasting.push("a mount on /srv".to_string());
            return Err(users.busy(path.display().to_string()).into());
        }
        Ok(())
    }

    fn holders(&self, dev: Dev) -> Vec<String> {
        self.state().users.get(&dev).cloned().unwrap_or_default()
    }

    fn users(&self, dev: Dev) -> Users {
        Users {
            lasting: self.holders(dev),
            processes: Vec::new(),
        }
    }

    fn stacked_on(&self, dev: Dev) -> Vec<Dev> {
        vec![dev]
    }

    fn overlap(&self, one: &Path, other: &Path) -> bool {
        let pair = |a: &Path, b: &Path| (a.to_path_buf(), b.to_path_buf());
        let state = self.state();
        state.overlaps.contains(&pair(one, other)) || state.overlaps.contains(&pair(other, one))
    }

    fn sector_bytes(&self, path: &Path) -> Option<u32> {
        self.state().sectors.get(path).copied()
    }

    fn size_bytes(&self, path: &Path) -> Result<u64> {
        self.block_device(path).map(|_| 1 << 30)
    }

    fn zero(&self, path: &Path, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<()> {
        drop(self.call(format!("zero {}", path.display()))?);
        progress(1, 1)
    }

    fn contents(&self, node: &Path) -> Result<Contents> {
        let state = self.state();
        let mapped = state
            .contents
            .as_ref()
            .filter(|_| node.starts_with("/dev/mapper"));
        let own = state.node_contents.get(node).or(mapped);
        Ok(own.cloned().unwrap_or(Contents::Blank))
    }

    fn flush(&self, _node: &Path) -> Result<()> {
        self.call("flush".to_string()).map(|_| ())
    }

    fn store_uuid(&self, path: &Path) -> Result<Option<Uuid>> {
        self.block_device(path)?;
        Ok(Some(self.state().store.unwrap_or(STORE)))
    }

    fn check_format(&self, devices: &Devices, _chunksize: &str, force: bool) -> Result<()> {
        let state = self.state();
        match state.node_contents.get(&devices.snapstore) {
            Some(found) if !force => bail!("{} holds {found}", devices.snapstore.display()),
            _ => Ok(()),
        }
    }

    fn format(&self, devices: &Devices, chunksize: &str, _force: bool) -> Result<()> {
        self.call(format!(
            "format {} {chunksize}",
            devices.snapstore.display()
        ))
        .map(|_| ())
    }

    fn find_process(&self, spec: &ProcessSpec) -> Result<Option<u32>> {
        let found = self.state().processes.get(&spec.pidfile).copied();
        Ok(found.map(|(_, pid)| pid))
    }

    fn start_process(&self, spec: &ProcessSpec) -> Result<u32> {
        let accepting = spec.argv.iter().any(|word| word == ACCEPT_ORIGIN);
        let option = if accepting { " --accept-origin" } else { "" };
        let mut state = self.call(format!("start {}{option}", key(spec.kind)))?;
        state.next += 1;
        let pid = state.next;
        let process = (key(spec.kind), pid);
        if spec.kind == Kind::Server {
            // It has recovered from the disk.
            state.fault = None;
        }
        state.processes.insert(spec.pidfile.clone(), process);
        Ok(pid)
    }

    fn reopen_log(&self, _spec: &ProcessSpec) -> Result<()> {
        Ok(())
    }

    fn stop_process(&self, spec: &ProcessSpec) -> Result<()> {
        let mut state = self.call(format!("stop {}", key(spec.kind)))?;
        state.processes.remove(&spec.pidfile);
        Ok(())
    }

    fn kill_process(&self, spec: &ProcessSpec) -> Result<()> {
        drop(self.call(format!("kill {}", key(spec.kind)))?);
        self.kill(spec.kind);
        Ok(())
    }

    fn resume_process(&self, spec: &ProcessSpec) -> Result<Option<u32>> {
        let found = self.find_process(spec)?;
        let stopped = &mut self.state().stopped;
        Ok(found.filter(|_| stopped.take_if(|kind| *kind == spec.kind).is_some()))
    }

    fn probe_server(&self, spec: &ProcessSpec, _: &Path) -> Probe {
        match self.find_process(spec) {
            Ok(Some(_)) => self.state().probe.unwrap_or(Probe::Answers),
            _ => Probe::Absent,
        }
    }

    fn exit_fd(&self, pid: u32) -> Result<OwnedFd> {
        // A pipe polls readable (hung up) when its writing end is closed.
        let (reader, writer) = nix::unistd::pipe()?;
        let mut state = self.state();
        if state.processes.values().any(|(_, p)| *p == pid) {
            state.alive.insert(pid, writer);
        }
        Ok(File::from(reader).into())
    }

    fn create_snapshot(&self, _server: &Path, tag: u32) -> Result<()> {
        let mut state = self.call(format!("create {tag}"))?;
        let takes = jiff::Span::new().seconds(state.creating_takes);
        state.now = state.now.take().map(|now| now.saturating_add(takes));
        if !state.frozen.is_empty() {
            state.taken_frozen.insert(tag);
        }
        if state.snapshots.contains_key(&tag) {
            let reason = "snapshot already exists".to_string();
            let errno = nix::errno::Errno::EEXIST as i32;
            return Err(ddsnap::client::ClientError::Refused { errno, reason }.into());
        }
        let sequence = state
            .snapshots
            .values()
            .max()
            .map_or(1, |newest| newest + 1);
        state.snapshots.insert(tag, sequence);
        Ok(())
    }

    fn delete_snapshot(&self, _server: &Path, tag: u32) -> Result<()> {
        let mut state = self.call(format!("delete {tag}"))?;
        state.snapshots.remove(&tag);
        state.bookmarks.remove(&tag);
        state.to_bookmark.remove(&tag);
        state.priorities.remove(&tag);
        Ok(())
    }

    fn snapshots(&self, server: &Path) -> Result<Vec<Stored>> {
        self.lookup();
        let mut state = self.state();
        if state.absent_server > 0 {
            state.absent_server -= 1;
            let (socket, source) = (server.display().to_string(), io::ErrorKind::NotFound.into());
            return Err(ddsnap::client::ClientError::Connect { socket, source }.into());
        }
        let mut all: Vec<(u64, u32)> = state.snapshots.iter().map(|(t, s)| (*s, *t)).collect();
        all.sort_unstable();
        let stored = |(sequence, tag)| Stored {
            tag: SnapTag(tag),
            seq: SnapSeq(sequence),
            created: 0,
            priority: state.priorities.get(&tag).copied().unwrap_or(0),
            state: if state.squashed.contains(&tag) {
                SnapshotState::Squashed
            } else if state.bookmarks.contains(&tag) {
                SnapshotState::Bookmark
            } else {
                SnapshotState::Live
            },
            doubtful: state.doubtful.contains(&tag),
            to_bookmark: state.to_bookmark.contains(&tag),
            persistent_usecount: 0,
            devices: 0,
            sectors: 204_800,
        };
        Ok(all.into_iter().map(stored).collect())
    }

    fn store_state(&self, server: &Path) -> Result<StoreState> {
        Ok(StoreState {
            snapshots: self.snapshots(server)?,
            fault: self.state().fault.clone(),
            ..StoreState::default()
        })
    }

    fn set_priority(&self, _server: &Path, tag: u32, priority: i8) -> Result<()> {
        let mut state = self.call(format!("priority {tag} {priority}"))?;
        state.priorities.insert(tag, priority);
        Ok(())
    }

    fn set_to_bookmark(&self, _server: &Path, tag: u32, to_bookmark: bool) -> Result<()> {
        let mut state = self.call(format!("when full {tag} {to_bookmark}"))?;
        assert!(!state.bookmarks.contains(&tag), "{tag} is a bookmark");
        if to_bookmark {
            state.to_bookmark.insert(tag);
        } else {
            state.to_bookmark.remove(&tag);
        }
        Ok(())
    }

    fn reverting(&self, _server: &Path) -> Result<Option<u32>> {
        self.lookup();
        Ok(self.state().reverting)
    }

    fn revert(&self, _server: &Path, tag: u32, progress: &mut dyn FnMut(u64, u64)) -> Result<u64> {
        let state = self.call(format!("revert {tag}"))?;
        assert!(
            state.dm.is_empty(),
            "the server refuses while there is a device"
        );
        drop(state);
        progress(1, 2);
        let mut state = self.state();
        if let Some(begun) = state.lose_revert.take() {
            state.reverting = begun.then_some(tag);
            let (socket, source) = (String::new(), io::ErrorKind::ConnectionReset.into());
            return Err(ddsnap::client::ClientError::Lost { socket, source }.into());
        }
        // Goes on in the server whether this is waited for or not.
        state.reverting = None;
        Ok(0)
    }

    fn resize(
        &self,
        _server: &Path,
        sizes: &NewSizes,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Resized> {
        progress(1, 2);
        let mut state = self.call("resize".to_string())?;
        if let Some(origin) = sizes.origin {
            state.origin_sectors = Some(origin / 512);
        }
        Ok(Resized {
            origin: state.origin_sectors.unwrap_or(ORIGIN_SECTORS) * 512,
            store: sizes.store.unwrap_or(1 << 20),
            meta: sizes.meta.unwrap_or(1 << 20),
            refused: None,
        })
    }

    fn size_sectors(&self, _server: &Path, tag: Option<u32>) -> Result<u64> {
        self.lookup();
        let origin = self.state().origin_sectors.filter(|_| tag.is_none());
        Ok(origin.unwrap_or(ORIGIN_SECTORS))
    }

    fn geometry(&self, server: &Path) -> Result<Geometry> {
        let sectors = self.size_sectors(server, None)?;
        Ok(Geometry {
            chunk: ddsnap::units::ChunkShift::MAX,
            origin: ddsnap::units::Sectors(sectors),
        })
    }

    fn dm_find(&self, name: &str) -> Result<Option<DmDevice>> {
        self.lookup();
        let found = self.state().dm.get(name).cloned();
        Ok(found.map(|(dev, uuid, table)| DmDevice {
            dev,
            uuid: Some(uuid),
            table: Some(table),
        }))
    }

    fn dm_names(&self) -> Result<Vec<String>> {
        self.lookup();
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

    fn dm_reload(&self, name: &str, table: &TableLine) -> Result<()> {
        let mut state = self.call(format!("dm reload {name} {}", table.sectors))?;
        let device = state.dm.get_mut(name).context("no such device")?;
        device.2 = table.clone();
        Ok(())
    }

    fn dm_resume(&self, name: &str) -> Result<bool> {
        let mut state = self.state();
        let was = state.suspended.remove(name);
        if was {
            state.log.push(format!("dm resume {name}"));
        }
        Ok(was)
    }

    fn dm_remove(&self, name: &str) -> Result<()> {
        let mut state = self.call(format!("dm remove {name}"))?;
        let Some((dev, ..)) = state.dm.get(name).cloned() else {
            return Ok(());
        };
        if state.mounts.iter().any(|m| m.dev == dev) || state.detached.contains(&dev) {
            let device = format!("/dev/mapper/{name}");
            return Err(Users::default().busy(device).into());
        }
        state.dm.remove(name);
        Ok(())
    }

    fn dm_node(&self, name: &str, _dev: Dev) -> PathBuf {
        Path::new("/dev/mapper").join(name)
    }

    fn claim(&self, node: &Path) -> Result<Option<File>> {
        match self.state().held.contains(node) {
            true => Ok(None),
            false => Ok(Some(File::open("/dev/null")?)),
        }
    }

    fn mounts(&self) -> Result<Vec<Mount>> {
        self.lookup();
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
        let refused = options.iter().find(|o| state.unknown_options.contains(*o));
        if let Some(option) = refused {
            if state.old_mount {
                bail!("mount: wrong fs type, bad option, bad superblock");
            }
            bail!("mount: fsconfig() failed: {fstype}: Unknown parameter '{option}'.");
        }
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
            let mut users = Users::default();
            users.processes.push("bash[4711]".to_string());
            return Err(users.busy(format!("/dev/mapper/{name}")).into());
        }
        state.mounts.retain(|m| m.dir != dir);
        Ok(())
    }

    fn detach(&self, dir: &Path) -> Result<()> {
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        let mut state = self.call(format!("detach {name}"))?;
        state.busy.remove(dir);
        let mounts = std::mem::take(&mut state.mounts);
        let (gone, stay): (Vec<Mount>, _) = mounts.into_iter().partition(|m| m.dir == dir);
        state.mounts = stay;
        state.detached.extend(gone.iter().map(|m| m.dev));
        Ok(())
    }

    fn freeze_guard(&self, _: &[PathBuf]) -> Result<Box<dyn FreezeGuard>> {
        Ok(Box::new(Guard(self.armed.clone())))
    }

    fn freeze(&self, dir: &Path) -> Result<bool> {
        // Else nobody would thaw it if this process died now.
        let armed = self.armed.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(!armed.is_empty(), "frozen without a guard");
        drop(armed);
        self.call("freeze".to_string())?
            .frozen
            .insert(dir.to_path_buf());
        Ok(true)
    }

    fn thaw(&self, dir: &Path) -> Result<()> {
        self.call("thaw".to_string())?.frozen.remove(dir);
        Ok(())
    }

    fn now(&self) -> Zoned {
        let fixed = jiff::civil::date(2026, 11, 22).at(3, 4, 5, 0);
        let fixed = fixed.in_tz("Europe/Berlin").expect("a known time zone");
        self.state().now.clone().unwrap_or(fixed)
    }

    fn pause(&self, _time: Duration) {
        self.state().pauses += 1;
    }
}
