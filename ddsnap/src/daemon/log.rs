// SPDX-License-Identifier: GPL-2.0-only
//! The daemons' log: lines `date command[pid]: text`, in a file that is opened again on request.
//!
//! Lines wait in memory for a thread of the log's own, which has another process write them
//! ([`log_writer`](super::log_writer)). A server may not wait for a file system: the log can lie on the very volume
//! it serves, and that is frozen while a snapshot is made. A server waiting there to write "snapshot created" would
//! never let the snapshot end, and so nobody would thaw the file system. What does not fit into memory is lost, and
//! counted.
//!
//! tracing-appender does nearly this. But it cannot say whether there is room (a dump waits for it), and
//! its thread's stack, locked in memory like all of a server, is thirty times as large.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::mem;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use jiff::tz::TimeZone;
use nix::sys::signal::{SigSet, SigmaskHow};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter};
use tracing_subscriber::registry::LookupSpan;

use super::log_writer::LogWriter;

/// The most bytes of lines that wait to be written.
const WAITING_MOST: usize = 256 << 10;
/// The thread hands on bytes that are there.
const STACK_BYTES: usize = 64 << 10;
/// How long the end of a daemon waits for its last lines: one that is told to end has to.
const LAST_LINES: Duration = Duration::from_secs(2);

/// The process's log, for [`has_room`] and [`lines_lost`].
static CURRENT: OnceLock<Arc<Queue>> = OnceLock::new();

/// Whether the log takes a good many lines more now. Who writes lots of them waits for it.
#[must_use]
pub fn has_room() -> bool {
    let room = |queue: &Arc<Queue>| queue.lock().bytes <= WAITING_MOST / 2;
    CURRENT.get().is_none_or(room)
}

/// Whether all lines so far are in the file, or lost.
#[must_use]
pub fn is_written() -> bool {
    let idle = |queue: &Arc<Queue>| !queue.lock().is_busy();
    CURRENT.get().is_none_or(idle)
}

/// Lines that have not been written since the process started, and never will be.
#[must_use]
pub fn lines_lost() -> u64 {
    CURRENT.get().map_or(0, |queue| queue.lock().lost)
}

/// The log; dropping it waits, for a limited time, until all lines are written.
#[derive(Debug)]
pub struct Log {
    /// None: standard error.
    path: Option<PathBuf>,
    queue: Arc<Queue>,
}

/// What waits to be written.
#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    /// There is something to do for the thread.
    filled: Condvar,
    /// All is written.
    idle: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The thread has lines in hand.
    writing: bool,
    reopen: bool,
    /// Nothing more comes.
    closed: bool,
    /// The thread has ended.
    ended: bool,
    /// Lines that were not written.
    lost: u64,
    /// Of these, those that the log has told of.
    told: u64,
}

impl Waiting {
    fn is_busy(&self) -> bool {
        self.writing || !self.lines.is_empty() || self.reopen
    }
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn push(&self, line: &[u8]) {
        let mut waiting = self.lock();
        if waiting.bytes + line.len() > WAITING_MOST {
            waiting.lost += 1;
            return;
        }
        waiting.bytes += line.len();
        waiting.lines.push_back(line.to_vec());
        self.filled.notify_one();
    }

    /// Has what comes written, until nothing more does.
    fn write(&self, path: Option<&Path>, writer: LogWriter) {
        let mut waiting = self.lock();
        loop {
            while waiting.lines.is_empty() && !waiting.reopen {
                waiting.writing = false;
                if waiting.closed {
                    drop(waiting);
                    drop(writer);
                    self.lock().ended = true;
                    return self.idle.notify_all();
                }
                self.idle.notify_all();
                let woken = self.filled.wait(waiting);
                waiting = woken.unwrap_or_else(PoisonError::into_inner);
            }
            waiting.writing = true;
            let reopen = mem::take(&mut waiting.reopen);
            let line = waiting.lines.pop_front().unwrap_or_default();
            waiting.bytes -= line.len();
            let lost = waiting.lost - waiting.told;
            // From here on it may take for ever, and nobody waits for it.
            drop(waiting);
            if let (true, Some(path)) = (reopen, path) {
                if let Err(error) = writer.open(path) {
                    let path = path.display();
                    tracing::error!("cannot open the log {path} again: {error}");
                }
            }
            let written = line.is_empty() || write_line(&writer, lost, &line);
            waiting = self.lock();
            if written && !line.is_empty() {
                waiting.told += lost;
            } else if !written {
                waiting.lost += 1;
            }
        }
    }
}

/// Writes a line, and before it how many are missing. If that fails the line is lost, and the next one that
/// can be written says so. It is no error: a full disk must not end a daemon.
fn write_line(writer: &LogWriter, lost: u64, line: &[u8]) -> bool {
    let note = match lost {
        0 => String::new(),
        lost => format!("{lost} lines of the log could not be written\n"),
    };
    writer.append(&[note.as_bytes(), line].concat()).is_ok()
}

impl Log {
    /// Opens the log and makes it the process's. Call it while there is one thread.
    ///
    /// `path`: a file, made if missing with mode 0600, or none for standard error. `command`: what
    /// the lines say after the date. `debug`: write down every request too.
    ///
    /// # Errors
    /// The file cannot be opened.
    pub fn start(path: Option<&Path>, command: &'static str, debug: bool) -> io::Result<Log> {
        let path = path.map(std::path::absolute).transpose()?;
        let log = Log::over(path.clone(), path.as_deref())?;
        let level = if debug {
            LevelFilter::DEBUG
        } else {
            LevelFilter::INFO
        };
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_ansi(false)
            .event_format(Line {
                command,
                zone: TimeZone::system(),
            })
            .with_writer(Pen(log.queue.clone()))
            .finish();
        // Only a test can have set one before; then its own stays.
        let _ = tracing::subscriber::set_global_default(subscriber);
        let _ = CURRENT.set(log.queue.clone());
        Ok(log)
    }

    /// A log that goes to `first`, and to `path` from when it is opened again.
    fn over(path: Option<PathBuf>, first: Option<&Path>) -> io::Result<Log> {
        let writer = LogWriter::start(first)?;
        let queue = Arc::new(Queue::default());
        let (thread_queue, thread_path) = (queue.clone(), path.clone());
        // A signal for the daemon must not be taken by this thread.
        let before = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        let spawned = std::thread::Builder::new()
            .name("log".into())
            .stack_size(STACK_BYTES)
            .spawn(move || thread_queue.write(thread_path.as_deref(), writer));
        before.thread_set_mask()?;
        spawned?;
        Ok(Log { path, queue })
    }

    /// Whether lines go to standard error.
    #[must_use]
    pub fn is_stderr(&self) -> bool {
        self.path.is_none()
    }

    /// What opens the file again, as after it was renamed. If that fails the old one stays.
    pub fn reopener(&self) -> impl FnMut() + 'static {
        let queue = self.queue.clone();
        move || {
            queue.lock().reopen = true;
            queue.filled.notify_one();
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        let busy = |waiting: &mut Waiting| !waiting.ended;
        let mut waiting = self.queue.lock();
        waiting.closed = true;
        self.queue.filled.notify_one();
        // At the deadline the last lines are lost, which nobody can be told any more.
        drop(
            self.queue
                .idle
                .wait_timeout_while(waiting, LAST_LINES, busy),
        );
    }
}

/// Puts lines into the queue: the subscriber hands over one with each call.
#[derive(Clone)]
struct Pen(Arc<Queue>);

impl Write for Pen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Pen {
    type Writer = Pen;

    fn make_writer(&self) -> Pen {
        self.clone()
    }
}

struct Line {
    command: &'static str,
    /// Read once: later it would be read again every few minutes, from a file system that may hang or wait for this
    /// very server.
    zone: TimeZone,
}

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> std::fmt::Result {
        let now = Timestamp::now().to_zoned(self.zone.clone());
        let date = now.strftime("%a %b %e %H:%M:%S %Y");
        write!(writer, "{date} {}[{}]: ", self.command, std::process::id())?;
        match *event.metadata().level() {
            Level::ERROR => write!(writer, "error: ")?,
            Level::WARN => write!(writer, "warning: ")?,
            _ => {}
        }
        context.format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::fd::AsFd;
    use std::os::unix::fs::OpenOptionsExt;
    use std::sync::mpsc;

    use nix::sys::stat::Mode;

    use super::*;

    /// A full disk, or a standard error that nobody read any more, ended the daemon.
    #[test]
    fn a_line_that_cannot_be_written_is_counted_and_no_more() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let log = Log::over(Some(path.clone()), Some(Path::new("/dev/full"))).unwrap();
        log.queue.push(b"one\n");
        log.queue.push(b"two\n");
        let lost = |waiting: &mut Waiting| waiting.lost < 2;
        let waited = log
            .queue
            .idle
            .wait_timeout_while(log.queue.lock(), LAST_LINES, lost);
        assert_eq!(waited.unwrap().0.lost, 2);
        (log.reopener())();
        log.queue.push(b"three\n");
        log.queue.push(b"four\n");
        drop(log);
        let text = std::fs::read_to_string(path).unwrap();
        assert_eq!(
            text,
            "2 lines of the log could not be written\nthree\nfour\n"
        );
    }

    /// With its log on the volume it serves, a server waited for the frozen file system to take a line,
    /// and the thaw waited for the server: the machine had to be switched off.
    #[test]
    fn a_file_that_takes_nothing_holds_up_nobody() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, Mode::S_IRWXU).unwrap();
        let reader = OpenOptions::new()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(&path)
            .unwrap();
        let log = Log::over(Some(path.clone()), Some(&path)).unwrap();
        let queue = log.queue.clone();
        let line = [b'x'; 1000];
        // A pipe of 64 KiB and a queue of 256 KiB are full long before the last one.
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            (0..2000).for_each(|_| queue.push(&line));
            sender.send(()).unwrap();
        });
        let pushed = receiver.recv_timeout(Duration::from_secs(60));
        pushed.expect("lines wait for the reader");
        let waiting = log.queue.lock();
        assert!(waiting.lost > 1000 && waiting.bytes <= WAITING_MOST);
        drop(waiting);
        // Somebody reads: all that waited comes, and the number of those that are missing.
        let mut all = Vec::new();
        while !String::from_utf8_lossy(&all).contains("could not be written") {
            let mut bytes = [0; 65536];
            let mut polled = [nix::poll::PollFd::new(
                reader.as_fd(),
                nix::poll::PollFlags::POLLIN,
            )];
            assert_eq!(
                nix::poll::poll(&mut polled, 60_000_u16),
                Ok(1),
                "nothing comes"
            );
            let count = nix::unistd::read(&reader, &mut bytes).unwrap();
            all.extend_from_slice(&bytes[..count]);
        }
    }
}
