// SPDX-License-Identifier: GPL-2.0-only
//! The `ddsnap` command: one file per subcommand.
//!
//! Texts, layouts and exit codes are those of the original, which scripts know. 0: done. 1: refused,
//! or used wrongly. 99: nobody answers on a socket, or there is no sound store. Results go to standard
//! output, all else to standard error.

mod agent;
mod bookmark;
mod check;
mod create;
mod delete;
mod delta;
mod delta_mode;
mod dump;
mod export;
mod extract;
mod initialize;
mod json;
mod list;
mod listen;
mod new_file;
mod numbers;
mod offline;
mod priority;
mod progress;
mod resize;
mod revert;
mod scrub;
mod server;
mod status;
mod transmit;
mod usecount;

use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::process::ExitCode;

use anyhow::{Result, bail};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::client::{Client, ClientError};
use crate::stdio::{complain, print};
use crate::units::SnapTag;

/// Exit code: nobody answers, or there is no sound store.
const UNUSABLE: u8 = 99;

/// Snapshots of block devices: the store, its server, and the commands to it.
#[derive(Debug, Parser)]
#[command(
    name = "ddsnap",
    version,
    disable_help_flag = true,
    disable_help_subcommand = true
)]
#[command(arg_required_else_help = true, subcommand_required = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    help: Help,
}

/// Help that answers to the names it always had.
#[derive(Debug, Args)]
struct Help {
    /// Show this help.
    #[arg(short = '?', long, global = true, action = clap::ArgAction::Help)]
    help: Option<bool>,
    /// Show how the command is used, in short.
    #[arg(long, global = true)]
    usage: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    Initialize(initialize::Initialize),
    Agent(agent::Agent),
    Server(server::Server),
    Create(create::Create),
    Bookmark(bookmark::Bookmark),
    Delete(delete::Delete),
    List(list::List),
    Status(status::Status),
    Priority(priority::Priority),
    Usecount(usecount::Usecount),
    Delta(delta::Delta),
    Transmit(transmit::Transmit),
    Resize(resize::Resize),
    Revert(revert::Revert),
    Scrub(scrub::Scrub),
    Extract(extract::Extract),
    Export(export::Export),
    Check(check::Check),
    Dump(dump::Dump),
}

/// The command line's definition, for man pages and completions.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

/// Runs the command line `args`, the program's name first.
#[must_use]
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if args
        .iter()
        .skip(1)
        .take_while(|arg| *arg != "--")
        .any(|arg| arg == "--usage")
    {
        // As with --help, nobody may be reading.
        let _ = print_usage(&args);
        return ExitCode::SUCCESS;
    }
    let misused = match status::asks_for_state(&args) {
        true => status::STATE_UNKNOWN,
        false => 1,
    };
    let parsed = command()
        .try_get_matches_from(args)
        .and_then(|matches| Cli::from_arg_matches(&matches));
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => ExitCode::SUCCESS,
                _ => ExitCode::from(misused),
            };
        }
    };
    let result = match cli.command {
        Command::Initialize(command) => command.run(),
        Command::Agent(command) => command.run(),
        Command::Server(command) => command.run(),
        Command::Create(command) => command.run(),
        Command::Bookmark(command) => command.run(),
        Command::Delete(command) => command.run(),
        Command::List(command) => command.run(),
        Command::Status(command) => command.run(),
        Command::Priority(command) => command.run(),
        Command::Usecount(command) => command.run(),
        Command::Delta(command) => command.run(),
        Command::Transmit(command) => command.run(),
        Command::Resize(command) => command.run(),
        Command::Revert(command) => command.run(),
        Command::Scrub(command) => command.run(),
        Command::Extract(command) => command.run(),
        Command::Export(command) => command.run(),
        Command::Check(command) => command.run(),
        Command::Dump(command) => command.run(),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            complain(format_args!("ddsnap: {error:#}"));
            ExitCode::from(code_of(&error))
        }
    }
}

fn print_usage(args: &[OsString]) -> Result<()> {
    let mut command = command();
    command.build();
    let named = args
        .iter()
        .skip(1)
        .find_map(|arg| command.find_subcommand(arg).cloned());
    print(&format!("{}\n", named.unwrap_or(command).render_usage()))
}

fn code_of(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<ClientError>() {
        Some(ClientError::Connect { .. }) => UNUSABLE,
        None if error.is::<offline::Unsound>() => UNUSABLE,
        _ => 1,
    }
}

/// Says in the words of the original that a command was refused.
fn refused(verb: &str, result: Result<u8, ClientError>) -> Result<u8> {
    match result {
        Err(error @ ClientError::Refused { .. }) => {
            complain(format_args!("could not {verb} because {error}"));
            Ok(1)
        }
        other => Ok(other?),
    }
}

/// Refuses more or fewer operands than a command takes, as its usage has them.
///
/// clap could count them, but counts anew behind each option that stands between them.
fn check_operands<T>(operands: &[T], takes: RangeInclusive<usize>, usage: &str) -> Result<()> {
    if !takes.contains(&operands.len()) {
        bail!("{} operands were given; usage: {usage}", operands.len());
    }
    Ok(())
}

/// The operands of commands about one snapshot.
#[derive(Debug, Args)]
struct Target {
    /// The server's control socket: a path, or @NAME for an abstract one.
    #[arg(value_name = "SOCK")]
    socket: String,
    /// The snapshot's number.
    #[arg(value_name = "TAG", value_parser = snap_tag, allow_negative_numbers = true)]
    tag: SnapTag,
}

impl Target {
    fn connect(&self) -> Result<Client, ClientError> {
        Client::connect(&self.socket)
    }
}

fn snap_tag(text: &str) -> Result<SnapTag, String> {
    match text.parse() {
        // The origin is -1, all ones, in table lines: no snapshot can have that.
        Ok(u32::MAX) | Err(_) => Err(format!("a snapshot's number is 0 to {}", u32::MAX - 1)),
        Ok(tag) => Ok(SnapTag(tag)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_definition_is_in_order() {
        command().debug_assert();
    }

    #[test]
    fn tags_leave_room_for_the_origin() {
        assert_eq!(snap_tag("4294967294"), Ok(SnapTag(u32::MAX - 1)));
        for bad in ["4294967295", "-1", "", "x", "1x"] {
            assert!(snap_tag(bad).is_err(), "{bad}");
        }
    }
}
