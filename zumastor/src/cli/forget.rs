// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor forget volume`.

use clap::{ArgMatches, Command};

use super::{Context, verb, volume_of, volume_operand};
use crate::control::Request;

/// The arguments.
pub fn command() -> Command {
    verb(
        "volume",
        "Stop a volume and forget it; its devices keep their contents",
    )
    .arg(volume_operand())
}

/// Runs the verb.
pub fn run(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::Forget {
        volume: volume_of(matches),
    })
}
