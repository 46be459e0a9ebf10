// SPDX-License-Identifier: GPL-2.0-only
//! Tells systemd how the daemon is, by the protocol of sd_notify(3).

use ddsnap::stdio::complain;
use std::env;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// Sends `state` if there is anyone to tell. Nothing depends on its arrival but systemd's view.
pub fn send(state: &str) {
    let Some(name) = env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let address = match name.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(&name),
    };
    let sent = address.and_then(|a| UnixDatagram::unbound()?.send_to_addr(state.as_bytes(), &a));
    if let Err(error) = sent {
        complain(format_args!("could not notify systemd: {error}"));
    }
}
