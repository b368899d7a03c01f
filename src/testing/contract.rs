//! The contract that a node of any driver keeps towards whoever is above its edge.

use std::rc::Rc;

use nix::errno::Errno;

use crate::block::{Child, ExtentKind, TruncateOptions, WriteFlags, ZeroFlags};
use crate::buffer::{MemorySlice, Payload};
use crate::error::Result;
use crate::range::ByteRange;

use super::{KernelPages, Random, file_slice_of, stamped};

/// A node, and what is promised of it.
pub struct Subject {
    /// Its name in messages.
    pub name: String,
    /// An edge with all permissions.
    pub guest: Rc<Child>,
    /// What it holds.
    pub content: Vec<u8>,
    /// What is written can be read; a null node keeps nothing.
    pub stores: bool,
    /// Requests may come with the pages of a ublk request that are no memory of ours.
    pub kernel_pages: bool,
    /// Its size can be set to multiples of this many bytes.
    pub resizable: Option<u64>,
    /// Bytes whose ends are worth to be met: the cluster size.
    pub unit: u64,
}

/// Holds a node to the contract.
///
/// # Panics
/// Where the node does not keep it.
pub async fn check_contract(subject: Subject, seed: u64) {
    let mut contract = Contract {
        random: Random::new(seed),
        subject,
        stamp: 0,
    };
    contract.reads().await;
    contract.nothing().await;
    contract.outside().await;
    contract.status().await;
    for round in 0..40 {
        contract.write(round % 4 == 0).await;
        contract.zero().await;
        contract.discard().await;
        contract.read_some().await;
        contract.together().await;
    }
    contract.flush().await;
    contract.reads().await;
    contract.status().await;
    contract.resize().await;
    contract.outside().await;
}

/// Holds a node that can only be read to the contract, as it is now; the content is not changed.
///
/// # Panics
/// Where the node does not keep it.
pub async fn check_reading(subject: Subject, seed: u64) {
    let mut contract = Contract {
        random: Random::new(seed),
        subject,
        stamp: 0,
    };
    contract.reads().await;
    contract.nothing().await;
    contract.outside().await;
    contract.refused().await;
    contract.status().await;
    contract.flush().await;
    contract.reads().await;
}

pub(super) struct Contract {
    pub(super) subject: Subject,
    pub(super) random: Random,
    pub(super) stamp: u32,
}

impl Contract {
    pub(super) fn guest(&self) -> Rc<Child> {
        self.subject.guest.clone()
    }

    pub(super) fn size(&self) -> u64 {
        self.subject.content.len() as u64
    }

    fn content(&self, range: &ByteRange) -> &[u8] {
        &self.subject.content[range.start() as usize..range.end() as usize]
    }

    pub(super) fn must<T>(&self, what: &str, outcome: Result<T>) -> T {
        match outcome {
            Ok(value) => value,
            Err(error) => panic!("{}: {what} failed: {error}", self.subject.name),
        }
    }

    pub(super) fn assert(&self, holds: bool, what: impl FnOnce() -> String) {
        assert!(holds, "{}: {}", self.subject.name, what());
    }

    /// A range of any alignment, often at the end of a unit or of the disk; may be empty.
    fn range(&mut self) -> ByteRange {
        let size = self.size();
        let unit = self.subject.unit;
        let random = &mut self.random;
        let middle = match random.below(4) {
            0 => random.below(size + 1),
            1 => (random.below(size / unit + 1) * unit).min(size),
            2 => size,
            _ => random.below(size / 512 + 1) * 512,
        };
        let longest = [1, 7, 512, unit, 3 * unit + 5][random.below(5) as usize];
        let before = random.below(longest + 1).min(middle);
        let after = random.below(longest + 1).min(size - middle);
        match random.below(3) {
            0 => ByteRange::between(middle, middle + after),
            1 => ByteRange::between(middle - before, middle),
            _ => ByteRange::between(middle - before, middle + after),
        }
    }

    pub(super) async fn read(&mut self, range: &ByteRange) {
        let length = range.length() as usize;
        let pages = self.subject.kernel_pages && length > 0 && self.random.percent(40);
        let outcome;
        let found = if pages {
            let pages = KernelPages::of_read(length);
            outcome = self.guest().read(range.start(), pages.payload()).await;
            pages.bytes()
        } else {
            // Memory of any alignment.
            let skew = self.random.below(3) as usize;
            let buffer = MemorySlice::zeroed(length + skew).slice(skew, length);
            buffer.fill(0, length, 0x5a);
            let payload = buffer.clone().into();
            outcome = self.guest().read(range.start(), payload).await;
            buffer.to_vec()
        };
        self.must(&format!("read of {range}"), outcome);
        let expected = self.content(range);
        let wrong = found.iter().zip(expected).position(|(one, two)| one != two);
        self.assert(wrong.is_none(), || {
            let at = wrong.unwrap_or(0);
            format!(
                "byte {:#x} read in {range} is {:#x}, not {:#x}",
                range.start() + at as u64,
                found[at],
                expected[at]
            )
        });
    }

    async fn read_some(&mut self) {
        for _ in 0..3 {
            let range = self.range();
            self.read(&range).await;
        }
    }

    async fn reads(&mut self) {
        let now = self.guest().node().size();
        self.assert(now == self.size(), || format!("size is {now:#x}"));
        for start in (0..self.size()).step_by(1 << 20) {
            let end = self.size().min(start + (1 << 20));
            self.read(&ByteRange::between(start, end)).await;
        }
        for _ in 0..20 {
            self.read_some().await;
        }
    }

    /// Requests of no bytes succeed and change nothing.
    async fn nothing(&mut self) {
        let guest = self.guest();
        for offset in [0, self.size() / 2, self.size()] {
            let none = MemorySlice::zeroed(0);
            let range = ByteRange::between(offset, offset);
            self.must("empty read", guest.read(offset, none.clone().into()).await);
            let write = guest.write(offset, none.into(), WriteFlags::FUA);
            self.must("empty write", write.await);
            let zeroes = guest.write_zeroes(range, ZeroFlags::MAY_UNMAP);
            self.must("empty write-zeroes", zeroes.await);
            self.must("empty discard", guest.discard(range).await);
        }
    }

    /// Requests that end outside fail with `EIO` and change nothing.
    async fn outside(&mut self) {
        let guest = self.guest();
        let size = self.size();
        for (offset, length) in [
            (size, 1),
            (size.saturating_sub(1), 2),
            (u64::MAX - 511, 512),
        ] {
            let payload = || MemorySlice::zeroed(length as usize).into();
            let mut outcomes = vec![
                guest.read(offset, payload()).await,
                guest.write(offset, payload(), WriteFlags::empty()).await,
            ];
            if let Some(range) = ByteRange::new(offset, length) {
                outcomes.push(guest.write_zeroes(range, ZeroFlags::empty()).await);
                outcomes.push(guest.discard(range).await);
                outcomes.push(guest.block_status(range).await.map(|_| ()));
            }
            for (number, outcome) in outcomes.into_iter().enumerate() {
                let errno = outcome.err().map(|error| error.errno());
                self.assert(errno == Some(Errno::EIO), || {
                    format!("request {number} at {offset:#x}+{length:#x} ended with {errno:?}")
                });
            }
        }
        self.assert(guest.node().size() == size, || "it has grown".to_owned());
    }

    pub(super) fn put(&mut self, range: &ByteRange, bytes: &[u8]) {
        if self.subject.stores {
            self.subject.content[range.start() as usize..range.end() as usize]
                .copy_from_slice(bytes);
        }
    }

    async fn write(&mut self, durable: bool) {
        let range = self.range();
        self.stamp += 1;
        let bytes = stamped(self.stamp, &range);
        let mut flags = WriteFlags::empty();
        flags.set(WriteFlags::FUA, durable);
        if self.guest().node().without_filters().driver().compresses() {
            flags.set(WriteFlags::COMPRESSED, self.random.percent(30));
        }
        let payload = self.payload_of(&bytes);
        let outcome = self.guest().write(range.start(), payload, flags).await;
        self.must(&format!("write of {range}"), outcome);
        self.put(&range, &bytes);
        self.read(&range).await;
        self.allocated(&range).await;
    }

    /// Memory of any alignment, pages of a guest, or a part of a file.
    fn payload_of(&mut self, bytes: &[u8]) -> Payload {
        let pages = self.subject.kernel_pages && !bytes.is_empty() && self.random.percent(40);
        if pages {
            return KernelPages::of_write(bytes).payload();
        }
        if self.random.percent(30) {
            return self.must("a file in memory", file_slice_of(bytes)).into();
        }
        let skew = self.random.below(3) as usize;
        let buffer = MemorySlice::zeroed(bytes.len() + skew).slice(skew, bytes.len());
        buffer.copy_in(0, bytes);
        buffer.into()
    }

    /// What was written is not said to be zeroes or not there.
    async fn allocated(&mut self, range: &ByteRange) {
        if range.is_empty() || !self.subject.stores {
            return;
        }
        let extent = self.guest().block_status(*range).await;
        let extent = self.must("block status", extent);
        let is_data = matches!(extent.kind, ExtentKind::Data { .. });
        self.assert(is_data, || format!("{range} was written: {extent:?}"));
    }

    async fn zero(&mut self) {
        let range = self.range();
        let flags = ZeroFlags::from_bits_truncate(self.random.below(8) as u32);
        let outcome = self.guest().write_zeroes(range, flags).await;
        let refused = match &outcome {
            Err(error) => {
                flags.contains(ZeroFlags::NO_FALLBACK) && error.errno() == Errno::EOPNOTSUPP
            }
            Ok(()) => false,
        };
        if refused {
            // Nothing or a part is zero now: see which.
            self.settle_hint(&range).await;
            return;
        }
        self.must(&format!("write-zeroes of {range}"), outcome);
        self.put(&range, &vec![0; range.length() as usize]);
        self.read(&range).await;
    }

    async fn discard(&mut self) {
        let range = self.range();
        let outcome = self.guest().discard(range).await;
        self.must(&format!("discard of {range}"), outcome);
        self.settle_hint(&range).await;
    }

    /// After a hint each byte is what it was or zero, and stays that.
    async fn settle_hint(&mut self, range: &ByteRange) {
        let buffer = MemorySlice::zeroed(range.length() as usize);
        let payload = buffer.clone().into();
        let outcome = self.guest().read(range.start(), payload).await;
        self.must("read after a hint", outcome);
        let found = buffer.to_vec();
        let before = self.content(range).to_vec();
        let fine = |(now, before): (&u8, &u8)| now == before || *now == 0;
        let all_fine = found.iter().zip(&before).all(fine);
        self.assert(all_fine, || {
            format!("hint for {range} brought up other data")
        });
        self.put(range, &found);
        self.read(range).await;
    }

    async fn flush(&mut self) {
        let outcome = self.guest().flush().await;
        self.must("flush", outcome);
    }

    /// What would change the content is not done.
    async fn refused(&mut self) {
        for _ in 0..20 {
            let range = self.range();
            if range.is_empty() {
                continue;
            }
            let bytes = MemorySlice::zeroed(range.length() as usize);
            let empty = WriteFlags::empty();
            let guest = self.guest();
            let outcomes = [
                guest.write(range.start(), bytes.into(), empty).await,
                guest.write_zeroes(range, ZeroFlags::MAY_UNMAP).await,
                guest
                    .truncate(range.start(), TruncateOptions::default())
                    .await,
            ];
            for outcome in outcomes {
                let is_refused = outcome.is_err();
                self.assert(is_refused, || format!("a change of {range} was accepted"));
            }
            self.read(&range).await;
        }
    }

    /// Extents cover the disk; what is said to be zeroes is.
    async fn status(&mut self) {
        let guest = self.guest();
        let mut offset = 0;
        while offset < self.size() {
            let rest = ByteRange::between(offset, self.size());
            let extent = self.must("block status", guest.block_status(rest).await);
            let range = ByteRange::between(offset, offset + extent.length);
            if matches!(extent.kind, ExtentKind::Zero { .. }) {
                let zero = self.content(&range).iter().all(|byte| *byte == 0);
                self.assert(zero, || format!("{range} is said to be zeroes"));
            }
            offset = range.end();
        }
    }

    async fn resize(&mut self) {
        let Some(step) = self.subject.resizable else {
            return;
        };
        let options = TruncateOptions {
            exact: true,
            zero_new: true,
        };
        for _ in 0..4 {
            let most = (self.size() * 2).max(step * 4);
            let size = self.random.below(most / step + 1) * step;
            let outcome = self.guest().truncate(size, options).await;
            self.must(&format!("resize to {size:#x}"), outcome);
            self.subject.content.resize(size as usize, 0);
            self.reads().await;
            self.write(false).await;
        }
    }
}
