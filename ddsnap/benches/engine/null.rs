// SPDX-License-Identifier: GPL-2.0-only
//! Devices for measuring metadata alone: ten million chunks of data would only take disk space and time.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

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

/// Whether a device's flushes reach the disk.
#[derive(Clone, Debug, Default)]
pub struct Flushing(Rc<Cell<bool>>);

impl Flushing {
    /// From now on.
    pub fn set(&self, on: bool) {
        self.0.set(on);
    }
}

/// A device whose flushes do nothing while that is switched off, as it is at first: for building what
/// is measured later, where no power cut is to be survived.
pub struct Unflushed<D> {
    inner: D,
    flushing: Flushing,
}

impl<D: BlockDevice> Unflushed<D> {
    /// A device that flushes when `flushing` says so.
    pub fn new(inner: D, flushing: &Flushing) -> Self {
        Unflushed {
            inner,
            flushing: flushing.clone(),
        }
    }
}

impl<D: BlockDevice> BlockDevice for Unflushed<D> {
    fn len_bytes(&self) -> u64 {
        self.inner.len_bytes()
    }

    fn alignment(&self) -> usize {
        self.inner.alignment()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> io::Result<()> {
        self.inner.read(batch)
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        self.inner.write(batch)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.flushing.0.get() {
            self.inner.flush()
        } else {
            Ok(())
        }
    }
}
