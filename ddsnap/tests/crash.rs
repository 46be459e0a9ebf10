// SPDX-License-Identifier: GPL-2.0-only
//! The power goes off after every single write and flush of a random workload; the store is opened
//! again; every snapshot must read what the model says.
//!
//! Guards against: an origin write released before its old data is durable, records replayed that
//! were never whole or left out that were acknowledged, blocks or chunks used again too early,
//! superblocks torn between their copies.
//!
//! `DDSNAP_CRASH_SEED=n` repeats a run, `DDSNAP_CRASH_POINTS=n` asks for more points in each shape.

mod harness;

use ddsnap::device::memory::{Event, Machine, Moment, Rng, Survival};
use ddsnap::store::Store;
use ddsnap::units::Chunk;
use harness::model::Model;
use harness::volume::{self, DATA, ORIGIN, Shape, Volume, check};
use harness::{number_from_env, seed};

struct Run {
    shape: Shape,
    rng: Rng,
    volume: Volume,
    points: u64,
    wanted: u64,
}

#[derive(Default, Debug)]
struct Totals {
    points: u64,
    recovery_points: u64,
    steps: u64,
    continued: u64,
    dropped: u64,
}

fn survival(rng: &mut Rng) -> Survival {
    match rng.below(8) {
        0 => Survival::None,
        1 => Survival::All,
        2 => Survival::ProcessKilled,
        3 => Survival::Writes(50),
        4 => Survival::Writes(90),
        5 => Survival::Sectors(10),
        6 => Survival::Sectors(50),
        _ => Survival::Sectors(90),
    }
}

impl Run {
    fn new(shape: Shape, seed: u64, points: u64) -> Self {
        Run {
            shape,
            rng: Rng::new(seed ^ shape.chunk_bytes),
            volume: Volume::new(shape),
            points: 0,
            wanted: points,
        }
    }

    fn run(mut self) -> Totals {
        let mut totals = Totals::default();
        while self.points < self.wanted {
            let step = volume::choose(
                &mut self.rng,
                &self.shape,
                &self.volume.model,
                &mut self.volume.next_tag,
            );
            let before = self.volume.model.clone();
            let mut moment = self.volume.machine.moment();
            self.volume.machine.record();
            self.volume.apply(&step);
            let events = self.volume.machine.recorded();
            totals.steps += 1;
            // One point before the first event, and one behind each.
            for event in std::iter::once(None).chain(events.iter().map(Some)) {
                if let Some(event) = event {
                    moment.advance(event);
                }
                if let Err(problem) = self.point(&moment, &before, &mut totals) {
                    panic!(
                        "{}: step {} {step:?}, point {}: {problem}",
                        self.describe(),
                        totals.steps,
                        self.points
                    );
                }
            }
            settle(&mut self.volume.model, &events);
            if self.rng.chance(3) {
                self.go_on_from_a_crash(&mut totals);
            }
        }
        totals.points = self.points;
        totals
    }

    fn describe(&self) -> String {
        format!("DDSNAP_CRASH_SEED={} {:?}", seed(), self.shape)
    }

    /// The power goes at this moment; what comes back must be one of the two models.
    fn point(
        &mut self,
        moment: &Moment,
        before: &Model,
        totals: &mut Totals,
    ) -> Result<(), String> {
        self.points += 1;
        let machine = moment.cut(survival(&mut self.rng), &mut self.rng);
        let recovery = machine.moment();
        machine.record();
        let (mut store, opened) = self.open(&machine)?;
        let events = machine.recorded();
        totals.dropped += opened.dropped_records;
        check(
            &self.shape,
            &machine,
            &mut store,
            before,
            &self.volume.model,
        )?;
        if self.points % 4 == 0 {
            store
                .audit(true)
                .map_err(|error| format!("audit: {error}"))?;
        }
        if self.points % 3 == 0 {
            // A second cut, somewhere in the recovery.
            totals.recovery_points += 1;
            let mut moment = recovery;
            let upto = self.rng.below(events.len() as u64 + 1) as usize;
            events[..upto]
                .iter()
                .for_each(|event| moment.advance(event));
            let machine = moment.cut(survival(&mut self.rng), &mut self.rng);
            let (mut store, _) = self
                .open(&machine)
                .map_err(|error| format!("after a cut in recovery: {error}"))?;
            check(
                &self.shape,
                &machine,
                &mut store,
                before,
                &self.volume.model,
            )
            .map_err(|error| format!("after a cut in recovery: {error}"))?;
        }
        Ok(())
    }

    fn open(&self, machine: &Machine) -> Result<(Store, ddsnap::store::Opened), String> {
        self.shape.open(machine).map_err(|error| {
            let cause = std::error::Error::source(&error)
                .map(|cause| format!(": {cause}"))
                .unwrap_or_default();
            format!("open: {error}{cause}")
        })
    }

    /// Cuts the power now and goes on with what is left, which is the model's truth from here on.
    fn go_on_from_a_crash(&mut self, totals: &mut Totals) {
        totals.continued += 1;
        let machine = self
            .volume
            .machine
            .moment()
            .cut(survival(&mut self.rng), &mut self.rng);
        let (mut store, _) = self
            .open(&machine)
            .unwrap_or_else(|error| panic!("{}: {error}", self.describe()));
        let describe = self.describe();
        let model = &mut self.volume.model;
        check(&self.shape, &machine, &mut store, model, model)
            .unwrap_or_else(|error| panic!("{describe}: go on: {error}"));
        let mut buffer = vec![0; self.shape.chunk_bytes as usize];
        for (index, chunk) in model.origin.iter_mut().enumerate() {
            volume::read_origin(&self.shape, &machine, Chunk(index as u64), &mut buffer);
            // Unflushed writes that survived a killed process may still be lost: keep what was.
            if *buffer != *chunk.now {
                chunk.now = buffer.as_slice().into();
            }
        }
        let tags: Vec<u32> = model.snapshots.keys().copied().collect();
        for tag in tags {
            let Some(snapshot) = model.snapshots.get_mut(&tag) else {
                continue;
            };
            if snapshot.state != ddsnap::store::SnapState::Live {
                continue;
            }
            for (index, chunk) in snapshot.chunks.iter_mut().enumerate() {
                volume::read_snapshot(
                    &self.shape,
                    &machine,
                    &mut store,
                    tag,
                    Chunk(index as u64),
                    &mut buffer,
                )
                .expect("checked");
                if *buffer != *chunk.now {
                    chunk.now = buffer.as_slice().into();
                }
            }
        }
        self.volume.machine = machine;
        self.volume.store = store;
        self.volume.unique.fill(false);
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

fn run(shape: Shape, points: u64) {
    let points = number_from_env("DDSNAP_CRASH_POINTS", points);
    let start = std::time::Instant::now();
    let totals = Run::new(shape, seed(), points).run();
    println!(
        "seed={} {shape:?} {totals:?} losses=0 in {:?}",
        seed(),
        start.elapsed()
    );
    assert!(totals.continued > 0 && totals.recovery_points > 0);
}

#[test]
fn chunks_of_512_bytes() {
    run(
        Shape {
            chunk_bytes: 512,
            origin_chunks: 64,
            data_bytes: 700 << 10,
            meta_bytes: 0,
            snapshots: 8,
        },
        1500,
    );
}

#[test]
fn chunks_of_4_kib() {
    run(
        Shape {
            chunk_bytes: 4096,
            origin_chunks: 48,
            data_bytes: 1200 << 10,
            meta_bytes: 0,
            snapshots: 6,
        },
        1500,
    );
}

#[test]
fn chunks_of_4_kib_with_a_metadata_device() {
    run(
        Shape {
            chunk_bytes: 4096,
            origin_chunks: 48,
            data_bytes: 500 << 10,
            meta_bytes: 600 << 10,
            snapshots: 6,
        },
        1500,
    );
}

#[test]
fn chunks_of_16_kib() {
    run(
        Shape {
            chunk_bytes: 16 << 10,
            origin_chunks: 24,
            data_bytes: 2 << 20,
            meta_bytes: 0,
            snapshots: 6,
        },
        1000,
    );
}

#[test]
fn chunks_of_1_mib() {
    run(
        Shape {
            chunk_bytes: 1 << 20,
            origin_chunks: 5,
            data_bytes: 15 << 20,
            meta_bytes: 0,
            snapshots: 4,
        },
        200,
    );
}
