// SPDX-License-Identifier: GPL-2.0-only
//! How much the engine does for others while a request waits.
//!
//! What is to be bounded is time, but the engine reads no clock, and what takes time are operations of the
//! metadata's device: reads of single places, writes and flushes. So the budget is a number of these. Who calls
//! the engine knows how long they take and sets it ([`Store::set_budget`]); it is what all work but the request's own
//! is bounded by: a checkpoint's steps in passing, bitmaps looked at for free chunks, the steps of a resize.
//! A step that has begun may do some more: what cannot be divided is the end of a checkpoint, three
//! flushes and two writes.

use std::time::Duration;

use super::Store;

/// A number of operations of the metadata's device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budget(u8);

impl Budget {
    /// The most: on a fast device more would gain nothing. Some tens of milliseconds on a disk that takes
    /// 8 ms to seek.
    pub const MOST: Budget = Budget(8);
    /// The least: a checkpoint must get on, or requests wait for it.
    pub const LEAST: Budget = Budget(2);

    /// As many operations as fit into `time` if `each` takes so long.
    #[must_use]
    pub fn within(time: Duration, each: Duration) -> Budget {
        let fit = time.as_nanos() / each.as_nanos().max(1);
        Budget(fit.clamp(Self::LEAST.0.into(), Self::MOST.0.into()) as u8)
    }

    pub(crate) fn operations(self) -> usize {
        self.0.into()
    }
}

impl Default for Budget {
    fn default() -> Self {
        Budget::MOST
    }
}

impl Store {
    /// Sets how much is done for others while a request waits.
    pub fn set_budget(&mut self, budget: Budget) {
        self.budget = budget;
    }

    /// Operations of the metadata's device since the store was opened: reads, writes of neighbouring blocks,
    /// flushes.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.media.work
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The same number of operations was done on every disk: on one that takes 30 ms for each, a request
    /// waited a quarter of a second for what was none of its own.
    #[test]
    fn slow_disks_get_fewer_operations() {
        let fit = |each| Budget::within(Duration::from_millis(60), Duration::from_micros(each));
        let found = [0, 100, 8_000, 15_000, 30_000, 1_000_000].map(|each| fit(each).operations());
        assert_eq!(found, [8, 8, 7, 4, 2, 2]);
    }
}
