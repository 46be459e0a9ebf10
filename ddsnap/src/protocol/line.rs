// SPDX-License-Identifier: GPL-2.0-only
//! What servers and the agent of a volume say to each other.
//!
//! Servers stand in line at the agent: the first gets [`FromAgent::StartServer`], each further one
//! [`FromAgent::Wait`] and, when the one before it has gone, its start. That is how a new server
//! takes over from an old one without both touching the store.

use super::codec::{CodecError, Frame, Reader, Writer};

const SERVER_READY: u16 = 0x0100;
const START_SERVER: u16 = 0x8100;
const WAIT: u16 = 0x8101;

/// Server to agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToAgent {
    /// A server wants to serve this volume and will listen for commands on `socket`.
    ServerReady {
        /// Its process id.
        pid: u32,
        /// Its control socket's name.
        socket: String,
    },
}

/// Agent to server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromAgent {
    /// Open the store and serve.
    StartServer,
    /// Another server is active; wait.
    Wait {
        /// Its process id.
        active_pid: u32,
        /// How many are in line before this one, the active one included.
        ahead: u32,
    },
}

impl ToAgent {
    /// The message as a frame.
    #[must_use]
    pub fn to_frame(&self) -> Frame {
        let mut body = Writer::default();
        match self {
            ToAgent::ServerReady { pid, socket } => {
                body.u32(*pid).text(socket);
                body.frame(SERVER_READY)
            }
        }
    }

    /// The message in `frame`.
    ///
    /// # Errors
    /// [`CodecError`] naming what is wrong with it.
    pub fn from_frame(frame: &Frame) -> Result<ToAgent, CodecError> {
        let mut body = Reader::new(frame);
        match frame.code {
            SERVER_READY => {
                let message = ToAgent::ServerReady {
                    pid: body.u32()?,
                    socket: body.text()?,
                };
                body.end(message)
            }
            other => Err(CodecError::Code(other)),
        }
    }
}

impl FromAgent {
    /// The message as a frame.
    #[must_use]
    pub fn to_frame(&self) -> Frame {
        let mut body = Writer::default();
        match self {
            FromAgent::StartServer => body.frame(START_SERVER),
            FromAgent::Wait { active_pid, ahead } => {
                body.u32(*active_pid).u32(*ahead);
                body.frame(WAIT)
            }
        }
    }

    /// The message in `frame`.
    ///
    /// # Errors
    /// [`CodecError`] naming what is wrong with it.
    pub fn from_frame(frame: &Frame) -> Result<FromAgent, CodecError> {
        let mut body = Reader::new(frame);
        let message = match frame.code {
            START_SERVER => FromAgent::StartServer,
            WAIT => FromAgent::Wait {
                active_pid: body.u32()?,
                ahead: body.u32()?,
            },
            other => return Err(CodecError::Code(other)),
        };
        body.end(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_these_bytes() {
        let ready = ToAgent::ServerReady {
            pid: 0x0102_0304,
            socket: "@s".into(),
        };
        let frame = Frame {
            code: 0x0100,
            body: b"\x04\x03\x02\x01\x02\x00@s".to_vec(),
        };
        assert_eq!(ready.to_frame(), frame);
        assert_eq!(ToAgent::from_frame(&frame), Ok(ready));

        let start = Frame {
            code: 0x8100,
            body: vec![],
        };
        assert_eq!(FromAgent::StartServer.to_frame(), start);
        assert_eq!(FromAgent::from_frame(&start), Ok(FromAgent::StartServer));

        let wait = FromAgent::Wait {
            active_pid: 7,
            ahead: 2,
        };
        let frame = Frame {
            code: 0x8101,
            body: vec![7, 0, 0, 0, 2, 0, 0, 0],
        };
        assert_eq!(wait.to_frame(), frame);
        assert_eq!(FromAgent::from_frame(&frame), Ok(wait));
    }

    #[test]
    fn bytes_left_over_are_refused() {
        let frame = Frame {
            code: START_SERVER,
            body: vec![0],
        };
        let expected = Err(CodecError::Length {
            code: START_SERVER,
            length: 1,
        });
        assert_eq!(FromAgent::from_frame(&frame), expected);
    }
}
