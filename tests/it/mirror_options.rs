//! Options of mirrors that change what is copied, or whose users move: held against qemu-storage-daemon where it
//! has them.

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};

use crate::filters::Monitor;

const LIVEBLKD: &str = env!("CARGO_BIN_EXE_liveblkd");
const QEMU: &str = "qemu-storage-daemon";

fn tool(directory: &Path, line: &str) {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().expect("a program"));
    let output = command.current_dir(directory).args(words).output();
    let output = output.expect("QEMU's tools start");
    assert!(output.status.success(), "{line}: {output:?}");
}

fn io(directory: &Path, image: &str, command: &str) {
    let format = image.rsplit('.').next().expect("an extension");
    let output = Command::new("qemu-io")
        .current_dir(directory)
        .args(["-f", format, "-c", command, image])
        .output();
    let output = output.expect("qemu-io starts");
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let failed = !output.status.success() || told.contains("verification failed");
    assert!(!failed, "{image}: {command}: {told}");
}

/// A source with data, zeroes and nothing, and a target that is empty.
fn images() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    let place = directory.path();
    tool(place, "qemu-img create -q -f qcow2 a.qcow2 8M");
    tool(place, "qemu-img create -q -f qcow2 t.qcow2 8M");
    io(place, "a.qcow2", "write -P 1 1M 2M");
    io(place, "a.qcow2", "write -z 4M 1M");
    directory
}

fn open(monitor: &mut Monitor, name: &str) {
    let file = json!({"driver": "file", "filename": format!("{name}.qcow2")});
    let opened = monitor.execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": name, "discard": "unmap", "file": file}),
    );
    assert_eq!(opened, json!({"return": {}}), "{name}");
}

/// Starts a mirror and leads it to its end.
fn copy(monitor: &mut Monitor, command: &str, arguments: Value) {
    let mut all = json!({"device": "a", "job-id": "j", "sync": "full", "auto-dismiss": false});
    let members = all.as_object_mut().expect("an object");
    members.extend(arguments.as_object().expect("an object").clone());
    let started = monitor.execute(command, all);
    assert_eq!(started, json!({"return": {}}), "{command} {arguments}");
    monitor.wait_for(&["ready"]);
    monitor.execute("job-complete", json!({"id": "j"}));
    monitor.wait_for(&["concluded"]);
    let jobs = monitor.execute("query-jobs", json!({}));
    assert_eq!(jobs["return"][0].get("error"), None, "{arguments}");
    monitor.execute("job-dismiss", json!({"id": "j"}));
}

fn programs() -> Vec<&'static str> {
    if Command::new(QEMU).arg("--version").output().is_ok() {
        return vec![LIVEBLKD, QEMU];
    }
    eprintln!("SKIPPED: {QEMU} is not installed, which the answers are held against");
    vec![LIVEBLKD]
}

/// The edges of the graph, by the names of nodes that users gave.
fn edges(monitor: &mut Monitor) -> Vec<(Value, Value, Value)> {
    let graph = monitor.execute("x-debug-query-block-graph", json!({}));
    let graph = &graph["return"];
    let named = |id: &Value| {
        let nodes = graph["nodes"].as_array().expect("nodes");
        let node = nodes.iter().find(|node| node["id"] == *id);
        match node.expect("an end of an edge") {
            node if node["type"] == "block-driver" => node["name"].clone(),
            node => node["type"].clone(),
        }
    };
    let edges = graph["edges"].as_array().expect("edges").iter();
    let mut edges: Vec<_> = edges
        .map(|edge| {
            (
                named(&edge["parent"]),
                edge["name"].clone(),
                named(&edge["child"]),
            )
        })
        .filter(|(parent, _, _)| parent == "filter" || parent == "above")
        .collect();
    edges.sort_by_key(|(parent, _, _)| parent.to_string());
    edges
}

/// A filter is mirrored, and what lies below it is replaced: the filters stay, and show the target.
#[test]
fn users_of_the_replaced_node_move() {
    let mut seen = Vec::new();
    for program in programs() {
        let directory = images();
        let mut monitor = Monitor::start(program, directory.path());
        open(&mut monitor, "a");
        open(&mut monitor, "t");
        monitor.execute(
            "object-add",
            json!({"qom-type": "throttle-group", "id": "g"}),
        );
        for (name, file) in [("filter", "a"), ("above", "filter")] {
            monitor.execute(
                "blockdev-add",
                json!({"driver": "throttle", "node-name": name, "throttle-group": "g", "file": file}),
            );
        }
        let before = edges(&mut monitor);
        copy(
            &mut monitor,
            "blockdev-mirror",
            json!({"device": "above", "target": "t", "replaces": "a"}),
        );
        let after = edges(&mut monitor);
        assert_ne!(before, after, "{program}");
        let removed = monitor.execute("blockdev-del", json!({"node-name": "a"}));
        assert_eq!(removed, json!({"return": {}}), "{program}: nobody uses it");
        let kept = monitor.execute("blockdev-del", json!({"node-name": "t"}));
        assert!(kept["error"].is_object(), "{program}: the filter uses it");
        seen.push((after, kept));
        drop(monitor);
        io(directory.path(), "t.qcow2", "read -P 1 1M 2M");
    }
    assert!(seen.iter().all(|one| *one == seen[0]), "{seen:#?}");
    let child = ("filter".into(), "file".into(), "t".into());
    assert!(seen[0].0.contains(&child), "{seen:?}");
}

/// What is said to be zero is not written where the source has nothing; without the word it is made so.
#[test]
fn a_target_that_is_said_to_be_zero_gets_only_what_there_is() {
    for (said, left) in [(true, "9"), (false, "0")] {
        let directory = images();
        let place = directory.path();
        io(place, "t.qcow2", "write -P 9 6M 1M");
        let mut monitor = Monitor::start(LIVEBLKD, place);
        open(&mut monitor, "a");
        open(&mut monitor, "t");
        copy(
            &mut monitor,
            "blockdev-mirror",
            json!({"target": "t", "target-is-zero": said}),
        );
        drop(monitor);
        io(place, "t.qcow2", "read -P 1 1M 2M");
        io(place, "t.qcow2", "read -P 0 4M 1M");
        io(place, "t.qcow2", &format!("read -P {left} 6M 1M"));
    }
}

/// Zeroes take space away from the target only where they may. A target that discards was unmapped all the same
/// before it was copied to.
#[test]
fn zeroes_keep_their_space_where_nothing_may_be_unmapped() {
    const FULL: u64 = 8 << 20;
    for program in programs() {
        for unmap in [true, false] {
            let directory = images();
            let place = directory.path();
            let target = place.join("t.raw");
            std::fs::write(&target, vec![9; FULL as usize]).expect("a file");
            let mut monitor = Monitor::start(program, place);
            open(&mut monitor, "a");
            copy(
                &mut monitor,
                "drive-mirror",
                json!({"target": "t.raw", "format": "raw", "mode": "existing", "unmap": unmap}),
            );
            drop(monitor);
            let space = std::fs::metadata(&target).expect("it is there").blocks() * 512;
            let is_full = space >= FULL;
            assert_eq!(is_full, !unmap, "{program}, unmap={unmap}: {space}");
            io(place, "t.raw", "read -P 1 1M 2M");
            io(place, "t.raw", "read -P 0 3M 5M");
        }
    }
}
