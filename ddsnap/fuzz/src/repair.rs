// SPDX-License-Identifier: GPL-2.0-only
//! Checking and repairing such a store. What a repair calls sound must open, prove itself, and work.

use ddsnap::store::StoreError;
use ddsnap::store::check::{CheckOptions, Repaired, check, repair};

use super::input::Input;
use super::volume::{exercise, with_base};

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let first = input.u8();
    with_base(first, |base| {
        let volume = base.volume();
        let mut image = base.image();
        image.edit(&mut input);
        // In half of the inputs the checksums stay wrong: blocks are damaged and do not only lie.
        if first < 128 {
            image.seal();
        }
        image.store(&volume);
        let options = CheckOptions {
            cache_bytes: 16 * 4096,
            data: true,
        };
        let mut ignore = |_| -> Result<(), StoreError> { Ok(()) };
        let _ = check(volume.check_devices(), &options, &mut ignore);
        match repair(volume.check_devices(), &options, &mut ignore) {
            Ok((_, Repaired::Sound | Repaired::Whole | Repaired::WithLoss)) => {
                let mut store = match volume.open() {
                    // Its note of the origin lies: an administrator is to say what that means.
                    Err(StoreError::Foreign { .. }) => return,
                    opened => opened.expect("what was repaired opens"),
                };
                store.audit(true).expect("what was repaired is sound");
                let _ = exercise(&mut store, base.origin_chunks);
            }
            Ok((_, Repaired::Undecided)) | Err(_) => {}
        }
    });
}
