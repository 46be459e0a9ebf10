// SPDX-License-Identifier: GPL-2.0-only
//! Which snapshot store is the volume's, and which snapshot has which number.

use super::*;
use crate::host::fake::STORE;
use crate::refusal::{self, OTHER_STORE};

fn document(bench: &Bench) -> String {
    fs::read_to_string(bench.layout.config("v")).expect("read")
}

fn start(volume: &mut Volume) -> Result<()> {
    volume.start(Level::Mounted, &mut |_| ())
}

/// A swapped disk, or an old copy, lay under the store's name: the volume started over it, found none of its snapshots
/// there, and emptied its list without a word.
#[test]
fn another_store_is_refused_and_nothing_is_changed() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    take(&mut volume);
    bench.fake.reboot();
    let other = uuid::Uuid::from_u128(0xbad);
    let before = document(&bench);
    let snapshots = std::mem::take(&mut bench.fake.state().snapshots);
    bench.fake.state().store = Some(other);
    bench.fake.state().log.clear();
    let mut volume = bench.reload();
    let error = start(&mut volume).expect_err("another store");
    assert_eq!(refusal::code(&error), OTHER_STORE);
    let text = format!("{error:#}");
    for part in [
        "'/dev/sysvg/test_snap'",
        &other.to_string(),
        &STORE.to_string(),
        "zumastor start volume v",
    ] {
        assert!(text.contains(part), "{text}");
    }
    volume.refresh();
    assert_eq!(document(&bench), before);
    let log = bench.fake.state().log.clone();
    assert_eq!(log, ["start agent"], "no server is let at it");
    assert!(!volume.worth_retrying(Occasion::Device));
    // The right one is back.
    bench.fake.state().store = None;
    assert!(volume.worth_retrying(Occasion::Device));
    bench.fake.state().snapshots = snapshots;
    start(&mut volume).expect("up");
    assert_eq!(volume.snapshots().len(), 2);
}

#[test]
fn a_refused_volume_can_be_forgotten() {
    let bench = Bench::new();
    bench.master();
    bench.fake.reboot();
    bench.fake.state().store = Some(uuid::Uuid::from_u128(0xbad));
    let mut volume = bench.reload();
    start(&mut volume).expect_err("another store");
    volume.forget(&mut |_| ()).expect("forgotten");
    bench.assert_clean("forgotten");
}

/// The document did not say which store is the volume's.
#[test]
fn the_store_is_noted_at_define_and_by_the_first_start_of_an_older_document() {
    let bench = Bench::new();
    let volume = bench.master();
    assert_eq!(volume.config.store, Some(STORE));
    let noted = format!("store: {STORE}\n");
    assert!(document(&bench).contains(&noted));
    let record = || fs::read_to_string(bench.layout.boot_record("v")).expect("read");
    assert!(record().contains(&noted), "what boots knows it too");
    drop(volume);
    let older = document(&bench).replace(&noted, "");
    fs::write(bench.layout.config("v"), &older).expect("written");
    let mut volume = bench.reload();
    assert_eq!(volume.config.store, None);
    start(&mut volume).expect("up");
    assert_eq!(
        document(&bench),
        older,
        "at boot the document may not be there in whole"
    );
    volume.refresh();
    assert!(document(&bench).contains(&noted) && record().contains(&noted));
    // In the same process another one is refused from now on.
    volume.down(Level::Down, &mut |_| ()).expect("down");
    bench.fake.state().store = Some(uuid::Uuid::from_u128(0xbad));
    start(&mut volume).expect_err("another store");
}

/// A number that was used again by hand was taken for the volume's old snapshot.
#[test]
fn a_number_used_again_is_another_snapshot_and_what_is_gone_is_named() {
    let bench = Bench::new();
    let mut volume = bench.master();
    for _ in 0..4 {
        take(&mut volume);
    }
    let sequences: Vec<_> = volume.snapshots().iter().map(|s| s.sequence).collect();
    assert_eq!(sequences, [Some(1), Some(2), Some(3), Some(4)]);
    volume.down(Level::Down, &mut |_| ()).expect("down");
    {
        let mut state = bench.fake.state();
        state.snapshots.insert(2, 9);
        state.snapshots.remove(&0);
        state.snapshots.remove(&6);
    }
    start(&mut volume).expect("up");
    let ids: Vec<u32> = volume.snapshots().iter().map(|s| s.id).collect();
    assert_eq!(ids, [4]);
    let told = volume.warnings.join("\n");
    assert!(told.contains("no longer has snapshots 0 6: "), "{told}");
    assert!(
        told.contains("no longer has snapshot 2, but others of the same number"),
        "{told}"
    );
    assert_eq!(bench.fake.state().snapshots.get(&2), Some(&9), "left alone");
    assert_eq!(take(&mut volume), 8);
}

/// `delete` deleted whatever had the number by then.
#[test]
fn a_number_used_again_is_not_deleted_with_the_old_snapshot() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    bench.fake.state().snapshots.insert(0, 9);
    volume
        .forget_snapshot(0, &mut |_| ())
        .expect("out of the list");
    assert!(volume.snapshots().is_empty());
    assert_eq!(bench.fake.state().snapshots.get(&0), Some(&9));
}

/// Documents of earlier builds have no sequences.
#[test]
fn the_sequence_of_an_older_document_is_noted_once() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    volume.config.snapshots.list[0].sequence = None;
    volume.settle_snapshots().expect("settled");
    assert_eq!(bench.reload().snapshots()[0].sequence, Some(1));
}
