// SPDX-License-Identifier: GPL-2.0-only
//! `cargo xtask vmtest`: builds what the chosen scenarios need, runs them one
//! after the other, reports.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result};
use xshell::{Shell, cmd};

use crate::flags::Vmtest;
use crate::image::Image;
use crate::image::booted::{self, Booted};
use crate::scenario::report::{self, Outcome};
use crate::scenario::schema::{ImageName, Scenario};
use crate::scenario::{self, run};
use crate::ui::Step;
use crate::vm::lossy::Rng;
use crate::vm::machine::QemuEnded;
use crate::{guest, packages, paths};

/// Runs the scenarios; true if all passed.
pub fn vmtest(flags: &Vmtest) -> Result<bool> {
    let all = scenario::load_all(&paths::workspace().join(scenario::DIRECTORY))?;
    let chosen = scenario::select(all, &flags.names, flags.all || flags.list)?;
    if flags.list {
        for s in &chosen {
            println!(
                "{:18}  {}",
                s.name,
                s.description
                    .split_whitespace()
                    .collect::<Vec<_>>()
                    .join(" ")
            );
        }
        return Ok(true);
    }
    // Everything is built before the first scenario runs, so that all of them
    // judge the same state of the checkout.
    let mut images: BTreeMap<String, Image> = BTreeMap::new();
    let mut prepared = Vec::new();
    for s in &chosen {
        s.made().try_for_each(|program| make(&program))?;
        let wanted = wanted(s, flags);
        let key = format!("{wanted:?}");
        let image = match images.get(&key) {
            Some(image) => image.clone(),
            None => guest::image(&wanted)?,
        };
        let booted = booted::booted(&image, &s.disks, s.memory_mib)?;
        prepared.push((s, booted));
        images.insert(key, image);
    }
    let seed = flags.seed.unwrap_or_else(|| {
        let now = std::time::UNIX_EPOCH.elapsed().unwrap_or_default();
        Rng::new(now.as_nanos() as u64).next_u64() >> 32
    });
    if chosen.iter().any(Scenario::uses_seed) {
        eprintln!("random: --seed {seed}");
    }
    let mut outcomes = Vec::new();
    for (s, booted) in &prepared {
        outcomes.push(run_one(s, booted, flags.keep, seed));
        // After each, so that an interrupted run has reported what it knows.
        write_reports(&outcomes, flags)?;
    }
    print!("{}", report::table(&outcomes));
    Ok(outcomes.iter().all(|o| o.passed))
}

/// Builds a program that a scenario copies into its guest.
fn make(program: &Path) -> Result<()> {
    packages::require(&["build-essential"])?;
    let named = || format!("{} is no file to make", program.display());
    let dir = program.parent().with_context(named)?;
    let target = program.file_name().with_context(named)?;
    let sh = Shell::new()?;
    cmd!(sh, "make -s -C {dir} {target}").quiet().run()?;
    Ok(())
}

/// The guest a scenario asks for.
fn wanted(s: &Scenario, flags: &Vmtest) -> guest::Wanted {
    guest::Wanted {
        distro: flags.distro,
        image: match s.image {
            ImageName::Ddsnap if on_stock(s, flags) => guest::Image::StockInstalled,
            ImageName::Ddsnap => guest::Image::Ddsnap,
            // Its scenarios install the packages themselves.
            ImageName::Stock => guest::Image::Stock,
        },
        kernel: s.kernel.clone().unwrap_or_else(|| flags.kernel.clone()),
    }
}

/// Whether an ordinary scenario shall run on Debian's own kernel.
fn on_stock(s: &Scenario, flags: &Vmtest) -> bool {
    flags.stock && s.image == ImageName::Ddsnap && s.kernel.is_none()
}

fn run_one(s: &Scenario, booted: &Booted, keep: bool, seed: u64) -> Outcome {
    let started = Instant::now();
    let step = Step::start(s.name.clone());
    let mut result = run::run(s, booted, keep, seed, &step);
    // That says nothing of what is tested: seen in QEMU's own table of interrupts (hw/pci/msix.c) while a
    // guest boots, once in some hundred boots. A second one is a failure.
    if let Err(error) = &result
        && error.downcast_ref().is_some_and(QemuEnded::by_assertion)
    {
        eprintln!("{error:#}\nonce more");
        result = run::run(s, booted, keep, seed, &step);
    }
    step.done(if result.is_ok() { "passed" } else { "FAILED" });
    if let Err(error) = &result {
        eprintln!("{error:#}");
        let dir = run::dir_of(&s.name);
        eprintln!(
            "console, journal, dmesg, transcript and disks: {}",
            paths::shown(&dir)
        );
    }
    Outcome::new(&s.name, started.elapsed(), &result)
}

fn write_reports(outcomes: &[Outcome], flags: &Vmtest) -> Result<()> {
    if let Some(file) = &flags.junit {
        write(file, &report::junit(outcomes))?;
    }
    if let Some(file) = &flags.json {
        write(file, &serde_json::to_string_pretty(outcomes)?)?;
    }
    Ok(())
}

fn write(file: &Path, text: &str) -> Result<()> {
    fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))
}
