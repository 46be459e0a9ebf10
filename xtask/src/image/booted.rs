// SPDX-License-Identifier: GPL-2.0-only
//! An image booted once: disks and memory of the running guest, saved.
//!
//! Emulated, a boot takes the best part of a minute; resuming takes a second. So
//! the first guest of an image is booted, saved and ended, and every later one
//! starts from copies of its disks, which hold the saved memory too.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::Image;
use crate::digest::Key;
use crate::ui::Step;
use crate::vm::accel::{self, Accel};
use crate::vm::args::{Spec, kernel_command_line};
use crate::vm::disk;
use crate::vm::lossy::{Lossy, Plan};
use crate::vm::machine::{BOOT_DEADLINE, Lifetime, Machine, QemuEnded};
use crate::vm::network::Seat;
use crate::{lock, paths};

/// Name of the internal snapshot in the disks.
const SAVED: &str = "booted";

/// Guest memory where nothing else is asked for. Enough for a module build beside the page cache.
pub const MEMORY_MIB: u32 = 1536;

/// The blank disks a guest has when nobody asks for others. Those that can do
/// with these share one saved guest.
pub const DEFAULT_DISKS: [&str; 4] = ["64M", "128M", "512M", "2G"];

/// Where a guest runs, and with what.
pub struct Place<'a> {
    /// Its disks, logs and record.
    pub dir: &'a Path,
    /// How long it runs.
    pub lifetime: Lifetime,
    /// Disks in place of those in the directory.
    pub lossy: Option<&'a Lossy>,
    /// Its place in a private network.
    pub seat: Option<&'a Seat>,
}

/// A saved guest.
#[derive(Serialize, Deserialize)]
pub struct Booted {
    image: Image,
    accel: Accel,
    dir: PathBuf,
    disks: usize,
    memory_mib: u32,
}

/// Boots the image with blank disks of the given sizes and so much memory; or finds that in the cache.
pub fn booted(image: &Image, disk_sizes: &[String], memory_mib: u32) -> Result<Booted> {
    let accel = accel::choose(&image.vmlinuz)?;
    let version = accel::qemu_version()?;
    let host = match accel {
        // Memory saved under KVM holds the features of the processor.
        Accel::Kvm => std::fs::read_to_string("/proc/cpuinfo")
            .unwrap_or_default()
            .lines()
            .filter(|l| l.starts_with("model name") || l.starts_with("flags"))
            .take(2)
            .collect(),
        Accel::Tcg { .. } => String::new(),
    };
    let key = Key::new("booted-2")
        .text(&format!(
            "{accel:?} {version:?} {memory_mib} {disk_sizes:?}"
        ))
        .text(&kernel_command_line())
        .text(include_str!("../vm/args.rs"))
        .text(&host)
        .finish();
    let dir = image.dir.join(format!("booted-{key}"));
    let booted = Booted {
        image: image.clone(),
        accel,
        dir,
        disks: disk_sizes.len(),
        memory_mib,
    };
    let _lock = lock::take(&image.dir.join("booted.lock"))?;
    if !booted.dir.is_dir() {
        booted.make(disk_sizes)?;
    }
    Ok(booted)
}

impl Booted {
    /// A guest of its own, resumed from the saved one. It is like every other one: see `identity`.
    pub fn resume(&self, place: &Place) -> Result<Machine> {
        let spec = self.spec(place, Some(SAVED));
        paths::make_dir(place.dir)?;
        for disk in std::iter::once(&spec.root).chain(&spec.disks) {
            let name = disk.file_name().context("a disk without a name")?;
            disk::copy(&self.dir.join(name), disk)?;
        }
        let mut machine = self.start(&spec, place)?;
        machine.agent().set_clock()?;
        Ok(machine)
    }

    /// Boots from the disks already there, as after a power cut; with the initial RAM disk that is there too,
    /// as a boot loader would.
    pub fn boot_again(&self, place: &Place) -> Result<Machine> {
        let mut spec = self.spec(place, None);
        if spec.initrd.is_some() {
            let renewed = place.dir.join("root.initrd");
            let root = match place.lossy {
                Some(lossy) => disk::Source::Lossy(lossy, 0),
                None => disk::Source::File(&spec.root),
            };
            disk::copy_from_boot(root, "initrd.img-", &renewed)?;
            spec.initrd = Some(renewed);
        }
        self.start(&spec, place)
    }

    /// Reboots in an orderly way and waits for the agent of the new boot.
    pub fn reboot(
        &self,
        machine: &mut Option<Machine>,
        place: &Place,
        limit: Duration,
    ) -> Result<()> {
        let running = machine.as_mut().context("the machine is off")?;
        if self.image.initrd.is_none() {
            return running.reboot(limit);
        }
        // QEMU keeps what it was started with, and what the guest has made of it since would not count.
        running.reboot_to_end(limit)?;
        *machine = None;
        *machine = Some(self.boot_again(place)?);
        Ok(())
    }

    fn start(&self, spec: &Spec, place: &Place) -> Result<Machine> {
        let mut machine = Machine::start(spec, place.dir, place.lifetime)?;
        if let Some(lossy) = place.lossy {
            // Saved memory can be loaded only while all disks are qcow2.
            let mut qmp = machine.qmp()?;
            for index in 0..lossy.count() {
                qmp.replace_disk(index, &lossy.socket())?;
            }
            qmp.run()?;
        }
        machine.wait_for_agent(BOOT_DEADLINE)?;
        Ok(machine)
    }

    /// The saved guest's disks as ones that lose what was not flushed. What is durable of them is in
    /// `dir`: `disk1.raw` and on.
    pub fn lossy(&self, dir: &Path) -> Result<Lossy> {
        paths::make_dir(dir)?;
        let spec = self.saved();
        let mut plans = vec![self.lossy_root(dir)?];
        for disk in &spec.disks {
            let name = disk.file_name().context("a disk without a name")?;
            plans.push(Plan {
                medium: dir.join(name).with_extension("raw"),
                bytes: disk::bytes(disk)?,
                base: None,
            });
        }
        Lossy::serve(&plans)
    }

    /// The root disk as it was saved, to begin or to begin anew with.
    pub fn lossy_root(&self, dir: &Path) -> Result<Plan> {
        let root = self.saved().root;
        let base = root.with_extension("raw");
        let _lock = lock::take(&self.image.dir.join("booted.lock"))?;
        if !base.exists() {
            let partial = root.with_extension("partial");
            disk::extract(&root, SAVED, &partial)?;
            std::fs::rename(&partial, &base)
                .with_context(|| format!("cannot make {}", base.display()))?;
        }
        Ok(Plan {
            medium: dir.join("root.durable"),
            bytes: disk::bytes(&root)?,
            base: Some(base),
        })
    }

    fn spec(&self, place: &Place, resume: Option<&str>) -> Spec {
        let dir = place.dir;
        Spec {
            accel: self.accel,
            vmlinuz: self.image.vmlinuz.clone(),
            initrd: self.image.initrd.clone(),
            root: dir.join("root.qcow2"),
            disks: (1..=self.disks)
                .map(|i| dir.join(format!("disk{i}.qcow2")))
                .collect(),
            memory_mib: self.memory_mib,
            resume: resume.map(str::to_string),
            paused: place.lossy.is_some(),
            seat: place.seat.cloned(),
        }
    }

    /// The saved guest itself.
    fn saved(&self) -> Spec {
        self.spec(&alone(&self.dir), None)
    }

    /// QEMU may end by an assertion of its own, seen once in some hundred boots under emulation. That says
    /// nothing of what is tested, so it is tried once more.
    fn make(&self, disk_sizes: &[String]) -> Result<()> {
        match self.try_make(disk_sizes) {
            Err(error) if error.downcast_ref().is_some_and(QemuEnded::by_assertion) => {
                eprintln!("{error:#}\nonce more");
                self.try_make(disk_sizes)
            }
            made => made,
        }
    }

    fn try_make(&self, disk_sizes: &[String]) -> Result<()> {
        let partial = self.dir.with_extension("partial");
        paths::fresh_dir(&partial)?;
        let spec = self.spec(&alone(&partial), None);
        disk::create_overlay(&spec.root, &self.image.root)?;
        for (disk, size) in spec.disks.iter().zip(disk_sizes) {
            disk::create_blank(disk, size)?;
        }
        let step = Step::start(format!("booting the guest once under {:?}", self.accel));
        let mut machine = Machine::start(&spec, &partial, Lifetime::WithHarness)?;
        let result = self.settle_and_save(&mut machine);
        let stopped = machine.stop();
        result.and(stopped)?;
        std::fs::rename(&partial, &self.dir)
            .with_context(|| format!("cannot make {}", self.dir.display()))?;
        step.done("saved");
        Ok(())
    }

    /// Waits until the guest has nothing left to start, then saves it.
    fn settle_and_save(&self, machine: &mut Machine) -> Result<()> {
        machine.wait_for_agent(BOOT_DEADLINE)?;
        // `degraded` is an answer too; what failed shows in the journal.
        machine.shell("systemctl is-system-running --wait; sync", BOOT_DEADLINE)?;
        machine.check()?;
        machine.agent().disconnect();
        machine.qmp()?.save(SAVED)
    }
}

/// A guest in `dir` for the time being, with ordinary disks and no network.
fn alone(dir: &Path) -> Place<'_> {
    Place {
        dir,
        lifetime: Lifetime::WithHarness,
        lossy: None,
        seat: None,
    }
}
