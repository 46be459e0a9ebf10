// SPDX-License-Identifier: GPL-2.0-only
//! What `--json` prints. JSON.md documents it and is tested against it; a change that a reader could
//! trip over takes a new schema name.

use serde::Serialize;

use super::numbers::rfc3339;
use crate::client::{ChannelState, Level, MANY, Row, Snapshot, SnapshotState, Status, Usage};
use crate::units::{META_BLOCK_BYTES, SECTOR_BYTES, SnapTag};

/// Schema of `ddsnap list --json`.
const LIST: &str = "ddsnap-list-1";
/// Schema of `ddsnap status --json`.
const STATUS: &str = "ddsnap-status-1";

#[derive(Serialize)]
struct ListDocument {
    schema: &'static str,
    snapshots: Vec<SnapshotObject>,
}

#[derive(Serialize)]
struct StatusDocument {
    schema: &'static str,
    store: StoreObject,
    warning: Option<Warning>,
    snapshots: Vec<SnapshotObject>,
    #[serde(skip_serializing_if = "Option::is_none")]
    absent: Option<u32>,
    totals: Option<DataObject>,
}

#[derive(Serialize)]
struct StoreObject {
    chunk_bytes: u64,
    data_bytes: u64,
    data_free_bytes: u64,
    metadata_bytes: u64,
    metadata_free_bytes: u64,
    metadata_reserved_bytes: u64,
    metadata_device: bool,
    origin_bytes: u64,
    created: Time,
    snapshots_being_freed: u64,
    channel: &'static str,
    reverting_to: Option<u32>,
    fault: Option<String>,
}

#[derive(Serialize)]
struct Warning {
    level: &'static str,
    text: String,
}

#[derive(Serialize)]
struct Time {
    unix: i64,
    rfc3339: Option<String>,
}

#[derive(Serialize)]
struct SnapshotObject {
    tag: u32,
    sequence: u64,
    created: Time,
    priority: i8,
    usecount: UseCount,
    state: &'static str,
    doubtful: bool,
    becomes_bookmark: bool,
    origin_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    data: Option<Option<DataObject>>,
}

#[derive(Serialize)]
struct UseCount {
    persistent: u32,
    devices: u32,
}

#[derive(Serialize)]
struct DataObject {
    bytes: u64,
    unshared_bytes: u64,
    shared: Vec<SharedObject>,
}

#[derive(Serialize)]
struct SharedObject {
    others: u32,
    or_more: bool,
    bytes: u64,
}

/// The document of `ddsnap list --json`.
pub fn list(snapshots: &[Snapshot]) -> serde_json::Result<String> {
    pretty(&ListDocument {
        schema: LIST,
        snapshots: snapshots.iter().map(|s| snapshot(s, None)).collect(),
    })
}

/// The document of `ddsnap status --json`.
///
/// `asked`: the one snapshot that was asked for.
pub fn status(usage: &Usage, asked: Option<SnapTag>) -> serde_json::Result<String> {
    let status = &usage.status;
    let chunk_bytes = status.chunk.bytes();
    // A broken store is not counted.
    let counted = status.fault.is_empty();
    let data_of = |row: &Row| {
        let is_counted = counted && row.snapshot.state == SnapshotState::Live;
        is_counted.then(|| data(&row.shared_with, chunk_bytes))
    };
    pretty(&StatusDocument {
        schema: STATUS,
        store: store(status),
        warning: warning(status),
        snapshots: usage
            .rows
            .iter()
            .map(|row| snapshot(&row.snapshot, Some(data_of(row))))
            .collect(),
        absent: asked.filter(|_| usage.rows.is_empty()).map(|tag| tag.0),
        totals: counted.then(|| data(&usage.totals, chunk_bytes)),
    })
}

fn store(status: &Status) -> StoreObject {
    let chunk_bytes = status.chunk.bytes();
    StoreObject {
        chunk_bytes,
        data_bytes: status.data_chunks * chunk_bytes,
        data_free_bytes: status.free_chunks * chunk_bytes,
        metadata_bytes: status.meta_blocks * META_BLOCK_BYTES,
        metadata_free_bytes: status.free_meta_blocks * META_BLOCK_BYTES,
        metadata_reserved_bytes: status.reserved_meta_blocks * META_BLOCK_BYTES,
        metadata_device: status.separate_meta,
        origin_bytes: status.origin_sectors * SECTOR_BYTES,
        created: time(status.created),
        snapshots_being_freed: status.deleting,
        channel: match status.channel {
            ChannelState::Absent => "absent",
            ChannelState::Lost => "lost",
            ChannelState::Attached => "attached",
        },
        reverting_to: status.reverting.map(|tag| tag.0),
        fault: (!status.fault.is_empty()).then(|| status.fault.clone()),
    }
}

fn warning(status: &Status) -> Option<Warning> {
    let level = Level::of(status);
    Some(Warning {
        text: level.warning(status)?,
        level: match level {
            Level::Reserve => "full",
            _ => "low",
        },
    })
}

fn snapshot(snapshot: &Snapshot, data: Option<Option<DataObject>>) -> SnapshotObject {
    SnapshotObject {
        tag: snapshot.tag.0,
        sequence: snapshot.seq.0,
        created: time(snapshot.created),
        priority: snapshot.priority,
        usecount: UseCount {
            persistent: snapshot.persistent_usecount,
            devices: snapshot.devices,
        },
        state: match snapshot.state {
            SnapshotState::Live => "live",
            SnapshotState::Squashed => "squashed",
            SnapshotState::Bookmark => "bookmark",
        },
        doubtful: snapshot.doubtful,
        becomes_bookmark: snapshot.to_bookmark,
        origin_bytes: snapshot.sectors * SECTOR_BYTES,
        data,
    }
}

fn data(shares: &[(u32, u64)], chunk_bytes: u64) -> DataObject {
    let bytes_where = |wanted: fn(u32) -> bool| -> u64 {
        shares
            .iter()
            .filter(|&&(others, _)| wanted(others))
            .map(|&(_, chunks)| chunks * chunk_bytes)
            .sum()
    };
    DataObject {
        bytes: bytes_where(|_| true),
        unshared_bytes: bytes_where(|others| others == 0),
        shared: shares
            .iter()
            .filter(|&&(others, _)| others > 0)
            .map(|&(others, chunks)| SharedObject {
                others,
                or_more: others == MANY,
                bytes: chunks * chunk_bytes,
            })
            .collect(),
    }
}

fn time(unix: i64) -> Time {
    Time {
        unix,
        rfc3339: rfc3339(unix),
    }
}

fn pretty(document: &impl Serialize) -> serde_json::Result<String> {
    serde_json::to_string_pretty(document).map(|text| text + "\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{ChunkShift, SnapSeq, SnapTag};

    /// The examples of JSON.md are what is printed, to the letter.
    fn documented(schema: &str) -> String {
        let document = include_str!("../../JSON.md");
        let examples = document.split("```json\n").skip(1);
        let mut examples = examples.filter_map(|rest| rest.split("```").next());
        examples
            .find(|text| text.contains(schema))
            .unwrap_or_else(|| panic!("{schema} has no example"))
            .to_owned()
    }

    fn snapshots() -> [Snapshot; 2] {
        let first = Snapshot {
            tag: SnapTag(0),
            seq: SnapSeq(1),
            created: 1_795_311_881,
            priority: 0,
            state: SnapshotState::Live,
            doubtful: false,
            to_bookmark: false,
            persistent_usecount: 1,
            devices: 1,
            sectors: 16384,
        };
        let second = Snapshot {
            tag: SnapTag(2),
            seq: SnapSeq(2),
            created: 1_795_311_883,
            priority: -5,
            state: SnapshotState::Squashed,
            doubtful: true,
            persistent_usecount: 0,
            ..first
        };
        [first, second]
    }

    fn usage() -> Usage {
        let rows = snapshots().into_iter().zip([vec![(0, 1), (64, 2)], vec![]]);
        Usage {
            status: Status {
                chunk: ChunkShift::from_bytes(8192).unwrap(),
                data_chunks: 512,
                free_chunks: 43,
                meta_blocks: 200,
                free_meta_blocks: 166,
                reserved_meta_blocks: 41,
                separate_meta: false,
                origin_sectors: 16384,
                created: 1_795_311_879,
                deleting: 0,
                channel: ChannelState::Attached,
                refusing: false,
                reverting: None,
                fault: String::new(),
            },
            totals: vec![(0, 1), (64, 2)],
            rows: rows
                .map(|(snapshot, shared_with)| Row {
                    snapshot,
                    shared_with,
                })
                .collect(),
        }
    }

    #[test]
    fn a_list_is_as_documented() {
        assert_eq!(list(&snapshots()).unwrap(), documented(LIST));
    }

    #[test]
    fn a_status_is_as_documented() {
        assert_eq!(status(&usage(), None).unwrap(), documented(STATUS));
    }

    #[test]
    fn a_broken_store_has_no_counts() {
        let mut usage = usage();
        usage.status.fault = "disk on fire".to_owned();
        let document: serde_json::Value =
            serde_json::from_str(&status(&usage, None).unwrap()).unwrap();
        assert_eq!(document["store"]["fault"], "disk on fire");
        assert!(document["totals"].is_null() && document["snapshots"][0]["data"].is_null());
    }

    #[test]
    fn a_time_beyond_the_calendar_is_only_a_number() {
        let text = serde_json::to_string(&time(i64::MAX)).unwrap();
        assert_eq!(text, r#"{"unix":9223372036854775807,"rfc3339":null}"#);
    }
}
