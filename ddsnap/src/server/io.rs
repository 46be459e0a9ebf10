// SPDX-License-Identifier: GPL-2.0-only
//! A safe face on io_uring for reads, writes and accepts on descriptors that wait for others.
//!
//! An operation takes its buffer and a share of its file and gives the buffer back when it is done,
//! so the kernel never writes to memory that is used for something else. When an [`Io`] is dropped
//! with operations under way, their buffers are leaked for the same reason.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};
use nix::errno::Errno;

/// Entries of the submission queue. It may run full: then it is submitted.
const ENTRIES: u32 = 64;
/// Marks completions nobody waits for.
const NOBODY: u64 = u64::MAX;
/// The offset that means "no offset": a stream.
const STREAM: u64 = u64::MAX;

/// An operation that ended.
#[derive(Debug)]
pub struct Done<T> {
    /// What it was.
    pub token: T,
    /// Bytes moved, or the descriptor accepted.
    pub result: io::Result<u32>,
    /// The buffer it had; after a read as long as what was read.
    pub buffer: Vec<u8>,
}

struct Flying<T> {
    token: T,
    buffer: ManuallyDrop<Vec<u8>>,
    reading: bool,
    _file: Rc<OwnedFd>,
}

/// An io_uring and what is in flight on it. `T` names the operations.
pub struct Io<T> {
    ring: IoUring,
    flying: Vec<Option<Flying<T>>>,
}

impl<T: Copy + PartialEq> Io<T> {
    /// A new ring.
    ///
    /// # Errors
    /// The kernel has no io_uring or does not allow it.
    pub fn new() -> io::Result<Self> {
        let ring = IoUring::new(ENTRIES)?;
        if !ring.params().is_feature_ext_arg() {
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this kernel's io_uring cannot wait with a deadline; Linux 5.11 or newer is needed",
            ));
        }
        Ok(Io {
            ring,
            flying: Vec::new(),
        })
    }

    /// Reads what there is, up to the capacity of `buffer`.
    ///
    /// # Errors
    /// The submission queue cannot be submitted.
    pub fn read(&mut self, token: T, file: &Rc<OwnedFd>, mut buffer: Vec<u8>) -> io::Result<()> {
        buffer.clear();
        let entry = opcode::Read::new(
            Fd(file.as_raw_fd()),
            buffer.as_mut_ptr(),
            buffer.capacity() as u32,
        )
        .offset(STREAM)
        .build();
        self.start(token, file, buffer, true, entry)
    }

    /// Writes `buffer` from the byte `from` on; perhaps only a part of it.
    ///
    /// # Errors
    /// The submission queue cannot be submitted.
    pub fn write(
        &mut self,
        token: T,
        file: &Rc<OwnedFd>,
        buffer: Vec<u8>,
        from: usize,
    ) -> io::Result<()> {
        let rest = &buffer[from..];
        let entry = opcode::Write::new(Fd(file.as_raw_fd()), rest.as_ptr(), rest.len() as u32)
            .offset(STREAM)
            .build();
        self.start(token, file, buffer, false, entry)
    }

    /// Accepts a connection.
    ///
    /// # Errors
    /// The submission queue cannot be submitted.
    pub fn accept(&mut self, token: T, file: &Rc<OwnedFd>) -> io::Result<()> {
        let flags = nix::libc::SOCK_CLOEXEC | nix::libc::SOCK_NONBLOCK;
        let fd = Fd(file.as_raw_fd());
        let entry = opcode::Accept::new(fd, std::ptr::null_mut(), std::ptr::null_mut())
            .flags(flags)
            .build();
        self.start(token, file, Vec::new(), false, entry)
    }

    /// Asks that the operations of this name end soon, done or not.
    ///
    /// # Errors
    /// The submission queue cannot be submitted.
    pub fn cancel(&mut self, token: T) -> io::Result<()> {
        for slot in 0..self.flying.len() {
            if self.flying[slot]
                .as_ref()
                .is_some_and(|flying| flying.token == token)
            {
                let entry = opcode::AsyncCancel::new(slot as u64)
                    .build()
                    .user_data(NOBODY);
                self.push(entry)?;
            }
        }
        Ok(())
    }

    /// Whether an operation is under way whose name `is_meant`.
    #[must_use]
    pub fn is_flying(&self, is_meant: impl Fn(T) -> bool) -> bool {
        self.flying
            .iter()
            .flatten()
            .any(|flying| is_meant(flying.token))
    }

    /// Submits, and waits until something ends or `limit` is over.
    ///
    /// # Errors
    /// The ring is broken.
    pub fn wait(&mut self, limit: Option<Duration>) -> io::Result<()> {
        let timespec = limit.map(Timespec::from);
        let mut args = SubmitArgs::new();
        if let Some(timespec) = &timespec {
            args = args.timespec(timespec);
        }
        let want = usize::from(limit != Some(Duration::ZERO));
        match self.ring.submitter().submit_with_args(want, &args) {
            Ok(_) => Ok(()),
            // Over, interrupted, or completions have to be taken first.
            Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                Some(Errno::ETIME | Errno::EINTR | Errno::EBUSY | Errno::EAGAIN) => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// The next operation that ended, if any.
    pub fn next_done(&mut self) -> Option<Done<T>> {
        loop {
            let (slot, result) = {
                let entry = self.ring.completion().next()?;
                (entry.user_data(), entry.result())
            };
            if slot == NOBODY {
                continue;
            }
            let flying = self.flying.get_mut(slot as usize).and_then(Option::take);
            let Flying {
                token,
                buffer,
                reading,
                _file,
            } = flying.expect("the ring completes what was submitted, once");
            let mut buffer = ManuallyDrop::into_inner(buffer);
            let result = match u32::try_from(result) {
                Ok(count) => Ok(count),
                Err(_) => Err(io::Error::from_raw_os_error(-result)),
            };
            if let (true, Ok(count)) = (reading, &result) {
                let count = (*count as usize).min(buffer.capacity());
                // SAFETY: the kernel has written the first `count` bytes, within the capacity.
                unsafe { buffer.set_len(count) };
            }
            return Some(Done {
                token,
                result,
                buffer,
            });
        }
    }

    fn start(
        &mut self,
        token: T,
        file: &Rc<OwnedFd>,
        buffer: Vec<u8>,
        reading: bool,
        entry: squeue::Entry,
    ) -> io::Result<()> {
        let buffer = ManuallyDrop::new(buffer);
        let flying = Flying {
            token,
            buffer,
            reading,
            _file: Rc::clone(file),
        };
        let slot = match self.flying.iter().position(Option::is_none) {
            Some(slot) => slot,
            None => {
                self.flying.push(None);
                self.flying.len() - 1
            }
        };
        self.flying[slot] = Some(flying);
        self.push(entry.user_data(slot as u64))
    }

    fn push(&mut self, entry: squeue::Entry) -> io::Result<()> {
        // SAFETY: a buffer named by the entry is in `flying` until its completion, and is leaked if
        // that never comes; so is the share of the file. Moving a Vec does not move its bytes.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.ring.submit()?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn pair() -> (Rc<OwnedFd>, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        (Rc::new(near.into()), far)
    }

    #[test]
    fn bytes_go_both_ways() {
        let (near, mut far) = pair();
        let mut io = Io::new().unwrap();
        far.write_all(b"hello").unwrap();
        io.read('r', &near, Vec::with_capacity(64)).unwrap();
        io.write('w', &near, b"xxworld".to_vec(), 2).unwrap();
        let mut seen = Vec::new();
        while seen.len() < 2 {
            io.wait(Some(Duration::from_secs(5))).unwrap();
            while let Some(done) = io.next_done() {
                assert_eq!(done.result.unwrap(), 5);
                seen.push((done.token, done.buffer));
            }
        }
        seen.sort();
        assert_eq!(seen[0], ('r', b"hello".to_vec()));
        let mut found = [0; 5];
        far.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"world");
    }

    #[test]
    fn waiting_ends_in_time_and_a_read_can_be_cancelled() {
        let (near, _far) = pair();
        let mut io = Io::new().unwrap();
        io.read('r', &near, Vec::with_capacity(64)).unwrap();
        io.wait(Some(Duration::from_millis(20))).unwrap();
        assert!(io.next_done().is_none());
        assert!(io.is_flying(|token| token == 'r'));
        io.cancel('r').unwrap();
        io.wait(Some(Duration::from_secs(5))).unwrap();
        let done = io.next_done().unwrap();
        assert_eq!(
            done.result.unwrap_err().raw_os_error(),
            Some(nix::libc::ECANCELED)
        );
        assert!(!io.is_flying(|token| token == 'r'));
    }
}
