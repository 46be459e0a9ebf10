// SPDX-License-Identifier: GPL-2.0-only
//! One server to a store: an exclusive advisory lock on each of its devices or files, and on the origin.
//!
//! The lock belongs to the open file, so it goes when its holder dies, however it dies. It is an "open
//! file description" lock (fcntl(2)), not flock(2): udev takes and heeds flock on block devices, so a
//! probe by udev would look like another server, and a running server would hold up udev's queue.
//!
//! The kernel has no such lock with a deadline, and a blocked one would have to be ended by a signal:
//! so a helper thread waits in the kernel and the caller waits for the helper, with the deadline.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

/// The lock on one device or file; dropping it, or the end of the process, gives it up.
#[derive(Debug)]
pub struct StoreLock {
    _file: File,
}

/// Why there is no lock.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds it.
    #[error("it is held by {}; stop that first", name_of(*.0))]
    Held(Option<u32>),
    /// The file cannot be opened or locked.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The process that holds a lock, in words; not every one can be found out.
#[must_use]
pub fn name_of(holder: Option<u32>) -> String {
    holder.map_or("another process".to_owned(), |pid| format!("process {pid}"))
}

impl From<Errno> for LockError {
    fn from(errno: Errno) -> LockError {
        LockError::Io(errno.into())
    }
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
/// [`LockError`].
pub fn share_store(path: &Path) -> Result<StoreLock, LockError> {
    let file = File::open(path)?;
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&SHARED)) {
        Ok(_) => Ok(StoreLock { _file: file }),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(LockError::Held(holder_of(&file))),
        Err(errno) => Err(errno.into()),
    }
}

/// Locks the store at `path` through an open file of its own, if nobody else holds it.
///
/// # Errors
/// [`LockError`].
pub fn lock_store(path: &Path) -> Result<StoreLock, LockError> {
    let file = File::options().read(true).write(true).open(path)?;
    match fcntl(&file, FcntlArg::F_OFD_SETLK(&WHOLE)) {
        Ok(_) => Ok(StoreLock { _file: file }),
        Err(Errno::EAGAIN | Errno::EACCES) => Err(LockError::Held(holder_of(&file))),
        Err(errno) => Err(errno.into()),
    }
}

/// As [`lock_store`], but waits up to `patience` for the holder to let go. After `quiet` of it
/// `on_wait` is told whom it waits for.
///
/// # Errors
/// [`LockError`].
pub fn lock_store_within(
    path: &Path,
    patience: Duration,
    quiet: Duration,
    on_wait: impl FnOnce(Option<u32>),
) -> Result<StoreLock, LockError> {
    match lock_store(path) {
        Err(LockError::Held(_)) => {}
        other => return other,
    }
    let file = File::options().read(true).write(true).open(path)?;
    let watched = file.try_clone()?;
    let (sender, receiver) = mpsc::channel();
    std::thread::Builder::new()
        .name("store-lock".into())
        .spawn(move || {
            let result = loop {
                match fcntl(&file, FcntlArg::F_OFD_SETLKW(&WHOLE)) {
                    Err(Errno::EINTR) => {}
                    other => break other.map(|_| ()),
                }
            };
            drop(file);
            // If the caller gave up, this was the last descriptor of the file, and the lock is gone.
            let _ = sender.send(result);
        })?;
    let mut heard = receiver.recv_timeout(quiet.min(patience));
    if patience > quiet && heard == Err(RecvTimeoutError::Timeout) {
        on_wait(holder_of(&watched));
        heard = receiver.recv_timeout(patience - quiet);
    }
    match heard {
        Ok(Ok(())) => Ok(StoreLock { _file: watched }),
        Ok(Err(errno)) => Err(errno.into()),
        Err(_) => Err(LockError::Held(holder_of(&watched))),
    }
}

/// The process that holds a lock on the file, as far as /proc tells us: only root sees all of it.
///
/// F_OFD_GETLK does not say, since such a lock belongs to an open file. But /proc has, with each open
/// file of each process, the locks that belong to it.
fn holder_of(file: &File) -> Option<u32> {
    let wanted = file.metadata().ok()?;
    let holds = |pid: u32| {
        let files = fs::read_dir(format!("/proc/{pid}/fdinfo")).ok()?;
        let mut names = files.filter_map(|entry| Some(entry.ok()?.file_name()));
        names
            .any(|name| {
                let path = |kind| {
                    Path::new("/proc")
                        .join(pid.to_string())
                        .join(kind)
                        .join(&name)
                };
                let same = fs::metadata(path("fd"))
                    .is_ok_and(|found| (found.dev(), found.ino()) == (wanted.dev(), wanted.ino()));
                let is_lock = |line: &str| line.starts_with("lock:") && line.contains(" OFDLCK ");
                same && fs::read_to_string(path("fdinfo"))
                    .is_ok_and(|info| info.lines().any(is_lock))
            })
            .then_some(pid)
    };
    let processes = fs::read_dir("/proc").ok()?;
    processes
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .find_map(holds)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use nix::fcntl::{Flock, FlockArg};

    use super::{LockError, StoreLock, lock_store, lock_store_within, share_store};

    const SOON: Duration = Duration::from_millis(10);
    const LATER: Duration = Duration::from_secs(60);

    /// The lock is ours: this process is named.
    fn assert_refused(result: Result<StoreLock, LockError>) {
        match result {
            Err(LockError::Held(holder)) => assert_eq!(holder, Some(std::process::id())),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_second_holder_is_refused_or_waits_for_the_first() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = lock_store(file.path()).unwrap();
        assert_refused(lock_store(file.path()));
        let mut told = None;
        let refused = lock_store_within(file.path(), 2 * SOON, SOON, |pid| told = Some(pid));
        assert_refused(refused);
        assert_eq!(told, Some(Some(std::process::id())));
        let path = file.path().to_path_buf();
        let second = std::thread::spawn(move || lock_store_within(&path, LATER, LATER, |_| {}));
        drop(first);
        let second = second.join().unwrap().unwrap();
        assert_refused(lock_store(file.path()));
        drop(second);
        lock_store(file.path()).unwrap();
    }

    #[test]
    fn who_gave_up_waiting_does_not_get_the_lock_later() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let first = lock_store(file.path()).unwrap();
        assert_refused(lock_store_within(file.path(), SOON, SOON, |_| {}));
        drop(first);
        // The helper may get it for a moment and lets go of it at once.
        lock_store_within(file.path(), LATER, LATER, |_| {}).unwrap();
    }

    #[test]
    fn readers_share_a_store_and_keep_servers_off() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let one = share_store(file.path()).unwrap();
        let two = share_store(file.path()).unwrap();
        drop(one);
        assert_refused(lock_store(file.path()));
        drop(two);
        let _server = lock_store(file.path()).unwrap();
        assert_refused(share_store(file.path()));
    }

    /// `ddsnap initialize` said "another server holds the snapshot store" while udev probed the device.
    #[test]
    fn a_flock_as_udev_takes_it_is_no_other_server() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let probe = std::fs::File::open(file.path()).unwrap();
        let probe = Flock::lock(probe, FlockArg::LockSharedNonblock).unwrap();
        let lock = lock_store(file.path()).unwrap();
        drop(probe);
        let probe = std::fs::File::open(file.path()).unwrap();
        assert!(Flock::lock(probe, FlockArg::LockSharedNonblock).is_ok());
        drop(lock);
    }
}
