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
    /// Not only the next call fails, but all that follow.
    lasting: bool,
    /// What fails ends short, in the middle of a read or write.
    short: bool,
    met: u64,
    /// Reads, writes and flushes so far.
    calls: [u64; 3],
}

impl Faults {
    /// The `count`th call of this kind from now on (0: the next) fails with EIO, once.
    pub fn fail(&self, call: Call, count: u64) {
        let mut plan = self.0.borrow_mut();
        plan.next = Some((call, count));
        plan.lasting = false;
    }

    /// The `count`th call of this kind from now on (0: the next) fails with EIO, and all that follow.
    pub fn fail_from(&self, call: Call, count: u64) {
        let mut plan = self.0.borrow_mut();
        plan.next = Some((call, count));
        plan.lasting = true;
    }

    /// Whether reads and writes that fail end short: some sectors of one of them are done, and the error
    /// is that of a device which ends there.
    pub fn set_short(&self, short: bool) {
        self.0.borrow_mut().short = short;
    }

    /// Nothing fails any more.
    pub fn mend(&self) {
        self.0.borrow_mut().next = None;
    }

    /// How many calls have failed.
    #[must_use]
    pub fn met(&self) -> u64 {
        self.0.borrow().met
    }

    /// How many calls of a kind there were.
    #[must_use]
    pub fn calls(&self, call: Call) -> u64 {
        self.0.borrow().calls[call as usize]
    }

    fn due(&self, call: Call) -> bool {
        let mut plan = self.0.borrow_mut();
        plan.calls[call as usize] += 1;
        let lasting = plan.lasting;
        match &mut plan.next {
            Some((kind, 0)) if *kind == call => {
                if !lasting {
                    plan.next = None;
                }
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

    fn error(&self, short: io::ErrorKind) -> io::Error {
        match self.0.borrow().short {
            true => io::Error::new(short, "the transfer ended short"),
            false => io::Error::from_raw_os_error(nix::libc::EIO),
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

/// Half of so many bytes, in whole sectors.
fn half(bytes: usize) -> usize {
    bytes / 2 / 512 * 512
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

    fn sector_bytes(&self) -> Option<u64> {
        self.inner.sector_bytes()
    }

    fn name(&self) -> &str {
        self.inner.name()
    }

    fn read(&mut self, batch: &mut [Read<'_>]) -> io::Result<()> {
        if batch.is_empty() || !self.faults.due(Call::Read) {
            return self.inner.read(batch);
        }
        if self.faults.0.borrow().short {
            let middle = batch.len() / 2;
            self.inner.read(&mut batch[..middle])?;
            let Read { offset, into } = &mut batch[middle];
            let part = half(into.len());
            self.inner.read(&mut [Read {
                offset: *offset,
                into: &mut into[..part],
            }])?;
        }
        Err(self.faults.error(io::ErrorKind::UnexpectedEof))
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        if batch.is_empty() || !self.faults.due(Call::Write) {
            return self.inner.write(batch);
        }
        let middle = batch.len() / 2;
        self.inner.write(&batch[..middle])?;
        if self.faults.0.borrow().short {
            let Write { offset, from } = batch[middle];
            let from = &from[..half(from.len())];
            self.inner.write(&[Write { offset, from }])?;
        }
        Err(self.faults.error(io::ErrorKind::WriteZero))
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.faults.due(Call::Flush) {
            return Err(io::Error::from_raw_os_error(nix::libc::EIO));
        }
        self.inner.flush()
    }
}
