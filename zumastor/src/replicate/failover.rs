// SPDX-License-Identifier: GPL-2.0-only
//! A replica becomes the master, as a job: what has arrived in part is taken back first. And the question that
//! an old master asks before it becomes a replica.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use jiff::Timestamp;

use super::downstream::Receiving;
use super::files::Files;
use super::ssh;
use super::upstream::with;
use crate::jobs::{Ended, Ending, Job, Running};
use crate::layout::Layout;
use crate::replication::link::{Incoming, Line, LinkError, Timing};
use crate::replication::message::{FEATURES, Hello, Message, Wishes};
use crate::replication::send::WINDOW_BYTES;
use crate::replication::standing::{Epoch, Standing};
use crate::replication::volume::{Downstream, Watch};
use crate::volume::{DefineSource, Peer, Volumes, in_use_line};

/// How long the other machine may take to say who it is, as long as it is heard of at all.
const PATIENCE: Duration = Duration::from_secs(600);

/// The job.
pub struct Failover {
    /// The daemon's volumes.
    pub volumes: Arc<dyn Volumes>,
    /// Where things are.
    pub layout: Layout,
    /// The volume.
    pub volume: String,
}

struct Eye<'a>(&'a Running);

impl Watch for Eye<'_> {
    fn progress(&self, done: u64, total: Option<u64>, _: u64) {
        let subject = "taking back what had arrived in part";
        self.0.progress(subject, done, total.unwrap_or(0));
    }

    fn cancelled(&self) -> bool {
        self.0.ending().is_some()
    }
}

impl Job for Failover {
    fn name(&self) -> String {
        "failover".into()
    }

    fn is_alone(&self) -> bool {
        true
    }

    fn run(&mut self, running: &Arc<Running>) -> Result<String> {
        let done = self.fail_over(running);
        match running.ending() {
            // Nobody takes it up again, and it is no master.
            Some(Ending::Interrupted) if done.is_err() => bail!(
                "interrupted before volume '{0}' was master: run `zumastor failover {0}` again",
                self.volume
            ),
            Some(Ending::Cancelled) if done.is_err() => Err(Ended(Ending::Cancelled).into()),
            _ => done,
        }
    }
}

impl Failover {
    fn fail_over(&self, running: &Arc<Running>) -> Result<String> {
        let (volumes, name) = (self.volumes.clone(), self.volume.as_str());
        // Somebody may have written to it as well; that is his, and stays.
        if with(volumes.as_ref(), name, |v| v.check_fail_over())? {
            let standing = with(volumes.as_ref(), name, |v| {
                v.standing(&Peer::Source, &|_| 0)
            })?;
            let hold = standing
                .hold
                .context("no complete snapshot has arrived yet")?;
            if !standing.has_data(hold) {
                bail!("the last complete snapshot lost its data to a full store");
            }
            let (node, claim) = with(volumes.as_ref(), name, |v| v.claim_origin())?;
            let _claim = claim.with_context(|| in_use_line(&node))?;
            let files = Files::of(&self.layout, name);
            let mut end = Receiving::new(volumes.clone(), &self.layout, name, files, standing);
            end.unsettle()?;
            end.restore(hold, &Eye(running))?;
            with(volumes.as_ref(), name, |v| v.settle(hold))?;
        }
        running.check()?;
        let now = Timestamp::now().as_second();
        with(volumes.as_ref(), name, |v| {
            let number = v.become_master(now, &mut |note| running.note(note))?;
            Ok(format!(
                "volume '{name}' is master since snapshot {number}, of epoch {}; an older master that meets it stops \
                 sending",
                v.config.lineage.epoch
            ))
        })
    }
}

/// Asks the machine of `request` whether it is master of the volume's lineage since, of which epoch. Changes
/// nothing, here or there.
///
/// # Errors
/// It cannot be reached, or says no.
pub fn greet(
    volumes: &dyn Volumes,
    layout: &Layout,
    request: &DefineSource,
    node: &str,
) -> Result<Epoch> {
    let (volume, host) = (request.volume.as_str(), request.host.as_str());
    let (own, command) = with(volumes, volume, |v| {
        let target = v.config.targets.get(host);
        let command = ssh::command(layout, target.and_then(|t| t.ssh_command.as_deref()));
        Ok((v.standing(&Peer::Source, &|_| 0)?, command))
    })?;
    let there = request.name.as_deref().unwrap_or(volume);
    let (link, remote) = ssh::connect(&command, host, &["send", there, node])?;
    let mut line = Line::open(link, Timing::default(), WINDOW_BYTES)?;
    let heard = ask(&mut line, &own, PATIENCE);
    line.close();
    let complaint = remote.finish();
    let peer = heard.with_context(|| match complaint.as_str() {
        "" => format!("{host} does not answer"),
        said => format!("{host} does not answer ({said})"),
    })?;
    judge(&own, &peer, host)
}

/// Both greet as ever. A master is sent nothing: the other side refuses, and that ends it.
fn ask(line: &mut Line, own: &Standing, patience: Duration) -> Result<Standing> {
    let hello = Hello {
        nonce: *uuid::Uuid::new_v4().as_bytes(),
        features: FEATURES,
        standing: own.clone(),
        wishes: Wishes::default(),
    };
    line.say(&Message::Hello(Box::new(hello)))?;
    let mut peer = None;
    let end = Instant::now() + patience;
    loop {
        match line.hear(&|| Instant::now() > end) {
            Ok(Incoming::Said(Message::Hello(hello))) => peer = Some(hello.standing),
            Ok(Incoming::Said(Message::Alive)) => {}
            Ok(Incoming::Said(Message::Fail { sentence })) if peer.is_none() => bail!("{sentence}"),
            // Its greeting says it all; how it goes on does not matter.
            Ok(_) => break,
            Err(LinkError::Cancelled) if peer.is_none() => bail!(
                "it is there, but did not say who it is within {} s",
                patience.as_secs()
            ),
            Err(error) if peer.is_none() => return Err(error.into()),
            Err(_) => break,
        }
    }
    peer.context("it did not say who it is")
}

fn judge(own: &Standing, peer: &Standing, host: &str) -> Result<Epoch> {
    if peer.lineage != own.lineage {
        bail!("the volume on {host} is another one: neither was ever a replica of the other");
    }
    if peer.epoch <= own.epoch {
        bail!(
            "{host} did not become master since: it is of epoch {}, this volume of epoch {}; `zumastor failover` \
             there makes it one",
            peer.epoch,
            own.epoch
        );
    }
    Ok(peer.epoch)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::replication::link::Link;
    use crate::replication::standing::Role;

    /// A machine that said it was still there and nothing else held up `failback`, which nobody can cancel, for ever.
    #[test]
    fn who_never_says_who_it_is_is_not_waited_for() {
        let (here, there) = UnixStream::pair().expect("a pair");
        let clone = || here.try_clone().expect("cloned");
        let cut = clone();
        let link = Link {
            reader: Box::new(clone()),
            writer: Box::new(clone()),
            cut: Arc::new(move || {
                // It may be cut already.
                let _ = cut.shutdown(std::net::Shutdown::Both);
            }),
            greeted: false,
        };
        let mut line = Line::open(link, Timing::default(), WINDOW_BYTES).expect("open");
        let own = Standing::blank(uuid::Uuid::from_u128(1), Role::Replica);
        let error = ask(&mut line, &own, Duration::ZERO).expect_err("nobody speaks");
        assert_eq!(
            error.to_string(),
            "it is there, but did not say who it is within 0 s"
        );
        drop(there);
        line.close();
    }
}
