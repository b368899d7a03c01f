//! Jobs as clients of the control socket meet them, beyond what was recorded from QEMU.

use std::os::unix::net::UnixStream;
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

/// A daemon with a.qcow2 ← b.qcow2 ← c.qcow2, each with data of its own, opened as nodes `a`, `b` and `c`; an
/// export `e0` of `c`; a filter `t` over `a` that nobody uses, and an overlay `y` without a backing file.
fn three_layers() -> Daemon {
    let daemon = Daemon::start(&["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
    let create = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_liveblk"));
        command
            .current_dir(daemon.directory.path())
            .args(["image", "create", "-f", "qcow2"])
            .args(arguments);
        assert!(command.output().expect("liveblk starts").status.success());
    };
    create(&["a.qcow2", "8M"]);
    create(&["-b", "a.qcow2", "-F", "qcow2", "b.qcow2"]);
    create(&["-b", "b.qcow2", "-F", "qcow2", "c.qcow2"]);
    create(&["y.qcow2", "8M"]);
    create(&["z.qcow2", "8M"]);
    for (index, name) in ["a", "b", "c", "y"].into_iter().enumerate() {
        let written = format!("write -P {} {index}M 2M", index + 1);
        qemu_io(
            &daemon,
            &format!("{name}.qcow2"),
            &["-f", "qcow2"],
            &written,
        );
    }
    let mut client = daemon.client();
    let group = json!({"qom-type": "throttle-group", "id": "g"});
    client.execute("object-add", group);
    for (node, backing) in [("a", Value::Null), ("b", json!("a")), ("c", json!("b"))] {
        client.execute("blockdev-add", qcow2(&daemon, node, node, backing));
    }
    let filter =
        json!({"driver": "throttle", "node-name": "t", "throttle-group": "g", "file": "a"});
    client.execute("blockdev-add", filter);
    client.execute("blockdev-add", qcow2(&daemon, "y", "y", Value::Null));
    client.execute("block-export-add", export("e0", "c", true));
    daemon
}

fn qcow2(daemon: &Daemon, node: &str, file: &str, backing: Value) -> Value {
    let filename = daemon.path(&format!("{file}.qcow2"));
    json!({"driver": "qcow2", "node-name": node, "backing": backing, "read-only": file != "c" && file != "y",
           "file": {"driver": "file", "filename": filename}})
}

/// A command of qemu-io that succeeds.
fn qemu_io(daemon: &Daemon, image: &str, options: &[&str], command: &str) {
    let output = Command::new("qemu-io")
        .current_dir(daemon.directory.path())
        .args(options)
        .args(["-c", command, image])
        .output()
        .expect("qemu-io starts");
    let text = String::from_utf8_lossy(&output.stdout);
    let failed = !output.status.success() || text.contains("failed");
    assert!(!failed, "{command} {image}: {text}");
}

/// What a commit goes to changes under whoever looks at it. Readers that came while it ran were let in, and an
/// overlay among them was worth nothing afterwards.
#[test]
fn nobody_comes_to_look_at_what_a_commit_changes() {
    for (top, changing) in [("b", &["a"][..]), ("c", &["a", "b"])] {
        let daemon = three_layers();
        let mut client = daemon.client();
        client.execute(
            "block-commit",
            json!({"device": "c", "top-node": top, "base-node": "a", "job-id": "j", "speed": 65536}),
        );
        let filtered = changing.iter().copied().chain(["t"]);
        for node in filtered {
            let below = if node == "t" { "a" } else { node };
            let busy =
                format!("Node '{below}' is busy: block device is in use by block job: commit");
            let changes = format!("{busy}, which changes its content");
            let overlay = qcow2(&daemon, "z", "z", json!(node));
            let added = client.call("blockdev-add", overlay);
            let refused = format!("Could not open backing file: {changes}");
            assert_eq!(error(&added), refused, "{node}");
            let reopened = json!({"options": [qcow2(&daemon, "y", "y", json!(node))]});
            let reopened = client.call("blockdev-reopen", reopened);
            assert_eq!(error(&reopened), changes, "{node}");
            let exported = client.call("block-export-add", export("e1", node, false));
            let conflict = "permissions 'consistent read'";
            let refusals = [changes.as_str(), conflict];
            let refused = refusals.iter().any(|text| error(&exported).contains(text));
            assert!(refused, "{node}: {exported}");
            let raw = json!({"driver": "raw", "node-name": "r", "file": below});
            assert_eq!(error(&client.call("blockdev-add", raw)), busy);
            let snapshot = json!({"node": below, "overlay": "y"});
            assert_eq!(error(&client.call("blockdev-snapshot", snapshot)), busy);
            let turned = json!({"node": "c", "overlay": below});
            assert!(client.call("blockdev-snapshot", turned)["error"].is_object());
        }
        client.execute("job-cancel", json!({"id": "j"}));
        client.execute("block-export-add", export("e1", "a", false));
        let added = qcow2(&daemon, "y", "y", json!("t"));
        client.execute("blockdev-reopen", json!({"options": [added]}));
    }
}

/// Who looks at the base by itself sees it change, as an overlay would. The commit was let begin.
#[test]
fn what_is_shown_by_itself_is_not_committed_into() {
    let daemon = three_layers();
    let mut client = daemon.client();
    for (node, layer) in [("a", "a"), ("t", "a"), ("b", "b")] {
        client.execute("block-export-add", export("e1", node, false));
        let commit = json!({"device": "c", "base-node": "a", "job-id": "j"});
        let text = format!(
            "Node '{layer}' is also shown by itself, whose content would change with a commit into 'a'"
        );
        assert_eq!(error(&client.call("block-commit", commit)), text);
        client.execute("block-export-del", json!({"id": "e1"}));
    }
    let raw = json!({"driver": "raw", "node-name": "r", "read-only": true, "file": "a"});
    client.execute("blockdev-add", raw);
    client.execute("block-export-add", export("e1", "r", false));
    let commit = json!({"device": "c", "base-node": "a", "job-id": "j"});
    let text =
        "Node 'a' is also the file of 'r', whose content would change with a commit into 'a'";
    assert_eq!(error(&client.call("block-commit", commit)), text);
}

/// A stream changes nothing of the layers that it takes out: overlays of them come at any time, and stay right.
#[test]
fn an_overlay_comes_to_a_layer_that_is_streamed() {
    let daemon = three_layers();
    let mut client = daemon.client();
    client.execute(
        "block-stream",
        json!({"device": "c", "job-id": "j", "speed": 65536}),
    );
    let overlay = qcow2(&daemon, "y", "y", json!("b"));
    client.execute("blockdev-reopen", json!({"options": [overlay]}));
    client.execute("block-export-add", export("e1", "y", true));
    client.execute("block-job-set-speed", json!({"device": "j", "speed": 0}));
    poll(|| (client.execute("query-jobs", json!({})) == json!([])).then_some(()));
    for (name, seen) in [
        ("e0", ["-P 1 0 1M", "-P 2 1M 1M", "-P 3 2M 2M"]),
        ("e1", ["-P 1 0 1M", "-P 2 1M 2M", "-P 4 3M 2M"]),
    ] {
        for read in seen {
            let url = format!("nbd+unix:///{name}?socket=nbd.sock");
            qemu_io(&daemon, &url, &["-f", "raw", "-r"], &format!("read {read}"));
        }
    }
}

/// A base that is longer than its overlay took the overlay's place, and clients of the export went on to be told
/// the old size.
#[test]
fn a_client_learns_the_size_that_a_pivot_brings() {
    let daemon = Daemon::start(&["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
    let create = |arguments: &[&str]| {
        let mut command = Command::new("qemu-img");
        command
            .current_dir(daemon.directory.path())
            .args(["create", "-q", "-f", "qcow2"])
            .args(arguments);
        assert!(command.output().expect("qemu-img starts").status.success());
    };
    create(&["a.qcow2", "8M"]);
    create(&["-b", "a.qcow2", "-F", "qcow2", "c.qcow2", "4M"]);
    qemu_io(&daemon, "a.qcow2", &["-f", "qcow2"], "write -P 1 0 8M");
    qemu_io(&daemon, "c.qcow2", &["-f", "qcow2"], "write -P 2 1M 1M");
    let mut client = daemon.client();
    client.execute("blockdev-add", qcow2(&daemon, "a", "a", Value::Null));
    client.execute("blockdev-add", qcow2(&daemon, "c", "c", json!("a")));
    client.execute("block-export-add", export("e0", "c", true));
    let size = || {
        let output = Command::new("qemu-img")
            .current_dir(daemon.directory.path())
            .args(["info", "--output", "json", "nbd+unix:///e0?socket=nbd.sock"])
            .output()
            .expect("qemu-img starts");
        let info: Value = serde_json::from_slice(&output.stdout).expect("JSON");
        info["virtual-size"].as_u64()
    };
    assert_eq!(size(), Some(4 << 20));
    client.execute("block-commit", json!({"device": "c", "job-id": "j"}));
    let state = |client: &mut Client<UnixStream>| client.execute("query-jobs", json!({}));
    poll(|| (state(&mut client)[0]["status"] == "ready").then_some(()));
    client.execute("job-complete", json!({"id": "j"}));
    poll(|| (state(&mut client) == json!([])).then_some(()));
    assert_eq!(size(), Some(8 << 20));
    for read in ["-P 1 0 1M", "-P 2 1M 1M", "-P 1 2M 6M"] {
        let url = "nbd+unix:///e0?socket=nbd.sock";
        qemu_io(&daemon, url, &["-f", "raw", "-r"], &format!("read {read}"));
    }
    client.execute("blockdev-del", json!({"node-name": "c"}));
    let longer = json!({"node-name": "a", "size": 12 << 20});
    let refused = client.call("block_resize", longer.clone());
    assert!(error(&refused).starts_with("Permission conflict on node 'a'"));
    client.execute("block-export-del", json!({"id": "e0"}));
    client.execute("block_resize", longer);
    client.execute("block-export-add", export("e0", "a", true));
    assert_eq!(size(), Some(12 << 20));
}
