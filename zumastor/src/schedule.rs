// SPDX-License-Identifier: GPL-2.0-only
//! When rotations take snapshots, and which they give up. Pure: the time is given, nothing is read.
//!
//! Each rotation has *slots*: moments at which a snapshot is due. Slots of hours, days, weeks and months are
//! by local time, those of the administrator's own periods are counted from 1970-01-01 UTC. A rotation knows
//! up to which slot it is *served*. It is due when the latest slot is later than that, however many were
//! missed: so after a pause it catches up once. From this follows, without a case of its own:
//!
//! - Clocks go forward: a slot in the hour that is left out is due at its end.
//! - Clocks go back: the hour that comes twice has two hourly slots, since an hour of changes lies between them.
//!   Days, weeks and months begin once.
//! - The clock is set forward: as after a pause.
//! - The clock is set back by less than a period: the same slot is not due twice. By more: what was served lies
//!   in the future, beyond the next slot, and is of no use; the rotation goes on from the present one.

use jiff::civil::{Date, DateTime, Weekday};
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{Span, Timestamp, Zoned};

use crate::config::{Period, Rotation, Snapshot};

/// What a rotation is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Wait,
    /// Take a snapshot; this slot is served then. In seconds since 1970-01-01 UTC.
    Due(i64),
    /// Nothing, but what it believed to be served is wrong: this is.
    Rebase(i64),
}

/// What `rotation` is to do at `now`.
#[must_use]
pub fn verdict(rotation: &Rotation, now: &Zoned) -> Verdict {
    let period = rotation.period();
    let Some(latest) = latest_slot(period, now) else {
        return Verdict::Wait;
    };
    match rotation.served {
        // One that was never served waits for the next slot.
        None => Verdict::Rebase(latest),
        Some(served) if served < latest => Verdict::Due(latest),
        Some(served) if next_slot(period, now).is_some_and(|next| served > next) => {
            Verdict::Rebase(latest)
        }
        Some(_) => Verdict::Wait,
    }
}

/// The latest slot that is not after `now`, in seconds since 1970-01-01 UTC; none of a rotation without a
/// period.
#[must_use]
pub fn latest_slot(period: Period, now: &Zoned) -> Option<i64> {
    let at = now.timestamp();
    slots_near(period, now)
        .into_iter()
        .filter(|s| *s <= at.as_second())
        .max()
}

/// The first slot after `now`, likewise.
#[must_use]
pub fn next_slot(period: Period, now: &Zoned) -> Option<i64> {
    let at = now.timestamp();
    slots_near(period, now)
        .into_iter()
        .filter(|s| *s > at.as_second())
        .min()
}

/// Slots around `now`, with the latest before and the first after it among them.
fn slots_near(period: Period, now: &Zoned) -> Vec<i64> {
    let zone = now.time_zone();
    let today = now.date();
    let day = |date: Date| {
        // Where midnight is left out, the first moment of the day.
        let begin = date.to_zoned(zone.clone());
        begin.map_or_else(|_| Vec::new(), |z| vec![z.timestamp().as_second()])
    };
    match period {
        Period::Never => Vec::new(),
        Period::Every(seconds) => {
            let seconds = i64::try_from(seconds).unwrap_or(i64::MAX).max(1);
            let latest = now.timestamp().as_second().div_euclid(seconds) * seconds;
            vec![latest, latest.saturating_add(seconds)]
        }
        Period::Hourly => {
            let this = today.at(now.hour(), 0, 0, 0);
            let hours = (-2..=2).filter_map(|n| this.checked_add(Span::new().hours(n)).ok());
            hours.flat_map(|hour| moments(hour, zone)).collect()
        }
        Period::Daily => around(today, Span::new().days(1)).flat_map(day).collect(),
        Period::Weekly => {
            let since = i64::from(today.weekday().since(Weekday::Sunday));
            let sunday = today.checked_sub(Span::new().days(since));
            let sundays = sunday
                .into_iter()
                .flat_map(|s| around(s, Span::new().days(7)));
            sundays.flat_map(day).collect()
        }
        Period::Monthly => around(today.first_of_month(), Span::new().months(1))
            .flat_map(day)
            .collect(),
    }
}

/// A date with those before and after it.
fn around(date: Date, step: Span) -> impl Iterator<Item = Date> {
    let before = date.checked_sub(step).ok();
    let after = date.checked_add(step).ok();
    [before, Some(date), after].into_iter().flatten()
}

/// The moments that a local time means: two where the clocks go back, the end of the gap where they go forward.
fn moments(local: DateTime, zone: &TimeZone) -> Vec<i64> {
    let ambiguous = zone.to_ambiguous_timestamp(local);
    let is_gap = matches!(ambiguous.offset(), AmbiguousOffset::Gap { .. });
    // In a gap the later reading has the clock before the change, and so is past it.
    let first = if is_gap {
        ambiguous.later()
    } else {
        ambiguous.earlier()
    };
    let both = [first, ambiguous.later()].into_iter().flatten();
    let mut found: Vec<i64> = both.map(Timestamp::as_second).collect();
    found.dedup();
    found
}

/// The next moment at which any of `rotations` may be due.
#[must_use]
pub fn next_wake(rotations: &[Rotation], now: &Zoned) -> Option<i64> {
    let next = rotations.iter().filter_map(|r| next_slot(r.period(), now));
    next.min()
}

/// How many snapshots a volume can have at most, as the original reckoned it: those of its rotations, two a
/// target, four if it has a source.
#[must_use]
pub fn budget(rotations: &[Rotation], targets: usize, has_source: bool) -> u64 {
    let kept: u64 = rotations.iter().map(|r| u64::from(r.keep)).sum();
    kept + 2 * targets as u64 + if has_source { 4 } else { 0 }
}

/// What one rotation gives up: the numbers of the snapshots that leave it, oldest first.
///
/// `snapshots` is oldest first. Protected ones are not counted and do not leave.
#[must_use]
pub fn leaving(rotation: &Rotation, snapshots: &[Snapshot]) -> Vec<u32> {
    let counted = |s: &&Snapshot| s.is_of(&rotation.kind) && !s.protected;
    let all: Vec<u32> = snapshots.iter().filter(counted).map(|s| s.id).collect();
    let keep = usize::try_from(rotation.keep).unwrap_or(usize::MAX);
    let excess = all.len().saturating_sub(keep);
    all.into_iter().take(excess).collect()
}

#[cfg(test)]
mod tests;
