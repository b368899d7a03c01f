//! Short ways to nodes and edges for tests.

use std::future::Future;
use std::rc::Rc;

use crate::block::{
    Child, DiscardMode, Driver, Graph, Node, NodeOptions, NodeSpec, Permission, Permissions, Role,
};
use crate::runtime::{Handle, Runtime};

use super::{DiskOptions, Power, SimulatedDisk, VolatileStore};

/// Runs a test's future on a simulated runtime of this seed.
pub fn simulate<F: Future>(seed: u64, test: impl FnOnce(Handle) -> F) -> F::Output {
    match Runtime::simulated(seed) {
        Ok(runtime) => runtime.block_on(test(runtime.handle())),
        Err(error) => panic!("no simulated runtime: {error}"),
    }
}

/// A disk of this content that stays powered.
pub fn disk_of(handle: &Handle, bytes: &[u8], seed: u64) -> SimulatedDisk {
    let content = VolatileStore::from_bytes(bytes);
    SimulatedDisk::new(handle, &Power::new(), DiskOptions::default(), content, seed)
}

/// Options of a writable node that passes discards on.
pub fn writable() -> NodeOptions {
    NodeOptions {
        discard: DiscardMode::Unmap,
        ..NodeOptions::default()
    }
}

/// Reads, writes and resizes; others may read.
pub fn full_access() -> Permissions {
    Permissions {
        required: Permission::CONSISTENT_READ | Permission::WRITE | Permission::RESIZE,
        shared: Permission::CONSISTENT_READ | Permission::WRITE_UNCHANGED,
    }
}

/// A writable node of this driver.
pub fn insert(graph: &Graph, name: &str, driver: Box<dyn Driver>) -> Rc<Node> {
    insert_with(graph, name, driver, Vec::new(), writable())
}

/// A node of this driver over its children.
pub fn insert_with(
    graph: &Graph,
    name: &str,
    driver: Box<dyn Driver>,
    children: Vec<Rc<Child>>,
    options: NodeOptions,
) -> Rc<Node> {
    let spec = NodeSpec {
        name: name.to_owned(),
        options,
        file_name: name.to_owned(),
        implicit: false,
    };
    match graph.insert(spec, driver, children) {
        Ok(node) => node,
        Err(error) => panic!("node '{name}' cannot be inserted: {error}"),
    }
}

/// An edge from the test to a node.
pub fn attach(graph: &Graph, node: &Rc<Node>, permissions: Permissions) -> Rc<Child> {
    match graph.attach_root("a test", node, permissions) {
        Ok(child) => child,
        Err(error) => panic!("{node:?} cannot be attached: {error}"),
    }
}

/// An edge as a format has to its file, for tests that play the format: it may grow the file.
pub fn attach_file(graph: &Graph, node: &Rc<Node>) -> Rc<Child> {
    match graph.attach_for("a test", Role::File, node, full_access()) {
        Ok(child) => child,
        Err(error) => panic!("{node:?} cannot be attached: {error}"),
    }
}
