// SPDX-License-Identifier: GPL-2.0-only
//! What the two sides say to each other, but for extents, which have a module of their own.

use ddsnap::units::{Chunk, ChunkRun, Sectors};
use uuid::Uuid;

use super::frame::Kind;
use super::standing::{Held, Standing, decode_held, take_length};
use super::sums::Root;
use super::wire::{Put, Take, WireError};

/// The longest sentence in bytes.
pub const MAX_SENTENCE: usize = 2000;
/// The longest list of snapshots that goes with a refusal, in bytes.
const MAX_LIST: usize = 60_000;
/// The most chunk hashes of a message.
pub const MAX_HASHES: usize = 16_384;
/// The most differing runs that are named.
pub const MAX_SHOWN: usize = 256;

/// Feature: the side can compare snapshots.
pub const COMPARES: u64 = 1;
/// Feature: whoever began wants this stream to compare a snapshot, and nothing to be written.
pub const COMPARE: u64 = 2;
/// Feature: with [`COMPARE`], what differs is to be sent again with the next cycle.
pub const SEND_AGAIN: u64 = 4;
/// Feature: the sender has chunks to send again, so all are sent whole.
pub const WHOLE: u64 = 8;
/// Features this version has. Unknown ones are not refused: each side uses what both have.
pub const FEATURES: u64 = COMPARES;

/// What the administrator allowed for once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Wishes {
    /// A full copy over a target that has other content.
    pub full: bool,
    /// Going back to the base on a target that was written to; a safety snapshot is taken first.
    pub force_base: bool,
}

impl Wishes {
    /// What either side allowed: the administrator commands on one of them.
    #[must_use]
    pub fn merge(self, other: Wishes) -> Wishes {
        Wishes {
            full: self.full || other.full,
            force_base: self.force_base || other.force_base,
        }
    }
}

/// The first message of either side.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hello {
    /// Random, of this stream: what belongs to another one is told by it.
    pub nonce: [u8; 16],
    /// What the side can do beyond the version.
    pub features: u64,
    /// Where it stands.
    pub standing: Standing,
    /// What was allowed for this cycle.
    pub wishes: Wishes,
}

/// What a cycle is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Begin {
    /// The receiver's nonce.
    pub nonce: [u8; 16],
    /// The snapshot to come.
    pub snapshot: Held,
    /// What it is made from; none: a full copy.
    pub base: Option<Uuid>,
    /// Length of the base on the sending side; it may be longer on the other.
    pub base_length: Sectors,
    /// Where to go on; 0 for a copy that begins.
    pub position: u64,
    /// Whole chunks only: the sender has no data of the base, or the receiver doubts its own.
    pub plain: bool,
}

/// What is said.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Message {
    /// Who I am.
    Hello(Box<Hello>),
    /// No.
    Refuse {
        /// The refusal's number, for scripts.
        code: u16,
        /// Why, and what helps.
        sentence: String,
    },
    /// This is what I am going to send.
    Begin(Begin),
    /// Send it.
    Ready {
        /// The sender's nonce.
        nonce: [u8; 16],
        /// As in [`Begin`].
        position: u64,
    },
    /// All extents below `position` were sent.
    Batch {
        /// In chunks.
        position: u64,
    },
    /// All below `position` is durable.
    Ack {
        /// In chunks.
        position: u64,
    },
    /// All was sent.
    End {
        /// Of the snapshot, if the sender knows it.
        root: Option<Root>,
    },
    /// The snapshot is there.
    Complete {
        /// As the receiver has it, if it knows.
        root: Option<Root>,
        /// The number it has there.
        number: u32,
    },
    /// The receiver has the newest snapshot.
    Current {
        /// Which.
        snapshot: Uuid,
    },
    /// This is what I am going to compare.
    Compare {
        /// The receiver's nonce.
        nonce: [u8; 16],
        /// The snapshot.
        snapshot: Held,
    },
    /// The sender's sum of a region.
    Region {
        /// Which, from 0.
        region: u64,
        /// Its sum.
        sum: Root,
    },
    /// The receiver's hashes of chunks of the region that it is about to say differs.
    Chunks {
        /// The first one's number.
        first: u64,
        /// Their hashes; zeros for a chunk of zeros.
        hashes: Vec<[u8; 32]>,
    },
    /// What the receiver says of a region.
    Compared {
        /// Which.
        region: u64,
        /// Its sum is the sender's.
        same: bool,
    },
    /// What differs in all.
    Verdict {
        /// So many chunks.
        chunks: u64,
        /// The first of them, ascending.
        runs: Vec<ChunkRun>,
    },
    /// Still there.
    Alive,
    /// Something went wrong here.
    Fail {
        /// What.
        sentence: String,
    },
}

impl Message {
    /// The frame's kind.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Message::Hello(_) => Kind::Hello,
            Message::Refuse { .. } => Kind::Refuse,
            Message::Begin(_) => Kind::Begin,
            Message::Ready { .. } => Kind::Ready,
            Message::Batch { .. } => Kind::Batch,
            Message::Ack { .. } => Kind::Ack,
            Message::End { .. } => Kind::End,
            Message::Complete { .. } => Kind::Complete,
            Message::Current { .. } => Kind::Current,
            Message::Compare { .. } => Kind::Compare,
            Message::Region { .. } => Kind::Region,
            Message::Chunks { .. } => Kind::Chunks,
            Message::Compared { .. } => Kind::Compared,
            Message::Verdict { .. } => Kind::Verdict,
            Message::Alive => Kind::Alive,
            Message::Fail { .. } => Kind::Fail,
        }
    }

    /// The payload.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut put = Put::default();
        match self {
            Message::Hello(hello) => {
                put.raw(&hello.nonce).u64(hello.features);
                put.u8(hello.wishes.full.into());
                put.u8(hello.wishes.force_base.into());
                hello.standing.encode(&mut put);
            }
            Message::Refuse { code, sentence } => {
                put.u16(*code).text(sentence, MAX_LIST);
            }
            Message::Begin(begin) => {
                put.raw(&begin.nonce);
                begin.snapshot.encode(&mut put);
                put.uuid(begin.base).u64(begin.base_length.0);
                put.u64(begin.position);
                put.u8(begin.plain.into());
            }
            Message::Ready { nonce, position } => {
                put.raw(nonce).u64(*position);
            }
            Message::Batch { position } | Message::Ack { position } => {
                put.u64(*position);
            }
            Message::End { root } => put_root(&mut put, root.as_ref()),
            Message::Complete { root, number } => {
                put_root(&mut put, root.as_ref());
                put.u32(*number);
            }
            Message::Current { snapshot } => {
                put.uuid(Some(*snapshot));
            }
            Message::Compare { nonce, snapshot } => {
                put.raw(nonce);
                snapshot.encode(&mut put);
            }
            Message::Region { region, sum } => {
                put.u64(*region).raw(&sum.0);
            }
            Message::Chunks { first, hashes } => {
                let hashes = &hashes[..hashes.len().min(MAX_HASHES)];
                put.u64(*first).u32(hashes.len() as u32);
                put.raw(hashes.as_flattened());
            }
            Message::Compared { region, same } => {
                put.u64(*region).u8((*same).into());
            }
            Message::Verdict { chunks, runs } => {
                let runs = &runs[..runs.len().min(MAX_SHOWN)];
                put.u64(*chunks).u16(runs.len() as u16);
                for run in runs {
                    put.u64(run.first.0).u64(run.chunks);
                }
            }
            Message::Alive => {}
            Message::Fail { sentence } => {
                put.text(sentence, MAX_SENTENCE);
            }
        }
        put.0
    }

    /// Reads a payload back.
    ///
    /// # Errors
    /// It is none of this kind; extents have a decoder of their own.
    pub fn decode(kind: Kind, payload: &[u8]) -> Result<Message, WireError> {
        let mut take = Take::new("a message", payload);
        let message = match kind {
            Kind::Hello => Message::Hello(Box::new(Hello {
                nonce: take.array()?,
                features: take.u64()?,
                wishes: Wishes {
                    full: take.flag("the wish for a full copy")?,
                    force_base: take.flag("the wish to go back")?,
                },
                standing: Standing::decode(&mut take)?,
            })),
            Kind::Refuse => Message::Refuse {
                code: take.u16()?,
                sentence: take.text("a refusal", MAX_LIST)?,
            },
            Kind::Begin => Message::Begin(Begin {
                nonce: take.array()?,
                snapshot: decode_held(&mut take)?,
                base: take.uuid()?,
                base_length: take_length(&mut take)?,
                position: take.u64()?,
                plain: take.flag("the mark of whole chunks")?,
            }),
            Kind::Ready => Message::Ready {
                nonce: take.array()?,
                position: take.u64()?,
            },
            Kind::Extent => {
                return Err(WireError::Value {
                    what: "the kind of a message",
                    found: kind as u64,
                });
            }
            Kind::Batch => Message::Batch {
                position: take.u64()?,
            },
            Kind::Ack => Message::Ack {
                position: take.u64()?,
            },
            Kind::End => Message::End {
                root: take_root(&mut take)?,
            },
            Kind::Complete => Message::Complete {
                root: take_root(&mut take)?,
                number: take.u32()?,
            },
            Kind::Current => Message::Current {
                snapshot: take.some_uuid("a snapshot's UUID")?,
            },
            Kind::Compare => Message::Compare {
                nonce: take.array()?,
                snapshot: decode_held(&mut take)?,
            },
            Kind::Region => Message::Region {
                region: take.u64()?,
                sum: Root(take.array()?),
            },
            Kind::Chunks => take_chunks(&mut take)?,
            Kind::Compared => Message::Compared {
                region: take.u64()?,
                same: take.flag("the mark of equality")?,
            },
            Kind::Verdict => take_verdict(&mut take)?,
            Kind::Alive => Message::Alive,
            Kind::Fail => Message::Fail {
                sentence: take.text("a sentence", MAX_SENTENCE)?,
            },
        };
        take.end()?;
        Ok(message)
    }
}

fn take_chunks(take: &mut Take<'_>) -> Result<Message, WireError> {
    let first = take.u64()?;
    let count = take.u32()? as usize;
    let what = "the number of chunk hashes";
    if count == 0 || count > MAX_HASHES {
        let found = count as u64;
        return Err(WireError::Value { what, found });
    }
    // Taken at once: a count that is a lie ends here.
    let bytes = take.raw(count * 32)?;
    let hashes = bytes.chunks_exact(32).map(|hash| {
        let mut array = [0; 32];
        array.copy_from_slice(hash);
        array
    });
    Ok(Message::Chunks {
        first,
        hashes: hashes.collect(),
    })
}

fn take_verdict(take: &mut Take<'_>) -> Result<Message, WireError> {
    let chunks = take.u64()?;
    let count = take.u16()?;
    if usize::from(count) > MAX_SHOWN {
        let what = "the number of differing runs";
        let found = count.into();
        return Err(WireError::Value { what, found });
    }
    let (mut runs, mut end, mut named) = (Vec::new(), 0, 0u64);
    for _ in 0..count {
        let (first, length) = (take.u64()?, take.u64()?);
        let what = "a differing run";
        let next = first.checked_add(length);
        let next = next.filter(|_| length > 0 && first >= end);
        end = next.ok_or(WireError::Value { what, found: first })?;
        named += length;
        runs.push(ChunkRun {
            first: Chunk(first),
            chunks: length,
        });
    }
    if named > chunks || (named == 0) != (chunks == 0) {
        let what = "the number of differing chunks";
        return Err(WireError::Value {
            what,
            found: chunks,
        });
    }
    Ok(Message::Verdict { chunks, runs })
}

fn put_root(put: &mut Put, root: Option<&Root>) {
    match root {
        None => put.u8(0),
        Some(root) => put.u8(1).raw(&root.0),
    };
}

fn take_root(take: &mut Take<'_>) -> Result<Option<Root>, WireError> {
    Ok(match take.flag("the mark of a root")? {
        false => None,
        true => Some(Root(take.array()?)),
    })
}

#[cfg(test)]
mod tests;
