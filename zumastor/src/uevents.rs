// SPDX-License-Identifier: GPL-2.0-only
//! Listens for block devices that appear or change.
//!
//! To udev's messages and not the kernel's: only when udev is done do the names below /dev exist
//! that volumes are defined by. What a message says does not matter and is not trusted; it is only
//! the moment to look again.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use ddsnap::stdio::complain;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// The multicast group of udev's own messages (1 is the kernel's).
const UDEV_GROUP: u32 = 2;
/// A message is at most a page or two; the rest of a longer one is of no interest.
const MESSAGE_BYTES: usize = 16 << 10;

/// How often there is an occasion to look although nothing was heard: who lets go of a device need not cause an event.
pub const LOOK_EVERY: Duration = Duration::from_secs(30);

/// Why it is time to look.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Occasion {
    /// Something happened to a block device.
    Device,
    /// [`LOOK_EVERY`] has gone by in silence.
    Time,
}

/// A socket on which udev's messages arrive from now on.
pub fn subscribe() -> Result<OwnedFd> {
    let fd = socket(
        AddressFamily::Netlink,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkKObjectUEvent,
    )
    .context("could not listen for devices")?;
    bind(fd.as_raw_fd(), &NetlinkAddr::new(0, UDEV_GROUP))
        .context("could not listen for devices")?;
    Ok(fd)
}

/// Takes all messages that are there, whatever they say.
pub fn drain(fd: &OwnedFd) {
    let mut message = [0; 64];
    // An overrun is an error of its own and means the same: something happened.
    while matches!(
        recv(fd.as_raw_fd(), &mut message, MsgFlags::MSG_DONTWAIT),
        Ok(_) | Err(Errno::ENOBUFS | Errno::EINTR)
    ) {}
}

/// Starts a thread that calls `look` when something happens to a block device, and now and then.
pub fn watch(look: impl Fn(Occasion) + Send + 'static) -> Result<()> {
    let fd = subscribe()?;
    thread::Builder::new()
        .name("uevents".into())
        .spawn(move || listen(&fd, LOOK_EVERY, look))?;
    Ok(())
}

fn listen(fd: &OwnedFd, look_every: Duration, look: impl Fn(Occasion)) {
    let timeout = PollTimeout::try_from(look_every).unwrap_or(PollTimeout::MAX);
    let mut message = vec![0; MESSAGE_BYTES];
    loop {
        if let Ok(0) = poll(&mut [PollFd::new(fd.as_fd(), PollFlags::POLLIN)], timeout) {
            look(Occasion::Time);
            continue;
        }
        match recv(fd.as_raw_fd(), &mut message, MsgFlags::MSG_DONTWAIT) {
            Ok(length) if is_block(&message[..length]) => look(Occasion::Device),
            Ok(_) | Err(Errno::EINTR | Errno::EAGAIN) => {}
            // The queue ran over: something was missed, so look.
            Err(Errno::ENOBUFS) => look(Occasion::Device),
            Err(error) => {
                complain(format_args!("no longer listening for devices: {error}"));
                return;
            }
        }
    }
}

/// Whether a message, a header and `KEY=value` strings ended by NUL, is about a block device.
fn is_block(message: &[u8]) -> bool {
    message
        .split(|b| *b == 0)
        .any(|field| field == b"SUBSYSTEM=block")
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixDatagram;
    use std::sync::mpsc;

    use super::*;

    /// Who lets go of a device need not cause an event, and nobody looked.
    #[test]
    fn silence_is_an_occasion_to_look_too() {
        let (near, far) = UnixDatagram::pair().expect("a pair");
        far.send(b"libudev\0SUBSYSTEM=block\0").expect("sent");
        let (sender, receiver) = mpsc::channel();
        let near = near.into();
        thread::spawn(move || {
            listen(&near, Duration::from_millis(20), move |occasion| {
                // Nobody listens once the test has ended.
                let _ = sender.send(occasion);
            });
        });
        let heard = || receiver.recv_timeout(Duration::from_secs(60));
        assert_eq!(heard(), Ok(Occasion::Device));
        assert_eq!(heard(), Ok(Occasion::Time));
    }

    #[test]
    fn block_devices_are_told_from_others() {
        assert!(is_block(
            b"libudev\0\xfe\xed\xca\xfeACTION=add\0SUBSYSTEM=block\0DEVNAME=/dev/a\0"
        ));
        assert!(!is_block(b"libudev\0ACTION=add\0SUBSYSTEM=net\0"));
        assert!(!is_block(b""));
    }
}
