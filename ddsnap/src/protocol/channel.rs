// SPDX-License-Identifier: GPL-2.0-only
//! The records of the kernel channel, `/dev/ddsnap`.
//!
//! Mirrors `kernel/dm-ddsnap-protocol.h` byte for byte; the tests pin the same bytes. Records have a
//! fixed size and no checksum: they never leave memory. What comes from the kernel is still checked,
//! so that a module of another version cannot make the server guess.

use thiserror::Error;

use super::address::SocketName;
use crate::units::{Chunk, ChunkRun, ChunkShift, SnapTag};

/// The device to open.
pub const DEVICE: &str = "/dev/ddsnap";
/// History: 1 - first version. 2 - DEVICE_STOP and DEVICE_STOPPED; IDENTIFY has flags. 3 - devices of any
/// length; ALL_UNIQUE; the reply to a question whose I/O has failed for its age is taken. 4 - [`IOC_ATTACH`]
/// has a number that is not another driver's. 5 - an ORIGIN_WRITE asks about a run of chunks.
pub const VERSION: u32 = 5;
/// The versions that are understood and the ioctl that attaches in each, the newest first. A module of an older one is
/// in use until the machine is booted anew, whatever package is installed over it.
pub const VERSIONS: [(u32, u32); 3] = [
    (VERSION, IOC_ATTACH),
    (4, IOC_ATTACH),
    (3, IOC_ATTACH_UNTIL_3),
];
/// The most chunks that an ORIGIN_WRITE asks about.
pub const RUN_CHUNKS: u32 = 256;
/// Bytes of a request.
pub const REQUEST_BYTES: usize = 64;
/// Bytes of a reply or command.
pub const REPLY_BYTES: usize = 32;
/// Bytes of the argument of [`IOC_ATTACH`].
pub const ATTACH_BYTES: usize = 128;
/// Bytes of a volume's key, with its NUL.
pub const KEY_BYTES: usize = 108;
/// The ioctl that attaches the open file to a volume: `_IOW(0xde, 1, struct ddsnap_attach)`. A
/// module older than version 4 does not know it.
pub const IOC_ATTACH: u32 = 1 << 30 | (ATTACH_BYTES as u32) << 16 | 0xde << 8 | 1;
/// The number that it had until version 3.
const IOC_ATTACH_UNTIL_3: u32 = 1 << 30 | (ATTACH_BYTES as u32) << 16 | 0xdd << 8 | 1;

const ORIGIN: u64 = u64::MAX;

const IDENTIFY: u32 = 1;
const GONE: u32 = 2;
const ORIGIN_WRITE: u32 = 3;
const SNAPSHOT_READ: u32 = 4;
const SNAPSHOT_WRITE: u32 = 5;
const BARRIER_REACHED: u32 = 6;
const DEVICE_STOPPED: u32 = 7;
const BARRIER_BEGIN: u32 = 0x100;
const BARRIER_END: u32 = 0x101;
const DEVICE_STOP: u32 = 0x102;
const ALL_UNIQUE: u32 = 0x103;

/// The one flag of a request.
const RETURNING: u32 = 1 << 0;

const FROM_ORIGIN: u32 = 1 << 0;
const CREATED: u32 = 1 << 1;

/// What the kernel sent that it must not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ChannelError {
    /// An operation this version does not know.
    #[error("request {id} from the kernel has unknown operation {op}")]
    Operation {
        /// The request's number.
        id: u64,
        /// What it asks for.
        op: u32,
    },
    /// A field out of its range.
    #[error("request {id} (operation {op}) from the kernel: {field} cannot be {value}")]
    Field {
        /// The request's number.
        id: u64,
        /// What it asks for.
        op: u32,
        /// The field's name.
        field: &'static str,
        /// What it holds.
        value: u64,
    },
    /// A read ended in the middle of a record.
    #[error("read of {0} bytes from the kernel, not a multiple of {REQUEST_BYTES}")]
    Length(usize),
}

/// What the kernel asks, or says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Unique among the unanswered requests; a barrier's number in [`Ask::BarrierReached`]; 0 in
    /// [`Ask::DeviceStopped`].
    pub id: u64,
    /// What it is about.
    pub ask: Ask,
}

/// The kinds of [`Request`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ask {
    /// A device came up.
    Identify {
        /// Its number, unique while it exists.
        device: u32,
        /// Which snapshot, or `None` for the origin.
        snapshot: Option<SnapTag>,
        /// Its length.
        sectors: u64,
        /// Whether an earlier server, or this one over an earlier channel, has accepted it: it may
        /// have I/O in flight.
        returning: bool,
    },
    /// A device went away.
    Gone {
        /// Its number.
        device: u32,
    },
    /// May these chunks of the origin be written? At most [`RUN_CHUNKS`], which have numbers.
    OriginWrite(ChunkRun),
    /// Where does this chunk of a snapshot lie?
    SnapshotRead(SnapTag, Chunk),
    /// The same, to be written.
    SnapshotWrite(SnapTag, Chunk),
    /// No origin write is in flight any more.
    BarrierReached,
    /// The device is stopped and none of its I/O is in flight.
    DeviceStopped {
        /// Its number.
        device: u32,
    },
}

impl Request {
    /// The request in a record.
    ///
    /// # Errors
    /// [`ChannelError`] naming the field that is out of range.
    pub fn decode(record: &[u8; REQUEST_BYTES]) -> Result<Request, ChannelError> {
        let id = u64_at(record, 0);
        let op = u32_at(record, 8);
        let device = u32_at(record, 12);
        let snapshot = u64_at(record, 16);
        let chunk = Chunk(u64_at(record, 24));
        let sectors = u64_at(record, 32);
        let flags = u32_at(record, 40);
        let count = u32_at(record, 44);
        let bad = |field, value| ChannelError::Field {
            id,
            op,
            field,
            value,
        };
        let tag = || {
            u32::try_from(snapshot)
                .map(SnapTag)
                .map_err(|_| bad("snapshot tag", snapshot))
        };
        let allowed = if op == IDENTIFY { RETURNING } else { 0 };
        if flags & !allowed != 0 {
            return Err(bad("flags", flags.into()));
        }
        // Before version 5 there was no count: a question was about one chunk.
        let chunks = count.max(1);
        // No more than can be asked about at once, and none beyond the last number.
        let counts = match op {
            ORIGIN_WRITE => {
                let last = chunk.0.checked_add(u64::from(chunks - 1));
                count <= RUN_CHUNKS && last.is_some()
            }
            _ => count == 0,
        };
        if !counts {
            return Err(bad("count", count.into()));
        }
        let ask = match op {
            IDENTIFY => {
                let snapshot = if snapshot == ORIGIN {
                    None
                } else {
                    Some(tag()?)
                };
                Ask::Identify {
                    device,
                    snapshot,
                    sectors,
                    returning: flags & RETURNING != 0,
                }
            }
            GONE => Ask::Gone { device },
            ORIGIN_WRITE if snapshot != ORIGIN => {
                return Err(bad("snapshot of the origin", snapshot));
            }
            ORIGIN_WRITE => Ask::OriginWrite(ChunkRun {
                first: chunk,
                chunks: chunks.into(),
            }),
            SNAPSHOT_READ => Ask::SnapshotRead(tag()?, chunk),
            SNAPSHOT_WRITE => Ask::SnapshotWrite(tag()?, chunk),
            BARRIER_REACHED => Ask::BarrierReached,
            DEVICE_STOPPED => Ask::DeviceStopped { device },
            _ => return Err(ChannelError::Operation { id, op }),
        };
        Ok(Request { id, ask })
    }

    /// The requests in what one read returned.
    ///
    /// # Errors
    /// [`ChannelError`] for the first record that is not in order.
    pub fn decode_all(bytes: &[u8]) -> Result<Vec<Request>, ChannelError> {
        let records = bytes.chunks_exact(REQUEST_BYTES);
        if !records.remainder().is_empty() {
            return Err(ChannelError::Length(bytes.len()));
        }
        records
            .map(|bytes| {
                let mut record = [0; REQUEST_BYTES];
                record.copy_from_slice(bytes);
                Request::decode(&record)
            })
            .collect()
    }

    /// The record, as the kernel would send it from `device` (a fake kernel's part).
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        let (op, device, snapshot, chunk, sectors) = match self.ask {
            Ask::Identify {
                device,
                snapshot,
                sectors,
                ..
            } => (
                IDENTIFY,
                device,
                snapshot.map_or(ORIGIN, |tag| tag.0.into()),
                0,
                sectors,
            ),
            Ask::Gone { device } => (GONE, device, 0, 0, 0),
            Ask::OriginWrite(run) => (ORIGIN_WRITE, 0, ORIGIN, run.first.0, 0),
            Ask::SnapshotRead(tag, chunk) => (SNAPSHOT_READ, 0, tag.0.into(), chunk.0, 0),
            Ask::SnapshotWrite(tag, chunk) => (SNAPSHOT_WRITE, 0, tag.0.into(), chunk.0, 0),
            Ask::BarrierReached => (BARRIER_REACHED, 0, 0, 0, 0),
            Ask::DeviceStopped { device } => (DEVICE_STOPPED, device, 0, 0, 0),
        };
        let flags = match self.ask {
            Ask::Identify {
                returning: true, ..
            } => RETURNING,
            _ => 0,
        };
        let count = match self.ask {
            // What does not fit the field is as wrong as what the kernel refuses to send.
            Ask::OriginWrite(run) => u32::try_from(run.chunks).unwrap_or(u32::MAX),
            _ => 0,
        };
        let mut record = [0; REQUEST_BYTES];
        record[0..8].copy_from_slice(&self.id.to_le_bytes());
        record[8..12].copy_from_slice(&op.to_le_bytes());
        record[12..16].copy_from_slice(&device.to_le_bytes());
        record[16..24].copy_from_slice(&snapshot.to_le_bytes());
        record[24..32].copy_from_slice(&chunk.to_le_bytes());
        record[32..40].copy_from_slice(&sectors.to_le_bytes());
        record[40..44].copy_from_slice(&flags.to_le_bytes());
        record[44..48].copy_from_slice(&count.to_le_bytes());
        record
    }
}

/// What the server answers, or commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reply {
    /// The request's number, or the one the server gave a barrier; 0 in [`Answer::DeviceStop`] and
    /// [`Answer::AllUnique`].
    pub id: u64,
    /// What it says.
    pub answer: Answer,
}

/// The kinds of [`Reply`]. Where there is a `status` it is 0 or a positive errno.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// To [`Ask::Identify`].
    Identify {
        /// `ENOENT`, `EINVAL` or `EIO` refuse the device.
        status: i32,
        /// With `EINVAL`: the right length. Else 0.
        sectors: u64,
    },
    /// To [`Ask::Gone`]: the use count has dropped.
    Gone,
    /// To [`Ask::OriginWrite`].
    OriginWrite {
        /// 0: all chunks of the run are unique until the next snapshot. Else what hinders one of them.
        status: i32,
    },
    /// To [`Ask::SnapshotRead`].
    SnapshotRead(Place),
    /// To [`Ask::SnapshotWrite`].
    SnapshotWrite(Place),
    /// Stop releasing origin writes and tell when none is in flight.
    BarrierBegin,
    /// Go on.
    BarrierEnd {
        /// A snapshot was made: forget which chunks are unique first.
        created: bool,
    },
    /// Fail all further I/O of this device, and tell when none is in flight.
    DeviceStop {
        /// Its number.
        device: u32,
    },
    /// No snapshot needs anything of the origin: no chunk needs to be asked about until the next one is
    /// created. It means nothing while a barrier is under way.
    AllUnique,
}

/// Where a chunk of a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Still on the origin (an answer to reads only).
    Origin,
    /// This chunk of the store device.
    Store(u64),
    /// The I/O fails with this positive errno.
    Fails(i32),
}

impl Reply {
    /// The record as it is written to the channel.
    #[must_use]
    pub fn encode(&self) -> [u8; REPLY_BYTES] {
        let (op, status, flags, value) = match self.answer {
            Answer::Identify { status, sectors } => (IDENTIFY, status, 0, sectors),
            Answer::Gone => (GONE, 0, 0, 0),
            Answer::OriginWrite { status } => (ORIGIN_WRITE, status, 0, 0),
            Answer::SnapshotRead(place) => place.fields(SNAPSHOT_READ),
            Answer::SnapshotWrite(place) => place.fields(SNAPSHOT_WRITE),
            Answer::BarrierBegin => (BARRIER_BEGIN, 0, 0, 0),
            Answer::BarrierEnd { created } => {
                (BARRIER_END, 0, if created { CREATED } else { 0 }, 0)
            }
            Answer::DeviceStop { device } => (DEVICE_STOP, 0, 0, device.into()),
            Answer::AllUnique => (ALL_UNIQUE, 0, 0, 0),
        };
        let mut record = [0; REPLY_BYTES];
        record[0..8].copy_from_slice(&self.id.to_le_bytes());
        record[8..12].copy_from_slice(&op.to_le_bytes());
        record[12..16].copy_from_slice(&status.to_le_bytes());
        record[16..20].copy_from_slice(&flags.to_le_bytes());
        record[24..32].copy_from_slice(&value.to_le_bytes());
        record
    }
}

impl Place {
    fn fields(self, op: u32) -> (u32, i32, u32, u64) {
        match self {
            Place::Origin => (op, 0, FROM_ORIGIN, 0),
            Place::Store(chunk) => (op, 0, 0, chunk),
            Place::Fails(errno) => (op, errno, 0, 0),
        }
    }
}

/// The argument of [`IOC_ATTACH`], in one of [`VERSIONS`].
#[must_use]
pub fn attach(version: u32, key: &SocketName, chunk: ChunkShift) -> [u8; ATTACH_BYTES] {
    let mut record = [0; ATTACH_BYTES];
    record[0..4].copy_from_slice(&version.to_le_bytes());
    record[4..8].copy_from_slice(&u32::from(chunk.get()).to_le_bytes());
    // A SocketName leaves room for the NUL.
    record[8..8 + key.as_str().len()].copy_from_slice(key.as_str().as_bytes());
    record
}

fn u32_at(bytes: &[u8; REQUEST_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; REQUEST_BYTES], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: [u8; 8] = [8, 7, 6, 5, 4, 3, 2, 1];
    const NUMBER: u64 = 0x0102_0304_0506_0708;
    const ALL_ONES: [u8; 8] = [0xff; 8];

    fn request(op: u8, device: u8, snapshot: [u8; 8], chunk: u8, sectors: u8) -> [u8; 64] {
        let mut record = [0; 64];
        record[..8].copy_from_slice(&ID);
        record[8] = op;
        record[12] = device;
        record[16..24].copy_from_slice(&snapshot);
        record[24] = chunk;
        record[32] = sectors;
        record
    }

    fn counted(mut record: [u8; 64], count: u32) -> [u8; 64] {
        record[44..48].copy_from_slice(&count.to_le_bytes());
        record
    }

    fn flagged(mut record: [u8; 64], flags: u8) -> [u8; 64] {
        record[40] = flags;
        record
    }

    #[test]
    fn requests_are_these_bytes() {
        let five = [5, 0, 0, 0, 0, 0, 0, 0];
        let tag = SnapTag(5);
        let golden = [
            (
                Ask::Identify {
                    device: 3,
                    snapshot: None,
                    sectors: 9,
                    returning: false,
                },
                request(1, 3, ALL_ONES, 0, 9),
            ),
            (
                Ask::Identify {
                    device: 3,
                    snapshot: Some(tag),
                    sectors: 9,
                    returning: true,
                },
                flagged(request(1, 3, five, 0, 9), 1),
            ),
            (Ask::Gone { device: 3 }, request(2, 3, [0; 8], 0, 0)),
            (
                Ask::OriginWrite(Chunk(7).into()),
                counted(request(3, 0, ALL_ONES, 7, 0), 1),
            ),
            (
                Ask::OriginWrite(ChunkRun {
                    first: Chunk(7),
                    chunks: 256,
                }),
                counted(request(3, 0, ALL_ONES, 7, 0), 0x100),
            ),
            (Ask::SnapshotRead(tag, Chunk(7)), request(4, 0, five, 7, 0)),
            (Ask::SnapshotWrite(tag, Chunk(7)), request(5, 0, five, 7, 0)),
            (Ask::BarrierReached, request(6, 0, [0; 8], 0, 0)),
            (
                Ask::DeviceStopped { device: 3 },
                request(7, 3, [0; 8], 0, 0),
            ),
        ];
        for (ask, record) in golden {
            let request = Request { id: NUMBER, ask };
            assert_eq!(request.encode(), record);
            assert_eq!(Request::decode(&record), Ok(request));
        }
    }

    #[test]
    fn the_asking_device_is_of_no_matter_to_an_io_request() {
        let record = counted(request(3, 44, ALL_ONES, 7, 0), 1);
        let request = Request {
            id: NUMBER,
            ask: Ask::OriginWrite(Chunk(7).into()),
        };
        assert_eq!(Request::decode(&record), Ok(request));
    }

    #[test]
    fn requests_out_of_range_are_refused_by_name() {
        assert_eq!(
            Request::decode(&request(8, 0, [0; 8], 0, 0)),
            Err(ChannelError::Operation { id: NUMBER, op: 8 })
        );
        for (op, flags) in [(1, 2), (2, 1), (4, 1), (7, 1)] {
            let found = Request::decode(&flagged(request(op, 0, [0; 8], 0, 0), flags));
            assert!(
                matches!(found, Err(ChannelError::Field { field: "flags", .. })),
                "{op}: {found:?}"
            );
        }
        let big = [0, 0, 0, 0, 1, 0, 0, 0];
        for op in [1, 4, 5] {
            let found = Request::decode(&request(op, 0, big, 0, 0));
            assert!(matches!(
                found,
                Err(ChannelError::Field {
                    field: "snapshot tag",
                    ..
                })
            ));
        }
        assert!(Request::decode(&counted(request(3, 0, big, 0, 0), 1)).is_err());
        assert_eq!(Request::decode_all(&[0; 65]), Err(ChannelError::Length(65)));
    }

    #[test]
    fn a_run_that_is_too_long_or_goes_beyond_the_last_number_is_refused() {
        let write = |first: u64, count| {
            let mut record = counted(request(3, 0, ALL_ONES, 0, 0), count);
            record[24..32].copy_from_slice(&first.to_le_bytes());
            Request::decode(&record).map(|request| request.ask)
        };
        let run = |first, chunks| {
            let first = Chunk(first);
            Ok(Ask::OriginWrite(ChunkRun { first, chunks }))
        };
        assert_eq!(write(7, 1), run(7, 1));
        assert_eq!(write(7, 256), run(7, 256));
        // As a module of version 3 or 4 asks.
        assert_eq!(write(7, 0), run(7, 1));
        assert_eq!(write(u64::MAX, 0), run(u64::MAX, 1));
        assert_eq!(write(u64::MAX, 1), run(u64::MAX, 1));
        assert_eq!(write(u64::MAX - 255, 256), run(u64::MAX - 255, 256));
        let refused = |found| {
            let field = "count";
            matches!(found, Err(ChannelError::Field { field: name, .. }) if name == field)
        };
        for (first, count) in [
            (0, 257),
            (0, u32::MAX),
            (u64::MAX, 2),
            (u64::MAX - 254, 256),
        ] {
            assert!(refused(write(first, count)), "{count} from {first} on");
        }
        // Nothing else has a count.
        for op in [1, 2, 4, 5, 6, 7] {
            let found = Request::decode(&counted(request(op, 0, [0; 8], 0, 0), 1));
            assert!(refused(found.map(|request| request.ask)), "{op}");
        }
    }

    #[test]
    fn replies_are_these_bytes() {
        // (answer, op, status, flags, value), each at its offset below.
        let golden = [
            (
                Answer::Identify {
                    status: 0,
                    sectors: 0,
                },
                [1, 0],
                0,
                0,
                0,
            ),
            (
                Answer::Identify {
                    status: 22,
                    sectors: 9,
                },
                [1, 0],
                22,
                0,
                9,
            ),
            (Answer::Gone, [2, 0], 0, 0, 0),
            (Answer::OriginWrite { status: 5 }, [3, 0], 5, 0, 0),
            (Answer::SnapshotRead(Place::Origin), [4, 0], 0, 1, 0),
            (Answer::SnapshotRead(Place::Store(9)), [4, 0], 0, 0, 9),
            (Answer::SnapshotRead(Place::Fails(5)), [4, 0], 5, 0, 0),
            (Answer::SnapshotWrite(Place::Store(9)), [5, 0], 0, 0, 9),
            (Answer::BarrierBegin, [0, 1], 0, 0, 0),
            (Answer::BarrierEnd { created: false }, [1, 1], 0, 0, 0),
            (Answer::BarrierEnd { created: true }, [1, 1], 0, 2, 0),
            (Answer::DeviceStop { device: 9 }, [2, 1], 0, 0, 9),
            (Answer::AllUnique, [3, 1], 0, 0, 0),
        ];
        for (answer, op, status, flags, value) in golden {
            let mut record = [0; 32];
            record[..8].copy_from_slice(&ID);
            record[8..10].copy_from_slice(&op);
            record[12] = status;
            record[16] = flags;
            record[24] = value;
            assert_eq!(Reply { id: NUMBER, answer }.encode(), record, "{answer:?}");
        }
    }

    #[test]
    fn the_attach_argument_is_these_bytes() {
        let key = "@vol".parse().unwrap();
        let found = attach(VERSION, &key, ChunkShift::new(14).unwrap());
        let mut expected = [0; 128];
        expected[0] = 5;
        expected[4] = 14;
        expected[8..12].copy_from_slice(b"@vol");
        assert_eq!(found, expected);
        // What a C compiler makes of _IOW(0xde, 1, struct ddsnap_attach).
        assert_eq!(IOC_ATTACH, 0x4080_de01);
        assert_eq!(
            VERSIONS,
            [(5, 0x4080_de01), (4, 0x4080_de01), (3, 0x4080_dd01)]
        );
        assert_eq!(8 + KEY_BYTES + 12, ATTACH_BYTES);
    }
}
