// SPDX-License-Identifier: GPL-2.0-only
//! `cargo xtask tidy`: rules of the tree that no compiler checks.
//!
//! Each rule is one module with a function from the tree's files to problems;
//! a problem names file and line.

mod documents;
mod imports;
mod promises;
mod text;

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use xshell::{Shell, cmd};

use crate::{paths, scenario};

/// A file of the tree and its text.
pub struct Source {
    /// Path in the checkout.
    pub path: PathBuf,
    /// Content.
    pub text: String,
}

/// Something that is not as it should be.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Problem {
    /// Path in the checkout.
    pub path: PathBuf,
    /// Line, counted from 1; 0 for the whole file.
    pub line: usize,
    /// What is wrong and what would be right.
    pub what: String,
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}: {}", self.path.display(), self.line, self.what)
    }
}

/// Checks everything; with `bless`, first notes that the documents are up to date.
pub fn tidy(bless: bool) -> Result<()> {
    let root = paths::workspace();
    if bless {
        documents::bless(&root)?;
    }
    let sources = sources(&root)?;
    let mut problems = text::check(&sources, &root);
    problems.extend(imports::check(&sources));
    problems.extend(promises::check(&sources));
    problems.extend(documents::check(&root)?);
    if let Err(error) = scenario::load_all(&root.join(scenario::DIRECTORY)) {
        problems.push(Problem {
            path: scenario::DIRECTORY.into(),
            line: 0,
            what: format!("{error:#}"),
        });
    }
    problems.sort();
    for problem in &problems {
        println!("{problem}");
    }
    match problems.len() {
        0 => Ok(()),
        1 => bail!("tidy found one problem"),
        n => bail!("tidy found {n} problems"),
    }
}

/// Inputs of the fuzz targets: bytes, even where they happen to be text.
const FUZZ_INPUTS: [&str; 2] = ["ddsnap/fuzz/regressions/", "zumastor/fuzz/regressions/"];

/// The text files of the checkout: what git tracks or would track.
fn sources(root: &Path) -> Result<Vec<Source>> {
    let sh = Shell::new()?;
    sh.change_dir(root);
    let listed = cmd!(sh, "git ls-files -z --cached --others --exclude-standard")
        .quiet()
        .read()?;
    let mut sources = Vec::new();
    let names = listed.split('\0').filter(|name| !name.is_empty());
    let is_input = |name: &&str| FUZZ_INPUTS.iter().any(|inputs| name.starts_with(inputs));
    for name in names.filter(|name| !is_input(name)) {
        let bytes = std::fs::read(root.join(name)).unwrap_or_default();
        if let Ok(text) = String::from_utf8(bytes) {
            if !text.contains('\0') {
                sources.push(Source {
                    path: name.into(),
                    text,
                });
            }
        }
    }
    Ok(sources)
}
