// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor start` and `zumastor stop`.

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::{Context, USAGE_ERROR, replication, verb, volume_of, volume_operand};
use crate::control::{Request, Role};

/// An option of `start volume`.
const ACCEPT: &str = "accept-origin";

/// The arguments.
pub fn command(name: &'static str, about: &'static str) -> Command {
    let mut volume = verb("volume", "Agent, server, devices and mounts").arg(volume_operand());
    if name == "start" {
        volume = volume.arg(
            Arg::new(ACCEPT)
                .long(ACCEPT)
                .action(ArgAction::SetTrue)
                .help("Start although the origin was written without the volume: its snapshots are marked as doubtful, for good"),
        );
    }
    verb(name, about)
        .subcommand_required(true)
        .subcommand(volume)
        .subcommand(verb("master", "Mounts and links").arg(volume_operand()))
        .subcommand(replication::of_source_command(
            "What arrives from the source",
        ))
        .subcommand(replication::of_target_command("What is sent to a target"))
}

/// Runs `start` or `stop`.
pub fn run(name: &str, matches: &ArgMatches, context: &mut Context) -> u8 {
    let stopped = name == "stop";
    let (role, matches) = match matches.subcommand() {
        Some(("source", m)) => return replication::set_stopped(m, false, stopped, context),
        Some(("target", m)) => return replication::set_stopped(m, true, stopped, context),
        Some(("volume", matches)) => (Role::Volume, matches),
        Some(("master", matches)) => (Role::Master, matches),
        _ => return USAGE_ERROR,
    };
    let volume = volume_of(matches);
    let accept_origin = matches!(matches.try_get_one(ACCEPT), Ok(Some(true)));
    context.request(&if name == "start" {
        Request::Start {
            role,
            volume,
            accept_origin,
        }
    } else {
        Request::Stop { role, volume }
    })
}
