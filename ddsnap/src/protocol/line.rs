// SPDX-License-Identifier: GPL-2.0-only
//! What servers and the agent of a volume say to each other, and one agent to the next.
//!
//! Servers stand in line at the agent: the first gets [`FromAgent::StartServer`], each further one
//! [`FromAgent::Wait`] and, when the one before it has gone, its start. That is how a new server
//! takes over from an old one without both touching the store. An agent without a server makes room for
//! another agent, as a script expects that starts both again after a crash.

use super::codec::{CodecError, Frame, Reader, Writer};

const SERVER_READY: u16 = 0x0100;
const AGENT_READY: u16 = 0x0101;
const START_SERVER: u16 = 0x8100;
const WAIT: u16 = 0x8101;
const IN_USE: u16 = 0x8102;

/// Server to agent, or another agent to it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToAgent {
    /// A server wants to serve this volume and will listen for commands on `socket`.
    ServerReady {
        /// Its process id.
        pid: u32,
        /// Its control socket's name.
        socket: String,
    },
    /// Another agent wants this name. One that is not in use ends, and the connection with it.
    AgentReady {
        /// Its process id.
        pid: u32,
    },
}

/// What the agent says.
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
    /// To another agent: this one has a server and stays.
    InUse {
        /// The active server's process id.
        active_pid: u32,
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
            ToAgent::AgentReady { pid } => {
                body.u32(*pid);
                body.frame(AGENT_READY)
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
            AGENT_READY => {
                let message = ToAgent::AgentReady { pid: body.u32()? };
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
            FromAgent::InUse { active_pid } => {
                body.u32(*active_pid);
                body.frame(IN_USE)
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
            IN_USE => FromAgent::InUse {
                active_pid: body.u32()?,
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

        let agent = ToAgent::AgentReady { pid: 5 };
        let frame = Frame {
            code: 0x0101,
            body: vec![5, 0, 0, 0],
        };
        assert_eq!(agent.to_frame(), frame);
        assert_eq!(ToAgent::from_frame(&frame), Ok(agent));

        let in_use = FromAgent::InUse { active_pid: 9 };
        let frame = Frame {
            code: 0x8102,
            body: vec![9, 0, 0, 0],
        };
        assert_eq!(in_use.to_frame(), frame);
        assert_eq!(FromAgent::from_frame(&frame), Ok(in_use));
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
