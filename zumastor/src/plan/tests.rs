// SPDX-License-Identifier: GPL-2.0-only
//! Plans, and what becomes of failures.

use super::*;
use anyhow::anyhow;

fn up(level: Level, snapshots: &[u32]) -> Wanted {
    Wanted::at(level, snapshots, true)
}

fn observed(level: Level, snapshots: &[u32]) -> Observed {
    let wanted = up(level, snapshots);
    Observed {
        agent: wanted.processes,
        server: wanted.processes,
        devices: wanted.devices.iter().map(|&t| (t, Table::Right)).collect(),
        mounts: wanted.mounts,
        links: wanted.links,
    }
}

#[test]
fn after_a_reboot_everything_comes_in_order() {
    let steps = plan(&up(Level::Mounted, &[0, 2]), &Observed::default());
    use Action::*;
    let expected = vec![
        StartAgent,
        StartServer,
        CreateDevice(None),
        CreateDevice(Some(0)),
        CreateDevice(Some(2)),
        Mount(None),
        Mount(Some(0)),
        Mount(Some(2)),
        WriteLinks,
    ];
    assert_eq!(steps, expected);
}

#[test]
fn going_down_mirrors_coming_up() {
    let steps = plan(
        &up(Level::Down, &[0, 2]),
        &observed(Level::Mounted, &[0, 2]),
    );
    use Action::*;
    let expected = vec![
        RemoveLinks,
        Unmount(Some(2)),
        Unmount(Some(0)),
        Unmount(None),
        RemoveDevice(Some(2)),
        RemoveDevice(Some(0)),
        RemoveDevice(None),
        StopServer,
        StopAgent,
    ];
    assert_eq!(steps, expected);
}

#[test]
fn steps_of_different_snapshots_go_together() {
    let steps = plan(&up(Level::Mounted, &[0, 2, 4]), &Observed::default());
    let lengths: Vec<usize> = parts(&steps).map(<[Action]>::len).collect();
    // Agent, server, origin; three devices; the origin's mount; three mounts; links.
    assert_eq!(lengths, [1, 1, 1, 3, 1, 3, 1]);
    let all: Vec<Action> = parts(&steps).flatten().copied().collect();
    assert_eq!(all, steps);
}

#[test]
fn what_is_there_is_adopted() {
    let wanted = up(Level::Devices, &[0, 2]);
    assert_eq!(plan(&wanted, &observed(Level::Devices, &[0, 2])), vec![]);
}

#[test]
fn a_lost_server_leaves_devices_and_mounts_alone() {
    let mut found = observed(Level::Devices, &[0]);
    found.server = false;
    assert_eq!(
        plan(&up(Level::Devices, &[0]), &found),
        vec![Action::StartServer]
    );
}

#[test]
fn a_wrong_table_is_replaced() {
    let mut found = observed(Level::Mounted, &[0]);
    found.devices.insert(Some(0), Table::Wrong);
    use Action::*;
    let expected = vec![
        Unmount(Some(0)),
        RemoveDevice(Some(0)),
        CreateDevice(Some(0)),
        Mount(Some(0)),
        WriteLinks,
    ];
    assert_eq!(plan(&up(Level::Mounted, &[0]), &found), expected);
}

#[test]
fn stop_master_keeps_devices_and_processes() {
    let steps = plan(&up(Level::Devices, &[0]), &observed(Level::Mounted, &[0]));
    use Action::*;
    assert_eq!(steps, vec![RemoveLinks, Unmount(Some(0)), Unmount(None)]);
}

#[test]
fn each_failing_step_is_taken_back_and_the_first_cause_kept() {
    let steps = [
        Action::Format,
        Action::SaveConfig,
        Action::StartAgent,
        Action::StartServer,
    ];
    for failing in 0..steps.len() {
        let mut state: Vec<Action> = Vec::new();
        let result = run_or_undo("v", &steps, |action| {
            if action == steps[failing] {
                return Err(anyhow!("first cause"));
            }
            state.retain(|a| a.inverse() != Some(action));
            state.extend(action.inverse().map(|_| action));
            Ok(())
        });
        let error = result.expect_err("the step fails");
        assert_eq!(error.to_string(), "first cause");
        assert!(state.is_empty(), "left behind: {state:?}");
    }
}

#[test]
fn the_cause_survives_a_failing_undo() {
    let steps = [Action::StartAgent, Action::StartServer];
    let result = run_or_undo("v", &steps, |action| match action {
        Action::StartServer => Err(anyhow!("no store")),
        Action::StopAgent => Err(anyhow!("does not die")),
        _ => Ok(()),
    });
    let text = result.expect_err("the step fails").to_string();
    let expected = "no store; then taking back the work failed (stop the agent: does not die)";
    assert_eq!(text, expected);
}
