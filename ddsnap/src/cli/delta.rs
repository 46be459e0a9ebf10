// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap delta`.

use std::fs::File;
use std::io::{BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};

use super::delta_mode::DeltaMode;
use super::listen::Listen;
use super::new_file::NewFile;
use super::progress::bar;
use super::{refused, snap_tag};
use crate::client::{Client, ClientError, SnapshotState};
use crate::delta::changelist::{self, ChangelistWriter};
use crate::delta::extent::MAX_EXTENT_BYTES;
use crate::delta::volume::snapshot_path;
use crate::delta::{Header, Side, apply, create};
use crate::device::lock::{LockError, share_store};
use crate::units::SnapTag;

/// Files of what differs between two snapshots.
#[derive(Debug, Args)]
#[command(arg_required_else_help = true, subcommand_required = true)]
pub struct Delta {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Changelist(Changelist),
    Create(Create),
    Apply(Apply),
    Listen(Listen),
}

impl Delta {
    pub fn run(&self) -> Result<u8> {
        match &self.command {
            Command::Changelist(command) => command.run(),
            Command::Create(command) => command.run(),
            Command::Apply(command) => command.run(),
            Command::Listen(command) => command.run(),
        }
    }
}

/// Write a list of the chunks that differ between snapshots A and B.
///
/// With one snapshot the list has all of its chunks. A may be a bookmark: then the list has what changed since. While
/// it is made neither can be deleted. A delta needs the data of both.
#[derive(Debug, Args)]
pub struct Changelist {
    /// The server's control socket: a path, or @NAME for an abstract one.
    #[arg(value_name = "SOCK")]
    socket: String,
    /// The file to write; one that is there is replaced.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// The snapshot that the other side has, and the one it is to get.
    #[arg(value_names = ["A", "B"], num_args = 1..=2, required = true, value_parser = snap_tag)]
    #[arg(allow_negative_numbers = true)]
    tags: Vec<SnapTag>,
}

impl Changelist {
    fn run(&self) -> Result<u8> {
        let (from, to) = match self.tags[..] {
            [from, to] => (Some(from), to),
            _ => (None, self.tags[0]),
        };
        match self.write(from, to) {
            Ok(()) => Ok(0),
            Err(error) => match error.downcast::<ClientError>() {
                Ok(error) => refused(&self.verb(), Err(error)),
                Err(error) => Err(error),
            },
        }
    }

    /// What could not be done, with the snapshot that is in the way if there is one.
    fn verb(&self) -> String {
        let unusable = Client::connect(&self.socket).ok().and_then(|mut client| {
            let (last, firsts) = self.tags.split_last()?;
            let mut state = |tag| client.state(tag).ok().flatten();
            let usable =
                |state| matches!(state, Some(SnapshotState::Live | SnapshotState::Bookmark));
            let first = firsts.iter().copied().find(|&tag| !usable(state(tag)));
            first.or_else(|| (state(*last) != Some(SnapshotState::Live)).then_some(*last))
        });
        match unusable {
            Some(tag) => format!("list the changes of snapshot {tag}"),
            None => "list the changes".to_owned(),
        }
    }

    fn write(&self, from: Option<SnapTag>, to: SnapTag) -> Result<()> {
        let mut client = Client::connect(&self.socket)?;
        let mut list = client.changelist(from, to)?;
        let length = list.from;
        let header = Header {
            chunk: list.chunk,
            from: from.map(|tag| Side { tag, length }),
            to: Side {
                tag: to,
                length: list.to,
            },
        };
        let failed = || format!("cannot write {}", self.file.display());
        let new = NewFile::create(&self.file, &[])?;
        let out = BufWriter::new(new.file());
        let mut out = ChangelistWriter::new(out, &header).with_context(failed)?;
        let bar = bar()?;
        let mut progress = |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        };
        while let Some(runs) = list.next_runs(&mut progress)? {
            for run in runs {
                out.push(run).with_context(failed)?;
            }
        }
        bar.finish_and_clear();
        let (mut out, _) = out.finish().with_context(failed)?;
        out.flush().with_context(failed)?;
        drop(out);
        new.publish(true)
    }
}

/// Write a delta: the data of the chunks in a changelist.
///
/// It is read from the snapshots' devices, or files, STEM(A) and STEM(B).
#[derive(Debug, Args)]
pub struct Create {
    #[command(flatten)]
    mode: DeltaMode,
    /// The changelist.
    #[arg(value_name = "CHANGELIST")]
    changelist: PathBuf,
    /// The file to write; one that is there is replaced.
    #[arg(value_name = "DELTA")]
    delta: PathBuf,
    /// The volume's device: its snapshots are STEM(A) and STEM(B).
    #[arg(value_name = "STEM")]
    stem: PathBuf,
}

impl Create {
    fn run(&self) -> Result<u8> {
        let unusable = || format!("cannot use {}", self.changelist.display());
        // All of it is looked at before the first byte is written.
        let (header, chunks) =
            changelist::verify(open(&self.changelist)?).with_context(unusable)?;
        let sides = header.from.into_iter().chain([header.to]);
        let snapshots: Vec<PathBuf> = sides
            .map(|side| snapshot_path(&self.stem, side.tag))
            .collect();
        let inputs = snapshots.iter().chain([&self.changelist, &self.stem]);
        let inputs: Vec<&Path> = inputs.map(PathBuf::as_path).collect();
        let new = NewFile::create(&self.delta, &inputs)?;
        let bar = bar()?;
        bar.set_length(chunks << header.chunk.get());
        let mut encoder = self.mode.encoder();
        let list = open(&self.changelist)?;
        let mut progress = |done, _| bar.set_position(done);
        create::create(list, &self.stem, &mut encoder, new.file(), &mut progress)
            .with_context(|| format!("cannot make {}", self.delta.display()))?;
        bar.finish_and_clear();
        new.publish(true)?;
        Ok(0)
    }
}

/// Apply a delta to STEM, which has the content of the delta's first snapshot.
///
/// What was there is read from STEM(A), a device or file, and compared before anything is written. STEM
/// gets the content of the second snapshot; a plain file also its length. After an interruption apply
/// the delta again.
#[derive(Debug, Args)]
pub struct Apply {
    /// The delta.
    #[arg(value_name = "DELTA")]
    delta: PathBuf,
    /// The volume's device, or a file.
    #[arg(value_name = "STEM")]
    stem: PathBuf,
}

impl Apply {
    fn run(&self) -> Result<u8> {
        // Writes to a served volume's own origin go round its server: snapshots would change with it.
        let _lock = match share_store(&self.stem) {
            Err(error @ LockError::Held(_)) => {
                return Err(error).with_context(|| format!("cannot write {}", self.stem.display()));
            }
            // What cannot be opened is told below.
            other => other.ok(),
        };
        let bar = bar()?;
        let mut progress = |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        };
        let applied = apply::apply(open(&self.delta)?, &self.stem, &mut progress);
        bar.finish_and_clear();
        applied.with_context(|| {
            format!(
                "cannot apply {} to {}",
                self.delta.display(),
                self.stem.display()
            )
        })?;
        Ok(0)
    }
}

fn open(path: &Path) -> Result<BufReader<File>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    Ok(BufReader::with_capacity(MAX_EXTENT_BYTES, file))
}
