// SPDX-License-Identifier: GPL-2.0-only
//! One server to a store: an exclusive advisory lock on the store's device or file.
//!
//! The lock belongs to the open file, so it goes when its holder dies, however it dies. It is an "open
//! file description" lock (fcntl(2)), not flock(2): udev takes and heeds flock on block devices, so a
//! probe by udev would look like another server, and a running server would hold up udev's queue.
//!
//! The kernel has no such lock with a deadline, and a blocked one would have to be ended by a signal:
//! so a helper thread waits in the kernel and the caller waits for the helper, with the deadline.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// The lock; dropping it, or the end of the process, gives it up.
#[derive(Debug)]
pub struct StoreLock {
    _file: File,
}

/// A write lock on the whole file.
const WHOLE: libc::flock = whole(libc::F_WRLCK);
/// A read lock on the whole file.
const SHARED: libc::flock = whole(libc::F_RDLCK);

const fn whole(kind: libc::c_int) -> libc::flock {
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0, // the kernel demands it
    }
}

/// Keeps servers off the store at `path`, but not others who only read it. Does not wait, and needs
/// no right to write.
///
/// # Errors
/// `ErrorKind::WouldBlock` if a server holds it; any error of opening `path` or of fcntl itself.
pub fn share_store(path: &Path) -> io::Result<StoreLock> {
    let file = File::open(path)?;
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&SHARED)) {
        Ok(_) => Ok(StoreLock { _file: file }),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(io::ErrorKind::WouldBlock.into()),
        Err(errno) => Err(errno.into()),
    }
}

/// Locks the store at `path` through an open file of its own, waiting up to `deadline` for its holder.
///
/// # Errors
/// `ErrorKind::WouldBlock` if another process holds it still; any error of opening `path` for writing
/// or of fcntl itself.
pub fn lock_store(path: &Path, deadline: Duration) -> io::Result<StoreLock> {
    let file = File::options().read(true).write(true).open(path)?;
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&WHOLE)) {
        Ok(_) => return Ok(StoreLock { _file: file }),
        Err(Errno::EAGAIN | Errno::EACCES) => {}
        Err(errno) => return Err(errno.into()),
    }
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new()
        .name("store-lock".into())
        .spawn(move || {
            let result = loop {
                match fcntl(&file, FcntlArg::F_OFD_SETLKW(&WHOLE)) {
                    Err(Errno::EINTR) => {}
                    other => break other.map(|_| file),
                }
            };
            // If the caller gave up, the file is closed here and the lock with it.
            let _ = sender.send(result);
        })?;
    match receiver.recv_timeout(deadline) {
        Ok(Ok(file)) => Ok(StoreLock { _file: file }),
        Ok(Err(errno)) => Err(errno.into()),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::WouldBlock,
            "another server holds the snapshot store",
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nix::fcntl::{Flock, FlockArg};

    use super::{lock_store, share_store};

    const SOON: Duration = Duration::from_millis(10);
    const LATER: Duration = Duration::from_secs(60);

    #[test]
    fn a_second_holder_is_refused_or_waits_for_the_first() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = lock_store(file.path(), SOON).unwrap();
        let refused = lock_store(file.path(), SOON).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
        let path = file.path().to_path_buf();
        let second = std::thread::spawn(move || lock_store(&path, LATER).is_ok());
        drop(first);
        assert!(second.join().unwrap());
    }

    #[test]
    fn readers_share_a_store_and_keep_servers_off() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let one = share_store(file.path()).unwrap();
        let two = share_store(file.path()).unwrap();
        drop(one);
        let refused = lock_store(file.path(), SOON).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
        drop(two);
        let _server = lock_store(file.path(), LATER).unwrap();
        let refused = share_store(file.path()).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::WouldBlock);
    }

    /// `ddsnap initialize` said "another server holds the snapshot store" while udev probed the device.
    #[test]
    fn a_flock_as_udev_takes_it_is_no_other_server() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let probe = std::fs::File::open(file.path()).unwrap();
        let probe = Flock::lock(probe, FlockArg::LockSharedNonblock).unwrap();
        let lock = lock_store(file.path(), SOON).unwrap();
        drop(probe);
        let probe = std::fs::File::open(file.path()).unwrap();
        assert!(Flock::lock(probe, FlockArg::LockSharedNonblock).is_ok());
        drop(lock);
    }
}
