// SPDX-License-Identifier: GPL-2.0-only
//! The links that lead to mounts. Plain files below the layout's directories.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::config::Snapshot;

/// The snapshot directory's links: by time to the mount, and `KIND.n`, newest 0, to the time.
///
/// `mounted` gives the mount point of a device that is mounted: a received snapshot is looked for by its twin.
#[must_use]
pub fn snapshot_links(
    snapshots: &[Snapshot],
    mounted: impl Fn(u32) -> Option<PathBuf>,
) -> BTreeMap<String, PathBuf> {
    let mut links = BTreeMap::new();
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for snapshot in snapshots.iter().rev() {
        let Some(dir) = mounted(snapshot.twin.unwrap_or(snapshot.id)) else {
            continue;
        };
        for kind in &snapshot.kinds {
            let count = counts.entry(kind).or_default();
            links.insert(format!("{kind}.{count}"), PathBuf::from(&snapshot.time));
            *count += 1;
        }
        links.insert(snapshot.time.clone(), dir);
    }
    links
}

/// Makes the links in `dir` exactly `wanted`; what is no link is left alone.
pub fn sync_links(dir: &Path, wanted: &BTreeMap<String, PathBuf>) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("could not create {}", dir.display()))?;
    let entries = fs::read_dir(dir).with_context(|| format!("could not read {}", dir.display()))?;
    for entry in entries {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if path.is_symlink() && !wanted.contains_key(&name) {
            fs::remove_file(&path)
                .with_context(|| format!("could not remove {}", path.display()))?;
        }
    }
    for (name, target) in wanted {
        set_link(&dir.join(name), target)?;
    }
    Ok(())
}

/// Makes `path` a link to `target`, replacing another link or an empty directory.
pub fn set_link(path: &Path, target: &Path) -> Result<()> {
    if fs::read_link(path).is_ok_and(|found| found == target) {
        return Ok(());
    }
    let failed = || format!("could not create the link {}", path.display());
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(failed)?;
    }
    if path.is_dir() && !path.is_symlink() {
        fs::remove_dir(path).with_context(failed)?;
    }
    // Renaming replaces a link at once: nobody sees the path missing.
    let mut temporary = path.as_os_str().to_os_string();
    temporary.push(".new");
    remove_link(Path::new(&temporary))?;
    symlink(target, &temporary).with_context(failed)?;
    fs::rename(&temporary, path).with_context(failed)
}

/// Removes the link at `path`, if there is one.
pub fn remove_link(path: &Path) -> Result<()> {
    if !path.is_symlink() {
        return Ok(());
    }
    fs::remove_file(path).with_context(|| format!("could not remove {}", path.display()))
}

/// Makes an empty file at `path`, if there is none.
pub fn set_flag(path: &Path) -> Result<()> {
    let failed = || format!("could not create {}", path.display());
    if path.exists() {
        return Ok(());
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).with_context(failed)?;
    }
    fs::write(path, "").with_context(failed)
}

/// Removes the file at `path`, if there is one.
pub fn remove_flag(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("could not remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Removes `dir` if it is there and empty.
pub fn remove_empty_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir(dir) {
        Ok(()) => Ok(()),
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound) => Ok(()),
        Err(e) if e.raw_os_error() == Some(nix::libc::ENOTEMPTY) => Ok(()),
        Err(e) => Err(e).with_context(|| format!("could not remove {}", dir.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::MANUAL;

    fn snapshot(id: u32, time: &str) -> Snapshot {
        Snapshot {
            id,
            uuid: uuid::Uuid::nil(),
            kinds: vec![MANUAL.to_string()],
            time: time.to_string(),
            created: 0,
            sequence: None,
            protected: false,
            twin: None,
        }
    }

    #[test]
    fn links_lead_from_kind_to_time_to_mount() {
        let all = [snapshot(0, "t0"), snapshot(2, "t2"), snapshot(4, "t4")];
        let links = snapshot_links(&all, |id| (id != 2).then(|| format!("/m({id})").into()));
        let found: Vec<String> = links
            .iter()
            .map(|(name, to)| format!("{name} -> {}", to.display()))
            .collect();
        let expected = [
            "manual.0 -> t4",
            "manual.1 -> t0",
            "t0 -> /m(0)",
            "t4 -> /m(4)",
        ];
        assert_eq!(found, expected);
        // One snapshot may be of several rotations, and has its place in each.
        let mut all = all;
        all[2].kinds = vec!["hourly".into(), "daily".into()];
        let links = snapshot_links(&all, |id| Some(format!("/m({id})").into()));
        for (link, time) in [("hourly.0", "t4"), ("daily.0", "t4"), ("manual.0", "t2")] {
            assert_eq!(links[link], Path::new(time));
        }
    }

    #[test]
    fn link_directories_follow_what_is_wanted() {
        let root = tempfile::tempdir().expect("a directory");
        let dir = root.path().join("snapshot/v");
        let mut wanted = BTreeMap::from([("manual.0".to_string(), PathBuf::from("t0"))]);
        sync_links(&dir, &wanted).expect("made");
        fs::write(dir.join("a file"), "").expect("written");
        wanted = BTreeMap::from([("t2".to_string(), PathBuf::from("/m(2)"))]);
        sync_links(&dir, &wanted).expect("changed");
        sync_links(&dir, &wanted).expect("the same again");
        assert!(!dir.join("manual.0").is_symlink());
        assert!(dir.join("a file").exists(), "only links are ours");
        assert_eq!(
            fs::read_link(dir.join("t2")).expect("a link"),
            Path::new("/m(2)")
        );
    }

    #[test]
    fn a_directory_with_contents_is_not_replaced_by_a_link() {
        let root = tempfile::tempdir().expect("a directory");
        let path = root.path().join("v");
        fs::create_dir_all(path.join("data")).expect("made");
        assert!(set_link(&path, Path::new("/elsewhere")).is_err());
        assert!(path.join("data").exists());
    }
}
