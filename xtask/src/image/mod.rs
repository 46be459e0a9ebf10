// SPDX-License-Identifier: GPL-2.0-only
//! Guest images, in layers cached by content.
//!
//! 1. a root file system of Debian packages, by mmdebstrap, as a tar file;
//! 2. on top of it our packages, installed with apt inside, as a raw disk made
//!    by `mke2fs -d` without mounting anything;
//! 3. (see `booted`) that disk booted once, saved with its memory.

pub mod booted;
pub mod identity;
mod rootfs;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};

use crate::digest::Key;
use crate::ui::{Step, run_logged};
use crate::{cache, lock, packages, paths};

/// Debian packages that building and running a guest needs.
pub const PACKAGES: &[&str] = &[
    "debian-archive-keyring",
    "e2fsprogs",
    "mmdebstrap",
    "qemu-system-x86",
    "qemu-utils",
];

/// Images of one flavour that stay in the cache.
const KEPT: usize = 3;

/// A Debian release a guest runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Distro {
    /// Debian 13.
    #[default]
    Trixie,
    /// Debian 12.
    Bookworm,
}

impl Distro {
    /// The suite's name in the archive.
    pub fn suite(self) -> &'static str {
        match self {
            Distro::Trixie => "trixie",
            Distro::Bookworm => "bookworm",
        }
    }
}

impl std::fmt::Display for Distro {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.suite())
    }
}

/// What a guest is for.
#[derive(Clone, Debug)]
pub enum Content {
    /// A kernel of ours and, installed beside it, these packages.
    Own {
        /// `linux-image-*.deb`
        kernel: PathBuf,
        /// Our packages; may be empty.
        debs: Vec<PathBuf>,
    },
    /// Debian's own kernel and what DKMS needs.
    Stock {
        /// Our packages. They lie in `/srv/debs`, with all they depend on in apt's cache: the guest can install
        /// them without a network.
        debs: Vec<PathBuf>,
        /// Or they are installed, and DKMS has built the module. That is done here and not in the guest, where
        /// emulation would take a quarter of an hour over it.
        installed: bool,
    },
}

/// A finished image.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Image {
    /// Cache directory that holds it.
    pub dir: PathBuf,
    /// Kernel to boot.
    pub vmlinuz: PathBuf,
    /// Its initial RAM disk; only Debian's own kernel has one.
    pub initrd: Option<PathBuf>,
    /// Raw root disk; guests write to overlays of it.
    pub root: PathBuf,
    /// Content key.
    pub key: String,
}

/// Builds (or finds in the cache) an image.
pub fn build(distro: Distro, content: &Content) -> Result<Image> {
    packages::require(PACKAGES)?;
    let cache_dir = paths::cache()?.join("image");
    paths::make_dir(&cache_dir)?;
    let (flavour, debs) = match content {
        Content::Own { kernel, debs } if debs.is_empty() => ("bare", vec![kernel.clone()]),
        Content::Own { kernel, debs } => ("ddsnap", [vec![kernel.clone()], debs.clone()].concat()),
        Content::Stock { debs, installed } => {
            (if *installed { "dkms" } else { "stock" }, debs.clone())
        }
    };
    let base = rootfs::base(distro, matches!(content, Content::Stock { .. }))?;
    let mut key = Key::new(include_str!("layer.sh"))
        .text(flavour)
        .text(&base.key);
    for deb in &debs {
        let bytes = fs::read(deb).with_context(|| format!("cannot read {}", deb.display()))?;
        key = key.bytes(&bytes);
    }
    let key = key.finish();
    let dir = cache_dir.join(format!("{distro}-{flavour}-{key}"));
    let _lock = lock::take(&cache_dir.join(format!("{distro}-{flavour}.lock")))?;
    if !dir.is_dir() {
        cache::prune(&cache_dir, &format!("{distro}-{flavour}-"), KEPT)?;
        make(&dir, &base.tar, flavour, &debs)?;
    }
    cache::touch(&dir)?;
    found(dir, key)
}

fn make(dir: &Path, base: &Path, flavour: &str, debs: &[PathBuf]) -> Result<()> {
    let partial = dir.with_extension("partial");
    paths::fresh_dir(&partial)?;
    let log = partial.join("build.log");
    let step = Step::start(format!("guest image {flavour} ({})", log.display()));
    let script = partial.join("layer.sh");
    fs::write(&script, include_str!("layer.sh"))?;
    let mut args = vec![
        script,
        partial.clone(),
        base.to_path_buf(),
        PathBuf::from(flavour),
    ];
    args.extend(debs.iter().cloned());
    run_logged(as_root("sh", &args)?.arg("--"), &log)?;
    fs::rename(&partial, dir).with_context(|| format!("cannot make {}", dir.display()))?;
    step.done("built");
    Ok(())
}

/// A command that may unpack files of any owner and change its root: as root in
/// a mount name space of its own, or else in a user name space.
fn as_root(program: &str, args: &[PathBuf]) -> Result<Command> {
    let mut command = if nix::unistd::geteuid().is_root() {
        let mut unshare = Command::new("unshare");
        unshare.args(["--mount", "--propagation", "private", "--"]);
        unshare
    } else {
        let mut helper = Command::new("mmdebstrap");
        helper.arg("--unshare-helper");
        helper
    };
    command.arg(program).args(args);
    Ok(command)
}

fn found(dir: PathBuf, key: String) -> Result<Image> {
    let vmlinuz = dir.join("vmlinuz");
    if !vmlinuz.is_file() {
        bail!(
            "{} has no kernel; remove the directory to have it built again",
            dir.display()
        );
    }
    let initrd = Some(dir.join("initrd")).filter(|path| path.is_file());
    let root = dir.join("root.img");
    Ok(Image {
        vmlinuz,
        initrd,
        root,
        key,
        dir,
    })
}
