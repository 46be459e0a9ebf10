// SPDX-License-Identifier: GPL-2.0-only
//! The engine's refusals in the words and numbers that scripts and the kernel know.

use nix::errno::Errno;

use crate::protocol::control::Reply;
use crate::store::OpError;

/// What a client is told.
#[must_use]
pub fn reply(refused: &OpError) -> Reply {
    let (errno, reason) = match refused {
        OpError::NoSuchSnapshot(_) => (Errno::ENOENT, "snapshot doesn't exist".to_owned()),
        OpError::SnapshotExists(_) => (Errno::EEXIST, "snapshot already exists".to_owned()),
        OpError::TooManySnapshots => (Errno::ENOSPC, "too many snapshots".to_owned()),
        OpError::InUse(_) => (Errno::EBUSY, "snapshot has non-zero usecount".to_owned()),
        OpError::Reverting(_) => (Errno::EBUSY, refused.to_string()),
        OpError::StoreFull => (Errno::ENOSPC, "the snapshot store is full".to_owned()),
        OpError::Wait => (Errno::EAGAIN, refused.to_string()),
        OpError::UsecountUnderflow => (Errno::EINVAL, "Usecount underflow.".to_owned()),
        OpError::UsecountOverflow => (Errno::EINVAL, "Usecount overflow.".to_owned()),
        OpError::Squashed(_) => (Errno::EIO, "snapshot is squashed".to_owned()),
        OpError::Bookmark(_) => (
            Errno::EINVAL,
            "it is a bookmark, which keeps no data".to_owned(),
        ),
        OpError::Doubtful(_) => (Errno::EIO, refused.to_string()),
        OpError::OutOfRange(_) => (Errno::EINVAL, refused.to_string()),
    };
    with_errno(errno, reason)
}

/// A refusal of the server's own.
#[must_use]
pub fn with_errno(errno: Errno, reason: String) -> Reply {
    Reply::Error {
        errno: errno as i32,
        reason,
    }
}

/// The errno that a refused I/O fails with. Full is the one thing a file system can tell apart.
#[must_use]
pub fn io_errno(refused: &OpError) -> i32 {
    match refused {
        OpError::StoreFull => Errno::ENOSPC as i32,
        _ => Errno::EIO as i32,
    }
}
