// SPDX-License-Identifier: GPL-2.0-only
//! What a volume does: roles and rotations, as the document has them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;
use uuid::Uuid;

/// The upstream role: mounts the origin and takes snapshots. Its flags are in
/// [`Filesystem`](super::Filesystem), where they survive a change of role.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Master {}

/// A snapshot as both sides of a replication know it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapref {
    /// Its identity.
    pub uuid: Uuid,
    /// Its snaptag here.
    pub id: u32,
}

/// The downstream role: the volume is a replica.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// The machine that has the upstream volume, as ssh takes it.
    pub host: String,
    /// The volume's name there, if not the same as here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The port given to `define source`. Replication over ssh does not use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The command that reaches the machine, if not the one in /etc/zumastor/ssh_command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh_command: Option<String>,
    /// Seconds from the start of one cycle to that of the next; absent: only when asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub period: Option<u64>,
    /// The time of day in which cycles may run that come by themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<Window>,
    /// Mount the newest complete snapshot at the volume's mount point.
    #[serde(default)]
    pub mount: bool,
    /// Cycles are not run: `stop source`.
    #[serde(default)]
    pub stopped: bool,
    /// The newest snapshot that is complete here and known to the upstream.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<Snapref>,
    /// The hold before it, kept until the upstream is known to have moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_hold: Option<Snapref>,
    /// The snapshot whose content the origin has, but for what has arrived of the next one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Uuid>,
    /// What has arrived of the next one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incoming: Option<Incoming>,
    /// What scripts are sending by `receive start`, of which the origin has a part or all.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by_hand: Option<ByHand>,
    /// The hold came by `receive done`, and has the upstream's number.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub hold_by_hand: bool,
    /// When both sides were last proven equal, in seconds since 1970-01-01 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proven: Option<i64>,
    /// Rotations that get the next complete snapshot.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub pending: Vec<String>,
    /// A cycle by hand that has not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<Asked>,
    /// How the volume was sent there while it was master, for when it is again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub way_back: Option<WayBack>,
}

/// A snapshot that scripts send, by the upstream's numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ByHand {
    /// The snapshot that it is made from, and that the origin had; absent: all of it is sent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<u32>,
    /// The snapshot.
    pub tag: u32,
}

/// A cycle that somebody asked for and that has not ended: the next daemon begins it again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// Everything may be copied over whatever the downstream holds.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub full: bool,
    /// A downstream that was written to may be taken back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub force_base: bool,
    /// The snapshot to send, if not a new one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<u32>,
}

/// What a [`Target`] says of how it is sent to, and a [`Source`] does not need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WayBack {
    /// Most bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratelimit: Option<u64>,
    /// What becomes of the hold when the store is full.
    #[serde(default, skip_serializing_if = "HoldPolicy::is_default")]
    pub on_full: HoldPolicy,
    /// Send as it is, without zstd.
    #[serde(default)]
    pub uncompressed: bool,
    /// Compare everything after each cycle.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub test_fullvolume: bool,
}

impl Source {
    /// Of which nothing has arrived.
    #[must_use]
    pub fn at(host: &str) -> Source {
        Source {
            host: host.to_owned(),
            name: None,
            port: None,
            ssh_command: None,
            period: None,
            window: None,
            mount: false,
            stopped: false,
            hold: None,
            old_hold: None,
            origin: None,
            incoming: None,
            by_hand: None,
            hold_by_hand: false,
            proven: None,
            pending: Vec::new(),
            asked: None,
            way_back: None,
        }
    }
}

/// A snapshot that has arrived in part: the origin holds it up to a position.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Incoming {
    /// Its identity.
    pub uuid: Uuid,
    /// Its number at the upstream.
    pub id: u32,
    /// When it was taken there, in seconds since 1970-01-01 UTC.
    pub created: i64,
    /// What it is an increment from; absent: a full copy.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base: Option<Uuid>,
    /// All changes below this byte of the origin were durable here when the document was last written. The
    /// file `incoming` beside it knows better.
    pub position: u64,
    /// Length of the snapshot in bytes.
    pub size: u64,
    /// The base here is not the upstream's: only whole chunks help.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub plain: bool,
}

/// What becomes of the snapshot that an increment starts from when the store is full.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum HoldPolicy {
    /// It is given up to a bookmark: the origin never suffers, and the next cycle is still an increment.
    #[default]
    Bookmark,
    /// It is protected: writes to the origin fail sooner.
    Protect,
}

impl HoldPolicy {
    fn is_default(&self) -> bool {
        *self == HoldPolicy::default()
    }
}

/// A replica of this volume elsewhere. Not to be confused with the device-mapper target.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Target {
    /// The volume's name there, if not the same as here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The port given to `define target`. Replication over ssh does not use it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The command that reaches the machine, if not the one in /etc/zumastor/ssh_command.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ssh_command: Option<String>,
    /// Seconds from the start of one cycle to that of the next; absent: only when asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub period: Option<u64>,
    /// Most bytes a second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ratelimit: Option<u64>,
    /// The time of day in which cycles may run that come by themselves.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub window: Option<Window>,
    /// What becomes of the hold when the store is full.
    #[serde(default, skip_serializing_if = "HoldPolicy::is_default")]
    pub on_full: HoldPolicy,
    /// Send as it is, without zstd.
    #[serde(default)]
    pub uncompressed: bool,
    /// Compare everything on both sides after each cycle that this side begins.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub test_fullvolume: bool,
    /// Documents of earlier builds have it. It never had an effect and is not written any more.
    #[serde(default, skip_serializing)]
    pub full: bool,
    /// Cycles are not run: `stop target`.
    #[serde(default)]
    pub stopped: bool,
    /// The newest snapshot that is complete on both sides.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hold: Option<Snapref>,
    /// The snapshot that is on its way, which must stay until it has arrived or was given up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sending: Option<Snapref>,
    /// A cycle by hand that has not ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub asked: Option<Asked>,
    /// When both sides were last proven equal, in seconds since 1970-01-01 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub proven: Option<i64>,
}

/// A part of the day in local time, `HH:MM-HH:MM`, the end excluded; over midnight if it ends before it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Window {
    /// Its first minute of the day, below 1440.
    pub from: u16,
    /// The first minute after it, below 1440.
    pub to: u16,
}

/// What is no [`Window`].
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("'{0}' is not a time of day like 22:00-06:00")]
pub struct WindowError(String);

impl Window {
    /// Whether a minute of the day, counted from 0, lies in it.
    #[must_use]
    pub fn contains(self, minute: u16) -> bool {
        if self.from < self.to {
            (self.from..self.to).contains(&minute)
        } else {
            minute >= self.from || minute < self.to
        }
    }
}

impl FromStr for Window {
    type Err = WindowError;

    fn from_str(text: &str) -> Result<Window, WindowError> {
        let minute = |text: &str| {
            let (hour, minute) = text.trim().split_once(':')?;
            let (hour, minute): (u16, u16) = (hour.parse().ok()?, minute.parse().ok()?);
            (hour < 24 && minute < 60).then_some(hour * 60 + minute)
        };
        let parts = text.split_once('-');
        let window = parts.and_then(|(from, to)| {
            let (from, to) = (minute(from)?, minute(to)?);
            (from != to).then_some(Window { from, to })
        });
        window.ok_or_else(|| WindowError(text.to_string()))
    }
}

impl TryFrom<String> for Window {
    type Error = WindowError;

    fn try_from(text: String) -> Result<Window, WindowError> {
        text.parse()
    }
}

impl From<Window> for String {
    fn from(window: Window) -> String {
        window.to_string()
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Window { from, to } = self;
        let (h, m) = (from / 60, from % 60);
        write!(f, "{h:02}:{m:02}-{:02}:{:02}", to / 60, to % 60)
    }
}

/// When a rotation takes its snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Period {
    /// At each full hour.
    Hourly,
    /// At local midnight.
    Daily,
    /// At local midnight before Sunday.
    Weekly,
    /// At local midnight before the first of the month.
    Monthly,
    /// So many seconds apart, counted from 1970-01-01 UTC.
    Every(u64),
    /// Only when somebody asks.
    Never,
}

/// A number of snapshots that are kept, the oldest of which goes when a new one comes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rotation {
    /// Its name: `hourly`, `daily`, `weekly`, `monthly` or one of the administrator's own.
    pub kind: String,
    /// So many are kept; from 1.
    pub keep: u32,
    /// Seconds between snapshots, of a rotation of the administrator's own; absent: only when asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub every: Option<u64>,
    /// The moment up to which snapshots were taken or passed over, in seconds since 1970-01-01 UTC.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub served: Option<i64>,
}

impl Rotation {
    /// When it takes its snapshots.
    #[must_use]
    pub fn period(&self) -> Period {
        match (self.kind.as_str(), self.every) {
            ("hourly", _) => Period::Hourly,
            ("daily", _) => Period::Daily,
            ("weekly", _) => Period::Weekly,
            ("monthly", _) => Period::Monthly,
            (_, Some(seconds)) => Period::Every(seconds),
            (_, None) => Period::Never,
        }
    }
}
