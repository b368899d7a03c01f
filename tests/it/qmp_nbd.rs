//! NBD nodes over the control socket: as targets of jobs, with servers of QEMU that die.

use std::os::unix::net::UnixStream;
use std::process::{Child, Command};
use std::time::Duration;

use serde_json::json;

use crate::qmp_daemon::{Client, Daemon, poll};

/// QEMU's server, killed at the end.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn has_qemu() -> bool {
    let found = Command::new("qemu-nbd").arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: qemu-nbd is not installed, which serves here");
    }
    found
}

fn run(daemon: &Daemon, program: &str, line: &str) {
    let mut command = Command::new(program);
    let output = command
        .current_dir(daemon.directory.path())
        .args(line.split_whitespace());
    let output = output.output().expect("it starts");
    assert!(output.status.success(), "{program} {line}: {output:?}");
}

/// Changes an image, by a command of qemu-io.
fn write(daemon: &Daemon, format: &str, image: &str, command: &str) {
    let output = Command::new("qemu-io")
        .current_dir(daemon.directory.path())
        .args(["-f", format, image, "-c", command])
        .output();
    let output = output.expect("qemu-io starts");
    assert!(output.status.success(), "{command}: {output:?}");
}

/// Serves `target.img` at `t.sock` as `t`.
fn serve(daemon: &Daemon) -> Server {
    let socket = daemon.path("t.sock");
    let _ = std::fs::remove_file(&socket);
    let child = Command::new("qemu-nbd")
        .current_dir(daemon.directory.path())
        .args(["-t", "-e", "8", "-x", "t", "-f", "raw", "-k"])
        .arg(&socket)
        .arg("target.img")
        .spawn();
    let server = Server(child.expect("qemu-nbd starts"));
    poll(|| UnixStream::connect(&socket).ok());
    server
}

/// A daemon with `disk`, a qcow2 image with data, and a target of the same size.
fn site() -> (Daemon, Client<UnixStream>) {
    let daemon = Daemon::start(&[]);
    run(&daemon, "qemu-img", "create -q -f qcow2 disk.qcow2 8M");
    for command in ["write -P 1 0 1M", "write -P 2 5M 64k"] {
        write(&daemon, "qcow2", "disk.qcow2", command);
    }
    run(&daemon, "qemu-img", "create -q -f raw target.img 8M");
    let mut client = daemon.client();
    client.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "disk", "read-only": true,
            "file": {"driver": "file", "filename": daemon.path("disk.qcow2")}}),
    );
    (daemon, client)
}

/// How many events of this name come before the reply to a command that is sent now.
fn events_before_reply(client: &mut Client<UnixStream>, name: &str) -> usize {
    client.send(b"{\"execute\": \"query-jobs\"}\n");
    let messages = std::iter::from_fn(|| {
        let message = client.receive();
        message.get("event").is_some().then_some(message)
    });
    messages.filter(|message| message["event"] == name).count()
}

fn concluded(client: &mut Client<UnixStream>, id: &str) -> String {
    poll(|| {
        let jobs = client.execute("query-jobs", json!({}));
        let jobs = jobs.as_array().expect("a list").clone();
        let job = jobs.into_iter().find(|job| job["id"] == id)?;
        let ended = job["status"] == "concluded";
        ended.then(|| job["error"].as_str().unwrap_or("none").to_owned())
    })
}

fn same(daemon: &Daemon) {
    run(
        daemon,
        "qemu-img",
        "compare -f qcow2 -F raw disk.qcow2 target.img",
    );
}

#[test]
fn backups_and_mirrors_go_to_a_server() {
    if !has_qemu() {
        return;
    }
    let (daemon, mut client) = site();
    let server = serve(&daemon);
    let target = format!("nbd:unix:{}:exportname=t", daemon.path("t.sock").display());
    client.execute(
        "drive-mirror",
        json!({"job-id": "m", "device": "disk", "target": target, "sync": "full",
            "mode": "existing", "format": "raw", "auto-dismiss": false}),
    );
    poll(|| {
        let jobs = client.execute("query-jobs", json!({}));
        (jobs[0]["status"] == "ready").then_some(())
    });
    client.execute("block-job-cancel", json!({"device": "m"}));
    assert_eq!(concluded(&mut client, "m"), "none");
    client.execute("job-dismiss", json!({"id": "m"}));
    drop(server);
    same(&daemon);

    run(&daemon, "qemu-img", "create -q -f raw target.img 8M");
    let server = serve(&daemon);
    add_remote(&daemon, &mut client, false);
    let nodes = client.execute("query-named-block-nodes", json!({}));
    let name = format!("nbd+unix:///t?socket={}", daemon.path("t.sock").display());
    let nodes = nodes.as_array().expect("nodes");
    assert!(
        nodes.iter().any(|node| node["file"] == name.as_str()),
        "{nodes:?}"
    );
    client.execute(
        "blockdev-backup",
        json!({"job-id": "b", "device": "disk", "target": "remote", "sync": "full",
            "auto-dismiss": false}),
    );
    assert_eq!(concluded(&mut client, "b"), "none");
    client.execute("job-dismiss", json!({"id": "b"}));
    client.execute("blockdev-del", json!({"node-name": "remote"}));
    drop(server);
    same(&daemon);
}

/// The server dies before it has answered anything: under `report` the job fails, under `stop` it waits and goes on with
/// the next server.
#[test]
fn jobs_outlive_their_server_as_their_policy_says() {
    if !has_qemu() {
        return;
    }
    for policy in ["report", "ignore", "stop"] {
        let (daemon, mut client) = site();
        let server = serve(&daemon);
        add_remote(&daemon, &mut client, false);
        drop(server);
        client.execute(
            "blockdev-backup",
            json!({"job-id": "b", "device": "disk", "target": "remote", "sync": "full",
                "on-target-error": policy, "auto-dismiss": false}),
        );
        match policy {
            "report" => assert_eq!(concluded(&mut client, "b"), "Input/output error"),
            "stop" => {
                until_stopped(&mut client);
                let _server = serve(&daemon);
                resume_to_the_end(&mut client);
                assert_eq!(concluded(&mut client, "b"), "none");
                same(&daemon);
            }
            _ => {
                // It is tried again and again, and others have their turn meanwhile.
                std::thread::sleep(Duration::from_secs(1));
                let failures = events_before_reply(&mut client, "BLOCK_JOB_ERROR");
                assert!(
                    (1..500).contains(&failures),
                    "{failures} failures in a second"
                );
                client.call("job-cancel", json!({"id": "b"}));
                concluded(&mut client, "b");
            }
        }
        let nodes = client.execute("query-named-block-nodes", json!({}));
        assert!(
            nodes.as_array().expect("nodes").len() > 2,
            "the daemon goes on"
        );
    }
}

/// What a server has answered may have gone with it where nothing was flushed: such a backup is none.
#[test]
fn a_backup_that_a_server_may_have_lost_does_not_succeed() {
    if !has_qemu() {
        return;
    }
    let (daemon, mut client) = site();
    let server = serve(&daemon);
    add_remote(&daemon, &mut client, false);
    client.execute(
        "blockdev-backup",
        json!({"job-id": "b", "device": "disk", "target": "remote", "sync": "full",
            "speed": 65536, "on-target-error": "stop", "auto-dismiss": false}),
    );
    poll(|| {
        let jobs = client.execute("query-jobs", json!({}));
        (jobs[0]["current-progress"].as_u64() > Some(0)).then_some(())
    });
    drop(server);
    client.execute("block-job-set-speed", json!({"device": "b", "speed": 0}));
    until_stopped(&mut client);
    let _server = serve(&daemon);
    resume_to_the_end(&mut client);
    assert_eq!(concluded(&mut client, "b"), "Input/output error");
}

fn until_stopped(client: &mut Client<UnixStream>) {
    poll(|| {
        let jobs = client.execute("query-block-jobs", json!({}));
        (jobs[0]["io-status"] == "failed").then_some(())
    });
}

/// The node does not try again at once, so that the job may stop again.
fn resume_to_the_end(client: &mut Client<UnixStream>) {
    poll(|| {
        client.call("block-job-resume", json!({"device": "b"}));
        let jobs = client.execute("query-jobs", json!({}));
        (jobs[0]["status"] == "concluded").then_some(())
    });
}

/// Exports the node over NBD and writes to it as a guest would.
fn guest(daemon: &Daemon, client: &mut Client<UnixStream>, node: &str, command: &str) {
    let socket = daemon.path("own.sock");
    client.execute(
        "nbd-server-start",
        json!({"addr": {"type": "unix", "data": {"path": socket}}}),
    );
    client.execute(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": node, "writable": true}),
    );
    let uri = format!("nbd+unix:///{node}?socket={}", socket.display());
    write(daemon, "raw", &uri, command);
    client.execute("nbd-server-stop", json!({}));
}

fn add_remote(daemon: &Daemon, client: &mut Client<UnixStream>, read_only: bool) {
    client.execute(
        "blockdev-add",
        json!({"driver": "nbd", "node-name": "remote", "export": "t", "read-only": read_only,
            "server": {"type": "unix", "path": daemon.path("t.sock")}}),
    );
}

/// A disk is used before its content is here; when all of it is, nobody needs the server any more.
#[test]
fn a_disk_is_attached_now_and_streamed_from_a_server() {
    if !has_qemu() {
        return;
    }
    let (daemon, mut client) = site();
    run(
        &daemon,
        "qemu-img",
        "convert -f qcow2 -O raw disk.qcow2 target.img",
    );
    run(&daemon, "qemu-img", "create -q -f qcow2 local.qcow2 8M");
    let server = serve(&daemon);
    add_remote(&daemon, &mut client, true);
    client.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "local", "backing": "remote",
            "file": {"driver": "file", "filename": daemon.path("local.qcow2")}}),
    );
    // Part of a cluster: the rest of it comes from the server.
    guest(&daemon, &mut client, "local", "write -P 7 1000k 100k");
    client.execute(
        "block-stream",
        json!({"job-id": "s", "device": "local", "auto-dismiss": false}),
    );
    assert_eq!(concluded(&mut client, "s"), "none");
    client.execute("job-dismiss", json!({"id": "s"}));
    client.execute("blockdev-del", json!({"node-name": "remote"}));
    drop(server);
    client.execute("blockdev-del", json!({"node-name": "local"}));
    run(&daemon, "qemu-img", "check -q local.qcow2");
    write(&daemon, "raw", "target.img", "write -P 7 1000k 100k");
    let line = "compare -f qcow2 -F raw local.qcow2 target.img";
    run(&daemon, "qemu-img", line);
}

/// A server's bytes are a qcow2 image, whose metadata and data both go there.
#[test]
fn an_image_lies_on_a_server() {
    if !has_qemu() {
        return;
    }
    let (daemon, mut client) = site();
    run(&daemon, "cp", "disk.qcow2 copy.qcow2");
    run(&daemon, "cp", "disk.qcow2 target.img");
    // What a server exports does not grow with the image.
    run(&daemon, "truncate", "-s 16M target.img");
    let server = serve(&daemon);
    add_remote(&daemon, &mut client, false);
    client.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "there", "file": "remote"}),
    );
    guest(&daemon, &mut client, "there", "write -P 8 3M 200k");
    client.execute("blockdev-del", json!({"node-name": "there"}));
    client.execute("blockdev-del", json!({"node-name": "remote"}));
    drop(server);
    write(&daemon, "qcow2", "copy.qcow2", "write -P 8 3M 200k");
    run(&daemon, "qemu-img", "check -q -f qcow2 target.img");
    let line = "compare -f qcow2 -F qcow2 copy.qcow2 target.img";
    run(&daemon, "qemu-img", line);
}
