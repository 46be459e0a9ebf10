// SPDX-License-Identifier: GPL-2.0-only
//! Whether the number of live snapshots costs anything: copy-outs with 1 to 4,096 of them, on stores
//! with the same exceptions, spread over as many snapshots as there are.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

use super::figure::{Figure, Goal};
use super::program::{Numbers, Program};
use super::{Files, Scale, copyout};
use crate::ui::Step;

const SNAPSHOTS: [u32; 4] = [1, 64, 1000, MOST];
/// The most that a store can have.
const MOST: u32 = 4096;
const DEPTHS: [u64; 3] = [1, 32, 256];
/// Flat: within this of the speed with one snapshot.
const FLAT: f64 = 0.95;

/// Measures copy-outs with each number of snapshots in turn, and creating and deleting with the most.
pub fn measure(
    program: &Program,
    files: &Files,
    scale: &Scale,
    figures: &mut Vec<Figure>,
) -> Result<()> {
    copyout::lay_out(files, scale)?;
    let step = Step::start("copy-outs with 1 to 4096 live snapshots");
    let mut rounds = Vec::new();
    for number in 0..scale.rounds {
        let mut round = BTreeMap::new();
        // Another one first each time: the disk may speed up or tire in the course of a round.
        let order = SNAPSHOTS.into_iter().cycle().skip(number);
        for snapshots in order.take(SNAPSHOTS.len()) {
            step.note(&format!("{snapshots} snapshots"));
            let loads = DEPTHS.map(|depth| format!("random:{depth}")).join(",");
            let mut args = copyout::args("copyout", files, scale, &loads);
            args.push(format!("--snapshots={snapshots}"));
            args.push(format!("--preload={}", scale.preload));
            round.insert(snapshots, program.run(&args)?);
        }
        rounds.push(round);
    }
    for depth in DEPTHS {
        for snapshots in SNAPSHOTS.into_iter().skip(1) {
            let of = |what: &str| pairs(&rounds, snapshots, &format!("random/qd{depth}/{what}"));
            let name = format!("snapshots-{snapshots}/random/qd{depth}");
            let (value, one) = median(of("rate")?).context("no round was measured")?;
            let bound = (one, "with 1 snapshot");
            let goal = Goal::AtLeast(FLAT);
            figures.push(Figure::new(
                format!("copyout/{name}"),
                value,
                "1/s",
                bound,
                goal,
            ));
            // The disk's moods are not in this one.
            let (value, one) = median(of("processor_us")?).context("no round was measured")?;
            let bound = (one, "with 1 snapshot");
            figures.push(Figure::new(
                format!("processor/{name}"),
                value,
                "us/group",
                bound,
                Goal::None,
            ));
        }
    }
    for command in ["create", "delete"] {
        for (suffix, what) in [("", "median_ms"), ("/longest", "longest_ms")] {
            let pairs = pairs(&rounds, MOST, &format!("{command}/{what}"))?;
            let (value, _) = median(pairs).context("no round was measured")?;
            let name = format!("{command}/snapshots-4096{suffix}");
            figures.push(Figure::limited(name, value, "ms", 10.0));
        }
    }
    step.done("measured");
    copyout::remove(files)
}

/// In each round, the number with so many snapshots and the one with a single one.
fn pairs(rounds: &[BTreeMap<u32, Numbers>], snapshots: u32, name: &str) -> Result<Vec<(f64, f64)>> {
    let of = |round: &BTreeMap<u32, Numbers>, snapshots: u32| {
        let numbers = round
            .get(&snapshots)
            .context("a number of snapshots was left out")?;
        numbers.get(name)
    };
    let pair = |round| Ok((of(round, snapshots)?, of(round, 1)?));
    rounds.iter().map(pair).collect()
}

/// The pair whose ratio lies in the middle.
fn median(mut pairs: Vec<(f64, f64)>) -> Option<(f64, f64)> {
    pairs.sort_by(|a, b| (a.0 / a.1).total_cmp(&(b.0 / b.1)));
    let middle = pairs.len().checked_sub(1)? / 2;
    Some(pairs[middle])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_pair_is_the_one_of_the_middle_ratio() {
        let pairs = vec![(1.0, 10.0), (9.0, 10.0), (5.0, 20.0)];
        assert_eq!(median(pairs), Some((5.0, 20.0)));
        assert_eq!(median(Vec::new()), None);
    }
}
