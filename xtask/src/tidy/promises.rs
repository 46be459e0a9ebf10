// SPDX-License-Identifier: GPL-2.0-only
//! Every flush of the engine has a promise beside it that `cargo xtask mutants` can break, and no
//! package is built with that ability.

use std::collections::BTreeMap;
use std::path::Path;

use super::{Problem, Source};
use crate::mutants::promises_in;

/// Where the engine is.
const ENGINE: &str = "ddsnap/src/store";

/// Where flushes are made of smaller ones.
const EXEMPT: &[&str] = &["ddsnap/src/store/media.rs", "ddsnap/src/store/no_origin.rs"];

/// Lines before a flush among which its promise is.
const NEAR: usize = 8;

/// Checks every file.
pub fn check(sources: &[Source]) -> Vec<Problem> {
    let mut problems = Vec::new();
    let mut seen = BTreeMap::new();
    for source in sources {
        let problem = |line: usize, what: String| Problem {
            path: source.path.clone(),
            line,
            what,
        };
        if source.path.starts_with("debian") && source.text.contains("features mutants") {
            problems.push(problem(
                0,
                "packages are built without the feature mutants".into(),
            ));
        }
        let rust = source.path.extension().is_some_and(|e| e == "rs");
        if !rust || !source.path.starts_with("ddsnap/src") {
            continue;
        }
        for promise in promises_in(&source.path, &source.text).unwrap_or_default() {
            if let Some(other) = seen.insert(promise.name.clone(), promise.path.clone()) {
                let what = format!("promise {} is in {} too", promise.name, other.display());
                problems.push(problem(promise.line, what));
            }
        }
        if source.path.starts_with(ENGINE) && !EXEMPT.iter().any(|e| source.path == Path::new(e)) {
            for line in bare_flushes(&source.text) {
                let what =
                    "a flush without a promise: if kept!(\"name\", \"what goes wrong without it\")";
                problems.push(problem(line, what.into()));
            }
        }
    }
    problems
}

/// Lines with a flush that no promise precedes.
fn bare_flushes(text: &str) -> Vec<usize> {
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines: Vec<&str> = code.lines().collect();
    let is_flush = |line: &str| {
        let line = line.trim_start();
        let calls = [
            ".flush_meta()",
            ".flush_data()",
            ".flush_both()",
            "origin.flush()",
            ".flush_origin()",
            ".flush_origin_again()",
        ];
        !line.starts_with("//")
            && (calls.iter().any(|call| line.contains(call)) || line.starts_with("flush("))
    };
    (0..lines.len())
        .filter(|&i| is_flush(lines[i]))
        .filter(|&i| {
            !lines[i.saturating_sub(NEAR)..i]
                .iter()
                .any(|line| line.contains("kept!("))
        })
        .map(|i| i + 1)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_needs_a_promise_just_before_it() {
        assert_eq!(bare_flushes("a\n    media.flush_meta()?;\n"), [2]);
        assert!(bare_flushes("if kept!(\n \"a\", \"b\") {\n media.flush_meta()?;\n").is_empty());
        assert!(bare_flushes("// media.flush_meta()\n").is_empty());
        assert_eq!(bare_flushes("    flush(&mut **device)?;\n"), [1]);
    }

    #[test]
    fn a_name_is_used_once() {
        let source = |path: &str| Source {
            path: path.into(),
            text: "if kept!(\"a\", \"b\") {}\n".into(),
        };
        let found = check(&[source("ddsnap/src/a.rs"), source("ddsnap/src/b.rs")]);
        assert_eq!(found.len(), 1);
        assert!(found[0].what.contains("promise a is in"), "{found:?}");
    }
}
