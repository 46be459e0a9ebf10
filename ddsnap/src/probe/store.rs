// SPDX-License-Identifier: GPL-2.0-only
//! Which snapshot store a device holds, read before a server is let at it: opening a store writes to it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use uuid::Uuid;

use crate::format::BLOCK_LEN;
use crate::format::superblock::{COPIES, Superblock};

/// The UUID in the superblock at `path`: the metadata device of a store that has one, else the store itself. None: there is
/// no whole superblock that this version reads.
///
/// # Errors
/// The device cannot be opened, or neither copy can be read.
pub fn uuid(path: &Path) -> io::Result<Option<Uuid>> {
    let file = File::open(path)?;
    let mut newest: Option<Superblock> = None;
    let mut unread = None;
    for (copy, at) in COPIES.into_iter().enumerate() {
        let mut block = vec![0; BLOCK_LEN];
        match file.read_exact_at(&mut block, at.to_offset()) {
            Ok(()) => {}
            // The device ends before it.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
            Err(error) => {
                unread = Some(error);
                continue;
            }
        }
        let found = Superblock::decode(&block, copy as u32).ok();
        let newer = |found: &Superblock| {
            newest
                .as_ref()
                .is_none_or(|newest| found.generation > newest.generation)
        };
        if let Some(found) = found.filter(newer) {
            newest = Some(found);
        }
    }
    match (newest, unread) {
        (Some(superblock), _) => Ok(Some(Uuid::from_bytes(superblock.uuid))),
        (None, Some(error)) => Err(error),
        (None, None) => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::uring::{Access, UringDevice};
    use crate::store::{Devices, InitOptions, Store};
    use crate::units::ChunkShift;

    #[test]
    fn a_store_is_told_by_either_copy_and_what_is_none_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let make = |name: &str| {
            let path = dir.path().join(name);
            File::create(&path).unwrap().set_len(8 << 20).unwrap();
            path
        };
        let (origin, store) = (make("origin"), make("store"));
        let device = |path| Box::new(UringDevice::open(path, Access::ReadWrite).unwrap());
        assert_eq!(uuid(&store).unwrap(), None, "nothing but zeros");
        let mut devices = Devices {
            origin: device(&origin),
            data: device(&store),
            meta: None,
        };
        let options = InitOptions {
            chunk: ChunkShift::from_bytes(4096).unwrap(),
            journal_bytes: None,
            now: 0,
            uuid: [7; 16],
        };
        Store::initialize(&mut devices, &options).unwrap();
        drop(devices);
        let found = Some(Uuid::from_bytes([7; 16]));
        assert_eq!(uuid(&store).unwrap(), found);
        let file = File::options().write(true).open(&store).unwrap();
        file.write_all_at(&[1; BLOCK_LEN], COPIES[0].to_offset())
            .unwrap();
        assert_eq!(uuid(&store).unwrap(), found);
        file.write_all_at(&[1; BLOCK_LEN], COPIES[1].to_offset())
            .unwrap();
        assert_eq!(uuid(&store).unwrap(), None);
        let short = make("short");
        File::options()
            .write(true)
            .open(&short)
            .unwrap()
            .set_len(512)
            .unwrap();
        assert_eq!(uuid(&short).unwrap(), None);
        assert!(uuid(&dir.path().join("none")).is_err());
    }
}
