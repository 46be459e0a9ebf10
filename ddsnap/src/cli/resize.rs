// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap resize`.

use anyhow::{Result, bail};
use clap::Args;

use super::numbers::bytes;
use super::progress::bar;
use super::refused;
use crate::client::{Client, NewSizes};
use crate::stdio::{complain, print};

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
    #[arg(short, long, value_name = "SIZE", value_parser = bytes, allow_negative_numbers = true)]
    origin: Option<u64>,
    /// New size of the snapshot store.
    #[arg(short, long, value_name = "SIZE", value_parser = bytes, allow_negative_numbers = true)]
    snapshot: Option<u64>,
    /// New size of the metadata device.
    #[arg(short, long, value_name = "SIZE", value_parser = bytes, allow_negative_numbers = true)]
    metadata: Option<u64>,
}

impl Resize {
    pub fn run(&self) -> Result<u8> {
        if [self.origin, self.snapshot, self.metadata] == [None; 3] {
            bail!("no size was given; use --origin, --snapshot or --metadata, or several of them");
        }
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
            complain(format_args!("could not resize because {why}"));
            return Ok(OTHER_SIZE);
        }
        let mut code = 0;
        for (name, bytes, wanted) in found {
            if let Some(wanted) = wanted.filter(|&wanted| wanted != bytes) {
                complain(format_args!(
                    "{name}: {wanted} bytes were asked for, it has {bytes}: sizes are whole sectors, chunks or blocks"
                ));
                code = OTHER_SIZE;
            }
        }
        Ok(code)
    }
}
