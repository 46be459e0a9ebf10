// SPDX-License-Identifier: GPL-2.0-only
//! The commands of clients, as far as they need no barrier: those are in [`super::core`].

use tracing::info;

use super::core::{ClientId, Core, Now, Output};
use super::engine::{Answer, Engine};
use super::refusal;
use crate::protocol::control::{Reply, Request, Snapshot, SnapshotState};
use crate::store::{OpError, ResizeRequest, SnapState, SnapshotInfo};
use crate::units::SnapTag;

impl<E: Engine> Core<E> {
    /// A client's request. Its answer may come later: each client asks one thing at a time.
    pub fn command(&mut self, now: Now, client: ClientId, request: Request, out: &mut Output) {
        match request {
            Request::Create(_)
            | Request::CreateBookmark(_)
            | Request::ToBookmark(_)
            | Request::Delete(_)
            | Request::Revert(_) => {
                self.when_settled(now, client, request, out);
            }
            Request::List => out
                .clients
                .push((client, Reply::snapshot_pages(self.list()))),
            Request::Status => out.client(client, Reply::Status(self.status())),
            Request::Usage => self.usage(now, client, out),
            Request::State(tag) => out.client(client, self.state(tag)),
            Request::Sectors(tag) => out.client(
                client,
                match self.sectors(tag) {
                    Ok(sectors) => Reply::Sectors(sectors),
                    Err(refused) => refusal::reply(&refused),
                },
            ),
            Request::Priority(tag, priority) => {
                let reply = self.set_priority(tag, priority);
                out.client(client, reply);
            }
            Request::WhenFull(tag, to_bookmark) => {
                let reply = self.set_to_bookmark(tag, to_bookmark);
                out.client(client, reply);
            }
            Request::DumpTree { first, last } => {
                self.start_dump(now, client, first..=last, out);
            }
            Request::Changelist { from, to } => self.start_list(now, client, from, to, out),
            Request::Resize {
                origin,
                store,
                meta,
            } => {
                let request = ResizeRequest {
                    origin,
                    store,
                    meta,
                };
                self.start_resize(now, client, &request, out);
            }
            Request::Scrub(rate) => self.start_scrub(now, client, rate, out),
            Request::UseCount(tag, delta) => {
                let reply = self.adjust_usecount(tag, delta);
                out.client(client, reply);
            }
        }
    }

    fn list(&self) -> Vec<Snapshot> {
        self.engine
            .snapshots()
            .iter()
            .map(|info| self.describe(info))
            .collect()
    }

    pub(super) fn describe(&self, info: &SnapshotInfo) -> Snapshot {
        Snapshot {
            tag: info.tag,
            seq: info.seq,
            created: info.created,
            priority: info.priority,
            state: state_of(info),
            doubtful: info.doubtful,
            to_bookmark: info.to_bookmark,
            persistent_usecount: info.usecount.into(),
            devices: self.devices_of(info.tag),
            sectors: info.length.0,
        }
    }

    fn state(&self, tag: SnapTag) -> Reply {
        match self.engine.snapshot(tag) {
            Some(info) => Reply::State(state_of(&info)),
            None => refusal::reply(&OpError::NoSuchSnapshot(tag)),
        }
    }

    fn set_priority(&mut self, tag: SnapTag, priority: i8) -> Reply {
        if self.fault.is_some() {
            return self.fault_reply();
        }
        let answer = self.engine.set_priority(tag, priority);
        self.answer(answer, |()| {
            info!("snapshot {tag} has priority {priority}");
            Reply::Priority(priority)
        })
    }

    fn set_to_bookmark(&mut self, tag: SnapTag, to_bookmark: bool) -> Reply {
        if self.fault.is_some() {
            return self.fault_reply();
        }
        let answer = self.engine.set_to_bookmark(tag, to_bookmark);
        self.answer(answer, |()| Reply::WhenFull(to_bookmark))
    }

    fn adjust_usecount(&mut self, tag: SnapTag, delta: i32) -> Reply {
        let devices = self.devices_of(tag);
        if delta == 0 {
            return match self.engine.snapshot(tag) {
                Some(info) => Reply::UseCount(u32::from(info.usecount) + devices),
                None => refusal::reply(&OpError::NoSuchSnapshot(tag)),
            };
        }
        if self.fault.is_some() {
            return self.fault_reply();
        }
        let answer = self.engine.adjust_usecount(tag, delta);
        self.answer(answer, |count| Reply::UseCount(u32::from(count) + devices))
    }

    fn answer<T>(&mut self, answer: Answer<T>, good: impl FnOnce(T) -> Reply) -> Reply {
        match answer {
            Ok(Ok(value)) => good(value),
            Ok(Err(refused)) => refusal::reply(&refused),
            Err(broken) => self.failed(&broken),
        }
    }
}

fn state_of(info: &SnapshotInfo) -> SnapshotState {
    match info.state {
        SnapState::Live => SnapshotState::Live,
        SnapState::Squashed => SnapshotState::Squashed,
        SnapState::Bookmark => SnapshotState::Bookmark,
    }
}
