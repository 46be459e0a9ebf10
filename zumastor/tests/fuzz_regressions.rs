// SPDX-License-Identifier: GPL-2.0-only
//! Every input that a fuzz target once found something with, and a few that reach far, as a plain test.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

#[path = "../fuzz/src/lib.rs"]
mod fuzz;

use std::fs;
use std::path::Path;

#[test]
fn no_target_finds_anything_in_its_inputs() {
    let inputs = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/regressions");
    for (name, run) in fuzz::TARGETS {
        let mut files: Vec<_> = fs::read_dir(inputs.join(name))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect();
        files.sort();
        assert!(!files.is_empty(), "{name} has no inputs");
        for file in files {
            let data = fs::read(&file).unwrap();
            println!("{}: {} bytes", file.display(), data.len());
            run(&data);
        }
        run(&[]);
    }
}
