// SPDX-License-Identifier: GPL-2.0-only
//! What a volume's snapshot server is asked: each call with a deadline.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use ddsnap::client::{ChannelState, Client, ClientError, Level, NewSizes, Resized};
use ddsnap::units::{Sectors, SnapTag};

use crate::host::{CREATE_DEADLINE, PROBE_DEADLINE, Probe};
use crate::machine::{Geometry, ProcessSpec, StoreState, Stored};
use crate::process::{find, is_uninterruptible};

/// Longest wait for answers that need no disk.
const QUERY_DEADLINE: Duration = Duration::from_secs(15);
/// Longest wait of `status` for a server.
const STATE_DEADLINE: Duration = Duration::from_secs(4);
/// Longest wait for a snapshot to be marked deleted.
const DELETE_DEADLINE: Duration = Duration::from_secs(30);

fn connect(server: &Path, deadline: Duration) -> Result<Client, ClientError> {
    Client::connect_within(&server.to_string_lossy(), deadline)
}

/// Creates snapshot `tag`, within [`CREATE_DEADLINE`].
pub fn create_snapshot(server: &Path, tag: u32) -> Result<()> {
    let made = connect(server, CREATE_DEADLINE).and_then(|mut c| c.create(SnapTag(tag)));
    made.with_context(|| format!("could not create snapshot {tag}"))
}

/// Deletes snapshot `tag`.
pub fn delete_snapshot(server: &Path, tag: u32) -> Result<()> {
    let gone = connect(server, DELETE_DEADLINE).and_then(|mut c| c.delete(SnapTag(tag)));
    gone.with_context(|| format!("could not delete snapshot {tag}"))
}

/// All snapshots and bookmarks the server has, oldest first.
pub fn snapshots(server: &Path) -> Result<Vec<Stored>> {
    let list = connect(server, QUERY_DEADLINE).and_then(|mut c| c.list());
    list.context("could not list the snapshots")
}

/// Gives snapshot `tag` a priority.
pub fn set_priority(server: &Path, tag: u32, priority: i8) -> Result<()> {
    let set =
        connect(server, QUERY_DEADLINE).and_then(|mut c| c.set_priority(SnapTag(tag), priority));
    set.map(|_| ())
        .with_context(|| format!("could not change the priority of snapshot {tag}"))
}

/// Says whether snapshot `tag` becomes a bookmark when it is given up.
pub fn set_to_bookmark(server: &Path, tag: u32, to_bookmark: bool) -> Result<()> {
    let set = connect(server, QUERY_DEADLINE)
        .and_then(|mut c| c.set_to_bookmark(SnapTag(tag), to_bookmark));
    set.with_context(|| format!("could not say what becomes of snapshot {tag} in a full store"))
}

/// The snapshot whose content the server is giving to the origin.
pub fn reverting(server: &Path) -> Result<Option<u32>> {
    let status = connect(server, QUERY_DEADLINE).and_then(|mut c| c.status());
    let status = status.context("could not ask the snapshot server how it is")?;
    Ok(status.reverting.map(|tag| tag.0))
}

/// Has the server give the origin the content of snapshot `tag`.
pub fn revert(server: &Path, tag: u32, progress: &mut dyn FnMut(u64, u64)) -> Result<u64> {
    let done = connect(server, QUERY_DEADLINE).and_then(|mut c| c.revert(SnapTag(tag), progress));
    done.with_context(|| format!("could not revert to snapshot {tag}"))
}

/// Has the server use other sizes.
pub fn resize(
    server: &Path,
    sizes: &NewSizes,
    progress: &mut dyn FnMut(u64, u64),
) -> Result<Resized> {
    let done = connect(server, QUERY_DEADLINE).and_then(|mut c| c.resize(sizes, progress));
    done.context("could not change the sizes")
}

/// What the server says of its store.
pub fn store_state(server: &Path) -> Result<StoreState> {
    let asked = connect(server, STATE_DEADLINE).and_then(|mut c| Ok((c.status()?, c.list()?)));
    let (status, snapshots) = asked.context("the snapshot server does not answer")?;
    Ok(StoreState {
        channel_lost: status.channel == ChannelState::Lost,
        space: Level::of(&status).warning(&status),
        origin_bytes: status.origin_sectors.saturating_mul(512),
        data_bytes: status.data_chunks.saturating_mul(status.chunk.bytes()),
        used_bytes: status
            .data_chunks
            .saturating_sub(status.free_chunks)
            .saturating_mul(status.chunk.bytes()),
        fault: Some(status.fault).filter(|fault| !fault.is_empty()),
        snapshots,
    })
}

/// Size of the origin or a snapshot in sectors.
pub fn size_sectors(server: &Path, tag: Option<u32>) -> Result<u64> {
    let size = connect(server, QUERY_DEADLINE).and_then(|mut c| c.size(tag.map(SnapTag)));
    size.with_context(|| match tag {
        None => "could not ask for the size of the origin".to_string(),
        Some(tag) => format!("could not ask for the size of snapshot {tag}"),
    })
}

/// Whether the server of `spec` answers on `socket`.
pub fn probe(spec: &ProcessSpec, socket: &Path) -> Probe {
    let Ok(Some(pid)) = find(spec) else {
        return Probe::Absent;
    };
    let too_late = |error: &ClientError| match error {
        ClientError::Timeout { .. } => true,
        // Its queue of connections is full.
        ClientError::Connect { source, .. } => source.kind() == std::io::ErrorKind::WouldBlock,
        _ => false,
    };
    match connect(socket, PROBE_DEADLINE).and_then(|mut client| client.size(None)) {
        Err(error) if too_late(&error) => Probe::Silent {
            pid,
            uninterruptible: is_uninterruptible(pid),
        },
        Err(ClientError::Connect { .. }) => Probe::Absent,
        // Anything that it says, even a refusal, is an answer.
        _ => Probe::Answers,
    }
}

/// Asks for what replication must know of a store.
pub fn geometry(server: &Path) -> Result<Geometry> {
    let ask = || {
        let mut client = connect(server, QUERY_DEADLINE)?;
        Ok::<_, ClientError>(Geometry {
            chunk: client.status()?.chunk,
            origin: Sectors(client.size(None)?),
        })
    };
    ask().context("could not ask the snapshot server for sizes")
}
