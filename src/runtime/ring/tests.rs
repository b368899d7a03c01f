use std::any::Any;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::FallocateFlags;
use nix::poll::PollFlags;

use super::{FsyncKind, RingFile, WriteFlags};
use crate::buffer::MemorySlice;
use crate::runtime::{Config, Handle, Runtime};

fn runtime(config: Config) -> Runtime {
    Runtime::new(&config).expect("io_uring is needed by these tests")
}

fn temporary(handle: &Handle) -> Rc<RingFile> {
    let file = tempfile::tempfile().expect("temporary file");
    handle.ring().file(OwnedFd::from(file))
}

#[test]
fn writes_are_read_back() {
    let runtime = runtime(Config::default());
    let handle = runtime.handle();
    runtime.block_on(async {
        let ring = handle.ring();
        let file = temporary(&handle);
        assert!(file.is_registered());
        let data = MemorySlice::from_bytes(b"some bytes");
        let written = ring.write_at(&file, 5, data.into(), WriteFlags::DSYNC);
        assert_eq!(written.await.expect("write"), 10);
        ring.fsync(&file, FsyncKind::Data).await.expect("fsync");
        let buffer = MemorySlice::zeroed(100);
        let read = ring.read_at(&file, 0, buffer.clone().into());
        assert_eq!(
            read.await.expect("read"),
            15,
            "short at the end of the file"
        );
        assert_eq!(&buffer.to_vec()[5..15], b"some bytes");
        let grown = ring.fallocate(&file, FallocateFlags::empty(), 0, 4096);
        grown.await.expect("fallocate");
        let read = ring.read_at(&file, 4096, buffer.into());
        assert_eq!(read.await.expect("read"), 0, "end of file");
    });
}

#[test]
fn an_errno_reaches_the_caller() {
    let runtime = runtime(Config::default());
    let handle = runtime.handle();
    runtime.block_on(async {
        let read_only = std::fs::File::open("/dev/null").expect("/dev/null");
        let file = handle.ring().file(OwnedFd::from(read_only));
        let data = MemorySlice::zeroed(10);
        let written = handle
            .ring()
            .write_at(&file, 0, data.into(), WriteFlags::empty());
        assert_eq!(
            written.await.expect_err("not writable").errno(),
            Errno::EBADF
        );
    });
}

/// A dropped read goes on in the kernel: were its buffer freed, the late bytes would land in
/// memory that belongs to someone else by then.
#[test]
fn a_dropped_read_keeps_buffer_file_and_guard_until_its_completion() {
    let runtime = runtime(Config::default());
    let handle = runtime.handle();
    let (reader, writer) = nix::unistd::pipe().expect("pipe");
    let mut writer = std::fs::File::from(writer);
    runtime.block_on(async {
        let ring = handle.ring();
        let file = ring.file(reader);
        let weak_file = Rc::downgrade(&file);
        let guard: Rc<dyn Any> = Rc::new(());
        let weak_guard = Rc::downgrade(&guard);
        let buffer = MemorySlice::zeroed(4096);
        let before = ring.in_flight();
        let read = ring.read_at(&file, 0, buffer.clone().into()).keep(guard);
        drop((read, file));
        handle.sleep(Duration::from_millis(10)).await;
        assert_eq!(ring.in_flight(), before + 1, "the read is still in flight");
        assert!(weak_file.upgrade().is_some() && weak_guard.upgrade().is_some());
        writer.write_all(b"late bytes").expect("pipe is open");
        while weak_guard.upgrade().is_some() {
            handle.sleep(Duration::from_millis(1)).await;
        }
        assert!(weak_file.upgrade().is_none());
        assert_eq!(ring.in_flight(), before);
        assert_eq!(&buffer.to_vec()[..10], b"late bytes");
    });
}

#[test]
fn a_dropped_runtime_waits_for_the_kernel() {
    let (reader, _writer) = nix::unistd::pipe().expect("pipe");
    let runtime = runtime(Config::default());
    let handle = runtime.handle();
    let guard: Rc<dyn Any> = Rc::new(());
    let weak = Rc::downgrade(&guard);
    runtime.block_on(async {
        let file = handle.ring().file(reader);
        let buffer = MemorySlice::zeroed(4096);
        drop(handle.ring().read_at(&file, 0, buffer.into()).keep(guard));
    });
    assert!(weak.upgrade().is_some());
    drop(runtime);
    assert!(weak.upgrade().is_none(), "cancelled, completed, released");
    assert_eq!(handle.ring().in_flight(), 0);
}

#[test]
fn cancelled_operations_complete_and_dropped_accepts_end() {
    let runtime = runtime(Config::default());
    let handle = runtime.handle();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listener");
    let address = listener.local_addr().expect("bound");
    runtime.block_on(async {
        let ring = handle.ring();
        let (reader, _writer) = nix::unistd::pipe().expect("pipe");
        let pipe = ring.file(reader);
        let poll = ring.poll_add(&pipe, PollFlags::POLLIN);
        poll.cancel();
        assert_eq!(poll.await.expect_err("cancelled").errno(), Errno::ECANCELED);

        let before = ring.in_flight();
        let listener = ring.file(OwnedFd::from(listener));
        drop(ring.accept(&listener));
        while ring.in_flight() > before {
            handle.sleep(Duration::from_millis(1)).await;
        }
        let accepted = ring.accept(&listener);
        let mut client = std::net::TcpStream::connect(address).expect("listening");
        let socket = ring.file(accepted.await.expect("accepted"));
        client.write_all(b"hello").expect("connected");
        let buffer = MemorySlice::zeroed(64);
        let received = ring.recv(&socket, buffer.clone()).await.expect("received");
        assert_eq!(&buffer.to_vec()[..received], b"hello");
        let sent = ring.send(&socket, buffer.slice(0, 5)).await.expect("sent");
        assert_eq!(sent, 5);
    });
}

#[test]
fn connects_to_a_listener_and_learns_of_a_refusal() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, socket};
    let runtime = runtime(Config::default());
    let handle = runtime.handle();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("listener");
    let address = listener.local_addr().expect("bound");
    let open = || {
        socket(
            AddressFamily::Inet,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            None,
        )
        .expect("socket")
    };
    runtime.block_on(async {
        let ring = handle.ring();
        let socket = ring.file(open());
        let connected = ring.connect(&socket, SockaddrStorage::from(address));
        connected.await.expect("listening");
        drop(listener);
        let socket = ring.file(open());
        let refused = ring.connect(&socket, SockaddrStorage::from(address)).await;
        assert_eq!(refused.expect_err("closed").errno(), Errno::ECONNREFUSED);
    });
}

#[test]
fn ten_thousand_operations_through_a_small_queue() {
    let runtime = runtime(Config {
        entries: 16,
        ..Config::default()
    });
    let handle = runtime.handle();
    runtime.block_on(async {
        let all: Vec<_> = (0..10_000).map(|_| handle.ring().nop()).collect();
        for nop in all {
            nop.await.expect("nop");
        }
    });
}

#[test]
fn submissions_of_one_turn_share_one_enter() {
    let runtime = runtime(Config::default());
    let handle = runtime.handle();
    runtime.block_on(async {
        let ring = handle.ring();
        let before = ring.enters();
        let tasks: Vec<_> = (0..64)
            .map(|_| {
                let ring = ring.clone();
                handle.spawn(async move { ring.nop().await.expect("nop") })
            })
            .collect();
        for task in tasks {
            task.await;
        }
        // The kernel completes a nop as it is submitted, so that nothing else makes turns.
        assert_eq!(ring.enters() - before, 1);
    });
}

#[test]
fn files_beyond_the_table_work_by_descriptor_and_slots_return() {
    let runtime = runtime(Config {
        file_slots: 4,
        ..Config::default()
    });
    let handle = runtime.handle();
    runtime.block_on(async {
        for _ in 0..10 {
            let files: Vec<_> = (0..8).map(|_| temporary(&handle)).collect();
            // One slot holds the eventfd that wakes the ring.
            assert_eq!(files.iter().filter(|file| file.is_registered()).count(), 3);
            for file in &files {
                let data = MemorySlice::from_bytes(b"x");
                let written = handle
                    .ring()
                    .write_at(file, 0, data.into(), WriteFlags::empty());
                assert_eq!(written.await.expect("write"), 1);
            }
        }
    });
}
