//! Images in a directory and descriptions of them, for tests.

use std::future::Future;
use std::process::Command;

use tempfile::TempDir;

use super::*;
use crate::runtime::{Config, Runtime};

/// Runs `test` in a directory of its own with a fresh graph.
pub(super) fn run<F: Future<Output = ()>>(test: impl FnOnce(Blockdev, String) -> F) {
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().to_str().expect("UTF-8").to_owned();
    let runtime = Runtime::new(&Config::default()).expect("io_uring is there");
    let blockdev = Blockdev::new(&runtime.handle(), &Graph::new());
    runtime.block_on(test(blockdev, path));
}

pub(super) fn qemu_img(directory: &str, arguments: &[&str]) {
    let done = Command::new("qemu-img")
        .current_dir(directory)
        .args(arguments)
        .output()
        .expect("qemu-img runs");
    assert!(done.status.success(), "{done:?}");
}

pub(super) fn create(directory: &str, name: &str, backing: Option<(&str, &str)>) {
    let mut arguments = vec!["create", "-q", "-u", "-f", "qcow2"];
    if let Some((file, format)) = backing {
        arguments.extend(["-b", file, "-F", format]);
    }
    arguments.extend([name, "8M"]);
    qemu_img(directory, &arguments);
}

pub(super) fn file(directory: &str, name: &str) -> Value {
    let filename = Value::str(format!("{directory}/{name}"));
    Value::map([("driver", Value::str("file")), ("filename", filename)])
}

pub(super) fn qcow2(directory: &str, node_name: &str, name: &str) -> Value {
    Value::map([
        ("driver", Value::str("qcow2")),
        ("node-name", Value::str(node_name)),
        ("file", file(directory, name)),
    ])
}

pub(super) fn with(value: Value, name: &str, entry: Value) -> Value {
    let Value::Map(mut entries) = value else {
        panic!("not a map")
    };
    entries.push((name.to_owned(), entry));
    Value::Map(entries)
}

pub(super) async fn refusal(blockdev: &Blockdev, directory: &str, description: Value) -> String {
    let before = blockdev.graph().nodes().len();
    let text = match blockdev.add(description).await {
        Ok(node) => panic!("{node:?} was opened"),
        Err(error) => error.message().replace(&format!("{directory}/"), ""),
    };
    assert_eq!(blockdev.graph().nodes().len(), before, "nothing stays open");
    text
}

pub(super) fn names(blockdev: &Blockdev) -> Vec<String> {
    let nodes = blockdev.graph().nodes();
    nodes.iter().map(|node| node.name().to_owned()).collect()
}
