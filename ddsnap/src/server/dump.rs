// SPDX-License-Identifier: GPL-2.0-only
//! The index written to the server's log, in small steps between requests, as fast as the log takes it.

use std::ops::RangeInclusive;
use std::time::Duration;

use nix::errno::Errno;
use tracing::info;

use super::core::{ClientId, Core, Now, Output};
use super::engine::Engine;
use super::jobs::Waiter;
use super::refusal;
use crate::daemon::log;
use crate::protocol::control::Reply;
use crate::store::dump::DumpPlace;

/// Entries looked at and lines written in a step: about a millisecond.
const STEP_ENTRIES: usize = 128;
/// When to look again whether the log has room.
const ROOM_AGAIN: Duration = Duration::from_millis(20);

/// The dump under way.
#[derive(Debug)]
pub(super) struct Dump {
    chunks: RangeInclusive<u64>,
    /// None: all is in the log's hands, and who asked hears so when it is in the file.
    place: Option<DumpPlace>,
    /// Written so far.
    entries: u64,
    waiter: Waiter,
    /// The log was full: no step before.
    rests_until: Option<Duration>,
    /// What the log had lost when it began.
    lost_before: u64,
}

impl Dump {
    /// Whether a step can be done now.
    pub fn wants_step(&self) -> bool {
        self.rests_until.is_none()
    }

    /// When [`tick`](Self::tick) is due.
    pub fn deadline(&self) -> Option<Duration> {
        self.rests_until
    }

    /// The answer when all is done.
    fn outcome(&self) -> Reply {
        match log::lines_lost() - self.lost_before {
            0 => Reply::Dumped {
                entries: self.entries,
            },
            lost => {
                let reason = format!("{lost} lines of the log could not be written");
                refusal::with_errno(Errno::EIO, reason)
            }
        }
    }

    /// The log may have room again.
    pub fn tick(&mut self, now: Now) {
        self.rests_until.take_if(|until| *until <= now.monotonic);
    }
}

impl<E: Engine> Core<E> {
    pub(super) fn start_dump(
        &mut self,
        now: Now,
        client: ClientId,
        chunks: RangeInclusive<u64>,
        out: &mut Output,
    ) {
        if self.fault.is_some() {
            return out.client(client, self.fault_reply());
        }
        if self.dump.is_some() {
            let reason = "another dump is under way".to_owned();
            return out.client(client, refusal::with_errno(Errno::EBUSY, reason));
        }
        info!(
            "dump of origin chunks {} to {}",
            chunks.start(),
            chunks.end()
        );
        self.dump = Some(Dump {
            chunks,
            place: Some(DumpPlace::START),
            entries: 0,
            waiter: Waiter::new(now, client),
            rests_until: None,
            lost_before: log::lines_lost(),
        });
    }

    /// Does a step of the dump, if there is one.
    pub(super) fn dump_step(&mut self, now: Now, out: &mut Output) {
        let Some(mut dump) = self.dump.take_if(|dump| dump.wants_step()) else {
            return;
        };
        let client = dump.waiter.client;
        let ready = match dump.place {
            Some(_) => log::has_room(),
            None => log::is_written(),
        };
        if !ready {
            dump.waiter.tell(now, (dump.entries, dump.entries), out);
            dump.rests_until = Some(now.monotonic + ROOM_AGAIN);
            self.dump = Some(dump);
            return;
        }
        let Some(place) = dump.place else {
            return out.client(client, dump.outcome());
        };
        let step = self
            .engine
            .dump_step(place, dump.chunks.clone(), STEP_ENTRIES);
        let (entries, next) = match step {
            Ok(step) => step,
            Err(broken) => {
                let reply = self.failed(&broken);
                return out.client(client, reply);
            }
        };
        entries.iter().for_each(|entry| info!("{entry}"));
        dump.entries += entries.len() as u64;
        dump.place = next;
        if next.is_none() {
            info!("end of the dump: {} entries", dump.entries);
        }
        dump.waiter.tell(now, (dump.entries, dump.entries), out);
        self.dump = Some(dump);
    }

    /// The client has gone: nobody waits for the rest.
    pub(super) fn end_dump(&mut self, client: ClientId) {
        self.dump.take_if(|dump| dump.waiter.client == client);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::server::fake::Fake;
    use crate::store::dump::DumpEntry;
    use crate::units::{Chunk, SnapSeq, StoreChunk};
    use std::time::Duration;

    fn at(seconds: u64) -> Now {
        Now {
            monotonic: Duration::from_secs(seconds),
            unix: 0,
        }
    }

    fn taken(out: &mut Output) -> Vec<(ClientId, Vec<Reply>)> {
        std::mem::take(&mut out.clients)
    }

    fn core_with(steps: usize) -> (Fake, Core<Fake>) {
        let fake = Fake::default();
        let entry = DumpEntry::Exception {
            chunk: Chunk(1),
            seq: SnapSeq(1),
            place: StoreChunk(9),
            crc: 0,
        };
        fake.0.borrow_mut().dump = vec![vec![entry; 2]; steps].into();
        let core = Core::new(fake.clone());
        (fake, core)
    }

    #[test]
    fn a_dump_goes_on_in_steps_and_one_at_a_time() {
        let (_, mut core) = core_with(3);
        let (one, two) = (ClientId(1), ClientId(2));
        let mut out = Output::default();
        core.start_dump(at(0), one, 0..=9, &mut out);
        core.start_dump(at(0), two, 0..=9, &mut out);
        let refused = taken(&mut out);
        assert!(
            matches!(&refused[..], [(client, replies)] if *client == two
                && matches!(&replies[..], [Reply::Error { errno, .. }] if *errno == Errno::EBUSY as i32)),
            "{refused:?}"
        );
        assert!(core.wants_background());
        core.background(at(0), &mut out);
        assert_eq!(taken(&mut out), []);
        core.background(at(2), &mut out);
        let progress = Reply::Progress { done: 4, total: 4 };
        assert_eq!(taken(&mut out), [(one, vec![progress])]);
        core.background(at(2), &mut out);
        assert_eq!(taken(&mut out), [], "not before it is in the file");
        core.background(at(2), &mut out);
        assert_eq!(taken(&mut out), [(one, vec![Reply::Dumped { entries: 6 }])]);
        core.start_dump(at(0), two, 0..=9, &mut out);
        assert_eq!(taken(&mut out), [], "the next one begins");
    }

    #[test]
    fn a_dump_ends_with_its_client_or_the_store() {
        let (fake, mut core) = core_with(3);
        let mut out = Output::default();
        core.start_dump(at(0), ClientId(1), 0..=9, &mut out);
        core.client_gone(ClientId(2));
        core.client_gone(ClientId(1));
        core.start_dump(at(0), ClientId(3), 0..=9, &mut out);
        fake.fail(true);
        core.background(at(0), &mut out);
        let told = taken(&mut out);
        assert!(
            matches!(&told[..], [(ClientId(3), replies)] if matches!(&replies[..], [Reply::Error { .. }])),
            "{told:?}"
        );
        core.start_dump(at(0), ClientId(4), 0..=9, &mut out);
        let told = taken(&mut out);
        assert!(matches!(&told[0].1[..], [Reply::Error { .. }]), "{told:?}");
    }
}
