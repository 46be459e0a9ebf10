// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap resize`.

use anyhow::Result;
use clap::Args;

use super::numbers::bytes;
use super::output::print;
use super::progress::bar;
use super::refused;
use crate::client::{Client, NewSizes};

/// Exit code: a size is not what was asked for.
const OTHER_SIZE: u8 = 255;

/// Change how much of its devices a volume uses, while it is in use.
///
/// To grow, extend the device first; to shrink, cut it afterwards. Then create the origin's device
/// anew. All sizes change together or none does. Prints the sizes as they are in the end; the exit
/// code is 255 if one of them is not the one asked for.
#[derive(Debug, Args)]
pub struct Resize {
    /// The server's control socket: a path, or @NAME for an abstract one.
    #[arg(value_name = "SOCK")]
    socket: String,
    /// New size of the origin: bytes, or with k, m or g. Snapshots keep their size, and what it loses.
    #[arg(short, long, value_name = "SIZE", value_parser = bytes)]
    #[arg(required_unless_present_any = ["snapshot", "metadata"])]
    origin: Option<u64>,
    /// New size of the snapshot store.
    #[arg(short, long, value_name = "SIZE", value_parser = bytes)]
    snapshot: Option<u64>,
    /// New size of the metadata device.
    #[arg(short, long, value_name = "SIZE", value_parser = bytes)]
    metadata: Option<u64>,
}

impl Resize {
    pub fn run(&self) -> Result<u8> {
        let wanted = NewSizes {
            origin: self.origin,
            store: self.snapshot,
            meta: self.metadata,
        };
        let mut client = Client::connect(&self.socket)?;
        let bar = bar()?;
        let result = client.resize(&wanted, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        let sizes = match result {
            Ok(sizes) => sizes,
            Err(error) => return refused("resize", Err(error)),
        };
        let found = [
            ("origin", sizes.origin, wanted.origin),
            ("snapshot store", sizes.store, wanted.store),
            ("metadata", sizes.meta, wanted.meta),
        ];
        let lines: Vec<String> = found
            .iter()
            .map(|(name, bytes, _)| format!("{name} size: {bytes} bytes\n"))
            .collect();
        print(&lines.concat())?;
        if let Some(why) = &sizes.refused {
            eprintln!("could not resize because {why}");
            return Ok(OTHER_SIZE);
        }
        let other =
            |(_, found, wanted): &(_, u64, Option<u64>)| wanted.is_some_and(|w| w != *found);
        Ok(if found.iter().any(other) {
            OTHER_SIZE
        } else {
            0
        })
    }
}
