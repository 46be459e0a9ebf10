// SPDX-License-Identifier: GPL-2.0-only
//! A replica becomes the master, as a job: what has arrived in part is taken back first.

use std::sync::Arc;

use anyhow::{Context, Result};
use jiff::Timestamp;

use super::downstream::Receiving;
use super::files::Files;
use super::upstream::with;
use crate::jobs::{Job, Running};
use crate::layout::Layout;
use crate::replication::volume::{Downstream, Watch};
use crate::volume::{Peer, Volumes};

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
        let (volumes, name) = (self.volumes.clone(), self.volume.as_str());
        let standing = with(volumes.as_ref(), name, |v| {
            v.standing(&Peer::Source, &|_| 0)
        })?;
        let hold = standing
            .hold
            .context("no complete snapshot has arrived yet")?;
        // Somebody may have written to it as well; that is his, and stays.
        if standing.partial.is_some() || standing.origin.is_none() {
            let server = self.layout.server_socket(name);
            let files = Files::of(&self.layout, name);
            let mut end = Receiving::new(volumes.clone(), name, server, files, standing);
            end.unsettle()?;
            end.restore(hold, &Eye(running))?;
        }
        running.check()?;
        let now = Timestamp::now().as_second();
        let number = with(volumes.as_ref(), name, |v| {
            v.become_master(now, &mut |note| running.note(note))
        })?;
        Ok(format!(
            "the volume is master since snapshot {number}; an older master that meets it stops"
        ))
    }
}
