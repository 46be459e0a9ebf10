// SPDX-License-Identifier: GPL-2.0-only
//! Modules of ddsnap import one another in one direction only.
//!
//! What lies below can then be tested without what lies above: the store without
//! a server, the server's core without a ring, the formats without a device.

use std::collections::BTreeSet;
use std::path::Path;

use regex::Regex;

use super::{Problem, Source};

/// Each module with those it may use. `cli` sees everything and is not listed
/// by others; `units`, `buffer`, `promise` and `stdio` are seen by everything.
const ALLOWED: &[(&str, &[&str])] = &[
    (
        "cli",
        &[
            "server", "delta", "agent", "client", "store", "daemon", "device", "format",
            "protocol", "probe", "nbd",
        ],
    ),
    (
        "server",
        &["store", "device", "protocol", "daemon", "format"],
    ),
    ("delta", &["client", "device", "protocol", "format"]),
    ("client", &["protocol"]),
    ("agent", &["protocol", "daemon"]),
    ("store", &["format", "device"]),
    ("probe", &["format"]),
    ("nbd", &[]),
    ("device", &[]),
    ("format", &[]),
    ("protocol", &[]),
    ("daemon", &[]),
    ("buffer", &[]),
    ("promise", &[]),
    ("stdio", &[]),
    ("units", &[]),
];

/// What every module may use.
const BASE: &[&str] = &["units", "buffer", "promise", "stdio"];

const ROOT: &str = "ddsnap/src";

/// Checks every module of ddsnap. Tests at the end of a file may use anything.
pub fn check(sources: &[Source]) -> Vec<Problem> {
    // The pattern is a constant: it fails in the tests or never.
    let Ok(used) = Regex::new(r"\bcrate::(\{[^}]*\}|[a-z_]+)") else {
        return Vec::new();
    };
    let mut problems = Vec::new();
    for source in sources {
        let Some(module) = module_of(&source.path) else {
            continue;
        };
        let Some((_, allowed)) = ALLOWED.iter().find(|(name, _)| *name == module) else {
            let what = format!("module {module} is not in the list of xtask/src/tidy/imports.rs");
            problems.push(Problem {
                path: source.path.clone(),
                line: 0,
                what,
            });
            continue;
        };
        for (line, text) in code_lines(&source.text) {
            for found in used.captures_iter(text) {
                for name in names(&found[1]) {
                    let fine = name == module || BASE.contains(&name) || allowed.contains(&name);
                    if !fine && ALLOWED.iter().any(|(known, _)| *known == name) {
                        let what = format!("{module} must not use {name}");
                        problems.push(Problem {
                            path: source.path.clone(),
                            line,
                            what,
                        });
                    }
                }
            }
        }
    }
    problems
}

/// The top-level module a file belongs to; `None` outside ddsnap and for the roots.
fn module_of(path: &Path) -> Option<String> {
    let below = path.strip_prefix(ROOT).ok()?;
    let first = Path::new(below.components().next()?.as_os_str());
    let module = first.file_stem()?.to_string_lossy().into_owned();
    let source = path.extension().is_some_and(|e| e == "rs") && !path.ends_with("tests.rs");
    (source && module != "lib" && module != "main").then_some(module)
}

/// Lines of code with their numbers: no comments, and nothing from the tests on.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    text.lines()
        .take_while(|line| line.trim() != "#[cfg(test)]")
        .enumerate()
        .filter(|(_, line)| !line.trim_start().starts_with("//"))
        .map(|(i, line)| (i + 1, line))
}

/// Module names in `name` or in `{a::X, b}`.
fn names(found: &str) -> BTreeSet<&str> {
    found
        .trim_matches(['{', '}'])
        .split(',')
        .filter_map(|part| part.trim().split("::").next())
        .filter(|name| !name.is_empty())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(path: &str, text: &str) -> Vec<String> {
        check(&[Source {
            path: path.into(),
            text: text.into(),
        }])
        .iter()
        .map(Problem::to_string)
        .collect()
    }

    #[test]
    fn downward_imports_pass() {
        let text = "use crate::device::Device;\nuse crate::{format::X, units};\n";
        assert!(problems("ddsnap/src/store/mod.rs", text).is_empty());
        assert!(problems("zumastor/src/main.rs", "use crate::cli;\n").is_empty());
    }

    #[test]
    fn an_upward_import_is_found_with_its_line() {
        let found = problems("ddsnap/src/store/mod.rs", "\nuse crate::server::Core;\n");
        assert_eq!(
            found,
            ["ddsnap/src/store/mod.rs:2: store must not use server"]
        );
        let found = problems(
            "ddsnap/src/format/x.rs",
            "use crate::{units::Chunk, device};\n",
        );
        assert_eq!(
            found,
            ["ddsnap/src/format/x.rs:1: format must not use device"]
        );
        let found = problems("ddsnap/src/client.rs", "fn f() { crate::store::g() }\n");
        assert_eq!(found.len(), 1);
    }

    #[test]
    fn comments_and_tests_do_not_count() {
        let text = "// crate::server\n#[cfg(test)]\nmod tests { use crate::server::X; }\n";
        assert!(problems("ddsnap/src/store/mod.rs", text).is_empty());
        assert!(problems("ddsnap/src/store/tests.rs", "use crate::server::X;\n").is_empty());
    }

    #[test]
    fn an_unlisted_module_is_found() {
        assert_eq!(problems("ddsnap/src/novel.rs", "").len(), 1);
    }
}
