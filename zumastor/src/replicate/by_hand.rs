// SPDX-License-Identifier: GPL-2.0-only
//! The listener that `receive start` starts, as a job: it takes what `ddsnap transmit` sends into the origin.
//!
//! It is a thread of the daemon and no process, so nothing is left that could write to the origin when the daemon is gone.

use std::fs::File;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, bail};
use ddsnap::delta::listen::serve;
use ddsnap::delta::stream::{Opening, Progress};
use ddsnap::stdio::complain;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::files::Files;
use super::upstream::with;
use super::written::Origin;
use crate::jobs::{Job, Running};
use crate::layout::Layout;
use crate::volume::{Peer, Volumes};

/// What the job is called.
pub const NAME: &str = "receive-by-hand";

/// The job.
pub struct Listener {
    /// The daemon's volumes.
    pub volumes: Arc<dyn Volumes>,
    /// Where things are.
    pub layout: Layout,
    /// Of the volume.
    pub files: Files,
    /// The volume.
    pub volume: String,
    /// Where it listens.
    pub listener: TcpListener,
}

impl Job for Listener {
    fn name(&self) -> String {
        NAME.into()
    }

    /// Nothing else may write to the origin, or take its content for a snapshot's.
    fn is_alone(&self) -> bool {
        true
    }

    fn run(&mut self, running: &Arc<Running>) -> Result<String> {
        self.listener.set_nonblocking(true)?;
        // What came by one connection is as little to be written to as what comes by it: the next may go on with it.
        let mut claim = None;
        loop {
            let mut polled = [
                PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
                PollFd::new(running.end_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => return Err(error).context("could not wait for a connection"),
            }
            running.check()?;
            let taken = match self.listener.accept() {
                Ok((stream, _)) => self.take(&stream, &mut claim, running),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => {
                    // Out of descriptors, for example: what ends gives some back.
                    running.pause(std::time::Duration::from_secs(1))?;
                    Err(error.into())
                }
            };
            running.check()?;
            if let Err(error) = taken {
                complain(format_args!("{}: {error:#}", self.volume));
            }
        }
    }
}

impl Listener {
    /// Takes what one connection brings; ends it when the job is to end.
    fn take(&self, stream: &TcpStream, claim: &mut Option<File>, running: &Running) -> Result<()> {
        stream.set_nonblocking(false)?;
        let over = EventFd::from_flags(EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK)?;
        thread::scope(|scope| {
            let watch = || {
                let mut polled = [
                    PollFd::new(over.as_fd(), PollFlags::POLLIN),
                    PollFd::new(running.end_fd(), PollFlags::POLLIN),
                ];
                while poll(&mut polled, PollTimeout::NONE) == Err(nix::errno::Errno::EINTR) {}
                if running.ending().is_some() {
                    // It may have ended already.
                    let _ = stream.shutdown(Shutdown::Both);
                }
            };
            let watcher = thread::Builder::new().name("by-hand-watch".into());
            watcher.spawn_scoped(scope, watch)?;
            let taken = self.serve(stream, claim, running);
            // Fails only when the counter is full, and then it is readable anyway.
            let _ = over.write(1);
            taken
        })
    }

    /// Fails if somebody has, or wrote to, what an increment is put onto: that would stay there, and be no snapshot's. Nobody
    /// gets it for as long as the file is open.
    fn claim_unwritten(&self, running: &Running) -> Result<Option<File>> {
        let (volumes, volume) = (self.volumes.as_ref(), self.volume.as_str());
        let mut standing = with(volumes, volume, |v| v.standing(&Peer::Source, &|_| 0))?;
        let layout = &self.layout;
        let origin = Origin {
            volumes,
            layout,
            volume,
        };
        let claim = origin.claim(&mut standing, &|| running.ending().is_some())?;
        if standing.written {
            bail!(
                "somebody wrote to the replica /dev/mapper/{volume} since the last snapshot arrived: `zumastor replicate \
                 {volume} --force-base` keeps that as a snapshot and takes it back, `zumastor failover {volume}` makes it \
                 master with it"
            );
        }
        Ok(claim)
    }

    fn serve(&self, stream: &TcpStream, claim: &mut Option<File>, running: &Running) -> Result<()> {
        let node = with(self.volumes.as_ref(), &self.volume, |v| v.node(None))?;
        let mut wanted = |opening: &Opening| {
            let is_first = claim.is_none();
            let claimed = match claim {
                Some(_) => Ok(()),
                None => self.claim_unwritten(running).map(|file| *claim = file),
            };
            let admitted = claimed.and_then(|()| {
                let told = self.files.told()?;
                // Without it what breaks before the first is told could only be sent anew from its beginning.
                let nothing = Progress {
                    header: opening.header,
                    done: 0,
                    total: opening.preface.total.max(1),
                    at: 0,
                };
                let begin = || self.files.tell(&nothing);
                with(self.volumes.as_ref(), &self.volume, |v| {
                    v.admit_by_hand(opening, told, &begin)
                })
            });
            if admitted.is_err() && is_first {
                // Nothing of it is what a script sent.
                *claim = None;
            }
            admitted.map_err(|error| format!("{error:#}"))
        };
        let mut tell = |now: Progress| {
            let chunk = now.header.chunk.get();
            running.progress("receiving", now.done << chunk, now.total << chunk);
            // Only what is told can be gone on with or finished: that it was not, the end says.
            if let Err(error) = self.files.tell(&now) {
                complain(format_args!("{}: {error:#}", self.volume));
            }
        };
        serve(stream, &node, &mut wanted, &mut tell)?;
        Ok(())
    }
}
