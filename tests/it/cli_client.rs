//! `liveblk chain`, `snapshot` and `qmp` against a running daemon.

use serde_json::Value;

use crate::cli::{daemon, failure, qemu, result};

#[test]
fn snapshot_chain_and_qmp_work_with_qemu_storage_daemon() {
    works_with("qemu-storage-daemon");
}

#[test]
fn snapshot_chain_and_qmp_work_with_liveblkd() {
    works_with(env!("CARGO_BIN_EXE_liveblkd"));
}

fn works_with(program: &str) {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    qemu(
        place,
        "qemu-img",
        &["create", "-q", "-f", "raw", "base.raw", "8M"],
    );
    let create = "create -q -f qcow2 -b base.raw -F raw top.qcow2";
    qemu(place, "qemu-img", &create.split(' ').collect::<Vec<_>>());
    let daemon = daemon(program, place);

    let picture = result(place, &["chain"]);
    let lines: Vec<&str> = picture.lines().collect();
    assert_eq!(lines[0], "export e0 (nbd)");
    assert!(
        lines[1].starts_with("├─ top ") && lines[1].ends_with(" top.qcow2"),
        "{picture}"
    );
    assert!(
        lines[2].starts_with("└─ #block") && lines[2].ends_with(" base.raw"),
        "{picture}"
    );

    assert_eq!(
        result(place, &["snapshot", "-n", "d", "e0", "monday.qcow2"]),
        "monday\n"
    );
    let chains: Value = result(place, &["chain", "--output", "json"])
        .parse()
        .expect("JSON");
    assert_eq!(chains[0]["exports"][0]["node-name"], "monday");
    let files: Vec<&str> = chains[0]["layers"]
        .as_array()
        .expect("layers")
        .iter()
        .map(|layer| layer["filename"].as_str().expect("a name"))
        .collect();
    let overlay = place.join("monday.qcow2");
    assert_eq!(
        files,
        [overlay.to_str().expect("UTF-8"), "top.qcow2", "base.raw"]
    );
    assert_eq!(chains[0]["layers"][0]["read-only"], false);
    assert_eq!(chains[0]["layers"][1]["read-only"], true);

    let error = failure(place, 1, &["snapshot", "monday.qcow2"]);
    assert!(error.contains("monday.qcow2' exists"), "{error}");
    let error = failure(place, 1, &["snapshot", "x", "t.qcow2"]);
    assert_eq!(error, "Cannot find device='' nor node-name='x'\n");
    assert!(!place.join("t.qcow2").exists());

    result(
        place,
        &[
            "qmp",
            "blockdev-add",
            "driver=null-co",
            "node-name=n",
            "size=4096",
        ],
    );
    let chain = result(place, &["chain", "n"]);
    assert!(
        chain.starts_with("── n  null-co  writable  4 KiB"),
        "{chain}"
    );
    assert_eq!(
        result(place, &["qmp", "blockdev-del", "{\"node-name\": \"n\"}"]),
        "{}\n"
    );
    let error = failure(place, 1, &["qmp", "nosuch"]);
    assert_eq!(
        error,
        "CommandNotFound: The command nosuch has not been found\n"
    );
    assert_eq!(result(place, &["qmp", "quit"]), "{}\n");
    drop(daemon);
}
