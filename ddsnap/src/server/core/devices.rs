// SPDX-License-Identifier: GPL-2.0-only
//! The devices the kernel has, which snapshots they show, and stopping those of squashed snapshots.

use nix::errno::Errno;
use tracing::{debug, info, warn};

use super::{Core, Output};
use crate::protocol::channel::Answer;
use crate::protocol::control::ChannelState;
use crate::server::engine::Engine;
use crate::store::SnapState;
use crate::units::SnapTag;

/// A device that the kernel has identified.
#[derive(Clone, Copy, Debug)]
pub(super) struct Device {
    /// `None`: the origin.
    snapshot: Option<SnapTag>,
    /// Whether it has been identified since the channel was attached.
    pub(super) seen: bool,
    stop: Stop,
}

/// Whether a device still does I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stop {
    Running,
    /// It was told to stop; I/O may be in flight.
    Asked,
    /// It has none and will have none.
    Stopped,
}

impl<E: Engine> Core<E> {
    pub(super) fn identify(
        &mut self,
        device: u32,
        snapshot: Option<SnapTag>,
        sectors: u64,
        returning: bool,
    ) -> Answer {
        let refuse = |errno: Errno, sectors| Answer::Identify {
            status: errno as i32,
            sectors,
        };
        let lost = snapshot
            .and_then(|tag| self.engine.snapshot(tag))
            .is_some_and(|info| info.state != SnapState::Live);
        // One that was up before is there, with I/O in flight perhaps, whatever is said now.
        if !(lost && returning) {
            let right = match self.sectors(snapshot) {
                Err(_) => {
                    warn!(
                        "device {device}: there is no snapshot {}",
                        snapshot.unwrap_or_default()
                    );
                    return refuse(Errno::ENOENT, 0);
                }
                Ok(right) => right,
            };
            // A device of the origin that was up before may have another length than the origin: one of
            // them was resized, the other not yet. Its chunks mean the same.
            let resized = snapshot.is_none() && returning;
            if sectors != right && !resized {
                warn!("device {device}: it has {sectors} sectors, it should have {right}");
                return refuse(Errno::EINVAL, right);
            }
            if lost {
                warn!(
                    "device {device}: {} has no data any more",
                    name_of(snapshot)
                );
                return refuse(Errno::EIO, 0);
            }
        }
        debug!("device {device} shows {}", name_of(snapshot));
        // First the new, then the old: a device seen again must not look unused in between.
        if let Some(tag) = snapshot {
            self.now_shown(tag);
        }
        let before = self.devices.insert(
            device,
            Device {
                snapshot,
                seen: true,
                stop: Stop::Running,
            },
        );
        self.no_longer_shown(before.and_then(|device| device.snapshot));
        Answer::Identify {
            status: 0,
            sectors: 0,
        }
    }

    pub(super) fn forget_device(&mut self, device: u32) {
        let Some(Device { snapshot, .. }) = self.devices.remove(&device) else {
            return;
        };
        debug!(
            "device {device}, which showed {}, is gone",
            name_of(snapshot)
        );
        self.no_longer_shown(snapshot);
        self.look_for_quiet();
    }

    /// A snapshot has one user more: it is not deleted meanwhile.
    pub(in crate::server) fn now_shown(&mut self, tag: SnapTag) {
        *self.shown.entry(tag).or_default() += 1;
        self.engine.set_in_use(tag, true);
    }

    pub(in crate::server) fn no_longer_shown(&mut self, snapshot: Option<SnapTag>) {
        let Some(tag) = snapshot else { return };
        let Some(count) = self.shown.get_mut(&tag) else {
            return;
        };
        *count -= 1;
        if *count == 0 {
            self.shown.remove(&tag);
            self.engine.set_in_use(tag, false);
        }
    }

    /// Devices that show a snapshot, and lists that need it: the transient part of its use count.
    pub(in crate::server) fn devices_of(&self, tag: SnapTag) -> u32 {
        self.shown.get(&tag).copied().unwrap_or_default()
    }

    /// Tells a device to stop if it shows a snapshot that is squashed or a bookmark by now, and has not been told yet.
    pub(super) fn stop_device(&mut self, number: u32, out: &mut Output) {
        let Some(device) = self.devices.get_mut(&number) else {
            return;
        };
        let lost = device
            .snapshot
            .and_then(|tag| self.engine.snapshot(tag))
            .is_some_and(|info| info.state != SnapState::Live);
        if lost && device.stop == Stop::Running {
            device.stop = Stop::Asked;
            out.channel(0, Answer::DeviceStop { device: number });
        }
    }

    /// Whether the origin has a device.
    pub(in crate::server) fn origin_is_shown(&self) -> bool {
        let mut devices = self.devices.values();
        devices.any(|device| device.snapshot.is_none())
    }

    /// Snapshots that have devices.
    pub(in crate::server) fn shown_snapshots(&self) -> Vec<SnapTag> {
        let devices = self.devices.values();
        let mut shown: Vec<SnapTag> = devices.filter_map(|device| device.snapshot).collect();
        shown.sort_unstable();
        shown.dedup();
        shown
    }

    /// Tells the devices to stop whose snapshots the engine has squashed or made bookmarks. Of one that only a list
    /// needed nothing is in flight.
    pub(super) fn stop_squashed(&mut self, out: &mut Output) {
        if self.engine.draining().is_empty() {
            return;
        }
        let devices: Vec<u32> = self.devices.keys().copied().collect();
        devices
            .into_iter()
            .for_each(|device| self.stop_device(device, out));
        self.look_for_quiet();
    }

    /// A device says that it has stopped and that none of its I/O is in flight.
    pub(super) fn device_stopped(&mut self, number: u32) {
        // Asked again by a newer channel, it says so again: the older answer is as true.
        if let Some(device) = self.devices.get_mut(&number) {
            if device.stop == Stop::Asked {
                device.stop = Stop::Stopped;
                self.look_for_quiet();
            }
        }
    }

    /// Lets the engine free the chunks of squashed snapshots that no device can have I/O to. Not
    /// before all devices are known.
    pub(super) fn look_for_quiet(&mut self) {
        if self.greeting || self.channel == ChannelState::Lost {
            return;
        }
        for tag in self.engine.draining() {
            let mut devices = self.devices.values();
            if !devices.any(|device| device.snapshot == Some(tag) && device.stop != Stop::Stopped) {
                info!("snapshot {tag} is quiet: what is left of its data is freed");
                self.engine.set_quiet(tag);
                self.background = true;
                self.refusing = false;
                self.room_changed = true;
            }
        }
    }
}

fn name_of(snapshot: Option<SnapTag>) -> String {
    snapshot.map_or("the origin".to_owned(), |tag| format!("snapshot {tag}"))
}
