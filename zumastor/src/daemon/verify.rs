// SPDX-License-Identifier: GPL-2.0-only
//! `verify`: a comparison, and with `--repair` a cycle that sends what differs, and a comparison again.

use std::sync::Arc;

use anyhow::{Result, bail};

use super::Daemon;
use crate::config::Asked;
use crate::control::Event;
use crate::jobs::{Jobs, Running};
use crate::note::Note;
use crate::refusal::{self, DIFFERS};
use crate::replicate::cycle::Way;
use crate::replicate::verify::Found;

impl Daemon {
    /// Compares a volume with a target or its source; `repair`: sends again what differs.
    pub(super) fn verify(
        self: &Arc<Self>,
        volume: &str,
        target: Option<&str>,
        repair: bool,
        on_event: &mut dyn FnMut(Event) -> bool,
    ) -> Result<()> {
        let target = self.verified(volume, target)?;
        let way = || target.clone().map_or(Way::Pull, Way::Push);
        let compare = |repair, on_event: &mut dyn FnMut(Event) -> bool| {
            let found = Arc::new(Found::default());
            let running = self.begin_verify(volume, way(), repair, &found)?;
            let ended = to_the_end(&running, on_event);
            let differs = |error: anyhow::Error| match found.differs() {
                Some(true) => refusal::with(&error, DIFFERS),
                _ => error,
            };
            let mended = ended.is_err() && repair && found.differs() == Some(true);
            Ok::<_, anyhow::Error>((ended.map_err(differs), mended))
        };
        let (ended, mend) = compare(repair, on_event)?;
        if !mend {
            return ended;
        }
        if let Err(error) = ended {
            on_event(Event::Note(Note::Line(format!("{error:#}"))));
        }
        // A snapshot of the replica that was written to looks as if the replica had been.
        let asked = Asked {
            force_base: true,
            ..Asked::default()
        };
        let cycle = self.begin_after(volume, way(), asked, on_event)?;
        to_the_end(&cycle, on_event)?;
        compare(false, on_event)?.0
    }

    /// Whether everything is compared after a cycle to this target.
    pub(super) fn is_tested(&self, volume: &str, host: &str) -> bool {
        let config = self.handle(volume).ok().and_then(|h| h.view().config);
        config.is_some_and(|c| c.targets.get(host).is_some_and(|t| t.test_fullvolume))
    }

    /// The target that is meant; none: the source.
    fn verified(&self, volume: &str, target: Option<&str>) -> Result<Option<String>> {
        let mut meant = None;
        self.with(volume, |v| {
            meant = match target {
                Some(host) => v.target(host).map(|_| Some(host.to_owned()))?,
                None if v.config.source.is_some() => None,
                None => {
                    let mut targets = v.config.targets.keys();
                    match (targets.next(), targets.next()) {
                        (Some(only), None) => Some(only.clone()),
                        (None, _) => bail!("volume '{volume}' has no target and no source"),
                        _ => bail!("volume '{volume}' has several targets: say which one"),
                    }
                }
            };
            Ok(())
        })?;
        Ok(meant)
    }
}

/// Waits for a job, whether anybody listens or not.
fn to_the_end(running: &Running, on_event: &mut dyn FnMut(Event) -> bool) -> Result<()> {
    let done = Jobs::wait(running, &mut |note| {
        on_event(Event::Note(note));
        true
    })?;
    on_event(Event::Note(Note::Line(done)));
    Ok(())
}
