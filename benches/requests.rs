//! What one request costs this process: the loop of a ublk queue without ublk.
//!
//!     cargo bench --bench requests [-- CASE REQUESTS]
//!
//! Each of 16 tasks fetches by a command that `/dev/null` completes at once (Linux 6.16 or later) and
//! carries a request of 4 KiB out over a root edge. Without arguments every case is timed. Instructions per
//! request: the binary under `valgrind --tool=callgrind` with two numbers of requests, and the difference.

use std::cell::Cell;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use liveblk::block::{Child, Permission, Permissions, WriteFlags};
use liveblk::blockdev::{Blockdev, Value};
use liveblk::buffer::{KernelBuffer, KernelSlice, MemorySlice, Payload};
use liveblk::error::Result;
use liveblk::format::qcow2::create::CreateOptions;
use liveblk::runtime::ring::RingFile;
use liveblk::runtime::{Config, Handle, Runtime};

const CASES: [&str; 5] = [
    "nothing",
    "null-read",
    "null-write",
    "qcow2-read",
    "qcow2-write",
];
const DEPTH: u64 = 16;
const BLOCK: u64 = 4096;
const SIZE: u64 = 64 << 20;

fn main() {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|word| !word.starts_with("--"))
        .collect();
    let count = arguments.get(1).map(|count| count.parse().expect("count"));
    for case in CASES {
        if arguments.first().is_none_or(|wanted| wanted == case) {
            run(case, count.unwrap_or(400_000));
        }
    }
}

fn run(case: &str, count: u64) {
    let runtime = Runtime::new(&Config::default()).expect("io_uring");
    let handle = runtime.handle();
    let directory = tempfile::tempdir().expect("temporary directory");
    runtime.block_on(async {
        let image = directory.path().join("image");
        let child = match case.split_once('-') {
            Some(("null", _)) => Some(null(&handle).await.expect("node")),
            Some(("qcow2", _)) => {
                let path = image.to_string_lossy();
                Some(qcow2(&handle, &path).await.expect("image"))
            }
            _ => None,
        };
        let load = Rc::new(Load {
            handle: handle.clone(),
            device: null_device(&handle),
            child,
            writes: case.ends_with("-write"),
            left: Cell::new(count),
        });
        let begin = Instant::now();
        let tags: Vec<_> = (0..DEPTH)
            .map(|tag| handle.spawn(load.clone().tag(tag)))
            .collect();
        for tag in tags {
            tag.await;
        }
        let each = begin.elapsed().as_nanos() as u64 / count;
        println!("{case}: {each} ns per request, user and kernel");
    });
}

struct Load {
    handle: Handle,
    device: Rc<RingFile>,
    child: Option<Rc<Child>>,
    writes: bool,
    left: Cell<u64>,
}

impl Load {
    async fn tag(self: Rc<Load>, tag: u64) {
        let memory = MemorySlice::zeroed(BLOCK as usize);
        let pages: Rc<dyn KernelBuffer> = Rc::new(Pages);
        let mut block = tag;
        while self.left.get() > 0 {
            self.left.set(self.left.get() - 1);
            let fetched = self
                .handle
                .ring()
                .uring_cmd16(&self.device, 0, [0; 16], 0)
                .await;
            assert_eq!(fetched, 0, "/dev/null takes commands since Linux 6.16");
            let Some(child) = &self.child else { continue };
            let payload = match child.node().driver().driver_name() {
                "qcow2" => Payload::Memory(memory.clone()),
                _ => Payload::Kernel(KernelSlice::whole(pages.clone())),
            };
            block = (block + 7919) % (SIZE / BLOCK);
            let done = match self.writes {
                true => {
                    child
                        .write(block * BLOCK, payload, WriteFlags::empty())
                        .await
                }
                false => child.read(block * BLOCK, payload).await,
            };
            done.expect("request");
        }
    }
}

/// Stands for the pages of a ublk request, which nobody touches.
struct Pages;

impl KernelBuffer for Pages {
    fn index(&self) -> u16 {
        0
    }

    fn length(&self) -> usize {
        BLOCK as usize
    }

    fn copy_out(&self, _offset: usize, _bytes: &MemorySlice) -> Result<()> {
        unreachable!("a null node touches no bytes")
    }

    fn copy_in(&self, _offset: usize, _bytes: &MemorySlice) -> Result<()> {
        unreachable!("a null node touches no bytes")
    }
}

fn null_device(handle: &Handle) -> Rc<RingFile> {
    let device = std::fs::File::open("/dev/null").expect("/dev/null");
    handle.ring().file(OwnedFd::from(device))
}

async fn null(handle: &Handle) -> Result<Rc<Child>> {
    let description = Value::map([
        ("driver", Value::str("null-co")),
        ("node-name", Value::str("node")),
        ("size", Value::Int(SIZE.into())),
        ("read-zeroes", Value::Bool(false)),
    ]);
    open(handle, description).await
}

/// A fully allocated image.
async fn qcow2(handle: &Handle, path: &str) -> Result<Rc<Child>> {
    let file = || {
        Value::map([
            ("driver", Value::str("file")),
            ("filename", Value::str(path)),
        ])
    };
    let maker = Blockdev::new(handle, &Default::default());
    maker.create_file(path, 0).await?;
    let options = CreateOptions::new(SIZE);
    maker.create_qcow2(file(), &options).await?;
    let description = Value::map([
        ("driver", Value::str("qcow2")),
        ("node-name", Value::str("node")),
        ("file", file()),
    ]);
    let child = open(handle, description).await?;
    let piece = MemorySlice::zeroed(1 << 20);
    for number in 0..SIZE >> 20 {
        let payload = piece.clone().into();
        child
            .write(number << 20, payload, WriteFlags::empty())
            .await?;
    }
    child.flush().await?;
    Ok(child)
}

async fn open(handle: &Handle, description: Value) -> Result<Rc<Child>> {
    let blockdev = Blockdev::new(handle, &Default::default());
    let node = blockdev.add(description).await?;
    let permissions = Permissions {
        required: Permission::CONSISTENT_READ | Permission::WRITE,
        shared: Permission::all(),
    };
    blockdev
        .graph()
        .attach_root("benchmark", &node, permissions)
}
