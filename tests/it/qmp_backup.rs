//! Backups over the control socket: what their files hold, and what becomes of them in transactions.

use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::qmp_daemon::{Client, Daemon, poll};

type Socket = Client<std::os::unix::net::UnixStream>;

/// A daemon with the chain `base` < `top`, both with data, `top` exported as `top`; `None` without QEMU's tools.
fn chain() -> Option<Daemon> {
    if Command::new("qemu-io").arg("--version").output().is_err() {
        eprintln!("SKIPPED: qemu-io is not installed, which writes here");
        return None;
    }
    let daemon = Daemon::start(&["--nbd-server", "addr.type=unix,addr.path=nbd.sock"]);
    run(&daemon, "qemu-img create -q -f qcow2 base.qcow2 8M");
    io(&daemon, "-f qcow2 base.qcow2", "write -P 1 0 3M");
    run(
        &daemon,
        "qemu-img create -q -f qcow2 -b base.qcow2 -F qcow2 top.qcow2",
    );
    io(&daemon, "-f qcow2 top.qcow2", "write -P 2 2M 2M");
    let mut client = daemon.client();
    client.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "top", "discard": "unmap",
            "file": {"driver": "file", "filename": daemon.path("top.qcow2")}}),
    );
    let export = json!({"type": "nbd", "id": "e", "node-name": "top", "writable": true});
    client.execute("block-export-add", export);
    Some(daemon)
}

fn run(daemon: &Daemon, line: &str) {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().expect("a program"));
    let output = command.current_dir(daemon.directory.path()).args(words);
    let output = output.output().expect("QEMU's tools start");
    assert!(output.status.success(), "{line}: {output:?}");
}

fn io(daemon: &Daemon, image: &str, command: &str) {
    let output = Command::new("qemu-io")
        .current_dir(daemon.directory.path())
        .args(image.split_whitespace().collect::<Vec<_>>())
        .args(["-c", command])
        .output();
    let output = output.expect("qemu-io starts");
    assert!(output.status.success(), "{command}: {output:?}");
}

fn guest(daemon: &Daemon, command: &str) {
    io(daemon, "-f raw nbd+unix:///top?socket=nbd.sock", command);
}

fn error(reply: &Value) -> &str {
    reply["error"]["desc"].as_str().unwrap_or("no error")
}

fn status(client: &mut Socket, id: &str) -> Option<String> {
    let jobs = client.execute("query-jobs", json!({}));
    let mut jobs = jobs.as_array().expect("a list").iter();
    let job = jobs.find(|job| job["id"] == id)?;
    Some(job["status"].as_str().expect("a string").to_owned())
}

fn until(client: &mut Socket, id: &str, wanted: Option<&str>) {
    poll(|| (status(client, id).as_deref() == wanted).then_some(()));
}

fn bitmap(client: &mut Socket, name: &str) -> Value {
    let nodes = client.execute("query-named-block-nodes", json!({"flat": true}));
    let mut nodes = nodes.as_array().expect("nodes").iter();
    let node = nodes.find(|node| node["node-name"] == "top");
    let bitmaps = node.expect("the node")["dirty-bitmaps"].as_array().cloned();
    let mut bitmaps = bitmaps.unwrap_or_default().into_iter();
    let found = bitmaps.find(|bitmap| bitmap["name"] == name);
    found.unwrap_or(Value::Null)
}

fn file(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}

/// Each `sync` makes an image that has, with what its header names, the device at the start.
#[test]
fn files_of_drive_backup_are_the_device_at_its_start() {
    let Some(daemon) = chain() else { return };
    let mut client = daemon.client();
    let add = json!({"node": "top", "name": "b", "granularity": 65536});
    client.execute("block-dirty-bitmap-add", add);
    guest(&daemon, "write -P 3 6M 100k");
    run(
        &daemon,
        "qemu-img convert -U -f qcow2 -O raw top.qcow2 before.raw",
    );
    for (sync, format) in [
        ("full", "qcow2"),
        ("full", "raw"),
        ("top", "qcow2"),
        ("none", "qcow2"),
        ("incremental", "qcow2"),
    ] {
        let name = format!("copy-{sync}.{format}");
        let mut arguments = json!({"job-id": sync, "device": "top", "sync": sync,
            "target": file(&daemon.path(&name)), "format": format});
        if sync == "incremental" {
            arguments["bitmap"] = "b".into();
        }
        client.execute("drive-backup", arguments);
        if sync == "none" {
            guest(&daemon, "write -P 9 1M 64k");
            client.execute("job-cancel", json!({"id": "none"}));
            until(&mut client, sync, None);
            let named = "qemu-img rebase -u -f qcow2 -b before.raw -F raw copy-none.qcow2";
            run(&daemon, named);
            // As before, for the backups that come.
            guest(&daemon, "write -P 1 1M 64k");
        } else {
            until(&mut client, sync, None);
        }
        if sync == "incremental" {
            assert_eq!(bitmap(&mut client, "b")["count"], 0);
            let named = "qemu-img rebase -u -f qcow2 -b before.raw -F raw copy-incremental.qcow2";
            run(&daemon, named);
        }
        run(
            &daemon,
            &format!("qemu-img compare -U -f {format} -F raw {name} before.raw"),
        );
    }
    run(&daemon, "qemu-img check -q -f qcow2 copy-full.qcow2");
}

/// What was copied goes from the source; what was not asked for stays.
#[test]
fn a_source_is_discarded_where_it_was_copied() {
    let Some(daemon) = chain() else { return };
    let mut client = daemon.client();
    let add = json!({"node": "top", "name": "b", "granularity": 65536});
    client.execute("block-dirty-bitmap-add", add);
    guest(&daemon, "write -P 7 2M 1M");
    client.execute(
        "drive-backup",
        json!({"job-id": "j", "device": "top", "sync": "incremental", "bitmap": "b",
            "discard-source": true, "target": file(&daemon.path("t.qcow2"))}),
    );
    until(&mut client, "j", None);
    guest(&daemon, "read -P 0 2M 1M");
    guest(&daemon, "read -P 2 3M 1M");
    guest(&daemon, "read -P 1 0 2M");
    io(&daemon, "-f qcow2 t.qcow2", "read -P 7 2M 1M");
}

/// Nothing of a backup is left where its transaction fails: no job, no filter, no file, and its bitmap is free.
#[test]
fn a_backup_in_a_transaction_that_fails_never_was() {
    let Some(daemon) = chain() else { return };
    let mut client = daemon.client();
    client.execute(
        "block-dirty-bitmap-add",
        json!({"node": "top", "name": "b"}),
    );
    guest(&daemon, "write -P 3 6M 100k");
    let before = client.execute("query-named-block-nodes", json!({"flat": true}));
    let backup = json!({"type": "drive-backup", "data": {"job-id": "j", "device": "top",
        "sync": "incremental", "bitmap": "b", "target": file(&daemon.path("t.qcow2"))}});
    let no_bitmap = json!({"type": "drive-backup", "data": {"job-id": "k", "device": "top",
        "sync": "incremental", "bitmap": "x", "target": file(&daemon.path("u.qcow2"))}});
    let busy = json!({"type": "drive-backup", "data": {"job-id": "k", "device": "top",
        "sync": "incremental", "bitmap": "b", "target": file(&daemon.path("u.qcow2"))}});
    for (last, expected) in [
        (
            json!({"type": "abort", "data": {}}),
            "Transaction aborted using Abort action",
        ),
        (no_bitmap, "Bitmap 'x' could not be found"),
        (
            busy,
            "Bitmap 'b' is currently in use by another operation and cannot be used",
        ),
    ] {
        let actions = json!({"actions": [backup.clone(), last]});
        let reply = client.call("transaction", actions);
        assert_eq!(error(&reply), expected);
        let nodes = client.execute("query-named-block-nodes", json!({"flat": true}));
        assert_eq!(nodes, before, "after: {expected}");
        assert_eq!(client.execute("query-jobs", json!({})), json!([]));
        assert!(!daemon.path("t.qcow2").exists() && !daemon.path("u.qcow2").exists());
    }
    let actions = json!({"actions": [backup]});
    assert_eq!(error(&client.call("transaction", actions)), "no error");
    until(&mut client, "j", None);
    assert_eq!(bitmap(&mut client, "b")["count"], 0);
}

fn grouped(client: &mut Socket, daemon: &Daemon, round: u32) {
    let backup = |id: &str| {
        json!({"type": "drive-backup", "data": {"job-id": id, "device": "top", "sync": "full",
            "target": file(&daemon.path(&format!("{id}{round}.qcow2"))),
            "auto-finalize": id != "a", "auto-dismiss": false}})
    };
    let arguments = json!({"actions": [backup("a"), backup("b")],
        "properties": {"completion-mode": "grouped"}});
    client.execute("transaction", arguments);
    for id in ["a", "b"] {
        until(client, id, Some("pending"));
    }
}

/// One that is cancelled takes the other with it, the older the newer and the newer the older; one `finalize` ends
/// both.
#[test]
fn grouped_backups_end_together() {
    let Some(daemon) = chain() else { return };
    let mut client = daemon.client();
    let cancelled = Some("Operation canceled");
    let rounds = [
        ("job-cancel", "a", cancelled),
        ("job-cancel", "b", cancelled),
        ("job-finalize", "a", None),
        ("job-finalize", "b", None),
    ];
    for (round, (command, id, expected)) in (0..).zip(rounds) {
        grouped(&mut client, &daemon, round);
        client.execute(command, json!({"id": id}));
        for id in ["a", "b"] {
            until(&mut client, id, Some("concluded"));
        }
        let jobs = client.execute("query-jobs", json!({}));
        for job in jobs.as_array().expect("a list") {
            assert_eq!(job["error"].as_str(), expected, "{command} {id}: {job}");
        }
        for id in ["a", "b"] {
            client.execute("job-dismiss", json!({"id": id}));
        }
    }
}
