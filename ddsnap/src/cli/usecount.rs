// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap usecount`.

use anyhow::Result;
use clap::Args;

use super::Target;
use super::refused;
use crate::stdio::print;

/// Add to a snapshot's use count and print it: what was added by this command, and its devices.
#[derive(Debug, Args)]
pub struct Usecount {
    #[command(flatten)]
    target: Target,
    /// What to add; may be negative. Nothing: only print.
    #[arg(
        value_name = "DELTA",
        allow_negative_numbers = true,
        default_value_t = 0
    )]
    delta: i32,
}

impl Usecount {
    pub fn run(&self) -> Result<u8> {
        let mut client = self.target.connect()?;
        match client.adjust_usecount(self.target.tag, self.delta) {
            Ok(count) => {
                print(&format!("{count}\n"))?;
                Ok(0)
            }
            Err(error) => refused("set usecount", Err(error)),
        }
    }
}
