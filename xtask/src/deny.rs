// SPDX-License-Identifier: GPL-2.0-only
//! `cargo xtask deny`: licences and advisories of the dependencies.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::paths;

/// Runs cargo-deny with deny.toml. It is no Debian package and the advisory
/// database is no crate, so nothing is installed for it here.
pub fn deny() -> Result<()> {
    let installed = Command::new("cargo").args(["deny", "--version"]).output();
    if !installed.is_ok_and(|out| out.status.success()) {
        println!(
            "not checked: cargo-deny is not installed (cargo install --locked cargo-deny); \
             deny.toml has the rules"
        );
        return Ok(());
    }
    let status = Command::new("cargo")
        .current_dir(paths::workspace())
        .args(["deny", "--workspace", "check"])
        .status()
        .context("cannot run cargo deny")?;
    if !status.success() {
        bail!("cargo deny has found something");
    }
    Ok(())
}
