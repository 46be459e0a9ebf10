// SPDX-License-Identifier: GPL-2.0-only
//! What changelist and delta files have in common: a header, then numbered records to the last.
//!
//! A record's checksum covers the header's too, so a record of another file, a missing one and one in
//! another place are all found. The reader holds one record at a time, of bounded length, and believes
//! nothing before its checksum.

use std::io::{self, Read, Write};

use thiserror::Error;

use crate::format::{get_u32, get_u64, put_u32, put_u64};
use crate::units::{ChunkShift, Sectors, SnapTag};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 64;
/// Bytes of a record before its payload.
pub const RECORD_BYTES: usize = 24;
/// History: 1 - first version, whose snapshots have lengths in chunks; 2 - in sectors. Both are read.
pub const VERSION: u32 = 2;

const VERSION_AT: usize = 8;
const HEADER_CRC_AT: usize = VERSION_AT + 4;
const SHIFT_AT: usize = HEADER_CRC_AT + 4;
const FLAGS_AT: usize = SHIFT_AT + 4;
const FROM_AT: usize = FLAGS_AT + 4;
const TO_AT: usize = FROM_AT + 4;
const FROM_LENGTH_AT: usize = TO_AT + 4;
const TO_LENGTH_AT: usize = FROM_LENGTH_AT + 8;
const HEADER_RESERVED_AT: usize = TO_LENGTH_AT + 8;

const KIND_AT: usize = 0;
const LENGTH_AT: usize = KIND_AT + 4;
const NUMBER_AT: usize = LENGTH_AT + 4;
const CRC_AT: usize = NUMBER_AT + 8;
const RECORD_RESERVED_AT: usize = CRC_AT + 4;

/// There is a snapshot that the file starts from.
const INCREMENTAL: u32 = 1;

/// Why a changelist or delta file is refused.
#[derive(Debug, Error)]
pub enum FileError {
    /// It cannot be read or written.
    #[error("input or output failed")]
    Io(#[from] io::Error),
    /// It is something else.
    #[error("this is no {what} (it starts with {found:02x?})")]
    Magic {
        /// What was expected.
        what: &'static str,
        /// Its first bytes.
        found: [u8; 8],
    },
    /// It was made by another version.
    #[error("version {found} of the file format; versions 1 to {VERSION} are known here")]
    Version {
        /// As it says.
        found: u32,
    },
    /// Its end is missing.
    #[error("the file ends at byte {at}, in the middle; it was not written or copied whole")]
    Truncated {
        /// Bytes it has.
        at: u64,
    },
    /// Bytes were changed.
    #[error("the file is damaged at byte {at}: {what} is {found:#x}, expected {wanted:#x}")]
    Damaged {
        /// Where the header or record begins.
        at: u64,
        /// Which field.
        what: &'static str,
        /// What it is.
        found: u64,
        /// What it should be.
        wanted: u64,
    },
    /// The checksums are right, but what it says cannot be.
    #[error("the file makes no sense at byte {at}: {problem}")]
    Malformed {
        /// Where the header or record begins.
        at: u64,
        /// What cannot be.
        problem: &'static str,
    },
}

/// One end of what a file describes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    /// The snapshot.
    pub tag: SnapTag,
    /// Its length, at most [`Sectors::MAX`].
    pub length: Sectors,
}

/// What a changelist or delta is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Chunk size.
    pub chunk: ChunkShift,
    /// The snapshot that is there already; none if the file has all of `to`.
    pub from: Option<Side>,
    /// The snapshot that is to come.
    pub to: Side,
}

impl Header {
    /// Chunks of the snapshot that is to come; the last may be short.
    #[must_use]
    pub fn to_chunks(&self) -> u64 {
        self.to.length.to_chunks(self.chunk)
    }

    /// The header's bytes.
    #[must_use]
    pub fn encode(&self, magic: &[u8; 8]) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let from = self.from.unwrap_or(Side {
            tag: SnapTag(0),
            length: Sectors(0),
        });
        bytes[..8].copy_from_slice(magic);
        put_u32(&mut bytes, VERSION_AT, VERSION);
        put_u32(&mut bytes, SHIFT_AT, self.chunk.get().into());
        let flags = self.from.map_or(0, |_| INCREMENTAL);
        put_u32(&mut bytes, FLAGS_AT, flags);
        put_u32(&mut bytes, FROM_AT, from.tag.0);
        put_u32(&mut bytes, TO_AT, self.to.tag.0);
        put_u64(&mut bytes, FROM_LENGTH_AT, from.length.0);
        put_u64(&mut bytes, TO_LENGTH_AT, self.to.length.0);
        let crc = header_crc(&bytes);
        put_u32(&mut bytes, HEADER_CRC_AT, crc);
        bytes
    }

    /// The header in `bytes`, of a file that `what` names.
    ///
    /// # Errors
    /// The first thing that is not in order: magic, checksum, version, then the fields.
    pub fn decode(
        bytes: &[u8; HEADER_BYTES],
        magic: &[u8; 8],
        what: &'static str,
    ) -> Result<Header, FileError> {
        if bytes[..8] != *magic {
            let mut found = [0; 8];
            found.copy_from_slice(&bytes[..8]);
            return Err(FileError::Magic { what, found });
        }
        same(
            0,
            "the checksum of the header",
            get_u32(bytes, HEADER_CRC_AT).into(),
            header_crc(bytes).into(),
        )?;
        let version = get_u32(bytes, VERSION_AT);
        if !(1..=VERSION).contains(&version) {
            return Err(FileError::Version { found: version });
        }
        let malformed = |problem| FileError::Malformed { at: 0, problem };
        let shift = u8::try_from(get_u32(bytes, SHIFT_AT)).ok();
        let chunk = shift
            .and_then(ChunkShift::new)
            .ok_or_else(|| malformed("no chunk is of that size"))?;
        let length = |at| {
            let found = get_u64(bytes, at);
            let length = match version {
                1 => Sectors::of_chunks(found, chunk),
                _ => Some(Sectors(found)).filter(|&length| length <= Sectors::MAX),
            };
            length.ok_or_else(|| malformed("no device is of that length"))
        };
        let from = Side {
            tag: SnapTag(get_u32(bytes, FROM_AT)),
            length: length(FROM_LENGTH_AT)?,
        };
        let to = Side {
            tag: SnapTag(get_u32(bytes, TO_AT)),
            length: length(TO_LENGTH_AT)?,
        };
        let from = match get_u32(bytes, FLAGS_AT) {
            0 if (from.tag.0, from.length.0) == (0, 0) => None,
            0 => return Err(malformed("it has a first snapshot and has none")),
            INCREMENTAL => Some(from),
            _ => return Err(malformed("it has flags that are not known here")),
        };
        if bytes[HEADER_RESERVED_AT..].iter().any(|&byte| byte != 0) {
            return Err(malformed("reserved bytes are in use"));
        }
        Ok(Header { chunk, from, to })
    }
}

fn header_crc(bytes: &[u8; HEADER_BYTES]) -> u32 {
    let crc = crc32c::crc32c(&bytes[..HEADER_CRC_AT]);
    crc32c::crc32c_append(crc, &bytes[SHIFT_AT..])
}

/// Writes a file record by record.
#[derive(Debug)]
pub struct RecordWriter<W> {
    writer: W,
    header_crc: u32,
    number: u64,
}

impl<W: Write> RecordWriter<W> {
    /// Begins a file.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn new(mut writer: W, header: &Header, magic: &[u8; 8]) -> io::Result<Self> {
        let bytes = header.encode(magic);
        writer.write_all(&bytes)?;
        Ok(RecordWriter {
            writer,
            header_crc: header_crc(&bytes),
            number: 0,
        })
    }

    /// Appends a record whose payload is `parts`, one behind the other.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn put(&mut self, kind: u32, parts: &[&[u8]]) -> io::Result<()> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let length = u32::try_from(length).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut head = [0; RECORD_BYTES];
        put_u32(&mut head, KIND_AT, kind);
        put_u32(&mut head, LENGTH_AT, length);
        put_u64(&mut head, NUMBER_AT, self.number);
        let mut crc = crc32c::crc32c_append(self.header_crc, &head[..CRC_AT]);
        for part in parts {
            crc = crc32c::crc32c_append(crc, part);
        }
        put_u32(&mut head, CRC_AT, crc);
        self.writer.write_all(&head)?;
        for part in parts {
            self.writer.write_all(part)?;
        }
        self.number += 1;
        Ok(())
    }

    /// Gives back what the file is written to.
    pub fn into_inner(self) -> W {
        self.writer
    }
}

/// Reads a file record by record.
#[derive(Debug)]
pub struct RecordReader<R> {
    reader: R,
    header: Header,
    header_crc: u32,
    longest: usize,
    number: u64,
    /// Bytes read so far.
    at: u64,
    payload: Vec<u8>,
}

/// A record whose checksum is right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Where in the file it begins, in bytes.
    pub at: u64,
    /// What it is.
    pub kind: u32,
}

impl<R: Read> RecordReader<R> {
    /// Reads the header of a file that `what` names. No payload is longer than `longest` bytes.
    ///
    /// # Errors
    /// It cannot be read, or is not in order.
    pub fn new(
        mut reader: R,
        magic: &[u8; 8],
        what: &'static str,
        longest: usize,
    ) -> Result<Self, FileError> {
        let mut bytes = [0; HEADER_BYTES];
        let mut at = 0;
        read_all(&mut reader, &mut bytes, &mut at)?;
        Ok(RecordReader {
            reader,
            header: Header::decode(&bytes, magic, what)?,
            header_crc: header_crc(&bytes),
            longest,
            number: 0,
            at,
            payload: Vec::new(),
        })
    }

    /// What the file is about.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Reads the next record; [`payload`](Self::payload) is what it holds. The caller knows by its kind
    /// which is the last.
    ///
    /// # Errors
    /// It cannot be read, or is not in order.
    pub fn next_record(&mut self) -> Result<Record, FileError> {
        let start = self.at;
        let mut head = [0; RECORD_BYTES];
        read_all(&mut self.reader, &mut head, &mut self.at)?;
        let length = get_u32(&head, LENGTH_AT) as usize;
        if length > self.longest {
            return Err(FileError::Malformed {
                at: start,
                problem: "a record is longer than any may be",
            });
        }
        self.payload.resize(length, 0);
        read_all(&mut self.reader, &mut self.payload, &mut self.at)?;
        let crc = crc32c::crc32c_append(self.header_crc, &head[..CRC_AT]);
        let crc = crc32c::crc32c_append(crc, &self.payload);
        let found = get_u32(&head, CRC_AT);
        same(start, "the checksum of a record", found.into(), crc.into())?;
        let found = get_u32(&head, RECORD_RESERVED_AT);
        same(start, "a reserved field", found.into(), 0)?;
        let found = get_u64(&head, NUMBER_AT);
        same(start, "the number of a record", found, self.number)?;
        self.number += 1;
        Ok(Record {
            at: start,
            kind: get_u32(&head, KIND_AT),
        })
    }

    /// What the record that was read last holds.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// Makes sure that nothing follows.
    ///
    /// # Errors
    /// Something does, or the file cannot be read.
    pub fn end(&mut self) -> Result<(), FileError> {
        let mut more = [0; 1];
        match read_all(&mut self.reader, &mut more, &mut self.at.clone()) {
            Err(FileError::Truncated { .. }) => Ok(()),
            Err(error) => Err(error),
            Ok(()) => Err(FileError::Malformed {
                at: self.at,
                problem: "something follows the end",
            }),
        }
    }
}

fn read_all(reader: &mut impl Read, bytes: &mut [u8], at: &mut u64) -> Result<(), FileError> {
    let mut done = 0;
    while done < bytes.len() {
        match reader.read(&mut bytes[done..]) {
            Ok(0) => return Err(FileError::Truncated { at: *at }),
            Ok(count) => {
                done += count;
                *at += count as u64;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn same(at: u64, what: &'static str, found: u64, wanted: u64) -> Result<(), FileError> {
    if found == wanted {
        return Ok(());
    }
    Err(FileError::Damaged {
        at,
        what,
        found,
        wanted,
    })
}
