// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap agent`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use tracing::info;

use crate::agent::End;
use crate::daemon::background::{self, Started};
use crate::daemon::log::Log;
use crate::daemon::outlive;
use crate::daemon::pidfile::PidFile;
use crate::daemon::{memory, signals};
use crate::protocol::address::SocketName;

/// Where the log goes if nobody says otherwise.
const LOG: &str = "/var/log/ddsnap.agent.log";

/// How long an agent that has no server may take to make room.
const HAND_OVER: Duration = Duration::from_secs(10);

/// Run the agent of a volume, where its servers stand in line.
#[derive(Debug, Args)]
pub struct Agent {
    /// The agent's socket: a path, or @NAME for an abstract one.
    #[arg(value_name = "SOCK")]
    socket: SocketName,
    #[command(flatten)]
    daemon: Daemon,
}

/// Options of both daemons.
#[derive(Debug, Args)]
pub struct Daemon {
    /// Stay in the foreground; the log goes to standard error unless --logfile names a file.
    #[arg(short, long)]
    pub foreground: bool,
    /// Where the log goes. SIGHUP opens the file again.
    #[arg(short, long, value_name = "FILE")]
    pub logfile: Option<PathBuf>,
    /// Where to write the process id.
    #[arg(short, long, value_name = "FILE")]
    pub pidfile: Option<PathBuf>,
    /// Log every step.
    #[arg(short = 'D', long)]
    pub debug: bool,
    /// Accepted for old scripts; has no effect: metadata is always written in groups.
    #[arg(short = 'X', long)]
    pub experimental: bool,
}

impl Daemon {
    /// Starts the log of the daemon `command`.
    pub fn log(&self, command: &'static str, default: &str) -> Result<Log> {
        let path = match &self.logfile {
            Some(path) => Some(path.clone()),
            None => (!self.foreground).then(|| PathBuf::from(default)),
        };
        Log::start(path.as_deref(), command, self.debug).with_context(|| {
            let path = path.unwrap_or_default();
            format!(
                "cannot open the log {}; name another with --logfile",
                path.display()
            )
        })
    }
}

impl Agent {
    pub fn run(&self) -> Result<u8> {
        outlive::mark();
        let background = match background::start(self.daemon.foreground)? {
            Started::Caller(code) => return Ok(code),
            Started::Daemon(background) => background,
        };
        let log = self.daemon.log("ddsnap agent", LOG)?;
        let (listener, socket_file) = crate::agent::listen(&self.socket, HAND_OVER)
            .with_context(|| format!("cannot listen on the agent socket {}", self.socket))?;
        let signals = signals()?;
        // The next server cannot start without it, and memory may come free only through that server.
        memory::hold_on();
        let pidfile = match &self.daemon.pidfile {
            None => None,
            Some(path) => Some(
                PidFile::create(path)
                    .with_context(|| format!("cannot write the pid file {}", path.display()))?,
            ),
        };
        info!("listening on {}", self.socket);
        background.up().context("cannot go to the background")?;
        let agent = crate::agent::Agent::new(listener, signals, Box::new(log.reopener()));
        let ended = agent.run();
        drop(socket_file);
        drop(pidfile);
        match ended.context("cannot wait for servers")?.end {
            End::Signal(signal) => info!("ending: {signal}"),
            End::Successor(pid) => info!("ending: there is no server, agent {pid} takes over"),
        }
        Ok(0)
    }
}
