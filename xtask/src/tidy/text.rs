// SPDX-License-Identifier: GPL-2.0-only
//! Rules about text: licence lines, white space, names that belong to one machine.

use std::path::Path;

use super::{Problem, Source};

const LICENCE: &str = "SPDX-License-Identifier: GPL-2.0-only";

/// Files with text that is not ours.
const FOREIGN: &[&str] = &["COPYING", "Cargo.lock"];

/// Parts of host names of package archives. In two halves each, so that this
/// file passes its own rule.
const HOSTS: &[(&str, &str)] = &[
    ("deb.", "debian.org"),
    ("security.", "debian.org"),
    ("ftp.", "debian.org"),
    ("static.crates", ".io"),
    ("index.crates", ".io"),
    ("registry.", "npmjs.org"),
    ("pypi", ".org"),
];

/// Checks every file.
pub fn check(sources: &[Source], root: &Path) -> Vec<Problem> {
    let checkout = root.to_string_lossy().into_owned();
    let mut problems = Vec::new();
    for source in sources {
        let name = source.path.to_string_lossy();
        if FOREIGN.contains(&name.as_ref()) {
            continue;
        }
        if needs_licence(&source.path) && !has_licence(&source.text) {
            problems.push(problem(source, 1, format!("line 1 lacks \"{LICENCE}\"")));
        }
        for (i, line) in source.text.lines().enumerate() {
            for what in line_problems(line, &checkout) {
                problems.push(problem(source, i + 1, what));
            }
        }
        if !source.text.is_empty() && !source.text.ends_with('\n') {
            let last = source.text.lines().count();
            problems.push(problem(
                source,
                last,
                "no newline at the end of the file".into(),
            ));
        }
    }
    problems
}

fn problem(source: &Source, line: usize, what: String) -> Problem {
    Problem {
        path: source.path.clone(),
        line,
        what,
    }
}

fn needs_licence(path: &Path) -> bool {
    path.extension()
        .is_some_and(|e| e == "rs" || e == "c" || e == "h")
}

/// On the first line, as the kernel has it.
fn has_licence(text: &str) -> bool {
    text.lines()
        .next()
        .is_some_and(|line| line.contains(LICENCE))
}

fn line_problems(line: &str, checkout: &str) -> Vec<String> {
    let mut found = Vec::new();
    if line.ends_with([' ', '\t', '\r']) {
        found.push("white space at the end of the line".into());
    }
    if line.contains(concat!("/ho", "me/")) || line.contains(concat!("/Us", "ers/")) {
        found.push("the path of a home directory".into());
    }
    if checkout.len() > 5 && line.contains(checkout) {
        found.push("the path of this checkout".into());
    }
    if let Some((a, b)) = HOSTS
        .iter()
        .find(|(a, b)| line.contains(&format!("{a}{b}")))
    {
        found.push(format!("the host name of a package archive ({a}{b})"));
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(path: &str, text: &str) -> Vec<String> {
        let sources = [Source {
            path: path.into(),
            text: text.into(),
        }];
        check(&sources, Path::new("/place/of/checkout"))
            .iter()
            .map(Problem::to_string)
            .collect()
    }

    #[test]
    fn clean_text_passes() {
        assert!(problems("a.rs", &format!("// {LICENCE}\nfn f() {{}}\n")).is_empty());
        assert!(problems("a.h", &format!("/* {LICENCE} */\n")).is_empty());
        assert!(problems("a.md", "text\n").is_empty());
    }

    #[test]
    fn each_rule_is_found_with_its_line() {
        for (text, expected) in [
            ("a\nb \n".to_string(), "a.md:2: white space"),
            (
                format!("{}{}\n", "/ho", "me/me"),
                "a.md:1: the path of a home",
            ),
            (
                "/place/of/checkout/x\n".into(),
                "a.md:1: the path of this checkout",
            ),
            (
                format!("http://deb.{}/\n", "debian.org"),
                "a.md:1: the host name",
            ),
            ("a\nb".into(), "a.md:2: no newline"),
        ] {
            let found = problems("a.md", &text);
            assert!(
                found.len() == 1 && found[0].starts_with(expected),
                "{found:?}"
            );
        }
    }

    #[test]
    fn a_source_without_a_licence_line_is_found() {
        assert_eq!(problems("a.c", "int x;\n").len(), 1);
        assert_eq!(problems("a.rs", &format!("//! x\n// {LICENCE}\n")).len(), 1);
    }
}
