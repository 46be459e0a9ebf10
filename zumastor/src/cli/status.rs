// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor status`.

use std::time::Duration;

use anyhow::{Result, bail};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::{Context, string, verb};
use crate::config;
use crate::control::{self, Event, Request};
use crate::process;
use crate::status::{View, run_status};

/// Longest wait for a server's table: tens of millions of chunks take a slow disk minutes to count. A
/// server that is silent for a minute is given up earlier, by `ddsnap status` itself.
const TABLE_DEADLINE: Duration = Duration::from_secs(900);

/// The arguments.
pub fn command() -> Command {
    let flag = |short: char, name: &'static str, help: &'static str| {
        Arg::new(name)
            .short(short)
            .long(name)
            .action(ArgAction::SetTrue)
            .help(help)
    };
    verb("status", "Show volumes, their snapshots and what runs")
        .arg(
            Arg::new("volume")
                .value_name("VOL")
                .help("Only this volume"),
        )
        .arg(
            Arg::new("snap")
                .value_name("SNAP")
                .value_parser(value_parser!(u32))
                .help("Only this snapshot of it"),
        )
        .arg(flag(
            'u',
            "usage",
            "Add the table of snapshots and the space they use",
        ))
        .arg(flag(
            'f',
            "full",
            "Add everything, also when a volume is named",
        ))
}

/// Runs the verb.
pub fn run(matches: &ArgMatches, context: &mut Context) -> u8 {
    let result = show(matches, context);
    context.outcome(result)
}

fn show(matches: &ArgMatches, context: &mut Context) -> Result<()> {
    let mut views = views(context)?;
    let volume = string(matches, "volume");
    if let Some(name) = &volume {
        views.retain(|view| view.name == *name);
        if views.is_empty() {
            bail!("'{name}' is not a managed volume");
        }
    }
    if let (Some(name), Some(snap)) = (&volume, matches.get_one::<u32>("snap")) {
        let row = table(context, name, Some(*snap))?;
        context.print(&row);
        return Ok(());
    }
    let full = matches.get_flag("full");
    let mut failed = None;
    for view in &views {
        let usage = matches.get_flag("usage") || full;
        // The rest of the status matters most when a server does not answer.
        let usage = usage.then(|| table(context, &view.name, None)).transpose();
        let usage = usage.unwrap_or_else(|error| {
            let line = format!("{error:#}\n");
            failed.get_or_insert(error);
            Some(line)
        });
        context.print(&view.render(usage.as_deref()));
        if volume.is_none() {
            context.print("\n");
        }
    }
    if volume.is_none() || full {
        let run = run_status(&context.layout);
        context.print(&run);
    }
    failed.map_or(Ok(()), Err)
}

/// All volumes, from the daemon, or from their documents when none runs.
fn views(context: &mut Context) -> Result<Vec<View>> {
    if context.layout.running().exists() {
        let mut views = None;
        let result = control::call(&context.layout.control(), &Request::Status, |event| {
            if let Event::Status(all) = event {
                views = Some(all);
            }
        });
        match (result, views) {
            (Ok(()), Some(views)) => return Ok(views),
            (Ok(()), None) => bail!("the daemon sent no status"),
            (Err(_), _) if !context.is_root => bail!("you must be root to see the status"),
            (Err(error), _) => context.say(&format!("WARNING: {error:#}")),
        }
    }
    let names = config::list(&context.layout)?;
    Ok(names
        .iter()
        .map(|name| View::from_document(&context.layout, name))
        .collect())
}

/// The table of a volume's store, as `ddsnap status` has it, or the row of one snapshot.
fn table(context: &Context, volume: &str, snap: Option<u32>) -> Result<String> {
    let mut argv = vec!["ddsnap".into(), "status".into()];
    argv.push(context.layout.server_socket(volume).into());
    argv.extend(snap.map(|s| s.to_string().into()));
    let output = process::run(&argv, TABLE_DEADLINE)?;
    if output.code != Some(0) {
        bail!("no usage table of '{volume}': {}", output.complaint());
    }
    Ok(output.stdout)
}
