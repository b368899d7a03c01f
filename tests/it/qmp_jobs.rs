//! Jobs as clients of the control socket meet them, beyond what was recorded from QEMU.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::qmp_daemon::{Client, Daemon, poll};

/// A daemon with node `d` in d.qcow2 over a.qcow2 with data, and an export `e0` of it.
fn two_layers() -> Daemon {
    let daemon = Daemon::start(&["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
    let create = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_liveblk"));
        command.current_dir(daemon.directory.path());
        let output = command
            .args(["image", "create", "-f", "qcow2"])
            .args(arguments);
        assert!(output.output().expect("liveblk starts").status.success());
    };
    create(&["a.qcow2", "64M"]);
    write_data(&daemon.path("a.qcow2"));
    create(&["-b", "a.qcow2", "-F", "qcow2", "d.qcow2"]);
    let mut client = daemon.client();
    client.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "d",
            "file": {"driver": "file", "filename": daemon.path("d.qcow2")}}),
    );
    client.execute("block-export-add", export("e0", "d", true));
    daemon
}

/// Something for a job to copy, written as any guest would.
fn write_data(image: &Path) {
    let status = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -P 7 0 16M"])
        .arg(image)
        .output();
    assert!(status.expect("qemu-io starts").status.success());
}

fn export(id: &str, node: &str, writable: bool) -> Value {
    json!({"type": "nbd", "id": id, "node-name": node, "name": id, "writable": writable})
}

fn start_slow_stream<W: std::io::Write>(client: &mut Client<W>) {
    client.execute(
        "block-stream",
        json!({"device": "d", "job-id": "j", "speed": 65536}),
    );
}

fn error(reply: &Value) -> &str {
    reply["error"]["desc"].as_str().unwrap_or("no error")
}

/// A job's filter keeps its copies and the guest's writes apart. A writer that came to the node below
/// the filter while the job ran was not seen by it, and a copy could overwrite what it wrote.
#[test]
fn nobody_comes_to_write_past_the_filter_of_a_job() {
    let daemon = two_layers();
    let mut client = daemon.client();
    start_slow_stream(&mut client);
    let busy = "Node 'd' is busy: block device is in use by block job: stream";
    let second = client.call("block-export-add", export("e1", "d", true));
    assert_eq!(error(&second), busy);
    let around = json!({"driver": "raw", "node-name": "r", "file": "d"});
    assert_eq!(error(&client.call("blockdev-add", around.clone())), busy);
    client.execute("block-export-add", export("e2", "d", false));
    client.execute("job-cancel", json!({"id": "j"}));
    client.execute("blockdev-add", around);
}

#[test]
fn a_job_goes_on_when_its_client_leaves() {
    let daemon = two_layers();
    let mut client = daemon.client();
    start_slow_stream(&mut client);
    drop(client);
    let mut other = daemon.client();
    assert_eq!(
        other.execute("query-jobs", json!({}))[0]["status"],
        "running"
    );
    other.execute("block-job-set-speed", json!({"device": "j", "speed": 0}));
    poll(|| (other.execute("query-jobs", json!({})) == json!([])).then_some(()));
    let nodes = other.execute("query-named-block-nodes", json!({"flat": true}));
    let top = nodes.as_array().and_then(|nodes| {
        let mut nodes = nodes.iter();
        nodes.find(|node| node["node-name"] == "d").cloned()
    });
    assert_eq!(top.expect("node d")["backing_file"], Value::Null);
}

#[test]
fn what_a_job_works_on_is_not_taken_away() {
    let daemon = two_layers();
    let mut client = daemon.client();
    start_slow_stream(&mut client);
    client.execute("block-export-del", json!({"id": "e0", "mode": "hard"}));
    let refused = client.call("blockdev-del", json!({"node-name": "d"}));
    let busy = "Node 'd' is busy: block device is in use by block job: stream";
    assert_eq!(error(&refused), busy);
    client.execute("job-cancel", json!({"id": "j"}));
    client.execute("blockdev-del", json!({"node-name": "d"}));
    assert_eq!(
        client.execute("query-named-block-nodes", json!({})),
        json!([])
    );
}
