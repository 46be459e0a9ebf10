// SPDX-License-Identifier: GPL-2.0-only
//! Applying a delta: a volume that has the first snapshot's content gets the second's.
//!
//! First all of the file is read: every checksum is compared, every extent's base, and every result.
//! Only if all of it fits is anything written. An extent that the volume has already counts as done, so
//! applying again after an interruption goes on.

use std::io::{Read, Seek, SeekFrom};
use std::path::Path;

use thiserror::Error;

use super::extent::{Extent, ExtentError, hash};
use super::file::DeltaReader;
use super::record::FileError;
use super::volume::{Volume, VolumeError};

/// Why a delta was not applied.
#[derive(Debug, Error)]
pub enum ApplyError {
    /// It is not in order.
    #[error("the delta cannot be used")]
    File(#[from] FileError),
    /// A device cannot be used.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The base is not what the delta was made from, or an extent is damaged.
    #[error("chunk {chunk} does not fit {base}, or the {more} behind it; nothing was written")]
    Refused {
        /// The first chunk of the extent.
        chunk: u64,
        /// Chunks of the extent but the first.
        more: u64,
        /// Where the base was looked for.
        base: String,
        /// Why.
        source: ExtentError,
    },
    /// The base or the delta was changed while it was being applied.
    #[error("the delta or {base} was changed while it was applied; {target} has a part of it")]
    Changed {
        /// Where the base was looked for.
        base: String,
        /// What was written to.
        target: String,
    },
}

/// What an extent needs.
enum Need {
    /// The volume has it already.
    Nothing,
    /// The new data was decoded.
    Write,
}

struct Apply<'a> {
    base: Option<Volume>,
    target: Volume,
    old: Vec<u8>,
    new: Vec<u8>,
    progress: &'a mut dyn FnMut(u64, u64),
}

/// Applies a delta to `stem`; the data it starts from is read from `stem(FROM)`. `progress` is told the
/// bytes of the file done, of how many: both passes count.
///
/// # Errors
/// Unless it is [`ApplyError::Changed`] or a failed write, nothing was written.
pub fn apply(
    mut delta: impl Read + Seek,
    stem: &Path,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), ApplyError> {
    let mut reader = DeltaReader::new(&mut delta)?;
    let header = *reader.header();
    let base = header
        .from
        .map(|side| Volume::snapshot(stem, side, header.chunk));
    let mut apply = Apply {
        base: base.transpose()?,
        target: Volume::target(stem, header.to.length, header.chunk)?,
        old: Vec::new(),
        new: Vec::new(),
        progress,
    };
    let mut total = 0;
    while let Some(extent) = reader.next_extent()? {
        let bytes = extent.bytes(&header);
        total += bytes as u64;
        if let Err(source) = apply.look(&extent, bytes)? {
            return Err(ApplyError::Refused {
                chunk: extent.run.first.0,
                more: extent.run.chunks - 1,
                base: apply.base_name(),
                source,
            });
        }
    }
    drop(reader);
    delta.seek(SeekFrom::Start(0)).map_err(FileError::from)?;
    apply.target.set_length()?;
    let mut reader = DeltaReader::new(&mut delta)?;
    if *reader.header() != header {
        return Err(apply.changed());
    }
    let mut done = 0;
    while let Some(extent) = reader.next_extent()? {
        let bytes = extent.bytes(&header);
        match apply.look(&extent, bytes)? {
            Ok(Need::Write) => apply.target.write(extent.run, &apply.new)?,
            Ok(Need::Nothing) => {}
            Err(_) => return Err(apply.changed()),
        }
        done += bytes as u64;
        (apply.progress)(done, total);
    }
    apply.target.flush()?;
    Ok(())
}

impl Apply<'_> {
    /// Compares an extent's base and decodes it. Inner error: it does not fit.
    fn look(
        &mut self,
        extent: &Extent<'_>,
        bytes: usize,
    ) -> Result<Result<Need, ExtentError>, VolumeError> {
        self.old.clear();
        if let Some(base) = &self.base {
            base.read(extent.run, &mut self.old)?;
        }
        match extent.decode(&self.old, bytes, &mut self.new) {
            Ok(()) => Ok(Ok(Need::Write)),
            Err(ExtentError::Base) => {
                // Where the volume is its own base, an earlier try may have come this far.
                self.target.read_present(extent.run, &mut self.old)?;
                let done = self.old.len() == bytes && hash(&self.old) == extent.result;
                Ok(if done {
                    Ok(Need::Nothing)
                } else {
                    Err(ExtentError::Base)
                })
            }
            Err(error) => Ok(Err(error)),
        }
    }

    fn base_name(&self) -> String {
        self.base.as_ref().map_or(self.target.name(), Volume::name)
    }

    fn changed(&self) -> ApplyError {
        ApplyError::Changed {
            base: self.base_name(),
            target: self.target.name(),
        }
    }
}
