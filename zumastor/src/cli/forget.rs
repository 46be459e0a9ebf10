// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor forget volume|snapshot|schedule`, and `zumastor delete`.

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::{Context, snapshot_of, snapshot_operand, string, verb, volume_of, volume_operand};
use crate::control::Request;

/// `--dry-run`.
pub fn dry_run() -> Arg {
    Arg::new("dry-run")
        .long("dry-run")
        .action(ArgAction::SetTrue)
        .help("Only say what would be done, after the same checks")
}

/// The arguments of `forget volume`.
pub fn volume_command() -> Command {
    verb(
        "volume",
        "Stop a volume and forget it; its devices keep their contents",
    )
    .arg(volume_operand())
    .arg(dry_run())
}

/// The arguments of `forget snapshot`, or of `delete`, which is the same.
pub fn snapshot_command(name: &'static str) -> Command {
    verb(name, "Unmount a snapshot and delete it")
        .arg(volume_operand())
        .arg(snapshot_operand())
        .arg(dry_run())
}

/// The arguments of `forget schedule`.
pub fn schedule_command() -> Command {
    verb("schedule", "End rotations; their snapshots stay")
        .arg(volume_operand())
        .arg(
            Arg::new("kind")
                .value_name("KIND")
                .help("Only this rotation"),
        )
}

/// Runs `forget volume`.
pub fn run_volume(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::Forget {
        volume: volume_of(matches),
        dry_run: matches.get_flag("dry-run"),
    })
}

/// Runs `forget snapshot` and `delete`.
pub fn run_snapshot(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::ForgetSnapshot {
        volume: volume_of(matches),
        snapshot: snapshot_of(matches),
        dry_run: matches.get_flag("dry-run"),
    })
}

/// Runs `forget schedule`.
pub fn run_schedule(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::ForgetSchedule {
        volume: volume_of(matches),
        kind: string(matches, "kind"),
    })
}
