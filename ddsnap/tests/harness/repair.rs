// SPDX-License-Identifier: GPL-2.0-only
//! After a power cut, damage that loses nothing: one copy of the superblock, or the space map. A repair
//! must bring everything back, also when the power goes in the middle of it.

use ddsnap::device::memory::{Machine, Rng, Survival};
use ddsnap::device::{BlockDevice, Read};
use ddsnap::format::BLOCK_LEN;
use ddsnap::format::superblock::{COPIES, Superblock};
use ddsnap::store::StoreError;
use ddsnap::store::check::{CheckDevices, CheckOptions, Repaired, repair};
use ddsnap::units::MetaBlock;

use super::shape::{DATA, META, ORIGIN, Shape};

const OPTIONS: CheckOptions = CheckOptions {
    cache_bytes: 16 * 4096,
    data: true,
};

/// Bytes of a disk before they were damaged.
pub struct Damage {
    disk: usize,
    offset: u64,
    old: Vec<u8>,
}

impl Damage {
    /// Damages the metadata; none if that would lose something.
    pub fn choose(shape: &Shape, machine: &Machine, rng: &mut Rng) -> Option<Damage> {
        let disk = if shape.meta_bytes > 0 { META } else { DATA };
        let read = |block: MetaBlock| {
            let mut bytes = vec![0; BLOCK_LEN];
            let (offset, into) = (block.to_offset(), &mut bytes[..]);
            machine
                .device(disk)
                .read(&mut [Read { offset, into }])
                .expect("read");
            bytes
        };
        let copies = [0, 1].map(|copy| Superblock::decode(&read(COPIES[copy]), copy as u32).ok());
        let block = if rng.chance(50) {
            let newest = copies
                .into_iter()
                .flatten()
                .max_by_key(|superblock| superblock.generation)?;
            newest.space.root?.0.block
        } else {
            // Of two whole copies each is enough, also between the writes of the one and the other.
            copies
                .iter()
                .all(Option::is_some)
                .then(|| COPIES[rng.below(2) as usize])?
        };
        let old = read(block);
        let at = rng.below(512) as usize;
        let mut new = old[..512].to_vec();
        new[at] ^= 1 << rng.below(8);
        machine.corrupt(disk, block.to_offset(), &new);
        Some(Damage {
            disk,
            offset: block.to_offset(),
            old,
        })
    }

    /// Puts back what was there.
    pub fn undo(&self, machine: &Machine) {
        machine.corrupt(self.disk, self.offset, &self.old);
    }
}

/// Repairs what was damaged so that nothing is lost. False if there was nothing to do.
///
/// # Errors
/// The repair gave something up, or failed for another reason than lack of room.
pub fn mend(shape: &Shape, machine: &Machine) -> Result<bool, Refusal> {
    let devices = CheckDevices {
        data: Box::new(machine.device(DATA)),
        meta: (shape.meta_bytes > 0)
            .then(|| Box::new(machine.device(META)) as Box<dyn BlockDevice>),
        origin: Some(Box::new(machine.device(ORIGIN))),
    };
    let mut problems = Vec::new();
    let repaired = repair(devices, &OPTIONS, &mut |event| {
        if let ddsnap::store::check::Event::Problem(problem) = event {
            problems.push(problem.to_string());
        }
        Ok(())
    });
    match repaired {
        Ok((_, Repaired::Sound)) => Ok(false),
        Ok((_, Repaired::Whole)) => Ok(true),
        Ok((_, other)) => Err(Refusal::Wrong(format!("{other:?}: {problems:?}"))),
        Err(StoreError::MetaExhausted { .. }) => Err(Refusal::NoRoom),
        Err(error) => Err(Refusal::Wrong(format!("{error}: {problems:?}"))),
    }
}

/// Why a repair did not bring everything back.
pub enum Refusal {
    /// There is no room for the new state beside the old.
    NoRoom,
    Wrong(String),
}

/// What survives a power cut while nothing but a repair is running.
pub fn survival(rng: &mut Rng) -> Survival {
    match rng.below(4) {
        0 => Survival::None,
        1 => Survival::All,
        2 => Survival::Writes(50),
        _ => Survival::Sectors(50),
    }
}
