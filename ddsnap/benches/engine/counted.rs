// SPDX-License-Identifier: GPL-2.0-only
//! A device that counts what passes, and how long each kind of call takes.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::{Duration, Instant};

use ddsnap::device::{BlockDevice, Read, Write};

/// What passed since the counts were last taken.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Bytes written.
    pub written_bytes: u64,
    /// Writes to the place of the superblock's first copy: one a checkpoint.
    pub checkpoints: u64,
    /// Flushes.
    pub flushes: u64,
    /// Time in reading.
    pub reading: Duration,
    /// Time in writing.
    pub writing: Duration,
    /// Time in flushing.
    pub flushing: Duration,
}

/// The counts of one or several devices.
#[derive(Clone, Debug, Default)]
pub struct Counter(Rc<RefCell<Counts>>);

impl Counter {
    /// The counts so far; counting begins again.
    pub fn take(&self) -> Counts {
        self.0.take()
    }

    /// The counts so far.
    pub fn now(&self) -> Counts {
        *self.0.borrow()
    }
}

/// See the module.
pub struct Counted<D> {
    inner: D,
    counter: Counter,
    /// Whether a superblock lies at the device's start.
    superblock: bool,
}

impl<D: BlockDevice> Counted<D> {
    /// Counts on `counter` what reaches `inner`. `superblock`: the store's superblock lies on it.
    pub fn new(inner: D, counter: &Counter, superblock: bool) -> Self {
        Counted {
            inner,
            counter: counter.clone(),
            superblock,
        }
    }
}

impl<D: BlockDevice> BlockDevice for Counted<D> {
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
        let started = Instant::now();
        let result = self.inner.read(batch);
        self.counter.0.borrow_mut().reading += started.elapsed();
        result
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        let started = Instant::now();
        let result = self.inner.write(batch);
        let mut counts = self.counter.0.borrow_mut();
        counts.writing += started.elapsed();
        counts.written_bytes += batch
            .iter()
            .map(|write| write.from.len() as u64)
            .sum::<u64>();
        let first_copy = self.superblock && batch.iter().any(|write| write.offset == 0);
        counts.checkpoints += u64::from(first_copy);
        result
    }

    fn flush(&mut self) -> io::Result<()> {
        let started = Instant::now();
        let result = self.inner.flush();
        let mut counts = self.counter.0.borrow_mut();
        counts.flushing += started.elapsed();
        counts.flushes += 1;
        result
    }
}
