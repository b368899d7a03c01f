//! Images in a directory, their descriptions, and QEMU's tools on them.

use std::future::Future;
use std::process::{Command, Output};
use std::rc::Rc;

use liveblk::block::{Child, Graph, Node, Permission, Permissions};
use liveblk::blockdev::{Blockdev, Value};
use liveblk::runtime::{Config, Handle, Runtime};
use tempfile::TempDir;

/// What a writable export needs and shares.
pub(crate) const WRITER: Permissions = Permissions {
    required: Permission::CONSISTENT_READ.union(Permission::WRITE),
    shared: Permission::CONSISTENT_READ
        .union(Permission::WRITE)
        .union(Permission::WRITE_UNCHANGED),
};

/// A graph whose images lie in a directory of its own.
#[derive(Clone)]
pub(crate) struct Images {
    pub(crate) blockdev: Blockdev,
    pub(crate) handle: Handle,
    pub(crate) directory: Rc<TempDir>,
}

/// Runs `test`, unless QEMU's tools are missing.
pub(crate) fn with_images<F: Future<Output = ()>>(seed: u64, test: impl FnOnce(Images) -> F) {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    let config = Config {
        seed,
        ..Config::default()
    };
    let runtime = Runtime::new(&config).expect("io_uring is there");
    let images = Images {
        blockdev: Blockdev::new(&runtime.handle(), &Graph::new()),
        handle: runtime.handle(),
        directory: Rc::new(TempDir::new().expect("a directory")),
    };
    runtime.block_on(test(images));
}

impl Images {
    pub(crate) fn path(&self, name: &str) -> String {
        let path = self.directory.path().join(name);
        path.to_str().expect("UTF-8").to_owned()
    }

    pub(crate) fn tool(&self, program: &str, arguments: &[&str]) -> Output {
        Command::new(program)
            .current_dir(self.directory.path())
            .args(arguments)
            .output()
            .expect("the tool starts")
    }

    /// A tool that must succeed.
    pub(crate) fn must(&self, program: &str, arguments: &[&str]) {
        let output = self.tool(program, arguments);
        assert!(
            output.status.success(),
            "{program} {arguments:?}: {output:?}"
        );
    }

    /// A tool that must fail with this text on stderr.
    pub(crate) fn must_fail(&self, program: &str, arguments: &[&str], text: &str) {
        let output = self.tool(program, arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        let failed = !output.status.success() && errors.contains(text);
        assert!(
            failed,
            "{program} {arguments:?} should fail with {text}: {output:?}"
        );
    }

    pub(crate) fn create(&self, name: &str, size: &str) {
        self.must("qemu-img", &["create", "-q", "-f", "qcow2", name, size]);
    }

    pub(crate) fn file(&self, name: &str) -> Value {
        Value::map([
            ("driver", Value::str("file")),
            ("filename", Value::str(self.path(name))),
        ])
    }

    pub(crate) fn qcow2(&self, node_name: &str, file: Value) -> Value {
        Value::map([
            ("driver", Value::str("qcow2")),
            ("node-name", Value::str(node_name)),
            ("file", file),
        ])
    }

    /// Opens `name.qcow2` as a node of that name.
    pub(crate) async fn open(&self, name: &str) -> Rc<Node> {
        let file = self.file(&format!("{name}.qcow2"));
        let description = self.qcow2(name, file);
        self.blockdev.add(description).await.expect("blockdev-add")
    }

    pub(crate) fn attach(&self, node: &Rc<Node>) -> Rc<Child> {
        self.blockdev
            .graph()
            .attach_root("an unnamed block device", node, WRITER)
            .expect("attach")
    }
}

/// `value` with one more entry.
pub(crate) fn with(value: Value, name: &str, entry: Value) -> Value {
    let Value::Map(mut entries) = value else {
        panic!("not a map")
    };
    entries.push((name.to_owned(), entry));
    Value::Map(entries)
}
