// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap list`.

use std::fmt::Write;

use anyhow::Result;
use clap::Args;

use super::json;
use super::numbers::ctime;
use super::status::DOUBTFUL;
use crate::client::{Client, Snapshot, SnapshotState};
use crate::stdio::print;

/// List the snapshots, oldest first.
#[derive(Debug, Args)]
pub struct List {
    /// The server's control socket: a path, or @NAME for an abstract one.
    #[arg(value_name = "SOCK")]
    socket: String,
    /// Print JSON, schema ddsnap-list-1.
    #[arg(long)]
    json: bool,
}

impl List {
    pub fn run(&self) -> Result<u8> {
        let snapshots = Client::connect(&self.socket)?.list()?;
        let text = if self.json {
            json::list(&snapshots)?
        } else {
            render(&snapshots, ctime)
        };
        print(&text)?;
        Ok(0)
    }
}

/// Scripts take fields 2, 4, 7 and 10 to 14 of the second line of each.
fn render(snapshots: &[Snapshot], time: impl Fn(i64) -> String) -> String {
    let mut text = "Snapshot list:\n".to_owned();
    for (number, snapshot) in snapshots.iter().enumerate() {
        let _ = writeln!(text, "Snapshot {number}:");
        // Behind the fields that scripts take.
        let state = match snapshot.state {
            SnapshotState::Live => "",
            SnapshotState::Squashed => "  squashed",
            SnapshotState::Bookmark => "  bookmark",
        };
        let _ = writeln!(
            text,
            "\ttag= {}  priority= {}  use count= {}  creation time= {}{state}",
            snapshot.tag,
            snapshot.priority,
            snapshot.usecount(),
            time(snapshot.created),
        );
        if snapshot.doubtful {
            let _ = writeln!(text, "\tdoubtful: {DOUBTFUL}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{SnapSeq, SnapTag};

    #[test]
    fn the_fields_that_scripts_take_are_where_they_were() {
        let snapshot = Snapshot {
            tag: SnapTag(4),
            seq: SnapSeq(3),
            created: 0,
            priority: -5,
            state: SnapshotState::Live,
            doubtful: false,
            to_bookmark: false,
            persistent_usecount: 2,
            devices: 1,
            sectors: 8,
        };
        let text = render(&[snapshot, snapshot], |_| {
            "Sun Nov 22 01:44:39 2026".to_owned()
        });
        let line =
            "\ttag= 4  priority= -5  use count= 3  creation time= Sun Nov 22 01:44:39 2026\n";
        assert_eq!(
            text,
            format!("Snapshot list:\nSnapshot 0:\n{line}Snapshot 1:\n{line}")
        );
        let fields: Vec<&str> = line.split_whitespace().collect();
        assert_eq!([fields[1], fields[3], fields[6]], ["4", "-5", "3"]);
        assert_eq!(fields[9..14].join(" "), "Sun Nov 22 01:44:39 2026");
        assert_eq!(fields.len(), 14);
        let squashed = Snapshot {
            state: SnapshotState::Squashed,
            ..snapshot
        };
        let text = render(&[squashed], |_| "Sun Nov 22 01:44:39 2026".to_owned());
        assert!(text.ends_with("44:39 2026  squashed\n"), "{text}");
        let bookmark = Snapshot {
            state: SnapshotState::Bookmark,
            ..snapshot
        };
        let text = render(&[bookmark], |_| "Sun Nov 22 01:44:39 2026".to_owned());
        assert!(text.ends_with("44:39 2026  bookmark\n"), "{text}");
    }

    #[test]
    fn none_is_a_heading_alone() {
        assert_eq!(render(&[], |_| String::new()), "Snapshot list:\n");
    }
}
