// SPDX-License-Identifier: GPL-2.0-only
//! Whether somebody wrote to the origin without this store: then its snapshots may show newer data as if it
//! were old, and are *doubtful* for good.
//!
//! Four things tell, from the strongest on; ARCHITECTURE.md says what each of them can and cannot see.
//! - The *fingerprint*: at an orderly end with no device of the origin left, what the places held that any mount
//!   writes to.
//! - The *guards*: what some chunks held that were not written since the newest snapshot. As long as that lives
//!   and no exception serves it there, nobody wrote them through the target: a copy would have come before.
//! - The *identity*: without a fingerprint, what kind of file system is there and its UUID, against what the snapshots
//!   show and what was noted.
//! - The *boot*: who opens the store first after the machine came up, and finds a file system that was written
//!   since then.

use super::Store;
use super::contents::{self, Contents, HEAD, digest, holds, identify, look, read};
use super::error::StoreError;
use super::media::Source;
use crate::buffer::AlignedBuf;
use crate::format::journal::Entry;
use crate::format::origin::{Content, Guard, MAX_DEVICE, MAX_GUARDS, OriginRecord};
use crate::format::snaptable::Snapshot;
use crate::promise::kept;
use crate::units::{Chunk, SECTOR_BYTES, SnapSeq};

/// The chunks that hold these bytes are guarded: superblocks and what lies beside them.
const GUARDED: [u64; MAX_GUARDS] = [0, 512, 1024, 4096, 8192, 16384, 32768, 65536];

/// What the store cannot know by itself when it is opened.
#[derive(Clone, Debug, Default)]
pub struct Surroundings {
    /// A name of the origin's device that lasts; empty: there is none.
    pub device: String,
    /// The kernel's id of this boot; zeros: not known.
    pub boot: [u8; 16],
    /// When the machine came up, in seconds since 1970-01-01 UTC; none: its clock cannot be relied on.
    pub up_since: Option<i64>,
    /// The time now, in seconds since 1970-01-01 UTC; 0: not known.
    pub now: i64,
    /// The administrator knows that the origin was written: snapshots and bookmarks become doubtful, and the store
    /// goes on.
    pub accept: bool,
}

/// Who may have written to the origin when the store is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OriginUse {
    /// No device of it is left at the target, and no write is under way.
    Unused,
    /// Devices may be left, which write without a server.
    InUse,
    /// Nobody, since the store was opened.
    Untouched,
}

impl Store {
    /// What tells that the origin was written without this store, in half a sentence.
    pub(super) fn find_foreign(
        &mut self,
        now: &Surroundings,
    ) -> Result<Option<String>, StoreError> {
        let record = self.state.origin_record.clone();
        let read = self.judge(&record, now)?;
        Ok(read.map(|what| match moved(&record, now) {
            true => format!("it is '{}' and was '{}'; {what}", now.device, record.device),
            false => what,
        }))
    }

    fn judge(
        &mut self,
        record: &OriginRecord,
        now: &Surroundings,
    ) -> Result<Option<String>, StoreError> {
        // What cannot be read says nothing: a bad sector of the origin must not keep the store closed.
        let identified = identify(&mut *self.media.origin);
        let is_known = identified.is_ok();
        let found = identified.unwrap_or_default();
        let mut fits = false;
        let compares = kept!(
            "fingerprint-compared",
            "what was mounted while the volume was stopped would be taken for what the store knows"
        );
        for area in record.areas.iter().filter(|_| compares) {
            match holds(&mut *self.media.origin, area) {
                // It was cut.
                Ok(None) | Err(_) => {}
                Ok(Some(digest)) if digest == area.digest => fits = true,
                Ok(Some(_)) => {
                    let first = area.sector * SECTOR_BYTES;
                    let last = first + u64::from(area.sectors) * SECTOR_BYTES - 1;
                    return Ok(Some(difference(record, &found, first, last)));
                }
            }
        }
        for guard in self.valid_guards(record)? {
            let (start, len) = self.bytes_of(guard.chunk);
            let bytes = read(&mut *self.media.origin, start, len);
            let compares = kept!(
                "guards-compared",
                "after a crash nothing would tell that somebody mounted the origin"
            );
            if compares && bytes.is_ok_and(|bytes| short_digest(&bytes) != guard.digest) {
                return Ok(Some(difference(record, &found, start, start + len - 1)));
            }
        }
        let asks = kept!(
            "identity-compared",
            "after a crash another disk under the origin's name would be taken for it"
        );
        if asks && is_known && !fits {
            let other = self.other_identity(record, (found.content, found.uuid), now)?;
            if other.is_some() {
                return Ok(other);
            }
        }
        // Not its last write: a machine's clock may run ahead of the one that it comes up with, and a file system
        // writes until the power goes, while it is mounted once.
        let (Some(mounted), Some(up)) = (found.mounted, now.up_since) else {
            return Ok(None);
        };
        let other_boot = record.boot != [0; 16] && now.boot != [0; 16] && record.boot != now.boot;
        // A clock that once was ahead of what it is now tells nothing.
        let told = kept!(
            "mounted-before-the-volume",
            "an origin that was written at boot before its volume was there would be taken as it is"
        ) && other_boot
            && record.areas.is_empty()
            && record.seen < up;
        Ok((told && (up..=now.now).contains(&mounted)).then(|| {
            format!(
                "its {} was mounted or checked at {}, after the machine came up and before this store was opened",
                name_of(found.content),
                time(mounted)
            )
        }))
    }

    /// Whether what is there is neither what a snapshot shows nor what was noted since the newest one. A disk of the
    /// same geometry fits all guards that are left once its superblock was copied out.
    fn other_identity(
        &mut self,
        record: &OriginRecord,
        found: Identity,
        now: &Surroundings,
    ) -> Result<Option<String>, StoreError> {
        let (trusted, newest) = self.trusted();
        let Some(newest) = newest.filter(|_| trusted > 0) else {
            return Ok(None); // Nothing to lose.
        };
        let noted = (record.content, record.uuid);
        // Noted with a superblock; of a newer snapshot it says nothing.
        let is_noted = record.sectors != 0 && newest < self.superblock.next_seq;
        if is_noted && found == noted {
            return Ok(None);
        }
        let moved = moved(record, now);
        if is_noted && moved {
            return Ok(Some(other(found, "where it had", noted)));
        }
        // While a machine is up a disk does not change under its name, and a device of the origin may have written
        // this while no server was there.
        if record.boot != [0; 16] && record.boot == now.boot && !moved {
            return Ok(None);
        }
        let snapshots = &self.state.snapshots;
        let live: Vec<Snapshot> = (snapshots.live().keys().rev())
            .filter_map(|&seq| snapshots.get(SnapSeq(seq)).copied())
            .collect();
        let Some(newest) = live.first().filter(|newest| !newest.doubtful) else {
            return Ok(None);
        };
        let Some(wanted) = self.shown(newest)? else {
            return Ok(None);
        };
        if wanted == found {
            return Ok(None);
        }
        // An older one may have been what the origin was reverted to.
        for snapshot in &live[1..] {
            if self.shown(snapshot)? == Some(found) {
                return Ok(None);
            }
        }
        let text = "where the newest snapshot has";
        Ok(Some(other(found, text, wanted)))
    }

    /// What a snapshot has of the origin where signatures are; none if that cannot be read.
    fn shown(&mut self, snapshot: &Snapshot) -> Result<Option<Identity>, StoreError> {
        let shift = self.media.chunk;
        let len = snapshot.length.to_bytes().min(HEAD);
        let (mut sources, mut saved) = (Vec::new(), Vec::new());
        for chunk in (0..len.div_ceil(shift.bytes())).map(Chunk) {
            let exception = self.exception(snapshot.seq, chunk)?;
            sources.push(match exception {
                Some((place, _)) => Source::Store(place),
                None if self.origin_reaches(snapshot, chunk) => Source::Origin(chunk),
                None => return Ok(None),
            });
            saved.push((chunk, exception));
        }
        let mut bytes = AlignedBuf::zeroed(sources.len() << shift.get());
        if self.media.read_chunks(&sources, &mut bytes).is_err() {
            return Ok(None);
        }
        let parts = bytes.chunks_exact(shift.bytes() as usize);
        for ((chunk, exception), part) in saved.into_iter().zip(parts) {
            let proven = exception
                .is_none_or(|(place, crc)| self.media.prove(chunk, place, crc, part).is_ok());
            if !proven {
                return Ok(None);
            }
        }
        Ok(Some(contents::identity(&bytes[..len as usize])))
    }

    /// Guards that still say something: their snapshot lives or is a bookmark, and the chunk was not written since.
    fn valid_guards(&mut self, record: &OriginRecord) -> Result<Vec<Guard>, StoreError> {
        let mut valid = Vec::new();
        for &guard in &record.guards {
            if self.is_guardable(record.guard_seq, guard.chunk)? {
                valid.push(guard);
            }
        }
        Ok(valid)
    }

    /// Whether a write to this chunk since snapshot or bookmark `seq` would have left an entry, and did not.
    fn is_guardable(&mut self, seq: SnapSeq, chunk: Chunk) -> Result<bool, StoreError> {
        let snapshots = &self.state.snapshots;
        let kept = snapshots
            .get(seq)
            .is_some_and(|s| snapshots.is_keeper(seq.0) && snapshots.has(s, chunk));
        if !kept
            || snapshots
                .newest_keeper_with(chunk)
                .is_none_or(|newest| newest < seq)
        {
            return Ok(false);
        }
        let whole = chunk
            .0
            .checked_add(1)
            .is_some_and(|end| end <= self.media.origin.len_bytes() >> self.media.chunk.get());
        Ok(whole && self.first_entry(seq, chunk)?.is_none())
    }

    fn bytes_of(&self, chunk: Chunk) -> (u64, u64) {
        (chunk.to_offset(self.media.chunk), self.media.chunk.bytes())
    }

    /// Entries that guard what was not written since the newest live snapshot or bookmark. What cannot be read is
    /// not guarded.
    pub(super) fn guards(&mut self, seq: SnapSeq, created: bool) -> Result<Vec<Entry>, StoreError> {
        let mut chunks: Vec<Chunk> = GUARDED
            .iter()
            .map(|&byte| Chunk(byte >> self.media.chunk.get()))
            .collect();
        chunks.dedup();
        let mut entries = Vec::new();
        for chunk in chunks {
            let (start, len) = self.bytes_of(chunk);
            let guarded = match created {
                // It is about to be created: nothing is copied out for it.
                true => start + len <= self.media.origin.len_bytes(),
                false => self.is_guardable(seq, chunk)?,
            };
            if !guarded {
                continue;
            }
            if let Ok(bytes) = read(&mut *self.media.origin, start, len) {
                let digest = short_digest(&bytes);
                entries.push(Entry::Guard { seq, chunk, digest });
            }
        }
        Ok(entries)
    }

    /// Notes what is known of the origin now. The rest of the record stays.
    pub(super) fn note_origin(&mut self, now: &Surroundings) {
        let found = identify(&mut *self.media.origin).unwrap_or_default();
        let record = &mut self.state.origin_record;
        if !now.device.is_empty() {
            let mut end = now.device.len().min(MAX_DEVICE);
            while !now.device.is_char_boundary(end) {
                end -= 1;
            }
            record.device = now.device[..end].to_owned();
        }
        record.sectors = self.media.origin.len_bytes() / SECTOR_BYTES;
        (record.content, record.uuid) = (found.content, found.uuid);
    }

    /// Notes what is on the origin now, as mkfs or `tune2fs -U` on the target may have left it: the next start is not
    /// to take that for another disk. What cannot be read stays as it was noted.
    pub(super) fn note_identity(&mut self) {
        if let Ok(found) = identify(&mut *self.media.origin) {
            let record = &mut self.state.origin_record;
            (record.content, record.uuid) = (found.content, found.uuid);
        }
    }

    /// The record for a store that is being closed.
    pub(super) fn closing_record(&mut self, origin: OriginUse, now: i64) -> OriginRecord {
        let fingerprint = match origin {
            OriginUse::Unused => true,
            OriginUse::Untouched => self.opened_untouched,
            OriginUse::InUse => false,
        };
        if fingerprint {
            let durable = match kept!(
                "fingerprint-of-what-is-durable",
                "a power cut after an orderly end would look like a foreign write"
            ) {
                true => self.media.flush_origin(),
                false => Ok(()),
            };
            let origin = &mut *self.media.origin;
            let taken = durable.and_then(|()| {
                let found = look(origin)?;
                let areas = found.areas(origin)?;
                Ok((found, areas))
            });
            let record = &mut self.state.origin_record;
            record.sectors = self.media.origin.len_bytes() / SECTOR_BYTES;
            if let Ok((found, areas)) = taken {
                (record.content, record.uuid) = (found.content, found.uuid);
                record.areas = areas;
            }
        }
        if !fingerprint {
            self.note_identity();
        }
        if now != 0 {
            self.state.origin_record.seen = now;
        }
        self.state.origin_record.clone()
    }

    /// Live snapshots and bookmarks that are not doubtful yet, and the newest of all.
    pub(super) fn trusted(&self) -> (usize, Option<SnapSeq>) {
        let snapshots = &self.state.snapshots;
        let kept = || snapshots.iter().filter(|s| snapshots.is_keeper(s.seq.0));
        let trusted = kept().filter(|s| !s.doubtful).count();
        (trusted, kept().next_back().map(|s| s.seq))
    }
}

/// Kind and UUID.
type Identity = (Content, [u8; 16]);

/// Whether the origin's device is another than was noted, as far as both have names that last.
fn moved(record: &OriginRecord, now: &Surroundings) -> bool {
    !record.device.is_empty() && !now.device.is_empty() && record.device != now.device
}

fn other(found: Identity, relation: &str, wanted: Identity) -> String {
    let [found, wanted] = [found, wanted].map(|(content, uuid)| described(content, uuid));
    format!("it has {found} {relation} {wanted}")
}

fn short_digest(bytes: &[u8]) -> u64 {
    let digest = digest(bytes);
    digest[..8]
        .iter()
        .rev()
        .fold(0, |all, &byte| all << 8 | u64::from(byte))
}

/// What differs, as plainly as it can be said.
fn difference(record: &OriginRecord, found: &Contents, first: u64, last: u64) -> String {
    let (now, noted) = ((found.content, found.uuid), (record.content, record.uuid));
    if now != noted {
        return other(now, "where it had", noted);
    }
    let since = match record.seen {
        0 => String::new(),
        seen => format!(" of {}", time(seen)),
    };
    match found.written {
        Some(written) if record.seen != 0 && written > record.seen => format!(
            "its {} was mounted or written at {}, after the server's last note{since}",
            name_of(found.content),
            time(written)
        ),
        _ => {
            format!("bytes {first} to {last} are not as they were at the server's last note{since}")
        }
    }
}

fn name_of(content: Content) -> &'static str {
    match content {
        Content::Unknown => "content",
        Content::Ext => "ext file system",
        Content::Xfs => "XFS",
        Content::Btrfs => "btrfs",
        Content::Swap => "swap space",
        Content::Lvm => "LVM physical volume",
        Content::Luks => "LUKS volume",
        Content::Partitions => "partition table",
    }
}

fn described(content: Content, uuid: [u8; 16]) -> String {
    match (content, uuid) {
        (Content::Unknown, _) => "nothing that is known".to_owned(),
        (_, [0, ..]) if uuid == [0; 16] => format!("the {}", name_of(content)),
        _ => format!("the {} {}", name_of(content), uuid::Uuid::from_bytes(uuid)),
    }
}

fn time(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).map_or_else(|_| seconds.to_string(), |t| t.to_string())
}
