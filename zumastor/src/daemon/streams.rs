// SPDX-License-Identifier: GPL-2.0-only
//! Replication in the daemon: requests for it, and streams that come in.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ddsnap::stdio::complain;
use nix::unistd::{Group, chown};

use super::Daemon;
use crate::jobs::{Ending, Running};
use crate::layout::Layout;
use crate::replicate::cycle::{Cycle, Way};
use crate::replicate::socket::{self, Open};
use crate::replicate::verify::{Found, Verify};
use crate::replication::message::{COMPARE, Wishes};
use crate::volume::Peer;

/// Most connections that have not said yet what they are for.
const OPENING_MAX: usize = 32;
/// The group that may bring and fetch streams.
const GROUP: &str = "zumastor";

impl Daemon {
    /// Listens for streams.
    pub(super) fn listen_for_streams(layout: &Layout) -> Result<UnixListener> {
        let path = layout.replication_socket();
        let failed = || format!("could not listen on {}", path.display());
        if path.exists() {
            fs::remove_file(&path).with_context(failed)?;
        }
        let old = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
        let listener = UnixListener::bind(&path);
        nix::sys::stat::umask(old);
        let listener = listener.with_context(failed)?;
        // Without the group it is root's alone.
        if let Ok(Some(group)) = Group::from_name(GROUP) {
            chown(&path, None, Some(group.gid)).with_context(failed)?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).with_context(failed)?;
        }
        Ok(listener)
    }

    /// Takes streams for ever.
    pub(super) fn serve_streams(self: &Arc<Self>, listener: &UnixListener) {
        let opening = Arc::new(AtomicUsize::new(0));
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Out of descriptors, for example: others need time to end.
                thread::sleep(Duration::from_millis(100));
                continue;
            };
            if opening.fetch_add(1, Ordering::SeqCst) >= OPENING_MAX {
                opening.fetch_sub(1, Ordering::SeqCst);
                let error = "too many connections at a time: try again later";
                let _ = socket::answer(&stream, Some(error.into()));
                continue;
            }
            let (this, opening) = (self.clone(), opening.clone());
            thread::spawn(move || {
                if let Err(error) = this.take_stream(stream) {
                    complain(format_args!("replication stream: {error:#}"));
                }
                opening.fetch_sub(1, Ordering::SeqCst);
            });
        }
    }

    fn take_stream(self: &Arc<Self>, socket: UnixStream) -> Result<()> {
        let open = socket::accept(&socket)?;
        let answers = socket.try_clone()?;
        let begun = || {
            let (volume, peer) = match &open {
                Open::Receive { volume } => (volume, Peer::Source),
                Open::Send { volume, target } => (volume, Peer::Target(target.clone())),
            };
            self.admit(volume, &peer)?;
            let (stream, hello) = socket::greeting(socket)?;
            let way = match peer {
                Peer::Source => Way::ServeReceive(stream),
                Peer::Target(host) => Way::ServeSend(host, stream),
            };
            if hello.features & COMPARE == 0 {
                self.begin(volume, way, Wishes::default())
            } else {
                self.begin_verify(volume, way, false, &Arc::default())
            }
        };
        match begun() {
            Ok(_) => Ok(()),
            Err(error) => socket::answer(&answers, Some(format!("{error:#}"))),
        }
    }

    /// Whether a replication may be now.
    fn admit(&self, volume: &str, peer: &Peer) -> Result<()> {
        self.with(volume, |v| match peer {
            Peer::Target(host) => {
                if v.target(host)?.stopped {
                    bail!(
                        "the target {host} is stopped: run `zumastor start target {volume} {host}`"
                    );
                }
                Ok(())
            }
            Peer::Source => {
                if v.source()?.stopped {
                    bail!("the source is stopped: run `zumastor start source {volume}`");
                }
                Ok(())
            }
        })
    }

    /// Starts a cycle.
    pub(super) fn begin(
        self: &Arc<Self>,
        volume: &str,
        way: Way,
        wishes: Wishes,
    ) -> Result<Arc<Running>> {
        self.admit(volume, &way.peer())?;
        let job = Box::new(Cycle {
            volumes: self.clone(),
            layout: self.layout.clone(),
            volume: volume.to_owned(),
            way,
            wishes,
            node: node_name(&self.layout)?,
        });
        self.jobs.start(volume, job)
    }

    /// Starts a comparison; what differs is in `found` at its end.
    pub(super) fn begin_verify(
        self: &Arc<Self>,
        volume: &str,
        way: Way,
        send_again: bool,
        found: &Arc<Found>,
    ) -> Result<Arc<Running>> {
        self.admit(volume, &way.peer())?;
        let job = Box::new(Verify {
            volumes: self.clone(),
            layout: self.layout.clone(),
            volume: volume.to_owned(),
            way,
            send_again,
            node: node_name(&self.layout)?,
            found: found.clone(),
        });
        self.jobs.start(volume, job)
    }

    /// Ends the cycle of a replication, if one runs.
    pub(super) fn end_cycle(&self, volume: &str, target: Option<&str>, why: Ending) {
        let name = target.map_or("receive".to_owned(), |host| format!("replicate {host}"));
        self.jobs.end(volume, Some(&name), why);
    }
}

/// What this machine is called where it has to be called something.
fn node_name(layout: &Layout) -> Result<String> {
    let given = fs::read_to_string(layout.at("/etc/zumastor/nodename")).ok();
    let given = given.map(|name| name.trim().to_owned());
    if let Some(name) = given.filter(|name| !name.is_empty()) {
        return Ok(name);
    }
    let name = nix::unistd::gethostname().context("this machine has no name")?;
    Ok(name.to_string_lossy().into_owned())
}
