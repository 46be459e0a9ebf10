// SPDX-License-Identifier: GPL-2.0-only
//! The `ddsnap` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    ddsnap::cli::run(std::env::args_os())
}
