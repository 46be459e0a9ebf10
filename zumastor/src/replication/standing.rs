// SPDX-License-Identifier: GPL-2.0-only
//! Where one side stands: what it durably is and holds. Two of these decide a cycle.

use std::fmt;

use ddsnap::units::{ChunkShift, Sectors};
use uuid::Uuid;

use super::wire::{Put, Take, WireError};

/// The most snapshots and bookmarks a greeting names; the newest are kept if there are more.
pub const MAX_HELD: usize = 8192;
/// The last epoch that is believed: after it come more than there will ever be failovers.
const MAX_EPOCH: u64 = 1 << 62;
/// Length of one of them on the wire.
const HELD_BYTES: usize = 16 + 4 + 8 + 8 + 1;

/// A reign over a volume's lineage. Failover begins a new one.
///
/// The owner is a part of it: two replicas that fail over without knowing of each other begin two reigns,
/// and which supersedes the other is the same to everybody.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Epoch {
    /// Grows with each failover, from 1.
    pub number: u64,
    /// The volume that is master in it.
    pub owner: Uuid,
    /// When it began, UTC seconds; for people.
    pub since: u64,
}

/// What a side does with the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// Its origin is written to by users.
    Master = 1,
    /// Its origin is written to by replication.
    Replica = 2,
}

/// A snapshot or a bookmark.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Held {
    /// The same on all machines.
    pub id: Uuid,
    /// The number it has here.
    pub number: u32,
    /// When it was taken, UTC seconds.
    pub taken: u64,
    /// Its length.
    pub length: Sectors,
    /// Whether its data is there; else it only says what changed since.
    pub data: bool,
}

impl Held {
    /// Appends it as bytes.
    pub(super) fn encode(&self, put: &mut Put) {
        put.uuid(Some(self.id)).u32(self.number).u64(self.taken);
        put.u64(self.length.0).u8(self.data.into());
    }
}

/// A copy under way, on the side that receives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Partial {
    /// The snapshot that is to come.
    pub snapshot: Uuid,
    /// What it is made from; none for a full copy.
    pub base: Option<Uuid>,
    /// All chunks below this one are durable; in the sender's chunks.
    pub position: u64,
    /// The base turned out to be not what it should be: only whole chunks help.
    pub plain: bool,
}

/// What one side durably is and holds.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Standing {
    /// The volume on this machine.
    pub volume: Uuid,
    /// What all replicas of a volume have in common; none for a target that never received anything.
    pub lineage: Option<Uuid>,
    /// The reign it knows of.
    pub epoch: Epoch,
    /// What it does.
    pub role: Role,
    /// Chunk size of its store.
    pub chunk: ChunkShift,
    /// Length of its origin.
    pub length: Sectors,
    /// Snapshots and bookmarks, oldest first.
    pub held: Vec<Held>,
    /// The newest snapshot that both have and of which this side knows that.
    pub hold: Option<Uuid>,
    /// The hold before it, kept until the other side is known to have moved.
    pub old_hold: Option<Uuid>,
    /// The snapshot whose content a replica's origin has, but for a copy under way and what was written
    /// to it.
    pub origin: Option<Uuid>,
    /// A copy under way.
    pub partial: Option<Partial>,
    /// Its origin was mounted for writing or written to since the last complete snapshot.
    pub written: bool,
}

impl Standing {
    /// Of a volume of 8 sectors in its first epoch that has nothing, for tests to change.
    #[cfg(test)]
    pub(crate) fn blank(volume: Uuid, role: Role) -> Standing {
        Standing {
            volume,
            lineage: None,
            epoch: Epoch {
                number: 1,
                owner: volume,
                since: 0,
            },
            role,
            chunk: ChunkShift::MIN,
            length: Sectors(8),
            held: Vec::new(),
            hold: None,
            old_hold: None,
            origin: None,
            partial: None,
            written: false,
        }
    }

    /// A snapshot or bookmark of this id.
    #[must_use]
    pub fn find(&self, id: Uuid) -> Option<&Held> {
        self.held.iter().find(|held| held.id == id)
    }

    /// Whether the data of this snapshot is here.
    #[must_use]
    pub fn has_data(&self, id: Uuid) -> bool {
        self.find(id).is_some_and(|held| held.data)
    }

    /// The newest snapshot with data.
    #[must_use]
    pub fn newest(&self) -> Option<&Held> {
        self.held.iter().rev().find(|held| held.data)
    }

    /// Whether nothing was ever received or taken here.
    #[must_use]
    pub fn is_blank(&self) -> bool {
        self.held.is_empty() && self.lineage.is_none()
    }

    /// Appends it as bytes.
    pub fn encode(&self, put: &mut Put) {
        put.uuid(Some(self.volume)).uuid(self.lineage);
        put.u64(self.epoch.number).uuid(Some(self.epoch.owner));
        put.u64(self.epoch.since);
        put.u8(self.role as u8).u8(self.chunk.get());
        put.u8(self.written.into());
        put.u64(self.length.0);
        put.uuid(self.hold).uuid(self.old_hold).uuid(self.origin);
        match &self.partial {
            None => put.u8(0),
            Some(partial) => {
                put.u8(1).uuid(Some(partial.snapshot)).uuid(partial.base);
                put.u64(partial.position).u8(partial.plain.into())
            }
        };
        let skip = self.held.len().saturating_sub(MAX_HELD);
        let held = &self.held[skip..];
        put.u32(held.len() as u32);
        for one in held {
            one.encode(put);
        }
    }

    /// Reads it back.
    ///
    /// # Errors
    /// The bytes are none.
    pub fn decode(take: &mut Take<'_>) -> Result<Standing, WireError> {
        let volume = take.some_uuid("the volume's UUID")?;
        let lineage = take.uuid()?;
        let number = take.u64()?;
        if number > MAX_EPOCH {
            let what = "the epoch";
            return Err(WireError::Value {
                what,
                found: number,
            });
        }
        let epoch = Epoch {
            number,
            owner: take.some_uuid("the epoch's owner")?,
            since: take.u64()?,
        };
        let role = match take.u8()? {
            1 => Role::Master,
            2 => Role::Replica,
            other => {
                return Err(WireError::Value {
                    what: "the role",
                    found: other.into(),
                });
            }
        };
        let shift = take.u8()?;
        let chunk = ChunkShift::new(shift).ok_or(WireError::Value {
            what: "the chunk size",
            found: shift.into(),
        })?;
        let written = take.flag("the mark of foreign writes")?;
        let length = take_length(take)?;
        let (hold, old_hold, origin) = (take.uuid()?, take.uuid()?, take.uuid()?);
        let partial = match take.flag("the mark of a copy under way")? {
            false => None,
            true => Some(Partial {
                snapshot: take.some_uuid("the snapshot under way")?,
                base: take.uuid()?,
                position: take.u64()?,
                plain: take.flag("the mark of a doubtful base")?,
            }),
        };
        let count = take.u32()? as usize;
        if count > MAX_HELD {
            return Err(WireError::Value {
                what: "the number of snapshots",
                found: count as u64,
            });
        }
        let mut held = Vec::with_capacity(count.min(take.rest().len() / HELD_BYTES));
        for _ in 0..count {
            held.push(decode_held(take)?);
        }
        Ok(Standing {
            volume,
            lineage,
            epoch,
            role,
            chunk,
            length,
            held,
            hold,
            old_hold,
            origin,
            partial,
            written,
        })
    }
}

/// Reads one snapshot or bookmark.
pub(super) fn decode_held(take: &mut Take<'_>) -> Result<Held, WireError> {
    Ok(Held {
        id: take.some_uuid("a snapshot's UUID")?,
        number: take.u32()?,
        taken: take.u64()?,
        length: take_length(take)?,
        data: take.flag("the mark of data")?,
    })
}

/// Reads a length that a device may have.
pub(super) fn take_length(take: &mut Take<'_>) -> Result<Sectors, WireError> {
    let found = take.u64()?;
    if found > Sectors::MAX.0 {
        let what = "a length";
        return Err(WireError::Value { what, found });
    }
    Ok(Sectors(found))
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (of volume {})", self.number, self.owner)
    }
}
