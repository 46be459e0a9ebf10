// SPDX-License-Identifier: GPL-2.0-only
//! Delta files: extents in growing order, and a last record that says how many.

use std::io::{self, Read, Write};

use super::extent::{Coding, Extent, Hash, MAX_EXTENT_BYTES, MAX_LEVEL};
use super::record::{FileError, Header, Record, RecordReader, RecordWriter};
use crate::format::{get_u32, get_u64, put_u32, put_u64};
use crate::units::{Chunk, ChunkRun};

const MAGIC: &[u8; 8] = b"ddsnapDF";
const WHAT: &str = "delta of ddsnap";
/// A record of an extent.
const EXTENT: u32 = 1;
/// The last record.
const END: u32 = 2;
const END_BYTES: usize = 16;

const FIRST_AT: usize = 0;
const CHUNKS_AT: usize = FIRST_AT + 8;
const CODING_AT: usize = CHUNKS_AT + 4;
const LEVEL_AT: usize = CODING_AT + 1;
const RESERVED_AT: usize = LEVEL_AT + 1;
const BASE_AT: usize = RESERVED_AT + 2;
const RESULT_AT: usize = BASE_AT + 32;
/// Bytes of an extent's record before its data.
const EXTENT_BYTES: usize = RESULT_AT + 32;

/// Writes a delta.
#[derive(Debug)]
pub struct DeltaWriter<W> {
    records: RecordWriter<W>,
    extents: u64,
    chunks: u64,
}

impl<W: Write> DeltaWriter<W> {
    /// Begins a delta.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn new(writer: W, header: &Header) -> io::Result<Self> {
        Ok(DeltaWriter {
            records: RecordWriter::new(writer, header, MAGIC)?,
            extents: 0,
            chunks: 0,
        })
    }

    /// Appends an extent that lies behind all before.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn push(&mut self, extent: &Extent<'_>) -> io::Result<()> {
        let chunks = u32::try_from(extent.run.chunks).map_err(|_| io::ErrorKind::InvalidInput)?;
        let mut head = [0; EXTENT_BYTES];
        put_u64(&mut head, FIRST_AT, extent.run.first.0);
        put_u32(&mut head, CHUNKS_AT, chunks);
        head[CODING_AT] = extent.coding as u8;
        head[LEVEL_AT] = extent.level;
        head[BASE_AT..RESULT_AT].copy_from_slice(&extent.base);
        head[RESULT_AT..].copy_from_slice(&extent.result);
        self.records.put(EXTENT, &[&head, extent.data])?;
        self.extents += 1;
        self.chunks += extent.run.chunks;
        Ok(())
    }

    /// Ends the delta and gives back what it is written to.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn finish(mut self) -> io::Result<W> {
        let mut end = [0; END_BYTES];
        put_u64(&mut end, 0, self.extents);
        put_u64(&mut end, 8, self.chunks);
        self.records.put(END, &[&end])?;
        Ok(self.records.into_inner())
    }
}

/// Reads a delta extent by extent.
#[derive(Debug)]
pub struct DeltaReader<R> {
    records: RecordReader<R>,
    /// The chunk behind the last extent.
    end: u64,
    extents: u64,
    chunks: u64,
    ended: bool,
}

impl<R: Read> DeltaReader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// It cannot be read, or is not in order.
    pub fn new(reader: R) -> Result<Self, FileError> {
        let longest = EXTENT_BYTES + MAX_EXTENT_BYTES;
        Ok(DeltaReader {
            records: RecordReader::new(reader, MAGIC, WHAT, longest)?,
            end: 0,
            extents: 0,
            chunks: 0,
            ended: false,
        })
    }

    /// What it is about.
    #[must_use]
    pub fn header(&self) -> &Header {
        self.records.header()
    }

    /// Chunks of the extents so far.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.chunks
    }

    /// The next extent, within the second snapshot and behind all before; none at the end, which is
    /// only reached if the file is whole.
    ///
    /// # Errors
    /// It cannot be read, or is not in order.
    pub fn next_extent(&mut self) -> Result<Option<Extent<'_>>, FileError> {
        if self.ended {
            return Ok(None);
        }
        let header = *self.records.header();
        let Record { at, kind } = self.records.next_record()?;
        let malformed = |problem| FileError::Malformed { at, problem };
        if kind == END && self.records.payload().len() == END_BYTES {
            let payload = self.records.payload();
            let totals = (get_u64(payload, 0), get_u64(payload, 8));
            if totals != (self.extents, self.chunks) {
                return Err(malformed("its totals are not those of its extents"));
            }
            self.records.end()?;
            self.ended = true;
            return Ok(None);
        }
        let payload = self.records.payload();
        if kind != EXTENT || payload.len() <= EXTENT_BYTES {
            return Err(malformed("there is no such record in a delta"));
        }
        let extent = decode(payload, &header).map_err(malformed)?;
        if extent.run.first.0 < self.end {
            return Err(malformed("extents are out of order"));
        }
        self.end = extent.run.first.0 + extent.run.chunks;
        self.extents += 1;
        self.chunks += extent.run.chunks;
        Ok(Some(extent))
    }
}

fn decode<'a>(payload: &'a [u8], header: &Header) -> Result<Extent<'a>, &'static str> {
    let (head, data) = payload.split_at(EXTENT_BYTES);
    let hash = |at: usize| -> Hash {
        let mut hash = [0; 32];
        hash.copy_from_slice(&head[at..at + 32]);
        hash
    };
    let coding = match head[CODING_AT] {
        1 => Coding::Difference,
        2 => Coding::Raw,
        _ => return Err("an extent is coded in a way that is not known here"),
    };
    if head[RESERVED_AT..BASE_AT] != [0, 0] {
        return Err("reserved bytes are in use");
    }
    let extent = Extent {
        run: ChunkRun {
            first: Chunk(get_u64(head, FIRST_AT)),
            chunks: get_u32(head, CHUNKS_AT).into(),
        },
        coding,
        level: head[LEVEL_AT],
        base: hash(BASE_AT),
        result: hash(RESULT_AT),
        data,
    };
    let chunks = extent.run.chunks;
    let end = extent.run.first.0.checked_add(chunks);
    if chunks == 0 || end.is_none_or(|end| end > header.to_chunks()) {
        return Err("an extent does not lie within the snapshot");
    }
    if chunks > (MAX_EXTENT_BYTES >> header.chunk.get()) as u64 {
        return Err("an extent is longer than any may be");
    }
    let bytes = extent.bytes(header);
    let fits = match extent.level {
        0 => coding == Coding::Raw && data.len() == bytes,
        level => level <= MAX_LEVEL && data.len() < bytes,
    };
    if !fits {
        return Err("an extent's data is not of the length that its coding gives");
    }
    if coding == Coding::Difference
        && header
            .from
            .is_none_or(|from| extent.run.first.0 >= from.length.to_chunks(header.chunk))
    {
        return Err("an extent is a difference to nothing");
    }
    Ok(extent)
}

#[cfg(test)]
mod tests;
