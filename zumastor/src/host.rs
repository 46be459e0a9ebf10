// SPDX-License-Identifier: GPL-2.0-only
//! Everything a volume needs from the machine, as one trait.
//!
//! [`crate::system::System`] is the real one. Tests use a fake, which keeps the same state in memory
//! and fails where it is told to. Plain files below a
//! [`crate::layout::Layout`] are not part of it: tests give the layout a temporary root.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, bail};
use ddsnap::client::{NewSizes, Resized};
use ddsnap::probe::contents::Contents;
use jiff::Zoned;
use uuid::Uuid;

use crate::config::Devices;
use crate::machine::{
    Dev, DmDevice, Geometry, Mount, ProcessSpec, StoreState, Stored, TableLine, Users,
};

/// Longest wait for `ddsnap create`, and so the longest time a file system stays frozen.
pub const CREATE_DEADLINE: Duration = Duration::from_secs(45);

/// Longest wait for an answer that costs a server nothing.
pub const PROBE_DEADLINE: Duration = Duration::from_secs(10);

/// How a server fares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Probe {
    /// It answers.
    Answers,
    /// It runs and does not answer.
    Silent {
        /// Its process.
        pid: u32,
        /// It is in a wait that no signal ends: the kernel does not get on with a disk.
        uninterruptible: bool,
    },
    /// It does not run, or does not listen yet.
    Absent,
}

/// Thaws, from outside the daemon, what the daemon has frozen and cannot thaw any more.
///
/// Directories are named by their place in the list given to [`Host::freeze_guard`].
pub trait FreezeGuard {
    /// The file system of this directory is about to be frozen.
    fn arm(&mut self, number: usize) -> Result<()>;
    /// It is not frozen any more, or was not frozen by us.
    fn disarm(&mut self, number: usize) -> Result<()>;
}

/// The number of the block device at `path`, when there is something in it. One whose disk is not there yet is waited
/// for as one that is not there itself.
///
/// # Errors
/// There is no such device, or it is empty.
pub fn filled_device(host: &dyn Host, path: &Path) -> Result<Dev> {
    let dev = host.block_device(path)?;
    if host.is_empty(dev) {
        bail!(
            "device '{}' is empty, its size is 0: nothing is connected to it",
            path.display()
        );
    }
    Ok(dev)
}

/// The machine.
pub trait Host: Send + Sync {
    /// Sees to it that the kernel has the `ddsnap` target, loading the module if need be.
    fn ensure_dm_target(&self) -> Result<()>;

    /// The number of the block device at `path`.
    fn block_device(&self, path: &Path) -> Result<Dev>;
    /// Whether there is nothing in a block device: a loop device without a file, a network device that is not
    /// connected and a drive without a medium have a node, and a size of 0.
    fn is_empty(&self, dev: Dev) -> bool;
    /// Waits until udev has named the devices it knows of, for a limited time. At boot this service
    /// may be early; devices that come later still are announced one by one.
    fn settle(&self);
    /// Has udev look at the device at `path` again, if it is there.
    fn announce(&self, path: &Path);
    /// A path for the device at `path` that is still right after a reboot.
    fn stable_path(&self, path: &Path) -> Result<PathBuf>;
    /// Fails with [`crate::machine::Busy`] if the device is mounted, written to or held by another part
    /// of the system.
    fn check_unused(&self, path: &Path) -> Result<()>;
    /// Who uses a device lastingly, described, but for mounts of the device itself, which
    /// [`Host::mounts`] has.
    fn holders(&self, dev: Dev) -> Vec<String>;
    /// As [`Host::holders`], and who else has it open: looks at every process.
    fn users(&self, dev: Dev) -> Users;
    /// All devices that stand on `dev`, itself first.
    fn stacked_on(&self, dev: Dev) -> Vec<Dev>;
    /// Whether two devices share blocks, as a disk and its partition do.
    fn overlap(&self, one: &Path, other: &Path) -> bool;
    /// Logical sector size of the device in bytes, if it is known.
    fn sector_bytes(&self, path: &Path) -> Option<u32>;
    /// Size of the device in bytes.
    fn size_bytes(&self, path: &Path) -> Result<u64>;
    /// Overwrites the device with zeroes, reporting bytes done and bytes in all; ends with an error of
    /// `progress`.
    fn zero(&self, path: &Path, progress: &mut dyn FnMut(u64, u64) -> Result<()>) -> Result<()>;
    /// What a device holds.
    fn contents(&self, node: &Path) -> Result<Contents>;
    /// Writes out what the page cache holds for a device node.
    fn flush(&self, node: &Path) -> Result<()>;

    /// The UUID of the snapshot store at `path`, the device that has its superblock; none if no store is recognised there.
    fn store_uuid(&self, path: &Path) -> Result<Option<Uuid>>;
    /// Fails if [`Host::format`] would be refused, or would overwrite what somebody may miss and `force`
    /// does not say that it may. Writes nothing.
    fn check_format(&self, devices: &Devices, chunksize: &str, force: bool) -> Result<()>;
    /// Writes an empty snapshot store with chunks of `chunksize`, as `ddsnap initialize -c` takes it.
    fn format(&self, devices: &Devices, chunksize: &str, force: bool) -> Result<()>;
    /// The process of `spec` if it runs, found by pid file and proven by its command line.
    fn find_process(&self, spec: &ProcessSpec) -> Result<Option<u32>>;
    /// Starts it; returns its number once it is up.
    fn start_process(&self, spec: &ProcessSpec) -> Result<u32>;
    /// Has it open its log again, if it runs.
    fn reopen_log(&self, spec: &ProcessSpec) -> Result<()>;
    /// Ends it and waits until it is gone.
    fn stop_process(&self, spec: &ProcessSpec) -> Result<()>;
    /// Ends it at once, whatever it does, and waits until it is gone: the store survives that at any point.
    fn kill_process(&self, spec: &ProcessSpec) -> Result<()>;
    /// Lets the process of `spec` go on if a signal has stopped it; its number, if so.
    fn resume_process(&self, spec: &ProcessSpec) -> Result<Option<u32>>;
    /// Asks the server of `spec`, which listens on `socket`, for an answer within [`PROBE_DEADLINE`].
    fn probe_server(&self, spec: &ProcessSpec, socket: &Path) -> Probe;
    /// A descriptor that polls readable when process `pid` is gone.
    fn exit_fd(&self, pid: u32) -> Result<OwnedFd>;

    /// Creates snapshot `tag`; returns within [`CREATE_DEADLINE`].
    fn create_snapshot(&self, server: &Path, tag: u32) -> Result<()>;
    /// Deletes snapshot `tag`.
    fn delete_snapshot(&self, server: &Path, tag: u32) -> Result<()>;
    /// All snapshots and bookmarks the server has, oldest first.
    fn snapshots(&self, server: &Path) -> Result<Vec<Stored>>;
    /// What the server says of its store; waits a few seconds at most.
    fn store_state(&self, server: &Path) -> Result<StoreState>;
    /// Gives snapshot `tag` a priority, -128 (given up first) to 127 (never).
    fn set_priority(&self, server: &Path, tag: u32, priority: i8) -> Result<()>;
    /// Says whether snapshot `tag`, which has data, becomes a bookmark when it is given up, instead of vanishing.
    fn set_to_bookmark(&self, server: &Path, tag: u32, to_bookmark: bool) -> Result<()>;
    /// The snapshot whose content the server is giving to the origin.
    fn reverting(&self, server: &Path) -> Result<Option<u32>>;
    /// Has the server give the origin the content of snapshot `tag`; as long as that takes, hearing bytes done of
    /// all. Gives back how many chunks could not be read and are as they were.
    fn revert(&self, server: &Path, tag: u32, progress: &mut dyn FnMut(u64, u64)) -> Result<u64>;
    /// Has the server use other sizes; as long as that takes, hearing bytes done of all.
    fn resize(
        &self,
        server: &Path,
        sizes: &NewSizes,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Resized>;
    /// Size of the origin or a snapshot in sectors.
    fn size_sectors(&self, server: &Path, tag: Option<u32>) -> Result<u64>;
    /// Chunk size and length of the origin.
    fn geometry(&self, server: &Path) -> Result<Geometry>;

    /// The device-mapper device called `name`.
    fn dm_find(&self, name: &str) -> Result<Option<DmDevice>>;
    /// Names of all device-mapper devices.
    fn dm_names(&self) -> Result<Vec<String>>;
    /// Creates a device; its node and links exist when this returns.
    fn dm_create(&self, name: &str, uuid: &str, table: &TableLine) -> Result<Dev>;
    /// Gives a device another table while it is in use.
    fn dm_reload(&self, name: &str, table: &TableLine) -> Result<()>;
    /// Resumes a device if it is suspended; says whether it was.
    fn dm_resume(&self, name: &str) -> Result<bool>;
    /// Removes a device, if it is there; fails with [`crate::machine::Busy`] while it is open.
    fn dm_remove(&self, name: &str) -> Result<()>;
    /// The node to mount device-mapper device `name`, number `dev`, by.
    fn dm_node(&self, name: &str, dev: Dev) -> PathBuf;

    /// Keeps a device from being mounted, and from every other use that wants it alone, for as long as the file is open;
    /// none if somebody else has it.
    fn claim(&self, node: &Path) -> Result<Option<File>>;

    /// The mount table.
    fn mounts(&self) -> Result<Vec<Mount>>;
    /// Mounts `node` on `dir`, which exists.
    fn mount(&self, node: &Path, dir: &Path, fstype: &str, options: &[String]) -> Result<()>;
    /// Unmounts `dir`; fails with [`crate::machine::Busy`] while it is used.
    fn unmount(&self, dir: &Path) -> Result<()>;
    /// Takes the mount on `dir` out of everybody's sight; it ends when the last who uses it has gone.
    fn detach(&self, dir: &Path) -> Result<()>;
    /// What thaws the file systems mounted on `dirs` if this process dies or hangs while they are frozen.
    fn freeze_guard(&self, dirs: &[PathBuf]) -> Result<Box<dyn FreezeGuard>>;
    /// Freezes the file system mounted on `dir`; false if there is nothing to thaw afterwards.
    fn freeze(&self, dir: &Path) -> Result<bool>;
    /// Thaws it; succeeds if it was not frozen.
    fn thaw(&self, dir: &Path) -> Result<()>;

    /// The time by the machine's clock, in its time zone.
    fn now(&self) -> Zoned;
    /// Lets `time` pass, before what was busy is tried again.
    fn pause(&self, time: Duration);
}

#[cfg(test)]
pub mod fake;
