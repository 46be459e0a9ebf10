// SPDX-License-Identifier: GPL-2.0-only
//! A long random workload with restarts, no crashes: contents, answers and the choice of victims must
//! be what a plain map says.

use std::collections::{BTreeMap, BTreeSet};

use ddsnap::device::memory::Rng;
use ddsnap::store::{Location, SnapState};
use ddsnap::units::{Chunk, SnapTag};

use super::check::check;
use super::model::Model;
use super::shape::Shape;
use super::volume::Volume;
use super::workload::{Step, choose};

/// Steps between two looks at everything.
const STEPS_BETWEEN_CHECKS: u64 = 64;

/// A workload under way.
pub struct OperationsRun {
    shape: Shape,
    rng: Rng,
    pub volume: Volume,
    pub operations: u64,
    steps: u64,
    step: Option<Step>,
}

impl OperationsRun {
    pub fn new(shape: Shape, seed: u64) -> Self {
        OperationsRun {
            shape,
            rng: Rng::new(seed),
            volume: Volume::new(shape),
            operations: 0,
            steps: 0,
            step: None,
        }
    }

    /// Where the run is, for who looks into a failure.
    pub fn place(&self) -> String {
        format!("step {} {:?}", self.steps, self.step)
    }

    /// Does so many operations, or a few more.
    ///
    /// # Errors
    /// What differs from the model. An answer that the model does not allow is a panic.
    pub fn run(&mut self, operations: u64) -> Result<(), String> {
        let end = self.operations + operations;
        while self.operations < end {
            self.one_step()?;
            if self.steps % STEPS_BETWEEN_CHECKS == 0 || self.operations >= end {
                self.look_at_everything()?;
            }
        }
        Ok(())
    }

    fn one_step(&mut self) -> Result<(), String> {
        let volume = &mut self.volume;
        let step = choose(
            &mut self.rng,
            &self.shape,
            &volume.model,
            &mut volume.next_tag,
        );
        self.steps += 1;
        self.operations += step.operations();
        self.step = Some(step.clone());
        let before = Entries::of(&volume.model);
        let (given_up, refused) = (volume.given_up, volume.refused_full);
        volume.apply(&step);
        if volume.given_up > given_up {
            before.victim_was_right(&volume.model)?;
        }
        if volume.refused_full > refused && matches!(step, Step::Group { .. }) {
            if let Some(tag) = Entries::of(&volume.model).victim() {
                return Err(format!("refused while snapshot {tag} could be given up"));
            }
        }
        Ok(())
    }

    fn look_at_everything(&mut self) -> Result<(), String> {
        let Volume {
            machine,
            store,
            model,
            ..
        } = &mut self.volume;
        check(&self.shape, machine, store, model, model)?;
        store
            .audit(true)
            .map_err(|error| format!("audit: {error}"))?;
        sharing_is_right(&mut self.volume, &self.shape)
    }
}

/// What the choice of a victim rests on: state, priority, use count and time of each snapshot.
struct Entries(BTreeMap<u32, (SnapState, i8, u16, i64)>);

impl Entries {
    fn of(model: &Model) -> Self {
        let entry = |s: &super::model::Snapshot| (s.state, s.priority, s.usecount, s.created);
        Entries(
            model
                .snapshots
                .iter()
                .map(|(&tag, s)| (tag, entry(s)))
                .collect(),
        )
    }

    /// The snapshot to give up: unused before used, least priority, oldest; never 127.
    fn victim(&self) -> Option<u32> {
        let live = self
            .0
            .iter()
            .filter(|(_, (state, priority, ..))| *state == SnapState::Live && *priority < 127);
        live.min_by_key(|(_, (_, priority, usecount, created))| {
            (*usecount > 0, *priority, *created)
        })
        .map(|(&tag, _)| tag)
    }

    /// Snapshots were given up: the first victim is gone, or squashed if it was in use.
    fn victim_was_right(&self, after: &Model) -> Result<(), String> {
        let first = self.victim().ok_or("gave up a snapshot in vain")?;
        let (_, _, usecount, created) = self.0[&first];
        let now = after.snapshots.get(&first);
        let now = now
            .filter(|now| now.created == created)
            .map(|now| now.state);
        match (now, usecount > 0) {
            (Some(SnapState::Squashed), true) | (None, false) => Ok(()),
            (Some(_), _) => Err(format!("spared snapshot {first}")),
            (None, true) => Err(format!("deleted snapshot {first}, which is in use")),
        }
    }
}

/// `sharing` counts each exception for every live snapshot that it serves: compare with asking for
/// each chunk of each snapshot where it lies.
fn sharing_is_right(volume: &mut Volume, shape: &Shape) -> Result<(), String> {
    let live: Vec<u32> = volume
        .store
        .snapshots()
        .iter()
        .filter(|s| s.state == SnapState::Live)
        .map(|s| s.tag.0)
        .collect();
    let mut users: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
    for &tag in &live {
        for chunk in 0..shape.origin_chunks {
            let location = volume
                .store
                .locate(SnapTag(tag), Chunk(chunk))
                .expect("locate")
                .expect("live");
            if let Location::Store(place) = location {
                users.entry(place.0).or_default().insert(tag);
            }
        }
    }
    let sharing: BTreeMap<_, _> = volume
        .store
        .count()
        .expect("count")
        .snapshots
        .into_iter()
        .collect();
    for &tag in &live {
        let seen = users.values().filter(|tags| tags.contains(&tag)).count() as u64;
        let counted: u64 = sharing[&SnapTag(tag)].shared_by.iter().sum();
        // An exception hidden by an overlay is counted too: its chunk is in use.
        if counted < seen || counted - seen > shape.origin_chunks {
            return Err(format!(
                "snapshot {tag} uses {seen} chunks, {counted} were counted"
            ));
        }
    }
    Ok(())
}
