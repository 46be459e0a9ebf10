// SPDX-License-Identifier: GPL-2.0-only
//! The snapshot table: a chain of blocks, each with a pointer to the next and up to 62 entries.

use super::block::{Block, BlockBuilder, PAYLOAD_LEN, Pointer};
use super::{
    FormatError, Lengths, bound, expect, get_u16, get_u32, get_u64, put_u16, put_u32, put_u64,
};
use crate::units::{MetaBlock, Sectors, SnapSeq, SnapTag};

const NEXT_AT: usize = 0;
const NEXT_CRC_AT: usize = NEXT_AT + 8;
const ENTRIES_AT: usize = NEXT_CRC_AT + 8;

const SEQ_AT: usize = 0;
const TAG_AT: usize = SEQ_AT + 8;
const STATE_AT: usize = TAG_AT + 4;
const PRIORITY_AT: usize = STATE_AT + 1;
const USECOUNT_AT: usize = PRIORITY_AT + 1;
const CREATED_AT: usize = USECOUNT_AT + 2;
const LENGTH_AT: usize = CREATED_AT + 8;
const FLAGS_AT: usize = LENGTH_AT + 8;
const RESERVED_AT: usize = FLAGS_AT + 4;
const ENTRY_LEN: usize = 64;

/// The most snapshots, squashed ones and bookmarks included.
pub const MAX_SNAPSHOTS: usize = 4096;
/// The most entries of the table: as many deleted snapshots may still wait for the sweep.
pub const MAX_ENTRIES: usize = 2 * MAX_SNAPSHOTS;
/// Entries a block of the chain holds.
pub const PER_BLOCK: usize = (PAYLOAD_LEN - ENTRIES_AT) / ENTRY_LEN;

const FLAG_DOUBTFUL: u32 = 1;
const FLAG_TO_BOOKMARK: u32 = 2;

const WHAT: &str = "snapshot table";

/// What became of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its data is there.
    Live = 1,
    /// It lost its data to a full store; the entry stays until it is deleted.
    Squashed = 2,
    /// Deleted; the entry stays until the sweep has freed its chunks.
    Deleted = 3,
    /// It keeps no data; what changed since is known.
    Bookmark = 4,
}

/// One entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Never 0, never used again.
    pub seq: SnapSeq,
    /// The administrator's number; may be used again once the snapshot is deleted.
    pub tag: SnapTag,
    /// What became of it.
    pub state: State,
    /// -128 (given up first) to 127 (never given up).
    pub priority: i8,
    /// The persistent part of the use count.
    pub usecount: u16,
    /// Seconds since 1970-01-01 UTC.
    pub created: i64,
    /// Length of the origin at its creation; of a bookmark the least since.
    pub length: Sectors,
    /// The origin was written while nobody copied out for it: what it shows may be newer.
    pub doubtful: bool,
    /// It becomes a bookmark when it is given up for room.
    pub to_bookmark: bool,
}

/// Packs one block of the chain: up to [`PER_BLOCK`] snapshots and the pointer to the next block.
#[must_use]
pub fn encode(snapshots: &[Snapshot], next: Option<Pointer>) -> (BlockBuilder, u16, u16) {
    assert!(
        snapshots.len() <= PER_BLOCK,
        "{} snapshots in a block",
        snapshots.len()
    );
    let mut block = BlockBuilder::new();
    let payload = block.payload_mut();
    if let Some(next) = next {
        put_u64(payload, NEXT_AT, next.block.0);
        put_u32(payload, NEXT_CRC_AT, next.crc);
    }
    for (snapshot, at) in snapshots
        .iter()
        .zip(payload[ENTRIES_AT..].chunks_exact_mut(ENTRY_LEN))
    {
        put_u64(at, SEQ_AT, snapshot.seq.0);
        put_u32(at, TAG_AT, snapshot.tag.0);
        at[STATE_AT] = snapshot.state as u8;
        at[PRIORITY_AT] = snapshot.priority as u8;
        put_u16(at, USECOUNT_AT, snapshot.usecount);
        put_u64(at, CREATED_AT, snapshot.created as u64);
        put_u64(at, LENGTH_AT, snapshot.length.0);
        let doubtful = if snapshot.doubtful { FLAG_DOUBTFUL } else { 0 };
        let to_bookmark = if snapshot.to_bookmark {
            FLAG_TO_BOOKMARK
        } else {
            0
        };
        put_u32(at, FLAGS_AT, doubtful | to_bookmark);
        at[RESERVED_AT..].fill(0);
    }
    (
        block,
        snapshots.len() as u16,
        (ENTRIES_AT + snapshots.len() * ENTRY_LEN) as u16,
    )
}

/// Reads one block of the chain: its snapshots and the pointer to the next block.
///
/// # Errors
/// Count or length is wrong, or an entry has a value that cannot be.
pub fn decode(
    block: &Block,
    lengths: Lengths,
) -> Result<(Vec<Snapshot>, Option<Pointer>), FormatError> {
    let payload = block.payload();
    bound(WHAT, "count", block.count() as u64, 1, PER_BLOCK as u64)?;
    expect(
        WHAT,
        "used bytes",
        payload.len() as u64,
        (ENTRIES_AT + block.count() * ENTRY_LEN) as u64,
    )?;
    let next = match get_u64(payload, NEXT_AT) {
        0 => None,
        block => Some(Pointer {
            block: MetaBlock(block),
            crc: get_u32(payload, NEXT_CRC_AT),
        }),
    };
    let snapshots = payload[ENTRIES_AT..]
        .chunks_exact(ENTRY_LEN)
        .map(|at| decode_entry(at, lengths))
        .collect::<Result<Vec<_>, _>>()?;
    Ok((snapshots, next))
}

fn decode_entry(at: &[u8], lengths: Lengths) -> Result<Snapshot, FormatError> {
    bound(WHAT, "sequence", get_u64(at, SEQ_AT), 1, u64::MAX - 1)?;
    let state = match at[STATE_AT] {
        1 => State::Live,
        2 => State::Squashed,
        3 => State::Deleted,
        4 => State::Bookmark,
        other => {
            return Err(FormatError::Range {
                what: WHAT,
                field: "state",
                found: other.into(),
                least: 1,
                most: 4,
            });
        }
    };
    let flags = get_u32(at, FLAGS_AT);
    let unknown = flags & !(FLAG_DOUBTFUL | FLAG_TO_BOOKMARK);
    expect(WHAT, "unknown flags", unknown.into(), 0)?;
    Ok(Snapshot {
        seq: SnapSeq(get_u64(at, SEQ_AT)),
        tag: SnapTag(get_u32(at, TAG_AT)),
        state,
        priority: at[PRIORITY_AT] as i8,
        usecount: get_u16(at, USECOUNT_AT),
        created: get_u64(at, CREATED_AT) as i64,
        length: lengths.decode(WHAT, get_u64(at, LENGTH_AT))?,
        doubtful: flags & FLAG_DOUBTFUL != 0,
        to_bookmark: flags & FLAG_TO_BOOKMARK != 0,
    })
}
