// SPDX-License-Identifier: GPL-2.0-only
//! `cargo xtask mutants`: breaks each promise of the engine, one at a time, and looks whether a test
//! notices.
//!
//! The promises are in the sources of ddsnap (`src/promise.rs` has the argument): one build with the
//! feature `mutants` has them all, and an environment variable names the one to break.

use std::ffi::OsString;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use regex::Regex;

use crate::flags::Mutants;
use crate::{paths, ui};

/// Tests of the engine that judge beside the crash test.
const TESTS: &[&str] = &[
    "promises",
    "bookmarks",
    "checkpoint",
    "disks",
    "foreign",
    "faults",
    "full",
    "repair",
    "resize",
    "revert",
    "sweep",
    "view",
    "model",
];

/// Time for one run of a test with every promise kept.
const DEADLINE: Duration = Duration::from_secs(900);

/// With one broken it may take so many times as long; no answer by then is an answer too.
const TIMES_AS_LONG: u32 = 10;

/// But this long at least.
const LEAST: Duration = Duration::from_secs(60);

/// A promise of the engine.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Promise {
    /// Its name.
    pub name: String,
    /// What goes wrong without it.
    pub why: String,
    /// Where it is kept, in the checkout.
    pub path: PathBuf,
    /// Line, counted from 1.
    pub line: usize,
}

/// Promises in a source file.
pub fn promises_in(path: &Path, text: &str) -> Result<Vec<Promise>> {
    let kept = Regex::new(r#"(?s)\bkept!\(\s*"([^"]*)",\s*"([^"]*)"\s*,?\s*\)"#)?;
    Ok(kept
        .captures_iter(text)
        .map(|found| Promise {
            name: found[1].to_string(),
            why: found[2].to_string(),
            path: path.to_path_buf(),
            line: text[..found.get(0).map_or(0, |all| all.start())]
                .matches('\n')
                .count()
                + 1,
        })
        .collect())
}

/// All promises, by file and line.
fn promises() -> Result<Vec<Promise>> {
    let mut all = Vec::new();
    let mut dirs = vec![paths::workspace().join("ddsnap/src")];
    while let Some(dir) = dirs.pop() {
        for entry in fs::read_dir(&dir).with_context(|| format!("cannot list {}", dir.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                dirs.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let text = fs::read_to_string(&path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                all.extend(promises_in(&path, &text)?);
            }
        }
    }
    all.sort_by(|a, b| (&a.path, a.line).cmp(&(&b.path, b.line)));
    Ok(all)
}

/// A run of a test program.
struct Judge {
    /// What the table calls it.
    name: String,
    program: PathBuf,
    args: Vec<OsString>,
    /// How long a run may take.
    limit: Duration,
}

/// How a run ended.
enum Verdict {
    Passed,
    /// And in which test, if it said so.
    Failed(Option<String>),
    /// It did not end in time.
    Hung,
}

/// How a mutant fared.
struct Fate {
    promise: Promise,
    /// What caught it; none if it survived.
    caught: Option<String>,
    reached: bool,
    took: Duration,
}

/// Tries all mutants, or those that are named; 0 if none survived.
pub fn mutants(flags: &Mutants) -> Result<u8> {
    let all = promises()?;
    if flags.list {
        for promise in &all {
            println!("{:34}  {}", promise.name, promise.why);
        }
        return Ok(0);
    }
    if let Some(unknown) = flags
        .names
        .iter()
        .find(|n| all.iter().all(|p| p.name != **n))
    {
        bail!("no promise named {unknown}; cargo xtask mutants --list shows them");
    }
    let wanted = |p: &Promise| flags.names.is_empty() || flags.names.contains(&p.name);
    let chosen: Vec<Promise> = all.into_iter().filter(wanted).collect();
    let mut judges = judges(flags)?;
    let dir = tempfile::tempdir().context("cannot make a directory")?;
    let broken = dir.path().join("broken");
    // What fails by itself catches everything and shows nothing.
    for judge in &mut judges {
        let started = Instant::now();
        if !matches!(run(judge, "", &broken)?, Verdict::Passed) {
            bail!("{} fails with every promise kept", judge.name);
        }
        judge.limit = LEAST.max(started.elapsed() * TIMES_AS_LONG);
    }
    // The first that notices is enough, so the quick ones are asked first.
    judges.sort_by_key(|judge| judge.limit);
    let mut fates = Vec::new();
    for promise in chosen {
        let started = Instant::now();
        let (mut caught, mut reached) = (None, false);
        for judge in &judges {
            let verdict = run(judge, &promise.name, &broken)?;
            reached |= broken.exists();
            let _ = fs::remove_file(&broken);
            caught = match verdict {
                Verdict::Passed => continue,
                Verdict::Failed(None) => Some(judge.name.clone()),
                Verdict::Failed(Some(test)) => Some(format!("{}: {test}", judge.name)),
                Verdict::Hung => Some(format!("{}, which hung", judge.name)),
            };
            break;
        }
        let fate = Fate {
            promise,
            caught,
            reached,
            took: started.elapsed(),
        };
        println!("{}", line(&fate));
        fates.push(fate);
    }
    let survived: Vec<&Fate> = fates.iter().filter(|f| f.caught.is_none()).collect();
    for fate in &survived {
        let Promise {
            why, path, line, ..
        } = &fate.promise;
        println!("survived: {}:{line}: {why}", paths::shown(path));
    }
    println!("mutants={} survived={}", fates.len(), survived.len());
    Ok(u8::from(!survived.is_empty()))
}

fn line(fate: &Fate) -> String {
    let result = match &fate.caught {
        Some(by) => format!("caught by {by}"),
        None if fate.reached => "SURVIVED".into(),
        None => "SURVIVED: no test comes by".into(),
    };
    let took = ui::seconds(fate.took);
    format!("{:34}  {took:>6}  {result}", fate.promise.name)
}

/// Builds the tests.
fn judges(flags: &Mutants) -> Result<Vec<Judge>> {
    let mut judges = Vec::new();
    let tests: Vec<&str> = TESTS.iter().flat_map(|test| ["--test", *test]).collect();
    let mut built = build(&[&["test", "--no-run"], &tests[..]].concat())?;
    built.retain(|(name, _)| TESTS.contains(&name.as_str()));
    built.sort_by_key(|(name, _)| TESTS.iter().position(|test| test == name));
    for (name, program) in built {
        judges.push(Judge {
            name: format!("tests/{name}.rs"),
            program,
            args: Vec::new(),
            limit: DEADLINE,
        });
    }
    let crashtest = build(&["build", "--example", "crashtest"])?;
    let (_, crashtest) = crashtest
        .into_iter()
        .find(|(name, _)| name == "crashtest")
        .context("cargo did not say where the crash test is")?;
    for seed in 1..=flags.seeds {
        let args = [
            "--points".to_string(),
            flags.points.to_string(),
            "--seed".to_string(),
            seed.to_string(),
            "--first".to_string(),
        ];
        judges.push(Judge {
            name: format!("crashtest, seed {seed}"),
            program: crashtest.clone(),
            args: args.map(OsString::from).to_vec(),
            limit: DEADLINE,
        });
    }
    Ok(judges)
}

/// Builds by cargo with the feature; name and path of each program.
fn build(args: &[&str]) -> Result<Vec<(String, PathBuf)>> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .current_dir(paths::workspace())
        .args(args)
        .args(["--locked", "--package", "ddsnap", "--features", "mutants"])
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run cargo")?;
    if !output.status.success() {
        bail!("the tests do not build with the feature mutants");
    }
    let mut built = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let message: serde_json::Value = serde_json::from_str(line)?;
        let name = message["target"]["name"].as_str();
        if let (Some(name), Some(program)) = (name, message["executable"].as_str()) {
            built.push((name.to_string(), program.into()));
        }
    }
    Ok(built)
}

/// Runs a test until it ends, or says that something failed.
fn run(judge: &Judge, name: &str, broken: &Path) -> Result<Verdict> {
    let mut child = Command::new(&judge.program)
        .current_dir(paths::workspace().join("ddsnap"))
        .args(&judge.args)
        .env("DDSNAP_BREAK", name)
        .env("DDSNAP_BROKEN", broken)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run {}", judge.program.display()))?;
    let output = child.stdout.take().context("no output to read")?;
    let (tell, told) = mpsc::channel();
    let reader = std::thread::spawn(move || {
        let lines = BufReader::new(output).lines().map_while(Result::ok);
        for line in lines {
            if let Some(test) = failed_test(&line) {
                // Nobody listens after the deadline.
                let _ = tell.send(test.to_owned());
            }
        }
    });
    let verdict = match told.recv_timeout(judge.limit) {
        Ok(test) => Some(Verdict::Failed(Some(test))),
        Err(RecvTimeoutError::Timeout) => Some(Verdict::Hung),
        // Its output has ended, and so has it.
        Err(RecvTimeoutError::Disconnected) => None,
    };
    if verdict.is_some() {
        child.kill()?;
    }
    let status = child.wait()?;
    let _ = reader.join();
    Ok(verdict.unwrap_or(match status.success() {
        true => Verdict::Passed,
        false => Verdict::Failed(None),
    }))
}

/// The test that this line of a test program says has failed.
fn failed_test(line: &str) -> Option<&str> {
    let test = line.strip_prefix("test ")?.strip_suffix("FAILED")?;
    Some(test.trim_end_matches(" ... "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_test_is_seen_as_soon_as_it_is_told_of() {
        assert_eq!(failed_test("test one::two ... FAILED"), Some("one::two"));
        assert_eq!(failed_test("test one ... ok"), None);
        assert_eq!(failed_test("test result: ok. 3 passed; 0 failed"), None);
    }

    #[test]
    fn promises_are_found_with_their_lines() {
        let text =
            "a\nif kept!(\n    \"one\",\n    \"why, so\"\n) {\n}\nlet b = kept!(\"two\", \"x\");\n";
        let found = promises_in(Path::new("f.rs"), text).unwrap();
        let found: Vec<_> = found
            .iter()
            .map(|p| (p.name.as_str(), p.why.as_str(), p.line))
            .collect();
        assert_eq!(found, [("one", "why, so", 2), ("two", "x", 7)]);
    }
}
