// SPDX-License-Identifier: GPL-2.0-only
//! A cycle of replication as a job of the daemon.
//!
//! Four ways: this machine pushes to a target or pulls from its source, by ssh; or it serves another one
//! that does, on a stream that came in. The frames are the same in all.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use anyhow::{Context, Result, bail};
use uuid::Uuid;

use super::downstream::{INCOMING, Receiving};
use super::files::{Files, position_of};
use super::socket::Stream;
use super::ssh::{self, Remote};
use super::upstream::{Sending, with};
use crate::config::Asked;
use crate::jobs::{Declined, Ended, Ending, Job, Running};
use crate::layout::Layout;
use crate::names;
use crate::note::Note;
use crate::replication::decide::{SUPERSEDED, TARGET_IS_MASTER};
use crate::replication::link::{Link, Timing};
use crate::replication::message::{FEATURES, Hello, WHOLE, Wishes};
use crate::replication::receive::receive;
use crate::replication::send::{Options, send};
use crate::replication::sender::Outcome;
use crate::replication::standing::Standing;
use crate::replication::volume::{Downstream, Watch};
use crate::volume::{Peer, Volumes, superseded_line};

/// zstd's level where nobody asked for none.
const LEVEL: u8 = 3;

/// Who begins, and which way the data goes.
pub enum Way {
    /// To a target, by ssh.
    Push(String),
    /// From the source, by ssh.
    Pull,
    /// To a target that has come for it.
    ServeSend(String, Stream),
    /// From an upstream that has come with it.
    ServeReceive(Stream),
}

impl Way {
    /// Which replication of the volume it is.
    #[must_use]
    pub fn peer(&self) -> Peer {
        match self {
            Way::Push(host) | Way::ServeSend(host, _) => Peer::Target(host.clone()),
            Way::Pull | Way::ServeReceive(_) => Peer::Source,
        }
    }
}

/// The job.
pub struct Cycle {
    /// The daemon's volumes.
    pub volumes: Arc<dyn Volumes>,
    /// Where things are.
    pub layout: Layout,
    /// The volume here.
    pub volume: String,
    /// Which way.
    pub way: Way,
    /// Somebody asked for it, and what he allowed for.
    pub asked: Option<Asked>,
    /// It was interrupted, and nobody waits for it any more: a failure does not end it.
    pub is_again: bool,
    /// What this machine is called.
    pub node: String,
    /// A snapshot of before is sent first.
    pub was_on_its_way: bool,
}

struct Eye<'a> {
    running: &'a Running,
    subject: &'static str,
}

impl Watch for Eye<'_> {
    fn progress(&self, done: u64, total: Option<u64>, _: u64) {
        self.running
            .progress(self.subject, done, total.unwrap_or(0));
    }

    fn cancelled(&self) -> bool {
        self.running.ending().is_some()
    }
}

impl Job for Cycle {
    fn name(&self) -> String {
        match &self.way {
            Way::Push(host) | Way::ServeSend(host, _) => names::cycle_job(Some(host)),
            // One at a time, whoever begins it.
            Way::Pull | Way::ServeReceive(_) => names::cycle_job(None),
        }
    }

    fn run(&mut self, running: &Arc<Running>) -> Result<String> {
        let peer = self.way.peer();
        if self.is_again {
            // Whoever has stopped it since need not have been waited for to begin it.
            with(self.volumes.as_ref(), &self.volume, |v| {
                v.check_replicates(&peer)
            })?;
        }
        if self.asked.is_some() {
            with(self.volumes.as_ref(), &self.volume, |v| {
                v.note_asked(&peer, self.asked)
            })?;
        }
        let result = self.run_to_the_end(running);
        if self.is_over(running, &result) {
            // Refused or forgotten meanwhile: then there is nothing to be begun again either.
            let _ = with(self.volumes.as_ref(), &self.volume, |v| {
                v.note_asked(&peer, None)
            });
        }
        result
    }
}

impl Cycle {
    /// Whether it is not to be begun again by itself.
    fn is_over(&self, running: &Running, result: &Result<String>) -> bool {
        let Err(error) = result else {
            return true;
        };
        match running.ending() {
            Some(Ending::Interrupted | Ending::Window) => false,
            Some(Ending::Cancelled) => true,
            // A failure was told to who asked for it, if he is still there.
            None => !self.is_again || error.is::<Declined>(),
        }
    }

    fn run_to_the_end(&mut self, running: &Running) -> Result<String> {
        let (mut outcome, mut complaint) = self.try_cycle(running)?;
        if self.sends_more(&outcome) {
            running.note(Note::Line(
                "what was on its way has arrived; what was written since follows".into(),
            ));
            (outcome, complaint) = self.try_cycle(running)?;
        }
        if let Some(ending) = running.ending() {
            if matches!(outcome, Outcome::Failed(_)) {
                return Err(Ended(ending).into());
            }
        }
        match outcome {
            Outcome::Done { snapshot, proven } => {
                let proof = if proven {
                    "; both sides are proven equal"
                } else {
                    ""
                };
                Ok(match &self.way {
                    Way::Push(host) | Way::ServeSend(host, _) => {
                        format!("snapshot {} is on {host}{proof}", snapshot.number)
                    }
                    _ => format!(
                        "snapshot {} of the upstream has arrived{proof}",
                        snapshot.number
                    ),
                })
            }
            Outcome::Current(_) => Ok("the newest snapshot is on both sides already".into()),
            Outcome::Refused { code, sentence } => {
                let of_epochs = [SUPERSEDED, TARGET_IS_MASTER].contains(&code);
                let line = with(self.volumes.as_ref(), &self.volume, |v| {
                    Ok(superseded_line(&self.volume, &v.config.lineage).filter(|_| of_epochs))
                })?;
                let name = &self.volume;
                let line = line.map(|line| format!("volume '{name}': {line}"));
                let sentence = line.unwrap_or(sentence);
                Err(Declined { code, sentence }.into())
            }
            Outcome::Failed(sentence) if complaint.is_empty() => bail!("{sentence}"),
            Outcome::Failed(sentence) => bail!("{sentence} (the other machine says: {complaint})"),
        }
    }
}

impl Cycle {
    /// Whether somebody wants all that the upstream has now to arrive, and what had been on its way before has come first.
    fn sends_more(&self, outcome: &Outcome) -> bool {
        let came = matches!(outcome, Outcome::Done { .. } | Outcome::Current(_));
        let wanted = self.asked.is_some_and(|asked| asked.snapshot.is_none());
        self.was_on_its_way && came && wanted && matches!(self.way, Way::Push(_) | Way::Pull)
    }

    /// Takes the snapshot to send, unless one is asked for or on its way; says whether one is on its way.
    fn begin(&self, peer: &Peer, snapshot: Option<u32>) -> Result<bool> {
        with(self.volumes.as_ref(), &self.volume, |v| match peer {
            Peer::Target(host) if snapshot.is_none() => v.snapshot_to_send(host),
            Peer::Target(_) => Ok(false),
            // What is no replica any more says so in its greeting, with who superseded whom.
            Peer::Source => Ok(v
                .config
                .source
                .as_ref()
                .is_some_and(|s| s.incoming.is_some())),
        })
    }

    fn try_cycle(&mut self, running: &Running) -> Result<(Outcome, String)> {
        let done = self.cycle(running).inspect_err(|error| {
            if let Way::ServeSend(_, stream) | Way::ServeReceive(stream) = &self.way {
                // Nothing was answered yet, or the stream is of no use any more.
                let _ = super::socket::answer(&stream.socket, Some(format!("{error:#}")));
            }
        });
        match running.ending() {
            // It did not fail: it is not tried again before its time.
            Some(ending) if done.is_err() => Err(Ended(ending).into()),
            _ => done,
        }
    }

    fn cycle(&mut self, running: &Running) -> Result<(Outcome, String)> {
        let peer = self.way.peer();
        let files = Files::of(&self.layout, &self.volume);
        let snapshot = self.asked.and_then(|asked| asked.snapshot);
        self.was_on_its_way = self.begin(&peer, snapshot)?;
        let noted = files.load(INCOMING)?;
        let standing = with(self.volumes.as_ref(), &self.volume, |v| {
            v.standing(&peer, &|incoming| position_of(incoming, noted.as_ref()))
        })?;
        match &peer {
            Peer::Target(host) => {
                let standing = match snapshot {
                    None => standing,
                    Some(number) => {
                        let offered = with(self.volumes.as_ref(), &self.volume, |v| {
                            Ok(v.target(host)?.sending.map(|sending| sending.uuid))
                        })?;
                        only_to(standing, number, host, offered)?
                    }
                };
                self.send(host, files, standing, running)
            }
            Peer::Source => self.receive(files, standing, running),
        }
    }

    fn wishes(&self) -> Wishes {
        let asked = self.asked.unwrap_or_default();
        Wishes {
            full: asked.full,
            force_base: asked.force_base,
        }
    }

    fn hello(&self, features: u64, standing: Standing) -> Hello {
        Hello {
            nonce: Uuid::new_v4().into_bytes(),
            features: FEATURES | features,
            standing,
            wishes: self.wishes(),
        }
    }

    fn send(
        &mut self,
        host: &str,
        files: Files,
        standing: Standing,
        running: &Running,
    ) -> Result<(Outcome, String)> {
        let (rate, plain) = with(self.volumes.as_ref(), &self.volume, |v| {
            let target = v.target(host)?;
            Ok((target.ratelimit, target.uncompressed))
        })?;
        let options = Options {
            level: if plain { 0 } else { LEVEL },
            rate,
            ..Options::default()
        };
        let server = self.layout.server_socket(&self.volume);
        let volumes = self.volumes.clone();
        let again = files.again(host)?;
        let again = again.is_some_and(|again| again.chunk == standing.chunk);
        let mut end = Sending::new(volumes, &self.volume, host, server, files, &standing);
        let own = self.hello(if again { WHOLE } else { 0 }, standing);
        let volumes = self.volumes.as_ref();
        let (link, remote) = link(volumes, &self.layout, &self.volume, &self.way, &self.node)?;
        let subject = "sending";
        let outcome = send(&mut end, link, own, &options, &Eye { running, subject });
        Ok((outcome, remote.map(Remote::finish).unwrap_or_default()))
    }

    fn receive(
        &mut self,
        files: Files,
        standing: Standing,
        running: &Running,
    ) -> Result<(Outcome, String)> {
        let eye = Eye {
            running,
            subject: "receiving",
        };
        let volumes = self.volumes.clone();
        let mut end = Receiving::new(volumes, &self.layout, &self.volume, files, standing);
        if matches!(self.way, Way::Pull) {
            // Nobody waits yet; who is connected to wants a greeting at once.
            end.take_stock(&eye)?;
        }
        let volumes = self.volumes.as_ref();
        let (link, remote) = link(volumes, &self.layout, &self.volume, &self.way, &self.node)?;
        let greeting = |standing| self.hello(0, standing);
        let outcome = receive(&mut end, link, greeting, Timing::default(), &eye);
        Ok((outcome, remote.map(Remote::finish).unwrap_or_default()))
    }
}

/// What a sender holds, as if it were when the snapshot of this number was its newest. `offered`: one that is on its way to
/// the target, and may be there whole: the last cycle perhaps did not get to know of that.
fn only_to(
    mut standing: Standing,
    number: u32,
    host: &str,
    offered: Option<Uuid>,
) -> Result<Standing> {
    let held = &standing.held;
    let at = held
        .iter()
        .position(|held| held.number == number && held.data);
    let at = at.with_context(|| format!("there is no snapshot {number} to send"))?;
    let newer = |id: Option<Uuid>| held[at + 1..].iter().find(|held| Some(held.id) == id);
    if let Some(newer) = newer(standing.hold) {
        bail!(
            "{host} has snapshot {} already, which is newer than {number}: a replica does not go back",
            newer.number
        );
    }
    if let Some(newer) = newer(offered) {
        bail!(
            "snapshot {} is on its way to {host} and may be there already, and it is newer than {number}: a replica does \
             not go back; run this without -s first",
            newer.number
        );
    }
    standing.held.truncate(at + 1);
    Ok(standing)
}

/// The link, and the command behind it if this machine began.
pub(super) fn link(
    volumes: &dyn Volumes,
    layout: &Layout,
    name: &str,
    way: &Way,
    node: &str,
) -> Result<(Link, Option<Remote>)> {
    match way {
        Way::Push(host) => {
            let (command, there) = with(volumes, name, |v| {
                let target = v.target(host)?;
                let own = target.ssh_command.as_deref();
                Ok((ssh::command(layout, own), target.name.clone()))
            })?;
            let there = there.as_deref().unwrap_or(name);
            let (link, remote) = ssh::connect(&command, host, &["receive", there])?;
            Ok((link, Some(remote)))
        }
        Way::Pull => {
            let (command, host, there) = with(volumes, name, |v| {
                let source = v.source()?;
                let own = source.ssh_command.as_deref();
                let command = ssh::command(layout, own);
                Ok((command, source.host.clone(), source.name.clone()))
            })?;
            let words = ["send", there.as_deref().unwrap_or(name), node];
            let (link, remote) = ssh::connect(&command, &host, &words)?;
            Ok((link, Some(remote)))
        }
        Way::ServeSend(_, stream) | Way::ServeReceive(stream) => {
            super::socket::answer(&stream.socket, None)?;
            Ok((of_socket(stream)?, None))
        }
    }
}

/// A socket as a link.
fn of_socket(stream: &Stream) -> Result<Link> {
    struct Half(UnixStream);
    impl Write for Half {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl Drop for Half {
        fn drop(&mut self) {
            // The other side may be gone.
            let _ = self.0.shutdown(Shutdown::Write);
        }
    }
    let whole = stream.socket.try_clone()?;
    let read = io::Cursor::new(stream.greeting.clone());
    Ok(Link {
        reader: Box::new(read.chain(stream.socket.try_clone()?)),
        writer: Box::new(Half(stream.socket.try_clone()?)),
        cut: Arc::new(move || {
            let _ = whole.shutdown(Shutdown::Both);
        }),
        greeted: true,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, mpsc};

    use ddsnap::units::Sectors;

    use super::super::one;
    use super::*;
    use crate::host::fake::Fake;
    use crate::jobs::{JobState, Jobs};
    use crate::replication::standing::{Held, Role};
    use crate::volume::Volume;

    /// `zumastor replicate VOL` on a replica whose last copy had been cut got the rest of that, and nothing of what was
    /// written since.
    #[test]
    fn who_pulls_gets_more_than_what_was_on_its_way() {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        let volumes = one::replica(Arc::new(Fake::default()), &layout);
        let mut cycle = Cycle {
            volumes: volumes.clone(),
            layout,
            volume: "v".into(),
            way: Way::Pull,
            asked: Some(Asked::default()),
            is_again: false,
            node: "here".into(),
            was_on_its_way: false,
        };
        let came = Outcome::Current(Uuid::from_u128(1));
        assert!(!cycle.sends_more(&came), "nothing was");
        cycle.was_on_its_way = cycle.begin(&Peer::Source, None).expect("known");
        assert!(cycle.sends_more(&came));
        assert!(!cycle.sends_more(&Outcome::Failed("cut again".into())));
        // By the clock the next cycle comes soon enough.
        cycle.asked = None;
        assert!(!cycle.sends_more(&came));
        // A master, after a failover, is asked too: it refuses with its epoch, and not because it has no source.
        with(volumes.as_ref(), "v", |v| {
            v.config.source = None;
            Ok(())
        })
        .expect("changed");
        assert!(!cycle.begin(&Peer::Source, None).expect("known"));
    }

    /// `zumastor cancel` of a pull that was still looking at its origin counted as a failure, and the next one began at once.
    #[test]
    fn what_is_cancelled_before_it_is_connected_did_not_fail() {
        struct Held(Arc<one::One>, Mutex<mpsc::Receiver<()>>);
        impl Volumes for Held {
            fn with(
                &self,
                name: &str,
                change: &mut dyn FnMut(&mut Volume) -> Result<()>,
            ) -> Result<()> {
                let told = self.1.lock().expect("no panic").recv();
                told.context("the server is gone")?;
                self.0.with(name, change)
            }
        }
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        let inner = one::replica(Arc::new(Fake::default()), &layout);
        let (go_on, held) = mpsc::channel();
        let jobs = Jobs::new();
        let cycle = Cycle {
            volumes: Arc::new(Held(inner, Mutex::new(held))),
            layout,
            volume: "v".into(),
            way: Way::Pull,
            asked: None,
            is_again: false,
            node: "here".into(),
            was_on_its_way: false,
        };
        let running = jobs.start("v", Box::new(cycle)).expect("started");
        jobs.end("v", None, Ending::Cancelled);
        drop(go_on);
        Jobs::wait(&running, &mut |_| true).expect_err("cancelled");
        assert_eq!(running.view().state, JobState::Cancelled);
    }

    fn standing(hold: Option<u128>) -> Standing {
        let held = |number: u32| Held {
            id: Uuid::from_u128(number.into()),
            number,
            taken: 0,
            length: Sectors(8),
            data: number != 4,
        };
        let volume = Uuid::from_u128(100);
        Standing {
            lineage: Some(volume),
            held: [2, 4, 6, 8].map(held).to_vec(),
            hold: hold.map(Uuid::from_u128),
            ..Standing::blank(volume, Role::Master)
        }
    }

    /// A replica that had something newer went back to what was named.
    #[test]
    fn a_named_snapshot_is_the_newest_and_never_older_than_the_hold() {
        let newest = |hold, number| {
            only_to(standing(hold), number, "beta", None)
                .map(|s| s.newest().map(|held| held.number))
        };
        assert_eq!(newest(None, 6).expect("there"), Some(6));
        assert_eq!(newest(Some(6), 8).expect("there"), Some(8));
        assert_eq!(newest(Some(6), 6).expect("there"), Some(6));
        let error = newest(Some(8), 6).expect_err("older").to_string();
        assert!(error.contains("beta has snapshot 8 already"), "{error}");
        let error = newest(None, 4).expect_err("no data").to_string();
        assert_eq!(error, "there is no snapshot 4 to send");
        newest(None, 7).expect_err("not there");
    }

    /// The target had 8 whole, and the sender ended before it knew: with the hold still at 2, `-s 6` took the target back.
    #[test]
    fn what_may_have_arrived_already_is_not_gone_behind() {
        let offered = |number, id| {
            only_to(standing(Some(2)), number, "beta", Some(Uuid::from_u128(id)))
                .map(|s| s.newest().map(|held| held.number))
        };
        let error = offered(6, 8).expect_err("older").to_string();
        assert!(
            error.starts_with("snapshot 8 is on its way to beta and may be there already"),
            "{error}"
        );
        assert_eq!(offered(8, 8).expect("the same"), Some(8));
        assert_eq!(offered(8, 6).expect("newer"), Some(8));
        // Gone since, so nothing can be finished with it.
        assert_eq!(offered(6, 99).expect("given up"), Some(6));
    }
}
