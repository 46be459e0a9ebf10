// SPDX-License-Identifier: GPL-2.0-only
//! Finding everything that is wrong with a store, without a server and without writing.
//!
//! Opening refuses at the first contradiction; this goes on and names each. It starts where opening does,
//! with the newest whole superblock, replays the journal in memory by the same code, and then proves the
//! whole against itself ([`prove`]). The tests prove a running store by the same code ([`Store::audit`]).
//!
//! The origin need not be given. It is asked in one case only: a copy of the last journal record that does
//! not have its checksum was either never acknowledged or damaged, and the origin alone can tell.

mod problem;
mod prove;
mod repair;
mod walk;

pub use problem::{Place, Problem, Severity};
pub use prove::Event;
pub use repair::{Repaired, repair};

use super::behind::{Behind, Gap};
use super::error::StoreError;
use super::media::{Devices, Media};
use super::no_origin::NoOrigin;
use super::open::{check_devices, choose, load_state, read_copies};
use super::state::State;
use super::{Opened, Store, recover};
use crate::device::BlockDevice;
use crate::format::FormatError;
use crate::format::journal::Entry;
use crate::format::snaptable::State as SnapshotState;
use crate::format::superblock::Superblock;
use crate::units::{MetaBlock, SnapSeq, SnapTag, StoreChunk};
use prove::{Proof, Report, each_entry, mendable, previous, prove, served_keepers, tags};
use walk::sentence;

/// The devices of a store that is to be checked.
pub struct CheckDevices {
    /// Holds the snapshots' data, and the metadata if it has no device of its own.
    pub data: Box<dyn BlockDevice>,
    /// Holds superblock, journal and index, if not on the data device.
    pub meta: Option<Box<dyn BlockDevice>>,
    /// The volume, if it is known.
    pub origin: Option<Box<dyn BlockDevice>>,
}

/// How to check.
#[derive(Clone, Copy, Debug)]
pub struct CheckOptions {
    /// The most memory for cached index nodes.
    pub cache_bytes: u64,
    /// Whether the data of every exception is read and compared with its checksum.
    pub data: bool,
}

/// What a check found, in numbers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Checked {
    /// Problems reported.
    pub problems: u64,
    /// Of these, those that lost something.
    pub losses: u64,
    /// Of these, those that only the origin can decide.
    pub undecided: u64,
    /// Snapshots that are live or squashed.
    pub snapshots: u64,
    /// Store chunks with an owner.
    pub used_chunks: u64,
    /// Metadata blocks with an owner.
    pub used_blocks: u64,
    /// Records of the journal that were replayed in memory.
    pub replayed_records: u64,
    /// Snapshots that are doubtful: no problem of the store, and no repair changes it.
    pub doubtful: Vec<SnapTag>,
}

impl Checked {
    fn count(&mut self, event: &Event) {
        if let Event::Problem(problem) = event {
            self.problems += 1;
            self.losses += u64::from(problem.severity == Severity::Loss);
            self.undecided += u64::from(problem.severity == Severity::Undecided);
        }
    }

    fn note(&mut self, examined: &Examined) {
        self.snapshots = examined.state.snapshots.visible() as u64;
        self.used_chunks = examined.proof.owned.count;
        self.used_blocks = examined.proof.blocks.total() - examined.proof.blocks.free();
        self.replayed_records = examined.opened.replayed_records;
        let snapshots = examined.state.snapshots.iter();
        let doubtful = snapshots.filter(|s| s.doubtful && s.state != SnapshotState::Deleted);
        self.doubtful = doubtful.map(|s| s.tag).collect();
    }
}

/// Checks a store and reports everything that is wrong with it. Nothing is written.
///
/// # Errors
/// There is no store, or the devices do not belong to it; or those of `report`.
pub fn check(
    devices: CheckDevices,
    options: &CheckOptions,
    report: &mut dyn FnMut(Event) -> Result<(), StoreError>,
) -> Result<Checked, StoreError> {
    let mut checked = Checked::default();
    let examined = examine(devices, options, &mut |event| {
        checked.count(&event);
        report(event)
    })?;
    checked.note(&examined);
    Ok(checked)
}

impl Store {
    /// Proves the open store against itself; with `data` also the data of every exception.
    ///
    /// # Errors
    /// [`StoreError::Inconsistent`] for the first problem; or a device fails.
    pub fn audit(&mut self, data: bool) -> Result<(), StoreError> {
        let (superblock, state) = (&self.superblock, &mut self.state);
        prove(
            &mut self.media,
            superblock,
            state,
            data,
            &mut |event| match event {
                Event::Progress(..) | Event::GivesUp(_) => Ok(()),
                Event::Problem(problem) => Err(StoreError::Inconsistent {
                    device: problem.device.clone(),
                    problem: problem.to_string(),
                }),
            },
        )
        .map(drop)
    }
}

/// A store in memory, as far as it can be read, and all that is known of it.
struct Examined {
    media: Media,
    superblock: Superblock,
    /// The copy on disk that is not this one.
    stale_copy: Option<usize>,
    state: State,
    opened: Opened,
    proof: Proof,
}

fn examine(
    devices: CheckDevices,
    options: &CheckOptions,
    report: &mut Report<'_>,
) -> Result<Examined, StoreError> {
    let asked = devices.origin.is_some();
    let mut devices = Devices {
        origin: devices.origin.unwrap_or_else(|| Box::new(NoOrigin)),
        data: devices.data,
        meta: devices.meta,
    };
    let copies = read_copies(&mut devices);
    let device = devices.meta.as_deref().unwrap_or(&*devices.data);
    let name = device.name().to_owned();
    let (superblock, stale_copy) = choose(&name, copies.clone())?;
    check_devices(&mut devices, &superblock)?;
    compare_copies(&name, &copies, report)?;
    let mut media = Media::new(devices, &superblock, options.cache_bytes);
    let mut state = load_state(&mut media, &superblock, &mut |error| {
        let place = match &error {
            StoreError::Damaged { block, .. } => Place::Block(MetaBlock(*block)),
            _ => Place::Store,
        };
        let what = format!("{}; snapshots may be lost", sentence(&error));
        report(event(&name, place, what, Severity::Loss))
    })?;
    // A sequence is never given twice, whatever the superblock says.
    if let Some(newest) = state.snapshots.iter().next_back() {
        state.next_seq = state.next_seq.max(SnapSeq(newest.seq.0 + 1));
    }
    let opened = replay(&mut media, &superblock, &mut state, asked, report)?;
    let proof = prove(&mut media, &superblock, &mut state, options.data, report)?;
    Ok(Examined {
        media,
        superblock,
        stale_copy,
        state,
        opened,
        proof,
    })
}

fn event(device: &str, place: Place, what: String, severity: Severity) -> Event {
    Event::Problem(Problem {
        device: device.to_owned(),
        place,
        what,
        severity,
        snapshots: Vec::new(),
    })
}

fn compare_copies(
    device: &str,
    copies: &[Result<Superblock, FormatError>; 2],
    report: &mut Report<'_>,
) -> Result<(), StoreError> {
    for (copy, found) in (0..).zip(copies) {
        if let Err(error) = found {
            let place = Place::Superblock(copy);
            report(mendable(device.to_owned(), place, error.to_string()))?;
        }
    }
    let [Ok(first), Ok(second)] = copies else {
        return Ok(());
    };
    // One copy is written when the other is durable: a power cut leaves it one step behind.
    let (copy, what) = if first.generation == second.generation {
        if first == second {
            return Ok(());
        }
        (
            1,
            "it has the generation of copy 0, but not its content".to_owned(),
        )
    } else if first.generation.abs_diff(second.generation) == 1 {
        return Ok(());
    } else {
        let (copy, old, new) = match first.generation < second.generation {
            true => (0, first.generation, second.generation),
            false => (1, second.generation, first.generation),
        };
        let what = format!("it is of generation {old}, the other copy of {new}");
        (copy, what)
    };
    report(mendable(device.to_owned(), Place::Superblock(copy), what))
}

/// Takes out of the index what was removed by records that are lost: others own those chunks now.
fn drop_old_owners(
    media: &mut Media,
    superblock: &Superblock,
    state: &mut State,
    behind: &Behind,
) -> Result<(), StoreError> {
    if !behind.claims_any() {
        return Ok(());
    }
    for index in [&mut state.exceptions, &mut state.overlays] {
        let (kind, mut gone) = (index.kind, Vec::new());
        each_entry(media, superblock, index, &mut |_, key, value| {
            if !behind.owns(kind, key, StoreChunk(value.place)) {
                gone.push(key);
            }
            Ok(())
        })?;
        gone.into_iter().for_each(|key| index.remove(key));
    }
    Ok(())
}

/// Replays the journal as far as it can be read.
fn replay(
    media: &mut Media,
    superblock: &Superblock,
    state: &mut State,
    asked: bool,
    report: &mut Report<'_>,
) -> Result<Opened, StoreError> {
    let mut opened = Opened {
        clean: superblock.clean,
        replayed_records: 0,
        dropped_records: 0,
        origin: superblock.origin,
        foreign: None,
    };
    let mut unwritten = Vec::new();
    let mut behind = Behind::default();
    let replayed = recover::replay(
        media,
        superblock,
        state,
        &mut opened,
        &mut recover::Damage::GoOn(&mut behind),
        &mut |media, entry| {
            let gone = asked && recover::ask_origin(media, entry).is_ok();
            unwritten.extend((!gone).then_some(*entry));
            Ok(())
        },
    );
    drop_old_owners(media, superblock, state, &behind)?;
    let all: Vec<u64> = state.snapshots.keepers().map(|(seq, _)| seq).collect();
    for Gap { what, keepers } in &behind.gaps {
        let kept = |seq: &u64| state.snapshots.is_keeper(*seq);
        let hurt: Vec<u64> = keepers.iter().copied().filter(kept).collect();
        report(Event::Problem(Problem {
            device: media.meta_name(),
            place: Place::Journal,
            what: format!("{}; what was recorded between is lost", sentence(what)),
            severity: Severity::Loss,
            snapshots: tags(&state.snapshots, &hurt),
        }))?;
    }
    let broken = match replayed {
        Err(error) => Some(format!(
            "{}; what was recorded after that is lost",
            sentence(&error)
        )),
        Ok(_) if superblock.clean && opened.replayed_records > 0 => {
            Some("the store was closed in order, but records follow".to_owned())
        }
        Ok(_) => None,
    };
    if let Some(what) = broken {
        report(Event::Problem(Problem {
            device: media.meta_name(),
            place: Place::Journal,
            what,
            severity: Severity::Loss,
            snapshots: tags(&state.snapshots, &all),
        }))?;
    }
    for entry in unwritten {
        let Entry::Exception {
            chunk, seq, place, ..
        } = entry
        else {
            continue;
        };
        let before = previous(media, &state.exceptions, (chunk.0, seq.0));
        let hurt = served_keepers(&state.snapshots, before, seq.0, chunk);
        let what = match asked {
            true => "but that data is damaged and the origin has changed".to_owned(),
            false => "but that data is not there: either it was never acknowledged and the origin \
                      still has it, or it is lost; this cannot be decided without the origin"
                .to_owned(),
        };
        report(Event::Problem(Problem {
            device: media.data_name(),
            place: Place::Chunk(place),
            what: format!("the last journal record saved origin chunk {chunk} here, {what}"),
            severity: match asked {
                true => Severity::Loss,
                false => Severity::Undecided,
            },
            snapshots: tags(&state.snapshots, &hurt),
        }))?;
    }
    Ok(opened)
}
