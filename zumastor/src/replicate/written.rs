// SPDX-License-Identifier: GPL-2.0-only
//! Whether somebody but replication wrote to a replica's origin.

use std::fs::File;

use anyhow::{Context, Result, bail};
use ddsnap::units::{ChunkRun, ChunkShift, Sectors};

use super::device::{Changes, Device};
use super::upstream::with;
use crate::layout::Layout;
use crate::replication::standing::{Held, Standing};
use crate::volume::{Volume, Volumes, in_use_line};

/// A replica's origin.
pub(super) struct Origin<'a> {
    pub(super) volumes: &'a dyn Volumes,
    pub(super) layout: &'a Layout,
    pub(super) volume: &'a str,
}

impl Origin<'_> {
    /// Keeps everybody else from mounting the origin and the like, for as long as the file is open, and finds out what it has:
    /// completes `standing`. No file: somebody has it, and has written to it.
    ///
    /// # Errors
    /// Somebody has it and has not written yet; the server cannot be asked, or the origin cannot be read; or it was `cancelled`.
    pub(super) fn claim(
        &self,
        standing: &mut Standing,
        cancelled: &dyn Fn() -> bool,
    ) -> Result<Option<File>> {
        // First, or what is written after the look would not be seen.
        let (node, claim) = with(self.volumes, self.volume, |v| v.claim_origin())?;
        self.look(standing, cancelled)?;
        if claim.is_none() && !standing.written {
            bail!("{}", in_use_line(&node));
        }
        Ok(claim)
    }

    fn look(&self, standing: &mut Standing, cancelled: &dyn Fn() -> bool) -> Result<()> {
        // Nobody can tell any more what it has, if the snapshot it is known by is gone.
        standing.origin = standing.origin.filter(|id| standing.find(*id).is_some());
        standing.written = self.was_written(standing, cancelled)?;
        Ok(())
    }

    /// Whether somebody but replication wrote to the origin, or has it mounted and may.
    fn was_written(&self, standing: &Standing, cancelled: &dyn Fn() -> bool) -> Result<bool> {
        let volumes = self.volumes;
        let mounted = with(volumes, self.volume, |v| Ok(!v.origin_mounts()?.is_empty()))?;
        let Some(origin) = standing.origin.filter(|_| !mounted) else {
            return Ok(mounted);
        };
        let base = standing.find(origin).context("the base is not here")?;
        let number = with(volumes, self.volume, |v| v.number_of(origin))?;
        let now = with(volumes, self.volume, Volume::momentary_snapshot)?;
        let server = self.layout.server_socket(self.volume);
        let changed = Changes::list(&server, Some(number), now).and_then(|mut changes| {
            let end = (base.length, standing.chunk);
            changed_before(end, changes.next_run(cancelled)?, |run| {
                self.tail_differs(base, run, end)
            })
        });
        with(volumes, self.volume, Volume::end_momentary)?;
        changed.context("could not find out whether somebody wrote to the replica")
    }

    /// Whether the origin has something else in `run` than the snapshot `base`, up to the latter's end.
    fn tail_differs(
        &self,
        base: &Held,
        run: ChunkRun,
        (length, chunk): (Sectors, ChunkShift),
    ) -> Result<bool> {
        // Nothing is left to compare with.
        if !base.data {
            return Ok(true);
        }
        let read = |snapshot| -> Result<Vec<u8>> {
            let node = with(self.volumes, self.volume, |v| v.node(snapshot))?;
            let mut data = Vec::new();
            Device::open(&node, false, chunk, length)?.read(run, &mut data)?;
            Ok(data)
        };
        Ok(read(Some(base.id))? != read(None)?)
    }
}

/// Whether something has changed before the end of a base of so many sectors, of whose list of changes this is the first
/// run. Of an origin that has grown since, all behind that end is listed too, from the chunk on in which it lies:
/// whether that one's beginning has changed `tail_differs` says.
fn changed_before(
    (length, chunk): (Sectors, ChunkShift),
    first: Option<ChunkRun>,
    tail_differs: impl FnOnce(ChunkRun) -> Result<bool>,
) -> Result<bool> {
    let Some(ChunkRun { first, .. }) = first else {
        return Ok(false);
    };
    if first.0 < length.to_whole_chunks(chunk) {
        Ok(true)
    } else if first.0 < length.to_chunks(chunk) {
        tail_differs(ChunkRun { first, chunks: 1 })
    } else {
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use ddsnap::units::Chunk;

    use super::*;

    /// A replica whose origin had grown was taken for written to: all behind the old end is listed as changed.
    #[test]
    fn only_what_changed_before_the_end_of_the_base_was_written() {
        let chunk = ChunkShift::from_bytes(4096).expect("a chunk size");
        let asked = |sectors, first: Option<u64>, differs| {
            let run = first.map(|first| ChunkRun {
                first: Chunk(first),
                chunks: 9,
            });
            let mut looked_at = None;
            let tail = |run: ChunkRun| {
                looked_at = Some((run.first.0, run.chunks));
                Ok(differs)
            };
            let changed = changed_before((Sectors(sectors), chunk), run, tail);
            (changed.expect("no error"), looked_at)
        };
        // Ten whole chunks.
        assert_eq!(asked(80, None, true), (false, None));
        assert_eq!(asked(80, Some(9), false), (true, None));
        assert_eq!(asked(80, Some(10), true), (false, None));
        // Ten and a part: that one is listed when the origin grows, and its data decides.
        assert_eq!(asked(83, Some(9), false), (true, None));
        assert_eq!(asked(83, Some(10), false), (false, Some((10, 1))));
        assert_eq!(asked(83, Some(10), true), (true, Some((10, 1))));
        assert_eq!(asked(83, Some(11), true), (false, None));
    }
}
