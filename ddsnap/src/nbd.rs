// SPDX-License-Identifier: GPL-2.0-only
//! The server's side of NBD, for one read-only export.
//!
//! The fixed newstyle handshake and simple replies, after `doc/proto.md` of the NBD project: what QEMU,
//! libnbd and the kernel's client speak. Reads are served; all that would change something is refused
//! with EPERM. Nothing here knows what is exported: that is [`Export`].
//!
//! Whatever the other end sends is bounded before memory is taken for it. NBD is big-endian.

use std::io::{self, Read, Write};

/// Most bytes of one read. A client that asks for no limits may send this much, says the protocol.
pub const MAX_READ_BYTES: u32 = 32 << 20;

/// Longest data of an option: a name may have 4,096 bytes.
const MAX_OPTION_BYTES: u32 = 16 << 10;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// In the first words of both: fixed newstyle, and no 124 zeros behind an export's description.
const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

/// There are flags, it is read-only, and several connections see the same.
const EXPORT_FLAGS: u16 = 1 | 1 << 1 | 1 << 8;

const OPTION_EXPORT_NAME: u32 = 1;
const OPTION_ABORT: u32 = 2;
const OPTION_LIST: u32 = 3;
const OPTION_INFO: u32 = 6;
const OPTION_GO: u32 = 7;

const REPLY_ACK: u32 = 1;
const REPLY_SERVER: u32 = 2;
const REPLY_INFO: u32 = 3;
const REPLY_UNSUPPORTED: u32 = 0x8000_0001;
const REPLY_INVALID: u32 = 0x8000_0003;
const REPLY_UNKNOWN: u32 = 0x8000_0006;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_TRIM: u16 = 4;
const COMMAND_WRITE_ZEROES: u16 = 6;

const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

/// What is served.
pub trait Export {
    /// Its name. A client that gives none means it too.
    fn name(&self) -> &str;
    /// Length in bytes.
    fn len_bytes(&self) -> u64;
    /// Bytes that are best read at once: a power of two, at least 512.
    fn preferred_bytes(&self) -> u32;
    /// Reads from `offset` on; the range lies within the length.
    ///
    /// # Errors
    /// The client gets EIO. Whoever implements this tells people why.
    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()>;
}

/// Serves a connection to its end. `negotiated` is called when a client is in: from then on it may be
/// silent as long as it likes.
///
/// # Errors
/// The other end is gone, or does not keep to the protocol (`InvalidData`).
pub fn serve(
    input: &mut dyn Read,
    output: &mut dyn Write,
    export: &dyn Export,
    negotiated: &mut dyn FnMut() -> io::Result<()>,
) -> io::Result<()> {
    let mut link = Link {
        input,
        output,
        export,
    };
    if !link.negotiate()? {
        return Ok(());
    }
    negotiated()?;
    link.transmit()
}

struct Link<'a> {
    input: &'a mut dyn Read,
    output: &'a mut dyn Write,
    export: &'a dyn Export,
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Link<'_> {
    fn bytes<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.input.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn u16(&mut self) -> io::Result<u16> {
        self.bytes().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> io::Result<u32> {
        self.bytes().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> io::Result<u64> {
        self.bytes().map(u64::from_be_bytes)
    }

    fn send(&mut self, parts: &[&[u8]]) -> io::Result<()> {
        self.output.write_all(&parts.concat())?;
        self.output.flush()
    }

    /// True if the client wants to read now, false if it only wanted to know.
    fn negotiate(&mut self) -> io::Result<bool> {
        self.send(&[
            &MAGIC.to_be_bytes(),
            &OPTION_MAGIC.to_be_bytes(),
            &(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes(),
        ])?;
        let flags = self.u32()?;
        if flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(wrong("unknown flags of the client"));
        }
        loop {
            if self.u64()? != OPTION_MAGIC {
                return Err(wrong("no option where one is expected"));
            }
            let (option, len) = (self.u32()?, self.u32()?);
            if len > MAX_OPTION_BYTES {
                return Err(wrong("an option is too long"));
            }
            let mut data = vec![0; len as usize];
            self.input.read_exact(&mut data)?;
            match option {
                // It has no answer for "no such export" but the end of the connection.
                OPTION_EXPORT_NAME => {
                    if !self.is_ours(&data) {
                        return Err(wrong("the client asks for an export that is not there"));
                    }
                    let len = self.export.len_bytes().to_be_bytes();
                    let zeros: &[u8] = match flags & u32::from(NO_ZEROES) {
                        0 => &[0; 124],
                        _ => &[],
                    };
                    self.send(&[&len, &EXPORT_FLAGS.to_be_bytes(), zeros])?;
                    return Ok(true);
                }
                OPTION_INFO | OPTION_GO => {
                    if self.describe(option, &data)? && option == OPTION_GO {
                        return Ok(true);
                    }
                }
                OPTION_LIST if data.is_empty() => {
                    let name = self.export.name().to_owned();
                    let len = (name.len() as u32).to_be_bytes();
                    let data = [&len[..], name.as_bytes()].concat();
                    self.reply(option, REPLY_SERVER, &data)?;
                    self.reply(option, REPLY_ACK, &[])?;
                }
                OPTION_LIST => self.reply(option, REPLY_INVALID, &[])?,
                OPTION_ABORT => {
                    self.reply(option, REPLY_ACK, &[])?;
                    return Ok(false);
                }
                _ => self.reply(option, REPLY_UNSUPPORTED, &[])?,
            }
        }
    }

    fn is_ours(&self, name: &[u8]) -> bool {
        name.is_empty() || name == self.export.name().as_bytes()
    }

    /// Answers INFO and GO. True if what was asked for is here.
    fn describe(&mut self, option: u32, data: &[u8]) -> io::Result<bool> {
        let Some(name) = name_in(data) else {
            self.reply(option, REPLY_INVALID, &[])?;
            return Ok(false);
        };
        if !self.is_ours(name) {
            self.reply(option, REPLY_UNKNOWN, &[])?;
            return Ok(false);
        }
        let export = [
            &INFO_EXPORT.to_be_bytes()[..],
            &self.export.len_bytes().to_be_bytes(),
            &EXPORT_FLAGS.to_be_bytes(),
        ];
        self.reply(option, REPLY_INFO, &export.concat())?;
        let sizes = [
            &INFO_BLOCK_SIZE.to_be_bytes()[..],
            &1u32.to_be_bytes(),
            &self.export.preferred_bytes().to_be_bytes(),
            &MAX_READ_BYTES.to_be_bytes(),
        ];
        self.reply(option, REPLY_INFO, &sizes.concat())?;
        self.reply(option, REPLY_ACK, &[])?;
        Ok(true)
    }

    fn reply(&mut self, option: u32, reply: u32, data: &[u8]) -> io::Result<()> {
        self.send(&[
            &OPTION_REPLY_MAGIC.to_be_bytes(),
            &option.to_be_bytes(),
            &reply.to_be_bytes(),
            &(data.len() as u32).to_be_bytes(),
            data,
        ])
    }

    /// Answers requests until the other end leaves.
    fn transmit(&mut self) -> io::Result<()> {
        let mut data = Vec::new();
        loop {
            // Between two requests a client may go without a word.
            let mut magic = [0; 4];
            if self.input.read(&mut magic[..1])? == 0 {
                return Ok(());
            }
            self.input.read_exact(&mut magic[1..])?;
            if u32::from_be_bytes(magic) != REQUEST_MAGIC {
                return Err(wrong("no request where one is expected"));
            }
            let (_flags, command) = (self.u16()?, self.u16()?);
            let cookie: [u8; 8] = self.bytes()?;
            let (offset, len) = (self.u64()?, self.u32()?);
            match command {
                COMMAND_READ => {
                    let there = offset
                        .checked_add(len.into())
                        .is_some_and(|end| end <= self.export.len_bytes());
                    if len == 0 || len > MAX_READ_BYTES || !there {
                        self.answer(cookie, EINVAL, &[])?;
                        continue;
                    }
                    data.resize(len as usize, 0);
                    match self.export.read(offset, &mut data) {
                        Ok(()) => self.answer(cookie, 0, &data)?,
                        Err(_) => self.answer(cookie, EIO, &[])?,
                    }
                }
                COMMAND_WRITE => {
                    // Its data follows, and has to be read to find the next request.
                    let mut data = self.input.take(len.into());
                    if io::copy(&mut data, &mut io::sink())? < len.into() {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    self.answer(cookie, EPERM, &[])?;
                }
                COMMAND_TRIM | COMMAND_WRITE_ZEROES => self.answer(cookie, EPERM, &[])?,
                COMMAND_DISCONNECT => return Ok(()),
                _ => self.answer(cookie, EINVAL, &[])?,
            }
        }
    }

    fn answer(&mut self, cookie: [u8; 8], error: u32, data: &[u8]) -> io::Result<()> {
        let head = [
            &REPLY_MAGIC.to_be_bytes()[..],
            &error.to_be_bytes(),
            &cookie,
        ];
        self.output.write_all(&head.concat())?;
        self.output.write_all(data)?;
        self.output.flush()
    }
}

/// The export's name in the data of INFO and GO, if that is whole: the name's length, the name, and how
/// many wishes for information follow, two bytes each.
fn name_in(data: &[u8]) -> Option<&[u8]> {
    let (len, rest) = data.split_first_chunk()?;
    let (name, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    let (count, wishes) = rest.split_first_chunk()?;
    (wishes.len() == 2 * usize::from(u16::from_be_bytes(*count))).then_some(name)
}

#[cfg(test)]
mod tests;
