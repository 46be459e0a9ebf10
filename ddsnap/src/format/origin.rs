// SPDX-License-Identifier: GPL-2.0-only
//! The origin record: which origin a store belongs to, and what was on it where any mount would write.
//!
//! It lies in the superblock, whose checksum covers it.

use super::{FormatError, bound, expect, get_u32, get_u64, put_u32, put_u64};
use crate::units::{Chunk, SnapSeq};

/// Bytes of the record.
pub const LEN: usize = 1024;
/// The longest name of a device, in bytes; longer ones are cut.
pub const MAX_DEVICE: usize = 128;
/// The most chunks that are guarded.
pub const MAX_GUARDS: usize = 8;
/// The most areas of a fingerprint.
pub const MAX_AREAS: usize = 14;
/// The longest area, in sectors: 1 MiB.
pub const MAX_AREA_SECTORS: u32 = 2048;

const KIND_AT: usize = 0;
const COUNTS_AT: usize = KIND_AT + 4; // areas, guards, bytes of the name, reserved
const SECTORS_AT: usize = COUNTS_AT + 4;
const UUID_AT: usize = SECTORS_AT + 8;
const BOOT_AT: usize = UUID_AT + 16;
const SEEN_AT: usize = BOOT_AT + 16;
const GUARD_SEQ_AT: usize = SEEN_AT + 8;
const GUARDS_AT: usize = GUARD_SEQ_AT + 8;
const GUARD_LEN: usize = 16;
const DEVICE_AT: usize = GUARDS_AT + MAX_GUARDS * GUARD_LEN;
const AREAS_AT: usize = DEVICE_AT + MAX_DEVICE;
const AREA_LEN: usize = 48;
const END: usize = AREAS_AT + MAX_AREAS * AREA_LEN;

const WHAT: &str = "origin record";

/// What a device holds, by its signature.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Content {
    /// Nothing that is known.
    #[default]
    Unknown = 0,
    /// ext2, ext3 or ext4.
    Ext = 1,
    /// XFS.
    Xfs = 2,
    /// btrfs.
    Btrfs = 3,
    /// Swap space.
    Swap = 4,
    /// A physical volume of LVM.
    Lvm = 5,
    /// A LUKS volume.
    Luks = 6,
    /// A partition table.
    Partitions = 7,
}

impl Content {
    fn of(number: u32) -> Option<Content> {
        use Content::{Btrfs, Ext, Luks, Lvm, Partitions, Swap, Unknown, Xfs};
        [Unknown, Ext, Xfs, Btrfs, Swap, Lvm, Luks, Partitions]
            .into_iter()
            .find(|&content| content as u32 == number)
    }
}

/// A piece of the origin and the SHA-256 of what it held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Its first sector of 512 bytes.
    pub sector: u64,
    /// Its length, 1 to [`MAX_AREA_SECTORS`].
    pub sectors: u32,
    /// What it held.
    pub digest: [u8; 32],
}

/// A chunk of the origin that has not been written since a snapshot, and what it held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guard {
    /// Which chunk.
    pub chunk: Chunk,
    /// The first 8 bytes of the SHA-256 of what it held.
    pub digest: u64,
}

/// What is known of the origin.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OriginRecord {
    /// A name of its device that lasts; empty: not known.
    pub device: String,
    /// Its length in sectors of 512 bytes; 0: not known.
    pub sectors: u64,
    /// What was on it.
    pub content: Content,
    /// The UUID of that; zeros: none.
    pub uuid: [u8; 16],
    /// The kernel's id of the boot in which the store was last opened; zeros: not known.
    pub boot: [u8; 16],
    /// When this was noted, in seconds since 1970-01-01 UTC; 0: not known.
    pub seen: i64,
    /// The snapshot since which the guarded chunks were not written; 0 without any.
    pub guard_seq: SnapSeq,
    /// At most [`MAX_GUARDS`].
    pub guards: Vec<Guard>,
    /// The fingerprint: at most [`MAX_AREAS`]. None: the origin may be in use.
    pub areas: Vec<Area>,
}

impl OriginRecord {
    /// The record's bytes.
    pub fn encode(&self, b: &mut [u8]) {
        put_u32(b, KIND_AT, self.content as u32);
        let device = self.device.as_bytes();
        b[COUNTS_AT] = self.areas.len() as u8;
        b[COUNTS_AT + 1] = self.guards.len() as u8;
        b[COUNTS_AT + 2] = device.len() as u8;
        put_u64(b, SECTORS_AT, self.sectors);
        b[UUID_AT..UUID_AT + 16].copy_from_slice(&self.uuid);
        b[BOOT_AT..BOOT_AT + 16].copy_from_slice(&self.boot);
        put_u64(b, SEEN_AT, self.seen as u64);
        put_u64(b, GUARD_SEQ_AT, self.guard_seq.0);
        let guards = b[GUARDS_AT..DEVICE_AT].chunks_exact_mut(GUARD_LEN);
        for (guard, at) in self.guards.iter().zip(guards) {
            put_u64(at, 0, guard.chunk.0);
            put_u64(at, 8, guard.digest);
        }
        b[DEVICE_AT..DEVICE_AT + device.len()].copy_from_slice(device);
        for (area, at) in self
            .areas
            .iter()
            .zip(b[AREAS_AT..END].chunks_exact_mut(AREA_LEN))
        {
            put_u64(at, 0, area.sector);
            put_u32(at, 8, area.sectors);
            at[16..48].copy_from_slice(&area.digest);
        }
    }

    /// Checks the bytes of a record.
    ///
    /// # Errors
    /// A number is out of its bounds, or the name is no text.
    pub fn decode(b: &[u8]) -> Result<Self, FormatError> {
        expect(WHAT, "length", b.len() as u64, LEN as u64)?;
        let kind = get_u32(b, KIND_AT);
        let content = Content::of(kind).ok_or(FormatError::Range {
            what: WHAT,
            field: "content",
            found: kind.into(),
            least: 0,
            most: Content::Partitions as u64,
        })?;
        let count = |at: usize, field, most: usize| {
            let found = usize::from(b[COUNTS_AT + at]);
            bound(WHAT, field, found as u64, 0, most as u64).map(|()| found)
        };
        let areas = count(0, "areas", MAX_AREAS)?;
        let guards = count(1, "guarded chunks", MAX_GUARDS)?;
        let device_len = count(2, "length of the device's name", MAX_DEVICE)?;
        let device = std::str::from_utf8(&b[DEVICE_AT..DEVICE_AT + device_len]);
        let device = device.map_err(|_| FormatError::Malformed {
            what: WHAT,
            problem: "the device's name is no text",
        })?;
        let areas = b[AREAS_AT..END].chunks_exact(AREA_LEN).take(areas);
        let areas = areas.map(decode_area).collect::<Result<Vec<_>, _>>()?;
        let guards = b[GUARDS_AT..DEVICE_AT]
            .chunks_exact(GUARD_LEN)
            .take(guards)
            .map(|at| Guard {
                chunk: Chunk(get_u64(at, 0)),
                digest: get_u64(at, 8),
            });
        Ok(OriginRecord {
            device: device.to_owned(),
            sectors: get_u64(b, SECTORS_AT),
            content,
            uuid: id_at(b, UUID_AT),
            boot: id_at(b, BOOT_AT),
            seen: get_u64(b, SEEN_AT) as i64,
            guard_seq: SnapSeq(get_u64(b, GUARD_SEQ_AT)),
            guards: guards.collect(),
            areas,
        })
    }
}

fn decode_area(at: &[u8]) -> Result<Area, FormatError> {
    let (sector, sectors) = (get_u64(at, 0), get_u32(at, 8));
    bound(WHAT, "start of an area", sector, 0, 1 << 54)?;
    let most = MAX_AREA_SECTORS.into();
    bound(WHAT, "length of an area", sectors.into(), 1, most)?;
    let mut digest = [0; 32];
    digest.copy_from_slice(&at[16..48]);
    Ok(Area {
        sector,
        sectors,
        digest,
    })
}

fn id_at(b: &[u8], at: usize) -> [u8; 16] {
    let mut id = [0; 16];
    id.copy_from_slice(&b[at..at + 16]);
    id
}
