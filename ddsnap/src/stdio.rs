// SPDX-License-Identifier: GPL-2.0-only
//! Writing results to standard output, where a reader may have gone.

use std::io::{self, Write};

use anyhow::{Context, Result};

/// Prints `text`. A reader that has seen enough (`| head`) is no error.
///
/// # Errors
/// The output cannot be written: a full disk must not look like success.
pub fn print(text: &str) -> Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout
        .write_all(text.as_bytes())
        .and_then(|()| stdout.flush())
    {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context("cannot write to standard output"),
    }
}
