// SPDX-License-Identifier: GPL-2.0-only
//! `cargo xtask kernel`: Debian's kernel source with dm-ddsnap in `drivers/md`,
//! as linux-image and linux-headers packages.
//!
//! The cache has one build tree for each (source version, fragments, compiler)
//! and, in it, one set of packages for each state of `ddsnap/kernel/`. A change
//! of the driver alone is thus an incremental build of a minute or two.

pub mod config;
mod tree;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::digest::Key;
use crate::ui::{Step, run_logged};
use crate::{cache, lock, packages, paths};
use config::Fragment;

/// Debian's package of the kernel source.
const SOURCE_PACKAGE: &str = "linux-source-6.12";

/// The tarball that package installs.
const SOURCE_TARBALL: &str = "/usr/src/linux-source-6.12.tar.xz";

/// Build trees of one configuration that stay in the cache (1.2 GiB each), and
/// sets of packages in each (15 MiB).
const KEPT_TREES: usize = 1;
const KEPT_PACKAGES: usize = 4;

/// The driver in our tree.
const DRIVER: &str = "ddsnap/kernel";

/// Debian packages a build needs.
pub const PACKAGES: &[&str] = &[
    "bc",
    "bison",
    "build-essential",
    "cpio",
    "debhelper",
    "flex",
    "kmod",
    "libelf-dev",
    "libssl-dev",
    "rsync",
    "xz-utils",
    "zstd",
    SOURCE_PACKAGE,
];

/// The packages of one built kernel.
#[derive(Clone, Debug)]
pub struct Built {
    /// `linux-image-*.deb`
    pub image: PathBuf,
    /// `linux-headers-*.deb`
    pub headers: PathBuf,
}

/// Whether dm-ddsnap is built along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// As a module, from this checkout.
    With,
    /// Not at all: a guest for people who load their own.
    Without,
}

/// Builds (or finds in the cache) the kernel of `kernel-config/NAME.config`.
pub fn build(name: &str, driver: Driver) -> Result<Built> {
    packages::require(PACKAGES)?;
    let root = paths::workspace();
    let fragments = fragments_of(name, &root.join("kernel-config"))?;
    let version = packages::installed_version(SOURCE_PACKAGE)?
        .with_context(|| format!("{SOURCE_PACKAGE} is not installed"))?;

    let mut key = Key::new("kernel-tree-1")
        .text(&version)
        .text(&compiler_version()?);
    for fragment in &fragments {
        key = key.text(&fragment.text);
    }
    let cache_dir = paths::cache()?.join("kernel");
    let dir = cache_dir.join(format!("{name}-{}", key.finish()));
    paths::make_dir(&dir)?;

    let source = root.join(DRIVER);
    let debs = dir.join(match driver {
        Driver::With => {
            let files = tree::driver_files(&source)?;
            format!(
                "debs-{}",
                Key::new("kernel-debs-1").files(&source, &files)?.finish()
            )
        }
        Driver::Without => "debs-without-driver".to_string(),
    });
    let cached = || -> Result<Option<Built>> {
        cache::touch(&dir)?;
        let built = find(&debs)?;
        built.is_some().then(|| cache::touch(&debs)).transpose()?;
        Ok(built)
    };
    // What is there is complete: no need to wait until another checkout's driver is built.
    if let Some(built) = cached()? {
        return Ok(built);
    }
    let _lock = lock::take(&dir.join("lock"))?.held_by_children()?;
    if let Some(built) = cached()? {
        return Ok(built);
    }
    cache::prune(&cache_dir, &format!("{name}-"), KEPT_TREES)?;
    cache::prune(&dir, "debs-", KEPT_PACKAGES)?;
    let tree = dir.join("tree");
    let log = dir.join("build.log");
    let step = Step::start(format!("kernel {name} ({})", log.display()));
    fs::write(&log, "").with_context(|| format!("cannot write {}", log.display()))?;
    if !tree.join("Makefile").exists() {
        step.note("unpacking the source");
        tree::unpack(Path::new(SOURCE_TARBALL), &tree, &log)?;
    }
    if driver == Driver::With {
        tree::install_driver(&source, &tree)?;
    }
    step.note("configuring");
    config::configure(&tree, &fragments, driver == Driver::With, &log)?;
    step.note("compiling (a cold build takes a quarter of an hour on two cores)");
    make_packages(&tree, &version, &log)?;
    collect(&dir, &debs)?;
    step.done("built");
    find(&debs)?.context("the kernel's build left no linux-image and linux-headers packages")
}

/// Copies the packages to `target/kernel/`.
pub fn publish(built: &Built) -> Result<Vec<PathBuf>> {
    let dir = paths::target().join("kernel");
    paths::make_dir(&dir)?;
    let mut published = Vec::new();
    for deb in [&built.image, &built.headers] {
        let to = dir.join(deb.file_name().unwrap_or_default());
        fs::copy(deb, &to).with_context(|| format!("cannot write {}", to.display()))?;
        published.push(to);
    }
    Ok(published)
}

/// base plus the named fragments: `debug` builds upon `qemu`'s choices of its own.
fn fragments_of(name: &str, dir: &Path) -> Result<Vec<Fragment>> {
    let own = dir.join(format!("{name}.config"));
    if name == "base" || !own.is_file() {
        let names = names_in(dir)?.join(", ");
        bail!("no kernel configuration named {name}; there are: {names}");
    }
    Ok(vec![
        Fragment::read(&dir.join("base.config"))?,
        Fragment::read(&own)?,
    ])
}

fn names_in(dir: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
    for entry in entries {
        let path = entry?.path();
        let is_config = path.extension().is_some_and(|e| e == "config");
        if let Some(stem) = path.file_stem().filter(|s| is_config && *s != "base") {
            names.push(stem.to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
}

fn compiler_version() -> Result<String> {
    let out = Command::new("gcc")
        .arg("--version")
        .output()
        .context("cannot run gcc")?;
    let text = String::from_utf8_lossy(&out.stdout);
    Ok(text.lines().next().unwrap_or_default().to_string())
}

/// `make bindeb-pkg`; the packages appear beside the tree.
fn make_packages(tree: &Path, version: &str, log: &Path) -> Result<()> {
    let jobs = std::thread::available_parallelism().map_or(1, |n| n.get());
    run_logged(
        Command::new("make")
            .current_dir(tree)
            .arg("-s")
            .arg(format!("-j{jobs}"))
            .arg("bindeb-pkg")
            .arg(format!("KDEB_PKGVERSION={version}+zumastor"))
            // Nobody installs the C library's headers from here.
            .env("DEB_BUILD_PROFILES", "pkg.linux-upstream.nokerneldbg")
            .env("DEBFULLNAME", "Zumastor")
            .env("DEBEMAIL", "zumastor@localhost")
            .env("KBUILD_BUILD_USER", "zumastor")
            .env("KBUILD_BUILD_HOST", "xtask")
            // A time of its own in each build would link all of the kernel anew.
            .env("KBUILD_BUILD_TIMESTAMP", "2026-01-01")
            .env("KDEB_COMPRESS", "zstd")
            .env_remove("MAKEFLAGS")
            .env_remove("LOCALVERSION"),
        log,
    )
}

/// Moves the finished packages to `debs`, in one step, so that a directory of
/// that name is always complete.
fn collect(dir: &Path, debs: &Path) -> Result<()> {
    let partial = dir.join("debs.partial");
    paths::fresh_dir(&partial)?;
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with("linux-image-") || name.starts_with("linux-headers-") {
            fs::rename(&path, partial.join(&name))?;
        } else if name.starts_with("linux-") {
            fs::remove_file(&path)?; // changes, buildinfo, libc headers
        }
    }
    fs::rename(&partial, debs)
        .with_context(|| format!("cannot move the packages to {}", debs.display()))
}

fn find(debs: &Path) -> Result<Option<Built>> {
    if !debs.is_dir() {
        return Ok(None);
    }
    let mut image = None;
    let mut headers = None;
    for entry in fs::read_dir(debs)? {
        let path = entry?.path();
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name.starts_with("linux-image-") {
            image = Some(path);
        } else if name.starts_with("linux-headers-") {
            headers = Some(path);
        }
    }
    Ok(image
        .zip(headers)
        .map(|(image, headers)| Built { image, headers }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_configuration_is_named_with_those_that_exist() {
        let dir = paths::workspace().join("kernel-config");
        let error = fragments_of("nonsense", &dir).unwrap_err().to_string();
        assert!(
            error.contains("nonsense") && error.contains("qemu"),
            "{error}"
        );
        assert!(fragments_of("base", &dir).is_err());
    }
}
