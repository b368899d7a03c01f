//! `liveblk jobs` and `liveblk job`: what runs, and what may be done to it.

use serde_json::Value;

use crate::error::{Error, ErrorKind, Result};

use super::args::{EndpointArguments, Output};
use super::job_args::{JobCommand, JobsArguments};
use super::job_view::{self, JobView};
use super::job_wait::{Goal, Wait, one};
use super::qmp_client::QmpClient;
use super::{Outcome, endpoint};

pub(super) fn list(arguments: &JobsArguments) -> Result<Outcome> {
    let mut client = QmpClient::connect(&endpoint::find(&arguments.endpoint)?)?;
    let jobs = job_view::query(&mut client)?;
    Ok(Outcome::text(match arguments.output {
        Output::Human => table(&jobs),
        Output::Json => {
            let jobs: Value = jobs.iter().map(JobView::to_json).collect();
            format!("{jobs:#}\n")
        }
    }))
}

fn table(jobs: &[JobView]) -> String {
    if jobs.is_empty() {
        return "no jobs\n".to_string();
    }
    let rows: Vec<[String; 6]> = jobs.iter().map(JobView::cells).collect();
    let widths: [usize; 6] = std::array::from_fn(|column| {
        let width = |row: &[String; 6]| row[column].chars().count();
        rows.iter().map(width).max().unwrap_or(0)
    });
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line += &format!("{cell:<width$}  ");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

pub(super) fn run(command: &JobCommand) -> Result<Outcome> {
    match command {
        JobCommand::Pause(job) => tell(&job.endpoint, &job.id, "job-pause"),
        JobCommand::Resume(job) => tell(&job.endpoint, &job.id, "job-resume"),
        JobCommand::Finalize(job) => tell(&job.endpoint, &job.id, "job-finalize"),
        JobCommand::Dismiss(job) => tell(&job.endpoint, &job.id, "job-dismiss"),
        JobCommand::Cancel(job) => cancel(&job.job.endpoint, &job.job.id, job.force),
        JobCommand::Complete(job) => {
            let told = tell(&job.job.endpoint, &job.job.id, "job-complete")?;
            match job.wait {
                true => wait(&job.job.endpoint, &job.job.id, Goal::End),
                false => Ok(told),
            }
        }
        JobCommand::SetSpeed(job) => {
            let mut members = one("device", &job.job.id);
            members.insert("speed".to_string(), job.speed.into());
            let mut client = QmpClient::connect(&endpoint::find(&job.job.endpoint)?)?;
            let answer = client.execute("block-job-set-speed", members);
            done(answer, &job.job.endpoint)
        }
        JobCommand::Wait(job) => wait(&job.endpoint, &job.id, Goal::EndOrReady),
    }
}

fn wait(arguments: &EndpointArguments, id: &str, goal: Goal) -> Result<Outcome> {
    let wait = Wait {
        socket: &endpoint::find(arguments)?,
        endpoint: arguments,
        id,
        goal,
        output: Output::Human,
    };
    wait.run()
}

fn tell(arguments: &EndpointArguments, id: &str, command: &str) -> Result<Outcome> {
    let mut client = QmpClient::connect(&endpoint::find(arguments)?)?;
    let answer = client.execute(command, one("id", id));
    done(answer, arguments)
}

/// Only the command for block jobs can cancel without force; others are always cancelled with it.
fn cancel(arguments: &EndpointArguments, id: &str, force: bool) -> Result<Outcome> {
    let mut client = QmpClient::connect(&endpoint::find(arguments)?)?;
    let jobs = job_view::query(&mut client)?;
    let is_block_job = jobs.iter().any(|job| job.id == id && job.block.is_some());
    let answer = match is_block_job && !force {
        true => client.execute("block-job-cancel", one("device", id)),
        false => client.execute("job-cancel", one("id", id)),
    };
    done(answer, arguments)
}

fn done(answer: Result<Value>, arguments: &EndpointArguments) -> Result<Outcome> {
    match answer {
        Ok(_) => Ok(Outcome::text(String::new())),
        Err(error) => Err(advise(error, arguments)),
    }
}

/// The refusal, and what to do next.
fn advise(error: Error, arguments: &EndpointArguments) -> Error {
    if error.kind() != ErrorKind::InvalidArgument {
        return error;
    }
    let (message, words) = (error.message(), arguments.words());
    let advice = if message.contains("not found") {
        format!("'liveblk jobs{words}' lists the jobs")
    } else if message.contains("command verb 'dismiss'") {
        "it has not ended: 'liveblk job wait' waits for it, 'liveblk job cancel' ends it"
            .to_string()
    } else if message.contains("command verb 'complete'") {
        "only a mirror or a commit of the active layer is completed, once it is ready: 'liveblk job \
         wait' waits for that"
            .to_string()
    } else if message.contains("in state 'concluded'") {
        "it has ended: 'liveblk job wait' tells how, 'liveblk job dismiss' forgets it".to_string()
    } else if message.contains("is currently paused") {
        "resume it first, or give --force".to_string()
    } else {
        format!("'liveblk jobs{words}' shows its state")
    };
    Error::new(error.kind(), format!("{message}; {advice}"))
}

#[cfg(test)]
mod tests {
    use super::super::job_view::tests::job;
    use super::*;

    #[test]
    fn jobs_are_lines_of_columns() {
        let jobs = [
            job("c0", "running", 1 << 20, 4 << 20),
            job("stream-12", "concluded", 0, 0),
        ];
        let wanted = "\
c0         commit  running    25 %   1 MiB of 4 MiB
stream-12  commit  concluded  100 %  -
";
        assert_eq!(table(&jobs), wanted);
        assert_eq!(table(&[]), "no jobs\n");
    }

    #[test]
    fn refusals_say_what_to_do_next() {
        let endpoint = EndpointArguments {
            name: Some("vm1".into()),
            socket: None,
        };
        for (message, wanted) in [
            ("Job not found", "'liveblk jobs --name vm1' lists the jobs"),
            (
                "Job 'j' in state 'running' cannot accept command verb 'dismiss'",
                "it has not ended",
            ),
            (
                "Job 'j' in state 'running' cannot accept command verb 'complete'",
                "once it is ready",
            ),
            (
                "Job 'j' in state 'concluded' cannot accept command verb 'pause'",
                "it has ended",
            ),
            (
                "The block job for device 'j' is currently paused",
                "give --force",
            ),
            (
                "Job is already paused",
                "'liveblk jobs --name vm1' shows its state",
            ),
        ] {
            let error = Error::new(ErrorKind::InvalidArgument, message);
            let text = advise(error, &endpoint).message().to_string();
            assert!(text.starts_with(message) && text.contains(wanted), "{text}");
        }
    }
}
