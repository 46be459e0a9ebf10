// SPDX-License-Identifier: GPL-2.0-only
//! From a command line to a running server, and its orderly end.
//!
//! The order: stand in line at the agent; when it is our turn open the store (which takes its lock and
//! recovers it), listen, attach to the kernel, say that we are up. So of two servers only one ever
//! opens the store, and whoever started one learns why it did not come up.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow};
use tracing::{error, info, warn};

use super::engine::Engine;
use super::faults::Faults;
use super::link::{Backoff, Kernel, connect_within};
use super::ring::{Parts, Ring};
use super::store_engine::StoreEngine;
use super::surroundings::surroundings;
use crate::daemon::background::Background;
use crate::daemon::log::Log;
use crate::daemon::pidfile::PidFile;
use crate::daemon::{memory, signals};
use crate::device::BlockDevice;
use crate::device::identity::distinct;
use crate::device::lock::{Mode, name_of};
use crate::device::uring::{Access, UringDevice};
use crate::protocol::address::{SocketFile, SocketName};
use crate::protocol::codec::FrameReader;
use crate::protocol::line::{FromAgent, ToAgent};
use crate::stdio::{complain, print};
use crate::store::{Devices, OpenOptions, OriginUse, Store, StoreError, Surroundings};
use crate::units::ChunkShift;

/// How long a dead server's socket may still answer.
const LAST_BREATH: Duration = Duration::from_secs(5);
/// How long to wait in silence: a server that was killed is gone for the agent only a little later.
const QUIET: Duration = Duration::from_secs(1);
/// How long a running agent may take to answer.
const AGENT_DEADLINE: Duration = Duration::from_secs(10);

/// What a server is told to do.
#[derive(Clone, Debug)]
pub struct Config {
    /// Device or file that keeps the snapshots.
    pub snapstore: PathBuf,
    /// The volume.
    pub origin: PathBuf,
    /// Device or file for metadata, if it has one of its own.
    pub meta: Option<PathBuf>,
    /// The agent's socket; its name is also the volume's key in the kernel, as written.
    pub agent: SocketName,
    /// Where commands are taken.
    pub socket: SocketName,
    /// The most memory for cached index nodes, in bytes.
    pub cache_bytes: u64,
    /// Where to write the process id.
    pub pidfile: Option<PathBuf>,
    /// How long to wait for another server to go: at the agent, at the store, and at the kernel.
    pub patience: Duration,
    /// An origin that was written without this store's server is accepted: its snapshots become doubtful.
    pub accept_origin: bool,
}

/// Why a server did not come up.
#[derive(Debug)]
pub enum StartError {
    /// The agent's socket cannot be connected to, or there is no sound store: exit code 99.
    Unusable(anyhow::Error),
    /// The origin was written without this store's server, and that was not accepted: exit code 3.
    Foreign(anyhow::Error),
    /// Anything else: exit code 1.
    Other(anyhow::Error),
}

impl From<anyhow::Error> for StartError {
    fn from(error: anyhow::Error) -> StartError {
        StartError::Other(error)
    }
}

impl StartError {
    /// The exit code and what to tell.
    #[must_use]
    pub fn into_parts(self) -> (u8, anyhow::Error) {
        match self {
            StartError::Unusable(error) => (99, error),
            StartError::Foreign(error) => (3, error),
            StartError::Other(error) => (1, error),
        }
    }
}

/// Starts a server and serves until it is told to end. `background` is told when it is up.
///
/// # Errors
/// It did not come up, or did not end in order.
pub fn run(config: &Config, log: &Log, background: Background) -> Result<(), StartError> {
    // First: the volume's writes may wait for this server, and recovery must not wait for memory that they hold.
    memory::hold_on();
    let mut faults = Faults::from_env()?;
    let agent = stand_in_line(config)?;
    if faults.strike("START_SERVER") {
        return Err(anyhow!("DDSNAP_ACTION closed the connection to the agent").into());
    }
    let store = open_store(config)?;
    let engine = StoreEngine::new(store);
    let prepared = prepare(config, engine.status().chunk, agent, log, &faults);
    let (parts, pidfile, socket_file) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            // Nobody was served: there shall be nothing to recover.
            close(engine, OriginUse::Untouched);
            return Err(error.into());
        }
    };
    let ring = Ring::new(engine, parts).context("cannot use io_uring")?;
    if let Err(error) = print(&format!("pid = {}\n", std::process::id())) {
        warn!("{error:#}");
    }
    background.up().context("cannot go to the background")?;
    info!("serving {} on {}", config.origin.display(), config.socket);

    let (engine, origin, reason, fault) = ring.run().context("io_uring failed")?;
    // While the store is this server's: the next one may have made its own in its place as soon as it is not.
    drop(socket_file);
    info!("shutting down: {reason}");
    let _ = faults.strike("SHUTDOWN_SERVER");
    match fault {
        // Recovery starts from what is durable; closing could only add to the damage.
        Some(fault) => {
            warn!("the store is left as it is, it had failed: {fault}");
            drop(engine);
        }
        None => close(engine, origin),
    }
    // Last: who waits for its end by this file uses the store next.
    drop(pidfile);
    Ok(())
}

fn close(engine: StoreEngine, origin: OriginUse) {
    match engine.close(origin) {
        Ok(()) => info!("the store is closed"),
        Err(error) => error!("the store was not closed, it will be recovered: {error}"),
    }
}

/// All that a server needs beside its store; with the files that go with it.
fn prepare(
    config: &Config,
    chunk: ChunkShift,
    agent: UnixStream,
    log: &Log,
    faults: &Faults,
) -> anyhow::Result<(Parts<Kernel>, Option<PidFile>, SocketFile)> {
    let (listener, socket_file) = listen(&config.socket)?;
    let mut kernel = Kernel {
        key: config.agent.clone(),
        chunk,
    };
    let channel = connect_within(&mut kernel, config.patience)?;
    let signals = signals().context("cannot receive signals")?;
    let pidfile = match &config.pidfile {
        None => None,
        Some(path) => Some(
            PidFile::create(path)
                .with_context(|| format!("cannot write the pid file {}", path.display()))?,
        ),
    };
    let parts = Parts {
        listener,
        agent: agent.into(),
        signals,
        connect: kernel,
        channel,
        faults: faults.clone(),
        on_hangup: Box::new(log.reopener()),
    };
    Ok((parts, pidfile, socket_file))
}

/// Connects to the agent and waits for our turn.
fn stand_in_line(config: &Config) -> Result<UnixStream, StartError> {
    let name = &config.agent;
    let mut stream = name
        .connect(AGENT_DEADLINE)
        .with_context(|| format!("cannot connect to the agent at {name}; start it first"))
        .map_err(StartError::Unusable)?;
    let ready = ToAgent::ServerReady {
        pid: std::process::id(),
        socket: config.socket.to_string(),
    };
    stream
        .write_all(&ready.to_frame().encode())
        .with_context(|| format!("cannot write to the agent at {name}"))?;
    let mut reader = FrameReader::default();
    let mut deadline = Instant::now() + AGENT_DEADLINE;
    // The active server, and when to tell that we wait for it.
    let mut active: Option<u32> = None;
    let mut tell_at: Option<Instant> = None;
    loop {
        let until = tell_at.map_or(deadline, |at| at.min(deadline));
        match hear_agent(&mut stream, &mut reader, until) {
            Ok(FromAgent::StartServer) => return Ok(stream),
            Ok(FromAgent::Wait { active_pid, .. }) => {
                if active != Some(active_pid) {
                    tell_at = Some(Instant::now() + QUIET);
                    deadline = Instant::now() + config.patience;
                }
                active = Some(active_pid);
            }
            Ok(FromAgent::InUse { .. }) => {
                return Err(anyhow!("the agent at {name} takes this server for an agent").into());
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => match active {
                Some(pid) if tell_at.take().is_some() && Instant::now() < deadline => {
                    complain(format_args!(
                        "ddsnap server: server {pid} is active; waiting up to {} s for it to end",
                        config.patience.as_secs()
                    ));
                }
                Some(pid) => {
                    let error = anyhow!("server {pid} is still active at {name}; stop it first");
                    return Err(error.into());
                }
                None => return Err(anyhow!("the agent at {name} does not answer").into()),
            },
            Err(error) => {
                let context = format!("the agent at {name} went away or is none");
                return Err(anyhow::Error::from(error).context(context).into());
            }
        }
    }
}

/// Listens for commands. A server that was killed may still answer for a moment, until the kernel has
/// ended the last of its requests; nothing tells when, so this asks again for a while.
fn listen(socket: &SocketName) -> anyhow::Result<(OwnedFd, SocketFile)> {
    let end = Instant::now() + LAST_BREATH;
    let mut backoff = Backoff::default();
    loop {
        match socket.listen() {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && Instant::now() < end => {
                std::thread::sleep(backoff.pause());
            }
            other => {
                return other
                    .with_context(|| format!("cannot listen on the server socket {socket}"));
            }
        }
    }
}

fn hear_agent(
    stream: &mut UnixStream,
    reader: &mut FrameReader,
    deadline: Instant,
) -> io::Result<FromAgent> {
    let invalid = |error| io::Error::new(io::ErrorKind::InvalidData, error);
    loop {
        if let Some(frame) = reader.next_frame().map_err(invalid)? {
            return FromAgent::from_frame(&frame).map_err(invalid);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        let mut bytes = [0; 256];
        match stream.read(&mut bytes) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => reader.extend(&bytes[..count]),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                _ => return Err(error),
            },
        }
    }
}

/// Locks and opens the store, and says in the log what state it was in.
fn open_store(config: &Config) -> Result<Store, StartError> {
    let meta = config.meta.as_deref();
    let paths: Vec<&Path> = meta
        .into_iter()
        .chain([&*config.snapstore, &*config.origin])
        .collect();
    distinct(&paths).map_err(anyhow::Error::msg)?;
    let deadline = Instant::now() + config.patience;
    let meta = meta.map(|meta| hold(meta, deadline)).transpose()?;
    let data = hold(&config.snapstore, deadline)?;
    // Written to in a revert and at no other time. Locked too: another store on it would not see what this
    // one's clients write.
    let origin = hold(&config.origin, deadline)?;
    let devices = Devices {
        origin: Box::new(origin),
        data: Box::new(data),
        meta: meta.map(|meta| Box::new(meta) as Box<dyn BlockDevice>),
    };
    let options = OpenOptions {
        cache_bytes: config.cache_bytes,
    };
    let surroundings = Surroundings {
        accept: config.accept_origin,
        ..surroundings(&config.origin)
    };
    let (store, opened) = Store::open_in(devices, &options, &surroundings).map_err(unusable)?;
    if let Some(what) = &opened.foreign {
        warn!(
            "{}: the origin was written without this store's server: {what}; \
             snapshots taken before now are doubtful",
            config.origin.display()
        );
    }
    if !opened.clean {
        warn!("Server was not shut down properly");
        info!("Replaying journal");
        info!(
            "{} journal records replayed, {} of them in part",
            opened.replayed_records, opened.dropped_records
        );
    }
    let found = store.status().origin;
    if found < opened.origin {
        warn!(
            "{}: the origin has {found} sectors, it had {}; snapshots keep their size",
            config.origin.display(),
            opened.origin
        );
    }
    Ok(store)
}

/// Opens a device and waits until it is ours alone.
fn hold(path: &Path, deadline: Instant) -> anyhow::Result<UringDevice> {
    let mut device = open_device(path, Access::ReadWrite)?;
    let left = deadline.saturating_duration_since(Instant::now());
    let tell = |holder: Option<u32>| {
        let text = format!(
            "{} holds {}; waiting up to {:.0} s for it to let go",
            name_of(holder),
            path.display(),
            left.as_secs_f64()
        );
        complain(format_args!("ddsnap server: {text}"));
        info!("{text}");
    };
    device
        .lock_within(Mode::Exclusive, left, QUIET, tell)
        .with_context(|| format!("cannot lock {}", path.display()))?;
    Ok(device)
}

fn unusable(error: StoreError) -> StartError {
    if matches!(error, StoreError::Foreign { .. }) {
        return StartError::Foreign(error.into());
    }
    let damaged = matches!(
        error,
        StoreError::Damaged { .. } | StoreError::Inconsistent { .. } | StoreError::Journal { .. }
    );
    let error = anyhow::Error::from(error);
    StartError::Unusable(match damaged {
        true => error.context("the store is damaged, `ddsnap check` names all that is wrong"),
        false => error,
    })
}

/// Opens a device of a store.
///
/// # Errors
/// It is not there, cannot be opened, or is neither a block device nor a file.
pub fn open_device(path: &Path, access: Access) -> anyhow::Result<UringDevice> {
    UringDevice::open(path, access).with_context(|| format!("cannot open {}", path.display()))
}
