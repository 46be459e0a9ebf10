// SPDX-License-Identifier: GPL-2.0-only
//! A long random workload with restarts, no crashes: contents, answers and the choice of victims must
//! be what a plain map says.

use std::collections::{BTreeMap, BTreeSet};

use ddsnap::device::memory::Rng;
use ddsnap::store::{Location, SnapState};
use ddsnap::units::{Chunk, SnapTag};

use super::check::check_all;
use super::shape::Shape;
use super::volume::Volume;
use super::workload::{Step, choose_any, longest_origin};

/// Steps between two looks at everything.
const STEPS_BETWEEN_CHECKS: u64 = 64;

/// A workload under way.
pub struct OperationsRun {
    rng: Rng,
    pub volume: Volume,
    pub operations: u64,
    steps: u64,
    step: Option<Step>,
    /// Print each step, to see what led to a loss.
    pub trace: bool,
}

impl OperationsRun {
    pub fn new(shape: Shape, seed: u64) -> Self {
        let mut volume = Volume::new(shape);
        volume.checks_victims = true;
        OperationsRun {
            rng: Rng::new(seed),
            volume,
            operations: 0,
            steps: 0,
            step: None,
            trace: false,
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
        let step = choose_any(&mut self.rng, &mut self.volume);
        self.steps += 1;
        self.operations += step.operations();
        self.step = Some(step.clone());
        if self.trace {
            eprintln!("{}", self.place());
        }
        let volume = &mut self.volume;
        volume.apply(&step);
        if let Some(problem) = volume.problem.take() {
            return Err(problem);
        }
        Ok(())
    }

    fn look_at_everything(&mut self) -> Result<(), String> {
        let Volume {
            shape,
            machine,
            store,
            model,
            ..
        } = &mut self.volume;
        check_all(shape, machine, store, model, model)?;
        store
            .audit(true)
            .map_err(|error| format!("audit: {error}"))?;
        sharing_is_right(&mut self.volume)
    }
}

/// `sharing` counts each exception for every live snapshot that it serves: compare with asking for
/// each chunk of each snapshot where it lies.
fn sharing_is_right(volume: &mut Volume) -> Result<(), String> {
    let snapshots = volume.store.snapshots();
    let live = snapshots.iter().filter(|s| s.state == SnapState::Live);
    let shift = volume.shape.shift();
    let live: Vec<(u32, u64)> = live.map(|s| (s.tag.0, s.length.to_chunks(shift))).collect();
    let longest = longest_origin(&volume.first_shape);
    let mut users: BTreeMap<u64, BTreeSet<u32>> = BTreeMap::new();
    for &(tag, chunks) in &live {
        for chunk in 0..chunks {
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
    for &(tag, _) in &live {
        let seen = users.values().filter(|tags| tags.contains(&tag)).count() as u64;
        let counted: u64 = sharing[&SnapTag(tag)].shared_by.iter().sum();
        // An exception hidden by an overlay is counted too, for its chunk is in use; so is one of a
        // chunk that only longer snapshots have, for exceptions know sequences and not lengths.
        if counted < seen || counted - seen > longest {
            return Err(format!(
                "snapshot {tag} uses {seen} chunks, {counted} were counted"
            ));
        }
    }
    Ok(())
}
