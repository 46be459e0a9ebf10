// SPDX-License-Identifier: GPL-2.0-only
//! The shapes of volumes that are tested: chunk size, lengths, devices.

use ddsnap::device::memory::Machine;
use ddsnap::device::{BlockDevice, Read};
use ddsnap::format::BLOCK_LEN;
use ddsnap::format::superblock::Superblock;
use ddsnap::store::{Devices, InitOptions, OpenOptions, Opened, Store, StoreError, Surroundings};
use ddsnap::units::{ChunkShift, MetaBlock, SECTOR_BYTES};

pub const ORIGIN: usize = 0;
pub const DATA: usize = 1;
pub const META: usize = 2;

/// Shape of a volume.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    pub chunk_bytes: u64,
    /// Chunks of the origin; the last may be short.
    pub origin_chunks: u64,
    /// Sectors that the origin's last chunk lacks.
    pub lacking_sectors: u64,
    /// Length of the device that holds the data.
    pub data_bytes: u64,
    /// Length of the device for metadata; 0 for none.
    pub meta_bytes: u64,
    /// The most snapshots the workload keeps.
    pub snapshots: u64,
}

impl Shape {
    pub fn shift(&self) -> ChunkShift {
        ChunkShift::from_bytes(self.chunk_bytes).expect("a chunk size")
    }

    pub fn origin_bytes(&self) -> u64 {
        self.origin_chunks * self.chunk_bytes - self.lacking_sectors * SECTOR_BYTES
    }

    /// The origin has this length now.
    pub fn set_origin_bytes(&mut self, bytes: u64) {
        self.origin_chunks = bytes.div_ceil(self.chunk_bytes);
        self.lacking_sectors = (self.origin_chunks * self.chunk_bytes - bytes) / SECTOR_BYTES;
    }

    pub fn machine(&self) -> Machine {
        Machine::new(&[
            ("origin", self.origin_bytes()),
            ("data", self.data_bytes),
            ("meta", self.meta_bytes),
        ])
    }

    pub fn devices(&self, machine: &Machine) -> Devices {
        Devices {
            origin: Box::new(machine.device(ORIGIN)),
            data: Box::new(machine.device(DATA)),
            meta: (self.meta_bytes > 0)
                .then(|| Box::new(machine.device(META)) as Box<dyn BlockDevice>),
        }
    }

    pub fn initialize(&self, machine: &Machine) {
        let options = InitOptions {
            chunk: self.shift(),
            journal_bytes: None,
            now: 1,
            uuid: [9; 16],
        };
        Store::initialize(&mut self.devices(machine), &options).expect("initialise");
    }

    /// Tells the disks where all that lies there has a checksum: the metadata, as far as it is in one piece.
    pub fn set_checked(&self, machine: &Machine) {
        let disk = if self.meta_bytes > 0 { META } else { DATA };
        let mut bytes = vec![0; BLOCK_LEN];
        let into = &mut bytes[..];
        let mut device = machine.device(disk);
        device.read(&mut [Read { offset: 0, into }]).expect("read");
        let superblock = Superblock::decode(&bytes, 0).expect("a superblock");
        let end = superblock.extents[0].first.0 + superblock.extents[0].blocks;
        machine.set_checked(disk, 0..MetaBlock(end).to_offset());
    }

    pub fn open(&self, machine: &Machine) -> Result<(Store, Opened), StoreError> {
        // A small cache, so that blocks are read back from the device.
        Store::open(
            self.devices(machine),
            &OpenOptions {
                cache_bytes: 16 * 4096,
            },
        )
    }

    /// As `open`, whatever was written to the origin.
    pub fn accept(&self, machine: &Machine) -> Result<(Store, Opened), StoreError> {
        let options = OpenOptions {
            cache_bytes: 16 * 4096,
        };
        let accepting = Surroundings {
            accept: true,
            ..Surroundings::default()
        };
        Store::open_in(self.devices(machine), &options, &accepting)
    }
}

/// The shapes that are tested, with their share of the points: a large chunk is a slow one.
///
/// Most volumes are small, so that a few hundred steps fill the store, wrap its journal and give
/// snapshots up.
pub const SHAPES: &[(&str, u64, Shape)] = &[
    (
        "512",
        24,
        Shape {
            chunk_bytes: 512,
            origin_chunks: 24,
            lacking_sectors: 0,
            data_bytes: 640 << 10,
            meta_bytes: 0,
            snapshots: 5,
        },
    ),
    (
        "512-many",
        4,
        Shape {
            chunk_bytes: 512,
            origin_chunks: 40,
            lacking_sectors: 0,
            data_bytes: 660 << 10,
            meta_bytes: 0,
            snapshots: 8,
        },
    ),
    (
        "512-deep",
        1,
        Shape {
            chunk_bytes: 512,
            origin_chunks: 700,
            lacking_sectors: 0,
            data_bytes: 900 << 10,
            meta_bytes: 0,
            snapshots: 3,
        },
    ),
    (
        "4k",
        18,
        Shape {
            chunk_bytes: 4096,
            origin_chunks: 24,
            lacking_sectors: 0,
            data_bytes: 850 << 10,
            meta_bytes: 0,
            snapshots: 5,
        },
    ),
    // One sector more than 23 chunks.
    (
        "4k-more",
        10,
        Shape {
            chunk_bytes: 4096,
            origin_chunks: 24,
            lacking_sectors: 7,
            data_bytes: 850 << 10,
            meta_bytes: 0,
            snapshots: 5,
        },
    ),
    (
        "4k-meta",
        15,
        Shape {
            chunk_bytes: 4096,
            origin_chunks: 24,
            lacking_sectors: 0,
            data_bytes: 300 << 10,
            meta_bytes: 600 << 10,
            snapshots: 5,
        },
    ),
    // One sector less than 24 chunks.
    (
        "4k-less-meta",
        8,
        Shape {
            chunk_bytes: 4096,
            origin_chunks: 24,
            lacking_sectors: 1,
            data_bytes: 300 << 10,
            meta_bytes: 600 << 10,
            snapshots: 5,
        },
    ),
    (
        "16k",
        12,
        Shape {
            chunk_bytes: 16 << 10,
            origin_chunks: 16,
            lacking_sectors: 0,
            data_bytes: 1536 << 10,
            meta_bytes: 0,
            snapshots: 5,
        },
    ),
    (
        "64k-meta",
        6,
        Shape {
            chunk_bytes: 64 << 10,
            origin_chunks: 8,
            lacking_sectors: 0,
            data_bytes: 2 << 20,
            meta_bytes: 600 << 10,
            snapshots: 4,
        },
    ),
    // An origin of one sector.
    (
        "64k-sector",
        1,
        Shape {
            chunk_bytes: 64 << 10,
            origin_chunks: 1,
            lacking_sectors: 127,
            data_bytes: 2 << 20,
            meta_bytes: 0,
            snapshots: 4,
        },
    ),
    (
        "1m",
        1,
        Shape {
            chunk_bytes: 1 << 20,
            origin_chunks: 4,
            lacking_sectors: 0,
            data_bytes: 10 << 20,
            meta_bytes: 0,
            snapshots: 4,
        },
    ),
];

/// The shape of that name.
pub fn shape(name: &str) -> Shape {
    SHAPES
        .iter()
        .find(|(known, ..)| *known == name)
        .map(|(.., shape)| *shape)
        .unwrap_or_else(|| panic!("no shape {name}"))
}
