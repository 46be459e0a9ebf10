// SPDX-License-Identifier: GPL-2.0-only
//! Other sides that are slow, that take nothing, and that send too much of what is short.

use std::collections::VecDeque;

use uuid::Uuid;

use super::super::message::{Hello, Wishes};
use super::super::standing::{Role, Standing};
use super::*;

/// Longer than any of these takes.
const LIMIT: Duration = Duration::from_secs(30);

/// A greeting, and so many frames behind it, as they are on the wire.
fn stream(kind: Kind, payload: &[u8], count: usize) -> Vec<Vec<u8>> {
    let standing = Standing::blank(Uuid::from_u128(1), Role::Master);
    let hello = Message::Hello(Box::new(Hello {
        nonce: [1; 16],
        features: 0,
        standing,
        wishes: Wishes::default(),
    }));
    let sink = Sink::default();
    let mut writer = FrameWriter::new(sink.clone());
    writer.send(Kind::Hello, &[&hello.encode()]).expect("sent");
    let mut frames = vec![sink.take()];
    for _ in 0..count {
        writer.send(kind, &[payload]).expect("sent");
        frames.push(sink.take());
    }
    frames
}

#[derive(Clone, Default)]
struct Sink(Arc<Mutex<Vec<u8>>>);

impl Sink {
    fn take(&self) -> Vec<u8> {
        std::mem::take(&mut *lock(&self.0))
    }
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[derive(Default)]
struct Cut {
    cut: Mutex<bool>,
    changed: Condvar,
}

impl Cut {
    /// Waits so long, or until the link is cut; whether it is.
    fn pause(&self, time: Duration) -> bool {
        let cut = lock(&self.cut);
        let waited = self.changed.wait_timeout_while(cut, time, |cut| !*cut);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

/// Hands over one piece after the other, with a pause before each, and then nothing.
struct Pieces {
    pieces: VecDeque<Vec<u8>>,
    pause: Duration,
    cut: Arc<Cut>,
}

impl Read for Pieces {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Some(mut piece) = self.pieces.pop_front() else {
            while !self.cut.pause(LIMIT) {}
            return Ok(0);
        };
        if !self.pause.is_zero() && self.cut.pause(self.pause) {
            return Ok(0);
        }
        let count = piece.len().min(into.len());
        into[..count].copy_from_slice(&piece[..count]);
        if count < piece.len() {
            self.pieces.push_front(piece.split_off(count));
        }
        Ok(count)
    }
}

/// Takes nothing.
struct Full(Arc<Cut>);

impl Write for Full {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        while !self.0.pause(LIMIT) {}
        Err(io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A link on which so much comes and nothing is taken, or all.
fn link(pieces: Vec<Vec<u8>>, pause: Duration, takes: bool) -> Link {
    let cut = Arc::new(Cut::default());
    let writer: Box<dyn Write + Send> = match takes {
        true => Box::new(io::sink()),
        false => Box::new(Full(cut.clone())),
    };
    let pieces = pieces.into();
    let cuts = cut.clone();
    Link {
        reader: Box::new(Pieces { pieces, pause, cut }),
        writer,
        cut: Arc::new(move || {
            *lock(&cuts.cut) = true;
            cuts.changed.notify_all();
        }),
        greeted: true,
    }
}

/// Over a line of 16 KB a second a frame of a megabyte takes longer than the deadline. Such a line was cut each time
/// though data came all the while.
#[test]
fn a_slow_line_is_not_silent() {
    let timing = Timing {
        alive: LIMIT,
        deadline: Duration::from_secs(2),
    };
    let data = vec![7; 40 << 10];
    let whole = stream(Kind::Extent, &data, 1).concat();
    let pieces: Vec<Vec<u8>> = whole.chunks(1 << 10).map(<[u8]>::to_vec).collect();
    let link = link(pieces, Duration::from_millis(90), true);
    let mut line = Line::open(link, timing, 1 << 20).expect("open");
    loop {
        match line.hear(&|| false) {
            Ok(Incoming::Extent(bytes)) => break assert_eq!(bytes, data),
            Ok(Incoming::Said(_)) => {}
            Err(error) => panic!("{error}"),
        }
    }
}

/// Who says that he is there and takes nothing held up the one who had something to say, for good, and with him
/// the end of the cycle.
#[test]
fn who_takes_nothing_is_left_though_he_says_that_he_is_there() {
    let timing = Timing {
        alive: LIMIT,
        deadline: Duration::from_millis(300),
    };
    let pieces = stream(Kind::Alive, b"", 1000);
    let link = link(pieces, Duration::from_millis(50), false);
    let line = Line::open(link, timing, 0).expect("open");
    let (sender, said) = mpsc::channel();
    thread::spawn(move || sender.send(line.say(&Message::Alive).map(|_| ())));
    let said = said.recv_timeout(LIMIT).expect("it ends");
    let text = said.expect_err("nothing was taken").to_string();
    assert!(text.contains("took nothing"), "{text}");
}

/// Extents without data cost the sender a header each, and took memory without end: only their bytes counted.
#[test]
fn short_extents_do_not_fill_the_memory() {
    let pieces = vec![stream(Kind::Extent, b"", 10_000).concat()];
    let link = link(pieces, Duration::ZERO, true);
    let mut line = Line::open(link, Timing::default(), 1 << 20).expect("open");
    let mut count = 0;
    loop {
        match line.hear(&|| count == 10_000) {
            Ok(Incoming::Extent(_)) => count += 1,
            Ok(Incoming::Said(_)) => {}
            Err(LinkError::TooMuch) => break,
            Err(error) => panic!("{error} after {count}"),
        }
    }
}

/// Who cancelled a cycle with a machine that had gone waited a minute for its last words.
#[test]
fn nobody_waits_long_for_what_makes_no_difference() {
    let timing = Timing {
        alive: LIMIT,
        deadline: LIMIT * 20,
    };
    let begin = Instant::now();
    let mut line = Line::open(link(Vec::new(), Duration::ZERO, true), timing, 0).expect("open");
    line.hear(&|| true).expect_err("it was cancelled");
    line.hurry();
    assert!(line.last_words().is_none());
    line.close();
    assert!(begin.elapsed() < LIMIT, "{:?}", begin.elapsed());
}
