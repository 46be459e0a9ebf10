// SPDX-License-Identifier: GPL-2.0-only
//! Documents that describe code in detail carry a hash of that code, so that a
//! change of the code cannot forget the document.
//!
//! The hash leaves out comments, blank lines and tests: they change no format.
//! `cargo xtask tidy --bless` writes the hash; whoever runs it has looked.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::Problem;
use crate::digest::{Key, files_below};

/// A document and the code it describes.
struct Tie {
    document: &'static str,
    code: &'static [&'static str],
}

const TIES: &[Tie] = &[
    Tie {
        document: "ddsnap/FORMAT.md",
        code: &[
            "ddsnap/src/format",
            "ddsnap/src/delta/record.rs",
            "ddsnap/src/delta/changelist.rs",
            "ddsnap/src/delta/extent.rs",
            "ddsnap/src/delta/file.rs",
        ],
    },
    Tie {
        document: "ddsnap/PROTOCOL.md",
        code: &["ddsnap/src/protocol", "ddsnap/kernel/dm-ddsnap-protocol.h"],
    },
    Tie {
        document: "zumastor/REPLICATION.md",
        code: &[
            "zumastor/src/replication/extent.rs",
            "zumastor/src/replication/frame.rs",
            "zumastor/src/replication/message.rs",
            "zumastor/src/replication/progress.rs",
            "zumastor/src/replication/standing.rs",
            "zumastor/src/replication/sums.rs",
        ],
    },
];

const MARK: &str = "<!-- cargo xtask tidy: describes code with hash ";
const MARK_END: &str = " -->";

/// Checks every document.
pub fn check(root: &Path) -> Result<Vec<Problem>> {
    let mut problems = Vec::new();
    for tie in TIES {
        if let Some(problem) = check_one(root, tie)? {
            problems.push(problem);
        }
    }
    Ok(problems)
}

fn check_one(root: &Path, tie: &Tie) -> Result<Option<Problem>> {
    let problem = |line: usize, what: String| {
        Ok(Some(Problem {
            path: tie.document.into(),
            line,
            what,
        }))
    };
    let Ok(text) = fs::read_to_string(root.join(tie.document)) else {
        return problem(
            0,
            format!("is missing; it describes {}", tie.code.join(" and ")),
        );
    };
    let wanted = hash(root, tie)?;
    let noted = text
        .lines()
        .enumerate()
        .find_map(|(i, line)| Some((i + 1, noted_hash(line)?)));
    match noted {
        None => problem(
            0,
            format!("has no line \"{MARK}...\"; run cargo xtask tidy --bless"),
        ),
        Some((line, noted)) if noted != wanted => problem(
            line,
            format!(
                "{} has changed: bring the document up to date, then run cargo xtask tidy --bless",
                tie.code.join(" or ")
            ),
        ),
        Some(_) => Ok(None),
    }
}

/// Writes the present hash into every document that exists.
pub fn bless(root: &Path) -> Result<()> {
    for tie in TIES {
        let file = root.join(tie.document);
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        let mark = format!("{MARK}{}{MARK_END}", hash(root, tie)?);
        let mut lines: Vec<&str> = text.lines().collect();
        match lines.iter().position(|line| noted_hash(line).is_some()) {
            Some(at) => lines[at] = &mark,
            None => lines.extend(["", mark.as_str()]),
        }
        fs::write(&file, lines.join("\n") + "\n")
            .with_context(|| format!("cannot write {}", file.display()))?;
    }
    Ok(())
}

fn noted_hash(line: &str) -> Option<&str> {
    line.trim().strip_prefix(MARK)?.strip_suffix(MARK_END)
}

fn hash(root: &Path, tie: &Tie) -> Result<String> {
    let mut files: Vec<PathBuf> = Vec::new();
    for code in tie.code {
        files.extend(files_below(&root.join(code))?);
    }
    if files.is_empty() {
        bail!(
            "{} describes {}, where there is no file",
            tie.document,
            tie.code.join(" and ")
        );
    }
    let mut key = Key::new("document-1");
    for file in files {
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        key = key.text(&file.strip_prefix(root).unwrap_or(&file).to_string_lossy());
        key = key.text(&essence(&text));
    }
    Ok(key.finish())
}

/// Code without comments, blank lines, indentation and tests.
fn essence(text: &str) -> String {
    let comment =
        |line: &str| line.starts_with("//") || line.starts_with("/*") || line.starts_with("* ");
    text.lines()
        .map(str::trim)
        .take_while(|line| *line != "#[cfg(test)]")
        .filter(|line| !line.is_empty() && *line != "*" && !comment(line))
        .collect::<Vec<_>>()
        .join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIE: Tie = Tie {
        document: "D.md",
        code: &["code"],
    };

    fn tree() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("code")).unwrap();
        fs::write(dir.path().join("code/a.rs"), "// a\nconst A: u8 = 1;\n").unwrap();
        fs::write(dir.path().join("D.md"), "# D\n").unwrap();
        dir
    }

    fn note(dir: &Path) {
        let mark = format!("# D\n{MARK}{}{MARK_END}\n", hash(dir, &TIE).unwrap());
        fs::write(dir.join("D.md"), mark).unwrap();
    }

    #[test]
    fn a_change_of_code_wants_the_document_looked_at() {
        let dir = tree();
        let check = || check_one(dir.path(), &TIE).unwrap().map(|p| p.what);
        assert!(check().unwrap().contains("has no line"));
        note(dir.path());
        assert_eq!(check(), None);
        fs::write(dir.path().join("code/a.rs"), "const A: u8 = 2;\n").unwrap();
        assert!(check().unwrap().contains("has changed"));
        fs::remove_file(dir.path().join("D.md")).unwrap();
        assert!(check().unwrap().contains("is missing"));
    }

    #[test]
    fn comments_and_tests_change_nothing() {
        let dir = tree();
        note(dir.path());
        let same = "/// another comment\nconst A: u8 = 1;\n\n#[cfg(test)]\nmod tests {}\n";
        fs::write(dir.path().join("code/a.rs"), same).unwrap();
        assert_eq!(check_one(dir.path(), &TIE).unwrap(), None);
    }
}
