//! The engine on simulated disks; files are in the integration tests.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;

use super::*;
use crate::block::{
    Child, Driver, Extent, Graph, IoFuture, Limits, Permissions, Role, WriteFlags, ZeroFlags,
};
use crate::buffer::{MemorySlice, Payload};
use crate::range::ByteRange;
use crate::runtime::Handle;
use crate::testing::{
    DiskOperation, Fault, Random, SimulatedDisk, attach, attach_file, disk_of, full_access, insert,
    insert_with, simulate, stamped, writable,
};

const SIZE: u64 = 1 << 18;

/// A filter that does nothing.
struct Bystander(Rc<Child>);

impl Driver for Bystander {
    fn driver_name(&self) -> &'static str {
        "bystander"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn size(&self) -> u64 {
        self.0.node().size()
    }

    fn limits(&self) -> Limits {
        self.0.node().driver().limits()
    }

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        Box::pin(self.0.read(offset, payload))
    }

    fn write(&self, offset: u64, payload: Payload, flags: WriteFlags) -> IoFuture<'_, ()> {
        Box::pin(self.0.write(offset, payload, flags))
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        Box::pin(self.0.write_zeroes(range, flags))
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        Box::pin(self.0.discard(range))
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        Box::pin(self.0.flush())
    }

    fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent> {
        unreachable!("status of {range} is asked of a filter")
    }

    fn child_permissions(&self, _: Role, users: Permissions, _: bool) -> Permissions {
        users.for_filter()
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }

    fn is_filter(&self) -> bool {
        true
    }
}

fn filtered(graph: &Graph, disk: &SimulatedDisk) -> Rc<Child> {
    let node = insert(graph, "filtered", disk.driver());
    let edge = attach_file(graph, &node);
    let driver = Box::new(Bystander(edge.clone()));
    let filter = insert_with(graph, "filter", driver, vec![edge], writable());
    attach(graph, &filter, full_access())
}

fn edge_to(graph: &Graph, name: &str, disk: &SimulatedDisk) -> Rc<Child> {
    attach(graph, &insert(graph, name, disk.driver()), full_access())
}

/// Stamps and zeroes of any alignment.
fn patchwork(random: &mut Random, size: u64) -> Vec<u8> {
    let mut bytes = vec![0; size as usize];
    for stamp in 1..8 {
        let start = random.below(size + 1);
        let end = (start + random.below(size / 4 + 1)).min(size);
        let range = ByteRange::between(start, end);
        bytes[start as usize..end as usize].copy_from_slice(&stamped(stamp, &range));
    }
    bytes
}

fn small() -> CopyOptions {
    CopyOptions {
        buffer_length: 20_000,
        ..CopyOptions::default()
    }
}

#[test]
fn any_range_is_copied_and_nothing_beside_it() {
    for seed in 0..40 {
        simulate(seed, |handle| async move {
            let mut random = Random::new(seed);
            let graph = Graph::new();
            let length = random.choose(&[SIZE, SIZE / 2, SIZE / 2 + 512, 0]);
            let mut source = patchwork(&mut random, length);
            let mut expected = patchwork(&mut random, SIZE);
            let (from, to) = (
                disk_of(&handle, &source, seed),
                disk_of(&handle, &expected, 9),
            );
            let from = match seed % 2 {
                0 => edge_to(&graph, "from", &from),
                _ => filtered(&graph, &from),
            };
            let start = random.below(SIZE);
            let range = ByteRange::between(start, start + random.below(SIZE - start + 1));
            let copier = Copier::new(small());
            let target = edge_to(&graph, "to", &to);
            let copied = copier.copy(&from, &target, range).await;
            copied.expect("nothing fails");
            source.resize(SIZE as usize, 0);
            let part = range.start() as usize..range.end() as usize;
            expected[part.clone()].copy_from_slice(&source[part]);
            assert!(to.to_bytes() == expected, "{range}");
        });
    }
}

#[test]
fn a_filter_is_no_layer() {
    simulate(1, |handle| async move {
        let graph = Graph::new();
        let disk = disk_of(&handle, &[1; 8192], 1);
        let edge = filtered(&graph, &disk);
        let below = edge.node().below().expect("a filter has a child");
        let whole = ByteRange::between(0, 8192);
        let status = edge.status_through(whole, None).await.expect("status");
        assert_eq!((status.depth, status.filtered), (1, true));
        assert_eq!(status.extent, Extent::data(8192, 0));
        assert!(status.node.is_some_and(|node| Rc::ptr_eq(&node, &below)));
        let above = edge.status_through(whole, Some(&below)).await;
        let above = above.expect("status");
        assert_eq!((above.depth, above.extent), (0, Extent::unallocated(8192)));
        assert!(above.node.is_none());
    });
}

#[test]
fn zeroes_go_as_zeroes() {
    simulate(1, |handle| async move {
        let graph = Graph::new();
        let mut content = vec![0; SIZE as usize];
        content[0x10000..0x12000].fill(7);
        let (from, to) = (
            disk_of(&handle, &content, 1),
            disk_of(&handle, &[9; SIZE as usize], 2),
        );
        let source = edge_to(&graph, "from", &from);
        let target = edge_to(&graph, "to", &to);
        for (start, end) in [(0, 0x10000), (0x12000, SIZE)] {
            let range = ByteRange::between(start, end);
            let zeroed = source.write_zeroes(range, ZeroFlags::MAY_UNMAP).await;
            zeroed.expect("the disk says hole from now on");
        }
        let copier = Copier::new(CopyOptions::default());
        let whole = ByteRange::between(0, SIZE);
        copier.copy(&source, &target, whole).await.expect("copied");
        assert!(to.to_bytes() == content);
        let read = source.node().statistics().read_bytes;
        assert_eq!(read, 0x2000, "only data is read");
        assert_eq!(target.node().statistics().written_bytes, 0x2000);
    });
}

#[test]
fn a_failure_tells_its_side() {
    simulate(1, |handle| async move {
        let graph = Graph::new();
        let (from, to) = (
            disk_of(&handle, &[1; 8192], 1),
            disk_of(&handle, &[2; 8192], 2),
        );
        let source = edge_to(&graph, "from", &from);
        let target = edge_to(&graph, "to", &to);
        let copier = Copier::new(CopyOptions::default());
        let whole = ByteRange::between(0, 8192);
        from.fail(Fault::once(&[DiskOperation::Read], 0, Errno::EIO));
        let error = copier.copy(&source, &target, whole).await.expect_err("EIO");
        assert!(error.is_read() && error.error().errno() == Errno::EIO);
        to.fail(Fault::once(&[DiskOperation::Write], 0, Errno::ENOSPC));
        let error = copier
            .copy(&source, &target, whole)
            .await
            .expect_err("ENOSPC");
        assert!(!error.is_read() && error.error().errno() == Errno::ENOSPC);
        copier.copy(&source, &target, whole).await.expect("healed");
        assert!(to.to_bytes() == [1; 8192]);
    });
}

#[test]
fn what_is_read_through_the_target_is_left_alone() {
    simulate(1, |handle| async move {
        let graph = Graph::new();
        let disk = disk_of(&handle, &[1; 8192], 1);
        let through = filtered(&graph, &disk);
        let target = through.node().below().expect("a filter has a child");
        let target = graph.attach_root("a test", &target, Permissions::NONE);
        let copier = Copier::new(CopyOptions::default());
        let whole = ByteRange::between(0, 8192);
        // The edge may not write: a request over it would fail.
        let target = target.expect("wants nothing");
        copier
            .copy(&through, &target, whole)
            .await
            .expect("nothing to do");
        assert_eq!(through.node().statistics().reads, 0);
    });
}

/// What a run of pieces did.
#[derive(Default)]
struct Record {
    begun: Cell<usize>,
    in_flight: Cell<usize>,
    most: Cell<usize>,
    ended: RefCell<Vec<usize>>,
}

/// `count` pieces, of which some fail, each after a time of its own.
async fn run_pieces(
    handle: &Handle,
    record: &Rc<Record>,
    count: usize,
    failing: &'static [usize],
    limit: usize,
) -> Result<(), usize> {
    let next = async || {
        let number = record.begun.get();
        if number == count {
            return None;
        }
        record.begun.set(number + 1);
        let (record, handle) = (record.clone(), handle.clone());
        Some(async move {
            record.in_flight.set(record.in_flight.get() + 1);
            record
                .most
                .set(record.most.get().max(record.in_flight.get()));
            let time = 10 + (number as u64 * 7) % 5;
            handle.sleep(Duration::from_micros(time)).await;
            record.in_flight.set(record.in_flight.get() - 1);
            record.ended.borrow_mut().push(number);
            match failing.contains(&number) {
                true => Err(number),
                false => Ok(()),
            }
        })
    };
    run(handle, next, || limit).await
}

#[test]
fn pieces_run_side_by_side_within_the_limit() {
    simulate(3, |handle| async move {
        for limit in [0, 1, 3, 100] {
            let record = Rc::new(Record::default());
            let result = run_pieces(&handle, &record, 20, &[], limit).await;
            assert_eq!(result, Ok(()));
            assert_eq!(record.ended.borrow().len(), 20);
            assert_eq!(record.most.get(), limit.clamp(1, 20));
        }
    });
}

#[test]
fn the_first_failure_stops_new_pieces_and_waits_for_the_others() {
    simulate(3, |handle| async move {
        let record = Rc::new(Record::default());
        let result = run_pieces(&handle, &record, 20, &[2, 3], 4).await;
        let first = *record
            .ended
            .borrow()
            .iter()
            .find(|n| [2, 3].contains(n))
            .expect("failed");
        assert_eq!(result, Err(first));
        assert_eq!(record.in_flight.get(), 0);
        assert_eq!(record.ended.borrow().len(), record.begun.get());
        assert!(record.begun.get() < 20);
    });
}

#[test]
fn pieces_in_flight_survive_who_waits_for_them() {
    simulate(3, |handle| async move {
        let record = Rc::new(Record::default());
        let limit = Duration::from_micros(12);
        let result = handle
            .timeout(limit, run_pieces(&handle, &record, 20, &[], 4))
            .await;
        assert!(result.is_err(), "there are more pieces than time");
        let begun = record.begun.get();
        handle.sleep(Duration::from_secs(1)).await;
        assert_eq!(record.begun.get(), begun, "no further piece is taken");
        assert_eq!(record.ended.borrow().len(), begun);
    });
}

#[test]
fn the_copy_gives_way_to_the_guest_and_comes_back() {
    simulate(3, |handle| async move {
        let graph = Graph::new();
        let disk = disk_of(&handle, &[1; 65536], 1);
        let guest = edge_to(&graph, "disk", &disk);
        let own = graph.attach_root("a job", &guest.node(), Permissions::NONE);
        let own = own.expect("wants nothing");
        let pace = Pace::new(&handle, own.clone(), Vec::new());
        let look = async || {
            handle.sleep(Duration::from_millis(10)).await;
            pace.limit()
        };
        let read = async |edge: &Rc<Child>| {
            let memory = MemorySlice::zeroed(512);
            edge.read(0, memory.into()).await.expect("read");
        };
        assert_eq!([look().await, look().await, look().await], [8, 16, 16]);
        for _ in 0..100 {
            read(&own).await;
        }
        assert_eq!(look().await, 16, "the job's own requests do not count");
        read(&guest).await;
        assert_eq!(look().await, 4, "a guest that does little");
        for _ in 0..10 {
            read(&guest).await;
        }
        assert_eq!(look().await, 1, "a guest under load");
        assert_eq!(pace.piece_length(), 1 << 20);
        for back in [2, 4, 8, 16] {
            assert_eq!(look().await, back);
        }
        assert_eq!(pace.piece_length(), 8 << 20);
    });
}
