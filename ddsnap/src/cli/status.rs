// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap status`.

use std::ffi::OsString;
use std::fmt::Write;

use anyhow::Result;
use clap::Args;
use nix::errno::Errno;

use super::numbers::{ctime, thousands};
use super::progress::counting;
use super::{json, refused, snap_tag};
use crate::client::{Client, ClientError, Level, MANY, Snapshot, SnapshotState, Usage};
use crate::stdio::{complain, print};
use crate::units::{META_BLOCK_BYTES, SECTOR_BYTES, SnapTag};

/// Exit code of --state: the state cannot be told.
pub const STATE_UNKNOWN: u8 = 9;
/// What it means that a snapshot is doubtful.
pub const DOUBTFUL: &str =
    "the origin was written without its server, so it may show newer data as if it were old";

/// Show the store and what each snapshot uses of it.
#[derive(Debug, Args)]
pub struct Status {
    /// The server's control socket: a path, or @NAME for an abstract one.
    #[arg(value_name = "SOCK")]
    socket: String,
    /// Only this snapshot.
    #[arg(value_name = "SNAP", value_parser = snap_tag, allow_negative_numbers = true)]
    tag: Option<SnapTag>,
    /// Show with how many others chunks are shared, a column for each number.
    #[arg(short, long)]
    verbose: bool,
    /// Print the snapshots' numbers on one line, without bookmarks.
    #[arg(long, group = "what")]
    list: bool,
    /// Print the number of the newest snapshot that is no bookmark.
    #[arg(long, group = "what")]
    last: bool,
    /// Print the size of the origin or of SNAP in sectors.
    #[arg(long, group = "what")]
    size: bool,
    /// Print nothing; exit 0 if SNAP is sound, 1 if there is none, 2 if it is squashed or a bookmark, 9 on an error
    /// (99 if the server cannot be reached).
    #[arg(long, group = "what")]
    state: bool,
    /// Print JSON, schema ddsnap-status-1.
    #[arg(long, group = "what")]
    json: bool,
}

/// Whether a command line asks for a snapshot's state: then no mistake in it may end with 1, which says
/// that there is no such snapshot.
pub fn asks_for_state(args: &[OsString]) -> bool {
    let is_state = |arg: &OsString| arg.to_string_lossy().starts_with("--state");
    args.get(1).is_some_and(|verb| verb == "status") && args.iter().any(is_state)
}

impl Status {
    pub fn run(&self) -> Result<u8> {
        if self.state {
            return self.state();
        }
        let mut client = Client::connect(&self.socket)?;
        if self.list {
            return print_ids(&with_data(client.list()?));
        }
        if self.last {
            let snapshots = with_data(client.list()?);
            return print_ids(&snapshots[snapshots.len().saturating_sub(1)..]);
        }
        if self.size {
            return self.size(&mut client);
        }
        let bar = counting()?;
        let result = client.usage(&mut |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        let mut usage = match result {
            Err(error) => return refused("show status", Err(error)),
            Ok(usage) => usage,
        };
        if let Some(tag) = self.tag {
            usage.rows.retain(|row| row.snapshot.tag == tag);
            if usage.rows.is_empty() {
                if self.json {
                    print(&json::status(&usage, self.tag)?)?;
                }
                let reason = "snapshot doesn't exist".to_owned();
                let errno = Errno::ENOENT as i32;
                let refusal = ClientError::Refused { errno, reason };
                return refused(&format!("show snapshot {tag}"), Err(refusal));
            }
        }
        let text = if self.json {
            json::status(&usage, self.tag)?
        } else {
            render(&usage, self.verbose, ctime)
        };
        print(&text)?;
        Ok(0)
    }

    fn state(&self) -> Result<u8> {
        let Some(tag) = self.tag else {
            complain("ddsnap: --state needs the number of a snapshot");
            return Ok(STATE_UNKNOWN);
        };
        let state = Client::connect(&self.socket).and_then(|mut client| client.state(tag));
        match state {
            Ok(Some(SnapshotState::Live)) => Ok(0),
            Ok(None) => Ok(1),
            Ok(Some(SnapshotState::Squashed | SnapshotState::Bookmark)) => Ok(2),
            Err(error @ ClientError::Connect { .. }) => Err(error.into()),
            Err(error) => {
                complain(format_args!("ddsnap: {:#}", anyhow::Error::from(error)));
                Ok(STATE_UNKNOWN)
            }
        }
    }

    /// Of a snapshot that is none: says so, and 0 sectors, without failing. Scripts rely on it.
    fn size(&self, client: &mut Client) -> Result<u8> {
        match client.size(self.tag) {
            Ok(sectors) => print(&format!("{sectors}\n"))?,
            Err(ClientError::Refused { errno, .. }) if errno == Errno::ENOENT as i32 => {
                let tag = self.tag.unwrap_or(SnapTag(0));
                complain(format_args!("Snapshot {tag} is not valid"));
                print("0\n")?;
            }
            Err(error @ ClientError::Refused { .. }) => {
                refused("get size", Err(error))?;
                print("0\n")?;
            }
            Err(error) => return Err(error.into()),
        }
        Ok(0)
    }
}

/// Scripts take the numbers for those of devices, which bookmarks do not have.
fn with_data(mut snapshots: Vec<Snapshot>) -> Vec<Snapshot> {
    snapshots.retain(|snapshot| snapshot.state != SnapshotState::Bookmark);
    snapshots
}

fn print_ids(snapshots: &[Snapshot]) -> Result<u8> {
    let ids: Vec<String> = snapshots
        .iter()
        .map(|snapshot| snapshot.tag.to_string())
        .collect();
    print(&format!("{}\n", ids.join(" ")))?;
    Ok(0)
}

/// The status table. Its columns are what scripts cut out.
fn render(usage: &Usage, verbose: bool, time: impl Fn(i64) -> String) -> String {
    let Usage { status, rows, .. } = usage;
    let mut text = String::new();
    let chunk_bytes = status.chunk.bytes();
    let (free, all) = (status.free_chunks, status.data_chunks);
    if status.separate_meta {
        let (free_meta, all_meta) = (status.free_meta_blocks, status.meta_blocks);
        let _ = writeln!(
            text,
            "Snapshot metadata block size = {META_BLOCK_BYTES}; {free_meta} of {all_meta} chunks free"
        );
        let _ = writeln!(
            text,
            "Snapshot data store chunk size = {chunk_bytes}; {free} of {all} chunks free"
        );
    } else {
        let _ = writeln!(
            text,
            "Snapshot store block size = {chunk_bytes}; {free} of {all} chunks free"
        );
    }
    let _ = writeln!(
        text,
        "Origin size: {} bytes",
        thousands(status.origin_sectors * SECTOR_BYTES)
    );
    let _ = writeln!(text, "Write density: 0");
    let _ = writeln!(text, "Creation time: {}", time(status.created));

    let columns = if verbose {
        Columns::EachDegree(most_shared(usage))
    } else {
        Columns::Shared
    };
    let _ = write!(
        text,
        "  Snap            Creation time Usecnt Prio   Chunks Unshared"
    );
    match columns {
        Columns::Shared => text.push_str("   Shared"),
        Columns::EachDegree(most) => {
            (1..=most).for_each(|others| text.push_str(&cell(degree_name(others))));
        }
    }
    text.push('\n');
    for row in rows {
        let snapshot = &row.snapshot;
        let _ = write!(
            text,
            "{:>6} {:>24} {:>6} {:>4}",
            snapshot.tag,
            time(snapshot.created),
            snapshot.usecount(),
            snapshot.priority
        );
        for count in columns.sums(&row.shared_with) {
            text.push_str(&match snapshot.state {
                SnapshotState::Live => cell(count),
                SnapshotState::Squashed => cell("!"),
                SnapshotState::Bookmark => cell("-"),
            });
        }
        text.push('\n');
    }
    let _ = write!(text, "{:<43}", "totals");
    columns
        .sums(&usage.totals)
        .into_iter()
        .for_each(|total| text.push_str(&cell(total)));
    text.push('\n');
    let used_meta = status.meta_blocks.saturating_sub(status.free_meta_blocks);
    let _ = writeln!(
        text,
        "Metadata usage: {} bytes",
        thousands(used_meta * META_BLOCK_BYTES)
    );
    if let Some(tag) = status.reverting {
        let _ = writeln!(text, "The origin is being reverted to snapshot {tag}");
    }
    for row in rows.iter().filter(|row| row.snapshot.doubtful) {
        let tag = row.snapshot.tag;
        let _ = writeln!(text, "Snapshot {tag} is doubtful: {DOUBTFUL}");
    }
    if !status.fault.is_empty() {
        let _ = writeln!(text, "Store failed: {}", status.fault);
    }
    if let Some(warning) = Level::of(status).warning(status) {
        let _ = writeln!(text, "Warning: {warning}");
    }
    text
}

fn cell(value: impl std::fmt::Display) -> String {
    format!(" {value:>8}")
}

/// The most others that any chunk is shared with; at least 1, so that there is a column.
fn most_shared(usage: &Usage) -> u32 {
    let shares = usage.rows.iter().flat_map(|row| &row.shared_with);
    let degrees = shares.chain(&usage.totals).map(|&(others, _)| others);
    degrees.max().unwrap_or(0).max(1)
}

fn degree_name(others: u32) -> String {
    if others == MANY {
        format!(">={others}X")
    } else {
        format!("{others}X")
    }
}

/// What follows `Unshared` in the table.
#[derive(Clone, Copy)]
enum Columns {
    /// All shared chunks in one.
    Shared,
    /// One column for each number of others, up to this.
    EachDegree(u32),
}

impl Columns {
    /// A line's numbers: all chunks, unshared ones, and the columns behind.
    fn sums(self, shares: &[(u32, u64)]) -> Vec<u64> {
        let degrees = match self {
            Columns::Shared => 1,
            Columns::EachDegree(most) => most as usize,
        };
        let mut sums = vec![0; 2 + degrees];
        for &(others, chunks) in shares {
            let column = match (others, self) {
                (0, _) => 1,
                (_, Columns::Shared) => 2,
                (others, Columns::EachDegree(_)) => 1 + others as usize,
            };
            sums[0] += chunks;
            sums[column] += chunks;
        }
        sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::{ChannelState, Row, Status as StoreStatus};
    use crate::units::{ChunkShift, SnapSeq};

    fn row(tag: u32, usecount: u32, squashed: bool, shared_with: &[(u32, u64)]) -> Row {
        let state = if squashed {
            SnapshotState::Squashed
        } else {
            SnapshotState::Live
        };
        let snapshot = Snapshot {
            tag: SnapTag(tag),
            seq: SnapSeq(tag.into()),
            created: tag.into(),
            priority: 0,
            state,
            doubtful: false,
            to_bookmark: false,
            persistent_usecount: usecount,
            devices: 0,
            sectors: 16384,
        };
        Row {
            snapshot,
            shared_with: shared_with.to_vec(),
        }
    }

    fn table(status: StoreStatus, rows: &[Row], totals: &[(u32, u64)], verbose: bool) -> String {
        let usage = Usage {
            status,
            totals: totals.to_vec(),
            rows: rows.to_vec(),
        };
        render(&usage, verbose, time)
    }

    fn status() -> StoreStatus {
        StoreStatus {
            chunk: ChunkShift::from_bytes(8192).unwrap(),
            data_chunks: 512,
            free_chunks: 443,
            meta_blocks: 200,
            free_meta_blocks: 66,
            reserved_meta_blocks: 41,
            separate_meta: false,
            origin_sectors: 16384,
            created: 39,
            deleting: 0,
            channel: ChannelState::Absent,
            refusing: false,
            reverting: None,
            fault: String::new(),
        }
    }

    fn time(seconds: i64) -> String {
        format!(
            "Sun Nov 22 01:44:{:02} 2026",
            if seconds == 39 { 39 } else { 41 + seconds }
        )
    }

    /// The example of the original's documentation, to the letter.
    #[test]
    fn the_table_is_as_it_was() {
        let rows = [
            row(0, 1, false, &[(0, 1), (1, 1)]),
            row(2, 1, false, &[(1, 1)]),
        ];
        let expected = "\
Snapshot store block size = 8192; 443 of 512 chunks free
Origin size: 8,388,608 bytes
Write density: 0
Creation time: Sun Nov 22 01:44:39 2026
  Snap            Creation time Usecnt Prio   Chunks Unshared   Shared
     0 Sun Nov 22 01:44:41 2026      1    0        2        1        1
     2 Sun Nov 22 01:44:43 2026      1    0        1        0        1
totals                                             2        1        1
Metadata usage: 548,864 bytes
";
        assert_eq!(table(status(), &rows, &[(0, 1), (1, 1)], false), expected);
    }

    #[test]
    fn verbose_has_a_column_for_each_degree() {
        let rows = [
            row(0, 0, false, &[(0, 5), (2, 3)]),
            row(1, 0, false, &[(1, 4), (2, 3)]),
            row(2, 0, false, &[(1, 4), (2, 3)]),
        ];
        let text = table(status(), &rows, &[(0, 5), (1, 4), (2, 3)], true);
        let table: Vec<&str> = text.lines().skip(4).take(5).collect();
        assert_eq!(
            table,
            [
                "  Snap            Creation time Usecnt Prio   Chunks Unshared       1X       2X",
                "     0 Sun Nov 22 01:44:41 2026      0    0        8        5        0        3",
                "     1 Sun Nov 22 01:44:42 2026      0    0        7        0        4        3",
                "     2 Sun Nov 22 01:44:43 2026      0    0        7        0        4        3",
                "totals                                            12        5        4        3",
            ]
        );
    }

    #[test]
    fn squashed_snapshots_have_marks_and_metadata_of_its_own_a_line() {
        let status = StoreStatus {
            separate_meta: true,
            ..status()
        };
        let text = table(status, &[row(7, 2, true, &[])], &[], false);
        let expected = "\
Snapshot metadata block size = 4096; 66 of 200 chunks free
Snapshot data store chunk size = 8192; 443 of 512 chunks free
Origin size: 8,388,608 bytes
Write density: 0
Creation time: Sun Nov 22 01:44:39 2026
  Snap            Creation time Usecnt Prio   Chunks Unshared   Shared
     7 Sun Nov 22 01:44:48 2026      2    0        !        !        !
totals                                             0        0        0
Metadata usage: 548,864 bytes
";
        assert_eq!(text, expected);
    }

    #[test]
    fn a_failed_store_says_so_last() {
        let status = StoreStatus {
            fault: "disk on fire".into(),
            reverting: Some(SnapTag(7)),
            ..status()
        };
        let text = table(status, &[], &[], false);
        assert!(
            text.ends_with(
                "bytes\nThe origin is being reverted to snapshot 7\nStore failed: disk on fire\n"
            ),
            "{text}"
        );
    }

    #[test]
    fn sharing_with_many_has_one_column() {
        let rows = [row(0, 0, false, &[(1, 1), (MANY, 7)])];
        let text = table(status(), &rows, &[(1, 1), (MANY, 7)], true);
        let heading = text.lines().nth(4).unwrap();
        assert!(
            heading.ends_with("      62X      63X    >=64X"),
            "{heading}"
        );
        let totals = text.lines().nth(6).unwrap();
        assert!(totals.ends_with("        0        7"), "{totals}");
        assert_eq!(heading.len(), totals.len());
    }

    #[test]
    fn a_store_that_is_nearly_full_warns_last() {
        let nearly = StoreStatus {
            free_chunks: 51,
            ..status()
        };
        let text = table(nearly, &[], &[], false);
        let last = text.lines().last().unwrap();
        assert!(
            last.starts_with("Warning: the snapshot store is nearly full: 9 % of its data chunks"),
            "{text}"
        );
    }
}
