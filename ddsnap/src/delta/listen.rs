// SPDX-License-Identifier: GPL-2.0-only
//! The end of a connection that takes a delta: of `ddsnap delta listen`, and of `zumastor receive start`.

use std::fs;
use std::io::{self, BufReader, Read};
use std::net::{Shutdown, TcpStream};
use std::path::Path;
use std::time::Duration;

use thiserror::Error;

use super::extent::MAX_EXTENT_BYTES;
use super::stream::{self, Opening, Progress, StreamError};
use crate::device::lock::{LockError, share_store};

/// Longest wait for a sender that says nothing.
const SILENCE: Duration = Duration::from_secs(60);

/// Why a delta was not taken.
#[derive(Debug, Error)]
pub enum ListenError {
    /// A server has the device as its origin or store.
    #[error("cannot write {0}")]
    Locked(String, #[source] LockError),
    /// What came could not be used.
    #[error("cannot write {0} from a delta")]
    Stream(String, #[source] StreamError),
    /// The sender is gone.
    #[error("the sender does not hear")]
    Link(#[from] io::Error),
}

/// Takes one delta from a connection into `stem`, and tells the sender how that went. `wanted` says why not, before
/// anything is written; `progress` is called each second and at the end, of what is durable.
///
/// # Errors
/// What came before the trouble was written.
pub fn serve(
    stream: &TcpStream,
    stem: &Path,
    wanted: &mut dyn FnMut(&Opening) -> Result<(), String>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Progress, ListenError> {
    stream.set_read_timeout(Some(SILENCE))?;
    stream.set_write_timeout(Some(SILENCE))?;
    let received = receive(stream, stem, wanted, progress);
    let mut to = stream;
    match &received {
        Ok(end) => stream::say(&mut to, "done", &end.done.to_string())?,
        // It may be gone.
        Err(error) => {
            let _ = stream::say(&mut to, "error", &sentence(error));
            drain(stream);
        }
    }
    received
}

fn receive(
    stream: &TcpStream,
    stem: &Path,
    wanted: &mut dyn FnMut(&Opening) -> Result<(), String>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Progress, ListenError> {
    let name = || stem.display().to_string();
    // Writes to a served volume's own origin go round its server: snapshots would change with it.
    let _lock = match share_store(stem) {
        Err(error @ LockError::Held(_)) => return Err(ListenError::Locked(name(), error)),
        // What cannot be opened is told below.
        other => other.ok(),
    };
    let from = BufReader::with_capacity(MAX_EXTENT_BYTES, stream);
    let mut to = stream;
    let mut ready = |opening: &Opening| {
        wanted(opening).map_err(StreamError::Unwanted)?;
        Ok(stream::say(&mut to, "proceed", "")?)
    };
    stream::receive(from, stem, &mut ready, progress)
        .map_err(|error| ListenError::Stream(name(), error))
}

/// An error and what it comes from, in one line.
fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

/// Takes some of what is still on its way: closed with that unread, the connection would lose the reason.
fn drain(stream: &TcpStream) {
    const MOST: u64 = 64 << 20;
    // What fails here has ended.
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.set_read_timeout(Some(Duration::from_secs(2)));
    let _ = io::copy(&mut stream.take(MOST), &mut io::sink());
}

/// What a progress file says: `SNAP DONE/TOTAL BYTE`.
#[must_use]
pub fn progress_line(now: &Progress) -> String {
    let tag = now.header.to.tag;
    format!("{tag} {}/{} {}\n", now.done, now.total, now.at)
}

/// Renews a progress file.
///
/// # Errors
/// It cannot be written; the one before is still there.
pub fn write_progress(file: &Path, now: &Progress) -> io::Result<()> {
    let mut new = file.as_os_str().to_owned();
    new.push(".new");
    // Replaced as a whole: scripts read it at any time.
    fs::write(&new, progress_line(now))?;
    fs::rename(&new, file)
}

/// What a progress file says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Told {
    /// The sender's number of the snapshot.
    pub tag: u32,
    /// Whether all of it is durable.
    pub whole: bool,
    /// All that changed below this byte is.
    pub at: u64,
}

/// Reads a [`progress_line`].
#[must_use]
pub fn read_progress(text: &str) -> Option<Told> {
    let mut words = text.split_whitespace();
    let tag = words.next()?.parse().ok()?;
    let (done, total) = words.next()?.split_once('/')?;
    let (done, total): (u64, u64) = (done.parse().ok()?, total.parse().ok()?);
    let at = words.next()?.parse().ok()?;
    let whole = done >= total;
    words.next().is_none().then_some(Told { tag, whole, at })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::delta::{Header, Side};
    use crate::units::{ChunkShift, Sectors, SnapTag};

    /// A copy that was cut was taken for a whole one, and shown.
    #[test]
    fn a_progress_file_says_whether_it_is_all() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("apply");
        let side = Side {
            tag: SnapTag(6),
            length: Sectors(80),
        };
        let mut now = Progress {
            header: Header {
                chunk: ChunkShift::from_bytes(4096).expect("a chunk size"),
                from: None,
                to: side,
            },
            done: 3,
            total: 10,
            at: 12_288,
        };
        let told = |now: &Progress| {
            write_progress(&file, now).expect("written");
            read_progress(&fs::read_to_string(&file).expect("read")).expect("understood")
        };
        let (tag, at) = (6, 12_288);
        assert_eq!(
            told(&now),
            Told {
                tag,
                whole: false,
                at
            }
        );
        now.done = 10;
        assert!(told(&now).whole);
        for bad in [
            "",
            "6",
            "6 3",
            "6 3/10",
            "6 3/10 x",
            "6 3/10 1 2",
            "-6 3/10 1",
        ] {
            assert_eq!(read_progress(bad), None, "{bad}");
        }
    }
}
