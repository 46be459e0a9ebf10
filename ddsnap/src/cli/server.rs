// SPDX-License-Identifier: GPL-2.0-only
//! `ddsnap server`.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;

use super::agent::Daemon;
use super::check_operands;
use super::numbers::bytes;
use crate::daemon::background::{self, Started};
use crate::daemon::outlive;
use crate::protocol::address::SocketName;
use crate::server::start::{self, Config};
use crate::stdio::complain;

const USAGE: &str = "ddsnap server [OPTIONS] SNAPSTORE ORIGIN [METADEV] AGENTSOCK SERVERSOCK";
/// Where the log goes if nobody says otherwise.
const LOG: &str = "/var/log/ddsnap.server.log";
/// The default cache is no larger than this.
const CACHE_MOST: u64 = 128 << 20;
/// And no larger than this part of memory.
const CACHE_PART: u64 = 4;

/// Run the server of a volume's snapshots.
///
/// Prints `pid = N` and goes to the background when it is up.
#[derive(Debug, Args)]
#[command(override_usage = USAGE)]
pub struct Server {
    /// Snapshot store, origin, perhaps metadata device, the agent's socket, and the socket to take
    /// commands on.
    #[arg(value_name = "OPERAND", required = true)]
    operands: Vec<String>,
    /// The most memory for cached metadata, locked: bytes, or with k, m or g. Default: 128m, or a
    /// quarter of memory if that is less.
    #[arg(short = 'k', long, value_name = "SIZE", value_parser = bytes, allow_negative_numbers = true)]
    cachesize: Option<u64>,
    /// How many seconds to wait for another server of the volume to end.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    wait: u32,
    /// Go on although the origin was written without this server. Its snapshots are marked as doubtful, for good:
    /// they may show what was written since as if it were old. Without it the server ends with code 3 then, and
    /// nothing is changed.
    #[arg(long)]
    accept_origin: bool,
    #[command(flatten)]
    daemon: Daemon,
}

impl Server {
    pub fn run(&self) -> Result<u8> {
        let config = self.config()?;
        outlive::mark();
        let background = match background::start(self.daemon.foreground)? {
            Started::Caller(code) => return Ok(code),
            Started::Daemon(background) => background,
        };
        let log = self.daemon.log("ddsnap server", LOG)?;
        match start::run(&config, &log, background) {
            Ok(()) => Ok(0),
            Err(error) => {
                let (code, error) = error.into_parts();
                tracing::error!("{error:#}");
                if !log.is_stderr() {
                    complain(format_args!("ddsnap: {error:#}"));
                }
                Ok(code)
            }
        }
    }

    fn config(&self) -> Result<Config> {
        check_operands(&self.operands, 4..=5, USAGE)?;
        let (devices, sockets) = self.operands.split_at(self.operands.len() - 2);
        let socket = |name: &String| name.parse::<SocketName>().with_context(|| name.clone());
        Ok(Config {
            snapstore: PathBuf::from(&devices[0]),
            origin: PathBuf::from(&devices[1]),
            meta: devices.get(2).map(PathBuf::from),
            agent: socket(&sockets[0])?,
            socket: socket(&sockets[1])?,
            cache_bytes: self.cachesize.unwrap_or_else(default_cache),
            pidfile: self.daemon.pidfile.clone(),
            patience: Duration::from_secs(self.wait.into()),
            accept_origin: self.accept_origin,
        })
    }
}

fn default_cache() -> u64 {
    let meminfo = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    memory_bytes(&meminfo).map_or(CACHE_MOST, |bytes| (bytes / CACHE_PART).min(CACHE_MOST))
}

fn memory_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim()
        .strip_suffix("kB")?
        .trim()
        .parse::<u64>()
        .ok()?
        .checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_read_from_meminfo() {
        assert_eq!(
            memory_bytes("MemTotal:        2048 kB\nMemFree: 1 kB\n"),
            Some(2 << 20)
        );
        assert_eq!(memory_bytes("nonsense"), None);
    }
}
