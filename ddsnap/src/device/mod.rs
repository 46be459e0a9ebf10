// SPDX-License-Identifier: GPL-2.0-only
//! Block devices as the engine sees them.
//!
//! The engine hands over whole batches and waits for all of a batch: that is what one commit group
//! needs (read every old chunk, then write every copy and the journal record, then flush once),
//! and it lets the crash tests cut the power between any two writes of a device that lives in
//! memory. Real devices run a batch in parallel.

pub mod fault;
pub mod identity;
pub mod latched;
pub mod lock;
pub mod memory;
pub mod uring;

use std::io;

/// One read of a batch.
#[derive(Debug)]
pub struct Read<'a> {
    /// Byte offset, a multiple of [`BlockDevice::alignment`].
    pub offset: u64,
    /// Where the bytes go; its length is a multiple of the alignment.
    pub into: &'a mut [u8],
}

/// One write of a batch.
#[derive(Debug)]
pub struct Write<'a> {
    /// Byte offset, a multiple of [`BlockDevice::alignment`].
    pub offset: u64,
    /// The bytes; their length is a multiple of the alignment.
    pub from: &'a [u8],
}

/// A device or plain file of fixed-size sectors with a volatile write cache.
///
/// What a write leaves behind is unordered until the next successful [`flush`](Self::flush): after
/// a power cut any subset of the sectors written since then may be there.
pub trait BlockDevice {
    /// Length in bytes, as it was when the device was opened or last
    /// [measured](Self::measure).
    fn len_bytes(&self) -> u64;

    /// Finds out how long the device is now: it may have been extended or cut while it was open. One
    /// whose length never changes has nothing to find out.
    ///
    /// # Errors
    /// The device does not say.
    fn measure(&mut self) -> io::Result<u64> {
        Ok(self.len_bytes())
    }

    /// Every offset, length and buffer address must be a multiple of this: 512 or 4096 bytes.
    fn alignment(&self) -> usize;

    /// Logical sector size in bytes of a block device; none of what the kernel does not know as one, such
    /// as a plain file.
    fn sector_bytes(&self) -> Option<u64> {
        None
    }

    /// A name for messages, such as the device's path.
    fn name(&self) -> &str;

    /// Reads all of `batch`, in any order.
    ///
    /// # Errors
    /// The first error met; what the buffers then hold is not defined. A read past the end or one
    /// that ends short is an error.
    fn read(&mut self, batch: &mut [Read<'_>]) -> io::Result<()>;

    /// Writes all of `batch`, in any order; nothing is durable before the next flush.
    ///
    /// # Errors
    /// The first error met. Any part of the batch may then have been written.
    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()>;

    /// Makes every write that returned before durable.
    ///
    /// # Errors
    /// Afterwards nothing is known about any unflushed write: the caller must stop using the device
    /// for writing (see `latched`).
    fn flush(&mut self) -> io::Result<()>;
}
