//! Dirty bitmaps told over NBD, held against QEMU's daemon.

use std::path::Path;

use serde_json::{Value, json};

use crate::nbd_server::has_program;
use crate::qmp_bitmaps::{LIVEBLKD, Peer, QEMU, guest, tool, workshop};

/// Both daemons in turn, with `image`, open as `a`, on top of `base`, open as `b`, and a disk `other`.
fn with_both(mut test: impl FnMut(&Path, &mut Peer) -> Vec<Value>) {
    let mut answers = Vec::new();
    for program in [QEMU, LIVEBLKD] {
        let Some(directory) = workshop("") else {
            return;
        };
        let directory = directory.path();
        for line in [
            "create -q -f qcow2 base 64M",
            "create -q -f qcow2 other 64M",
            "rebase -u -f qcow2 -F qcow2 -b base image",
        ] {
            tool(directory, &format!("qemu-img {line}"));
        }
        let other = "qcow2,node-name=other,file.driver=file,file.filename=other";
        let base = "qcow2,node-name=b,read-only=on,file.driver=file,file.filename=base";
        let more = ["--blockdev", other, "--blockdev", base];
        let mut peer = Peer::start_chain(program, directory, &more, "b");
        answers.push(test(directory, &mut peer));
        peer.quit();
    }
    assert_eq!(answers[0], answers[1]);
}

/// Adds an export `x` with these bitmaps; the error, or what it says of the contexts whose names are given.
fn shown(
    directory: &Path,
    peer: &mut Peer,
    writable: bool,
    bitmaps: Value,
    contexts: &[&str],
) -> Value {
    let export = json!({"type": "nbd", "id": "x", "node-name": "a", "name": "x", "writable": writable, "bitmaps": bitmaps});
    let reply = peer.client.call("block-export-add", export);
    if reply["error"].is_object() {
        return reply["error"]["desc"].clone();
    }
    let uri = format!(
        "nbd+unix:///x?socket={}",
        directory.join("nbd.sock").display()
    );
    let maps = contexts.iter().map(|name| {
        let map = tool(
            directory,
            &format!("nbdinfo --json --map=qemu:dirty-bitmap:{name} {uri}"),
        );
        map.parse::<Value>().expect("JSON")
    });
    let maps: Vec<Value> = maps.collect();
    // Nobody else uses them meanwhile, and all may afterwards.
    let held = json!({"node": "a", "name": "t"});
    let busy = peer.client.call("block-dirty-bitmap-clear", held.clone());
    peer.client.execute("block-export-del", json!({"id": "x"}));
    json!([maps, busy["error"]["desc"]])
}

#[test]
fn bitmaps_are_told_as_qemu_tells_them() {
    if !has_program("nbdinfo") {
        return;
    }
    with_both(|directory, peer| {
        let mut add = |node: &str, name: &str, granularity: u32, disabled: bool| {
            let bitmap = json!({"node": node, "name": name, "granularity": granularity, "disabled": disabled});
            peer.client.execute("block-dirty-bitmap-add", bitmap);
        };
        add("a", "t", 65536, false);
        add("a", "fine", 512, false);
        add("a", "off", 4096, true);
        add("b", "below", 65536, false);
        add("b", "t", 65536, false);
        add("other", "o", 65536, false);
        for command in [
            "write 1M 100k",
            "write -z 5000000 70000",
            "discard 30M 1M",
            "write 67108352 512",
        ] {
            guest(directory, command);
        }
        let below = json!({"node": "b", "name": "below"});
        let wanted = [
            (true, json!(["t"]), vec!["t"]),
            (true, json!(["fine", "t", "off"]), vec!["fine", "off"]),
            (true, json!([{"node": "a", "name": "fine"}]), vec!["fine"]),
            (false, json!(["t"]), vec![]),
            (false, json!(["off"]), vec!["off"]),
            (false, json!(["below"]), vec!["below"]),
            (false, json!([below, "off"]), vec!["below"]),
            (false, json!([{"node": "other", "name": "o"}]), vec!["o"]),
            (true, json!(["o"]), vec![]),
            (true, json!([""]), vec![]),
            (true, json!([{"node": "nosuch", "name": "o"}]), vec![]),
            (true, json!([{"node": "b", "name": "o"}]), vec![]),
            (true, json!([]), vec![]),
        ];
        let answers = wanted.map(|(writable, bitmaps, contexts)| {
            shown(directory, peer, writable, bitmaps, &contexts)
        });
        answers.into()
    });
}

#[test]
fn a_bitmap_is_told_while_its_disk_is_written() {
    if !has_program("nbdinfo") {
        return;
    }
    with_both(|directory, peer| {
        peer.client
            .execute("block-dirty-bitmap-add", json!({"node": "a", "name": "t"}));
        let export = json!({"type": "nbd", "id": "x", "node-name": "a", "name": "x", "writable": true, "bitmaps": ["t"]});
        peer.client.execute("block-export-add", export);
        let uri = format!(
            "nbd+unix:///x?socket={}",
            directory.join("nbd.sock").display()
        );
        let mut maps = Vec::new();
        for place in [3, 1, 9] {
            guest(directory, &format!("write {place}M 1M"));
            let map = tool(
                directory,
                &format!("nbdinfo --json --map=qemu:dirty-bitmap:t {uri}"),
            );
            maps.push(map.parse().expect("JSON"));
        }
        // The export goes with the server, and leaves the bitmap to others.
        peer.client.execute("nbd-server-stop", json!({}));
        peer.client.execute(
            "block-dirty-bitmap-remove",
            json!({"node": "a", "name": "t"}),
        );
        maps
    });
}

/// A context has no other name than its bitmap's.
#[test]
fn two_bitmaps_of_one_name_are_refused() {
    let Some(directory) = workshop("") else {
        return;
    };
    let directory = directory.path();
    tool(directory, "qemu-img create -q -f qcow2 other 64M");
    let other = [
        "--blockdev",
        "qcow2,node-name=other,file.driver=file,file.filename=other",
    ];
    let mut peer = Peer::start_with(LIVEBLKD, directory, "qcow2", &other);
    for node in ["a", "other"] {
        peer.client
            .execute("block-dirty-bitmap-add", json!({"node": node, "name": "t"}));
    }
    let bitmaps = json!(["t", {"node": "other", "name": "t"}]);
    let told = shown(directory, &mut peer, true, bitmaps, &[]);
    assert_eq!(
        told,
        "Two bitmaps are called 't', as is what clients ask for"
    );
    let told = shown(
        directory,
        &mut peer,
        true,
        json!(["t", {"node": "a", "name": "t"}]),
        &[],
    );
    assert_eq!(
        told[1],
        "Bitmap 't' is currently in use by another operation and cannot be used"
    );
    peer.client.execute(
        "block-dirty-bitmap-remove",
        json!({"node": "a", "name": "t"}),
    );
    peer.quit();
}
