// SPDX-License-Identifier: GPL-2.0-only
//! The frames of a stream: one direction of it, written and read.
//!
//! A frame is a header of [`HEADER_BYTES`] and a payload. The header has a checksum of its own and is
//! checked whole before anything of it is used; the length is bounded by the kind before memory is
//! taken. Frames are numbered, so that none is lost, doubled or moved unnoticed. A *sealed* kind ends
//! what may be relied on: its payload begins with the BLAKE3 of every byte before it in this direction.
//! The receiver acts on nothing that no seal covers.
//!
//! The header is the same in every version; the first frame's payload begins with a magic and the
//! version, so that a newer program is told from garbage.

use std::io::{self, Read, Write};

use thiserror::Error;

/// The version of the stream. 1: the first.
pub const VERSION: u16 = 1;
/// What the first frame's payload begins with.
pub const MAGIC: [u8; 8] = *b"zumaRepl";
/// Length of a header: kind, reserved, length, number, checksum of the payload, checksum of the header.
pub const HEADER_BYTES: usize = 24;
/// Length of a BLAKE3.
pub const SEAL_BYTES: usize = 32;
/// The longest payload that carries data: an extent with its runs.
pub const MAX_EXTENT_PAYLOAD: usize = (1 << 20) + (64 << 10);

/// The longest payload of chunk hashes.
pub const MAX_CHUNKS_PAYLOAD: usize = (512 << 10) + 64;

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u16)]
pub enum Kind {
    /// Who one is and what one holds: the first frame of either direction.
    Hello = 1,
    /// No, and why.
    Refuse = 2,
    /// What the sender is about to send.
    Begin = 3,
    /// The receiver is ready for it.
    Ready = 4,
    /// Changed chunks.
    Extent = 5,
    /// All extents up to a position have been sent. Sealed.
    Batch = 6,
    /// All up to a position is durable. Sealed.
    Ack = 7,
    /// All was sent; the root of the snapshot's sums. Sealed.
    End = 8,
    /// The snapshot is there, durably. Sealed.
    Complete = 9,
    /// Still there.
    Alive = 10,
    /// Something failed on this side, and what.
    Fail = 11,
    /// There is nothing to send: the newest snapshot is there.
    Current = 12,
    /// The snapshot to compare.
    Compare = 13,
    /// The sender's sum of a region. Sealed.
    Region = 14,
    /// The receiver's hashes of some chunks of a region that differs.
    Chunks = 15,
    /// What the receiver says of a region. Sealed.
    Compared = 16,
    /// What differs in all. Sealed.
    Verdict = 17,
}

impl Kind {
    const ALL: [Kind; 17] = [
        Kind::Hello,
        Kind::Refuse,
        Kind::Begin,
        Kind::Ready,
        Kind::Extent,
        Kind::Batch,
        Kind::Ack,
        Kind::End,
        Kind::Complete,
        Kind::Alive,
        Kind::Fail,
        Kind::Current,
        Kind::Compare,
        Kind::Region,
        Kind::Chunks,
        Kind::Compared,
        Kind::Verdict,
    ];

    fn from_number(number: u16) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u16 == number)
    }

    /// The longest payload in bytes, the seal included.
    #[must_use]
    pub fn longest(self) -> usize {
        match self {
            Kind::Hello => 512 << 10,
            Kind::Extent => MAX_EXTENT_PAYLOAD,
            Kind::Refuse => 256 << 10,
            Kind::Fail => 4 << 10,
            Kind::Chunks => MAX_CHUNKS_PAYLOAD,
            Kind::Verdict => 8 << 10,
            Kind::Begin
            | Kind::Ready
            | Kind::Batch
            | Kind::Ack
            | Kind::End
            | Kind::Complete
            | Kind::Alive
            | Kind::Current
            | Kind::Compare
            | Kind::Region
            | Kind::Compared => 256,
        }
    }

    /// Whether its payload begins with the hash of all before it.
    #[must_use]
    pub fn sealed(self) -> bool {
        use Kind::{Ack, Batch, Compared, Complete, End, Region, Verdict};
        matches!(
            self,
            Batch | Ack | End | Complete | Region | Compared | Verdict
        )
    }
}

/// Why a stream cannot be read on.
#[derive(Debug, Error)]
pub enum FrameError {
    /// The link failed.
    #[error("the link failed")]
    Io(#[from] io::Error),
    /// The other side closed the stream between two frames.
    #[error("the other side closed the stream")]
    Ended,
    /// The stream ends within a frame.
    #[error("the stream was cut within a frame")]
    Cut,
    /// Header or payload is not what was sent.
    #[error("the stream is damaged at frame {number}: {what}")]
    Damaged {
        /// The frame's place, from 0.
        number: u64,
        /// What is wrong.
        what: &'static str,
    },
    /// The first frame is not the beginning of such a stream.
    #[error("this is not a replication stream")]
    Foreign,
    /// It is one of another version.
    #[error(
        "the other side speaks version {found} of the stream, this one version {VERSION}: upgrade the older one"
    )]
    Version {
        /// The other's.
        found: u16,
    },
}

/// Writes one direction of a stream.
#[derive(Debug)]
pub struct FrameWriter<W> {
    writer: W,
    number: u64,
    bytes: u64,
    hash: blake3::Hasher,
    head: Vec<u8>,
}

impl<W: Write> FrameWriter<W> {
    /// The beginning of a stream.
    pub fn new(writer: W) -> Self {
        FrameWriter {
            writer,
            number: 0,
            bytes: 0,
            hash: blake3::Hasher::new(),
            head: Vec::new(),
        }
    }

    /// Sends a frame with the payload in `parts`; what a sealed kind begins with is put before it.
    ///
    /// # Errors
    /// The link failed. A payload longer than its kind allows is refused as invalid input.
    pub fn send(&mut self, kind: Kind, parts: &[&[u8]]) -> io::Result<()> {
        let mut before = [0; MAGIC.len() + 2 + SEAL_BYTES];
        let mut before_length = 0;
        if self.number == 0 {
            before[..8].copy_from_slice(&MAGIC);
            before[8..10].copy_from_slice(&VERSION.to_le_bytes());
            before_length = 10;
        }
        if kind.sealed() {
            let seal = self.hash.finalize();
            before[before_length..before_length + SEAL_BYTES].copy_from_slice(seal.as_bytes());
            before_length += SEAL_BYTES;
        }
        let before = &before[..before_length];
        let length = before.len() + parts.iter().map(|part| part.len()).sum::<usize>();
        if length > kind.longest() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "a frame would be longer than its kind allows",
            ));
        }
        let mut crc = crc32c::crc32c(before);
        for part in parts {
            crc = crc32c::crc32c_append(crc, part);
        }
        self.head.clear();
        self.head.extend_from_slice(&(kind as u16).to_le_bytes());
        self.head.extend_from_slice(&[0; 2]);
        self.head.extend_from_slice(&(length as u32).to_le_bytes());
        self.head.extend_from_slice(&self.number.to_le_bytes());
        self.head.extend_from_slice(&crc.to_le_bytes());
        let header_crc = crc32c::crc32c(&self.head);
        self.head.extend_from_slice(&header_crc.to_le_bytes());
        self.head.extend_from_slice(before);
        self.put(None)?;
        for part in parts {
            self.put(Some(part))?;
        }
        self.number += 1;
        self.writer.flush()
    }

    /// Writes `part`, or the head.
    fn put(&mut self, part: Option<&[u8]>) -> io::Result<()> {
        let bytes = part.unwrap_or(&self.head);
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
        self.writer.write_all(bytes)
    }

    /// Bytes sent so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

/// Reads one direction of a stream.
#[derive(Debug)]
pub struct FrameReader<R> {
    reader: R,
    number: u64,
    /// The other side has said who it is.
    greeted: bool,
    bytes: u64,
    hash: blake3::Hasher,
}

impl<R: Read> FrameReader<R> {
    /// The beginning of a stream.
    pub fn new(reader: R) -> Self {
        FrameReader {
            reader,
            number: 0,
            greeted: false,
            bytes: 0,
            hash: blake3::Hasher::new(),
        }
    }

    /// Bytes read so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The next frame: its kind, and its payload without seal and magic in `payload`.
    ///
    /// # Errors
    /// The stream is to be given up.
    pub fn next(&mut self, payload: &mut Vec<u8>) -> Result<Kind, FrameError> {
        let number = self.number;
        let damaged = |what| FrameError::Damaged { number, what };
        let mut head = [0; HEADER_BYTES];
        self.fill(&mut head, true)?;
        let header_crc = u32_at(&head, 20);
        if header_crc != crc32c::crc32c(&head[..20]) {
            return Err(if number == 0 {
                FrameError::Foreign
            } else {
                damaged("the checksum of its header")
            });
        }
        if u64_at(&head, 8) != number {
            return Err(damaged("its number; frames are missing, doubled or moved"));
        }
        let Some(kind) = Kind::from_number(u16_at(&head, 0)) else {
            return Err(damaged("its kind"));
        };
        if u16_at(&head, 2) != 0 {
            return Err(damaged("a reserved field"));
        }
        let length = u32_at(&head, 4) as usize;
        if length > kind.longest() {
            return Err(damaged("its length"));
        }
        // Before the payload becomes part of it.
        let seal = kind.sealed().then(|| self.hash.finalize());
        self.hash.update(&head);
        payload.clear();
        payload.resize(length, 0);
        self.fill(payload, false)?;
        if crc32c::crc32c(payload) != u32_at(&head, 16) {
            return Err(damaged("the checksum of its payload"));
        }
        self.hash.update(payload);
        let mut skip = 0;
        if number == 0 {
            if payload.len() < 10 || payload[..8] != MAGIC {
                return Err(FrameError::Foreign);
            }
            let found = u16_at(payload, 8);
            if found != VERSION {
                return Err(FrameError::Version { found });
            }
            skip = 10;
        }
        match kind {
            Kind::Hello if self.greeted => return Err(damaged("a second greeting")),
            Kind::Hello => self.greeted = true,
            // A look at the origin may take long, and fail.
            Kind::Alive | Kind::Fail => {}
            _ if !self.greeted => return Err(damaged("what comes before the greeting")),
            _ => {}
        }
        if let Some(seal) = seal {
            // Compared in constant time, though nothing here is secret.
            let found = payload.get(skip..skip + SEAL_BYTES);
            let same = found
                .and_then(|bytes| <[u8; SEAL_BYTES]>::try_from(bytes).ok())
                .is_some_and(|bytes| seal == blake3::Hash::from_bytes(bytes));
            if !same {
                return Err(damaged("the hash of all before it"));
            }
            skip += SEAL_BYTES;
        }
        payload.drain(..skip);
        self.number += 1;
        Ok(kind)
    }

    fn fill(&mut self, bytes: &mut [u8], between: bool) -> Result<(), FrameError> {
        let mut done = 0;
        while done < bytes.len() {
            match self.reader.read(&mut bytes[done..]) {
                Ok(0) if between && done == 0 => return Err(FrameError::Ended),
                Ok(0) => return Err(FrameError::Cut),
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.bytes += done as u64;
        Ok(())
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut array = [0; 4];
    array.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(array)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut array = [0; 8];
    array.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(array)
}

#[cfg(test)]
mod tests;
