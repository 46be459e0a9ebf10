// SPDX-License-Identifier: GPL-2.0-only
//! Failures that scripts tell apart by their exit code.

use thiserror::Error;

/// Any other failure.
pub const FAILED: u8 = 1;
/// The volume is not one that can, or not now: of `receive start` and `receive done`.
pub const WRONG_STATE: u8 = 2;
/// Not all has arrived: of `receive done`.
pub const INCOMPLETE: u8 = 3;
/// The number of snapshots would be too high: of `define schedule`.
pub const BUDGET: u8 = 3;
/// Another snapshot store lies where the volume's own should: of what starts a volume.
pub const OTHER_STORE: u8 = 3;
/// The period is none: of `define source`.
pub const BAD_PERIOD: u8 = 3;
/// There is no such volume: of `define source`.
pub const UNMANAGED: u8 = 4;
/// The host is none: of `define source`.
pub const BAD_HOST: u8 = 5;
/// Any other mistake in the command line of `define source`.
pub const SOURCE_USAGE: u8 = 6;
/// Both sides were compared, and differ: of `verify`.
pub const DIFFERS: u8 = 4;

/// A failure with an exit code of its own.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("{text}")]
pub struct Refusal {
    /// The exit code.
    pub code: u8,
    /// Why, in a sentence.
    pub text: String,
}

/// Gives a failure an exit code of its own.
#[must_use]
pub fn with(error: &anyhow::Error, code: u8) -> anyhow::Error {
    let text = format!("{error:#}");
    Refusal { code, text }.into()
}

/// The exit code of a failure.
#[must_use]
pub fn code(error: &anyhow::Error) -> u8 {
    error.downcast_ref::<Refusal>().map_or(FAILED, |r| r.code)
}
