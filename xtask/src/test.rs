// SPDX-License-Identifier: GPL-2.0-only
//! `cargo xtask test`: every test, cheapest first, each stage with its time.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use xshell::{Shell, cmd};

use crate::flags::{Test, Vmtest};
use crate::image::Distro;
use crate::{packages, paths, tidy, ui, vmtest};

/// The scenario that stands for all: it goes through every part once.
const SCENARIO: &str = "howto-loopback";

/// Runs all stages; the first that fails ends it.
pub fn test(flags: &Test) -> Result<()> {
    // The crates need what the packages are built with: one list, debian/control's.
    packages::require(&["build-essential", "dpkg-dev"])?;
    packages::require_build_dependencies(&paths::workspace())?;
    let mut times = Vec::new();
    let mut stage = |name: &'static str, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        eprintln!("== {name}");
        let started = Instant::now();
        work().with_context(|| format!("stage {name:?}"))?;
        times.push((name, started.elapsed()));
        Ok(())
    };
    stage("tidy", &mut || tidy::tidy(false))?;
    stage("format", &mut || cargo(&["fmt", "--all", "--check"]))?;
    stage("clippy", &mut || {
        cargo(&[
            "clippy",
            "--workspace",
            "--all-targets",
            "--locked",
            "--",
            "-D",
            "warnings",
        ])
    })?;
    stage("unit and integration tests", &mut unit_tests)?;
    stage("documentation tests", &mut || {
        cargo(&["test", "--workspace", "--locked", "--doc"])
    })?;
    if flags.no_vm {
        eprintln!("== guest: left out, as asked (--no-vm)");
    } else {
        stage("guest", &mut one_scenario)?;
    }
    print!("{}", summary(&times));
    Ok(())
}

fn unit_tests() -> Result<()> {
    if has_nextest() {
        cargo(&["nextest", "run", "--workspace", "--locked"])
    } else {
        eprintln!("cargo-nextest is not installed; cargo test does the same, slower");
        cargo(&[
            "test",
            "--workspace",
            "--locked",
            "--lib",
            "--bins",
            "--tests",
        ])
    }
}

fn has_nextest() -> bool {
    Shell::new().is_ok_and(|sh| {
        cmd!(sh, "cargo nextest --version")
            .quiet()
            .ignore_stderr()
            .read()
            .is_ok()
    })
}

fn one_scenario() -> Result<()> {
    let flags = Vmtest {
        names: vec![SCENARIO.into()],
        list: false,
        junit: None,
        json: None,
        keep: false,
        distro: Distro::default(),
        kernel: "qemu".into(),
        stock: false,
        all: false,
        seed: None,
    };
    if !vmtest::vmtest(&flags)? {
        bail!("scenario {SCENARIO} failed");
    }
    Ok(())
}

/// Cargo with its output shown.
fn cargo(args: &[&str]) -> Result<()> {
    let sh = Shell::new()?;
    sh.change_dir(paths::workspace());
    cmd!(sh, "cargo {args...}").quiet().run()?;
    Ok(())
}

fn summary(times: &[(&str, Duration)]) -> String {
    let mut text = String::new();
    for (name, time) in times {
        text.push_str(&format!("{name:28} {}\n", ui::seconds(*time)));
    }
    let total: Duration = times.iter().map(|(_, time)| *time).sum();
    text.push_str(&format!(
        "{:28} {}\n",
        "all stages passed",
        ui::seconds(total)
    ));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_summary_adds_up() {
        let text = summary(&[
            ("a", Duration::from_secs(50)),
            ("b", Duration::from_secs(20)),
        ]);
        assert!(
            text.ends_with("all stages passed            1 min 10 s\n"),
            "{text}"
        );
    }
}
