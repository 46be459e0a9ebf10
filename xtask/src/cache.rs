// SPDX-License-Identifier: GPL-2.0-only
//! Keeping the cache small: results that were not used for long go.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};

use crate::paths;

/// A result used more recently than this stays, whatever the number: a guest may
/// be running from it, or another checkout working with it.
const UNTOUCHABLE: Duration = Duration::from_secs(3 * 3600);

/// Notes that a cached directory was used now.
pub fn touch(dir: &Path) -> Result<()> {
    let file = dir.join("used");
    fs::write(&file, "").with_context(|| format!("cannot write {}", file.display()))
}

/// Removes the directories `parent/prefix*` but the `keep` used last.
pub fn prune(parent: &Path, prefix: &str, keep: usize) -> Result<()> {
    for dir in spare(parent, prefix, keep, SystemTime::now())? {
        paths::remove_dir(&dir)?;
    }
    Ok(())
}

fn spare(parent: &Path, prefix: &str, keep: usize, now: SystemTime) -> Result<Vec<PathBuf>> {
    let mut dirs = Vec::new();
    let entries =
        fs::read_dir(parent).with_context(|| format!("cannot list {}", parent.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_dir() && name.starts_with(prefix) {
            dirs.push((last_use(&path), path));
        }
    }
    dirs.sort();
    dirs.reverse();
    Ok(dirs
        .into_iter()
        .skip(keep)
        .filter(|(used, _)| now.duration_since(*used).is_ok_and(|age| age > UNTOUCHABLE))
        .map(|(_, path)| path)
        .collect())
}

/// When a directory was used: the note of `touch`, or else its own time.
fn last_use(dir: &Path) -> SystemTime {
    let time = |path: &Path| fs::metadata(path).and_then(|m| m.modified());
    time(&dir.join("used"))
        .or_else(|_| time(dir))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_recently_used_goes_and_nothing_used_just_now() {
        let parent = tempfile::tempdir().unwrap();
        for (name, age_hours) in [("a-1", 9), ("a-2", 20), ("a-3", 8), ("b-1", 30)] {
            let dir = parent.path().join(name);
            fs::create_dir(&dir).unwrap();
            touch(&dir).unwrap();
            let used = SystemTime::now() - Duration::from_secs(age_hours * 3600);
            let file = fs::File::options()
                .write(true)
                .open(dir.join("used"))
                .unwrap();
            file.set_modified(used).unwrap();
        }
        let names = |keep, now| -> Vec<String> {
            let dirs = spare(parent.path(), "a-", keep, now).unwrap();
            dirs.iter()
                .map(|d| d.file_name().unwrap().to_string_lossy().into_owned())
                .collect()
        };
        let now = SystemTime::now();
        assert_eq!(names(1, now), ["a-1", "a-2"]);
        assert_eq!(names(2, now), ["a-2"]);
        let earlier = now - Duration::from_secs(7 * 3600);
        assert_eq!(names(0, earlier), ["a-2"]);
    }
}
