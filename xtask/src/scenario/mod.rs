// SPDX-License-Identifier: GPL-2.0-only
//! Scenarios: what a guest is told to do and what must come of it, as YAML.

mod node;
pub mod report;
pub mod run;
pub mod schema;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use schema::Scenario;

/// Where the scenarios are, relative to the checkout.
pub const DIRECTORY: &str = "vmtest/scenarios";

/// Every scenario, by name. The first file that is wrong ends it.
pub fn load_all(dir: &Path) -> Result<Vec<Scenario>> {
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "yaml") {
            files.push(path);
        }
    }
    files.sort();
    files.iter().map(|file| Ok(schema::load(file)?)).collect()
}

/// The scenarios of these names, in their order; for no name all of them, the long ones only if they are
/// asked for.
pub fn select(all: Vec<Scenario>, names: &[String], long: bool) -> Result<Vec<Scenario>> {
    if names.is_empty() {
        return Ok(all.into_iter().filter(|s| long || !s.long).collect());
    }
    let mut chosen = Vec::new();
    for name in names {
        match all.iter().find(|s| s.name == *name) {
            Some(scenario) => chosen.push(scenario.clone()),
            None => {
                let known: Vec<&str> = all.iter().map(|s| s.name.as_str()).collect();
                bail!("no scenario named {name}; there are: {}", known.join(", "));
            }
        }
    }
    Ok(chosen)
}
