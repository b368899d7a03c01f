//! `liveblk stream`, `commit`, `jobs` and `job` against QEMU's daemon and ours.

use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::Signal;
use serde_json::Value;

use crate::cli::{Running, daemon, failure, qemu, result, until, waited};

const LIVEBLKD: &str = env!("CARGO_BIN_EXE_liveblkd");
const QEMU: &str = "qemu-storage-daemon";

/// base.qcow2 <- mid.qcow2 <- top.qcow2, each with its own pattern in one of the first MiBs.
fn chain(place: &Path) {
    let create = |image: &str, rest: &str| {
        let words = format!("create -q -f qcow2 {rest}");
        let words: Vec<&str> = words.split(' ').collect();
        qemu(place, "qemu-img", &words);
        image.to_string()
    };
    let images = [
        create("base.qcow2", "base.qcow2 4M"),
        create("mid.qcow2", "-b base.qcow2 -F qcow2 mid.qcow2"),
        create("top.qcow2", "-b mid.qcow2 -F qcow2 top.qcow2"),
    ];
    for (index, image) in images.iter().enumerate() {
        let write = format!("write -P {} {index}M 1M", index + 1);
        qemu(place, "qemu-io", &["-f", "qcow2", "-c", &write, image]);
    }
}

/// The whole disk, seen through an image that nobody serves.
pub(crate) fn assert_content(place: &Path, image: &str) {
    for (index, pattern) in [1, 2, 3, 0].iter().enumerate() {
        let read = format!("read -P {pattern} {index}M 1M");
        qemu(place, "qemu-io", &["-r", "-f", "qcow2", "-c", &read, image]);
    }
    qemu(place, "qemu-img", &["check", "-q", image]);
}

pub(crate) fn layers(place: &Path) -> Vec<String> {
    let chains: Value = result(place, &["chain", "--output", "json"])
        .parse()
        .expect("JSON");
    let layers = chains[0]["layers"].as_array().expect("layers");
    let file = |layer: &Value| layer["filename"].as_str().expect("a name").to_string();
    layers.iter().map(file).collect()
}

pub(crate) fn quit(place: &Path, mut daemon: Running) {
    result(place, &["qmp", "quit"]);
    assert_eq!(daemon.ended(), Some(0));
}

/// Runs a test against both daemons.
pub(crate) fn with_both(test: impl Fn(&Path, &str)) {
    for program in [QEMU, LIVEBLKD] {
        let place = tempfile::tempdir().expect("a directory");
        chain(place.path());
        test(place.path(), program);
    }
}

#[test]
fn stream_shortens_the_chain_and_waits() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        let (done, progress) = waited(place, &["stream", "--wait", "--base", "base.qcow2", "e0"]);
        assert_eq!(done, "stream0: completed\n");
        assert!(
            progress.contains("stream0: concluded, 100 %, 4 MiB of 4 MiB"),
            "{progress}"
        );
        assert_eq!(layers(place), ["top.qcow2", "base.qcow2"]);
        let words = ["stream", "--wait", "--output", "json", "--job-id", "all"];
        let (done, _) = waited(place, &words);
        let job: Value = done.parse().expect("JSON");
        assert_eq!(
            (&job["id"], &job["status"]),
            (&"all".into(), &"concluded".into())
        );
        assert_eq!(layers(place), ["top.qcow2"]);
        assert_eq!(result(place, &["jobs"]), "no jobs\n");
        quit(place, daemon);
        assert_content(place, "top.qcow2");
        assert_content(place, "top.qcow2");
    });
}

#[test]
fn commit_of_everything_pivots_to_the_base() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        let (done, progress) = waited(place, &["commit"]);
        assert_eq!(done, "commit0: completed\n");
        assert!(progress.contains("commit0: ready, 100 %"), "{progress}");
        assert_eq!(layers(place), ["base.qcow2"]);
        quit(place, daemon);
        assert_content(place, "base.qcow2");
    });
}

#[test]
fn commit_below_the_active_layer_takes_layers_by_file_or_node() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        let words = ["commit", "--top", "mid.qcow2", "--base", "base.qcow2"];
        let error = failure(place, 1, &[&words[..], &["--no-complete"]].concat());
        assert!(error.contains("is not the active layer"), "{error}");
        let error = failure(place, 1, &["commit", "--top", "nosuch"]);
        assert!(
            error.contains("which is: top (top.qcow2), #block"),
            "{error}"
        );
        assert_eq!(result(place, &words), "commit0\n");
        let (done, _) = waited(place, &["job", "wait", "commit0"]);
        assert_eq!(done, "commit0: completed\n");
        assert_eq!(layers(place), ["top.qcow2", "base.qcow2"]);
        quit(place, daemon);
        assert_content(place, "top.qcow2");
    });
}

#[test]
fn a_commit_that_is_not_completed_stays_in_step_until_told() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        let (ready, _) = waited(place, &["commit", "--no-complete", "--job-id", "c"]);
        assert!(
            ready.starts_with("c: ready; 'liveblk job complete c'"),
            "{ready}"
        );
        let picture = result(place, &["chain"]);
        let job = picture.lines().nth(1).expect("a line of the job");
        assert!(
            job.contains("↓ commit c into #block") && job.ends_with(", ready, 100 %"),
            "{picture}"
        );
        assert_eq!(layers(place), ["top.qcow2", "mid.qcow2", "base.qcow2"]);
        let error = failure(place, 1, &["commit", "--job-id", "d"]);
        assert!(error.contains("'liveblk jobs' shows the jobs"), "{error}");
        let (done, _) = waited(place, &["job", "complete", "--wait", "c"]);
        assert_eq!(done, "c: completed\n");
        assert_eq!(layers(place), ["base.qcow2"]);
        quit(place, daemon);
        assert_content(place, "base.qcow2");
    });
}

#[test]
fn a_slow_stream_is_shown_steered_and_cancelled() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        let words = ["stream", "--speed", "64k", "--job-id", "slow"];
        assert_eq!(result(place, &words), "slow\n");
        let picture = result(place, &["chain"]);
        assert!(
            picture.contains("│  ↑ stream slow into top, running, "),
            "{picture}"
        );
        assert_eq!(layers(place), ["top.qcow2", "mid.qcow2", "base.qcow2"]);
        let chains: Value = result(place, &["chain", "--output", "json"])
            .parse()
            .expect("JSON");
        assert_eq!(chains[0]["jobs"][0]["id"], "slow");
        assert_eq!(chains[0]["jobs"][0]["layers-above"], 0);

        assert_eq!(result(place, &["job", "pause", "slow"]), "");
        let line = result(place, &["jobs"]);
        assert!(
            line.starts_with("slow  stream  paused  ") && line.ends_with("  at most 64 KiB/s\n"),
            "{line}"
        );
        let error = failure(place, 1, &["job", "cancel", "slow"]);
        assert!(
            error.contains("currently paused; resume it first, or give --force"),
            "{error}"
        );
        assert_eq!(result(place, &["job", "resume", "slow"]), "");
        assert_eq!(result(place, &["job", "set-speed", "slow", "128k"]), "");
        let jobs: Value = result(place, &["jobs", "--output", "json"])
            .parse()
            .expect("JSON");
        assert_eq!(jobs[0]["speed"], 128 << 10);
        let error = failure(place, 1, &["job", "dismiss", "slow"]);
        assert!(error.contains("it has not ended"), "{error}");
        assert_eq!(result(place, &["job", "cancel", "slow"]), "");
        let error = failure(place, 1, &["job", "wait", "slow"]);
        assert!(
            error.ends_with("liveblk: job 'slow' was cancelled\n"),
            "{error}"
        );
        let error = failure(place, 1, &["job", "wait", "slow"]);
        assert!(
            error.contains("job 'slow' is not there (any more)"),
            "{error}"
        );
        let error = failure(place, 1, &["job", "pause", "slow"]);
        assert!(
            error.contains("not found; 'liveblk jobs' lists the jobs"),
            "{error}"
        );
        quit(place, daemon);
        assert_content(place, "top.qcow2");
    });
}

/// Ctrl-C is for who waits; the job does not notice.
#[test]
fn ctrl_c_ends_the_waiting_not_the_job() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        let words = ["stream", "--speed", "64k", "--wait", "--job-id", "s"];
        let mut waiting = Running(
            Command::new(env!("CARGO_BIN_EXE_liveblk"))
                .args(words)
                .current_dir(place)
                .env("LIVEBLK_RUNTIME_DIR", place)
                .stdout(Stdio::null())
                .stderr(std::fs::File::create(place.join("said")).expect("created"))
                .spawn()
                .expect("liveblk can be started"),
        );
        let said = || std::fs::read_to_string(place.join("said")).expect("read");
        until("the progress is shown", || said().contains("s: running"));
        waiting.signal(Signal::SIGINT);
        assert_eq!(waiting.ended(), Some(130));
        assert!(
            said().ends_with(
                "liveblk: job 's' goes on; 'liveblk jobs' shows it, 'liveblk job wait s' waits for it again\n"
            ),
            "{}",
            said()
        );
        assert!(result(place, &["jobs"]).starts_with("s  stream  running"));
        result(place, &["job", "set-speed", "s", "0"]);
        let (done, _) = waited(place, &["job", "wait", "s"]);
        assert_eq!(done, "s: completed\n");
        quit(place, daemon);
        assert_content(place, "top.qcow2");
    });
}

#[test]
fn a_job_that_fails_is_an_error_with_its_reason() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        // A name too long for a header is found out at the end.
        let long = "x".repeat(1100);
        let words = ["stream", "--wait", "--base", "base.qcow2", "--backing-file"];
        let error = failure(place, 1, &[&words[..], &[&long]].concat());
        assert!(error.contains("liveblk: job 'stream0' failed: "), "{error}");
        assert_eq!(result(place, &["jobs"]), "no jobs\n");
        quit(place, daemon);
        assert_content(place, "top.qcow2");
    });
}

#[test]
fn writes_go_to_both_where_that_is_asked_for() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    chain(place);
    let daemon = daemon(LIVEBLKD, place);
    let error = failure(
        place,
        1,
        &["commit", "--top", "mid.qcow2", "--copy-mode", "background"],
    );
    assert!(error.contains("there is no --copy-mode"), "{error}");
    let words = ["commit", "--no-complete", "--copy-mode", "write-blocking"];
    waited(place, &words);
    let uri = format!("nbd+unix:///top?socket={}", place.join("nbd").display());
    qemu(
        place,
        "qemu-io",
        &["-f", "raw", "-c", "write -P 9 3M 1M", &uri],
    );
    let jobs: Value = result(place, &["jobs", "--output", "json"])
        .parse()
        .expect("JSON");
    // It counts as done: what was written is in the base already.
    assert_eq!(jobs[0]["total-progress"], 3 << 20);
    assert_eq!(jobs[0]["current-progress"], 3 << 20);
    let change = ["qmp", "block-job-change", "id=commit0", "type=commit"];
    let error = failure(place, 1, &[&change[..], &["copy-mode=background"]].concat());
    assert_eq!(
        error,
        "Change to copy mode 'background' is not implemented\n"
    );
    let same = [&change[..], &["copy-mode=write-blocking"]].concat();
    assert_eq!(result(place, &same), "{}\n");
    let error = failure(place, 1, &change);
    assert_eq!(error, "Job type does not support change\n");
    waited(place, &["job", "complete", "--wait", "commit0"]);
    quit(place, daemon);
    let read = ["-r", "-f", "qcow2", "-c", "read -P 9 3M 1M", "base.qcow2"];
    qemu(place, "qemu-io", &read);
}

/// What a job goes by stays as it is; the rest of the chain is free.
#[test]
fn links_of_a_running_job_are_not_changed() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    chain(place);
    let daemon = daemon(LIVEBLKD, place);
    let chains: Value = result(place, &["chain", "--output", "json"])
        .parse()
        .expect("JSON");
    let name = |layer: usize| {
        let name = chains[0]["layers"][layer]["node-name"].as_str();
        name.expect("a name").to_string()
    };
    let (mid, base) = (name(1), name(2));
    let reopen = |node: &str, backing: &str| {
        let chain: Value = result(place, &["qmp", "x-debug-query-block-graph"])
            .parse()
            .expect("JSON");
        let id = |name: &str| {
            let nodes = chain["nodes"].as_array().expect("nodes");
            let node = nodes.iter().find(|other| other["name"] == name);
            node.expect("the node")["id"].clone()
        };
        let edges = chain["edges"].as_array().expect("edges");
        let edge = edges
            .iter()
            .find(|edge| edge["parent"] == id(node) && edge["name"] == "file")
            .expect("its file");
        let nodes = chain["nodes"].as_array().expect("nodes");
        let file = nodes
            .iter()
            .find(|other| other["id"] == edge["child"])
            .expect("its node");
        let options = serde_json::json!({"options": [{
            "driver": "qcow2", "node-name": node, "file": file["name"], "backing": backing,
        }]});
        options.to_string()
    };
    let refuse = |words: &[&str], wanted: &str| {
        let error = failure(place, 1, words);
        assert_eq!(error, format!("{wanted}\n"));
    };
    result(place, &["stream", "--speed", "64k", "--base", &base]);
    let frozen = format!("Cannot change frozen 'backing' link from 'top' to '{mid}'");
    refuse(&["qmp", "blockdev-reopen", &reopen("top", &base)], &frozen);
    let header = ["qmp", "change-backing-file", "device=top", "backing-file=x"];
    let of_mid = format!("image-node-name={mid}");
    let of_mid = [&header[..], &[&of_mid]].concat();
    refuse(&of_mid, "Need a root block node");
    result(place, &["job", "cancel", "stream0"]);
    failure(place, 1, &["job", "wait", "stream0"]);

    result(place, &["commit", "--top", &mid, "--speed", "1"]);
    let implicit = "Cannot replace implicit backing child of top";
    refuse(&["qmp", "blockdev-reopen", &reopen("top", &mid)], implicit);
    refuse(&of_mid, "Need a root block node");
    result(place, &["job", "cancel", "commit0"]);
    failure(place, 1, &["job", "wait", "commit0"]);

    // A stream below the active layer leaves that alone.
    result(place, &["stream", "--speed", "64k", &mid]);
    let same = [
        "qmp",
        "change-backing-file",
        "device=top",
        "image-node-name=top",
    ];
    result(place, &[&same[..], &["backing-file=mid.qcow2"]].concat());
    result(place, &["job", "set-speed", "stream0", "0"]);
    waited(place, &["job", "wait", "stream0"]);
    quit(place, daemon);
    assert_content(place, "top.qcow2");
}
