// SPDX-License-Identifier: GPL-2.0-only
//! Requests against the fake machine: who waits for whom, and for how many there is room.

use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use ddsnap::probe::contents::{Contents, Known, Usage};

use super::*;
use crate::host::fake::Fake;
use crate::jobs::JobState;
use crate::layout::Layout;
use crate::machine::Dev;
use crate::volume::MasterFlags;

const LIMIT: Duration = Duration::from_secs(30);

pub(in crate::daemon) struct Bench {
    _root: tempfile::TempDir,
    pub(in crate::daemon) layout: Layout,
    pub(in crate::daemon) fake: Arc<Fake>,
    pub(in crate::daemon) daemon: Arc<Daemon>,
}

impl Bench {
    /// A machine with devices for volumes v and w.
    fn new() -> Bench {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        std::fs::create_dir_all(layout.volumes()).expect("made");
        let fake = Arc::new(Fake::default());
        for (minor, path) in ["/dev/v", "/dev/v_snap", "/dev/w", "/dev/w_snap"]
            .iter()
            .enumerate()
        {
            let minor = u32::try_from(minor).expect("small");
            let dev = Dev { major: 8, minor };
            fake.state().devices.insert(path.into(), dev);
        }
        fake.state().contents = Some(Contents::Known(Known {
            usage: Usage::Filesystem,
            kind: "ext4".into(),
            label: None,
            elsewhere: None,
        }));
        let daemon = Daemon::new(fake.clone(), layout.clone()).expect("new");
        Bench {
            _root: root,
            layout,
            fake,
            daemon,
        }
    }

    fn define(volume: &str) -> Request {
        Request::DefineVolume(DefineVolume {
            volume: volume.into(),
            origin: format!("/dev/{volume}").into(),
            snapstore: format!("/dev/{volume}_snap").into(),
            zero: true,
            initialize: true,
            ..DefineVolume::default()
        })
    }

    fn snapshot(volume: &str, nowait: bool) -> Request {
        Request::Snapshot {
            volume: volume.into(),
            kind: None,
            nowait,
        }
    }

    pub(in crate::daemon) fn run(&self, request: &Request) -> Result<Vec<Event>> {
        let mut events = Vec::new();
        self.daemon.execute(request, &mut |event| {
            events.push(event);
            true
        })?;
        Ok(events)
    }

    /// With a volume v that is a master.
    pub(in crate::daemon) fn with_master() -> Bench {
        let bench = Bench::new();
        bench.run(&Bench::define("v")).expect("defined");
        let flags = MasterFlags::default();
        let volume = "v".into();
        let master = Request::DefineMaster { volume, flags };
        bench.run(&master).expect("a master");
        bench
    }

    /// Starts a request in a thread; the receiver hears what came of it.
    fn begin(&self, request: Request) -> Receiver<Result<()>> {
        let (sender, receiver) = channel();
        let daemon = self.daemon.clone();
        thread::spawn(move || sender.send(daemon.execute(&request, &mut |_| true)));
        receiver
    }

    fn view(&self, volume: &str) -> Option<View> {
        let mut views = self.daemon.views().into_iter();
        views.find(|view| view.name == volume)
    }
}

/// Waits until `done` says yes.
pub(in crate::daemon) fn until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + LIMIT;
    while !done() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_definition_says_what_was_made() {
    let bench = Bench::new();
    let events = bench.run(&Bench::define("v")).expect("defined");
    let expected = "volume 'v' is defined: /dev/mapper/v of 100.0 MiB with its data on /dev/v, snapshots on \
                    /dev/v_snap";
    let told = Event::Note(Note::Line(expected.into()));
    assert_eq!(events.last(), Some(&told), "{events:?}");
    let again = bench.run(&Bench::define("v")).expect_err("there");
    assert_eq!(again.to_string(), "volume 'v' is defined already");
}

/// Zeroing a large origin took hours, in which nobody could see how far it was, or end it.
#[test]
fn a_definition_under_way_is_seen_and_can_be_cancelled() {
    let bench = Bench::new();
    let (reached, go) = bench.fake.stall("zero /dev/v");
    let result = bench.begin(Bench::define("v"));
    reached.recv_timeout(LIMIT).expect("it zeroes");
    let view = bench.view("v").expect("known");
    assert_eq!(view.jobs.len(), 1, "{view:?}");
    assert_eq!(
        (view.jobs[0].name.as_str(), view.jobs[0].state),
        ("define", JobState::Running)
    );
    bench
        .run(&Bench::define("w"))
        .expect("another volume does not wait");
    let cancel = |job: &str| Request::Cancel {
        volume: "v".into(),
        job: job.into(),
    };
    let text = bench.run(&cancel("revert")).expect_err("none").to_string();
    assert_eq!(text, "no job 'revert' runs on volume 'v'");
    bench.run(&cancel("define")).expect("asked");
    drop(go);
    let error = result
        .recv_timeout(LIMIT)
        .expect("an end")
        .expect_err("cancelled");
    assert_eq!(error.to_string(), "cancelled");
    let [job] = &bench.daemon.jobs.views("v")[..] else {
        panic!("one job");
    };
    assert_eq!(job.state, JobState::Cancelled);
    assert!(bench.view("v").is_none(), "nothing is left");
    assert!(!bench.layout.volume("v").exists());
    bench.run(&Bench::define("v")).expect("defined at last");
}

#[test]
fn a_volume_serves_one_change_at_a_time_and_status_never_waits() {
    let bench = Bench::with_master();
    bench.run(&Bench::define("w")).expect("defined");
    let (reached, go) = bench.fake.stall("create 0");
    let first = bench.begin(Bench::snapshot("v", false));
    reached.recv_timeout(LIMIT).expect("it is being taken");
    let second = bench.begin(Bench::snapshot("v", false));
    assert_eq!(bench.view("v").expect("known").status(), "running");
    let stop = Request::Stop {
        role: Role::Volume,
        volume: "w".into(),
    };
    bench.run(&stop).expect("another volume does not wait");
    let early = second.recv_timeout(Duration::from_millis(50));
    assert!(early.is_err(), "the second did not wait for the first");
    drop(go);
    for result in [first, second] {
        result.recv_timeout(LIMIT).expect("an end").expect("taken");
    }
    let ids: Vec<u32> = bench.fake.state().snapshots.keys().copied().collect();
    assert_eq!(ids, [0, 2]);
}

#[test]
fn who_waits_for_a_volume_that_is_forgotten_is_told() {
    let bench = Bench::with_master();
    let (reached, go) = bench.fake.stall("unmount v");
    let forget = Request::Forget {
        volume: "v".into(),
        dry_run: false,
    };
    let forgotten = bench.begin(forget);
    reached.recv_timeout(LIMIT).expect("it goes");
    let late = bench.begin(Bench::snapshot("v", false));
    // Let it find the volume, which it then waits for.
    let early = late.recv_timeout(Duration::from_millis(50));
    assert!(early.is_err(), "{early:?}");
    drop(go);
    forgotten
        .recv_timeout(LIMIT)
        .expect("an end")
        .expect("forgotten");
    let error = late.recv_timeout(LIMIT).expect("an end").expect_err("gone");
    assert_eq!(error.to_string(), "'v' is not a managed volume");
    assert!(!bench.layout.volume("v").exists(), "no document came back");
}

/// Sends a request over a connection of its own.
fn connect(bench: &Bench, count: &Arc<AtomicUsize>, request: &Request) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().expect("a pair");
    control::send(&ours, request).expect("sent");
    let permit = Permit::take(count).expect("room");
    let daemon = bench.daemon.clone();
    thread::spawn(move || daemon.answer(&theirs, permit));
    ours
}

/// `snapshot --nowait`, and a client that went away, gave back their place at once: a loop of them filled the
/// machine with threads.
#[test]
fn a_request_keeps_its_place_until_the_operation_has_ended() {
    let bench = Bench::with_master();
    let count = Arc::new(AtomicUsize::new(0));
    let taken = || count.load(Ordering::SeqCst);
    let (reached, go) = bench.fake.stall("create 0");
    let mut nowait = BufReader::new(connect(&bench, &count, &Bench::snapshot("v", true)));
    let answer: Option<Event> = control::receive(&mut nowait).expect("an answer");
    assert_eq!(
        answer,
        Some(Event::Done {
            error: None,
            code: 0
        })
    );
    drop(nowait);
    reached.recv_timeout(LIMIT).expect("it is being taken");
    let (second, third) = (Bench::snapshot("v", false), Bench::snapshot("v", true));
    drop(connect(&bench, &count, &second));
    drop(connect(&bench, &count, &third));
    assert_eq!(taken(), 3, "each of them holds a place");
    drop(go);
    until("places are given back", || taken() == 0);
    assert!(!bench.fake.state().snapshots.is_empty());
}

struct Dummy(Receiver<()>);

impl Job for Dummy {
    fn name(&self) -> String {
        "replicate beta".into()
    }

    fn run(&mut self, running: &Arc<Running>) -> Result<String> {
        running.note(Note::Line("at it".into()));
        let _ = self.0.recv_timeout(LIMIT);
        Ok("the first is there".into())
    }
}

fn with_target() -> Bench {
    let bench = Bench::with_master();
    let target = Request::DefineTarget(crate::volume::DefineTarget {
        volume: "v".into(),
        host: "beta".into(),
        name: None,
        period: None,
        window: None,
        ratelimit: None,
        uncompressed: false,
        test_fullvolume: false,
        on_full: Default::default(),
    });
    let told = bench.run(&target).expect("defined");
    let line = Note::Line("volume 'v' has the target beta".into());
    assert_eq!(told, [Event::Note(line)]);
    bench
}

fn replicate(target: Option<&str>) -> Request {
    Request::Replicate {
        volume: "v".into(),
        target: target.map(str::to_owned),
        snapshot: None,
        nowait: true,
        full: false,
        force_base: false,
        dry_run: false,
    }
}

/// The first command after `define target --period` was refused: the first cycle by itself ran already.
#[test]
fn a_cycle_that_is_asked_for_follows_the_one_under_way() {
    let bench = with_target();
    let commands = bench.layout.at("/etc/zumastor");
    std::fs::create_dir_all(&commands).expect("made");
    std::fs::write(commands.join("ssh_command"), "/bin/false").expect("written");
    let (go, gone) = channel();
    let first = bench.daemon.jobs.start("v", Box::new(Dummy(gone)));
    let first = first.expect("it runs");
    let (says, heard) = channel();
    let daemon = bench.daemon.clone();
    // Without a name: there is one target only.
    let second = thread::spawn(move || {
        daemon.execute(&replicate(None), &mut |event| says.send(event).is_ok())
    });
    let waiting = Note::Line("waiting for the cycle that is under way".into());
    assert_eq!(heard.recv_timeout(LIMIT), Ok(Event::Note(waiting)));
    let state = || {
        let views = bench.daemon.jobs.views("v");
        let cycle = views.iter().find(|view| view.name == "replicate beta");
        cycle.map(|view| (view.state, view.result.clone()))
    };
    assert_eq!(state(), Some((JobState::Running, None)));
    go.send(()).expect("it waits");
    let done = Jobs::wait(&first, &mut |_| true).expect("done");
    assert_eq!(done, "the first is there");
    let failed = second.join().expect("no panic").expect_err("no ssh");
    assert!(!format!("{failed:#}").contains("already"), "{failed:#}");
    assert!(
        matches!(state(), Some((JobState::Failed, _))),
        "{:?}",
        state()
    );
}

/// Two replicas listened on one port, and scripts could not tell why `define source` refused.
#[test]
fn a_source_has_a_port_of_its_own_and_its_mistakes_have_codes() {
    let bench = Bench::new();
    for name in ["v", "w"] {
        bench.run(&Bench::define(name)).expect("defined");
    }
    let define = |volume: &str, host: &str, port| {
        let request = Request::DefineSource {
            source: DefineSource {
                volume: volume.into(),
                host: host.into(),
                port,
                ..DefineSource::default()
            },
            dry_run: false,
        };
        let code = |error: anyhow::Error| (refusal::code(&error), error.to_string());
        bench.run(&request).map(|_| ()).map_err(code)
    };
    let port = |volume: &str| {
        let config = config::load(&bench.layout, volume).expect("read");
        config.expect("there").source.and_then(|source| source.port)
    };
    let (code, text) = define("x", "alpha", None).expect_err("no such volume");
    assert_eq!(
        (code, text.as_str()),
        (refusal::UNMANAGED, "'x' is not a managed volume")
    );
    let (code, text) = define("v", "-oProxy", None).expect_err("an option");
    assert_eq!(code, refusal::BAD_HOST, "{text}");
    define("v", "alpha", None).expect("defined");
    assert_eq!(port("v"), Some(4321));
    define("w", "alpha", None).expect("defined");
    assert_eq!(port("w"), Some(4322));
    let (code, text) = define("w", "alpha", Some(4321)).expect_err("taken");
    assert_eq!(
        (code, text.as_str()),
        (1, "volume 'v' has port 4321 already: choose another")
    );
    // The document of a third one cannot be read.
    std::fs::create_dir_all(bench.layout.volume("broken")).expect("made");
    std::fs::write(bench.layout.config("broken"), "version: [").expect("written");
    define("w", "alpha", Some(5000)).expect("defined");
    define("w", "beta", None).expect("defined");
    assert_eq!(port("w"), Some(5000), "it stays");
}

/// A request that nobody waits for was taken over, and there was nothing that it could be about.
#[test]
fn what_is_known_to_be_wrong_is_said_before_nobody_waits() {
    let bench = with_target();
    let wrong = |request: &Request| {
        let error = bench.daemon.check_known(request).expect_err("wrong");
        error.to_string()
    };
    assert_eq!(
        wrong(&replicate(Some("gamma"))),
        "volume 'v' has no target gamma"
    );
    let hourly = Request::Snapshot {
        volume: "v".into(),
        kind: Some("hourly".into()),
        nowait: true,
    };
    assert!(wrong(&hourly).contains("no schedule for 'hourly'"));
    bench.daemon.check_known(&replicate(None)).expect("known");
}

#[test]
fn permits_are_bounded() {
    let count = Arc::default();
    let mut all: Vec<_> = (0..REQUESTS_MAX)
        .map(|_| Permit::take(&count).expect("room"))
        .collect();
    assert!(Permit::take(&count).is_none());
    assert!(Permit::take(&count).is_none(), "a refusal takes no place");
    all.pop();
    assert!(Permit::take(&count).is_some());
}

/// A job that waits until it is to end.
struct Endless(Sender<()>);

impl Job for Endless {
    fn name(&self) -> String {
        "replicate beta".into()
    }

    fn run(&mut self, running: &Arc<Running>) -> Result<String> {
        let _ = self.0.send(());
        running.pause(LIMIT)?;
        bail!("it was not ended");
    }
}

#[test]
fn stopping_a_volume_interrupts_its_jobs_and_forgetting_cancels_them() {
    let bench = Bench::with_master();
    let (begun, begins) = channel();
    let run = |request: Request| {
        let job = Box::new(Endless(begun.clone()));
        let running = bench.daemon.jobs.start("v", job).expect("started");
        begins.recv_timeout(LIMIT).expect("begun");
        bench.run(&request).expect("done");
        running.view().state
    };
    let volume = || "v".to_string();
    let stop = Request::Stop {
        role: Role::Volume,
        volume: volume(),
    };
    assert_eq!(run(stop), JobState::Interrupted);
    assert_eq!(
        run(Request::Forget {
            volume: volume(),
            dry_run: false
        }),
        JobState::Cancelled
    );
    assert!(bench.daemon.jobs.views("v").is_empty());
}

fn stop_master() -> Request {
    Request::Stop {
        role: Role::Master,
        volume: "v".into(),
    }
}

fn revert(dry_run: bool) -> Request {
    Request::Revert {
        volume: "v".into(),
        snapshot: 0,
        dry_run,
    }
}

#[test]
fn a_revert_is_a_job_and_needs_an_unmounted_origin() {
    let bench = Bench::with_master();
    bench.run(&Bench::snapshot("v", false)).expect("taken");
    let error = bench.run(&revert(false)).expect_err("mounted").to_string();
    assert!(error.contains("`zumastor stop master v`"), "{error}");
    bench.run(&stop_master()).expect("unmounted");
    bench.fake.state().log.clear();
    bench.run(&revert(true)).expect("possible");
    assert!(bench.fake.state().log.is_empty(), "only said");
    let (reached, go) = bench.fake.stall("revert 0");
    let reverted = bench.begin(revert(false));
    reached.recv_timeout(LIMIT).expect("it reverts");
    // The volume is free meanwhile, and says what goes on.
    let refused = bench
        .run(&Bench::snapshot("v", false))
        .expect_err("refused");
    assert!(
        refused
            .to_string()
            .contains("is being reverted to snapshot 0"),
        "{refused}"
    );
    let cancel = Request::Cancel {
        volume: "v".into(),
        job: "revert".into(),
    };
    let refused = bench.run(&cancel).expect_err("refused").to_string();
    assert!(refused.contains("cannot be cancelled"), "{refused}");
    assert_eq!(
        bench
            .view("v")
            .expect("known")
            .jobs
            .last()
            .map(|j| j.name.clone()),
        Some("revert".into())
    );
    drop(go);
    reverted
        .recv_timeout(LIMIT)
        .expect("an end")
        .expect("reverted");
    let devices: Vec<String> = bench.fake.state().dm.keys().cloned().collect();
    assert_eq!(devices, ["v", "v(0)"], "the devices are back");
    let start = Request::Start {
        role: Role::Master,
        volume: "v".into(),
        accept_origin: false,
    };
    bench.run(&start).expect("mounted again");
}

/// A server that died in the middle left the volume without devices, until somebody started it by hand; one
/// that died before it had begun made the revert fail.
#[test]
fn a_revert_outlives_its_server() {
    outlives_its_server(true);
    outlives_its_server(false);
}

fn outlives_its_server(begun: bool) {
    let bench = Bench::with_master();
    bench.run(&Bench::snapshot("v", false)).expect("taken");
    bench.run(&stop_master()).expect("unmounted");
    bench.fake.state().lose_revert = Some(begun);
    let events = bench.run(&revert(false)).expect("reverted all the same");
    let told = matches!(events.last(), Some(Event::Note(Note::Line(line))) if line.contains("has the content"));
    assert!(told, "{events:?}");
    let log = bench.fake.state().log.clone();
    assert_eq!(
        log.iter().filter(|l| *l == "revert 0").count(),
        2,
        "{log:?}"
    );
    assert_eq!(bench.fake.state().dm.len(), 2, "the devices are back");
}

#[test]
fn a_revert_that_a_server_goes_on_with_is_taken_up() {
    let bench = Bench::with_master();
    bench.run(&Bench::snapshot("v", false)).expect("taken");
    bench.run(&stop_master()).expect("unmounted");
    let (reached, go) = bench.fake.stall("revert 0");
    let reverted = bench.begin(revert(false));
    reached.recv_timeout(LIMIT).expect("it reverts");
    bench.fake.state().reverting = Some(0);
    let stop = Request::Stop {
        role: Role::Volume,
        volume: "v".into(),
    };
    bench.run(&stop).expect("stopped in the middle");
    let error = reverted
        .recv_timeout(LIMIT)
        .expect("an end")
        .expect_err("interrupted");
    assert!(error.to_string().starts_with("interrupted"), "{error}");
    // The old call ends with its server; the new server has the revert to do.
    drop(go);
    until("the old call has ended", || {
        bench.fake.state().reverting.is_none()
    });
    bench.fake.state().reverting = Some(0);
    let start = Request::Start {
        role: Role::Volume,
        volume: "v".into(),
        accept_origin: false,
    };
    let error = bench.run(&start).expect_err("not yet").to_string();
    assert!(error.contains("is being reverted"), "{error}");
    let up = || bench.view("v").is_some_and(|v| v.up && v.failure.is_none());
    until("the volume comes up when it is done", || {
        up() && bench.fake.state().mounts.len() == 2
    });
}

#[test]
fn a_resize_fits_the_device_in_use() {
    let bench = Bench::with_master();
    let resize = |origin| Request::Resize {
        volume: "v".into(),
        origin: Some(origin),
        store: None,
        meta: None,
        dry_run: false,
    };
    bench.run(&resize(200 << 20)).expect("resized");
    let log = bench.fake.state().log.clone();
    assert_eq!(log[log.len() - 2..], ["resize", "dm reload v 409600"]);
    assert_eq!(bench.fake.state().mounts.len(), 1, "it stays mounted");
    let error = bench
        .run(&resize(2 << 30))
        .expect_err("the disk is smaller");
    assert!(
        error.to_string().contains("make the device larger first"),
        "{error}"
    );
}

/// After an I/O error the server refused all, and with the volume mounted nothing short of stopping everything brought it back.
#[test]
fn a_start_replaces_a_server_whose_store_has_failed() {
    let bench = Bench::with_master();
    let start = Request::Start {
        role: Role::Volume,
        volume: "v".into(),
        accept_origin: false,
    };
    bench.run(&start).expect("nothing to do");
    let fault = "a write failed".to_string();
    bench.fake.state().fault = Some(fault.clone());
    let view = bench.view("v").expect("there");
    let reason = view.failure.expect("told");
    assert!(reason.contains("run `zumastor start volume v`"), "{reason}");
    bench.fake.state().log.clear();
    // The device is not mended yet.
    bench.fake.state().fail = Some("start server".into());
    let error = bench.run(&start).expect_err("it fails still");
    assert!(format!("{error:#}").contains(&fault), "{error:#}");
    bench.fake.state().fail = None;
    bench.run(&start).expect("started");
    // Now it is, and the mounts are still there.
    bench.fake.state().fault = Some(fault.clone());
    bench.fake.state().log.clear();
    let events = bench.run(&start).expect("replaced");
    let told = events.iter().any(
        |e| matches!(e, Event::Note(Note::Line(line)) if line.contains("its server was replaced")),
    );
    assert!(told, "{events:?}");
    let log = bench.fake.state().log.clone();
    assert_eq!(log, ["kill server", "start server"]);
    assert_eq!(bench.fake.state().mounts.len(), 1);
    let view = bench.view("v").expect("there");
    assert_eq!(view.failure, None);
}

/// All exports of a volume and its snapshots showed one snapshot's content, and nothing said why.
#[test]
fn exports_that_clients_cannot_tell_apart_are_told_by_status_and_start() {
    let bench = Bench::with_master();
    let start = |role| Request::Start {
        role,
        volume: "v".into(),
        accept_origin: false,
    };
    let warned = |role| {
        let events = bench.run(&start(role)).expect("started");
        let is_it =
            |e: &Event| matches!(e, Event::Note(Note::Warning(text)) if text.contains("fsid="));
        events.iter().any(is_it)
    };
    let told = || bench.view("v").expect("there").warnings.join(" ");
    assert!(!warned(Role::Volume) && !told().contains("fsid="));
    let dir = bench.layout.mountpoint("v");
    std::fs::create_dir_all(bench.layout.at("/etc")).expect("made");
    let exports = format!("{} *(rw)\n", dir.display());
    std::fs::write(bench.layout.at("/etc/exports"), exports).expect("written");
    assert!(warned(Role::Volume) && warned(Role::Master));
    let told = told();
    assert!(told.contains("exported over NFS without fsid="), "{told}");
}

/// A device that was left suspended while its table was changed stayed so, and everything on it hung.
#[test]
fn a_suspended_device_of_ours_is_resumed_at_start() {
    let bench = Bench::with_master();
    {
        let mut state = bench.fake.state();
        let (dev, _, table) = state.dm["v"].clone();
        state
            .dm
            .insert("other".into(), (dev, "LVM-x".into(), table));
        state.suspended.extend(["v", "other"].map(String::from));
    }
    crate::daemon::resume_leftovers(bench.fake.as_ref());
    let state = bench.fake.state();
    assert_eq!(state.suspended.iter().collect::<Vec<_>>(), ["other"]);
    assert_eq!(state.log.last().map(String::as_str), Some("dm resume v"));
}

#[test]
fn the_clock_takes_what_is_due_and_tries_again_later() {
    let bench = Bench::with_master();
    let set = |text: &str| {
        let now: jiff::Zoned = text.parse().expect("a time");
        bench.fake.state().now = Some(now);
    };
    set("2026-06-01T10:20[UTC]");
    let rotations = vec![crate::volume::WantedRotation {
        kind: "hourly".into(),
        keep: 2,
        custom: None,
    }];
    let volume = "v".to_string();
    let define = Request::DefineSchedule { volume, rotations };
    bench.run(&define).expect("defined");
    let eleven: jiff::Zoned = "2026-06-01T11:00[UTC]".parse().expect("a time");
    assert_eq!(bench.daemon.tick(), Some(eleven.timestamp().as_second()));
    set("2026-06-01T11:00[UTC]");
    bench.fake.state().fail = Some("create 0".into());
    let idle = || {
        !bench
            .daemon
            .handle("v")
            .expect("known")
            .taking
            .load(Ordering::SeqCst)
    };
    bench.daemon.tick();
    until("it has been tried", idle);
    assert!(bench.fake.state().snapshots.is_empty());
    bench.daemon.tick();
    assert!(idle(), "not again at once");
    *lock(&bench.daemon.handle("v").expect("known").retry_at) = Some(Instant::now());
    bench.daemon.tick();
    until("it has been taken", || {
        idle() && bench.fake.state().snapshots.len() == 1
    });
    bench.daemon.tick();
    assert!(idle(), "nothing is due any more");
}
