// SPDX-License-Identifier: GPL-2.0-only
//! What the agent and the server have in common as daemons: going to the background, the log, the pid
//! file, holding on to memory, and waiting for each other's end.

pub mod background;
pub mod log;
mod log_writer;
pub mod memory;
pub mod outlive;
pub mod pidfd;
pub mod pidfile;

use std::io;
use std::os::fd::OwnedFd;

use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

/// A descriptor that gives SIGTERM, SIGINT and SIGHUP instead of what they do by default.
///
/// # Errors
/// What the system says.
pub fn signals() -> io::Result<OwnedFd> {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set.thread_block()?;
    let file = SignalFd::with_flags(&set, SfdFlags::SFD_CLOEXEC)?;
    Ok(nix::unistd::dup(&file)?)
}
