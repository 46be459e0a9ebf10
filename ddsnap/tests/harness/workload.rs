// SPDX-License-Identifier: GPL-2.0-only
//! The random workload: what a server and its commands ask of a store.

use ddsnap::device::memory::Rng;
use ddsnap::store::{Op, ResizeRequest};
use ddsnap::units::{Chunk, SECTOR_BYTES, SnapTag};

use super::model::Model;
use super::shape::Shape;
use super::volume::Volume;

/// One step of the workload.
#[derive(Clone, Debug)]
pub enum Step {
    /// Ask for these ops as one group, then write the granted chunks if `write` is set.
    Group {
        ops: Vec<Op>,
        write: bool,
    },
    Create(u32),
    CreateBookmark(u32),
    ToBookmark(u32),
    WhenFull(u32, bool),
    Delete(u32),
    Priority(u32, i8),
    Usecount(u32, i32),
    Background(usize),
    FlushOrigin,
    /// Writes to chunks of the origin that need no asking, if there are such behind this one.
    Unasked(Chunk, usize),
    /// A device of the snapshot is connected, or not any more.
    Connect(u32, bool),
    /// No I/O of a device is under way into the snapshot, if it is squashed.
    Quiet(u32),
    /// Begins to change sizes.
    Resize(ResizeRequest),
    /// Begins to revert the origin to a snapshot.
    Revert(u32),
    /// Goes on with the resize or the revert, so many chunks.
    Work(usize),
    Reopen,
}

impl Step {
    /// How many requests and commands the step is.
    pub fn operations(&self) -> u64 {
        match self {
            Step::Group { ops, .. } => ops.len() as u64,
            _ => 1,
        }
    }
}

/// Chooses a step of any kind.
pub fn choose_any(rng: &mut Rng, volume: &mut Volume) -> Step {
    let kind = rng.below(100);
    if volume.job.is_some() && kind < 35 {
        return Step::Work(1 + rng.below(6) as usize);
    }
    let tags: Vec<u32> = volume.model.snapshots.keys().copied().collect();
    let snapshots = volume.model.snapshots.iter();
    let squashed = snapshots
        .filter(|(_, s)| !s.is_live())
        .map(|(&tag, _)| tag)
        .next();
    match kind {
        35..=44 => Step::Unasked(
            Chunk(rng.below(volume.shape.origin_chunks)),
            1 + rng.below(4) as usize,
        ),
        45..=47 if !tags.is_empty() => {
            Step::Connect(tags[rng.below(tags.len() as u64) as usize], rng.chance(40))
        }
        52..=54 if squashed.is_some() => Step::Quiet(squashed.unwrap_or_default()),
        48..=49 if volume.job.is_none() => Step::Resize(choose_sizes(rng, volume)),
        50..=51 if volume.job.is_none() && !tags.is_empty() => {
            Step::Revert(tags[rng.below(tags.len() as u64) as usize])
        }
        _ => choose(rng, &volume.shape, &volume.model, &mut volume.next_tag),
    }
}

/// The most chunks that a resize gives the origin of a volume that began with this shape.
pub fn longest_origin(first: &Shape) -> u64 {
    first.origin_chunks * 3 / 2
}

/// One size, or all of them at once.
fn choose_sizes(rng: &mut Rng, volume: &Volume) -> ResizeRequest {
    let first = &volume.first_shape;
    let unit = first.chunk_bytes.max(4096);
    let somewhere = |rng: &mut Rng, least: u64, most: u64| {
        least / unit * unit + rng.below((most - least) / unit + 1) * unit
    };
    let which = rng.below(4);
    let mut request = ResizeRequest::default();
    if which == 0 || which == 3 {
        // Half of them whole chunks, the others with one that is shorter by any number of sectors.
        let chunks = 1 + rng.below(longest_origin(first));
        let lacking = match rng.chance(50) {
            true => 0,
            false => rng.below(first.chunk_bytes / SECTOR_BYTES),
        };
        request.origin = Some(chunks * first.chunk_bytes - lacking * SECTOR_BYTES);
    }
    if which == 1 || which == 3 {
        // Now and then so much that a combined store takes some of it for metadata.
        let most = match rng.below(8) {
            0 => first.data_bytes + (9 << 20),
            _ => first.data_bytes * 3 / 2,
        };
        request.store = Some(somewhere(rng, first.data_bytes, most));
    }
    if first.meta_bytes > 0 && which >= 2 {
        request.meta =
            Some(somewhere(rng, first.meta_bytes, first.meta_bytes * 3 / 2) / 4096 * 4096);
    }
    request
}

/// Chooses an ordinary step that the shape and the model make sense of.
pub fn choose(rng: &mut Rng, shape: &Shape, model: &Model, next_tag: &mut u32) -> Step {
    let tags: Vec<u32> = model.snapshots.keys().copied().collect();
    let tag = |rng: &mut Rng| {
        if tags.is_empty() {
            0
        } else {
            tags[rng.below(tags.len() as u64) as usize]
        }
    };
    match rng.below(100) {
        0..=59 => {
            let count = if rng.chance(20) {
                1 + rng.below(40)
            } else {
                1 + rng.below(4)
            };
            let ops = (0..count)
                .map(|_| {
                    if rng.chance(25) {
                        // Snapshots keep the length that the origin had.
                        let tag = tag(rng);
                        let snapshot = model.snapshots.get(&tag);
                        let chunks = snapshot.map_or(1, |snapshot| snapshot.chunks.len());
                        Op::SnapshotWrite(SnapTag(tag), Chunk(rng.below(chunks as u64)))
                    } else {
                        Op::OriginWrite(Chunk(rng.below(shape.origin_chunks)))
                    }
                })
                .collect();
            Step::Group {
                ops,
                write: !rng.chance(10),
            }
        }
        60..=71 => {
            // Bookmarks hold no data: with as many snapshots as before the store fills as before.
            let bookmarks = model.snapshots.values().filter(|s| s.is_bookmark()).count();
            let most = bookmarks.max(tags.len() - bookmarks);
            if most as u64 >= shape.snapshots {
                return Step::Delete(tag(rng));
            }
            // Now and then a tag that was used before.
            let tag = if rng.chance(20) {
                rng.below(u64::from(*next_tag) + 1) as u32
            } else {
                *next_tag
            };
            *next_tag = (*next_tag).max(tag + 1);
            match rng.chance(25) {
                true => Step::CreateBookmark(tag),
                false => Step::Create(tag),
            }
        }
        72..=76 => Step::Delete(tag(rng)),
        77 => Step::ToBookmark(tag(rng)),
        78 => Step::WhenFull(tag(rng), rng.chance(80)),
        79..=81 => Step::Priority(tag(rng), rng.below(256) as u8 as i8),
        82..=85 => Step::Usecount(tag(rng), rng.below(4) as i32 - 2),
        86..=95 => Step::Background(1 + rng.below(64) as usize),
        96..=98 => Step::FlushOrigin,
        _ => Step::Reopen,
    }
}
