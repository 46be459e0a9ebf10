// SPDX-License-Identifier: GPL-2.0-only
//! Device-mapper: the one place that writes table lines and makes devices.
//!
//! The `devicemapper` crate takes part in udev's cookie protocol, so when [`create`] returns, udev
//! has finished with the device and its links exist. The kernel's name of a snapshot `VOL(N)` has
//! the parentheses escaped ([`kernel_device_name`]); callers never see that. The package's udev rule
//! makes the readable link in /dev/mapper, but nothing here depends on it: [`node`] finds the device by number, and a missing link in /dev/mapper is made here, which
//! is also what serves machines without udev.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use devicemapper::{DM, DevId, DmError, DmFlags, DmName, DmOptions, DmUuid, errors};
use nix::errno::Errno;

use crate::machine::{DM_TARGET, Dev, DmDevice, TableLine};
use crate::names::{kernel_device_name, readable_device_name};
use crate::{blockdev, process};

/// Its module.
pub const MODULE: &str = "dm-ddsnap";
/// Longest wait for the kernel and udev to finish with a device.
const DEADLINE: Duration = Duration::from_secs(90);

fn errno(error: &DmError) -> Option<Errno> {
    match error {
        // The crate's own version of nix need not be ours: the number is the same.
        DmError::Core(errors::Error::Ioctl(_, _, _, errno)) => {
            Some(Errno::from_raw(**errno as i32))
        }
        _ => None,
    }
}

/// The crate's own text for ioctl errors is a dump of two structures; the errno says it all.
fn readable(error: DmError) -> anyhow::Error {
    match errno(&error) {
        Some(errno) => anyhow::Error::from(errno),
        None => anyhow!("{error}"),
    }
}

/// Runs `work` in a thread of its own and gives up on it at the deadline.
///
/// The crate waits for udev without a limit; a stuck udev must not take the volume with it.
fn within<T: Send + 'static>(
    what: String,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(work()));
    match receiver.recv_timeout(DEADLINE) {
        Ok(result) => result.context(what),
        Err(_) => bail!(
            "{what}: no answer from the kernel and udev in {} s",
            DEADLINE.as_secs()
        ),
    }
}

fn open() -> Result<DM> {
    DM::new().map_err(|e| anyhow!("could not open /dev/mapper/control ({e})"))
}

fn has_target() -> Result<bool> {
    let versions = open()?.list_versions().map_err(readable)?;
    Ok(versions.iter().any(|(name, ..)| name == DM_TARGET))
}

/// Sees to it that the kernel has the target, loading the module if need be.
pub fn ensure_dm_target() -> Result<()> {
    // The control node appears with the dm module, which may be absent too: that is an answer.
    if matches!(has_target(), Ok(true)) {
        return Ok(());
    }
    let argv = ["modprobe", MODULE].map(Into::into);
    let loaded = process::run(&argv, DEADLINE);
    if matches!(loaded, Ok(ref o) if o.code == Some(0)) && has_target()? {
        return Ok(());
    }
    bail!("{}", missing_target(&release()))
}

/// The release of the kernel that runs.
#[must_use]
pub fn release() -> String {
    nix::sys::utsname::uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// The sentence for a kernel without the target.
#[must_use]
pub fn missing_target(release: &str) -> String {
    format!(
        "the running kernel ({release}) has no `{DM_TARGET}` device-mapper target: install the package \
         dm-ddsnap-dkms (and the headers package linux-headers-amd64), or boot a kernel built with \
         CONFIG_DM_DDSNAP"
    )
}

/// The device called `name`.
pub fn find(name: &str) -> Result<Option<DmDevice>> {
    let dm = open()?;
    let kernel_name = kernel_device_name(name);
    let id = DevId::Name(DmName::new(&kernel_name).map_err(readable)?);
    let options = DmOptions::default().set_flags(DmFlags::DM_STATUS_TABLE);
    match dm.table_status(&id, options) {
        Ok((info, lines)) => {
            let device = info.device();
            let table = match lines.as_slice() {
                [(0, sectors, target, params)] if target == DM_TARGET => {
                    TableLine::parse(*sectors, params)
                }
                _ => None,
            };
            let uuid = info.uuid().map(ToString::to_string);
            let dev = Dev {
                major: device.major,
                minor: device.minor,
            };
            Ok(Some(DmDevice { dev, uuid, table }))
        }
        Err(e) if errno(&e) == Some(Errno::ENXIO) => Ok(None),
        Err(e) => Err(readable(e)).with_context(|| format!("could not look for device '{name}'")),
    }
}

/// Names of all devices.
pub fn names() -> Result<Vec<String>> {
    let devices = open()?.list_devices().map_err(readable)?;
    Ok(devices
        .into_iter()
        .map(|(name, ..)| readable_device_name(&name.to_string()))
        .collect())
}

/// Creates device `name` with one line; its node and links exist when this returns.
pub fn create(name: &str, uuid: &str, table: &TableLine) -> Result<Dev> {
    let (kernel_name, uuid, table) = (kernel_device_name(name), uuid.to_string(), table.clone());
    let work = move || {
        let dm = open()?;
        let name = DmName::new(&kernel_name).map_err(readable)?;
        let uuid = DmUuid::new(&uuid).map_err(readable)?;
        let id = DevId::Name(name);
        let options = DmOptions::default();
        let info = dm
            .device_create(name, Some(uuid), options)
            .map_err(readable)?;
        let line = (0, table.sectors, DM_TARGET.to_string(), table.params());
        let resumed = dm
            .table_load(&id, &[line], options)
            .and_then(|_| dm.device_suspend(&id, options));
        if let Err(error) = resumed {
            let error = readable(error).context(format!("the kernel refused the table '{table}'"));
            return match dm.device_remove(&id, options) {
                Ok(_) => Err(error),
                Err(undo) => Err(error.context(format!("and it stayed: {:#}", readable(undo)))),
            };
        }
        let device = info.device();
        Ok(Dev {
            major: device.major,
            minor: device.minor,
        })
    };
    let dev = within(format!("could not create device '{name}'"), work)?;
    let link = mapper_path(name);
    if !is_device(&link, dev) {
        // No udev, or no rule for this name. A dangling link of an earlier device may be in the way.
        if link.is_symlink() {
            fs::remove_file(&link)
                .with_context(|| format!("could not remove {}", link.display()))?;
        }
        symlink(format!("../dm-{}", dev.minor), &link)
            .with_context(|| format!("could not create {}", link.display()))?;
    }
    Ok(dev)
}

/// Gives device `name` another line while it is in use: I/O is held back while the lines change places.
///
/// All of that is one call: the resume of a device with a loaded line suspends it, changes the lines and resumes it. So nothing
/// is suspended while this process does something else, and one that is killed meanwhile leaves the kernel to undo or
/// to end it. Only a call that fails in its middle may leave the device suspended.
pub fn reload(name: &str, table: &TableLine) -> Result<()> {
    let (kernel_name, table) = (kernel_device_name(name), table.clone());
    let work = move || {
        let dm = open()?;
        let id = DevId::Name(DmName::new(&kernel_name).map_err(readable)?);
        let line = (0, table.sectors, DM_TARGET.to_string(), table.params());
        let options = DmOptions::default();
        dm.table_load(&id, &[line], options)
            .map_err(readable)
            .with_context(|| format!("the kernel refused the table '{table}'"))?;
        let Err(error) = dm.device_suspend(&id, options) else {
            return Ok(());
        };
        let error = readable(error);
        // The old line stays; the new one must not come into force with this resume or a later one.
        let _ = dm.table_clear(&id);
        match resume_suspended(&dm, &id) {
            Ok(_) => Err(error),
            Err(undo) => Err(error.context(format!("and its I/O is held back still: {undo:#}"))),
        }
    };
    within(format!("could not change device '{name}'"), work)
}

/// Resumes a device if it is suspended, and says whether it was.
fn resume_suspended(dm: &DM, id: &DevId<'_>) -> Result<bool> {
    let info = dm.device_info(id).map_err(readable)?;
    if !info.flags().contains(DmFlags::DM_SUSPEND) {
        return Ok(false);
    }
    // A line that was loaded and never came into force is of a change that was not ended.
    let _ = dm.table_clear(id);
    dm.device_suspend(id, DmOptions::default())
        .map_err(readable)?;
    Ok(true)
}

/// Resumes device `name` with the line it has, if it is suspended; says whether it was.
pub fn resume(name: &str) -> Result<bool> {
    let kernel_name = kernel_device_name(name);
    let work = move || {
        let dm = open()?;
        let id = DevId::Name(DmName::new(&kernel_name).map_err(readable)?);
        resume_suspended(&dm, &id)
    };
    within(format!("could not resume device '{name}'"), work)
}

/// Removes device `name`, if it is there.
pub fn remove(name: &str) -> Result<()> {
    let own_name = name.to_string();
    let work = move || {
        let dm = open()?;
        let kernel_name = kernel_device_name(&own_name);
        let id = DevId::Name(DmName::new(&kernel_name).map_err(readable)?);
        match dm.device_remove(&id, DmOptions::default()) {
            Ok(_) => Ok(()),
            Err(e) if errno(&e) == Some(Errno::ENXIO) => Ok(()),
            Err(e) if errno(&e) == Some(Errno::EBUSY) => {
                let found = find(&own_name)?;
                let users = found.map(|d| blockdev::all_users(d.dev));
                let device = mapper_path(&own_name).display().to_string();
                Err(users.unwrap_or_default().busy(device).into())
            }
            Err(e) => Err(readable(e)),
        }
    };
    within(format!("could not remove device '{name}'"), work)?;
    let link = mapper_path(name);
    if link.is_symlink() && !link.exists() {
        fs::remove_file(&link).with_context(|| format!("could not remove {}", link.display()))?;
    }
    Ok(())
}

fn mapper_path(name: &str) -> PathBuf {
    Path::new("/dev/mapper").join(name)
}

fn is_device(path: &Path, dev: Dev) -> bool {
    blockdev::number(path).is_ok_and(|found| found == dev)
}

/// The node to mount the device by: its readable name if that is the right device, else by number.
#[must_use]
pub fn node(name: &str, dev: Dev) -> PathBuf {
    let link = mapper_path(name);
    if is_device(&link, dev) {
        link
    } else {
        PathBuf::from(format!("/dev/block/{dev}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sentence_for_a_kernel_without_the_target() {
        let expected = "the running kernel (6.12.1) has no `ddsnap` device-mapper target: install the \
                        package dm-ddsnap-dkms (and the headers package linux-headers-amd64), or boot \
                        a kernel built with CONFIG_DM_DDSNAP";
        assert_eq!(missing_target("6.12.1"), expected);
    }
}
