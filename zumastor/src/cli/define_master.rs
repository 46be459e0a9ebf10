// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor define master`.

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::{Context, verb, volume_of, volume_operand};
use crate::control::Request;
use crate::volume::MasterFlags;

/// The arguments.
pub fn command() -> Command {
    let flag = |short: char, name: &'static str, help: &'static str| {
        Arg::new(name)
            .short(short)
            .long(name)
            .action(ArgAction::SetTrue)
            .help(help)
    };
    verb(
        "master",
        "Mount the volume and take snapshots of it; rewrites all flags",
    )
    .arg(volume_operand())
    .arg(flag('e', "export", "Export the snapshots over NFS"))
    .arg(flag('s', "dotsnapshot", "Show the snapshots in .snapshot"))
    .arg(flag(
        'n',
        "no-snapmount",
        "Do not mount snapshots; voids the other flags",
    ))
    .arg(flag('p', "samba", "Show the snapshots to Samba"))
    .arg(flag('y', "yes", "Accepted for scripts; nothing is asked"))
}

/// Runs the verb.
pub fn run(matches: &ArgMatches, context: &mut Context) -> u8 {
    let flags = MasterFlags {
        export: matches.get_flag("export"),
        dotsnapshot: matches.get_flag("dotsnapshot"),
        no_snapmount: matches.get_flag("no-snapmount"),
        samba: matches.get_flag("samba"),
    };
    context.request(&Request::DefineMaster {
        volume: volume_of(matches),
        flags,
    })
}
