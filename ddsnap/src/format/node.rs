// SPDX-License-Identifier: GPL-2.0-only
//! Index nodes: leaves of varint-coded entries, interior nodes of fixed-size ones.
//!
//! A leaf entry holds differences to the entry before it (the first to zeros): the key's first
//! part, then zigzag differences of the key's second part and of the place (less one, so that a
//! run of neighbours costs one byte), then the checksum. About 7 bytes in runs, 10 to 14 at random.

use super::block::{Block, BlockBuilder, Kind, MAX_LEVEL, PAYLOAD_LEN, Pointer};
use super::{FormatError, bound, get_u32, get_u64, put_u32, put_u64, varint};
use crate::units::MetaBlock;

/// A key of any of the trees: (chunk, seq) of exceptions, (seq, chunk) of overlays, (index, 0) of
/// bitmaps.
pub type Key = (u64, u64);

/// What a key leads to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Value {
    /// A store chunk, 0 for none, or a metadata block in the tree of bitmaps.
    pub place: u64,
    /// crc32c of the data there; 0 for overlays, whose data changes in place.
    pub crc: u32,
}

impl Value {
    /// A key alone, in the trees of exceptions and overlays: that a chunk changed, for bookmarks. No data region
    /// has store chunk 0.
    pub const MARK: Value = Value { place: 0, crc: 0 };

    /// Whether there is no store chunk.
    #[must_use]
    pub fn is_mark(self) -> bool {
        self.place == Value::MARK.place
    }
}

/// The longest entry of a leaf.
pub const MAX_LEAF_ENTRY: usize = 3 * varint::MAX_LEN + 4;
/// The most entries a leaf can have: the shortest takes 7 bytes.
pub const MAX_LEAF_COUNT: usize = PAYLOAD_LEN / 7;
/// Bytes of an interior entry.
pub const INTERIOR_ENTRY: usize = 40;
/// The most children an interior node can have.
pub const FANOUT: usize = PAYLOAD_LEN / INTERIOR_ENTRY;

const KEY0_AT: usize = 0;
const KEY1_AT: usize = KEY0_AT + 8;
const CHILD_AT: usize = KEY1_AT + 8;
const NEWEST_AT: usize = CHILD_AT + 8;
const CHILD_CRC_AT: usize = NEWEST_AT + 8;

const LEAF: &str = "index leaf";
const INTERIOR: &str = "interior index node";

/// One child of an interior node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Child {
    /// No key of the child is less, unless the child is its parent's first.
    pub key: Key,
    /// The child.
    pub pointer: Pointer,
    /// The newest snapshot sequence in any key below: lets a changelist skip what did not change.
    pub newest: u64,
}

/// The snapshot sequence in a key.
#[must_use]
pub fn seq_of(kind: Kind, key: Key) -> u64 {
    match kind {
        Kind::Exceptions => key.1,
        Kind::Overlays => key.0,
        Kind::Space | Kind::Bitmap | Kind::Snapshots => 0,
    }
}

/// Packs entries into a leaf until it is full.
#[derive(Debug, Default)]
pub struct LeafBuilder {
    block: BlockBuilder,
    used: usize,
    count: usize,
    last: (Key, u64),
}

impl LeafBuilder {
    /// Appends an entry with a greater key than all before; false, and nothing done, if the leaf
    /// has no room.
    #[must_use]
    pub fn push(&mut self, key: Key, value: Value) -> bool {
        let parts = differences(self.last, key, value.place);
        let len = parts.iter().map(|&part| varint::len(part)).sum::<usize>() + 4;
        if self.used + len > PAYLOAD_LEN {
            return false;
        }
        let payload = self.block.payload_mut();
        for part in parts {
            varint::put(payload, &mut self.used, part);
        }
        put_u32(payload, self.used, value.crc);
        self.used += 4;
        self.count += 1;
        self.last = (key, value.place);
        true
    }

    /// Bytes of the payload in use so far.
    #[must_use]
    pub fn used(&self) -> usize {
        self.used
    }

    /// The payload, with its count and length for the header.
    #[must_use]
    pub fn finish(self) -> (BlockBuilder, u16, u16) {
        (self.block, self.count as u16, self.used as u16)
    }
}

/// Bytes an entry takes behind `last`, the key and place before it.
#[must_use]
pub fn entry_len(last: (Key, u64), key: Key, place: u64) -> usize {
    differences(last, key, place)
        .iter()
        .map(|&part| varint::len(part))
        .sum::<usize>()
        + 4
}

fn differences(last: (Key, u64), key: Key, place: u64) -> [u64; 3] {
    let ((last0, last1), last_place) = last;
    [
        key.0.wrapping_sub(last0),
        varint::zigzag(key.1.wrapping_sub(last1) as i64),
        varint::zigzag(place.wrapping_sub(last_place.wrapping_add(1)) as i64),
    ]
}

/// Reads a leaf entry by entry, in the order of keys.
#[derive(Clone, Debug)]
pub struct LeafReader {
    block: Block,
    at: usize,
    left: usize,
    last: Option<(Key, u64)>,
}

impl LeafReader {
    /// A reader before the first entry.
    ///
    /// # Errors
    /// The block says it has more entries than a leaf can hold.
    pub fn new(block: Block) -> Result<Self, FormatError> {
        let left = block.count();
        bound(LEAF, "count", left as u64, 1, MAX_LEAF_COUNT as u64)?;
        Ok(LeafReader {
            block,
            at: 0,
            left,
            last: None,
        })
    }

    /// The next entry; none at the end.
    ///
    /// # Errors
    /// The payload does not hold `count` entries of growing keys, or holds more than them.
    pub fn next_entry(&mut self) -> Result<Option<(Key, Value)>, FormatError> {
        let payload = self.block.payload();
        if self.left == 0 {
            return if self.at == payload.len() {
                Ok(None)
            } else {
                Err(FormatError::Malformed {
                    what: LEAF,
                    problem: "bytes follow the last entry",
                })
            };
        }
        let step = varint::get(payload, &mut self.at)?;
        let step1 = varint::unzigzag(varint::get(payload, &mut self.at)?);
        let step_place = varint::unzigzag(varint::get(payload, &mut self.at)?);
        if payload.len() - self.at < 4 {
            return Err(FormatError::Malformed {
                what: LEAF,
                problem: "the last entry is cut short",
            });
        }
        let crc = get_u32(payload, self.at);
        self.at += 4;
        self.left -= 1;
        let ((last0, last1), last_place) = self.last.unwrap_or_default();
        let key0 = last0.checked_add(step).ok_or(FormatError::Malformed {
            what: LEAF,
            problem: "a key is beyond 64 bits",
        })?;
        let key = (key0, last1.wrapping_add(step1 as u64));
        let place = last_place.wrapping_add(1).wrapping_add(step_place as u64);
        if self.last.is_some_and(|(last, _)| last >= key) {
            return Err(FormatError::Malformed {
                what: LEAF,
                problem: "keys are out of order",
            });
        }
        self.last = Some((key, place));
        Ok(Some((key, Value { place, crc })))
    }
}

/// Calls `visit` with each key of a leaf, in order. For looking through millions of entries: the rest
/// of an entry is passed over.
///
/// # Errors
/// As [`LeafReader`]; `visit` may have seen keys by then.
#[inline]
pub fn leaf_keys(block: &Block, mut visit: impl FnMut(Key)) -> Result<(), FormatError> {
    let malformed = |problem| FormatError::Malformed {
        what: LEAF,
        problem,
    };
    let count = block.count();
    bound(LEAF, "count", count as u64, 1, MAX_LEAF_COUNT as u64)?;
    let payload = block.payload();
    let mut at = 0;
    let mut last: Key = (0, 0);
    for index in 0..count {
        let step = varint::get(payload, &mut at)?;
        let step1 = varint::unzigzag(varint::get(payload, &mut at)?);
        varint::get(payload, &mut at)?;
        at += 4;
        let key0 = last.0.checked_add(step);
        let key0 = key0.ok_or_else(|| malformed("a key is beyond 64 bits"))?;
        let key = (key0, last.1.wrapping_add(step1 as u64));
        if index > 0 && last >= key {
            return Err(malformed("keys are out of order"));
        }
        last = key;
        visit(key);
    }
    match at.cmp(&payload.len()) {
        std::cmp::Ordering::Equal => Ok(()),
        std::cmp::Ordering::Less => Err(malformed("bytes follow the last entry")),
        std::cmp::Ordering::Greater => Err(malformed("the last entry is cut short")),
    }
}

/// The first entry of a leaf at or after `from`; none if all are before. Looks at no entry behind it.
///
/// # Errors
/// As [`LeafReader`], as far as it looks.
pub fn leaf_first_from(block: &Block, from: Key) -> Result<Option<(Key, Value)>, FormatError> {
    let malformed = |problem| FormatError::Malformed {
        what: LEAF,
        problem,
    };
    let count = block.count();
    bound(LEAF, "count", count as u64, 1, MAX_LEAF_COUNT as u64)?;
    let payload = block.payload();
    let mut at = 0;
    let (mut key, mut place): (Key, u64) = ((0, 0), 0);
    for index in 0..count {
        let last = key;
        let step = varint::get(payload, &mut at)?;
        let key0 = last.0.checked_add(step);
        let step1 = varint::unzigzag(varint::get(payload, &mut at)?);
        let step_place = varint::unzigzag(varint::get(payload, &mut at)?);
        key = (
            key0.ok_or_else(|| malformed("a key is beyond 64 bits"))?,
            last.1.wrapping_add(step1 as u64),
        );
        place = place.wrapping_add(1).wrapping_add(step_place as u64);
        if index > 0 && last >= key {
            return Err(malformed("keys are out of order"));
        }
        if payload.len() - at.min(payload.len()) < 4 {
            return Err(malformed("the last entry is cut short"));
        }
        if key >= from {
            let crc = get_u32(payload, at);
            return Ok(Some((key, Value { place, crc })));
        }
        at += 4;
    }
    Ok(None)
}

/// Packs children into an interior node; there are 1 to [`FANOUT`].
#[must_use]
pub fn encode_interior(children: &[Child]) -> (BlockBuilder, u16, u16) {
    assert!(
        (1..=FANOUT).contains(&children.len()),
        "an interior node of {} children",
        children.len()
    );
    let mut block = BlockBuilder::new();
    for (child, at) in children
        .iter()
        .zip(block.payload_mut().chunks_exact_mut(INTERIOR_ENTRY))
    {
        put_u64(at, KEY0_AT, child.key.0);
        put_u64(at, KEY1_AT, child.key.1);
        put_u64(at, CHILD_AT, child.pointer.block.0);
        put_u64(at, NEWEST_AT, child.newest);
        put_u32(at, CHILD_CRC_AT, child.pointer.crc);
    }
    (
        block,
        children.len() as u16,
        (children.len() * INTERIOR_ENTRY) as u16,
    )
}

/// An interior node, checked as a whole.
#[derive(Clone, Debug)]
pub struct Interior(Block);

impl Interior {
    /// Checks the node's children.
    ///
    /// # Errors
    /// Count, length, or the order of keys is wrong.
    pub fn new(block: Block) -> Result<Self, FormatError> {
        bound(INTERIOR, "level", block.level().into(), 1, MAX_LEVEL.into())?;
        bound(INTERIOR, "count", block.count() as u64, 1, FANOUT as u64)?;
        super::expect(
            INTERIOR,
            "used bytes",
            block.payload().len() as u64,
            (block.count() * INTERIOR_ENTRY) as u64,
        )?;
        let node = Interior(block);
        if (1..node.len()).any(|i| node.child(i - 1).key >= node.child(i).key) {
            return Err(FormatError::Malformed {
                what: INTERIOR,
                problem: "keys are out of order",
            });
        }
        Ok(node)
    }

    /// Number of children, at least 1.
    #[must_use]
    #[allow(
        clippy::len_without_is_empty,
        reason = "an interior node is never empty"
    )]
    pub fn len(&self) -> usize {
        self.0.count()
    }

    /// The child at `index`, which is less than [`len`](Self::len).
    #[must_use]
    pub fn child(&self, index: usize) -> Child {
        let at = &self.0.payload()[index * INTERIOR_ENTRY..][..INTERIOR_ENTRY];
        Child {
            key: (get_u64(at, KEY0_AT), get_u64(at, KEY1_AT)),
            pointer: Pointer {
                block: MetaBlock(get_u64(at, CHILD_AT)),
                crc: get_u32(at, CHILD_CRC_AT),
            },
            newest: get_u64(at, NEWEST_AT),
        }
    }

    /// Its level, at least 1.
    #[must_use]
    pub fn level(&self) -> u8 {
        self.0.level()
    }

    /// All children.
    pub fn children(&self) -> impl Iterator<Item = Child> + '_ {
        (0..self.len()).map(|index| self.child(index))
    }

    /// Index of the child that covers `key`.
    #[must_use]
    pub fn find(&self, key: Key) -> usize {
        let (mut low, mut high) = (0, self.len());
        while low < high {
            let middle = (low + high) / 2;
            if self.child(middle).key <= key {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        low.saturating_sub(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::block::{Expected, Seal};

    fn leaf(entries: &[(Key, Value)]) -> Block {
        let mut builder = LeafBuilder::default();
        for &(key, value) in entries {
            assert!(builder.push(key, value));
        }
        let (block, count, used) = builder.finish();
        let seal = Seal {
            block: MetaBlock(7),
            generation: 1,
            uuid_part: 9,
            kind: Kind::Exceptions,
            level: 0,
            count,
            used,
            aux: 0,
        };
        block.seal(&seal).1
    }

    fn entries(block: &Block) -> Vec<(Key, Value)> {
        let mut reader = LeafReader::new(block.clone()).unwrap();
        let all: Vec<_> = std::iter::from_fn(|| reader.next_entry().unwrap()).collect();
        let mut keys = Vec::new();
        leaf_keys(block, |key| keys.push(key)).unwrap();
        assert!(keys.iter().eq(all.iter().map(|(key, _)| key)));
        all
    }

    #[test]
    fn both_readers_refuse_the_same_leaves() {
        let good = leaf(&[
            ((3, 200), Value { place: 9, crc: 1 }),
            ((3, 201), Value { place: 8, crc: 2 }),
            ((900, 4), Value { place: 7, crc: 3 }),
        ]);
        let (payload, used) = (good.payload().to_vec(), good.payload().len());
        let mut refused = 0;
        let mut check = |payload: &[u8], count: u16, used: usize| {
            let mut builder = BlockBuilder::new();
            builder.payload_mut()[..payload.len()].copy_from_slice(payload);
            let seal = Seal {
                block: MetaBlock(7),
                generation: 1,
                uuid_part: 9,
                kind: Kind::Exceptions,
                level: 0,
                count,
                used: used as u16,
                aux: 0,
            };
            let block = builder.seal(&seal).1;
            let reader = LeafReader::new(block.clone()).and_then(|mut reader| {
                let mut all = Vec::new();
                while let Some((key, _)) = reader.next_entry()? {
                    all.push(key);
                }
                Ok(all)
            });
            let mut keys = Vec::new();
            let scanned = leaf_keys(&block, |key| keys.push(key));
            assert_eq!(
                reader.is_ok(),
                scanned.is_ok(),
                "{payload:?} {count} {used}"
            );
            match reader {
                Ok(all) => assert_eq!(all, keys),
                Err(_) => refused += 1,
            }
        };
        for used in 0..=used + 1 {
            for count in 0..5 {
                check(&payload, count, used);
            }
        }
        for bit in 0..used * 8 {
            let mut bent = payload.clone();
            bent[bit / 8] ^= 1 << (bit % 8);
            check(&bent, 3, used);
        }
        assert!(refused > 50, "{refused}");
    }

    #[test]
    fn extreme_keys_and_places_come_back() {
        let all = [
            (
                (0, 0),
                Value {
                    place: u64::MAX,
                    crc: 1,
                },
            ),
            (
                (0, u64::MAX),
                Value {
                    place: 0,
                    crc: u32::MAX,
                },
            ),
            ((1, 0), Value { place: 1, crc: 0 }),
            (
                (u64::MAX, 5),
                Value {
                    place: u64::MAX / 2,
                    crc: 3,
                },
            ),
        ];
        assert_eq!(entries(&leaf(&all)), all);
    }

    #[test]
    fn a_run_takes_seven_bytes_an_entry() {
        let run: Vec<_> = (0..500)
            .map(|i| {
                (
                    (1000 + i, 3),
                    Value {
                        place: 70 + i,
                        crc: 5,
                    },
                )
            })
            .collect();
        assert_eq!(leaf(&run).payload().len(), 500 * 7 + 2);
    }

    #[test]
    fn find_gives_the_covering_child() {
        let children: Vec<_> = (1..=FANOUT as u64)
            .map(|i| Child {
                key: (i * 10, 0),
                pointer: Pointer {
                    block: MetaBlock(i),
                    crc: 0,
                },
                newest: 0,
            })
            .collect();
        let (block, count, used) = encode_interior(&children);
        let seal = Seal {
            block: MetaBlock(7),
            generation: 1,
            uuid_part: 9,
            kind: Kind::Exceptions,
            level: 1,
            count,
            used,
            aux: 0,
        };
        let (pointer, block) = block.seal(&seal);
        let node = Interior::new(block.clone()).unwrap();
        assert_eq!(node.find((0, 0)), 0);
        assert_eq!(node.find((10, 0)), 0);
        assert_eq!(node.find((19, 9)), 0);
        assert_eq!(node.find((20, 0)), 1);
        assert_eq!(node.find((u64::MAX, 0)), FANOUT - 1);
        let wrong = Expected {
            pointer,
            newest_generation: 1,
            uuid_part: 8,
            kind: Kind::Exceptions,
            level: 1,
        };
        let bytes = block.bytes();
        assert!(matches!(
            Block::check(bytes, &wrong),
            Err(FormatError::Field {
                field: "store uuid",
                ..
            })
        ));
    }
}
