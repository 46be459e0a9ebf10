// SPDX-License-Identifier: GPL-2.0-only
//! What the server says and hears, as bytes.
//!
//! [`channel`] is the kernel's side (`/dev/ddsnap`); [`codec`] frames the control connection, whose
//! messages are in [`control`] (commands) and [`line`] (server and agent); [`address`] names the sockets;
//! [`space`] says when a status is a warning. PROTOCOL.md has the byte tables; the golden tests here pin them.

pub mod address;
pub mod channel;
pub mod codec;
pub mod control;
pub mod line;
pub mod space;
