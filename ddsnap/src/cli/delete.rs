// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap delete`.

use anyhow::Result;
use clap::Args;

use super::{Target, refused};

/// Delete a snapshot that nobody uses.
#[derive(Debug, Args)]
pub struct Delete {
    #[command(flatten)]
    target: Target,
}

impl Delete {
    pub fn run(&self) -> Result<u8> {
        let tag = self.target.tag;
        let mut client = self.target.connect()?;
        refused(
            &format!("delete snapshot {tag}"),
            client.delete(tag).map(|()| 0),
        )
    }
}
