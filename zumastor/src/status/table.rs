// SPDX-License-Identifier: GPL-2.0-only
//! Tables for people: problems first, then a line for each volume or snapshot.

use std::fmt::Write;

use super::{SnapshotHealth, View, job_line};
use crate::human;
use crate::jobs::{JobState, JobView};
use crate::names;

/// Columns as wide as what is in them, the last one as it is.
pub(super) fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |n: usize| {
        rows.iter()
            .filter_map(|r| r.get(n))
            .map(|c| c.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..count).map(|n| width(n).unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            // Writing to a String cannot fail.
            let _ = write!(line, "{cell:width$}  ");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

fn row(cells: &[&str]) -> Vec<String> {
    cells.iter().map(ToString::to_string).collect()
}

/// What is wrong with these volumes, a line each that says what to do.
#[must_use]
pub fn problems(views: &[View]) -> String {
    let mut text = String::new();
    for view in views {
        let failure = view
            .failure
            .iter()
            .map(|f| format!("{}: FAILED: {f}\n", view.name));
        let warnings = view
            .warnings
            .iter()
            .map(|w| format!("{}: WARNING: {w}\n", view.name));
        let of_replication = super::replication::problems(view);
        let failed = |j: &&JobView| j.state == JobState::Failed && !of_replication.tells(j);
        let jobs = view.jobs.iter().filter(failed);
        let jobs = jobs.filter_map(|j| Some(format!("{}: {}\n", view.name, job_line(j)?)));
        let replications = of_replication.lines.iter();
        let replications = replications.map(|line| format!("{}: WARNING: {line}\n", view.name));
        text.extend(failure.chain(warnings).chain(replications).chain(jobs));
    }
    text
}

/// All volumes at `now`, in seconds since 1970-01-01 UTC: first what is wrong, then a line for each, then what is
/// under way.
#[must_use]
pub fn volumes(views: &[View], now: i64) -> String {
    if views.is_empty() {
        return "No volume is defined: `zumastor define volume VOL ORIGIN SNAPSTORE --initialize`\n".into();
    }
    let mut text = problems(views);
    if !text.is_empty() {
        text.push('\n');
    }
    let mut rows = vec![row(&[
        "VOLUME",
        "STATE",
        "ROLE",
        "SIZE",
        "SNAPSHOTS",
        "STORE USED",
        "LAST SNAPSHOT",
        "TARGETS",
        "ORIGIN",
    ])];
    for view in views {
        let dash = || "-".to_string();
        let config = view.config.as_ref();
        let store = view.store.as_ref();
        let used = store.map(|s| {
            let percent = (s.used_bytes * 100).checked_div(s.data_bytes).unwrap_or(0);
            format!("{} ({percent} %)", human::bytes(s.used_bytes))
        });
        let list = config.map(|c| &c.snapshots.list);
        let last = list.and_then(|l| l.iter().map(|s| s.created).max());
        let origin = config.map(|c| c.device.origin.display().to_string());
        let targets = config.map(|c| c.targets.keys().cloned().collect::<Vec<_>>().join(" "));
        rows.push(vec![
            view.name.clone(),
            view.status().to_string(),
            view.role().to_string(),
            store.map_or_else(dash, |s| human::bytes(s.origin_bytes)),
            list.map_or_else(dash, |l| l.len().to_string()),
            used.unwrap_or_else(dash),
            last.map_or_else(dash, |at| ago(now - at)),
            targets.filter(|t| !t.is_empty()).unwrap_or_else(dash),
            origin.unwrap_or_else(dash),
        ]);
    }
    text += &columns(&rows);
    let replications = super::replication::table(views, now);
    if !replications.is_empty() {
        text.push('\n');
        text += &replications;
    }
    let mut rest = String::new();
    for view in views {
        for note in &view.notes {
            let _ = writeln!(rest, "{}: {note}", view.name);
        }
        let jobs = view.jobs.iter().filter(|j| j.state != JobState::Failed);
        for line in jobs.filter_map(job_line) {
            let _ = writeln!(rest, "{}: {line}", view.name);
        }
    }
    if !rest.is_empty() {
        text.push('\n');
        text += &rest;
    }
    text
}

/// All volumes, a line each, for scripts too.
#[must_use]
pub fn volume_names(views: &[View]) -> String {
    let mut rows = vec![row(&["VOLUME", "STATE", "ROLE", "SNAPSHOTS", "DEVICE"])];
    rows.extend(views.iter().map(|view| {
        let count = view.config.as_ref().map(|c| c.snapshots.list.len());
        vec![
            view.name.clone(),
            view.status().to_string(),
            view.role().to_string(),
            count.map_or_else(|| "-".to_string(), |n| n.to_string()),
            format!("/dev/mapper/{}", view.name),
        ]
    }));
    columns(&rows)
}

fn ago(seconds: i64) -> String {
    match u64::try_from(seconds) {
        Ok(seconds) => format!("{} ago", human::seconds(seconds)),
        // The clock was set back.
        Err(_) => "in the future".into(),
    }
}

/// The snapshots of a volume, oldest first.
#[must_use]
pub fn snapshots(view: &View, now: i64) -> String {
    let mut rows = vec![row(&["SNAPSHOT", "TAKEN", "AGE", "ROTATIONS", "STATE"])];
    for snapshot in view.config.iter().flat_map(|c| &c.snapshots.list) {
        let mut state = match view.health(snapshot.id) {
            Some(SnapshotHealth::Fine) => "ok",
            Some(SnapshotHealth::Squashed) => "squashed",
            Some(SnapshotHealth::Bookmark) => "bookmark",
            Some(SnapshotHealth::Doubtful) => "doubtful",
            Some(SnapshotHealth::Missing) => "missing",
            None => "-",
        }
        .to_string();
        if snapshot.protected {
            state += ", protected";
        }
        rows.push(vec![
            names::device_name(&view.name, Some(snapshot.id)),
            snapshot.time.clone(),
            ago(now - snapshot.created),
            snapshot.kinds.join(" "),
            state,
        ]);
    }
    columns(&rows)
}

/// What a volume is like, without its snapshots.
#[must_use]
pub fn volume(view: &View) -> String {
    let mut rows = Vec::new();
    if let Some(config) = &view.config {
        let mut add = |name: &str, value: String| rows.push(vec![format!("{name}:"), value]);
        add("Role", view.role().to_string());
        add("Origin", config.device.origin.display().to_string());
        add(
            "Snapshot store",
            config.device.snapstore.display().to_string(),
        );
        if let Some(meta) = &config.device.meta {
            add("Metadata", meta.display().to_string());
        }
        if let Some(store) = &view.store {
            add("Size", human::bytes(store.origin_bytes));
            let (used, all) = (
                human::bytes(store.used_bytes),
                human::bytes(store.data_bytes),
            );
            add("Store used", format!("{used} of {all}"));
        }
        let windows = config
            .targets
            .iter()
            .map(|(host, target)| (host, target.window));
        let of_source = config
            .source
            .as_ref()
            .map(|source| (&source.host, source.window));
        for (host, window) in windows.chain(of_source) {
            if let Some(window) = window {
                add("Window", format!("{window}, {host}"));
            }
        }
        for rotation in &config.schedule {
            let every = rotation.every;
            let every =
                every.map_or_else(String::new, |s| format!(", every {}", human::seconds(s)));
            add(
                "Schedule",
                format!("{}, {} kept{every}", rotation.kind, rotation.keep),
            );
        }
    }
    columns(&rows)
}
