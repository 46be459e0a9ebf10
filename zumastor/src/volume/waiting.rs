// SPDX-License-Identifier: GPL-2.0-only
//! What keeps a volume down and may go away by itself, and when it is time to try again.

use anyhow::{Context, Result};
use ddsnap::probe::contents::Contents;

use super::Volume;
use crate::host::filled_device;
use crate::machine::{Busy, Users};
use crate::plan::{Report, Scope};
use crate::refusal::{self, OTHER_STORE};
use crate::uevents::{LOOK_EVERY, Occasion};

/// What event would make another attempt worthwhile.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Waiting {
    /// None: all is up, or only an administrator can help.
    Nothing,
    /// A device of the volume appears.
    Device,
    /// Whoever uses the volume's devices without it lets go of them.
    Claims,
    /// The volume's own store lies under the store's name again.
    Store,
    /// The origin holds something else than this, which could not be mounted.
    Contents(Option<Contents>),
    /// Whoever has the origin for himself lets go of it.
    Free,
}

impl Volume {
    /// Whether all of the volume's devices are there.
    pub(super) fn check_devices(&self) -> Result<()> {
        let devices = &self.config.device;
        let all = [
            Some(&devices.origin),
            Some(&devices.snapstore),
            devices.meta.as_ref(),
        ];
        for path in all.into_iter().flatten() {
            filled_device(self.host.as_ref(), path)?;
        }
        Ok(())
    }

    /// Before anything of the volume is there: nobody else may use its devices. What writes to the origin behind
    /// its back makes its snapshots wrong.
    ///
    /// # Errors
    /// [`Busy`]: somebody does; or that of looking.
    pub fn check_claims(&self) -> Result<()> {
        if self.server_runs() || !self.devices()?.is_empty() {
            return Ok(());
        }
        let devices = &self.config.device;
        let all = [
            ("origin", Some(&devices.origin)),
            ("snapshot store", Some(&devices.snapstore)),
            ("metadata device", devices.meta.as_ref()),
        ];
        for (what, path) in all {
            let Some(path) = path else { continue };
            self.host.check_unused(path).with_context(|| {
                format!(
                    "the {what} of volume '{0}' is used without it: end that use, and the volume comes up within {1} s \
                     (`zumastor stop volume {0}` ends the waiting)",
                    self.name,
                    LOOK_EVERY.as_secs()
                )
            })?;
        }
        Ok(())
    }

    /// Before the first start: gives devices that udev is busy with the time to get their names.
    pub fn await_devices(&self) {
        if self.check_devices().is_err() {
            self.host.settle();
        }
    }

    /// What to wait for after an attempt to come up; none: whatever that has found out itself.
    pub(super) fn waiting_after(&self, result: &Result<Report>) -> Option<Waiting> {
        let held = |error: &anyhow::Error| error.is::<Busy>();
        match result {
            Ok(report) => match report.failure(Scope::Master) {
                Some(error) if held(error) => Some(Waiting::Free),
                Some(_) => Some(Waiting::Contents(self.origin_contents())),
                None => None,
            },
            Err(_) if self.check_devices().is_err() => Some(Waiting::Device),
            Err(error) if held(error) && self.check_claims().is_err() => Some(Waiting::Claims),
            Err(error) if refusal::code(error) == OTHER_STORE => Some(Waiting::Store),
            Err(_) => None,
        }
    }

    /// Whether an event may help.
    #[must_use]
    pub fn waits(&self) -> bool {
        self.waiting != Waiting::Nothing
    }

    /// Whether a retry may succeed now that a device appeared or changed, or that some time has gone by.
    #[must_use]
    pub fn worth_retrying(&self, occasion: Occasion) -> bool {
        match &self.waiting {
            Waiting::Nothing => false,
            Waiting::Device => self.check_devices().is_ok(),
            // Not everybody who lets go causes an event.
            Waiting::Claims => self.check_claims().is_ok(),
            Waiting::Store => self.supervisor.has_its_store(),
            // What changes there does.
            Waiting::Contents(_) if occasion == Occasion::Time => false,
            // A failed mount opens the device and so causes an event itself: only a change counts.
            Waiting::Contents(seen) => *seen != self.origin_contents(),
            Waiting::Free => {
                let origin = self.host.dm_find(&self.name).ok().flatten();
                origin.is_some_and(|d| self.host.users(d.dev) == Users::default())
            }
        }
    }
}
