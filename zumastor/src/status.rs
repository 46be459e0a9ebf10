// SPDX-License-Identifier: GPL-2.0-only
//! What `zumastor status` and `zumastor list` print: [`table`] for people, [`json`] for programs, of
//! [`replication`] too, and here
//! what `--full` adds.
//!
//! The tree under `Configuration:` is the one the original's database had on disk, so that people
//! and scripts find what they know; here it is made from the volume's document.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use replication::NextCycle;
use serde::{Deserialize, Serialize};

use crate::config::{self, Devices, Filesystem, Lineage, Snapshots, Source, Target, VolumeConfig};
use crate::exports;
use crate::host::Host;
use crate::human;
use crate::jobs::{JobState, JobView};
use crate::layout::Layout;
use crate::machine::{SnapshotState, StoreState};
use crate::plan::Level;
use crate::volume::{
    DefineVolume, Volume, bookmark_line, doubtful_line, mountpoints, server_spec, squashed_line,
    superseded_line,
};

pub mod json;
pub mod replication;
pub mod table;

/// Blanks per level of a tree.
const INDENT: usize = 3;
/// Longest file shown whole; what is in the runtime directory is a line or nothing.
const CONTENTS_MAX_BYTES: usize = 4096;

/// Sizes of a store, and which of its snapshots are not as they should be.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreView {
    /// Length of the origin.
    pub origin_bytes: u64,
    /// Room for snapshot data.
    pub data_bytes: u64,
    /// What of it is used.
    pub used_bytes: u64,
    /// Listed snapshots that are not as they should be.
    pub unwell: Vec<(u32, SnapshotHealth)>,
}

/// How a listed snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum SnapshotHealth {
    /// As it should be.
    Fine,
    /// It lost its data to a full store.
    Squashed,
    /// It lost its data to a full store, and replication goes on from it.
    Bookmark,
    /// It may show what was written behind the volume's back.
    Doubtful,
    /// The store does not have it.
    Missing,
}

/// What is known of a volume without waiting for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct View {
    /// Its name.
    pub name: String,
    /// Whether it shall be up.
    pub up: bool,
    /// Why it is not up, if it should be.
    pub failure: Option<String>,
    /// What else is wrong, a line each.
    #[serde(default)]
    pub warnings: Vec<String>,
    /// What an administrator should know and need not worry about, a line each.
    #[serde(default)]
    pub notes: Vec<String>,
    /// What its server says of its store, if it answers.
    #[serde(default)]
    pub store: Option<StoreView>,
    /// Long work under way, and how the last of each name ended.
    #[serde(default)]
    pub jobs: Vec<JobView>,
    /// Cycles of replication that come by themselves, and when.
    #[serde(default)]
    pub due: Vec<NextCycle>,
    /// Its document, if it can be read.
    pub config: Option<VolumeConfig>,
}

impl View {
    /// The volume as it is now.
    #[must_use]
    pub fn of(volume: &Volume) -> View {
        let mut warnings = volume.warnings.clone();
        warnings.extend(superseded_line(&volume.name, &volume.config.lineage));
        View {
            name: volume.name.clone(),
            up: volume.level > Level::Down,
            failure: volume.failure.clone(),
            warnings,
            notes: volume.notes.clone(),
            store: None,
            jobs: Vec::new(),
            due: Vec::new(),
            config: Some(volume.config.clone()),
        }
    }

    fn empty(name: &str) -> View {
        View {
            name: name.to_string(),
            up: false,
            failure: None,
            warnings: Vec::new(),
            notes: Vec::new(),
            store: None,
            jobs: Vec::new(),
            due: Vec::new(),
            config: None,
        }
    }

    /// A volume that nobody has tried to start yet.
    #[must_use]
    pub fn starting(name: &str) -> View {
        View {
            notes: vec!["it is being started".into()],
            ..View::empty(name)
        }
    }

    /// A volume whose document is of no use.
    #[must_use]
    pub fn broken(name: &str, failure: &str) -> View {
        View {
            failure: Some(failure.to_string()),
            ..View::empty(name)
        }
    }

    /// A volume that is being defined: its devices count as taken.
    #[must_use]
    pub fn defining(request: &DefineVolume) -> View {
        let config = VolumeConfig {
            version: config::SCHEMA_VERSION,
            uuid: uuid::Uuid::nil(),
            lineage: Lineage::first(uuid::Uuid::nil()),
            device: Devices {
                origin: request.origin.clone(),
                snapstore: request.snapstore.clone(),
                meta: request.meta.clone(),
            },
            store: None,
            cachesize: request.cachesize.clone(),
            filesystem: Filesystem::default(),
            master: None,
            source: None,
            targets: Default::default(),
            schedule: Vec::new(),
            snapshots: Snapshots::default(),
            upgraded_from: None,
        };
        View {
            config: Some(config),
            notes: vec!["it is being defined".into()],
            ..View::empty(&request.volume)
        }
    }

    /// The volume as its document alone has it, when no daemon runs.
    #[must_use]
    pub fn from_document(layout: &Layout, name: &str) -> View {
        match config::load(layout, name) {
            Ok(config) => View {
                config,
                ..View::empty(name)
            },
            Err(error) => View::broken(name, &format!("{:#}", anyhow::Error::from(error))),
        }
    }

    /// Notes exports over NFS that clients cannot tell apart: they are made behind the daemon's back.
    pub fn check_exports(&mut self, layout: &Layout) {
        let Some(config) = self.config.as_ref().filter(|_| self.up) else {
            return;
        };
        let dirs = mountpoints(layout, &self.name, config);
        self.warnings.extend(exports::warning(layout, &dirs));
    }

    /// Notes if the server is not there although it should be.
    pub fn check_server(&mut self, host: &dyn Host, layout: &Layout) {
        let Some(config) = self
            .config
            .as_ref()
            .filter(|_| self.up && self.failure.is_none())
        else {
            return;
        };
        let spec = server_spec(layout, &self.name, config);
        if !matches!(host.find_process(&spec), Ok(Some(_))) {
            self.failure = Some("the snapshot server is gone and is being restarted".to_string());
            return;
        }
        match host.store_state(&layout.server_socket(&self.name)) {
            Ok(state) => self.add_state(&state),
            Err(error) => self.failure = Some(format!("{error:#}")),
        }
    }

    /// Adds what the server says now: much may have happened since the last operation.
    fn add_state(&mut self, state: &StoreState) {
        let name = &self.name;
        if let Some(fault) = &state.fault {
            self.failure = Some(format!(
                "the snapshot store has failed: {fault}; writes to /dev/mapper/{name} may fail: mend its \
                 device, then run `zumastor start volume {name}`, which starts the next server over it, whatever is \
                 mounted"
            ));
        } else if state.channel_lost {
            self.failure = Some(
                "the snapshot server has lost its channel to the kernel, /dev/ddsnap; I/O waits until it \
                 is back"
                    .to_string(),
            );
        }
        let mut unwell = Vec::new();
        let mut warnings: Vec<String> = state.space.iter().cloned().collect();
        for snapshot in self.config.iter().flat_map(|c| &c.snapshots.list) {
            let id = snapshot.id;
            match state.snapshots.iter().find(|s| snapshot.is(s)) {
                None => {
                    unwell.push((id, SnapshotHealth::Missing));
                    warnings.push(format!(
                        "the snapshot store no longer has snapshot {id}: `zumastor forget snapshot {name} {id}` \
                         takes it out of the list"
                    ));
                }
                Some(s) if s.state == SnapshotState::Squashed => {
                    unwell.push((id, SnapshotHealth::Squashed));
                    warnings.push(squashed_line(name, id));
                }
                Some(s) if s.state == SnapshotState::Bookmark => {
                    unwell.push((id, SnapshotHealth::Bookmark));
                    let line = bookmark_line(id);
                    if !self.notes.contains(&line) {
                        self.notes.push(line);
                    }
                }
                Some(s) if s.doubtful => {
                    unwell.push((id, SnapshotHealth::Doubtful));
                    warnings.push(doubtful_line(id));
                }
                Some(_) => {}
            }
        }
        self.store = Some(StoreView {
            origin_bytes: state.origin_bytes,
            data_bytes: state.data_bytes,
            used_bytes: state.used_bytes,
            unwell,
        });
        warnings.retain(|line| !self.warnings.contains(line));
        self.warnings.extend(warnings);
    }

    /// One word or two for its state.
    #[must_use]
    pub fn status(&self) -> &'static str {
        match (&self.failure, self.up) {
            (Some(_), _) => "failed",
            (None, true) => "running",
            (None, false) => "not running",
        }
    }

    /// What it is in replication.
    #[must_use]
    pub fn role(&self) -> &'static str {
        match &self.config {
            Some(config) if config.master.is_some() => "master",
            Some(config) if config.source.is_some() => "source",
            Some(_) | None => "none",
        }
    }

    /// How a listed snapshot is, if its server answers.
    #[must_use]
    pub fn health(&self, id: u32) -> Option<SnapshotHealth> {
        let store = self.store.as_ref()?;
        let found = store.unwell.iter().find(|u| u.0 == id);
        Some(found.map_or(SnapshotHealth::Fine, |u| u.1))
    }

    /// Its part of the full listing: with [`head`](Self::head); `usage` is the table of its store, if asked for.
    #[must_use]
    pub fn render(&self, usage: Option<&str>) -> String {
        let mut text = self.head();
        text += usage.unwrap_or_default();
        text += "Configuration:\n";
        if let Some(config) = &self.config {
            configuration(
                &mut Tree {
                    text: &mut text,
                    level: 1,
                },
                config,
            );
        }
        text
    }

    /// How it is: lines that scripts know.
    #[must_use]
    pub fn head(&self) -> String {
        let mut text = format!("VOLUME {}:\nStatus: {}\n", self.name, self.status());
        if let Some(failure) = &self.failure {
            text += &format!("Reason: {failure}\n");
        }
        for warning in &self.warnings {
            text += &format!("WARNING: {warning}\n");
        }
        let of_replication = replication::problems(self);
        for line in &of_replication.lines {
            text += &format!("WARNING: {line}\n");
        }
        for note in &self.notes {
            text += &format!("Note: {note}\n");
        }
        for job in self.jobs.iter().filter(|job| !of_replication.tells(job)) {
            text += &job_line(job).map_or_else(String::new, |line| format!("{line}\n"));
        }
        text
    }
}

/// What there is to say of a job; nothing of one that has ended well.
fn job_line(job: &JobView) -> Option<String> {
    let result = job.result.as_deref().unwrap_or_default();
    let (name, since) = (&job.name, human::utc(job.started));
    Some(match job.state {
        JobState::Done | JobState::Cancelled => return None,
        JobState::Failed => format!("WARNING: {name}, begun {since}, failed: {result}"),
        JobState::Interrupted => format!("Note: {name}, begun {since}: {result}"),
        JobState::Running | JobState::Ending => {
            let ending = if job.state == JobState::Ending {
                ", is to end"
            } else {
                ""
            };
            let progress = human::progress(&job.progress, job.rate, job.seconds_left());
            format!("Job: {name}, begun {since}{ending}: {progress}")
        }
    })
}

/// Writes the lines of a tree.
struct Tree<'a> {
    text: &'a mut String,
    level: usize,
}

impl Tree<'_> {
    fn line(&mut self, line: &str) {
        // Writing to a String cannot fail.
        let _ = writeln!(
            self.text,
            "{:width$}{line}",
            "",
            width = self.level * INDENT
        );
    }

    fn file(&mut self, name: &str, contents: &str) {
        match contents.trim_end() {
            "" => self.line(name),
            contents => self.line(&format!("{name}: {contents}")),
        }
    }

    fn link(&mut self, name: &str, target: &Path) {
        self.line(&format!("{name} -> {}", target.display()));
    }

    fn dir(&mut self, name: &str) -> Tree<'_> {
        self.line(&format!("{name}/"));
        Tree {
            text: self.text,
            level: self.level + 1,
        }
    }
}

fn configuration(tree: &mut Tree, config: &VolumeConfig) {
    if let Some(cachesize) = &config.cachesize {
        tree.file("cachesize", cachesize);
    }
    let mut device = tree.dir("device");
    if let Some(meta) = &config.device.meta {
        device.link("meta", meta);
    }
    device.link("origin", &config.device.origin);
    device.link("snapstore", &config.device.snapstore);
    let shown = config.source.as_ref().is_some_and(|source| source.mount);
    filesystem(tree, &config.filesystem, config.master.is_some(), shown);
    if config.master.is_some() {
        let mut master = tree.dir("master");
        master.file("next", &config.snapshots.next.to_string());
        rotations_tree(&mut master, config);
    }
    if let Some(source) = &config.source {
        source_tree(&mut tree.dir("source"), source, config);
    }
    if !config.targets.is_empty() {
        let mut targets = tree.dir("targets");
        for (host, target) in &config.targets {
            target_tree(&mut targets.dir(host), target);
        }
    }
}

/// The files of a source, by their names in the original. Where what arrives stands is durable in a file of its own
/// and only now and then in the document.
fn source_tree(tree: &mut Tree, source: &Source, config: &VolumeConfig) {
    if let Some(coming) = &source.incoming {
        let (position, size) = (coming.position, coming.size);
        tree.file(
            "apply",
            &format!("{} {position}/{size} {position}", coming.id),
        );
    }
    let number = |value: Option<u64>| value.map(|value| value.to_string());
    let files = [
        ("hold", source.hold.map(|hold| hold.id.to_string())),
        ("hostname", Some(source.host.clone())),
        ("name", source.name.clone()),
        ("next", Some(config.snapshots.next.to_string())),
    ];
    optional_files(tree, files);
    let mut pending = tree.dir("pending");
    for kind in &source.pending {
        pending.line(kind);
    }
    let files = [
        ("period", number(source.period)),
        ("port", number(source.port.map(u64::from))),
    ];
    optional_files(tree, files);
    rotations_tree(tree, config);
}

/// The files of a target, by their names in the original.
fn target_tree(tree: &mut Tree, target: &Target) {
    let flag = if target.uncompressed { "0" } else { "1" };
    let number = |value: Option<u64>| value.map(|value| value.to_string());
    let files = [
        ("compress", Some(flag.to_string())),
        ("hold", target.hold.map(|hold| hold.id.to_string())),
        ("name", target.name.clone()),
        ("period", number(target.period)),
        ("ratelimit", number(target.ratelimit)),
        ("send", target.sending.map(|sending| sending.id.to_string())),
        (
            "test_fullvolume",
            target.test_fullvolume.then(|| "yes".to_string()),
        ),
    ];
    optional_files(tree, files);
}

/// Those that are there.
fn optional_files<const N: usize>(tree: &mut Tree, files: [(&str, Option<String>); N]) {
    for (name, contents) in files {
        if let Some(contents) = contents {
            tree.file(name, &contents);
        }
    }
}

fn filesystem(tree: &mut Tree, filesystem: &Filesystem, is_master: bool, shown: bool) {
    let flag_of = |set: bool| set.then(|| "yes".to_string());
    let flag = |set: bool| flag_of(set && is_master);
    let path = |path: &Option<std::path::PathBuf>| path.as_ref().map(|p| p.display().to_string());
    let files = [
        ("dotsnapshot", flag(filesystem.dotsnapshot)),
        ("export", flag(filesystem.export)),
        ("mountopts", filesystem.mountopts.clone()),
        ("mountpoint", path(&filesystem.mountpoint)),
        ("mountsnap", flag(filesystem.mountsnap).or(flag_of(shown))),
        ("samba", flag(filesystem.samba)),
        ("snappath", path(&filesystem.snappath)),
    ];
    if files.iter().all(|(_, contents)| contents.is_none()) {
        return;
    }
    optional_files(&mut tree.dir("filesystem"), files);
}

fn rotations_tree(tree: &mut Tree, config: &VolumeConfig) {
    let snapshots = &config.snapshots;
    let mut dir = tree.dir("schedule");
    for rotation in &config.schedule {
        dir.file(&rotation.kind, &rotation.keep.to_string());
    }
    let mut dir = tree.dir("snapshots");
    let kinds = snapshots.list.iter().flat_map(|s| &s.kinds);
    let kinds: BTreeSet<&str> = kinds.map(String::as_str).collect();
    for kind in kinds {
        let ids: Vec<String> = snapshots.of_kind(kind).map(|s| s.id.to_string()).collect();
        dir.file(kind, &ids.join(" "));
    }
}

/// `RUN STATUS:` and the tree of the runtime directory. Mounted file systems are not entered.
#[must_use]
pub fn run_status(layout: &Layout) -> String {
    let mut text = "RUN STATUS:\n".to_string();
    run_tree(
        &mut Tree {
            text: &mut text,
            level: 0,
        },
        &layout.run(),
    );
    text
}

fn run_tree(tree: &mut Tree, dir: &Path) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    let device = fs::symlink_metadata(dir).map(|m| m.dev()).ok();
    let mut entries: Vec<_> = entries.flatten().collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(meta) = entry.metadata() else { continue };
        let kind = meta.file_type();
        if kind.is_symlink() {
            tree.link(&name, &fs::read_link(entry.path()).unwrap_or_default());
        } else if kind.is_dir() {
            let mut below = tree.dir(&name);
            if Some(meta.dev()) == device {
                run_tree(&mut below, &entry.path());
            }
        } else if kind.is_socket() {
            tree.line(&format!("{name}="));
        } else if kind.is_file() && name != "trigger" {
            let mut contents = fs::read(entry.path()).unwrap_or_default();
            contents.truncate(CONTENTS_MAX_BYTES);
            tree.file(&name, &String::from_utf8_lossy(&contents));
        }
    }
}

#[cfg(test)]
mod tests;
