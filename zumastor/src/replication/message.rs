// SPDX-License-Identifier: GPL-2.0-only
//! What the two sides say to each other, but for extents, which have a module of their own.

use ddsnap::units::Sectors;
use uuid::Uuid;

use super::frame::Kind;
use super::standing::{Held, Standing, decode_held, take_length};
use super::sums::Root;
use super::wire::{Put, Take, WireError};

/// The longest sentence in bytes.
pub const MAX_SENTENCE: usize = 2000;
/// The longest list of snapshots that goes with a refusal, in bytes.
const MAX_LIST: usize = 60_000;
/// Features this version knows: none beyond the version itself. Unknown ones are not refused: each side
/// uses what both have.
pub const FEATURES: u64 = 0;

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
                let held = &begin.snapshot;
                put.uuid(Some(held.id)).u32(held.number).u64(held.taken);
                put.u64(held.length.0).u8(held.data.into());
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
            Kind::Alive => Message::Alive,
            Kind::Fail => Message::Fail {
                sentence: take.text("a sentence", MAX_SENTENCE)?,
            },
        };
        take.end()?;
        Ok(message)
    }
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
