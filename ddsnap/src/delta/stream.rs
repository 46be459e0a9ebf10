// SPDX-License-Identifier: GPL-2.0-only
//! A delta on its way from `ddsnap transmit` to `ddsnap delta listen`.
//!
//! The sender says [`PREFACE_BYTES`], then a delta as in a file. The listener answers in lines of at most
//! [`MAX_LINE`] bytes: `proceed` once it has read the delta's header and can use its devices, then `done CHUNKS`
//! when all is written and durable, or `error TEXT` at any time. Nothing proves who the other side is.
//!
//! An extent is written as it comes, once its base and its result were compared; so an interruption leaves a
//! volume with a part of the new content, and the same delta, or the rest of it, brings it to an end.

use std::io::{self, BufRead, Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::extent::{Extent, ExtentError, hash};
use super::file::DeltaReader;
use super::record::{FileError, Header};
use super::volume::{Volume, VolumeError};
use crate::format::{get_u32, get_u64, put_u32, put_u64};

/// What a stream begins with.
const MAGIC: &[u8; 8] = b"ddsnapTX";
/// The version of the stream.
pub const VERSION: u32 = 1;
/// The flag of a stream that goes on where an earlier one came to.
const RESUMED: u32 = 1;
/// Length of the preface: magic, version, flags, chunks that are to come.
pub const PREFACE_BYTES: usize = 24;
/// The longest line of the listener.
pub const MAX_LINE: usize = 2000;
/// What was written is made durable so often, and then told.
const FLUSH_EVERY: Duration = Duration::from_secs(1);

/// Why a stream was not received.
#[derive(Debug, Error)]
pub enum StreamError {
    /// It is something else.
    #[error("whoever connected is no `ddsnap transmit`")]
    Foreign,
    /// It is one of another version.
    #[error("the sender speaks version {0} of the stream, this ddsnap version {VERSION}")]
    Version(u32),
    /// It has what this program does not know.
    #[error("the sender is of a newer ddsnap: update this side")]
    Flags,
    /// It is not wanted.
    #[error("{0}")]
    Unwanted(String),
    /// It is not in order, or was cut.
    #[error("the delta cannot be used")]
    File(#[from] FileError),
    /// A device cannot be used.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The base is not what the delta was made from, or an extent is damaged.
    #[error("chunk {chunk} does not fit {base}; what came before it was written")]
    Refused {
        /// The first chunk of the extent.
        chunk: u64,
        /// Where the base was looked for.
        base: String,
        /// Why.
        source: ExtentError,
    },
    /// The link failed.
    #[error("the link failed")]
    Link(#[from] io::Error),
    /// The other side said why not.
    #[error("the other side says: {0}")]
    Told(String),
    /// The other side said something else than was its turn.
    #[error("the other side said something out of turn")]
    OutOfTurn,
}

/// How far a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What it is about.
    pub header: Header,
    /// Chunks that are written and durable.
    pub done: u64,
    /// Of how many.
    pub total: u64,
    /// All that changed below this byte is.
    pub at: u64,
}

/// What a stream begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Preface {
    /// Chunks that are to come.
    pub total: u64,
    /// What lies before them was sent earlier.
    pub resumed: bool,
}

impl Preface {
    /// Its bytes.
    #[must_use]
    pub fn encode(self) -> [u8; PREFACE_BYTES] {
        let mut bytes = [0; PREFACE_BYTES];
        bytes[..8].copy_from_slice(MAGIC);
        put_u32(&mut bytes, 8, VERSION);
        put_u32(&mut bytes, 12, if self.resumed { RESUMED } else { 0 });
        put_u64(&mut bytes, 16, self.total);
        bytes
    }
}

/// What a stream is about, before anything is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opening {
    /// Of the delta.
    pub header: Header,
    /// How much of it comes.
    pub preface: Preface,
}

/// Reads a preface.
///
/// # Errors
/// It is none, or of another version.
pub fn read_preface(from: &mut impl Read) -> Result<Preface, StreamError> {
    let mut bytes = [0; PREFACE_BYTES];
    match from.read_exact(&mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            return Err(StreamError::Foreign);
        }
        read => read?,
    }
    if bytes[..8] != *MAGIC {
        return Err(StreamError::Foreign);
    }
    match get_u32(&bytes, 8) {
        VERSION if get_u32(&bytes, 12) & !RESUMED == 0 => Ok(Preface {
            total: get_u64(&bytes, 16),
            resumed: get_u32(&bytes, 12) == RESUMED,
        }),
        VERSION => Err(StreamError::Flags),
        version => Err(StreamError::Version(version)),
    }
}

/// Says a line to the sender.
///
/// # Errors
/// The link failed.
pub fn say(to: &mut impl Write, word: &str, text: &str) -> io::Result<()> {
    let text: String = text.chars().filter(|c| !c.is_control()).collect();
    let mut line = format!("{word} {text}");
    while line.len() >= MAX_LINE {
        line.pop();
    }
    writeln!(to, "{}", line.trim_end())?;
    to.flush()
}

/// Hears the line of the listener that begins with `word`; gives what follows it.
///
/// # Errors
/// It says something else: why not, for example.
pub fn hear(from: &mut impl BufRead, word: &str) -> Result<String, StreamError> {
    let mut line = Vec::new();
    let mut bounded = from.take(MAX_LINE as u64);
    bounded.read_until(b'\n', &mut line)?;
    if line.pop() != Some(b'\n') {
        return Err(StreamError::OutOfTurn);
    }
    let line = String::from_utf8_lossy(&line);
    let (said, rest) = line.split_once(' ').unwrap_or((&line, ""));
    match said {
        said if said == word => Ok(rest.to_owned()),
        "error" => Err(StreamError::Told(rest.to_owned())),
        _ => Err(StreamError::OutOfTurn),
    }
}

/// Receives a stream into `stem`; the data it starts from is read from `stem(FROM)`. `ready` is called once
/// before the first extent, `progress` each second and at the end.
///
/// # Errors
/// What came before the trouble was written.
pub fn receive(
    mut from: impl Read,
    stem: &Path,
    ready: &mut dyn FnMut(&Opening) -> Result<(), StreamError>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Progress, StreamError> {
    let preface = read_preface(&mut from)?;
    let total = preface.total;
    let mut reader = DeltaReader::new(from)?;
    let header = *reader.header();
    let chunk = header.chunk;
    let base = header.from.map(|side| Volume::snapshot(stem, side, chunk));
    let base = base.transpose()?;
    let target = Volume::target(stem, header.to.length, chunk)?;
    ready(&Opening { header, preface })?;
    target.set_length()?;
    let (mut old, mut new) = (Vec::new(), Vec::new());
    let mut now = Progress {
        header,
        done: 0,
        total,
        at: 0,
    };
    let mut flushed = Instant::now();
    while let Some(extent) = reader.next_extent()? {
        old.clear();
        if let Some(base) = &base {
            base.read(extent.run, &mut old)?;
        }
        let bytes = extent.bytes(&header);
        match extent.decode(&old, bytes, &mut new) {
            Ok(()) => target.write(extent.run, &new)?,
            // Where the volume is its own base, an earlier try may have come this far.
            Err(ExtentError::Base) if is_there(&target, &extent, bytes, &mut old)? => {}
            Err(source) => {
                return Err(StreamError::Refused {
                    chunk: extent.run.first.0,
                    base: base.as_ref().map_or(target.name(), Volume::name),
                    source,
                });
            }
        }
        let end = extent.run.first.0 + extent.run.chunks;
        now.done += extent.run.chunks;
        now.at = end << chunk.get();
        if flushed.elapsed() >= FLUSH_EVERY {
            // Only what is durable is told.
            target.flush()?;
            progress(now);
            flushed = Instant::now();
        }
    }
    target.flush()?;
    now.at = header.to.length.to_bytes();
    progress(now);
    Ok(now)
}

fn is_there(
    target: &Volume,
    extent: &Extent<'_>,
    bytes: usize,
    data: &mut Vec<u8>,
) -> Result<bool, VolumeError> {
    target.read_present(extent.run, data)?;
    Ok(data.len() == bytes && hash(data) == extent.result)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::delta::Side;
    use crate::delta::extent::{Encoder, Mode};
    use crate::delta::file::DeltaWriter;
    use crate::units::{Chunk, ChunkRun, ChunkShift, Sectors, SnapTag};

    const CHUNKS: usize = 8;

    /// A directory with v(0), whose copy v is to become v(2), and the stream that does it.
    fn stream() -> (tempfile::TempDir, Vec<u8>, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let old = vec![1; CHUNKS * 512];
        let mut new = old.clone();
        new[2 * 512..4 * 512].fill(7);
        new[7 * 512..].fill(9);
        fs::write(dir.path().join("v(0)"), &old).unwrap();
        fs::write(dir.path().join("v"), &old).unwrap();
        let side = |tag| Side {
            tag: SnapTag(tag),
            length: Sectors(CHUNKS as u64),
        };
        let header = Header {
            chunk: ChunkShift::MIN,
            from: Some(side(0)),
            to: side(2),
        };
        let preface = Preface {
            total: 3,
            resumed: false,
        };
        let mut bytes = preface.encode().to_vec();
        let mut delta = DeltaWriter::new(&mut bytes, &header).unwrap();
        let mut encoder = Encoder::new(Mode::Raw, 0);
        for (first, chunks) in [(2, 2), (7, 1)] {
            let run = ChunkRun {
                first: Chunk(first),
                chunks,
            };
            let (from, to) = (first as usize * 512, (first + chunks) as usize * 512);
            let extent = encoder.encode(run, &old[from..to], &new[from..to]);
            delta.push(&extent).unwrap();
        }
        delta.finish().unwrap();
        (dir, bytes, new)
    }

    fn take(dir: &Path, bytes: &[u8]) -> Result<Progress, StreamError> {
        receive(bytes, &dir.join("v"), &mut |_| Ok(()), &mut |_| ())
    }

    #[test]
    fn a_stream_makes_the_copy_the_other_snapshot() {
        let (dir, bytes, new) = stream();
        let end = take(dir.path(), &bytes).unwrap();
        assert_eq!((end.done, end.total, end.at), (3, 3, CHUNKS as u64 * 512));
        assert_eq!(fs::read(dir.path().join("v")).unwrap(), new);
        // Again, as after an interruption.
        take(dir.path(), &bytes).unwrap();
    }

    /// Cut anywhere, a stream is no success, and the whole of it afterwards is.
    #[test]
    fn a_stream_that_was_cut_goes_on() {
        let (dir, bytes, new) = stream();
        for length in (0..bytes.len()).step_by(7) {
            take(dir.path(), &bytes[..length]).unwrap_err();
        }
        take(dir.path(), &bytes).unwrap();
        assert_eq!(fs::read(dir.path().join("v")).unwrap(), new);
    }

    /// A changed byte is never written.
    #[test]
    fn damage_and_another_base_are_refused() {
        let (dir, bytes, _) = stream();
        let old = fs::read(dir.path().join("v")).unwrap();
        for at in (0..bytes.len()).filter(|at| !(12..24).contains(at)) {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            take(dir.path(), &bad).unwrap_err();
            fs::write(dir.path().join("v"), &old).unwrap();
        }
        fs::write(dir.path().join("v(0)"), vec![3; CHUNKS * 512]).unwrap();
        fs::write(dir.path().join("v"), vec![3; CHUNKS * 512]).unwrap();
        let error = take(dir.path(), &bytes).unwrap_err();
        assert!(matches!(error, StreamError::Refused { chunk: 2, .. }));
        assert_eq!(
            fs::read(dir.path().join("v")).unwrap(),
            vec![3; CHUNKS * 512]
        );
    }

    /// A delta of another snapshot was written over a part of this one.
    #[test]
    fn what_is_not_wanted_is_not_written() {
        let (dir, mut bytes, _) = stream();
        bytes[12] = 1;
        let old = fs::read(dir.path().join("v")).unwrap();
        let mut asked = None;
        let mut ready = |opening: &Opening| {
            asked = Some(*opening);
            Err(StreamError::Unwanted("not now".into()))
        };
        let refused = receive(&bytes[..], &dir.path().join("v"), &mut ready, &mut |_| ());
        assert_eq!(refused.unwrap_err().to_string(), "not now");
        assert_eq!(fs::read(dir.path().join("v")).unwrap(), old);
        let asked = asked.unwrap();
        assert!(asked.preface.resumed && asked.header.to.tag == SnapTag(2));
        // A newer sender's flag may mean anything.
        bytes[12] = 2;
        assert!(matches!(take(dir.path(), &bytes), Err(StreamError::Flags)));
    }

    /// The bytes of FORMAT.md.
    #[test]
    fn the_preface_is_as_documented() {
        let preface = Preface {
            total: 0x0102,
            resumed: true,
        };
        let golden = b"ddsnapTX\x01\0\0\0\x01\0\0\0\x02\x01\0\0\0\0\0\0";
        assert_eq!(&preface.encode(), golden);
        assert_eq!(read_preface(&mut &golden[..]).unwrap(), preface);
    }

    #[test]
    fn lines_are_bounded_and_say_why() {
        let mut line = Vec::new();
        say(&mut line, "error", &"x\n".repeat(5000)).unwrap();
        assert!(line.len() <= MAX_LINE);
        let told = hear(&mut &line[..], "done").unwrap_err();
        assert!(matches!(told, StreamError::Told(text) if text.starts_with("xxx")));
        assert_eq!(hear(&mut &b"done 3\n"[..], "done").unwrap(), "3");
        for bad in [&b"done 3"[..], b"", b"what\n", &[b'x'; 5000]] {
            assert!(matches!(
                hear(&mut &bad[..], "done"),
                Err(StreamError::OutOfTurn)
            ));
        }
    }
}
