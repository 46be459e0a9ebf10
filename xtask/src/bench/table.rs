// SPDX-License-Identifier: GPL-2.0-only
//! The figures as a table for people.

use super::figure::{Figure, Goal};

/// The table with a line on how the disk's bound is computed, if there is one.
pub fn render(figures: &[Figure], formula: Option<&str>) -> String {
    let heads = [
        "figure", "value", "unit", "bound", "ratio", "goal", "", "bound is",
    ];
    let mut rows: Vec<[String; 8]> = vec![heads.map(String::from)];
    rows.extend(figures.iter().map(row));
    let widths: Vec<usize> = (0..heads.len())
        .map(|column| {
            rows.iter()
                .map(|row| row[column].chars().count())
                .max()
                .unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
            // Numbers end in one column, text begins in one.
            if [1, 3, 4].contains(&column) {
                line.push_str(&format!("{cell:>width$}  "));
            } else {
                line.push_str(&format!("{cell:<width$}  "));
            }
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    if let Some(formula) = formula {
        text.push_str(&format!("the disk's bound: {formula}\n"));
    }
    text
}

fn row(figure: &Figure) -> [String; 8] {
    let goal = match figure.goal {
        Goal::AtLeast(least) => format!(">= {least}"),
        Goal::AtMost(most) => format!("<= {most}"),
        Goal::None => String::new(),
    };
    let met = match figure.met() {
        Some(true) => "met",
        Some(false) => "MISSED",
        None => "",
    };
    [
        figure.name.clone(),
        number(figure.value),
        figure.unit.to_owned(),
        figure.bound.map_or_else(String::new, number),
        figure
            .ratio
            .map_or_else(String::new, |ratio| format!("{ratio:.3}")),
        goal,
        met.to_owned(),
        figure.against.to_owned(),
    ]
}

/// Three digits or more, whatever the size.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_says_whether_its_goal_is_met() {
        let figures = [
            Figure::new(
                "a/b",
                650.0,
                "1/s",
                (1000.0, "the disk"),
                Goal::AtLeast(0.7),
            ),
            Figure::limited("c", 9.5, "ms", 10.0),
        ];
        let text = render(&figures, Some("N / x"));
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[1].contains("0.650  >= 0.7  MISSED  the disk"),
            "{text}"
        );
        assert!(
            lines[2].contains("9.50") && lines[2].contains(" met "),
            "{text}"
        );
        assert!(lines[3].starts_with("the disk's bound: N / "));
    }
}
