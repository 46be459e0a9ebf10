// SPDX-License-Identifier: GPL-2.0-only
//! Results: a table for people, JUnit and JSON for machines.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;

/// One scenario's result.
#[derive(Serialize)]
pub struct Outcome {
    /// The scenario.
    pub name: String,
    /// Whether everything held.
    pub passed: bool,
    /// How long it took, in seconds.
    pub seconds: f64,
    /// What failed; empty if it passed.
    pub reason: String,
}

impl Outcome {
    /// The result of a scenario that took `time`.
    pub fn new(name: &str, time: Duration, result: &anyhow::Result<()>) -> Self {
        Outcome {
            name: name.to_string(),
            passed: result.is_ok(),
            seconds: time.as_secs_f64(),
            reason: result
                .as_ref()
                .err()
                .map(|e| format!("{e:#}"))
                .unwrap_or_default(),
        }
    }
}

/// Name, result, seconds.
pub fn table(outcomes: &[Outcome]) -> String {
    let width = outcomes
        .iter()
        .map(|o| o.name.len())
        .max()
        .unwrap_or(0)
        .max("scenario".len());
    let mut text = format!("{:width$}  result  seconds\n", "scenario");
    for o in outcomes {
        let result = if o.passed { "passed" } else { "FAILED" };
        let _ = writeln!(text, "{:width$}  {result}  {:7.1}", o.name, o.seconds);
    }
    let failed = outcomes.iter().filter(|o| !o.passed).count();
    let _ = writeln!(text, "{} passed, {failed} failed", outcomes.len() - failed);
    text
}

/// JUnit's XML, as CI systems read it.
pub fn junit(outcomes: &[Outcome]) -> String {
    let failures = outcomes.iter().filter(|o| !o.passed).count();
    let seconds: f64 = outcomes.iter().map(|o| o.seconds).sum();
    let mut xml = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(
        xml,
        "<testsuite name=\"vmtest\" tests=\"{}\" failures=\"{failures}\" time=\"{seconds:.1}\">",
        outcomes.len()
    );
    for o in outcomes {
        let name = escape(&o.name);
        let _ = write!(
            xml,
            "  <testcase classname=\"vmtest\" name=\"{name}\" time=\"{:.1}\"",
            o.seconds
        );
        if o.passed {
            xml.push_str("/>\n");
        } else {
            let _ = writeln!(
                xml,
                ">\n    <failure>{}</failure>\n  </testcase>",
                escape(&o.reason)
            );
        }
    }
    xml.push_str("</testsuite>\n");
    xml
}

/// Text as XML may hold it; control characters, which it may not, become `?`.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' | '\t' => out.push(c),
            c if c.is_control() => out.push('?'),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcomes() -> Vec<Outcome> {
        let failed = Err(anyhow::anyhow!("a < b & \"c\"\u{1b}[0m"));
        vec![
            Outcome::new("first", Duration::from_millis(1500), &Ok(())),
            Outcome::new("second", Duration::from_secs(2), &failed),
        ]
    }

    #[test]
    fn the_table_ends_with_the_sum() {
        let table = table(&outcomes());
        assert!(table.contains("first     passed      1.5\n"), "{table}");
        assert!(table.contains("second    FAILED      2.0\n"), "{table}");
        assert!(table.ends_with("1 passed, 1 failed\n"), "{table}");
    }

    #[test]
    fn xml_is_escaped() {
        let xml = junit(&outcomes());
        assert!(
            xml.contains("tests=\"2\" failures=\"1\" time=\"3.5\""),
            "{xml}"
        );
        assert!(xml.contains("a &lt; b &amp; &quot;c&quot;?[0m"), "{xml}");
    }
}
