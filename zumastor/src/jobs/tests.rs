// SPDX-License-Identifier: GPL-2.0-only
//! Jobs that run, end, are ended, and are too many.

use std::sync::mpsc::{self, Receiver, Sender};

use super::*;

const LIMIT: Duration = Duration::from_secs(20);

type Order = Box<dyn FnOnce(&Running) -> Result<()> + Send>;
type Orders = Sender<Order>;

/// Does what it is told until the teller is gone, or until it is to end.
struct Told {
    name: String,
    alone: bool,
    orders: Receiver<Order>,
}

impl Job for Told {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn is_alone(&self) -> bool {
        self.alone
    }

    fn run(&mut self, running: &Arc<Running>) -> Result<String> {
        while let Ok(order) = self.orders.recv() {
            order(running)?;
        }
        Ok(format!("did {}", self.name))
    }
}

fn told(name: &str, alone: bool) -> (Orders, Box<dyn Job>) {
    let (sender, orders) = mpsc::channel();
    let name = name.to_string();
    (
        sender,
        Box::new(Told {
            name,
            alone,
            orders,
        }),
    )
}

fn start(jobs: &Arc<Jobs>, volume: &str, name: &str) -> (Orders, Arc<Running>) {
    let (orders, job) = told(name, false);
    (orders, jobs.start(volume, job).expect("started"))
}

/// Tells the job to wait until it is to end.
fn until_ended(orders: &Orders) {
    let order = |running: &Running| running.pause(LIMIT);
    orders.send(Box::new(order)).expect("it listens");
}

#[test]
fn who_waits_hears_all_and_the_result_stays() {
    let jobs = Jobs::new();
    let (orders, running) = start(&jobs, "v", "revert");
    let order = |running: &Running| {
        running.progress("copying", 3, 10);
        running.note(Note::Warning("slow".into()));
        Ok(())
    };
    orders.send(Box::new(order)).expect("it listens");
    drop(orders);
    let mut notes = Vec::new();
    let result = Jobs::wait(&running, &mut |note| {
        notes.push(note);
        true
    });
    assert_eq!(result.expect("done"), "did revert");
    assert!(notes.contains(&Note::Warning("slow".into())), "{notes:?}");
    assert!(
        notes.contains(&Note::progress("copying", 3, 10)),
        "{notes:?}"
    );
    jobs.end_and_wait("v", None, Ending::Cancelled, LIMIT)
        .expect("over");
    let [view] = &jobs.views("v")[..] else {
        panic!("one job");
    };
    assert_eq!(view.state, JobState::Done);
    assert_eq!(view.result.as_deref(), Some("did revert"));
    assert!(jobs.views("w").is_empty());
    jobs.forget("v");
    assert!(jobs.views("v").is_empty());
}

#[test]
fn a_waiter_that_goes_away_does_not_end_the_job() {
    let jobs = Jobs::new();
    let (orders, running) = start(&jobs, "v", "verify");
    let order = |running: &Running| {
        running.progress("reading", 1, 2);
        Ok(())
    };
    orders.send(Box::new(order)).expect("it listens");
    Jobs::wait(&running, &mut |_| false).expect_err("nobody listens");
    assert_eq!(running.view().state, JobState::Running);
    drop(orders);
    let result = Jobs::wait(&running, &mut |_| true);
    assert_eq!(result.expect("done"), "did verify");
}

#[test]
fn a_cancelled_job_ends_and_says_so() {
    let jobs = Jobs::new();
    let (orders, running) = start(&jobs, "v", "revert");
    until_ended(&orders);
    let error = jobs.cancel("v", "other").expect_err("none").to_string();
    assert_eq!(error, "no job 'other' runs on volume 'v'");
    jobs.cancel("v", "revert").expect("asked");
    // A daemon that stops meanwhile must not bring it back.
    jobs.end_and_wait("v", None, Ending::Interrupted, LIMIT)
        .expect("over");
    let error = Jobs::wait(&running, &mut |_| true).expect_err("ended");
    assert_eq!(error.to_string(), "cancelled");
    assert_eq!(running.view().state, JobState::Cancelled);
    let mut polled = [nix::poll::PollFd::new(
        running.end_fd(),
        nix::poll::PollFlags::POLLIN,
    )];
    let ready = nix::poll::poll(&mut polled, nix::poll::PollTimeout::ZERO);
    assert_eq!(ready, Ok(1), "what waits for a descriptor wakes up");
}

#[test]
fn closing_interrupts_all_and_lets_none_begin() {
    let jobs = Jobs::new();
    let (orders, running) = start(&jobs, "v", "replicate beta");
    until_ended(&orders);
    assert!(jobs.close(LIMIT).is_empty(), "all ended");
    assert_eq!(running.view().state, JobState::Interrupted);
    let (_orders, job) = told("x", false);
    let error = jobs.start("v", job).err().expect("refused").to_string();
    assert_eq!(error, "the daemon is ending");
}

#[test]
fn a_job_that_does_not_end_is_named() {
    let jobs = Jobs::new();
    let (orders, _running) = start(&jobs, "v", "stubborn");
    let limit = Duration::from_millis(10);
    let error = jobs.end_and_wait("v", None, Ending::Interrupted, limit);
    let text = error.expect_err("it waits for orders").to_string();
    assert!(text.starts_with("'stubborn' was asked to end"), "{text}");
    let left = jobs.close(limit);
    assert_eq!(left[0].state, JobState::Ending);
    drop(orders);
}

/// `snapshot --nowait` in a loop filled the machine with threads.
#[test]
fn jobs_are_bounded_and_one_of_a_name() {
    let jobs = Jobs::new();
    let mut kept = Vec::new();
    for number in 0..RUNNING_MAX {
        kept.push(start(&jobs, "v", &format!("job {number}")));
    }
    let refusal = |volume: &str, name: &str, alone| {
        let (_orders, job) = told(name, alone);
        jobs.start(volume, job).err().map(|e| e.to_string())
    };
    let text = refusal("w", "one more", false).expect("refused");
    assert!(text.contains("as many as there may be"), "{text}");
    let text = refusal("v", "job 7", false).expect("refused");
    assert_eq!(text, "'job 7' runs already on volume 'v'");
    let text = refusal("v", "revert", true).expect("refused");
    assert!(text.contains("`zumastor cancel v job 0`"), "{text}");
    kept.pop();
    let until = Instant::now() + LIMIT;
    while refusal("w", "one more", false).is_some() {
        assert!(Instant::now() < until, "no place although one ended");
        thread::yield_now();
    }
    drop(kept);
    let (_orders, job) = told("revert", true);
    jobs.end_and_wait("v", None, Ending::Interrupted, LIMIT)
        .expect("all end");
    jobs.start("v", job).expect("alone now");
    assert!(refusal("v", "another", false).is_some());
}

#[test]
fn a_panic_ends_its_job_alone() {
    let jobs = Jobs::new();
    let (orders, running) = start(&jobs, "v", "bad");
    let order = |_: &Running| -> Result<()> { panic!("as the test wants") };
    orders.send(Box::new(order)).expect("it listens");
    let error = Jobs::wait(&running, &mut |_| true).expect_err("it failed");
    assert_eq!(error.to_string(), "an internal error; see the journal");
    jobs.end_and_wait("v", None, Ending::Cancelled, LIMIT)
        .expect("over");
}

#[test]
fn the_rate_is_that_of_the_last_seconds() {
    let begin = Instant::now();
    let at = |second, done| (begin + Duration::from_secs(second), done);
    assert_eq!(rate(&VecDeque::new()), None);
    assert_eq!(rate(&[at(0, 5)].into()), None);
    assert_eq!(rate(&[at(0, 0), at(2, 600), at(4, 1000)].into()), Some(250));
    let view = JobView {
        id: 1,
        volume: "v".into(),
        name: "x".into(),
        state: JobState::Running,
        progress: Progress {
            subject: "copying".into(),
            done: 1000,
            total: 2000,
        },
        rate: Some(250),
        started: 0,
        ended: None,
        result: None,
        refused: None,
    };
    assert_eq!(view.seconds_left(), Some(4));
}
