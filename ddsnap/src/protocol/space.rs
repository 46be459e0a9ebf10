// SPDX-License-Identifier: GPL-2.0-only
//! When a store is so full that somebody should know: the same rule for the server's log and for what
//! the command line shows.

use super::control::Status;

/// The level begins when less than this part of the data chunks or metadata blocks is free, in percent.
pub const LOW_PERCENT: u64 = 10;
/// The server's log takes a level as left when so much more than where it begins is free, in percent:
/// else a store at the edge would fill the log.
pub const MARGIN_PERCENT: u64 = 2;

/// How full a store is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// There is room.
    #[default]
    Plenty,
    /// Less than [`LOW_PERCENT`] is free.
    Low,
    /// Copies have no room: snapshots are given up, or writes fail. Deleting still works.
    Reserve,
}

impl Level {
    /// Of a store of this status. Metadata blocks that only deleting may use do not count as free.
    #[must_use]
    pub fn of(status: &Status) -> Level {
        Self::at(status, 0)
    }

    /// As [`of`](Self::of), but the levels begin so much earlier.
    #[must_use]
    pub fn at(status: &Status, margin_percent: u64) -> Level {
        let meta_free = status.copy_meta_blocks();
        let parts = [
            (status.free_chunks, status.data_chunks),
            (meta_free, status.meta_blocks),
        ];
        let below = |percent| {
            let is_below = |&(free, all): &(u64, u64)| {
                u128::from(free) * 100 < u128::from(all) * u128::from(percent)
            };
            parts.iter().any(is_below)
        };
        let none = parts.iter().any(|&(free, _)| free == 0);
        if status.refusing || none || below(margin_percent) {
            Level::Reserve
        } else if below(LOW_PERCENT + margin_percent) {
            Level::Low
        } else {
            Level::Plenty
        }
    }

    /// One sentence about it with what to do; none while there is room.
    #[must_use]
    pub fn warning(self, status: &Status) -> Option<String> {
        let what = match self {
            Level::Plenty => return None,
            Level::Low => {
                let percent = |free: u64, all: u64| u128::from(free) * 100 / u128::from(all.max(1));
                format!(
                    "the snapshot store is nearly full: {} % of its data chunks and {} % of its \
                     metadata blocks are free",
                    percent(status.free_chunks, status.data_chunks),
                    percent(status.copy_meta_blocks(), status.meta_blocks)
                )
            }
            Level::Reserve if status.refusing => {
                "the snapshot store is full: writes fail, because no snapshot may be given up"
                    .to_owned()
            }
            Level::Reserve => "the snapshot store is full: the next writes give up snapshots, or \
                               fail if none may be given up"
                .to_owned(),
        };
        Some(format!(
            "{what}; delete snapshots (ddsnap delete) or make the store larger (ddsnap resize)"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::protocol::control::ChannelState;
    use crate::units::ChunkShift;

    fn status(free_chunks: u64, free_meta_blocks: u64) -> Status {
        Status {
            chunk: ChunkShift::new(12).unwrap(),
            data_chunks: 1000,
            free_chunks,
            meta_blocks: 500,
            free_meta_blocks,
            reserved_meta_blocks: 40,
            separate_meta: false,
            origin_sectors: 8,
            created: 0,
            deleting: 0,
            channel: ChannelState::Absent,
            refusing: false,
            reverting: None,
            fault: String::new(),
        }
    }

    #[test]
    fn levels_begin_where_they_are_documented() {
        for (free_chunks, free_meta, level) in [
            (100, 90, Level::Plenty),
            (99, 90, Level::Low),
            (100, 89, Level::Low),
            (1, 41, Level::Low),
            (0, 500, Level::Reserve),
            (1000, 40, Level::Reserve),
            (1000, 7, Level::Reserve),
        ] {
            let status = status(free_chunks, free_meta);
            assert_eq!(Level::of(&status), level, "{free_chunks}, {free_meta}");
        }
        let refusing = Status {
            refusing: true,
            ..status(1000, 500)
        };
        assert_eq!(Level::of(&refusing), Level::Reserve);
    }

    #[test]
    fn a_level_is_left_with_a_margin() {
        for (free_chunks, level) in [
            (120, Level::Plenty),
            (119, Level::Low),
            (20, Level::Low),
            (19, Level::Reserve),
        ] {
            assert_eq!(Level::at(&status(free_chunks, 500), MARGIN_PERCENT), level);
        }
    }

    #[test]
    fn warnings_say_what_is_left_and_what_to_do() {
        let text = |status: &Status| Level::of(status).warning(status);
        assert_eq!(text(&status(500, 500)), None);
        let low = text(&status(99, 500)).unwrap();
        assert!(
            low.contains("9 % of its data chunks and 92 % of its metadata"),
            "{low}"
        );
        assert!(low.ends_with("(ddsnap resize)"), "{low}");
        assert!(text(&status(0, 500)).unwrap().contains("give up snapshots"));
    }
}
