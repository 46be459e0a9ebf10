// SPDX-License-Identifier: GPL-2.0-only
//! `cargo xtask deb`: our Debian packages, by dpkg-buildpackage.
//!
//! The build runs in a copy of the sources under `target/`, so the checkout
//! stays clean, with a cargo target directory of its own that survives, so the
//! next build is incremental. Results are cached by the content they depend on.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::digest::{Key, files_below};
use crate::ui::{Step, run_logged};
use crate::{cache, lock, packages, paths};

/// What the packages are made from.
const SOURCES: &[&str] = &[
    "Cargo.toml",
    "Cargo.lock",
    "COPYING",
    "README.md",
    "ddsnap",
    "debian",
    "docs",
    "zumastor",
];

/// Debian packages a build needs beside those `debian/control` names.
pub const PACKAGES: &[&str] = &["build-essential", "debhelper", "dpkg-dev", "lintian"];

/// Sets of packages that stay in the cache.
const KEPT: usize = 5;

/// Needed by cargo to read the workspace, without effect on the packages.
const MANIFESTS: &[&str] = &["xtask/Cargo.toml", "xtask/src/main.rs"];

/// Builds (or finds in the cache) the packages; they are copied to `target/deb/`.
pub fn build() -> Result<Vec<PathBuf>> {
    let root = paths::workspace();
    if !root.join("debian/control").is_file() {
        bail!("there is no debian/control: nothing to build packages from");
    }
    packages::require(PACKAGES)?;
    packages::require_build_dependencies(&root)?;
    let sources = sources(&root)?;
    let key = key(&root, &sources)?;
    let cache_dir = paths::cache()?.join("deb");
    paths::make_dir(&cache_dir)?;
    // They are built and published in this checkout's target/.
    paths::make_dir(&paths::target())?;
    let _here = lock::take(&paths::target().join("deb.lock"))?;
    let cached = cache_dir.join(&key);
    // What is there is whole, and need not wait for somebody who builds other sources.
    if !cached.is_dir() {
        let _lock = lock::take(&cache_dir.join("lock"))?;
        if !cached.is_dir() {
            cache::prune(&cache_dir, "", KEPT)?;
            make(&root, &sources, &key, &cached)?;
        }
    }
    cache::touch(&cached)?;
    publish(&cached)
}

/// Whether a package is the DKMS one.
pub fn is_dkms(deb: &Path) -> bool {
    deb.file_name()
        .is_some_and(|name| name.to_string_lossy().contains("-dkms_"))
}

/// Files of the checkout that make the packages: those git tracks or would
/// track, so that editor leftovers and build results do not count.
fn sources(root: &Path) -> Result<Vec<PathBuf>> {
    let out = Command::new("git")
        .current_dir(root)
        .args([
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
            "--",
        ])
        .args(SOURCES)
        .output();
    let listed: BTreeSet<PathBuf> = match out {
        Ok(out) if out.status.success() => String::from_utf8_lossy(&out.stdout)
            .split('\0')
            .filter(|name| !name.is_empty())
            .map(PathBuf::from)
            .collect(),
        // A source tree without git: everything below.
        _ => {
            let mut all = BTreeSet::new();
            for source in SOURCES {
                for file in files_below(&root.join(source))? {
                    all.insert(file.strip_prefix(root).unwrap_or(&file).to_path_buf());
                }
            }
            all
        }
    };
    Ok(listed
        .into_iter()
        .filter(|file| root.join(file).is_file())
        .collect())
}

/// What stands for the packages that are made from `sources` below `root`.
fn key(root: &Path, sources: &[PathBuf]) -> Result<String> {
    let key = Key::new("deb-1").text(&compilers()?).files(root, sources)?;
    Ok(key.finish())
}

fn compilers() -> Result<String> {
    let out = Command::new("rustc")
        .arg("--version")
        .output()
        .context("cannot run rustc")?;
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn make(root: &Path, sources: &[PathBuf], wanted: &str, cached: &Path) -> Result<()> {
    let work = paths::target().join("deb-build");
    let copy = work.join("zumastor");
    paths::make_dir(&copy)?;
    let log = work.join("build.log");
    fs::write(&log, "").with_context(|| format!("cannot write {}", log.display()))?;
    let step = Step::start(format!("Debian packages ({})", paths::shown(&log)));
    let manifests: Vec<PathBuf> = MANIFESTS.iter().map(PathBuf::from).collect();
    mirror(root, &copy, sources.iter().chain(&manifests))?;
    // The key was made before the locks were waited for.
    if key(&copy, sources)? != wanted {
        bail!(
            "the sources of the packages changed while another build was waited for; run it again"
        );
    }
    remove_products(&work)?;
    run_logged(
        Command::new("dpkg-buildpackage")
            .current_dir(&copy)
            .args(["-b", "-us", "-uc"])
            .env("CARGO_TARGET_DIR", work.join("cargo"))
            // Debug information is in the build directory if it is wanted.
            .env("DEB_BUILD_OPTIONS", "noautodbgsym")
            .env_remove("MAKEFLAGS")
            .env_remove("CARGO_MANIFEST_DIR"),
        &log,
    )?;
    step.note("lintian");
    let debs = products(&work)?;
    if debs.is_empty() {
        bail!(
            "dpkg-buildpackage succeeded but left no .deb; see {}",
            log.display()
        );
    }
    run_logged(
        Command::new("lintian")
            .args([
                "--fail-on",
                "error",
                "--allow-root",
                "--tag-display-limit",
                "0",
            ])
            .args(&debs),
        &log,
    )?;
    let partial = cached.with_extension("partial");
    paths::fresh_dir(&partial)?;
    for deb in &debs {
        fs::copy(deb, partial.join(deb.file_name().unwrap_or_default()))?;
    }
    fs::rename(&partial, cached).with_context(|| format!("cannot make {}", cached.display()))?;
    step.done("built, lintian has no error");
    Ok(())
}

/// Makes `to` hold exactly these files of `from`; unchanged ones keep their
/// times, so that cargo recompiles only what differs.
fn mirror<'a>(from: &Path, to: &Path, files: impl Iterator<Item = &'a PathBuf>) -> Result<()> {
    let mut wanted = BTreeSet::new();
    for file in files {
        let (source, copy) = (from.join(file), to.join(file));
        paths::make_dir(copy.parent().unwrap_or(to))?;
        let content =
            fs::read(&source).with_context(|| format!("cannot read {}", source.display()))?;
        if fs::read(&copy).ok().as_ref() != Some(&content) {
            fs::write(&copy, content)
                .with_context(|| format!("cannot write {}", copy.display()))?;
        }
        fs::set_permissions(&copy, fs::metadata(&source)?.permissions())?;
        wanted.insert(copy);
    }
    for old in files_below(to)? {
        if !wanted.contains(&old) {
            fs::remove_file(&old)?;
        }
    }
    Ok(())
}

fn products(work: &Path) -> Result<Vec<PathBuf>> {
    let mut debs = Vec::new();
    for entry in fs::read_dir(work)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "deb") {
            debs.push(path);
        }
    }
    debs.sort();
    Ok(debs)
}

fn remove_products(work: &Path) -> Result<()> {
    for entry in fs::read_dir(work)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|e| e == "deb" || e == "changes" || e == "buildinfo")
        {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Copies the cached packages to `target/deb/`, replacing what was there.
fn publish(cached: &Path) -> Result<Vec<PathBuf>> {
    let dir = paths::target().join("deb");
    paths::fresh_dir(&dir)?;
    let mut published = Vec::new();
    for deb in products(cached)? {
        let to = dir.join(deb.file_name().unwrap_or_default());
        fs::copy(&deb, &to).with_context(|| format!("cannot write {}", to.display()))?;
        published.push(to);
    }
    Ok(published)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mirror_follows_changes_and_removals_and_keeps_times() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("d")).unwrap();
        fs::write(from.join("d/a"), "1").unwrap();
        fs::write(from.join("b"), "2").unwrap();
        let both = [PathBuf::from("d/a"), PathBuf::from("b")];
        mirror(&from, &to, both.iter()).unwrap();
        let before = fs::metadata(to.join("b")).unwrap().modified().unwrap();
        fs::write(from.join("d/a"), "3").unwrap();
        mirror(&from, &to, both.iter()).unwrap();
        assert_eq!(fs::read_to_string(to.join("d/a")).unwrap(), "3");
        assert_eq!(
            fs::metadata(to.join("b")).unwrap().modified().unwrap(),
            before
        );
        mirror(&from, &to, both[..1].iter()).unwrap();
        assert!(!to.join("b").exists());
    }

    #[test]
    fn the_dkms_package_is_recognised() {
        assert!(is_dkms(Path::new("/x/dm-ddsnap-dkms_0.11.0_all.deb")));
        assert!(!is_dkms(Path::new("/x/ddsnap_0.11.0_amd64.deb")));
    }
}
