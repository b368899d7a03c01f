//! Waiting for a job of a running instance.
//!
//! A control socket serves one client at a time, so it is not held while a job runs: each look at the
//! job is a connection of its own, and whoever wants to pause or cancel the job gets in between. What
//! has ended must therefore be there until it was looked at: the commands here start jobs that stay
//! until they are dismissed, and dismiss them when their result was told.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use serde_json::{Map, Value};
use signal_hook::consts::SIGINT;
use signal_hook::flag;

use crate::error::{Error, ErrorKind, Result};

use super::Outcome;
use super::args::{EndpointArguments, Output};
use super::job_progress::Display;
use super::job_view::{self, JobView};
use super::qmp_client::QmpClient;

/// Exit status of who was told by Ctrl-C to wait no longer: that of a program that SIGINT ends.
const DETACHED: u8 = 130;

/// The time between two looks grows from one to the other.
const SHORTEST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_millis(250);

/// A look that takes longer has met another client, and is tried again.
const LOOK: Duration = Duration::from_secs(2);

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Goal {
    /// Its end; or that it is in step with the guest, which does not end by itself.
    EndOrReady,
    /// Its end, although it may be ready before.
    End,
    /// Its end after it was told to complete, which is done here as soon as it is ready.
    Completed,
    /// Its end after it was told to stop following, which is done here as soon as it is ready.
    Parted,
}

impl Goal {
    /// The command that ends a job that is ready, and the name of its argument.
    fn last_word(self) -> (&'static str, &'static str) {
        match self {
            Goal::Parted => ("block-job-cancel", "device"),
            _ => ("job-complete", "id"),
        }
    }
}

/// A job that is waited for.
pub(super) struct Wait<'a> {
    pub(super) socket: &'a Path,
    pub(super) endpoint: &'a EndpointArguments,
    pub(super) id: &'a str,
    pub(super) goal: Goal,
    pub(super) output: Output,
}

/// What is to be done after a look at a job.
#[derive(Debug, PartialEq, Eq)]
enum Step {
    Wait,
    /// Tell it to end.
    Complete,
    /// It is in step with the guest, and that was waited for.
    Ready,
    /// It has ended.
    Ended(Result<(), String>),
}

impl Wait<'_> {
    /// Waits, and shows the progress meanwhile.
    ///
    /// # Errors
    /// The job has failed or was cancelled, or nobody can tell; the instance is gone.
    pub(super) fn run(&self) -> Result<Outcome> {
        let interrupted = Arc::new(AtomicBool::new(false));
        flag::register(SIGINT, interrupted.clone())?;
        let mut display = Display::new();
        let result = self.look_until_done(&mut display, &interrupted);
        display.end();
        match result? {
            Some(job) => Ok(self.told(&job)),
            None => Ok(self.detached()),
        }
    }

    /// `None`: interrupted.
    fn look_until_done(
        &self,
        display: &mut Display,
        interrupted: &AtomicBool,
    ) -> Result<Option<JobView>> {
        let start = Instant::now();
        let mut pause = SHORTEST_PAUSE;
        let mut completing = false;
        while !interrupted.load(Ordering::Relaxed) {
            let Some(mut client) = self.connect()? else {
                continue;
            };
            let job = self.find(&mut client)?;
            display.show(start.elapsed(), &job);
            match step(self.goal, &job, completing) {
                Step::Wait => {}
                // Refused where somebody else has ended the job meanwhile: the next look shows it.
                Step::Complete => {
                    let (command, argument) = self.goal.last_word();
                    let answer = client.execute(command, one(argument, self.id));
                    completing = answer.is_ok();
                }
                Step::Ready => return Ok(Some(job)),
                Step::Ended(result) => {
                    client.execute("job-dismiss", one("id", self.id))?;
                    let failed = |why| Error::new(ErrorKind::Cancelled, why);
                    return result.map(|()| Some(job)).map_err(failed);
                }
            }
            drop(client);
            sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
        Ok(None)
    }

    /// `None`: another client is being served.
    fn connect(&self) -> Result<Option<QmpClient>> {
        match QmpClient::connect_within(self.socket, LOOK) {
            Ok(client) => Ok(Some(client)),
            Err(error) if error.kind() == ErrorKind::Io(Errno::ETIMEDOUT) => Ok(None),
            Err(error) => {
                let context = format!("the instance of job '{}' is gone", self.id);
                Err(error.context(context))
            }
        }
    }

    fn find(&self, client: &mut QmpClient) -> Result<JobView> {
        let jobs = job_view::query(client)?;
        let job = jobs.into_iter().find(|job| job.id == self.id);
        job.ok_or_else(|| {
            let (id, words) = (self.id, self.endpoint.words());
            let text = format!(
                "job '{id}' is not there (any more): how it has ended is not known; \
                 'liveblk jobs{words}' lists the jobs, 'liveblk chain{words}' shows what there is now"
            );
            Error::new(ErrorKind::NotFound, text)
        })
    }

    fn told(&self, job: &JobView) -> Outcome {
        if self.output == Output::Json {
            return Outcome::text(format!("{:#}\n", job.to_json()));
        }
        let (id, words) = (self.id, self.endpoint.words());
        Outcome::text(match job.is_over() {
            true => format!("{id}: completed\n"),
            false => {
                let new = job.new_layer();
                format!(
                    "{id}: ready; 'liveblk job complete{words} {id}' ends it with {new} as active layer, \
                     'liveblk job cancel{words} {id}' without\n"
                )
            }
        })
    }

    fn detached(&self) -> Outcome {
        let (id, words) = (self.id, self.endpoint.words());
        eprintln!(
            "liveblk: job '{id}' goes on; 'liveblk jobs{words}' shows it, 'liveblk job wait{words} {id}' waits \
             for it again"
        );
        let last = match self.goal {
            Goal::Completed => format!("complete{words} --wait"),
            Goal::Parted => format!("cancel{words}"),
            Goal::End | Goal::EndOrReady => String::new(),
        };
        if !last.is_empty() {
            eprintln!("liveblk: 'liveblk job {last} {id}' ends it when it is ready");
        }
        Outcome {
            text: String::new(),
            status: DETACHED,
        }
    }
}

fn step(goal: Goal, job: &JobView, completing: bool) -> Step {
    if job.is_over() {
        return Step::Ended(result(goal, job, completing));
    }
    match (&*job.status, goal) {
        ("ready", Goal::EndOrReady) => Step::Ready,
        ("ready", Goal::Completed | Goal::Parted) if !completing => Step::Complete,
        _ => Step::Wait,
    }
}

fn result(goal: Goal, job: &JobView, completing: bool) -> Result<(), String> {
    let id = &job.id;
    match job.error.as_deref() {
        Some(CANCELLED) => Err(format!("job '{id}' was cancelled")),
        Some(error) => Err(format!("job '{id}' failed: {error}")),
        None if goal == Goal::Completed && !completing && job.follows() => {
            let text = "ended before it was told to complete: the active layer is still the same";
            Err(format!("job '{id}' {text}"))
        }
        None => Ok(()),
    }
}

/// The error of a job that was cancelled.
const CANCELLED: &str = "Operation canceled";

/// An object with one member.
pub(super) fn one(name: &str, value: &str) -> Map<String, Value> {
    Map::from_iter([(name.to_string(), Value::from(value))])
}

#[cfg(test)]
mod tests {
    use super::super::job_view::tests::job;
    use super::*;

    #[test]
    fn a_commit_is_told_to_complete_once_it_is_ready() {
        let look = |status, completing| step(Goal::Completed, &job("j", status, 1, 1), completing);
        assert_eq!(look("running", false), Step::Wait);
        assert_eq!(look("standby", false), Step::Wait);
        assert_eq!(look("ready", false), Step::Complete);
        assert_eq!(look("ready", true), Step::Wait);
        assert_eq!(look("concluded", true), Step::Ended(Ok(())));
    }

    #[test]
    fn a_commit_that_somebody_else_has_ended_is_no_success() {
        let Step::Ended(Err(why)) = step(Goal::Completed, &job("j", "concluded", 1, 1), false)
        else {
            panic!("not an error");
        };
        assert!(why.contains("before it was told to complete"), "{why}");
    }

    #[test]
    fn failed_and_cancelled_jobs_are_told_apart() {
        let mut job = job("j", "concluded", 1, 1);
        for (error, wanted) in [
            (CANCELLED, "job 'j' was cancelled"),
            ("Input/output error", "job 'j' failed: Input/output error"),
        ] {
            job.error = Some(error.into());
            assert_eq!(
                step(Goal::End, &job, false),
                Step::Ended(Err(wanted.into()))
            );
        }
    }

    #[test]
    fn a_mirror_that_is_not_to_pivot_is_told_to_stop_following() {
        let ready = job("j", "ready", 1, 1);
        assert_eq!(step(Goal::Parted, &ready, false), Step::Complete);
        assert_eq!(step(Goal::Parted, &ready, true), Step::Wait);
        assert_eq!(Goal::Parted.last_word().0, "block-job-cancel");
    }

    #[test]
    fn ready_ends_the_wait_of_who_does_not_complete() {
        let ready = job("j", "ready", 1, 1);
        assert_eq!(step(Goal::EndOrReady, &ready, false), Step::Ready);
        assert_eq!(step(Goal::End, &ready, false), Step::Wait);
    }
}
