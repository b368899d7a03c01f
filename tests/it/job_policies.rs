//! Jobs that meet errors, and verbs in each state: what clients see is held against qemu-storage-daemon, which gets
//! the same commands.

use std::process::Command;

use serde_json::{Value, json};

use crate::filters::Monitor;

const QEMU: &str = "qemu-storage-daemon";

/// Images a ← b ← c with data of their own, and an empty one, t, to copy to.
fn images() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a directory");
    let run = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        let output = command.current_dir(directory.path()).args(arguments);
        assert!(output.output().expect("it starts").status.success());
    };
    let mut below: Vec<&str> = Vec::new();
    for (image, write) in [
        ("a.qcow2", "write -P 1 0 4M"),
        ("b.qcow2", "write -P 2 1M 2M"),
        ("c.qcow2", "write -P 3 2M 3M"),
    ] {
        let mut create = vec!["create", "-q", "-f", "qcow2"];
        create.extend(&below);
        create.push(image);
        if below.is_empty() {
            create.push("8M");
        }
        run("qemu-img", &create);
        run("qemu-io", &["-f", "qcow2", "-c", write, image]);
        below = vec!["-b", image, "-F", "qcow2"];
    }
    run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "t.qcow2", "8M"],
    );
    directory
}

/// An error that a node meets once, when this happens.
#[derive(Clone, Copy, Debug)]
struct Trouble {
    node: &'static str,
    event: &'static str,
    errno: i32,
}

fn open_chain(monitor: &mut Monitor, trouble: Option<Trouble>) {
    for (name, backing) in [
        ("a", Value::Null),
        ("b", json!("a")),
        ("c", json!("b")),
        ("t", Value::Null),
    ] {
        let mut file = json!({"driver": "file", "filename": format!("{name}.qcow2")});
        if let Some(trouble) = trouble.filter(|trouble| trouble.node == name) {
            let rule = json!({"event": trouble.event, "errno": trouble.errno, "once": true});
            file = json!({"driver": "blkdebug", "image": file, "inject-error": [rule]});
        }
        monitor.execute(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": name, "read-only": name < "c", "backing": backing,
                   "file": file}),
        );
    }
}

/// Kinds of jobs on the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Job {
    Stream,
    Commit,
    ActiveCommit,
    Mirror,
}

fn start(monitor: &mut Monitor, job: Job, more: Value) {
    let mut arguments = json!({"device": "c", "job-id": "j", "auto-dismiss": false});
    if job == Job::Commit {
        arguments["top-node"] = "b".into();
    }
    match job {
        Job::Stream => {}
        Job::Commit | Job::ActiveCommit => arguments["base-node"] = "a".into(),
        Job::Mirror => {
            arguments["target"] = "t".into();
            arguments["sync"] = "full".into();
        }
    }
    let members = arguments.as_object_mut().expect("an object");
    members.extend(more.as_object().expect("an object").clone());
    let command = match job {
        Job::Stream => "block-stream",
        Job::Commit | Job::ActiveCommit => "block-commit",
        Job::Mirror => "blockdev-mirror",
    };
    monitor.execute(command, arguments);
}

/// How far a job is when it is held up depends on how many requests it has in flight.
fn without_progress(mut value: Value) -> Value {
    match &mut value {
        Value::Array(values) => {
            for one in values {
                *one = without_progress(one.take());
            }
        }
        Value::Object(members) => {
            let held_up =
                members.contains_key("error") || members.get("status") == Some(&json!("paused"));
            if held_up {
                members.remove("offset");
            }
            for (_, one) in members {
                *one = without_progress(one.take());
            }
        }
        _ => {}
    }
    value
}

/// Replies, and events, in order.
fn seen(monitor: &Monitor) -> (Vec<Value>, Vec<Value>) {
    let all = |values: &[Value]| values.iter().cloned().map(without_progress).collect();
    (all(&monitor.replies), all(&monitor.events))
}

/// Leads a job to its end as a user does who resumes what an error has stopped.
fn with_trouble(
    program: &str,
    job: Job,
    trouble: Trouble,
    policy: &str,
) -> (Vec<Value>, Vec<Value>) {
    let directory = images();
    let mut monitor = Monitor::start(program, directory.path());
    open_chain(&mut monitor, Some(trouble));
    let policies = match job {
        Job::Mirror => json!({"on-source-error": policy, "on-target-error": policy}),
        _ => json!({"on-error": policy}),
    };
    start(&mut monitor, job, policies);
    loop {
        let status = monitor.wait_for(&["paused", "ready", "concluded"]);
        monitor.execute("query-block-jobs", json!({}));
        match status.as_str() {
            "paused" => monitor.execute("block-job-resume", json!({"device": "j"})),
            "ready" => monitor.execute("block-job-complete", json!({"device": "j"})),
            _ => break,
        };
    }
    monitor.execute("job-dismiss", json!({"id": "j"}));
    seen(&monitor)
}

fn is_installed() -> bool {
    let found = Command::new(QEMU).arg("--version").output().is_ok();
    if !found {
        eprintln!("SKIPPED: {QEMU} is not installed, which the answers are held against");
    }
    found
}

/// Each policy with an error on each side of each job: events with their data, the I/O status, and what becomes of
/// the job.
#[test]
fn errors_are_dealt_with_as_in_qemu() {
    if !is_installed() {
        return;
    }
    for (job, reads, writes) in [
        (Job::Stream, "a", "c"),
        (Job::Commit, "b", "a"),
        (Job::ActiveCommit, "c", "a"),
        (Job::Mirror, "c", "t"),
    ] {
        for (node, event) in [(reads, "read_aio"), (writes, "write_aio")] {
            for policy in ["report", "ignore", "stop", "enospc", "auto"] {
                for errno in [5, 28] {
                    let trouble = Trouble { node, event, errno };
                    let ours = with_trouble(env!("CARGO_BIN_EXE_liveblkd"), job, trouble, policy);
                    let theirs = with_trouble(QEMU, job, trouble, policy);
                    assert_eq!(ours, theirs, "{job:?} {trouble:?} {policy}");
                    let told = |name: &str| ours.1.iter().any(|event| event[0] == name);
                    assert!(told("BLOCK_JOB_ERROR"), "{job:?} {trouble:?} {policy}");
                }
            }
        }
    }
}

/// Leads a job into a state.
fn lead_to(monitor: &mut Monitor, state: &str) {
    let (job, more) = match state {
        "ready" | "standby" => (Job::ActiveCommit, json!({})),
        "pending" => (Job::Stream, json!({"auto-finalize": false})),
        "concluded" => (Job::Stream, json!({})),
        _ => (Job::Stream, json!({"speed": 65536})),
    };
    start(monitor, job, more);
    let first = match state {
        "standby" => "ready",
        "paused" => "running",
        other => other,
    };
    monitor.wait_for(&[first]);
    if first != state {
        monitor.execute("job-pause", json!({"id": "j"}));
        monitor.wait_for(&[state]);
    }
}

/// Verbs that a state does not take.
fn refused_in(state: &str) -> &'static [&'static str] {
    match state {
        "running" => &["complete", "finalize", "dismiss", "resume"],
        "paused" => &["pause", "complete", "finalize", "dismiss"],
        "ready" => &["resume", "finalize", "dismiss"],
        "standby" => &["pause", "finalize", "dismiss"],
        "pending" => &["pause", "resume", "complete", "set-speed", "dismiss"],
        _ => &[
            "pause",
            "resume",
            "complete",
            "set-speed",
            "finalize",
            "cancel",
        ],
    }
}

fn try_verb(monitor: &mut Monitor, family: &str, verb: &str) {
    let by_id = family == "job" || matches!(verb, "finalize" | "dismiss");
    let mut arguments = json!({if by_id { "id" } else { "device" }: "j"});
    if verb == "set-speed" {
        if family == "job" {
            return;
        }
        arguments["speed"] = 5.into();
    }
    monitor.execute(&format!("{family}-{verb}"), arguments);
}

/// In each state: the verbs that it does not take, then a cancel, and the job's end.
fn cancelled_in(program: &str, state: &str, cancel: (&str, Value)) -> (Vec<Value>, Vec<Value>) {
    let directory = images();
    let mut monitor = Monitor::start(program, directory.path());
    open_chain(&mut monitor, None);
    lead_to(&mut monitor, state);
    for verb in refused_in(state) {
        try_verb(&mut monitor, "job", verb);
        try_verb(&mut monitor, "block-job", verb);
    }
    let refused = cancel.0 == "block-job-cancel" && cancel.1["force"] != true;
    monitor.execute(cancel.0, cancel.1);
    if refused && matches!(state, "paused" | "standby") {
        monitor.execute("block-job-resume", json!({"device": "j"}));
        monitor.execute("job-cancel", json!({"id": "j"}));
    }
    if state != "concluded" {
        monitor.wait_for(&["concluded"]);
    }
    monitor.execute("job-dismiss", json!({"id": "j"}));
    monitor.execute("blockdev-del", json!({"node-name": "c"}));
    let (replies, mut events) = seen(&monitor);
    if matches!(state, "running" | "paused") {
        // Where a slow job was when it was cancelled is a matter of time.
        for event in &mut events {
            if let Some(data) = event[1].as_object_mut() {
                data.remove("offset");
            }
        }
    }
    (replies, events)
}

#[test]
fn verbs_are_answered_in_each_state_as_in_qemu() {
    if !is_installed() {
        return;
    }
    for state in [
        "running",
        "paused",
        "ready",
        "standby",
        "pending",
        "concluded",
    ] {
        for cancel in [
            ("job-cancel", json!({"id": "j"})),
            ("block-job-cancel", json!({"device": "j"})),
            ("block-job-cancel", json!({"device": "j", "force": true})),
        ] {
            let ours = cancelled_in(env!("CARGO_BIN_EXE_liveblkd"), state, cancel.clone());
            let theirs = cancelled_in(QEMU, state, cancel.clone());
            assert_eq!(ours, theirs, "{state} {cancel:?}");
        }
    }
}
