// SPDX-License-Identifier: GPL-2.0-only
//! Where things are: the checkout, its `target/`, and the cache outside it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

/// The top of the checkout this tool was built from.
pub fn workspace() -> PathBuf {
    let xtask = Path::new(env!("CARGO_MANIFEST_DIR"));
    xtask.parent().unwrap_or(xtask).to_path_buf()
}

/// Results people look at: `.deb` files, logs, scenario directories.
pub fn target() -> PathBuf {
    workspace().join("target")
}

/// `$XDG_CACHE_HOME/zumastor` or `~/.cache/zumastor`, made if absent.
///
/// Everything below is keyed by content, so removing it costs time only.
pub fn cache() -> Result<PathBuf> {
    let base = match std::env::var_os("XDG_CACHE_HOME").filter(|v| !v.is_empty()) {
        Some(xdg) => PathBuf::from(xdg),
        None => match std::env::var_os("HOME").filter(|v| !v.is_empty()) {
            Some(home) => PathBuf::from(home).join(".cache"),
            None => bail!("neither XDG_CACHE_HOME nor HOME is set: no place for the cache"),
        },
    };
    let dir = base.join("zumastor");
    make_dir(&dir)?;
    Ok(dir)
}

/// A path as people see it: from the top of the checkout, where it is in there.
pub fn shown(path: &Path) -> std::path::Display<'_> {
    // The checkout's path is a constant of this build.
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    top.and_then(|top| path.strip_prefix(top).ok())
        .unwrap_or(path)
        .display()
}

/// `create_dir_all` whose error names the directory.
pub fn make_dir(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("cannot create directory {}", dir.display()))
}

/// Removes a directory tree; one that is absent already is fine.
pub fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("cannot remove directory {}", dir.display()))
        }
        _ => Ok(()),
    }
}

/// Replaces `dir` by an empty directory.
pub fn fresh_dir(dir: &Path) -> Result<()> {
    remove_dir(dir)?;
    make_dir(dir)
}
