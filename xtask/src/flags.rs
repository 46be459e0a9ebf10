// SPDX-License-Identifier: GPL-2.0-only
//! The command line of `cargo xtask`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::image::Distro;
use crate::image::booted::DEFAULT_DISKS;

/// Builds, packages and tests Zumastor.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
pub struct Flags {
    /// What to do.
    #[command(subcommand)]
    pub task: Task,
}

/// The tasks.
#[derive(Subcommand)]
pub enum Task {
    /// Run the scenarios of vmtest/scenarios/ in guests, building whatever they need.
    Vmtest(Vmtest),
    /// Run every test: format, lints, tidy, unit and integration tests, one scenario.
    #[command(alias = "ci")]
    Test(Test),
    /// Cut the power at random points of random workloads, on all cores; check what comes back.
    Crashtest(Crashtest),
    /// Break each promise of the engine, one at a time; see whether a test notices.
    Mutants(Mutants),
    /// Build the Debian packages into target/deb/.
    Deb,
    /// Build the kernel packages into target/kernel/.
    Kernel(Kernel),
    /// Start, use and stop a guest by hand.
    #[command(subcommand)]
    Vm(Vm),
    /// Check what needs no compiler: imports between modules, documents, scenarios, text.
    Tidy(Tidy),
    /// Check licences and advisories of the dependencies, where cargo-deny is installed.
    Deny,
    /// Measure; nothing passes or fails.
    #[command(subcommand)]
    Bench(Bench),
}

/// Options of `vmtest`.
#[derive(Args)]
pub struct Vmtest {
    /// Scenarios to run; all of them but the long ones when none is named.
    pub names: Vec<String>,
    /// Run the long scenarios too.
    #[arg(long, conflicts_with = "names")]
    pub all: bool,
    /// Seed of random moments and of what power cuts lose; another one each time if it is not given.
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// List the scenarios and what they show.
    #[arg(long)]
    pub list: bool,
    /// Write the results as JUnit XML.
    #[arg(long, value_name = "FILE")]
    pub junit: Option<PathBuf>,
    /// Write the results as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Keep the disks of scenarios that pass, too.
    #[arg(long)]
    pub keep: bool,
    /// Debian release of the guests.
    #[arg(long, value_enum, default_value_t)]
    pub distro: Distro,
    /// Kernel configuration of the guests (kernel-config/NAME.config), for
    /// scenarios that name none.
    #[arg(long, value_name = "NAME", default_value = "qemu")]
    pub kernel: String,
    /// Debian's own kernel with the module that DKMS builds, for scenarios that name neither image nor kernel.
    #[arg(long, conflicts_with = "kernel")]
    pub stock: bool,
}

/// Options of `test`.
#[derive(Args)]
pub struct Test {
    /// Leave the guest out: for machines without QEMU.
    #[arg(long)]
    pub no_vm: bool,
}

/// Options of `crashtest`.
#[derive(Args)]
pub struct Crashtest {
    /// Power cuts to try.
    #[arg(long, value_name = "N", default_value_t = 100_000)]
    pub points: u64,
    /// Seed of the run, to repeat it; another one each time if it is not given.
    #[arg(long, value_name = "S")]
    pub seed: Option<u64>,
    /// Only this job of the run, as a loss names it.
    #[arg(long, value_name = "J")]
    pub job: Option<u64>,
    /// Print every step.
    #[arg(long)]
    pub trace: bool,
    /// Write the result as JSON.
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
}

/// Options of `mutants`.
#[derive(Args)]
pub struct Mutants {
    /// Promises to break; all of them when none is named.
    pub names: Vec<String>,
    /// List the promises and what goes wrong without them.
    #[arg(long)]
    pub list: bool,
    /// Power cuts of each run of the crash test.
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    pub points: u64,
    /// Runs of the crash test, each with a seed of its own.
    #[arg(long, value_name = "N", default_value_t = 3)]
    pub seeds: u64,
}

/// Options of `kernel`.
#[derive(Args)]
pub struct Kernel {
    /// Configuration: kernel-config/NAME.config over base.config.
    #[arg(long, value_name = "NAME", default_value = "qemu")]
    pub config: String,
}

/// Options of `tidy`.
#[derive(Args)]
pub struct Tidy {
    /// Record that FORMAT.md and PROTOCOL.md describe the sources as they are now.
    #[arg(long)]
    pub bless: bool,
}

/// `bench` commands.
#[derive(Subcommand)]
pub enum Bench {
    /// The snapshot store's engine on files, against what fio gets out of the same disk.
    Engine(BenchEngine),
    /// Replication of plain files, against zstd, dd by way of ssh, and rsync.
    Replication(BenchReplication),
}

/// Options of `bench replication`.
#[derive(Args)]
pub struct BenchReplication {
    /// Write the figures as JSON here and a chart beside it [default: replication.json in the directory].
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Directory for the files, up to 45 GB [default: target/bench].
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// A short run to try the program; its numbers say little.
    #[arg(long)]
    pub quick: bool,
}

/// Options of `bench engine`.
#[derive(Args)]
pub struct BenchEngine {
    /// What to measure; everything when nothing is named.
    #[arg(value_enum, value_name = "PART")]
    pub parts: Vec<EnginePart>,
    /// Write the figures as JSON here and a chart beside it [default: engine.json in the directory].
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    /// Directory for the files, on the disk to be measured; up to 10 GB [default: target/bench].
    #[arg(long, value_name = "DIR")]
    pub dir: Option<PathBuf>,
    /// A short run to try the program; its numbers say little.
    #[arg(long)]
    pub quick: bool,
}

/// A part of `bench engine`, in the order in which they are measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum EnginePart {
    /// Copy-outs of one snapshot, and changes noted for a bookmark.
    Copyouts,
    /// Copy-outs with 1 to 4,096 snapshots.
    Snapshots,
    /// An index of ten million exceptions: sizes, openings, pauses, lists of changes.
    Index,
}

/// What a guest started by hand contains.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageName {
    /// Our kernel and our packages.
    Ddsnap,
    /// Debian's kernel; our packages lie in /srv/debs.
    Stock,
}

/// `vm` commands.
#[derive(Subcommand)]
pub enum Vm {
    /// Start guests.
    Up(Up),
    /// Run a command in it, with standard input, output, error and exit code passed through.
    Exec(Exec),
    /// Copy a file into it.
    Push(Push),
    /// Copy a file out of it.
    Pull(Pull),
    /// Log in to it, as root.
    Ssh(Ssh),
    /// Kill it without warning and boot it again from its disks; what it wrote is kept, flushed or not.
    PowerCut(Named),
    /// Pull the cable of its private network, or plug it in.
    Link(Link),
    /// Stop guests and remove their disks.
    Down(Down),
}

/// Options of `vm link`.
#[derive(Args)]
pub struct Link {
    /// The guest's name.
    pub name: String,
    /// What the cable shall be.
    #[arg(value_enum)]
    pub state: LinkState,
}

/// The state of a network cable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LinkState {
    /// Plugged in.
    Up,
    /// Pulled.
    Down,
}

/// Options of `vm down`.
#[derive(Args)]
pub struct Down {
    /// The guests' names.
    #[arg(default_value = "vm")]
    pub names: Vec<String>,
}

/// A guest by its name.
#[derive(Args)]
pub struct Named {
    /// The guest's name.
    #[arg(default_value = "vm")]
    pub name: String,
}

/// Options of `vm up`.
#[derive(Args)]
pub struct Up {
    /// Names of your choice.
    #[arg(default_value = "vm")]
    pub names: Vec<String>,
    /// Join them by a private network; each is reached by its name, and by ssh as root.
    #[arg(long)]
    pub network: bool,
    /// What it contains.
    #[arg(long, value_enum, default_value_t = ImageName::Ddsnap)]
    pub image: ImageName,
    /// Our kernel without dm-ddsnap, and none of our packages.
    #[arg(long, conflicts_with = "image")]
    pub bare: bool,
    /// Debian release.
    #[arg(long, value_enum, default_value_t)]
    pub distro: Distro,
    /// Kernel configuration.
    #[arg(long, value_name = "NAME", default_value = "qemu")]
    pub kernel: String,
    /// Sizes of the blank disks /dev/vdb, /dev/vdc, ...
    #[arg(
        long,
        value_name = "SIZE",
        value_delimiter = ',',
        default_values = DEFAULT_DISKS
    )]
    pub disks: Vec<String>,
}

/// Options of `vm exec`.
#[derive(Args)]
pub struct Exec {
    /// The guest's name.
    pub name: String,
    /// Seconds until the command is given up.
    #[arg(long, default_value_t = 3600)]
    pub timeout: u64,
    /// The command and its arguments.
    #[arg(last = true, required = true)]
    pub command: Vec<String>,
}

/// Options of `vm push`.
#[derive(Args)]
pub struct Push {
    /// The guest's name.
    pub name: String,
    /// File here.
    pub from: PathBuf,
    /// File there.
    pub to: String,
}

/// Options of `vm pull`.
#[derive(Args)]
pub struct Pull {
    /// The guest's name.
    pub name: String,
    /// File there.
    pub from: String,
    /// File here.
    pub to: PathBuf,
}

/// Options of `vm ssh`.
#[derive(Args)]
pub struct Ssh {
    /// The guest's name.
    #[arg(default_value = "vm")]
    pub name: String,
    /// A command instead of a shell.
    #[arg(last = true)]
    pub command: Vec<String>,
}
