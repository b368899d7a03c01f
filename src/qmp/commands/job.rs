//! Jobs: queries, verbs, and their events as QMP tells them.

use std::rc::Rc;

use serde_json::{Value, json};

use super::{Context, Outcome};
use crate::filter::CopyMode;
use crate::job::{BlockJobReport, ErrorPolicy, Job, JobEvent, JobKind, JobOptions, Verb};
use crate::qmp::error::{ErrorClass, QmpError};
use crate::qmp::schema::Args;

/// `query-jobs`: newest first.
pub(super) fn query(context: &Context) -> Outcome {
    let jobs = context.workshop.jobs.list();
    Ok(jobs.iter().map(|job| info(job)).collect())
}

/// `query-block-jobs`: newest first.
pub(super) fn query_block_jobs(context: &Context) -> Outcome {
    let mut jobs = context.workshop.jobs.list();
    jobs.retain(|job| job.kind().is_block_job());
    Ok(jobs.iter().map(|job| block_job_info(job)).collect())
}

fn info(job: &Job) -> Value {
    let progress = job.progress();
    let mut info = json!({
        "id": job.id(),
        "type": job.kind().name(),
        "status": job.status().name(),
        "current-progress": progress.current,
        "total-progress": progress.total,
    });
    add_error(&mut info, job.error());
    info
}

fn block_job_info(job: &Job) -> Value {
    let progress = job.progress();
    let mut info = json!({
        "type": job.kind().name(),
        "device": job.id(),
        "len": progress.total,
        "offset": progress.current,
        // Nobody asks while a job runs: they share a thread.
        "busy": false,
        "paused": job.is_paused(),
        "speed": job.speed(),
        "io-status": job.io_status().name(),
        "ready": job.status().is_ready(),
        "status": job.status().name(),
        "auto-finalize": job.options().auto_finalize,
        "auto-dismiss": job.options().auto_dismiss,
    });
    if let Some(in_step) = job.is_in_step() {
        info["actively-synced"] = in_step.into();
    }
    add_error(&mut info, job.error());
    info
}

fn add_error(info: &mut Value, error: Option<String>) {
    if let Some(error) = error {
        info["error"] = error.into();
    }
}

/// Name and data of the event that tells of what happened to a job.
pub(super) fn event(event: &JobEvent) -> (&'static str, Value) {
    match event {
        JobEvent::StatusChange { id, status } => (
            "JOB_STATUS_CHANGE",
            json!({"id": id, "status": status.name()}),
        ),
        JobEvent::Ready(report) => ("BLOCK_JOB_READY", report_data(report)),
        JobEvent::Cancelled(report) => ("BLOCK_JOB_CANCELLED", report_data(report)),
        JobEvent::Completed(report, error) => {
            let mut data = report_data(report);
            add_error(&mut data, error.clone());
            ("BLOCK_JOB_COMPLETED", data)
        }
        JobEvent::Pending { id, kind } => {
            ("BLOCK_JOB_PENDING", json!({"type": kind.name(), "id": id}))
        }
        JobEvent::Error {
            id,
            operation,
            action,
        } => (
            "BLOCK_JOB_ERROR",
            json!({"device": id, "operation": operation.name(), "action": action.name()}),
        ),
    }
}

fn report_data(report: &BlockJobReport) -> Value {
    json!({
        "type": report.kind.name(),
        "device": report.id,
        "len": report.progress.total,
        "offset": report.progress.current,
        "speed": report.speed,
    })
}

/// The arguments that every block job has.
pub(super) fn options(args: Args<'_>) -> JobOptions {
    JobOptions {
        // QEMU's default is the name of the device, and nodes have none.
        id: args.str("job-id").unwrap_or_default().to_owned(),
        speed: args.i64("speed").unwrap_or(0),
        auto_finalize: args.bool("auto-finalize").unwrap_or(true),
        auto_dismiss: args.bool("auto-dismiss").unwrap_or(true),
    }
}

/// The two names that each verb has: `job-*` finds any job by `id`, `block-job-*` only block jobs.
#[derive(Clone, Copy)]
pub(super) enum Family {
    /// `job-*`.
    Any,
    /// `block-job-*` with the argument `device`.
    Device,
    /// `block-job-*` with the argument `id`.
    Id,
}

impl Family {
    fn find(self, context: &Context, args: Args<'_>) -> Result<Rc<Job>, QmpError> {
        let name = match self {
            Family::Device => "device",
            Family::Any | Family::Id => "id",
        };
        let id = args.required_str(name);
        let job = context.workshop.jobs.find(id);
        match self {
            Family::Any => job.ok_or_else(|| QmpError::generic("Job not found")),
            Family::Device | Family::Id => {
                job.filter(|job| job.kind().is_block_job()).ok_or_else(|| {
                    let text = format!("Block job '{id}' not found");
                    QmpError::new(ErrorClass::DeviceNotActive, text)
                })
            }
        }
    }
}

/// `job-pause`, `block-job-pause`.
pub(super) fn pause(context: &Context, family: Family, args: Args<'_>) -> Outcome {
    family.find(context, args)?.pause()?;
    Ok(json!({}))
}

/// `job-resume`, `block-job-resume`.
pub(super) fn resume(context: &Context, family: Family, args: Args<'_>) -> Outcome {
    family.find(context, args)?.resume()?;
    Ok(json!({}))
}

/// `job-complete`, `block-job-complete`.
pub(super) fn complete(context: &Context, family: Family, args: Args<'_>) -> Outcome {
    family.find(context, args)?.complete()?;
    Ok(json!({}))
}

/// `block-job-set-speed`.
pub(super) fn set_speed(context: &Context, args: Args<'_>) -> Outcome {
    let speed = args.i64("speed").unwrap_or(0);
    Family::Device.find(context, args)?.set_speed(speed)?;
    Ok(json!({}))
}

/// `job-cancel` (always with force), `block-job-cancel`.
pub(super) async fn cancel(context: &Context, family: Family, args: Args<'_>) -> Outcome {
    let job = family.find(context, args)?;
    let force = match family {
        Family::Any => true,
        Family::Device | Family::Id => args.bool("force").unwrap_or(false),
    };
    context.workshop.jobs.cancel(&job, force).await?;
    Ok(json!({}))
}

/// `job-finalize`, `block-job-finalize`: the job has ended when this answers.
pub(super) async fn finalize(context: &Context, family: Family, args: Args<'_>) -> Outcome {
    let job = family.find(context, args)?;
    job.finalize()?;
    job.until_over().await;
    Ok(json!({}))
}

/// `job-dismiss`, `block-job-dismiss`.
pub(super) fn dismiss(context: &Context, family: Family, args: Args<'_>) -> Outcome {
    let job = family.find(context, args)?;
    context.workshop.jobs.dismiss(&job)?;
    Ok(json!({}))
}

/// `block-job-change` of the copy mode. A mirror's is changed whatever `type` says, as in QEMU; a commit's, which
/// QEMU has not, only by its own.
pub(super) fn change(context: &Context, args: Args<'_>) -> Outcome {
    let job = Family::Id.find(context, args)?;
    Verb::Change.check(job.id(), job.status())?;
    let is_meant = args.str("type") == Some(job.kind().name());
    let mode = match job.kind() {
        JobKind::Mirror => Some(copy_mode(args).unwrap_or_default()),
        _ => copy_mode(args).filter(|_| is_meant),
    };
    match mode {
        Some(mode) => job.change_copy_mode(mode)?,
        None => return Err(QmpError::generic("Job type does not support change")),
    }
    Ok(json!({}))
}

/// The argument `copy-mode`.
pub(super) fn copy_mode(args: Args<'_>) -> Option<CopyMode> {
    Some(match args.str("copy-mode")? {
        "write-blocking" => CopyMode::WriteBlocking,
        _ => CopyMode::Background,
    })
}

/// The argument that says what is done about I/O errors.
pub(super) fn policy(args: Args<'_>, name: &str) -> ErrorPolicy {
    let named = args.str(name).and_then(ErrorPolicy::named);
    named.unwrap_or_default()
}

/// An argument that is a text of its own.
pub(super) fn text(args: Args<'_>, name: &str) -> Option<String> {
    args.str(name).map(str::to_owned)
}

/// A job with nothing to do has ended before its command answers.
pub(super) async fn let_short_job_end(job: &Job) {
    if job.ends_at_once() {
        job.until_over().await;
    }
}
