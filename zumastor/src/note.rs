// SPDX-License-Identifier: GPL-2.0-only
//! What happens while an operation runs, for the administrator.

use serde::{Deserialize, Serialize};

/// Something to tell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Note {
    /// What was done, or where the result is.
    Line(String),
    /// Of interest to who asks for details.
    Detail(String),
    /// Something is not as it should be, though the operation goes on.
    Warning(String),
    /// How far it is.
    Progress(Progress),
}

impl Note {
    /// So many bytes of `subject` are done of so many.
    #[must_use]
    pub fn progress(subject: &str, done: u64, total: u64) -> Note {
        Note::Progress(Progress {
            subject: subject.to_string(),
            done,
            total,
        })
    }
}

/// How far something is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Progress {
    /// What is being done, as a participle: "zeroing the origin".
    pub subject: String,
    /// So many bytes are done.
    pub done: u64,
    /// Of so many; 0 if it is not known.
    pub total: u64,
}

/// Takes notes while an operation runs.
pub type Out<'a> = &'a mut dyn FnMut(Note);
