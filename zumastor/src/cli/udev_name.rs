// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor udev-name`: what the udev rule imports, see [`crate::names::udev_import_line`].
//!
//! Prints `DDSNAP_NAME=VOL(N)` for a snapshot's device, and in `DDSNAP_LINKS` all links udev has so far that are
//! not made from its contents; nothing for any other device. Exit code 0 either way, since a device that is not
//! ours is no failure. Reads sysfs and its environment, and nothing else.

use std::fs;
use std::path::Path;

use clap::{Arg, ArgMatches, Command};

use super::{Context, OK, string, verb};
use crate::{boot, names};

/// The arguments.
pub fn command() -> Command {
    verb(
        "udev-name",
        "Print the name of a snapshot's device for udev",
    )
    .arg(
        Arg::new("device")
            .value_name("DEVNAME")
            .required(true)
            .help("dm-N or /dev/dm-N"),
    )
}

/// Runs the verb.
pub fn run(matches: &ArgMatches, context: &mut Context) -> u8 {
    let device = string(matches, "device").unwrap_or_default();
    let kernel_name = Path::new(&device).file_name().unwrap_or_default();
    let sysfs = context
        .layout
        .at("/sys/block")
        .join(kernel_name)
        .join("dm/name");
    if let Some(line) = fs::read_to_string(sysfs)
        .ok()
        .and_then(|name| import_line(&name))
    {
        context.print(&format!("{line}\n"));
        let links = std::env::var("DEVLINKS").unwrap_or_default();
        let links: Vec<String> = links.split_ascii_whitespace().map(String::from).collect();
        for line in boot::link_lines(&links) {
            context.print(&format!("{line}\n"));
        }
    }
    OK
}

/// sysfs has the kernel's name, in which parentheses are escaped.
fn import_line(name: &str) -> Option<String> {
    names::udev_import_line(&names::readable_device_name(name.trim_end_matches('\n')))
}

#[cfg(test)]
mod tests {
    use super::import_line;

    #[test]
    fn mangled_and_plain_names_give_the_same_line() {
        let expected = Some("DDSNAP_NAME=zumatest(0)".to_string());
        assert_eq!(import_line("zumatest(0)\n"), expected);
        assert_eq!(import_line("zumatest\\x280\\x29\n"), expected);
        assert_eq!(import_line("sysvg-test\n"), None);
    }
}
