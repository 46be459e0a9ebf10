// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap scrub`.

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use super::numbers::bytes;
use super::progress::bar;
use super::refused;
use crate::client::{BadChunk, Client};
use crate::stdio::print;

/// Exit code: something is bad.
const BAD: u8 = 1;
/// Of the JSON; JSON.md has it.
const SCHEMA: &str = "ddsnap-scrub-1";

/// Read all that snapshots have in the store, and report what is bad.
///
/// What was saved is compared with its checksum; what was written to a snapshot has none and is only
/// read. Nothing is repaired. The volume stays in use. Exit code 0: all is sound; 1: something is bad.
#[derive(Debug, Args)]
pub struct Scrub {
    /// The server's control socket: a path, or @NAME for an abstract one.
    #[arg(value_name = "SOCK")]
    socket: String,
    /// Bytes to read a second: a number, or with k, m or g. 0: as fast as it goes.
    #[arg(long, value_name = "BYTES_PER_S", value_parser = bytes, default_value = "32m")]
    rate: u64,
    /// Print the result as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Document {
    schema: &'static str,
    bytes_read: u64,
    bad: Vec<Bad>,
}

#[derive(Serialize)]
struct Bad {
    store_chunk: u64,
    origin_chunk: u64,
    snapshots: Vec<u32>,
    /// `unreadable` or `checksum`.
    fault: &'static str,
    checksum_found: Option<u32>,
    checksum_expected: Option<u32>,
}

impl From<&BadChunk> for Bad {
    fn from(bad: &BadChunk) -> Bad {
        Bad {
            store_chunk: bad.place.0,
            origin_chunk: bad.chunk.0,
            snapshots: bad.snapshots.iter().map(|tag| tag.0).collect(),
            fault: match bad.checksums {
                None => "unreadable",
                Some(_) => "checksum",
            },
            checksum_found: bad.checksums.map(|(found, _)| found),
            checksum_expected: bad.checksums.map(|(_, wanted)| wanted),
        }
    }
}

impl Scrub {
    pub fn run(&self) -> Result<u8> {
        let mut client = Client::connect(&self.socket)?;
        let bar = bar()?;
        let mut all = Vec::new();
        let mut printed = Ok(());
        let result = client.scrub(
            self.rate,
            &mut |done, total| {
                bar.set_length(total);
                bar.set_position(done);
            },
            &mut |bad| {
                if self.json {
                    all.push(Bad::from(&bad));
                } else if printed.is_ok() {
                    printed = bar.suspend(|| print(&format!("{bad}\n")));
                }
            },
        );
        bar.finish_and_clear();
        let (bytes_read, bad) = match result {
            Ok(found) => found,
            Err(error) => return refused("scrub", Err(error)),
        };
        printed?;
        if self.json {
            print(&json(bytes_read, all)?)?;
        } else {
            print(&format!("{bytes_read} bytes read, {bad} bad chunks\n"))?;
        }
        Ok(if bad == 0 { 0 } else { BAD })
    }
}

fn json(bytes_read: u64, bad: Vec<Bad>) -> Result<String> {
    let document = Document {
        schema: SCHEMA,
        bytes_read,
        bad,
    };
    let text = serde_json::to_string_pretty(&document).context("cannot make JSON")?;
    Ok(format!("{text}\n"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Chunk, SnapTag, StoreChunk};

    /// The example of JSON.md is what is printed, to the letter.
    #[test]
    fn the_json_is_as_documented() {
        let bad = |place, chunk, checksums, tags: &[u32]| {
            Bad::from(&BadChunk {
                place: StoreChunk(place),
                chunk: Chunk(chunk),
                checksums,
                snapshots: tags.iter().copied().map(SnapTag).collect(),
            })
        };
        let all = vec![
            bad(70, 4, Some((0xefbe_adde, 0x1234_5678)), &[1, 2]),
            bad(71, 5, None, &[2]),
        ];
        let document = include_str!("../../JSON.md");
        let mut examples = document.split("```json\n").skip(1);
        let example = examples
            .find(|text| text.contains(SCHEMA))
            .and_then(|text| text.split("```").next());
        assert_eq!(Some(json(24576, all).expect("JSON").as_str()), example);
    }
}
