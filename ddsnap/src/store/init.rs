// SPDX-License-Identifier: GPL-2.0-only
//! Making a new store, and finding out whether there is one.

use super::error::StoreError;
use super::media::{Devices, flush, read_batch, sectors_differ, write_batch};
use super::{InitOptions, Store};
use crate::buffer::AlignedBuf;
use crate::device::{BlockDevice, Read, Write};
use crate::format::BLOCK_LEN;
use crate::format::label::{self, Label};
use crate::format::superblock::{
    COPIES, Extent, FIRST_FREE, MAX_JOURNAL_BLOCKS, MIN_JOURNAL_BLOCKS, Superblock, TreeRoot,
};
use crate::format::{Version, get_u64, superblock};
use crate::promise::kept;
use crate::units::{META_BLOCK_BYTES, MetaBlock, Sectors, SnapSeq, StoreChunk};

/// The least metadata region: enough for the snapshot table and a small index with its copies.
pub(super) const MIN_META_BLOCKS: u64 = 96;
/// Bytes of metadata region for each data chunk: 16 for an exception, as many for its copy on write.
pub(super) const META_BYTES_PER_CHUNK: u64 = 32;
/// Blocks on top of that, a 64th of the device in these bounds: the most hold a table of 4096 snapshots
/// with its copy and the reserve.
pub(super) const MIN_BASE_BLOCKS: u64 = 64;
pub(super) const MAX_BASE_BLOCKS: u64 = 320;
const MAX_DEFAULT_JOURNAL_BYTES: u64 = 64 << 20;

impl Store {
    /// Makes an empty store, whatever was on the devices before. Writes a few blocks, however large
    /// the devices are.
    ///
    /// # Errors
    /// A device is too small or its sectors are larger than a chunk; the journal size is out of
    /// range; a device fails.
    pub fn initialize(devices: &mut Devices, options: &InitOptions) -> Result<(), StoreError> {
        let superblock = layout(devices, options)?;
        wipe(&mut *devices.data)?;
        if let Some(meta) = &mut devices.meta {
            wipe(&mut **meta)?;
            let bytes = Label {
                uuid: options.uuid,
                chunk: options.chunk,
            }
            .encode();
            write_batch(
                &mut *devices.data,
                &[Write {
                    offset: 0,
                    from: &bytes,
                }],
            )?;
            if kept!(
                "label-before-superblock",
                "a whole superblock would be there whose data device bears no label of it"
            ) {
                flush(&mut *devices.data)?;
            }
        }
        let device = devices.meta.as_mut().unwrap_or(&mut devices.data);
        for (copy, at) in COPIES.into_iter().enumerate() {
            let bytes = superblock.encode(copy as u32);
            write_batch(
                &mut **device,
                &[Write {
                    offset: at.to_offset(),
                    from: &bytes,
                }],
            )?;
            if kept!(
                "new-store-durable",
                "an initialised store would be gone after a power cut"
            ) {
                flush(&mut **device)?;
            }
        }
        Ok(())
    }

    /// Whether [`Store::initialize`] would have anything against devices and options. Writes nothing.
    ///
    /// # Errors
    /// As there.
    pub fn check_layout(devices: &Devices, options: &InitOptions) -> Result<(), StoreError> {
        layout(devices, options).map(|_| ())
    }

    /// Whether `device` holds a store or a part of one, intact or not: what the user is asked about
    /// before it is overwritten.
    ///
    /// # Errors
    /// The device cannot be read.
    pub fn probe(device: &mut dyn BlockDevice) -> Result<bool, StoreError> {
        for at in COPIES {
            if device.len_bytes() < at.to_offset() + META_BLOCK_BYTES {
                continue;
            }
            let mut bytes = AlignedBuf::zeroed(BLOCK_LEN);
            read_batch(
                device,
                &mut [Read {
                    offset: at.to_offset(),
                    into: &mut bytes,
                }],
            )?;
            if [superblock::MAGIC, label::MAGIC].contains(&get_u64(&bytes, 0)) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Destroys what an earlier store left: a valid copy of its superblock must not outlive the first
/// write of the new one, or a power cut now would bring half of it back.
fn wipe(device: &mut dyn BlockDevice) -> Result<(), StoreError> {
    let zeros = AlignedBuf::zeroed(BLOCK_LEN);
    for at in COPIES {
        if device.len_bytes() >= at.to_offset() + META_BLOCK_BYTES {
            write_batch(
                device,
                &[Write {
                    offset: at.to_offset(),
                    from: &zeros,
                }],
            )?;
        }
    }
    if kept!(
        "wiped-before-new-store",
        "half of an earlier store could come back beside the new one"
    ) {
        flush(device)?;
    }
    Ok(())
}

/// A small part of a device that holds data too, more of one that holds only metadata.
fn default_journal_bytes(devices: &Devices) -> u64 {
    let share = match &devices.meta {
        Some(meta) => meta.len_bytes() / 16,
        None => devices.data.len_bytes() / 64,
    };
    share.min(MAX_DEFAULT_JOURNAL_BYTES)
}

fn layout(devices: &Devices, options: &InitOptions) -> Result<Superblock, StoreError> {
    let refuse = |device: &dyn BlockDevice, problem: String| StoreError::CannotInitialize {
        device: device.name().to_owned(),
        problem,
    };
    let (shift, chunk_bytes) = (options.chunk.get(), options.chunk.bytes());
    for device in [&devices.origin, &devices.data] {
        if device.alignment() as u64 > chunk_bytes {
            let problem = format!(
                "its sectors of {} bytes are larger than a chunk of {chunk_bytes}; choose a larger chunk size",
                device.alignment()
            );
            return Err(refuse(&**device, problem));
        }
    }
    if let Some(problem) = sectors_differ(&*devices.origin, &*devices.data) {
        return Err(refuse(&*devices.data, problem));
    }
    let origin = Sectors::in_bytes(devices.origin.len_bytes());
    if origin.0 == 0 {
        return Err(refuse(&*devices.origin, "it is empty".to_owned()));
    }
    let meta: &dyn BlockDevice = devices.meta.as_deref().unwrap_or(&*devices.data);
    let meta_device_blocks = meta.len_bytes() / META_BLOCK_BYTES;
    let journal_blocks = match options.journal_bytes {
        Some(bytes) => bytes.div_ceil(META_BLOCK_BYTES).max(MIN_JOURNAL_BLOCKS),
        None => default_journal_bytes(devices) / META_BLOCK_BYTES,
    }
    .max(MIN_JOURNAL_BLOCKS);
    if journal_blocks > MAX_JOURNAL_BLOCKS {
        let most = MAX_JOURNAL_BLOCKS * META_BLOCK_BYTES;
        return Err(refuse(
            meta,
            format!("a journal can have at most {most} bytes"),
        ));
    }
    let meta_first = FIRST_FREE.0 + journal_blocks;
    let data_end = devices.data.len_bytes() >> shift;
    let (meta_blocks, data_first) = if devices.meta.is_some() {
        let label_chunks = META_BLOCK_BYTES.div_ceil(chunk_bytes);
        (meta_device_blocks.saturating_sub(meta_first), label_chunks)
    } else {
        let base = (meta_device_blocks / 64).clamp(MIN_BASE_BLOCKS, MAX_BASE_BLOCKS);
        let index = data_end.saturating_mul(META_BYTES_PER_CHUNK) / META_BLOCK_BYTES;
        let wanted = (index + base).max(MIN_META_BLOCKS);
        let data_first = ((meta_first + wanted) * META_BLOCK_BYTES).div_ceil(chunk_bytes);
        // What lies before the next chunk boundary would be lost otherwise.
        (
            (data_first << shift) / META_BLOCK_BYTES - meta_first,
            data_first,
        )
    };
    if meta_blocks < MIN_META_BLOCKS {
        let least = (meta_first + MIN_META_BLOCKS) * META_BLOCK_BYTES;
        let problem = format!(
            "it has {} bytes, the store's metadata needs at least {least}",
            meta.len_bytes()
        );
        return Err(refuse(meta, problem));
    }
    if data_end <= data_first {
        let least = (data_first + 1) << shift;
        let problem = format!(
            "it has {} bytes, a store with this chunk size needs at least {least}",
            devices.data.len_bytes()
        );
        return Err(refuse(&*devices.data, problem));
    }
    Ok(Superblock {
        version: Version::V2,
        uuid: options.uuid,
        chunk: options.chunk,
        clean: true,
        separate_meta: devices.meta.is_some(),
        bookmarks: false,
        generation: 1,
        created: options.now,
        origin,
        data_first: StoreChunk(data_first),
        data_end: StoreChunk(data_end),
        data_used: 0,
        journal_first: FIRST_FREE,
        journal_blocks,
        epoch: 1,
        tail: 0,
        tail_sequence: 1,
        next_seq: SnapSeq(1),
        revert: None,
        snapshots: None,
        snapshot_count: 0,
        exceptions: TreeRoot::default(),
        overlays: TreeRoot::default(),
        space: TreeRoot::default(),
        extents: vec![Extent {
            first: MetaBlock(meta_first),
            blocks: meta_blocks,
        }],
        origin_record: None,
    })
}
