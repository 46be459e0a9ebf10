// SPDX-License-Identifier: GPL-2.0-only
//! As much of an NBD server as QEMU needs to use our disks: the fixed newstyle handshake, and read,
//! write and flush with simple replies.

use std::io::{self, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::disk::Disk;

const MAGIC: u64 = 0x4e42_444d_4147_4943;
const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// Fixed newstyle, and no 124 zeroes after an export's description.
const HANDSHAKE_FLAGS: u16 = 0b11;
/// There are flags; flush and FUA are understood.
const EXPORT_FLAGS: u16 = 0b1101;

const OPTION_EXPORT_NAME: u32 = 1;
const OPTION_ABORT: u32 = 2;
const OPTION_INFO: u32 = 6;
const OPTION_GO: u32 = 7;

const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const REPLY_UNSUPPORTED: u32 = 0x8000_0001;
const REPLY_UNKNOWN: u32 = 0x8000_0006;
const INFO_EXPORT: u16 = 0;

const COMMAND_READ: u16 = 0;
const COMMAND_WRITE: u16 = 1;
const COMMAND_DISCONNECT: u16 = 2;
const COMMAND_FLUSH: u16 = 3;
const FLAG_FUA: u16 = 1;

/// What a request without a meaning is answered.
const EINVAL: u32 = 22;
const EIO: u32 = 5;

/// The longest option and request that is accepted; QEMU splits what is longer.
const MAX_OPTION: u32 = 64 << 10;
const MAX_REQUEST: u32 = 64 << 20;

type Shared = Arc<Mutex<Disk>>;

/// Serves one connection to its end. The disks are exported as `disk0`, `disk1` and on.
///
/// # Errors
/// The other end is gone or does not keep to the protocol.
pub fn serve(stream: &UnixStream, disks: &[Shared]) -> io::Result<()> {
    let mut link = Link {
        input: BufReader::with_capacity(256 << 10, stream),
        output: stream,
    };
    match link.negotiate(disks)? {
        Some(disk) => link.transmit(&disk),
        None => Ok(()),
    }
}

struct Link<'s> {
    input: BufReader<&'s UnixStream>,
    output: &'s UnixStream,
}

fn wrong(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
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
        self.output.write_all(&parts.concat())
    }

    /// The disk that was asked for; none if the other end only wanted to know.
    fn negotiate(&mut self, disks: &[Shared]) -> io::Result<Option<Shared>> {
        self.send(&[
            &MAGIC.to_be_bytes(),
            &OPTION_MAGIC.to_be_bytes(),
            &HANDSHAKE_FLAGS.to_be_bytes(),
        ])?;
        self.u32()?;
        loop {
            if self.u64()? != OPTION_MAGIC {
                return Err(wrong("no option where one is expected"));
            }
            let (option, len) = (self.u32()?, self.u32()?);
            if len > MAX_OPTION {
                return Err(wrong("an option is too long"));
            }
            let mut data = vec![0; len as usize];
            self.input.read_exact(&mut data)?;
            match option {
                OPTION_EXPORT_NAME => {
                    let disk = find(disks, &data).ok_or_else(|| wrong("no such export"))?;
                    let bytes = lock(&disk).len();
                    self.send(&[&bytes.to_be_bytes(), &EXPORT_FLAGS.to_be_bytes()])?;
                    return Ok(Some(disk));
                }
                OPTION_INFO | OPTION_GO => {
                    let name = name_in(&data).ok_or_else(|| wrong("a name is cut short"))?;
                    let Some(disk) = find(disks, name) else {
                        self.reply(option, REPLY_UNKNOWN, &[])?;
                        continue;
                    };
                    let bytes = lock(&disk).len();
                    let info = [
                        &INFO_EXPORT.to_be_bytes()[..],
                        &bytes.to_be_bytes(),
                        &EXPORT_FLAGS.to_be_bytes(),
                    ];
                    self.reply(option, REPLY_INFO, &info.concat())?;
                    self.reply(option, REPLY_ACK, &[])?;
                    if option == OPTION_GO {
                        return Ok(Some(disk));
                    }
                }
                OPTION_ABORT => {
                    self.reply(option, REPLY_ACK, &[])?;
                    return Ok(None);
                }
                _ => self.reply(option, REPLY_UNSUPPORTED, &[])?,
            }
        }
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
    ///
    /// A write is answered when nothing more waits to be read. A flush that comes before that does not
    /// cover it: only writes that were answered are made durable, as the rules for disks have it.
    fn transmit(&mut self, disk: &Shared) -> io::Result<()> {
        let mut unanswered: Vec<[u8; 8]> = Vec::new();
        let mut answered = lock(disk).next_write();
        loop {
            if !unanswered.is_empty() && !self.more_waits()? {
                for cookie in unanswered.drain(..) {
                    self.answer(cookie, 0, &[])?;
                }
                answered = lock(disk).next_write();
            }
            let magic = match self.u32() {
                Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                magic => magic?,
            };
            let (flags, command) = (self.u16()?, self.u16()?);
            let cookie: [u8; 8] = self.bytes()?;
            let (offset, len) = (self.u64()?, self.u32()?);
            if magic != REQUEST_MAGIC || len > MAX_REQUEST {
                return Err(wrong("no request where one is expected"));
            }
            match command {
                COMMAND_READ => {
                    let mut data = vec![0; len as usize];
                    let done = lock(disk).read(offset, &mut data);
                    let data = if done.is_ok() { &data[..] } else { &[] };
                    self.answer(cookie, code(&done), data)?;
                }
                COMMAND_WRITE => {
                    let mut data = vec![0; len as usize];
                    self.input.read_exact(&mut data)?;
                    let mut disk = lock(disk);
                    let mut done = disk.write(offset, &data);
                    if flags & FLAG_FUA != 0 && done.is_ok() {
                        // More than is asked for: what came before becomes durable too.
                        let end = disk.next_write();
                        done = disk.flush(end);
                    }
                    drop(disk);
                    if done.is_ok() {
                        unanswered.push(cookie);
                    } else {
                        self.answer(cookie, code(&done), &[])?;
                    }
                }
                COMMAND_FLUSH => {
                    let done = lock(disk).flush(answered);
                    self.answer(cookie, code(&done), &[])?;
                }
                COMMAND_DISCONNECT => return Ok(()),
                _ => self.answer(cookie, EINVAL, &[])?,
            }
        }
    }

    fn more_waits(&self) -> io::Result<bool> {
        if !self.input.buffer().is_empty() {
            return Ok(true);
        }
        let mut fds = [PollFd::new(self.output.as_fd(), PollFlags::POLLIN)];
        Ok(poll(&mut fds, PollTimeout::ZERO)? > 0)
    }

    fn answer(&mut self, cookie: [u8; 8], error: u32, data: &[u8]) -> io::Result<()> {
        self.send(&[
            &REPLY_MAGIC.to_be_bytes(),
            &error.to_be_bytes(),
            &cookie,
            data,
        ])
    }
}

fn code(done: &io::Result<()>) -> u32 {
    match done {
        Ok(()) => 0,
        Err(e) if e.kind() == io::ErrorKind::InvalidInput => EINVAL,
        Err(e) => {
            eprintln!("a guest's disk: {e}");
            EIO
        }
    }
}

/// The disk, even after a panic of another connection's thread.
fn lock(disk: &Shared) -> std::sync::MutexGuard<'_, Disk> {
    disk.lock().unwrap_or_else(PoisonError::into_inner)
}

fn find(disks: &[Shared], name: &[u8]) -> Option<Shared> {
    let index = std::str::from_utf8(name).ok()?.strip_prefix("disk")?;
    disks.get(index.parse::<usize>().ok()?).cloned()
}

/// The export's name in the data of `INFO` and `GO`.
fn name_in(data: &[u8]) -> Option<&[u8]> {
    let (len, rest) = data.split_first_chunk()?;
    rest.get(..u32::from_be_bytes(*len) as usize)
}
