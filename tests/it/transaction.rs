//! Transactions: one moment for all devices, all changes or none.

use std::cell::Cell;
use std::rc::Rc;

use liveblk::block::{Action, Child, Permission, Permissions, WriteFlags};
use liveblk::blockdev::SnapshotSync;
use liveblk::buffer::MemorySlice;
use liveblk::testing::{for_each_seed, scale};
use serde_json::{Value, json};

use crate::images::{Images, with_images};
use crate::qmp_daemon::{Client, Daemon};

const SIZE: u64 = 4 << 20;

/// Of who only looks.
const READER: Permissions = Permissions {
    required: Permission::CONSISTENT_READ,
    shared: Permission::all(),
};

async fn disk(images: &Images, name: &str) -> Rc<Child> {
    images.create(&format!("{name}.qcow2"), &SIZE.to_string());
    images.attach(&images.open(name).await)
}

async fn write(edge: &Child, value: u32) {
    let data = MemorySlice::from_bytes(&[value.to_le_bytes(); 128].concat());
    let empty = WriteFlags::empty();
    edge.write(0, data.into(), empty).await.expect("write");
}

async fn read(edge: &Child) -> u32 {
    let data = MemorySlice::zeroed(512);
    edge.read(0, data.clone().into()).await.expect("read");
    u32::from_le_bytes(data.to_vec()[..4].try_into().expect("four bytes"))
}

/// Writes each number to the first disk, then to the second.
struct Pair {
    edges: [Rc<Child>; 2],
    number: Cell<u32>,
    stop: Cell<bool>,
}

impl Pair {
    async fn run(self: Rc<Self>) {
        while !self.stop.get() {
            self.number.set(self.number.get() + 1);
            for edge in &self.edges {
                write(edge, self.number.get()).await;
            }
        }
    }
}

/// What the guest wrote to the second disk it had written to the first before: at a common moment the
/// first is as new as the second, and ahead of it by one write at most.
#[test]
fn snapshots_of_one_transaction_are_of_one_moment() {
    for_each_seed("snapshots_of_one_moment", 2, |seed| {
        with_images(seed, |images| async move {
            let edges = [disk(&images, "a").await, disk(&images, "b").await];
            let pair = Rc::new(Pair {
                edges: edges.clone(),
                number: Cell::default(),
                stop: Cell::default(),
            });
            let writer = images.handle.spawn(pair.clone().run());
            for round in 0..8 * scale() {
                let mut olds = Vec::new();
                let mut actions: Vec<Box<dyn Action>> = Vec::new();
                for edge in &edges {
                    let old = edge.node();
                    let request = overlay(&images, old.name(), &format!("{}{round}", old.name()));
                    let prepared = images.blockdev.prepare_snapshot_sync(request).await;
                    actions.push(Box::new(prepared.expect("prepared")));
                    olds.push(old);
                }
                let graph = images.blockdev.graph();
                graph.transact(&actions).await.expect("a transaction");
                let mut seen = Vec::new();
                for old in &olds {
                    let edge = graph.attach_root("the test", old, READER).expect("attach");
                    seen.push(read(&edge).await);
                    graph.detach(&edge).await.expect("detach");
                }
                let [first, second] = seen[..] else {
                    panic!("two disks")
                };
                assert!(
                    first == second || first == second + 1,
                    "seed {seed}, round {round}: {first} and {second} are not of one moment"
                );
            }
            pair.stop.set(true);
            writer.await;
            assert_eq!(read(&edges[0]).await, pair.number.get());
            assert_eq!(read(&edges[1]).await, pair.number.get());
        });
    });
}

fn overlay(images: &Images, node: &str, name: &str) -> SnapshotSync {
    SnapshotSync {
        node_name: Some(node.to_owned()),
        snapshot_file: images.path(&format!("{name}.qcow2")),
        snapshot_node_name: Some(name.to_owned()),
        ..SnapshotSync::default()
    }
}

/// A daemon with nodes `a` and `b` in files of their own, each exported.
fn two_disks() -> Daemon {
    let daemon = Daemon::start(&["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
    let mut client = daemon.client();
    for name in ["a", "b"] {
        let file = daemon.path(&format!("{name}.qcow2"));
        let made = std::process::Command::new(env!("CARGO_BIN_EXE_liveblk"))
            .args(["image", "create", "-f", "qcow2"])
            .args([file.as_os_str(), "8M".as_ref()])
            .output();
        assert!(made.expect("liveblk starts").status.success());
        client.execute(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": name,
                "file": {"driver": "file", "filename": file}}),
        );
        let export = json!({"type": "nbd", "id": name, "node-name": name, "writable": true});
        client.execute("block-export-add", export);
    }
    daemon
}

fn snapshot(daemon: &Daemon, node: &str, overlay: &str) -> Value {
    json!({"type": "blockdev-snapshot-sync", "data": {"node-name": node,
        "snapshot-file": daemon.path(&format!("{overlay}.qcow2")),
        "snapshot-node-name": overlay}})
}

fn transact<W: std::io::Write>(client: &mut Client<W>, actions: Value) -> Value {
    client.call("transaction", json!({"actions": actions}))
}

fn error(reply: &Value) -> &str {
    reply["error"]["desc"].as_str().unwrap_or("no error")
}

/// The node that each export is on.
fn exported<W: std::io::Write>(client: &mut Client<W>) -> Vec<(String, String)> {
    let exports = client.execute("query-block-exports", json!({}));
    let exports = exports.as_array().expect("a list").iter();
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    let mut nodes: Vec<_> = exports
        .map(|export| (text(&export["id"]), text(&export["node-name"])))
        .collect();
    nodes.sort();
    nodes
}

fn on(a: &str, b: &str) -> Vec<(String, String)> {
    [("a", a), ("b", b)]
        .map(|(id, node)| (id.to_owned(), node.to_owned()))
        .to_vec()
}

#[test]
fn a_transaction_that_fails_leaves_everything_as_it_was() {
    let daemon = two_disks();
    let mut client = daemon.client();
    let before = client.execute("query-named-block-nodes", json!({"flat": true}));
    let both = |last: Value| {
        json!([
            snapshot(&daemon, "a", "a1"),
            snapshot(&daemon, "b", "b1"),
            last
        ])
    };
    let abort = json!({"type": "abort", "data": {}});
    let missing = json!({"type": "blockdev-snapshot", "data": {"node": "b", "overlay": "x"}});
    let cases = [
        (both(abort), "Transaction aborted using Abort action"),
        (both(missing), "Cannot find device='x' nor node-name='x'"),
        (
            both(snapshot(&daemon, "a", "a2")),
            "Node 'a' is busy: node is used as backing hd of 'a1'",
        ),
    ];
    for (actions, expected) in cases {
        let reply = transact(&mut client, actions);
        assert_eq!(error(&reply), expected);
        assert_eq!(exported(&mut client), on("a", "b"));
        let nodes = client.execute("query-named-block-nodes", json!({"flat": true}));
        assert_eq!(nodes, before, "after: {expected}");
        for file in ["a1", "a2", "b1"] {
            let left = daemon.path(&format!("{file}.qcow2"));
            assert!(!left.exists(), "{} stays", left.display());
        }
    }
    transact(&mut client, json!([]));
    let reply = transact(&mut client, json!([snapshot(&daemon, "a", "a1")]));
    assert_eq!(error(&reply), "no error");
    assert_eq!(exported(&mut client), on("a1", "b"));
}

#[test]
fn each_action_sees_what_those_before_it_have_made() {
    let daemon = two_disks();
    let mut client = daemon.client();
    let stacked = json!([
        snapshot(&daemon, "a", "a1"),
        snapshot(&daemon, "a1", "a2"),
        snapshot(&daemon, "b", "b1"),
    ]);
    let reply = transact(&mut client, stacked);
    assert_eq!(error(&reply), "no error");
    assert_eq!(exported(&mut client), on("a2", "b1"));
    let undone = json!([
        snapshot(&daemon, "a2", "a3"),
        snapshot(&daemon, "a3", "a4"),
        {"type": "abort", "data": {}},
    ]);
    let reply = transact(&mut client, undone);
    assert_eq!(error(&reply), "Transaction aborted using Abort action");
    assert_eq!(exported(&mut client), on("a2", "b1"));
}

#[test]
fn grouped_completion_is_refused_where_nothing_completes() {
    let daemon = two_disks();
    let mut client = daemon.client();
    let arguments = json!({"actions": [snapshot(&daemon, "a", "a1")],
        "properties": {"completion-mode": "grouped"}});
    let reply = client.call("transaction", arguments);
    let text = "Action 'blockdev-snapshot-sync' does not support transaction property completion-mode = grouped";
    assert_eq!(error(&reply), text);
    assert!(!daemon.path("a1.qcow2").exists());
}
