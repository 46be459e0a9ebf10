// SPDX-License-Identifier: GPL-2.0-only
//! A device that refuses to write after a write or flush failed.
//!
//! After a failed write nobody knows what the device holds, and after a failed flush the kernel may
//! have dropped the dirty data and report success the next time. So the first failure stays: every
//! later write and flush fails with its text, until the store is opened again and recovers from
//! what is really there. Reading goes on.

use std::io;

use super::{BlockDevice, Read, Write};

/// See the module.
pub struct Latched {
    inner: Box<dyn BlockDevice>,
    failed: Option<(io::ErrorKind, String)>,
}

impl Latched {
    /// Watches over `inner`.
    #[must_use]
    pub fn new(inner: Box<dyn BlockDevice>) -> Self {
        Latched {
            inner,
            failed: None,
        }
    }

    fn check(&self) -> io::Result<()> {
        match &self.failed {
            Some((kind, text)) => Err(io::Error::new(*kind, text.clone())),
            None => Ok(()),
        }
    }

    fn latch<T>(&mut self, result: io::Result<T>) -> io::Result<T> {
        let latches = crate::promise::kept!(
            "device-latches",
            "a second flush reports success for data that the first one lost"
        );
        if let Some(error) = result.as_ref().err().filter(|_| latches) {
            self.failed = Some((error.kind(), error.to_string()));
        }
        result
    }
}

impl BlockDevice for Latched {
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
        self.inner.read(batch)
    }

    fn write(&mut self, batch: &[Write<'_>]) -> io::Result<()> {
        self.check()?;
        let result = self.inner.write(batch);
        self.latch(result)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.check()?;
        let result = self.inner.flush();
        self.latch(result)
    }
}
