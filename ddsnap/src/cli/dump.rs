// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap dump`: everything that a store's metadata says.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use clap::Args;
use serde_json::json;

use super::numbers::ctime;
use super::{offline, refused};
use crate::client::Client;
use crate::device::BlockDevice;
use crate::device::uring::Access;
use crate::format::superblock::{Superblock, TreeRoot};
use crate::server::start::open_device;
use crate::stdio::print;
use crate::store::dump::{DumpEntry, DumpPlace};
use crate::store::{OpenOptions, Opened, SnapState, SnapshotInfo, View};

/// Schema of `--json`.
const SCHEMA: &str = "ddsnap-dump-1";
/// Entries of the index read and printed at a time.
const STEP: usize = 4096;

/// Write the index to the server's log, or print a store without its server.
///
/// With a server's socket: it writes each entry of its index, of the origin's chunks A to B if they are given, to
/// its log. With --offline: superblock, snapshots, and the index with the journal replayed are printed. Nothing
/// is written, and a store that a server holds is refused. Exit code 99: no server, or no sound store; `ddsnap check`
/// says what is wrong with it.
#[derive(Debug, Args)]
#[command(
    override_usage = "ddsnap dump SOCK [A B]\n       ddsnap dump --offline [--json] SNAPSTORE [METADEV]"
)]
pub struct Dump {
    /// The server's control socket and the first and last chunk; or snapshot store and metadata device.
    #[arg(value_name = "OPERAND", num_args = 1..=3, required = true)]
    operands: Vec<String>,
    /// Read the devices themselves.
    #[arg(long)]
    offline: bool,
    /// Print one JSON document, of schema ddsnap-dump-1; JSON.md documents it.
    #[arg(long, requires = "offline")]
    json: bool,
}

impl Dump {
    pub fn run(&self) -> Result<u8> {
        match (&self.operands[..], self.offline) {
            ([socket], false) => self.online(socket, 0, u64::MAX),
            ([socket, first, last], false) => {
                let chunk = |text: &String| {
                    text.parse::<u64>()
                        .map_err(|_| anyhow!("{text} is not the number of a chunk"))
                };
                let (first, last) = (chunk(first)?, chunk(last)?);
                if first > last {
                    bail!("the first chunk, {first}, lies behind the last, {last}");
                }
                self.online(socket, first, last)
            }
            ([snapstore], true) => self.offline(Path::new(snapstore), None),
            ([snapstore, meta], true) => self.offline(Path::new(snapstore), Some(Path::new(meta))),
            _ => bail!("dump takes SOCK, or SOCK A B, or --offline SNAPSTORE [METADEV]"),
        }
    }

    fn online(&self, socket: &str, first: u64, last: u64) -> Result<u8> {
        let dumped = Client::connect(socket)?.dump(first, last);
        refused("dump the tree", dumped.map(|_| 0))
    }

    fn offline(&self, snapstore: &Path, meta: Option<&Path>) -> Result<u8> {
        let _lock = offline::share(snapstore, meta)?;
        let open = |path: &Path| -> Result<Box<dyn BlockDevice>> {
            Ok(Box::new(open_device(path, Access::Read)?))
        };
        let meta = meta.map(open).transpose()?;
        let options = OpenOptions {
            cache_bytes: offline::CACHE_BYTES,
        };
        let data = open(snapstore)?;
        let (mut view, opened, undecided) =
            View::without_origin(data, meta, &options).map_err(offline::Unsound)?;
        if self.json {
            json_head(&view, &opened)?;
            json_entries(&mut view)?;
            let undecided: Vec<_> = undecided.iter().map(numbers).collect();
            print(&format!(
                "  ],\n  \"undecided\": {}\n}}\n",
                json!(undecided)
            ))?;
        } else {
            print(&text_head(&view, &opened))?;
            for_each(&mut view, |entries| {
                let lines: Vec<String> = entries.iter().map(|e| format!("{e}\n")).collect();
                print(&lines.concat())
            })?;
            for entry in undecided {
                print(&format!("perhaps never acknowledged, or lost: {entry}\n"))?;
            }
        }
        Ok(0)
    }
}

fn for_each(view: &mut View, mut visit: impl FnMut(&[DumpEntry]) -> Result<()>) -> Result<()> {
    let mut at = Some(DumpPlace::START);
    while let Some(place) = at {
        let (entries, next) = view.dump_step(place, 0..=u64::MAX, STEP)?;
        visit(&entries)?;
        at = next;
    }
    Ok(())
}

fn uuid_of(superblock: &Superblock) -> String {
    uuid::Uuid::from_bytes(superblock.uuid).to_string()
}

fn text_head(view: &View, opened: &Opened) -> String {
    let superblock = view.superblock();
    let mut text = String::new();
    let _ = writeln!(
        text,
        "store {}, format version {}, created {}",
        uuid_of(superblock),
        superblock.version.number(),
        ctime(superblock.created)
    );
    let _ = match opened.clean {
        true => writeln!(
            text,
            "generation {}, closed in order",
            superblock.generation
        ),
        false => writeln!(
            text,
            "generation {}, not closed in order: {} journal records replayed",
            superblock.generation, opened.replayed_records
        ),
    };
    let status = view.status();
    let _ = writeln!(
        text,
        "chunk size {}; origin {} sectors; data in store chunks {} to {}, {} of {} free",
        superblock.chunk.bytes(),
        superblock.origin,
        superblock.data_first,
        superblock.data_end.0 - 1,
        status.free_chunks,
        status.data_chunks,
    );
    for extent in &superblock.extents {
        let (first, last) = (extent.first, extent.end().0 - 1);
        let _ = writeln!(text, "metadata in blocks {first} to {last}");
    }
    let _ = writeln!(
        text,
        "journal in blocks {} to {}, epoch {}, from block {} of it and sequence {} on",
        superblock.journal_first,
        superblock.journal_first.0 + superblock.journal_blocks - 1,
        superblock.epoch,
        superblock.tail,
        superblock.tail_sequence,
    );
    for (name, tree) in trees(superblock) {
        let _ = match tree.root {
            None => writeln!(text, "tree of {name}: empty"),
            Some((root, level, _)) => writeln!(
                text,
                "tree of {name}: root in block {}, level {level}, {} entries in {} nodes",
                root.block, tree.entries, tree.nodes
            ),
        };
    }
    for info in view.snapshots() {
        let _ = writeln!(
            text,
            "snapshot {}: sequence {}, {}, priority {}, use count {}, {} sectors, created {}",
            info.tag,
            info.seq,
            [
                (true, state_of(&info)),
                (info.doubtful, "doubtful"),
                (info.to_bookmark, "becomes a bookmark when given up"),
            ]
            .iter()
            .filter_map(|&(is, word)| is.then_some(word))
            .collect::<Vec<_>>()
            .join(", "),
            info.priority,
            info.usecount,
            info.length,
            ctime(info.created),
        );
    }
    if status.deleting > 0 {
        let _ = writeln!(text, "{} deleted snapshots not yet swept", status.deleting);
    }
    text
}

fn trees(superblock: &Superblock) -> [(&'static str, &TreeRoot); 3] {
    [
        ("exceptions", &superblock.exceptions),
        ("overlays", &superblock.overlays),
        ("bitmaps", &superblock.space),
    ]
}

fn state_of(info: &SnapshotInfo) -> &'static str {
    match info.state {
        SnapState::Live => "live",
        SnapState::Squashed => "squashed",
        SnapState::Bookmark => "bookmark",
    }
}

fn json_head(view: &View, opened: &Opened) -> Result<()> {
    let superblock = view.superblock();
    let status = view.status();
    let tree = |tree: &TreeRoot| match tree.root {
        None => json!(null),
        Some((root, level, newest)) => json!({
            "root_block": root.block.0,
            "level": level,
            "newest_sequence": newest,
            "entries": tree.entries,
            "nodes": tree.nodes,
        }),
    };
    let extents: Vec<_> = superblock
        .extents
        .iter()
        .map(|extent| json!({"first_block": extent.first.0, "blocks": extent.blocks}))
        .collect();
    let store = json!({
        "uuid": uuid_of(superblock),
        "format_version": superblock.version.number(),
        "created_unix": superblock.created,
        "generation": superblock.generation,
        "clean": opened.clean,
        "replayed_records": opened.replayed_records,
        "chunk_bytes": superblock.chunk.bytes(),
        "origin_chunks": superblock.origin.to_chunks(superblock.chunk),
        "origin_sectors": superblock.origin.0,
        "data_first_chunk": superblock.data_first.0,
        "data_end_chunk": superblock.data_end.0,
        "data_chunks": status.data_chunks,
        "free_chunks": status.free_chunks,
        "metadata_device": superblock.separate_meta,
        "bookmarks": superblock.bookmarks,
        "metadata_extents": extents,
        "journal": {
            "first_block": superblock.journal_first.0,
            "blocks": superblock.journal_blocks,
            "epoch": superblock.epoch,
            "tail_block": superblock.tail,
            "tail_sequence": superblock.tail_sequence,
        },
        "next_sequence": superblock.next_seq.0,
        "trees": {
            "exceptions": tree(&superblock.exceptions),
            "overlays": tree(&superblock.overlays),
            "bitmaps": tree(&superblock.space),
        },
        "snapshots_being_freed": status.deleting,
    });
    let snapshots: Vec<_> = view
        .snapshots()
        .iter()
        .map(|info| {
            json!({
                "tag": info.tag.0,
                "sequence": info.seq.0,
                "state": state_of(info),
                "doubtful": info.doubtful,
                "becomes_bookmark": info.to_bookmark,
                "priority": info.priority,
                "usecount": info.usecount,
                "origin_chunks": info.length.to_chunks(superblock.chunk),
                "origin_sectors": info.length.0,
                "created_unix": info.created,
            })
        })
        .collect();
    print(&format!(
        "{{\n  \"schema\": \"{SCHEMA}\",\n  \"store\": {store},\n  \"snapshots\": {},\n",
        json!(snapshots)
    ))
}

/// The index as two arrays, the second left open. Entries are printed as they are read: there may be more
/// than memory holds.
fn json_entries(view: &mut View) -> Result<()> {
    let mut overlays = false;
    let mut comma = "";
    print("  \"exceptions\": [\n")?;
    for_each(view, |entries| {
        let mut text = String::new();
        for entry in entries {
            if matches!(entry, DumpEntry::Overlay { .. }) && !overlays {
                overlays = true;
                comma = "";
                text += "  ],\n  \"overlays\": [\n";
            }
            let _ = writeln!(text, "    {comma}{}", numbers(entry));
            comma = ",";
        }
        print(&text)
    })?;
    match overlays {
        true => Ok(()),
        false => print("  ],\n  \"overlays\": [\n"),
    }
}

fn numbers(entry: &DumpEntry) -> serde_json::Value {
    match *entry {
        DumpEntry::Exception {
            chunk,
            seq,
            place,
            crc,
        } => json!([chunk.0, seq.0, place.0, crc]),
        DumpEntry::Mark { chunk, seq } => json!([chunk.0, seq.0, 0, 0]),
        DumpEntry::Overlay {
            seq, chunk, place, ..
        } => json!([seq.0, chunk.0, place.map_or(0, |place| place.0)]),
    }
}
