// SPDX-License-Identifier: GPL-2.0-only
//! Devices for measuring metadata alone: ten million chunks of data would only take disk space and time.

use std::io;

use ddsnap::device::{BlockDevice, Read, Write};

/// A device that forgets what is written: it reads as zeros, but for what it begins with.
pub struct Null {
    len_bytes: u64,
    head: Vec<u8>,
}

impl Null {
    /// One of this length that begins with `head`.
    pub fn new(len_bytes: u64, head: &[u8]) -> Self {
        Null {
            len_bytes,
            head: head.to_vec(),
        }
    }
}

impl BlockDevice for Null {
    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn alignment(&self) -> usize {
        512
    }

    fn name(&self) -> &str {
        "null"
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> io::Result<()> {
        for read in batch {
            read.into.fill(0);
            let from = self.head.len().min(read.offset as usize);
            let known = &self.head[from..];
            let len = known.len().min(read.into.len());
            read.into[..len].copy_from_slice(&known[..len]);
        }
        Ok(())
    }

    fn write(&mut self, _batch: &[Write<'_>]) -> io::Result<()> {
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A device whose flushes do nothing: for building what is measured later, where no power cut is to
/// be survived.
pub struct Unflushed<D>(pub D);

impl<D: BlockDevice> BlockDevice for Unflushed<D> {
    fn len_bytes(&self) -> u64 {
        self.0.len_bytes()
    }

    fn alignment(&self) -> usize {
        self.0.alignment()
    }

    fn name(&self) -> &str {
        self.0.name()
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> io::Result<()> {
        self.0.read(batch)
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        self.0.write(batch)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
