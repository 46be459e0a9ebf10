// SPDX-License-Identifier: GPL-2.0-only
//! The flushes, orders and guards that keep data safe, each under a name, beside the code that keeps it.
//!
//! `cargo xtask mutants` breaks one after the other and looks whether a test notices. [`kept!`] is the
//! constant `true` in every other build: the feature `mutants` is for that one build of the tests.

/// Whether the promise `$name` is kept; `$why` says in a sentence what goes wrong if it is not.
///
/// Names are unique; `cargo xtask mutants` finds them, and their sentences, in the sources.
#[cfg(not(feature = "mutants"))]
macro_rules! kept {
    ($name:literal, $why:literal) => {
        true
    };
}

/// Whether the promise `$name` is kept: not if it is the one that is to be broken.
#[cfg(feature = "mutants")]
macro_rules! kept {
    ($name:literal, $why:literal) => {
        $crate::promise::is_kept($name)
    };
}

pub(crate) use kept;

/// Names the promise to break.
#[cfg(feature = "mutants")]
const BREAK: &str = "DDSNAP_BREAK";
/// Names a file to make when it was broken.
#[cfg(feature = "mutants")]
const BROKEN: &str = "DDSNAP_BROKEN";

#[cfg(feature = "mutants")]
pub(crate) fn is_kept(name: &str) -> bool {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};
    static TO_BREAK: OnceLock<Option<String>> = OnceLock::new();
    static TOLD: AtomicBool = AtomicBool::new(false);
    let to_break = TO_BREAK.get_or_init(|| std::env::var(BREAK).ok());
    if to_break.as_deref() != Some(name) {
        return true;
    }
    if !TOLD.swap(true, Ordering::Relaxed) {
        if let Some(file) = std::env::var_os(BROKEN) {
            // Without the file the table says that the promise was never reached.
            let _ = std::fs::write(file, name);
        }
    }
    false
}
