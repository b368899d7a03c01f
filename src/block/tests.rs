//! The block layer's own promises, over a small driver with blocks of 512 bytes.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;

use crate::buffer::{MemorySlice, Payload};
use crate::error::{Error, Result};
use crate::range::ByteRange;
use crate::runtime::{Handle, Runtime, Sleep};

use super::*;

const BLOCK: u64 = 512;
const SIZE: u64 = 64 * BLOCK;

/// Memory that takes whole blocks only, answers after a delay, and counts.
#[derive(Clone)]
struct Blocks {
    state: Rc<State>,
    handle: Handle,
}

#[derive(Default)]
struct State {
    bytes: RefCell<Vec<u8>>,
    requests: RefCell<Vec<&'static str>>,
    fail_flush: Cell<bool>,
    closed: Cell<bool>,
}

impl Blocks {
    fn new(handle: &Handle) -> Blocks {
        let state = Rc::new(State::default());
        *state.bytes.borrow_mut() = vec![0xee; SIZE as usize];
        Blocks {
            state,
            handle: handle.clone(),
        }
    }

    fn begin(&self, what: &'static str, range: ByteRange) -> Sleep {
        assert!(
            range.is_aligned(BLOCK),
            "{what} {range} is not whole blocks"
        );
        self.state.requests.borrow_mut().push(what);
        self.handle.sleep(Duration::from_micros(10))
    }

    fn count(&self, what: &str) -> usize {
        self.state
            .requests
            .borrow()
            .iter()
            .filter(|request| **request == what)
            .count()
    }
}

fn range_of(offset: u64, payload: &Payload) -> ByteRange {
    ByteRange::between(offset, offset + payload.length() as u64)
}

impl Driver for Blocks {
    fn driver_name(&self) -> &'static str {
        "blocks"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn size(&self) -> u64 {
        SIZE
    }

    fn limits(&self) -> Limits {
        Limits {
            request_alignment: BLOCK as u32,
            max_transfer: 4096,
            ..Limits::default()
        }
    }

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        let range = range_of(offset, &payload);
        let delay = self.begin("read", range);
        Box::pin(async move {
            delay.await;
            let bytes =
                self.state.bytes.borrow()[range.start() as usize..range.end() as usize].to_vec();
            payload.copy_in(0, &MemorySlice::from_bytes(&bytes))
        })
    }

    fn write(&self, offset: u64, payload: Payload, _flags: WriteFlags) -> IoFuture<'_, ()> {
        let range = range_of(offset, &payload);
        let delay = self.begin("write", range);
        Box::pin(async move {
            delay.await;
            let bytes = payload.to_memory()?.to_vec();
            self.state.bytes.borrow_mut()[range.start() as usize..range.end() as usize]
                .copy_from_slice(&bytes);
            Ok(())
        })
    }

    fn write_zeroes(&self, range: ByteRange, _flags: ZeroFlags) -> IoFuture<'_, ()> {
        drop(self.begin("zeroes", range));
        Box::pin(async { Err(Error::from(Errno::EOPNOTSUPP)) })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        drop(self.begin("discard", range));
        Box::pin(async { Ok(()) })
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        let delay = self.begin("flush", ByteRange::between(0, 0));
        Box::pin(async move {
            delay.await;
            let fails = self.state.fail_flush.get();
            if fails {
                Err(Error::from(Errno::EIO))
            } else {
                Ok(())
            }
        })
    }

    fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent> {
        Box::pin(async move { Ok(Extent::data(range.length(), range.start())) })
    }

    fn child_permissions(&self, _: Role, users: Permissions, _: bool) -> Permissions {
        users.for_filter()
    }

    fn set_backing(&self, _backing: Option<Rc<Child>>) -> Result<()> {
        Ok(())
    }

    fn close(&self) -> IoFuture<'_, ()> {
        self.state.closed.set(true);
        Box::pin(async { Ok(()) })
    }
}

fn run<T>(test: impl AsyncFnOnce(Handle) -> T) -> T {
    let runtime = Runtime::simulated(1).expect("a simulated runtime");
    let handle = runtime.handle();
    runtime.block_on(test(handle))
}

fn spec(name: &str, options: NodeOptions) -> NodeSpec {
    NodeSpec {
        name: name.to_owned(),
        options,
        file_name: format!("{name}.img"),
        implicit: false,
    }
}

fn add(graph: &Graph, handle: &Handle, name: &str, options: NodeOptions) -> (Rc<Node>, Blocks) {
    let blocks = Blocks::new(handle);
    let node = graph
        .insert(spec(name, options), Box::new(blocks.clone()), Vec::new())
        .expect("a node can be added");
    node.set_monitor_owned(true);
    (node, blocks)
}

fn writer() -> Permissions {
    let required = Permission::CONSISTENT_READ | Permission::WRITE;
    Permissions {
        required,
        shared: Permission::all(),
    }
}

fn bytes(length: usize, value: u8) -> Payload {
    let memory = MemorySlice::zeroed(length);
    memory.fill(0, length, value);
    memory.into()
}

#[test]
fn unaligned_writes_keep_their_neighbours() {
    run(async |handle| {
        let graph = Graph::new();
        let (node, blocks) = add(&graph, &handle, "a", NodeOptions::default());
        let edge = graph.attach_root("test", &node, writer()).expect("an edge");
        let tasks: Vec<_> = (0..8u8)
            .map(|index| {
                let edge = edge.clone();
                handle.spawn(async move {
                    let offset = 100 + u64::from(index) * 100;
                    edge.write(offset, bytes(100, index), WriteFlags::empty())
                        .await
                })
            })
            .collect();
        for task in tasks {
            task.await.expect("a write");
        }
        let content = blocks.state.bytes.borrow();
        for index in 0..8 {
            let start = 100 + index * 100;
            assert!(
                content[start..start + 100]
                    .iter()
                    .all(|byte| *byte == index as u8)
            );
        }
        assert!(
            content[..100]
                .iter()
                .chain(&content[900..])
                .all(|byte| *byte == 0xee)
        );
    });
}

#[test]
fn long_unaligned_reads_are_cut_and_padded() {
    run(async |handle| {
        let graph = Graph::new();
        let (node, blocks) = add(&graph, &handle, "a", NodeOptions::default());
        for (index, byte) in blocks.state.bytes.borrow_mut().iter_mut().enumerate() {
            *byte = (index / 7) as u8;
        }
        let edge = graph.attach_root("test", &node, writer()).expect("an edge");
        let memory = MemorySlice::zeroed(10_001);
        edge.read(333, memory.clone().into()).await.expect("a read");
        assert_eq!(memory.to_vec(), blocks.state.bytes.borrow()[333..10_334]);
    });
}

#[test]
fn requests_outside_the_node_or_without_permission_fail() {
    run(async |handle| {
        let graph = Graph::new();
        let (node, blocks) = add(&graph, &handle, "a", NodeOptions::default());
        let reader = Permissions {
            required: Permission::CONSISTENT_READ,
            shared: Permission::all(),
        };
        let edge = graph.attach_root("test", &node, reader).expect("an edge");
        let late = edge
            .read(SIZE - 1, bytes(2, 0))
            .await
            .expect_err("beyond the end");
        assert_eq!(late.errno(), Errno::EIO);
        let wrap = edge.read(u64::MAX, bytes(2, 0)).await.expect_err("wraps");
        assert_eq!(wrap.errno(), Errno::EIO);
        let denied = edge
            .write(0, bytes(2, 0), WriteFlags::empty())
            .await
            .expect_err("read only");
        assert_eq!(denied.errno(), Errno::EPERM);
        assert!(blocks.state.requests.borrow().is_empty());
    });
}

#[test]
fn zeroes_fall_back_to_data_unless_forbidden() {
    run(async |handle| {
        let graph = Graph::new();
        let (node, blocks) = add(&graph, &handle, "a", NodeOptions::default());
        let edge = graph.attach_root("test", &node, writer()).expect("an edge");
        let range = ByteRange::between(700, 5000);
        edge.write_zeroes(range, ZeroFlags::MAY_UNMAP)
            .await
            .expect("zeroes");
        let content = blocks.state.bytes.borrow().clone();
        assert!(content[700..5000].iter().all(|byte| *byte == 0));
        assert!(
            content[..700]
                .iter()
                .chain(&content[5000..])
                .all(|byte| *byte == 0xee)
        );
        let refused = edge
            .write_zeroes(ByteRange::between(0, 512), ZeroFlags::NO_FALLBACK)
            .await;
        assert_eq!(refused.expect_err("no fallback").errno(), Errno::EOPNOTSUPP);
    });
}

#[test]
fn discards_end_at_a_node_that_ignores_them_and_never_touch_part_of_a_block() {
    run(async |handle| {
        let graph = Graph::new();
        let (ignoring, ignored) = add(&graph, &handle, "a", NodeOptions::default());
        let unmap = NodeOptions {
            discard: DiscardMode::Unmap,
            ..NodeOptions::default()
        };
        let (unmapping, unmapped) = add(&graph, &handle, "b", unmap);
        for node in [&ignoring, &unmapping] {
            let edge = graph.attach_root("test", node, writer()).expect("an edge");
            edge.discard(ByteRange::between(1, 511))
                .await
                .expect("less than a block");
            edge.discard(ByteRange::between(100, 2000))
                .await
                .expect("some blocks");
        }
        assert_eq!(ignored.count("discard"), 0);
        assert_eq!(unmapped.count("discard"), 1);
    });
}

#[test]
fn zero_detection_turns_writes_into_zeroes() {
    run(async |handle| {
        let graph = Graph::new();
        let options = NodeOptions {
            detect_zeroes: DetectZeroes::On,
            ..NodeOptions::default()
        };
        let (node, blocks) = add(&graph, &handle, "a", options);
        let edge = graph.attach_root("test", &node, writer()).expect("an edge");
        edge.write(0, bytes(1024, 0), WriteFlags::empty())
            .await
            .expect("zeroes");
        assert_eq!(blocks.count("zeroes"), 1);
        edge.write(0, bytes(1024, 1), WriteFlags::empty())
            .await
            .expect("data");
        assert_eq!(blocks.count("zeroes"), 1);
    });
}

#[test]
fn a_drained_section_waits_for_requests_and_holds_new_ones() {
    run(async |handle| {
        let graph = Graph::new();
        let (node, blocks) = add(&graph, &handle, "a", NodeOptions::default());
        let edge = graph.attach_root("test", &node, writer()).expect("an edge");
        let write = |edge: Rc<Child>, value: u8| {
            handle.spawn(async move { edge.write(0, bytes(512, value), WriteFlags::empty()).await })
        };
        let early = write(edge.clone(), 1);
        handle.sleep(Duration::from_micros(5)).await;
        let section = graph
            .drain(std::slice::from_ref(&node))
            .await
            .expect("a drained section");
        assert_eq!(edge.in_flight(), 0);
        let late = write(edge.clone(), 2);
        handle.sleep(Duration::from_secs(1)).await;
        assert!(early.is_finished());
        assert!(!late.is_finished());
        assert_eq!(blocks.state.bytes.borrow()[0], 1);
        drop(section);
        late.await.expect("the held write");
        assert_eq!(blocks.state.bytes.borrow()[0], 2);
    });
}

#[test]
fn flushes_that_arrive_together_share_one_and_share_its_failure() {
    run(async |handle| {
        let graph = Graph::new();
        let (node, blocks) = add(&graph, &handle, "a", NodeOptions::default());
        let edge = graph.attach_root("test", &node, writer()).expect("an edge");
        for (fails, flushes) in [(false, 2), (true, 4)] {
            blocks.state.fail_flush.set(fails);
            let tasks: Vec<_> = (0..10)
                .map(|_| {
                    let edge = edge.clone();
                    handle.spawn(async move { edge.flush().await })
                })
                .collect();
            for task in tasks {
                assert_eq!(task.await.is_err(), fails);
            }
            assert_eq!(
                blocks.count("flush"),
                flushes,
                "one that runs, one for all who came later"
            );
        }
        blocks.state.fail_flush.set(false);
        edge.flush()
            .await
            .expect("a failure is not reported to later callers");
    });
}

#[test]
fn conflicting_users_are_refused_by_name_and_nothing_changes() {
    run(async |handle| {
        let graph = Graph::new();
        let (node, _) = add(&graph, &handle, "a", NodeOptions::default());
        let alone = Permissions {
            required: Permission::WRITE,
            shared: Permission::empty(),
        };
        let _first = graph
            .attach_root("commit job 'j1'", &node, alone)
            .expect("the first user");
        let refused = graph.attach_root("an unnamed block device", &node, writer());
        let error = refused.err().expect("a conflict");
        assert_eq!(
            error.message(),
            "Permission conflict on node 'a': permissions 'consistent read, write' are both \
             required by an unnamed block device (uses node 'a' as 'root' child) and unshared by \
             commit job 'j1' (uses node 'a' as 'root' child)."
        );
        assert_eq!(node.parents().len(), 1);
    });
}

#[test]
fn read_only_nodes_refuse_writers() {
    run(async |handle| {
        let graph = Graph::new();
        let options = NodeOptions {
            read_only: true,
            ..NodeOptions::default()
        };
        let (node, _) = add(&graph, &handle, "a", options);
        let error = graph
            .attach_root("test", &node, writer())
            .err()
            .expect("refused");
        assert_eq!(error.message(), "Block node is read-only");
    });
}

#[test]
fn cycles_are_refused() {
    run(async |handle| {
        let graph = Graph::new();
        let (base, _) = add(&graph, &handle, "base", NodeOptions::default());
        let (top, _) = add(&graph, &handle, "top", NodeOptions::default());
        let section = graph
            .drain(&[base.clone(), top.clone()])
            .await
            .expect("drained");
        graph
            .set_backing(&section, &top, Some(&base))
            .expect("top over base");
        let error = graph
            .set_backing(&section, &base, Some(&top))
            .expect_err("a cycle");
        assert!(error.message().contains("would create a cycle"));
        graph
            .set_backing(&section, &top, None)
            .expect("taken away again");
        assert!(base.parents().is_empty());
    });
}

#[test]
fn nodes_without_users_are_closed_down_the_chain() {
    run(async |handle| {
        let graph = Graph::new();
        let (base, below) = add(&graph, &handle, "base", NodeOptions::default());
        let (top, above) = add(&graph, &handle, "top", NodeOptions::default());
        let section = graph
            .drain(&[base.clone(), top.clone()])
            .await
            .expect("drained");
        graph
            .set_backing(&section, &top, Some(&base))
            .expect("top over base");
        drop(section);
        let edge = graph.attach_root("test", &top, writer()).expect("a user");
        base.set_monitor_owned(false);
        top.set_monitor_owned(false);
        graph.release(&top).await.expect("still in use");
        assert!(!above.state.closed.get());
        graph.detach(&edge).await.expect("closed");
        assert!(above.state.closed.get() && below.state.closed.get());
        assert!(graph.nodes().is_empty());
    });
}

#[test]
fn a_graph_that_is_dropped_frees_its_nodes() {
    let state = run(async |handle| {
        let graph = Graph::new();
        let (base, blocks) = add(&graph, &handle, "base", NodeOptions::default());
        let (top, _) = add(&graph, &handle, "top", NodeOptions::default());
        let section = graph
            .drain(&[base.clone(), top.clone()])
            .await
            .expect("drained");
        graph
            .set_backing(&section, &top, Some(&base))
            .expect("top over base");
        let _edge = graph.attach_root("test", &top, writer()).expect("a user");
        Rc::downgrade(&blocks.state)
    });
    assert_eq!(state.strong_count(), 0);
}
