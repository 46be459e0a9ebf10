// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap priority`.

use anyhow::Result;
use clap::Args;
use nix::errno::Errno;

use super::Target;
use super::refused;
use crate::client::ClientError;
use crate::stdio::print;

/// Set how dearly a snapshot is kept when the store is full: -128 (given up first) to 127 (never).
///
/// Prints the new value as an unsigned byte, as ever: -1 is 255.
#[derive(Debug, Args)]
pub struct Priority {
    #[command(flatten)]
    target: Target,
    /// The priority.
    #[arg(value_name = "PRIORITY", allow_negative_numbers = true)]
    priority: i8,
}

impl Priority {
    pub fn run(&self) -> Result<u8> {
        let tag = self.target.tag;
        let mut client = self.target.connect()?;
        match client.set_priority(tag, self.priority) {
            Ok(priority) => {
                print(&format!("{}\n", priority as u8))?;
                Ok(0)
            }
            Err(ClientError::Refused { errno, .. }) if errno == Errno::ENOENT as i32 => {
                let reason = format!("Snapshot tag {tag} is not valid");
                refused("set priority", Err(ClientError::Refused { errno, reason }))
            }
            Err(error) => refused("set priority", Err(error)),
        }
    }
}
