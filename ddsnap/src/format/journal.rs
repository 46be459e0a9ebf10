// SPDX-License-Identifier: GPL-2.0-only
//! Journal records: a header and entries of 32 bytes, in whole blocks.

use super::{BLOCK_LEN, FormatError, Lengths, bound, expect, get_u32, get_u64, put_u32, put_u64};
use crate::buffer::AlignedBuf;
use crate::units::{Chunk, Sectors, SnapSeq, SnapTag, StoreChunk};

const MAGIC_AT: usize = 0;
const CRC_AT: usize = MAGIC_AT + 4;
const EPOCH_AT: usize = CRC_AT + 4;
const SEQUENCE_AT: usize = EPOCH_AT + 8;
const UUID_AT: usize = SEQUENCE_AT + 8;
const POSITION_AT: usize = UUID_AT + 8;
const BLOCKS_AT: usize = POSITION_AT + 8;
const COUNT_AT: usize = BLOCKS_AT + 4;
/// Bytes of the header; the entries follow.
pub const HEADER_LEN: usize = 64;
/// Bytes of an entry.
pub const ENTRY_LEN: usize = 32;
/// The most blocks a record can have.
pub const MAX_RECORD_BLOCKS: u32 = 64;
/// The most entries a record can have.
pub const MAX_RECORD_ENTRIES: usize = entries_in(MAX_RECORD_BLOCKS as usize);

const MAGIC: u32 = u32::from_le_bytes(*b"dsJr");
const WHAT: &str = "journal record";

const KIND_AT: usize = 0;
const WORD_AT: usize = KIND_AT + 4;
const A_AT: usize = WORD_AT + 4;
const B_AT: usize = A_AT + 8;
const C_AT: usize = B_AT + 8;

/// One change of the store's state. Applying all of them in order gives the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A chunk of the origin was copied out for all snapshots up to `seq` that lack it.
    Exception {
        /// Which chunk of the origin.
        chunk: Chunk,
        /// The newest snapshot it serves.
        seq: SnapSeq,
        /// Where the copy lies.
        place: StoreChunk,
        /// crc32c of the copy.
        crc: u32,
    },
    /// A snapshot got a chunk of its own.
    Overlay {
        /// Which snapshot.
        seq: SnapSeq,
        /// Which chunk of it.
        chunk: Chunk,
        /// Where it lies.
        place: StoreChunk,
    },
    /// The sweep took an exception away and freed its chunk, if it had one.
    RemoveException {
        /// Which chunk of the origin.
        chunk: Chunk,
        /// The rest of its key.
        seq: SnapSeq,
        /// The chunk that is free now; 0 of a mark, which has none.
        place: StoreChunk,
    },
    /// The sweep took an overlay away and freed its chunk, if it had one.
    RemoveOverlay {
        /// Which snapshot.
        seq: SnapSeq,
        /// Which chunk of it.
        chunk: Chunk,
        /// The chunk that is free now; 0 of a mark, which has none.
        place: StoreChunk,
    },
    /// A snapshot was created, with priority 0 and use count 0.
    Create {
        /// Its sequence number.
        seq: SnapSeq,
        /// Its tag.
        tag: SnapTag,
        /// Seconds since 1970-01-01 UTC.
        created: i64,
        /// Length of the origin.
        length: Sectors,
    },
    /// A snapshot was marked deleted.
    Delete(SnapSeq),
    /// A snapshot lost its data.
    Squash(SnapSeq),
    /// A snapshot got a new priority.
    Priority(SnapSeq, i8),
    /// A snapshot got a new persistent use count.
    Usecount(SnapSeq, u16),
    /// The sweep is done with a deleted snapshot.
    Forget(SnapSeq),
    /// The origin begins to take a snapshot's content.
    RevertBegin(SnapSeq),
    /// It has it, durably, up to a chunk.
    RevertProgress {
        /// Which snapshot.
        seq: SnapSeq,
        /// The first chunk not dealt with.
        next: Chunk,
    },
    /// It has it.
    RevertEnd(SnapSeq),
    /// What follows in this record is all that counts of the records before it, back to and with the one of
    /// this sequence: opening after a crash wrote it again.
    Again {
        /// Sequence of the first record that this one stands for.
        first: u64,
    },
    /// All snapshots up to this one are doubtful from now on.
    Doubtful(SnapSeq),
    /// The store was opened; the origin may be in use, and has no fingerprint any more.
    Opened {
        /// The kernel's id of the boot; zeros: not known.
        boot: [u8; 16],
        /// When, in seconds since 1970-01-01 UTC; 0: not known.
        seen: i64,
    },
    /// What a chunk of the origin holds that was not written since snapshot `seq`; the first one of another
    /// snapshot takes the place of all of the one before.
    Guard {
        /// The newest snapshot.
        seq: SnapSeq,
        /// Which chunk.
        chunk: Chunk,
        /// The first 8 bytes of its SHA-256.
        digest: u64,
    },
    /// A chunk of the origin is about to be written, and only bookmarks need to know.
    Mark {
        /// Which chunk of the origin.
        chunk: Chunk,
        /// The newest bookmark it serves.
        seq: SnapSeq,
    },
    /// The sweep freed an exception's chunk, and its key stays for bookmarks.
    ExceptionToMark {
        /// Which chunk of the origin.
        chunk: Chunk,
        /// The rest of its key.
        seq: SnapSeq,
        /// The chunk that is free now.
        place: StoreChunk,
    },
    /// The sweep freed an overlay's chunk, and its key stays for the bookmark that the snapshot became.
    OverlayToMark {
        /// Which bookmark.
        seq: SnapSeq,
        /// Which chunk of it.
        chunk: Chunk,
        /// The chunk that is free now.
        place: StoreChunk,
    },
    /// A bookmark was created, with priority 0 and use count 0.
    Bookmark {
        /// Its sequence number.
        seq: SnapSeq,
        /// Its tag.
        tag: SnapTag,
        /// Seconds since 1970-01-01 UTC.
        created: i64,
        /// Length of the origin.
        length: Sectors,
    },
    /// A snapshot keeps no data any more.
    ToBookmark(SnapSeq),
    /// Whether a snapshot becomes a bookmark when it is given up.
    WhenFull(SnapSeq, bool),
    /// The origin is being cut: bookmarks have at most this length from now on.
    CutBookmarks(Sectors),
}

/// Entries that fit into a record of `blocks`.
#[must_use]
pub const fn entries_in(blocks: usize) -> usize {
    (blocks * BLOCK_LEN - HEADER_LEN) / ENTRY_LEN
}

/// Blocks a record of `entries` takes.
#[must_use]
pub const fn blocks_for(entries: usize) -> usize {
    (HEADER_LEN + entries * ENTRY_LEN).div_ceil(BLOCK_LEN)
}

/// What identifies a record, so that one of an earlier life of the ring is not taken for current.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecordId {
    /// Changes when a store that was closed in order is opened.
    pub epoch: u64,
    /// Grows by one with each record of an epoch.
    pub sequence: u64,
    /// See [`super::uuid_part`].
    pub uuid_part: u64,
    /// The record's first block, counted from the start of the ring.
    pub position: u64,
}

/// Packs a record of at most [`MAX_RECORD_ENTRIES`] entries.
#[must_use]
pub fn encode(id: &RecordId, entries: &[Entry]) -> AlignedBuf {
    assert!(
        entries.len() <= MAX_RECORD_ENTRIES,
        "{} entries in a record",
        entries.len()
    );
    let blocks = blocks_for(entries.len());
    let mut bytes = AlignedBuf::zeroed(blocks * BLOCK_LEN);
    put_u32(&mut bytes, MAGIC_AT, MAGIC);
    put_u64(&mut bytes, EPOCH_AT, id.epoch);
    put_u64(&mut bytes, SEQUENCE_AT, id.sequence);
    put_u64(&mut bytes, UUID_AT, id.uuid_part);
    put_u64(&mut bytes, POSITION_AT, id.position);
    put_u32(&mut bytes, BLOCKS_AT, blocks as u32);
    put_u32(&mut bytes, COUNT_AT, entries.len() as u32);
    for (entry, at) in entries
        .iter()
        .zip(bytes[HEADER_LEN..].chunks_exact_mut(ENTRY_LEN))
    {
        encode_entry(entry, at);
    }
    let crc = crc32c::crc32c(&bytes[EPOCH_AT..]);
    put_u32(&mut bytes, CRC_AT, crc);
    bytes
}

/// The header of a record as read from the ring: says how many blocks to read, proves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UncheckedHeader {
    /// Who the record says it is.
    pub id: RecordId,
    /// Blocks it says it has, 1 to [`MAX_RECORD_BLOCKS`].
    pub blocks: u32,
    /// If it says that it stands for records before it ([`Entry::Again`]): the first of them. It is in the same
    /// sector as the header.
    pub again: Option<u64>,
    count: u32,
}

const _: () = assert!(HEADER_LEN + ENTRY_LEN <= 512);

/// The kind of [`Entry::Again`].
const AGAIN: u32 = 16;

impl UncheckedHeader {
    /// Reads the header that the first block of a record opens with.
    ///
    /// # Errors
    /// No record begins here, or its lengths cannot be.
    pub fn decode(block: &[u8]) -> Result<Self, FormatError> {
        if block.len() < HEADER_LEN {
            return Err(FormatError::Malformed {
                what: WHAT,
                problem: "it is cut short",
            });
        }
        expect(WHAT, "magic", get_u32(block, MAGIC_AT).into(), MAGIC.into())?;
        let blocks = get_u32(block, BLOCKS_AT);
        bound(
            WHAT,
            "length in blocks",
            blocks.into(),
            1,
            MAX_RECORD_BLOCKS.into(),
        )?;
        let count = get_u32(block, COUNT_AT);
        bound(
            WHAT,
            "count",
            count.into(),
            0,
            entries_in(blocks as usize) as u64,
        )?;
        let id = RecordId {
            epoch: get_u64(block, EPOCH_AT),
            sequence: get_u64(block, SEQUENCE_AT),
            uuid_part: get_u64(block, UUID_AT),
            position: get_u64(block, POSITION_AT),
        };
        let again = match block.get(HEADER_LEN..HEADER_LEN + ENTRY_LEN) {
            Some(first) if count > 0 && get_u32(first, KIND_AT) == AGAIN => {
                Some(get_u64(first, A_AT))
            }
            _ => None,
        };
        Ok(UncheckedHeader {
            id,
            blocks,
            again,
            count,
        })
    }
}

/// Reads a whole record.
///
/// # Errors
/// The first thing wrong with it: magic, lengths, checksum, or an entry of no known kind.
pub fn decode(bytes: &[u8], lengths: Lengths) -> Result<(RecordId, Vec<Entry>), FormatError> {
    let header = UncheckedHeader::decode(bytes)?;
    expect(
        WHAT,
        "length in bytes",
        bytes.len() as u64,
        u64::from(header.blocks) * BLOCK_LEN as u64,
    )?;
    expect(
        WHAT,
        "checksum",
        crc32c::crc32c(&bytes[EPOCH_AT..]).into(),
        get_u32(bytes, CRC_AT).into(),
    )?;
    let entries = bytes[HEADER_LEN..]
        .chunks_exact(ENTRY_LEN)
        .take(header.count as usize)
        .map(|at| decode_entry(at, lengths))
        .collect::<Result<Vec<_>, _>>()?;
    Ok((header.id, entries))
}

fn encode_entry(entry: &Entry, at: &mut [u8]) {
    let (kind, word, a, b, c) = match *entry {
        Entry::Exception {
            chunk,
            seq,
            place,
            crc,
        } => (1, crc, chunk.0, seq.0, place.0),
        Entry::Overlay { seq, chunk, place } => (2, 0, seq.0, chunk.0, place.0),
        Entry::RemoveException { chunk, seq, place } => (3, 0, chunk.0, seq.0, place.0),
        Entry::RemoveOverlay { seq, chunk, place } => (4, 0, seq.0, chunk.0, place.0),
        Entry::Create {
            seq,
            tag,
            created,
            length,
        } => (5, tag.0, seq.0, created as u64, length.0),
        Entry::Delete(seq) => (6, 0, seq.0, 0, 0),
        Entry::Squash(seq) => (7, 0, seq.0, 0, 0),
        Entry::Priority(seq, priority) => (8, u32::from(priority as u8), seq.0, 0, 0),
        Entry::Usecount(seq, count) => (9, u32::from(count), seq.0, 0, 0),
        Entry::Forget(seq) => (10, 0, seq.0, 0, 0),
        Entry::RevertBegin(seq) => (11, 0, seq.0, 0, 0),
        Entry::RevertProgress { seq, next } => (12, 0, seq.0, next.0, 0),
        Entry::RevertEnd(seq) => (13, 0, seq.0, 0, 0),
        Entry::Doubtful(seq) => (14, 0, seq.0, 0, 0),
        Entry::Opened { boot, seen } => (15, 0, get_u64(&boot, 0), get_u64(&boot, 8), seen as u64),
        Entry::Again { first } => (AGAIN, 0, first, 0, 0),
        Entry::Guard { seq, chunk, digest } => (17, 0, seq.0, chunk.0, digest),
        Entry::Mark { chunk, seq } => (18, 0, chunk.0, seq.0, 0),
        Entry::ExceptionToMark { chunk, seq, place } => (19, 0, chunk.0, seq.0, place.0),
        Entry::OverlayToMark { seq, chunk, place } => (20, 0, seq.0, chunk.0, place.0),
        Entry::Bookmark {
            seq,
            tag,
            created,
            length,
        } => (21, tag.0, seq.0, created as u64, length.0),
        Entry::ToBookmark(seq) => (22, 0, seq.0, 0, 0),
        Entry::WhenFull(seq, to_bookmark) => (23, to_bookmark.into(), seq.0, 0, 0),
        Entry::CutBookmarks(length) => (24, 0, length.0, 0, 0),
    };
    put_u32(at, KIND_AT, kind);
    put_u32(at, WORD_AT, word);
    put_u64(at, A_AT, a);
    put_u64(at, B_AT, b);
    put_u64(at, C_AT, c);
}

fn decode_entry(at: &[u8], lengths: Lengths) -> Result<Entry, FormatError> {
    let word = get_u32(at, WORD_AT);
    let (a, b, c) = (get_u64(at, A_AT), get_u64(at, B_AT), get_u64(at, C_AT));
    Ok(match get_u32(at, KIND_AT) {
        1 => Entry::Exception {
            chunk: Chunk(a),
            seq: SnapSeq(b),
            place: StoreChunk(c),
            crc: word,
        },
        2 => Entry::Overlay {
            seq: SnapSeq(a),
            chunk: Chunk(b),
            place: StoreChunk(c),
        },
        3 => Entry::RemoveException {
            chunk: Chunk(a),
            seq: SnapSeq(b),
            place: StoreChunk(c),
        },
        4 => Entry::RemoveOverlay {
            seq: SnapSeq(a),
            chunk: Chunk(b),
            place: StoreChunk(c),
        },
        5 => Entry::Create {
            seq: SnapSeq(a),
            tag: SnapTag(word),
            created: b as i64,
            length: lengths.decode(WHAT, c)?,
        },
        6 => Entry::Delete(SnapSeq(a)),
        7 => Entry::Squash(SnapSeq(a)),
        8 => {
            bound(WHAT, "priority", word.into(), 0, u8::MAX.into())?;
            Entry::Priority(SnapSeq(a), word as u8 as i8)
        }
        9 => {
            bound(WHAT, "use count", word.into(), 0, u16::MAX.into())?;
            Entry::Usecount(SnapSeq(a), word as u16)
        }
        10 => Entry::Forget(SnapSeq(a)),
        11 => Entry::RevertBegin(SnapSeq(a)),
        12 => Entry::RevertProgress {
            seq: SnapSeq(a),
            next: Chunk(b),
        },
        13 => Entry::RevertEnd(SnapSeq(a)),
        14 => Entry::Doubtful(SnapSeq(a)),
        15 => {
            let mut boot = [0; 16];
            put_u64(&mut boot, 0, a);
            put_u64(&mut boot, 8, b);
            Entry::Opened {
                boot,
                seen: c as i64,
            }
        }
        AGAIN => Entry::Again { first: a },
        17 => Entry::Guard {
            seq: SnapSeq(a),
            chunk: Chunk(b),
            digest: c,
        },
        18 => Entry::Mark {
            chunk: Chunk(a),
            seq: SnapSeq(b),
        },
        19 => Entry::ExceptionToMark {
            chunk: Chunk(a),
            seq: SnapSeq(b),
            place: StoreChunk(c),
        },
        20 => Entry::OverlayToMark {
            seq: SnapSeq(a),
            chunk: Chunk(b),
            place: StoreChunk(c),
        },
        21 => Entry::Bookmark {
            seq: SnapSeq(a),
            tag: SnapTag(word),
            created: b as i64,
            length: lengths.decode(WHAT, c)?,
        },
        22 => Entry::ToBookmark(SnapSeq(a)),
        23 => {
            bound(WHAT, "what happens when it is given up", word.into(), 0, 1)?;
            Entry::WhenFull(SnapSeq(a), word == 1)
        }
        24 => Entry::CutBookmarks(lengths.decode(WHAT, a)?),
        kind => {
            return Err(FormatError::Range {
                what: WHAT,
                field: "entry kind",
                found: kind.into(),
                least: 1,
                most: 24,
            });
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Version;
    use crate::units::ChunkShift;

    #[test]
    fn every_kind_of_entry_comes_back() {
        let (seq, chunk, place) = (SnapSeq(3), Chunk(u64::MAX), StoreChunk(77));
        let entries = [
            Entry::Exception {
                chunk,
                seq,
                place,
                crc: u32::MAX,
            },
            Entry::Overlay { seq, chunk, place },
            Entry::RemoveException { chunk, seq, place },
            Entry::RemoveOverlay { seq, chunk, place },
            Entry::Create {
                seq,
                tag: SnapTag(u32::MAX),
                created: -1,
                length: Sectors(9),
            },
            Entry::Delete(seq),
            Entry::Squash(seq),
            Entry::Priority(seq, -128),
            Entry::Usecount(seq, 65535),
            Entry::Forget(seq),
            Entry::RevertBegin(seq),
            Entry::RevertProgress { seq, next: chunk },
            Entry::RevertEnd(seq),
            Entry::Again { first: 7 },
            Entry::Doubtful(seq),
            Entry::Opened {
                boot: *b"0123456789abcdef",
                seen: -2,
            },
            Entry::Guard {
                seq,
                chunk,
                digest: u64::MAX,
            },
            Entry::Mark { chunk, seq },
            Entry::ExceptionToMark { chunk, seq, place },
            Entry::OverlayToMark { seq, chunk, place },
            Entry::Bookmark {
                seq,
                tag: SnapTag(7),
                created: -1,
                length: Sectors(9),
            },
            Entry::ToBookmark(seq),
            Entry::WhenFull(seq, true),
            Entry::WhenFull(seq, false),
            Entry::CutBookmarks(Sectors(3)),
        ];
        let id = RecordId {
            epoch: 1,
            sequence: 2,
            uuid_part: 3,
            position: 4,
        };
        let lengths = Lengths {
            version: Version::V2,
            chunk: ChunkShift::MIN,
        };
        let mut bytes = encode(&id, &entries);
        assert_eq!(bytes.len(), BLOCK_LEN);
        assert_eq!(decode(&bytes, lengths), Ok((id, entries.to_vec())));
        bytes[BLOCK_LEN - 1] ^= 1;
        assert!(matches!(
            decode(&bytes, lengths),
            Err(FormatError::Field {
                field: "checksum",
                ..
            })
        ));
    }
}
