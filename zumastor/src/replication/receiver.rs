// SPDX-License-Identifier: GPL-2.0-only
//! The receiver of a cycle, as a pure function: (state, event) -> (state, actions).
//!
//! As with the sender the order of actions is what survives crashes. If an action finds that base or root
//! differ, that event takes the place of the actions behind it. Three rules: the record of a copy
//! under way is durable before the origin is written to; a position is recorded only after what is below
//! it was flushed; the old hold goes only when the sender's greeting shows that he has moved.

use uuid::Uuid;

use super::decide::{admit, check, must_restore, resumes};
use super::message::{Begin, Hello, Message};
use super::sender::Outcome;
use super::standing::{Epoch, Partial, Role};
use super::sums::Root;

/// What happens to the receiver.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Event {
    /// The link is there.
    Start,
    /// The other side said something. A batch comes with its extents, which the one who carries out
    /// actions keeps.
    Received(Message),
    /// The base here is not what the sender has: an extent does not fit.
    BaseDiffers,
    /// The roots are not equal.
    RootDiffers,
}

/// What the receiver wants done.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// Say this.
    Send(Message),
    /// The sender has moved on: let go of the old hold, durably.
    ReleaseOld,
    /// Know of the sender's epoch from now on, durably: an older master is refused.
    Adopt(Epoch),
    /// Keep what the origin holds in a snapshot of its own.
    SafetySnapshot,
    /// Record durably that the origin's content is no snapshot's, nor a part of a copy, and that what was
    /// written to it is dealt with.
    Unsettle,
    /// Give the origin the content of this snapshot back, and flush.
    Restore(Uuid),
    /// Take on the sender's lineage and epoch, durably, with a record of the copy under way. The origin's
    /// content is no snapshot's any more, and what was written to it is dealt with.
    StartPartial {
        /// The copy.
        partial: Partial,
        /// The sender's.
        lineage: Uuid,
        /// The sender's.
        epoch: Epoch,
    },
    /// Get ready to read the base and write the origin.
    Open(Begin),
    /// Write the extents of the batch to the origin.
    Apply,
    /// Make what was written durable.
    Flush,
    /// Record how far the copy is, durably.
    SavePartial {
        /// In chunks.
        position: u64,
    },
    /// Compare the sender's root with ours, if both know one; [`Event::RootDiffers`] if they differ.
    CompareRoot(Option<Root>),
    /// Make the snapshot and its twin, then in one durable step: it is the hold, the base the old hold,
    /// the copy under way is over. Then show it.
    Finish {
        /// The sender's snapshot.
        begin: Begin,
    },
    /// Know, durably, that somebody else became master of what this side is master of.
    Superseded(Epoch),
    /// Say that it is complete, with our root.
    SendComplete,
    /// The cycle is over.
    Stop(Outcome),
}

/// The receiver.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Receiver {
    own: Hello,
    phase: Phase,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Phase {
    Greeting,
    Greeted(Box<Hello>),
    Streaming(Begin, Box<Hello>, u64),
    Over,
}

impl Receiver {
    /// One that greets with `own`.
    #[must_use]
    pub fn new(own: Hello) -> Self {
        Receiver {
            own,
            phase: Phase::Greeting,
        }
    }

    /// What follows from an event.
    #[must_use]
    pub fn step(mut self, event: Event) -> (Receiver, Vec<Action>) {
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
                "the sending side failed: {sentence}"
            ))),
            (Phase::Greeting, Event::Start) => {
                let hello = Message::Hello(Box::new(self.own.clone()));
                (Phase::Greeting, vec![Action::Send(hello)])
            }
            (Phase::Greeting, Event::Received(Message::Hello(peer))) => self.greeted(peer),
            (Phase::Greeted(_), Event::Received(Message::Current { snapshot })) => {
                over(Outcome::Current(snapshot))
            }
            (Phase::Greeted(peer), Event::Received(Message::Begin(begin))) => {
                self.offered(peer, begin)
            }
            (
                Phase::Streaming(begin, peer, position),
                Event::Received(Message::Batch { position: next }),
            ) => {
                if next < position {
                    return broken("the sending side went backwards");
                }
                let actions = vec![
                    Action::Apply,
                    Action::Flush,
                    Action::SavePartial { position: next },
                    Action::Send(Message::Ack { position: next }),
                ];
                (Phase::Streaming(begin, peer, next), actions)
            }
            (Phase::Streaming(begin, peer, position), Event::Received(Message::End { root })) => {
                let actions = vec![
                    Action::CompareRoot(root),
                    Action::Finish { begin },
                    Action::SendComplete,
                    Action::Stop(Outcome::Done {
                        snapshot: begin.snapshot,
                        proven: root.is_some(),
                    }),
                ];
                // Until the actions are done, a difference may still come.
                (Phase::Streaming(begin, peer, position), actions)
            }
            (Phase::Streaming(begin, peer, _), Event::BaseDiffers) => self.doubt(
                &begin,
                &peer,
                "the base differs from the sending side's; the next try sends whole chunks",
            ),
            (Phase::Streaming(begin, peer, _), Event::RootDiffers) => self.doubt(
                &begin,
                &peer,
                "the sums of both sides differ; the copy begins anew, with whole chunks",
            ),
            (_, Event::Received(_)) => broken("the sending side said something out of turn"),
            (_, Event::Start | Event::BaseDiffers | Event::RootDiffers) => {
                broken("an event came out of turn")
            }
        }
    }

    fn greeted(&self, peer: Box<Hello>) -> (Phase, Vec<Action>) {
        let own = &self.own.standing;
        let same = own.lineage.is_some() && own.lineage == peer.standing.lineage;
        if let Err(refusal) = admit(&peer, &self.own) {
            let (phase, mut actions) = refused(refusal.code(), refusal.to_string());
            if own.role == Role::Master && same && peer.standing.epoch > own.epoch {
                let stop = actions.pop();
                actions.push(Action::Superseded(peer.standing.epoch));
                actions.extend(stop);
            }
            return (phase, actions);
        }
        // And only if it is a base: after a failback the hold may be a bookmark here.
        let moved = own.hold.is_some_and(|hold| {
            let theirs = &peer.standing;
            theirs.hold == Some(hold) && theirs.find(hold).is_some() && own.has_data(hold)
        });
        let mut actions = Vec::new();
        if same && peer.standing.epoch > own.epoch {
            actions.push(Action::Adopt(peer.standing.epoch));
        }
        if moved && own.old_hold.is_some() {
            actions.push(Action::ReleaseOld);
        }
        (Phase::Greeted(peer), actions)
    }

    fn offered(&self, peer: Box<Hello>, begin: Begin) -> (Phase, Vec<Action>) {
        if let Err(refusal) = check(&begin, &peer, &self.own) {
            return refused(refusal.code(), refusal.to_string());
        }
        let own = &self.own.standing;
        let mut actions = Vec::new();
        if !resumes(&begin, own) {
            let Some(start) = self.start(&begin, &peer, begin.plain) else {
                return broken("the sending side has no lineage");
            };
            if own.written {
                actions.push(Action::SafetySnapshot);
            }
            if let Some(base) = begin.base.filter(|_| must_restore(&begin, own)) {
                // Interrupted, it leaves a mixture that nothing may go on from.
                actions.push(Action::Unsettle);
                actions.push(Action::Restore(base));
            }
            actions.push(start);
        }
        let ready = Message::Ready {
            nonce: peer.nonce,
            position: begin.position,
        };
        actions.push(Action::Open(begin));
        actions.push(Action::Send(ready));
        (Phase::Streaming(begin, peer, begin.position), actions)
    }

    fn start(&self, begin: &Begin, peer: &Hello, plain: bool) -> Option<Action> {
        Some(Action::StartPartial {
            partial: Partial {
                snapshot: begin.snapshot.id,
                base: begin.base,
                position: 0,
                plain,
            },
            lineage: peer.standing.lineage?,
            epoch: peer.standing.epoch,
        })
    }

    /// The next try sends whole chunks from the beginning: it cannot fail the same way.
    fn doubt(&self, begin: &Begin, peer: &Hello, sentence: &str) -> (Phase, Vec<Action>) {
        let mut actions: Vec<_> = self.start(begin, peer, true).into_iter().collect();
        let sentence = sentence.to_owned();
        actions.push(Action::Send(Message::Fail {
            sentence: sentence.clone(),
        }));
        actions.push(Action::Stop(Outcome::Failed(sentence)));
        (Phase::Over, actions)
    }
}

fn over(outcome: Outcome) -> (Phase, Vec<Action>) {
    (Phase::Over, vec![Action::Stop(outcome)])
}

fn refused(code: u16, sentence: String) -> (Phase, Vec<Action>) {
    let said = Message::Refuse {
        code,
        sentence: sentence.clone(),
    };
    let stop = Action::Stop(Outcome::Refused { code, sentence });
    (Phase::Over, vec![Action::Send(said), stop])
}

fn broken(what: &str) -> (Phase, Vec<Action>) {
    let sentence = what.to_owned();
    let said = Message::Fail {
        sentence: sentence.clone(),
    };
    let stop = Action::Stop(Outcome::Failed(sentence));
    (Phase::Over, vec![Action::Send(said), stop])
}
