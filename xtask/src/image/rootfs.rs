// SPDX-License-Identifier: GPL-2.0-only
//! The Debian packages of a guest, as one tar file by mmdebstrap.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::Distro;
use crate::digest::Key;
use crate::ui::{Step, run_logged};
use crate::{lock, packages, paths};

/// What every guest has: systemd, the agent, storage tools, a load generator.
const COMMON: &[&str] = &[
    "btrfs-progs",
    "cron",
    "cryptsetup-bin",
    "dbus",
    "dmsetup",
    "e2fsprogs",
    "fdisk",
    "fio",
    "iproute2",
    "kmod",
    "logrotate",
    "lvm2",
    "mount",
    "openssh-client",
    "openssh-server",
    "procps",
    "psmisc",
    "qemu-guest-agent",
    "systemd",
    "systemd-sysv",
    "udev",
    "util-linux",
    "util-linux-extra",
    "xfsprogs",
];

/// What a guest with Debian's own kernel has beside it, to build modules, and to read over NBD.
const STOCK: &[&str] = &[
    "dkms",
    "gcc",
    "initramfs-tools",
    "libnbd-bin",
    "linux-headers-amd64",
    "linux-image-amd64",
    "make",
    "nbd-client",
    "qemu-utils",
];

/// A base root file system.
pub struct Base {
    /// The tar file.
    pub tar: PathBuf,
    /// Content key.
    pub key: String,
}

/// Builds (or finds in the cache) the base of a distribution.
pub fn base(distro: Distro, stock: bool) -> Result<Base> {
    let mut list: Vec<&str> = COMMON.to_vec();
    if stock {
        list.extend(STOCK);
    }
    let key = Key::new("rootfs-2")
        .text(distro.suite())
        .text(&list.join(" "))
        .finish();
    let dir = paths::cache()?.join("rootfs");
    paths::make_dir(&dir)?;
    let kind = if stock { "stock" } else { "plain" };
    let tar = dir.join(format!("{distro}-{kind}-{key}.tar"));
    let _lock = lock::take(&dir.join("lock"))?;
    if !tar.is_file() {
        let partial = tar.with_extension("partial");
        let log = tar.with_extension("log");
        fs::write(&log, "").with_context(|| format!("cannot write {}", log.display()))?;
        let step = Step::start(format!(
            "Debian {distro} packages, {kind} ({})",
            log.display()
        ));
        run_logged(
            Command::new("mmdebstrap")
                .arg("--variant=minbase")
                .arg(format!("--include={}", list.join(",")))
                .arg("--aptopt=Apt::Install-Recommends \"false\"")
                .arg("--dpkgopt=path-exclude=/usr/share/man/*")
                .arg("--dpkgopt=path-exclude=/usr/share/locale/*")
                .arg("--dpkgopt=path-exclude=/usr/share/doc/*")
                .arg("--dpkgopt=path-include=/usr/share/doc/*/copyright")
                .arg("--format=tar")
                .arg(distro.suite())
                .arg(&partial)
                .arg(packages::mirror()?),
            &log,
        )?;
        fs::rename(&partial, &tar).with_context(|| format!("cannot make {}", tar.display()))?;
        step.done("fetched");
    }
    Ok(Base { tar, key })
}
