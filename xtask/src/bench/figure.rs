// SPDX-License-Identifier: GPL-2.0-only
//! One measured number with what it is held against.

use anyhow::Result;
use serde::Serialize;

/// What is asked of the ratio of value to bound.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Goal {
    /// More is better: at least this.
    AtLeast(f64),
    /// Less is better: at most this.
    AtMost(f64),
    /// Nothing; it helps to read the others.
    None,
}

/// One figure. The JSON has what is not skipped.
#[derive(Clone, Debug, Serialize)]
pub struct Figure {
    /// As `copyout/random/qd32`.
    pub name: String,
    /// Measured.
    pub value: f64,
    /// Unit of value and bound.
    pub unit: &'static str,
    /// The disk's own speed, another program's time, or the most allowed.
    pub bound: Option<f64>,
    /// Value divided by bound.
    pub ratio: Option<f64>,
    /// What the bound is, for people.
    #[serde(skip)]
    pub against: &'static str,
    /// What is asked.
    #[serde(skip)]
    pub goal: Goal,
}

impl Figure {
    /// A figure with a bound.
    pub fn new(
        name: impl Into<String>,
        value: f64,
        unit: &'static str,
        (bound, against): (f64, &'static str),
        goal: Goal,
    ) -> Self {
        Figure {
            name: name.into(),
            value,
            unit,
            bound: Some(bound),
            ratio: Some(value / bound),
            against,
            goal,
        }
    }

    /// A number that must not exceed `most`.
    pub fn limited(name: impl Into<String>, value: f64, unit: &'static str, most: f64) -> Self {
        Figure::new(name, value, unit, (most, "the most"), Goal::AtMost(1.0))
    }

    /// Whether the goal was reached; none if there is none.
    pub fn met(&self) -> Option<bool> {
        let ratio = self.ratio?;
        match self.goal {
            Goal::AtLeast(least) => Some(ratio >= least),
            Goal::AtMost(most) => Some(ratio <= most),
            Goal::None => None,
        }
    }
}

/// The list as JSON.
pub fn json(figures: &[Figure]) -> Result<String> {
    let mut text = serde_json::to_string_pretty(figures)?;
    text.push('\n');
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_goal_is_met_in_its_direction() {
        let rate = |value| Figure::new("a", value, "1/s", (100.0, "disk"), Goal::AtLeast(0.7));
        assert_eq!(rate(70.0).met(), Some(true));
        assert_eq!(rate(69.0).met(), Some(false));
        assert_eq!(Figure::limited("b", 512.0, "B", 512.0).met(), Some(true));
        assert_eq!(Figure::limited("b", 513.0, "B", 512.0).met(), Some(false));
    }

    #[test]
    fn the_json_has_five_members_a_figure() {
        let figures = [Figure::new("x/y", 1.5, "1/s", (3.0, "disk"), Goal::None)];
        let value: serde_json::Value = serde_json::from_str(&json(&figures).unwrap()).unwrap();
        let expected = serde_json::json!([
            {"name": "x/y", "value": 1.5, "unit": "1/s", "bound": 3.0, "ratio": 0.5}
        ]);
        assert_eq!(value, expected);
    }
}
