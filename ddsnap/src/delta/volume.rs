// SPDX-License-Identifier: GPL-2.0-only
//! The devices or plain files that deltas are made from and applied to: STEM and STEM(TAG).

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use thiserror::Error;

use super::record::Side;
use crate::units::{ChunkRun, ChunkShift, Sectors, SnapTag};

/// Why a device or file cannot be used.
#[derive(Debug, Error)]
pub enum VolumeError {
    /// It cannot be opened.
    #[error("cannot open {path}")]
    Open {
        /// Its name.
        path: String,
        /// What the system says.
        source: io::Error,
    },
    /// It is too short.
    #[error("{path} has {found} bytes, but {wanted} are needed")]
    Short {
        /// Its name.
        path: String,
        /// Its length.
        found: u64,
        /// The length it should have at least.
        wanted: u64,
    },
    /// A read, write or flush failed.
    #[error("cannot {what} {path} at byte {at}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Its name.
        path: String,
        /// Where.
        at: u64,
        /// What the system says.
        source: io::Error,
    },
}

/// The name of a snapshot's device: `STEM(TAG)`.
#[must_use]
pub fn snapshot_path(stem: &Path, tag: SnapTag) -> PathBuf {
    let mut name = stem.as_os_str().to_owned();
    name.push(format!("({tag})"));
    name.into()
}

/// An open device or file.
#[derive(Debug)]
pub struct Volume {
    file: File,
    path: PathBuf,
    chunk: ChunkShift,
    /// As much of it as may be read.
    length: Sectors,
}

impl Volume {
    /// Opens the snapshot `side` of `stem` for reading.
    ///
    /// # Errors
    /// It cannot be opened, or is shorter than the snapshot.
    pub fn snapshot(stem: &Path, side: Side, chunk: ChunkShift) -> Result<Volume, VolumeError> {
        let path = snapshot_path(stem, side.tag);
        let volume = Self::open(&path, false, side.length, chunk)?;
        volume.want(side.length.to_bytes())?;
        Ok(volume)
    }

    /// Opens `path` for writing, which is to get this length. A plain file may be shorter or longer.
    ///
    /// # Errors
    /// It cannot be opened, or is a device and too short.
    pub fn target(path: &Path, length: Sectors, chunk: ChunkShift) -> Result<Volume, VolumeError> {
        let volume = Self::open(path, true, length, chunk)?;
        if !volume.is_plain()? {
            volume.want(length.to_bytes())?;
        }
        Ok(volume)
    }

    fn open(
        path: &Path,
        write: bool,
        length: Sectors,
        chunk: ChunkShift,
    ) -> Result<Volume, VolumeError> {
        let file = OpenOptions::new().read(true).write(write).open(path);
        let file = file.map_err(|source| VolumeError::Open {
            path: path.display().to_string(),
            source,
        })?;
        Ok(Volume {
            file,
            path: path.to_owned(),
            chunk,
            length,
        })
    }

    fn want(&self, wanted: u64) -> Result<(), VolumeError> {
        let found = (&self.file).seek(SeekFrom::End(0));
        let found = found.map_err(|source| self.failed("find the end of", 0, source))?;
        if found < wanted {
            let path = self.path.display().to_string();
            return Err(VolumeError::Short {
                path,
                found,
                wanted,
            });
        }
        Ok(())
    }

    fn is_plain(&self) -> Result<bool, VolumeError> {
        let found = self.file.metadata();
        let found = found.map_err(|source| self.failed("look at", 0, source))?;
        Ok(found.is_file())
    }

    /// Its name, for messages.
    #[must_use]
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }

    /// Reads a run into `into`, as far as there is any of it.
    ///
    /// # Errors
    /// The read failed.
    pub fn read(&self, run: ChunkRun, into: &mut Vec<u8>) -> Result<(), VolumeError> {
        let bytes = run.bytes_within(self.length, self.chunk) as usize;
        into.resize(bytes, 0);
        let at = run.first.to_offset(self.chunk);
        let read = self.file.read_exact_at(into, at);
        read.map_err(|source| self.failed("read", at, source))
    }

    /// As [`read`](Self::read), where a plain file may not be long enough yet: what is missing is left
    /// out.
    ///
    /// # Errors
    /// The read failed.
    pub fn read_present(&self, run: ChunkRun, into: &mut Vec<u8>) -> Result<(), VolumeError> {
        match self.read(run, into) {
            Err(VolumeError::Io { source, .. })
                if source.kind() == io::ErrorKind::UnexpectedEof =>
            {
                into.clear();
                Ok(())
            }
            other => other,
        }
    }

    /// Writes a run.
    ///
    /// # Errors
    /// The write failed.
    pub fn write(&self, run: ChunkRun, from: &[u8]) -> Result<(), VolumeError> {
        let at = run.first.to_offset(self.chunk);
        let written = self.file.write_all_at(from, at);
        written.map_err(|source| self.failed("write", at, source))
    }

    /// Gives a plain file the length it is to have. A device keeps its own.
    ///
    /// # Errors
    /// It cannot be done.
    pub fn set_length(&self) -> Result<(), VolumeError> {
        if !self.is_plain()? {
            return Ok(());
        }
        let bytes = self.length.to_bytes();
        let set = self.file.set_len(bytes);
        set.map_err(|source| self.failed("set the length of", bytes, source))
    }

    /// Makes all writes durable.
    ///
    /// # Errors
    /// The flush failed.
    pub fn flush(&self) -> Result<(), VolumeError> {
        let flushed = self.file.sync_all();
        flushed.map_err(|source| self.failed("flush", 0, source))
    }

    fn failed(&self, what: &'static str, at: u64, source: io::Error) -> VolumeError {
        VolumeError::Io {
            what,
            path: self.name(),
            at,
            source,
        }
    }
}
