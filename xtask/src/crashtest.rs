// SPDX-License-Identifier: GPL-2.0-only
//! `cargo xtask crashtest`: power cuts by the million, on all cores.
//!
//! The test is an example program of ddsnap that shares the harness of its tests, so nothing of it
//! is in what is shipped. It is built like the tests: optimised, with all assertions.

use std::ffi::OsString;
use std::process::Command;

use anyhow::{Context, Result};

use crate::flags::Crashtest;
use crate::paths;

const EXAMPLE: &str = "crashtest";

/// Builds and runs the test; its exit code.
pub fn crashtest(flags: &Crashtest) -> Result<u8> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let status = Command::new(cargo)
        .current_dir(paths::workspace())
        .args(["run", "--quiet", "--locked", "--package", "ddsnap"])
        .args(["--example", EXAMPLE, "--"])
        .args(arguments(flags)?)
        .status()
        .context("cannot run cargo")?;
    Ok(status
        .code()
        .and_then(|code| u8::try_from(code).ok())
        .unwrap_or(1))
}

fn arguments(flags: &Crashtest) -> Result<Vec<OsString>> {
    let mut all: Vec<OsString> = vec!["--points".into(), flags.points.to_string().into()];
    let numbers = [("--seed", flags.seed), ("--job", flags.job)];
    for (name, number) in numbers {
        if let Some(number) = number {
            all.extend([name.into(), number.to_string().into()]);
        }
    }
    if flags.trace {
        all.push("--trace".into());
    }
    if let Some(path) = &flags.json {
        // The test runs in the workspace's directory, the path was meant from here.
        let path = std::path::absolute(path)
            .with_context(|| format!("cannot find the way to {}", path.display()))?;
        all.extend(["--json".into(), path.into()]);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_test_is_asked_for_what_was_asked_for() {
        let flags = Crashtest {
            points: 7,
            seed: Some(3),
            job: None,
            trace: true,
            json: Some("/x/y.json".into()),
        };
        let all = arguments(&flags).unwrap();
        assert_eq!(
            all,
            [
                "--points",
                "7",
                "--seed",
                "3",
                "--trace",
                "--json",
                "/x/y.json"
            ]
            .map(OsString::from)
        );
    }
}
