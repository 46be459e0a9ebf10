// SPDX-License-Identifier: GPL-2.0-only
//! A real volume as the sending end sees it.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use ddsnap::units::{ChunkRun, ChunkShift};
use jiff::Timestamp;
use uuid::Uuid;

use super::again::{Again, Union};
use super::device::{Changes, Device};
use super::files::{Files, sending_name};
use crate::replication::message::Begin;
use crate::replication::progress::Progress;
use crate::replication::standing::{Epoch, Held, Standing};
use crate::replication::sums::Sums;
use crate::replication::volume::{Upstream, Watch};
use crate::volume::{Volume, Volumes};

/// The sending end of one target.
pub struct Sending {
    volumes: Arc<dyn Volumes>,
    volume: String,
    host: String,
    server: PathBuf,
    files: Files,
    chunk: ChunkShift,
    /// What the greeting named.
    held: Vec<Held>,
    base: Option<Device>,
    snapshot: Option<Device>,
    changes: Option<Changes>,
    /// What is sent again with the changes.
    union: Option<Union>,
    /// The copy that has all of that from its beginning on, and what was noted when it began.
    from_start: Option<(Uuid, Option<Again>)>,
}

impl Sending {
    /// For the volume that stands so, to `host`.
    #[must_use]
    pub fn new(
        volumes: Arc<dyn Volumes>,
        volume: &str,
        host: &str,
        server: PathBuf,
        files: Files,
        standing: &Standing,
    ) -> Sending {
        Sending {
            volumes,
            volume: volume.to_owned(),
            host: host.to_owned(),
            server,
            files,
            chunk: standing.chunk,
            held: standing.held.clone(),
            base: None,
            snapshot: None,
            changes: None,
            union: None,
            from_start: None,
        }
    }

    fn with<T>(&self, change: impl FnOnce(&mut Volume) -> Result<T>) -> Result<T> {
        with(self.volumes.as_ref(), &self.volume, change)
    }

    fn held(&self, id: Uuid) -> Result<Held> {
        let found = self.held.iter().find(|held| held.id == id);
        found
            .copied()
            .with_context(|| format!("snapshot {id} is not here"))
    }

    /// Its device, unless it is a bookmark, and its number.
    fn device(&self, id: Uuid) -> Result<(Option<Device>, u32)> {
        let held = self.held(id)?;
        let number = self.with(|v| v.number_of(id))?;
        if !held.data {
            return Ok((None, number));
        }
        let path = self.with(|v| v.node(Some(id)))?;
        let device = Device::open(&path, false, self.chunk, held.length)?;
        Ok((Some(device), number))
    }

    fn noted(&self) -> String {
        sending_name(&self.host)
    }

    /// Forgets what was to be sent again, if the copy of `snapshot` had all of it. What a comparison noted since the
    /// copy began is not in it.
    fn sent_again(&self, snapshot: Uuid) -> Result<()> {
        match &self.from_start {
            Some((copied, noted)) if *copied == snapshot => {
                self.with(|_| self.files.forget_again(&self.host, noted.as_ref()))
            }
            _ => Ok(()),
        }
    }
}

/// Does something to a volume, alone.
///
/// # Errors
/// There is no such volume, or that of `change`.
pub fn with<T>(
    volumes: &dyn Volumes,
    name: &str,
    change: impl FnOnce(&mut Volume) -> Result<T>,
) -> Result<T> {
    let (mut change, mut done) = (Some(change), None);
    volumes.with(name, &mut |volume| {
        if let Some(change) = change.take() {
            done = Some(change(volume)?);
        }
        Ok(())
    })?;
    done.context("a change was not made")
}

impl Upstream for Sending {
    fn open(&mut self, begin: &Begin) -> Result<bool> {
        let (snapshot, to) = self.device(begin.snapshot.id)?;
        let base = begin.base.map(|base| self.device(base)).transpose()?;
        let from = base.as_ref().map(|(_, number)| *number);
        self.changes = Some(Changes::list(&self.server, from, to)?);
        let noted = self.files.again(&self.host)?;
        let again = noted.clone();
        let again = again.filter(|again| begin.plain && again.chunk == self.chunk);
        let end = begin.snapshot.length.to_chunks(self.chunk);
        self.union = again.map(|again| Union::new(again.runs, end));
        let whole = begin.position == 0 && (self.union.is_some() || begin.base.is_none());
        self.from_start = whole.then_some((begin.snapshot.id, noted));
        self.snapshot = snapshot;
        self.base = base.and_then(|(device, _)| device);
        Ok(self.base.is_some())
    }

    fn next_run(&mut self, watch: &dyn Watch) -> Result<Option<ChunkRun>> {
        let changes = self.changes.as_mut().context("nothing is open")?;
        let mut next = || changes.next_run(&|| watch.cancelled());
        match &mut self.union {
            Some(union) => union.next(&mut next),
            None => next(),
        }
    }

    fn read_base(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        match &self.base {
            Some(base) => base.read(run, into),
            None => {
                into.clear();
                Ok(())
            }
        }
    }

    fn read(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        let snapshot = self.snapshot.as_ref().context("nothing is open")?;
        snapshot.read(run, into)
    }

    fn sums(&mut self, snapshot: Uuid) -> Result<Option<Sums>> {
        self.files.sums(snapshot)
    }

    fn progress(&mut self) -> Result<Option<Progress>> {
        self.files.load(&self.noted())
    }

    fn save_progress(&mut self, progress: &Progress) -> Result<()> {
        self.files.save(&self.noted(), progress)
    }

    fn note_end(&mut self, snapshot: Uuid, sums: Option<&Sums>) -> Result<()> {
        self.files.note_end(&self.host, snapshot, sums)
    }

    fn pin(&mut self, snapshot: Uuid) -> Result<()> {
        self.with(|v| v.pin(&self.host, snapshot))
    }

    fn move_hold(&mut self, snapshot: Uuid, sums: Option<&Sums>, proven: bool) -> Result<()> {
        // The old hold goes, and cannot while its device is open here.
        (self.base, self.snapshot, self.changes) = (None, None, None);
        let proven = proven.then(|| Timestamp::now().as_second());
        match sums {
            Some(sums) => self.files.save_sums(snapshot, sums)?,
            // That cycle ended between the other side's part and ours.
            None => self.files.keep_end(&self.host, snapshot)?,
        }
        let known = self.with(|v| {
            v.move_hold(&self.host, snapshot, proven)?;
            Ok(v.snapshot_uuids())
        })?;
        self.sent_again(snapshot)?;
        self.files.tidy(&known);
        Ok(())
    }

    fn superseded(&mut self, epoch: Epoch) -> Result<()> {
        self.with(|v| v.superseded(epoch, Some(&self.host)))
    }
}

#[cfg(test)]
mod tests {
    use ddsnap::units::Chunk;

    use super::super::one;
    use super::*;
    use crate::host::fake::Fake;
    use crate::layout::Layout;
    use crate::replication::standing::Role;

    /// A line that broke when all was sent and not yet acknowledged left the sender without sums, and no later cycle was
    /// proven until somebody compared everything.
    #[test]
    fn what_the_other_side_completed_unheard_has_its_sums() {
        let root = tempfile::tempdir().expect("a directory");
        let files = Files::of(&Layout::below(root.path()), "v");
        let (sent, other) = (Uuid::from_u128(2), Uuid::from_u128(3));
        let mut sums = Sums::new(ChunkShift::MIN);
        sums.replace(5, &[], &[1; 512]);
        files.note_end("beta", sent, Some(&sums)).expect("noted");
        files.keep_end("beta", other).expect("nothing to keep");
        files.keep_end("gamma", sent).expect("nothing to keep");
        assert_eq!(files.sums(sent).expect("read"), None);
        files.keep_end("beta", sent).expect("kept");
        assert_eq!(files.sums(sent).expect("read"), Some(sums.clone()));
        // Of the same snapshot, sent again when they were not known.
        files.note_end("beta", other, Some(&sums)).expect("noted");
        files.note_end("beta", other, None).expect("forgotten");
        files.keep_end("beta", other).expect("nothing to keep");
        assert_eq!(files.sums(other).expect("read"), None);
        files.note_end("beta", other, Some(&sums)).expect("noted");
        files.forget_target("beta").expect("forgotten");
        files.keep_end("beta", other).expect("nothing to keep");
        assert_eq!(files.sums(other).expect("read"), None);
    }

    /// What `verify --repair` found while a copy ran was forgotten at its end, unsent: the other side stayed different.
    #[test]
    fn what_is_noted_while_a_copy_runs_is_sent_with_the_next() {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        let volumes = one::replica(Arc::new(Fake::default()), &layout);
        let files = Files::of(&layout, "v");
        let standing = Standing::blank(Uuid::from_u128(1), Role::Master);
        let server = PathBuf::new();
        let mut end = Sending::new(volumes, "v", "beta", server, files.clone(), &standing);
        let note = |first| Again {
            chunk: ChunkShift::MIN,
            runs: vec![ChunkRun {
                first: Chunk(first),
                chunks: 1,
            }],
        };
        let (copied, other) = (Uuid::from_u128(2), Uuid::from_u128(3));
        let noted = || files.again("beta").expect("read");
        for (at_the_beginning, at_the_end, left) in [
            (Some(note(1)), Some(note(1)), None),
            (Some(note(1)), Some(note(2)), Some(note(2))),
            (None, Some(note(2)), Some(note(2))),
            (Some(note(1)), None, None),
        ] {
            files.forget_target("beta").expect("forgotten");
            if let Some(note) = &at_the_end {
                files.save_again("beta", note).expect("noted");
            }
            end.from_start = Some((copied, at_the_beginning));
            end.sent_again(other).expect("nothing to do");
            assert_eq!(noted(), at_the_end, "of another copy");
            end.sent_again(copied).expect("looked at");
            assert_eq!(noted(), left);
        }
    }
}
