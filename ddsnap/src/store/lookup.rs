// SPDX-License-Identifier: GPL-2.0-only
//! Who reads what where: the read rule of snapshots, and which chunks of the origin need saving.

use super::Store;
use super::api::{Location, OpError};
use super::error::StoreError;
use super::media::Source;
use crate::format::node::Value;
use crate::format::snaptable::{Snapshot, State};
use crate::units::{Chunk, ChunkShift, Sectors, SnapSeq, SnapTag, StoreChunk};

/// What a snapshot's chunk is, with all that the index knows of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    /// Still on the origin.
    Origin,
    /// A saved chunk and the checksum of its data.
    Exception(StoreChunk, u32),
    /// The snapshot's own.
    Overlay(StoreChunk),
}

impl Found {
    /// Where to read this chunk of a snapshot that has `length`.
    pub fn source(self, chunk: Chunk, length: Sectors, shift: ChunkShift) -> Source {
        match self {
            Found::Origin => Source::Origin(chunk),
            Found::Exception(place, _) => Source::Store(place),
            Found::Overlay(place) => Source::Own(place, length.in_chunk(chunk, shift)),
        }
    }
}

/// What has to be durable before a chunk of the origin is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BeforeWrite {
    /// All that needs its content, or needs to know, has it.
    Nothing,
    /// A mark of this sequence: no snapshot needs what it holds.
    Mark(SnapSeq),
    /// An exception of this sequence.
    Copy(SnapSeq),
}

impl Store {
    /// Where a snapshot's chunk is to be read from.
    ///
    /// # Errors
    /// The index cannot be read.
    pub fn locate(
        &mut self,
        tag: SnapTag,
        chunk: Chunk,
    ) -> Result<Result<Location, OpError>, StoreError> {
        Ok(self.find(tag, chunk)?.map(|found| match found {
            Found::Origin => Location::Origin,
            Found::Exception(place, _) | Found::Overlay(place) => Location::Store(place),
        }))
    }

    /// As [`locate`](Self::locate), with the checksum.
    pub(crate) fn find(
        &mut self,
        tag: SnapTag,
        chunk: Chunk,
    ) -> Result<Result<Found, OpError>, StoreError> {
        let snapshot = match self.live_snapshot(tag, chunk) {
            Ok(snapshot) => snapshot,
            Err(refused) => return Ok(Err(refused)),
        };
        if let Some(place) = self.overlay(snapshot.seq, chunk)? {
            return Ok(Ok(Found::Overlay(place)));
        }
        Ok(match self.exception(snapshot.seq, chunk)? {
            Some((place, crc)) => Ok(Found::Exception(place, crc)),
            None if !self.origin_reaches(&snapshot, chunk) => Err(OpError::OutOfRange(chunk)),
            None => Ok(Found::Origin),
        })
    }

    /// Whether the origin has as much of a chunk as a snapshot has. Not if it was cut without being
    /// resized: then what was not saved is lost.
    pub(super) fn origin_reaches(&self, snapshot: &Snapshot, chunk: Chunk) -> bool {
        let shift = self.superblock.chunk;
        let wanted = snapshot.length.in_chunk(chunk, shift);
        self.media.origin_length.in_chunk(chunk, shift) >= wanted
    }

    /// What has to be noted before the origin's chunk is written.
    pub(super) fn before_write(&mut self, chunk: Chunk) -> Result<BeforeWrite, StoreError> {
        let snapshots = &self.state.snapshots;
        let (live, newest) = (
            snapshots.newest_with(chunk),
            snapshots.newest_keeper_with(chunk),
        );
        let Some(newest) = newest else {
            return Ok(BeforeWrite::Nothing);
        };
        let needed = match live {
            None => BeforeWrite::Mark(newest),
            Some(live) => match self.first_entry(live, chunk)? {
                None => return Ok(BeforeWrite::Copy(newest)),
                Some(seq) if seq >= newest => return Ok(BeforeWrite::Nothing),
                // All live snapshots are served: the newest of them is not newer than that entry.
                Some(_) => BeforeWrite::Mark(newest),
            },
        };
        Ok(match self.first_entry(newest, chunk)? {
            None => needed,
            Some(_) => BeforeWrite::Nothing,
        })
    }

    /// The sequence of the first exception or mark of a chunk that is not older than `seq`.
    pub(super) fn first_entry(
        &mut self,
        seq: SnapSeq,
        chunk: Chunk,
    ) -> Result<Option<SnapSeq>, StoreError> {
        let (from, last) = ((chunk.0, seq.0), (chunk.0, u64::MAX));
        let exceptions = &self.state.exceptions;
        let first = exceptions.first_in(&mut self.media, from, last)?;
        Ok(first.map(|((_, seq), _)| SnapSeq(seq)))
    }

    pub(super) fn live_snapshot(&self, tag: SnapTag, chunk: Chunk) -> Result<Snapshot, OpError> {
        let snapshot = *self
            .state
            .snapshots
            .by_tag(tag)
            .ok_or(OpError::NoSuchSnapshot(tag))?;
        match snapshot.state {
            State::Live => {}
            State::Bookmark => return Err(OpError::Bookmark(tag)),
            State::Squashed | State::Deleted => return Err(OpError::Squashed(tag)),
        }
        if !self.state.snapshots.has(&snapshot, chunk) {
            return Err(OpError::OutOfRange(chunk));
        }
        Ok(snapshot)
    }

    pub(super) fn overlay(
        &mut self,
        seq: SnapSeq,
        chunk: Chunk,
    ) -> Result<Option<StoreChunk>, StoreError> {
        let value = self.state.overlays.get(&mut self.media, (seq.0, chunk.0))?;
        value
            .map(|value| self.checked_place(value.place))
            .transpose()
    }

    /// Where the exception lies that serves a snapshot.
    pub(super) fn present(
        &mut self,
        seq: SnapSeq,
        chunk: Chunk,
    ) -> Result<Option<StoreChunk>, StoreError> {
        Ok(self.exception(seq, chunk)?.map(|(place, _)| place))
    }

    /// The exception that serves a live snapshot: the one of the smallest sequence that is not older. That is no
    /// mark.
    pub(super) fn exception(
        &mut self,
        seq: SnapSeq,
        chunk: Chunk,
    ) -> Result<Option<(StoreChunk, u32)>, StoreError> {
        let (from, last) = ((chunk.0, seq.0), (chunk.0, u64::MAX));
        let exceptions = &self.state.exceptions;
        let first = exceptions.first_in(&mut self.media, from, last)?;
        first
            .map(|(_, Value { place, crc })| Ok((self.checked_place(place)?, crc)))
            .transpose()
    }

    /// A place from the index, which must not lead outside the data region whatever the disk says.
    fn checked_place(&self, place: u64) -> Result<StoreChunk, StoreError> {
        let place = StoreChunk(place);
        if self.state.space.contains(place) {
            Ok(place)
        } else {
            Err(self
                .media
                .inconsistent(format!("store chunk {place} lies outside the data region")))
        }
    }
}
