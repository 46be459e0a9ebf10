// SPDX-License-Identifier: GPL-2.0-only
//! Reading and writing a volume's devices, and listing what changed between its snapshots.

use std::collections::VecDeque;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use ddsnap::client::Client;
use ddsnap::units::{ChunkRun, ChunkShift, Sectors, SnapTag};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

use crate::replication::link::LOOK;

/// Pages of a list that wait before a further one is taken without haste.
const PAGES: usize = 16;
/// Then one is taken so often: a server leaves who takes nothing for a minute, and a page's data may be under way for
/// longer. It has 64 KiB at most, so that is 2 KiB a second.
const TAKE_EVERY: Duration = Duration::from_secs(30);
/// Longest wait for a page: a server that lists tells now and then that it does.
const LIST_DEADLINE: Duration = Duration::from_secs(120);

/// An open device.
#[derive(Debug)]
pub struct Device {
    file: File,
    path: PathBuf,
    chunk: ChunkShift,
    length: Sectors,
}

impl Device {
    /// Opens `path`, which has so many sectors. Runs are in chunks of `chunk`.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn open(path: &Path, write: bool, chunk: ChunkShift, length: Sectors) -> Result<Device> {
        let file = File::options().read(true).write(write).open(path);
        Ok(Device {
            file: file.with_context(|| format!("could not open {}", path.display()))?,
            path: path.to_owned(),
            chunk,
            length,
        })
    }

    /// Has what is read from now on come from the disk, as far as nobody holds it in memory.
    pub fn forget_cache(&self) {
        // What is dirty or mapped stays, and a device that cannot is read as it is.
        let _ = posix_fadvise(&self.file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    }

    /// Reads as much of a run as there is.
    ///
    /// # Errors
    /// The read failed.
    pub fn read(&self, run: ChunkRun, into: &mut Vec<u8>) -> Result<()> {
        into.resize(run.bytes_within(self.length, self.chunk) as usize, 0);
        let at = run.first.to_offset(self.chunk);
        let read = self.file.read_exact_at(into, at);
        read.with_context(|| format!("could not read {} at byte {at}", self.path.display()))?;
        // Read once: others need the memory more.
        let (start, bytes) = (i64::try_from(at).unwrap_or(i64::MAX), into.len() as i64);
        let _ = posix_fadvise(
            &self.file,
            start,
            bytes,
            PosixFadviseAdvice::POSIX_FADV_DONTNEED,
        );
        Ok(())
    }

    /// Writes from the beginning of a run on.
    ///
    /// # Errors
    /// The write failed.
    pub fn write(&self, run: ChunkRun, data: &[u8]) -> Result<()> {
        let at = run.first.to_offset(self.chunk);
        let written = self.file.write_all_at(data, at);
        written.with_context(|| format!("could not write {} at byte {at}", self.path.display()))
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// The flush failed.
    pub fn flush(&self) -> Result<()> {
        let flushed = self.file.sync_data();
        flushed.with_context(|| format!("could not flush {}", self.path.display()))
    }
}

/// What changed between two snapshots, as the server lists it.
#[derive(Debug)]
pub struct Changes {
    pages: Arc<Pages>,
    page: Vec<ChunkRun>,
    failed: bool,
}

/// What was taken of a list and is not wanted yet.
#[derive(Debug, Default)]
struct Pages {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    pages: VecDeque<Result<Vec<ChunkRun>>>,
    /// No more come.
    ended: bool,
    /// No more are wanted.
    left: bool,
}

impl Pages {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one, and waits until there is room for more, but no longer than `every`. Whether more are wanted.
    fn put(&self, page: Result<Vec<ChunkRun>>, every: Duration) -> bool {
        let mut state = self.lock();
        state.pages.push_back(page);
        self.changed.notify_all();
        let full = |state: &mut State| state.pages.len() >= PAGES && !state.left;
        let waited = self.changed.wait_timeout_while(state, every, full);
        !waited.unwrap_or_else(PoisonError::into_inner).0.left
    }

    /// The next one, if there is any; an error soon after it is `cancelled`.
    fn take(&self, cancelled: &dyn Fn() -> bool) -> Option<Result<Vec<ChunkRun>>> {
        let empty = |state: &mut State| state.pages.is_empty() && !state.ended;
        let mut state = self.lock();
        while empty(&mut state) {
            if cancelled() {
                return Some(Err(anyhow!("it was cancelled")));
            }
            let waited = self.changed.wait_timeout_while(state, LOOK, empty);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let page = state.pages.pop_front();
        self.changed.notify_all();
        page
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }
}

/// Says at its end that no more pages come, however that comes.
struct Listing(Arc<Pages>);

impl Drop for Listing {
    fn drop(&mut self) {
        self.0.change(|state| {
            if thread::panicking() {
                let broken = anyhow!("the list of changes broke off");
                state.pages.push_back(Err(broken));
            }
            state.ended = true;
        });
    }
}

impl Changes {
    /// Begins the list from `from` (none: all chunks) to `to`.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn list(server: &Path, from: Option<u32>, to: u32) -> Result<Changes> {
        Changes::list_taking(server, (from, to), TAKE_EVERY)
    }

    fn list_taking(
        server: &Path,
        (from, to): (Option<u32>, u32),
        every: Duration,
    ) -> Result<Changes> {
        let server = server.to_string_lossy().into_owned();
        let pages = Arc::new(Pages::default());
        let listing = Listing(pages.clone());
        // The list holds a connection of its own, which goes when nobody wants more of it.
        thread::Builder::new()
            .name("replication-list".into())
            .spawn(move || {
                let list = || {
                    let mut client = Client::connect_within(&server, LIST_DEADLINE)?;
                    let mut list = client.changelist(from.map(SnapTag), SnapTag(to))?;
                    while let Some(runs) = list.next_runs(&mut |_, _| {})? {
                        if !listing.0.put(Ok(runs), every) {
                            return Ok(());
                        }
                    }
                    Ok(())
                };
                if let Err(error) = list() {
                    let error: anyhow::Error = error;
                    let error = error.context("could not list what changed");
                    listing.0.put(Err(error), Duration::ZERO);
                }
            })?;
        Ok(Changes {
            pages,
            page: Vec::new(),
            failed: false,
        })
    }

    /// The next run, ascending; none at the end.
    ///
    /// # Errors
    /// The list broke off, or was `cancelled` while a page was waited for.
    pub fn next_run(&mut self, cancelled: &dyn Fn() -> bool) -> Result<Option<ChunkRun>> {
        if self.failed {
            return Err(anyhow!("the list of changes broke off"));
        }
        loop {
            if let Some(run) = self.page.pop() {
                return Ok(Some(run));
            }
            match self.pages.take(cancelled) {
                None => return Ok(None),
                Some(Ok(mut page)) => {
                    page.reverse();
                    self.page = page;
                }
                Some(Err(error)) => {
                    self.failed = true;
                    return Err(error);
                }
            }
        }
    }
}

impl Drop for Changes {
    fn drop(&mut self) {
        self.pages.change(|state| state.left = true);
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;

    use ddsnap::protocol::control::{MAX_RUNS, Reply};
    use ddsnap::units::Chunk;

    use super::*;

    /// A cycle whose server took long over its list could not be cancelled for two minutes, and the volume not be stopped.
    #[test]
    fn a_list_that_does_not_come_is_not_waited_for_when_it_is_cancelled() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("server");
        // It takes the connection and says nothing, until the test is over.
        let _listener = UnixListener::bind(&path).expect("bound");
        let mut changes = Changes::list(&path, None, 2).expect("begun");
        let looks = std::cell::Cell::new(0);
        let cancelled = || looks.replace(looks.get() + 1) == 1;
        let error = changes.next_run(&cancelled).expect_err("cancelled");
        assert_eq!(
            (error.to_string().as_str(), looks.get()),
            ("it was cancelled", 2)
        );
        let error = changes.next_run(&|| false).expect_err("for good");
        assert_eq!(error.to_string(), "the list of changes broke off");
    }

    /// The data of a page took longer than a minute on a slow line, and the server left who took no page meanwhile: of
    /// scattered changes no more than some pages were ever sent at a time.
    #[test]
    fn pages_are_taken_also_when_nobody_wants_them_yet() {
        const COUNT: u64 = 60;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("server");
        let listener = UnixListener::bind(&path).expect("bound");
        let run = |number: u64| ChunkRun {
            first: Chunk(2 * number),
            chunks: 1,
        };
        let (sender, all_taken) = mpsc::channel();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            stream.read_exact(&mut [0; 16]).expect("a request");
            let mut say = |reply: Reply| stream.write_all(&reply.to_frame().encode());
            let head = Reply::Changelist {
                chunk: ChunkShift::MIN,
                from: Sectors(0),
                to: Sectors(1 << 30),
            };
            say(head).expect("taken");
            for page in 0..COUNT {
                let first = page * MAX_RUNS as u64;
                let runs = (first..first + MAX_RUNS as u64).map(run).collect();
                let last = page == COUNT - 1;
                say(Reply::Changes { last, runs }).expect("taken");
            }
            // Nobody listens if the test has failed.
            let _ = sender.send(());
        });
        let every = Duration::from_millis(10);
        let mut changes = Changes::list_taking(&path, (None, 2), every).expect("begun");
        let taken = all_taken.recv_timeout(Duration::from_secs(20));
        taken.expect("all pages are taken");
        for number in 0..COUNT * MAX_RUNS as u64 {
            assert_eq!(
                changes.next_run(&|| false).expect("listed"),
                Some(run(number))
            );
        }
        assert_eq!(changes.next_run(&|| false).expect("listed"), None);
    }
}
