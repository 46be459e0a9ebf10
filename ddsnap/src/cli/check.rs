// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap check`: what is wrong with a store.

use std::path::{Path, PathBuf};

use anyhow::Result;
use clap::Args;
use indicatif::ProgressBar;
use serde::Serialize;

use super::status::DOUBTFUL;
use super::{offline, progress};
use crate::device::BlockDevice;
use crate::device::uring::Access;
use crate::server::start::open_device;
use crate::stdio::{announce, complain, print};
use crate::store::StoreError;
use crate::store::check::{
    CheckDevices, CheckOptions, Checked, Event, Place, Problem, Repaired, Severity, check, repair,
};

/// Schema of `--json`.
const SCHEMA: &str = "ddsnap-check-1";
/// Exit code: the store is sound again, but snapshots were lost.
const WITH_LOSS: u8 = 2;

/// Prove a store against itself: superblock, journal, index, space map, counts and checksums.
///
/// Prints everything that is wrong, a line for each. Writes nothing without --repair, and reads the journal as
/// opening would. A store that a server holds is refused. After a power cut it may depend on the origin whether
/// the last journal record is whole: give it with --origin. Exit code 0: sound, or repaired and nothing lost; 1:
/// something is wrong, or cannot be decided, or could not be repaired; 2: repaired, but snapshots were lost; 99: no
/// store, or one that this program does not know.
#[derive(Debug, Args)]
pub struct Check {
    /// Device or file that keeps the snapshots.
    #[arg(value_name = "SNAPSTORE")]
    snapstore: PathBuf,
    /// Device or file for metadata, if it has one of its own.
    #[arg(value_name = "METADEV")]
    meta: Option<PathBuf>,
    /// The volume whose snapshots it keeps; only read, and only if the last journal record needs it.
    #[arg(long, value_name = "ORIGIN")]
    origin: Option<PathBuf>,
    /// Make the store sound. What is lost is printed first. Every snapshot that may have lost something is
    /// squashed, all others stay as they are; so copy out before what is still good of them. The new state is
    /// written beside the old, which a power cut leaves as it was.
    #[arg(long)]
    repair: bool,
    /// Do not read the saved data to compare it with its checksums.
    #[arg(long)]
    no_data: bool,
    /// Print one JSON document, of schema ddsnap-check-1; JSON.md documents it.
    #[arg(long)]
    json: bool,
}

impl Check {
    pub fn run(&self) -> Result<u8> {
        let meta = self.meta.as_deref();
        let _lock = match self.repair {
            true => Vec::new(), // each device that is written has its own
            false => offline::share(&self.snapstore, meta)?,
        };
        let open = |path: &Path| -> Result<Box<dyn BlockDevice>> {
            Ok(Box::new(match self.repair {
                true => offline::hold(path)?,
                false => open_device(path, Access::Read)?,
            }))
        };
        let devices = CheckDevices {
            meta: meta.map(open).transpose()?,
            data: open(&self.snapstore)?,
            origin: match &self.origin {
                Some(origin) => Some(Box::new(open_device(origin, Access::Read)?)),
                None => None,
            },
        };
        let options = CheckOptions {
            cache_bytes: offline::CACHE_BYTES,
            data: !self.no_data,
        };
        let mut printer = Printer::new(self.json, self.repair)?;
        let mut tell = |event| printer.event(&event);
        let examined = match self.repair {
            false => check(devices, &options, &mut tell).map(|checked| (checked, None)),
            true => repair(devices, &options, &mut tell)
                .map(|(checked, repaired)| (checked, Some(repaired))),
        };
        let (checked, repaired) = match examined {
            Ok(examined) => examined,
            Err(StoreError::Untold) => return Err(printer.failed()),
            // The problems were told: there is a store, and it is as it was.
            Err(error) if printer.repairing => {
                return Err(anyhow::Error::from(error).context("the store was not repaired"));
            }
            Err(error) => return Err(offline::Unsound(error).into()),
        };
        printer.bar.finish_and_clear();
        match (printer.end(&checked, repaired), repaired) {
            // What was lost was named before; that it is done must show in the exit code.
            (Err(error), Some(Repaired::WithLoss)) => complain(format_args!("ddsnap: {error:#}")),
            (ended, _) => ended?,
        }
        Ok(match repaired {
            None => u8::from(checked.problems > 0),
            Some(Repaired::Sound | Repaired::Whole) => 0,
            Some(Repaired::Undecided) => 1,
            Some(Repaired::WithLoss) => WITH_LOSS,
        })
    }
}

/// Prints problems as they are found: there may be more than memory holds.
struct Printer {
    bar: ProgressBar,
    json: bool,
    /// What will be given up must have been read, what is only told need not.
    print: fn(&str) -> Result<()>,
    printed: u64,
    /// A repair has begun to write, and squashes these.
    repairing: bool,
    squashed: Vec<u32>,
    /// Why a problem could not be printed.
    failure: Option<anyhow::Error>,
}

impl Printer {
    fn new(json: bool, repair: bool) -> Result<Printer> {
        Ok(Printer {
            bar: progress::counting()?,
            json,
            print: if repair { announce } else { print },
            printed: 0,
            repairing: false,
            squashed: Vec::new(),
            failure: None,
        })
    }

    /// Prints an event. A problem that nobody could read ends the check: nothing may be given up that
    /// was not named.
    fn event(&mut self, event: &Event) -> Result<(), StoreError> {
        let printed = match event {
            Event::Progress(done, all) => {
                self.bar.set_length(*all);
                self.bar.set_position(*done);
                Ok(())
            }
            Event::GivesUp(tags) => {
                self.repairing = true;
                self.squashed = tags.iter().map(|tag| tag.0).collect();
                match self.json {
                    true => Ok(()),
                    false => (self.print)(&format!("repairing: {}\n", gives_up(&self.squashed))),
                }
            }
            Event::Problem(problem) => {
                let printed = self.bar.suspend(|| self.problem(problem));
                self.printed += 1;
                printed
            }
        };
        printed.map_err(|error| {
            self.failure = Some(error);
            StoreError::Untold
        })
    }

    /// Why the check has ended.
    fn failed(self) -> anyhow::Error {
        let what = "the check has ended, and nothing was written to the store";
        self.failure
            .unwrap_or_else(|| StoreError::Untold.into())
            .context(what)
    }

    fn problem(&self, problem: &Problem) -> Result<()> {
        if !self.json {
            return (self.print)(&format!("{problem}\n"));
        }
        let start = match self.printed {
            0 => head(),
            _ => ",\n".to_owned(),
        };
        let problem = serde_json::to_string(&ProblemObject::from(problem))?;
        (self.print)(&format!("{start}    {problem}"))
    }

    fn end(self, checked: &Checked, repaired: Option<Repaired>) -> Result<()> {
        if !self.json {
            return print(&(summary(checked) + repaired.map_or("", outcome)));
        }
        let start = match self.printed {
            0 => head(),
            _ => "\n".to_owned(),
        };
        let counts = serde_json::to_string(&CountsObject::from(checked))?;
        let sound = checked.problems == 0;
        let repair = repaired.map(|repaired| {
            let result = match repaired {
                Repaired::Sound => "sound",
                Repaired::Whole => "repaired",
                Repaired::WithLoss => "repaired with loss",
                Repaired::Undecided => "undecided",
            };
            serde_json::json!({"result": result, "squashed": self.squashed})
        });
        let repair = serde_json::to_string(&repair)?;
        let doubtful: Vec<u32> = checked.doubtful.iter().map(|tag| tag.0).collect();
        let doubtful = serde_json::to_string(&doubtful)?;
        print(&format!(
            "{start}  ],\n  \"doubtful\": {doubtful},\n  \"sound\": {sound},\n  \"counts\": {counts},\n  \"repair\": {repair}\n}}\n"
        ))
    }
}

fn head() -> String {
    format!("{{\n  \"schema\": \"{SCHEMA}\",\n  \"problems\": [\n")
}

fn gives_up(tags: &[u32]) -> String {
    let tags: Vec<String> = tags.iter().map(u32::to_string).collect();
    match &tags[..] {
        [] => "no snapshot is squashed".to_owned(),
        [tag] => format!("snapshot {tag} is squashed"),
        tags => format!("snapshots {} are squashed", tags.join(", ")),
    }
}

fn outcome(repaired: Repaired) -> &'static str {
    match repaired {
        Repaired::Sound => "",
        Repaired::Whole => "repaired: nothing was lost\n",
        Repaired::WithLoss => "repaired: what is named above was lost\n",
        Repaired::Undecided => "not repaired: give the origin with --origin\n",
    }
}

fn summary(checked: &Checked) -> String {
    let Checked {
        problems,
        losses,
        undecided,
        snapshots,
        used_chunks,
        used_blocks,
        replayed_records,
        doubtful,
    } = checked;
    let counts = format!(
        "{snapshots} snapshots, {used_chunks} store chunks and {used_blocks} metadata blocks in use, \
         {replayed_records} journal records to replay"
    );
    let doubtful: String = doubtful
        .iter()
        .map(|tag| format!("snapshot {tag} is doubtful: {DOUBTFUL}\n"))
        .collect();
    let summary = match problems {
        0 => format!("sound: {counts}\n"),
        _ => format!(
            "{problems} problems, {losses} of them lost something, {undecided} cannot be decided: {counts}\n"
        ),
    };
    doubtful + &summary
}

#[derive(Serialize)]
struct ProblemObject<'p> {
    device: &'p str,
    place: PlaceObject,
    severity: &'static str,
    snapshots: Vec<u32>,
    text: String,
}

#[derive(Serialize)]
struct PlaceObject {
    kind: &'static str,
    number: Option<u64>,
}

#[derive(Serialize)]
struct CountsObject {
    problems: u64,
    losses: u64,
    undecided: u64,
    snapshots: u64,
    used_chunks: u64,
    used_metadata_blocks: u64,
    replayed_records: u64,
}

impl<'p> From<&'p Problem> for ProblemObject<'p> {
    fn from(problem: &'p Problem) -> Self {
        let (kind, number) = match problem.place {
            Place::Superblock(copy) => ("superblock", Some(u64::from(copy))),
            Place::Journal => ("journal", None),
            Place::Block(block) => ("metadata block", Some(block.0)),
            Place::Chunk(chunk) => ("store chunk", Some(chunk.0)),
            Place::Store => ("store", None),
        };
        ProblemObject {
            device: &problem.device,
            place: PlaceObject { kind, number },
            severity: match problem.severity {
                Severity::Mendable => "mendable",
                Severity::Loss => "loss",
                Severity::Undecided => "undecided",
            },
            snapshots: problem.snapshots.iter().map(|tag| tag.0).collect(),
            text: problem.to_string(),
        }
    }
}

impl From<&Checked> for CountsObject {
    fn from(checked: &Checked) -> Self {
        CountsObject {
            problems: checked.problems,
            losses: checked.losses,
            undecided: checked.undecided,
            snapshots: checked.snapshots,
            used_chunks: checked.used_chunks,
            used_metadata_blocks: checked.used_blocks,
            replayed_records: checked.replayed_records,
        }
    }
}
