// SPDX-License-Identifier: GPL-2.0-only
//! Modules of a crate import one another in one direction only.
//!
//! What lies below can then be tested without what lies above: the store without
//! a server, the server's core without a ring, the formats without a device.

use std::collections::BTreeSet;
use std::path::Path;

use regex::Regex;

use super::{Problem, Source};

/// A crate, its modules with those each may use, and what all of them may use.
struct Order {
    root: &'static str,
    allowed: &'static [(&'static str, &'static [&'static str])],
    base: &'static [&'static str],
}

const ORDERS: &[Order] = &[
    // `cli` sees everything and is not listed by others.
    Order {
        root: "ddsnap/src",
        allowed: &[
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
        ],
        base: &["units", "buffer", "promise", "stdio"],
    },
    // From the top. What is pure, or plain data, is at the bottom.
    Order {
        root: "zumastor/src",
        allowed: &[
            (
                "cli",
                &[
                    "boot",
                    "config",
                    "control",
                    "daemon",
                    "doctor",
                    "process",
                    "replicate",
                    "shutdown",
                    "status",
                    "system",
                    "thaw_guard",
                    "volume",
                ],
            ),
            (
                "daemon",
                &[
                    "boot",
                    "config",
                    "control",
                    "host",
                    "jobs",
                    "plan",
                    "replicate",
                    "replication",
                    "schedule",
                    "shutdown",
                    "status",
                    "supervise",
                    "uevents",
                    "volume",
                    "work",
                ],
            ),
            ("control", &["status", "volume"]),
            ("doctor", &["blockdev", "config", "dm", "process"]),
            (
                "status",
                &[
                    "config", "exports", "host", "jobs", "plan", "schedule", "volume",
                ],
            ),
            (
                "boot",
                &["boot_record", "config", "host", "plan", "uevents", "volume"],
            ),
            ("work", &["host", "jobs", "plan", "volume"]),
            (
                "replicate",
                &["config", "control", "jobs", "replication", "volume"],
            ),
            ("replication", &[]),
            (
                "volume",
                &[
                    "boot_record",
                    "config",
                    "exports",
                    "freeze",
                    "host",
                    "links",
                    "mount_options",
                    "plan",
                    "process",
                    "replication",
                    "schedule",
                    "supervise",
                    "uevents",
                ],
            ),
            ("jobs", &[]),
            (
                "system",
                &[
                    "blockdev",
                    "config",
                    "dm",
                    "freeze",
                    "host",
                    "mount_table",
                    "mounts",
                    "process",
                    "server",
                    "thaw_guard",
                ],
            ),
            ("shutdown", &["blockdev", "dm", "mount_table", "process"]),
            ("thaw_guard", &["freeze", "host", "process"]),
            ("supervise", &["host"]),
            ("freeze", &["host"]),
            ("server", &["host", "process"]),
            ("mounts", &["blockdev", "mount_table", "process"]),
            ("dm", &["blockdev", "process"]),
            ("blockdev", &["device_number", "mount_table", "process"]),
            ("mount_table", &["device_number"]),
            ("device_number", &[]),
            ("uevents", &[]),
            ("process", &["config"]),
            ("host", &["config"]),
            ("boot_record", &["config"]),
            ("schedule", &["config"]),
            ("links", &["config"]),
            ("exports", &[]),
            ("config", &[]),
            ("plan", &[]),
            ("mount_options", &[]),
            ("human", &[]),
            ("layout", &[]),
            ("machine", &[]),
            ("names", &[]),
            ("note", &[]),
            ("refusal", &[]),
        ],
        base: &["human", "layout", "machine", "names", "note", "refusal"],
    },
    // Tasks, then what they share.
    Order {
        root: "xtask/src",
        allowed: &[
            ("test", &["flags", "image", "packages", "tidy", "vmtest"]),
            (
                "vmtest",
                &["flags", "guest", "image", "packages", "scenario", "vm"],
            ),
            (
                "hand",
                &["flags", "guest", "image", "lock", "packages", "vm"],
            ),
            ("bench", &["flags", "packages"]),
            ("crashtest", &["flags"]),
            ("mutants", &["flags"]),
            ("tidy", &["digest", "mutants", "scenario"]),
            ("deny", &[]),
            ("flags", &["image"]),
            ("scenario", &["image", "lock", "vm"]),
            ("guest", &["deb", "image", "kernel", "packages"]),
            ("image", &["cache", "digest", "lock", "packages", "vm"]),
            ("kernel", &["cache", "digest", "lock", "packages"]),
            ("deb", &["cache", "digest", "lock", "packages"]),
            ("vm", &["digest"]),
            ("packages", &[]),
            ("cache", &[]),
            ("digest", &[]),
            ("lock", &[]),
            ("paths", &[]),
            ("ui", &[]),
        ],
        base: &["paths", "ui"],
    },
];

/// Checks every module of the crates above. Tests at the end of a file may use anything.
pub fn check(sources: &[Source]) -> Vec<Problem> {
    // The pattern is a constant: it fails in the tests or never.
    let Ok(used) = Regex::new(r"\bcrate::(\{[^}]*\}|[a-z_]+)") else {
        return Vec::new();
    };
    let mut problems = Vec::new();
    for source in sources {
        let found = ORDERS
            .iter()
            .find_map(|order| Some((order, module_of(&source.path, order.root)?)));
        let Some((order, module)) = found else {
            continue;
        };
        let Some((_, allowed)) = order.allowed.iter().find(|(name, _)| *name == module) else {
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
                    let fine =
                        name == module || order.base.contains(&name) || allowed.contains(&name);
                    if !fine && order.allowed.iter().any(|(known, _)| *known == name) {
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

/// The top-level module a file belongs to; `None` outside `root`, for the crate's roots, and for what is for tests.
fn module_of(path: &Path, root: &str) -> Option<String> {
    let below = path.strip_prefix(root).ok()?;
    let first = Path::new(below.components().next()?.as_os_str());
    let module = first.file_stem()?.to_string_lossy().into_owned();
    let source = path.extension().is_some_and(|e| e == "rs") && !is_for_tests(path);
    (source && module != "lib" && module != "main").then_some(module)
}

fn is_for_tests(path: &Path) -> bool {
    let below_tests = path.iter().any(|part| part == "tests");
    below_tests || path.ends_with("tests.rs") || path.ends_with("fake.rs")
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
        let text = "use crate::config::X;\nuse crate::names;\n";
        assert!(problems("zumastor/src/volume/revert.rs", text).is_empty());
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
        let found = problems("xtask/src/vm/args.rs", "use crate::image::booted::Place;\n");
        assert_eq!(found, ["xtask/src/vm/args.rs:1: vm must not use image"]);
        let found = problems("zumastor/src/volume.rs", "use crate::daemon::Daemon;\n");
        assert_eq!(
            found,
            ["zumastor/src/volume.rs:1: volume must not use daemon"]
        );
    }

    #[test]
    fn comments_and_tests_do_not_count() {
        let text = "// crate::server\n#[cfg(test)]\nmod tests { use crate::server::X; }\n";
        assert!(problems("ddsnap/src/store/mod.rs", text).is_empty());
        assert!(problems("ddsnap/src/store/tests.rs", "use crate::server::X;\n").is_empty());
        let fake = "zumastor/src/host/fake.rs";
        assert!(problems(fake, "use crate::daemon::X;\n").is_empty());
    }

    #[test]
    fn an_unlisted_module_is_found() {
        assert_eq!(problems("ddsnap/src/novel.rs", "").len(), 1);
    }
}
