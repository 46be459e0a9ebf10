// SPDX-License-Identifier: GPL-2.0-only
//! What stands in the place of an origin that was not given.

use std::io;

use crate::device::{BlockDevice, Read, Write};

/// Every access is an error.
pub(crate) struct NoOrigin;

fn not_given<T>() -> io::Result<T> {
    Err(io::Error::new(
        io::ErrorKind::NotFound,
        "the origin was not given",
    ))
}

impl BlockDevice for NoOrigin {
    fn len_bytes(&self) -> u64 {
        0
    }

    fn alignment(&self) -> usize {
        512
    }

    fn name(&self) -> &str {
        "origin"
    }

    fn read(&mut self, _: &mut [Read<'_>]) -> io::Result<()> {
        not_given()
    }

    fn write(&mut self, _: &[Write<'_>]) -> io::Result<()> {
        not_given()
    }

    fn flush(&mut self) -> io::Result<()> {
        not_given()
    }
}
