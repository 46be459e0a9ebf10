// SPDX-License-Identifier: GPL-2.0-only
//! One builder at a time for each cached result, and one command at a time for each guest.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{FcntlArg, FdFlag, Flock, FlockArg, fcntl};

/// A held lock file; dropping it lets the next one in.
pub struct Lock {
    flock: Flock<File>,
}

impl Lock {
    /// Lets the processes that are started from now on keep the lock if this one is killed: it is free when
    /// the last of them has ended. A `make` outlives a builder that is killed, and goes on writing.
    pub fn held_by_children(self) -> Result<Self> {
        fcntl(&*self.flock, FcntlArg::F_SETFD(FdFlag::empty()))
            .context("cannot let a lock be inherited")?;
        Ok(self)
    }
}

/// Takes the lock at `path`, waiting for another builder up to an hour.
pub fn take(path: &Path) -> Result<Lock> {
    let tell = || eprintln!("waiting for another process that holds {}", path.display());
    take_within(path, Duration::from_secs(3600), (Duration::ZERO, &tell))
}

/// Takes the lock at `path`, waiting for who has it as long as that. After `quiet` of it `tell` is called once.
pub fn take_within(
    path: &Path,
    patience: Duration,
    (quiet, tell): (Duration, &dyn Fn()),
) -> Result<Lock> {
    let began = Instant::now();
    let mut told = false;
    loop {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .with_context(|| format!("cannot open lock file {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(flock) => return Ok(Lock { flock }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {}
            Err((_, e)) => {
                return Err(e).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        let waited = began.elapsed();
        if waited > patience {
            bail!(
                "another process has held {} for {} s",
                path.display(),
                patience.as_secs()
            );
        }
        if !told && waited >= quiet {
            tell();
            told = true;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::thread;

    use super::*;

    /// The make of a builder that was killed went on, and the next builder's make wrote in the same tree.
    #[test]
    fn what_a_killed_builder_has_started_keeps_the_next_one_out() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        let lock = take(&path).and_then(Lock::held_by_children).expect("free");
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .expect("sleep");
        // As a kill does it: closed, and nothing unlocked.
        let descriptor = lock.flock.as_raw_fd();
        std::mem::forget(lock);
        nix::unistd::close(descriptor).expect("open");
        let soon = || take_within(&path, Duration::from_millis(120), (Duration::ZERO, &|| ()));
        let refused = soon().is_err();
        child.kill().and_then(|()| child.wait()).expect("it ends");
        assert!(refused);
        soon().expect("free again");
    }

    /// A second command for a guest waited without a word.
    #[test]
    fn who_waits_says_so_once_and_gets_its_turn() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("lock");
        let told = AtomicU32::new(0);
        let tell = || {
            told.fetch_add(1, Ordering::SeqCst);
        };
        let first = take(&path).expect("free");
        let short = Duration::from_millis(120);
        let refused = take_within(&path, short, (Duration::ZERO, &tell)).map(|_| ());
        assert!(refused.is_err() && told.load(Ordering::SeqCst) == 1);
        thread::scope(|scope| {
            let waiting = scope.spawn(|| {
                let patience = Duration::from_secs(60);
                take_within(&path, patience, (Duration::ZERO, &tell)).map(|_| ())
            });
            while told.load(Ordering::SeqCst) < 2 {
                thread::yield_now();
            }
            drop(first);
            waiting.join().expect("no panic").expect("its turn");
        });
        assert_eq!(told.load(Ordering::SeqCst), 2);
    }
}
