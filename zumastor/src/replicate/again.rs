// SPDX-License-Identifier: GPL-2.0-only
//! Chunks that a target is to get again with the next increment, since a comparison found them to differ there.
//!
//! They are noted in a file beside the document before anybody is told that they will be sent, and the note goes
//! when a copy that had them from its beginning on is complete. Sent twice they do no harm: all are whole.

use std::collections::VecDeque;

use anyhow::Result;
use ddsnap::units::{Chunk, ChunkRun, ChunkShift};

use crate::replication::verify::MAX_KEPT;
use crate::replication::wire::{Put, Take, WireError};

/// What a note begins with.
const MAGIC: [u8; 8] = *b"zumaAgai";
/// The version of notes.
const VERSION: u16 = 1;

/// A note.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Again {
    /// Chunk size that the runs count in.
    pub chunk: ChunkShift,
    /// Ascending, apart from each other; at most [`MAX_KEPT`].
    pub runs: Vec<ChunkRun>,
}

impl Again {
    /// As the file's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut put = Put::default();
        put.raw(&MAGIC).u16(VERSION).u8(self.chunk.get());
        put.u32(self.runs.len() as u32);
        for run in &self.runs {
            put.u64(run.first.0).u64(run.chunks);
        }
        let crc = crc32c::crc32c(&put.0);
        put.u32(crc);
        put.0
    }

    /// Reads it back.
    ///
    /// # Errors
    /// It is damaged, or of another version.
    pub fn decode(bytes: &[u8]) -> Result<Again, WireError> {
        let value = |what, found| WireError::Value { what, found };
        let what = "a note of what is to be sent again";
        let body = bytes
            .len()
            .checked_sub(4)
            .ok_or(WireError::Short { what })?;
        let mut take = Take::new(what, bytes);
        if take.array()? != MAGIC {
            return Err(value("the magic of a note", 0));
        }
        let version = take.u16()?;
        if version != VERSION {
            return Err(value("the version of a note", version.into()));
        }
        let shift = take.u8()?;
        let chunk = ChunkShift::new(shift).ok_or(value("the chunk size", shift.into()))?;
        let count = take.u32()?;
        if count as usize > MAX_KEPT {
            return Err(value("the number of runs", count.into()));
        }
        let (mut runs, mut end) = (Vec::new(), 0);
        for _ in 0..count {
            let (first, chunks) = (take.u64()?, take.u64()?);
            let next = first.checked_add(chunks);
            let next = next.filter(|_| chunks > 0 && first >= end);
            end = next.ok_or(value("a run", first))?;
            runs.push(ChunkRun {
                first: Chunk(first),
                chunks,
            });
        }
        let crc = take.u32()?;
        take.end()?;
        if crc != crc32c::crc32c(&bytes[..body]) {
            return Err(value("the checksum of a note", crc.into()));
        }
        Ok(Again { chunk, runs })
    }
}

/// Two ascending lists of runs as one, each chunk once.
#[derive(Debug)]
pub struct Union {
    again: VecDeque<ChunkRun>,
    /// Taken from the other list and not given yet.
    held: Option<ChunkRun>,
    /// All below was given.
    from: u64,
    /// Nothing is from here on.
    end: u64,
}

impl Union {
    /// Of these runs below chunk `end`, and of another list.
    #[must_use]
    pub fn new(again: Vec<ChunkRun>, end: u64) -> Union {
        Union {
            again: again.into(),
            held: None,
            from: 0,
            end,
        }
    }

    /// The next run; `other` gives those of the other list.
    ///
    /// # Errors
    /// That of `other`.
    pub fn next(
        &mut self,
        other: &mut dyn FnMut() -> Result<Option<ChunkRun>>,
    ) -> Result<Option<ChunkRun>> {
        loop {
            if self.held.is_none() {
                self.held = other()?;
            }
            let again = self.again.front().copied();
            let run = match (again, self.held) {
                (None, None) => return Ok(None),
                (Some(again), None) => again,
                (Some(again), Some(held)) if again.first.0 < held.first.0 => again,
                (_, Some(held)) => held,
            };
            if self.held == Some(run) {
                self.held = None;
            } else {
                self.again.pop_front();
            }
            let end = run.first.0.saturating_add(run.chunks);
            // The other list knows where it ends.
            let end = if Some(run) == again {
                end.min(self.end)
            } else {
                end
            };
            let first = run.first.0.max(self.from);
            if first < end {
                self.from = end;
                return Ok(Some(ChunkRun {
                    first: Chunk(first),
                    chunks: end - first,
                }));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(first: u64, chunks: u64) -> ChunkRun {
        ChunkRun {
            first: Chunk(first),
            chunks,
        }
    }

    fn union(again: &[ChunkRun], changed: &[ChunkRun]) -> Vec<ChunkRun> {
        let mut changed = changed.iter().copied();
        let mut union = Union::new(again.to_vec(), 100);
        let mut all = Vec::new();
        while let Some(run) = union.next(&mut || Ok(changed.next())).expect("a run") {
            all.push(run);
        }
        all
    }

    /// A chunk given twice, or out of order, breaks the stream.
    #[test]
    fn both_lists_are_one_ascending_list() {
        assert_eq!(union(&[], &[run(3, 2)]), [run(3, 2)]);
        assert_eq!(union(&[run(3, 2)], &[]), [run(3, 2)]);
        assert_eq!(union(&[run(3, 2)], &[run(3, 2)]), [run(3, 2)]);
        let all = union(
            &[run(0, 1), run(5, 10), run(40, 1)],
            &[run(2, 4), run(14, 3)],
        );
        assert_eq!(
            all,
            [run(0, 1), run(2, 4), run(6, 9), run(15, 2), run(40, 1)]
        );
        // The volume was cut meanwhile.
        assert_eq!(union(&[run(98, 5), run(120, 1)], &[]), [run(98, 2)]);
        // Every pair of lists over eight chunks.
        for (a, b) in (0..=255u8).flat_map(|a| (0..=255u8).map(move |b| (a, b))) {
            let runs = |bits: u8| -> Vec<ChunkRun> {
                (0..8)
                    .filter(|n| bits & 1 << n != 0)
                    .map(|n| run(n, 1))
                    .collect()
            };
            let all = union(&runs(a), &runs(b));
            assert_eq!(all, runs(a | b));
        }
    }

    #[test]
    fn a_note_is_read_as_it_was_written_and_nothing_else() {
        let again = Again {
            chunk: ChunkShift::MIN,
            runs: vec![run(1, 2), run(3, 1)],
        };
        let bytes = again.encode();
        let golden = [
            &b"zumaAgai"[..],
            &[1, 0, 9, 2, 0, 0, 0],
            &[1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0],
            &[3, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0],
            &[34, 126, 70, 201],
        ];
        assert_eq!(bytes, golden.concat());
        assert_eq!(Again::decode(&bytes), Ok(again));
        for length in 0..bytes.len() {
            assert!(Again::decode(&bytes[..length]).is_err());
        }
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 4;
            assert!(Again::decode(&bad).is_err(), "byte {at}");
        }
    }
}
