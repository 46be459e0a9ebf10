// SPDX-License-Identifier: GPL-2.0-only
//! The sender of a cycle, as a pure function: (state, event) -> (state, actions).
//!
//! Actions are carried out in their order, one at a time, and the first that fails ends the cycle: what is
//! durable then is where the next one begins. So the order of actions is what survives crashes, and the
//! model checker stops between any two of them.

use uuid::Uuid;

use super::decide::{Plan, Refusal, decide};
use super::message::{Begin, Hello, Message};
use super::standing::{Epoch, Held};
use super::sums::Root;

/// Batches that may be under way without an acknowledgement. With [`super::send::BATCH_BYTES`] it bounds
/// the memory of both sides.
pub const IN_FLIGHT: u64 = 3;

/// How a cycle ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Outcome {
    /// The snapshot is on both sides.
    Done {
        /// Which.
        snapshot: Held,
        /// Whether the roots of both sides were compared, and were equal.
        proven: bool,
    },
    /// There was nothing to send.
    Current(Uuid),
    /// This side or the other said no; nothing was written.
    Refused {
        /// The refusal's number.
        code: u16,
        /// Its sentence.
        sentence: String,
    },
    /// Something failed, here or there.
    Failed(String),
}

/// What happens to the sender.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The link is there.
    Start,
    /// The other side said something.
    Received(Message),
    /// A batch was sent; it ends at `position`, or with the snapshot.
    BatchSent {
        /// The first chunk not in it.
        position: u64,
        /// Nothing that changed is behind it.
        last: bool,
    },
}

/// What the sender wants done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Say this.
    Send(Message),
    /// Begin to list what changed.
    Open(Begin),
    /// Send the next batch of extents, from where the last one ended.
    SendBatch,
    /// Say that all was sent, with the root of the snapshot if it is known.
    SendEnd,
    /// Note how far the other side durably is.
    SaveProgress {
        /// In chunks.
        position: u64,
    },
    /// Compare the other side's root with ours, if both know one.
    CompareRoot(Option<Root>),
    /// See to it, durably, that this snapshot is not given up, or only to a bookmark, before it is the
    /// hold or another one is pinned.
    Pin(Uuid),
    /// Make this snapshot the hold, durably, then let go of the one before. Fails if it is gone.
    MoveHold(Uuid),
    /// Know, durably, that somebody else became master.
    Superseded(Epoch),
    /// The cycle is over.
    Stop(Outcome),
}

/// The sender.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Sender {
    own: Hello,
    phase: Phase,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Greeting,
    Offered(Begin),
    Streaming(Stream),
    Over,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Stream {
    begin: Begin,
    /// All below was sent.
    sent: u64,
    /// All below is durable there.
    acked: u64,
    in_flight: u64,
    /// A batch is being made.
    sending: bool,
    /// The end was sent.
    ended: bool,
}

impl Sender {
    /// One that greets with `own`.
    #[must_use]
    pub fn new(own: Hello) -> Self {
        Sender {
            own,
            phase: Phase::Greeting,
        }
    }

    /// What follows from an event.
    #[must_use]
    pub fn step(mut self, event: Event) -> (Sender, Vec<Action>) {
        let phase = std::mem::replace(&mut self.phase, Phase::Over);
        let (phase, actions) = self.follow(phase, event);
        self.phase = phase;
        (self, actions)
    }

    fn follow(&self, phase: Phase, event: Event) -> (Phase, Vec<Action>) {
        match (phase, event) {
            (Phase::Over, _) => (Phase::Over, Vec::new()),
            (phase, Event::Received(Message::Alive)) => (phase, Vec::new()),
            (_, Event::Received(Message::Refuse { code, sentence })) => {
                over(Outcome::Refused { code, sentence })
            }
            (_, Event::Received(Message::Fail { sentence })) => over(Outcome::Failed(format!(
                "the receiving side failed: {sentence}"
            ))),
            (Phase::Greeting, Event::Start) => {
                let hello = Message::Hello(Box::new(self.own.clone()));
                (Phase::Greeting, vec![Action::Send(hello)])
            }
            (Phase::Greeting, Event::Received(Message::Hello(peer))) => self.offer(&peer),
            (Phase::Offered(begin), Event::Received(Message::Ready { nonce, position })) => {
                if nonce != self.own.nonce || position != begin.position {
                    return broken("the receiving side answered another offer");
                }
                let stream = Stream {
                    begin,
                    sent: begin.position,
                    acked: begin.position,
                    in_flight: 0,
                    sending: true,
                    ended: false,
                };
                let actions = vec![Action::Open(begin), Action::SendBatch];
                (Phase::Streaming(stream), actions)
            }
            (Phase::Streaming(stream), Event::BatchSent { position, last }) => {
                stream.batch_sent(position, last)
            }
            (Phase::Streaming(stream), Event::Received(Message::Ack { position })) => {
                stream.acknowledged(position)
            }
            (Phase::Streaming(stream), Event::Received(Message::Complete { root, .. })) => {
                stream.completed(root)
            }
            (_, Event::Received(_)) => broken("the receiving side said something out of turn"),
            (_, Event::Start | Event::BatchSent { .. }) => broken("an event came out of turn"),
        }
    }

    fn offer(&self, peer: &Hello) -> (Phase, Vec<Action>) {
        match decide(&self.own, peer) {
            Err(refusal) => {
                let (code, sentence) = (refusal.code(), refusal.to_string());
                let said = Message::Refuse {
                    code,
                    sentence: sentence.clone(),
                };
                let mut actions = vec![Action::Send(said)];
                if let Refusal::Superseded { new, .. } = refusal {
                    actions.push(Action::Superseded(new));
                }
                actions.push(Action::Stop(Outcome::Refused { code, sentence }));
                (Phase::Over, actions)
            }
            Ok(Plan::Current(snapshot)) => {
                let mut actions = self.catch_up(peer);
                actions.push(Action::Send(Message::Current { snapshot }));
                actions.push(Action::Stop(Outcome::Current(snapshot)));
                (Phase::Over, actions)
            }
            Ok(Plan::Copy(begin)) => {
                let mut actions = self.catch_up(peer);
                // Before the other side can have it: once it does, this may be all that both have.
                actions.push(Action::Pin(begin.snapshot.id));
                actions.push(Action::Send(Message::Begin(begin)));
                (Phase::Offered(begin), actions)
            }
        }
    }

    /// The last cycle may have ended between the receiver's part and this side's.
    fn catch_up(&self, peer: &Hello) -> Vec<Action> {
        let own = &self.own.standing;
        let theirs = peer.standing.hold.filter(|hold| {
            own.hold != Some(*hold) && own.find(*hold).is_some() && peer.standing.has_data(*hold)
        });
        theirs.map(Action::MoveHold).into_iter().collect()
    }
}

impl Stream {
    fn batch_sent(mut self, position: u64, last: bool) -> (Phase, Vec<Action>) {
        assert!(self.sending && position >= self.sent, "batches ascend");
        self.sent = position;
        self.in_flight += 1;
        self.sending = false;
        let mut actions = Vec::new();
        if last {
            self.ended = true;
            actions.push(Action::SendEnd);
        } else {
            self.go_on(&mut actions);
        }
        (Phase::Streaming(self), actions)
    }

    fn go_on(&mut self, actions: &mut Vec<Action>) {
        if !self.sending && !self.ended && self.in_flight < IN_FLIGHT {
            self.sending = true;
            actions.push(Action::SendBatch);
        }
    }

    fn acknowledged(mut self, position: u64) -> (Phase, Vec<Action>) {
        if position < self.acked || position > self.sent || self.in_flight == 0 {
            return broken("the receiving side acknowledged what was not sent");
        }
        self.acked = position;
        self.in_flight -= 1;
        let mut actions = vec![Action::SaveProgress { position }];
        self.go_on(&mut actions);
        (Phase::Streaming(self), actions)
    }

    fn completed(self, root: Option<Root>) -> (Phase, Vec<Action>) {
        if !self.ended || self.in_flight > 0 {
            return broken("the receiving side was ready before all was sent");
        }
        let snapshot = self.begin.snapshot;
        let actions = vec![
            Action::CompareRoot(root),
            // Only now: until here the other side may have to start from the base again.
            Action::MoveHold(snapshot.id),
            Action::Stop(Outcome::Done {
                snapshot,
                proven: root.is_some(),
            }),
        ];
        (Phase::Over, actions)
    }
}

fn over(outcome: Outcome) -> (Phase, Vec<Action>) {
    (Phase::Over, vec![Action::Stop(outcome)])
}

fn broken(what: &str) -> (Phase, Vec<Action>) {
    let sentence = what.to_owned();
    let said = Message::Fail {
        sentence: sentence.clone(),
    };
    let stop = Action::Stop(Outcome::Failed(sentence));
    (Phase::Over, vec![Action::Send(said), stop])
}
