// SPDX-License-Identifier: GPL-2.0-only
//! A disk with a volatile cache: what was not flushed is lost, torn and reordered when its power goes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

/// What every disk writes whole or not at all.
const SECTOR: u64 = 512;

/// Sectors of a block of 4 KiB, which a disk with such blocks writes whole or not at all.
const BLOCK: u64 = 8;

/// More than so much in the cache is made durable, as a disk does whose cache is full.
const CACHE_BYTES: u64 = 64 << 20;

/// A small, repeatable generator of random numbers (SplitMix64).
pub struct Rng(u64);

impl Rng {
    /// The sequence of this seed.
    pub fn new(seed: u64) -> Self {
        Rng(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next_u64() % end
    }
}

/// How much of what was not flushed survives a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Survival {
    /// Nothing.
    None,
    /// Everything.
    All,
    /// The writes before some moment, none of the later ones.
    Before,
    /// Whole writes, each with this chance in percent.
    Writes(u64),
    /// Each sector of each write with this chance in percent; of a disk that writes blocks whole, each
    /// block.
    Sectors(u64),
}

/// What of a write survives together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Whole {
    /// A sector of 512 bytes.
    #[default]
    Sectors,
    /// What lies in one block of 4 KiB.
    Blocks,
}

impl Survival {
    fn choose(rng: &mut Rng) -> Self {
        match rng.below(9) {
            0 => Survival::None,
            1 => Survival::All,
            2 | 3 => Survival::Before,
            4 => Survival::Writes(50),
            5 => Survival::Writes(90),
            6 => Survival::Sectors(10),
            7 => Survival::Sectors(50),
            _ => Survival::Sectors(90),
        }
    }
}

/// What a power cut did to a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// The rule by which it was chosen what survives.
    pub survival: Survival,
    /// Sectors that had been written and not flushed.
    pub sectors: u64,
    /// Of these, sectors that do not hold what was last written to them.
    pub lost: u64,
}

impl std::fmt::Display for Loss {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "lost {} of {} unflushed sectors ({:?})",
            self.lost, self.sectors, self.survival
        )
    }
}

/// What one write put into one sector.
struct Version {
    write: u64,
    bytes: Arc<[u8]>,
    at: usize,
}

impl Version {
    fn bytes(&self) -> &[u8] {
        &self.bytes[self.at..self.at + SECTOR as usize]
    }
}

/// A disk.
pub struct Disk {
    len: u64,
    /// What is durable; of a disk with a base, the sectors that `written` names.
    medium: File,
    base: Option<Base>,
    /// By sector: what was written to it since it was last durable, oldest first.
    cache: BTreeMap<u64, Vec<Version>>,
    cached_bytes: u64,
    /// Number of the next write.
    next_write: u64,
}

/// What a disk holds where nothing was made durable yet.
struct Base {
    file: File,
    /// One bit for each sector of the medium.
    written: Vec<u64>,
}

impl Base {
    fn covers(&self, sector: u64) -> bool {
        self.written[(sector / 64) as usize] >> (sector % 64) & 1 == 0
    }

    fn forget(&mut self, sector: u64) {
        self.written[(sector / 64) as usize] |= 1 << (sector % 64);
    }
}

impl Disk {
    /// A disk of `len` bytes, a multiple of 512, on an empty file. It holds what `base` holds, or zeroes.
    ///
    /// # Errors
    /// The file cannot be made so long.
    pub fn new(medium: File, len: u64, base: Option<File>) -> io::Result<Self> {
        medium.set_len(len)?;
        let written = vec![0; (len / SECTOR).div_ceil(64) as usize];
        Ok(Disk {
            len,
            medium,
            base: base.map(|file| Base { file, written }),
            cache: BTreeMap::new(),
            cached_bytes: 0,
            next_write: 0,
        })
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Number the next write will have.
    pub fn next_write(&self) -> u64 {
        self.next_write
    }

    fn check(&self, offset: u64, len: usize) -> io::Result<()> {
        let aligned = offset % SECTOR == 0 && len as u64 % SECTOR == 0;
        let inside = offset
            .checked_add(len as u64)
            .is_some_and(|end| end <= self.len);
        if aligned && inside {
            Ok(())
        } else {
            Err(io::ErrorKind::InvalidInput.into())
        }
    }

    /// Reads what was last written, durable or not.
    ///
    /// # Errors
    /// Not whole sectors, or not inside the disk; or the host's files cannot be read.
    pub fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        self.check(offset, into.len())?;
        let first = offset / SECTOR;
        self.medium.read_exact_at(into, offset)?;
        if let Some(base) = &self.base {
            let sectors: Vec<bool> = (first..first + into.len() as u64 / SECTOR)
                .map(|sector| base.covers(sector))
                .collect();
            let mut at = 0;
            for run in sectors.chunk_by(|a, b| a == b) {
                let bytes = run.len() * SECTOR as usize;
                if run[0] {
                    base.file
                        .read_exact_at(&mut into[at..at + bytes], offset + at as u64)?;
                }
                at += bytes;
            }
        }
        let end = first + into.len() as u64 / SECTOR;
        for (sector, versions) in self.cache.range(first..end) {
            let at = ((sector - first) * SECTOR) as usize;
            if let Some(newest) = versions.last() {
                into[at..at + SECTOR as usize].copy_from_slice(newest.bytes());
            }
        }
        Ok(())
    }

    /// Writes into the cache.
    ///
    /// # Errors
    /// Not whole sectors, or not inside the disk; or the host's file cannot be written.
    pub fn write(&mut self, offset: u64, from: &[u8]) -> io::Result<()> {
        self.check(offset, from.len())?;
        let bytes: Arc<[u8]> = from.into();
        for at in (0..from.len()).step_by(SECTOR as usize) {
            let version = Version {
                write: self.next_write,
                bytes: bytes.clone(),
                at,
            };
            let sector = (offset + at as u64) / SECTOR;
            self.cache.entry(sector).or_default().push(version);
        }
        self.cached_bytes += from.len() as u64;
        self.next_write += 1;
        if self.cached_bytes > CACHE_BYTES {
            self.flush(self.next_write)?;
        }
        Ok(())
    }

    /// Makes the writes with numbers below `end` durable.
    ///
    /// # Errors
    /// The host's file cannot be written.
    pub fn flush(&mut self, end: u64) -> io::Result<()> {
        self.keep(|_, versions| versions.iter().rposition(|version| version.write < end))?;
        self.cache.retain(|_, versions| {
            versions.retain(|version| version.write >= end);
            !versions.is_empty()
        });
        self.cached_bytes = self.cache.values().map(|v| v.len() as u64 * SECTOR).sum();
        Ok(())
    }

    /// The power goes: of what is in the cache, what `rng` chooses becomes durable, the rest is lost.
    ///
    /// # Errors
    /// The host's file cannot be written.
    pub fn cut(&mut self, rng: &mut Rng, whole: Whole) -> io::Result<Loss> {
        let survival = Survival::choose(rng);
        self.cut_by(survival, rng, whole)
    }

    fn cut_by(&mut self, survival: Survival, rng: &mut Rng, whole: Whole) -> io::Result<Loss> {
        let unit = match whole {
            Whole::Sectors => 1,
            Whole::Blocks => BLOCK,
        };
        let oldest = self.cache.values().flatten().map(|v| v.write).min();
        let oldest = oldest.unwrap_or(self.next_write);
        let moment = oldest + rng.below(self.next_write - oldest + 1);
        // Of what survives together the answer must be the same at each sector.
        let of_write = rng.next_u64();
        let survives = |sector: u64, write: u64| match survival {
            Survival::None => false,
            Survival::All => true,
            Survival::Before => write < moment,
            Survival::Writes(percent) => Rng::new(of_write ^ write).below(100) < percent,
            Survival::Sectors(percent) => {
                let part = Rng::new(of_write ^ write).next_u64() ^ (sector / unit);
                Rng::new(part).below(100) < percent
            }
        };
        let (mut sectors, mut lost) = (0, 0);
        self.keep(|sector, versions| {
            // Each version that survives is written over the one before.
            let kept = (0..versions.len()).rfind(|&i| survives(sector, versions[i].write));
            sectors += 1;
            lost += u64::from(kept != Some(versions.len() - 1));
            kept
        })?;
        self.cache.clear();
        self.cached_bytes = 0;
        Ok(Loss {
            survival,
            sectors,
            lost,
        })
    }

    /// Writes one version of each sector of the cache to the medium, the one `chosen` names.
    fn keep(&mut self, mut chosen: impl FnMut(u64, &[Version]) -> Option<usize>) -> io::Result<()> {
        let mut run: Vec<u8> = Vec::new();
        let mut start = 0;
        for (&sector, versions) in &self.cache {
            let Some(index) = chosen(sector, versions) else {
                continue;
            };
            if let Some(base) = &mut self.base {
                base.forget(sector);
            }
            if start + run.len() as u64 != sector * SECTOR {
                self.medium.write_all_at(&run, start)?;
                run.clear();
                start = sector * SECTOR;
            }
            run.extend_from_slice(versions[index].bytes());
        }
        self.medium.write_all_at(&run, start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    fn disk(base: Option<File>) -> Disk {
        Disk::new(tempfile::tempfile().unwrap(), 1 << 20, base).unwrap()
    }

    fn first_bytes(disk: &Disk) -> [u8; 2] {
        let mut bytes = [0; 1024];
        disk.read(0, &mut bytes).unwrap();
        [bytes[0], bytes[512]]
    }

    #[test]
    fn what_was_written_is_read_and_what_was_flushed_survives_every_cut() {
        for seed in 0..200 {
            let mut disk = disk(None);
            disk.write(0, &[1; 1024]).unwrap();
            assert_eq!(first_bytes(&disk), [1, 1]);
            disk.flush(disk.next_write()).unwrap();
            let loss = disk.cut(&mut Rng::new(seed), Whole::Sectors).unwrap();
            assert_eq!((loss.sectors, loss.lost), (0, 0));
            assert_eq!(first_bytes(&disk), [1, 1]);
        }
    }

    #[test]
    fn an_unflushed_overwrite_is_lost_torn_or_kept_by_the_seed_and_the_seed_repeats_it() {
        let after = |seed| {
            let mut disk = disk(None);
            disk.write(0, &[1; 1024]).unwrap();
            disk.flush(disk.next_write()).unwrap();
            disk.write(0, &[2; 1024]).unwrap();
            disk.write(512, &[3; 512]).unwrap();
            let loss = disk.cut(&mut Rng::new(seed), Whole::Sectors).unwrap();
            let found = first_bytes(&disk);
            let lost = u64::from(found[0] != 2) + u64::from(found[1] != 3);
            assert_eq!((loss.sectors, loss.lost), (2, lost));
            found
        };
        let seen: BTreeSet<_> = (0..300).map(after).collect();
        let all = [1, 2].map(|a| [1, 2, 3].map(|b| [a, b])).concat();
        assert_eq!(seen, all.into_iter().collect());
        assert!((0..100).all(|seed| after(seed) == after(seed)));
    }

    #[test]
    fn whole_writes_are_not_torn_and_later_ones_may_survive_alone() {
        let mut seen = BTreeSet::new();
        for seed in 0..100 {
            let mut disk = disk(None);
            disk.write(0, &[1; 1024]).unwrap();
            disk.write(0, &[2; 1024]).unwrap();
            disk.cut_by(Survival::Writes(50), &mut Rng::new(seed), Whole::Sectors)
                .unwrap();
            seen.insert(first_bytes(&disk));
        }
        assert_eq!(seen, [[0, 0], [1, 1], [2, 2]].into());
    }

    /// Recovery of XFS does not mend a block that is torn: it trusts the number in its first sector.
    #[test]
    fn a_disk_that_writes_blocks_whole_tears_at_their_borders_only() {
        let mut seen = BTreeSet::new();
        for seed in 0..300 {
            let mut disk = disk(None);
            disk.write(0, &[1; 16384]).unwrap();
            disk.write(6 * SECTOR, &[2; 2048]).unwrap();
            disk.cut_by(Survival::Sectors(50), &mut Rng::new(seed), Whole::Blocks)
                .unwrap();
            let mut bytes = [0; 16384];
            disk.read(0, &mut bytes).unwrap();
            let sectors: Vec<u8> = bytes.chunks(512).map(|sector| sector[0]).collect();
            for block in sectors[16..].chunks(8) {
                assert!(block.iter().all(|one| *one == block[0]), "{sectors:?}");
            }
            // The second write's halves, each with its block's rest.
            assert!(sectors[..6].iter().all(|one| *one == sectors[0]));
            assert_eq!(sectors[6], sectors[7]);
            assert_eq!(sectors[8], sectors[9]);
            seen.insert((sectors[0], sectors[6], sectors[8], sectors[24]));
        }
        assert_eq!(seen.len(), 4 * 3 * 2);
    }

    #[test]
    fn a_flush_covers_only_the_writes_before_its_end() {
        let mut disk = disk(None);
        disk.write(0, &[1; 512]).unwrap();
        let end = disk.next_write();
        disk.write(0, &[2; 1024]).unwrap();
        disk.flush(end).unwrap();
        assert_eq!(first_bytes(&disk), [2, 2]);
        disk.cut_by(Survival::None, &mut Rng::new(1), Whole::Sectors)
            .unwrap();
        assert_eq!(first_bytes(&disk), [1, 0]);
    }

    #[test]
    fn the_base_shows_where_nothing_durable_was_written() {
        let base = tempfile::tempfile().unwrap();
        base.write_all_at(&vec![7; 1 << 20], 0).unwrap();
        let mut disk = disk(Some(base));
        disk.write(512, &[1; 512]).unwrap();
        assert_eq!(first_bytes(&disk), [7, 1]);
        disk.cut_by(Survival::None, &mut Rng::new(1), Whole::Sectors)
            .unwrap();
        assert_eq!(first_bytes(&disk), [7, 7]);
        disk.write(512, &[1; 512]).unwrap();
        disk.cut_by(Survival::All, &mut Rng::new(1), Whole::Sectors)
            .unwrap();
        assert_eq!(first_bytes(&disk), [7, 1]);
    }

    #[test]
    fn a_full_cache_becomes_durable_and_the_end_is_guarded() {
        let mut disk = Disk::new(tempfile::tempfile().unwrap(), 1 << 30, None).unwrap();
        for i in 0..=CACHE_BYTES >> 20 {
            disk.write(i << 20, &vec![1; 1 << 20]).unwrap();
        }
        assert_eq!(disk.cached_bytes, 0);
        assert!(disk.write(1 << 30, &[0; 512]).is_err());
        assert!(disk.write(u64::MAX - 511, &[0; 512]).is_err());
        assert!(disk.read(100, &mut [0; 512]).is_err());
    }
}
