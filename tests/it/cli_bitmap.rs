//! `liveblk bitmap` against QEMU's daemon and ours.

use std::path::Path;

use serde_json::Value;

use crate::cli::{daemon, failure, qemu, result};
use crate::cli_jobs::{quit, with_both};

fn write(place: &Path, command: &str) {
    let export = "nbd+unix:///top?socket=nbd";
    qemu(place, "qemu-io", &["-f", "raw", "-c", command, export]);
}

fn list(place: &Path) -> String {
    result(place, &["bitmap", "list"])
}

#[test]
fn bitmaps_are_added_changed_and_listed() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        assert_eq!(list(place), "no bitmaps\n");
        let silent = |words: &[&str]| assert_eq!(result(place, words), "", "{words:?}");
        silent(&["bitmap", "add", "--persistent", "daily"]);
        silent(&[
            "bitmap",
            "add",
            "-g",
            "4k",
            "--disabled",
            "--of",
            "e0",
            "all",
        ]);
        write(place, "write 64k 100k");
        let daily = "top: daily  128 KiB dirty (64 KiB each), recording, persistent\n";
        assert!(list(place).contains(daily), "{}", list(place));
        assert!(list(place).contains("top: all  0 B dirty (4 KiB each)\n"));
        silent(&["bitmap", "merge", "all", "daily"]);
        silent(&["bitmap", "clear", "daily"]);
        silent(&["bitmap", "disable", "daily"]);
        silent(&["bitmap", "enable", "--of", "top", "all"]);
        write(place, "write 1M 4k");
        let all = "top: all  132 KiB dirty (4 KiB each), recording\n";
        assert!(list(place).contains(all), "{}", list(place));
        assert!(list(place).contains("top: daily  0 B dirty (64 KiB each), persistent\n"));
        let json = result(place, &["bitmap", "list", "--output", "json", "e0"]);
        let json: Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(json.as_array().map(Vec::len), Some(2), "{json}");
        assert_eq!(json[0]["node"], "top");
        silent(&["bitmap", "remove", "all"]);
        assert_eq!(list(place).lines().count(), 1);
        quit(place, daemon);
        let info = qemu(place, "qemu-img", &["info", "top.qcow2"]);
        assert!(info.contains("name: daily"), "{info}");
    });
}

#[test]
fn what_cannot_be_done_with_a_bitmap_is_told() {
    with_both(|place, program| {
        let daemon = daemon(program, place);
        let error = failure(place, 1, &["bitmap", "clear", "none"]);
        assert!(error.contains("Dirty bitmap 'none' not found"), "{error}");
        let error = failure(place, 1, &["bitmap", "add", "-g", "1000", "b"]);
        assert!(error.contains("Granularity must be power of 2"), "{error}");
        let error = failure(place, 1, &["bitmap", "list", "nowhere"]);
        assert!(error.contains("nowhere"), "{error}");
        failure(place, 2, &["bitmap", "merge", "b"]);
        quit(place, daemon);
    });
}
