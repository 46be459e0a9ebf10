// SPDX-License-Identifier: GPL-2.0-only
//! Opening a store: find the newest whole superblock, load what it leads to, replay the journal; all
//! that only reads ([`Store::recover`]), and reading without a server ends there (see `view`).
//!
//! Then the store is made fit to be changed. One that was closed begins a new epoch with a checkpoint.
//! One that crashed goes on in its ring, so that opening does not take longer the larger the index is:
//! 1. after a flush, a superblock copy is written anew, that which is older or damaged if there is one, and the next
//!    checkpoint writes the other one first: otherwise that could tear the only copy that is durable,
//!    after blocks that the older one needs were used again;
//! 2. the last record is written again, behind itself, with what counts of it and with its copies in other
//!    places: of a server that was killed, what recovery has read may still sit in a cache, and a cache may
//!    show what a failed flush has lost. It takes back what recovery left out, too. Without room for that, copies are
//!    written again where they are, if the origin still has the same.
//!
//! One of an older version, or whose origin has another length than it had, begins a new epoch after a crash
//! too: no ring holds two units, and recovery knows how much of the origin's last chunk was copied.
//!
//! Neither overwrites anything that recovery needs, so a crash in any of these finds what it found before.

use super::checkpoint::write_copy;
use super::error::StoreError;
use super::index::Index;
use super::index::tree;
use super::journal::Ring;
use super::media::{Devices, Media, Source, read_batch};
use super::metaalloc::MetaAlloc;
use super::recover::Last;
use super::snapshot::Snapshots;
use super::state::State;
use super::sweep::Sweep;
use super::{OpenOptions, Opened, Store, Surroundings, alloc::Space, recover};
use crate::buffer::AlignedBuf;
use crate::device::{BlockDevice, Read, Write};
use crate::format::BLOCK_LEN;
use crate::format::block::{Kind, Pointer};
use crate::format::journal::{Entry, MAX_RECORD_ENTRIES};
use crate::format::label::Label;
use crate::format::snaptable;
use crate::format::superblock::{COPIES, Superblock};
use crate::format::{FormatError, Version};
use crate::promise::kept;
use crate::units::{META_BLOCK_BYTES, MetaBlock, Sectors, SnapSeq};

impl Store {
    /// Opens the store on `devices`, after a crash too.
    ///
    /// # Errors
    /// There is no store, the devices do not belong to it, or it is damaged: then nothing was
    /// written.
    pub fn open(devices: Devices, options: &OpenOptions) -> Result<(Store, Opened), StoreError> {
        Store::open_in(devices, options, &Surroundings::default())
    }

    /// As [`open`](Self::open), with what tells better whether the origin was written without this store. If it
    /// was and is accepted, or there is no snapshot to lose, [`Opened::foreign`] says what tells it.
    ///
    /// # Errors
    /// As of [`open`](Self::open); or [`StoreError::Foreign`].
    pub fn open_in(
        devices: Devices,
        options: &OpenOptions,
        now: &Surroundings,
    ) -> Result<(Store, Opened), StoreError> {
        let Recovered {
            mut store,
            mut opened,
            last,
            unreadable,
        } = Store::recover(devices, options, &mut recover::ask_origin)?;
        if store.media.origin_length.0 == 0 {
            return Err(StoreError::WrongDevice {
                device: store.media.origin_name(),
                problem: "it is empty; is it the origin?".to_owned(),
            });
        }
        store.media.check_sectors()?;
        opened.foreign = store.find_foreign(now)?;
        let (trusted, newest) = store.trusted();
        let refuses = !now.accept
            && kept!(
                "foreign-refused",
                "an origin that somebody wrote to would be served, and its snapshots show new data as old"
            );
        if let (Some(what), true, 1..) = (&opened.foreign, refuses, trusted) {
            return Err(StoreError::Foreign {
                device: store.media.origin_name(),
                what: what.clone(),
                snapshots: trusted,
            });
        }
        store.opened_untouched =
            opened.foreign.is_none() && !store.state.origin_record.areas.is_empty();
        let notes = store.opening_notes(opened.foreign.is_some(), newest, now)?;
        let old = store.superblock.version != Version::V2;
        if !opened.clean {
            // Of a server that was killed in a checkpoint, the newest copy may still be in the disk's cache: a
            // power cut must not tear both. And where the last record cannot be written again, for lack of
            // room in the ring, the trees of a new epoch are going to lead to its copies.
            if kept!(
                "open-flushes",
                "the newest superblock copy may be in a cache only, and a power cut would tear both"
            ) {
                store.media.flush_both()?;
            }
            let copy = store.stale_copy.unwrap_or(1);
            // Of an old version nothing may be written as the new one before the checkpoint below, which begins
            // with this copy of the superblock.
            store.stale_copy = Some(copy);
            let writes = kept!(
                "open-writes-a-copy",
                "the next checkpoint could tear the only superblock copy that is durable"
            );
            if !old && writes {
                write_copy(&mut store.media, &store.superblock, copy)?;
                store.stale_copy = Some(1 - copy);
            }
            // Those of several power cuts together could look as if they hid records.
            let zeros = AlignedBuf::zeroed(BLOCK_LEN);
            let clear = unreadable.iter().map(|block| Write {
                offset: block.to_offset(),
                from: &zeros,
            });
            if kept!(
                "unreadable-cleared",
                "blocks that several power cuts left unreadable would look as if they hid acknowledged records"
            ) {
                store.media.write_meta(&clear.collect::<Vec<_>>())?;
            }
            let again = kept!(
                "last-record-again",
                "what recovery read may be in a cache only, and what is written next would outlive it"
            );
            if let Some(last) = last.filter(|_| !old && again) {
                store.write_again(&last)?;
            }
            store.recovered = true;
        }
        if opened.clean || old || store.media.origin_length != store.superblock.origin {
            // In one superblock: that the snapshots are doubtful, and that what told it is gone.
            notes.iter().for_each(|entry| store.state.apply(entry));
            store.begin_epoch()?;
        } else if !notes.is_empty() {
            store.record(&notes)?;
        }
        Ok((store, opened))
    }

    /// What opening has to record of the origin. After a crash that is nothing in the boot that is recorded:
    /// opening then writes no more than it must.
    fn opening_notes(
        &mut self,
        foreign: bool,
        newest: Option<SnapSeq>,
        now: &Surroundings,
    ) -> Result<Vec<Entry>, StoreError> {
        let mut notes = Vec::new();
        if foreign {
            if kept!(
                "accepted-origin-durable",
                "a power cut would take back what was accepted, and the guards of it would tell of a new foreign write"
            ) {
                let flushed = self.media.flush_origin();
                flushed.map_err(|source| StoreError::FlushOrigin {
                    device: self.media.origin_name(),
                    source,
                })?;
            }
            if kept!(
                "accepted-is-doubtful",
                "snapshots of an origin that was accepted would look as if nothing had happened"
            ) {
                notes.extend(newest.map(Entry::Doubtful));
            }
        }
        let length = self.media.origin_length;
        if self.state.snapshots.has_longer_bookmark(length) {
            notes.push(Entry::CutBookmarks(length));
        }
        let record = &self.state.origin_record;
        if foreign || !record.areas.is_empty() || record.boot != now.boot {
            let (boot, seen) = (now.boot, now.now);
            notes.push(Entry::Opened { boot, seen });
        }
        self.note_origin(now);
        if !notes.is_empty() {
            if let Some(seq) = newest {
                notes.extend(self.guards(seq, false)?);
            }
        }
        Ok(notes)
    }

    fn begin_epoch(&mut self) -> Result<(), StoreError> {
        self.checkpoint_with(|next| {
            next.epoch += 1;
            next.tail = 0;
            next.tail_sequence = 1;
        })
    }

    /// Makes durable what counts of the last record, without overwriting anything of it.
    fn write_again(&mut self, last: &Last) -> Result<(), StoreError> {
        let copies: Vec<Source> = last
            .entries
            .iter()
            .filter_map(|entry| match *entry {
                Entry::Exception { place, .. } => Some(Source::Store(place)),
                _ => None,
            })
            .collect();
        let mut places = self
            .state
            .space
            .find_free(&mut self.media, copies.len(), self.budget)?;
        if places.len() < copies.len() {
            // No room: they stay where they are, and are written there again.
            places.clear();
        }
        let mut buffer = AlignedBuf::zeroed(places.len() << self.superblock.chunk.get());
        self.media
            .read_chunks(&copies[..places.len()], &mut buffer)?;
        let mut record = vec![Entry::Again { first: last.first }];
        let mut free = places.iter().copied();
        record.extend(last.entries.iter().map(|entry| match *entry {
            Entry::Exception {
                chunk,
                seq,
                place,
                crc,
            } => Entry::Exception {
                chunk,
                seq,
                place: free.next().unwrap_or(place),
                crc,
            },
            other => other,
        }));
        let fits = record.len() <= MAX_RECORD_ENTRIES;
        let placed = fits.then(|| self.ring.place(&record)).flatten();
        if placed.is_none() || places.len() < copies.len() {
            self.write_in_place(last)?;
        }
        let Some(placed) = placed else {
            // No room: the old ring is not needed any more after a checkpoint under a new epoch.
            return self.begin_epoch();
        };
        let (shift, chunk_bytes) = (self.superblock.chunk, self.superblock.chunk.bytes());
        let parts = buffer.chunks_exact(chunk_bytes as usize);
        let writes = places.iter().zip(parts).map(|(place, from)| Write {
            offset: place.to_offset(shift),
            from,
        });
        let meta = Write {
            offset: placed.at.to_offset(),
            from: &placed.bytes,
        };
        self.media.write_both(writes.collect(), meta)?;
        if kept!(
            "again-durable",
            "the origin is written after opening, and the copy would be lost"
        ) {
            self.media.flush_both()?;
        }
        self.ring.advance(&placed);
        for (old, new) in last.entries.iter().zip(&record[1..]) {
            if let (
                &Entry::Exception {
                    chunk, seq, place, ..
                },
                true,
            ) = (old, old != new)
            {
                let state = &mut self.state;
                state.apply(&Entry::RemoveException { chunk, seq, place });
                state.apply(new);
                if kept!(
                    "moved-copies-rest",
                    "a snapshot's read that the server before had answered, and that waits at a slow disk, would get another chunk"
                ) {
                    state.space.rest(place);
                }
            }
        }
        Ok(())
    }

    /// Makes those copies of the last record durable, where they are, that may have been lost by a flush that
    /// failed: then nobody was answered, and the origin still has what they hold. Of the others the
    /// flush has succeeded; to write them again would put them at risk.
    fn write_in_place(&mut self, last: &Last) -> Result<(), StoreError> {
        let mut places = Vec::new();
        for entry in &last.entries {
            if let &Entry::Exception { place, .. } = entry {
                let unanswered = recover::ask_origin(&mut self.media, entry).is_ok();
                places.extend(unanswered.then_some(place));
            }
        }
        if places.is_empty() {
            return Ok(());
        }
        let shift = self.superblock.chunk;
        let sources: Vec<_> = places.iter().map(|&place| Source::Store(place)).collect();
        let mut buffer = AlignedBuf::zeroed(places.len() << shift.get());
        self.media.read_chunks(&sources, &mut buffer)?;
        let parts = buffer.chunks_exact(shift.bytes() as usize);
        let writes = places.iter().zip(parts).map(|(place, from)| Write {
            offset: place.to_offset(shift),
            from,
        });
        let writes: Vec<_> = writes.collect();
        if kept!(
            "copies-again-in-place",
            "a copy that a failed flush had lost is read from a cache, and gone when the power is"
        ) {
            self.media.write_data(&writes)?;
            self.media.flush_data()?;
        }
        Ok(())
    }

    /// The store as superblock, trees and journal say it is, in memory: everything that opening does
    /// before it writes. Nothing may be changed before the rest was done (see the module).
    ///
    /// # Errors
    /// There is no store, the devices do not belong to it, or it is damaged.
    pub(crate) fn recover(
        mut devices: Devices,
        options: &OpenOptions,
        unwritten: &mut recover::Unwritten<'_>,
    ) -> Result<Recovered, StoreError> {
        let (superblock, stale_copy) = read_superblock(&mut devices)?;
        check_devices(&mut devices, &superblock)?;
        let origin_device = Sectors::in_bytes(devices.origin.len_bytes());
        let mut media = Media::new(devices, &superblock, options.cache_bytes);
        let mut state = load_state(&mut media, &superblock, &mut Err)?;
        let meta = find_used_blocks(&mut media, &superblock, &state)?;
        let mut opened = Opened {
            clean: superblock.clean,
            replayed_records: 0,
            dropped_records: 0,
            origin: superblock.origin,
            foreign: None,
        };
        let mut ring = Ring::new(&superblock);
        let (mut last, mut unreadable) = (None, Vec::new());
        if !superblock.clean {
            let replayed = recover::replay(
                &mut media,
                &superblock,
                &mut state,
                &mut opened,
                &mut recover::Damage::Refuse,
                unwritten,
            )?;
            (ring, last, unreadable) = (replayed.ring, replayed.last, replayed.unreadable);
        }
        media.origin_length = origin_device;
        if kept!(
            "squashed-drain-after-open",
            "chunks of a squashed snapshot would be freed while its device may still write there"
        ) {
            state.snapshots.drain_all_squashed();
        }
        Ok(Recovered {
            store: Store::from_parts(media, superblock, stale_copy, state, meta, ring),
            opened,
            last,
            unreadable,
        })
    }

    /// A store of what is in memory.
    pub(crate) fn from_parts(
        media: Media,
        superblock: Superblock,
        stale_copy: Option<usize>,
        state: State,
        meta: MetaAlloc,
        ring: Ring,
    ) -> Store {
        let mut sweep = Sweep::default();
        if state
            .snapshots
            .iter()
            .any(|snapshot| snapshot.state != snaptable::State::Live)
        {
            sweep.want();
        }
        Store {
            media,
            superblock,
            stale_copy,
            state,
            meta,
            ring,
            sweep,
            copies: AlignedBuf::default(),
            checkpoint: None,
            recovered: false,
            failed: None,
            given_up: Vec::new(),
            sparing: false,
            need: None,
            troubles: Vec::new(),
            hindered: (0, 0),
            resizing: None,
            budget: super::Budget::default(),
            revert: super::revert::Revert::default(),
            opened_untouched: false,
        }
    }
}

/// A store in memory, before anything was written.
pub(crate) struct Recovered {
    pub store: Store,
    pub opened: Opened,
    /// The last record.
    pub last: Option<Last>,
    /// Blocks of the ring to be written, so that they can be read again.
    pub unreadable: Vec<MetaBlock>,
}

fn read_superblock(devices: &mut Devices) -> Result<(Superblock, Option<usize>), StoreError> {
    let copies = read_copies(devices);
    let device = devices.meta.as_deref().unwrap_or(&*devices.data);
    choose(device.name(), copies)
}

/// Both copies of the superblock, each if it is whole.
pub(super) fn read_copies(devices: &mut Devices) -> [Result<Superblock, FormatError>; 2] {
    let device = devices.meta.as_mut().unwrap_or(&mut devices.data);
    [read_copy(&mut **device, 0), read_copy(&mut **device, 1)]
}

/// The copy that counts, and which one is not the same.
pub(super) fn choose(
    device: &str,
    copies: [Result<Superblock, FormatError>; 2],
) -> Result<(Superblock, Option<usize>), StoreError> {
    let newer =
        |copy: &Result<Superblock, FormatError>| matches!(copy, Err(FormatError::Version { .. }));
    let [first, second] = copies;
    if newer(&first) || newer(&second) {
        let error = if newer(&first) {
            first.err()
        } else {
            second.err()
        };
        let problem = error
            .map(|error| format!("{error}; use a newer ddsnap"))
            .unwrap_or_default();
        return Err(StoreError::WrongDevice {
            device: device.to_owned(),
            problem,
        });
    }
    match (first, second) {
        // A copy that cannot be read is no loss: the other is as new, or one complete step older
        // with all that it needs still in place.
        (Ok(a), Ok(b)) if a.generation == b.generation => Ok((a, None)),
        (Ok(a), Ok(b)) if a.generation > b.generation => Ok((a, Some(1))),
        (Ok(_), Ok(b)) => Ok((b, Some(0))),
        (Ok(a), Err(_)) => Ok((a, Some(1))),
        (Err(_), Ok(b)) => Ok((b, Some(0))),
        (Err(first), Err(second)) => Err(StoreError::NoStore {
            device: device.to_owned(),
            problem: format!("{first}; its copy: {second}"),
        }),
    }
}

fn read_copy(device: &mut dyn BlockDevice, copy: usize) -> Result<Superblock, FormatError> {
    let mut bytes = AlignedBuf::zeroed(BLOCK_LEN);
    let offset = COPIES[copy].to_offset();
    if device.len_bytes() < offset + META_BLOCK_BYTES {
        return Err(FormatError::Malformed {
            what: "superblock",
            problem: "the device ends before it",
        });
    }
    device
        .read(&mut [Read {
            offset,
            into: &mut bytes,
        }])
        .map_err(|_| FormatError::Malformed {
            what: "superblock",
            problem: "it cannot be read",
        })?;
    Superblock::decode(&bytes, copy as u32)
}

pub(super) fn check_devices(
    devices: &mut Devices,
    superblock: &Superblock,
) -> Result<(), StoreError> {
    let wrong = |device: &dyn BlockDevice, problem: String| {
        Err(StoreError::WrongDevice {
            device: device.name().to_owned(),
            problem,
        })
    };
    let meta: &dyn BlockDevice = devices.meta.as_deref().unwrap_or(&*devices.data);
    match (superblock.separate_meta, devices.meta.is_some()) {
        (true, false) => {
            return wrong(
                meta,
                "it holds only the metadata of a store; name the data device and this one".into(),
            );
        }
        (false, true) => {
            return wrong(
                meta,
                "it holds a whole store; name it alone, without a metadata device".into(),
            );
        }
        _ => {}
    }
    let data_bytes = superblock.data_end.to_offset(superblock.chunk);
    if devices.data.len_bytes() < data_bytes {
        let problem = format!(
            "it has {} bytes, the store on it {data_bytes}: make it as long again",
            devices.data.len_bytes()
        );
        return wrong(&*devices.data, problem);
    }
    let journal_end = superblock.journal_first.0 + superblock.journal_blocks;
    let ends = superblock
        .extents
        .iter()
        .map(|extent| extent.first.0 + extent.blocks);
    let meta_bytes = ends
        .fold(journal_end, u64::max)
        .saturating_mul(META_BLOCK_BYTES);
    if meta.len_bytes() < meta_bytes {
        let problem = format!(
            "it has {} bytes, the store's metadata {meta_bytes}: make it as long again",
            meta.len_bytes()
        );
        return wrong(meta, problem);
    }
    for device in [&devices.origin, &devices.data] {
        if device.alignment() as u64 > superblock.chunk.bytes() {
            let problem = format!(
                "its sectors are larger than the store's chunks of {} bytes",
                superblock.chunk.bytes()
            );
            return wrong(&**device, problem);
        }
    }
    if superblock.separate_meta {
        let mut bytes = AlignedBuf::zeroed(BLOCK_LEN);
        read_batch(
            &mut *devices.data,
            &mut [Read {
                offset: 0,
                into: &mut bytes,
            }],
        )?;
        match Label::decode(&bytes) {
            Ok(label) if label.uuid == superblock.uuid && label.chunk == superblock.chunk => {}
            Ok(_) => {
                return wrong(
                    &*devices.data,
                    "it belongs to another store than the metadata device".into(),
                );
            }
            Err(error) => return wrong(&*devices.data, format!("it belongs to no store: {error}")),
        }
    }
    Ok(())
}

/// The state of the last checkpoint. `wrong` is told what is wrong with the snapshot table.
pub(super) fn load_state(
    media: &mut Media,
    superblock: &Superblock,
    wrong: &mut dyn FnMut(StoreError) -> Result<(), StoreError>,
) -> Result<State, StoreError> {
    let snapshots = Snapshots::load(media, superblock, wrong)?;
    if let Some(newest) = snapshots.iter().next_back() {
        if newest.seq >= superblock.next_seq {
            let problem = format!(
                "snapshot sequence {} is not below {}",
                newest.seq, superblock.next_seq
            );
            wrong(media.inconsistent(problem))?;
        }
    }
    if let Some(revert) = superblock.revert {
        let live = |s: &snaptable::Snapshot| s.state == snaptable::State::Live;
        if !snapshots.get(revert.seq).is_some_and(live) {
            let problem = format!(
                "a revert to snapshot sequence {}, which is not live",
                revert.seq
            );
            wrong(media.inconsistent(problem))?;
        }
    }
    let mut space = Space::new(
        superblock.space,
        superblock.data_first,
        superblock.data_end,
        superblock.data_used,
    );
    space.set_region(superblock.data_end, superblock.holes());
    Ok(State {
        next_seq: superblock.next_seq,
        revert: superblock.revert,
        origin_record: superblock.origin_record.clone().unwrap_or_default(),
        snapshots,
        exceptions: Index::new(Kind::Exceptions, superblock.exceptions),
        overlays: Index::new(Kind::Overlays, superblock.overlays),
        space,
    })
}

/// Walks everything the superblock leads to and notes the blocks it takes.
fn find_used_blocks(
    media: &mut Media,
    superblock: &Superblock,
    state: &State,
) -> Result<MetaAlloc, StoreError> {
    let mut meta = MetaAlloc::new(&superblock.extents);
    let take = |meta: &mut MetaAlloc, block: MetaBlock| {
        if meta.take(block) {
            Ok(())
        } else {
            Err(format!(
                "block {block} is used twice or lies outside the region"
            ))
        }
    };
    for &block in state.snapshots.blocks() {
        take(&mut meta, block).map_err(|problem| media.inconsistent(problem))?;
    }
    for (kind, root) in [
        (Kind::Exceptions, &superblock.exceptions),
        (Kind::Overlays, &superblock.overlays),
        (Kind::Space, &superblock.space),
    ] {
        let mut visit = |pointer: Pointer| take(&mut meta, pointer.block);
        let nodes = tree::walk(media, kind, root, &mut visit)?;
        if nodes != root.nodes {
            let problem = format!(
                "a tree has {nodes} nodes, the superblock says {}",
                root.nodes
            );
            return Err(media.inconsistent(problem));
        }
    }
    let bitmaps = Index::new(Kind::Space, superblock.space);
    let mut from = Some((0, 0));
    while let Some(key) = from {
        let scan = bitmaps.scan(media, key, 1024)?;
        for (_, value) in &scan.found {
            take(&mut meta, MetaBlock(value.place))
                .map_err(|problem| media.inconsistent(problem))?;
        }
        from = scan.next;
    }
    Ok(meta)
}
