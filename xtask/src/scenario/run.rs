// SPDX-License-Identifier: GPL-2.0-only
//! Running one scenario in its guests, with everything it leaves kept for reading.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::node::Node;
use super::schema::{Action, CutHow, Link, Repeat, Scenario, Step, Wanted};
use crate::image::booted::Booted;
use crate::image::identity::Identities;
use crate::ui::{self, Step as Progress};
use crate::vm::agent::{Output, Pid};
use crate::vm::lossy::Rng;
use crate::vm::machine::{guest_env, poll_until};
use crate::vm::network::{Network, Seat};
use crate::{lock, paths};

/// What each script has: `fails COMMAND`, since `! COMMAND` ends no script of `bash -e`.
const PRELUDE: &str = "fails() { if \"$@\"; then echo \"this did not fail: $*\"; return 1; fi; }\n";
/// Time between two tries of `until`.
const RETRY: Duration = Duration::from_millis(300);

/// Lines of a command's output shown when its step fails.
const SHOWN_LINES: usize = 40;

/// Where a scenario's files are.
pub fn dir_of(name: &str) -> PathBuf {
    paths::target().join("vmtest").join(name)
}

/// Runs a scenario. An error is a failed scenario, and says at which step.
///
/// By `seed` power cuts choose what is lost.
pub fn run(
    scenario: &Scenario,
    booted: &Booted,
    keep: bool,
    seed: u64,
    progress: &Progress,
) -> Result<()> {
    let dir = dir_of(&scenario.name);
    paths::make_dir(dir.parent().unwrap_or(&dir))?;
    // Two runs at once would take each other's disks away.
    let _lock = lock::take(&dir.with_extension("lock"))?;
    paths::fresh_dir(&dir)?;
    let transcript = dir.join("transcript.txt");
    let mut run = Run {
        scenario,
        nodes: Vec::new(),
        identities: None,
        seeds: Rng::new(seed),
        running: BTreeMap::new(),
        saved: BTreeMap::new(),
        transcript: File::create(&transcript)
            .with_context(|| format!("cannot create {}", transcript.display()))?,
        started: Instant::now(),
    };
    let result = run
        .start(booted, &dir)
        .and_then(|()| run.steps(progress))
        .and_then(|()| run.check());
    let evidence = run.collect_evidence();
    let result = result.and(evidence);
    if let Err(error) = &result {
        run.note(&format!("FAILED: {error:#}\n"));
    }
    run.nodes.iter_mut().try_for_each(Node::end)?;
    if result.is_ok() && !keep {
        run.nodes.iter().try_for_each(Node::remove_disks)?;
    }
    result
}

struct Run<'a> {
    scenario: &'a Scenario,
    nodes: Vec<Node<'a>>,
    /// Of the machines, where there are several.
    identities: Option<Identities>,
    seeds: Rng,
    /// Background commands, with the machine of each.
    running: BTreeMap<String, (usize, Pid)>,
    saved: BTreeMap<String, String>,
    transcript: File,
    started: Instant,
}

impl<'a> Run<'a> {
    /// Resumes the machines. One that is alone lives in `dir` itself.
    fn start(&mut self, booted: &'a Booted, dir: &Path) -> Result<()> {
        let scenario = self.scenario;
        if scenario.machines.len() == 1 {
            let lossy = scenario.cuts_power(0);
            self.nodes
                .push(Node::start(booted, dir.to_path_buf(), lossy, None)?);
            return Ok(());
        }
        let network = Network::new(&scenario.machines)?;
        let identities = self
            .identities
            .insert(Identities::make(&network, &dir.join("keys"))?);
        for (i, seat) in network.seats().enumerate() {
            let dir = dir.join(seat.name());
            let network: Option<(Seat, &Identities)> = Some((seat, identities));
            let node = Node::start(booted, dir, scenario.cuts_power(i), network);
            let name = &scenario.machines[i];
            self.nodes.push(node.with_context(|| name.clone())?);
        }
        Ok(())
    }

    fn steps(&mut self, progress: &Progress) -> Result<()> {
        let scenario = self.scenario;
        let total = scenario.steps.len();
        for (i, step) in scenario.steps.iter().enumerate() {
            let note = |text: &str| progress.note(&format!("{}/{total} {text}", i + 1));
            self.one(step, &note)
                .with_context(|| format!("{}:{}", paths::shown(&scenario.file), step.line))?;
        }
        Ok(())
    }

    /// One step, within what is left of the scenario's time.
    fn one(&mut self, step: &Step, note: &dyn Fn(&str)) -> Result<()> {
        let title = self.title(step);
        note(&title);
        if step.within > 0 {
            self.await_moment(step.within).context(title.clone())?;
        }
        let limit = self.left().map(|left| step.limit.min(left));
        limit
            .and_then(|limit| self.step(step, limit, note))
            .context(title)
    }

    /// What is left of the scenario's time.
    fn left(&self) -> Result<Duration> {
        let all = self.scenario.timeout;
        let left = all.checked_sub(self.started.elapsed());
        left.with_context(|| format!("the scenario's {} are over", ui::seconds(all)))
    }

    /// Lets the machines run until a random moment within so many seconds, and watches them meanwhile.
    fn await_moment(&mut self, seconds: u64) -> Result<()> {
        let moment = Instant::now() + Duration::from_millis(self.seeds.below(seconds * 1000));
        loop {
            self.check()?;
            let left = moment.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(self.left()?).min(RETRY));
        }
    }

    fn step(&mut self, step: &Step, limit: Duration, note: &dyn Fn(&str)) -> Result<()> {
        let on = step.on;
        match &step.action {
            Action::Run { script, wanted } => {
                self.tell(on, &format!("$ {}", script.trim_end()));
                let pid = self.launch(on, script)?;
                let out = self.finish(on, pid, limit)?;
                self.judge(wanted, &out)
            }
            Action::Start { script, id } => {
                self.tell(on, &format!("$ {}", script.trim_end()));
                let pid = self.launch(on, script)?;
                self.running.insert(id.clone(), (on, pid));
                Ok(())
            }
            Action::Until { script, wanted } => self.until(on, script, wanted, limit),
            Action::Wait { id, wanted } => {
                self.tell(on, &format!("waiting for {id}"));
                let (on, pid) = self.running.remove(id).context("it is not running")?;
                let out = self.finish(on, pid, limit)?;
                self.judge(wanted, &out)
            }
            Action::Push(push) => {
                let here = self.scenario.source_of(push);
                self.tell(on, &format!("copying {} to {}", here.display(), push.to));
                let mut file =
                    File::open(&here).with_context(|| format!("cannot open {}", here.display()))?;
                let machine = self.nodes[on].machine()?;
                machine.agent().push(&mut file, &push.to)
            }
            Action::PowerCut(how) => {
                self.cut(on, *how)?;
                match how.resume {
                    true => self.nodes[on].resume_after_cut(self.identities.as_ref()),
                    false => self.nodes[on].boot(),
                }
            }
            Action::Kill(how) => self.cut(on, *how),
            Action::Boot => {
                self.tell(on, "boot");
                self.nodes[on].boot()
            }
            Action::Reboot => {
                self.tell(on, "reboot");
                self.ended(on);
                self.nodes[on].reboot(limit)
            }
            Action::Link(link) => {
                self.tell(on, &format!("link {link:?}"));
                self.nodes[on].set_link(*link == Link::Up)
            }
            Action::Repeat(repeat) => self.repeat(repeat, note),
        }
    }

    fn repeat(&mut self, repeat: &Repeat, note: &dyn Fn(&str)) -> Result<()> {
        for round in 1..=repeat.times {
            let place = format!("round {round} of {}", repeat.times);
            self.saved.insert("ROUND".into(), round.to_string());
            self.note(&format!("{place}\n"));
            let note = |text: &str| note(&format!("{place}: {text}"));
            for (i, step) in repeat.steps.iter().enumerate() {
                self.one(step, &note)
                    .with_context(|| format!("{place}, repeat.steps[{i}]"))?;
            }
        }
        Ok(())
    }

    fn cut(&mut self, on: usize, how: CutHow) -> Result<()> {
        let next = self.seeds.next_u64();
        let seed = how.seed.unwrap_or(next >> 32);
        let lost = self.nodes[on].cut(seed, how.whole_blocks)?;
        self.tell(on, &format!("power cut, seed {seed}: {lost}"));
        self.ended(on);
        Ok(())
    }

    /// Whatever was running on a machine has ended.
    fn ended(&mut self, machine: usize) {
        self.running.retain(|_, (on, _)| *on != machine);
    }

    fn launch(&mut self, on: usize, script: &str) -> Result<Pid> {
        let mut env = guest_env();
        env.extend(
            self.saved
                .iter()
                .map(|(name, value)| format!("{name}={value}")),
        );
        let script = format!("{PRELUDE}{script}");
        let argv = ["/bin/bash", "-e", "-c", &script].map(String::from);
        self.nodes[on].machine()?.agent().start(&argv, &env, b"")
    }

    /// Waits for a command to end, and watches all machines meanwhile.
    fn finish(&mut self, on: usize, pid: Pid, limit: Duration) -> Result<Output> {
        poll_until(limit, || {
            let polled = self.nodes[on].machine()?.agent().poll(pid);
            self.check()?;
            polled
        })
    }

    fn check(&self) -> Result<()> {
        self.nodes.iter().try_for_each(Node::check)
    }

    fn until(&mut self, on: usize, script: &str, wanted: &Wanted, limit: Duration) -> Result<()> {
        self.tell(on, &format!("until $ {}", script.trim_end()));
        let end = Instant::now() + limit;
        loop {
            let pid = self.launch(on, script)?;
            let left = end.saturating_duration_since(Instant::now());
            let out = self.finish(on, pid, left.max(Duration::from_secs(1)))?;
            match self.unmet(wanted, &out) {
                None => return self.judge(wanted, &out),
                Some(reason) if Instant::now() + RETRY > end => {
                    self.record(&out);
                    bail!("after {}: {reason}", ui::seconds(limit));
                }
                Some(_) => std::thread::sleep(RETRY),
            }
        }
    }

    /// Compares a command's end with what is expected, and saves its output.
    fn judge(&mut self, wanted: &Wanted, out: &Output) -> Result<()> {
        self.record(out);
        if let Some(reason) = self.unmet(wanted, out) {
            bail!("{reason}");
        }
        if let Some(name) = &wanted.save {
            let text = String::from_utf8_lossy(&out.stdout).trim().to_string();
            self.saved.insert(name.clone(), text);
        }
        Ok(())
    }

    /// Why a command's end is not what the step expects, with its output.
    fn unmet(&self, wanted: &Wanted, out: &Output) -> Option<String> {
        let stdout = String::from_utf8_lossy(&out.stdout);
        let stderr = String::from_utf8_lossy(&out.stderr);
        let saved = |name: &str| self.saved.get(name).cloned();
        let expected = wanted.exit;
        let reason = if !expected.accepts(out.code) {
            format!("exit code {} where {expected} is expected", out.code)
        } else if let Some(r) = wanted.stdout.unmet(&stdout, saved) {
            format!("standard output {r}")
        } else if let Some(r) = wanted.stderr.unmet(&stderr, saved) {
            format!("standard error {r}")
        } else {
            return None;
        };
        let mut text = reason;
        for (name, content) in [("standard output", &stdout), ("standard error", &stderr)] {
            if !content.is_empty() {
                let _ = write!(text, "\n  {name}:\n{}", last_lines(content));
            }
        }
        Some(text)
    }

    fn record(&mut self, out: &Output) {
        let mut text = String::new();
        for (mark, bytes) in [("", &out.stdout), ("2> ", &out.stderr)] {
            for line in String::from_utf8_lossy(bytes).lines() {
                let _ = writeln!(text, "    {mark}{line}");
            }
        }
        let _ = writeln!(text, "    [exit {}]", out.code);
        self.note_raw(&text);
    }

    /// Notes what is done on a machine.
    fn tell(&mut self, on: usize, text: &str) {
        let name = self.nodes[on].name();
        let blank = if name.is_empty() { "" } else { " " };
        let line = format!("{name}{blank}{text}\n");
        self.note(&line);
    }

    fn note(&mut self, text: &str) {
        let at = self.started.elapsed().as_secs_f64();
        self.note_raw(&format!("[{at:8.1} s] {text}"));
    }

    fn note_raw(&mut self, text: &str) {
        if let Err(e) = self.transcript.write_all(text.as_bytes()) {
            eprintln!("cannot write the transcript: {e}");
        }
    }

    /// What every guest has to say; the first kernel report is the error.
    fn collect_evidence(&mut self) -> Result<()> {
        let mut result = Ok(());
        let mut missed = Vec::new();
        for node in &mut self.nodes {
            let name = node.name().to_string();
            let evidence = node.collect_evidence(|text| missed.push(format!("{name} {text}\n")));
            result = result.and(evidence);
        }
        missed.iter().for_each(|line| self.note(line));
        result
    }

    /// A step in a few words.
    fn title(&self, step: &Step) -> String {
        let text = match &step.action {
            Action::Run { script, .. } | Action::Start { script, .. } => script.trim().to_string(),
            Action::Until { script, .. } => format!("until {}", script.trim()),
            Action::Wait { id, .. } => format!("wait for {id}"),
            Action::Push(push) => format!("push {}", push.to),
            Action::PowerCut(_) => "power cut".to_string(),
            Action::Kill(_) => "kill".to_string(),
            Action::Boot => "boot".to_string(),
            Action::Reboot => "reboot".to_string(),
            Action::Link(link) => format!("link {link:?}"),
            Action::Repeat(_) => "repeat".to_string(),
        };
        let mut lines = text.lines();
        let first: String = lines.next().unwrap_or_default().chars().take(100).collect();
        let dots = if lines.next().is_some() { " ..." } else { "" };
        match (&step.action, self.nodes[step.on].name()) {
            (Action::Repeat(_), _) | (_, "") => format!("{first}{dots}"),
            (_, name) => format!("{name}: {first}{dots}"),
        }
    }
}

fn last_lines(text: &str) -> String {
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(SHOWN_LINES);
    all[from..]
        .iter()
        .map(|line| format!("    {line}\n"))
        .collect()
}
