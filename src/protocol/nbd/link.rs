//! The way to a server: one connection at a time, made again when it is lost.

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;

use crate::buffer::MemorySlice;
use crate::error::{Error, Result};
use crate::nbd::{
    Body, MAGIC_LENGTH, MAX_HEADER_REST, Question, ReplyHeader, ReplyMode, Terms, Told,
};
use crate::range::ByteRange;
use crate::runtime::sync::{Notify, Semaphore, oneshot};
use crate::runtime::{Handle, Instant, Task};

use super::NbdOptions;
use super::ledger::{Ledger, Request};
use super::reconnect::{ATTEMPT, PAUSES, attempt};
use super::stream::{Input, Stream};

/// Requests in flight at most; QEMU's server takes 16 at a time and leaves others in the socket.
const MOST_REQUESTS: usize = 64;
/// A drained section waits this long for a server that says nothing.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often that is looked at.
const WATCH: Duration = Duration::from_secs(1);
/// How long a server may take to close its side.
const GOODBYE: Duration = Duration::from_secs(1);

/// A server and the requests to it.
pub(super) struct Link {
    pub(super) handle: Handle,
    pub(super) options: NbdOptions,
    pub(super) terms: Terms,
    pub(super) ledger: RefCell<Ledger>,
    pub(super) phase: RefCell<Phase>,
    slots: Rc<Semaphore>,
    /// Something is to be sent.
    work: Notify,
    /// The phase or what waits has changed.
    pub(super) attention: Notify,
    pub(super) hurried: Cell<u32>,
    watched: Cell<bool>,
    pub(super) heard: Cell<Instant>,
    /// When the connection was lost, until a request is answered again.
    pub(super) lost_at: Cell<Option<Instant>>,
    /// No attempt is made before.
    pub(super) next_attempt: Cell<Instant>,
    pub(super) pause: Cell<Duration>,
    runner: RefCell<Option<Task<()>>>,
}

pub(super) enum Phase {
    Connected(Stream),
    /// Lost; requests wait.
    Waiting,
    /// Lost; requests fail, but for one that tries anew.
    Down,
    Closed,
}

impl Link {
    /// Connects; within `open_timeout` again and again.
    ///
    /// # Errors
    /// The last attempt's.
    pub(super) async fn open(handle: &Handle, options: NbdOptions) -> Result<Rc<Link>> {
        let deadline = handle.now() + options.open_timeout;
        let mut pause = PAUSES.0;
        let (stream, terms) = loop {
            match attempt(handle, &options, ATTEMPT).await {
                Ok(opened) => break opened,
                Err(error) if handle.now() + pause > deadline => return Err(error),
                Err(error) => tracing::debug!(%error, "NBD server is tried again"),
            }
            handle.sleep(pause).await;
            pause = (pause * 2).min(PAUSES.1);
        };
        let now = handle.now();
        let link = Rc::new(Link {
            handle: handle.clone(),
            options,
            terms,
            ledger: RefCell::new(Ledger::new(terms.mode, terms.allocation)),
            phase: RefCell::new(Phase::Connected(stream.clone())),
            slots: Rc::new(Semaphore::new(MOST_REQUESTS)),
            work: Notify::new(),
            attention: Notify::new(),
            hurried: Cell::new(0),
            watched: Cell::new(false),
            heard: Cell::new(now),
            lost_at: Cell::new(None),
            next_attempt: Cell::new(now),
            pause: Cell::new(PAUSES.0),
            runner: RefCell::new(None),
        });
        let runner = handle.spawn(link.clone().run(stream));
        link.runner.replace(Some(runner));
        Ok(link)
    }

    /// What was agreed on when the node was opened; later connections are no worse.
    pub(super) fn terms(&self) -> &Terms {
        &self.terms
    }

    /// Asks the server, in its turn.
    ///
    /// # Errors
    /// The server's; `EIO` where it cannot be reached.
    pub(super) async fn ask(
        self: &Rc<Link>,
        question: Question,
        range: ByteRange,
        memory: Option<MemorySlice>,
    ) -> Result<Told> {
        let permit = self.slots.acquire_owned(1).await;
        self.check_reachable()?;
        if question == Question::Flush {
            self.ledger.borrow_mut().check_lost()?;
        }
        let told = self.add(Request {
            question,
            range,
            memory,
            permit,
        });
        self.work.notify_one();
        self.attention.notify_one();
        if self.hurried.get() > 0 {
            self.watch();
        }
        told.await.unwrap_or_else(|| Err(unreachable_server()))
    }

    fn add(&self, request: Request) -> oneshot::Receiver<Result<Told>> {
        let mut ledger = self.ledger.borrow_mut();
        if ledger.is_empty() {
            self.heard.set(self.handle.now());
        }
        ledger.add(request)
    }

    /// A loss that a server without flush is not asked about.
    ///
    /// # Errors
    /// What was written before may be lost.
    pub(super) fn check_lost(&self) -> Result<()> {
        self.ledger.borrow_mut().check_lost()
    }

    fn check_reachable(&self) -> Result<()> {
        let fails = match &*self.phase.borrow() {
            Phase::Connected(_) | Phase::Waiting => false,
            Phase::Down => self.hurried.get() > 0 || self.handle.now() < self.next_attempt.get(),
            Phase::Closed => true,
        };
        match fails {
            true => Err(unreachable_server()),
            false => Ok(()),
        }
    }

    /// While this holds nothing waits for a connection, and not for ever for a server that is silent.
    pub(super) fn set_hurried(self: &Rc<Link>, hurried: bool) {
        if !hurried {
            self.hurried.set(self.hurried.get() - 1);
            return;
        }
        self.hurried.set(self.hurried.get() + 1);
        let connected = matches!(&*self.phase.borrow(), Phase::Connected(_));
        if connected {
            self.watch();
        } else {
            self.give_up();
        }
    }

    /// Requests fail until there is a connection.
    pub(super) fn give_up(&self) {
        let mut phase = self.phase.borrow_mut();
        if matches!(&*phase, Phase::Waiting) {
            *phase = Phase::Down;
        }
        drop(phase);
        self.ledger.borrow_mut().fail_all(unreachable_server);
        self.attention.notify_one();
    }

    /// Looks after a server that a drained section waits for.
    fn watch(self: &Rc<Link>) {
        if self.ledger.borrow().is_empty() || self.watched.replace(true) {
            return;
        }
        let link = self.clone();
        let watch = async move {
            let begin = link.handle.now();
            while link.hurried.get() > 0 && !link.ledger.borrow().is_empty() {
                link.handle.sleep(WATCH).await;
                let since = link.heard.get().max(begin);
                if link.handle.now().saturating_since(since) < PATIENCE {
                    continue;
                }
                if let Phase::Connected(stream) = &*link.phase.borrow() {
                    tracing::error!("NBD server is silent while the graph is to change");
                    stream.shut_down();
                }
            }
            link.watched.set(false);
        };
        self.handle.spawn(watch).detach();
    }

    /// Says goodbye; nothing is asked any more.
    pub(super) async fn close(&self) {
        let before = self.phase.replace(Phase::Closed);
        self.work.notify_one();
        self.attention.notify_one();
        let runner = self.runner.take();
        let Some(runner) = runner else { return };
        if let Phase::Connected(stream) = before {
            if self.handle.timeout(GOODBYE, runner).await.is_err() {
                stream.shut_down();
            }
        } else {
            runner.abort();
            self.ledger.borrow_mut().fail_all(unreachable_server);
        }
    }

    /// As [`Link::close`], at once.
    pub(super) fn cut(&self) {
        if let Phase::Connected(stream) = self.phase.replace(Phase::Closed) {
            stream.shut_down();
        }
        self.work.notify_one();
        self.attention.notify_one();
    }

    async fn run(self: Rc<Link>, mut stream: Stream) {
        loop {
            self.transmit(&stream).await;
            if self.is_closed() {
                self.ledger.borrow_mut().fail_all(unreachable_server);
                return;
            }
            self.lose_connection();
            match self.reconnect().await {
                Some(again) => stream = again,
                None => return,
            }
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        matches!(&*self.phase.borrow(), Phase::Closed)
    }

    /// Until the connection is of no use any more.
    async fn transmit(self: &Rc<Link>, stream: &Stream) {
        let sender = self.handle.spawn(self.clone().send(stream.clone()));
        if let Err(error) = self.receive(stream).await
            && !self.is_closed()
        {
            tracing::warn!(%error, "connection to an NBD server is lost");
        }
        stream.shut_down();
        self.stop_sending();
        sender.await;
    }

    fn stop_sending(&self) {
        let mut phase = self.phase.borrow_mut();
        if matches!(&*phase, Phase::Connected(_)) {
            *phase = Phase::Waiting;
        }
        drop(phase);
        self.work.notify_one();
    }

    async fn send(self: Rc<Link>, stream: Stream) {
        loop {
            let current = matches!(&*self.phase.borrow(), Phase::Connected(now) if now.is(&stream));
            if !current {
                break;
            }
            let messages = self.ledger.borrow_mut().take_messages();
            if messages.is_empty() {
                self.work.notified().await;
            }
            for message in messages {
                if let Err(error) = stream.send(&message).await {
                    tracing::debug!(%error, "sending to an NBD server");
                    stream.shut_down();
                    return;
                }
            }
        }
        if self.is_closed() {
            let goodbye = Question::Disconnect.encode(0, ByteRange::between(0, 0));
            // Nobody is there to hear it, or it is heard.
            let _ = stream.send(&MemorySlice::from_bytes(&goodbye)).await;
            stream.shut_down();
        }
    }

    async fn receive(&self, stream: &Stream) -> Result<()> {
        let mut input = Input::new(stream.clone());
        loop {
            let mut magic = [0; MAGIC_LENGTH];
            input.read_bytes(&mut magic).await?;
            let mut rest = [0; MAX_HEADER_REST];
            let rest = &mut rest[..ReplyHeader::rest_length(self.mode(), magic)?];
            input.read_bytes(rest).await?;
            let header = ReplyHeader::decode(rest)?;
            self.take_reply(&header, &mut input).await?;
            self.heard.set(self.handle.now());
            if header.last {
                self.ledger.borrow_mut().finish(header.cookie)?;
                self.lost_at.set(None);
                self.pause.set(PAUSES.0);
            }
        }
    }

    fn mode(&self) -> ReplyMode {
        self.ledger.borrow().mode()
    }

    async fn take_reply(&self, header: &ReplyHeader, input: &mut Input) -> Result<()> {
        let cookie = header.cookie;
        let body = self
            .ledger
            .borrow_mut()
            .answer_to(cookie)?
            .0
            .begin(header)?;
        match body {
            Body::Nothing => Ok(()),
            Body::Whole => {
                let memory = self.memory(cookie)?;
                input.read(&memory).await
            }
            Body::Data(length) => {
                let mut offset = [0; 8];
                input.read_bytes(&mut offset).await?;
                let memory = self.memory(cookie)?;
                let at = self
                    .ledger
                    .borrow_mut()
                    .answer_to(cookie)?
                    .0
                    .data(offset, length)?;
                input.read(&memory.slice(at, length)).await
            }
            Body::Small(length) => {
                let mut bytes = vec![0; length];
                input.read_bytes(&mut bytes).await?;
                let memory = self.memory(cookie).ok();
                let mut ledger = self.ledger.borrow_mut();
                let hole = ledger.answer_to(cookie)?.0.payload(&bytes)?;
                if let (Some((at, length)), Some(memory)) = (hole, memory) {
                    memory.fill(at, length, 0);
                }
                Ok(())
            }
        }
    }

    fn memory(&self, cookie: u64) -> Result<MemorySlice> {
        let mut ledger = self.ledger.borrow_mut();
        let memory = ledger.answer_to(cookie)?.1.cloned();
        memory.ok_or_else(unreachable_server)
    }
}

pub(super) fn unreachable_server() -> Error {
    Error::from_errno(Errno::EIO, "The NBD server cannot be reached")
}
