// SPDX-License-Identifier: GPL-2.0-only
//! `receive start` and `receive done`, for scripts that send with `ddsnap transmit`.

use std::collections::BTreeMap;
use std::fs;
use std::net::TcpListener;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::requests::noting;
use super::{Daemon, JOB_PATIENCE};
use crate::config;
use crate::control::Event;
use crate::jobs::Ending;
use crate::note::Note;
use crate::refusal::{self, WRONG_STATE};
use crate::replicate::by_hand::{Listener, NAME};
use crate::replicate::files::{BY_HAND, Files};
use crate::volume::in_use_line;

/// The port if neither `define source` nor /etc/zumastor/defaultport has one: that of `ddsnap transmit`.
const DEFAULT_PORT: u16 = 4321;
/// Where to listen if /etc/zumastor/listen_address does not say.
const LOOPBACK: &str = "127.0.0.1";

impl Daemon {
    /// The port that a replica listens on if no other one does.
    fn first_port(&self) -> Result<u16> {
        self.setting("defaultport")
            .map_or(Ok(DEFAULT_PORT), |text| {
                let bad = || format!("/etc/zumastor/defaultport has '{text}', which is no port");
                text.parse().with_context(bad)
            })
    }

    /// The port that `define source` gives a volume: the one that is asked for, what it has, or the first one that
    /// no other replica here has.
    pub(super) fn port_for(&self, volume: &str, asked: Option<u16>) -> Result<u16> {
        let mut taken = BTreeMap::new();
        let mut own = None;
        for name in config::list(&self.layout)? {
            // A document that cannot be read is another volume's trouble.
            let config = config::load(&self.layout, &name).ok().flatten();
            let source = config.and_then(|config| config.source);
            let port = source.and_then(|source| source.port);
            match port {
                Some(port) if name != volume => drop(taken.insert(port, name)),
                Some(port) => own = Some(port),
                None => {}
            }
        }
        match (asked, own) {
            (Some(port), _) => match taken.get(&port) {
                Some(other) => bail!("volume '{other}' has port {port} already: choose another"),
                None => Ok(port),
            },
            (None, Some(port)) => Ok(port),
            (None, None) => (self.first_port()?..=u16::MAX)
                .find(|port| !taken.contains_key(port))
                .context("no port is left for it: name one as HOST:PORT"),
        }
    }

    /// Listens for `ddsnap transmit`, and says where and what is wanted: `PORT HOLD [SEND ADDR]`.
    pub(super) fn receive_start(
        self: &Arc<Self>,
        volume: &str,
        on_event: &mut dyn FnMut(Event) -> bool,
    ) -> Result<()> {
        let files = Files::of(&self.layout, volume);
        // One that was left over, as of a script that was killed.
        self.end_listener(volume)?;
        let (mut port, mut wanted) = (None, None);
        self.with(volume, |v| {
            wanted = Some(v.wanted_by_hand(files.told()?)?);
            port = v.source()?.port;
            Ok(())
        })?;
        let wanted = wanted.context("nothing was found out")?;
        let port = port.map_or_else(|| self.first_port(), Ok)?;
        let address = self.setting("listen_address");
        let address = address.unwrap_or_else(|| LOOPBACK.to_owned());
        let listener = TcpListener::bind((address.as_str(), port))
            .with_context(|| format!("cannot listen on {address} port {port}"))?;
        let job = Box::new(Listener {
            volumes: self.clone(),
            layout: self.layout.clone(),
            files,
            volume: volume.to_owned(),
            listener,
        });
        let started = self.jobs.start(volume, job);
        started.map_err(|error| refusal::with(&error, WRONG_STATE))?;
        on_event(Event::Note(Note::Line(format!("{port} {wanted}"))));
        Ok(())
    }

    /// Makes what has arrived the replica's newest snapshot.
    pub(super) fn receive_done(
        self: &Arc<Self>,
        volume: &str,
        on_event: &mut dyn FnMut(Event) -> bool,
    ) -> Result<()> {
        let files = Files::of(&self.layout, volume);
        // What has not arrived may still.
        self.with(volume, |v| {
            v.check_arrived_by_hand(files.told()?).map(|_| ())
        })?;
        self.end_listener(volume)?;
        self.with(volume, |v| {
            // The listener kept everybody from it until now.
            let (node, claim) = v.claim_origin()?;
            let _claim = claim.with_context(|| in_use_line(&node))?;
            let id = v.finish_by_hand(files.told()?)?;
            files.drop(BY_HAND)?;
            let out = &mut noting(on_event);
            out(Note::Line(format!(
                "snapshot {id} has arrived on volume '{volume}'"
            )));
            Ok(())
        })
    }

    /// What a file in /etc/zumastor says, if it is there.
    fn setting(&self, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.layout.at("/etc/zumastor").join(name)).ok()?;
        Some(text.trim().to_owned()).filter(|text| !text.is_empty())
    }

    fn end_listener(&self, volume: &str) -> Result<()> {
        self.handle(volume)?;
        let why = Ending::Cancelled;
        self.jobs
            .end_and_wait(volume, Some(NAME), why, JOB_PATIENCE)
    }
}
