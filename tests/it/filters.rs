//! Filters over QMP: what they answer is held against qemu-storage-daemon, which gets the same commands.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};

/// A daemon with its monitor on its standard streams.
pub(crate) struct Monitor {
    child: Child,
    output: BufReader<std::process::ChildStdout>,
    /// Each command with its answer.
    pub(crate) replies: Vec<Value>,
    /// Name and data of each event; of several in a row that are the same only the first.
    pub(crate) events: Vec<Value>,
    waited: usize,
}

impl Monitor {
    pub(crate) fn start(program: &str, directory: &Path) -> Monitor {
        let mut child = Command::new(program)
            .args(["--chardev", "stdio,id=m", "--monitor", "m"])
            .current_dir(directory)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        let output = BufReader::new(child.stdout.take().expect("piped"));
        let mut monitor = Monitor {
            child,
            output,
            replies: Vec::new(),
            events: Vec::new(),
            waited: 0,
        };
        monitor.reply();
        monitor.execute("qmp_capabilities", json!({}));
        monitor
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.output.read_line(&mut line).expect("a message");
        let message: Value = serde_json::from_str(&line).expect("JSON");
        if message.get("event").is_some() {
            let event = json!([message["event"], message["data"]]);
            if self.events.last() != Some(&event) {
                self.events.push(event);
            }
        }
        message
    }

    /// The job's next state of these that was not waited for yet.
    pub(crate) fn wait_for(&mut self, states: &[&str]) -> String {
        loop {
            while self.waited < self.events.len() {
                let event = &self.events[self.waited];
                self.waited += 1;
                let status = event[1]["status"].as_str().unwrap_or_default();
                if event[0] == "JOB_STATUS_CHANGE" && states.contains(&status) {
                    return status.to_owned();
                }
            }
            self.receive();
        }
    }

    /// The next message that is no event.
    fn reply(&mut self) -> Value {
        loop {
            let message = self.receive();
            if message.get("event").is_none() {
                return message;
            }
        }
    }

    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let request = json!({"execute": command, "arguments": arguments});
        let input = self.child.stdin.as_mut().expect("piped");
        writeln!(input, "{request}").expect("it reads");
        let reply = self.reply();
        self.replies.push(json!([command, reply]));
        reply
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A directory with `base.qcow2`, `top.qcow2` over it, and `raw.img`.
fn images() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    let create = |arguments: &[&str]| {
        let done = Command::new("qemu-img")
            .args(["create", "-q"])
            .args(arguments)
            .current_dir(directory.path())
            .status();
        assert!(done.expect("qemu-img starts").success());
    };
    create(&["-f", "qcow2", "base.qcow2", "8M"]);
    create(&[
        "-f",
        "qcow2",
        "-b",
        "base.qcow2",
        "-F",
        "qcow2",
        "top.qcow2",
    ]);
    create(&["-f", "raw", "raw.img", "8M"]);
    directory
}

/// Generated names differ, and the order of members in names that are options does not count.
fn normalised(mut value: Value) -> Value {
    match &mut value {
        Value::String(text) => {
            if let Some(options) = text.strip_prefix("json:") {
                return serde_json::from_str(options).expect("options");
            }
            if text.starts_with("#block") {
                *text = "#block".to_owned();
            }
        }
        Value::Array(values) => {
            for one in values {
                *one = normalised(one.take());
            }
        }
        Value::Object(members) => {
            members.remove("actual-size");
            for (_, one) in members {
                *one = normalised(one.take());
            }
        }
        _ => {}
    }
    value
}

/// Gives both programs the same commands; every answer must be the same.
fn same_as_qemu(commands: &[(&str, Value)]) {
    let qemu = "qemu-storage-daemon";
    if Command::new(qemu).arg("--version").output().is_err() {
        eprintln!("SKIPPED: {qemu} is not installed, which the answers are held against");
        return;
    }
    let (ours, theirs) = (images(), images());
    let mut liveblk = Monitor::start(env!("CARGO_BIN_EXE_liveblkd"), ours.path());
    let mut qemu = Monitor::start(qemu, theirs.path());
    for (command, arguments) in commands {
        let expected = normalised(qemu.execute(command, arguments.clone()));
        let found = normalised(liveblk.execute(command, arguments.clone()));
        assert_eq!(found, expected, "{command} {arguments}");
    }
}

fn add(description: Value) -> (&'static str, Value) {
    ("blockdev-add", description)
}

fn reopen(description: Value) -> (&'static str, Value) {
    ("blockdev-reopen", json!({"options": [description]}))
}

fn file(name: &str) -> Value {
    json!({"driver": "file", "filename": name})
}

/// The nodes `base` and `top` over it.
fn chain() -> Vec<(&'static str, Value)> {
    vec![
        add(
            json!({"driver": "qcow2", "node-name": "base", "read-only": true,
                   "file": file("base.qcow2")}),
        ),
        add(
            json!({"driver": "qcow2", "node-name": "top", "backing": "base",
                   "file": file("top.qcow2")}),
        ),
    ]
}

fn nodes(flat: bool) -> (&'static str, Value) {
    ("query-named-block-nodes", json!({"flat": flat}))
}

#[test]
fn copy_on_read_is_as_in_qemu() {
    let cor = |name: &str, bottom: &str| {
        add(json!({"driver": "copy-on-read", "node-name": name, "file": "top", "bottom": bottom}))
    };
    let mut commands = chain();
    commands.extend([
        cor("c0", "none"),
        cor("c1", "base"),
        cor("c2", "c1"),
        add(json!({"driver": "copy-on-read", "node-name": "c3", "file": "base"})),
        nodes(false),
        nodes(true),
        ("x-debug-query-block-graph", json!({})),
        reopen(json!({"driver": "copy-on-read", "node-name": "c1", "file": "top"})),
        ("blockdev-del", json!({"node-name": "top"})),
        ("blockdev-del", json!({"node-name": "base"})),
        ("blockdev-snapshot", json!({"node": "top", "overlay": "c1"})),
        ("blockdev-del", json!({"node-name": "c1"})),
        nodes(true),
    ]);
    same_as_qemu(&commands);
}

#[test]
fn poll_properties_of_iothreads_are_as_in_qemu() {
    let add = |id: &str, property: &str, value: Value| {
        let mut arguments = json!({"qom-type": "iothread", "id": id});
        arguments[property] = value;
        ("object-add", arguments)
    };
    let read =
        |path: &str, property: &str| ("qom-get", json!({"path": path, "property": property}));
    let write = |property: &str, value: Value| {
        (
            "qom-set",
            json!({"path": "t", "property": property, "value": value}),
        )
    };
    let mut commands = vec![add("t", "poll-max-ns", json!(100000))];
    for property in ["poll-max-ns", "poll-grow", "poll-shrink"] {
        commands.extend([
            add("x", property, json!(-1)),
            add("x", property, json!("1")),
            add("x", property, json!(1_u64 << 63)),
            add(property, property, json!(1_u64 << 62)),
            read("/objects/t", property),
            read(property, property),
            write(property, json!(-1)),
            write(property, json!("1")),
            write(property, json!(null)),
            write(property, json!(1.5)),
            write(property, json!(3)),
            read("t", property),
        ]);
    }
    commands.extend([
        read("poll-grow", "poll-max-ns"),
        read("t", "type"),
        read("t", "thread-id"),
        write("type", json!("x")),
        write("none", json!(5)),
        ("object-del", json!({"id": "t"})),
        read("t", "poll-max-ns"),
    ]);
    same_as_qemu(&commands);
}

#[test]
fn throttle_groups_are_as_in_qemu() {
    let group = |id: &str, limits: Value| {
        (
            "object-add",
            json!({"qom-type": "throttle-group", "id": id, "limits": limits}),
        )
    };
    let throttle = |group: &str| json!({"driver": "throttle", "node-name": "t", "file": "top", "throttle-group": group});
    let read =
        |path: &str, property: &str| ("qom-get", json!({"path": path, "property": property}));
    let write = |property: &str, value: Value| {
        (
            "qom-set",
            json!({"path": "g", "property": property, "value": value}),
        )
    };
    let mut commands = chain();
    commands.extend([
        group(
            "g",
            json!({"iops-total": 100, "bps-read": 1000000, "bps-read-max": 2000000}),
        ),
        group("g", json!({})),
        group("h", json!({})),
        group("x", json!({"iops-total": 50, "iops-read": 5})),
        group("x", json!({"iops-total-max": 50})),
        group("x", json!({"iops-total": 50, "iops-total-max": 10})),
        group("x", json!({"iops-total": 50, "iops-total-max-length": 10})),
        group(
            "x",
            json!({"iops-total": 50, "iops-total-max": 90, "iops-total-max-length": 0}),
        ),
        group("x", json!({"iops-total": -50})),
        group("x", json!({"iops-size": 10})),
        group(
            "x",
            json!({"bps-total": 5, "bps-total-max": 900000000000000_i64,
                          "bps-total-max-length": 4000000}),
        ),
        (
            "object-add",
            json!({"qom-type": "throttle-group", "id": "x", "x-bps-total": -5}),
        ),
        (
            "object-add",
            json!({"qom-type": "throttle-group", "id": "y", "x-iops-total": 5}),
        ),
        read("y", "limits"),
        read("/objects/g", "limits"),
        read("g", "x-bps-read-max"),
        read("g", "type"),
        read("g", "none"),
        read("nothing", "limits"),
        write("limits", json!({"iops-total": 7})),
        read("g", "limits"),
        write("limits", json!({"iops-read": 7})),
        write("limits", json!({"foo": 7})),
        write("limits", json!(5)),
        write("limits", json!({"iops-total": "x"})),
        write("x-iops-total", json!(5)),
        write("type", json!("x")),
        write("none", json!(5)),
        add(throttle("none")),
        add(json!({"driver": "throttle", "node-name": "t", "file": "top"})),
        add(throttle("g")),
        nodes(true),
        ("x-debug-query-block-graph", json!({})),
        ("object-del", json!({"id": "g"})),
        reopen(throttle("none")),
        reopen(throttle("h")),
        ("object-del", json!({"id": "g"})),
        ("object-del", json!({"id": "h"})),
        nodes(true),
        ("blockdev-del", json!({"node-name": "t"})),
        ("object-del", json!({"id": "h"})),
    ]);
    same_as_qemu(&commands);
}

#[test]
fn blkdebug_is_as_in_qemu() {
    let debug = |name: &str, more: Value| {
        let mut all = json!({"driver": "blkdebug", "node-name": name, "image": "f"});
        let members = all.as_object_mut().expect("an object");
        members.extend(more.as_object().expect("an object").clone());
        add(all)
    };
    let mut described = file("raw.img");
    described["node-name"] = "f".into();
    let error = json!({"event": "none", "errno": 5, "iotype": "read", "once": true, "sector": 3});
    same_as_qemu(&[
        add(described),
        add(json!({"driver": "blkdebug", "node-name": "b"})),
        debug("b0", json!({})),
        debug("b1", json!({"config": "none.conf"})),
        debug("b2", json!({"align": 3})),
        debug("b3", json!({"align": 4096, "max-transfer": 1024})),
        debug(
            "b4",
            json!({"opt-write-zero": 1024, "max-write-zero": 3000}),
        ),
        debug("b5", json!({"opt-discard": 1024, "max-discard": 1500})),
        debug("b6", json!({"max-transfer": 4294967296_i64})),
        debug(
            "b7",
            json!({"align": 512, "max-transfer": 4096, "opt-write-zero": 1024}),
        ),
        debug("b8", json!({"inject-error": [error]})),
        debug("b9", json!({"inject-error": [{"event": "other"}]})),
        debug("b10", json!({"set-state": [{"event": "read_aio"}]})),
        debug(
            "b11",
            json!({"set-state": [{"event": "read_aio", "state": 2, "new_state": 3}]}),
        ),
        debug(
            "b12",
            json!({"take-child-perms": ["write"], "unshare-child-perms": ["resize"]}),
        ),
        nodes(true),
        ("x-debug-query-block-graph", json!({})),
        reopen(json!({"driver": "blkdebug", "node-name": "b0", "image": "f"})),
        reopen(json!({"driver": "blkdebug", "node-name": "b0", "image": "f", "align": 512})),
    ]);
}

#[test]
fn preallocate_is_as_in_qemu() {
    let preallocate = |more: Value| {
        let mut all = json!({"driver": "preallocate", "node-name": "p", "file": "f"});
        let members = all.as_object_mut().expect("an object");
        members.extend(more.as_object().expect("an object").clone());
        all
    };
    let mut described = file("raw.img");
    described["node-name"] = "f".into();
    same_as_qemu(&[
        add(described),
        add(preallocate(json!({"prealloc-align": 1000}))),
        add(preallocate(json!({"prealloc-size": -5}))),
        add(preallocate(
            json!({"prealloc-align": 65536, "prealloc-size": 1048576}),
        )),
        nodes(true),
        ("x-debug-query-block-graph", json!({})),
        reopen(preallocate(
            json!({"prealloc-align": 1000, "prealloc-size": 1048576}),
        )),
        reopen(preallocate(
            json!({"prealloc-align": 4096, "prealloc-size": 65536}),
        )),
    ]);
}

/// Put in under a format and taken out again, by reference.
#[test]
fn filters_come_and_go_while_nodes_are_used() {
    let mut described = file("raw.img");
    described["node-name"] = "f".into();
    let over = |child: &str| json!({"driver": "raw", "node-name": "r", "file": child});
    let qcow2 = |backing: &str, file: Value| json!({"driver": "qcow2", "node-name": "top", "backing": backing, "file": file});
    let group = json!({"qom-type": "throttle-group", "id": "g", "limits": {"iops-total": 1000}});
    let throttle = |name: &str, child: &str| {
        add(
            json!({"driver": "throttle", "node-name": name, "file": child,
                   "throttle-group": "g"}),
        )
    };
    let mut commands = chain();
    commands.extend([
        ("object-add", group),
        add(described),
        add(over("f")),
        throttle("t", "f"),
        reopen(over("t")),
        nodes(true),
        reopen(over("f")),
        ("blockdev-del", json!({"node-name": "t"})),
        throttle("u", "base"),
        reopen(qcow2("u", file("top.qcow2"))),
        nodes(false),
        ("blockdev-del", json!({"node-name": "u"})),
        reopen(qcow2("base", file("top.qcow2"))),
        ("blockdev-del", json!({"node-name": "u"})),
        ("object-del", json!({"id": "g"})),
        nodes(true),
    ]);
    same_as_qemu(&commands);
}

/// The tail is there while the image is written, and goes when nobody writes it any more.
#[test]
fn the_tail_of_a_preallocated_file_is_cut_off() {
    let directory = images();
    let mut monitor = Monitor::start(env!("CARGO_BIN_EXE_liveblkd"), directory.path());
    let mut execute = |command: &str, arguments: Value| {
        let reply = monitor.execute(command, arguments);
        assert!(reply.get("return").is_some(), "{command}: {reply}");
    };
    let length = || {
        let path = directory.path().join("base.qcow2");
        std::fs::metadata(path).expect("it is there").len()
    };
    execute(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "q", "file": {
        "driver": "preallocate", "prealloc-size": 8 << 20, "prealloc-align": 1 << 20,
        "file": file("base.qcow2")}}),
    );
    let server = json!({"addr": {"type": "unix", "data": {"path": "n.sock"}}});
    execute("nbd-server-start", server);
    let export = json!({"type": "nbd", "id": "e", "node-name": "q", "writable": true});
    execute("block-export-add", export);
    let before = length();
    let written = Command::new("qemu-io")
        .args([
            "-f",
            "raw",
            "nbd+unix:///q?socket=n.sock",
            "-c",
            "write 0 1M",
        ])
        .current_dir(directory.path())
        .output()
        .expect("qemu-io starts");
    assert!(written.status.success(), "{written:?}");
    let written = length();
    assert!(written > before + (8 << 20), "{before} {written}");
    assert_eq!(written % (1 << 20), 0);
    execute("block-export-del", json!({"id": "e"}));
    execute("blockdev-del", json!({"node-name": "q"}));
    let after = length();
    assert!(after < before + (3 << 20), "{before} {written} {after}");
    let check = Command::new("qemu-img")
        .args(["check", "-q", "base.qcow2"])
        .current_dir(directory.path())
        .status();
    assert!(check.expect("qemu-img starts").success());
}

/// An error on the third request for a sector, once, and what the client of an export gets.
#[test]
fn injected_errors_reach_the_client() {
    let directory = images();
    let mut monitor = Monitor::start(env!("CARGO_BIN_EXE_liveblkd"), directory.path());
    let mut execute = |command: &str, arguments: Value| {
        let reply = monitor.execute(command, arguments);
        assert!(reply.get("return").is_some(), "{command}: {reply}");
    };
    let rules = "[inject-error]\nevent = \"write_aio\"\nstate = \"2\"\nerrno = \"28\"\nonce = \"on\"\n\
                 [set-state]\nevent = \"write_aio\"\nstate = \"1\"\nnew_state = \"2\"\n";
    std::fs::write(directory.path().join("rules"), rules).expect("written");
    execute(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "b", "file": {
            "driver": "blkdebug", "config": "rules", "image": file("raw.img")}}),
    );
    let server = json!({"addr": {"type": "unix", "data": {"path": "n.sock"}}});
    execute("nbd-server-start", server);
    let export = json!({"type": "nbd", "id": "e", "node-name": "b", "writable": true});
    execute("block-export-add", export);
    let mut outcomes = Vec::new();
    for _ in 0..3 {
        let written = Command::new("qemu-io")
            .args([
                "-f",
                "raw",
                "nbd+unix:///b?socket=n.sock",
                "-c",
                "write 0 4k",
            ])
            .current_dir(directory.path())
            .output()
            .expect("qemu-io starts");
        let text = String::from_utf8_lossy(&written.stdout).into_owned()
            + &String::from_utf8_lossy(&written.stderr);
        outcomes.push(text.contains("No space left on device"));
    }
    assert_eq!(outcomes, [false, true, false]);
}

/// What a filter keeps QEMU shows as bitmaps without a name, so that nodes are not compared.
#[test]
fn copy_before_write_is_as_in_qemu() {
    let cbw = |name: &str, more: Value| {
        let mut description = json!({"driver": "copy-before-write", "node-name": name,
                                     "file": "top", "target": "raw"});
        for (member, value) in more.as_object().expect("members") {
            description[member] = value.clone();
        }
        add(description)
    };
    let del = |name: &str| ("blockdev-del", json!({"node-name": name}));
    let mut commands = chain();
    commands.extend([
        add(json!({"driver": "raw", "node-name": "raw", "file": file("raw.img")})),
        cbw("c", json!({"min-cluster-size": 1000})),
        cbw("c", json!({"min-cluster-size": -1})),
        cbw("c", json!({"cbw-timeout": -1})),
        cbw("c", json!({"cbw-timeout": 1_u64 << 33})),
        cbw("c", json!({"on-cbw-error": "x"})),
        cbw("c", json!({"target": "none"})),
        cbw("c", json!({"file": "none"})),
        add(json!({"driver": "copy-before-write", "node-name": "c", "file": "top"})),
        add(json!({"driver": "copy-before-write", "node-name": "c", "target": "top"})),
        add(json!({"driver": "snapshot-access", "node-name": "a"})),
        add(json!({"driver": "snapshot-access", "node-name": "a", "file": "top"})),
        del("a"),
        cbw(
            "c",
            json!({"min-cluster-size": 1 << 30, "on-cbw-error": "break-snapshot",
                        "cbw-timeout": 5}),
        ),
        del("top"),
        del("raw"),
        add(json!({"driver": "snapshot-access", "node-name": "a", "file": "c"})),
        del("c"),
        reopen(
            json!({"driver": "copy-before-write", "node-name": "c", "file": "top",
                      "target": "raw"}),
        ),
        reopen(json!({"driver": "snapshot-access", "node-name": "a", "file": "c"})),
        del("a"),
        del("c"),
        del("raw"),
        cbw(
            "c",
            json!({"target": {"driver": "raw", "node-name": "inline", "file": file("raw.img")}}),
        ),
        del("c"),
        nodes(true),
    ]);
    same_as_qemu(&commands);
}
