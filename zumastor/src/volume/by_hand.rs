// SPDX-License-Identifier: GPL-2.0-only
//! A replica that scripts bring up to date: `receive start`, then `ddsnap transmit` on the other machine, then
//! `receive done`.
//!
//! Nothing of it tells which snapshot it is but the number that the other machine gave it, so the snapshot has that
//! number here too, and an identity that nobody else knows: a cycle of `zumastor replicate` starts from an older one.

use std::fmt;

use anyhow::Result;
use ddsnap::delta::listen::Told;
use ddsnap::delta::stream::Opening;
use uuid::Uuid;

use super::arrival::Arrived;
use super::{Level, Volume};
use crate::config::{ByHand, Snapref};
use crate::machine::SnapshotState;
use crate::refusal::{INCOMPLETE, Refusal, WRONG_STATE};

/// Where `ddsnap transmit` is to send, and from what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HandWanted {
    /// The snapshot that this side has, by the other side's number; none: all is to be sent.
    pub hold: Option<u32>,
    /// What has arrived in part, and up to which byte.
    pub partial: Option<(u32, u64)>,
}

impl fmt::Display for HandWanted {
    /// As scripts read it: `HOLD [SEND ADDR]`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.hold {
            Some(hold) => write!(f, "{hold}")?,
            None => f.write_str("-1")?,
        }
        match self.partial {
            Some((send, at)) => write!(f, " {send} {at}"),
            None => Ok(()),
        }
    }
}

fn refused(code: u8, text: String) -> anyhow::Error {
    Refusal { code, text }.into()
}

impl Volume {
    fn check_by_hand(&self) -> Result<()> {
        let name = &self.name;
        let why = match &self.config.source {
            None => format!(
                "volume '{name}' is no replica: run `zumastor define source {name} HOST:PORT`"
            ),
            Some(source) if source.stopped => {
                format!("the source is stopped: run `zumastor start source {name}`")
            }
            Some(_) if self.level < Level::Devices => {
                format!("volume '{name}' is stopped: run `zumastor start volume {name}`")
            }
            Some(_) => match self.origin_mounts()?.first() {
                None => return Ok(()),
                Some(dir) => format!("the replica is mounted on {}: unmount it", dir.display()),
            },
        };
        Err(refused(WRONG_STATE, why))
    }

    /// The hold, if it is still there and has the other side's number.
    fn hold_by_hand(&mut self) -> Result<Option<Snapref>> {
        let stored = self.settle_snapshots()?;
        let source = self.source()?;
        let live = |held: &Snapref| {
            let found = stored.iter().find(|s| s.tag.0 == held.id);
            found.is_some_and(|s| s.state == SnapshotState::Live)
        };
        Ok(source.hold.filter(|h| source.hold_by_hand && live(h)))
    }

    /// What `receive start` answers; `told` is what has arrived so far. What had arrived whole is made a snapshot first.
    ///
    /// # Errors
    /// The volume is no replica that runs, or its origin is in use.
    pub fn wanted_by_hand(&mut self, told: Option<Told>) -> Result<HandWanted> {
        self.check_by_hand()?;
        let mut told = told.filter(|told| {
            let by_hand = self.config.source.as_ref().and_then(|s| s.by_hand);
            by_hand.is_some_and(|by_hand| by_hand.tag == told.tag)
        });
        if told.is_some_and(|told| told.whole) {
            self.finish_by_hand(told)?;
            told = None;
        }
        let hold = self.hold_by_hand()?;
        let source = self.source()?;
        let wanted = match source.by_hand {
            None => HandWanted {
                hold: hold.filter(|h| source.origin == Some(h.uuid)).map(|h| h.id),
                partial: None,
            },
            Some(by_hand) => {
                let based = by_hand
                    .base
                    .is_none_or(|base| hold.is_some_and(|h| h.id == base));
                let told = told.filter(|_| based);
                HandWanted {
                    hold: by_hand.base.filter(|_| told.is_some()),
                    partial: told.map(|told| (told.tag, told.at)),
                }
            }
        };
        Ok(wanted)
    }

    /// Records, before anything is written, that the origin is no snapshot's any more. `begin` notes that
    /// nothing of it has arrived, in place of what did before, which this does not go on with.
    ///
    /// # Errors
    /// It does not fit what the origin holds, or the document cannot be written.
    pub fn admit_by_hand(
        &mut self,
        opening: &Opening,
        told: Option<Told>,
        begin: &dyn Fn() -> Result<()>,
    ) -> Result<()> {
        let wanted = self.wanted_by_hand(told)?;
        let header = &opening.header;
        let coming = ByHand {
            base: header.from.map(|side| side.tag.0),
            tag: header.to.tag.0,
        };
        let whole = header.from.is_some() || opening.preface.total >= header.to_chunks();
        let goes_on = wanted.partial.is_some()
            && wanted.hold == coming.base
            && wanted.partial.is_some_and(|(tag, _)| tag == coming.tag);
        let fits = match (coming.base, opening.preface.resumed) {
            (_, true) => goes_on,
            (None, false) => whole,
            // What arrived of this one already is written over.
            (Some(_), false) => wanted.hold == coming.base && (goes_on || wanted.partial.is_none()),
        };
        if !fits {
            let name = &self.name;
            let text = format!(
                "the origin of volume '{name}' is not what snapshot {} is sent from: `zumastor receive start {name}` says \
                 `{wanted}`",
                coming.tag
            );
            return Err(refused(WRONG_STATE, text));
        }
        if !goes_on {
            begin()?;
        }
        self.change(|config| {
            if let Some(source) = &mut config.source {
                source.origin = None;
                source.incoming = None;
                source.by_hand = Some(coming);
            }
            Ok(())
        })
    }

    /// Fails unless all has arrived.
    ///
    /// # Errors
    /// It has not, or nothing was begun.
    pub fn check_arrived_by_hand(&self, told: Option<Told>) -> Result<Told> {
        self.check_by_hand()?;
        let name = &self.name;
        let by_hand = self.source()?.by_hand;
        let Some(by_hand) = by_hand else {
            let text = format!("nothing is being received: run `zumastor receive start {name}`");
            return Err(refused(WRONG_STATE, text));
        };
        let told = told.filter(|told| told.tag == by_hand.tag);
        match told {
            Some(told) if told.whole => Ok(told),
            _ => {
                let at = told.map_or(0, |told| told.at);
                let text = format!(
                    "snapshot {} has arrived up to byte {at} only: send the rest, as `zumastor receive start {name}` \
                     says",
                    by_hand.tag
                );
                Err(refused(INCOMPLETE, text))
            }
        }
    }

    /// Makes what has arrived a snapshot of the number that the other side gave it, with a twin to mount, and the hold.
    /// Gives the number.
    ///
    /// # Errors
    /// Not all has arrived, or the number is taken here.
    pub fn finish_by_hand(&mut self, told: Option<Told>) -> Result<u32> {
        let tag = self.check_arrived_by_hand(told)?.tag;
        let stored = self.settle_snapshots()?;
        let taken = |id: u32| stored.iter().any(|s| s.tag.0 == id);
        let newest = self.snapshots().iter().map(|s| s.id).max();
        // One that was begun with this number before is gone again.
        let mine = self.config.snapshots.next <= tag.saturating_add(2);
        let free = !taken(tag) && !taken(tag.saturating_add(1));
        if tag % 2 != 0 || !mine || !free || newest.is_some_and(|newest| newest >= tag) {
            let text = format!(
                "snapshot {tag} cannot be had under its number on volume '{}', where numbers have come to {}: use \
                 `zumastor replicate`, which needs no equal numbers",
                self.name, self.config.snapshots.next
            );
            return Err(refused(WRONG_STATE, text));
        }
        let next = std::mem::replace(&mut self.config.snapshots.next, tag);
        let arrived = Arrived {
            uuid: Uuid::new_v4(),
            taken: self.host.now().timestamp().as_second(),
            base: None,
        };
        let id = self.finish(&arrived, None).inspect_err(|_| {
            // No number is given twice.
            let now = &mut self.config.snapshots.next;
            *now = next.max(*now);
        })?;
        self.release_old_hold()?;
        Ok(id)
    }
}
