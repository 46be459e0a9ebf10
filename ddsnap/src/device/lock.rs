// SPDX-License-Identifier: GPL-2.0-only
//! One server to a store: an exclusive advisory lock on the store's device or file.
//!
//! The lock belongs to the open file, so it goes when its holder dies, however it dies. The kernel
//! has no flock with a deadline, and a blocked flock would have to be ended by a signal: so a helper
//! thread waits in the kernel and the caller waits for the helper, with the deadline.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::mpsc;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};

/// The lock; dropping it, or the end of the process, gives it up.
#[derive(Debug)]
pub struct StoreLock {
    _lock: Flock<File>,
}

/// Locks the store at `path` through an open file of its own, waiting up to `deadline` for its holder.
///
/// # Errors
/// `ErrorKind::WouldBlock` if another process holds it still; any error of flock itself.
pub fn lock_store(path: &Path, deadline: Duration) -> io::Result<StoreLock> {
    let own = File::open(path)?;
    let own = match Flock::lock(own, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => return Ok(StoreLock { _lock: lock }),
        Err((own, nix::errno::Errno::EWOULDBLOCK)) => own,
        Err((_, errno)) => return Err(errno.into()),
    };
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new()
        .name("store-lock".into())
        .spawn(move || {
            let mut own = own;
            let result = loop {
                match Flock::lock(own, FlockArg::LockExclusive) {
                    Ok(lock) => break Ok(lock),
                    Err((file, nix::errno::Errno::EINTR)) => own = file,
                    Err((_, errno)) => break Err(errno),
                }
            };
            // If the caller gave up, the lock is dropped here.
            let _ = sender.send(result);
        })?;
    match receiver.recv_timeout(deadline) {
        Ok(Ok(lock)) => Ok(StoreLock { _lock: lock }),
        Ok(Err(errno)) => Err(errno.into()),
        Err(_) => Err(io::Error::new(
            io::ErrorKind::WouldBlock,
            "another server holds the snapshot store",
        )),
    }
}
