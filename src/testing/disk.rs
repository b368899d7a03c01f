//! A disk in memory that keeps writes in a volatile cache, answers late and out of order, fails by
//! rule and loses power.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::{Future, pending};
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;

use crate::block::Driver;
use crate::error::{Error, Result};
use crate::range::ByteRange;
use crate::runtime::Handle;

use super::disk_driver::DiskDriver;
use super::fault::FaultRules;
use super::{DiskOperation, Fault, Power, Random, SECTOR, VolatileStore};

/// What kind of disk it is.
#[derive(Clone, Copy, Debug)]
pub struct DiskOptions {
    /// Offsets and lengths of requests are multiples of this many bytes (a power of two).
    pub request_alignment: u32,
    /// Writes may be marked FUA; otherwise flushes do.
    pub native_fua: bool,
    /// Zeroes can be written without data.
    pub write_zeroes: bool,
    /// What was discarded may read as anything, as on some devices; otherwise as zeroes.
    pub garbles_discards: bool,
    /// The longest time that an operation takes, in virtual microseconds; 0: none waits.
    pub slowest: u64,
    /// So many operations of a hundred take fifty times the longest time.
    pub stragglers: u64,
    /// Bytes from which on there is no space.
    pub capacity: u64,
    /// Flushes are answered without making anything durable: a broken disk, for canaries.
    pub ignores_flush: bool,
}

impl Default for DiskOptions {
    fn default() -> DiskOptions {
        DiskOptions {
            request_alignment: 1,
            native_fua: true,
            write_zeroes: true,
            garbles_discards: true,
            slowest: 100,
            stragglers: 0,
            capacity: u64::MAX,
            ignores_flush: false,
        }
    }
}

/// A simulated disk. Cheap to clone: a handle for the test; nodes get it by [`SimulatedDisk::driver`].
#[derive(Clone)]
pub struct SimulatedDisk {
    state: Rc<State>,
}

struct State {
    handle: Handle,
    power: Power,
    options: Cell<DiskOptions>,
    store: RefCell<VolatileStore>,
    faults: RefCell<FaultRules>,
    random: RefCell<Random>,
    in_flight: RefCell<BTreeMap<u64, Change>>,
    next: Cell<u64>,
}

/// A change of the content that has begun.
pub(super) enum Change {
    Write(u64, Rc<[u8]>),
    Zero(ByteRange),
    Truncate(u64),
}

impl SimulatedDisk {
    /// A disk with this content, all durable.
    pub fn new(
        handle: &Handle,
        power: &Power,
        options: DiskOptions,
        content: VolatileStore,
        seed: u64,
    ) -> SimulatedDisk {
        SimulatedDisk {
            state: Rc::new(State {
                handle: handle.clone(),
                power: power.clone(),
                options: Cell::new(options),
                store: RefCell::new(content),
                faults: RefCell::default(),
                random: RefCell::new(Random::new(seed)),
                in_flight: RefCell::default(),
                next: Cell::new(0),
            }),
        }
    }

    /// An empty disk of no bytes that stays powered.
    pub fn empty(handle: &Handle, seed: u64) -> SimulatedDisk {
        let power = Power::new();
        let content = VolatileStore::default();
        SimulatedDisk::new(handle, &power, DiskOptions::default(), content, seed)
    }

    /// The driver of a node over this disk.
    pub fn driver(&self) -> Box<dyn Driver> {
        Box::new(DiskDriver::new(self.clone()))
    }

    /// What kind of disk it is.
    pub fn options(&self) -> DiskOptions {
        self.state.options.get()
    }

    /// Makes it another kind of disk (full, broken) from now on.
    pub fn set_options(&self, options: DiskOptions) {
        self.state.options.set(options);
    }

    /// Adds a rule to fail by.
    pub fn fail(&self, fault: Fault) {
        self.state.faults.borrow_mut().add(fault);
    }

    /// Removes all rules.
    pub fn heal(&self) {
        self.state.faults.borrow_mut().clear();
    }

    /// Operations that failed by a rule.
    pub fn faults_struck(&self) -> u64 {
        self.state.faults.borrow().struck()
    }

    /// Bytes on the disk.
    pub fn size(&self) -> u64 {
        self.state.store.borrow().size()
    }

    /// The disk as it is read now.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.state.store.borrow().to_bytes()
    }

    /// The content with what is durable of it.
    pub fn store(&self) -> VolatileStore {
        self.state.store.borrow().clone()
    }

    /// What is left after power failed now: any part of what was in flight or not flushed.
    pub fn crash(&self, random: &mut Random) -> VolatileStore {
        let mut store = self.store();
        for change in self.state.in_flight.borrow().values() {
            if random.percent(60) {
                apply(&mut store, change);
            }
        }
        store.crash(random)
    }

    pub(super) fn with_store<T>(&self, look: impl FnOnce(&mut VolatileStore) -> T) -> T {
        look(&mut self.state.store.borrow_mut())
    }

    /// Runs an operation that goes on when its caller is gone, as the kernel's do.
    pub(super) fn start<T: 'static>(
        &self,
        work: impl Future<Output = T> + 'static,
    ) -> impl Future<Output = T> {
        self.state.handle.spawn(work)
    }

    /// The time between an operation's begin and its end; fails where a rule says so.
    pub(super) async fn latency(&self, operation: DiskOperation, range: &ByteRange) -> Result<()> {
        let state = &self.state;
        let delay = self.draw_delay();
        if delay > 0 {
            state.handle.sleep(Duration::from_micros(delay)).await;
        }
        if state.power.is_off() {
            pending::<()>().await;
        }
        let errno = state.faults.borrow_mut().strike(operation, range);
        match errno {
            Some(errno) => Err(fault(operation, range, errno)),
            None => Ok(()),
        }
    }

    fn draw_delay(&self) -> u64 {
        let DiskOptions {
            slowest,
            stragglers,
            ..
        } = self.options();
        let mut random = self.state.random.borrow_mut();
        match stragglers > 0 && random.percent(stragglers) {
            true => 50 * slowest,
            false => random.below(slowest + 1),
        }
    }

    /// Counts an operation that begins.
    pub(super) fn begin(&self) {
        self.state.power.count();
    }

    /// A number below `bound` from the disk's seed.
    pub(super) fn draw(&self, bound: u64) -> u64 {
        self.state.random.borrow_mut().below(bound)
    }

    /// Carries a change out. A failed write may have changed a part.
    pub(super) async fn change(&self, operation: DiskOperation, change: Change) -> Result<()> {
        let state = &self.state;
        let range = change.range();
        let key = state.next.get();
        state.next.set(key + 1);
        state.in_flight.borrow_mut().insert(key, change);
        state.power.count();
        if range.start() < SECTOR && operation != DiskOperation::Truncate {
            state.power.mark();
        }
        let mut outcome = self.latency(operation, &range).await;
        if outcome.is_ok() && range.end() > self.options().capacity && range.end() > self.size() {
            outcome = Err(fault(operation, &range, Errno::ENOSPC));
        }
        let Some(change) = state.in_flight.borrow_mut().remove(&key) else {
            unreachable!("only its own operation takes a change out of flight")
        };
        match &outcome {
            Ok(()) => self.with_store(|store| apply(store, &change)),
            Err(_) => self.apply_part(&change),
        }
        outcome
    }

    fn apply_part(&self, change: &Change) {
        let Change::Write(offset, bytes) = change else {
            return;
        };
        let mut random = self.state.random.borrow_mut();
        let written = match random.below(4) {
            0 => random.below(bytes.len() as u64 + 1) as usize,
            _ => return,
        };
        let end = (offset + written as u64).min(self.options().capacity);
        let kept = (end - end % SECTOR).saturating_sub(*offset) as usize;
        if kept > 0 {
            self.with_store(|store| store.write(*offset, &bytes[..kept]));
        }
    }
}

impl Change {
    fn range(&self) -> ByteRange {
        match self {
            Change::Write(offset, bytes) => {
                ByteRange::between(*offset, offset + bytes.len() as u64)
            }
            Change::Zero(range) => *range,
            Change::Truncate(size) => ByteRange::between(0, *size),
        }
    }
}

fn apply(store: &mut VolatileStore, change: &Change) {
    match change {
        Change::Write(offset, bytes) => store.write(*offset, bytes),
        Change::Zero(range) => store.zero(range.start(), range.length()),
        Change::Truncate(size) => store.truncate(*size),
    }
}

fn fault(operation: DiskOperation, range: &ByteRange, errno: Errno) -> Error {
    Error::sys(errno, format!("simulated {operation:?} of {range}"))
}

#[cfg(test)]
mod tests {
    use super::super::for_each_seed;
    use super::*;
    use crate::block::{Child, Graph, NodeOptions, NodeSpec, Permission, Permissions, WriteFlags};
    use crate::buffer::MemorySlice;
    use crate::runtime::Runtime;

    fn attach(graph: &Graph, disk: &SimulatedDisk) -> Rc<Child> {
        let spec = NodeSpec {
            name: "disk".to_owned(),
            options: NodeOptions::default(),
            file_name: String::new(),
            implicit: false,
        };
        let node = graph
            .insert(spec, disk.driver(), Vec::new())
            .expect("a new name");
        let permissions = Permissions {
            required: Permission::CONSISTENT_READ | Permission::WRITE,
            shared: Permission::all(),
        };
        graph
            .attach_root("a test", &node, permissions)
            .expect("the only user")
    }

    fn payload(value: u8) -> crate::buffer::Payload {
        MemorySlice::from_bytes(&[value; SECTOR as usize]).into()
    }

    #[test]
    fn flushed_and_fua_writes_survive_and_others_may_not() {
        let mut lost = false;
        for_each_seed("flushed_and_fua_writes_survive", 40, |seed| {
            let runtime = Runtime::simulated(seed).expect("a simulated runtime");
            let content = VolatileStore::from_bytes(&[0; 2048]);
            let power = Power::new();
            let options = DiskOptions::default();
            let disk = SimulatedDisk::new(&runtime.handle(), &power, options, content, seed);
            let child = attach(&Graph::new(), &disk);
            runtime.block_on(async {
                let empty = WriteFlags::empty();
                child.write(0, payload(1), empty).await.expect("no fault");
                child.flush().await.expect("no fault");
                child
                    .write(512, payload(2), WriteFlags::FUA)
                    .await
                    .expect("no fault");
                child
                    .write(1024, payload(3), empty)
                    .await
                    .expect("no fault");
            });
            let left = disk.crash(&mut Random::new(seed)).to_bytes();
            assert_eq!((left[0], left[512]), (1, 2));
            lost |= left[1024] == 0;
        });
        assert!(lost, "a write that was not flushed survived every crash");
    }

    #[test]
    fn power_fails_in_the_middle_of_an_operation() {
        let runtime = Runtime::simulated(7).expect("a simulated runtime");
        let power = Power::new();
        power.fail_after(2);
        let content = VolatileStore::from_bytes(&[0; 2048]);
        let options = DiskOptions::default();
        let disk = SimulatedDisk::new(&runtime.handle(), &power, options, content, 7);
        let child = attach(&Graph::new(), &disk);
        let written = std::cell::Cell::new(0);
        let ended = runtime.block_on(power.run(async {
            for value in 1..9 {
                let outcome = child.write(0, payload(value), WriteFlags::empty()).await;
                outcome.expect("no fault");
                written.set(value);
            }
        }));
        assert!(ended.is_none());
        assert_eq!(written.get(), 1);
        let mut random = Random::new(1);
        let left: Vec<u8> = (0..100)
            .map(|_| disk.crash(&mut random).to_bytes()[0])
            .collect();
        assert!(left.contains(&0) && left.contains(&1) && left.contains(&2));
        assert!(left.iter().all(|value| *value <= 2));
    }

    #[test]
    fn a_full_disk_and_a_fault_reach_the_caller() {
        let runtime = Runtime::simulated(3).expect("a simulated runtime");
        let disk = SimulatedDisk::empty(&runtime.handle(), 3);
        disk.set_options(DiskOptions {
            capacity: 1024,
            ..DiskOptions::default()
        });
        disk.with_store(|store| store.truncate(512));
        let driver = disk.driver();
        runtime.block_on(async {
            let write = |offset| driver.write(offset, payload(1), WriteFlags::empty());
            write(512).await.expect("space is left");
            let full = write(1024).await.expect_err("no space is left");
            assert_eq!(full.errno(), Errno::ENOSPC);
            disk.fail(Fault::once(&[DiskOperation::Flush], 0, Errno::EIO));
            let failed = driver.flush().await.expect_err("the rule");
            assert_eq!(failed.errno(), Errno::EIO);
            driver.flush().await.expect("once is over");
        });
        assert_eq!(disk.faults_struck(), 1);
    }
}
