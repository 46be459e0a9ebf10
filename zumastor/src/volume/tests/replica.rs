// SPDX-License-Identifier: GPL-2.0-only
//! What replication changes of a volume.

use ddsnap::units::Sectors;
use uuid::Uuid;

use super::*;
use crate::config::{HoldPolicy, Incoming};
use crate::replication::message::Begin;
use crate::replication::standing::{Epoch, Held, Role};

pub(super) fn target(host: &str) -> DefineTarget {
    DefineTarget {
        volume: "v".into(),
        host: host.into(),
        name: None,
        period: Some(60),
        window: None,
        ratelimit: None,
        uncompressed: false,
        test_fullvolume: false,
        on_full: HoldPolicy::Bookmark,
    }
}

pub(super) fn source(mount: bool) -> DefineSource {
    DefineSource {
        volume: "v".into(),
        host: "alpha".into(),
        port: None,
        name: Some("w".into()),
        period: None,
        window: None,
        mount,
    }
}

pub(super) fn begin(snapshot: u128, base: Option<u128>) -> Begin {
    Begin {
        nonce: [0; 16],
        snapshot: Held {
            id: Uuid::from_u128(snapshot),
            number: 40,
            taken: 1_800_000_000,
            length: Sectors(2048),
            data: true,
        },
        base: base.map(Uuid::from_u128),
        base_length: Sectors(2048),
        position: 0,
        plain: false,
    }
}

pub(super) fn incoming(begin: &Begin) -> Incoming {
    Incoming {
        uuid: begin.snapshot.id,
        id: 0,
        created: 0,
        base: begin.base,
        position: 0,
        size: 0,
        plain: false,
    }
}

pub(super) const EPOCH: Epoch = Epoch {
    number: 3,
    owner: Uuid::from_u128(500),
    since: 9,
};

impl Bench {
    pub(super) fn replica(&self, mount: bool) -> Volume {
        let mut volume = self.try_define(&Bench::request()).expect("defined");
        let made = volume.define_source(&source(mount), &mut |_| ());
        made.expect("a replica");
        volume
    }

    pub(super) fn stored(&self) -> Vec<u32> {
        self.fake.state().snapshots.keys().copied().collect()
    }
}

pub(super) fn arrive(volume: &mut Volume, begin: &Begin) -> u32 {
    let lineage = Uuid::from_u128(70);
    volume
        .start_incoming(incoming(begin), lineage, EPOCH)
        .expect("begun");
    volume.finish_incoming(begin, None).expect("arrived")
}

/// Users went on writing to what replication overwrites.
#[test]
fn a_replica_is_no_master_and_its_origin_is_not_mounted() {
    let bench = Bench::new();
    let mut volume = bench.replica(true);
    assert!(bench.mounted().is_empty());
    volume.snapshot(None, &mut |_| ()).expect_err("no master");
    let standing = volume.standing(&Peer::Source, &|_| 0).expect("stands");
    assert_eq!((standing.role, standing.lineage), (Role::Replica, None));
    assert!(bench.reload().config.source.is_some());
    volume.forget_source(&mut |_| ()).expect("forgotten");
    volume
        .set_stopped(&Peer::Source, true)
        .expect_err("no source");
}

/// A replica's snapshot that is mounted is written to by its journal; what arrives must not be.
#[test]
fn what_arrives_is_kept_and_its_twin_is_shown() {
    let bench = Bench::new();
    let mut volume = bench.replica(true);
    let first = begin(1, None);
    assert_eq!(arrive(&mut volume, &first), 0);
    assert_eq!(bench.stored(), [0, 1]);
    let mount = bench.fake.state().mounts[0].clone();
    assert_eq!(mount.dir, bench.layout.mountpoint("v"));
    assert_eq!(bench.devices(), ["v", "v(0)", "v(1)"]);
    let shown = bench.fake.state().dm["v(1)"].0;
    assert_eq!(mount.dev, shown);

    // The next one is shown; the base is kept until the upstream is known to have moved.
    assert_eq!(arrive(&mut volume, &begin(2, Some(1))), 2);
    assert_eq!(bench.stored(), [0, 1, 2, 3]);
    let mounts = bench.fake.state().mounts.clone();
    assert_eq!(mounts.len(), 1);
    assert_eq!(mounts[0].dev, bench.fake.state().dm["v(3)"].0);
    assert_eq!(bench.devices(), ["v", "v(0)", "v(2)", "v(3)"]);
    let standing = volume.standing(&Peer::Source, &|_| 0).expect("stands");
    assert_eq!(standing.hold, Some(Uuid::from_u128(2)));
    assert_eq!(standing.old_hold, Some(Uuid::from_u128(1)));
    assert_eq!(standing.origin, Some(Uuid::from_u128(2)));
    assert_eq!(standing.epoch, EPOCH);
    let refused = volume.forget_snapshot(2, &mut |_| ()).expect_err("held");
    assert!(format!("{refused:#}").contains("held by the replication from alpha"));

    volume.release_old_hold().expect("let go");
    assert_eq!(bench.stored(), [2, 3]);
    // All of it is there after a restart.
    let mut again = bench.reload();
    again.up(Level::Mounted, &mut |_| ()).expect("up");
    assert_eq!(bench.mounted(), ["v"]);
    again.down(Level::Down, &mut |_| ()).expect("down");
    assert!(bench.devices().is_empty());
}

/// A crash between the two snapshots left one that nobody knew, or took a half for the whole.
#[test]
fn half_an_arrival_is_taken_back_and_comes_again() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    let first = begin(1, None);
    volume
        .start_incoming(incoming(&first), Uuid::from_u128(70), EPOCH)
        .expect("begun");
    bench.fake.state().fail = Some("create 1".into());
    volume.finish_incoming(&first, None).expect_err("no twin");
    assert_eq!(bench.stored(), [0]);
    bench.fake.state().fail = None;

    let mut again = bench.reload();
    again.up(Level::Devices, &mut |_| ()).expect("up");
    assert!(bench.stored().is_empty());
    let standing = again.standing(&Peer::Source, &|_| 5).expect("stands");
    assert_eq!(standing.partial.map(|partial| partial.position), Some(5));
    assert_eq!(again.finish_incoming(&first, None).expect("arrived"), 2);
    assert_eq!(bench.stored(), [2, 3]);
}

/// The snapshot that an increment starts from was deleted, or each cycle left one behind.
#[test]
fn what_a_target_needs_stays_and_the_rest_goes() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.define_target(&target("beta")).expect("defined");
    let uuid = |volume: &Volume, id| volume.config.snapshots.find(id).expect("listed").uuid;

    volume.snapshot_to_send("beta").expect("taken");
    let first = uuid(&volume, 0);
    volume.pin("beta", first).expect("pinned");
    // Not arrived yet: the same is sent again. What nobody began to receive is replaced.
    volume.snapshot_to_send("beta").expect("taken already");
    assert_eq!(bench.stored(), [0]);
    volume.forget_snapshot(0, &mut |_| ()).expect_err("pinned");
    volume.move_hold("beta", first, Some(7)).expect("moved");
    assert_eq!(volume.target("beta").expect("there").proven, Some(7));

    volume.snapshot_to_send("beta").expect("taken");
    let second = uuid(&volume, 2);
    volume.pin("beta", second).expect("pinned");
    assert_eq!(bench.stored(), [0, 2]);
    volume.move_hold("beta", second, None).expect("moved");
    assert_eq!(bench.stored(), [2]);
    volume.move_hold("beta", first, None).expect_err("gone");
    let standing = volume
        .standing(&Peer::Target("beta".into()), &|_| 0)
        .expect("stands");
    assert_eq!((standing.role, standing.hold), (Role::Master, Some(second)));

    volume
        .forget_target("beta", &mut |_| ())
        .expect("forgotten");
    assert!(bench.stored().is_empty());
}

/// Each try for a machine that was off left a snapshot behind.
#[test]
fn tries_in_vain_leave_one_snapshot() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.define_target(&target("beta")).expect("defined");
    let by_hand = volume
        .snapshot(None, &mut |_| ())
        .expect("taken")
        .expect("one");
    for _ in 0..3 {
        volume.snapshot_to_send("beta").expect("taken");
    }
    assert_eq!(bench.stored(), [by_hand, 6]);
}

/// What a rotation of a replica gave up stayed for ever, or its hold went with it.
#[test]
fn rotations_take_what_arrives_and_give_it_up() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    volume.config.schedule.push(crate::config::Rotation {
        kind: "hourly".into(),
        keep: 1,
        every: None,
        served: None,
    });
    let wait = |volume: &mut Volume| {
        let source = volume.config.source.as_mut().expect("a source");
        source.pending = vec!["hourly".into()];
    };
    wait(&mut volume);
    arrive(&mut volume, &begin(1, None));
    let first = volume.config.snapshots.find(0).expect("listed");
    assert_eq!(first.kinds, ["replica", "hourly"]);
    arrive(&mut volume, &begin(2, Some(1)));
    volume.release_old_hold().expect("let go");
    assert_eq!(bench.stored(), [0, 1, 2, 3], "the rotation has it");
    wait(&mut volume);
    arrive(&mut volume, &begin(3, Some(2)));
    volume.release_old_hold().expect("let go");
    assert_eq!(bench.stored(), [4, 5]);
}

/// Has the next arrival be of this rotation, of which so many are kept.
fn await_hourly(volume: &mut Volume, keep: u32) {
    if volume.rotation("hourly").is_none() {
        volume.config.schedule.push(crate::config::Rotation {
            kind: "hourly".into(),
            keep,
            every: None,
            served: None,
        });
    }
    volume.snapshot(Some("hourly"), &mut |_| ()).expect("waits");
}

/// What is mounted on the directory that a link leads to: a device of the volume.
fn behind(bench: &Bench, link: &Path) -> String {
    let dir = fs::canonicalize(link).unwrap_or_else(|e| panic!("{}: {e}", link.display()));
    let state = bench.fake.state();
    let mounts = state.mounts.iter();
    let mount = mounts
        .rev()
        .find(|m| fs::canonicalize(&m.dir).is_ok_and(|found| found == dir));
    let mount = mount.unwrap_or_else(|| panic!("nothing is mounted on {}", dir.display()));
    let device = state.dm.iter().find(|(_, (dev, ..))| *dev == mount.dev);
    device.expect("a device").0.clone()
}

/// The snapshots that a replica kept by the clock could not be entered: there was no mount of them, and no link.
#[test]
fn rotations_of_a_replica_can_be_entered_and_after_a_failover_too() {
    let bench = Bench::new();
    let mut volume = bench.replica(true);
    await_hourly(&mut volume, 2);
    arrive(&mut volume, &begin(1, None));
    await_hourly(&mut volume, 2);
    arrive(&mut volume, &begin(2, Some(1)));
    let links = bench.layout.snapshot_links("v");
    let hourly = |bench: &Bench| {
        let link = |n| behind(bench, &links.join(format!("hourly.{n}")));
        [link(0), link(1)]
    };
    assert_eq!(hourly(&bench), ["v(3)", "v(1)"]);
    assert_eq!(behind(&bench, &bench.layout.mount_link("v")), "v(3)");
    let time = volume
        .config
        .snapshots
        .find(0)
        .expect("listed")
        .time
        .clone();
    assert_eq!(behind(&bench, &links.join(time)), "v(1)");
    // The old one has moved, nobody sees it twice; what was received is never mounted.
    assert_eq!(bench.mounted(), ["v(1)", "v"]);

    // One that no rotation has is seen for as long as it is the newest.
    arrive(&mut volume, &begin(3, Some(2)));
    assert_eq!(hourly(&bench), ["v(3)", "v(1)"]);
    assert_eq!(behind(&bench, &bench.layout.mount_link("v")), "v(5)");
    arrive(&mut volume, &begin(4, Some(3)));
    assert_eq!(bench.mounted(), ["v(1)", "v(3)", "v"]);
    assert!(!bench.devices().contains(&"v(5)".to_owned()));
    let mut volume = bench.reload();
    volume.up(Level::Mounted, &mut |_| ()).expect("up");
    assert_eq!(bench.mounted(), ["v(1)", "v(3)", "v"]);
    assert!(volume.warnings.is_empty(), "{:?}", volume.warnings);

    volume.become_master(77, &mut |_| ()).expect("master");
    assert_eq!(hourly(&bench), ["v(3)", "v(1)"]);
    assert_eq!(behind(&bench, &bench.layout.mount_link("v")), "v");
    bench.fake.reboot();
    let mut volume = bench.reload();
    volume.up(Level::Mounted, &mut |_| ()).expect("up");
    assert_eq!(hourly(&bench), ["v(3)", "v(1)"]);
    let state = bench.fake.state();
    for name in ["v(0)", "v(2)", "v(4)", "v(6)"] {
        let dev = state.dm[name].0;
        assert!(
            state.mounts.iter().all(|m| m.dev != dev),
            "{name} is mounted"
        );
    }
}

/// One that its rotation gave up and replication did not was mounted for as long as it was there.
#[test]
fn what_leaves_a_rotation_is_not_mounted_any_more() {
    let bench = Bench::new();
    let mut volume = bench.replica(true);
    for (snapshot, base) in [(1, None), (2, Some(1)), (3, Some(2))] {
        await_hourly(&mut volume, 1);
        arrive(&mut volume, &begin(snapshot, base));
    }
    assert_eq!(bench.stored(), [0, 1, 2, 3, 4, 5]);
    assert_eq!(bench.mounted(), ["v"]);
    assert_eq!(bench.devices(), ["v", "v(0)", "v(2)", "v(4)", "v(5)"]);
    assert!(!bench.layout.snapshot_links("v").join("hourly.1").exists());
}

/// Whoever stood in the directory of a replica kept all others from what had arrived since, and nothing said so.
#[test]
fn who_stands_in_what_a_replica_shows_keeps_it_for_himself() {
    let bench = Bench::new();
    let mut volume = bench.replica(true);
    arrive(&mut volume, &begin(1, None));
    bench.fake.state().busy.insert(bench.layout.mountpoint("v"));
    arrive(&mut volume, &begin(2, Some(1)));
    let link = bench.layout.mount_link("v");
    assert_eq!(
        (behind(&bench, &link), bench.mounted().len()),
        ("v(3)".to_owned(), 1)
    );
    let warning = "snapshot 0 is not shown any more, but is still in use by bash[4711], who see nothing newer until \
                   they open it anew";
    assert_eq!(volume.warnings, [warning]);
    // What he reads is not taken away below him.
    volume.release_old_hold().expect("let go");
    assert_eq!(bench.stored(), [0, 1, 2, 3]);
    assert_eq!(volume.warnings, [warning]);
    bench.fake.state().detached.clear();
    arrive(&mut volume, &begin(3, Some(2)));
    volume.release_old_hold().expect("let go");
    assert_eq!(bench.stored(), [4, 5]);
    assert!(volume.warnings.is_empty(), "{:?}", volume.warnings);
    assert_eq!(bench.devices(), ["v", "v(4)", "v(5)"]);
}

/// What cannot be taken out of sight, as what NFS serves, was shown on, and no start of the volume changed that.
#[test]
fn what_stays_in_its_place_is_told_and_goes_with_the_next_start() {
    let bench = Bench::new();
    let mut volume = bench.replica(true);
    arrive(&mut volume, &begin(1, None));
    let place = bench.layout.mountpoint("v");
    bench.fake.state().busy.insert(place.clone());
    bench.fake.state().fail = Some("detach v".into());
    arrive(&mut volume, &begin(2, Some(1)));
    bench.fake.state().fail = None;
    let link = bench.layout.mount_link("v");
    assert!(!link.is_symlink(), "it would lead to what is old");
    let [warning] = &volume.warnings[..] else {
        panic!("{:?}", volume.warnings);
    };
    let begins = "snapshot 0 is shown instead of snapshot 2, as it is still in use: ";
    assert!(
        warning.starts_with(begins) && warning.contains("bash[4711]"),
        "{warning}"
    );
    volume
        .down(Level::Devices, &mut |_| ())
        .expect_err("in use");
    bench.fake.state().busy.clear();
    volume.up(Level::Mounted, &mut |_| ()).expect("up");
    assert_eq!(behind(&bench, &link), "v(3)");
    assert!(volume.warnings.is_empty(), "{:?}", volume.warnings);
    assert_eq!(bench.devices(), ["v", "v(0)", "v(2)", "v(3)"]);
}

/// Each cycle looked at all snapshots, on both sides, and took away warnings that were none of its business.
#[test]
fn a_cycle_costs_the_same_however_many_snapshots_there_are() {
    let mut costs = [Vec::new(), Vec::new()];
    for count in [10u32, 300] {
        let bench = Bench::new();
        let mut volume = bench.master();
        // Taking each of them would write the document as often.
        for number in 0..count {
            let id = 2 * number;
            bench.fake.state().snapshots.insert(id, 1 + u64::from(id));
            volume.config.snapshots.list.push(Snapshot {
                id,
                uuid: Uuid::from_u128(1000 + u128::from(number)),
                kinds: vec![MANUAL.into()],
                time: format!("t{id}"),
                created: 0,
                sequence: None,
                protected: false,
                twin: None,
            });
        }
        volume.config.snapshots.next = 2 * count;
        volume.up(Level::Mounted, &mut |_| ()).expect("up");
        volume.define_target(&target("beta")).expect("defined");
        cycle(&mut volume);
        volume.warnings.push("something else".into());
        let before = bench.fake.state().lookups;
        volume.snapshot_to_send("beta").expect("taken");
        costs[0].push(bench.fake.state().lookups - before);
        assert_eq!(volume.warnings, ["something else"]);
        assert_eq!(bench.devices().len(), count as usize + 3);

        // The same volume as a replica, with what it had.
        let made = volume.define_source(&source(true), &mut |_| ());
        made.expect("a replica");
        arrive(&mut volume, &begin(1, None));
        volume.warnings.push("something else".into());
        let before = bench.fake.state().lookups;
        arrive(&mut volume, &begin(2, Some(1)));
        costs[1].push(bench.fake.state().lookups - before);
        assert_eq!(volume.warnings, ["something else"]);
    }
    for cost in &costs {
        assert_eq!(cost[0], cost[1], "{costs:?}");
        assert!(cost[0] < 60, "{costs:?}");
    }
}

fn uuid_of(volume: &Volume, id: u32) -> Uuid {
    volume.config.snapshots.find(id).expect("listed").uuid
}

/// A cycle to beta, of which everything is durable.
fn cycle(volume: &mut Volume) -> u32 {
    volume.snapshot_to_send("beta").expect("taken");
    let id = volume.config.snapshots.list.last().expect("one").id;
    let uuid = uuid_of(volume, id);
    volume.pin("beta", uuid).expect("pinned");
    volume.move_hold("beta", uuid, None).expect("moved");
    id
}

fn to_beta() -> Peer {
    Peer::Target("beta".into())
}

/// The origin was written without the server, which was accepted. The next increment lacked what was written, and both
/// sides called it proven equal.
#[test]
fn nothing_starts_from_a_doubtful_snapshot() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.define_target(&target("beta")).expect("defined");
    let first = cycle(&mut volume);
    volume.snapshot_to_send("beta").expect("taken");
    bench.fake.state().doubtful.insert(first);
    let standing = volume.standing(&to_beta(), &|_| 0).expect("stands");
    let held: Vec<_> = standing.held.iter().map(|h| (h.number, h.data)).collect();
    assert_eq!(held, [(2, true)]);
}

/// With two targets due at once the second one's cycle deleted what the first one's had taken and not yet offered.
#[test]
fn cycles_to_two_targets_leave_each_other_their_snapshots() {
    let bench = Bench::new();
    let mut volume = bench.master();
    for host in ["beta", "gamma"] {
        volume.define_target(&target(host)).expect("defined");
    }
    volume.snapshot_to_send("beta").expect("taken");
    let first = uuid_of(&volume, 0);
    volume.snapshot_to_send("gamma").expect("taken");
    let second = uuid_of(&volume, 2);
    volume.pin("beta", first).expect("still there");
    volume.pin("gamma", second).expect("still there");
    assert_eq!(bench.stored(), [0, 2]);
    // What nobody was offered goes with its target.
    volume.move_hold("beta", first, None).expect("moved");
    volume.snapshot_to_send("beta").expect("taken");
    assert_eq!(bench.stored(), [0, 2, 4]);
    volume
        .forget_target("beta", &mut |_| ())
        .expect("forgotten");
    volume.move_hold("gamma", second, None).expect("moved");
    volume.snapshot_to_send("gamma").expect("taken");
    assert_eq!(bench.stored(), [2, 6]);
}

/// `stop master`, `replicate`, `failover` left out what was written since a cycle that had been cut: that one's snapshot
/// was sent, and all was said to be there.
#[test]
fn what_is_on_its_way_is_told_from_what_is_new() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.define_target(&target("beta")).expect("defined");
    assert!(!volume.snapshot_to_send("beta").expect("taken"));
    let first = uuid_of(&volume, 0);
    volume.pin("beta", first).expect("pinned");
    assert!(volume.snapshot_to_send("beta").expect("on its way"));
    volume.move_hold("beta", first, None).expect("moved");
    assert!(!volume.snapshot_to_send("beta").expect("taken"));
}

/// A replica was reverted with part of a copy in it. The copy went on over that, and was proven equal.
#[test]
fn a_replica_with_part_of_a_copy_is_not_reverted() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    let first = arrive(&mut volume, &begin(1, None));
    volume.check_revert(first).expect("possible");
    let lineage = volume.config.lineage.uuid;
    let part = incoming(&begin(2, Some(1)));
    volume.start_incoming(part, lineage, EPOCH).expect("begun");
    let refused = volume.check_revert(first).expect_err("refused");
    assert!(
        refused.to_string().contains("has a part of a copy"),
        "{refused}"
    );
}

/// What a full store had taken the data of was received again, and the squashed one taken for it: a hold without data.
#[test]
fn what_is_received_again_has_its_data() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    let first = arrive(&mut volume, &begin(1, None));
    let twin = volume.config.snapshots.find(first).expect("listed").twin;
    bench.fake.state().squashed.insert(first);
    let again = arrive(&mut volume, &begin(1, None));
    assert_ne!(again, first);
    assert_eq!(volume.snapshot_uuids(), [Uuid::from_u128(1)]);
    let stored = bench.stored();
    assert!(stored.contains(&again) && stored.contains(&(again + 1)));
    let doomed: Vec<u32> = volume
        .config
        .snapshots
        .deleting
        .iter()
        .map(|d| d.id)
        .collect();
    for id in [Some(first), twin].into_iter().flatten() {
        assert!(!stored.contains(&id) || doomed.contains(&id), "{id} stays");
    }
}

/// A full store took the snapshot that the next increment was to start from: everything was sent again.
#[test]
fn a_hold_given_up_is_a_bookmark_that_the_next_cycle_starts_from() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.define_target(&target("beta")).expect("defined");
    let first = cycle(&mut volume);
    assert!(bench.fake.give_up(first));

    volume.snapshot_to_send("beta").expect("taken");
    let standing = volume.standing(&to_beta(), &|_| 0).expect("stands");
    let held: Vec<_> = standing.held.iter().map(|h| (h.number, h.data)).collect();
    assert_eq!(held, [(first, false), (2, true)]);
    assert_eq!(standing.hold, Some(uuid_of(&volume, first)));
    // Nothing can be shown of it, and that is no failure.
    bench.fake.reboot();
    let mut volume = bench.reload();
    let report = volume.up(Level::Mounted, &mut |_| ()).expect("up");
    assert!(report.is_clean());
    assert_eq!(volume.warnings, Vec::<String>::new());
    assert_eq!(volume.notes, [bookmark_line(first)]);
    assert_eq!(bench.devices(), ["v", "v(2)"]);

    let second = uuid_of(&volume, 2);
    volume.pin("beta", second).expect("pinned");
    volume.move_hold("beta", second, None).expect("moved");
    assert_eq!(bench.stored(), [2], "no target needs it any more");
    let again = bench.reload();
    assert!(again.config.snapshots.find(first).is_none());
}

/// What was on its way was given up, and nothing was ever sent again: there was a snapshot to send, it said.
#[test]
fn what_is_given_up_on_its_way_is_replaced() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.define_target(&target("beta")).expect("defined");
    let hold = cycle(&mut volume);
    volume.snapshot_to_send("beta").expect("taken");
    volume
        .pin("beta", uuid_of(&volume, 2))
        .expect("pinned before it is offered");
    assert!(bench.fake.give_up(2));
    volume.snapshot_to_send("beta").expect("taken");
    // It may have arrived all the same: it is kept until the greeting tells.
    assert_eq!(bench.stored(), [hold, 2, 4]);
    volume
        .pin("beta", uuid_of(&volume, 4))
        .expect("the next one");
    assert_eq!(bench.stored(), [hold, 4]);
}

/// The store and the document disagreed after a crash between the two, until somebody looked.
#[test]
fn the_store_learns_who_is_held_whatever_was_cut_short() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.define_target(&target("beta")).expect("defined");
    let marked =
        |bench: &Bench| -> Vec<u32> { bench.fake.state().to_bookmark.iter().copied().collect() };
    let first = volume
        .snapshot(None, &mut |_| ())
        .expect("taken")
        .expect("one");
    let uuid = uuid_of(&volume, first);
    // The document has it, the store does not.
    bench.fake.state().fail = Some(format!("when full {first} true"));
    volume.pin("beta", uuid).expect_err("nothing is offered");
    assert!(marked(&bench).is_empty());
    bench.fake.state().fail = None;
    volume.pin("beta", uuid).expect("pinned, the second time");
    assert_eq!(marked(&bench), [first]);
    volume.move_hold("beta", uuid, None).expect("moved");

    // The hold has moved, the store does not know.
    let second = volume
        .snapshot(None, &mut |_| ())
        .expect("taken")
        .expect("one");
    volume
        .pin("beta", uuid_of(&volume, second))
        .expect("pinned");
    bench.fake.state().fail = Some(format!("when full {first} false"));
    let moved = volume.move_hold("beta", uuid_of(&volume, second), None);
    moved.expect("the cycle is over");
    assert_eq!(marked(&bench), [first, second]);
    bench.fake.state().fail = None;
    let mut volume = bench.reload();
    volume.up(Level::Mounted, &mut |_| ()).expect("up");
    assert_eq!(marked(&bench), [second]);

    // Its bookmark is nobody's, and the deletion was cut short.
    assert!(bench.fake.give_up(second));
    bench.fake.state().fail = Some(format!("delete {second}"));
    volume
        .forget_target("beta", &mut |_| ())
        .expect("forgotten");
    assert_eq!(bench.stored(), [first, second]);
    bench.fake.state().fail = None;
    let mut volume = bench.reload();
    volume.up(Level::Mounted, &mut |_| ()).expect("up");
    assert_eq!(bench.stored(), [first]);
}

/// Somebody wanted writes to fail rather than a replication to start anew, and a full store took the base.
#[test]
fn a_target_may_have_its_hold_protected() {
    let bench = Bench::new();
    let mut volume = bench.master();
    let mut wanted = target("beta");
    volume.define_target(&wanted).expect("defined");
    let first = cycle(&mut volume);
    wanted.on_full = HoldPolicy::Protect;
    volume.define_target(&wanted).expect("changed");
    assert!(!bench.fake.give_up(first));
    volume
        .protect(first, true, &mut |_| ())
        .expect("by hand too");
    volume
        .protect(first, false, &mut |_| ())
        .expect("not by hand");
    assert!(!bench.fake.give_up(first), "the target needs it still");
    let second = cycle(&mut volume);
    assert_eq!(bench.stored(), [second]);
    wanted.on_full = HoldPolicy::Bookmark;
    volume.define_target(&wanted).expect("changed");
    assert!(bench.fake.give_up(second));
    assert_eq!(bench.stored(), [second]);
}

/// What arrived filled the replica's store, which gave up the very snapshot that increments start from: the next copy was one of
/// everything, and until it was whole there was nothing to be master of.
#[test]
fn a_replicas_hold_is_not_given_up_for_what_arrives() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    let first = arrive(&mut volume, &begin(1, None));
    assert!(!bench.fake.give_up(first));
    let second = arrive(&mut volume, &begin(2, Some(1)));
    assert!(!bench.fake.give_up(first), "the upstream may not know yet");
    volume.release_old_hold().expect("released");
    assert!(!bench.fake.give_up(second));
    volume.forget_source(&mut |_| ()).expect("forgotten");
    assert!(bench.fake.give_up(second), "as any other");
}

/// A master that had taken no snapshot yet passed for empty once `define source` had made it a replica: the next cycle
/// overwrote all that its users had, and nobody had asked for that.
#[test]
fn a_master_without_snapshots_is_not_overwritten_unasked() {
    let bench = Bench::new();
    let mut volume = bench.master();
    assert!(volume.config.snapshots.list.is_empty());
    let made = volume.define_source(&source(false), &mut |_| ());
    made.expect("a replica");
    assert_eq!(bench.stored(), [0], "what its users wrote is kept");
    let standing = volume.standing(&Peer::Source, &|_| 0).expect("stands");
    assert!(!standing.is_blank());
    assert_eq!(
        standing.lineage,
        Some(volume.config.uuid),
        "not to be written over"
    );
    // Without that snapshot it still has what it has.
    volume.config.snapshots.list.clear();
    let standing = volume.standing(&Peer::Source, &|_| 0).expect("stands");
    assert!(standing.held.is_empty() && !standing.is_blank());
}

/// A volume that had been a replica, was written to, and became one again was taken back to the last snapshot.
#[test]
fn what_was_written_between_two_sources_is_kept() {
    let bench = Bench::new();
    let mut volume = bench.replica(false);
    let first = arrive(&mut volume, &begin(1, None));
    volume.forget_source(&mut |_| ()).expect("forgotten");
    let made = volume.define_source(&source(false), &mut |_| ());
    made.expect("a replica again");
    let kept = volume.config.snapshots.list.last().expect("one").clone();
    assert!(kept.id > first);
    let standing = volume.standing(&Peer::Source, &|_| 0).expect("stands");
    assert_eq!(standing.origin, Some(kept.uuid));
    assert_eq!(standing.lineage, Some(Uuid::from_u128(70)));
    // Told again what it knows, it keeps nothing more.
    let before = bench.stored();
    let made = volume.define_source(&source(true), &mut |_| ());
    made.expect("changed");
    assert_eq!(bench.stored(), before);
}

/// The snapshot that said what the origin has was deleted, and nothing could ever be received again.
#[test]
fn what_the_origin_is_known_by_is_kept() {
    let bench = Bench::new();
    let mut volume = bench.master();
    volume.snapshot(None, &mut |_| ()).expect("taken");
    volume
        .define_source(&source(false), &mut |_| ())
        .expect("a replica");
    let kept = volume.config.snapshots.list.last().expect("one").id;
    let refused = volume
        .forget_snapshot(kept, &mut |_| ())
        .expect_err("needed");
    assert!(
        refused.to_string().contains("replication from alpha"),
        "{refused}"
    );
    arrive(&mut volume, &begin(1, None));
    volume
        .forget_snapshot(kept, &mut |_| ())
        .expect("not any more");
}

/// The replica went on showing the old snapshot at the old place, for ever.
#[test]
fn a_replica_is_mounted_anew_by_remount() {
    let bench = Bench::new();
    let mut volume = bench.replica(true);
    arrive(&mut volume, &begin(1, None));
    let dir = bench.root.path().join("srv");
    volume
        .remount(Some(dir), None, &mut |_| ())
        .expect("remounted");
    assert_eq!(bench.mounted(), ["srv"]);
    arrive(&mut volume, &begin(2, Some(1)));
    assert_eq!(bench.mounted(), ["srv"]);
    let twin = format!(
        "v({})",
        volume.config.snapshots.list.last().expect("one").id + 1
    );
    let state = bench.fake.state();
    assert_eq!(state.mounts[0].dev, state.dm[&twin].0);
}

/// A bookmark that somebody else made was listed as a snapshot, or its number was given twice.
#[test]
fn bookmarks_of_others_are_left_alone() {
    let bench = Bench::new();
    let mut volume = bench.master();
    for id in [0, 7] {
        bench.fake.state().snapshots.insert(id, 1 + u64::from(id));
        bench.fake.state().bookmarks.insert(id);
    }
    volume
        .define_master(MasterFlags::default(), &mut |_| ())
        .expect("again");
    assert!(volume.config.snapshots.list.is_empty());
    volume.define_target(&target("beta")).expect("defined");
    assert_eq!(cycle(&mut volume), 2);
    assert_eq!(bench.stored(), [0, 2, 7]);
}
