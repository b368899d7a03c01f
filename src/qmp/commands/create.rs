//! `blockdev-create`: a new image, made by a job.

use std::cell::Cell;
use std::rc::{Rc, Weak};

use serde_json::{Value, json};

use super::{Context, Outcome, node};
use crate::error::{Error, ErrorKind, Result};
use crate::format::qcow2::create::{CreateOptions, Preallocation};
use crate::format::qcow2::header::{BackingReference, CompressionType};
use crate::job::{Job, JobKind, JobOptions, LocalFuture, Work};
use crate::qmp::error::QmpError;
use crate::qmp::schema::Args;

/// What is to be made.
enum Plan {
    /// Nothing; the job fails with this, as in QEMU.
    Refuse(&'static str),
    File {
        filename: String,
        size: u64,
    },
    Qcow2 {
        file: Value,
        options: Box<CreateOptions>,
    },
}

/// Starts the job; it works when nobody else changes the graph.
pub(super) fn start(context: &Rc<Context>, arguments: Value) -> Outcome {
    let args = Args::new(&arguments);
    let Some(options) = args.object("options") else {
        unreachable!("the schema makes 'options' mandatory");
    };
    let plan = plan(options)?;
    let options = JobOptions {
        id: args.required_str("job-id").to_owned(),
        speed: 0,
        auto_finalize: true,
        auto_dismiss: false,
    };
    let jobs = &context.workshop.jobs;
    let job = jobs.create(JobKind::Create, options)?;
    let work = CreateWork {
        context: Rc::downgrade(context),
        plan: Cell::new(Some(plan)),
    };
    job.set_total(1);
    jobs.start(&job, Rc::new(work));
    Ok(json!({}))
}

struct CreateWork {
    context: Weak<Context>,
    plan: Cell<Option<Plan>>,
}

impl Work for CreateWork {
    fn run(self: Rc<Self>, job: Rc<Job>) -> LocalFuture<'static, Result<()>> {
        Box::pin(async move {
            let (Some(context), Some(plan)) = (self.context.upgrade(), self.plan.take()) else {
                return Ok(());
            };
            let _turn = context.changes.lock().await;
            if job.is_cancelled() {
                return Ok(());
            }
            let result = carry_out(&context, plan).await;
            job.set_current(1);
            // Clients are told all of it, not only the errno's text.
            result.map_err(|error| Error::new(ErrorKind::InvalidArgument, error.desc))
        })
    }

    fn prepare(&self) -> LocalFuture<'_, Result<()>> {
        Box::pin(async { Ok(()) })
    }

    fn clean(&self, _succeeded: bool) -> LocalFuture<'_, ()> {
        Box::pin(async {})
    }
}

fn plan(args: Args<'_>) -> Result<Plan, QmpError> {
    let size = args.u64("size").unwrap_or(0);
    if args.str("backing-fmt").is_some() && args.str("backing-file").is_none() {
        let text = "Backing format cannot be used without backing file";
        return Ok(Plan::Refuse(text));
    }
    match args.required_str("driver") {
        "file" => Ok(Plan::File {
            filename: args.required_str("filename").into(),
            size,
        }),
        "qcow2" => Ok(Plan::Qcow2 {
            file: args.value("file").cloned().unwrap_or_default(),
            options: Box::new(qcow2_options(args, size)),
        }),
        _ => Err(QmpError::generic("Driver does not support blockdev-create")),
    }
}

fn qcow2_options(args: Args<'_>, size: u64) -> CreateOptions {
    let defaults = CreateOptions::new(size);
    let bits = args.i64("refcount-bits");
    CreateOptions {
        version: if args.str("version") == Some("v2") {
            2
        } else {
            3
        },
        cluster_size: args.u64("cluster-size").unwrap_or(defaults.cluster_size),
        // A negative number is none of the widths; the job says so.
        refcount_bits: bits.map_or(defaults.refcount_bits, |bits| {
            u64::try_from(bits).unwrap_or(0)
        }),
        lazy_refcounts: args.bool("lazy-refcounts").unwrap_or(false),
        compression: match args.str("compression-type") {
            Some("zstd") => CompressionType::Zstd,
            _ => CompressionType::Deflate,
        },
        backing: args.str("backing-file").map(|file| BackingReference {
            file: file.into(),
            format: args.str("backing-fmt").map(str::to_owned),
        }),
        preallocation: match args.str("preallocation") {
            Some("metadata") => Preallocation::Metadata,
            _ => Preallocation::Off,
        },
        ..defaults
    }
}

async fn carry_out(context: &Context, plan: Plan) -> Result<(), QmpError> {
    match plan {
        Plan::Refuse(text) => return Err(QmpError::generic(text)),
        Plan::File { filename, size } => context.blockdev.create_file(&filename, size).await?,
        Plan::Qcow2 { file, options } => {
            let file = node::options(file);
            context.blockdev.create_qcow2(file, &options).await?;
        }
    }
    Ok(())
}
