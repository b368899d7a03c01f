//! The NBD server in process, on a node in memory: what tests of it start from.
//!
//! [`serve`] runs a server on its own runtime and hands a [`Site`] to the test, which runs peers (programs or raw
//! sockets) on threads of their own.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::rc::Rc;
use std::time::Duration;

use nix::errno::Errno;

use liveblk::block::{
    Driver, Extent, ExtentKind, Graph, IoFuture, Node, NodeOptions, NodeSpec, Permissions, Role,
    WriteFlags, ZeroFlags,
};
use liveblk::buffer::{MemorySlice, Payload};
use liveblk::error::Error;
use liveblk::export::nbd::{NbdExportSpec, NbdServer, NbdServerOptions, NbdService, ServerAddress};
use liveblk::export::{ExportSpec, Exports};
use liveblk::range::ByteRange;
use liveblk::runtime::sync::Event;
use liveblk::runtime::{Config, Handle, Runtime};

/// Bytes of a block of the node in memory, the unit of its block status.
pub(crate) const BLOCK: u64 = 4096;

/// A node in memory that knows what was allocated in it.
pub(crate) struct MemoryNode {
    bytes: MemorySlice,
    data: RefCell<BTreeSet<u64>>,
    /// Reads and writes that touch it fail with EIO.
    pub(crate) bad: Cell<Option<ByteRange>>,
    /// Writes fail with ENOSPC.
    pub(crate) full: Cell<bool>,
    /// `write_zeroes` cannot be done without writing data.
    pub(crate) slow_zeroes: Cell<bool>,
    pub(crate) flushes: Cell<u32>,
    pub(crate) delay: Cell<Option<Duration>>,
    /// Writes wait for it, as in a disk: also when nobody waits for them any more.
    pub(crate) held: RefCell<Option<Rc<Event>>>,
    handle: Handle,
}

impl MemoryNode {
    fn new(handle: &Handle, size: u64) -> Self {
        Self {
            bytes: MemorySlice::zeroed(size as usize),
            data: RefCell::default(),
            bad: Cell::new(None),
            full: Cell::new(false),
            slow_zeroes: Cell::new(false),
            flushes: Cell::new(0),
            delay: Cell::new(None),
            held: RefCell::default(),
            handle: handle.clone(),
        }
    }

    async fn access(&self, range: ByteRange, writes: bool) -> Result<(), Error> {
        if let Some(delay) = self.delay.get() {
            self.handle.sleep(delay).await;
        }
        if self.bad.get().is_some_and(|bad| bad.overlaps(&range)) {
            return Err(Error::from_errno(Errno::EIO, "bad range"));
        }
        if writes && self.full.get() {
            return Err(Error::from_errno(Errno::ENOSPC, "node is full"));
        }
        Ok(())
    }

    fn note(&self, range: ByteRange, allocated: bool) {
        let mut data = self.data.borrow_mut();
        if allocated {
            data.extend(range.start() / BLOCK..range.end().div_ceil(BLOCK));
        } else if let Some(inner) = range.align_inward(BLOCK) {
            for block in inner.start() / BLOCK..inner.end() / BLOCK {
                data.remove(&block);
            }
        }
    }
}

fn range(offset: u64, length: usize) -> ByteRange {
    ByteRange::between(offset, offset + length as u64)
}

impl Driver for MemoryNode {
    fn driver_name(&self) -> &'static str {
        "memory"
    }

    fn as_any(&self) -> &dyn Any {
        self
    }

    fn size(&self) -> u64 {
        self.bytes.length() as u64
    }

    fn read(&self, offset: u64, payload: Payload) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.access(range(offset, payload.length()), false).await?;
            payload.copy_in(0, &self.bytes.slice(offset as usize, payload.length()))
        })
    }

    fn write(&self, offset: u64, payload: Payload, _: WriteFlags) -> IoFuture<'_, ()> {
        Box::pin(async move {
            let range = range(offset, payload.length());
            self.access(range, true).await?;
            self.note(range, true);
            let place = self.bytes.slice(offset as usize, payload.length());
            let held = self.held.borrow().clone();
            match held {
                None => payload.copy_out(0, &place),
                Some(event) => {
                    let written = async move {
                        event.wait().await;
                        payload.copy_out(0, &place)
                    };
                    self.handle.spawn(written).await
                }
            }
        })
    }

    fn write_zeroes(&self, range: ByteRange, flags: ZeroFlags) -> IoFuture<'_, ()> {
        Box::pin(async move {
            self.access(range, true).await?;
            if self.slow_zeroes.get() {
                return Err(Error::from(Errno::EOPNOTSUPP));
            }
            self.bytes
                .fill(range.start() as usize, range.length() as usize, 0);
            self.note(range, !flags.contains(ZeroFlags::MAY_UNMAP));
            Ok(())
        })
    }

    fn discard(&self, range: ByteRange) -> IoFuture<'_, ()> {
        self.write_zeroes(range, ZeroFlags::MAY_UNMAP)
    }

    fn flush(&self) -> IoFuture<'_, ()> {
        self.flushes.set(self.flushes.get() + 1);
        Box::pin(async { Ok(()) })
    }

    fn block_status(&self, range: ByteRange) -> IoFuture<'_, Extent> {
        let data = self.data.borrow();
        let allocated = data.contains(&(range.start() / BLOCK));
        let mut end = range.start() / BLOCK * BLOCK + BLOCK;
        while end < range.end() && data.contains(&(end / BLOCK)) == allocated {
            end += BLOCK;
        }
        let length = end.min(range.end()) - range.start();
        let kind = match allocated {
            true => ExtentKind::Data {
                host_offset: None,
                compressed: false,
            },
            false => ExtentKind::Zero { host_offset: None },
        };
        Box::pin(async move { Ok(Extent { length, kind }) })
    }

    fn child_permissions(&self, _: Role, _: Permissions, _: bool) -> Permissions {
        Permissions::NONE
    }

    fn close(&self) -> IoFuture<'_, ()> {
        Box::pin(async { Ok(()) })
    }
}

impl MemoryNode {
    /// What it holds now, past all requests.
    pub(crate) fn content(&self, offset: usize, length: usize) -> Vec<u8> {
        self.bytes.slice(offset, length).to_vec()
    }
}

/// A running server and what belongs to it.
#[derive(Clone)]
pub(crate) struct Site {
    pub(crate) handle: Handle,
    pub(crate) graph: Graph,
    pub(crate) exports: Exports,
    pub(crate) service: NbdService,
    /// Ids of exports that were announced as deleted.
    pub(crate) deleted: Rc<RefCell<Vec<String>>>,
    directory: Rc<tempfile::TempDir>,
}

/// Options of a server at a UNIX socket of the site, as QEMU's defaults are.
fn server_options(socket: PathBuf) -> NbdServerOptions {
    NbdServerOptions {
        address: ServerAddress::Unix(socket),
        max_connections: 100,
        handshake_limit: Some(Duration::from_secs(10)),
    }
}

impl Site {
    fn new(handle: Handle) -> Self {
        let graph = Graph::new();
        let exports = Exports::new(handle.clone(), graph.clone());
        let deleted = Rc::new(RefCell::new(Vec::new()));
        let sink = deleted.clone();
        exports.on_deleted(move |id| sink.borrow_mut().push(id.to_owned()));
        let service = NbdService::new(exports.clone());
        let directory = Rc::new(tempfile::tempdir().unwrap());
        Self {
            handle,
            graph,
            exports,
            service,
            deleted,
            directory,
        }
    }

    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Where the server listens.
    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("nbd.sock")
    }

    /// An NBD URI of an export.
    pub(crate) fn uri(&self, name: &str) -> String {
        format!("nbd+unix:///{name}?socket={}", self.socket().display())
    }

    /// A node in memory that stays until the site goes.
    pub(crate) fn node(&self, name: &str, size: u64, options: NodeOptions) -> Rc<Node> {
        let spec = NodeSpec {
            name: name.into(),
            options,
            file_name: name.into(),
            implicit: false,
        };
        let driver = Box::new(MemoryNode::new(&self.handle, size));
        let node = self.graph.insert(spec, driver, Vec::new()).unwrap();
        node.set_monitor_owned(true);
        node
    }

    /// Export a node under its own name.
    pub(crate) fn export(&self, node: &Rc<Node>, writable: bool) {
        self.service
            .add(export_spec(node.name(), node.name(), writable))
            .unwrap();
    }

    /// Run something that blocks on a thread, while the server serves.
    pub(crate) async fn outside<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        self.handle.blocking(work).await
    }

    /// Run a program; its output if it succeeds, its complaints if not.
    pub(crate) async fn run(&self, program: &str, arguments: &[&str]) -> Result<String, String> {
        let mut command = Command::new(program);
        command.args(arguments).current_dir(self.directory());
        let output = self.outside(move || command.output()).await;
        let output = output.unwrap_or_else(|error| panic!("{program}: {error}"));
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match output.status.success() {
            true => Ok(text(&output.stdout)),
            false => Err(text(&output.stdout) + &text(&output.stderr)),
        }
    }
}

pub(crate) fn memory(node: &Node) -> &MemoryNode {
    node.driver_as().unwrap()
}

pub(crate) fn export_spec(id: &str, node_name: &str, writable: bool) -> NbdExportSpec {
    NbdExportSpec {
        common: ExportSpec {
            id: id.into(),
            node_name: node_name.into(),
            writable,
        },
        name: Some(id.into()),
        description: None,
        bitmaps: Vec::new(),
        allocation_depth: false,
        writethrough: false,
    }
}

/// Run a test with a server of default options.
pub(crate) fn serve<F: Future<Output = ()>>(test: impl FnOnce(Site) -> F) {
    serve_with(|_| {}, test);
}

/// Run a test with a server; `adjust` changes its options. At the end everything must be closed.
pub(crate) fn serve_with<F: Future<Output = ()>>(
    adjust: impl FnOnce(&mut NbdServerOptions),
    test: impl FnOnce(Site) -> F,
) {
    let runtime = Runtime::new(&Config::default()).unwrap();
    let handle = runtime.handle();
    runtime.block_on(async {
        let site = Site::new(handle.clone());
        let mut options = server_options(site.socket());
        adjust(&mut options);
        site.service.start(options).await.unwrap();
        test(site.clone()).await;
        if site.service.is_running() {
            site.service.stop().await.unwrap();
        }
        assert!(site.exports.list().is_empty());
        assert!(!site.socket().exists());
        handle.yield_now().await;
        assert_eq!(handle.tasks(), 0, "tasks outlive the server");
    });
}

/// Whether a program is there; says so if the test is skipped for want of it.
pub(crate) fn has_program(program: &str) -> bool {
    let found = Command::new(program).arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: {program} is not installed");
    }
    found
}

#[test]
fn start_and_stop_say_what_qemu_says() {
    serve(|site| async move {
        let again = site
            .service
            .start(server_options(site.socket()))
            .await
            .unwrap_err();
        assert_eq!(again.message(), "NBD server already running");
        site.service.stop().await.unwrap();
        let stopped = site.service.stop().await.unwrap_err();
        assert_eq!(stopped.message(), "NBD server not running");
        site.node("n", 1 << 20, NodeOptions::default());
        let error = site.service.add(export_spec("n", "n", true)).err().unwrap();
        assert_eq!(error.message(), "NBD server not running");
        let mut options = server_options("nodir/x.sock".into());
        let error = site.service.start(options.clone()).await.unwrap_err();
        let expected = "Failed to bind socket to nodir/x.sock: No such file or directory";
        assert_eq!(error.message(), expected);
        options.address = ServerAddress::Unix(site.socket());
        site.service.start(options).await.unwrap();
    });
}

#[test]
fn exports_are_refused_with_the_words_of_qemu() {
    serve(|site| async move {
        site.node("n", 1 << 20, NodeOptions::default());
        let read_only = NodeOptions {
            read_only: true,
            ..NodeOptions::default()
        };
        site.node("ro", 1 << 20, read_only);
        site.service.add(export_spec("e", "n", false)).unwrap();
        let long = "x".repeat(4097);
        let named = |id: &str, node: &str, name: &str| NbdExportSpec {
            name: Some(name.into()),
            ..export_spec(id, node, false)
        };
        let described = NbdExportSpec {
            description: Some(long.clone()),
            ..named("d", "n", "d")
        };
        for (spec, expected) in [
            (
                export_spec("e 1", "n", false),
                "Invalid block export id".to_owned(),
            ),
            (
                export_spec("e", "n", false),
                "Block export id 'e' is already in use".into(),
            ),
            (
                export_spec("f", "x", false),
                "Cannot find device='' nor node-name='x'".into(),
            ),
            (
                export_spec("f", "ro", true),
                "Cannot export read-only node as writable".into(),
            ),
            (
                named("f", "n", "e"),
                "NBD server already has export named 'e'".into(),
            ),
            (
                named("f", "n", &long),
                format!("export name '{long}' too long"),
            ),
            (described, format!("description '{long}' too long")),
        ] {
            let error = site.service.add(spec).err().unwrap();
            assert_eq!(error.message(), expected);
        }
        assert_eq!(site.exports.list().len(), 1);
    });
}

#[test]
fn tcp_listens_on_a_free_port() {
    let runtime = Runtime::new(&Config::default()).unwrap();
    let handle = runtime.handle();
    runtime.block_on(async {
        let exports = Exports::new(handle.clone(), Graph::new());
        let address = liveblk::export::nbd::InetAddress {
            host: "127.0.0.1".into(),
            ..Default::default()
        };
        let mut options = server_options(PathBuf::new());
        options.address = ServerAddress::Inet(address);
        let server = NbdServer::start(&handle, options).await.unwrap();
        let bound = server.tcp_addresses()[0];
        assert_ne!(bound.port(), 0);
        let greeting = handle.blocking(move || {
            use std::io::Read;
            let mut greeting = [0; 18];
            std::net::TcpStream::connect(bound)
                .unwrap()
                .read_exact(&mut greeting)
                .unwrap();
            greeting
        });
        assert_eq!(greeting.await[..16], *b"NBDMAGICIHAVEOPT");
        server.stop(&exports).await;
    });
}
