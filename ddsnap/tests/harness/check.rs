// SPDX-License-Identifier: GPL-2.0-only
//! Compares what a store gives with what the model allows.

use std::collections::{BTreeMap, BTreeSet};

use ddsnap::device::memory::Machine;
use ddsnap::device::{BlockDevice, Read};
use ddsnap::store::{Location, SnapState, Store};
use ddsnap::units::{Chunk, SnapTag};

use super::model::Model;
use super::shape::{DATA, ORIGIN, Shape};

/// Content of a chunk of the origin.
pub fn read_origin(shape: &Shape, machine: &Machine, chunk: Chunk, into: &mut [u8]) {
    let offset = chunk.to_offset(shape.shift());
    read(machine, (ORIGIN, offset), into);
}

/// Content of a chunk of a live snapshot, found the way the kernel target finds it.
pub fn read_snapshot(
    shape: &Shape,
    machine: &Machine,
    store: &mut Store,
    tag: u32,
    chunk: Chunk,
    into: &mut [u8],
) -> Result<(), String> {
    read(machine, locate(shape, store, tag, chunk)?, into);
    Ok(())
}

fn read(machine: &Machine, (disk, offset): (usize, u64), into: &mut [u8]) {
    machine
        .device(disk)
        .read(&mut [Read { offset, into }])
        .expect("read");
}

/// The disk, and the byte on it, where a snapshot's chunk lies.
fn locate(
    shape: &Shape,
    store: &mut Store,
    tag: u32,
    chunk: Chunk,
) -> Result<(usize, u64), String> {
    let located = store
        .locate(SnapTag(tag), chunk)
        .map_err(|error| error.to_string())?;
    match located.map_err(|refused| refused.to_string())? {
        Location::Origin => Ok((ORIGIN, chunk.to_offset(shape.shift()))),
        Location::Store(place) => Ok((DATA, place.to_offset(shape.shift()))),
    }
}

/// Compares a store with what two models allow: the one before and the one after a step. `given_up`
/// snapshots may be live still.
pub fn check(
    shape: &Shape,
    machine: &Machine,
    store: &mut Store,
    before: &Model,
    after: &Model,
) -> Result<(), String> {
    let found: BTreeMap<u32, _> = store
        .snapshots()
        .into_iter()
        .map(|s| (s.tag.0, s))
        .collect();
    let known = before.snapshots.keys().chain(after.snapshots.keys());
    let tags: BTreeSet<u32> = known.chain(found.keys()).copied().collect();
    for tag in tags {
        let candidates = [before.snapshots.get(&tag), after.snapshots.get(&tag)];
        let Some(info) = found.get(&tag) else {
            if candidates.iter().all(Option::is_some)
                && candidates[0].map(|s| s.created) == candidates[1].map(|s| s.created)
            {
                return Err(format!("snapshot {tag} is lost"));
            }
            continue;
        };
        let fits = candidates.into_iter().flatten().find(|snapshot| {
            (
                snapshot.state,
                snapshot.priority,
                snapshot.usecount,
                snapshot.created,
            ) == (info.state, info.priority, info.usecount, info.created)
        });
        let Some(snapshot) = fits else {
            return Err(format!(
                "snapshot {tag} is {info:?}, neither of what it was nor what it becomes"
            ));
        };
        if info.state != SnapState::Live {
            continue;
        }
        // A write of the interrupted step may be there in part.
        let next = after
            .snapshots
            .get(&tag)
            .filter(|next| next.created == snapshot.created);
        for (index, chunk) in snapshot.chunks.iter().enumerate() {
            let place = locate(shape, store, tag, Chunk(index as u64))
                .map_err(|error| format!("snapshot {tag} chunk {index}: {error}"))?;
            let what = || format!("snapshot {tag} chunk {index}");
            check_chunk(
                machine,
                place,
                [chunk, next.map_or(chunk, |next| &next.chunks[index])],
                what,
            )?;
        }
    }
    for (index, chunk) in after.origin.iter().enumerate() {
        let place = (ORIGIN, Chunk(index as u64).to_offset(shape.shift()));
        let what = || format!("origin chunk {index}");
        check_chunk(machine, place, [&before.origin[index], chunk], what)?;
    }
    Ok(())
}

/// What lies at a place must be what one of two chunks may have.
fn check_chunk(
    machine: &Machine,
    (disk, offset): (usize, u64),
    allowed: [&super::model::Chunk; 2],
    what: impl Fn() -> String,
) -> Result<(), String> {
    if allowed
        .iter()
        .any(|chunk| machine.holds(disk, offset, &chunk.now))
    {
        return Ok(());
    }
    let mut found = vec![0; allowed[0].now.len()];
    read(machine, (disk, offset), &mut found);
    if allowed.iter().any(|chunk| chunk.allows(&found)) {
        return Ok(());
    }
    Err(format!(
        "{} has content {}, expected {}",
        what(),
        stamp(&found),
        stamp(&allowed[1].now)
    ))
}

fn stamp(bytes: &[u8]) -> u64 {
    let mut stamp = [0; 8];
    stamp.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(stamp)
}
