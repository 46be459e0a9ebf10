// SPDX-License-Identifier: GPL-2.0-only
//! What the engine takes and gives: the vocabulary between the store and whoever serves it.
//!
//! Plain data; the engine itself is [`super::Store`].

use crate::units::{Chunk, ChunkShift, SnapSeq, SnapTag, StoreChunk};

/// What one request of a commit group asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// The origin's chunk is about to be written: save it if a snapshot needs it.
    OriginWrite(Chunk),
    /// A snapshot's chunk is about to be written: give it a chunk of its own.
    SnapshotWrite(SnapTag, Chunk),
}

/// The answer to an [`Op`], given only when all it promises is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Done {
    /// The origin's chunk may be written, now and until the next snapshot is created.
    Unique,
    /// The snapshot's chunk is private to it and lies here.
    Private(StoreChunk),
}

/// Where a snapshot's chunk is to be read from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Location {
    /// Still on the origin, unchanged since the snapshot.
    Origin,
    /// In the snapshot store.
    Store(StoreChunk),
}

/// How a snapshot fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapState {
    /// Its data is all there.
    Live,
    /// It lost its data to a full store; the entry stays until it is deleted.
    Squashed,
}

/// One snapshot, as `list` and `status` show it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// The administrator's number.
    pub tag: SnapTag,
    /// Its place in the order of creation.
    pub seq: SnapSeq,
    /// Seconds since 1970-01-01 UTC.
    pub created: i64,
    /// -128 (given up first) to 127 (never given up).
    pub priority: i8,
    /// The persistent part of the use count.
    pub usecount: u16,
    /// Whether its data is there.
    pub state: SnapState,
    /// Size of the origin when it was taken, in chunks.
    pub origin_chunks: u64,
}

/// How many store chunks a snapshot refers to, by how many snapshots share each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sharing {
    /// `shared_by[n]` chunks are used by this snapshot and `n` others (index 0: its own alone).
    pub shared_by: Vec<u64>,
}

/// The store as a whole, as `status` shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoreStatus {
    /// Chunk size.
    pub chunk: ChunkShift,
    /// Chunks of the data region that can hold data.
    pub data_chunks: u64,
    /// Of these, free ones (chunks waiting for the sweep count as used).
    pub free_chunks: u64,
    /// Blocks the metadata region has, of 4 KiB each.
    pub meta_blocks: u64,
    /// Of these, free ones.
    pub free_meta_blocks: u64,
    /// Whether metadata lies on a device of its own.
    pub separate_meta: bool,
    /// Length of the origin, in chunks.
    pub origin_chunks: u64,
    /// Seconds since 1970-01-01 UTC when the store was initialised.
    pub created: i64,
    /// Snapshots marked deleted whose chunks are not all free yet.
    pub deleting: u64,
}

/// Why a request of a group was refused. The store is unharmed and goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpError {
    /// No snapshot has this tag.
    #[error("snapshot {0} doesn't exist")]
    NoSuchSnapshot(SnapTag),
    /// The tag is taken.
    #[error("snapshot {0} already exists")]
    SnapshotExists(SnapTag),
    /// The table of snapshots is full and none may be given up.
    #[error("too many snapshots")]
    TooManySnapshots,
    /// The use count is not zero.
    #[error("snapshot {0} has non-zero usecount")]
    InUse(SnapTag),
    /// The snapshot's data was given up when the store was full.
    #[error("snapshot {0} is squashed")]
    Squashed(SnapTag),
    /// The chunk lies beyond the end of the origin or of the snapshot.
    #[error("chunk {0} is beyond the end of the device")]
    OutOfRange(Chunk),
    /// The store is full and no snapshot may be given up.
    #[error("the snapshot store is full")]
    StoreFull,
    /// The count would leave 0..=65535.
    #[error("Usecount underflow.")]
    UsecountUnderflow,
    /// The count would leave 0..=65535.
    #[error("Usecount overflow.")]
    UsecountOverflow,
}
