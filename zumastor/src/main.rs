// SPDX-License-Identifier: GPL-2.0-only
//! The `zumastor` command; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    zumastor::cli::main()
}
