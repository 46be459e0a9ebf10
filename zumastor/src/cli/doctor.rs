// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor doctor`.

use clap::Command;

use super::{Context, FAILED, HOW_TO_START, OK, status, verb};
use crate::doctor;
use crate::status::table;

/// The arguments.
pub fn command() -> Command {
    verb(
        "doctor",
        "Look for what is wrong with volumes and what will go wrong around them: kernels, fstab, LVM, NFS. Changes nothing",
    )
}

/// Runs the verb: a line for each finding, and 1 if there is any.
pub fn run(context: &mut Context) -> u8 {
    let mut found = String::new();
    let from_daemon = if context.layout.running().exists() {
        status::from_daemon(context).map_err(|error| format!("{error:#}"))
    } else {
        Err(format!("zumastor is not running: {HOW_TO_START}"))
    };
    let views = from_daemon.or_else(|trouble| {
        found = format!("{trouble}\n");
        status::from_documents(context)
    });
    let views = match views {
        Ok(views) => views,
        Err(error) => return context.outcome(Err(error)),
    };
    found += &table::problems(&views);
    let volumes: Vec<_> = views
        .into_iter()
        .filter_map(|view| Some((view.name, view.config?)))
        .collect();
    for line in doctor::look(&context.layout, &volumes) {
        found += &format!("{line}\n");
    }
    if found.is_empty() {
        context.print("Nothing is wrong.\n");
        return OK;
    }
    context.print(&found);
    FAILED
}
