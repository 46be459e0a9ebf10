// SPDX-License-Identifier: GPL-2.0-only
//! Mounting and unmounting.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};

use crate::machine::Busy;
use crate::mount_table::table;
use crate::{blockdev, process};

/// Longest wait for mount: a journal may have to be replayed.
const MOUNT_DEADLINE: Duration = Duration::from_secs(300);

/// Mounts `node` on `dir`; fails with [`Busy`] while somebody else has the device for himself.
pub fn mount(node: &Path, dir: &Path, fstype: &str, options: &[String]) -> Result<()> {
    let mut argv: Vec<OsString> = vec!["mount".into(), "-t".into(), fstype.into()];
    if !options.is_empty() {
        argv.extend(["-o".into(), options.join(",").into()]);
    }
    argv.extend(["--".into(), node.into(), dir.into()]);
    let output = process::run(&argv, MOUNT_DEADLINE)?;
    if output.code == Some(0) {
        return Ok(());
    }
    let text = output.complaint();
    // mount(8) has another text for it in each version; the kernel tells.
    let held = matches!(blockdev::claim(node), Ok(None));
    if held || text.contains("mount point busy") {
        let users = blockdev::number(node).map(blockdev::all_users);
        let device = node.display().to_string();
        return Err(users.unwrap_or_default().busy(device).into());
    }
    if fstype == "btrfs" && text.contains("File exists") {
        bail!(
            "this kernel cannot mount a second btrfs with the UUID of one that is mounted (since 6.7 it \
             can): {text}"
        );
    }
    bail!("{text}");
}

/// Unmounts `dir`.
pub fn unmount(dir: &Path) -> Result<()> {
    match umount2(dir, MntFlags::UMOUNT_NOFOLLOW) {
        Ok(()) => Ok(()),
        Err(Errno::EBUSY) => {
            let mounts = table()?;
            let device = mounts
                .iter()
                .rev()
                .find(|m| m.dir == dir)
                .map(|m| m.source.clone());
            let device = device
                .unwrap_or_else(|| dir.to_path_buf())
                .display()
                .to_string();
            let below = mounts
                .iter()
                .filter(|m| m.dir != dir && m.dir.starts_with(dir));
            let mut holders: Vec<String> = below
                .map(|m| format!("a mount on {}", m.dir.display()))
                .collect();
            // Links of /proc show the text of a path; following them could block on a dead mount.
            let inside = |link: &Path| fs::read_link(link).is_ok_and(|p| p.starts_with(dir));
            let lasting = !holders.is_empty();
            holders.extend(process::users(inside));
            Err(Busy {
                device,
                holders,
                lasting,
            }
            .into())
        }
        Err(e) => Err(e).with_context(|| format!("could not unmount {}", dir.display())),
    }
}

/// Takes the mount on `dir` out of everybody's sight; it ends when the last who uses it has gone.
pub fn detach(dir: &Path) -> Result<()> {
    umount2(dir, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)
        .with_context(|| format!("could not detach {}", dir.display()))
}
