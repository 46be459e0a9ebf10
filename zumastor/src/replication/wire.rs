// SPDX-License-Identifier: GPL-2.0-only
//! Values as little-endian bytes, and back with every length bounded.

use uuid::Uuid;

use thiserror::Error;

/// What is wrong with bytes that came from outside.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum WireError {
    /// They end too early.
    #[error("{what} is cut short")]
    Short {
        /// What was being read.
        what: &'static str,
    },
    /// A value that is not allowed.
    #[error("{what} is {found}, which is not allowed")]
    Value {
        /// The field.
        what: &'static str,
        /// Its value.
        found: u64,
    },
    /// Bytes behind the last field.
    #[error("{extra} bytes follow the end of {what}")]
    Extra {
        /// What was read.
        what: &'static str,
        /// How many.
        extra: usize,
    },
    /// Text that is not UTF-8.
    #[error("{what} is not text")]
    Text {
        /// The field.
        what: &'static str,
    },
}

/// Collects bytes.
#[derive(Debug, Default)]
pub struct Put(pub Vec<u8>);

impl Put {
    /// Appends one byte.
    pub fn u8(&mut self, value: u8) -> &mut Self {
        self.0.push(value);
        self
    }

    /// Appends two bytes.
    pub fn u16(&mut self, value: u16) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends four bytes.
    pub fn u32(&mut self, value: u32) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends eight bytes.
    pub fn u64(&mut self, value: u64) -> &mut Self {
        self.raw(&value.to_le_bytes())
    }

    /// Appends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> &mut Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// Appends a UUID; none is all zeros.
    pub fn uuid(&mut self, value: Option<Uuid>) -> &mut Self {
        self.raw(value.unwrap_or_default().as_bytes())
    }

    /// Appends text behind its length, at most `most` bytes of it.
    pub fn text(&mut self, text: &str, most: usize) -> &mut Self {
        let mut end = text.len().min(most).min(usize::from(u16::MAX));
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.u16(end as u16).raw(&text.as_bytes()[..end])
    }
}

/// Takes values off bytes.
#[derive(Clone, Copy, Debug)]
pub struct Take<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Take<'a> {
    /// Reads `bytes`, which are to be a `what`.
    #[must_use]
    pub fn new(what: &'static str, bytes: &'a [u8]) -> Self {
        Take { bytes, what }
    }

    /// The next `count` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn raw(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        if count > self.bytes.len() {
            return Err(WireError::Short { what: self.what });
        }
        let (taken, rest) = self.bytes.split_at(count);
        self.bytes = rest;
        Ok(taken)
    }

    /// The next `N` bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let mut array = [0; N];
        array.copy_from_slice(self.raw(N)?);
        Ok(array)
    }

    /// One byte.
    ///
    /// # Errors
    /// There is none.
    pub fn u8(&mut self) -> Result<u8, WireError> {
        Ok(self.array::<1>()?[0])
    }

    /// Two bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// Four bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Eight bytes.
    ///
    /// # Errors
    /// There are fewer.
    pub fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// A UUID; none for all zeros.
    ///
    /// # Errors
    /// It is cut short.
    pub fn uuid(&mut self) -> Result<Option<Uuid>, WireError> {
        let uuid = Uuid::from_bytes(self.array()?);
        Ok((!uuid.is_nil()).then_some(uuid))
    }

    /// A UUID that must be one.
    ///
    /// # Errors
    /// It is cut short, or all zeros.
    pub fn some_uuid(&mut self, what: &'static str) -> Result<Uuid, WireError> {
        self.uuid()?.ok_or(WireError::Value { what, found: 0 })
    }

    /// A byte that is 0 or 1.
    ///
    /// # Errors
    /// It is another one.
    pub fn flag(&mut self, what: &'static str) -> Result<bool, WireError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(WireError::Value {
                what,
                found: other.into(),
            }),
        }
    }

    /// Text behind its length, of at most `most` bytes. Control characters become spaces: it is shown on
    /// terminals.
    ///
    /// # Errors
    /// It is cut short, too long or not UTF-8.
    pub fn text(&mut self, what: &'static str, most: usize) -> Result<String, WireError> {
        let length = usize::from(self.u16()?);
        if length > most {
            return Err(WireError::Value {
                what,
                found: length as u64,
            });
        }
        let text = std::str::from_utf8(self.raw(length)?).map_err(|_| WireError::Text { what })?;
        Ok(text
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect())
    }

    /// What is left.
    #[must_use]
    pub fn rest(self) -> &'a [u8] {
        self.bytes
    }

    /// Whether nothing is left.
    ///
    /// # Errors
    /// Something is.
    pub fn end(self) -> Result<(), WireError> {
        match self.bytes.len() {
            0 => Ok(()),
            extra => Err(WireError::Extra {
                what: self.what,
                extra,
            }),
        }
    }
}
