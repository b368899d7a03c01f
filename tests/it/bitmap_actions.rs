//! Bitmap actions in `transaction` over the control socket, held against QEMU's daemon.

use liveblk::testing::{Random, scale};
use serde_json::{Value, json};

use crate::qmp_bitmaps::{LIVEBLKD, Peer, QEMU, guest, tool, workshop};

/// What one of the daemons answers: to a command its error, or the bitmaps of all nodes.
fn answer(peer: &mut Peer, command: &str, arguments: &Value) -> Value {
    let reply = peer.client.call(command, arguments.clone());
    let Some(nodes) = reply["return"].as_array() else {
        return reply["error"]["desc"].clone();
    };
    let bitmaps = nodes
        .iter()
        .flat_map(|node| node["dirty-bitmaps"].as_array());
    let mut bitmaps: Vec<Value> = bitmaps.flatten().cloned().collect();
    bitmaps.sort_by_key(|bitmap| bitmap["name"].to_string());
    bitmaps.into()
}

fn named(kind: &str, name: &str) -> Value {
    json!({"type": format!("block-dirty-bitmap-{kind}"), "data": {"node": "a", "name": name}})
}

fn stored(name: &str) -> Value {
    json!({"type": "block-dirty-bitmap-add",
        "data": {"node": "a", "name": name, "persistent": true}})
}

fn merge(target: &str, sources: Value) -> Value {
    json!({"type": "block-dirty-bitmap-merge",
        "data": {"node": "a", "target": target, "bitmaps": sources}})
}

fn snapshot(node: &str, overlay: &str) -> Value {
    json!({"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}})
}

fn abort() -> Value {
    json!({"type": "abort", "data": {}})
}

/// Lists of actions, in the order in which both daemons get them; between them what bitmaps there are. None
/// ends with an `enable` that fails, and none clears what it has added and then fails: both crash QEMU.
fn transactions() -> Vec<Value> {
    let refused = [
        json!([named("remove", "p"), named("add", "p")]),
        json!([named("remove", "p"), named("clear", "p")]),
        json!([named("remove", "p"), merge("t", json!(["p"]))]),
        json!([named("remove", "p"), named("remove", "p")]),
        json!([named("add", "n"), stored("n")]),
        json!([
            named("add", "n"),
            named("clear", "t"),
            named("disable", "x")
        ]),
        json!([
            merge("t", json!(["p"])),
            named("clear", "p"),
            merge("t", json!(["x"]))
        ]),
        json!([
            named("clear", "p"),
            named("disable", "p"),
            named("remove", "t"),
            abort()
        ]),
        json!([
            stored("n"),
            merge("n", json!(["p", "t"])),
            named("clear", "p"),
            abort()
        ]),
        json!([{"type": "block-dirty-bitmap-add", "data": {"node": "x", "name": "n"}}]),
        json!([{"type": "block-dirty-bitmap-add",
            "data": {"node": "a", "name": "n", "granularity": 1000}}]),
        json!([{"type": "block-dirty-bitmap-clear", "data": {"node": "x", "name": "n"}}]),
        json!([{"type": "block-dirty-bitmap-nosuch", "data": {"node": "a", "name": "n"}}]),
        json!([{"type": "block-dirty-bitmap-merge", "data": {"node": "a", "target": "t"}}]),
        json!([merge("t", json!([{"node": "o", "name": "y"}]))]),
    ];
    let done = [
        json!([stored("n"), merge("n", json!(["p"])), named("clear", "p")]),
        json!([
            named("clear", "t"),
            merge("t", json!(["n"])),
            named("disable", "n")
        ]),
        json!([named("remove", "n"), named("enable", "t"), stored("m")]),
        json!([
            named("add", "u"),
            named("remove", "u"),
            named("disable", "t")
        ]),
    ];
    let last = [
        json!([snapshot("a", "o"), named("clear", "m"),
            {"type": "block-dirty-bitmap-add",
                "data": {"node": "o", "name": "q", "persistent": true}},
            abort()]),
        json!([snapshot("a", "o"), named("clear", "m"), merge("m", json!(["p"])),
            {"type": "block-dirty-bitmap-add",
                "data": {"node": "o", "name": "q", "persistent": true}}]),
        json!([named("clear", "m")]),
    ];
    refused.into_iter().chain(done).chain(last).collect()
}

/// Actions see those before them, the first that fails is told, and all are undone: in every list as QEMU
/// does, and then the images that are left have the same bitmaps.
#[test]
fn bitmap_actions_are_qemus() {
    let mut answers = Vec::new();
    let mut left = Vec::new();
    for program in [QEMU, LIVEBLKD] {
        let Some(directory) = workshop("") else {
            return;
        };
        let directory = directory.path();
        tool(directory, "qemu-img create -q -f qcow2 o 64M");
        let mut peer = Peer::start(program, directory);
        peer.client.execute(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "o", "backing": null,
                "file": {"driver": "file", "filename": "o"}}),
        );
        peer.add("p", 65536, false);
        let name = json!({"node": "a", "name": "t", "disabled": true});
        peer.client.execute("block-dirty-bitmap-add", name);
        let mut told = Vec::new();
        for (number, actions) in transactions().iter().enumerate() {
            guest(directory, &format!("write {}k 100k", number * 700));
            let arguments = json!({"actions": actions});
            told.push(answer(&mut peer, "transaction", &arguments));
            let flat = json!({"flat": true});
            told.push(answer(&mut peer, "query-named-block-nodes", &flat));
        }
        peer.quit();
        answers.push(told);
        let infos = ["image", "o"].map(|file| {
            tool(directory, &format!("qemu-img check -q -f qcow2 {file}"));
            let info = tool(directory, &format!("qemu-img info -U --output=json {file}"));
            let info: Value = serde_json::from_str(&info).expect("JSON");
            info["format-specific"]["data"]["bitmaps"].clone()
        });
        left.push(infos);
    }
    for (index, actions) in transactions().iter().enumerate() {
        for place in [2 * index, 2 * index + 1] {
            assert_eq!(answers[0][place], answers[1][place], "{actions:?}");
        }
    }
    assert_eq!(left[0], left[1]);
    assert!(
        left[1][0].as_array().is_some_and(|list| list.len() == 2),
        "{left:?}"
    );
}

/// What a failed transaction leaves is stored as before: the killed daemon's image says the same as without.
#[test]
fn an_aborted_transaction_leaves_what_is_stored() {
    let Some(directory) = workshop("") else {
        return;
    };
    let directory = directory.path();
    let mut peer = Peer::start(LIVEBLKD, directory);
    peer.add("p", 65536, false);
    guest(directory, "write 1M 1M");
    let before = std::fs::read(directory.join("image")).expect("the image");
    let actions = json!([
        stored("n"),
        merge("n", json!(["p"])),
        named("clear", "p"),
        named("remove", "p"),
        abort()
    ]);
    let told = answer(&mut peer, "transaction", &json!({"actions": actions}));
    assert_eq!(told, "Transaction aborted using Abort action");
    let after = std::fs::read(directory.join("image")).expect("the image");
    assert!(before == after, "the image has changed");
}

/// Any action on a few bitmaps of node `a` and of its overlay, many of which are refused.
fn any_action(random: &mut Random, overlay: &str) -> Value {
    let names = ["p", "t", "u", "n"];
    let name = random.choose(&names);
    let node = random.choose(&["a", "a", "a", overlay]);
    let named = json!({"node": node, "name": name});
    let kind = random.choose(&[
        "add", "store", "remove", "clear", "enable", "disable", "merge", "",
    ]);
    match kind {
        "" => json!({"type": "blockdev-snapshot-sync", "data": {"node-name": "a",
            "snapshot-file": format!("{overlay}.qcow2"), "snapshot-node-name": overlay}}),
        "store" => json!({"type": "block-dirty-bitmap-add",
            "data": {"node": node, "name": name, "persistent": true}}),
        "merge" => json!({"type": "block-dirty-bitmap-merge",
            "data": {"node": node, "target": name, "bitmaps": [random.choose(&names)]}}),
        kind => json!({"type": format!("block-dirty-bitmap-{kind}"), "data": named}),
    }
}

/// Random lists of snapshots and changes of bitmaps fail at one of their actions, at the latest the last.
#[test]
fn random_transactions_that_fail_leave_all_as_it_was() {
    let Some(directory) = workshop("") else {
        return;
    };
    let directory = directory.path();
    let mut peer = Peer::start(LIVEBLKD, directory);
    peer.add("p", 65536, false);
    peer.add("t", 4096, true);
    let name = json!({"node": "a", "name": "u"});
    peer.client.execute("block-dirty-bitmap-add", name);
    let flat = json!({"flat": true});
    let mut random = Random::new(1);
    let mut aborted = 0;
    for round in 0..150 * scale() {
        if round % 10 == 0 {
            guest(directory, &format!("write {}k 100k", round % 600 * 100));
        }
        let bitmaps = peer.bitmaps();
        let nodes = peer.client.execute("query-named-block-nodes", flat.clone());
        let overlay = format!("o{round}");
        let length = 1 + random.below(5);
        let mut actions: Vec<Value> = (0..length)
            .map(|_| any_action(&mut random, &overlay))
            .collect();
        actions.push(abort());
        let told = answer(&mut peer, "transaction", &json!({"actions": actions}));
        aborted += u32::from(told == "Transaction aborted using Abort action");
        assert_eq!(
            peer.bitmaps(),
            bitmaps,
            "round {round}: {actions:#?}: {told}"
        );
        let after = peer.client.execute("query-named-block-nodes", flat.clone());
        assert_eq!(after, nodes, "round {round}: {actions:#?}: {told}");
        assert!(!directory.join(format!("{overlay}.qcow2")).exists());
    }
    assert!(aborted > 10, "only {aborted} transactions got to their end");
    peer.quit();
    tool(directory, "qemu-img check -q -f qcow2 image");
}
