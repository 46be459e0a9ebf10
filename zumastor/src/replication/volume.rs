// SPDX-License-Identifier: GPL-2.0-only
//! What the two ends of a stream need of their volumes, and of whoever looks on.

use anyhow::Result;
use ddsnap::units::{ChunkRun, ChunkShift};
use uuid::Uuid;

use super::message::Begin;
use super::progress::Progress;
use super::standing::{Epoch, Partial, Standing};
use super::sums::Sums;

/// The volume that is sent from. Reads give what there is: fewer bytes at the end, none behind it.
pub trait Upstream {
    /// Gets ready to list and read what changed; says whether the base has data here.
    ///
    /// # Errors
    /// The snapshot or the base is gone, or cannot be read.
    fn open(&mut self, begin: &Begin) -> Result<bool>;
    /// The next chunks that changed, ascending; none at the end. Of a full copy: all chunks, or those that
    /// may be other than zero. Waiting for them ends soon after `watch` is cancelled.
    ///
    /// # Errors
    /// The list broke off: a snapshot was given up, or the server is gone; or it was cancelled.
    fn next_run(&mut self, watch: &dyn Watch) -> Result<Option<ChunkRun>>;
    /// What the base has of `run`.
    ///
    /// # Errors
    /// It cannot be read.
    fn read_base(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()>;
    /// What the snapshot has of `run`.
    ///
    /// # Errors
    /// It cannot be read.
    fn read(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()>;
    /// The sums of a complete snapshot, if they are known.
    ///
    /// # Errors
    /// They cannot be read.
    fn sums(&mut self, snapshot: Uuid) -> Result<Option<Sums>>;
    /// The position noted last, if there is one.
    ///
    /// # Errors
    /// It cannot be read.
    fn progress(&mut self) -> Result<Option<Progress>>;
    /// Notes a position. Need not be durable: what is lost is read again.
    ///
    /// # Errors
    /// It cannot be written.
    fn save_progress(&mut self, progress: &Progress) -> Result<()>;
    /// Notes, durably, the sums of a snapshot of which all is sent, if they are known: whether the other side
    /// completes it this side may not get to hear.
    ///
    /// # Errors
    /// They cannot be written.
    fn note_end(&mut self, snapshot: Uuid, sums: Option<&Sums>) -> Result<()>;
    /// Keeps `snapshot` from being given up other than to a bookmark, durably.
    ///
    /// # Errors
    /// It is gone.
    fn pin(&mut self, snapshot: Uuid) -> Result<()>;
    /// Makes `snapshot` the hold with its sums, or with those noted at its end, durably, then lets go of the hold before, and of the pin if
    /// it is on `snapshot`. `proven`: both sides had sums, and they were equal.
    ///
    /// # Errors
    /// The snapshot is gone; then the old hold stays.
    fn move_hold(&mut self, snapshot: Uuid, sums: Option<&Sums>, proven: bool) -> Result<()>;
    /// Durably knows that this epoch has superseded the volume's.
    ///
    /// # Errors
    /// It cannot be written.
    fn superseded(&mut self, epoch: Epoch) -> Result<()>;
}

/// The volume that is received into.
pub trait Downstream {
    /// Finds out, for the greeting, who this is and what he holds, and keeps everybody else from the origin for as long as
    /// this lives. Takes minutes where a slow disk has much of it to look at.
    ///
    /// # Errors
    /// Somebody has the origin, or it cannot be found out.
    fn take_stock(&mut self, watch: &dyn Watch) -> Result<Standing>;
    /// Durably knows of this epoch.
    ///
    /// # Errors
    /// It cannot be written.
    fn adopt(&mut self, epoch: Epoch) -> Result<()>;
    /// Durably knows that this epoch has superseded that of the volume, which is a master.
    ///
    /// # Errors
    /// It cannot be written.
    fn superseded(&mut self, epoch: Epoch) -> Result<()>;
    /// Lets go of the old hold, durably.
    ///
    /// # Errors
    /// It cannot be written.
    fn release_old(&mut self) -> Result<()>;
    /// Keeps what the origin holds in a snapshot of its own.
    ///
    /// # Errors
    /// It cannot be made.
    fn safety_snapshot(&mut self) -> Result<()>;
    /// Records durably that the origin's content is no snapshot's, that no copy is under way, and that what
    /// was written to the origin is dealt with.
    ///
    /// # Errors
    /// It cannot be written.
    fn unsettle(&mut self) -> Result<()>;
    /// Gives the origin the content of `base` back, and flushes. Interrupted, it is done anew.
    ///
    /// # Errors
    /// It cannot be done.
    fn restore(&mut self, base: Uuid, watch: &dyn Watch) -> Result<()>;
    /// Records a copy that begins, durably, with lineage and epoch; the origin's content is no snapshot's
    /// from now on, and what was written to it is dealt with. A position noted before counts no more.
    ///
    /// # Errors
    /// It cannot be written.
    fn start_partial(&mut self, partial: Partial, lineage: Uuid, epoch: Epoch) -> Result<()>;
    /// Gets ready to read the base, as far as the sender has it, and write the origin, in the sender's
    /// chunks.
    ///
    /// # Errors
    /// One of them cannot be opened.
    fn open(&mut self, begin: &Begin, chunk: ChunkShift) -> Result<()>;
    /// What the base has of `run`.
    ///
    /// # Errors
    /// It cannot be read.
    fn read_base(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()>;
    /// Writes the origin from the beginning of `run` on.
    ///
    /// # Errors
    /// It cannot be written.
    fn write(&mut self, run: ChunkRun, data: &[u8]) -> Result<()>;
    /// Has zeros in `run`, `bytes` of them. Where there are some already nothing need be written.
    ///
    /// # Errors
    /// It cannot be read or written.
    fn write_zeros(&mut self, run: ChunkRun, bytes: u64) -> Result<()>;
    /// Makes all writes durable.
    ///
    /// # Errors
    /// The flush failed: what was written since the last one counts as not written.
    fn flush(&mut self) -> Result<()>;
    /// The sums of a complete snapshot, if they are known.
    ///
    /// # Errors
    /// They cannot be read.
    fn sums(&mut self, snapshot: Uuid) -> Result<Option<Sums>>;
    /// The record of the copy under way.
    ///
    /// # Errors
    /// It cannot be read.
    fn progress(&mut self) -> Result<Option<Progress>>;
    /// Records how far the copy is, durably.
    ///
    /// # Errors
    /// It cannot be written.
    fn save_progress(&mut self, progress: &Progress) -> Result<()>;
    /// Makes the snapshot and its twin, then, in one durable step, the snapshot the hold, the base the
    /// old hold, and the copy over. A snapshot that is here already is not made again. `proven`: both sides had
    /// sums, and they were equal. Gives its number.
    ///
    /// # Errors
    /// It cannot be done; the copy is still under way, complete.
    fn finish(&mut self, begin: &Begin, sums: Option<&Sums>, proven: bool) -> Result<u32>;
}

/// Bytes of changed data that a copy will have dealt with at its end, if what is to come is as dense as what lies between
/// `first`, where it began, and `position`, up to which it is through: in chunks, of `end`. Unknown at the beginning.
#[must_use]
pub fn expected(done: u64, first: u64, position: u64, end: u64) -> Option<u64> {
    let through = position.checked_sub(first).filter(|through| *through > 0)?;
    let all = u128::from(done) * u128::from(end.saturating_sub(first)) / u128::from(through);
    Some(u64::try_from(all).unwrap_or(u64::MAX).max(done))
}

/// Whoever looks on.
pub trait Watch: Sync {
    /// Bytes of changed data dealt with, of how many as far as can be told ([`expected`]), and bytes on the wire.
    fn progress(&self, done: u64, total: Option<u64>, wire: u64);
    /// Whether it is to end.
    fn cancelled(&self) -> bool;
}

#[cfg(test)]
mod tests {
    use super::expected;

    /// The time left was unknown from the beginning of a copy to its end.
    #[test]
    fn how_much_is_to_come_is_told_by_what_has_come() {
        assert_eq!(expected(0, 0, 0, 1000), None);
        assert_eq!(expected(500, 0, 100, 1000), Some(5000));
        // Gone on with: what was sent before is not counted.
        assert_eq!(expected(500, 800, 900, 1000), Some(1000));
        assert_eq!(expected(500, 800, 1000, 1000), Some(500));
        assert_eq!(expected(u64::MAX, 0, 1, u64::MAX), Some(u64::MAX));
    }
}
