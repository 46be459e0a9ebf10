// SPDX-License-Identifier: GPL-2.0-only
//! Making origin, store and metadata longer or shorter while all of it is in use.
//!
//! Everything asked for happens together: it is one change of the superblock, so after a crash the
//! sizes are all old or all new. What has to be done before is done in bounded steps (those at the end are
//! in `resize_end`) and changes nothing that anybody sees: chunks that snapshots would lose with the origin's end are copied out as
//! if they were about to be overwritten, and metadata blocks beyond a new end are written anew before
//! it. Data chunks are never moved: a device may be reading them.
//!
//! Snapshots keep their length. One that is longer than the origin has become finds all of its
//! end in the store.

use std::ops::Range;

use super::Store;
use super::api::{Done, Op, OpError, Part, ResizeError, ResizeRequest, Sizes};
use super::error::StoreError;
use super::init::{MAX_BASE_BLOCKS, META_BYTES_PER_CHUNK, MIN_BASE_BLOCKS, MIN_META_BLOCKS};
use super::resize_end::{Finish, Finished};
use crate::format::node::Key;
use crate::format::snaptable::State;
use crate::format::superblock::{Extent, MAX_EXTENTS};
use crate::promise::kept;
use crate::units::{
    Chunk, META_BLOCK_BYTES, MetaBlock, SECTOR_BYTES, Sectors, SnapSeq, StoreChunk,
};

/// Index entries looked at in a step.
const STEP_ENTRIES: usize = 512;
/// Bytes of the origin copied out in a step.
const STEP_BYTES: u64 = 1 << 20;
/// A combined store that grew gets more metadata only if it lacks so many blocks.
const LEAST_EXTENT: u64 = 64;

/// A resize under way; lasts in memory only, for until its end nothing has changed.
#[derive(Debug)]
pub(crate) struct Resize {
    target: Target,
    phase: Phase,
    /// The next snapshot's sequence when the phase of copying began: one created since needs the
    /// origin's end too.
    next_seq: SnapSeq,
    /// Metadata is written before its new end only.
    pub(super) limited: bool,
}

/// What is asked for, in the units of the superblock.
#[derive(Clone, Copy, Debug)]
pub(super) struct Target {
    pub origin: Sectors,
    /// Chunks the data device has room for.
    data_end: u64,
    /// Blocks the metadata device has room for; none if it has no device of its own.
    meta_blocks: Option<u64>,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Frees what is dead, so that it is not in the way.
    Sweep,
    /// Counts the chunks of the origin's end that are saved already.
    Count { from: Key, saved: u64, last: u64 },
    /// Copies out the others, from this one on.
    Copy { next: u64 },
    /// All of the origin's end is saved.
    Finish(Finish),
}

/// Where things lie after a resize.
pub(super) struct Layout {
    pub data_end: StoreChunk,
    pub extents: Vec<Extent>,
}

impl Store {
    /// How long origin, data device and metadata device are for the store, in bytes.
    #[must_use]
    pub fn sizes(&self) -> Sizes {
        let shift = self.superblock.chunk;
        let store = self.superblock.data_end.to_offset(shift);
        let meta_end = self.superblock.extents.last().map_or(0, |e| e.end().0);
        Sizes {
            origin: self.media.origin_length.to_bytes(),
            store,
            meta: if self.superblock.separate_meta {
                meta_end * META_BLOCK_BYTES
            } else {
                store
            },
        }
    }

    /// Begins to change sizes; [`resize_step`](Self::resize_step) does it. One that was under way is
    /// given up.
    ///
    /// # Errors
    /// A device does not say how long it is. Inner: it cannot be done, and nothing was.
    pub fn resize_begin(
        &mut self,
        request: &ResizeRequest,
    ) -> Result<Result<(), ResizeError>, StoreError> {
        self.check_latch()?;
        self.resize_abort();
        if let Some(tag) = self.reverting() {
            return Ok(Err(ResizeError::Reverting(tag)));
        }
        let target = match self.target(request) {
            Ok(target) => target,
            Err(refused) => return Ok(Err(refused)),
        };
        if let Err(refused) = self.check_lengths(&target)? {
            return Ok(Err(refused));
        }
        if let Err(refused) = self.layout(&target) {
            return Ok(Err(refused));
        }
        self.resizing = Some(Resize {
            target,
            phase: Phase::Sweep,
            next_seq: self.state.next_seq,
            limited: false,
        });
        Ok(Ok(()))
    }

    /// Does a bounded part of it. Gives the sizes at the end, and nothing while there is more to do or
    /// if no resize is under way.
    ///
    /// # Errors
    /// The store cannot go on, or a part of the origin that snapshots need cannot be read. Inner: it
    /// cannot be done. In either case the sizes are unchanged and the resize is over.
    pub fn resize_step(&mut self) -> Result<Result<Option<Sizes>, ResizeError>, StoreError> {
        self.check_latch()?;
        let Some(mut resize) = self.resizing.take() else {
            return Ok(Ok(None));
        };
        match self.do_resize_step(&mut resize) {
            Ok(Ok(None)) => {
                self.resizing = Some(resize);
                Ok(Ok(None))
            }
            ended => {
                self.resize_abort();
                ended
            }
        }
    }

    /// Gives up what [`resize_begin`](Self::resize_begin) began.
    pub fn resize_abort(&mut self) {
        self.resizing = None;
        self.meta.set_extents(&self.superblock.extents);
    }

    /// How many bytes of the origin's end have been dealt with, and of how many; zeros if no resize is at
    /// that.
    #[must_use]
    pub fn resize_progress(&self) -> (u64, u64) {
        let Some(resize) = &self.resizing else {
            return (0, 0);
        };
        let tail = self.tail(resize.target.origin);
        let next = match resize.phase {
            Phase::Copy { next } => next,
            Phase::Sweep | Phase::Count { .. } => tail.start,
            Phase::Finish(_) => tail.end,
        };
        let bytes = |chunks| Chunk(chunks).to_offset(self.superblock.chunk);
        (
            bytes(next.saturating_sub(tail.start)),
            bytes(tail.end - tail.start),
        )
    }

    /// Whether a resize is under way.
    #[must_use]
    pub fn is_resizing(&self) -> bool {
        self.resizing.is_some()
    }

    fn target(&self, request: &ResizeRequest) -> Result<Target, ResizeError> {
        let shift = self.superblock.chunk.get();
        let (mut store, mut meta) = (request.store, request.meta);
        if !self.superblock.separate_meta {
            match (store, meta) {
                (Some(one), Some(other)) if one != other => return Err(ResizeError::TwoValues),
                _ => store = store.or(meta),
            }
            meta = None;
        }
        let now = self.sizes();
        let target = Target {
            origin: Sectors::in_bytes(request.origin.unwrap_or(now.origin)),
            data_end: store.unwrap_or(now.store) >> shift,
            meta_blocks: self
                .superblock
                .separate_meta
                .then(|| meta.unwrap_or(now.meta) / META_BLOCK_BYTES),
        };
        if target.origin.0 == 0 {
            return Err(ResizeError::TooShort {
                part: Part::Origin,
                least: SECTOR_BYTES,
            });
        }
        Ok(target)
    }

    /// Whether the devices are as long as they are to be used. Numbers that pass are lengths of devices,
    /// so that later sums cannot overflow.
    pub(super) fn check_lengths(
        &mut self,
        target: &Target,
    ) -> Result<Result<(), ResizeError>, StoreError> {
        let shift = self.superblock.chunk.get();
        let (origin, data, meta) = self.media.measure()?;
        let now = self.sizes();
        let (meta, wanted_meta) = (meta.unwrap_or(0), target.meta_blocks.unwrap_or(0));
        for (part, wanted, device, now) in [
            (
                Part::Origin,
                target.origin.0,
                Sectors::in_bytes(origin).0,
                Sectors::in_bytes(now.origin).0,
            ),
            (
                Part::Store,
                target.data_end,
                data >> shift,
                now.store >> shift,
            ),
            (
                Part::Metadata,
                wanted_meta,
                meta / META_BLOCK_BYTES,
                now.meta / META_BLOCK_BYTES,
            ),
        ] {
            if wanted != now && wanted > device {
                let device = match part {
                    Part::Origin => origin,
                    Part::Store => data,
                    Part::Metadata => meta,
                };
                return Ok(Err(ResizeError::TooLong { part, device }));
            }
        }
        Ok(Ok(()))
    }

    pub(super) fn layout(&self, target: &Target) -> Result<Layout, ResizeError> {
        let old = &self.superblock;
        let (shift, data_first) = (old.chunk, old.data_first.0);
        let too_short = |part, least| Err(ResizeError::TooShort { part, least });
        if target.data_end <= data_first {
            return too_short(Part::Store, (data_first + 1) << shift.get());
        }
        let data_end = StoreChunk(target.data_end);
        let mut extents = old.extents.clone();
        let meta_end = match target.meta_blocks {
            Some(blocks) => blocks,
            None => data_end.to_offset(shift) / META_BLOCK_BYTES,
        };
        extents.retain(|extent| extent.first.0 < meta_end);
        for extent in &mut extents {
            extent.blocks = extent.blocks.min(meta_end - extent.first.0);
        }
        match (target.meta_blocks, extents.last_mut()) {
            (Some(_), Some(last)) => last.blocks = meta_end - last.first.0,
            (None, Some(_)) => add_extent(old.data_end, data_end, shift.get(), &mut extents),
            (_, None) => {}
        }
        let blocks: u64 = extents.iter().map(|extent| extent.blocks).sum();
        if target.meta_blocks.is_some() && blocks < MIN_META_BLOCKS {
            let first = old.extents.first().map_or(0, |extent| extent.first.0);
            return too_short(Part::Metadata, (first + MIN_META_BLOCKS) * META_BLOCK_BYTES);
        }
        Ok(Layout { data_end, extents })
    }

    fn do_resize_step(
        &mut self,
        resize: &mut Resize,
    ) -> Result<Result<Option<Sizes>, ResizeError>, StoreError> {
        let tail = self.tail(resize.target.origin);
        let end = tail.start;
        let is_later = kept!(
            "end-copied-for-new-snapshots",
            "a snapshot made while the origin's end was copied out would lose it"
        ) && resize.next_seq != self.state.next_seq;
        resize.phase = match resize.phase {
            Phase::Sweep if self.sweep.pending() => {
                self.background_step(STEP_ENTRIES)?;
                Phase::Sweep
            }
            Phase::Sweep if resize.target.origin < self.media.origin_length => Phase::Count {
                from: (end, 0),
                saved: 0,
                last: 0,
            },
            Phase::Sweep => Phase::Finish(Finish::Settle),
            Phase::Count { from, saved, last } => match self.count_saved(from, saved, last)? {
                (Some(from), saved, last) => Phase::Count { from, saved, last },
                (None, saved, _) => {
                    let needed = (tail.end - tail.start).saturating_sub(saved);
                    let free = self.state.space.free();
                    let counted = kept!(
                        "room-for-the-end-counted",
                        "a resize would begin that gives up snapshots, or cannot come to its end"
                    );
                    if counted && needed > free {
                        return Ok(Err(ResizeError::NoRoomForEnd { needed, free }));
                    }
                    resize.next_seq = self.state.next_seq;
                    Phase::Copy { next: end }
                }
            },
            Phase::Copy { next } => match self.copy_end(tail.end, next)? {
                Ok(Some(next)) => Phase::Copy { next },
                Ok(None) if !is_later => Phase::Finish(Finish::Settle),
                Ok(None) => {
                    resize.next_seq = self.state.next_seq;
                    Phase::Copy { next: end }
                }
                Err(refused) => return Ok(Err(refused)),
            },
            Phase::Finish(_) if is_later => {
                // A snapshot was created: it may need the origin's end.
                resize.next_seq = self.state.next_seq;
                Phase::Copy { next: end }
            }
            Phase::Finish(finish) => {
                match self.finish_step(&resize.target, resize.limited, finish)? {
                    Ok(Finished::Not(finish, limited)) => {
                        resize.limited = limited;
                        Phase::Finish(finish)
                    }
                    Ok(Finished::Resized(sizes)) => return Ok(Ok(Some(sizes))),
                    Err(refused) => return Ok(Err(refused)),
                }
            }
        };
        Ok(Ok(None))
    }

    /// Requests need the room that the metadata is to lose: no snapshot is given up for that. True if they
    /// have it again; the resize then comes to nothing.
    pub(super) fn resize_gives_way(&mut self) -> bool {
        let Some(resize) = self.resizing.as_mut().filter(|resize| resize.limited) else {
            return false;
        };
        resize.limited = false;
        resize.phase = Phase::Finish(Finish::Crowded);
        self.meta.set_extents(&self.superblock.extents);
        true
    }

    /// The chunks that lose something when the origin gets this length, as far as any live snapshot has them:
    /// the first may lose a part of it only.
    fn tail(&self, target: Sectors) -> Range<u64> {
        let shift = self.superblock.chunk;
        let live = self
            .state
            .snapshots
            .iter()
            .filter(|s| s.state == State::Live);
        let longest = live
            .map(|snapshot| snapshot.length)
            .max()
            .unwrap_or_default();
        let longest = longest.min(self.media.origin_length);
        let start = target.to_whole_chunks(shift);
        match longest > target {
            true => start..longest.to_chunks(shift),
            false => start..start,
        }
    }

    /// Counts chunks whose exception serves the newest snapshot that has them: `saved` so far, `last`
    /// the chunk behind the last of them.
    fn count_saved(
        &mut self,
        from: Key,
        mut saved: u64,
        mut last: u64,
    ) -> Result<(Option<Key>, u64, u64), StoreError> {
        let end = self.media.origin_length.to_chunks(self.superblock.chunk);
        let exceptions = &self.state.exceptions;
        let scan = exceptions.scan(&mut self.media, from, STEP_ENTRIES)?;
        for ((chunk, seq), _) in scan.found {
            let newest = self.state.snapshots.newest_with(Chunk(chunk));
            let serves = newest.is_some_and(|newest| newest.0 <= seq);
            if serves && chunk < end && last != chunk + 1 {
                saved += 1;
                last = chunk + 1;
            }
        }
        Ok((scan.next, saved, last))
    }

    /// Copies out some chunks from `next` on, before `upto`; gives the first that is left.
    fn copy_end(
        &mut self,
        upto: u64,
        next: u64,
    ) -> Result<Result<Option<u64>, ResizeError>, StoreError> {
        let most = (STEP_BYTES >> self.superblock.chunk.get()).max(1);
        let part = next..upto.min(next + most);
        let ops: Vec<Op> = part
            .clone()
            .map(|chunk| Op::OriginWrite(Chunk(chunk)))
            .collect();
        // To save the end of some snapshots by giving up others is not what was asked for.
        self.sparing = true;
        let answers = self.commit(&ops);
        self.sparing = false;
        for answer in answers? {
            match answer {
                Ok(Done::Unique) => {}
                Err(OpError::Wait) => {
                    self.background_step(STEP_ENTRIES)?;
                    return Ok(Ok(Some(next)));
                }
                Err(OpError::StoreFull) => {
                    let free = self.state.space.free();
                    let needed = upto.saturating_sub(next);
                    return Ok(Err(ResizeError::NoRoomForEnd { needed, free }));
                }
                other => {
                    let problem = format!("a copy of the origin's end came to {other:?}");
                    return Err(self.media.inconsistent(problem));
                }
            }
        }
        Ok(Ok((part.end < upto).then_some(part.end)))
    }
}

/// Gives a combined store that grew more metadata blocks, at the start of what is new, if it lacks many
/// for its size: as many as it would have got if it had been initialised so.
fn add_extent(old_end: StoreChunk, new_end: StoreChunk, shift: u8, extents: &mut Vec<Extent>) {
    if new_end <= old_end {
        return;
    }
    let blocks_per_chunk = (1 << shift) / META_BLOCK_BYTES; // 0 if a chunk is the smaller one
    let device_blocks = (new_end.0 << shift) / META_BLOCK_BYTES;
    let base = (device_blocks / 64).clamp(MIN_BASE_BLOCKS, MAX_BASE_BLOCKS);
    let wanted = base + new_end.0.saturating_mul(META_BYTES_PER_CHUNK) / META_BLOCK_BYTES;
    let have: u64 = extents.iter().map(|extent| extent.blocks).sum();
    let lacking = wanted.saturating_sub(have);
    let blocks = lacking.next_multiple_of(blocks_per_chunk.max(1));
    let first = (old_end.0 << shift).div_ceil(META_BLOCK_BYTES);
    let new_blocks = device_blocks.saturating_sub(first);
    if lacking < LEAST_EXTENT || blocks > new_blocks / 4 {
        return;
    }
    if let Some(last) = extents.last_mut().filter(|last| last.end().0 == first) {
        last.blocks += blocks;
    } else if extents.len() < MAX_EXTENTS {
        extents.push(Extent {
            first: MetaBlock(first),
            blocks,
        });
    }
}
