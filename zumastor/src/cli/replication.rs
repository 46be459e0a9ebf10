// SPDX-License-Identifier: GPL-2.0-only
//! The verbs of replication: `define source|target`, `forget source|target`, `replicate`, `send`, `receive`.

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::forget::dry_run;
use super::{Context, string, verb, volume_of, volume_operand};
use crate::config::HoldPolicy;
use crate::config::Window;
use crate::control::Request;
use crate::replicate::socket::{self, Open};
use crate::volume::{DefineSource, DefineTarget};

pub(super) fn host_operand() -> Arg {
    Arg::new("host")
        .value_name("HOST")
        .required(true)
        .help("The other machine, as ssh takes it")
}

pub(super) fn name_option() -> Arg {
    Arg::new("name")
        .short('n')
        .long("name")
        .value_name("REMOTEVOL")
        .help("The volume's name there [default: the same]")
}

pub(super) fn period_option() -> Arg {
    Arg::new("period")
        .short('p')
        .long("period")
        .value_name("SEC")
        .value_parser(value_parser!(u64).range(1..))
        .help("Seconds from the start of one cycle to that of the next [default: only when asked]")
}

pub(super) fn window_option() -> Arg {
    Arg::new("window")
        .long("window")
        .value_name("FROM-TO")
        .value_parser(value_parser!(Window))
        .help("The time of day in which cycles of the period may run, like 22:00-06:00 [default: all day]")
}

pub(super) fn mount_option() -> Arg {
    flag("mount-snap", "Mount the newest complete snapshot").short('m')
}

pub(super) fn flag(name: &'static str, help: &'static str) -> Arg {
    Arg::new(name)
        .long(name)
        .action(ArgAction::SetTrue)
        .help(help)
}

/// The arguments of `define source`.
pub fn source_command() -> Command {
    verb(
        "source",
        "Make a volume the replica of another machine's; it is no master any more, and what it holds is kept as a snapshot",
    )
    .arg(volume_operand())
    .arg(host_operand())
    .arg(period_option())
    .arg(window_option())
    .arg(name_option())
    .arg(mount_option())
    .arg(flag("yes", "Ask nothing, as ever").short('y'))
    .arg(dry_run())
}

/// The arguments of `define target`.
pub fn target_command() -> Command {
    verb("target", "Have a volume replicated to another machine")
        .arg(volume_operand())
        .arg(host_operand())
        .arg(period_option())
        .arg(window_option())
        .arg(name_option())
        .arg(
            Arg::new("ratelimit")
                .short('r')
                .long("ratelimit")
                .value_name("BYTES_PER_S")
                .value_parser(value_parser!(u64).range(1..))
                .help("Most bytes a second"),
        )
        .arg(flag("uncompressed", "Send the data as it is").short('u'))
        .arg(
            Arg::new("test")
                .short('t')
                .long("test")
                .value_name("WHAT")
                .value_parser(["fullvolume"])
                .help(
                    "After each cycle that this machine begins, read all of both sides and compare, as `verify` does",
                ),
        )
        .arg(
            Arg::new("on-full")
                .long("on-full")
                .value_name("WHAT")
                .value_parser(["bookmark", "protect"])
                .default_value("bookmark")
                .help(
                    "What a full store does with the snapshot that the next increment starts from: its data \
                     goes and what changes stays known, or writes to the volume fail",
                ),
        )
}

/// The arguments of `VERB source`.
pub fn of_source_command(about: &'static str) -> Command {
    verb("source", about).arg(volume_operand())
}

/// The arguments of `VERB target`.
pub fn of_target_command(about: &'static str) -> Command {
    verb("target", about)
        .arg(volume_operand())
        .arg(host_operand())
}

/// The arguments of `replicate`.
pub fn replicate_command() -> Command {
    verb(
        "replicate",
        "Bring the newest snapshot to a target, or from the source",
    )
    .arg(volume_operand())
    .arg(
        Arg::new("host")
            .value_name("HOST")
            .help("The target [default: what the volume is a replica of is fetched]"),
    )
    .arg(
        Arg::new("snapnum")
            .short('s')
            .long("snapnum")
            .value_name("SNAP")
            .value_parser(value_parser!(u32))
            .requires("host")
            .help("Send this snapshot, which is there, rather than a new one"),
    )
    .arg(
        Arg::new("delay")
            .short('d')
            .long("delay")
            .value_name("SEC")
            .value_parser(value_parser!(u64))
            .help("Without effect, for scripts that know it: the end is not polled for"),
    )
    .arg(
        flag("wait", "Wait for the end, as ever")
            .short('w')
            .conflicts_with("nowait"),
    )
    .arg(
        flag(
            "nowait",
            "Return at once; what comes of it is in the status",
        )
        .short('n'),
    )
    .arg(flag(
        "full",
        "Copy everything over whatever the target holds, if the two have nothing in common",
    ))
    .arg(flag(
        "force-base",
        "Take a target back that was written to; a snapshot keeps what was written",
    ))
    .arg(
        dry_run()
            .help("Only say what would be done, without asking the other machine")
            .conflicts_with("nowait"),
    )
}

/// The arguments of `receive`.
pub fn receive_command() -> Command {
    verb(
        "receive",
        "Take a replication stream from standard input; what the upstream runs by ssh",
    )
    .long_about(
        "Take a replication stream from standard input, which is what the upstream runs by ssh.\n\nWith `start` and \
         `done`, for scripts that send with `ddsnap transmit`: `receive start VOL` listens on the port of `define source \
         VOL HOST:PORT`, or 4321, on the loopback address or that in /etc/zumastor/listen_address, and prints `PORT HOLD [SEND ADDR]`: the number of the snapshot to send from, -1 if all is \
         to be sent, and what has arrived in part, up to which byte. `receive done VOL` makes what has arrived the newest \
         snapshot. Both exit with 2 if it is not the time for it, and `done` with 3 if not all has arrived.",
    )
    .arg(
        Arg::new("volume")
            .value_names(["start|done", "VOL"])
            .num_args(1..=2)
            .required_unless_present("only")
            .help("Name of the volume, perhaps with what a script does"),
    )
    .arg(
        Arg::new("only")
            .long("only")
            .value_name("VOL")
            .help("The volume, whatever is asked for: for a key that may do this alone"),
    )
}

/// The arguments of `send`.
pub fn send_command() -> Command {
    verb(
        "send",
        "Give a replication stream to standard output; what the downstream runs by ssh",
    )
    .arg(volume_operand())
    .arg(
        Arg::new("host")
            .value_name("TARGET")
            .required(true)
            .help("The target it is for"),
    )
}

fn host_of(matches: &ArgMatches) -> String {
    string(matches, "host").unwrap_or_default()
}

/// What `define source` and `failback` are given.
pub(super) fn source_of(matches: &ArgMatches) -> DefineSource {
    let given = host_of(matches);
    let port = given
        .rsplit_once(':')
        .filter(|(host, _)| !host.contains(':'))
        .and_then(|(host, port)| Some((host.to_owned(), port.parse().ok()?)));
    let (host, port) = match port {
        Some((host, port)) => (host, Some(port)),
        None => (given, None),
    };
    DefineSource {
        volume: volume_of(matches),
        host,
        port,
        name: string(matches, "name"),
        period: matches.get_one("period").copied(),
        window: matches.get_one("window").copied(),
        mount: matches.get_flag("mount-snap"),
    }
}

/// Runs `define source`.
pub fn define_source(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::DefineSource {
        source: source_of(matches),
        dry_run: matches.get_flag("dry-run"),
    })
}

/// Runs `define target`.
pub fn define_target(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::DefineTarget(DefineTarget {
        volume: volume_of(matches),
        host: host_of(matches),
        name: string(matches, "name"),
        period: matches.get_one("period").copied(),
        window: matches.get_one("window").copied(),
        ratelimit: matches.get_one("ratelimit").copied(),
        uncompressed: matches.get_flag("uncompressed"),
        test_fullvolume: matches.contains_id("test"),
        on_full: match matches.get_one::<String>("on-full").map(String::as_str) {
            Some("protect") => HoldPolicy::Protect,
            _ => HoldPolicy::Bookmark,
        },
    }))
}

/// Runs `forget source` or `forget target`.
pub fn forget(matches: &ArgMatches, target: bool, context: &mut Context) -> u8 {
    context.request(&Request::ForgetReplication {
        volume: volume_of(matches),
        target: target.then(|| host_of(matches)),
        dry_run: matches.get_flag("dry-run"),
    })
}

/// Runs `start` or `stop` of `source` or `target`.
pub fn set_stopped(matches: &ArgMatches, target: bool, stopped: bool, context: &mut Context) -> u8 {
    context.request(&Request::SetReplication {
        volume: volume_of(matches),
        target: target.then(|| host_of(matches)),
        stopped,
    })
}

/// Runs `replicate`.
pub fn replicate(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::Replicate {
        volume: volume_of(matches),
        target: string(matches, "host"),
        snapshot: matches.get_one("snapnum").copied(),
        nowait: matches.get_flag("nowait"),
        full: matches.get_flag("full"),
        force_base: matches.get_flag("force-base"),
        dry_run: matches.get_flag("dry-run"),
    })
}

/// Runs `receive`.
pub fn receive(matches: &ArgMatches, context: &mut Context) -> u8 {
    let only = string(matches, "only");
    let words: Vec<&String> = matches.get_many("volume").into_iter().flatten().collect();
    if let ([word, volume], None) = (&words[..], &only) {
        let done = match word.as_str() {
            "start" => false,
            "done" => true,
            _ => {
                ddsnap::stdio::complain(format_args!(
                    "zumastor: 'receive {word}' is not known: it is `receive VOL`, `receive start VOL` or `receive done VOL`"
                ));
                return super::USAGE_ERROR;
            }
        };
        let volume = (*volume).clone();
        let code = context.request(&Request::ReceiveByHand {
            volume: volume.clone(),
            done,
        });
        if code == super::OK && !done {
            // Standard output is the script's.
            ddsnap::stdio::complain(format_args!(
                "zumastor: WARNING: whoever reaches that port can write /dev/mapper/{volume} until `zumastor receive done \
                 {volume}`: nobody is asked who he is, and nothing is encrypted"
            ));
        }
        return code;
    }
    pump(
        &Open::Receive {
            volume: only.unwrap_or_else(|| volume_of(matches)),
        },
        context,
    )
}

/// Runs `send`.
pub fn send(matches: &ArgMatches, context: &mut Context) -> u8 {
    pump(
        &Open::Send {
            volume: volume_of(matches),
            target: host_of(matches),
        },
        context,
    )
}

/// Standard output is the stream's: what goes wrong is told on standard error.
fn pump(open: &Open, context: &mut Context) -> u8 {
    match socket::pump(&context.layout.replication_socket(), open) {
        Ok(()) => super::OK,
        Err(error) => {
            ddsnap::stdio::complain(format_args!("zumastor: {error:#}"));
            super::FAILED
        }
    }
}
