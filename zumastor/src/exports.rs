// SPDX-License-Identifier: GPL-2.0-only
//! Exports over NFS that cannot be told apart.
//!
//! Unless an export has an `fsid=` of its own, the server of NFS names it to its clients by the UUID of its file system. A volume
//! and its snapshots have the same: clients see the content of one in place of another, the writable origin too.
//! Nothing is changed here; who exports by hand is told.

use std::fs;
use std::path::{Path, PathBuf};

use crate::layout::Layout;

/// Longest list of exports that is read, in bytes.
const LIST_MAX_BYTES: usize = 1 << 20;

/// What one client may see.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Export {
    path: PathBuf,
    /// It has a number or UUID of its own for clients.
    fsid: bool,
    /// What is mounted below is exported too.
    crossmnt: bool,
}

/// What there is to say of the exports of a volume that is mounted on `dirs`, snapshots too; nothing if all is well.
#[must_use]
pub fn warning(layout: &Layout, dirs: &[PathBuf]) -> Option<String> {
    let (given, active) = lists(layout);
    let found = without_fsid(&given, &active, dirs);
    if found.is_empty() {
        return None;
    }
    let found: Vec<String> = found.iter().map(|d| d.display().to_string()).collect();
    Some(format!(
        "exported over NFS without fsid=: {}: clients cannot tell the volume and its snapshots apart, and may see one in place \
         of another: give each of them a line with its own number in /etc/exports, like fsid=101",
        found.join(", ")
    ))
}

/// The exports that an administrator has written down, and those of the kernel.
fn lists(layout: &Layout) -> (Vec<Export>, Vec<Export>) {
    let more = fs::read_dir(layout.at("/etc/exports.d")).into_iter();
    let more = more.flatten().flatten().map(|entry| entry.path());
    let more = more.filter(|path| path.extension().is_some_and(|e| e == "exports"));
    let files = std::iter::once(layout.at("/etc/exports")).chain(more);
    let given = files.flat_map(|path| parse(&read(&path))).collect();
    (given, parse(&read(&layout.at("/proc/fs/nfsd/exports"))))
}

/// A file that is not there has no exports.
fn read(path: &Path) -> String {
    let mut bytes = fs::read(path).unwrap_or_default();
    bytes.truncate(LIST_MAX_BYTES);
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Which of `dirs` are exported without a number of their own.
fn without_fsid<'d>(given: &[Export], active: &[Export], dirs: &'d [PathBuf]) -> Vec<&'d PathBuf> {
    let own =
        |list: &[Export], dir: &Path, fsid| list.iter().any(|e| e.path == dir && e.fsid == fsid);
    let is_bad = |dir: &&PathBuf| {
        if own(given, dir, false) {
            return true;
        }
        // The kernel shows a UUID that was given as it shows one that was found.
        if own(given, dir, true) || own(active, dir, true) {
            return false;
        }
        let below = |e: &Export| e.crossmnt && **dir != e.path && dir.starts_with(&e.path);
        own(active, dir, false) || given.iter().chain(active).any(below)
    };
    dirs.iter().filter(is_bad).collect()
}

/// Reads a list as of exports(5), or as the kernel writes it: one entry for each client.
fn parse(text: &str) -> Vec<Export> {
    let mut found = Vec::new();
    for line in text.replace("\\\n", " ").lines() {
        let line = line.trim_start();
        let Some((path, rest)) = first_word(line).filter(|(path, _)| !path.starts_with('#')) else {
            continue;
        };
        let words = rest.split_ascii_whitespace();
        let mut standard = "";
        let mut clients = 0;
        for word in words.take_while(|word| !word.starts_with('#')) {
            if let Some(options) = word.strip_prefix('-') {
                standard = options;
                continue;
            }
            clients += 1;
            let own = word.split_once('(').map_or("", |(_, rest)| rest);
            found.push(export(&path, &[standard, own.trim_end_matches(')')]));
        }
        if clients == 0 {
            // For everybody.
            found.push(export(&path, &[standard]));
        }
    }
    found
}

fn export(path: &str, options: &[&str]) -> Export {
    let has = |wanted: &dyn Fn(&str) -> bool| options.iter().any(|o| o.split(',').any(wanted));
    Export {
        path: path.into(),
        fsid: has(&|option| option.starts_with("fsid=")),
        // The pseudo root of version 4 shows nothing but the way to the others.
        crossmnt: has(&|option| option == "crossmnt") && !has(&|option| option == "v4root"),
    }
}

/// The path at the start of a line, which may be quoted or have characters as `\` and three octal digits; and what follows.
fn first_word(line: &str) -> Option<(String, &str)> {
    let (word, rest) = match line.strip_prefix('"') {
        Some(quoted) => quoted.split_once('"')?,
        None => {
            let end = line.find([' ', '\t']).unwrap_or(line.len());
            line.split_at(end)
        }
    };
    (!word.is_empty()).then(|| (unescaped(word), rest))
}

fn unescaped(word: &str) -> String {
    let mut bytes = Vec::new();
    let mut left = word.as_bytes();
    while let Some((first, rest)) = left.split_first() {
        let code = rest
            .get(..3)
            .filter(|digits| *first == b'\\' && digits.iter().all(|d| (b'0'..b'8').contains(d)))
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(code.unwrap_or(*first));
        left = if code.is_some() { &rest[3..] } else { rest };
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirs(names: &[&str]) -> Vec<PathBuf> {
        names.iter().map(PathBuf::from).collect()
    }

    fn bad(given: &str, active: &str, names: &[&str]) -> Vec<PathBuf> {
        let dirs = dirs(names);
        let found = without_fsid(&parse(given), &parse(active), &dirs);
        found.into_iter().cloned().collect()
    }

    const ALL: [&str; 3] = ["/m/v", "/m/v(0)", "/m/a b"];

    /// Origin and snapshots were exported without fsid=, all showed one snapshot's content, and nothing said why.
    #[test]
    fn exports_without_a_number_of_their_own_are_found() {
        let given = "# /m/v *(rw)\n/m/v *(rw,fsid=1)\t10.0.0.0/8(ro)\n/m/v(0) host(ro,fsid=2)\n\"/m/a b\" *(ro)\n";
        assert_eq!(bad(given, "", &ALL), dirs(&["/m/v", "/m/a b"]));
        let given = "/m/v \\\n  *(rw,fsid=1)\n/m/v(0) -ro,fsid=2 host\n/m/a\\040b -ro,fsid=3 x y(rw) # z(ro)\n";
        assert!(bad(given, "", &ALL).is_empty());
        assert_eq!(bad("/m/v(0)\n", "", &ALL), dirs(&["/m/v(0)"]));
        assert!(bad("/elsewhere *(rw)\n", "", &ALL).is_empty());
    }

    #[test]
    fn what_the_kernel_exports_counts_too() {
        let head = "# Version 1.1\n# Path Client(Flags) # IPs\n";
        let active = format!(
            "{head}/m/v\t*(rw,sync,uuid=1:2:3:4,sec=1)\t# 10.0.0.1\n/m/v(0)\t*(ro,sync,fsid=7,sec=1)\n\
             /m/a\\040b\thost(ro)\n/\t*(ro,fsid=0,v4root,crossmnt)\n"
        );
        assert_eq!(bad("", &active, &ALL), dirs(&["/m/v", "/m/a b"]));
        // A UUID that was given looks the same there.
        assert_eq!(
            bad("/m/v *(rw,fsid=5a0c-b9c3)\n", &active, &ALL),
            dirs(&["/m/a b"])
        );
    }

    #[test]
    fn what_is_mounted_below_an_export_is_exported_with_crossmnt() {
        assert_eq!(
            bad("/m *(ro,fsid=1,crossmnt)\n", "", &ALL[..1]),
            dirs(&["/m/v"])
        );
        let both = "/m *(ro,fsid=1,crossmnt)\n/m/v *(rw,fsid=2)\n";
        assert!(bad(both, "", &ALL[..1]).is_empty());
        assert!(bad("/m *(ro,fsid=1)\n", "", &ALL).is_empty());
    }

    #[test]
    fn the_warning_is_made_of_the_machines_files() {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        let dirs = dirs(&ALL);
        assert_eq!(warning(&layout, &dirs), None, "there are no exports");
        fs::create_dir_all(layout.at("/etc/exports.d")).expect("made");
        fs::write(layout.at("/etc/exports.d/x.exports"), "/m/v(0) *(ro)\n").expect("written");
        fs::write(layout.at("/etc/exports.d/x.old"), "/m/v *(ro)\n").expect("written");
        let text = warning(&layout, &dirs).expect("told");
        assert!(
            text.starts_with("exported over NFS without fsid=: /m/v(0): "),
            "{text}"
        );
    }

    #[test]
    fn nonsense_is_no_export() {
        for text in ["\"", "\"/m/v", "\\", "/m/v\\0", "(((", "\\777 x", "# #"] {
            assert!(bad(text, text, &ALL).is_empty(), "{text}");
        }
    }
}
