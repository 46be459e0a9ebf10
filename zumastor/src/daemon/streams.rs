// SPDX-License-Identifier: GPL-2.0-only
//! Replication in the daemon: requests for it, and streams that come in.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use ddsnap::stdio::complain;
use nix::unistd::{Group, chown};

use super::{Daemon, lock};
use crate::config::Asked;
use crate::jobs::Running;
use crate::layout::Layout;
use crate::replicate::cycle::{Cycle, Way};
use crate::replicate::socket::{self, Open};
use crate::replicate::verify::{Found, Verify};
use crate::replication::message::COMPARE;
use crate::volume::Peer;

/// Most connections that have not said yet what they are for.
const OPENING_MAX: usize = 32;
/// The group that may bring and fetch streams.
const GROUP: &str = "zumastor";
/// What cannot be accepted is tried again after so long, if nothing ends before.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Connections that have not said yet what they are for.
#[derive(Default)]
struct Opening {
    count: Mutex<usize>,
    fewer: Condvar,
}

/// A place among them.
struct Place(Arc<Opening>);

impl Opening {
    /// A place, unless all are taken.
    fn enter(self: &Arc<Self>) -> Option<Place> {
        let mut count = lock(&self.count);
        if *count >= OPENING_MAX {
            return None;
        }
        *count += 1;
        Some(Place(self.clone()))
    }

    /// Waits until one of them has ended, but no longer than `time`.
    fn wait(&self, time: Duration) {
        let count = lock(&self.count);
        let before = *count;
        let waited = self
            .fewer
            .wait_timeout_while(count, time, |count| *count >= before);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        *lock(&self.0.count) -= 1;
        self.0.fewer.notify_all();
    }
}

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
        let opening = Arc::new(Opening::default());
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Out of descriptors, for example: what ends gives some back.
                opening.wait(RETRY_AFTER);
                continue;
            };
            let Some(place) = opening.enter() else {
                let error = "too many connections at a time: try again later";
                let _ = socket::answer(&stream, Some(error.into()));
                continue;
            };
            let this = self.clone();
            let spawned = thread::Builder::new()
                .name("opening".into())
                .spawn(move || {
                    let _place = place;
                    if let Err(error) = this.take_stream(stream) {
                        complain(format_args!("replication stream: {error:#}"));
                    }
                });
            if let Err(error) = spawned {
                // The connection is closed with what would have taken it.
                complain(format_args!("no thread for a replication stream: {error}"));
            }
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
            self.admit(volume, &peer, true)?;
            let (stream, hello) = socket::greeting(socket)?;
            let way = match peer {
                Peer::Source => Way::ServeReceive(stream),
                Peer::Target(host) => Way::ServeSend(host, stream),
            };
            if hello.features & COMPARE == 0 {
                self.begin(volume, way, None, false)
            } else {
                self.begin_verify(volume, way, false, &Arc::default())
            }
        };
        match begun() {
            Ok(_) => Ok(()),
            Err(error) => socket::answer(&answers, Some(format!("{error:#}"))),
        }
    }

    /// Whether a replication may be now. A master greets a stream that comes to it, only to say no: so an older
    /// one hears that it was superseded.
    fn admit(&self, volume: &str, peer: &Peer, greets: bool) -> Result<()> {
        self.with(volume, |v| {
            if *peer == Peer::Source && greets && v.config.master.is_some() {
                return Ok(());
            }
            v.check_replicates(peer)
        })
    }

    /// Starts a cycle; `asked`: for somebody who asked for it, `is_again`: by itself, which waits for nobody here.
    pub(super) fn begin(
        self: &Arc<Self>,
        volume: &str,
        way: Way,
        asked: Option<Asked>,
        is_again: bool,
    ) -> Result<Arc<Running>> {
        let greets = matches!(way, Way::ServeReceive(_));
        if !is_again {
            self.admit(volume, &way.peer(), greets)?;
        }
        let job = Box::new(Cycle {
            volumes: self.clone(),
            layout: self.layout.clone(),
            volume: volume.to_owned(),
            way,
            asked,
            is_again,
            was_on_its_way: false,
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
        self.admit(volume, &way.peer(), false)?;
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
}

/// What this machine is called where it has to be called something.
pub(super) fn node_name(layout: &Layout) -> Result<String> {
    let given = fs::read_to_string(layout.at("/etc/zumastor/nodename")).ok();
    let given = given.map(|name| name.trim().to_owned());
    if let Some(name) = given.filter(|name| !name.is_empty()) {
        return Ok(name);
    }
    let name = nix::unistd::gethostname().context("this machine has no name")?;
    Ok(name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// The place of a connection whose thread panicked was lost.
    #[test]
    fn a_place_is_given_back_however_a_connection_ends() {
        let opening = Arc::new(Opening::default());
        let mut places: Vec<Place> = std::iter::from_fn(|| opening.enter()).collect();
        assert_eq!(places.len(), OPENING_MAX);
        let place = places.pop();
        let panicked = catch_unwind(AssertUnwindSafe(move || {
            let _place = place;
            panic!("on purpose");
        }));
        assert!(panicked.is_err());
        let place = opening.enter();
        assert!(place.is_some() && opening.enter().is_none());
        let ends = thread::spawn(move || drop(place));
        while opening.enter().is_none() {
            opening.wait(Duration::from_millis(100));
        }
        ends.join().expect("it ended");
    }
}
