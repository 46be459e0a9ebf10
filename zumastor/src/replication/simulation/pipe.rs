// SPDX-License-Identifier: GPL-2.0-only
//! A pipe in both directions that cuts, corrupts and hands over in odd pieces.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::sync::{Arc, Condvar, Mutex};

use super::super::link::Link;
use super::Random;

/// What goes wrong in one direction, at a byte of it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Fault {
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
pub(super) fn pipe([there, back]: [Fault; 2], seed: u64) -> (Link, Link) {
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
        }
    };
    (
        end(&ways[1], &ways[0], there, seed),
        end(&ways[0], &ways[1], back, !seed),
    )
}
