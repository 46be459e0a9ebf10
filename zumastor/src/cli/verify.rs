// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor verify`.

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::{Context, string, verb, volume_of, volume_operand};
use crate::control::Request;

/// The arguments.
pub fn command() -> Command {
    verb(
        "verify",
        "Read a snapshot on both machines and compare what it holds",
    )
    .after_help(
        "The newest snapshot that both machines have is read there and here, and its ranges that differ are named. \
         Nothing is written, and replication goes on meanwhile.\n\n\
         Exit codes: 0 both hold the same; 1 it could not be compared; 2 usage; 4 they differ.",
    )
    .arg(volume_operand())
    .arg(
        Arg::new("host")
            .value_name("TARGET")
            .help("The target [default: the only one, or what the volume is a replica of]"),
    )
    .arg(
        Arg::new("repair")
            .long("repair")
            .action(ArgAction::SetTrue)
            .help("Have a cycle send again what differs, and compare again"),
    )
}

/// Runs the verb.
pub fn run(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::Verify {
        volume: volume_of(matches),
        target: string(matches, "host"),
        repair: matches.get_flag("repair"),
    })
}
