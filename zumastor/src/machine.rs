// SPDX-License-Identifier: GPL-2.0-only
//! What the machine is made of, as far as a volume sees it: numbers of devices, mounts, table lines,
//! processes. Only data; [`crate::host`] says what can be done with them.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

pub use ddsnap::client::Snapshot as Stored;
pub use ddsnap::client::SnapshotState;
use ddsnap::units::{ChunkShift, Sectors};
use thiserror::Error;

/// The device-mapper target's name in tables.
pub const DM_TARGET: &str = "ddsnap";

/// What the UUIDs of all our device-mapper devices begin with.
pub const DM_UUID_PREFIX: &str = "DDSNAP-";

/// A block device's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dev {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
}

impl Dev {
    /// Reads `MAJOR:MINOR`.
    #[must_use]
    pub fn parse(text: &str) -> Option<Dev> {
        let (major, minor) = text.split_once(':')?;
        Some(Dev {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
        })
    }
}

impl fmt::Display for Dev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A device or mount that somebody still uses.
#[derive(Debug, Error)]
#[error("Device '{device}' still in use{}", by(.holders))]
pub struct Busy {
    /// Path of the device as an administrator knows it.
    pub device: String,
    /// Who uses it, as far as is known: processes and mounts, described.
    pub holders: Vec<String>,
    /// A mount, swap or another device is among them: waiting some seconds does not help.
    pub lasting: bool,
}

/// Who uses a device, described.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Users {
    /// Mounts, swap and devices that stand on it.
    pub lasting: Vec<String>,
    /// Processes that have it open, if only for a moment.
    pub processes: Vec<String>,
}

impl Users {
    /// The error that names them all.
    #[must_use]
    pub fn busy(self, device: String) -> Busy {
        let lasting = !self.lasting.is_empty();
        let mut holders = self.lasting;
        holders.extend(self.processes);
        Busy {
            device,
            holders,
            lasting,
        }
    }
}

/// What a volume's server says of its store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StoreState {
    /// Why it serves no writes any more, if so.
    pub fault: Option<String>,
    /// The server has lost its channel to the kernel: I/O waits.
    pub channel_lost: bool,
    /// It is nearly full, or full, and what to do.
    pub space: Option<String>,
    /// Its snapshots, oldest first.
    pub snapshots: Vec<Stored>,
    /// Length of the origin.
    pub origin_bytes: u64,
    /// Room for snapshot data.
    pub data_bytes: u64,
    /// What of it is used.
    pub used_bytes: u64,
}

/// What replication must know of a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Its chunks.
    pub chunk: ChunkShift,
    /// Length of the origin.
    pub origin: Sectors,
}

fn by(holders: &[String]) -> String {
    if holders.is_empty() {
        String::new()
    } else {
        format!(" by {}", holders.join(", "))
    }
}

/// A line of the mount table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The mounted file system's device number.
    pub dev: Dev,
    /// Where.
    pub dir: PathBuf,
    /// Source as given to mount.
    pub source: PathBuf,
    /// Type of file system.
    pub fstype: String,
}

/// A device-mapper device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DmDevice {
    /// Its number.
    pub dev: Dev,
    /// The name within the name space of its maker.
    pub uuid: Option<String>,
    /// The active table; `None` if there is not exactly one line.
    pub table: Option<TableLine>,
}

/// The table of a ddsnap device, which has exactly one line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableLine {
    /// Length in sectors.
    pub sectors: u64,
    /// The snapshot store.
    pub snapstore: Dev,
    /// The origin.
    pub origin: Dev,
    /// The agent's socket, by which the kernel knows the volume.
    pub agent: String,
    /// The snapshot, or `None` for the origin.
    pub id: Option<u32>,
}

impl TableLine {
    /// The part of the line behind the target's name.
    #[must_use]
    pub fn params(&self) -> String {
        let id = self
            .id
            .map_or_else(|| "-1".to_string(), |tag| tag.to_string());
        format!("{} {} {} {id}", self.snapstore, self.origin, self.agent)
    }

    /// Reads back what the kernel reports; options that follow the number are passed over.
    #[must_use]
    pub fn parse(sectors: u64, params: &str) -> Option<TableLine> {
        let mut words = params.split_ascii_whitespace();
        let (snapstore, origin) = (Dev::parse(words.next()?)?, Dev::parse(words.next()?)?);
        let agent = words.next()?.to_string();
        let id = match words.next()? {
            "-1" => None,
            tag => Some(tag.parse().ok()?),
        };
        Some(TableLine {
            sectors,
            snapstore,
            origin,
            agent,
            id,
        })
    }

    /// Whether both map the same data. Lengths may differ: a snapshot keeps the origin's old size.
    #[must_use]
    pub fn same_mapping(&self, other: &TableLine) -> bool {
        TableLine {
            sectors: 0,
            ..self.clone()
        } == TableLine {
            sectors: 0,
            ..other.clone()
        }
    }
}

impl fmt::Display for TableLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0 {} {DM_TARGET} {}", self.sectors, self.params())
    }
}

/// The two daemons of a volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `ddsnap agent`.
    Agent,
    /// `ddsnap server`.
    Server,
}

/// How to start a daemon and how to recognise it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessSpec {
    /// Which one.
    pub kind: Kind,
    /// Program and arguments.
    pub argv: Vec<OsString>,
    /// Where it writes its number.
    pub pidfile: PathBuf,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(id: Option<u32>) -> TableLine {
        TableLine {
            sectors: 204_800,
            snapstore: Dev {
                major: 253,
                minor: 1,
            },
            origin: Dev {
                major: 253,
                minor: 0,
            },
            agent: "/var/run/zumastor/agents/zumatest".to_string(),
            id,
        }
    }

    #[test]
    fn table_lines_are_what_scripts_know() {
        let expected = "0 204800 ddsnap 253:1 253:0 /var/run/zumastor/agents/zumatest -1";
        assert_eq!(line(None).to_string(), expected);
        let expected = "0 204800 ddsnap 253:1 253:0 /var/run/zumastor/agents/zumatest 14";
        assert_eq!(line(Some(14)).to_string(), expected);
    }

    #[test]
    fn what_the_kernel_reports_is_read_back() {
        for id in [None, Some(0), Some(14)] {
            let params = line(id).params();
            assert_eq!(TableLine::parse(204_800, &params), Some(line(id)));
            let more = format!("{params} 2 server_timeout 60");
            assert_eq!(TableLine::parse(204_800, &more), Some(line(id)));
        }
        for bad in [
            "",
            "253:1 253:0 /a",
            "253:1 253 /a 0",
            "x:1 253:0 /a 0",
            "253:1 253:0 /a -2",
        ] {
            assert_eq!(TableLine::parse(1, bad), None, "{bad}");
        }
    }

    #[test]
    fn a_resized_origin_is_the_same_mapping_and_another_snapshot_is_not() {
        assert!(line(None).same_mapping(&TableLine {
            sectors: 8,
            ..line(None)
        }));
        assert!(!line(None).same_mapping(&line(Some(0))));
    }
}
