// SPDX-License-Identifier: GPL-2.0-only
//! The way to `/dev/ddsnap`: opening it, attaching it to the volume, and trying again.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::info;

use super::presence::Place;
use crate::protocol::address::SocketName;
use crate::protocol::channel;
use crate::units::ChunkShift;

/// How often a missing module is looked for.
pub const ABSENT_RETRY: Duration = Duration::from_secs(1);
/// The first pause after a failure; each further one is twice as long.
const FIRST_RETRY: Duration = Duration::from_millis(50);
/// The longest pause.
const LAST_RETRY: Duration = Duration::from_secs(5);
/// How often a start looks again while it cannot be told whether the module is there.
const UNCLEAR_TRIES: u32 = 4;

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The module is not loaded. It may be, any moment.
    #[error(
        "there is no {}: the kernel module dm-ddsnap is not loaded",
        channel::DEVICE
    )]
    Absent,
    /// The module is loaded, but its device is not to be seen here.
    #[error(
        "the kernel has the channel, but there is no {device} here; make it with `mknod -m 600 {device} c \
         10 {minor}`, or start the server where it is: not in a chroot or container, without \
         PrivateDevices=",
        device = channel::DEVICE
    )]
    Hidden {
        /// Of the channel's device, whose major number is 10.
        minor: u32,
    },
    /// The channel's device is there and must not be opened here.
    #[error(
        "{} must not be opened here; start the server as root, not in a container and without \
         PrivateDevices= or DevicePolicy=",
        channel::DEVICE
    )]
    Forbidden {
        /// What the system says.
        source: io::Error,
    },
    /// Whether the kernel has devices of the volume cannot be told.
    #[error(
        "there is no {}, and whether the kernel has the target cannot be told: {why}; start the server \
         where /proc is the whole system's",
        channel::DEVICE
    )]
    Unclear {
        /// What is in the way.
        why: String,
    },
    /// Another server is attached under the same agent socket.
    #[error("another server is attached to the kernel under {key}; stop it first")]
    Busy {
        /// The agent socket.
        key: String,
    },
    /// The devices that exist have another chunk size.
    #[error(
        "the kernel's devices of {key} do not have this store's chunk size of {chunk_bytes} bytes: \
         this is another store"
    )]
    Chunk {
        /// The agent socket.
        key: String,
        /// The store's chunk size.
        chunk_bytes: u64,
    },
    /// The module speaks another version.
    #[error(
        "the kernel module speaks another version of the channel than {}; install the dm-ddsnap of \
         this release, and load it instead of the one that is loaded, or reboot",
        channel::VERSION
    )]
    Version,
    /// Anything else.
    #[error("{}: cannot {doing}", channel::DEVICE)]
    System {
        /// What was tried.
        doing: &'static str,
        /// What the system says.
        source: io::Error,
    },
}

/// Makes attached channels.
pub trait Connect {
    /// A channel on which requests can be read and replies written.
    ///
    /// # Errors
    /// [`LinkError`].
    fn connect(&mut self) -> Result<OwnedFd, LinkError>;
}

/// The kernel's channel of one volume.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// The agent socket's name, as in the table lines of the volume's devices.
    pub key: SocketName,
    /// The store's chunk size.
    pub chunk: ChunkShift,
}

impl Connect for Kernel {
    fn connect(&mut self) -> Result<OwnedFd, LinkError> {
        let file = Place::system().open()?;
        let version = self.attach(|ioctl, argument| {
            // SAFETY: the descriptor is open and the argument is readable for the size that the
            // request's number says; the kernel keeps no reference to it.
            let result =
                unsafe { nix::libc::ioctl(file.as_raw_fd(), ioctl as _, argument.as_ptr()) };
            Errno::result(result).map(drop)
        })?;
        if version != channel::VERSION {
            info!(
                "the kernel module that is loaded speaks version {version} of the channel, not {}; it serves until \
                 the next boot, but slower",
                channel::VERSION
            );
        }
        Ok(file.into())
    }
}

impl Kernel {
    /// Attaches in the newest version that the module speaks, too; gives that.
    fn attach(
        &self,
        ioctl: impl Fn(u32, &[u8; channel::ATTACH_BYTES]) -> nix::Result<()>,
    ) -> Result<u32, LinkError> {
        for (version, number) in channel::VERSIONS {
            match ioctl(number, &channel::attach(version, &self.key, self.chunk)) {
                Ok(()) => return Ok(version),
                // A module of the versions before 4 has another number for this ioctl.
                Err(Errno::EPROTO | Errno::ENOTTY) => {}
                Err(errno) => return Err(self.refusal(errno)),
            }
        }
        Err(LinkError::Version)
    }

    /// What an error of the ioctl that attaches means.
    fn refusal(&self, errno: Errno) -> LinkError {
        match errno {
            Errno::EBUSY => LinkError::Busy {
                key: self.key.to_string(),
            },
            Errno::EINVAL => LinkError::Chunk {
                key: self.key.to_string(),
                chunk_bytes: self.chunk.bytes(),
            },
            _ => LinkError::System {
                doing: "attach to it",
                source: errno.into(),
            },
        }
    }
}

/// Whether a request can be read from the channel at once. Right after attaching this says whether
/// devices exist.
#[must_use]
pub fn has_requests(channel: &impl AsFd) -> bool {
    let mut fds = [PollFd::new(channel.as_fd(), PollFlags::POLLIN)];
    // An error is met again, and handled, by the read that follows.
    matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1..))
}

/// Growing pauses between attempts.
#[derive(Clone, Copy, Debug)]
pub struct Backoff {
    next: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { next: FIRST_RETRY }
    }
}

impl Backoff {
    /// How long to wait before the next attempt.
    pub fn pause(&mut self) -> Duration {
        let pause = self.next;
        self.next = (pause * 2).min(LAST_RETRY);
        pause
    }
}

/// Connects, waiting up to `deadline` for another server to let go. Gives `None` if the module is not
/// loaded.
///
/// The kernel tells nobody when a channel becomes free, and the old server's is closed only when the
/// last of its requests has ended, some time after its death; so this asks again and again.
///
/// # Errors
/// [`LinkError`], but not `Absent`.
pub fn connect_within(
    connect: &mut impl Connect,
    deadline: Duration,
) -> Result<Option<OwnedFd>, LinkError> {
    let end = std::time::Instant::now() + deadline;
    let mut backoff = Backoff::default();
    let mut tries = 0;
    loop {
        match connect.connect() {
            Ok(file) => return Ok(Some(file)),
            Err(LinkError::Absent) => return Ok(None),
            Err(LinkError::Busy { .. }) if std::time::Instant::now() < end => {
                std::thread::sleep(backoff.pause());
            }
            // The module is being loaded: wait for it to be there, or not.
            Err(LinkError::Unclear { .. }) if tries < UNCLEAR_TRIES => {
                tries += 1;
                std::thread::sleep(backoff.pause());
            }
            Err(other) => return Err(other),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel() -> Kernel {
        Kernel {
            key: "@vol".parse().unwrap(),
            chunk: ChunkShift::new(14).unwrap(),
        }
    }

    /// A module that speaks one version, whose ioctl has this number.
    fn module(version: u32, number: u32) -> impl Fn(u32, &[u8; 128]) -> nix::Result<()> {
        move |ioctl, argument| match (ioctl == number, u32::from(argument[0]) == version) {
            (true, true) => Ok(()),
            (true, false) => Err(Errno::EPROTO),
            (false, _) => Err(Errno::ENOTTY),
        }
    }

    /// After an upgrade of the packages the module that was loaded got no server any more, and all writes failed.
    #[test]
    fn a_module_that_was_loaded_before_an_upgrade_is_served() {
        for (version, number) in channel::VERSIONS {
            let spoken = kernel().attach(module(version, number)).unwrap();
            assert_eq!(spoken, version);
        }
    }

    /// A server met a module whose ioctl had another number, and said "Inappropriate ioctl for device".
    #[test]
    fn a_module_that_speaks_none_of_the_versions_is_told_as_that() {
        for number in [channel::IOC_ATTACH, 7] {
            let error = kernel().attach(module(99, number)).unwrap_err().to_string();
            assert!(
                error.contains("another version of the channel than 5; install the dm-ddsnap"),
                "{error}"
            );
        }
        let error = kernel().attach(|_, _| Err(Errno::ENOMEM)).unwrap_err();
        assert!(matches!(error, LinkError::System { .. }), "{error}");
        let error = kernel().attach(|_, _| Err(Errno::EBUSY)).unwrap_err();
        assert!(matches!(error, LinkError::Busy { .. }), "{error}");
    }
}
