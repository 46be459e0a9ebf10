// SPDX-License-Identifier: GPL-2.0-only
//! The way in: `zumastor send` and `zumastor receive` pump between their standard streams and a socket of
//! the daemon, which does what needs privileges.
//!
//! A connection begins with one line of JSON, [`Open`], and the daemon's [`Answer`] as another; then the
//! stream follows in both directions. The socket belongs to root and, if there is one, to the group
//! `zumastor`.

use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::control::{self, PEER_DEADLINE, Within};

/// What a connection is for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Open {
    /// The daemon receives into this volume.
    Receive {
        /// Its name here.
        volume: String,
    },
    /// The daemon sends from this volume.
    Send {
        /// Its name here.
        volume: String,
        /// The target.
        target: String,
    },
}

/// What the daemon says to that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Answer {
    /// Why not.
    pub error: Option<String>,
}

/// Reads what a connection is for. Not a byte of what follows.
///
/// # Errors
/// It is not said, or not in time.
pub fn accept(stream: &UnixStream) -> Result<Open> {
    accept_within(stream, PEER_DEADLINE)
}

fn accept_within(stream: &UnixStream, deadline: Duration) -> Result<Open> {
    stream.set_write_timeout(Some(deadline))?;
    let reader = Within::new(stream, deadline);
    let open = control::receive(&mut BufReader::with_capacity(1, reader))?;
    open.context("nobody said what the connection is for")
}

/// Answers; without an error the stream follows, which has deadlines of its own.
///
/// # Errors
/// Nobody listens any more.
pub fn answer(stream: &UnixStream, error: Option<String>) -> Result<()> {
    control::send(stream, Answer { error })?;
    stream.set_read_timeout(None)?;
    Ok(stream.set_write_timeout(None)?)
}

/// Pumps between standard streams and the daemon until either side has ended.
///
/// # Errors
/// The daemon does not answer or says no, or a stream fails.
pub fn pump(socket: &Path, open: &Open) -> Result<()> {
    let stream = UnixStream::connect(socket)
        .with_context(|| format!("the daemon does not answer at {}", socket.display()))?;
    control::send(&stream, open)?;
    let answer: Option<Answer> = control::receive(&mut BufReader::with_capacity(1, &stream))?;
    if let Some(error) = answer.context("the daemon ended before it answered")?.error {
        bail!("{error}");
    }
    let mut into = stream.try_clone()?;
    thread::Builder::new().name("pump".into()).spawn(move || {
        // What fails here ends the stream; the daemon tells why.
        let _ = copy(&mut io::stdin().lock(), &mut into);
        let _ = into.shutdown(Shutdown::Write);
    })?;
    let mut from = stream;
    copy(&mut from, &mut io::stdout().lock()).context("the stream broke")
}

fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => {
                to.write_all(&buffer[..count])?;
                // Short frames are answers that somebody waits for.
                to.flush()?;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    /// Each byte had the whole time again: a few connections that said one now and then kept all others out.
    #[test]
    fn who_does_not_say_in_time_what_he_wants_is_left() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let begin = Instant::now();
        let drip = thread::spawn(move || {
            let mut theirs = theirs;
            while begin.elapsed() < Duration::from_secs(15) && theirs.write_all(b" ").is_ok() {
                thread::sleep(Duration::from_millis(20));
            }
        });
        accept_within(&ours, Duration::from_millis(300)).expect_err("nothing was said");
        assert!(begin.elapsed() < Duration::from_secs(10));
        drop(ours);
        drip.join().expect("it ends");
    }
}
