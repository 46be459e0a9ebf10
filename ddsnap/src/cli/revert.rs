// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap revert`.

use anyhow::Result;
use clap::Args;

use super::progress::bar;
use super::{Target, refused};
use crate::stdio::complain;

/// Give the volume the content it had when a snapshot was taken.
///
/// Every snapshot keeps its content. Neither the volume nor a snapshot may have a device, so unmount and
/// remove them before (`umount`, `dmsetup remove VOLUME`; its server keeps running) and set the volume's up again
/// afterwards, with `zumastor start volume VOLUME` or `dmsetup create`. The server does it: interrupting this
/// command does not end the revert, and a server that is restarted goes on with it before any device comes up.
#[derive(Debug, Args)]
pub struct Revert {
    #[command(flatten)]
    target: Target,
}

impl Revert {
    pub fn run(&self) -> Result<u8> {
        let tag = self.target.tag;
        let mut client = self.target.connect()?;
        let bar = bar()?;
        bar.println("the revert goes on in the server if this command is interrupted");
        let result = client.revert(tag, &mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        match result {
            Ok(0) => Ok(0),
            Ok(skipped) => {
                complain(format_args!(
                    "{skipped} chunks could not be read and are as they were; the server's log names them"
                ));
                Ok(1)
            }
            Err(error) => refused(&format!("revert to snapshot {tag}"), Err(error)),
        }
    }
}
