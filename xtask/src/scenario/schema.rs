// SPDX-License-Identifier: GPL-2.0-only
//! The format of a scenario file, and the errors that name file, line and field.
//!
//! Parsing has two stages: serde refuses unknown fields and wrong types, then
//! [`Scenario::check`] refuses what is well formed and makes no sense.
//! `vmtest/README.md` describes the format for its writers.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use regex::Regex;
use serde::Deserialize;

use crate::image::booted::MEMORY_MIB;

/// A scenario that was read and makes sense.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scenario {
    /// Same as the file's name.
    pub name: String,
    /// What it shows, in a sentence or a few.
    pub description: String,
    /// Number of guests.
    #[serde(default = "one")]
    pub machines: u32,
    /// What the guest contains.
    #[serde(default)]
    pub image: ImageName,
    /// Kernel configuration, when it must be a certain one.
    #[serde(default)]
    pub kernel: Option<String>,
    /// Sizes of the blank disks `/dev/vdb` and on.
    #[serde(default = "default_disks")]
    pub disks: Vec<String>,
    /// The guest's memory, like `256M`, if it must not have as much as others.
    #[serde(default)]
    pub memory: Option<String>,
    /// Takes long: run only by name or with `--all`.
    #[serde(default)]
    pub long: bool,
    /// Limit for the whole scenario, in seconds.
    #[serde(default = "ten_minutes")]
    pub timeout: u64,
    /// What happens, in order.
    pub steps: Vec<Step>,
    /// Where it was read from.
    #[serde(skip)]
    pub file: PathBuf,
    /// Line each step begins at, counted from 1.
    #[serde(skip)]
    pub lines: Vec<usize>,
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

/// One step: exactly one of the actions, and what is expected of it.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// Shell lines to run, by `bash -e`.
    pub run: Option<String>,
    /// Shell lines to repeat until the expectation holds.
    pub until: Option<String>,
    /// Background command to wait for.
    pub wait: Option<String>,
    /// File to copy into the guest.
    pub push: Option<Push>,
    /// Cut the power and boot again.
    pub power_cut: Option<PowerCut>,
    /// Steps to do several times.
    pub repeat: Option<Repeat>,
    /// Reboot in an orderly way.
    #[serde(default)]
    pub reboot: bool,

    /// With `run`: do not wait; the name to `wait` for.
    pub background: Option<String>,
    /// Exit code that is expected; 0 if absent.
    pub exit: Option<Exit>,
    /// What standard output must be like.
    pub stdout: Option<Expect>,
    /// What standard error must be like.
    pub stderr: Option<Expect>,
    /// Limit in seconds.
    pub timeout: Option<u64>,
    /// Environment variable of all later steps that gets standard output, trimmed.
    pub save: Option<String>,
}

/// A power cut: `true`, or how.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(untagged, expecting = "power_cut is true or {within, resume, seed}")]
pub enum PowerCut {
    /// At once, and boot again; `false` is refused.
    Plain(bool),
    /// In another way.
    How(CutHow),
}

/// How the power is cut.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CutHow {
    /// At a random moment within so many seconds.
    #[serde(default)]
    pub within: u64,
    /// Resume the saved guest with a root disk as it was then, instead of booting.
    #[serde(default)]
    pub resume: bool,
    /// What is lost is chosen by this number, whatever the run's seed is.
    pub seed: Option<u64>,
}

impl PowerCut {
    /// How the power is cut.
    pub fn how(self) -> CutHow {
        match self {
            PowerCut::Plain(_) => CutHow::default(),
            PowerCut::How(how) => how,
        }
    }
}

/// Steps to do several times.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
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

/// An expected exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(
    untagged,
    expecting = "exit is a number from 0 to 255 or the word nonzero"
)]
pub enum Exit {
    /// This one.
    Code(u8),
    /// A word.
    Word(ExitWord),
}

/// Words for exit codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ExitWord {
    /// Any but 0.
    Nonzero,
}

impl Exit {
    /// Whether a command may end with `code`.
    pub fn accepts(self, code: i32) -> bool {
        match self {
            Exit::Code(wanted) => code == i32::from(wanted),
            Exit::Word(ExitWord::Nonzero) => code != 0,
        }
    }
}

impl std::fmt::Display for Exit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Exit::Code(code) => write!(f, "{code}"),
            Exit::Word(ExitWord::Nonzero) => f.write_str("not 0"),
        }
    }
}

/// What text must be like. Everything given must hold.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Expect {
    /// Exactly this, blanks and newlines at the end aside.
    pub equals: Option<String>,
    /// What an earlier step saved under this name.
    pub same_as: Option<String>,
    /// Each of these somewhere in it.
    #[serde(default)]
    pub contains: Texts,
    /// Each of these regular expressions (`^` and `$` stand for lines).
    #[serde(default)]
    pub matches: Texts,
    /// None of these regular expressions.
    #[serde(default)]
    pub absent: Texts,
}

/// One text or a list of them.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(untagged, expecting = "expected a text or a list of texts")]
pub enum Texts {
    /// No text.
    #[default]
    None,
    /// One.
    One(String),
    /// Several.
    Many(Vec<String>),
}

impl Texts {
    /// The texts.
    pub fn all(&self) -> &[String] {
        match self {
            Texts::None => &[],
            Texts::One(text) => std::slice::from_ref(text),
            Texts::Many(texts) => texts,
        }
    }
}

fn one() -> u32 {
    1
}

fn ten_minutes() -> u64 {
    600
}

/// The blank disks a guest has when nobody asks for others. Scenarios that can do
/// with these share one saved guest.
pub const DEFAULT_DISKS: [&str; 4] = ["64M", "128M", "512M", "2G"];

fn default_disks() -> Vec<String> {
    DEFAULT_DISKS.map(String::from).to_vec()
}

/// A regular expression of a scenario: `^` and `$` match at lines.
pub fn pattern(text: &str) -> Result<Regex, regex::Error> {
    regex::RegexBuilder::new(text).multi_line(true).build()
}

impl Expect {
    /// The first reason why `text` is not as expected. `saved` looks up what
    /// earlier steps saved.
    pub fn unmet(&self, text: &str, saved: impl Fn(&str) -> Option<String>) -> Option<String> {
        let trimmed = text.trim_end();
        if let Some(wanted) = self.equals.as_ref().filter(|w| w.trim_end() != trimmed) {
            return Some(format!("is not {:?}", wanted.trim_end()));
        }
        if let Some(name) = &self.same_as {
            let wanted = saved(name).unwrap_or_default();
            if wanted != text.trim() {
                return Some(format!("is not what was saved as {name}: {wanted:?}"));
            }
        }
        if let Some(wanted) = self
            .contains
            .all()
            .iter()
            .find(|w| !text.contains(w.as_str()))
        {
            return Some(format!("does not contain {wanted:?}"));
        }
        let found = |text_pattern: &String| pattern(text_pattern).is_ok_and(|p| p.is_match(text));
        if let Some(wanted) = self.matches.all().iter().find(|w| !found(w)) {
            return Some(format!("does not match {wanted:?}"));
        }
        let forbidden = self.absent.all().iter().find(|w| found(w))?;
        Some(format!("matches {forbidden:?}, which must be absent"))
    }
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
pub fn parse(file: &Path, text: &str) -> Result<Scenario, SchemaError> {
    let error = |line: usize, what: String| SchemaError {
        file: file.to_path_buf(),
        line,
        what,
    };
    let mut scenario: Scenario = serde_yaml::from_str(text).map_err(|e| {
        let line = e.location().map_or(1, |l| l.line());
        let said = e.to_string();
        let what = said
            .rsplit_once(" at line ")
            .map_or(said.as_str(), |(what, _)| what);
        error(line, what.to_string())
    })?;
    scenario.file = file.to_path_buf();
    scenario.lines = step_lines(text);
    scenario.check().map_err(|(step, what)| match step {
        Some(step) => {
            let line = scenario.lines.get(step).copied().unwrap_or(1);
            error(line, format!("steps[{step}].{what}"))
        }
        None => {
            let field = what.split(':').next().unwrap_or_default();
            let line = text
                .lines()
                .position(|l| l.starts_with(&format!("{field}:")));
            error(line.map_or(1, |l| l + 1), what)
        }
    })?;
    Ok(scenario)
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

impl Scenario {
    /// Where a file to copy into the guest is.
    pub fn source_of(&self, push: &Push) -> PathBuf {
        let dir = self.file.parent().unwrap_or(Path::new(""));
        dir.join(&push.from)
    }

    /// The guest's memory in MiB.
    pub fn memory_mib(&self) -> u32 {
        self.memory
            .as_deref()
            .and_then(mebibytes)
            .unwrap_or(MEMORY_MIB)
    }

    /// Programs that have to be built.
    pub fn made(&self) -> impl Iterator<Item = PathBuf> + '_ {
        let pushed = all_steps(&self.steps)
            .into_iter()
            .filter_map(|step| step.push.as_ref());
        pushed
            .filter(|push| push.make)
            .map(|push| self.source_of(push))
    }

    /// Whether the power is cut: then the disks lose what was not flushed.
    pub fn cuts_power(&self) -> bool {
        all_steps(&self.steps)
            .iter()
            .any(|step| step.power_cut.is_some())
    }

    /// The first thing that makes no sense: the step it is in, and the field
    /// with what is wrong.
    fn check(&self) -> Result<(), (Option<usize>, String)> {
        let top = |what: String| Err((None, what));
        let stem = self.file.file_stem().unwrap_or_default().to_string_lossy();
        if self.name != stem {
            return top(format!(
                "name: {:?}, but the file is {stem}.yaml",
                self.name
            ));
        }
        if self.machines != 1 {
            return top(format!(
                "machines: {}, but one guest is what is started",
                self.machines
            ));
        }
        if self.disks.len() > 20 {
            return top("disks: more than 20".into());
        }
        if let Some(bad) = self.disks.iter().find(|size| !is_size(size)) {
            return top(format!("disks: {bad:?} is no size; write 300M or 2G"));
        }
        if let Some(memory) = &self.memory {
            if !mebibytes(memory).is_some_and(|mib| (128..=16384).contains(&mib)) {
                return top(format!(
                    "memory: {memory:?} is not from 128M to 16G; write 256M or 2G"
                ));
            }
        }
        if self.image == ImageName::Stock && self.kernel.is_some() {
            return top("kernel: the stock image has Debian's own".into());
        }
        if self.steps.is_empty() {
            return top("steps: there are none".into());
        }
        let mut known = Known::default();
        for (i, step) in self.steps.iter().enumerate() {
            step.check(&mut known).map_err(|what| (Some(i), what))?;
        }
        match known.running.first() {
            Some(id) => top(format!(
                "steps: nothing waits for the background command {id:?}"
            )),
            None => Ok(()),
        }
    }
}

/// The steps and those that they repeat.
fn all_steps(steps: &[Step]) -> Vec<&Step> {
    let mut all = Vec::new();
    for step in steps {
        all.push(step);
        if let Some(repeat) = &step.repeat {
            all.extend(all_steps(&repeat.steps));
        }
    }
    all
}

/// What earlier steps have set up.
#[derive(Default)]
struct Known {
    running: Vec<String>,
    saved: Vec<String>,
}

impl Step {
    /// The step's limit.
    pub fn limit(&self) -> Duration {
        let default = if self.repeat.is_some() {
            u64::MAX >> 20 // the scenario's own limit ends it
        } else if self.power_cut.is_some() || self.reboot {
            600
        } else {
            120
        };
        Duration::from_secs(self.timeout.unwrap_or(default))
    }

    /// The exit code that is expected.
    pub fn expected_exit(&self) -> Exit {
        self.exit.unwrap_or(Exit::Code(0))
    }

    fn check(&self, known: &mut Known) -> Result<(), String> {
        let actions = [
            ("run", self.run.is_some()),
            ("until", self.until.is_some()),
            ("wait", self.wait.is_some()),
            ("push", self.push.is_some()),
            ("power_cut", self.power_cut.is_some()),
            ("reboot", self.reboot),
            ("repeat", self.repeat.is_some()),
        ];
        let given: Vec<&str> = actions
            .iter()
            .filter(|(_, is)| *is)
            .map(|(name, _)| *name)
            .collect();
        let [action] = given[..] else {
            let all: Vec<&str> = actions.iter().map(|(name, _)| *name).collect();
            return Err(match given[..] {
                [] => format!("run: a step needs one of {}", all.join(", ")),
                _ => format!(
                    "{}: a step has one action, not {}",
                    given[1],
                    given.join(" and ")
                ),
            });
        };
        if self.timeout == Some(0) {
            return Err("timeout: 0 seconds are too few".into());
        }
        if self.power_cut == Some(PowerCut::Plain(false)) {
            return Err("power_cut: false says nothing; leave the step out".into());
        }
        self.check_fields(action)?;
        self.check_names(known)?;
        self.check_repeat(known)
    }

    fn check_repeat(&self, known: &mut Known) -> Result<(), String> {
        let Some(repeat) = &self.repeat else {
            return Ok(());
        };
        if repeat.times == 0 {
            return Err("repeat.times: 0 times are too few".into());
        }
        if repeat.steps.is_empty() {
            return Err("repeat.steps: there are none".into());
        }
        let before = known.running.clone();
        for (i, step) in repeat.steps.iter().enumerate() {
            step.check(known)
                .map_err(|what| format!("repeat.steps[{i}].{what}"))?;
        }
        // A cut ends what was running before; what a round begins, it must end.
        match known.running.iter().find(|id| !before.contains(id)) {
            Some(id) => Err(format!(
                "repeat: nothing in it waits for the background command {id:?}"
            )),
            None => Ok(()),
        }
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
        if let Some(id) = &self.background {
            if known.running.contains(id) {
                return Err(format!("background: {id:?} is running already"));
            }
            known.running.push(id.clone());
        }
        if let Some(id) = &self.wait {
            match known.running.iter().position(|running| running == id) {
                Some(at) => known.running.remove(at),
                None => return Err(format!("wait: no background command {id:?} is running")),
            };
        }
        if self.power_cut.is_some() || self.reboot {
            known.running.clear();
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

fn is_size(size: &str) -> bool {
    mebibytes(size).is_some()
}

/// A size like `300M` or `2G`, in MiB; not 0.
fn mebibytes(size: &str) -> Option<u32> {
    let (digits, factor) = match size.strip_suffix('G') {
        Some(digits) => (digits, 1024),
        None => (size.strip_suffix('M')?, 1),
    };
    let number: u32 = digits.parse().ok()?;
    number.checked_mul(factor).filter(|&mib| mib > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
name: a
description: shows something
steps:
  - run: echo one
    save: ONE
  - run: |
      cat <<X
      - not a step
      X
    background: load
  - wait: load
    stdout: {contains: [not, step], same_as: ONE}
  - reboot: true
";

    fn parsed(text: &str) -> Result<Scenario, String> {
        parse(Path::new("dir/a.yaml"), text).map_err(|e| e.to_string())
    }

    fn refused(text: &str) -> String {
        parsed(text).unwrap_err()
    }

    #[test]
    fn a_good_scenario_is_read_with_its_defaults_and_lines() {
        let scenario = parsed(GOOD).unwrap();
        assert_eq!((scenario.machines, scenario.timeout), (1, 600));
        assert_eq!(scenario.disks, DEFAULT_DISKS);
        assert_eq!(scenario.lines, [4, 6, 11, 13]);
        assert_eq!(scenario.image, ImageName::Ddsnap);
        assert_eq!(scenario.memory_mib(), MEMORY_MIB);
        let small = parsed(&GOOD.replace("steps:", "memory: 256M\nsteps:")).unwrap();
        assert_eq!(small.memory_mib(), 256);
    }

    #[test]
    fn a_power_cut_within_a_repetition_is_found() {
        assert!(!parsed(GOOD).unwrap().cuts_power());
        let repeat = "  - repeat:
      times: 3
      steps:
        - run: x
          background: y
        - power_cut: {within: 5, resume: true}
";
        let scenario = parsed(&format!("{GOOD}{repeat}")).unwrap();
        assert!(scenario.cuts_power());
        assert_eq!(scenario.lines, [4, 6, 11, 13, 14]);
    }

    #[test]
    fn programs_to_make_are_found_beside_the_scenario() {
        let pushes = "  - push: {from: ../x/prog, to: /prog, make: true}
  - push: {from: data, to: /data}
";
        let scenario = parsed(&format!("{GOOD}{pushes}")).unwrap();
        let made: Vec<_> = scenario.made().collect();
        assert_eq!(made, [Path::new("dir/../x/prog")]);
    }

    #[test]
    fn an_unknown_field_is_named_with_file_and_line() {
        let error = refused(&GOOD.replace("save: ONE", "sace: ONE"));
        assert!(error.starts_with("dir/a.yaml:5: "), "{error}");
        assert!(
            error.contains("steps[0]") && error.contains("`sace`"),
            "{error}"
        );
        let error = refused(&GOOD.replace("contains:", "contain:"));
        assert!(error.starts_with("dir/a.yaml:12: "), "{error}");
        assert!(
            error.contains("stdout") && error.contains("`contain`"),
            "{error}"
        );
    }

    #[test]
    fn a_wrong_type_is_named_with_its_field() {
        let error = refused(&GOOD.replace("description: shows something", "description: [x]"));
        assert!(error.starts_with("dir/a.yaml:2: description"), "{error}");
        let error = refused(&GOOD.replace("save: ONE", "exit: never"));
        assert!(
            error.contains("nonzero") && error.starts_with("dir/a.yaml:"),
            "{error}"
        );
        let error = refused(&GOOD.replace("save: ONE", "exit: 256"));
        assert!(error.contains("exit is a number from 0 to 255"), "{error}");
    }

    #[test]
    fn a_missing_field_is_named() {
        assert!(refused("name: a\ndescription: b\n").contains("missing field `steps`"));
    }

    #[test]
    fn what_makes_no_sense_is_named_by_line_and_field() {
        for (from, to, expected) in [
            (
                "- reboot: true",
                "- reboot: true\n    power_cut: true",
                "dir/a.yaml:13: steps[3].reboot: ",
            ),
            (
                "- reboot: true",
                "- timeout: 3",
                "dir/a.yaml:13: steps[3].run: a step needs one of",
            ),
            (
                "wait: load",
                "wait: other",
                "dir/a.yaml:11: steps[2].wait: no background",
            ),
            (
                "same_as: ONE",
                "same_as: TWO",
                "dir/a.yaml:11: steps[2].same_as: no earlier step",
            ),
            (
                "same_as: ONE",
                "matches: '('",
                "dir/a.yaml:11: steps[2].matches: ",
            ),
            ("save: ONE", "save: one", "dir/a.yaml:4: steps[0].save: "),
            (
                "background: load",
                "background: load\n    exit: 1",
                "steps[1].exit: has no meaning beside background",
            ),
            (
                "- reboot: true",
                "- reboot: true\n    exit: 1",
                "steps[3].exit: has no meaning beside reboot",
            ),
            ("name: a", "name: b", "dir/a.yaml:1: name: "),
            ("steps:", "machines: 2\nsteps:", "dir/a.yaml:3: machines: 2"),
            (
                "- reboot: true",
                "- repeat: {times: 2, steps: [{run: x}, {wait: y}]}",
                "dir/a.yaml:13: steps[3].repeat.steps[1].wait: no background",
            ),
            (
                "- reboot: true",
                "- repeat: {times: 2, steps: [{run: x, background: y}]}",
                "steps[3].repeat: nothing in it waits for the background command \"y\"",
            ),
            (
                "- reboot: true",
                "- power_cut: {within: 2, seeds: 3}",
                "power_cut is true or {within, resume, seed}",
            ),
            (
                "- reboot: true",
                "- power_cut: false",
                "steps[3].power_cut: false says nothing",
            ),
            (
                "steps:",
                "disks: [2X]\nsteps:",
                "dir/a.yaml:3: disks: \"2X\"",
            ),
            (
                "steps:",
                "memory: 64M\nsteps:",
                "dir/a.yaml:3: memory: \"64M\"",
            ),
            (
                "steps:",
                "image: stock\nkernel: debug\nsteps:",
                "dir/a.yaml:4: kernel: ",
            ),
            (
                "- wait: load\n    stdout: {contains: [not, step], same_as: ONE}\n  - reboot: true",
                "- run: x",
                "steps: nothing waits for",
            ),
        ] {
            let error = refused(&GOOD.replace(from, to));
            assert!(error.contains(expected), "{expected}\n{error}");
        }
    }

    #[test]
    fn expectations_say_what_is_not_met() {
        let saved = |name: &str| (name == "SUM").then(|| "abc".to_string());
        let expect = |yaml: &str| serde_yaml::from_str::<Expect>(yaml).unwrap();
        for (yaml, text, fails) in [
            ("equals: abc", "abc\n", false),
            ("equals: abc", "abcd\n", true),
            ("same_as: SUM", "abc\n", false),
            ("same_as: SUM", "abd\n", true),
            ("contains: [a, c]", "abc", false),
            ("contains: [a, z]", "abc", true),
            ("matches: '^b+$'", "a\nbbb\nc", false),
            ("matches: '^b+$'", "abbb", true),
            ("absent: 'b'", "acd", false),
            ("absent: 'b'", "abc", true),
        ] {
            assert_eq!(
                expect(yaml).unmet(text, saved).is_some(),
                fails,
                "{yaml} {text:?}"
            );
        }
    }

    #[test]
    fn exit_codes_are_numbers_or_nonzero() {
        let exit = |yaml: &str| serde_yaml::from_str::<Exit>(yaml).unwrap();
        assert!(exit("3").accepts(3) && !exit("3").accepts(0));
        assert!(exit("nonzero").accepts(1) && !exit("nonzero").accepts(0));
    }
}
