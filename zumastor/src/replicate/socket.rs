// SPDX-License-Identifier: GPL-2.0-only
//! The way in: `zumastor send` and `zumastor receive` pump between their standard streams and a socket of
//! the daemon, which does what needs privileges.
//!
//! A connection begins with one line of JSON, [`Open`], behind which the other side's part of the stream
//! follows at once. The daemon's part follows its [`Answer`], another line, which comes when it has read the
//! greeting: what the stream is for is in there. The socket belongs to root and, if there is one, to the group
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
use crate::replication::frame::FrameReader;
use crate::replication::link::Timing;
use crate::replication::message::{Hello, Message};

/// Longest line that a connection may begin with, in bytes.
const OPENING_MAX_BYTES: u64 = 4096;

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

/// A stream that came in, and what was read of it already.
#[derive(Debug)]
pub struct Stream {
    /// The rest of it.
    pub socket: UnixStream,
    /// The other side's first frame, as it is on the wire.
    pub greeting: Vec<u8>,
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
    // Two names at most: what is longer is no opening, and would be kept for each connection.
    let reader = Within::new(stream, deadline).take(OPENING_MAX_BYTES);
    let open = control::receive(&mut BufReader::with_capacity(1, reader))?;
    open.context("nobody said what the connection is for")
}

/// Reads the greeting that a stream begins with, before it is known what is to be done with it. The
/// other side says it without waiting for anything.
///
/// # Errors
/// It does not come in time, or is none.
pub fn greeting(socket: UnixStream) -> Result<(Stream, Hello)> {
    struct Tee<'a>(Within<'a>, Vec<u8>);
    impl Read for Tee<'_> {
        fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
            let count = self.0.read(into)?;
            self.1.extend_from_slice(&into[..count]);
            Ok(count)
        }
    }
    let reader = Within::new(&socket, Timing::default().deadline);
    let (mut tee, mut payload) = (Tee(reader, Vec::new()), Vec::new());
    let kind = FrameReader::new(&mut tee).next(&mut payload)?;
    let Message::Hello(hello) = Message::decode(kind, &payload)? else {
        bail!("the stream does not begin with a greeting");
    };
    let greeting = tee.1;
    Ok((Stream { socket, greeting }, *hello))
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
    let mut into = stream.try_clone()?;
    thread::Builder::new().name("pump".into()).spawn(move || {
        // What fails here ends the stream; the daemon tells why.
        let _ = copy(&mut io::stdin().lock(), &mut into);
        let _ = into.shutdown(Shutdown::Write);
    })?;
    // The daemon answers when it has read the greeting.
    let answer: Option<Answer> = control::receive(&mut BufReader::with_capacity(1, &stream))?;
    if let Some(error) = answer.context("the daemon ended before it answered")?.error {
        bail!("{error}");
    }
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
    use crate::replication::frame::{FrameWriter, Kind};
    use crate::replication::message::Wishes;
    use crate::replication::standing::{Role, Standing};

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

    /// Any member of the group could have the daemon keep 16 MiB for each of its connections.
    #[test]
    fn an_opening_has_room_for_names_and_no_more() {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let filler = thread::spawn(move || (&theirs).write_all(&vec![b' '; 1 << 20]));
        let refused = accept_within(&ours, Duration::from_secs(60)).expect_err("too long");
        assert!(format!("{refused:#}").contains("cut off after 4096 bytes"));
        drop(ours);
        filler.join().expect("it ends").expect_err("not all read");
    }

    /// A greeting that was looked at was missing from the stream, or took more with it.
    #[test]
    fn a_greeting_is_read_before_the_stream_and_left_in_it() {
        let (near, far) = UnixStream::pair().expect("a pair");
        let id = uuid::Uuid::from_u128(1);
        let hello = Hello {
            nonce: [1; 16],
            features: 3,
            wishes: Wishes::default(),
            standing: Standing::blank(id, Role::Replica),
        };
        let said = Message::Hello(Box::new(hello.clone()));
        let mut sent = Vec::new();
        let mut writer = FrameWriter::new(&mut sent);
        writer
            .send(Kind::Hello, &[&said.encode()])
            .expect("written");
        let first = writer.bytes() as usize;
        writer.send(Kind::Alive, &[]).expect("written");
        (&near).write_all(&sent).expect("sent");
        drop(near);
        let (mut stream, heard) = greeting(far).expect("a greeting");
        assert_eq!(heard, hello);
        assert_eq!(stream.greeting, sent[..first]);
        let mut rest = Vec::new();
        stream.socket.read_to_end(&mut rest).expect("read");
        assert_eq!(rest, sent[first..]);
    }

    /// Whoever connects with something else must not become a job.
    #[test]
    fn what_is_no_greeting_is_refused() {
        for said in [&b"SSH-2.0-OpenSSH_9.2p1 Debian-2"[..], b"", &[0; 4096]] {
            let (near, far) = UnixStream::pair().expect("a pair");
            (&near).write_all(said).expect("sent");
            drop(near);
            greeting(far).expect_err("refused");
        }
    }
}
