// SPDX-License-Identifier: GPL-2.0-only
//! The command line. One file per verb; what they share is here.
//!
//! Scripts rely on the order of the checks before a verb runs: version, help, database directory,
//! `running`, `locking`, root, and only then the usage. Messages go to stdout as `zumastor: text`.
//! Exit codes: 0 done, 1 failed or refused, 2 usage; what else there is the verb says, see [`refusal`].

use std::ffi::{OsStr, OsString};
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Result;
use clap::{Arg, ArgAction, ArgMatches, Command};
use ddsnap::stdio::complain;
use indicatif::{ProgressBar, ProgressStyle};

use crate::control::{self, Event, Request};
use crate::layout::Layout;
use crate::note::{Note, Progress};
use crate::refusal;
use crate::system::System;

mod authorize;
mod cancel;
mod change;
mod define_master;
mod define_schedule;
mod define_volume;
mod doctor;
mod early;
mod failover;
mod forget;
mod replication;
mod snapshot;
mod start_stop;
mod status;
mod thaw_guard;
mod udev_name;
mod verify;

/// The usage of the tool as a whole.
const USAGE: &str = "usage: zumastor {define|forget|start|stop|snapshot|replicate|verify|failover|failback|authorize|delete|protect|unprotect|\
     remount|resize|revert|list|cancel|status|doctor} [<subarguments>...]";

/// What to do when there is no daemon.
const HOW_TO_START: &str =
    "start it with `systemctl start zumastor` or `/etc/init.d/zumastor start`";

/// Success.
const OK: u8 = 0;
/// Failed or refused.
const FAILED: u8 = 1;
/// The command line is wrong.
const USAGE_ERROR: u8 = 2;

/// What the command line needs to know about its surroundings.
struct Context<'a> {
    layout: Layout,
    is_root: bool,
    /// Details are wanted.
    verbose: bool,
    out: &'a mut dyn Write,
}

impl Context<'_> {
    /// Prints `zumastor: text`.
    fn say(&mut self, text: &str) {
        self.print(&format!("zumastor: {text}\n"));
    }

    /// Prints `text` as it is. A reader that has gone away is no reason to fail what was done.
    fn print(&mut self, text: &str) {
        let _ = self.out.write_all(text.as_bytes());
        let _ = self.out.flush();
    }

    /// Sends a request, prints what happens, and turns the end into an exit code.
    fn request(&mut self, request: &Request) -> u8 {
        let socket = self.layout.control();
        // Or this process would itself keep busy a mount from within which it is run.
        let _ = std::env::set_current_dir("/");
        let mut bar: Option<ProgressBar> = None;
        let result = control::call(&socket, request, |event| match event {
            Event::Note(Note::Warning(line)) => self.say(&format!("WARNING: {line}")),
            Event::Note(Note::Detail(line)) if self.verbose => self.print(&format!("{line}\n")),
            Event::Note(Note::Detail(_)) => {}
            Event::Note(Note::Line(line)) => self.print(&format!("{line}\n")),
            Event::Note(Note::Progress(progress)) => show_progress(&mut bar, &progress),
            Event::Alive | Event::Status(_) | Event::Done { .. } => {}
        });
        if let Some(bar) = bar {
            bar.finish_and_clear();
        }
        self.outcome(result)
    }

    fn outcome(&mut self, result: Result<()>) -> u8 {
        match result {
            Ok(()) => OK,
            Err(error) => {
                self.say(&format!("{error:#}"));
                refusal::code(&error)
            }
        }
    }
}

/// A bar on a terminal, nothing elsewhere.
fn show_progress(bar: &mut Option<ProgressBar>, progress: &Progress) {
    if !io::stderr().is_terminal() {
        return;
    }
    let bar = bar.get_or_insert_with(|| {
        let template = "{msg} {bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {eta} left";
        let style = ProgressStyle::with_template(template);
        ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
    });
    if bar.message() != progress.subject {
        // The time left is that of this part, not of those before.
        bar.reset();
        bar.set_message(progress.subject.clone());
    }
    bar.set_length(progress.total);
    bar.set_position(progress.done);
}

/// The whole command, for parsing, man pages and completions.
#[must_use]
pub fn command() -> Command {
    Command::new("zumastor")
        .about("Volumes with snapshots on any block device")
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_flag(true)
        .disable_help_subcommand(true)
        .disable_version_flag(true)
        .subcommand_required(true)
        .arg(
            Arg::new("version")
                .short('V')
                .long("version")
                .action(ArgAction::SetTrue)
                .help("Print the version"),
        )
        .arg(help())
        .subcommand(
            verb("define", "Define a volume or its role")
                .subcommand_required(true)
                .subcommand(define_volume::command())
                .subcommand(define_master::command())
                .subcommand(define_schedule::command())
                .subcommand(replication::source_command())
                .subcommand(replication::target_command()),
        )
        .subcommand(
            verb(
                "forget",
                "Forget a volume, its schedule, source or a target, or delete a snapshot",
            )
            .subcommand_required(true)
            .subcommand(forget::volume_command())
            .subcommand(forget::snapshot_command("snapshot"))
            .subcommand(forget::schedule_command())
            .subcommand(
                replication::of_source_command("End the role of a replica; its snapshots stay")
                    .arg(forget::dry_run()),
            )
            .subcommand(
                replication::of_target_command("Forget a target and let go of what is kept for it")
                    .arg(forget::dry_run()),
            ),
        )
        .subcommand(start_stop::command("start", "Start a volume or its master"))
        .subcommand(start_stop::command("stop", "Stop a volume or its master"))
        .subcommand(snapshot::command())
        .subcommand(forget::snapshot_command("delete"))
        .subcommand(change::protect_command(
            "protect",
            "Keep a snapshot whatever its rotation says, and when the store is full",
        ))
        .subcommand(change::protect_command(
            "unprotect",
            "Treat a snapshot as any other again",
        ))
        .subcommand(change::remount_command())
        .subcommand(change::resize_command())
        .subcommand(change::revert_command())
        .subcommand(status::list_command())
        .subcommand(replication::replicate_command())
        .subcommand(failover::failover_command())
        .subcommand(failover::failback_command())
        .subcommand(authorize::command())
        .subcommand(replication::send_command())
        .subcommand(replication::receive_command())
        .subcommand(status::command())
        .subcommand(doctor::command())
        .subcommand(cancel::command())
        .subcommand(verify::command())
        .subcommand(verb("daemon", "Run the daemon in the foreground").hide(true))
        .subcommand(thaw_guard::command().hide(true))
        .subcommand(udev_name::command().hide(true))
        .subcommands(early::commands().map(|verb| verb.hide(true)))
}

/// A subcommand with `--help` alone: `-h` belongs to options.
fn verb(name: &'static str, about: &'static str) -> Command {
    Command::new(name)
        .about(about)
        .disable_help_flag(true)
        .disable_help_subcommand(true)
        .arg(help())
}

fn help() -> Arg {
    Arg::new("help")
        .long("help")
        .action(ArgAction::Help)
        .help("Print help")
}

/// The operand that names a volume.
fn volume_operand() -> Arg {
    Arg::new("volume")
        .value_name("VOL")
        .required(true)
        .help("Name of the volume")
}

fn string(matches: &ArgMatches, name: &str) -> Option<String> {
    matches.get_one::<String>(name).cloned()
}

/// The operand that names a snapshot.
fn snapshot_operand() -> Arg {
    Arg::new("snapshot")
        .value_name("SNAP")
        .value_parser(clap::value_parser!(u32))
        .required(true)
        .help("Number of the snapshot, as in VOL(N)")
}

fn snapshot_of(matches: &ArgMatches) -> u32 {
    // clap has demanded and checked it.
    matches.get_one("snapshot").copied().unwrap_or_default()
}

fn volume_of(matches: &ArgMatches) -> String {
    string(matches, "volume").unwrap_or_default()
}

/// The entry point.
#[must_use]
pub fn main() -> ExitCode {
    let argv: Vec<OsString> = std::env::args_os().collect();
    let mut out = io::stdout();
    let is_root = nix::unistd::geteuid().is_root();
    let mut context = Context {
        layout: Layout::system(),
        is_root,
        verbose: false,
        out: &mut out,
    };
    ExitCode::from(run(&argv, &mut context))
}

/// Checks in the order scripts rely on, then runs the verb.
fn run(argv: &[OsString], context: &mut Context) -> u8 {
    let args = argv.get(1..).unwrap_or_default();
    let is = |text: &str| args.first().is_some_and(|a| a == text);
    let internal = [
        "daemon",
        "thaw-guard",
        "udev-name",
        "udev-member",
        "activate",
        "shutdown",
    ];
    if internal.into_iter().any(is) {
        return parse_and_dispatch(argv, context);
    }
    if is("-V") || is("--version") {
        let version = std::fs::read_to_string(context.layout.version());
        let version = version.unwrap_or_else(|_| env!("CARGO_PKG_VERSION").to_string());
        context.print(&format!("{}\n", version.trim_end()));
        return OK;
    }
    if is("--help") {
        context.print(&format!("{USAGE}\n\n{}", command().render_long_help()));
        return OK;
    }
    if args
        .iter()
        .take_while(|a| *a != "--")
        .any(|a| a == "--help")
    {
        return parse_and_dispatch(argv, context);
    }
    let verb = args.first().and_then(|v| v.to_str()).unwrap_or_default();
    if let Err(refusal) = preconditions(verb, context) {
        // The standard output of these is the other machine's.
        match verb {
            "send" | "receive" => complain(format_args!("zumastor: {refusal}")),
            _ => context.say(&refusal),
        }
        return FAILED;
    }
    parse_and_dispatch(argv, context)
}

fn preconditions(verb: &str, context: &Context) -> Result<(), String> {
    let database = context.layout.volumes();
    // Not `is_dir`: the directory is root's, and others may not even see that it is there.
    if matches!(database.metadata(), Err(e) if e.kind() == io::ErrorKind::NotFound) {
        return Err(format!(
            "the database directory {} does not exist",
            database.display()
        ));
    }
    if !matches!(verb, "stop" | "status" | "list" | "doctor") && !context.layout.running().exists()
    {
        return Err(format!("zumastor is not running: {HOW_TO_START}"));
    }
    if !matches!(
        verb,
        "start" | "stop" | "status" | "list" | "doctor" | "replicate"
    ) && context.layout.locking().exists()
    {
        return Err("zumastor is starting or stopping: try again when it is done".to_string());
    }
    let privileged = [
        "define",
        "forget",
        "start",
        "stop",
        "snapshot",
        "replicate",
        "cancel",
        "doctor",
        "verify",
        "delete",
        "protect",
        "unprotect",
        "remount",
        "resize",
        "revert",
        "failover",
        "failback",
        "authorize",
    ];
    if privileged.contains(&verb) && !context.is_root {
        return Err(format!("you must be root to run `zumastor {verb}`"));
    }
    Ok(())
}

/// The exit code of a wrong command line: scripts tell apart those of `define source`.
fn usage_code(argv: &[OsString], error: &clap::Error) -> u8 {
    use clap::error::{ContextKind, ContextValue};
    if !(argv[1..].iter().take(2)).eq(["define", "source"].iter()) {
        return USAGE_ERROR;
    }
    match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(arg)) if arg.contains("--period") => refusal::BAD_PERIOD,
        _ => refusal::SOURCE_USAGE,
    }
}

fn parse_and_dispatch(argv: &[OsString], context: &mut Context) -> u8 {
    use clap::error::ErrorKind;
    let matches = match command().try_get_matches_from(argv) {
        Ok(matches) => matches,
        Err(error) if error.kind() == ErrorKind::DisplayHelp => {
            context.print(&error.render().to_string());
            return OK;
        }
        Err(error) => {
            let verbless = argv.len() < 2 || error.kind() == ErrorKind::InvalidSubcommand;
            if !verbless || argv.len() >= 3 {
                let text = error.render().to_string();
                context.say(text.trim_start_matches("error: ").trim_end());
                // clap leaves it out where a value is wrong.
                if !text.contains("Usage: ") {
                    context.print(&format!("{USAGE}\n"));
                }
                return usage_code(argv, &error);
            }
            if let Some(unknown) = argv.get(1) {
                let unknown = OsStr::to_string_lossy(unknown);
                context.say(&format!("this version has no verb '{unknown}'"));
            }
            context.print(&format!("{USAGE}\n"));
            return USAGE_ERROR;
        }
    };
    match matches.subcommand() {
        Some(("define", sub)) => match sub.subcommand() {
            Some(("volume", m)) => define_volume::run(m, context),
            Some(("master", m)) => define_master::run(m, context),
            Some(("schedule", m)) => define_schedule::run(m, context),
            Some(("source", m)) => replication::define_source(m, context),
            Some(("target", m)) => replication::define_target(m, context),
            _ => USAGE_ERROR,
        },
        Some(("forget", sub)) => match sub.subcommand() {
            Some(("volume", m)) => forget::run_volume(m, context),
            Some(("snapshot", m)) => forget::run_snapshot(m, context),
            Some(("schedule", m)) => forget::run_schedule(m, context),
            Some(("source", m)) => replication::forget(m, false, context),
            Some(("target", m)) => replication::forget(m, true, context),
            _ => USAGE_ERROR,
        },
        Some((verb @ ("start" | "stop"), sub)) => start_stop::run(verb, sub, context),
        Some(("snapshot", m)) => snapshot::run(m, context),
        Some(("delete", m)) => forget::run_snapshot(m, context),
        Some(("protect", m)) => change::protect(true, m, context),
        Some(("unprotect", m)) => change::protect(false, m, context),
        Some(("remount", m)) => change::remount(m, context),
        Some(("resize", m)) => change::resize(m, context),
        Some(("revert", m)) => change::revert(m, context),
        Some(("list", m)) => status::list(m, context),
        Some(("replicate", m)) => replication::replicate(m, context),
        Some(("authorize", m)) => authorize::run(m, context),
        Some(("failover", m)) => failover::failover(m, context),
        Some(("failback", m)) => failover::failback(m, context),
        Some(("send", m)) => replication::send(m, context),
        Some(("receive", m)) => replication::receive(m, context),
        Some(("status", m)) => status::run(m, context),
        Some(("doctor", _)) => doctor::run(context),
        Some(("cancel", m)) => cancel::run(m, context),
        Some(("verify", m)) => verify::run(m, context),
        Some(("thaw-guard", m)) => thaw_guard::run(m),
        Some(("udev-name", m)) => udev_name::run(m, context),
        Some((verb @ ("udev-member" | "activate" | "shutdown"), m)) => early::run(verb, m, context),
        Some(("daemon", _)) => match crate::daemon::run(Arc::new(System), Layout::system()) {
            Ok(()) => OK,
            Err(error) => {
                // The journal reads stderr, and nobody reads a daemon's stdout.
                complain(format_args!("zumastor: {error:#}"));
                FAILED
            }
        },
        _ => USAGE_ERROR,
    }
}

#[cfg(test)]
mod tests;
