// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor remount`, `resize`, `revert`, `protect` and `unprotect`: what changes a volume as it is.

use std::path::PathBuf;

use clap::{Arg, ArgGroup, ArgMatches, Command};

use super::define_volume::parse_size;
use super::{
    Context, forget, snapshot_of, snapshot_operand, string, verb, volume_of, volume_operand,
};
use crate::control::Request;
use crate::human;

/// The arguments of `remount`.
pub fn remount_command() -> Command {
    verb("remount", "Change where and how the origin is mounted")
        .arg(volume_operand())
        .arg(
            Arg::new("dir")
                .value_name("DIR")
                .required(true)
                .help("Mount point, or - to keep it"),
        )
        .arg(
            Arg::new("opts")
                .value_name("OPTS")
                .allow_hyphen_values(true)
                .help("Mount options, or - for none [default: as they are]"),
        )
}

/// The arguments of `resize`.
pub fn resize_command() -> Command {
    let size = |short: char, name: &'static str, help: &'static str| {
        Arg::new(name)
            .short(short)
            .long(name)
            .value_name("SIZE")
            .value_parser(parse_size)
            .help(help)
    };
    verb(
        "resize",
        "Use more or less of a volume's devices, while it is in use",
    )
    .arg(volume_operand())
    .arg(size('o', "origin", "Of the origin"))
    .arg(size('s', "snapshot", "Of the snapshot store"))
    .arg(size('m', "metadata", "Of the metadata device"))
    .arg(forget::dry_run())
    .group(
        ArgGroup::new("sizes")
            .args(["origin", "snapshot", "metadata"])
            .multiple(true)
            .required(true),
    )
}

/// The arguments of `revert`.
pub fn revert_command() -> Command {
    verb(
        "revert",
        "Give the origin the content of a snapshot; the origin must not be mounted",
    )
    .arg(volume_operand())
    .arg(snapshot_operand())
    .arg(forget::dry_run())
}

/// The arguments of `protect` or `unprotect`.
pub fn protect_command(name: &'static str, about: &'static str) -> Command {
    verb(name, about)
        .arg(volume_operand())
        .arg(snapshot_operand())
}

/// Runs `remount`.
pub fn remount(matches: &ArgMatches, context: &mut Context) -> u8 {
    let none_if_dash = |text: String| if text == "-" { String::new() } else { text };
    let dir = string(matches, "dir").filter(|d| d != "-");
    context.request(&Request::Remount {
        volume: volume_of(matches),
        mountpoint: dir.map(PathBuf::from),
        mountopts: string(matches, "opts").map(none_if_dash),
    })
}

/// Runs `resize`.
pub fn resize(matches: &ArgMatches, context: &mut Context) -> u8 {
    let bytes = |name| string(matches, name).and_then(|text| human::size(&text));
    context.request(&Request::Resize {
        volume: volume_of(matches),
        origin: bytes("origin"),
        store: bytes("snapshot"),
        meta: bytes("metadata"),
        dry_run: matches.get_flag("dry-run"),
    })
}

/// Runs `revert`.
pub fn revert(matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::Revert {
        volume: volume_of(matches),
        snapshot: snapshot_of(matches),
        dry_run: matches.get_flag("dry-run"),
    })
}

/// Runs `protect` or `unprotect`.
pub fn protect(protect: bool, matches: &ArgMatches, context: &mut Context) -> u8 {
    context.request(&Request::Protect {
        volume: volume_of(matches),
        snapshot: snapshot_of(matches),
        protect,
    })
}
