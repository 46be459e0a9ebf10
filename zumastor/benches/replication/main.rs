// SPDX-License-Identifier: GPL-2.0-only
//! The program behind `cargo xtask bench replication`: the real two ends on plain files, over standard
//! streams or within one process. Prints what it measured, one `NAME VALUE` a line; it judges nothing.

mod files;
mod make;

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::{Parser, Subcommand};
use nix::sys::resource::{UsageWho, getrusage};
use zumastor::replication::link::{Link, Timing};
use zumastor::replication::receive::receive;
use zumastor::replication::send::{Options, send};
use zumastor::replication::sender::Outcome;
use zumastor::replication::verify::{Verdict, verify_down, verify_up};
use zumastor::replication::volume::Watch;

use files::{Files, Side};

/// Measures replication.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand)]
enum What {
    /// Makes the files of a cycle: `old`, `new`, `target` (a copy of old), `list` and `changed`.
    Make(make::Options),
    /// Sends on standard streams.
    Send(Dir),
    /// Receives on standard streams.
    Receive(Dir),
    /// Both in one process; then compares the files.
    Pair(Dir),
    /// Compares a snapshot that both have, and reads it once without comparing.
    Verify(Dir),
    /// What the sums of the changed chunks cost, without the hashes.
    Sums(Dir),
}

#[derive(clap::Args)]
struct Dir {
    /// Where the files are.
    #[arg(long)]
    dir: PathBuf,
}

fn main() -> ExitCode {
    // `cargo test --benches` and `cargo bench` call with arguments of their own.
    if std::env::args()
        .nth(1)
        .is_none_or(|first| first.starts_with("--bench") || first == "--test")
    {
        println!("run by `cargo xtask bench replication`");
        return ExitCode::SUCCESS;
    }
    match run(Cli::parse().what) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[derive(Default)]
struct Wire(AtomicU64);

impl Watch for Wire {
    fn progress(&self, _: u64, _: Option<u64>, wire: u64) {
        self.0.store(wire, Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        false
    }
}

fn run(what: What) -> Result<()> {
    match what {
        What::Make(options) => make::run(&options),
        What::Send(Dir { dir }) => {
            let mut files = Files::open(&dir, Side::Up)?;
            let own = files.hello();
            let options = Options::default();
            done(&send(
                &mut files,
                standard_streams()?,
                own,
                &options,
                &Wire::default(),
            ))
        }
        What::Receive(Dir { dir }) => {
            let mut files = Files::open(&dir, Side::Down)?;
            let own = files.hello();
            let timing = Timing::default();
            done(&receive(
                &mut files,
                standard_streams()?,
                |_| own,
                timing,
                &Wire::default(),
            ))
        }
        What::Pair(Dir { dir }) => pair(&dir),
        What::Verify(Dir { dir }) => verify(&dir),
        What::Sums(Dir { dir }) => {
            println!("sums/seconds {}", Files::open(&dir, Side::Up)?.time_sums()?);
            Ok(())
        }
    }
}

fn done(outcome: &Outcome) -> Result<()> {
    match outcome {
        Outcome::Done { proven: true, .. } => Ok(()),
        other => bail!("{other:?}"),
    }
}

fn standard_streams() -> Result<Link> {
    let input = File::from(io::stdin().as_fd().try_clone_to_owned()?);
    let output = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    // The other side waits for the end of the stream, which comes when nobody has it open any more.
    nix::unistd::dup2_stdout(io::stderr())?;
    Ok(Link {
        reader: Box::new(input),
        writer: Box::new(output),
        cut: Arc::new(|| {}),
        greeted: false,
    })
}

fn socket(stream: &UnixStream) -> Result<Link> {
    struct Half(UnixStream);
    impl Write for Half {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    impl Drop for Half {
        fn drop(&mut self) {
            let _ = self.0.shutdown(std::net::Shutdown::Write);
        }
    }
    let whole = stream.try_clone()?;
    Ok(Link {
        reader: Box::new(stream.try_clone()?),
        writer: Box::new(Half(stream.try_clone()?)),
        cut: Arc::new(move || {
            let _ = whole.shutdown(std::net::Shutdown::Both);
        }),
        greeted: false,
    })
}

fn pair(dir: &std::path::Path) -> Result<()> {
    let (near, far) = UnixStream::pair()?;
    let (near, far) = (socket(&near)?, socket(&far)?);
    let (mut up, mut down) = (Files::open(dir, Side::Up)?, Files::open(dir, Side::Down)?);
    let wire = Wire::default();
    let (began, cpu) = (Instant::now(), cpu_seconds()?);
    let outcomes = thread::scope(|scope| {
        let receives = scope.spawn(|| {
            let own = down.hello();
            receive(&mut down, far, |_| own, Timing::default(), &Wire::default())
        });
        let own = up.hello();
        let sent = send(&mut up, near, own, &Options::default(), &wire);
        [Some(sent), receives.join().ok()]
    });
    let seconds = began.elapsed().as_secs_f64();
    let cpu = cpu_seconds()? - cpu;
    for outcome in outcomes.into_iter().flatten() {
        done(&outcome)?;
    }
    up.compare()?;
    println!("pair/seconds {seconds}");
    println!("pair/cpu {cpu}");
    println!("pair/wire {}", wire.0.load(Ordering::Relaxed));
    println!(
        "pair/rss {}",
        getrusage(UsageWho::RUSAGE_SELF)?.max_rss() * 1024
    );
    Ok(())
}

/// Both ends read one file, as if each had a disk of its own that reads as fast: a disk that both share would
/// give each of them half.
fn verify(dir: &std::path::Path) -> Result<()> {
    let (near, far) = UnixStream::pair()?;
    let (near, far) = (socket(&near)?, socket(&far)?);
    let (mut up, mut down) = (Files::open(dir, Side::Up)?, Files::open(dir, Side::Down)?);
    let read = up.time_read()?;
    let began = Instant::now();
    let verdicts = thread::scope(|scope| {
        let answers = scope.spawn(|| {
            let (own, timing) = (down.hello(), Timing::default());
            verify_down(&mut down, far, own, timing, &Wire::default())
        });
        let (own, timing) = (up.hello(), Timing::default());
        let asked = verify_up(&mut up, near, own, timing, &Wire::default());
        [Some(asked), answers.join().ok()]
    });
    let seconds = began.elapsed().as_secs_f64();
    for verdict in verdicts {
        if !matches!(verdict, Some(Verdict::Equal { .. })) {
            bail!("{verdict:?}");
        }
    }
    println!("verify/bytes {}", up.bytes());
    println!("verify/seconds {seconds}");
    println!("verify/read {read}");
    Ok(())
}

fn cpu_seconds() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let seconds =
        |time: nix::sys::time::TimeVal| time.tv_sec() as f64 + time.tv_usec() as f64 * 1e-6;
    Ok(seconds(usage.user_time()) + seconds(usage.system_time()))
}
