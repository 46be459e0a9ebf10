// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor status` and `zumastor list`.

use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};
use jiff::Timestamp;

use super::{Context, string, verb};
use crate::config;
use crate::control::{self, Event, Request};
use crate::process;
use crate::status::{View, json, replication, run_status, table};

/// Longest wait for a server's table: tens of millions of chunks take a slow disk minutes to count. A
/// server that is silent for a minute is given up earlier, by `ddsnap status` itself.
const TABLE_DEADLINE: Duration = Duration::from_secs(900);

/// The arguments.
pub fn command() -> Command {
    let flag = |name: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .action(ArgAction::SetTrue)
            .help(help)
    };
    verb("status", "Show what is wrong, and how volumes are")
        .arg(
            Arg::new("volume")
                .value_name("VOL")
                .help("Only this volume, with its snapshots"),
        )
        .arg(
            Arg::new("snap")
                .value_name("SNAP")
                .value_parser(value_parser!(u32))
                .help("Only this snapshot of it"),
        )
        .arg(flag("usage", "Add the table of snapshots and the space they use").short('u'))
        .arg(
            flag(
                "full",
                "Everything that is stored and runs, as the original showed it",
            )
            .short('f'),
        )
        .arg(flag("json", "For programs").conflicts_with_all(["full", "usage", "snap"]))
}

/// The arguments of `list`.
pub fn list_command() -> Command {
    verb("list", "List volumes, or the snapshots of a volume").arg(
        Arg::new("volume")
            .value_name("VOL")
            .help("Its snapshots, oldest first"),
    )
}

/// Runs `list`.
pub fn list(matches: &ArgMatches, context: &mut Context) -> u8 {
    let listed = views(context).and_then(|views| {
        let now = Timestamp::now().as_second();
        let text = match string(matches, "volume") {
            None => table::volume_names(&views),
            Some(name) => {
                let view = only(views, &name)?;
                // Each snapshot may look well for all that.
                if let Some(failure) = &view.failure {
                    context.say(&format!("WARNING: {name}: {failure}"));
                }
                table::snapshots(&view, now)
            }
        };
        context.print(&text);
        Ok(())
    });
    context.outcome(listed)
}

/// Runs the verb.
pub fn run(matches: &ArgMatches, context: &mut Context) -> u8 {
    let result = show(matches, context);
    context.outcome(result)
}

fn only(views: Vec<View>, name: &str) -> Result<View> {
    let mut views = views.into_iter();
    let found = views.find(|view| view.name == *name);
    found.with_context(|| format!("'{name}' is not a managed volume"))
}

fn show(matches: &ArgMatches, context: &mut Context) -> Result<()> {
    let mut views = views(context)?;
    let volume = string(matches, "volume");
    if let Some(name) = &volume {
        views = vec![only(views, name)?];
    }
    if matches.get_flag("json") {
        let now = Timestamp::now().as_second();
        context.print(&format!("{:#}\n", json::document(&views, now)));
        return Ok(());
    }
    if let (Some(name), Some(snap)) = (&volume, matches.get_one::<u32>("snap")) {
        let row = usage(context, name, Some(*snap))?;
        context.print(&row);
        return Ok(());
    }
    let full = matches.get_flag("full");
    let now = Timestamp::now().as_second();
    if volume.is_none() && !full {
        context.print(&table::volumes(&views, now));
    }
    let mut failed = None;
    for view in &views {
        let wanted = matches.get_flag("usage") || full;
        // The rest of the status matters most when a server does not answer.
        let usage = wanted.then(|| usage(context, &view.name, None)).transpose();
        let usage = usage.unwrap_or_else(|error| {
            let line = format!("{error:#}\n");
            failed.get_or_insert(error);
            Some(line)
        });
        match (&volume, usage) {
            (_, usage) if full => context.print(&view.render(usage.as_deref())),
            (Some(_), usage) => {
                let usage = usage.unwrap_or_else(|| table::snapshots(view, now));
                let replications = replication::table(std::slice::from_ref(view), now);
                context.print(&format!(
                    "{}{}{replications}{usage}",
                    view.head(),
                    table::volume(view)
                ));
            }
            (None, Some(usage)) => context.print(&format!("\nVOLUME {}:\n{usage}", view.name)),
            (None, None) => {}
        }
        if volume.is_none() && full {
            context.print("\n");
        }
    }
    if full {
        let run = run_status(&context.layout);
        context.print(&run);
    }
    failed.map_or(Ok(()), Err)
}

/// All volumes, from the daemon, or from their documents when none runs.
fn views(context: &mut Context) -> Result<Vec<View>> {
    if context.layout.running().exists() {
        match from_daemon(context) {
            Ok(views) => return Ok(views),
            Err(_) if !context.is_root => bail!("you must be root to see the status"),
            Err(error) => context.say(&format!("WARNING: {error:#}")),
        }
    }
    from_documents(context)
}

/// All volumes as the daemon has them.
pub fn from_daemon(context: &Context) -> Result<Vec<View>> {
    let mut views = None;
    control::call(&context.layout.control(), &Request::Status, |event| {
        if let Event::Status(all) = event {
            views = Some(all);
        }
    })?;
    views.context("the daemon sent no status")
}

/// All volumes as their documents have them.
pub fn from_documents(context: &Context) -> Result<Vec<View>> {
    let names = config::list(&context.layout)?;
    Ok(names
        .iter()
        .map(|name| View::from_document(&context.layout, name))
        .collect())
}

/// The table of a volume's store, as `ddsnap status` has it, or the row of one snapshot.
fn usage(context: &Context, volume: &str, snap: Option<u32>) -> Result<String> {
    let mut argv = vec!["ddsnap".into(), "status".into()];
    argv.push(context.layout.server_socket(volume).into());
    argv.extend(snap.map(|s| s.to_string().into()));
    let output = process::run(&argv, TABLE_DEADLINE)?;
    if output.code != Some(0) {
        bail!("no usage table of '{volume}': {}", output.complaint());
    }
    Ok(output.stdout)
}
