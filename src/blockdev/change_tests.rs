//! Snapshots, reopening and resizing, on real files.

use std::path::Path;
use std::rc::Rc;

use super::fixture_tests::*;
use super::*;
use crate::block::{Child, DiscardMode, Node, Permission, Permissions, Role, WriteFlags};
use crate::buffer::MemorySlice;
use crate::error::Error;

/// What a writable export needs and shares.
const WRITER: Permissions = Permissions {
    required: Permission::CONSISTENT_READ.union(Permission::WRITE),
    shared: Permission::CONSISTENT_READ
        .union(Permission::WRITE)
        .union(Permission::WRITE_UNCHANGED),
};

fn attach(blockdev: &Blockdev, node: &Rc<Node>) -> Rc<Child> {
    blockdev
        .graph()
        .attach_root("an unnamed block device", node, WRITER)
        .expect("attach")
}

async fn write(edge: &Child, offset: u64, byte: u8) {
    let data = MemorySlice::from_bytes(&[byte; 4096]);
    edge.write(offset, data.into(), WriteFlags::empty())
        .await
        .expect("write");
}

async fn read(edge: &Child, offset: u64) -> u8 {
    let data = MemorySlice::zeroed(4096);
    edge.read(offset, data.clone().into()).await.expect("read");
    let bytes = data.to_vec();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

fn request(dir: &str, node: &str, file: &str, overlay: &str) -> SnapshotSync {
    SnapshotSync {
        node_name: Some(node.to_owned()),
        snapshot_file: format!("{dir}/{file}"),
        snapshot_node_name: Some(overlay.to_owned()),
        ..SnapshotSync::default()
    }
}

fn text(dir: &str, result: Result<(), Error>) -> String {
    match result {
        Ok(()) => String::new(),
        Err(error) => error.message().replace(&format!("{dir}/"), ""),
    }
}

#[test]
fn a_snapshot_moves_the_users_and_keeps_the_old_image() {
    run(|blockdev, dir| async move {
        create(&dir, "a.qcow2", None);
        let old = blockdev
            .add(qcow2(&dir, "a", "a.qcow2"))
            .await
            .expect("add");
        let edge = attach(&blockdev, &old);
        write(&edge, 0, 1).await;
        blockdev
            .snapshot_sync(request(&dir, "a", "b.qcow2", "b"))
            .await
            .expect("snapshot");
        assert_eq!(edge.node().name(), "b");
        assert!(old.options().read_only, "the old node turned read-only");
        assert!(
            old.child(Role::File)
                .expect("file")
                .node()
                .options()
                .read_only
        );
        write(&edge, 4096, 2).await;
        assert_eq!((read(&edge, 0).await, read(&edge, 4096).await), (1, 2));
        blockdev.graph().detach(&edge).await.expect("detach");
        assert_eq!(names(&blockdev).len(), 2, "the overlay had no other user");
        blockdev.delete("a").await.expect("delete");
        let base = format!("{dir}/a.qcow2");
        qemu_img(&dir, &["check", "-q", "b.qcow2"]);
        qemu_img(&dir, &["check", "-q", "a.qcow2"]);
        qemu_img(
            &dir,
            &["rebase", "-u", "-F", "qcow2", "-b", &base, "b.qcow2"],
        );
        let again = blockdev
            .add(qcow2(&dir, "b", "b.qcow2"))
            .await
            .expect("add");
        let edge = attach(&blockdev, &again);
        assert_eq!((read(&edge, 0).await, read(&edge, 4096).await), (1, 2));
    });
}

#[test]
fn failed_snapshots_leave_no_trace() {
    run(|blockdev, dir| async move {
        create(&dir, "a.qcow2", None);
        let node = blockdev
            .add(qcow2(&dir, "a", "a.qcow2"))
            .await
            .expect("add");
        let edge = attach(&blockdev, &node);
        blockdev
            .snapshot_sync(request(&dir, "a", "b.qcow2", "b"))
            .await
            .expect("snapshot");
        let before = names(&blockdev);
        let refused = async |change: &dyn Fn(&mut SnapshotSync)| {
            let mut request = request(&dir, "b", "x.qcow2", "x");
            change(&mut request);
            let answer = text(&dir, blockdev.snapshot_sync(request).await);
            assert_eq!(names(&blockdev), before);
            assert!(!Path::new(&dir).join("x.qcow2").exists(), "{answer}");
            answer
        };
        let in_dir = |name: &str| format!("{dir}/{name}");
        type Change<'a> = &'a dyn Fn(&mut SnapshotSync);
        let cases: [(Change<'_>, &str); 10] = [
            (
                &|r| r.snapshot_node_name = None,
                "New overlay node-name missing",
            ),
            (
                &|r| r.snapshot_node_name = Some("a".into()),
                "New overlay node-name already in use",
            ),
            (
                &|r| r.snapshot_node_name = Some("1bad".into()),
                "Invalid node-name: '1bad'",
            ),
            (
                &|r| r.node_name = Some("a".into()),
                "Node 'a' is busy: node is used as backing hd of 'b'",
            ),
            (
                &|r| r.snapshot_file = in_dir("b.qcow2"),
                "Error: Trying to create an image with the same filename as the backing file",
            ),
            (
                &|r| r.snapshot_file = in_dir("a.qcow2"),
                "Failed to get \"write\" lock",
            ),
            (
                &|r| r.snapshot_file = in_dir("nodir/x"),
                "Could not create 'nodir/x': No such file or directory",
            ),
            (
                &|r| r.format = Some("raw".into()),
                "Backing file not supported for file format 'raw'",
            ),
            (
                &|r| r.format = Some("nosuch".into()),
                "Unknown file format 'nosuch'",
            ),
            (
                &|r| r.mode = SnapshotMode::Existing,
                "Could not open 'x.qcow2': No such file or directory",
            ),
        ];
        for (change, expected) in cases {
            assert_eq!(refused(change).await, expected);
        }
        write(&edge, 0, 9).await;
        assert_eq!(edge.node().name(), "b");
    });
}

#[test]
fn an_overlay_that_is_there_is_put_on_top() {
    run(|blockdev, dir| async move {
        for name in ["a.qcow2", "b.qcow2", "c.qcow2"] {
            create(&dir, name, None);
        }
        let node = blockdev
            .add(qcow2(&dir, "a", "a.qcow2"))
            .await
            .expect("add");
        let edge = attach(&blockdev, &node);
        write(&edge, 0, 3).await;
        let mut existing = request(&dir, "a", "b.qcow2", "b");
        existing.mode = SnapshotMode::Existing;
        blockdev.snapshot_sync(existing).await.expect("snapshot");
        assert!(
            edge.node()
                .file_name()
                .starts_with("json:{\"backing\": {\"driver\": \"qcow2\"")
        );
        blockdev
            .add(qcow2(&dir, "c", "c.qcow2"))
            .await
            .expect("add");
        let same = text(&dir, blockdev.snapshot("b", "b").await);
        assert_eq!(same, "The overlay is already in use");
        blockdev.snapshot("b", "c").await.expect("snapshot");
        assert_eq!(edge.node().name(), "c");
        assert_eq!(read(&edge, 0).await, 3);
        let raw = Value::map([
            ("driver", Value::str("raw")),
            ("node-name", Value::str("r")),
            ("file", file(&dir, "c.qcow2")),
        ]);
        let raw = with(raw, "read-only", Value::Bool(true));
        let raw = with(raw, "force-share", Value::Bool(true));
        blockdev.add(raw).await.expect("add");
        let refused = text(&dir, blockdev.snapshot("c", "r").await);
        assert_eq!(refused, "The overlay does not support backing images");
    });
}

#[test]
fn reopen_changes_options_and_swaps_the_backing_file() {
    run(|blockdev, dir| async move {
        create(&dir, "a.qcow2", None);
        create(&dir, "other.qcow2", None);
        create(&dir, "b.qcow2", Some(("a.qcow2", "qcow2")));
        let read_only = with(
            qcow2(&dir, "other", "other.qcow2"),
            "read-only",
            Value::Bool(true),
        );
        blockdev.add(read_only).await.expect("add");
        let node = blockdev
            .add(qcow2(&dir, "b", "b.qcow2"))
            .await
            .expect("add");
        let edge = attach(&blockdev, &node);
        let described = || qcow2(&dir, "b", "b.qcow2");
        let reopen = async |value: Value| text(&dir, blockdev.reopen(vec![value]).await);
        assert_eq!(reopen(described()).await, "backing is missing for 'b'");
        let swapped = || with(described(), "backing", Value::str("other"));
        assert_eq!(reopen(swapped()).await, "");
        assert_eq!(node.backing().expect("backing").name(), "other");
        assert_eq!(names(&blockdev).len(), 4, "the old backing file is closed");
        let read_only = with(swapped(), "read-only", Value::Bool(true));
        let refused = reopen(read_only.clone()).await;
        assert_eq!(
            refused,
            "Read-only block node 'b' cannot support read-write users"
        );
        let unmap = with(swapped(), "discard", Value::str("unmap"));
        assert_eq!(reopen(unmap).await, "");
        assert_eq!(node.options().discard, DiscardMode::Unmap);
        write(&edge, 0, 4).await;
        blockdev.graph().detach(&edge).await.expect("detach");
        assert_eq!(reopen(read_only).await, "");
        assert!(
            node.child(Role::File)
                .expect("file")
                .node()
                .options()
                .read_only
        );
        assert_eq!(reopen(swapped()).await, "");
        let edge = attach(&blockdev, &node);
        write(&edge, 0, 5).await;
        assert_eq!(read(&edge, 0).await, 5);
    });
}

#[test]
fn a_refused_reopen_changes_nothing() {
    run(|blockdev, dir| async move {
        create(&dir, "a.qcow2", None);
        create(&dir, "b.qcow2", Some(("a.qcow2", "qcow2")));
        blockdev
            .add(qcow2(&dir, "b", "b.qcow2"))
            .await
            .expect("add");
        let before = format!("{:?}", blockdev.query_named_block_nodes(false));
        let described = |name: &str| {
            let value = qcow2(&dir, "b", name);
            with(value, "backing", Value::Null)
        };
        let first = with(described("b.qcow2"), "read-only", Value::Bool(true));
        let second = |value: Value| vec![first.clone(), value];
        let refused = async |list: Vec<Value>| {
            let answer = text(&dir, blockdev.reopen(list).await);
            assert_eq!(
                format!("{:?}", blockdev.query_named_block_nodes(false)),
                before
            );
            answer
        };
        assert_eq!(
            refused(vec![described("a.qcow2")]).await,
            "Cannot change the option 'filename'"
        );
        let unknown = second(qcow2(&dir, "nonode", "b.qcow2"));
        assert_eq!(
            refused(unknown).await,
            "Failed to find node with node-name='nonode'"
        );
        assert_eq!(
            refused(second(described("b.qcow2"))).await,
            "Node 'b' is listed twice"
        );
        let cyclic = with(qcow2(&dir, "b", "b.qcow2"), "backing", Value::str("b"));
        let expected = "Making 'b' a backing child of 'b' would create a cycle";
        assert_eq!(refused(vec![cyclic]).await, expected);
        blockdev
            .reopen(Vec::new())
            .await
            .expect("an empty list is fine");
    });
}

#[test]
fn resizing_asks_the_users() {
    run(|blockdev, dir| async move {
        create(&dir, "a.qcow2", None);
        let node = blockdev
            .add(qcow2(&dir, "a", "a.qcow2"))
            .await
            .expect("add");
        let resize = async |size: i64| text(&dir, blockdev.resize(None, Some("a"), size).await);
        assert_eq!(resize(16 << 20).await, "");
        assert_eq!(node.size(), 16 << 20);
        assert_eq!(resize(-1).await, "Parameter 'size' expects a >0 size");
        let edge = attach(&blockdev, &node);
        let refused = resize(8 << 20).await;
        assert_eq!(
            refused,
            "Permission conflict on node 'a': permissions 'resize' are both required by an unnamed \
             block device (uses node 'a' as 'root' child) and unshared by an unnamed block device \
             (uses node 'a' as 'root' child)."
        );
        write(&edge, (16 << 20) - 4096, 6).await;
        blockdev.graph().detach(&edge).await.expect("detach");
        blockdev.delete("a").await.expect("delete");
        qemu_img(&dir, &["check", "-q", "a.qcow2"]);
    });
}
