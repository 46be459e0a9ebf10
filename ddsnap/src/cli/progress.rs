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
    let target = match io::stderr().is_terminal() {
        true => ProgressDrawTarget::stderr(),
        false => ProgressDrawTarget::hidden(),
    };
    let style = ProgressStyle::with_template(
        "{wide_bar} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left",
    )
    .context("the progress bar's template")?;
    Ok(ProgressBar::with_draw_target(Some(0), target).with_style(style))
}
