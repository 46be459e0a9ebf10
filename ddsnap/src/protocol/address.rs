// SPDX-License-Identifier: GPL-2.0-only
//! Names of unix sockets: a path, or `@name` in the abstract namespace.
//!
//! The one part of the protocol that makes system calls, because both ends need the same rules:
//! sockets are mode 0600, a stale one is replaced only if nobody answers on it, and a peer of another
//! user is refused (an abstract name has no mode that would do it).

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, getsockopt, listen,
    setsockopt, socket, sockopt,
};
use nix::sys::stat::{Mode, umask};
use nix::sys::time::{TimeVal, TimeValLike};

/// Bytes a name may have: what the kernel's socket address and the channel's key take.
pub const MAX_NAME_BYTES: usize = 107;

/// A socket's name as people write it. Never empty, no NUL, at most [`MAX_NAME_BYTES`].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct SocketName(String);

/// Why a text is not a [`SocketName`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SocketNameError {
    /// Nothing, or nothing behind the `@`.
    #[error("a socket name cannot be empty")]
    Empty,
    /// More than [`MAX_NAME_BYTES`].
    #[error("socket name has {0} bytes; unix sockets allow {MAX_NAME_BYTES}")]
    TooLong(usize),
    /// A zero byte.
    #[error("a socket name cannot contain a zero byte")]
    Nul,
}

impl FromStr for SocketName {
    type Err = SocketNameError;

    fn from_str(name: &str) -> Result<SocketName, SocketNameError> {
        match name {
            "" | "@" => Err(SocketNameError::Empty),
            _ if name.len() > MAX_NAME_BYTES => Err(SocketNameError::TooLong(name.len())),
            _ if name.contains('\0') => Err(SocketNameError::Nul),
            _ => Ok(SocketName(name.to_owned())),
        }
    }
}

impl fmt::Display for SocketName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl SocketName {
    /// The name as written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The file it is, if it is one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        (!self.0.starts_with('@')).then(|| Path::new(&self.0))
    }

    fn address(&self) -> nix::Result<UnixAddr> {
        match self.0.strip_prefix('@') {
            Some(name) => UnixAddr::new_abstract(name.as_bytes()),
            None => UnixAddr::new(self.0.as_str()),
        }
    }

    /// Connects, waiting no longer than `deadline` for a listener that is too busy to accept.
    ///
    /// The stream's reads and writes then have the same deadline each.
    ///
    /// # Errors
    /// `NotFound` and `ConnectionRefused` mean that nobody listens; `WouldBlock` the deadline.
    pub fn connect(&self, deadline: Duration) -> io::Result<UnixStream> {
        let fd = stream_socket(SockFlag::SOCK_CLOEXEC)?;
        let millis = deadline.as_millis().clamp(1, i64::MAX as u128) as i64;
        let time = TimeVal::milliseconds(millis);
        // On a unix socket the send timeout bounds connect(2) too.
        setsockopt(&fd, sockopt::SendTimeout, &time)?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &time)?;
        connect(fd.as_raw_fd(), &self.address()?)?;
        Ok(UnixStream::from(fd))
    }

    /// Makes a non-blocking listening socket of this name with mode 0600.
    ///
    /// The file of a listener that died is replaced; ours is removed with the [`SocketFile`]. Sets the process's umask for a moment, so call
    /// it while there is one thread.
    ///
    /// # Errors
    /// `AddrInUse` if somebody answers on it, `AlreadyExists` if the path is something else than a
    /// socket; else what the system says.
    pub fn listen(&self) -> io::Result<(OwnedFd, SocketFile)> {
        let fd = stream_socket(SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK)?;
        match self.bind(&fd) {
            Err(Errno::EADDRINUSE) => {
                self.remove_stale()?;
                self.bind(&fd)?;
            }
            other => other?,
        }
        // A daemon changes its working directory later.
        let file = SocketFile(self.path().map(std::path::absolute).transpose()?);
        listen(&fd, Backlog::new(64)?)?;
        Ok((fd, file))
    }

    fn bind(&self, fd: &OwnedFd) -> nix::Result<()> {
        // The mode must be right from the first moment; chmod afterwards would leave a gap.
        let before = umask(Mode::from_bits_truncate(0o177));
        let result = bind(fd.as_raw_fd(), &self.address()?);
        umask(before);
        result
    }

    fn remove_stale(&self) -> io::Result<()> {
        let Some(path) = self.path() else {
            return Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process listens on it",
            ));
        };
        if !path.symlink_metadata()?.file_type().is_socket() {
            return Err(io::Error::new(
                io::ErrorKind::AlreadyExists,
                "the path exists and is not a socket",
            ));
        }
        match self.connect(Duration::from_secs(1)) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
                std::fs::remove_file(path)
            }
            _ => Err(io::Error::new(
                io::ErrorKind::AddrInUse,
                "another process listens on it",
            )),
        }
    }
}

/// The file of a listening socket, removed when this is dropped. An abstract name has none.
#[derive(Debug)]
pub struct SocketFile(Option<PathBuf>);

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

fn stream_socket(flags: SockFlag) -> nix::Result<OwnedFd> {
    socket(AddressFamily::Unix, SockType::Stream, flags, None)
}

/// Whether the process at the other end may command us: root, or our own user.
///
/// # Errors
/// The peer's credentials cannot be read.
pub fn peer_is_trusted(stream: &impl AsFd) -> io::Result<bool> {
    let peer = getsockopt(stream, sockopt::PeerCredentials)?;
    Ok(peer.uid() == 0 || peer.uid() == nix::unistd::geteuid().as_raw())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn name(dir: &tempfile::TempDir, name: &str) -> SocketName {
        dir.path().join(name).to_str().unwrap().parse().unwrap()
    }

    #[test]
    fn names_are_bounded() {
        assert_eq!("".parse::<SocketName>(), Err(SocketNameError::Empty));
        assert_eq!("@".parse::<SocketName>(), Err(SocketNameError::Empty));
        assert_eq!("a\0".parse::<SocketName>(), Err(SocketNameError::Nul));
        assert_eq!(
            "a".repeat(108).parse::<SocketName>(),
            Err(SocketNameError::TooLong(108))
        );
        assert!("a".repeat(107).parse::<SocketName>().is_ok());
    }

    #[test]
    fn a_listener_is_private_and_answers() {
        let dir = tempfile::tempdir().unwrap();
        let name = name(&dir, "s");
        let _listener = name.listen().unwrap();
        let mode = name
            .path()
            .unwrap()
            .metadata()
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        let peer = name.connect(Duration::from_secs(5)).unwrap();
        assert!(peer_is_trusted(&peer).unwrap());
    }

    #[test]
    fn a_live_listener_is_not_replaced_but_a_dead_one_is() {
        let dir = tempfile::tempdir().unwrap();
        let name = name(&dir, "s");
        let (first, file) = name.listen().unwrap();
        assert_eq!(name.listen().unwrap_err().kind(), io::ErrorKind::AddrInUse);
        // As after a crash: the listener is gone, its file is there.
        drop(first);
        let _second = name.listen().unwrap();
        std::mem::forget(file);
        name.connect(Duration::from_secs(5)).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let name = name(&dir, "precious");
        std::fs::write(name.path().unwrap(), "data").unwrap();
        assert_eq!(
            name.listen().unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        assert_eq!(std::fs::read(name.path().unwrap()).unwrap(), b"data");
    }

    #[test]
    fn an_abstract_name_leaves_no_file() {
        let name: SocketName = format!("@ddsnap-test-{}", std::process::id())
            .parse()
            .unwrap();
        let listener = name.listen().unwrap();
        name.connect(Duration::from_secs(5)).unwrap();
        assert_eq!(name.listen().unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(listener);
        assert!(name.connect(Duration::from_secs(5)).is_err());
    }
}
