//! A seeded workload: requests of all kinds, many at a time, held against the model.

use std::cell::{Cell, RefCell, RefMut};
use std::collections::VecDeque;
use std::rc::Rc;

use nix::errno::Errno;

use crate::block::{Child, WriteFlags, ZeroFlags};
use crate::buffer::{MemorySlice, Payload};
use crate::error::{Error, Result};
use crate::range::ByteRange;
use crate::runtime::Handle;

use super::{Model, Pending, Random, stamped};

/// Requests that are told when something is wrong.
const TOLD: usize = 40;
/// Bytes that [`Workload::verify`] reads at a time.
const VERIFY: u64 = 256 << 10;

/// What kind of workload.
#[derive(Clone, Debug)]
pub struct WorkloadOptions {
    /// Requests in flight together.
    pub depth: u32,
    /// Offsets and lengths are multiples of this; below a sector only with a depth of 1.
    pub alignment: u64,
    /// The longest request in bytes.
    pub longest: u64,
    /// How often which request comes, in parts of the sum of all.
    pub mix: Vec<(Request, u64)>,
    /// So many changes of a hundred may overlap others that are in flight.
    pub races: u64,
    /// Errors with which requests may fail; an error of another kind fails the test.
    pub tolerated: Vec<Errno>,
}

impl Default for WorkloadOptions {
    fn default() -> WorkloadOptions {
        WorkloadOptions {
            depth: 4,
            alignment: 512,
            longest: 64 << 10,
            mix: vec![
                (Request::Read, 20),
                (Request::Write, 40),
                (Request::WriteDurable, 4),
                (Request::Zero, 8),
                (Request::ZeroUnmap, 8),
                (Request::Discard, 8),
                (Request::Flush, 8),
            ],
            races: 5,
            tolerated: Vec::new(),
        }
    }
}

/// Kinds of requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// A read.
    Read,
    /// A write.
    Write,
    /// A write with FUA.
    WriteDurable,
    /// Zeroes that stay allocated.
    Zero,
    /// Zeroes that give space back.
    ZeroUnmap,
    /// A discard.
    Discard,
    /// A flush.
    Flush,
}

impl Request {
    fn changes(self) -> bool {
        !matches!(self, Request::Read | Request::Flush)
    }
}

/// A workload and the model of what it made. Cheap to clone: a handle.
#[derive(Clone)]
pub struct Workload {
    shared: Rc<Shared>,
}

struct Shared {
    handle: Handle,
    guest: RefCell<Rc<Child>>,
    options: WorkloadOptions,
    model: RefCell<Model>,
    random: RefCell<Random>,
    stamps: Cell<u32>,
    left: Cell<u64>,
    failures: Cell<u64>,
    busy: RefCell<Vec<(u32, Request, ByteRange)>>,
    told: RefCell<VecDeque<String>>,
}

impl Workload {
    /// A workload over `guest`, which holds what the model says.
    pub fn new(
        handle: &Handle,
        guest: Rc<Child>,
        model: Model,
        options: WorkloadOptions,
        seed: u64,
    ) -> Workload {
        assert!(options.alignment >= super::SECTOR || options.depth == 1);
        let mut random = Random::new(seed);
        // Stamps of one run are not those of the run after a crash.
        let stamps = Cell::new((random.next_u64() >> 33) as u32);
        Workload {
            shared: Rc::new(Shared {
                handle: handle.clone(),
                guest: RefCell::new(guest),
                options,
                model: RefCell::new(model),
                random: RefCell::new(random),
                stamps,
                left: Cell::new(0),
                failures: Cell::new(0),
                busy: RefCell::default(),
                told: RefCell::default(),
            }),
        }
    }

    /// The model, while no request begins or ends.
    pub fn model(&self) -> RefMut<'_, Model> {
        self.shared.model.borrow_mut()
    }

    /// Requests that failed with an error that is tolerated.
    pub fn failures(&self) -> u64 {
        self.shared.failures.get()
    }

    /// From now on requests go over this edge; none is in flight.
    pub fn set_guest(&self, guest: Rc<Child>) {
        *self.shared.guest.borrow_mut() = guest;
    }

    /// Runs so many requests to their end.
    pub async fn run(&self, requests: u64) {
        self.shared.left.set(requests);
        let workers: Vec<_> = (0..self.shared.options.depth)
            .map(|_| self.shared.handle.spawn(self.shared.clone().work()))
            .collect();
        for worker in workers {
            worker.await;
        }
    }

    /// A flush; true if it succeeded.
    pub async fn flush(&self) -> bool {
        self.shared.flush().await
    }

    /// Reads the whole disk and holds it against the model. Reads must not fail.
    pub async fn verify(&self) {
        let guest = self.shared.guest.borrow().clone();
        let size = self.model().size();
        let mut offset = 0;
        while offset < size {
            let length = VERIFY.min(size - offset);
            let bytes = match read(&guest, offset, length).await {
                Ok(bytes) => bytes,
                Err(error) => self.shared.fail(&format!("read at {offset:#x}: {error}")),
            };
            self.shared.check(offset, &bytes);
            offset += length;
        }
    }

    /// Sets the size over the guest edge. No request is in flight.
    pub async fn resize(&self, size: u64) {
        let shared = &self.shared;
        shared.tell(format!("resize to {size:#x}"));
        shared.model.borrow_mut().begin_resize(size);
        let guest = shared.guest.borrow().clone();
        let options = crate::block::TruncateOptions {
            exact: true,
            zero_new: true,
        };
        match guest.truncate(size, options).await {
            Ok(()) => shared.model.borrow_mut().end_resize(size),
            Err(error) => {
                shared.tolerate(&error, "resize");
                assert_eq!(guest.node().size(), self.model().size());
                shared.model.borrow_mut().fail_resize(size);
            }
        }
    }
}

async fn read(guest: &Child, offset: u64, length: u64) -> Result<Vec<u8>> {
    let buffer = MemorySlice::zeroed(length as usize);
    buffer.fill(0, length as usize, 0x5a);
    guest.read(offset, Payload::from(buffer.clone())).await?;
    Ok(buffer.to_vec())
}

impl Shared {
    async fn work(self: Rc<Shared>) {
        while self.left.get() > 0 {
            self.left.set(self.left.get() - 1);
            let (number, request, range) = self.draw();
            self.tell(format!("{number}: {request:?} {range}"));
            self.busy.borrow_mut().push((number, request, range));
            self.carry_out(number, request, range).await;
            self.busy
                .borrow_mut()
                .retain(|(other, ..)| *other != number);
        }
    }

    /// A request that does not collide with one in flight, but for some writes over writes.
    fn draw(&self) -> (u32, Request, ByteRange) {
        let mut random = self.random.borrow_mut();
        let number = self.stamps.get() + 1;
        self.stamps.set(number);
        for _ in 0..10 {
            let request = self.draw_request(&mut random);
            let range = self.draw_range(&mut random);
            if request == Request::Flush || range.is_empty() {
                break;
            }
            let race = random.percent(self.options.races);
            let free = |(_, other, busy): &(u32, Request, ByteRange)| {
                let both_change = request.changes() && other.changes();
                !busy.overlaps(&range) || (race && both_change)
            };
            if self.busy.borrow().iter().all(free) {
                return (number, request, range);
            }
        }
        (number, Request::Flush, ByteRange::between(0, 0))
    }

    fn draw_request(&self, random: &mut Random) -> Request {
        let mix = &self.options.mix;
        let mut drawn = random.below(mix.iter().map(|(_, part)| part).sum());
        for (request, part) in mix {
            if drawn < *part {
                return *request;
            }
            drawn -= part;
        }
        unreachable!("the parts sum up to what was drawn below")
    }

    fn draw_range(&self, random: &mut Random) -> ByteRange {
        let alignment = self.options.alignment;
        let units = self.model.borrow().size() / alignment;
        if units == 0 {
            return ByteRange::between(0, 0);
        }
        let longest = (self.options.longest / alignment).clamp(1, units);
        let scale = random.below(u64::from(longest.ilog2()) + 1);
        let length = (1 + random.below(2 << scale)).min(longest);
        let mut start = random.below(units - length + 1);
        if random.percent(30) {
            // Often at a round place, so that whole clusters are met.
            start -= start % length.next_power_of_two().min(start.max(1));
        }
        ByteRange::between(start * alignment, (start + length) * alignment)
    }

    async fn carry_out(&self, number: u32, request: Request, range: ByteRange) {
        let guest = self.guest.borrow().clone();
        let model = &self.model;
        let (pending, outcome) = match request {
            Request::Flush => {
                self.flush().await;
                return;
            }
            Request::Read => {
                match read(&guest, range.start(), range.length()).await {
                    Ok(bytes) => self.check(range.start(), &bytes),
                    Err(error) => self.tolerate(&error, "read"),
                }
                return;
            }
            Request::Write | Request::WriteDurable => {
                let bytes = stamped(number, &range);
                let pending = model.borrow_mut().begin_write(range.start(), &bytes);
                let mut flags = WriteFlags::empty();
                flags.set(WriteFlags::FUA, request == Request::WriteDurable);
                let compresses = guest.node().without_filters().driver().compresses();
                flags.set(
                    WriteFlags::COMPRESSED,
                    compresses && number.is_multiple_of(8),
                );
                let payload = MemorySlice::from_bytes(&bytes).into();
                (pending, guest.write(range.start(), payload, flags).await)
            }
            Request::Zero | Request::ZeroUnmap => {
                let mut flags = ZeroFlags::empty();
                flags.set(ZeroFlags::MAY_UNMAP, request == Request::ZeroUnmap);
                let pending = model.borrow_mut().begin_zeroes(range);
                (pending, guest.write_zeroes(range, flags).await)
            }
            Request::Discard => {
                let pending = model.borrow_mut().begin_discard(range);
                (pending, guest.discard(range).await)
            }
        };
        self.answer(number, request, pending, outcome);
    }

    fn answer(&self, number: u32, request: Request, pending: Pending, outcome: Result<()>) {
        let mut model = self.model.borrow_mut();
        match outcome {
            Ok(()) if request == Request::WriteDurable => model.end_durable(pending),
            Ok(()) => model.end(pending, true),
            Err(error) => {
                model.end(pending, false);
                self.tolerate(&error, &format!("{number}: {request:?}"));
            }
        }
        self.tell(format!("{number}: answered"));
    }

    async fn flush(&self) -> bool {
        let guest = self.guest.borrow().clone();
        let pending = self.model.borrow_mut().begin_flush();
        match guest.flush().await {
            Ok(()) => {
                self.tell("flushed".to_owned());
                self.model.borrow_mut().end_flush(pending);
                true
            }
            Err(error) => {
                self.tolerate(&error, "flush");
                false
            }
        }
    }

    fn check(&self, offset: u64, bytes: &[u8]) {
        if let Err(mismatch) = self.model.borrow_mut().check_read(offset, bytes) {
            self.fail(&mismatch.to_string());
        }
    }

    fn tolerate(&self, error: &Error, what: &str) {
        if !self.options.tolerated.contains(&error.errno()) {
            self.fail(&format!("{what} failed: {error} ({:?})", error.errno()));
        }
        self.tell(format!("{what} failed: {error}"));
        self.failures.set(self.failures.get() + 1);
    }

    fn tell(&self, line: String) {
        let mut told = self.told.borrow_mut();
        if told.len() == TOLD {
            told.pop_front();
        }
        told.push_back(line);
    }

    fn fail(&self, message: &str) -> ! {
        let told: Vec<String> = self.told.borrow().iter().cloned().collect();
        panic!("{message}\nlast requests:\n  {}", told.join("\n  "))
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        DiskOperation, DiskOptions, Fault, attach, disk_of, for_each_seed, full_access, insert,
        simulate,
    };
    use super::*;
    use crate::block::Graph;

    const SIZE: u64 = 1 << 20;

    fn run(seed: u64, options: WorkloadOptions, spoil: bool) -> u64 {
        simulate(seed, |handle| async move {
            let disk = disk_of(&handle, &vec![0; SIZE as usize], seed);
            disk.set_options(DiskOptions {
                garbles_discards: false,
                ..DiskOptions::default()
            });
            if !options.tolerated.is_empty() {
                disk.fail(Fault::once(&[DiskOperation::Write], 20, Errno::EIO));
            }
            let graph = Graph::new();
            let guest = attach(
                &graph,
                &insert(&graph, "disk", disk.driver()),
                full_access(),
            );
            let model = Model::zeroed(SIZE);
            let workload = Workload::new(&handle, guest, model, options, seed);
            workload.run(200).await;
            workload.resize(SIZE / 2).await;
            workload.resize(SIZE).await;
            workload.run(100).await;
            assert!(workload.flush().await);
            if spoil {
                disk.with_store(|store| store.write(SIZE / 3, &[1]));
            }
            workload.verify().await;
            workload.failures()
        })
    }

    #[test]
    fn a_plain_disk_holds_against_the_model() {
        for_each_seed("a_plain_disk_holds", 10, |seed| {
            let failures = run(seed, WorkloadOptions::default(), false);
            assert_eq!(failures, 0);
        });
    }

    #[test]
    fn an_error_is_tolerated_where_it_is_expected() {
        let options = WorkloadOptions {
            tolerated: vec![Errno::EIO],
            ..WorkloadOptions::default()
        };
        assert_eq!(run(3, options, false), 1);
    }

    #[test]
    #[should_panic(expected = "allowed")]
    fn a_wrong_byte_is_noticed() {
        run(4, WorkloadOptions::default(), true);
    }
}
