// SPDX-License-Identifier: GPL-2.0-only
//! Content keys: what a cached result was made from, as one short name.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// Collects labelled parts into one key.
///
/// Every part is hashed with its length, so that two different lists of parts
/// never run together into the same bytes.
pub struct Key(Sha256);

impl Key {
    /// A key for results of the kind `recipe`; change the recipe's name when the
    /// code that makes the result changes.
    pub fn new(recipe: &str) -> Self {
        Key(Sha256::new()).text(recipe)
    }

    /// Adds bytes.
    pub fn bytes(mut self, part: &[u8]) -> Self {
        self.0.update((part.len() as u64).to_le_bytes());
        self.0.update(part);
        self
    }

    /// Adds a string.
    pub fn text(self, part: &str) -> Self {
        self.bytes(part.as_bytes())
    }

    /// Adds the names and contents of files; a directory stands for every file below it.
    pub fn files(mut self, root: &Path, paths: &[PathBuf]) -> Result<Self> {
        for path in paths {
            for file in files_below(&root.join(path))? {
                let name = file.strip_prefix(root).unwrap_or(&file);
                let content =
                    fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
                self = self.text(&name.to_string_lossy()).bytes(&content);
            }
        }
        Ok(self)
    }

    /// The key: 16 hexadecimal digits, enough for a directory name.
    pub fn finish(self) -> String {
        let hex: String = self
            .0
            .finalize()
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        hex[..16].to_string()
    }
}

/// All regular files at or below `path`, sorted; nothing when it is absent.
pub fn files_below(path: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    if path.is_dir() {
        let entries =
            fs::read_dir(path).with_context(|| format!("cannot list {}", path.display()))?;
        for entry in entries {
            found.extend(files_below(&entry?.path())?);
        }
        found.sort();
    } else if path.is_file() {
        found.push(path.to_path_buf());
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_run_together() {
        let a = Key::new("t").text("ab").text("c").finish();
        let b = Key::new("t").text("a").text("bc").finish();
        assert_ne!(a, b);
        assert_eq!(a.len(), 16);
    }

    #[test]
    fn a_file_changes_the_key_by_name_and_by_content() {
        let dir = tempfile::tempdir().unwrap();
        let key = || {
            Key::new("t")
                .files(dir.path(), &[PathBuf::from(".")])
                .unwrap()
                .finish()
        };
        let empty = key();
        fs::write(dir.path().join("a"), "1").unwrap();
        let one = key();
        fs::write(dir.path().join("a"), "2").unwrap();
        let changed = key();
        fs::rename(dir.path().join("a"), dir.path().join("b")).unwrap();
        let renamed = key();
        let all = [&empty, &one, &changed, &renamed];
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b));
        }
    }
}
