// SPDX-License-Identifier: GPL-2.0-only
//! The files of a cycle: half of the data is noise and half is text, so that it compresses about as a file
//! server's does.

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use anyhow::Result;
use ddsnap::units::ChunkShift;
use uuid::Uuid;
use zumastor::replication::progress::Progress;
use zumastor::replication::sums::Sums;

use super::files::{BASE, CHUNK_BYTES};

/// What to make.
#[derive(clap::Args)]
pub struct Options {
    /// Where.
    #[arg(long)]
    dir: PathBuf,
    /// Length of the volume.
    #[arg(long)]
    bytes: u64,
    /// How many chunks change.
    #[arg(long)]
    changes: u64,
    /// Only 64 bytes of each chunk change, not all of it.
    #[arg(long)]
    small: bool,
}

/// SplitMix64 of Steele, Lea and Flood (2014).
pub struct Random(pub u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn fill(&mut self, data: &mut [u8]) {
        for (i, word) in data.chunks_mut(8).enumerate() {
            // Every second kilobyte is words of a small vocabulary.
            let value = if i / 128 % 2 == 0 {
                self.next()
            } else {
                u64::from_le_bytes(*b"zumastor") ^ (self.next() % 64)
            };
            word.copy_from_slice(&value.to_le_bytes()[..word.len()]);
        }
    }
}

/// Makes them; prints the bytes that changed and what zstd makes of each changed chunk by itself.
pub fn run(options: &Options) -> Result<()> {
    let dir = &options.dir;
    fs::create_dir_all(dir)?;
    let (mut random, chunks) = (Random(1), options.bytes / CHUNK_BYTES as u64);
    let mut data = vec![0; CHUNK_BYTES];
    let mut sums = Sums::new(ChunkShift::from_bytes(CHUNK_BYTES as u64).unwrap_or(ChunkShift::MAX));
    {
        let mut old = BufWriter::with_capacity(1 << 20, File::create(dir.join("old"))?);
        for chunk in 0..chunks {
            random.fill(&mut data);
            sums.replace(chunk, &[], &data);
            old.write_all(&data)?;
        }
        old.flush()?;
    }
    let base = Progress {
        snapshot: Uuid::from_u128(BASE),
        base: None,
        position: u64::MAX,
        plain: false,
        sums: Some(sums),
    };
    fs::write(dir.join("sums"), base.encode())?;
    for copy in ["new", "target"] {
        fs::copy(dir.join("old"), dir.join(copy))?;
    }
    let new = File::options()
        .read(true)
        .write(true)
        .open(dir.join("new"))?;
    let mut changed = BufWriter::new(File::create(dir.join("changed"))?);
    let stretch = (chunks / options.changes.max(1)).max(1);
    let (mut list, mut packed, mut total) = (Vec::new(), 0, 0);
    for i in 0..options.changes.min(chunks) {
        let chunk = i * stretch + random.next() % stretch;
        new.read_exact_at(&mut data, chunk * CHUNK_BYTES as u64)?;
        if options.small {
            let at = (random.next() % (CHUNK_BYTES as u64 - 64)) as usize;
            for word in data[at..at + 64].chunks_mut(8) {
                word.copy_from_slice(&random.next().to_le_bytes());
            }
        } else {
            random.fill(&mut data);
        }
        new.write_all_at(&data, chunk * CHUNK_BYTES as u64)?;
        changed.write_all(&data)?;
        list.extend_from_slice(&chunk.to_le_bytes());
        packed += zstd::bulk::compress(&data, 3)?.len();
        total += data.len();
    }
    changed.flush()?;
    fs::write(dir.join("list"), list)?;
    for name in ["old", "new", "target", "changed"] {
        File::open(dir.join(name))?.sync_all()?;
    }
    println!("make/changed {total}");
    println!("make/zstd {packed}");
    Ok(())
}
