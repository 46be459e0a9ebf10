// SPDX-License-Identifier: GPL-2.0-only
//! The bar that long commands show, on standard error and only on a terminal.

use std::io::{self, IsTerminal};

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar over bytes, whose length may come later.
///
/// # Errors
/// Its template is wrong, which is a bug.
pub fn bar() -> Result<ProgressBar> {
    styled("{wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left")
}

/// A bar over things that are counted.
///
/// # Errors
/// Its template is wrong, which is a bug.
pub fn counting() -> Result<ProgressBar> {
    styled("{wide_bar} {human_pos} of {human_len}, {per_sec}, {eta} left")
}

fn styled(template: &str) -> Result<ProgressBar> {
    let target = match io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let style = ProgressStyle::with_template(template).context("the progress bar's template")?;
    Ok(ProgressBar::with_draw_target(Some(0), target).with_style(style))
}
