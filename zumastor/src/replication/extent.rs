// SPDX-License-Identifier: GPL-2.0-only
//! Changed chunks as they are on the wire.
//!
//! An extent is some runs of chunks, ascending, and their data one after the other: scattered chunks are
//! compressed together and share one header. Four codings: zeros, which need no data; the data as it is;
//! zstd; zstd with the old data of the same chunks as its dictionary. Hashes of old and new data go with
//! it: a difference is not applied to another base, and a wrong result is not written. They are hashes of
//! the chunks' hashes, which the sums need anyway.

use ddsnap::units::{Chunk, ChunkRun, ChunkShift, Sectors};
use thiserror::Error;
use zstd::zstd_safe::{self, CCtx, CParameter, DCtx, DParameter};

use super::sums::chunk_hash;
use super::wire::{Put, Take, WireError};

/// The most data of an extent in bytes, but for zeros.
pub const EXTENT_BYTES: usize = 1 << 20;
/// The most zeros of an extent in bytes.
pub const ZERO_BYTES: u64 = 64 << 20;
/// The most runs of an extent.
pub const MAX_RUNS: usize = 2048;
/// Old and new data together are within the window: log2 of 2 MiB.
const WINDOW_LOG: u32 = 21;

/// How data is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// All of it is zero.
    Zero = 1,
    /// As it is.
    Raw = 2,
    /// zstd.
    Zstd = 3,
    /// zstd with the old data as dictionary.
    Difference = 4,
}

/// Why an extent is not applied.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum ExtentError {
    /// It is not laid out as one.
    #[error("an extent is malformed")]
    Wire(#[from] WireError),
    /// Its runs are not such.
    #[error("the chunks of an extent are not in order: {0}")]
    Runs(&'static str),
    /// The old data here is not that of the sender.
    #[error("the base has other data than the sending side's at chunk {chunk}")]
    Base {
        /// The first chunk of the extent.
        chunk: u64,
    },
    /// Decoding fails, or gives other data.
    #[error("the data of the extent at chunk {chunk} is damaged")]
    Data {
        /// The first chunk of the extent.
        chunk: u64,
    },
}

/// An extent that was checked, its data still coded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extent<'a> {
    /// How the data is coded.
    pub coding: Coding,
    /// The chunks, ascending.
    pub runs: Vec<ChunkRun>,
    /// Length of the new data in bytes.
    pub bytes: u64,
    base: Option<[u8; 32]>,
    result: [u8; 32],
    data: &'a [u8],
}

/// What all extents of a copy have in common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// The sender's chunks.
    pub chunk: ChunkShift,
    /// Length of the snapshot.
    pub length: Sectors,
    /// Length of the base; 0 if there is none.
    pub base_length: Sectors,
}

/// The hash of each chunk of some runs, none for zeros: as the sums need them, so data is hashed once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Digests(pub Vec<(u64, Option<[u8; 32]>)>);

impl Digests {
    /// Of `data`, which is what a volume of this length has of `runs`.
    pub fn fill(&mut self, chunk: ChunkShift, length: Sectors, runs: &[ChunkRun], data: &[u8]) {
        self.0.clear();
        let mut at = 0;
        for run in runs {
            for number in run.first.0..run.first.0 + run.chunks {
                let one = ChunkRun {
                    first: Chunk(number),
                    chunks: 1,
                };
                let bytes = one.bytes_within(length, chunk) as usize;
                let end = (at + bytes).min(data.len());
                let hash = chunk_hash(chunk, number, &data[at.min(end)..end]);
                self.0.push((number, hash));
                at = end;
            }
        }
    }

    /// One hash over all of them.
    #[must_use]
    pub fn fold(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for (number, hash) in &self.0 {
            hasher.update(&number.to_le_bytes());
            hasher.update(&hash.unwrap_or_default());
        }
        hasher.finalize().into()
    }
}

impl Shape {
    /// Bytes of these runs within the snapshot.
    #[must_use]
    pub fn bytes(&self, runs: &[ChunkRun]) -> u64 {
        runs.iter()
            .map(|run| run.bytes_within(self.length, self.chunk))
            .sum()
    }
}

/// Codes extents.
pub struct Encoder {
    level: i32,
    context: CCtx<'static>,
    packed: Vec<u8>,
    difference: Vec<u8>,
}

impl std::fmt::Debug for Encoder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Encoder")
            .field("level", &self.level)
            .finish_non_exhaustive()
    }
}

impl Encoder {
    /// One that compresses at `level`, 1 to 19; 0: not at all.
    #[must_use]
    pub fn new(level: u8) -> Self {
        Encoder {
            level: level.min(19).into(),
            context: CCtx::create(),
            packed: Vec::new(),
            difference: Vec::new(),
        }
    }

    /// The head and the data of an extent that holds `new`, of these digests, where `old` was. Without
    /// `old` there is no difference; it may be shorter, where the base is.
    pub fn encode<'a>(
        &'a mut self,
        runs: &[ChunkRun],
        old: Option<(&[u8], &Digests)>,
        (new, digests): (&'a [u8], &Digests),
    ) -> (Vec<u8>, &'a [u8]) {
        let (mut coding, mut data) = (Coding::Raw, new);
        if self.level > 0 {
            compress(&mut self.context, self.level, new, &mut self.packed);
            if !self.packed.is_empty() && self.packed.len() < data.len() {
                (coding, data) = (Coding::Zstd, &self.packed);
            }
            if let Some((old, _)) = old.filter(|(old, _)| !old.is_empty()) {
                difference(self.level, new, old, &mut self.difference);
                if !self.difference.is_empty() && self.difference.len() < data.len() {
                    (coding, data) = (Coding::Difference, &self.difference);
                }
            }
        }
        let base = old.map(|(_, digests)| digests.fold());
        let head = head(coding, runs, new.len() as u64, base, &digests.fold());
        (head, data)
    }
}

/// Length of the head of an extent of so many runs.
#[must_use]
pub fn head_bytes(runs: usize) -> usize {
    1 + 1 + 2 + 4 + 32 + 32 + runs * (8 + 4)
}

/// The head of an extent of zeros.
#[must_use]
pub fn zeros(runs: &[ChunkRun], bytes: u64) -> Vec<u8> {
    head(Coding::Zero, runs, bytes, None, &[0; 32])
}

fn head(
    coding: Coding,
    runs: &[ChunkRun],
    bytes: u64,
    base: Option<[u8; 32]>,
    result: &[u8; 32],
) -> Vec<u8> {
    let mut put = Put::default();
    put.u8(coding as u8).u8(base.is_some().into());
    put.u16(runs.len() as u16).u32(bytes as u32);
    put.raw(&base.unwrap_or_default()).raw(result);
    for run in runs {
        put.u64(run.first.0).u32(run.chunks as u32);
    }
    put.0
}

/// Compresses `data`; what comes out is empty if memory is missing.
fn compress(context: &mut CCtx<'static>, level: i32, data: &[u8], into: &mut Vec<u8>) {
    into.clear();
    into.reserve(zstd_safe::compress_bound(data.len()));
    let mut compressed = || {
        context.set_parameter(CParameter::CompressionLevel(level))?;
        context.compress2(into, data)
    };
    if compressed().is_err() {
        into.clear();
    }
}

/// As [`compress`], with `old` as dictionary. The context refers to `old` and goes with it.
fn difference(level: i32, data: &[u8], old: &[u8], into: &mut Vec<u8>) {
    into.clear();
    into.reserve(zstd_safe::compress_bound(data.len()));
    let mut context = CCtx::create();
    let mut compressed = || {
        context.set_parameter(CParameter::CompressionLevel(level))?;
        context.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
        // Old and new data are alike over long stretches, far apart.
        context.set_parameter(CParameter::EnableLongDistanceMatching(true))?;
        context.ref_prefix(old)?;
        context.compress2(into, data)
    };
    if compressed().is_err() {
        into.clear();
    }
}

impl<'a> Extent<'a> {
    /// Reads an extent; its chunks lie in [`from`, end of the snapshot).
    ///
    /// # Errors
    /// It is malformed, or its chunks are not in order.
    pub fn decode(payload: &'a [u8], shape: &Shape, from: u64) -> Result<Extent<'a>, ExtentError> {
        let mut take = Take::new("an extent", payload);
        let coding = match take.u8()? {
            1 => Coding::Zero,
            2 => Coding::Raw,
            3 => Coding::Zstd,
            4 => Coding::Difference,
            other => {
                return Err(ExtentError::Wire(WireError::Value {
                    what: "the coding of an extent",
                    found: other.into(),
                }));
            }
        };
        let based = take.flag("the mark of a base")?;
        let count = usize::from(take.u16()?);
        let bytes = u64::from(take.u32()?);
        let base = take.array()?;
        let result = take.array()?;
        if count == 0 || count > MAX_RUNS {
            return Err(ExtentError::Runs("too many or none"));
        }
        let chunks = shape.length.to_chunks(shape.chunk);
        let mut runs = Vec::with_capacity(count);
        let mut next = from;
        for _ in 0..count {
            let (first, length) = (take.u64()?, u64::from(take.u32()?));
            if first < next || length == 0 {
                return Err(ExtentError::Runs("not ascending"));
            }
            next = first
                .checked_add(length)
                .filter(|next| *next <= chunks)
                .ok_or(ExtentError::Runs("behind the end"))?;
            runs.push(ChunkRun {
                first: Chunk(first),
                chunks: length,
            });
        }
        if coding == Coding::Zero && !take.rest().is_empty() {
            return Err(ExtentError::Runs("zeros with data"));
        }
        let most = match coding {
            Coding::Zero => ZERO_BYTES,
            _ => EXTENT_BYTES as u64,
        };
        if bytes > most || bytes != shape.bytes(&runs) {
            return Err(ExtentError::Runs("not as long as the data"));
        }
        if coding == Coding::Difference && !based {
            return Err(ExtentError::Runs("a difference without a base"));
        }
        Ok(Extent {
            coding,
            runs,
            bytes,
            base: based.then_some(base),
            result,
            data: take.rest(),
        })
    }

    /// Whether the old data matters.
    #[must_use]
    pub fn has_base(&self) -> bool {
        self.base.is_some()
    }

    fn first(&self) -> u64 {
        self.runs.first().map_or(0, |run| run.first.0)
    }

    /// The new data into `new` with its digests; `old` is what the base has of the same chunks, with its
    /// own.
    ///
    /// # Errors
    /// The base differs, or the data is damaged.
    pub fn unpack(
        &self,
        shape: &Shape,
        (old, old_digests): (&[u8], &Digests),
        (new, digests): (&mut Vec<u8>, &mut Digests),
    ) -> Result<(), ExtentError> {
        let chunk = self.first();
        if self.base.is_some_and(|base| base != old_digests.fold()) {
            return Err(ExtentError::Base { chunk });
        }
        let damaged = || ExtentError::Data { chunk };
        new.clear();
        new.resize(self.bytes as usize, 0);
        match self.coding {
            Coding::Zero => return Err(damaged()),
            Coding::Raw => {
                if self.data.len() != new.len() {
                    return Err(damaged());
                }
                new.copy_from_slice(self.data);
            }
            Coding::Zstd | Coding::Difference => {
                let with = if self.coding == Coding::Difference {
                    old
                } else {
                    &[]
                };
                let length = decompress(self.data, with, new).map_err(|_| damaged())?;
                if length != new.len() {
                    return Err(damaged());
                }
            }
        }
        digests.fill(shape.chunk, shape.length, &self.runs, new);
        if digests.fold() != self.result {
            return Err(damaged());
        }
        Ok(())
    }
}

fn decompress(data: &[u8], old: &[u8], into: &mut [u8]) -> Result<usize, zstd_safe::ErrorCode> {
    let mut context = DCtx::create();
    context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG))?;
    if !old.is_empty() {
        context.ref_prefix(old)?;
    }
    context.decompress(into, data)
}

#[cfg(test)]
mod tests;
