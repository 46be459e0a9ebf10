// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap create`.

use anyhow::Result;
use clap::Args;

use super::{Target, refused};

/// Make a snapshot of the volume as it is now.
#[derive(Debug, Args)]
pub struct Create {
    #[command(flatten)]
    target: Target,
}

impl Create {
    pub fn run(&self) -> Result<u8> {
        let tag = self.target.tag;
        let mut client = self.target.connect()?;
        refused(
            &format!("create snapshot {tag}"),
            client.create(tag).map(|()| 0),
        )
    }
}
