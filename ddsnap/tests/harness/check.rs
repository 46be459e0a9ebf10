// SPDX-License-Identifier: GPL-2.0-only
//! Compares what a store gives with what the model allows.

use std::collections::{BTreeMap, BTreeSet};

use ddsnap::device::memory::Machine;
use ddsnap::device::{BlockDevice, Read, Write};
use ddsnap::store::dump::{DumpEntry, DumpPlace};
use ddsnap::store::{Location, Sizes, SnapState, SnapshotInfo, Store};
use ddsnap::units::{Chunk, SnapTag};

use super::model::{Model, Snapshot};
use super::shape::{DATA, ORIGIN, Shape};

/// Content of a chunk of the origin.
pub fn read_origin(shape: &Shape, machine: &Machine, chunk: Chunk, into: &mut [u8]) {
    let offset = chunk.to_offset(shape.shift());
    read(machine, (ORIGIN, offset), into).expect("read");
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
    let place = locate(shape, store, tag, chunk)?;
    read(machine, place, into).map_err(|error| error.to_string())
}

/// What lies at a place. Where a write was torn and nothing can be read, `content` is written anew, as whoever
/// wrote there would do.
pub fn heal(machine: &Machine, (disk, offset): (usize, u64), content: &[u8], into: &mut [u8]) {
    if read(machine, (disk, offset), into).is_ok() {
        return;
    }
    let from = content;
    let mut device = machine.device(disk);
    device.write(&[Write { offset, from }]).expect("write");
    device.flush().expect("flush");
    into.copy_from_slice(content);
}

fn read(machine: &Machine, (disk, offset): (usize, u64), into: &mut [u8]) -> std::io::Result<()> {
    machine.device(disk).read(&mut [Read { offset, into }])
}

/// The disk, and the byte on it, where a snapshot's chunk lies.
pub fn locate(
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

/// Compares a store with what two models allow: the one before and the one after a step. Sizes and
/// reverts are left to the caller.
pub fn check(
    shape: &Shape,
    machine: &Machine,
    store: &mut Store,
    before: &Model,
    after: &Model,
) -> Result<(), String> {
    check_snapshots(shape, machine, store, before, after)?;
    check_origin(shape, machine, &[before, after])
}

/// Compares a store with what two models allow, in everything.
pub fn check_all(
    shape: &Shape,
    machine: &Machine,
    store: &mut Store,
    before: &Model,
    after: &Model,
) -> Result<(), String> {
    check_snapshots(shape, machine, store, before, after)?;
    check_sizes(store, before, after)?;
    // The origin has what the last acknowledged writes left, unless a revert has begun or ended.
    let reverting = store.reverting().map(|tag| tag.0);
    let models: Vec<&Model> = [before, after]
        .into_iter()
        .filter(|model| model.reverting == reverting)
        .collect();
    if models.is_empty() {
        return Err(format!("a revert to {reverting:?} is under way"));
    }
    check_origin(shape, machine, &models)
}

/// A snapshot given up may be live still.
fn check_snapshots(
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
                snapshot.to_bookmark,
                snapshot.created,
            ) == (
                info.state,
                info.priority,
                info.usecount,
                info.to_bookmark,
                info.created,
            )
        });
        let Some(snapshot) = fits else {
            return Err(format!(
                "snapshot {tag} is {info:?}, neither of what it was nor what it becomes"
            ));
        };
        if info.state == SnapState::Bookmark && !info.doubtful {
            check_bookmark(shape, machine, store, info, snapshot)?;
        }
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
            let next = next.map(|next| &next.chunks[index]);
            check_chunk(machine, place, std::iter::once(chunk).chain(next), what)?;
        }
    }
    Ok(())
}

/// What a bookmark does not list has not changed: on the origin as it is, and in each live snapshot.
pub fn check_bookmark(
    shape: &Shape,
    machine: &Machine,
    store: &mut Store,
    info: &SnapshotInfo,
    bookmark: &Snapshot,
) -> Result<(), String> {
    let tag = info.tag;
    // What lay behind the least length that the origin had since counts as changed.
    let known = info.length.to_whole_chunks(shape.shift());
    let mut noted = BTreeSet::new();
    let mut place = Some(DumpPlace::START);
    while let Some(at) = place {
        let step = store.dump_step(at, 0..=u64::MAX, 1000);
        let (entries, next) = step.map_err(|error| error.to_string())?;
        noted.extend(entries.iter().filter_map(|entry| match *entry {
            DumpEntry::Mark { chunk, seq } | DumpEntry::Exception { chunk, seq, .. } => {
                (seq >= info.seq).then_some(chunk.0)
            }
            DumpEntry::Overlay { seq, chunk, .. } => (seq == info.seq).then_some(chunk.0),
        }));
        place = next;
    }
    let mut buffer = vec![0; shape.chunk_bytes as usize];
    let end = known.min(shape.origin_bytes() / shape.chunk_bytes);
    for chunk in (0..end).filter(|chunk| !noted.contains(chunk)) {
        let at = (ORIGIN, Chunk(chunk).to_offset(shape.shift()));
        let read = read(machine, at, &mut buffer);
        read.map_err(|error| format!("bookmark {tag}: origin chunk {chunk}: {error}"))?;
        if !bookmark.chunks[chunk as usize].allows(&buffer) {
            return Err(format!(
                "bookmark {tag} does not know that origin chunk {chunk} changed"
            ));
        }
    }
    let live: Vec<_> = store.snapshots();
    for to in live.iter().filter(|to| to.state == SnapState::Live) {
        let changes = store.changes(Some(tag), to.tag);
        let mut changes = changes.map_err(|refused| format!("bookmark {tag}: {refused}"))?;
        let mut runs = Vec::new();
        loop {
            let step = store.changes_step(&mut changes, &mut runs, usize::MAX);
            let more = step.map_err(|error| format!("bookmark {tag}: {error}"))?;
            if !more.map_err(|refused| format!("bookmark {tag}: {refused}"))? {
                break;
            }
        }
        let listed: BTreeSet<u64> = runs
            .iter()
            .flat_map(|run| run.first.0..run.first.0 + run.chunks)
            .collect();
        let end = to.length.to_whole_chunks(shape.shift()).min(known);
        for chunk in (0..end).filter(|chunk| !listed.contains(chunk)) {
            let at = locate(shape, store, to.tag.0, Chunk(chunk))?;
            let read = read(machine, at, &mut buffer);
            read.map_err(|error| format!("snapshot {}: chunk {chunk}: {error}", to.tag))?;
            if !bookmark.chunks[chunk as usize].allows(&buffer) {
                return Err(format!(
                    "bookmark {tag} does not list chunk {chunk} of snapshot {}",
                    to.tag
                ));
            }
        }
    }
    Ok(())
}

fn check_sizes(store: &Store, before: &Model, after: &Model) -> Result<(), String> {
    // The origin is as long as its device, which grows before a resize and is cut after it.
    let used = |sizes: Sizes| (sizes.store, sizes.meta);
    let found = store.sizes();
    if [before, after]
        .map(|model| used(model.sizes))
        .contains(&used(found))
    {
        return Ok(());
    }
    let (before, after) = (before.sizes, after.sizes);
    Err(format!("{found:?} is neither {before:?} nor {after:?}"))
}

fn check_origin(shape: &Shape, machine: &Machine, models: &[&Model]) -> Result<(), String> {
    let chunks = models.iter().map(|model| model.origin.len()).max();
    for index in 0..chunks.unwrap_or(0) {
        let place = (ORIGIN, Chunk(index as u64).to_offset(shape.shift()));
        let what = || format!("origin chunk {index}");
        let allowed = models.iter().filter_map(|model| model.origin.get(index));
        check_chunk(machine, place, allowed, what)?;
    }
    Ok(())
}

/// What lies at a place must be what one of two chunks may have.
fn check_chunk<'a>(
    machine: &Machine,
    (disk, offset): (usize, u64),
    mut allowed: impl Iterator<Item = &'a super::model::Chunk> + Clone,
    what: impl Fn() -> String,
) -> Result<(), String> {
    if allowed
        .clone()
        .any(|chunk| machine.holds(disk, offset, &chunk.now))
    {
        return Ok(());
    }
    let wanted: Vec<u64> = allowed.clone().map(|chunk| stamp(&chunk.now)).collect();
    let bytes = allowed.clone().map(|chunk| chunk.now.len()).max();
    let mut found = vec![0; bytes.unwrap_or(0)];
    if let Err(error) = read(machine, (disk, offset), &mut found) {
        // A write that was under way may have torn it; what is durable can be read.
        return match allowed.any(|chunk| !chunk.earlier.is_empty()) {
            true => Ok(()),
            false => Err(format!("{}: {error}", what())),
        };
    }
    if allowed.any(|chunk| chunk.allows(&found)) {
        return Ok(());
    }
    let found = stamp(&found);
    Err(format!(
        "{} has content {found}, expected one of {wanted:?}",
        what()
    ))
}

fn stamp(bytes: &[u8]) -> u64 {
    let mut stamp = [0; 8];
    stamp.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(stamp)
}
