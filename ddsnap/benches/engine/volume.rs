// SPDX-License-Identifier: GPL-2.0-only
//! Stores to measure on.

use std::path::Path;

use anyhow::{Context, Result, bail};
use ddsnap::device::BlockDevice;
use ddsnap::device::uring::{Access, UringDevice};
use ddsnap::store::{Devices, Done, InitOptions, Op, OpError, OpenOptions, Store};
use ddsnap::units::{Chunk, ChunkShift, SnapTag};

use crate::counted::{Counted, Counter};

/// Memory for index nodes where a measurement does not say otherwise: the server's most.
pub const CACHE_BYTES: u64 = 128 << 20;

/// Identity of every store measured on.
pub const UUID: [u8; 16] = [0x5a; 16];

/// Opens a file for direct I/O, the way the server does.
pub fn device(path: &Path, access: Access) -> Result<UringDevice> {
    let device = UringDevice::open(path, access)
        .with_context(|| format!("cannot open {}", path.display()))?;
    Ok(device)
}

/// A store with data and metadata in the one file `store`, counted by `counter`.
pub fn on_files(origin: &Path, store: &Path, counter: &Counter) -> Result<Devices> {
    Ok(Devices {
        origin: Box::new(Counted::new(device(origin, Access::Read)?, counter, false)),
        data: Box::new(Counted::new(
            device(store, Access::ReadWrite)?,
            counter,
            true,
        )),
        meta: None,
    })
}

/// Index entries of a step in the background, as the server has it.
pub const STEP: usize = 256;

/// Makes a store.
pub fn initialize(devices: &mut Devices, chunk: ChunkShift) -> Result<()> {
    let options = InitOptions {
        chunk,
        journal_bytes: None,
        now: 1,
        uuid: UUID,
    };
    Ok(Store::initialize(devices, &options)?)
}

/// Opens a store.
pub fn open(devices: Devices) -> Result<Store> {
    let options = OpenOptions {
        cache_bytes: CACHE_BYTES,
    };
    let mut store = Store::open(devices, &options)?.0;
    // There are no devices: what was squashed or is a bookmark serves none, as a server finds out.
    for tag in store.draining() {
        store.set_quiet(tag);
    }
    Ok(store)
}

/// Creates a snapshot.
pub fn create(store: &mut Store, tag: u32) -> Result<()> {
    store
        .create(SnapTag(tag), i64::from(tag))?
        .with_context(|| format!("cannot create snapshot {tag}"))
}

/// Creates a bookmark.
pub fn create_bookmark(store: &mut Store, tag: u32) -> Result<()> {
    store
        .create_bookmark(SnapTag(tag), i64::from(tag))?
        .with_context(|| format!("cannot create bookmark {tag}"))
}

/// Has the chunks copied out, or their change noted, as one commit group.
pub fn copy_out(store: &mut Store, chunks: impl Iterator<Item = u64>) -> Result<()> {
    let mut ops: Vec<Op> = chunks.map(|chunk| Op::OriginWrite(Chunk(chunk))).collect();
    while !ops.is_empty() {
        let mut waiting = Vec::new();
        for (op, answer) in ops.iter().zip(store.commit(&ops)?) {
            match answer {
                Ok(Done::Unique) => {}
                Err(OpError::Wait) => waiting.push(*op),
                other => bail!("{op:?} was answered {other:?}"),
            }
        }
        // As a server does, so that the time is what a request waits.
        while store.is_making_room() {
            store.background_step(STEP)?;
        }
        ops = waiting;
    }
    Ok(())
}

/// Length of a device in chunks.
pub fn chunks(device: &dyn BlockDevice, chunk: ChunkShift) -> u64 {
    device.len_bytes() >> chunk.get()
}
