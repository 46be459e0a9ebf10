// SPDX-License-Identifier: GPL-2.0-only
//! `failover` and `failback`: what is asked and refused before anything changes, and in which order it is done.

use std::sync::Arc;

use anyhow::{Context, Result};

use super::Daemon;
use super::requests::{follow, noting};
use super::streams::node_name;
use crate::config::Asked;
use crate::control::Event;
use crate::jobs::Ending;
use crate::replicate::cycle::Way;
use crate::replicate::failover::{Failover, greet};
use crate::volume::DefineSource;

impl Daemon {
    /// Makes a replica the master, or a superseded master again.
    pub(super) fn failover(
        self: &Arc<Self>,
        volume: &str,
        dry_run: bool,
        on_event: &mut dyn FnMut(Event) -> bool,
    ) -> Result<()> {
        self.with(volume, |v| match dry_run {
            true => v.would_fail_over(&mut noting(on_event)),
            false => v.check_fail_over().map(|_| ()),
        })?;
        if dry_run {
            return Ok(());
        }
        // Only now: what is refused interrupts nothing.
        self.end_jobs(volume, Ending::Interrupted)?;
        let job = Box::new(Failover {
            volumes: self.clone(),
            layout: self.layout.clone(),
            volume: volume.to_owned(),
        });
        follow(&*self.jobs.start(volume, job)?, on_event)
    }

    /// Makes a superseded master a replica, and brings it the difference.
    pub(super) fn failback(
        self: &Arc<Self>,
        source: &DefineSource,
        dry_run: bool,
        on_event: &mut dyn FnMut(Event) -> bool,
    ) -> Result<()> {
        let (mut source, mut met) = (source.clone(), None);
        self.with(&source.volume.clone(), |v| {
            met = v.check_fail_back(&source)?;
            let known = v.config.targets.get(&source.host);
            source.name = source.name.take().or_else(|| known?.name.clone());
            Ok(())
        })?;
        let source = &source;
        let (volume, host) = (source.volume.as_str(), source.host.as_str());
        let node = node_name(&self.layout)?;
        let there = source.name.as_deref().unwrap_or(volume);
        let to = match met {
            Some(epoch) => epoch,
            None => greet(self.as_ref(), &self.layout, source, &node).with_context(|| {
                format!(
                    "volume '{volume}' stays what it is: it does not know that {host} is master, and nobody there \
                     says so; if {host} cannot be reached from here, run `zumastor replicate {there} {node}` there, \
                     then this again"
                )
            })?,
        };
        if dry_run {
            return self.with(volume, |v| {
                v.would_fail_back(source, to, &mut noting(on_event))
            });
        }
        self.without_jobs(volume, Ending::Interrupted, |v| {
            v.fail_back(source, to, &mut noting(on_event))
        })?;
        let fetched = self
            .begin(volume, Way::Pull, Some(Asked::default()), false)
            .and_then(|running| follow(&running, on_event));
        fetched.with_context(|| {
            format!(
                "volume '{volume}' is a replica now, but nothing has arrived: run `zumastor replicate {volume}`, or \
                 `zumastor replicate {there} {node}` on {host}"
            )
        })
    }
}
