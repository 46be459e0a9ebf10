// SPDX-License-Identifier: GPL-2.0-only
//! `cargo xtask deny`: licences and advisories of the dependencies.

use anyhow::Result;
use xshell::{Shell, cmd};

use crate::paths;

/// Runs cargo-deny with deny.toml. It is no Debian package and the advisory
/// database is no crate, so nothing is installed for it here.
pub fn deny() -> Result<()> {
    let sh = Shell::new()?;
    sh.change_dir(paths::workspace());
    if cmd!(sh, "cargo deny --version")
        .quiet()
        .ignore_stderr()
        .read()
        .is_err()
    {
        println!(
            "not checked: cargo-deny is not installed (cargo install --locked cargo-deny); \
             deny.toml has the rules"
        );
        return Ok(());
    }
    cmd!(sh, "cargo deny --workspace check").run()?;
    Ok(())
}
