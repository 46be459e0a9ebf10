// SPDX-License-Identifier: GPL-2.0-only
//! What is on the origin, as far as it tells whether somebody wrote to it: signatures, and the areas that any
//! mount writes to.
//!
//! Nothing here is believed: all numbers come from a disk that anybody may have written.

use std::io;

use sha2::{Digest, Sha256};

use crate::buffer::AlignedBuf;
use crate::device::{BlockDevice, Read};
use crate::format::origin::{Area, Content, MAX_AREA_SECTORS, MAX_AREAS};
use crate::units::SECTOR_BYTES;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
/// What is read at the start of what lies within the origin: of a partition, or behind a header.
const INNER: u64 = 128 * KIB;
/// As much of the start of a device as has all signatures.
pub(crate) const HEAD: u64 = 68 * KIB;
/// What is read before and behind the head of a log.
const LOG_BEFORE: u64 = 64 * KIB;
const LOG_BEHIND: u64 = 256 * KIB;
/// Where btrfs has its superblocks, beside the one at 64 KiB.
const BTRFS_MIRRORS: [u64; 2] = [64 * MIB, 256 * KIB * MIB];
/// How deep partitions and headers are followed.
const DEPTH: u32 = 2;

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Contents {
    pub content: Content,
    /// Zeros: none.
    pub uuid: [u8; 16],
    /// When the file system was last written, as its superblock says; seconds since 1970-01-01 UTC.
    pub written: Option<i64>,
    /// When it was last mounted for writing or checked as a whole, as that says.
    pub mounted: Option<i64>,
    /// Where any mount writes: first byte and length, whole sectors.
    places: Vec<(u64, u64)>,
}

struct Look<'d> {
    device: &'d mut dyn BlockDevice,
    found: Contents,
}

/// Looks at a device.
pub(crate) fn look(device: &mut dyn BlockDevice) -> io::Result<Contents> {
    let len = device.len_bytes() / SECTOR_BYTES * SECTOR_BYTES;
    let mut look = Look {
        device,
        found: Contents::default(),
    };
    look.place(0, MIB);
    look.place(len.saturating_sub(MIB), MIB);
    look.at(0, 0)?;
    Ok(look.found)
}

/// The signature at the start of a device, without looking further.
pub(crate) fn identify(device: &mut dyn BlockDevice) -> io::Result<Contents> {
    let mut look = Look {
        device,
        found: Contents::default(),
    };
    look.signature(0)?;
    Ok(look.found)
}

impl Contents {
    /// What the places hold.
    pub fn areas(&self, device: &mut dyn BlockDevice) -> io::Result<Vec<Area>> {
        let mut areas = Vec::new();
        for &(start, len) in &self.places {
            let (sector, sectors) = (start / SECTOR_BYTES, (len / SECTOR_BYTES) as u32);
            areas.push(Area {
                sector,
                sectors,
                digest: digest(&read(device, start, len)?),
            });
        }
        Ok(areas)
    }
}

/// What an area holds now; none if the device does not have all of it any more.
pub(crate) fn holds(device: &mut dyn BlockDevice, area: &Area) -> io::Result<Option<[u8; 32]>> {
    let start = area.sector * SECTOR_BYTES;
    let len = u64::from(area.sectors) * SECTOR_BYTES;
    if start + len > device.len_bytes() {
        return Ok(None);
    }
    read(device, start, len).map(|bytes| Some(digest(&bytes)))
}

pub(crate) fn digest(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Bytes of a device, whatever its alignment.
pub(crate) fn read(device: &mut dyn BlockDevice, start: u64, len: u64) -> io::Result<Vec<u8>> {
    let align = device.alignment() as u64;
    let end = start.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
    if end > device.len_bytes() {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let first = start / align * align;
    // The device's end is a multiple of its own sectors.
    let mut bytes = AlignedBuf::zeroed((end.div_ceil(align) * align - first) as usize);
    device.read(&mut [Read {
        offset: first,
        into: &mut bytes,
    }])?;
    let at = (start - first) as usize;
    Ok(bytes[at..at + len as usize].to_vec())
}

impl Look<'_> {
    /// Adds what the device has of a place, unless it is known.
    fn place(&mut self, start: u64, len: u64) {
        let end = start.saturating_add(len.min(u64::from(MAX_AREA_SECTORS) * SECTOR_BYTES));
        let end = end.min(self.device.len_bytes()) / SECTOR_BYTES * SECTOR_BYTES;
        let start = start / SECTOR_BYTES * SECTOR_BYTES;
        let known = |&(from, len): &(u64, u64)| from <= start && end <= from + len;
        if start < end
            && self.found.places.len() < MAX_AREAS
            && !self.found.places.iter().any(known)
        {
            self.found.places.push((start, end - start));
        }
    }

    fn bytes(&mut self, start: u64, len: u64) -> io::Result<Option<Vec<u8>>> {
        match start.checked_add(len) {
            Some(end) if end <= self.device.len_bytes() => read(self.device, start, len).map(Some),
            _ => Ok(None),
        }
    }

    /// Looks at what begins at `base`.
    fn at(&mut self, base: u64, depth: u32) -> io::Result<()> {
        let (content, head) = self.signature(base)?;
        match content {
            Content::Ext => self.ext_journal(base, &head),
            Content::Xfs => self.xfs_log(base, &head)?,
            Content::Btrfs => BTRFS_MIRRORS
                .iter()
                .for_each(|at| self.place(base.saturating_add(*at), 4 * KIB)),
            Content::Lvm | Content::Luks | Content::Partitions if depth < DEPTH => {
                let inner = match content {
                    Content::Lvm => lvm_data(&head),
                    Content::Luks => luks_payload(&head),
                    _ => self.partitions(base, &head)?,
                };
                for start in inner.into_iter().filter(|&start| start > 0) {
                    let start = base.saturating_add(start);
                    self.place(start, INNER);
                    // Not an encrypted one: what it holds is noise.
                    if content != Content::Luks && start < self.device.len_bytes() {
                        self.at(start, depth + 1)?;
                    }
                }
            }
            _ => {}
        }
        Ok(())
    }

    /// The signature at `base`, and the first bytes there. Those at 0 are the device's.
    fn signature(&mut self, base: u64) -> io::Result<(Content, Vec<u8>)> {
        let left = self.device.len_bytes().saturating_sub(base) / SECTOR_BYTES * SECTOR_BYTES;
        let head = self.bytes(base, left.min(HEAD))?.unwrap_or_default();
        let (content, uuid, times) = recognise(&head);
        if base == 0 {
            let found = &mut self.found;
            (found.content, found.uuid) = (content, uuid);
            (found.mounted, found.written) = times;
        }
        Ok((content, head))
    }

    /// The start of an ext journal, by the superblock's copy of where its inode says that it lies.
    fn ext_journal(&mut self, base: u64, head: &[u8]) {
        let (Some(shift), Some(map)) = (
            le32(head, 1024 + 0x18),
            head.get(1024 + 0x10c..1024 + 0x14c),
        ) else {
            return;
        };
        let block = if le16(map, 0) == Some(0xf30a) {
            // The root of an extent tree; of its first leaf if it is one.
            let high = u64::from(le16(map, 12 + 6).unwrap_or_default());
            let low = u64::from(le32(map, 12 + 8).unwrap_or_default());
            if le16(map, 6) == Some(0) {
                high << 32 | low
            } else {
                0
            }
        } else {
            le32(map, 0).unwrap_or_default().into()
        };
        if block > 0 && shift <= 6 {
            let start = (block << (10 + shift)).saturating_add(base);
            self.place(start, LOG_BEFORE);
        }
    }

    /// The log of an XFS around its head: whatever mounts it for writing adds records there.
    fn xfs_log(&mut self, base: u64, head: &[u8]) -> io::Result<()> {
        let wide = |at| be32(head, at).map(u64::from);
        let (Some(log), Some(ag_blocks), Some(log_blocks)) = (be64(head, 48), wide(84), wide(96))
        else {
            return Ok(());
        };
        let (shift, ag_shift) = (u32::from(head[120]), u32::from(head[124]));
        if log == 0 || !(9..=16).contains(&shift) || !(1..=32).contains(&ag_shift) {
            return Ok(()); // The log lies on another device.
        }
        let in_group = log & ((1 << ag_shift) - 1);
        let block = (log >> ag_shift)
            .saturating_mul(ag_blocks)
            .saturating_add(in_group);
        if block > 1 << 46 {
            return Ok(());
        }
        let start = base.saturating_add(block << shift);
        let count = (log_blocks << shift) / SECTOR_BYTES;
        if count == 0 || start.saturating_add(count * SECTOR_BYTES) > self.device.len_bytes() {
            return Ok(());
        }
        // Each sector carries the number of the cycle that wrote it, in its first word or, where a record
        // begins, in its second: the head is where the number changes.
        let first = self.xfs_cycle(start)?;
        let (mut low, mut high) = (0, count);
        while high - low > 1 {
            let middle = u64::midpoint(low, high);
            if self.xfs_cycle(start + middle * SECTOR_BYTES)? == first {
                low = middle;
            } else {
                high = middle;
            }
        }
        let head = (start + high % count * SECTOR_BYTES) / (4 * KIB) * (4 * KIB);
        let from = head.saturating_sub(LOG_BEFORE).max(start);
        let end = (head + LOG_BEHIND).min(start + count * SECTOR_BYTES);
        self.place(from, end.saturating_sub(from));
        Ok(())
    }

    fn xfs_cycle(&mut self, at: u64) -> io::Result<u32> {
        let sector = self.bytes(at, SECTOR_BYTES)?.unwrap_or_default();
        let word = |at| be32(&sector, at).unwrap_or_default();
        Ok(match word(0) {
            0xfeed_babe => word(4),
            cycle => cycle,
        })
    }

    /// Where partitions begin, by a GPT or by a table of DOS.
    fn partitions(&mut self, base: u64, head: &[u8]) -> io::Result<Vec<u64>> {
        let sectors = |number: u64| number.saturating_mul(SECTOR_BYTES);
        if head.get(512..520) == Some(b"EFI PART") {
            let entries = base.saturating_add(sectors(le64(head, 512 + 72).unwrap_or_default()));
            let len = u64::from(le32(head, 512 + 84).unwrap_or_default());
            if !(128..=4096).contains(&len) {
                return Ok(Vec::new());
            }
            let table = self.bytes(entries, 4 * len)?.unwrap_or_default();
            let starts = table
                .chunks_exact(len as usize)
                .filter(|entry| entry[..16] != [0; 16])
                .filter_map(|entry| le64(entry, 32));
            return Ok(starts.map(sectors).collect());
        }
        let starts = (0..4).filter(|n| head[446 + n * 16 + 4] != 0);
        Ok(starts
            .filter_map(|n| le32(head, 446 + n * 16 + 8))
            .map(|start| sectors(start.into()))
            .collect())
    }
}

/// Kind and UUID, by the first [`HEAD`] bytes of a device.
pub(crate) fn identity(head: &[u8]) -> (Content, [u8; 16]) {
    let (content, uuid, _) = recognise(head);
    (content, uuid)
}

/// Content, UUID, and the times of the last mount and of the last write.
type Recognised = (Content, [u8; 16], (Option<i64>, Option<i64>));

/// Of content that does not say.
const NEVER: (Option<i64>, Option<i64>) = (None, None);

fn recognise(head: &[u8]) -> Recognised {
    let is = |at: usize, magic: &[u8]| head.get(at..at + magic.len()) == Some(magic);
    let uuid = |at: usize| {
        head.get(at..at + 16)
            .and_then(|bytes| bytes.try_into().ok())
            .unwrap_or_default()
    };
    if is(0, b"XFSB") {
        (Content::Xfs, uuid(32), NEVER)
    } else if is(0, b"LUKS\xba\xbe") {
        (Content::Luks, text_uuid(head, 168, 36), NEVER)
    } else if is(65536 + 64, b"_BHRfS_M") {
        (Content::Btrfs, uuid(65536 + 32), NEVER)
    } else if is(1024 + 0x38, &[0x53, 0xef]) {
        (Content::Ext, uuid(1024 + 0x68), ext_times(head))
    } else if is(4096 - 10, b"SWAPSPACE2") {
        (Content::Swap, uuid(1024 + 12), NEVER)
    } else if let Some(label) = lvm_label(head) {
        (Content::Lvm, text_uuid(head, label + 32, 32), NEVER)
    } else if is(510, &[0x55, 0xaa]) && (is(512, b"EFI PART") || dos_table(head)) {
        (Content::Partitions, [0; 16], NEVER)
    } else {
        (Content::Unknown, [0; 16], NEVER)
    }
}

/// Whether the boot sector has a table of partitions, and not the code of a FAT or NTFS.
fn dos_table(head: &[u8]) -> bool {
    let entries = || (0..4).map(|n| &head[446 + n * 16..462 + n * 16]);
    entries().all(|entry| entry[0] & 0x7f == 0) && entries().any(|entry| entry[4] != 0)
}

/// The last mount or check, and the last of these and of writing, as an ext superblock has them.
fn ext_times(head: &[u8]) -> (Option<i64>, Option<i64>) {
    let time = |low: usize, high: usize| {
        let high = i64::from(*head.get(1024 + high)?);
        Some(high << 32 | i64::from(le32(head, 1024 + low)?))
    };
    let mounted = time(0x2c, 0x275).max(time(0x40, 0x277));
    (mounted, mounted.max(time(0x30, 0x274)))
}

/// An id that is written out as text, as the 16 bytes that tell it from others.
fn text_uuid(head: &[u8], at: usize, len: usize) -> [u8; 16] {
    let text = head.get(at..at + len).unwrap_or_default();
    let parsed = std::str::from_utf8(text)
        .ok()
        .and_then(|text| uuid::Uuid::parse_str(text).ok());
    match parsed {
        Some(uuid) => *uuid.as_bytes(),
        None => digest(text)[..16].try_into().unwrap_or_default(),
    }
}

/// Where the label of LVM is, in one of the first four sectors.
fn lvm_label(head: &[u8]) -> Option<usize> {
    (0..4).map(|sector| sector * 512).find(|&at| {
        head.get(at..at + 8) == Some(b"LABELONE") && head.get(at + 24..at + 32) == Some(b"LVM2 001")
    })
}

/// Where LVM's first data area begins.
fn lvm_data(head: &[u8]) -> Vec<u64> {
    let start = lvm_label(head).and_then(|at| le64(head, at + 32 + 40));
    start.into_iter().collect()
}

/// Where what LUKS encrypts begins.
fn luks_payload(head: &[u8]) -> Vec<u64> {
    let start = match head.get(6..8) {
        Some([0, 1]) => be32(head, 104).map(|sectors| u64::from(sectors) * SECTOR_BYTES),
        _ => luks2_payload(head.get(4096..).unwrap_or_default()),
    };
    start.into_iter().collect()
}

/// The offset of the first segment in the JSON of LUKS2.
fn luks2_payload(json: &[u8]) -> Option<u64> {
    let end = json.iter().position(|byte| *byte == 0)?;
    let text = std::str::from_utf8(&json[..end]).ok()?;
    let document: serde_json::Value = serde_json::from_str(text).ok()?;
    let segments = document.get("segments")?.as_object()?;
    segments
        .values()
        .next()?
        .get("offset")?
        .as_str()?
        .parse()
        .ok()
}

fn le16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn le32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn le64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

fn be32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn be64(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
