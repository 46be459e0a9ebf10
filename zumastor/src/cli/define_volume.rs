// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor define volume`.

use std::path::PathBuf;

use clap::{Arg, ArgAction, ArgMatches, Command, value_parser};

use super::{Context, string, verb, volume_of, volume_operand};
use crate::control::Request;
use crate::human;
use crate::volume::DefineVolume;

/// The arguments.
pub fn command() -> Command {
    let path = |name: &'static str| Arg::new(name).value_parser(value_parser!(PathBuf));
    let size = |name: &'static str| Arg::new(name).value_name("SIZE").value_parser(parse_size);
    verb("volume", "Define a volume and create /dev/mapper/VOL")
        .arg(volume_operand())
        .arg(
            path("origin")
                .value_name("ORIGIN")
                .required(true)
                .help("Device with the data"),
        )
        .arg(
            path("snapstore")
                .value_name("SNAPSTORE")
                .required(true)
                .help("Device for the snapshots"),
        )
        .arg(
            Arg::new("initialize")
                .short('i')
                .long("initialize")
                .action(ArgAction::SetTrue)
                .help("Format the snapshot store, without asking; refused if it holds anything"),
        )
        .arg(
            Arg::new("zero")
                .short('z')
                .long("zero")
                .action(ArgAction::SetTrue)
                .help("Overwrite the origin with zeroes first"),
        )
        .arg(
            Arg::new("force")
                .long("force")
                .action(ArgAction::SetTrue)
                .help(
                    "Overwrite a file system, store or other contents with --initialize or --zero",
                ),
        )
        .arg(
            path("metadev")
                .short('m')
                .long("metadev")
                .value_name("DEV")
                .help("Keep the metadata on a device of its own"),
        )
        .arg(
            size("blocksize")
                .short('b')
                .long("blocksize")
                .help("Accepted and ignored"),
        )
        .arg(
            size("chunksize")
                .short('c')
                .long("chunksize")
                .help("Chunk size for --initialize [default: 16k]"),
        )
        .arg(
            size("cachesize")
                .short('k')
                .long("cachesize")
                .help("Cache of the snapshot server"),
        )
        .arg(
            path("mountpoint")
                .short('p')
                .long("mountpoint")
                .value_name("DIR")
                .help("Mount the origin here [default: /var/mount/zumastor/VOL]"),
        )
        .arg(
            Arg::new("mountopts")
                .short('o')
                .long("mountopts")
                .value_name("LIST")
                .help("Mount options, separated by commas"),
        )
        .arg(
            Arg::new("verbose")
                .short('v')
                .long("verbose")
                .action(ArgAction::SetTrue)
                .help("Say which processes were started"),
        )
        .arg(
            path("snappath")
                .short('s')
                .long("snappath")
                .value_name("DIR")
                .help(
                    "Directory for the snapshots' links [default: /var/run/zumastor/snapshot/VOL]",
                ),
        )
}

/// A size as ddsnap takes it: bytes with an optional k, m or g.
pub fn parse_size(text: &str) -> Result<String, String> {
    let digits = text.trim_end_matches(['k', 'm', 'g', 'K', 'M', 'G']);
    let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    if plain && text.len() - digits.len() <= 1 {
        let text = text.to_ascii_lowercase();
        return match human::size(&text) {
            Some(_) => Ok(text),
            None => Err("no device is that large".to_string()),
        };
    }
    Err("a size is a number of bytes with an optional k, m or g".to_string())
}

/// Runs the verb.
pub fn run(matches: &ArgMatches, context: &mut Context) -> u8 {
    let path = |name: &str| matches.get_one::<PathBuf>(name).cloned();
    let define = DefineVolume {
        volume: volume_of(matches),
        origin: path("origin").unwrap_or_default(),
        snapstore: path("snapstore").unwrap_or_default(),
        meta: path("metadev"),
        initialize: matches.get_flag("initialize"),
        chunksize: string(matches, "chunksize"),
        zero: matches.get_flag("zero"),
        force: matches.get_flag("force"),
        cachesize: string(matches, "cachesize"),
        mountpoint: path("mountpoint"),
        mountopts: string(matches, "mountopts"),
        snappath: path("snappath"),
    };
    if define.chunksize.is_some() && !define.initialize {
        context.say("WARNING: --chunksize has no effect without --initialize");
    }
    context.verbose = matches.get_flag("verbose");
    context.request(&Request::DefineVolume(define))
}
