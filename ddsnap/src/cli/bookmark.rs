// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap bookmark`.

use anyhow::Result;
use clap::{Args, ValueEnum};

use super::{Target, refused};

/// Make a bookmark of the volume as it is now: it keeps no data, but knows which chunks change from now on.
///
/// A bookmark has a number as a snapshot has, and is listed and deleted as one. "ddsnap delta changelist" takes
/// it as the first of two. It takes room for metadata only: about ten bytes for each chunk that changes.
/// Exit codes: 0 done; 1 refused; 99 the server cannot be reached.
#[derive(Debug, Args)]
pub struct Bookmark {
    /// Have snapshot TAG become a bookmark: its data comes free, what changed since stays known.
    #[arg(long, group = "what")]
    convert: bool,
    /// Say whether snapshot TAG becomes a bookmark when it is given up because the store is full, instead of
    /// vanishing.
    #[arg(long, group = "what", value_name = "WHETHER", require_equals = true)]
    #[arg(num_args = 0..=1, default_missing_value = "yes")]
    when_full: Option<Whether>,
    #[command(flatten)]
    target: Target,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Whether {
    /// It becomes a bookmark.
    Yes,
    /// It vanishes, as one does of which nothing was said.
    No,
}

impl Bookmark {
    pub fn run(&self) -> Result<u8> {
        let tag = self.target.tag;
        let mut client = self.target.connect()?;
        match (self.convert, self.when_full) {
            (true, _) => refused(
                &format!("make a bookmark of snapshot {tag}"),
                client.turn_to_bookmark(tag).map(|()| 0),
            ),
            (false, Some(whether)) => refused(
                &format!("set what becomes of snapshot {tag}"),
                client
                    .set_to_bookmark(tag, matches!(whether, Whether::Yes))
                    .map(|()| 0),
            ),
            (false, None) => refused(
                &format!("create bookmark {tag}"),
                client.create_bookmark(tag).map(|()| 0),
            ),
        }
    }
}
