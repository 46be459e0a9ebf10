// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap export`: a snapshot from the raw devices, over NBD.

use std::cell::Cell;
use std::io::{self, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use clap::Args;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::{check_operands, offline, snap_tag};
use crate::buffer::AlignedBuf;
use crate::daemon::signals;
use crate::nbd::{self, Export as Exported};
use crate::protocol::address::{SocketName, peer_is_trusted};
use crate::stdio::{announce, complain};
use crate::store::{SnapState, View};
use crate::units::{Chunk, SnapTag};

const USAGE: &str = "ddsnap export [OPTIONS] SNAPSTORE ORIGIN [METADEV] TAG";

/// Read from the devices at a time, unless a chunk is longer.
const WINDOW_BYTES: u64 = 1 << 20;

/// Clients at a time; nbdcopy uses four connections, others one.
const MAX_CLIENTS: usize = 16;

/// How long a client may take to say what it wants.
const HANDSHAKE: Duration = Duration::from_secs(30);

/// Errors of reading that are told one by one: a client may meet a damaged chunk again and again.
const MAX_COMPLAINTS: usize = 50;

/// Serve a snapshot read-only over NBD, without server, kernel module or root.
///
/// For qemu-img, nbdcopy, guestfish, or nbd-client and a mount. Prints the URI to give to them and serves
/// until SIGINT or SIGTERM. The devices are only read, and every saved chunk is compared with its checksum:
/// one that does not fit is an I/O error. Only root and the user who runs it can connect. A store that a
/// server holds is refused. Exit code 99: no sound store.
#[derive(Debug, Args)]
#[command(override_usage = USAGE)]
pub struct Export {
    /// Snapshot store, origin, perhaps metadata device, and the snapshot's number.
    #[arg(value_name = "OPERAND", required = true, allow_negative_numbers = true)]
    operands: Vec<PathBuf>,
    /// The socket to listen on; ddsnap-TAG.sock in the current directory if not given.
    #[arg(short, long, value_name = "PATH")]
    socket: Option<PathBuf>,
}

impl Export {
    pub fn run(&self) -> Result<u8> {
        check_operands(&self.operands, 3..=4, USAGE)?;
        let Some((tag, devices)) = self.operands.split_last() else {
            bail!("{USAGE}"); // cannot be: they were counted
        };
        let tag = snap_tag(&tag.to_string_lossy())
            .map_err(|problem| anyhow!("{}: {problem}", tag.display()))?;
        let meta = devices.get(2);
        let _lock = offline::share(&devices[0], meta.map(PathBuf::as_path))?;
        // Before there are threads: they inherit what is blocked.
        let signals = signals()?;

        let path = self
            .socket
            .clone()
            .unwrap_or_else(|| PathBuf::from(format!("ddsnap-{tag}.sock")));
        let path = std::path::absolute(&path)
            .with_context(|| format!("cannot tell where {} is", path.display()))?;
        let name: SocketName = path
            .to_str()
            .context("the socket's path is not UTF-8")?
            .parse()
            .with_context(|| format!("cannot listen on {}", path.display()))?;
        let (listener, _file) = name
            .listen()
            .with_context(|| format!("cannot listen on {}", path.display()))?;
        let listener = UnixListener::from(listener);
        let snapshot = Arc::new(Snapshot::open(devices, tag)?);
        announce(&format!("{}\n", uri(&path)))?;
        serve(&listener, &signals, &snapshot).context("cannot wait for clients")?;
        Ok(0)
    }
}

/// What NBD clients take for the socket; RFC 3986, of which only what is reserved there is quoted.
fn uri(path: &Path) -> String {
    let mut uri = String::from("nbd+unix:///?socket=");
    for byte in path.as_os_str().as_encoded_bytes() {
        match byte {
            b'/' | b'-' | b'.' | b'_' | b'~' => uri.push(char::from(*byte)),
            byte if byte.is_ascii_alphanumeric() => uri.push(char::from(*byte)),
            byte => uri.push_str(&format!("%{byte:02X}")),
        }
    }
    uri
}

/// Takes clients in until a signal comes.
fn serve(listener: &UnixListener, signals: &OwnedFd, snapshot: &Arc<Snapshot>) -> io::Result<()> {
    let clients = Arc::new(AtomicUsize::new(0));
    loop {
        let mut fds = [
            PollFd::new(signals.as_fd(), PollFlags::POLLIN),
            PollFd::new(listener.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut fds, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            other => other?,
        };
        if fds[0].any() != Some(false) {
            return Ok(());
        }
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // The client has gone again; others may come.
            Err(error) if is_passing(&error) => continue,
            Err(error) => return Err(error),
        };
        if let Err(why) = take_in(stream, snapshot, &clients) {
            complain(format_args!("ddsnap: a client was turned away: {why}"));
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

/// Serves a client in a thread of its own.
fn take_in(
    stream: UnixStream,
    snapshot: &Arc<Snapshot>,
    clients: &Arc<AtomicUsize>,
) -> io::Result<()> {
    if !peer_is_trusted(&stream)? {
        return Err(io::Error::other("it runs as another user"));
    }
    // Only this thread adds.
    if clients.load(Ordering::Relaxed) >= MAX_CLIENTS {
        return Err(io::Error::other(format!("{MAX_CLIENTS} are there already")));
    }
    let place = Place::take(clients);
    let snapshot = Arc::clone(snapshot);
    std::thread::Builder::new()
        .name("client".into())
        .spawn(move || {
            let _place = place;
            match talk(&stream, snapshot.as_ref(), HANDSHAKE) {
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    complain(format_args!("ddsnap: a client does not speak NBD: {error}"));
                }
                // It has left, in whatever way.
                _ => {}
            }
        })?;
    Ok(())
}

/// Serves a client, who has so long to say what it wants; then it may be silent as long as it likes.
fn talk(stream: &UnixStream, export: &dyn Exported, handshake: Duration) -> io::Result<()> {
    stream.set_write_timeout(Some(handshake))?;
    let end = Cell::new(Some(Instant::now() + handshake));
    let mut input = BufReader::new(Until { stream, end: &end });
    let mut output = stream;
    nbd::serve(&mut input, &mut output, export, &mut || {
        end.set(None);
        stream.set_read_timeout(None)?;
        stream.set_write_timeout(None)
    })
}

/// Reads until a moment, if there is one, however slowly what is read comes.
struct Until<'a> {
    stream: &'a UnixStream,
    end: &'a Cell<Option<Instant>>,
}

impl Read for Until<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if let Some(end) = self.end.get() {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::ErrorKind::TimedOut.into());
            }
            self.stream.set_read_timeout(Some(left))?;
        }
        self.stream.read(into)
    }
}

/// A client's place among those there may be.
struct Place(Arc<AtomicUsize>);

impl Place {
    fn take(clients: &Arc<AtomicUsize>) -> Place {
        clients.fetch_add(1, Ordering::Relaxed);
        Place(Arc::clone(clients))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What is served. A view stays in one thread: this one asks it.
struct Snapshot {
    questions: Sender<Question>,
    name: String,
    len_bytes: u64,
    chunk_bytes: u64,
}

/// Bytes to be read from the view: whole chunks.
struct Question {
    first: Chunk,
    len: usize,
    answer: Sender<Result<Vec<u8>>>,
}

impl Snapshot {
    /// Opens the store in a thread of its own, and finds the snapshot there.
    fn open(devices: &[PathBuf], tag: SnapTag) -> Result<Snapshot> {
        let devices = devices.to_vec();
        let (tell, found) = mpsc::channel();
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || {
                let opened = offline::view(&devices[0], &devices[1], devices.get(2));
                let (questions, asked) = mpsc::channel();
                match opened.and_then(|view| Ok((Snapshot::of(&view, tag, questions)?, view))) {
                    Ok((snapshot, view)) => {
                        // Nobody is there to hear it, or to ask, only if the command ends.
                        let _ = tell.send(Ok(snapshot));
                        answer(view, tag, &asked);
                    }
                    Err(error) => drop(tell.send(Err(error))),
                }
            })
            .context("cannot start a thread")?;
        found.recv().context("reading the store broke off")?
    }

    fn of(view: &View, tag: SnapTag, questions: Sender<Question>) -> Result<Snapshot> {
        let Some(info) = view.snapshot(tag) else {
            bail!("could not export snapshot {tag} because snapshot doesn't exist");
        };
        match info.state {
            SnapState::Live => {}
            SnapState::Squashed => {
                bail!("could not export snapshot {tag} because snapshot is squashed");
            }
            SnapState::Bookmark => {
                bail!(
                    "could not export snapshot {tag} because it is a bookmark, which keeps no data"
                );
            }
        }
        Ok(Snapshot {
            questions,
            name: tag.to_string(),
            len_bytes: info.length.to_bytes(),
            chunk_bytes: view.status().chunk.bytes(),
        })
    }

    /// Reads whole chunks.
    fn chunks(&self, first: Chunk, len: usize) -> Result<Vec<u8>> {
        let (answer, answered) = mpsc::channel();
        let question = Question { first, len, answer };
        let asked = self.questions.send(question);
        asked.ok().context("the store's thread has ended")?;
        answered.recv().context("the store's thread has ended")?
    }
}

/// Answers until nobody can ask any more.
fn answer(mut view: View, tag: SnapTag, asked: &Receiver<Question>) {
    let mut told = 0;
    for Question { first, len, answer } in asked {
        let mut buffer = AlignedBuf::zeroed(len);
        let result = match view.read(tag, first, &mut buffer) {
            Ok(Ok(())) => Ok(buffer.to_vec()),
            Ok(Err(refused)) => Err(anyhow!("{refused}; is that its origin?")),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = &result {
            told += 1;
            if told <= MAX_COMPLAINTS {
                complain(format_args!(
                    "ddsnap: cannot read snapshot {tag}: {error:#}"
                ));
            } else if told == MAX_COMPLAINTS + 1 {
                complain("ddsnap: further errors of reading are not told");
            }
        }
        // A client that has gone needs none.
        let _ = answer.send(result);
    }
}

impl Exported for Snapshot {
    fn name(&self) -> &str {
        &self.name
    }

    fn len_bytes(&self) -> u64 {
        self.len_bytes
    }

    fn preferred_bytes(&self) -> u32 {
        // A chunk has at most 1 MiB.
        self.chunk_bytes.clamp(4096, 1 << 20) as u32
    }

    fn read(&self, offset: u64, into: &mut [u8]) -> io::Result<()> {
        let chunk = self.chunk_bytes;
        let window = WINDOW_BYTES.max(chunk);
        let mut done = 0;
        while done < into.len() {
            let at = offset + done as u64;
            let start = at / chunk * chunk;
            let end = (offset + into.len() as u64).min(start + window);
            let len = (end - start).div_ceil(chunk) * chunk;
            let chunks = self.chunks(Chunk(start / chunk), len as usize);
            let chunks = chunks.map_err(io::Error::other)?;
            let part = &chunks[(at - start) as usize..(end - start) as usize];
            into[done..done + part.len()].copy_from_slice(part);
            done += part.len();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn a_path_is_quoted_for_a_uri() {
        let uri = uri(Path::new("/run/a b/vol(0)&x.sock"));
        assert_eq!(uri, "nbd+unix:///?socket=/run/a%20b/vol%280%29%26x.sock");
    }

    struct Tiny;

    impl Exported for Tiny {
        fn name(&self) -> &str {
            "1"
        }

        fn len_bytes(&self) -> u64 {
            512
        }

        fn preferred_bytes(&self) -> u32 {
            4096
        }

        fn read(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
            Ok(())
        }
    }

    /// Each byte had the whole time again: sixteen clients that said one now and then, or heard none of the answers,
    /// kept all others out.
    #[test]
    fn who_does_not_say_in_time_what_it_wants_is_left() {
        let option = [&b"IHAVEOPT"[..], &[0, 0, 0, 3, 0, 0, 0, 0]].concat();
        for (pause, per_write) in [(Duration::from_millis(20), 1), (Duration::ZERO, 4096)] {
            let (ours, theirs) = UnixStream::pair().unwrap();
            let begin = Instant::now();
            let options = option.repeat(1000);
            let client = std::thread::spawn(move || {
                let mut theirs = theirs;
                theirs.write_all(&3u32.to_be_bytes()).unwrap();
                for part in options.chunks(per_write).cycle() {
                    let late = begin.elapsed() > Duration::from_secs(15);
                    if late || theirs.write_all(part).is_err() {
                        return;
                    }
                    std::thread::sleep(pause);
                }
            });
            talk(&ours, &Tiny, Duration::from_millis(300)).unwrap_err();
            assert!(begin.elapsed() < Duration::from_secs(10));
            drop(ours);
            client.join().unwrap();
        }
    }
}
