// SPDX-License-Identifier: GPL-2.0-only
//! The server's state and decisions, without I/O: it takes what came from the kernel and from
//! clients, uses the engine, and gives back what is to be sent. The ring only moves bytes.
//!
//! # The order of replies
//!
//! The kernel target keeps origin writes off chunks that a snapshot is reading, but only from the
//! moment it has taken the reply `FROM_ORIGIN`. So this must hold for the stream of replies:
//!
//! > A `SNAPSHOT_READ` answered `FROM_ORIGIN` comes before the `ORIGIN_WRITE` reply of a commit that
//! > was made after its lookup; and a lookup made after that commit sees the exception.
//!
//! [`Core::requests`] keeps it by looking up all reads of a batch first and putting their replies
//! first; nothing is ever looked up and kept for later. Were a read looked up before a commit and
//! answered after it, the write could overwrite the origin before the read reaches it, and the
//! snapshot would show new data.
//!
//! # The barrier
//!
//! A snapshot is made while no origin write is in flight: `BARRIER_BEGIN`, wait for
//! `BARRIER_REACHED`, create, `BARRIER_END`. In between no `ORIGIN_WRITE` is answered; those that
//! arrive are held and answered after the snapshot exists, by copying for it. The target answers a
//! barrier at once when it has no device, so one is used whenever the channel is attached: there is
//! no moment in which a device could be overlooked. Without the kernel's target there are no devices;
//! `presence` says what counts as that. While the channel is lost devices may write to chunks they know
//! to be unique, so nothing is created.
//!
//! # Squashed snapshots
//!
//! To make room the engine squashes a snapshot that a device shows, but keeps its chunks: I/O of the
//! device may be on its way to them. The device is told to stop, and when it says that nothing is in
//! flight, the engine may free them (`devices`). Writes that found the store full wait for that
//! instead of failing (`writes`). Before all devices are known, no squashed snapshot is quiet.

mod devices;
mod writes;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::time::Duration;

use nix::errno::Errno;
use tracing::{error, info, warn};

use self::devices::Device;
use self::writes::{Wanted, Write};
use super::changelist::Lists;
use super::dump::Dump;
use super::engine::{Engine, EngineError};
use super::jobs::Jobs;
use super::refusal;
use super::usage::Count;
use crate::protocol::channel::{self, Answer, Ask, Place};
use crate::protocol::control::{ChannelState, Reply, Request};
use crate::protocol::space::Level;
use crate::store::{Location, OpError, OriginUse};
use crate::units::{Chunk, SnapTag};

/// How long a command waits for the writes in flight, or for the channel to come back.
pub const COMMAND_DEADLINE: Duration = Duration::from_secs(30);
/// How long a write that finds the store full waits for the chunks of squashed snapshots.
pub const ROOM_DEADLINE: Duration = Duration::from_secs(30);

/// How long the engine's background work pauses after it failed: longer each time, but the least while a
/// request waits for it. What failed, a leaf that cannot be read, need not be what the request waits for.
const LEAST_RETRY: Duration = Duration::from_secs(1);
const MOST_RETRY: Duration = Duration::from_secs(60);

/// A client's number, never used twice by one server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ClientId(pub u64);

/// What time it is, as the caller sees it.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Since some fixed moment; for deadlines.
    pub monotonic: Duration,
    /// Seconds since 1970-01-01 UTC; for people.
    pub unix: i64,
}

/// What is to be sent, in this order.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Output {
    /// To the kernel.
    pub channel: Vec<channel::Reply>,
    /// To clients; each entry is one whole answer.
    pub clients: Vec<(ClientId, Vec<Reply>)>,
}

impl Output {
    fn channel(&mut self, id: u64, answer: Answer) {
        self.channel.push(channel::Reply { id, answer });
    }

    pub(super) fn client(&mut self, client: ClientId, reply: Reply) {
        self.clients.push((client, vec![reply]));
    }
}

/// A barrier that has begun.
#[derive(Clone, Copy, Debug)]
struct Barrier {
    id: u64,
    purpose: Purpose,
    deadline: Duration,
}

/// What is done when no origin write is in flight.
#[derive(Clone, Copy, Debug)]
enum Purpose {
    /// A snapshot or a bookmark is made, as was asked for.
    Create { request: Request, client: ClientId },
    /// A step of a revert.
    Revert,
}

/// A command that cannot be carried out now.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    request: Request,
    client: ClientId,
    deadline: Duration,
}

/// The engine's background work.
#[derive(Clone, Copy, Debug, Default)]
struct Upkeep {
    /// When a step last came to its end.
    stepped_at: Duration,
    /// Steps that have failed one after another.
    failed: u32,
    /// When the last of them did; none while the next may be tried.
    failed_at: Option<Duration>,
}

impl Upkeep {
    fn failed(&mut self, now: Now) {
        self.failed += 1;
        self.failed_at = Some(now.monotonic);
    }

    /// Not before then is the next tried, if the last one failed. `awaited`: a request waits for it.
    fn retry_at(&self, awaited: bool) -> Option<Duration> {
        let wait = match awaited {
            true => LEAST_RETRY,
            false => LEAST_RETRY * (1 << self.failed.saturating_sub(1).min(6)),
        };
        self.failed_at.map(|at| at + wait.min(MOST_RETRY))
    }
}

/// All state of a server.
pub struct Core<E> {
    pub(super) engine: E,
    pub(super) channel: ChannelState,
    /// The devices that existed when the channel was attached have not all been identified yet.
    greeting: bool,
    devices: BTreeMap<u32, Device>,
    /// How many devices show each snapshot, and lists of changes that are being made need it; no zeros.
    shown: HashMap<SnapTag, u32>,
    barrier: Option<Barrier>,
    next_barrier: u64,
    /// Origin writes asked for during a barrier. The kernel holds new ones back, so these are few.
    held_writes: Vec<Write>,
    /// Writes that found the store full while a squashed snapshot's chunks were about to come free.
    no_room: Vec<Write>,
    /// Those are worth another try.
    room_changed: bool,
    waiting: VecDeque<Waiting>,
    /// Why the engine does no more I/O.
    pub(super) fault: Option<String>,
    /// A write was refused for want of room, and none has found room since.
    pub(super) refusing: bool,
    /// How full the log says the store is.
    pub(super) level: Level,
    pub(super) count: Count,
    background: bool,
    upkeep: Upkeep,
    /// Some of the writes in `no_room` wait for background steps.
    writes_wait: bool,
    /// A snapshot is to be created when background steps have made room for it.
    create_waits: bool,
    pub(super) jobs: Jobs,
    pub(super) dump: Option<Dump>,
    pub(super) lists: Lists,
}

impl<E: Engine> Core<E> {
    /// A server over an open store, its channel absent.
    #[must_use]
    pub fn new(engine: E) -> Self {
        let jobs = Jobs::new(engine.reverting());
        Core {
            engine,
            channel: ChannelState::Absent,
            greeting: false,
            devices: BTreeMap::new(),
            shown: HashMap::new(),
            barrier: None,
            next_barrier: 1,
            held_writes: Vec::new(),
            no_room: Vec::new(),
            room_changed: false,
            waiting: VecDeque::new(),
            fault: None,
            refusing: false,
            level: Level::Plenty,
            count: Count::default(),
            background: true,
            upkeep: Upkeep::default(),
            writes_wait: false,
            create_waits: false,
            jobs,
            dump: None,
            lists: Lists::default(),
        }
    }

    /// The channel is attached. `greeting`: requests are waiting, so devices may exist; call
    /// [`greeted`](Self::greeted) when all have been identified.
    pub fn attached(&mut self, now: Now, greeting: bool, out: &mut Output) {
        self.channel = ChannelState::Attached;
        self.devices
            .values_mut()
            .for_each(|device| device.seen = false);
        self.greeting = true;
        if !greeting {
            self.greeted(now, out);
        } else {
            self.start_waiting(now, out);
        }
    }

    /// Whether devices may exist that have not been identified yet.
    #[must_use]
    pub fn is_greeting(&self) -> bool {
        self.greeting
    }

    /// Every device that existed when the channel was attached has been identified.
    pub fn greeted(&mut self, now: Now, out: &mut Output) {
        self.greeting = false;
        let gone: Vec<u32> = self
            .devices
            .iter()
            .filter(|(_, device)| !device.seen)
            .map(|(&id, _)| id)
            .collect();
        gone.into_iter()
            .for_each(|device| self.forget_device(device));
        self.look_for_quiet();
        self.start_waiting(now, out);
    }

    /// The channel broke: what was not answered will be asked again after it is attached again.
    pub fn lost(&mut self) {
        self.channel = ChannelState::Lost;
        self.greeting = false;
        self.held_writes.clear();
        self.no_room.clear();
        self.revert_lost();
        let barrier = self.barrier.take();
        if let Some((Purpose::Create { request, client }, deadline)) =
            barrier.map(|barrier| (barrier.purpose, barrier.deadline))
        {
            // Nothing was created. The command keeps its place and its deadline.
            self.waiting.push_front(Waiting {
                request,
                client,
                deadline,
            });
        }
    }

    /// There may be a kernel module, which cannot be reached.
    pub fn lost_sight(&mut self) {
        if self.channel == ChannelState::Absent {
            self.lost();
        }
    }

    /// There is no kernel module, so there are no devices.
    pub fn absent(&mut self, now: Now, out: &mut Output) {
        self.lost();
        self.channel = ChannelState::Absent;
        let devices: Vec<u32> = self.devices.keys().copied().collect();
        devices
            .into_iter()
            .for_each(|device| self.forget_device(device));
        self.look_for_quiet();
        self.start_waiting(now, out);
    }

    /// One batch of requests from the kernel, to be one commit group.
    pub fn requests(&mut self, now: Now, batch: &[channel::Request], out: &mut Output) {
        // First the reads, looked up and answered before anything is committed: see the module.
        for request in batch {
            if let Ask::SnapshotRead(tag, chunk) = request.ask {
                let place = self.locate(tag, chunk);
                out.channel(request.id, Answer::SnapshotRead(place));
            }
        }
        let mut group = Vec::new();
        let deadline = now.monotonic + ROOM_DEADLINE;
        for request in batch {
            let id = request.id;
            let write = |wanted| Write {
                id,
                wanted,
                deadline,
            };
            match request.ask {
                Ask::SnapshotRead(..) => {}
                Ask::Identify { .. } if self.hold_identify(*request) => {}
                Ask::Identify {
                    device,
                    snapshot,
                    sectors,
                    returning,
                } => {
                    let answer = self.identify(device, snapshot, sectors, returning);
                    out.channel(id, answer);
                    self.stop_device(device, out);
                }
                Ask::Gone { device } => {
                    self.forget_device(device);
                    out.channel(id, Answer::Gone);
                }
                Ask::OriginWrite(run) => self.held_writes.push(write(Wanted::Origin(run))),
                Ask::SnapshotWrite(tag, chunk) => {
                    group.push(write(Wanted::Snapshot(tag, chunk)));
                }
                Ask::BarrierReached => self.barrier_reached(now, id, out),
                Ask::DeviceStopped { device } => self.device_stopped(device),
            }
        }
        self.commit_with_held(now, group, out);
        // A create may have waited for the barrier that ended in this batch.
        self.start_waiting(now, out);
        // One who knows does not ask.
        let ignorant = |request: &channel::Request| {
            matches!(
                request.ask,
                Ask::OriginWrite(_) | Ask::Identify { snapshot: None, .. }
            )
        };
        if batch.iter().any(ignorant) {
            self.tell_all_unique(out);
        }
    }

    /// Without a snapshot nothing of the origin needs to be asked about: a new volume's first writes would
    /// cost a question for each chunk, and its discards would not reach the disk. The kernel heeds this
    /// only while no barrier is under way, and forgets it when a snapshot is made.
    fn tell_all_unique(&self, out: &mut Output) {
        let attached = self.channel == ChannelState::Attached;
        if attached
            && self.fault.is_none()
            && self.barrier.is_none()
            && self.engine.origin_is_unique()
        {
            out.channel(0, Answer::AllUnique);
        }
    }

    fn locate(&mut self, tag: SnapTag, chunk: Chunk) -> Place {
        if self.fault.is_some() {
            return Place::Fails(Errno::EIO as i32);
        }
        match self.engine.locate(tag, chunk) {
            Ok(Ok(Location::Origin)) => Place::Origin,
            Ok(Ok(Location::Store(chunk))) => Place::Store(chunk.0),
            Ok(Err(refused)) => Place::Fails(refusal::io_errno(&refused)),
            Err(broken) => {
                self.broken(&broken);
                Place::Fails(Errno::EIO as i32)
            }
        }
    }

    /// A device of `snapshot` must have this many sectors.
    pub(super) fn sectors(&self, snapshot: Option<SnapTag>) -> Result<u64, OpError> {
        let length = match snapshot {
            None => self.engine.status().origin,
            Some(tag) => {
                let info = self.engine.snapshot(tag);
                info.ok_or(OpError::NoSuchSnapshot(tag))?.length
            }
        };
        Ok(length.0)
    }

    /// A command that concerns which origin writes are in flight or which devices exist. It is
    /// carried out now or as soon as that is known.
    pub(super) fn when_settled(
        &mut self,
        now: Now,
        client: ClientId,
        request: Request,
        out: &mut Output,
    ) {
        let deadline = now.monotonic + COMMAND_DEADLINE;
        self.waiting.push_back(Waiting {
            request,
            client,
            deadline,
        });
        self.start_waiting(now, out);
    }

    /// Carries out what was waiting and need not wait any longer, in order.
    fn start_waiting(&mut self, now: Now, out: &mut Output) {
        for waiting in std::mem::take(&mut self.waiting) {
            match waiting.request {
                _ if self.fault.is_some() => out.client(waiting.client, self.fault_reply()),
                Request::Create(tag) | Request::CreateBookmark(tag)
                    if self.engine.snapshot(tag).is_some() =>
                {
                    out.client(
                        waiting.client,
                        refusal::reply(&OpError::SnapshotExists(tag)),
                    );
                }
                Request::Create(_) | Request::CreateBookmark(_)
                    if self.jobs.revert.writing().is_some() =>
                {
                    let tag = self.jobs.revert.writing().unwrap_or_default();
                    out.client(waiting.client, refusal::reply(&OpError::Reverting(tag)));
                }
                Request::Create(_) | Request::CreateBookmark(_) if self.create_waits => {
                    self.waiting.push_back(waiting);
                }
                Request::Create(_) | Request::CreateBookmark(_)
                    if self.channel == ChannelState::Absent =>
                {
                    match self.create(now, waiting.request) {
                        Some(reply) => out.client(waiting.client, reply),
                        None => self.waiting.push_back(waiting),
                    }
                }
                Request::Create(_) | Request::CreateBookmark(_)
                    if self.channel == ChannelState::Attached && self.barrier.is_none() =>
                {
                    let Waiting {
                        request,
                        client,
                        deadline,
                    } = waiting;
                    self.begin_barrier(Purpose::Create { request, client }, deadline, out);
                }
                Request::Delete(tag) | Request::ToBookmark(tag) if self.devices_of(tag) > 0 => {
                    out.client(waiting.client, refusal::reply(&OpError::InUse(tag)));
                }
                Request::Delete(tag) if self.channel != ChannelState::Lost && !self.greeting => {
                    let reply = self.delete(tag);
                    out.client(waiting.client, reply);
                    self.tell_all_unique(out);
                }
                Request::ToBookmark(tag)
                    if self.channel != ChannelState::Lost && !self.greeting =>
                {
                    let reply = self.turn_to_bookmark(tag);
                    out.client(waiting.client, reply);
                }
                Request::Revert(tag) if self.channel != ChannelState::Lost && !self.greeting => {
                    self.start_revert(now, waiting.client, tag, out);
                }
                _ => self.waiting.push_back(waiting),
            }
        }
        if self.room_changed {
            self.commit_with_held(now, Vec::new(), out);
        }
    }

    fn begin_barrier(&mut self, purpose: Purpose, deadline: Duration, out: &mut Output) {
        let id = self.next_barrier;
        self.next_barrier += 1;
        self.barrier = Some(Barrier {
            id,
            purpose,
            deadline,
        });
        out.channel(id, Answer::BarrierBegin);
    }

    /// Begins the barrier for a step of a revert.
    pub(super) fn begin_step_barrier(&mut self, now: Now, out: &mut Output) {
        self.begin_barrier(Purpose::Revert, now.monotonic + COMMAND_DEADLINE, out);
    }

    /// Whether origin writes are being held back.
    pub(super) fn in_barrier(&self) -> bool {
        self.barrier.is_some()
    }

    fn barrier_reached(&mut self, now: Now, id: u64, out: &mut Output) {
        let Some(barrier) = self.barrier.filter(|barrier| barrier.id == id) else {
            return; // One that came too late: its end has been sent.
        };
        match barrier.purpose {
            Purpose::Create { request, client } => {
                let reply = self.create(now, request);
                // If the store latched, the snapshot may exist: then forgetting which chunks are unique is
                // the safe way. Origin writes that ask fail from now on.
                let made = [Some(Reply::Created), Some(Reply::BookmarkCreated)].contains(&reply);
                let created = made || self.fault.is_some();
                self.barrier = None;
                out.channel(id, Answer::BarrierEnd { created });
                match reply {
                    Some(reply) => out.client(client, reply),
                    None => self.waiting.push_back(Waiting {
                        request,
                        client,
                        deadline: barrier.deadline,
                    }),
                }
            }
            Purpose::Revert => {
                self.revert_write_step(now, out);
                self.barrier = None;
                // What is unique is forgotten: every write asks, and those that the revert would undo are
                // refused.
                out.channel(id, Answer::BarrierEnd { created: true });
                self.stop_squashed(out);
                self.release_devices(now, out);
            }
        }
    }

    /// Makes a snapshot or a bookmark; no reply if background steps must make room for it first.
    fn create(&mut self, now: Now, request: Request) -> Option<Reply> {
        let (what, tag, answer, created) = match request {
            Request::CreateBookmark(tag) => {
                let answer = self.engine.create_bookmark(tag, now.unix);
                ("bookmark", tag, answer, Reply::BookmarkCreated)
            }
            Request::Create(tag) => {
                let answer = self.engine.create(tag, now.unix);
                ("snapshot", tag, answer, Reply::Created)
            }
            _ => return None, // no other request comes here
        };
        Some(match answer {
            Ok(Ok(())) => {
                info!("{what} {tag} created");
                self.background = true;
                created
            }
            Ok(Err(OpError::Wait)) => {
                self.background = true;
                self.create_waits = true;
                return None;
            }
            Ok(Err(refused)) => refusal::reply(&refused),
            Err(broken) => self.failed(&broken),
        })
    }

    fn turn_to_bookmark(&mut self, tag: SnapTag) -> Reply {
        match self.engine.turn_to_bookmark(tag) {
            Ok(Ok(())) => {
                info!("snapshot {tag} is a bookmark");
                self.background = true;
                self.refusing = false;
                self.room_changed = true;
                Reply::IsBookmark
            }
            Ok(Err(refused)) => refusal::reply(&refused),
            Err(broken) => self.failed(&broken),
        }
    }

    fn delete(&mut self, tag: SnapTag) -> Reply {
        match self.engine.delete(tag) {
            Ok(Ok(())) => {
                info!("snapshot {tag} deleted");
                self.background = true;
                self.refusing = false;
                self.room_changed = true;
                Reply::Deleted
            }
            Ok(Err(refused)) => refusal::reply(&refused),
            Err(broken) => self.failed(&broken),
        }
    }

    /// A client has gone. What it asked for and was not begun is not done.
    pub fn client_gone(&mut self, client: ClientId) {
        self.jobs_client_gone(client);
        self.waiting.retain(|waiting| waiting.client != client);
        self.end_list(client);
        self.end_dump(client);
        self.count.client_gone(client);
    }

    /// When [`tick`](Self::tick) is due.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Duration> {
        let barrier = self.barrier.iter().map(|barrier| barrier.deadline);
        let no_room = self.no_room.iter().map(|write| write.deadline);
        barrier
            // In a barrier no origin write is answered: they have time until it ends.
            .chain(no_room.filter(|_| self.barrier.is_none()))
            .chain(self.waiting.iter().map(|waiting| waiting.deadline))
            .chain(self.jobs.deadlines())
            .chain(self.dump.iter().filter_map(Dump::deadline))
            .chain(self.upkeep.retry_at(self.is_awaited()))
            .min()
    }

    /// Gives up what has waited too long.
    pub fn tick(&mut self, now: Now, out: &mut Output) {
        self.jobs_tick(now, out);
        if let Some(dump) = &mut self.dump {
            dump.tick(now);
        }
        let retry_at = self.upkeep.retry_at(self.is_awaited());
        if retry_at.is_some_and(|at| at <= now.monotonic) {
            self.upkeep.failed_at = None;
            self.background = true;
        }
        let seconds = COMMAND_DEADLINE.as_secs();
        if let Some(barrier) = self
            .barrier
            .take_if(|barrier| barrier.deadline <= now.monotonic)
        {
            out.channel(barrier.id, Answer::BarrierEnd { created: false });
            let reason = format!("writes to the origin in flight did not end within {seconds} s");
            match barrier.purpose {
                Purpose::Create { request, client } => {
                    if let Request::Create(tag) | Request::CreateBookmark(tag) = request {
                        warn!("snapshot {tag}: {reason}");
                    }
                    out.client(client, refusal::with_errno(Errno::ETIMEDOUT, reason));
                }
                Purpose::Revert => warn!("the revert waits: {reason}"),
            }
            self.commit_with_held(now, Vec::new(), out);
        }
        self.room_changed |= self
            .no_room
            .iter()
            .any(|write| write.deadline <= now.monotonic);
        for waiting in std::mem::take(&mut self.waiting) {
            if waiting.deadline > now.monotonic {
                self.waiting.push_back(waiting);
                continue;
            }
            let reason = match self.channel {
                _ if self.create_waits => {
                    format!("the snapshot store was full for {seconds} s, room is being made")
                }
                ChannelState::Attached => "another snapshot is still being made".to_owned(),
                _ => format!("the kernel channel was lost and did not return within {seconds} s"),
            };
            out.client(
                waiting.client,
                refusal::with_errno(Errno::ETIMEDOUT, reason),
            );
        }
        self.start_waiting(now, out);
    }

    /// Whether there is work that can be done while nobody asks for anything.
    #[must_use]
    pub fn wants_background(&self) -> bool {
        // A job goes on even so: its client is to hear that it failed.
        self.count.is_wanted()
            || self.jobs_want_steps()
            || self.lists.want_steps()
            || self.dump.as_ref().is_some_and(Dump::wants_step)
            || self.wants_upkeep()
    }

    fn wants_upkeep(&self) -> bool {
        let waits = self.writes_wait || self.create_waits;
        (self.background || waits) && self.fault.is_none() && self.upkeep.failed_at.is_none()
    }

    /// Whether a request waits for background steps.
    fn is_awaited(&self) -> bool {
        let create = |waiting: &Waiting| {
            matches!(
                waiting.request,
                Request::Create(_) | Request::CreateBookmark(_)
            )
        };
        !self.no_room.is_empty() || (self.create_waits && self.waiting.iter().any(create))
    }

    /// Does a little of it.
    pub fn background(&mut self, now: Now, out: &mut Output) {
        self.list_step(now, out);
        self.dump_step(now, out);
        let others = self.jobs_want_steps() || self.wants_upkeep();
        if self.count.takes_turn(others) {
            self.count_step(now, out);
        } else {
            self.jobs_step(now, out);
            self.stop_squashed(out); // Its copies may have taken the last room.
            if self.wants_upkeep() {
                self.upkeep(now);
                self.ask_again(now, out);
            }
        }
    }

    fn upkeep(&mut self, now: Now) {
        match self.engine.background_step() {
            Ok(more) => {
                self.upkeep = Upkeep {
                    stepped_at: now.monotonic,
                    ..Upkeep::default()
                };
                self.background = more;
                self.watch_space();
            }
            Err(broken) => {
                self.broken(&broken);
                // It would fail again at once.
                self.upkeep.failed(now);
            }
        }
    }

    /// A call failed. If the engine has latched, I/O fails from now on, and commands that only look
    /// are answered.
    pub(super) fn broken(&mut self, broken: &EngineError) {
        if !broken.latched {
            error!("{broken}");
        } else if self.fault.is_none() {
            error!("the snapshot store failed; I/O that needs it fails until a restart: {broken}");
            self.fault = Some(broken.message.clone());
            self.room_changed = true; // There will be none: what waits for it is to fail now.
        }
    }

    /// The answer to a command that failed, or that a latched store cannot carry out.
    pub(super) fn failed(&mut self, broken: &EngineError) -> Reply {
        self.broken(broken);
        refusal::with_errno(Errno::EIO, format!("the snapshot store failed: {broken}"))
    }

    pub(super) fn fault_reply(&self) -> Reply {
        let fault = self.fault.as_deref().unwrap_or_default();
        refusal::with_errno(Errno::EIO, format!("the snapshot store failed: {fault}"))
    }

    /// Who may write to the origin after this server's end: nobody, if no device of it is known, and all
    /// devices are.
    #[must_use]
    pub fn origin_use(&self) -> OriginUse {
        let known = !self.greeting && self.channel != ChannelState::Lost;
        match known && !self.origin_is_shown() {
            true => OriginUse::Unused,
            false => OriginUse::InUse,
        }
    }

    /// Ends the server: gives the engine back, to be closed.
    #[must_use]
    pub fn into_engine(self) -> (E, Option<String>) {
        (self.engine, self.fault)
    }
}

#[cfg(test)]
mod tests;
