// SPDX-License-Identifier: GPL-2.0-only
//! Standard output and standard error, whose reader may have gone or whose disk may be full.
//!
//! The macros of the standard library panic then, and a panic is neither the documented exit code nor a
//! reason for a daemon to end.

use std::fmt::Display;
use std::io::{self, Write};

use anyhow::{Context, Result};

/// Prints a result. A reader that has seen enough (`| head`) is no error.
///
/// # Errors
/// The output cannot be written: a full disk must not look like success.
pub fn print(text: &str) -> Result<()> {
    match written(text) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        other => other.context(FAILED),
    }
}

/// Prints what must be out before something is done. A reader that has gone is an error too.
///
/// # Errors
/// Nobody can read it.
pub fn announce(text: &str) -> Result<()> {
    written(text).context(FAILED)
}

const FAILED: &str = "cannot write to standard output";

fn written(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Says something on standard error, in a line of its own. If nobody can hear it, that changes nothing.
pub fn complain(what: impl Display) {
    let _ = writeln!(io::stderr().lock(), "{what}");
}
