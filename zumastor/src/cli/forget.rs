// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor forget volume` and `zumastor forget snapshot`.

use clap::{Arg, ArgMatches, Command, value_parser};

use super::{Context, verb, volume_of, volume_operand};
use crate::control::Request;

/// The arguments of `forget volume`.
pub fn volume_command() -> Command {
    verb(
        "volume",
        "Stop a volume and forget it; its devices keep their contents",
    )
    .arg(volume_operand())
}

/// The arguments of `forget snapshot`.
pub fn snapshot_command() -> Command {
    verb("snapshot", "Unmount a snapshot and delete it")
        .arg(volume_operand())
        .arg(
            Arg::new("snapshot")
                .value_name("SNAP")
                .value_parser(value_parser!(u32))
                .required(true)
                .help("Number of the snapshot, as in VOL(N)"),
        )
}

/// Runs `forget volume`.
pub fn run_volume(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::Forget {
        volume: volume_of(matches),
    })
}

/// Runs `forget snapshot`.
pub fn run_snapshot(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::ForgetSnapshot {
        volume: volume_of(matches),
        // clap has demanded and checked it.
        snapshot: matches.get_one("snapshot").copied().unwrap_or_default(),
    })
}
