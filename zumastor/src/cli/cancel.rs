// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor cancel`.

use clap::{Arg, ArgMatches, Command};

use super::{Context, string, verb, volume_of, volume_operand};
use crate::control::Request;

/// The arguments.
pub fn command() -> Command {
    verb("cancel", "End long work on a volume before it is done")
        .arg(volume_operand())
        .arg(
            Arg::new("job")
                .value_name("JOB")
                .required(true)
                .help("What `zumastor status VOL` calls it"),
        )
}

/// Runs the verb.
pub fn run(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::Cancel {
        volume: volume_of(matches),
        job: string(matches, "job").unwrap_or_default(),
    })
}
