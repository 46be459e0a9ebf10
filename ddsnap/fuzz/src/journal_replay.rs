// SPDX-License-Identifier: GPL-2.0-only
//! Replaying records behind those of a store that crashed. Input: number of the base, then entries.
//! Replaying them again must give the same state. It need not be sound: entries that each could be, but
//! contradict what the trees hold, are found by a check and not by each opening.

use ddsnap::format::journal::{self, ENTRY_LEN, HEADER_LEN, MAX_RECORD_ENTRIES, RecordId};
use ddsnap::units::SnapSeq;

use super::input::Input;
use super::volume::{BOOKMARKS, Volume, exercise, with_base};

const BLOCK: u64 = 4096;

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let number = match input.u8() {
        byte if byte % 16 == 10 => BOOKMARKS,
        byte => 1 + byte % 2,
    };
    with_base(number, |base| {
        let volume = base.volume();
        let mut end = End::find(&volume);
        let mut entries: Vec<[u8; ENTRY_LEN]> = Vec::new();
        for _ in 0..1000 {
            if input.is_empty() {
                break;
            }
            let kind = input.u8();
            if kind >= 0xf0 || entries.len() == MAX_RECORD_ENTRIES {
                end.append(&volume, &std::mem::take(&mut entries));
                continue;
            }
            entries.push(entry(kind, &mut input));
        }
        end.append(&volume, &entries);
        let Ok(mut store) = volume.open() else { return };
        let _ = store.audit(false);
        let (snapshots, status) = (store.snapshots(), store.status());
        drop(store);
        // Opening wrote nothing that a second opening would not find.
        let mut store = volume.open().expect("what opened once opens again");
        assert_eq!(store.snapshots(), snapshots);
        assert_eq!(store.status().free_chunks, status.free_chunks);
        let _ = exercise(&mut store, base.origin_chunks);
    });
}

/// Entries as FORMAT.md has them; kinds and numbers that there are none of too.
fn entry(kind: u8, input: &mut Input<'_>) -> [u8; ENTRY_LEN] {
    let mut bytes = [0; ENTRY_LEN];
    // Those of bookmarks came later, and inputs that found something name the others so.
    let kind = match kind {
        0xe0.. => 18 + kind % 8,
        _ => kind % 18,
    };
    bytes[..4].copy_from_slice(&u32::from(kind).to_le_bytes());
    bytes[4..8].copy_from_slice(&(input.edge() as u32).to_le_bytes());
    for field in [8, 16, 24] {
        bytes[field..field + 8].copy_from_slice(&input.edge().to_le_bytes());
    }
    bytes
}

/// Where the next record of the ring belongs.
struct End {
    first: u64,
    blocks: u64,
    id: RecordId,
}

impl End {
    fn find(volume: &Volume<'_>) -> End {
        let number =
            |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
        let superblocks = [0, 65536].map(|offset| volume.read_meta(offset).unwrap());
        let newest = superblocks
            .iter()
            .max_by_key(|block| number(block, 48))
            .unwrap();
        let mut end = End {
            first: number(newest, 96),
            blocks: number(newest, 104),
            id: RecordId {
                epoch: number(newest, 112),
                sequence: number(newest, 128),
                uuid_part: u64::from_le_bytes([9; 8]),
                position: number(newest, 120),
            },
        };
        loop {
            let block = volume
                .read_meta((end.first + end.id.position) * BLOCK)
                .unwrap();
            match journal::UncheckedHeader::decode(&block) {
                Ok(header) if header.id == end.id => {
                    end.id.sequence += 1;
                    end.id.position += u64::from(header.blocks);
                }
                _ => return end,
            }
        }
    }

    fn append(&mut self, volume: &Volume<'_>, entries: &[[u8; ENTRY_LEN]]) {
        let blocks = journal::blocks_for(entries.len()) as u64;
        if self.id.position + blocks > self.blocks {
            return;
        }
        // A record of entries that can be encoded gets the bytes of those that perhaps cannot.
        let placeholder = vec![journal::Entry::Delete(SnapSeq(1)); entries.len()];
        let mut record = journal::encode(&self.id, &placeholder).to_vec();
        for (at, entry) in entries.iter().enumerate() {
            let from = HEADER_LEN + at * ENTRY_LEN;
            record[from..from + ENTRY_LEN].copy_from_slice(entry);
        }
        let crc = crc32c::crc32c(&record[8..]);
        record[4..8].copy_from_slice(&crc.to_le_bytes());
        volume.write_meta((self.first + self.id.position) * BLOCK, &record);
        self.id.sequence += 1;
        self.id.position += blocks;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A record that forgot a snapshot which was not deleted was replayed: its overlays stayed, of a
    /// snapshot that was not there.
    #[test]
    fn only_a_deleted_snapshot_is_forgotten() {
        const FORGET: u32 = 10;
        with_base(1, |base| {
            let live = base.volume().open().unwrap().snapshots()[0].seq;
            let volume = base.volume();
            let mut entry = [0; ENTRY_LEN];
            entry[..4].copy_from_slice(&FORGET.to_le_bytes());
            entry[8..16].copy_from_slice(&live.0.to_le_bytes());
            End::find(&volume).append(&volume, &[entry]);
            let error = volume.open().err().expect("it is refused");
            let text = error.to_string();
            assert!(text.contains("forgotten that was not deleted"), "{text}");
        });
    }
}
