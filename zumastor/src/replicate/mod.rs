// SPDX-License-Identifier: GPL-2.0-only
//! Replication of real volumes: [`crate::replication`] on devices, documents, sockets and ssh.
//!
//! - [`verify`]: a comparison as a job; [`again`]: what it found, to be sent again.
//! - [`cycle`]: a cycle as a job, whichever side begins it.
//! - [`by_hand`]: what scripts send with `ddsnap transmit`, as a job.
//! - `written`: whether somebody but replication wrote to a replica.
//! - [`failover`]: a replica becomes the master.
//! - [`upstream`], [`downstream`]: a volume as the two ends see it; [`device`]: its devices.
//! - [`ssh`]: the way to another machine; [`socket`]: the way in from there.
//! - [`files`]: sums and positions, beside the document.

pub mod again;
pub mod by_hand;
pub mod cycle;
pub mod device;
pub mod downstream;
pub mod failover;
pub mod files;
pub mod socket;
pub mod ssh;
pub mod upstream;
pub mod verify;
mod written;

/// One volume, for tests, as the daemon has many.
#[cfg(test)]
mod one {
    use std::sync::{Arc, Mutex, PoisonError};

    use anyhow::Result;

    use crate::host::fake::Fake;
    use crate::layout::Layout;
    use crate::volume::{self, Volume, Volumes};

    pub(super) struct One(Mutex<Volume>);

    impl Volumes for One {
        fn with(&self, _: &str, change: &mut dyn FnMut(&mut Volume) -> Result<()>) -> Result<()> {
            change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
        }
    }

    /// The volume 'v' of the golden replica's document, below `layout`.
    pub(super) fn replica(fake: Arc<Fake>, layout: &Layout) -> Arc<One> {
        let document = include_str!("../config/golden/v2-replica.yaml");
        std::fs::create_dir_all(layout.volume("v")).expect("made");
        std::fs::write(layout.config("v"), document).expect("written");
        let volume = volume::load(fake, layout, "v").expect("loaded");
        Arc::new(One(Mutex::new(volume)))
    }
}
