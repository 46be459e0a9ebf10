// SPDX-License-Identifier: GPL-2.0-only
//! `zumastor status --json`: for programs. Fields are added without a new [`VERSION`]; what changes or goes
//! makes one.
//!
//! An object with `version` and `volumes`, a list of objects:
//!
//! - `name`, `uuid`; `state`: `running`, `failed` or `not running`; `reason` of a failure; `warnings`, `notes`:
//!   lists of sentences;
//! - `role`: `master`, `source` or `none`; `targets`: names; `lineage` (`uuid`, `epoch`);
//! - `devices`: paths `origin`, `snapstore`, `meta`; `mountpoint`;
//! - `store`, null if the server does not answer: `origin_bytes`, `data_bytes`, `used_bytes`;
//! - `schedule`: `kind`, `keep`, `every` (seconds), `served` (seconds since 1970-01-01 UTC);
//! - `snapshots`: `id`, `uuid`, `kinds`, `time` (local), `created` (seconds since 1970-01-01 UTC), `protected`,
//!   `state` (`ok`, `squashed`, `doubtful`, `missing`, or null if it is not known);
//! - `jobs`: `id`, `name`, `state`, `progress` (`subject`, `done`, `total` in bytes), `rate` (bytes a second),
//!   `seconds_left`, `started`, `ended`, `result`.
//!
//! What is not known or not there is null.

use serde_json::{Value, json};

use super::{SnapshotHealth, View};

/// The version of this form.
pub const VERSION: u32 = 1;

/// All of `views`.
#[must_use]
pub fn document(views: &[View]) -> Value {
    let volumes: Vec<Value> = views.iter().map(volume).collect();
    json!({ "version": VERSION, "volumes": volumes })
}

fn volume(view: &View) -> Value {
    let config = view.config.as_ref();
    let state = |id| {
        view.health(id).map(|health| match health {
            SnapshotHealth::Fine => "ok",
            SnapshotHealth::Squashed => "squashed",
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
            "created": s.created,
            "protected": s.protected,
            "state": state(s.id),
        })
    });
    let schedule = config
        .iter()
        .flat_map(|c| &c.schedule)
        .map(|r| json!({ "kind": r.kind, "keep": r.keep, "every": r.every, "served": r.served }));
    let jobs = view.jobs.iter().map(|j| {
        json!({
            "id": j.id,
            "name": j.name,
            "state": j.state,
            "progress": j.progress,
            "rate": j.rate,
            "seconds_left": j.seconds_left(),
            "started": j.started,
            "ended": j.ended,
            "result": j.result,
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
    })
}
