// SPDX-License-Identifier: GPL-2.0-only
//! `cargo xtask bench replication`: what replication puts on the wire and how long it takes, against zstd,
//! `dd | ssh | dd`, rsync and plain reading in the same minutes on the same files.
//!
//! Both ends run as a program of their own, `zumastor/benches/replication`, on plain files: what a snapshot
//! store or a mounted file system adds is not in these figures.

use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::figure::{self, Figure, Goal};
use super::program::Program;
use super::{Files, chart, table, write};
use crate::flags::BenchReplication;
use crate::{packages, paths};

/// Sizes of a run.
struct Scale {
    volume_bytes: u64,
    /// Chunks of 16 KiB that change for wire and rate.
    changes: u64,
    tree_files: u64,
    rounds: usize,
}

const FULL: Scale = Scale {
    volume_bytes: 10 << 30,
    changes: 6554,
    tree_files: 100_000,
    rounds: 3,
};

/// To try the program; its numbers say little.
const QUICK: Scale = Scale {
    volume_bytes: 256 << 20,
    changes: 1024,
    tree_files: 2000,
    rounds: 1,
};

/// Measures, prints the table and writes JSON and chart.
pub fn replication(flags: &BenchReplication) -> Result<()> {
    packages::require(&["openssh-client", "openssh-server", "rsync"])?;
    let program = Program::build("zumastor", "replication")?;
    let parent = flags
        .dir
        .clone()
        .unwrap_or_else(|| paths::target().join("bench"));
    let files = Files::new(&parent)?;
    let scale = if flags.quick { QUICK } else { FULL };
    let mut figures = Vec::new();
    wire(&program, &files, &scale, &mut figures)?;
    let ssh = Ssh::start(&files)?;
    rates(&program, &files, &scale, &ssh, &mut figures)?;
    tree(&program, &files, &scale, &ssh, &mut figures)?;
    print!("{}", table::render(&figures, None));
    let json = flags
        .json
        .clone()
        .unwrap_or_else(|| parent.join("replication.json"));
    write(&json, &figure::json(&figures)?)?;
    let title = "replication: measured value to its bound";
    write(&json.with_extension("svg"), &chart::render(&figures, title))?;
    Ok(())
}

fn make(
    program: &Program,
    dir: &Path,
    bytes: u64,
    changes: u64,
    small: bool,
) -> Result<(f64, f64)> {
    let mut args = vec![
        "make".to_owned(),
        "--dir".to_owned(),
        dir.display().to_string(),
        "--bytes".to_owned(),
        bytes.to_string(),
        "--changes".to_owned(),
        changes.to_string(),
    ];
    if small {
        args.push("--small".to_owned());
    }
    let numbers = program.run(&args)?;
    Ok((numbers.get("make/changed")?, numbers.get("make/zstd")?))
}

fn on(what: &str, dir: &Path) -> Vec<String> {
    vec![
        what.to_owned(),
        "--dir".to_owned(),
        dir.display().to_string(),
    ]
}

/// Bytes on the wire, for whole chunks and for small changes within chunks.
fn wire(program: &Program, files: &Files, scale: &Scale, figures: &mut Vec<Figure>) -> Result<()> {
    let dir = files.path("wire");
    let bytes = scale.volume_bytes.min(1 << 30);
    let names = [
        ("wire/increment", false, 1.02),
        ("wire/small-changes", true, 0.25),
    ];
    for (name, small, most) in names {
        let (_, packed) = make(program, &dir, bytes, scale.changes.min(bytes >> 15), small)?;
        let numbers = program.run(&on("pair", &dir))?;
        let against = (packed, "zstd of each changed chunk");
        let sent = numbers.get("pair/wire")?;
        figures.push(Figure::new(name, sent, "B", against, Goal::AtMost(most)));
        if !small {
            let sums = program.run(&on("sums", &dir))?.get("sums/seconds")?;
            let against = (numbers.get("pair/cpu")?, "processor time of both ends");
            let goal = Goal::AtMost(0.05);
            // Both ends keep sums.
            figures.push(Figure::new(
                "processor/sums",
                2.0 * sums,
                "s",
                against,
                goal,
            ));
            let rss = numbers.get("pair/rss")? / 2.0;
            let most = f64::from(64 << 20);
            figures.push(Figure::limited("memory/end", rss, "B", most));
        }
    }
    remove(&dir)
}

/// Seconds by way of a loopback ssh, against dd and rsync.
fn rates(
    program: &Program,
    files: &Files,
    scale: &Scale,
    ssh: &Ssh,
    figures: &mut Vec<Figure>,
) -> Result<()> {
    let dir = files.path("rate");
    let (changed, _) = make(program, &dir, scale.volume_bytes, scale.changes, false)?;
    let (mut ours, mut dds, mut rsyncs) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..scale.rounds {
        fs::copy(dir.join("old"), dir.join("target"))?;
        ours.push(ssh.cycle(program, &dir)?);
        compare(&dir.join("new"), &dir.join("target"))?;
        dds.push(ssh.dd(&dir)?);
        fs::copy(dir.join("old"), dir.join("target"))?;
        rsyncs.push(ssh.rsync(
            &["--inplace", "--no-whole-file"],
            &dir.join("new"),
            &dir.join("target"),
        )?);
    }
    let (ours, dd, rsync) = (best(&ours), best(&dds), best(&rsyncs));
    let against = (changed / dd, "dd | ssh | dd of the changed bytes");
    let goal = Goal::AtLeast(0.8);
    figures.push(Figure::new(
        "rate/increment",
        changed / ours,
        "B/s",
        against,
        goal,
    ));
    let against = (ours, "a cycle of the same change");
    let goal = Goal::AtLeast(10.0);
    figures.push(Figure::new("rsync/image", rsync, "s", against, goal));
    verify(program, &dir, scale, figures)?;
    remove(&dir)
}

/// How fast a snapshot that both ends have is compared, against reading it once; both from the disk.
fn verify(program: &Program, dir: &Path, scale: &Scale, figures: &mut Vec<Figure>) -> Result<()> {
    let (mut bytes, mut ours, mut reads) = (0.0, Vec::new(), Vec::new());
    for _ in 0..scale.rounds {
        let numbers = program.run(&on("verify", dir))?;
        bytes = numbers.get("verify/bytes")?;
        ours.push(numbers.get("verify/seconds")?);
        reads.push(numbers.get("verify/read")?);
    }
    let against = (bytes / best(&reads), "reading it once");
    let goal = Goal::AtLeast(0.8);
    let rate = bytes / best(&ours);
    figures.push(Figure::new("rate/verify", rate, "B/s", against, goal));
    Ok(())
}

/// A tree of small files with one in a hundred changed, against a cycle of as many changed chunks.
fn tree(
    program: &Program,
    files: &Files,
    scale: &Scale,
    ssh: &Ssh,
    figures: &mut Vec<Figure>,
) -> Result<()> {
    let (dir, image) = (files.path("tree"), files.path("image"));
    let text = "what a small file holds\n".repeat(200);
    for number in 0..scale.tree_files {
        let parent = dir.join(format!("{}", number / 1000));
        if number % 1000 == 0 {
            fs::create_dir_all(&parent)?;
        }
        fs::write(parent.join(format!("{number}")), format!("{number} {text}"))?;
    }
    let copy = files.path("copy");
    ssh.rsync(&["-a"], &dir.join(""), &copy.join(""))?;
    for number in (0..scale.tree_files).step_by(100) {
        let file = dir
            .join(format!("{}", number / 1000))
            .join(format!("{number}"));
        fs::write(file, format!("{number} changed {text}"))?;
    }
    let rsync = ssh.rsync(&["-a"], &dir.join(""), &copy.join(""))?;
    // Each changed file is a chunk of data and half a chunk of inodes and directories.
    let changes = scale.tree_files / 100 * 3 / 2;
    make(
        program,
        &image,
        (scale.tree_files * 8192).max(64 << 20),
        changes,
        false,
    )?;
    let ours = ssh.cycle(program, &image)?;
    let against = (ours, "a cycle of as many changed chunks");
    let goal = Goal::AtLeast(20.0);
    figures.push(Figure::new("rsync/tree", rsync, "s", against, goal));
    for dir in [dir, copy, image] {
        remove(&dir)?;
    }
    Ok(())
}

fn best(seconds: &[f64]) -> f64 {
    seconds.iter().copied().fold(f64::INFINITY, f64::min)
}

fn remove(dir: &Path) -> Result<()> {
    fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))
}

fn compare(a: &Path, b: &Path) -> Result<()> {
    let same = Command::new("cmp").arg("-s").args([a, b]).status()?;
    if !same.success() {
        bail!("{} and {} differ", a.display(), b.display());
    }
    Ok(())
}

/// A server of our own on the loopback, with keys of its own.
struct Ssh {
    server: Child,
    port: u16,
    key: PathBuf,
}

impl Ssh {
    fn start(files: &Files) -> Result<Ssh> {
        let dir = files.path("ssh");
        fs::create_dir_all(&dir)?;
        for name in ["host", "user"] {
            run(Command::new("ssh-keygen")
                .args(["-q", "-t", "ed25519", "-N", "", "-f"])
                .arg(dir.join(name)))?;
        }
        fs::copy(dir.join("user.pub"), dir.join("authorized"))?;
        // What a free port is now may be taken a moment later; then the server says so.
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = format!(
            "ListenAddress 127.0.0.1:{port}\nHostKey {0}/host\nAuthorizedKeysFile {0}/authorized\n\
             PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\n",
            dir.display()
        );
        fs::write(dir.join("config"), config)?;
        fs::create_dir_all("/run/sshd").ok();
        let server = Command::new("/usr/sbin/sshd")
            .args(["-D", "-e", "-f"])
            .arg(dir.join("config"))
            .stderr(Stdio::null())
            .spawn()
            .context("cannot run sshd")?;
        let ssh = Ssh {
            server,
            port,
            key: dir.join("user"),
        };
        let end = Instant::now() + Duration::from_secs(20);
        while run(ssh.command().arg("true")).is_err() {
            if Instant::now() > end {
                bail!("the ssh server does not answer");
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(ssh)
    }

    fn options(&self) -> Vec<String> {
        let mut options: Vec<String> = ["-T", "-q", "-o", "BatchMode=yes", "-o"]
            .map(String::from)
            .into();
        options.extend(
            [
                "StrictHostKeyChecking=no",
                "-o",
                "UserKnownHostsFile=/dev/null",
            ]
            .map(String::from),
        );
        options.extend(["-p".to_owned(), self.port.to_string(), "-i".to_owned()]);
        options.push(self.key.display().to_string());
        options
    }

    fn command(&self) -> Command {
        let mut command = Command::new("ssh");
        command.args(self.options()).arg("127.0.0.1");
        command
    }

    /// Seconds of a cycle.
    fn cycle(&self, program: &Program, dir: &Path) -> Result<f64> {
        let began = Instant::now();
        let mut far = self
            .command()
            .arg(program.path())
            .args(on("receive", dir))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = far.stdout.take().context("no output")?;
        let output = far.stdin.take().context("no input")?;
        // The command itself holds a copy of the pipe: it must be gone for the other end to see ours close.
        let mut near = Command::new(program.path())
            .args(on("send", dir))
            .stdin(input)
            .stdout(output)
            .spawn()?;
        if !near.wait()?.success() {
            bail!("the sending end failed");
        }
        if !far.wait()?.success() {
            bail!("the receiving end failed");
        }
        Ok(began.elapsed().as_secs_f64())
    }

    /// Seconds of copying the changed bytes.
    fn dd(&self, dir: &Path) -> Result<f64> {
        let began = Instant::now();
        let mut near = Command::new("dd")
            .arg(format!("if={}", dir.join("changed").display()))
            .args(["bs=1M", "status=none"])
            .stdout(Stdio::piped())
            .spawn()?;
        let input = near.stdout.take().context("no output")?;
        run(self
            .command()
            .arg(format!(
                "dd of={} bs=1M iflag=fullblock conv=fsync status=none",
                dir.join("copied").display()
            ))
            .stdin(input))?;
        if !near.wait()?.success() {
            bail!("dd failed");
        }
        Ok(began.elapsed().as_secs_f64())
    }

    /// Seconds of an rsync.
    fn rsync(&self, options: &[&str], from: &Path, to: &Path) -> Result<f64> {
        let began = Instant::now();
        let shell = format!("ssh {}", self.options().join(" "));
        run(Command::new("rsync")
            .args(options)
            .args(["-e", &shell])
            .arg(from)
            .arg(format!("127.0.0.1:{}", to.display())))?;
        run(&mut Command::new("sync"))?;
        Ok(began.elapsed().as_secs_f64())
    }
}

impl Drop for Ssh {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

fn run(command: &mut Command) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let status = command
        .status()
        .with_context(|| format!("cannot run {name}"))?;
    if !status.success() {
        bail!("{name} failed ({status})");
    }
    Ok(())
}
