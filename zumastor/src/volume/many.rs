// SPDX-License-Identifier: GPL-2.0-only
//! Steps for many snapshots: several at a time.
//!
//! Most of the time that a device or a mount takes is waiting, for udev and for other processes. What the steps of
//! different snapshots share, the mount table among it, is looked at once for all of them.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Result, bail};

use super::{Out, Volume};
use crate::machine::Mount;
use crate::plan::{self, Action, Failure, Report, Scope};
use crate::volume::steps::Mounted;

/// So many threads.
const AT_A_TIME: usize = 8;
/// So many steps are not worth a thread.
const FEW: usize = 4;

impl Volume {
    /// Carries out `steps`; a failure ends its own scope, one of the whole volume ends everything.
    ///
    /// So one snapshot that cannot be mounted does not keep the others away.
    pub(super) fn carry_out(&mut self, steps: &[Action], out: Out) -> Report {
        let mut report = Report::default();
        for part in plan::parts(steps) {
            let failed = |action: &Action| report.failures.iter().any(|f| f.0 == action.scope());
            let left: Vec<Action> = part.iter().filter(|a| !failed(a)).copied().collect();
            report.failures.extend(self.carry_out_part(&left, out));
            if report.failure(Scope::Volume).is_some() {
                break;
            }
        }
        report
    }

    /// Carries out the steps of one part; gives back what failed, in their order.
    pub(super) fn carry_out_part(&mut self, part: &[Action], out: Out) -> Vec<Failure> {
        let failure = |action: Action, error| (action.scope(), action, error);
        if part.len() <= FEW {
            let mut failures = Vec::new();
            for &action in part {
                if let Err(error) = self.perform(action, out) {
                    failures.push(failure(action, error));
                }
            }
            return failures;
        }
        let mounts = match self.host.mounts() {
            Ok(mounts) => mounts,
            Err(error) => {
                let action = part[0];
                return vec![(Scope::Volume, action, error)];
            }
        };
        let next = AtomicUsize::new(0);
        let results = Mutex::new(Vec::new());
        let this = &*self;
        let work = || {
            while let Some(&action) = part.get(next.fetch_add(1, Ordering::SeqCst)) {
                let result = this.perform_alone(action, &mounts);
                let mut results = results.lock().unwrap_or_else(|e| e.into_inner());
                results.push((action, result));
            }
        };
        thread::scope(|scope| {
            for _ in 0..AT_A_TIME {
                scope.spawn(work);
            }
        });
        let mut results = results.into_inner().unwrap_or_else(|e| e.into_inner());
        results.sort_by_key(|(action, _)| part.iter().position(|a| a == action));
        let mut failures = Vec::new();
        for (action, result) in results {
            match result {
                Ok(Some(mounted)) => {
                    if let Action::Mount(which) = action {
                        self.note_mounted(which, mounted, out);
                    }
                }
                Ok(None) => {}
                Err(error) => failures.push(failure(action, error)),
            }
        }
        failures
    }

    /// Carries out one step of a snapshot beside those of others.
    fn perform_alone(&self, action: Action, mounts: &[Mount]) -> Result<Option<Mounted>> {
        match action {
            Action::CreateDevice(which) => self.create_device(which).map(|()| None),
            Action::Mount(which) => self.mount_device(which, mounts).map(Some),
            Action::Unmount(which) => self.unmount_device(which, mounts).map(|()| None),
            Action::RemoveDevice(which) => self.remove_device(which).map(|()| None),
            other => bail!("cannot {} beside others", other.describe(&self.name)),
        }
    }
}
