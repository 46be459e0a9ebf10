// SPDX-License-Identifier: GPL-2.0-only
//! Fault injection by environment, for crash tests of a whole system.
//!
//! `DDSNAP_TRIGGER` names a message (`any` for all), `DDSNAP_COUNT` says at which occurrence (1 if
//! not set), `DDSNAP_ACTION` what happens then: `abort`, `close` (the connection it came over) or
//! `delay_ms N`. It happens once, before the message is acted on. Names are those the original had
//! where the message has a counterpart; PROTOCOL.md lists them.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::protocol::channel::Ask;
use crate::protocol::control::Request;

/// What is to happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// The process dies as if it had crashed.
    Abort,
    /// The connection is closed.
    Close,
    /// Nothing is done for so long.
    Delay(Duration),
}

/// The faults of one process; usually none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    armed: Option<Armed>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Armed {
    trigger: String,
    left: u64,
    action: Action,
}

/// Every name `DDSNAP_TRIGGER` may have.
pub const NAMES: &[&str] = &[
    "any",
    "IDENTIFY",
    "GONE",
    "QUERY_WRITE",
    "QUERY_SNAPSHOT_READ",
    "BARRIER_REACHED",
    "DEVICE_STOPPED",
    "CREATE_SNAPSHOT",
    "DELETE_SNAPSHOT",
    "LIST_SNAPSHOTS",
    "STATUS",
    "REQUEST_SNAPSHOT_STATE",
    "REQUEST_SNAPSHOT_SECTORS",
    "PRIORITY",
    "USECOUNT",
    "RESIZE",
    "DUMP_TREE_RANGE",
    "REVERT",
    "SCRUB",
    "CREATE_BOOKMARK",
    "TO_BOOKMARK",
    "WHEN_FULL",
    "STREAM_CHANGELIST",
    "START_SERVER",
    "SHUTDOWN_SERVER",
];

impl Faults {
    /// What the environment asks for.
    ///
    /// # Errors
    /// A variable has a value that means nothing.
    pub fn from_env() -> Result<Faults> {
        // An empty variable is one that is not set: scripts clear it so.
        Self::parse(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    fn parse(var: impl Fn(&str) -> Option<String>) -> Result<Faults> {
        let Some(trigger) = var("DDSNAP_TRIGGER") else {
            return Ok(Faults::default());
        };
        if !NAMES.contains(&trigger.as_str()) {
            bail!(
                "DDSNAP_TRIGGER={trigger}: no such message; use one of {}",
                NAMES.join(", ")
            );
        }
        let left = match var("DDSNAP_COUNT") {
            None => 1,
            Some(count) => match count.parse() {
                Ok(count) if count > 0 => count,
                _ => bail!("DDSNAP_COUNT={count}: use a number from 1"),
            },
        };
        let action = var("DDSNAP_ACTION").context("DDSNAP_TRIGGER is set, DDSNAP_ACTION is not")?;
        let action = match action.split_whitespace().collect::<Vec<_>>()[..] {
            ["abort"] => Action::Abort,
            ["close"] => Action::Close,
            ["delay_ms", ms] => Action::Delay(Duration::from_millis(
                ms.parse()
                    .with_context(|| format!("DDSNAP_ACTION={action}: N is a number"))?,
            )),
            _ => bail!("DDSNAP_ACTION={action}: use abort, close or delay_ms N"),
        };
        Ok(Faults {
            armed: Some(Armed {
                trigger,
                left,
                action,
            }),
        })
    }

    /// Closes the connection at the first message of this name.
    #[cfg(test)]
    pub(super) fn closing(name: &str) -> Faults {
        let armed = Armed {
            trigger: name.to_owned(),
            left: 1,
            action: Action::Close,
        };
        Faults { armed: Some(armed) }
    }

    /// A message of this name has come. Gives back what is to happen, if it is the one.
    pub fn hit(&mut self, name: &str) -> Option<Action> {
        let armed = self.armed.as_mut()?;
        if armed.trigger != "any" && armed.trigger != name {
            return None;
        }
        armed.left -= 1;
        if armed.left > 0 {
            return None;
        }
        self.armed.take().map(|armed| armed.action)
    }

    /// As [`hit`](Self::hit), and does it. Gives back whether the connection is to be closed.
    #[must_use]
    pub fn strike(&mut self, name: &str) -> bool {
        let Some(action) = self.hit(name) else {
            return false;
        };
        tracing::warn!("DDSNAP_TRIGGER={name}: {action:?}");
        match action {
            Action::Abort => std::process::abort(),
            Action::Close => true,
            Action::Delay(time) => {
                std::thread::sleep(time);
                false
            }
        }
    }
}

/// The name of a request from the kernel.
#[must_use]
pub fn channel_name(ask: &Ask) -> &'static str {
    match ask {
        Ask::Identify { .. } => "IDENTIFY",
        Ask::Gone { .. } => "GONE",
        Ask::OriginWrite(_) | Ask::SnapshotWrite(..) => "QUERY_WRITE",
        Ask::SnapshotRead(..) => "QUERY_SNAPSHOT_READ",
        Ask::BarrierReached => "BARRIER_REACHED",
        Ask::DeviceStopped { .. } => "DEVICE_STOPPED",
    }
}

/// The name of a client's request.
#[must_use]
pub fn control_name(request: &Request) -> &'static str {
    match request {
        Request::Create(_) => "CREATE_SNAPSHOT",
        Request::CreateBookmark(_) => "CREATE_BOOKMARK",
        Request::ToBookmark(_) => "TO_BOOKMARK",
        Request::WhenFull(..) => "WHEN_FULL",
        Request::Delete(_) => "DELETE_SNAPSHOT",
        Request::List => "LIST_SNAPSHOTS",
        Request::Status | Request::Usage => "STATUS",
        Request::State(_) => "REQUEST_SNAPSHOT_STATE",
        Request::Sectors(_) => "REQUEST_SNAPSHOT_SECTORS",
        Request::Priority(..) => "PRIORITY",
        Request::UseCount(..) => "USECOUNT",
        Request::Changelist { .. } => "STREAM_CHANGELIST",
        Request::Resize { .. } => "RESIZE",
        Request::DumpTree { .. } => "DUMP_TREE_RANGE",
        Request::Revert(_) => "REVERT",
        Request::Scrub(_) => "SCRUB",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(trigger: &str, count: &str, action: &str) -> Result<Faults> {
        Faults::parse(|name| {
            let value = match name {
                "DDSNAP_TRIGGER" => trigger,
                "DDSNAP_COUNT" => count,
                _ => action,
            };
            (!value.is_empty()).then(|| value.to_owned())
        })
    }

    #[test]
    fn the_nth_occurrence_is_hit_once() {
        let mut faults = faults("QUERY_WRITE", "2", "delay_ms 7").unwrap();
        assert_eq!(faults.hit("IDENTIFY"), None);
        assert_eq!(faults.hit("QUERY_WRITE"), None);
        assert_eq!(
            faults.hit("QUERY_WRITE"),
            Some(Action::Delay(Duration::from_millis(7)))
        );
        assert_eq!(faults.hit("QUERY_WRITE"), None);
    }

    /// Every command of the control socket is a trigger: a changelist was none.
    #[test]
    fn a_changelist_can_be_hit() {
        let mut faults = faults("STREAM_CHANGELIST", "", "close").unwrap();
        assert_eq!(faults.hit("STREAM_CHANGELIST"), Some(Action::Close));
    }

    #[test]
    fn any_counts_every_message() {
        let mut faults = faults("any", "3", "close").unwrap();
        assert_eq!(faults.hit("STATUS"), None);
        assert_eq!(faults.hit("IDENTIFY"), None);
        assert_eq!(faults.hit("GONE"), Some(Action::Close));
    }

    #[test]
    fn nothing_is_armed_without_a_trigger_and_nonsense_is_named() {
        assert_eq!(faults("", "", "abort").unwrap(), Faults::default());
        for (trigger, count, action, named) in [
            ("NO_SUCH", "1", "abort", "NO_SUCH"),
            ("any", "0", "abort", "DDSNAP_COUNT=0"),
            ("any", "x", "abort", "DDSNAP_COUNT=x"),
            ("any", "1", "explode", "explode"),
            ("any", "1", "delay_ms", "delay_ms"),
            ("any", "1", "", "DDSNAP_ACTION"),
        ] {
            let error = format!("{:#}", faults(trigger, count, action).unwrap_err());
            assert!(error.contains(named), "{error}");
        }
    }
}
