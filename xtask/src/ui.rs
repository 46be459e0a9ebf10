// SPDX-License-Identifier: GPL-2.0-only
//! What people see while a long step runs: a spinner on a terminal, plain lines
//! in a log file.

use std::fs::File;
use std::io::IsTerminal;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

/// One step under way. It ends with a line that says how long it took.
pub struct Step {
    what: String,
    bar: ProgressBar,
    started: Instant,
}

impl Step {
    /// Announces `what`.
    pub fn start(what: impl Into<String>) -> Self {
        let what = what.into();
        let bar = if std::io::stderr().is_terminal() {
            let bar = ProgressBar::new_spinner();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_msg} {elapsed}") {
                bar.set_style(style);
            }
            bar.set_message(what.clone());
            bar.enable_steady_tick(Duration::from_millis(120));
            bar
        } else {
            eprintln!("{what} ...");
            ProgressBar::hidden()
        };
        Step {
            what,
            bar,
            started: Instant::now(),
        }
    }

    /// Shows what the step is doing now; nothing is printed without a terminal.
    pub fn note(&self, text: &str) {
        self.bar.set_message(format!("{}: {text}", self.what));
    }

    /// Ends the step with its result and time.
    pub fn done(self, result: &str) {
        self.bar.finish_and_clear();
        eprintln!(
            "{}: {result} ({})",
            self.what,
            seconds(self.started.elapsed())
        );
    }
}

/// A duration as people read it: `7.4 s`, `3 min 05 s`.
pub fn seconds(time: Duration) -> String {
    let whole = time.as_secs();
    if whole >= 60 {
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else {
        format!("{:.1} s", time.as_secs_f64())
    }
}

/// Runs a command with its output in `log`; a failure shows the log's last lines.
pub fn run_logged(command: &mut Command, log: &Path) -> Result<()> {
    let file = File::options()
        .create(true)
        .append(true)
        .open(log)
        .with_context(|| format!("cannot open log {}", log.display()))?;
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command
        .stdin(Stdio::null())
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        bail!(
            "{name} failed ({status}); the end of {}:\n{}",
            log.display(),
            tail(log, 40)
        );
    }
    Ok(())
}

/// The last `lines` lines of a file, indented.
pub fn tail(path: &Path, lines: usize) -> String {
    let text = std::fs::read(path).map(|b| String::from_utf8_lossy(&b).into_owned());
    let text = text.unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    let from = all.len().saturating_sub(lines);
    all[from..].iter().map(|l| format!("    {l}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_well() {
        assert_eq!(seconds(Duration::from_millis(7_420)), "7.4 s");
        assert_eq!(seconds(Duration::from_secs(185)), "3 min 05 s");
    }

    #[test]
    fn a_failing_command_shows_the_end_of_its_log() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut command = Command::new("sh");
        command.args(["-c", "echo first; echo the reason >&2; exit 3"]);
        let error = run_logged(&mut command, &log).unwrap_err().to_string();
        assert!(error.contains("the reason"), "{error}");
        assert!(error.contains("exit status: 3"), "{error}");
    }
}
