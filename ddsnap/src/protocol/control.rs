// SPDX-License-Identifier: GPL-2.0-only
//! Commands to the server and its answers.
//!
//! A client sends one [`Request`] and reads [`Reply`]s until one that [`is_last`](Reply::is_last);
//! then it may send the next. A refusal is a [`Reply::Error`]. Lists that may be longer than a frame
//! are sent in pages; all pages of one answer show the same moment.

use std::fmt;

use super::codec::{CodecError, Frame, MAX_BODY_BYTES, Reader, Writer};
use crate::units::{Chunk, ChunkRun, ChunkShift, Sectors, SnapSeq, SnapTag, StoreChunk};

const CREATE_SNAPSHOT: u16 = 0x0010;
const DELETE_SNAPSHOT: u16 = 0x0011;
const LIST_SNAPSHOTS: u16 = 0x0012;
const SNAPSHOT_STATE: u16 = 0x0014;
const SNAPSHOT_SECTORS: u16 = 0x0015;
const PRIORITY: u16 = 0x0016;
const USECOUNT: u16 = 0x0017;
const CREATE_BOOKMARK: u16 = 0x0019;
const TO_BOOKMARK: u16 = 0x001a;
const WHEN_FULL: u16 = 0x001b;
const STATUS: u16 = 0x0020;
const USAGE: u16 = 0x0021;
const RESIZE: u16 = 0x0030;
const CHANGELIST: u16 = 0x0040;
const DUMP_TREE: u16 = 0x0050;
const REVERT: u16 = 0x0031;
const SCRUB: u16 = 0x0032;

/// Set in the code of a reply, whose other bits are the request's.
const REPLY: u16 = 0x8000;
const ERROR: u16 = REPLY;
/// The pages of table rows that follow a usage.
const ROWS: u16 = 0x8022;
/// A changelist's head. Another code than the request's: that one had lengths in chunks.
const CHANGELIST_HEAD: u16 = 0x8042;
/// The pages that follow a changelist's head.
const CHANGES: u16 = 0x8041;
/// What a scrub has found.
const BAD_CHUNKS: u16 = 0x8033;
/// How far a long command is.
const PROGRESS: u16 = 0x803f;
/// In a resize: this size stays as it is.
const KEEP: u64 = u64::MAX;

/// What a client may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Make a snapshot of the origin as it is now. Answer: [`Reply::Created`].
    Create(SnapTag),
    /// Make a bookmark of the origin as it is now. Answer: [`Reply::BookmarkCreated`].
    CreateBookmark(SnapTag),
    /// Have a snapshot nobody uses become a bookmark. Answer: [`Reply::IsBookmark`].
    ToBookmark(SnapTag),
    /// Set whether a snapshot becomes a bookmark when it is given up. Answer: [`Reply::WhenFull`].
    WhenFull(SnapTag, bool),
    /// Remove a snapshot or bookmark nobody uses. Answer: [`Reply::Deleted`].
    Delete(SnapTag),
    /// All snapshots, oldest first. Answer: pages of [`Reply::Snapshots`].
    List,
    /// The store's state, as far as it need not be counted. Answer: [`Reply::Status`].
    Status,
    /// The store's state and what each snapshot uses. Answer: [`Reply::Progress`] now and then,
    /// [`Reply::Usage`], then pages of [`Reply::Rows`].
    Usage,
    /// One snapshot's state. Answer: [`Reply::State`].
    State(SnapTag),
    /// Length of the origin or of a snapshot. Answer: [`Reply::Sectors`].
    Sectors(Option<SnapTag>),
    /// Set a snapshot's priority. Answer: [`Reply::Priority`].
    Priority(SnapTag, i8),
    /// Add to a snapshot's persistent use count (0: only ask). Answer: [`Reply::UseCount`].
    UseCount(SnapTag, i32),
    /// Write the index of these origin chunks to the server's log. Answer: [`Reply::Progress`] now and
    /// then, then [`Reply::Dumped`].
    DumpTree {
        /// The first chunk.
        first: u64,
        /// The last chunk, which may lie behind the end.
        last: u64,
    },
    /// Which chunks differ between two snapshots. Answer: [`Reply::Changelist`], then pages of
    /// [`Reply::Changes`], with [`Reply::Progress`] now and then.
    Changelist {
        /// The snapshot or bookmark to start from; none: all chunks of the other are listed.
        from: Option<SnapTag>,
        /// The snapshot to come to.
        to: SnapTag,
    },
    /// Change sizes. Answer: [`Reply::Progress`] now and then, then [`Reply::Resized`].
    Resize {
        /// Of the origin, in bytes; none: as it is.
        origin: Option<u64>,
        /// Of the snapshot store's device.
        store: Option<u64>,
        /// Of the metadata's device.
        meta: Option<u64>,
    },
    /// Give the origin the content of a snapshot. Answer: [`Reply::Progress`] now and then, then
    /// [`Reply::Reverted`].
    Revert(SnapTag),
    /// Read all that snapshots have in the store, at so many bytes a second (0: as fast as it goes).
    /// Answer: [`Reply::Progress`] and [`Reply::BadChunks`] now and then, then [`Reply::Scrubbed`].
    Scrub(u64),
}

/// A chunk of the store whose data is not what it was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BadChunk {
    /// Where it lies.
    pub place: StoreChunk,
    /// Which chunk of the volume it holds.
    pub chunk: Chunk,
    /// The checksum found and the one wanted; none: it cannot be read.
    pub checksums: Option<(u32, u32)>,
    /// The snapshots that lost it, oldest first.
    pub snapshots: Vec<SnapTag>,
}

impl fmt::Display for BadChunk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let BadChunk { place, chunk, .. } = self;
        write!(f, "store chunk {place}, chunk {chunk} of ")?;
        match &self.snapshots[..] {
            [] => f.write_str("no snapshot")?,
            [one] => write!(f, "snapshot {one}")?,
            [first, rest @ ..] => {
                write!(f, "snapshots {first}")?;
                rest.iter().try_for_each(|tag| write!(f, " {tag}"))?;
            }
        }
        match self.checksums {
            None => f.write_str(": cannot be read"),
            Some((found, wanted)) => {
                write!(f, ": has checksum {found:#010x}, expected {wanted:#010x}")
            }
        }
    }
}

/// One snapshot in a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// The administrator's number.
    pub tag: SnapTag,
    /// Its place in the order of creation.
    pub seq: SnapSeq,
    /// Seconds since 1970-01-01 UTC.
    pub created: i64,
    /// -128 (given up first) to 127 (never given up).
    pub priority: i8,
    /// Whether its data is there.
    pub state: SnapshotState,
    /// The origin was written without its server while it lived: what it shows may be newer.
    pub doubtful: bool,
    /// Whether it becomes a bookmark when it is given up.
    pub to_bookmark: bool,
    /// The persistent part of the use count, set by `usecount`.
    pub persistent_usecount: u32,
    /// Devices that show it now.
    pub devices: u32,
    /// Its length.
    pub sectors: u64,
}

impl Snapshot {
    /// The use count people see: persistent and devices together.
    #[must_use]
    pub fn usecount(&self) -> u32 {
        self.persistent_usecount.saturating_add(self.devices)
    }
}

/// Whether a snapshot's data is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotState {
    /// It is.
    Live,
    /// It was given up for want of space.
    Squashed,
    /// It keeps none: what changed since is known.
    Bookmark,
}

/// The server's way to the kernel's devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ChannelState {
    /// There is no `/dev/ddsnap`: the kernel module is not loaded.
    Absent,
    /// The channel is broken; devices' I/O waits until it is there again.
    Lost,
    /// Devices are served.
    Attached,
}

/// The store as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Chunk size.
    pub chunk: ChunkShift,
    /// Chunks that can hold snapshot data.
    pub data_chunks: u64,
    /// Of these, free ones.
    pub free_chunks: u64,
    /// Blocks for metadata, of 4 KiB each.
    pub meta_blocks: u64,
    /// Of these, free ones.
    pub free_meta_blocks: u64,
    /// Of the free ones, those that only deleting may use.
    pub reserved_meta_blocks: u64,
    /// Whether metadata lies on a device of its own.
    pub separate_meta: bool,
    /// Length of the origin in sectors.
    pub origin_sectors: u64,
    /// Seconds since 1970-01-01 UTC when the store was initialised.
    pub created: i64,
    /// Snapshots deleted whose chunks are not all free yet.
    pub deleting: u64,
    /// The server's way to the kernel.
    pub channel: ChannelState,
    /// A write was refused for want of room, and none has found room since.
    pub refusing: bool,
    /// The origin is being reverted to this snapshot.
    pub reverting: Option<SnapTag>,
    /// Why the store serves no I/O any more; empty while it does.
    pub fault: String,
}

impl Status {
    /// Metadata blocks that are free for copies.
    #[must_use]
    pub fn copy_meta_blocks(&self) -> u64 {
        self.free_meta_blocks
            .saturating_sub(self.reserved_meta_blocks)
    }
}

/// One row of the status table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Row {
    /// The snapshot.
    pub snapshot: Snapshot,
    /// `(n, chunks)`: it shares so many chunks with `n` other snapshots, or with [`MANY`] or more if
    /// `n` is [`MANY`]. Growing `n`, no zero chunks.
    pub shared_with: Vec<(u32, u64)>,
}

/// Sharing with so many others or more is one kind.
pub const MANY: u32 = 64;

/// What the server answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reply {
    /// The request was refused, or its connection is not in order.
    Error {
        /// A positive errno.
        errno: i32,
        /// Half a sentence: what follows "because".
        reason: String,
    },
    /// The snapshot is there and durable.
    Created,
    /// The bookmark is there and durable.
    BookmarkCreated,
    /// The snapshot is a bookmark, durably.
    IsBookmark,
    /// Whether the snapshot becomes a bookmark when it is given up, as set.
    WhenFull(bool),
    /// The snapshot is gone.
    Deleted,
    /// A page of the list.
    Snapshots {
        /// Whether this is the last page.
        last: bool,
        /// Oldest first.
        snapshots: Vec<Snapshot>,
    },
    /// The store's state.
    Status(Status),
    /// The store's state; pages of rows follow.
    Usage {
        /// As one moment has it.
        status: Status,
        /// As in a row, but of all snapshots, each chunk once.
        totals: Vec<(u32, u64)>,
    },
    /// A page of the status table.
    Rows {
        /// Whether this is the last page.
        last: bool,
        /// Oldest snapshot first.
        rows: Vec<Row>,
    },
    /// A snapshot's state.
    State(SnapshotState),
    /// A length in sectors.
    Sectors(u64),
    /// The priority as set.
    Priority(i8),
    /// The dump is in the log.
    Dumped {
        /// Lines of the index.
        entries: u64,
    },
    /// Persistent and transient use count together.
    UseCount(u32),
    /// What a changelist is about; pages of changes follow.
    Changelist {
        /// Chunk size.
        chunk: ChunkShift,
        /// Length of the snapshot to start from; 0 if there is none.
        from: Sectors,
        /// Length of the snapshot to come to.
        to: Sectors,
    },
    /// A page of a changelist.
    Changes {
        /// Whether this is the last page.
        last: bool,
        /// Chunks that differ, in growing order, at most [`MAX_RUNS`].
        runs: Vec<ChunkRun>,
    },
    /// A long command is being carried out; other messages follow.
    Progress {
        /// Bytes done; of a count, index entries.
        done: u64,
        /// The same to do in all, as far as is known now.
        total: u64,
    },
    /// The sizes in bytes after a resize.
    Resized {
        /// Of the origin.
        origin: u64,
        /// Of the snapshot store's device.
        store: u64,
        /// Of the metadata's device; the store's, if it is that.
        meta: u64,
        /// Why nothing was changed; empty if it was.
        refused: String,
    },
    /// The origin has the snapshot's content.
    Reverted {
        /// But for so many chunks, which could not be read and are as they were.
        skipped: u64,
    },
    /// What a scrub has found since the last such message; other messages follow.
    BadChunks(Vec<BadChunk>),
    /// A scrub has ended.
    Scrubbed {
        /// Bytes it read.
        bytes: u64,
        /// Bad chunks it found.
        bad: u64,
    },
}

impl Request {
    /// The message as a frame.
    #[must_use]
    pub fn to_frame(&self) -> Frame {
        let mut body = Writer::default();
        let code = match *self {
            Request::Create(tag) => {
                body.u32(tag.0);
                CREATE_SNAPSHOT
            }
            Request::CreateBookmark(tag) => {
                body.u32(tag.0);
                CREATE_BOOKMARK
            }
            Request::ToBookmark(tag) => {
                body.u32(tag.0);
                TO_BOOKMARK
            }
            Request::WhenFull(tag, to_bookmark) => {
                body.u32(tag.0).u8(to_bookmark.into());
                WHEN_FULL
            }
            Request::Delete(tag) => {
                body.u32(tag.0);
                DELETE_SNAPSHOT
            }
            Request::List => LIST_SNAPSHOTS,
            Request::Status => STATUS,
            Request::Usage => USAGE,
            Request::State(tag) => {
                body.u32(tag.0);
                SNAPSHOT_STATE
            }
            Request::Sectors(tag) => {
                body.u8(tag.is_some().into()).u32(tag.unwrap_or_default().0);
                SNAPSHOT_SECTORS
            }
            Request::Priority(tag, priority) => {
                body.u32(tag.0).i8(priority);
                PRIORITY
            }
            Request::UseCount(tag, delta) => {
                body.u32(tag.0).i32(delta);
                USECOUNT
            }
            Request::DumpTree { first, last } => {
                body.u64(first).u64(last);
                DUMP_TREE
            }
            Request::Changelist { from, to } => {
                body.u8(from.is_some().into());
                body.u32(from.unwrap_or_default().0).u32(to.0);
                CHANGELIST
            }
            Request::Resize {
                origin,
                store,
                meta,
            } => {
                for bytes in [origin, store, meta] {
                    body.u64(bytes.unwrap_or(KEEP));
                }
                RESIZE
            }
            Request::Revert(tag) => {
                body.u32(tag.0);
                REVERT
            }
            Request::Scrub(rate) => {
                body.u64(rate);
                SCRUB
            }
        };
        body.frame(code)
    }

    /// The message in `frame`.
    ///
    /// # Errors
    /// [`CodecError`] naming what is wrong with it.
    pub fn from_frame(frame: &Frame) -> Result<Request, CodecError> {
        let mut body = Reader::new(frame);
        let request = match frame.code {
            CREATE_SNAPSHOT => Request::Create(SnapTag(body.u32()?)),
            CREATE_BOOKMARK => Request::CreateBookmark(SnapTag(body.u32()?)),
            TO_BOOKMARK => Request::ToBookmark(SnapTag(body.u32()?)),
            WHEN_FULL => {
                let tag = SnapTag(body.u32()?);
                Request::WhenFull(tag, body.flag("whether it becomes a bookmark")?)
            }
            DELETE_SNAPSHOT => Request::Delete(SnapTag(body.u32()?)),
            LIST_SNAPSHOTS => Request::List,
            STATUS => Request::Status,
            USAGE => Request::Usage,
            SNAPSHOT_STATE => Request::State(SnapTag(body.u32()?)),
            SNAPSHOT_SECTORS => {
                let is_snapshot = body.flag("kind of device")?;
                let tag = SnapTag(body.u32()?);
                Request::Sectors(is_snapshot.then_some(tag))
            }
            PRIORITY => Request::Priority(SnapTag(body.u32()?), body.i8()?),
            USECOUNT => Request::UseCount(SnapTag(body.u32()?), body.i32()?),
            DUMP_TREE => Request::DumpTree {
                first: body.u64()?,
                last: body.u64()?,
            },
            CHANGELIST => {
                let is_from = body.flag("whether it starts from a snapshot")?;
                let from = SnapTag(body.u32()?);
                Request::Changelist {
                    from: is_from.then_some(from),
                    to: SnapTag(body.u32()?),
                }
            }
            RESIZE => {
                let mut size = || Ok(Some(body.u64()?).filter(|&bytes| bytes != KEEP));
                Request::Resize {
                    origin: size()?,
                    store: size()?,
                    meta: size()?,
                }
            }
            REVERT => Request::Revert(SnapTag(body.u32()?)),
            SCRUB => Request::Scrub(body.u64()?),
            other => return Err(CodecError::Code(other)),
        };
        body.end(request)
    }
}

impl Reply {
    /// Whether the answer ends with this message.
    #[must_use]
    pub fn is_last(&self) -> bool {
        match self {
            Reply::Progress { .. }
            | Reply::Usage { .. }
            | Reply::Changelist { .. }
            | Reply::BadChunks(_) => false,
            Reply::Changes { last, .. } => *last,
            Reply::Snapshots { last, .. } | Reply::Rows { last, .. } => *last,
            _ => true,
        }
    }

    /// The pages that hold `snapshots`; at least one.
    #[must_use]
    pub fn snapshot_pages(snapshots: Vec<Snapshot>) -> Vec<Reply> {
        pages(snapshots, |_| SNAPSHOT_BYTES)
            .into_iter()
            .map(|(last, snapshots)| Reply::Snapshots { last, snapshots })
            .collect()
    }

    /// The pages that hold `rows`; at least one.
    #[must_use]
    pub fn row_pages(rows: Vec<Row>) -> Vec<Reply> {
        pages(rows, |row| {
            SNAPSHOT_BYTES + 4 + row.shared_with.len() * SHARE_BYTES
        })
        .into_iter()
        .map(|(last, rows)| Reply::Rows { last, rows })
        .collect()
    }

    /// The messages that hold `chunks`.
    #[must_use]
    pub fn bad_pages(chunks: Vec<BadChunk>) -> Vec<Reply> {
        pages(chunks, |bad| BAD_CHUNK_BYTES + 4 * bad.snapshots.len())
            .into_iter()
            .map(|(_, chunks)| Reply::BadChunks(chunks))
            .collect()
    }

    /// The message as a frame.
    #[must_use]
    pub fn to_frame(&self) -> Frame {
        let mut body = Writer::default();
        let code = match self {
            Reply::Error { errno, reason } => {
                body.i32(*errno).text(reason);
                ERROR
            }
            Reply::Created => REPLY | CREATE_SNAPSHOT,
            Reply::BookmarkCreated => REPLY | CREATE_BOOKMARK,
            Reply::IsBookmark => REPLY | TO_BOOKMARK,
            Reply::WhenFull(to_bookmark) => {
                body.u8((*to_bookmark).into());
                REPLY | WHEN_FULL
            }
            Reply::Deleted => REPLY | DELETE_SNAPSHOT,
            Reply::Snapshots { last, snapshots } => {
                body.u8((*last).into()).u32(snapshots.len() as u32);
                snapshots
                    .iter()
                    .for_each(|snapshot| put_snapshot(&mut body, snapshot));
                REPLY | LIST_SNAPSHOTS
            }
            Reply::Status(status) => {
                put_status(&mut body, status);
                REPLY | STATUS
            }
            Reply::Usage { status, totals } => {
                put_status(&mut body, status);
                put_shares(&mut body, totals);
                REPLY | USAGE
            }
            Reply::Rows { last, rows } => {
                body.u8((*last).into()).u32(rows.len() as u32);
                for row in rows {
                    put_snapshot(&mut body, &row.snapshot);
                    put_shares(&mut body, &row.shared_with);
                }
                ROWS
            }
            Reply::State(state) => {
                body.u8(state_byte(*state));
                REPLY | SNAPSHOT_STATE
            }
            Reply::Sectors(sectors) => {
                body.u64(*sectors);
                REPLY | SNAPSHOT_SECTORS
            }
            Reply::Priority(priority) => {
                body.i8(*priority);
                REPLY | PRIORITY
            }
            Reply::Dumped { entries } => {
                body.u64(*entries);
                REPLY | DUMP_TREE
            }
            Reply::UseCount(count) => {
                body.u32(*count);
                REPLY | USECOUNT
            }
            Reply::Changelist { chunk, from, to } => {
                body.u8(chunk.get()).u64(from.0).u64(to.0);
                CHANGELIST_HEAD
            }
            Reply::Changes { last, runs } => {
                body.u8((*last).into()).u32(runs.len() as u32);
                for run in runs {
                    body.u64(run.first.0).u64(run.chunks);
                }
                CHANGES
            }
            Reply::Progress { done, total } => {
                body.u64(*done).u64(*total);
                PROGRESS
            }
            Reply::Resized {
                origin,
                store,
                meta,
                refused,
            } => {
                body.u64(*origin).u64(*store).u64(*meta).text(refused);
                REPLY | RESIZE
            }
            Reply::Reverted { skipped } => {
                body.u64(*skipped);
                REPLY | REVERT
            }
            Reply::BadChunks(chunks) => {
                body.u32(chunks.len() as u32);
                chunks.iter().for_each(|bad| put_bad_chunk(&mut body, bad));
                BAD_CHUNKS
            }
            Reply::Scrubbed { bytes, bad } => {
                body.u64(*bytes).u64(*bad);
                REPLY | SCRUB
            }
        };
        body.frame(code)
    }

    /// The message in `frame`.
    ///
    /// # Errors
    /// [`CodecError`] naming what is wrong with it.
    pub fn from_frame(frame: &Frame) -> Result<Reply, CodecError> {
        const CREATED: u16 = REPLY | CREATE_SNAPSHOT;
        const BOOKMARK_CREATED: u16 = REPLY | CREATE_BOOKMARK;
        const IS_BOOKMARK: u16 = REPLY | TO_BOOKMARK;
        const WHEN_FULL_SET: u16 = REPLY | WHEN_FULL;
        const DELETED: u16 = REPLY | DELETE_SNAPSHOT;
        const SNAPSHOTS: u16 = REPLY | LIST_SNAPSHOTS;
        const STATUS_OK: u16 = REPLY | STATUS;
        const USAGE_OK: u16 = REPLY | USAGE;
        const STATE: u16 = REPLY | SNAPSHOT_STATE;
        const SECTORS: u16 = REPLY | SNAPSHOT_SECTORS;
        const PRIORITY_OK: u16 = REPLY | PRIORITY;
        const USECOUNT_OK: u16 = REPLY | USECOUNT;
        const RESIZED: u16 = REPLY | RESIZE;
        const DUMPED: u16 = REPLY | DUMP_TREE;
        const REVERTED: u16 = REPLY | REVERT;
        const SCRUBBED: u16 = REPLY | SCRUB;

        let mut body = Reader::new(frame);
        let reply = match frame.code {
            ERROR => Reply::Error {
                errno: body.i32()?,
                reason: body.text()?,
            },
            CREATED => Reply::Created,
            BOOKMARK_CREATED => Reply::BookmarkCreated,
            IS_BOOKMARK => Reply::IsBookmark,
            WHEN_FULL_SET => Reply::WhenFull(body.flag("whether it becomes a bookmark")?),
            DELETED => Reply::Deleted,
            SNAPSHOTS => {
                let last = body.flag("last page")?;
                let snapshots = get_all(&mut body, get_snapshot)?;
                Reply::Snapshots { last, snapshots }
            }
            STATUS_OK => Reply::Status(get_status(&mut body)?),
            USAGE_OK => Reply::Usage {
                status: get_status(&mut body)?,
                totals: get_shares(&mut body)?,
            },
            ROWS => {
                let last = body.flag("last page")?;
                let rows = get_all(&mut body, |body| {
                    Ok(Row {
                        snapshot: get_snapshot(body)?,
                        shared_with: get_shares(body)?,
                    })
                })?;
                Reply::Rows { last, rows }
            }
            STATE => Reply::State(get_state(&mut body)?),
            SECTORS => Reply::Sectors(body.u64()?),
            PRIORITY_OK => Reply::Priority(body.i8()?),
            USECOUNT_OK => Reply::UseCount(body.u32()?),
            DUMPED => Reply::Dumped {
                entries: body.u64()?,
            },
            CHANGELIST_HEAD => {
                let shift = body.u8()?;
                let chunk = ChunkShift::new(shift);
                Reply::Changelist {
                    chunk: chunk.ok_or_else(|| body.bad("chunk size", shift.into()))?,
                    from: Sectors(body.u64()?),
                    to: Sectors(body.u64()?),
                }
            }
            CHANGES => {
                let last = body.flag("last page")?;
                let runs = get_all(&mut body, |body| {
                    Ok(ChunkRun {
                        first: Chunk(body.u64()?),
                        chunks: body.u64()?,
                    })
                })?;
                Reply::Changes { last, runs }
            }
            PROGRESS => Reply::Progress {
                done: body.u64()?,
                total: body.u64()?,
            },
            RESIZED => Reply::Resized {
                origin: body.u64()?,
                store: body.u64()?,
                meta: body.u64()?,
                refused: body.text()?,
            },
            REVERTED => Reply::Reverted {
                skipped: body.u64()?,
            },
            BAD_CHUNKS => Reply::BadChunks(get_all(&mut body, get_bad_chunk)?),
            SCRUBBED => Reply::Scrubbed {
                bytes: body.u64()?,
                bad: body.u64()?,
            },
            other => return Err(CodecError::Code(other)),
        };
        body.end(reply)
    }
}

/// Bytes of a snapshot in a page.
const SNAPSHOT_BYTES: usize = 38;
/// Added to the state of a snapshot that is doubtful.
const DOUBTFUL: u8 = 2;
/// Added to the state of one that becomes a bookmark when it is given up.
const BECOMES_BOOKMARK: u8 = 8;
/// Bytes of a bad chunk in a message, without its snapshots.
const BAD_CHUNK_BYTES: usize = 29;
/// Bytes of one `(others, chunks)` pair in a page.
const SHARE_BYTES: usize = 12;
/// Runs of chunks that a page of a changelist has at most.
pub const MAX_RUNS: usize = PAGE_BYTES / 16;
/// Bytes of a page that are left for entries, after `last` and the count.
const PAGE_BYTES: usize = MAX_BODY_BYTES - 5;

/// Cuts `entries` into pages that fit a frame, each with whether it is the last.
fn pages<T>(entries: Vec<T>, bytes: impl Fn(&T) -> usize) -> Vec<(bool, Vec<T>)> {
    let mut pages = Vec::new();
    let mut page = Vec::new();
    let mut left = PAGE_BYTES;
    for entry in entries {
        let needed = bytes(&entry);
        if needed > left {
            pages.push((false, std::mem::take(&mut page)));
            left = PAGE_BYTES;
        }
        left = left.saturating_sub(needed);
        page.push(entry);
    }
    pages.push((true, page));
    pages
}

/// A count and so many entries. The count is not believed: the body's end stops a lie.
fn get_all<'a, T>(
    body: &mut Reader<'a>,
    get: impl Fn(&mut Reader<'a>) -> Result<T, CodecError>,
) -> Result<Vec<T>, CodecError> {
    let count = body.u32()?;
    (0..count).map(|_| get(body)).collect()
}

fn put_shares(body: &mut Writer, shares: &[(u32, u64)]) {
    body.u32(shares.len() as u32);
    for &(others, chunks) in shares {
        body.u32(others).u64(chunks);
    }
}

/// A sender that keeps to [`MANY`] makes rows that always fit a page.
fn get_shares(body: &mut Reader<'_>) -> Result<Vec<(u32, u64)>, CodecError> {
    let shares = get_all(body, |body| Ok((body.u32()?, body.u64()?)))?;
    match shares.iter().find(|&&(others, _)| others > MANY) {
        Some(&(others, _)) => Err(body.bad("number of sharing snapshots", others.into())),
        None => Ok(shares),
    }
}

fn put_snapshot(body: &mut Writer, snapshot: &Snapshot) {
    body.u32(snapshot.tag.0)
        .u64(snapshot.seq.0)
        .i64(snapshot.created)
        .i8(snapshot.priority)
        .u8(state_bits(snapshot))
        .u32(snapshot.persistent_usecount)
        .u32(snapshot.devices)
        .u64(snapshot.sectors);
}

fn state_bits(snapshot: &Snapshot) -> u8 {
    let doubtful = if snapshot.doubtful { DOUBTFUL } else { 0 };
    let to_bookmark = if snapshot.to_bookmark {
        BECOMES_BOOKMARK
    } else {
        0
    };
    state_byte(snapshot.state) | doubtful | to_bookmark
}

fn get_snapshot(body: &mut Reader<'_>) -> Result<Snapshot, CodecError> {
    let (tag, seq) = (SnapTag(body.u32()?), SnapSeq(body.u64()?));
    let (created, priority) = (body.i64()?, body.i8()?);
    let state = body.u8()?;
    Ok(Snapshot {
        tag,
        seq,
        created,
        priority,
        state: state_of(body, state & !(DOUBTFUL | BECOMES_BOOKMARK))?,
        doubtful: state & DOUBTFUL != 0,
        to_bookmark: state & BECOMES_BOOKMARK != 0,
        persistent_usecount: body.u32()?,
        devices: body.u32()?,
        sectors: body.u64()?,
    })
}

fn put_bad_chunk(body: &mut Writer, bad: &BadChunk) {
    let (found, wanted) = bad.checksums.unwrap_or_default();
    body.u64(bad.place.0)
        .u64(bad.chunk.0)
        .u8(bad.checksums.is_some().into())
        .u32(found)
        .u32(wanted)
        .u32(bad.snapshots.len() as u32);
    bad.snapshots.iter().for_each(|tag| {
        body.u32(tag.0);
    });
}

fn get_bad_chunk(body: &mut Reader<'_>) -> Result<BadChunk, CodecError> {
    let (place, chunk) = (StoreChunk(body.u64()?), Chunk(body.u64()?));
    let readable = body.flag("readable")?;
    let checksums = (body.u32()?, body.u32()?);
    Ok(BadChunk {
        place,
        chunk,
        checksums: readable.then_some(checksums),
        snapshots: get_all(body, |body| Ok(SnapTag(body.u32()?)))?,
    })
}

fn state_byte(state: SnapshotState) -> u8 {
    match state {
        SnapshotState::Live => 0,
        SnapshotState::Squashed => 1,
        SnapshotState::Bookmark => 4,
    }
}

fn get_state(body: &mut Reader<'_>) -> Result<SnapshotState, CodecError> {
    let byte = body.u8()?;
    state_of(body, byte)
}

fn state_of(body: &Reader<'_>, byte: u8) -> Result<SnapshotState, CodecError> {
    match byte {
        0 => Ok(SnapshotState::Live),
        1 => Ok(SnapshotState::Squashed),
        4 => Ok(SnapshotState::Bookmark),
        other => Err(body.bad("state of a snapshot", other.into())),
    }
}

fn put_status(body: &mut Writer, status: &Status) {
    body.u8(status.chunk.get())
        .u8(status.separate_meta.into())
        .u8(match status.channel {
            ChannelState::Absent => 0,
            ChannelState::Lost => 1,
            ChannelState::Attached => 2,
        })
        .u64(status.data_chunks)
        .u64(status.free_chunks)
        .u64(status.meta_blocks)
        .u64(status.free_meta_blocks)
        .u64(status.reserved_meta_blocks)
        .u64(status.origin_sectors)
        .i64(status.created)
        .u64(status.deleting)
        .u8(status.refusing.into())
        .u8(status.reverting.is_some().into())
        .u32(status.reverting.unwrap_or_default().0)
        .text(&status.fault);
}

fn get_status(body: &mut Reader<'_>) -> Result<Status, CodecError> {
    let shift = body.u8()?;
    let chunk = ChunkShift::new(shift).ok_or_else(|| body.bad("chunk size", shift.into()))?;
    Ok(Status {
        chunk,
        separate_meta: body.flag("separate metadata")?,
        channel: match body.u8()? {
            0 => ChannelState::Absent,
            1 => ChannelState::Lost,
            2 => ChannelState::Attached,
            other => return Err(body.bad("state of the channel", other.into())),
        },
        data_chunks: body.u64()?,
        free_chunks: body.u64()?,
        meta_blocks: body.u64()?,
        free_meta_blocks: body.u64()?,
        reserved_meta_blocks: body.u64()?,
        origin_sectors: body.u64()?,
        created: body.i64()?,
        deleting: body.u64()?,
        refusing: body.flag("refusing writes")?,
        reverting: {
            let reverting = body.flag("revert under way")?;
            let tag = SnapTag(body.u32()?);
            reverting.then_some(tag)
        },
        fault: body.text()?,
    })
}

#[cfg(test)]
mod tests;
