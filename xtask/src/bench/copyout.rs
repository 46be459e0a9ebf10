// SPDX-License-Identifier: GPL-2.0-only
//! Copy-outs a second against the disk's bound, at several queue depths.

use anyhow::{Context, Result};

use super::bound::Bound;
use super::figure::{Figure, Goal};
use super::program::Program;
use super::{Files, Scale, fio};
use crate::ui::Step;

const DEPTHS: [u64; 3] = [1, 32, 256];
/// The depth at which noting a change is compared with copying out.
const TRACKED: u64 = 32;
/// Neighbours in a run that is compared with as many single chunks: 1 MiB, as much as the kernel asks about at once.
const RUN: u64 = 64;
/// The share of the bound asked for, at the depths the project promises something for.
const GOAL: Goal = Goal::AtLeast(0.7);

/// One round: bound, engine, and the engine's device calls without an engine.
struct Round {
    bound: f64,
    rate: f64,
    raw: f64,
}

/// Measures every depth, at random places and in sequence.
pub fn measure(
    program: &Program,
    files: &Files,
    scale: &Scale,
    figures: &mut Vec<Figure>,
) -> Result<()> {
    lay_out(files, scale)?;
    for random in [true, false] {
        for depth in DEPTHS {
            one(program, files, scale, (random, depth), figures)?;
        }
    }
    run(program, files, scale, figures)?;
    track(program, files, scale, figures)?;
    remove(files)
}

/// Groups that are a run of neighbours against groups of single chunks, in the same minute.
fn run(program: &Program, files: &Files, scale: &Scale, figures: &mut Vec<Figure>) -> Result<()> {
    let step = Step::start(format!("copy-outs of runs of {RUN} neighbours"));
    let rate = |pattern: &str| -> Result<f64> {
        let numbers = program.run(&args("copyout", files, scale, &format!("{pattern}:{RUN}")))?;
        numbers.get(&format!("{pattern}/qd{RUN}/rate"))
    };
    let mut rounds = Vec::new();
    for _ in 0..scale.rounds {
        rounds.push(Round {
            bound: rate("random")?,
            rate: rate("runs")?,
            raw: 0.0,
        });
    }
    let round = median(rounds).context("no round was measured")?;
    step.done(&format!(
        "{:.0}/s, single chunks {:.0}/s",
        round.rate, round.bound
    ));
    figures.push(Figure::new(
        format!("run/qd{RUN}"),
        round.rate,
        "1/s",
        (round.bound, "single chunks"),
        Goal::AtLeast(4.0),
    ));
    Ok(())
}

/// First writes that only a bookmark needs to know of, against copy-outs in the same minute.
fn track(program: &Program, files: &Files, scale: &Scale, figures: &mut Vec<Figure>) -> Result<()> {
    let step = Step::start(format!(
        "changes noted for a bookmark, random, depth {TRACKED}"
    ));
    let load = format!("random:{TRACKED}");
    let rate = format!("random/qd{TRACKED}/rate");
    let mut rounds = Vec::new();
    for _ in 0..scale.rounds {
        let copies = args("copyout", files, scale, &load);
        let marks = [&copies[..], &["--bookmarks".to_owned()]].concat();
        rounds.push(Round {
            bound: program.run(&copies)?.get(&rate)?,
            rate: program.run(&marks)?.get(&rate)?,
            raw: 0.0,
        });
    }
    let round = median(rounds).context("no round was measured")?;
    step.done(&format!(
        "{:.0}/s, copy-outs {:.0}/s",
        round.rate, round.bound
    ));
    figures.push(Figure::new(
        format!("track/random/qd{TRACKED}"),
        round.rate,
        "1/s",
        (round.bound, "copy-outs"),
        Goal::AtLeast(4.0),
    ));
    Ok(())
}

/// Makes the origin's and the store's file.
pub fn lay_out(files: &Files, scale: &Scale) -> Result<()> {
    let step = Step::start("files for origin and store");
    fio::lay_out(&files.path("origin"), scale.origin_bytes)?;
    fio::lay_out(&files.path("store"), scale.store_bytes)?;
    step.done("written");
    Ok(())
}

/// Removes what [`lay_out`] made.
pub fn remove(files: &Files) -> Result<()> {
    files.remove("origin")?;
    files.remove("store")
}

fn one(
    program: &Program,
    files: &Files,
    scale: &Scale,
    (random, depth): (bool, u64),
    figures: &mut Vec<Figure>,
) -> Result<()> {
    let pattern = if random { "random" } else { "sequential" };
    let name = format!("{pattern}/qd{depth}");
    let step = Step::start(format!("copy-outs, {pattern}, depth {depth}"));
    let load = format!("{pattern}:{depth}");
    let mut rounds = Vec::new();
    for _ in 0..scale.rounds {
        // The disk's speed drifts: what is compared is measured in turn.
        let (origin, store) = (files.path("origin"), files.path("store"));
        let bound = Bound::measure(&origin, &store, random, depth, scale.seconds)?;
        step.note(&bound.to_string());
        let numbers = program.run(&args("copyout", files, scale, &load))?;
        let raw = program.run(&args("raw", files, scale, &load))?;
        rounds.push(Round {
            bound: bound.rate(),
            rate: numbers.get(&format!("{name}/rate"))?,
            raw: raw.get(&format!("{name}/rate"))?,
        });
    }
    let round = median(rounds).context("no round was measured")?;
    let bound = (round.bound, "the disk's");
    let goal = if depth == 256 { Goal::None } else { GOAL };
    let value = format!("{:.0} of {:.0}/s", round.rate, round.bound);
    figures.push(Figure::new(
        format!("copyout/{name}"),
        round.rate,
        "1/s",
        bound,
        goal,
    ));
    figures.push(Figure::new(
        format!("raw/{name}"),
        round.raw,
        "1/s",
        bound,
        Goal::None,
    ));
    step.done(&value);
    Ok(())
}

/// Arguments of the measuring program for one load.
pub fn args(what: &str, files: &Files, scale: &Scale, loads: &str) -> Vec<String> {
    vec![
        what.to_owned(),
        format!("--origin={}", files.path("origin").display()),
        format!("--store={}", files.path("store").display()),
        format!("--seconds={}", scale.seconds),
        format!("--most={}", scale.most),
        format!("--loads={loads}"),
    ]
}

/// The round whose ratio lies in the middle.
fn median(mut rounds: Vec<Round>) -> Option<Round> {
    rounds.sort_by(|a, b| (a.rate / a.bound).total_cmp(&(b.rate / b.bound)));
    let middle = rounds.len().checked_sub(1)? / 2;
    Some(rounds.swap_remove(middle))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_by_ratio_and_keeps_a_round_together() {
        let round = |rate, bound| Round {
            bound,
            rate,
            raw: 0.0,
        };
        let rounds = vec![round(10.0, 100.0), round(90.0, 100.0), round(30.0, 60.0)];
        let middle = median(rounds).unwrap();
        assert!((middle.rate - 30.0).abs() < 1e-9 && (middle.bound - 60.0).abs() < 1e-9);
        assert!(median(Vec::new()).is_none());
    }
}
