// SPDX-License-Identifier: GPL-2.0-only
//! Making a delta from a changelist and the two snapshots' devices.

use std::io::{self, BufWriter, Read, Write};
use std::path::Path;

use thiserror::Error;

use super::changelist::ChangelistReader;
use super::extent::{Encoder, MAX_EXTENT_BYTES};
use super::file::DeltaWriter;
use super::record::FileError;
use super::volume::{Volume, VolumeError};
use crate::units::{Chunk, ChunkRun};

/// Why no delta was made.
#[derive(Debug, Error)]
pub enum CreateError {
    /// The changelist is not in order.
    #[error("the changelist cannot be used")]
    Changelist(#[source] FileError),
    /// A snapshot's device cannot be read.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The delta cannot be written.
    #[error("cannot write the delta")]
    Write(#[source] io::Error),
}

/// Writes the delta of a changelist to `out`, reading the devices `stem(FROM)` and `stem(TO)`.
/// `progress` is told the bytes done, and the byte of the volume up to which all is.
///
/// # Errors
/// What was written to `out` is of no use then.
pub fn create(
    changelist: impl Read,
    stem: &Path,
    encoder: &mut Encoder,
    out: impl Write,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<(), CreateError> {
    let mut list = ChangelistReader::new(changelist).map_err(CreateError::Changelist)?;
    let header = *list.header();
    let chunk = header.chunk;
    let from = header.from.map(|side| Volume::snapshot(stem, side, chunk));
    let from = from.transpose()?;
    let to = Volume::snapshot(stem, header.to, chunk)?;
    let out = BufWriter::with_capacity(MAX_EXTENT_BYTES, out);
    let mut delta = DeltaWriter::new(out, &header).map_err(CreateError::Write)?;
    let (mut old, mut new, mut done) = (Vec::new(), Vec::new(), 0);
    while let Some(run) = list.next_run().map_err(CreateError::Changelist)? {
        for part in extents(run, (MAX_EXTENT_BYTES >> chunk.get()) as u64) {
            old.clear();
            if let Some(from) = &from {
                from.read(part, &mut old)?;
            }
            to.read(part, &mut new)?;
            let extent = encoder.encode(part, &old, &new);
            delta.push(&extent).map_err(CreateError::Write)?;
            done += new.len() as u64;
            let end = part.first.0 + part.chunks;
            progress(done, end << chunk.get());
        }
    }
    let mut out = delta.finish().map_err(CreateError::Write)?;
    out.flush().map_err(CreateError::Write)
}

/// Cuts a run into extents of at most `most` chunks, at multiples of that, so that the same chunks are
/// in the same extents whatever lies before them.
fn extents(run: ChunkRun, most: u64) -> impl Iterator<Item = ChunkRun> {
    let end = run.first.0 + run.chunks;
    let mut first = run.first.0;
    std::iter::from_fn(move || {
        if first >= end {
            return None;
        }
        let next = end.min((first / most + 1) * most);
        let part = ChunkRun {
            first: Chunk(first),
            chunks: next - first,
        };
        first = next;
        Some(part)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_cut_at_multiples() {
        let run = ChunkRun {
            first: Chunk(5),
            chunks: 14,
        };
        let parts: Vec<_> = extents(run, 8)
            .map(|part| (part.first.0, part.chunks))
            .collect();
        assert_eq!(parts, [(5, 3), (8, 8), (16, 3)]);
        assert_eq!(extents(run, 1).count(), 14);
        assert_eq!(extents(run, 1000).count(), 1);
    }
}
