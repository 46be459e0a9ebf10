// SPDX-License-Identifier: GPL-2.0-only
//! From what is wanted and what is there to a list of steps. Pure: no I/O, no clock.
//!
//! Every operation on a volume is `plan(wanted, observed)` carried out step by step. Because the plan
//! starts from what is observed, the daemon may be killed between any two steps: the next start
//! observes again and plans the rest. Steps are idempotent, and [`Action::inverse`] names the one
//! that takes a step back, which [`run_or_undo`] uses to leave nothing half done.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use crate::names;

/// A device of a volume, in /dev/mapper: `None` is the origin, `Some(n)` snapshot n.
pub type Device = Option<u32>;

/// How far a volume shall be up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing runs, nothing is mounted, no device exists.
    Down,
    /// Agent and server alone: nobody can use the origin through them.
    Processes,
    /// Agent, server and all devices.
    Devices,
    /// And the mounts and links of the master role.
    Mounted,
}

/// The state to reach.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Agent and server run.
    pub processes: bool,
    /// These devices exist.
    pub devices: BTreeSet<Device>,
    /// These devices are mounted; a subset of `devices`.
    pub mounts: BTreeSet<Device>,
    /// The standard paths lead to the mounts.
    pub links: bool,
}

impl Wanted {
    /// What `level` means for a volume with `snapshots`, which are mounted only if `mount_snapshots`.
    #[must_use]
    pub fn at(level: Level, snapshots: &[u32], mount_snapshots: bool) -> Wanted {
        let mut devices = BTreeSet::new();
        let mut mounts = BTreeSet::new();
        if level >= Level::Devices {
            devices.insert(None);
            devices.extend(snapshots.iter().copied().map(Some));
        }
        if level == Level::Mounted {
            mounts.insert(None);
            mounts.extend(
                snapshots
                    .iter()
                    .copied()
                    .map(Some)
                    .filter(|_| mount_snapshots),
            );
        }
        Wanted {
            processes: level >= Level::Processes,
            devices,
            mounts,
            links: level == Level::Mounted,
        }
    }
}

/// An existing device-mapper device compared with the table it should have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Table {
    /// As wanted: adopted.
    Right,
    /// Ours by name, but with another table or none, as a create that was cut short leaves it.
    Wrong,
}

/// The state found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// The agent runs.
    pub agent: bool,
    /// The server runs.
    pub server: bool,
    /// The volume's devices.
    pub devices: BTreeMap<Device, Table>,
    /// Which of them are mounted at their place.
    pub mounts: BTreeSet<Device>,
    /// Links exist.
    pub links: bool,
}

/// One change of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Write zeroes over the origin.
    ZeroOrigin,
    /// Write an empty snapshot store.
    Format,
    /// Make the volume's document durable.
    SaveConfig,
    /// Delete it.
    RemoveConfig,
    /// Start `ddsnap agent`.
    StartAgent,
    /// Start `ddsnap server`.
    StartServer,
    /// Create a device.
    CreateDevice(Device),
    /// Mount it.
    Mount(Device),
    /// Make the standard paths lead to what is mounted.
    WriteLinks,
    /// Remove them.
    RemoveLinks,
    /// Unmount a device.
    Unmount(Device),
    /// Remove a device.
    RemoveDevice(Device),
    /// Stop the server.
    StopServer,
    /// Stop the agent.
    StopAgent,
    /// Take a snapshot out of the document, and note that its data is to go.
    Unlist(u32),
    /// Delete the data of what is no longer listed.
    DeleteData,
    /// Remove the origin's own mount point, if it is empty.
    RemoveMountPoint,
}

impl Action {
    /// The action that takes this one back; `None` if there is nothing to take back.
    #[must_use]
    pub fn inverse(self) -> Option<Action> {
        match self {
            Action::SaveConfig => Some(Action::RemoveConfig),
            Action::StartAgent => Some(Action::StopAgent),
            Action::StartServer => Some(Action::StopServer),
            Action::CreateDevice(which) => Some(Action::RemoveDevice(which)),
            Action::Mount(which) => Some(Action::Unmount(which)),
            Action::WriteLinks => Some(Action::RemoveLinks),
            Action::ZeroOrigin
            | Action::Format
            | Action::RemoveConfig
            | Action::RemoveLinks
            | Action::Unmount(_)
            | Action::RemoveDevice(_)
            | Action::StopServer
            | Action::StopAgent
            | Action::Unlist(_)
            | Action::DeleteData
            | Action::RemoveMountPoint => None,
        }
    }

    /// Whether the action takes something away rather than bringing it up.
    #[must_use]
    pub fn goes_down(self) -> bool {
        match self {
            Action::RemoveLinks
            | Action::Unmount(_)
            | Action::RemoveDevice(_)
            | Action::StopServer
            | Action::StopAgent
            | Action::RemoveConfig
            | Action::Unlist(_)
            | Action::DeleteData
            | Action::RemoveMountPoint => true,
            Action::ZeroOrigin
            | Action::Format
            | Action::SaveConfig
            | Action::StartAgent
            | Action::StartServer
            | Action::CreateDevice(_)
            | Action::Mount(_)
            | Action::WriteLinks => false,
        }
    }

    /// What the action does, for people, to the volume called so.
    #[must_use]
    pub fn describe(self, volume: &str) -> String {
        let device = |which| format!("/dev/mapper/{}", names::device_name(volume, which));
        match self {
            Action::ZeroOrigin => "overwrite the origin with zeroes".into(),
            Action::Format => "format the snapshot store".into(),
            Action::SaveConfig => "write the volume's document".into(),
            Action::RemoveConfig => "delete the volume's document".into(),
            Action::StartAgent => "start the agent".into(),
            Action::StartServer => "start the snapshot server".into(),
            Action::CreateDevice(which) => format!("create {}", device(which)),
            Action::Mount(which) => format!("mount {}", device(which)),
            Action::WriteLinks => "make the links to what is mounted".into(),
            Action::RemoveLinks => "remove the links to what is mounted".into(),
            Action::Unmount(which) => format!("unmount {}", device(which)),
            Action::RemoveDevice(which) => format!("remove {}", device(which)),
            Action::StopServer => "stop the snapshot server".into(),
            Action::StopAgent => "stop the agent".into(),
            Action::Unlist(id) => format!("take snapshot {id} out of the volume's document"),
            Action::DeleteData => "delete its data from the store".into(),
            Action::RemoveMountPoint => "remove the empty mount point".into(),
        }
    }

    /// Which part of the volume suffers when this step fails.
    #[must_use]
    pub fn scope(self) -> Scope {
        match self {
            Action::CreateDevice(Some(tag))
            | Action::Mount(Some(tag))
            | Action::Unmount(Some(tag))
            | Action::RemoveDevice(Some(tag))
            | Action::Unlist(tag) => Scope::Snapshot(tag),
            Action::Mount(None) | Action::Unmount(None) => Scope::Master,
            Action::WriteLinks | Action::RemoveLinks | Action::RemoveMountPoint => Scope::Master,
            Action::ZeroOrigin
            | Action::Format
            | Action::SaveConfig
            | Action::RemoveConfig
            | Action::StartAgent
            | Action::StartServer
            | Action::CreateDevice(None)
            | Action::RemoveDevice(None)
            | Action::StopServer
            | Action::StopAgent
            | Action::DeleteData => Scope::Volume,
        }
    }
}

/// The part of a volume a failure belongs to, the gravest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Agent, server, origin device: without them nothing works.
    Volume,
    /// Mount of the origin and the links.
    Master,
    /// One snapshot.
    Snapshot(u32),
}

/// The steps from `observed` to `wanted`: first what goes, from the outside in, then what comes.
#[must_use]
pub fn plan(wanted: &Wanted, observed: &Observed) -> Vec<Action> {
    let mut steps = Vec::new();
    let table_wrong = |t: &Device| observed.devices.get(t) == Some(&Table::Wrong);
    // With a new server process devices stay and reattach; only without one they must go.
    let device_goes = |t: &Device| !wanted.devices.contains(t) || table_wrong(t);
    let mount_goes = |t: &Device| !wanted.mounts.contains(t) || device_goes(t);

    if observed.links && !wanted.links {
        steps.push(Action::RemoveLinks);
    }
    // Newest snapshot first, the origin (None, the smallest) last.
    let going = observed.mounts.iter().rev().filter(|t| mount_goes(t));
    steps.extend(going.copied().map(Action::Unmount));
    let going = observed.devices.keys().rev().filter(|t| device_goes(t));
    steps.extend(going.copied().map(Action::RemoveDevice));
    if observed.server && !wanted.processes {
        steps.push(Action::StopServer);
    }
    if observed.agent && !wanted.processes {
        steps.push(Action::StopAgent);
    }

    if wanted.processes && !observed.agent {
        steps.push(Action::StartAgent);
    }
    if wanted.processes && !observed.server {
        steps.push(Action::StartServer);
    }
    let there = |t: &Device| observed.devices.contains_key(t) && !device_goes(t);
    let coming = wanted.devices.iter().filter(|t| !there(t));
    steps.extend(coming.copied().map(Action::CreateDevice));
    let mounted = |t: &Device| observed.mounts.contains(t) && !mount_goes(t);
    let coming = wanted.mounts.iter().filter(|t| !mounted(t));
    steps.extend(coming.copied().map(Action::Mount));
    if wanted.links {
        // Always: the set of links follows the snapshots, and writing the same ones changes nothing.
        steps.push(Action::WriteLinks);
    }
    steps
}

/// The first steps of every start: only the server knows what else there is to plan. Both adopt what runs.
pub const FIRST: [Action; 2] = [Action::StartAgent, Action::StartServer];

/// The steps that show a snapshot of a volume at `level`, of which the device `mounted` is mounted: itself or its
/// twin. The others need not be looked at for that.
#[must_use]
pub fn show(snapshot: u32, mounted: Option<u32>, level: Level) -> Vec<Action> {
    if level < Level::Devices {
        return Vec::new();
    }
    let mut steps = vec![Action::CreateDevice(Some(snapshot))];
    if level < Level::Mounted {
        return steps;
    }
    if let Some(tag) = mounted {
        if tag != snapshot {
            steps.push(Action::CreateDevice(Some(tag)));
        }
        steps.push(Action::Mount(Some(tag)));
    }
    steps.push(Action::WriteLinks);
    steps
}

/// The steps that delete a snapshot and its twin. What can be taken back comes first.
#[must_use]
pub fn delete(snapshot: u32, twin: Option<u32>) -> Vec<Action> {
    let mut steps = Vec::new();
    for tag in [twin, Some(snapshot)].into_iter().flatten() {
        steps.push(Action::Unmount(Some(tag)));
        steps.push(Action::RemoveDevice(Some(tag)));
    }
    steps.extend([
        Action::Unlist(snapshot),
        Action::DeleteData,
        Action::WriteLinks,
    ]);
    steps
}

/// The steps that take a volume down. Nothing is started on the way.
#[must_use]
pub fn down(wanted: &Wanted, observed: &Observed) -> Vec<Action> {
    let steps = plan(wanted, observed).into_iter();
    steps.filter(|a| a.goes_down()).collect()
}

/// The steps that make a volume unknown, once it is down.
#[must_use]
pub fn forget() -> Vec<Action> {
    vec![
        // Also those that were not seen, as after a crash.
        Action::RemoveLinks,
        Action::RemoveMountPoint,
        Action::RemoveConfig,
    ]
}

/// A failed step: what suffers, which step, why.
pub type Failure = (Scope, Action, anyhow::Error);

/// What failed, by scope.
#[derive(Debug, Default)]
pub struct Report {
    /// In the order of the steps.
    pub failures: Vec<Failure>,
}

impl Report {
    /// The first failure in `scope`.
    #[must_use]
    pub fn failure(&self, scope: Scope) -> Option<&anyhow::Error> {
        self.failures.iter().find(|f| f.0 == scope).map(|f| &f.2)
    }

    /// Whether every step succeeded.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.failures.is_empty()
    }
}

/// `steps` in parts: those of one kind in a row, of different snapshots, do not depend on each other and are one
/// part; each other step is a part of its own.
pub fn parts(steps: &[Action]) -> impl Iterator<Item = &[Action]> {
    let together = |a: &Action, b: &Action| match (a, b) {
        (Action::CreateDevice(Some(_)), Action::CreateDevice(Some(_)))
        | (Action::Mount(Some(_)), Action::Mount(Some(_)))
        | (Action::Unmount(Some(_)), Action::Unmount(Some(_)))
        | (Action::RemoveDevice(Some(_)), Action::RemoveDevice(Some(_))) => true,
        (_, _) => false,
    };
    steps.chunk_by(together)
}

/// A failed operation: why, and what of it could not be taken back.
#[derive(Debug)]
pub struct RollbackError {
    /// The failure that ended the operation.
    pub cause: anyhow::Error,
    /// Steps back that failed as well.
    pub undo: Vec<(Action, anyhow::Error)>,
    /// The volume's name.
    pub volume: String,
}

impl RollbackError {
    /// The cause as it is if all could be taken back, else all of this.
    #[must_use]
    pub fn into_error(self) -> anyhow::Error {
        if self.undo.is_empty() {
            self.cause
        } else {
            self.into()
        }
    }
}

impl fmt::Display for RollbackError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#}", self.cause)?;
        for (action, error) in &self.undo {
            write!(
                f,
                "; then taking back the work failed ({}: {error:#})",
                action.describe(&self.volume)
            )?;
        }
        Ok(())
    }
}

impl std::error::Error for RollbackError {}

/// Carries out `steps`; after a failure takes the finished ones back, newest first.
pub fn run_or_undo(
    volume: &str,
    steps: &[Action],
    mut perform: impl FnMut(Action) -> anyhow::Result<()>,
) -> Result<(), RollbackError> {
    for (index, &action) in steps.iter().enumerate() {
        let Err(cause) = perform(action) else {
            continue;
        };
        let mut undo = Vec::new();
        // The failed step too: it may have done half its work, and steps are idempotent.
        for inverse in steps[..=index].iter().rev().filter_map(|a| a.inverse()) {
            if let Err(error) = perform(inverse) {
                undo.push((inverse, error));
            }
        }
        let volume = volume.to_string();
        return Err(RollbackError {
            cause,
            undo,
            volume,
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
