// SPDX-License-Identifier: GPL-2.0-only
//! Extents: neighbouring chunks as a delta carries them, in whole or as the difference to what was
//! there.
//!
//! A difference is a zstd frame whose dictionary is the old data. Both kinds carry a SHA-256 of the
//! old data and one of the new: an extent is refused on another base, and a wrong result is never
//! written.

use sha2::{Digest, Sha256};
use thiserror::Error;
use zstd::zstd_safe::{self, CCtx, CParameter, DCtx, DParameter};

use super::record::Header;
use crate::units::ChunkRun;

/// The longest extent, in bytes.
pub const MAX_EXTENT_BYTES: usize = 1 << 20;
/// The highest level of compression.
pub const MAX_LEVEL: u8 = 9;
/// Old and new data together are within the window: log2 of 2 MiB.
const WINDOW_LOG: u32 = 21;
/// The level of a difference if none is asked for: without zstd there is none.
const DIFFERENCE_LEVEL: u8 = 1;

/// A SHA-256.
pub type Hash = [u8; 32];

/// How an extent's data is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coding {
    /// The new data as zstd, with the old as dictionary.
    Difference = 1,
    /// The new data.
    Raw = 2,
}

/// Which codings may be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Differences, where they are shorter than the data.
    Difference,
    /// Never differences.
    Raw,
    /// Whatever is shorter.
    Best,
}

/// One extent of a delta.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent<'a> {
    /// Its chunks: at most [`MAX_EXTENT_BYTES`].
    pub run: ChunkRun,
    /// How its data is coded.
    pub coding: Coding,
    /// 0: the data as it is; else of zstd, up to [`MAX_LEVEL`].
    pub level: u8,
    /// Of the old data, as far as the first snapshot has any.
    pub base: Hash,
    /// Of the new data.
    pub result: Hash,
    /// The coded data, shorter than the new data unless it is that.
    pub data: &'a [u8],
}

/// Why an extent is not what it should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ExtentError {
    /// It was made from other old data.
    #[error("the base has other data than the delta was made from")]
    Base,
    /// Its data cannot be decoded.
    #[error("its compressed data is damaged")]
    Coding,
    /// Decoding gives other data than were to come.
    #[error("decoding it gives other data than it was made of")]
    Result,
}

/// The hash of some data.
#[must_use]
pub fn hash(data: &[u8]) -> Hash {
    Sha256::digest(data).into()
}

/// Codes extents, each into the same memory.
#[derive(Debug)]
pub struct Encoder {
    mode: Mode,
    level: u8,
    difference: Vec<u8>,
    packed: Vec<u8>,
}

impl Encoder {
    /// One that uses zstd at `level`, 0 (only for differences) to [`MAX_LEVEL`].
    #[must_use]
    pub fn new(mode: Mode, level: u8) -> Self {
        Encoder {
            mode,
            level: level.min(MAX_LEVEL),
            difference: Vec::new(),
            packed: Vec::new(),
        }
    }

    /// Codes `new`, the data of `run`, where `old` was.
    pub fn encode<'a>(&'a mut self, run: ChunkRun, old: &[u8], new: &'a [u8]) -> Extent<'a> {
        let (mut coding, mut level, mut data) = (Coding::Raw, 0, new);
        if self.mode != Mode::Difference && self.level > 0 {
            compress(new, &[], self.level, &mut self.packed);
            if self.packed.len() < data.len() && !self.packed.is_empty() {
                (level, data) = (self.level, &self.packed);
            }
        }
        if self.mode != Mode::Raw && !old.is_empty() {
            let with = self.level.max(DIFFERENCE_LEVEL);
            compress(new, old, with, &mut self.difference);
            if self.difference.len() < data.len() && !self.difference.is_empty() {
                (coding, level, data) = (Coding::Difference, with, &self.difference);
            }
        }
        Extent {
            run,
            coding,
            level,
            base: hash(old),
            result: hash(new),
            data,
        }
    }
}

/// Compresses `data`; what comes out is empty if that is not worth it.
fn compress(data: &[u8], old: &[u8], level: u8, into: &mut Vec<u8>) {
    into.clear();
    into.reserve(zstd_safe::compress_bound(data.len()));
    let mut context = CCtx::create();
    let mut compressed = || {
        context.set_parameter(CParameter::CompressionLevel(level.into()))?;
        if !old.is_empty() {
            context.set_parameter(CParameter::WindowLog(WINDOW_LOG))?;
            // Old and new data are alike over long stretches, far apart.
            context.set_parameter(CParameter::EnableLongDistanceMatching(true))?;
            context.ref_prefix(old)?;
        }
        context.compress2(into, data)
    };
    if compressed().is_err() {
        // Only memory can be missing; the data itself still serves.
        into.clear();
    }
}

impl Extent<'_> {
    /// The length of its new data in bytes, in a delta of this header.
    #[must_use]
    pub fn bytes(&self, header: &Header) -> usize {
        self.run.bytes_within(header.to.length, header.chunk) as usize
    }

    /// The new data, `bytes` long, into `into`; `old` is the old data, as far as there is any.
    ///
    /// # Errors
    /// The old data is not that which the extent was made from, or the data is damaged.
    pub fn decode(&self, old: &[u8], bytes: usize, into: &mut Vec<u8>) -> Result<(), ExtentError> {
        if hash(old) != self.base {
            return Err(ExtentError::Base);
        }
        into.clear();
        if self.level == 0 {
            into.extend_from_slice(self.data);
        } else {
            let old = match self.coding {
                Coding::Difference => old,
                Coding::Raw => &[],
            };
            decompress(self.data, old, bytes, into).map_err(|_| ExtentError::Coding)?;
        }
        if into.len() != bytes || hash(into) != self.result {
            return Err(ExtentError::Result);
        }
        Ok(())
    }
}

fn decompress(
    data: &[u8],
    old: &[u8],
    bytes: usize,
    into: &mut Vec<u8>,
) -> Result<(), zstd_safe::ErrorCode> {
    into.reserve_exact(bytes);
    // The output is bounded by hand: the vector may have room for more.
    let mut output = vec![0; bytes];
    let mut context = DCtx::create();
    context.set_parameter(DParameter::WindowLogMax(WINDOW_LOG))?;
    if !old.is_empty() {
        context.ref_prefix(old)?;
    }
    let length = context.decompress(&mut output[..], data)?;
    into.extend_from_slice(&output[..length]);
    Ok(())
}

#[cfg(test)]
mod tests;
