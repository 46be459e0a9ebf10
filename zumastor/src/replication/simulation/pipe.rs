// SPDX-License-Identifier: GPL-2.0-only
//! A pipe in both directions that cuts, corrupts and hands over in odd pieces.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use super::super::frame::{FrameWriter, Kind};
use super::super::link::Link;
use super::super::message::{Hello, Message};
use super::Random;

/// What goes wrong in one direction, at a byte of it.
#[derive(Clone, Copy, Debug)]
pub enum Fault {
    /// Nothing.
    None,
    /// Nothing comes through any more.
    Cut(u64),
    /// A bit is turned.
    Corrupt(u64),
}

impl Fault {
    pub(super) fn some(random: &mut Random) -> Fault {
        // Greetings are short, data is longer: all of them should be hit.
        let at = match random.below(3) {
            0 => random.below(600),
            1 => random.below(6000),
            _ => random.below(60_000),
        };
        match random.below(5) {
            0 | 1 => Fault::Cut(at),
            2 => Fault::Corrupt(at),
            _ => Fault::None,
        }
    }
}

#[derive(Default)]
struct Way {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    bytes: VecDeque<u8>,
    passed: u64,
    ended: bool,
    cut: bool,
}

/// What may be under way: less than a batch, so that writers wait.
const ROOM: usize = 16 << 10;

struct In(Arc<Way>, Random);
struct Out(Arc<Way>, Fault);

impl Read for In {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let mut state = self.0.state.lock().unwrap();
        while state.bytes.is_empty() && !state.ended && !state.cut {
            state = self.0.changed.wait(state).unwrap();
        }
        let odd = 1 + self.1.below(5000) as usize;
        let count = into.len().min(state.bytes.len()).min(odd);
        for (place, byte) in into.iter_mut().zip(state.bytes.drain(..count)) {
            *place = byte;
        }
        self.0.changed.notify_all();
        Ok(count)
    }
}

impl Write for Out {
    fn write(&mut self, from: &[u8]) -> io::Result<usize> {
        let mut state = self.0.state.lock().unwrap();
        while state.bytes.len() >= ROOM && !state.cut {
            state = self.0.changed.wait(state).unwrap();
        }
        if state.cut {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let count = from.len().min(ROOM - state.bytes.len());
        for byte in &from[..count] {
            let mut byte = *byte;
            match self.1 {
                Fault::Cut(at) if at == state.passed => {
                    state.cut = true;
                    break;
                }
                Fault::Corrupt(at) if at == state.passed => byte ^= 1 << (at % 8),
                _ => {}
            }
            state.bytes.push_back(byte);
            state.passed += 1;
        }
        self.0.changed.notify_all();
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Out {
    fn drop(&mut self) {
        self.0.state.lock().unwrap().ended = true;
        self.0.changed.notify_all();
    }
}

/// The two ends of a pipe.
pub fn pipe([there, back]: [Fault; 2], seed: u64) -> (Link, Link) {
    let ways = [Arc::new(Way::default()), Arc::new(Way::default())];
    let end = |incoming: &Arc<Way>, outgoing: &Arc<Way>, fault, seed| {
        let both = [incoming.clone(), outgoing.clone()];
        Link {
            reader: Box::new(In(incoming.clone(), Random(seed))),
            writer: Box::new(Out(outgoing.clone(), fault)),
            cut: Arc::new(move || {
                for way in &both {
                    way.state.lock().unwrap().cut = true;
                    way.changed.notify_all();
                }
            }),
            greeted: false,
        }
    };
    (
        end(&ways[1], &ways[0], there, seed),
        end(&ways[0], &ways[1], back, !seed),
    )
}

/// Greets, then says that it is there until the link is cut; whoever writes to it fails.
pub(super) fn deaf(hello: Hello) -> Link {
    let (way, gone) = (Arc::new(Way::default()), Arc::new(Way::default()));
    gone.state.lock().unwrap().cut = true;
    let mut writer = FrameWriter::new(Out(way.clone(), Fault::None));
    thread::spawn(move || {
        let hello = Message::Hello(Box::new(hello)).encode();
        let mut sent = writer.send(Kind::Hello, &[&hello]);
        while sent.is_ok() {
            thread::sleep(Duration::from_millis(20));
            sent = writer.send(Kind::Alive, &[]);
        }
    });
    let cut = way.clone();
    Link {
        reader: Box::new(In(way, Random(1))),
        writer: Box::new(Out(gone, Fault::None)),
        cut: Arc::new(move || {
            cut.state.lock().unwrap().cut = true;
            cut.changed.notify_all();
        }),
        greeted: true,
    }
}

/// Greets, is ready for a copy from the beginning, and then says nothing; what it is sent is kept.
pub(super) fn silent(hello: Hello, nonce: [u8; 16]) -> (Link, Arc<Mutex<Vec<u8>>>) {
    struct Keep(Arc<Mutex<Vec<u8>>>);
    impl Write for Keep {
        fn write(&mut self, from: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(from);
            Ok(from.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let way = Arc::new(Way::default());
    let mut writer = FrameWriter::new(Out(way.clone(), Fault::None));
    let ready = Message::Ready { nonce, position: 0 };
    for message in [Message::Hello(Box::new(hello)), ready] {
        writer.send(message.kind(), &[&message.encode()]).unwrap();
    }
    // Dropping it would end the stream.
    std::mem::forget(writer);
    let (kept, cut) = (Arc::default(), way.clone());
    let link = Link {
        reader: Box::new(In(way, Random(1))),
        writer: Box::new(Keep(Arc::clone(&kept))),
        cut: Arc::new(move || {
            cut.state.lock().unwrap().cut = true;
            cut.changed.notify_all();
        }),
        greeted: true,
    };
    (link, kept)
}
