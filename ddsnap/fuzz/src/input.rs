// SPDX-License-Identifier: GPL-2.0-only
//! Taking numbers off an input; behind its end all are zero.

/// What is left of an input.
#[derive(Clone, Copy)]
pub struct Input<'a>(pub &'a [u8]);

impl<'a> Input<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn number(&mut self, count: usize) -> u64 {
        let mut bytes = [0; 8];
        let taken = self.bytes(count);
        bytes[..taken.len()].copy_from_slice(taken);
        u64::from_le_bytes(bytes)
    }

    pub fn u8(&mut self) -> u8 {
        self.number(1) as u8
    }

    pub fn u16(&mut self) -> u16 {
        self.number(2) as u16
    }

    pub fn u32(&mut self) -> u32 {
        self.number(4) as u32
    }

    /// A number from one byte: small ones as they are, the largest for the edges of larger types.
    pub fn edge(&mut self) -> u64 {
        match self.u8() {
            255 => u64::MAX,
            254 => u64::MAX - 1,
            253 => u64::from(u32::MAX),
            252 => 1 << 54,
            251 => (1 << 54) - 1,
            250 => 1 << 63,
            small => small.into(),
        }
    }
}
