// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap transmit`.

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Seek, SeekFrom, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;

use super::delta_mode::DeltaMode;
use super::listen::tell;
use super::progress::bar;
use super::{refused, snap_tag};
use crate::client::{Client, ClientError};
use crate::delta::changelist::ChangelistWriter;
use crate::delta::stream::{self, Preface, Progress, StreamError};
use crate::delta::{Header, Side, create};
use crate::units::{Chunk, ChunkRun, ChunkShift, SnapTag};

/// The port of `ddsnap delta listen` if none is given.
pub(super) const DEFAULT_PORT: u16 = 4321;
/// Longest wait for an address to answer; the kernel's own would be two minutes.
const CONNECT_WITHIN: Duration = Duration::from_secs(20);
/// Longest wait for the other side: it may flush a large device.
const SILENCE: Duration = Duration::from_secs(600);
/// Most bytes of one write.
const PIECE: usize = 1 << 20;
/// The progress file is renewed so often.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// Send snapshot TO to `ddsnap delta listen`, which has FROM; without FROM all of it.
///
/// The data are read from STEM(FROM) and STEM(TO). It is sent as it is, over a port that asks nobody who he is:
/// for machines side by side. `zumastor replicate` goes over ssh instead. Exit codes: 0 all of it is durable
/// there; 1 it is not; 99 the server cannot be reached.
#[derive(Debug, Args)]
pub struct Transmit {
    #[command(flatten)]
    mode: DeltaMode,
    /// Keep a file with how far it is: "SNAP DONE/TOTAL BYTE", renewed each second.
    #[arg(short, long, value_name = "FILE")]
    progress: Option<PathBuf>,
    /// Send nothing below this byte, which the other side's progress file had last.
    #[arg(short = 's', long, value_name = "BYTE", default_value_t = 0)]
    resume: u64,
    /// Most bytes a second; 0: as many as go.
    #[arg(short = 'l', long, value_name = "BYTES", default_value_t = 0)]
    limit: u64,
    /// The volume's device [default: /dev/mapper/ and the socket's name].
    #[arg(long, value_name = "STEM")]
    stem: Option<PathBuf>,
    /// The server's control socket: a path, or @NAME for an abstract one.
    #[arg(value_name = "SOCK")]
    socket: String,
    /// Where `ddsnap delta listen` is.
    #[arg(value_name = "HOST[:PORT]")]
    address: String,
    /// The snapshot that the other side has, and the one it is to get.
    #[arg(value_names = ["FROM", "TO"], num_args = 1..=2, required = true, value_parser = snap_tag)]
    #[arg(allow_negative_numbers = true)]
    tags: Vec<SnapTag>,
}

/// `HOST` or `HOST:PORT` with a port, as the system takes it.
pub(super) fn address(text: &str, port: u16) -> String {
    let bare_v6 = text.matches(':').count() > 1 && !text.starts_with('[');
    let has_port = !bare_v6 && !text.ends_with(']') && text.contains(':');
    match (has_port, bare_v6) {
        (true, _) => text.to_owned(),
        (_, true) => format!("[{text}]:{port}"),
        _ => format!("{text}:{port}"),
    }
}

/// Connects to the first of the addresses of a name that answers.
fn connect(address: &str) -> io::Result<TcpStream> {
    let mut failed = io::Error::from(io::ErrorKind::AddrNotAvailable);
    for address in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT_WITHIN) {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Writes so many bytes a second.
struct Limited<W> {
    to: W,
    limit: u64,
    began: Instant,
    bytes: u64,
}

impl<W: Write> Write for Limited<W> {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        // What may go in a second, or a large piece would go as one burst, and be followed by a silence that the other
        // side takes for the end.
        let most = match self.limit {
            0 => PIECE,
            limit => usize::try_from(limit).map_or(PIECE, |limit| limit.min(PIECE)),
        };
        let count = self.to.write(&from[..from.len().min(most)])?;
        self.bytes += count as u64;
        if self.limit > 0 {
            let due = Duration::from_secs_f64(self.bytes as f64 / self.limit as f64);
            std::thread::sleep(due.saturating_sub(self.began.elapsed()));
        }
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

impl Transmit {
    pub fn run(&self) -> Result<u8> {
        match self.send() {
            Ok(()) => Ok(0),
            Err(error) => match error.downcast::<ClientError>() {
                Ok(error) => refused("list the changes", Err(error)),
                Err(error) => Err(error),
            },
        }
    }

    fn send(&self) -> Result<()> {
        let (header, list, chunks) = self.list()?;
        let stem = self.stem.clone().unwrap_or_else(|| {
            let name = Path::new(&self.socket).file_name().unwrap_or_default();
            Path::new("/dev/mapper").join(name)
        });
        let address = address(&self.address, DEFAULT_PORT);
        let stream = connect(&address)
            .with_context(|| format!("nobody listens at {address}: start `ddsnap delta listen`"))?;
        stream.set_read_timeout(Some(SILENCE))?;
        stream.set_write_timeout(Some(SILENCE))?;
        let mut answers = BufReader::new(&stream);
        let mut out = Limited {
            to: &stream,
            limit: self.limit,
            began: Instant::now(),
            bytes: 0,
        };
        let bar = bar()?;
        bar.set_length(chunks << header.chunk.get());
        let mut told = Instant::now();
        let mut progress = |done: u64, end: u64| {
            bar.set_position(done);
            if let Some(file) = self
                .progress
                .as_ref()
                .filter(|_| told.elapsed() >= TELL_EVERY)
            {
                told = Instant::now();
                tell(file, &at(header, done >> header.chunk.get(), chunks, end));
            }
        };
        let preface = Preface {
            total: chunks,
            resumed: self.resume > 0,
        };
        let sent = out.write_all(&preface.encode()).map_err(Into::into);
        let mut encoder = self.mode.encoder();
        let sent = sent.and_then(|()| {
            create::create(list, &stem, &mut encoder, &mut out, &mut progress)
                .with_context(|| format!("cannot send to {address}"))
        });
        bar.finish_and_clear();
        if let Err(error) = sent {
            // Why the link broke is perhaps in what was said before.
            let heard = stream::hear(&mut answers, "proceed");
            let heard = heard.and_then(|_| stream::hear(&mut answers, "done"));
            return match heard {
                Err(told @ StreamError::Told(_)) => Err(told.into()),
                _ => Err(error),
            };
        }
        // The listener sees that nothing follows the end.
        stream.shutdown(Shutdown::Write)?;
        stream::hear(&mut answers, "proceed").with_context(|| address.clone())?;
        let done = stream::hear(&mut answers, "done").with_context(|| address.clone())?;
        if done != chunks.to_string() {
            bail!("{address} has {done} chunks, and {chunks} were sent");
        }
        if let Some(file) = &self.progress {
            let end = header.to.length.to_bytes();
            tell(file, &at(header, chunks, chunks, end));
        }
        Ok(())
    }

    /// The changelist from the byte on where it is to begin, in a file without a name, and its chunks.
    fn list(&self) -> Result<(Header, File, u64)> {
        let (from, to) = match self.tags[..] {
            [from, to] => (Some(from), to),
            _ => (None, self.tags[0]),
        };
        let mut client = Client::connect(&self.socket)?;
        let mut list = client.changelist(from, to)?;
        let length = list.from;
        let header = Header {
            chunk: list.chunk,
            from: from.map(|tag| Side { tag, length }),
            to: Side {
                tag: to,
                length: list.to,
            },
        };
        let failed = || "cannot write the list of changes";
        let out = BufWriter::new(tempfile::tempfile().with_context(failed)?);
        let mut out = ChangelistWriter::new(out, &header).with_context(failed)?;
        while let Some(runs) = list.next_runs(&mut |_, _| ())? {
            for run in runs
                .into_iter()
                .filter_map(|run| rest(run, self.resume, header.chunk))
            {
                out.push(run).with_context(failed)?;
            }
        }
        let (out, chunks) = out.finish().with_context(failed)?;
        let mut file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0)).with_context(failed)?;
        Ok((header, file, chunks))
    }
}

/// What of a run does not end below byte `from`.
fn rest(run: ChunkRun, from: u64, chunk: ChunkShift) -> Option<ChunkRun> {
    let end = run.first.0 + run.chunks;
    let first = run.first.0.max(from >> chunk.get());
    (first < end).then(|| ChunkRun {
        first: Chunk(first),
        chunks: end - first,
    })
}

/// How far the sender is: what the other side has made durable, it knows itself.
fn at(header: Header, done: u64, total: u64, at: u64) -> Progress {
    Progress {
        header,
        done,
        total,
        at,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_get_a_port() {
        for (given, expected) in [
            ("beta", "beta:4321"),
            ("beta:99", "beta:99"),
            ("10.0.0.1", "10.0.0.1:4321"),
            ("::1", "[::1]:4321"),
            ("[::1]", "[::1]:4321"),
            ("[::1]:99", "[::1]:99"),
        ] {
            assert_eq!(address(given, DEFAULT_PORT), expected);
        }
    }

    /// A copy that goes on sent all of it again, or left a chunk out.
    #[test]
    fn what_lies_below_the_byte_is_left_out() {
        let run = |first, chunks| ChunkRun {
            first: Chunk(first),
            chunks,
        };
        let rest = |r, from| rest(r, from, ChunkShift::MIN);
        assert_eq!(rest(run(4, 4), 0), Some(run(4, 4)));
        assert_eq!(rest(run(4, 4), 5 * 512 + 1), Some(run(5, 3)));
        assert_eq!(rest(run(4, 4), 8 * 512), None);
    }
}
