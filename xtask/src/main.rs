// SPDX-License-Identifier: GPL-2.0-only
//! `cargo xtask`: builds, packages and tests Zumastor.
//!
//! Each task is one module; `flags` is the command line. Whatever takes long is
//! cached by content outside the checkout (see `paths::cache`).

mod bench;
mod cache;
mod crashtest;
mod deb;
mod deny;
mod digest;
mod flags;
mod guest;
mod hand;
mod image;
mod kernel;
mod lock;
mod mutants;
mod packages;
mod paths;
mod scenario;
mod test;
mod tidy;
mod ui;
mod vm;
mod vmtest;

use std::process::ExitCode;

use clap::Parser;

use flags::{Bench, Flags, Task};

fn main() -> ExitCode {
    match run(Flags::parse().task) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("error: {error:#}");
            let not_allowed = error.downcast_ref::<packages::NotAllowed>().is_some();
            ExitCode::from(if not_allowed { 2 } else { 1 })
        }
    }
}

fn run(task: Task) -> anyhow::Result<u8> {
    match task {
        Task::Deb => {
            for deb in deb::build()? {
                println!("{}", deb.display());
            }
        }
        Task::Kernel(kernel) => {
            let built = kernel::build(&kernel.config, kernel::Driver::With)?;
            for deb in kernel::publish(&built)? {
                println!("{}", deb.display());
            }
        }
        Task::Vm(vm) => return hand::run(vm),
        Task::Vmtest(flags) => return Ok(if vmtest::vmtest(&flags)? { 0 } else { 1 }),
        Task::Test(flags) => test::test(&flags)?,
        Task::Crashtest(flags) => return crashtest::crashtest(&flags),
        Task::Mutants(flags) => return mutants::mutants(&flags),
        Task::Tidy(flags) => tidy::tidy(flags.bless)?,
        Task::Deny => deny::deny()?,
        Task::Bench(Bench::Engine(flags)) => bench::engine(&flags)?,
        Task::Bench(Bench::Replication(flags)) => bench::replication(&flags)?,
    }
    Ok(0)
}
