// SPDX-License-Identifier: GPL-2.0-only
//! Cycles that come by themselves: with the period of a target or source, in its window, again after a failure, and
//! those by hand that the end of a daemon or of the volume has interrupted.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use ddsnap::stdio::complain;
use jiff::Timestamp;

use super::{Daemon, lock};
use crate::config::{Asked, Window};
use crate::jobs::{Ending, JobState, Running};
use crate::names;
use crate::replicate::cycle::Way;
use crate::status::replication::NextCycle;

/// How often it is looked whether something is due.
const TICK: Duration = Duration::from_secs(1);
/// The longest pause after failures.
const PAUSE_MAX: Duration = Duration::from_secs(300);

/// A replication: volume, and target, or none for its source.
type Key = (String, Option<String>);

/// When a replication is due.
#[derive(Debug)]
struct Due {
    /// Nothing before.
    next: Instant,
    /// Failures since something got through.
    failures: u32,
    /// Why the last one could not be begun.
    error: Option<String>,
}

struct Cycle {
    running: Arc<Running>,
    began: Instant,
    /// It was told to end, as its window is over.
    late: bool,
}

/// A replication that has a period, or a cycle by hand to be begun again.
struct Wanted {
    key: Key,
    period: Duration,
    /// Whether its cycles may run now.
    open: bool,
    /// Everything is compared after each.
    tested: bool,
    /// What somebody had asked for.
    asked: Option<Asked>,
}

/// What runs and when what is due.
#[derive(Default)]
struct Periods {
    due: BTreeMap<Key, Due>,
    cycles: BTreeMap<Key, Cycle>,
}

/// The pause after so many failures in a row, from 1: a second, then twice as long each time, up to five
/// minutes; a quarter more or less, so that many who lost one machine do not come back all at once.
/// `chance` is 0 to 255.
fn pause(failures: u32, chance: u8) -> Duration {
    let doubled = Duration::from_secs(1 << failures.saturating_sub(1).min(12));
    doubled
        .min(PAUSE_MAX)
        .mul_f64(0.75 + f64::from(chance) / 512.0)
}

/// So much later; a century, if that is more than time has.
fn later(then: Instant, period: Duration) -> Instant {
    const CENTURY: Duration = Duration::from_secs(100 * 365 * 86_400);
    then + period.min(CENTURY)
}

impl Due {
    /// A cycle that began then has ended.
    fn ended(&mut self, (began, now): (Instant, Instant), period: Duration, how: End, chance: u8) {
        match how {
            End::Done => {
                self.failures = 0;
                self.next = later(began, period);
            }
            // Something got through: the trouble is a new one.
            End::Failed { moved: true } => self.fail(now, 1, chance),
            End::Failed { moved: false } => self.fail(now, self.failures + 1, chance),
            // It goes on as soon as it may.
            End::Late => {
                self.failures = 0;
                self.next = now;
            }
        }
    }

    fn fail(&mut self, now: Instant, failures: u32, chance: u8) {
        self.failures = failures;
        self.next = now + pause(failures, chance);
    }
}

/// How a cycle ended.
enum End {
    Done,
    Failed {
        /// Data got through before.
        moved: bool,
    },
    /// Its window was over.
    Late,
}

impl Daemon {
    /// Runs cycles as they are due, for ever.
    pub(super) fn run_periods(self: &Arc<Self>) {
        let mut periods = Periods::default();
        loop {
            thread::park_timeout(TICK);
            self.look(&mut periods, Instant::now());
        }
    }

    /// All replications that have a period or were interrupted.
    fn periodic(&self, cycles: &BTreeMap<Key, Cycle>) -> Vec<Wanted> {
        let now = self.host.now();
        let minute =
            u16::from(now.hour().unsigned_abs()) * 60 + u16::from(now.minute().unsigned_abs());
        let mut found = Vec::new();
        let mut add = |key: Key,
                       period: Option<u64>,
                       window: Option<Window>,
                       tested: bool,
                       asked: Option<Asked>| {
            let begun_again = cycles.contains_key(&key);
            let left_over = asked.is_some() && (begun_again || self.cycle_of(&key).is_none());
            if period.is_none() && !left_over {
                return;
            }
            found.push(Wanted {
                key,
                period: period.map_or(Duration::MAX, Duration::from_secs),
                // Who asked for it did not ask for the time of day.
                open: left_over || window.is_none_or(|window| window.contains(minute)),
                tested,
                asked: asked.filter(|_| left_over),
            });
        };
        for (name, handle) in self.handles() {
            let view = handle.view();
            let Some(config) = view.config.filter(|_| view.up) else {
                continue;
            };
            // What was superseded has nothing to say any more, whoever still listens.
            let superseded = config.lineage.superseded.is_some();
            for (host, target) in config.targets.into_iter().filter(|_| !superseded) {
                if !target.stopped {
                    let key = (name.clone(), Some(host));
                    let tested = target.test_fullvolume;
                    add(key, target.period, target.window, tested, target.asked);
                }
            }
            if let Some(source) = config.source.filter(|source| !source.stopped) {
                let key = (name, None);
                add(key, source.period, source.window, false, source.asked);
            }
        }
        found
    }

    fn look(self: &Arc<Self>, periods: &mut Periods, now: Instant) {
        let wanted = self.periodic(&periods.cycles);
        let is_wanted = |key: &Key| wanted.iter().any(|wanted| wanted.key == *key);
        periods.due.retain(|key, _| is_wanted(key));
        periods
            .cycles
            .retain(|key, cycle| is_wanted(key) || !cycle.running.view().state.is_over());
        for wanted in wanted {
            let Wanted {
                key,
                period,
                open,
                tested,
                asked,
            } = wanted;
            let due = periods.due.entry(key.clone()).or_insert(Due {
                next: now,
                failures: 0,
                error: None,
            });
            if let Some(cycle) = periods.cycles.get_mut(&key) {
                let view = cycle.running.view();
                if !view.state.is_over() {
                    if !open && !cycle.late {
                        cycle.late = true;
                        let name = names::cycle_job(key.1.as_deref());
                        self.jobs.end(&key.0, Some(&name), Ending::Window);
                    }
                    continue;
                }
                let how = match view.state {
                    // Cancelled is not taken up again before it is due.
                    JobState::Done | JobState::Cancelled => End::Done,
                    _ if cycle.late => End::Late,
                    _ => End::Failed {
                        moved: view.progress.done > 0,
                    },
                };
                let chance = uuid::Uuid::new_v4().as_bytes()[0];
                due.ended((cycle.began, now), period, how, chance);
                periods.cycles.remove(&key);
                if tested && view.state == JobState::Done {
                    self.begin_test(&key);
                }
            }
            if due.failures == 0 {
                // The period may have become shorter.
                due.next = due.next.min(later(now, period));
                if asked.is_some() {
                    due.next = now;
                }
            }
            if !open || now < due.next {
                continue;
            }
            // One that somebody else has begun: what is due is being done.
            if self.cycle_of(&key).is_some() {
                continue;
            }
            match self.begin_due(&key, asked) {
                Ok(running) => {
                    due.error = None;
                    let (began, late) = (now, false);
                    let cycle = Cycle {
                        running,
                        began,
                        late,
                    };
                    periods.cycles.insert(key, cycle);
                }
                Err(error) => {
                    if due.failures == 0 {
                        complain(format_args!("{}: {error:#}", key.0));
                    }
                    due.fail(now, due.failures + 1, 128);
                    due.error = Some(format!("{error:#}"));
                }
            }
        }
        self.publish(periods, now);
    }

    /// Lets the status know when what is due.
    fn publish(&self, periods: &Periods, now: Instant) {
        let clock = Timestamp::now().as_second();
        let due = periods.due.iter().map(|((volume, target), due)| {
            let left = due.next.saturating_duration_since(now).as_secs();
            let left = i64::try_from(left).unwrap_or(i64::MAX);
            let next = NextCycle {
                target: target.clone(),
                at: clock.saturating_add(left),
                failures: due.failures,
                error: due.error.clone(),
            };
            (volume.clone(), next)
        });
        *lock(&self.due) = due.collect();
    }

    fn begin_due(
        self: &Arc<Self>,
        (volume, target): &Key,
        asked: Option<Asked>,
    ) -> Result<Arc<Running>> {
        let way = target.clone().map_or(Way::Pull, Way::Push);
        self.begin(volume, way, asked, true)
    }

    /// Compares everything, as `define target --test fullvolume` asks for; what it finds is in the status. In a thread
    /// of its own: whoever has the volume may have it for long, and the other volumes' cycles come all the same.
    fn begin_test(self: &Arc<Self>, (volume, target): &Key) {
        let way = target.clone().map_or(Way::Pull, Way::Push);
        let (this, name) = (self.clone(), volume.clone());
        let begin = move || {
            if let Err(error) = this.begin_verify(&name, way, false, &Arc::default()) {
                complain(format_args!("{name}: cannot compare: {error:#}"));
            }
        };
        let spawned = thread::Builder::new().name("test".into()).spawn(begin);
        if let Err(error) = spawned {
            complain(format_args!("{volume}: cannot compare: no thread: {error}"));
        }
    }

    /// The cycle of a replication, if one runs.
    fn cycle_of(&self, (volume, target): &Key) -> Option<Arc<Running>> {
        self.jobs.find(volume, &names::cycle_job(target.as_deref()))
    }
}

#[cfg(test)]
mod tests {
    use super::super::Handle;
    use super::*;
    use crate::config;
    use crate::control::Request;
    use crate::daemon::requests::tests::{Bench, until};
    use crate::host::fake::Fake;
    use crate::layout::Layout;
    use crate::status::View;
    use crate::volume::DefineTarget;

    /// A machine that is away for a night was asked each second, by everybody at once.
    #[test]
    fn pauses_grow_to_five_minutes_and_differ() {
        assert_eq!(pause(1, 128), Duration::from_secs(1));
        assert_eq!(pause(4, 128), Duration::from_secs(8));
        assert_eq!(pause(9, 128), Duration::from_secs(256));
        for failures in [10, 13, 40, u32::MAX] {
            assert_eq!(pause(failures, 128), PAUSE_MAX);
        }
        assert_eq!(pause(1, 0), Duration::from_millis(750));
        assert!(pause(1, 255) > Duration::from_millis(1200));
    }

    /// The period runs from start to start, and what makes progress is not held back.
    #[test]
    fn a_cycle_is_due_a_period_after_the_last_began() {
        let began = Instant::now();
        let now = began + Duration::from_secs(20);
        let period = Duration::from_secs(60);
        let mut due = Due {
            next: began,
            failures: 3,
            error: None,
        };
        due.ended((began, now), period, End::Failed { moved: false }, 128);
        assert_eq!((due.failures, due.next), (4, now + Duration::from_secs(8)));
        due.ended((began, now), period, End::Failed { moved: true }, 128);
        assert_eq!((due.failures, due.next), (1, now + Duration::from_secs(1)));
        due.ended((began, now), period, End::Done, 128);
        assert_eq!((due.failures, due.next), (0, began + period));
    }

    /// A period of an age ended the thread that looks after all of them.
    #[test]
    fn a_period_longer_than_time_is_never_due() {
        let began = Instant::now();
        let mut due = Due {
            next: began,
            failures: 0,
            error: None,
        };
        let period = Duration::from_secs(u64::MAX);
        due.ended((began, began), period, End::Done, 128);
        assert!(due.next > began + Duration::from_secs(86_400 * 365));
    }

    /// Who had made a day an hour waited for the rest of the day.
    #[test]
    fn a_shorter_period_counts_from_when_it_is_set() {
        let root = tempfile::tempdir().expect("a directory");
        let layout = Layout::below(root.path());
        let daemon = Daemon::new(Arc::new(Fake::default()), layout.clone()).expect("new");
        // With a target beta and a period of a minute.
        let document = include_str!("../config/golden/v2.yaml");
        std::fs::create_dir_all(layout.volume("v")).expect("made");
        std::fs::write(layout.config("v"), document).expect("written");
        let mut view = View::starting("v");
        view.config = config::load(&layout, "v").expect("read");
        view.up = true;
        lock(&daemon.volumes).insert("v".into(), Handle::new(view));
        let key: Key = ("v".into(), Some("beta".into()));
        let (now, day) = (Instant::now(), Duration::from_secs(86_400));
        let mut periods = Periods::default();
        for (failures, next) in [(0, Duration::from_secs(60)), (3, day)] {
            let due = Due {
                next: now + day,
                failures,
                error: None,
            };
            periods.due.insert(key.clone(), due);
            daemon.look(&mut periods, now);
            // What failed has a pause of its own.
            assert_eq!(periods.due[&key].next, now + next, "{failures}");
        }
    }

    /// A machine that never says a word, and stays on the line: what has no way back has hung up.
    const SILENT: &str = "exec cat 3>&1 >/dev/null";

    /// Other machines are reached by this script.
    fn reach_by(bench: &Bench, script: &str) {
        let fake = bench.layout.at("/fake-ssh");
        std::fs::write(&fake, format!("#!/bin/sh\n{script}\n")).expect("written");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&fake, mode).expect("set");
        let command = bench.layout.at("/etc/zumastor/ssh_command");
        std::fs::create_dir_all(command.parent().expect("a parent")).expect("made");
        std::fs::write(&command, fake.display().to_string()).expect("written");
    }

    /// A volume v with a target beta.
    fn with_target(period: Option<u64>, window: Option<Window>) -> Bench {
        let bench = Bench::with_master();
        let target = Request::DefineTarget(DefineTarget {
            volume: "v".into(),
            host: "beta".into(),
            name: None,
            period,
            window,
            ratelimit: None,
            uncompressed: false,
            test_fullvolume: false,
            on_full: config::HoldPolicy::Bookmark,
        });
        bench.run(&target).expect("defined");
        bench
    }

    /// The state of the cycle to beta that runs, or of the last one.
    fn states(daemon: &Daemon) -> Vec<JobState> {
        let jobs = daemon.jobs.views("v").into_iter();
        let cycles = jobs.filter(|job| job.name == "replicate beta");
        cycles.map(|job| job.state).collect()
    }

    /// A copy of days that somebody had asked for ended with the daemon, and nobody began it again.
    #[test]
    fn what_was_asked_for_is_begun_again_by_the_next_daemon() {
        let bench = with_target(None, None);
        reach_by(&bench, SILENT);
        let (daemon, second) = (bench.daemon.clone(), Duration::from_secs(1));
        let waits = thread::spawn(move || {
            let asked = Request::Replicate {
                volume: "v".into(),
                target: Some("beta".into()),
                snapshot: None,
                nowait: false,
                full: true,
                force_base: false,
                dry_run: false,
            };
            daemon.execute(&asked, &mut |_| true)
        });
        let asked = || {
            let config = config::load(&bench.layout, "v").expect("read");
            config.expect("there").targets["beta"].asked
        };
        until("it is noted", || asked().is_some());
        let mut now = Instant::now();
        bench.daemon.look(&mut Periods::default(), now);
        assert_eq!(states(&bench.daemon), [JobState::Running], "begun twice");
        bench
            .daemon
            .end_jobs("v", Ending::Interrupted)
            .expect("ended");
        let told = waits.join().expect("no panic").expect_err("interrupted");
        assert!(told.to_string().contains("interrupted"), "{told:#}");
        assert_eq!(asked().map(|asked| asked.full), Some(true));

        let next = Daemon::new(bench.fake.clone(), bench.layout.clone()).expect("new");
        next.start_all().expect("started");
        // The other machine is not up yet.
        reach_by(&bench, "exit 255");
        let mut periods = Periods::default();
        next.look(&mut periods, now);
        until("it fails", || states(&next) == [JobState::Failed]);
        next.look(&mut periods, now);
        assert_eq!(states(&next), [JobState::Failed], "tried again at once");
        reach_by(&bench, SILENT);
        now += 60 * second;
        next.look(&mut periods, now);
        assert_eq!(states(&next), [JobState::Running]);
        // Who does not want it any more says so.
        next.end_jobs("v", Ending::Cancelled).expect("ended");
        assert_eq!(asked(), None);
        next.look(&mut periods, now + 3600 * second);
        assert_eq!(states(&next), [JobState::Cancelled]);
    }

    /// A night's copy went on while people worked, or began again the next minute.
    #[test]
    fn cycles_run_in_their_window_and_go_on_in_the_next() {
        let window = Some("22:00-06:00".parse().expect("a window"));
        let bench = with_target(Some(60), window);
        reach_by(&bench, SILENT);
        let mut periods = Periods::default();
        let mut clock = Instant::now();
        let state = || {
            let mut jobs = bench.daemon.jobs.views("v").into_iter();
            let job = jobs.rfind(|job| job.name == "replicate beta")?;
            Some((job.state, job.result))
        };
        let mut look = |day: i8, hour: i8, minute: i8| {
            let time = jiff::civil::date(2026, 11, day).at(hour, minute, 0, 0);
            bench.fake.state().now = Some(time.in_tz("Europe/Berlin").expect("a zone"));
            clock += Duration::from_secs(3600);
            bench.daemon.look(&mut periods, clock);
            state().map(|(state, _)| state)
        };
        assert_eq!(look(22, 21, 59), None);
        assert_eq!(look(22, 22, 0), Some(JobState::Running));
        assert_eq!(look(23, 5, 59), Some(JobState::Running));
        look(23, 6, 0);
        until("it ends", || {
            state().is_some_and(|(state, _)| state.is_over())
        });
        let (state, said) = state().expect("a job");
        assert_eq!(state, JobState::Interrupted);
        assert!(said.expect("said").contains("at the end of its window"));
        assert_eq!(look(23, 6, 1), Some(JobState::Interrupted));
        assert_eq!(look(23, 21, 59), Some(JobState::Interrupted));
        assert_eq!(look(23, 22, 0), Some(JobState::Running));
        bench
            .daemon
            .end_jobs("v", Ending::Cancelled)
            .expect("ended");
    }
}
