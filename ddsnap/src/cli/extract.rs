// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap extract`: a snapshot out of the raw devices.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;

use super::new_file::{NewFile, refuse_input};
use super::{check_operands, offline, progress, snap_tag};
use crate::buffer::AlignedBuf;
use crate::device::lock::{FileLock, Mode, lock};
use crate::store::{SnapState, View};
use crate::units::{Chunk, SnapTag};

const USAGE: &str = "ddsnap extract [OPTIONS] SNAPSTORE ORIGIN [METADEV] TAG OUT";
/// Read and written at a time, unless a chunk is longer.
const WINDOW_BYTES: u64 = 1 << 20;

/// Copy a snapshot out of a store, without server, kernel module or root.
///
/// The devices are only read, and every saved chunk is compared with its checksum; the first that does not
/// fit ends the copy. OUT is a new file, with holes where the snapshot is zero; it gets its name when it is
/// complete. If OUT is a block device it is written in place, zeros too: that needs --force, and after an
/// error what it holds is of no use. A store that a server holds is refused. Exit code 99: no sound store.
#[derive(Debug, Args)]
#[command(override_usage = USAGE)]
pub struct Extract {
    /// Snapshot store, origin, perhaps metadata device, the snapshot's number, and where it goes.
    #[arg(value_name = "OPERAND", required = true, allow_negative_numbers = true)]
    operands: Vec<PathBuf>,
    /// Replace OUT if it is there.
    #[arg(short, long)]
    force: bool,
}

impl Extract {
    pub fn run(&self) -> Result<u8> {
        check_operands(&self.operands, 4..=5, USAGE)?;
        let (devices, [tag, out]) = self.operands.split_at(self.operands.len() - 2) else {
            bail!("{USAGE}"); // cannot be: they were counted
        };
        let tag = snap_tag(&tag.to_string_lossy())
            .map_err(|problem| anyhow!("{}: {problem}", tag.display()))?;
        let meta = devices.get(2);
        let target = Target::find(out, self.force, devices)?;
        let _lock = offline::share(&devices[0], meta.map(PathBuf::as_path))?;
        let mut view = offline::view(&devices[0], &devices[1], meta)?;
        let Some(info) = view.snapshot(tag) else {
            bail!("could not extract snapshot {tag} because snapshot doesn't exist");
        };
        match info.state {
            SnapState::Live => {}
            SnapState::Squashed => {
                bail!("could not extract snapshot {tag} because snapshot is squashed");
            }
            SnapState::Bookmark => {
                bail!(
                    "could not extract snapshot {tag} because it is a bookmark, which keeps no data"
                );
            }
        }
        let len_bytes = info.length.to_bytes();
        match target {
            Target::Device(device, path, _lock) => {
                let room = io::Seek::seek(&mut &device, io::SeekFrom::End(0))
                    .with_context(|| format!("cannot find the size of {}", path.display()))?;
                if room < len_bytes {
                    bail!(
                        "{}: it has {room} bytes, snapshot {tag} has {len_bytes}",
                        path.display()
                    );
                }
                copy(&mut view, tag, len_bytes, &device, &path, Zeros::Written)?;
                let synced = device.sync_all();
                synced.with_context(|| format!("cannot write {}", path.display()))?;
            }
            Target::File(path) => {
                let new = NewFile::create(&path, &[])?;
                let sized = new.file().set_len(len_bytes);
                sized.with_context(|| format!("cannot write {}", path.display()))?;
                copy(&mut view, tag, len_bytes, new.file(), &path, Zeros::Holes)?;
                new.publish(self.force)?;
            }
        }
        Ok(0)
    }
}

/// Where the snapshot goes.
enum Target {
    /// A file that is not there, or may be replaced.
    File(PathBuf),
    Device(File, PathBuf, FileLock),
}

impl Target {
    fn find(out: &Path, force: bool, devices: &[PathBuf]) -> Result<Target> {
        // Of a link, what it leads to is meant.
        let path = fs::canonicalize(out).unwrap_or_else(|_| out.to_owned());
        let found = match fs::symlink_metadata(&path) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Target::File(path)),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot look at {}", path.display()));
            }
        };
        let inputs: Vec<&Path> = devices.iter().map(PathBuf::as_path).collect();
        refuse_input(out, &inputs)?;
        if !found.is_file() && !found.file_type().is_block_device() {
            bail!(
                "{} is neither a plain file nor a block device",
                out.display()
            );
        }
        if !force {
            bail!("{} is there; --force replaces it", out.display());
        }
        if found.is_file() {
            return Ok(Target::File(path));
        }
        // Exclusive: a device that is mounted or part of another is refused.
        let device = File::options()
            .write(true)
            .custom_flags(nix::libc::O_EXCL)
            .open(&path)
            .with_context(|| format!("cannot write {}", out.display()))?;
        // A server's devices are not all part of another.
        let lock = lock(&device, Mode::Exclusive)
            .with_context(|| format!("cannot write {}", out.display()))?;
        Ok(Target::Device(device, path, lock))
    }
}

/// What becomes of chunks that are zero.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Zeros {
    /// The file was extended, so they are there already.
    Holes,
    Written,
}

fn copy(
    view: &mut View,
    tag: SnapTag,
    len_bytes: u64,
    out: &File,
    path: &Path,
    zeros: Zeros,
) -> Result<()> {
    let chunk_bytes = view.status().chunk.bytes();
    let window = (WINDOW_BYTES / chunk_bytes).max(1);
    let mut buffer = AlignedBuf::zeroed((window * chunk_bytes) as usize);
    let bar = progress::bar()?;
    bar.set_length(len_bytes);
    let chunks = len_bytes.div_ceil(chunk_bytes);
    for first in (0..chunks).step_by(window as usize) {
        let count = window.min(chunks - first);
        let bytes = &mut buffer[..(count * chunk_bytes) as usize];
        if let Err(refused) = view.read(tag, Chunk(first), bytes)? {
            bail!("could not extract snapshot {tag} because {refused}; is that its origin?");
        }
        // Of the last chunk, what the snapshot has of it.
        let start = first * chunk_bytes;
        let there = (len_bytes - start).min(bytes.len() as u64);
        for (offset, part) in runs(&bytes[..there as usize], chunk_bytes as usize, zeros) {
            out.write_all_at(part, start + offset as u64)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        bar.inc(there);
    }
    bar.finish_and_clear();
    Ok(())
}

/// The parts to write, with where they begin: neighbouring chunks together, zeros only if they count.
fn runs(bytes: &[u8], chunk_bytes: usize, zeros: Zeros) -> Vec<(usize, &[u8])> {
    if zeros == Zeros::Written {
        return vec![(0, bytes)];
    }
    let mut runs = Vec::new();
    let mut begin = None;
    for (index, chunk) in bytes.chunks(chunk_bytes).enumerate() {
        let at = index * chunk_bytes;
        if chunk.iter().any(|&byte| byte != 0) {
            begin.get_or_insert(at);
        } else if let Some(begin) = begin.take() {
            runs.push((begin, &bytes[begin..at]));
        }
    }
    runs.extend(begin.map(|begin| (begin, &bytes[begin..])));
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_leave_out_zero_chunks_and_nothing_else() {
        let mut bytes = vec![0; 8 * 512];
        for chunk in [1, 2, 5, 7] {
            bytes[chunk * 512 + 511] = 1;
        }
        let found = |zeros| -> Vec<_> {
            let runs = runs(&bytes, 512, zeros).into_iter();
            runs.map(|(at, part)| (at / 512, part.len() / 512))
                .collect()
        };
        assert_eq!(found(Zeros::Holes), [(1, 2), (5, 1), (7, 1)]);
        assert_eq!(found(Zeros::Written), [(0, 8)]);
        assert!(runs(&[0; 1024], 512, Zeros::Holes).is_empty());
    }
}
