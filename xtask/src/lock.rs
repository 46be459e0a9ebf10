// SPDX-License-Identifier: GPL-2.0-only
//! One builder at a time for each cached result.

use std::fs::{File, OpenOptions};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

/// A held lock file; dropping it lets the next builder in.
pub struct Lock {
    _flock: Flock<File>,
}

/// Takes the lock at `path`, waiting for another builder up to an hour.
pub fn take(path: &Path) -> Result<Lock> {
    let deadline = Instant::now() + Duration::from_secs(3600);
    let mut told = false;
    loop {
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path)
            .with_context(|| format!("cannot open lock file {}", path.display()))?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(flock) => return Ok(Lock { _flock: flock }),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => {}
            Err((_, e)) => {
                return Err(e).with_context(|| format!("cannot lock {}", path.display()));
            }
        }
        if Instant::now() > deadline {
            bail!("another process has held {} for an hour", path.display());
        }
        if !told {
            eprintln!("waiting for another process that holds {}", path.display());
            told = true;
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}
