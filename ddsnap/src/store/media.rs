// SPDX-License-Identifier: GPL-2.0-only
//! The store's devices with the cache in front of them: bytes in, checked blocks out.

use std::io;

use super::cache::Cache;
use super::error::StoreError;
use crate::buffer::AlignedBuf;
use crate::device::latched::Latched;
use crate::device::{BlockDevice, Read, Write};
use crate::format::block::{Block, Expected, Kind, Pointer};
use crate::format::superblock::Superblock;
use crate::format::{BLOCK_LEN, FormatError};
use crate::promise::kept;
use crate::units::{Chunk, ChunkShift, META_BLOCK_BYTES, MetaBlock, Sectors, StoreChunk};

/// The devices of a store.
pub struct Devices {
    /// The volume whose snapshots are kept. The engine writes to it in a revert and at no other time.
    pub origin: Box<dyn BlockDevice>,
    /// Holds the snapshots' data, and the metadata if it has no device of its own.
    pub data: Box<dyn BlockDevice>,
    /// Holds superblock, journal and index, if not on the data device.
    pub meta: Option<Box<dyn BlockDevice>>,
}

/// Where a copied chunk comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Source {
    Origin(Chunk),
    Store(StoreChunk),
    /// A snapshot's own chunk, of which it has so much.
    Own(StoreChunk, Sectors),
}

pub(crate) struct Media {
    pub origin: Box<dyn BlockDevice>,
    /// As much of the origin as the store has snapshots of: its device may be longer by now.
    pub origin_length: Sectors,
    data: Latched,
    meta: Option<Latched>,
    cache: Cache,
    /// A flush of the origin failed.
    origin_flush: Option<(io::ErrorKind, String)>,
    pub chunk: ChunkShift,
    pub uuid_part: u64,
    /// Generation of the newest durable superblock, or of the checkpoint being written.
    pub generation: u64,
    /// What was asked of the metadata device: reads and writes of neighbouring blocks, and flushes. On a
    /// disk that seeks each takes about as long.
    pub work: u64,
}

impl Media {
    /// The devices of the store that `superblock` leads to, with the origin as long as it says.
    pub fn new(devices: Devices, superblock: &Superblock, cache_bytes: u64) -> Self {
        Media {
            origin: devices.origin,
            origin_length: superblock.origin,
            data: Latched::new(devices.data),
            meta: devices.meta.map(Latched::new),
            cache: Cache::new(cache_bytes),
            origin_flush: None,
            chunk: superblock.chunk,
            uuid_part: superblock.uuid_part(),
            generation: superblock.generation,
            work: 0,
        }
    }

    /// Whether a block is in the cache.
    pub fn is_cached(&mut self, pointer: Pointer) -> bool {
        self.cache.get(pointer).is_some()
    }

    /// See [`sectors_differ`].
    pub fn check_sectors(&self) -> Result<(), StoreError> {
        let problem = sectors_differ(&*self.origin, &self.data);
        problem.map_or(Ok(()), |problem| {
            Err(StoreError::WrongDevice {
                device: self.data_name(),
                problem,
            })
        })
    }

    /// The most metadata blocks that are kept in memory.
    pub fn cache_blocks(&self) -> usize {
        self.cache.capacity()
    }

    fn meta(&mut self) -> &mut Latched {
        self.meta.as_mut().unwrap_or(&mut self.data)
    }

    /// Makes durable what the origin holds.
    ///
    /// Once that failed it fails until the store is opened again: a kernel may have dropped what was to be written
    /// and report success the next time.
    ///
    /// # Errors
    /// The device failed, now or before.
    pub fn flush_origin(&mut self) -> io::Result<()> {
        let is_final = kept!(
            "origin-flush-fails-for-good",
            "what a failed flush lost of the origin would be missing from a snapshot that the next one lets be created"
        );
        if let Some((kind, text)) = self.origin_flush.as_ref().filter(|_| is_final) {
            return Err(io::Error::new(*kind, text.clone()));
        }
        self.flush_origin_again()
    }

    /// The same for who writes again all that a failed flush may have lost of his: it is tried though one has failed. For
    /// everybody else it has.
    ///
    /// # Errors
    /// The device failed now.
    pub fn flush_origin_again(&mut self) -> io::Result<()> {
        let flushed = self.origin.flush();
        if let Err(error) = &flushed {
            self.origin_flush = Some((error.kind(), error.to_string()));
        }
        flushed
    }

    /// Name of the origin, for messages.
    pub fn origin_name(&self) -> String {
        self.origin.name().to_owned()
    }

    /// Name of the device that holds the metadata, for messages.
    pub fn meta_name(&self) -> String {
        self.meta.as_ref().unwrap_or(&self.data).name().to_owned()
    }

    pub fn data_name(&self) -> String {
        self.data.name().to_owned()
    }

    /// Lengths of origin, data and metadata device (none if it is the data device), measured now.
    pub fn measure(&mut self) -> Result<(u64, u64, Option<u64>), StoreError> {
        let meta = self.meta.as_mut().map(measure).transpose()?;
        Ok((measure(&mut *self.origin)?, measure(&mut self.data)?, meta))
    }

    pub fn separate_meta(&self) -> bool {
        self.meta.is_some()
    }

    /// Reads and checks one block, or takes it from the cache.
    pub fn block(&mut self, pointer: Pointer, kind: Kind, level: u8) -> Result<Block, StoreError> {
        if let Some(block) = self.cache.get(pointer) {
            return Ok(block);
        }
        self.load(&[pointer], kind, level)?
            .pop()
            .ok_or_else(|| self.inconsistent("a block was not read"))
    }

    /// Brings blocks into the cache by one batch of reads; errors are left to who uses the blocks.
    pub fn prefetch(&mut self, pointers: impl Iterator<Item = Pointer>, kind: Kind, level: u8) {
        let missing: Vec<_> = pointers
            .filter(|&pointer| self.cache.get(pointer).is_none())
            .collect();
        if missing.len() > 1 {
            // A bad block among them spoils the batch; it is met again and reported when it is used.
            let _ = self.load(&missing, kind, level);
        }
    }

    /// Reads and checks blocks by one batch, without remembering them: what looks at a whole index once
    /// must not push out of the cache what is used again and again.
    pub fn blocks_once(
        &mut self,
        pointers: &[Pointer],
        kind: Kind,
        level: u8,
    ) -> Result<Vec<Block>, StoreError> {
        let cached: Vec<_> = pointers.iter().map(|&p| self.cache.get(p)).collect();
        let missing = pointers.iter().zip(&cached).filter(|(_, c)| c.is_none());
        let missing: Vec<_> = missing.map(|(&pointer, _)| pointer).collect();
        let mut read = self.read_blocks(&missing, kind, level)?.into_iter();
        let blocks = cached
            .into_iter()
            .map(|block| block.or_else(|| read.next()));
        Ok(blocks.flatten().collect())
    }

    fn load(
        &mut self,
        pointers: &[Pointer],
        kind: Kind,
        level: u8,
    ) -> Result<Vec<Block>, StoreError> {
        let blocks = self.read_blocks(pointers, kind, level)?;
        for (&pointer, block) in pointers.iter().zip(&blocks) {
            self.cache.put(pointer, block.clone());
        }
        Ok(blocks)
    }

    fn read_blocks(
        &mut self,
        pointers: &[Pointer],
        kind: Kind,
        level: u8,
    ) -> Result<Vec<Block>, StoreError> {
        // A pointer may hold anything, even behind a right checksum: where it leads is no offset yet.
        let end = self.meta().len_bytes() / META_BLOCK_BYTES;
        if let Some(&pointer) = pointers.iter().find(|pointer| pointer.block.0 >= end) {
            let source = FormatError::Malformed {
                what: "pointer to a metadata block",
                problem: "it leads behind the end of the device",
            };
            return Err(self.damaged(pointer, source));
        }
        let mut bytes = AlignedBuf::zeroed(pointers.len() * BLOCK_LEN);
        // A checkpoint writes neighbouring leaves to neighbouring blocks: those are one read.
        let runs = pointers.chunk_by(|a, b| a.block.0 + 1 == b.block.0);
        let mut rest = &mut bytes[..];
        let mut reads = Vec::new();
        for run in runs {
            let (into, behind) = rest.split_at_mut(run.len() * BLOCK_LEN);
            rest = behind;
            let offset = run[0].block.to_offset();
            reads.push(Read { offset, into });
        }
        self.work += reads.len() as u64;
        read_batch(self.meta(), &mut reads)?;
        let mut blocks = Vec::with_capacity(pointers.len());
        for (&pointer, bytes) in pointers.iter().zip(bytes.chunks_exact(BLOCK_LEN)) {
            let expected = Expected {
                pointer,
                newest_generation: self.generation,
                uuid_part: self.uuid_part,
                kind,
                level,
            };
            let block =
                Block::check(bytes, &expected).map_err(|source| self.damaged(pointer, source))?;
            blocks.push(block);
        }
        Ok(blocks)
    }

    /// Remembers a block that was just written.
    pub fn remember(&mut self, pointer: Pointer, block: Block) {
        self.cache.put(pointer, block);
    }

    pub fn damaged(&self, pointer: Pointer, source: FormatError) -> StoreError {
        StoreError::Damaged {
            device: self.meta_name(),
            block: pointer.block.0,
            source,
        }
    }

    /// Compares the data of an exception with its checksum.
    pub fn prove(
        &self,
        chunk: Chunk,
        place: StoreChunk,
        wanted: u32,
        data: &[u8],
    ) -> Result<(), StoreError> {
        let found = crc32c::crc32c(data);
        if found == wanted {
            return Ok(());
        }
        Err(StoreError::BadData {
            device: self.data_name(),
            chunk,
            place,
            found,
            wanted,
        })
    }

    pub fn inconsistent(&self, problem: impl Into<String>) -> StoreError {
        StoreError::Inconsistent {
            device: self.meta_name(),
            problem: problem.into(),
        }
    }

    /// Reads raw bytes of the metadata device.
    pub fn read_meta(&mut self, at: MetaBlock, into: &mut [u8]) -> Result<(), StoreError> {
        read_batch(
            self.meta(),
            &mut [Read {
                offset: at.to_offset(),
                into,
            }],
        )
    }

    /// Reads whole blocks of the metadata device; what cannot be read of them is zero. Gives the sectors
    /// that could not be read, by their byte offset, and why.
    pub fn read_meta_in_part(&mut self, at: MetaBlock, into: &mut [u8]) -> Vec<(u64, StoreError)> {
        if self.read_meta(at, into).is_ok() {
            return Vec::new();
        }
        let sector = self.meta().alignment();
        let mut bad = Vec::new();
        for (offset, block) in (at.to_offset()..)
            .step_by(BLOCK_LEN)
            .zip(into.chunks_mut(BLOCK_LEN))
        {
            let whole = Read {
                offset,
                into: block,
            };
            if read_batch(self.meta(), &mut [whole]).is_ok() {
                continue;
            }
            for (offset, into) in (offset..).step_by(sector).zip(block.chunks_mut(sector)) {
                let read = read_batch(
                    self.meta(),
                    &mut [Read {
                        offset,
                        into: &mut *into,
                    }],
                );
                if let Err(error) = read {
                    into.fill(0);
                    bad.push((offset, error));
                }
            }
        }
        bad
    }

    /// Whether a sector of the metadata device can be read.
    pub fn can_read_meta(&mut self, offset: u64) -> bool {
        let mut sector = AlignedBuf::zeroed(self.meta().alignment());
        let into = &mut sector[..];
        read_batch(self.meta(), &mut [Read { offset, into }]).is_ok()
    }

    pub fn write_meta(&mut self, batch: &[Write<'_>]) -> Result<(), StoreError> {
        let follows = |a: &Write<'_>, b: &Write<'_>| a.offset + a.from.len() as u64 == b.offset;
        self.work += batch.chunk_by(follows).count() as u64;
        write_batch(self.meta(), batch)
    }

    pub fn write_data(&mut self, batch: &[Write<'_>]) -> Result<(), StoreError> {
        write_batch(&mut self.data, batch)
    }

    /// Writes data and journal in one go: one batch where they share a device.
    pub fn write_both(&mut self, data: Vec<Write<'_>>, meta: Write<'_>) -> Result<(), StoreError> {
        match &mut self.meta {
            Some(device) => {
                write_batch(&mut self.data, &data)?;
                write_batch(device, &[meta])
            }
            None => {
                let mut batch = data;
                batch.push(meta);
                write_batch(&mut self.data, &batch)
            }
        }
    }

    pub fn flush_meta(&mut self) -> Result<(), StoreError> {
        self.work += 1;
        flush(self.meta())
    }

    pub fn flush_data(&mut self) -> Result<(), StoreError> {
        flush(&mut self.data)
    }

    /// Makes data and journal durable: one flush where they share a device.
    pub fn flush_both(&mut self) -> Result<(), StoreError> {
        flush(&mut self.data)?;
        self.meta.as_mut().map_or(Ok(()), flush)
    }

    /// Reads chunks into consecutive parts of `into`, in one batch for each device, and neighbours that follow one
    /// another as one read. Of the origin's last chunk what lies behind the end reads as zeros: it is saved like any
    /// other, with one checksum. Of a snapshot's own chunk no more is read than the snapshot has: behind that a torn
    /// write may have left what cannot be read.
    pub fn read_chunks(&mut self, sources: &[Source], into: &mut [u8]) -> Result<(), StoreError> {
        let (shift, alignment) = (self.chunk, self.data.alignment());
        let chunk_bytes = shift.bytes() as usize;
        let part = |source: &Source| match *source {
            Source::Origin(chunk) => Part {
                of_origin: true,
                offset: chunk.to_offset(shift),
                len: self.origin_length.in_chunk(chunk, shift).to_bytes() as usize,
            },
            Source::Store(chunk) => Part {
                of_origin: false,
                offset: chunk.to_offset(shift),
                len: chunk_bytes,
            },
            Source::Own(chunk, length) => Part {
                of_origin: false,
                offset: chunk.to_offset(shift),
                len: (length.to_bytes() as usize)
                    .next_multiple_of(alignment)
                    .min(chunk_bytes),
            },
        };
        let parts: Vec<Part> = sources.iter().map(part).collect();
        let (mut origin, mut store) = reads(&parts, into, chunk_bytes);
        read_batch(&mut *self.origin, &mut origin)?;
        read_batch(&mut self.data, &mut store)
    }
}

/// What is there of a chunk that is to be read.
#[derive(Clone, Copy)]
struct Part {
    of_origin: bool,
    offset: u64,
    len: usize,
}

impl Part {
    /// Whether one read can do for both: the other is the next chunk of the same device, and all of this one is there.
    fn is_followed_by(&self, other: &Part, chunk_bytes: usize) -> bool {
        self.of_origin == other.of_origin
            && self.len == chunk_bytes
            && other.len > 0
            && self.offset + self.len as u64 == other.offset
    }
}

/// The reads of the origin and of the store that bring so many chunks into consecutive parts of `into`; what is not
/// there of a chunk is zeros.
fn reads<'a>(
    parts: &[Part],
    into: &'a mut [u8],
    chunk_bytes: usize,
) -> (Vec<Read<'a>>, Vec<Read<'a>>) {
    let (mut origin, mut store) = (Vec::new(), Vec::new());
    let mut rest = into;
    for run in parts.chunk_by(|a, b| a.is_followed_by(b, chunk_bytes)) {
        let (into, behind) = rest.split_at_mut(run.len() * chunk_bytes);
        rest = behind;
        let (first, last) = (run[0], run[run.len() - 1]);
        let (into, lacking) = into.split_at_mut((run.len() - 1) * chunk_bytes + last.len);
        lacking.fill(0);
        let offset = first.offset;
        match first.of_origin {
            _ if into.is_empty() => {}
            true => origin.push(Read { offset, into }),
            false => store.push(Read { offset, into }),
        }
    }
    (origin, store)
}

/// Writes chunks from consecutive parts of `from` to these places, and to places that follow one another by one write.
pub(crate) fn chunk_writes<'a>(
    places: &[StoreChunk],
    from: &'a [u8],
    shift: ChunkShift,
) -> Vec<Write<'a>> {
    let mut rest = from;
    places
        .chunk_by(|a, b| a.0 + 1 == b.0)
        .map(|run| {
            let (from, behind) = rest.split_at(run.len() * shift.bytes() as usize);
            rest = behind;
            let offset = run[0].to_offset(shift);
            Write { offset, from }
        })
        .collect()
}

/// Why a store on `data` cannot serve snapshots of this origin. A snapshot's device has the origin's
/// sectors, and its reads and writes of them go to the store as they are.
pub(crate) fn sectors_differ(origin: &dyn BlockDevice, data: &dyn BlockDevice) -> Option<String> {
    let (own, needed) = (data.sector_bytes()?, origin.sector_bytes()?);
    let refuses = kept!(
        "no-larger-sectors-than-the-origin",
        "a snapshot's device would pass on requests that the store's disk cannot do"
    );
    (refuses && own > needed).then(|| {
        format!(
            "its sectors have {own} bytes and those of the origin, {}, have {needed}: put the snapshot \
             store on a device with sectors of {needed} bytes",
            origin.name()
        )
    })
}

pub(crate) fn read_batch(
    device: &mut dyn BlockDevice,
    batch: &mut [Read<'_>],
) -> Result<(), StoreError> {
    let Some(first) = batch.first() else {
        return Ok(());
    };
    let (offset, len) = (
        first.offset,
        batch.iter().map(|read| read.into.len() as u64).sum(),
    );
    device.read(batch).map_err(|source| StoreError::Read {
        device: device.name().to_owned(),
        offset,
        len,
        source,
    })
}

pub(crate) fn write_batch(
    device: &mut dyn BlockDevice,
    batch: &[Write<'_>],
) -> Result<(), StoreError> {
    let Some(first) = batch.first() else {
        return Ok(());
    };
    let (offset, len) = (
        first.offset,
        batch.iter().map(|write| write.from.len() as u64).sum(),
    );
    device
        .write(batch)
        .map_err(|source: io::Error| StoreError::Write {
            device: device.name().to_owned(),
            offset,
            len,
            source,
        })
}

fn measure<D: BlockDevice + ?Sized>(device: &mut D) -> Result<u64, StoreError> {
    device.measure().map_err(|source| StoreError::Measure {
        device: device.name().to_owned(),
        source,
    })
}

pub(crate) fn flush<D: BlockDevice + ?Sized>(device: &mut D) -> Result<(), StoreError> {
    device.flush().map_err(|source| StoreError::Flush {
        device: device.name().to_owned(),
        source,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: usize = 4096;

    fn part(of_origin: bool, chunk: u64, len: usize) -> Part {
        Part {
            of_origin,
            offset: chunk * CHUNK as u64,
            len,
        }
    }

    /// Where each read is from, how long it is, and where its bytes go.
    fn places(reads: &[Read<'_>], start: usize) -> Vec<(u64, usize, usize)> {
        let place = |read: &Read<'_>| {
            let at = read.into.as_ptr() as usize - start;
            (read.offset, read.into.len(), at)
        };
        reads.iter().map(place).collect()
    }

    #[test]
    fn neighbours_are_one_read_and_all_else_is_its_own() {
        let parts = [
            part(true, 5, CHUNK),
            part(true, 6, CHUNK),
            part(true, 7, 1024),   // the origin ends here
            part(true, 8, CHUNK),  // as if it went on: not behind a part that lacks something
            part(false, 9, CHUNK), // the next, but of another device
            part(false, 10, CHUNK),
            part(false, 12, CHUNK),
            part(false, 11, CHUNK),
            part(true, 12, CHUNK),
            part(true, 13, 0), // nothing of it is there
        ];
        let mut buffer = vec![7; parts.len() * CHUNK];
        let start = buffer.as_ptr() as usize;
        let (origin, store) = reads(&parts, &mut buffer, CHUNK);
        let found = (places(&origin, start), places(&store, start));
        let at = |chunk: u64| chunk * CHUNK as u64;
        let wanted_of_origin = vec![
            (at(5), 2 * CHUNK + 1024, 0),
            (at(8), CHUNK, 3 * CHUNK),
            (at(12), CHUNK, 8 * CHUNK),
        ];
        let wanted_of_store = vec![
            (at(9), 2 * CHUNK, 4 * CHUNK),
            (at(12), CHUNK, 6 * CHUNK),
            (at(11), CHUNK, 7 * CHUNK),
        ];
        assert_eq!(found, (wanted_of_origin, wanted_of_store));
        // What is not there is zeros, and nothing else was touched.
        let lacking = |byte: usize| {
            (2 * CHUNK + 1024..3 * CHUNK).contains(&byte) || (9 * CHUNK..).contains(&byte)
        };
        let is_right = |(at, &byte): (usize, &u8)| byte == if lacking(at) { 0 } else { 7 };
        assert!(buffer.iter().enumerate().all(is_right));
    }

    #[test]
    fn places_that_follow_one_another_are_one_write() {
        let places = [4, 5, 6, 8, 7, 9, 10].map(StoreChunk);
        let buffer: Vec<u8> = (0..7).flat_map(|index| [index; CHUNK]).collect();
        let shift = ChunkShift::from_bytes(CHUNK as u64).unwrap();
        let writes = chunk_writes(&places, &buffer, shift);
        let found: Vec<_> = writes
            .iter()
            .map(|write| (write.offset / CHUNK as u64, write.from[0], write.from.len()))
            .collect();
        assert_eq!(
            found,
            [
                (4, 0, 3 * CHUNK),
                (8, 3, CHUNK),
                (7, 4, CHUNK),
                (9, 5, 2 * CHUNK)
            ]
        );
    }
}
