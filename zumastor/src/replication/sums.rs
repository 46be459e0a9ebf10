// SPDX-License-Identifier: GPL-2.0-only
//! Sums that prove two sites hold the same bytes, at the cost of the change.
//!
//! Each region of [`REGION_BYTES`] has the sum of H(chunk number, data) over its chunks, modulo 2^256. H
//! is BLAKE3 of the number and the chunk, a short one filled up with zeros; a chunk of zeros counts 0, so
//! what was never written costs nothing. A sum is undone by subtraction: where a chunk changed, the old
//! one's hash goes and the new one's comes. The *root* is a hash over chunk size and the regions that are
//! not 0. The length is left out: zeros behind the end of the shorter one make no difference.
//!
//! This is AdHash of Bellare and Micciancio, "A New Paradigm for Collision-Free Hashing: Incrementality at
//! Reduced Cost" (EUROCRYPT 1997). With 256 bits two different contents have equal sums by accident with
//! probability 2^-256. It does not withstand somebody who makes up contents for the purpose: Wagner's
//! generalised birthday attack finds two sets of chunks with one sum in about 2^32 steps, if he may choose
//! very many chunks. Against a peer who lies it proves nothing anyway: he can repeat our root.

use std::collections::BTreeMap;

use ddsnap::units::ChunkShift;

use super::wire::{Put, Take, WireError};

/// Bytes of a region, log2.
pub const REGION_SHIFT: u8 = 26;
/// Bytes of a region.
pub const REGION_BYTES: u64 = 1 << REGION_SHIFT;

/// The root of a snapshot's sums, or a region's sum.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Root(pub [u8; 32]);

impl std::fmt::Display for Root {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

type Sum = [u64; 4];

/// The sums of one snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sums {
    chunk: ChunkShift,
    /// Those that are not 0.
    regions: BTreeMap<u64, Sum>,
}

impl Sums {
    /// Of a volume of zeros.
    #[must_use]
    pub fn new(chunk: ChunkShift) -> Self {
        Sums {
            chunk,
            regions: BTreeMap::new(),
        }
    }

    /// The chunk size they are made with.
    #[must_use]
    pub fn chunk(&self) -> ChunkShift {
        self.chunk
    }

    /// The chunk `number` had the content `old` and has `new` now; either may be empty (not there) or
    /// shorter than a chunk.
    pub fn replace(&mut self, number: u64, old: &[u8], new: &[u8]) {
        if old != new {
            let hash = |data| chunk_hash(self.chunk, number, data);
            self.replace_hash(number, hash(old), hash(new));
        }
    }

    /// As [`replace`](Self::replace), by the hashes of [`chunk_hash`].
    pub fn replace_hash(&mut self, number: u64, old: Option<[u8; 32]>, new: Option<[u8; 32]>) {
        if old == new {
            return;
        }
        let sum = |hash: Option<[u8; 32]>| hash.map_or(Sum::default(), |hash| from_bytes(&hash));
        self.shift(number, sum(old), sum(new));
    }

    /// Adds what `other` says of each region: the changes that a batch made.
    pub fn merge(&mut self, other: &Sums) {
        for (region, change) in &other.regions {
            let first = region << (REGION_SHIFT - self.chunk.get());
            self.shift(first, Sum::default(), *change);
        }
    }

    fn shift(&mut self, number: u64, old: Sum, new: Sum) {
        let region = number >> (REGION_SHIFT - self.chunk.get());
        let sum = self.regions.entry(region).or_default();
        *sum = add(subtract(*sum, old), new);
        if *sum == Sum::default() {
            self.regions.remove(&region);
        }
    }

    /// The sum of a region.
    #[must_use]
    pub fn region(&self, region: u64) -> Root {
        Root(self.regions.get(&region).map_or([0; 32], to_bytes))
    }

    /// Neighbouring chunks from `first` on, as [`replace`](Self::replace).
    pub fn replace_run(&mut self, first: u64, old: &[u8], new: &[u8]) {
        let bytes = self.chunk.bytes() as usize;
        let count = old.len().max(new.len()).div_ceil(bytes);
        let part = |data: &[u8], i: usize| {
            let start = (i * bytes).min(data.len());
            start..(start + bytes).min(data.len())
        };
        for i in 0..count {
            let (o, n) = (part(old, i), part(new, i));
            self.replace(first + i as u64, &old[o], &new[n]);
        }
    }

    /// A hash over all of it.
    #[must_use]
    pub fn root(&self) -> Root {
        let mut hasher = blake3::Hasher::new_derive_key("zumastor replication root 1");
        hasher.update(&[self.chunk.get(), REGION_SHIFT]);
        for (region, sum) in &self.regions {
            hasher.update(&region.to_le_bytes());
            hasher.update(&to_bytes(sum));
        }
        Root(hasher.finalize().into())
    }

    /// Appends them as bytes.
    pub fn encode(&self, put: &mut Put) {
        put.u8(self.chunk.get()).u64(self.regions.len() as u64);
        for (region, sum) in &self.regions {
            put.u64(*region).raw(&to_bytes(sum));
        }
    }

    /// Reads them back.
    ///
    /// # Errors
    /// The bytes are none.
    pub fn decode(take: &mut Take<'_>) -> Result<Sums, WireError> {
        let shift = take.u8()?;
        let chunk = ChunkShift::new(shift).ok_or(WireError::Value {
            what: "the chunk size of sums",
            found: shift.into(),
        })?;
        let count = take.u64()?;
        let mut regions = BTreeMap::new();
        // One after the other: a count that is a lie ends with the bytes.
        for _ in 0..count {
            let region = take.u64()?;
            regions.insert(region, from_bytes(&take.array()?));
        }
        Ok(Sums { chunk, regions })
    }
}

/// Chunks of a region.
#[must_use]
pub fn region_chunks(chunk: ChunkShift) -> u64 {
    1 << (REGION_SHIFT - chunk.get())
}

/// The hash of a chunk; none for one of zeros.
#[must_use]
pub fn chunk_hash(chunk: ChunkShift, number: u64, data: &[u8]) -> Option<[u8; 32]> {
    if is_zero(data) {
        return None;
    }
    let mut hasher = blake3::Hasher::new();
    hasher.update(&number.to_le_bytes());
    hasher.update(data);
    const ZEROS: [u8; 4096] = [0; 4096];
    let mut missing = (chunk.bytes() as usize).saturating_sub(data.len());
    while missing > 0 {
        let some = missing.min(ZEROS.len());
        hasher.update(&ZEROS[..some]);
        missing -= some;
    }
    Some(hasher.finalize().into())
}

/// Whether there is nothing but zeros.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    let mut words = data.chunks_exact(16);
    words.by_ref().all(|word| word == [0; 16]) && words.remainder().iter().all(|byte| *byte == 0)
}

fn add(a: Sum, b: Sum) -> Sum {
    let (mut sum, mut carry) = (Sum::default(), false);
    for i in 0..4 {
        let (part, over) = a[i].overflowing_add(b[i]);
        let (part, over_again) = part.overflowing_add(carry.into());
        sum[i] = part;
        carry = over || over_again;
    }
    sum
}

fn subtract(a: Sum, b: Sum) -> Sum {
    let (mut difference, mut borrow) = (Sum::default(), false);
    for i in 0..4 {
        let (part, under) = a[i].overflowing_sub(b[i]);
        let (part, under_again) = part.overflowing_sub(borrow.into());
        difference[i] = part;
        borrow = under || under_again;
    }
    difference
}

fn from_bytes(bytes: &[u8; 32]) -> Sum {
    let mut sum = Sum::default();
    for (word, part) in sum.iter_mut().zip(bytes.chunks_exact(8)) {
        let mut array = [0; 8];
        array.copy_from_slice(part);
        *word = u64::from_le_bytes(array);
    }
    sum
}

fn to_bytes(sum: &Sum) -> [u8; 32] {
    let mut bytes = [0; 32];
    for (word, part) in sum.iter().zip(bytes.chunks_exact_mut(8)) {
        part.copy_from_slice(&word.to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chunk() -> ChunkShift {
        ChunkShift::new(9).unwrap()
    }

    fn of(chunks: &[(u64, &[u8])]) -> Sums {
        let mut sums = Sums::new(chunk());
        for (number, data) in chunks {
            sums.replace(*number, &[], data);
        }
        sums
    }

    /// If the way mattered, two sites with equal bytes would have different roots.
    #[test]
    fn sums_depend_on_the_content_and_not_on_the_way_there() {
        let (a, b, zero) = ([1; 512], [2; 512], [0; 512]);
        let direct = of(&[(0, &a), (7, &b), (1 << 30, &a)]);
        let mut round = of(&[(1 << 30, &b), (7, &a), (3, &a)]);
        round.replace(1 << 30, &b, &a);
        round.replace(3, &a, &zero);
        round.replace(0, &zero, &a);
        round.replace(7, &a, &b);
        assert_eq!(direct, round);
        assert_eq!(direct.root(), round.root());
        round.replace(7, &b, &a);
        assert_ne!(direct.root(), round.root());
    }

    #[test]
    fn place_and_content_both_count() {
        let (a, b) = ([1; 512], [2; 512]);
        let roots = [
            of(&[]).root(),
            of(&[(0, &a)]).root(),
            of(&[(1, &a)]).root(),
            of(&[(0, &b)]).root(),
            of(&[(0, &a), (1, &b)]).root(),
            of(&[(0, &b), (1, &a)]).root(),
        ];
        for (i, root) in roots.iter().enumerate() {
            assert!(!roots[..i].contains(root), "{i}");
        }
    }

    /// A volume that grew has zeros where it had nothing; sparse volumes cost nothing.
    #[test]
    fn zeros_count_nothing_and_short_chunks_are_filled_up() {
        assert_eq!(of(&[(5, &[0; 512]), (6, &[])]), of(&[]));
        let mut long = [0; 512];
        long[..100].fill(9);
        assert_eq!(of(&[(5, &[9; 100])]), of(&[(5, &long)]));
        assert_eq!(of(&[(5, &[9; 100])]).regions.len(), 1);
    }

    #[test]
    fn a_run_is_its_chunks() {
        let data: Vec<u8> = (0..1300u32).map(|i| i as u8).collect();
        let mut run = Sums::new(chunk());
        run.replace_run(8, &[], &data);
        assert_eq!(
            run,
            of(&[
                (8, &data[..512]),
                (9, &data[512..1024]),
                (10, &data[1024..])
            ])
        );
        run.replace_run(8, &data, &data[..512]);
        assert_eq!(run, of(&[(8, &data[..512])]));
    }

    /// The sender adds up batch by batch, as they are acknowledged.
    #[test]
    fn changes_can_be_summed_apart_and_merged() {
        let (a, b) = ([1; 512], [2; 512]);
        let mut base = of(&[(0, &a), (1 << 20, &b)]);
        let mut change = Sums::new(chunk());
        change.replace(0, &a, &b);
        change.replace(1 << 20, &b, &[]);
        base.merge(&change);
        assert_eq!(base, of(&[(0, &b)]));
    }

    #[test]
    fn sums_carry_and_borrow() {
        let most = [u64::MAX; 4];
        let one = [1, 0, 0, 0];
        assert_eq!(add(most, one), [0; 4]);
        assert_eq!(subtract([0; 4], one), most);
        assert_eq!(subtract(add(most, most), most), most);
    }

    /// The root is on the wire and on disk: what it is made of must not drift.
    #[test]
    fn the_root_is_pinned() {
        let root = of(&[(0, &[1; 512]), (1 << 20, &[2; 512])]).root();
        assert_eq!(&root.to_string()[..16], "f396db97708d6b91");
    }

    #[test]
    fn sums_are_read_as_they_were_written() {
        let sums = of(&[(0, &[1; 512]), (1 << 20, &[2; 512])]);
        let mut put = Put::default();
        sums.encode(&mut put);
        let mut take = Take::new("sums", &put.0);
        assert_eq!(Sums::decode(&mut take), Ok(sums));
        for length in 0..put.0.len() {
            let mut take = Take::new("sums", &put.0[..length]);
            assert!(Sums::decode(&mut take).is_err());
        }
    }
}
