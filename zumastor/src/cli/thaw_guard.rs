// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor thaw-guard`: what the daemon starts before it freezes, see [`crate::thaw_guard`].

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Command};
use ddsnap::stdio::complain;

use super::{FAILED, OK, verb};

/// The arguments.
pub fn command() -> Command {
    verb(
        "thaw-guard",
        "Thaw file systems when the daemon, which holds the other end of standard input, cannot",
    )
    .arg(
        Arg::new("dir")
            .value_name("DIR")
            .num_args(1..)
            .value_parser(clap::value_parser!(PathBuf))
            .help("where they are mounted"),
    )
}

/// Runs the verb.
pub fn run(matches: &ArgMatches) -> u8 {
    let dirs: Vec<PathBuf> = matches
        .get_many("dir")
        .unwrap_or_default()
        .cloned()
        .collect();
    match crate::thaw_guard::watch(&dirs) {
        Ok(()) => OK,
        Err(error) => {
            complain(format_args!("zumastor thaw-guard: {error:#}"));
            FAILED
        }
    }
}
