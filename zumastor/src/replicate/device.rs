// SPDX-License-Identifier: GPL-2.0-only
//! Reading and writing a volume's devices, and listing what changed between its snapshots.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use ddsnap::client::Client;
use ddsnap::units::{ChunkRun, ChunkShift, Sectors, SnapTag};
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// Pages of a list that may wait.
const PAGES: usize = 16;
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
    pages: Receiver<Result<Vec<ChunkRun>>>,
    page: Vec<ChunkRun>,
    failed: bool,
}

impl Changes {
    /// Begins the list from `from` (none: all chunks) to `to`.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn list(server: &Path, from: Option<u32>, to: u32) -> Result<Changes> {
        let server = server.to_string_lossy().into_owned();
        let (sender, pages) = mpsc::sync_channel(PAGES);
        // The list holds a connection of its own, which goes when nobody wants more of it.
        thread::Builder::new()
            .name("replication-list".into())
            .spawn(move || {
                let list = || {
                    let mut client = Client::connect_within(&server, LIST_DEADLINE)?;
                    let mut list = client.changelist(from.map(SnapTag), SnapTag(to))?;
                    while let Some(runs) = list.next_runs(&mut |_, _| {})? {
                        if sender.send(Ok(runs)).is_err() {
                            return Ok(());
                        }
                    }
                    Ok(())
                };
                if let Err(error) = list() {
                    let error: anyhow::Error = error;
                    let error = error.context("could not list what changed");
                    let _ = sender.send(Err(error));
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
    /// The list broke off.
    pub fn next_run(&mut self) -> Result<Option<ChunkRun>> {
        if self.failed {
            return Err(anyhow!("the list of changes broke off"));
        }
        loop {
            if let Some(run) = self.page.pop() {
                return Ok(Some(run));
            }
            match self.pages.recv() {
                Err(_) => return Ok(None),
                Ok(Ok(mut page)) => {
                    page.reverse();
                    self.page = page;
                }
                Ok(Err(error)) => {
                    self.failed = true;
                    return Err(error);
                }
            }
        }
    }
}
