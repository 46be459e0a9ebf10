// SPDX-License-Identifier: GPL-2.0-only
//! The way to another machine: one ssh command, whose standard streams carry the stream.

use std::fs;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result};

use crate::layout::Layout;
use crate::replication::link::Link;

/// What reaches another machine if nobody says otherwise.
const DEFAULT: &str = "ssh -T -o BatchMode=yes";
/// So much is kept of what the other machine complains.
const COMPLAINT_MAX_BYTES: usize = 2000;

/// A running command.
pub struct Remote {
    child: Arc<Mutex<Child>>,
    complaints: Option<JoinHandle<String>>,
}

/// The command that reaches other machines: `own`, or what /etc/zumastor/ssh_command has.
#[must_use]
pub fn command(layout: &Layout, own: Option<&str>) -> String {
    let file = || fs::read_to_string(layout.at("/etc/zumastor/ssh_command")).ok();
    let given = own.map(str::to_owned).or_else(file);
    let given = given.map(|text| text.trim().to_owned());
    given
        .filter(|text| !text.is_empty())
        .unwrap_or_else(|| DEFAULT.to_owned())
}

/// Runs `zumastor WORDS` on `host`.
///
/// # Errors
/// The command cannot be run.
pub fn connect(command: &str, host: &str, words: &[&str]) -> Result<(Link, Remote)> {
    let mut parts = command.split_whitespace();
    let program = parts.next().unwrap_or("ssh");
    let mut remote = String::from("zumastor");
    for word in words {
        remote.push(' ');
        remote.push_str(&quoted(word));
    }
    let mut child = Command::new(program)
        .args(parts)
        .arg(host)
        .arg(remote)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("could not run '{command}'"))?;
    let reader = child.stdout.take().context("no way from the command")?;
    let writer = child.stdin.take().context("no way to the command")?;
    let stderr = child.stderr.take().context("no complaints")?;
    let complaints = thread::Builder::new()
        .name("replication-ssh".into())
        .spawn(move || last_of(stderr))?;
    let child = Arc::new(Mutex::new(child));
    let cut = child.clone();
    let link = Link {
        reader: Box::new(reader),
        writer: Box::new(writer) as Box<dyn Write + Send>,
        cut: Arc::new(move || {
            // It may be gone already.
            let _ = cut.lock().unwrap_or_else(PoisonError::into_inner).kill();
        }),
    };
    let complaints = Some(complaints);
    Ok((link, Remote { child, complaints }))
}

impl Remote {
    /// Waits for the command's end; gives what it complained of.
    pub fn finish(mut self) -> String {
        let mut child = self.child.lock().unwrap_or_else(PoisonError::into_inner);
        // The line was closed, which cuts what still runs.
        let _ = child.kill();
        let _ = child.wait();
        drop(child);
        let said = self.complaints.take().map(JoinHandle::join);
        said.and_then(Result::ok).unwrap_or_default()
    }
}

/// The last line or so of what is said.
fn last_of(mut from: impl Read) -> String {
    let mut kept: Vec<u8> = Vec::new();
    let mut buffer = [0; 512];
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        kept.extend_from_slice(&buffer[..count]);
        let much = kept.len().saturating_sub(COMPLAINT_MAX_BYTES);
        kept.drain(..much);
    }
    let text = String::from_utf8_lossy(&kept);
    let line = text.lines().rev().find(|line| !line.trim().is_empty());
    let line = line.unwrap_or_default().trim();
    line.chars().filter(|c| !c.is_control()).collect()
}

/// A word as a shell takes it.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A volume's name may hold what a shell would run.
    #[test]
    fn words_are_quoted() {
        assert_eq!(quoted("a;b"), "'a;b'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }

    /// Why ssh failed was lost: only that the stream ended was told.
    #[test]
    fn streams_pass_and_complaints_are_kept() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("fake-ssh");
        fs::write(
            &path,
            "#!/bin/sh\nread line; echo \"got $line\"; echo \"$1 $2 failed\" >&2\n",
        )
        .expect("written");
        let mut mode = fs::metadata(&path).expect("there").permissions();
        std::os::unix::fs::PermissionsExt::set_mode(&mut mode, 0o755);
        fs::set_permissions(&path, mode).expect("set");
        let command = path.to_string_lossy().into_owned();
        let (mut link, remote) = connect(&command, "beta", &["receive", "v"]).expect("runs");
        link.writer.write_all(b"hello\n").expect("written");
        drop(link.writer);
        let mut said = String::new();
        link.reader.read_to_string(&mut said).expect("read");
        assert_eq!(said, "got hello\n");
        assert_eq!(remote.finish(), "beta zumastor 'receive' 'v' failed");
    }
}
