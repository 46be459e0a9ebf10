// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap delta listen`.

use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::Args;

use super::transmit::{DEFAULT_PORT, address};
use crate::delta::listen::{serve, write_progress};
use crate::delta::stream::Progress;
use crate::stdio::{complain, print};

/// Take deltas from `ddsnap transmit` and apply them to STEM, one after the other, until it is ended.
///
/// What was there is read from STEM(FROM) and compared before an extent is written. Whoever reaches the port can
/// write STEM: it has no password and encrypts nothing, so it is on the loopback address unless another one is
/// given. `zumastor replicate` goes over ssh instead.
#[derive(Debug, Args)]
pub struct Listen {
    /// Keep a file with how far a delta is: "SNAP DONE/TOTAL BYTE", renewed each second.
    #[arg(short = 'o', long, value_name = "FILE")]
    progress: Option<PathBuf>,
    /// The volume's device, or a file.
    #[arg(value_name = "STEM")]
    stem: PathBuf,
    /// Where to listen.
    #[arg(value_name = "HOST[:PORT]", default_value = "127.0.0.1")]
    address: String,
}

impl Listen {
    pub fn run(&self) -> Result<u8> {
        let address = address(&self.address, DEFAULT_PORT);
        let failed = || format!("cannot listen on {address}");
        let listener = TcpListener::bind(&address).with_context(failed)?;
        let at = listener.local_addr().with_context(failed)?;
        complain(format_args!(
            "ddsnap: WARNING: whoever reaches port {} can write {}: nobody is asked who he is, and nothing is encrypted",
            at.port(),
            self.stem.display()
        ));
        if !at.ip().is_loopback() {
            complain(format_args!(
                "ddsnap: WARNING: {} can be reached from other machines",
                at.ip()
            ));
        }
        print(&format!("listening on {at}\n"))?;
        for stream in listener.incoming() {
            let served = stream.map_err(anyhow::Error::from);
            let served = served.and_then(|s| self.serve(&s));
            if let Err(error) = served {
                complain(format_args!("ddsnap: {error:#}"));
            }
        }
        Ok(0)
    }

    fn serve(&self, stream: &TcpStream) -> Result<()> {
        let mut told = |now: Progress| {
            if let Some(file) = &self.progress {
                tell(file, &now);
            }
        };
        serve(stream, &self.stem, &mut |_| Ok(()), &mut told)?;
        Ok(())
    }
}

/// Renews a progress file, and complains if that fails.
pub(super) fn tell(file: &Path, now: &Progress) {
    if let Err(error) = write_progress(file, now) {
        let file = file.display();
        complain(format_args!("ddsnap: cannot write {file}: {error}"));
    }
}
