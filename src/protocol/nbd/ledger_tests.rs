use std::rc::Rc;

use super::*;
use crate::nbd::{ReplyHeader, ReplyTo, ReplyWriter};
use crate::runtime::Runtime;
use crate::runtime::sync::Semaphore;

type Waiting = oneshot::Receiver<Result<Told>>;

/// A ledger and the cookies that it gave.
struct Book {
    runtime: Runtime,
    ledger: Ledger,
    slots: Rc<Semaphore>,
    last: u64,
}

impl Book {
    fn new() -> Book {
        Book {
            runtime: Runtime::simulated(1).expect("runtime"),
            ledger: Ledger::new(ReplyMode::Structured, Some(0)),
            slots: Rc::new(Semaphore::new(100)),
            last: 0,
        }
    }

    fn ask(&mut self, question: Question) -> (u64, Waiting) {
        let permit = self.runtime.block_on(self.slots.acquire_owned(1));
        let (range, memory) = match question {
            Question::Flush => (ByteRange::between(0, 0), None),
            _ => (ByteRange::between(0, 512), Some(MemorySlice::zeroed(512))),
        };
        let told = self.ledger.add(Request {
            question,
            range,
            memory,
            permit,
        });
        self.last += 1;
        (self.last, told)
    }

    fn send_all(&mut self) {
        while !self.ledger.take_messages().is_empty() {}
    }

    fn succeed(&mut self, cookie: u64) -> Result<()> {
        let to = ReplyTo { cookie, offset: 0 };
        let reply = ReplyWriter::new(ReplyMode::Structured).done(to);
        let header = ReplyHeader::decode(&reply[4..])?;
        self.ledger.answer_to(cookie)?.0.begin(&header)?;
        self.ledger.finish(cookie)
    }

    /// Asks, sends and is answered.
    fn carry_out(&mut self, question: Question) {
        let (cookie, told) = self.ask(question);
        self.send_all();
        self.succeed(cookie).expect("asked for");
        let told = self.runtime.block_on(told);
        assert!(matches!(told, Some(Ok(Told::Done))), "{told:?}");
    }

    fn told(&mut self, told: Waiting) -> Result<Told> {
        self.runtime.block_on(told).expect("it is answered")
    }
}

const WRITE: Question = Question::Write { fua: false };

#[test]
fn a_loss_is_told_to_the_next_flush_once() {
    let mut book = Book::new();
    book.carry_out(WRITE);
    book.ledger.connection_lost();
    assert!(book.ledger.check_lost().is_err());
    assert!(book.ledger.check_lost().is_ok());
}

#[test]
fn what_is_durable_cannot_be_lost() {
    let mut book = Book::new();
    book.carry_out(WRITE);
    book.carry_out(Question::Flush);
    book.carry_out(Question::Write { fua: true });
    book.ledger.connection_lost();
    assert!(book.ledger.check_lost().is_ok());
}

/// The flush was sent before the write was answered: it does not cover it.
#[test]
fn a_flush_covers_what_was_answered_before_it_was_sent() {
    let mut book = Book::new();
    let (write, _written) = book.ask(WRITE);
    let (flush, _flushed) = book.ask(Question::Flush);
    book.send_all();
    book.succeed(write).expect("asked for");
    book.succeed(flush).expect("asked for");
    book.ledger.connection_lost();
    assert!(book.ledger.check_lost().is_err());
}

#[test]
fn a_flush_on_its_way_fails_and_a_write_is_sent_again() {
    let mut book = Book::new();
    book.carry_out(WRITE);
    let (_, flushed) = book.ask(Question::Flush);
    let (write, written) = book.ask(WRITE);
    book.send_all();
    book.ledger.connection_lost();
    assert!(book.told(flushed).is_err());
    assert!(book.ledger.check_lost().is_ok(), "told twice");
    assert!(book.succeed(write).is_err(), "it was not sent again");
    book.send_all();
    book.succeed(write).expect("it was sent again");
    assert!(book.told(written).is_ok());
    assert!(book.ledger.is_empty());
}

/// Nobody heard of the loss, so that somebody else must.
#[test]
fn a_dropped_flush_tells_nobody() {
    let mut book = Book::new();
    book.carry_out(WRITE);
    let (_, flushed) = book.ask(Question::Flush);
    book.send_all();
    drop(flushed);
    book.ledger.connection_lost();
    assert!(book.ledger.check_lost().is_err());
}

#[test]
fn answers_to_nothing_are_refused() {
    let mut book = Book::new();
    let (cookie, _told) = book.ask(WRITE);
    assert!(book.succeed(cookie).is_err(), "not sent yet");
    assert!(book.succeed(cookie + 1).is_err());
    book.send_all();
    assert!(book.succeed(cookie).is_ok());
    assert!(book.succeed(cookie).is_err(), "answered already");
}
