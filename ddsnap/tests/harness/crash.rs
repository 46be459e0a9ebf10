// SPDX-License-Identifier: GPL-2.0-only
//! The power goes off after every single write and flush of a random workload; the store is opened
//! again, and every snapshot must read what the model says.

use ddsnap::device::BlockDevice;
use ddsnap::device::fault::{Call, Faults, FaultyDevice};
use ddsnap::device::memory::{Event, Machine, Moment, Rng, Survival};
use ddsnap::store::{Devices, OpenOptions, Opened, SnapState, Store, StoreError};
use ddsnap::units::Chunk;

use super::check::{check_all, heal, locate};
use super::model::Model;
use super::repair::{self, Damage, Refusal};
use super::shape::{DATA, META, ORIGIN, Shape};
use super::volume::Volume;
use super::workload::{Step, choose_any};

/// Cuts in a recovery, in the recovery from that, and so on.
const MAX_DEPTH: u32 = 3;
/// One power cut in so many leaves a damaged store, to be repaired.
const REPAIRED_ONE_IN: u64 = 20;
/// Power cuts in a repair.
const CUTS_IN_REPAIR: u64 = 3;

/// What a run did.
#[derive(Clone, Copy, Default, Debug)]
pub struct Totals {
    /// Power cuts, each with all that came back checked.
    pub points: u64,
    /// Of these, cuts in a recovery.
    pub recovery_points: u64,
    /// Of these, cuts in a repair.
    pub repair_points: u64,
    /// Repairs that came to their end, and those refused for lack of room.
    pub repairs: u64,
    pub repairs_refused: u64,
    pub steps: u64,
    pub operations: u64,
    /// Times the workload went on with what a cut had left.
    pub continued: u64,
    /// Recoveries that left a part of a record out.
    pub dropped: u64,
    pub resizes: u64,
    pub reverts: u64,
}

/// A workload under way.
pub struct CrashRun {
    rng: Rng,
    volume: Volume,
    totals: Totals,
    wanted: u64,
    /// A flush may have been done that did nothing.
    lied: bool,
    step: Option<Step>,
    /// Print each step, to see what led to a loss.
    pub trace: bool,
}

/// A kind of crash; of those that only the process does not outlive, one whose writes become durable.
fn survival(shape: &Shape, rng: &mut Rng) -> Survival {
    // Chunks shorter than a physical sector share it with others: that is not survived.
    let physical = match shape.chunk_bytes >= 4096 && rng.chance(50) {
        true => 4096,
        false => 512,
    };
    let percent = [10, 50, 90][rng.below(3) as usize];
    match rng.below(12) {
        0 => Survival::None,
        1 => Survival::All,
        2 | 3 => Survival::ProcessKilled,
        4 => Survival::Writes(50),
        5 => Survival::Writes(90),
        6..=8 => Survival::Sectors(percent),
        9 | 10 => Survival::Torn { percent, physical },
        _ => Survival::Garbage { percent, physical },
    }
}

/// Fails one of the next calls of the store's devices.
fn faulty(shape: &Shape, machine: &Machine, rng: &mut Rng) -> Devices {
    let faults = Faults::default();
    let call = match rng.chance(50) {
        true => Call::Write,
        false => Call::Flush,
    };
    faults.fail(call, rng.below(8));
    let device = |disk| Box::new(FaultyDevice::new(machine.device(disk), faults.clone()));
    Devices {
        origin: Box::new(machine.device(ORIGIN)),
        data: device(DATA),
        meta: (shape.meta_bytes > 0).then(|| device(META) as Box<dyn BlockDevice>),
    }
}

impl CrashRun {
    /// A run of so many points.
    pub fn new(shape: Shape, seed: u64, points: u64) -> Self {
        CrashRun {
            rng: Rng::new(seed ^ shape.chunk_bytes),
            volume: Volume::new(shape),
            totals: Totals::default(),
            wanted: points,
            lied: false,
            step: None,
            trace: false,
        }
    }

    pub fn totals(&self) -> Totals {
        let (resizes, reverts) = (self.volume.resizes, self.volume.reverts);
        Totals {
            resizes,
            reverts,
            ..self.totals
        }
    }

    /// Where the run is, for who looks into a loss.
    pub fn place(&self) -> String {
        format!(
            "step {} {:?}, point {}",
            self.totals.steps, self.step, self.totals.points
        )
    }

    /// Runs all points.
    ///
    /// # Errors
    /// What was lost. What the store refuses to do without a crash is a panic.
    pub fn run(&mut self) -> Result<(), String> {
        self.warm_up();
        while self.totals.points < self.wanted {
            let step = self.choose();
            let before = self.volume.model.clone();
            self.volume.prepare(&step);
            let mut moment = self.volume.machine.moment();
            self.volume.machine.record();
            self.volume.apply(&step);
            let events = self.volume.machine.recorded();
            // One point before the first event, and one behind each.
            for done in 0..=events.len() {
                if done > 0 {
                    moment.advance(&events[done - 1]);
                }
                self.point(&moment, &events[done..], &before)?;
                if self.rng.below(REPAIRED_ONE_IN) == 0 {
                    self.repair_point(&moment, &before)
                        .map_err(|problem| format!("repair: {problem}"))?;
                }
            }
            settle(&mut self.volume.model, &events);
            if self.rng.chance(10) {
                self.go_on_from_a_crash()?;
            }
        }
        Ok(())
    }

    /// Gives the volume a history of its own, so that runs do not all begin with an empty store.
    fn warm_up(&mut self) {
        for _ in 0..self.rng.below(300) {
            let step = self.choose();
            self.volume.machine.record();
            self.volume.apply(&step);
            settle(&mut self.volume.model, &self.volume.machine.recorded());
        }
    }

    fn choose(&mut self) -> Step {
        let step = choose_any(&mut self.rng, &mut self.volume);
        self.totals.steps += 1;
        self.totals.operations += step.operations();
        self.step = Some(step.clone());
        if self.trace {
            eprintln!("{}", self.place());
        }
        step
    }

    /// The power goes at this moment, before `later`, and sometimes again while the store recovers, or in what
    /// is done next; what comes back must be one of the two models.
    fn point(&mut self, moment: &Moment, later: &[Event], before: &Model) -> Result<(), String> {
        let shape = self.volume.shape;
        let mut moment = moment.clone();
        let mut survival = survival(&shape, &mut self.rng);
        if survival == Survival::ProcessKilled {
            moment.land(later, &mut self.rng);
            if self.rng.chance(30) {
                survival = Survival::FlushFailed;
            }
        }
        let mut cut = moment.cut(survival, &mut self.rng);
        // What the origin lost although a flush of it was done: that may look like a foreign write.
        self.lied = survival == Survival::FlushFailed;
        let mut crashes = vec![survival];
        let mut depth = 0;
        while self.totals.points < self.wanted {
            self.totals.points += 1;
            self.totals.recovery_points += u64::from(depth > 0);
            let start = cut.moment();
            cut.record();
            let reopened = if depth < MAX_DEPTH && self.rng.chance(10) {
                // A device fails, in opening or in what comes next.
                let devices = faulty(&shape, &cut, &mut self.rng);
                let options = OpenOptions { cache_bytes: 0 };
                let store = Store::open(devices, &options).map(|(store, _)| store);
                store.map(Some).or(Ok(None))
            } else {
                self.reopen(&cut, before).map(Some)
            };
            let store = reopened.map_err(|problem| match depth {
                0 => problem,
                _ => format!("after {crashes:?}: {problem}"),
            })?;
            if let Some(mut store) = store {
                // A change that changes nothing, so that a record follows.
                let snapshot = store.snapshots().pop();
                if let Some(snapshot) = snapshot {
                    let _ = store.set_priority(snapshot.tag, snapshot.priority);
                }
                // A whole checkpoint, which uses again what the last one freed.
                if self.rng.chance(40) {
                    let _ = store.close();
                }
            }
            let events = cut.recorded();
            depth += 1;
            if depth > MAX_DEPTH || !self.rng.chance(35) {
                break;
            }
            let mut moment = start;
            let upto = match self.rng.chance(30) {
                true => events.len(),
                false => self.rng.below(events.len() as u64 + 1) as usize,
            };
            events[..upto]
                .iter()
                .for_each(|event| moment.advance(event));
            let survival = self::survival(&shape, &mut self.rng);
            crashes.push(survival);
            if survival == Survival::ProcessKilled {
                moment.land(&events[upto..], &mut self.rng);
            }
            cut = moment.cut(survival, &mut self.rng);
        }
        Ok(())
    }

    /// The power goes at this moment, and what a repair needs not to lose is damaged besides.
    fn repair_point(&mut self, moment: &Moment, before: &Model) -> Result<(), String> {
        let shape = self.volume.shape;
        self.lied = false;
        let machine = moment.cut(repair::survival(&mut self.rng), &mut self.rng);
        let Some(damage) = Damage::choose(&shape, &machine, &mut self.rng) else {
            return Ok(());
        };
        let mut damaged = machine.moment();
        machine.record();
        match repair::mend(&shape, &machine) {
            Ok(true) => self.totals.repairs += 1,
            Ok(false) => return Err("the damage was not noticed".to_owned()),
            Err(Refusal::Wrong(problem)) => return Err(problem),
            Err(Refusal::NoRoom) => {
                // Then the store is as it was.
                self.totals.repairs_refused += 1;
                damage.undo(&machine);
                return self.reopen(&machine, before).map(drop);
            }
        }
        let events = machine.recorded();
        self.reopen(&machine, before)?;
        let mut cuts: Vec<usize> = (0..CUTS_IN_REPAIR)
            .map(|_| self.rng.below(events.len() as u64 + 1) as usize)
            .collect();
        cuts.sort_unstable();
        let mut done = 0;
        for upto in cuts {
            if self.totals.points == self.wanted {
                break;
            }
            let between = &events[done..upto];
            between.iter().for_each(|event| damaged.advance(event));
            done = upto;
            self.totals.points += 1;
            self.totals.repair_points += 1;
            let machine = damaged.cut(repair::survival(&mut self.rng), &mut self.rng);
            match repair::mend(&shape, &machine) {
                Ok(_) => drop(self.reopen(&machine, before)?),
                Err(Refusal::NoRoom) => return Err("no room after a power cut".to_owned()),
                Err(Refusal::Wrong(problem)) => {
                    return Err(format!("after {upto} events of another: {problem}"));
                }
            }
        }
        Ok(())
    }

    fn reopen(&mut self, machine: &Machine, before: &Model) -> Result<Store, String> {
        let (mut store, opened) = self.open(machine)?;
        self.totals.dropped += opened.dropped_records;
        let after = &self.volume.model;
        check_all(&self.volume.shape, machine, &mut store, before, after)?;
        if self.totals.points % 4 == 0 {
            store
                .audit(true)
                .map_err(|error| format!("audit: {error}"))?;
        }
        Ok(store)
    }

    fn open(&self, machine: &Machine) -> Result<(Store, Opened), String> {
        let opened = match self.volume.shape.open(machine) {
            Err(StoreError::Foreign { .. }) if self.lied => self.volume.shape.accept(machine),
            opened => opened,
        };
        opened.map_err(|error| {
            let cause = std::error::Error::source(&error)
                .map(|cause| format!(": {cause}"))
                .unwrap_or_default();
            format!("open: {error}{cause}")
        })
    }

    /// Cuts the power now and goes on with what is left, which is the model's truth from here on.
    fn go_on_from_a_crash(&mut self) -> Result<(), String> {
        self.totals.continued += 1;
        self.lied = false;
        self.volume.fit_disks();
        let survival = survival(&self.volume.shape, &mut self.rng);
        let machine = self.volume.machine.moment().cut(survival, &mut self.rng);
        let (mut store, _) = self.open(&machine)?;
        let model = &mut self.volume.model;
        check_all(&self.volume.shape, &machine, &mut store, model, model)
            .map_err(|problem| format!("going on: {problem}"))?;
        let mut buffer = vec![0; self.volume.shape.chunk_bytes as usize];
        for (index, chunk) in model.origin.iter_mut().enumerate() {
            let place = (
                ORIGIN,
                Chunk(index as u64).to_offset(self.volume.shape.shift()),
            );
            heal(&machine, place, &chunk.now, &mut buffer[..chunk.now.len()]);
            chunk.found(&buffer);
        }
        for (&tag, snapshot) in &mut model.snapshots {
            if snapshot.state != SnapState::Live {
                continue;
            }
            for (index, chunk) in snapshot.chunks.iter_mut().enumerate() {
                let index = Chunk(index as u64);
                let place = locate(&self.volume.shape, &mut store, tag, index)?;
                heal(&machine, place, &chunk.now, &mut buffer[..chunk.now.len()]);
                chunk.found(&buffer);
            }
        }
        // What a killed process wrote and did not flush may still be lost; what was there when the
        // power came back may not.
        if survival != Survival::ProcessKilled {
            model.settle_origin();
            model.settle_store();
        }
        model.forget_devices();
        self.volume.machine = machine;
        self.volume.store = store;
        self.volume.after_reopen();
        Ok(())
    }
}

/// Tells the model what the flushes among the events made durable for sure.
fn settle(model: &mut Model, events: &[Event]) {
    // A write behind the last flush is not durable; so only a flush that comes last counts.
    let last_write = |disk: usize| {
        events.iter().rposition(
            |event| matches!(event, Event::Write { disk: written, .. } if *written == disk),
        )
    };
    let last_flush = |disk: usize| {
        events
            .iter()
            .rposition(|event| matches!(event, Event::Flush { disk: flushed } if *flushed == disk))
    };
    if last_flush(ORIGIN) > last_write(ORIGIN) {
        model.settle_origin();
    }
    if last_flush(DATA) > last_write(DATA) {
        model.settle_store();
    }
}
