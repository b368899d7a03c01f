//! Monitors: one client at a time each, served over the ring; the next one waits in the backlog.
//!
//! What a client is sent (greeting, replies, events) goes through one queue, so that nothing is ever
//! inside something else. Input is not read on while a command of the same client runs.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use serde_json::Value;

use super::LocalFuture;
use super::connection::Connection;
use super::endpoint::Endpoint;
use super::events::{EventBus, Subscriber};
use super::json::{self, Style};
use super::session::{Request, Session, Step};
use crate::error::Result;
use crate::runtime::sync::mpsc::{self, Receiver, Sender};
use crate::runtime::{Handle, Task};

/// How long a client that leaves, or is left, may take to read what is still for it.
const LINGER: Duration = Duration::from_secs(2);

/// Bytes that may wait for a client to read them; one that is further behind is disconnected.
const BACKLOG_MAX: usize = 64 << 20;

/// Who runs commands.
pub trait Commands {
    /// Runs a command that passed the session's checks.
    fn run(self: Rc<Self>, request: Request) -> LocalFuture<Value>;

    /// What `query-version` gives and the greeting shows.
    fn version(&self) -> Value;

    /// The reply to a command was queued: who waited for that may go on.
    fn replied(&self);
}

/// A monitor and its present client.
pub struct Monitor {
    handle: Handle,
    commands: Rc<dyn Commands>,
    events: EventBus,
    style: Style,
    client: RefCell<Option<Rc<Client>>>,
    writer: RefCell<Option<Task<()>>>,
}

impl Monitor {
    /// Serves the endpoint's clients from now on.
    pub fn start(
        handle: &Handle,
        commands: Rc<dyn Commands>,
        events: EventBus,
        endpoint: Endpoint,
        style: Style,
    ) -> Rc<Monitor> {
        let monitor = Rc::new(Monitor {
            handle: handle.clone(),
            commands,
            events,
            style,
            client: RefCell::default(),
            writer: RefCell::default(),
        });
        handle.spawn(monitor.clone().serve(endpoint)).detach();
        monitor
    }

    /// Lets the client have what is queued for it, and leaves it.
    pub async fn close(&self) {
        if let Some(client) = self.client.take() {
            client.queue.take();
        }
        let writer = self.writer.take();
        if let Some(writer) = writer {
            // A client that does not read must not hold up the end.
            let _ = self.handle.timeout(LINGER, writer).await;
        }
    }

    async fn serve(self: Rc<Self>, endpoint: Endpoint) {
        match endpoint {
            Endpoint::Null => {}
            Endpoint::Connected(socket) => {
                self.serve_client(Connection::socket(&self.handle, socket))
                    .await;
            }
            Endpoint::Stdio { input, output } => {
                self.serve_client(Connection::files(&self.handle, input, output))
                    .await;
            }
            Endpoint::Listening { listener, first } => {
                if let Some(socket) = first {
                    self.serve_client(Connection::socket(&self.handle, socket))
                        .await;
                }
                let listener = self.handle.ring().file(listener);
                loop {
                    match self.handle.ring().accept(&listener).await {
                        Ok(socket) => {
                            self.serve_client(Connection::socket(&self.handle, socket))
                                .await;
                        }
                        Err(error) => {
                            tracing::error!(%error, "monitor cannot accept a client");
                            self.handle.sleep(Duration::from_secs(1)).await;
                        }
                    }
                }
            }
        }
    }

    async fn serve_client(&self, connection: Connection) {
        let connection = Rc::new(connection);
        let (queue, queued) = mpsc::unbounded();
        let client = Rc::new(Client {
            queue: RefCell::new(Some(queue)),
            waiting: Rc::default(),
            style: self.style,
            wants_events: Cell::new(false),
        });
        let subscriber: Rc<dyn Subscriber> = client.clone();
        self.events.subscribe(&subscriber);
        drop(subscriber);
        let writer = write_out(connection.clone(), queued, client.waiting.clone());
        *self.writer.borrow_mut() = Some(self.handle.spawn(writer));
        *self.client.borrow_mut() = Some(client.clone());
        client.send(&Session::greeting(self.commands.version()));
        if let Err(error) = self.converse(&connection, client).await {
            tracing::debug!(%error, "monitor client is gone");
        }
        self.close().await;
    }

    async fn converse(&self, connection: &Connection, client: Rc<Client>) -> Result<()> {
        let mut session = Session::default();
        loop {
            let bytes = connection.read().await?;
            if bytes.is_empty() {
                return Ok(());
            }
            session.receive(&bytes);
            while let Some(step) = session.next_step() {
                let (reply, ran) = match step {
                    Step::Answer(reply) => (reply, false),
                    Step::Run(request) => (self.commands.clone().run(request).await, true),
                };
                client.wants_events.set(session.wants_events());
                client.send(&reply);
                if ran {
                    self.commands.replied();
                }
                if client.is_hopelessly_behind() {
                    tracing::warn!("monitor client does not read its replies and is disconnected");
                    return Ok(());
                }
            }
        }
    }
}

/// A client that is connected.
struct Client {
    /// Taken away when the client is left: the writer ends after what is queued.
    queue: RefCell<Option<Sender<Vec<u8>>>>,
    waiting: Rc<Cell<usize>>,
    style: Style,
    wants_events: Cell<bool>,
}

impl Client {
    fn send(&self, message: &Value) {
        let queue = self.queue.borrow();
        let Some(queue) = &*queue else { return };
        let bytes = json::write(message, self.style);
        self.waiting.set(self.waiting.get() + bytes.len());
        // Where the writer is gone the client is, too; the reader notices.
        let _ = queue.try_send(bytes);
    }

    fn is_hopelessly_behind(&self) -> bool {
        self.waiting.get() > BACKLOG_MAX
    }
}

impl Subscriber for Client {
    fn event(&self, event: &Value) {
        if self.wants_events.get() && !self.is_hopelessly_behind() {
            self.send(event);
        }
    }
}

async fn write_out(
    connection: Rc<Connection>,
    mut queued: Receiver<Vec<u8>>,
    waiting: Rc<Cell<usize>>,
) {
    while let Some(bytes) = queued.recv().await {
        if let Err(error) = connection.write_all(&bytes).await {
            tracing::debug!(%error, "monitor client does not listen");
            return;
        }
        waiting.set(waiting.get().saturating_sub(bytes.len()));
    }
}
