// SPDX-License-Identifier: GPL-2.0-only
//! The last phase of a resize, in bounded steps: requests are answered between any two of them.
//!
//! 1. The checkpoint under way is completed: its blocks may lie where the metadata region is to end.
//! 2. Of a data region that becomes shorter, each bitmap behind the new end is looked at. What is taken there
//!    meanwhile is noted by the allocator, so the answer holds at the end.
//! 3. Of a metadata region that becomes shorter, nothing is written behind the new end from here on. Each node,
//!    bitmap and table block that lies there is written anew by checkpoints that are otherwise
//!    like any other, until one whole look at the trees finds none.
//! 4. Bookmarks longer than the new origin are cut; a checkpoint is begun and merged like any other; its superblock has the new sizes. If requests are in need
//!    of its end before that, it is sealed without them, and another one follows.

use super::Store;
use super::api::{ResizeError, Sizes};
use super::error::StoreError;
use super::index::tree::branch;
use super::resize::{Layout, Target};
use crate::format::block::Kind;
use crate::format::node::Key;
use crate::format::superblock::Extent;
use crate::promise::kept;
use crate::units::StoreChunk;

/// Bitmaps whose places are looked at in a step, many of them by one read.
const PLACES_IN_STEP: usize = 512;
/// Blocks written anew by one checkpoint.
const ANEW_AT_ONCE: usize = 1024;
/// Steps of a checkpoint done together at most, when others have sealed it again and again.
const MOST_STEPS: u32 = 8;

/// How far the last phase is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Finish {
    Settle,
    /// Looks for chunks in use from `from` on: how many there are so far, and the last.
    Used {
        from: StoreChunk,
        count: u64,
        last: Option<StoreChunk>,
    },
    Clear(Clear),
    /// The generation of the superblock that gets the new sizes, if its checkpoint has begun, and how many steps
    /// are done together.
    Seal {
        begun: Option<u64>,
        together: u32,
    },
    /// Requests needed the room.
    Crowded,
}

/// A look at everything in the metadata region.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Clear {
    part: Part,
    /// The first key not looked at.
    from: Key,
    /// Blocks to be written anew by the next checkpoint.
    marked: usize,
    /// Some were found since the look began.
    found: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Part {
    #[default]
    Exceptions,
    Overlays,
    Space,
    Bitmaps,
    Table,
    End,
}

/// What a step has come to.
pub(super) enum Finished {
    /// There is more to do; and whether metadata is written before the new end only.
    Not(Finish, bool),
    Resized(Sizes),
}

impl Store {
    /// A bounded part of the last phase.
    pub(super) fn finish_step(
        &mut self,
        target: &Target,
        limited: bool,
        finish: Finish,
    ) -> Result<Result<Finished, ResizeError>, StoreError> {
        if let Some(tag) = self.reverting() {
            return Ok(Err(ResizeError::Reverting(tag)));
        }
        let layout = match self.layout(target) {
            Ok(layout) => layout,
            Err(refused) => return Ok(Err(refused)),
        };
        let more = |finish| Ok(Ok(Finished::Not(finish, limited)));
        match finish {
            Finish::Settle => {
                if let Err(refused) = self.check_lengths(target)? {
                    return Ok(Err(refused));
                }
                if self.checkpoint.is_some() {
                    self.checkpoint_step()?;
                    return more(Finish::Settle);
                }
                more(self.look_behind(&layout))
            }
            Finish::Used { from, count, last } => {
                let space = &mut self.state.space;
                let (more_used, new_last, next) =
                    space.used_step(&mut self.media, from, self.budget)?;
                let (count, last) = (count + more_used, new_last.or(last));
                match (next, last) {
                    (Some(from), _) => more(Finish::Used { from, count, last }),
                    (None, Some(last)) => {
                        let least = StoreChunk(last.0 + 1).to_offset(self.superblock.chunk);
                        Ok(Err(ResizeError::ChunksInUse { count, least }))
                    }
                    (None, None) if self.loses_metadata(&layout) => {
                        more(Finish::Clear(Clear::default()))
                    }
                    (None, None) => more(Finish::SEAL),
                }
            }
            Finish::Clear(clear) => self.clear_step(&layout.extents, limited, clear),
            Finish::Seal { begun, together } => {
                self.seal_step(target, &layout, limited, begun, together)
            }
            Finish::Crowded => {
                self.meta.set_extents(&layout.extents);
                let (needed, free) = self.metadata_needed();
                let needed = needed.max(free + 1);
                Ok(Err(ResizeError::MetadataInUse { needed, free }))
            }
        }
    }

    /// What comes first of a layout.
    fn look_behind(&mut self, layout: &Layout) -> Finish {
        if layout.data_end < self.superblock.data_end {
            self.state.space.watch_from(layout.data_end);
            return Finish::Used {
                from: layout.data_end,
                count: 0,
                last: None,
            };
        }
        match self.loses_metadata(layout) {
            true => Finish::Clear(Clear::default()),
            false => Finish::SEAL,
        }
    }

    fn loses_metadata(&self, layout: &Layout) -> bool {
        let covers = |new: &Extent, old: &Extent| new.first <= old.first && old.end() <= new.end();
        let mut old = self.superblock.extents.iter();
        old.any(|old| !layout.extents.iter().any(|new| covers(new, old)))
    }

    /// Blocks that the next checkpoint may need, and free ones.
    fn metadata_needed(&self) -> (u64, u64) {
        let needed = self.checkpoint_cost(0, 0) + self.meta_reserve();
        (needed, self.meta.free())
    }

    fn clear_step(
        &mut self,
        extents: &[Extent],
        limited: bool,
        mut clear: Clear,
    ) -> Result<Result<Finished, ResizeError>, StoreError> {
        if self.checkpoint.is_some() {
            self.checkpoint_step()?;
            return Ok(Ok(Finished::Not(Finish::Clear(clear), limited)));
        }
        if !limited {
            // From now on nothing is written outside.
            self.meta.set_extents(extents);
        }
        self.mark_strays(&mut clear)?;
        let (needed, free) = self.metadata_needed();
        if needed > free {
            return Ok(Err(ResizeError::MetadataInUse { needed, free }));
        }
        let ended = clear.part == Part::End;
        let next = if clear.marked >= ANEW_AT_ONCE || ended && clear.marked > 0 {
            clear.marked = 0;
            self.checkpoint_step()?;
            Finish::Clear(clear)
        } else if !ended {
            Finish::Clear(clear)
        } else if clear.found {
            // Until one look finds all of it in place.
            Finish::Clear(Clear::default())
        } else {
            Finish::SEAL
        };
        Ok(Ok(Finished::Not(next, true)))
    }

    /// Looks at a few more blocks, and marks those outside the metadata region so that the next checkpoint
    /// writes them anew: an index node by setting an entry below it to what it is. None is under way.
    fn mark_strays(&mut self, clear: &mut Clear) -> Result<(), StoreError> {
        let (media, meta, state) = (&mut self.media, &self.meta, &mut self.state);
        let (mut marked, most) = (0, self.budget.operations());
        let next = match clear.part {
            Part::Exceptions | Part::Overlays | Part::Space => {
                let (kind, root) = match clear.part {
                    Part::Exceptions => (Kind::Exceptions, state.exceptions.root),
                    Part::Overlays => (Kind::Overlays, state.overlays.root),
                    _ => (Kind::Space, state.space.root),
                };
                let (nodes, mut next) = branch(media, kind, &root, clear.from)?;
                for (block, key) in nodes {
                    if meta.contains(block) {
                        continue;
                    }
                    if marked >= most && key > clear.from {
                        next = Some(key);
                        break;
                    }
                    marked += 1;
                    match clear.part {
                        Part::Exceptions => state.exceptions.touch(media, key)?,
                        Part::Overlays => state.overlays.touch(media, key)?,
                        _ => {
                            if let Some(&(index, _)) = state.space.blocks(media, key.0, 1)?.first()
                            {
                                state.space.touch(media, index)?;
                            }
                        }
                    }
                }
                next
            }
            Part::Bitmaps => {
                let places = state.space.blocks(media, clear.from.0, PLACES_IN_STEP)?;
                let mut next = places.last().map(|&(index, _)| (index + 1, 0));
                for (index, _) in places.iter().filter(|(_, block)| !meta.contains(*block)) {
                    if marked >= most {
                        next = Some((*index, 0));
                        break;
                    }
                    marked += 1;
                    state.space.touch(media, *index)?;
                }
                next
            }
            Part::Table => {
                let table = &mut state.snapshots;
                if table.blocks().iter().any(|&block| !meta.contains(block)) {
                    marked += 1;
                    table.dirty = true;
                }
                None
            }
            Part::End => None,
        };
        clear.marked += marked;
        clear.found |= marked > 0;
        (clear.part, clear.from) = match next {
            Some(next) => (clear.part, next),
            None => (clear.part.next(), (0, 0)),
        };
        Ok(())
    }

    fn seal_step(
        &mut self,
        target: &Target,
        layout: &Layout,
        limited: bool,
        begun: Option<u64>,
        together: u32,
    ) -> Result<Result<Finished, ResizeError>, StoreError> {
        let (mut begun, mut next) = (begun, together);
        for _ in 0..together {
            let taken = self.state.space.taken_behind(layout.data_end)
                && kept!(
                    "nothing-taken-behind-new-end",
                    "a chunk that was taken after the last look would be cut off with the store"
                );
            if taken {
                return Ok(Ok(Finished::Not(self.look_behind(layout), limited)));
            }
            let ours = begun.is_some() && self.checkpoint_generation() == begun;
            if self.checkpoint.is_none() {
                if let Err(refused) = self.check_lengths(target)? {
                    return Ok(Err(refused));
                }
                self.cut_bookmarks(target.origin)?;
                if begun.is_some() {
                    next = (2 * together).min(MOST_STEPS);
                }
                self.checkpoint_step()?;
                begun = self.checkpoint_generation();
            } else if ours && self.is_merged() {
                self.seal_sizes(target, layout)?;
                return Ok(Ok(Finished::Resized(self.sizes())));
            } else {
                self.checkpoint_step()?;
            }
        }
        let together = next;
        Ok(Ok(Finished::Not(Finish::Seal { begun, together }, limited)))
    }

    /// Completes the checkpoint under way with a superblock that has the new sizes.
    fn seal_sizes(&mut self, target: &Target, layout: &Layout) -> Result<(), StoreError> {
        let sealed = self.seal_checkpoint(|next| {
            next.origin = target.origin;
            next.data_end = layout.data_end;
            next.extents.clone_from(&layout.extents);
        });
        self.latch(sealed)?;
        self.media.origin_length = target.origin;
        let holes = self.superblock.holes();
        self.state.space.set_region(layout.data_end, holes);
        self.meta.set_extents(&layout.extents);
        Ok(())
    }
}

impl Finish {
    const SEAL: Finish = Finish::Seal {
        begun: None,
        together: 1,
    };
}

impl Part {
    fn next(self) -> Part {
        match self {
            Part::Exceptions => Part::Overlays,
            Part::Overlays => Part::Space,
            Part::Space => Part::Bitmaps,
            Part::Bitmaps => Part::Table,
            Part::Table | Part::End => Part::End,
        }
    }
}
