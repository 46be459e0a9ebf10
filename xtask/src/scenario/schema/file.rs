// SPDX-License-Identifier: GPL-2.0-only
//! Reading a scenario file, and the errors that name file, line and field.
//!
//! There are two stages: serde refuses unknown fields and wrong types, then what is well formed and makes no
//! sense is refused, and the rest becomes a [`Scenario`].

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use super::expect::{Exit, Expect, pattern};
use super::{Action, CutHow, ImageName, Link, Push, Repeat, Scenario, Step, Wanted};
use crate::image::booted::{DEFAULT_DISKS, MEMORY_MIB};
use crate::vm::lossy::DiskSet;

/// Names of machines that are only counted.
const COUNTED: [&str; 3] = ["a", "b", "c"];

/// The file.
#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename = "Scenario")]
struct ScenarioFile {
    name: String,
    description: String,
    #[serde(default)]
    machines: Machines,
    #[serde(default)]
    image: ImageName,
    kernel: Option<String>,
    #[serde(default = "default_disks")]
    disks: Vec<String>,
    memory: Option<String>,
    #[serde(default)]
    long: bool,
    #[serde(default = "ten_minutes")]
    timeout: u64,
    steps: Vec<StepFile>,
}

/// How many guests, or their names.
#[derive(Deserialize)]
#[serde(untagged, expecting = "machines is a number or a list of names")]
enum Machines {
    Number(u32),
    Names(Vec<String>),
}

impl Default for Machines {
    fn default() -> Self {
        Machines::Number(1)
    }
}

fn ten_minutes() -> u64 {
    600
}

fn default_disks() -> Vec<String> {
    DEFAULT_DISKS.map(String::from).to_vec()
}

/// One step, as it is written: any of the fields.
#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename = "Step")]
struct StepFile {
    run: Option<String>,
    until: Option<String>,
    wait: Option<String>,
    push: Option<Push>,
    power_cut: Option<Cut>,
    kill: Option<Cut>,
    boot: bool,
    reboot: bool,
    link: Option<Link>,
    repeat: Option<RepeatFile>,

    on: Option<String>,
    within: Option<u64>,
    background: Option<String>,
    exit: Option<Exit>,
    stdout: Option<Expect>,
    stderr: Option<Expect>,
    timeout: Option<u64>,
    save: Option<String>,
}

/// A power cut: `true`, or how.
#[derive(Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(
    untagged,
    expecting = "power_cut is true or {within, resume, seed, whole_blocks}"
)]
enum Cut {
    /// At once; `false` is refused.
    Plain(bool),
    How(CutFile),
}

/// How the power is cut.
#[derive(Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct CutFile {
    within: u64,
    resume: bool,
    seed: Option<u64>,
    whole_blocks: DiskSet,
}

impl Cut {
    fn how(self, field: &str, disks: usize) -> Result<CutHow, String> {
        match self {
            Cut::Plain(false) => Err(format!("{field}: false says nothing; leave the step out")),
            Cut::Plain(true) => Ok(CutHow::default()),
            Cut::How(how) if how.whole_blocks.end() > disks => Err(format!(
                "{field}: whole_blocks names a disk that the guest does not have"
            )),
            Cut::How(how) => Ok(CutHow {
                resume: how.resume,
                seed: how.seed,
                whole_blocks: how.whole_blocks,
            }),
        }
    }

    fn within(self) -> u64 {
        match self {
            Cut::Plain(_) => 0,
            Cut::How(how) => how.within,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RepeatFile {
    times: u32,
    steps: Vec<StepFile>,
}

/// What is wrong with a scenario file.
#[derive(Debug, PartialEq, Eq)]
pub struct SchemaError {
    file: PathBuf,
    line: usize,
    what: String,
}

impl std::fmt::Display for SchemaError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}:{}: {}",
            crate::paths::shown(&self.file),
            self.line,
            self.what
        )
    }
}

impl std::error::Error for SchemaError {}

/// Reads one scenario file.
pub fn load(file: &Path) -> Result<Scenario, SchemaError> {
    let text = fs::read_to_string(file).map_err(|e| SchemaError {
        file: file.to_path_buf(),
        line: 0,
        what: format!("cannot read it: {e}"),
    })?;
    parse(file, &text)
}

/// Parses a scenario; `file` is where it came from.
pub(super) fn parse(file: &Path, text: &str) -> Result<Scenario, SchemaError> {
    let error = |line: usize, what: String| SchemaError {
        file: file.to_path_buf(),
        line,
        what,
    };
    let read: ScenarioFile = serde_yaml::from_str(text).map_err(|e| {
        let line = e.location().map_or(1, |l| l.line());
        let said = e.to_string();
        let what = said
            .rsplit_once(" at line ")
            .map_or(said.as_str(), |(what, _)| what);
        error(line, what.to_string())
    })?;
    let lines = step_lines(text);
    read.understood(file, &lines)
        .map_err(|(step, what)| match step {
            Some(step) => {
                let line = lines.get(step).copied().unwrap_or(1);
                error(line, format!("steps[{step}].{what}"))
            }
            None => {
                let field = what.split(':').next().unwrap_or_default();
                let line = text
                    .lines()
                    .position(|l| l.starts_with(&format!("{field}:")));
                error(line.map_or(1, |l| l + 1), what)
            }
        })
}

/// Lines at which the items of `steps:` begin.
fn step_lines(text: &str) -> Vec<usize> {
    let mut lines = text
        .lines()
        .enumerate()
        .skip_while(|(_, line)| !line.starts_with("steps:"));
    lines.next();
    let mut indent = None;
    let mut found = Vec::new();
    for (number, line) in lines {
        let blanks = line.len() - line.trim_start().len();
        let item = line.trim_start().starts_with("- ") || line.trim() == "-";
        if item && *indent.get_or_insert(blanks) == blanks {
            found.push(number + 1);
        }
    }
    found
}

impl ScenarioFile {
    /// The scenario; or the first thing that makes no sense: the step it is in, and the field with what is
    /// wrong.
    fn understood(self, file: &Path, lines: &[usize]) -> Result<Scenario, (Option<usize>, String)> {
        let memory_mib = self.check(file).map_err(|what| (None, what))?;
        let machines = self.machines.names().map_err(|what| (None, what))?;
        let mut known = Known::new(&machines, 1 + self.disks.len());
        let mut steps = Vec::new();
        for (i, step) in self.steps.into_iter().enumerate() {
            let line = lines.get(i).copied().unwrap_or(0);
            let step = step.understood(line, &mut known);
            steps.push(step.map_err(|what| (Some(i), what))?);
        }
        if let Some((id, _)) = known.running.first() {
            let what = format!("steps: nothing waits for the background command {id:?}");
            return Err((None, what));
        }
        Ok(Scenario {
            name: self.name,
            description: self.description,
            machines,
            image: self.image,
            kernel: self.kernel,
            disks: self.disks,
            memory_mib,
            long: self.long,
            timeout: Duration::from_secs(self.timeout),
            steps,
            file: file.to_path_buf(),
        })
    }

    /// Checks all but machines and steps; gives the guest's memory in MiB.
    fn check(&self, file: &Path) -> Result<u32, String> {
        let stem = file.file_stem().unwrap_or_default().to_string_lossy();
        if self.name != stem {
            return Err(format!(
                "name: {:?}, but the file is {stem}.yaml",
                self.name
            ));
        }
        if self.disks.len() > 20 {
            return Err("disks: more than 20".into());
        }
        if let Some(bad) = self.disks.iter().find(|size| mebibytes(size).is_none()) {
            return Err(format!("disks: {bad:?} is no size; write 300M, 2G or 1T"));
        }
        if self.image == ImageName::Stock && self.kernel.is_some() {
            return Err("kernel: the stock image has Debian's own".into());
        }
        if self.steps.is_empty() {
            return Err("steps: there are none".into());
        }
        let Some(memory) = &self.memory else {
            return Ok(MEMORY_MIB);
        };
        mebibytes(memory)
            .filter(|mib| (128..=16384).contains(mib))
            .ok_or_else(|| format!("memory: {memory:?} is not from 128M to 16G; write 256M or 2G"))
    }
}

impl Machines {
    fn names(self) -> Result<Vec<String>, String> {
        let names = match self {
            Machines::Number(1) => return Ok(vec![String::new()]),
            Machines::Number(number @ 2..=3) => {
                return Ok(COUNTED[..number as usize]
                    .iter()
                    .map(|&n| n.into())
                    .collect());
            }
            Machines::Number(number) => return Err(format!("machines: {number} is not 1, 2 or 3")),
            Machines::Names(names) => names,
        };
        if !(2..=COUNTED.len()).contains(&names.len()) {
            return Err(format!("machines: {} names; 2 or 3 get some", names.len()));
        }
        for (i, name) in names.iter().enumerate() {
            let letters = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
            if !name.starts_with(|c: char| c.is_ascii_lowercase())
                || !name.chars().all(letters)
                || name.len() > 32
                || name == "localhost"
            {
                return Err(format!(
                    "machines: {name:?} is no host name: use up to 32 small letters, digits and -"
                ));
            }
            if names[..i].contains(name) {
                return Err(format!("machines: {name:?} is there twice"));
            }
        }
        Ok(names)
    }
}

/// What earlier steps have set up.
struct Known<'a> {
    machines: &'a [String],
    /// Disks of each, the root disk counted.
    disks: usize,
    /// Background commands, with the machine of each.
    running: Vec<(String, usize)>,
    saved: Vec<String>,
    /// Which machines are off.
    off: Vec<bool>,
}

impl<'a> Known<'a> {
    fn new(machines: &'a [String], disks: usize) -> Self {
        Known {
            machines,
            disks,
            running: Vec::new(),
            saved: Vec::new(),
            off: vec![false; machines.len()],
        }
    }

    /// The index of the machine that `on` names; a machine that is alone needs no name.
    fn machine(&self, on: Option<&str>, action: &str) -> Result<usize, String> {
        let all = self.machines.join(", ");
        match (on, self.machines) {
            (None, [_]) => Ok(0),
            (Some(_), [_]) => Err("on: there is one machine, and it has no name".into()),
            (None, _) => Err(format!("{action}: say on: which machine, of {all}")),
            (Some(name), machines) => machines
                .iter()
                .position(|machine| machine == name)
                .ok_or_else(|| format!("on: no machine {name:?}; there are {all}")),
        }
    }

    /// Whatever was running on a machine has ended.
    fn ended(&mut self, machine: usize) {
        self.running.retain(|(_, on)| *on != machine);
    }
}

impl StepFile {
    fn action(&self) -> Result<&'static str, String> {
        let actions = [
            ("run", self.run.is_some()),
            ("until", self.until.is_some()),
            ("wait", self.wait.is_some()),
            ("push", self.push.is_some()),
            ("power_cut", self.power_cut.is_some()),
            ("kill", self.kill.is_some()),
            ("boot", self.boot),
            ("reboot", self.reboot),
            ("link", self.link.is_some()),
            ("repeat", self.repeat.is_some()),
        ];
        let given: Vec<&'static str> = actions
            .iter()
            .filter(|(_, is)| *is)
            .map(|(name, _)| *name)
            .collect();
        match given[..] {
            [action] => Ok(action),
            [] => {
                let all: Vec<&str> = actions.iter().map(|(name, _)| *name).collect();
                Err(format!("run: a step needs one of {}", all.join(", ")))
            }
            _ => Err(format!(
                "{}: a step has one action, not {}",
                given[1],
                given.join(" and ")
            )),
        }
    }

    fn understood(self, line: usize, known: &mut Known) -> Result<Step, String> {
        let action = self.action()?;
        self.check_fields(action)?;
        self.check_names(known)?;
        let limit = Duration::from_secs(match (self.timeout, action) {
            (Some(0), _) => return Err("timeout: 0 seconds are too few".into()),
            (Some(given), _) => given,
            (None, "repeat") => u64::MAX >> 20, // the scenario's own limit ends it
            (None, "power_cut" | "boot" | "reboot") => 600,
            (None, _) => 120,
        });
        let on = match (action, &self.wait) {
            ("repeat", _) => 0,
            (_, Some(id)) => known.waited(id)?,
            _ => known.machine(self.on.as_deref(), action)?,
        };
        if action != "repeat" && known.off[on] != (action == "boot") {
            let name = &known.machines[on];
            return Err(match action {
                "boot" => format!("boot: the machine {name} is on"),
                _ => format!("{action}: the machine {name} is off"),
            });
        }
        if matches!(action, "power_cut" | "kill" | "reboot") {
            known.ended(on);
        }
        known.off[on] = action == "kill" || (known.off[on] && action == "repeat");
        let cut = self.power_cut.or(self.kill).map(Cut::within);
        let within = self.within.or(cut).unwrap_or(0);
        if within > 3600 {
            return Err(format!("within: {within} seconds are more than an hour"));
        }
        let action = self.into_action(line, on, known)?;
        Ok(Step {
            line,
            on,
            within,
            limit,
            action,
        })
    }

    fn into_action(self, line: usize, on: usize, known: &mut Known) -> Result<Action, String> {
        for script in [&self.run, &self.until].into_iter().flatten() {
            check_negations(script)?;
        }
        let wanted = Wanted {
            exit: self.exit.unwrap_or_default(),
            stdout: self.stdout.unwrap_or_default(),
            stderr: self.stderr.unwrap_or_default(),
            save: self.save,
        };
        Ok(match self {
            StepFile {
                run: Some(script),
                background: Some(id),
                ..
            } => {
                if known.running.iter().any(|(running, _)| *running == id) {
                    return Err(format!("background: {id:?} is running already"));
                }
                known.running.push((id.clone(), on));
                Action::Start { script, id }
            }
            StepFile {
                run: Some(script), ..
            } => Action::Run { script, wanted },
            StepFile {
                until: Some(script),
                ..
            } => Action::Until { script, wanted },
            StepFile { wait: Some(id), .. } => Action::Wait { id, wanted },
            StepFile {
                push: Some(push), ..
            } => Action::Push(push),
            StepFile {
                power_cut: Some(cut),
                ..
            } => Action::PowerCut(cut.how("power_cut", known.disks)?),
            StepFile {
                kill: Some(cut), ..
            } => match cut.how("kill", known.disks)? {
                CutHow { resume: true, .. } => {
                    return Err("kill: the machine stays off; nothing is resumed".into());
                }
                how => Action::Kill(how),
            },
            StepFile {
                link: Some(link), ..
            } => match known.machines {
                [_] => return Err("link: one machine alone has no network".into()),
                _ => Action::Link(link),
            },
            StepFile {
                repeat: Some(repeat),
                ..
            } => Action::Repeat(repeat.understood(line, known)?),
            StepFile { boot: true, .. } => Action::Boot,
            _ => Action::Reboot,
        })
    }

    /// Refuses fields that mean nothing beside the action.
    fn check_fields(&self, action: &str) -> Result<(), String> {
        let judged = matches!(action, "run" | "until" | "wait") && self.background.is_none();
        let fields = [
            ("background", self.background.is_some(), action == "run"),
            ("exit", self.exit.is_some(), judged),
            ("stdout", self.stdout.is_some(), judged),
            ("stderr", self.stderr.is_some(), judged),
            ("save", self.save.is_some(), judged),
            ("timeout", self.timeout.is_some(), action != "repeat"),
            (
                "within",
                self.within.is_some(),
                matches!(action, "run" | "boot" | "reboot" | "link"),
            ),
            (
                "on",
                self.on.is_some(),
                !matches!(action, "repeat" | "wait"),
            ),
        ];
        if let Some((field, ..)) = fields.iter().find(|(_, given, fits)| *given && !fits) {
            let beside = if self.background.is_some() {
                "background"
            } else {
                action
            };
            return Err(format!("{field}: has no meaning beside {beside}"));
        }
        for expect in self.stdout.iter().chain(&self.stderr) {
            for text in expect.matches.all().iter().chain(expect.absent.all()) {
                pattern(text).map_err(|e| format!("matches: {text:?} is no pattern: {e}"))?;
            }
        }
        Ok(())
    }

    fn check_names(&self, known: &mut Known) -> Result<(), String> {
        for expect in self.stdout.iter().chain(&self.stderr) {
            if let Some(name) = expect.same_as.as_ref().filter(|n| !known.saved.contains(n)) {
                return Err(format!("same_as: no earlier step saves {name:?}"));
            }
        }
        if let Some(name) = &self.save {
            let letters = name
                .chars()
                .all(|c| c.is_ascii_uppercase() || c == '_' || c.is_ascii_digit());
            if !letters || !name.starts_with(|c: char| c.is_ascii_uppercase()) {
                return Err(format!("save: {name:?}: use capital letters, digits and _"));
            }
            known.saved.push(name.clone());
        }
        Ok(())
    }
}

impl Known<'_> {
    /// The machine of a background command that is waited for.
    fn waited(&mut self, id: &str) -> Result<usize, String> {
        match self.running.iter().position(|(running, _)| running == id) {
            Some(at) => Ok(self.running.remove(at).1),
            None => Err(format!("wait: no background command {id:?} is running")),
        }
    }
}

impl RepeatFile {
    fn understood(self, line: usize, known: &mut Known) -> Result<Repeat, String> {
        if self.times == 0 {
            return Err("repeat.times: 0 times are too few".into());
        }
        if self.steps.is_empty() {
            return Err("repeat.steps: there are none".into());
        }
        let (before, off) = (known.running.clone(), known.off.clone());
        let mut steps = Vec::new();
        for (i, step) in self.steps.into_iter().enumerate() {
            let step = step.understood(line, known);
            steps.push(step.map_err(|what| format!("repeat.steps[{i}].{what}"))?);
        }
        // A cut ends what was running before; what a round begins, it must end.
        if let Some((id, _)) = known.running.iter().find(|id| !before.contains(id)) {
            return Err(format!(
                "repeat: nothing in it waits for the background command {id:?}"
            ));
        }
        if known.off != off {
            return Err("repeat: a round must leave each machine on or off as it was".into());
        }
        Ok(Repeat {
            times: self.times,
            steps,
        })
    }
}

/// A size like `300M`, `2G` or `17T`, in MiB; not 0.
fn mebibytes(size: &str) -> Option<u32> {
    let (digits, factor) = match size.split_at_checked(size.len().checked_sub(1)?)? {
        (digits, "M") => (digits, 1),
        (digits, "G") => (digits, 1 << 10),
        (digits, "T") => (digits, 1 << 20),
        _ => return None,
    };
    let number: u32 = digits.parse().ok()?;
    number.checked_mul(factor).filter(|&mib| mib > 0)
}

/// Refuses a `! COMMAND` that is not the last of its script: `bash -e` goes on whatever comes of it, so it would be a test
/// that cannot fail.
fn check_negations(script: &str) -> Result<(), String> {
    let script = script.trim_end();
    let void = |at: usize| {
        let statement = script[..at].trim_end();
        let begins = statement.is_empty() || statement.ends_with([';', '{', '(', '&', '|']) || {
            script[statement.len()..at].contains('\n') && !statement.ends_with('\\')
        };
        let first_of_pair = statement.ends_with("&&") || statement.ends_with("||");
        let rest = &script[at..];
        let ends = rest.find('\n').or_else(|| rest.find("; "));
        begins && !first_of_pair && ends.is_some()
    };
    match script.match_indices("! ").find(|(at, _)| void(*at)) {
        None => Ok(()),
        Some((at, _)) => {
            let line = script[at..].lines().next().unwrap_or_default();
            Err(format!(
                "'{line}' cannot fail, as bash -e goes on after it: write `fails COMMAND`"
            ))
        }
    }
}
