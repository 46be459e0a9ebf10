// SPDX-License-Identifier: GPL-2.0-only
//! The random workload: what a server and its commands ask of a store.

use ddsnap::device::memory::Rng;
use ddsnap::store::Op;
use ddsnap::units::{Chunk, SnapTag};

use super::model::Model;
use super::shape::Shape;

/// One step of the workload.
#[derive(Clone, Debug)]
pub enum Step {
    /// Ask for these ops as one group, then write the granted chunks if `write` is set.
    Group {
        ops: Vec<Op>,
        write: bool,
    },
    Create(u32),
    Delete(u32),
    Priority(u32, i8),
    Usecount(u32, i32),
    Background(usize),
    FlushOrigin,
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

/// Chooses a step that the shape and the model make sense of.
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
                    let chunk = Chunk(rng.below(shape.origin_chunks));
                    if rng.chance(25) {
                        Op::SnapshotWrite(SnapTag(tag(rng)), chunk)
                    } else {
                        Op::OriginWrite(chunk)
                    }
                })
                .collect();
            Step::Group {
                ops,
                write: !rng.chance(10),
            }
        }
        60..=71 => {
            if tags.len() as u64 >= shape.snapshots {
                return Step::Delete(tag(rng));
            }
            // Now and then a tag that was used before.
            let tag = if rng.chance(20) {
                rng.below(u64::from(*next_tag) + 1) as u32
            } else {
                *next_tag
            };
            *next_tag = (*next_tag).max(tag + 1);
            Step::Create(tag)
        }
        72..=77 => Step::Delete(tag(rng)),
        78..=81 => Step::Priority(tag(rng), rng.below(256) as u8 as i8),
        82..=85 => Step::Usecount(tag(rng), rng.below(4) as i32 - 2),
        86..=95 => Step::Background(1 + rng.below(64) as usize),
        96..=98 => Step::FlushOrigin,
        _ => Step::Reopen,
    }
}
