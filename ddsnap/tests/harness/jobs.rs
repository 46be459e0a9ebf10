// SPDX-License-Identifier: GPL-2.0-only
//! What takes a volume many steps: resize and revert, with other work between the steps.

use ddsnap::store::{ResizeError, ResizeRequest, RevertError, Reverting};
use ddsnap::units::SnapTag;

use super::model::Chunk;
use super::shape::{DATA, META, ORIGIN};
use super::volume::Volume;
use super::workload::Step;

/// A job under way.
#[derive(Clone, Copy, Debug)]
pub enum Job {
    /// To these sizes.
    Resize(ResizeRequest),
    /// The first phase, which only reads.
    Check(SnapTag),
    /// The second phase.
    Revert,
}

impl Volume {
    /// What the administrator does before a step: a device must be long enough before it is used.
    /// Doing it again does nothing.
    pub fn prepare(&mut self, step: &Step) {
        let Step::Resize(request) = step else { return };
        let wanted = [
            (ORIGIN, request.origin),
            (DATA, request.store),
            (META, request.meta),
        ];
        for (disk, wanted) in wanted {
            let now = self.disk_bytes(disk);
            if let Some(wanted) = wanted.filter(|&wanted| wanted > now) {
                self.machine.set_len(disk, wanted);
            }
        }
    }

    fn disk_bytes(&self, disk: usize) -> u64 {
        match disk {
            ORIGIN => self.shape.origin_bytes(),
            DATA => self.shape.data_bytes,
            _ => self.shape.meta_bytes,
        }
    }

    /// What the administrator does after a resize, whatever came of it: devices are as long as they are
    /// used.
    pub fn fit_disks(&mut self) {
        for disk in [ORIGIN, DATA, META] {
            self.machine.set_len(disk, self.disk_bytes(disk));
        }
    }

    /// What of a job is left when the store was opened again.
    pub fn after_reopen(&mut self) {
        let reverting = self.store.reverting();
        assert_eq!(reverting.map(|tag| tag.0), self.model.reverting);
        self.job = reverting.map(|_| Job::Revert);
        if let Some(tag) = reverting {
            // It goes back to what is durable: what it has written it writes again.
            self.model.revert_to(tag.0);
        }
        self.unique = vec![false; self.shape.origin_chunks as usize];
    }

    pub(super) fn begin_resize(&mut self, request: &ResizeRequest) {
        match self.store.resize_begin(request).expect("resize") {
            Ok(()) => self.job = Some(Job::Resize(*request)),
            Err(refused) => self.resize_refused(request, refused),
        }
    }

    pub(super) fn begin_revert(&mut self, tag: u32) {
        let known = self.model.snapshots.get(&tag);
        match self.store.revert_begin(SnapTag(tag)).expect("revert") {
            Ok(()) => self.job = Some(Job::Check(SnapTag(tag))),
            Err(RevertError::NoSuchSnapshot(_)) => assert!(known.is_none()),
            Err(RevertError::Squashed(_)) => assert!(known.is_some_and(|s| !s.is_live())),
            Err(RevertError::Bookmark(_)) => assert!(known.is_some_and(|s| s.is_bookmark())),
            Err(RevertError::Longer { .. }) => {
                let bytes = |chunks: &[Chunk]| chunks.iter().map(|c| c.now.len()).sum::<usize>();
                assert!(known.is_some_and(|s| bytes(&s.chunks) > bytes(&self.model.origin)));
            }
            Err(RevertError::UnderWay(tag)) => assert_eq!(Some(tag.0), self.model.reverting),
            Err(other) => panic!("revert to {tag}: {other}"),
        }
    }

    /// A step of the job under way, at most so many chunks of it.
    pub(super) fn work(&mut self, chunks: usize) {
        match self.job {
            None => {}
            Some(Job::Resize(request)) => match self.store.resize_step().expect("resize") {
                Ok(None) => assert!(self.store.is_resizing()),
                Ok(Some(_)) => self.resized(&request),
                Err(refused) => self.resize_refused(&request, refused),
            },
            Some(Job::Check(tag)) => self.check_revert(tag, chunks),
            Some(Job::Revert) => match self.store.revert_step(chunks).expect("revert") {
                Ok(Reverting::More) => {}
                Ok(Reverting::Done { skipped }) => {
                    assert_eq!(skipped, 0);
                    self.job = None;
                    self.model.reverting = None;
                    self.model.settle_origin();
                }
                Err(RevertError::StoreFull) => self.refused_full += 1,
                other => panic!("revert: {other:?}"),
            },
        }
    }

    fn check_revert(&mut self, tag: SnapTag, chunks: usize) {
        match self.store.revert_step(chunks).expect("check") {
            Ok(Reverting::More) => {}
            Ok(Reverting::Checked) => {
                self.store.revert_start().expect("start").expect("checked");
                self.model.begin_revert(tag.0);
                // The target has no device of the origin then, and what is unique was forgotten with it.
                self.unique.fill(false);
                self.job = Some(Job::Revert);
                self.reverts += 1;
            }
            // The snapshot may be deleted, given up, or replaced by another of its tag meanwhile.
            Err(RevertError::NoRoom { needed, free }) => {
                assert!(needed > free);
                self.job = None;
            }
            Err(
                RevertError::NoSuchSnapshot(_)
                | RevertError::Squashed(_)
                | RevertError::Bookmark(_),
            ) => self.job = None,
            other => panic!("check of snapshot {tag}: {other:?}"),
        }
    }

    /// The origin has this length now, for the store and for the model.
    pub fn set_origin_bytes(&mut self, bytes: u64) {
        let chunk_bytes = self.shape.chunk_bytes as usize;
        self.shape.set_origin_bytes(bytes);
        self.unique.resize(self.shape.origin_chunks as usize, false);
        self.model.set_origin_bytes(bytes, chunk_bytes);
    }

    fn resized(&mut self, request: &ResizeRequest) {
        self.job = None;
        self.resizes += 1;
        if let Some(bytes) = request.origin {
            self.set_origin_bytes(bytes);
        }
        self.shape.data_bytes = request.store.unwrap_or(self.shape.data_bytes);
        self.shape.meta_bytes = request.meta.unwrap_or(self.shape.meta_bytes);
        self.model.sizes = self.store.sizes();
        let sizes = self.model.sizes;
        assert_eq!(sizes.origin, self.shape.origin_bytes());
        assert!(request.store.is_none_or(|bytes| bytes == sizes.store));
        assert!(request.meta.is_none_or(|bytes| bytes == sizes.meta));
        self.fit_disks();
    }

    fn resize_refused(&mut self, request: &ResizeRequest, refused: ResizeError) {
        self.job = None;
        assert_eq!(self.store.sizes(), self.model.sizes, "refused, but changed");
        match refused {
            ResizeError::Reverting(tag) => assert_eq!(Some(tag.0), self.model.reverting),
            ResizeError::ChunksInUse { count, least } => {
                assert!(count > 0 && request.store.is_some_and(|store| store < least));
            }
            ResizeError::MetadataInUse { needed, free } => assert!(needed > free),
            ResizeError::NoRoomForEnd { needed, .. } => assert!(needed > 0),
            ResizeError::TooShort { .. } | ResizeError::TooLong { .. } | ResizeError::TwoValues => {
                panic!("{request:?}: {refused}")
            }
        }
        self.fit_disks();
    }
}
