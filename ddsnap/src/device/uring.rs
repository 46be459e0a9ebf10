// SPDX-License-Identifier: GPL-2.0-only
//! Real devices and plain files, through io_uring.
//!
//! Block devices and, where the file system allows it, files are opened with O_DIRECT: the store's
//! data is read at most once, so a page cache would only double it, and a lost write then shows as
//! an error of the write and not at some later flush. A batch runs in parallel, at most
//! [`IN_FLIGHT`] requests at a time.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use io_uring::{IoUring, Probe, opcode, squeue, types};

use super::lock::{self, FileLock, LockError, Mode};
use super::{BlockDevice, Read, Write};
use crate::stdio::complain;

/// Requests in the kernel at a time.
pub const IN_FLIGHT: u32 = 256;

/// Requests that end before the next are submitted, while many are under way: each wait is a system call.
const WAKE_AT: u32 = 8;

/// The longest single request: the kernel takes lengths up to 2 GiB, less keeps requests fair.
const MAX_REQUEST: usize = 1 << 20;

/// What the device is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading only.
    Read,
    /// Reading and writing.
    ReadWrite,
}

/// A block device or plain file.
pub struct UringDevice {
    file: File,
    ring: IoUring,
    name: String,
    len_bytes: u64,
    alignment: usize,
    lock: Option<FileLock>,
    block_device: bool,
}

/// One request of a batch, split to the longest allowed.
struct Piece {
    offset: u64,
    address: *mut u8,
    len: usize,
}

impl UringDevice {
    /// Opens `path`, which is a block device or a plain file.
    ///
    /// # Errors
    /// It cannot be opened, is neither, or the kernel has no io_uring with read, write and fsync.
    pub fn open(path: &Path, access: Access) -> io::Result<Self> {
        let write = access == Access::ReadWrite;
        let plain = OpenOptions::new().read(true).write(write).open(path)?;
        let kind = plain.metadata()?.file_type();
        if !kind.is_block_device() && !kind.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a block device nor a plain file",
            ));
        }
        let direct = OpenOptions::new()
            .read(true)
            .write(write)
            .custom_flags(nix::libc::O_DIRECT)
            .open(path);
        let (file, alignment) = match direct {
            Ok(file) => match direct_alignment(&file, kind.is_block_device()) {
                Some(alignment) if kind.is_block_device() || alignment == 512 => (file, alignment),
                // A file whose sectors are larger than the smallest chunk: let the page cache do it.
                _ => (plain, 512),
            },
            Err(_) if kind.is_file() => (plain, 512),
            Err(error) => return Err(error),
        };
        let len_bytes = len_of(&file)?;
        let ring = IoUring::new(IN_FLIGHT)?;
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe)?;
        for (code, name) in [
            (opcode::Read::CODE, "read"),
            (opcode::Write::CODE, "write"),
            (opcode::Fsync::CODE, "fsync"),
        ] {
            if !probe.is_supported(code) {
                return Err(io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!("this kernel's io_uring has no {name}; Linux 5.6 or newer is needed"),
                ));
            }
        }
        let name = path.display().to_string();
        Ok(UringDevice {
            file,
            ring,
            name,
            len_bytes,
            alignment,
            lock: None,
            block_device: kind.is_block_device(),
        })
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Locks the device, as [`lock::lock_within`] does, and measures it.
    ///
    /// The lock lasts until this is dropped and the kernel has ended all that was asked of the device, also if
    /// the process is killed before.
    ///
    /// # Errors
    /// [`LockError`]; `Exclusive` needs [`Access::ReadWrite`].
    pub fn lock_within(
        &mut self,
        mode: Mode,
        patience: Duration,
        quiet: Duration,
        on_wait: impl FnOnce(Option<u32>),
    ) -> Result<(), LockError> {
        let lock = lock::lock_within(&self.file, mode, patience, quiet, on_wait)?;
        self.keep(lock)
    }

    fn keep(&mut self, lock: FileLock) -> Result<(), LockError> {
        // Requests hold on to the file they are for. The kernel lets go of what is registered with the ring
        // when the last of the ring's requests has ended.
        if let Some(device) = lock.device() {
            let submitter = self.ring.submitter();
            submitter.register_files(&[device.as_raw_fd()])?;
        }
        self.lock = Some(lock);
        // While we waited it may have become longer or shorter.
        self.measure()?;
        Ok(())
    }

    fn check(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let align = self.alignment as u64;
        let aligned = offset % align == 0
            && bytes.len() as u64 % align == 0
            && bytes.as_ptr() as usize % self.alignment == 0;
        if !aligned {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!(
                    "{} bytes at {offset} are not aligned to {align}",
                    bytes.len()
                ),
            ));
        }
        if offset
            .checked_add(bytes.len() as u64)
            .is_none_or(|end| end > self.len_bytes)
        {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!(
                    "{} bytes at {offset} reach beyond the end, {}",
                    bytes.len(),
                    self.len_bytes
                ),
            ));
        }
        Ok(())
    }

    /// Runs all pieces; the memory they point to outlives the call, which waits for each of them.
    fn run(&mut self, pieces: &mut [Piece], write: bool) -> io::Result<()> {
        let fd = types::Fd(self.file.as_raw_fd());
        let mut waiting: Vec<usize> = (0..pieces.len()).rev().collect();
        let mut flying = 0;
        let mut failed: Option<io::Error> = None;
        loop {
            while flying < IN_FLIGHT && failed.is_none() {
                let Some(index) = waiting.pop() else { break };
                let piece = &pieces[index];
                let len = piece.len as u32; // at most MAX_REQUEST
                let entry = if write {
                    opcode::Write::new(fd, piece.address, len)
                        .offset(piece.offset)
                        .build()
                } else {
                    opcode::Read::new(fd, piece.address, len)
                        .offset(piece.offset)
                        .build()
                };
                self.push(entry.user_data(index as u64));
                flying += 1;
            }
            if flying == 0 {
                return failed.map_or(Ok(()), Err);
            }
            self.submit_and_wait(flying.min(WAKE_AT) as usize);
            while let Some(done) = self.ring.completion().next() {
                flying -= 1;
                let index = done.user_data() as usize;
                let piece = &mut pieces[index];
                match done.result() {
                    result if result == -nix::libc::EINTR || result == -nix::libc::EAGAIN => {
                        waiting.push(index);
                    }
                    result if result < 0 => {
                        failed = failed.or(Some(io::Error::from_raw_os_error(-result)));
                    }
                    0 => {
                        let text = format!("no bytes moved at {}", piece.offset);
                        failed =
                            failed.or(Some(io::Error::new(io::ErrorKind::UnexpectedEof, text)));
                    }
                    result => {
                        let moved = result as usize;
                        if moved < piece.len {
                            if moved % self.alignment != 0 {
                                let text = format!("only {moved} bytes moved at {}", piece.offset);
                                failed = failed.or(Some(io::Error::other(text)));
                                continue;
                            }
                            piece.offset += moved as u64;
                            piece.len -= moved;
                            // SAFETY: the piece spans `len` bytes of one buffer, `moved` is less.
                            piece.address = unsafe { piece.address.add(moved) };
                            waiting.push(index);
                        }
                    }
                }
            }
        }
    }

    fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: the entry's buffer and file descriptor stay valid until its completion was seen:
        // `run` and `flush` return only then.
        let pushed = unsafe { self.ring.submission().push(&entry) };
        if pushed.is_err() {
            // The queue holds IN_FLIGHT entries and no more are ever under way.
            self.give_up(&io::Error::other("the submission queue is full"));
        }
    }

    /// Ends the process: requests may be in flight into buffers that an unwinding caller would
    /// free. It does not happen short of a bug, here or in the kernel.
    fn give_up(&self, error: &io::Error) -> ! {
        complain(format_args!(
            "{}: io_uring failed with requests in flight: {error}",
            self.name
        ));
        std::process::abort();
    }

    fn submit_and_wait(&mut self, count: usize) {
        loop {
            match self.ring.submit_and_wait(count) {
                Ok(_) => return,
                Err(error) if error.raw_os_error() == Some(nix::libc::EINTR) => {}
                Err(error) if error.raw_os_error() == Some(nix::libc::EBUSY) => return,
                Err(error) => self.give_up(&error),
            }
        }
    }
}

fn split(offset: u64, address: *mut u8, len: usize, pieces: &mut Vec<Piece>) {
    let mut at = 0;
    while at < len {
        let part = (len - at).min(MAX_REQUEST);
        // SAFETY: `at` is less than `len`, the length of the buffer that starts at `address`.
        let address = unsafe { address.add(at) };
        pieces.push(Piece {
            offset: offset + at as u64,
            address,
            len: part,
        });
        at += part;
    }
}

impl BlockDevice for UringDevice {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn measure(&mut self) -> io::Result<u64> {
        self.len_bytes = len_of(&self.file)?;
        Ok(self.len_bytes)
    }

    fn alignment(&self) -> usize {
        self.alignment
    }

    fn sector_bytes(&self) -> Option<u64> {
        // A block device is open with O_DIRECT, which aligns to its sectors.
        self.block_device.then_some(self.alignment as u64)
    }

    fn name(&self) -> &str {
        &self.name
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> io::Result<()> {
        let mut pieces = Vec::with_capacity(batch.len());
        for read in batch {
            self.check(read.offset, read.into)?;
            split(
                read.offset,
                read.into.as_mut_ptr(),
                read.into.len(),
                &mut pieces,
            );
        }
        self.run(&mut pieces, false)
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        let mut pieces = Vec::with_capacity(batch.len());
        for write in batch {
            self.check(write.offset, write.from)?;
            // The kernel only reads through this pointer.
            split(
                write.offset,
                write.from.as_ptr().cast_mut(),
                write.from.len(),
                &mut pieces,
            );
        }
        self.run(&mut pieces, true)
    }

    fn flush(&mut self) -> io::Result<()> {
        let fd = types::Fd(self.file.as_raw_fd());
        loop {
            self.push(
                opcode::Fsync::new(fd)
                    .flags(types::FsyncFlags::DATASYNC)
                    .build(),
            );
            self.submit_and_wait(1);
            let done = loop {
                if let Some(done) = self.ring.completion().next() {
                    break done;
                }
                self.submit_and_wait(1);
            };
            match done.result() {
                0.. => return Ok(()),
                result if result == -nix::libc::EINTR => {}
                result => return Err(io::Error::from_raw_os_error(-result)),
            }
        }
    }
}

fn len_of(file: &File) -> io::Result<u64> {
    use std::io::{Seek, SeekFrom};
    // The end of a block device is where seeking to its end leads; its metadata says 0.
    let mut file = file;
    file.seek(SeekFrom::End(0))
}

mod ioctl {
    #![allow(missing_docs, reason = "the macro makes public functions")]
    nix::ioctl_read_bad!(blksszget, nix::libc::BLKSSZGET, nix::libc::c_int);
}

/// Bytes to which direct I/O must be aligned; none if it is not to be had.
fn direct_alignment(file: &File, block_device: bool) -> Option<usize> {
    if block_device {
        let mut sector = 0;
        // SAFETY: BLKSSZGET writes one int, which `sector` is.
        unsafe { ioctl::blksszget(file.as_raw_fd(), &mut sector) }.ok()?;
        return usize::try_from(sector)
            .ok()
            .filter(|sector| (512..=4096).contains(sector));
    }
    // Ask the file system by trying: a read of 512 bytes at 0 works where 512 is enough. An empty
    // file reads 0 bytes either way.
    let mut buffer = crate::buffer::AlignedBuf::zeroed(4096);
    let readable = std::os::unix::fs::FileExt::read_at(file, &mut buffer[512..1024], 512);
    readable.ok().map(|_| 512)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buffer::AlignedBuf;

    #[test]
    fn a_batch_longer_than_the_ring_comes_back() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8 << 20).unwrap();
        let mut device = UringDevice::open(file.path(), Access::ReadWrite).unwrap();
        assert_eq!(device.len_bytes(), 8 << 20);
        let data: Vec<AlignedBuf> = (0..300u32)
            .map(|i| {
                let mut buffer = AlignedBuf::zeroed(4096);
                buffer[..4].copy_from_slice(&i.to_le_bytes());
                buffer
            })
            .collect();
        let batch: Vec<_> = data
            .iter()
            .enumerate()
            .map(|(i, from)| Write {
                offset: i as u64 * 8192,
                from,
            })
            .collect();
        device.write(&batch).unwrap();
        device.flush().unwrap();
        let mut back = AlignedBuf::zeroed(300 * 4096);
        let mut reads: Vec<_> = back
            .chunks_mut(4096)
            .enumerate()
            .map(|(i, into)| Read {
                offset: i as u64 * 8192,
                into,
            })
            .collect();
        device.read(&mut reads).unwrap();
        assert!(back.chunks(4096).zip(&data).all(|(a, b)| a == &b[..]));
        // A request longer than one submission.
        let mut long = AlignedBuf::zeroed(3 << 20);
        device
            .read(&mut [Read {
                offset: 0,
                into: &mut long,
            }])
            .unwrap();
        assert_eq!(&long[8192..8196], &1u32.to_le_bytes());
    }

    #[test]
    fn a_file_that_grew_is_measured_anew() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let mut device = UringDevice::open(file.path(), Access::Read).unwrap();
        file.as_file().set_len(16384).unwrap();
        assert_eq!(device.len_bytes(), 8192);
        assert_eq!(device.measure().unwrap(), 16384);
        let mut buffer = AlignedBuf::zeroed(4096);
        device
            .read(&mut [Read {
                offset: 12288,
                into: &mut buffer,
            }])
            .unwrap();
    }

    #[test]
    fn beyond_the_end_and_unaligned_are_errors() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let mut device = UringDevice::open(file.path(), Access::ReadWrite).unwrap();
        let buffer = AlignedBuf::zeroed(8192);
        let kind = |result: io::Result<()>| result.unwrap_err().kind();
        assert_eq!(
            kind(device.write(&[Write {
                offset: 4096,
                from: &buffer
            }])),
            io::ErrorKind::UnexpectedEof
        );
        assert_eq!(
            kind(device.write(&[Write {
                offset: 100,
                from: &buffer[..512]
            }])),
            io::ErrorKind::InvalidInput
        );
        assert_eq!(
            kind(device.write(&[Write {
                offset: u64::MAX - 511,
                from: &buffer[..512]
            }])),
            io::ErrorKind::UnexpectedEof
        );
    }
}
