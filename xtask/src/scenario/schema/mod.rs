// SPDX-License-Identifier: GPL-2.0-only
//! What a scenario is. `vmtest/README.md` describes it for its writers; [`file`](mod@file) reads it.

mod expect;
mod file;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::vm::lossy::DiskSet;

pub use expect::{Exit, Expect};
pub use file::load;

/// A scenario that was read and makes sense.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Same as the file's name.
    pub name: String,
    /// What it shows, in a sentence or a few.
    pub description: String,
    /// The guests' names; a guest that is alone has an empty one.
    pub machines: Vec<String>,
    /// What each guest contains.
    pub image: ImageName,
    /// Kernel configuration, when it must be a certain one.
    pub kernel: Option<String>,
    /// Sizes of each guest's blank disks `/dev/vdb` and on.
    pub disks: Vec<String>,
    /// Each guest's memory in MiB.
    pub memory_mib: u32,
    /// Takes long: run only by name or with `--all`.
    pub long: bool,
    /// Limit for the whole scenario.
    pub timeout: Duration,
    /// What happens, in order.
    pub steps: Vec<Step>,
    /// Where it was read from.
    pub file: PathBuf,
}

/// What a guest contains.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ImageName {
    /// Our kernel and our packages, installed.
    #[default]
    Ddsnap,
    /// Debian's kernel; our packages lie in `/srv/debs`.
    Stock,
}

/// One step.
#[derive(Clone, Debug)]
pub struct Step {
    /// Line it begins at, counted from 1; of a step that is repeated, the repetition's.
    pub line: usize,
    /// The machine it is about, by its index. It means nothing beside [`Action::Repeat`].
    pub on: usize,
    /// It is done at a random moment within so many seconds; at once if 0.
    pub within: u64,
    /// How long it may take, from then on.
    pub limit: Duration,
    /// What is done.
    pub action: Action,
}

/// What a step does.
#[derive(Clone, Debug)]
pub enum Action {
    /// Runs shell lines by `bash -e`.
    Run {
        /// The lines.
        script: String,
        /// What must come of them.
        wanted: Wanted,
    },
    /// Starts shell lines and goes on.
    Start {
        /// The lines.
        script: String,
        /// The name to wait for.
        id: String,
    },
    /// Runs shell lines again and again, until they end as they must.
    Until {
        /// The lines.
        script: String,
        /// What must come of them.
        wanted: Wanted,
    },
    /// Waits for what was started to end.
    Wait {
        /// Its name.
        id: String,
        /// What must come of it.
        wanted: Wanted,
    },
    /// Copies a file into the guest.
    Push(Push),
    /// Cuts the power and boots again.
    PowerCut(CutHow),
    /// Cuts the power; the machine stays off.
    Kill(CutHow),
    /// Boots a machine that is off.
    Boot,
    /// Reboots in an orderly way.
    Reboot,
    /// Pulls the cable of the private network, or plugs it in.
    Link(Link),
    /// Does steps several times.
    Repeat(Repeat),
}

/// What must come of a command.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// The exit code.
    pub exit: Exit,
    /// What standard output must be like.
    pub stdout: Expect,
    /// What standard error must be like.
    pub stderr: Expect,
    /// Environment variable of all later steps that gets standard output, trimmed.
    pub save: Option<String>,
}

/// How the power is cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CutHow {
    /// Resume the saved guest with a root disk as it was then, instead of booting.
    pub resume: bool,
    /// What is lost is chosen by this number, whatever the run's seed is.
    pub seed: Option<u64>,
    /// Disks that write blocks of 4 KiB whole or not at all, as some file systems need it.
    pub whole_blocks: DiskSet,
}

/// The state of a network cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Link {
    /// Plugged in.
    Up,
    /// Pulled.
    Down,
}

/// Steps to do several times.
#[derive(Clone, Debug)]
pub struct Repeat {
    /// How often.
    pub times: u32,
    /// What, in order.
    pub steps: Vec<Step>,
}

/// A file to copy into the guest.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Push {
    /// Path here, relative to the scenario file.
    pub from: PathBuf,
    /// Path there.
    pub to: String,
    /// A program for tests: built before any scenario runs, by `make` in its directory.
    #[serde(default)]
    pub make: bool,
}

impl Scenario {
    /// Where a file to copy into the guest is.
    pub fn source_of(&self, push: &Push) -> PathBuf {
        let dir = self.file.parent().unwrap_or(Path::new(""));
        dir.join(&push.from)
    }

    /// Programs that have to be built.
    pub fn made(&self) -> impl Iterator<Item = PathBuf> + '_ {
        let pushed = all_steps(&self.steps).into_iter();
        pushed.filter_map(|step| match &step.action {
            Action::Push(push) if push.make => Some(self.source_of(push)),
            _ => None,
        })
    }

    /// Whether the power of a machine is cut: then its disks lose what was not flushed.
    pub fn cuts_power(&self, machine: usize) -> bool {
        let cuts = |action: &Action| matches!(action, Action::PowerCut(_) | Action::Kill(_));
        all_steps(&self.steps)
            .iter()
            .any(|step| step.on == machine && cuts(&step.action))
    }

    /// Whether anything follows from the run's seed: a moment, or what a power cut loses.
    pub fn uses_seed(&self) -> bool {
        (0..self.machines.len()).any(|machine| self.cuts_power(machine))
            || all_steps(&self.steps).iter().any(|step| step.within > 0)
    }
}

/// The steps and those that they repeat.
fn all_steps(steps: &[Step]) -> Vec<&Step> {
    let mut all = Vec::new();
    for step in steps {
        all.push(step);
        if let Action::Repeat(repeat) = &step.action {
            all.extend(all_steps(&repeat.steps));
        }
    }
    all
}
