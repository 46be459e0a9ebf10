// SPDX-License-Identifier: GPL-2.0-only
//! Metadata as raw blocks: edited wherever the input says, then sealed again from the leaves up to the
//! superblock, so that only what is *said* is wrong and every checksum is right.
//!
//! Written from FORMAT.md, not with the code under test: it must not stumble over what that must refuse.

use std::collections::BTreeMap;

use super::input::Input;
use super::volume::Volume;

const BLOCK: u64 = 4096;
const SUPERBLOCKS: [u64; 2] = [0, 65536];
/// Places of the roots in a superblock: the kind of tree, and where its root is.
const ROOTS: [(u8, usize); 3] = [(1, 160), (2, 200), (3, 240)];
const TABLE_AT: usize = 144;
const PAYLOAD: usize = 64;
/// The most blocks of a journal that are looked at.
const JOURNAL_BLOCKS: u64 = 24;
/// The most levels of a tree or blocks of a chain.
const DEEP: u32 = 40;

/// The blocks a store is made of, by byte offset.
#[derive(Clone)]
pub struct Image {
    blocks: BTreeMap<u64, Vec<u8>>,
    places: Vec<u64>,
    journal: Vec<u64>,
}

fn get(bytes: &[u8], at: usize, count: usize) -> u64 {
    let mut number = [0; 8];
    number[..count].copy_from_slice(&bytes[at..at + count]);
    u64::from_le_bytes(number)
}

fn put(bytes: &mut [u8], at: usize, count: usize, number: u64) {
    bytes[at..at + count].copy_from_slice(&number.to_le_bytes()[..count]);
}

impl Image {
    /// What both superblocks lead to, and the journal.
    pub fn of(volume: &Volume<'_>) -> Image {
        let mut image = Image {
            blocks: BTreeMap::new(),
            places: Vec::new(),
            journal: Vec::new(),
        };
        for offset in SUPERBLOCKS {
            let Some(block) = volume.read_meta(offset) else {
                continue;
            };
            for (_, at) in ROOTS {
                image.load(volume, get(&block, at, 8), DEEP);
            }
            image.load(volume, get(&block, TABLE_AT, 8), DEEP);
            let (first, count) = (get(&block, 96, 8), get(&block, 104, 8));
            for number in first..first + count.min(JOURNAL_BLOCKS) {
                if let Some(bytes) = volume.read_meta(number * BLOCK) {
                    image.blocks.insert(number * BLOCK, bytes);
                    image.journal.push(number * BLOCK);
                }
            }
            image.blocks.insert(offset, block);
        }
        image.journal.sort_unstable();
        image.journal.dedup();
        image.places = image.blocks.keys().copied().collect();
        image
    }

    fn load(&mut self, volume: &Volume<'_>, block: u64, deep: u32) {
        let offset = block.saturating_mul(BLOCK);
        if block == 0 || deep == 0 || self.blocks.contains_key(&offset) {
            return;
        }
        let Some(bytes) = volume.read_meta(offset) else {
            return;
        };
        let below: Vec<u64> = pointers(&bytes)
            .into_iter()
            .map(|(block, _)| block)
            .collect();
        self.blocks.insert(offset, bytes);
        for block in below {
            self.load(volume, block, deep - 1);
        }
    }

    /// Changes what the input says: each edit is a block, an offset, and what becomes of the bytes there.
    pub fn edit(&mut self, input: &mut Input<'_>) {
        for _ in 0..64 {
            if input.is_empty() {
                return;
            }
            let place = self.places[usize::from(input.u8()) % self.places.len()];
            let at = usize::from(input.u16()) % (BLOCK as usize - 8);
            let (op, value) = (input.u8(), u64::from(input.u32()));
            let Some(bytes) = self.blocks.get_mut(&place) else {
                return;
            };
            let old = get(bytes, at, 8);
            match op % 8 {
                0 => put(bytes, at, 1, value),
                1 => put(bytes, at, 2, value),
                2 => put(bytes, at, 4, value),
                3 => put(bytes, at, 8, value),
                4 => put(bytes, at, 8, value << 32 | 0xffff_ffff),
                5 => put(bytes, at, 8, old.wrapping_add(value)),
                6 => put(bytes, at, 8, old.wrapping_sub(value)),
                _ => put(bytes, at, 8, old ^ 1 << (value % 64)),
            }
        }
    }

    /// Makes every checksum right.
    pub fn seal(&mut self) {
        let mut done = BTreeMap::new();
        for offset in SUPERBLOCKS {
            let Some(mut bytes) = self.blocks.get(&offset).cloned() else {
                continue;
            };
            let places = ROOTS.map(|(_, at)| at).into_iter().chain([TABLE_AT]);
            for at in places {
                if let Some(crc) = self.seal_block(get(&bytes, at, 8), DEEP, &mut done) {
                    put(&mut bytes, at + 8, 4, crc.into());
                }
            }
            let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[..12]), &bytes[16..]);
            put(&mut bytes, 12, 4, crc.into());
            self.blocks.insert(offset, bytes);
        }
        self.seal_journal();
    }

    fn seal_block(&mut self, block: u64, deep: u32, done: &mut BTreeMap<u64, u32>) -> Option<u32> {
        let offset = block.checked_mul(BLOCK)?;
        if let Some(&crc) = done.get(&offset) {
            return Some(crc);
        }
        let mut bytes = self.blocks.get(&offset)?.clone();
        if deep == 0 || SUPERBLOCKS.contains(&offset) {
            return None;
        }
        // One that leads back to itself keeps the checksum it had.
        done.insert(offset, get(&bytes, 4, 4) as u32);
        for (below, crc_at) in pointers(&bytes) {
            if let Some(crc) = self.seal_block(below, deep - 1, done) {
                put(&mut bytes, crc_at, 4, crc.into());
            }
        }
        let crc = crc32c::crc32c(&bytes[8..]);
        put(&mut bytes, 4, 4, crc.into());
        self.blocks.insert(offset, bytes);
        done.insert(offset, crc);
        Some(crc)
    }

    fn seal_journal(&mut self) {
        let mut at = 0;
        while at < self.journal.len() {
            let first = self.journal[at];
            let count = get(&self.blocks[&first], 40, 4).clamp(1, 64) as usize;
            let end = (at + count).min(self.journal.len());
            let record: Vec<u8> = self.journal[at..end]
                .iter()
                .flat_map(|place| self.blocks[place].iter().copied())
                .collect();
            at += 1;
            if record.starts_with(b"dsJr") {
                let crc = crc32c::crc32c(&record[8..]);
                if let Some(bytes) = self.blocks.get_mut(&first) {
                    put(bytes, 4, 4, crc.into());
                }
                at = end;
            }
        }
    }

    /// Puts the blocks where they belong.
    pub fn store(&self, volume: &Volume<'_>) {
        for (&offset, bytes) in &self.blocks {
            volume.write_meta(offset, bytes);
        }
    }
}

/// The blocks that a block leads to, each with the place of its checksum in this one.
fn pointers(bytes: &[u8]) -> Vec<(u64, usize)> {
    let (kind, level, count) = (bytes[32], bytes[33], get(bytes, 34, 2) as usize);
    if kind == 5 {
        return vec![(get(bytes, PAYLOAD, 8), PAYLOAD + 8)];
    }
    if level > 0 {
        return (0..count.min(100))
            .map(|child| PAYLOAD + 40 * child)
            .map(|at| (get(bytes, at + 16, 8), at + 32))
            .collect();
    }
    if kind != 3 {
        return Vec::new();
    }
    // A leaf of the tree of bitmaps: three varints and a checksum an entry.
    let mut found = Vec::new();
    let (mut at, mut last) = (PAYLOAD, 0_u64);
    for _ in 0..count.min(600) {
        let numbers = [0; 3].map(|_: u8| varint(bytes, &mut at));
        let [Some(_), Some(_), Some(difference)] = numbers else {
            break;
        };
        let signed = (difference >> 1) ^ (difference & 1).wrapping_neg();
        last = last.wrapping_add(1).wrapping_add(signed);
        if at + 4 > bytes.len() {
            break;
        }
        found.push((last, at));
        at += 4;
    }
    found
}

fn varint(bytes: &[u8], at: &mut usize) -> Option<u64> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = *bytes.get(*at)?;
        *at += 1;
        value |= u64::from(byte & 127) << shift;
        if byte < 128 {
            return Some(value);
        }
    }
    None
}
