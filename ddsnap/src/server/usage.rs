// SPDX-License-Identifier: GPL-2.0-only
//! What `status` shows: the count behind it goes on in small steps between other requests, and the
//! answer follows when it has ended.

use std::collections::HashMap;

use nix::errno::Errno;
use tracing::{info, warn};

use super::core::{ClientId, Core, Now, Output};
use super::engine::Engine;
use super::jobs::Waiter;
use super::refusal;
use crate::protocol::control::{self, Reply, Row, Status};
use crate::protocol::space::{Level, MARGIN_PERCENT};
use crate::store::{Counting, Counts, MANY, Sharing};

const _: () = assert!(MANY == control::MANY as usize);

/// The count that goes on and who waits for which.
#[derive(Debug, Default)]
pub(super) struct Count {
    running: Option<Running>,
    /// Those who asked while one went on. They get the next: what they did before they asked must be
    /// in what they see.
    next: Vec<Waiter>,
    /// The count has had its turn, other background work is to have the next.
    had_turn: bool,
}

#[derive(Debug)]
struct Running {
    counting: Counting,
    waiters: Vec<Waiter>,
}

impl Count {
    /// Whether anybody waits for a count.
    pub fn is_wanted(&self) -> bool {
        self.running.is_some() || !self.next.is_empty()
    }

    /// Whether it is to go on now, if `other` work waits too.
    pub fn takes_turn(&mut self, other: bool) -> bool {
        self.had_turn = self.is_wanted() && !(other && self.had_turn);
        self.had_turn
    }

    /// A client has gone.
    pub fn client_gone(&mut self, client: ClientId) {
        self.next.retain(|waiter| waiter.client != client);
        if let Some(running) = &mut self.running {
            running.waiters.retain(|waiter| waiter.client != client);
        }
        self.running.take_if(|running| running.waiters.is_empty());
    }
}

impl<E: Engine> Core<E> {
    /// A client wants the table.
    pub(super) fn usage(&mut self, now: Now, client: ClientId, out: &mut Output) {
        if self.fault.is_some() {
            // A latched store is asked nothing more.
            let replies = self.table(&Counts::default());
            out.clients.push((client, replies));
        } else {
            self.count.next.push(Waiter::new(now, client));
        }
    }

    /// Counts a little, and answers those who wait when it has ended.
    pub(super) fn count_step(&mut self, now: Now, out: &mut Output) {
        let mut running = match self.count.running.take() {
            Some(running) => running,
            None => Running {
                counting: Counting::default(),
                waiters: std::mem::take(&mut self.count.next),
            },
        };
        let replies = if self.fault.is_some() {
            self.table(&Counts::default())
        } else {
            match self.engine.count_step(&mut running.counting) {
                Ok(true) => {
                    let done = running.counting.seen();
                    let all = self.engine.entries_to_count().max(done);
                    for waiter in &mut running.waiters {
                        waiter.tell(now, (done, all), out);
                    }
                    for waiter in &mut self.count.next {
                        waiter.tell(now, (0, all), out);
                    }
                    self.count.running = Some(running);
                    return;
                }
                Ok(false) => {
                    let counts = self.engine.counted(&running.counting);
                    self.table(&counts)
                }
                Err(broken) => {
                    self.broken(&broken);
                    if self.fault.is_some() {
                        self.table(&Counts::default())
                    } else {
                        let reason = format!("what snapshots use cannot be counted: {broken}");
                        vec![refusal::with_errno(Errno::EIO, reason)]
                    }
                }
            }
        };
        for waiter in running.waiters {
            out.clients.push((waiter.client, replies.clone()));
        }
    }

    fn table(&self, counts: &Counts) -> Vec<Reply> {
        let status = self.status();
        let sharing: HashMap<_, _> = counts
            .snapshots
            .iter()
            .map(|(tag, sharing)| (*tag, sharing))
            .collect();
        let rows = self
            .engine
            .snapshots()
            .iter()
            .map(|info| Row {
                snapshot: self.describe(info),
                shared_with: sharing
                    .get(&info.tag)
                    .map_or(Vec::new(), |sharing| sparse(sharing)),
            })
            .collect();
        let mut replies = vec![Reply::Usage {
            status,
            totals: sparse(&counts.totals),
        }];
        replies.extend(Reply::row_pages(rows));
        replies
    }

    /// The store's state, as far as it need not be counted.
    pub(super) fn status(&self) -> Status {
        let status = self.engine.status();
        Status {
            chunk: status.chunk,
            data_chunks: status.data_chunks,
            free_chunks: status.free_chunks,
            meta_blocks: status.meta_blocks,
            free_meta_blocks: status.free_meta_blocks,
            reserved_meta_blocks: status.reserved_meta_blocks,
            separate_meta: status.separate_meta,
            origin_sectors: status.origin.0,
            created: status.created,
            deleting: status.deleting,
            channel: self.channel,
            refusing: self.refusing,
            reverting: self.jobs.revert.writing(),
            fault: self.fault.clone().unwrap_or_default(),
        }
    }

    /// Logs when the store crosses a level of fullness, and when it has left it.
    pub(super) fn watch_space(&mut self) {
        let status = self.status();
        let (level, left) = (Level::of(&status), Level::at(&status, MARGIN_PERCENT));
        let before = self.level;
        if level > before {
            self.level = level;
            if let Some(warning) = level.warning(&status) {
                warn!("{warning}");
            }
        } else if left < before {
            self.level = left;
            info!(
                "{} of {} data chunks and {} of {} metadata blocks are free again",
                status.free_chunks,
                status.data_chunks,
                status.copy_meta_blocks(),
                status.meta_blocks
            );
        }
    }
}

fn sparse(sharing: &Sharing) -> Vec<(u32, u64)> {
    (0..)
        .zip(sharing.shared_by.iter().copied())
        .filter(|&(_, chunks)| chunks > 0)
        .collect()
}

#[cfg(test)]
mod tests;
