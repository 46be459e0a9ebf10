// SPDX-License-Identifier: GPL-2.0-only
//! What the verbs of replication would do: their `--dry-run`. The other machine is not asked; what it holds may
//! make it refuse.

use anyhow::{Result, bail};

use super::{DefineSource, Out, Peer, Volume, check_host};
use crate::config::{Asked, Snapref};
use crate::note::Note;
use crate::plan::{self, Level};

impl Volume {
    /// Says what [`define_source`](Self::define_source) would do.
    ///
    /// # Errors
    /// It would be refused.
    pub fn would_define_source(&self, request: &DefineSource, out: Out) -> Result<()> {
        check_host(&request.host)?;
        let (name, host) = (&self.name, &request.host);
        let keep = self.has_content_of_its_own();
        if keep {
            self.check_up()?;
        }
        if self.config.master.is_some() && self.level == Level::Mounted {
            self.would_go_down(Level::Devices, out)?;
        }
        let mut say = |text: String| out(Note::Line(text));
        if keep {
            say(format!(
                "would keep what volume '{name}' holds now as a snapshot"
            ));
        }
        if let Some(source) = self.config.source.as_ref().filter(|s| s.host != *host) {
            say(format!(
                "would no longer be a replica of what {} has",
                source.host
            ));
        }
        say(format!(
            "would make volume '{name}' a replica of what {host} has: each cycle overwrites {} with that",
            self.config.device.origin.display()
        ));
        Ok(())
    }

    /// Says what [`forget_source`](Self::forget_source) would do.
    ///
    /// # Errors
    /// As of [`check_forget_source`](Self::check_forget_source).
    pub fn would_forget_source(&self, out: Out) -> Result<()> {
        self.check_forget_source()?;
        let host = &self.source()?.host;
        self.would_go_down(Level::Devices.min(self.level), out)?;
        out(Note::Line(format!(
            "would end the role of volume '{}' as a replica of what {host} has; its content and snapshots stay",
            self.name
        )));
        Ok(())
    }

    /// Says what [`forget_target`](Self::forget_target) would do.
    ///
    /// # Errors
    /// There is none of that name.
    pub fn would_forget_target(&self, host: &str, out: Out) -> Result<()> {
        let target = self.target(host)?;
        out(Note::Line(format!(
            "would forget that volume '{}' is sent to {host}; what is there stays there",
            self.name
        )));
        let mut released: Vec<Snapref> = [target.hold, target.sending]
            .into_iter()
            .flatten()
            .collect();
        released.dedup();
        for held in released {
            if self.is_let_go(held.id, Some(host)) {
                out(Note::Line(format!(
                    "would delete snapshot {}, which is kept for {host} alone",
                    held.id
                )));
            }
        }
        Ok(())
    }

    /// Says what a cycle would begin with.
    ///
    /// # Errors
    /// There is no such replication or snapshot, or the volume is stopped.
    pub fn would_replicate(&self, peer: &Peer, asked: Asked, out: Out) -> Result<()> {
        self.check_up()?;
        let name = &self.name;
        let mut say = |text: String| out(Note::Line(text));
        let (host, hold) = match peer {
            Peer::Target(host) => {
                let target = self.target(host)?;
                match (asked.snapshot, target.sending) {
                    (Some(id), _) if self.config.snapshots.find(id).is_none() => {
                        bail!("there is no snapshot {id} to send")
                    }
                    (Some(id), _) => say(format!("would send {host} snapshot {id}")),
                    (None, Some(sending)) => say(format!(
                        "would send {host} snapshot {}, which it was offered before, unless nothing of it has arrived \
                         and a new one is taken",
                        sending.id
                    )),
                    (None, None) if self.config.master.is_some() => {
                        say(format!(
                            "would take a snapshot of volume '{name}' and send it to {host}"
                        ));
                    }
                    (None, None) => say(format!("would send {host} the newest snapshot")),
                }
                (host, target.hold)
            }
            Peer::Source => {
                let source = self.source()?;
                say(format!("would fetch what {} has", source.host));
                (&source.host, source.hold)
            }
        };
        match hold {
            Some(hold) => say(format!(
                "what changed since snapshot {} is copied, if both still know it",
                hold.id
            )),
            None => say("all of it is copied, if the two have no snapshot in common".into()),
        }
        let replica = match peer {
            Peer::Target(host) => format!("what {host} holds"),
            Peer::Source => format!("what volume '{name}' holds"),
        };
        if asked.full {
            say(format!(
                "if they have none, {replica} is overwritten, whatever it is"
            ));
        }
        if asked.force_base {
            say(format!(
                "if {replica} was written to, that is kept in a snapshot there and taken back"
            ));
        }
        say(format!("{host} was not asked: it may refuse"));
        Ok(())
    }

    fn would_go_down(&self, level: Level, out: Out) -> Result<()> {
        let steps = plan::down(&self.wanted(level), &self.observe()?);
        self.check_unheld(&steps)?;
        self.tell_steps(&steps, out);
        Ok(())
    }
}
