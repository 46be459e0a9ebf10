// SPDX-License-Identifier: GPL-2.0-only
//! Opening a store whose metadata says something else than it did. Input: number of the base, then edits.

use ddsnap::store::{OpenOptions, View};

use super::input::Input;
use super::volume::{exercise, with_base};

pub fn run(data: &[u8]) {
    let mut input = Input(data);
    with_base(input.u8(), |base| {
        let volume = base.volume();
        let mut image = base.image();
        image.edit(&mut input);
        image.seal();
        image.store(&volume);
        let options = OpenOptions {
            cache_bytes: 16 * 4096,
        };
        if let Ok((mut view, _)) = View::open(volume.devices(), &options) {
            let _ = view.count();
        }
        if let Ok(mut store) = volume.open() {
            let _ = store.audit(false);
            let _ = exercise(&mut store, base.origin_chunks);
            if store.failure().is_none() {
                let _ = store.close();
            }
        }
    });
}

#[cfg(test)]
mod tests {
    use super::super::volume::NUMBERS;
    use super::*;

    /// Without an edit the base opens, is sound, and works: else the target would test nothing.
    #[test]
    fn bases_are_sound_and_sealing_changes_nothing() {
        for number in 0..NUMBERS {
            with_base(number, |base| {
                let volume = base.volume();
                let mut image = base.image();
                image.seal();
                image.store(&volume);
                let mut store = volume.open().unwrap();
                store.audit(true).unwrap();
                exercise(&mut store, base.origin_chunks).unwrap();
                store.audit(true).unwrap();
                store.close().unwrap();
                volume.open().unwrap().audit(true).unwrap();
            });
        }
    }
}
