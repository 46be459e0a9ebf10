// SPDX-License-Identifier: GPL-2.0-only
//! A server must not wait for memory that only it can free: writeback of the volume waits for it. Nor may the
//! agent, without which no server starts.

use std::{fs, io};

use nix::errno::Errno;
use nix::sys::mman::{MlockAllFlags, mlockall};
use tracing::warn;

/// `PR_SET_IO_FLUSHER` of linux/prctl.h, which the libc crate does not have for this target.
const PR_SET_IO_FLUSHER: nix::libc::c_int = 57;
/// The least a process can be chosen by the out-of-memory killer: never.
const OOM_NEVER: &str = "-1000";

/// Locks memory, tells the kernel that this process serves I/O, and keeps the out-of-memory killer
/// away. What is refused is logged; an ordinary user's server works without.
pub fn hold_on() {
    if let Err(error) = mlockall(MlockAllFlags::MCL_CURRENT | MlockAllFlags::MCL_FUTURE) {
        warn!("cannot lock memory ({error}): I/O may stall when memory is short");
    }
    // SAFETY: this prctl takes three numbers and touches no memory of ours.
    let result = unsafe { nix::libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) };
    if let Err(error) = Errno::result(result) {
        warn!("cannot become an I/O flusher ({error}): I/O may stall when memory is short");
    }
    if let Err(error) = forbid_killing() {
        warn!("cannot keep the out-of-memory killer away: {error}");
    }
}

/// Keeps the out-of-memory killer away.
///
/// # Errors
/// This process may not.
pub fn forbid_killing() -> io::Result<()> {
    fs::write("/proc/self/oom_score_adj", OOM_NEVER)
}
