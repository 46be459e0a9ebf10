// SPDX-License-Identifier: GPL-2.0-only
//! Whether the number of live snapshots costs anything: copy-outs with 1 to 4,096 of them, on stores
//! with the same exceptions, spread over as many snapshots as there are.

use anyhow::{Context, Result};

use super::figure::{Figure, Goal};
use super::program::{Numbers, Program};
use super::{Files, Scale, copyout};
use crate::ui::Step;

const SNAPSHOTS: [u32; 4] = [1, 64, 1000, 4096];
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
    let step = Step::start("copy-outs with 1 to 4096 live snapshots");
    let mut rounds = Vec::new();
    for _ in 0..scale.rounds {
        let mut round = Vec::new();
        for snapshots in SNAPSHOTS {
            step.note(&format!("{snapshots} snapshots"));
            let loads = DEPTHS.map(|depth| format!("random:{depth}")).join(",");
            let mut args = copyout::args("copyout", files, scale, &loads);
            args.push(format!("--snapshots={snapshots}"));
            args.push(format!("--preload={}", scale.preload));
            round.push(program.run(&args)?);
        }
        rounds.push(round);
    }
    for depth in DEPTHS {
        for (index, snapshots) in SNAPSHOTS.into_iter().enumerate().skip(1) {
            let of = |what: &str| pairs(&rounds, index, &format!("random/qd{depth}/{what}"));
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
            let most = SNAPSHOTS.len() - 1;
            let pairs = pairs(&rounds, most, &format!("{command}/{what}"))?;
            let (value, _) = median(pairs).context("no round was measured")?;
            let name = format!("{command}/snapshots-4096{suffix}");
            figures.push(Figure::limited(name, value, "ms", 10.0));
        }
    }
    step.done("measured");
    Ok(())
}

/// In each round, the number for `index` of [`SNAPSHOTS`] and the one for a single snapshot.
fn pairs(rounds: &[Vec<Numbers>], index: usize, name: &str) -> Result<Vec<(f64, f64)>> {
    let pair = |round: &Vec<Numbers>| Ok((round[index].get(name)?, round[0].get(name)?));
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
