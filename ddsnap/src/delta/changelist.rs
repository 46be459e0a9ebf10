// SPDX-License-Identifier: GPL-2.0-only
//! Changelist files: which chunks differ between two snapshots, as runs in growing order.

use std::io::{self, Read, Write};

use super::record::{FileError, Header, Record, RecordReader, RecordWriter};
use crate::format::{get_u64, put_u64, varint};
use crate::units::{Chunk, ChunkRun};

const MAGIC: &[u8; 8] = b"ddsnapCL";
const WHAT: &str = "changelist of ddsnap";
/// A record of runs.
const RUNS: u32 = 1;
/// The last record.
const END: u32 = 2;
/// The longest payload of a record of runs, in bytes.
const RUNS_BYTES: usize = 4096;
const END_BYTES: usize = 16;

/// Writes a changelist.
#[derive(Debug)]
pub struct ChangelistWriter<W> {
    records: RecordWriter<W>,
    waiting: Vec<u8>,
    /// The chunk behind the last run.
    end: u64,
    /// Chunks listed.
    chunks: u64,
    /// Runs written.
    runs: u64,
    /// The run that may still grow.
    open: Option<ChunkRun>,
}

impl<W: Write> ChangelistWriter<W> {
    /// Begins a changelist.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn new(writer: W, header: &Header) -> io::Result<Self> {
        Ok(ChangelistWriter {
            records: RecordWriter::new(writer, header, MAGIC)?,
            waiting: Vec::with_capacity(RUNS_BYTES),
            end: 0,
            chunks: 0,
            runs: 0,
            open: None,
        })
    }

    /// Appends a run that lies behind all before.
    ///
    /// # Errors
    /// It cannot be written, or does not lie there.
    pub fn push(&mut self, run: ChunkRun) -> io::Result<()> {
        if let Some(open) = &mut self.open {
            if open.first.0.checked_add(open.chunks) == Some(run.first.0) {
                open.chunks += run.chunks;
                return Ok(());
            }
        }
        self.close_run()?;
        self.open = Some(run);
        Ok(())
    }

    fn close_run(&mut self) -> io::Result<()> {
        let Some(run) = self.open.take() else {
            return Ok(());
        };
        let gap = run.first.0.checked_sub(self.end);
        let (Some(gap), Some(more)) = (gap, run.chunks.checked_sub(1)) else {
            return Err(io::Error::other("the changes are out of order"));
        };
        if self.waiting.len() + 2 * varint::MAX_LEN > RUNS_BYTES {
            self.write_waiting()?;
        }
        let mut bytes = [0; 2 * varint::MAX_LEN];
        let mut used = 0;
        varint::put(&mut bytes, &mut used, gap);
        varint::put(&mut bytes, &mut used, more);
        self.waiting.extend_from_slice(&bytes[..used]);
        self.end = run.first.0 + run.chunks;
        self.chunks += run.chunks;
        self.runs += 1;
        Ok(())
    }

    fn write_waiting(&mut self) -> io::Result<()> {
        if !self.waiting.is_empty() {
            self.records.put(RUNS, &[&self.waiting])?;
            self.waiting.clear();
        }
        Ok(())
    }

    /// Ends the changelist; gives back what it is written to and how many chunks it lists.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn finish(mut self) -> io::Result<(W, u64)> {
        self.close_run()?;
        self.write_waiting()?;
        let mut end = [0; END_BYTES];
        put_u64(&mut end, 0, self.chunks);
        put_u64(&mut end, 8, self.runs);
        self.records.put(END, &[&end])?;
        Ok((self.records.into_inner(), self.chunks))
    }
}

/// Reads a changelist run by run.
#[derive(Debug)]
pub struct ChangelistReader<R> {
    records: RecordReader<R>,
    /// Runs of the record that was read last.
    waiting: Vec<u8>,
    /// How far they were looked at.
    at: usize,
    /// Where in the file that record begins.
    record_at: u64,
    end: u64,
    chunks: u64,
    runs: u64,
    ended: bool,
}

impl<R: Read> ChangelistReader<R> {
    /// Reads the header.
    ///
    /// # Errors
    /// It cannot be read, or is not in order.
    pub fn new(reader: R) -> Result<Self, FileError> {
        Ok(ChangelistReader {
            records: RecordReader::new(reader, MAGIC, WHAT, RUNS_BYTES)?,
            waiting: Vec::new(),
            at: 0,
            record_at: 0,
            end: 0,
            chunks: 0,
            runs: 0,
            ended: false,
        })
    }

    /// What it is about.
    #[must_use]
    pub fn header(&self) -> &Header {
        self.records.header()
    }

    /// The next run, within the second snapshot and behind all before; none at the end, which is only
    /// reached if the file is whole.
    ///
    /// # Errors
    /// It cannot be read, or is not in order.
    pub fn next_run(&mut self) -> Result<Option<ChunkRun>, FileError> {
        if self.ended {
            return Ok(None);
        }
        if self.at == self.waiting.len() {
            let Record { at, kind } = self.records.next_record()?;
            let payload = self.records.payload();
            self.record_at = at;
            match kind {
                RUNS if !payload.is_empty() => {
                    self.waiting.clear();
                    self.waiting.extend_from_slice(payload);
                    self.at = 0;
                }
                END if payload.len() == END_BYTES => {
                    let totals = (get_u64(payload, 0), get_u64(payload, 8));
                    if totals != (self.chunks, self.runs) {
                        return Err(self.malformed("its totals are not those of its runs"));
                    }
                    self.records.end()?;
                    self.ended = true;
                    return Ok(None);
                }
                _ => return Err(self.malformed("there is no such record in a changelist")),
            }
        }
        let run = self.run().ok_or_else(|| {
            self.malformed("a run is cut short or does not lie within the snapshot")
        })?;
        self.end = run.first.0 + run.chunks;
        self.chunks += run.chunks;
        self.runs += 1;
        Ok(Some(run))
    }

    fn run(&mut self) -> Option<ChunkRun> {
        let gap = varint::get(&self.waiting, &mut self.at).ok()?;
        let more = varint::get(&self.waiting, &mut self.at).ok()?;
        let first = self.end.checked_add(gap)?;
        let chunks = more.checked_add(1)?;
        let fits = first.checked_add(chunks)? <= self.header().to_chunks();
        // Neighbours are one run: so a list has one form only.
        let apart = gap > 0 || self.runs == 0;
        (fits && apart).then_some(ChunkRun {
            first: Chunk(first),
            chunks,
        })
    }

    fn malformed(&self, problem: &'static str) -> FileError {
        FileError::Malformed {
            at: self.record_at,
            problem,
        }
    }
}

/// Reads a changelist to its end to see that it is whole; gives its header and how many chunks it
/// lists.
///
/// # Errors
/// It cannot be read, or is not in order.
pub fn verify(reader: impl Read) -> Result<(Header, u64), FileError> {
    let mut list = ChangelistReader::new(reader)?;
    let mut chunks = 0;
    while let Some(run) = list.next_run()? {
        chunks += run.chunks;
    }
    Ok((*list.header(), chunks))
}

#[cfg(test)]
mod tests;
