// SPDX-License-Identifier: GPL-2.0-only
//! Commands and daemons: everything runs with a deadline, and nothing is found by name.
//!
//! A daemon is found by its pid file, then proven: a pidfd is opened first, and only if the command
//! line behind it is the expected one is it signalled or waited for, always through the pidfd. So a
//! stale pid file whose number was given to another process harms nobody.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Seek};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use ddsnap::daemon::pidfd;
use nix::errno::Errno;
use nix::libc;
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::config::Devices;
use crate::machine::{Kind, ProcessSpec};

/// Longest wait for a daemon to be up: the server may have a journal to replay.
const START_DEADLINE: Duration = Duration::from_secs(120);
/// Longest wait for a daemon that was asked to end, before it is killed.
const STOP_DEADLINE: Duration = Duration::from_secs(60);
/// Longest wait for a killed process to be gone.
const KILL_DEADLINE: Duration = Duration::from_secs(10);
/// Longest wait for the store to be formatted.
const FORMAT_DEADLINE: Duration = Duration::from_secs(600);
/// Most output kept of a command, in bytes.
const OUTPUT_MAX_BYTES: u64 = 64 << 10;
/// Option of a server: an origin that was written without it is accepted.
pub const ACCEPT_ORIGIN: &str = "--accept-origin";
/// Most processes named as users of something.
const USERS_MAX: usize = 5;

/// What a finished command left.
#[derive(Debug)]
pub struct Output {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// At most 64 KiB of its standard output.
    pub stdout: String,
    /// Likewise.
    pub stderr: String,
}

impl Output {
    /// What the command said when it failed, as one line.
    #[must_use]
    pub fn complaint(&self) -> String {
        let said = if self.stderr.trim().is_empty() {
            &self.stdout
        } else {
            &self.stderr
        };
        let lines: Vec<&str> = said
            .lines()
            .map(str::trim)
            .filter(|l| !l.is_empty())
            .collect();
        match (lines.is_empty(), self.code) {
            (false, _) => lines.join("; "),
            (true, Some(code)) => format!("exit code {code}"),
            (true, None) => "killed by a signal".to_string(),
        }
    }
}

/// Runs `argv` to its end, or kills it at the deadline and fails.
///
/// Output goes to memory files and not to pipes: a daemon that inherits a pipe would keep it open,
/// and reading to its end would wait for the daemon's end.
pub fn run(argv: &[OsString], deadline: Duration) -> Result<Output> {
    let Some((program, args)) = argv.split_first() else {
        bail!("no command given")
    };
    let name = program.to_string_lossy();
    let sink = || -> Result<File> { Ok(memfd_create(c"output", MFdFlags::MFD_CLOEXEC)?.into()) };
    let (stdout, stderr) = (sink()?, sink()?);
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .env("LC_ALL", "C.UTF-8")
        .spawn()
        .with_context(|| format!("could not run '{name}'"))?;
    let gone = exit_fd(child.id()).and_then(|fd| is_gone_within(&fd, deadline));
    if !matches!(gone, Ok(true)) {
        // Reaped below, so the number cannot have been given away.
        child
            .kill()
            .with_context(|| format!("could not kill '{name}'"))?;
        let pid = child.id();
        let was_killed = reap_within(child, KILL_DEADLINE)?;
        gone?;
        let deadline = deadline.as_secs();
        if was_killed {
            bail!("'{name}' did not finish within {deadline} s and was killed");
        }
        bail!(
            "'{name}' did not finish within {deadline} s, and cannot be killed: process {pid} waits in the kernel, most likely \
             for a disk"
        );
    }
    let code = child.wait()?.code();
    Ok(Output {
        code,
        stdout: slurp(stdout)?,
        stderr: slurp(stderr)?,
    })
}

/// Whether a child is gone in time. One in a wait that no signal ends is left to a thread, which waits for as long as that takes.
fn reap_within(mut child: Child, deadline: Duration) -> Result<bool> {
    let fd = exit_fd(child.id())?;
    if is_gone_within(&fd, deadline)? {
        child.wait()?;
        return Ok(true);
    }
    let reaper = thread::Builder::new().name("reaper".into());
    // Without one it stays a zombie when it has ended.
    let _ = reaper.spawn(move || child.wait());
    Ok(false)
}

fn slurp(mut file: File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.take(OUTPUT_MAX_BYTES).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// The daemon of `spec` with a pidfd that is certain to be it.
fn find_fd(spec: &ProcessSpec) -> Result<Option<(u32, OwnedFd)>> {
    let Ok(text) = fs::read_to_string(&spec.pidfile) else {
        return Ok(None);
    };
    let Ok(pid) = text.trim().parse::<u32>() else {
        return Ok(None);
    };
    let Ok(fd) = pidfd::open(pid) else {
        return Ok(None);
    };
    // Read after the pidfd was opened: if the line matches, the pidfd is that process.
    let Ok(line) = fs::read(format!("/proc/{pid}/cmdline")) else {
        return Ok(None);
    };
    Ok(same_command(&line, &spec.argv).then_some((pid, fd)))
}

/// Whether a /proc command line is `argv`; of the program only the last part of the path counts, without
/// the '@' by which a daemon asks to be spared at shutdown.
fn same_command(line: &[u8], argv: &[OsString]) -> bool {
    let base = |name: &[u8]| {
        let name = name.strip_prefix(b"@").unwrap_or(name);
        name.rsplit(|b| *b == b'/')
            .next()
            .unwrap_or_default()
            .to_vec()
    };
    let words = line.strip_suffix(b"\0").unwrap_or(line).split(|b| *b == 0);
    // An option of a single start: what runs is the same server.
    let found: Vec<&[u8]> = words.filter(|w| *w != ACCEPT_ORIGIN.as_bytes()).collect();
    let argv: Vec<&OsString> = argv.iter().filter(|w| *w != ACCEPT_ORIGIN).collect();
    let same_rest = found.len() == argv.len()
        && found
            .iter()
            .zip(&argv)
            .skip(1)
            .all(|(a, b)| *a == b.as_bytes());
    same_rest && base(found[0]) == base(argv[0].as_bytes())
}

/// The process of `spec` if it runs.
pub fn find(spec: &ProcessSpec) -> Result<Option<u32>> {
    Ok(find_fd(spec)?.map(|(pid, _)| pid))
}

/// A descriptor that polls readable when process `pid` is gone.
pub fn exit_fd(pid: u32) -> Result<OwnedFd> {
    pidfd::open(pid).with_context(|| format!("could not watch process {pid}"))
}

/// Waits until the process of `fd` is gone; false if the deadline came first.
fn is_gone_within(fd: &OwnedFd, deadline: Duration) -> Result<bool> {
    pidfd::wait_gone(fd, deadline).context("could not wait for a process")
}

/// Starts the daemon of `spec`, which puts itself into the background once it is up.
pub fn start(spec: &ProcessSpec) -> Result<u32> {
    let what = match spec.kind {
        Kind::Agent => "ddsnap agent",
        Kind::Server => "ddsnap server",
    };
    let output = run(&spec.argv, START_DEADLINE)?;
    if output.code != Some(0) {
        bail!("{what} did not start: {}", output.complaint());
    }
    find(spec)?.with_context(|| format!("{what} reported success but does not run; see its log"))
}

/// Ends the daemon of `spec`: asked first, killed at the deadline, gone on return.
///
/// Killing is safe for the data: the store survives a crash at any point.
pub fn stop(spec: &ProcessSpec) -> Result<()> {
    end(
        spec,
        &[
            (libc::SIGTERM, STOP_DEADLINE),
            (libc::SIGKILL, KILL_DEADLINE),
        ],
    )
}

/// Ends the daemon of `spec` without asking it.
pub fn kill(spec: &ProcessSpec) -> Result<()> {
    end(spec, &[(libc::SIGKILL, KILL_DEADLINE)])
}

/// Lets the daemon of `spec` go on if a signal has stopped it; its process, if so.
pub fn resume(spec: &ProcessSpec) -> Result<Option<u32>> {
    let Some((pid, fd)) = find_fd(spec)? else {
        return Ok(None);
    };
    if !has_thread_in_state(pid, 'T') {
        return Ok(None);
    }
    match send_signal(&fd, libc::SIGCONT) {
        Err(Errno::ESRCH) => Ok(None),
        result => {
            result.with_context(|| format!("could not signal process {pid}"))?;
            Ok(Some(pid))
        }
    }
}

/// Whether any thread of a process is in a wait that no signal ends.
#[must_use]
pub fn is_uninterruptible(pid: u32) -> bool {
    has_thread_in_state(pid, 'D')
}

/// The states are those of proc_pid_stat(5).
fn has_thread_in_state(pid: u32, state: char) -> bool {
    let threads = fs::read_dir(format!("/proc/{pid}/task"));
    let mut threads = threads.into_iter().flatten().flatten();
    threads.any(|thread| {
        let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        // Behind the name, which is in parentheses and may contain any.
        stat.rsplit(')')
            .next()
            .is_some_and(|rest| rest.trim_start().starts_with(state))
    })
}

fn end(spec: &ProcessSpec, how: &[(libc::c_int, Duration)]) -> Result<()> {
    let Some((pid, fd)) = find_fd(spec)? else {
        return Ok(());
    };
    for &(signal, deadline) in how {
        match send_signal(&fd, signal) {
            Err(Errno::ESRCH) => return Ok(()),
            result => result.with_context(|| format!("could not signal process {pid}"))?,
        }
        if is_gone_within(&fd, deadline)? {
            return Ok(());
        }
    }
    bail!("process {pid} could not be killed")
}

/// Has the daemon of `spec` open its log again, if it runs.
pub fn reopen_log(spec: &ProcessSpec) -> Result<()> {
    let Some((pid, fd)) = find_fd(spec)? else {
        return Ok(());
    };
    match send_signal(&fd, libc::SIGHUP) {
        Err(Errno::ESRCH) => Ok(()),
        result => result.with_context(|| format!("could not signal process {pid}")),
    }
}

fn send_signal(fd: &OwnedFd, signal: i32) -> nix::Result<()> {
    // SAFETY: integers and a null siginfo; the descriptor is open.
    let sent = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd.as_raw_fd(),
            signal,
            0_usize,
            0,
        )
    };
    Errno::result(sent).map(drop)
}

/// A process found in /proc, with a pidfd that is certain to be it.
#[derive(Debug)]
pub struct Found {
    /// Its number.
    pub pid: u32,
    /// Program and arguments.
    pub argv: Vec<OsString>,
    fd: OwnedFd,
}

impl Found {
    /// Sends `signal`. A process that has gone meanwhile is no error.
    pub fn signal(&self, signal: i32) -> Result<()> {
        match send_signal(&self.fd, signal) {
            Err(Errno::ESRCH) => Ok(()),
            result => result.with_context(|| format!("could not signal process {}", self.pid)),
        }
    }

    /// Waits until it is gone; false if the deadline came first.
    pub fn is_gone_within(&self, deadline: Duration) -> Result<bool> {
        is_gone_within(&self.fd, deadline)
    }

    /// The files it has open, its directories and its program.
    #[must_use]
    pub fn links(&self) -> Vec<PathBuf> {
        links(&Path::new("/proc").join(self.pid.to_string())).collect()
    }
}

/// All processes but this one and those of the kernel.
#[must_use]
pub fn all() -> Vec<Found> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let found = entries.filter_map(|entry| {
        let pid = entry.file_name().to_str()?.parse::<u32>().ok()?;
        let fd = pidfd::open(pid).ok()?;
        // Read after the pidfd was opened, so it is that process's.
        let line = fs::read(entry.path().join("cmdline")).ok()?;
        let argv = line.strip_suffix(b"\0").unwrap_or(&line).split(|b| *b == 0);
        let argv = argv.map(|a| OsString::from_vec(a.to_vec())).collect();
        (pid != std::process::id() && !line.is_empty()).then_some(Found { pid, argv, fd })
    });
    found.collect()
}

fn links(process: &Path) -> impl Iterator<Item = PathBuf> {
    let fixed = ["cwd", "root", "exe"].map(|l| process.join(l));
    fixed.into_iter().chain(open_files(process))
}

/// Processes for which one of their links (working directory, root, program, open files) matches.
pub fn users(matches: impl Fn(&Path) -> bool) -> Vec<String> {
    find_processes(|process| links(process).any(|link| matches(&link)))
}

/// Processes that have a file open for writing for which `matches` says yes.
pub fn writers(matches: impl Fn(&Path) -> bool) -> Vec<String> {
    let writes = |link: &Path| {
        let number = link.file_name().unwrap_or_default();
        let process = link.parent().and_then(Path::parent).unwrap_or(link);
        let info = fs::read_to_string(process.join("fdinfo").join(number)).unwrap_or_default();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = flags.and_then(|f| i32::from_str_radix(f.trim(), 8).ok());
        flags.is_some_and(|f| f & libc::O_ACCMODE != libc::O_RDONLY)
    };
    find_processes(|process| {
        open_files(process)
            .into_iter()
            .any(|link| matches(&link) && writes(&link))
    })
}

/// The links of /proc/PID/fd.
fn open_files(process: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(process.join("fd")).into_iter().flatten();
    entries.flatten().map(|e| e.path()).collect()
}

/// The first processes, described, whose directory in /proc `matches`.
fn find_processes(matches: impl Fn(&Path) -> bool) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let name = entry.file_name();
        let Some(pid) = name
            .to_str()
            .filter(|n| n.bytes().all(|b| b.is_ascii_digit()))
        else {
            continue;
        };
        if matches(&entry.path()) {
            let command = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
            found.push(format!("{}[{pid}]", command.trim_end()));
        }
        if found.len() == USERS_MAX {
            break;
        }
    }
    found
}

/// Fails if the store cannot be formatted, or holds what somebody may miss; writes nothing.
pub fn check_format(devices: &Devices, chunksize: &str, force: bool) -> Result<()> {
    let force = if force { "--force" } else { "--dry-run" };
    initialize(devices, &["--dry-run", force], chunksize)
}

/// Writes an empty snapshot store with chunks of `chunksize`. A store is overwritten, other contents only
/// with `force`.
pub fn format(devices: &Devices, chunksize: &str, force: bool) -> Result<()> {
    let force = if force { "--force" } else { "--yes" };
    initialize(devices, &["--yes", force], chunksize)
}

fn initialize(devices: &Devices, flags: &[&str], chunksize: &str) -> Result<()> {
    let mut flags = flags.to_vec();
    flags.dedup();
    let mut argv: Vec<OsString> = ["ddsnap", "initialize"]
        .into_iter()
        .chain(flags)
        .chain(["-c", chunksize])
        .map(OsString::from)
        .collect();
    argv.push((&devices.snapstore).into());
    argv.push((&devices.origin).into());
    argv.extend(devices.meta.as_ref().map(OsString::from));
    let output = run(&argv, FORMAT_DEADLINE)?;
    if output.code != Some(0) {
        bail!(
            "could not initialize the snapshot store: {}",
            output.complaint()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn argv(words: &[&str]) -> Vec<OsString> {
        words.iter().map(OsString::from).collect()
    }

    #[test]
    fn run_returns_code_and_output() {
        let output = run(
            &argv(&["sh", "-c", "echo out; echo bad >&2; exit 3"]),
            KILL_DEADLINE,
        );
        let output = output.expect("sh runs");
        assert_eq!((output.code, output.stdout.as_str()), (Some(3), "out\n"));
        assert_eq!(output.complaint(), "bad");
    }

    /// A command that was killed while it read a disk that hangs was waited for without limit. Here the signal is left out.
    #[test]
    fn who_does_not_end_when_killed_is_not_waited_for() {
        let child = Command::new("sleep").arg("60").spawn().expect("spawned");
        let pid = child.id();
        let reaped = reap_within(child, Duration::from_millis(50)).expect("looked");
        assert!(!reaped);
        let fd = exit_fd(pid).expect("still there");
        send_signal(&fd, libc::SIGKILL).expect("ended");
        assert!(is_gone_within(&fd, KILL_DEADLINE).expect("looked"));
    }

    #[test]
    fn run_does_not_wait_for_a_daemon_that_keeps_the_output_open() {
        let begin = std::time::Instant::now();
        run(&argv(&["sh", "-c", "sleep 5 & echo up"]), KILL_DEADLINE).expect("sh runs");
        assert!(begin.elapsed() < Duration::from_secs(4));
    }

    #[test]
    fn run_kills_at_the_deadline() {
        let error = run(&argv(&["sleep", "60"]), Duration::from_millis(50)).expect_err("too slow");
        assert!(
            error.to_string().contains("'sleep' did not finish"),
            "{error}"
        );
    }

    #[test]
    fn a_missing_program_is_named() {
        let error = run(&argv(&["/none/such"]), KILL_DEADLINE).expect_err("missing");
        assert_eq!(error.to_string(), "could not run '/none/such'");
    }

    #[test]
    fn a_command_line_must_match_whole() {
        let spec = argv(&["ddsnap", "agent", "/run/a"]);
        assert!(same_command(b"/sbin/ddsnap\0agent\0/run/a\0", &spec));
        assert!(same_command(b"@/sbin/ddsnap\0agent\0/run/a\0", &spec));
        assert!(same_command(b"@ddsnap\0agent\0/run/a\0", &spec));
        let accepting = b"ddsnap\0agent\0--accept-origin\0/run/a\0";
        assert!(same_command(accepting, &spec), "an option of one start");
        assert!(!same_command(b"/sbin/ddsnap\0agent\0/run/b\0", &spec));
        assert!(!same_command(b"/sbin/ddsnap\0agent\0/run/a\0-x\0", &spec));
        assert!(!same_command(b"/bin/other\0agent\0/run/a\0", &spec));
        assert!(!same_command(b"", &spec));
    }

    #[test]
    fn a_stale_pid_file_finds_nobody() {
        let dir = tempfile::tempdir().expect("a directory");
        let pidfile = dir.path().join("pid");
        fs::write(&pidfile, std::process::id().to_string()).expect("written");
        let spec = ProcessSpec {
            kind: Kind::Agent,
            argv: argv(&["ddsnap", "agent"]),
            pidfile,
        };
        assert_eq!(find(&spec).expect("read"), None);
        stop(&spec).expect("nothing to stop, least of all this test");
    }

    #[test]
    fn a_stopped_daemon_goes_on() {
        let dir = tempfile::tempdir().expect("a directory");
        let mut child = std::process::Command::new("sleep")
            .arg("600")
            .spawn()
            .expect("sleep runs");
        let pid = child.id();
        let pidfile = dir.path().join("pid");
        fs::write(&pidfile, pid.to_string()).expect("written");
        let spec = ProcessSpec {
            kind: Kind::Agent,
            argv: argv(&["sleep", "600"]),
            pidfile,
        };
        // The new process is this one until it has become another.
        let end = std::time::Instant::now() + Duration::from_secs(60);
        let until = |what: &str, done: &dyn Fn() -> bool| {
            while !done() {
                assert!(std::time::Instant::now() < end, "{what}");
                std::thread::yield_now();
            }
        };
        until("it runs", &|| {
            find(&spec).is_ok_and(|found| found == Some(pid))
        });
        assert_eq!(resume(&spec).expect("asked"), None, "it was not stopped");
        let (_, fd) = find_fd(&spec).expect("read").expect("there");
        send_signal(&fd, libc::SIGSTOP).expect("sent");
        until("it stops", &|| has_thread_in_state(pid, 'T'));
        assert_eq!(resume(&spec).expect("asked"), Some(pid));
        until("it goes on", &|| !has_thread_in_state(pid, 'T'));
        child.kill().expect("killed");
        child.wait().expect("gone");
    }
}
