// SPDX-License-Identifier: GPL-2.0-only
//! The protocol between the command line and the daemon.
//!
//! A unix stream socket, mode 0600, at /var/run/zumastor/control; the peer must be root. One
//! connection carries one request and its answer. Each message is one line of JSON,
//! `{"v":4,"body":…}`, of at most [`MESSAGE_MAX_BYTES`]. The client sends a [`Request`]; the daemon
//! answers with any number of [`Event`]s, the last of which is [`Event::Done`]. While an operation
//! runs, [`Event::Alive`] comes at least every [`ALIVE_PERIOD`], so that a client can tell a long
//! operation from a dead daemon: it gives up after [`SILENCE_MAX`]. A client that goes away does not
//! stop its operation.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::socket::{getsockopt, sockopt::PeerCredentials};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::note::Note;
use crate::refusal::Refusal;
use crate::status::View;
use crate::volume::{DefineSource, DefineTarget, DefineVolume, MasterFlags, WantedRotation};

/// The protocol's version. 1: the first. 2: a status has any number of warnings, and notes. 3: notes are typed;
/// jobs; a document of version 2 in a status. 4: more of the requests can be dry runs.
pub const PROTOCOL_VERSION: u32 = 4;
/// Longest message in bytes: the status of some thousand snapshots is far below.
pub const MESSAGE_MAX_BYTES: u64 = 16 << 20;
/// How often a busy daemon says that it is alive.
pub const ALIVE_PERIOD: Duration = Duration::from_secs(5);
/// How long a client waits for the next message.
pub const SILENCE_MAX: Duration = Duration::from_secs(60);
/// How long the daemon waits for a request, and for a client to take an answer.
pub const PEER_DEADLINE: Duration = Duration::from_secs(10);

/// What the client wants.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// `define volume`.
    DefineVolume(DefineVolume),
    /// `define master`.
    DefineMaster {
        /// The volume.
        volume: String,
        /// Its flags.
        flags: MasterFlags,
    },
    /// `define schedule`.
    DefineSchedule {
        /// The volume.
        volume: String,
        /// What to add, change or end.
        rotations: Vec<WantedRotation>,
    },
    /// `forget schedule`.
    ForgetSchedule {
        /// The volume.
        volume: String,
        /// The rotation; none for all.
        kind: Option<String>,
    },
    /// `forget volume`.
    Forget {
        /// The volume.
        volume: String,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// `protect` and `unprotect`.
    Protect {
        /// The volume.
        volume: String,
        /// The snapshot's number.
        snapshot: u32,
        /// Whether it shall be.
        protect: bool,
    },
    /// `remount`.
    Remount {
        /// The volume.
        volume: String,
        /// The new mount point; none: as it is.
        mountpoint: Option<PathBuf>,
        /// The new options, empty for none; absent: as they are.
        mountopts: Option<String>,
    },
    /// `revert`.
    Revert {
        /// The volume.
        volume: String,
        /// The snapshot's number.
        snapshot: u32,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// `resize`: sizes in bytes, each as it is if absent.
    Resize {
        /// The volume.
        volume: String,
        /// Of the origin.
        origin: Option<u64>,
        /// Of the snapshot store.
        store: Option<u64>,
        /// Of the metadata device.
        meta: Option<u64>,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// `forget snapshot`.
    ForgetSnapshot {
        /// The volume.
        volume: String,
        /// The snapshot's number.
        snapshot: u32,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// `start volume` or `start master`.
    Start {
        /// Which part.
        role: Role,
        /// The volume.
        volume: String,
        /// An origin that was written without its server is accepted.
        #[serde(default)]
        accept_origin: bool,
    },
    /// `stop volume` or `stop master`.
    Stop {
        /// Which part.
        role: Role,
        /// The volume.
        volume: String,
    },
    /// `snapshot`.
    Snapshot {
        /// The volume.
        volume: String,
        /// The rotation; none for a snapshot by hand.
        kind: Option<String>,
        /// Answer at once.
        nowait: bool,
    },
    /// `cancel`.
    Cancel {
        /// The volume.
        volume: String,
        /// The job's name.
        job: String,
    },
    /// `define source`.
    DefineSource {
        /// What it becomes a replica of.
        source: DefineSource,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// `define target`.
    DefineTarget(DefineTarget),
    /// `forget source`, or `forget target` with a host.
    ForgetReplication {
        /// The volume.
        volume: String,
        /// The target; none: the source.
        target: Option<String>,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// `start` or `stop` of `source`, or of `target` with a host.
    SetReplication {
        /// The volume.
        volume: String,
        /// The target; none: the source.
        target: Option<String>,
        /// Whether cycles are run.
        stopped: bool,
    },
    /// `replicate`.
    Replicate {
        /// The volume.
        volume: String,
        /// The target; none: from the source.
        target: Option<String>,
        /// The snapshot to send; none: a new one.
        snapshot: Option<u32>,
        /// Answer at once.
        nowait: bool,
        /// A full copy over other content.
        full: bool,
        /// Going back to the base where somebody wrote.
        force_base: bool,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// `verify`.
    Verify {
        /// The volume.
        volume: String,
        /// The target; none: the only one, or the source.
        target: Option<String>,
        /// What differs is sent again, and compared again.
        repair: bool,
    },
    /// `failover`.
    Failover {
        /// The volume.
        volume: String,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// `failback`.
    Failback {
        /// What it becomes a replica of.
        source: DefineSource,
        /// Only say what would be done.
        dry_run: bool,
    },
    /// `receive start` or `receive done`.
    ReceiveByHand {
        /// The volume.
        volume: String,
        /// All was sent.
        done: bool,
    },
    /// `status`: never waits for an operation.
    Status,
}

impl Request {
    /// The volume the request is for.
    #[must_use]
    pub fn volume(&self) -> Option<&str> {
        match self {
            Request::DefineVolume(define) => Some(&define.volume),
            Request::DefineMaster { volume, .. }
            | Request::DefineSchedule { volume, .. }
            | Request::ForgetSchedule { volume, .. }
            | Request::Forget { volume, .. }
            | Request::Protect { volume, .. }
            | Request::Remount { volume, .. }
            | Request::Revert { volume, .. }
            | Request::Resize { volume, .. }
            | Request::ForgetSnapshot { volume, .. }
            | Request::Start { volume, .. }
            | Request::Stop { volume, .. }
            | Request::Snapshot { volume, .. }
            | Request::Cancel { volume, .. }
            | Request::ForgetReplication { volume, .. }
            | Request::SetReplication { volume, .. }
            | Request::Verify { volume, .. }
            | Request::Failover { volume, .. }
            | Request::ReceiveByHand { volume, .. }
            | Request::Replicate { volume, .. } => Some(volume),
            Request::DefineSource { source, .. } | Request::Failback { source, .. } => {
                Some(&source.volume)
            }
            Request::DefineTarget(define) => Some(&define.volume),
            Request::Status => None,
        }
    }
}

/// What can be started and stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Agent, server and devices.
    Volume,
    /// Mounts and links.
    Master,
}

/// What the daemon answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Event {
    /// Something happened on the way.
    Note(Note),
    /// Still at it.
    Alive,
    /// All volumes.
    Status(Vec<View>),
    /// The end; with an error if the operation failed.
    Done {
        /// What went wrong, in one sentence.
        error: Option<String>,
        /// The client's exit code.
        code: u8,
    },
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Message<T> {
    v: u32,
    body: T,
}

/// Sends one message.
pub fn send<T: Serialize>(mut to: impl Write, body: T) -> Result<()> {
    let mut line = serde_json::to_vec(&Message {
        v: PROTOCOL_VERSION,
        body,
    })?;
    line.push(b'\n');
    if line.len() as u64 > MESSAGE_MAX_BYTES {
        bail!("a message of {} bytes is too long", line.len());
    }
    to.write_all(&line).context("could not send")
}

/// Receives one message; `None` at the end of the stream.
pub fn receive<T: DeserializeOwned>(from: &mut impl BufRead) -> Result<Option<T>> {
    #[derive(Deserialize)]
    struct Version {
        v: u32,
    }
    let mut line = Vec::new();
    from.take(MESSAGE_MAX_BYTES)
        .read_until(b'\n', &mut line)
        .context("could not receive")?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.pop() != Some(b'\n') {
        bail!("a message was cut off after {} bytes", line.len() + 1);
    }
    // The version first: what another version sends need not fit our types.
    let Version { v } = serde_json::from_slice(&line).context("not a message of this protocol")?;
    if v != PROTOCOL_VERSION {
        bail!("the peer speaks protocol version {v}, this zumastor version {PROTOCOL_VERSION}");
    }
    let message: Message<T> = serde_json::from_slice(&line).context("a malformed message")?;
    Ok(Some(message.body))
}

/// Reads from a connection until a moment, however slowly what is read comes.
#[derive(Debug)]
pub struct Within<'a> {
    stream: &'a UnixStream,
    end: Instant,
}

impl<'a> Within<'a> {
    /// Reads for so long.
    #[must_use]
    pub fn new(stream: &'a UnixStream, time: Duration) -> Self {
        let end = Instant::now() + time;
        Within { stream, end }
    }
}

impl Read for Within<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let left = self.end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(left))?;
        self.stream.read(into)
    }
}

/// Whether the process at the other end belongs to root.
pub fn peer_is_root(stream: &UnixStream) -> bool {
    getsockopt(stream, PeerCredentials).is_ok_and(|peer| peer.uid() == 0)
}

/// Sends `request` to the daemon at `socket` and hands its events to `on_event`, until the end.
pub fn call(socket: &Path, request: &Request, mut on_event: impl FnMut(Event)) -> Result<()> {
    let stream = UnixStream::connect(socket).map_err(|e| no_daemon(socket, &e))?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(PEER_DEADLINE))?;
    send(&stream, request)?;
    let mut reader = BufReader::new(stream);
    loop {
        match receive(&mut reader).context("the daemon's answer was lost")? {
            Some(Event::Done { error: None, .. }) => return Ok(()),
            Some(Event::Done {
                error: Some(text),
                code,
            }) => return Err(Refusal { code, text }.into()),
            Some(event) => on_event(event),
            None => bail!(
                "the daemon ended before it answered: `zumastor status` shows what was done, \
                 `journalctl -u zumastor` why"
            ),
        }
    }
}

fn no_daemon(socket: &Path, error: &io::Error) -> anyhow::Error {
    anyhow::anyhow!(
        "the daemon does not answer at {} ({error}): start it with `systemctl start zumastor` or \
         `/etc/init.d/zumastor start`",
        socket.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(request: &Request) -> String {
        let mut bytes = Vec::new();
        send(&mut bytes, request).expect("sent");
        String::from_utf8(bytes).expect("text")
    }

    #[test]
    fn messages_are_pinned() {
        let request = Request::Snapshot {
            volume: "v".into(),
            kind: None,
            nowait: false,
        };
        let expected = r#"{"v":4,"body":{"snapshot":{"volume":"v","kind":null,"nowait":false}}}"#;
        assert_eq!(line(&request).trim_end(), expected);
        let request = Request::Stop {
            role: Role::Master,
            volume: "v".into(),
        };
        let expected = r#"{"v":4,"body":{"stop":{"role":"master","volume":"v"}}}"#;
        assert_eq!(line(&request).trim_end(), expected);
        assert_eq!(
            line(&Request::Status).trim_end(),
            r#"{"v":4,"body":"status"}"#
        );
    }

    #[test]
    fn what_is_sent_is_received() {
        let request = Request::DefineVolume(DefineVolume {
            volume: "v".into(),
            origin: "/dev/a".into(),
            snapstore: "/dev/b".into(),
            initialize: true,
            ..DefineVolume::default()
        });
        let text = line(&request);
        let received: Option<Request> = receive(&mut text.as_bytes()).expect("received");
        assert_eq!(received, Some(request));
    }

    #[test]
    fn bad_messages_are_refused_with_a_reason() {
        let refusal = |text: &str| {
            receive::<Request>(&mut text.as_bytes())
                .expect_err("refused")
                .to_string()
        };
        assert!(refusal("{\"v\":5,\"body\":{}}\n").contains("protocol version 5"));
        assert!(refusal("{\"v\":4,\"body\":\"status\"}").contains("cut off"));
        assert!(refusal("{\"v\":4,\"body\":{\"reboot\":{}}}\n").contains("malformed"));
        assert!(refusal("hello\n").contains("not a message"));
        let extra =
            "{\"v\":4,\"body\":{\"forget\":{\"volume\":\"v\",\"dry_run\":false,\"x\":1}}}\n";
        assert!(refusal(extra).contains("malformed"));
        assert!(
            receive::<Request>(&mut "".as_bytes())
                .expect("the end")
                .is_none()
        );
    }
}
