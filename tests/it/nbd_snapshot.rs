//! Live snapshots of an image that a client writes over NBD: the client notices nothing, and nothing is lost.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::json;

use crate::nbd_server::has_program;
use crate::qmp_daemon::{Daemon, poll};

/// Snapshots while the client writes.
const SNAPSHOTS: usize = 20;

fn run(directory: &Path, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .current_dir(directory)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(
        output.status.success(),
        "{program} {}:\n{}{}",
        arguments.join(" "),
        text(&output.stdout),
        text(&output.stderr)
    );
    text(&output.stdout)
}

fn layer(number: usize) -> String {
    format!("layer{number}.qcow2")
}

#[test]
fn snapshots_under_load_lose_nothing() {
    let fio = Command::new("fio").arg("--enghelp").output();
    if !fio.is_ok_and(|list| String::from_utf8_lossy(&list.stdout).contains("nbd")) {
        eprintln!("SKIPPED: fio with the nbd engine is not installed");
        return;
    }
    if !has_program("qemu-img") {
        return;
    }
    let mut daemon = Daemon::start(&[]);
    let mut client = daemon.client();
    let directory = daemon.directory.path().to_owned();
    run(
        &directory,
        "qemu-img",
        &["create", "-q", "-f", "qcow2", &layer(0), "64M"],
    );
    let file = json!({"driver": "file", "filename": layer(0)});
    client.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "n0", "file": file}),
    );
    let address = json!({"type": "unix", "data": {"path": "nbd.sock"}});
    client.execute("nbd-server-start", json!({"addr": address}));
    client.execute(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "n0", "name": "e", "writable": true}),
    );
    let uri = format!("nbd+unix:///e?socket={}", daemon.path("nbd.sock").display());
    let mut load = Command::new("fio")
        .args([
            "--name=load",
            "--ioengine=nbd",
            &format!("--uri={uri}"),
            "--rw=randwrite",
        ])
        .args([
            "--bsrange=512-64k",
            "--size=40M",
            "--iodepth=16",
            "--rate=5m",
        ])
        .args([
            "--verify=crc32c",
            "--verify_fatal=1",
            "--output-format=terse",
        ])
        .current_dir(&directory)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let empty = std::fs::metadata(daemon.path(&layer(0))).unwrap().len();
    poll(|| (std::fs::metadata(daemon.path(&layer(0))).ok()?.len() > empty).then_some(()));
    for number in 1..=SNAPSHOTS {
        std::thread::sleep(Duration::from_millis(150));
        client.execute(
            "blockdev-snapshot-sync",
            json!({
                "node-name": format!("n{}", number - 1),
                "snapshot-file": layer(number),
                "snapshot-node-name": format!("n{number}"),
            }),
        );
        let exports = client.execute("query-block-exports", json!({}));
        assert_eq!(exports[0]["node-name"], format!("n{number}"));
    }
    assert!(
        load.try_wait().unwrap().is_none(),
        "the load ended before the last snapshot"
    );
    assert!(load.wait().unwrap().success(), "fio found wrong data");
    run(
        &directory,
        "qemu-img",
        &["convert", "-f", "raw", "-O", "raw", &uri, "seen.raw"],
    );
    client.execute("quit", json!({}));
    assert!(daemon.wait().success());
    assert_layers(&directory);
}

/// Every layer is sound, most were written to, and together they hold what the client saw.
fn assert_layers(directory: &Path) {
    let top = layer(SNAPSHOTS);
    let mut written = 0;
    for number in 0..=SNAPSHOTS {
        let check = ["check", "--output=json", "-f", "qcow2", &layer(number)];
        let report: serde_json::Value =
            serde_json::from_str(&run(directory, "qemu-img", &check)).unwrap();
        written += usize::from(report["allocated-clusters"].as_u64() > Some(0));
    }
    assert!(
        written > SNAPSHOTS / 2,
        "{written} layers of {SNAPSHOTS} have data"
    );
    let compare = ["compare", "-f", "raw", "-F", "qcow2", "seen.raw", &top];
    run(directory, "qemu-img", &compare);
}
