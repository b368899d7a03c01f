//! Persistent bitmaps of raw images over the control socket: what the state directory keeps, and what it refuses.

use std::fs;
use std::path::Path;
use std::process::Command;

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::qmp_bitmaps::{Peer, guest, tool};

const LIVEBLKD: &str = env!("CARGO_BIN_EXE_liveblkd");
const PART: u64 = 65536;

fn start(directory: &Path) -> Peer {
    Peer::start_with(LIVEBLKD, directory, "raw", &["--state-dir", "state"])
}

/// A directory with a raw image.
fn workshop() -> Option<TempDir> {
    if Command::new("qemu-io").arg("--version").output().is_err() {
        eprintln!("SKIPPED: qemu-io is not installed, which is the guest");
        return None;
    }
    let directory = tempfile::tempdir().expect("temporary directory");
    tool(directory.path(), "qemu-img create -q -f raw image 64M");
    Some(directory)
}

/// The one bitmap that there is.
fn only(peer: &mut Peer) -> Value {
    let mut bitmaps = peer.bitmaps();
    assert_eq!(bitmaps.len(), 1, "{bitmaps:?}");
    bitmaps.remove(0)
}

fn add(peer: &mut Peer, more: Value) -> Value {
    let mut arguments = json!({"node": "a", "name": "b", "persistent": true});
    let members = arguments.as_object_mut().expect("an object");
    members.extend(more.as_object().expect("an object").clone());
    peer.client.call("block-dirty-bitmap-add", arguments)
}

/// What the state directory has whose names end so.
fn files(directory: &Path, kind: &str) -> Vec<std::path::PathBuf> {
    let entries = fs::read_dir(directory.join("state"));
    let paths = entries
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    let is_it = |path: &std::path::PathBuf| path.extension().is_some_and(|end| end == kind);
    paths.filter(is_it).collect()
}

/// After kill -9 a bitmap has what was written, and not much more; after a clean end it is what it was.
#[test]
fn a_killed_daemon_leaves_valid_bitmaps_of_a_raw_image() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    let mut peer = start(directory);
    peer.add("b", PART, false);
    guest(directory, "write 1M 200k");
    guest(directory, "write -z 40M 64k");
    drop(peer);
    let mut peer = start(directory);
    let bitmap = only(&mut peer);
    assert_eq!(
        (&bitmap["recording"], &bitmap["persistent"]),
        (&json!(true), &json!(true))
    );
    assert_eq!(bitmap.get("inconsistent"), None);
    let count = bitmap["count"].as_u64().expect("a number");
    assert!((5 * PART..=4 << 20).contains(&count), "{bitmap}");
    let name = json!({"node": "a", "name": "b"});
    peer.client
        .execute("block-dirty-bitmap-clear", name.clone());
    guest(directory, "write 9M 10k");
    let before = only(&mut peer);
    assert_eq!(before["count"], PART);
    peer.quit();
    let mut peer = start(directory);
    assert_eq!(only(&mut peer), before, "closed and opened again");
    peer.quit();
    tool(directory, "qemu-img compare -q -f raw -F raw image image");
}

/// Somebody else's write is noticed after a clean end.
#[test]
fn bitmaps_do_not_outlive_another_programs_write() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    let mut peer = start(directory);
    peer.add("b", PART, false);
    guest(directory, "write 1M 200k");
    peer.quit();
    let image = fs::OpenOptions::new()
        .write(true)
        .open(directory.join("image"));
    let written = std::os::unix::fs::FileExt::write_at(&image.expect("it is there"), b"x", 0);
    assert_eq!(written.expect("written"), 1);
    for _ in 0..2 {
        let mut peer = start(directory);
        assert_eq!(only(&mut peer)["inconsistent"], true);
        let name = json!({"node": "a", "name": "b"});
        let refused = peer.client.call("block-dirty-bitmap-clear", name);
        let text = "Bitmap 'b' is inconsistent and cannot be used";
        assert_eq!(refused["error"]["desc"], text);
        peer.quit();
    }
    let mut peer = start(directory);
    let name = json!({"node": "a", "name": "b"});
    peer.client.execute("block-dirty-bitmap-remove", name);
    assert!(
        files(directory, "bitmaps").is_empty(),
        "nothing is left to keep"
    );
    assert_eq!(add(&mut peer, json!({})), json!({"return": {}}));
    peer.quit();
    assert_eq!(only(&mut start(directory)).get("inconsistent"), None);
}

/// Another image under the name, after a crash, too; and one that was moved has none.
#[test]
fn bitmaps_belong_to_one_image() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    let mut peer = start(directory);
    peer.add("b", PART, false);
    drop(peer);
    fs::rename(directory.join("image"), directory.join("moved")).expect("renamed");
    fs::copy(directory.join("moved"), directory.join("image")).expect("copied");
    let mut peer = start(directory);
    assert_eq!(only(&mut peer)["inconsistent"], true);
    drop(peer);
    fs::rename(directory.join("moved"), directory.join("image")).expect("renamed");
    let mut peer = start(directory);
    assert_eq!(
        only(&mut peer)["inconsistent"],
        true,
        "it was said to be so"
    );
}

/// The same while the daemon has the first one open; and one that has no name can be opened.
#[test]
fn an_image_that_loses_its_name_loses_its_bitmaps() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    let mut peer = start(directory);
    peer.add("b", PART, false);
    fs::rename(directory.join("image"), directory.join("old")).expect("renamed");
    fs::copy(directory.join("old"), directory.join("image")).expect("copied");
    peer.quit();
    assert_eq!(only(&mut start(directory))["inconsistent"], true);
    let mut peer = start(directory);
    fs::remove_file(directory.join("image")).expect("removed");
    guest(directory, "write 0 64k");
    let add = json!({"driver": "raw", "node-name": "r", "read-only": true, "file": {"driver": "file",
        "locking": "off", "filename": format!("/proc/{}/fd/{}", peer.id(), peer.descriptor_of("image"))}});
    peer.client.execute("blockdev-add", add);
}

/// Read-only and back, longer and shorter.
#[test]
fn bitmaps_of_a_raw_image_follow_its_node() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    let mut peer = start(directory);
    peer.add("b", PART, false);
    guest(directory, "write 1M 64k");
    peer.client.execute("block-export-del", json!({"id": "e"}));
    crate::qmp_daemon::poll(|| {
        let exports = peer.client.execute("query-block-exports", json!({}));
        exports.as_array().is_some_and(Vec::is_empty).then_some(())
    });
    for read_only in [true, false] {
        let options = json!({"options": [{"driver": "raw", "node-name": "a", "read-only": read_only,
            "file": {"driver": "file", "filename": "image"}}]});
        peer.client.execute("blockdev-reopen", options);
        let bitmap = only(&mut peer);
        assert_eq!(
            (&bitmap["count"], bitmap.get("inconsistent")),
            (&json!(PART), None)
        );
    }
    for size in [128_u64 << 20, 32 << 20] {
        let resize = json!({"node-name": "a", "size": size});
        peer.client.execute("block_resize", resize);
        assert_eq!(only(&mut peer)["count"], PART);
    }
    drop(peer);
    let mut peer = start(directory);
    let bitmap = only(&mut peer);
    assert_eq!(bitmap.get("inconsistent"), None, "{bitmap}");
    assert!(bitmap["count"].as_u64() >= Some(PART));
}

/// Nothing is made before it is needed, and what cannot be made is told with the option's name.
#[test]
fn a_state_directory_is_made_when_it_is_needed() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    let mut peer = start(directory);
    assert_eq!(
        add(&mut peer, json!({"persistent": false})),
        json!({"return": {}})
    );
    assert!(!directory.join("state").exists());
    let other = json!({"name": "c"});
    assert_eq!(add(&mut peer, other), json!({"return": {}}));
    assert_eq!(files(directory, "bitmaps").len(), 1);
    let long = json!({"name": "y".repeat(1024)});
    let refused = add(&mut peer, long)["error"]["desc"].to_string();
    assert!(refused.contains("Name length exceeds maximum"), "{refused}");
    peer.quit();
    for (state, why) in [
        (
            "",
            "there is no state directory for them (option --state-dir)",
        ),
        ("image/state", "(option --state-dir): Not a directory"),
        (
            "none/state",
            "(option --state-dir): No such file or directory",
        ),
    ] {
        let mut peer = Peer::start_with(LIVEBLKD, directory, "raw", &["--state-dir", state]);
        let refused = add(&mut peer, json!({}))["error"]["desc"].to_string();
        assert!(refused.contains(why), "{state}: {refused}");
        assert!(peer.bitmaps().is_empty());
        guest(directory, "write 0 64k");
        peer.quit();
    }
}

/// Of two daemons that open one image without its locks only one keeps bitmaps.
#[test]
fn two_daemons_do_not_share_what_is_kept() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    let mut peer = start(directory);
    peer.add("b", PART, false);
    let second = Command::new(LIVEBLKD)
        .current_dir(directory)
        .args(["--state-dir", "state", "--blockdev"])
        .arg("raw,node-name=a,file.driver=file,file.filename=image,file.locking=off")
        .output();
    let second = second.expect("it starts");
    let told = String::from_utf8_lossy(&second.stderr).into_owned();
    assert!(!second.status.success(), "{told}");
    assert!(told.contains("are in use by another process"), "{told}");
    guest(directory, "write 1M 64k");
    assert_eq!(only(&mut peer)["count"], PART);
}

#[test]
fn a_damaged_state_file_is_named() {
    let Some(directory) = workshop() else { return };
    let directory = directory.path();
    let mut peer = start(directory);
    peer.add("b", PART, false);
    peer.quit();
    let path = files(directory, "bitmaps").remove(0);
    let good = fs::read(&path).expect("it is there");
    let mut changed = good.clone();
    changed[80] ^= 1;
    for bad in [&good[..good.len() - 1], &good[..10], &[], &changed] {
        fs::write(&path, bad).expect("written");
        let refused = Command::new(LIVEBLKD)
            .current_dir(directory)
            .args(["--state-dir", "state", "--blockdev"])
            .arg("raw,node-name=a,file.driver=file,file.filename=image")
            .output();
        let refused = refused.expect("it starts");
        let told = String::from_utf8_lossy(&refused.stderr).into_owned();
        assert!(!refused.status.success(), "{told}");
        assert!(told.contains(".bitmaps': damaged: "), "{told}");
    }
    fs::write(&path, &good).expect("written");
    assert_eq!(only(&mut start(directory)).get("inconsistent"), None);
}
