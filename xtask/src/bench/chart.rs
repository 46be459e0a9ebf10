// SPDX-License-Identifier: GPL-2.0-only
//! The figures as a bar chart: each ratio to its bound, with a mark where the goal is.

use super::figure::{Figure, Goal};
use super::table::number;

const WIDTH: f64 = 960.0;
const LEFT: f64 = 300.0;
const RIGHT: f64 = 180.0;
const ROW: f64 = 22.0;
const TOP: f64 = 44.0;
/// The ratio at the right end of the scale; longer bars are cut there, their number says more.
const FULL: f64 = 1.25;

/// An SVG of all figures with a ratio.
pub fn render(figures: &[Figure], title: &str) -> String {
    let shown: Vec<&Figure> = figures
        .iter()
        .filter(|figure| figure.ratio.is_some())
        .collect();
    let height = TOP + ROW * shown.len() as f64 + 48.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"{WIDTH}\" height=\"{height}\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"15\">{title}</text>\n"
    );
    for step in 0..=5 {
        let ratio = f64::from(step) * 0.25;
        let (at, bottom) = (x(ratio), height - 44.0);
        svg.push_str(&format!(
            "<line x1=\"{at}\" y1=\"{TOP}\" x2=\"{at}\" y2=\"{bottom}\" stroke=\"#ddd\"/>\n\
             <text x=\"{at}\" y=\"{:.1}\" text-anchor=\"middle\" fill=\"#555\">{ratio:.2}</text>\n",
            bottom + 15.0
        ));
    }
    for (index, figure) in shown.iter().enumerate() {
        svg.push_str(&bar(figure, TOP + ROW * index as f64));
    }
    svg.push_str(&format!(
        "<text x=\"10\" y=\"{:.1}\" fill=\"#555\">black mark: goal (| at least, : at most); \
         green: met, red: missed, grey: no goal</text>\n</svg>\n",
        height - 8.0
    ));
    svg
}

fn x(ratio: f64) -> f64 {
    LEFT + (WIDTH - LEFT - RIGHT) * (ratio / FULL).clamp(0.0, 1.0)
}

fn bar(figure: &Figure, y: f64) -> String {
    let ratio = figure.ratio.unwrap_or_default();
    let colour = match figure.met() {
        Some(true) => "#4a9d5b",
        Some(false) => "#c9504a",
        None => "#9aa4ad",
    };
    let (length, baseline) = (x(ratio) - LEFT, y + ROW - 7.0);
    let mut svg = format!(
        "<text x=\"{:.1}\" y=\"{baseline:.1}\" text-anchor=\"end\">{}</text>\n\
         <rect x=\"{LEFT}\" y=\"{:.1}\" width=\"{length:.1}\" height=\"{:.1}\" fill=\"{colour}\"/>\n\
         <text x=\"{:.1}\" y=\"{baseline:.1}\">{ratio:.2} ({} {})</text>\n",
        LEFT - 8.0,
        escaped(&figure.name),
        y + 3.0,
        ROW - 6.0,
        // Beyond the goal's mark, where that would run through it.
        x(ratio.max(0.0)).max(goal(figure).map_or(0.0, x)) + 6.0,
        number(figure.value),
        escaped(figure.unit),
    );
    if let Some(at) = goal(figure).map(x) {
        let dashes = if matches!(figure.goal, Goal::AtMost(_)) {
            " stroke-dasharray=\"3,2\""
        } else {
            ""
        };
        svg.push_str(&format!(
            "<line x1=\"{at:.1}\" y1=\"{y:.1}\" x2=\"{at:.1}\" y2=\"{:.1}\" stroke=\"black\" \
             stroke-width=\"2\"{dashes}/>\n",
            y + ROW
        ));
    }
    svg
}

fn goal(figure: &Figure) -> Option<f64> {
    match figure.goal {
        Goal::AtLeast(ratio) | Goal::AtMost(ratio) => Some(ratio),
        Goal::None => None,
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bar_ends_at_its_ratio_and_a_goal_has_its_mark() {
        let figures = [Figure::new(
            "a<b",
            50.0,
            "1/s",
            (100.0, "disk"),
            Goal::AtLeast(0.75),
        )];
        let svg = render(&figures, "t");
        let width = (WIDTH - LEFT - RIGHT) * 0.5 / FULL;
        assert!(svg.contains(&format!("width=\"{width:.1}\"")), "{svg}");
        assert!(
            svg.contains(&format!("<line x1=\"{:.1}\"", x(0.75))),
            "{svg}"
        );
        assert!(svg.contains("a&lt;b"));
    }

    #[test]
    fn a_bar_longer_than_the_scale_is_cut() {
        assert!((x(50.0) - (WIDTH - RIGHT)).abs() < 1e-9);
    }
}
