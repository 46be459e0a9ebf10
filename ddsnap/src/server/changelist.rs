// SPDX-License-Identifier: GPL-2.0-only
//! Lists of the chunks that differ between two snapshots, made in small steps between requests.
//!
//! A list's next page is made when its client has taken the last one, so the server holds one page
//! for each. Until its end a list is a user of both snapshots, as a device is: neither is deleted.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Unbounded};

use super::core::{ClientId, Core, Now, Output};
use super::engine::Engine;
use super::jobs::Waiter;
use super::refusal;
use crate::protocol::control::{MAX_RUNS, Reply};
use crate::store::{Changes, OpError};
use crate::units::{ChunkRun, ChunkShift, Sectors, SnapTag};

/// The lists being made; each client has one at most.
#[derive(Debug, Default)]
pub(super) struct Lists {
    open: BTreeMap<ClientId, List>,
    /// Who had a step last.
    last: ClientId,
}

#[derive(Debug)]
struct List {
    changes: Changes,
    chunk: ChunkShift,
    /// What it is a user of.
    tags: Vec<SnapTag>,
    /// Found and not sent.
    runs: Vec<ChunkRun>,
    /// The client has taken all it was sent.
    ready: bool,
    waiter: Waiter,
}

impl Lists {
    /// Whether any of them can go on now.
    pub fn want_steps(&self) -> bool {
        self.open.values().any(|list| list.ready)
    }

    /// The client has taken all it was sent.
    pub fn taken(&mut self, client: ClientId) {
        if let Some(list) = self.open.get_mut(&client) {
            list.ready = true;
        }
    }

    /// Takes out the one whose turn it is.
    fn take_next(&mut self) -> Option<(ClientId, List)> {
        let behind = self.open.range((Excluded(self.last), Unbounded));
        let mut in_turn = behind.chain(self.open.range(..=self.last));
        let (&client, _) = in_turn.find(|(_, list)| list.ready)?;
        self.last = client;
        self.open.remove_entry(&client)
    }
}

impl<E: Engine> Core<E> {
    /// A client wants a list.
    pub(super) fn start_list(
        &mut self,
        now: Now,
        client: ClientId,
        from: Option<SnapTag>,
        to: SnapTag,
        out: &mut Output,
    ) {
        let head = if self.fault.is_some() {
            self.fault_reply()
        } else {
            match self.begin_list(now, client, from, to) {
                Ok(head) => head,
                Err(refused) => refusal::reply(&refused),
            }
        };
        out.client(client, head);
    }

    fn begin_list(
        &mut self,
        now: Now,
        client: ClientId,
        from: Option<SnapTag>,
        to: SnapTag,
    ) -> Result<Reply, OpError> {
        let changes = self.engine.changes(from, to)?;
        let length = |tag| {
            let info = self.engine.snapshot(tag);
            info.map_or(Err(OpError::NoSuchSnapshot(tag)), |info| Ok(info.length))
        };
        let chunk = self.engine.status().chunk;
        let head = Reply::Changelist {
            chunk,
            from: from.map_or(Ok(Sectors(0)), length)?,
            to: length(to)?,
        };
        let tags: Vec<SnapTag> = from.into_iter().chain([to]).collect();
        tags.iter().for_each(|&tag| self.now_shown(tag));
        let list = List {
            changes,
            chunk,
            tags,
            runs: Vec::new(),
            ready: false,
            waiter: Waiter::new(now, client),
        };
        self.lists.open.insert(client, list);
        Ok(head)
    }

    /// Does a step of one list, if any can go on.
    pub(super) fn list_step(&mut self, now: Now, out: &mut Output) {
        let Some((client, mut list)) = self.lists.take_next() else {
            return;
        };
        let reply = if self.fault.is_some() {
            self.fault_reply()
        } else {
            let step = self
                .engine
                .changes_step(&mut list.changes, &mut list.runs, MAX_RUNS);
            match step {
                Ok(Ok(true)) if list.runs.len() < MAX_RUNS => {
                    let (done, total) = list.changes.progress();
                    let bytes = |chunks: u64| chunks.saturating_mul(list.chunk.bytes());
                    list.waiter.tell(now, (bytes(done), bytes(total)), out);
                    self.lists.open.insert(client, list);
                    return;
                }
                Ok(Ok(more)) => {
                    let runs = std::mem::take(&mut list.runs);
                    let page = Reply::Changes { last: !more, runs };
                    if more {
                        list.ready = false;
                        self.lists.open.insert(client, list);
                        return out.client(client, page);
                    }
                    page
                }
                Ok(Err(refused)) => refusal::reply(&refused),
                Err(broken) => self.failed(&broken),
            }
        };
        self.release(&list.tags);
        out.client(client, reply);
    }

    /// The client has taken all it was sent of an answer that has more.
    pub fn client_took(&mut self, client: ClientId) {
        self.lists.taken(client);
        self.jobs_client_took(client);
    }

    /// The client has gone: it needs no list.
    pub(super) fn end_list(&mut self, client: ClientId) {
        if let Some(list) = self.lists.open.remove(&client) {
            self.release(&list.tags);
        }
    }

    fn release(&mut self, tags: &[SnapTag]) {
        tags.iter().for_each(|&tag| self.no_longer_shown(Some(tag)));
    }
}

#[cfg(test)]
mod tests;
