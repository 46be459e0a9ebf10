// SPDX-License-Identifier: GPL-2.0-only
//! One volume: its wanted state, its observed state, and the operations between them.
//!
//! Written against [`Host`] and a [`Layout`], so that all of it runs in tests. Whoever holds the
//! volume mutably is the only one to change it; the daemon sees to that with one lock per volume.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ddsnap::client::ClientError;
use ddsnap::probe::contents::Contents;
use ddsnap::stdio::complain;

use crate::boot_record;
use crate::config::{self, Snapshot, VolumeConfig};
use crate::exports;
use crate::host::Host;
use crate::layout::Layout;
use crate::machine::{
    Busy, DM_UUID_PREFIX, DmDevice, Kind, ProcessSpec, SnapshotState, Stored, TableLine, Users,
};
use crate::names;
use crate::plan::{self, Action, Device, Level, Observed, Report, Scope, Table, Wanted};
use crate::supervise::Supervisor;

mod arrival;
mod by_hand;
mod define;
mod doubt;
mod dry_run;
mod failover;
mod forget;
mod hold;
mod many;
mod master;
mod remount;
mod replica;
mod resize;
mod revert;
mod rotate;
mod show;
mod snapshot;
mod steps;
mod waiting;

pub use by_hand::HandWanted;
pub use define::DefineVolume;
pub use failover::superseded_line;
pub use master::MasterFlags;
pub use replica::{DefineSource, DefineTarget, Peer, check_host};
pub use rotate::{BUDGET_MAX, WantedRotation};

pub use crate::note::{Note, Out};

use waiting::Waiting;

/// A defined volume.
pub struct Volume {
    /// Its name.
    pub name: String,
    /// Its durable state, as the document has it.
    pub config: VolumeConfig,
    /// How far it shall be up.
    pub level: Level,
    /// Why volume or master are not up, in one line.
    pub failure: Option<String>,
    /// What else is wrong, with single snapshots for example; a line each.
    pub warnings: Vec<String>,
    /// What an administrator should know and need not worry about; a line each.
    pub notes: Vec<String>,
    /// A snapshot that is to be deleted when who looks at what changed until then has done so.
    momentary: Option<u32>,
    /// Keeps agent and server running.
    pub supervisor: Arc<Supervisor>,
    host: Arc<dyn Host>,
    layout: Layout,
    waiting: Waiting,
    /// Snapshots that hold nothing to mount. That does not change.
    plain: BTreeMap<u32, String>,
    /// Snapshots that were taken for a target and are not offered to it yet. The next daemon takes others.
    unpinned: BTreeMap<String, u32>,
    /// The server is giving the origin the content of this snapshot.
    pub reverting: Option<u32>,
    /// An origin that was written without its server is accepted by what is being done now.
    accept_origin: bool,
    /// For formatting the store; the store itself knows it from then on.
    chunksize: Option<String>,
    /// The document is to say which store it is, and does not yet.
    store_learned: bool,
    /// Formatting and zeroing may overwrite what is recognised.
    force: bool,
    /// Fails when what takes long is to end.
    check: Check,
}

/// Fails when what takes long is to end.
pub type Check = Arc<dyn Fn() -> Result<()> + Send + Sync>;

/// Where the volumes are, for jobs, which change one now and then.
pub trait Volumes: Send + Sync {
    /// Does `change` to volume `name`, alone, and publishes what came of it.
    ///
    /// # Errors
    /// There is no such volume, or that of `change`.
    fn with(&self, name: &str, change: &mut dyn FnMut(&mut Volume) -> Result<()>) -> Result<()>;
}

/// How often and after which pause what is busy is tried again. A short opener, as udev's blkid after
/// each event, is gone by then; what lasts is not waited for at all.
const TRIES: u32 = 40;
const TRY_PAUSE: Duration = Duration::from_millis(200);

impl Volume {
    /// The volume `name` with `config`; nothing is touched.
    pub fn new(
        host: Arc<dyn Host>,
        layout: &Layout,
        name: &str,
        config: VolumeConfig,
    ) -> Result<Volume> {
        let agent = agent_spec(layout, name);
        let server = server_spec(layout, name, &config);
        let supervisor = Supervisor::new(
            host.clone(),
            name,
            agent,
            server,
            &layout.server_socket(name),
            (config.device.superblock(), config.store),
        )?;
        Ok(Volume {
            name: name.to_string(),
            config,
            level: Level::Down,
            failure: None,
            warnings: Vec::new(),
            notes: Vec::new(),
            momentary: None,
            supervisor,
            host,
            layout: layout.clone(),
            waiting: Waiting::Nothing,
            plain: BTreeMap::new(),
            unpinned: BTreeMap::new(),
            reverting: None,
            accept_origin: false,
            chunksize: None,
            store_learned: false,
            force: false,
            check: Arc::new(|| Ok(())),
        })
    }

    /// How far up a volume with this configuration belongs after a boot.
    #[must_use]
    pub fn full_level(&self) -> Level {
        let shown = self
            .config
            .source
            .as_ref()
            .is_some_and(|source| source.mount);
        if self.config.master.is_some() || shown {
            Level::Mounted
        } else {
            Level::Devices
        }
    }

    fn snapshots(&self) -> &[Snapshot] {
        &self.config.snapshots.list
    }

    fn wanted(&self, level: Level) -> Wanted {
        let tags: Vec<u32> = self.snapshots().iter().map(|s| s.id).collect();
        let mut wanted = Wanted::at(level, &tags, false);
        if self.config.source.is_some() {
            // Of a replica nothing is mounted but twins: what arrives is written to by replication alone.
            wanted.mounts.clear();
        }
        if level == Level::Mounted {
            for tag in self.mountable_tags() {
                wanted.devices.insert(Some(tag));
                wanted.mounts.insert(Some(tag));
            }
        }
        wanted
    }

    fn save(&self) -> Result<()> {
        config::save(&self.layout, &self.name, &self.config)?;
        self.record_for_boot();
        Ok(())
    }

    /// Sees to it that the next boot finds the volume. A read-only /etc is no reason to fail: then the volume
    /// comes up with the daemon, later. Says whether the record is new.
    fn record_for_boot(&self) -> bool {
        let written = boot_record::record(&self.layout, &self.name, &self.config);
        if let Err(error) = &written {
            self.log(&format!(
                "WARNING: it will not be up before the daemon at boot: {error:#}"
            ));
        }
        written.unwrap_or(false)
    }

    /// Notes which store is the volume's, unless that is known: the one that its server was let at, or is going to be, for
    /// the first time. It is saved with the next change, or by [`refresh`](Self::refresh): what comes up at boot may have
    /// only a part of the document.
    fn learn_store(&mut self) -> Result<()> {
        if self.config.store.is_none() {
            self.config.store = self.host.store_uuid(self.config.device.superblock())?;
            self.store_learned = self.config.store.is_some();
            if let Some(uuid) = self.config.store {
                self.supervisor.expect_store(uuid);
            }
        }
        Ok(())
    }

    /// Brings up to date what was made before the daemon started: a document or boot record of an earlier
    /// version, and the logs of processes that were started before /var was mounted.
    pub fn refresh(&mut self) {
        if self.config.upgraded_from.is_some() || self.store_learned {
            match self.save() {
                Ok(()) => (self.config.upgraded_from, self.store_learned) = (None, false),
                Err(error) => {
                    self.log(&format!("WARNING: its document stays as it was: {error:#}"))
                }
            }
        }
        if self.record_for_boot() {
            self.announce();
        }
        for spec in [
            agent_spec(&self.layout, &self.name),
            server_spec(&self.layout, &self.name, &self.config),
        ] {
            if let Err(error) = self.host.reopen_log(&spec) {
                self.log(&format!("could not have a log opened again: {error:#}"));
            }
        }
    }

    /// Where a device of the volume is mounted.
    fn mountpoint(&self, which: Device) -> PathBuf {
        let shown = which.is_some() && which == self.twin();
        let which = which.filter(|_| !shown);
        match (which, &self.config.filesystem.mountpoint) {
            (None, Some(dir)) => dir.clone(),
            _ => self
                .layout
                .mountpoint(&names::device_name(&self.name, which)),
        }
    }

    /// Warns of exports over NFS that clients cannot tell apart.
    pub fn warn_of_exports(&self, out: Out) {
        let warning = exports::warning(
            &self.layout,
            &mountpoints(&self.layout, &self.name, &self.config),
        );
        if let Some(text) = warning {
            out(Note::Warning(text));
        }
    }

    /// The directory that really holds the snapshot links.
    fn links_dir(&self) -> PathBuf {
        let standard = || self.layout.snapshot_links(&self.name);
        self.config
            .filesystem
            .snappath
            .clone()
            .unwrap_or_else(standard)
    }

    fn log(&self, text: &str) {
        complain(format_args!("{}: {text}", self.name));
        let time = names::local_time(&self.host.now());
        append_log(&self.layout, &self.name, &time, text);
    }

    fn dm_uuid(&self, which: Device) -> String {
        let id = which.map_or_else(|| "origin".to_string(), |tag| tag.to_string());
        format!("{}{id}", self.dm_uuid_prefix())
    }

    fn dm_uuid_prefix(&self) -> String {
        format!("{DM_UUID_PREFIX}{}-", self.config.uuid.simple())
    }

    /// The table a device should have, but for its length.
    fn table(&self, which: Device, sectors: u64) -> Result<TableLine> {
        Ok(TableLine {
            sectors,
            snapstore: self.host.block_device(&self.config.device.snapstore)?,
            origin: self.host.block_device(&self.config.device.origin)?,
            agent: self
                .layout
                .agent_socket(&self.name)
                .to_string_lossy()
                .into_owned(),
            id: which,
        })
    }

    /// The volume's devices as device-mapper has them.
    fn devices(&self) -> Result<Vec<(Device, DmDevice)>> {
        let mut found = Vec::new();
        for name in self.host.dm_names()? {
            let which = match names::parse_snapshot_device(&name) {
                Some((volume, tag)) if volume == self.name => Some(tag),
                None if name == self.name => None,
                _ => continue,
            };
            if let Some(device) = self.host.dm_find(&name)? {
                found.push((which, device));
            }
        }
        Ok(found)
    }

    /// Looks at the machine.
    fn observe(&self) -> Result<Observed> {
        // Once for all devices, which differ in the snapshot alone.
        let wanted = self.table(None, 0).ok();
        let mut observed = Observed {
            agent: self
                .supervisor
                .is_running(&agent_spec(&self.layout, &self.name)),
            server: self.supervisor.is_running(&server_spec(
                &self.layout,
                &self.name,
                &self.config,
            )),
            links: self.layout.mount_link(&self.name).is_symlink(),
            ..Observed::default()
        };
        let mounts = self.host.mounts()?;
        for (which, device) in self.devices()? {
            let ours = device
                .uuid
                .as_ref()
                .is_some_and(|u| u.starts_with(&self.dm_uuid_prefix()));
            let right = match (&device.table, &wanted) {
                (Some(found), Some(wanted)) => found.same_mapping(&TableLine {
                    id: which,
                    ..wanted.clone()
                }),
                // The devices' paths are gone while the device lives on them: nothing to compare.
                (Some(_), None) => ours,
                (None, _) => false,
            };
            if !right && !ours {
                let name = names::device_name(&self.name, which);
                bail!("the device-mapper device '{name}' exists and belongs to somebody else");
            }
            observed
                .devices
                .insert(which, if right { Table::Right } else { Table::Wrong });
            let dir = self.mountpoint(which);
            if mounts.iter().any(|m| m.dir == dir && m.dev == device.dev) {
                observed.mounts.insert(which);
            }
        }
        Ok(observed)
    }

    /// Brings the volume up to `level`, or as far as it goes. Failures of mounts and snapshots are
    /// in the report; the volume's own are an error.
    pub fn up(&mut self, level: Level, out: Out) -> Result<Report> {
        if level > Level::Processes {
            self.check_not_reverting()?;
        }
        self.level = level;
        self.waiting = Waiting::Nothing;
        self.warnings.clear();
        self.notes.clear();
        let result = self.try_up(level, out);
        self.failure = match &result {
            Err(error) => Some(format!("{error:#}")),
            Ok(report) => report
                .failure(Scope::Master)
                .map(|e| describe(Scope::Master, e)),
        };
        if let Ok(report) = &result {
            let of_snapshots = report.failures.iter().filter(|f| f.0 != Scope::Master);
            let lines = of_snapshots.map(|f| describe(f.0, &f.2));
            self.warnings.extend(lines);
        }
        for trouble in self.failure.iter().chain(&self.warnings) {
            self.log(&format!("not all is up: {trouble}"));
        }
        if let Some(waiting) = self.waiting_after(&result) {
            self.waiting = waiting;
        }
        result
    }

    fn try_up(&mut self, level: Level, out: Out) -> Result<Report> {
        self.check_devices()?;
        self.host.ensure_dm_target()?;
        self.patiently(|| self.check_claims())?;
        for action in plan::FIRST {
            self.perform(action, out)?;
        }
        let server = self.layout.server_socket(&self.name);
        if let Some(tag) = self.patiently(|| self.host.reverting(&server))? {
            self.reverting = Some(tag);
            self.level = Level::Processes;
            self.check_not_reverting()?;
        }
        let stored = self.settle_snapshots()?;
        if let Err(error) = self.unmount_old_twin() {
            self.warn(format!("an older snapshot is still shown: {error:#}"));
        }
        let observed = self.observe()?;
        let mut wanted = self.wanted(level);
        self.leave_out(&mut wanted, &observed, &stored);
        let steps = plan::plan(&wanted, &observed);
        let mut report = self.carry_out(&steps, out);
        let volume = report.failures.iter().position(|f| f.0 == Scope::Volume);
        match volume {
            Some(index) => Err(report.failures.swap_remove(index).2),
            None => Ok(report),
        }
    }

    /// Takes out of `wanted` what cannot be had: devices of squashed snapshots and of bookmarks, mounts where
    /// there is nothing to mount. What is there already stays.
    fn leave_out(&mut self, wanted: &mut Wanted, observed: &Observed, stored: &[Stored]) {
        for found in stored.iter().filter(|s| s.state != SnapshotState::Live) {
            let tag = found.tag.0;
            let which = Some(tag);
            if !observed.devices.contains_key(&which) {
                wanted.devices.remove(&which);
            }
            if !observed.mounts.contains(&which) {
                wanted.mounts.remove(&which);
            }
            let listed = self.snapshots().iter().any(|s| s.id == tag);
            match found.state {
                SnapshotState::Squashed if listed => {
                    self.warnings.push(squashed_line(&self.name, tag));
                }
                SnapshotState::Bookmark if listed => self.notes.push(bookmark_line(tag)),
                _ => {}
            }
        }
        for tag in self.plain.keys() {
            wanted.mounts.remove(&Some(*tag));
        }
    }

    /// For an administrator who has mended the store's device: a server whose store has failed refuses all, for good, and what is
    /// mounted keeps the volume from being stopped. The next one takes its place.
    ///
    /// # Errors
    /// The next one did not start, most likely because the device fails still.
    pub fn replace_failed_server(&mut self, out: Out) -> Result<()> {
        if !self.server_runs() {
            return Ok(());
        }
        let state = self
            .host
            .store_state(&self.layout.server_socket(&self.name));
        // One that does not answer is the supervisor's business.
        let Some(fault) = state.ok().and_then(|state| state.fault) else {
            return Ok(());
        };
        self.log(&format!(
            "the snapshot store had failed ({fault}); its server is replaced"
        ));
        self.supervisor.replace_server().with_context(|| {
            format!(
                "the snapshot store had failed: {fault}; its server was ended, and the next one does not run yet"
            )
        })?;
        let line = format!(
            "the snapshot store had failed ({fault}): its server was replaced, and the next one has recovered it"
        );
        out(Note::Line(line));
        Ok(())
    }

    /// Does `operation`, in which an origin that was written without its server may be accepted.
    pub fn accepting<T>(
        &mut self,
        accept_origin: bool,
        operation: impl FnOnce(&mut Volume) -> T,
    ) -> T {
        self.accept_origin = accept_origin;
        let result = operation(self);
        self.accept_origin = false;
        result
    }

    /// Brings the volume down to `level`, or, if anything of it is in use, leaves all as it was.
    pub fn down(&mut self, level: Level, out: Out) -> Result<()> {
        let before = self.level;
        self.unmount_old_twin()?;
        let steps = plan::down(&self.wanted(level), &self.observe()?);
        self.check_unheld(&steps)?;
        for part in plan::parts(&steps) {
            let Some((_, _, error)) = self.carry_out_part(part, out).into_iter().next() else {
                continue;
            };
            self.log(&format!("not all is down: {error:#}"));
            // What did go comes back. The cause of the refusal matters more than trouble with that.
            if let Err(again) = self.start(before, out) {
                let text = format!("and it could not be brought back: {again:#}");
                out(Note::Warning(text));
            }
            return Err(error);
        }
        self.level = level;
        self.failure = None;
        self.warnings.clear();
        self.notes.clear();
        self.waiting = Waiting::Nothing;
        // The next server tells whether it goes on.
        self.reverting.take_if(|_| level == Level::Down);
        Ok(())
    }

    /// Before anything is taken down: names who uses devices that are to go and will not let go by
    /// itself. Our own mounts are not meant.
    fn check_unheld(&self, steps: &[Action]) -> Result<()> {
        let mounts = self.host.mounts()?;
        for action in steps {
            let Action::RemoveDevice(which) = *action else {
                continue;
            };
            let name = names::device_name(&self.name, which);
            let Some(device) = self.host.dm_find(&name)? else {
                continue;
            };
            let own = self.mountpoint(which);
            let foreign = mounts
                .iter()
                .filter(|m| m.dev == device.dev && m.dir != own);
            let foreign = foreign.map(|m| format!("a mount on {}", m.dir.display()));
            let lasting: Vec<String> = foreign.chain(self.host.holders(device.dev)).collect();
            if !lasting.is_empty() {
                let users = Users {
                    lasting,
                    processes: Vec::new(),
                };
                return Err(users.busy(format!("/dev/mapper/{name}")).into());
            }
        }
        Ok(())
    }

    /// Does what may be refused for a moment because somebody has just looked at a device.
    fn patiently<T>(&self, act: impl FnMut() -> Result<T>) -> Result<T> {
        retry(self.host.as_ref(), act)
    }

    /// Thaws what a daemon that was killed while taking a snapshot left frozen.
    ///
    /// Only for a daemon's start: later, a frozen file system is an administrator's doing.
    pub fn thaw_leftovers(&self) -> Result<()> {
        if let Some(device) = self.host.dm_find(&self.name)? {
            for dir in self.mounts_on(device.dev)? {
                self.host.thaw(&dir)?;
            }
        }
        Ok(())
    }

    fn origin_is(&self, kind: &str) -> bool {
        matches!(self.origin_contents(), Some(Contents::Known(known)) if known.kind == kind)
    }

    fn origin_contents(&self) -> Option<Contents> {
        let device = self.host.dm_find(&self.name).ok()??;
        let node = self.host.dm_node(&self.name, device.dev);
        self.host.contents(&node).ok()
    }

    /// Whether the server runs, asked of the machine.
    #[must_use]
    pub fn server_runs(&self) -> bool {
        let spec = server_spec(&self.layout, &self.name, &self.config);
        self.supervisor.is_running(&spec)
    }
}

/// Whether what failed may succeed in some seconds: somebody has a device open and is none who stays, or the
/// server is being started again.
fn may_pass(error: &anyhow::Error) -> bool {
    let busy = error.downcast_ref::<Busy>().is_some_and(|b| !b.lasting);
    let server = error.downcast_ref::<ClientError>();
    busy || server.is_some_and(ClientError::is_connect)
}

/// Tries again what failed and [`may_pass`].
fn retry<T>(host: &dyn Host, mut act: impl FnMut() -> Result<T>) -> Result<T> {
    for _ in 1..TRIES {
        match act() {
            Err(error) if may_pass(&error) => host.pause(TRY_PAUSE),
            done => return done,
        }
    }
    act()
}

/// What there is to say of a replica's origin that somebody has.
#[must_use]
pub fn in_use_line(node: &std::path::Path) -> String {
    format!(
        "{0} is in use: a replica's origin is for replication alone; `lsblk {0}` and `fuser -v {0}` may tell by what",
        node.display()
    )
}

/// What there is to say of a snapshot that lost its data.
#[must_use]
pub fn squashed_line(volume: &str, tag: u32) -> String {
    format!(
        "snapshot {tag} is squashed: its data was given up when the store was full; `zumastor forget \
         snapshot {volume} {tag}` takes it out of the list"
    )
}

/// What there is to say of a snapshot that became a bookmark.
#[must_use]
pub fn bookmark_line(tag: u32) -> String {
    format!(
        "snapshot {tag} is a bookmark: its data was given up when the store was full; the next increment starts \
         from it all the same"
    )
}

/// What there is to say of a snapshot that may show what was written behind the volume's back.
#[must_use]
pub fn doubtful_line(tag: u32) -> String {
    format!(
        "snapshot {tag} is doubtful: the origin was written without the volume, so it may show newer data as if \
         it were old"
    )
}

/// Where a volume and its snapshots are mounted, or would be.
#[must_use]
pub fn mountpoints(layout: &Layout, volume: &str, config: &VolumeConfig) -> Vec<PathBuf> {
    let own = &config.filesystem.mountpoint;
    let own = own.clone().unwrap_or_else(|| layout.mountpoint(volume));
    let snapshots = config.snapshots.list.iter();
    let tags = snapshots.flat_map(|s| [Some(s.id), s.twin]).flatten();
    let dirs = tags.map(|tag| layout.mountpoint(&names::device_name(volume, Some(tag))));
    std::iter::once(own).chain(dirs).collect()
}

/// A failure with the part of the volume it belongs to.
fn describe(scope: Scope, error: &anyhow::Error) -> String {
    match scope {
        Scope::Volume => format!("{error:#}"),
        Scope::Master => format!("could not mount: {error:#}"),
        Scope::Snapshot(tag) => format!("snapshot {tag}: {error:#}"),
    }
}

fn append_log(layout: &Layout, volume: &str, time: &str, text: &str) {
    use std::io::Write;
    let path = layout.logs(volume).join("master.log");
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path);
    // The journal has the line as well; a full /var must not stop a volume.
    if let Ok(mut file) = file {
        let _ = writeln!(file, "{time} zumastor[{}]: {text}", std::process::id());
    }
}

/// How the agent of `volume` is started.
#[must_use]
pub fn agent_spec(layout: &Layout, volume: &str) -> ProcessSpec {
    let pidfile = layout.agent_pid(volume);
    let argv = vec![
        "ddsnap".into(),
        "agent".into(),
        layout.agent_socket(volume).into(),
        "-l".into(),
        layout.logs(volume).join("agent.log").into(),
        "-p".into(),
        pidfile.clone().into(),
    ];
    ProcessSpec {
        kind: Kind::Agent,
        argv,
        pidfile,
    }
}

/// How the server of `volume` is started.
#[must_use]
pub fn server_spec(layout: &Layout, volume: &str, config: &VolumeConfig) -> ProcessSpec {
    let pidfile = layout.server_pid(volume);
    let mut argv: Vec<std::ffi::OsString> = vec!["ddsnap".into(), "server".into()];
    if let Some(cache) = &config.cachesize {
        argv.extend(["-k".into(), cache.into()]);
    }
    argv.extend(["-l".into(), layout.logs(volume).join("server.log").into()]);
    argv.extend(["-p".into(), pidfile.clone().into()]);
    argv.push(config.device.snapstore.clone().into());
    argv.push(config.device.origin.clone().into());
    argv.extend(config.device.meta.clone().map(Into::into));
    argv.push(layout.agent_socket(volume).into());
    argv.push(layout.server_socket(volume).into());
    ProcessSpec {
        kind: Kind::Server,
        argv,
        pidfile,
    }
}

/// Loads the volume called `name`, with a message that says how to see the defined ones.
pub fn load(host: Arc<dyn Host>, layout: &Layout, name: &str) -> Result<Volume> {
    let config =
        config::load(layout, name)?.with_context(|| format!("'{name}' is not a managed volume"))?;
    Volume::new(host, layout, name, config)
}

#[cfg(test)]
mod tests;
