// SPDX-License-Identifier: GPL-2.0-only
//! Running one scenario in one guest, with everything it leaves kept for reading.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::schema::{CutHow, PowerCut, Repeat, Scenario, Step};
use crate::image::booted::Booted;
use crate::ui::{self, Step as Progress};
use crate::vm::agent::{Output, Pid};
use crate::vm::console::find_report;
use crate::vm::lossy::{Lossy, Rng};
use crate::vm::machine::{Lifetime, Machine, guest_env};
use crate::{lock, paths};

/// Time to collect one file of evidence from a guest that may be in trouble.
const EVIDENCE: Duration = Duration::from_secs(60);

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
    let lossy = match scenario.cuts_power() {
        true => Some(booted.lossy(&dir)?),
        false => None,
    };
    let machine = booted.resume(&dir, Lifetime::WithHarness, lossy.as_ref())?;
    let transcript = dir.join("transcript.txt");
    let mut run = Run {
        scenario,
        booted,
        machine,
        lossy,
        seeds: Rng::new(seed),
        running: BTreeMap::new(),
        saved: BTreeMap::new(),
        transcript: File::create(&transcript)
            .with_context(|| format!("cannot create {}", transcript.display()))?,
        started: Instant::now(),
    };
    let result = run.steps(progress).and_then(|()| run.machine.check());
    let evidence = run.collect_evidence(&dir);
    let result = result.and(evidence);
    if let Err(error) = &result {
        run.note(&format!("FAILED: {error:#}\n"));
    }
    run.machine.cut_power()?;
    if result.is_ok() && !keep {
        remove_disks(&dir)?;
    }
    result
}

struct Run<'a> {
    scenario: &'a Scenario,
    booted: &'a Booted,
    machine: Machine,
    lossy: Option<Lossy>,
    seeds: Rng,
    running: BTreeMap<String, Pid>,
    saved: BTreeMap<String, String>,
    transcript: File,
    started: Instant,
}

impl Run<'_> {
    fn steps(&mut self, progress: &Progress) -> Result<()> {
        let scenario = self.scenario;
        let total = scenario.steps.len();
        for (i, step) in scenario.steps.iter().enumerate() {
            let note = |text: &str| progress.note(&format!("{}/{total} {text}", i + 1));
            let line = scenario.lines.get(i).copied().unwrap_or(0);
            self.one(step, &note)
                .with_context(|| format!("{}:{line}", paths::shown(&scenario.file)))?;
        }
        Ok(())
    }

    /// One step, within what is left of the scenario's time.
    fn one(&mut self, step: &Step, note: &dyn Fn(&str)) -> Result<()> {
        let title = title(step);
        note(&title);
        let all = self.scenario.timeout;
        match Duration::from_secs(all).checked_sub(self.started.elapsed()) {
            None => bail!("{title}: the scenario's {all} seconds are over"),
            Some(left) => self.step(step, step.limit().min(left), note).context(title),
        }
    }

    fn step(&mut self, step: &Step, limit: Duration, note: &dyn Fn(&str)) -> Result<()> {
        if let Some(repeat) = &step.repeat {
            return self.repeat(repeat, note);
        }
        if let Some(script) = &step.run {
            self.note(&format!("$ {}\n", script.trim_end()));
            let pid = self.start(script)?;
            if let Some(id) = &step.background {
                self.running.insert(id.clone(), pid);
                return Ok(());
            }
            let out = self.machine.finish(pid, limit)?;
            return self.judge(step, &out);
        }
        if let Some(script) = &step.until {
            return self.until(step, script, limit);
        }
        if let Some(id) = &step.wait {
            self.note(&format!("waiting for {id}\n"));
            let pid = self.running.remove(id).context("it is not running")?;
            let out = self.machine.finish(pid, limit)?;
            return self.judge(step, &out);
        }
        if let Some(push) = &step.push {
            let here = self.scenario.source_of(push);
            self.note(&format!("copying {} to {}\n", here.display(), push.to));
            let mut file =
                File::open(&here).with_context(|| format!("cannot open {}", here.display()))?;
            return self.machine.agent().push(&mut file, &push.to);
        }
        if step.reboot {
            self.note("reboot\n");
            self.running.clear();
            return self.machine.reboot(limit);
        }
        self.power_cut(step.power_cut.map(PowerCut::how).unwrap_or_default())
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

    fn power_cut(&mut self, how: CutHow) -> Result<()> {
        let Some(lossy) = &self.lossy else {
            bail!("the disks were not made for a power cut");
        };
        let next = self.seeds.next_u64();
        let seed = how.seed.unwrap_or(next >> 32);
        if how.within > 0 {
            let wait = Duration::from_millis(Rng::new(next).below(how.within * 1000));
            std::thread::sleep(wait);
        }
        self.machine.check()?;
        self.machine.cut_power()?;
        let losses = lossy.cut(seed)?;
        let dir = dir_of(&self.scenario.name);
        if how.resume {
            lossy.renew(0, &self.booted.lossy_root(&dir)?)?;
        }
        let disks = losses.iter().enumerate().map(|(i, loss)| {
            let disk = char::from(b'a' + i as u8); // at most 20 disks
            format!("vd{disk} {loss}")
        });
        let disks: Vec<String> = disks.collect();
        self.note(&format!("power cut, seed {seed}: {}\n", disks.join("; ")));
        self.running.clear();
        let Some(lossy) = &self.lossy else {
            return Ok(());
        };
        self.machine = match how.resume {
            true => self
                .booted
                .resume(&dir, Lifetime::WithHarness, Some(lossy))?,
            false => self
                .booted
                .boot_again(&dir, Lifetime::WithHarness, Some(lossy))?,
        };
        Ok(())
    }

    fn start(&mut self, script: &str) -> Result<Pid> {
        let mut env = guest_env();
        env.extend(
            self.saved
                .iter()
                .map(|(name, value)| format!("{name}={value}")),
        );
        let argv = ["/bin/bash", "-e", "-c", script].map(String::from);
        self.machine.agent().start(&argv, &env, b"")
    }

    fn until(&mut self, step: &Step, script: &str, limit: Duration) -> Result<()> {
        self.note(&format!("until $ {}\n", script.trim_end()));
        let end = Instant::now() + limit;
        loop {
            let pid = self.start(script)?;
            let left = end.saturating_duration_since(Instant::now());
            let out = self.machine.finish(pid, left.max(Duration::from_secs(1)))?;
            match self.unmet(step, &out) {
                None => return self.judge(step, &out),
                Some(reason) if Instant::now() + RETRY > end => {
                    self.record(&out);
                    bail!("after {}: {reason}", ui::seconds(limit));
                }
                Some(_) => std::thread::sleep(RETRY),
            }
        }
    }

    /// Compares a command's end with what is expected, and saves its output.
    fn judge(&mut self, step: &Step, out: &Output) -> Result<()> {
        self.record(out);
        if let Some(reason) = self.unmet(step, out) {
            bail!("{reason}");
        }
        if let Some(name) = &step.save {
            let text = String::from_utf8_lossy(&out.stdout).trim().to_string();
            self.saved.insert(name.clone(), text);
        }
        Ok(())
    }

    /// Why a command's end is not what the step expects, with its output.
    fn unmet(&self, step: &Step, out: &Output) -> Option<String> {
        let stdout = String::from_utf8_lossy(&out.stdout);
        let stderr = String::from_utf8_lossy(&out.stderr);
        let saved = |name: &str| self.saved.get(name).cloned();
        let expected = step.expected_exit();
        let reason = if !expected.accepts(out.code) {
            format!("exit code {} where {expected} is expected", out.code)
        } else if let Some(r) = step.stdout.as_ref().and_then(|e| e.unmet(&stdout, saved)) {
            format!("standard output {r}")
        } else if let Some(r) = step.stderr.as_ref().and_then(|e| e.unmet(&stderr, saved)) {
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

    fn note(&mut self, text: &str) {
        let at = self.started.elapsed().as_secs_f64();
        self.note_raw(&format!("[{at:8.1} s] {text}"));
    }

    fn note_raw(&mut self, text: &str) {
        if let Err(e) = self.transcript.write_all(text.as_bytes()) {
            eprintln!("cannot write the transcript: {e}");
        }
    }

    /// Fetches the kernel's messages and the journal, and judges the former: a
    /// report may have passed the console by.
    fn collect_evidence(&mut self, dir: &Path) -> Result<()> {
        let commands = [
            ("dmesg.txt", "dmesg"),
            ("journal.txt", "journalctl --no-pager -o short-precise"),
        ];
        let mut report = None;
        for (file, command) in commands {
            let out = match self.machine.evidence(command, EVIDENCE) {
                Ok(out) => out,
                // The guest is beyond answering; the console log is what there is.
                Err(e) => {
                    self.note(&format!("no {file}: {e:#}\n"));
                    break;
                }
            };
            if file == "dmesg.txt" {
                report = find_report(&String::from_utf8_lossy(&out.stdout));
            }
            let path = dir.join(file);
            fs::write(&path, out.stdout)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        match report {
            Some(report) => bail!("the guest's kernel reported:\n{report}"),
            None => Ok(()),
        }
    }
}

/// A step in a few words.
fn title(step: &Step) -> String {
    let text = match (&step.run, &step.until, &step.wait, &step.push) {
        (Some(script), ..) => script.trim().to_string(),
        (_, Some(script), ..) => format!("until {}", script.trim()),
        (_, _, Some(id), _) => format!("wait for {id}"),
        (.., Some(push)) => format!("push {}", push.to),
        _ if step.reboot => "reboot".to_string(),
        _ if step.repeat.is_some() => "repeat".to_string(),
        _ => "power cut".to_string(),
    };
    let mut lines = text.lines();
    let first: String = lines.next().unwrap_or_default().chars().take(100).collect();
    if lines.next().is_some() {
        format!("{first} ...")
    } else {
        first
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

fn remove_disks(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|e| e == "qcow2" || e == "raw" || e == "durable")
        {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}
