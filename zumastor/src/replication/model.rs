// SPDX-License-Identifier: GPL-2.0-only
//! A model checker over the very functions that the daemon runs: [`Sender::step`], [`Receiver::step`] and
//! what they decide by.
//!
//! Two machines, an origin of two chunks each. Every action of either side is a step of its own, and
//! between any two steps may come: a new snapshot, a lost link, a power cut of either machine that keeps or
//! loses what was not flushed, snapshots given up for room (a hold becomes a bookmark), a failover, a
//! failback. How many of each is bounded, all orders of them are explored.
//!
//! `REPLICATION_MODEL=large cargo nextest run -p zumastor model --no-capture` explores more; it takes
//! minutes.

use std::collections::VecDeque;

use ddsnap::units::Sectors;
use stateright::{Checker, Model, Property};
use uuid::Uuid;

use super::decide::{Plan, decide};
use super::message::{Begin, Hello, Message, Wishes};
use super::receiver::{self, Receiver};
use super::sender::{self, Outcome, Sender};
use super::standing::{Epoch, Held, Partial, Role, Standing};

const CHUNKS: usize = 2;
type Content = [u8; CHUNKS];

/// How much may happen.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    snapshots: u8,
    cuts: u8,
    crashes: u8,
    given_up: u8,
    failovers: u8,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Node {
    standing: Standing,
    /// Of snapshots and, for the list of changes alone, of bookmarks.
    content: Vec<(Uuid, Content)>,
    pinned: Option<Uuid>,
    origin: Content,
    /// What the disk has of what was written since the last flush, if the power goes.
    durable: Content,
}

/// What is on the link.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Packet {
    Said(Message),
    /// A batch and the extents it seals.
    Batch(u64, Vec<(usize, u8)>),
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Session {
    up: usize,
    sender: Sender,
    receiver: Receiver,
    sender_todo: VecDeque<sender::Action>,
    receiver_todo: VecDeque<receiver::Action>,
    to_receiver: VecDeque<Packet>,
    to_sender: VecDeque<Message>,
    /// What changed and is not sent.
    list: Vec<(usize, u8)>,
    /// What came with the batch.
    extents: Vec<(usize, u8)>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    nodes: [Node; 2],
    /// What each snapshot must hold.
    truth: Vec<(Uuid, Content)>,
    session: Option<Session>,
    taken: u8,
    cuts: u8,
    crashes: u8,
    given_up: u8,
    failovers: u8,
    /// A machine met what it had not reckoned with.
    broken: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Snapshot(usize),
    Connect(usize),
    Sender,
    Receiver,
    CutLink,
    Crash { node: usize, lose: bool },
    GiveUp { node: usize, at: usize },
    FailOver,
    FailBack,
}

fn look(content: &[(Uuid, Content)], id: Uuid) -> Option<Content> {
    content
        .iter()
        .find(|(of, _)| *of == id)
        .map(|(_, content)| *content)
}

impl Node {
    fn new(number: u128, role: Role) -> Node {
        let volume = Uuid::from_u128(1000 + number);
        Node {
            standing: Standing {
                lineage: (role == Role::Master).then_some(Uuid::from_u128(7)),
                epoch: Epoch {
                    number: (role == Role::Master).into(),
                    owner: volume,
                    since: 0,
                },
                length: Sectors(CHUNKS as u64),
                ..Standing::blank(volume, role)
            },
            content: Vec::new(),
            pinned: None,
            origin: [0; CHUNKS],
            durable: [0; CHUNKS],
        }
    }

    fn hello(&self) -> Hello {
        Hello {
            nonce: *self.standing.volume.as_bytes(),
            features: 0,
            standing: self.standing.clone(),
            wishes: Wishes::default(),
        }
    }

    fn take(&mut self, id: Uuid) {
        self.durable = self.origin;
        self.content.push((id, self.origin));
        self.standing.held.push(Held {
            id,
            number: 0,
            taken: 0,
            length: Sectors(CHUNKS as u64),
            data: true,
        });
    }

    fn forget(&mut self, id: Uuid) {
        self.standing.held.retain(|held| held.id != id);
        self.content.retain(|(of, _)| *of != id);
    }
}

impl World {
    fn new() -> World {
        World {
            nodes: [Node::new(0, Role::Master), Node::new(1, Role::Replica)],
            truth: Vec::new(),
            session: None,
            taken: 0,
            cuts: 0,
            crashes: 0,
            given_up: 0,
            failovers: 0,
            broken: None,
        }
    }

    /// The master of the newest reign.
    fn master(&self) -> usize {
        let [a, b] = &self.nodes;
        let b_reigns = b.standing.role == Role::Master && b.standing.epoch > a.standing.epoch;
        let a_reigns = a.standing.role == Role::Master;
        usize::from(b_reigns || !a_reigns)
    }

    fn snapshot(&mut self, node: usize) {
        self.taken += 1;
        let number = self.taken;
        let id = Uuid::from_u128(number.into());
        let node = &mut self.nodes[node];
        node.origin[usize::from(number) % CHUNKS] = number;
        node.take(id);
        node.standing.origin = Some(id);
        self.truth.push((id, node.origin));
    }

    fn connect(&mut self, up: usize) {
        let sender = Sender::new(self.nodes[up].hello());
        let receiver = Receiver::new(self.nodes[1 - up].hello());
        let (sender, sender_todo) = sender.step(sender::Event::Start);
        let (receiver, receiver_todo) = receiver.step(receiver::Event::Start);
        self.session = Some(Session {
            up,
            sender,
            receiver,
            sender_todo: sender_todo.into(),
            receiver_todo: receiver_todo.into(),
            to_receiver: VecDeque::new(),
            to_sender: VecDeque::new(),
            list: Vec::new(),
            extents: Vec::new(),
        });
    }

    /// Whether this side has something to do.
    fn sender_ready(session: &Session) -> bool {
        !session.sender_todo.is_empty() || !session.to_sender.is_empty()
    }

    fn receiver_ready(session: &Session) -> bool {
        !session.receiver_todo.is_empty() || !session.to_receiver.is_empty()
    }

    fn step_sender(&mut self) {
        let Some(mut session) = self.session.take() else {
            return;
        };
        let Some(action) = session.sender_todo.pop_front() else {
            if let Some(message) = session.to_sender.pop_front() {
                let event = sender::Event::Received(message);
                let (sender, todo) = session.sender.step(event);
                (session.sender, session.sender_todo) = (sender, todo.into());
            }
            self.session = Some(session);
            return;
        };
        let node = &mut self.nodes[session.up];
        match action {
            sender::Action::Send(message) => session.to_receiver.push_back(Packet::Said(message)),
            sender::Action::Open(begin) => match changes(node, &begin) {
                Some(list) => session.list = list,
                // The snapshot is gone: the cycle ends.
                None => return,
            },
            sender::Action::SendBatch => {
                let next = (!session.list.is_empty()).then(|| session.list.remove(0));
                let last = session.list.is_empty();
                let position = match session.list.first() {
                    Some((next, _)) => *next as u64,
                    None => CHUNKS as u64,
                };
                let batch = Packet::Batch(position, next.into_iter().collect());
                session.to_receiver.push_back(batch);
                let event = sender::Event::BatchSent { position, last };
                let (sender, todo) = session.sender.step(event);
                session.sender = sender;
                session.sender_todo.extend(todo);
            }
            sender::Action::SendEnd => {
                let end = Message::End { root: None };
                session.to_receiver.push_back(Packet::Said(end));
            }
            sender::Action::SaveProgress { .. } | sender::Action::CompareRoot(_) => {}
            sender::Action::Superseded(epoch) => self.told(session.up, epoch),
            sender::Action::Pin(snapshot) => {
                if node.standing.find(snapshot).is_none() {
                    return;
                }
                node.pinned = Some(snapshot);
            }
            sender::Action::MoveHold(snapshot) => {
                if node.standing.find(snapshot).is_none() {
                    return;
                }
                node.standing.hold = Some(snapshot);
                node.standing.old_hold = None;
                node.pinned = node.pinned.filter(|pinned| *pinned != snapshot);
            }
            sender::Action::Stop(outcome) => {
                self.judge(&outcome);
                // What was said last still arrives.
                session.sender_todo.clear();
                session.to_sender.clear();
                if !Self::receiver_ready(&session) {
                    return;
                }
            }
        }
        self.session = Some(session);
    }

    fn step_receiver(&mut self) {
        let Some(mut session) = self.session.take() else {
            return;
        };
        let Some(action) = session.receiver_todo.pop_front() else {
            let message = match session.to_receiver.pop_front() {
                Some(Packet::Said(message)) => message,
                Some(Packet::Batch(position, extents)) => {
                    session.extents = extents;
                    Message::Batch { position }
                }
                None => return,
            };
            let event = receiver::Event::Received(message);
            let (receiver, todo) = session.receiver.step(event);
            (session.receiver, session.receiver_todo) = (receiver, todo.into());
            self.session = Some(session);
            return;
        };
        let node = &mut self.nodes[1 - session.up];
        let standing = &mut node.standing;
        match action {
            receiver::Action::Send(message) => session.to_sender.push_back(message),
            receiver::Action::Adopt(epoch) => standing.epoch = epoch,
            receiver::Action::Superseded(epoch) => self.told(1 - session.up, epoch),
            receiver::Action::ReleaseOld => {
                if let Some(old) = standing.old_hold.take() {
                    node.forget(old);
                }
            }
            receiver::Action::SafetySnapshot => {
                self.broken = Some("a safety snapshot that nobody asked for".into());
            }
            receiver::Action::Unsettle => {
                standing.origin = None;
                standing.partial = None;
            }
            receiver::Action::Restore(base) => match look(&node.content, base) {
                Some(content) => (node.origin, node.durable) = (content, content),
                None => self.broken = Some("the base to go back to is not there".into()),
            },
            receiver::Action::StartPartial {
                partial,
                lineage,
                epoch,
            } => {
                standing.partial = Some(partial);
                standing.origin = None;
                standing.lineage = Some(lineage);
                standing.epoch = epoch;
            }
            receiver::Action::Open(_) => {}
            receiver::Action::Apply => {
                for (chunk, value) in std::mem::take(&mut session.extents) {
                    node.origin[chunk] = value;
                }
            }
            receiver::Action::Flush => node.durable = node.origin,
            receiver::Action::SavePartial { position } => {
                if let Some(partial) = &mut standing.partial {
                    partial.position = position;
                }
            }
            receiver::Action::CompareRoot(_) => {}
            receiver::Action::Finish { begin } => {
                let id = begin.snapshot.id;
                let known = standing.has_data(id);
                standing.old_hold = begin.base.filter(|base| *base != id);
                standing.hold = Some(id);
                standing.origin = Some(id);
                standing.partial = None;
                if !known {
                    node.take(id);
                }
            }
            receiver::Action::SendComplete => session.to_sender.push_back(Message::Complete {
                root: None,
                number: 0,
            }),
            receiver::Action::Stop(outcome) => {
                self.judge(&outcome);
                session.receiver_todo.clear();
                session.to_receiver.clear();
                if !Self::sender_ready(&session) {
                    return;
                }
            }
        }
        self.session = Some(session);
    }

    /// A machine hears that it was superseded: then it was.
    fn told(&mut self, node: usize, epoch: Epoch) {
        let own = &self.nodes[node].standing;
        if own.role != Role::Master || own.epoch >= epoch {
            self.broken = Some("a machine was told wrongly that it was superseded".into());
        }
    }

    /// No link failed and no disk: so no side may fail.
    fn judge(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Failed(sentence) => self.broken = Some(sentence.clone()),
            Outcome::Refused { code, .. } if ![1, 2, 3].contains(code) => {
                self.broken = Some(format!("refused with {code}"));
            }
            _ => {}
        }
    }

    /// Without further faults: the newest snapshot of the master arrives and is what it should be.
    fn settles(&self) -> Result<(), String> {
        let mut world = self.clone();
        world.run_session();
        let up = world.master();
        if world.nodes[1 - up].standing.role == Role::Master {
            // Who was superseded waits for the word.
            world.fail_back(1 - up);
        }
        let Some(newest) = world.nodes[up].standing.newest().map(|held| held.id) else {
            return Ok(());
        };
        for _ in 0..4 {
            world.connect(up);
            world.run_session();
            if let Some(broken) = world.broken {
                return Err(broken);
            }
            let (own, peer) = (world.nodes[up].hello(), world.nodes[1 - up].hello());
            if decide(&own, &peer) == Ok(Plan::Current(newest)) {
                let down = &world.nodes[1 - up];
                let truth = look(&world.truth, newest);
                return if look(&down.content, newest) == truth && Some(down.origin) == truth {
                    Ok(())
                } else {
                    Err("the newest is there, with another content".into())
                };
            }
        }
        Err("the newest does not arrive".into())
    }

    fn run_session(&mut self) {
        while let Some(session) = &self.session {
            if Self::receiver_ready(session) {
                self.step_receiver();
            } else if Self::sender_ready(session) {
                self.step_sender();
            } else {
                self.session = None;
            }
        }
    }

    fn fail_back(&mut self, node: usize) {
        // What was changed meanwhile is kept as a snapshot.
        self.snapshot(node);
        let reign = self.nodes[1 - node].standing.epoch;
        let standing = &mut self.nodes[node].standing;
        standing.role = Role::Replica;
        standing.epoch = reign;
    }
}

/// What the sender would send from the position on, if he still can.
fn changes(node: &Node, begin: &Begin) -> Option<Vec<(usize, u8)>> {
    if !node.standing.has_data(begin.snapshot.id) {
        return None;
    }
    let new = look(&node.content, begin.snapshot.id)?;
    let old = match begin.base {
        None => None,
        Some(base) => Some(look(&node.content, base)?),
    };
    let changed = |chunk: &usize| old.is_none_or(|old| old[*chunk] != new[*chunk]);
    let from = begin.position as usize;
    Some(
        (from..CHUNKS)
            .filter(changed)
            .map(|chunk| (chunk, new[chunk]))
            .collect(),
    )
}

impl Model for Bounds {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::new()]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        if world.broken.is_some() {
            return;
        }
        match &world.session {
            Some(session) => {
                if World::sender_ready(session) {
                    steps.push(Step::Sender);
                }
                if World::receiver_ready(session) {
                    steps.push(Step::Receiver);
                }
                if world.cuts < self.cuts {
                    steps.push(Step::CutLink);
                }
            }
            None => {
                for up in 0..2 {
                    if world.nodes[up].standing.role == Role::Master {
                        steps.push(Step::Connect(up));
                    }
                }
            }
        }
        for node in 0..2 {
            let standing = &world.nodes[node].standing;
            let master = standing.role == Role::Master;
            if master && world.taken < self.snapshots {
                steps.push(Step::Snapshot(node));
            }
            if world.crashes < self.crashes && world.session.is_some() {
                let unsure = world.nodes[node].origin != world.nodes[node].durable;
                steps.push(Step::Crash { node, lose: true });
                if unsure {
                    steps.push(Step::Crash { node, lose: false });
                }
            }
            if world.given_up < self.given_up {
                let newest = standing.newest().map(|held| held.id);
                for (at, held) in standing.held.iter().enumerate() {
                    let kept = [standing.hold, standing.old_hold].contains(&Some(held.id));
                    // A replica keeps its holds; the newest of a master has just been taken.
                    let goes = if master {
                        Some(held.id) != newest
                    } else {
                        !kept
                    };
                    if goes && held.data {
                        steps.push(Step::GiveUp { node, at });
                    }
                }
            }
        }
        let [a, b] = &world.nodes;
        let b_has = b.standing.hold.is_some();
        if world.failovers < self.failovers && b.standing.role == Role::Replica && b_has {
            steps.push(Step::FailOver);
        }
        let both = [a, b].iter().all(|node| node.standing.role == Role::Master);
        if both && world.session.is_none() {
            steps.push(Step::FailBack);
        }
    }

    fn next_state(&self, world: &World, step: Step) -> Option<World> {
        let mut world = world.clone();
        match step {
            Step::Snapshot(node) => world.snapshot(node),
            Step::Connect(up) => world.connect(up),
            Step::Sender => world.step_sender(),
            Step::Receiver => world.step_receiver(),
            Step::CutLink => {
                world.cuts += 1;
                world.session = None;
            }
            Step::Crash { node, lose } => {
                world.crashes += 1;
                world.session = None;
                let node = &mut world.nodes[node];
                if lose {
                    node.origin = node.durable;
                }
                node.durable = node.origin;
            }
            Step::GiveUp { node, at } => {
                world.given_up += 1;
                let node = &mut world.nodes[node];
                let id = node.standing.held[at].id;
                let kept = [node.standing.hold, node.pinned].contains(&Some(id));
                if kept && node.standing.role == Role::Master {
                    node.standing.held[at].data = false;
                } else {
                    node.forget(id);
                }
            }
            Step::FailOver => {
                // The daemon ends the cycle under way first.
                world.session = None;
                world.failovers += 1;
                let standing = &mut world.nodes[1].standing;
                standing.role = Role::Master;
                standing.epoch = Epoch {
                    number: standing.epoch.number + 1,
                    owner: standing.volume,
                    since: 0,
                };
                standing.origin = standing.hold;
                // What came of a copy under way is taken back.
                standing.partial = None;
                let base = standing.hold;
                let node = &mut world.nodes[1];
                if let Some(content) = base.and_then(|base| look(&node.content, base)) {
                    (node.origin, node.durable) = (content, content);
                }
            }
            Step::FailBack => {
                let old = 1 - world.master();
                world.fail_back(old);
            }
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no side is surprised", |_, world: &World| {
                world.broken.is_none()
            }),
            Property::always(
                "a common snapshot, or a full copy under way",
                |_, world: &World| {
                    let up = world.master();
                    let (up, down) = (&world.nodes[up].standing, &world.nodes[1 - up].standing);
                    let common = up.held.iter().any(|held| down.has_data(held.id));
                    let full = |partial: Partial| partial.base.is_none();
                    common || down.partial.is_some_and(full) || down.is_blank()
                },
            ),
            Property::always("no acknowledged position is wrong", |_, world: &World| {
                world.nodes.iter().all(|node| {
                    let Some(partial) = node.standing.partial else {
                        return true;
                    };
                    let Some(truth) = look(&world.truth, partial.snapshot) else {
                        return false;
                    };
                    let done = partial.position as usize;
                    node.durable[..done] == truth[..done] && node.origin[..done] == truth[..done]
                })
            }),
            Property::always(
                "a snapshot has one content everywhere",
                |_, world: &World| {
                    world.nodes.iter().all(|node| {
                        node.content
                            .iter()
                            .all(|(id, content)| look(&world.truth, *id) == Some(*content))
                    })
                },
            ),
            Property::always("never two masters of one epoch", |_, world: &World| {
                let [a, b] = &world.nodes;
                let both = [a, b].iter().all(|n| n.standing.role == Role::Master);
                !both || a.standing.epoch != b.standing.epoch
            }),
            Property::always(
                "without further faults the newest arrives",
                |_, world: &World| world.broken.is_some() || world.settles().is_ok(),
            ),
            Property::sometimes("a copy is resumed in the middle", |_, world: &World| {
                let resumed = |p: Partial| p.position > 0 && world.cuts + world.crashes > 0;
                world.session.is_none()
                    && world
                        .nodes
                        .iter()
                        .any(|n| n.standing.partial.is_some_and(resumed))
            }),
            Property::sometimes("a bookmark is the base", |_, world: &World| {
                let standing = &world.nodes[0].standing;
                world.nodes[1].standing.partial.is_some_and(|partial| {
                    partial.base.is_some_and(|base| !standing.has_data(base))
                })
            }),
        ]
    }
}

fn explore(name: &str, bounds: Bounds) {
    let began = std::time::Instant::now();
    let checker = bounds.checker().threads(2).spawn_bfs().join();
    println!(
        "{name}: {} states, {} of them different, depth {}, {:.1} s ({bounds:?})",
        checker.state_count(),
        checker.unique_state_count(),
        checker.max_depth(),
        began.elapsed().as_secs_f64(),
    );
    for (property, path) in checker.discoveries() {
        if checker.model().property(property).expectation == stateright::Expectation::Always {
            let last = path.last_state().clone();
            panic!(
                "{name}: {property}: {:?}\n{:?}\n{last:#?}",
                last.settles(),
                path.into_actions()
            );
        }
    }
}

/// Crashes at the worst moment, with what users and full stores do meanwhile.
#[test]
fn one_replica_with_crashes_and_lost_snapshots() {
    let mut bounds = Bounds {
        snapshots: 3,
        cuts: 1,
        crashes: 1,
        given_up: 1,
        failovers: 0,
    };
    explore("small", bounds);
    if std::env::var("REPLICATION_MODEL").is_ok_and(|value| value == "large") {
        bounds = Bounds {
            snapshots: 4,
            cuts: 1,
            crashes: 2,
            given_up: 2,
            failovers: 0,
        };
        explore("large", bounds);
    }
}

/// A failover and a failback with a crash in between.
#[test]
fn a_failover_and_a_failback() {
    let mut bounds = Bounds {
        snapshots: 3,
        cuts: 0,
        crashes: 1,
        given_up: 0,
        failovers: 1,
    };
    explore("small with failover", bounds);
    if std::env::var("REPLICATION_MODEL").is_ok_and(|value| value == "large") {
        bounds = Bounds {
            snapshots: 4,
            cuts: 1,
            crashes: 1,
            given_up: 1,
            failovers: 1,
        };
        explore("large with failover", bounds);
    }
}
