// SPDX-License-Identifier: GPL-2.0-only
//! A real volume as the sending end sees it.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::{Context, Result};
use ddsnap::units::{ChunkRun, ChunkShift};
use jiff::Timestamp;
use uuid::Uuid;

use super::again::Union;
use super::device::{Changes, Device};
use super::files::Files;
use crate::replication::message::Begin;
use crate::replication::progress::Progress;
use crate::replication::standing::{Epoch, Held, Standing};
use crate::replication::sums::Sums;
use crate::replication::volume::Upstream;
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
    /// The copy that has all of that.
    from_start: Option<Uuid>,
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

    /// Of a cycle that ended between the other side's part and ours, the sums are with the position.
    fn recover_sums(&self, snapshot: Uuid) -> Result<()> {
        let held = self.held(snapshot);
        let chunks = held.map_or(u64::MAX, |held| held.length.to_chunks(self.chunk));
        let noted = self.files.load(&self.noted())?;
        let noted = noted.filter(|noted| noted.snapshot == snapshot && noted.position >= chunks);
        match noted.and_then(|noted| noted.sums) {
            Some(sums) => self.files.save_sums(snapshot, &sums),
            None => Ok(()),
        }
    }

    fn noted(&self) -> String {
        format!("to-{}", self.host)
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
        let again = self.files.again(&self.host)?;
        let again = again.filter(|again| begin.plain && again.chunk == self.chunk);
        let end = begin.snapshot.length.to_chunks(self.chunk);
        self.union = again.map(|again| Union::new(again.runs, end));
        let whole = begin.position == 0 && (self.union.is_some() || begin.base.is_none());
        self.from_start = whole.then_some(begin.snapshot.id);
        self.snapshot = snapshot;
        self.base = base.and_then(|(device, _)| device);
        Ok(self.base.is_some())
    }

    fn next_run(&mut self) -> Result<Option<ChunkRun>> {
        let changes = self.changes.as_mut().context("nothing is open")?;
        match &mut self.union {
            Some(union) => union.next(&mut || changes.next_run()),
            None => changes.next_run(),
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

    fn pin(&mut self, snapshot: Uuid) -> Result<()> {
        self.with(|v| v.pin(&self.host, snapshot))
    }

    fn move_hold(&mut self, snapshot: Uuid, sums: Option<&Sums>) -> Result<()> {
        let proven = sums.map(|_| Timestamp::now().as_second());
        match sums {
            Some(sums) => self.files.save_sums(snapshot, sums)?,
            None => self.recover_sums(snapshot)?,
        }
        let known = self.with(|v| {
            v.move_hold(&self.host, snapshot, proven)?;
            Ok(v.snapshot_uuids())
        })?;
        if self.from_start == Some(snapshot) {
            self.files.save_again(&self.host, None)?;
        }
        self.files.tidy(&known);
        Ok(())
    }

    fn superseded(&mut self, epoch: Epoch) -> Result<()> {
        self.with(|v| v.superseded(epoch, Some(&self.host)))
    }
}
