// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor failover` and `failback`: a replica becomes master, and the old master a replica.

use clap::{ArgMatches, Command};

use super::forget::dry_run;
use super::replication::{
    host_operand, mount_option, name_option, period_option, source_of, window_option,
};
use super::{Context, verb, volume_of, volume_operand};
use crate::control::Request;

/// The arguments of `failover`.
pub fn failover_command() -> Command {
    verb(
        "failover",
        "Make a replica the master, from the last snapshot that has arrived complete; what it was a replica of \
         becomes a target, and stops sending when it meets it",
    )
    .arg(volume_operand())
    .arg(dry_run())
}

/// The arguments of `failback`.
pub fn failback_command() -> Command {
    verb(
        "failback",
        "Make a master that was superseded a replica: what was written here since is kept as a snapshot, and what \
         changed since the last common one is brought here",
    )
    .arg(volume_operand())
    .arg(host_operand().help("The machine that is master now, as ssh takes it"))
    .arg(period_option().help(
        "Seconds from the start of one cycle to that of the next [default: as the target HOST had]",
    ))
    .arg(window_option().help(
        "The time of day in which cycles of the period may run [default: as the target HOST had]",
    ))
    .arg(name_option().help("The volume's name there [default: as the target HOST had, or the same]"))
    .arg(mount_option())
    .arg(dry_run())
}

/// Runs `failover`.
pub fn failover(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::Failover {
        volume: volume_of(matches),
        dry_run: matches.get_flag("dry-run"),
    })
}

/// Runs `failback`.
pub fn failback(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::Failback {
        source: source_of(matches),
        dry_run: matches.get_flag("dry-run"),
    })
}
