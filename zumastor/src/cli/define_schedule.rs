// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor define schedule`. Exit code 3: the rotations would keep more snapshots than a volume can have.

use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command, value_parser};

use super::{Context, verb, volume_of, volume_operand};
use crate::control::Request;
use crate::volume::WantedRotation;

/// Options of the built-in rotations, with the letter and what the rotation is called.
const BUILT_IN: [(&str, char, &str); 4] = [
    ("hourly", 'h', "Keep N snapshots taken at full hours"),
    ("daily", 'd', "Keep N taken at midnight"),
    ("weekly", 'w', "Keep N taken at midnight before Sunday"),
    ("monthly", 'm', "Keep N taken at midnight before the first"),
];

/// The arguments.
pub fn command() -> Command {
    let mut command = verb(
        "schedule",
        "Take snapshots by the clock and keep so many of each kind; N = 0 ends a rotation",
    )
    .arg(volume_operand());
    for (name, short, help) in BUILT_IN {
        command = command.arg(
            Arg::new(name)
                .short(short)
                .long(name)
                .value_name("N")
                .value_parser(value_parser!(u32))
                .help(help),
        );
    }
    command
        .arg(
            Arg::new("custom")
                .short('c')
                .long("custom")
                .value_name("NAME,N[,PERIOD]")
                .value_parser(parse_custom)
                .action(ArgAction::Append)
                .help(
                    "Keep N of a rotation of your own, taken every PERIOD (90s, 15m, 2h, 3d), or by \
                     `zumastor snapshot VOL NAME`",
                ),
        )
        .group(
            ArgGroup::new("rotations")
                .args(["hourly", "daily", "weekly", "monthly", "custom"])
                .multiple(true)
                .required(true),
        )
}

fn parse_custom(text: &str) -> Result<WantedRotation, String> {
    let mut words = text.split(',');
    let kind = words.next().unwrap_or_default();
    let keep = words.next().unwrap_or_default().parse();
    let period = words.next().map(parse_period).transpose()?;
    match (keep, words.next()) {
        (Ok(keep), None) if !kind.is_empty() => Ok(WantedRotation {
            kind: kind.to_string(),
            keep,
            custom: Some(period),
        }),
        _ => Err("a rotation is NAME,N or NAME,N,PERIOD".to_string()),
    }
}

/// A period in seconds.
fn parse_period(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" | "min" => 60,
        "h" => 3600,
        "d" => 86_400,
        "w" => 7 * 86_400,
        _ => 0,
    };
    let seconds = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
    seconds
        .filter(|s| (1..=366 * 86_400).contains(s))
        .ok_or_else(|| {
            "a period is a number of seconds, or of s, m, h, d or w, up to a year".into()
        })
}

/// Runs the verb.
pub fn run(matches: &ArgMatches, context: &mut Context) -> u8 {
    let built_in = BUILT_IN.iter().filter_map(|(kind, ..)| {
        Some(WantedRotation {
            kind: (*kind).to_string(),
            keep: *matches.get_one::<u32>(kind)?,
            custom: None,
        })
    });
    let custom = matches.get_many::<WantedRotation>("custom");
    let rotations = built_in
        .chain(custom.into_iter().flatten().cloned())
        .collect();
    context.request(&Request::DefineSchedule {
        volume: volume_of(matches),
        rotations,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rotations_of_ones_own() {
        let parsed = parse_custom("quarter,4,15m").expect("a rotation");
        assert_eq!((parsed.kind.as_str(), parsed.keep), ("quarter", 4));
        assert_eq!(parsed.custom, Some(Some(900)));
        assert_eq!(parse_custom("x,1").expect("a rotation").custom, Some(None));
        for bad in [
            "",
            "x",
            "x,",
            ",1",
            "x,1,",
            "x,1,5y",
            "x,1,0",
            "x,1,9w,2",
            "x,1,99999d",
        ] {
            assert!(parse_custom(bad).is_err(), "{bad}");
        }
    }
}
