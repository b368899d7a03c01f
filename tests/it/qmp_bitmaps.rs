//! Persistent bitmaps over the control socket, in turn with QEMU's daemon on the same image: what one
//! leaves the other finds.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::qmp_daemon::{Client, poll};

pub(crate) const LIVEBLKD: &str = env!("CARGO_BIN_EXE_liveblkd");
pub(crate) const QEMU: &str = "qemu-storage-daemon";

/// One of the daemons, with the image open as node `a` and exported over NBD; killed when dropped.
pub(crate) struct Peer {
    child: Child,
    pub(crate) client: Client<std::os::unix::net::UnixStream>,
}

impl Peer {
    pub(crate) fn start(program: &str, directory: &Path) -> Peer {
        Peer::start_with(program, directory, "qcow2", &[])
    }

    /// With this node as the image's backing file, which one of these options opens.
    pub(crate) fn start_chain(
        program: &str,
        directory: &Path,
        more: &[&str],
        backing: &str,
    ) -> Peer {
        let driver = format!("qcow2,backing={backing}");
        Peer::start_with(program, directory, &driver, more)
    }

    /// With an image of this driver and more options.
    pub(crate) fn start_with(program: &str, directory: &Path, driver: &str, more: &[&str]) -> Peer {
        let _ = std::fs::remove_file(directory.join("m.sock"));
        let child = Command::new(program)
            .current_dir(directory)
            .args(["--chardev", "socket,id=m,path=m.sock,server=on,wait=off"])
            .args(["--monitor", "chardev=m"])
            .args(["--nbd-server", "addr.type=unix,addr.path=nbd.sock"])
            .args(more)
            .arg("--blockdev")
            .arg(format!(
                "{driver},node-name=a,file.driver=file,file.filename=image"
            ))
            .args(["--export", "nbd,id=e,node-name=a,name=a,writable=on"])
            .stdin(Stdio::null())
            .spawn();
        let child = child.expect("a daemon starts");
        let stream =
            poll(|| std::os::unix::net::UnixStream::connect(directory.join("m.sock")).ok());
        let mut client = Client::new(stream.try_clone().expect("a socket"), stream);
        assert!(client.receive()["QMP"].is_object(), "greeting");
        client.execute("qmp_capabilities", json!({}));
        Peer { child, client }
    }

    /// What it says of the node's bitmaps, with digests, by name.
    pub(crate) fn bitmaps(&mut self) -> Vec<Value> {
        let nodes = self
            .client
            .execute("query-named-block-nodes", json!({"flat": true}));
        let nodes = nodes.as_array().expect("nodes");
        let node = nodes.iter().find(|node| node["node-name"] == "a");
        let bitmaps = node.expect("the node")["dirty-bitmaps"].clone();
        let mut bitmaps = bitmaps.as_array().cloned().unwrap_or_default();
        for bitmap in &mut bitmaps {
            let name = json!({"node": "a", "name": bitmap["name"]});
            let digest = self
                .client
                .execute("x-debug-block-dirty-bitmap-sha256", name);
            bitmap["sha256"] = digest["sha256"].clone();
        }
        bitmaps.sort_by_key(|bitmap| bitmap["name"].to_string());
        bitmaps
    }

    pub(crate) fn add(&mut self, name: &str, granularity: u64, disabled: bool) {
        self.client.execute(
            "block-dirty-bitmap-add",
            json!({"node": "a", "name": name, "granularity": granularity,
                "persistent": true, "disabled": disabled}),
        );
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// A descriptor by which it has a file of this name open, or had it so when it had the name.
    pub(crate) fn descriptor_of(&self, name: &str) -> String {
        let place = format!("/proc/{}/fd", self.id());
        let mut entries = std::fs::read_dir(place).expect("it runs").flatten();
        let is_it = |entry: &std::fs::DirEntry| {
            let target = std::fs::read_link(entry.path()).unwrap_or_default();
            let target = target.to_string_lossy().into_owned();
            target
                .trim_end_matches(" (deleted)")
                .ends_with(&format!("/{name}"))
        };
        let found = entries.find(is_it).expect("it has it open");
        found.file_name().to_string_lossy().into_owned()
    }

    pub(crate) fn quit(mut self) {
        self.client.execute("quit", json!({}));
        assert!(self.child.wait().expect("it ends").success());
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        // It has ended already where it was told to.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn tool(directory: &Path, line: &str) -> String {
    let mut words = line.split_whitespace();
    let mut command = Command::new(words.next().expect("a program"));
    let output = command.current_dir(directory).args(words).output();
    let output = output.expect("QEMU's tools start");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{line}: {text}{errors}");
    text
}

pub(crate) fn guest(directory: &Path, command: &str) {
    let output = Command::new("qemu-io")
        .current_dir(directory)
        .args(["-f", "raw", "-c", command, "nbd+unix:///a?socket=nbd.sock"])
        .output();
    let output = output.expect("qemu-io starts");
    assert!(output.status.success(), "{command}: {output:?}");
}

pub(crate) fn workshop(options: &str) -> Option<TempDir> {
    if Command::new(QEMU).arg("--version").output().is_err() {
        eprintln!("SKIPPED: {QEMU} is not installed, whose bitmaps are looked at");
        return None;
    }
    let directory = tempfile::tempdir().expect("temporary directory");
    tool(
        directory.path(),
        &format!("qemu-img create -q -f qcow2 {options} image 64M"),
    );
    Some(directory)
}

/// Each daemon in turn finds what the other has left, changes it, and leaves a clean image.
#[test]
fn bitmaps_go_from_qemu_to_liveblk_and_back() {
    for options in [
        "-o cluster_size=65536",
        "-o cluster_size=512,refcount_bits=64",
    ] {
        let Some(directory) = workshop(options) else {
            return;
        };
        let directory = directory.path();
        let mut before = Vec::new();
        for (round, program) in [LIVEBLKD, QEMU, LIVEBLKD, QEMU, LIVEBLKD]
            .into_iter()
            .enumerate()
        {
            let mut peer = Peer::start(program, directory);
            assert_eq!(peer.bitmaps(), before, "{program}, round {round}");
            peer.add(&format!("b{round}"), 512 << (3 * round), round == 1);
            guest(directory, &format!("write {}k 300k", round * 7000));
            guest(directory, &format!("write -z {}k 70k", round * 9000 + 100));
            if round == 3 {
                let name = json!({"node": "a", "name": "b1"});
                peer.client.execute("block-dirty-bitmap-enable", name);
                let name = json!({"node": "a", "name": "b0"});
                peer.client.execute("block-dirty-bitmap-remove", name);
            }
            if round == 2 {
                let merge = json!({"node": "a", "target": "b1", "bitmaps": ["b0", "b2"]});
                peer.client.execute("block-dirty-bitmap-merge", merge);
                let name = json!({"node": "a", "name": "b0"});
                peer.client.execute("block-dirty-bitmap-clear", name);
            }
            guest(directory, &format!("write {}k 5k", round * 11000));
            before = peer.bitmaps();
            assert!(before.len() >= round, "{before:?}");
            peer.quit();
            tool(directory, "qemu-img check -q -f qcow2 image");
            let info = tool(directory, "qemu-img info --output=json image");
            assert!(!info.contains("in-use"), "{info}");
        }
    }
}

/// QEMU takes what a killed daemon has left as inconsistent. We take it as it is, until somebody else has
/// written the image.
#[test]
fn a_killed_daemon_leaves_valid_bitmaps_until_another_program_writes() {
    let Some(directory) = workshop("") else {
        return;
    };
    let directory = directory.path();
    let mut peer = Peer::start(LIVEBLKD, directory);
    peer.add("b", 65536, false);
    guest(directory, "write 1M 200k");
    drop(peer);
    let mut peer = Peer::start(LIVEBLKD, directory);
    let bitmaps = peer.bitmaps();
    assert_eq!(bitmaps[0]["recording"], true, "{bitmaps:?}");
    assert!(
        bitmaps[0]["count"].as_u64() >= Some(4 * 65536),
        "{bitmaps:?}"
    );
    assert_eq!(bitmaps[0].get("inconsistent"), None);
    guest(directory, "write 9M 10k");
    drop(peer);
    tool(directory, "qemu-img check -q -f qcow2 image");
    let mut peer = Peer::start(QEMU, directory);
    assert_eq!(peer.bitmaps()[0]["inconsistent"], true);
    peer.quit();
    let mut peer = Peer::start(LIVEBLKD, directory);
    let bitmaps = peer.bitmaps();
    assert_eq!(bitmaps[0]["inconsistent"], true, "{bitmaps:?}");
    let name = json!({"node": "a", "name": "b"});
    let refused = peer.client.call("block-dirty-bitmap-clear", name.clone());
    let text = "Bitmap 'b' is inconsistent and cannot be used";
    assert_eq!(refused["error"]["desc"], text);
    peer.client.execute("block-dirty-bitmap-remove", name);
    assert!(peer.bitmaps().is_empty());
    peer.quit();
    tool(directory, "qemu-img check -q -f qcow2 image");
}

/// Every answer to what cannot be done, the same from both.
#[test]
fn refusals_are_qemus() {
    let Some(directory) = workshop("") else {
        return;
    };
    let directory = directory.path();
    tool(
        directory,
        "qemu-img create -q -f qcow2 -o compat=0.10 v2 8M",
    );
    tool(directory, "qemu-img create -q -f raw raw 8M");
    let long = "y".repeat(1024);
    let ro = json!({"options": [{"driver": "qcow2", "node-name": "ro", "read-only": true,
        "file": "ro-file"}]});
    let rw = json!({"options": [{"driver": "qcow2", "node-name": "ro", "file": "ro-file"}]});
    let bitmap = |node: &str, name: &str| json!({"node": node, "name": name});
    let stored = |node: &str, name: &str| json!({"node": node, "name": name, "persistent": true});
    let steps = [
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "v2",
            "file": {"driver": "file", "filename": "v2"}}),
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "raw",
            "file": {"driver": "file", "filename": "raw"}}),
        ),
        ("block-dirty-bitmap-add", bitmap("a", "b")),
        (
            "block-dirty-bitmap-add",
            json!({"node": "a", "name": "b", "granularity": 1000}),
        ),
        (
            "block-dirty-bitmap-add",
            json!({"node": "a", "name": "", "granularity": 1000}),
        ),
        (
            "block-dirty-bitmap-add",
            json!({"node": "a", "name": "g", "granularity": 4294967296u64}),
        ),
        (
            "block-dirty-bitmap-add",
            json!({"node": "raw", "name": "g", "granularity": 256, "persistent": true}),
        ),
        ("block-dirty-bitmap-add", stored("a", &long)),
        ("block-dirty-bitmap-add", stored("a", "b")),
        ("block-dirty-bitmap-add", stored("v2", "b")),
        ("block-dirty-bitmap-add", bitmap("a", &long)),
        (
            "block-dirty-bitmap-merge",
            json!({"node": "a", "target": "b", "bitmaps": [bitmap("x", "y")]}),
        ),
        (
            "block-dirty-bitmap-merge",
            json!({"node": "a", "target": "b", "bitmaps": [bitmap("raw", "y")]}),
        ),
        (
            "block-dirty-bitmap-merge",
            json!({"node": "x", "target": "b", "bitmaps": ["b"]}),
        ),
        (
            "block-dirty-bitmap-merge",
            json!({"node": "a", "target": "b", "bitmaps": [{"node": "raw"}]}),
        ),
        ("block-dirty-bitmap-add", stored("ro", "p")),
        ("block-dirty-bitmap-add", bitmap("ro", "t")),
        ("blockdev-reopen", ro),
        ("block-dirty-bitmap-clear", bitmap("ro", "p")),
        ("block-dirty-bitmap-remove", bitmap("ro", "p")),
        (
            "block-dirty-bitmap-merge",
            json!({"node": "ro", "target": "p", "bitmaps": ["t"]}),
        ),
        (
            "block-dirty-bitmap-merge",
            json!({"node": "ro", "target": "t", "bitmaps": ["p"]}),
        ),
        ("block-dirty-bitmap-disable", bitmap("ro", "p")),
        ("block-dirty-bitmap-clear", bitmap("ro", "t")),
        ("block-dirty-bitmap-add", stored("ro", "late")),
        ("blockdev-reopen", rw),
        ("block-dirty-bitmap-remove", bitmap("ro", "late")),
        ("block-dirty-bitmap-remove", bitmap("ro", "p")),
        ("query-named-block-nodes", json!({"flat": true})),
    ];
    let mut answers = Vec::new();
    for program in [QEMU, LIVEBLKD] {
        tool(directory, "qemu-img create -q -f qcow2 ro 8M");
        let mut peer = Peer::start(program, directory);
        peer.client.execute(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "ro",
                "file": {"driver": "file", "filename": "ro", "node-name": "ro-file"}}),
        );
        let answer = |(command, arguments): &(&str, Value)| {
            let reply = peer.client.call(command, arguments.clone());
            match reply["return"].as_array() {
                Some(nodes) => {
                    let bitmaps = nodes.iter().map(|node| &node["dirty-bitmaps"]);
                    bitmaps.cloned().collect::<Value>().to_string()
                }
                None => reply["error"]["desc"].to_string(),
            }
        };
        answers.push(steps.iter().map(answer).collect::<Vec<_>>());
        peer.quit();
    }
    for (index, step) in steps.iter().enumerate() {
        let same = |answer: &str| -> Value {
            serde_json::from_str(answer).unwrap_or_else(|_| answer.into())
        };
        assert_eq!(
            same(&answers[0][index]),
            same(&answers[1][index]),
            "{step:?}"
        );
    }
}
