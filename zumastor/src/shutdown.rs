// SPDX-License-Identifier: GPL-2.0-only
//! The end of a shutdown: what is still there of any volume goes in order, its server last.
//!
//! `zumastor-shutdown.service` runs this when all services have ended and systemd has unmounted what it
//! could. What uses a volume now would be killed a moment later in any case; here that happens while the
//! volume still works, so that everything written reaches the disk and the store is closed. Found are
//! devices and processes by what they are and not by the volumes' documents, which may be unmounted
//! already; so it serves volumes that were set up by hand too.
//!
//! What does not go stays, with its server (see `ddsnap`'s `daemon::outlive`): systemd-shutdown tries again.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ddsnap::stdio::complain;
use nix::libc;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::layout::Layout;
use crate::machine::{Dev, DmDevice};
use crate::process::{self, Found};
use crate::{blockdev, dm, mount_table};

/// How long a process that uses a volume may take to end when it is asked to.
const POLITE: Duration = Duration::from_secs(3);
/// How long it may take to be gone when it is killed, and a server to close its store.
const SOON: Duration = Duration::from_secs(15);
/// After this time nothing more is killed.
const LAST: Duration = Duration::from_secs(25);

/// How long systemd may take to say what it is doing.
const ASK: Duration = Duration::from_secs(10);

/// Takes down all devices of all volumes, and then ends agents and servers.
///
/// # Errors
/// Some device is still in use.
pub fn run(layout: &Layout) -> Result<()> {
    take_down(layout);
    let left = devices()?;
    end_servers(&left);
    if left.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = left.iter().map(|(name, _)| name.as_str()).collect();
    bail!("still in use: {}", names.join(", "))
}

/// Whether systemd is shutting the machine down.
#[must_use]
pub fn is_under_way() -> bool {
    let argv = ["systemctl", "is-system-running"].map(OsString::from);
    // It exits non-zero for all states but one.
    process::run(&argv, ASK).is_ok_and(|output| output.stdout.trim() == "stopping")
}

/// The devices of our target, snapshots before origins: an origin's users include its snapshots' server.
fn devices() -> Result<Vec<(String, DmDevice)>> {
    let mut found = Vec::new();
    for name in dm::names()? {
        if let Some(device) = dm::find(&name)?.filter(|d| d.table.is_some()) {
            found.push((name, device));
        }
    }
    found.sort_by_key(|(_, device)| {
        let table = device.table.as_ref();
        table.is_none_or(|line| line.id.is_none())
    });
    Ok(found)
}

/// Removes devices until none is left or nothing helps any more.
fn take_down(layout: &Layout) {
    let harder = [None, Some(libc::SIGTERM), Some(libc::SIGKILL)];
    let end = Instant::now() + LAST;
    for signal in harder {
        // A volume may lie on another one: whatever went may have freed a device below.
        loop {
            let found = devices().unwrap_or_default();
            let ended: usize = match signal {
                Some(signal) => found.iter().map(|(_, d)| end_users(d.dev, signal)).sum(),
                None => 0,
            };
            let gone = found.iter().filter(|(name, device)| {
                release(layout, device.dev);
                let result = dm::remove(name);
                if let (Err(error), Some(libc::SIGKILL)) = (&result, signal) {
                    complain(format_args!("{error:#}"));
                }
                result.is_ok()
            });
            let gone = gone.count();
            if gone == found.len() {
                return;
            }
            // A shell that was killed may have started one more program in its last moment.
            let again = signal == Some(libc::SIGKILL) && ended > 0 && Instant::now() < end;
            if gone == 0 && !again {
                break;
            }
        }
    }
}

/// Unmounts a device, ends its use as swap, and removes device-mapper devices on it that are not used.
fn release(layout: &Layout, dev: Dev) {
    for holder in fs::read_dir(format!("/sys/dev/block/{dev}/holders"))
        .into_iter()
        .flatten()
        .flatten()
    {
        let number = fs::read_to_string(holder.path().join("dev")).ok();
        let name = fs::read_to_string(holder.path().join("dm/name")).ok();
        if let (Some(above), Some(name)) = (number.and_then(|n| Dev::parse(n.trim())), name) {
            release(layout, above);
            // What is open stays, and is found again in the next round.
            let _ = dm::remove(&crate::names::readable_device_name(name.trim_end()));
        }
    }
    for swap in swaps()
        .into_iter()
        .filter(|s| blockdev::number(s).is_ok_and(|d| d == dev))
    {
        let argv = ["swapoff".into(), "--".into(), swap.into()];
        if let Err(error) = process::run(&argv, SOON) {
            complain(format_args!("{error:#}"));
        }
    }
    let mounted = mount_table::table().unwrap_or_default();
    // The newest first: it may lie below an older one.
    for mount in mounted.iter().rev().filter(|m| m.dev == dev) {
        if umount2(&mount.dir, MntFlags::UMOUNT_NOFOLLOW).is_err() {
            let_go_of_logs(layout, dev);
            if let Err(error) = umount2(&mount.dir, MntFlags::UMOUNT_NOFOLLOW) {
                complain(format_args!(
                    "could not unmount {}: {error}",
                    mount.dir.display()
                ));
            }
        }
    }
}

/// The devices and files in use as swap.
fn swaps() -> Vec<PathBuf> {
    let text = fs::read_to_string("/proc/swaps").unwrap_or_default();
    let lines = text.lines().skip(1);
    lines
        .filter_map(|line| Some(line.split_ascii_whitespace().next()?.into()))
        .collect()
}

/// Whether a process is one of our daemons.
fn is_daemon(found: &Found) -> bool {
    let program = found.argv.first().map(|a| a.as_bytes()).unwrap_or_default();
    let base = program.rsplit(|b| *b == b'/').next().unwrap_or_default();
    let command = found.argv.get(1).map(|a| a.as_os_str());
    base.strip_prefix(b"@").unwrap_or(base) == b"ddsnap"
        && [Some(OsStr::new("agent")), Some(OsStr::new("server"))].contains(&command)
}

/// Signals what has files of the file system on `dev`, or the device itself, open; waits for the end. Returns
/// how many there were.
fn end_users(dev: Dev, signal: i32) -> usize {
    let users: Vec<Found> = process::all()
        .into_iter()
        // What asks to be left alone until the last moment is left alone, our daemons among it.
        .filter(|p| {
            p.pid != 1
                && !p
                    .argv
                    .first()
                    .is_some_and(|a| a.as_bytes().starts_with(b"@"))
        })
        .filter(|p| p.links().iter().any(|link| is_on(link, dev)))
        .collect();
    for user in &users {
        let name = user.argv.first().map(|a| a.to_string_lossy().into_owned());
        let name = name.unwrap_or_default();
        complain(format_args!(
            "ending {name}[{}], which still uses a volume",
            user.pid
        ));
        if let Err(error) = user.signal(signal) {
            complain(format_args!("{error:#}"));
        }
    }
    let end = Instant::now()
        + if signal == libc::SIGKILL {
            SOON
        } else {
            POLITE
        };
    for user in &users {
        let _ = user.is_gone_within(end.saturating_duration_since(Instant::now()));
    }
    users.len()
}

/// Whether an open file lies on the file system on `dev`, or is the device.
fn is_on(link: &Path, dev: Dev) -> bool {
    let Ok(meta) = fs::metadata(link) else {
        return false;
    };
    let raw = libc::makedev(dev.major, dev.minor);
    meta.dev() == raw || (meta.file_type().is_block_device() && meta.rdev() == raw)
}

/// Frees a file system from the logs of our own daemons, which need not end for that: each is made to open
/// its log again while a file in /run is mounted over it. What has the log open is a process of the daemon's
/// that writes it, and that has the same command line; the daemon tells it.
fn let_go_of_logs(layout: &Layout, dev: Dev) {
    let cover = layout.run().join("last.log");
    if let Err(error) = fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(&cover)
    {
        return complain(format_args!("could not open {}: {error}", cover.display()));
    }
    let daemons: Vec<Found> = process::all().into_iter().filter(is_daemon).collect();
    for daemon in &daemons {
        let ask = || {
            let mut same = daemons.iter().filter(|d| d.argv == daemon.argv);
            same.try_for_each(|d| d.signal(libc::SIGHUP))
        };
        let logs = || {
            let open = daemon.links().into_iter().filter(|link| is_on(link, dev));
            open.filter_map(|link| fs::read_link(link).ok())
                .collect::<Vec<_>>()
        };
        for log in logs() {
            if let Err(error) = cover_log(ask, &cover, &log, || !logs().contains(&log)) {
                complain(format_args!("{error:#}"));
            }
        }
    }
}

fn cover_log(
    ask: impl FnOnce() -> Result<()>,
    cover: &Path,
    log: &Path,
    is_free: impl Fn() -> bool,
) -> Result<()> {
    let none = None::<&str>;
    mount(Some(cover), log, none, MsFlags::MS_BIND, none)
        .with_context(|| format!("could not cover {}", log.display()))?;
    let asked = ask();
    let end = Instant::now() + POLITE;
    // Nothing tells when it has done so.
    while asked.is_ok() && !is_free() && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(20));
    }
    umount2(log, MntFlags::MNT_DETACH)
        .with_context(|| format!("could not uncover {}", log.display()))?;
    asked
}

/// Ends servers, then agents, but for those whose devices are `left`.
fn end_servers(left: &[(String, DmDevice)]) {
    let needed = |found: &Found| {
        let agents = left
            .iter()
            .filter_map(|(_, device)| device.table.as_ref())
            .map(|t| &t.agent);
        agents
            .into_iter()
            .any(|agent| found.argv.iter().any(|arg| arg == agent.as_str()))
    };
    let daemons: Vec<Found> = process::all()
        .into_iter()
        .filter(|p| is_daemon(p) && !needed(p))
        .collect();
    for command in ["server", "agent"] {
        let these = || {
            daemons
                .iter()
                .filter(|d| d.argv.get(1).is_some_and(|a| a == command))
        };
        for daemon in these() {
            if let Err(error) = daemon.signal(libc::SIGTERM) {
                complain(format_args!("{error:#}"));
            }
        }
        let end = Instant::now() + SOON;
        for daemon in these() {
            if !matches!(
                daemon.is_gone_within(end.saturating_duration_since(Instant::now())),
                Ok(true)
            ) {
                // The store survives that; it is recovered at the next start.
                complain(format_args!("ddsnap {command} {} does not end", daemon.pid));
            }
        }
    }
}
