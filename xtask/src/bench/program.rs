// SPDX-License-Identifier: GPL-2.0-only
//! A measuring program, `benches/NAME` of a package: built for release, run, its lines read.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::paths;
use crate::ui::Step;

/// The built program.
pub struct Program {
    path: PathBuf,
}

/// The numbers that one run printed, by name.
#[derive(Debug, Default)]
pub struct Numbers(BTreeMap<String, f64>);

impl Numbers {
    /// The number of this name.
    pub fn get(&self, name: &str) -> Result<f64> {
        let found = self.0.get(name).copied();
        found.with_context(|| format!("the measuring program printed no {name}"))
    }

    fn parse(text: &str) -> Result<Self> {
        let pairs = text.lines().map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        });
        let numbers: Option<_> = pairs.collect();
        let numbers = numbers.with_context(|| format!("not NAME VALUE lines:\n{text}"))?;
        Ok(Numbers(numbers))
    }
}

impl Program {
    /// Builds it.
    pub fn build(package: &str, bench: &str) -> Result<Self> {
        let step = Step::start("the measuring program, release build");
        let out = Command::new("cargo")
            .current_dir(paths::workspace())
            .args(["build", "--release", "--locked", "--package", package])
            .args(["--bench", bench, "--message-format=json-render-diagnostics"])
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run cargo")?;
        if !out.status.success() {
            bail!("cargo build failed ({})", out.status);
        }
        let said = String::from_utf8_lossy(&out.stdout);
        let path = executable(&said).context("cargo named no executable")?;
        step.done("built");
        Ok(Program { path })
    }

    /// Where it is.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }

    /// Runs one measurement.
    pub fn run(&self, args: &[String]) -> Result<Numbers> {
        let out = Command::new(&self.path)
            .args(args)
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("cannot run {}", self.path.display()))?;
        if !out.status.success() {
            bail!("measuring failed ({}): {}", out.status, args.join(" "));
        }
        Numbers::parse(&String::from_utf8_lossy(&out.stdout))
    }
}

/// The bench target's executable in cargo's messages; the package's binary is built, and named, too.
fn executable(said: &str) -> Option<PathBuf> {
    said.lines()
        .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
        .filter(|message| message["target"]["kind"][0] == "bench")
        .find_map(|message| Some(PathBuf::from(message.get("executable")?.as_str()?)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_names_with_values() {
        let numbers = Numbers::parse("a/b 1.5\nc 2\n").unwrap();
        assert!((numbers.get("a/b").unwrap() - 1.5).abs() < 1e-9);
        assert!(numbers.get("d").is_err());
        assert!(Numbers::parse("a b c\n").is_err());
    }

    #[test]
    fn the_executable_is_found_among_the_artefacts() {
        let said = concat!(
            "{\"target\":{\"kind\":[\"lib\"]},\"executable\":null}\n",
            "{\"target\":{\"kind\":[\"bench\"]},\"executable\":\"/x/engine-1\"}\n",
            "{\"target\":{\"kind\":[\"bin\"]},\"executable\":\"/x/ddsnap\"}\n",
            "{\"reason\":\"build-finished\"}\n",
        );
        assert_eq!(executable(said), Some(PathBuf::from("/x/engine-1")));
        assert_eq!(executable("noise"), None);
    }
}
