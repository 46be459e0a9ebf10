// SPDX-License-Identifier: GPL-2.0-only
//! What systemd and udev run before the daemon is up and after it has ended. None of it is for
//! administrators, so it is in no help.
//!
//! - `zumastor activate INSTANCE`: [`crate::boot::activate`]. Exit code 0 if the volume is up or the daemon
//!   sees to it, 3 over another snapshot store than its own, else 1.
//! - `zumastor shutdown`: [`crate::shutdown::run`]. Exit code 0 if nothing is left, else 1.
//! - `zumastor udev-member`: prints [`crate::boot::member`] of the device in the environment; exit code 0.

use std::sync::Arc;

use clap::{Arg, ArgMatches, Command};
use ddsnap::stdio::complain;

use super::{Context, OK, string, verb};
use crate::system::System;
use crate::{boot, refusal, shutdown};

/// The three verbs.
pub fn commands() -> [Command; 3] {
    let instance = Arg::new("instance").value_name("INSTANCE").required(true);
    [
        verb("activate", "Bring a volume up before the daemon")
            .arg(instance.help("Name or UUID of the volume")),
        verb("shutdown", "End what is left of all volumes"),
        verb(
            "udev-member",
            "Say for udev what a volume uses a device for",
        ),
    ]
}

/// Runs one of them.
pub fn run(name: &str, matches: &ArgMatches, context: &mut Context) -> u8 {
    let result = match name {
        "activate" => {
            let instance = string(matches, "instance").unwrap_or_default();
            boot::activate(Arc::new(System), &context.layout, &instance)
        }
        "shutdown" => shutdown::run(&context.layout),
        _ => {
            let variable = |name: &str| std::env::var(name).ok();
            let (own, whole) = boot::names_from_udev(&context.layout, variable);
            for line in boot::member(&context.layout, &own, &whole) {
                context.print(&format!("{line}\n"));
            }
            Ok(())
        }
    };
    match result {
        Ok(()) => OK,
        Err(error) => {
            // The journal reads stderr.
            complain(format_args!("zumastor: {error:#}"));
            refusal::code(&error)
        }
    }
}
