//! What the commands do: [`Context`] is everything they act on, and the table says which code is whose.
//!
//! Arguments have passed the schema. Commands turn them into the typed options of the layers below and
//! results into JSON; whatever more they decide belongs into those layers.

mod backup;
mod bitmap;
mod block_graph;
mod chain_job;
mod control;
mod create;
mod device;
mod export;
mod graph_events;
mod images;
mod iothread;
mod job;
mod mirror;
mod node;
mod node_info;
mod object;
mod qom;
mod snapshot;
mod statistics;
mod transaction;

#[cfg(test)]
mod tests;

use std::cell::Cell;
use std::future::ready;
use std::path::PathBuf;
use std::rc::Rc;

use serde_json::{Value, json};

use self::images::OpenImages;
use self::job::Family;
use super::LocalFuture;
use super::error::QmpError;
use super::events::EventBus;
use super::limited_events::LimitedEvents;
use super::monitor::Commands;
use super::schema::{self, Args};
use super::session::Request;
use crate::block::Graph;
use crate::blockdev::Blockdev;
use crate::export::Exports;
use crate::export::nbd::NbdService;
use crate::job::{Jobs, Workshop};
use crate::runtime::Handle;
use crate::runtime::sync::{Event, Mutex};

pub use node_info::image_info;
pub use object::Objects;

/// Everything that commands act on.
pub struct Context {
    handle: Handle,
    graph: Graph,
    blockdev: Blockdev,
    exports: Exports,
    nbd: NbdService,
    objects: Objects,
    workshop: Workshop,
    events: EventBus,
    running: Cell<bool>,
    /// One command at a time.
    turn: Mutex<()>,
    /// Held by whoever changes the graph over an await: commands and the last steps of jobs.
    changes: Rc<Mutex<()>>,
    quitting: Cell<bool>,
    quit: Event,
    /// No node has failed to close.
    clean: Cell<bool>,
}

pub(crate) use snapshot::{date_of, snapshot_info};

type Outcome = Result<Value, QmpError>;
type Handler = fn(Rc<Context>, Value) -> LocalFuture<Outcome>;

/// Every command of the schema (the session itself answers `qmp_capabilities`).
static HANDLERS: &[(&str, Handler)] = &[
    ("query-version", |context, _| done(Ok(context.version()))),
    ("query-commands", |_, _| done(control::query_commands())),
    ("query-qmp-schema", |_, _| done(Ok(schema::introspect()))),
    ("query-status", |context, _| {
        done(control::query_status(&context))
    }),
    ("stop", |context, _| {
        done(control::set_running(&context, false))
    }),
    ("cont", |context, _| {
        done(control::set_running(&context, true))
    }),
    ("quit", |context, _| {
        Box::pin(async move {
            context.shut_down().await;
            context.quitting.set(true);
            Ok(json!({}))
        })
    }),
    ("object-add", |context, args| {
        done(object::add(&context, Args::new(&args)))
    }),
    ("object-del", |context, args| {
        done(object::remove(
            &context,
            Args::new(&args).required_str("id"),
        ))
    }),
    ("qom-get", |context, args| {
        done(qom::read(&context, Args::new(&args)))
    }),
    ("qom-set", |context, args| {
        done(qom::write(&context, Args::new(&args)))
    }),
    ("blockdev-add", |context, args| {
        Box::pin(async move { node::add(&context, args).await })
    }),
    ("blockdev-del", |context, args| {
        Box::pin(async move { node::remove(&context, Args::new(&args)).await })
    }),
    ("blockdev-reopen", |context, args| {
        Box::pin(async move { node::reopen(&context, args).await })
    }),
    ("blockdev-snapshot-sync", |context, args| {
        Box::pin(async move { snapshot::create(&context, Args::new(&args)).await })
    }),
    ("blockdev-snapshot", |context, args| {
        Box::pin(async move { snapshot::attach(&context, Args::new(&args)).await })
    }),
    ("blockdev-snapshot-internal-sync", |context, args| {
        Box::pin(async move { snapshot::create_internal(&context, Args::new(&args)).await })
    }),
    ("blockdev-snapshot-delete-internal-sync", |context, args| {
        Box::pin(async move { snapshot::delete_internal(&context, Args::new(&args)).await })
    }),
    ("transaction", |context, args| {
        Box::pin(async move { transaction::run(&context, Args::new(&args)).await })
    }),
    ("change-backing-file", |context, args| {
        Box::pin(async move { snapshot::change_backing_file(&context, Args::new(&args)).await })
    }),
    ("block-dirty-bitmap-add", |context, args| {
        Box::pin(async move { bitmap::run(&context, "add", Args::new(&args)).await })
    }),
    ("block-dirty-bitmap-remove", |context, args| {
        Box::pin(async move { bitmap::run(&context, "remove", Args::new(&args)).await })
    }),
    ("block-dirty-bitmap-clear", |context, args| {
        Box::pin(async move { bitmap::run(&context, "clear", Args::new(&args)).await })
    }),
    ("block-dirty-bitmap-enable", |context, args| {
        Box::pin(async move { bitmap::run(&context, "enable", Args::new(&args)).await })
    }),
    ("block-dirty-bitmap-disable", |context, args| {
        Box::pin(async move { bitmap::run(&context, "disable", Args::new(&args)).await })
    }),
    ("block-dirty-bitmap-merge", |context, args| {
        Box::pin(async move { bitmap::run(&context, "merge", Args::new(&args)).await })
    }),
    ("x-debug-block-dirty-bitmap-sha256", |context, args| {
        done(bitmap::sha256(&context, Args::new(&args)))
    }),
    ("query-named-block-nodes", |context, args| {
        done(node_info::query_nodes(&context, Args::new(&args)))
    }),
    ("query-block", |context, _| {
        done(node_info::query_devices(&context))
    }),
    ("query-blockstats", |context, args| {
        done(statistics::query(&context, Args::new(&args)))
    }),
    ("x-debug-query-block-graph", |context, _| {
        done(block_graph::query(&context))
    }),
    ("block_resize", |context, args| {
        Box::pin(async move { device::resize(&context, Args::new(&args)).await })
    }),
    ("blockdev-create", |context, args| {
        done(create::start(&context, args))
    }),
    ("blockdev-backup", |context, args| {
        Box::pin(async move { backup::start(&context, Args::new(&args)).await })
    }),
    ("drive-backup", |context, args| {
        Box::pin(async move { backup::drive(&context, Args::new(&args)).await })
    }),
    ("block-stream", |context, args| {
        Box::pin(async move { chain_job::stream(&context, Args::new(&args)).await })
    }),
    ("block-commit", |context, args| {
        Box::pin(async move { chain_job::commit(&context, Args::new(&args)).await })
    }),
    ("blockdev-mirror", |context, args| {
        Box::pin(async move { mirror::blockdev(&context, Args::new(&args)).await })
    }),
    ("drive-mirror", |context, args| {
        Box::pin(async move { mirror::drive(&context, Args::new(&args)).await })
    }),
    ("query-jobs", |context, _| done(job::query(&context))),
    ("query-block-jobs", |context, _| {
        done(job::query_block_jobs(&context))
    }),
    ("job-pause", |context, args| {
        done(job::pause(&context, Family::Any, Args::new(&args)))
    }),
    ("block-job-pause", |context, args| {
        done(job::pause(&context, Family::Device, Args::new(&args)))
    }),
    ("job-resume", |context, args| {
        done(job::resume(&context, Family::Any, Args::new(&args)))
    }),
    ("block-job-resume", |context, args| {
        done(job::resume(&context, Family::Device, Args::new(&args)))
    }),
    ("job-complete", |context, args| {
        done(job::complete(&context, Family::Any, Args::new(&args)))
    }),
    ("block-job-complete", |context, args| {
        done(job::complete(&context, Family::Device, Args::new(&args)))
    }),
    ("job-dismiss", |context, args| {
        done(job::dismiss(&context, Family::Any, Args::new(&args)))
    }),
    ("block-job-dismiss", |context, args| {
        done(job::dismiss(&context, Family::Id, Args::new(&args)))
    }),
    ("job-cancel", |context, args| {
        Box::pin(async move { job::cancel(&context, Family::Any, Args::new(&args)).await })
    }),
    ("block-job-cancel", |context, args| {
        Box::pin(async move { job::cancel(&context, Family::Device, Args::new(&args)).await })
    }),
    ("job-finalize", |context, args| {
        Box::pin(async move { job::finalize(&context, Family::Any, Args::new(&args)).await })
    }),
    ("block-job-finalize", |context, args| {
        Box::pin(async move { job::finalize(&context, Family::Id, Args::new(&args)).await })
    }),
    ("block-job-set-speed", |context, args| {
        done(job::set_speed(&context, Args::new(&args)))
    }),
    ("block-job-change", |context, args| {
        done(job::change(&context, Args::new(&args)))
    }),
    ("block-export-add", |context, args| {
        Box::pin(async move { export::add(&context, Args::new(&args)).await })
    }),
    ("block-export-del", |context, args| {
        Box::pin(async move { export::remove(&context, Args::new(&args)).await })
    }),
    ("query-block-exports", |context, _| {
        done(export::query(&context))
    }),
    ("nbd-server-start", |context, args| {
        Box::pin(async move { export::start_nbd_server(&context, Args::new(&args)).await })
    }),
    ("nbd-server-stop", |context, _| {
        Box::pin(async move { export::stop_nbd_server(&context).await })
    }),
    ("nbd-server-add", |context, args| {
        done(export::add_to_nbd_server(&context, Args::new(&args)))
    }),
    ("nbd-server-remove", |context, args| {
        Box::pin(async move { export::remove_from_nbd_server(&context, Args::new(&args)).await })
    }),
];

/// Commands that wait for jobs, whose last steps change the graph.
const LOCK_FOR_THEMSELVES: &[&str] = &[
    "quit",
    "block-stream",
    "block-commit",
    "job-cancel",
    "job-finalize",
    "block-job-cancel",
    "block-job-finalize",
];

fn done(outcome: Outcome) -> LocalFuture<Outcome> {
    Box::pin(ready(outcome))
}

impl Context {
    /// Where is kept what images that are opened from now on cannot hold.
    pub fn set_state_directory(&self, directory: Option<PathBuf>) {
        self.blockdev.set_state_directory(directory);
    }

    /// Nothing is open yet.
    pub fn new(handle: &Handle) -> Rc<Context> {
        let graph = Graph::new();
        let changes = Rc::new(Mutex::new(()));
        let blockdev = Blockdev::new(handle, &graph);
        let workshop = Workshop {
            graph: graph.clone(),
            jobs: Jobs::new(handle, &changes),
            images: Rc::new(OpenImages(blockdev.clone())),
        };
        let exports = Exports::new(handle.clone(), graph.clone());
        let context = Rc::new(Context {
            handle: handle.clone(),
            blockdev,
            nbd: NbdService::new(exports.clone()),
            graph,
            exports,
            objects: Objects::default(),
            workshop,
            events: EventBus::new(),
            running: Cell::new(true),
            turn: Mutex::new(()),
            changes,
            quitting: Cell::new(false),
            quit: Event::new(),
            clean: Cell::new(true),
        });
        context.announce_events();
        context
    }

    /// Carries out a command whose arguments were checked; the command line's options do it too.
    ///
    /// # Errors
    /// What the command says.
    pub async fn execute(self: &Rc<Self>, command: &str, arguments: Value) -> Outcome {
        let Some((_, handler)) = HANDLERS.iter().find(|(name, _)| *name == command) else {
            unreachable!("the schema has a command '{command}' without code");
        };
        let _turn = self.turn.lock().await;
        let _changes = if LOCK_FOR_THEMSELVES.contains(&command) {
            None
        } else {
            Some(self.changes.lock().await)
        };
        let outcome = handler(self.clone(), arguments).await;
        // Who has changed the graph has perhaps put a node of another size under an export. What cannot be told
        // was logged.
        let _ = self.exports.update_sizes().await;
        outcome
    }

    /// Starts the NBD server with options in the command line's form (a flat address).
    ///
    /// # Errors
    /// As `nbd-server-start`.
    pub async fn start_nbd_server(&self, options: &Value) -> Result<(), QmpError> {
        export::start_nbd_server(self, Args::new(options)).await?;
        Ok(())
    }

    /// Where events go.
    pub fn events(&self) -> &EventBus {
        &self.events
    }

    /// Waits until a client has said `quit` and was answered.
    pub async fn wait_for_quit(&self) {
        self.quit.wait().await;
    }

    /// Ends exports, then closes all nodes. Does nothing the second time. False if an image may not be
    /// clean; the log says which and why.
    pub async fn shut_down(&self) -> bool {
        // Exports first: they would follow the jobs' last steps for nothing.
        self.exports.remove_all(|_| true).await;
        if self.nbd.is_running()
            && let Err(error) = self.nbd.stop().await
        {
            tracing::error!(%error, "NBD server did not stop");
        }
        self.workshop.jobs.end_all().await;
        let _turn = self.changes.lock().await;
        let mut clean = self.clean.get();
        if let Err(error) = self.blockdev.close_all().await {
            tracing::error!(%error, "an image was not closed cleanly");
            clean = false;
        }
        self.clean.set(clean);
        clean
    }

    fn announce_events(&self) {
        let events = self.events.clone();
        self.exports
            .on_deleted(move |id| events.emit("BLOCK_EXPORT_DELETED", json!({"id": id})));
        let events = self.events.clone();
        self.workshop.jobs.on_event(move |event| {
            let (name, data) = job::event(event);
            events.emit(name, data);
        });
        let exports = self.exports.clone();
        self.workshop.jobs.on_event(move |event| {
            if event.is_end() {
                // A base that took the place of the layers above it may be longer than they were.
                let (exports, handle) = (exports.clone(), exports.handle().clone());
                let told = async move { drop(exports.update_sizes().await) };
                handle.spawn(told).detach();
            }
        });
        let events = self.events.clone();
        let limited = LimitedEvents::new(self.workshop.jobs.handle(), &events);
        self.graph
            .on_event(move |event| graph_events::tell(&events, &limited, event));
    }
}

impl Commands for Context {
    fn run(self: Rc<Self>, request: Request) -> LocalFuture<Value> {
        Box::pin(async move {
            let (name, arguments, answer) = request.into_parts();
            let result = self.execute(name, arguments).await;
            if let Err(error) = &result {
                tracing::debug!(command = name, %error, "command failed");
            }
            answer.reply(result)
        })
    }

    fn version(&self) -> Value {
        control::version()
    }

    fn replied(&self) {
        if self.quitting.get() {
            self.quit.set();
        }
    }
}
