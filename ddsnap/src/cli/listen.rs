// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap delta listen`.

use std::fs;
use std::io::{self, BufReader, Read};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use super::transmit::{DEFAULT_PORT, address};
use crate::delta::extent::MAX_EXTENT_BYTES;
use crate::delta::stream::{self, Progress};
use crate::device::lock::{LockError, share_store};
use crate::stdio::{complain, print};

/// Longest wait for a sender that says nothing.
const SILENCE: Duration = Duration::from_secs(60);

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
            let served = stream.map_err(Into::into).and_then(|s| self.serve(&s));
            if let Err(error) = served {
                complain(format_args!("ddsnap: {error:#}"));
            }
        }
        Ok(0)
    }

    fn serve(&self, stream: &TcpStream) -> Result<()> {
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        let received = self.receive(stream);
        let mut to = stream;
        match &received {
            Ok(end) => stream::say(&mut to, "done", &end.done.to_string())?,
            // It may be gone.
            Err(error) => {
                let _ = stream::say(&mut to, "error", &format!("{error:#}"));
                drain(stream);
            }
        }
        received.map(|_| ())
    }

    fn receive(&self, stream: &TcpStream) -> Result<Progress> {
        // Writes to a served volume's own origin go round its server: snapshots would change with it.
        let _lock = match share_store(&self.stem) {
            Err(error @ LockError::Held(_)) => {
                return Err(error).with_context(|| format!("cannot write {}", self.stem.display()));
            }
            // What cannot be opened is told below.
            other => other.ok(),
        };
        let from = BufReader::with_capacity(MAX_EXTENT_BYTES, stream);
        let mut to = stream;
        let mut ready = || stream::say(&mut to, "proceed", "");
        let mut progress = |now: Progress| {
            if let Some(file) = &self.progress {
                write_progress(file, &now);
            }
        };
        let received = stream::receive(from, &self.stem, &mut ready, &mut progress);
        received.with_context(|| format!("cannot write {} from a delta", self.stem.display()))
    }
}

/// Takes some of what is still on its way: closed with that unread, the connection would lose the reason.
fn drain(stream: &TcpStream) {
    const MOST: u64 = 64 << 20;
    // What fails here has ended.
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
    let _ = io::copy(&mut stream.take(MOST), &mut io::sink());
}

/// Renews a progress file.
pub(super) fn write_progress(file: &Path, now: &Progress) {
    let tag = now.header.to.tag;
    let text = format!("{tag} {}/{} {}\n", now.done, now.total, now.at);
    let mut new = file.as_os_str().to_owned();
    new.push(".new");
    // Replaced as a whole: scripts read it at any time.
    let written = fs::write(&new, text).and_then(|()| fs::rename(&new, file));
    if let Err(error) = written {
        complain(format_args!(
            "ddsnap: cannot write {}: {error}",
            file.display()
        ));
    }
}
