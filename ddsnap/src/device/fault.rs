// SPDX-License-Identifier: GPL-2.0-only
//! A device that fails when it is told to, to test what the engine does then.

use std::cell::RefCell;
use std::io;
use std::rc::Rc;

use super::{BlockDevice, Read, Write};

/// Which kind of call fails.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Reads.
    Read,
    /// Writes: of a batch that fails, the first half is done.
    Write,
    /// Flushes: they do nothing.
    Flush,
}

/// Says when a [`FaultyDevice`] fails; clones speak of the same device.
#[derive(Clone, Debug, Default)]
pub struct Faults(Rc<RefCell<Plan>>);

#[derive(Debug, Default)]
struct Plan {
    next: Option<(Call, u64)>,
    met: u64,
}

impl Faults {
    /// The `count`th call of this kind from now on (0: the next) fails with EIO, once.
    pub fn fail(&self, call: Call, count: u64) {
        self.0.borrow_mut().next = Some((call, count));
    }

    /// How many calls have failed.
    #[must_use]
    pub fn met(&self) -> u64 {
        self.0.borrow().met
    }

    fn due(&self, call: Call) -> bool {
        let mut plan = self.0.borrow_mut();
        match &mut plan.next {
            Some((kind, 0)) if *kind == call => {
                plan.next = None;
                plan.met += 1;
                true
            }
            Some((kind, count)) if *kind == call => {
                *count -= 1;
                false
            }
            _ => false,
        }
    }
}

/// See the module.
pub struct FaultyDevice<D> {
    inner: D,
    faults: Faults,
}

impl<D: BlockDevice> FaultyDevice<D> {
    /// `inner`, failing as `faults` says.
    #[must_use]
    pub fn new(inner: D, faults: Faults) -> Self {
        FaultyDevice { inner, faults }
    }
}

fn eio() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::EIO)
}

impl<D: BlockDevice> BlockDevice for FaultyDevice<D> {
    fn len_bytes(&self) -> u64 {
        self.inner.len_bytes()
    }

    fn measure(&mut self) -> io::Result<u64> {
        self.inner.measure()
    }

    fn alignment(&self) -> usize {
        self.inner.alignment()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> io::Result<()> {
        if !batch.is_empty() && self.faults.due(Call::Read) {
            return Err(eio());
        }
        self.inner.read(batch)
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        if !batch.is_empty() && self.faults.due(Call::Write) {
            self.inner.write(&batch[..batch.len() / 2])?;
            return Err(eio());
        }
        self.inner.write(batch)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.faults.due(Call::Flush) {
            return Err(eio());
        }
        self.inner.flush()
    }
}
