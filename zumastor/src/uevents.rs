// SPDX-License-Identifier: GPL-2.0-only
//! Listens for block devices that appear or change.
//!
//! To udev's messages and not the kernel's: only when udev is done do the names below /dev exist
//! that volumes are defined by. What a message says does not matter and is not trusted; it is only
//! the moment to look again.

use std::os::fd::{AsRawFd, OwnedFd};
use std::thread;

use anyhow::{Context, Result};
use ddsnap::stdio::complain;
use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, socket,
};

/// The multicast group of udev's own messages (1 is the kernel's).
const UDEV_GROUP: u32 = 2;
/// A message is at most a page or two; the rest of a longer one is of no interest.
const MESSAGE_BYTES: usize = 16 << 10;

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

/// Starts a thread that calls `happened` when something happens to a block device.
pub fn watch(happened: impl Fn() + Send + 'static) -> Result<()> {
    let fd = subscribe()?;
    thread::Builder::new()
        .name("uevents".into())
        .spawn(move || listen(&fd, happened))?;
    Ok(())
}

fn listen(fd: &OwnedFd, happened: impl Fn()) {
    let mut message = vec![0; MESSAGE_BYTES];
    loop {
        match recv(fd.as_raw_fd(), &mut message, MsgFlags::empty()) {
            Ok(length) if is_block(&message[..length]) => happened(),
            Ok(_) | Err(Errno::EINTR) => {}
            // The queue ran over: something was missed, so look.
            Err(Errno::ENOBUFS) => happened(),
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
    use super::is_block;

    #[test]
    fn block_devices_are_told_from_others() {
        assert!(is_block(
            b"libudev\0\xfe\xed\xca\xfeACTION=add\0SUBSYSTEM=block\0DEVNAME=/dev/a\0"
        ));
        assert!(!is_block(b"libudev\0ACTION=add\0SUBSYSTEM=net\0"));
        assert!(!is_block(b""));
    }
}
