// SPDX-License-Identifier: GPL-2.0-only
//! Going to the background only when the daemon is up, so that whoever started it sees why it is not.
//!
//! The parent waits for a byte from the child: the exit code. Until then the child has the caller's
//! terminal, so its errors are seen there; then it lets go of it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;

use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, dup2_stderr, dup2_stdin, dup2_stdout, fork, pipe, setsid};

use crate::stdio::complain;

/// Where the daemon is on its way to the background.
#[derive(Debug)]
pub struct Background {
    /// The parent's end of the pipe; none in the foreground.
    report: Option<File>,
}

/// Which process has returned from [`start`].
#[derive(Debug)]
pub enum Started {
    /// The caller's: it exits with this code.
    Caller(u8),
    /// The daemon: it starts and reports.
    Daemon(Background),
}

/// Splits off the daemon, unless `foreground`. Call it while there is one thread.
///
/// # Errors
/// What the system says.
pub fn start(foreground: bool) -> io::Result<Started> {
    if foreground {
        return Ok(Started::Daemon(Background { report: None }));
    }
    let (reader, writer) = pipe()?;
    // SAFETY: there is one thread, so the child may do whatever the parent may.
    match unsafe { fork() }? {
        ForkResult::Parent { child } => {
            drop(writer);
            let mut code = [0];
            if File::from(reader).read_exact(&mut code).is_ok() {
                return Ok(Started::Caller(code[0]));
            }
            // It ended without a report, and has said why if it could.
            match waitpid(child, None)? {
                WaitStatus::Exited(_, code) if code != 0 => Ok(Started::Caller(code as u8)),
                WaitStatus::Signaled(_, signal, _) => {
                    complain(format_args!(
                        "ddsnap: the daemon was ended by {signal} while it started"
                    ));
                    Ok(Started::Caller(1))
                }
                _ => Ok(Started::Caller(1)),
            }
        }
        ForkResult::Child => {
            drop(reader);
            // Out of the caller's session: no terminal signal reaches the daemon any more.
            setsid()?;
            // Until it is up it goes with its caller: who interrupts the start wants no daemon.
            set_pdeathsig(Signal::SIGTERM)?;
            Ok(Started::Daemon(Background {
                report: Some(writer.into()),
            }))
        }
    }
}

impl Background {
    /// The daemon is up: the caller returns 0. Lets go of the terminal and the working directory.
    ///
    /// # Errors
    /// What the system says.
    pub fn up(self) -> io::Result<()> {
        let Some(mut report) = self.report else {
            return Ok(());
        };
        let null = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(nix::libc::O_NOCTTY)
            .open("/dev/null")?;
        io::stdout().flush()?;
        dup2_stdin(null.as_fd())?;
        dup2_stdout(null.as_fd())?;
        dup2_stderr(null.as_fd())?;
        // A file system must not stay busy because the daemon was started in it.
        std::env::set_current_dir("/")?;
        set_pdeathsig(None)?;
        report.write_all(&[0])
    }
}
