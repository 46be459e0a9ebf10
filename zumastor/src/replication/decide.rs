// SPDX-License-Identifier: GPL-2.0-only
//! What a cycle sends, and what is refused: pure functions of both greetings.
//!
//! Both sides compute the same from the same: the sender to offer it, the receiver to see whether what is
//! offered may be done to his volume. Nothing is written before both have said yes.

use std::fmt::Write as _;

use ddsnap::units::Sectors;
use thiserror::Error;
use uuid::Uuid;

use super::message::{Begin, COMPARES, Hello, WHOLE};
use super::standing::{Epoch, Held, Role, Standing};

/// The number of [`Refusal::Superseded`].
pub const SUPERSEDED: u16 = 2;
/// The number of [`Refusal::TargetIsMaster`].
pub const TARGET_IS_MASTER: u16 = 3;

/// What a cycle is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Plan {
    /// The receiver has the newest snapshot.
    Current(Uuid),
    /// A copy: resumed, an increment, or a full one.
    Copy(Begin),
}

/// Why there is no cycle. Nothing was written on either side.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Error)]
pub enum Refusal {
    /// The sender has no snapshot.
    #[error("the sending side has no snapshot yet; take one with `zumastor snapshot`")]
    NothingToSend,
    /// Somebody else became master meanwhile.
    #[error(
        "the sending side was superseded: it is of epoch {old}, but epoch {new} began at {since}; make it a replica with `zumastor failback`",
        since = when(new.since)
    )]
    Superseded {
        /// The sender's.
        old: Epoch,
        /// The receiver's.
        new: Epoch,
    },
    /// The receiver's volume is written to by users.
    #[error(
        "the receiving side is a master of its own (epoch {epoch}); `zumastor failback` or `zumastor define source` there makes it a replica"
    )]
    TargetIsMaster {
        /// Its epoch.
        epoch: Epoch,
    },
    /// The receiver replicates another volume.
    #[error(
        "the receiving side holds another volume's lineage ({theirs}, not {ours}); `zumastor replicate --full` overwrites it"
    )]
    Foreign {
        /// The sender's.
        ours: Uuid,
        /// The receiver's.
        theirs: Uuid,
    },
    /// No snapshot in common, and there is something on the other side.
    #[error(
        "the two sides have no snapshot in common, and the receiving side is not empty; `zumastor replicate --full` copies everything over what is there{lists}"
    )]
    NeedsFull {
        /// What either side holds.
        lists: String,
    },
    /// The base is not, or no longer, on the receiving side.
    #[error("the receiving side does not hold the base {base}{lists}")]
    WrongBase {
        /// The base.
        base: Uuid,
        /// What either side holds.
        lists: String,
    },
    /// Somebody wrote to the replica.
    #[error(
        "the receiving side's volume was mounted for writing or written to since its last snapshot; `zumastor replicate --force-base` keeps that in a safety snapshot and goes back to the common one{lists}"
    )]
    Written {
        /// What either side holds.
        lists: String,
    },
    /// The snapshot is longer than the other side's origin.
    #[error(
        "the snapshot has {need} sectors, but the receiving side's origin {have}; enlarge it with `zumastor resize`"
    )]
    TooSmall {
        /// Length of the snapshot in sectors.
        need: u64,
        /// Length of the origin in sectors.
        have: u64,
    },
    /// Both have no snapshot's data in common.
    #[error("the two sides have no snapshot in common that could be compared{lists}")]
    NothingToCompare {
        /// What either side holds.
        lists: String,
    },
    /// An older program.
    #[error("the other side cannot compare snapshots: its zumastor is too old; upgrade it")]
    CannotCompare,
    /// What is offered belongs to another stream, or to another position.
    #[error("what the sending side offers does not belong to this stream: {what}")]
    NotThisStream {
        /// What is wrong.
        what: &'static str,
    },
}

impl Refusal {
    /// Its number on the wire.
    #[must_use]
    pub fn code(&self) -> u16 {
        match self {
            Refusal::NothingToSend => 1,
            Refusal::Superseded { .. } => SUPERSEDED,
            Refusal::TargetIsMaster { .. } => TARGET_IS_MASTER,
            Refusal::Foreign { .. } => 4,
            Refusal::NeedsFull { .. } => 5,
            Refusal::WrongBase { .. } => 6,
            Refusal::Written { .. } => 7,
            Refusal::TooSmall { .. } => 8,
            Refusal::NotThisStream { .. } => 9,
            Refusal::NothingToCompare { .. } => 10,
            Refusal::CannotCompare => 11,
        }
    }
}

/// A time for people, in UTC.
fn when(seconds: u64) -> String {
    let time = i64::try_from(seconds)
        .ok()
        .and_then(|s| jiff::Timestamp::from_second(s).ok());
    time.map_or_else(|| "an unknown time".into(), |time| time.to_string())
}

/// What both sides hold, the newest first, as lines behind a colon.
fn lists(up: &Standing, down: &Standing) -> String {
    const SHOWN: usize = 20;
    let mut text = String::from(":");
    for (name, side) in [("sending side", up), ("receiving side", down)] {
        let _ = write!(text, "\n{name} holds {}", side.held.len());
        for held in side.held.iter().rev().take(SHOWN) {
            let kind = if held.data { "snapshot" } else { "bookmark" };
            let _ = write!(
                text,
                "\n  {kind} {} of {} ({})",
                held.number,
                when(held.taken),
                held.id
            );
        }
    }
    text
}

/// Whether a stream from `up` to `down` may be at all.
///
/// # Errors
/// Superseded, foreign, written to, and so on.
pub fn admit(up: &Hello, down: &Hello) -> Result<(), Refusal> {
    let wishes = up.wishes.merge(down.wishes);
    let (up, down) = (&up.standing, &down.standing);
    let foreign = match (up.lineage, down.lineage) {
        (Some(ours), Some(theirs)) if ours != theirs => Some((ours, theirs)),
        _ => None,
    };
    // Epochs of two lineages have nothing to do with each other.
    if foreign.is_none() && down.epoch > up.epoch && down.lineage.is_some() {
        let (old, new) = (up.epoch, down.epoch);
        return Err(Refusal::Superseded { old, new });
    }
    if down.role == Role::Master {
        return Err(Refusal::TargetIsMaster { epoch: down.epoch });
    }
    if let Some((ours, theirs)) = foreign.filter(|_| !wishes.full) {
        return Err(Refusal::Foreign { ours, theirs });
    }
    if down.written && !wishes.force_base && !wishes.full {
        let lists = lists(up, down);
        return Err(Refusal::Written { lists });
    }
    Ok(())
}

/// What a cycle from `up` to `down` is: resume; else an increment from the newest common snapshot or
/// bookmark to the newest snapshot; else a full copy, over an empty target or when it was asked for.
///
/// # Errors
/// As [`admit`], and where nothing fits.
pub fn decide(up: &Hello, down: &Hello) -> Result<Plan, Refusal> {
    admit(up, down)?;
    let wishes = up.wishes.merge(down.wishes);
    let nonce = down.nonce;
    // What is sent again has no difference to the base.
    let whole = up.features & WHOLE != 0;
    let (up, down) = (&up.standing, &down.standing);
    let newest = *up.newest().ok_or(Refusal::NothingToSend)?;
    let foreign = down.lineage.is_some() && up.lineage != down.lineage;
    let begin = |snapshot: Held, base: Option<&Held>, position, plain| {
        fits(&snapshot, down)?;
        Ok(Plan::Copy(Begin {
            nonce,
            snapshot,
            base: base.map(|base| base.id),
            base_length: base.map_or(Sectors(0), |base| base.length),
            position,
            plain: plain || base.is_some_and(|base| whole || !base.data),
        }))
    };
    if foreign {
        // It was asked for, or `admit` had refused.
        return begin(newest, None, 0, false);
    }
    if !down.written && down.origin == Some(newest.id) && down.partial.is_none() {
        return Ok(Plan::Current(newest.id));
    }
    // What was written to is first taken back, so nothing of it can be resumed.
    if let Some(partial) = down.partial.filter(|_| !down.written) {
        let snapshot = up.find(partial.snapshot).filter(|held| held.data);
        let base = partial.base.map(|base| common(base, up, down));
        match (snapshot, base) {
            (Some(snapshot), None) => {
                return begin(*snapshot, None, partial.position, partial.plain);
            }
            (Some(snapshot), Some(Some(base))) => {
                return begin(*snapshot, Some(base), partial.position, partial.plain);
            }
            // It cannot be finished: from the base anew, if there still is one.
            _ => {}
        }
    }
    let newest_common = up
        .held
        .iter()
        .rev()
        .find_map(|held| common(held.id, up, down));
    if let Some(base) = newest_common {
        let plain = down.partial.is_some_and(|partial| partial.plain);
        return begin(newest, Some(base), 0, plain);
    }
    let copying = down.partial.is_some_and(|partial| partial.base.is_none());
    if down.is_blank() || wishes.full || copying {
        return begin(newest, None, 0, false);
    }
    let lists = lists(up, down);
    Err(Refusal::NeedsFull { lists })
}

/// What a stream that compares compares: the newest snapshot whose data both sides have.
///
/// # Errors
/// There is none, or the other side cannot.
pub fn comparable(up: &Hello, down: &Hello) -> Result<Held, Refusal> {
    if up.features & down.features & COMPARES == 0 {
        return Err(Refusal::CannotCompare);
    }
    let (up, down) = (&up.standing, &down.standing);
    let both = up.held.iter().rev().find(|held| {
        let theirs = down.find(held.id);
        held.data && theirs.is_some_and(|theirs| theirs.data && theirs.length >= held.length)
    });
    both.copied().ok_or_else(|| Refusal::NothingToCompare {
        lists: lists(up, down),
    })
}

/// The snapshot or bookmark `id` of the sender, if the receiver has its data.
fn common<'a>(id: Uuid, up: &'a Standing, down: &Standing) -> Option<&'a Held> {
    up.find(id).filter(|_| down.has_data(id))
}

fn fits(snapshot: &Held, down: &Standing) -> Result<(), Refusal> {
    let (need, have) = (snapshot.length.0, down.length.0);
    if need > have {
        return Err(Refusal::TooSmall { need, have });
    }
    Ok(())
}

/// Whether the receiver may do what is offered, before he writes anything.
///
/// # Errors
/// As [`admit`]; or the offer does not fit what he holds.
pub fn check(begin: &Begin, up: &Hello, down: &Hello) -> Result<(), Refusal> {
    admit(up, down)?;
    if begin.nonce != down.nonce {
        let what = "it answers another greeting";
        return Err(Refusal::NotThisStream { what });
    }
    let wishes = up.wishes.merge(down.wishes);
    let (up, down) = (&up.standing, &down.standing);
    fits(&begin.snapshot, down)?;
    match begin.base {
        Some(base) if !down.has_data(base) => {
            let lists = lists(up, down);
            return Err(Refusal::WrongBase { base, lists });
        }
        Some(_) => {}
        None => {
            let copying = down.partial.is_some_and(|partial| partial.base.is_none());
            if !(down.is_blank() || wishes.full || copying) {
                let lists = lists(up, down);
                return Err(Refusal::NeedsFull { lists });
            }
        }
    }
    if begin.position > 0 && !resumes(begin, down) {
        let what = "it goes on from where this side is not";
        return Err(Refusal::NotThisStream { what });
    }
    if down.partial.is_some_and(|partial| partial.plain) && begin.base.is_some() && !begin.plain {
        let what = "it sends differences to a base that is doubted";
        return Err(Refusal::NotThisStream { what });
    }
    Ok(())
}

/// Whether an offer goes on with the copy under way.
#[must_use]
pub fn resumes(begin: &Begin, down: &Standing) -> bool {
    !down.written
        && down.partial.is_some_and(|partial| {
            partial.snapshot == begin.snapshot.id
                && partial.base == begin.base
                && partial.position == begin.position
        })
}

/// Whether the receiver's origin must first be given the base's content back: it has parts of another
/// copy, of another snapshot, or of what somebody wrote.
#[must_use]
pub fn must_restore(begin: &Begin, down: &Standing) -> bool {
    let Some(base) = begin.base else { return false };
    let other = down.partial.is_some() || down.written || down.origin != Some(base);
    !resumes(begin, down) && other
}

#[cfg(test)]
mod tests;
