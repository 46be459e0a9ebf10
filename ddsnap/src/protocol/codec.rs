// SPDX-License-Identifier: GPL-2.0-only
//! Frames of the control connection and the primitives their bodies are made of.
//!
//! A frame is a header of [`HEADER_BYTES`] and a body of at most [`MAX_BODY_BYTES`]:
//!
//! | offset | bytes | field                                           |
//! |-------:|------:|-------------------------------------------------|
//! |      0 |     4 | magic, `ddsC`                                   |
//! |      4 |     2 | version                                         |
//! |      6 |     2 | code of the message                             |
//! |      8 |     4 | length of the body in bytes                     |
//! |     12 |     4 | CRC-32C of bytes 0 to 11 followed by the body   |
//!
//! Everything is little-endian. Nothing from the other side is believed before magic, version,
//! length and checksum were looked at, in that order, and no buffer grows beyond one frame.

use thiserror::Error;

/// First bytes of every frame.
pub const MAGIC: [u8; 4] = *b"ddsC";
/// History: 1 - first version.
pub const VERSION: u16 = 1;
/// Bytes of a frame before its body.
pub const HEADER_BYTES: usize = 16;
/// Longest body, in bytes. Longer answers are sent as several frames.
pub const MAX_BODY_BYTES: usize = 64 * 1024;
/// Longest text inside a body, in bytes.
pub const MAX_TEXT_BYTES: usize = 4096;

const VERSION_AT: usize = 4;
const CODE_AT: usize = 6;
const LENGTH_AT: usize = 8;
const CHECKSUM_AT: usize = 12;

/// Why bytes are not a message.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum CodecError {
    /// The first four bytes are wrong: the other side speaks something else.
    #[error("not a ddsnap control message (it starts with {0:02x?})")]
    Magic([u8; 4]),
    /// The other side is newer or older.
    #[error("control protocol version {0}, but only version {VERSION} is known here")]
    Version(u16),
    /// The length is beyond [`MAX_BODY_BYTES`].
    #[error("message of {0} bytes, more than the {MAX_BODY_BYTES} allowed")]
    TooLong(u32),
    /// The checksum does not fit the bytes.
    #[error("checksum {found:08x}, but the message's bytes have {wanted:08x}")]
    Checksum {
        /// As received.
        found: u32,
        /// As computed from what was received.
        wanted: u32,
    },
    /// A message of a code that is not known or not expected here.
    #[error("unexpected message code {0:#06x}")]
    Code(u16),
    /// The body is shorter or longer than its fields.
    #[error(
        "body of message {code:#06x} has {length} bytes, which is not the length of its fields"
    )]
    Length {
        /// The message's code.
        code: u16,
        /// Bytes in its body.
        length: usize,
    },
    /// A field holds something it must not.
    #[error("message {code:#06x}: {field} cannot be {value}")]
    Field {
        /// The message's code.
        code: u16,
        /// The field's name.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A text is not UTF-8.
    #[error("message {0:#06x}: a text is not UTF-8")]
    Text(u16),
}

/// One message, still as bytes, whose frame was in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What kind of message it is.
    pub code: u16,
    /// Its fields.
    pub body: Vec<u8>,
}

impl Frame {
    /// The frame as it goes over the connection.
    ///
    /// # Panics
    /// If the body is longer than [`MAX_BODY_BYTES`]: those who build bodies keep to the bound.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        assert!(
            self.body.len() <= MAX_BODY_BYTES,
            "a body of {} bytes",
            self.body.len()
        );
        let mut bytes = Vec::with_capacity(HEADER_BYTES + self.body.len());
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&VERSION.to_le_bytes());
        bytes.extend_from_slice(&self.code.to_le_bytes());
        bytes.extend_from_slice(&(self.body.len() as u32).to_le_bytes());
        let checksum = checksum(&bytes, &self.body);
        bytes.extend_from_slice(&checksum.to_le_bytes());
        bytes.extend_from_slice(&self.body);
        bytes
    }
}

fn checksum(header: &[u8], body: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(header), body)
}

/// Collects bytes as they arrive and gives back whole frames.
#[derive(Debug, Default)]
pub struct FrameReader {
    bytes: Vec<u8>,
}

impl FrameReader {
    /// Takes the next bytes of the stream.
    ///
    /// Call [`next_frame`](Self::next_frame) until it gives `None` before adding more, and add at
    /// most a few KiB at a time; then never more than one frame and that much is held.
    pub fn extend(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Whether a frame has begun that is not complete.
    #[must_use]
    pub fn is_midway(&self) -> bool {
        !self.bytes.is_empty()
    }

    /// The next whole frame, or `None` until more bytes come.
    ///
    /// # Errors
    /// The stream is not one of ours, or damaged. There is no way to find the next frame then: the
    /// connection is to be closed.
    pub fn next_frame(&mut self) -> Result<Option<Frame>, CodecError> {
        let known = self.bytes.len().min(MAGIC.len());
        if self.bytes[..known] != MAGIC[..known] {
            let mut found = [0; 4];
            found[..known].copy_from_slice(&self.bytes[..known]);
            return Err(CodecError::Magic(found));
        }
        if self.bytes.len() < HEADER_BYTES {
            return Ok(None);
        }
        let version = u16_at(&self.bytes, VERSION_AT);
        if version != VERSION {
            return Err(CodecError::Version(version));
        }
        let length = u32_at(&self.bytes, LENGTH_AT);
        if length as usize > MAX_BODY_BYTES {
            return Err(CodecError::TooLong(length));
        }
        let end = HEADER_BYTES + length as usize;
        if self.bytes.len() < end {
            return Ok(None);
        }
        let body = self.bytes[HEADER_BYTES..end].to_vec();
        let found = u32_at(&self.bytes, CHECKSUM_AT);
        let wanted = checksum(&self.bytes[..CHECKSUM_AT], &body);
        if found != wanted {
            return Err(CodecError::Checksum { found, wanted });
        }
        let code = u16_at(&self.bytes, CODE_AT);
        self.bytes.drain(..end);
        Ok(Some(Frame { code, body }))
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

/// Appends fields to a body.
#[derive(Debug, Default)]
pub struct Writer(pub Vec<u8>);

macro_rules! put {
    ($($name:ident: $t:ty),*) => { $(
        /// Appends the number.
        pub fn $name(&mut self, value: $t) -> &mut Self {
            self.0.extend_from_slice(&value.to_le_bytes());
            self
        }
    )* };
}

impl Writer {
    put!(u8: u8, i8: i8, u16: u16, u32: u32, i32: i32, u64: u64, i64: i64);

    /// Appends a length (u16) and at most [`MAX_TEXT_BYTES`] of the text.
    pub fn text(&mut self, text: &str) -> &mut Self {
        let mut end = text.len().min(MAX_TEXT_BYTES);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.u16(end as u16);
        self.0.extend_from_slice(&text.as_bytes()[..end]);
        self
    }

    /// The body with its code.
    #[must_use]
    pub fn frame(self, code: u16) -> Frame {
        Frame { code, body: self.0 }
    }
}

/// Takes fields off a body, never beyond its end.
#[derive(Debug)]
pub struct Reader<'a> {
    frame: &'a Frame,
    at: usize,
}

macro_rules! get {
    ($($name:ident: $t:ty),*) => { $(
        /// Takes a number.
        ///
        /// # Errors
        /// [`CodecError::Length`] if the body ends before.
        pub fn $name(&mut self) -> Result<$t, CodecError> {
            let mut bytes = [0; size_of::<$t>()];
            bytes.copy_from_slice(self.take(size_of::<$t>())?);
            Ok(<$t>::from_le_bytes(bytes))
        }
    )* };
}

impl<'a> Reader<'a> {
    /// Starts at the first field of `frame`.
    #[must_use]
    pub fn new(frame: &'a Frame) -> Reader<'a> {
        Reader { frame, at: 0 }
    }

    get!(u8: u8, i8: i8, u16: u16, u32: u32, i32: i32, u64: u64, i64: i64);

    /// Takes a length and the text.
    ///
    /// # Errors
    /// [`CodecError`] if the body ends before, the text is too long, or it is not UTF-8.
    pub fn text(&mut self) -> Result<String, CodecError> {
        let length = self.u16()?;
        if usize::from(length) > MAX_TEXT_BYTES {
            return Err(self.bad("length of a text", length.into()));
        }
        let bytes = self.take(length.into())?;
        String::from_utf8(bytes.to_vec()).map_err(|_| CodecError::Text(self.frame.code))
    }

    /// Takes a byte that says no (0) or yes (1).
    ///
    /// # Errors
    /// [`CodecError`] if the body ends before or the byte is neither.
    pub fn flag(&mut self, field: &'static str) -> Result<bool, CodecError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(self.bad(field, other.into())),
        }
    }

    /// The error for a field with a value it must not have.
    #[must_use]
    pub fn bad(&self, field: &'static str, value: u64) -> CodecError {
        CodecError::Field {
            code: self.frame.code,
            field,
            value,
        }
    }

    /// Bytes not taken yet.
    #[must_use]
    pub fn remaining(&self) -> usize {
        self.frame.body.len() - self.at
    }

    /// Ends the message.
    ///
    /// # Errors
    /// [`CodecError::Length`] if bytes are left over.
    pub fn end<T>(self, message: T) -> Result<T, CodecError> {
        if self.remaining() == 0 {
            Ok(message)
        } else {
            Err(self.wrong_length())
        }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], CodecError> {
        let bytes = self
            .frame
            .body
            .get(self.at..self.at + count)
            .ok_or_else(|| self.wrong_length())?;
        self.at += count;
        Ok(bytes)
    }

    fn wrong_length(&self) -> CodecError {
        CodecError::Length {
            code: self.frame.code,
            length: self.frame.body.len(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reader(bytes: &[u8]) -> FrameReader {
        let mut reader = FrameReader::default();
        reader.extend(bytes);
        reader
    }

    #[test]
    fn a_frame_is_these_bytes() {
        let frame = Frame {
            code: 0x0102,
            body: vec![0xaa, 0xbb],
        };
        let mut expected = b"ddsC\x01\x00\x02\x01\x02\x00\x00\x00".to_vec();
        // CRC-32C of the twelve bytes and the body, from an independent implementation.
        expected.extend_from_slice(&[0x78, 0x7c, 0x05, 0x2f]);
        expected.extend_from_slice(&[0xaa, 0xbb]);
        assert_eq!(frame.encode(), expected);
    }

    #[test]
    fn frames_come_out_whole_however_the_bytes_arrive() {
        let first = Frame {
            code: 1,
            body: vec![7; 300],
        };
        let second = Frame {
            code: 2,
            body: vec![],
        };
        let stream = [first.encode(), second.encode()].concat();
        for step in [1, 2, 15, 16, 17, 299, stream.len()] {
            let mut reader = FrameReader::default();
            let mut found = Vec::new();
            for part in stream.chunks(step) {
                reader.extend(part);
                while let Some(frame) = reader.next_frame().unwrap() {
                    found.push(frame);
                }
            }
            assert_eq!(found, [first.clone(), second.clone()], "in steps of {step}");
            assert!(!reader.is_midway());
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = Frame {
            code: 3,
            body: vec![1, 2, 3, 4, 5],
        }
        .encode();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            // A longer length makes the reader wait for bytes that never come; all else is an error.
            match reader(&bad).next_frame() {
                Ok(Some(frame)) => panic!("bit {bit} flipped gave {frame:?}"),
                Ok(None) => assert!((64..96).contains(&bit), "bit {bit}"),
                Err(_) => {}
            }
        }
    }

    #[test]
    fn a_length_beyond_the_bound_is_refused_before_anything_is_stored() {
        let mut bytes = Frame {
            code: 3,
            body: vec![],
        }
        .encode();
        bytes[8..12].copy_from_slice(&(MAX_BODY_BYTES as u32 + 1).to_le_bytes());
        assert_eq!(
            reader(&bytes).next_frame(),
            Err(CodecError::TooLong(MAX_BODY_BYTES as u32 + 1))
        );
    }

    #[test]
    fn another_version_is_named() {
        let mut bytes = Frame {
            code: 3,
            body: vec![],
        }
        .encode();
        bytes[4] = 9;
        assert_eq!(reader(&bytes).next_frame(), Err(CodecError::Version(9)));
    }

    #[test]
    fn something_else_is_noticed_at_its_first_byte() {
        assert_eq!(
            reader(b"G").next_frame(),
            Err(CodecError::Magic([b'G', 0, 0, 0]))
        );
    }

    #[test]
    fn a_long_text_is_cut_at_a_character() {
        let mut body = Writer::default();
        body.text(&"ä".repeat(MAX_TEXT_BYTES));
        let frame = body.frame(1);
        let text = Reader::new(&frame).text().unwrap();
        assert_eq!(text, "ä".repeat(MAX_TEXT_BYTES / 2));
    }
}
