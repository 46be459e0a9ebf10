// SPDX-License-Identifier: GPL-2.0-only
//! Plain files as the volumes of both sides.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use ddsnap::units::{Chunk, ChunkRun, ChunkShift, Sectors};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use uuid::Uuid;
use zumastor::replication::message::{Begin, FEATURES, Hello, Wishes};
use zumastor::replication::progress::Progress;
use zumastor::replication::standing::{Epoch, Held, Partial, Role, Standing};
use zumastor::replication::sums::Sums;
use zumastor::replication::verify::Readable;
use zumastor::replication::volume::{Downstream, Upstream, Watch};

/// Length of a chunk.
pub const CHUNK_BYTES: usize = 16 << 10;
/// The snapshot that both have.
pub const BASE: u128 = 1;
const SNAPSHOT: u128 = 2;

/// Which end the files are.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Sends `new` against `old`.
    Up,
    /// Receives into `target` against `old`.
    Down,
}

/// The files of one end.
pub struct Files {
    side: Side,
    dir: PathBuf,
    base: File,
    other: File,
    length: Sectors,
    list: Vec<u64>,
}

impl Files {
    /// Opens them.
    pub fn open(dir: &Path, side: Side) -> Result<Files> {
        let name = if side == Side::Up { "new" } else { "target" };
        let open = |name: &str, write| {
            let path = dir.join(name);
            let file = File::options().read(true).write(write).open(&path);
            file.with_context(|| format!("cannot open {}", path.display()))
        };
        let base = open("old", false)?;
        let length = Sectors::in_bytes(base.metadata()?.len());
        Ok(Files {
            side,
            dir: dir.to_owned(),
            base,
            other: open(name, side == Side::Down)?,
            length,
            list: Vec::new(),
        })
    }

    /// The greeting.
    pub fn hello(&self) -> Hello {
        let up = self.side == Side::Up;
        let id = Uuid::from_u128;
        let held = |n: u128| Held {
            id: id(n),
            number: n as u32,
            taken: 0,
            length: self.length,
            data: true,
        };
        let mut all = vec![held(BASE)];
        if up {
            all.push(held(SNAPSHOT));
        }
        Hello {
            nonce: [up.into(); 16],
            features: FEATURES,
            wishes: Wishes::default(),
            standing: Standing {
                volume: id(if up { 10 } else { 11 }),
                lineage: Some(id(10)),
                epoch: Epoch {
                    number: 1,
                    owner: id(10),
                    since: 0,
                },
                role: if up { Role::Master } else { Role::Replica },
                chunk: ChunkShift::from_bytes(CHUNK_BYTES as u64).unwrap_or(ChunkShift::MAX),
                length: self.length,
                held: all,
                hold: Some(id(BASE)),
                old_hold: None,
                origin: Some(id(BASE)),
                partial: None,
                written: false,
            },
        }
    }

    /// Whether the target is what was sent.
    pub fn compare(&self) -> Result<()> {
        let (mut a, mut b) = (vec![0; 1 << 20], vec![0; 1 << 20]);
        let target = File::open(self.dir.join("target"))?;
        let mut at = 0;
        while at < self.length.to_bytes() {
            let count = (self.length.to_bytes() - at).min(1 << 20) as usize;
            self.other.read_exact_at(&mut a[..count], at)?;
            target.read_exact_at(&mut b[..count], at)?;
            if a[..count] != b[..count] {
                bail!("the target differs at byte {at}");
            }
            at += count as u64;
        }
        Ok(())
    }

    /// Seconds to bring the sums of all changed chunks up to date, their hashes given.
    pub fn time_sums(&mut self) -> Result<f64> {
        let mut sums = Upstream::sums(self, Uuid::from_u128(BASE))?.context("no sums")?;
        let bytes = fs::read(self.dir.join("list"))?;
        let chunks: Vec<u64> = bytes.chunks_exact(8).map(number).collect();
        let began = Instant::now();
        for &chunk in &chunks {
            sums.replace_hash(chunk, Some([chunk as u8 | 1; 32]), Some([3; 32]));
        }
        std::hint::black_box(sums.root());
        Ok(began.elapsed().as_secs_f64())
    }

    /// Length of the volume in bytes.
    pub fn bytes(&self) -> u64 {
        self.length.to_bytes()
    }

    /// Seconds to read `old` from one end to the other, from the disk.
    pub fn time_read(&self) -> Result<f64> {
        self.forget_base()?;
        let mut data = vec![0; 1 << 20];
        let (began, mut at) = (Instant::now(), 0);
        while at < self.bytes() {
            let count = (self.bytes() - at).min(1 << 20) as usize;
            self.base.read_exact_at(&mut data[..count], at)?;
            std::hint::black_box(&data);
            at += count as u64;
        }
        Ok(began.elapsed().as_secs_f64())
    }

    fn forget_base(&self) -> Result<()> {
        let advice = PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        Ok(posix_fadvise(&self.base, 0, 0, advice)?)
    }

    fn read_at(&self, file: &File, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        let chunk = ChunkShift::from_bytes(CHUNK_BYTES as u64).context("chunk size")?;
        into.resize(run.bytes_within(self.length, chunk) as usize, 0);
        Ok(file.read_exact_at(into, run.first.to_offset(chunk))?)
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes
        .iter()
        .rev()
        .fold(0, |value, byte| value << 8 | u64::from(*byte))
}

impl Upstream for Files {
    fn open(&mut self, _: &Begin) -> Result<bool> {
        let bytes = fs::read(self.dir.join("list"))?;
        self.list = bytes.chunks_exact(8).rev().map(number).collect();
        Ok(true)
    }

    fn next_run(&mut self, _: &dyn Watch) -> Result<Option<ChunkRun>> {
        Ok(self.list.pop().map(|first| ChunkRun {
            first: Chunk(first),
            chunks: 1,
        }))
    }

    fn read_base(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        self.read_at(&self.base, run, into)
    }

    fn read(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        self.read_at(&self.other, run, into)
    }

    fn sums(&mut self, _: Uuid) -> Result<Option<Sums>> {
        Ok(Progress::decode(&fs::read(self.dir.join("sums"))?)?.sums)
    }

    fn progress(&mut self) -> Result<Option<Progress>> {
        Ok(None)
    }

    fn save_progress(&mut self, progress: &Progress) -> Result<()> {
        Ok(fs::write(self.dir.join("sender"), progress.encode())?)
    }

    fn note_end(&mut self, _: Uuid, _: Option<&Sums>) -> Result<()> {
        Ok(())
    }

    fn pin(&mut self, _: Uuid) -> Result<()> {
        Ok(())
    }

    fn move_hold(&mut self, _: Uuid, _: Option<&Sums>, _: bool) -> Result<()> {
        Ok(())
    }

    fn superseded(&mut self, _: Epoch) -> Result<()> {
        Ok(())
    }
}

impl Readable for Files {
    fn open(&mut self, snapshot: &Held, _: ChunkShift) -> Result<()> {
        if snapshot.id != Uuid::from_u128(BASE) {
            bail!("not the snapshot that both have");
        }
        // Both ends are ready before either of them reads.
        self.forget_base()
    }

    fn read(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        self.read_at(&self.base, run, into)
    }

    fn note_again(&mut self, _: ChunkShift, _: &[ChunkRun]) -> Result<()> {
        Ok(())
    }
}

impl Downstream for Files {
    fn take_stock(&mut self, _: &dyn Watch) -> Result<Standing> {
        Ok(self.hello().standing)
    }

    fn adopt(&mut self, _: Epoch) -> Result<()> {
        Ok(())
    }

    fn superseded(&mut self, _: Epoch) -> Result<()> {
        Ok(())
    }

    fn release_old(&mut self) -> Result<()> {
        Ok(())
    }

    fn safety_snapshot(&mut self) -> Result<()> {
        bail!("nobody wrote to it")
    }

    fn unsettle(&mut self) -> Result<()> {
        bail!("there is nothing to take back")
    }

    fn restore(&mut self, _: Uuid, _: &dyn Watch) -> Result<()> {
        bail!("there is nothing to take back")
    }

    fn start_partial(&mut self, _: Partial, _: Uuid, _: Epoch) -> Result<()> {
        Ok(())
    }

    fn open(&mut self, _: &Begin, _: ChunkShift) -> Result<()> {
        Ok(())
    }

    fn read_base(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        self.read_at(&self.base, run, into)
    }

    fn write(&mut self, run: ChunkRun, data: &[u8]) -> Result<()> {
        Ok(self
            .other
            .write_all_at(data, run.first.0 * CHUNK_BYTES as u64)?)
    }

    fn write_zeros(&mut self, run: ChunkRun, bytes: u64) -> Result<()> {
        Downstream::write(self, run, &vec![0; bytes as usize])
    }

    fn flush(&mut self) -> Result<()> {
        Ok(self.other.sync_data()?)
    }

    fn sums(&mut self, snapshot: Uuid) -> Result<Option<Sums>> {
        Upstream::sums(self, snapshot)
    }

    fn progress(&mut self) -> Result<Option<Progress>> {
        Ok(None)
    }

    fn save_progress(&mut self, progress: &Progress) -> Result<()> {
        let file = File::create(self.dir.join("receiver"))?;
        file.write_all_at(&progress.encode(), 0)?;
        Ok(file.sync_data()?)
    }

    fn finish(&mut self, _: &Begin, _: Option<&Sums>, _: bool) -> Result<u32> {
        Ok(2)
    }
}
