// SPDX-License-Identifier: GPL-2.0-only
//! A file beside the link of each doubtful snapshot, so that whoever looks for a snapshot there sees it.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::Volume;

/// What the names of the files end in.
const SUFFIX: &str = ".DOUBTFUL";
/// What is in them.
const TEXT: &str = "The origin was written without this volume while the snapshot existed: \
                    it may show newer data as if it were old.\n";

impl Volume {
    /// Makes the files in the links' directory those of the snapshots that are doubtful now.
    pub(super) fn write_doubts(&self, dir: &Path) -> Result<()> {
        let server = self.layout.server_socket(&self.name);
        let stored = match self.host.snapshots(&server) {
            Ok(stored) => stored,
            Err(error) => {
                self.log(&format!(
                    "it is not known which snapshots are doubtful: {error:#}"
                ));
                return Ok(());
            }
        };
        let snapshots = self.snapshots().iter();
        let names = snapshots.filter(|listed| stored.iter().any(|s| listed.is(s) && s.doubtful));
        sync_doubts(dir, &names.map(|s| format!("{}{SUFFIX}", s.time)).collect())
    }
}

/// Makes the files in `dir` those that are wanted.
pub(super) fn sync_doubts(dir: &Path, wanted: &BTreeSet<String>) -> Result<()> {
    let entries = fs::read_dir(dir).with_context(|| format!("could not read {}", dir.display()))?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(SUFFIX) && !wanted.contains(&name) && entry.file_type()?.is_file() {
            let path = entry.path();
            fs::remove_file(&path)
                .with_context(|| format!("could not remove {}", path.display()))?;
        }
    }
    for name in wanted {
        let path = dir.join(name);
        if !path.exists() {
            fs::write(&path, TEXT)
                .with_context(|| format!("could not write {}", path.display()))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_follow_the_snapshots() {
        let dir = tempfile::tempdir().expect("a directory");
        let names = || -> BTreeSet<String> {
            let entries = fs::read_dir(dir.path()).expect("read").flatten();
            let names = entries.map(|e| e.file_name().to_string_lossy().into_owned());
            names.collect()
        };
        let set = |names: &[&str]| -> BTreeSet<String> {
            names.iter().map(|n| (*n).to_string()).collect()
        };
        fs::write(dir.path().join("other"), "").expect("written");
        let two = set(&["t0.DOUBTFUL", "t2.DOUBTFUL"]);
        for _ in 0..2 {
            sync_doubts(dir.path(), &two).expect("written");
            assert_eq!(names(), set(&["other", "t0.DOUBTFUL", "t2.DOUBTFUL"]));
        }
        sync_doubts(dir.path(), &set(&["t2.DOUBTFUL"])).expect("removed");
        assert_eq!(names(), set(&["other", "t2.DOUBTFUL"]));
        sync_doubts(dir.path(), &set(&[])).expect("removed");
        assert_eq!(names(), set(&["other"]));
    }
}
