use std::time::Duration;

use super::*;
use crate::block::{Graph, NodeOptions, NodeSpec};
use crate::protocol::null::{Null, NullOptions};
use crate::runtime::Runtime;

const CONTAINING: u64 = 1 << 20;

fn open(graph: &Graph, options: RawOptions) -> Result<Raw> {
    let runtime = Runtime::simulated(0).expect("runtime");
    let null = NullOptions {
        driver_name: "null-co",
        size: CONTAINING,
        latency: Duration::ZERO,
        read_zeroes: true,
    };
    let null = Null::open(&runtime.handle(), null).expect("open");
    let spec = NodeSpec {
        name: "file".into(),
        options: NodeOptions::default(),
        file_name: "null-co://".into(),
        implicit: false,
    };
    let node = graph
        .insert(spec, Box::new(null), Vec::new())
        .expect("insert");
    let permissions = Raw::file_permissions(&options);
    let file = graph
        .attach_for("raw", Role::File, &node, permissions)
        .expect("attach");
    Raw::open(file, options)
}

fn refusal(offset: u64, size: Option<u64>) -> String {
    match open(&Graph::new(), RawOptions { offset, size }) {
        Ok(_) => String::new(),
        Err(error) => error.message().to_owned(),
    }
}

#[test]
fn parts_outside_the_file_are_refused_in_qemus_words() {
    assert_eq!(
        refusal(2097152, None),
        "Offset (2097152) cannot be greater than size of the containing file (1048576)"
    );
    assert_eq!(
        refusal(4096, Some(2097152)),
        "The sum of offset (4096) and size (2097152) has to be smaller or equal to the  \
         actual size of the containing file (1048576)"
    );
    assert_eq!(
        refusal(0, Some(1000)),
        "Specified size is not multiple of 512"
    );
    assert_eq!(
        refusal(u64::MAX, Some(512)).split(' ').next(),
        Some("Offset")
    );
    assert_eq!(refusal(4096, Some(CONTAINING - 4096)), "");
}

#[test]
fn transfers_go_on_at_the_offset() {
    let graph = Graph::new();
    let raw = open(
        &graph,
        RawOptions {
            offset: 4096,
            size: Some(8192),
        },
    )
    .expect("open");
    assert_eq!(raw.size(), 8192);
    let transfer = Transfer {
        kind: crate::block::TransferKind::Read,
        offset: 512,
        length: 1024,
    };
    let forward = raw.forward(&transfer).expect("always");
    assert_eq!(forward.offset, 4608);
    assert_eq!(forward.child.node().name(), "file");
}

#[test]
fn a_part_of_fixed_size_needs_no_resize_permission() {
    let graph = Graph::new();
    let raw = open(
        &graph,
        RawOptions {
            offset: 0,
            size: Some(8192),
        },
    )
    .expect("open");
    let users = Permissions {
        required: Permission::all(),
        shared: Permission::all(),
    };
    let wanted = raw.child_permissions(Role::File, users, true);
    assert!(!wanted.required.contains(Permission::RESIZE));
    assert!(wanted.required.contains(Permission::WRITE));
    assert!(!wanted.shared.contains(Permission::RESIZE));
}
