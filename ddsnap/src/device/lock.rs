// SPDX-License-Identifier: GPL-2.0-only
//! One server to a store: an exclusive advisory lock on each of its devices or files, and on the origin.
//!
//! The lock belongs to the very open file that is read and written. A request that the kernel has not
//! finished holds on to that file, so of a server that was killed the lock is free only when the last of
//! its writes has landed: none of them can overwrite what its successor writes.
//!
//! There are two locks, since each sees what the other cannot:
//! - An "open file description" lock (fcntl(2)) on the file. Not flock(2): udev takes and heeds flock on
//!   block devices, so a probe by udev would look like another server, and a running server would hold up
//!   udev's queue. Such a lock belongs to the inode that was opened, and a block device may have several
//!   nodes (mknod, a container's /dev).
//! - Of a block device also a flock(2) on `/sys/dev/block/MAJOR:MINOR/dev`, which is the same file whatever
//!   node was opened. Nobody else locks it. [`super::uring`] has the kernel keep it until the last request
//!   has ended. Another instance of sysfs (another network namespace's) is another file.
//!
//! The kernel has no such lock with a deadline, and a blocked one would have to be ended by a signal:
//! so a helper thread waits in the kernel and the caller waits for the helper, with the deadline.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::libc;
use nix::sys::stat::{major, minor};

/// How long to wait for a lock that no process in sight holds: what a process that was killed had asked of
/// the device is then still under way, or the kernel has yet to close its files.
const LAST_BREATH: Duration = Duration::from_secs(5);
/// How long a thread that has just got a lock may take to hand it over.
const LET_IN: Duration = Duration::from_secs(1);

/// With whom a lock may be shared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// With others who only read. Needs a file that was opened for reading.
    Shared,
    /// With nobody. Needs a file that was opened for writing.
    Exclusive,
}

/// A lock on an open file. It ends when this is dropped, every descriptor of the file is closed, and the
/// kernel has ended all that was asked of the file.
#[derive(Debug)]
pub struct FileLock {
    device: Option<Flock<File>>,
}

impl FileLock {
    /// The locked file of the kernel that stands for a block device, whatever node it was opened by.
    #[must_use]
    pub fn device(&self) -> Option<&File> {
        self.device.as_deref()
    }
}

/// A lock with an open file of its own; dropping it, or the end of the process, gives it up.
#[derive(Debug)]
pub struct StoreLock {
    _lock: FileLock,
    _file: File,
}

/// Why there is no lock.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// Another process holds it, or one that was killed has left I/O under way.
    #[error("it is held by {}; stop that first", name_of(*.0))]
    Held(Option<u32>),
    /// The file cannot be opened or locked.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// The process that holds a lock, in words; not every one can be found out.
#[must_use]
pub fn name_of(holder: Option<u32>) -> String {
    holder.map_or(
        "another process (or what a killed one left under way)".to_owned(),
        |pid| format!("process {pid}"),
    )
}

impl From<Errno> for LockError {
    fn from(errno: Errno) -> LockError {
        LockError::Io(errno.into())
    }
}

fn whole(mode: Mode) -> libc::flock {
    let kind = match mode {
        Mode::Shared => libc::F_RDLCK,
        Mode::Exclusive => libc::F_WRLCK,
    };
    libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0, // the kernel demands it
    }
}

/// Keeps servers off the store at `path`, but not others who only read it. Does not wait for a process, and
/// needs no right to write.
///
/// # Errors
/// [`LockError`].
pub fn share_store(path: &Path) -> Result<StoreLock, LockError> {
    share(path, |file| lock(file, Mode::Shared))
}

/// As [`share_store`], but waits as [`lock_within`] does.
///
/// # Errors
/// [`LockError`].
pub fn share_store_within(
    path: &Path,
    patience: Duration,
    quiet: Duration,
    on_wait: impl FnOnce(Option<u32>),
) -> Result<StoreLock, LockError> {
    share(path, |file| {
        lock_within(file, Mode::Shared, patience, quiet, on_wait)
    })
}

fn share(
    path: &Path,
    lock: impl FnOnce(&File) -> Result<FileLock, LockError>,
) -> Result<StoreLock, LockError> {
    let file = File::open(path)?;
    Ok(StoreLock {
        _lock: lock(&file)?,
        _file: file,
    })
}

/// Locks the store at `path` through an open file of its own, if nobody else holds it. Who writes through
/// another one locks that with [`lock`].
///
/// # Errors
/// [`LockError`].
pub fn lock_store(path: &Path) -> Result<StoreLock, LockError> {
    let file = File::options().read(true).write(true).open(path)?;
    let lock = lock(&file, Mode::Exclusive)?;
    Ok(StoreLock {
        _lock: lock,
        _file: file,
    })
}

/// Locks an open file, if no process holds it.
///
/// # Errors
/// [`LockError`].
pub fn lock(file: &File, mode: Mode) -> Result<FileLock, LockError> {
    match lock_within(file, mode, Duration::ZERO, Duration::ZERO, |_| {}) {
        Err(LockError::Held(None)) => lock_within(file, mode, LAST_BREATH, LAST_BREATH, |_| {}),
        other => other,
    }
}

/// As [`lock`], but waits up to `patience` for the holder to let go. After `quiet` of it `on_wait` is told
/// whom it waits for.
///
/// # Errors
/// [`LockError`].
pub fn lock_within(
    file: &File,
    mode: Mode,
    patience: Duration,
    quiet: Duration,
    on_wait: impl FnOnce(Option<u32>),
) -> Result<FileLock, LockError> {
    let wait = Wait {
        end: Instant::now() + patience,
        tell_at: Instant::now() + quiet,
    };
    let mut on_wait = Some(on_wait);
    let mut tell = |pid| {
        if let Some(on_wait) = on_wait.take() {
            on_wait(pid);
        }
    };
    let device = match device_file(file)? {
        None => None,
        Some(device) => Some(lock_device(device, mode, &wait, &mut tell)?),
    };
    lock_file(file, mode, &wait, &mut tell)?;
    Ok(FileLock { device })
}

/// The kernel's own file for a block device.
fn device_file(file: &File) -> Result<Option<File>, LockError> {
    let found = file.metadata()?;
    if !found.file_type().is_block_device() {
        return Ok(None);
    }
    let (major, minor) = (major(found.rdev()), minor(found.rdev()));
    let path = format!("/sys/dev/block/{major}:{minor}/dev");
    let device = File::open(&path).map_err(|error| {
        let text = format!("its lock, {path}, cannot be opened ({error}); is /sys mounted?");
        io::Error::new(error.kind(), text)
    })?;
    Ok(Some(device))
}

/// Until when to wait for a lock, and from when on to say so.
struct Wait {
    end: Instant,
    tell_at: Instant,
}

impl Wait {
    /// Waits for what `acquire` gives, which blocks in a thread of its own. If it comes too late it is
    /// dropped there.
    fn until<T: Send + 'static>(
        &self,
        acquire: impl FnOnce() -> Result<T, Errno> + Send + 'static,
        holder: impl Fn() -> Option<u32>,
        tell: &mut dyn FnMut(Option<u32>),
    ) -> Result<T, LockError> {
        if self.end <= Instant::now() {
            return Err(LockError::Held(holder()));
        }
        let (sender, receiver) = mpsc::channel();
        std::thread::Builder::new()
            .name("store-lock".into())
            .spawn(move || drop(sender.send(acquire())))?;
        let left = |until: Instant| until.saturating_duration_since(Instant::now());
        let mut heard = receiver.recv_timeout(left(self.tell_at.min(self.end)));
        if self.tell_at < self.end && matches!(heard, Err(RecvTimeoutError::Timeout)) {
            tell(holder());
            heard = receiver.recv_timeout(left(self.end));
        }
        let mut held_by = None;
        if heard.is_err() {
            held_by = holder();
            // If it was let go of just now, that is this process: the thread has the lock.
            heard = receiver.recv_timeout(LET_IN);
        }
        match heard {
            Ok(Ok(lock)) => Ok(lock),
            Ok(Err(errno)) => Err(errno.into()),
            Err(_) => Err(LockError::Held(held_by)),
        }
    }
}

fn lock_device(
    device: File,
    mode: Mode,
    wait: &Wait,
    tell: &mut dyn FnMut(Option<u32>),
) -> Result<Flock<File>, LockError> {
    let (now, later) = match mode {
        Mode::Shared => (FlockArg::LockSharedNonblock, FlockArg::LockShared),
        Mode::Exclusive => (FlockArg::LockExclusiveNonblock, FlockArg::LockExclusive),
    };
    let watched = device.try_clone()?;
    let device = match Flock::lock(device, now) {
        Ok(lock) => return Ok(lock),
        Err((device, Errno::EAGAIN)) => device,
        Err((_, errno)) => return Err(errno.into()),
    };
    let acquire = move || {
        let mut device = device;
        loop {
            match Flock::lock(device, later) {
                Err((file, Errno::EINTR)) => device = file,
                other => return other.map_err(|(_, errno)| errno),
            }
        }
    };
    wait.until(acquire, || holder_of(&watched, " FLOCK "), tell)
}

fn lock_file(
    file: &File,
    mode: Mode,
    wait: &Wait,
    tell: &mut dyn FnMut(Option<u32>),
) -> Result<(), LockError> {
    match fcntl(file, FcntlArg::F_OFD_SETLK(&whole(mode))) {
        Ok(_) => return Ok(()),
        Err(Errno::EAGAIN | Errno::EACCES) => {}
        Err(errno) => return Err(errno.into()),
    }
    // The same open file: what the helper locks is locked for the caller. If the caller gives up and closes
    // its descriptors, the helper's is the last one, and the lock goes with it.
    let same = file.try_clone()?;
    let acquire = move || {
        loop {
            match fcntl(&same, FcntlArg::F_OFD_SETLKW(&whole(mode))) {
                Err(Errno::EINTR) => {}
                other => return other.map(drop),
            }
        }
    };
    wait.until(acquire, || holder_of(file, " OFDLCK "), tell)
}

/// The process that holds a lock of this kind on the file, as far as /proc tells us: only root sees all of it.
///
/// F_OFD_GETLK does not say, since such a lock belongs to an open file. But /proc has, with each open
/// file of each process, the locks that belong to it.
fn holder_of(file: &File, kind: &str) -> Option<u32> {
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
                let is_lock = |line: &str| line.starts_with("lock:") && line.contains(kind);
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
    use std::fs::File;
    use std::path::Path;
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use nix::errno::Errno;
    use nix::fcntl::{Flock, FlockArg};

    use super::{LockError, Mode, StoreLock, Wait, lock, lock_store, share_store};
    use crate::device::uring::{Access, UringDevice};

    /// A server that waited for another one was let in as its time ended, and refused to start: the store was held,
    /// it said, by itself.
    #[test]
    fn what_is_let_go_of_at_the_end_is_taken() {
        let (go, gone) = mpsc::channel();
        let (tell, told) = mpsc::channel();
        let wait = Wait {
            end: Instant::now() + SOON,
            tell_at: Instant::now() + SOON,
        };
        let acquire = move || {
            gone.recv_timeout(LATER).expect("asked for the holder");
            tell.send(()).expect("somebody listens");
            Ok::<_, Errno>("the lock")
        };
        let holder = || {
            go.send(()).expect("somebody waits");
            told.recv_timeout(LATER).expect("it was let go of");
            Some(std::process::id())
        };
        let locked = wait.until(acquire, holder, &mut |_| ());
        assert_eq!(locked.expect("it is free"), "the lock");
    }

    const SOON: Duration = Duration::from_millis(10);
    const LATER: Duration = Duration::from_secs(60);

    fn lock_store_within(
        path: &Path,
        patience: Duration,
        quiet: Duration,
        on_wait: impl FnOnce(Option<u32>),
    ) -> Result<StoreLock, LockError> {
        let file = File::options().read(true).write(true).open(path)?;
        let lock = super::lock_within(&file, Mode::Exclusive, patience, quiet, on_wait)?;
        Ok(StoreLock {
            _lock: lock,
            _file: file,
        })
    }

    /// The lock is ours: this process is named.
    fn assert_refused<T: std::fmt::Debug>(result: Result<T, LockError>) {
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

    /// A server's lock was on a file of its own, so it was free while a killed server's writes were still in
    /// the kernel: they then overwrote what its successor had written. A request under way holds on to the
    /// open file, as the second descriptor here does.
    #[test]
    fn the_lock_lasts_as_long_as_the_file_that_is_written() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(8192).unwrap();
        let mut device = UringDevice::open(file.path(), Access::ReadWrite).unwrap();
        device
            .lock_within(Mode::Exclusive, SOON, SOON, |_| {})
            .unwrap();
        let under_way = device.file().try_clone().unwrap();
        drop(device);
        assert_refused(lock_store_within(file.path(), SOON, SOON, |_| {}));
        drop(under_way);
        lock(file.as_file(), Mode::Exclusive).unwrap();
    }
}
