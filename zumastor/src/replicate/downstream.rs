// SPDX-License-Identifier: GPL-2.0-only
//! A real volume as the receiving end sees it.

use std::fs::File;
use std::sync::Arc;

use anyhow::{Context, Error, Result, bail};
use ddsnap::units::{ChunkRun, ChunkShift, Sectors};
use jiff::Timestamp;
use uuid::Uuid;

use super::device::{Changes, Device};
use super::files::Files;
use super::upstream::with;
use super::written::Origin;
use crate::config::Incoming;
use crate::layout::Layout;
use crate::replication::message::Begin;
use crate::replication::progress::Progress;
use crate::replication::standing::{Epoch, Partial, Role, Standing};
use crate::replication::sums::{Sums, is_zero};
use crate::replication::volume::{Downstream, Watch};
use crate::volume::{Volume, Volumes, in_use_line};

/// The name of the file with the position of what arrives.
pub const INCOMING: &str = "incoming";

/// The receiving end.
pub struct Receiving {
    volumes: Arc<dyn Volumes>,
    layout: Layout,
    volume: String,
    files: Files,
    standing: Standing,
    /// Stock is taken: `standing` says what the origin has.
    is_known: bool,
    /// Keeps the origin from everybody else; none if somebody has it and has written to it.
    claim: Option<File>,
    base: Option<Device>,
    origin: Option<Device>,
}

impl Receiving {
    /// For the volume that stands so, but for what its origin has.
    #[must_use]
    pub fn new(
        volumes: Arc<dyn Volumes>,
        layout: &Layout,
        volume: &str,
        files: Files,
        standing: Standing,
    ) -> Receiving {
        Receiving {
            volumes,
            layout: layout.clone(),
            volume: volume.to_owned(),
            files,
            standing,
            is_known: false,
            claim: None,
            base: None,
            origin: None,
        }
    }

    fn with<T>(&self, change: impl FnOnce(&mut Volume) -> Result<T>) -> Result<T> {
        with(self.volumes.as_ref(), &self.volume, change)
    }

    fn length_of(&self, id: Uuid) -> Result<Sectors> {
        let held = self.standing.find(id).context("the base is not here")?;
        Ok(held.length)
    }

    fn snapshot(&self, id: Uuid, chunk: ChunkShift, length: Sectors) -> Result<Device> {
        let path = self.with(|v| v.node(Some(id)))?;
        Device::open(&path, false, chunk, length)
    }

    fn origin(&self, chunk: ChunkShift, length: Sectors) -> Result<Device> {
        let path = self.with(|v| v.node(None))?;
        Device::open(&path, true, chunk, length)
    }

    /// Nobody else gets the origin from now on, if somebody had it when stock was taken and has written to it.
    fn keep_alone(&mut self) -> Result<()> {
        if !self.is_known || self.claim.is_some() {
            return Ok(());
        }
        let (node, claim) = self.with(|v| {
            if let Some(dir) = v.origin_mounts()?.first() {
                bail!("the replica is mounted on {}: unmount it", dir.display());
            }
            v.claim_origin()
        })?;
        self.claim = Some(claim.with_context(|| in_use_line(&node))?);
        Ok(())
    }

    fn written(&self) -> Result<&Device> {
        self.origin.as_ref().context("nothing is open")
    }

    /// A failure to write to the origin, with what the snapshot store says of it: the kernel has an errno at most, and
    /// a flush not even that of a full store.
    fn explained(&self, error: Error) -> Error {
        match self.with(|v| Ok(v.store_trouble())) {
            Ok(Some(trouble)) => error.context(trouble),
            _ => error,
        }
    }
}

impl Downstream for Receiving {
    fn take_stock(&mut self, watch: &dyn Watch) -> Result<Standing> {
        // A master refuses whatever comes, and whoever mounts it must not be kept from it for that.
        if !self.is_known && self.standing.role == Role::Replica {
            let origin = Origin {
                volumes: self.volumes.as_ref(),
                layout: &self.layout,
                volume: &self.volume,
            };
            self.claim = origin.claim(&mut self.standing, &|| watch.cancelled())?;
            self.is_known = true;
        }
        Ok(self.standing.clone())
    }

    fn adopt(&mut self, epoch: Epoch) -> Result<()> {
        self.with(|v| v.adopt_epoch(epoch))
    }

    fn superseded(&mut self, epoch: Epoch) -> Result<()> {
        self.with(|v| v.superseded(epoch, None))
    }

    fn release_old(&mut self) -> Result<()> {
        let known = self.with(|v| {
            v.release_old_hold()?;
            Ok(v.snapshot_uuids())
        })?;
        self.files.tidy(&known);
        Ok(())
    }

    fn safety_snapshot(&mut self) -> Result<()> {
        // First, or what is written after it would be lost.
        self.keep_alone()?;
        self.with(|v| v.safety_snapshot("keeps what was written to the replica"))
            .map(|_| ())
    }

    fn unsettle(&mut self) -> Result<()> {
        self.keep_alone()?;
        // With the snapshot gone that the origin was compared with, nobody can tell what was written to it.
        let known = |id| self.standing.find(id).is_some();
        let origin = self.with(|v| Ok(v.source()?.origin))?;
        if origin.is_some_and(|origin| !known(origin)) {
            let why = "keeps what the origin held: the snapshot that it had the content of is gone";
            self.with(|v| v.safety_snapshot(why))?;
        }
        self.with(Volume::unsettle)
    }

    fn restore(&mut self, base: Uuid, watch: &dyn Watch) -> Result<()> {
        let chunk = self.standing.chunk;
        let length = self.length_of(base)?;
        let (from, to) = (
            self.snapshot(base, chunk, length)?,
            self.origin(chunk, length)?,
        );
        let number = self.with(|v| v.number_of(base))?;
        let now = self.with(Volume::momentary_snapshot)?;
        let copied = restore_changes(
            &self.layout.server_socket(&self.volume),
            (number, now),
            (&from, &to),
            watch,
        );
        let ended = self.with(Volume::end_momentary);
        copied.and(ended)
    }

    fn start_partial(&mut self, partial: Partial, lineage: Uuid, epoch: Epoch) -> Result<()> {
        self.keep_alone()?;
        let incoming = Incoming {
            uuid: partial.snapshot,
            id: 0,
            created: 0,
            base: partial.base,
            position: 0,
            size: 0,
            plain: partial.plain,
        };
        // Of an earlier try with the same snapshot and base it says a position that is not so any more. First: without
        // it the document's copy begins at its beginning, whichever it is.
        self.files.drop(INCOMING)?;
        self.with(|v| v.start_incoming(incoming, lineage, epoch))
    }

    fn open(&mut self, begin: &Begin, chunk: ChunkShift) -> Result<()> {
        self.base = match begin.base {
            Some(id) => Some(self.snapshot(id, chunk, begin.base_length)?),
            None => None,
        };
        self.origin = Some(self.origin(chunk, begin.snapshot.length)?);
        Ok(())
    }

    fn read_base(&mut self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        self.base
            .as_ref()
            .context("nothing is open")?
            .read(run, into)
    }

    fn write(&mut self, run: ChunkRun, data: &[u8]) -> Result<()> {
        let written = self.written()?.write(run, data);
        written.map_err(|error| self.explained(error))
    }

    fn write_zeros(&mut self, run: ChunkRun, bytes: u64) -> Result<()> {
        let mut there = Vec::new();
        self.written()?.read(run, &mut there)?;
        if there.len() as u64 != bytes {
            bail!("the origin is shorter than the snapshot");
        }
        if is_zero(&there) {
            return Ok(());
        }
        there.fill(0);
        self.write(run, &there)
    }

    fn flush(&mut self) -> Result<()> {
        let flushed = self.written()?.flush();
        flushed.map_err(|error| self.explained(error))
    }

    fn sums(&mut self, snapshot: Uuid) -> Result<Option<Sums>> {
        self.files.sums(snapshot)
    }

    fn progress(&mut self) -> Result<Option<Progress>> {
        self.files.load(INCOMING)
    }

    fn save_progress(&mut self, progress: &Progress) -> Result<()> {
        self.files.save(INCOMING, progress)
    }

    fn finish(&mut self, begin: &Begin, sums: Option<&Sums>, proven: bool) -> Result<u32> {
        // Devices are given back before they are looked at anew.
        (self.base, self.origin) = (None, None);
        if let Some(sums) = sums {
            self.files.save_sums(begin.snapshot.id, sums)?;
        }
        let proven = proven.then(|| Timestamp::now().as_second());
        self.with(|v| v.finish_incoming(begin, proven))
    }
}

/// Copies back what differs between the base and a snapshot of now.
fn restore_changes(
    server: &std::path::Path,
    (base, now): (u32, u32),
    (from, to): (&Device, &Device),
    watch: &dyn Watch,
) -> Result<()> {
    /// Chunks copied at a time.
    const MOST: u64 = 64;
    let mut changes = Changes::list(server, Some(base), now)?;
    let (mut data, mut done) = (Vec::new(), 0);
    while let Some(mut run) = changes.next_run(&|| watch.cancelled())? {
        while run.chunks > 0 {
            if watch.cancelled() {
                bail!("it was cancelled");
            }
            let part = ChunkRun {
                first: run.first,
                chunks: run.chunks.min(MOST),
            };
            from.read(part, &mut data)?;
            to.write(part, &data)?;
            done += data.len() as u64;
            watch.progress(done, None, 0);
            run.first.0 += part.chunks;
            run.chunks -= part.chunks;
        }
    }
    to.flush()
}

#[cfg(test)]
mod tests {
    use super::super::files::position_of;
    use super::super::one;
    use super::*;
    use crate::config;
    use crate::host::fake::Fake;
    use crate::layout::Layout;
    use crate::machine::{Dev, TableLine};
    use crate::replication::standing::{Held, Role};

    /// A copy that begins anew, as the origin was taken back to the base or is doubted, went on from where the try
    /// before had come. What was below was the base's, and the sums that were noted with the position proved it equal.
    #[test]
    fn a_copy_that_begins_anew_begins_at_its_beginning() {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        let volumes = one::replica(Arc::new(Fake::default()), &layout);
        let (snapshot, base) = (Uuid::from_u128(0xcc), Some(Uuid::from_u128(0xaa)));
        let files = Files::of(&layout, "v");
        let chunk = ChunkShift::MIN;
        let noted = Progress {
            snapshot,
            base,
            position: 100,
            plain: false,
            sums: Some(Sums::new(chunk)),
        };
        files.save(INCOMING, &noted).expect("noted");
        let epoch = Epoch {
            number: 3,
            owner: snapshot,
            since: 0,
        };
        let standing = Standing {
            lineage: Some(snapshot),
            epoch,
            ..Standing::blank(snapshot, Role::Replica)
        };
        let mut end = Receiving::new(volumes, &layout, "v", files.clone(), standing);
        let partial = Partial {
            snapshot,
            base,
            position: 0,
            plain: true,
        };
        end.start_partial(partial, snapshot, epoch).expect("begun");
        let begun = config::load(&layout, "v").expect("read").expect("there");
        let incoming = begun.source.and_then(|s| s.incoming).expect("under way");
        let position = |incoming: &Incoming| {
            let noted = files.load(INCOMING).expect("read");
            position_of(incoming, noted.as_ref())
        };
        assert_eq!(position(&incoming), 0);
        // Of another copy nothing counts.
        files.save(INCOMING, &noted).expect("noted");
        assert_eq!(position(&incoming), 100);
        let other = Incoming {
            base: None,
            ..incoming
        };
        assert_eq!(position(&other), 0);
    }

    /// The volume's origin is a device.
    fn show_origin(fake: &Fake) {
        let dev = |minor| Dev { major: 254, minor };
        let table = TableLine {
            sectors: 8,
            snapstore: dev(1),
            origin: dev(2),
            agent: String::new(),
            id: None,
        };
        let device = (dev(0), String::new(), table);
        fake.state().dm.insert("v".into(), device);
    }

    /// The store of a replica was full and gave up the snapshot that the origin had the content of. What somebody had
    /// written to the replica was not noticed, and was gone when the origin was taken back to an older snapshot.
    #[test]
    fn what_cannot_be_compared_any_more_is_kept() {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        let fake = Arc::new(Fake::default());
        fake.state().snapshots.insert(0, 1);
        show_origin(&fake);
        let volumes = one::replica(fake.clone(), &layout);
        let (hold, gone) = (Uuid::from_u128(0xaa), Uuid::from_u128(0xcc));
        let held = Held {
            id: hold,
            number: 0,
            taken: 1,
            length: Sectors(8),
            data: true,
        };
        let standing = Standing {
            held: vec![held],
            ..Standing::blank(hold, Role::Replica)
        };
        let files = Files::of(&layout, "v");
        let mut end = Receiving::new(volumes, &layout, "v", files, standing);
        let kept = || fake.state().snapshots.len();
        for (origin, expected) in [(hold, 1), (gone, 2)] {
            end.with(|v| v.settle(origin)).expect("settled");
            end.unsettle().expect("unsettled");
            assert_eq!(kept(), expected);
        }
        // Interrupted, it is taken back again, and what there was to keep is kept.
        end.unsettle().expect("unsettled");
        assert_eq!(kept(), 2);
    }

    /// A receiving end of this role whose origin is a device.
    fn end_that_is(role: Role) -> (Arc<Fake>, tempfile::TempDir, Receiving) {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        let fake = Arc::new(Fake::default());
        show_origin(&fake);
        let volumes = one::replica(fake.clone(), &layout);
        let standing = Standing::blank(Uuid::from_u128(1), role);
        let files = Files::of(&layout, "v");
        let end = Receiving::new(volumes, &layout, "v", files, standing);
        (fake, root, end)
    }

    /// Who had a replica's origin without a mount, as LVM has, went on writing to it while `--force-base` took it back and a
    /// copy came: the snapshot had some of both, and was told to be proven equal.
    #[test]
    fn nobody_else_has_the_origin_while_it_is_written() {
        let (fake, _root, mut end) = end_that_is(Role::Replica);
        // As `take_stock` leaves it when somebody has the origin and has written to it.
        end.is_known = true;
        let node = end.with(|v| v.node(None)).expect("a node");
        fake.state().held.insert(node.clone());
        let partial = Partial {
            snapshot: Uuid::from_u128(2),
            base: None,
            position: 0,
            plain: true,
        };
        let epoch = end.standing.epoch;
        for refused in [
            end.safety_snapshot(),
            end.unsettle(),
            end.start_partial(partial, Uuid::from_u128(1), epoch),
        ] {
            let error = refused.expect_err("in use").to_string();
            assert!(error.contains("is in use"), "{error}");
        }
        fake.state().held.remove(&node);
        end.start_partial(partial, Uuid::from_u128(1), epoch)
            .expect("free");
        assert!(end.claim.is_some());
    }

    /// An old master that was not mounted just then was kept from being, by its own daemon, while a stream came that it only
    /// refused; and one that somebody had never heard that it was superseded.
    #[test]
    fn a_master_is_not_claimed() {
        let (fake, _root, mut end) = end_that_is(Role::Master);
        let standing = end.standing.clone();
        struct Calm;
        impl Watch for Calm {
            fn progress(&self, _: u64, _: Option<u64>, _: u64) {}
            fn cancelled(&self) -> bool {
                false
            }
        }
        let node = end.with(|v| v.node(None)).expect("a node");
        fake.state().held.insert(node);
        assert_eq!(end.take_stock(&Calm).expect("as it is"), standing);
        assert!(end.claim.is_none());
    }

    /// A replica's store was full, and both sides said "could not flush /dev/mapper/copy: Input/output error".
    #[test]
    fn a_failed_write_says_what_is_wrong_with_the_store() {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        let fake = Arc::new(Fake::default());
        let volumes = one::replica(fake.clone(), &layout);
        let files = Files::of(&layout, "v");
        let standing = Standing::blank(Uuid::from_u128(1), Role::Replica);
        let mut end = Receiving::new(volumes, &layout, "v", files, standing);
        let full = std::path::Path::new("/dev/full");
        let device = Device::open(full, true, ChunkShift::MIN, Sectors(8));
        end.origin = Some(device.expect("open"));
        let run = ChunkRun {
            first: ddsnap::units::Chunk(0),
            chunks: 1,
        };
        let mut said = || format!("{:#}", end.write(run, &[1; 512]).expect_err("full"));
        assert!(
            said().starts_with("could not write /dev/full"),
            "{}",
            said()
        );
        fake.state().fault = Some("it broke".into());
        let (told, rest) = (
            "the snapshot store has failed: it broke",
            "could not write /dev/full",
        );
        assert!(said().starts_with(&format!("{told}: {rest}")), "{}", said());
    }
}
