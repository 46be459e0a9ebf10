// SPDX-License-Identifier: GPL-2.0-only
//! What the engine takes and gives: the vocabulary between the store and whoever serves it.
//!
//! Plain data; the engine itself is [`super::Store`].

use std::fmt;

use crate::units::{Chunk, ChunkShift, Sectors, SnapSeq, SnapTag, StoreChunk};

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
    /// The origin's chunk may be written, now and until the next snapshot or bookmark is created.
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
    /// It lost its data to a full store; the entry stays until it is deleted. Of a bookmark: what changed since
    /// is not known any more.
    Squashed,
    /// It keeps no data; what changed since is known.
    Bookmark,
}

/// What became of a snapshot or bookmark that was given up for room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is gone.
    Deleted,
    /// It was in use: its entry stays, without data.
    Squashed,
    /// It keeps no data, but what changes.
    Bookmark,
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
    /// The origin was written without its server while the snapshot lived: what it shows may be newer.
    pub doubtful: bool,
    /// Whether it becomes a bookmark when it is given up for room.
    pub to_bookmark: bool,
    /// Length of the origin when it was taken, and so its own; of a bookmark the least since.
    pub length: Sectors,
}

/// Chunks shared with so many other snapshots or more are counted together: what is kept of a count
/// is then bounded by the number of snapshots alone.
pub const MANY: usize = 64;

/// How many store chunks a snapshot refers to, by how many snapshots share each.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Sharing {
    /// `shared_by[n]` chunks are used by this snapshot and `n` others (index 0: its own alone; index
    /// [`MANY`]: so many others or more). No zeros at the end.
    pub shared_by: Vec<u64>,
}

/// What all snapshots use of the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Each snapshot's chunks, oldest snapshot first.
    pub snapshots: Vec<(SnapTag, Sharing)>,
    /// Each chunk once.
    pub totals: Sharing,
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
    /// Of the free ones, those that only deleting and sweeping may use.
    pub reserved_meta_blocks: u64,
    /// Whether metadata lies on a device of its own.
    pub separate_meta: bool,
    /// Length of the origin.
    pub origin: Sectors,
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
    /// What was asked for needs data.
    #[error("snapshot {0} is a bookmark, which keeps no data")]
    Bookmark(SnapTag),
    /// The origin was written without its server since.
    #[error(
        "snapshot {0} is doubtful: not all that changed since is known; compare with another one, or list all of the newer one"
    )]
    Doubtful(SnapTag),
    /// The chunk lies beyond the end of the origin or of the snapshot.
    #[error("chunk {0} is beyond the end of the device")]
    OutOfRange(Chunk),
    /// The store is full and no snapshot may be given up.
    #[error("the snapshot store is full")]
    StoreFull,
    /// Room is being made in the background. The request is to be made again when
    /// [`is_making_room`](super::Store::is_making_room) says that it is not any more.
    #[error("room is being made in the snapshot store")]
    Wait,
    /// The origin is being reverted to this snapshot.
    #[error("a revert to snapshot {0} is under way")]
    Reverting(SnapTag),
    /// The count would leave 0..=65535.
    #[error("Usecount underflow.")]
    UsecountUnderflow,
    /// The count would leave 0..=65535.
    #[error("Usecount overflow.")]
    UsecountOverflow,
}

/// One of the devices whose size is changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The volume.
    Origin,
    /// The device that holds the snapshots' data.
    Store,
    /// The device that holds the metadata alone.
    Metadata,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Origin => "origin",
            Part::Store => "snapshot store",
            Part::Metadata => "metadata",
        })
    }
}

/// New sizes in bytes; none: as it is. That of the origin is rounded down to whole sectors, that of the
/// store to whole chunks, that of the metadata to whole blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ResizeRequest {
    /// Of the origin.
    pub origin: Option<u64>,
    /// Of the snapshot store's device.
    pub store: Option<u64>,
    /// Of the metadata's device. If that is the store's: the same as `store`.
    pub meta: Option<u64>,
}

/// Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Of the origin.
    pub origin: u64,
    /// Of the snapshot store's device, as far as it is used.
    pub store: u64,
    /// Of the metadata's device, as far as it is used; the store's, if it is that.
    pub meta: u64,
}

/// Why sizes were not changed. All of them are as they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ResizeError {
    /// The origin is being reverted to this snapshot.
    #[error("a revert to snapshot {0} is under way")]
    Reverting(SnapTag),
    /// Metadata and data share a device.
    #[error("snapshot device and metadata device are the same, can't resize them to two values")]
    TwoValues,
    /// The device is shorter than asked for.
    #[error("the {part} device has only {device} bytes; extend it first")]
    TooLong {
        /// Which device.
        part: Part,
        /// Its length in bytes.
        device: u64,
    },
    /// What is on it would not fit any more.
    #[error("the {part} device cannot be used with less than {least} bytes")]
    TooShort {
        /// Which device.
        part: Part,
        /// The least size in bytes.
        least: u64,
    },
    /// Data lies beyond the store's new end.
    #[error(
        "{count} chunks of the snapshot store beyond the new end are in use; it can be cut to {least} bytes now, or to less after snapshots were deleted"
    )]
    ChunksInUse {
        /// Used chunks beyond the new end.
        count: u64,
        /// The least size in bytes that all used chunks fit.
        least: u64,
    },
    /// Metadata does not fit before the new end.
    #[error(
        "the metadata does not fit before the new end: it needs up to {needed} blocks of 4096 bytes there, {free} are free"
    )]
    MetadataInUse {
        /// Blocks that the next checkpoint may need.
        needed: u64,
        /// Free blocks before the new end.
        free: u64,
    },
    /// Snapshots need what the origin would lose, and it does not fit into the store.
    #[error(
        "snapshots need {needed} chunks of what the origin would lose, and the snapshot store has {free} free ones; extend it or delete snapshots"
    )]
    NoRoomForEnd {
        /// Chunks to be copied.
        needed: u64,
        /// Free chunks of the store.
        free: u64,
    },
}

/// How far a step of a revert got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reverting {
    /// There is more to do in this phase.
    More,
    /// The first phase is over: the snapshot is sound, and there is room.
    Checked,
    /// The origin has the snapshot's content, durably.
    Done {
        /// But for so many chunks, which were left as they were; counted since the store was opened.
        skipped: u64,
    },
}

/// Why a revert was refused, or cannot go on now.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RevertError {
    /// No snapshot has this tag.
    #[error("snapshot {0} doesn't exist")]
    NoSuchSnapshot(SnapTag),
    /// The snapshot's data was given up when the store was full.
    #[error("snapshot {0} is squashed")]
    Squashed(SnapTag),
    /// It has no data.
    #[error("snapshot {0} is a bookmark, which keeps no data")]
    Bookmark(SnapTag),
    /// The origin has been cut since.
    #[error(
        "snapshot {tag} has {snapshot} bytes and the origin only {origin}; extend the origin first"
    )]
    Longer {
        /// Which snapshot.
        tag: SnapTag,
        /// Its length in bytes.
        snapshot: u64,
        /// The origin's length in bytes.
        origin: u64,
    },
    /// One at a time.
    #[error("a revert to snapshot {0} is under way")]
    UnderWay(SnapTag),
    /// A part of the snapshot is lost.
    #[error("chunk {chunk} of snapshot {tag} cannot be read: {problem}")]
    Damaged {
        /// Which snapshot.
        tag: SnapTag,
        /// Which chunk of it.
        chunk: Chunk,
        /// What is wrong with it.
        problem: String,
    },
    /// What other snapshots need of the origin does not fit into the store.
    #[error(
        "snapshots need {needed} chunks of the origin as it is now, and the snapshot store has {free} free ones; extend it or delete snapshots"
    )]
    NoRoom {
        /// Chunks to be copied.
        needed: u64,
        /// Free chunks of the store.
        free: u64,
    },
    /// There was room when it began, and is none now; it goes on when there is some again.
    #[error("the snapshot store is full; the revert goes on when there is room")]
    StoreFull,
    /// There is no revert to go on with.
    #[error("no revert is under way")]
    NotBegun,
}
