//! The part of the contract about requests that are in flight together.

use std::future::{Future, poll_fn};
use std::task::Poll;

use crate::block::{Child, WriteFlags, ZeroFlags};
use crate::buffer::MemorySlice;
use crate::error::Result;
use crate::range::ByteRange;

use super::contract::Contract;
use super::stamped;

impl Contract {
    /// Overlapping and adjacent requests in flight at a time: each byte ends up as one of them, or as
    /// none, left it; a read sees what was there before, or what one of them puts there.
    pub(super) async fn together(&mut self) {
        let requests: Vec<Concurrent> = (0..8).map(|_| self.concurrent()).collect();
        let guest = self.guest();
        let mut running: Vec<_> = requests
            .iter()
            .map(|request| Box::pin(request.run(&guest)))
            .collect();
        let mut outcomes: Vec<_> = requests.iter().map(|_| None).collect();
        poll_fn(|context| {
            let mut waits = false;
            for (request, outcome) in running.iter_mut().zip(&mut outcomes) {
                if outcome.is_none() {
                    match request.as_mut().poll(context) {
                        Poll::Ready(end) => *outcome = Some(end),
                        Poll::Pending => waits = true,
                    }
                }
            }
            match waits {
                true => Poll::Pending,
                false => Poll::Ready(()),
            }
        })
        .await;
        drop(running);
        for (request, outcome) in requests.iter().zip(outcomes.into_iter().flatten()) {
            let seen = self.must(&format!("{request:?} beside others"), outcome);
            self.explain(&requests, request.range, &seen, true);
        }
        let around = requests
            .iter()
            .fold(None, |around: Option<ByteRange>, request| {
                let range = request.range;
                Some(around.map_or(range, |around| {
                    let start = around.start().min(range.start());
                    ByteRange::between(start, around.end().max(range.end()))
                }))
            });
        let Some(range) = around else { return };
        let left = self.must("read after others", bytes_of(&guest, range).await);
        self.explain(&requests, range, &left, false);
        self.put(&range, &left);
        self.read(&range).await;
    }

    /// A request near the others: in a stretch of some units, often at their borders.
    fn concurrent(&mut self) -> Concurrent {
        let unit = self.subject.unit;
        let stretch = (self.size() - self.size() % 512).min(4 * unit);
        let mut edge = || match self.random.below(3) {
            0 => self.random.below(stretch + 1),
            1 => self.random.below(stretch / unit + 1) * unit,
            _ => self.random.below(stretch / 512 + 1) * 512,
        };
        let (one, two) = (edge().min(stretch), edge().min(stretch));
        let range = ByteRange::between(one.min(two), one.max(two));
        let change = match self.random.below(8) {
            0..=3 => {
                self.stamp += 1;
                Change::Bytes(stamped(self.stamp, &range))
            }
            4 => Change::Zeroes,
            5 => Change::Hint,
            6 => Change::Flush,
            _ => Change::None,
        };
        Concurrent { range, change }
    }

    /// Each byte found in `range` comes from one of the requests, or from before them where that is
    /// possible: nothing wrote it, or (`early`) not yet.
    fn explain(&self, requests: &[Concurrent], range: ByteRange, found: &[u8], early: bool) {
        for (at, byte) in (range.start()..).zip(found) {
            let offers = requests.iter().filter_map(|request| request.byte(at));
            let written = requests.iter().any(|request| request.writes(at));
            let before = self.subject.content[at as usize];
            let fine = offers.clone().any(|offer| offer == *byte)
                || (before == *byte && (early || !written))
                || (!self.subject.stores && *byte == before);
            self.assert(fine, || {
                let offers: Vec<u8> = offers.collect();
                format!("byte {at:#x} is {byte:#x}, was {before:#x}, others put there {offers:x?}")
            });
        }
    }
}

/// A request among others.
#[derive(Debug)]
struct Concurrent {
    range: ByteRange,
    change: Change,
}

enum Change {
    Bytes(Vec<u8>),
    Zeroes,
    Hint,
    Flush,
    /// A read.
    None,
}

impl std::fmt::Debug for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Change::Bytes(_) => "write",
            Change::Zeroes => "write-zeroes",
            Change::Hint => "discard",
            Change::Flush => "flush",
            Change::None => "read",
        })
    }
}

impl Concurrent {
    /// What a read saw; nothing for others.
    async fn run(&self, guest: &Child) -> Result<Vec<u8>> {
        let offset = self.range.start();
        let done = match &self.change {
            Change::Bytes(bytes) => {
                let payload = MemorySlice::from_bytes(bytes).into();
                guest.write(offset, payload, WriteFlags::empty()).await
            }
            Change::Zeroes => guest.write_zeroes(self.range, ZeroFlags::MAY_UNMAP).await,
            Change::Hint => guest.discard(self.range).await,
            Change::Flush => guest.flush().await,
            Change::None => return bytes_of(guest, self.range).await,
        };
        done.map(|()| Vec::new())
    }

    /// What it may leave at an offset.
    fn byte(&self, at: u64) -> Option<u8> {
        if at < self.range.start() || at >= self.range.end() {
            return None;
        }
        match &self.change {
            Change::Bytes(bytes) => Some(bytes[(at - self.range.start()) as usize]),
            Change::Zeroes | Change::Hint => Some(0),
            Change::Flush | Change::None => None,
        }
    }

    /// It leaves something else than what was there.
    fn writes(&self, at: u64) -> bool {
        !matches!(self.change, Change::Hint) && self.byte(at).is_some()
    }
}

async fn bytes_of(guest: &Child, range: ByteRange) -> Result<Vec<u8>> {
    let buffer = MemorySlice::zeroed(range.length() as usize);
    guest.read(range.start(), buffer.clone().into()).await?;
    Ok(buffer.to_vec())
}
