// SPDX-License-Identifier: GPL-2.0-only
//! A process that thaws what the daemon cannot thaw any more.
//!
//! While a file system is frozen whoever writes to it waits, and on /var that is nearly everybody. If the
//! daemon is killed then, or stopped, or waits for something that waits for that file system, nothing but
//! the power switch would help. So before it freezes it starts this process, which has the directories open
//! and its memory locked, and needs no file, no log and no lock from then on. They speak over a pipe, two
//! bytes at a time: `+` or `-` and the number of a directory. When the pipe ends, or after [`DEADLINE`],
//! all that is still armed is thawed.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MlockAllFlags, mlockall};

use crate::freeze;
use crate::host::{CREATE_DEADLINE, FreezeGuard};

/// The longest that something stays frozen: what the creation of a snapshot may take, and some more.
pub const DEADLINE: Duration = CREATE_DEADLINE.saturating_add(Duration::from_secs(15));
/// Longest wait for the process to be ready, and for its end.
const PROCESS_DEADLINE: Duration = Duration::from_secs(10);

const ARM: u8 = b'+';
const DISARM: u8 = b'-';
const READY: u8 = b'r';

/// The daemon's end.
pub struct Guard {
    child: Child,
    pipe: Option<ChildStdin>,
    armed: Vec<bool>,
}

impl Guard {
    /// Starts the process and waits until it is ready.
    pub fn start(dirs: &[PathBuf]) -> Result<Guard> {
        let program = std::env::current_exe().context("could not find this program")?;
        Guard::spawn(&program, dirs)
    }

    fn spawn(program: &Path, dirs: &[PathBuf]) -> Result<Guard> {
        if dirs.len() > usize::from(u8::MAX) {
            bail!("cannot freeze {} file systems at once", dirs.len());
        }
        let mut child = Command::new(program)
            .arg("thaw-guard")
            .args(dirs)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("could not start the process that guards a freeze")?;
        let pipe = child.stdin.take();
        let stdout = child.stdout.take();
        let guard = Guard {
            child,
            pipe,
            armed: vec![false; dirs.len()],
        };
        let mut ready = [0];
        let mut stdout = stdout.context("no pipe from the process that guards a freeze")?;
        let heard = readable(stdout.as_fd(), Instant::now() + PROCESS_DEADLINE)?
            && matches!(stdout.read(&mut ready), Ok(1));
        if !heard || ready != [READY] {
            bail!("the process that guards a freeze did not get ready; see the journal");
        }
        Ok(guard)
    }

    fn tell(&mut self, what: u8, number: usize) -> Result<()> {
        let known = self.armed.get_mut(number).context("no such directory")?;
        let byte = u8::try_from(number)?;
        let pipe = self.pipe.as_mut().context("no pipe")?;
        pipe.write_all(&[what, byte])
            .context("the process that guards a freeze is gone")?;
        *known = what == ARM;
        Ok(())
    }
}

impl FreezeGuard for Guard {
    fn arm(&mut self, number: usize) -> Result<()> {
        self.tell(ARM, number)
    }

    fn disarm(&mut self, number: usize) -> Result<()> {
        self.tell(DISARM, number)
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        // It ends now, after it has thawed what is left.
        drop(self.pipe.take());
        let pid = self.child.id();
        let gone = crate::process::exit_fd(pid)
            .and_then(|fd| readable(fd.as_fd(), Instant::now() + PROCESS_DEADLINE));
        if matches!(gone, Ok(true)) {
            let _ = self.child.wait();
        }
    }
}

/// The process itself: returns when the other end of standard input is closed, or at [`DEADLINE`].
pub fn watch(dirs: &[PathBuf]) -> Result<()> {
    let open = |dir: &PathBuf| {
        File::open(dir).with_context(|| format!("could not open {}", dir.display()))
    };
    let files: Vec<File> = dirs.iter().map(open).collect::<Result<_>>()?;
    // Refused to an ordinary user, who cannot freeze either.
    let _ = mlockall(MlockAllFlags::MCL_CURRENT);
    let mut stdout = io::stdout().lock();
    stdout.write_all(&[READY])?;
    stdout.flush()?;
    let armed = listen(
        &mut io::stdin().lock(),
        files.len(),
        Instant::now() + DEADLINE,
    );
    let mut first = Ok(());
    for ((file, dir), _) in files
        .iter()
        .zip(dirs)
        .zip(armed)
        .filter(|(_, armed)| *armed)
    {
        let thawed = freeze::thaw_open(file);
        first = first.and(thawed.with_context(|| format!("could not thaw {}", dir.display())));
    }
    first
}

/// Which directories are armed when the other end has gone, has hung, or speaks nonsense.
fn listen<R: Read + AsFd>(pipe: &mut R, count: usize, deadline: Instant) -> Vec<bool> {
    let mut armed = vec![false; count];
    let mut message = Vec::new();
    while let Ok(true) = readable(pipe.as_fd(), deadline) {
        let mut byte = [0];
        match pipe.read(&mut byte) {
            Ok(1..) => message.push(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            _ => break,
        }
        if let [what, number] = message[..] {
            message.clear();
            match armed.get_mut(usize::from(number)) {
                Some(armed) if matches!(what, ARM | DISARM) => *armed = what == ARM,
                _ => break,
            }
        }
    }
    armed
}

/// Waits until there is something to read, or the end; false at the deadline.
fn readable(fd: BorrowedFd<'_>, deadline: Instant) -> Result<bool> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
        match poll(&mut [PollFd::new(fd, PollFlags::POLLIN)], timeout) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => return Ok(true),
            Err(errno) => return Err(errno).context("could not wait for a pipe"),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(60)
    }

    /// A daemon that was killed between freeze and thaw left the file system frozen until another one
    /// came up, which could wait for that very file system.
    #[test]
    fn what_is_armed_when_the_other_end_goes_is_thawed() {
        let (mut near, mut far) = UnixStream::pair().expect("a pair");
        far.write_all(b"+\0+\x01+\x02-\x01").expect("sent");
        drop(far);
        assert_eq!(listen(&mut near, 3, soon()), [true, false, true]);
    }

    #[test]
    fn a_silent_other_end_is_not_waited_for_longer_than_the_deadline() {
        let (mut near, mut far) = UnixStream::pair().expect("a pair");
        far.write_all(b"+\0").expect("sent");
        let deadline = Instant::now() + Duration::from_millis(30);
        assert_eq!(listen(&mut near, 1, deadline), [true]);
        assert!(Instant::now() >= deadline);
    }

    #[test]
    fn nonsense_ends_it() {
        for bytes in [&b"+\x09"[..], b"?\0"] {
            let (mut near, mut far) = UnixStream::pair().expect("a pair");
            far.write_all(b"+\0").expect("sent");
            far.write_all(bytes).expect("sent");
            assert_eq!(listen(&mut near, 1, soon()), [true]);
        }
    }

    #[test]
    fn a_program_that_does_not_get_ready_is_an_error() {
        let refused = Guard::spawn(Path::new("/bin/true"), &["/".into()]);
        assert!(refused.is_err_and(|error| error.to_string().contains("did not get ready")));
    }
}
