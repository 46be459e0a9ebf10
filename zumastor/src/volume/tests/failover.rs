// SPDX-License-Identifier: GPL-2.0-only
//! A replica becomes master, and an old master a replica.

use uuid::Uuid;

use super::replica::{EPOCH, arrive, begin, incoming, source, target};
use super::*;
use crate::config::{HoldPolicy, Target};
use crate::machine::Mount;
use crate::replication::standing::{Epoch, Role};

/// A master that came later.
const LATER: Epoch = Epoch {
    number: 9,
    owner: Uuid::from_u128(600),
    since: 1_800_000_000,
};

/// Two masters of one epoch would each overwrite the other's data.
#[test]
fn a_failover_begins_an_epoch_and_a_failback_keeps_what_was_written() {
    let bench = Bench::new();
    let mut volume = bench.replica(true);
    arrive(&mut volume, &begin(1, None));
    let number = volume.become_master(77, &mut |_| ()).expect("master");
    assert_eq!(bench.mounted().iter().filter(|m| *m == "v").count(), 1);
    let lineage = volume.config.lineage.clone();
    assert_eq!((lineage.epoch, lineage.since), (4, Some(77)));
    assert_eq!(lineage.owner, Some(volume.config.uuid));
    assert_eq!(lineage.uuid, Uuid::from_u128(70));
    assert!(volume.config.snapshots.find(number).is_some());
    let again = volume.check_fail_over().expect_err("master").to_string();
    assert!(again.contains("is master already"), "{again}");

    let back = volume.fail_back(&source(true), LATER, &mut |_| ());
    back.expect("back");
    let standing = volume.standing(&Peer::Source, &|_| 0).expect("stands");
    assert_eq!((standing.role, standing.epoch), (Role::Replica, LATER));
    // Its own changes are in a snapshot, which the origin is known to hold.
    let kept = standing.origin.expect("known");
    assert_eq!(standing.held.last().map(|held| held.id), Some(kept));
    assert_eq!(standing.hold, Some(Uuid::from_u128(1)));
    // What is shown is the last one that has arrived.
    let (shown, twin) = {
        let state = bench.fake.state();
        (state.mounts[0].dev, state.dm["v(1)"].0)
    };
    assert_eq!((bench.mounted(), shown), (vec!["v".to_owned()], twin));
    // And it may change its mind: nobody has an epoch twice.
    volume.become_master(78, &mut |_| ()).expect("master");
    assert_eq!(volume.config.lineage.epoch, 10);
}

/// The one snapshot that both had was deleted by the first cycle back, which then had to copy everything.
#[test]
fn what_both_had_is_kept_for_the_way_back() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    arrive(&mut volume, &begin(1, None));
    volume.become_master(77, &mut |_| ()).expect("master");
    let back = volume.target("alpha").expect("a target").clone();
    assert_eq!(back.hold.map(|hold| hold.uuid), Some(Uuid::from_u128(1)));
    assert_eq!(back.name.as_deref(), Some("w"));
    volume.snapshot_to_send("alpha").expect("taken");
    assert!(bench.stored().contains(&0), "{:?}", bench.stored());
    volume.forget_snapshot(0, &mut |_| ()).expect_err("held");
}

/// A line of 1 MB/s was filled by a master that had been a replica for a while: its rate limit was forgotten.
#[test]
fn how_it_was_sent_survives_being_a_replica() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    arrive(&mut volume, &begin(1, None));
    volume.become_master(77, &mut |_| ()).expect("master");
    let limits = |target: &Target| {
        (
            target.ratelimit,
            target.on_full,
            target.uncompressed,
            target.test_fullvolume,
        )
    };
    let set = (Some(1_000_000), HoldPolicy::Protect, true, true);
    let changed = volume.change(|config| {
        let target = config.targets.get_mut("alpha").expect("a target");
        (
            target.ratelimit,
            target.on_full,
            target.uncompressed,
            target.test_fullvolume,
        ) = set;
        Ok(())
    });
    changed.expect("set");
    let back = volume.fail_back(&source(false), LATER, &mut |_| ());
    back.expect("a replica");
    volume.become_master(78, &mut |_| ()).expect("master again");
    assert_eq!(limits(volume.target("alpha").expect("a target")), set);
}

/// A master mounts its snapshots, and a journal that is replayed by that changed what increments start from.
#[test]
fn what_was_received_is_not_mounted_by_a_master_either() {
    let bench = Bench::new();
    let mut volume = bench.replica(true);
    arrive(&mut volume, &begin(1, None));
    let number = volume.become_master(77, &mut |_| ()).expect("master");
    let own = format!("v({number})");
    assert_eq!(bench.mounted(), ["v", own.as_str()]);
    let mut again = bench.reload();
    again.up(Level::Mounted, &mut |_| ()).expect("up");
    assert_eq!(bench.mounted(), ["v", own.as_str()]);
}

/// The volume was left unmounted where its users had it, by something that was refused.
#[test]
fn what_fails_on_the_way_leaves_the_role_and_the_mounts() {
    let bench = Bench::new();
    let mut volume = bench.master();
    bench.fake.state().fail = Some("create 0".into());
    let failed = volume.fail_back(&source(false), LATER, &mut |_| ());
    failed.expect_err("no snapshot");
    assert!(volume.config.master.is_some() && volume.config.source.is_none());
    assert_eq!(bench.mounted(), ["v"]);
    bench.fake.state().fail = None;

    // Somebody has it mounted elsewhere: he would go on writing.
    let own = bench.fake.state().mounts[0].clone();
    bench.fake.state().mounts.push(Mount {
        dir: "/srv".into(),
        ..own
    });
    let refused = volume.check_fail_back(&source(false));
    let refused = refused.expect_err("in use").to_string();
    assert!(refused.contains("mounted on /srv too"), "{refused}");
    assert_eq!(bench.stored(), [] as [u32; 0]);
}

/// A replica without a complete snapshot became master of half a copy.
#[test]
fn nothing_complete_is_no_master() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    let refusal = |volume: &Volume| volume.check_fail_over().expect_err("refused").to_string();
    assert!(refusal(&volume).contains("no complete snapshot has arrived yet"));
    let first = begin(1, None);
    arrive(&mut volume, &first);
    assert!(!volume.check_fail_over().expect("may"));
    let next = incoming(&begin(2, Some(1)));
    volume
        .start_incoming(next, Uuid::from_u128(70), EPOCH)
        .expect("begun");
    assert!(volume.check_fail_over().expect("may"), "it is taken back");
    volume.become_master(7, &mut |_| ()).expect_err("not yet");
    assert!(volume.config.source.is_some());
    // Who forgot the source and defined a master mounted it.
    let part = volume.forget_source(&mut |_| ()).expect_err("a part");
    let part = part.to_string();
    assert!(
        part.contains("has a part of a copy") && part.contains("failover v"),
        "{part}"
    );
    volume.settle(Uuid::from_u128(1)).expect("taken back");
    assert!(!volume.check_fail_over().expect("may"));
    volume.forget_source(&mut |_| ()).expect("forgotten");
    assert!(refusal(&volume).contains("is no replica"));
}

/// Half a copy was mounted, by a master of the same epoch as the other one.
#[test]
fn a_replica_is_not_simply_defined_as_master() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    arrive(&mut volume, &begin(1, None));
    let refused = volume.define_master(MasterFlags::default(), &mut |_| ());
    let refused = refused.expect_err("a replica").to_string();
    assert!(
        refused.contains("`zumastor failover v` makes it master"),
        "{refused}"
    );
    assert!(volume.config.source.is_some());
    volume.forget_source(&mut |_| ()).expect("forgotten");
    volume
        .define_master(MasterFlags::default(), &mut |_| ())
        .expect("a volume of its own");
    // A third machine would take increments from both, as of one lineage and epoch.
    let lineage = &volume.config.lineage;
    assert_eq!((lineage.uuid, lineage.epoch), (volume.config.uuid, 1));
}

/// It was sent on and on to a machine that said no each time, and the status said nothing.
#[test]
fn a_superseded_master_knows_by_whom_and_since_when() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.define_target(&target("beta")).expect("defined");
    volume.superseded(LATER, Some("beta")).expect("known");
    volume.superseded(LATER, None).expect("known");
    let volume = bench.reload();
    let line = superseded_line("v", &volume.config.lineage).expect("a line");
    assert!(
        line.starts_with(
            "it was superseded: beta is master since 2027-01-15T08:00:00Z, of epoch 9"
        ),
        "{line}"
    );
    assert!(line.contains("`zumastor failback v beta`"), "{line}");
    let view = crate::status::View::of(&volume);
    assert_eq!(view.warnings, [line]);
}

/// Of two masters nobody could say that the old one is to stay.
#[test]
fn a_superseded_master_can_take_over_again() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.superseded(LATER, None).expect("known");
    assert!(!volume.check_fail_over().expect("may"));
    volume.become_master(5, &mut |_| ()).expect("master");
    let lineage = &volume.config.lineage;
    assert_eq!((lineage.epoch, &lineage.superseded), (10, &None));
    // What is older is no news.
    volume.superseded(LATER, None).expect("told");
    assert_eq!(volume.config.lineage.superseded, None);
}

/// The snapshot that had arrived without the sender having heard of it was given up first.
#[test]
fn a_failback_holds_what_was_on_its_way() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.define_target(&target("alpha")).expect("defined");
    let uuid = |volume: &Volume, id| volume.config.snapshots.find(id).expect("listed").uuid;
    volume.snapshot_to_send("alpha").expect("taken");
    let first = uuid(&volume, 0);
    volume.move_hold("alpha", first, None).expect("moved");
    volume.snapshot_to_send("alpha").expect("taken");
    let second = uuid(&volume, 2);
    volume.pin("alpha", second).expect("pinned");
    let request = DefineSource {
        period: None,
        ..source(false)
    };
    volume
        .fail_back(&request, LATER, &mut |_| ())
        .expect("back");
    let source = volume.config.source.as_ref().expect("a replica");
    let holds = [source.hold, source.old_hold].map(|hold| hold.map(|hold| hold.uuid));
    assert_eq!(holds, [Some(second), Some(first)]);
    assert_eq!(source.period, Some(60), "who began the cycles still does");
}

/// What the users of a master had written was overwritten once `define source` had made it a replica.
#[test]
fn a_master_that_is_redefined_keeps_what_was_written() {
    let bench = Bench::new();
    let mut volume = bench.master();
    take(&mut volume);
    let made = volume.define_source(&source(false), &mut |_| ());
    made.expect("a replica");
    let standing = volume.standing(&Peer::Source, &|_| 0).expect("stands");
    assert_eq!(standing.origin, standing.held.last().map(|held| held.id));
    assert_eq!(bench.stored(), [0, 2]);
}
