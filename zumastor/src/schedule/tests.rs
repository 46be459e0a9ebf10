// SPDX-License-Identifier: GPL-2.0-only
//! Clocks that jump, pauses, and what is kept.

use super::*;

fn rotation(kind: &str, every: Option<u64>) -> Rotation {
    Rotation {
        kind: kind.into(),
        keep: 2,
        every,
        served: None,
    }
}

fn at(text: &str) -> Zoned {
    text.parse().expect("a time with its zone")
}

/// Goes through time from `from` in steps of `step` seconds, `steps` times, and serves what is due. Gives back
/// the moments at which that was.
fn walk(rotation: &mut Rotation, from: &str, step: i64, steps: i64) -> Vec<Zoned> {
    let from = at(from);
    let mut taken = Vec::new();
    for n in 0..=steps {
        let now = from
            .checked_add(Span::new().seconds(n * step))
            .expect("in range");
        serve(rotation, &now, &mut taken);
    }
    taken
}

fn serve(rotation: &mut Rotation, now: &Zoned, taken: &mut Vec<Zoned>) {
    match verdict(rotation, now) {
        Verdict::Wait => {}
        Verdict::Rebase(slot) => rotation.served = Some(slot),
        Verdict::Due(slot) => {
            rotation.served = Some(slot);
            taken.push(now.clone());
        }
    }
}

fn local(times: &[Zoned]) -> Vec<String> {
    times
        .iter()
        .map(|z| z.strftime("%d %H:%M %Z").to_string())
        .collect()
}

#[test]
fn a_new_rotation_waits_for_its_first_slot() {
    let mut hourly = rotation("hourly", None);
    let taken = walk(&mut hourly, "2026-06-01T10:20[Europe/Berlin]", 600, 12);
    assert_eq!(local(&taken), ["01 11:00 CEST", "01 12:00 CEST"]);
}

/// Cron ran hourly jobs twice or never on these nights.
#[test]
fn hourly_snapshots_are_an_hour_apart_when_clocks_change() {
    let mut hourly = rotation("hourly", None);
    let taken = walk(&mut hourly, "2026-03-29T00:30[Europe/Berlin]", 600, 24);
    let expected = [
        "29 01:00 CET",
        "29 03:00 CEST",
        "29 04:00 CEST",
        "29 05:00 CEST",
    ];
    assert_eq!(local(&taken), expected);
    let mut hourly = rotation("hourly", None);
    let taken = walk(&mut hourly, "2026-10-25T00:30[Europe/Berlin]", 600, 24);
    let expected = [
        "25 01:00 CEST",
        "25 02:00 CEST",
        "25 02:00 CET",
        "25 03:00 CET",
    ];
    assert_eq!(local(&taken), expected);
    // Half an hour's change, on Lord Howe Island: no slot comes twice, none is left out.
    let mut hourly = rotation("hourly", None);
    let taken = walk(
        &mut hourly,
        "2026-04-05T00:10[Australia/Lord_Howe]",
        600,
        20,
    );
    let hours: Vec<String> = taken
        .iter()
        .map(|z| z.strftime("%H:%M").to_string())
        .collect();
    assert_eq!(hours, ["01:00", "02:00", "03:00"]);
}

#[test]
fn a_day_begins_once_whatever_the_clocks_do() {
    for (zone, from) in [
        ("Europe/Berlin", "2026-03-28T12:00"),
        ("Europe/Berlin", "2026-10-24T12:00"),
        // Midnight itself is left out here,
        ("Africa/Cairo", "2026-04-23T12:00"),
        // and comes twice here.
        ("America/Havana", "2026-10-31T12:00"),
    ] {
        let mut daily = rotation("daily", None);
        let taken = walk(&mut daily, &format!("{from}[{zone}]"), 600, 3 * 144);
        let days: Vec<Date> = taken.iter().map(Zoned::date).collect();
        assert_eq!(days.len(), 3, "{zone} {from}: {taken:?}");
        assert!(
            days.windows(2).all(|w| w[0].tomorrow().ok() == Some(w[1])),
            "{days:?}"
        );
        assert!(taken.iter().all(|z| z.hour() <= 1), "{taken:?}");
    }
}

#[test]
fn weeks_begin_on_sunday_and_months_on_the_first_also_in_leap_years() {
    let mut weekly = rotation("weekly", None);
    let taken = walk(&mut weekly, "2026-12-21T12:00[UTC]", 3600, 24 * 21);
    assert_eq!(
        local(&taken),
        ["27 00:00 UTC", "03 00:00 UTC", "10 00:00 UTC"]
    );
    let mut monthly = rotation("monthly", None);
    let taken = walk(&mut monthly, "2028-01-31T12:00[UTC]", 3600, 24 * 62);
    let days: Vec<String> = taken.iter().map(|z| z.date().to_string()).collect();
    assert_eq!(days, ["2028-02-01", "2028-03-01", "2028-04-01"]);
    let mut daily = rotation("daily", None);
    let taken = walk(&mut daily, "2028-02-28T12:00[UTC]", 3600, 48);
    let days: Vec<String> = taken.iter().map(|z| z.date().to_string()).collect();
    assert_eq!(days, ["2028-02-29", "2028-03-01"]);
}

#[test]
fn after_a_pause_a_rotation_catches_up_once() {
    let mut hourly = rotation("hourly", None);
    walk(&mut hourly, "2026-06-01T10:20[UTC]", 600, 6);
    // Three days without the daemon.
    let taken = walk(&mut hourly, "2026-06-04T15:37[UTC]", 60, 120);
    let expected = ["04 15:37 UTC", "04 16:00 UTC", "04 17:00 UTC"];
    assert_eq!(local(&taken), expected);
}

/// A clock that was a year ahead and then set right kept a rotation from taking snapshots for a year.
#[test]
fn a_clock_that_is_set_back_neither_doubles_a_slot_nor_stops_a_rotation() {
    let mut hourly = rotation("hourly", None);
    let taken = walk(&mut hourly, "2026-06-01T11:50[UTC]", 60, 15);
    assert_eq!(local(&taken), ["01 12:00 UTC"]);
    // By minutes, over the slot: it is not taken again.
    let taken = walk(&mut hourly, "2026-06-01T11:55[UTC]", 60, 30);
    assert!(taken.is_empty(), "{taken:?}");
    // By more than a period, and by a year: the next slot is taken.
    for from in ["2026-06-01T09:10[UTC]", "2025-06-01T09:10[UTC]"] {
        let taken = walk(&mut hourly, from, 60, 60);
        assert_eq!(local(&taken), ["01 10:00 UTC"]);
        hourly.served = at("2026-06-01T12:00[UTC]").timestamp().as_second().into();
    }
}

#[test]
fn own_periods_are_counted_from_1970() {
    let mut quarter = rotation("quarter", Some(900));
    let taken = walk(&mut quarter, "2026-06-01T10:50[Asia/Kathmandu]", 60, 40);
    // UTC+5:45: quarters of an hour all the same.
    let minutes: Vec<i8> = taken.iter().map(Zoned::minute).collect();
    assert_eq!(minutes, [0, 15, 30]);
    let mut never = rotation("before-upgrade", None);
    assert!(walk(&mut never, "2026-06-01T10:50[UTC]", 3600, 100).is_empty());
    assert_eq!(next_wake(&[never], &at("2026-06-01T10:50[UTC]")), None);
}

#[test]
fn the_next_wake_is_the_first_slot_of_all() {
    let all = [
        rotation("daily", None),
        rotation("x", Some(7200)),
        rotation("hourly", None),
    ];
    let now = at("2026-06-01T10:50[UTC]");
    let next = next_wake(&all, &now).expect("there are periods");
    assert_eq!(next, at("2026-06-01T11:00[UTC]").timestamp().as_second());
    // In the night of the change the second 02:00 is ten minutes away, not an hour and ten.
    let now = at("2026-10-25T02:50+02:00[Europe/Berlin]");
    let next = next_wake(&all[2..], &now).expect("hourly");
    assert_eq!(next - now.timestamp().as_second(), 600);
}

#[test]
fn the_oldest_leave_and_the_protected_stay() {
    let snapshot = |id, kinds: &[&str], protected| Snapshot {
        id,
        uuid: uuid::Uuid::nil(),
        kinds: kinds.iter().map(|k| (*k).to_string()).collect(),
        time: String::new(),
        created: 0,
        sequence: None,
        protected,
        twin: None,
    };
    let all = [
        snapshot(0, &["hourly"], true),
        snapshot(2, &["hourly", "daily"], false),
        snapshot(4, &["manual"], false),
        snapshot(6, &["hourly"], false),
        snapshot(8, &["hourly"], false),
        snapshot(10, &["hourly"], false),
    ];
    assert_eq!(leaving(&rotation("hourly", None), &all), [2, 6]);
    assert!(leaving(&rotation("daily", None), &all).is_empty());
    assert!(leaving(&rotation("weekly", None), &all).is_empty());
}

#[test]
fn the_budget_counts_what_replication_needs() {
    let all = [rotation("hourly", None), rotation("daily", None)];
    assert_eq!(budget(&all, 0, false), 4);
    assert_eq!(budget(&all, 3, false), 10);
    assert_eq!(budget(&all, 0, true), 8);
}
