//! `liveblk backup` and `checkpoint` against QEMU's daemon and ours.

use std::path::Path;

use serde_json::Value;

use crate::cli::{daemon, failure, liveblk, qemu, result, waited};
use crate::cli_jobs::{assert_content, layers, quit, with_both};

/// Changes the device, through its export.
fn change(place: &Path, command: &str) {
    let uri = "nbd+unix:///top?socket=nbd";
    qemu(place, "qemu-io", &["-f", "raw", "-c", command, uri]);
}

fn compare(place: &Path, backup: &str, raw: &str) {
    let words = ["compare", "-q", "-F", "raw", "-f", "qcow2", backup, raw];
    qemu(place, "qemu-img", &words);
    qemu(place, "qemu-img", &["check", "-q", backup]);
}

fn moment(place: &Path, file: &str) {
    let uri = "nbd+unix:///top?socket=nbd";
    let words = ["convert", "-f", "raw", "-O", "raw", uri, file];
    qemu(place, "qemu-img", &words);
}

fn dirty(place: &Path, name: &str) -> Option<u64> {
    let nodes = result(place, &["qmp", "query-named-block-nodes", "flat=true"]);
    let nodes: Value = nodes.parse().expect("JSON");
    let nodes = nodes.as_array().expect("a list").iter();
    let bitmaps = nodes.flat_map(|node| node["dirty-bitmaps"].as_array().into_iter().flatten());
    let mut bitmaps = bitmaps.filter(|bitmap| bitmap["name"] == name);
    bitmaps.next()?["count"].as_u64()
}

#[test]
fn a_backup_without_a_bitmap_is_one_file() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        let (done, _) = waited(place, &["backup", "--wait", "--compress", "all.qcow2"]);
        assert_eq!(done, "backup0: completed\n");
        let error = failure(place, 1, &["backup", "all.qcow2"]);
        assert!(error.contains("all.qcow2' exists"), "{error}");
        let error = failure(place, 1, &["backup", "--onto", "all.qcow2", "more.qcow2"]);
        assert!(error.contains("--onto needs --bitmap"), "{error}");
        let words = ["backup", "--onto", "all.qcow2", "--bitmap", "b", "more.raw"];
        let error = failure(place, 1, &words);
        assert!(error.contains("cannot be put on another backup"), "{error}");
        let words = [
            "backup",
            "--onto",
            "all.qcow2",
            "--bitmap",
            "b",
            "more.qcow2",
        ];
        let error = failure(place, 1, &words);
        assert!(error.contains("Bitmap 'b' could not be found"), "{error}");
        assert!(!place.join("more.qcow2").exists());
        quit(place, daemon);
        assert_content(place, "all.qcow2");
    });
}

#[test]
fn each_increment_takes_one_command() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        let words = ["backup", "--wait", "--bitmap", "daily", "day0.qcow2"];
        waited(place, &words);
        for day in 1..4 {
            change(
                place,
                &format!("write -P {} {}k 100k", 0x40 + day, 900 * day),
            );
            assert_ne!(dirty(place, "daily"), Some(0));
            moment(place, &format!("day{day}.img"));
            let onto = format!("day{}.qcow2", day - 1);
            let file = format!("day{day}.qcow2");
            let words = [
                "backup", "--wait", "--bitmap", "daily", "--onto", &onto, &file,
            ];
            waited(place, &words);
            assert_eq!(dirty(place, "daily"), Some(0));
        }
        quit(place, daemon);
        for day in 1..4 {
            compare(place, &format!("day{day}.qcow2"), &format!("day{day}.img"));
        }
    });
}

#[test]
fn a_checkpoint_is_a_bitmap_and_a_backup_of_one_moment() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        waited(place, &["checkpoint", "--wait", "sunday", "sunday.qcow2"]);
        change(place, "write -P 9 1500k 200k");
        moment(place, "monday.img");
        let words = [
            "checkpoint",
            "--wait",
            "--since",
            "sunday",
            "--onto",
            "sunday.qcow2",
            "monday",
            "monday.qcow2",
        ];
        waited(place, &words);
        let between = dirty(place, "sunday");
        assert!(between > Some(0), "{between:?}");
        assert_eq!(dirty(place, "monday"), Some(0));
        change(place, "write -P 10 3M 64k");
        assert_eq!(
            dirty(place, "sunday"),
            between,
            "it does not record any more"
        );
        assert_eq!(dirty(place, "monday"), Some(65536));
        // What fails changes nothing.
        let error = failure(place, 1, &["checkpoint", "monday", "again.qcow2"]);
        assert!(error.contains("Bitmap already exists: monday"), "{error}");
        assert_eq!(dirty(place, "monday"), Some(65536));
        quit(place, daemon);
        compare(place, "monday.qcow2", "monday.img");
    });
}

#[test]
fn a_moment_is_shown_until_it_is_released() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        moment(place, "before.img");
        let words = ["checkpoint", "--fleece", "then", "scratch.qcow2"];
        assert_eq!(result(place, &words), "then\n");
        change(place, "write -P 9 500k 2M");
        let shown = "nbd+unix:///then?socket=nbd";
        let words = [
            "compare",
            "-q",
            "-f",
            "raw",
            "-F",
            "raw",
            "before.img",
            shown,
        ];
        qemu(place, "qemu-img", &words);
        assert_eq!(dirty(place, "then"), Some(2 << 20 | 1 << 16));
        // What fails changes nothing, and leaves nothing.
        let words = [
            "checkpoint",
            "--fleece",
            "--since",
            "x",
            "other",
            "o.qcow2",
            "e0",
        ];
        let error = failure(place, 1, &words);
        assert!(error.contains("Dirty bitmap 'x' not found"), "{error}");
        assert!(!place.join("o.qcow2").exists());
        assert_eq!(dirty(place, "other"), None);
        // A disk is no checkpoint.
        let error = failure(place, 1, &["checkpoint", "--release", "top"]);
        assert!(error.contains("no checkpoint 'top'"), "{error}");
        assert!(place.join("top.qcow2").exists());
        result(place, &["checkpoint", "--release", "then"]);
        assert!(!place.join("scratch.qcow2").exists());
        assert_eq!(result(place, &["jobs"]), "no jobs\n");
        assert_eq!(layers(place).len(), 3);
        let error = failure(place, 1, &["checkpoint", "--release", "then"]);
        assert!(error.contains("no checkpoint 'then'"), "{error}");
        quit(place, daemon);
    });
}

/// What a reader over NBD is told to have changed is enough to bring an earlier backup up to date.
#[test]
fn a_checkpoint_shows_what_changed_since_another_one() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        waited(place, &["checkpoint", "--wait", "sunday", "backup.raw"]);
        change(place, "write -P 9 1500k 200k");
        change(place, "write -z 300k 64k");
        moment(place, "monday.img");
        let words = [
            "checkpoint",
            "--fleece",
            "--since",
            "sunday",
            "monday",
            "m.qcow2",
        ];
        assert_eq!(result(place, &words), "monday\n");
        change(place, "write -P 10 3M 64k");
        change(place, "write -P 11 1500k 64k");
        let options = "driver=nbd,export=monday,server.type=unix,server.path=nbd,x-dirty-bitmap=qemu:dirty-bitmap:sunday";
        let map = qemu(
            place,
            "qemu-img",
            &["map", "--output=json", "--image-opts", options],
        );
        let map: Value = map.parse().expect("JSON");
        let uri = "nbd+unix:///monday?socket=nbd";
        qemu(
            place,
            "qemu-img",
            &["convert", "-f", "raw", "-O", "raw", uri, "shown.img"],
        );
        let dirty_extents = map.as_array().expect("a list").iter();
        let dirty_extents = dirty_extents.filter(|extent| extent["data"] == false);
        let mut copied = 0;
        for extent in dirty_extents {
            let [start, length] =
                ["start", "length"].map(|key| extent[key].as_u64().expect("bytes"));
            let [skip, seek] = ["skip", "seek"].map(|what| format!("{what}={}", start / 512));
            let count = format!("count={}", length / 512);
            let files = [
                "if=shown.img",
                "of=backup.raw",
                "bs=512",
                "conv=notrunc",
                "status=none",
            ];
            qemu(place, "dd", &[&files[..], &[&skip, &seek, &count]].concat());
            copied += length;
        }
        assert!(copied > 0 && copied < 1 << 20, "{map}");
        qemu(place, "cmp", &["backup.raw", "monday.img"]);
        result(place, &["checkpoint", "--release", "monday"]);
        assert_eq!(dirty(place, "sunday"), Some(copied));
        assert_eq!(dirty(place, "monday"), Some(192 << 10));
        quit(place, daemon);
    });
}

/// Where only the export fails, after the moment, bitmaps are as without it and nothing is left.
#[test]
fn a_checkpoint_that_cannot_be_shown_is_taken_back() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        waited(place, &["checkpoint", "--wait", "sunday", "backup.raw"]);
        change(place, "write -P 9 1500k 200k");
        let before = dirty(place, "sunday");
        result(
            place,
            &[
                "qmp",
                "block-export-add",
                "type=nbd",
                "id=taken",
                "name=monday",
                "node-name=top",
                "writable=true",
            ],
        );
        let words = [
            "checkpoint",
            "--fleece",
            "--since",
            "sunday",
            "monday",
            "m.qcow2",
            "e0",
        ];
        let error = failure(place, 1, &words);
        assert!(
            error.contains("already has export named 'monday'"),
            "{error}"
        );
        assert!(!place.join("m.qcow2").exists());
        assert_eq!(dirty(place, "monday"), None);
        assert_eq!(dirty(place, "sunday"), before);
        change(place, "write -P 9 3M 64k");
        assert!(dirty(place, "sunday") > before);
        assert_eq!(result(place, &["jobs"]), "no jobs\n");
        quit(place, daemon);
    });
}

fn differences(place: &Path, backup: &str, moment: &str) -> Value {
    let words = ["backup", "verify", "--output", "json", backup, moment];
    let output = liveblk(place, &words);
    let text = String::from_utf8(output.stdout).expect("UTF-8");
    let value: Value = text.parse().expect("JSON");
    let status = if value["identical"] == true { 0 } else { 3 };
    assert_eq!(output.status.code(), Some(status), "{text}");
    value
}

/// A chain of increments, the moment as an export and as a file, and a byte that went wrong.
#[test]
fn a_backup_is_verified_against_its_moment() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        waited(
            place,
            &["backup", "--wait", "--bitmap", "daily", "day0.qcow2"],
        );
        change(place, "write -P 0x71 300k 5k");
        let words = [
            "backup",
            "--wait",
            "--bitmap",
            "daily",
            "--onto",
            "day0.qcow2",
            "day1.qcow2",
        ];
        waited(place, &words);
        let uri = "nbd+unix:///top?socket=nbd";
        let same = differences(place, "day1.qcow2", uri);
        assert_eq!(same["identical"], true, "{same}");
        // An image that is being written is no moment.
        let error = failure(place, 1, &["backup", "verify", "day1.qcow2", "top.qcow2"]);
        assert!(
            error.contains("top.qcow2") && error.contains("lock"),
            "{error}"
        );
        moment(place, "day1.raw");
        change(place, "write -P 0x72 2M 1");
        let other = differences(place, "day1.qcow2", uri);
        let place_of = &other["differences"][0];
        assert_eq!(
            (place_of["start"].as_u64(), place_of["length"].as_u64()),
            (Some(2 << 20), Some(1))
        );
        assert_eq!(other["differing-bytes"], 1);
        quit(place, daemon);
        let same = differences(place, "day1.raw", "day1.qcow2");
        assert_eq!(same["backup"]["digest"], same["moment"]["digest"]);
        let digest = same["backup"]["digest"].as_str().expect("a digest");
        let text = result(
            place,
            &["backup", "verify", "--digest", digest, "day1.qcow2"],
        );
        assert!(text.ends_with("identical\n"), "{text}");
        let older = differences(place, "day0.qcow2", "day1.raw");
        assert_eq!(older["identical"], false, "{older}");
        let words = ["backup", "verify", "--digest", digest, "day0.qcow2"];
        assert_eq!(liveblk(place, &words).status.code(), Some(3));
    });
}

#[test]
fn what_cannot_be_verified_is_refused() {
    let place = tempfile::tempdir().expect("a directory");
    let place = place.path();
    result(place, &["image", "create", "a.qcow2", "3M"]);
    result(place, &["image", "create", "b.raw", "4M"]);
    let shorter = differences(place, "a.qcow2", "b.raw");
    assert_eq!(shorter["differences"][0]["start"].as_u64(), Some(3 << 20));
    assert_eq!(shorter["differing-bytes"].as_u64(), Some(1 << 20));
    let refused = |words: &[&str]| failure(place, 1, &[&["backup", "verify"], words].concat());
    assert!(refused(&["a.qcow2", "none.raw"]).contains("none.raw"));
    assert!(refused(&["a.qcow2", "nbd+unix:///x?socket=none"]).contains("none"));
    assert!(refused(&["a.qcow2", "a"]).contains("'a'"));
    let usage = |words: &[&str]| failure(place, 2, &[&["backup", "verify"], words].concat());
    assert!(usage(&["--digest", "12", "a.qcow2"]).contains("64 hexadecimal digits"));
    assert!(usage(&[]).contains("BACKUP"));
}
