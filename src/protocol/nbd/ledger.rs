//! What was asked of a server and not answered, and what was answered and is not durable.

use std::collections::{BTreeMap, VecDeque};

use nix::errno::Errno;

use crate::buffer::MemorySlice;
use crate::error::{Error, Result};
use crate::nbd::{Answer, Question, ReplyMode, Told};
use crate::range::ByteRange;
use crate::runtime::sync::{OwnedPermit, oneshot};

/// Data of a write up to this many bytes is sent together with its header.
const SMALL: usize = 16 << 10;
/// Bytes of messages that are sent together.
const BATCH: usize = 64 << 10;

/// Requests that wait for an answer. They own their memory: who asked may be gone.
pub(super) struct Ledger {
    mode: ReplyMode,
    allocation: u32,
    next_cookie: u64,
    pending: BTreeMap<u64, Pending>,
    unsent: VecDeque<u64>,
    /// Changes that were answered so far.
    changes: u64,
    /// As many of them are durable.
    durable: u64,
    /// Changes that were answered may be lost, and nobody was told.
    lost: bool,
}

struct Pending {
    request: Request,
    answer: Answer,
    sent: bool,
    /// Changes that were answered when it was sent.
    changes: u64,
    done: oneshot::Sender<Result<Told>>,
}

/// A request with its memory.
pub(super) struct Request {
    pub(super) question: Question,
    pub(super) range: ByteRange,
    /// What is written, or where what is read belongs.
    pub(super) memory: Option<MemorySlice>,
    pub(super) permit: OwnedPermit,
}

impl Ledger {
    pub(super) fn new(mode: ReplyMode, allocation: Option<u32>) -> Ledger {
        Ledger {
            mode,
            allocation: allocation.unwrap_or(0),
            next_cookie: 1,
            pending: BTreeMap::new(),
            unsent: VecDeque::new(),
            changes: 0,
            durable: 0,
            lost: false,
        }
    }

    /// The server says otherwise on a new connection: to what is sent from now on.
    pub(super) fn set_terms(&mut self, mode: ReplyMode, allocation: Option<u32>) {
        self.mode = mode;
        self.allocation = allocation.unwrap_or(0);
    }

    /// Takes a request; what becomes of it.
    pub(super) fn add(&mut self, request: Request) -> oneshot::Receiver<Result<Told>> {
        let (done, told) = oneshot::channel();
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let answer = Answer::new(request.question, request.range, self.mode, self.allocation);
        let pending = Pending {
            request,
            answer,
            sent: false,
            changes: 0,
            done,
        };
        self.pending.insert(cookie, pending);
        self.unsent.push_back(cookie);
        told
    }

    pub(super) fn mode(&self) -> ReplyMode {
        self.mode
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    /// What is to be sent next, with nothing between: headers and small data together.
    pub(super) fn take_messages(&mut self) -> Vec<MemorySlice> {
        let mut messages = Vec::new();
        let mut bytes = Vec::new();
        while bytes.len() < BATCH
            && messages.is_empty()
            && let Some(cookie) = self.unsent.pop_front()
        {
            let Some(pending) = self.pending.get_mut(&cookie) else {
                continue;
            };
            pending.sent = true;
            pending.changes = self.changes;
            let request = &pending.request;
            bytes.extend(request.question.encode(cookie, request.range));
            let (Question::Write { .. }, Some(memory)) = (request.question, &request.memory) else {
                continue;
            };
            if memory.length() <= SMALL {
                bytes.extend(memory.to_vec());
            } else {
                messages.push(memory.clone());
            }
        }
        if !bytes.is_empty() {
            messages.insert(0, MemorySlice::from_bytes(&bytes));
        }
        messages
    }

    /// The answer in the making to the request of this cookie, and its memory.
    pub(super) fn answer_to(&mut self, cookie: u64) -> Result<(&mut Answer, Option<&MemorySlice>)> {
        match self.pending.get_mut(&cookie).filter(|pending| pending.sent) {
            Some(pending) => Ok((&mut pending.answer, pending.request.memory.as_ref())),
            None => {
                let message = format!("The NBD server answers a request {cookie:#x} that is none");
                Err(Error::from_errno(Errno::EIO, message))
            }
        }
    }

    /// The last chunk of an answer was taken.
    ///
    /// # Errors
    /// Something is missing in it; the request waits on.
    pub(super) fn finish(&mut self, cookie: u64) -> Result<()> {
        let Some(pending) = self.pending.get_mut(&cookie) else {
            return Ok(());
        };
        let told = pending.answer.finish()?;
        let Some(pending) = self.pending.remove(&cookie) else {
            return Ok(());
        };
        let result = match told {
            Told::Failed(error) => Err(error),
            told => {
                if pending.request.question.needs_flush() {
                    self.changes += 1;
                }
                if pending.request.question == Question::Flush {
                    self.durable = self.durable.max(pending.changes);
                }
                Ok(told)
            }
        };
        pending.finish(result);
        Ok(())
    }

    /// The connection is gone. What was answered and not flushed may be gone with the server: the flushes that wait
    /// fail, or else the next one does. All others are to be sent again.
    pub(super) fn connection_lost(&mut self) {
        if self.changes > self.durable {
            self.lost = true;
            self.durable = self.changes;
        }
        if self.lost {
            let flushes: Vec<u64> = self
                .pending
                .iter()
                .filter(|(_, pending)| pending.request.question == Question::Flush)
                .map(|(cookie, _)| *cookie)
                .collect();
            for cookie in flushes {
                if let Some(pending) = self.pending.remove(&cookie)
                    && pending.finish(Err(lost()))
                {
                    self.lost = false;
                }
            }
        }
        let (mode, allocation) = (self.mode, self.allocation);
        for pending in self.pending.values_mut() {
            let request = &pending.request;
            pending.sent = false;
            pending.answer = Answer::new(request.question, request.range, mode, allocation);
        }
        self.unsent = self.pending.keys().copied().collect();
    }

    /// Nothing waits any more; all of it has failed.
    pub(super) fn fail_all(&mut self, error: impl Fn() -> Error) {
        self.unsent.clear();
        for (_, pending) in std::mem::take(&mut self.pending) {
            pending.finish(Err(error()));
        }
    }

    /// Who flushes is told of a loss, once.
    ///
    /// # Errors
    /// What was written before may be lost.
    pub(super) fn check_lost(&mut self) -> Result<()> {
        match std::mem::take(&mut self.lost) {
            true => Err(lost()),
            false => Ok(()),
        }
    }
}

impl Pending {
    /// Whether somebody still wanted to know.
    fn finish(self, result: Result<Told>) -> bool {
        let sent = self.done.send(result).is_ok();
        drop(self.request.permit);
        sent
    }
}

fn lost() -> Error {
    let message = "The connection to the NBD server was lost, and with it perhaps what was written \
                   since the last flush";
    Error::from_errno(Errno::EIO, message)
}

#[cfg(test)]
#[path = "ledger_tests.rs"]
mod tests;
