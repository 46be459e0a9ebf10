// SPDX-License-Identifier: GPL-2.0-only
use super::file::parse;
use super::*;
use crate::image::booted::{DEFAULT_DISKS, MEMORY_MIB};

const GOOD: &str = "\
name: a
description: shows something
steps:
  - run: echo one
    save: ONE
  - run: |
      cat <<X
      - not a step
      X
    background: load
  - wait: load
    stdout: {contains: [not, step], same_as: ONE}
  - reboot: true
";

fn parsed(text: &str) -> Result<Scenario, String> {
    parse(Path::new("dir/a.yaml"), text).map_err(|e| e.to_string())
}

fn refused(text: &str) -> String {
    parsed(text).unwrap_err()
}

fn lines(scenario: &Scenario) -> Vec<usize> {
    scenario.steps.iter().map(|step| step.line).collect()
}

#[test]
fn a_good_scenario_is_read_with_its_defaults_and_lines() {
    let scenario = parsed(GOOD).unwrap();
    assert_eq!(scenario.machines, [""]);
    assert_eq!(scenario.timeout, Duration::from_secs(600));
    assert_eq!(scenario.disks, DEFAULT_DISKS);
    assert_eq!(lines(&scenario), [4, 6, 11, 13]);
    assert_eq!(scenario.image, ImageName::Ddsnap);
    assert_eq!(scenario.memory_mib, MEMORY_MIB);
    let small = parsed(&GOOD.replace("steps:", "memory: 256M\nsteps:")).unwrap();
    assert_eq!(small.memory_mib, 256);
    assert!(parsed(&GOOD.replace("steps:", "disks: [17T, 2G]\nsteps:")).is_ok());
    assert!(parsed(&GOOD.replace("steps:", "disks: [T]\nsteps:")).is_err());
    assert!(parsed(&GOOD.replace("steps:", "disks: [9999T]\nsteps:")).is_err());
}

#[test]
fn a_power_cut_within_a_repetition_is_found() {
    assert!(!parsed(GOOD).unwrap().cuts_power(0));
    let repeat = "  - repeat:
      times: 3
      steps:
        - run: x
          background: y
        - power_cut: {within: 5, resume: true}
";
    let scenario = parsed(&format!("{GOOD}{repeat}")).unwrap();
    assert!(scenario.cuts_power(0) && scenario.uses_seed());
    let Action::Repeat(repeat) = &scenario.steps[4].action else {
        panic!("{:?}", scenario.steps[4]);
    };
    assert_eq!(
        repeat.steps.iter().map(|s| s.within).collect::<Vec<_>>(),
        [0, 5]
    );
    assert_eq!(lines(&scenario), [4, 6, 11, 13, 14]);
}

#[test]
fn programs_to_make_are_found_beside_the_scenario() {
    let pushes = "  - push: {from: ../x/prog, to: /prog, make: true}
  - push: {from: data, to: /data}
";
    let scenario = parsed(&format!("{GOOD}{pushes}")).unwrap();
    let made: Vec<_> = scenario.made().collect();
    assert_eq!(made, [Path::new("dir/../x/prog")]);
}

#[test]
fn an_unknown_field_is_named_with_file_and_line() {
    let error = refused(&GOOD.replace("save: ONE", "sace: ONE"));
    assert!(error.starts_with("dir/a.yaml:5: "), "{error}");
    assert!(
        error.contains("steps[0]") && error.contains("`sace`"),
        "{error}"
    );
    let error = refused(&GOOD.replace("contains:", "contain:"));
    assert!(error.starts_with("dir/a.yaml:12: "), "{error}");
    assert!(
        error.contains("stdout") && error.contains("`contain`"),
        "{error}"
    );
}

#[test]
fn a_wrong_type_is_named_with_its_field() {
    let error = refused(&GOOD.replace("description: shows something", "description: [x]"));
    assert!(error.starts_with("dir/a.yaml:2: description"), "{error}");
    let error = refused(&GOOD.replace("save: ONE", "exit: never"));
    assert!(
        error.contains("nonzero") && error.starts_with("dir/a.yaml:"),
        "{error}"
    );
    let error = refused(&GOOD.replace("save: ONE", "exit: 256"));
    assert!(error.contains("exit is a number from 0 to 255"), "{error}");
}

#[test]
fn a_missing_field_is_named() {
    assert!(refused("name: a\ndescription: b\n").contains("missing field `steps`"));
}

#[test]
fn what_makes_no_sense_is_named_by_line_and_field() {
    for (from, to, expected) in [
        (
            "- reboot: true",
            "- reboot: true\n    power_cut: true",
            "dir/a.yaml:13: steps[3].reboot: ",
        ),
        (
            "- reboot: true",
            "- timeout: 3",
            "dir/a.yaml:13: steps[3].run: a step needs one of",
        ),
        (
            "wait: load",
            "wait: other",
            "dir/a.yaml:11: steps[2].wait: no background",
        ),
        (
            "same_as: ONE",
            "same_as: TWO",
            "dir/a.yaml:11: steps[2].same_as: no earlier step",
        ),
        (
            "same_as: ONE",
            "matches: '('",
            "dir/a.yaml:11: steps[2].matches: ",
        ),
        ("save: ONE", "save: one", "dir/a.yaml:4: steps[0].save: "),
        (
            "background: load",
            "background: load\n    exit: 1",
            "steps[1].exit: has no meaning beside background",
        ),
        (
            "- reboot: true",
            "- reboot: true\n    exit: 1",
            "steps[3].exit: has no meaning beside reboot",
        ),
        ("name: a", "name: b", "dir/a.yaml:1: name: "),
        ("steps:", "machines: 4\nsteps:", "dir/a.yaml:3: machines: 4"),
        (
            "steps:",
            "machines: [a, a]\nsteps:",
            "dir/a.yaml:3: machines: \"a\" is there twice",
        ),
        (
            "steps:",
            "machines: [a, B]\nsteps:",
            "dir/a.yaml:3: machines: \"B\" is no host name",
        ),
        (
            "steps:",
            "machines: [a]\nsteps:",
            "dir/a.yaml:3: machines: 1 names",
        ),
        (
            "steps:",
            "machines: 2\nsteps:",
            "dir/a.yaml:5: steps[0].run: say on: which machine, of a, b",
        ),
        (
            "- reboot: true",
            "- reboot: true\n    on: a",
            "steps[3].on: there is one machine",
        ),
        (
            "- reboot: true",
            "- link: down",
            "steps[3].link: one machine alone has no network",
        ),
        (
            "- reboot: true",
            "- kill: {resume: true}",
            "steps[3].kill: the machine stays off",
        ),
        (
            "- reboot: true",
            "- repeat: {times: 2, steps: [{run: x}, {wait: y}]}",
            "dir/a.yaml:13: steps[3].repeat.steps[1].wait: no background",
        ),
        (
            "- reboot: true",
            "- repeat: {times: 2, steps: [{run: x, background: y}]}",
            "steps[3].repeat: nothing in it waits for the background command \"y\"",
        ),
        (
            "- reboot: true",
            "- power_cut: {within: 2, seeds: 3}",
            "power_cut is true or {within, resume, seed, whole_blocks}",
        ),
        (
            "- reboot: true",
            "- power_cut: {whole_blocks: [vda, vdt]}",
            "steps[3].power_cut: whole_blocks names a disk that the guest does not have",
        ),
        (
            "- reboot: true",
            "- power_cut: {whole_blocks: [sdb]}",
            "power_cut is true or {within, resume, seed, whole_blocks}",
        ),
        (
            "- reboot: true",
            "- power_cut: false",
            "steps[3].power_cut: false says nothing",
        ),
        (
            "steps:",
            "disks: [2X]\nsteps:",
            "dir/a.yaml:3: disks: \"2X\"",
        ),
        (
            "steps:",
            "memory: 64M\nsteps:",
            "dir/a.yaml:3: memory: \"64M\"",
        ),
        (
            "steps:",
            "image: stock\nkernel: debug\nsteps:",
            "dir/a.yaml:4: kernel: ",
        ),
        (
            "- wait: load\n    stdout: {contains: [not, step], same_as: ONE}\n  - reboot: true",
            "- run: x",
            "steps: nothing waits for",
        ),
    ] {
        let error = refused(&GOOD.replace(from, to));
        assert!(error.contains(expected), "{expected}\n{error}");
    }
}

const TWO: &str = "\
name: a
description: shows something
machines: [source, target]
steps:
  - {run: x, on: source, background: load}
  - {run: y, on: target}
  - {link: down, on: source}
  - {kill: true, on: target}
  - wait: load
  - {boot: true, on: target}
  - {power_cut: {within: 3}, on: target}
";

#[test]
fn steps_know_their_machines() {
    let scenario = parsed(TWO).unwrap();
    assert_eq!(scenario.machines, ["source", "target"]);
    let on: Vec<usize> = scenario.steps.iter().map(|step| step.on).collect();
    assert_eq!(on, [0, 1, 0, 1, 0, 1, 1]);
    assert!(!scenario.cuts_power(0) && scenario.cuts_power(1));
    let counted = parsed(
        &TWO.replace("[source, target]", "3")
            .replace("source", "a")
            .replace("target", "c"),
    );
    assert_eq!(counted.unwrap().machines, ["a", "b", "c"]);
}

#[test]
fn a_random_moment_is_for_what_happens_at_one() {
    let scenario = parsed(&TWO.replace("link: down", "within: 7, link: down")).unwrap();
    assert_eq!(scenario.steps[2].within, 7);
    assert!(scenario.uses_seed() && scenario.steps[3].within == 0);
    let alone = parsed(&GOOD.replace("reboot: true", "reboot: true\n    within: 2")).unwrap();
    assert!(alone.uses_seed() && !parsed(GOOD).unwrap().uses_seed());
    let error = refused(&TWO.replace("within: 3", "within: 3601"));
    assert!(error.contains("steps[6].within: 3601"), "{error}");
    let error = refused(&TWO.replace("- wait: load", "- {wait: load, within: 7}"));
    assert!(
        error.contains("steps[4].within: has no meaning beside wait"),
        "{error}"
    );
    let error = refused(&TWO.replace("kill: true", "within: 2, kill: true"));
    assert!(
        error.contains("steps[3].within: has no meaning beside kill"),
        "{error}"
    );
}

#[test]
fn what_a_machine_cannot_do_now_is_refused() {
    for (from, to, expected) in [
        (
            "  - {boot: true, on: target}\n",
            "",
            "steps[5].power_cut: the machine target is off",
        ),
        (
            "boot: true, on: target",
            "boot: true, on: source",
            "steps[5].boot: the machine source is on",
        ),
        (
            "kill: true, on: target",
            "kill: true, on: source",
            "steps[4].wait: no background",
        ),
        (
            "run: y, on: target",
            "run: y, on: other",
            "steps[1].on: no machine \"other\"; there are source, target",
        ),
        (
            "- wait: load",
            "- {wait: load, on: source}",
            "steps[4].on: has no meaning beside wait",
        ),
        (
            "- {boot: true, on: target}",
            "- repeat: {times: 2, steps: [{boot: true, on: target}]}",
            "steps[5].repeat: a round must leave each machine",
        ),
    ] {
        let error = refused(&TWO.replace(from, to));
        assert!(error.contains(expected), "{expected}\n{error}");
    }
}

/// What must not be was looked for, and the scenario went on when it was there.
#[test]
fn a_negation_that_cannot_fail_is_refused() {
    let with = |script: &str| {
        let lines = script.replace('\n', "\n      ");
        parsed(&format!("{GOOD}  - run: |\n      {lines}\n"))
    };
    for good in [
        "true\n! false",
        "echo one; ! false",
        "fails false\ntrue",
        "if ! false; then true; fi",
        "test ! -e /x\ntrue",
        "while ! false; do true; done\ntrue",
    ] {
        with(good).unwrap();
    }
    for bad in [
        "! false\ntrue",
        "true\n  ! false\ntrue",
        "true; ! false; true",
        "! false | cat\ntrue",
    ] {
        let text = with(bad).unwrap_err();
        assert!(text.contains("write `fails COMMAND`"), "{text}");
    }
}
