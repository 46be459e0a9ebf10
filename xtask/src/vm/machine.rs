// SPDX-License-Identifier: GPL-2.0-only
//! One running guest: start, wait for, command, cut the power of, end.
//!
//! A machine is described by `machine.json` in its directory, so that the
//! commands of `cargo xtask vm`, separate processes, can find it again. Every
//! wait watches three things beside its deadline: that QEMU lives, that the
//! guest's kernel has reported nothing, and that the agent answers.

use std::cell::RefCell;
use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid as HostPid;
use serde::{Deserialize, Serialize};

use super::accel::QEMU;
use super::agent::{Agent, Output, Pid};
use super::args::{Endpoints, Spec, qemu_args};
use super::console::Console;
use super::qmp::Qmp;
use crate::{paths, ui};

/// Time for QEMU itself to start, answer and stop.
const QEMU_DEADLINE: Duration = Duration::from_secs(60);

/// Time for a guest to boot to its agent. Emulated on two busy cores it has
/// taken two minutes.
pub const BOOT_DEADLINE: Duration = Duration::from_secs(600);

/// Time after the head of a kernel report for the rest to reach the console.
const REPORT_TAIL: Duration = Duration::from_secs(2);

/// What another process needs to find a running machine.
#[derive(Serialize, Deserialize)]
struct Record {
    pid: i32,
    sockets: PathBuf,
    console: PathBuf,
}

/// How long QEMU runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifetime {
    /// It ends with the process that started it, however that ends.
    WithHarness,
    /// Until it is stopped.
    Own,
}

/// A guest under QEMU.
pub struct Machine {
    record: Record,
    dir: PathBuf,
    console: Console,
    agent: Agent,
    /// QEMU as our own child; `None` in a process that found the machine.
    child: RefCell<Option<Child>>,
}

/// QEMU has ended by itself.
#[derive(Debug, thiserror::Error)]
#[error("QEMU ended unexpectedly; it said:\n{said}")]
pub struct QemuEnded {
    said: String,
}

impl QemuEnded {
    /// Whether it has noticed a mistake of its own.
    pub fn by_assertion(&self) -> bool {
        self.said.contains("Assertion `") && self.said.contains("' failed.")
    }
}

impl Machine {
    /// Starts QEMU for `spec`; logs and the record go to `dir`.
    pub fn start(spec: &Spec, dir: &Path, lifetime: Lifetime) -> Result<Self> {
        paths::make_dir(dir)?;
        // Socket paths have room for 107 bytes only, too few for a deep checkout.
        let sockets = tempfile::Builder::new()
            .prefix("zumastor-vm-")
            .tempdir()
            .context("cannot make a directory for the guest's sockets")?
            .keep();
        let console = dir.join("console.log");
        let watch = Console::from_end(&console);
        let ends = Endpoints {
            qmp: sockets.join("qmp"),
            agent: sockets.join("agent"),
            console: console.clone(),
        };
        let log = dir.join("qemu.log");
        let stderr =
            fs::File::create(&log).with_context(|| format!("cannot create {}", log.display()))?;
        let mut command = match lifetime {
            Lifetime::Own => Command::new(QEMU),
            Lifetime::WithHarness => {
                let mut setpriv = Command::new("setpriv");
                setpriv.args(["--pdeathsig", "KILL", QEMU]);
                setpriv
            }
        };
        let child = command
            .args(qemu_args(spec, &ends))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(stderr)
            .process_group(0) // ^C is for the harness, not for QEMU
            .spawn()
            .with_context(|| format!("cannot run {QEMU}"))?;
        let pid = i32::try_from(child.id()).context("QEMU's process id")?;
        let record = Record {
            pid,
            sockets,
            console,
        };
        let file = dir.join("machine.json");
        fs::write(&file, serde_json::to_vec(&record)?)
            .with_context(|| format!("cannot write {}", file.display()))?;
        let agent = Agent::at(&ends.agent);
        let child = RefCell::new(Some(child));
        let dir = dir.to_path_buf();
        let mut machine = Machine {
            record,
            dir,
            console: watch,
            agent,
            child,
        };
        if let Err(e) = machine.wait_for_qmp() {
            let said = ui::tail(&log, 20);
            machine.cut_power()?;
            return Err(e.context(format!("QEMU did not start; it said:\n{said}")));
        }
        Ok(machine)
    }

    /// Finds the machine that was started in `dir`.
    pub fn attach(dir: &Path) -> Result<Self> {
        let file = dir.join("machine.json");
        let text = fs::read(&file)
            .with_context(|| format!("no machine is up here: cannot read {}", file.display()))?;
        let record: Record = serde_json::from_slice(&text)
            .with_context(|| format!("{} is damaged", file.display()))?;
        let console = Console::from_end(&record.console);
        let agent = Agent::at(&record.sockets.join("agent"));
        let child = RefCell::new(None);
        let machine = Machine {
            record,
            dir: dir.to_path_buf(),
            console,
            agent,
            child,
        };
        if !machine.alive() {
            bail!("the machine of {} has ended; start it again", dir.display());
        }
        Ok(machine)
    }

    /// The guest agent.
    pub fn agent(&mut self) -> &mut Agent {
        &mut self.agent
    }

    /// A QMP session.
    pub fn qmp(&self) -> Result<Qmp> {
        Qmp::connect(&self.record.sockets.join("qmp"), QEMU_DEADLINE)
    }

    /// Whether QEMU runs. A process that is not our child is known by its
    /// command line, for process ids are reused.
    pub fn alive(&self) -> bool {
        if let Some(child) = self.child.borrow_mut().as_mut() {
            return matches!(child.try_wait(), Ok(None));
        }
        let cmdline = fs::read(format!("/proc/{}/cmdline", self.record.pid));
        cmdline.is_ok_and(|line| {
            String::from_utf8_lossy(&line).contains(&*self.record.sockets.to_string_lossy())
        })
    }

    /// Fails when QEMU has died or the guest's kernel has reported something.
    pub fn check(&self) -> Result<()> {
        if self.console.report().is_some() {
            std::thread::sleep(REPORT_TAIL);
            if let Some(report) = self.console.report() {
                bail!("the guest's kernel reported:\n{report}");
            }
        }
        if !self.alive() {
            let said = ui::tail(&self.dir.join("qemu.log"), 20);
            return Err(QemuEnded { said }.into());
        }
        Ok(())
    }

    /// Waits until the agent answers.
    pub fn wait_for_agent(&mut self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        loop {
            self.check()?;
            let wait = Duration::from_secs(3);
            match self.agent.try_connect(wait) {
                Ok(()) => return Ok(()),
                Err(e) if Instant::now() > end => {
                    let last = ui::tail(self.console.path(), 15);
                    return Err(e.context(format!(
                        "no guest agent after {}; the console's last lines:\n{last}",
                        ui::seconds(deadline)
                    )));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// Waits for a command to end. Reading its state is what finds the deadline
    /// passed, the kernel in trouble or QEMU gone.
    pub fn finish(&mut self, pid: Pid, deadline: Duration) -> Result<Output> {
        poll_until(deadline, || self.poll(pid))
    }

    /// A command's output once it has ended; none while it runs.
    pub fn poll(&mut self, pid: Pid) -> Result<Option<Output>> {
        let polled = self.agent.poll(pid);
        self.check()?;
        polled
    }

    /// Runs a shell command line to its end.
    pub fn shell(&mut self, script: &str, deadline: Duration) -> Result<Output> {
        let argv = ["/bin/bash", "-c", script].map(String::from);
        let pid = self.agent.start(&argv, &guest_env(), b"")?;
        self.finish(pid, deadline)
    }

    /// Runs a command in a guest that may be in trouble already, so nothing but
    /// the deadline is watched.
    pub fn evidence(&mut self, script: &str, deadline: Duration) -> Result<Output> {
        self.agent.try_connect(Duration::from_secs(5))?;
        let argv = ["/bin/bash", "-c", script].map(String::from);
        let pid = self.agent.start(&argv, &guest_env(), b"")?;
        poll_until(deadline, || self.agent.poll(pid))
    }

    /// Reboots in an orderly way and waits for the agent of the new boot.
    pub fn reboot(&mut self, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        let before = self.boot_id()?;
        let argv = ["/usr/bin/systemctl", "reboot"].map(String::from);
        self.agent.start(&argv, &guest_env(), b"")?;
        loop {
            self.check()?;
            self.agent.disconnect();
            let left = end.saturating_duration_since(Instant::now());
            self.wait_for_agent(left)?;
            // The old boot answers until its agent is stopped.
            if self.boot_id().is_ok_and(|now| now != before) {
                return Ok(());
            }
            if Instant::now() > end {
                bail!("the guest did not reboot within {}", ui::seconds(deadline));
            }
            std::thread::sleep(Duration::from_millis(300));
        }
    }

    /// Shuts the guest down for a reboot, and ends QEMU where that would begin.
    pub fn reboot_to_end(&mut self, deadline: Duration) -> Result<()> {
        self.qmp()?.end_at_reboot()?;
        let argv = ["/usr/bin/systemctl", "reboot"].map(String::from);
        self.agent.start(&argv, &guest_env(), b"")?;
        self.agent.disconnect();
        // A guest whose kernel has reported something may stay where it is.
        let reported = || match self.console.report() {
            Some(_) => self.check(),
            None => Ok(()),
        };
        self.wait_for_end(deadline, reported)
            .context("the guest did not shut down")?;
        let said = ui::tail(&self.dir.join("qemu.log"), 20);
        let ended = QemuEnded { said };
        if ended.by_assertion() {
            return Err(ended.into());
        }
        self.forget()
    }

    fn boot_id(&mut self) -> Result<String> {
        let out = self.shell(
            "cat /proc/sys/kernel/random/boot_id",
            Duration::from_secs(30),
        )?;
        Ok(String::from_utf8_lossy(&out.stdout).trim().to_string())
    }

    /// Ends QEMU at once. What the guest has not flushed is lost on `lossy` disks, and may survive on others.
    pub fn cut_power(&mut self) -> Result<()> {
        self.agent.disconnect();
        if self.alive() {
            match kill(HostPid::from_raw(self.record.pid), Signal::SIGKILL) {
                Ok(()) | Err(nix::errno::Errno::ESRCH) => {}
                Err(e) => return Err(e).context("cannot end QEMU"),
            }
        }
        self.wait_for_end(QEMU_DEADLINE, || Ok(()))?;
        self.forget()
    }

    /// Ends QEMU in an orderly way; the guest notices nothing.
    pub fn stop(mut self) -> Result<()> {
        self.agent.disconnect();
        let asked = self.qmp().and_then(|mut qmp| qmp.quit());
        if asked.is_err() || self.wait_for_end(QEMU_DEADLINE, || Ok(())).is_err() {
            return self.cut_power();
        }
        self.forget()
    }

    /// Waits until QEMU has ended, or `hindered` fails.
    fn wait_for_end(&self, deadline: Duration, hindered: impl Fn() -> Result<()>) -> Result<()> {
        let end = Instant::now() + deadline;
        while self.alive() {
            hindered()?;
            if Instant::now() > end {
                bail!(
                    "QEMU (process {}) does not end within {}",
                    self.record.pid,
                    ui::seconds(deadline)
                );
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn forget(&self) -> Result<()> {
        paths::remove_dir(&self.record.sockets)?;
        match fs::remove_file(self.dir.join("machine.json")) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).context("cannot remove machine.json")
            }
            _ => Ok(()),
        }
    }

    fn wait_for_qmp(&mut self) -> Result<()> {
        let end = Instant::now() + QEMU_DEADLINE;
        loop {
            match self.qmp() {
                Ok(_) => return Ok(()),
                Err(e) if Instant::now() > end || !self.alive() => return Err(e),
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }
}

/// Polls a command until it has ended.
pub fn poll_until(
    deadline: Duration,
    mut poll: impl FnMut() -> Result<Option<Output>>,
) -> Result<Output> {
    let end = Instant::now() + deadline;
    let mut pause = Duration::from_millis(5);
    loop {
        if let Some(output) = poll()? {
            return Ok(output);
        }
        if Instant::now() > end {
            bail!("it did not end within {}", ui::seconds(deadline));
        }
        std::thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(200));
    }
}

/// The environment of every command in the guest; the agent's own is bare.
pub fn guest_env() -> Vec<String> {
    [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME=/root",
        "LC_ALL=C.UTF-8",
        "TERM=dumb",
        "DEBIAN_FRONTEND=noninteractive",
    ]
    .map(String::from)
    .to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// var-volumes failed by an assertion of QEMU's while its guest booted again.
    #[test]
    fn an_assertion_is_told_from_other_ends_of_qemu_whatever_was_being_done() {
        let ended = |said: &str| {
            let said = said.to_owned();
            let error = anyhow::Error::from(QemuEnded { said });
            error.context("reboot").context("scenario.yaml:193")
        };
        let by_assertion = |said| {
            let error = ended(said);
            error.downcast_ref().is_some_and(QemuEnded::by_assertion)
        };
        assert!(by_assertion(
            "    qemu-system-x86_64: hw/pci/msix.c:228: msix_table_mmio_write: Assertion `addr + size <= end' failed.\n"
        ));
        assert!(!by_assertion(
            "    qemu-system-x86_64: cannot open disk1.qcow2\n"
        ));
        assert!(!by_assertion(""));
    }
}
