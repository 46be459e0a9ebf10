// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor snapshot`.

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::{Context, string, verb, volume_of, volume_operand};
use crate::control::Request;

/// The arguments.
pub fn command() -> Command {
    verb("snapshot", "Take a snapshot and mount it")
        .arg(volume_operand())
        .arg(
            Arg::new("kind")
                .value_name("KIND")
                .help("Rotation of the snapshot [default: manual]"),
        )
        .arg(
            Arg::new("nowait")
                .short('n')
                .long("nowait")
                .action(ArgAction::SetTrue)
                .help("Return at once; what comes of it is in the log"),
        )
}

/// Runs the verb.
pub fn run(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::Snapshot {
        volume: volume_of(matches),
        kind: string(matches, "kind"),
        nowait: matches.get_flag("nowait"),
    })
}
