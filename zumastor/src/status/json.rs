// SPDX-License-Identifier: GPL-2.0-only
//! What `zumastor status --json` prints. JSON.md documents it and is tested against it; a change that a reader
//! could stumble over makes a new schema.

use serde_json::{Value, json};

use super::{SnapshotHealth, View};
use crate::human;

/// The name of this form.
pub const SCHEMA: &str = "zumastor-status-1";

/// A moment in seconds since 1970-01-01 UTC.
pub(super) fn time(unix: i64) -> Value {
    json!({ "unix": unix, "rfc3339": human::utc(unix) })
}

/// All of `views` at `now`, in seconds since 1970-01-01 UTC.
#[must_use]
pub fn document(views: &[View], now: i64) -> Value {
    let volumes: Vec<Value> = views.iter().map(|view| volume(view, now)).collect();
    json!({ "schema": SCHEMA, "volumes": volumes })
}

fn volume(view: &View, now: i64) -> Value {
    let config = view.config.as_ref();
    let state = |id| {
        view.health(id).map(|health| match health {
            SnapshotHealth::Fine => "ok",
            SnapshotHealth::Squashed => "squashed",
            SnapshotHealth::Bookmark => "bookmark",
            SnapshotHealth::Doubtful => "doubtful",
            SnapshotHealth::Missing => "missing",
        })
    };
    let snapshots = config.iter().flat_map(|c| &c.snapshots.list).map(|s| {
        json!({
            "id": s.id,
            "uuid": s.uuid,
            "kinds": s.kinds,
            "time": s.time,
            "created": time(s.created),
            "protected": s.protected,
            "state": state(s.id),
        })
    });
    let schedule = config
        .iter()
        .flat_map(|c| &c.schedule)
        .map(|r| json!({ "kind": r.kind, "keep": r.keep, "every": r.every, "served": r.served.map(time) }));
    let jobs = view.jobs.iter().map(|j| {
        json!({
            "id": j.id,
            "name": j.name,
            "state": j.state,
            "progress": j.progress,
            "rate": j.rate,
            "seconds_left": j.seconds_left(),
            "started": time(j.started),
            "ended": j.ended.map(time),
            "result": j.result,
            "refused": j.refused,
        })
    });
    json!({
        "name": view.name,
        "uuid": config.map(|c| c.uuid),
        "state": view.status(),
        "reason": view.failure,
        "warnings": view.warnings,
        "notes": view.notes,
        "role": view.role(),
        "targets": config.map(|c| c.targets.keys().collect::<Vec<_>>()),
        "lineage": config.map(|c| &c.lineage),
        "devices": config.map(|c| json!({
            "origin": c.device.origin,
            "snapstore": c.device.snapstore,
            "meta": c.device.meta,
        })),
        "mountpoint": config.and_then(|c| c.filesystem.mountpoint.clone()),
        "store": view.store.as_ref().map(|s| json!({
            "origin_bytes": s.origin_bytes,
            "data_bytes": s.data_bytes,
            "used_bytes": s.used_bytes,
        })),
        "schedule": schedule.collect::<Vec<_>>(),
        "snapshots": snapshots.collect::<Vec<_>>(),
        "jobs": jobs.collect::<Vec<_>>(),
        "replications": super::replication::of(view, now).iter().map(|r| r.json()).collect::<Vec<_>>(),
    })
}
