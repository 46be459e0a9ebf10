// SPDX-License-Identifier: GPL-2.0-only
//! A machine of a scenario: its guest, on or off, with its disks, its cable and its directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::image::booted::{Booted, Place};
use crate::image::identity::Identities;
use crate::vm::console::find_report;
use crate::vm::lossy::{DiskSet, Lossy};
use crate::vm::machine::{Lifetime, Machine};
use crate::vm::network::Seat;

/// Time to collect one file of evidence from a guest that may be in trouble.
const EVIDENCE: Duration = Duration::from_secs(60);

/// A machine.
pub struct Node<'a> {
    dir: PathBuf,
    booted: &'a Booted,
    seat: Option<Seat>,
    lossy: Option<Lossy>,
    link_up: bool,
    /// `None` while it is off.
    machine: Option<Machine>,
}

impl<'a> Node<'a> {
    /// Resumes a machine in `dir`; `lossy` if its power will be cut.
    pub fn start(
        booted: &'a Booted,
        dir: PathBuf,
        lossy: bool,
        network: Option<(Seat, &Identities)>,
    ) -> Result<Self> {
        let lossy = match lossy {
            true => Some(booted.lossy(&dir)?),
            false => None,
        };
        let mut node = Node {
            dir,
            booted,
            seat: network.as_ref().map(|(seat, _)| seat.clone()),
            lossy,
            link_up: true,
            machine: None,
        };
        node.resume(network.map(|(_, identities)| identities))?;
        Ok(node)
    }

    /// Its name; empty if it is alone.
    pub fn name(&self) -> &str {
        self.seat.as_ref().map_or("", Seat::name)
    }

    /// What errors call it.
    fn title(&self) -> String {
        match self.name() {
            "" => "the guest".to_string(),
            name => format!("machine {name}"),
        }
    }

    /// The guest, which must be on.
    pub fn machine(&mut self) -> Result<&mut Machine> {
        self.machine.as_mut().context("the machine is off")
    }

    /// Fails when QEMU has died or the guest's kernel has reported something.
    pub fn check(&self) -> Result<()> {
        match &self.machine {
            Some(machine) => machine.check().with_context(|| self.title()),
            None => Ok(()),
        }
    }

    /// Cuts the power. What was not flushed survives as `seed` chooses, on some disks in whole blocks; says
    /// how much did.
    pub fn cut(&mut self, seed: u64, whole_blocks: DiskSet) -> Result<String> {
        self.check()?;
        let Some(lossy) = &self.lossy else {
            bail!("the disks were not made for a power cut");
        };
        if let Some(mut machine) = self.machine.take() {
            machine.cut_power()?;
        }
        let losses = lossy.cut(seed, whole_blocks)?;
        let disks = losses.iter().enumerate().map(|(i, loss)| {
            let disk = char::from(b'a' + i as u8); // at most 20 disks
            format!("vd{disk} {loss}")
        });
        Ok(disks.collect::<Vec<_>>().join("; "))
    }

    /// Boots from the disks as they are.
    pub fn boot(&mut self) -> Result<()> {
        self.machine = Some(self.booted.boot_again(&self.place())?);
        self.plug()
    }

    /// Reboots in an orderly way and waits until the guest answers again.
    pub fn reboot(&mut self, limit: Duration) -> Result<()> {
        let place = Place {
            dir: &self.dir,
            lifetime: Lifetime::WithHarness,
            lossy: self.lossy.as_ref(),
            seat: self.seat.as_ref(),
        };
        self.booted.reboot(&mut self.machine, &place, limit)?;
        self.plug()
    }

    /// Resumes the saved guest. After a cut its root disk is as it was then, and the others as the cut left
    /// them.
    pub fn resume_after_cut(&mut self, identities: Option<&Identities>) -> Result<()> {
        if let Some(lossy) = &self.lossy {
            lossy.renew(0, &self.booted.lossy_root(&self.dir)?)?;
        }
        self.resume(identities)
    }

    fn resume(&mut self, identities: Option<&Identities>) -> Result<()> {
        let mut machine = self.booted.resume(&self.place())?;
        if let (Some(seat), Some(identities)) = (&self.seat, identities) {
            identities.apply(&mut machine, seat)?;
        }
        self.machine = Some(machine);
        self.plug()
    }

    /// Plugs in the cable, or pulls it.
    pub fn set_link(&mut self, up: bool) -> Result<()> {
        self.link_up = up;
        self.machine()?.qmp()?.set_link(up)
    }

    /// A new QEMU begins with the cable plugged in.
    fn plug(&mut self) -> Result<()> {
        match self.link_up {
            true => Ok(()),
            false => self.set_link(false),
        }
    }

    fn place(&self) -> Place<'_> {
        Place {
            dir: &self.dir,
            lifetime: Lifetime::WithHarness,
            lossy: self.lossy.as_ref(),
            seat: self.seat.as_ref(),
        }
    }

    /// Fetches the kernel's messages and the journal, and judges the former: a report may have passed the
    /// console by. `missed` is told of what a guest in trouble did not give.
    pub fn collect_evidence(&mut self, mut missed: impl FnMut(&str)) -> Result<()> {
        let Some(machine) = &mut self.machine else {
            return Ok(());
        };
        let commands = [
            ("dmesg.txt", "dmesg"),
            ("journal.txt", "journalctl --no-pager -o short-precise"),
        ];
        let mut report = None;
        for (file, command) in commands {
            let out = match machine.evidence(command, EVIDENCE) {
                Ok(out) => out,
                // The guest is beyond answering; the console log is what there is.
                Err(e) => {
                    missed(&format!("no {file}: {e:#}"));
                    break;
                }
            };
            if file == "dmesg.txt" {
                report = find_report(&String::from_utf8_lossy(&out.stdout));
            }
            let path = self.dir.join(file);
            fs::write(&path, out.stdout)
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        match report {
            Some(report) => bail!("{}: the kernel reported:\n{report}", self.title()),
            None => Ok(()),
        }
    }

    /// Ends the guest for good.
    pub fn end(&mut self) -> Result<()> {
        match self.machine.take() {
            Some(mut machine) => machine.cut_power(),
            None => Ok(()),
        }
    }

    /// Removes the disks of an ended guest.
    pub fn remove_disks(&self) -> Result<()> {
        remove_disks(&self.dir)
    }
}

fn remove_disks(dir: &Path) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|e| e == "qcow2" || e == "raw" || e == "durable" || e == "initrd")
        {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}
