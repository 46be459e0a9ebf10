// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor start` and `zumastor stop`.

use clap::{ArgMatches, Command};

use super::{Context, USAGE_ERROR, verb, volume_of, volume_operand};
use crate::control::{Request, Role};

/// The arguments.
pub fn command(name: &'static str, about: &'static str) -> Command {
    verb(name, about)
        .subcommand_required(true)
        .subcommand(verb("volume", "Agent, server, devices and mounts").arg(volume_operand()))
        .subcommand(verb("master", "Mounts and links").arg(volume_operand()))
}

/// Runs `start` or `stop`.
pub fn run(name: &str, matches: &ArgMatches, context: &mut Context) -> u8 {
    let (role, matches) = match matches.subcommand() {
        Some(("volume", matches)) => (Role::Volume, matches),
        Some(("master", matches)) => (Role::Master, matches),
        _ => return USAGE_ERROR,
    };
    let volume = volume_of(matches);
    context.request(&if name == "start" {
        Request::Start { role, volume }
    } else {
        Request::Stop { role, volume }
    })
}
