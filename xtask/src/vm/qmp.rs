// SPDX-License-Identifier: GPL-2.0-only
//! QEMU's machine protocol: the few commands the harness gives.

use std::io::{BufReader, BufWriter};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use qapi::qmp;

use super::args::PRIVATE_CARD;

type Socket = qapi::Stream<BufReader<UnixStream>, BufWriter<UnixStream>>;

/// A QMP session; every answer has a deadline.
pub struct Qmp(qapi::Qmp<Socket>);

impl Qmp {
    /// Connects and negotiates. `deadline` holds for each later answer too.
    pub fn connect(path: &Path, deadline: Duration) -> Result<Self> {
        let stream = UnixStream::connect(path)
            .with_context(|| format!("cannot connect to QEMU at {}", path.display()))?;
        stream.set_read_timeout(Some(deadline))?;
        stream.set_write_timeout(Some(deadline))?;
        let reader = BufReader::new(stream.try_clone()?);
        let mut qmp = qapi::Qmp::new(qapi::Stream::new(reader, BufWriter::new(stream)));
        qmp.handshake()
            .context("QEMU did not complete the QMP handshake")?;
        Ok(Qmp(qmp))
    }

    /// Saves the running guest, memory and disks, as the internal snapshot `name`.
    pub fn save(&mut self, name: &str) -> Result<()> {
        self.monitor(&format!("savevm {name}"))
    }

    /// Forwards a loopback TCP port of the host to one of the guest.
    pub fn forward_port(&mut self, host: u16, guest: u16) -> Result<()> {
        self.monitor(&format!("hostfwd_add net0 tcp:127.0.0.1:{host}-:{guest}"))
    }

    /// Puts export `disk{index}` of the NBD server at `socket` in the place of disk `index`. The guest
    /// must not run, and the lengths must be the same.
    pub fn replace_disk(&mut self, index: usize, socket: &Path) -> Result<()> {
        let socket = socket.display();
        // No space or comma is in the path: it is a directory of our own in the one for temporary files.
        self.monitor(&format!(
            "drive_add -n 0 driver=raw,node-name=lossy{index},file.driver=nbd,\
             file.server.type=unix,file.server.path={socket},file.export=disk{index}"
        ))?;
        self.monitor(&format!(
            "qom-set /machine/peripheral/blk{index} drive lossy{index}"
        ))
    }

    /// Plugs in the cable of the private network, or pulls it: the guest's card tells it so.
    pub fn set_link(&mut self, up: bool) -> Result<()> {
        let name = PRIVATE_CARD.into();
        self.0
            .execute(&qmp::set_link { name, up })
            .context("QEMU did not accept set_link")?;
        Ok(())
    }

    /// Lets a paused guest run.
    pub fn run(&mut self) -> Result<()> {
        self.monitor("cont")
    }

    /// A reboot of the guest ends QEMU.
    pub fn end_at_reboot(&mut self) -> Result<()> {
        let action = qmp::set_action {
            panic: None,
            reboot: Some(qmp::RebootAction::shutdown),
            shutdown: None,
            watchdog: None,
        };
        self.0
            .execute(&action)
            .context("QEMU did not accept set-action")?;
        Ok(())
    }

    /// Ends QEMU in an orderly way: disks are flushed.
    pub fn quit(&mut self) -> Result<()> {
        self.0
            .execute(&qmp::quit {})
            .context("QEMU did not accept quit")?;
        Ok(())
    }

    /// A human-monitor command. These print nothing when they succeed.
    fn monitor(&mut self, line: &str) -> Result<()> {
        let command = qmp::human_monitor_command {
            cpu_index: None,
            command_line: line.into(),
        };
        let said = self
            .0
            .execute(&command)
            .with_context(|| format!("QEMU: {line}"))?;
        if !said.trim().is_empty() {
            bail!("QEMU: {line}: {}", said.trim());
        }
        Ok(())
    }
}
